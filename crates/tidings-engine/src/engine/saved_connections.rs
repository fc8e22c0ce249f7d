//! The saved connections of the embedded engine: pure, the time is passed in.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tidings_protocol::Timestamp;

use crate::{
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
};

use super::journal::{Entry, encode};

/// A table below this is not worth shrinking.
const SHRINK_CAPACITY_MIN: usize = 1024;

/// Connections by the token that stands for them.
#[derive(Debug)]
pub(super) struct SavedConnections {
    /// How long a lost connection can be resumed.
    timeout: Duration,
    by_client: HashMap<ClientId, Kept>,
    clients: HashMap<ResumeToken, ClientId>,
    /// Who has changed since the journal was last told. Empty without a journal.
    unjournaled: HashSet<ClientId>,
    has_journal: bool,
}

#[derive(Debug)]
struct Kept {
    connection: SavedConnection,
    lost_at: Option<Timestamp>,
}

impl SavedConnections {
    /// `has_journal`: what changes is noted for it.
    pub(super) fn new(timeout: Duration, has_journal: bool) -> Self {
        Self {
            timeout,
            by_client: HashMap::new(),
            clients: HashMap::new(),
            unjournaled: HashSet::new(),
            has_journal,
        }
    }

    /// Saves what a connection says of itself, unless another one has taken its client over.
    pub(super) fn update(&mut self, connection: SavedConnection) {
        let kept = self.by_client.get(&connection.client);
        if kept.is_none_or(|kept| kept.connection.owner == connection.owner) {
            self.save(connection, None);
        }
    }

    pub(super) fn save(&mut self, connection: SavedConnection, lost_at: Option<Timestamp>) {
        self.changed(connection.client);
        self.clients.insert(connection.token, connection.client);
        let token = connection.token;
        let former = self.by_client.insert(connection.client, Kept { connection, lost_at });
        if let Some(former) = former.filter(|former| former.connection.token != token) {
            self.remove_token(former.connection.token, former.connection.client);
        }
    }

    /// The connection is lost now, if it was `owner`'s.
    pub(super) fn release(&mut self, client: ClientId, owner: ConnectionKey, now: Timestamp) {
        if let Some(kept) = self.by_client.get_mut(&client).filter(|kept| kept.is_of(owner)) {
            kept.connection.owner = None;
            kept.lost_at = Some(now);
            self.changed(client);
        }
    }

    /// The connection is forgotten now, if it was `owner`'s.
    pub(super) fn forget(&mut self, client: ClientId, owner: ConnectionKey) {
        if self.by_client.get(&client).is_some_and(|kept| kept.is_of(owner)) {
            self.remove(client);
        }
    }

    pub(super) fn remove(&mut self, client: ClientId) -> Option<SavedConnection> {
        let kept = self.by_client.remove(&client)?;
        self.remove_token(kept.connection.token, client);
        if self.by_client.capacity() > SHRINK_CAPACITY_MIN
            && self.by_client.capacity() > 8 * self.by_client.len()
        {
            // What a rush needed is given back when it has left.
            self.by_client.shrink_to(2 * self.by_client.len());
            self.clients.shrink_to(2 * self.by_client.len());
        }
        self.changed(client);
        Some(kept.connection)
    }

    /// Forgets what a token stands for, unless it stands for another client by now: after a takeover, the successor's own
    /// token is the former connection's, and a journal tells of the two in any order.
    fn remove_token(&mut self, token: ResumeToken, client: ClientId) {
        if self.clients.get(&token) == Some(&client) {
            self.clients.remove(&token);
        }
    }

    /// See [`Engine::take_over`](super::Engine::take_over).
    pub(super) fn take_over(
        &mut self,
        token: &ResumeToken,
        successor: &SavedConnection,
        now: Timestamp,
    ) -> Option<SavedConnection> {
        let client = *self.clients.get(token)?;
        // A connection cannot take itself over.
        let kept = self.by_client.get(&client).filter(|kept| !self.is_over(kept, now));
        let is_theirs = kept.is_some_and(|kept| kept.connection.user == successor.user);
        if client == successor.client || !is_theirs {
            return None;
        }
        let former = self.remove(client)?;
        self.remove(successor.client);
        let SavedConnection { token, owner, .. } = *successor;
        self.save(SavedConnection { token, owner, ..former.clone() }, None);
        Some(former)
    }

    /// Forgets what nobody came back for in time.
    pub(super) fn forget_old(&mut self, now: Timestamp) {
        let over = self.by_client.iter().filter(|(_, kept)| self.is_over(kept, now));
        let over: Vec<_> = over.map(|(client, _)| *client).collect();
        for client in over {
            self.remove(client);
        }
    }

    /// Writes what the journal does not know yet, and takes it as known; who that was.
    pub(super) fn take_changes(&mut self, buffer: &mut Vec<u8>) -> HashSet<ClientId> {
        let changed = std::mem::take(&mut self.unjournaled);
        for client in &changed {
            match self.by_client.get(client) {
                Some(kept) => encode(&kept.entry(), buffer),
                None => encode(&Entry::Gone { client: client.as_u128() }, buffer),
            }
        }
        changed
    }

    /// It could not be written after all.
    pub(super) fn put_changes_back(&mut self, changed: HashSet<ClientId>) {
        self.unjournaled.extend(changed);
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'static>> {
        self.by_client.values().map(Kept::entry)
    }

    fn changed(&mut self, client: ClientId) {
        if self.has_journal {
            self.unjournaled.insert(client);
        }
    }

    fn is_over(&self, kept: &Kept, now: Timestamp) -> bool {
        let seconds = i64::try_from(self.timeout.as_secs()).unwrap_or(i64::MAX);
        kept.lost_at.is_some_and(|lost_at| now.seconds_since(lost_at) > seconds)
    }
}

impl Kept {
    fn is_of(&self, owner: ConnectionKey) -> bool {
        self.connection.owner == Some(owner)
    }

    fn entry(&self) -> Entry<'static> {
        let subscriptions = self.connection.subscriptions.iter();
        let subscriptions = subscriptions
            .map(|(stream, types)| (stream.to_string().into(), types.patterns().map(Into::into).collect()));
        Entry::OwnedConnection {
            client: self.connection.client.as_u128(),
            token: self.connection.token.to_bytes(),
            lost_at: self.lost_at.map(Timestamp::as_microsecond),
            user: self.connection.user.as_ref().map(|user| user.to_string().into()),
            subscriptions: subscriptions.collect(),
        }
    }
}
