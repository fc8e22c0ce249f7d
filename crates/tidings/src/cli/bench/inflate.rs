//! Compressed messages (RFC 7692, without context takeover). A server that compresses an event once sends the same bytes to
//! everybody, so most are recognised by comparing them with what was inflated before.

use flate2::{Decompress, FlushDecompress};

use super::sequence;

/// Events that are remembered, by their number modulo this.
const REMEMBERED: usize = 1024;
/// What a sender cuts off the end of every message.
const FLUSH_END: [u8; 4] = [0, 0, 0xFF, 0xFF];
/// The largest message that is inflated.
const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Inflates messages.
#[derive(Debug)]
pub(super) struct Inflater {
    decompress: Decompress,
    input: Vec<u8>,
    remembered: Vec<(u32, Vec<u8>)>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self {
            decompress: Decompress::new(false),
            input: Vec::new(),
            remembered: vec![(u32::MAX, Vec::new()); REMEMBERED],
        }
    }
}

impl Inflater {
    /// Whether this is an event that was inflated before; `expected` are the numbers that it may have.
    #[inline]
    pub(super) fn recognise(&self, payload: &[u8], expected: &[u32]) -> Option<u32> {
        expected.iter().copied().find(|&n| {
            let (known, bytes) = &self.remembered[n as usize % REMEMBERED];
            *known == n && bytes == payload
        })
    }

    /// The message, if it is one. An event is remembered.
    pub(super) fn inflate(&mut self, payload: &[u8]) -> Option<Vec<u8>> {
        self.input.clear();
        self.input.extend_from_slice(payload);
        self.input.extend_from_slice(&FLUSH_END);
        self.decompress.reset(false);
        let mut message = Vec::with_capacity(4 * self.input.len());
        loop {
            let (used, made) = (self.decompress.total_in(), self.decompress.total_out());
            let rest = &self.input[usize::try_from(used).ok()?..];
            self.decompress.decompress_vec(rest, &mut message, FlushDecompress::Sync).ok()?;
            if (used, made) == (self.decompress.total_in(), self.decompress.total_out()) {
                break;
            }
            if message.len() > MESSAGE_BYTES_MAX {
                return None;
            }
            message.reserve(message.len().max(64));
        }
        if self.decompress.total_in() != self.input.len() as u64 {
            return None;
        }
        if let Some(n) = sequence::number(&message) {
            self.remembered[n as usize % REMEMBERED] = (n, payload.to_vec());
        }
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    fn deflated(text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len() + 100);
        let mut compress = Compress::new(Compression::fast(), false);
        compress.compress_vec(text, &mut out, FlushCompress::Sync).unwrap();
        assert!(out.ends_with(&FLUSH_END));
        out.truncate(out.len() - FLUSH_END.len());
        out
    }

    #[test]
    fn an_event_is_inflated_once_and_recognised_from_then_on() {
        let event = format!("{{\"n\":\"00000007\",\"message\":\"{}\"}}", "again and ".repeat(5000));
        let payload = deflated(event.as_bytes());
        let mut inflater = Inflater::default();
        assert_eq!(inflater.recognise(&payload, &[7]), None);
        assert_eq!(inflater.inflate(&payload).unwrap(), event.as_bytes());
        assert_eq!(inflater.recognise(&payload, &[3, 7]), Some(7));
        assert_eq!(inflater.recognise(&payload, &[8]), None);
        assert_eq!(inflater.inflate(&deflated(b"{}")).unwrap(), b"{}");
    }

    #[test]
    fn what_is_no_deflate_is_refused() {
        assert_eq!(Inflater::default().inflate(&[0xFF; 20]), None);
    }
}
