//! The streams of the embedded engine: pure, the time is passed in. An append has two steps, so that a journal can be
//! written in between: what is staged has its number but shows nowhere before it is applied.

mod snapshot;

use std::{collections::HashMap, sync::Arc};

use tidings_protocol::{Epoch, Event, EventId, Offset, Position, StreamId, Timestamp, TypeFilter};

use crate::random;

use super::{
    Appended, CatchUp, HistoryLimits, HistoryPage, Joined, PageLimit, Record,
    history::History,
    journal::{Entry, encode},
    state::StateFold,
};

pub(super) use snapshot::StreamSnapshot;

/// How long a stream that nobody uses is remembered.
const UNUSED_SECONDS_MAX: i64 = 30 * 24 * 60 * 60;
/// Former epochs that a stream remembers: one for each crash of the machine that lost something.
const FORMER_EPOCHS_MAX: usize = 8;
/// A replay is read whole: what it holds is bounded by the history itself.
const WHOLE: PageLimit = PageLimit { records: usize::MAX, bytes: usize::MAX, folded: false };

#[derive(Debug)]
pub(super) struct Streams {
    limits: HistoryLimits,
    by_id: HashMap<StreamId, Stream>,
    /// Streams have numbers in the journal.
    next_number: u32,
    /// What the journal does not know yet: streams that are new, and the numbers of those that were forgotten. Empty
    /// without a journal.
    unjournaled: Vec<StreamId>,
    forgotten: Vec<u32>,
    has_journal: bool,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) number: u32,
    pub(super) epoch: Epoch,
    /// Former epochs, each with the last offset that this one shares with it.
    pub(super) former: Vec<Position>,
    /// The newest event that shows.
    pub(super) offset: Offset,
    /// The newest event that has a number.
    staged: Offset,
    pub(super) history: History,
    pub(super) state: StateFold,
    pub(super) used_at: Timestamp,
}

/// Events with their numbers, on their way into their streams.
#[derive(Debug, Default)]
pub(super) struct Staged {
    /// Where each event of the request goes, in its order.
    pub(super) appended: Vec<Appended>,
    /// The new ones, consecutive events of one stream together.
    pub(super) runs: Vec<Run>,
    ids: HashMap<(StreamId, EventId), Offset>,
}

/// Consecutive records of one stream.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) stream: StreamId,
    /// Where the last of them stands.
    pub(super) position: Position,
    pub(super) records: Vec<Arc<Record>>,
}

impl Streams {
    /// `has_journal`: what is new is noted for it.
    pub(super) fn new(limits: HistoryLimits, has_journal: bool) -> Self {
        Self {
            limits,
            by_id: HashMap::new(),
            next_number: 0,
            unjournaled: Vec::new(),
            forgotten: Vec::new(),
            has_journal,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The stream, made if it was not there.
    pub(super) fn stream(&mut self, id: &StreamId, now: Timestamp) -> &mut Stream {
        if !self.by_id.contains_key(id) {
            // 80 bits: that two lives get the same name does not happen.
            let epoch = Epoch::new(random::hex::<10>());
            self.insert(id, self.next_number, epoch, now);
            if self.has_journal {
                self.unjournaled.push(id.clone());
            }
        }
        let stream = self.by_id.get_mut(id).expect("it was there, or was put there just now");
        stream.trim(now);
        stream
    }

    /// A stream as the journal has it.
    pub(super) fn insert(&mut self, id: &StreamId, number: u32, epoch: Epoch, now: Timestamp) -> &mut Stream {
        self.next_number = self.next_number.max(number + 1);
        self.by_id.entry(id.clone()).or_insert_with(|| Stream::new(number, epoch, self.limits.clone(), now))
    }

    pub(super) fn remove(&mut self, id: &StreamId) {
        self.by_id.remove(id);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&StreamId, &Stream)> {
        self.by_id.iter()
    }

    /// Lets every stream begin a new epoch where it stands: what came behind may have been lost.
    pub(super) fn branch_all(&mut self) {
        for (id, stream) in &mut self.by_id {
            stream.former.push(stream.position_at(stream.offset));
            if stream.former.len() > FORMER_EPOCHS_MAX {
                stream.former.remove(0);
            }
            stream.epoch = Epoch::new(random::hex::<10>());
            self.unjournaled.push(id.clone());
        }
    }

    /// Whether there is something that the journal does not know yet.
    pub(super) fn has_changes(&self) -> bool {
        !(self.unjournaled.is_empty() && self.forgotten.is_empty())
    }

    /// Writes what the journal does not know yet, but for events; how much of it there was.
    pub(super) fn encode_changes(&self, buffer: &mut Vec<u8>) -> (usize, usize) {
        for stream in &self.forgotten {
            encode(&Entry::Forgotten { stream: *stream }, buffer);
        }
        for id in &self.unjournaled {
            if let Some(stream) = self.by_id.get(id) {
                encode(&Entry::Stream(stream.entry(id)), buffer);
            }
        }
        (self.unjournaled.len(), self.forgotten.len())
    }

    /// The journal knows so much of it now.
    pub(super) fn changes_written(&mut self, (streams, forgotten): (usize, usize)) {
        self.unjournaled.drain(..streams);
        self.forgotten.drain(..forgotten);
    }

    /// Writes what was staged.
    pub(super) fn encode_staged(&self, staged: &Staged, buffer: &mut Vec<u8>) {
        for run in &staged.runs {
            let Some(stream) = self.by_id.get(&run.stream) else { continue };
            for record in &run.records {
                encode(&record.entry(stream.number), buffer);
            }
        }
    }

    /// Numbers an event. One that repeats the id of another gets that one's place.
    pub(super) fn stage(&mut self, event: &Event, now: Timestamp, staged: &mut Staged) {
        let id = event.stream();
        let same = staged.runs.last().is_some_and(|run| run.stream == id);
        let stream = self.stream(&id, now);
        let in_request = |event_id: &EventId| staged.ids.get(&(id.clone(), event_id.clone())).copied();
        let repeated = event.id().and_then(|id| stream.history.offset_of(id).or_else(|| in_request(id)));
        if let Some(offset) = repeated {
            let position = stream.position_at(offset);
            return staged.appended.push(Appended { stream: id, position });
        }
        stream.staged += 1;
        let record = Arc::new(Record::new(event, stream.staged, now));
        let position = stream.position_at(stream.staged);
        if let Some(event_id) = event.id() {
            staged.ids.insert((id.clone(), event_id.clone()), record.offset);
        }
        staged.appended.push(Appended { stream: id.clone(), position: position.clone() });
        match staged.runs.last_mut() {
            Some(run) if same => {
                run.position = position;
                run.records.push(record);
            }
            _ => staged.runs.push(Run { stream: id, position, records: vec![record] }),
        }
    }

    /// Lets what was staged show.
    pub(super) fn apply(&mut self, staged: &Staged) {
        for run in &staged.runs {
            let Some(stream) = self.by_id.get_mut(&run.stream) else { continue };
            for record in &run.records {
                stream.push(record);
            }
        }
    }

    /// Takes the numbers back.
    pub(super) fn discard(&mut self, staged: &Staged) {
        for run in &staged.runs {
            if let Some(stream) = self.by_id.get_mut(&run.stream) {
                stream.staged = stream.offset;
            }
        }
    }

    /// Forgets history that is too old, and streams that nobody used for 30 days; one that `is_followed` is in use.
    pub(super) fn forget_old(&mut self, now: Timestamp, is_followed: impl Fn(&StreamId) -> bool) {
        let forgotten = &mut self.forgotten;
        let has_journal = self.has_journal;
        self.by_id.retain(|id, stream| {
            stream.history.trim(now);
            stream.state.trim(now);
            if is_followed(id) {
                stream.used_at = now;
            }
            let used =
                stream.staged > stream.offset || now.seconds_since(stream.used_at) <= UNUSED_SECONDS_MAX;
            if !used && has_journal {
                forgotten.push(stream.number);
            }
            used
        });
    }

    pub(super) fn join(
        &mut self,
        id: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
        now: Timestamp,
    ) -> Joined {
        self.stream(id, now).join(since, types, now)
    }

    pub(super) fn history(
        &mut self,
        id: &StreamId,
        since: Option<&Position>,
        limit: &PageLimit,
        now: Timestamp,
    ) -> HistoryPage {
        if !self.by_id.contains_key(id) {
            // Asking for what never was makes no stream: anybody may ask for anything.
            return HistoryPage::of_nothing(since);
        }
        self.stream(id, now).page(since, limit)
    }
}

impl Stream {
    pub(super) fn new(number: u32, epoch: Epoch, limits: HistoryLimits, now: Timestamp) -> Self {
        Self {
            number,
            epoch,
            former: Vec::new(),
            offset: 0,
            staged: 0,
            history: History::new(limits),
            state: StateFold::default(),
            used_at: now,
        }
    }

    pub(super) fn position_at(&self, offset: Offset) -> Position {
        Position { epoch: self.epoch.clone(), offset }
    }

    /// What a subscriber that stood at `since` has to be told; see [`Engine::join`](super::Engine::join).
    pub(super) fn join(&self, since: Option<&Position>, types: &TypeFilter, now: Timestamp) -> Joined {
        let catch_up = match since.map(|since| self.read(since, &WHOLE)) {
            Some((true, records, _)) => CatchUp::Recovered(records),
            Some((false, ..)) | None => CatchUp::State(self.state.snapshot(types, now)),
        };
        Joined { position: self.position_at(self.offset), catch_up }
    }

    pub(super) fn page(&self, since: Option<&Position>, limit: &PageLimit) -> HistoryPage {
        let (complete, records, more) = match since {
            Some(since) => self.read(since, limit),
            None => self.history.read(0, limit),
        };
        HistoryPage { position: self.position_at(self.offset), complete, records, more }
    }

    /// Whether the position is one of this stream's life, or of a former one before it branched.
    pub(super) fn knows(&self, position: &Position) -> bool {
        let shared = |former: &Position| former.epoch == position.epoch && position.offset <= former.offset;
        (position.epoch == self.epoch && position.offset <= self.offset) || self.former.iter().any(shared)
    }

    /// Drops what is too old.
    pub(super) fn trim(&mut self, now: Timestamp) {
        self.used_at = now;
        self.history.trim(now);
    }

    /// Goes on behind `offset` although what comes before it is not known. `lost_at`: something of it would still show.
    pub(super) fn skip_to(&mut self, offset: Offset, lost_at: Option<Timestamp>) {
        (self.offset, self.staged) = (offset, offset);
        self.history.skip_to(offset);
        if let Some(lost_at) = lost_at {
            self.state.skip(lost_at);
        }
    }

    /// Which life the stream is in, and what it shares with former ones.
    pub(super) fn set_life(&mut self, epoch: Epoch, former: Vec<Position>) {
        (self.epoch, self.former) = (epoch, former);
    }

    pub(super) fn push(&mut self, record: &Arc<Record>) {
        self.history.push(record);
        self.state.apply(record);
        self.offset = record.offset;
    }

    /// What is kept behind `since`; incomplete also if `since` is not of this stream's life.
    fn read(&self, since: &Position, limit: &PageLimit) -> (bool, Vec<Arc<Record>>, bool) {
        if !self.knows(since) {
            let (_, records, more) = self.history.read(0, limit);
            return (false, records, more);
        }
        self.history.read(since.offset, limit)
    }
}
