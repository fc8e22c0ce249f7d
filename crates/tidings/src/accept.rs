//! Listening: sockets for the shards, and HTTP on what they accept.

mod limits;

use std::{
    io,
    net::{SocketAddr, TcpStream},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo, http::Request};
use futures_util::FutureExt as _;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::mpsc,
    task::{unconstrained, yield_now},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::tls::Tls;

pub(crate) use limits::Held;
pub use limits::{Limits, Places, Refused};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 4096;
/// Connections that are accepted at once: what a rush brings is taken off the kernel before it is served, because what does
/// not fit there comes again only after seconds.
const ACCEPTED_AT_ONCE_MAX: usize = 8192;
/// The head of a request: its line and its headers, of which there may be 100, which is what the library reads. A larger one
/// is answered 431. Cookies take the most of it, and browsers and proxies send no more either.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// What is read of one connection in one go, and written, before others have their turn.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// What waits in the kernel for one client, at about; the rest waits with us, where everybody shares it.
const KERNEL_WAITING_BYTES: u32 = 128 * 1024;
/// Before another attempt when the process has no descriptor left: every connection that ends gives one back.
const NO_DESCRIPTOR_PAUSE: Duration = Duration::from_millis(50);
/// A peer that acknowledges nothing, or has no room, for this long is gone. Shards look after their own sockets; this is for
/// responses that somebody asked for and does not read.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(40);
/// For a request that is being answered when the service stops.
const LAST_REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Accepted sockets on their way to another shard.
const HANDED_OVER_MAX: usize = 1024;

/// Where one shard's connections come from.
#[derive(Debug)]
pub enum Incomings {
    /// It accepts by itself; the kernel shares connections out.
    Listener(TcpListener),
    /// Another shard accepts for it, in turn.
    HandedOver(mpsc::Receiver<(TcpStream, SocketAddr)>),
    /// It accepts for all.
    Acceptor(TcpListener, Vec<mpsc::Sender<(TcpStream, SocketAddr)>>),
}

/// How several shards share one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// A socket each on the same port: the kernel shares connections out evenly.
    ReusePort,
    /// One accepts and deals: where the kernel does not share evenly.
    RoundRobin,
}

impl Sharing {
    /// What serves best here.
    pub const fn best() -> Self {
        if cfg!(target_os = "linux") { Self::ReusePort } else { Self::RoundRobin }
    }
}

/// Takes the address for `shards` shards. Returns it with the port that was picked, and each shard's part.
pub fn listen(
    address: SocketAddr,
    shards: u16,
    sharing: Sharing,
) -> io::Result<(SocketAddr, Vec<Incomings>)> {
    // Alone first, so that a port that another process has is an error, even if that one would share it.
    let alone = bind(address, false)?;
    let address = alone.local_addr()?;
    if shards == 1 {
        return Ok((address, vec![Incomings::Listener(alone)]));
    }
    if sharing == Sharing::ReusePort {
        drop(alone);
        let each = (0..shards).map(|_| bind(address, true).map(Incomings::Listener));
        return Ok((address, each.collect::<io::Result<_>>()?));
    }
    let (senders, receivers): (Vec<_>, Vec<_>) = (1..shards).map(|_| mpsc::channel(HANDED_OVER_MAX)).unzip();
    let others = receivers.into_iter().map(Incomings::HandedOver);
    Ok((address, std::iter::once(Incomings::Acceptor(alone, senders)).chain(others).collect()))
}

fn bind(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    // Messages are coalesced by us; waiting for more to send would only delay them. Linux hands these options on to what is
    // accepted.
    socket.set_tcp_nodelay(true)?;
    limit_kernel_waiting(&socket);
    #[cfg(target_os = "linux")]
    if let Err(error) = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT)) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT");
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Where there is such an option; elsewhere more waits in the kernel, and a client falls behind a little later.
fn limit_kernel_waiting(socket: &Socket) {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    if let Err(error) = socket.set_tcp_notsent_lowat(KERNEL_WAITING_BYTES) {
        tracing::debug!(%error, "TCP_NOTSENT_LOWAT");
    }
    #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
    let _ = (socket, KERNEL_WAITING_BYTES);
}

/// Serves HTTP, over TLS if there is `tls`, on what comes in until `stop`. Connections run on `tasks`; each lets the request that
/// it is in end.
pub async fn serve(
    incomings: Incomings,
    router: Router,
    tls: Option<Tls>,
    limits: Limits,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let served = Served { router, tls, limits, tasks, stop: stop.clone() };
    let accepting = async {
        match incomings {
            Incomings::Listener(listener) => loop {
                // The runtime would let others have their turn after a hundred.
                unconstrained(async {
                    let (socket, peer) = accept(&listener).await;
                    served.take(socket, peer);
                    for _ in 1..ACCEPTED_AT_ONCE_MAX {
                        let Some(Ok((socket, peer))) = listener.accept().now_or_never() else { break };
                        served.take(socket, peer);
                    }
                })
                .await;
                yield_now().await;
            },
            Incomings::HandedOver(mut sockets) => {
                while let Some((socket, peer)) = sockets.recv().await {
                    match tokio::net::TcpStream::from_std(socket) {
                        Ok(socket) => served.take(socket, peer),
                        Err(error) => tracing::warn!(%error, "a connection that was handed over is lost"),
                    }
                }
            }
            Incomings::Acceptor(listener, others) => deal(&listener, &others, &served).await,
        }
    };
    stop.run_until_cancelled(accepting).await;
}

/// Accepts for all shards, and gives to each in turn.
async fn deal(listener: &TcpListener, others: &[mpsc::Sender<(TcpStream, SocketAddr)>], served: &Served) {
    for turn in (0..=others.len()).cycle() {
        let (socket, peer) = accept(listener).await;
        match turn.checked_sub(1).and_then(|other| others.get(other)) {
            None => served.take(socket, peer),
            Some(other) => match socket.into_std() {
                // Full or gone: this shard takes it.
                Ok(socket) => {
                    if let Err(back) = other.try_send((socket, peer))
                        && let Ok(socket) = tokio::net::TcpStream::from_std(back.into_inner().0)
                    {
                        served.take(socket, peer);
                    }
                }
                Err(error) => tracing::warn!(%error, "a connection that was to be handed over is lost"),
            },
        }
    }
}

async fn accept(listener: &TcpListener) -> (tokio::net::TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                // A peer that has gone already costs nothing; a process without descriptors waits for some.
                if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
                {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    sleep(NO_DESCRIPTOR_PAUSE).await;
                }
            }
        }
    }
}

#[derive(Clone)]
struct Served {
    router: Router,
    tls: Option<Tls>,
    limits: Limits,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Served {
    fn take(&self, socket: tokio::net::TcpStream, peer: SocketAddr) {
        // The newest goes: whoever is there already may be in the middle of something.
        let Some(place) = self.limits.places.take() else { return (self.limits.refused)(Refused::NoPlace) };
        let held = Held::new(place);
        if !cfg!(target_os = "linux")
            && let Err(error) = SockRef::from(&socket).set_tcp_nodelay(true)
        {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        // Two tasks of different size: who speaks plainly pays nothing for TLS.
        match self.tls.clone() {
            None => self.spawn(self.clone().serve_http(socket, peer, held, self.limits.head)),
            Some(tls) => self.spawn(self.clone().serve_https(tls, socket, peer, held)),
        }
    }

    /// A panic over one connection ends that connection: whatever it held is dropped with it.
    fn spawn(&self, serving: impl Future<Output = ()> + Send + 'static) {
        let refused = Arc::clone(&self.limits.refused);
        self.tasks.spawn(async move {
            if AssertUnwindSafe(serving).catch_unwind().await.is_err() {
                tracing::error!("a connection has ended by a panic");
                refused(Refused::Panicked);
            }
        });
    }

    /// What has to arrive until there is a request has one deadline, whatever it is made of.
    async fn serve_https(self, tls: Tls, socket: tokio::net::TcpStream, peer: SocketAddr, held: Held) {
        let (started, limit) = (Instant::now(), self.limits.head);
        let handshake = timeout(limit, tls.accept(socket));
        match self.stop.run_until_cancelled(handshake).await {
            Some(Ok(Ok(socket))) => {
                self.clone().serve_http(socket, peer, held, limit.saturating_sub(started.elapsed())).await;
            }
            Some(Ok(Err(error))) => tracing::debug!(%error, "a TLS handshake failed"),
            Some(Err(_)) => (self.limits.refused)(Refused::Silent),
            None => {}
        }
    }

    async fn serve_http(
        self,
        socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
        held: Held,
        head_timeout: Duration,
    ) {
        let Self { router, stop, limits, .. } = self;
        let holding = held.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            holding.ask();
            request.extensions_mut().insert(ConnectInfo(peer));
            request.extensions_mut().insert(holding.clone());
            router.clone().oneshot(request.map(Body::new))
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(head_timeout);
        http.max_header_size(HEAD_BYTES_MAX).max_buf_size(BUFFER_BYTES_MAX);
        let mut connection =
            std::pin::pin!(http.serve_connection(TokioIo::new(socket), service).with_upgrades());
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                timeout(LAST_REQUEST_TIMEOUT, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended");
            if let Some(refused) = held.refused(&error) {
                (limits.refused)(refused);
            }
        }
    }
}
