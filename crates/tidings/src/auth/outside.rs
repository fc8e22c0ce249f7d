//! A server that answers what a test wants, over real sockets, and says what it was asked.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// What is sent back for a request: these bytes, this much later. No bytes: it hangs up.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    bytes: Vec<u8>,
    delay: Duration,
}

pub(super) struct Outside {
    url: String,
    shared: Arc<Shared>,
    _accepting: AbortOnDropHandle<()>,
}

struct Shared {
    reply: Mutex<Reply>,
    requests: Mutex<Vec<String>>,
    accepted: AtomicUsize,
    connections: TaskTracker,
}

impl Reply {
    pub(super) fn new(status: &str, headers: &str, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        Self { bytes: [head.as_bytes(), body].concat(), delay: Duration::ZERO }
    }

    pub(super) fn json(body: &Value) -> Self {
        Self::new("200 OK", "content-type: application/json\r\n", body.to_string())
    }

    pub(super) fn status(status: &str) -> Self {
        Self::new(status, "", "")
    }

    pub(super) fn hang_up() -> Self {
        Self { bytes: Vec::new(), delay: Duration::ZERO }
    }

    pub(super) fn after(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }
}

impl Outside {
    pub(super) async fn start(reply: Reply) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/asked", listener.local_addr().unwrap());
        let connections = TaskTracker::new();
        let shared = Arc::new(Shared {
            reply: Mutex::new(reply),
            requests: Mutex::default(),
            accepted: AtomicUsize::new(0),
            connections: connections.clone(),
        });
        let accepted = Arc::clone(&shared);
        let accepting = connections.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.accepted.fetch_add(1, Ordering::Relaxed);
                accepted.connections.spawn(serve(stream, Arc::clone(&accepted)));
            }
        });
        Self { url, shared, _accepting: AbortOnDropHandle::new(accepting) }
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// From now on.
    pub(super) fn replies(&self, reply: Reply) {
        *self.shared.reply.lock() = reply;
    }

    /// How many requests there were.
    pub(super) fn asked(&self) -> usize {
        self.shared.requests.lock().len()
    }

    /// How many connections there were.
    pub(super) fn connections(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// The newest request, as it came.
    pub(super) fn request(&self) -> String {
        self.shared.requests.lock().last().cloned().unwrap_or_default()
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    loop {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { return };
            request.push(byte);
        }
        let reply = {
            shared.requests.lock().push(String::from_utf8(request).unwrap());
            shared.reply.lock().clone()
        };
        tokio::time::sleep(reply.delay).await;
        if reply.bytes.is_empty() || stream.write_all(&reply.bytes).await.is_err() {
            return;
        }
    }
}

/// Lets the clock jump, for what counts in seconds and minutes. What goes over sockets meanwhile needs a clock that runs.
pub(super) async fn later(duration: Duration) {
    tokio::time::pause();
    tokio::time::advance(duration).await;
    tokio::time::resume();
}
