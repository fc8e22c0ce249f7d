//! The service over its sockets: in this process, on free ports, with a real Redis where one is needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod accept;
mod attacks;
mod backpressure;
mod bad_input;
mod bench;
mod celery;
mod certificates;
mod client;
mod commands;
mod deflate;
mod drain;
mod fixture;
mod http;
mod keys;
mod limits;
mod overload;
mod pipelined;
mod redis_channel;
mod redis_streams;
mod redis_tls;
mod restart;
mod resume;
mod sessions;
mod sse;
mod tls;
mod watch;
mod watch_command;
mod ways;
mod websocket;
