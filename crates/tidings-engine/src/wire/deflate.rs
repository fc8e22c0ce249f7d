//! permessage-deflate (RFC 7692) without context takeover in either direction, so that a message compresses the same for
//! everybody and is compressed once.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::reserve_up_to;

/// What every compressed message ends with before it is sent, and what is cut off (RFC 7692, section 7.2.1).
const TAIL: [u8; 4] = [0x00, 0x00, 0xFF, 0xFF];
/// The same, and an empty final block: a message that breaks off within a block does not end with it.
const END: [u8; 9] = [0x00, 0x00, 0xFF, 0xFF, 0x01, 0x00, 0x00, 0xFF, 0xFF];
/// Below this a message is sent as it is: compressing it saves nothing worth the client's time.
const WORTHWHILE_BYTES_MIN: usize = 256;

/// Compresses messages.
#[derive(Debug)]
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        Self(Compress::new(Compression::fast(), false))
    }
}

impl Deflater {
    /// The message compressed; `None` where that saves nothing.
    pub fn compress(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        if message.len() < WORTHWHILE_BYTES_MIN {
            return None;
        }
        self.0.reset();
        let mut compressed = Vec::with_capacity(message.len() / 2 + 64);
        loop {
            let taken = usize::try_from(self.0.total_in()).expect("a message fits in memory");
            self.0
                .compress_vec(&message[taken..], &mut compressed, FlushCompress::Sync)
                .expect("compressing into memory does not fail");
            // Less than the whole room was used: everything is flushed.
            if compressed.len() < compressed.capacity() {
                break;
            }
            compressed.reserve(compressed.capacity().max(64));
        }
        debug_assert!(compressed.ends_with(&TAIL), "a sync flush ends so");
        compressed.truncate(compressed.len().saturating_sub(TAIL.len()));
        (compressed.len() < message.len()).then_some(compressed)
    }
}

/// Decompresses messages.
#[derive(Debug)]
pub struct Inflater(Decompress);

/// Why a compressed message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InflateError {
    /// It is no deflate stream.
    Malformed,
    /// It is larger than allowed; no more than that was inflated.
    TooBig,
}

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(false))
    }
}

impl Inflater {
    /// Inflates a message of at most `bytes_max` bytes. The limit holds while inflating, whatever the message claims.
    pub(crate) fn inflate(&mut self, message: &[u8], bytes_max: usize) -> Result<Vec<u8>, InflateError> {
        if message.is_empty() {
            return Ok(Vec::new());
        }
        self.0.reset(false);
        // One byte more than allowed shows that there are too many.
        let room_max = bytes_max.saturating_add(1);
        let mut inflated = Vec::with_capacity(message.len().saturating_mul(4).max(64).min(room_max));
        for mut input in [message, &END] {
            let mut is_whole = false;
            while !is_whole || !input.is_empty() {
                let before = self.0.total_in();
                let status = self.0.decompress_vec(input, &mut inflated, FlushDecompress::Sync);
                let status = status.map_err(|_| InflateError::Malformed)?;
                let taken = usize::try_from(self.0.total_in() - before).expect("a part of the input");
                input = &input[taken..];
                if inflated.len() > bytes_max {
                    return Err(InflateError::TooBig);
                }
                is_whole = status == Status::StreamEnd;
                if is_whole {
                    // A final block: allowed, and what follows starts a stream of its own (RFC 7692, section 7.2.3.5).
                    self.0.reset(false);
                } else if inflated.len() == inflated.capacity() {
                    reserve_up_to(&mut inflated, 1, room_max);
                } else if input.is_empty() {
                    break;
                } else if taken == 0 {
                    return Err(InflateError::Malformed);
                }
            }
            if is_whole {
                // Some end with a final block and leave out the byte that should follow it; nothing is missing.
                return Ok(inflated);
            }
        }
        Err(InflateError::Malformed)
    }
}

/// Answers a client's `Sec-WebSocket-Extensions`: the value to send back for the first offer that can be accepted.
///
/// An offer that wants a smaller window from us is declined, because a message is compressed once for all.
pub fn negotiate(offers: &str) -> Option<String> {
    offers.split(',').find_map(accept)
}

fn accept(offer: &str) -> Option<String> {
    let mut parts = offer.split(';').map(str::trim);
    if parts.next() != Some("permessage-deflate") {
        return None;
    }
    let mut answer =
        String::from("permessage-deflate; server_no_context_takeover; client_no_context_takeover");
    let mut seen = Vec::new();
    for part in parts {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name.trim(), Some(value.trim().trim_matches('"'))),
            None => (part, None),
        };
        if seen.contains(&name) {
            return None;
        }
        seen.push(name);
        match (name, value) {
            (
                "server_no_context_takeover" | "client_no_context_takeover" | "client_max_window_bits",
                None,
            ) => {}
            ("client_max_window_bits", Some(bits)) if is_window_bits(bits) => {}
            ("server_max_window_bits", Some("15")) => answer.push_str("; server_max_window_bits=15"),
            _ => return None,
        }
    }
    Some(answer)
}

fn is_window_bits(text: &str) -> bool {
    matches!(text, "8" | "9" | "10" | "11" | "12" | "13" | "14" | "15")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_inflates_to_itself() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for length in [256, 1000, 70_000, 1 << 20] {
            let message: Vec<u8> = (0..length).map(|n| b"abcdefgh \"x\""[(n * n / 7) % 12]).collect();
            let compressed = deflater.compress(&message).unwrap();
            assert!(compressed.len() < message.len());
            assert_eq!(inflater.inflate(&compressed, length).unwrap(), message);
        }
        assert_eq!(deflater.compress(b"short"), None);
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let bomb = deflater.compress(&vec![0; 64 << 20]).unwrap();
        assert!(bomb.len() < 1 << 20);
        assert_eq!(inflater.inflate(&bomb, 65_536), Err(InflateError::TooBig));
        assert_eq!(inflater.inflate(&[0xFF; 40], 65_536), Err(InflateError::Malformed));
        let after = deflater.compress(&[b'a'; 300]).unwrap();
        assert_eq!(inflater.inflate(&after, 65_536).unwrap(), [b'a'; 300]);
    }

    #[test]
    fn a_message_takes_no_more_room_than_it_may_have() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let message = vec![0; 10_000];
        let compressed = deflater.compress(&message).unwrap();
        let read = inflater.inflate(&compressed, 10_000).unwrap();
        assert_eq!((read.len(), read.capacity()), (10_000, 10_001));
    }

    #[test]
    fn a_message_that_breaks_off_is_refused() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let message = b"{\"type\": \"subscribe\"} ".repeat(20);
        let compressed = deflater.compress(&message).unwrap();
        for length in 1..compressed.len() {
            let read = inflater.inflate(&compressed[..length], 1000);
            assert_eq!(read, Err(InflateError::Malformed), "{length} of {}", compressed.len());
        }
        assert_eq!(inflater.inflate(&compressed, 1000).unwrap(), message);
    }

    #[test]
    fn a_final_block_ends_a_message_or_a_part_of_it() {
        // RFC 7692, section 7.2.3.4, and 7.2.3.5 with two of them.
        let hello = [0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00];
        let mut inflater = Inflater::default();
        let mut inflate = |message: &[u8]| inflater.inflate(message, 100).unwrap();
        assert_eq!(inflate(&[&hello[..], &[0x00]].concat()), b"Hello");
        assert_eq!(inflate(&hello), b"Hello");
        assert_eq!(inflate(&[hello, hello].concat()), b"HelloHello");
        assert_eq!(inflate(&[0x00]), b"");
        assert_eq!(inflate(&[]), b"");
    }

    #[test]
    fn offers_are_taken_in_their_order_if_they_can_be_kept() {
        let plain = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        for (offer, answer) in [
            ("permessage-deflate", Some(plain)),
            ("permessage-deflate; client_max_window_bits", Some(plain)),
            ("permessage-deflate;client_max_window_bits=\"10\";client_no_context_takeover", Some(plain)),
            ("x-other, permessage-deflate", Some(plain)),
            ("permessage-deflate; server_max_window_bits=9", None),
            ("permessage-deflate; server_max_window_bits=9, permessage-deflate", Some(plain)),
            ("permessage-deflate; client_max_window_bits=16", None),
            ("permessage-deflate; unknown", None),
            ("permessage-deflate; client_max_window_bits; client_max_window_bits", None),
            ("x-webkit-deflate-frame", None),
        ] {
            assert_eq!(negotiate(offer).as_deref(), answer, "{offer}");
        }
    }
}
