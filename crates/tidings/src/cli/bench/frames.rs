//! WebSocket frames (RFC 6455, 5.2) out of the bytes of a connection, many at a time. Knows nothing of what is in them.

/// Frames longer than this are not kept whole: of those only the beginning and the end are shown.
pub(super) const WHOLE_BYTES_MAX: usize = 64 * 1024;
/// How much of a long frame's beginning is kept: enough for the fields before the state in a confirmation.
const HEAD_BYTES: usize = 1024;
/// How much of a long frame's end is kept: enough for what a server adds behind the publisher's fields.
const TAIL_BYTES: usize = 256;
/// The longest header of a frame that is not masked.
const HEADER_BYTES_MAX: usize = 10;

pub(super) const TEXT: u8 = 0x1;
pub(super) const CLOSE: u8 = 0x8;
pub(super) const PING: u8 = 0x9;
pub(super) const PONG: u8 = 0xA;

/// A frame that has come in completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    /// FIN, RSV and opcode as they came.
    pub(super) first: u8,
    /// The payload; of a long frame its beginning.
    pub(super) payload: &'a [u8],
    /// The end of the payload; of a frame that is kept whole the same as `payload`.
    pub(super) tail: &'a [u8],
}

impl Frame<'_> {
    pub(super) fn opcode(&self) -> u8 {
        self.first & 0x0F
    }

    pub(super) fn is_final(&self) -> bool {
        self.first & 0x80 != 0
    }

    /// RSV1: the payload went through permessage-deflate (RFC 7692).
    pub(super) fn is_compressed(&self) -> bool {
        self.first & 0x40 != 0
    }
}

/// Bytes that are no frame of a server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a masked frame from the server")]
pub(super) struct Masked;

/// What a connection has read of a frame that is not complete yet.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    rest: Vec<u8>,
    long: Option<Long>,
}

/// A long frame on its way.
#[derive(Debug)]
struct Long {
    first: u8,
    bytes_left: usize,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Scanner {
    /// Puts what was left over from the last read to the front of `buffer`, so that the next read goes behind it and
    /// frames lie in one piece. Returns how many bytes that is: at most `WHOLE_BYTES_MAX` and a header.
    pub(super) fn restore(&self, buffer: &mut [u8]) -> usize {
        buffer[..self.rest.len()].copy_from_slice(&self.rest);
        self.rest.len()
    }

    /// Shows every complete frame in `data` (what `restore` put there and what was read behind it) and keeps the rest.
    #[inline]
    pub(super) fn scan(&mut self, mut data: &[u8], mut each: impl FnMut(Frame<'_>)) -> Result<(), Masked> {
        self.rest.clear();
        if self.long.is_some() {
            data = self.continue_long(data, &mut each);
        }
        while let Some((header, length)) = header(data)? {
            let available = data.len() - header;
            if length <= available {
                let payload = &data[header..header + length];
                each(Frame { first: data[0], payload, tail: payload });
                data = &data[header + length..];
            } else if length <= WHOLE_BYTES_MAX {
                break;
            } else {
                self.long =
                    Some(Long { first: data[0], bytes_left: length, head: Vec::new(), tail: Vec::new() });
                data = self.continue_long(&data[header..], &mut each);
            }
        }
        self.rest.extend_from_slice(data);
        Ok(())
    }

    /// Takes what belongs to the long frame; returns what comes after it.
    fn continue_long<'a>(&mut self, data: &'a [u8], each: &mut impl FnMut(Frame<'_>)) -> &'a [u8] {
        let Some(long) = &mut self.long else { return data };
        let (mine, after) = data.split_at(long.bytes_left.min(data.len()));
        long.bytes_left -= mine.len();
        let head_room = HEAD_BYTES - long.head.len();
        long.head.extend_from_slice(&mine[..head_room.min(mine.len())]);
        long.tail.extend_from_slice(&mine[mine.len().saturating_sub(TAIL_BYTES)..]);
        long.tail.drain(..long.tail.len().saturating_sub(TAIL_BYTES));
        if long.bytes_left == 0 {
            each(Frame { first: long.first, payload: &long.head, tail: &long.tail });
            self.long = None;
        }
        after
    }
}

/// The length of the header at the front of `data` and of the payload behind it, if the header is there.
#[inline]
fn header(data: &[u8]) -> Result<Option<(usize, usize)>, Masked> {
    let Some(&[_, second]) = data.first_chunk() else { return Ok(None) };
    Ok(match second {
        0..=125 => Some((2, usize::from(second))),
        126 => data.first_chunk().map(|&[_, _, a, b]| (4, usize::from(u16::from_be_bytes([a, b])))),
        127 => data.first_chunk::<HEADER_BYTES_MAX>().map(|header| {
            let [_, _, length @ ..] = *header;
            (HEADER_BYTES_MAX, usize::try_from(u64::from_be_bytes(length)).unwrap_or(usize::MAX))
        }),
        _ => return Err(Masked),
    })
}

/// Appends a client's frame: masked, with a mask of zeros, which is a mask like any other.
pub(super) fn put_masked(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    out.push(0x80 | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ 0..=125), _) => out.push(0x80 | length),
        (_, Ok(length)) => {
            out.push(0xFE);
            out.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            out.push(0xFF);
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x81];
        match payload.len() {
            length @ 0..=125 => frame.push(u8::try_from(length).unwrap()),
            length @ 126..=65535 => {
                frame.push(126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                frame.push(127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(payload);
        frame
    }

    /// What the scanner shows when the bytes come in pieces of this size: head, tail, opcode.
    fn scanned(bytes: &[u8], piece_bytes: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let (mut scanner, mut seen) = (Scanner::default(), Vec::new());
        let mut buffer = vec![0; WHOLE_BYTES_MAX + HEADER_BYTES_MAX + piece_bytes];
        for piece in bytes.chunks(piece_bytes) {
            let start = scanner.restore(&mut buffer);
            buffer[start..start + piece.len()].copy_from_slice(piece);
            let each = |frame: Frame<'_>| seen.push((frame.payload.to_vec(), frame.tail.to_vec()));
            scanner.scan(&buffer[..start + piece.len()], each).unwrap();
        }
        seen
    }

    #[test]
    fn frames_come_out_the_same_however_the_bytes_were_cut() {
        let payloads = [vec![], vec![1; 125], vec![2; 126], vec![3; 250], vec![4; 65535], vec![5; 3]];
        let bytes: Vec<u8> = payloads.iter().flat_map(|payload| frame(payload)).collect();
        for piece_bytes in [1, 2, 3, 7, 254, 1000, 65536, bytes.len()] {
            let seen: Vec<_> = scanned(&bytes, piece_bytes).into_iter().map(|(head, _)| head).collect();
            assert_eq!(seen, payloads, "pieces of {piece_bytes}");
        }
    }

    #[test]
    fn a_long_frame_shows_its_beginning_and_its_end() {
        let mut payload = vec![b'x'; 1 << 20];
        payload[..5].copy_from_slice(b"first");
        payload[(1 << 20) - 4..].copy_from_slice(b"last");
        let mut bytes = frame(&payload);
        bytes.extend(frame(b"after"));
        for piece_bytes in [1000, 65536, 200_000] {
            let seen = scanned(&bytes, piece_bytes);
            assert_eq!(seen.len(), 2);
            assert!(seen[0].0.starts_with(b"first") && seen[0].1.ends_with(b"last"));
            assert_eq!(seen[1].0, b"after");
        }
    }

    #[test]
    fn a_masked_frame_from_a_server_is_refused() {
        assert_eq!(Scanner::default().scan(&[0x81, 0x80, 0, 0, 0, 0], |_| ()), Err(Masked));
    }

    #[test]
    fn a_clients_frame_has_its_length_and_a_mask() {
        let mut out = Vec::new();
        put_masked(&mut out, TEXT, &[7; 300]);
        assert_eq!(out[..8], [0x81, 0xFE, 1, 44, 0, 0, 0, 0]);
        assert_eq!(out.len(), 308);
    }
}
