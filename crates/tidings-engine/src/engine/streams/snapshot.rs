//! A stream as it is kept elsewhere: in a journal's checkpoint or in Redis.

use std::sync::Arc;

use tidings_protocol::{Epoch, EventId, EventType, Offset, Position, StreamId, Timestamp};

use crate::engine::{
    Record,
    journal::{Entry, StateEntry, StreamEntry},
};

use super::Stream;

/// A stream at one moment; records are shared, the rest is copied.
pub(in crate::engine) struct StreamSnapshot {
    stream: StreamEntry<'static>,
    ids: Vec<(String, Offset, Timestamp)>,
    states: Vec<StateEntry<'static>>,
    records: Vec<Arc<Record>>,
}

impl StreamSnapshot {
    pub(in crate::engine) fn of(id: &StreamId, stream: &Stream) -> Self {
        Self {
            stream: stream.entry(id).into_owned(),
            ids: stream.history.replaced_ids().map(|(id, offset, at)| (id.to_string(), offset, at)).collect(),
            states: stream.state.entries().map(StateEntry::into_owned).collect(),
            records: stream.history.records(),
        }
    }

    /// What [`Stream::restore_entry`] takes, behind where the stream stands.
    pub(in crate::engine) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        let stream = self.stream.number;
        let states = self.states.iter().map(move |state| Entry::State { stream, state: state.clone() });
        let ids = self.ids.iter().map(move |(id, offset, at)| Entry::Id {
            stream,
            offset: *offset,
            at: at.as_microsecond(),
            id: id.into(),
        });
        let records = self.records.iter().map(move |record| record.entry(stream));
        std::iter::once(Entry::Stream(self.stream.clone())).chain(states).chain(ids).chain(records)
    }
}

impl Stream {
    /// Where the stream stands.
    pub(in crate::engine) fn entry<'a>(&'a self, id: &'a StreamId) -> StreamEntry<'a> {
        let former = self.former.iter().map(|former| (former.epoch.as_str().into(), former.offset));
        StreamEntry {
            number: self.number,
            id: id.as_str().into(),
            epoch: self.epoch.as_str().into(),
            offset: self.offset,
            former: former.collect(),
            used_at: self.used_at.as_microsecond(),
            dropped_to: self.history.dropped_to(),
        }
    }

    /// Takes back where it stood; only a snapshot knows how far its history reaches back.
    pub(in crate::engine) fn restore(&mut self, entry: &StreamEntry<'_>, in_snapshot: bool) {
        self.epoch = Epoch::new(&*entry.epoch);
        let former = entry.former.iter();
        self.former =
            former.map(|(epoch, offset)| Position { epoch: Epoch::new(&**epoch), offset: *offset }).collect();
        self.offset = self.offset.max(entry.offset);
        self.staged = self.offset;
        if in_snapshot {
            self.history.restore_dropped_to(entry.dropped_to);
        }
    }

    /// Takes back what belongs to it; `None`: this does not, or cannot be read.
    pub(in crate::engine) fn restore_entry(&mut self, entry: &Entry<'_>, in_snapshot: bool) -> Option<()> {
        match entry {
            Entry::Event { offset, at, event_type, latest_key, id, json, .. } => {
                let record = Record::restored(
                    *offset,
                    EventType::try_from(&**event_type).ok()?,
                    latest_key.as_deref().map(Into::into),
                    id.as_deref().and_then(|id| EventId::try_from(id).ok()),
                    Timestamp::from_microsecond(*at)?,
                    json,
                );
                self.restore_record(&Arc::new(record), in_snapshot);
                Some(())
            }
            Entry::Id { offset, at, id, .. } => {
                let (id, at) = (EventId::try_from(&**id).ok()?, Timestamp::from_microsecond(*at)?);
                self.history.restore_id(id, *offset, at);
                Some(())
            }
            Entry::State { state, .. } => self.state.restore(state),
            _ => None,
        }
    }

    /// Takes back a record; one of a snapshot is in the state already.
    fn restore_record(&mut self, record: &Arc<Record>, in_state: bool) {
        self.history.push(record);
        if !in_state {
            self.state.apply(record);
        }
        self.offset = self.offset.max(record.offset);
        self.staged = self.offset;
        self.used_at = self.used_at.max(record.appended_at);
    }
}
