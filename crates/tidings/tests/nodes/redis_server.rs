//! A Redis of the test's own: killed, paused, set back to older data.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use redis::{FromRedisValue, RedisResult, aio::MultiplexedConnection};
use tempfile::TempDir;

use crate::process::{Process, free_port, show_tail, until};

/// Nothing on disk unless it is told to.
pub(crate) const VOLATILE: &[&str] = &["--save", "", "--appendonly", "no"];
/// What was answered is on the disk.
pub(crate) const DURABLE: &[&str] = &["--save", "", "--appendonly", "yes", "--appendfsync", "always"];

/// One `redis-server`: a Redis, a node of a cluster, or a Sentinel. Its port and its folder outlive its process.
pub(crate) struct RedisServer {
    process: Option<Process>,
    port: u16,
    folder: TempDir,
    arguments: Vec<String>,
}

impl RedisServer {
    /// A Redis with these options, which answers.
    pub(crate) async fn started(options: &[&str]) -> Self {
        let port = free_port();
        let mut arguments: Vec<_> =
            ["--port", &port.to_string(), "--bind", "127.0.0.1"].map(str::to_owned).into();
        // The delay is for replicas that come together; here one waits alone.
        arguments.extend(["--repl-diskless-sync-delay", "0"].map(str::to_owned));
        arguments.extend(options.iter().map(|&option| option.to_owned()));
        Self::with_arguments(port, tempfile::tempdir().unwrap(), arguments).await
    }

    /// A Sentinel, which keeps what it learns in its settings.
    pub(crate) async fn sentinel(settings: &str) -> Self {
        let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
        let file = folder.path().join("sentinel.conf");
        std::fs::write(&file, format!("port {port}\nbind 127.0.0.1\n{settings}")).unwrap();
        let arguments = vec![file.display().to_string(), "--sentinel".to_owned()];
        Self::with_arguments(port, folder, arguments).await
    }

    async fn with_arguments(port: u16, folder: TempDir, arguments: Vec<String>) -> Self {
        let mut server = Self { process: None, port, folder, arguments };
        server.start().await;
        server
    }

    /// Starts it again, on what its folder has.
    pub(crate) async fn start(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(&self.arguments).current_dir(self.folder.path());
        self.process = Some(Process::spawn(&mut command, &self.log()));
        // One that still reads its data answers with an error.
        until("Redis starting", || async { self.command::<String>(&["PING"]).await.is_ok() }).await;
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

    fn running(&self) -> &Process {
        self.process.as_ref().expect("it runs")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("server.log")
    }

    fn dump(&self) -> PathBuf {
        self.folder.path().join("dump.rdb")
    }

    pub(crate) async fn connection(&self) -> RedisResult<MultiplexedConnection> {
        redis::Client::open(self.url())?.get_multiplexed_async_connection().await
    }

    /// Sends a command over a connection of its own.
    pub(crate) async fn command<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let (name, arguments) = words.split_first().expect("a command has a name");
        redis::cmd(name).arg(arguments).query_async(&mut self.connection().await?).await
    }

    /// The value of a line `name:value` in the answer to `INFO` or `CLUSTER INFO`.
    pub(crate) async fn info(&self, words: &[&str], name: &str) -> Option<String> {
        let text: String = self.command(words).await.ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }

    /// Cuts every connection that listens; how many there were.
    pub(crate) async fn cut_listeners(&self) -> u64 {
        self.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await.unwrap()
    }

    /// How many connections listen.
    pub(crate) async fn listeners(&self) -> usize {
        let list: String = self.command(&["CLIENT", "LIST", "TYPE", "pubsub"]).await.unwrap();
        list.lines().count()
    }

    /// A copy of the data as it is now, to go back to.
    pub(crate) async fn copy_data(&self) -> PathBuf {
        self.command::<()>(&["SAVE"]).await.unwrap();
        let copy = self.folder.path().join("older.rdb");
        std::fs::copy(self.dump(), &copy).unwrap();
        copy
    }

    /// Puts an older copy in the place of the data of a Redis that does not run.
    pub(crate) fn set_back_to(&self, copy: &Path) {
        assert!(self.process.is_none(), "a Redis that runs would write over it");
        std::fs::copy(copy, self.dump()).unwrap();
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            show_tail(&format!("redis-server on port {}", self.port), &self.log(), 15);
        }
    }
}
