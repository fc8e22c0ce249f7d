//! Nodes by name: who is there, who was there before, and how one node reaches another.

use std::{fmt, sync::Arc, time::Duration};

use redis::{aio::MultiplexedConnection, cmd};

use crate::{random, shard::ConnectionKey};

use super::servers::{Call, Fault, Servers};

/// A name is given up when its node has not renewed it for this long.
const NAME_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a node renews its name.
pub(super) const RENEW_INTERVAL: Duration = Duration::from_secs(2);
/// Other names that are tried when one is taken.
const RENAMES_MAX: u32 = 100;

/// One run of one node: no other has the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(Arc<str>);

impl Incarnation {
    /// A new one.
    pub fn random() -> Self {
        Self(random::hex::<8>().into())
    }

    /// As it stands in keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The channel that this node alone listens to.
    pub(super) fn channel(&self) -> String {
        format!("tidings:node:{self}")
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name that a node has got. Whoever wants the same one sees by the subscription that it lives.
pub struct NodeName {
    name: String,
    former: Option<Incarnation>,
    /// Subscribed to the run's channel from before it has the name.
    _sign_of_life: MultiplexedConnection,
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeName")
            .field("name", &self.name)
            .field("former", &self.former)
            .finish_non_exhaustive()
    }
}

impl NodeName {
    /// Takes `wanted`, or, if a node that lives has it, the first free one of `wanted-2`, `wanted-3` …
    pub async fn take(servers: &Servers, wanted: &str, incarnation: &Incarnation) -> Result<Self, Fault> {
        let sign_of_life = show_life(servers, incarnation).await?;
        for number in 1..=RENAMES_MAX {
            let name = if number == 1 { wanted.to_owned() } else { format!("{wanted}-{number}") };
            match try_take(servers, &name, incarnation).await? {
                Taking::Free => return Ok(Self { name, former: None, _sign_of_life: sign_of_life }),
                Taking::From(former) => {
                    return Ok(Self { name, former: Some(former), _sign_of_life: sign_of_life });
                }
                Taking::Taken => {}
            }
        }
        // Nobody has so many nodes of one name, but a name that is not unique is worse than an ugly one.
        Ok(Self { name: format!("{wanted}-{incarnation}"), former: None, _sign_of_life: sign_of_life })
    }

    /// The wanted name, or that with a number behind it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The run that had the name before and ended without giving it back, if that is known.
    pub fn former(&self) -> Option<&Incarnation> {
        self.former.as_ref()
    }

    /// Keeps the name, or takes it back if Redis has lost it.
    pub(super) async fn renew(&self, servers: &Servers, incarnation: &Incarnation) -> Result<(), Fault> {
        let key = key_of(&self.name);
        let mut renew = cmd("EVAL");
        renew.arg("local holder = redis.call('GET', KEYS[1]) if holder and holder ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1");
        renew.arg(1).arg(&key).arg(incarnation.as_str()).arg(millis(NAME_TIMEOUT));
        servers.call(&Call::repeatable(&key, renew)).await.map(|_| ())
    }

    /// Gives the name back, so that whoever comes next has it at once.
    pub(super) async fn give_back(&self, servers: &Servers, incarnation: &Incarnation) -> Result<(), Fault> {
        let key = key_of(&self.name);
        servers.call(&Call::delete_if(&key, incarnation.as_str())).await.map(|_| ())
    }
}

enum Taking {
    Free,
    From(Incarnation),
    Taken,
}

async fn show_life(
    servers: &Servers,
    incarnation: &Incarnation,
) -> redis::RedisResult<MultiplexedConnection> {
    let mut connection = servers.anchor().connect(|_| Ok::<_, ()>(())).await?;
    let mut subscribe = cmd("SUBSCRIBE");
    subscribe.arg(incarnation.channel());
    subscribe.exec_async(&mut connection).await?;
    Ok(connection)
}

async fn try_take(servers: &Servers, name: &str, incarnation: &Incarnation) -> Result<Taking, Fault> {
    let key = key_of(name);
    let mut take = cmd("SET");
    take.arg(&key).arg(incarnation.as_str()).arg("NX").arg("PX").arg(millis(NAME_TIMEOUT));
    let answer = servers.call(&Call::repeatable(&key, take)).await?;
    if matches!(answer, redis::Value::Okay) {
        return Ok(Taking::Free);
    }
    let mut ask = cmd("GET");
    ask.arg(&key);
    let holder = servers.call(&Call::repeatable(&key, ask)).await?;
    let holder: String = redis::from_redis_value(holder).unwrap_or_default();
    if holder == incarnation.as_str() {
        // Our own, by an attempt whose answer was lost.
        return Ok(Taking::Free);
    }
    let former = Incarnation(holder.into());
    if is_alive(servers, &former).await? {
        return Ok(Taking::Taken);
    }
    // It is gone without having given its name back. Of two that see this at once, one gets it.
    let mut swap = cmd("EVAL");
    swap.arg("if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1");
    swap.arg(1).arg(&key).arg(former.as_str()).arg(incarnation.as_str()).arg(millis(NAME_TIMEOUT));
    let swapped = servers.call(&Call::repeatable(&key, swap)).await?;
    let has_name = redis::from_redis_value::<bool>(swapped).unwrap_or(false);
    Ok(if has_name { Taking::From(former) } else { Taking::Taken })
}

/// Whether a node's run still listens: Redis notices at once when its process has ended.
async fn is_alive(servers: &Servers, incarnation: &Incarnation) -> Result<bool, Fault> {
    Ok(servers.anchor().listeners(&incarnation.channel()).await? > 0)
}

fn key_of(name: &str) -> String {
    format!("tidings:name:{name}")
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A connection as its node names it to others.
pub(super) fn owner_text(incarnation: &Incarnation, key: ConnectionKey) -> String {
    format!("{incarnation}/{key}")
}

/// The node and the connection of an owner.
pub(super) fn parse_owner(owner: &str) -> Option<(Incarnation, ConnectionKey)> {
    let (incarnation, key) = owner.split_once('/')?;
    Some((Incarnation(incarnation.into()), key.parse().ok()?))
}
