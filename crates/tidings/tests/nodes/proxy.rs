//! A network that fails: stands between one node and Redis.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};
use tokio_util::task::TaskTracker;

use crate::process::free_port;

/// What becomes of bytes and connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    /// Everything passes, each piece after this time.
    Passes(Duration),
    /// Connections are closed, and new ones at once.
    Cut,
    /// Nothing passes and nobody is told. What was sent over older connections arrives when it passes again, as after the
    /// repair of a network; what is sent over those opened meanwhile is swallowed.
    Swallows,
}

/// A proxy on a port of its own.
pub(crate) struct Proxy {
    port: u16,
    network: watch::Sender<Network>,
}

impl Proxy {
    /// Stands before `port` from now on, for as long as the runtime of the test lives.
    pub(crate) async fn before(port: u16) -> Self {
        let own = free_port();
        let listener = TcpListener::bind(("127.0.0.1", own)).await.unwrap();
        let network = watch::Sender::new(Network::Passes(Duration::ZERO));
        let (state, tasks) = (network.subscribe(), TaskTracker::new());
        let connections = tasks.clone();
        tasks.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(connection(client, port, state.clone()));
            }
        });
        Self { port: own, network }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn set(&self, network: Network) {
        self.network.send_replace(network);
    }
}

async fn connection(client: TcpStream, port: u16, mut network: watch::Receiver<Network>) {
    let born = *network.borrow_and_update();
    match born {
        Network::Cut => return,
        Network::Swallows => return swallow(client, network).await,
        Network::Passes(_) => {}
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let (client_reads, client_writes) = client.into_split();
    let (server_reads, server_writes) = server.into_split();
    let (there, back) = (network.clone(), network.clone());
    tokio::select! {
        () = carry(client_reads, server_writes, there) => {}
        () = carry(server_reads, client_writes, back) => {}
        _ = network.wait_for(|network| *network == Network::Cut) => {}
    }
}

/// Reads and throws away, until the network is another; then the connection is of no use any more.
async fn swallow(mut client: TcpStream, mut network: watch::Receiver<Network>) {
    let mut bytes = [0; 4096];
    let read = async { while client.read(&mut bytes).await.is_ok_and(|count| count > 0) {} };
    tokio::select! {
        () = read => {}
        _ = network.changed() => {}
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut network: watch::Receiver<Network>) {
    let mut bytes = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        let passes =
            network.wait_for(|network| matches!(network, Network::Passes(_))).await.map(|state| *state);
        let Ok(Network::Passes(delay)) = passes else { return };
        tokio::time::sleep(delay).await;
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
