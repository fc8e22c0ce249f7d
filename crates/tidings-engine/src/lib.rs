//! Streams, engines, hub, sessions: how an event gets from its publisher to every connection that follows its project.
//!
//! Knows no HTTP, no configuration file and no command line. [`Node`] puts the parts together; nothing here imports it.

pub mod connection;
pub mod engine;
pub mod hub;
mod node;
pub mod outbox;
mod random;
mod session;

pub use node::{Node, NodeOptions};
