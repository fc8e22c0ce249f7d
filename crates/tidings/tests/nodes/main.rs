//! Faults: many nodes, a Redis and its kin, and clients that watch while all of them are killed, paused, cut off and restarted.
//!
//! A scenario puts nodes under load, breaks something, mends it, and asks the checker whether every client got every
//! acknowledged event once and in order, or was told that it cannot. Everything runs in processes of its own on this machine. How
//! large and how long: see `scale`. Run it with `cargo test -p tidings --test nodes`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chance;
mod channel;
mod checker;
mod cluster_set;
mod failover;
mod fleet;
mod http;
mod ingest;
mod node;
mod partition;
mod planted;
mod process;
mod proxy;
mod publish;
mod record;
mod redis_faults;
mod redis_server;
mod restarts;
mod rights;
mod scale;
mod sentinel_set;
mod single_node;
mod soak;
mod stage;
mod tools;
