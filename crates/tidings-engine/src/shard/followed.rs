//! A stream that connections of this shard follow: its cohorts, each with its framed tail.

use std::{collections::HashMap, sync::Arc};

use tidings_protocol::{Epoch, Offset, Projects, StreamId, TypeFilter};

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
    by_selection: HashMap<(Encoding, Selection), usize>,
    /// Cohorts whose last member has left, and which may have members again.
    left: Vec<usize>,
    /// Something came that no pass has begun to write.
    pub(super) dirty: bool,
    /// The pass over its subscribers that is under way.
    pub(super) in_pass: Option<u64>,
    /// It is followed even if no connection does.
    pub(super) permanent: bool,
}

/// What of a stream a subscriber gets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Selection {
    /// The types that it wants.
    pub(super) types: Arc<TypeFilter>,
    /// The projects that it may hear of; `None`: all that the stream speaks of.
    pub(super) projects: Option<Projects>,
}

impl Selection {
    pub(super) fn takes(&self, record: &Record) -> bool {
        let may_see = match (&record.audience, &self.projects) {
            (Some(audience), Some(projects)) => projects.include_audience(audience),
            _ => true,
        };
        may_see && self.types.matches(&record.event_type)
    }
}

/// Subscribers that get the same bytes: the same selection in the same encoding. A member's cursor is in its link.
///
/// There is no limit on how many: one with a single member costs what an outbox of that member's own would, and what all
/// tails hold together is limited for the shard.
#[derive(Debug)]
pub(super) struct Cohort {
    /// Never used twice in a shard.
    pub(super) number: u64,
    pub(super) encoding: Encoding,
    pub(super) selection: Selection,
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
        Self {
            id,
            epoch: None,
            head: 0,
            cohorts: Vec::new(),
            by_selection: HashMap::new(),
            left: Vec::new(),
            dirty: false,
            in_pass: None,
            permanent: false,
        }
    }

    /// The cohort of this selection and encoding, made if there is none; an empty one serves again.
    /// `number` is a new one's name.
    pub(super) fn cohort(&mut self, encoding: Encoding, selection: &Selection, number: u64) -> usize {
        let wanted = (encoding, selection.clone());
        if let Some(&found) = self.by_selection.get(&wanted) {
            let cohort = &mut self.cohorts[found];
            if cohort.members.is_empty() {
                // What came while it had none is not in its tail.
                cohort.tail = Tail::behind(self.head).at(cohort.tail.end());
            }
            return found;
        }
        let cohort = Cohort {
            number,
            encoding,
            selection: selection.clone(),
            tail: Tail::behind(self.head),
            members: Vec::new(),
            durable_bytes: 0,
            low: 0,
        };
        while let Some(empty) = self.left.pop() {
            if self.cohorts[empty].members.is_empty() {
                let former = std::mem::replace(&mut self.cohorts[empty], cohort);
                self.by_selection.remove(&(former.encoding, former.selection));
                self.by_selection.insert(wanted, empty);
                return empty;
            }
        }
        self.cohorts.push(cohort);
        self.by_selection.insert(wanted, self.cohorts.len() - 1);
        self.cohorts.len() - 1
    }

    /// The last member of a cohort has left.
    pub(super) fn is_left(&mut self, cohort: usize) {
        // One that was left, joined and left again is here once more, so that the list is bounded by them.
        if self.left.len() >= self.cohorts.len() {
            self.left.sort_unstable();
            self.left.dedup();
        }
        self.left.push(cohort);
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
            if !cohort.selection.takes(record) {
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
