//! Another's project: by its name, by a pattern, by a name that looks like one's own, and by what a path makes of it.

use serde_json::json;

use super::{SECRET, of, post, signed};
use crate::{
    client::Client,
    fixture::{Service, request},
    sessions::{browser, event, subscribe},
};

/// Names of which each is refused to somebody who may see `a/1`, and with what.
const OTHERS: [(&str, &str); 33] = [
    // As it is, and as if there were no such thing.
    ("b/1", "not_authorized"),
    ("nothing", "not_authorized"),
    // Patterns, of every kind that somebody may have made of them.
    ("*", "invalid_message"),
    ("b/*", "not_authorized"),
    ("a/*", "not_authorized"),
    ("*/1", "not_authorized"),
    ("**", "not_authorized"),
    ("?/1", "not_authorized"),
    ("[ab]/1", "not_authorized"),
    ("{a,b}/1", "not_authorized"),
    (".*", "not_authorized"),
    ("b/1,a/1", "not_authorized"),
    ("#", "not_authorized"),
    // What looks like one's own: another case, other alphabets, other slashes, what does not show.
    ("A/1", "not_authorized"),
    ("\u{430}/1", "not_authorized"),
    ("\u{FF41}/1", "not_authorized"),
    ("a\u{2215}1", "not_authorized"),
    ("a/\u{661}", "not_authorized"),
    ("a/1\u{301}", "not_authorized"),
    ("a\u{200B}/1", "invalid_message"),
    ("a/\u{202E}1", "invalid_message"),
    ("a/1\0", "invalid_message"),
    ("a/1 ", "invalid_message"),
    // Paths.
    ("a/1/../../b/1", "invalid_message"),
    ("b/1/../../a/1", "invalid_message"),
    ("./a/1", "invalid_message"),
    ("a/./1", "invalid_message"),
    ("/a/1", "not_authorized"),
    ("a//1", "not_authorized"),
    ("a/1/", "not_authorized"),
    ("a\\1", "not_authorized"),
    ("a%2F1", "not_authorized"),
    ("a/1?x=b/1", "not_authorized"),
];

#[tokio::test]
async fn another_ones_project_is_refused_over_every_way_however_it_is_written() {
    let service = Service::with(&[("TIDINGS_AUTH", "signed-cookie"), ("TIDINGS_SESSION_SECRET", SECRET)]);
    service.publish(&json!([event("a/1", 1), event("b/1", 1)])).await;
    let cookie = signed(SECRET, &of("eve", &json!(["a/1"])), 1);
    let mut client = browser(&service, &cookie).await;
    for (project, code) in OTHERS {
        let refused = client.ask(&subscribe(project)).await;
        assert_eq!((&refused["type"], &refused["code"]), (&json!("error"), &json!(code)), "{project:?}");
        // The announcements have a history, of which everybody sees what is for him.
        if project == "*" {
            continue;
        }
        let status = if code == "not_authorized" { 403 } else { 400 };
        let written = percent_encoded(project);
        for path in [format!("/api/projects/{written}/events"), format!("/sse?project_id={written}")] {
            let answer = request("GET", &service.url(&path), &[("cookie", &cookie)], b"").await;
            assert_eq!(answer.status, status, "{path}: {}", answer.text);
            assert!(!answer.text.contains("number"), "{path}: {}", answer.text);
            if status == 403 {
                assert_eq!(answer.json()["code"], "not_authorized", "{path}");
            }
        }
    }
    // What the path of the request itself makes of it, which no client cleans up for us.
    for path in [
        "/api/projects/a%2F1/../b%2F1/events",
        "/api/projects/a%2F1/events/../../b%2F1/events",
        "/api/projects/b/1/events",
        "/api//projects/b%2F1/events",
        "/api/projects/b%2F1/events/",
        "/api/projects/b%2F1/events;a",
    ] {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"
        );
        let answer = super::requests::answer(&service, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
    }
    let both = service.url("/sse?project_id=a%2F1&project_id=b%2F1");
    assert_eq!(request("GET", &both, &[("cookie", &cookie)], b"").await.status, 400);
    // After all that, what comes is one's own.
    client.ask(&subscribe("a/1")).await;
    service.publish(&json!([event("b/1", 2), event("a/1", 2)])).await;
    assert_eq!(client.next_event().await["project_id"], "a/1");
    client.nothing_waits().await;
    client.close().await;
}

#[tokio::test]
async fn a_pattern_among_ones_rights_is_no_subscription_to_all_that_it_matches() {
    let service = super::service("signed-cookie", &[]);
    let mut client = browser(&service, &signed(SECRET, &of("ada", &json!(["a/*"])), 1)).await;
    // A project may be called so.
    assert_eq!(client.ask(&subscribe("a/*")).await["type"], "subscription.confirmed");
    for project in ["a/1", "a/*"] {
        let answer = post(&service, "/api/events", "app-key-0123456789", &event(project, 1)).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
    }
    assert_eq!(client.next_event().await["project_id"], "a/*");
    client.nothing_waits().await;
    client.close().await;
}

#[tokio::test]
async fn positions_of_another_ones_project_in_a_resume_bring_nothing_of_it() {
    let service = Service::with(&[("TIDINGS_AUTH", "signed-cookie"), ("TIDINGS_SESSION_SECRET", SECRET)]);
    let place = service.publish(&json!([event("b/1", 1), event("a/1", 1)])).await["events"][0].clone();
    let cookie = signed(SECRET, &of("eve", &json!(["a/1"])), 1);
    let mut former = browser(&service, &cookie).await;
    former.ask(&subscribe("a/1")).await;
    let token = former.established["resume_token"].clone();
    drop(former);
    let mut client: Client = browser(&service, &cookie).await;
    let positions = json!({"b/1": {"epoch": place["epoch"], "offset": 0}});
    let resumed = client.ask(&json!({"type": "resume", "token": token, "positions": positions})).await;
    assert_eq!(resumed["subscriptions"], json!(["a/1"]), "{resumed}");
    assert_eq!(client.next_event().await["project_id"], "a/1");
    service.publish(&event("b/1", 2)).await;
    client.nothing_waits().await;
    client.close().await;
}

/// Every byte that is no letter and no digit.
fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |text, byte| match byte {
        byte if byte.is_ascii_alphanumeric() => text + &char::from(byte).to_string(),
        byte => text + &format!("%{byte:02X}"),
    })
}
