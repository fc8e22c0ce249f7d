//! Clients that read too little: what they get instead, when they are sent away, and that nobody else notices.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    client::{Client, Raw},
    fixture::{Service, report, until},
};

/// History and patience for whatever a test publishes.
const ROOMY: [(&str, &str); 3] = [
    ("TIDINGS_HISTORY_EVENTS", "1000000"),
    ("TIDINGS_HISTORY_BYTES", "1000000000"),
    ("TIDINGS_SLOW_BYTES_MAX", "1000000000"),
];

fn progress(number: u64, bytes: usize) -> Value {
    json!({
        "type": "task.progress",
        "project_id": "p",
        "task_id": "t",
        "progress": {"current": number, "total": 1_000_000},
        "message": "x".repeat(bytes),
    })
}

fn step(number: u64, bytes: usize) -> Value {
    json!({"type": "step.done", "project_id": "p", "number": number, "data": "x".repeat(bytes)})
}

async fn fell_behind(service: &Service) -> bool {
    service.metric("tidings_subscriptions_behind_total").await > 0.5
}

/// Publishes batches of progress, each with a durable step at its end, until somebody has fallen behind, and some more;
/// then the end of the task. Returns how many batches and how many events there were.
async fn publish_until_behind(service: &Service, batch: u64, bytes: usize) -> (u64, u64) {
    let (mut batches, mut more) = (0, 5);
    while more > 0 {
        let numbers = batches * batch + 1..=(batches + 1) * batch;
        let mut events: Vec<_> = numbers.map(|number| progress(number, bytes)).collect();
        batches += 1;
        events.push(step(batches, 10));
        service.publish(&json!(events)).await;
        more -= u64::from(fell_behind(service).await);
        assert!(batches < 1000, "somebody is behind long before this");
    }
    service.publish(&json!({"type": "task.completed", "project_id": "p", "task_id": "t"})).await;
    (batches, batches * (batch + 1) + 1)
}

#[tokio::test]
async fn a_client_that_was_behind_gets_the_newest_progress_and_every_durable_event() {
    const BATCH: u64 = 200;
    let service = Service::with(&ROOMY);
    let mut slow = Raw::narrow(&service).await;
    let confirmed = slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    assert_eq!(confirmed["offset"], 0);
    let (batches, events) = publish_until_behind(&service, BATCH, 2000).await;
    let (mut frames, mut at, mut folded_sum, mut steps, mut last_progress) = (0, 0, 0, 0, 0);
    while at < events {
        let event = slow.next().await;
        frames += 1;
        let folded = event.get("folded").map_or(0, |folded| folded.as_u64().unwrap());
        assert_eq!(event["offset"], at + 1 + folded, "{}", event["type"]);
        assert_ne!(event.get("folded"), Some(&json!(0)));
        at += 1 + folded;
        folded_sum += folded;
        match event["type"].as_str().unwrap() {
            "task.progress" => {
                let current = event["progress"]["current"].as_u64().unwrap();
                assert!(current > last_progress);
                assert_eq!(event["message"].as_str().unwrap().len(), 2000);
                last_progress = current;
            }
            "step.done" => {
                steps += 1;
                assert_eq!(event["number"], steps);
            }
            "task.completed" => {
                assert_eq!(
                    (last_progress, steps),
                    (batches * BATCH, batches),
                    "its progress comes before it"
                );
                assert_eq!(at, events);
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(frames + folded_sum, events);
    assert!(folded_sum > BATCH, "{folded_sum} of {events} were folded");
    report(format_args!("a client that was behind got {frames} frames for {events} events"));
    // Then it is live again, and nothing is left out.
    service.publish(&json!([progress(1, 10), progress(2, 10), step(steps + 1, 10)])).await;
    for offset in events + 1..=events + 3 {
        let event = slow.next().await;
        assert_eq!((&event["offset"], event.get("folded")), (&json!(offset), None));
    }
}

#[tokio::test]
async fn a_client_that_reads_everything_gets_everything() {
    let service = Service::with(&ROOMY);
    // Another one that is behind changes nothing for it.
    let mut slow = Raw::narrow(&service).await;
    slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    let mut quick = Client::subscribed(&service, "p").await;
    let mut offset = 0;
    let mut more = 20;
    while more > 0 {
        // Less than the kernel takes at once, so that the client is never blocked, however busy the machine is.
        let events: Vec<_> = (1..=20).map(|number| progress(number, 2000)).collect();
        service.publish(&json!(events)).await;
        for current in 1..=20 {
            offset += 1;
            let event = quick.next_event().await;
            assert_eq!((&event["offset"], event.get("folded")), (&json!(offset), None));
            assert_eq!(event["progress"]["current"], current);
        }
        more -= usize::from(fell_behind(&service).await);
        assert!(offset < 100_000, "the slow one is behind long before this");
    }
}

#[tokio::test]
async fn a_filter_holds_for_a_client_that_is_behind() {
    let service = Service::with(&ROOMY);
    let mut slow = Raw::narrow(&service).await;
    let subscribe = json!({"type": "subscribe", "project_id": "p", "types": ["task.progress", "step.*"]});
    slow.subscribe(&subscribe).await;
    let mut batches = 0;
    let mut more = 5;
    while more > 0 {
        let mut events = Vec::new();
        for number in 1..=100 {
            events.push(progress(batches * 100 + number, 2000));
            events.push(json!({"type": "other.event", "project_id": "p", "data": "x".repeat(100)}));
        }
        batches += 1;
        events.push(step(batches, 10));
        service.publish(&json!(events)).await;
        more -= u64::from(fell_behind(&service).await);
        assert!(batches < 1000, "it is behind long before this");
    }
    let (mut steps, mut current, mut at, mut frames) = (0, 0, 0, 0);
    while steps < batches {
        let event = slow.next().await;
        frames += 1;
        let offset = event["offset"].as_u64().unwrap();
        assert!(offset > at);
        at = offset;
        match event["type"].as_str().unwrap() {
            "step.done" => {
                steps += 1;
                assert_eq!(event["number"], steps);
            }
            "task.progress" => {
                let next = event["progress"]["current"].as_u64().unwrap();
                assert!(next > current);
                current = next;
            }
            other => panic!("{other} does not pass the filter"),
        }
    }
    assert_eq!(current, batches * 100, "the last progress comes before the step behind it");
    assert!(frames < batches * 101, "some were folded");
}

#[tokio::test]
async fn a_client_for_which_too_much_waits_is_closed_and_gets_all_of_it_when_it_comes_back() {
    const BYTES: usize = 50_000;
    let service = Service::with(&[ROOMY[0], ROOMY[1], ("TIDINGS_SLOW_BYTES_MAX", "1000000")]);
    let mut slow = Raw::narrow(&service).await;
    let confirmed = slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    let (mut published, mut got) = (0, 0);
    // It reads one for ten that are published, until it is sent away; from then on it reads what there is.
    while service.metric("tidings_subscriptions").await > 0.5 {
        let events: Vec<_> = (1..=10).map(|number| step(published + number, BYTES)).collect();
        published += 10;
        service.publish(&json!(events)).await;
        got += 1;
        assert_eq!(slow.next().await["number"], got);
        assert!(published < 5000, "it is closed long before this");
    }
    let end = loop {
        match slow.next_or_end().await {
            Ok(event) => {
                got += 1;
                assert_eq!((&event["number"], event.get("folded")), (&json!(got), None));
            }
            Err(end) => break end,
        }
    };
    // One that took its time to read the rest was cut off instead.
    assert!(end.is_none_or(|code| code == 4508), "{end:?}");
    until("the connection ending", || async {
        service.metric("tidings_connections_closed_total{code=\"4508\"}").await > 0.5
    })
    .await;
    assert!(got < published);
    let mut back = Client::connect(&service).await;
    let since = json!({"epoch": confirmed["epoch"], "offset": got});
    let confirmed = back.ask(&json!({"type": "subscribe", "project_id": "p", "since": since})).await;
    assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(true), &json!(got)));
    while got < published {
        got += 1;
        let event = back.next_event().await;
        assert_eq!((&event["number"], &event["offset"]), (&json!(got), &json!(got)));
        assert_eq!(event["data"].as_str().unwrap().len(), BYTES);
    }
    back.nothing_waits().await;
}

#[tokio::test]
async fn a_client_whose_events_left_the_history_is_closed_and_told_the_state_when_it_comes_back() {
    let service = Service::with(&[("TIDINGS_HISTORY_EVENTS", "20"), ROOMY[2]]);
    let mut slow = Raw::narrow(&service).await;
    let confirmed = slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    let (mut published, mut more) = (0, 10);
    while more > 0 {
        let events: Vec<_> = (1..=10).map(|number| step(published + number, 50_000)).collect();
        published += 10;
        service.publish(&json!(events)).await;
        more -= u64::from(fell_behind(&service).await);
        assert!(published < 5000, "it is behind long before this");
    }
    let mut got = 0;
    let end = loop {
        match slow.next_or_end().await {
            Ok(event) if event["type"] == "step.done" => {
                got += 1;
                assert_eq!(event["number"], got, "a part is never presented as all of it");
            }
            Ok(beat) => assert_eq!(beat["type"], "system.heartbeat"),
            Err(end) => break end,
        }
    };
    assert_eq!(end, Some(4508));
    assert!(got < published);
    let mut back = Client::connect(&service).await;
    let since = json!({"epoch": confirmed["epoch"], "offset": got});
    let confirmed = back.ask(&json!({"type": "subscribe", "project_id": "p", "since": since})).await;
    assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(false), &json!(published)));
}

#[tokio::test]
async fn many_stuck_clients_hold_no_more_than_is_allowed_and_delay_nobody() {
    const PROJECTS: u64 = 20;
    const ROUNDS: u64 = 60;
    const BYTES: usize = 30_000;
    const RETAINED_BYTES_MAX: f64 = (2 << 20) as f64;
    // What is just being written comes on top.
    const ROUND_BYTES_MAX: f64 = 20.0 * 31_000.0;
    let service = Arc::new(Service::with(&[
        ROOMY[0],
        ROOMY[1],
        ROOMY[2],
        ("TIDINGS_SHARDS", "1"),
        ("TIDINGS_RETAINED_BYTES_MAX", "2097152"),
        // Neither age nor bytes make anybody fall behind: it is the limit of all together that has to.
        ("TIDINGS_BEHIND_AGE_MS", "60000"),
        ("TIDINGS_BEHIND_BYTES", "1000000000"),
    ]));
    let mut stuck = Vec::new();
    let mut quick = JoinSet::new();
    let (tell, mut got) = mpsc::channel(1);
    for project in 0..PROJECTS {
        let mut slow = Raw::narrow(&service).await;
        slow.subscribe(&json!({"type": "subscribe", "project_id": format!("p{project}")})).await;
        stuck.push(slow);
        let mut client = Client::subscribed(&service, &format!("p{project}")).await;
        let tell = tell.clone();
        quick.spawn(async move {
            for number in 1..=ROUNDS {
                let event = client.next_event().await;
                assert_eq!((&event["offset"], &event["number"]), (&json!(number), &json!(number)));
                tell.send(()).await.unwrap();
            }
            client
        });
    }
    let data = "x".repeat(BYTES);
    let mut peak = 0_f64;
    for number in 1..=ROUNDS {
        let event = |project| json!({"type": "a.b", "project_id": format!("p{project}"), "number": number, "data": data});
        service.publish(&json!((0..PROJECTS).map(event).collect::<Vec<_>>())).await;
        for _ in 0..PROJECTS {
            got.recv().await.unwrap();
        }
        peak = peak.max(service.metric("tidings_retained_bytes").await);
    }
    let clients = quick.join_all().await;
    report(format_args!(
        "retained for {PROJECTS} stuck clients: at most {peak} bytes of {} that were published",
        PROJECTS * ROUNDS * BYTES as u64,
    ));
    assert!(peak < RETAINED_BYTES_MAX + ROUND_BYTES_MAX, "{peak}");
    until("the rest sinking below the limit", || async {
        service.metric("tidings_retained_bytes").await < RETAINED_BYTES_MAX
    })
    .await;
    // Those that were stuck lose nothing by it.
    for mut slow in stuck {
        for number in 1..=ROUNDS {
            let event = slow.next().await;
            assert_eq!((&event["offset"], &event["number"]), (&json!(number), &json!(number)));
        }
    }
    drop(clients);
}

#[tokio::test]
async fn a_stuck_connection_is_taken_over_without_a_loss() {
    let service = Service::with(&ROOMY);
    let mut stuck = Raw::narrow(&service).await;
    stuck.send_json(&json!({"type": "subscribe", "project_id": "p"})).await;
    let established = stuck.next().await;
    let confirmed = stuck.next().await;
    let (batches, events) = publish_until_behind(&service, 100, 2000).await;
    let positions = json!({"p": {"epoch": confirmed["epoch"], "offset": 0}});
    let mut client = Client::connect(&service).await;
    let resume = json!({"type": "resume", "token": established["resume_token"], "positions": positions});
    let resumed = client.ask(&resume).await;
    assert_eq!(
        (&resumed["type"], &resumed["client_id"]),
        (&json!("connection.resumed"), &established["client_id"])
    );
    assert_eq!(client.next().await["recovered"], true);
    let (mut at, mut steps) = (0, 0);
    while at < events {
        let event = client.next_event().await;
        at += 1 + event.get("folded").map_or(0, |folded| folded.as_u64().unwrap());
        assert_eq!(event["offset"], at);
        steps += u64::from(event["type"] == "step.done");
    }
    assert_eq!(steps, batches);
    until("the stuck one being gone", || async { service.health().await["active_connections"] == 1 }).await;
}

#[tokio::test]
async fn a_client_that_is_behind_and_subscribes_anew_goes_on_from_where_it_says() {
    let service = Service::with(&ROOMY);
    let mut slow = Raw::narrow(&service).await;
    let confirmed = slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    let (batches, _) = publish_until_behind(&service, 100, 2000).await;
    let since = json!({"epoch": confirmed["epoch"], "offset": 0});
    slow.send_json(
        &json!({"type": "subscribe", "id": 2, "project_id": "p", "types": ["step.*"], "since": since}),
    )
    .await;
    // What was on its way comes first.
    loop {
        let message = slow.next().await;
        if message["id"] == 2 {
            assert_eq!((&message["recovered"], &message["offset"]), (&json!(true), &json!(0)));
            break;
        }
    }
    for number in 1..=batches {
        let event = slow.next().await;
        assert_eq!((&event["type"], &event["number"]), (&json!("step.done"), &json!(number)));
    }
    slow.send_json(&json!({"type": "unsubscribe", "project_id": "p"})).await;
    assert_eq!(slow.next().await["type"], "subscription.removed");
    service.publish(&step(1, 10)).await;
    slow.send_json(&json!({"type": "ping"})).await;
    assert_eq!(slow.next().await["type"], "pong");
}
