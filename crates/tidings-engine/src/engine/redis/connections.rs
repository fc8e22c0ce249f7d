//! Saved connections: `ws:connection:{client_id}` as the contract has it, and `tidings:resume:{digest}`, which leads from a resume
//! token to its client.
//!
//! What changes is written in batches, in the order in which it changed for each client. What lives is written again well before
//! its time is over, which also brings it back after Redis has lost it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use redis::cmd;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tidings_protocol::{StreamId, TypeFilter, UserId};
use tokio::{
    sync::{Notify, oneshot},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    engine::EngineError,
    saved::{ClientId, ResumeToken, SavedConnection},
    shard::ConnectionKey,
};

use super::{
    Shared,
    names::{RENEW_INTERVAL, millis, owner_text, parse_owner},
    servers::{Call, Fault},
};

/// Changes that are written at once.
const BATCH_MAX: usize = 512;
/// Changes that may wait for Redis; beyond them the oldest are given up, and their clients subscribe with `since`.
const WAITING_MAX: usize = 200_000;
/// Before changes are written again that could not be written.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// For an answer to who resumes.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(3);
/// For the last changes when the node ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// What is known and what has to be written.
#[derive(Default)]
pub(super) struct Connections {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// The connections of this node.
    living: HashMap<ClientId, SavedConnection>,
    changes: VecDeque<Change>,
    /// Whose saving waits in `changes`.
    unsaved: HashSet<ClientId>,
}

enum Change {
    Save(ClientId),
    Release(SavedConnection),
    Forget(SavedConnection),
    TakeOver(TakeOver),
}

struct TakeOver {
    token: ResumeToken,
    successor: SavedConnection,
    reply: oneshot::Sender<Result<Option<SavedConnection>, Fault>>,
}

/// A saved connection as it stands in Redis. The owner comes first: the script looks for it there.
#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    /// Empty: it was lost.
    pub(super) owner: String,
    pub(super) node: String,
    client_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user_id: Option<UserId>,
    connected_at: String,
    subscriptions: Vec<String>,
    /// Patterns of those subscriptions that have a filter.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    filters: BTreeMap<String, Vec<String>>,
}

impl Connections {
    pub(super) fn save(&self, connection: SavedConnection) {
        let mut state = self.state.lock();
        let client = connection.client;
        state.living.insert(client, connection);
        if state.unsaved.insert(client) {
            self.push(&mut state, Change::Save(client));
        }
    }

    pub(super) fn release(&self, client: ClientId, owner: ConnectionKey) {
        self.end(client, owner, Change::Release);
    }

    pub(super) fn forget(&self, client: ClientId, owner: ConnectionKey) {
        self.end(client, owner, Change::Forget);
    }

    fn end(&self, client: ClientId, owner: ConnectionKey, change: impl FnOnce(SavedConnection) -> Change) {
        let mut state = self.state.lock();
        if state.living.get(&client).is_some_and(|living| living.owner == Some(owner))
            && let Some(connection) = state.living.remove(&client)
        {
            self.push(&mut state, change(connection));
        }
    }

    pub(super) async fn take_over(
        &self,
        token: ResumeToken,
        successor: SavedConnection,
    ) -> Result<Option<SavedConnection>, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.push(&mut self.state.lock(), Change::TakeOver(TakeOver { token, successor, reply }));
        match timeout(TAKE_OVER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) | Err(_) => Err(EngineError::Unavailable("Redis does not answer".to_owned())),
        }
    }

    fn push(&self, state: &mut State, change: Change) {
        if state.changes.len() >= WAITING_MAX
            && let Some(Change::Save(client)) = state.changes.pop_front()
        {
            state.unsaved.remove(&client);
        }
        state.changes.push_back(change);
        self.changed.notify_one();
    }

    /// The connection goes on as a former one.
    fn succeed(&self, own: ClientId, goes_on: SavedConnection) {
        let mut state = self.state.lock();
        state.living.remove(&own);
        state.living.insert(goes_on.client, goes_on);
    }

    /// These could not be written, and come first.
    fn put_back(&self, changes: Vec<Change>) {
        let mut state = self.state.lock();
        for change in changes.into_iter().rev() {
            state.changes.push_front(change);
        }
    }

    /// Has everything that lives written again.
    fn renew(&self) {
        let mut state = self.state.lock();
        let clients: Vec<_> = state.living.keys().copied().collect();
        for client in clients {
            if state.unsaved.insert(client) {
                self.push(&mut state, Change::Save(client));
            }
        }
    }
}

/// Writes what changes for as long as the node lives.
pub(super) async fn keep(shared: Arc<Shared>) {
    let renew_interval =
        (shared.options.connection_timeout / 10).clamp(Duration::from_secs(1), Duration::from_mins(1));
    let mut renew = interval(renew_interval);
    let mut name = interval(RENEW_INTERVAL);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    name.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shared.connections.changed.notified() => {}
            _ = renew.tick() => shared.connections.renew(),
            _ = name.tick() => {
                // It is tried again soon; until then the name is kept by its time.
                let _ = shared.options.name.renew(&shared.servers, &shared.options.incarnation).await;
            }
        }
        while shared.write_changes().await {}
    }
}

impl Shared {
    /// Writes the last changes and gives the node's name back.
    pub(super) async fn end_connections(&self) {
        let ending = async {
            while self.write_changes().await {}
            let _ = self.options.name.give_back(&self.servers, &self.options.incarnation).await;
        };
        if timeout(FLUSH_TIMEOUT, ending).await.is_err() {
            tracing::warn!("Redis does not answer; the last changes of connections are not saved");
        }
    }

    /// Writes a batch of changes; whether there was any.
    async fn write_changes(&self) -> bool {
        let batch: Vec<_> = {
            let mut state = self.connections.state.lock();
            let count = state.changes.len().min(BATCH_MAX);
            state.changes.drain(..count).collect()
        };
        if batch.is_empty() {
            return false;
        }
        let (mut chains, mut take_overs) = (BTreeMap::<u128, Vec<Change>>::new(), Vec::new());
        for change in batch {
            let client = match &change {
                Change::TakeOver(_) => None,
                Change::Save(client) => Some(*client),
                Change::Release(connection) | Change::Forget(connection) => Some(connection.client),
            };
            match (client, change) {
                (None, Change::TakeOver(take_over)) => take_overs.push(take_over),
                (Some(client), change) => chains.entry(client.as_u128()).or_default().push(change),
                (None, _) => unreachable!("only a takeover has no client of its own"),
            }
        }
        // What connections said of themselves first, so that whoever takes one over gets all of it.
        let failed: Vec<_> = join_all(chains.into_values().map(|chain| self.write_chain(chain))).await;
        join_all(take_overs.into_iter().map(|take_over| self.take_over(take_over))).await;
        let failed: Vec<_> = failed.into_iter().flatten().collect();
        if !failed.is_empty() {
            self.connections.put_back(failed);
            sleep(RETRY_PAUSE).await;
        }
        true
    }

    /// Writes the changes of one client in their order; returns those that could not be written.
    async fn write_chain(&self, chain: Vec<Change>) -> Vec<Change> {
        let mut changes = chain.into_iter();
        while let Some(change) = changes.next() {
            let written = match &change {
                Change::Save(client) => self.write_saved(*client).await,
                Change::Release(connection) => self.write(connection, "").await.map(|_| ()),
                Change::Forget(connection) => self.remove(connection).await,
                Change::TakeOver(_) => Ok(()),
            };
            if let Err(fault) = written {
                tracing::debug!(%fault, "a connection cannot be saved");
                if let Change::Save(client) = &change {
                    self.connections.state.lock().unsaved.insert(*client);
                }
                return std::iter::once(change).chain(changes).collect();
            }
        }
        Vec::new()
    }

    async fn write_saved(&self, client: ClientId) -> Result<(), Fault> {
        let connection = {
            let mut state = self.connections.state.lock();
            state.unsaved.remove(&client);
            state.living.get(&client).cloned()
        };
        // Released meanwhile: that says it all.
        let Some(connection) = connection else { return Ok(()) };
        let Some(key) = connection.owner else { return Ok(()) };
        let owner = owner_text(&self.options.incarnation, key);
        if self.write(&connection, &owner).await? {
            return Ok(());
        }
        // Somebody has taken it over, and we were not told.
        self.lose(key);
        Ok(())
    }

    /// Writes a connection as `owner`'s, if it is this node's to write; whether it was.
    async fn write(&self, connection: &SavedConnection, owner: &str) -> Result<bool, Fault> {
        let asker =
            connection.owner.map(|key| owner_text(&self.options.incarnation, key)).unwrap_or_default();
        let stored = stored(connection, owner, self.options.name.name());
        let time = millis(self.options.connection_timeout).to_string();
        let key = key_of(connection.client);
        let arguments = ["save", &asker, &stored, &time];
        let answer =
            self.servers.call(&Call::script(&key, &self.scripts.connection, &arguments, true)).await?;
        if matches!(answer, redis::Value::Nil) {
            return Ok(false);
        }
        self.point(connection).await?;
        Ok(true)
    }

    async fn remove(&self, connection: &SavedConnection) -> Result<(), Fault> {
        let asker =
            connection.owner.map(|key| owner_text(&self.options.incarnation, key)).unwrap_or_default();
        let key = key_of(connection.client);
        let arguments = ["forget", &asker];
        let answer =
            self.servers.call(&Call::script(&key, &self.scripts.connection, &arguments, true)).await?;
        if matches!(answer, redis::Value::Nil) {
            return Ok(());
        }
        let (key, mut delete) = (token_key(connection.token), cmd("DEL"));
        delete.arg(&key);
        self.servers.call(&Call::repeatable(&key, delete)).await.map(|_| ())
    }

    /// Lets a connection's token lead to its client.
    async fn point(&self, connection: &SavedConnection) -> Result<(), Fault> {
        let (key, mut set) = (token_key(connection.token), cmd("SET"));
        let value = format!("{}{}", connection.client, user_text(connection));
        set.arg(&key).arg(value).arg("PX").arg(millis(self.options.connection_timeout));
        self.servers.call(&Call::repeatable(&key, set)).await.map(|_| ())
    }

    async fn take_over(&self, take_over: TakeOver) {
        let TakeOver { token, successor, reply } = take_over;
        let former = self.try_take_over(token, &successor).await;
        // Who does not wait any more has lost the token; it subscribes with `since`.
        let _ = reply.send(former);
    }

    /// See [`Engine::take_over`](crate::engine::Engine::take_over). The token is spent first: of two that come with it, one
    /// gets it.
    async fn try_take_over(
        &self,
        token: ResumeToken,
        successor: &SavedConnection,
    ) -> Result<Option<SavedConnection>, Fault> {
        if token == successor.token {
            // A connection cannot take itself over.
            return Ok(None);
        }
        let (key, user) = (token_key(token), user_text(successor));
        let client = self.servers.call(&Call::script(&key, &self.scripts.spend, &[user], false)).await?;
        let client = redis::from_redis_value::<Option<String>>(client).ok().flatten();
        let Some(client) = client.as_deref().and_then(ClientId::parse) else { return Ok(None) };
        let owner = successor.owner.map(|key| owner_text(&self.options.incarnation, key)).unwrap_or_default();
        let head = head(&owner, self.options.name.name());
        let (key, time) = (key_of(client), millis(self.options.connection_timeout).to_string());
        let arguments = ["take", &owner, &head, &time];
        let known =
            self.servers.call(&Call::script(&key, &self.scripts.connection, &arguments, true)).await?;
        let known = redis::from_redis_value::<Option<String>>(known).ok().flatten();
        let Some(known) = known.and_then(|known| serde_json::from_str::<Stored>(&known).ok()) else {
            return Ok(None);
        };
        let former_owner = parse_owner(&known.owner);
        let former = SavedConnection {
            client,
            token,
            owner: former_owner
                .as_ref()
                .filter(|(incarnation, _)| *incarnation == self.options.incarnation)
                .map(|(_, key)| *key),
            user: successor.user.clone(),
            subscriptions: subscriptions(&known),
        };
        let SavedConnection { token, owner, .. } = *successor;
        let goes_on = SavedConnection { token, owner, ..former.clone() };
        self.point(&goes_on).await?;
        let (own_key, mut delete) = (key_of(successor.client), cmd("DEL"));
        delete.arg(&own_key);
        self.servers.call(&Call::repeatable(&own_key, delete)).await?;
        self.connections.succeed(successor.client, goes_on);
        if let Some((incarnation, key)) = former_owner.filter(|_| former.owner.is_none()) {
            self.tell_taken_over(&incarnation.channel(), key).await;
        }
        Ok(Some(former))
    }

    /// Tells another node that a connection of its was taken over. If that is lost, it finds out when it saves next.
    async fn tell_taken_over(&self, channel: &str, key: ConnectionKey) {
        let mut publish = cmd("PUBLISH");
        publish.arg(channel).arg(format!("taken_over {key}"));
        if let Err(error) = self.servers.anchor().send(&publish).await {
            tracing::debug!(%error, "another node could not be told of a takeover");
        }
    }
}

impl Shared {
    /// A connection of this node belongs to another one now.
    fn lose(&self, key: ConnectionKey) {
        self.connections.state.lock().living.retain(|_, living| living.owner != Some(key));
        if let Some(deliver) = self.deliver.upgrade() {
            deliver.taken_over(key);
        }
    }
}

/// Takes what another node said to this one.
pub(super) fn hear(shared: &Shared, message: &[u8]) {
    let taken_over = std::str::from_utf8(message).ok().and_then(|text| text.strip_prefix("taken_over "));
    if let Some(key) = taken_over.and_then(|key| key.parse().ok()) {
        shared.lose(key);
    }
}

fn key_of(client: ClientId) -> String {
    format!("ws:connection:{client}")
}

/// Who can read Redis must not be able to take connections over.
fn token_key(token: ResumeToken) -> String {
    let digest = Sha256::digest(token.to_bytes());
    let digest = digest.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    format!("tidings:resume:{digest}")
}

/// Whose a connection is; empty where nobody is asked.
fn user_text(connection: &SavedConnection) -> &str {
    connection.user.as_ref().map_or("", UserId::as_str)
}

fn stored(connection: &SavedConnection, owner: &str, node: &str) -> String {
    let with_filter =
        connection.subscriptions.iter().filter(|(_, types)| **types != TypeFilter::everything());
    let stored = Stored {
        owner: owner.to_owned(),
        node: node.to_owned(),
        client_id: connection.client.to_string(),
        user_id: connection.user.clone(),
        connected_at: connection.client.named_at().to_string(),
        subscriptions: connection.subscriptions.iter().map(|(stream, _)| stream.to_string()).collect(),
        filters: with_filter
            .map(|(stream, types)| (stream.to_string(), types.patterns().collect()))
            .collect(),
    };
    serde_json::to_string(&stored).expect("strings and lists can be written")
}

/// The beginning of a stored connection, up to what stays when it changes hands.
fn head(owner: &str, node: &str) -> String {
    format!("{{\"owner\":{},\"node\":{}", serde_json::Value::from(owner), serde_json::Value::from(node))
}

fn subscriptions(stored: &Stored) -> Vec<(StreamId, Arc<TypeFilter>)> {
    let types = |project: &String| match stored.filters.get(project) {
        Some(patterns) => TypeFilter::parse(patterns).ok(),
        None => Some(TypeFilter::everything()),
    };
    let read =
        |project: &String| Some((StreamId::try_from(project.as_str()).ok()?, Arc::new(types(project)?)));
    stored.subscriptions.iter().filter_map(read).collect()
}
