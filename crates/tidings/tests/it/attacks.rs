//! Attempts to see or say what one may not, each with the exact refusal that it gets.

mod frames;
mod projects;
mod requests;
mod secrets;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use tokio::net::TcpStream;

use crate::{
    client::{Client, Raw},
    fixture::{Answer, Redis, Service, request},
    sessions::{Store, browser, event, subscribe, turned_away},
};

const SECRET: &str = "a secret of the application's";
const KEYS: &str = r#"[
    {"name": "app", "key": "app-key-0123456789", "scopes": ["publish", "tickets", "revoke"], "projects": ["a/*"]},
    {"name": "worker", "key": "worker-key-0123456789", "projects": ["a/*"], "types": ["task.*"]}
]"#;

/// A cookie as Starlette signs it.
fn signed(secret: &str, session: &Value, age_s: i64) -> String {
    let time = (jiff::Timestamp::now().as_second() - age_s).to_be_bytes();
    let time = &time[time.iter().take_while(|byte| **byte == 0).count()..];
    let signed = format!("{}.{}", STANDARD.encode(session.to_string()), URL_SAFE_NO_PAD.encode(time));
    let key = Sha1::new().chain_update(b"itsdangerous.Signersigner").chain_update(secret).finalize();
    let mut mac = Hmac::<Sha1>::new_from_slice(&key).unwrap();
    mac.update(signed.as_bytes());
    format!("session={signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

fn of(user: &str, projects: &Value) -> Value {
    json!({"user_id": user, "projects": projects})
}

fn service(ways: &str, more: &[(&str, &str)]) -> Service {
    let own = [("TIDINGS_AUTH", ways), ("TIDINGS_SESSION_SECRET", SECRET), ("TIDINGS_KEYS", KEYS)];
    Service::with(&[&own[..], more].concat())
}

async fn post(service: &Service, path: &str, key: &str, body: &Value) -> Answer {
    let authorization = format!("Bearer {key}");
    let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
    request("POST", &service.url(path), &headers, body.to_string().as_bytes()).await
}

async fn revoke(service: &Service, whom: &Value) {
    let answer = post(service, "/api/revoke", "app-key-0123456789", whom).await;
    assert_eq!(answer.status, 204, "{}", answer.text);
}

#[tokio::test]
async fn cookies_that_prove_nothing_are_refused_by_name() {
    let service =
        service("signed-cookie", &[("ENVIRONMENT", "production"), ("TIDINGS_LISTEN", "127.0.0.1:0")]);
    let mine = of("ada", &json!(["a/*"]));
    let good = signed(SECRET, &mine, 0);
    let (payload, rest) = good.split_once('.').unwrap();
    let stronger = format!("session={}.{rest}", STANDARD.encode(of("ada", &json!("*")).to_string()));
    for (cookie, code) in [
        (String::new(), "no_credentials"),
        ("other=1".to_owned(), "no_credentials"),
        (stronger, "session_signature"),
        (signed("another secret, but long", &mine, 0), "session_signature"),
        (signed("", &mine, 0), "session_signature"),
        (format!("{payload}.{}", &rest[..rest.len() - 1]), "session_signature"),
        ("session=rubbish".to_owned(), "session_malformed"),
        (signed(SECRET, &mine, 14 * 24 * 3600 + 5), "session_expired"),
        (signed(SECRET, &mine, -60), "session_not_yet_valid"),
        (signed(SECRET, &json!({"projects": "*"}), 0), "no_user"),
        (signed(SECRET, &json!(["ada"]), 0), "session_malformed"),
    ] {
        assert_eq!(turned_away(&service, &[("cookie", &cookie)]).await, (4401, code.to_owned()), "{cookie}");
        let url = service.url("/api/projects/a%2F1/events");
        let answer = request("GET", &url, &[("cookie", &cookie)], b"").await;
        let problem = answer.json();
        assert_eq!((answer.status, &problem["code"]), (401, &json!(code)), "{cookie}");
        assert!(problem.get("detail").is_none(), "production tells no more: {problem}");
    }
    // Whoever does not know our protocol is told by the status.
    let upgrade = [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    assert_eq!(request("GET", &service.url("/ws"), &upgrade, b"").await.status, 401);
    browser(&service, &good).await.close().await;
}

#[tokio::test]
async fn origins_are_compared_whole_and_null_is_none() {
    let store = Store::started().await;
    let app = ("TIDINGS_ALLOWED_ORIGINS", "https://app.example.com");
    let service = store.service("redis-session", &[app]);
    store.put("s", &of("ada", &json!("*"))).await;
    for origin in [
        "https://evil",
        "null",
        "https://app.example.com.evil.com",
        "http://app.example.com",
        "https://app.example.com:444",
        "https://app.example.com/",
        "https://xapp.example.com",
        "https://app.example.com@evil",
        "file://",
        "",
    ] {
        let headers = [("cookie", "session=s"), ("origin", origin)];
        for path in ["/ws", "/sse?project_id=p", "/api/projects/p/events"] {
            assert_eq!(
                request("GET", &service.url(path), &headers, b"").await.status,
                403,
                "{origin} {path}"
            );
        }
        assert_eq!(
            request("POST", &service.url("/api/tickets"), &headers, b"").await.status,
            409,
            "no way for tickets"
        );
    }
    // Not even where all pages may.
    let open = store.service("redis-session", &[("TIDINGS_ALLOWED_ORIGINS", "*")]);
    let null = [("cookie", "session=s"), ("origin", "null")];
    for path in ["/ws", "/sse?project_id=p", "/api/projects/p/events"] {
        assert_eq!(request("GET", &open.url(path), &null, b"").await.status, 403, "{path}");
    }
    let headers = [("cookie", "session=s"), ("origin", "https://app.example.com")];
    Client::with_headers(&service, &headers).await.unwrap().close().await;
    Client::with_headers(&service, &headers[..1]).await.unwrap().close().await;
}

#[tokio::test]
async fn outside_development_the_console_is_for_operators() {
    let service =
        service("signed-cookie", &[("ENVIRONMENT", "production"), ("TIDINGS_LISTEN", "127.0.0.1:0")]);
    let operator = signed(SECRET, &json!({"user_id": "op", "projects": "*", "admin": true}), 1);
    let user = signed(SECRET, &of("ada", &json!("*")), 1);
    for path in ["/console", "/console/console.js"] {
        for (cookie, status) in [("", 401), (&*user, 403), (&*operator, 200)] {
            assert_eq!(
                request("GET", &service.url(path), &[("cookie", cookie)], b"").await.status,
                status,
                "{path}"
            );
        }
    }
}

#[tokio::test]
async fn what_was_revoked_ends_at_once_and_cannot_be_used_again() {
    let service = service("signed-cookie,ticket", &[]);
    let (first, second) =
        (signed(SECRET, &of("ada", &json!(["a/*"])), 60), signed(SECRET, &of("ada", &json!(["a/*"])), 50));
    let bob = signed(SECRET, &of("bob", &json!(["a/*"])), 60);
    let mut one = browser(&service, &first).await;
    let mut two = browser(&service, &second).await;
    let mut other = browser(&service, &bob).await;
    for client in [&mut one, &mut two, &mut other] {
        client.ask(&subscribe("a/1")).await;
    }
    revoke(&service, &json!({"session": first.strip_prefix("session=").unwrap()})).await;
    assert_eq!(one.next_event().await["reason"], "expired");
    assert_eq!(one.close_code().await, 4401);
    assert!(turned_away(&service, &[("cookie", &first)]).await.1.contains("revoked"));
    two.nothing_waits().await;
    let headers = [("cookie", second.as_str())];
    let ticket = request("POST", &service.url("/api/tickets"), &headers, b"").await;
    assert_eq!(ticket.status, 201, "{}", ticket.text);
    revoke(&service, &json!({"user_id": "ada"})).await;
    assert_eq!(two.next_event().await["reason"], "expired");
    assert_eq!(two.close_code().await, 4401);
    assert!(turned_away(&service, &[("cookie", &second)]).await.1.contains("revoked"));
    let protocols = format!("tidings.v1, tidings.ticket.{}", ticket.json()["ticket"].as_str().unwrap());
    let with_ticket = Client::turned_away(&service, &[("sec-websocket-protocol", &protocols)]).await;
    assert_eq!(with_ticket.0, 4401, "what was given for it is revoked, too");
    let later = signed(SECRET, &of("ada", &json!(["a/*"])), -2);
    browser(&service, &later).await.close().await;
    other.nothing_waits().await;
    other.close().await;
    for (body, status) in [
        (json!({}), 422),
        (json!({"user_id": "u", "session": "s"}), 422),
        (json!({"user": "u"}), 422),
        (json!({"session": ""}), 422),
    ] {
        assert_eq!(post(&service, "/api/revoke", "app-key-0123456789", &body).await.status, status, "{body}");
    }
    let denied = post(&service, "/api/revoke", "worker-key-0123456789", &json!({"user_id": "bob"})).await;
    assert_eq!((denied.status, denied.json()["code"].clone()), (403, json!("scope")));
    let nobody = request("POST", &service.url("/api/revoke"), &headers, br#"{"user_id":"bob"}"#).await;
    assert_eq!((nobody.status, nobody.json()["code"].clone()), (401, json!("key_missing")));
}

#[tokio::test]
async fn a_session_of_a_revoked_user_does_not_come_back_while_it_is_still_stored() {
    let store = Store::started().await;
    let service = store.service("redis-session", &[("TIDINGS_KEYS", KEYS)]);
    for id in ["s1", "s2"] {
        store.put(id, &of("ada", &json!(["a/*"]))).await;
    }
    let client = browser(&service, "session=s1").await;
    revoke(&service, &json!({"user_id": "ada"})).await;
    assert_eq!(client.close_code().await, 4401);
    crate::fixture::until("the session being refused", || async {
        let headers = [("cookie", "session=s1")];
        request("GET", &service.url("/api/projects/a%2F1/events"), &headers, b"").await.status == 401
    })
    .await;
    // Who logs in again has another one.
    browser(&service, "session=s2").await.close().await;
}

#[tokio::test]
async fn a_resume_token_is_worth_nothing_to_another_user() {
    let service = service("signed-cookie", &[]);
    let (ada, eve) =
        (signed(SECRET, &of("ada", &json!(["a/*"])), 5), signed(SECRET, &of("eve", &json!(["a/*"])), 5));
    let mut client = browser(&service, &ada).await;
    client.ask(&subscribe("a/1")).await;
    let token = client.established["resume_token"].clone();
    drop(client);
    let mut thief = browser(&service, &eve).await;
    let refused = thief.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(refused["code"], "resume_expired");
    thief.close().await;
    // It is still good for whom it is for, whose rights have shrunk meanwhile; another session of the same user.
    let fewer = signed(SECRET, &of("ada", &json!(["b/*"])), 4);
    let mut again = browser(&service, &fewer).await;
    let resumed = again.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(
        (&resumed["type"], &resumed["subscriptions"]),
        (&json!("connection.resumed"), &json!(["a/1"]))
    );
    let removed = again.next_event().await;
    assert_eq!((&removed["type"], &removed["reason"]), (&json!("subscription.removed"), &json!("rights")));
    service_publishes(&service, "a/1").await;
    again.nothing_waits().await;
    again.close().await;
}

async fn service_publishes(service: &Service, project: &str) {
    let answer = post(service, "/api/events", "app-key-0123456789", &event(project, 1)).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
}

#[tokio::test]
async fn tickets_let_in_once_with_the_rights_that_they_were_given_for() {
    let store = Store::started().await;
    let service = store.service("redis-session,ticket", &[("TIDINGS_KEYS", KEYS)]);
    store.put("s", &of("ada", &json!(["a/*"]))).await;
    let given = request("POST", &service.url("/api/tickets"), &[("cookie", "session=s")], b"").await;
    assert_eq!((given.status, &given.json()["expires_in"]), (201, &json!(30)));
    assert_eq!(given.headers["cache-control"], "no-store");
    let protocols =
        |answer: &Answer| format!("tidings.v1, tidings.ticket.{}", answer.json()["ticket"].as_str().unwrap());
    let ticket = protocols(&given);
    let mut client = Client::with_headers(&service, &[("sec-websocket-protocol", &ticket)]).await.unwrap();
    assert_eq!(client.established["subprotocol"], "tidings.v1", "never the ticket");
    client.ask(&subscribe("a/1")).await;
    assert_eq!(client.ask(&subscribe("b/1")).await["code"], "not_authorized");
    let again = Client::turned_away(&service, &[("sec-websocket-protocol", &ticket)]).await;
    assert!(again.0 == 4401 && again.1.contains("spent already"), "{again:?}");
    // It is of the session that it was given for, and ends with that.
    store.remove("s").await;
    assert_eq!(client.next_event().await["reason"], "expired");
    assert_eq!(client.close_code().await, 4401);
    // The application gives one to whom it likes, within the rights of its key.
    let named = |projects: Value| json!({"user_id": 7, "projects": projects});
    let given = post(&service, "/api/tickets", "app-key-0123456789", &named(json!(["a/1"]))).await;
    let ticket = protocols(&given);
    let mut client = Client::with_headers(&service, &[("sec-websocket-protocol", &ticket)]).await.unwrap();
    assert_eq!(client.ask(&subscribe("a/1")).await["type"], "subscription.confirmed");
    assert_eq!(client.ask(&subscribe("a/2")).await["code"], "not_authorized");
    revoke(&service, &json!({"user_id": 7})).await;
    assert_eq!(client.next_event().await["reason"], "expired");
    assert_eq!(client.close_code().await, 4401);
    for (key, body, status, code) in [
        ("app-key-0123456789", named(json!(["b/1"])), 403, "scope"),
        ("app-key-0123456789", named(json!("*")), 403, "scope"),
        ("app-key-0123456789", json!({"user_id": 7, "projects": [], "admin": true}), 403, "scope"),
        ("worker-key-0123456789", named(json!(["a/1"])), 403, "scope"),
        ("no-key-0123456789", named(json!(["a/1"])), 401, "key_unknown"),
    ] {
        let answer = post(&service, "/api/tickets", key, &body).await;
        assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{key} {body}");
    }
    for body in [
        json!({"projects": []}),
        json!({"user_id": [], "projects": []}),
        json!({"user_id": 1, "projects": "p"}),
        json!({"user_id": 1, "expires_at": "x"}),
        json!({"user_id": 1, "more": 1}),
    ] {
        assert_eq!(post(&service, "/api/tickets", "app-key-0123456789", &body).await.status, 422, "{body}");
    }
    let guessed =
        Client::turned_away(&service, &[("sec-websocket-protocol", "tidings.v1, tidings.ticket.x")]).await;
    assert_eq!(guessed.0, 4401);
}

/// At its end, and not before and not much later; nobody has to ask.
#[tokio::test]
async fn a_session_that_says_its_end_ends_then() {
    let service = service("signed-cookie", &[]);
    let ends = jiff::Timestamp::now().as_second() + 3;
    let session = json!({"user_id": "ada", "projects": ["a/*"], "expires_at": ends});
    let mut client = browser(&service, &signed(SECRET, &session, 0)).await;
    assert_eq!(client.ask(&subscribe("a/1")).await["type"], "subscription.confirmed");
    assert_eq!(client.next_event().await["reason"], "expired");
    assert!(jiff::Timestamp::now().as_second() >= ends);
    assert_eq!(client.close_code().await, 4401);
}

#[tokio::test]
async fn a_user_has_as_many_connections_as_he_may() {
    let service = service("signed-cookie", &[("TIDINGS_CONNECTIONS_PER_USER_MAX", "2")]);
    let (ada, bob) = (signed(SECRET, &of("ada", &json!("*")), 1), signed(SECRET, &of("bob", &json!("*")), 1));
    let clients =
        [browser(&service, &ada).await, browser(&service, &signed(SECRET, &of("ada", &json!("*")), 0)).await];
    assert_eq!(turned_away(&service, &[("cookie", &ada)]).await.0, 4529);
    browser(&service, &bob).await.close().await;
    let [first, second] = clients;
    first.close().await;
    crate::fixture::until("a place being free", || async {
        service.health().await["active_connections"] == 1
    })
    .await;
    browser(&service, &ada).await.close().await;
    second.close().await;
}

#[tokio::test]
async fn what_was_revoked_at_one_node_ends_at_all_and_a_ticket_is_spent_at_one() {
    let redis = Redis::started().await;
    let url = redis.url();
    let services = [(); 2].map(|()| service("signed-cookie,ticket", &[("REDIS_URL", &url)]));
    for service in &services {
        ready(service).await;
    }
    let cookie = signed(SECRET, &of("ada", &json!(["a/*"])), 60);
    let headers = [("cookie", cookie.as_str())];
    let given = request("POST", &services[0].url("/api/tickets"), &headers, b"").await.json();
    let protocols = format!("tidings.v1, tidings.ticket.{}", given["ticket"].as_str().unwrap());
    let spend = |number: usize| is_let_in(&services[number % 2], &protocols);
    let let_in = futures_util::future::join_all((0..10).map(spend)).await;
    assert_eq!(let_in.iter().filter(|let_in| **let_in).count(), 1, "{let_in:?}");
    let mut clients = [browser(&services[0], &cookie).await, browser(&services[1], &cookie).await];
    for client in &mut clients {
        client.ask(&subscribe("a/1")).await;
    }
    revoke(&services[1], &json!({"user_id": "ada"})).await;
    for mut client in clients {
        assert_eq!(client.next_event().await["reason"], "expired");
        assert_eq!(client.close_code().await, 4401);
    }
    for service in &services {
        assert!(turned_away(service, &headers).await.1.contains("revoked"));
    }
}

/// Also that it knows what was revoked.
async fn ready(service: &Service) {
    crate::fixture::until("readiness", || async {
        request("GET", &service.url("/readyz"), &[], b"").await.status == 200
    })
    .await;
}

/// Whether somebody who offers this is let in; else he is sent away.
async fn is_let_in(service: &Service, protocols: &str) -> bool {
    let socket = TcpStream::connect(service.address).await.unwrap();
    let offer = format!("Sec-WebSocket-Protocol: {protocols}\r\n");
    match Raw::over(socket, &offer, b"").await.next_or_end().await {
        Ok(message) => message["type"] == "connection.established",
        Err(code) => {
            assert_eq!(code, Some(4401));
            false
        }
    }
}

/// What a Python that unpickled it would run.
const PICKLE: &[u8] = b"cos\nsystem\n(S'touch unpickled'\ntR.";

#[tokio::test]
async fn a_pickle_in_redis_is_bytes_like_any_other() {
    let redis = Redis::started().await;
    let url = redis.url();
    let service = service("redis-session", &[("REDIS_URL", &url)]);
    ready(&service).await;
    let mut connection = redis.connection().await.unwrap();
    let mut command = async |words: &[&[u8]]| -> redis::Value {
        redis::cmd(str::from_utf8(words[0]).unwrap())
            .arg(&words[1..])
            .query_async(&mut connection)
            .await
            .unwrap()
    };
    let session = of("ada", &json!(["a/*"])).to_string();
    command(&[b"SET", b"session:s", session.as_bytes()]).await;
    command(&[b"SET", b"session:pickled", PICKLE]).await;
    assert_eq!(turned_away(&service, &[("cookie", "session=pickled")]).await.0, 1013);
    let mut client = browser(&service, "session=s").await;
    client.ask(&subscribe("a/1")).await;
    redis.publish(PICKLE).await;
    command(&[b"XADD", b"tidings:ingest", b"*", b"event", PICKLE]).await;
    for source in ["redis_channel", "ingest_stream"] {
        let name = format!(r#"tidings_events_rejected_total{{source="{source}",reason="invalid_json"}}"#);
        crate::fixture::until(&name, || async { service.metric(&name).await > 0.5 }).await;
    }
    // Whatever is kept of a connection.
    let token = client.established["resume_token"].clone();
    drop(client);
    let saved = command(&[b"KEYS", b"ws:connection:*"]).await;
    let saved: Vec<Vec<u8>> = redis::from_redis_value(saved).unwrap();
    for key in &saved {
        command(&[b"SET", key, PICKLE]).await;
    }
    let mut client = browser(&service, "session=s").await;
    let answer = client.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(answer["code"], "resume_expired", "{answer}");
    assert!(!saved.is_empty());
    service_publishes(&service, "a/1").await;
    client.close().await;
    assert!(!std::path::Path::new("unpickled").exists());
}
