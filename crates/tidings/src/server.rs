//! The composition root: settings in, a running service out.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Extension, Router};
use tidings_engine::{
    EngineOptions, Node, NodeError, NodeOptions, RedisStore,
    driver::Driver,
    engine::{
        EngineError,
        embedded::EmbeddedOptions,
        journal::JournalError,
        redis::{Distrust, Fault, Incarnation, RedisAddress, RedisTls, Servers},
    },
    shard::ShardOptions,
};
use tidings_protocol::{CloseCode, Source};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use crate::{
    accept::{self, Incomings, Limits, Places, Sharing},
    access::Access,
    admission::Admission,
    auth::{Auth, Shared},
    burst::Bursts,
    config::{EngineKind, Environment, Settings, WatchSettings},
    ingest::Ingest,
    metrics::Metrics,
    routes::{self, Edge},
    sources::{
        celery::{Celery, Surroundings},
        demo,
        ingest_stream::{self, IngestStream},
        redis_channel::{self, RedisChannel},
        watcher::Watcher,
    },
    tls::{self, CertificateError, Tls},
};

/// For connections to end by themselves once they were closed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// WebSockets that are let in at the same time to be told that there is no room; the reserve of descriptors covers them.
const TURNED_AWAY_AT_ONCE_MAX: usize = 32;

/// Why the service did not start, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address} ({setting}): {source}{}", hint_for(source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting that named it.
        setting: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A certificate, its key or authorities cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The journal cannot be used.
    #[error("TIDINGS_DATA_DIR: {source}{}", journal_hint(source))]
    Journal {
        /// Why.
        source: JournalError,
    },
    /// Redis does not answer, or refuses.
    #[error("REDIS_URL: Redis at {address}: {}. {}", fault.to_string().trim_end_matches('.'), redis_hint(fault, *tls))]
    Redis {
        /// Where, without user and password.
        address: String,
        /// Whether it was to speak TLS.
        tls: bool,
        /// Why.
        fault: Fault,
    },
    /// The engine does not answer.
    #[error(transparent)]
    Engine(EngineError),
    /// What was revoked cannot be read or kept.
    #[error("TIDINGS_DATA_DIR: what was revoked cannot be kept there: {0}")]
    Revocations(io::Error),
    /// What is known of Celery's tasks cannot be read or kept.
    #[error("TIDINGS_DATA_DIR: what Celery's tasks do cannot be kept there: {0}")]
    Celery(io::Error),
    /// A shard has ended while the service ran, and its connections with it. What it was is in the log.
    #[error("a shard has failed; the service stops, so that it is started anew")]
    Shard,
    /// A shard's thread cannot be started.
    #[error("a thread cannot be started: {0}")]
    Thread(io::Error),
    /// `TIDINGS_ALLOWED_ORIGINS` is not a list of origins and globs.
    #[error("TIDINGS_ALLOWED_ORIGINS: {0}")]
    Origins(#[from] globset::Error),
}

impl From<NodeError> for StartError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Journal(source) => Self::Journal { source },
            NodeError::Redis { address, tls, fault } => Self::Redis { address, tls, fault },
            NodeError::Engine(error) => Self::Engine(error),
        }
    }
}

fn journal_hint(error: &JournalError) -> &'static str {
    match error {
        JournalError::File { .. } => {
            "; name a folder that the service may write, or set TIDINGS_PERSIST=false to keep nothing"
        }
        _ => "",
    }
}

fn redis_hint(fault: &Fault, tls: bool) -> &'static str {
    match fault {
        Fault::Distrusted(Distrust::UnknownAuthority) => {
            "Name a file with the certificate of its authority in TIDINGS_REDIS_CA"
        }
        Fault::Distrusted(Distrust::OtherName) => {
            "Name it in REDIS_URL as its certificate does, or let its certificate name it so"
        }
        Fault::Distrusted(Distrust::Expired) => "Give Redis a certificate that is valid now",
        Fault::Distrusted(Distrust::NoTls) => {
            "Name its TLS port in REDIS_URL, or write `redis` in place of `rediss` there"
        }
        Fault::Distrusted(Distrust::Refuses(_)) => {
            "If it asks for a client certificate, name one that it accepts in TIDINGS_REDIS_CERT and TIDINGS_REDIS_KEY"
        }
        Fault::Distrusted(Distrust::Other(_)) => "Look at its certificate, REDIS_URL and TIDINGS_REDIS_CA",
        // A Redis that is spoken to in TLS and does not speak it waits for more.
        _ if tls => {
            "Start it, or correct the URL, which has to name the port on which it speaks TLS; \
             TIDINGS_ENGINE=embedded keeps streams here"
        }
        _ => {
            "Start it, or correct the URL (`rediss` if it speaks TLS); TIDINGS_ENGINE=embedded keeps streams here"
        }
    }
}

fn hint_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another process has this port: stop it, or choose another with BACKEND_PORT"
        }
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need a privilege: choose another with BACKEND_PORT"
        }
        _ => "",
    }
}

/// A service that listens already, but does not serve yet.
#[derive(Debug)]
pub struct Server {
    edge: Arc<Edge>,
    public: SocketAddr,
    internal: Option<(SocketAddr, Incomings)>,
    /// Each with where its connections come from.
    shards: Vec<(Driver, Incomings)>,
    /// On the public listener.
    tls: Option<Tls>,
    listeners: Option<(RedisChannel, IngestStream)>,
    celery: Option<Celery>,
    watchers: Vec<Watcher>,
    /// Ends sources, whose events another node takes over.
    sources: CancellationToken,
    /// Ends upkeep.
    stop: CancellationToken,
}

impl Server {
    /// Takes the ports and puts the parts together. Nothing is served before [`Server::run`].
    pub async fn bind(mut settings: Settings) -> Result<Self, StartError> {
        let tls = settings.tls.clone().map(Tls::load).transpose()?;
        settings.redis = over_tls(&settings, settings.redis.clone())?;
        settings.auth.session.redis = over_tls(&settings, settings.auth.session.redis.clone())?;
        settings.celery.backend = over_tls(&settings, settings.celery.backend.clone())?;
        settings.celery.broker = over_tls(&settings, settings.celery.broker.clone())?;
        let shards = u16::try_from(settings.shards).unwrap_or(1);
        let (public, incomings) = listen(settings.listen, shards, "TIDINGS_LISTEN")?;
        let internal = match settings.internal_listen {
            Some(address) => {
                let (address, mut incomings) = listen(address, 1, "TIDINGS_INTERNAL_LISTEN")?;
                incomings.pop().map(|incomings| (address, incomings))
            }
            None => None,
        };
        let (access, admission) = (Access::new(&settings)?, Admission::new(&settings));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (node, drivers) = Node::start(node_options(&settings), &tasks, stop.clone()).await?;
        if let Some(tls) = &tls {
            tasks.spawn(tls.clone().watch(stop.clone()));
        }
        let node = Arc::new(node);
        let metrics = Arc::new(Metrics::new(Arc::clone(&node)));
        let settings = Arc::new(settings);
        let ingest = Arc::new(Ingest::new(Arc::clone(&node), Arc::clone(&metrics), Arc::clone(&settings)));
        let listeners = settings
            .redis
            .clone()
            .map(|address| listeners(address, &settings, &node, &ingest, &metrics, &tasks));
        let auth = auth(&settings, &node)?;
        let celery = celery(&settings, &node, &ingest, &metrics, &tasks)?;
        let watchers = watchers(&settings, &node, &ingest, &metrics, &tasks);
        let edge = Edge {
            port: public.port(),
            settings,
            access,
            auth: Arc::new(auth),
            admission,
            refusals: Bursts::default(),
            denials: Bursts::default(),
            turning_away: Arc::new(Semaphore::new(TURNED_AWAY_AT_ONCE_MAX)),
            node,
            ingest,
            metrics,
            registrar: celery.as_ref().map(Celery::registrar),
            celery: celery.as_ref().map(Celery::status),
            draining: AtomicBool::new(false),
            tasks,
        };
        let shards = drivers.into_iter().zip(incomings).collect();
        let sources = stop.child_token();
        Ok(Self {
            edge: Arc::new(edge),
            public,
            internal,
            shards,
            tls,
            listeners,
            celery,
            watchers,
            sources,
            stop,
        })
    }

    /// The address that the public listener got.
    pub fn address(&self) -> SocketAddr {
        self.public
    }

    /// The address that the internal listener got.
    pub fn internal_address(&self) -> Option<SocketAddr> {
        self.internal.as_ref().map(|(address, _)| *address)
    }

    /// Whether the public listener speaks TLS.
    pub fn speaks_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Publishes the demonstration on project `demo` while the service runs.
    #[must_use]
    pub fn with_demo(self) -> Self {
        self.edge.tasks.spawn(demo::run(Arc::clone(&self.edge.ingest), self.sources.clone()));
        self
    }

    /// Serves until `stop`, then sends every client away at its appointment and waits for all that runs to end. Returns
    /// how many connections did not end by themselves.
    pub async fn run(self, stop: CancellationToken) -> Result<usize, StartError> {
        let Self {
            edge,
            public: _,
            internal,
            shards,
            tls,
            listeners,
            celery,
            watchers,
            sources,
            stop: stop_upkeep,
        } = self;
        let (accepting, failed) = (CancellationToken::new(), CancellationToken::new());
        let limits = public_limits(&edge);
        for (number, (driver, incomings)) in (0..).zip(shards) {
            let router = routes::public(&edge).layer(Extension(edge.node.shard(number)));
            // However a shard ends, by a panic, too: a service without it would look well and be deaf.
            let alive = failed.clone().drop_guard();
            let (tls, limits, accepting) = (tls.clone(), limits.clone(), accepting.clone());
            let shard = ServedShard { driver, incomings, router, tls, limits, accepting, _alive: alive };
            // The first shares its thread with the sources, so that on one core nothing goes from thread to thread.
            if number == 0 {
                edge.tasks.spawn(shard.run());
            } else {
                shard.run_on_thread(number, edge.tasks.token()).map_err(StartError::Thread)?;
            }
        }
        if let Some((_, incomings)) = internal {
            let router = routes::internal(&edge);
            let (limits, tasks) = (internal_limits(&edge), edge.tasks.clone());
            edge.tasks.spawn(accept::serve(incomings, router, None, limits, tasks, accepting.clone()));
        }
        edge.tasks.spawn(Arc::clone(&edge.auth).run(stop_upkeep.child_token()));
        if let Some((channel, stream)) = listeners {
            edge.tasks.spawn(channel.run(sources.clone()));
            edge.tasks.spawn(stream.run(sources.clone()));
        }
        if let Some(celery) = celery {
            edge.tasks.spawn(celery.run(sources.clone()));
        }
        for watcher in watchers {
            edge.tasks.spawn(watcher.run(sources.clone()));
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = failed.cancelled() => tracing::error!("a shard has ended; stopping"),
        }
        edge.draining.store(true, Ordering::Relaxed);
        if edge.node.redis().is_some() {
            // Another node goes on with what all share. A node of its own listens to the end.
            sources.cancel();
        }
        drain(&edge, &failed).await;
        let has_failed = failed.is_cancelled();
        stop_upkeep.cancel();
        accepting.cancel();
        edge.node.close_all(CloseCode::ServiceRestart);
        edge.tasks.close();
        let mut cut_off = 0;
        if timeout(STOP_TIMEOUT, edge.tasks.wait()).await.is_err() {
            cut_off = edge.node.counts().connections;
            tracing::warn!(connections = cut_off, "some clients did not leave and are cut off");
            edge.node.drop_all();
            // What is left are HTTP requests whose clients neither send nor read; the process's end ends them.
            let _ = timeout(STOP_TIMEOUT, edge.tasks.wait()).await;
        }
        edge.node.close().await;
        tracing::info!("stopped");
        if has_failed { Err(StartError::Shard) } else { Ok(cut_off) }
    }
}

/// Lets every client leave at its appointment, and serves until then: only new connections are refused. Ends early when all
/// have left, or when there is a reason not to wait.
async fn drain(edge: &Edge, failed: &CancellationToken) {
    let over = edge.settings.drain;
    let connections = edge.node.counts().connections;
    tracing::info!(connections, seconds = over.as_secs(), "stopping");
    if !over.is_zero() {
        let _ = failed.run_until_cancelled(timeout(over, edge.node.drain(over))).await;
    }
}

/// What is left beside WebSockets and event streams.
fn public_limits(edge: &Arc<Edge>) -> Limits {
    let settings = &edge.settings;
    let admitted = Arc::clone(edge);
    let others = move || admitted.admission.admitted();
    let places = Places::new(settings.http_connections_max, settings.sockets_max, others);
    Limits { head: settings.handshake, places, refused: refused(edge) }
}

/// Its own, so that publishers and operators get through whatever happens on the public address.
fn internal_limits(edge: &Arc<Edge>) -> Limits {
    let max = edge.settings.internal_connections_max;
    Limits { head: edge.settings.handshake, places: Places::new(max, max, || 0), refused: refused(edge) }
}

/// Counts who is refused before there is a request, and says it once per burst.
fn refused(edge: &Arc<Edge>) -> Arc<dyn Fn(accept::Refused) + Send + Sync> {
    let edge = Arc::clone(edge);
    Arc::new(move |refused| edge.connection_refused(refused))
}

/// The sources that Redis carries. A node that keeps its own streams reaches it by connections of its own.
fn listeners(
    address: RedisAddress,
    settings: &Settings,
    node: &Arc<Node>,
    ingest: &Arc<Ingest>,
    metrics: &Arc<Metrics>,
    tasks: &TaskTracker,
) -> (RedisChannel, IngestStream) {
    let member = node.redis().cloned();
    let servers = member
        .as_ref()
        .map_or_else(|| Arc::new(Servers::lazy(address)), |member| Arc::clone(&member.servers));
    let incarnation = member.as_ref().map_or_else(Incarnation::random, |member| member.incarnation.clone());
    for part in [redis_channel::PART, ingest_stream::PART] {
        node.vigil().expect(Source::Redis, part);
    }
    let channel = RedisChannel {
        channel: settings.redis_channel.clone(),
        ingest: Arc::clone(ingest),
        metrics: Arc::clone(metrics),
        vigil: Arc::clone(node.vigil()),
        member,
        servers: Arc::clone(&servers),
        probe: format!("tidings:probe:{incarnation}:channel"),
        tasks: tasks.clone(),
    };
    let stream = IngestStream {
        servers,
        incarnation,
        ingest: Arc::clone(ingest),
        metrics: Arc::clone(metrics),
        vigil: Arc::clone(node.vigil()),
    };
    (channel, stream)
}

/// The bridge to Celery, if there is one.
fn celery(
    settings: &Settings,
    node: &Arc<Node>,
    ingest: &Arc<Ingest>,
    metrics: &Arc<Metrics>,
    tasks: &TaskTracker,
) -> Result<Option<Celery>, StartError> {
    if !settings.celery.is_on() {
        return Ok(None);
    }
    let surroundings = Surroundings {
        settings: &settings.celery,
        member: node.redis().cloned(),
        folder: settings.journal.as_ref().map(|journal| journal.folder.as_path()),
        ingest: Arc::clone(ingest),
        metrics: Arc::clone(metrics),
        vigil: Arc::clone(node.vigil()),
        tasks: tasks.clone(),
    };
    Celery::new(surroundings).map(Some).map_err(StartError::Celery)
}

/// Each folder that is watched. Nodes that share their streams share the folders, too, but for their own.
fn watchers(
    settings: &Settings,
    node: &Arc<Node>,
    ingest: &Arc<Ingest>,
    metrics: &Arc<Metrics>,
    tasks: &TaskTracker,
) -> Vec<Watcher> {
    let watcher = |table: &WatchSettings| {
        node.vigil().expect(Source::Watcher, &Watcher::part(table));
        Watcher {
            table: table.clone(),
            node: settings.node.clone(),
            event_bytes_max: settings.event_bytes_max,
            ingest: Arc::clone(ingest),
            metrics: Arc::clone(metrics),
            vigil: Arc::clone(node.vigil()),
            member: node.redis().cloned(),
            folder: settings.journal.as_ref().map(|journal| journal.folder.clone()),
            tasks: tasks.clone(),
        }
    };
    settings.watch.iter().map(watcher).collect()
}

/// What decides about sessions. A node that keeps its own streams keeps what it has revoked with them.
fn auth(settings: &Settings, node: &Arc<Node>) -> Result<Auth, StartError> {
    let of_streams = node.redis().map(|member| Arc::clone(&member.servers));
    let elsewhere = settings.auth.session.redis.clone().map(|address| Arc::new(Servers::lazy(address)));
    let beside = || settings.redis.clone().map(|address| Arc::new(Servers::lazy(address)));
    let sessions_at = elsewhere.or_else(|| of_streams.clone()).or_else(beside);
    let shared = match (of_streams, &settings.journal) {
        (Some(servers), _) => Shared::Redis(servers),
        (None, Some(journal)) => Shared::Folder(&journal.folder),
        (None, None) => Shared::Nothing,
    };
    let shards = (0..node.shards()).map(|number| node.shard(number)).collect();
    Auth::new(settings, sessions_at, shared, shards, Arc::clone(node.vigil()))
        .map_err(StartError::Revocations)
}

/// A Redis, with what connections to it trust and show.
pub(crate) fn over_tls(
    settings: &Settings,
    address: Option<RedisAddress>,
) -> Result<Option<RedisAddress>, StartError> {
    let Some(address) = address else { return Ok(None) };
    if !address.is_tls() {
        return Ok(Some(address));
    }
    let files = &settings.redis_tls;
    let authorities = files.authorities.as_deref();
    let authorities = authorities.map(|path| tls::certificates_in("TIDINGS_REDIS_CA", path)).transpose()?;
    let client = files.client.as_ref().map(tls::pair_in).transpose()?;
    if authorities.is_none() && client.is_none() {
        return Ok(Some(address));
    }
    let over_tls = address.over_tls(RedisTls { authorities, client });
    over_tls.map(Some).map_err(|reason| CertificateError::Redis(reason).into())
}

fn node_options(settings: &Settings) -> NodeOptions {
    let history = settings.history.clone();
    let connection_timeout = settings.connection_timeout;
    let engine = match (settings.engine, &settings.redis) {
        (EngineKind::Redis, Some(address)) => {
            EngineOptions::Redis(RedisStore { address: address.clone(), history, connection_timeout })
        }
        _ => EngineOptions::Embedded(EmbeddedOptions {
            history,
            connection_timeout,
            journal: settings.journal.clone(),
        }),
    };
    NodeOptions {
        shards: settings.shards,
        shard: ShardOptions {
            node: settings.node.as_str().into(),
            restarted: settings.restarted,
            heartbeat_interval_s: settings.heartbeat_interval.as_secs(),
            subscriptions_max: settings.subscriptions_max,
            behind_age_ms: settings.behind_age_ms,
            behind_bytes: settings.behind_bytes,
            slow_bytes_max: settings.slow_bytes_max,
            retained_bytes_max: settings.retained_bytes_max,
            explains_rights: settings.environment == Environment::Development,
            message_rate_max: settings.message_rate_max,
        },
        engine,
    }
}

fn listen(
    address: SocketAddr,
    shards: u16,
    setting: &'static str,
) -> Result<(SocketAddr, Vec<Incomings>), StartError> {
    accept::listen(address, shards, Sharing::best()).map_err(|source| StartError::Listen {
        address,
        setting,
        source,
    })
}

/// A shard with the HTTP in front of it.
struct ServedShard {
    driver: Driver,
    incomings: Incomings,
    router: Router,
    tls: Option<Tls>,
    limits: Limits,
    accepting: CancellationToken,
    /// Dropped with it, which stops the service.
    _alive: DropGuard,
}

impl ServedShard {
    /// Runs until the hub closes everything and the last connection has left.
    async fn run(self) {
        // Its own, because a runtime must not end before the tasks that were spawned on it.
        let requests = TaskTracker::new();
        let accepting = requests.clone();
        let Self { incomings, router, tls, limits, driver, accepting: stop, _alive } = self;
        requests.spawn(accept::serve(incomings, router, tls, limits, accepting, stop));
        if let Err(error) = driver.run().await {
            tracing::error!(%error, "a shard has ended; its connections are gone");
        }
        requests.close();
        requests.wait().await;
    }

    fn run_on_thread(self, number: u16, running: TaskTrackerToken) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || {
            runtime.block_on(self.run());
            drop(running);
        };
        std::thread::Builder::new().name(format!("shard-{number}")).spawn(run).map(|_| ())
    }
}
