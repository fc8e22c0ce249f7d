//! A node: the real program in a process of its own, with a name, an address and a log that outlive the process.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, ExitStatus},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    http,
    process::{Process, free_port, show_tail, until, within},
    scale,
};

/// Seconds between heartbeats: short, because a lost last event may take that long to be found.
pub(crate) const HEARTBEAT_SECONDS: u64 = 2;

/// One node.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    process: Option<Process>,
    folder: TempDir,
    settings: Vec<(String, String)>,
    restarts: usize,
}

impl Node {
    /// Starts it with these settings over those of the tests, and waits until it is ready.
    pub(crate) async fn started(name: &str, settings: &[(&str, &str)]) -> Self {
        let mut node = Self::new(name, settings);
        node.start().await;
        node
    }

    /// So many nodes that share this Redis: `node-0`, `node-1`, …
    pub(crate) async fn many(count: usize, redis_url: &str, settings: &[(&str, &str)]) -> Vec<Self> {
        let shared = [&[("TIDINGS_ENGINE", "redis"), ("REDIS_URL", redis_url)], settings].concat();
        let mut nodes: Vec<_> =
            (0..count).map(|index| Self::new(&format!("node-{index}"), &shared)).collect();
        nodes.iter_mut().for_each(Self::launch);
        for node in &mut nodes {
            node.ready().await;
        }
        nodes
    }

    /// A node that does not run yet.
    pub(crate) fn new(name: &str, settings: &[(&str, &str)]) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let heartbeat = HEARTBEAT_SECONDS.to_string();
        let own = [
            ("CONTAINER_ID", name),
            ("WS_HEARTBEAT_INTERVAL", &heartbeat),
            // All that a test publishes: at the end it is read, and held against what was delivered.
            ("TIDINGS_HISTORY_EVENTS", "100000"),
            ("TIDINGS_HISTORY_BYTES", "268435456"),
            ("TIDINGS_HISTORY_SECONDS", "86400"),
            ("TIDINGS_LOG_FORMAT", "json"),
            ("RUST_LOG", &scale::log_filter()),
            ("RUST_BACKTRACE", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut all = Vec::from(own);
        all.push(("TIDINGS_LISTEN".to_owned(), address.to_string()));
        all.extend(settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        Self { address, process: None, folder: tempfile::tempdir().unwrap(), settings: all, restarts: 0 }
    }

    /// Starts it, again with its name, its address and its folder, and waits until it is ready.
    pub(crate) async fn start(&mut self) {
        self.launch();
        self.ready().await;
    }

    /// Starts it, and does not wait.
    pub(crate) fn launch(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidings"));
        command.arg("serve").env_clear().current_dir(self.folder.path());
        command.env("TIDINGS_DATA_DIR", self.folder.path().join("data"));
        command.env("CONTAINER_RESTART", if self.restarts > 0 { "true" } else { "false" });
        // The last one of a name holds.
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn(&mut command, &self.log_file()));
        self.restarts += 1;
    }

    /// Waits until events can flow.
    pub(crate) async fn ready(&mut self) {
        let address = self.address;
        let process = self.process.as_mut().expect("it was started");
        until("a node getting ready", || {
            if let Some(status) = process.ended() {
                panic!("the node ended at its start: {status}");
            }
            async move { http::get(address, "/readyz").await.is_ok_and(|answer| answer.status == 200) }
        })
        .await;
    }

    pub(crate) fn name(&self) -> &str {
        let of_name = |(name, _): &&(String, String)| name == "CONTAINER_ID";
        self.settings.iter().rev().find(of_name).map(|(_, value)| value.as_str()).expect("every node has one")
    }

    pub(crate) fn kill(&mut self) {
        drop(self.process.take());
    }

    pub(crate) fn pause(&self) {
        self.running().pause();
    }

    pub(crate) fn go_on(&self) {
        self.running().go_on();
    }

    /// SIGTERM; waits until it has ended by itself.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        self.running().terminate();
        let process = self.process.as_mut().expect("it runs");
        let limit = Duration::from_secs(30);
        assert!(
            within(limit, || std::future::ready(process.ended().is_some())).await,
            "a stop without an end"
        );
        let status = process.ended().expect("it ended");
        self.process = None;
        status
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("it runs")
    }

    pub(crate) async fn health(&self) -> Option<Value> {
        Some(http::get(self.address, "/health/websocket").await.ok()?.json())
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("node.log")
    }

    /// What it has said since its first start.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            show_tail(&format!("node {}", self.name()), &self.log_file(), 40);
        }
    }
}
