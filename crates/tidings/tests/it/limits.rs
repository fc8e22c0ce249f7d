//! What one client may cost: heads of requests, half-open connections, messages; and what answers say to those who probe.

use std::{process::Stdio, time::Duration};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    client::{Client, Raw, frame, raw},
    commands::tidings,
    fixture::{DEADLINE, Redis, Service, report, request, until},
    restart::Process,
    sse::Stream,
};

/// Sends bytes and reads until the service closes.
async fn answer(service: &Service, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(service.address).await.unwrap();
    // It may be closed before it has taken everything.
    let _ = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, socket.read_to_end(&mut answer)).await.expect("an end in time");
    String::from_utf8(answer).unwrap()
}

async fn check_metric(service: &Service, name: &str, least: f64) {
    until(name, || async { service.metric(name).await >= least }).await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_and_one_that_fits_is_served() {
    let service = Service::start();
    let head =
        |headers: &str| format!("GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    for headers in [
        format!("X: {}\r\n", "x".repeat(17 * 1024)),
        format!("X: {}\r\n", "x".repeat(1024 * 1024)),
        "A: b\r\n".repeat(2000),
        "A: b\r\n".repeat(99),
    ] {
        let refused = answer(&service, head(&headers).as_bytes()).await;
        // What it was still sending may have reset the connection before the answer was read.
        assert!(refused.is_empty() || refused.starts_with("HTTP/1.1 431"), "{refused}");
    }
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(17 * 1024));
    assert!(answer(&service, long_path.as_bytes()).await.starts_with("HTTP/1.1 431"));
    for headers in [format!("X: {}\r\n", "x".repeat(15 * 1024)), "A: b\r\n".repeat(98)] {
        let served = answer(&service, head(&headers).as_bytes()).await;
        assert!(served.starts_with("HTTP/1.1 200"), "{served}");
    }
    check_metric(&service, r#"tidings_requests_refused_total{reason="head_too_large",key=""}"#, 2.0).await;
    // Bodies have limits of their own.
    let body = json!({"type": "a.b", "project_id": "p", "x": "x".repeat(1000 * 1000)}).to_string();
    let body = format!("[{}]", [body.as_str(); 15].join(","));
    let answer = request("POST", &service.url("/api/events"), &[], body.as_bytes()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
}

#[tokio::test]
async fn control_characters_in_a_request_are_400_and_a_line_of_the_log_without_them() {
    for format in ["json", "text"] {
        let logged = Logged::with(&[("TIDINGS_LOG_FORMAT", format)]).await;
        for request in [
            "GET /a\rforged HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /a?b=\0forged HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /a\x1b[31mforged HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /ws HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Protocol: tidings.v1\0forged\r\n\r\n",
            "GET /ws HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Protocol: tidings.v1\rforged\r\n\r\n",
        ] {
            let answer = logged.answer(request).await;
            assert!(answer.starts_with("HTTP/1.1 400"), "{request:?}: {answer}");
            assert!(!answer.contains("forged"), "{answer}");
        }
        for path in
            ["/api/projects/p%0D%0Aforged/events", "/api/projects/p%00/events", "/sse?project_id=p%0Aforged"]
        {
            let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            let answer = logged.answer(&request).await;
            assert!(answer.starts_with("HTTP/1.1 400") && !answer.contains("forged"), "{path}: {answer}");
        }
        // What a publisher has sent is told in the log, on one line and escaped.
        let body = r#"{"type":"a.b","project_id":7,"x\n1999-01-01 INFO forged\u001b[31m":1,"x\n1999-01-01 INFO forged\u001b[31m":1}"#;
        let request = format!(
            "POST /api/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        assert!(logged.answer(&request).await.starts_with("HTTP/1.1 422"));
        let lines = logged.stop().await;
        assert!(lines.iter().any(|line| line.contains("no_http")), "{lines:?}");
        for line in &lines {
            assert!(!line.starts_with("1999") && !line.chars().any(char::is_control), "{line:?}");
        }
    }
}

/// A service in a process of its own, and what it says.
pub(crate) struct Logged {
    child: Child,
    said: JoinHandle<Vec<String>>,
    pub(crate) address: String,
}

impl Logged {
    pub(crate) async fn with(variables: &[(&str, &str)]) -> Self {
        let mut command = tidings(&["serve", "--port", "0"], variables);
        command.env("TIDINGS_DRAIN_SECONDS", "0");
        let mut child = Command::from(command).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        loop {
            let line = lines.next_line().await.unwrap().expect("it starts");
            said.push(line.clone());
            if let Some((_, port)) = line.split_once("127.0.0.1:").filter(|_| line.contains("listening")) {
                let port: String = port.chars().take_while(char::is_ascii_digit).collect();
                // Somebody must read what it says, or it would wait for that.
                let said = TaskTracker::new().spawn(async move {
                    while let Some(line) = lines.next_line().await.unwrap() {
                        said.push(line);
                    }
                    said
                });
                return Self { child, said, address: format!("127.0.0.1:{port}") };
            }
        }
    }

    pub(crate) async fn answer(&self, request: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(DEADLINE, socket.read_to_string(&mut answer)).await.expect("an end in time").unwrap();
        answer
    }

    /// Ends it; all that it said.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        let id = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
        assert!(self.child.wait().await.unwrap().success());
        self.said.await.unwrap()
    }
}

/// Waits until the service closes the connection; whatever it says before.
async fn cut_off(socket: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, socket.read_to_end(&mut rest)).await.expect("an end in time");
}

#[tokio::test]
async fn a_thousand_half_open_connections_are_cut_off_while_others_are_served() {
    const HALF_OPEN: usize = 1000;
    let mut command = tidings(&["serve", "--port", "0"], &[("TIDINGS_HANDSHAKE_SECONDS", "3")]);
    command.env("TIDINGS_DRAIN_SECONDS", "0");
    let process = Process::spawn(command);
    let before_kb = process.resident_kb();
    let address = process.address();
    let half_open = (0..HALF_OPEN).map(|number| async move {
        let mut socket = TcpStream::connect(address).await.unwrap();
        if number % 2 == 1 {
            // Each byte is a sign of life, and none of them buys time.
            let mut head =
                b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ".iter().chain(std::iter::repeat(&b'x'));
            while let Some(byte) = head.next()
                && socket.write_all(&[*byte]).await.is_ok()
            {
                sleep(Duration::from_millis(100)).await;
            }
        }
        cut_off(&mut socket).await;
    });
    let served = async {
        let mut client = process.connect().await;
        for number in 0..5 {
            assert_eq!(process.publish(&json!({"type": "a.b", "number": number})).await.status, 202);
            assert_eq!(client.next_event().await["number"], number);
        }
        process.resident_kb()
    };
    let (_, during_kb) = tokio::join!(join_all(half_open), served);
    report(format_args!("{HALF_OPEN} half-open connections: {before_kb} kB before, {during_kb} kB during"));
    let bound_kb = before_kb + 256 * 1024;
    assert!(during_kb < bound_kb, "{before_kb} kB, then {during_kb} kB");
    process.stop().await;
}

#[tokio::test]
async fn a_connection_that_keeps_still_after_its_answer_is_cut_off() {
    let service = Service::with(&[("TIDINGS_HANDSHAKE_SECONDS", "1")]);
    let mut socket = TcpStream::connect(service.address).await.unwrap();
    socket.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    cut_off(&mut socket).await;
    let mut silent = TcpStream::connect(service.address).await.unwrap();
    cut_off(&mut silent).await;
    check_metric(&service, r#"tidings_requests_refused_total{reason="silent",key=""}"#, 1.0).await;
    // Of the two, one had its answer.
    let silent = service.metric(r#"tidings_requests_refused_total{reason="silent",key=""}"#).await;
    assert!(silent < 1.5, "{silent}");
    // What is no request any more has other clocks.
    let mut client = Client::subscribed(&service, "p").await;
    let mut stream = Stream::of_p(&service).await;
    sleep(Duration::from_millis(1500)).await;
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    while stream.next().await.message["type"] != "a.b" {}
    assert_eq!(client.next_event().await["type"], "a.b");
}

#[tokio::test]
async fn connections_without_a_place_are_closed_at_once_and_event_streams_take_none() {
    let mut command = std::process::Command::new("sh");
    let program = env!("CARGO_BIN_EXE_tidings");
    command
        .args(["-c", &format!("ulimit -n 100; exec {program} serve --port 0")])
        .env_clear()
        .envs([("TIDINGS_PERSIST", "false"), ("TIDINGS_SHARDS", "1"), ("TIDINGS_DRAIN_SECONDS", "0")])
        // Longer than this waits for anything.
        .env("TIDINGS_HANDSHAKE_SECONDS", "120")
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null());
    let process = Process::spawn(command);
    // Of 100 descriptors 20 are for files and 5 for the internal address.
    let mut silent = Vec::new();
    for _ in 0..75 {
        silent.push(TcpStream::connect(process.address()).await.unwrap());
    }
    let mut one_more = TcpStream::connect(process.address()).await.unwrap();
    let closed = timeout(DEADLINE, one_more.read(&mut [0; 1])).await.expect("closed at once");
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    // Whoever leaves makes room.
    drop(silent.split_off(40));
    let is_alive = async || {
        let mut socket = TcpStream::connect(process.address()).await.unwrap();
        let _ = socket.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer).await;
        answer.starts_with("HTTP/1.1 200")
    };
    until("room", is_alive).await;
    let text = request("GET", &process.url("/metrics"), &[], b"").await.text;
    let refused =
        text.lines().find(|line| line.starts_with("tidings_connections_refused_total{reason=\"http\"}"));
    assert!(refused.is_some(), "{text}");
    drop(silent);
    process.stop().await;
}

fn subscribe(number: usize) -> Vec<u8> {
    frame(0x81, json!({"type": "subscribe", "project_id": format!("p{number}")}).to_string().as_bytes())
}

/// Sends all of it at once while it reads; the codes of the errors that came, and the close code.
async fn flood(service: &Service, bytes: Vec<u8>) -> (Vec<String>, u16) {
    let (read, mut write) = raw(service.address).await.into_split();
    let writing = async {
        // Nothing of it is looked at after the close, which is answered behind it.
        let _ = write.write_all(&bytes).await;
        let _ = write.write_all(&frame(0x88, &4529_u16.to_be_bytes())).await;
        std::future::pending::<()>().await;
    };
    let reading = timeout(DEADLINE, async {
        let (mut read, mut errors) = (BufReader::new(read), Vec::new());
        loop {
            let first = read.read_u8().await.unwrap();
            let length = match read.read_u8().await.unwrap() {
                126 => usize::from(read.read_u16().await.unwrap()),
                127 => panic!("nothing is that long"),
                short => usize::from(short),
            };
            let mut payload = vec![0; length];
            read.read_exact(&mut payload).await.unwrap();
            match first {
                0x81 => {
                    let message: Value = serde_json::from_slice(&payload).unwrap();
                    errors.extend(message["code"].as_str().map(str::to_owned));
                }
                0x88 => {
                    let _ = read.read_to_end(&mut Vec::new()).await;
                    return (errors, u16::from_be_bytes([payload[0], payload[1]]));
                }
                _ => {}
            }
        }
    });
    tokio::select! {
        () = writing => unreachable!("it never ends"),
        read = reading => read.expect("a close in time"),
    }
}

#[tokio::test]
async fn who_sends_without_end_is_told_and_closed_and_nobody_else_notices() {
    let service = Service::start();
    let mut other = Client::subscribed(&service, "other").await;
    let ping = frame(0x81, br#"{"type":"ping"}"#);
    for (what, bytes) in [
        ("pings", ping.repeat(10_000)),
        ("subscriptions", (0..10_000).flat_map(subscribe).collect()),
        ("frames that are pings", frame(0x89, b"?").repeat(10_000)),
        ("rubbish", frame(0x81, b"rubbish").repeat(10_000)),
        ("pongs", frame(0x8A, b"").repeat(40_000)),
        ("empty fragments", [frame(0x01, b""), frame(0x00, b"").repeat(40_000)].concat()),
    ] {
        let (errors, code) = flood(&service, bytes).await;
        // Pieces that come together are refused together, and then the telling and the end are one.
        assert!(
            errors.iter().any(|code| code == "rate_limited") || what == "empty fragments",
            "{what}: {errors:?}"
        );
        assert_eq!(code, 4529, "{what}");
        service.publish(&json!({"type": "a.b", "project_id": "other"})).await;
        assert_eq!(other.next_event().await["type"], "a.b");
    }
    check_metric(&service, r#"tidings_connections_closed_total{code="4529"}"#, 6.0).await;
}

#[tokio::test]
async fn who_is_told_and_waits_is_heard_again() {
    let service = Service::with(&[("TIDINGS_MESSAGE_RATE_MAX", "1"), ("TIDINGS_SUBSCRIPTIONS_MAX", "1")]);
    let mut client = Client::connect(&service).await;
    // However slow this machine is, some of them come together.
    for _ in 0..60 {
        client.send_text(r#"{"type":"ping"}"#).await;
    }
    loop {
        let answer = client.next().await;
        if answer["type"] == "error" {
            assert_eq!(answer["code"], "rate_limited");
            assert!(answer["hint"].as_str().unwrap().contains("wait"));
            break;
        }
        assert_eq!(answer["type"], "pong");
    }
    loop {
        sleep(Duration::from_millis(1100)).await;
        client.send_text(r#"{"type":"ping","id":"later"}"#).await;
        let answered = async { while client.next().await["id"] != "later" {} };
        if timeout(Duration::from_secs(1), answered).await.is_ok() {
            break;
        }
    }
}

#[tokio::test]
async fn a_page_may_subscribe_to_everything_at_once() {
    let service = Service::start();
    let socket = TcpStream::connect(service.address).await.unwrap();
    let mut raw = Raw::over(socket, "", b"").await;
    raw.send(&(0..500).flat_map(subscribe).collect::<Vec<_>>()).await;
    let mut confirmed = 0;
    while confirmed < 500 {
        match raw.next().await["type"].as_str().unwrap() {
            "subscription.confirmed" => confirmed += 1,
            "connection.established" => {}
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn answers_give_nothing_away() {
    let service = Service::start();
    let probe = "zq-probe";
    for (method, path) in [
        ("GET", format!("/{probe}")),
        ("GET", format!("/api/config/{probe}?x={probe}")),
        ("GET", format!("/schema/{probe}.json")),
        ("GET", format!("/api/projects/p/events?limit={probe}")),
        ("GET", format!("/api/projects/p/events?since_offset={probe}")),
        ("GET", format!("/api/projects/%FF{probe}/events")),
        ("GET", format!("/sse?project_id=p&types={probe}")),
        ("GET", format!("/sse?project_id=p&project_id={probe}")),
        ("GET", format!("/sse?{probe}=p")),
        ("PROBE", "/livez".to_owned()),
        ("POST", format!("/health/websocket?{probe}")),
    ] {
        let answer = request(method, &service.url(&path), &[("last-event-id", probe)], b"").await;
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.status);
        assert!(!answer.text.to_lowercase().contains("probe"), "{path}: {}", answer.text);
        assert!(!answer.headers.contains_key("server") && !answer.headers.contains_key("x-powered-by"));
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
    }
    for path in [
        "/api/config",
        "/health/websocket",
        "/schema/events.json",
        "/api/projects/p/events",
        "/livez",
        "/metrics",
    ] {
        let answer = request("GET", &service.url(path), &[], b"").await;
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert!(!answer.headers.contains_key("server"));
    }
}

#[tokio::test]
async fn the_console_may_do_what_it_does_and_nothing_else() {
    let service = Service::start();
    let answer = request("GET", &service.url("/console"), &[], b"").await;
    let policy = &answer.headers["content-security-policy"];
    let socket = format!("connect-src 'self' ws://localhost:{};", service.address.port());
    for rule in
        ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "script-src 'self';", &socket]
    {
        assert!(policy.contains(rule), "{rule}: {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains("* "), "{policy}");
    assert_eq!(answer.headers["referrer-policy"], "no-referrer");
    // What the policy forbids the page must not need.
    for inline in ["<style", "style=", "onclick", "javascript:", "<script>"] {
        assert!(!answer.text.contains(inline), "{inline}");
    }
}

#[tokio::test]
async fn nobody_outside_is_told_where_redis_is() {
    let redis = Redis::started().await;
    let (url, port) = (redis.url(), redis.port().to_string());
    let service = Service::with(&[
        ("REDIS_URL", &url),
        ("ENVIRONMENT", "production"),
        ("TIDINGS_AUTH", "none"),
        ("TIDINGS_PUBLISH_KEYS", "plain-0123456789abcdef"),
        ("TIDINGS_LISTEN", "127.0.0.1:0"),
    ]);
    let key = [("authorization", "Bearer plain-0123456789abcdef")];
    let body = br#"{"type":"a.b","project_id":"p"}"#;
    until("an event", || async {
        request("POST", &service.url("/api/events"), &key, body).await.status == 202
    })
    .await;
    drop(redis);
    until("a refusal", || async {
        let refused = request("POST", &service.url("/api/events"), &key, body).await;
        let problem = refused.json();
        assert!(!refused.text.contains(&port) && !refused.text.contains("127.0.0.1"), "{problem}");
        refused.status == 503 && problem["code"] == "unavailable"
    })
    .await;
    until("a verdict", || async {
        let ready = request("GET", &service.url("/readyz?verbose"), &[], b"").await;
        assert!(!ready.text.contains(&port) && !ready.text.contains("127.0.0.1"), "{}", ready.text);
        ready.status == 503
    })
    .await;
}
