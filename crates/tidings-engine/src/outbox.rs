//! What waits to be written to one connection: bounded, and nobody else's time is spent on it.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use tidings_protocol::CloseCode;
use tokio::sync::Notify;

/// What the hub writes and the connection's socket reads.
#[derive(Debug)]
pub struct Outbox {
    /// Live messages may wait up to this; what is more means that the client is too slow.
    bytes_max: usize,
    waiting: Mutex<Waiting>,
    changed: Notify,
    /// The writer took what waited.
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Bytes>,
    /// Bytes of live frames that wait.
    live_bytes: usize,
    /// Bytes of openings and replays that wait.
    replay_bytes: usize,
    closed: Option<Closed>,
}

#[derive(Clone, Copy, Debug)]
struct Closed {
    code: CloseCode,
    /// Whether what waits is written before.
    after_waiting: bool,
}

/// What a connection's writer does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Write these messages, in this order.
    Write(Vec<Bytes>),
    /// Close with this code, and write nothing else before.
    Close(CloseCode),
}

/// The bookkeeping of a waiting message beside its bytes.
const FRAME_OVERHEAD_BYTES: usize = 64;

impl Outbox {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, waiting: Mutex::default(), changed: Notify::new(), emptied: Notify::new() }
    }

    /// Puts a live message in. A message too many closes the outbox with [`CloseCode::TooSlow`].
    pub(crate) fn push(&self, json: Bytes) {
        let mut waiting = self.waiting.lock();
        if waiting.closed.is_some() {
            return;
        }
        waiting.live_bytes += json.len() + FRAME_OVERHEAD_BYTES;
        // One message alone always fits: its size was bounded where it came in.
        if waiting.live_bytes > self.bytes_max && !waiting.frames.is_empty() {
            *waiting = Waiting {
                closed: Some(Closed { code: CloseCode::TooSlow, after_waiting: false }),
                ..Waiting::default()
            };
        } else {
            waiting.frames.push_back(json);
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Puts in what a client asked to have repeated: a confirmation with its state, and what was missed. One such answer is
    /// bounded by the history; that there are not many is up to [`Outbox::replay_room`].
    pub(crate) fn push_replay(&self, replay: impl Iterator<Item = Bytes>) {
        let mut waiting = self.waiting.lock();
        if waiting.closed.is_none() {
            for json in replay {
                waiting.replay_bytes += json.len() + FRAME_OVERHEAD_BYTES;
                waiting.frames.push_back(json);
            }
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Lets the writer close with `code`, once what waits is written.
    pub(crate) fn close(&self, code: CloseCode) {
        self.waiting.lock().closed.get_or_insert(Closed { code, after_waiting: true });
        self.changed.notify_one();
    }

    /// Waits until a further request of the client may be answered: while more replays wait than live messages may, its
    /// next message is not read. So a client that asks without reading fills its own socket and not this memory.
    pub async fn replay_room(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.waiting.lock().replay_bytes <= self.bytes_max {
                return;
            }
            emptied.await;
        }
    }

    /// Waits for something to do. For one reader at a time.
    pub async fn next(&self) -> Next {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.changed.notified().await;
        }
    }

    /// Waits until the client turned out to be too slow: what a writer that hangs in a write listens to.
    pub async fn too_slow(&self) {
        loop {
            if self.waiting.lock().closed.is_some_and(|closed| !closed.after_waiting) {
                return;
            }
            self.changed.notified().await;
        }
    }

    fn take(&self) -> Option<Next> {
        let mut waiting = self.waiting.lock();
        match waiting.closed {
            Some(Closed { code, after_waiting }) if !after_waiting || waiting.frames.is_empty() => {
                Some(Next::Close(code))
            }
            _ if waiting.frames.is_empty() => None,
            _ => {
                (waiting.live_bytes, waiting.replay_bytes) = (0, 0);
                self.emptied.notify_waiters();
                Some(Next::Write(waiting.frames.drain(..).collect()))
            }
        }
    }

    /// Bytes of live messages that wait.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting.lock().live_bytes
    }
}
