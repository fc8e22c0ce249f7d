//! `wire::Reader` against `tungstenite`, which reads the same bytes by its own rules, and against a model that reads RFC
//! 6455 word for word. Both libraries share the header type; the model does not.
//!
//! A failure prints its seed: `TIDINGS_FUZZ_SEED=7 cargo test -p tidings-engine reader` runs that one alone, and
//! `TIDINGS_FUZZ_CASES=1000000` (with `--release`) more of them.

use std::io::{self, Read, Write};

use tidings_engine::wire::{Binary, Incoming, Inflater, Reader, Rules, Violation};
use tungstenite::{
    Error, Message, WebSocket,
    protocol::{Role, WebSocketConfig},
};

use crate::simulation::Random;

/// What a reader may hold beside a message: a header, a control frame, its fields.
const SMALL_BYTES: usize = 512;

/// Prints the seed of a case that panics.
struct SaysSeed(u64);

impl Drop for SaysSeed {
    #[allow(clippy::print_stderr, reason = "whoever runs the test needs it")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with TIDINGS_FUZZ_SEED={}", self.0);
        }
    }
}

/// Runs the case that the environment names, or as many as it says.
#[allow(clippy::disallowed_methods, reason = "a test may be told its seed")]
pub(crate) fn for_each_seed(cases: u64, mut case: impl FnMut(&mut Random)) {
    let mut run = |seed| {
        let _says_seed = SaysSeed(seed);
        case(&mut Random(seed));
    };
    if let Ok(seed) = std::env::var("TIDINGS_FUZZ_SEED") {
        return run(seed.parse().unwrap());
    }
    let cases = std::env::var("TIDINGS_FUZZ_CASES").map_or(cases, |cases| cases.parse().unwrap());
    (0..cases).for_each(run);
}

/// How a frame says its length.
#[derive(Clone, Copy)]
pub(crate) enum LengthForm {
    Shortest,
    TwoBytes,
    EightBytes,
}

/// Appends a frame as a client sends it; `first` holds FIN, RSV and the opcode.
pub(crate) fn push_frame(
    to: &mut Vec<u8>,
    first: u8,
    payload: &[u8],
    form: LengthForm,
    mask: Option<[u8; 4]>,
) {
    let mask_bit = if mask.is_some() { 0x80 } else { 0 };
    let length = payload.len();
    to.push(first);
    match (form, u8::try_from(length), u16::try_from(length)) {
        (LengthForm::Shortest, Ok(short @ ..126), _) => to.push(mask_bit | short),
        (LengthForm::Shortest | LengthForm::TwoBytes, _, Ok(medium)) => {
            to.push(mask_bit | 0x7E);
            to.extend(medium.to_be_bytes());
        }
        _ => {
            to.push(mask_bit | 0x7F);
            to.extend((length as u64).to_be_bytes());
        }
    }
    to.extend(mask.iter().flatten());
    let mask = mask.unwrap_or_default();
    to.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

pub(crate) fn any_mask(random: &mut Random) -> [u8; 4] {
    if random.chance(10) { [0; 4] } else { random.next().to_be_bytes()[..4].try_into().unwrap() }
}

pub(crate) fn any_bytes(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length).map(|_| random.next().to_be_bytes()[0]).collect()
}

/// At most `length` bytes of text, with characters of every size.
pub(crate) fn any_text(random: &mut Random, length: usize) -> String {
    let mut text = String::with_capacity(length);
    if length > 500 {
        text.push_str(&"{\"n\": 1} ".repeat((length - 100) / 9));
    }
    loop {
        let character =
            *random.pick(&['a', '"', '\0', 'é', '\u{7FF}', '€', '\u{D7FF}', '\u{FFFF}', '😀', '\u{10FFFF}']);
        if text.len() + character.len_utf8() > length {
            break;
        }
        text.push(character);
    }
    text.extend(std::iter::repeat_n('x', length - text.len()));
    text
}

/// Bytes of clients that know the rules, mistake them or break them.
struct Generator<'a> {
    random: &'a mut Random,
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl Generator<'_> {
    fn generate(mut self) -> Vec<u8> {
        if self.random.chance(4) {
            let length = self.random.below(200);
            return any_bytes(self.random, length);
        }
        for _ in 0..=self.random.below(6) {
            match self.random.below(100) {
                0..55 => self.message(),
                55..72 => self.control(),
                72..77 => self.close(),
                77..84 => self.frame_with_any_header(),
                84..87 => self.bad_text(),
                87..90 => self.bad_sequence(),
                90..94 => self.too_big(),
                94..97 => self.large_claim(),
                _ => self.long_control(),
            }
        }
        if self.random.chance(10) && !self.bytes.is_empty() {
            for _ in 0..=self.random.below(3) {
                // Mostly near the front, where the headers are.
                let within = if self.random.chance(70) { 40 } else { usize::MAX }.min(self.bytes.len());
                let at = self.random.below(within);
                self.bytes[at] ^= 1 << self.random.below(8);
            }
        }
        if self.random.chance(15) && !self.bytes.is_empty() {
            let length = self.random.below(self.bytes.len());
            self.bytes.truncate(length);
        }
        self.bytes
    }

    fn push(&mut self, first: u8, payload: &[u8]) {
        let form = match self.random.below(40) {
            0 => LengthForm::TwoBytes,
            1 => LengthForm::EightBytes,
            _ => LengthForm::Shortest,
        };
        let mask = any_mask(self.random);
        let mask = (!self.random.chance(1)).then_some(mask);
        push_frame(&mut self.bytes, first, payload, form, mask);
    }

    fn length(&mut self) -> usize {
        let length = match self.random.below(100) {
            0..60 => self.random.below(20),
            60..90 => self.random.below(300),
            90..97 => *self.random.pick(&[0, 1, 124, 125, 126, 127, 128]),
            97 => *self.random.pick(&[65_534, 65_535, 65_536, 65_537]),
            _ => self.bytes_max - self.random.below(3),
        };
        length.min(self.bytes_max)
    }

    fn message(&mut self) {
        let length = self.length();
        if self.random.chance(60) {
            let text = any_text(self.random, length);
            self.fragments(1, text.as_bytes());
        } else {
            let bytes = any_bytes(self.random, length.min(2000));
            self.fragments(2, &bytes);
        }
    }

    /// A message in one frame or more, cut anywhere, with control frames in between.
    fn fragments(&mut self, opcode: u8, payload: &[u8]) {
        let (mut first, mut rest) = (opcode, payload);
        while self.random.chance(30) {
            let (now, later) = rest.split_at(self.random.below(rest.len() + 1));
            self.push(first, now);
            (first, rest) = (0, later);
            if self.random.chance(30) {
                self.control();
            }
        }
        self.push(0x80 | first, rest);
    }

    fn control(&mut self) {
        let length = if self.random.chance(20) { 125 } else { self.random.below(12) };
        let payload = any_bytes(self.random, length);
        let first = *self.random.pick(&[0x89, 0x89, 0x8A]);
        self.push(first, &payload);
    }

    fn close(&mut self) {
        const CODES: [u16; 26] = [
            0, 999, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014,
            1015, 1016, 2999, 3000, 3999, 4000, 4999, 5000, 65_535,
        ];
        let mut payload = match self.random.below(10) {
            0 => vec![],
            1 => vec![3],
            2 => any_bytes(self.random, 2),
            _ => self.random.pick(&CODES).to_be_bytes().to_vec(),
        };
        if payload.len() == 2 {
            let length = if self.random.chance(20) { 123 } else { self.random.below(20) };
            payload.extend(any_text(self.random, length).bytes());
            if self.random.chance(20) {
                let at = self.random.below(payload.len());
                payload[at] = 0xFF;
            }
        }
        self.push(0x88, &payload);
    }

    fn frame_with_any_header(&mut self) {
        let first = self.random.next().to_be_bytes()[0];
        let length = self.length();
        let payload = any_text(self.random, length);
        self.push(first, payload.as_bytes());
    }

    fn bad_text(&mut self) {
        // Overlong, surrogate, beyond the last character, a stray continuation, the beginning of a character.
        const BAD: [&[u8]; 8] = [
            b"\xC0\x80",
            b"\xE0\x80\x80",
            b"\xED\xA0\x80",
            b"\xF4\x90\x80\x80",
            b"\x80",
            b"\xF0\x9F",
            b"\xE2\x82",
            b"\xFF",
        ];
        let length = self.length();
        let mut payload = any_text(self.random, length).into_bytes();
        let at = if self.random.chance(50) { payload.len() } else { self.random.below(payload.len() + 1) };
        payload.splice(at..at, self.random.pick(&BAD).iter().copied());
        self.fragments(1, &payload);
    }

    /// Continues what has not begun, or begins before the last has ended.
    fn bad_sequence(&mut self) {
        for _ in 0..2 {
            let first = *self.random.pick(&[0x00, 0x80, 0x01, 0x81, 0x02, 0x82]);
            self.push(first, b"x");
        }
    }

    /// One byte more than allowed, in one frame or in all.
    fn too_big(&mut self) {
        if self.random.chance(20) || self.bytes_max < 2000 {
            let payload = vec![b'x'; self.bytes_max + 1 + self.random.below(2)];
            self.fragments(1, &payload);
        } else {
            // Frames that are empty cost nothing and are no message.
            self.push(1, b"");
            self.push(0, b"");
            self.push(0x80, b"");
        }
    }

    /// A header that claims more than ever arrives.
    fn large_claim(&mut self) {
        let lengths = [u64::MAX, 1 << 63, i64::MAX as u64, 1 << 32, self.bytes_max as u64, 65_536];
        let first = *self.random.pick(&[0x81, 0x01, 0x80, 0x82, 0x89, 0x88, 0xC1, 0x83]);
        self.bytes.extend([first, if self.random.chance(90) { 0xFF } else { 0x7F }]);
        self.bytes.extend(self.random.pick(&lengths).to_be_bytes());
        self.bytes.extend([0; 4]);
        let arrives = self.random.below(30);
        self.bytes.extend(vec![b'y'; arrives]);
    }

    fn long_control(&mut self) {
        let length = 126 + self.random.below(3);
        let first = *self.random.pick(&[0x88, 0x89, 0x8A, 0x09]);
        self.push(first, &vec![b'z'; length]);
    }
}

/// How reading ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The bytes end, and no rule is broken so far.
    Open,
    Closed,
    Refused(Violation),
}

/// A frame's header, as section 5.2 has it.
#[derive(Clone, Copy, Debug)]
struct Header {
    first: u8,
    masked: bool,
    mask: [u8; 4],
    /// The header's own length.
    payload_at: usize,
    length: u64,
}

impl Header {
    /// `None`: it is not whole.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (&[first, second], rest) = bytes.split_first_chunk::<2>()?;
        let (length, rest) = match second & 0x7F {
            126 => {
                let (length, rest) = rest.split_first_chunk()?;
                (u64::from(u16::from_be_bytes(*length)), rest)
            }
            127 => {
                let (length, rest) = rest.split_first_chunk()?;
                (u64::from_be_bytes(*length), rest)
            }
            short => (u64::from(short), rest),
        };
        let masked = second & 0x80 != 0;
        let (mask, rest) = if masked { rest.split_first_chunk()? } else { (&[0; 4], rest) };
        Some(Self { first, masked, mask: *mask, payload_at: bytes.len() - rest.len(), length })
    }

    fn opcode(&self) -> u8 {
        self.first & 0x0F
    }

    fn is_final(&self) -> bool {
        self.first & 0x80 != 0
    }

    fn is_reserved(&self) -> bool {
        matches!(self.opcode(), 3..=7 | 11..=15)
    }
}

/// What a client's bytes mean by the RFC.
#[derive(Debug)]
struct Model {
    messages: Vec<Incoming>,
    end: End,
    /// Where nothing is under way: the ends of whole messages, and of control frames between messages.
    idle: Vec<usize>,
    /// The frame that is refused, or that is not whole.
    last: Option<LastFrame>,
}

#[derive(Clone, Copy, Debug)]
struct LastFrame {
    header: Header,
    /// Where it would end.
    end: u64,
}

impl Model {
    fn read(bytes: &[u8], rules: &Rules) -> Self {
        let mut model = Self { messages: vec![], end: End::Open, idle: vec![], last: None };
        let mut at = 0;
        let mut message: Option<(bool, Vec<u8>)> = None;
        loop {
            if message.is_none() {
                model.idle.push(at);
            }
            model.last = None;
            let Some(header) = Header::parse(&bytes[at..]) else { return model };
            let held = message.as_ref().map_or(0, |(_, payload)| payload.len() as u64);
            let payload_at = at + header.payload_at;
            let end = header.length.saturating_add(payload_at as u64);
            let message_bytes = header.length.saturating_add(held);
            model.last = Some(LastFrame { header, end });
            if let Some(violation) = judge(&header, message.is_some(), message_bytes, rules) {
                model.end = End::Refused(violation);
                return model;
            }
            let arrived = &bytes[payload_at..usize::try_from(end).unwrap().min(bytes.len())];
            let payload: Vec<u8> =
                arrived.iter().zip(header.mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            let is_whole = payload.len() as u64 == header.length;
            at = payload_at + payload.len();
            if header.opcode() >= 8 {
                if !is_whole {
                    return model;
                }
                match header.opcode() {
                    8 => match close(&payload) {
                        Ok(close) => {
                            model.messages.push(close);
                            model.end = End::Closed;
                            return model;
                        }
                        Err(violation) => {
                            model.end = End::Refused(violation);
                            return model;
                        }
                    },
                    9 => model.messages.push(Incoming::Ping(payload)),
                    _ => model.messages.push(Incoming::Pong),
                }
                continue;
            }
            let (is_text, so_far) = message.get_or_insert_with(|| (header.opcode() == 1, vec![]));
            so_far.extend(payload);
            if *is_text {
                let is_last = is_whole && header.is_final();
                if str::from_utf8(so_far).is_err_and(|error| is_last || error.error_len().is_some()) {
                    model.end = End::Refused(Violation::Utf8);
                    return model;
                }
            }
            if !is_whole {
                return model;
            }
            if header.is_final() {
                model.messages.push(match message.take().unwrap() {
                    (true, text) => Incoming::Text(String::from_utf8(text).unwrap()),
                    (false, bytes) => Incoming::Binary(bytes),
                });
            }
        }
    }
}

/// What the header alone decides. The order counts where it breaks more than one rule.
fn judge(header: &Header, continues: bool, message_bytes: u64, rules: &Rules) -> Option<Violation> {
    // Section 5.2: no extension was agreed on, and what is reserved is not used.
    if header.is_reserved() || header.first & 0x70 != 0 {
        return Some(Violation::Protocol);
    }
    if header.opcode() >= 8 {
        // Section 5.5.
        let valid = header.is_final() && header.length <= 125 && header.masked;
        return (!valid).then_some(Violation::Protocol);
    }
    // Section 5.4: fragments of messages do not mix.
    if continues != (header.opcode() == 0) {
        return Some(Violation::Protocol);
    }
    if header.opcode() == 2 && rules.binary == Binary::Refused {
        return Some(Violation::Unsupported);
    }
    if message_bytes > rules.message_bytes_max as u64 {
        return Some(Violation::TooBig);
    }
    // Section 5.1: a client masks.
    (!header.masked).then_some(Violation::Protocol)
}

fn close(payload: &[u8]) -> Result<Incoming, Violation> {
    match payload {
        [] => Ok(Incoming::Close(None)),
        [_] => Err(Violation::Protocol),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            // Section 7.4; 1012 and 1013 were registered later. 1014 was, too, but only a gateway says it, to its client.
            if !matches!(code, 1000..=1003 | 1007..=1013 | 3000..=4999) {
                return Err(Violation::Protocol);
            }
            str::from_utf8(reason).map_err(|_| Violation::Utf8)?;
            Ok(Incoming::Close(Some(code)))
        }
    }
}

/// A socket of bytes; what is written to it is dropped.
struct Bytes<'a>(&'a [u8]);

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Bytes<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_by_tungstenite(bytes: &[u8], bytes_max: usize) -> (Vec<Incoming>, End) {
    let config = WebSocketConfig::default()
        .read_buffer_size(1024)
        .max_message_size(Some(bytes_max))
        .max_frame_size(Some(bytes_max))
        .accept_unmasked_frames(false);
    let mut socket = WebSocket::from_raw_socket(Bytes(bytes), Role::Server, Some(config));
    let mut messages = Vec::new();
    let end = loop {
        messages.push(match socket.read() {
            Ok(Message::Text(text)) => Incoming::Text(text.as_str().into()),
            Ok(Message::Binary(bytes)) => Incoming::Binary(bytes.into()),
            Ok(Message::Ping(payload)) => Incoming::Ping(payload.into()),
            Ok(Message::Pong(_)) => Incoming::Pong,
            // So it reports a code that may not be sent (section 7.4): it refuses it by its answer.
            Ok(Message::Close(Some(close)))
                if u16::from(close.code) == 1002 && close.reason.as_str() == "Protocol violation" =>
            {
                break End::Refused(Violation::Protocol);
            }
            Ok(Message::Close(close)) => {
                messages.push(Incoming::Close(close.map(|close| close.code.into())));
                break End::Closed;
            }
            Err(Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)) => {
                break End::Open;
            }
            Err(Error::Protocol(_)) => break End::Refused(Violation::Protocol),
            Err(Error::Utf8(_)) => break End::Refused(Violation::Utf8),
            Err(Error::Capacity(_)) => break End::Refused(Violation::TooBig),
            other => panic!("{other:?}"),
        });
    };
    (messages, end)
}

/// The end that `tungstenite` reaches where the model reaches its own. They differ only in which rule they name of those
/// that one frame breaks.
fn end_by_tungstenite(bytes: &[u8], model: &Model, bytes_max: usize) -> End {
    let (End::Refused(violation), Some(frame)) = (model.end, &model.last) else { return model.end };
    if frame.header.is_reserved() {
        return model.end;
    }
    // It compares a frame's length with the limit before it looks at anything else, for control frames, too.
    if frame.header.length > bytes_max as u64 {
        return End::Refused(Violation::TooBig);
    }
    // It looks for the mask (section 5.1) before it adds the fragments up; we do it the other way round.
    if !frame.header.masked && violation == Violation::TooBig {
        return End::Refused(Violation::Protocol);
    }
    // A close frame with a code that may not be sent and a reason that is no text (section 5.5.1): we name the code.
    if frame.header.first == 0x88 && frame.header.masked && (2..=125).contains(&frame.header.length) {
        let payload = &bytes[usize::try_from(frame.end - frame.header.length).unwrap()..];
        let reason: Vec<u8> = (2..usize::try_from(frame.header.length).unwrap())
            .map(|at| payload[at] ^ frame.header.mask[at % 4])
            .collect();
        if str::from_utf8(&reason).is_err() {
            return End::Refused(Violation::Utf8);
        }
    }
    model.end
}

/// Reads the bytes in pieces, and holds the reader to what it promises on the way.
fn read_by_us(random: &mut Random, bytes: &[u8], rules: &Rules, model: &Model) -> (Vec<Incoming>, End) {
    let (mut reader, mut inflater) = (Reader::default(), Inflater::default());
    let piece_max = *random.pick(&[1, 3, 20, 1000, usize::MAX]);
    let (mut messages, mut held_bytes, mut at) = (Vec::new(), 0, 0);
    while at < bytes.len() {
        let piece = &bytes[at..][..=random.below(piece_max.min(bytes.len() - at))];
        let mut input = piece;
        loop {
            let before = input.len();
            let mut read = Ok(None);
            let memory = allocation_counter::measure(|| read = reader.read(&mut input, rules, &mut inflater));
            at += before - input.len();
            // Growing moves what is held, and both places exist for a moment.
            let peak_bytes = held_bytes + i64::try_from(memory.bytes_max).unwrap();
            held_bytes += memory.bytes_current;
            let limit = i64::try_from(rules.message_bytes_max + SMALL_BYTES).unwrap();
            assert!(held_bytes <= limit, "{held_bytes} bytes held");
            assert!(peak_bytes <= 2 * limit, "{peak_bytes} bytes held while growing");
            match read {
                Ok(None) => {
                    assert!(input.is_empty(), "bytes were left");
                    assert_eq!(reader.is_idle(), model.idle.contains(&at), "idle at {at}");
                    break;
                }
                Ok(Some(incoming)) => {
                    let closes = matches!(incoming, Incoming::Close(_));
                    held_bytes -= i64::try_from(capacity(&incoming)).unwrap();
                    messages.push(incoming);
                    if closes {
                        return (messages, End::Closed);
                    }
                    assert_eq!(reader.is_idle(), model.idle.contains(&at), "idle at {at}");
                    if reader.is_idle() && random.chance(20) {
                        reader = Reader::default();
                        held_bytes = 0;
                    }
                }
                Err(violation) => {
                    after_a_violation(reader, &bytes[at..], rules, &mut inflater);
                    return (messages, End::Refused(violation));
                }
            }
        }
    }
    (messages, End::Open)
}

fn capacity(incoming: &Incoming) -> usize {
    match incoming {
        Incoming::Text(text) => text.capacity(),
        Incoming::Binary(bytes) | Incoming::Ping(bytes) => bytes.capacity(),
        Incoming::Pong | Incoming::Close(_) => 0,
    }
}

/// What a client sends until it hears that it was refused costs no memory, and the reader serves the next client.
fn after_a_violation(mut reader: Reader, rest: &[u8], rules: &Rules, inflater: &mut Inflater) {
    assert!(reader.is_idle(), "a refused message is still held");
    for mut input in rest.chunks(64) {
        while let Ok(Some(_)) = reader.read(&mut input, rules, inflater) {}
        if reader.is_idle() {
            let mut frame = Vec::new();
            push_frame(&mut frame, 0x81, b"hello", LengthForm::Shortest, Some([1, 2, 3, 4]));
            let read = reader.read(&mut &frame[..], rules, inflater);
            assert_eq!(read, Ok(Some(Incoming::Text("hello".into()))));
        }
    }
}

#[test]
fn it_reads_and_refuses_what_tungstenite_does() {
    let mut seen = [0_u64; 6];
    let mut cases = 0;
    for_each_seed(8000, |random| {
        let bytes_max = *random.pick(&[125, 126, 300, 300, 2000, 2000, 2000, 65_535, 65_536, 70_000]);
        let bytes = Generator { random, bytes: vec![], bytes_max }.generate();
        let rules = Rules { message_bytes_max: bytes_max, deflate: false, binary: Binary::Read };
        let model = Model::read(&bytes, &rules);
        let (ours, end) = read_by_us(random, &bytes, &rules, &model);
        assert_eq!((&ours, end), (&model.messages, model.end), "we and the model\n{model:?}\n{bytes:?}");
        if random.chance(30) {
            // Where binary messages are refused, the first of them ends it, and nothing before is different.
            let rules = Rules { binary: Binary::Refused, ..rules };
            let model = Model::read(&bytes, &rules);
            let (ours, end) = read_by_us(random, &bytes, &rules, &model);
            assert_eq!((&ours, end), (&model.messages, model.end), "binary refused\n{model:?}\n{bytes:?}");
        }

        let expected = end_by_tungstenite(&bytes, &model, bytes_max);
        let (mut theirs, mut end) = read_by_tungstenite(&bytes, bytes_max);
        if end == End::Open && expected != End::Open {
            // We fail at once (sections 5.2, 8.1); it waits for the whole frame, whatever the rest is.
            let frame_end = usize::try_from(model.last.unwrap().end).unwrap();
            assert!(frame_end > bytes.len(), "it had the whole frame\n{model:?}\n{bytes:?}");
            let mut whole = bytes.clone();
            whole.resize(frame_end, 0);
            (theirs, end) = read_by_tungstenite(&whole, bytes_max);
        }
        assert_eq!((&theirs, end), (&model.messages, expected), "they and the model\n{model:?}\n{bytes:?}");

        cases += 1;
        seen[0] += model.messages.len() as u64;
        seen[match model.end {
            End::Open => 1,
            End::Closed => 2,
            End::Refused(Violation::Protocol) => 3,
            End::Refused(Violation::Utf8) => 4,
            End::Refused(_) => 5,
        }] += 1;
    });
    println!("messages, open, closed, protocol, utf8, too big: {seen:?} in {cases} cases");
    if cases > 1000 {
        assert!(seen.iter().all(|seen| seen * 50 > cases), "the generator has lost its point: {seen:?}");
    }
}
