//! One fault after the other, chosen by chance, for as long as it is told to.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    chance::Chance,
    ingest::Feeder,
    node::Node,
    proxy::{Network, Proxy},
    redis_server::{DURABLE, RedisServer},
    scale,
    stage::{Load, Stage, Store, alone, report},
};

/// What can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillNode(usize),
    StopNode(usize),
    PauseNode(usize),
    PauseRedis,
    RestartRedis,
    CutListeners,
    CutNetwork,
    SwallowNetwork,
}

impl Fault {
    /// Any of them; of the nodes most often the one that has most clients.
    fn by_chance(chance: &mut Chance, stage: &Stage) -> Self {
        let busiest =
            (0..stage.nodes.len()).max_by_key(|&node| stage.fleet.on_node(stage.nodes[node].name()).len());
        let any = usize::try_from(chance.below(stage.nodes.len() as u64)).expect("a few nodes");
        let node = if chance.below(2) == 0 { any } else { busiest.expect("there are nodes") };
        let all = [
            Self::KillNode(node),
            Self::StopNode(node),
            Self::PauseNode(node),
            Self::PauseRedis,
            Self::RestartRedis,
            Self::CutListeners,
            Self::CutNetwork,
            Self::SwallowNetwork,
        ];
        all[usize::try_from(chance.below(all.len() as u64)).expect("a few faults")]
    }

    /// Whether both can be the case at once.
    fn goes_with(self, other: Self) -> bool {
        let part = |fault: Self| match fault {
            Self::KillNode(node) | Self::StopNode(node) | Self::PauseNode(node) => Some(node),
            Self::CutNetwork | Self::SwallowNetwork => Some(usize::MAX - 1),
            Self::PauseRedis | Self::RestartRedis | Self::CutListeners => Some(usize::MAX),
        };
        part(self) != part(other)
    }

    async fn begin(self, stage: &mut Stage, redis: &mut RedisServer, proxy: &Proxy) {
        match self {
            Self::KillNode(node) => stage.nodes[node].kill(),
            Self::StopNode(node) => drop(stage.nodes[node].stop().await),
            Self::PauseNode(node) => stage.nodes[node].pause(),
            Self::PauseRedis => redis.pause(),
            Self::RestartRedis => redis.kill(),
            Self::CutListeners => drop(redis.cut_listeners().await),
            Self::CutNetwork => proxy.set(Network::Cut),
            Self::SwallowNetwork => proxy.set(Network::Swallows),
        }
    }

    async fn end(self, stage: &mut Stage, redis: &mut RedisServer, proxy: &Proxy) {
        match self {
            Self::KillNode(node) | Self::StopNode(node) => stage.nodes[node].start().await,
            Self::PauseNode(node) => stage.nodes[node].go_on(),
            Self::PauseRedis => redis.go_on(),
            Self::RestartRedis => redis.start().await,
            Self::CutListeners => {}
            Self::CutNetwork | Self::SwallowNetwork => proxy.set(Network::Passes(Duration::ZERO)),
        }
    }
}

/// One fault or two at once; those of nodes begin first and end last, because a node neither starts without Redis nor is it asked
/// anything here while it is away.
fn choose(chance: &mut Chance, stage: &Stage) -> Vec<Fault> {
    let first = Fault::by_chance(chance, stage);
    let second = Fault::by_chance(chance, stage);
    let mut faults = vec![first];
    if chance.below(3) == 0 && first.goes_with(second) {
        faults.push(second);
    }
    let is_of_node =
        |fault: &Fault| matches!(fault, Fault::KillNode(_) | Fault::StopNode(_) | Fault::PauseNode(_));
    faults.sort_by_key(|fault| !is_of_node(fault));
    faults
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
        let feeder = Feeder::started(&redis.url(), &stage);
        let started = Instant::now();
        while started.elapsed() < limit {
            let faults = choose(&mut chance, &stage);
            let lasts = Duration::from_millis(200 + chance.below(9_000));
            report(format_args!("{:.1?}: {faults:?} for {lasts:?}", started.elapsed()));
            for fault in &faults {
                fault.begin(&mut stage, &mut redis, &proxy).await;
            }
            sleep(lasts).await;
            for fault in faults.iter().rev() {
                fault.end(&mut stage, &mut redis, &proxy).await;
            }
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
        let recovery = stage.recovery().await;
        feeder.stop(&redis).await;
        stage.conclude("soak", Store::Keeps, recovery).await;
    });
}
