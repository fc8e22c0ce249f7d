//! A running service, and a Redis of the test's own.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::Duration,
};

use serde_json::Value;
use tidings::{
    Server,
    config::{Flags, Layers, Settings},
};
use tokio_util::sync::CancellationToken;

/// How long a test waits for what must happen. Long: on a busy machine it still happens, only later.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// Tells a measured figure, past the capture of what passing tests print: figures are for the reader, never for a verdict.
#[allow(clippy::explicit_write, reason = "`eprintln!` is captured")]
pub(crate) fn report(text: std::fmt::Arguments<'_>) {
    writeln!(std::io::stderr(), "report: {text}").unwrap();
}

pub(crate) fn settings(variables: &BTreeMap<String, String>) -> Settings {
    Settings::read(&Layers::load(&Flags::default(), variables, None).unwrap()).unwrap()
}

/// A service in a thread of its own. Dropping it stops it and checks that nothing was left over.
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    pub(crate) internal: Option<SocketAddr>,
    plain: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<usize>>,
    _redis: Option<Redis>,
}

/// `TIDINGS_TEST_ENGINE=redis` runs every test on the Redis engine that does not choose its engine itself.
#[allow(
    clippy::disallowed_methods,
    reason = "it is about this run of the tests, and no setting of the service"
)]
fn keeps_streams_in_redis(variables: &BTreeMap<String, String>) -> bool {
    let chooses = |name: &str| variables.contains_key(name);
    let wanted = std::env::var("TIDINGS_TEST_ENGINE").is_ok_and(|engine| engine == "redis");
    // A folder of its own is the embedded engine's.
    wanted && !["REDIS_URL", "TIDINGS_ENGINE", "TIDINGS_DATA_DIR"].into_iter().any(chooses)
}

/// Waits until everything that events come through is heard.
fn wait_until_ready(address: SocketAddr, speaks_tls: bool) {
    let scheme = if speaks_tls { "https" } else { "http" };
    let url = format!("{scheme}://127.0.0.1:{}/readyz", address.port());
    // Whose certificate it is, other tests ask.
    let tls = ureq::tls::TlsConfig::builder().disable_verification(true).build();
    let agent: ureq::Agent = ureq::Agent::config_builder().tls_config(tls).build().into();
    wait_until("the service being ready", || agent.get(&url).call().is_ok());
}

/// Waits where nothing can be awaited.
fn wait_until(what: &str, check: impl Fn() -> bool) {
    let pause = Duration::from_millis(10);
    let happened = (0..DEADLINE.as_millis() / pause.as_millis()).any(|_| {
        let holds = check();
        if !holds {
            std::thread::sleep(pause);
        }
        holds
    });
    assert!(happened, "{what} did not happen");
}

impl Service {
    /// Starts with the defaults of development.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// Starts with these settings over the defaults of development.
    pub(crate) fn with(variables: &[(&str, &str)]) -> Self {
        // Without a drain, so that a client that is still there does not let its test's end wait.
        let own = [("BACKEND_PORT", "0"), ("TIDINGS_PERSIST", "false"), ("TIDINGS_DRAIN_SECONDS", "0")];
        let mut all: BTreeMap<_, _> =
            own.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        all.extend(variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        let redis = keeps_streams_in_redis(&all).then(Redis::start_and_wait);
        if let Some(redis) = &redis {
            all.insert("REDIS_URL".to_owned(), redis.url());
        }
        let settings = settings(&all);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async move {
                let server = Server::bind(settings).await.unwrap();
                tell.send((server.address(), server.internal_address())).unwrap();
                server.run(stopped).await.unwrap()
            })
        });
        let (address, internal) = told.recv().unwrap();
        let speaks_tls = all.contains_key("TIDINGS_TLS_CERT");
        let plain = internal.filter(|_| speaks_tls).unwrap_or(address);
        if redis.is_some() {
            wait_until_ready(address, speaks_tls);
        }
        Self { address, internal, plain, stop, thread: Some(thread), _redis: redis }
    }

    /// The URL of a path, where it is spoken plainly.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://localhost:{}{path}", self.plain.port())
    }

    /// Asks it to stop, and does not wait.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.cancel();
    }

    /// Whether it has stopped.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it has stopped; how many connections it had to cut off.
    pub(crate) async fn ended(mut self) -> usize {
        until("the service ending", || async { self.has_ended() }).await;
        self.thread.take().unwrap().join().unwrap()
    }

    /// Publishes over HTTP, and expects that it works.
    pub(crate) async fn publish(&self, events: &Value) -> Value {
        let answer = request("POST", &self.url("/api/events"), &[], events.to_string().as_bytes()).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.json()
    }

    pub(crate) async fn health(&self) -> Value {
        request("GET", &self.url("/health/websocket"), &[], b"").await.json()
    }

    /// The value of a metric, with its labels as written; 0 where it is not there yet.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = request("GET", &self.url("/metrics"), &[], b"").await.text;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.cancel();
        let Some(thread) = self.thread.take() else { return };
        let cut_off = thread.join().ok();
        if !std::thread::panicking() {
            assert_eq!(cut_off, Some(0), "connections left when the service stopped");
        }
    }
}

/// An answer over HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }
}

pub(crate) async fn request(method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    for &(name, value) in headers {
        request = request.header(name, value);
    }
    let request = request.body(body.to_vec()).unwrap();
    tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(DEADLINE))
            .build()
            .into();
        let mut response = agent.run(request).unwrap();
        let headers = response.headers().iter();
        Answer {
            status: response.status().as_u16(),
            headers: headers
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                .collect(),
            text: response.body_mut().read_to_string().unwrap(),
        }
    })
    .await
    .unwrap()
}

/// Waits until `check` holds.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let waited = tokio::time::timeout(DEADLINE, async {
        let mut pause = tokio::time::interval(Duration::from_millis(10));
        while !check().await {
            pause.tick().await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not happen");
}

/// A Redis on a free port, in memory only, ended by its own process id.
pub(crate) struct Redis {
    process: Option<Child>,
    port: u16,
}

impl Redis {
    /// A port for a Redis that does not run yet.
    pub(crate) fn reserved() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { process: None, port }
    }

    pub(crate) async fn started() -> Self {
        let mut redis = Self::reserved();
        redis.start().await;
        redis
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) async fn start(&mut self) {
        self.spawn();
        until("Redis starting", || async { self.connection().await.is_ok() }).await;
    }

    /// The same where nothing can be awaited.
    fn start_and_wait() -> Self {
        let mut redis = Self::reserved();
        redis.spawn();
        wait_until("Redis starting", || std::net::TcpStream::connect(("127.0.0.1", redis.port)).is_ok());
        redis
    }

    fn spawn(&mut self) {
        let port = self.port.to_string();
        let process = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: `cargo xtask test` does it");
        self.process = Some(process);
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub(crate) async fn connection(&self) -> redis::RedisResult<redis::aio::MultiplexedConnection> {
        redis::Client::open(self.url()).unwrap().get_multiplexed_async_connection().await
    }

    /// Stops it from answering, as a long command or a slow disk does.
    pub(crate) fn pause(&self) {
        self.signal("-STOP");
    }

    pub(crate) fn go_on(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let id = self.process.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// As `publish`, for a Redis that answers later: the command is on its way when this returns.
    pub(crate) fn publish_in_background(&self, message: &'static [u8]) -> std::thread::JoinHandle<u64> {
        use std::io::{BufRead as _, BufReader};
        let mut socket = std::net::TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let length = message.len();
        write!(socket, "*3\r\n$7\r\nPUBLISH\r\n$19\r\nwebsocket:broadcast\r\n${length}\r\n").unwrap();
        socket.write_all(message).unwrap();
        socket.write_all(b"\r\n").unwrap();
        std::thread::spawn(move || {
            let mut answer = String::new();
            BufReader::new(socket).read_line(&mut answer).unwrap();
            answer.trim().trim_start_matches(':').parse().unwrap()
        })
    }

    /// Publishes on the default channel; returns how many heard it.
    pub(crate) async fn publish(&self, message: &[u8]) -> u64 {
        let mut connection = self.connection().await.unwrap();
        redis::cmd("PUBLISH")
            .arg("websocket:broadcast")
            .arg(message)
            .query_async(&mut connection)
            .await
            .unwrap()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
