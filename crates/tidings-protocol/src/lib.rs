//! What goes over the wire: events, client and server messages, positions, codes.
//!
//! No I/O and no clock: whoever knows the time passes it in. Everything that reaches a client or comes from one is
//! typed here, and the JSON Schemas in `schema/` are generated from these types, so there is one source for all three
//! languages.

mod client;
mod codes;
mod event;
mod filter;
mod id;
mod invalid;
mod known;
mod object;
mod position;
mod projects;
pub mod schema;
mod server;
mod time;

pub use client::{ClientMessage, MessageId, RefusedMessage};
pub use codes::{CLOSE_CODES, CloseCode, ErrorCode};
pub use event::{Audience, Class, EVENT_BYTES_MAX, Event, InvalidEvent, Reason, close_with_offset};
pub use filter::{InvalidPattern, TypeFilter};
pub use id::{EventId, EventType, InvalidId, ProjectId, StreamId, UserId};
pub use known::KNOWN_TYPES;
pub use object::{Member, ObjectWriter, RawObject};
pub use position::{Epoch, Offset, Position};
pub use projects::Projects;
pub use server::{Degraded, Gap, RemovalReason, ServerMessage, Source, StateSnapshot};
pub use time::Timestamp;

/// The version of the protocol: `protocol` in `connection.established`, `N` in the subprotocol `tidings.vN`.
pub const PROTOCOL_VERSION: u32 = 1;

/// The WebSocket subprotocol that the server selects when a client offers it.
pub const SUBPROTOCOL: &str = "tidings.v1";

/// The largest message that a client may send, in bytes; a larger one closes with [`CloseCode::MessageTooBig`].
pub const CLIENT_MESSAGE_BYTES_MAX: usize = 64 * 1024;
