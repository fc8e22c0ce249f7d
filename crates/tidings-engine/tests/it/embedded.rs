//! The embedded engine: the contract, and what age does to it.

use std::{
    future::{Ready, ready},
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tidings_engine::engine::{
    CatchUp, Deliver, Engine, HistoryLimits,
    embedded::{Clock, EmbeddedEngine, EmbeddedOptions, system_clock},
    journal::{JournalOptions, Sync},
};
use tidings_protocol::TypeFilter;

use crate::{
    contract::{self, Deliveries, Fixture},
    event, stream,
};

fn engine(clock: Clock) -> (EmbeddedEngine, Arc<Deliveries>) {
    let deliveries = Arc::new(Deliveries::default());
    let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&deliveries) as Arc<dyn Deliver>));
    (EmbeddedEngine::open(options(None), clock, deliver).unwrap(), deliveries)
}

/// With a short history, kept in `folder` if there is one.
pub(crate) fn options(folder: Option<&Path>) -> EmbeddedOptions {
    let journal = folder.map(|folder| JournalOptions {
        folder: folder.to_owned(),
        sync: Sync::Never,
        log_bytes_max: 1 << 30,
    });
    EmbeddedOptions {
        history: HistoryLimits { events: 10, age: Duration::from_hours(1), bytes: 1 << 20 },
        connection_timeout: Duration::from_hours(1),
        journal,
    }
}

fn in_memory() -> Ready<Fixture> {
    let (engine, deliveries) = engine(system_clock());
    ready(Fixture { engine: Box::new(engine), deliveries, keeps: Box::new(()) })
}

contract::contract_tests!(in_memory);

mod with_a_journal {
    fn with_a_journal() -> super::Ready<crate::contract::Fixture> {
        let folder = tempfile::tempdir().unwrap();
        let (engine, deliveries) = super::journaled(folder.path());
        super::ready(crate::contract::Fixture {
            engine: Box::new(engine),
            deliveries,
            keeps: Box::new(folder),
        })
    }

    crate::contract::contract_tests!(with_a_journal);
}

/// The same, with a journal.
pub(crate) fn journaled(folder: &Path) -> (EmbeddedEngine, Arc<Deliveries>) {
    let deliveries = Arc::new(Deliveries::default());
    let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&deliveries) as Arc<dyn Deliver>));
    (EmbeddedEngine::open(options(Some(folder)), system_clock(), deliver).unwrap(), deliveries)
}

/// A clock that the test sets, in seconds.
pub(crate) fn test_clock() -> (Clock, Arc<AtomicI64>) {
    let seconds = Arc::new(AtomicI64::new(1_800_000_000));
    let told = Arc::clone(&seconds);
    (Arc::new(move || jiff::Timestamp::from_second(told.load(Ordering::Relaxed)).unwrap().into()), seconds)
}

#[tokio::test]
async fn history_ends_with_its_age_and_the_stream_goes_on() {
    let (clock, seconds) = test_clock();
    let (engine, _) = engine(clock);
    let start = engine.position(&stream("p")).await.unwrap();
    engine.append(vec![event(&json!({"type": "a.b", "project_id": "p", "id": "one"}))]).await.unwrap();
    seconds.fetch_add(3601, Ordering::Relaxed);
    let joined = engine.join(&stream("p"), Some(&start), &TypeFilter::everything()).await.unwrap();
    assert!(matches!(joined.catch_up, CatchUp::State(_)), "what is not kept any more is not recovered");
    let again =
        engine.append(vec![event(&json!({"type": "a.b", "project_id": "p", "id": "one"}))]).await.unwrap();
    assert_eq!(
        (again[0].position.offset, &again[0].position.epoch),
        (2, &start.epoch),
        "an id ends with the history"
    );
}

#[tokio::test]
async fn a_stream_is_forgotten_30_days_after_its_last_use() {
    let (clock, seconds) = test_clock();
    let (engine, _) = engine(clock);
    let first = engine.position(&stream("p")).await.unwrap();
    for (days, same) in [(29, true), (29, true), (31, false)] {
        seconds.fetch_add(days * 24 * 3600, Ordering::Relaxed);
        engine.forget_old(|_| false);
        let position = engine.position(&stream("p")).await.unwrap();
        assert_eq!(position == first, same, "{days} days");
    }
}

#[tokio::test]
async fn a_stream_that_is_followed_is_not_forgotten() {
    let (clock, seconds) = test_clock();
    let (engine, _) = engine(clock);
    let first = engine.position(&stream("p")).await.unwrap();
    seconds.fetch_add(40 * 24 * 3600, Ordering::Relaxed);
    engine.forget_old(|followed| *followed == stream("p"));
    assert_eq!(engine.position(&stream("p")).await.unwrap(), first);
}

#[tokio::test]
async fn ended_tasks_leave_the_state_after_5_minutes_and_silent_ones_after_a_day() {
    let (clock, seconds) = test_clock();
    let (engine, _) = engine(clock);
    let progress = json!({"current": 1, "total": 2});
    engine
        .append(vec![
            event(&json!({"type": "task.progress", "project_id": "p", "task_id": "silent", "progress": progress})),
            event(&json!({"type": "task.completed", "project_id": "p", "task_id": "done"})),
        ])
        .await
        .unwrap();
    for (after, left) in [(0, 2), (300, 2), (301, 1), (24 * 3600, 1), (24 * 3600 + 1, 0)] {
        seconds.store(1_800_000_000 + after, Ordering::Relaxed);
        let joined = engine.join(&stream("p"), None, &TypeFilter::everything()).await.unwrap();
        let CatchUp::State(state) = joined.catch_up else { panic!("no state") };
        assert_eq!(state.tasks.len(), left, "after {after} s");
    }
}
