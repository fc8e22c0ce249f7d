//! How messages look on a connection: as text frames, as compressed ones, or as Server-Sent Events.

use bytes::Bytes;
use tidings_protocol::{Epoch, Offset};

use crate::{
    engine::Record,
    wire::{Deflater, Frame},
};

/// Below this a replayed event is copied to add `folded` to it; above, its bytes stay shared.
const COPIED_BYTES_MAX: usize = 16 * 1024;

/// The form of a connection's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// WebSocket text frames.
    Plain,
    /// WebSocket text frames, compressed where that saves something.
    Deflate,
    /// Server-Sent Events.
    EventStream,
}

impl Encoding {
    /// Whether a client can send frames, and is pinged.
    pub(super) fn is_websocket(self) -> bool {
        self != Self::EventStream
    }

    /// An event as everybody gets it who is not behind.
    pub(super) fn record(self, record: &Record, epoch: &Epoch, deflater: &mut Deflater) -> Bytes {
        match self {
            Self::Plain => record.frame().clone(),
            Self::Deflate => record.compressed_frame(deflater).clone(),
            Self::EventStream => server_sent(record.json(), Some((epoch, record.offset))),
        }
    }

    /// An event before which `folded` others were left out; in pieces, so that a large one is not copied for each client.
    pub(super) fn folded(
        self,
        record: &Record,
        epoch: &Epoch,
        folded: u64,
        deflater: &mut Deflater,
    ) -> Vec<Bytes> {
        if folded == 0 {
            return vec![self.record(record, epoch, deflater)];
        }
        let member = format!(",\"folded\":{folded}}}");
        let json = record.json_bytes();
        let open = json.slice(..json.len().saturating_sub(1));
        if self == Self::Plain && open.len() > COPIED_BYTES_MAX {
            let header = crate::wire::Header::new(Frame::Text, open.len() + member.len());
            return vec![Bytes::copy_from_slice(header.as_bytes()), open, member.into()];
        }
        let json = [&open, member.as_bytes()].concat();
        match self {
            Self::Plain => vec![Frame::Text.encode(&json)],
            Self::Deflate => vec![compressed(&json, deflater)],
            Self::EventStream => vec![server_sent(&json, Some((epoch, record.offset)))],
        }
    }

    /// A message of the service's own; `position`: where it stands in the stream, if it does.
    pub(super) fn message(
        self,
        json: &str,
        position: Option<(&Epoch, Offset)>,
        deflater: &mut Deflater,
    ) -> Bytes {
        match self {
            Self::Plain => Frame::Text.encode(json.as_bytes()),
            Self::Deflate => compressed(json.as_bytes(), deflater),
            Self::EventStream => server_sent(json.as_bytes(), position),
        }
    }

    /// A message that says when to come back, which `EventSource` does by itself.
    pub(super) fn appointment(self, json: &str, retry_after_ms: u64, deflater: &mut Deflater) -> Bytes {
        let message = self.message(json, None, deflater);
        match self {
            Self::Plain | Self::Deflate => message,
            Self::EventStream => [format!("retry: {retry_after_ms}\n").as_bytes(), &message].concat().into(),
        }
    }
}

fn compressed(json: &[u8], deflater: &mut Deflater) -> Bytes {
    match deflater.compress(json) {
        Some(payload) => Frame::CompressedText.encode(&payload),
        None => Frame::Text.encode(json),
    }
}

/// A message as Server-Sent Events have it (HTML standard, section 9.2): one `data` line, so line breaks between members,
/// which JSON allows, become spaces.
fn server_sent(json: &[u8], position: Option<(&Epoch, Offset)>) -> Bytes {
    let id = position.map(|(epoch, offset)| format!("id: {epoch}:{offset}\n")).unwrap_or_default();
    let mut message = Vec::with_capacity(id.len() + json.len() + 8);
    message.extend_from_slice(id.as_bytes());
    message.extend_from_slice(b"data: ");
    message.extend(json.iter().map(|&byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
    message.extend_from_slice(b"\n\n");
    message.into()
}
