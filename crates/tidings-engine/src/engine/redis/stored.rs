//! Events and snapshots as the bytes that Redis keeps and carries. Each begins with the version of its form.

use std::{borrow::Cow, io::Read as _, sync::Arc};

use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use serde::{Deserialize, Serialize};
use tidings_protocol::{Class, Event, EventId, EventType, Offset, Timestamp, close_with_offset};

use crate::engine::{Record, journal::Entry, streams::StreamSnapshot};

/// The form that this version writes, and the only one that there is.
const VERSION: u8 = 1;
/// Of a piece's length, which stands before it.
const LENGTH_BYTES: usize = 4;

/// An event that has no offset yet.
#[derive(Serialize, Deserialize)]
struct StoredEvent<'a> {
    /// Microseconds since 1970.
    at: i64,
    #[serde(borrow)]
    event_type: Cow<'a, str>,
    #[serde(borrow)]
    latest_key: Option<Cow<'a, str>>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    open_json: Cow<'a, str>,
}

/// Writes an event with its length before it, so that several can be read from one string.
pub(super) fn encode_event(event: &Event, now: Timestamp) -> Vec<u8> {
    let mut open_json = Vec::new();
    event.encode_open_into(&mut open_json);
    let stored = StoredEvent {
        at: now.as_microsecond(),
        event_type: event.event_type().as_str().into(),
        latest_key: match event.class() {
            Class::Durable => None,
            Class::Latest { key } => Some((&**key).into()),
        },
        id: event.id().map(|id| id.as_str().into()),
        open_json: String::from_utf8_lossy(&open_json),
    };
    let mut bytes = Vec::with_capacity(open_json.len() + 64);
    bytes.extend_from_slice(&[0; LENGTH_BYTES]);
    bytes.push(VERSION);
    let mut bytes = postcard::to_extend(&stored, bytes).expect("an event can be written to memory");
    let length = u32::try_from(bytes.len() - LENGTH_BYTES).expect("an event is far below 4 GiB");
    bytes[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Reads events that stand one behind the other, the first at `first`; `None`: they are none of ours.
pub(super) fn decode_events(mut bytes: &[u8], first: Offset) -> Option<Vec<Arc<Record>>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>()?;
        let (event, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        records.push(Arc::new(decode_event(event, first + records.len() as u64)?));
        bytes = rest;
    }
    Some(records)
}

fn decode_event(bytes: &[u8], offset: Offset) -> Option<Record> {
    let (&VERSION, bytes) = bytes.split_first()? else { return None };
    let stored: StoredEvent<'_> = postcard::from_bytes(bytes).ok()?;
    let mut json = stored.open_json.into_owned().into_bytes();
    close_with_offset(offset, &mut json);
    Some(Record::restored(
        offset,
        EventType::try_from(&*stored.event_type).ok()?,
        stored.latest_key.as_deref().map(Into::into),
        stored.id.as_deref().and_then(|id| EventId::try_from(id).ok()),
        Timestamp::from_microsecond(stored.at)?,
        std::str::from_utf8(&json).ok()?,
    ))
}

/// Writes a snapshot; returns it with its size before it was compressed.
pub(super) fn encode_snapshot(snapshot: &StreamSnapshot) -> (Vec<u8>, usize) {
    let mut entries = Vec::new();
    for entry in snapshot.entries() {
        entries = postcard::to_extend(&entry, entries).expect("an entry can be written to memory");
    }
    let mut encoder = DeflateEncoder::new(vec![VERSION], Compression::fast());
    let compressed = std::io::Write::write_all(&mut encoder, &entries).and_then(|()| encoder.finish());
    (compressed.expect("memory takes everything"), entries.len())
}

/// Reads a snapshot, entry by entry; `None`: it is none of ours.
pub(super) fn decode_snapshot(bytes: &[u8], mut take: impl FnMut(&Entry<'_>) -> Option<()>) -> Option<()> {
    let (&VERSION, bytes) = bytes.split_first()? else { return None };
    let mut entries = Vec::new();
    DeflateDecoder::new(bytes).read_to_end(&mut entries).ok()?;
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let (entry, behind) = postcard::take_from_bytes::<Entry<'_>>(rest).ok()?;
        take(&entry)?;
        rest = behind;
    }
    Some(())
}
