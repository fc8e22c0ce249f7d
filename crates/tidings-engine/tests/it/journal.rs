//! The journal: what a restart finds, whatever became of the process, the files or the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::json;
use tidings_engine::{
    engine::{
        CatchUp, Engine, Record,
        embedded::{EmbeddedEngine, system_clock},
        journal::{JournalError, JournalOptions, Sync},
    },
    saved::{ClientId, ResumeToken, SavedConnection},
};
use tidings_protocol::{Position, StreamId, TypeFilter, UserId};

use crate::{
    contract::{Deliveries, at_most},
    embedded::{journaled, options},
    event, stream,
};

fn progress(task: &str, current: u32) -> tidings_protocol::Event {
    let progress = json!({"current": current, "total": 100});
    event(&json!({"type": "task.progress", "project_id": "p", "task_id": task, "progress": progress}))
}

fn durable(number: u32) -> tidings_protocol::Event {
    event(&json!({"type": "a.b", "project_id": "p", "number": number, "id": format!("id{number}")}))
}

/// Opens and expects an error.
fn refused(folder: &Path) -> JournalError {
    let deliveries: Arc<Deliveries> = Arc::default();
    let deliver = Arc::downgrade(&(deliveries as Arc<dyn tidings_engine::engine::Deliver>));
    EmbeddedEngine::open(options(Some(folder)), system_clock(), deliver).expect_err("an error")
}

/// As a killed process leaves it: the files as they are, and nobody has them.
fn killed(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

fn newest_log(folder: &Path) -> PathBuf {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("log-")).max().unwrap()
}

async fn everything(engine: &EmbeddedEngine) -> (Position, bool, Vec<Arc<Record>>) {
    let page = engine.history(&stream("p"), None, at_most(usize::MAX)).await.unwrap();
    (page.position, page.complete, page.records)
}

async fn state(engine: &EmbeddedEngine) -> String {
    let joined = engine.join(&stream("p"), None, &TypeFilter::everything()).await.unwrap();
    match joined.catch_up {
        CatchUp::State(state) => serde_json::to_string(&state).unwrap(),
        CatchUp::Recovered(_) => panic!("nothing to recover"),
    }
}

fn texts(records: &[Arc<Record>]) -> Vec<(u64, String)> {
    records.iter().map(|record| (record.offset, String::from_utf8(record.json().to_vec()).unwrap())).collect()
}

#[tokio::test]
async fn a_restart_goes_on_where_a_killed_process_was() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    engine.append((0..5).map(durable).collect()).await.unwrap();
    engine.append((0..300).map(|current| progress("t", current)).collect()).await.unwrap();
    engine.append((5..20).map(durable).collect()).await.unwrap();
    let (before, state_before) = (everything(&engine).await, state(&engine).await);
    let copy = killed(folder.path());
    let (again, deliveries) = journaled(copy.path());
    let after = everything(&again).await;
    assert_eq!((&after.0, after.1), (&before.0, before.1), "epoch, offset, and how far the history reaches");
    assert_eq!(texts(&after.2), texts(&before.2));
    assert_eq!(state(&again).await, state_before);
    // What was before is not delivered again; what comes goes on.
    let appended = again.append(vec![durable(19), durable(20)]).await.unwrap();
    assert_eq!(appended[0].position.offset, before.0.offset, "an id is known across the restart");
    assert_eq!(appended[1].position.offset, before.0.offset + 1);
    assert_eq!(deliveries.up_to(&stream("p"), 1).await.len(), 1);
    again.close().await;
    engine.close().await;
}

#[tokio::test]
async fn a_checkpoint_stands_for_the_logs_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let small = tidings_engine::engine::embedded::EmbeddedOptions {
        journal: Some(JournalOptions {
            folder: folder.path().to_owned(),
            sync: Sync::Always,
            log_bytes_max: 20_000,
        }),
        ..options(None)
    };
    let deliveries: Arc<Deliveries> = Arc::default();
    let deliver = Arc::downgrade(&(Arc::clone(&deliveries) as Arc<dyn tidings_engine::engine::Deliver>));
    let engine = EmbeddedEngine::open(small, system_clock(), deliver).unwrap();
    let token = ResumeToken::random();
    let saved = SavedConnection {
        client: ClientId::random(),
        token,
        owner: None,
        user: Some(UserId::try_from("u1").unwrap()),
        subscriptions: vec![(stream("p"), Arc::new(TypeFilter::parse(&["task.*"]).unwrap()))],
    };
    engine.save(saved.clone()).await.unwrap();
    let started = json!({"type": "task.started", "project_id": "p", "task_id": "t0", "task_name": "encode"});
    engine.append(vec![event(&started)]).await.unwrap();
    let checkpoints = || {
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with("checkpoint-0")).count()
    };
    let mut number = 0;
    while checkpoints() == 0 || number < 1000 {
        engine
            .append(vec![progress(&format!("t{}", number % 3), number % 100), durable(number)])
            .await
            .unwrap();
        number += 1;
    }
    let (before, state_before) = (everything(&engine).await, state(&engine).await);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    let total: u64 = fs::read_dir(folder.path()).unwrap().map(|entry| size(&entry.unwrap().path())).sum();
    assert!(total < 1 << 20, "{total} bytes: old logs are removed");
    let copy = killed(folder.path());
    let (again, _) = journaled(copy.path());
    let after = everything(&again).await;
    assert_eq!((&after.0, after.1, texts(&after.2)), (&before.0, before.1, texts(&before.2)));
    assert_eq!(state(&again).await, state_before);
    assert!(state_before.contains("encode"), "the start is known though its event has left the history");
    let since = Position { offset: 1, ..after.0.clone() };
    let joined = again.join(&stream("p"), Some(&since), &TypeFilter::everything()).await.unwrap();
    assert!(
        matches!(joined.catch_up, CatchUp::State(_)),
        "what has left the history is not passed off as kept"
    );
    let successor =
        SavedConnection { client: ClientId::random(), token: ResumeToken::random(), ..saved.clone() };
    let stranger = SavedConnection { user: None, client: ClientId::random(), ..successor.clone() };
    assert!(again.take_over(&token, stranger).await.unwrap().is_none(), "its user is kept");
    let former = again.take_over(&token, successor).await.unwrap().expect("saved connections are in it");
    assert_eq!((former.client, &former.subscriptions), (saved.client, &saved.subscriptions));
    again.close().await;
    engine.close().await;
}

/// What has changed is written in any order; whichever it is, the token stands for the one who has it.
#[tokio::test]
async fn a_connection_that_was_taken_over_is_found_by_its_new_token() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let (engine, _) = journaled(folder.path());
        let connection = || SavedConnection {
            client: ClientId::random(),
            token: ResumeToken::random(),
            owner: None,
            user: None,
            subscriptions: vec![(stream("p"), Arc::default())],
        };
        let (former, successor, third) = (connection(), connection(), connection());
        engine.save(former.clone()).await.unwrap();
        engine.save(successor.clone()).await.unwrap();
        // Written before the takeover, which is then written apart.
        engine.append(vec![durable(0)]).await.unwrap();
        engine.take_over(&former.token, successor.clone()).await.unwrap().expect("the token is good");
        engine.append(vec![durable(1)]).await.unwrap();
        let copy = killed(folder.path());
        let (again, _) = journaled(copy.path());
        let found = again.take_over(&successor.token, third).await.unwrap().expect("the new token is good");
        assert_eq!(found.client, former.client);
        assert!(
            again.take_over(&former.token, connection()).await.unwrap().is_none(),
            "the old one is spent"
        );
        again.close().await;
        engine.close().await;
    }
}

#[tokio::test]
async fn a_torn_end_is_cut_off_and_the_rest_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    for number in 0..3 {
        engine.append(vec![durable(number)]).await.unwrap();
    }
    for cut in [1, 7, 50] {
        let copy = killed(folder.path());
        let log = newest_log(copy.path());
        let bytes = fs::read(&log).unwrap();
        fs::write(&log, &bytes[..bytes.len() - cut]).unwrap();
        let (again, _) = journaled(copy.path());
        let (position, _, records) = everything(&again).await;
        assert_eq!((position.offset, records.len()), (2, 2), "{cut} bytes torn off");
        assert_eq!(again.append(vec![durable(9)]).await.unwrap()[0].position.offset, 3);
        again.close().await;
        // And once more, now that a log lies behind the one that was torn.
        let (third, _) = journaled(copy.path());
        assert_eq!(everything(&third).await.0.offset, 3);
        third.close().await;
    }
    engine.close().await;
}

#[tokio::test]
async fn damage_that_no_crash_makes_is_an_error_that_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    engine.append((0..3).map(durable).collect()).await.unwrap();
    engine.close().await;
    let log = newest_log(folder.path());
    let mut bytes = fs::read(&log).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(&log, &bytes).unwrap();
    let error = refused(folder.path());
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    assert!(
        error.to_string().contains(log.to_str().unwrap()) && error.to_string().contains("at byte"),
        "{error}"
    );
    assert_eq!(fs::read(&log).unwrap(), bytes, "nothing was changed");
}

#[tokio::test]
async fn a_folder_in_use_from_a_newer_version_or_of_somebody_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    let error = refused(folder.path());
    assert!(matches!(error, JournalError::InUse { .. }), "{error}");
    engine.append(vec![durable(0)]).await.unwrap();
    engine.close().await;
    let log = newest_log(folder.path());
    let bytes = fs::read(&log).unwrap();
    let mut newer = bytes.clone();
    newer[8] = 2;
    fs::write(&log, &newer).unwrap();
    let error = refused(folder.path()).to_string();
    assert!(error.contains("newer version") && error.contains("version 2"), "{error}");
    fs::write(&log, b"something else entirely").unwrap();
    assert!(refused(folder.path()).to_string().contains("not a journal"));
    fs::write(&log, &bytes).unwrap();
    let (again, _) = journaled(folder.path());
    assert_eq!(everything(&again).await.0.offset, 1);
    again.close().await;
    let file = folder.path().join("a file");
    fs::write(&file, b"").unwrap();
    let error = refused(&file).to_string();
    assert!(error.contains("a file"), "{error}");
}

/// The journal of a machine that crashed names another run of the system.
#[tokio::test]
async fn after_a_crash_of_the_machine_streams_begin_a_new_epoch_where_they_stand() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    engine.append((0..4).map(durable).collect()).await.unwrap();
    let before = everything(&engine).await.0;
    let copy = killed(folder.path());
    let log = newest_log(copy.path());
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned());
    if let Ok(boot) = &boot {
        let bytes = fs::read(&log).unwrap();
        let at = bytes.windows(boot.len()).position(|part| part == boot.as_bytes()).unwrap();
        let mut other = bytes.clone();
        other[at..at + boot.len()].fill(b'0');
        // The checksum of the first entry, which begins behind the file's header of 16 bytes.
        let length = usize::try_from(u32::from_le_bytes(other[16..20].try_into().unwrap())).unwrap();
        let checksum = crc32fast::hash(&other[24..24 + length]);
        other[20..24].copy_from_slice(&checksum.to_le_bytes());
        fs::write(&log, &other).unwrap();
    }
    let (again, _) = journaled(copy.path());
    let after = everything(&again).await.0;
    assert_eq!(after.offset, before.offset);
    assert_ne!(after.epoch, before.epoch);
    // Who had everything that is there goes on; who had seen more has seen what is lost.
    let join = async |offset| {
        let since = Position { offset, epoch: before.epoch.clone() };
        again.join(&stream("p"), Some(&since), &TypeFilter::everything()).await.unwrap().catch_up
    };
    again.append(vec![durable(7)]).await.unwrap();
    let CatchUp::Recovered(missed) = join(3).await else { panic!("4 and 5 are there") };
    assert_eq!(missed.iter().map(|record| record.offset).collect::<Vec<_>>(), [4, 5]);
    assert!(matches!(join(5).await, CatchUp::State(_)), "5 of the old epoch is another event");
    again.close().await;
    // The new epoch stays, and the old one is still known.
    let (third, _) = journaled(copy.path());
    assert_eq!(everything(&third).await.0.epoch, after.epoch);
    let since = Position { offset: 3, epoch: before.epoch.clone() };
    let joined = third.join(&stream("p"), Some(&since), &TypeFilter::everything()).await.unwrap();
    assert!(matches!(joined.catch_up, CatchUp::Recovered(_)));
    third.close().await;
    engine.close().await;
}

#[tokio::test]
async fn a_stream_that_was_only_subscribed_to_keeps_its_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, _) = journaled(folder.path());
    let joined = engine.join(&stream("q"), None, &TypeFilter::everything()).await.unwrap();
    let announcements = engine.position(&StreamId::Announcements).await.unwrap();
    engine.close().await;
    let (again, _) = journaled(folder.path());
    assert_eq!(again.position(&stream("q")).await.unwrap(), joined.position);
    assert_eq!(again.position(&StreamId::Announcements).await.unwrap(), announcements);
    again.close().await;
}
