//! A stream of Redis's as this node follows it: pure, the time is passed in. What was published and what was read go in; what
//! has to be delivered comes out.
//!
//! A mirror is always a state in which the stream once was. So whoever joins is answered from it, and what Redis is asked for
//! is only what comes next.

use std::sync::Arc;

use tidings_protocol::{Epoch, Offset, Position, StreamId, Timestamp};
use tokio::{sync::oneshot, time::Instant};

use crate::engine::{HistoryLimits, Record, streams::Stream};

use super::stored::{decode_events, decode_snapshot};

/// A stream that is followed, or was a moment ago.
#[derive(Debug)]
pub(super) struct Mirror {
    /// Shards that follow it.
    pub(super) followers: u32,
    /// Since when nobody follows it.
    pub(super) unfollowed_at: Option<Instant>,
    /// `None`: it was not read yet.
    pub(super) stream: Option<Stream>,
    /// The newest event that is known to be there.
    heard: Option<Position>,
    /// What was appended from here and acknowledged is there for whoever asks from here.
    acknowledged: Option<Position>,
    /// Somebody is reading it.
    pub(super) reading: bool,
    /// It has to be read again when that is done.
    pub(super) read_again: bool,
    /// How often reading has begun.
    pub(super) reads_begun: u64,
    /// The last reading that has ended.
    pub(super) reads_done: u64,
    /// Told when it has learnt something.
    waiting: Vec<oneshot::Sender<()>>,
}

/// What Redis published about a stream, or answered.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) position: Position,
    /// Former epochs, each with the last offset that the present one shares with it.
    pub(super) former: Vec<Position>,
    /// Behind which the events begin.
    pub(super) from: Offset,
    pub(super) events: Vec<u8>,
    /// Everything up to this was too old to be kept.
    pub(super) aged: Offset,
    /// What comes before them; `None`: they go on behind what was known.
    pub(super) snapshot: Option<Vec<u8>>,
}

/// What a mirror has learnt.
#[derive(Debug)]
pub(super) enum Learnt {
    Nothing,
    /// These come next.
    Next(Position, Vec<Arc<Record>>),
    /// The stream goes on elsewhere than behind what was known; `lost`: something that was known is not in it any more.
    Elsewhere {
        position: Position,
        lost: bool,
    },
    /// It has to be read.
    Missing,
}

impl Mirror {
    pub(super) fn new() -> Self {
        Self {
            followers: 0,
            unfollowed_at: None,
            stream: None,
            heard: None,
            acknowledged: None,
            reading: false,
            read_again: false,
            reads_begun: 0,
            reads_done: 0,
            waiting: Vec::new(),
        }
    }

    /// Where it stands.
    pub(super) fn position(&self) -> Option<Position> {
        self.stream.as_ref().map(|stream| stream.position_at(stream.offset))
    }

    /// Whether it knows of a position, and of everything that was appended from here.
    pub(super) fn is_up_to(&self, since: Option<&Position>) -> bool {
        let knows = |position: Option<&Position>| {
            self.stream.as_ref().is_some_and(|stream| position.is_none_or(|position| stream.knows(position)))
        };
        knows(since) && knows(self.acknowledged.as_ref())
    }

    /// An event was appended from here.
    pub(super) fn acknowledge(&mut self, position: Position) {
        self.acknowledged = Some(position);
    }

    /// To be told when it has learnt something.
    pub(super) fn wait(&mut self) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        self.waiting.push(tell);
        told
    }

    pub(super) fn tell_waiting(&mut self) {
        for waiting in self.waiting.drain(..) {
            // Who does not wait any more needs no answer.
            let _ = waiting.send(());
        }
    }

    /// Whether more is known to be there than it has.
    pub(super) fn is_behind(&self) -> bool {
        match (&self.stream, &self.heard) {
            (None, _) => true,
            (Some(stream), Some(heard)) => !stream.knows(heard),
            (Some(_), None) => false,
        }
    }

    /// Takes events as they were published, the first at `first`. Whoever waits is told.
    pub(super) fn hear(&mut self, epoch: &str, first: Offset, events: &[u8]) -> Learnt {
        let Some(records) = decode_events(events, first) else { return Learnt::Missing };
        let Some(last) = records.last() else { return Learnt::Nothing };
        match &mut self.stream {
            Some(stream) if stream.epoch.as_str() == epoch && first <= stream.offset + 1 => {
                let learnt = take_records(stream, records);
                self.tell_waiting();
                learnt
            }
            _ => {
                self.heard = Some(Position { epoch: Epoch::new(epoch), offset: last.offset });
                Learnt::Missing
            }
        }
    }

    /// Takes what was read.
    pub(super) fn take(
        &mut self,
        id: &StreamId,
        reading: Reading,
        limits: &HistoryLimits,
        now: Timestamp,
    ) -> Learnt {
        // What was heard of and acknowledged before is in it, or was lost.
        (self.heard, self.acknowledged) = (None, None);
        if reading.snapshot.is_none() {
            return match &mut self.stream {
                Some(stream) if stream.epoch == reading.position.epoch && reading.from <= stream.offset => {
                    decode_events(&reading.events, reading.from + 1)
                        .map_or(Learnt::Missing, |records| take_records(stream, records))
                }
                _ => Learnt::Missing,
            };
        }
        let position = reading.position.clone();
        let Some(stream) = assemble(id, reading, limits, now) else { return Learnt::Missing };
        let former = self.position();
        let lost = former.as_ref().is_some_and(|former| !stream.knows(former));
        self.stream = Some(stream);
        if former.is_none() { Learnt::Nothing } else { Learnt::Elsewhere { position, lost } }
    }
}

fn take_records(stream: &mut Stream, mut records: Vec<Arc<Record>>) -> Learnt {
    records.retain(|record| record.offset > stream.offset);
    for record in &records {
        stream.push(record);
    }
    match records.last() {
        Some(last) => Learnt::Next(stream.position_at(last.offset), records),
        None => Learnt::Nothing,
    }
}

/// Puts a stream together from what was read of it; `None`: it is not of our making.
pub(super) fn assemble(
    id: &StreamId,
    reading: Reading,
    limits: &HistoryLimits,
    now: Timestamp,
) -> Option<Stream> {
    let mut stream = Stream::new(0, reading.position.epoch.clone(), limits.clone(), now);
    let snapshot = reading.snapshot.filter(|snapshot| !snapshot.is_empty());
    if let Some(snapshot) = snapshot {
        let restored = decode_snapshot(&snapshot, |entry| match entry {
            crate::engine::journal::Entry::Stream(entry) => {
                stream.restore(entry, true);
                Some(())
            }
            entry => stream.restore_entry(entry, true),
        });
        if restored.is_none() {
            tracing::error!(stream = ?id.as_str(), "its snapshot in Redis cannot be read; its history begins behind it");
            stream = Stream::new(0, reading.position.epoch.clone(), limits.clone(), now);
        }
    }
    if stream.offset < reading.from {
        // What is not too old to show was lost.
        let lost_at = (reading.from > reading.aged).then_some(now);
        stream.skip_to(reading.from, lost_at);
    }
    for record in decode_events(&reading.events, reading.from + 1)? {
        if record.offset > stream.offset {
            stream.push(&record);
        }
    }
    stream.set_life(reading.position.epoch, reading.former);
    Some(stream)
}
