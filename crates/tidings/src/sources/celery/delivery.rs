//! From the bridge to the engine: only while this node holds the lease, and never before what is told is kept, so that whoever goes
//! on after a crash knows of it.

use std::time::Duration;

use std::sync::Arc;
use tidings_engine::{RedisMember, engine::redis::Lease};
use tokio::time::{Instant, sleep};

use crate::{ingest::Ingest, metrics::EventSource};

use super::{kept::Kept, report::TaskId, store::Store, task::Mark, telling::Outgoing};

/// The name of the lease.
const LEASE: &str = "celery";
/// How often it is renewed or asked for.
const LEASE_INTERVAL: Duration = Duration::from_millis(700);
/// Before what did not succeed is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct Delivery {
    /// `None`: there is no other node.
    lease: Option<(RedisMember, Lease)>,
    lease_due: Instant,
    has_answered: bool,
    /// Whether what was kept is known: this node appended last.
    is_ready: bool,
    store: Store,
    ingest: Arc<Ingest>,
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Delivered {
    /// The engine has all of it: how much of which task was told with that.
    All(Vec<(TaskId, Mark)>),
    /// Nobody knows whether it has any. It is to be said again; and these are to be kept, and not to be kept.
    Failed { kept: Vec<Kept>, gone: Vec<TaskId> },
    /// This node appends from now on. This was kept by whoever did before.
    TookOver(Vec<Kept>),
    /// Another node does.
    Elsewhere,
    /// Nobody knows whether another node does.
    NoAnswer { kept: Vec<Kept>, gone: Vec<TaskId> },
}

impl Delivery {
    pub(super) fn new(member: Option<RedisMember>, store: Store, ingest: Arc<Ingest>) -> Self {
        let lease = member.map(|member| {
            let lease = Lease::new(LEASE, member.incarnation.clone());
            (member, lease)
        });
        Self { lease, lease_due: Instant::now(), has_answered: false, is_ready: false, store, ingest }
    }

    /// Whether this node may append at once.
    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Takes the lease, if it is free.
    pub(super) async fn hold(mut self: Box<Self>) -> (Box<Self>, Delivered) {
        let delivered = self.take_over().await;
        (self, delivered)
    }

    /// Keeps, then appends.
    pub(super) async fn deliver(
        mut self: Box<Self>,
        batch: Vec<Outgoing>,
        kept: Vec<Kept>,
        gone: Vec<TaskId>,
    ) -> (Box<Self>, Delivered) {
        let delivered = self.keep_and_append(batch, kept, gone).await;
        (self, delivered)
    }

    /// Gives the lease back, so that another node goes on at once.
    pub(super) async fn give_back(&mut self) {
        if let Some((member, lease)) = &mut self.lease {
            // Who cannot be told waits until its time is over.
            let _ = lease.give_back(&member.servers).await;
        }
    }

    async fn take_over(&mut self) -> Delivered {
        self.is_ready = false;
        let no_answer = Delivered::NoAnswer { kept: Vec::new(), gone: Vec::new() };
        match self.is_held().await {
            Some(true) => {}
            Some(false) => return Delivered::Elsewhere,
            None => return no_answer,
        }
        match self.store.load().await {
            Ok(kept) => {
                self.is_ready = true;
                Delivered::TookOver(kept)
            }
            Err(error) => {
                tracing::warn!(error, "what is kept of Celery's tasks cannot be read; trying again");
                sleep(RETRY_PAUSE).await;
                no_answer
            }
        }
    }

    async fn keep_and_append(
        &mut self,
        batch: Vec<Outgoing>,
        kept: Vec<Kept>,
        gone: Vec<TaskId>,
    ) -> Delivered {
        match self.is_held().await {
            Some(true) => {}
            held => {
                self.is_ready = false;
                return held.map_or(Delivered::NoAnswer { kept, gone }, |_| Delivered::Elsewhere);
            }
        }
        if let Err(error) = self.store.write(&kept, &gone).await {
            tracing::warn!(error, "what Celery's tasks do cannot be kept; trying again");
            sleep(RETRY_PAUSE).await;
            return Delivered::Failed { kept, gone };
        }
        // Keeping may have taken long.
        if self.is_held().await != Some(true) {
            return Delivered::Failed { kept, gone };
        }
        if let Err(error) = self.append(&batch).await {
            tracing::warn!(error, "what Celery's tasks do cannot be appended; trying again");
            sleep(RETRY_PAUSE).await;
            return Delivered::Failed { kept, gone };
        }
        let told = batch.into_iter().filter_map(|outgoing| Some((outgoing.subject, outgoing.mark?)));
        Delivered::All(told.collect())
    }

    async fn append(&self, batch: &[Outgoing]) -> Result<(), String> {
        let read = |outgoing: &Outgoing| self.ingest.read(EventSource::Celery, outgoing.json.as_bytes()).ok();
        let events: Vec<_> = batch.iter().filter_map(read).collect();
        if events.is_empty() {
            return Ok(());
        }
        self.ingest.append(EventSource::Celery, events).await.map(drop).map_err(|error| error.to_string())
    }

    /// Whether this node holds the lease; `None`: nobody knows.
    async fn is_held(&mut self) -> Option<bool> {
        let Some((member, lease)) = &mut self.lease else { return Some(true) };
        if Instant::now() >= self.lease_due {
            self.lease_due = Instant::now() + LEASE_INTERVAL;
            self.has_answered = lease.hold(&member.servers).await.is_ok();
        }
        // That it is ours is known for a while without an answer.
        (lease.is_held() || self.has_answered).then(|| lease.is_held())
    }
}
