//! The routes.

use serde_json::{Value, json};

use crate::{
    client::Client,
    fixture::{Answer, Service, request},
};

async fn publish(service: &Service, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    request("POST", &service.url("/api/events"), headers, body).await
}

#[tokio::test]
async fn an_object_an_array_and_ndjson_are_published() {
    let service = Service::start();
    let one = r#"{"type":"a.b","project_id":"p"}"#;
    let announcement = r#"{"type":"notice.posted"}"#;
    let pretty = "{\n  \"type\": \"a.b\",\n  \"project_id\": \"p\"\n}";
    for (body, content_type, expected) in [
        (one.to_owned(), "application/json", json!([["p", 1]])),
        (format!("[{one},{announcement}]"), "application/json", json!([["p", 2], [null, 1]])),
        (format!("{one}\n\n{one}\r\n"), "application/x-ndjson", json!([["p", 3], ["p", 4]])),
        (format!("{one}\n{one}"), "text/plain", json!([["p", 5], ["p", 6]])),
        (pretty.to_owned(), "application/json", json!([["p", 7]])),
    ] {
        let answer = publish(&service, &[("content-type", content_type)], body.as_bytes()).await;
        assert_eq!(answer.status, 202, "{body}: {}", answer.text);
        let answer = answer.json();
        let places: Vec<_> = answer["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| json!([event["project_id"], event["offset"]]))
            .collect();
        assert_eq!(json!(places), expected);
        assert_eq!(answer["accepted"], places.len());
    }
}

#[tokio::test]
async fn one_wrong_field_in_item_3_of_5_publishes_nothing_and_is_named() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    let good = json!({"type": "task.progress", "project_id": "p", "task_id": "t", "progress": {"current": 1, "total": 2}});
    let bad = json!({"type": "task.progress", "project_id": "p", "task_id": "t", "progress": 5});
    let answer = publish(&service, &[], json!([good, good, bad, good, good]).to_string().as_bytes()).await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (422, "application/problem+json"));
    let expected = json!({"type": "about:blank", "title": "invalid events", "status": 422,
        "errors": [{"index": 2, "field": "progress", "message": "expected an object with current and total"}]});
    assert_eq!(answer.json(), expected);
    client.nothing_waits().await;
    assert!(
        (service.metric(r#"tidings_events_rejected_total{source="http",reason="invalid_event"}"#).await
            - 1.0)
            .abs()
            < 0.1
    );
}

#[tokio::test]
async fn what_cannot_be_events_is_refused() {
    let service = Service::start();
    let too_many = json!(vec![json!({"type": "a.b"}); 1001]).to_string();
    let too_large = json!({"type": "a.b", "x": "x".repeat(1024 * 1024)}).to_string();
    for (body, words) in [
        ("", "empty body"),
        ("hello", "not JSON"),
        ("[", "not JSON"),
        ("[]", "found 0"),
        ("{\"type\":\"a.b\"", "not JSON"),
        (r#"{"type":"system.heartbeat"}"#, "comes from the service alone"),
        (r#"{"type":"a.b","type":"a.b"}"#, "duplicate key"),
        (&too_many, "found 1001"),
        (&too_large, "at most 1048576"),
    ] {
        let answer = publish(&service, &[], body.as_bytes()).await;
        let start: String = body.chars().take(40).collect();
        assert_eq!(answer.status, 422, "{start}: {}", answer.text);
        assert!(answer.text.contains(words), "{start}: {}", answer.text);
    }
    let answer = publish(&service, &[], &vec![b' '; 17 * 1024 * 1024]).await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (413, "application/problem+json"));
}

#[tokio::test]
async fn a_request_repeated_with_its_idempotency_key_publishes_nothing_twice() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    let body =
        json!([{"type": "a.b", "project_id": "p", "n": 1}, {"type": "a.b", "project_id": "p", "n": 2}])
            .to_string();
    let first = publish(&service, &[("idempotency-key", "k1")], body.as_bytes()).await.json();
    let again = publish(&service, &[("idempotency-key", "k1")], body.as_bytes()).await.json();
    assert_eq!(first, again);
    let other = publish(&service, &[("idempotency-key", "k2")], body.as_bytes()).await.json();
    assert_eq!(other["events"][0]["offset"], 3);
    for offset in 1..=4 {
        assert_eq!(client.next().await["offset"], offset);
    }
    client.nothing_waits().await;
    let long = "k".repeat(151);
    assert_eq!(publish(&service, &[("idempotency-key", &long)], body.as_bytes()).await.status, 400);
}

#[tokio::test]
async fn the_history_is_read_in_pages() {
    let service = Service::start();
    let events: Vec<_> = (1..=5).map(|n| json!({"type": "a.b", "project_id": "p", "n": n})).collect();
    service.publish(&json!(events)).await;
    let page = |query: &str| {
        let url = service.url(&format!("/api/projects/p/events{query}"));
        async move { request("GET", &url, &[], b"").await }
    };
    let all = page("").await.json();
    assert_eq!((&all["offset"], &all["complete"]), (&json!(5), &json!(true)));
    let epoch = all["epoch"].as_str().unwrap();
    let numbers = |page: &Value| {
        page["events"].as_array().unwrap().iter().map(|event| event["n"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&all), [1, 2, 3, 4, 5]);
    assert_eq!(numbers(&page(&format!("?since_epoch={epoch}&since_offset=2&limit=2")).await.json()), [3, 4]);
    assert_eq!(page("?since_epoch=other&since_offset=2").await.json()["complete"], false);
    for query in ["?limit=0", "?limit=1001", "?limit=x", "?since_offset=1", "?since_epoch=x"] {
        let answer = page(query).await;
        assert_eq!(
            (answer.status, answer.headers["content-type"].as_str()),
            (400, "application/problem+json"),
            "{query}"
        );
    }
}

#[tokio::test]
async fn the_websocket_url_is_served_for_each_environment() {
    for (variables, expected) in [
        (vec![("ENVIRONMENT", "development")], "ws://localhost:PORT/ws"),
        (
            vec![("ENVIRONMENT", "docker"), ("BACKEND_HOST", "tidings"), ("TIDINGS_AUTH", "none")],
            "ws://tidings:PORT/ws",
        ),
        (
            vec![("ENVIRONMENT", "production"), ("DOMAIN", "app.example.com"), ("TIDINGS_AUTH", "none")],
            "wss://app.example.com/ws",
        ),
    ] {
        let service = Service::with(&variables);
        let config = request("GET", &service.url("/api/config"), &[], b"").await.json();
        let expected = expected.replace("PORT", &service.address.port().to_string());
        let environment = variables[0].1;
        let expected = json!({"websocket_url": expected, "protocol": 1, "heartbeat_interval": 30, "environment": environment});
        assert_eq!(config, expected);
    }
}

#[tokio::test]
async fn the_health_body_is_the_contracts() {
    let own = [("CONTAINER_ID", "web-1"), ("CONTAINER_RESTART", "true"), ("TIDINGS_ENGINE", "embedded")];
    let service = Service::with(&own);
    let _client = Client::connect(&service).await;
    let mut health = service.health().await;
    assert!(health["timestamp"].take().as_str().is_some_and(|text| text.ends_with('Z')));
    let expected = json!({"status": "healthy", "active_connections": 1, "redis_connected": false, "timestamp": null,
        "node": "web-1", "restarted": true});
    assert_eq!(health, expected);
    for path in ["/livez", "/readyz"] {
        let answer = request("GET", &service.url(path), &[], b"").await;
        assert_eq!((answer.status, answer.text.as_str()), (200, "ok\n"));
    }
    assert!(request("GET", &service.url("/readyz?verbose"), &[], b"").await.text.starts_with("[+] "));
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    service.publish(&json!({"type": "task.completed", "project_id": "p", "task_id": "t"})).await;
    service.publish(&json!({"type": "my.own", "project_id": "p"})).await;
    client.next().await;
    client.next().await;
    for (name, value) in [
        ("tidings_connections", 1.0),
        ("tidings_subscriptions", 1.0),
        ("tidings_streams", 2.0),
        ("tidings_connections_opened_total", 1.0),
        (r#"tidings_events_received_total{source="http"}"#, 2.0),
        (r#"tidings_events_appended_total{source="http",type="task.completed"}"#, 1.0),
        (r#"tidings_events_appended_total{source="http",type="custom"}"#, 1.0),
        ("tidings_client_messages_received_total", 1.0),
    ] {
        assert!((service.metric(name).await - value).abs() < 0.1, "{name}");
    }
    assert!(service.metric("tidings_messages_sent_total").await >= 3.0);
}

#[tokio::test]
async fn with_keys_a_publisher_needs_one() {
    let service = Service::with(&[("TIDINGS_PUBLISH_KEYS", "one,two"), ("TIDINGS_ADMIN_KEY", "admin")]);
    let body = br#"{"type":"a.b"}"#;
    for (headers, status) in [
        (vec![], 401),
        (vec![("authorization", "Bearer wrong")], 401),
        (vec![("authorization", "Basic b25l")], 401),
        (vec![("authorization", "Bearer two")], 202),
        (vec![("authorization", "Bearer admin")], 202),
    ] {
        let answer = publish(&service, &headers, body).await;
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.text);
        assert_eq!(answer.headers.contains_key("www-authenticate"), status == 401);
    }
}

#[tokio::test]
async fn without_keys_neither_a_strangers_page_nor_a_proxy_publishes() {
    let service = Service::start();
    for header in
        [("origin", "https://evil.example"), ("x-forwarded-for", "203.0.113.7"), ("host", "rebound.example")]
    {
        let answer = publish(&service, &[header], br#"{"type":"a.b"}"#).await;
        assert_eq!(answer.status, 401, "{header:?}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("TIDINGS_PUBLISH_KEYS"));
    }
}

#[tokio::test]
async fn an_internal_listener_takes_publishing_and_metrics_from_the_public_one() {
    let service = Service::with(&[("TIDINGS_INTERNAL_LISTEN", "127.0.0.1:0")]);
    let internal = format!("http://localhost:{}", service.internal.unwrap().port());
    let mut client = Client::subscribed(&service, "p").await;
    let body = br#"{"type":"a.b","project_id":"p"}"#;
    assert_eq!(publish(&service, &[], body).await.status, 404);
    assert_eq!(request("GET", &service.url("/metrics"), &[], b"").await.status, 404);
    assert_eq!(request("POST", &format!("{internal}/api/events"), &[], body).await.status, 202);
    assert_eq!(client.next().await["type"], "a.b");
    assert_eq!(request("GET", &format!("{internal}/metrics"), &[], b"").await.status, 200);
    assert_eq!(request("GET", &format!("{internal}/readyz"), &[], b"").await.status, 200);
    assert_eq!(request("GET", &format!("{internal}/ws"), &[], b"").await.status, 404);
}

#[tokio::test]
async fn in_production_metrics_need_the_admin_key() {
    let key = "admin-0123456789abcdef";
    let variables = [("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none"), ("TIDINGS_ADMIN_KEY", key)];
    let service = Service::with(&variables);
    let metrics = |headers: &'static [(&str, &str)]| {
        let url = service.url("/metrics");
        async move { request("GET", &url, headers, b"").await.status }
    };
    assert_eq!(metrics(&[]).await, 401);
    assert_eq!(metrics(&[("authorization", "Bearer admin-0123456789abcdef")]).await, 200);
    assert_eq!(publish(&service, &[], br#"{"type":"a.b"}"#).await.status, 401);
    assert_eq!(request("GET", &service.url("/console"), &[], b"").await.status, 404);
}

#[tokio::test]
async fn pages_of_allowed_origins_may_read() {
    let service = Service::with(&[("TIDINGS_ALLOWED_ORIGINS", "https://app.example.com")]);
    for (origin, allowed) in [("https://app.example.com", true), ("https://evil.example", false)] {
        let answer = request("GET", &service.url("/api/config"), &[("origin", origin)], b"").await;
        let header = answer.headers.get("access-control-allow-origin").map(String::as_str);
        assert_eq!(header, allowed.then_some(origin));
    }
    let preflight = [("origin", "https://app.example.com"), ("access-control-request-method", "GET")];
    let answer = request("OPTIONS", &service.url("/api/projects/p/events"), &preflight, b"").await;
    assert_eq!(answer.headers["access-control-allow-credentials"], "true");
}

#[tokio::test]
async fn wrong_methods_and_paths_are_told() {
    let service = Service::start();
    for (method, path, status) in [
        ("DELETE", "/api/events", 405),
        ("GET", "/api/events", 405),
        ("PUT", "/health/websocket", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/schema/nothing.json", 404),
    ] {
        let answer = request(method, &service.url(path), &[], b"").await;
        assert_eq!(
            (answer.status, answer.headers["content-type"].as_str()),
            (status, "application/problem+json"),
            "{path}"
        );
        assert_eq!(answer.json()["status"], status);
    }
}

#[tokio::test]
async fn the_schemas_and_the_console_are_served() {
    let service = Service::start();
    let schema = request("GET", &service.url("/schema/events.json"), &[], b"").await;
    assert_eq!(schema.json()["title"], "Event");
    for path in ["/console", "/console/console.js", "/console/console.css"] {
        let answer = request("GET", &service.url(path), &[], b"").await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.headers["content-security-policy"].contains("default-src 'none'"));
    }
}
