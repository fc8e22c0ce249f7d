//! One connection as its shard has it: a socket, what it follows, and what must be written to it before anything else.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Buf, Bytes};
use smallvec::SmallVec;
use tidings_protocol::{CloseCode, MessageId, Offset, Position, StreamId, TypeFilter};

use crate::{
    engine::Record,
    saved::{ClientId, ResumeToken},
    wire::Reader,
};

use super::{ConnectionKey, allowance::Allowance, encoding::Encoding, sessions::Seat, tail::Slices};

/// A connection. Small while it is idle: what it needs only now and then is boxed.
#[derive(Debug)]
pub(super) struct Client<S> {
    pub(super) socket: S,
    pub(super) key: ConnectionKey,
    pub(super) seat: Seat,
    pub(super) id: ClientId,
    pub(super) token: ResumeToken,
    pub(super) encoding: Encoding,
    /// What it follows. Most follow the announcements and a project, and a visit finds both where it finds the rest.
    pub(super) links: SmallVec<[Link; 2]>,
    /// Which of its links is written first, so that a full one does not starve the others.
    pub(super) first_link: usize,
    pub(super) outgoing: Option<Box<Outgoing>>,
    /// What is written when the session is known again.
    pub(super) frozen: Option<Box<Outgoing>>,
    pub(super) reading: Option<Box<Reading>>,
    pub(super) closing: Option<Closing>,
    /// The last pass that it was listed for.
    pub(super) pass: u64,
    /// The socket takes no more until it says so.
    pub(super) waits_for_socket: bool,
    /// Links whose first answer is still to come.
    pub(super) joining: u16,
    /// Links that take their events from the engine's history.
    pub(super) behind: u16,
    /// Since when the socket has taken nothing while something waited, in the shard's milliseconds.
    pub(super) stalled_since: Option<u64>,
    /// When something last came from the peer.
    pub(super) heard_ms: u64,
    /// When the next ping is due.
    pub(super) beat_ms: u64,
    /// When the last heartbeat went out.
    pub(super) heartbeat_ms: u64,
    /// The oldest ping that may be unanswered.
    pub(super) pinged_ms: Option<u64>,
    /// What it may still send.
    pub(super) allowance: Allowance,
    pub(super) flags: Flags,
}

/// What a connection is in the middle of.
#[derive(Clone, Copy, Debug, Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, packed because there is one per connection"
)]
pub(super) struct Flags {
    /// It is listed among those that hold bytes of a tail.
    pub(super) holds: bool,
    /// A message came: `resume` is not the first any more.
    pub(super) started: bool,
    /// The engine is asked for its former connection; nothing is read meanwhile.
    pub(super) resuming: bool,
    /// What it follows has changed since it was saved.
    pub(super) unsaved: bool,
    /// Its socket may hold bytes that were not read because it asked for more than it reads.
    pub(super) unread: bool,
    /// Nothing of a stream is written to it, because nobody knows whether its session still holds.
    pub(super) withheld: bool,
}

/// A connection on its way out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Closing {
    /// Everything that waits goes first.
    WhenWritten(CloseCode),
    /// Our close frame is the last thing to be written; the peer's is awaited.
    Said { code: CloseCode, until_ms: u64 },
    /// The peer closed; the answer is the last thing to be written.
    Answering { code: Option<u16>, until_ms: u64 },
}

/// What is needed while a client's messages are read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) reader: Reader,
    /// Bytes that were read off the socket before its client had asked for too much.
    pub(super) stash: Vec<u8>,
    /// Subscriptions that wait for earlier ones to be answered.
    pub(super) waiting: VecDeque<Subscribing>,
    /// A `resume` that the engine has not answered.
    pub(super) resuming: Option<Resuming>,
}

/// What a `resume` said beside its token.
#[derive(Debug)]
pub(super) struct Resuming {
    pub(super) id: Option<MessageId>,
    pub(super) positions: Vec<(StreamId, Position)>,
}

impl Reading {
    /// Whether nothing is under way, so that it need not be kept.
    pub(super) fn is_idle(&self) -> bool {
        self.reader.is_idle() && self.stash.is_empty() && self.waiting.is_empty() && self.resuming.is_none()
    }
}

/// A subscription that somebody asked for.
#[derive(Clone, Debug)]
pub(super) struct Subscribing {
    pub(super) stream: StreamId,
    pub(super) types: Arc<TypeFilter>,
    pub(super) since: Option<Position>,
    pub(super) id: Option<MessageId>,
}

/// A connection's place in a stream.
#[derive(Debug)]
pub(super) struct Link {
    /// The stream's place in the shard.
    pub(super) stream: usize,
    pub(super) cohort: usize,
    /// Its place among the cohort's members.
    pub(super) member: usize,
    /// Everything before it is written. While the engine is asked, what comes behind it is held.
    pub(super) cursor: u64,
    /// What the last heartbeat told.
    pub(super) told: Offset,
    pub(super) phase: Phase,
}

/// How a link gets its events.
#[derive(Debug)]
pub(super) enum Phase {
    /// From the tail, as everybody else.
    Live,
    /// The engine is asked where to begin.
    Joining(Box<Joining>),
    /// From the engine's history, in pages.
    Behind(Box<Behind>),
}

#[derive(Debug)]
pub(super) struct Joining {
    pub(super) ticket: u64,
    pub(super) since: Option<Position>,
    pub(super) id: Option<MessageId>,
}

/// A link that does not take its events from the tail.
#[derive(Debug)]
pub(super) struct Behind {
    /// Everything up to it is written or was not for this client.
    pub(super) at: Offset,
    /// Left out since the last event that was written.
    pub(super) folded: u64,
    /// What to write next.
    pub(super) page: VecDeque<Arc<Record>>,
    /// Where the page ends.
    pub(super) page_to: Offset,
    /// Behind the page comes the tail, which is held for it.
    pub(super) reaches_tail: bool,
    /// The engine is asked for the next page.
    pub(super) ticket: Option<u64>,
    /// Durable bytes up to this offset do not count as waiting: they are a replay that was asked for.
    pub(super) counted_from: Offset,
    /// The cohort's durable bytes up to where this link is, or to `counted_from`.
    pub(super) durable_bytes: u64,
    /// It was made to wait: if what it waited for is not kept any more, it starts anew from the state.
    pub(super) excused: bool,
}

impl Link {
    /// Whether the tail must keep what is behind its cursor.
    pub(super) fn holds(&self) -> bool {
        match &self.phase {
            Phase::Live | Phase::Joining(_) => true,
            Phase::Behind(behind) => behind.reaches_tail || behind.ticket.is_some(),
        }
    }
}

impl<S> Client<S> {
    pub(super) fn outgoing_bytes(&self) -> usize {
        self.outgoing.as_ref().map_or(0, |outgoing| outgoing.bytes)
    }

    /// Whether it is on its way out and gets nothing of its streams any more, but for what was to go before.
    pub(super) fn is_leaving(&self) -> bool {
        self.closing.is_some_and(|closing| !matches!(closing, Closing::WhenWritten(_)))
    }

    /// What of certain streams has not begun to be written is not written; the lowest offset that was among it.
    pub(super) fn drop_unwritten(&mut self, is_dropped: impl Fn(usize) -> bool) -> Option<Offset> {
        let mut lowest = None;
        for waiting in [&mut self.outgoing, &mut self.frozen] {
            let dropped = waiting.as_mut().and_then(|waiting| waiting.drop_frames_of(&is_dropped));
            waiting.take_if(|waiting| waiting.is_empty());
            lowest = lowest.into_iter().chain(dropped).min();
        }
        lowest
    }

    /// Appends a whole frame, in pieces.
    pub(super) fn push(&mut self, pieces: impl IntoIterator<Item = Bytes>) {
        self.outgoing.get_or_insert_default().push(None, pieces);
    }

    /// Appends a whole frame that tells something of a stream, in pieces; `of`: see [`Piece::of`].
    pub(super) fn push_of(&mut self, of: Option<(usize, Offset)>, pieces: impl IntoIterator<Item = Bytes>) {
        let outgoing = if self.flags.withheld { &mut self.frozen } else { &mut self.outgoing };
        outgoing.get_or_insert_default().push(of, pieces);
    }
}

/// What must be written to a connection before anything of a tail: the rest of a frame, messages of our own, replays.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// A part of the first frame is written.
    in_frame: bool,
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    ends_frame: bool,
    /// What must not be written any more when the right to a stream is lost: the stream, by its place in the shard, and the
    /// offset there.
    of: Option<(usize, Offset)>,
}

impl Outgoing {
    pub(super) fn push(&mut self, of: Option<(usize, Offset)>, pieces: impl IntoIterator<Item = Bytes>) {
        let mut last = None;
        for bytes in pieces {
            self.bytes += bytes.len();
            self.pieces.push_back(Piece { bytes, ends_frame: false, of });
            last = Some(self.pieces.len() - 1);
        }
        if let Some(piece) = last.and_then(|last| self.pieces.get_mut(last)) {
            piece.ends_frame = true;
        }
    }

    /// Puts the rest of a frame whose beginning went out of a tail before everything else.
    pub(super) fn push_rest(&mut self, rest: Bytes) {
        self.bytes += rest.len();
        self.pieces.push_front(Piece { bytes: rest, ends_frame: true, of: None });
        self.in_frame = true;
    }

    /// Adds slices of what waits, at most about `bytes_max`; returns how many bytes.
    pub(super) fn gather<'a>(&'a self, bytes_max: usize, slices: &mut Slices<'a>) -> usize {
        let mut bytes = 0;
        for piece in &self.pieces {
            if bytes >= bytes_max || slices.len() == super::tail::SLICES_MAX {
                break;
            }
            let length = piece.bytes.len().min(bytes_max - bytes);
            slices.push(std::io::IoSlice::new(&piece.bytes[..length]));
            bytes += length;
        }
        bytes
    }

    /// Takes off what was written; returns how many frames ended in it.
    pub(super) fn advance(&mut self, mut written: usize) -> usize {
        let mut frames = 0;
        self.bytes -= written;
        while written > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            if written < piece.bytes.len() {
                piece.bytes.advance(written);
                self.in_frame = true;
                break;
            }
            written -= piece.bytes.len();
            self.in_frame = !piece.ends_frame;
            frames += usize::from(piece.ends_frame);
            self.pieces.pop_front();
        }
        frames
    }

    /// Drops what waits, but for the rest of a frame that has begun.
    pub(super) fn keep_begun_frame(&mut self) {
        self.split_behind_begun_frame();
    }

    /// Takes off what waits, but for the rest of a frame that has begun.
    pub(super) fn split_behind_begun_frame(&mut self) -> Self {
        let ends = self.pieces.iter().position(|piece| piece.ends_frame).map_or(0, |last| last + 1);
        let pieces = self.pieces.split_off(if self.in_frame { ends } else { 0 });
        let bytes = bytes_of(&pieces);
        self.bytes -= bytes;
        Self { pieces, bytes, in_frame: false }
    }

    /// Puts what was taken off behind what waits.
    pub(super) fn append(&mut self, mut other: Self) {
        self.bytes += other.bytes;
        self.pieces.append(&mut other.pieces);
    }

    /// Drops what is of certain streams, but for the rest of a frame that has begun; the lowest offset that was among it.
    fn drop_frames_of(&mut self, is_dropped: &dyn Fn(usize) -> bool) -> Option<Offset> {
        let (mut begun, mut lowest) = (self.in_frame, None);
        self.pieces.retain(|piece| {
            let offset = piece.of.filter(|(of, _)| is_dropped(*of) && !begun).map(|(_, offset)| offset);
            begun &= !piece.ends_frame;
            lowest = lowest.into_iter().chain(offset).min();
            offset.is_none()
        });
        self.bytes = bytes_of(&self.pieces);
        lowest
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn bytes_of(pieces: &VecDeque<Piece>) -> usize {
    pieces.iter().map(|piece| piece.bytes.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(outgoing: &Outgoing, bytes_max: usize) -> Vec<u8> {
        let mut slices = Slices::new();
        let bytes = outgoing.gather(bytes_max, &mut slices);
        let gathered: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        assert_eq!(gathered.len(), bytes);
        gathered
    }

    #[test]
    fn frames_go_out_in_order_and_a_begun_one_survives_a_close() {
        let mut outgoing = Outgoing::default();
        outgoing.push(None, [Bytes::from_static(b"ab"), Bytes::from_static(b"cd")]);
        outgoing.push(None, [Bytes::from_static(b"ef")]);
        outgoing.push_rest(Bytes::from_static(b"!"));
        assert_eq!(gathered(&outgoing, 100), b"!abcdef");
        assert_eq!(gathered(&outgoing, 2), b"!a");
        assert_eq!(outgoing.advance(2), 1);
        outgoing.keep_begun_frame();
        assert_eq!(gathered(&outgoing, 100), b"bcd");
        assert_eq!(outgoing.advance(3), 1);
        outgoing.push(None, [Bytes::from_static(b"gh")]);
        outgoing.keep_begun_frame();
        assert!(outgoing.is_empty());
    }
}
