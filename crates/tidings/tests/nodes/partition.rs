//! One node is cut off from Redis, and the others are not.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    node::Node,
    proxy::{Network, Proxy},
    redis_server::{RedisServer, VOLATILE},
    stage::{Load, Outcome, Stage, Store, alone},
};

const FOR: Duration = Duration::from_secs(8);

#[test]
fn a_node_whose_connections_to_redis_are_cut_says_so_and_catches_up() {
    alone(cut_off("a node cut off from Redis for 8 s", Network::Cut));
}

#[test]
fn a_node_whose_redis_falls_silent_says_so_and_catches_up() {
    alone(cut_off("a node behind a black hole for 8 s", Network::Swallows));
}

#[test]
fn a_node_far_from_redis_is_as_good_as_the_others() {
    alone(async {
        let (_redis, proxy, stage) = with_a_proxy().await;
        proxy.set(Network::Passes(Duration::from_millis(20)));
        sleep(Duration::from_secs(3)).await;
        stage.finish("a node 20 ms away from Redis", Store::Keeps).await;
    });
}

/// Three nodes, the last of them behind a proxy.
async fn with_a_proxy() -> (RedisServer, Proxy, Stage) {
    let redis = RedisServer::started(VOLATILE).await;
    let proxy = Proxy::before(redis.port()).await;
    let mut nodes = Node::many(2, &redis.url(), &[]).await;
    nodes.extend(Node::many(1, &proxy.url(), &[("CONTAINER_ID", "behind-proxy")]).await);
    let stage = Stage::set(nodes, Load::usual()).await;
    (redis, proxy, stage)
}

async fn cut_off(row: &str, how: Network) {
    let (_redis, proxy, stage) = with_a_proxy().await;
    let clients = stage.fleet.on_node("behind-proxy");
    assert!(clients.len() > 10, "nobody is there to see it");
    let fault_ms = stage.clock.now_ms();
    proxy.set(how);
    sleep(FOR).await;
    proxy.set(Network::Passes(Duration::ZERO));
    let Outcome { witnesses, _nodes, .. } = stage.finish(row, Store::Keeps).await;
    for client in clients {
        let told = witnesses[client].told_since(fault_ms);
        // Others went on publishing: what this node missed it has read again.
        assert_eq!(told, ["degraded", "recovered, gap recovered"], "client {client}");
    }
}
