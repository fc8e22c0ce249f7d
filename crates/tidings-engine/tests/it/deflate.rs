//! permessage-deflate through `wire::Reader`, against streams by several compressors: two libraries, and one of our own
//! that emits what they never do. What is corrupt is judged by `miniz_oxide`, which the service does not use.
//!
//! A failure prints its seed; `reader.rs` says how to run it alone.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use miniz_oxide::{
    MZFlush,
    deflate::{
        core::{CompressorOxide, create_comp_flags_from_zip_params},
        stream::deflate,
    },
    inflate::{
        TINFLStatus,
        core::{DecompressorOxide, decompress, inflate_flags},
    },
};
use tidings_engine::wire::{Binary, Deflater, Incoming, Inflater, Reader, Rules, Violation};

use crate::{
    reader::{LengthForm, any_bytes, any_mask, any_text, for_each_seed, push_frame},
    simulation::Random,
};

/// What is cut off a compressed message (RFC 7692, section 7.2.1).
const TAIL: [u8; 4] = [0x00, 0x00, 0xFF, 0xFF];
/// What a reader may hold beside messages: a header, its fields.
const SMALL_BYTES: usize = 512;

/// A message that compresses well, somewhat or not at all.
fn any_message(random: &mut Random, bytes_max: usize) -> Vec<u8> {
    let length = match random.below(20) {
        0 => 0,
        1 => bytes_max - random.below(2),
        2 => bytes_max + 1 + random.below(2),
        3 => bytes_max * (2 + random.below(3)),
        4..12 => random.below(bytes_max.min(400)),
        _ => random.below(bytes_max),
    };
    match random.below(4) {
        0 => any_text(random, length).into_bytes(),
        1 => any_bytes(random, length),
        2 => vec![random.next().to_be_bytes()[0]; length],
        _ => {
            // Repeats itself, from near and from far.
            let mut message = Vec::with_capacity(length);
            while message.len() < length {
                let more = (1 + random.below(600)).min(length - message.len());
                if message.is_empty() || random.chance(30) {
                    message.extend(any_bytes(random, more.min(40)));
                } else {
                    let start = random.below(message.len());
                    message.extend_from_within(start..(start + more).min(message.len()));
                }
            }
            message
        }
    }
}

/// Any way to compress a message.
fn any_compressed(random: &mut Random, message: &[u8]) -> Vec<u8> {
    match random.below(7) {
        0 | 1 => by_zlib_rs(random, message),
        2 => by_miniz(random, message),
        3 => final_block(random, message),
        4 => stored_blocks(random, message),
        5 => {
            // A stream that ends, and another one (section 7.2.3.5).
            let (front, back) = message.split_at(random.below(message.len() + 1));
            let mut payload = final_block(random, front);
            payload.pop();
            payload.extend(any_compressed(random, back));
            payload
        }
        _ => Deflater::default().compress(message).unwrap_or_else(|| stored_blocks(random, message)),
    }
}

fn without_tail(mut payload: Vec<u8>) -> Vec<u8> {
    assert!(payload.ends_with(&TAIL));
    payload.truncate(payload.len() - TAIL.len());
    payload
}

/// Any level, any window, blocks that end anywhere.
fn by_zlib_rs(random: &mut Random, message: &[u8]) -> Vec<u8> {
    let level = Compression::new(u32::try_from(random.below(10)).unwrap());
    let window_bits = u8::try_from(9 + random.below(7)).unwrap();
    let mut compress = Compress::new_with_window_bits(level, false, window_bits);
    let mut payload = Vec::new();
    let mut rest = message;
    loop {
        let (now, later) =
            if random.chance(50) { (rest, &[][..]) } else { rest.split_at(random.below(rest.len() + 1)) };
        rest = later;
        let flush = if later.is_empty() {
            FlushCompress::Sync
        } else {
            *random.pick(&[
                FlushCompress::None,
                FlushCompress::Partial,
                FlushCompress::Sync,
                FlushCompress::Full,
            ])
        };
        let begun_at = compress.total_in();
        loop {
            payload.reserve(64 + now.len());
            let taken = usize::try_from(compress.total_in() - begun_at).unwrap();
            compress.compress_vec(&now[taken..], &mut payload, flush).unwrap();
            if payload.len() < payload.capacity() {
                break;
            }
        }
        if later.is_empty() {
            return if payload.is_empty() { vec![0] } else { without_tail(payload) };
        }
    }
}

fn by_miniz(random: &mut Random, message: &[u8]) -> Vec<u8> {
    let level = i32::try_from(random.below(11)).unwrap();
    let mut compressor = CompressorOxide::new(create_comp_flags_from_zip_params(level, 0, 0));
    let mut payload = vec![0; 2 * message.len() + 1000];
    let done = deflate(&mut compressor, message, &mut payload, MZFlush::Sync);
    assert!(done.status.is_ok() && done.bytes_consumed == message.len());
    payload.truncate(done.bytes_written);
    without_tail(payload)
}

/// A stream that ends by itself, and the byte that makes room for what is appended (section 7.2.3.4).
fn final_block(random: &mut Random, message: &[u8]) -> Vec<u8> {
    let mut payload = if random.chance(50) {
        miniz_oxide::deflate::compress_to_vec(message, u8::try_from(random.below(11)).unwrap())
    } else {
        let mut payload = Vec::with_capacity(2 * message.len() + 1000);
        let mut compress = Compress::new(Compression::new(u32::try_from(random.below(10)).unwrap()), false);
        let status = compress.compress_vec(message, &mut payload, FlushCompress::Finish).unwrap();
        assert_eq!(status, Status::StreamEnd);
        payload
    };
    payload.push(0);
    payload
}

/// Blocks without compression (section 7.2.3.3), some of them empty.
fn stored_blocks(random: &mut Random, message: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    let mut rest = message;
    while !rest.is_empty() {
        let length = random.below(rest.len().min(65_535) + 1);
        let (now, later) = rest.split_at(if random.chance(50) { rest.len().min(65_535) } else { length });
        rest = later;
        let length = u16::try_from(now.len()).unwrap();
        payload.push(0);
        payload.extend(length.to_le_bytes());
        payload.extend((!length).to_le_bytes());
        payload.extend(now);
    }
    payload.push(0);
    payload
}

/// Writes blocks with the fixed code (RFC 1951, section 3.2.6).
#[derive(Default)]
struct FixedBlocks {
    payload: Vec<u8>,
    bits: u64,
    count: u32,
    message: Vec<u8>,
}

impl FixedBlocks {
    fn bits(&mut self, value: usize, count: u32) {
        self.bits |= (value as u64) << self.count;
        self.count += count;
        while self.count >= 8 {
            self.payload.push(self.bits.to_le_bytes()[0]);
            self.bits >>= 8;
            self.count -= 8;
        }
    }

    /// Codes stand with their first bit first, all else with its last.
    fn code(&mut self, code: usize, count: u32) {
        let reversed = code.reverse_bits() >> (usize::BITS - count);
        self.bits(reversed, count);
    }

    fn symbol(&mut self, symbol: usize) {
        match symbol {
            0..144 => self.code(0x30 + symbol, 8),
            144..256 => self.code(0x190 + symbol - 144, 9),
            256..280 => self.code(symbol - 256, 7),
            _ => self.code(0xC0 + symbol - 280, 8),
        }
    }

    fn literal(&mut self, byte: u8) {
        self.symbol(byte.into());
        self.message.push(byte);
    }

    fn copy(&mut self, length: usize, distance: usize) {
        // Section 3.2.5: the ranges double every four lengths, and every two distances.
        match length - 3 {
            255 => self.symbol(285),
            over @ 0..8 => self.symbol(257 + over),
            over => {
                let extra = over.ilog2() - 2;
                self.symbol(257 + 4 * extra as usize + (over >> extra));
                self.bits(over & ((1 << extra) - 1), extra);
            }
        }
        match distance - 1 {
            over @ 0..4 => self.code(over, 5),
            over => {
                let extra = over.ilog2() - 1;
                self.code(2 * extra as usize + (over >> extra), 5);
                self.bits(over & ((1 << extra) - 1), extra);
            }
        }
        for _ in 0..length {
            self.message.push(self.message[self.message.len() - distance]);
        }
    }

    /// Copies from as far as the window reaches, which compressors keep away from, and blocks that are empty.
    fn any(random: &mut Random, bytes_max: usize) -> (Vec<u8>, Vec<u8>) {
        let mut blocks = Self::default();
        let length = random.below(bytes_max);
        while blocks.message.len() < length || random.chance(50) {
            blocks.bits(0b010, 3);
            while !random.chance(2) {
                let room = bytes_max - blocks.message.len();
                let reach = blocks.message.len().min(32_768);
                if room < 258 {
                    break;
                } else if reach == 0 || random.chance(20) {
                    blocks.literal(random.next().to_be_bytes()[0]);
                } else {
                    let length = if random.chance(30) { 258 } else { 3 + random.below(256) };
                    let distance = match random.below(4) {
                        0 => reach,
                        1 => 1 + random.below(reach.min(8)),
                        _ => 1 + random.below(reach),
                    };
                    blocks.copy(length, distance);
                }
            }
            blocks.symbol(256);
            if bytes_max - blocks.message.len() < 258 {
                break;
            }
        }
        // The header of an empty block without compression, of which the tail is the rest.
        blocks.bits(0, 3);
        if blocks.count > 0 {
            blocks.bits(0, 8 - blocks.count);
        }
        (blocks.payload, blocks.message)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Good(Vec<u8>),
    TooBig,
    /// Refused after this many bytes.
    Malformed(usize),
}

/// What a compressed payload means: the tail is appended, and it is whole only if a block may begin behind it.
fn judge(payload: &[u8], bytes_max: usize) -> Judged {
    if payload.is_empty() {
        return Judged::Good(vec![]);
    }
    let streams = [payload, &TAIL, &[1], &TAIL].concat();
    let (mut rest, mut message) = (&streams[..], vec![]);
    loop {
        let mut out = vec![0; bytes_max + 400 - message.len()];
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, taken, made) = decompress(&mut DecompressorOxide::new(), rest, &mut out, 0, flags);
        rest = &rest[taken..];
        message.extend_from_slice(&out[..made]);
        match status {
            _ if message.len() > bytes_max + 1 => return Judged::TooBig,
            TINFLStatus::Done if rest.is_empty() || rest.len() == 9 => {
                // A payload may end with the last block, without the byte behind it: other servers read that, too.
                return if message.len() > bytes_max { Judged::TooBig } else { Judged::Good(message) };
            }
            TINFLStatus::Done => {}
            _ => return Judged::Malformed(message.len()),
        }
    }
}

/// Whether a block's code has no symbol for its end (RFC 1951, section 3.2.7): refused with the block's header by us, and by
/// `miniz_oxide` where it breaks off, which it must.
fn has_block_without_end(payload: &[u8]) -> bool {
    let mut out = Vec::with_capacity(1 << 22);
    let inflated = Decompress::new(false).decompress_vec(payload, &mut out, FlushDecompress::Sync);
    let is_refused =
        inflated.is_err_and(|error| error.message() == Some("invalid code -- missing end-of-block"));
    is_refused && matches!(judge(payload, 1 << 22), Judged::Malformed(_))
}

/// Reads one message, compressed and in fragments, with pings in between.
fn read(
    random: &mut Random,
    payload: &[u8],
    rules: &Rules,
    inflater: &mut Inflater,
) -> Result<Vec<u8>, Violation> {
    let mut bytes = Vec::new();
    let (mut first, mut rest, mut pings) = (0x42, payload, 0);
    while random.chance(20) {
        let (now, later) = rest.split_at(random.below(rest.len() + 1));
        push_frame(&mut bytes, first, now, LengthForm::Shortest, Some(any_mask(random)));
        push_frame(&mut bytes, 0x89, b"?", LengthForm::Shortest, Some(any_mask(random)));
        pings += 1;
        (first, rest) = (0, later);
    }
    push_frame(&mut bytes, 0x80 | first, rest, LengthForm::Shortest, Some(any_mask(random)));

    let mut reader = Reader::default();
    let mut input = &bytes[..];
    loop {
        let mut read = Ok(None);
        let memory = allocation_counter::measure(|| read = reader.read(&mut input, rules, inflater));
        // The compressed message, and the inflated one twice while it moves to where it has more room.
        let limit = 3 * rules.message_bytes_max + SMALL_BYTES;
        assert!(memory.bytes_max <= limit as u64, "{} bytes held", memory.bytes_max);
        match read? {
            Some(Incoming::Ping(_)) => {
                pings -= 1;
                assert!(!reader.is_idle());
            }
            Some(Incoming::Binary(message)) => {
                assert!(message.len() <= rules.message_bytes_max);
                assert!(pings == 0 && input.is_empty() && reader.is_idle());
                return Ok(message);
            }
            other => panic!("{other:?}"),
        }
    }
}

fn any_rules(random: &mut Random) -> Rules {
    let message_bytes_max = *random.pick(&[125, 300, 1000, 1000, 5000, 5000, 40_000, 65_536, 100_000]);
    Rules { message_bytes_max, deflate: true, binary: Binary::Read }
}

#[test]
fn it_inflates_what_anybody_compressed() {
    let mut seen = [0_u64; 2];
    for_each_seed(1500, |random| {
        let rules = any_rules(random);
        let mut inflater = Inflater::default();
        for _ in 0..4 {
            let (payload, message) = if random.chance(20) {
                FixedBlocks::any(random, rules.message_bytes_max)
            } else {
                let message = any_message(random, rules.message_bytes_max);
                (any_compressed(random, &message), message)
            };
            let is_too_big = payload.len().max(message.len()) > rules.message_bytes_max;
            let expected = if is_too_big { Err(Violation::TooBig) } else { Ok(message) };
            assert!(read(random, &payload, &rules, &mut inflater) == expected, "{payload:?}");
            seen[usize::from(is_too_big)] += 1;
        }
    });
    println!("read, too big: {seen:?}");
}

#[test]
fn what_is_corrupt_is_refused_and_harms_nothing_after_it() {
    let mut seen = [0_u64; 3];
    for_each_seed(1500, |random| {
        let rules = any_rules(random);
        let mut inflater = Inflater::default();
        for _ in 0..4 {
            let mut payload = if random.chance(10) {
                let length = random.below(100);
                any_bytes(random, length)
            } else {
                let message = any_message(random, rules.message_bytes_max.min(3000));
                any_compressed(random, &message)
            };
            for _ in 0..random.below(4) {
                let within = if random.chance(50) { 20 } else { usize::MAX }.min(payload.len());
                match random.below(4) {
                    _ if payload.is_empty() => {}
                    0 => payload.truncate(random.below(payload.len())),
                    1 => {
                        payload.remove(random.below(within));
                    }
                    2 => payload.insert(random.below(within), random.next().to_be_bytes()[0]),
                    _ => payload[random.below(within)] ^= 1 << random.below(8),
                }
            }
            let read_corrupt = read(random, &payload, &rules, &mut inflater);
            let judged = judge(&payload, rules.message_bytes_max);
            let right = match (&read_corrupt, &judged) {
                // A payload counts before it is inflated, too.
                (Err(Violation::TooBig), _) if payload.len() > rules.message_bytes_max => true,
                // The byte that is too much, or what is wrong behind it.
                (Err(Violation::TooBig | Violation::Protocol), Judged::Malformed(bytes)) => {
                    let too_big = *bytes > rules.message_bytes_max;
                    too_big || read_corrupt == Err(Violation::Protocol)
                }
                (Err(Violation::TooBig), Judged::TooBig) => true,
                (Err(Violation::Protocol), Judged::TooBig) => has_block_without_end(&payload),
                (Ok(message), Judged::Good(expected)) => message == expected,
                _ => false,
            };
            assert!(right, "{read_corrupt:?}\n{judged:?}\n{payload:?}");
            seen[match judged {
                Judged::Good(_) => 0,
                Judged::TooBig => 1,
                Judged::Malformed(_) => 2,
            }] += 1;

            let good = any_text(random, 100).into_bytes();
            let payload = by_miniz(random, &good);
            assert_eq!(read(random, &payload, &rules, &mut inflater), Ok(good), "after {payload:?}");
        }
    });
    println!("still good, too big, malformed: {seen:?}");
}

#[test]
fn the_bit_of_a_compressed_message_stands_on_its_first_frame_and_nowhere_else() {
    let rules = Rules { message_bytes_max: 1000, deflate: true, binary: Binary::Read };
    let hello = [0xF2, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00];
    let bad_text = stored_blocks(&mut Random(0), b"\xFF");
    let text = || Ok(Incoming::Text("Hello".into()));
    for (frames, expected) in [
        (&[(0xC1, &hello[..])][..], text()),
        (&[(0x41, &hello[..1]), (0x00, b""), (0x80, &hello[1..])], text()),
        (&[(0x81, b"Hello")], text()),
        (&[(0xC1, &bad_text)], Err(Violation::Utf8)),
        (&[(0x81, b"\xFF")], Err(Violation::Utf8)),
        // Section 6.1: not on the other fragments, not on control frames; and no other bit.
        (&[(0x41, &hello[..1]), (0xC0, &hello[1..])], Err(Violation::Protocol)),
        (&[(0x01, b""), (0xC0, &hello)], Err(Violation::Protocol)),
        (&[(0xC0, &hello)], Err(Violation::Protocol)),
        (&[(0x41, &hello), (0xC1, &hello)], Err(Violation::Protocol)),
        (&[(0xC9, b"")], Err(Violation::Protocol)),
        (&[(0xCA, b"")], Err(Violation::Protocol)),
        (&[(0xC8, b"")], Err(Violation::Protocol)),
        (&[(0xE1, &hello)], Err(Violation::Protocol)),
        (&[(0xD1, &hello)], Err(Violation::Protocol)),
        (&[(0xA1, b"Hello")], Err(Violation::Protocol)),
        (&[(0xC3, &hello)], Err(Violation::Protocol)),
    ] {
        let mut bytes = Vec::new();
        for (first, payload) in frames {
            push_frame(&mut bytes, *first, payload, LengthForm::Shortest, Some([1, 2, 3, 4]));
        }
        let read = Reader::default().read(&mut &bytes[..], &rules, &mut Inflater::default());
        assert_eq!(read, expected.map(Some), "{frames:?}");
    }
}

#[test]
fn anybody_inflates_what_it_compressed() {
    let mut compressed = 0_u64;
    for_each_seed(600, |random| {
        let mut deflater = Deflater::default();
        for _ in 0..4 {
            let bytes_max = *random.pick(&[300, 1000, 5000, 100_000]);
            let message = any_message(random, bytes_max);
            let Some(payload) = deflater.compress(&message) else { continue };
            assert!(payload.len() < message.len());
            assert!(judge(&payload, message.len()) == Judged::Good(message), "{payload:?}");
            compressed += 1;
        }
    });
    println!("compressed: {compressed}");
}
