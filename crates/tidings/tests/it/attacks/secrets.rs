//! What is never told: neither by the log at its loudest, nor by an answer, nor by a metric; and what has to be told.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpStream;

use super::{KEYS, SECRET, of, post, signed};
use crate::{
    client::Raw,
    fixture::{Redis, request, until},
    limits::Logged,
    sessions::{Store, browser, subscribe, turned_away},
};

const TOKEN_SECRET: &str = "a secret that signs sensitive tokens";

fn token(secret: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let exp = jiff::Timestamp::now().as_second() + 3600;
    let claims = json!({"sub": "ada", "projects": ["a/*"], "exp": exp});
    let signed = format!("{}.{}", part(&json!({"alg": "HS256"})), part(&claims));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

/// What tells a token or a cookie from all others: its signature.
fn signature(credential: &str) -> String {
    credential.rsplit('.').next().unwrap().to_owned()
}

#[tokio::test]
async fn secrets_are_in_no_answer_and_no_metric() {
    let store = Store::started().await;
    let service = store.service(
        "redis-session,signed-cookie,ticket",
        &[("TIDINGS_SESSION_SECRET", SECRET), ("TIDINGS_KEYS", KEYS)],
    );
    store.put("sensitive-id", &of("sensitive-user", &json!(["a/sensitive-project"]))).await;
    let mut client = browser(&service, "session=sensitive-id").await;
    client.ask(&subscribe("a/sensitive-project")).await;
    turned_away(&service, &[("cookie", "session=sensitive-guess")]).await;
    post(&service, "/api/events", "sensitive-key-guess", &json!({})).await;
    for path in ["/metrics", "/health/websocket", "/readyz?verbose", "/api/config", "/livez"] {
        let text = request("GET", &service.url(path), &[], b"").await.text;
        for secret in ["sensitive", SECRET, "app-key"] {
            assert!(!text.contains(secret), "{path} shows {secret}: {text}");
        }
    }
    client.close().await;
}

#[tokio::test]
async fn the_log_at_its_loudest_holds_no_credential() {
    let mut redis = Redis::started().await;
    let mut connection = redis.connection().await.unwrap();
    let set = ["SET", "requirepass", "sensitive-password"];
    redis::cmd("CONFIG").arg(&set).exec_async(&mut connection).await.unwrap();
    let session = of("ada", &json!(["a/*"])).to_string();
    let key = "session:sensitive-session";
    redis::cmd("SET").arg(key).arg(&session).exec_async(&mut connection).await.unwrap();
    let url = format!("redis://:sensitive-password@127.0.0.1:{}", redis.port());
    let logged = Logged::with(&[
        ("RUST_LOG", "trace"),
        ("TIDINGS_LOG_FORMAT", "json"),
        ("REDIS_URL", &url),
        ("TIDINGS_AUTH", "redis-session,signed-cookie,jwt,ticket"),
        ("TIDINGS_SESSION_SECRET", SECRET),
        ("TIDINGS_JWT_SECRET", TOKEN_SECRET),
        ("TIDINGS_KEYS", KEYS),
        ("TIDINGS_ADMIN_KEY", "sensitive-admin-key"),
    ])
    .await;
    let (cookie, forged) = (
        signed(SECRET, &of("ada", &json!(["a/*"])), 1),
        signed("another secret, but long", &of("ada", &json!("*")), 1),
    );
    let (good, bad) = (token(TOKEN_SECRET), token("another secret that signs tokens"));
    let bearer = |key: &str| format!("Authorization: Bearer {key}\r\n");
    let post = |path: &str, headers: &str, body: &str| {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )
    };
    let event = r#"{"type":"a.b","project_id":"a/1"}"#;
    let ready = "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    until("readiness", || async { logged.answer(ready).await.starts_with("HTTP/1.1 200") }).await;
    let mut statuses = Vec::new();
    let mut ask = async |request: String| {
        let answer = logged.answer(&request).await;
        statuses.push(answer[9..12].to_owned());
        answer
    };
    let given = ask(post("/api/tickets", "Cookie: session=sensitive-session\r\n", "")).await;
    let ticket: Value = serde_json::from_str(given.split_once("\r\n\r\n").unwrap().1).unwrap();
    let ticket = ticket["ticket"].as_str().unwrap().to_owned();
    ask(post("/api/events", &bearer("app-key-0123456789"), event)).await;
    ask(post("/api/events", &bearer("sensitive-key-guess"), event)).await;
    ask(post("/api/events?key=sensitive-query-key", "", event)).await;
    ask(post("/api/events", &bearer("sensitive-admin-key"), "rubbish")).await;
    ask(post("/api/revoke", &bearer("worker-key-0123456789"), r#"{"session":"sensitive-revoked"}"#)).await;
    ask(post("/api/revoke", &bearer("app-key-0123456789"), r#"{"session":"sensitive-revoked"}"#)).await;
    for headers in [
        format!("Cookie: {cookie}\r\n"),
        format!("Cookie: {forged}\r\n"),
        format!("Cookie: token={good}\r\n"),
        format!("Cookie: token={bad}\r\n"),
        bearer(&good),
        bearer(&bad),
        "Cookie: session=sensitive-session\r\n".to_owned(),
        "Cookie: session=sensitive-unknown\r\n".to_owned(),
    ] {
        ask(format!(
            "GET /api/projects/a%2F1/events?token={good} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
        ))
        .await;
    }
    assert_eq!(
        statuses.join(" "),
        "201 202 401 401 422 403 204 200 401 200 401 200 401 200 401",
        "each of them was looked at"
    );
    let mut resume_tokens = Vec::new();
    for (offer, greeted) in [
        (format!("tidings.v1, tidings.ticket.{ticket}"), true),
        (format!("tidings.v1, tidings.ticket.{ticket}"), false),
        ("tidings.v1, tidings.ticket.sensitive-guess".to_owned(), false),
        (format!("tidings.v1, tidings.jwt.{good}"), true),
        (format!("tidings.v1, tidings.jwt.{bad}"), false),
    ] {
        let socket = TcpStream::connect(&logged.address).await.unwrap();
        let mut client = Raw::over(socket, &format!("Sec-WebSocket-Protocol: {offer}\r\n"), b"").await;
        match client.next_or_end().await {
            Ok(established) if greeted => {
                let token = established["resume_token"].as_str().unwrap().to_owned();
                let earlier = resume_tokens.last().unwrap_or(&token).clone();
                client.send_json(&json!({"type": "resume", "token": earlier})).await;
                client.next().await;
                resume_tokens.push(token);
            }
            Err(Some(4401)) if !greeted => {}
            other => panic!("{offer}: {other:?}"),
        }
    }
    // Faults are told with what they are about.
    redis.kill();
    let no_verdict = "GET /api/projects/a%2F1/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
        Cookie: session=sensitive-late\r\n\r\n";
    assert!(logged.answer(no_verdict).await.starts_with("HTTP/1.1 503"));
    let log = logged.stop().await.join("\n");
    for words in ["\"TRACE\"", "nobody is let in", "key_unknown", "nobody can be let in"] {
        assert!(log.contains(words), "it is loud, and tells of {words}");
    }
    let shown = ["sensitive-", SECRET, TOKEN_SECRET, "app-key-", "worker-key-", &ticket].map(str::to_owned);
    let signatures = [&cookie, &forged, &good, &bad].map(|credential| signature(credential));
    for secret in shown.iter().chain(&signatures).chain(&resume_tokens) {
        let line = log.lines().find(|line| line.contains(&**secret));
        assert!(line.is_none(), "{secret} is in the log: {line:?}");
    }
}

#[tokio::test]
async fn what_is_open_is_warned_of_at_the_start() {
    for (variables, words) in [
        (&[("TIDINGS_AUTH", "none")][..], "TIDINGS_AUTH=none"),
        (
            &[
                ("TIDINGS_AUTH", "signed-cookie"),
                ("TIDINGS_SESSION_SECRET", SECRET),
                ("TIDINGS_ALLOWED_ORIGINS", "*"),
            ],
            "TIDINGS_ALLOWED_ORIGINS=*",
        ),
    ] {
        let own = [("ENVIRONMENT", "production"), ("TIDINGS_LISTEN", "127.0.0.1:0")];
        let logged = Logged::with(&[&own[..], variables].concat()).await;
        let lines = logged.stop().await;
        let told = lines
            .iter()
            .any(|line| line.contains("WARN") && line.contains("insecure:") && line.contains(words));
        assert!(told, "{words}: {lines:?}");
    }
}
