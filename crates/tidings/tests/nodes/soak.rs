//! One fault after the other, chosen by chance, for as long as it is told to.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    chance::Chance,
    node::Node,
    proxy::{Network, Proxy},
    redis_server::{DURABLE, RedisServer},
    scale,
    stage::{Load, Stage, Store, alone, report},
};

/// What can break. The first node is never killed: the soak is about clients, and somebody has to be there.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillNode,
    StopNode,
    PauseNode,
    PauseRedis,
    RestartRedis,
    CutListeners,
    CutNetwork,
    SwallowNetwork,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::KillNode,
        Self::StopNode,
        Self::PauseNode,
        Self::PauseRedis,
        Self::RestartRedis,
        Self::CutListeners,
        Self::CutNetwork,
        Self::SwallowNetwork,
    ];

    /// Breaks something for this long, and mends it.
    async fn happen(
        self,
        stage: &mut Stage,
        redis: &mut RedisServer,
        proxy: &Proxy,
        node: usize,
        lasts: Duration,
    ) {
        let node = &mut stage.nodes[node];
        match self {
            Self::KillNode => {
                node.kill();
                sleep(lasts).await;
                node.start().await;
            }
            Self::StopNode => {
                node.stop().await;
                sleep(lasts).await;
                node.start().await;
            }
            Self::PauseNode => {
                node.pause();
                sleep(lasts).await;
                node.go_on();
            }
            Self::PauseRedis => {
                redis.pause();
                sleep(lasts).await;
                redis.go_on();
            }
            Self::RestartRedis => {
                redis.kill();
                sleep(lasts).await;
                redis.start().await;
            }
            Self::CutListeners => {
                redis.cut_listeners().await;
            }
            Self::CutNetwork | Self::SwallowNetwork => {
                proxy.set(if matches!(self, Self::CutNetwork) { Network::Cut } else { Network::Swallows });
                sleep(lasts).await;
                proxy.set(Network::Passes(Duration::ZERO));
            }
        }
    }
}

#[test]
#[ignore = "set TIDINGS_SOAK_SECONDS, and run it with --ignored"]
fn faults_by_chance_for_as_long_as_it_is_told() {
    let limit = scale::soak().expect("TIDINGS_SOAK_SECONDS says how long");
    alone(async move {
        let seed = scale::seed();
        report(format_args!("soak for {limit:?} with TIDINGS_SOAK_SEED={seed}"));
        let mut chance = Chance::new(seed);
        let mut redis = RedisServer::started(DURABLE).await;
        let proxy = Proxy::before(redis.port()).await;
        let drain = [("TIDINGS_DRAIN_SECONDS", "3")];
        let mut nodes = Node::many(2, &redis.url(), &drain).await;
        let behind_proxy = [&drain[..], &[("CONTAINER_ID", "behind-proxy")]].concat();
        nodes.extend(Node::many(1, &proxy.url(), &behind_proxy).await);
        let mut stage = Stage::set(nodes, Load::usual()).await;
        let started = Instant::now();
        while started.elapsed() < limit {
            let choice = usize::try_from(chance.below(Fault::ALL.len() as u64)).expect("a few");
            let node = 1 + usize::from(chance.below(2) == 1);
            let (fault, lasts) = (Fault::ALL[choice], Duration::from_millis(200 + chance.below(9_000)));
            report(format_args!("{:?}: {fault:?} of node {node} for {lasts:?}", started.elapsed()));
            fault.happen(&mut stage, &mut redis, &proxy, node, lasts).await;
            let recovery = stage.recovery().await;
            let names = recovery.stuck.len();
            report(format_args!("recovered in {:?} ms, stuck {names}", recovery.took_ms.unwrap_or_default()));
            if names > 0 {
                // The verdict tells more than a deadline does.
                stage.conclude("soak, ended early", Store::Keeps, recovery).await;
                return;
            }
            sleep(Duration::from_millis(chance.below(2_000))).await;
        }
        stage.finish("soak", Store::Keeps).await;
    });
}
