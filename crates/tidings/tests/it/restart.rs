//! The real program, killed for real, and started again on the same folder.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};
use tokio_tungstenite::{client_async, tungstenite::client::IntoClientRequest};
use tokio_util::task::TaskTracker;

use crate::{
    client::Client,
    commands::tidings,
    fixture::{Answer, request, until},
};

/// A service in a process of its own.
pub(crate) struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(folder: &Path) -> Self {
        Self::with_drain(folder, 1)
    }

    pub(crate) fn with_drain(folder: &Path, seconds: u64) -> Self {
        let mut command = tidings(&["serve", "--port", "0"], &[]);
        command.env("TIDINGS_PERSIST", "true").env("TIDINGS_DATA_DIR", folder);
        command.env("TIDINGS_DRAIN_SECONDS", seconds.to_string());
        Self::spawn(command)
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let address = lines.find_map(|line| {
            let parsed: Option<Value> = serde_json::from_str(&line).ok();
            said.push(line);
            parsed?["address"].as_str()?.parse().ok()
        });
        let Some(address) = address else { panic!("it does not start: {said:?}") };
        // Somebody must read what it says, or it would wait for that one day.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn publish(&self, event: &Value) -> Answer {
        request("POST", &self.url("/api/events"), &[], event.to_string().as_bytes()).await
    }

    async fn history(&self) -> Value {
        request("GET", &self.url("/api/projects/p/events?limit=1000"), &[], b"").await.json()
    }

    pub(crate) async fn connect(&self) -> Client {
        let request = format!("ws://{}/ws", self.address).into_client_request().unwrap();
        let stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        Client::established(client_async(request, stream).await.unwrap().0).await
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The memory that it has, where that can be read.
    pub(crate) fn resident_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        resident.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
    }

    /// The time for which it has computed, where that can be read.
    pub(crate) fn cpu_ms(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // Behind the name, which may hold anything, fields 14 and 15 of all, in hundredths of a second.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ').skip(11).take(2);
        fields.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, and does not wait.
    pub(crate) fn terminate(&self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    }

    pub(crate) async fn stop(self) {
        self.terminate();
        self.stopped().await;
    }

    /// Waits for its end, which is a good one.
    pub(crate) async fn stopped(mut self) {
        let child = TaskTracker::new().spawn_blocking(move || self.child.wait().map(|status| (self, status)));
        let (_process, status) = child.await.unwrap().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn event(number: u64) -> Value {
    json!({"type": "a.b", "project_id": "p", "number": number, "id": format!("n{number}")})
}

/// Publishes one event after the other until the service is gone; how many were acknowledged.
async fn publish_until_gone(url: String, from: u64, acknowledged: Arc<AtomicU64>) {
    for number in from.. {
        let body = event(number).to_string();
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let url = url.clone();
        let sent = TaskTracker::new().spawn_blocking(move || agent.post(&url).send(body.as_bytes()));
        match sent.await.unwrap() {
            Ok(answer) if answer.status() == 202 => acknowledged.store(number, Ordering::SeqCst),
            _ => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_after_a_kill_and_connections_resume() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(folder.path());
    let mut client = process.connect().await;
    let confirmed = client.ask(&json!({"type": "subscribe", "project_id": "p"})).await;
    let epoch = confirmed["epoch"].clone();
    let client_id = client.established["client_id"].clone();
    let mut last = 0;
    for _ in 0..4 {
        let acknowledged = Arc::new(AtomicU64::new(last));
        let url = process.url("/api/events");
        let publishing =
            TaskTracker::new().spawn(publish_until_gone(url, last + 1, Arc::clone(&acknowledged)));
        for _ in 0..40 {
            last += 1;
            let event = client.next_event().await;
            assert_eq!((&event["number"], &event["offset"]), (&json!(last), &json!(last)));
        }
        process.kill();
        publishing.await.unwrap();
        let acknowledged = acknowledged.load(Ordering::SeqCst);
        process = Process::start(folder.path());
        let history = process.history().await;
        assert_eq!(history["epoch"], epoch, "the same life of the stream");
        let kept = history["events"].as_array().unwrap();
        let numbers: Vec<_> = kept.iter().map(|event| event["number"].as_u64().unwrap()).collect();
        assert!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{numbers:?}");
        assert!(numbers.len() as u64 >= acknowledged, "{} of {acknowledged} are there", numbers.len());
        // What the client had seen is there as well, and the rest comes.
        assert!(numbers.len() as u64 >= last);
        let token = client.established["resume_token"].clone();
        client = process.connect().await;
        let positions = json!({"p": {"epoch": epoch, "offset": last}});
        let resumed = client.ask(&json!({"type": "resume", "token": token, "positions": positions})).await;
        assert_eq!((&resumed["type"], &resumed["client_id"]), (&json!("connection.resumed"), &client_id));
        assert_eq!(resumed["subscriptions"], json!(["p"]));
        let confirmed = client.next_event().await;
        assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(true), &json!(last)));
        while last < numbers.len() as u64 {
            last += 1;
            assert_eq!(client.next_event().await["offset"], last);
        }
    }
    // And once in good order, with a client that stays until it is sent away.
    let token = client.established["resume_token"].clone();
    let stopping = TaskTracker::new().spawn(process.stop());
    assert_eq!(client.close_code().await, 1012);
    stopping.await.unwrap();
    let process = Process::start(folder.path());
    let mut client = process.connect().await;
    let positions = json!({"p": {"epoch": epoch, "offset": last}});
    let resumed = client.ask(&json!({"type": "resume", "token": token, "positions": positions})).await;
    assert_eq!(resumed["client_id"], client_id);
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_that_was_acknowledged_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    // A limit on the size of files fails a write as a full disk does.
    let program = env!("CARGO_BIN_EXE_tidings");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("trap '' XFSZ; ulimit -f 64; exec {program} serve --port 0")])
        .env_clear()
        .env("TIDINGS_DATA_DIR", folder.path())
        .current_dir(folder.path())
        .stdin(Stdio::null());
    let process = Process::spawn(command);
    let mut client = process.connect().await;
    client.ask(&json!({"type": "subscribe", "project_id": "p"})).await;
    let mut acknowledged = 0;
    let refused = loop {
        let mut next = event(acknowledged + 1);
        next["padding"] = json!("x".repeat(1000));
        let answer = process.publish(&next).await;
        if answer.status != 202 {
            break answer;
        }
        acknowledged += 1;
        assert_eq!(client.next_event().await["offset"], acknowledged);
        assert!(acknowledged < 1000, "the limit is reached long before");
    };
    assert_eq!(refused.status, 503);
    assert!(refused.text.contains("journal"), "{}", refused.text);
    assert_eq!(request("GET", &process.url("/readyz"), &[], b"").await.status, 503);
    let health = request("GET", &process.url("/health/websocket"), &[], b"").await.json();
    assert_eq!(health["status"], "degraded");
    // What fits still goes in, and what was refused has left no trace.
    assert_eq!(process.publish(&event(acknowledged + 1)).await.status, 202);
    assert_eq!(client.next_event().await["offset"], acknowledged + 1);
    until("readiness coming back", || async {
        request("GET", &process.url("/readyz"), &[], b"").await.status == 200
    })
    .await;
    drop(process);
    let process = Process::start(folder.path());
    let history = process.history().await;
    assert_eq!(history["offset"], acknowledged + 1);
    assert_eq!(history["events"].as_array().unwrap().len() as u64, acknowledged + 1);
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_ends_the_start_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let _process = Process::start(folder.path());
    let start = |folder: &Path| {
        let mut command = tidings(&["serve", "--port", "0"], &[]);
        command.env("TIDINGS_PERSIST", "true").env("TIDINGS_DATA_DIR", folder);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let error = start(folder.path());
    assert!(error.contains("TIDINGS_DATA_DIR") && error.contains("in use by another process"), "{error}");
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = start(&file);
    assert!(error.contains("TIDINGS_DATA_DIR") && error.contains("file"), "{error}");
}
