//! The engine: keeps streams, numbers what is appended to them, and hands it on.

pub mod embedded;
mod history;
mod state;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tidings_protocol::{
    Event, EventId, EventType, Offset, Position, StateSnapshot, StreamId, Timestamp, TypeFilter,
};

pub use history::HistoryLimits;

/// An event in its stream.
#[derive(Debug)]
pub struct Record {
    /// Its number in the stream, from 1.
    pub offset: Offset,
    /// Its type, for filters.
    pub event_type: EventType,
    /// Under which key a newer event stands for this one; `None`: durable.
    pub latest_key: Option<Arc<str>>,
    /// The publisher's id.
    pub id: Option<EventId>,
    /// When the engine took it.
    pub appended_at: Timestamp,
    /// The JSON that subscribers get.
    pub json: Bytes,
}

/// Where an event went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its stream.
    pub stream: StreamId,
    /// Its place there. For a repeated `id`: the place of the event that it repeats.
    pub position: Position,
}

/// What a new subscriber has to be told before live events.
#[derive(Debug)]
pub struct Joined {
    /// Up to where `missed` or `state` reaches; live events go on behind it.
    pub position: Position,
    /// How the subscriber gets there.
    pub catch_up: CatchUp,
}

/// How a subscriber gets from where it was to now.
#[derive(Debug)]
pub enum CatchUp {
    /// From its `since`, by every durable event and at least the newest of each `latest` key that it missed, in order.
    Recovered(Vec<Arc<Record>>),
    /// By the fold of the stream: there was no `since`, or the history does not reach back to it.
    State(StateSnapshot),
}

/// A part of the kept history.
#[derive(Debug)]
pub struct HistoryPage {
    /// Where the stream stands now.
    pub position: Position,
    /// `false`: something between `since` and the first of `records` is not kept any more.
    pub complete: bool,
    /// Ascending.
    pub records: Vec<Arc<Record>>,
}

/// Why the engine did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The store does not answer; whether the request took effect is unknown. Try again.
    #[error("the engine does not answer: {0}")]
    Unavailable(String),
}

/// Takes what an engine hands on: the hub.
pub trait Deliver: Send + Sync + 'static {
    /// Takes records of one stream, ascending and without a hole behind the ones before. Must not block, and must not
    /// call the engine.
    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]);
}

/// Keeps streams.
///
/// # Contract
///
/// - **Append and publish are one act.** When `append` returns, the events are in their streams, and they reach
///   [`Deliver::deliver`] from there and only from there: on the publishing node too. So offsets and order agree
///   everywhere, and no event is delivered that the engine could forget.
/// - **Order.** Events of one call keep their order; each gets the next offset of its stream. `deliver` sees a stream's
///   records in the order of their offsets, each once, never two calls for the same stream at a time.
/// - **Repetition.** An event whose `id` the stream's history holds is not appended again: it yields the position of the
///   first, and nothing is delivered.
/// - **A stream** exists from its first event or reading. Its epoch and offset outlive its last use by 30 days. An
///   offset never means two different events in one epoch.
/// - **Reading and delivering overlap.** What `join` returns reaches exactly up to its `position`; what is behind it is
///   delivered. Whoever registers for delivery first, then joins, and then skips delivered records up to `position`,
///   misses nothing and sees nothing twice.
/// - **Cancellation.** A call that is dropped has either happened as a whole or not at all for each stream.
/// - **Full.** History is bounded by [`HistoryLimits`]; the oldest goes first. `append` never waits for subscribers.
#[async_trait]
pub trait Engine: std::fmt::Debug + Send + Sync + 'static {
    /// Appends events to their streams and publishes them. Returns their places, in the order of `events`.
    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError>;

    /// Reads what a subscriber that stood at `since` missed, or else the state of the stream limited to `types`.
    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError>;

    /// Reads at most `limit` records of the kept history, ascending from behind `since`.
    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: usize,
    ) -> Result<HistoryPage, EngineError>;

    /// Where the stream stands.
    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError>;

    /// How many streams are kept here; for metrics.
    fn stream_count(&self) -> usize;
}
