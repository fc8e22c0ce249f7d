//! Processes that a test starts, and ends by their ids. Nothing here knows what they do.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

/// How long a test waits for what must happen. Long: on a busy machine it still happens, only later.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// A process of this test; dropping it ends it, stopped or not, also when the test has failed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts it with its output in `log`, behind what is there already.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self { child }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL: it gets no chance to say goodbye.
    pub(crate) fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops it from doing anything, with all its sockets open.
    pub(crate) fn pause(&self) {
        self.signal("-STOP");
    }

    pub(crate) fn go_on(&self) {
        self.signal("-CONT");
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    fn signal(&self, signal: &str) {
        let id = self.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success(), "kill {signal} {id}");
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that nobody has, and neither the one 10,000 above it, which a node of a Redis Cluster takes as well.
///
/// It lies below the range from which the kernel takes the ports of outgoing connections: one of the hundreds that these tests
/// open could otherwise get the port of a server that is down for a while, or be connected to itself.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 10_000).unwrap_or_default();
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    for _ in 0..10_000 {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 11_000 + start.wrapping_add(offset) % 10_000;
        if free(port) && free(port + 10_000) {
            return port;
        }
    }
    panic!("no free port");
}

/// Waits until `check` holds.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, check: impl FnMut() -> F) {
    assert!(within(DEADLINE, check).await, "{what} did not happen");
}

/// Waits until `check` holds; whether it did in time.
pub(crate) async fn within<F: Future<Output = bool>>(limit: Duration, mut check: impl FnMut() -> F) -> bool {
    let waited = tokio::time::timeout(limit, async {
        let mut pause = tokio::time::interval(Duration::from_millis(20));
        pause.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !check().await {
            pause.tick().await;
        }
    });
    waited.await.is_ok()
}

/// When a test fails: the end of a log, for whoever looks into it.
#[allow(clippy::print_stderr, reason = "shown by the harness beside the failure")]
pub(crate) fn show_tail(what: &str, log: &Path, lines: usize) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let skipped = text.lines().count().saturating_sub(lines);
    eprintln!("--- {what}: the last of its log");
    for line in text.lines().skip(skipped) {
        eprintln!("{line}");
    }
}
