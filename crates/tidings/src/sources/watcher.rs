//! Files as they change: the folders of `[[watch]]`, each on a thread of its own. What is announced is always the difference
//! between what was announced before and what is there now; the kernel only says where to look.

mod announce;
mod difference;
mod dirty;
mod index;
#[cfg(target_os = "linux")]
mod kernel;
mod ledger;
mod listening;
mod look;
mod looking;
mod path;
mod rules;
mod state;
mod stop;
mod watch;

use std::{
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use tidings_engine::{
    RedisMember,
    engine::{
        EngineError,
        redis::{Lease, Servers},
    },
    vigil::Vigil,
};
use tidings_protocol::{Gap, Source};
use tokio::{runtime::Handle, sync::oneshot, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{WatchProject, WatchSettings},
    ingest::Ingest,
    metrics::{EventSource, Metrics},
};

use announce::{Announcer, Belonging};
use dirty::Timing;
use listening::Polling;
use path::RelPath;
use rules::Rules;
use state::{FileStore, NoStore, Store, redis::RedisStore};
use watch::{Plan, Watch};

pub(crate) use stop::{Stop, Stopper, stop};
pub(crate) use watch::{Outcome, Sink};

/// Files that are watched in one folder: at about 150 bytes each.
const FILES_MAX: usize = 1_000_000;
/// How often the lease is renewed or asked for.
const LEASE_INTERVAL: Duration = Duration::from_millis(700);

/// Checks patterns as they are used.
pub(crate) fn check_patterns(patterns: &[String]) -> Result<(), String> {
    rules::patterns(patterns).map(|_| ()).map_err(|error| error.to_string())
}

/// What the state of a table is called.
pub(crate) fn state_name(table: &WatchSettings) -> String {
    state::name_of(&table.identity())
}

/// Watches one table's folder on this thread until it is asked to stop, and keeps its state in `folder`.
pub(crate) fn watch_until(
    table: &WatchSettings,
    folder: Option<&Path>,
    event_bytes_max: usize,
    sink: impl Sink,
    stop: &Stop,
) {
    let store: Box<dyn Store> = match folder {
        Some(folder) => Box::new(FileStore::new(folder, &table.identity())),
        None => Box::new(NoStore),
    };
    watch_with(table, store, folder, event_bytes_max, sink, stop);
}

/// A folder as the watched one has it, if it is in it.
fn within(root: &Path, folder: &Path) -> Option<RelPath> {
    // It may not be there yet.
    let real = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).ok();
    let below = real(folder)?;
    let below = below.strip_prefix(real(root)?).ok()?;
    Some(below.iter().fold(RelPath::root(), |path, part| path.join(part.as_bytes())))
}

/// `own`: where this process writes whenever something is announced.
fn watch_with(
    table: &WatchSettings,
    store: Box<dyn Store>,
    own: Option<&Path>,
    event_bytes_max: usize,
    sink: impl Sink,
    stop: &Stop,
) {
    let by_folder = matches!(table.project, WatchProject::Folder);
    let rules = Rules::new(by_folder, table.gitignore, table.ignore_temporary, &table.ignore, &table.only);
    let mut rules = rules.expect("the settings have checked the patterns");
    rules.leave_out(own.and_then(|own| within(&table.path, own)));
    let belonging = match &table.project {
        WatchProject::Id(project) => Belonging::Project(project.clone()),
        WatchProject::Folder => Belonging::Folder,
    };
    let plan = Plan {
        root: table.path.clone(),
        announcer: Announcer { belonging, paths_max: table.paths_max, bytes_max: event_bytes_max },
        by_folder,
        timing: Timing { quiet_ms: table.quiet_ms, wait_ms_max: table.wait_ms_max },
        polling: Polling {
            wanted: table.poll,
            interval_ms: table.poll_seconds.map(|seconds| seconds * 1000),
        },
        files_max: FILES_MAX,
    };
    Watch::new(plan, rules, store, sink).run(stop);
}

/// Watches a table for the service.
#[derive(Clone, Debug)]
pub(crate) struct Watcher {
    pub(crate) table: WatchSettings,
    pub(crate) node: String,
    pub(crate) event_bytes_max: usize,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) vigil: Arc<Vigil>,
    /// With it the state is kept where other nodes find it, and one of them watches at a time.
    pub(crate) member: Option<RedisMember>,
    /// Where the state is kept otherwise; `None`: nowhere.
    pub(crate) folder: Option<PathBuf>,
    pub(crate) tasks: TaskTracker,
}

impl Watcher {
    /// What this is to health and to clients.
    pub(crate) fn part(table: &WatchSettings) -> String {
        format!("file watcher at {}", table.path.display())
    }

    /// Watches until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        if let Some(member) = self.member.clone().filter(|_| !self.table.local) {
            return self.run_in_turn(&member, stop).await;
        }
        match self.start() {
            Ok((stopper, ended)) => {
                stop.cancelled().await;
                drop(stopper);
                let _ = ended.await;
            }
            Err(error) => tracing::error!(path = ?self.table.path, %error, "cannot be watched"),
        }
    }

    /// Watches while this node holds the lease.
    async fn run_in_turn(self, member: &RedisMember, stop: CancellationToken) {
        let mut lease = Lease::new(&format!("watch:{}", self.table.identity()), member.incarnation.clone());
        let mut watching: Option<(Stopper, oneshot::Receiver<()>)> = None;
        loop {
            let held = match lease.hold(&member.servers).await {
                Ok(held) => held,
                Err(_) => lease.is_held(),
            };
            match (held, watching.take()) {
                (true, None) => match self.start() {
                    Ok(started) => {
                        tracing::info!(path = ?self.table.path, "this node watches the folder");
                        watching = Some(started);
                    }
                    Err(error) => tracing::error!(path = ?self.table.path, %error, "cannot be watched"),
                },
                (false, Some((stopper, ended))) => {
                    drop(stopper);
                    let _ = ended.await;
                }
                // Another node's part.
                (false, None) => self.vigil.up(Source::Watcher, &Self::part(&self.table), Gap::None),
                (true, running) => watching = running,
            }
            if stop.run_until_cancelled(sleep(LEASE_INTERVAL)).await.is_none() {
                break;
            }
        }
        if let Some((stopper, ended)) = watching {
            drop(stopper);
            let _ = ended.await;
        }
        // Who cannot be told waits until its time is over.
        let _ = lease.give_back(&member.servers).await;
    }

    /// Starts a thread that watches until what is returned is dropped, and tells when it has ended.
    fn start(&self) -> io::Result<(Stopper, oneshot::Receiver<()>)> {
        let (stopper, asked) = stop()?;
        let (ended, end) = oneshot::channel();
        let (watcher, running, runtime) = (self.clone(), self.tasks.token(), Handle::current());
        std::thread::Builder::new().name("watcher".to_owned()).spawn(move || {
            let table = watcher.table.clone();
            let store = watcher.store(runtime.clone());
            let (folder, event_bytes_max) = (watcher.folder.clone(), watcher.event_bytes_max);
            let sink = IntoStreams { part: Self::part(&table), watcher, runtime };
            watch_with(&table, store, folder.as_deref(), event_bytes_max, sink, &asked);
            let _ = ended.send(());
            drop(running);
        })?;
        Ok((stopper, end))
    }

    fn store(&self, runtime: Handle) -> Box<dyn Store> {
        let mut identity = self.table.identity();
        if self.table.local {
            identity = format!("{identity} of {}", self.node);
        }
        match (&self.member, &self.folder) {
            (Some(RedisMember { servers, .. }), _) => {
                let servers: &Arc<Servers> = servers;
                Box::new(RedisStore::new(Arc::clone(servers), runtime, &identity))
            }
            (None, Some(folder)) => Box::new(FileStore::new(&folder.join("watch"), &identity)),
            (None, None) => Box::new(NoStore),
        }
    }
}

/// Through the gate into the streams, from a thread of the watcher's.
struct IntoStreams {
    watcher: Watcher,
    part: String,
    runtime: Handle,
}

impl Sink for IntoStreams {
    fn announce(&mut self, events: &[Value]) -> Outcome {
        let ingest = &self.watcher.ingest;
        let read = |event: &Value| ingest.read(EventSource::Watcher, event.to_string().as_bytes());
        // What the gate refuses it has told of, and would refuse again.
        let events: Vec<_> = events.iter().filter_map(|event| read(event).ok()).collect();
        match self.runtime.block_on(ingest.append(EventSource::Watcher, events)) {
            Ok(_) => Outcome::Taken,
            Err(error @ EngineError::Journal(_)) => Outcome::NotTaken(error.to_string()),
            Err(error @ EngineError::Unavailable(_)) => Outcome::Unknown(error.to_string()),
        }
    }

    fn heard(&mut self, gap: Option<Gap>) {
        self.watcher.metrics.source_up(EventSource::Watcher, gap.is_some());
        match gap {
            Some(gap) => self.watcher.vigil.up(Source::Watcher, &self.part, gap),
            None => self.watcher.vigil.down(Source::Watcher, &self.part),
        }
    }
}
