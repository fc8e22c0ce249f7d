//! A stream that connections of this shard follow: its cohorts, each with its framed tail.

use std::sync::Arc;

use tidings_protocol::{Epoch, Offset, StreamId, TypeFilter};

use crate::{engine::Record, wire::Deflater};

use super::{encoding::Encoding, tail::Tail};

/// A stream as a shard has it.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) id: StreamId,
    /// Of the newest event that came; `None` before the first one.
    pub(super) epoch: Option<Epoch>,
    /// The newest event that came.
    pub(super) head: Offset,
    pub(super) cohorts: Vec<Cohort>,
    /// Something came that no pass has begun to write.
    pub(super) dirty: bool,
    /// The pass over its subscribers that is under way.
    pub(super) in_pass: Option<u64>,
    /// It is followed even if no connection does.
    pub(super) permanent: bool,
}

/// Subscribers that get the same bytes: the same filter in the same encoding. A member's cursor is in its link.
///
/// There is no limit on how many: one with a single member costs what an outbox of that member's own would, and what all
/// tails hold together is limited for the shard.
#[derive(Debug)]
pub(super) struct Cohort {
    /// Never used twice in a shard.
    pub(super) number: u64,
    pub(super) encoding: Encoding,
    pub(super) types: Arc<TypeFilter>,
    pub(super) tail: Tail,
    pub(super) members: Vec<Member>,
    /// Durable bytes that came so far.
    pub(super) durable_bytes: u64,
    /// The lowest cursor that was found; scratch of the trimming.
    pub(super) low: u64,
}

/// A link, by its connection's place in the shard and its own in the connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) client: usize,
    pub(super) link: usize,
}

impl Followed {
    pub(super) fn new(id: StreamId) -> Self {
        Self { id, epoch: None, head: 0, cohorts: Vec::new(), dirty: false, in_pass: None, permanent: false }
    }

    /// The cohort of this filter and encoding, made if there is none; an empty one serves again.
    /// `number` is a new one's name.
    pub(super) fn cohort(&mut self, encoding: Encoding, types: &Arc<TypeFilter>, number: u64) -> usize {
        let same = |cohort: &Cohort| cohort.encoding == encoding && cohort.types == *types;
        if let Some(found) = self.cohorts.iter().position(same) {
            return found;
        }
        let cohort = Cohort {
            number,
            encoding,
            types: Arc::clone(types),
            tail: Tail::behind(self.head),
            members: Vec::new(),
            durable_bytes: 0,
            low: 0,
        };
        if let Some(empty) = self.cohorts.iter().position(|cohort| cohort.members.is_empty()) {
            self.cohorts[empty] = cohort;
            return empty;
        }
        self.cohorts.push(cohort);
        self.cohorts.len() - 1
    }

    /// Learns where the stream stands. What comes from `epoch` up to `head` is known elsewhere and skipped here.
    pub(super) fn begin(&mut self, epoch: Epoch, head: Offset) {
        self.epoch = Some(epoch);
        self.head = head;
        for cohort in &mut self.cohorts {
            cohort.tail = Tail::behind(head).at(cohort.tail.end());
        }
    }

    pub(super) fn is_followed(&self) -> bool {
        self.permanent || self.cohorts.iter().any(|cohort| !cohort.members.is_empty())
    }

    /// Frames a record for each cohort; returns the bytes that its tails have grown by.
    pub(super) fn push(&mut self, record: &Record, at_ms: u64, deflater: &mut Deflater) -> usize {
        let Some(epoch) = &self.epoch else { return 0 };
        let mut grown = 0;
        for cohort in self.cohorts.iter_mut().filter(|cohort| !cohort.members.is_empty()) {
            if !cohort.types.matches(&record.event_type) {
                continue;
            }
            let frame = cohort.encoding.record(record, epoch, deflater);
            cohort.tail.push(&frame, record.offset, at_ms, cohort.durable_bytes);
            if record.is_durable() {
                cohort.durable_bytes += record.json().len() as u64;
            }
            grown += frame.len();
        }
        self.head = record.offset;
        grown
    }
}

impl Cohort {
    /// Up to where somebody with this cursor has everything.
    pub(super) fn offset_at(&self, cursor: u64, head: Offset) -> Offset {
        self.tail.next_frame(cursor).map_or(head, |next| next.offset - 1)
    }
}
