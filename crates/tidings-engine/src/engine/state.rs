//! The fold of a stream: which tasks and processes run, which ended of late. Pure, the time is passed in.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde_json::value::RawValue;
use tidings_protocol::{ObjectWriter, Offset, RawObject, StateSnapshot, Timestamp, TypeFilter};

use super::Record;

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

#[derive(Debug, Default)]
pub(super) struct StateFold {
    entries: HashMap<Subject, Entry>,
    /// In the order of their newest events, to find the newest and to drop the oldest.
    by_offset: BTreeMap<Offset, Subject>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Task(Arc<str>),
    Process(Arc<str>),
}

#[derive(Debug)]
struct Entry {
    newest: Arc<Record>,
    /// `{timestamp, task_name, metadata}` of the start, as JSON.
    started: Option<Box<str>>,
    ended: bool,
    attempt: u64,
}

impl StateFold {
    /// Takes the next record of the stream into account.
    pub(super) fn apply(&mut self, record: &Arc<Record>) {
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
            std::str::from_utf8(&record.json).ok().and_then(|text| RawObject::parse(text).ok())
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
        record: &Arc<Record>,
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
        let started = match (verb, former) {
            ("started", _) => Some(started_fields(object)),
            (_, Some(entry)) => entry.started.clone(),
            (_, None) => None,
        };
        if let Some(entry) = former {
            self.by_offset.remove(&entry.newest.offset);
        }
        let entry = Entry {
            newest: Arc::clone(record),
            started,
            ended: matches!(verb, "completed" | "failed"),
            attempt: attempt.unwrap_or(former_attempt),
        };
        self.by_offset.insert(record.offset, subject.clone());
        self.entries.insert(subject, entry);
        self.trim(record.appended_at);
    }

    /// Drops what does not show any more.
    pub(super) fn trim(&mut self, now: Timestamp) {
        while let Some((&offset, subject)) = self.by_offset.first_key_value() {
            let over = self.entries.len() > ENTRIES_MAX
                || self.entries.get(subject).is_none_or(|entry| !entry.shows(now));
            // The oldest may still run while a younger one has ended: those are skipped when a snapshot is made.
            if !over {
                break;
            }
            let subject = subject.clone();
            self.by_offset.remove(&offset);
            self.entries.remove(&subject);
        }
    }

    /// What a page needs to draw itself, newest first.
    pub(super) fn snapshot(&self, types: &TypeFilter, now: Timestamp) -> StateSnapshot {
        let mut snapshot = StateSnapshot::default();
        let (mut entries, mut bytes) = (0, 0);
        for subject in self.by_offset.values().rev() {
            let Some(entry) = self.entries.get(subject) else { continue };
            if !entry.shows(now) || !types.matches(&entry.newest.event_type) {
                continue;
            }
            let Some(json) = entry.render() else { continue };
            entries += 1;
            bytes += json.get().len();
            if entries > SNAPSHOT_ENTRIES_MAX || bytes > SNAPSHOT_BYTES_MAX {
                snapshot.truncated = true;
                break;
            }
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
        now.seconds_since(self.newest.appended_at) <= limit
    }

    fn render(&self) -> Option<Box<RawValue>> {
        let text = std::str::from_utf8(&self.newest.json).ok()?;
        let object = RawObject::parse(text).ok()?;
        let mut json = ObjectWriter::with_capacity(text.len().min(2 * LARGE_FIELD_BYTES));
        for (key, value) in object.iter() {
            let large = value.len() > LARGE_FIELD_BYTES && matches!(key, "result" | "traceback");
            if !large && key != "started" {
                json.raw(key, value);
            }
        }
        if let Some(started) = &self.started {
            json.raw("started", started);
        }
        RawValue::from_string(json.finish()).ok()
    }
}

fn started_fields(object: &RawObject<'_>) -> Box<str> {
    let mut json = ObjectWriter::with_capacity(128);
    for key in ["timestamp", "task_name", "metadata"] {
        if let Some(value) = object.get(key).filter(|value| value.len() <= LARGE_FIELD_BYTES) {
            json.raw(key, value);
        }
    }
    json.finish().into()
}
