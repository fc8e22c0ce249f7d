//! The ingest stream: what lies in it comes in its order, once, whoever is there to read it and whoever dies over it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use redis::{RedisResult, aio::MultiplexedConnection};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    fleet::Clock,
    node::Node,
    process::{DEADLINE, until},
    publish::Book,
    record::{Numbered, Publisher},
    redis_server::{DURABLE, RedisServer},
    scale,
    stage::{Load, Recovery, Stage, Store, alone, report},
};

const PUBLISHER: Publisher = 300;
const STREAM: &str = "tidings:ingest";
/// Entries that are added at once.
const BATCH: u32 = 100;

/// Adds this many entries, each with the next event of a project in turn.
async fn add(redis: &RedisServer, book: &Arc<Book>, clock: Clock, projects: u16, count: u32) {
    let mut connection = redis.connection().await.unwrap();
    for start in (0..count).step_by(BATCH as usize) {
        let events: Vec<_> = (start..count.min(start + BATCH))
            .map(|entry| {
                book.next(u16::try_from(entry % u32::from(projects)).expect("a project"), PUBLISHER, 1)
            })
            .collect();
        add_events(&mut connection, book, clock, events).await.unwrap();
    }
}

async fn add_events(
    connection: &mut MultiplexedConnection,
    book: &Book,
    clock: Clock,
    events: Vec<Numbered>,
) -> RedisResult<()> {
    let mut batch = redis::pipe();
    for event in &events {
        let json = event.json(clock.now_ms(), 0).to_string();
        batch.cmd("XADD").arg(STREAM).arg("*").arg("event").arg(json).ignore();
    }
    batch.query_async::<()>(connection).await?;
    for event in events {
        book.acknowledge(event, None);
    }
    Ok(())
}

/// Adds entries all the time, whatever becomes of Redis: what is not known to be added is not counted on.
pub(crate) struct Feeder {
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Feeder {
    pub(crate) fn started(redis_url: &str, stage: &Stage) -> Self {
        let stop = CancellationToken::new();
        let (clock, projects, book) = (stage.clock, stage.load.projects, stage.book.clone());
        let client = redis::Client::open(redis_url).unwrap();
        let feeding = async move {
            // Waiting for an answer without end keeps the order: nothing overtakes what is still on its way.
            let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            let mut turn = (0..projects).cycle();
            let mut connection = None;
            loop {
                ticks.tick().await;
                if connection.is_none() {
                    connection = client.get_multiplexed_async_connection_with_config(&config).await.ok();
                }
                let Some(living) = &mut connection else { continue };
                let events = turn.by_ref().take(2).map(|project| book.next(project, PUBLISHER, 1)).collect();
                if add_events(living, &book, clock, events).await.is_err() {
                    connection = None;
                }
            }
        };
        let stopped = stop.clone();
        let running = TaskTracker::new().spawn(async move {
            let _: Option<()> = stopped.run_until_cancelled(feeding).await;
        });
        Self { stop, running }
    }

    /// Stops, and waits until everything was read.
    pub(crate) async fn stop(self, redis: &RedisServer) {
        self.stop.cancel();
        self.running.await.unwrap();
        until("the ingest stream being empty", || async { length(redis).await == 0 }).await;
    }
}

#[test]
fn every_entry_comes_once_and_in_order_whoever_is_killed_over_it() {
    alone(async {
        let redis = RedisServer::started(DURABLE).await;
        let (usual, entries) = (Load::usual(), scale::entries());
        let load = Load { clients: usual.clients / 5, projects: usual.projects / 2, ..usual };
        let mut stage = Stage::quiet(Node::many(3, &redis.url(), &[]).await, load).await;
        let (clock, projects, book) = (stage.clock, stage.load.projects, stage.book.clone());
        let add = |count| add(&redis, &book, clock, projects, count);
        // Clients have been there, and will come back; now nobody is.
        stage.nodes.iter_mut().for_each(Node::kill);
        add(entries / 4).await;
        stage.nodes.iter_mut().for_each(Node::launch);
        add(entries / 4).await;
        for index in 0..3 {
            stage.nodes[index].ready().await;
        }
        for index in 0..3 {
            let before = length(&redis).await;
            add(entries / 6).await;
            until("some of it being read", || async {
                length(&redis).await < before + u64::from(entries / 6)
            })
            .await;
            stage.nodes[index].kill();
            report(format_args!("node {index} was killed with {} entries to go", length(&redis).await));
            sleep(Duration::from_millis(200)).await;
            stage.nodes[index].start().await;
        }
        let last_ms = clock.now_ms();
        add(u32::from(projects)).await;
        let stuck = stage.fleet.caught_up(last_ms, DEADLINE).await;
        let recovery = Recovery { took_ms: Some(clock.now_ms() - last_ms), stuck };
        until("the stream being empty", || async { length(&redis).await == 0 }).await;
        stage.conclude("ingest stream, nodes killed over it", Store::Keeps, recovery).await;
    });
}

async fn length(redis: &RedisServer) -> u64 {
    redis.command(&["XLEN", STREAM]).await.unwrap()
}

#[test]
fn an_entry_that_is_no_event_is_put_aside_with_the_reason() {
    alone(async {
        let redis = RedisServer::started(DURABLE).await;
        let load = Load { clients: 3, projects: 1, events_per_second: 1 };
        let stage = Stage::quiet(Node::many(2, &redis.url(), &[]).await, load).await;
        let progress = r#"{"type":"task.progress","project_id":"p0","task_id":"t","progress":5}"#;
        let reserved = r#"{"type":"system.heartbeat"}"#;
        for [field, value] in [["event", "{"], ["event", progress], ["event", reserved], ["other", "{}"]] {
            redis.command::<String>(&["XADD", STREAM, "*", field, value]).await.unwrap();
        }
        let last_ms = stage.clock.now_ms();
        add(&redis, &stage.book, stage.clock, 1, 1).await;
        let stuck = stage.fleet.caught_up(last_ms, DEADLINE).await;
        until("the stream being empty", || async { length(&redis).await == 0 }).await;
        let words = ["XRANGE", "tidings:rejected", "-", "+"];
        let rejected: Vec<(String, Vec<String>)> = redis.command(&words).await.unwrap();
        let pairs =
            |fields: Vec<String>| fields.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        let fields: Vec<HashMap<_, _>> = rejected.into_iter().map(|(_, fields)| pairs(fields)).collect();
        assert_eq!(fields.len(), 4, "{fields:?}");
        assert!(
            fields.iter().all(|fields| fields.get("reason").is_some_and(|reason| !reason.is_empty())),
            "{fields:?}"
        );
        assert!(fields[1].values().any(|value| value == progress), "what was wrong is kept: {fields:?}");
        assert!(fields[1]["reason"].contains("progress"), "{fields:?}");
        let recovery = Recovery { took_ms: None, stuck };
        stage.conclude("ingest stream with what is no event", Store::Keeps, recovery).await;
    });
}
