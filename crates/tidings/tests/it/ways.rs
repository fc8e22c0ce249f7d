//! The ways beside an application's sessions: tokens, and asking the application.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

use crate::{
    client::Client,
    fixture::{Service, request, until},
    sessions::{browser, event, subscribe, turned_away},
};

const SECRET: &str = "a secret that signs tokens";

fn token(header: &Value, claims: &Value, secret: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(header), part(claims));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

fn good(claims: &Value) -> String {
    token(&json!({"alg": "HS256"}), claims, SECRET)
}

fn claims(expires_in_s: i64) -> Value {
    let now = jiff::Timestamp::now().as_second();
    json!({"sub": "ada", "projects": ["a/*"], "iat": now, "exp": now + expires_in_s})
}

#[tokio::test]
async fn a_token_comes_by_header_cookie_or_subprotocol_and_ends_when_it_says() {
    let service = Service::with(&[("TIDINGS_AUTH", "jwt"), ("TIDINGS_JWT_SECRET", SECRET)]);
    let token = good(&claims(3600));
    let cookie = format!("token={token}");
    let (bearer, protocols) = (format!("Bearer {token}"), format!("tidings.v1, tidings.jwt.{token}"));
    for headers in [
        [("sec-websocket-protocol", protocols.as_str())],
        [("cookie", cookie.as_str())],
        [("authorization", bearer.as_str())],
    ] {
        let mut client = Client::with_headers(&service, &headers).await.unwrap();
        assert_ne!(client.established["subprotocol"], json!(format!("tidings.jwt.{token}")));
        assert_eq!(client.ask(&subscribe("a/1")).await["type"], "subscription.confirmed");
        assert_eq!(client.ask(&subscribe("b/1")).await["code"], "not_authorized");
        client.close().await;
    }
    let url = service.url("/api/projects/a%2F1/events");
    assert_eq!(request("GET", &url, &[("authorization", &bearer)], b"").await.status, 200);
    let short = format!("token={}", good(&claims(3)));
    let mut client = browser(&service, &short).await;
    assert_eq!(client.ask(&subscribe("a/1")).await["type"], "subscription.confirmed");
    assert_eq!(client.next_event().await["reason"], "expired");
    assert_eq!(client.close_code().await, 4401);
    assert!(turned_away(&service, &[("cookie", &short)]).await.1.contains("exp"), "told in development");
}

#[tokio::test]
async fn tokens_that_prove_nothing_are_refused_by_name() {
    let service = Service::with(&[
        ("ENVIRONMENT", "production"),
        ("TIDINGS_LISTEN", "127.0.0.1:0"),
        ("TIDINGS_AUTH", "jwt"),
        ("TIDINGS_JWT_SECRET", SECRET),
        ("TIDINGS_JWT_ISSUER", "https://issuer.example"),
        ("TIDINGS_JWT_AUDIENCE", "tidings"),
    ]);
    let with = |more: Value| {
        let mut claims = claims(3600);
        let own = json!({"iss": "https://issuer.example", "aud": "tidings"});
        for (name, value) in own.as_object().unwrap().iter().chain(more.as_object().unwrap()) {
            claims[name] = value.clone();
        }
        claims
    };
    let fine = with(json!({}));
    let none = token(&json!({"alg": "none"}), &fine, SECRET);
    let mut without_exp = fine.clone();
    without_exp.as_object_mut().unwrap().remove("exp");
    for (token, code) in [
        (none.rsplit_once('.').unwrap().0.to_owned() + ".", "algorithm"),
        (token(&json!({"alg": "none"}), &fine, SECRET), "algorithm"),
        (token(&json!({"alg": "RS256"}), &fine, SECRET), "algorithm"),
        (token(&json!({"alg": "HS512"}), &fine, SECRET), "algorithm"),
        (token(&json!({"alg": "HS256"}), &fine, "another secret that signs"), "signature"),
        (
            token(&json!({"alg": "HS256", "kid": "../../etc/passwd"}), &fine, "another secret that signs"),
            "signature",
        ),
        (good(&with(json!({"aud": "other"}))), "audience"),
        (good(&with(json!({"iss": "https://issuer.example.evil"}))), "issuer"),
        (good(&with(json!({"exp": 1_700_000_000}))), "expired"),
        (good(&with(json!({"exp": "9999999999"}))), "claims"),
        (good(&without_exp), "claims"),
        (good(&with(json!({"nbf": 9_999_999_999_u64}))), "not_yet_valid"),
        (good(&with(json!({"sub": null}))), "no_user"),
        ("a.b".to_owned(), "token_malformed"),
        ("x".repeat(100), "token_malformed"),
    ] {
        let authorization = format!("Bearer {token}");
        let url = service.url("/api/projects/a%2F1/events");
        let answer = request("GET", &url, &[("authorization", &authorization)], b"").await;
        let problem = answer.json();
        assert_eq!((answer.status, &problem["code"]), (401, &json!(code)), "{token}");
        assert!(problem.get("detail").is_none());
        assert_eq!(
            turned_away(&service, &[("authorization", &authorization)]).await,
            (4401, code.to_owned())
        );
    }
    let authorization = format!("Bearer {}", good(&fine));
    let headers = [("authorization", authorization.as_str())];
    Client::with_headers(&service, &headers).await.unwrap().close().await;
}

/// An application that is asked who a cookie belongs to.
struct Application {
    url: String,
    status: Arc<AtomicU16>,
    body: Arc<Mutex<Value>>,
    asked: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Application {
    async fn started(body: &Value) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/whoami", listener.local_addr().unwrap());
        let (status, body) = (Arc::new(AtomicU16::new(200)), Arc::new(Mutex::new(body.clone())));
        let asked = Arc::new(AtomicUsize::new(0));
        let (told_status, told, count) = (Arc::clone(&status), Arc::clone(&body), Arc::clone(&asked));
        #[allow(clippy::disallowed_methods, reason = "ended by the test")]
        let serving = tokio::spawn(async move {
            loop {
                let Ok((mut socket, _)) = listener.accept().await else { return };
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = socket.read_u8().await else { break };
                    head.push(byte);
                }
                count.fetch_add(1, Ordering::Relaxed);
                let head = String::from_utf8(head).unwrap().to_lowercase();
                let status =
                    if head.contains("cookie: sid=") { told_status.load(Ordering::Relaxed) } else { 401 };
                let body = told.lock().to_string();
                let answer = format!(
                    "HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = socket.write_all(answer.as_bytes()).await;
            }
        });
        Self { url, status, body, asked, serving }
    }

    fn service(&self) -> Service {
        Service::with(&[("TIDINGS_AUTH", "callback"), ("TIDINGS_AUTH_URL", &self.url)])
    }

    fn says(&self, status: u16, body: &Value) {
        *self.body.lock() = body.clone();
        self.status.store(status, Ordering::Relaxed);
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn ada(projects: &Value, valid_s: i64) -> Value {
    json!({"user_id": "ada", "projects": projects, "expires_at": jiff::Timestamp::now().as_second() + valid_s})
}

#[tokio::test]
async fn the_application_is_asked_and_asked_again_and_its_answers_take_effect() {
    let application = Application::started(&ada(&json!(["a/*", "b/*"]), 8)).await;
    let service = application.service();
    let mut client = browser(&service, "sid=1; theme=dark").await;
    for project in ["a/1", "b/1"] {
        assert_eq!(client.ask(&subscribe(project)).await["type"], "subscription.confirmed");
    }
    browser(&service, "sid=1; theme=dark").await.close().await;
    assert_eq!(application.asked.load(Ordering::Relaxed), 1, "remembered");
    assert_eq!(turned_away(&service, &[("cookie", "other=1")]).await.0, 4401);
    assert_eq!(turned_away(&service, &[]).await.0, 4401);
    // Before its time is over it is asked again: fewer rights, and then a no.
    application.says(200, &ada(&json!(["a/*"]), 8));
    let removed = client.next_event().await;
    assert_eq!((&removed["project_id"], &removed["reason"]), (&json!("b/1"), &json!("rights")));
    application.says(401, &json!({}));
    assert_eq!(client.next_event().await["reason"], "expired");
    assert_eq!(client.close_code().await, 4401);
}

#[tokio::test]
async fn an_application_that_does_not_answer_gives_no_verdict() {
    let application = Application::started(&ada(&json!("*"), 4)).await;
    let service = application.service();
    let mut client = browser(&service, "sid=1").await;
    client.ask(&subscribe("p")).await;
    application.says(500, &json!({}));
    until("the service noticing", || async { service.health().await["status"] == "degraded" }).await;
    let ready = request("GET", &service.url("/readyz"), &[], b"").await;
    assert!(ready.status == 200 && ready.text.contains("TIDINGS_AUTH_URL"), "{}", ready.text);
    assert_eq!(turned_away(&service, &[("cookie", "sid=2")]).await.0, 1013);
    tokio::time::sleep(Duration::from_secs(6)).await;
    service.publish(&event("p", 1)).await;
    assert_eq!(
        client.ask(&json!({"type": "ping"})).await["type"],
        "pong",
        "nobody is thrown out, and nothing delivered"
    );
    application.says(200, &ada(&json!("*"), 60));
    assert_eq!(client.next_event().await["number"], 1);
    client.close().await;
}
