//! The protocol against its golden messages, which Python and TypeScript read, too.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod events;
mod fixtures;
mod messages;
mod schemas;
