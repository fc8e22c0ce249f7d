//! The service over its sockets: in this process, on free ports, with a real Redis where one is needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_input;
mod bench;
mod client;
mod commands;
mod fixture;
mod http;
mod redis_channel;
mod restart;
mod websocket;
