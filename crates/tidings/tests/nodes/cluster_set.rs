//! A Redis Cluster of three primaries, and slots that move between them.

use std::collections::BTreeSet;

use crate::{
    process::until,
    redis_server::{DURABLE, RedisServer},
};

/// All slots of a cluster.
const SLOTS: u16 = 16_384;
/// Keys that move together: few, so that a slot is half here and half there for a while.
const BATCH: &str = "2";

/// Three primaries that share the slots.
pub(crate) struct ClusterSet {
    servers: Vec<RedisServer>,
    ids: Vec<String>,
}

impl ClusterSet {
    pub(crate) async fn started() -> Self {
        // Two go on without the third, as an operator wants it who has many projects.
        let alone = ["--cluster-require-full-coverage", "no"];
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"];
        let options = [DURABLE, &options, &alone].concat();
        let (mut servers, mut ids) = (Vec::new(), Vec::new());
        for index in 0..3 {
            let server = RedisServer::started(&options).await;
            let share = |index: u16| {
                (index * (SLOTS / 3), if index == 2 { SLOTS } else { (index + 1) * (SLOTS / 3) })
            };
            let (from, to) = share(index);
            let epoch = (index + 1).to_string();
            // Different from the start: nodes that meet with equal ones argue about it for seconds.
            server.command::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await.unwrap();
            let range = [from.to_string(), (to - 1).to_string()];
            server.command::<()>(&["CLUSTER", "ADDSLOTSRANGE", &range[0], &range[1]]).await.unwrap();
            ids.push(server.command(&["CLUSTER", "MYID"]).await.unwrap());
            servers.push(server);
        }
        for other in &servers[1..] {
            let port = other.port().to_string();
            servers[0].command::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port]).await.unwrap();
        }
        let set = Self { servers, ids };
        until("the cluster coming together", || async { set.is_whole().await }).await;
        set
    }

    /// Gives the first primary a replica that is up to date.
    pub(crate) async fn add_replica(&self) -> RedisServer {
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"];
        let replica = RedisServer::started(&[DURABLE, &options].concat()).await;
        let port = self.servers[0].port().to_string();
        replica.command::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port]).await.unwrap();
        // It has to have heard of the primary first.
        let follow = ["CLUSTER", "REPLICATE", &self.ids[0]];
        until("the replica following", || async { replica.command::<()>(&follow).await.is_ok() }).await;
        let link = || replica.info(&["INFO", "replication"], "master_link_status");
        until("the replica being up to date", || async { link().await.as_deref() == Some("up") }).await;
        replica
    }

    async fn is_whole(&self) -> bool {
        for server in &self.servers {
            let state = server.info(&["CLUSTER", "INFO"], "cluster_state").await;
            let known = server.info(&["CLUSTER", "INFO"], "cluster_known_nodes").await;
            if (state.as_deref(), known.as_deref()) != (Some("ok"), Some("3")) {
                return false;
            }
        }
        true
    }

    pub(crate) fn url(&self) -> String {
        let addresses: Vec<_> = self.servers.iter().map(RedisServer::address).collect();
        format!("redis+cluster://{}", addresses.join(","))
    }

    pub(crate) fn servers(&self) -> &[RedisServer] {
        &self.servers
    }

    pub(crate) fn server(&mut self, index: usize) -> &mut RedisServer {
        &mut self.servers[index]
    }

    /// The slots of one server in which there are keys whose names contain `word`.
    pub(crate) async fn slots_with_keys(&self, server: usize, word: &str) -> Vec<u16> {
        let keys: Vec<String> = self.servers[server].command(&["KEYS", &format!("*{word}*")]).await.unwrap();
        let mut slots = BTreeSet::new();
        for key in keys {
            slots.insert(self.servers[server].command(&["CLUSTER", "KEYSLOT", &key]).await.unwrap());
        }
        slots.into_iter().collect()
    }

    /// Moves a slot with its keys, in the steps in which the tools for clusters do.
    pub(crate) async fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let (slot, source, target) = (slot.to_string(), &self.servers[from], &self.servers[to]);
        let set = ["CLUSTER", "SETSLOT", &slot];
        target.command::<()>(&[&set[..], &["IMPORTING", &self.ids[from]]].concat()).await.unwrap();
        source.command::<()>(&[&set[..], &["MIGRATING", &self.ids[to]]].concat()).await.unwrap();
        let port = target.port().to_string();
        loop {
            let keys: Vec<String> =
                source.command(&["CLUSTER", "GETKEYSINSLOT", &slot, BATCH]).await.unwrap();
            if keys.is_empty() {
                break;
            }
            let mut words = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            words.extend(keys.iter().map(String::as_str));
            source.command::<()>(&words).await.unwrap();
        }
        // The new owner first: if the old one knew it before, requests would be sent back and forth.
        let others = (0..self.servers.len()).filter(|&other| other != to && other != from);
        for server in [to, from].into_iter().chain(others) {
            let words = [&set[..], &["NODE", &self.ids[to]]].concat();
            self.servers[server].command::<()>(&words).await.unwrap();
        }
    }
}
