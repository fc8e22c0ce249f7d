//! Connections: who gets what, who is told what, and that nobody waits for anybody.

use std::sync::Arc;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    client::{Client, frame, raw, raw_close_code},
    fixture::{Service, report, until},
};

#[tokio::test]
async fn a_client_connects_and_is_greeted() {
    let service = Service::with(&[("CONTAINER_ID", "web-1")]);
    let client =
        Client::with_headers(&service, &[("sec-websocket-protocol", "other, tidings.v1")]).await.unwrap();
    let established = &client.established;
    assert_eq!((&established["node"], &established["protocol"]), (&json!("web-1"), &json!(1)));
    assert_eq!(established["heartbeat_interval"], 30);
    assert_eq!(established["announcements"]["offset"], 0);
    assert_eq!(established["subprotocol"], "tidings.v1");
    assert!(established["client_id"].as_str().is_some_and(|id| id.len() == 36));
    assert!(established["resume_token"].as_str().is_some_and(|token| token.len() >= 22));
}

#[tokio::test]
async fn only_subscribed_clients_get_a_projects_events() {
    let service = Service::start();
    let mut ours = Client::subscribed(&service, "p").await;
    let mut others = Client::subscribed(&service, "q").await;
    let mut nobody = Client::connect(&service).await;
    service
        .publish(&json!({"type": "task.started", "project_id": "p", "task_id": "t", "task_name": "n"}))
        .await;
    let event = ours.next().await;
    assert_eq!((&event["type"], &event["offset"]), (&json!("task.started"), &json!(1)));
    others.nothing_waits().await;
    nobody.nothing_waits().await;
    ours.ask(&json!({"type": "unsubscribe", "project_id": "p"})).await;
    service.publish(&json!({"type": "task.completed", "project_id": "p", "task_id": "t"})).await;
    ours.nothing_waits().await;
}

#[tokio::test]
async fn file_events_arrive_with_their_fields() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    let file = json!({"name": "a.mp4", "path": "media/a.mp4", "size": 7, "asset_type": "video"});
    let events = json!([
        {"type": "file.uploaded", "project_id": "p", "file": file},
        {"type": "file.changed", "project_id": "p", "file_path": "media/a.mp4", "change_type": "modified"},
        {"type": "file.deleted", "project_id": "p", "file_path": "media/a.mp4"},
    ]);
    service.publish(&events).await;
    for expected in events.as_array().unwrap() {
        let event = client.next().await;
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&event[key], value, "{event}");
        }
        assert!(event["timestamp"].as_str().unwrap().ends_with('Z'));
    }
}

#[tokio::test]
async fn a_disconnect_is_noticed_whether_it_is_clean_or_not() {
    let service = Service::start();
    let clean = Client::subscribed(&service, "p").await;
    let cut = Client::subscribed(&service, "p").await;
    assert_eq!(service.health().await["active_connections"], 2);
    clean.close().await;
    drop(cut);
    until("both connections ending", || async { service.health().await["active_connections"] == 0 }).await;
    assert!(service.metric("tidings_connections_closed_total{code=\"1005\"}").await >= 1.0);
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
}

#[tokio::test]
async fn a_clean_close_is_answered() {
    let service = Service::start();
    let mut socket = raw(service.address).await;
    socket.write_all(&frame(0x88, &1000_u16.to_be_bytes())).await.unwrap();
    assert_eq!(raw_close_code(socket).await, 1000);
    until("the connection ending", || async {
        service.metric("tidings_connections_closed_total{code=\"1000\"}").await > 0.5
    })
    .await;
}

#[tokio::test]
async fn heartbeats_keep_a_connection_alive_through_three_intervals() {
    let service = Service::with(&[("WS_HEARTBEAT_INTERVAL", "1")]);
    let mut client = Client::subscribed(&service, "p").await;
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    assert_eq!(client.next().await["type"], "a.b");
    for beat in 0..3 {
        let heartbeat = client.next().await;
        let positions = if beat == 0 { json!({"p": 1}) } else { json!({}) };
        assert_eq!((&heartbeat["type"], &heartbeat["positions"]), (&json!("system.heartbeat"), &positions));
    }
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    assert_eq!(client.next_event().await["offset"], 2);
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_dropped() {
    let service = Service::with(&[("WS_HEARTBEAT_INTERVAL", "1")]);
    let mut silent = raw(service.address).await;
    let mut sent = Vec::new();
    // The end of the stream, or a reset: the server does not wait for an answer from one that is gone.
    let _ = tokio::time::timeout(crate::fixture::DEADLINE, silent.read_to_end(&mut sent))
        .await
        .expect("an end in time");
    assert!(sent.windows(2).any(|frame| frame == [0x89, 0]), "a ping was sent");
    until("the connection ending", || async { service.health().await["active_connections"] == 0 }).await;
}

#[tokio::test]
async fn a_thousand_clients_at_once_get_every_event() {
    const CLIENTS: usize = 1000;
    const EVENTS: usize = 20;
    let service = Arc::new(Service::start());
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let service = Arc::clone(&service);
        clients.spawn(async move { Client::subscribed(&service, "p").await });
    }
    let clients = clients.join_all().await;
    assert_eq!(service.health().await["active_connections"], CLIENTS);
    let events: Vec<_> =
        (0..EVENTS).map(|number| json!({"type": "a.b", "project_id": "p", "number": number})).collect();
    service.publish(&json!(events)).await;
    let mut readers = JoinSet::new();
    for mut client in clients {
        readers.spawn(async move {
            for number in 0..EVENTS {
                let event = client.next().await;
                assert_eq!((&event["number"], &event["offset"]), (&json!(number), &json!(number + 1)));
            }
        });
    }
    readers.join_all().await;
}

#[tokio::test]
async fn events_of_ten_subscriptions_go_out_in_one_write() {
    // What is published together arrives together there; from Redis each stream comes by itself.
    let service = Service::with(&[("TIDINGS_SHARDS", "1"), ("TIDINGS_ENGINE", "embedded")]);
    let mut client = Client::connect(&service).await;
    let projects: Vec<_> = (0..10).map(|number| format!("p{number}")).collect();
    for project in &projects {
        client.ask(&json!({"type": "subscribe", "project_id": project})).await;
    }
    let writes = async || service.metric("tidings_socket_writes_total").await;
    let events: Vec<_> =
        projects.iter().map(|project| json!({"type": "a.b", "project_id": project})).collect();
    let mut counts = Vec::new();
    // The shard may wake up in the middle of the request, on another thread; hardly ever time after time.
    while counts.last() != Some(&1.0) {
        let before = writes().await;
        service.publish(&json!(events)).await;
        let mut seen: Vec<_> = Vec::new();
        for _ in &projects {
            seen.push(client.next().await["project_id"].as_str().unwrap().to_owned());
        }
        seen.sort();
        assert_eq!(seen, projects);
        counts.push(writes().await - before);
        assert!(counts.len() < 20, "one write for all of them: {counts:?}");
    }
}

#[tokio::test]
async fn a_large_message_does_not_block_others() {
    let service = Arc::new(Service::start());
    let mut large_clients = JoinSet::new();
    for _ in 0..20 {
        let mut client = Client::subscribed(&service, "large").await;
        large_clients.spawn(async move {
            for number in 0..5 {
                let event = client.next().await;
                assert_eq!(
                    (&event["number"], event["data"].as_str().map(str::len)),
                    (&json!(number), Some(1_000_000))
                );
            }
        });
    }
    let mut small = Client::subscribed(&service, "small").await;
    let publisher = {
        let service = Arc::clone(&service);
        TaskTracker::new().spawn(async move {
            for number in 0..5 {
                let data = "x".repeat(1_000_000);
                service
                    .publish(&json!({"type": "a.b", "project_id": "large", "number": number, "data": data}))
                    .await;
            }
        })
    };
    let mut latencies = Vec::new();
    while !publisher.is_finished() || latencies.len() < 100 {
        let sent = Instant::now();
        service.publish(&json!({"type": "a.b", "project_id": "small"})).await;
        assert_eq!(small.next().await["type"], "a.b");
        latencies.push(sent.elapsed());
    }
    publisher.await.unwrap();
    large_clients.join_all().await;
    latencies.sort();
    let p99 = latencies[latencies.len() * 99 / 100];
    report(format_args!(
        "small messages beside 1 MB messages to 20 clients: p99 {p99:?} of {}",
        latencies.len()
    ));
}

#[tokio::test]
async fn a_client_that_stops_reading_is_closed_and_delays_nobody() {
    let service = Service::with(&[("TIDINGS_SLOW_BYTES_MAX", "1000000")]);
    let stuck = Client::subscribed(&service, "p").await;
    let mut quick = Client::subscribed(&service, "p").await;
    let data = "x".repeat(200_000);
    // Until the kernel's buffers of the stuck one are full, and more waits for it than may.
    let mut offset = 0;
    while service.metric("tidings_connections_closed_total{code=\"4508\"}").await < 1.0 {
        service.publish(&json!({"type": "a.b", "project_id": "p", "data": data})).await;
        offset += 1;
        assert_eq!(quick.next_event().await["offset"], offset);
        // Its end counts two seconds after it was told, in which a fast machine gets far.
        assert!(offset < 50_000, "the stuck client is closed long before this");
    }
    // What the kernel had taken is read, and then the end, by its code or without one where nothing more went through.
    let mut stuck = stuck;
    stuck.send_text("{}").await;
    drop(stuck);
    quick.nothing_waits().await;
}

#[tokio::test]
async fn a_stopping_node_says_so_and_sends_its_clients_away() {
    let service = Service::start();
    let client = Client::subscribed(&service, "p").await;
    service.ask_to_stop();
    assert_eq!(client.close_code().await, 1012);
}

#[tokio::test]
async fn a_page_of_another_site_may_not_connect() {
    let service = Service::start();
    let refused = Client::with_headers(&service, &[("origin", "https://evil.example")]).await.err().unwrap();
    let tokio_tungstenite::tungstenite::Error::Http(response) = refused else { panic!("{refused}") };
    assert_eq!(response.status(), 403);
    assert!(Client::with_headers(&service, &[("origin", "http://localhost:3000")]).await.is_ok());
    // Without an origin it is no page.
    Client::connect(&service).await;
}
