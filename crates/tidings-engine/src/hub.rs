//! The hub: which connection follows which stream, and the way of a record to those that follow it.
//!
//! Knows connections and streams; knows no socket, no engine and no message of a client. A record costs one lock and one
//! push per subscriber, whatever the state of the subscriber's socket.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tidings_protocol::{CloseCode, Offset, Position, ServerMessage, StreamId, Timestamp, TypeFilter};

use crate::{
    engine::{Deliver, Record},
    outbox::Outbox,
};

/// Names a connection within its node; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey(u64);

/// The connections of a node and what they follow.
#[derive(Debug, Default)]
pub struct Hub {
    registry: Mutex<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    next_key: u64,
    connections: HashMap<ConnectionKey, Connected>,
    streams: HashMap<StreamId, HashMap<ConnectionKey, Subscriber>>,
    subscriptions: usize,
}

#[derive(Debug)]
struct Connected {
    outbox: Arc<Outbox>,
    /// The streams that this connection follows, each with the offset that its last heartbeat told.
    told: BTreeMap<StreamId, Offset>,
}

#[derive(Debug)]
struct Subscriber {
    outbox: Arc<Outbox>,
    types: TypeFilter,
    progress: Progress,
}

#[derive(Debug)]
enum Progress {
    /// Not confirmed yet: what is delivered meanwhile is held, to go out behind the confirmation.
    Joining { held: Vec<Arc<Record>> },
    /// Live from here on: everything up to the offset is in the outbox or was not for it.
    Live { offset: Offset },
}

/// How many there are, for health and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HubCounts {
    /// Open connections.
    pub connections: usize,
    /// Subscriptions to projects, over all connections.
    pub subscriptions: usize,
}

impl Hub {
    /// Registers a connection whose messages wait in `outbox`.
    pub(crate) fn connect(&self, outbox: &Arc<Outbox>) -> ConnectionKey {
        let mut registry = self.registry.lock();
        registry.next_key += 1;
        let key = ConnectionKey(registry.next_key);
        registry.connections.insert(key, Connected { outbox: Arc::clone(outbox), told: BTreeMap::new() });
        key
    }

    /// Forgets a connection and all that it follows.
    pub(crate) fn disconnect(&self, key: ConnectionKey) {
        let mut registry = self.registry.lock();
        let Some(connected) = registry.connections.remove(&key) else { return };
        for stream in connected.told.keys() {
            registry.remove_subscriber(stream, key);
        }
    }

    /// Starts a subscription: from now on nothing of the stream is missed. A former one to the same stream ends here.
    /// Nothing goes out before [`Hub::confirm`].
    pub(crate) fn join(&self, key: ConnectionKey, stream: &StreamId, types: TypeFilter) {
        let mut registry = self.registry.lock();
        let Some(connected) = registry.connections.get_mut(&key) else { return };
        connected.told.insert(stream.clone(), 0);
        let subscriber = Subscriber {
            outbox: Arc::clone(&connected.outbox),
            types,
            progress: Progress::Joining { held: Vec::new() },
        };
        let former = registry.streams.entry(stream.clone()).or_default().insert(key, subscriber);
        if former.is_none() && *stream != StreamId::Announcements {
            registry.subscriptions += 1;
        }
    }

    /// Lets a subscription that [`Hub::join`] started go live behind `position`: first `opening` goes out (the
    /// confirmation of `confirmed`, and what was missed since then), then what was held meanwhile and lies behind
    /// `position`.
    pub(crate) fn confirm(
        &self,
        key: ConnectionKey,
        stream: &StreamId,
        confirmed: Offset,
        position: &Position,
        opening: impl Iterator<Item = Bytes>,
    ) {
        let mut registry = self.registry.lock();
        let registry = &mut *registry;
        let Some(subscriber) =
            registry.streams.get_mut(stream).and_then(|subscribers| subscribers.get_mut(&key))
        else {
            return;
        };
        subscriber.outbox.push_replay(opening);
        let live = Progress::Live { offset: position.offset };
        if let Progress::Joining { held } = std::mem::replace(&mut subscriber.progress, live) {
            subscriber.take(&held);
        }
        if let Some(connected) = registry.connections.get_mut(&key) {
            connected.told.insert(stream.clone(), confirmed);
        }
    }

    /// Ends a subscription; `false` if there was none.
    pub(crate) fn leave(&self, key: ConnectionKey, stream: &StreamId) -> bool {
        let mut registry = self.registry.lock();
        let followed = registry.connections.get_mut(&key).is_some_and(|c| c.told.remove(stream).is_some());
        followed && registry.remove_subscriber(stream, key)
    }

    /// Sends a heartbeat: it tells for each stream that moved since the last one up to where this connection is.
    pub(crate) fn heartbeat(&self, key: ConnectionKey, timestamp: Timestamp) {
        let mut registry = self.registry.lock();
        let Registry { connections, streams, .. } = &mut *registry;
        let Some(connected) = connections.get_mut(&key) else { return };
        let mut positions = BTreeMap::new();
        for (stream, told) in &mut connected.told {
            let subscriber = streams.get(stream).and_then(|subscribers| subscribers.get(&key));
            if let Some(&Subscriber { progress: Progress::Live { offset }, .. }) = subscriber
                && offset > *told
            {
                positions.insert(stream.to_string(), offset);
                *told = offset;
            }
        }
        connected.outbox.push(ServerMessage::SystemHeartbeat { timestamp, positions }.encode().into());
    }

    /// Whether any connection follows the stream.
    pub(crate) fn is_followed(&self, stream: &StreamId) -> bool {
        self.registry.lock().streams.contains_key(stream)
    }

    /// Closes every connection with `code`, each after what waits for it.
    pub fn close_all(&self, code: CloseCode) {
        for connected in self.registry.lock().connections.values() {
            connected.outbox.close(code);
        }
    }

    /// How many connections and subscriptions there are now.
    pub fn counts(&self) -> HubCounts {
        let registry = self.registry.lock();
        HubCounts { connections: registry.connections.len(), subscriptions: registry.subscriptions }
    }

    /// Live bytes that wait in all outboxes. Looks into each, so it is for metrics and not for a health check.
    pub fn waiting_bytes(&self) -> usize {
        self.registry.lock().connections.values().map(|connected| connected.outbox.waiting_bytes()).sum()
    }
}

impl Registry {
    fn remove_subscriber(&mut self, stream: &StreamId, key: ConnectionKey) -> bool {
        let Some(subscribers) = self.streams.get_mut(stream) else { return false };
        let removed = subscribers.remove(&key).is_some();
        if subscribers.is_empty() {
            self.streams.remove(stream);
        }
        if removed && *stream != StreamId::Announcements {
            self.subscriptions -= 1;
        }
        removed
    }
}

impl Subscriber {
    fn take(&mut self, records: &[Arc<Record>]) {
        match &mut self.progress {
            Progress::Joining { held } => held.extend(records.iter().cloned()),
            Progress::Live { offset } => {
                for record in records.iter().filter(|record| record.offset > *offset) {
                    if self.types.matches(&record.event_type) {
                        self.outbox.push(record.json.clone());
                    }
                }
                *offset = records.last().map_or(*offset, |record| record.offset.max(*offset));
            }
        }
    }
}

impl Deliver for Hub {
    fn deliver(&self, stream: &StreamId, _position: &Position, records: &[Arc<Record>]) {
        let mut registry = self.registry.lock();
        for subscriber in registry.streams.get_mut(stream).into_iter().flat_map(HashMap::values_mut) {
            subscriber.take(records);
        }
    }
}
