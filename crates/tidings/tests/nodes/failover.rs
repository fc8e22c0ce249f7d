//! Redis of several: a failover that forgets the newest, and slots that move.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    cluster_set::ClusterSet,
    http,
    node::Node,
    process::until,
    sentinel_set::SentinelSet,
    stage::{Load, Outcome, Stage, Store, alone},
};

#[test]
fn the_primary_is_lost_with_what_it_had_not_passed_on_and_that_is_told() {
    alone(async {
        let mut set = SentinelSet::started().await;
        let stage = Stage::set(Node::many(3, &set.url(), &[]).await, Load::usual()).await;
        set.cut_replication().await;
        sleep(Duration::from_millis(700)).await;
        set.fail_primary();
        set.failed_over().await;
        let Outcome { verdict, _nodes, .. } =
            stage.finish("Sentinel failover, the newest lost", Store::Forgets).await;
        assert!(verdict.taken_back > 0 && verdict.told_gaps > 0, "nothing was forgotten: {verdict:#?}");
    });
}

#[test]
fn the_primary_is_lost_and_everything_goes_on_at_its_replica() {
    alone(async {
        let mut set = SentinelSet::started().await;
        let stage = Stage::set(Node::many(3, &set.url(), &[]).await, Load::usual()).await;
        sleep(Duration::from_secs(1)).await;
        set.fail_primary();
        set.failed_over().await;
        // Replication is always a little behind, so that a few events may be lost.
        stage.finish("Sentinel failover", Store::Forgets).await;
    });
}

#[test]
fn the_primary_changes_by_hand_and_the_former_one_lives_on_as_a_replica() {
    alone(async {
        let set = SentinelSet::started().await;
        let stage = Stage::set(Node::many(3, &set.url(), &[]).await, Load::usual()).await;
        set.ask_for_failover().await;
        set.failed_over().await;
        set.demoted().await;
        let a_few_seconds = usize::try_from(4 * stage.load.events_per_second).unwrap();
        let Outcome { verdict, _nodes, .. } = stage.finish("Sentinel failover by hand", Store::Forgets).await;
        // Sentinel demotes the former primary only after about 10 s. What it is given until then is lost with it, so that nodes
        // have to notice by themselves.
        assert!(verdict.taken_back < a_few_seconds, "{} acknowledged events are lost", verdict.taken_back);
    });
}

#[test]
fn a_primary_that_stood_still_wakes_up_and_has_been_replaced() {
    alone(async {
        let set = SentinelSet::started().await;
        let stage = Stage::set(Node::many(3, &set.url(), &[]).await, Load::usual()).await;
        set.primary().pause();
        set.failed_over().await;
        // Everybody is at the new one by now; or is still there.
        sleep(Duration::from_secs(2)).await;
        set.primary().go_on();
        set.demoted().await;
        stage.finish("a replaced primary wakes up", Store::Forgets).await;
    });
}

#[test]
fn slots_of_a_cluster_move_under_load() {
    alone(async {
        let cluster = ClusterSet::started().await;
        let stage = Stage::set(Node::many(3, &cluster.url(), &[]).await, Load::usual()).await;
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            let slots = cluster.slots_with_keys(from, "tidings:").await;
            assert!(!slots.is_empty(), "server {from} of the cluster has nothing of the service");
            for &slot in slots.iter().take(3) {
                cluster.move_slot(slot, from, to).await;
                sleep(Duration::from_millis(300)).await;
            }
        }
        stage.finish("nine slots of a cluster moved", Store::Keeps).await;
    });
}

/// The first primary, at which everything is heard that belongs to no project.
#[test]
fn a_primary_of_a_cluster_is_lost_and_its_replica_goes_on() {
    alone(async {
        let mut cluster = ClusterSet::started().await;
        let replica = cluster.add_replica().await;
        let stage = Stage::set(Node::many(3, &cluster.url(), &[]).await, Load::usual()).await;
        sleep(Duration::from_secs(1)).await;
        cluster.server(0).kill();
        let role = || replica.info(&["INFO", "replication"], "role");
        until("the replica taking over", || async { role().await.as_deref() == Some("master") }).await;
        // Replication is always a little behind, so that a few events may be lost.
        stage.finish("a Cluster's primary lost, its replica promoted", Store::Forgets).await;
    });
}

#[test]
fn one_primary_of_a_cluster_is_away_for_a_while_and_everybody_is_told() {
    alone(async {
        let mut cluster = ClusterSet::started().await;
        let stage = Stage::set(Node::many(3, &cluster.url(), &[]).await, Load::usual()).await;
        // Not the first, which has everything that belongs to no project.
        cluster.server(2).kill();
        let address = cluster.server(2).address();
        sleep(Duration::from_secs(4)).await;
        let ready = http::get(stage.addresses[0], "/readyz?verbose").await.unwrap();
        let of_server = ready.body.lines().find(|line| line.contains(&address));
        assert!(of_server.is_some_and(|line| line.starts_with("[-]")), "{address} is dead: {ready:?}");
        cluster.server(2).start().await;
        let outcome = stage.finish("one of three primaries away for 4 s", Store::Keeps).await;
        outcome.assert_told(1..=1);
    });
}
