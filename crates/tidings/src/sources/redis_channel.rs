//! The plain Redis channel: JSON events as any code `PUBLISH`es them, that knows nothing of us.
//!
//! Pub/sub keeps nothing: what is published while nobody listens is lost, and the log says from when to when. Redis away
//! is no reason to stop: the service runs, says so in health, and listens again as soon as Redis is back.
//!
//! Where several nodes share their streams, all listen, and the holder of a lease appends; see [`numbering`].

mod numbering;
mod shared;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::ReadyChunks};
use redis::aio::{PubSub, PubSubSink, PubSubStream};
use tidings_engine::{
    RedisMember,
    engine::redis::{Primary, Servers},
    vigil::Vigil,
};
use tidings_protocol::{Gap, Source};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    ingest::Ingest,
    metrics::{EventSource, Metrics},
};

use shared::{Shared, marks_channel};

/// A connection or an answer that takes longer than this is a failure. Together with [`RETRY_MAX`] it keeps the promise
/// to be subscribed again within 2 seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// For a connection with all that it takes, Sentinel's answer, too.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first wait before another attempt; each one doubles it.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How often Redis is asked whether it is there: a peer that was cut off never says that it is gone.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Without a probe for so long the channel counts as silent.
const SILENCE_MAX: Duration = Duration::from_millis(3500);
/// Messages taken from the library's queue at once.
const BATCH_MAX: usize = 256;
/// What this is to health and to clients.
pub(crate) const PART: &str = "plain channel";

/// What has arrived, as much at once as is there.
type Batches = ReadyChunks<PubSubStream>;

/// Listens to the channel.
#[derive(Debug)]
pub(crate) struct RedisChannel {
    pub(crate) channel: String,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) vigil: Arc<Vigil>,
    /// The nodes that it shares its streams with; `None`: it keeps its own.
    pub(crate) member: Option<RedisMember>,
    /// The Redis, to send probes to.
    pub(crate) servers: Arc<Servers>,
    /// The channel of this node's probes.
    pub(crate) probe: String,
    /// Probes are sent on it.
    pub(crate) tasks: TaskTracker,
}

/// A connection that listens.
struct Subscribed {
    /// Where: all nodes listen at the same server, and so hear the same in the same order.
    anchor: Arc<Primary>,
    pubsub: PubSub,
    /// The channel of those who listen there.
    marks: String,
}

/// What becomes of the probes of one connection. Only one that Redis says to have published can be missed.
struct Probes {
    sent: u64,
    published: Arc<AtomicU64>,
    heard: u64,
    heard_at: Instant,
}

impl Probes {
    fn new() -> Self {
        Self { sent: 0, published: Arc::default(), heard: 0, heard_at: Instant::now() }
    }

    fn hear(&mut self, channel: &str, batch: &[redis::Msg]) {
        for message in batch.iter().filter(|message| message.get_channel_name() == channel) {
            self.heard = message.get_payload().unwrap_or(self.heard);
            self.heard_at = Instant::now();
        }
    }

    /// Whether two were published and not heard.
    fn are_missed(&self) -> bool {
        self.published.load(Ordering::Relaxed) >= self.heard + 2
    }

    /// Whether nothing gets through at present.
    fn is_silent(&self) -> bool {
        self.heard_at.elapsed() > SILENCE_MAX
    }
}

/// Why listening ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{0}")]
    Redis(#[from] redis::RedisError),
    #[error("no answer within {} s", ANSWER_TIMEOUT.as_secs())]
    NoAnswer(#[from] tokio::time::error::Elapsed),
    #[error("the connection was closed")]
    Closed,
    #[error("Redis answers, but not on this connection")]
    Dead,
    #[error("Redis answers, but what is published is not heard on this connection")]
    Deaf,
    #[error("another server is the primary now")]
    Replaced,
}

impl RedisChannel {
    /// Listens until `stop`, whatever becomes of Redis meanwhile.
    pub(crate) async fn run(self, stop: CancellationToken) {
        self.metrics.source_up(EventSource::RedisChannel, false);
        let mut taking = match &self.member {
            Some(member) => Taking::Shared(Box::new(Shared::new(member.clone()))),
            None => Taking::Alone,
        };
        stop.run_until_cancelled(self.listen_for_ever(&mut taking)).await;
        if let Taking::Shared(shared) = &mut taking {
            // Another node goes on at once.
            shared.give_back().await;
        }
        self.metrics.source_up(EventSource::RedisChannel, false);
    }

    async fn listen_for_ever(&self, taking: &mut Taking) {
        let mut retry = RETRY_MIN;
        let mut down_since: Option<Instant> = None;
        loop {
            let lost = match self.subscribe().await {
                Ok(subscribed) => {
                    let channel = &self.channel;
                    match down_since.take() {
                        None => tracing::info!(channel, "listening to Redis"),
                        Some(since) => tracing::warn!(
                            channel,
                            away_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
                            "listening to Redis again; what was published on the channel meanwhile is lost, unless another node heard it"
                        ),
                    }
                    retry = RETRY_MIN;
                    let lost = self.listen(subscribed, taking).await;
                    self.set_down();
                    lost
                }
                Err(lost) => lost,
            };
            if down_since.is_none() {
                down_since = Some(Instant::now());
                tracing::warn!(error = %lost, "Redis cannot be heard; trying again until it can");
            }
            sleep(retry).await;
            retry = (retry * 2).min(RETRY_MAX);
        }
    }

    async fn subscribe(&self) -> Result<Subscribed, Lost> {
        let anchor = self.servers.anchor();
        let (mut pubsub, run) = timeout(CONNECT_TIMEOUT, anchor.listen()).await??;
        let marks = marks_channel(&run);
        timeout(ANSWER_TIMEOUT, pubsub.subscribe(&self.channel)).await??;
        timeout(ANSWER_TIMEOUT, pubsub.subscribe(&self.probe)).await??;
        if self.member.is_some() {
            timeout(ANSWER_TIMEOUT, pubsub.subscribe(&marks)).await??;
        }
        Ok(Subscribed { anchor, pubsub, marks })
    }

    /// Publishes what has to come back on the connection that listens. What becomes of it is seen by its coming back.
    fn send_probe(&self, probes: &mut Probes) {
        probes.sent += 1;
        let (number, published) = (probes.sent, Arc::clone(&probes.published));
        let (servers, probe) = (Arc::clone(&self.servers), self.probe.clone());
        self.tasks.spawn(async move {
            if servers.anchor().probe(&probe, number).await.is_ok() {
                published.fetch_max(number, Ordering::Relaxed);
            }
        });
    }

    async fn listen(&self, subscribed: Subscribed, taking: &mut Taking) -> Lost {
        let Subscribed { anchor, pubsub, marks } = subscribed;
        let (mut place, mut topology) = (anchor.watch(), self.servers.watch());
        let (mut commands, messages) = pubsub.split();
        let mut batches = messages.ready_chunks(BATCH_MAX);
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut probes, mut was_silent) = (Probes::new(), false);
        match taking {
            Taking::Alone => self.set_up(Gap::Lost),
            Taking::Shared(shared) => shared.connected(marks).await,
        }
        let lost = loop {
            tokio::select! {
                // First what has come: a probe is missed only if nothing is left that could hold it.
                biased;
                batch = batches.next() => match batch {
                    Some(batch) => {
                        probes.hear(&self.probe, &batch);
                        self.take(&batch, taking).await;
                    }
                    None => break Lost::Closed,
                },
                () = taking.turn() => if let Taking::Shared(shared) = taking {
                    self.work(shared).await;
                },
                _ = place.changed() => break Lost::Replaced,
                _ = topology.changed() => if self.servers.anchor().name() != anchor.name() {
                    break Lost::Replaced;
                },
                _ = pings.tick() => match timeout(ANSWER_TIMEOUT, commands.ping::<redis::Value>()).await {
                    Ok(Ok(_)) => {
                        if probes.are_missed() {
                            break Lost::Deaf;
                        }
                        let silent = probes.is_silent();
                        match (silent, std::mem::replace(&mut was_silent, silent)) {
                            (true, false) => self.set_down(),
                            (false, true) => self.set_up(Gap::None),
                            _ => {}
                        }
                        self.send_probe(&mut probes);
                    }
                    Ok(Err(error)) => break error.into(),
                    Err(_) => {
                        if let Some(lost) = self.outwait(&mut commands, &mut batches, taking).await {
                            break lost;
                        }
                        probes = Probes::new();
                    }
                },
            }
        };
        // What had arrived before the loss is not part of it.
        while let Some(Some(batch)) = batches.next().now_or_never() {
            self.take(&batch, taking).await;
        }
        if let Taking::Shared(shared) = taking {
            shared.disconnected().await;
        }
        lost
    }

    /// Redis does not answer. It may be busy, and then all that it was told meanwhile still comes on this connection; or
    /// the connection is dead, and then only another one gets an answer. `None`: it is this one that lives.
    async fn outwait(
        &self,
        commands: &mut PubSubSink,
        batches: &mut Batches,
        taking: &mut Taking,
    ) -> Option<Lost> {
        let silent_since = Instant::now();
        self.set_down();
        tracing::warn!(
            "Redis does not answer; keeping the subscription while asking whether it is there at all"
        );
        loop {
            let answered_elsewhere = async {
                while self.subscribe().await.is_err() {
                    sleep(RETRY_MAX).await;
                }
            };
            tokio::select! {
                batch = batches.next() => match batch {
                    Some(batch) => self.take(&batch, taking).await,
                    None => return Some(Lost::Closed),
                },
                () = answered_elsewhere => {}
            }
            if let Ok(answer) = timeout(ANSWER_TIMEOUT, commands.ping::<redis::Value>()).await {
                if let Err(error) = answer {
                    return Some(error.into());
                }
                let silent_ms = u64::try_from(silent_since.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(silent_ms, "Redis answers again on the same connection; nothing was lost");
                self.set_up(Gap::None);
                return None;
            }
            if timeout(ANSWER_TIMEOUT, self.subscribe()).await.is_ok_and(|subscribed| subscribed.is_ok()) {
                return Some(Lost::Dead);
            }
        }
    }

    async fn take(&self, batch: &[redis::Msg], taking: &mut Taking) {
        match taking {
            Taking::Alone => self.append(batch, &self.channel).await,
            Taking::Shared(shared) => {
                for message in batch.iter().filter(|message| message.get_channel_name() != self.probe) {
                    shared.hear(message.get_channel_name(), message.get_payload_bytes());
                }
                self.work(shared).await;
            }
        }
    }

    async fn append(&self, batch: &[redis::Msg], channel: &str) {
        let read = |message: &redis::Msg| {
            self.ingest.read(EventSource::RedisChannel, message.get_payload_bytes()).ok()
        };
        let messages = batch.iter().filter(|message| message.get_channel_name() == channel);
        let events: Vec<_> = messages.filter_map(read).collect();
        if events.is_empty() {
            return;
        }
        let count = events.len();
        if let Err(error) = self.ingest.append(EventSource::RedisChannel, events).await {
            tracing::error!(%error, count, "events from Redis could not be appended and are lost");
        }
    }

    /// Does what is due for a node that shares its streams.
    async fn work(&self, shared: &mut Shared) {
        shared.work(&self.ingest).await;
        if let Some(gap) = shared.takes_part() {
            if gap == Gap::Lost {
                // Also if it was heard all the time: there was no room for what came.
                self.set_down();
            }
            self.set_up(gap);
        }
    }

    fn set_up(&self, gap: Gap) {
        self.metrics.source_up(EventSource::RedisChannel, true);
        self.vigil.up(Source::Redis, PART, gap);
    }

    fn set_down(&self) {
        self.metrics.source_up(EventSource::RedisChannel, false);
        self.vigil.down(Source::Redis, PART);
    }
}

/// What becomes of messages.
enum Taking {
    /// They are appended.
    Alone,
    /// They are counted, and appended by whoever holds the lease.
    Shared(Box<Shared>),
}

impl Taking {
    /// Ends when there is something to do beside what comes.
    async fn turn(&mut self) {
        match self {
            Self::Alone => std::future::pending().await,
            Self::Shared(shared) => shared.turn().await,
        }
    }
}
