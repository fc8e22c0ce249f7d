//! A Redis that goes away, comes back, and has forgotten some or all of it.

use std::{collections::HashSet, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    node::Node,
    process::{DEADLINE, until},
    publish::HttpPublisher,
    record::{Epoch, Heard, Project, Witness},
    redis_server::{DURABLE, RedisServer, VOLATILE},
    stage::{Load, Outcome, Stage, Store, alone},
};

const SECOND: Duration = Duration::from_secs(1);

/// Three nodes on this Redis, under load for a second.
async fn loaded(redis: &RedisServer) -> Stage {
    let stage = Stage::set(Node::many(3, &redis.url(), &[]).await, Load::usual()).await;
    sleep(SECOND).await;
    stage
}

#[test]
fn redis_restarts_with_its_data_and_nothing_is_missing() {
    alone(async {
        let mut redis = RedisServer::started(DURABLE).await;
        let stage = loaded(&redis).await;
        redis.kill();
        sleep(2 * SECOND).await;
        redis.start().await;
        let outcome = stage.finish("Redis restarted with its data", Store::Keeps).await;
        outcome.assert_told(1..=1);
    });
}

#[test]
fn redis_stands_still_for_ten_seconds_and_nothing_is_missing() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        redis.pause();
        sleep(10 * SECOND).await;
        redis.go_on();
        let outcome = stage.finish("Redis paused for 10 s", Store::Keeps).await;
        outcome.assert_told(1..=1);
    });
}

#[test]
fn redis_restarts_from_older_data_and_whoever_had_more_is_told() {
    alone(async {
        let mut redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        // These will have seen nothing of what is going to be forgotten.
        let away = || (0..stage.load.clients).step_by(10);
        stage.fleet.send_away(away());
        let members = &stage.fleet.members;
        until("clients being away", || async { away().all(|client| members[client].node().is_none()) }).await;
        let copy = redis.copy_data().await;
        sleep(2 * SECOND).await;
        redis.kill();
        let fault_ms = stage.clock.now_ms();
        redis.set_back_to(&copy);
        redis.start().await;
        // Not before the nodes know: what was not forgotten when it was delivered may be delivered.
        assert_eq!(stage.recovery().await.stuck, [0; 0], "before the others came back");
        stage.fleet.call_back();
        let clients = stage.load.clients;
        let Outcome { verdict, witnesses, _nodes } =
            stage.finish("Redis restarted from an older dump", Store::Forgets).await;
        assert!(verdict.taken_back > 0 && verdict.told_gaps > 0, "nothing was forgotten: {verdict:#?}");
        for client in (0..clients).step_by(10) {
            let told = witnesses[client].records.iter().filter(|record| record.at_ms >= fault_ms);
            let gap = told.into_iter().find(|record| {
                matches!(record.heard, Heard::Confirmed { recovered, .. } if recovered != Some(true))
            });
            assert!(gap.is_none(), "client {client} had nothing that was forgotten, and was told {gap:?}");
        }
        assert!(epochs(&witnesses, 0).len() > 1, "a branch without a new epoch");
    });
}

/// The lives of a project's stream that clients heard of.
fn epochs(witnesses: &[Witness], of: Project) -> HashSet<Epoch> {
    let records = witnesses.iter().flat_map(|witness| &witness.records);
    let epoch = |heard: &Heard| match heard {
        Heard::Confirmed { project, place, .. } if *project == of => Some(place.epoch.clone()),
        _ => None,
    };
    records.filter_map(|record| epoch(&record.heard)).collect()
}

#[test]
fn redis_restarts_empty_and_every_subscription_begins_anew() {
    alone(async {
        let mut redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        redis.kill();
        sleep(SECOND).await;
        redis.start().await;
        let outcome = stage.finish("Redis restarted empty", Store::Forgets).await;
        let Outcome { verdict, witnesses, .. } = &outcome;
        let subscriptions: usize = witnesses.iter().map(|witness| witness.projects.len()).sum();
        assert!(verdict.told_gaps >= subscriptions, "{} of {subscriptions} were told", verdict.told_gaps);
        outcome.assert_told(1..=1);
    });
}

#[test]
fn redis_cuts_the_listening_connections_again_and_again() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        for _ in 0..4 {
            until("somebody listening", || async { redis.cut_listeners().await > 0 }).await;
            sleep(2 * SECOND).await;
        }
        let outcome = stage.finish("CLIENT KILL TYPE pubsub, 4 times", Store::Keeps).await;
        // The plain channel keeps nothing, so that a moment is an outage where it was heard; streams lose nothing by it.
        outcome.assert_told(0..=5);
    });
}

#[test]
fn redis_gives_up_a_listener_that_does_not_read() {
    alone(async {
        let limit = ["--client-output-buffer-limit", "pubsub", "1048576", "1048576", "1"];
        let redis = RedisServer::started(&[VOLATILE, &limit].concat()).await;
        let usual = Load::usual();
        // One project more, which one client of each node follows: large events for everybody would only show how fast
        // this machine is.
        let large = usual.projects;
        let load = Load { projects: large + 1, ..usual };
        let follow = usual.follow().into_iter().enumerate();
        let follow = follow.map(|(client, projects)| if client < 3 { vec![large] } else { projects });
        let nodes = Node::many(3, &redis.url(), &[]).await;
        let mut stage = Stage::following(nodes, load, follow.collect()).await;
        stage.publish();
        stage.nodes[2].pause();
        let paused = Instant::now();
        let living = stage.addresses[..2].into();
        let mut publisher = HttpPublisher::new(100, living, stage.clock, stage.book.clone()).padded(200_000);
        // The one that is given up cannot connect again; those that read are not given up.
        let listening = redis.listeners().await;
        while redis.listeners().await >= listening {
            assert!(paused.elapsed() < DEADLINE, "Redis does not give the listener up");
            publisher.publish(std::iter::once(large)).await;
        }
        // Long enough for its clients to go elsewhere.
        sleep((8 * SECOND).saturating_sub(paused.elapsed())).await;
        stage.nodes[2].go_on();
        stage.finish("a paused node over the output-buffer limit", Store::Keeps).await;
    });
}

#[test]
fn redis_is_emptied_while_it_runs_and_every_subscription_begins_anew() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        redis.command::<()>(&["FLUSHALL"]).await.unwrap();
        let outcome = stage.finish("FLUSHALL", Store::Forgets).await;
        let subscriptions: usize = outcome.witnesses.iter().map(|witness| witness.projects.len()).sum();
        let told = outcome.verdict.told_gaps;
        assert!(told >= subscriptions, "{told} of {subscriptions} were told");
        outcome.assert_told(0..=1);
    });
}

#[test]
fn redis_is_full_for_a_while_and_nothing_that_was_acknowledged_is_missing() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        redis.command::<()>(&["CONFIG", "SET", "maxmemory", "1mb"]).await.unwrap();
        sleep(4 * SECOND).await;
        redis.command::<()>(&["CONFIG", "SET", "maxmemory", "0"]).await.unwrap();
        let outcome = stage.finish("Redis full for 4 s", Store::Keeps).await;
        outcome.assert_told(0..=1);
    });
}

#[test]
fn redis_takes_no_writes_for_a_while_and_nothing_that_was_acknowledged_is_missing() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = loaded(&redis).await;
        redis.command::<()>(&["CLIENT", "PAUSE", "5000", "WRITE"]).await.unwrap();
        sleep(5 * SECOND).await;
        let outcome = stage.finish("CLIENT PAUSE WRITE for 5 s", Store::Keeps).await;
        outcome.assert_told(1..=2);
    });
}
