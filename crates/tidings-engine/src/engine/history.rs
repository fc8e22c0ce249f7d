//! What a stream keeps for those who come back: pure, the time is passed in.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tidings_protocol::{EventId, Offset, Timestamp};

use super::{PageLimit, Record};

/// The newest records kept exactly, whatever their class: what a short cut misses comes back without folding.
const RECENT_RECORDS_MAX: usize = 256;
/// Bytes of records kept for exactness alone.
const RECENT_BYTES_MAX: usize = 1024 * 1024;

/// How much history a stream keeps.
#[derive(Clone, Debug)]
pub struct HistoryLimits {
    /// Durable events, and as many keys of `latest` events.
    pub events: usize,
    /// Age of a durable event.
    pub age: Duration,
    /// JSON of durable events, and as much of `latest` events.
    pub bytes: usize,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { events: 1000, age: Duration::from_hours(1), bytes: 8 * 1024 * 1024 }
    }
}

/// The kept part of a stream: three views of the same records.
///
/// `recent` is everything of late, exact. `durable` reaches further back without the progress in between, so that a
/// flood of progress never pushes out the end of a task. `latest` holds the newest record of each key. A replay is
/// taken from `recent` if it reaches back far enough, and else merged from the other two.
#[derive(Debug)]
pub(super) struct History {
    limits: HistoryLimits,
    recent: Log,
    durable: Log,
    latest: Latest,
    ids: HashMap<EventId, Offset>,
    /// The ids of `latest` events, oldest first. They are forgotten by their number, not with their records, which a
    /// newer one of the same key replaces at any time.
    latest_ids: VecDeque<(Timestamp, EventId)>,
}

/// Records in order, with their bytes, and the offset up to which records have been dropped.
#[derive(Debug, Default)]
struct Log {
    records: VecDeque<Arc<Record>>,
    bytes: usize,
    dropped_to: Offset,
}

impl Log {
    fn push(&mut self, record: &Arc<Record>) {
        self.bytes += record.json().len();
        self.records.push_back(Arc::clone(record));
    }

    /// Drops the oldest record if it is too much.
    fn drop_oldest_if(&mut self, too_much: impl Fn(&Self, &Record) -> bool) -> Option<Arc<Record>> {
        self.records.front().filter(|oldest| too_much(self, oldest))?;
        let oldest = self.records.pop_front()?;
        self.bytes -= oldest.json().len();
        self.dropped_to = oldest.offset;
        Some(oldest)
    }

    fn behind(&self, offset: Offset) -> impl Iterator<Item = &Arc<Record>> {
        self.records.range(self.records.partition_point(|record| record.offset <= offset)..)
    }
}

/// The newest record of each key.
#[derive(Debug, Default)]
struct Latest {
    by_key: HashMap<Arc<str>, Offset>,
    by_offset: BTreeMap<Offset, Arc<Record>>,
    bytes: usize,
    /// The newest record that was dropped without a newer one of its key.
    dropped_to: Offset,
}

impl Latest {
    fn push(&mut self, key: &Arc<str>, record: &Arc<Record>) {
        if let Some(replaced) = self.by_key.insert(Arc::clone(key), record.offset) {
            self.remove(replaced);
        }
        self.bytes += record.json().len();
        self.by_offset.insert(record.offset, Arc::clone(record));
    }

    fn remove(&mut self, offset: Offset) -> Option<Arc<Record>> {
        let record = self.by_offset.remove(&offset)?;
        self.bytes -= record.json().len();
        Some(record)
    }

    fn drop_oldest_while(&mut self, too_much: impl Fn(&Self, &Record) -> bool) {
        while let Some((&offset, oldest)) = self.by_offset.first_key_value() {
            if !too_much(self, oldest) {
                break;
            }
            self.dropped_to = offset;
            if let Some(key) = self.remove(offset).and_then(|record| record.latest_key.clone()) {
                self.by_key.remove(&key);
            }
        }
    }
}

impl History {
    pub(super) fn new(limits: HistoryLimits) -> Self {
        let (recent, durable) = (Log::default(), Log::default());
        Self {
            limits,
            recent,
            durable,
            latest: Latest::default(),
            ids: HashMap::new(),
            latest_ids: VecDeque::new(),
        }
    }

    /// The offset of the event that has this id, if the history holds it.
    pub(super) fn offset_of(&self, id: &EventId) -> Option<Offset> {
        self.ids.get(id).copied()
    }

    pub(super) fn push(&mut self, record: &Arc<Record>) {
        // Of a history that is being restored, the exact log may not reach back to it.
        if record.offset > self.recent.dropped_to {
            self.recent.push(record);
        }
        match &record.latest_key {
            Some(key) => self.latest.push(key, record),
            None => self.durable.push(record),
        }
        if let Some(id) = &record.id {
            self.ids.insert(id.clone(), record.offset);
            if record.latest_key.is_some() {
                self.latest_ids.push_back((record.appended_at, id.clone()));
            }
        }
        self.trim(record.appended_at);
    }

    /// Every record that is kept, in order.
    pub(super) fn records(&self) -> Vec<Arc<Record>> {
        let mut records: Vec<_> =
            self.durable.records.iter().chain(self.latest.by_offset.values()).cloned().collect();
        let exact_from = self.recent.dropped_to;
        records.retain(|record| record.offset <= exact_from);
        records.sort_unstable_by_key(|record| record.offset);
        records.extend(self.recent.records.iter().cloned());
        records
    }

    /// Every id that is known.
    pub(super) fn ids(&self) -> impl Iterator<Item = &EventId> {
        self.ids.keys()
    }

    /// Ids that are known though their records were replaced.
    pub(super) fn replaced_ids(&self) -> impl Iterator<Item = (&EventId, Offset, Timestamp)> {
        self.latest_ids.iter().filter_map(|(at, id)| {
            let offset = *self.ids.get(id)?;
            let kept = offset > self.recent.dropped_to || self.latest.by_offset.contains_key(&offset);
            (!kept).then_some((id, offset, *at))
        })
    }

    /// Up to where records were dropped: of the exact log, of the durable one, and of the newest of each key.
    pub(super) fn dropped_to(&self) -> [Offset; 3] {
        [self.recent.dropped_to, self.durable.dropped_to, self.latest.dropped_to]
    }

    /// What comes up to `offset` is missing.
    pub(super) fn skip_to(&mut self, offset: Offset) {
        self.recent = Log { dropped_to: offset, ..Log::default() };
        self.durable.dropped_to = offset;
        self.latest.dropped_to = offset;
    }

    /// Begins as a history that reached back to where another one does.
    pub(super) fn restore_dropped_to(&mut self, [recent, durable, latest]: [Offset; 3]) {
        self.recent.dropped_to = recent;
        self.durable.dropped_to = durable;
        self.latest.dropped_to = latest;
    }

    pub(super) fn restore_id(&mut self, id: EventId, offset: Offset, at: Timestamp) {
        self.ids.insert(id.clone(), offset);
        self.latest_ids.push_back((at, id));
    }

    /// Drops what the limits do not allow any more.
    pub(super) fn trim(&mut self, now: Timestamp) {
        let limits = &self.limits;
        let old =
            |at: Timestamp| now.seconds_since(at) > i64::try_from(limits.age.as_secs()).unwrap_or(i64::MAX);
        let recent_max = RECENT_RECORDS_MAX.min(limits.events);
        let recent_too_much = |log: &Log, oldest: &Record| {
            log.records.len() > recent_max || log.bytes > RECENT_BYTES_MAX || old(oldest.appended_at)
        };
        while self.recent.drop_oldest_if(recent_too_much).is_some() {}
        let durable_too_much = |log: &Log, oldest: &Record| {
            log.records.len() > limits.events || log.bytes > limits.bytes || old(oldest.appended_at)
        };
        while let Some(dropped) = self.durable.drop_oldest_if(durable_too_much) {
            if let Some(id) = &dropped.id {
                self.ids.remove(id);
            }
        }
        self.latest.drop_oldest_while(|latest, oldest| {
            latest.by_offset.len() > limits.events || latest.bytes > limits.bytes || old(oldest.appended_at)
        });
        while self.latest_ids.len() > limits.events || self.latest_ids.front().is_some_and(|(at, _)| old(*at))
        {
            if let Some((_, id)) = self.latest_ids.pop_front() {
                self.ids.remove(&id);
            }
        }
    }

    /// Reads on behind `offset`: whether everything that matters is still kept, the records, and whether there are more.
    pub(super) fn read(&self, offset: Offset, limit: &PageLimit) -> (bool, Vec<Arc<Record>>, bool) {
        if offset >= self.recent.dropped_to {
            let (records, more) = self.take(self.recent.behind(offset), limit);
            return (true, records, more);
        }
        let complete = offset >= self.durable.dropped_to && offset >= self.latest.dropped_to;
        // What the exact log still has is exact there, too.
        let exact_from = self.recent.dropped_to;
        let mut durable =
            self.durable.behind(offset).take_while(|record| record.offset <= exact_from).peekable();
        let latest = self.latest.by_offset.range(offset + 1..).map(|(_, record)| record);
        let mut latest = latest.take_while(|record| record.offset <= exact_from).peekable();
        let merged = std::iter::from_fn(|| match (durable.peek(), latest.peek()) {
            (Some(first), Some(second)) if first.offset > second.offset => latest.next(),
            (Some(_), _) => durable.next(),
            (None, _) => latest.next(),
        });
        let (records, more) = self.take(merged.chain(&self.recent.records), limit);
        (complete, records, more)
    }

    fn take<'a>(
        &self,
        records: impl Iterator<Item = &'a Arc<Record>>,
        limit: &PageLimit,
    ) -> (Vec<Arc<Record>>, bool) {
        let mut taken: Vec<Arc<Record>> = Vec::new();
        let mut bytes = 0;
        for record in records.filter(|record| !limit.folded || !self.is_replaced(record)) {
            bytes += record.json().len();
            if taken.len() == limit.records || (bytes > limit.bytes && !taken.is_empty()) {
                return (taken, true);
            }
            taken.push(Arc::clone(record));
        }
        (taken, false)
    }

    /// Whether a newer event of the same key stands for this one.
    fn is_replaced(&self, record: &Record) -> bool {
        let newest = record.latest_key.as_ref().and_then(|key| self.latest.by_key.get(key));
        newest.is_some_and(|&newest| newest > record.offset)
    }
}
