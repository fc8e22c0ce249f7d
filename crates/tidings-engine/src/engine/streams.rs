//! The streams of the embedded engine: pure, the time is passed in. An append has two steps, so that a journal can be
//! written in between: what is staged has its number but shows nowhere before it is applied.

use std::{collections::HashMap, sync::Arc};

use tidings_protocol::{Epoch, Event, EventId, Offset, Position, StreamId, Timestamp, TypeFilter};

use crate::random;

use super::{
    Appended, CatchUp, HistoryLimits, HistoryPage, Joined, PageLimit, Record, history::History,
    state::StateFold,
};

/// How long a stream that nobody uses is remembered.
const UNUSED_SECONDS_MAX: i64 = 30 * 24 * 60 * 60;
/// A replay is read whole: what it holds is bounded by the history itself.
const WHOLE: PageLimit = PageLimit { records: usize::MAX, bytes: usize::MAX, folded: false };

#[derive(Debug)]
pub(super) struct Streams {
    limits: HistoryLimits,
    by_id: HashMap<StreamId, Stream>,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) epoch: Epoch,
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
    pub(super) fn new(limits: HistoryLimits) -> Self {
        Self { limits, by_id: HashMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The stream, made if it was not there.
    pub(super) fn stream(&mut self, id: &StreamId, now: Timestamp) -> &mut Stream {
        if !self.by_id.contains_key(id) {
            // 80 bits: that two lives get the same name does not happen.
            let epoch = Epoch::new(random::hex::<10>());
            self.by_id.insert(id.clone(), Stream::new(epoch, self.limits.clone(), now));
        }
        let stream = self.by_id.get_mut(id).expect("it was there, or was put there just now");
        stream.used_at = now;
        stream.history.trim(now);
        stream
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
        self.by_id.retain(|id, stream| {
            stream.history.trim(now);
            stream.state.trim(now);
            if is_followed(id) {
                stream.used_at = now;
            }
            stream.staged > stream.offset || now.seconds_since(stream.used_at) <= UNUSED_SECONDS_MAX
        });
    }

    pub(super) fn join(
        &mut self,
        id: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
        now: Timestamp,
    ) -> Joined {
        let stream = self.stream(id, now);
        let catch_up = match since.map(|since| stream.read(since, &WHOLE)) {
            Some((true, records, _)) => CatchUp::Recovered(records),
            Some((false, ..)) | None => CatchUp::State(stream.state.snapshot(types, now)),
        };
        Joined { position: stream.position_at(stream.offset), catch_up }
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
            let position = Position { epoch: Epoch::new(random::hex::<10>()), offset: 0 };
            return HistoryPage { position, complete: since.is_none(), records: Vec::new(), more: false };
        }
        let stream = self.stream(id, now);
        let (complete, records, more) = match since {
            Some(since) => stream.read(since, limit),
            None => stream.history.read(0, limit),
        };
        HistoryPage { position: stream.position_at(stream.offset), complete, records, more }
    }
}

impl Stream {
    pub(super) fn new(epoch: Epoch, limits: HistoryLimits, now: Timestamp) -> Self {
        Self {
            epoch,
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

    fn push(&mut self, record: &Arc<Record>) {
        self.history.push(record);
        self.state.apply(record);
        self.offset = record.offset;
    }

    /// What is kept behind `since`; incomplete also if `since` is not of this stream's life.
    fn read(&self, since: &Position, limit: &PageLimit) -> (bool, Vec<Arc<Record>>, bool) {
        if since.epoch != self.epoch || since.offset > self.offset {
            let (_, records, more) = self.history.read(0, limit);
            return (false, records, more);
        }
        self.history.read(since.offset, limit)
    }
}
