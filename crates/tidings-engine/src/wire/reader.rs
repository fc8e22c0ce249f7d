//! Reading what a client sends: our rules on the header type of `tungstenite`.
//!
//! A reader holds memory only while a message is under way; between messages it is empty and its owner may drop it.

use std::io::Cursor;

use tidings_protocol::CloseCode;
use tungstenite::protocol::frame::{
    FrameHeader,
    coding::{CloseCode as WireCode, Control, Data, OpCode},
};

use super::{
    deflate::{InflateError, Inflater},
    reserve_up_to,
};

/// The longest header of a masked frame.
const HEADER_BYTES_MAX: usize = 14;
/// The longest payload of a control frame (RFC 6455, section 5.5).
const CONTROL_BYTES_MAX: u64 = 125;

/// What is allowed on a connection.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The largest message, inflated, in bytes.
    pub message_bytes_max: usize,
    /// Whether permessage-deflate was agreed on.
    pub deflate: bool,
    /// Whether binary messages are read.
    pub binary: Binary,
}

/// What becomes of binary messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// They are read.
    Read,
    /// The connection ends with [`Violation::Unsupported`].
    Refused,
}

/// Something whole that a client sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A text message.
    Text(String),
    /// A binary message.
    Binary(Vec<u8>),
    /// A ping with its payload, which the pong repeats.
    Ping(Vec<u8>),
    /// A pong; its payload says nothing that we asked.
    Pong,
    /// The client closes; with its code, if it gave one.
    Close(Option<u16>),
}

/// How a client broke the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A frame that RFC 6455 does not allow.
    Protocol,
    /// Text that is not UTF-8.
    Utf8,
    /// A message that is too big.
    TooBig,
    /// A binary message where none is read.
    Unsupported,
}

impl Violation {
    /// The code to close with.
    pub const fn close_code(self) -> CloseCode {
        match self {
            Self::Protocol => CloseCode::ProtocolError,
            Self::Utf8 => CloseCode::InvalidUtf8,
            Self::TooBig => CloseCode::MessageTooBig,
            Self::Unsupported => CloseCode::UnsupportedData,
        }
    }
}

/// Puts messages together from the bytes of one client.
#[derive(Debug, Default)]
pub struct Reader {
    /// The beginning of a header whose rest has not arrived.
    header: Vec<u8>,
    frame: Option<FrameUnderWay>,
    /// The payload of a control frame, which may come between the fragments of a message.
    control: Vec<u8>,
    message: Option<MessageUnderWay>,
    /// Fragments that came and ended no message.
    fragments: u32,
}

#[derive(Clone, Copy, Debug)]
struct FrameUnderWay {
    opcode: OpCode,
    is_final: bool,
    mask: [u8; 4],
    /// Bytes of the payload that have arrived.
    arrived: u64,
    length: u64,
}

#[derive(Debug)]
struct MessageUnderWay {
    text: bool,
    compressed: bool,
    payload: Vec<u8>,
    /// Up to here the payload is known to be UTF-8, so that rubbish is refused where it begins.
    checked: usize,
}

impl Reader {
    /// Whether no message is under way: an idle reader holds nothing and may be replaced by a new one.
    pub fn is_idle(&self) -> bool {
        self.header.is_empty() && self.frame.is_none() && self.message.is_none()
    }

    /// How many fragments that end no message have come since this was last asked. They may be empty, so that a limit on
    /// messages and their bytes alone does not limit them.
    pub fn take_fragments(&mut self) -> u32 {
        std::mem::take(&mut self.fragments)
    }

    /// Takes bytes off the front of `input` until something is whole. `None`: all of `input` was taken.
    ///
    /// After a violation the reader is idle: what the client goes on sending until it hears of it finds nothing to grow.
    pub fn read(
        &mut self,
        input: &mut &[u8],
        rules: &Rules,
        inflater: &mut Inflater,
    ) -> Result<Option<Incoming>, Violation> {
        let read = self.read_until_whole(input, rules, inflater);
        if read.is_err() {
            *self = Self::default();
        }
        read
    }

    fn read_until_whole(
        &mut self,
        input: &mut &[u8],
        rules: &Rules,
        inflater: &mut Inflater,
    ) -> Result<Option<Incoming>, Violation> {
        loop {
            let frame = match self.frame {
                Some(frame) => frame,
                None => match self.read_header(input, rules)? {
                    Some(frame) => *self.frame.insert(frame),
                    None => return Ok(None),
                },
            };
            if !self.read_payload(frame, input, rules)? {
                return Ok(None);
            }
            self.frame = None;
            if let Some(incoming) = self.finish(frame, rules, inflater)? {
                return Ok(Some(incoming));
            }
        }
    }

    fn read_header(&mut self, input: &mut &[u8], rules: &Rules) -> Result<Option<FrameUnderWay>, Violation> {
        let held = self.header.len();
        self.header.extend(input.iter().take(HEADER_BYTES_MAX - held));
        let mut cursor = Cursor::new(&self.header);
        let Some((header, length)) = FrameHeader::parse(&mut cursor).map_err(|_| Violation::Protocol)? else {
            *input = &input[self.header.len() - held..];
            return Ok(None);
        };
        let parsed = usize::try_from(cursor.position()).expect("a header is short");
        *input = &input[parsed - held..];
        self.header.clear();
        self.check_header(&header, length, rules)?;
        let mask = header.mask.ok_or(Violation::Protocol)?;
        Ok(Some(FrameUnderWay { opcode: header.opcode, is_final: header.is_final, mask, arrived: 0, length }))
    }

    /// RFC 6455, section 5: what the header alone decides, before anything is held for it.
    fn check_header(&mut self, header: &FrameHeader, length: u64, rules: &Rules) -> Result<(), Violation> {
        let compressed = header.rsv1;
        if header.rsv2 || header.rsv3 || (compressed && !rules.deflate) {
            return Err(Violation::Protocol);
        }
        match header.opcode {
            OpCode::Control(Control::Close | Control::Ping | Control::Pong) => {
                let valid = header.is_final && length <= CONTROL_BYTES_MAX && !compressed;
                return if valid { Ok(()) } else { Err(Violation::Protocol) };
            }
            OpCode::Data(kind @ (Data::Text | Data::Binary)) if self.message.is_none() => {
                if kind == Data::Binary && rules.binary == Binary::Refused {
                    return Err(Violation::Unsupported);
                }
                let text = kind == Data::Text;
                self.message = Some(MessageUnderWay { text, compressed, payload: Vec::new(), checked: 0 });
            }
            OpCode::Data(Data::Continue) if self.message.is_some() && !compressed => {}
            _ => return Err(Violation::Protocol),
        }
        let held = self.message.as_ref().map_or(0, |message| message.payload.len());
        if length.saturating_add(held as u64) > rules.message_bytes_max as u64 {
            return Err(Violation::TooBig);
        }
        Ok(())
    }

    /// Unmasks what has arrived of the frame's payload; whether that was all of it.
    fn read_payload(
        &mut self,
        frame: FrameUnderWay,
        input: &mut &[u8],
        rules: &Rules,
    ) -> Result<bool, Violation> {
        let missing = usize::try_from(frame.length - frame.arrived).unwrap_or(usize::MAX);
        let (now, rest) = input.split_at(missing.min(input.len()));
        *input = rest;
        let is_data = matches!(frame.opcode, OpCode::Data(_));
        let message = self.message.as_mut().filter(|_| is_data);
        let (target, check) = match message {
            Some(message) => {
                let check = message.text && !message.compressed;
                (&mut message.payload, check.then_some(&mut message.checked))
            }
            None => (&mut self.control, None),
        };
        reserve_up_to(target, now.len(), rules.message_bytes_max);
        let mut phase = usize::try_from(frame.arrived % 4).expect("below 4");
        target.extend(now.iter().map(|byte| {
            let unmasked = byte ^ frame.mask[phase];
            phase = (phase + 1) % 4;
            unmasked
        }));
        if let Some(checked) = check {
            check_utf8(target, checked)?;
        }
        if let Some(under_way) = &mut self.frame {
            under_way.arrived += now.len() as u64;
        }
        Ok(now.len() == missing)
    }

    fn finish(
        &mut self,
        frame: FrameUnderWay,
        rules: &Rules,
        inflater: &mut Inflater,
    ) -> Result<Option<Incoming>, Violation> {
        match frame.opcode {
            OpCode::Control(Control::Ping) => {
                return Ok(Some(Incoming::Ping(std::mem::take(&mut self.control))));
            }
            OpCode::Control(Control::Close) => {
                return read_close(&std::mem::take(&mut self.control)).map(Some);
            }
            OpCode::Control(_) => {
                self.control = Vec::new();
                return Ok(Some(Incoming::Pong));
            }
            OpCode::Data(_) if !frame.is_final => {
                self.fragments = self.fragments.saturating_add(1);
                return Ok(None);
            }
            OpCode::Data(_) => {}
        }
        let Some(MessageUnderWay { text, compressed, mut payload, checked }) = self.message.take() else {
            return Ok(None);
        };
        if compressed {
            payload = inflater.inflate(&payload, rules.message_bytes_max).map_err(|error| match error {
                InflateError::Malformed => Violation::Protocol,
                InflateError::TooBig => Violation::TooBig,
            })?;
        } else if text && checked < payload.len() {
            // It ends within a character.
            return Err(Violation::Utf8);
        }
        if !text {
            return Ok(Some(Incoming::Binary(payload)));
        }
        String::from_utf8(payload).map(|text| Some(Incoming::Text(text))).map_err(|_| Violation::Utf8)
    }
}

/// Checks what was not checked yet; the beginning of a character at the end waits for its rest.
fn check_utf8(payload: &[u8], checked: &mut usize) -> Result<(), Violation> {
    match std::str::from_utf8(&payload[*checked..]) {
        Ok(_) => *checked = payload.len(),
        Err(error) if error.error_len().is_none() => *checked += error.valid_up_to(),
        Err(_) => return Err(Violation::Utf8),
    }
    Ok(())
}

/// RFC 6455, section 7.4: no payload, or a code that may be sent and a reason in UTF-8.
fn read_close(payload: &[u8]) -> Result<Incoming, Violation> {
    let Some((code, reason)) = payload.split_first_chunk::<2>() else {
        return if payload.is_empty() { Ok(Incoming::Close(None)) } else { Err(Violation::Protocol) };
    };
    let code = u16::from_be_bytes(*code);
    if !WireCode::from(code).is_allowed() {
        return Err(Violation::Protocol);
    }
    std::str::from_utf8(reason).map_err(|_| Violation::Utf8)?;
    Ok(Incoming::Close(Some(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { message_bytes_max: 100, deflate: false, binary: Binary::Refused };

    /// A client's frame with a mask; `first` holds FIN and the opcode.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![first, 0x80 | u8::try_from(payload.len()).unwrap()];
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    /// Reads everything, in pieces of `step` bytes.
    fn read(bytes: &[u8], step: usize) -> Result<Vec<Incoming>, Violation> {
        let (mut reader, mut inflater) = (Reader::default(), Inflater::default());
        let mut read = Vec::new();
        for mut input in bytes.chunks(step) {
            while let Some(incoming) = reader.read(&mut input, &RULES, &mut inflater)? {
                read.push(incoming);
            }
            assert!(input.is_empty());
        }
        assert!(reader.is_idle());
        Ok(read)
    }

    #[test]
    fn messages_come_out_whole_however_they_arrive() {
        let bytes = [
            frame(0x81, "né".as_bytes()),
            frame(0x01, &"né".as_bytes()[..2]),
            frame(0x89, b"?"),
            frame(0x80, &"né".as_bytes()[2..]),
            frame(0x81, b""),
            frame(0x8A, b"!"),
            frame(0x88, &[0x03, 0xE8, b'b', b'y', b'e']),
        ]
        .concat();
        for step in [1, 2, 3, 7, 1000] {
            let read = read(&bytes, step).unwrap();
            let text = |text: &str| Incoming::Text(text.into());
            let expected = [
                text("né"),
                Incoming::Ping(b"?".to_vec()),
                text("né"),
                text(""),
                Incoming::Pong,
                Incoming::Close(Some(1000)),
            ];
            assert_eq!(read, expected, "in steps of {step}");
        }
    }

    #[test]
    fn fragments_are_counted_until_somebody_asks() {
        let (mut reader, mut inflater) = (Reader::default(), Inflater::default());
        let bytes = [frame(0x01, b""), frame(0x00, b""), frame(0x89, b""), frame(0x00, b"x")].concat();
        let mut input = &bytes[..];
        assert_eq!(reader.read(&mut input, &RULES, &mut inflater), Ok(Some(Incoming::Ping(Vec::new()))));
        assert_eq!((reader.take_fragments(), reader.take_fragments()), (2, 0));
        assert_eq!(reader.read(&mut input, &RULES, &mut inflater), Ok(None));
        assert_eq!(reader.take_fragments(), 1);
    }

    #[test]
    fn nothing_is_held_for_a_client_that_was_refused() {
        let (mut reader, mut inflater) = (Reader::default(), Inflater::default());
        let bad_text = &frame(0x81, &[0xFF; 50])[..20];
        assert_eq!(reader.read(&mut &bad_text[..], &RULES, &mut inflater), Err(Violation::Utf8));
        assert!(reader.is_idle());
        let good = frame(0x81, b"{}");
        let read = reader.read(&mut &good[..], &RULES, &mut inflater);
        assert_eq!(read, Ok(Some(Incoming::Text("{}".into()))));
    }

    #[test]
    fn a_message_takes_no_more_room_than_it_may_have() {
        let rules = Rules { message_bytes_max: 125, ..RULES };
        let (mut reader, mut inflater) = (Reader::default(), Inflater::default());
        for piece in frame(0x81, &[b'x'; 125]).chunks(70) {
            if let Some(Incoming::Text(text)) = reader.read(&mut &piece[..], &rules, &mut inflater).unwrap() {
                assert_eq!((text.len(), text.capacity()), (125, 125));
                return;
            }
        }
        panic!("the message is whole");
    }

    #[test]
    fn what_breaks_the_rules_is_refused_where_it_shows() {
        let unmasked = vec![0x81, 2, b'{', b'}'];
        let giant = [&[0x81, 0xFF][..], &u64::MAX.to_be_bytes(), &[0; 4]].concat();
        for (bytes, violation) in [
            (unmasked, Violation::Protocol),
            (frame(0xC1, b"{}"), Violation::Protocol),
            (frame(0x83, b""), Violation::Protocol),
            (frame(0x80, b"x"), Violation::Protocol),
            (frame(0x09, b""), Violation::Protocol),
            ([frame(0x01, b"a"), frame(0x81, b"b")].concat(), Violation::Protocol),
            (frame(0x88, b"\x03"), Violation::Protocol),
            (frame(0x88, &1005_u16.to_be_bytes()), Violation::Protocol),
            (frame(0x88, b"\x03\xE8\xFF"), Violation::Utf8),
            (frame(0x81, b"\xFF"), Violation::Utf8),
            (frame(0x01, b"ok \xF4\x90"), Violation::Utf8),
            (frame(0x81, "é".as_bytes()[..1].as_ref()), Violation::Utf8),
            (frame(0x81, &[b'x'; 101]), Violation::TooBig),
            (giant, Violation::TooBig),
            (frame(0x82, b"x"), Violation::Unsupported),
        ] {
            assert_eq!(read(&bytes, 1), Err(violation), "{bytes:?}");
        }
    }
}
