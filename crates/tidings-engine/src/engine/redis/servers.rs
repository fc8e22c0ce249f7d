//! The primaries of a Redis: which one has what, connections to them, and calls that take a bounded time.
//!
//! Knows no stream. What a call says about keys is enough to find its primary, also while a Cluster moves slots.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::{
    Client, Cmd, ConnectionInfo, ErrorKind, RedisError, RedisResult, ServerErrorKind, ToRedisArgs, Value,
    aio::{AsyncPushSender, MultiplexedConnection, PubSub},
    cmd,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    address::{RedisAddress, connection_config},
    distrust::{Distrust, tls_error},
};

/// For an answer to one command.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// For a connection, Sentinel's answer and the handshakes included.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// For a call with all its attempts: who publishes gets an answer within 2 seconds.
const CALL_TIMEOUT: Duration = Duration::from_millis(1900);
/// Before a call that did not take effect is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The kind of an error of ours: nothing was sent, because there is no connection.
const NOT_CONNECTED: ErrorKind = ErrorKind::Client;
/// Hash slots of a Cluster.
const SLOTS: u16 = 16384;

/// Why a call gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// It had no effect, and will not have it: the password is wrong, or the user may not do it.
    #[error("{0}")]
    Refused(String),
    /// It had no effect, and will not have it: one side does not trust the other.
    #[error("{0}")]
    Distrusted(Distrust),
    /// It had no effect.
    #[error("{0}")]
    NoEffect(String),
    /// It may have had its effect: the answer did not come.
    #[error("{0}")]
    Unknown(String),
}

impl Fault {
    fn no_effect(error: &RedisError) -> Self {
        Distrust::behind(error).map_or_else(|| Self::NoEffect(error.to_string()), Self::Distrusted)
    }
}

impl From<RedisError> for Fault {
    fn from(error: RedisError) -> Self {
        let text = error.to_string();
        match error.kind() {
            NOT_CONNECTED if tls_error(&error).is_some() => Self::no_effect(&error),
            _ if is_refusal(&error) => Self::Refused(text),
            NOT_CONNECTED | ErrorKind::Server(_) => Self::NoEffect(text),
            _ => Self::Unknown(text),
        }
    }
}

/// An answer that cannot be read.
impl From<redis::ParsingError> for Fault {
    fn from(error: redis::ParsingError) -> Self {
        Self::Unknown(error.to_string())
    }
}

/// A Redis, however many servers it is made of.
#[derive(Debug)]
pub struct Servers {
    address: RedisAddress,
    topology: Mutex<Topology>,
    changed: watch::Sender<u64>,
    refreshing: tokio::sync::Mutex<()>,
}

/// Which primary has which slots.
#[derive(Debug, Default)]
struct Topology {
    primaries: Vec<Arc<Primary>>,
    /// Of each slot, the place in `primaries`; empty: there is one primary for all.
    slots: Vec<u16>,
}

/// One primary, and the connection for commands to it.
pub struct Primary {
    /// `None`: the address says who it is, each time anew.
    info: Option<ConnectionInfo>,
    name: String,
    address: RedisAddress,
    commands: tokio::sync::Mutex<Option<MultiplexedConnection>>,
    /// Where it was the last time that somebody connected; tells when that changes.
    found_at: watch::Sender<String>,
}

impl fmt::Debug for Primary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Servers {
    /// Finds out who the primaries are. Of a Cluster, some node that is named must answer.
    pub async fn find(address: RedisAddress) -> Result<Self, Fault> {
        let servers = Self::lazy(address);
        servers.refresh().await?;
        Ok(servers)
    }

    /// Asks nobody yet. Until a Cluster was asked, the first node that is named stands for all.
    pub fn lazy(address: RedisAddress) -> Self {
        let first = address.seeds().first();
        let primary = match first {
            Some(seed) => Primary::of_node(seed.clone(), &address),
            None => Primary::new(None, format!("{address:?}"), address.clone()),
        };
        Self {
            topology: Mutex::new(Topology { primaries: vec![primary], slots: Vec::new() }),
            changed: watch::Sender::new(0),
            refreshing: tokio::sync::Mutex::default(),
            address,
        }
    }

    /// Whether keys are in as many places as there are primaries.
    pub fn is_cluster(&self) -> bool {
        self.address.is_cluster()
    }

    /// All primaries; the first is the one at which everything is heard that belongs to no key.
    pub fn primaries(&self) -> Vec<Arc<Primary>> {
        self.topology.lock().primaries.clone()
    }

    /// The primary of everything that belongs to no key.
    pub fn anchor(&self) -> Arc<Primary> {
        Arc::clone(&self.topology.lock().primaries[0])
    }

    /// The primary that has a key.
    pub fn primary_of(&self, key: &str) -> Arc<Primary> {
        let topology = self.topology.lock();
        let place = topology.slots.get(usize::from(slot_of(key))).copied().unwrap_or(0);
        Arc::clone(&topology.primaries[usize::from(place)])
    }

    /// Whether a channel can be published on the primary alone that has its slot.
    pub(super) async fn has_sharded_pubsub(&self) -> Result<bool, Fault> {
        let mut ask = cmd("COMMAND");
        ask.arg("INFO").arg("SPUBLISH");
        let answer = self.anchor().send(&ask).await?;
        Ok(matches!(answer, Value::Array(commands) if !matches!(commands.first(), None | Some(Value::Nil))))
    }

    /// Tells when who has what has changed.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Asks the Cluster anew who has what.
    pub async fn refresh(&self) -> Result<(), Fault> {
        if !self.address.is_cluster() {
            return Ok(());
        }
        // One asks for all.
        let Ok(_alone) = self.refreshing.try_lock() else { return Ok(()) };
        let mut failed = Fault::NoEffect("no node of the Cluster answers".to_owned());
        let known = self.primaries();
        let seeds = self.address.seeds().iter().cloned().map(|info| Primary::of_node(info, &self.address));
        for primary in known.iter().cloned().chain(seeds) {
            match primary.send(cmd("CLUSTER").arg("SLOTS")).await {
                Ok(slots) => match self.topology_of(&slots, &known) {
                    Some(topology) => {
                        self.replace(topology);
                        return Ok(());
                    }
                    None => failed = Fault::NoEffect("the Cluster's slots cannot be read".to_owned()),
                },
                Err(error) => failed = Fault::no_effect(&error),
            }
        }
        Err(failed)
    }

    fn replace(&self, new: Topology) {
        let mut topology = self.topology.lock();
        let names = |topology: &Topology| -> Vec<String> {
            topology.primaries.iter().map(|primary| primary.name.clone()).collect()
        };
        if topology.slots != new.slots || names(&topology) != names(&new) {
            *topology = new;
            drop(topology);
            self.changed.send_modify(|version| *version += 1);
        }
    }

    /// Reads the answer to `CLUSTER SLOTS`: ranges, each with its primary first.
    fn topology_of(&self, slots: &Value, known: &[Arc<Primary>]) -> Option<Topology> {
        let ranges: Vec<(u16, u16, Value)> = redis::from_redis_value_ref::<Vec<Vec<Value>>>(slots)
            .ok()?
            .into_iter()
            .filter_map(|mut range| {
                let primary = (range.len() > 2).then(|| range.swap_remove(2))?;
                let end = redis::from_redis_value_ref(&range[1]).ok()?;
                Some((redis::from_redis_value_ref(&range[0]).ok()?, end, primary))
            })
            .collect();
        let mut topology = Topology { primaries: Vec::new(), slots: vec![0; usize::from(SLOTS)] };
        let mut addresses: Vec<(u16, u16, String, u16)> = Vec::new();
        for (start, end, primary) in ranges {
            let Value::Array(parts) = primary else { return None };
            let host =
                redis::from_redis_value_ref::<Option<String>>(parts.first()?).ok()?.unwrap_or_default();
            addresses.push((start, end, host, redis::from_redis_value_ref(parts.get(1)?).ok()?));
        }
        // In one order everywhere, so that all nodes take the same one as their anchor.
        addresses.sort();
        for (start, end, host, port) in addresses {
            let info = self.address.node(&host, port)?;
            let name = info.addr().to_string();
            let known_place = topology.primaries.iter().position(|primary| primary.name == name);
            let place = known_place.unwrap_or_else(|| {
                let former = known.iter().find(|primary| primary.name == name);
                let primary = former.map_or_else(|| Primary::of_node(info, &self.address), Arc::clone);
                topology.primaries.push(primary);
                topology.primaries.len() - 1
            });
            let place = u16::try_from(place).ok()?;
            topology.slots.get_mut(usize::from(start)..=usize::from(end))?.fill(place);
        }
        (!topology.primaries.is_empty()).then_some(topology)
    }

    /// Makes a call at the primary that has its key, and follows it where the Cluster moves it. What is known to have had no
    /// effect is tried again, for a while.
    pub async fn call(&self, call: &Call<'_>) -> Result<Value, Fault> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let (mut asked, mut command) = (None, &call.command);
        loop {
            let (primary, asking) = match asked.take() {
                Some(primary) => (primary, true),
                None => (self.primary_of(call.key), false),
            };
            let late = || {
                Err(Attempt::Failed { fault: Fault::Unknown("no answer in time".into()), for_good: false })
            };
            let attempt = timeout_at(deadline, self.attempt(&primary, command, asking)).await;
            let failed = match attempt.unwrap_or_else(|_| late()) {
                Ok(value) => return Ok(value),
                Err(Attempt::Ask(primary)) => {
                    asked = Some(primary);
                    continue;
                }
                Err(Attempt::NoScript(_))
                    if let Some(whole) = &call.whole_script
                        && !std::ptr::eq(whole, command) =>
                {
                    command = whole;
                    continue;
                }
                Err(Attempt::NoScript(fault) | Attempt::Failed { fault, for_good: true }) => {
                    return Err(fault);
                }
                Err(Attempt::Failed { fault: Fault::Unknown(reason), .. }) if !call.may_repeat => {
                    return Err(Fault::Unknown(reason));
                }
                Err(Attempt::Failed { fault, .. }) => fault,
            };
            if Instant::now() + RETRY_PAUSE >= deadline {
                return Err(failed);
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn attempt(&self, primary: &Arc<Primary>, command: &Cmd, asking: bool) -> Result<Value, Attempt> {
        let answer = if asking { primary.ask(command).await } else { primary.send(command).await };
        let error = match answer {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if is_refusal(&error) {
            return Err(Attempt::Failed { fault: Fault::Refused(error.to_string()), for_good: true });
        }
        let fault = Fault::no_effect(&error);
        let ErrorKind::Server(kind) = error.kind() else {
            // What cannot be found out now is found out by the next attempt.
            let _ = self.refresh().await;
            let was_sent = error.kind() != NOT_CONNECTED;
            let fault = if was_sent { Fault::Unknown(error.to_string()) } else { fault };
            return Err(Attempt::Failed { fault, for_good: error.kind() == ErrorKind::Extension });
        };
        let for_good = match kind {
            ServerErrorKind::NoScript => return Err(Attempt::NoScript(fault)),
            ServerErrorKind::Ask => match error.redirect_node().and_then(|(address, _)| self.node(address)) {
                Some(node) => return Err(Attempt::Ask(node)),
                None => false,
            },
            ServerErrorKind::Moved | ServerErrorKind::ClusterDown => {
                let _ = self.refresh().await;
                false
            }
            ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown => {
                // It was the primary once.
                primary.disconnect().await;
                let _ = self.refresh().await;
                false
            }
            ServerErrorKind::TryAgain | ServerErrorKind::BusyLoading => false,
            _ => true,
        };
        Err(Attempt::Failed { fault, for_good })
    }

    fn node(&self, address: &str) -> Option<Arc<Primary>> {
        let (host, port) = address.rsplit_once(':')?;
        let info = self.address.node(host, port.parse().ok()?)?;
        let name = info.addr().to_string();
        let known = self.primaries().into_iter().find(|primary| primary.name == name);
        Some(known.unwrap_or_else(|| Primary::of_node(info, &self.address)))
    }
}

/// A command about a key.
pub struct Call<'a> {
    key: &'a str,
    command: Cmd,
    /// What `command` names by its digest.
    whole_script: Option<Cmd>,
    /// Whether it does no harm if it takes effect twice.
    may_repeat: bool,
}

impl<'a> Call<'a> {
    /// A command that does no harm if it takes effect twice.
    pub fn repeatable(key: &'a str, command: Cmd) -> Self {
        Self { key, command, whole_script: None, may_repeat: true }
    }

    /// A command that must not take effect twice.
    pub fn once(key: &'a str, command: Cmd) -> Self {
        Self { may_repeat: false, ..Self::repeatable(key, command) }
    }

    /// Deletes the key if it has this value, and leaves alone what somebody else has put there.
    pub(super) fn delete_if(key: &'a str, value: &str) -> Self {
        let mut delete = cmd("EVAL");
        delete.arg("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1");
        delete.arg(1).arg(key).arg(value);
        Self::repeatable(key, delete)
    }

    /// A script on the key.
    pub fn script(key: &'a str, script: &Script, arguments: &[impl ToRedisArgs], may_repeat: bool) -> Self {
        let command = |name: &str, script: &str| {
            let mut command = cmd(name);
            command.arg(script).arg(1).arg(key).arg(arguments);
            command
        };
        Self {
            key,
            command: command("EVALSHA", &script.digest),
            whole_script: Some(command("EVAL", script.text)),
            may_repeat,
        }
    }
}

/// A Lua script with its digest, by which Redis knows it.
#[derive(Debug)]
pub struct Script {
    text: &'static str,
    digest: String,
}

impl Script {
    /// Names a script.
    pub fn new(text: &'static str) -> Self {
        Self { text, digest: redis::Script::new(text).get_hash().to_owned() }
    }
}

/// How one attempt failed.
enum Attempt {
    /// The key is on its way to this node.
    Ask(Arc<Primary>),
    NoScript(Fault),
    Failed {
        fault: Fault,
        for_good: bool,
    },
}

impl Primary {
    fn new(info: Option<ConnectionInfo>, name: String, address: RedisAddress) -> Arc<Self> {
        let (commands, found_at) = (tokio::sync::Mutex::default(), watch::Sender::default());
        Arc::new(Self { info, name, address, commands, found_at })
    }

    fn of_node(info: ConnectionInfo, address: &RedisAddress) -> Arc<Self> {
        let name = info.addr().to_string();
        Self::new(Some(info), name, address.clone())
    }

    /// Its address, for logs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells when it is found elsewhere than before: whoever has a connection to it has one to the former primary.
    pub fn watch(&self) -> watch::Receiver<String> {
        self.found_at.subscribe()
    }

    async fn client(&self) -> RedisResult<Client> {
        let (client, has_moved) = self.find().await?;
        if has_moved {
            // What is sent from now on goes there.
            self.disconnect().await;
        }
        Ok(client)
    }

    /// Finds out where it is, and whether that is elsewhere than before.
    async fn find(&self) -> RedisResult<(Client, bool)> {
        let client = match &self.info {
            Some(info) => Client::open(info.clone())?,
            None => self.address.client().await?,
        };
        let place = client.get_connection_info().addr().to_string();
        let has_moved = self.found_at.send_if_modified(|found_at| {
            // The first time it is nowhere else than before.
            let has_moved = !found_at.is_empty() && *found_at != place;
            place.clone_into(found_at);
            has_moved
        });
        Ok((client, has_moved))
    }

    /// A connection of its own, on which what is subscribed to arrives at `pushes`.
    pub async fn connect(&self, pushes: impl AsyncPushSender) -> RedisResult<MultiplexedConnection> {
        let config = connection_config(ANSWER_TIMEOUT).set_push_sender(pushes);
        bounded(Box::pin(async {
            self.client().await?.get_multiplexed_async_connection_with_config(&config).await
        }))
        .await
    }

    /// A connection to listen on channels, and which run of which server it is to: those who have the same hear everything in the
    /// same order.
    pub async fn listen(&self) -> RedisResult<(PubSub, String)> {
        bounded(Box::pin(async {
            let client = self.client().await?;
            let config = connection_config(ANSWER_TIMEOUT);
            let mut asking = client.get_multiplexed_async_connection_with_config(&config).await?;
            let info: String = cmd("INFO").arg("server").query_async(&mut asking).await?;
            let run = info.lines().find_map(|line| line.strip_prefix("run_id:")).unwrap_or_default();
            Ok((client.get_async_pubsub().await?, run.trim().to_owned()))
        }))
        .await
    }

    /// A connection to listen on channels that needs no right but that.
    pub async fn subscribe(&self) -> RedisResult<PubSub> {
        bounded(Box::pin(async { self.client().await?.get_async_pubsub().await })).await
    }

    /// Sends a command on the connection that all commands share.
    pub async fn send(&self, command: &Cmd) -> RedisResult<Value> {
        let mut connection = self.commands().await?;
        let answer = command.query_async(&mut connection).await;
        self.check(answer).await
    }

    /// Publishes a probe on a channel, unless this is no primary any more: a replica would let it be heard, and nothing else.
    /// Sentinel is asked, too: a former primary hears of its successor only after seconds, in which it would take what is lost
    /// then.
    pub async fn probe(&self, channel: &str, number: u64) -> RedisResult<()> {
        if self.address.is_sentinel() {
            bounded(Box::pin(self.client())).await?;
        }
        let role = self.send(&cmd("ROLE")).await?;
        let is_primary = matches!(&role, Value::Array(parts) if parts.first().is_some_and(|role| {
            redis::from_redis_value_ref::<String>(role).is_ok_and(|role| role == "master")
        }));
        if !is_primary {
            // The next command finds out who is.
            self.disconnect().await;
            return Err(RedisError::from((NOT_CONNECTED, "it is no primary any more")));
        }
        let mut publish = cmd("PUBLISH");
        publish.arg(channel).arg(number);
        self.send(&publish).await.map(|_| ())
    }

    /// How many connections to this server listen on a channel.
    pub async fn listeners(&self, channel: &str) -> RedisResult<u64> {
        let mut ask = cmd("PUBSUB");
        ask.arg("NUMSUB").arg(channel);
        // A map in one version of the protocol, a list in the other.
        let listeners = match self.send(&ask).await? {
            Value::Map(pairs) => pairs.into_iter().next().map(|(_, count)| count),
            Value::Array(mut pairs) => pairs.pop(),
            _ => None,
        };
        Ok(listeners.and_then(|count| redis::from_redis_value(count).ok()).unwrap_or(0))
    }

    /// Sends a command about a key that is just being moved here.
    async fn ask(&self, command: &Cmd) -> RedisResult<Value> {
        let mut connection = self.commands().await?;
        let mut pipeline = redis::pipe();
        pipeline.add_command(cmd("ASKING")).ignore().add_command(command.clone());
        let answer = pipeline.query_async::<(Value,)>(&mut connection).await.map(|(value,)| value);
        self.check(answer).await
    }

    async fn check<T>(&self, answer: RedisResult<T>) -> RedisResult<T> {
        if let Err(error) = &answer
            && (error.is_unrecoverable_error() || error.is_timeout())
        {
            self.disconnect().await;
        }
        answer
    }

    async fn commands(&self) -> RedisResult<MultiplexedConnection> {
        let mut commands = self.commands.lock().await;
        if let Some(connection) = &*commands {
            return Ok(connection.clone());
        }
        let config = connection_config(ANSWER_TIMEOUT);
        let connection = bounded(Box::pin(async {
            self.find().await?.0.get_multiplexed_async_connection_with_config(&config).await
        }))
        .await
        .map_err(|error| {
            if tls_error(&error).is_some() {
                return error;
            }
            let kind = if is_refusal(&error) { error.kind() } else { NOT_CONNECTED };
            RedisError::from((kind, "cannot connect", error.to_string()))
        })?;
        Ok(commands.insert(connection).clone())
    }

    /// Lets the next command connect anew.
    pub async fn disconnect(&self) {
        self.commands.lock().await.take();
    }
}

/// Boxed by whoever calls: making a connection takes a large future, and hardly ever happens.
async fn bounded<T>(connecting: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let late = || RedisError::from((NOT_CONNECTED, "no answer in time"));
    let connected = timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| Err(late()));
    connected.map_err(|error| match tls_error(&error) {
        // Nothing was sent: its kind is `NOT_CONNECTED`.
        Some(error) => error.clone().into(),
        None => error,
    })
}

fn is_refusal(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::AuthenticationFailed | ErrorKind::Server(ServerErrorKind::NoPerm))
        || matches!(error.code(), Some("NOAUTH" | "WRONGPASS"))
}

/// The slot that a Cluster keeps a key in: by what stands between the first `{` and the next `}`, if anything does.
/// See the Redis Cluster specification, "Hash tags".
fn slot_of(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        // `CLUSTER KEYSLOT` says so.
        for (key, slot) in
            [("somekey", 11058), ("foo{hash_tag}", 2515), ("{hash_tag}.bar", 2515), ("foo{}{bar}", 8363)]
        {
            assert_eq!(slot_of(key), slot, "{key}");
        }
    }
}
