//! The fold of a stream: which tasks and processes run, which ended of late. Pure, the time is passed in.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde_json::value::RawValue;
use tidings_protocol::{EventType, ObjectWriter, Offset, RawObject, StateSnapshot, Timestamp, TypeFilter};

use super::{Record, journal::StateEntry};

/// How long an ended task still shows.
const ENDED_SECONDS_MAX: i64 = 5 * 60;
/// How long a task without a sign of life still shows.
const SILENT_SECONDS_MAX: i64 = 24 * 60 * 60;
/// Results and tracebacks above this are left out.
const LARGE_FIELD_BYTES: usize = 4 * 1024;
/// Entries in one snapshot.
const SNAPSHOT_ENTRIES_MAX: usize = 1000;
/// Bytes of one snapshot.
const SNAPSHOT_BYTES_MAX: usize = 1024 * 1024;
/// Entries kept per stream: enough for a full snapshot of each of several filters.
const ENTRIES_MAX: usize = 4 * SNAPSHOT_ENTRIES_MAX;
/// Bytes of entries kept per stream.
const KEPT_BYTES_MAX: usize = 4 * SNAPSHOT_BYTES_MAX;

#[derive(Debug, Default)]
pub(super) struct StateFold {
    entries: HashMap<Subject, Entry>,
    /// Those that run, and those that have ended, each in the order of their newest events: what is shown first, and what
    /// is dropped first, is found without looking at the rest.
    running: BTreeMap<Offset, Subject>,
    ended: BTreeMap<Offset, Subject>,
    bytes: usize,
    /// Something that still runs had to be dropped, so that no snapshot is whole before it would have ended by itself.
    dropped_running_at: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Task(Arc<str>),
    Process(Arc<str>),
}

#[derive(Debug)]
struct Entry {
    /// The newest event without what a snapshot leaves out, and without its closing brace.
    open_json: Box<str>,
    /// `{timestamp, task_name, metadata}` of the start, as JSON.
    started: Option<Arc<str>>,
    event_type: EventType,
    offset: Offset,
    appended_at: Timestamp,
    ended: bool,
    attempt: u64,
}

impl StateFold {
    /// What happened until now is not known: no snapshot is whole before what may have been dropped would have ended by itself.
    pub(super) fn skip(&mut self, now: Timestamp) {
        self.dropped_running_at = Some(now);
    }

    /// Takes the next record of the stream into account.
    pub(super) fn apply(&mut self, record: &Record) {
        let Some((subject_word, verb)) = record.event_type.as_str().split_once('.') else { return };
        let (id_field, make): (_, fn(Arc<str>) -> Subject) = match subject_word {
            "task" => ("task_id", Subject::Task),
            "process" => ("process_id", Subject::Process),
            _ => return,
        };
        if !matches!(verb, "started" | "progress" | "completed" | "failed") {
            return;
        }
        let Some(object) =
            std::str::from_utf8(record.json()).ok().and_then(|text| RawObject::parse(text).ok())
        else {
            return;
        };
        let Some(id) = object.get_str(id_field) else { return };
        let attempt = object.get("attempt").and_then(|attempt| attempt.parse().ok());
        self.take(make(id.as_ref().into()), verb, attempt, &object, record);
    }

    fn take(
        &mut self,
        subject: Subject,
        verb: &str,
        attempt: Option<u64>,
        object: &RawObject<'_>,
        record: &Record,
    ) {
        let former = self.entries.get(&subject);
        let former_attempt = former.map_or(0, |entry| entry.attempt);
        // Progress that comes after the end, or from an attempt that is over, says nothing about what is.
        let late = match (former, attempt) {
            (Some(entry), Some(attempt)) if attempt != entry.attempt => attempt < entry.attempt,
            (Some(entry), _) => entry.ended && verb == "progress",
            (None, _) => false,
        };
        if late {
            return;
        }
        let started = match verb {
            "started" => Some(started_fields(object)),
            _ => former.and_then(|entry| entry.started.clone()),
        };
        let entry = Entry {
            open_json: without_large_fields(object),
            started,
            event_type: record.event_type.clone(),
            offset: record.offset,
            appended_at: record.appended_at,
            ended: matches!(verb, "completed" | "failed"),
            attempt: attempt.unwrap_or(former_attempt),
        };
        self.remove(&subject);
        self.bytes += entry.bytes();
        let order = if entry.ended { &mut self.ended } else { &mut self.running };
        order.insert(record.offset, subject.clone());
        self.entries.insert(subject, entry);
        self.trim(record.appended_at);
    }

    fn remove(&mut self, subject: &Subject) {
        if let Some(entry) = self.entries.remove(subject) {
            self.bytes -= entry.bytes();
            let order = if entry.ended { &mut self.ended } else { &mut self.running };
            order.remove(&entry.offset);
        }
    }

    /// What is kept, for a checkpoint.
    pub(super) fn entries(&self) -> impl Iterator<Item = StateEntry<'_>> {
        self.entries.iter().map(|(subject, entry)| StateEntry {
            is_task: matches!(subject, Subject::Task(_)),
            id: match subject {
                Subject::Task(id) | Subject::Process(id) => (&**id).into(),
            },
            open_json: (&*entry.open_json).into(),
            started: entry.started.as_deref().map(Into::into),
            event_type: entry.event_type.as_str().into(),
            offset: entry.offset,
            at: entry.appended_at.as_microsecond(),
            ended: entry.ended,
            attempt: entry.attempt,
        })
    }

    /// Takes back what [`StateFold::entries`] gave; `None`: it is nothing that it gives.
    pub(super) fn restore(&mut self, state: &StateEntry<'_>) -> Option<()> {
        let make = if state.is_task { Subject::Task } else { Subject::Process };
        let subject = make(state.id.as_ref().into());
        let entry = Entry {
            open_json: state.open_json.as_ref().into(),
            started: state.started.as_deref().map(Into::into),
            event_type: EventType::try_from(&*state.event_type).ok()?,
            offset: state.offset,
            appended_at: Timestamp::from_microsecond(state.at)?,
            ended: state.ended,
            attempt: state.attempt,
        };
        self.bytes += entry.bytes();
        let order = if entry.ended { &mut self.ended } else { &mut self.running };
        order.insert(entry.offset, subject.clone());
        self.entries.insert(subject, entry);
        Some(())
    }

    /// Drops what does not show any more, and what is too much: first what has ended.
    pub(super) fn trim(&mut self, now: Timestamp) {
        let gone = |order: &BTreeMap<Offset, Subject>, entries: &HashMap<Subject, Entry>| {
            let oldest = order.values().next()?;
            entries.get(oldest).is_none_or(|entry| !entry.shows(now)).then(|| oldest.clone())
        };
        while let Some(subject) =
            gone(&self.ended, &self.entries).or_else(|| gone(&self.running, &self.entries))
        {
            self.remove(&subject);
        }
        while self.entries.len() > ENTRIES_MAX || self.bytes > KEPT_BYTES_MAX {
            let running = self.ended.is_empty();
            let oldest = if running { self.running.values().next() } else { self.ended.values().next() };
            let Some(subject) = oldest.cloned() else { break };
            if running {
                self.dropped_running_at = Some(now);
            }
            self.remove(&subject);
        }
        if self.dropped_running_at.is_some_and(|at| now.seconds_since(at) > SILENT_SECONDS_MAX) {
            self.dropped_running_at = None;
        }
    }

    /// What a page needs to draw itself, newest first.
    pub(super) fn snapshot(&self, types: &TypeFilter, now: Timestamp) -> StateSnapshot {
        let mut newest_first: Vec<_> = self.running.iter().chain(&self.ended).collect();
        newest_first.sort_unstable_by_key(|(offset, _)| std::cmp::Reverse(**offset));
        let mut snapshot =
            StateSnapshot { truncated: self.dropped_running_at.is_some(), ..StateSnapshot::default() };
        let (mut entries, mut bytes) = (0, 0);
        for (_, subject) in newest_first {
            let Some(entry) = self.entries.get(subject) else { continue };
            if !entry.shows(now) || !types.matches(&entry.event_type) {
                continue;
            }
            entries += 1;
            bytes += entry.bytes();
            if entries > SNAPSHOT_ENTRIES_MAX || bytes > SNAPSHOT_BYTES_MAX {
                snapshot.truncated = true;
                break;
            }
            let Some(json) = entry.render() else { continue };
            match subject {
                Subject::Task(_) => snapshot.tasks.push(json),
                Subject::Process(_) => snapshot.processes.push(json),
            }
        }
        snapshot
    }
}

impl Entry {
    fn shows(&self, now: Timestamp) -> bool {
        let limit = if self.ended { ENDED_SECONDS_MAX } else { SILENT_SECONDS_MAX };
        now.seconds_since(self.appended_at) <= limit
    }

    fn bytes(&self) -> usize {
        self.open_json.len() + self.started.as_ref().map_or(0, |started| started.len()) + 16
    }

    fn render(&self) -> Option<Box<RawValue>> {
        let started =
            self.started.as_ref().map(|started| format!(",\"started\":{started}")).unwrap_or_default();
        RawValue::from_string(format!("{}{started}}}", self.open_json)).ok()
    }
}

fn without_large_fields(object: &RawObject<'_>) -> Box<str> {
    let mut json = ObjectWriter::with_capacity(512);
    for member in object.members() {
        let large = member.value.len() > LARGE_FIELD_BYTES && matches!(&*member.key, "result" | "traceback");
        if !large && member.key != "started" {
            json.member(member);
        }
    }
    json.finish_open().into()
}

fn started_fields(object: &RawObject<'_>) -> Arc<str> {
    let mut json = ObjectWriter::with_capacity(128);
    for key in ["timestamp", "task_name", "metadata"] {
        if let Some(value) = object.get(key).filter(|value| value.len() <= LARGE_FIELD_BYTES) {
            json.raw(key, value);
        }
    }
    json.finish().into()
}
