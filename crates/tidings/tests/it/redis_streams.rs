//! Several services that share their streams in one Redis. What becomes of them when processes die is in `tests/nodes`.

use serde_json::{Value, json};

use crate::{
    client::Client,
    fixture::{Redis, Service, request, until},
};

fn services<const N: usize>(redis: &Redis) -> [Service; N] {
    std::array::from_fn(|_| Service::with(&[("REDIS_URL", &redis.url())]))
}

async fn ready(service: &Service) {
    until("readiness", || async { request("GET", &service.url("/readyz"), &[], b"").await.status == 200 })
        .await;
}

#[tokio::test]
async fn a_connection_is_resumed_at_another_node_and_the_former_one_is_closed() {
    let redis = Redis::started().await;
    let [one, other] = services(&redis);
    let mut former = Client::connect(&one).await;
    for (project, types) in [("p", json!(["*"])), ("q", json!(["task.*"]))] {
        let confirmed =
            former.ask(&json!({"type": "subscribe", "project_id": project, "types": types})).await;
        assert_eq!(confirmed["type"], "subscription.confirmed");
    }
    one.publish(&json!({"type": "a.b", "project_id": "p", "n": 1})).await;
    let first = former.next().await;
    assert_eq!(first["offset"], 1);
    let (token, id) = (former.established["resume_token"].clone(), former.established["client_id"].clone());
    let place = other.publish(&json!({"type": "a.b", "project_id": "p", "n": 2})).await["events"][0].clone();
    let position = json!({"epoch": place["epoch"], "offset": 1});
    // The former one still looks alive.
    let mut later = Client::connect(&other).await;
    let resumed = later.ask(&json!({"type": "resume", "token": token, "positions": {"p": position}})).await;
    assert_eq!((&resumed["type"], &resumed["client_id"]), (&json!("connection.resumed"), &id), "{resumed}");
    assert_eq!(resumed["subscriptions"], json!(["p", "q"]));
    assert_eq!(former.close_code().await, 4510);
    // Each subscription when it is read, the event that was missed behind its own.
    let mut told = [later.next().await, later.next().await, later.next().await];
    told.sort_by_key(|message| message["project_id"].to_string());
    let [confirmed, missed, other] = told;
    assert_eq!(
        (&confirmed["type"], &confirmed["recovered"]),
        (&json!("subscription.confirmed"), &json!(true))
    );
    assert_eq!(missed["n"], 2);
    assert_eq!((&other["project_id"], &other["recovered"]), (&json!("q"), &Value::Null));
    // The filter has come along.
    one.publish(&json!([{"type": "a.b", "project_id": "q"}, {"type": "task.completed", "project_id": "q", "task_id": "t"}])).await;
    assert_eq!(later.next().await["type"], "task.completed");
    // The token was good once.
    let mut again = Client::connect(&one).await;
    let expired = again.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(expired["code"], "resume_expired");
}

#[tokio::test]
async fn a_redis_that_stands_still_refuses_publishers_in_time_and_keeps_clients() {
    let redis = Redis::started().await;
    let [service] = services(&redis);
    ready(&service).await;
    let mut client = Client::subscribed(&service, "p").await;
    redis.pause();
    let event = json!({"type": "a.b", "project_id": "p", "id": "one"}).to_string();
    let publish = async || request("POST", &service.url("/api/events"), &[], event.as_bytes()).await;
    let refused = publish().await;
    assert_eq!(refused.status, 503, "{}", refused.text);
    until("the silence being noticed", || async { service.health().await["redis_connected"] == false }).await;
    assert_eq!(request("GET", &service.url("/readyz"), &[], b"").await.status, 503);
    assert_eq!(request("GET", &service.url("/livez"), &[], b"").await.status, 200);
    // It is served as if nothing were; somebody who comes for the same project is, too.
    client.nothing_waits().await;
    let mut other = Client::subscribed(&service, "p").await;
    redis.go_on();
    ready(&service).await;
    // Whether it was appended was not known; its id makes it one event.
    assert_eq!(publish().await.status, 202);
    for client in [&mut client, &mut other] {
        assert_eq!(client.next().await["id"], "one");
        client.nothing_waits().await;
        // A source has recovered when it is heard for a moment.
        client.until_notices(2).await;
        let told = client.notices.iter().map(|notice| notice["type"].clone());
        assert_eq!(told.collect::<Vec<Value>>(), ["system.degraded", "system.recovered"]);
    }
}

#[tokio::test]
async fn what_is_added_to_the_ingest_stream_before_a_node_is_up_comes_in_order() {
    let redis = Redis::started().await;
    let mut connection = redis.connection().await.unwrap();
    let mut add = async |event: &str| {
        let mut add = redis::cmd("XADD");
        add.arg("tidings:ingest").arg("*").arg("event").arg(event);
        add.exec_async(&mut connection).await.unwrap();
    };
    for n in 0..250 {
        add(&json!({"type": "a.b", "project_id": format!("p{}", n % 2), "n": n}).to_string()).await;
    }
    add("rubbish").await;
    let [service, _other] = services(&redis);
    let history = |project: &'static str| {
        let url = service.url(&format!("/api/projects/{project}/events?limit=1000"));
        async move { request("GET", &url, &[], b"").await.json()["events"].as_array().unwrap().clone() }
    };
    for (start, project) in [(0, "p0"), (1, "p1")] {
        until("all entries", || async { history(project).await.len() >= 125 }).await;
        let numbers: Vec<_> =
            history(project).await.iter().map(|event| event["n"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (start..250).step_by(2).collect::<Vec<_>>());
    }
    let length = |stream: &'static str| {
        let mut connection = connection.clone();
        async move { redis::cmd("XLEN").arg(stream).query_async::<u64>(&mut connection).await.unwrap() }
    };
    until("entries being removed", || async { length("tidings:ingest").await == 0 }).await;
    assert_eq!(length("tidings:rejected").await, 1);
}

/// A node that keeps its own streams reads the ingest stream, too.
#[tokio::test]
async fn an_embedded_node_reads_the_ingest_stream() {
    let redis = Redis::started().await;
    let service = Service::with(&[("REDIS_URL", &redis.url()), ("TIDINGS_ENGINE", "embedded")]);
    let mut client = Client::subscribed(&service, "p").await;
    let mut connection = redis.connection().await.unwrap();
    for n in 0..3 {
        let event = json!({"type": "a.b", "project_id": "p", "n": n}).to_string();
        let mut add = redis::cmd("XADD");
        add.arg("tidings:ingest").arg("*").arg("event").arg(event);
        add.exec_async(&mut connection).await.unwrap();
    }
    for n in 0..3 {
        assert_eq!(client.next().await["n"], n);
    }
}
