//! A node's part in a channel that several nodes hear: it counts with the others, and appends while it holds the lease.

use std::time::Duration;

use redis::cmd;
use tidings_engine::{
    RedisMember,
    engine::{NumberedEvent, redis::Lease},
};
use tidings_protocol::Gap;
use tokio::time::{Instant, sleep_until};

use crate::{ingest::Ingest, metrics::EventSource};

use super::numbering::{Mark, Number, Numbering};

/// Where marks are published.
pub(super) const MARKS: &str = "tidings:channel-marks";
/// Somebody who does not count with the others yet asks for marks.
const HELLO: &[u8] = b"hello";
/// The holder gives the lease back.
const RELEASED: &[u8] = b"released";
/// The name of the source, for the streams' memory of its numbers.
const SOURCE: &str = "channel";
/// How often the lease is renewed or asked for, and how often a quiet holder makes a mark.
const LEASE_INTERVAL: Duration = Duration::from_millis(500);
/// Between two marks of a busy holder.
const MARK_INTERVAL: Duration = Duration::from_millis(100);
/// Who could not go on where the holder was leaves a free lease to those who could for so long.
const STAND_BACK: Duration = Duration::from_millis(1200);
/// Messages and bytes that are appended at once.
const BATCH_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// See the module.
pub(super) struct Shared {
    member: RedisMember,
    numbering: Numbering,
    lease: Lease,
    started: Instant,
    lease_due: Instant,
    mark_due: Instant,
    /// Marks that somebody waits for.
    marks_wanted: u8,
    /// Since when the lease has been free, as far as we have seen.
    free_since: Option<Instant>,
    /// Nobody else listens.
    is_alone: bool,
    /// What the next recovery says; `None`: it was said.
    recovering: Option<Gap>,
    /// Something was lost for want of room, which was not said yet.
    dropped: usize,
}

impl Shared {
    pub(super) fn new(member: RedisMember) -> Self {
        let now = Instant::now();
        Self {
            lease: Lease::new(SOURCE, member.incarnation.clone()),
            member,
            numbering: Numbering::default(),
            started: now,
            lease_due: now,
            mark_due: now,
            marks_wanted: 0,
            free_since: None,
            is_alone: false,
            recovering: Some(Gap::None),
            dropped: 0,
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A new connection listens, to the channel and to the marks.
    pub(super) async fn connected(&mut self) {
        let mut ask = cmd("PUBSUB");
        ask.arg("NUMSUB").arg(MARKS);
        let listeners = self.member.servers.anchor().send(&ask).await.ok().and_then(count_of);
        self.is_alone = listeners == Some(1);
        self.free_since = None;
        self.lease_due = Instant::now();
        self.publish(HELLO).await;
    }

    /// The connection is lost, and with it our place in the channel: somebody whose is not does better.
    pub(super) async fn disconnected(&mut self) {
        self.numbering.disconnect();
        self.recovering = Some(Gap::Lost);
        self.give_back().await;
    }

    /// Gives the lease back, if it is ours.
    pub(super) async fn give_back(&mut self) {
        if !self.lease.is_held() {
            return;
        }
        self.mark().await;
        self.numbering.end();
        // Who cannot be told waits until its time is over.
        if self.lease.give_back(&self.member.servers).await.is_ok() {
            self.publish(RELEASED).await;
        }
    }

    /// Takes a message of either channel.
    pub(super) fn hear(&mut self, channel: &str, message: &[u8]) {
        if channel != MARKS {
            let now_ms = self.now_ms();
            self.dropped += self.numbering.hear(message.to_vec(), now_ms);
            return;
        }
        match message {
            HELLO => {
                self.marks_wanted = 2;
                self.mark_due = Instant::now();
            }
            RELEASED => self.lease_due = Instant::now(),
            mark => {
                if let Some(mark) = std::str::from_utf8(mark).ok().and_then(Mark::parse) {
                    self.numbering.hear_mark(&mark);
                    self.free_since = None;
                    if self.numbering.is_holding() && self.marks_wanted > 0 {
                        self.mark_due = Instant::now();
                    }
                }
            }
        }
    }

    /// Ends when there is something to do.
    pub(super) async fn turn(&self) {
        let due =
            if self.numbering.is_holding() { self.lease_due.min(self.mark_due) } else { self.lease_due };
        sleep_until(due).await;
    }

    /// Whether this node takes part again, which is said once: what became of messages meanwhile.
    pub(super) fn takes_part(&mut self) -> Option<Gap> {
        // Who counts with the others has them to thank that nothing was lost.
        let gap = match (self.numbering.is_holding(), self.numbering.could_go_on()) {
            (true, _) => self.recovering.take(),
            (false, true) => self.recovering.take().map(|_| Gap::None),
            (false, false) => None,
        };
        if std::mem::take(&mut self.dropped) > 0 { Some(Gap::Lost) } else { gap }
    }

    /// Does what is due.
    pub(super) async fn work(&mut self, ingest: &Ingest) {
        if Instant::now() >= self.lease_due {
            self.lease_due = Instant::now() + LEASE_INTERVAL;
            self.hold().await;
            let now_ms = self.now_ms();
            self.numbering.expire(now_ms);
        }
        while self.numbering.is_holding() && self.lease.is_held() && self.append(ingest).await {}
        if self.numbering.is_holding() && Instant::now() >= self.mark_due {
            self.mark().await;
        }
    }

    /// Renews the lease, or takes it, if it is not better left to somebody else.
    async fn hold(&mut self) {
        if self.numbering.is_holding() && !self.lease.is_held() {
            tracing::warn!("the lease on the plain channel could not be renewed in time");
            self.numbering.end();
        }
        let stands_back = !self.lease.is_held() && !self.numbering.could_go_on() && !self.is_alone;
        if stands_back {
            let free = self.lease.is_free(&self.member.servers).await.unwrap_or(false);
            let since = *self.free_since.get_or_insert_with(Instant::now);
            if !free {
                self.free_since = None;
            }
            if !free || since.elapsed() < STAND_BACK {
                return;
            }
        }
        match self.lease.hold(&self.member.servers).await {
            Ok(true) if !self.numbering.is_holding() => {
                let anew = self.numbering.begin(self.lease.term());
                tracing::info!(counts_anew = anew, "this node appends what comes on the plain channel");
                self.marks_wanted = 2;
                self.mark_due = Instant::now();
            }
            Ok(true) => {}
            Ok(false) => self.numbering.end(),
            Err(fault) => tracing::debug!(%fault, "the lease on the plain channel"),
        }
        // From now on there may be others.
        self.is_alone = false;
    }

    /// Appends a batch; whether there may be more.
    async fn append(&mut self, ingest: &Ingest) -> bool {
        let batch = self.numbering.next(BATCH_MAX, BATCH_BYTES_MAX);
        let Some(&(last, _)) = batch.last() else { return false };
        let read = |(number, message): &(Number, &[u8])| {
            let event = ingest.read(EventSource::RedisChannel, message).ok()?;
            Some(NumberedEvent { number: number.to_string(), event })
        };
        let events: Vec<_> = batch.iter().filter_map(read).collect();
        if let Err(error) = ingest.append_numbered(EventSource::RedisChannel, SOURCE, events).await {
            // It is kept, and said again: by us as long as the lease is ours, then by another.
            tracing::warn!(%error, "events from the channel cannot be appended; trying again");
            self.lease_due = self.lease_due.min(Instant::now() + Duration::from_millis(50));
            return false;
        }
        self.numbering.forget_up_to(last);
        self.mark_due = self.mark_due.min(Instant::now() + MARK_INTERVAL);
        true
    }

    async fn mark(&mut self) {
        self.marks_wanted = self.marks_wanted.saturating_sub(1);
        self.mark_due = Instant::now() + LEASE_INTERVAL;
        if let Some(mark) = self.numbering.mark() {
            self.publish(mark.to_string().as_bytes()).await;
        }
    }

    async fn publish(&self, message: &[u8]) {
        let mut publish = cmd("PUBLISH");
        publish.arg(MARKS).arg(message);
        if let Err(error) = self.member.servers.anchor().send(&publish).await {
            tracing::debug!(%error, "a mark could not be published");
        }
    }
}

/// The count in the answer to `PUBSUB NUMSUB` of one channel: a map in one version of the protocol, a list in the other.
fn count_of(answer: redis::Value) -> Option<u64> {
    let count = match answer {
        redis::Value::Map(pairs) => pairs.into_iter().next()?.1,
        redis::Value::Array(mut pairs) => pairs.pop()?,
        _ => return None,
    };
    redis::from_redis_value(count).ok()
}
