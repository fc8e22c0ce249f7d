//! The Redis engine: streams and saved connections in a Redis that many nodes share. Only here is the Redis library named.
//!
//! An append is one script, which numbers, keeps and publishes (`append.lua`; it also says what a stream is made of). What is
//! published reaches each node's mirror of the stream (`mirror.rs`), and from there the hub; what pub/sub loses is read from the
//! stream, after each subscription, after each silence, and once in each heartbeat interval.

mod address;
mod appends;
mod connections;
mod distrust;
mod forget;
mod lease;
mod listener;
mod mirror;
mod names;
mod orphans;
mod reads;
mod servers;
mod stored;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tidings_protocol::{Event, Position, StreamId, Timestamp, TypeFilter};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    engine::embedded::Clock,
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
    vigil::Vigil,
};

use super::{
    Appended, Deliver, Engine, EngineError, HistoryLimits, HistoryPage, Joined, NumberedEvent, PageLimit,
    Repairs,
};

use appends::Queues;
use connections::Connections;
use listener::Lines;
use mirror::{Mirror, assemble};
use reads::READS_MAX;
use servers::Script;

pub use address::{InvalidAddress, RedisAddress, RedisTls};
pub use distrust::Distrust;
pub use lease::Lease;
pub use names::{Incarnation, NodeName};
pub use servers::{Call, Fault, Primary, Servers};

/// For a stream to be read, before a subscriber is told to come again.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream that nobody follows any more is kept up for this long: whoever comes back finds it.
const LINGER: Duration = Duration::from_secs(10);
/// How often it is looked for streams that nobody follows.
const LINGER_LOOK: Duration = Duration::from_secs(1);

/// What the engine keeps.
#[derive(Debug)]
pub struct RedisOptions {
    /// How much history a stream keeps.
    pub history: HistoryLimits,
    /// How long a lost connection can be resumed.
    pub connection_timeout: Duration,
    /// How often streams are held against their newest offsets.
    pub check_interval: Duration,
    /// This node's name among all that share the Redis.
    pub name: NodeName,
    /// This run of it.
    pub incarnation: Incarnation,
    /// Whether connections that a former run of this node left without a word are looked for.
    pub adopts_orphans: bool,
}

/// Streams in Redis. See [`Engine`] for what it promises.
pub struct RedisEngine {
    shared: Arc<Shared>,
}

struct Shared {
    servers: Arc<Servers>,
    clock: Clock,
    options: RedisOptions,
    scripts: Scripts,
    /// `SPUBLISH` where the server has it.
    publish: &'static str,
    /// The hub. Weak, because the hub's owner owns the engine, too.
    deliver: Weak<dyn Deliver>,
    vigil: Arc<Vigil>,
    /// Held while records are delivered, so that their order is the order of their offsets. Delivering only queues.
    mirrors: Mutex<HashMap<StreamId, Mirror>>,
    queues: Queues,
    /// Events that mirrors got by reading, for the outcome of an outage.
    repaired: AtomicUsize,
    /// Streams of which something was lost that subscribers had.
    lost: AtomicUsize,
    reading: Semaphore,
    lines: Lines,
    connections: Connections,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Scripts {
    append: Script,
    read: Script,
    snapshot: Script,
    forget: Script,
    connection: Script,
    spend: Script,
}

impl fmt::Debug for RedisEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisEngine").field("servers", &self.shared.servers).finish_non_exhaustive()
    }
}

/// Puts the constants of a script that touches a stream before it.
macro_rules! stream_script {
    ($file:literal) => {
        Script::new(concat!(
            "local LOG_EVENTS_MAX, LOG_BYTES_MAX = 20000, 67108864\n",
            "local SNAPSHOT_EVENTS, SNAPSHOT_BYTES_MIN, SNAPSHOT_PAUSE = 4096, 131072, 2\n",
            "local UNUSED_SECONDS_MAX, FORMER_EPOCHS_MAX = 2592000, 8\n",
            include_str!("redis/life.lua"),
            include_str!($file)
        ))
    };
}

impl RedisEngine {
    /// An engine on these servers. What is appended from now on to a stream that is followed here is handed to `deliver`.
    pub async fn start(
        servers: Arc<Servers>,
        options: RedisOptions,
        clock: Clock,
        deliver: Weak<dyn Deliver>,
        vigil: Arc<Vigil>,
    ) -> Result<Self, Fault> {
        let publish = if servers.has_sharded_pubsub().await? { "SPUBLISH" } else { "PUBLISH" };
        let shared = Arc::new(Shared {
            servers,
            clock,
            connections: Connections::default(),
            options,
            scripts: Scripts {
                append: stream_script!("redis/append.lua"),
                read: stream_script!("redis/read.lua"),
                snapshot: Script::new(include_str!("redis/snapshot.lua")),
                forget: Script::new(include_str!("redis/forget.lua")),
                connection: Script::new(include_str!("redis/connection.lua")),
                spend: Script::new(include_str!("redis/spend.lua")),
            },
            publish,
            deliver,
            vigil,
            mirrors: Mutex::default(),
            queues: Queues::default(),
            repaired: AtomicUsize::new(0),
            lost: AtomicUsize::new(0),
            reading: Semaphore::new(READS_MAX),
            lines: Lines::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        shared.spawn(listener::listen_at_all(Arc::clone(&shared)));
        shared.spawn(connections::keep(Arc::clone(&shared)));
        shared.spawn(Arc::clone(&shared).look_after_mirrors());
        shared.spawn(forget::forget_for_ever(Arc::clone(&shared)));
        if shared.options.adopts_orphans {
            shared.spawn(orphans::adopt_orphans(Arc::clone(&shared)));
        }
        Ok(Self { shared })
    }

    /// Lets go of what streams keep to which nothing was appended for so long that all of it is too old; of how many. It
    /// happens by itself, once in an hour, on one of the nodes.
    pub async fn forget_old(&self) -> Result<usize, Fault> {
        self.shared.forget_old().await
    }
}

impl Shared {
    /// Runs until it ends by itself or the node stops.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(task).await;
        });
    }

    fn repairs(&self) -> Repairs {
        Repairs { events: self.repaired.load(Relaxed), lost: self.lost.load(Relaxed) }
    }

    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    /// Lets go of streams that nobody follows, and holds the others against what Redis has.
    async fn look_after_mirrors(self: Arc<Self>) {
        let mut look = tokio::time::interval(LINGER_LOOK);
        let mut checked = Instant::now();
        loop {
            look.tick().await;
            let over = |mirror: &Mirror| mirror.unfollowed_at.is_some_and(|since| since.elapsed() > LINGER);
            let mut mirrors = self.mirrors.lock();
            let left: Vec<_> =
                mirrors.extract_if(|_, mirror| over(mirror)).map(|(stream, _)| stream).collect();
            drop(mirrors);
            for stream in left {
                self.lines.unsubscribe(&self.servers, stream);
            }
            if checked.elapsed() >= self.options.check_interval {
                checked = Instant::now();
                let followed: Vec<_> = self.mirrors.lock().keys().cloned().collect();
                for stream in &followed {
                    self.want_read(stream);
                }
            }
        }
    }

    /// Answers from the mirror of a stream, as soon as it was read; if it does not know of `since`, as soon as it was read again.
    async fn with_stream<T>(
        self: &Arc<Self>,
        id: &StreamId,
        since: Option<&Position>,
        answer: impl Fn(&super::streams::Stream) -> T,
    ) -> Result<T, EngineError> {
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let mut reads_wanted = None;
        loop {
            let (told, must_read) = {
                let mut mirrors = self.mirrors.lock();
                let Some(mirror) = mirrors.get_mut(id) else { break };
                // Whoever was at another node may know more than this one, which has to look before it denies that.
                let wanted = *reads_wanted.get_or_insert(mirror.reads_begun + 1);
                let may_answer = mirror.is_up_to(since) || mirror.reads_done >= wanted;
                if let Some(stream) = mirror.stream.as_mut().filter(|_| may_answer) {
                    stream.trim(self.now());
                    return Ok(answer(stream));
                }
                (mirror.wait(), mirror.stream.is_some())
            };
            if must_read {
                self.want_read(id);
            }
            if timeout_at(deadline, told).await.is_err() {
                return Err(EngineError::Unavailable("Redis does not answer".to_owned()));
            }
        }
        // Nobody follows it here.
        let reading = self.read(id, None, true).await?;
        let reading = reading.expect("a stream that was not there was made");
        let stream = assemble(id, reading, &self.options.history, self.now());
        stream.map(|stream| answer(&stream)).ok_or_else(|| unreadable(id))
    }
}

fn unreadable(id: &StreamId) -> EngineError {
    EngineError::Unavailable(format!("the stream {:?} in Redis cannot be read", id.as_str()))
}

/// The key of a stream, and the channel that it is published on. What a publisher chose is escaped; the braces let a Cluster
/// find the slot by it.
fn key_of(stream: &StreamId) -> String {
    const ESCAPED: percent_encoding::AsciiSet =
        percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'/').remove(b'~');
    match stream {
        StreamId::Announcements => "tidings:{*}".to_owned(),
        StreamId::Project(project) => {
            format!("tidings:{{{}}}", percent_encoding::utf8_percent_encode(project.as_str(), &ESCAPED))
        }
    }
}

impl From<Fault> for EngineError {
    fn from(fault: Fault) -> Self {
        Self::Unavailable(fault.to_string())
    }
}

#[async_trait]
impl Engine for RedisEngine {
    fn follow(&self, stream: &StreamId) {
        let mut mirrors = self.shared.mirrors.lock();
        let is_new = !mirrors.contains_key(stream);
        let mirror = mirrors.entry(stream.clone()).or_insert_with(Mirror::new);
        mirror.followers += 1;
        mirror.unfollowed_at = None;
        drop(mirrors);
        if is_new {
            self.shared.lines.subscribe(&self.shared.servers, stream.clone());
        }
    }

    fn unfollow(&self, stream: &StreamId) {
        if let Some(mirror) = self.shared.mirrors.lock().get_mut(stream) {
            mirror.followers = mirror.followers.saturating_sub(1);
            mirror.unfollowed_at = (mirror.followers == 0).then(Instant::now);
        }
    }

    async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        let events = events.into_iter().map(|event| NumberedEvent { number: String::new(), event }).collect();
        let appended = self.shared.append("", events).await?;
        Ok(appended.into_iter().map(|place| place.expect("only numbered events are left out")).collect())
    }

    async fn append_numbered(
        &self,
        source: &'static str,
        events: Vec<NumberedEvent>,
    ) -> Result<(), EngineError> {
        self.shared.append(source, events).await.map(|_| ())
    }

    async fn join(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        types: &TypeFilter,
    ) -> Result<Joined, EngineError> {
        let now = self.shared.now();
        self.shared.with_stream(stream, since, |stream| stream.join(since, types, now)).await
    }

    async fn history(
        &self,
        stream: &StreamId,
        since: Option<&Position>,
        limit: PageLimit,
    ) -> Result<HistoryPage, EngineError> {
        if self.shared.mirrors.lock().contains_key(stream) {
            return self.shared.with_stream(stream, since, |stream| stream.page(since, &limit)).await;
        }
        // Asking for what never was makes no stream: anybody may ask for anything.
        let Some(reading) = self.shared.read(stream, None, false).await? else {
            return Ok(HistoryPage::of_nothing(since));
        };
        let kept = assemble(stream, reading, &self.shared.options.history, self.shared.now());
        kept.map(|kept| kept.page(since, &limit)).ok_or_else(|| unreadable(stream))
    }

    async fn position(&self, stream: &StreamId) -> Result<Position, EngineError> {
        self.shared.with_stream(stream, None, |stream| stream.position_at(stream.offset)).await
    }

    async fn save(&self, connection: SavedConnection) -> Result<(), EngineError> {
        self.shared.connections.save(connection);
        Ok(())
    }

    async fn release(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        self.shared.connections.release(client, owner);
        Ok(())
    }

    async fn forget(&self, client: ClientId, owner: ConnectionKey) -> Result<(), EngineError> {
        self.shared.connections.forget(client, owner);
        Ok(())
    }

    async fn take_over(
        &self,
        token: &ResumeToken,
        successor: SavedConnection,
    ) -> Result<Option<SavedConnection>, EngineError> {
        self.shared.connections.take_over(*token, successor).await
    }

    async fn close(&self) {
        self.shared.end_connections().await;
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    fn stream_count(&self) -> usize {
        self.shared.mirrors.lock().len()
    }

    fn repairs(&self) -> Repairs {
        self.shared.repairs()
    }
}
