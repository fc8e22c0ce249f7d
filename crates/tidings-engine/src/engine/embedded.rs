//! The embedded engine: streams in this process's memory, for one node.

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tidings_protocol::{Event, Position, StreamId, Timestamp, TypeFilter};

use crate::{
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
};

use super::{
    Appended, Deliver, Engine, EngineError, HistoryLimits, HistoryPage, Joined, PageLimit,
    saved_connections::SavedConnections,
    streams::{Staged, Streams},
};

/// Tells the time; a function, so that tests can tell it their own.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The clock on the wall.
pub fn system_clock() -> Clock {
    Arc::new(|| jiff::Timestamp::now().into())
}

/// Streams in memory. See [`Engine`] for what it promises.
pub struct EmbeddedEngine {
    clock: Clock,
    /// The hub. Weak, because the hub's owner owns the engine, too.
    deliver: Weak<dyn Deliver>,
    /// Held while records are delivered, so that their order is the order of their offsets. Delivering only queues.
    kept: Mutex<Kept>,
}

struct Kept {
    streams: Streams,
    connections: SavedConnections,
}

impl fmt::Debug for EmbeddedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedEngine").finish_non_exhaustive()
    }
}

impl EmbeddedEngine {
    /// An engine without streams, which hands what is appended to `deliver`. A lost connection can be resumed for
    /// `connection_timeout`.
    pub fn new(
        limits: HistoryLimits,
        connection_timeout: Duration,
        clock: Clock,
        deliver: Weak<dyn Deliver>,
    ) -> Self {
        let kept =
            Kept { streams: Streams::new(limits), connections: SavedConnections::new(connection_timeout) };
        Self { clock, deliver, kept: Mutex::new(kept) }
    }

    /// Forgets history that is too old, streams that nobody used for 30 days, and connections that nobody came back for; a
    /// stream that `is_followed` is in use. Costs a walk over all of them; once a minute is often enough, because what is
    /// read is trimmed anyway.
    pub fn forget_old(&self, is_followed: impl Fn(&StreamId) -> bool) {
        let now = (self.clock)();
        let mut kept = self.kept.lock();
        kept.streams.forget_old(now, is_followed);
        kept.connections.forget_old(now);
    }
}

#[async_trait]
impl Engine for EmbeddedEngine {
    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        let now = (self.clock)();
        let mut staged = Staged::default();
        let mut kept = self.kept.lock();
        for event in &events {
            kept.streams.stage(event, now, &mut staged);
        }
        kept.streams.apply(&staged);
        if let Some(deliver) = self.deliver.upgrade() {
            for run in &staged.runs {
                deliver.deliver(&run.stream, &run.position, &run.records);
            }
        }
        Ok(staged.appended)
    }

    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError> {
        let now = (self.clock)();
        Ok(self.kept.lock().streams.join(stream, since, types, now))
    }

    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: PageLimit,
    ) -> Result<HistoryPage, EngineError> {
        let now = (self.clock)();
        Ok(self.kept.lock().streams.history(stream, since, &limit, now))
    }

    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError> {
        let now = (self.clock)();
        let mut kept = self.kept.lock();
        let stream = kept.streams.stream(stream, now);
        Ok(stream.position_at(stream.offset))
    }

    async fn save(&self, connection: SavedConnection) -> Result<(), EngineError> {
        self.kept.lock().connections.save(connection, None);
        Ok(())
    }

    async fn release(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        let now = (self.clock)();
        self.kept.lock().connections.release(client, owner, now);
        Ok(())
    }

    async fn forget(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        self.kept.lock().connections.forget(client, owner);
        Ok(())
    }

    async fn take_over(
        &self,
        token: &ResumeToken,
        successor: SavedConnection,
    ) -> Result<Option<SavedConnection>, EngineError> {
        let now = (self.clock)();
        let taken = self.kept.lock().connections.take_over(token, successor, now);
        Ok(taken.map(|(former, _)| former))
    }

    fn stream_count(&self) -> usize {
        self.kept.lock().streams.len()
    }
}
