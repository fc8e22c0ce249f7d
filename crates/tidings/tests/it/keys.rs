//! Who may publish what, and how much of it.

use serde_json::{Value, json};

use crate::{
    client::Client,
    fixture::{Answer, Service, request, until},
};

const WEB: &str = "web-0123456789abcdef";
const CI: &str = "ci-0123456789abcdef";
const LOGIN: &str = "login-0123456789abcdef";
const ADMIN: &str = "admin-0123456789abcdef";

fn keys() -> String {
    json!([
        {"name": "web", "key": WEB, "projects": ["p", "team/*"], "types": ["task.*", "project.updated"]},
        {"name": "ci", "key": CI},
        {"name": "login", "key": LOGIN, "scopes": ["tickets"]},
    ])
    .to_string()
}

fn service(more: &[(&str, &str)]) -> Service {
    let keys = keys();
    Service::with(&[&[("TIDINGS_KEYS", keys.as_str()), ("TIDINGS_ADMIN_KEY", ADMIN)], more].concat())
}

async fn publish(service: &Service, key: &str, events: &Value) -> Answer {
    let authorization = format!("Bearer {key}");
    let headers = [("authorization", authorization.as_str())];
    request("POST", &service.url("/api/events"), &headers, events.to_string().as_bytes()).await
}

fn started(project: &str) -> Value {
    json!({"type": "task.started", "project_id": project, "task_id": "t", "task_name": "n"})
}

#[track_caller]
fn check_denied(answer: &Answer, status: u16, code: &str) {
    assert_eq!(
        (answer.status, answer.headers["content-type"].as_str()),
        (status, "application/problem+json")
    );
    assert_eq!(answer.json()["code"], code, "{}", answer.text);
    assert!(!answer.text.contains("0123456789abcdef"), "{}", answer.text);
}

#[tokio::test]
async fn a_key_publishes_within_its_projects_and_types_and_nothing_of_a_request_that_goes_beyond() {
    let service = service(&[]);
    let mut client = Client::subscribed(&service, "p").await;
    let beyond = [
        started("p"),
        started("team/web"),
        started("q"),
        json!({"type": "file.deleted", "project_id": "p", "file_path": "f"}),
        json!({"type": "task.noted"}),
        json!({"type": "project.updated", "project_id": "q"}),
    ];
    let refused = publish(&service, WEB, &json!(beyond)).await;
    check_denied(&refused, 403, "scope");
    let problem = refused.json();
    let errors: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| json!([error["index"], error["field"]]))
        .collect();
    assert_eq!(json!(errors), json!([[2, "project_id"], [3, "type"], [4, "project_id"], [5, "project_id"]]));
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("`web`") && detail.contains("team/*") && detail.contains("task.*"), "{detail}");
    client.nothing_waits().await;
    let within = [started("p"), started("team/web"), json!({"type": "project.updated", "project_id": "p"})];
    assert_eq!(publish(&service, WEB, &json!(within)).await.status, 202);
    assert_eq!(publish(&service, CI, &json!(beyond)).await.status, 202);
    assert_eq!(publish(&service, ADMIN, &json!(beyond)).await.status, 202);
    let name = r#"tidings_requests_refused_total{reason="scope",key="web"}"#;
    assert!((metric(&service, name).await - 1.0).abs() < 0.1);
}

/// The value of a metric, read with the admin's key.
async fn metric(service: &Service, name: &str) -> f64 {
    let authorization = format!("Bearer {ADMIN}");
    let text = request("GET", &service.url("/metrics"), &[("authorization", &authorization)], b"").await.text;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn a_missing_an_unknown_and_another_key_are_told_apart() {
    let service = service(&[]);
    let event = started("p");
    let body = event.to_string();
    let url = service.url("/api/events");
    check_denied(&request("POST", &url, &[], body.as_bytes()).await, 401, "key_missing");
    check_denied(&publish(&service, "nobody-0123456789", &event).await, 401, "key_unknown");
    let refused = publish(&service, LOGIN, &event).await;
    check_denied(&refused, 403, "scope");
    assert!(refused.json()["detail"].as_str().unwrap().contains("add `publish` to its `scopes`"));
    // An address ends up in logs, histories and referrers.
    for query in
        [format!("?key={CI}"), format!("?access_token={CI}"), format!("?authorization=Bearer%20{CI}")]
    {
        let answer = request("POST", &format!("{url}{query}"), &[], body.as_bytes()).await;
        check_denied(&answer, 401, "key_missing");
    }
    for reason in ["key_missing", "key_unknown"] {
        let name = format!("tidings_requests_refused_total{{reason=\"{reason}\",key=\"\"}}");
        assert!(metric(&service, &name).await >= 1.0, "{reason}");
    }
}

#[tokio::test]
async fn in_production_a_refusal_says_its_code_and_nothing_of_the_rules() {
    let service = service(&[("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none")]);
    for (key, event) in [(WEB, started("q")), (LOGIN, started("p")), ("nobody-0123456789", started("p"))] {
        let answer = publish(&service, key, &event).await;
        let problem = answer.json();
        assert!(problem["code"].is_string() && problem.get("detail").is_none(), "{problem}");
        for secret in ["team", "task.*", "web", "login", "TIDINGS", "keys"] {
            assert!(!answer.text.contains(secret), "{secret}: {problem}");
        }
    }
    let outside = publish(&service, WEB, &started("q")).await.json();
    assert_eq!(
        outside["errors"],
        json!([{"index": 0, "field": "project_id", "message": "this key may not publish to this project"}])
    );
    assert_eq!(publish(&service, WEB, &started("p")).await.status, 202);
}

#[tokio::test]
async fn a_key_is_replaced_without_a_gap_because_both_hold() {
    let keys = json!([{"name": "old", "key": CI}, {"name": "new", "key": WEB}]).to_string();
    let service =
        Service::with(&[("TIDINGS_KEYS", &keys), ("TIDINGS_PUBLISH_KEYS", "plain-0123456789abcdef")]);
    for key in [CI, WEB, "plain-0123456789abcdef"] {
        assert_eq!(publish(&service, key, &started("p")).await.status, 202);
    }
}

#[tokio::test]
async fn who_publishes_too_fast_is_told_when_so_many_fit_and_nothing_is_published() {
    let keys = json!([{"name": "slow", "key": WEB, "rate": 1}, {"name": "ci", "key": CI}]).to_string();
    let service = Service::with(&[("TIDINGS_KEYS", &keys), ("TIDINGS_ADMIN_KEY", ADMIN)]);
    // More than a second brings: alone it passes, and those behind it wait for as long as it takes.
    let many: Vec<_> = (0..600).map(|_| started("p")).collect();
    assert_eq!(publish(&service, WEB, &json!(many)).await.status, 202);
    let refused = publish(&service, WEB, &json!([started("p"), started("p")])).await;
    check_denied(&refused, 429, "rate_limited");
    let retry_after_s: u64 = refused.headers["retry-after"].parse().unwrap();
    assert!((1..=600).contains(&retry_after_s), "{retry_after_s}");
    assert_eq!(publish(&service, CI, &started("p")).await.json()["events"][0]["offset"], 601);
    let name = r#"tidings_requests_refused_total{reason="rate_limited",key="slow"}"#;
    assert!((metric(&service, name).await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn the_rate_of_all_keys_comes_back() {
    let service = Service::with(&[("TIDINGS_PUBLISH_RATE_MAX", "2")]);
    // However slow this machine is, at some time one of several that come together is too many.
    until("a refusal", || async {
        let several = (0..8).map(|_| async {
            let body = json!([started("p"), started("p")]).to_string();
            request("POST", &service.url("/api/events"), &[], body.as_bytes()).await.status
        });
        futures_util::future::join_all(several).await.contains(&429)
    })
    .await;
    until("a turn", || async {
        let body = started("p").to_string();
        request("POST", &service.url("/api/events"), &[], body.as_bytes()).await.status == 202
    })
    .await;
}
