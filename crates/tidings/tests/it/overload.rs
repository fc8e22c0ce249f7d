//! More connections than there may be: refused in a way that each client understands, and taken in when there is room again.

use std::process::{Command, Stdio};

use serde_json::json;
use tokio::net::TcpStream;

use crate::{
    client::{Client, Raw},
    fixture::{Answer, Service, request, until},
    restart::Process,
    sse::Stream,
};

/// Whoever offers this is told by a close code.
const OURS: &str = "Sec-WebSocket-Protocol: tidings.v1\r\n";
const UPGRADE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// Checks a refusal that is told by its status.
#[track_caller]
fn check_problem(answer: &Answer, words: &str) {
    check_head(answer);
    let problem = answer.json();
    assert_eq!(problem["status"], 503);
    assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
}

#[track_caller]
fn check_head(answer: &Answer) {
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (503, "application/problem+json"));
    let retry_after_s: u64 = answer.headers["retry-after"].parse().unwrap();
    assert!((1..=5).contains(&retry_after_s), "{retry_after_s}");
}

async fn upgrade(service: &Service, header: &[(&str, &str)]) -> Answer {
    request("GET", &service.url("/ws"), &[&UPGRADE, header].concat(), b"").await
}

async fn event_stream(service: &Service) -> Answer {
    request("HEAD", &service.url("/sse?project_id=p"), &[], b"").await
}

/// Connects with these lines of headers; the first frame that comes, and the connection.
async fn first_frame(service: &Service, headers: &str) -> (u8, Vec<u8>, Raw) {
    let mut raw = Raw::over(TcpStream::connect(service.address).await.unwrap(), headers, b"").await;
    let (first, payload) = raw.frame().await.unwrap();
    (first, payload, raw)
}

/// Checks a refusal that is told by a close code, with nothing before it.
async fn check_turned_away(service: &Service, headers: &str, code: u16, words: &str) {
    let (first, payload, mut raw) = first_frame(service, &format!("{OURS}{headers}")).await;
    assert!(raw.head.to_ascii_lowercase().contains("sec-websocket-protocol: tidings.v1"), "{}", raw.head);
    assert_eq!((first, &payload[..2]), (0x88, &code.to_be_bytes()[..]));
    let reason = std::str::from_utf8(&payload[2..]).unwrap();
    assert!(reason.starts_with(words) && reason.contains("; retry in "), "{reason}");
    assert!(raw.frame().await.is_err(), "nothing behind it");
}

async fn check_counted(service: &Service, reason: &str, expected: f64) {
    let name = format!("tidings_connections_refused_total{{reason=\"{reason}\"}}");
    let counted = service.metric(&name).await;
    assert!((counted - expected).abs() < 0.1, "{reason}: {counted}");
}

#[tokio::test]
async fn a_full_node_refuses_in_each_form_and_has_room_when_somebody_leaves() {
    let service = Service::with(&[("TIDINGS_CONNECTIONS_MAX", "2")]);
    let client = Client::subscribed(&service, "p").await;
    let stream = Stream::of_p(&service).await;
    check_problem(&upgrade(&service, &[]).await, "as many connections");
    check_problem(&request("GET", &service.url("/sse?project_id=p"), &[], b"").await, "as many connections");
    check_turned_away(&service, "", 1013, "overloaded").await;
    // An `EventSource`, which on any other status would never come back.
    let accept = [("accept", "text/event-stream")];
    let ended = request("GET", &service.url("/sse?project_id=p"), &accept, b"").await;
    assert_eq!((ended.status, ended.headers["content-type"].as_str()), (200, "text/event-stream"));
    let retry = ended.text.lines().find_map(|line| line.strip_prefix("retry: ")).unwrap();
    assert!(
        (1000..=5000).contains(&retry.parse().unwrap()) && !ended.text.contains("data:"),
        "{}",
        ended.text
    );
    check_counted(&service, "connections", 4.0).await;
    assert_eq!(service.health().await["active_connections"], 2);
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    // Whoever has seen its own end has made room.
    client.close().await;
    let client = Client::subscribed(&service, "p").await;
    drop(stream);
    until("room for another stream", || async { event_stream(&service).await.status == 200 }).await;
    drop(client);
    let _first = until_admitted(&service, "").await;
    let _second = until_admitted(&service, "").await;
}

/// A connection, as soon as there is room for it.
async fn until_admitted(service: &Service, headers: &str) -> Raw {
    loop {
        let (first, _, raw) = first_frame(service, &format!("{OURS}{headers}")).await;
        if first == 0x81 {
            return raw;
        }
    }
}

#[tokio::test]
async fn connections_of_one_address_are_limited_where_it_is_known_that_there_is_no_proxy() {
    let service =
        Service::with(&[("TIDINGS_CONNECTIONS_PER_ADDRESS_MAX", "1"), ("TIDINGS_TRUSTED_PROXIES", "none")]);
    let client = Client::connect(&service).await;
    check_problem(&upgrade(&service, &[]).await, "from this address");
    check_turned_away(&service, "", 4529, "too many").await;
    // Anybody can write that.
    let spoofed = "203.0.113.7";
    check_problem(&upgrade(&service, &[("x-forwarded-for", spoofed)]).await, "from this address");
    check_turned_away(&service, "X-Forwarded-For: 203.0.113.7\r\n", 4529, "too many").await;
    check_counted(&service, "address", 4.0).await;
    client.close().await;
    Client::connect(&service).await;
}

#[tokio::test]
async fn without_a_word_about_proxies_limits_per_address_are_off() {
    let service = Service::with(&[("TIDINGS_CONNECTIONS_PER_ADDRESS_MAX", "1")]);
    let _first = Client::connect(&service).await;
    let _second = Client::connect(&service).await;
    let _third = Client::with_headers(&service, &[("x-forwarded-for", "203.0.113.7")]).await.unwrap();
}

#[tokio::test]
async fn behind_a_trusted_proxy_the_address_that_it_forwards_counts() {
    let service = Service::with(&[
        ("TIDINGS_CONNECTIONS_PER_ADDRESS_MAX", "1"),
        ("TIDINGS_TRUSTED_PROXIES", "127.0.0.0/8,10.0.0.0/8"),
    ]);
    let first = Client::with_headers(&service, &[("x-forwarded-for", "203.0.113.7")]).await.unwrap();
    for same in ["203.0.113.7", "198.51.100.1, 203.0.113.7", "203.0.113.7, 10.0.0.9"] {
        check_turned_away(&service, &format!("X-Forwarded-For: {same}\r\n"), 4529, "too many").await;
    }
    let _other = Client::with_headers(&service, &[("x-forwarded-for", "203.0.113.8")]).await.unwrap();
    let _third = Client::with_headers(&service, &[("forwarded", "for=203.0.113.9")]).await.unwrap();
    first.close().await;
    Client::with_headers(&service, &[("x-forwarded-for", "203.0.113.7")]).await.unwrap();
}

#[tokio::test]
async fn who_comes_too_fast_is_told_when_to_come_back() {
    let service = Service::with(&[("TIDINGS_ACCEPT_RATE_MAX", "1")]);
    // However slow this machine is, at some time one of several that come together is too many.
    let refused = loop {
        let several = futures_util::future::join_all((0..4).map(|_| event_stream(&service))).await;
        if let Some(refused) = several.into_iter().find(|answer| answer.status != 200) {
            break refused;
        }
    };
    check_head(&refused);
    loop {
        let (first, payload, _) = first_frame(&service, OURS).await;
        if first == 0x88 {
            assert_eq!(payload[..2], 1013_u16.to_be_bytes());
            break;
        }
    }
    assert!(service.metric(r#"tidings_connections_refused_total{reason="rate"}"#).await >= 2.0);
    until("a turn", || async { event_stream(&service).await.status == 200 }).await;
}

#[tokio::test]
async fn without_a_limit_of_its_own_a_node_keeps_to_that_of_its_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_tidings");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -n 100; exec {program} serve --port 0")])
        .env_clear()
        .env("TIDINGS_PERSIST", "false")
        .env("TIDINGS_SHARDS", "1")
        .env("TIDINGS_DRAIN_SECONDS", "0")
        .current_dir(folder.path())
        .stdin(Stdio::null());
    let process = Process::spawn(command);
    // 40 are kept for everything else.
    let mut clients = Vec::new();
    for _ in 0..60 {
        clients.push(process.connect().await);
    }
    let refused = request("GET", &process.url("/ws"), &UPGRADE, b"").await;
    check_problem(&refused, "as many connections");
    assert_eq!(process.publish(&json!({"type": "a.b"})).await.status, 202);
    for client in &mut clients {
        assert_eq!(client.next_event().await["type"], "a.b");
    }
    process.stop().await;
}
