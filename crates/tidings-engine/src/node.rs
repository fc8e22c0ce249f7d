//! One running tidings without its edge: an engine, a hub with its shards, and the ways into them. Nothing in this crate
//! imports it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tidings_protocol::{CloseCode, Event, StreamId};
use tokio::time::{Instant, sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    driver::{Driver, ShardHandle},
    engine::{
        Appended, Deliver, Engine, EngineError, HistoryLimits,
        embedded::{EmbeddedEngine, EmbeddedOptions, system_clock},
        journal::JournalError,
        redis::{Fault, Incarnation, NodeName, RedisAddress, RedisEngine, RedisOptions, Servers},
    },
    hub::{Hub, HubCounts},
    shard::ShardOptions,
    vigil::{LOOK_INTERVAL, Vigil},
};

/// How often old history is forgotten.
const FORGET_INTERVAL: Duration = Duration::from_mins(1);

/// A Redis that starts beside the service may be later than it.
const START_PATIENCE: Duration = Duration::from_secs(15);
const START_RETRY: Duration = Duration::from_secs(1);

/// What a node needs to know.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// How many shards share the connections; one per core is best.
    pub shards: usize,
    /// What connections are told and allowed.
    pub shard: ShardOptions,
    /// Where streams are kept.
    pub engine: EngineOptions,
}

/// Where streams are kept.
#[derive(Clone, Debug)]
pub enum EngineOptions {
    /// In this process.
    Embedded(EmbeddedOptions),
    /// In a Redis that other nodes share.
    Redis(RedisStore),
}

/// Streams in Redis.
#[derive(Clone, Debug)]
pub struct RedisStore {
    /// Where it is.
    pub address: RedisAddress,
    /// How much history a stream keeps.
    pub history: HistoryLimits,
    /// How long a lost connection can be resumed.
    pub connection_timeout: Duration,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Redis does not answer, or refuses.
    #[error("Redis at {address}: {fault}")]
    Redis {
        /// Where, without user and password.
        address: String,
        /// Whether it was to speak TLS.
        tls: bool,
        /// Why.
        fault: Fault,
    },
    /// The engine does not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A node: publishes events and takes connections.
#[derive(Debug)]
pub struct Node {
    name: Arc<str>,
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
    vigil: Arc<Vigil>,
    redis: Option<RedisMember>,
}

/// A node's part in a Redis that several share.
#[derive(Clone, Debug)]
pub struct RedisMember {
    /// The Redis.
    pub servers: Arc<Servers>,
    /// This run of this node.
    pub incarnation: Incarnation,
}

impl Node {
    /// A node, and the drivers of its shards, each of which somebody must run. Its upkeep runs on `tasks` until `shutdown`.
    pub async fn start(
        mut options: NodeOptions,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<(Self, Vec<Driver>), NodeError> {
        let hub = Arc::new(Hub::new(options.shards));
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&hub) as Arc<dyn Deliver>));
        let vigil = Arc::new(Vigil::new(deliver.clone()));
        let (looking, looked_at) = (shutdown.clone(), Arc::clone(&vigil));
        tasks.spawn(async move {
            let mut interval = tokio::time::interval(LOOK_INTERVAL);
            while looking.run_until_cancelled(interval.tick()).await.is_some() {
                looked_at.look();
            }
        });
        let (engine, redis): (Arc<dyn Engine>, _) = match options.engine {
            EngineOptions::Embedded(embedded) => {
                let engine = Arc::new(EmbeddedEngine::open(embedded, system_clock(), deliver)?);
                let (upkeep, followed) = (Arc::clone(&engine), Arc::clone(&hub));
                tasks.spawn(async move {
                    let mut interval = tokio::time::interval(FORGET_INTERVAL);
                    while shutdown.run_until_cancelled(interval.tick()).await.is_some() {
                        upkeep.forget_old(|stream| followed.is_followed(stream));
                    }
                });
                (engine, None)
            }
            EngineOptions::Redis(store) => {
                let (address, tls) = (format!("{:?}", store.address), store.address.is_tls());
                let joined = join_redis(store, &mut options.shard, deliver, &vigil).await;
                let (engine, member) = joined.map_err(|fault| NodeError::Redis { address, tls, fault })?;
                (Arc::new(engine), Some(member))
            }
        };
        let mut drivers = Vec::with_capacity(options.shards);
        engine.follow(&StreamId::Announcements);
        for number in 0..hub.shards() {
            // Followed first: what is appended from here on reaches the shard or is before the position.
            hub.follow(number, StreamId::Announcements);
            let announcements = engine.position(&StreamId::Announcements).await?;
            let engine = Arc::clone(&engine);
            drivers.push(Driver::new(number, Arc::clone(&hub), engine, options.shard.clone(), announcements));
        }
        Ok((Self { name: options.shard.node, hub, engine, vigil, redis }, drivers))
    }

    /// Appends events to their streams, from where they reach every subscriber. Returns their places.
    pub async fn publish(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        self.engine.append(events).await
    }

    /// The way into one of the shards.
    pub fn shard(&self, number: u16) -> ShardHandle {
        ShardHandle::new(Arc::clone(&self.hub), number % self.hub.shards())
    }

    /// How many shards there are.
    pub fn shards(&self) -> u16 {
        self.hub.shards()
    }

    /// The engine, to read history from.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// What the node's events come through.
    pub fn vigil(&self) -> &Arc<Vigil> {
        &self.vigil
    }

    /// Its part in the Redis that keeps the streams; `None`: it keeps them itself.
    pub fn redis(&self) -> Option<&RedisMember> {
        self.redis.as_ref()
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the connections came to so far.
    pub fn counts(&self) -> HubCounts {
        self.hub.counts()
    }

    /// Gives every connection an appointment within `over`, at which it is closed with 1012; waits until all have left. Who
    /// does not take what waits for it does not leave.
    pub async fn drain(&self, over: Duration) {
        self.hub.drain(over).await;
    }

    /// Closes every connection with `code`, each after what waits for it; the shards end when the last has left.
    pub fn close_all(&self, code: CloseCode) {
        self.hub.close_all(code);
    }

    /// Ends in good order, once nobody publishes any more.
    pub async fn close(&self) {
        self.engine.close().await;
    }

    /// Drops every connection where it stands; the shards end.
    pub fn drop_all(&self) {
        self.hub.drop_all();
    }
}

/// Takes the node's name among those that share the Redis, and starts its engine. The shards are told the name.
async fn join_redis(
    store: RedisStore,
    shard: &mut ShardOptions,
    deliver: Weak<dyn Deliver>,
    vigil: &Arc<Vigil>,
) -> Result<(RedisEngine, RedisMember), Fault> {
    let incarnation = Incarnation::random();
    let find = async || {
        let servers = Servers::find(store.address.clone()).await?;
        let taken = NodeName::take(&servers, &shard.node, &incarnation).await?;
        Ok::<_, Fault>((Arc::new(servers), taken))
    };
    let patience = Instant::now() + START_PATIENCE;
    let (servers, taken) = loop {
        match find().await {
            Ok(found) => break found,
            Err(fault @ (Fault::Refused(_) | Fault::Distrusted(_))) => return Err(fault),
            Err(fault) if Instant::now() >= patience => return Err(fault),
            Err(fault) => {
                let seconds = START_PATIENCE.as_secs();
                tracing::warn!(%fault, "Redis cannot be reached; trying for {seconds} seconds, then giving up");
                sleep(START_RETRY).await;
            }
        }
    };
    if taken.name() != &*shard.node {
        tracing::warn!(
            wanted = &*shard.node,
            name = taken.name(),
            "another node that lives has this node's name (CONTAINER_ID); this one has another name now"
        );
        shard.node = taken.name().into();
    }
    let options = RedisOptions {
        history: store.history,
        connection_timeout: store.connection_timeout,
        check_interval: Duration::from_secs(shard.heartbeat_interval_s),
        adopts_orphans: shard.restarted || taken.former().is_some(),
        incarnation: incarnation.clone(),
        name: taken,
    };
    let engine =
        RedisEngine::start(Arc::clone(&servers), options, system_clock(), deliver, Arc::clone(vigil)).await?;
    Ok((engine, RedisMember { servers, incarnation }))
}
