//! A primary, its replica, and three Sentinels that agree on which is which.

use crate::{
    process::until,
    redis_server::{RedisServer, VOLATILE},
};

/// What the Sentinels call the primary.
const NAME: &str = "tidings";

/// Two servers under three Sentinels, two of which suffice for a failover.
pub(crate) struct SentinelSet {
    servers: [RedisServer; 2],
    sentinels: Vec<RedisServer>,
}

impl SentinelSet {
    pub(crate) async fn started() -> Self {
        let primary = RedisServer::started(VOLATILE).await;
        let port = primary.port().to_string();
        let replica = RedisServer::started(&[VOLATILE, &["--replicaof", "127.0.0.1", &port]].concat()).await;
        let link = || replica.info(&["INFO", "replication"], "master_link_status");
        until("the replica following", || async { link().await.as_deref() == Some("up") }).await;
        let settings = format!(
            "sentinel monitor {NAME} 127.0.0.1 {port} 2\nsentinel down-after-milliseconds {NAME} 1000\n\
             sentinel failover-timeout {NAME} 3000\nsentinel parallel-syncs {NAME} 1\n"
        );
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            sentinels.push(RedisServer::sentinel(&settings).await);
        }
        let set = Self { servers: [primary, replica], sentinels };
        until("the Sentinels knowing each other", || async { set.all_known().await }).await;
        set
    }

    async fn all_known(&self) -> bool {
        for sentinel in &self.sentinels {
            let known: Vec<String> = sentinel.command(&["SENTINEL", "MASTER", NAME]).await.unwrap();
            let value = |name: &str| known.chunks(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
            let counts = (value("num-slaves"), value("num-other-sentinels"));
            if counts != (Some("1".to_owned()), Some("2".to_owned())) {
                return false;
            }
        }
        true
    }

    pub(crate) fn url(&self) -> String {
        let sentinels: Vec<_> = self.sentinels.iter().map(RedisServer::address).collect();
        format!("redis+sentinel://{}/{NAME}", sentinels.join(","))
    }

    pub(crate) fn primary(&self) -> &RedisServer {
        &self.servers[0]
    }

    pub(crate) fn replica(&self) -> &RedisServer {
        &self.servers[1]
    }

    /// Cuts the replica off, so that it misses what is written from now on. It stands still, because it would connect again at
    /// once, and the primary gives it up over what it cannot take.
    pub(crate) async fn cut_replication(&self) {
        self.replica().pause();
        let primary = self.primary();
        let small = ["CONFIG", "SET", "client-output-buffer-limit", "replica 1mb 1mb 1"];
        primary.command::<()>(&small).await.unwrap();
        let ballast = "x".repeat(16 * 1024 * 1024);
        until("the primary giving its replica up", || async {
            // Not kept: it is about what stands in the way of the replica.
            primary.command::<()>(&["SET", "ballast", &ballast, "PX", "1"]).await.unwrap();
            primary.info(&["INFO", "replication"], "connected_slaves").await.as_deref() == Some("0")
        })
        .await;
    }

    /// Kills the primary, and lets the replica go on if it stood still.
    pub(crate) fn fail_primary(&mut self) {
        self.servers[0].kill();
        self.servers[1].go_on();
    }

    /// Has the Sentinels put the replica in the place of a primary that lives.
    pub(crate) async fn ask_for_failover(&self) {
        self.sentinels[0].command::<()>(&["SENTINEL", "FAILOVER", NAME]).await.unwrap();
    }

    /// Waits until the former primary follows the one that replaced it.
    pub(crate) async fn demoted(&self) {
        let role = || self.primary().info(&["INFO", "replication"], "role");
        until("the former primary following", || async { role().await.as_deref() == Some("slave") }).await;
    }

    /// Waits until the replica is the primary, for the Sentinels and for itself.
    pub(crate) async fn failed_over(&self) {
        let promoted = self.replica().port().to_string();
        until("the failover", || async {
            let words = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME];
            let address: Option<Vec<String>> = self.sentinels[0].command(&words).await.ok();
            let role = self.replica().info(&["INFO", "replication"], "role").await;
            address.is_some_and(|address| address[1] == promoted) && role.as_deref() == Some("master")
        })
        .await;
    }
}
