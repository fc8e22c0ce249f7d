//! A lease: of all nodes that could do something, one does it at a time, and another one goes on soon after it ended.

use std::time::Duration;

use redis::cmd;
use tokio::time::Instant;

use super::{
    names::{Incarnation, millis},
    servers::{Call, Fault, Script, Servers},
};

/// A lease that is not renewed ends after this. Renew it several times within it.
const LEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// Its holder stops this much before others may begin.
const MARGIN: Duration = Duration::from_millis(500);

/// A lease that this node wants to have, or has. The key holds who has it, and beside it, in `KEY:term`, how often it went from
/// hand to hand: so that a holder's number is higher than those of all before it.
#[derive(Debug)]
pub struct Lease {
    key: String,
    holder: Incarnation,
    script: Script,
    /// Until when nobody else can have it.
    held_until: Option<Instant>,
    /// The number of our turn.
    term: u64,
}

impl Lease {
    /// The lease on `what`.
    pub fn new(what: &str, holder: Incarnation) -> Self {
        let script = Script::new(include_str!("lease.lua"));
        Self { key: format!("tidings:{{lease:{what}}}"), holder, script, held_until: None, term: 0 }
    }

    /// Takes the lease if it is free, or renews it. Whether it is ours now.
    pub async fn hold(&mut self, servers: &Servers) -> Result<bool, Fault> {
        let asked_at = Instant::now();
        let arguments = [self.holder.as_str().to_owned(), millis(LEASE_TIMEOUT).to_string()];
        let answer = servers.call(&Call::script(&self.key, &self.script, &arguments, true)).await?;
        let term = redis::from_redis_value::<u64>(answer)?;
        self.held_until = (term > 0).then_some(asked_at + LEASE_TIMEOUT - MARGIN);
        if term > 0 {
            self.term = term;
        }
        Ok(term > 0)
    }

    /// Whether it is ours, whatever Redis says meanwhile.
    pub fn is_held(&self) -> bool {
        self.held_until.is_some_and(|until| Instant::now() < until)
    }

    /// Whether nobody has it.
    pub async fn is_free(&self, servers: &Servers) -> Result<bool, Fault> {
        let mut ask = cmd("EXISTS");
        ask.arg(&self.key);
        let answer = servers.call(&Call::repeatable(&self.key, ask)).await?;
        Ok(matches!(answer, redis::Value::Int(0)))
    }

    /// The number of our turn: higher than that of everybody who had it before.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Gives it back, so that another node can have it at once.
    pub async fn give_back(&mut self, servers: &Servers) -> Result<(), Fault> {
        if self.held_until.take().is_none() {
            return Ok(());
        }
        servers.call(&Call::delete_if(&self.key, self.holder.as_str())).await.map(|_| ())
    }
}
