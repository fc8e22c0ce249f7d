//! The hub of a node: which shard follows which stream, and the way of records to those that do. Knows no connection.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tidings_protocol::{CloseCode, Position, StreamId};
use tokio::sync::Notify;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use crate::{
    driver::Arrival,
    engine::{Deliver, Record},
    rights::{SessionKey, Verdict},
    shard::ConnectionKey,
    vigil::Notice,
};

/// Shards that one node may have: one bit each says whether it follows a stream.
pub const SHARDS_MAX: usize = 64;

/// The shards of a node.
#[derive(Debug)]
pub struct Hub {
    mailboxes: Vec<Arc<Mailbox>>,
    /// A bit for each shard that follows the stream.
    followers: Mutex<HashMap<StreamId, u64>>,
    stats: Vec<Arc<ShardStats>>,
}

/// What waits for a shard. It takes all of it each time that it turns to it, between two quanta of its work; nobody ever
/// waits to put something in.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Vec<Letter>>,
    arrived: Notify,
}

/// Something for a shard.
#[derive(Debug)]
pub(crate) enum Letter {
    Records {
        stream: StreamId,
        position: Position,
        records: Vec<Arc<Record>>,
    },
    /// The stream goes on behind the position, and not behind what came of it.
    Rejoin {
        stream: StreamId,
        position: Position,
    },
    Notice(Notice),
    Arrival(Box<Arrival>),
    /// A socket that is no file of the system's can be written or read again.
    Stirred(ConnectionKey),
    Close(ConnectionKey, CloseCode),
    /// What was found out about sessions.
    Judged(Vec<(SessionKey, Verdict)>),
    /// Give everybody an appointment within the time; the token is kept until the last has left.
    Drain {
        over_ms: u64,
        leaving: TaskTrackerToken,
    },
    /// Close everybody, each after what waits for it, and whoever comes later as well; then end.
    CloseAll(CloseCode),
    /// Drop everybody and end.
    DropAll,
}

impl Mailbox {
    pub(crate) fn put(&self, letter: Letter) {
        self.letters.lock().push(letter);
        self.arrived.notify_one();
    }

    pub(crate) fn take(&self) -> Vec<Letter> {
        std::mem::take(&mut *self.letters.lock())
    }

    /// Waits until something was put in since this was last awaited.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

impl Hub {
    /// A hub of `shards` shards, at most [`SHARDS_MAX`].
    pub(crate) fn new(shards: usize) -> Self {
        assert!((1..=SHARDS_MAX).contains(&shards), "a node has 1 to {SHARDS_MAX} shards");
        let each = || std::iter::repeat_with(Arc::default).take(shards);
        Self {
            mailboxes: each().collect(),
            followers: Mutex::default(),
            stats: std::iter::repeat_with(Arc::default).take(shards).collect(),
        }
    }

    pub(crate) fn mailbox(&self, shard: u16) -> &Arc<Mailbox> {
        &self.mailboxes[usize::from(shard)]
    }

    pub(crate) fn stats_of(&self, shard: u16) -> &Arc<ShardStats> {
        &self.stats[usize::from(shard)]
    }

    /// How many shards there are.
    pub fn shards(&self) -> u16 {
        u16::try_from(self.mailboxes.len()).expect("at most SHARDS_MAX")
    }

    /// Lets records of the stream go to the shard from now on.
    pub(crate) fn follow(&self, shard: u16, stream: StreamId) {
        *self.followers.lock().entry(stream).or_default() |= 1 << shard;
    }

    pub(crate) fn unfollow(&self, shard: u16, stream: &StreamId) {
        let mut followers = self.followers.lock();
        if let Some(shards) = followers.get_mut(stream) {
            *shards &= !(1 << shard);
            if *shards == 0 {
                followers.remove(stream);
            }
        }
    }

    fn put_to_followers(&self, stream: &StreamId, letter: impl Fn() -> Letter) {
        let mut shards = self.followers.lock().get(stream).copied().unwrap_or(0);
        while shards != 0 {
            let shard = shards.trailing_zeros();
            shards &= shards - 1;
            self.mailboxes[shard as usize].put(letter());
        }
    }

    /// Whether any connection follows the stream.
    pub fn is_followed(&self, stream: &StreamId) -> bool {
        self.followers.lock().contains_key(stream)
    }

    /// Closes a connection at once.
    pub fn close(&self, key: ConnectionKey, code: CloseCode) {
        if let Some(mailbox) = self.mailboxes.get(usize::from(key.shard)) {
            mailbox.put(Letter::Close(key, code));
        }
    }

    /// Gives every connection an appointment within `over`, and waits until all have left.
    pub async fn drain(&self, over: Duration) {
        let over_ms = u64::try_from(over.as_millis()).unwrap_or(u64::MAX);
        let leaving = TaskTracker::new();
        for mailbox in &self.mailboxes {
            mailbox.put(Letter::Drain { over_ms, leaving: leaving.token() });
        }
        leaving.close();
        leaving.wait().await;
    }

    /// Closes every connection with `code`, each after what waits for it, and ends the shards when all have left.
    pub fn close_all(&self, code: CloseCode) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.put(Letter::CloseAll(code)));
    }

    /// Drops every connection where it stands, and ends the shards.
    pub fn drop_all(&self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.put(Letter::DropAll));
    }

    /// What has been counted so far, over all shards.
    pub fn counts(&self) -> HubCounts {
        let mut counts = HubCounts::default();
        self.stats.iter().for_each(|stats| stats.add_to(&mut counts));
        counts
    }
}

impl Deliver for Hub {
    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]) {
        self.put_to_followers(stream, || Letter::Records {
            stream: stream.clone(),
            position: position.clone(),
            records: records.to_vec(),
        });
    }

    fn rejoin(&self, stream: &StreamId, position: &Position) {
        self.put_to_followers(stream, || Letter::Rejoin {
            stream: stream.clone(),
            position: position.clone(),
        });
    }

    fn tell(&self, notice: Notice) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.put(Letter::Notice(notice)));
    }

    fn taken_over(&self, connection: ConnectionKey) {
        self.close(connection, CloseCode::ResumedElsewhere);
    }
}

/// What a node's connections came to; for health and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubCounts {
    /// Open connections.
    pub connections: usize,
    /// Subscriptions to projects, over all connections.
    pub subscriptions: usize,
    /// Connections opened so far.
    pub opened: u64,
    /// Connections that took a former one over.
    pub resumed: u64,
    /// Connections ended so far, by close code; 1006: without one.
    pub closed: BTreeMap<u16, u64>,
    /// Messages written.
    pub messages: u64,
    /// Bytes written, frame headers included.
    pub bytes: u64,
    /// Writes to sockets: many messages share one.
    pub writes: u64,
    /// Messages read from clients.
    pub client_messages: u64,
    /// How often a subscription fell behind.
    pub fell_behind: u64,
    /// Connections to which nothing is delivered, because nobody knows whether their sessions still hold.
    pub withheld: usize,
    /// Framed bytes that are kept for blocked clients and those that are being written.
    pub tail_bytes: usize,
}

/// What one shard counts.
#[derive(Debug, Default)]
pub struct ShardStats {
    connections: AtomicUsize,
    subscriptions: AtomicUsize,
    opened: AtomicU64,
    resumed: AtomicU64,
    closed: Mutex<BTreeMap<u16, u64>>,
    messages: AtomicU64,
    bytes: AtomicU64,
    writes: AtomicU64,
    client_messages: AtomicU64,
    fell_behind: AtomicU64,
    withheld: AtomicUsize,
    tail_bytes: AtomicUsize,
}

impl ShardStats {
    pub(crate) fn opened(&self) {
        self.connections.fetch_add(1, Relaxed);
        self.opened.fetch_add(1, Relaxed);
    }

    pub(crate) fn closed(&self, code: Option<u16>) {
        // What a peer invents beyond the registered ranges is one code, not thousands.
        let known = |code: &u16| {
            matches!(code, 1000..=1015) || tidings_protocol::CLOSE_CODES.iter().any(|c| c.number() == *code)
        };
        *self.closed.lock().entry(code.filter(known).unwrap_or(1006)).or_default() += 1;
        self.connections.fetch_sub(1, Relaxed);
    }

    pub(crate) fn resumed(&self) {
        self.resumed.fetch_add(1, Relaxed);
    }

    pub(crate) fn subscribed(&self) {
        self.subscriptions.fetch_add(1, Relaxed);
    }

    pub(crate) fn unsubscribed(&self) {
        self.subscriptions.fetch_sub(1, Relaxed);
    }

    pub(crate) fn written(&self, messages: usize, bytes: usize) {
        // Only the shard itself writes these: a plain load and store, and no locked instruction for each write.
        let add = |counter: &AtomicU64, more: u64| counter.store(counter.load(Relaxed) + more, Relaxed);
        add(&self.messages, messages as u64);
        add(&self.bytes, bytes as u64);
        add(&self.writes, 1);
    }

    pub(crate) fn client_message(&self) {
        self.client_messages.fetch_add(1, Relaxed);
    }

    pub(crate) fn fell_behind(&self) {
        self.fell_behind.fetch_add(1, Relaxed);
    }

    pub(crate) fn withheld(&self, connections: usize) {
        self.withheld.store(connections, Relaxed);
    }

    pub(crate) fn tail_bytes(&self, bytes: usize) {
        self.tail_bytes.store(bytes, Relaxed);
    }

    fn add_to(&self, counts: &mut HubCounts) {
        counts.connections += self.connections.load(Relaxed);
        counts.subscriptions += self.subscriptions.load(Relaxed);
        counts.opened += self.opened.load(Relaxed);
        counts.resumed += self.resumed.load(Relaxed);
        for (code, ended) in &*self.closed.lock() {
            *counts.closed.entry(*code).or_default() += ended;
        }
        counts.messages += self.messages.load(Relaxed);
        counts.bytes += self.bytes.load(Relaxed);
        counts.writes += self.writes.load(Relaxed);
        counts.client_messages += self.client_messages.load(Relaxed);
        counts.fell_behind += self.fell_behind.load(Relaxed);
        counts.withheld += self.withheld.load(Relaxed);
        counts.tail_bytes += self.tail_bytes.load(Relaxed);
    }
}
