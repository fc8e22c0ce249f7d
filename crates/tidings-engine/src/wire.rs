//! WebSocket on the wire: frames as we write them, rules for what we read, compression. Knows bytes; knows no socket, no
//! stream and no JSON.

mod deflate;
mod frame;
mod reader;

pub use deflate::{Deflater, Inflater, negotiate};
pub use frame::{Frame, close_frame, close_frame_saying, pong_frame};
pub(crate) use frame::{HEADER_BYTES_MAX, Header, PING_FRAME};
pub use reader::{Binary, Incoming, Reader, Rules, Violation};

/// Makes room for `more` bytes: twice as much as there was, as vectors grow, but not beyond `bytes_max` for nothing.
fn reserve_up_to(bytes: &mut Vec<u8>, more: usize, bytes_max: usize) {
    let needed = bytes.len() + more;
    if needed > bytes.capacity() {
        let doubled = bytes.capacity().saturating_mul(2).min(bytes_max);
        bytes.reserve_exact(needed.max(doubled) - bytes.len());
    }
}
