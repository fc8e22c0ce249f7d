//! The saved connections of the embedded engine: pure, the time is passed in.

use std::{collections::HashMap, time::Duration};

use tidings_protocol::Timestamp;

use crate::{
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
};

/// Connections by the token that stands for them.
#[derive(Debug)]
pub(super) struct SavedConnections {
    /// How long a lost connection can be resumed.
    timeout: Duration,
    by_client: HashMap<ClientId, Kept>,
    clients: HashMap<ResumeToken, ClientId>,
}

#[derive(Debug)]
struct Kept {
    connection: SavedConnection,
    lost_at: Option<Timestamp>,
}

impl SavedConnections {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, by_client: HashMap::new(), clients: HashMap::new() }
    }

    pub(super) fn save(&mut self, connection: SavedConnection, lost_at: Option<Timestamp>) {
        self.clients.insert(connection.token, connection.client);
        let token = connection.token;
        let former = self.by_client.insert(connection.client, Kept { connection, lost_at });
        if let Some(former) = former.filter(|former| former.connection.token != token) {
            self.clients.remove(&former.connection.token);
        }
    }

    /// Whether the connection was `owner`'s, and is lost now.
    pub(super) fn release(&mut self, client: ClientId, owner: ConnectionKey, now: Timestamp) -> bool {
        let owned = self.by_client.get_mut(&client).filter(|kept| kept.connection.owner == Some(owner));
        let Some(kept) = owned else { return false };
        kept.connection.owner = None;
        kept.lost_at = Some(now);
        true
    }

    /// Whether the connection was `owner`'s, and is forgotten now.
    pub(super) fn forget(&mut self, client: ClientId, owner: ConnectionKey) -> bool {
        let owned = self.by_client.get(&client).is_some_and(|kept| kept.connection.owner == Some(owner));
        owned && self.remove(client).is_some()
    }

    pub(super) fn remove(&mut self, client: ClientId) -> Option<SavedConnection> {
        let kept = self.by_client.remove(&client)?;
        self.clients.remove(&kept.connection.token);
        Some(kept.connection)
    }

    /// See [`Engine::take_over`](super::Engine::take_over). Returns the former connection, and how it is kept from now on.
    pub(super) fn take_over(
        &mut self,
        token: &ResumeToken,
        successor: SavedConnection,
        now: Timestamp,
    ) -> Option<(SavedConnection, SavedConnection)> {
        let client = *self.clients.get(token)?;
        // A connection cannot take itself over.
        let alive = self.by_client.get(&client).is_some_and(|kept| !self.is_over(kept, now));
        if client == successor.client || !alive {
            return None;
        }
        let former = self.remove(client)?;
        self.remove(successor.client);
        let kept = SavedConnection { client, subscriptions: former.subscriptions.clone(), ..successor };
        self.save(kept.clone(), None);
        Some((former, kept))
    }

    /// Forgets what nobody came back for in time; returns whom.
    pub(super) fn forget_old(&mut self, now: Timestamp) -> Vec<ClientId> {
        let over = self.by_client.iter().filter(|(_, kept)| self.is_over(kept, now));
        let over: Vec<_> = over.map(|(client, _)| *client).collect();
        for client in &over {
            self.remove(*client);
        }
        over
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&SavedConnection, Option<Timestamp>)> {
        self.by_client.values().map(|kept| (&kept.connection, kept.lost_at))
    }

    fn is_over(&self, kept: &Kept, now: Timestamp) -> bool {
        let seconds = i64::try_from(self.timeout.as_secs()).unwrap_or(i64::MAX);
        kept.lost_at.is_some_and(|lost_at| now.seconds_since(lost_at) > seconds)
    }
}
