//! A service that stops while it has clients: each leaves at its appointment and is served until then.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    client::{Client, Raw},
    fixture::{DEADLINE, Service, request, until},
    restart::Process,
    sse::Stream,
};

/// A drain that no test sees the end of.
const LONG: [(&str, &str); 1] = [("TIDINGS_DRAIN_SECONDS", "3600")];

fn numbered(number: u64) -> Value {
    json!({"type": "a.b", "project_id": "p", "number": number})
}

/// The moment of an appointment, in milliseconds of the clock on the wall; and how far it was away.
fn appointment(message: &Value) -> (i64, u64) {
    assert_eq!(message["type"], "container.reconnect", "{message}");
    assert!(message["message"].as_str().is_some_and(|text| !text.is_empty()));
    let told: jiff::Timestamp = message["timestamp"].as_str().unwrap().parse().unwrap();
    let away_ms = message["retry_after_ms"].as_u64().unwrap();
    (told.as_millisecond() + i64::try_from(away_ms).unwrap(), away_ms)
}

#[tokio::test]
async fn appointments_are_spread_over_the_drain() {
    const CLIENTS: usize = 100;
    const PARTS: usize = 20;
    let service = Service::with(&[LONG[0], ("TIDINGS_SHARDS", "2")]);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::connect(&service).await);
    }
    service.ask_to_stop();
    let mut parts = BTreeMap::<_, usize>::new();
    for client in &mut clients {
        let (at_ms, away_ms) = appointment(&client.next_event().await);
        assert!(away_ms <= 3_600_000, "{away_ms}");
        *parts.entry(at_ms / (3_600_000 / 20)).or_default() += 1;
    }
    assert!(parts.values().all(|leave| leave * 2 * PARTS <= CLIENTS * 3), "{parts:?}");
    drop(clients);
    // Long before the last appointment: nobody is left.
    assert_eq!(service.ended().await, 0);
}

#[tokio::test]
async fn until_its_appointment_a_client_is_served_and_only_new_ones_are_refused() {
    let service = Service::with(&LONG);
    let mut client = Client::subscribed(&service, "p").await;
    service.ask_to_stop();
    appointment(&client.next_event().await);
    let get = |path: &str| {
        let url = service.url(path);
        async move { request("GET", &url, &[], b"").await }
    };
    let ready = get("/readyz").await;
    assert_eq!((ready.status, ready.text.contains("[-] not draining")), (503, true));
    assert_eq!(get("/livez").await.status, 200);
    assert_eq!(service.health().await["status"], "draining");
    let websocket = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let refused = [
        request("GET", &service.url("/ws"), &websocket, b"").await,
        request("GET", &service.url("/sse?project_id=p"), &[], b"").await,
    ];
    for answer in refused {
        assert_eq!(
            (answer.status, answer.headers["content-type"].as_str()),
            (503, "application/problem+json")
        );
        assert!(answer.headers["retry-after"].parse::<u64>().is_ok_and(|seconds| seconds > 0));
        assert!(answer.text.contains("stopping"), "{}", answer.text);
    }
    let ours = "Sec-WebSocket-Protocol: tidings.v1\r\n";
    let mut told = Raw::over(TcpStream::connect(service.address).await.unwrap(), ours, b"").await;
    assert_eq!(told.next_or_end().await, Err(Some(1012)));
    for offset in 1..=3 {
        let published = service.publish(&numbered(offset)).await;
        assert_eq!(published["events"][0]["offset"], offset);
        assert_eq!(client.next_event().await["offset"], offset);
    }
    let other = client.ask(&json!({"type": "subscribe", "project_id": "q"})).await;
    assert_eq!(other["type"], "subscription.confirmed");
    assert_eq!(get("/api/projects/p/events").await.json()["events"].as_array().unwrap().len(), 3);
    let counted = service.metric(r#"tidings_connections_refused_total{reason="draining"}"#).await;
    assert!((counted - 3.0).abs() < 0.1, "{counted}");
    client.close().await;
    assert_eq!(service.ended().await, 0);
}

#[tokio::test]
async fn without_clients_the_stop_is_at_once() {
    let service = Service::with(&LONG);
    Client::connect(&service).await.close().await;
    service.ask_to_stop();
    assert_eq!(service.ended().await, 0);
}

#[tokio::test]
async fn at_its_appointment_every_client_is_closed() {
    let service = Service::with(&[("TIDINGS_DRAIN_SECONDS", "1")]);
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(Client::subscribed(&service, "p").await);
    }
    service.ask_to_stop();
    for mut client in clients {
        assert!(appointment(&client.next_event().await).1 <= 1000);
        assert_eq!(client.close_code().await, 1012);
    }
    assert_eq!(service.ended().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_sent_away_resumes_where_the_service_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::with_drain(folder.path(), 1);
    let mut client = process.connect().await;
    let token = client.established["resume_token"].clone();
    let client_id = client.established["client_id"].clone();
    let confirmed = client.ask(&json!({"type": "subscribe", "project_id": "p"})).await;
    process.publish(&numbered(1)).await;
    assert_eq!(client.next_event().await["offset"], 1);
    process.terminate();
    appointment(&client.next_event().await);
    assert_eq!(client.close_code().await, 1012);
    process.stopped().await;
    let process = Process::with_drain(folder.path(), 0);
    process.publish(&numbered(2)).await;
    let mut client = process.connect().await;
    let positions = json!({"p": {"epoch": confirmed["epoch"], "offset": 1}});
    let resumed = client.ask(&json!({"type": "resume", "token": token, "positions": positions})).await;
    assert_eq!((&resumed["type"], &resumed["client_id"]), (&json!("connection.resumed"), &client_id));
    assert_eq!(client.next_event().await["recovered"], true);
    assert_eq!(client.next_event().await["offset"], 2);
    process.stop().await;
}

#[tokio::test]
async fn a_stream_of_events_is_told_when_to_come_back_and_ends() {
    let service = Service::with(&LONG);
    let mut client = Client::connect(&service).await;
    let mut stream = Stream::of_p(&service).await;
    service.publish(&numbered(1)).await;
    service.ask_to_stop();
    let mut told = stream.next().await;
    if told.message["type"] == "a.b" {
        told = stream.next().await;
    }
    let (_, away_ms) = appointment(&told.message);
    assert_eq!((told.retry, told.id), (Some(away_ms), None));
    // At once, while others stay.
    while let Some(sent) = stream.next_or_end().await {
        assert_eq!(sent.message["number"], 1);
    }
    appointment(&client.next_event().await);
    client.nothing_waits().await;
    client.close().await;
    assert_eq!(service.ended().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_drain() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::with_drain(folder.path(), 3600);
    let mut client = process.connect().await;
    process.terminate();
    appointment(&client.next_event().await);
    timeout(DEADLINE, process.stop()).await.expect("the end in time");
}

#[tokio::test]
async fn who_takes_nothing_is_cut_off_some_time_after_the_drain() {
    let service = Service::with(&[("TIDINGS_DRAIN_SECONDS", "1")]);
    let mut full = Raw::narrow(&service).await;
    full.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    let data = "x".repeat(500_000);
    for number in 1..=10 {
        service.publish(&json!({"type": "a.b", "project_id": "p", "number": number, "data": data})).await;
    }
    until("its socket being full", || async {
        service.metric("tidings_retained_bytes").await > 0.5
            || service.metric("tidings_subscriptions_behind_total").await > 0.5
    })
    .await;
    service.ask_to_stop();
    assert_eq!(timeout(DEADLINE + Duration::from_secs(10), service.ended()).await, Ok(1));
}
