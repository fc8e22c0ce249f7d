//! One running tidings without its edge: an engine, a hub with its shards, and the ways into them. Nothing in this crate
//! imports it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tidings_protocol::{CloseCode, Event, StreamId};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    driver::{Driver, ShardHandle},
    engine::{
        Appended, Deliver, Engine, EngineError,
        embedded::{EmbeddedEngine, EmbeddedOptions, system_clock},
        journal::JournalError,
    },
    hub::{Hub, HubCounts},
    shard::ShardOptions,
};

/// How often old history is forgotten.
const FORGET_INTERVAL: Duration = Duration::from_mins(1);

/// What a node needs to know.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// How many shards share the connections; one per core is best.
    pub shards: usize,
    /// What connections are told and allowed.
    pub shard: ShardOptions,
    /// What the engine keeps.
    pub engine: EmbeddedOptions,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
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
}

impl Node {
    /// A node with the embedded engine, and the drivers of its shards, each of which somebody must run. Its upkeep runs on
    /// `tasks` until `shutdown`.
    pub async fn embedded(
        options: NodeOptions,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<(Self, Vec<Driver>), NodeError> {
        let hub = Arc::new(Hub::new(options.shards));
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&hub) as Arc<dyn Deliver>));
        let engine = Arc::new(EmbeddedEngine::open(options.engine, system_clock(), deliver)?);
        let (upkeep, followed) = (Arc::clone(&engine), Arc::clone(&hub));
        tasks.spawn(async move {
            let mut interval = tokio::time::interval(FORGET_INTERVAL);
            while shutdown.run_until_cancelled(interval.tick()).await.is_some() {
                upkeep.forget_old(|stream| followed.is_followed(stream));
            }
        });
        let mut drivers = Vec::with_capacity(options.shards);
        for number in 0..hub.shards() {
            // Followed first: what is appended from here on reaches the shard or is before the position.
            hub.follow(number, StreamId::Announcements);
            let announcements = engine.position(&StreamId::Announcements).await?;
            let engine = Arc::clone(&engine) as Arc<dyn Engine>;
            drivers.push(Driver::new(number, Arc::clone(&hub), engine, options.shard.clone(), announcements));
        }
        Ok((Self { name: options.shard.node, hub, engine }, drivers))
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

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the connections came to so far.
    pub fn counts(&self) -> HubCounts {
        self.hub.counts()
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
