//! The engine: keeps streams, numbers what is appended to them, and hands it on.

pub mod embedded;
mod history;
pub mod journal;
pub mod redis;
mod saved_connections;
mod state;
mod streams;

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use tidings_protocol::{
    Audience, Class, Epoch, Event, EventId, EventType, Offset, Position, StateSnapshot, StreamId, Timestamp,
    TypeFilter,
};

use crate::{
    random,
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
    vigil::Notice,
    wire::{Deflater, Frame, HEADER_BYTES_MAX, Header},
};

pub use history::HistoryLimits;

/// An event in its stream, as the bytes that its subscribers' sockets get.
#[derive(Debug)]
pub struct Record {
    /// Its number in the stream, from 1.
    pub offset: Offset,
    /// Its type, for filters.
    pub event_type: EventType,
    /// Whom of those who follow the stream it is for; `None`: all.
    pub audience: Option<Box<Audience>>,
    /// Under which key a newer event stands for this one; `None`: durable.
    pub latest_key: Option<Arc<str>>,
    /// The publisher's id.
    pub id: Option<EventId>,
    /// When the engine took it.
    pub appended_at: Timestamp,
    /// A WebSocket frame: header and JSON in one piece of memory.
    frame: Bytes,
    json_start: usize,
    /// The same as a compressed frame, made when the first subscriber wants it; `None`: compressing saves nothing.
    compressed: OnceLock<Option<Bytes>>,
}

impl Record {
    /// Frames an event at its place in the stream.
    pub fn new(event: &Event, offset: Offset, appended_at: Timestamp) -> Self {
        let mut frame = vec![0; HEADER_BYTES_MAX];
        event.encode_into(offset, &mut frame);
        let header = Header::new(Frame::Text, frame.len() - HEADER_BYTES_MAX);
        let start = HEADER_BYTES_MAX - header.as_bytes().len();
        frame[start..HEADER_BYTES_MAX].copy_from_slice(header.as_bytes());
        Self {
            offset,
            event_type: event.event_type().clone(),
            audience: restricted(event.audience().clone()),
            latest_key: match event.class() {
                Class::Durable => None,
                Class::Latest { key } => Some(Arc::clone(key)),
            },
            id: event.id().cloned(),
            appended_at,
            frame: Bytes::from(frame).slice(start..),
            json_start: header.as_bytes().len(),
            compressed: OnceLock::new(),
        }
    }

    /// The record as a journal keeps it.
    fn entry(&self, stream: u32) -> journal::Entry<'_> {
        journal::Entry::Event {
            stream,
            offset: self.offset,
            at: self.appended_at.as_microsecond(),
            event_type: self.event_type.as_str().into(),
            latest_key: self.latest_key.as_deref().map(Into::into),
            id: self.id.as_ref().map(|id| id.as_str().into()),
            json: String::from_utf8_lossy(self.json()),
        }
    }

    /// A record as a journal kept it.
    fn restored(
        offset: Offset,
        event_type: EventType,
        latest_key: Option<Arc<str>>,
        id: Option<EventId>,
        appended_at: Timestamp,
        json: &str,
    ) -> Self {
        let json_start = Header::new(Frame::Text, json.len()).as_bytes().len();
        let frame = Frame::Text.encode(json.as_bytes());
        let compressed = OnceLock::new();
        let audience = restricted(Audience::of_appended(&event_type, json));
        Self { offset, event_type, audience, latest_key, id, appended_at, frame, json_start, compressed }
    }

    /// Whether it is never dropped or merged.
    pub fn is_durable(&self) -> bool {
        self.latest_key.is_none()
    }

    /// The JSON that subscribers get.
    pub fn json(&self) -> &[u8] {
        &self.frame[self.json_start..]
    }

    /// The JSON, sharing its memory.
    pub fn json_bytes(&self) -> Bytes {
        self.frame.slice(self.json_start..)
    }

    /// The JSON as a text frame.
    pub fn frame(&self) -> &Bytes {
        &self.frame
    }

    /// The JSON as a compressed text frame, compressed at most once whoever asks; where that saves nothing, as it is.
    pub fn compressed_frame(&self, deflater: &mut Deflater) -> &Bytes {
        let compressed = self.compressed.get_or_init(|| {
            deflater.compress(self.json()).map(|payload| Frame::CompressedText.encode(&payload))
        });
        compressed.as_ref().unwrap_or(&self.frame)
    }
}

/// An audience that is not everybody who follows the stream.
fn restricted(audience: Audience) -> Option<Box<Audience>> {
    match audience {
        Audience::Project(_) | Audience::Everyone => None,
        Audience::RightsToProject(_) | Audience::RightsToEverything => Some(Box::new(audience)),
    }
}

/// An event that its source has numbered.
#[derive(Clone, Debug)]
pub struct NumberedEvent {
    /// Its number at the source. Numbers are compared as strings, so they have one width.
    pub number: String,
    /// The event.
    pub event: Event,
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

/// How much of the history to read at once.
#[derive(Clone, Copy, Debug)]
pub struct PageLimit {
    /// Records.
    pub records: usize,
    /// Bytes of their JSON; the first record is read whatever its size.
    pub bytes: usize,
    /// Leave out every `latest` event that a newer one of its key stands for.
    pub folded: bool,
}

/// A part of the kept history.
#[derive(Debug)]
pub struct HistoryPage {
    /// Where the stream stands now.
    pub position: Position,
    /// `false`: something between `since` and the first of `records` is not kept any more, or `since` was never.
    pub complete: bool,
    /// Ascending.
    pub records: Vec<Arc<Record>>,
    /// There is more behind the last of them.
    pub more: bool,
}

impl HistoryPage {
    /// Of a stream that is not there.
    fn of_nothing(since: Option<&Position>) -> Self {
        let position = Position { epoch: Epoch::new(random::hex::<10>()), offset: 0 };
        Self { position, complete: since.is_none(), records: Vec::new(), more: false }
    }
}

/// Why the engine did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The store does not answer; whether the request took effect is unknown. Try again.
    #[error("the engine does not answer: {0}")]
    Unavailable(String),
    /// The journal cannot be written, so nothing was appended. Try again when the disk has room or is mended.
    #[error("the journal cannot be written: {0}")]
    Journal(String),
}

/// Takes what an engine hands on: the hub.
pub trait Deliver: Send + Sync + 'static {
    /// Takes records of one stream, ascending and without a hole behind the ones before. Must not block, and must not
    /// call the engine.
    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]);

    /// The stream goes on behind `position`, and not behind what was delivered of it: its epoch is another, or there is a hole.
    /// Every subscriber has to join again from where it was. Must not block, and must not call the engine.
    fn rejoin(&self, _stream: &StreamId, _position: &Position) {}

    /// Every client has to be told. Must not block.
    fn tell(&self, _notice: Notice) {}

    /// The connection was taken over elsewhere and has to be closed. Must not block.
    fn taken_over(&self, _connection: ConnectionKey) {}
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
/// - **Saved connections** are handed over atomically: of two that come with the same token, one gets it.
/// - **Full.** History is bounded by [`HistoryLimits`]; the oldest goes first. `append` never waits for subscribers.
#[async_trait]
pub trait Engine: std::fmt::Debug + Send + Sync + 'static {
    /// Appends events to their streams and publishes them. Returns their places, in the order of `events`.
    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError>;

    /// Appends events that come from a source in the order of their numbers. One whose number is not above the last that its
    /// stream has had of the source was appended before, and is left out: so the source may say again what it does not know to
    /// have arrived.
    async fn append_numbered(
        &self,
        source: &'static str,
        events: Vec<NumberedEvent>,
    ) -> Result<(), EngineError>;

    /// A shard follows the stream from now on: what is appended to it has to be delivered. Counted, not waited for.
    fn follow(&self, _stream: &StreamId) {}

    /// A shard follows the stream no more.
    fn unfollow(&self, _stream: &StreamId) {}

    /// Reads what a subscriber that stood at `since` missed, or else the state of the stream limited to `types`.
    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError>;

    /// Reads a part of the kept history, ascending from behind `since`.
    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: PageLimit,
    ) -> Result<HistoryPage, EngineError>;

    /// Where the stream stands.
    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError>;

    /// Saves a connection that lives, or what has changed of it. Nothing happens if another connection has taken its client
    /// over.
    async fn save(&self, connection: SavedConnection) -> Result<(), EngineError>;

    /// Notes that a connection was lost: from now on its time runs. Nothing happens if `owner` does not own it any more.
    async fn release(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError>;

    /// Forgets a connection that closed cleanly. Nothing happens if `owner` does not own it any more.
    async fn forget(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError>;

    /// Hands the connection that `token` stands for to `successor`: the token dies, the successor's own stands for the
    /// former connection from now on, and the successor's own name is forgotten. Returns the former connection as it was;
    /// `None`: the token is not good any more, and nothing has changed.
    async fn take_over(
        &self,
        token: &ResumeToken,
        successor: SavedConnection,
    ) -> Result<Option<SavedConnection>, EngineError>;

    /// Why nothing can be appended at present; `None`: all is well.
    fn failing(&self) -> Option<String> {
        None
    }

    /// Ends in good order: what was appended is safe, and nothing is appended any more.
    async fn close(&self) {}

    /// How many streams are kept here; for metrics.
    fn stream_count(&self) -> usize;

    /// What had to be mended so far; for metrics.
    fn repairs(&self) -> Repairs {
        Repairs::default()
    }
}

/// What an engine whose store is elsewhere had to mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Events that were read because they were not heard.
    pub events: usize,
    /// Streams that went on without something that their subscribers here had.
    pub lost: usize,
}
