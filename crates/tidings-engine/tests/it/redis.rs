//! The Redis engine: the contract, on a Redis of the test's own, and what becomes of it when Redis is not what it was.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use serde_json::json;
use tidings_engine::{
    engine::{
        CatchUp, Deliver, Engine, HistoryLimits,
        embedded::{Clock, system_clock},
        redis::{Incarnation, NodeName, RedisAddress, RedisEngine, RedisOptions, Servers},
    },
    saved::ClientId,
    vigil::Vigil,
};
use tidings_protocol::{Position, TypeFilter};

use crate::{
    contract::{self, Deliveries, Fixture},
    embedded::test_clock,
    event, stream,
};

/// A Redis on a free port, in memory only, ended by its own process id.
struct Redis {
    process: Option<Child>,
    port: u16,
}

impl Redis {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut redis = Self { process: None, port };
        redis.start_again();
        redis
    }

    fn start_again(&mut self) {
        let port = self.port.to_string();
        let process = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: `cargo xtask test` does it");
        self.process = Some(process);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    async fn engine(&self) -> (RedisEngine, Arc<Deliveries>) {
        self.engine_at(system_clock()).await
    }

    async fn engine_at(&self, clock: Clock) -> (RedisEngine, Arc<Deliveries>) {
        self.engine_of("node", clock).await
    }

    async fn engine_of(&self, name: &str, clock: Clock) -> (RedisEngine, Arc<Deliveries>) {
        let address = RedisAddress::parse(&format!("redis://127.0.0.1:{}", self.port)).unwrap();
        let servers = Arc::new(Servers::find(address).await.unwrap());
        let deliveries = Arc::new(Deliveries::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&deliveries) as Arc<dyn Deliver>));
        let incarnation = Incarnation::random();
        let options = RedisOptions {
            history: HistoryLimits { events: 10, age: Duration::from_hours(1), bytes: 1 << 20 },
            connection_timeout: Duration::from_hours(1),
            check_interval: Duration::from_secs(1),
            name: NodeName::take(&servers, name, &incarnation).await.unwrap(),
            incarnation,
            adopts_orphans: true,
        };
        let vigil = Arc::new(Vigil::new(deliver.clone()));
        let engine = RedisEngine::start(servers, options, clock, deliver, vigil).await.unwrap();
        (engine, deliveries)
    }
}

/// Two nodes on one Redis.
async fn two(redis: &Redis) -> [(RedisEngine, Arc<Deliveries>); 2] {
    let both = [redis.engine().await, redis.engine().await];
    for (engine, _) in &both {
        engine.follow(&stream("p"));
        engine.position(&stream("p")).await.unwrap();
    }
    both
}

fn numbered(n: usize) -> tidings_protocol::Event {
    event(&json!({"type": "a.b", "project_id": "p", "n": n, "filler": "x".repeat(100)}))
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn on_redis() -> Fixture {
    let redis = Redis::start();
    let (engine, deliveries) = redis.engine().await;
    for project in ["p", "q"] {
        engine.follow(&stream(project));
        // Once it is read, it is subscribed to.
        engine.position(&stream(project)).await.unwrap();
    }
    Fixture { engine: Box::new(engine), deliveries, keeps: Box::new(redis) }
}

contract::contract_tests!(on_redis);

mod when_nobody_follows {
    use super::{Fixture, Redis};

    /// Answers come from Redis itself then; only what is delivered is missing.
    async fn unfollowed() -> Fixture {
        let redis = Redis::start();
        let (engine, deliveries) = redis.engine().await;
        Fixture { engine: Box::new(engine), deliveries, keeps: Box::new(redis) }
    }

    crate::contract::contract_tests! { unfollowed:
        what_has_ended_does_not_push_what_runs_out_of_the_state,
        a_reader_gets_everything_since_its_position,
        a_position_that_this_stream_never_had_is_not_recovered,
        a_flood_of_progress_pushes_out_no_durable_event,
        what_is_not_kept_is_never_passed_off_as_all,
        the_state_is_the_fold_of_the_stream,
        a_large_state_is_cut_and_says_so,
    }
}

#[tokio::test]
async fn every_node_is_delivered_the_same_whoever_appends() {
    let redis = Redis::start();
    let both = two(&redis).await;
    for n in 0..50 {
        both[n % 2].0.append(vec![numbered(n)]).await.unwrap();
    }
    let mut seen = Vec::new();
    for (engine, deliveries) in &both {
        let delivered = deliveries.up_to(&stream("p"), 50).await;
        seen.push(delivered.iter().map(|record| record.json().to_vec()).collect::<Vec<_>>());
        assert_eq!(engine.position(&stream("p")).await.unwrap().offset, 50);
    }
    assert_eq!(seen[0].len(), 50);
    assert_eq!(seen[0], seen[1]);
}

/// The log is replaced by snapshots, and whoever comes later finds the same as whoever was there.
#[tokio::test]
async fn a_long_stream_is_kept_in_a_snapshot_and_a_short_log() {
    let redis = Redis::start();
    let (engine, deliveries) = redis.engine().await;
    engine.follow(&stream("p"));
    let start = engine.position(&stream("p")).await.unwrap();
    let progress = |task: usize| {
        let progress = json!({"current": task, "total": 10_000});
        let task = format!("t{}", task % 7);
        event(
            &json!({"type": "task.progress", "project_id": "p", "task_id": task, "progress": progress, "id": format!("{task}-{progress}")}),
        )
    };
    for round in 0..40 {
        engine.append((0..250).map(|n| progress(250 * round + n)).collect()).await.unwrap();
        engine.append(vec![numbered(round)]).await.unwrap();
    }
    deliveries.up_to(&stream("p"), 40 * 251).await;
    let fields = || async {
        let mut connection = redis.connection().await;
        redis::cmd("HLEN").arg("tidings:{p}").query_async::<usize>(&mut connection).await.unwrap()
    };
    // A snapshot is asked for at most every two seconds.
    let mut appended = 40 * 251;
    let shortened = tokio::time::timeout(Duration::from_secs(30), async {
        while fields().await > 3000 {
            engine.append(vec![progress(appended)]).await.unwrap();
            appended += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    assert!(shortened.await.is_ok(), "{} fields", fields().await);
    let (later, _) = redis.engine().await;
    let everything = TypeFilter::everything();
    let mut told = Vec::new();
    for engine in [&engine, &later] {
        let missed = engine.history(&stream("p"), Some(&start), contract::at_most(10_000)).await.unwrap();
        let CatchUp::State(state) = engine.join(&stream("p"), None, &everything).await.unwrap().catch_up
        else {
            panic!("without `since` there is nothing to recover")
        };
        let offsets: Vec<_> = missed.records.iter().map(|record| record.offset).collect();
        let mut tasks: Vec<_> = state.tasks.iter().map(ToString::to_string).collect();
        tasks.sort();
        told.push((missed.complete, missed.position, offsets, tasks));
    }
    assert_eq!(told[0], told[1]);
    assert_eq!(told[0].3.len(), 7);
    // The newest events are known by their ids, whoever is asked.
    let again = later.append(vec![progress(appended - 1)]).await.unwrap();
    assert_eq!(again[0].position.offset, u64::try_from(appended).unwrap());
}

#[tokio::test]
async fn a_redis_that_lost_everything_begins_a_new_life_that_everybody_is_told_of() {
    let mut redis = Redis::start();
    let [(one, ones), (other, others)] = two(&redis).await;
    one.append((0..5).map(numbered).collect()).await.unwrap();
    let before = one.position(&stream("p")).await.unwrap();
    others.up_to(&stream("p"), 5).await;
    redis.kill();
    let refused = one.append(vec![numbered(5)]).await;
    assert!(refused.is_err(), "{refused:?}");
    redis.start_again();
    for deliveries in [&ones, &others] {
        deliveries.rejoined(&stream("p")).await;
    }
    for engine in [&one, &other] {
        let after = engine.position(&stream("p")).await.unwrap();
        assert_ne!(after.epoch, before.epoch);
        assert_eq!(after.offset, 0);
        let joined = engine.join(&stream("p"), Some(&before), &TypeFilter::everything()).await.unwrap();
        assert!(matches!(joined.catch_up, CatchUp::State(_)), "what is lost is not recovered");
    }
    assert_eq!(other.append(vec![numbered(6)]).await.unwrap()[0].position.offset, 1);
}

/// A node that does not hear what is published finds it within one interval.
#[tokio::test]
async fn what_pubsub_loses_is_read_within_an_interval() {
    let redis = Redis::start();
    let [(one, _), (_, others)] = two(&redis).await;
    let mut connection = redis.connection().await;
    one.append(vec![numbered(1)]).await.unwrap();
    others.up_to(&stream("p"), 1).await;
    // An append that is not published.
    let copy = "local n = redis.call('HINCRBY', KEYS[1], 'o', 1) redis.call('HSET', KEYS[1], n, redis.call('HGET', KEYS[1], n - 1)) return n";
    let _: u64 =
        redis::cmd("EVAL").arg(copy).arg(1).arg("tidings:{p}").query_async(&mut connection).await.unwrap();
    assert_eq!(others.up_to(&stream("p"), 2).await.len(), 2);
}

/// Killed connections of subscribers are replaced, and what was published meanwhile is read.
#[tokio::test]
async fn killed_subscribers_miss_nothing() {
    let redis = Redis::start();
    let [(one, ones), (_, others)] = two(&redis).await;
    let mut connection = redis.connection().await;
    for n in 0..200 {
        if n % 50 == 25 {
            let _: u64 = redis::cmd("CLIENT")
                .arg("KILL")
                .arg("TYPE")
                .arg("pubsub")
                .query_async(&mut connection)
                .await
                .unwrap();
        }
        one.append(vec![numbered(n)]).await.unwrap();
    }
    for deliveries in [&ones, &others] {
        let offsets: Vec<_> =
            deliveries.up_to(&stream("p"), 200).await.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (1..=200).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_node_whose_name_a_living_node_has_gets_another_and_a_dead_ones_is_taken() {
    let redis = Redis::start();
    let address = RedisAddress::parse(&format!("redis://127.0.0.1:{}", redis.port)).unwrap();
    let servers = Servers::find(address).await.unwrap();
    let (first, second, third) = (Incarnation::random(), Incarnation::random(), Incarnation::random());
    let living = NodeName::take(&servers, "web", &first).await.unwrap();
    assert_eq!((living.name(), living.former()), ("web", None));
    let renamed = NodeName::take(&servers, "web", &second).await.unwrap();
    assert_eq!((renamed.name(), renamed.former()), ("web-2", None));
    // Its process ends without a word: its connections are closed.
    drop(living);
    let taken = tokio::time::timeout(Duration::from_secs(30), async {
        loop {
            let taken = NodeName::take(&servers, "web", &third).await.unwrap();
            if taken.name() == "web" {
                return taken;
            }
        }
    });
    assert_eq!(taken.await.expect("a dead node's name is free").former(), Some(&first));
}

/// A stream that nobody appends to keeps its place, and nothing else.
#[tokio::test]
async fn what_is_too_old_leaves_redis_and_the_stream_goes_on() {
    let redis = Redis::start();
    let (clock, seconds) = test_clock();
    let (engine, _) = redis.engine_at(clock).await;
    let progress = json!({"current": 1, "total": 2});
    let running = event(
        &json!({"type": "task.progress", "project_id": "p", "task_id": "t", "progress": progress, "id": "one"}),
    );
    engine.append((0..20).map(numbered).chain([running]).collect()).await.unwrap();
    let fields = || async {
        let mut connection = redis.connection().await;
        redis::cmd("HLEN").arg("tidings:{p}").query_async::<usize>(&mut connection).await.unwrap()
    };
    let full = fields().await;
    seconds.fetch_add(23 * 3600, Ordering::Relaxed);
    assert_eq!((engine.forget_old().await.unwrap(), fields().await), (0, full));
    let before = engine.position(&stream("p")).await.unwrap();
    seconds.fetch_add(2 * 3600, Ordering::Relaxed);
    assert_eq!(engine.forget_old().await.unwrap(), 1);
    assert_eq!(engine.forget_old().await.unwrap(), 0, "once is enough");
    assert!(fields().await < 12, "{} of {full}", fields().await);
    assert_eq!(engine.position(&stream("p")).await.unwrap(), before);
    let joined = engine.join(&stream("p"), None, &TypeFilter::everything()).await.unwrap();
    let CatchUp::State(state) = joined.catch_up else { panic!("no state") };
    assert_eq!((state.tasks.len(), state.truncated), (0, false), "nothing that would still show is missing");
    let earlier = Position { offset: 5, ..before.clone() };
    let missed = engine.join(&stream("p"), Some(&earlier), &TypeFilter::everything()).await.unwrap();
    assert!(matches!(missed.catch_up, CatchUp::State(_)), "what is not kept any more is not recovered");
    assert_eq!(engine.append(vec![numbered(1)]).await.unwrap()[0].position.offset, before.offset + 1);
}

/// A container that is killed leaves its connections without a word; the one that has its name next lets their time begin anew.
#[tokio::test]
async fn connections_that_a_killed_node_left_are_let_go_of_by_its_successor() {
    let redis = Redis::start();
    let mut connection = redis.connection().await;
    let (left, others) = (ClientId::random(), ClientId::random());
    for (client, node) in [(left, "web"), (others, "worker")] {
        let saved = json!({"owner": "dead/0.1.1", "node": node, "client_id": client.to_string(),
            "connected_at": "2026-11-23T10:00:00Z", "subscriptions": ["p"]});
        // As the engine writes it: the owner first.
        let saved = format!(
            r#"{{"owner":"dead/0.1.1",{}"#,
            &saved.to_string()[1..].replace(r#","owner":"dead/0.1.1""#, "")
        );
        let mut set = redis::cmd("SET");
        set.arg(format!("ws:connection:{client}")).arg(saved).arg("EX").arg(60);
        set.exec_async(&mut connection).await.unwrap();
    }
    let (engine, _) = redis.engine_of("web", system_clock()).await;
    let mut read = async |client: ClientId| -> (serde_json::Value, i64) {
        let key = format!("ws:connection:{client}");
        let saved: String = redis::cmd("GET").arg(&key).query_async(&mut connection).await.unwrap();
        let seconds = redis::cmd("TTL").arg(&key).query_async(&mut connection).await.unwrap();
        (serde_json::from_str(&saved).unwrap(), seconds)
    };
    let adopted = tokio::time::timeout(Duration::from_secs(30), async {
        while read(left).await.0["owner"] != "" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(adopted.await.is_ok(), "{:?}", read(left).await);
    assert!(read(left).await.1 > 3000, "its time begins anew");
    let (saved, seconds) = read(others).await;
    assert_eq!(
        (&saved["owner"], seconds <= 60),
        (&json!("dead/0.1.1"), true),
        "another node's is left alone"
    );
    engine.close().await;
}
