//! One running tidings without its edge: an engine, a hub, and the ways into them. Nothing in this crate imports it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tidings_protocol::{CloseCode, Event};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    connection::{Connection, Greeting},
    engine::{
        Appended, Deliver, Engine, EngineError, HistoryLimits,
        embedded::{EmbeddedEngine, system_clock},
    },
    hub::{Hub, HubCounts},
};

/// How often old history is forgotten.
const FORGET_INTERVAL: Duration = Duration::from_mins(1);

/// What a node needs to know.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// What connections are told and allowed.
    pub greeting: Greeting,
    /// How much history a stream keeps.
    pub history: HistoryLimits,
}

/// A node: publishes events and opens connections.
#[derive(Debug)]
pub struct Node {
    greeting: Greeting,
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
}

impl Node {
    /// A node with the embedded engine. Its upkeep runs on `tasks` until `shutdown`.
    pub fn embedded(options: NodeOptions, tasks: &TaskTracker, shutdown: CancellationToken) -> Self {
        let hub = Arc::new(Hub::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&hub) as Arc<dyn Deliver>));
        let engine = Arc::new(EmbeddedEngine::new(options.history, system_clock(), deliver));
        let (upkeep, followed) = (Arc::clone(&engine), Arc::clone(&hub));
        tasks.spawn(async move {
            let mut interval = tokio::time::interval(FORGET_INTERVAL);
            while shutdown.run_until_cancelled(interval.tick()).await.is_some() {
                upkeep.forget_old(|stream| followed.is_followed(stream));
            }
        });
        Self { greeting: options.greeting, hub, engine }
    }

    /// Appends events to their streams, from where they reach every subscriber. Returns their places.
    pub async fn publish(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        self.engine.append(events).await
    }

    /// Opens a connection.
    pub async fn connect(&self) -> Result<Connection, EngineError> {
        let now = jiff::Timestamp::now().into();
        Connection::open(Arc::clone(&self.hub), Arc::clone(&self.engine), &self.greeting, now).await
    }

    /// The engine, to read history from.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.greeting.node
    }

    /// How many connections and subscriptions there are now.
    pub fn counts(&self) -> HubCounts {
        self.hub.counts()
    }

    /// Live bytes that wait for clients, over all connections.
    pub fn waiting_bytes(&self) -> usize {
        self.hub.waiting_bytes()
    }

    /// Closes every connection with `code`, each after what waits for it.
    pub fn close_all(&self, code: CloseCode) {
        self.hub.close_all(code);
    }
}
