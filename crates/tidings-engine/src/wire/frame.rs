//! Frames as a server writes them (RFC 6455, section 5.2): whole messages, unmasked.

use bytes::Bytes;
use tidings_protocol::CloseCode;

/// The longest header of an unmasked frame.
pub(crate) const HEADER_BYTES_MAX: usize = 10;

/// A ping without a payload.
pub(crate) const PING_FRAME: [u8; 2] = [Frame::Ping as u8, 0];

/// What a frame is: its first byte, FIN and RSV1 included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Frame {
    /// A text message.
    Text = 0x81,
    /// A text message compressed by permessage-deflate (RFC 7692, section 7.2.3: RSV1 is set).
    CompressedText = 0xC1,
    /// A binary message; only the conformance echo sends one.
    Binary = 0x82,
    /// The binary counterpart of [`Frame::CompressedText`].
    CompressedBinary = 0xC2,
    /// The sender closes.
    Close = 0x88,
    /// Asks for a pong.
    Ping = 0x89,
    /// Answers a ping.
    Pong = 0x8A,
}

impl Frame {
    /// A frame with this payload.
    pub fn encode(self, payload: &[u8]) -> Bytes {
        let header = Header::new(self, payload.len());
        let mut frame = Vec::with_capacity(header.as_bytes().len() + payload.len());
        frame.extend_from_slice(header.as_bytes());
        frame.extend_from_slice(payload);
        frame.into()
    }
}

/// A close frame that names a code and its reason.
pub fn close_frame(code: CloseCode) -> Bytes {
    close_frame_saying(code, code.reason())
}

/// A close frame with a reason of its own, of at most 123 bytes.
pub fn close_frame_saying(code: CloseCode, reason: &str) -> Bytes {
    Frame::Close.encode(&[&code.number().to_be_bytes()[..], reason.as_bytes()].concat())
}

/// The answer to a ping; `payload` has at most 125 bytes.
pub fn pong_frame(payload: &[u8]) -> Bytes {
    Frame::Pong.encode(payload)
}

/// The bytes before a payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    bytes: [u8; HEADER_BYTES_MAX],
    length: usize,
}

impl Header {
    pub(crate) fn new(frame: Frame, payload_bytes: usize) -> Self {
        let mut bytes = [0; HEADER_BYTES_MAX];
        bytes[0] = frame as u8;
        let length = match payload_bytes {
            short @ 0..=125 => {
                bytes[1] = u8::try_from(short).expect("at most 125");
                2
            }
            medium @ 126..=0xFFFF => {
                bytes[1] = 126;
                bytes[2..4].copy_from_slice(&u16::try_from(medium).expect("at most 65535").to_be_bytes());
                4
            }
            long => {
                bytes[1] = 127;
                bytes[2..10].copy_from_slice(&(long as u64).to_be_bytes());
                10
            }
        };
        Self { bytes, length }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_the_length_in_the_shortest_form() {
        for (length, header) in [
            (0, &[0x81, 0][..]),
            (125, &[0x81, 125]),
            (126, &[0x81, 126, 0, 126]),
            (65_535, &[0x81, 126, 0xFF, 0xFF]),
            (65_536, &[0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            assert_eq!(Header::new(Frame::Text, length).as_bytes(), header, "{length}");
        }
    }
}
