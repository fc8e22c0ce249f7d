//! The service: configuration, routes, access, sources, command line, metrics. Only edge: what happens to an event
//! between its publisher and its subscribers is in `tidings-engine`.

pub mod accept;
mod access;
mod admission;
mod auth;
mod burst;
pub mod cli;
pub mod config;
mod forwarded;
pub mod handshake;
mod ingest;
mod keys;
mod metrics;
mod rate;
mod redis_stream;
mod routes;
mod server;
mod sources;
pub mod tls;

pub use server::{Server, StartError};
