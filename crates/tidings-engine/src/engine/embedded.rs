//! The embedded engine: streams in this process's memory, for one node, with a journal on disk if it is given a folder.

mod appender;
mod recovery;

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tidings_protocol::{Event, EventId, Position, StreamId, Timestamp, TypeFilter};

use crate::{
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
};

use super::{
    Appended, Deliver, Engine, EngineError, HistoryLimits, HistoryPage, Joined, NumberedEvent, PageLimit,
    journal::{JournalError, JournalOptions},
    saved_connections::SavedConnections,
    streams::{Staged, Streams},
};

use appender::Appender;

/// Tells the time; a function, so that tests can tell it their own.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The clock on the wall.
pub fn system_clock() -> Clock {
    Arc::new(|| jiff::Timestamp::now().into())
}

/// What the engine keeps, and where.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// How much history a stream keeps.
    pub history: HistoryLimits,
    /// How long a lost connection can be resumed.
    pub connection_timeout: Duration,
    /// `None`: nothing outlives the process.
    pub journal: Option<JournalOptions>,
}

/// Streams in memory. See [`Engine`] for what it promises.
///
/// With a journal, one thread numbers what is appended, writes it, and only then lets it show. What comes while it writes is
/// written together.
pub struct EmbeddedEngine {
    shared: Arc<Shared>,
    appender: Option<Appender>,
}

/// What the engine's callers and its appender share.
struct Shared {
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
        f.debug_struct("EmbeddedEngine").field("appender", &self.appender).finish_non_exhaustive()
    }
}

impl EmbeddedEngine {
    /// Opens the engine, with what its journal holds, and hands what is appended from now on to `deliver`.
    pub fn open(
        options: EmbeddedOptions,
        clock: Clock,
        deliver: Weak<dyn Deliver>,
    ) -> Result<Self, JournalError> {
        let has_journal = options.journal.is_some();
        let mut kept = Kept {
            streams: Streams::new(options.history, has_journal),
            connections: SavedConnections::new(options.connection_timeout, has_journal),
        };
        let log = match options.journal {
            Some(journal) => Some(recovery::recover(journal, &mut kept, clock())?),
            None => None,
        };
        let shared = Arc::new(Shared { clock, deliver, kept: Mutex::new(kept) });
        let appender = log.map(|log| Appender::start(Arc::clone(&shared), log)).transpose()?;
        Ok(Self { shared, appender })
    }

    /// Forgets history that is too old, streams that nobody used for 30 days, and connections that nobody came back for; a
    /// stream that `is_followed` is in use. Costs a walk over all of them; once a minute is often enough, because what is
    /// read is trimmed anyway.
    pub fn forget_old(&self, is_followed: impl Fn(&StreamId) -> bool) {
        let now = (self.shared.clock)();
        let mut kept = self.shared.kept.lock();
        kept.streams.forget_old(now, is_followed);
        kept.connections.forget_old(now);
    }

    /// Changes what is kept of connections, and lets the journal know.
    fn change<T>(&self, change: impl FnOnce(&mut SavedConnections, Timestamp) -> T) -> T {
        let now = (self.shared.clock)();
        let changed = change(&mut self.shared.kept.lock().connections, now);
        if let Some(appender) = &self.appender {
            appender.wake();
        }
        changed
    }
}

impl Shared {
    /// Lets what was staged show, here and at the subscribers.
    fn apply(&self, kept: &mut Kept, staged: &Staged) {
        kept.streams.apply(staged);
        if let Some(deliver) = self.deliver.upgrade() {
            for run in &staged.runs {
                deliver.deliver(&run.stream, &run.position, &run.records);
            }
        }
    }
}

#[async_trait]
impl Engine for EmbeddedEngine {
    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        if let Some(appender) = &self.appender {
            return appender.append(events).await;
        }
        let now = (self.shared.clock)();
        let mut staged = Staged::default();
        let mut kept = self.shared.kept.lock();
        for event in &events {
            kept.streams.stage(event, now, &mut staged);
        }
        self.shared.apply(&mut kept, &staged);
        Ok(staged.appended)
    }

    /// The number becomes the id of an event that has none, and so is known as long as the event is.
    async fn append_numbered(
        &self,
        source: &'static str,
        events: Vec<NumberedEvent>,
    ) -> Result<(), EngineError> {
        let identified = events.into_iter().map(|NumberedEvent { number, mut event }| {
            if let Ok(id) = EventId::try_from(format!("{source}:{number}").as_str()) {
                event.assign_id(id);
            }
            event
        });
        self.append(identified.collect()).await.map(|_| ())
    }

    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError> {
        let now = (self.shared.clock)();
        let mut kept = self.shared.kept.lock();
        let joined = kept.streams.join(stream, since, types, now);
        let has_changed = kept.streams.has_changes();
        drop(kept);
        if let Some(appender) = self.appender.as_ref().filter(|_| has_changed) {
            appender.wake();
        }
        Ok(joined)
    }

    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: PageLimit,
    ) -> Result<HistoryPage, EngineError> {
        let now = (self.shared.clock)();
        Ok(self.shared.kept.lock().streams.history(stream, since, &limit, now))
    }

    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError> {
        let now = (self.shared.clock)();
        let mut kept = self.shared.kept.lock();
        let stream = kept.streams.stream(stream, now);
        Ok(stream.position_at(stream.offset))
    }

    async fn save(&self, connection: SavedConnection) -> Result<(), EngineError> {
        self.change(|connections, _| connections.update(connection));
        Ok(())
    }

    async fn release(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        self.change(|connections, now| connections.release(client, owner, now));
        Ok(())
    }

    async fn forget(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        self.change(|connections, _| connections.forget(client, owner));
        Ok(())
    }

    async fn take_over(
        &self,
        token: &ResumeToken,
        successor: SavedConnection,
    ) -> Result<Option<SavedConnection>, EngineError> {
        Ok(self.change(|connections, now| connections.take_over(token, &successor, now)))
    }

    fn failing(&self) -> Option<String> {
        self.appender.as_ref().and_then(Appender::failing)
    }

    async fn close(&self) {
        if let Some(appender) = &self.appender {
            appender.close().await;
        }
    }

    fn stream_count(&self) -> usize {
        self.shared.kept.lock().streams.len()
    }
}
