//! Sessions that the application keeps in Redis: who gets in, what he sees, and what follows when that changes.

use serde_json::{Value, json};

use crate::{
    client::Client,
    fixture::{Redis, Service, request, until},
};

/// The application's sessions, in a Redis that is not the one of the streams.
pub(crate) struct Store(pub(crate) Redis);

impl Store {
    pub(crate) async fn started() -> Self {
        Self(Redis::started().await)
    }

    /// A service that knows sessions by these ways, with more settings.
    pub(crate) fn service(&self, ways: &str, more: &[(&str, &str)]) -> Service {
        let url = self.0.url();
        let own = [("TIDINGS_AUTH", ways), ("TIDINGS_SESSION_REDIS_URL", &url)];
        Service::with(&[&own[..], more].concat())
    }

    pub(crate) async fn put_raw(&self, key: &str, value: &[u8]) {
        let mut connection = self.0.connection().await.unwrap();
        redis::cmd("SET").arg(key).arg(value).exec_async(&mut connection).await.unwrap();
    }

    /// A session as the contract has it.
    pub(crate) async fn put(&self, id: &str, session: &Value) {
        self.put_raw(&format!("session:{id}"), session.to_string().as_bytes()).await;
    }

    pub(crate) async fn remove(&self, id: &str) {
        let mut connection = self.0.connection().await.unwrap();
        redis::cmd("DEL").arg(format!("session:{id}")).exec_async(&mut connection).await.unwrap();
    }
}

/// A browser with this cookie, which knows our protocol.
pub(crate) async fn browser(service: &Service, cookie: &str) -> Client {
    let headers = [("cookie", cookie), ("sec-websocket-protocol", "tidings.v1")];
    Client::with_headers(service, &headers).await.unwrap()
}

/// The code and reason with which a browser with these headers is sent away.
pub(crate) async fn turned_away(service: &Service, headers: &[(&'static str, &str)]) -> (u16, String) {
    Client::turned_away(service, &[headers, &[("sec-websocket-protocol", "tidings.v1")]].concat()).await
}

pub(crate) fn subscribe(project: &str) -> Value {
    json!({"type": "subscribe", "project_id": project, "id": project})
}

pub(crate) fn event(project: &str, number: usize) -> Value {
    json!({"type": "custom.happened", "project_id": project, "number": number})
}

#[tokio::test]
async fn a_session_sees_its_projects_and_no_others_and_is_told_why() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    store.put("s1", &json!({"user_id": 7, "projects": ["p1", "team-a/*"]})).await;
    let mut client = browser(&service, "theme=dark; session=s1").await;
    for project in ["p1", "team-a/web"] {
        assert_eq!(client.ask(&subscribe(project)).await["type"], "subscription.confirmed");
    }
    for project in ["p2", "team-b/web", "team-a", "team-a/web/old", "P1", "p\u{661}"] {
        let refused = client.ask(&subscribe(project)).await;
        assert_eq!(
            (&refused["code"], &refused["id"]),
            (&json!("not_authorized"), &json!(project)),
            "{refused}"
        );
        assert_eq!(refused["message"], format!("no right to project {project}"));
        assert!(refused["hint"].as_str().unwrap().contains("p1, team-a/*"), "{refused}");
    }
    // Whether there is such a project makes no difference.
    service.publish(&event("p2", 1)).await;
    let existing = client.ask(&subscribe("p2")).await;
    assert_eq!(existing["message"], "no right to project p2");
    service.publish(&json!([event("p2", 2), event("p1", 3)])).await;
    let seen = client.next_event().await;
    assert_eq!((&seen["project_id"], &seen["number"]), (&json!("p1"), &json!(3)));
    client.nothing_waits().await;
    for (path, status) in [
        ("/api/projects/p1/events", 200),
        ("/api/projects/team-a%2Fweb/events", 200),
        ("/api/projects/p2/events", 403),
        ("/api/projects/nothing/events", 403),
        ("/api/projects/team-a%2F..%2Fp2/events", 400),
        ("/sse?project_id=p2", 403),
    ] {
        let answer = request("GET", &service.url(path), &[("cookie", "session=s1")], b"").await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text);
        if status == 403 {
            assert_eq!(answer.json()["code"], "not_authorized");
        }
        let nobody = request("GET", &service.url(path), &[], b"").await;
        assert!(matches!(nobody.status, 400 | 401), "{path}: {}", nobody.text);
    }
    client.close().await;
}

#[tokio::test]
async fn announcements_reach_those_whose_rights_include_the_project() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    store.put("a", &json!({"user_id": "a", "projects": ["a/*"]})).await;
    store.put("b", &json!({"user_id": "b", "projects": ["b/*"]})).await;
    store.put("all", &json!({"user_id": "c", "projects": "*"})).await;
    let (mut a, mut b, mut all) = (
        browser(&service, "session=a").await,
        browser(&service, "session=b").await,
        browser(&service, "session=all").await,
    );
    let created = |project: &str| json!({"type": "project.created", "data": {"id": project}});
    let news = json!({"type": "news.published"});
    let workspace =
        json!({"type": "workspace.changed", "workspace_id": "w", "changes": {"added": ["secret"]}});
    service.publish(&json!([created("a/1"), created("b/1"), workspace, news, created("b/2")])).await;
    let names = |message: &Value| {
        let project = message["data"]["id"].as_str().unwrap_or_default();
        format!("{} {project}", message["type"].as_str().unwrap()).trim().to_owned()
    };
    for (client, expected) in [
        (&mut a, &["project.created a/1", "news.published"][..]),
        (&mut b, &["project.created b/1", "news.published", "project.created b/2"]),
        (
            &mut all,
            &[
                "project.created a/1",
                "project.created b/1",
                "workspace.changed",
                "news.published",
                "project.created b/2",
            ],
        ),
    ] {
        for expected in expected {
            assert_eq!(names(&client.next_event().await), *expected);
        }
        client.nothing_waits().await;
    }
    // Replayed, and read as history, they are the same.
    let since = a.established["announcements"].clone();
    let confirmed = a.ask(&json!({"type": "subscribe", "project_id": "*", "since": since})).await;
    assert_eq!(
        (&confirmed["type"], &confirmed["recovered"]),
        (&json!("subscription.confirmed"), &json!(true))
    );
    for expected in ["project.created a/1", "news.published"] {
        assert_eq!(names(&a.next_event().await), expected);
    }
    a.nothing_waits().await;
    let url = service.url("/api/projects/*/events");
    let history = request("GET", &url, &[("cookie", "session=a")], b"").await.json();
    let kept: Vec<_> = history["events"].as_array().unwrap().iter().map(names).collect();
    assert_eq!(kept, ["project.created a/1", "news.published"]);
    for client in [a, b, all] {
        client.close().await;
    }
}

#[tokio::test]
async fn whoever_comes_as_soon_as_a_node_is_ready_is_let_in() {
    let store = Store::started().await;
    store.put("s", &json!({"user_id": "u", "projects": ["p"]})).await;
    let url = store.0.url();
    let service = Service::with(&[("REDIS_URL", &url), ("TIDINGS_AUTH", "redis-session")]);
    let is_ready = || async { request("GET", &service.url("/readyz"), &[], b"").await.status == 200 };
    until("the service being ready", is_ready).await;
    // Nothing was ever revoked, and that is known.
    browser(&service, "session=s").await.close().await;
}

#[tokio::test]
async fn a_session_that_ends_takes_its_connections_with_it() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    store.put("s1", &json!({"user_id": "u", "projects": ["p"]})).await;
    store.put("s2", &json!({"user_id": "u", "projects": ["p"]})).await;
    let (mut ends, mut stays) =
        (browser(&service, "session=s1").await, browser(&service, "session=s2").await);
    for client in [&mut ends, &mut stays] {
        client.ask(&subscribe("p")).await;
    }
    store.remove("s1").await;
    let removed = ends.next_event().await;
    assert_eq!(
        (&removed["type"], &removed["reason"]),
        (&json!("subscription.removed"), &json!("expired")),
        "{removed}"
    );
    assert_eq!(ends.close_code().await, 4401);
    assert_eq!(turned_away(&service, &[("cookie", "session=s1")]).await.0, 4401);
    service.publish(&event("p", 1)).await;
    assert_eq!(stays.next_event().await["number"], 1);
    stays.close().await;
}

#[tokio::test]
async fn rights_that_shrink_and_grow_take_effect_on_what_is_connected() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    store.put("s", &json!({"user_id": "u", "projects": ["p", "q"]})).await;
    let mut client = browser(&service, "session=s").await;
    for project in ["p", "q"] {
        client.ask(&subscribe(project)).await;
    }
    store.put("s", &json!({"user_id": "u", "projects": ["q", "r"]})).await;
    let removed = client.next_event().await;
    assert_eq!(
        (&removed["type"], &removed["project_id"], &removed["reason"]),
        (&json!("subscription.removed"), &json!("p"), &json!("rights"))
    );
    service.publish(&json!([event("p", 1), event("q", 2), {"type": "project.updated", "project_id": "p"}, {"type": "project.updated", "project_id": "r"}])).await;
    // Two streams, in either order.
    let mut seen =
        [client.next_event().await, client.next_event().await].map(|event| event["project_id"].clone());
    seen.sort_by_key(ToString::to_string);
    assert_eq!(seen, [json!("q"), json!("r")]);
    client.nothing_waits().await;
    assert_eq!(client.ask(&subscribe("p")).await["code"], "not_authorized");
    assert_eq!(client.ask(&subscribe("r")).await["type"], "subscription.confirmed");
    client.close().await;
}

#[tokio::test]
async fn a_store_that_does_not_answer_gives_no_verdict() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    store.put("s", &json!({"user_id": "u", "projects": ["p"]})).await;
    let mut client = browser(&service, "session=s").await;
    client.ask(&subscribe("p")).await;
    store.0.pause();
    assert_eq!(turned_away(&service, &[("cookie", "session=s")]).await.0, 1013);
    let plain = request("GET", &service.url("/api/projects/p/events"), &[("cookie", "session=s")], b"").await;
    assert_eq!((plain.status, plain.json()["code"].clone()), (503, json!("no_verdict")));
    assert!(plain.headers.contains_key("retry-after"));
    // Once the last answer is too old, nothing is delivered, and nobody is thrown out.
    until("the service noticing", || async { service.health().await["status"] == "degraded" }).await;
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    service.publish(&json!([event("p", 1), event("p", 2)])).await;
    let pong = client.ask(&json!({"type": "ping", "id": "x"})).await;
    assert_eq!(pong["type"], "pong", "{pong}");
    store.0.go_on();
    for number in [1, 2] {
        assert_eq!(client.next_event().await["number"], number);
    }
    until("the service noticing", || async { service.health().await["status"] == "healthy" }).await;
    let types: Vec<_> = client.notices.iter().map(|notice| notice["type"].clone()).collect();
    assert_eq!(types.first(), Some(&json!("system.degraded")));
    client.close().await;
}

#[tokio::test]
async fn a_store_that_is_gone_gives_no_verdict_until_it_is_back() {
    let mut store = Store::started().await;
    let service = store.service("redis-session", &[]);
    let session = json!({"user_id": "u", "projects": ["p"]});
    store.put("s", &session).await;
    let mut client = browser(&service, "session=s").await;
    client.ask(&subscribe("p")).await;
    store.0.kill();
    for cookie in ["session=s", "session=unknown"] {
        assert_eq!(turned_away(&service, &[("cookie", cookie)]).await, (1013, "no_verdict".to_owned()));
        for path in ["/api/projects/p/events", "/sse?project_id=p"] {
            let answer = request("GET", &service.url(path), &[("cookie", cookie)], b"").await;
            assert_eq!((answer.status, &answer.json()["code"]), (503, &json!("no_verdict")), "{path}");
        }
    }
    assert_eq!(turned_away(&service, &[]).await.0, 4401, "who shows nothing needs no verdict");
    until("the service noticing", || async { service.health().await["status"] == "degraded" }).await;
    // Who is there is not thrown out. A store that came back empty would say no, and be believed.
    client.nothing_waits().await;
    client.close().await;
    store.0.start().await;
    store.put("s", &session).await;
    until("somebody being let in", || async {
        let headers = [("cookie", "session=s")];
        request("GET", &service.url("/api/projects/p/events"), &headers, b"").await.status == 200
    })
    .await;
    browser(&service, "session=s").await.close().await;
}

#[tokio::test]
async fn what_cannot_be_read_gives_no_verdict_and_a_session_of_nobody_a_no() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[]);
    for (id, value, code) in [
        ("rubbish", &b"{not json"[..], 1013),
        ("binary", b"\x80\x04\x95pickle", 1013),
        ("list", b"[]", 1013),
        ("wrong", br#"{"user_id":{},"projects":[]}"#, 1013),
        ("wrong-projects", br#"{"user_id":"u","projects":"p"}"#, 1013),
        ("nobody", br#"{"projects":"*"}"#, 4401),
        ("late", br#"{"user_id":"u","projects":"*","expires_at":1700000000}"#, 4401),
    ] {
        store.put_raw(&format!("session:{id}"), value).await;
        let cookie = format!("session={id}");
        assert_eq!(turned_away(&service, &[("cookie", &cookie)]).await.0, code, "{id}");
    }
    let mut connection = store.0.connection().await.unwrap();
    redis::cmd("HSET").arg("session:hash").arg("user_id").arg("u").exec_async(&mut connection).await.unwrap();
    assert_eq!(turned_away(&service, &[("cookie", "session=hash")]).await.0, 1013, "no string");
    for cookie in
        ["", "session=", "session=unknown", "session=a:b", "session=*", "other=rubbish", "session={rubbish}"]
    {
        let (code, reason) = turned_away(&service, &[("cookie", cookie)]).await;
        assert_eq!(code, 4401, "{cookie}: {reason}");
    }
}
