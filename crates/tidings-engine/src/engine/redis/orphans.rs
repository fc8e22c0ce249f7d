//! Connections that a former run of this node has left without a word.

use std::sync::Arc;

use futures_util::future::join_all;
use redis::cmd;

use super::{
    Shared,
    connections::Stored,
    names::{millis, parse_owner},
    servers::{Call, Fault},
};

/// Looks for connections that a former run of this node has left without a word, and lets their time begin anew: their clients
/// come back now.
pub(super) async fn adopt_orphans(shared: Arc<Shared>) {
    match shared.count_orphans().await {
        Ok(orphans) => {
            tracing::info!(orphans, "connections that the former run of this node left can be resumed");
        }
        Err(fault) => {
            tracing::warn!(%fault, "connections that the former run of this node left cannot be looked for");
        }
    }
}

impl Shared {
    async fn count_orphans(&self) -> Result<usize, Fault> {
        let mut orphans = 0;
        for primary in self.servers.primaries() {
            let mut cursor = "0".to_owned();
            loop {
                let mut scan = cmd("SCAN");
                scan.arg(&cursor).arg("MATCH").arg("ws:connection:*").arg("COUNT").arg(500);
                let answer = primary.send(&scan).await?;
                let (next, keys): (String, Vec<String>) = redis::from_redis_value(answer)?;
                for found in join_all(keys.iter().map(|key| self.adopt(key))).await {
                    orphans += usize::from(found?);
                }
                if next == "0" {
                    break;
                }
                cursor = next;
            }
        }
        Ok(orphans)
    }

    /// Lets go of a connection, if a former run of this node has it; whether it did.
    async fn adopt(&self, key: &str) -> Result<bool, Fault> {
        let mut read = cmd("GET");
        read.arg(key);
        let known = self.servers.call(&Call::repeatable(key, read)).await?;
        let known = redis::from_redis_value::<Option<String>>(known).ok().flatten();
        let Some(known) = known.and_then(|known| serde_json::from_str::<Stored>(&known).ok()) else {
            return Ok(false);
        };
        let is_former = parse_owner(&known.owner).is_some_and(|(owner, _)| owner != self.options.incarnation);
        if known.node != self.options.name.name() || !is_former {
            return Ok(false);
        }
        let mut lost = known;
        let owner = std::mem::take(&mut lost.owner);
        let lost = serde_json::to_string(&lost).expect("strings and lists can be written");
        let arguments = ["save", &owner, &lost, &millis(self.options.connection_timeout).to_string()];
        let answer =
            self.servers.call(&Call::script(key, &self.scripts.connection, &arguments, true)).await?;
        Ok(!matches!(answer, redis::Value::Nil))
    }
}
