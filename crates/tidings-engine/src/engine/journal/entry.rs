//! What the journal says, one entry at a time. Only ever extended at the end: a number once given keeps its meaning.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// An entry. Times are microseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::engine) enum Entry<'a> {
    /// A process began to write this file.
    Began {
        /// The system's run; see [`boot_id`](super::boot_id).
        boot: Option<Cow<'a, str>>,
        /// Whether every append is forced to the disk before it shows.
        synced: bool,
    },
    /// The process ended in good order, and the disk has everything.
    Ended,
    /// A stream is known from here on under a number; or, in a checkpoint, stands here.
    Stream(StreamEntry<'a>),
    /// An event was appended.
    Event {
        stream: u32,
        offset: u64,
        at: i64,
        event_type: Cow<'a, str>,
        latest_key: Option<Cow<'a, str>>,
        id: Option<Cow<'a, str>>,
        json: Cow<'a, str>,
    },
    /// Of a checkpoint: an id that is still known though a newer event stands for the one that had it.
    Id { stream: u32, offset: u64, at: i64, id: Cow<'a, str> },
    /// Of a checkpoint: a task or a process in the stream's state.
    State { stream: u32, state: StateEntry<'a> },
    /// A stream was forgotten.
    Forgotten { stream: u32 },
    /// A connection was saved by a version that knew no users.
    Connection {
        client: u128,
        token: [u8; 16],
        /// When it was lost; `None`: it was alive.
        lost_at: Option<i64>,
        /// Streams, each with the patterns of its filter.
        subscriptions: Vec<(Cow<'a, str>, Vec<Cow<'a, str>>)>,
    },
    /// A connection was forgotten.
    Gone { client: u128 },
    /// Of a checkpoint: it is whole.
    Whole,
    /// A connection was saved, or what has changed of it.
    OwnedConnection {
        client: u128,
        token: [u8; 16],
        /// When it was lost; `None`: it was alive.
        lost_at: Option<i64>,
        /// Whose it is.
        user: Option<Cow<'a, str>>,
        /// Streams, each with the patterns of its filter.
        subscriptions: Vec<(Cow<'a, str>, Vec<Cow<'a, str>>)>,
    },
}

/// Where a stream stands, and how far back its history reaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::engine) struct StreamEntry<'a> {
    pub(in crate::engine) number: u32,
    pub(in crate::engine) id: Cow<'a, str>,
    pub(in crate::engine) epoch: Cow<'a, str>,
    pub(in crate::engine) offset: u64,
    /// Former epochs, each with the last offset that this one shares with it.
    pub(in crate::engine) former: Vec<(Cow<'a, str>, u64)>,
    pub(in crate::engine) used_at: i64,
    /// Up to where the exact log, the durable log and the newest of each key have been dropped.
    pub(in crate::engine) dropped_to: [u64; 3],
}

/// A task or a process as the state keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::engine) struct StateEntry<'a> {
    pub(in crate::engine) is_task: bool,
    pub(in crate::engine) id: Cow<'a, str>,
    pub(in crate::engine) open_json: Cow<'a, str>,
    pub(in crate::engine) started: Option<Cow<'a, str>>,
    pub(in crate::engine) event_type: Cow<'a, str>,
    pub(in crate::engine) offset: u64,
    pub(in crate::engine) at: i64,
    pub(in crate::engine) ended: bool,
    pub(in crate::engine) attempt: u64,
}

impl StreamEntry<'_> {
    pub(in crate::engine) fn into_owned(self) -> StreamEntry<'static> {
        StreamEntry {
            number: self.number,
            id: owned(self.id),
            epoch: owned(self.epoch),
            offset: self.offset,
            former: self.former.into_iter().map(|(epoch, offset)| (owned(epoch), offset)).collect(),
            used_at: self.used_at,
            dropped_to: self.dropped_to,
        }
    }
}

impl StateEntry<'_> {
    pub(in crate::engine) fn into_owned(self) -> StateEntry<'static> {
        StateEntry {
            is_task: self.is_task,
            id: owned(self.id),
            open_json: owned(self.open_json),
            started: self.started.map(owned),
            event_type: owned(self.event_type),
            offset: self.offset,
            at: self.at,
            ended: self.ended,
            attempt: self.attempt,
        }
    }
}

fn owned(text: Cow<'_, str>) -> Cow<'static, str> {
    Cow::Owned(text.into_owned())
}
