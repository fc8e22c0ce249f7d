//! A node without sockets: connections that read their outbox.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tidings_engine::{
    Node, NodeOptions,
    connection::{Connection, Greeting},
    engine::HistoryLimits,
    outbox::{Next, Outbox},
};
use tidings_protocol::CloseCode;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::event;

const OUTBOX_BYTES_MAX: usize = 256 * 1024;

/// Must be called inside a runtime; the node's upkeep ends with it.
fn node() -> Arc<Node> {
    let greeting = Greeting {
        node: "n1".into(),
        heartbeat_interval: 30,
        subscriptions_max: 500,
        outbox_bytes_max: OUTBOX_BYTES_MAX,
    };
    let options = NodeOptions { greeting, history: HistoryLimits::default() };
    Arc::new(Node::embedded(options, &TaskTracker::new(), CancellationToken::new()))
}

struct Client {
    connection: Connection,
    outbox: Arc<Outbox>,
    read: std::collections::VecDeque<Value>,
}

impl Client {
    async fn connect(node: &Node) -> Self {
        let connection = node.connect().await.unwrap();
        let outbox = connection.outbox();
        let mut client = Self { connection, outbox, read: std::collections::VecDeque::new() };
        assert_eq!(client.next().await["type"], "connection.established");
        client
    }

    async fn send(&mut self, message: &Value) {
        self.connection.receive(&message.to_string()).await;
    }

    async fn subscribe(&mut self, project: &str) -> Value {
        self.send(&json!({"type": "subscribe", "project_id": project})).await;
        self.next().await
    }

    async fn next(&mut self) -> Value {
        if self.read.is_empty() {
            match self.outbox.next().await {
                Next::Write(messages) => {
                    self.read
                        .extend(messages.iter().map(|json| serde_json::from_slice::<Value>(json).unwrap()));
                }
                Next::Close(code) => panic!("closed with {code:?}"),
            }
        }
        self.read.pop_front().unwrap()
    }

    /// Everything that waits now.
    async fn rest(&mut self) -> Vec<Value> {
        self.send(&json!({"type": "ping", "id": "rest"})).await;
        let mut rest = Vec::new();
        loop {
            let message = self.next().await;
            if message["id"] == "rest" {
                return rest;
            }
            rest.push(message);
        }
    }
}

fn progress(project: &str, current: u32) -> tidings_protocol::Event {
    let progress = json!({"current": current, "total": 100});
    event(&json!({"type": "task.progress", "project_id": project, "task_id": "t", "progress": progress}))
}

#[tokio::test]
async fn only_subscribers_of_the_project_get_its_events() {
    let node = node();
    let (mut ours, mut other) = (Client::connect(&node).await, Client::connect(&node).await);
    ours.subscribe("p").await;
    other.subscribe("q").await;
    node.publish(vec![progress("p", 1), progress("p", 2)]).await.unwrap();
    let offsets: Vec<_> = ours.rest().await.iter().map(|event| event["offset"].clone()).collect();
    assert_eq!(offsets, [1, 2]);
    assert!(other.rest().await.is_empty());
}

#[tokio::test]
async fn a_filter_lets_only_its_types_through_and_a_second_subscribe_replaces_the_first() {
    let node = node();
    let mut client = Client::connect(&node).await;
    client.send(&json!({"type": "subscribe", "project_id": "p", "types": ["file.*"], "id": 1})).await;
    assert_eq!(client.next().await["id"], 1);
    node.publish(vec![progress("p", 1)]).await.unwrap();
    assert!(client.rest().await.is_empty());
    client.send(&json!({"type": "subscribe", "project_id": "p", "types": ["task.*"], "id": 2})).await;
    let confirmed = client.next().await;
    assert_eq!(
        (&confirmed["id"], &confirmed["offset"], &confirmed["recovered"]),
        (&json!(2), &json!(1), &Value::Null)
    );
    assert_eq!(confirmed["state"]["tasks"][0]["progress"]["current"], 1);
    node.publish(vec![progress("p", 2)]).await.unwrap();
    assert_eq!(client.rest().await.len(), 1);
    assert_eq!(node.counts().subscriptions, 1);
}

#[tokio::test]
async fn what_was_missed_comes_before_what_is_live() {
    let node = node();
    let mut client = Client::connect(&node).await;
    let epoch = client.subscribe("p").await["epoch"].clone();
    client.send(&json!({"type": "unsubscribe", "project_id": "p", "id": "u"})).await;
    let removed = client.next().await;
    assert_eq!((&removed["type"], &removed["reason"]), (&json!("subscription.removed"), &json!("requested")));
    node.publish((1..=5).map(|current| progress("p", current)).collect()).await.unwrap();
    assert!(client.rest().await.is_empty());
    let since = json!({"epoch": epoch, "offset": 2});
    client.send(&json!({"type": "subscribe", "project_id": "p", "since": since})).await;
    node.publish(vec![progress("p", 6)]).await.unwrap();
    let confirmed = client.next().await;
    assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(true), &json!(2)));
    assert!(confirmed.get("state").is_none());
    let offsets: Vec<_> = client.rest().await.iter().map(|event| event["offset"].clone()).collect();
    assert_eq!(offsets, [3, 4, 5, 6]);
    let since = json!({"epoch": "another", "offset": 2});
    client.send(&json!({"type": "subscribe", "project_id": "p", "since": since})).await;
    let confirmed = client.next().await;
    assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(false), &json!(6)));
    assert_eq!(confirmed["state"]["tasks"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn what_a_replay_left_out_is_told_as_folded() {
    let node = node();
    let mut client = Client::connect(&node).await;
    let epoch = client.subscribe("p").await["epoch"].clone();
    client.send(&json!({"type": "unsubscribe", "project_id": "p"})).await;
    node.publish((0..400).map(|current| progress("p", current)).collect()).await.unwrap();
    client.rest().await;
    for types in [json!(["*"]), json!(["task.progress"])] {
        let since = json!({"epoch": epoch, "offset": 0});
        client.send(&json!({"type": "subscribe", "project_id": "p", "since": since, "types": types})).await;
        assert_eq!(client.next().await["recovered"], true);
        let mut last = 0;
        for event in client.rest().await {
            let offset = event["offset"].as_u64().unwrap();
            assert_eq!(offset, last + 1 + event["folded"].as_u64().unwrap_or(0), "{event}");
            last = offset;
        }
        assert_eq!(last, 400);
    }
}

#[tokio::test]
async fn a_client_that_asks_without_reading_is_not_answered_further() {
    let node = node();
    let mut client = Client::connect(&node).await;
    let data = "x".repeat(OUTBOX_BYTES_MAX);
    node.publish(vec![event(
        &json!({"type": "task.started", "project_id": "p", "task_id": "t", "task_name": data}),
    )])
    .await
    .unwrap();
    client.outbox.replay_room().await;
    client.send(&json!({"type": "subscribe", "project_id": "p"})).await;
    let waiting = tokio::time::timeout(Duration::from_millis(50), client.outbox.replay_room()).await;
    assert!(waiting.is_err(), "there is no room before the client has read");
    assert_eq!(client.next().await["type"], "subscription.confirmed");
    client.outbox.replay_room().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_is_published_while_subscriptions_start_arrives_once() {
    let node = node();
    let publishing = CancellationToken::new();
    let publisher = {
        let (node, publishing) = (Arc::clone(&node), publishing.clone());
        let tasks = TaskTracker::new();
        tasks.spawn(async move {
            let mut published: u32 = 0;
            while !publishing.is_cancelled() {
                node.publish(vec![progress("p", published)]).await.unwrap();
                published += 1;
                tokio::task::yield_now().await;
            }
        })
    };
    let mut epoch = Value::Null;
    let mut since: Option<u64> = None;
    for round in 0..300 {
        let mut client = Client::connect(&node).await;
        let mut subscribe = json!({"type": "subscribe", "project_id": "p"});
        if let Some(offset) = since.filter(|_| round % 2 == 0) {
            subscribe["since"] = json!({"epoch": epoch, "offset": offset});
        }
        client.send(&subscribe).await;
        let confirmed = client.next().await;
        epoch = confirmed["epoch"].clone();
        let mut expected = confirmed["offset"].as_u64().unwrap();
        // A replay may leave out progress that was replaced, but live events have no hole.
        let recovered = confirmed["recovered"] == true;
        for _ in 0..20 {
            let offset = client.next().await["offset"].as_u64().unwrap();
            assert!(offset == expected + 1 || (recovered && offset > expected), "{offset} after {expected}");
            expected = offset;
        }
        since = Some(expected);
    }
    publishing.cancel();
    publisher.await.unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_as_too_slow_and_delays_nobody() {
    let node = node();
    let (mut slow, mut quick) = (Client::connect(&node).await, Client::connect(&node).await);
    slow.subscribe("p").await;
    quick.subscribe("p").await;
    let large = "x".repeat(OUTBOX_BYTES_MAX / 4);
    for number in 0..8 {
        let large = event(&json!({"type": "a.b", "project_id": "p", "number": number, "large": large}));
        node.publish(vec![large]).await.unwrap();
        assert_eq!(quick.next().await["number"], number);
    }
    assert_eq!(slow.outbox.next().await, Next::Close(CloseCode::TooSlow));
    slow.outbox.too_slow().await;
}

#[tokio::test]
async fn one_message_larger_than_the_outbox_still_fits_alone() {
    let node = node();
    let mut client = Client::connect(&node).await;
    client.subscribe("p").await;
    let large = "x".repeat(2 * OUTBOX_BYTES_MAX);
    node.publish(vec![event(&json!({"type": "a.b", "project_id": "p", "large": large}))]).await.unwrap();
    assert_eq!(client.next().await["offset"], 1);
}

#[tokio::test]
async fn a_heartbeat_tells_the_positions_that_moved_and_no_others() {
    let node = node();
    let mut client = Client::connect(&node).await;
    client.subscribe("p").await;
    client.send(&json!({"type": "subscribe", "project_id": "q", "types": ["file.*"]})).await;
    client.next().await;
    client.subscribe("still").await;
    node.publish(vec![progress("p", 1), progress("q", 1), event(&json!({"type": "notice.posted"}))])
        .await
        .unwrap();
    client.rest().await;
    let heartbeat = client.connection.heartbeat();
    heartbeat.send();
    // What a filter dropped counts as told: it was not for this connection.
    assert_eq!(client.next().await["positions"], json!({"*": 1, "p": 1, "q": 1}));
    heartbeat.send();
    assert_eq!(client.next().await["positions"], json!({}));
}

#[tokio::test]
async fn announcements_reach_everybody_and_can_be_replayed() {
    let node = node();
    let mut client = Client::connect(&node).await;
    let created = event(&json!({"type": "project.created", "data": {"id": "new"}}));
    node.publish(vec![created, event(&json!({"type": "notice.posted"}))]).await.unwrap();
    let announced = client.rest().await;
    assert_eq!(
        (announced.len(), &announced[0]["stream"], &announced[0]["project_id"]),
        (2, &json!("*"), &json!("new"))
    );
    let mut late = node.connect().await.unwrap();
    let Next::Write(messages) = late.outbox().next().await else { panic!("closed") };
    let established: Value = serde_json::from_slice(&messages[0]).unwrap();
    assert_eq!(established["announcements"]["offset"], 2);
    let since = json!({"epoch": established["announcements"]["epoch"], "offset": 0});
    late.receive(&json!({"type": "subscribe", "project_id": "*", "since": since}).to_string()).await;
    let Next::Write(messages) = late.outbox().next().await else { panic!("closed") };
    let types: Vec<_> =
        messages.iter().map(|json| serde_json::from_slice::<Value>(json).unwrap()["type"].clone()).collect();
    assert_eq!(types, ["subscription.confirmed", "project.created", "notice.posted"]);
    assert_eq!(node.counts().subscriptions, 0, "the announcements are no subscription");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_dropped_leaves_nothing_behind() {
    let node = node();
    {
        let mut client = Client::connect(&node).await;
        for project in 0..100 {
            client.subscribe(&format!("p{project}")).await;
        }
        assert_eq!((node.counts().connections, node.counts().subscriptions), (1, 100));
    }
    assert_eq!(node.counts(), tidings_engine::hub::HubCounts::default());
    node.publish(vec![progress("p0", 1)]).await.unwrap();
}

#[tokio::test]
async fn closing_lets_what_waits_go_first() {
    let node = node();
    let mut client = Client::connect(&node).await;
    client.subscribe("p").await;
    node.publish(vec![progress("p", 1)]).await.unwrap();
    node.close_all(CloseCode::ServiceRestart);
    assert_eq!(client.next().await["offset"], 1);
    let next = tokio::time::timeout(Duration::from_secs(10), client.outbox.next()).await.unwrap();
    assert_eq!(next, Next::Close(CloseCode::ServiceRestart));
}
