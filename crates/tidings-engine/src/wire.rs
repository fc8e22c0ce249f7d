//! WebSocket on the wire: frames as we write them, rules for what we read, compression. Knows bytes; knows no socket, no
//! stream and no JSON.

mod deflate;
mod frame;
mod reader;

pub use deflate::{Deflater, Inflater, negotiate};
pub use frame::{Frame, close_frame, pong_frame};
pub(crate) use frame::{HEADER_BYTES_MAX, Header, PING_FRAME};
pub use reader::{Binary, Incoming, Reader, Rules, Violation};
