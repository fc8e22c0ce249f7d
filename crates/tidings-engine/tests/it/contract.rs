//! What every engine must do: the contract of [`Engine`] as tests. An engine's own file runs each of them on it.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tidings_engine::{
    engine::{CatchUp, Deliver, Engine, NumberedEvent, PageLimit, Record},
    saved::{ClientId, ResumeToken, SavedConnection},
};
use tidings_protocol::{Epoch, Position, StateSnapshot, StreamId, TypeFilter, UserId};

use crate::{event, stream};

/// An engine under test, with what has to live as long as it does.
pub(crate) struct Fixture {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) deliveries: Arc<Deliveries>,
    pub(crate) keeps: Box<dyn std::any::Any + Send>,
}

/// Runs the contract on the engines of a fixture.
macro_rules! contract_tests {
    ($fixture:path) => {
        $crate::contract::contract_tests! { $fixture:
            events_get_the_next_offset_of_their_stream_and_are_delivered_once,
            a_repeated_id_is_the_same_event,
            an_id_is_known_as_long_as_its_event_is_kept,
            what_has_ended_does_not_push_what_runs_out_of_the_state,
            a_reader_gets_everything_since_its_position,
            a_position_that_this_stream_never_had_is_not_recovered,
            a_flood_of_progress_pushes_out_no_durable_event,
            what_is_not_kept_is_never_passed_off_as_all,
            the_state_is_the_fold_of_the_stream,
            a_large_state_is_cut_and_says_so,
            numbered_events_are_appended_once_in_the_order_of_their_numbers,
            a_connection_is_taken_over_once_with_all_that_it_followed,
            a_token_is_worth_nothing_in_other_hands_and_stays_good_in_the_right_ones,
            asking_for_history_makes_no_stream,
        }
    };
    ($fixture:path: $($name:ident,)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                let fixture: $crate::contract::Fixture = $fixture().await;
                $crate::contract::$name(&*fixture.engine, &fixture.deliveries).await;
                fixture.engine.close().await;
                drop(fixture.keeps);
            }
        )*
    };
}

pub(crate) use contract_tests;

/// Notes what an engine delivers.
#[derive(Debug, Default)]
pub(crate) struct Deliveries(Mutex<Vec<(StreamId, Arc<Record>)>>, Mutex<Vec<StreamId>>);

impl Deliver for Deliveries {
    fn rejoin(&self, stream: &StreamId, _: &Position) {
        self.1.lock().push(stream.clone());
    }

    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]) {
        assert_eq!(records.last().map(|record| record.offset), Some(position.offset));
        self.0.lock().extend(records.iter().map(|record| (stream.clone(), Arc::clone(record))));
    }
}

impl Deliveries {
    /// What was delivered of a stream, as soon as it reaches up to `offset`.
    pub(crate) async fn up_to(&self, stream: &StreamId, offset: u64) -> Vec<Arc<Record>> {
        let reached = tokio::time::timeout(Duration::from_secs(30), async {
            while self.of(stream).last().is_none_or(|last| last.offset < offset) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        assert!(
            reached.await.is_ok(),
            "{stream} is not delivered up to {offset}: {:?}",
            offsets(&self.of(stream))
        );
        self.of(stream)
    }

    /// Waits until the subscribers of a stream are told to join again.
    pub(crate) async fn rejoined(&self, stream: &StreamId) {
        let told = tokio::time::timeout(Duration::from_secs(30), async {
            while !self.1.lock().contains(stream) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        assert!(told.await.is_ok(), "the subscribers of {stream} are not told");
    }

    fn of(&self, stream: &StreamId) -> Vec<Arc<Record>> {
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
    let delivered = deliveries.up_to(&stream("p"), 3).await;
    assert_eq!(offsets(&delivered), [1, 2, 3]);
    assert_eq!(offsets(&deliveries.up_to(&stream("q"), 1).await), [1]);
    let json: Value = serde_json::from_slice(delivered[2].json()).unwrap();
    assert_eq!(json["offset"], 3);
}

pub(crate) async fn a_repeated_id_is_the_same_event(engine: &dyn Engine, deliveries: &Deliveries) {
    let with_id = |id: &str| event(&json!({"type": "a.b", "project_id": "p", "id": id}));
    let first = engine.append(vec![with_id("one"), with_id("two"), with_id("one")]).await.unwrap();
    let again = engine.append(vec![with_id("two")]).await.unwrap();
    assert_eq!(first[2], first[0]);
    assert_eq!(again[0], first[1]);
    assert_eq!(offsets(&deliveries.up_to(&stream("p"), 2).await), [1, 2]);
    // An id belongs to its stream.
    let other = event(&json!({"type": "a.b", "project_id": "q", "id": "one"}));
    assert_eq!(engine.append(vec![other]).await.unwrap()[0].position.offset, 1);
    assert_eq!(offsets(&deliveries.up_to(&stream("q"), 1).await), [1]);
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
    assert_eq!(deliveries.up_to(&stream("p"), 101).await.len(), 101);
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

/// What comes from a source with numbers is appended once, however often it is said.
pub(crate) async fn numbered_events_are_appended_once_in_the_order_of_their_numbers(
    engine: &dyn Engine,
    deliveries: &Deliveries,
) {
    let numbered = |number: u32, project: &str| NumberedEvent {
        number: format!("{number:08}"),
        event: event(&json!({"type": "a.b", "project_id": project, "n": number})),
    };
    engine
        .append_numbered("source", vec![numbered(1, "p"), numbered(2, "q"), numbered(3, "p")])
        .await
        .unwrap();
    let again = (1..=5).map(|number| numbered(number, if number == 2 { "q" } else { "p" }));
    engine.append_numbered("source", again.collect()).await.unwrap();
    let numbers = |records: Vec<Arc<Record>>| -> Vec<u64> {
        let read = |record: &Arc<Record>| serde_json::from_slice::<Value>(record.json()).unwrap();
        records.iter().map(|record| read(record)["n"].as_u64().unwrap()).collect()
    };
    assert_eq!(numbers(deliveries.up_to(&stream("p"), 4).await), [1, 3, 4, 5]);
    assert_eq!(numbers(deliveries.up_to(&stream("q"), 1).await), [2]);
    // Another source has numbers of its own.
    engine.append_numbered("other", vec![numbered(1, "q")]).await.unwrap();
    assert_eq!(numbers(deliveries.up_to(&stream("q"), 2).await), [2, 1]);
}

/// Of two that come with the same token, one gets the connection; what it was told of itself last is there.
pub(crate) async fn a_connection_is_taken_over_once_with_all_that_it_followed(
    engine: &dyn Engine,
    _: &Deliveries,
) {
    let everything = Arc::new(TypeFilter::everything());
    let tasks = Arc::new(TypeFilter::parse(&["task.*"]).unwrap());
    let connection = |subscriptions: Vec<(StreamId, Arc<TypeFilter>)>, owner: &str| SavedConnection {
        client: ClientId::random(),
        token: ResumeToken::random(),
        owner: Some(owner.parse().unwrap()),
        user: None,
        subscriptions,
    };
    let mut former = connection(Vec::new(), "0.1.1");
    engine.save(former.clone()).await.unwrap();
    former.subscriptions = vec![(stream("p"), everything), (stream("q"), tasks)];
    engine.save(former.clone()).await.unwrap();
    let successors = [connection(Vec::new(), "0.2.2"), connection(Vec::new(), "0.3.3")];
    for successor in &successors {
        engine.save(successor.clone()).await.unwrap();
    }
    let [first, second] = successors;
    let (one, other) = tokio::join!(
        engine.take_over(&former.token, first.clone()),
        engine.take_over(&former.token, second.clone())
    );
    let (taken, winner) = match (one.unwrap(), other.unwrap()) {
        (Some(taken), None) => (taken, first),
        (None, Some(taken)) => (taken, second),
        both => panic!("one gets it: {both:?}"),
    };
    assert_eq!((taken.client, taken.owner), (former.client, former.owner));
    let followed = |saved: &SavedConnection| {
        let read = |(stream, types): &(StreamId, Arc<TypeFilter>)| (stream.clone(), TypeFilter::clone(types));
        saved.subscriptions.iter().map(read).collect::<Vec<_>>()
    };
    assert_eq!(followed(&taken), followed(&former));
    // The one before it has no say any more; the winner's token stands for the connection now, and dies with a clean close.
    engine.save(SavedConnection { subscriptions: Vec::new(), ..former.clone() }).await.unwrap();
    engine.forget(former.client, former.owner.unwrap()).await.unwrap();
    let third = connection(Vec::new(), "0.4.4");
    let again = engine.take_over(&winner.token, third.clone()).await.unwrap().expect("its token is good");
    assert_eq!((again.client, followed(&again)), (former.client, followed(&former)));
    engine.forget(former.client, third.owner.unwrap()).await.unwrap();
    assert!(engine.take_over(&third.token, connection(Vec::new(), "0.5.5")).await.unwrap().is_none());
    assert!(
        engine.take_over(&ResumeToken::random(), connection(Vec::new(), "0.6.6")).await.unwrap().is_none()
    );
}

pub(crate) async fn a_token_is_worth_nothing_in_other_hands_and_stays_good_in_the_right_ones(
    engine: &dyn Engine,
    _: &Deliveries,
) {
    let connection = |user: Option<&str>, owner: &str| SavedConnection {
        client: ClientId::random(),
        token: ResumeToken::random(),
        owner: Some(owner.parse().unwrap()),
        user: user.map(|user| UserId::try_from(user).unwrap()),
        subscriptions: vec![(stream("p"), Arc::default())],
    };
    for user in [Some("u1"), None] {
        let former = connection(user, "0.1.1");
        engine.save(former.clone()).await.unwrap();
        for other in [Some("u"), Some("u11"), Some("U1"), if user.is_some() { None } else { Some("u1") }] {
            let stranger = connection(other, "0.2.2");
            engine.save(stranger.clone()).await.unwrap();
            let taken = engine.take_over(&former.token, stranger).await.unwrap();
            assert!(taken.is_none(), "{other:?} took over what is {user:?}'s");
        }
        let successor = connection(user, "0.3.3");
        engine.save(successor.clone()).await.unwrap();
        let taken = engine.take_over(&former.token, successor.clone()).await.unwrap();
        assert_eq!(taken.unwrap().client, former.client);
        let taken = engine.take_over(&successor.token, connection(Some("other"), "0.4.4")).await.unwrap();
        assert!(taken.is_none(), "what was taken over stays {user:?}'s");
    }
}

pub(crate) async fn asking_for_history_makes_no_stream(engine: &dyn Engine, _: &Deliveries) {
    let page = engine.history(&stream("unknown"), None, at_most(10)).await.unwrap();
    assert_eq!((page.complete, page.records.len()), (true, 0));
    let again = engine.history(&stream("unknown"), None, at_most(10)).await.unwrap();
    assert_ne!(again.position.epoch, page.position.epoch);
}

pub(crate) async fn a_large_state_is_cut_and_says_so(engine: &dyn Engine, _: &Deliveries) {
    engine.append((0..1200).map(|task| progress(&format!("t{task}"), 1)).collect()).await.unwrap();
    let state = state(engine, &TypeFilter::everything()).await;
    assert_eq!((state.tasks.len(), state.truncated), (1000, true));
    assert_eq!(tasks(&state)[0]["task_id"], "t1199");
}
