//! permessage-deflate (RFC 7692) as it looks on the wire.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};

use crate::{
    client::{Client, Raw, frame},
    fixture::Service,
};

const OFFER: &str = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";

async fn connect(service: &Service, headers: &str) -> Raw {
    Raw::over(TcpStream::connect(service.address).await.unwrap(), headers, b"").await
}

/// The value of the answer's `Sec-WebSocket-Extensions`, if it has one.
fn agreed(client: &Raw) -> Option<Vec<String>> {
    let line = client.head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("sec-websocket-extensions").then_some(value)
    });
    line.map(|value| value.split(';').map(|part| part.trim().to_owned()).collect())
}

pub(crate) fn deflated(message: &[u8]) -> Vec<u8> {
    let mut deflated = Vec::with_capacity(message.len() + 100);
    let mut compress = Compress::new(Compression::default(), false);
    compress.compress_vec(message, &mut deflated, FlushCompress::Sync).unwrap();
    assert!(deflated.ends_with(&[0, 0, 0xFF, 0xFF]));
    deflated.truncate(deflated.len() - 4);
    deflated
}

/// Inflates a message by itself: nothing of another one is needed for it.
fn inflated(payload: &[u8]) -> Value {
    let payload = [payload, &[0, 0, 0xFF, 0xFF]].concat();
    let mut inflated = Vec::with_capacity(1 << 20);
    Decompress::new(false).decompress_vec(&payload, &mut inflated, FlushDecompress::Sync).unwrap();
    serde_json::from_slice(&inflated).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&inflated)))
}

/// The next message, and whether it was compressed.
async fn next(client: &mut Raw) -> (bool, Value) {
    let mut read = client.frame().await.unwrap();
    while read.0 == 0x89 {
        client.send(&frame(0x8A, &read.1)).await;
        read = client.frame().await.unwrap();
    }
    match read {
        (0xC1, payload) => (true, inflated(&payload)),
        (0x81, payload) => (false, serde_json::from_slice(&payload).unwrap()),
        (first, payload) => panic!("unexpected {first:#x} with {payload:?}"),
    }
}

/// Greeted and subscribed to `p`.
async fn subscribed(service: &Service, headers: &str) -> Raw {
    let mut client = connect(service, headers).await;
    assert_eq!(next(&mut client).await.1["type"], "connection.established");
    client.send_json(&json!({"type": "subscribe", "project_id": "p"})).await;
    assert_eq!(next(&mut client).await.1["type"], "subscription.confirmed");
    client
}

#[tokio::test]
async fn an_offer_is_answered_without_context_takeover_in_either_direction() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true")]);
    let client = connect(&service, OFFER).await;
    let mut agreed = agreed(&client).unwrap();
    assert_eq!(agreed.remove(0), "permessage-deflate");
    agreed.sort();
    assert_eq!(agreed, ["client_no_context_takeover", "server_no_context_takeover"]);
}

#[tokio::test]
async fn nobody_gets_compressed_frames_who_did_not_ask_or_where_they_are_off() {
    for (deflate, headers) in
        [("false", OFFER), ("true", ""), ("true", "Sec-WebSocket-Extensions: x-other\r\n")]
    {
        let service = Service::with(&[("TIDINGS_DEFLATE", deflate)]);
        // Beside one that did.
        let _other = subscribed(&service, OFFER).await;
        let mut client = subscribed(&service, headers).await;
        assert_eq!(agreed(&client), None, "{deflate} {headers}");
        service.publish(&json!({"type": "a.b", "project_id": "p", "data": "x".repeat(5000)})).await;
        let (compressed, event) = next(&mut client).await;
        assert_eq!((compressed, &event["offset"]), (false, &json!(1)));
    }
    assert_eq!(agreed(&connect(&Service::start(), OFFER).await), None, "off by default");
}

#[tokio::test]
async fn events_are_compressed_each_by_itself_where_it_saves_something() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true")]);
    let mut client = subscribed(&service, OFFER).await;
    let mut plain = Client::subscribed(&service, "p").await;
    let large = "abc ".repeat(100_000);
    for (data, compressed) in
        [("short", false), (large.as_str(), true), (&large[..2000], true), ("short", false)]
    {
        service.publish(&json!({"type": "a.b", "project_id": "p", "data": data})).await;
        let event = next(&mut client).await;
        assert_eq!((event.0, &event.1["data"]), (compressed, &json!(data)));
        assert_eq!(event.1, plain.next_event().await, "the same for everybody");
    }
    // What is replayed as well.
    client.send_json(&json!({"type": "unsubscribe", "project_id": "p"})).await;
    next(&mut client).await;
    let page = crate::fixture::request("GET", &service.url("/api/projects/p/events"), &[], b"").await.json();
    let since = json!({"epoch": page["epoch"], "offset": 1});
    client.send_json(&json!({"type": "subscribe", "project_id": "p", "since": since})).await;
    assert_eq!(next(&mut client).await.1["recovered"], true);
    for offset in 2..=4 {
        let (compressed, event) = next(&mut client).await;
        assert_eq!((compressed, &event["offset"]), (offset < 4, &json!(offset)));
    }
}

#[tokio::test]
async fn a_compressed_message_of_a_client_is_understood() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true")]);
    let mut client = subscribed(&service, OFFER).await;
    let ping = json!({"type": "ping", "id": "x".repeat(100)}).to_string();
    // Twice: each is a stream of its own.
    for _ in 0..2 {
        client.send(&frame(0xC1, &deflated(ping.as_bytes()))).await;
        assert_eq!(next(&mut client).await.1["id"], "x".repeat(100));
    }
    // In fragments, of which only the first says that it is compressed, with a ping of the protocol between them.
    let payload = deflated(ping.as_bytes());
    let (first, second) = payload.split_at(5);
    client.send(&[frame(0x41, first), frame(0x89, b"?"), frame(0x80, second)].concat()).await;
    assert_eq!(client.frame().await.unwrap(), (0x8A, b"?".to_vec()));
    assert_eq!(next(&mut client).await.1["type"], "pong");
    // And one that is not.
    client.send_json(&json!({"type": "ping", "id": 3})).await;
    assert_eq!(next(&mut client).await.1["id"], 3);
}

#[tokio::test]
async fn compressed_rubbish_closes_with_its_code() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true")]);
    let bomb = deflated(&vec![b' '; 30 << 20]);
    assert!(bomb.len() < 64 * 1024, "small enough to be read at all");
    let mut padded = json!({"type": "ping"}).to_string();
    padded.push_str(&" ".repeat(64 * 1024));
    for (bytes, code) in [
        (frame(0xC1, &bomb), 1009),
        (frame(0xC1, &deflated(padded.as_bytes())), 1009),
        (frame(0xC1, &[0xFF; 40]), 1002),
        (frame(0xC1, &deflated(b"\xFF\xFE{}")), 1007),
        ([frame(0x01, b"{"), frame(0xC0, b"}")].concat(), 1002),
        (frame(0xC9, b""), 1002),
    ] {
        let mut client = connect(&service, OFFER).await;
        client.send(&bytes).await;
        assert_eq!(next(&mut client).await.1["type"], "connection.established");
        assert_eq!(
            client.next_or_end().await.unwrap_err(),
            Some(code),
            "{:?}",
            &bytes[..10.min(bytes.len())]
        );
    }
    // Without the agreement a compressed frame is a broken one.
    let mut client = connect(&service, "").await;
    client.send(&frame(0xC1, &deflated(b"{\"type\":\"ping\"}"))).await;
    client.next().await;
    assert_eq!(client.next_or_end().await.unwrap_err(), Some(1002));
}

#[tokio::test]
async fn a_client_that_was_behind_gets_folded_events_compressed() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true"), ("TIDINGS_HISTORY_EVENTS", "100000")]);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Raw::over(socket.connect(service.address).await.unwrap(), OFFER, b"").await;
    assert_eq!(next(&mut client).await.1["type"], "connection.established");
    client.send_json(&json!({"type": "subscribe", "project_id": "p"})).await;
    assert_eq!(next(&mut client).await.1["type"], "subscription.confirmed");
    // Words that hardly compress, so that the socket is full soon.
    let mut seed = 1_u64;
    let mut word = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{:016x}", seed ^ (seed >> 29))
    };
    let (mut published, mut more) = (0_u64, 5);
    while more > 0 {
        let mut progress = |current| {
            let message: String = (0..200).map(|_| word()).collect();
            json!({
                "type": "task.progress", "project_id": "p", "task_id": "t",
                "progress": {"current": current, "total": 9_999_999}, "message": message,
            })
        };
        let events: Vec<_> = (published + 1..=published + 50).map(&mut progress).collect();
        published += 50;
        service.publish(&json!(events)).await;
        more -= u64::from(service.metric("tidings_subscriptions_behind_total").await > 0.5);
        assert!(published < 100_000, "it is behind long before this");
    }
    let (mut at, mut folded_sum) = (0, 0);
    while at < published {
        let (compressed, event) = next(&mut client).await;
        let folded = event.get("folded").map_or(0, |folded| folded.as_u64().unwrap());
        at += 1 + folded;
        folded_sum += folded;
        assert_eq!((compressed, &event["offset"]), (true, &json!(at)));
        assert_eq!(event["progress"]["current"], at);
    }
    assert!(folded_sum > 0);
}
