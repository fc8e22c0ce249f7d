//! A node's part in a channel that several nodes hear: it counts with the others, and appends while it holds the lease.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use redis::cmd;
use tidings_engine::{
    RedisMember,
    engine::{EngineError, NumberedEvent, redis::Lease},
};
use tidings_protocol::Gap;
use tokio::time::{Instant, sleep_until};

use crate::{ingest::Ingest, metrics::EventSource};

use super::numbering::{Mark, Number, Numbering};

/// Where marks are published that those understand who listen at this run of a server.
pub(super) fn marks_channel(run: &str) -> String {
    format!("tidings:channel-marks:{run}")
}

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
/// Before what could not be appended is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Messages and bytes that are appended at once.
const BATCH_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// See the module.
pub(super) struct Shared {
    member: RedisMember,
    /// The channel of the marks.
    marks: String,
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
    /// A batch on its way into its streams, and the number of its last message.
    appending: Option<Appending>,
    /// After one that failed.
    retry_at: Instant,
}

type Appending = BoxFuture<'static, (Number, Result<(), EngineError>)>;

impl Shared {
    pub(super) fn new(member: RedisMember) -> Self {
        let now = Instant::now();
        Self {
            lease: Lease::new(SOURCE, member.incarnation.clone()),
            member,
            marks: String::new(),
            numbering: Numbering::default(),
            started: now,
            lease_due: now,
            mark_due: now,
            marks_wanted: 0,
            free_since: None,
            is_alone: false,
            recovering: Some(Gap::None),
            dropped: 0,
            appending: None,
            retry_at: now,
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A new connection listens, to the channel and to the marks.
    pub(super) async fn connected(&mut self, marks: String) {
        self.marks = marks;
        let listeners = self.member.servers.anchor().listeners(&self.marks).await;
        self.is_alone = listeners.is_ok_and(|listeners| listeners == 1);
        self.free_since = None;
        self.lease_due = Instant::now();
        self.publish(HELLO).await;
    }

    /// The connection is lost, and with it our place in the channel: somebody whose is not does better.
    pub(super) async fn disconnected(&mut self) {
        self.give_back().await;
        self.numbering.disconnect();
        self.recovering = Some(Gap::Lost);
    }

    /// Gives the lease back, if it is ours.
    pub(super) async fn give_back(&mut self) {
        if !self.lease.is_held() {
            return;
        }
        if let Some(appending) = self.appending.take() {
            // Not left in the middle: its end is a matter of two seconds at most.
            let (last, appended) = appending.await;
            self.appended(last, appended);
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
        if channel != self.marks {
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

    /// Ends when there is something to do. What is on its way goes on meanwhile.
    pub(super) async fn turn(&mut self) {
        let mut due = self.lease_due;
        if self.numbering.is_holding() {
            due = due.min(self.mark_due);
            if self.appending.is_none() && !self.numbering.next(1, 0).is_empty() {
                due = due.min(self.retry_at);
            }
        }
        let Some(appending) = &mut self.appending else { return sleep_until(due).await };
        tokio::select! {
            (last, appended) = appending => {
                self.appending = None;
                self.appended(last, appended);
            }
            () = sleep_until(due) => {}
        }
    }

    fn appended(&mut self, last: Number, appended: Result<(), EngineError>) {
        match appended {
            Ok(()) => {
                self.numbering.forget_up_to(last);
                self.mark_due = self.mark_due.min(Instant::now() + MARK_INTERVAL);
            }
            Err(error) => {
                // It is kept, and said again: by us as long as the lease is ours, then by another.
                tracing::warn!(%error, "events from the channel cannot be appended; trying again");
                self.retry_at = Instant::now() + RETRY_PAUSE;
            }
        }
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
    pub(super) async fn work(&mut self, ingest: &Arc<Ingest>) {
        if Instant::now() >= self.lease_due {
            self.lease_due = Instant::now() + LEASE_INTERVAL;
            self.hold().await;
            let now_ms = self.now_ms();
            self.numbering.expire(now_ms);
        }
        self.append(ingest);
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

    /// Begins to append a batch, if it is ours to do and none is under way.
    fn append(&mut self, ingest: &Arc<Ingest>) {
        let may = self.numbering.is_holding() && self.lease.is_held() && Instant::now() >= self.retry_at;
        if self.appending.is_some() || !may {
            return;
        }
        let batch = self.numbering.next(BATCH_MAX, BATCH_BYTES_MAX);
        let Some(&(last, _)) = batch.last() else { return };
        let read = |(number, message): &(Number, &[u8])| {
            let event = ingest.read(EventSource::RedisChannel, message).ok()?;
            Some(NumberedEvent { number: number.to_string(), event })
        };
        let events: Vec<_> = batch.iter().filter_map(read).collect();
        let ingest = Arc::clone(ingest);
        let append =
            async move { (last, ingest.append_numbered(EventSource::RedisChannel, SOURCE, events).await) };
        self.appending = Some(append.boxed());
    }

    async fn mark(&mut self) {
        self.marks_wanted = self.marks_wanted.saturating_sub(1);
        self.mark_due = Instant::now() + LEASE_INTERVAL;
        if let Some(mark) = self.numbering.mark() {
            self.publish(mark.to_string().as_bytes()).await;
        }
    }

    fn publish(&self, message: &[u8]) -> impl Future<Output = ()> + use<> {
        let (anchor, mut publish) = (self.member.servers.anchor(), cmd("PUBLISH"));
        publish.arg(&self.marks).arg(message);
        async move {
            if let Err(error) = anchor.send(&publish).await {
                tracing::debug!(%error, "a mark could not be published");
            }
        }
    }
}
