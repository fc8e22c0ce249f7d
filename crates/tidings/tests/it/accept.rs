//! Listening: how connections come to several shards, in both ways.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router, routing::get};
use tidings::accept::{self, Limits, Refused, Sharing};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::fixture::{DEADLINE, request, until};

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

async fn broken() -> &'static str {
    panic!("a bug, as this test has it");
}

#[tokio::test]
async fn a_panic_over_one_connection_ends_that_one_and_is_counted() {
    let (address, mut incomings) =
        accept::listen(([127, 0, 0, 1], 0).into(), 1, Sharing::RoundRobin).unwrap();
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let panicked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&panicked);
    let refused = move |refused| {
        assert_eq!(refused, Refused::Panicked);
        counted.fetch_add(1, Ordering::Relaxed);
    };
    let limits = Limits { refused: Arc::new(refused), ..Limits::default() };
    let router = Router::new().route("/", get(|| async { "fine" })).route("/broken", get(broken));
    let serving = accept::serve(incomings.pop().unwrap(), router, None, limits, tasks.clone(), stop.clone());
    tasks.spawn(serving);
    for number in 1..=3 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(DEADLINE, socket.read_to_end(&mut answer)).await.expect("an end in time");
        assert!(answer.is_empty(), "{answer:?}");
        until("its being counted", || async { panicked.load(Ordering::Relaxed) == number }).await;
        assert_eq!(request("GET", &format!("http://{address}/"), &[], b"").await.text, "fine");
    }
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}
