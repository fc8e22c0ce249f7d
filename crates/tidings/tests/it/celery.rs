//! The bridge to Celery over a real Redis: what Celery publishes is published by the tests, literally as it was seen. What real
//! workers do is in `e2e/test_celery.py`.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use redis::AsyncCommands as _;
use serde_json::{Value, json};

use crate::{
    client::Client,
    commands::tidings,
    fixture::{Redis, Service, request, until},
    restart::Process,
};

const ON: &str = r#"tidings_source_up{source="celery"}"#;

async fn service(redis: &Redis, more: &[(&str, &str)]) -> Service {
    let url = redis.url();
    let celery = [("TIDINGS_CELERY_BACKEND_URL", url.as_str()), ("TIDINGS_CELERY_BROKER_URL", &url)];
    let service = Service::with(&[&celery[..], more].concat());
    until("listening to Celery", || async { service.metric(ON).await > 0.5 }).await;
    service
}

/// A state of a task as the result backend writes it: kept, and published.
async fn write(redis: &Redis, id: &str, state: &Value) {
    write_bytes(redis, id, state.to_string().as_bytes()).await;
}

async fn write_bytes(redis: &Redis, id: &str, state: &[u8]) {
    let mut connection = redis.connection().await.unwrap();
    let key = format!("celery-task-meta-{id}");
    let mut both = redis::pipe();
    both.atomic().set_ex(&key, state, 60).ignore().publish(&key, state).ignore();
    both.query_async::<()>(&mut connection).await.unwrap();
}

/// A task's state with what `result_extended` adds.
#[allow(clippy::needless_pass_by_value, reason = "the tests make a value for each call")]
fn state(status: &str, project: &str, retries: u32, result: Value) -> Value {
    json!({"status": status, "result": result, "traceback": null, "children": [], "date_done": null, "name": "app.task",
        "args": [], "kwargs": {"project_id": project}, "worker": "w1@lab", "retries": retries, "queue": "celery"})
}

fn started(project: &str, retries: u32) -> Value {
    state("STARTED", project, retries, json!({"pid": 7 + retries, "hostname": "w1@lab"}))
}

/// An event of a worker, in its envelope.
async fn send_event(redis: &Redis, event: &Value) {
    let body = STANDARD.encode(event.to_string());
    let envelope = json!({"body": body, "content-encoding": "utf-8", "content-type": "application/json", "headers": {},
        "properties": {"body_encoding": "base64"}});
    let mut connection = redis.connection().await.unwrap();
    let _: u64 = connection.publish("/0.celeryev/task.multi", envelope.to_string()).await.unwrap();
}

/// What a client gets next of a task, shortly.
async fn next(client: &mut Client) -> String {
    let event = client.next().await;
    let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let words = [text("task_id"), text("type"), event["attempt"].to_string(), text("state"), text("reason")];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_task_is_shown_to_its_project_and_to_no_other() {
    let redis = Redis::started().await;
    let service = service(&redis, &[]).await;
    let (mut client, mut other) =
        (Client::subscribed(&service, "p").await, Client::subscribed(&service, "q").await);
    write(&redis, "t1", &started("p", 0)).await;
    write(&redis, "t1", &state("RETRY", "p", 0, json!({"exc_type": "OSError", "exc_message": ["try 0"]})))
        .await;
    write(&redis, "t1", &started("p", 1)).await;
    write(&redis, "t1", &state("PROGRESS", "p", 1, json!({"current": 1, "total": 4}))).await;
    write(&redis, "t1", &state("SUCCESS", "p", 1, json!({"secret": "result"}))).await;
    for expected in [
        "t1 task.started 0",
        "t1 task.progress 0 retrying",
        "t1 task.started 1",
        "t1 task.progress 1",
        "t1 task.completed 1",
    ] {
        assert_eq!(next(&mut client).await, expected);
    }
    client.nothing_waits().await;
    other.nothing_waits().await;
}

#[tokio::test]
async fn results_arguments_and_tracebacks_are_told_only_by_setting_and_up_to_a_limit() {
    let redis = Redis::started().await;
    let open = [
        ("TIDINGS_CELERY_RESULTS", "true"),
        ("TIDINGS_CELERY_KWARGS", "true"),
        ("TIDINGS_CELERY_TRACEBACKS", "true"),
        ("TIDINGS_CELERY_VALUE_BYTES_MAX", "64"),
    ];
    for (settings, tells) in [(&[][..], false), (&open[..], true)] {
        let service = service(&redis, settings).await;
        let mut client = Client::subscribed(&service, "p").await;
        write(&redis, "small", &state("SUCCESS", "p", 0, json!({"frames": 3}))).await;
        write(&redis, "large", &state("SUCCESS", "p", 0, json!("x".repeat(100)))).await;
        let mut failed = state("FAILURE", "p", 0, json!({"exc_type": "ValueError", "exc_message": ["boom"]}));
        failed["traceback"] = json!(format!("{}ValueError: boom", "Traceback\n".repeat(50)));
        write(&redis, "failed", &failed).await;
        let (small_started, small) = (client.next().await, client.next().await);
        assert_eq!(small_started["metadata"]["kwargs"]["project_id"] == "p", tells, "{small_started}");
        assert_eq!(small["result"] == json!({"frames": 3}), tells, "{small}");
        client.next().await;
        assert_eq!(client.next().await["result"], Value::Null);
        client.next().await;
        let failed = client.next().await;
        assert_eq!(failed["error"], "ValueError: boom");
        assert_eq!(
            failed["traceback"].as_str().map(|text| text.len() == 64 && text.ends_with("boom")),
            tells.then_some(true)
        );
    }
}

#[tokio::test]
async fn hostile_content_is_counted_and_the_change_of_state_is_kept() {
    let redis = Redis::started().await;
    let service = service(&redis, &[("TIDINGS_CELERY_RESULTS", "true")]).await;
    let mut client = Client::subscribed(&service, "p").await;
    let prefix = r#"{"status": "SUCCESS", "name": "app.task", "kwargs": {"project_id": "p"}, "retries": 0, "result": "#;
    let deep = "[".repeat(500) + &"]".repeat(500);
    for (id, result) in [
        ("nan", r#"{"a": NaN, "b": -Infinity}"#),
        ("surrogate", r#""\ud800""#),
        ("huge", "1180591620717411303424"),
        ("deep", &deep),
        ("large", &format!("\"{}\"", "x".repeat(5_000_000))),
    ] {
        write_bytes(&redis, id, format!("{prefix}{result}}}").as_bytes()).await;
        assert_eq!(next(&mut client).await, format!("{id} task.started 0"));
        assert_eq!(next(&mut client).await, format!("{id} task.completed 0"));
    }
    // What cannot be read does not say where it belongs; that was said before.
    write(&redis, "pickled", &started("p", 0)).await;
    let pickle = b"\x80\x04\x95u\0\0\0\0\0\0\0}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result\x94";
    write_bytes(&redis, "pickled", pickle).await;
    write_bytes(&redis, "rubbish", b"\xff\xfe").await;
    assert_eq!(next(&mut client).await, "pickled task.started 0");
    assert_eq!(next(&mut client).await, "pickled task.completed 0");
    until("both being counted", || async {
        service.metric(r#"tidings_celery_unreadable_total{way="backend",reason="body"}"#).await > 1.5
    })
    .await;
    client.nothing_waits().await;
}

#[tokio::test]
async fn a_task_without_a_result_ends_by_its_event() {
    let redis = Redis::started().await;
    let service = service(&redis, &[]).await;
    let mut client = Client::subscribed(&service, "p").await;
    write(&redis, "t", &state("PROGRESS", "p", 0, json!({"current": 1, "total": 2}))).await;
    send_event(
        &redis,
        &json!([{"type": "task-succeeded", "uuid": "t", "hostname": "w1@lab", "timestamp": 1.0}]),
    )
    .await;
    for expected in ["t task.started 0", "t task.progress 0", "t task.completed 0"] {
        assert_eq!(next(&mut client).await, expected);
    }
}

#[tokio::test]
async fn a_task_is_registered_before_anything_is_heard_of_it_or_after_and_that_stands_over_its_arguments() {
    let redis = Redis::started().await;
    let keys = r#"[{"name": "web", "key": "a-key-of-16-bytes", "projects": ["p"]}]"#;
    let service = service(&redis, &[("TIDINGS_KEYS", keys)]).await;
    let mut client = Client::subscribed(&service, "p").await;
    let register = async |id: &str, body: Value| {
        let key = [("Authorization", "Bearer a-key-of-16-bytes")];
        let url = service.url(&format!("/api/tasks/{id}"));
        request("POST", &url, &key, body.to_string().as_bytes()).await.status
    };
    assert_eq!(register("before", json!({"project_id": "p"})).await, 202);
    write(&redis, "before", &started("elsewhere", 0)).await;
    assert_eq!(next(&mut client).await, "before task.started 0");
    let nameless = json!({"status": "SUCCESS", "result": null});
    write(&redis, "after", &nameless).await;
    assert_eq!(register("after", json!({"project_id": "p", "task_name": "app.after"})).await, 202);
    let after = client.next().await;
    assert_eq!((&after["type"], &after["task_name"]), (&json!("task.started"), &json!("app.after")));
    assert_eq!(next(&mut client).await, "after task.completed 0");
    for (id, body, status) in [
        ("x", json!({"project_id": "q"}), 403),
        ("x", json!({"project_id": "../q"}), 422),
        ("x", json!({"project": "p"}), 422),
        ("x", json!({"project_id": "p", "task_name": ""}), 422),
        (&"x".repeat(151), json!({"project_id": "p"}), 422),
    ] {
        assert_eq!(register(id, body.clone()).await, status, "{body}");
    }
    let keyless = request("POST", &service.url("/api/tasks/x"), &[], b"{\"project_id\":\"p\"}").await;
    assert_eq!(keyless.status, 401);
}

#[tokio::test]
async fn a_service_without_celery_says_so_to_who_registers_a_task() {
    let service = Service::start();
    let answer = request("POST", &service.url("/api/tasks/x"), &[], b"{\"project_id\":\"p\"}").await;
    assert_eq!((answer.status, answer.json()["code"].as_str()), (409, Some("no_celery")));
}

#[tokio::test]
async fn what_belongs_to_no_project_is_counted_and_the_doctor_says_why() {
    let redis = Redis::started().await;
    let service = service(&redis, &[]).await;
    write(&redis, "t1", &json!({"status": "STARTED", "result": {"pid": 1, "hostname": "h"}})).await;
    write(&redis, "t2", &json!({"status": "SUCCESS", "result": 1, "name": "app.other", "kwargs": {}})).await;
    until("both being counted", || async {
        service.metric("tidings_celery_tasks_without_project").await > 1.5
    })
    .await;
    let report = request("GET", &service.url("/api/doctor"), &[], b"").await.json();
    let homeless = report["celery"]["without_project"].as_array().unwrap();
    let reason = |name: &str| {
        let of_name = homeless.iter().find(|known| known["task_name"] == name).unwrap();
        of_name["reason"].as_str().unwrap().to_owned()
    };
    assert!(
        reason("(unknown)").contains("result_extended") && reason("app.other").contains("[[celery.rules]]")
    );
    let url = redis.url();
    let settings = [("TIDINGS_CELERY_BACKEND_URL", url.as_str()), ("TIDINGS_CELERY_BROKER_URL", &url)];
    let output = tidings(&["doctor", "--url", &service.url("")], &settings).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    for words in ["may be listened to", "no Celery worker is heard", "tasks `app.other` belong to no project"]
    {
        assert!(said.contains(words), "{said}");
    }
}

#[tokio::test]
async fn the_doctor_says_what_cannot_be_reached_and_fails() {
    let redis = Redis::reserved();
    let settings = [("TIDINGS_CELERY_BACKEND_URL", redis.url())];
    let settings: Vec<_> = settings.iter().map(|(name, url)| (*name, url.as_str())).collect();
    let output = tidings(&["doctor", "--url", "http://127.0.0.1:1"], &settings).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && said.contains("[-] TIDINGS_CELERY_BACKEND_URL: "), "{said}");
    assert!(said.contains("the service cannot be asked"), "{said}");
}

#[tokio::test]
async fn what_ended_while_redis_or_the_service_was_away_is_told_and_nothing_twice() {
    let mut redis = Redis::started().await;
    let folder = tempfile::tempdir().unwrap();
    let url = redis.url();
    let start = || {
        let mut command = tidings(&["serve", "--port", "0"], &[]);
        command
            .env("TIDINGS_PERSIST", "true")
            .env("TIDINGS_DATA_DIR", folder.path())
            .env("TIDINGS_CELERY_BACKEND_URL", &url);
        Process::spawn(command)
    };
    let process = start();
    let heard = async |process: &Process| {
        let metrics = process.url("/metrics");
        until("listening to Celery", || async {
            request("GET", &metrics, &[], b"").await.text.contains(&format!("{ON} 1"))
        })
        .await;
    };
    let types = async |process: &Process, count: usize| {
        let url = process.url("/api/projects/p/events");
        until("the events being there", || async {
            request("GET", &url, &[], b"").await.json()["events"].as_array().unwrap().len() >= count
        })
        .await;
        let answer = request("GET", &url, &[], b"").await.json();
        let events = answer["events"].as_array().unwrap().iter();
        events
            .map(|event| {
                format!("{} {}", event["task_id"].as_str().unwrap(), event["type"].as_str().unwrap())
            })
            .collect::<Vec<_>>()
    };
    heard(&process).await;
    write(&redis, "a", &started("p", 0)).await;
    write(&redis, "b", &started("p", 0)).await;
    assert_eq!(types(&process, 2).await, ["a task.started", "b task.started"]);
    drop(process);
    write(&redis, "a", &state("SUCCESS", "p", 0, Value::Null)).await;
    let process = start();
    heard(&process).await;
    assert_eq!(types(&process, 3).await, ["a task.started", "b task.started", "a task.completed"]);
    // The other one ends while nothing can be heard; Redis itself has it when it comes back.
    redis.kill();
    let metrics = process.url("/metrics");
    until("the silence being noticed", || async {
        request("GET", &metrics, &[], b"").await.text.contains(&format!("{ON} 0"))
    })
    .await;
    redis.start().await;
    let mut connection = redis.connection().await.unwrap();
    let end = state("FAILURE", "p", 0, json!({"exc_type": "E"})).to_string();
    let _: () = connection.set("celery-task-meta-b", end).await.unwrap();
    let told = types(&process, 4).await;
    assert_eq!(told[3..], ["b task.failed"], "{told:?}");
}

#[tokio::test]
async fn two_nodes_tell_once_and_the_other_goes_on_where_one_stops() {
    let (redis, celery) = (Redis::started().await, Redis::started().await);
    let (streams, url) = (redis.url(), celery.url());
    let settings = [("REDIS_URL", streams.as_str()), ("TIDINGS_CELERY_BACKEND_URL", &url)];
    let (one, other) = (Service::with(&settings), Service::with(&settings));
    for service in [&one, &other] {
        until("listening to Celery", || async { service.metric(ON).await > 0.5 }).await;
    }
    let mut client = Client::subscribed(&other, "p").await;
    write(&celery, "t", &started("p", 0)).await;
    assert_eq!(next(&mut client).await, "t task.started 0");
    let appends = async |service: &Service| {
        let report = request("GET", &service.url("/api/doctor"), &[], b"").await.json();
        report["celery"]["appends"] == true
    };
    until("one of them appending", || async { appends(&one).await != appends(&other).await }).await;
    // Whichever it is, registrations at either are known to both.
    let body = b"{\"project_id\":\"p\"}";
    assert_eq!(request("POST", &one.url("/api/tasks/r"), &[], body).await.status, 202);
    write(&celery, "r", &started("elsewhere", 0)).await;
    assert_eq!(next(&mut client).await, "r task.started 0");
    drop(one);
    write(&celery, "t", &state("SUCCESS", "p", 0, Value::Null)).await;
    assert_eq!(next(&mut client).await, "t task.completed 0");
    client.nothing_waits().await;
}
