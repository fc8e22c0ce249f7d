//! `GET /sse`: the same messages for those who only read, over a bare socket.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use crate::{
    client::Line,
    fixture::{DEADLINE, Service, request, until},
};

/// A response that is read as it comes: chunks put together, then cut into events.
pub(crate) struct Stream<L = TcpStream> {
    socket: BufReader<L>,
    head: String,
    text: String,
    ended: bool,
}

/// One event of a stream.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) id: Option<String>,
    /// When to come back after a cut, in milliseconds.
    pub(crate) retry: Option<u64>,
    pub(crate) message: Value,
}

impl Stream {
    pub(crate) async fn open(service: &Service, query: &str, headers: &str) -> Self {
        Self::over(TcpStream::connect(service.address).await.unwrap(), query, headers).await
    }

    /// Follows all of `p`, and has been told where it stands.
    pub(crate) async fn of_p(service: &Service) -> Self {
        let mut stream = Self::open(service, "project_id=p", "").await;
        assert_eq!(stream.next().await.message["type"], "subscription.confirmed");
        stream
    }
}

impl<L: Line> Stream<L> {
    pub(crate) async fn over(mut socket: L, query: &str, headers: &str) -> Self {
        let request = format!("GET /sse?{query} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut socket = BufReader::new(socket);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let read = timeout(DEADLINE, socket.read_line(&mut head)).await.expect("a head in time").unwrap();
            assert!(read > 0, "an end within the head: {head}");
        }
        let stream = Self { socket, head: head.to_ascii_lowercase(), text: String::new(), ended: false };
        assert!(stream.head.starts_with("http/1.1 200"), "{head}");
        assert!(stream.head.contains("\r\ncontent-type: text/event-stream\r\n"), "{head}");
        assert!(stream.head.contains("\r\ncache-control: no-store\r\n"), "{head}");
        assert!(stream.head.contains("\r\ntransfer-encoding: chunked\r\n"), "{head}");
        stream
    }

    /// The next event that is no heartbeat.
    pub(crate) async fn next(&mut self) -> Sent {
        loop {
            let sent = self.next_or_end().await.expect("an open stream");
            if sent.message["type"] != "system.heartbeat" {
                return sent;
            }
        }
    }

    pub(crate) async fn next_or_end(&mut self) -> Option<Sent> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let event: String = self.text.drain(..end + 2).collect();
                return Some(sent(event.trim_end()));
            }
            if self.ended {
                assert_eq!(self.text, "", "the stream ends between two events");
                return None;
            }
            timeout(DEADLINE, self.read_chunk()).await.expect("a chunk in time");
        }
    }

    async fn read_chunk(&mut self) {
        let mut line = String::new();
        self.socket.read_line(&mut line).await.unwrap();
        let length = usize::from_str_radix(line.trim_end(), 16).unwrap_or_else(|_| panic!("{line:?}"));
        let mut chunk = vec![0; length + 2];
        self.socket.read_exact(&mut chunk).await.unwrap();
        assert!(chunk.ends_with(b"\r\n"));
        // The test's events are ASCII, so that a chunk never ends within a character.
        self.text.push_str(std::str::from_utf8(&chunk[..length]).unwrap());
        self.ended = length == 0;
    }
}

/// Reads the fields of an event (HTML standard, section 9.2): an `id` and a `retry` at most, and exactly one line of data.
fn sent(event: &str) -> Sent {
    let (mut id, mut retry, mut data) = (None, None, Vec::new());
    for line in event.lines() {
        match line.split_once(": ").expect("a field and its value") {
            ("id", value) => id = Some(value.to_owned()),
            ("retry", value) => retry = Some(value.parse().unwrap()),
            ("data", value) => data.push(value),
            (field, value) => panic!("unexpected field {field}: {value}"),
        }
    }
    assert_eq!(data.len(), 1, "{event}");
    Sent { id, retry, message: serde_json::from_str(data[0]).unwrap() }
}

fn numbered(number: u64) -> Value {
    json!({"type": "a.b", "project_id": "p", "number": number})
}

#[tokio::test]
async fn the_confirmation_comes_first_and_events_follow_with_their_positions() {
    let service = Service::start();
    let started = json!({"type": "task.started", "project_id": "p", "task_id": "t", "task_name": "n"});
    service.publish(&started).await;
    let mut stream = Stream::open(&service, "project_id=p", "").await;
    let confirmed = stream.next().await;
    assert_eq!(confirmed.message["type"], "subscription.confirmed");
    assert_eq!((&confirmed.message["offset"], &confirmed.message["recovered"]), (&json!(1), &json!(null)));
    assert_eq!(confirmed.message["state"]["tasks"][0]["task_id"], "t");
    assert_eq!(confirmed.retry, Some(1000), "so that an old appointment does not stay what a browser waits");
    let epoch = confirmed.message["epoch"].as_str().unwrap();
    assert_eq!(confirmed.id.unwrap(), format!("{epoch}:1"));
    for offset in 2..5 {
        service.publish(&numbered(offset)).await;
        let event = stream.next().await;
        assert_eq!(event.id.unwrap(), format!("{epoch}:{offset}"));
        assert_eq!((&event.message["type"], &event.message["offset"]), (&json!("a.b"), &json!(offset)));
    }
    service.publish(&json!({"type": "a.b", "project_id": "q"})).await;
    service.publish(&json!({"type": "news.flash"})).await;
    service.publish(&numbered(5)).await;
    assert_eq!(stream.next().await.message["number"], 5, "neither of another project nor an announcement");
}

#[tokio::test]
async fn an_event_with_line_breaks_in_it_is_one_line_of_data() {
    let service = Service::start();
    let mut stream = Stream::of_p(&service).await;
    let body = "{\"type\":\"a.b\",\"project_id\":\"p\",\"data\":{\r\n  \"a\":\n\n[1,\r2],\n\"text\":\"x\\n\\ny\"\n}\n}";
    let answer = request("POST", &service.url("/api/events"), &[], body.as_bytes()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    let event = stream.next().await;
    assert_eq!(event.message["data"], json!({"a": [1, 2], "text": "x\n\ny"}));
    service.publish(&numbered(2)).await;
    assert_eq!(stream.next().await.message["number"], 2);
}

#[tokio::test]
async fn types_filter_what_comes() {
    let service = Service::start();
    let mut stream = Stream::open(&service, "project_id=p&types=kept.*,%20other.exact", "").await;
    assert_eq!(stream.next().await.message["type"], "subscription.confirmed");
    let types = ["kept.one", "dropped.one", "other.exact", "other.else", "kept.two"];
    let events: Vec<_> = types.iter().map(|name| json!({"type": name, "project_id": "p"})).collect();
    service.publish(&json!(events)).await;
    for (name, offset) in [("kept.one", 1), ("other.exact", 3), ("kept.two", 5)] {
        let event = stream.next().await;
        assert_eq!((&event.message["type"], &event.message["offset"]), (&json!(name), &json!(offset)));
        assert!(event.id.unwrap().ends_with(&format!(":{offset}")));
    }
}

#[tokio::test]
async fn last_event_id_brings_exactly_what_was_missed_and_then_goes_live() {
    let service = Arc::new(Service::with(&[("TIDINGS_HISTORY_EVENTS", "100000")]));
    let publisher = {
        let service = Arc::clone(&service);
        TaskTracker::new().spawn(async move {
            for number in 1..=400 {
                service.publish(&numbered(number)).await;
            }
        })
    };
    let mut stream = Stream::of_p(&service).await;
    let mut last = stream.next().await;
    while last.message["number"] != 400 {
        // Cut after each few events, read on from there while more is published.
        let since = last.id.clone().unwrap();
        let offset = last.message["offset"].as_u64().unwrap();
        drop(stream);
        stream = Stream::open(&service, "project_id=p", &format!("Last-Event-ID: {since}\r\n")).await;
        let confirmed = stream.next().await;
        assert_eq!(confirmed.message["recovered"], true);
        assert_eq!(confirmed.message.get("state"), None);
        assert_eq!(confirmed.id.unwrap(), since, "the position that was asked for");
        for number in offset + 1..=(offset + 30).min(400) {
            last = stream.next().await;
            assert_eq!((&last.message["offset"], &last.message["number"]), (&json!(number), &json!(number)));
            assert_eq!(last.message.get("folded"), None);
        }
    }
    publisher.await.unwrap();
}

#[tokio::test]
async fn an_epoch_that_never_was_gives_the_state_instead() {
    let service = Service::start();
    let started = json!({"type": "task.started", "project_id": "p", "task_id": "t", "task_name": "n"});
    service.publish(&started).await;
    for since in ["gone:1", "with:colons:in:it:7", ":0"] {
        let header = format!("Last-Event-ID: {since}\r\n");
        let mut stream = Stream::open(&service, "project_id=p", &header).await;
        let confirmed = stream.next().await.message;
        assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(false), &json!(1)), "{since}");
        assert_eq!(confirmed["state"]["tasks"][0]["task_id"], "t");
    }
}

#[tokio::test]
async fn bad_parameters_are_refused_with_what_is_wrong() {
    let service = Service::start();
    for (query, last_event_id, words) in [
        ("", None, "project_id"),
        ("types=a.b", None, "project_id"),
        ("project_id=", None, "project_id"),
        ("project_id=..%2Fsecret", None, "project_id"),
        ("project_id=*", None, "project_id"),
        ("project_id=p%00", None, "project_id"),
        ("project_id=%20p", None, "project_id"),
        ("project_id=p&types=", None, "types"),
        ("project_id=p&types=Task", None, "types"),
        ("project_id=p&types=task.*,,a.b", None, "types"),
        ("project_id=p", Some("7"), "Last-Event-ID"),
        ("project_id=p", Some("epoch:"), "Last-Event-ID"),
        ("project_id=p", Some("epoch:-1"), "Last-Event-ID"),
        ("project_id=p", Some("epoch:99999999999999999999"), "Last-Event-ID"),
        ("project_id=p", Some("epoch:1.5"), "Last-Event-ID"),
    ] {
        let headers: Vec<_> = last_event_id.map(|value| ("last-event-id", value)).into_iter().collect();
        let answer = request("GET", &service.url(&format!("/sse?{query}")), &headers, b"").await;
        assert_eq!(answer.status, 400, "{query} {last_event_id:?}: {}", answer.text);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        let problem = answer.json();
        assert_eq!(problem["status"], 400);
        assert!(problem["detail"].as_str().unwrap().contains(words), "{query} {last_event_id:?}: {problem}");
    }
    assert_eq!(service.health().await["active_connections"], 0);
}

#[tokio::test]
async fn a_page_of_another_site_may_not_read() {
    let service = Service::start();
    let url = service.url("/sse?project_id=p");
    let answer = request("GET", &url, &[("origin", "https://evil.example")], b"").await;
    assert_eq!(answer.status, 403);
    assert!(answer.json()["detail"].as_str().unwrap().contains("Origin"));
    let stream = Stream::open(&service, "project_id=p", "Origin: http://localhost:3000\r\n").await;
    assert!(stream.head.contains("\r\naccess-control-allow-origin: http://localhost:3000\r\n"));
    assert!(stream.head.contains("\r\naccess-control-allow-credentials: true\r\n"));
}

#[tokio::test]
async fn a_reader_that_goes_away_is_noticed() {
    let service = Service::start();
    let early = Stream::open(&service, "project_id=p", "").await;
    let reader = Stream::of_p(&service).await;
    until("both readers being counted", || async { service.health().await["active_connections"] == 2 }).await;
    drop(early);
    drop(reader);
    // Nothing is published: it is not the next write that finds out.
    until("both readers ending", || async { service.health().await["active_connections"] == 0 }).await;
    assert!(service.metric("tidings_subscriptions").await < 0.5);
}

#[tokio::test]
async fn a_stopping_service_ends_the_stream_behind_what_was_published() {
    let service = Service::start();
    let mut stream = Stream::of_p(&service).await;
    service.publish(&json!([numbered(1), numbered(2)])).await;
    service.ask_to_stop();
    let (first, second) = (stream.next().await, stream.next().await);
    assert_eq!((&first.message["number"], &second.message["number"]), (&json!(1), &json!(2)));
    assert!(stream.next_or_end().await.is_none());
}

#[tokio::test]
async fn heartbeats_tell_up_to_where_everything_was_sent() {
    let service = Service::with(&[("WS_HEARTBEAT_INTERVAL", "1")]);
    let mut stream = Stream::open(&service, "project_id=p&types=kept.*", "").await;
    assert_eq!(stream.next().await.message["type"], "subscription.confirmed");
    service
        .publish(&json!([{"type": "kept.a", "project_id": "p"}, {"type": "a.b", "project_id": "p"}]))
        .await;
    assert_eq!(stream.next().await.message["type"], "kept.a");
    let mut told = 0;
    for _ in 0..3 {
        let beat = stream.next_or_end().await.unwrap();
        assert_eq!((&beat.message["type"], &beat.id), (&json!("system.heartbeat"), &None));
        told = beat.message["positions"]["p"].as_u64().unwrap_or(told);
    }
    assert_eq!(told, 2, "also past what the filter dropped");
}

#[tokio::test]
async fn a_reader_that_takes_its_time_gets_every_event_whole() {
    let service = Service::start();
    let mut stream = Stream::of_p(&service).await;
    let data = "x".repeat(500_000);
    let events: Vec<_> = (1..=10)
        .map(|number| json!({"type": "a.b", "project_id": "p", "number": number, "data": data}))
        .collect();
    service.publish(&json!(events)).await;
    for number in 1..=10 {
        let event = stream.next().await.message;
        assert_eq!((&event["number"], event["data"].as_str().map(str::len)), (&json!(number), Some(500_000)));
    }
    service.publish(&numbered(11)).await;
    assert_eq!(stream.next().await.message["number"], 11);
}

#[tokio::test]
async fn a_reader_that_was_behind_gets_the_newest_progress_and_every_durable_event() {
    const BATCH: u64 = 100;
    let service = Service::with(&[("TIDINGS_HISTORY_EVENTS", "100000")]);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = Stream::over(socket.connect(service.address).await.unwrap(), "project_id=p", "").await;
    assert_eq!(stream.next().await.message["type"], "subscription.confirmed");
    let (mut batches, mut more) = (0, 5);
    while more > 0 {
        let progress = |number| {
            json!({
                "type": "task.progress", "project_id": "p", "task_id": "t",
                "progress": {"current": number, "total": 9_999_999}, "message": "x".repeat(2000),
            })
        };
        let mut events: Vec<_> = (batches * BATCH + 1..=(batches + 1) * BATCH).map(progress).collect();
        batches += 1;
        events.push(numbered(batches));
        service.publish(&json!(events)).await;
        more -= u64::from(service.metric("tidings_subscriptions_behind_total").await > 0.5);
        assert!(batches < 1000, "it is behind long before this");
    }
    let (mut at, mut current, mut steps, mut folded_sum) = (0, 0, 0, 0);
    while at < batches * (BATCH + 1) {
        let event = stream.next().await;
        let folded = event.message.get("folded").map_or(0, |folded| folded.as_u64().unwrap());
        at += 1 + folded;
        folded_sum += folded;
        assert_eq!(event.message["offset"], at);
        assert!(event.id.unwrap().ends_with(&format!(":{at}")));
        if event.message["type"] == "a.b" {
            steps += 1;
            assert_eq!(event.message["number"], steps);
        } else {
            current = event.message["progress"]["current"].as_u64().unwrap();
        }
    }
    assert_eq!((steps, current), (batches, batches * BATCH));
    assert!(folded_sum > BATCH);
}

#[tokio::test]
async fn a_question_for_the_head_alone_leaves_no_reader_behind() {
    let service = Service::start();
    let answer = request("HEAD", &service.url("/sse?project_id=p"), &[], b"").await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "text/event-stream"));
    until("no reader being left", || async { service.health().await["active_connections"] == 0 }).await;
}
