//! Streams, engines, shards, sessions: how an event gets from its publisher to every connection that follows its project.
//!
//! Knows no HTTP, no configuration file and no command line. [`Node`] puts the parts together; nothing here imports it.

// The futures of the Redis library are deep.
#![recursion_limit = "256"]

pub mod driver;
pub mod engine;
pub mod event_stream;
pub mod hub;
mod node;
pub mod random;
pub mod rights;
pub mod saved;
mod session;
pub mod shard;
mod tls_socket;
pub mod vigil;
pub mod wire;

pub use node::{EngineOptions, Node, NodeError, NodeOptions, RedisMember, RedisStore};
