//! The protocol against its golden messages, which Python and TypeScript read, too.

mod events;
mod fixtures;
mod messages;
mod schemas;
