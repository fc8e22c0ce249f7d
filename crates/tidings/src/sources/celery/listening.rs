//! A connection that listens to what Celery publishes: reads without a pause, so that Redis never waits for it, and hands on what
//! was read. Whether it hears anything is found out all the time, by answers and by probes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream::ReadyChunks};
use redis::aio::{PubSub, PubSubStream};
use tidings_engine::engine::redis::{Primary, Servers};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::metrics::CeleryCounts;

use super::{
    backend,
    events::{self, Event, WorkerEvent},
    reading::Reading,
    report::{Report, Route, TaskId, task_id},
};

/// An answer that takes longer is a failure.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// For a connection with all that it takes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A Redis that does not answer for so long is connected to anew.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// The first wait before another attempt; each one doubles it.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How often Redis is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Messages taken from the library's queue at once.
const BATCH_MAX: usize = 256;
/// A larger message is read on a thread of its own, so that nobody waits for it.
const LARGE_BYTES: usize = 256 * 1024;
/// A larger one is not read at all but for its head.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Workers cut what they put into events: nobody of ours sends more at once.
const EVENTS_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Members of a saved group that are looked at.
const MEMBERS_MAX: usize = 10_000;

/// One of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    Backend,
    Events,
}

impl Way {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Events => "events",
        }
    }

    /// What it is to health and to clients.
    pub(super) const fn part(self) -> &'static str {
        match self {
            Self::Backend => "Celery results",
            Self::Events => "Celery events",
        }
    }
}

/// What was heard.
#[derive(Debug)]
pub(super) enum Heard {
    Report(Box<Report>),
    Worker(WorkerEvent),
    GroupSaved(TaskId, Vec<TaskId>),
    /// It is listened to from now on. What was published before was not heard.
    Connected(Way),
    /// Nothing can be heard at present.
    Silent(Way),
    /// The same connection lives: nothing was lost.
    Again(Way),
}

/// Listens on one way.
pub(super) struct Listener {
    pub(super) way: Way,
    pub(super) servers: Arc<Servers>,
    /// What is subscribed to, as an access list would have to name it.
    pub(super) patterns: Vec<String>,
    /// What stands before the id of a task, and of a group, in the names of channels.
    pub(super) task_prefix: String,
    pub(super) group_prefix: String,
    /// The channel of probes.
    pub(super) probe: String,
    pub(super) reading: Arc<Reading>,
    pub(super) heard: mpsc::Sender<Heard>,
    /// Set when there was no room for what was heard.
    pub(super) overflowed: Arc<AtomicBool>,
    pub(super) counts: Arc<CeleryCounts>,
    pub(super) tasks: TaskTracker,
}

/// Why listening ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{0}")]
    Redis(#[from] redis::RedisError),
    #[error("no answer in time")]
    NoAnswer(#[from] tokio::time::error::Elapsed),
    #[error("the connection was closed")]
    Closed,
    #[error("Redis answers, but what is published is not heard on this connection")]
    Deaf,
    #[error("another server is the primary now")]
    Replaced,
}

/// What has arrived, as much at once as is there.
type Batches = ReadyChunks<PubSubStream>;

/// What becomes of the probes of a connection, if there may be any.
struct Probes {
    is_allowed: bool,
    sent: u64,
    published: Arc<AtomicU64>,
    heard: u64,
}

impl Listener {
    /// Listens until `stop`, whatever becomes of Redis meanwhile.
    pub(super) async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.listen_for_ever()).await;
    }

    async fn listen_for_ever(&self) {
        let mut retry = RETRY_MIN;
        let mut is_told = false;
        loop {
            let lost = match self.subscribe().await {
                Ok((primary, pubsub, may_probe)) => {
                    tracing::info!(way = self.way.as_str(), "listening to Celery");
                    (retry, is_told) = (RETRY_MIN, false);
                    let lost = self.listen(&primary, pubsub, may_probe).await;
                    self.hand_on(Heard::Silent(self.way)).await;
                    lost
                }
                Err(lost) => lost,
            };
            if !std::mem::replace(&mut is_told, true) {
                let error = lost.to_string();
                tracing::warn!(
                    way = self.way.as_str(),
                    ?error,
                    "Celery cannot be heard; trying again until it can"
                );
                self.hand_on(Heard::Silent(self.way)).await;
            }
            sleep(retry).await;
            retry = (retry * 2).min(RETRY_MAX);
        }
    }

    async fn subscribe(&self) -> Result<(Arc<Primary>, PubSub, bool), Lost> {
        let primary = self.servers.anchor();
        let mut pubsub = timeout(CONNECT_TIMEOUT, primary.subscribe()).await??;
        for pattern in &self.patterns {
            timeout(ANSWER_TIMEOUT, pubsub.psubscribe(pattern)).await??;
        }
        // A user who may only listen to Celery is enough; then answers alone say whether it is heard.
        let may_probe = timeout(ANSWER_TIMEOUT, pubsub.subscribe(&self.probe)).await?.is_ok();
        Ok((primary, pubsub, may_probe))
    }

    async fn listen(&self, primary: &Arc<Primary>, pubsub: PubSub, may_probe: bool) -> Lost {
        let mut place = primary.watch();
        let (mut commands, messages) = pubsub.split();
        let mut batches: Batches = messages.ready_chunks(BATCH_MAX);
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probes = Probes { is_allowed: may_probe, sent: 0, published: Arc::default(), heard: 0 };
        let mut silent_since: Option<Instant> = None;
        self.hand_on(Heard::Connected(self.way)).await;
        loop {
            tokio::select! {
                // First what has come: a probe is missed only if nothing is left that could hold it.
                biased;
                batch = batches.next() => match batch {
                    Some(batch) => self.take(batch, &mut probes).await,
                    None => return Lost::Closed,
                },
                _ = place.changed() => return Lost::Replaced,
                _ = pings.tick() => match timeout(ANSWER_TIMEOUT, commands.ping::<redis::Value>()).await {
                    Ok(Ok(_)) if probes.are_missed() => return Lost::Deaf,
                    Ok(Ok(_)) => {
                        if silent_since.take().is_some() {
                            self.hand_on(Heard::Again(self.way)).await;
                            probes.forgive();
                        }
                        self.send_probe(primary, &mut probes);
                    }
                    Ok(Err(error)) => return error.into(),
                    Err(late) => {
                        if silent_since.is_none() {
                            self.hand_on(Heard::Silent(self.way)).await;
                        }
                        if silent_since.get_or_insert_with(Instant::now).elapsed() > SILENCE_MAX {
                            return late.into();
                        }
                    }
                },
            }
        }
    }

    /// Publishes what has to come back on the connection that listens. What becomes of it is seen by its coming back.
    fn send_probe(&self, primary: &Arc<Primary>, probes: &mut Probes) {
        if !probes.is_allowed {
            return;
        }
        probes.sent += 1;
        let (number, published) = (probes.sent, Arc::clone(&probes.published));
        let (primary, probe) = (Arc::clone(primary), self.probe.clone());
        self.tasks.spawn(async move {
            if primary.probe(&probe, number).await.is_ok() {
                published.fetch_max(number, Ordering::Relaxed);
            }
        });
    }

    async fn take(&self, batch: Vec<redis::Msg>, probes: &mut Probes) {
        for message in batch {
            if message.get_channel_name() == self.probe {
                probes.heard = message.get_payload().unwrap_or(probes.heard);
                continue;
            }
            self.counts.message(self.way.as_str());
            let heard = if message.get_payload_bytes().len() > LARGE_BYTES {
                self.read_aside(message).await
            } else {
                read(&self.reader(), message.get_channel_name(), message.get_payload_bytes())
            };
            for heard in heard {
                self.hand_over(heard);
            }
        }
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            way: self.way,
            task_prefix: &self.task_prefix,
            group_prefix: &self.group_prefix,
            reading: &self.reading,
            counts: &self.counts,
        }
    }

    async fn read_aside(&self, message: redis::Msg) -> Vec<Heard> {
        let (way, task_prefix, group_prefix) =
            (self.way, self.task_prefix.clone(), self.group_prefix.clone());
        let (reading, counts) = (Arc::clone(&self.reading), Arc::clone(&self.counts));
        let read_it = move || {
            let reader = Reader {
                way,
                task_prefix: &task_prefix,
                group_prefix: &group_prefix,
                reading: &reading,
                counts: &counts,
            };
            read(&reader, message.get_channel_name(), message.get_payload_bytes())
        };
        self.tasks.spawn_blocking(read_it).await.unwrap_or_default()
    }

    /// Hands on what was read, if there is room. If there is none, all that is followed is read anew.
    fn hand_over(&self, heard: Heard) {
        if self.heard.try_send(heard).is_err() {
            self.counts.dropped();
            self.overflowed.store(true, Ordering::Relaxed);
        }
    }

    /// Hands on what must not be missed.
    async fn hand_on(&self, heard: Heard) {
        // Nobody listens only when all of it ends.
        let _ = self.heard.send(heard).await;
    }
}

impl Probes {
    /// Whether two were published and not heard.
    fn are_missed(&self) -> bool {
        self.published.load(Ordering::Relaxed) >= self.heard + 2
    }

    /// What came late was not missed.
    fn forgive(&mut self) {
        self.heard = self.heard.max(self.published.load(Ordering::Relaxed));
    }
}

/// What is needed to read a message.
struct Reader<'a> {
    way: Way,
    task_prefix: &'a str,
    group_prefix: &'a str,
    reading: &'a Reading,
    counts: &'a CeleryCounts,
}

fn read(reader: &Reader<'_>, channel: &str, payload: &[u8]) -> Vec<Heard> {
    match reader.way {
        Way::Backend => read_backend(reader, channel, payload).into_iter().collect(),
        Way::Events => read_events(reader, payload),
    }
}

fn read_backend(reader: &Reader<'_>, channel: &str, payload: &[u8]) -> Option<Heard> {
    let unreadable = |reason| reader.counts.unreadable(Way::Backend.as_str(), reason);
    if let Some(group) = channel.strip_prefix(reader.group_prefix) {
        let group = task_id(group)?;
        // Of a larger one nobody would know how many there are.
        let members =
            backend::read_group(payload, MEMBERS_MAX + 1).filter(|members| members.len() <= MEMBERS_MAX);
        if members.is_none() {
            unreadable("group");
        }
        return members.map(|members| Heard::GroupSaved(group, members));
    }
    let Some(id) = channel.strip_prefix(reader.task_prefix).and_then(task_id) else {
        unreadable("task_id");
        return None;
    };
    let readable = if payload.len() > MESSAGE_BYTES_MAX { &payload[..LARGE_BYTES] } else { payload };
    match backend::read(id, Route::Backend, readable, reader.reading) {
        backend::Heard::Report(report) => Some(Heard::Report(Box::new(report))),
        backend::Heard::InPart(report) => {
            unreadable("body");
            Some(Heard::Report(Box::new(report)))
        }
        backend::Heard::Unreadable => {
            unreadable("body");
            None
        }
    }
}

fn read_events(reader: &Reader<'_>, payload: &[u8]) -> Vec<Heard> {
    let unreadable = |reason| reader.counts.unreadable(Way::Events.as_str(), reason);
    if payload.len() > EVENTS_BYTES_MAX {
        unreadable("too_large");
        return Vec::new();
    }
    match events::read(payload, reader.reading) {
        Ok((events, unread)) => {
            (0..unread).for_each(|_| unreadable("event"));
            let heard = events.into_iter().map(|event| match event {
                Event::Task(report) => Heard::Report(report),
                Event::Worker(event) => Heard::Worker(event),
            });
            heard.collect()
        }
        Err(reason) => {
            unreadable(reason.as_str());
            Vec::new()
        }
    }
}

/// A prefix as it stands in a pattern.
pub(super) fn escaped(prefix: &str) -> String {
    let mut escaped = String::with_capacity(prefix.len());
    for char in prefix.chars() {
        if matches!(char, '*' | '?' | '[' | ']' | '\\' | '^') {
            escaped.push('\\');
        }
        escaped.push(char);
    }
    escaped
}
