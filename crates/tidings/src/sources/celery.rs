//! Tasks of Celery whose code knows nothing of us: their states are heard at the result backend, their workers' events at the
//! broker, and what both have missed is asked for. Where several nodes share their streams, all listen and know the same, and the
//! holder of a lease appends; another one that goes on says the last seconds again, under the same ids.
//!
//! What is heard is read in [`listening`], what follows from it is decided in [`tracker`] and [`task`], which do no I/O.

mod asking;
mod backend;
mod control;
mod delivery;
mod events;
mod json;
mod kept;
mod listening;
mod outbox;
mod processes;
mod project;
mod reading;
mod registrations;
mod report;
mod repr;
mod store;
mod task;
mod telling;
mod tracker;

use std::{
    future::pending,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use serde::Serialize;
use tidings_engine::{
    RedisMember,
    engine::redis::{Incarnation, RedisAddress, Servers},
    vigil::Vigil,
};
use tidings_protocol::{Gap, Source};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::CelerySettings,
    ingest::Ingest,
    metrics::{CeleryCounts, EventSource, Metrics},
};

use asking::{Asker, Findings, Questions};
use control::Control;
use delivery::{Delivered, Delivery};
use events::WorkerChange;
use listening::{Heard, Listener, Way, escaped};
use outbox::Outbox;
use project::Finder;
use reading::Reading;
pub(crate) use registrations::{Registrar, Registration};
pub(crate) use report::task_id;
use store::{Log, Store};
use task::Pace;
use tracker::{Counts, Homeless, Options, Tracker};

/// What was heard and not yet taken.
const HEARD_MAX: usize = 10_000;
/// Taken at once.
const BATCH_MAX: usize = 256;
/// Registrations that were not yet taken.
const REGISTRATIONS_MAX: usize = 1000;
/// How often it is looked for what is to be asked.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How often a node that has nothing to append renews its lease, or asks for it.
const LEASE_INTERVAL: Duration = Duration::from_millis(700);
/// What is due so soon is not left to the next start.
const FINISH_MS: u64 = 300;
/// For what is on its way when the service stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);
/// What the result backend calls the results of tasks and of groups.
const TASK_KEY: &str = "celery-task-meta-";
const GROUP_KEY: &str = "celery-taskset-meta-";

/// How the bridge is, for whoever asks.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Status {
    /// Each way, and whether it is heard.
    ways: Vec<(&'static str, bool)>,
    /// Whether this node appends what is heard.
    appends: bool,
    counts: Counts,
    /// Why workers cannot be asked; absent: they can, or must not be.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers_silent: Option<String>,
    /// Tasks that belong to no project, by name.
    without_project: Vec<Homeless>,
}

/// What the bridge needs of the service.
pub(crate) struct Surroundings<'a> {
    pub(crate) settings: &'a CelerySettings,
    /// The nodes that it shares its streams with; `None`: it keeps its own.
    pub(crate) member: Option<RedisMember>,
    /// Where a node of its own keeps things; `None`: nowhere.
    pub(crate) folder: Option<&'a Path>,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) vigil: Arc<Vigil>,
    pub(crate) tasks: TaskTracker,
}

/// The bridge to Celery.
pub(crate) struct Celery {
    listeners: Vec<Listener>,
    heard: mpsc::Receiver<Heard>,
    registered: mpsc::Receiver<Registration>,
    /// Registrations of other nodes are read there.
    shared: Option<(Arc<Servers>, mpsc::Sender<Registration>)>,
    tracker: Tracker,
    outbox: Outbox,
    delivery: Option<Box<Delivery>>,
    asker: Option<Box<Asker>>,
    /// All that is followed is to be read anew, because of these.
    resync: Vec<Way>,
    needs_resync: bool,
    /// It has not been told to send events.
    worker_came: bool,
    /// There was no room for what was heard.
    overflowed: Arc<AtomicBool>,
    ways: Vec<(Way, bool)>,
    appends: bool,
    workers_silent: Option<String>,
    counts: Arc<CeleryCounts>,
    metrics: Arc<Metrics>,
    vigil: Arc<Vigil>,
    tasks: TaskTracker,
    status: Arc<Mutex<Status>>,
    started: Instant,
    registrar: Registrar,
}

impl std::fmt::Debug for Celery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Celery").field("ways", &self.ways).finish_non_exhaustive()
    }
}

impl Celery {
    /// Puts it together. Nothing is listened to before [`Celery::run`].
    pub(crate) fn new(surroundings: Surroundings<'_>) -> std::io::Result<Self> {
        let Surroundings { settings, member, folder, ingest, metrics, vigil, tasks } = surroundings;
        let reading = Arc::new(reading(settings));
        let incarnation =
            member.as_ref().map_or_else(Incarnation::random, |member| member.incarnation.clone());
        let servers = |address: &RedisAddress| Arc::new(Servers::lazy(address.clone()));
        let (backend, broker) =
            (settings.backend.as_ref().map(servers), settings.broker.as_ref().map(servers));
        let (sender, heard) = mpsc::channel(HEARD_MAX);
        let (registrations, registered) = mpsc::channel(REGISTRATIONS_MAX);
        let counts = Arc::clone(metrics.celery());
        let overflowed = Arc::<AtomicBool>::default();
        let (task_prefix, group_prefix) = (
            format!("{}{TASK_KEY}", settings.backend_prefix),
            format!("{}{GROUP_KEY}", settings.backend_prefix),
        );
        let events = format!("{}{}", settings.fanout_prefix, settings.event_exchange);
        let listener = |way: Way, servers: &Arc<Servers>, patterns: Vec<String>| Listener {
            way,
            servers: Arc::clone(servers),
            patterns,
            task_prefix: task_prefix.clone(),
            group_prefix: group_prefix.clone(),
            probe: format!("tidings:probe:{incarnation}:celery-{}", way.as_str()),
            reading: Arc::clone(&reading),
            heard: sender.clone(),
            overflowed: Arc::clone(&overflowed),
            counts: Arc::clone(&counts),
            tasks: tasks.clone(),
        };
        let mut listeners = Vec::new();
        if let Some(backend) = &backend {
            let patterns = [&task_prefix, &group_prefix].map(|prefix| escaped(prefix) + "*");
            listeners.push(listener(Way::Backend, backend, patterns.to_vec()));
        }
        if let Some(broker) = &broker {
            // With `fanout_patterns` off the type is in the message alone.
            let patterns = vec![escaped(&events) + "/*", escaped(&events)];
            listeners.push(listener(Way::Events, broker, patterns));
        }
        for listener in &listeners {
            vigil.expect(Source::Celery, listener.way.part());
        }
        let control =
            broker.filter(|_| settings.asks_workers || settings.enables_events).map(|servers| Control {
                servers,
                key_prefix: settings.broker_prefix.clone(),
                fanout_prefix: settings.fanout_prefix.clone(),
                reading: Arc::clone(&reading),
                connection: None,
            });
        let shared = member.as_ref().map(|member| (Arc::clone(&member.servers), registrations.clone()));
        let store = match (&member, folder) {
            (Some(member), _) => Store::Redis(Arc::clone(&member.servers)),
            (None, Some(folder)) => Store::File(Box::new(Log::open(folder)?)),
            (None, None) => Store::Nothing,
        };
        let registrar = match &member {
            Some(member) => Registrar::Everywhere(Arc::clone(&member.servers)),
            None => Registrar::Here(registrations),
        };
        Ok(Self {
            ways: listeners.iter().map(|listener| (listener.way, false)).collect(),
            asker: Some(Box::new(Asker::new(settings, backend.clone(), control, Arc::clone(&reading)))),
            delivery: Some(Box::new(Delivery::new(member, store, ingest))),
            tracker: Tracker::new(options(settings)),
            outbox: Outbox::default(),
            resync: Vec::new(),
            needs_resync: false,
            worker_came: false,
            overflowed,
            appends: false,
            workers_silent: None,
            status: Arc::default(),
            started: Instant::now(),
            listeners,
            heard,
            registered,
            shared,
            counts,
            metrics,
            vigil,
            tasks,
            registrar,
        })
    }

    /// Takes registrations of tasks.
    pub(crate) fn registrar(&self) -> Registrar {
        self.registrar.clone()
    }

    /// How it is, at any time.
    pub(crate) fn status(&self) -> Arc<Mutex<Status>> {
        Arc::clone(&self.status)
    }

    /// Listens until `stop`, whatever becomes of Redis meanwhile.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        self.metrics.source_up(EventSource::Celery, false);
        for listener in std::mem::take(&mut self.listeners) {
            self.tasks.spawn(listener.run(stop.clone()));
        }
        if let Some((servers, sender)) = self.shared.take() {
            let stop = stop.clone();
            self.tasks.spawn(async move {
                stop.run_until_cancelled(registrations::follow(servers, sender)).await;
            });
        }
        let mut sending: Option<BoxFuture<'static, (Box<Delivery>, Delivered)>> = None;
        let mut asking: Option<BoxFuture<'static, (Box<Asker>, Findings)>> = None;
        let (mut ask_ticks, mut lease_ticks) = (interval(ASK_INTERVAL), interval(LEASE_INTERVAL));
        for ticks in [&mut ask_ticks, &mut lease_ticks] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            let due = self.tracker.due_ms().map(|ms| self.started + Duration::from_millis(ms));
            tokio::select! {
                () = stop.cancelled() => break,
                (delivery, delivered) = or_pending(&mut sending) => {
                    sending = None;
                    self.delivered(delivery, delivered);
                }
                (asker, findings) = or_pending(&mut asking) => {
                    asking = None;
                    self.asker = Some(asker);
                    self.take_findings(findings);
                }
                // Whoever says something ends no sooner than this.
                _ = self.heard.recv_many(&mut batch, BATCH_MAX), if !self.heard.is_closed() => {
                    batch.drain(..).for_each(|heard| self.take(heard));
                }
                Some(registration) = self.registered.recv() => self.register(registration),
                () = until(due) => {}
                _ = ask_ticks.tick() => {
                    asking = asking.or_else(|| self.ask());
                    self.note();
                }
                _ = lease_ticks.tick() => sending = sending.or_else(|| self.deliver(true)),
            }
            let now_ms = self.now_ms();
            self.tracker.wake(self.hears_backend(), now_ms);
            self.collect(now_ms);
            sending = sending.or_else(|| self.deliver(false));
            if self.worker_came || self.tracker.is_curious() {
                asking = asking.or_else(|| self.ask());
            }
        }
        self.finish(sending).await;
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn hears_backend(&self) -> bool {
        self.ways.iter().all(|(way, is_heard)| *way != Way::Backend || *is_heard)
    }

    fn take(&mut self, heard: Heard) {
        let now_ms = self.now_ms();
        match heard {
            Heard::Report(report) => self.tracker.take(*report, now_ms),
            Heard::Worker(event) => {
                self.worker_came |= event.change == WorkerChange::Online;
                self.tracker.take_worker(&event, now_ms);
            }
            Heard::GroupSaved(group, members) => self.tracker.group_saved(&group, &members, now_ms),
            Heard::Connected(way) => {
                self.set_heard(way, true);
                self.resync.retain(|waiting| *waiting != way);
                self.resync.push(way);
                self.needs_resync = true;
            }
            Heard::Silent(way) => {
                self.set_heard(way, false);
                self.vigil.down(Source::Celery, way.part());
            }
            Heard::Again(way) => {
                self.set_heard(way, true);
                if self.resync.contains(&way) {
                    // What was missed before it fell silent was not read yet.
                    self.needs_resync = true;
                } else {
                    self.vigil.up(Source::Celery, way.part(), Gap::None);
                }
            }
        }
    }

    fn set_heard(&mut self, way: Way, is_heard: bool) {
        for known in &mut self.ways {
            if known.0 == way {
                known.1 = is_heard;
            }
        }
        self.metrics.source_up(EventSource::Celery, self.ways.iter().all(|(_, is_heard)| *is_heard));
    }

    fn register(&mut self, registration: Registration) {
        let Registration { task_id, project_id, task_name, everywhere } = registration;
        if !self.tracker.register(&task_id, project_id, task_name, everywhere, self.now_ms()) {
            // Debug formatting escapes what a publisher could use to forge lines of the log.
            tracing::warn!(
                ?task_id,
                "a task was registered by a key that may not publish to the project that it says itself"
            );
        }
    }

    fn collect(&mut self, now_ms: u64) {
        for outgoing in self.tracker.out.drain(..) {
            self.outbox.push(outgoing, now_ms);
        }
        let lost = std::mem::take(&mut self.outbox.lost);
        if lost > 0 {
            self.counts.lost(lost);
            tracing::error!(lost, "events of Celery tasks are lost, because nothing can be appended");
        }
    }

    /// Sends what is waiting, or at least renews the lease.
    fn deliver(&mut self, renews: bool) -> Option<BoxFuture<'static, (Box<Delivery>, Delivered)>> {
        let delivery = self.delivery.take_if(|delivery| renews || (self.appends && delivery.is_ready()))?;
        if !self.appends {
            return Some(Box::pin(delivery.hold()));
        }
        let batch = self.outbox.next_batch();
        let (kept, gone) = self.tracker.take_changes();
        if batch.is_empty() && kept.is_empty() && gone.is_empty() && !renews {
            self.delivery = Some(delivery);
            return None;
        }
        Some(Box::pin(delivery.deliver(batch, kept, gone)))
    }

    fn delivered(&mut self, delivery: Box<Delivery>, delivered: Delivered) {
        self.delivery = Some(delivery);
        let now_ms = self.now_ms();
        match delivered {
            Delivered::All(told) => {
                self.outbox.appended();
                self.tracker.confirm(&told);
            }
            Delivered::Failed { kept, gone } => {
                self.outbox.failed();
                self.tracker.keep_again(kept, gone);
            }
            Delivered::TookOver(kept) => {
                tracing::info!(tasks = kept.len(), "this node appends what Celery's tasks do");
                self.appends = true;
                self.outbox.take_over();
                self.tracker.restore(kept, now_ms);
                self.needs_resync = true;
            }
            Delivered::NoAnswer { kept, gone } => {
                // Nothing is let go of: there may be nobody who appends.
                self.appends = false;
                self.outbox.failed();
                self.tracker.keep_again(kept, gone);
            }
            Delivered::Elsewhere => {
                self.appends = false;
                self.outbox.spare(now_ms);
                // Whoever appends keeps them.
                let _ = self.tracker.take_changes();
            }
        }
    }

    /// Asks what is to be asked, if there is anything.
    fn ask(&mut self) -> Option<BoxFuture<'static, (Box<Asker>, Findings)>> {
        // Whoever asks is not here meanwhile, and then nothing is taken off the list.
        self.asker.as_ref()?;
        let questions = self.questions()?;
        Some(Box::pin(self.asker.take()?.ask(questions)))
    }

    /// What is to be asked now.
    fn questions(&mut self) -> Option<Questions> {
        let now_ms = self.now_ms();
        let is_whole = std::mem::take(&mut self.needs_resync);
        let resynced = self.resync.clone();
        let mut ids = self.tracker.take_questions(now_ms);
        let mut groups = self.tracker.take_unsized_groups();
        if is_whole {
            ids = self.tracker.open_tasks();
            groups = self.tracker.open_groups();
        }
        if let Some(asker) = &mut self.asker
            && std::mem::take(&mut self.worker_came)
        {
            asker.worker_came();
        }
        let workers_are_heard = self.tracker.counts().workers > 0;
        let questions = Questions {
            workers_are_heard,
            ids,
            groups,
            is_whole,
            resynced,
            asks_workers: self.appends,
            asked_ms: now_ms,
        };
        (is_whole || questions.has_any() || self.asker.as_ref().is_some_and(|asker| asker.is_due()))
            .then_some(questions)
    }

    fn take_findings(&mut self, findings: Findings) {
        let now_ms = self.now_ms();
        let asked_ms = findings.questions.asked_ms;
        if let Some(error) = &findings.backend_error {
            tracing::debug!(error, "results cannot be read");
            // Whatever was to be read is to be read.
            self.needs_resync |= findings.questions.is_whole;
        }
        self.workers_silent = findings.workers_error;
        for report in findings.read {
            self.tracker.take_read(report, asked_ms, now_ms);
        }
        for report in findings.active {
            self.tracker.take_if_unread(report, now_ms);
        }
        for report in findings.known {
            self.tracker.take(report, now_ms);
        }
        self.tracker.miss(&findings.missing, now_ms);
        for (group, size) in findings.group_sizes {
            self.tracker.group_sized(&group, size, now_ms);
        }
        if self.needs_resync {
            return;
        }
        for way in findings.questions.resynced {
            if self.ways.contains(&(way, true)) {
                // What began and ended while nobody listened is not in it.
                self.vigil.up(Source::Celery, way.part(), Gap::Lost);
                self.resync.retain(|waiting| *waiting != way);
            }
        }
    }

    fn note(&mut self) {
        if self.overflowed.swap(false, Ordering::Relaxed) {
            for (way, _) in self.ways.clone() {
                // What there was no room for is read anew, as after an outage.
                self.vigil.down(Source::Celery, way.part());
                self.resync.retain(|waiting| *waiting != way);
                self.resync.push(way);
            }
            self.needs_resync = true;
        }
        let counts = self.tracker.counts();
        self.counts.tasks(counts.tasks, counts.running, counts.without_project);
        *self.status.lock() = Status {
            ways: self.ways.iter().map(|(way, is_heard)| (way.as_str(), *is_heard)).collect(),
            appends: self.appends,
            counts,
            workers_silent: self.workers_silent.clone(),
            without_project: self.tracker.homeless(),
        };
    }

    /// Lets what is on its way arrive, and another node go on at once.
    async fn finish(mut self, sending: Option<BoxFuture<'static, (Box<Delivery>, Delivered)>>) {
        let finish = async {
            if let Some(sending) = sending {
                let (delivery, delivered) = sending.await;
                self.delivered(delivery, delivered);
            }
            let now_ms = self.now_ms();
            // Ends that wait for the result backend wait no longer.
            self.tracker.wake(true, now_ms + FINISH_MS);
            self.collect(now_ms);
            while self.appends && !self.outbox.is_empty() {
                let Some(sending) = self.deliver(true) else { break };
                let (delivery, delivered) = sending.await;
                let is_over = !matches!(delivered, Delivered::All(_));
                self.delivered(delivery, delivered);
                if is_over {
                    break;
                }
            }
            // How far it came.
            if self.appends
                && let Some(sending) = self.deliver(true)
            {
                let (delivery, delivered) = sending.await;
                self.delivered(delivery, delivered);
            }
            if let Some(delivery) = &mut self.delivery {
                delivery.give_back().await;
            }
        };
        // What does not arrive in time is found out by whoever goes on.
        let _ = tokio::time::timeout(STOP_TIMEOUT, finish).await;
    }
}

/// The future's output, if there is a future.
async fn or_pending<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

fn reading(settings: &CelerySettings) -> Reading {
    Reading {
        projects: Finder {
            argument: settings.project_argument.clone(),
            rules: settings.rules.clone(),
            takes_hints: settings.takes_hints,
        },
        tells_results: settings.tells_results,
        tells_arguments: settings.tells_arguments,
        tells_tracebacks: settings.tells_tracebacks,
        value_bytes_max: settings.value_bytes_max,
    }
}

fn options(settings: &CelerySettings) -> Options {
    let update_ms = 1000 / u64::from(settings.update_rate_max.max(1));
    Options {
        pace: Pace { update_ms, has_backend: settings.backend.is_some() },
        lost_after_ms: u64::try_from(settings.lost_after.as_millis()).unwrap_or(u64::MAX),
        shows_processes: settings.shows_processes,
    }
}

#[cfg(test)]
mod tests;
