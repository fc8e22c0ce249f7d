//! The way `ticket`: good once and for 30 seconds, for clients that can show nothing else when they connect.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::cmd;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tidings_engine::{
    engine::redis::{Call, Servers},
    random,
};
use tidings_protocol::{Projects, Timestamp, UserId};
use tokio::time::Instant;

use super::{Denied, Digest, Identity, Refusal, WayName};

/// How long a ticket is good.
pub(crate) const GOOD_FOR: Duration = Duration::from_secs(30);
/// Tickets that are kept in memory; above, those that would end first are given up.
const KEPT_MAX: usize = 100_000;

/// Tickets that were given out and not spent.
#[derive(Debug)]
pub(crate) struct Tickets(Store);

#[derive(Debug)]
enum Store {
    /// Of this node alone.
    Memory(Mutex<HashMap<Digest, (Admits, Instant)>>),
    /// Of all nodes that share the Redis.
    Redis(Arc<Servers>),
}

/// What a ticket stands for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Admits {
    /// A session that somebody else keeps: it is asked about anew, so that what follows from its end follows here, too.
    Credential { way: WayName, credential: String },
    /// Somebody, as was found out or said when it was given.
    Somebody(Somebody),
}

/// Somebody, for 30 seconds in a store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Somebody {
    user_id: UserId,
    projects: Value,
    admin: bool,
    /// Microseconds since 1970.
    expires_at: Option<i64>,
    issued_at: Option<i64>,
    /// The digest of the session, by which it is revoked.
    session: String,
}

impl Somebody {
    pub(crate) fn new(identity: &Identity, session: Digest) -> Self {
        Self {
            user_id: identity.user.clone(),
            projects: identity.projects.to_value(),
            admin: identity.admin,
            expires_at: identity.expires_at.map(Timestamp::as_microsecond),
            issued_at: identity.issued_at.map(Timestamp::as_microsecond),
            session: session.to_string(),
        }
    }

    /// `None`: it is none of ours.
    pub(crate) fn into_identity(self) -> Option<(Identity, Digest)> {
        let moment = |at: Option<i64>| at.and_then(Timestamp::from_microsecond);
        let identity = Identity {
            user: self.user_id,
            projects: Projects::read(Some(&self.projects)).ok()?,
            admin: self.admin,
            expires_at: moment(self.expires_at),
            issued_at: moment(self.issued_at),
        };
        Some((identity, Digest::parse(&self.session)?))
    }
}

impl Tickets {
    /// Tickets of this node alone.
    pub(crate) fn in_memory() -> Self {
        Self(Store::Memory(Mutex::default()))
    }

    /// Tickets that any node which shares the Redis takes.
    pub(crate) fn in_redis(servers: Arc<Servers>) -> Self {
        Self(Store::Redis(servers))
    }

    /// Gives a ticket out.
    pub(crate) async fn give(&self, admits: Admits) -> Result<String, Refusal> {
        // 256 bits, in characters that a subprotocol may have.
        let ticket = random::hex::<32>();
        let digest = Digest::of(ticket.as_bytes());
        match &self.0 {
            Store::Memory(kept) => {
                let (mut kept, now) = (kept.lock(), Instant::now());
                if kept.len() >= KEPT_MAX {
                    kept.retain(|_, (_, until)| *until > now);
                }
                if kept.len() >= KEPT_MAX {
                    return Err(Refusal::NoVerdict("there are as many tickets as there may be".to_owned()));
                }
                kept.insert(digest, (admits, now + GOOD_FOR));
            }
            Store::Redis(servers) => {
                let (key, mut set) = (key_of(digest), cmd("SET"));
                let value = serde_json::to_string(&admits).expect("a ticket can be written");
                set.arg(&key).arg(value).arg("EX").arg(GOOD_FOR.as_secs());
                servers.call(&Call::repeatable(&key, set)).await.map_err(no_verdict)?;
            }
        }
        Ok(ticket)
    }

    /// Spends a ticket: whoever comes with it a second time, here or elsewhere, gets nothing.
    pub(crate) async fn spend(&self, ticket: &str) -> Result<Admits, Refusal> {
        let unknown = || {
            let detail =
                "the ticket was spent already, is older than 30 s, or was never given out; ask for another";
            Refusal::Denied(Denied::new("ticket_unknown", detail))
        };
        let digest = Digest::of(ticket.as_bytes());
        match &self.0 {
            Store::Memory(kept) => {
                let admits = kept.lock().remove(&digest);
                admits
                    .filter(|(_, until)| *until > Instant::now())
                    .map(|(admits, _)| admits)
                    .ok_or_else(unknown)
            }
            Store::Redis(servers) => {
                let (key, mut spend) = (key_of(digest), cmd("GETDEL"));
                spend.arg(&key);
                let value = servers.call(&Call::once(&key, spend)).await.map_err(no_verdict)?;
                let value =
                    redis::from_redis_value::<Option<String>>(value).ok().flatten().ok_or_else(unknown)?;
                serde_json::from_str(&value).map_err(|_| unknown())
            }
        }
    }
}

fn no_verdict(fault: impl std::fmt::Display) -> Refusal {
    Refusal::NoVerdict(format!("Redis, which has the tickets, cannot be asked: {fault}"))
}

fn key_of(digest: Digest) -> String {
    format!("tidings:ticket:{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn somebody() -> Admits {
        let identity = Identity {
            user: UserId::try_from("u").unwrap(),
            projects: Projects::listed(&["p", "t/*"]),
            admin: false,
            expires_at: Timestamp::from_microsecond(5),
            issued_at: None,
        };
        Admits::Somebody(Somebody::new(&identity, Digest::of(b"s")))
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_is_good_once_and_for_its_time() {
        let tickets = Tickets::in_memory();
        let ticket = tickets.give(somebody()).await.unwrap();
        assert_eq!(ticket.len(), 64);
        let Ok(Admits::Somebody(somebody)) = tickets.spend(&ticket).await else { panic!("it is good") };
        let (identity, session) = somebody.into_identity().unwrap();
        assert_eq!((identity.user.as_str(), session), ("u", Digest::of(b"s")));
        assert_eq!(identity.projects, Projects::listed(&["p", "t/*"]));
        assert!(
            matches!(tickets.spend(&ticket).await, Err(Refusal::Denied(denied)) if denied.code == "ticket_unknown")
        );
        let late = tickets.give(self::somebody()).await.unwrap();
        tokio::time::advance(GOOD_FOR).await;
        assert!(tickets.spend(&late).await.is_err());
        assert!(tickets.spend("").await.is_err());
    }
}
