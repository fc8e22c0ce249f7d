//! The plain Redis channel: JSON events as any code `PUBLISH`es them, that knows nothing of us.
//!
//! Pub/sub keeps nothing: what is published while we are away is lost, and the log says from when to when. Redis away
//! is no reason to stop: the service runs, says so in health, and listens again as soon as Redis is back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::ReadyChunks};
use redis::aio::{PubSub, PubSubSink, PubSubStream};
use tokio::time::{Instant, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    ingest::Ingest,
    metrics::{EventSource, Metrics},
};

/// A connection or an answer that takes longer than this is a failure. Together with [`RETRY_MAX`] it keeps the promise
/// to be subscribed again within 2 seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// The first wait before another attempt; each one doubles it.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How often Redis is asked whether it is there: a peer that was cut off never says that it is gone.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Messages taken from the library's queue at once.
const BATCH_MAX: usize = 256;

/// What has arrived, as much at once as is there.
type Batches = ReadyChunks<PubSubStream>;

/// Whether the channel is heard.
#[derive(Debug, Default)]
pub(crate) struct ChannelStatus(AtomicBool);

impl ChannelStatus {
    pub(crate) fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Listens to the channel.
#[derive(Debug)]
pub(crate) struct RedisChannel {
    pub(crate) url: String,
    pub(crate) channel: String,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status: Arc<ChannelStatus>,
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
}

impl RedisChannel {
    /// Listens until `stop`, whatever becomes of Redis meanwhile.
    pub(crate) async fn run(self, stop: CancellationToken) {
        self.metrics.source_up(EventSource::RedisChannel, false);
        // However this ends, a source that nobody listens to must not look well.
        let _down = DownAtEnd(&self);
        stop.run_until_cancelled(self.listen_for_ever()).await;
    }

    async fn listen_for_ever(&self) {
        let mut retry = RETRY_MIN;
        let mut down_since: Option<Instant> = None;
        loop {
            let lost = match self.subscribe().await {
                Ok(pubsub) => {
                    let channel = &self.channel;
                    match down_since.take() {
                        None => tracing::info!(channel, "listening to Redis"),
                        Some(since) => tracing::warn!(
                            channel,
                            away_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
                            "listening to Redis again; what was published on the channel meanwhile is lost"
                        ),
                    }
                    self.set_up(true);
                    retry = RETRY_MIN;
                    let lost = self.listen(pubsub).await;
                    self.set_up(false);
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

    async fn subscribe(&self) -> Result<PubSub, Lost> {
        let client = redis::Client::open(self.url.as_str())?;
        let mut pubsub = timeout(ANSWER_TIMEOUT, client.get_async_pubsub()).await??;
        timeout(ANSWER_TIMEOUT, pubsub.subscribe(&self.channel)).await??;
        Ok(pubsub)
    }

    async fn listen(&self, pubsub: PubSub) -> Lost {
        let (mut commands, messages) = pubsub.split();
        let mut batches = messages.ready_chunks(BATCH_MAX);
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        let lost = loop {
            tokio::select! {
                batch = batches.next() => match batch {
                    Some(batch) => self.take(&batch).await,
                    None => return Lost::Closed,
                },
                _ = pings.tick() => match timeout(ANSWER_TIMEOUT, commands.ping::<redis::Value>()).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => break error.into(),
                    Err(_) => if let Some(lost) = self.outwait(&mut commands, &mut batches).await {
                        break lost;
                    },
                },
            }
        };
        // What had arrived before the loss is not part of it.
        while let Some(Some(batch)) = batches.next().now_or_never() {
            self.take(&batch).await;
        }
        lost
    }

    /// Redis does not answer. It may be busy, and then all that it was told meanwhile still comes on this connection; or
    /// the connection is dead, and then only another one gets an answer. `None`: it is this one that lives.
    async fn outwait(&self, commands: &mut PubSubSink, batches: &mut Batches) -> Option<Lost> {
        let silent_since = Instant::now();
        self.set_up(false);
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
                    Some(batch) => self.take(&batch).await,
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
                self.set_up(true);
                return None;
            }
            if timeout(ANSWER_TIMEOUT, self.subscribe()).await.is_ok_and(|subscribed| subscribed.is_ok()) {
                return Some(Lost::Dead);
            }
        }
    }

    async fn take(&self, batch: &[redis::Msg]) {
        let read = |message: &redis::Msg| {
            self.ingest.read(EventSource::RedisChannel, message.get_payload_bytes()).ok()
        };
        let events: Vec<_> = batch.iter().filter_map(read).collect();
        if events.is_empty() {
            return;
        }
        let count = events.len();
        if let Err(error) = self.ingest.append(EventSource::RedisChannel, events).await {
            tracing::error!(%error, count, "events from Redis could not be appended and are lost");
        }
    }

    fn set_up(&self, up: bool) {
        self.status.0.store(up, Ordering::Relaxed);
        self.metrics.source_up(EventSource::RedisChannel, up);
    }
}

struct DownAtEnd<'a>(&'a RedisChannel);

impl Drop for DownAtEnd<'_> {
    fn drop(&mut self) {
        self.0.set_up(false);
    }
}
