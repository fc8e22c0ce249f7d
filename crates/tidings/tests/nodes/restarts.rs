//! Nodes that stop, are killed, and come back, with the streams in Redis.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    node::Node,
    record::{Heard, Record},
    redis_server::{RedisServer, VOLATILE},
    stage::{Load, Recovery, Stage, Store, alone, report},
};

/// How long a stopping node takes to send its clients away.
const DRAIN_SECONDS: usize = 4;

#[test]
fn what_is_published_at_any_node_reaches_the_clients_of_all() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let stage = Stage::set(Node::many(3, &redis.url(), &[]).await, Load::usual()).await;
        sleep(Duration::from_secs(3)).await;
        stage.conclude("three nodes, no fault", Store::Keeps, Recovery::default()).await;
    });
}

#[test]
fn three_nodes_restart_one_after_the_other_and_nobody_misses_anything() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let drain = DRAIN_SECONDS.to_string();
        let nodes = Node::many(3, &redis.url(), &[("TIDINGS_DRAIN_SECONDS", &drain)]).await;
        let mut stage = Stage::set(nodes, Load::usual()).await;
        for index in 0..3 {
            let (since_ms, node) = (stage.clock.now_ms(), &mut stage.nodes[index]);
            let clients = stage.fleet.on_node(node.name()).len();
            assert!(node.stop().await.success(), "a stop that was asked for is a success");
            let busiest = stage.fleet.connects_per_second_max(since_ms);
            let limit = clients * 3 / (2 * DRAIN_SECONDS);
            report(format_args!(
                "{} sent {clients} clients away in {} ms; {busiest} came back in the busiest second (1.5 times even: {limit})",
                node.name(),
                stage.clock.now_ms() - since_ms
            ));
            node.start().await;
        }
        let outcome = stage.finish("rolling restart of three nodes", Store::Keeps).await;
        let (mut resumed, mut closed) = (0, 0);
        for witness in &outcome.witnesses {
            closed += appointments_kept(&witness.records);
            resumed +=
                witness.records.iter().filter(|record| matches!(record.heard, Heard::Resumed(true))).count();
        }
        report(format_args!("{resumed} of {closed} connections were resumed, the others subscribed again"));
    });
}

/// Every close has to be by appointment, and not before it. How many there were.
fn appointments_kept(records: &[Record]) -> usize {
    let (mut appointment, mut closed) = (None, 0);
    for record in records {
        match record.heard {
            Heard::Connected { .. } => appointment = None,
            Heard::Appointment { in_ms } => appointment = Some(record.at_ms + in_ms),
            Heard::Closed { code, ref why } => {
                // Both were read by a busy machine.
                let due = appointment.is_some_and(|at| record.at_ms + 250 >= at);
                assert!(
                    code == 1012 && due,
                    "closed with {code} ({why}) at {}, appointment {appointment:?}",
                    record.at_ms
                );
                closed += 1;
            }
            _ => {}
        }
    }
    closed
}

#[test]
fn a_node_is_killed_and_its_clients_go_on_at_the_others() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let mut stage = Stage::set(Node::many(3, &redis.url(), &[]).await, Load::usual()).await;
        sleep(Duration::from_secs(1)).await;
        stage.nodes[1].kill();
        let recovery = stage.recovery().await;
        // And once more, with the one that is not there when they look for another.
        stage.nodes[1].start().await;
        sleep(Duration::from_secs(1)).await;
        stage.nodes[2].kill();
        stage.recovery().await;
        stage.conclude("kill -9 of a node", Store::Keeps, recovery).await;
    });
}

#[test]
fn nodes_of_the_same_name_run_side_by_side_and_after_a_kill() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let (name, url) = ([("CONTAINER_ID", "twin")], redis.url());
        let mut nodes = Node::many(1, &url, &name).await;
        nodes.extend(Node::many(1, &url, &name).await);
        let names = [shown_name(&nodes[0]).await, shown_name(&nodes[1]).await];
        assert_eq!(names[0], "twin");
        assert_ne!(names[1], "twin", "a name that is taken");
        assert!(warned_of_its_name(&nodes[1]) && !warned_of_its_name(&nodes[0]), "{}", nodes[1].log());
        let mut stage = Stage::set(nodes, Load::usual()).await;
        // One after the other: all clients go to the one that lives, and to the one that came back.
        for index in 0..2 {
            stage.nodes[index].kill();
            sleep(Duration::from_secs(1)).await;
            stage.nodes[index].start().await;
            let names = [shown_name(&stage.nodes[0]).await, shown_name(&stage.nodes[1]).await];
            assert_ne!(names[0], names[1], "two nodes with one name");
            assert_eq!(stage.recovery().await.stuck, [0; 0]);
        }
        stage.finish("two nodes with one CONTAINER_ID, each killed", Store::Keeps).await;
    });
}

async fn shown_name(node: &Node) -> String {
    node.health().await.unwrap()["node"].as_str().unwrap().to_owned()
}

fn warned_of_its_name(node: &Node) -> bool {
    node.log().lines().any(|line| line.contains(r#""level":"WARN""#) && line.contains("CONTAINER_ID"))
}
