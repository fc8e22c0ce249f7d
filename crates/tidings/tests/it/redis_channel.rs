//! The plain channel of a real Redis.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    client::Client,
    fixture::{Redis, Service, report, until},
};

fn service(redis: &Redis) -> Service {
    Service::with(&[("REDIS_URL", &redis.url()), ("TIDINGS_ENGINE", "embedded")])
}

async fn connected(service: &Service) {
    until("listening to Redis", || async { service.health().await["redis_connected"] == true }).await;
}

/// A Redis, a service that listens to it, and a client that follows project `p`.
async fn listening() -> (Redis, Service, Client) {
    let redis = Redis::started().await;
    let service = service(&redis);
    connected(&service).await;
    let client = Client::subscribed(&service, "p").await;
    (redis, service, client)
}

#[tokio::test]
async fn what_any_code_publishes_reaches_subscribers_in_order() {
    let (redis, service, mut client) = listening().await;
    let mut other = Client::subscribed(&service, "q").await;
    for current in 1..=50 {
        let message = json!({"type": "task.progress", "timestamp": "2026-11-23T01:56:28.960767", "task_id": "t",
            "project_id": "p", "progress": {"current": current, "total": 50}, "message": null});
        assert_eq!(redis.publish(message.to_string().as_bytes()).await, 1);
    }
    for current in 1..=50 {
        let event = client.next().await;
        assert_eq!((&event["progress"]["current"], &event["offset"]), (&json!(current), &json!(current)));
        assert_eq!(event["progress"]["percentage"], current * 2);
    }
    other.nothing_waits().await;
}

#[tokio::test]
async fn rubbish_on_the_channel_is_counted_and_disturbs_nothing() {
    let (redis, service, mut client) = listening().await;
    for rubbish in [
        &b"not json"[..],
        b"\xff\xfe",
        b"",
        b"[]",
        br#"{"type":"task.progress","project_id":"p","task_id":"t","progress":5}"#,
        br#"{"type":"system.heartbeat","timestamp":"2026-11-23T01:56:28.960767"}"#,
    ] {
        redis.publish(rubbish).await;
    }
    redis.publish(br#"{"type":"a.b","project_id":"p"}"#).await;
    assert_eq!(client.next().await["offset"], 1);
    for (reason, count) in [("invalid_json", 3.0), ("invalid_event", 2.0), ("reserved_type", 1.0)] {
        let name = format!(r#"tidings_events_rejected_total{{source="redis_channel",reason="{reason}"}}"#);
        assert!((service.metric(&name).await - count).abs() < 0.1, "{name}");
    }
}

#[tokio::test]
async fn what_is_published_while_redis_is_busy_still_comes() {
    let (redis, service, mut client) = listening().await;
    redis.pause();
    let is_down = || async { service.metric(r#"tidings_source_up{source="redis_channel"}"#).await < 0.5 };
    until("the silence being noticed", is_down).await;
    assert_eq!(service.health().await["redis_connected"], false);
    let publishing = redis.publish_in_background(br#"{"type":"a.b","project_id":"p"}"#);
    redis.go_on();
    assert_eq!(publishing.join().unwrap(), 1);
    assert_eq!(client.next().await["offset"], 1);
    connected(&service).await;
    // A source has recovered when it is heard for a moment.
    client.until_notices(2).await;
    let told: Vec<_> = client.notices.iter().map(|notice| (&notice["type"], &notice["gap"])).collect();
    assert_eq!(
        told,
        [(&json!("system.degraded"), &Value::Null), (&json!("system.recovered"), &json!("none"))]
    );
    let losses = service.metric(r#"tidings_source_losses_total{source="redis_channel"}"#).await;
    assert!((losses - 1.0).abs() < 0.1, "{losses}");
}

/// Stands between the service and Redis. Connections opened before a freeze stay open and carry nothing any more, as when
/// a firewall forgets them; later ones work.
struct Proxy {
    url: String,
    generation: Arc<AtomicUsize>,
}

impl Proxy {
    async fn before(redis: &Redis) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://{}", listener.local_addr().unwrap());
        let (generation, tasks, port) = (Arc::new(AtomicUsize::new(0)), TaskTracker::new(), redis.port());
        let (current, connections) = (Arc::clone(&generation), tasks.clone());
        tasks.spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let current = Arc::clone(&current);
                connections.spawn(async move {
                    let born = current.load(Ordering::Relaxed);
                    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let frozen = until("a freeze", || async { current.load(Ordering::Relaxed) > born });
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        () = frozen => std::future::pending().await,
                    }
                });
            }
        });
        Self { url, generation }
    }

    fn freeze(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_connection_that_died_without_a_word_is_replaced() {
    let redis = Redis::started().await;
    let proxy = Proxy::before(&redis).await;
    let service = Service::with(&[("REDIS_URL", &proxy.url), ("TIDINGS_ENGINE", "embedded")]);
    connected(&service).await;
    let mut client = Client::subscribed(&service, "p").await;
    redis.publish(br#"{"type":"a.b","project_id":"p"}"#).await;
    assert_eq!(client.next().await["offset"], 1);
    proxy.freeze();
    until("the silence being noticed", || async { service.health().await["redis_connected"] == false }).await;
    connected(&service).await;
    redis.publish(br#"{"type":"a.b","project_id":"p"}"#).await;
    assert_eq!(client.next().await["offset"], 2);
}

#[tokio::test]
async fn redis_away_at_the_start_or_restarted_is_said_and_mended() {
    let mut redis = Redis::reserved();
    let service = service(&redis);
    let mut client = Client::subscribed(&service, "p").await;
    for round in 1..=3 {
        let health = service.health().await;
        assert_eq!((&health["status"], &health["redis_connected"]), (&json!("degraded"), &json!(false)));
        assert_eq!(crate::fixture::request("GET", &service.url("/readyz"), &[], b"").await.status, 503);
        assert_eq!(crate::fixture::request("GET", &service.url("/livez"), &[], b"").await.status, 200);
        // Everything else goes on.
        service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
        assert_eq!(client.next().await["offset"], 2 * round - 1);
        redis.start().await;
        let back = Instant::now();
        connected(&service).await;
        report(format_args!("subscribed again {:?} after Redis came back", back.elapsed()));
        assert_eq!(service.health().await["status"], "healthy");
        redis.publish(br#"{"type":"a.b","project_id":"p"}"#).await;
        assert_eq!(client.next().await["offset"], 2 * round);
        redis.kill();
        until("the loss being noticed", || async { service.health().await["redis_connected"] == false })
            .await;
    }
    let losses = service.metric(r#"tidings_source_losses_total{source="redis_channel"}"#).await;
    assert!((losses - 3.0).abs() < 0.1, "{losses}");
}
