//! Engines, hub and node, without a socket.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod closing;
mod contract;
mod deflate;
mod drain;
mod embedded;
mod epoch;
mod journal;
mod reader;
mod redis;
mod replay;
mod simulation;

use tidings_protocol::{EVENT_BYTES_MAX, Event, StreamId};

/// An event as a publisher sends it.
pub(crate) fn event(json: &serde_json::Value) -> Event {
    let now = jiff::Timestamp::UNIX_EPOCH.into();
    Event::parse(json.to_string().as_bytes(), EVENT_BYTES_MAX, now).expect("a valid event")
}

pub(crate) fn stream(project: &str) -> StreamId {
    StreamId::try_from(project).expect("a valid project")
}
