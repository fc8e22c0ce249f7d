//! What every engine must do: the contract of [`Engine`] as tests. An engine's own file runs each of them on it.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tidings_engine::engine::{CatchUp, Deliver, Engine, PageLimit, Record};
use tidings_protocol::{Epoch, Position, StateSnapshot, StreamId, TypeFilter};

use crate::{event, stream};

/// Notes what an engine delivers.
#[derive(Debug, Default)]
pub(crate) struct Deliveries(Mutex<Vec<(StreamId, Arc<Record>)>>);

impl Deliver for Deliveries {
    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]) {
        assert_eq!(records.last().map(|record| record.offset), Some(position.offset));
        self.0.lock().extend(records.iter().map(|record| (stream.clone(), Arc::clone(record))));
    }
}

impl Deliveries {
    pub(crate) fn of(&self, stream: &StreamId) -> Vec<Arc<Record>> {
        self.0.lock().iter().filter(|(of, _)| of == stream).map(|(_, record)| Arc::clone(record)).collect()
    }
}

/// At most so many records, unfolded.
pub(crate) fn at_most(records: usize) -> PageLimit {
    PageLimit { records, bytes: usize::MAX, folded: false }
}

fn offsets(records: &[Arc<Record>]) -> Vec<u64> {
    records.iter().map(|record| record.offset).collect()
}

fn progress(task: &str, current: u32) -> tidings_protocol::Event {
    let progress = json!({"current": current, "total": 100});
    event(&json!({"type": "task.progress", "project_id": "p", "task_id": task, "progress": progress}))
}

fn completed(task: &str) -> tidings_protocol::Event {
    event(&json!({"type": "task.completed", "project_id": "p", "task_id": task}))
}

async fn missed(engine: &dyn Engine, since: &Position) -> Option<Vec<Arc<Record>>> {
    match engine.join(&stream("p"), Some(since), &TypeFilter::everything()).await.unwrap().catch_up {
        CatchUp::Recovered(records) => Some(records),
        CatchUp::State(_) => None,
    }
}

async fn state(engine: &dyn Engine, types: &TypeFilter) -> StateSnapshot {
    match engine.join(&stream("p"), None, types).await.unwrap().catch_up {
        CatchUp::State(state) => state,
        CatchUp::Recovered(_) => panic!("without `since` there is nothing to recover"),
    }
}

fn tasks(state: &StateSnapshot) -> Vec<Value> {
    state.tasks.iter().map(|task| serde_json::from_str(task.get()).unwrap()).collect()
}

pub(crate) async fn events_get_the_next_offset_of_their_stream_and_are_delivered_once(
    engine: &dyn Engine,
    deliveries: &Deliveries,
) {
    let custom = |project: &str| event(&json!({"type": "a.b", "project_id": project}));
    let appended = engine.append(vec![custom("p"), custom("q"), custom("p")]).await.unwrap();
    let places: Vec<_> = appended.iter().map(|a| (a.stream.to_string(), a.position.offset)).collect();
    assert_eq!(places, [("p".into(), 1), ("q".into(), 1), ("p".into(), 2)]);
    engine.append(vec![custom("p")]).await.unwrap();
    assert_eq!(offsets(&deliveries.of(&stream("p"))), [1, 2, 3]);
    assert_eq!(offsets(&deliveries.of(&stream("q"))), [1]);
    let json: Value = serde_json::from_slice(deliveries.of(&stream("p"))[2].json()).unwrap();
    assert_eq!(json["offset"], 3);
}

pub(crate) async fn a_repeated_id_is_the_same_event(engine: &dyn Engine, deliveries: &Deliveries) {
    let with_id = |id: &str| event(&json!({"type": "a.b", "project_id": "p", "id": id}));
    let first = engine.append(vec![with_id("one"), with_id("two"), with_id("one")]).await.unwrap();
    let again = engine.append(vec![with_id("two")]).await.unwrap();
    assert_eq!(first[2], first[0]);
    assert_eq!(again[0], first[1]);
    assert_eq!(offsets(&deliveries.of(&stream("p"))), [1, 2]);
    // An id belongs to its stream.
    let other = event(&json!({"type": "a.b", "project_id": "q", "id": "one"}));
    assert_eq!(engine.append(vec![other]).await.unwrap()[0].position.offset, 1);
    assert_eq!(offsets(&deliveries.of(&stream("q"))), [1]);
}

/// For an engine whose history keeps 10 durable events.
pub(crate) async fn an_id_is_known_as_long_as_its_event_is_kept(
    engine: &dyn Engine,
    deliveries: &Deliveries,
) {
    let with_id = |kind: &str, id: &str| {
        let progress = json!({"current": 1, "total": 2});
        event(&json!({"type": kind, "project_id": "p", "task_id": "t", "progress": progress, "id": id}))
    };
    engine.append(vec![with_id("task.completed", "end")]).await.unwrap();
    engine.append((0..100).map(|n| with_id("task.progress", &format!("n{n}"))).collect()).await.unwrap();
    let again =
        engine.append(vec![with_id("task.completed", "end"), with_id("task.progress", "n99")]).await.unwrap();
    assert_eq!((again[0].position.offset, again[1].position.offset), (1, 101));
    assert_eq!(deliveries.of(&stream("p")).len(), 101);
}

/// What runs must show however much has ended since.
pub(crate) async fn what_has_ended_does_not_push_what_runs_out_of_the_state(
    engine: &dyn Engine,
    _: &Deliveries,
) {
    engine.append(vec![progress("running", 1)]).await.unwrap();
    for batch in 0..5 {
        engine.append((0..1000).map(|task| completed(&format!("t{batch}-{task}"))).collect()).await.unwrap();
    }
    let progress_only = TypeFilter::parse(&["task.progress"]).unwrap();
    let running = state(engine, &progress_only).await;
    assert_eq!((tasks(&running).len(), running.truncated), (1, false));
}

pub(crate) async fn a_reader_gets_everything_since_its_position(engine: &dyn Engine, _: &Deliveries) {
    let start = engine.position(&stream("p")).await.unwrap();
    assert_eq!(start.offset, 0);
    engine.append((1..=10).map(|current| progress("t", current)).collect()).await.unwrap();
    assert_eq!(offsets(&missed(engine, &start).await.unwrap()), (1..=10).collect::<Vec<_>>());
    let seven = Position { offset: 7, ..start.clone() };
    assert_eq!(offsets(&missed(engine, &seven).await.unwrap()), [8, 9, 10]);
    let now = engine.position(&stream("p")).await.unwrap();
    assert_eq!(now, Position { offset: 10, ..start });
    assert!(missed(engine, &now).await.unwrap().is_empty());
}

pub(crate) async fn a_position_that_this_stream_never_had_is_not_recovered(
    engine: &dyn Engine,
    _: &Deliveries,
) {
    engine.append(vec![completed("t")]).await.unwrap();
    let now = engine.position(&stream("p")).await.unwrap();
    for never in [Position { epoch: Epoch::new("other"), offset: 1 }, Position { offset: 2, ..now.clone() }] {
        assert!(missed(engine, &never).await.is_none(), "{never:?}");
    }
}

/// For an engine whose history keeps 10 durable events.
pub(crate) async fn a_flood_of_progress_pushes_out_no_durable_event(engine: &dyn Engine, _: &Deliveries) {
    let start = engine.position(&stream("p")).await.unwrap();
    engine.append(vec![completed("first")]).await.unwrap();
    engine.append((0..1000).map(|current| progress("t", current)).collect()).await.unwrap();
    engine.append(vec![completed("t")]).await.unwrap();
    let records = missed(engine, &start).await.expect("the history reaches back");
    let offsets = offsets(&records);
    assert!(
        offsets.is_sorted() && offsets.first() == Some(&1) && offsets.last() == Some(&1002),
        "{offsets:?}"
    );
    assert!(offsets.contains(&1001), "the newest progress is there");
}

/// For an engine whose history keeps 10 durable events.
pub(crate) async fn what_is_not_kept_is_never_passed_off_as_all(engine: &dyn Engine, _: &Deliveries) {
    let start = engine.position(&stream("p")).await.unwrap();
    engine.append((0..15).map(|task| completed(&format!("t{task}"))).collect()).await.unwrap();
    assert!(missed(engine, &start).await.is_none());
    assert!(missed(engine, &Position { offset: 4, ..start.clone() }).await.is_none());
    let kept = missed(engine, &Position { offset: 5, ..start.clone() }).await.expect("ten are kept");
    assert_eq!(offsets(&kept), (6..=15).collect::<Vec<_>>());
    let page = engine.history(&stream("p"), Some(&start), at_most(3)).await.unwrap();
    assert_eq!((page.complete, offsets(&page.records), page.position.offset), (false, vec![6, 7, 8], 15));
    let page =
        engine.history(&stream("p"), Some(&Position { offset: 5, ..start }), at_most(100)).await.unwrap();
    assert!(page.complete);
}

pub(crate) async fn the_state_is_the_fold_of_the_stream(engine: &dyn Engine, _: &Deliveries) {
    let started = |task: &str, attempt: u32| {
        let metadata = json!({"file": "a"});
        event(&json!({"type": "task.started", "project_id": "p", "task_id": task, "task_name": "encode",
            "metadata": metadata, "attempt": attempt, "timestamp": "2026-11-23T10:00:00Z"}))
    };
    engine
        .append(vec![started("t", 0), progress("t", 40), progress("unstarted", 5), completed("done")])
        .await
        .unwrap();
    let late = progress("done", 99);
    let failed = event(
        &json!({"type": "task.failed", "project_id": "p", "task_id": "bad", "error": "boom", "attempt": 0,
        "traceback": "x".repeat(5000)}),
    );
    let process =
        event(&json!({"type": "process.progress", "project_id": "p", "process_id": "t", "progress": 3}));
    engine.append(vec![late, failed, process]).await.unwrap();
    let everything = state(engine, &TypeFilter::everything()).await;
    let tasks_now = tasks(&everything);
    let by_id = |id: &str| tasks_now.iter().find(|task| task["task_id"] == id).unwrap_or(&Value::Null);
    assert_eq!(tasks_now.len(), 4, "{tasks_now:?}");
    assert_eq!(by_id("t")["progress"]["current"], 40);
    let start =
        json!({"timestamp": "2026-11-23T10:00:00.000000Z", "task_name": "encode", "metadata": {"file": "a"}});
    assert_eq!(by_id("t")["started"], start);
    assert_eq!(by_id("unstarted")["started"], Value::Null);
    assert_eq!(by_id("done")["type"], "task.completed", "progress after the end does not reopen");
    assert_eq!((&by_id("bad")["error"], &by_id("bad")["traceback"]), (&json!("boom"), &Value::Null));
    assert_eq!(everything.processes.len(), 1, "a process and a task may share a name");
    let progress_only = TypeFilter::parse(&["task.progress"]).unwrap();
    assert_eq!(tasks(&state(engine, &progress_only).await).len(), 2);
    engine.append(vec![started("bad", 1)]).await.unwrap();
    let again = tasks(&state(engine, &TypeFilter::everything()).await);
    assert_eq!(
        (&again[0]["task_id"], &again[0]["type"]),
        (&json!("bad"), &json!("task.started")),
        "newest first"
    );
}

pub(crate) async fn a_large_state_is_cut_and_says_so(engine: &dyn Engine, _: &Deliveries) {
    engine.append((0..1200).map(|task| progress(&format!("t{task}"), 1)).collect()).await.unwrap();
    let state = state(engine, &TypeFilter::everything()).await;
    assert_eq!((state.tasks.len(), state.truncated), (1000, true));
    assert_eq!(tasks(&state)[0]["task_id"], "t1199");
}
