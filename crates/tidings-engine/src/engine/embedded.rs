//! The embedded engine: streams in this process's memory, for one node.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tidings_protocol::{Class, Epoch, Event, Offset, Position, StreamId, Timestamp, TypeFilter};

use crate::random;

use super::{
    Appended, CatchUp, Deliver, Engine, EngineError, HistoryLimits, HistoryPage, Joined, Record,
    history::History, state::StateFold,
};

/// How long a stream that nobody uses is remembered.
const UNUSED_SECONDS_MAX: i64 = 30 * 24 * 60 * 60;

/// Tells the time; a function, so that tests can tell it their own.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The clock on the wall.
pub fn system_clock() -> Clock {
    Arc::new(|| jiff::Timestamp::now().into())
}

/// Streams in memory. See [`Engine`] for what it promises.
pub struct EmbeddedEngine {
    limits: HistoryLimits,
    clock: Clock,
    /// The hub. Weak, because the hub's owner owns the engine, too.
    deliver: Weak<dyn Deliver>,
    /// Held while records are delivered, so that their order is the order of their offsets. Delivering only queues.
    streams: Mutex<HashMap<StreamId, Stream>>,
}

struct Stream {
    epoch: Epoch,
    offset: Offset,
    history: History,
    state: StateFold,
    used_at: Timestamp,
}

impl fmt::Debug for EmbeddedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedEngine").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl EmbeddedEngine {
    /// An engine without streams, which hands what is appended to `deliver`.
    pub fn new(limits: HistoryLimits, clock: Clock, deliver: Weak<dyn Deliver>) -> Self {
        Self { limits, clock, deliver, streams: Mutex::default() }
    }

    /// Forgets history that is too old, and streams that nobody used for 30 days; one that `is_followed` is in use. Costs
    /// a walk over all streams; once a minute is often enough, because what is read is trimmed anyway.
    pub fn forget_old(&self, is_followed: impl Fn(&StreamId) -> bool) {
        let now = (self.clock)();
        self.streams.lock().retain(|id, stream| {
            stream.history.trim(now);
            stream.state.trim(now);
            if is_followed(id) {
                stream.used_at = now;
            }
            now.seconds_since(stream.used_at) <= UNUSED_SECONDS_MAX
        });
    }

    fn with_stream<T>(&self, id: &StreamId, act: impl FnOnce(&mut Stream, Timestamp) -> T) -> T {
        let now = (self.clock)();
        let mut streams = self.streams.lock();
        if !streams.contains_key(id) {
            streams.insert(id.clone(), Stream::new(self.limits.clone(), now));
        }
        // It was there, or was put there just now.
        let stream = streams.get_mut(id).expect("the stream exists");
        stream.used_at = now;
        stream.history.trim(now);
        act(stream, now)
    }
}

impl Stream {
    fn new(limits: HistoryLimits, now: Timestamp) -> Self {
        Self {
            // 80 bits: that two lives get the same name does not happen.
            epoch: Epoch::new(random::hex::<10>()),
            offset: 0,
            history: History::new(limits),
            state: StateFold::default(),
            used_at: now,
        }
    }

    fn position_at(&self, offset: Offset) -> Position {
        Position { epoch: self.epoch.clone(), offset }
    }

    /// Appends an event; without a record if it repeats one.
    fn append(&mut self, event: &Event, now: Timestamp) -> (Position, Option<Arc<Record>>) {
        if let Some(offset) = event.id().and_then(|id| self.history.offset_of(id)) {
            return (self.position_at(offset), None);
        }
        self.offset += 1;
        let record = Arc::new(Record {
            offset: self.offset,
            event_type: event.event_type().clone(),
            latest_key: match event.class() {
                Class::Durable => None,
                Class::Latest { key } => Some(Arc::clone(key)),
            },
            id: event.id().cloned(),
            appended_at: now,
            json: event.encode(self.offset).into(),
        });
        self.history.push(&record);
        self.state.apply(&record);
        (self.position_at(self.offset), Some(record))
    }

    /// What is kept behind `since`; incomplete also if `since` is not of this stream's life.
    fn behind(&self, since: &Position) -> (bool, Vec<Arc<Record>>) {
        if since.epoch != self.epoch || since.offset > self.offset {
            return (false, self.history.behind(0).1);
        }
        self.history.behind(since.offset)
    }
}

#[async_trait]
impl Engine for EmbeddedEngine {
    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        let deliver = self.deliver.upgrade();
        let appended = events.iter().map(|event| {
            let id = event.stream();
            let position = self.with_stream(&id, |stream, now| {
                let (position, record) = stream.append(event, now);
                if let (Some(record), Some(deliver)) = (record, &deliver) {
                    deliver.deliver(&id, &position, &[record]);
                }
                position
            });
            Appended { stream: id, position }
        });
        Ok(appended.collect())
    }

    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError> {
        Ok(self.with_stream(stream, |stream, now| {
            let catch_up = match since.map(|since| stream.behind(since)) {
                Some((true, records)) => CatchUp::Recovered(records),
                Some((false, _)) | None => CatchUp::State(stream.state.snapshot(types, now)),
            };
            Joined { position: stream.position_at(stream.offset), catch_up }
        }))
    }

    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: usize,
    ) -> Result<HistoryPage, EngineError> {
        if !self.streams.lock().contains_key(stream) {
            // Asking for what never was makes no stream: anybody may ask for anything.
            let position = Position { epoch: Epoch::new(random::hex::<10>()), offset: 0 };
            return Ok(HistoryPage { position, complete: since.is_none(), records: Vec::new() });
        }
        Ok(self.with_stream(stream, |stream, _| {
            let (complete, mut records) = match since {
                Some(since) => stream.behind(since),
                None => stream.history.behind(0),
            };
            records.truncate(limit);
            HistoryPage { position: stream.position_at(stream.offset), complete, records }
        }))
    }

    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError> {
        Ok(self.with_stream(stream, |stream, _| stream.position_at(stream.offset)))
    }

    fn stream_count(&self) -> usize {
        self.streams.lock().len()
    }
}
