//! Listening: how connections come to several shards, in both ways.

use std::collections::BTreeMap;

use axum::{Router, routing::get};
use tidings::accept::{self, Limits, Sharing};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::fixture::request;

const SHARDS: u16 = 3;

/// How many of `requests`, each on a connection of its own, each shard answered.
async fn answered(sharing: Sharing, requests: usize) -> BTreeMap<String, usize> {
    let (address, incomings) = accept::listen(([127, 0, 0, 1], 0).into(), SHARDS, sharing).unwrap();
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    for (shard, incomings) in (0..).zip(incomings) {
        let shard: u16 = shard;
        let router = Router::new().route("/", get(move || async move { shard.to_string() }));
        tasks.spawn(accept::serve(incomings, router, None, Limits::default(), tasks.clone(), stop.clone()));
    }
    let mut answered = BTreeMap::new();
    for _ in 0..requests {
        let answer = request("GET", &format!("http://{address}/"), &[("connection", "close")], b"").await;
        assert_eq!(answer.status, 200);
        *answered.entry(answer.text).or_default() += 1;
    }
    let taken = accept::listen(address, SHARDS, sharing).map(|_| ()).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse, "however it is shared, it is taken");
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    answered
}

#[tokio::test]
async fn one_acceptor_deals_connections_to_each_shard_in_turn() {
    let answered = answered(Sharing::RoundRobin, 9).await;
    assert_eq!(answered, BTreeMap::from(["0", "1", "2"].map(|shard| (shard.to_owned(), 3))));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_kernel_shares_connections_out_between_all_shards() {
    // By a hash of addresses and ports: that one of three gets none of 200 does not happen.
    let answered = answered(Sharing::ReusePort, 200).await;
    assert_eq!(answered.len(), usize::from(SHARDS), "{answered:?}");
}
