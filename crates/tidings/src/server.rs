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

use axum::{Router, serve::ListenerExt};
use tidings_engine::{Node, NodeOptions, connection::Greeting};
use tidings_protocol::CloseCode;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Access,
    config::Settings,
    ingest::Ingest,
    metrics::Metrics,
    routes::{self, Edge},
    sources::{
        demo,
        redis_channel::{ChannelStatus, RedisChannel},
    },
};

/// For connections to end by themselves once they were told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the service did not start.
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
    /// `TIDINGS_ALLOWED_ORIGINS` is not a list of origins and globs.
    #[error("TIDINGS_ALLOWED_ORIGINS: {0}")]
    Origins(#[from] globset::Error),
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
    public: TcpListener,
    internal: Option<TcpListener>,
    channel: Option<RedisChannel>,
    /// Ends sources and upkeep.
    stop: CancellationToken,
}

impl Server {
    /// Takes the ports and puts the parts together. Nothing is served before [`Server::run`].
    pub async fn bind(settings: Settings) -> Result<Self, StartError> {
        let public = listen(settings.listen, "TIDINGS_LISTEN").await?;
        let internal = match settings.internal_listen {
            Some(address) => Some(listen(address, "TIDINGS_INTERNAL_LISTEN").await?),
            None => None,
        };
        let access = Access::new(&settings)?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let options = NodeOptions {
            greeting: Greeting {
                node: settings.node.clone(),
                heartbeat_interval: settings.heartbeat_interval.as_secs(),
                subscriptions_max: settings.subscriptions_max,
                outbox_bytes_max: settings.outbox_bytes_max,
            },
            history: settings.history.clone(),
        };
        let node = Arc::new(Node::embedded(options, &tasks, stop.clone()));
        let metrics = Arc::new(Metrics::default());
        let settings = Arc::new(settings);
        let ingest = Arc::new(Ingest::new(Arc::clone(&node), Arc::clone(&metrics), Arc::clone(&settings)));
        let channel = settings.redis_url.clone().map(|url| RedisChannel {
            url,
            channel: settings.redis_channel.clone(),
            ingest: Arc::clone(&ingest),
            metrics: Arc::clone(&metrics),
            status: Arc::new(ChannelStatus::default()),
        });
        let edge = Edge {
            port: public.local_addr().map_or(0, |address| address.port()),
            settings,
            access,
            node,
            ingest,
            metrics,
            channel: channel.as_ref().map(|channel| Arc::clone(&channel.status)),
            draining: AtomicBool::new(false),
            tasks,
            kill: CancellationToken::new(),
        };
        Ok(Self { edge: Arc::new(edge), public, internal, channel, stop })
    }

    /// The address that the public listener got.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.public.local_addr()
    }

    /// The address that the internal listener got.
    pub fn internal_address(&self) -> Option<SocketAddr> {
        self.internal.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Publishes the demonstration on project `demo` while the service runs.
    #[must_use]
    pub fn with_demo(self) -> Self {
        self.edge.tasks.spawn(demo::run(Arc::clone(&self.edge.ingest), self.stop.clone()));
        self
    }

    /// Serves until `stop`, then tells every client to come back elsewhere and waits for all that runs to end. Returns
    /// how many connections did not end by themselves.
    pub async fn run(self, stop: CancellationToken) -> usize {
        let Self { edge, public, internal, channel, stop: stop_parts } = self;
        if let Some(channel) = channel {
            edge.tasks.spawn(channel.run(stop_parts.clone()));
        }
        let accepting = CancellationToken::new();
        let routers = [(Some(public), routes::public(&edge)), (internal, routes::internal(&edge))];
        for (listener, router) in routers {
            if let Some(listener) = listener {
                edge.tasks.spawn(serve(listener, router, accepting.clone()));
            }
        }
        stop.cancelled().await;
        tracing::info!(connections = edge.node.counts().connections, "stopping");
        edge.draining.store(true, Ordering::Relaxed);
        stop_parts.cancel();
        accepting.cancel();
        edge.node.close_all(CloseCode::ServiceRestart);
        edge.tasks.close();
        let mut cut_off = 0;
        if tokio::time::timeout(STOP_TIMEOUT, edge.tasks.wait()).await.is_err() {
            cut_off = edge.node.counts().connections;
            tracing::warn!(connections = cut_off, "some clients did not leave and are cut off");
            edge.kill.cancel();
            // What is left are HTTP requests whose clients neither send nor read; the process's end ends them.
            let _ = tokio::time::timeout(STOP_TIMEOUT, edge.tasks.wait()).await;
        }
        tracing::info!("stopped");
        cut_off
    }
}

async fn listen(address: SocketAddr, setting: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, setting, source })
}

async fn serve(listener: TcpListener, router: Router, accepting: CancellationToken) {
    // Messages are small and coalesced by us; waiting for more to send would only delay them.
    let listener = listener.tap_io(|socket| {
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
    });
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, service).with_graceful_shutdown(accepting.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "listening ended");
    }
}
