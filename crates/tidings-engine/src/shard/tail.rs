//! The end of a stream as its subscribers' sockets take it: framed bytes, encoded once, kept until the last cursor is past.
//!
//! Positions count bytes from the beginning of the tail's life and never repeat. A cursor stands between two frames.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Bytes;
use smallvec::SmallVec;
use tidings_protocol::Offset;

/// Frames up to this are copied together, so that many go out as one piece of memory; larger ones stay where they are and
/// are shared by everybody who still has to send them.
pub(super) const SHARED_BYTES_MIN: usize = 16 * 1024;
/// Frames are copied together up to this.
const CHUNK_BYTES: usize = 64 * 1024;
/// How many pieces of memory one write takes.
pub(super) const SLICES_MAX: usize = 16;

pub(super) type Slices<'a> = SmallVec<[IoSlice<'a>; SLICES_MAX]>;

/// Framed bytes of one cohort.
#[derive(Debug, Default)]
pub(super) struct Tail {
    chunks: VecDeque<Chunk>,
    frames: VecDeque<FrameEnd>,
    start: u64,
    end: u64,
    /// Everything behind this offset is here, if it is for the cohort.
    reaches_back_to: Offset,
}

#[derive(Debug)]
struct Chunk {
    start: u64,
    bytes: ChunkBytes,
}

#[derive(Debug)]
enum ChunkBytes {
    Packed(Vec<u8>),
    Shared(Bytes),
}

/// Where a frame ends, and what it was.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameEnd {
    /// The position behind it.
    pub(super) end: u64,
    pub(super) offset: Offset,
    /// When it came, in the shard's milliseconds.
    pub(super) at_ms: u64,
    /// Durable bytes of the cohort before it, counted from the cohort's beginning.
    pub(super) durable_before: u64,
}

impl Chunk {
    fn as_bytes(&self) -> &[u8] {
        match &self.bytes {
            ChunkBytes::Packed(bytes) => bytes,
            ChunkBytes::Shared(bytes) => bytes,
        }
    }
}

impl Tail {
    /// An empty tail that takes what comes behind `offset`.
    pub(super) fn behind(offset: Offset) -> Self {
        Self { reaches_back_to: offset, ..Self::default() }
    }

    /// The same, with its positions going on from `end`.
    pub(super) fn at(self, end: u64) -> Self {
        Self { start: end, end, ..self }
    }

    /// The position behind the last frame.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Appends a frame.
    pub(super) fn push(&mut self, frame: &Bytes, offset: Offset, at_ms: u64, durable_before: u64) {
        let start = self.end;
        if frame.len() >= SHARED_BYTES_MIN {
            self.chunks.push_back(Chunk { start, bytes: ChunkBytes::Shared(frame.clone()) });
        } else {
            match self.chunks.back_mut().map(|chunk| &mut chunk.bytes) {
                Some(ChunkBytes::Packed(packed)) if packed.len() + frame.len() <= CHUNK_BYTES => {
                    packed.extend_from_slice(frame);
                }
                _ => self.chunks.push_back(Chunk { start, bytes: ChunkBytes::Packed(frame.to_vec()) }),
            }
        }
        self.end += frame.len() as u64;
        self.frames.push_back(FrameEnd { end: self.end, offset, at_ms, durable_before });
    }

    /// Adds what lies behind `cursor` to `slices`, at most about `bytes_max`; returns how many bytes. Stops between two
    /// frames unless a single one is larger than `bytes_max`.
    pub(super) fn gather<'a>(&'a self, cursor: u64, bytes_max: usize, slices: &mut Slices<'a>) -> usize {
        let mut limit = self.end;
        if length(cursor, limit) > bytes_max {
            let wanted = cursor + bytes_max as u64;
            let fitting = self.frames.partition_point(|frame| frame.end <= wanted);
            limit = match fitting.checked_sub(1).and_then(|last| self.frames.get(last)) {
                Some(frame) if frame.end > cursor => frame.end,
                _ => wanted,
            };
        }
        let mut from = cursor;
        let first = self.chunks.partition_point(|chunk| chunk.start <= cursor).saturating_sub(1);
        for chunk in self.chunks.iter().skip(first) {
            if from >= limit || slices.len() == SLICES_MAX {
                break;
            }
            let bytes = chunk.as_bytes();
            let piece = &bytes[length(chunk.start, from)..bytes.len().min(length(chunk.start, limit))];
            from += piece.len() as u64;
            slices.push(IoSlice::new(piece));
        }
        length(cursor, from)
    }

    /// The first frame that lies behind `cursor` or has its end there; `None`: everything is before it.
    pub(super) fn next_frame(&self, cursor: u64) -> Option<&FrameEnd> {
        self.frames.get(self.frames.partition_point(|frame| frame.end <= cursor))
    }

    /// The last frame that ends at `cursor` or before.
    pub(super) fn last_frame(&self, cursor: u64) -> Option<&FrameEnd> {
        self.frames
            .partition_point(|frame| frame.end <= cursor)
            .checked_sub(1)
            .and_then(|at| self.frames.get(at))
    }

    /// How many frames end behind `from` and not behind `to`.
    pub(super) fn frames_between(&self, from: u64, to: u64) -> usize {
        if to == self.end && from == self.start {
            return self.frames.len();
        }
        let up_to = |position| self.frames.partition_point(|frame| frame.end <= position);
        up_to(to) - up_to(from)
    }

    /// The rest of the frame that `position` lies in, and the position behind it; `None` between two frames. Small frames
    /// are copied: their chunk would be much more to hold.
    pub(super) fn rest_of_frame(&self, position: u64) -> Option<(Bytes, u64)> {
        let frame = self.next_frame(position)?;
        if self.last_frame(position).map_or(self.start, |last| last.end) == position {
            return None;
        }
        let chunk =
            self.chunks.get(self.chunks.partition_point(|chunk| chunk.start <= position).checked_sub(1)?)?;
        let (from, to) = (length(chunk.start, position), length(chunk.start, frame.end));
        let rest = match &chunk.bytes {
            ChunkBytes::Packed(bytes) => Bytes::copy_from_slice(&bytes[from..to]),
            ChunkBytes::Shared(bytes) => bytes.slice(from..to),
        };
        Some((rest, frame.end))
    }

    /// The cursor of somebody who has everything up to `offset`; `None`: the tail does not reach back that far.
    pub(super) fn cursor_behind(&self, offset: Offset) -> Option<u64> {
        if offset < self.reaches_back_to {
            return None;
        }
        let known = self.frames.partition_point(|frame| frame.offset <= offset);
        Some(known.checked_sub(1).and_then(|at| self.frames.get(at)).map_or(self.start, |frame| frame.end))
    }

    /// Forgets what lies before `low`, where no cursor stands any more; how many bytes that were.
    pub(super) fn trim(&mut self, low: u64) -> usize {
        let low = low.min(self.end);
        let forgotten = length(self.start, low);
        while self.frames.front().is_some_and(|frame| frame.end <= low) {
            self.reaches_back_to = self.frames.pop_front().map_or(self.reaches_back_to, |frame| frame.offset);
        }
        self.start = self.start.max(low);
        if low == self.end {
            // Everybody has everything: the last chunk's memory serves again, at most one of them.
            self.chunks.truncate(1);
            match self.chunks.front_mut() {
                Some(Chunk { start, bytes: ChunkBytes::Packed(packed) }) => {
                    packed.clear();
                    *start = self.end;
                }
                _ => self.chunks.clear(),
            }
            return forgotten;
        }
        while self.chunks.len() > 1 && self.chunks.get(1).is_some_and(|next| next.start <= low) {
            self.chunks.pop_front();
        }
        forgotten
    }

    /// Gives back the memory that an empty tail keeps for the next frames.
    pub(super) fn shrink(&mut self) {
        if self.start == self.end {
            self.chunks = VecDeque::new();
            self.frames = VecDeque::new();
        }
    }
}

/// The distance between two positions.
fn length(from: u64, to: u64) -> usize {
    usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(frames: &[usize]) -> Tail {
        let mut tail = Tail::default();
        for (number, &length) in frames.iter().enumerate() {
            let frame = Bytes::from(vec![u8::try_from(number).unwrap(); length]);
            tail.push(&frame, number as u64 + 1, 0, 0);
        }
        tail
    }

    fn kept_bytes(tail: &Tail) -> usize {
        length(tail.start, tail.end)
    }

    fn gathered(tail: &Tail, cursor: u64, bytes_max: usize) -> Vec<u8> {
        let mut slices = Slices::new();
        let bytes = tail.gather(cursor, bytes_max, &mut slices);
        let gathered: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        assert_eq!(gathered.len(), bytes);
        gathered
    }

    #[test]
    fn small_frames_lie_together_and_large_ones_stay_whole() {
        let tail = tail(&[10, 20, 20_000, 30, 40_000]);
        let mut slices = Slices::new();
        assert_eq!(tail.gather(0, usize::MAX, &mut slices), 60_060);
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [30, 20_000, 30, 40_000]);
        assert_eq!(gathered(&tail, 10, 100), [1; 20]);
        assert_eq!(gathered(&tail, 30, 100), [2; 100], "a frame larger than the quantum goes in parts");
    }

    #[test]
    fn the_rest_of_a_frame_is_found_and_between_frames_there_is_none() {
        let tail = tail(&[10, 20_000, 5]);
        assert!(tail.rest_of_frame(0).is_none() && tail.rest_of_frame(10).is_none());
        assert_eq!(tail.rest_of_frame(4), Some((Bytes::from(vec![0; 6]), 10)));
        assert_eq!(tail.rest_of_frame(20_009), Some((Bytes::from(vec![1; 1]), 20_010)));
        assert!(tail.rest_of_frame(20_015).is_none());
    }

    #[test]
    fn trimming_forgets_what_is_before_and_nothing_else() {
        let mut tail = tail(&[10, 20_000, 30_000, 5]);
        assert_eq!(tail.trim(10), 10);
        assert_eq!((kept_bytes(&tail), gathered(&tail, 10, 50)), (50_005, vec![1; 50]));
        tail.trim(50_010);
        assert_eq!(gathered(&tail, 50_010, 50), [3; 5]);
        assert_eq!((tail.cursor_behind(2), tail.cursor_behind(3)), (None, Some(50_010)));
        assert_eq!(tail.cursor_behind(4), Some(50_015));
        tail.trim(50_015);
        tail.push(&Bytes::from_static(b"next"), 5, 0, 0);
        assert_eq!((gathered(&tail, 50_015, 50), kept_bytes(&tail)), (b"next".to_vec(), 4));
        assert_eq!(tail.frames_between(50_015, 50_019), 1);
    }
}
