//! What was announced, what was touched since, and which changes are ready to be told. Pure: what the kernel and the file system
//! say is passed in, and the time.

use std::collections::{HashMap, HashSet};

use super::{
    difference::{Change, Changes, Difference, Sight, renames},
    dirty::{Dirty, Mark, Timing},
    index::{Entry, Index},
    path::RelPath,
};

/// A new file has settled when its writer has closed it, or has left it alone for so long: longer than a stalled line usually
/// pauses an upload, short enough for a writer that never closes.
pub(crate) const SETTLE_MS: u64 = 3000;
/// A new file that never settles is announced after this: who keeps a log open for ever still has a file.
const SETTLE_MS_MAX: u64 = 3_600_000;
/// New files whose writers are followed; of others, their times tell whether they have settled.
const WRITERS_MAX: usize = 100_000;
/// With more changes at once, none of the files is one that is written to all the time.
const BUSY_MAX: usize = 10_000;
const NS_PER_MS: i64 = 1_000_000;

/// What the kernel tells of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// A file is there that its maker has open.
    Created,
    Written,
    /// Whoever wrote it has closed it.
    Closed,
    /// It came from elsewhere, whole.
    Placed,
    /// It went, or its attributes changed.
    Other,
    /// A folder: everything in it.
    Folder,
}

/// What is known of the writing of a file that is not announced yet.
#[derive(Clone, Copy, Debug)]
struct Writer {
    since: u64,
    last: u64,
    closed: bool,
    /// What the last look found: size and time.
    seen: Option<(u64, i64)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ledger {
    index: Index,
    dirty: Dirty,
    timing: Timing,
    writers: HashMap<RelPath, Writer>,
    /// When files were announced that may be written to all the time.
    announced_at: HashMap<RelPath, u64>,
    files_max: usize,
    is_full: bool,
}

/// What has to be looked at.
#[derive(Debug, Default)]
pub(crate) struct Due {
    /// With everything in them; none is in another.
    pub(crate) folders: Vec<RelPath>,
    pub(crate) paths: Vec<RelPath>,
    pub(crate) written: HashSet<RelPath>,
}

impl Ledger {
    pub(crate) fn new(index: Index, timing: Timing, by_folder: bool, files_max: usize) -> Self {
        Self {
            index,
            dirty: Dirty::new(timing, by_folder),
            timing,
            writers: HashMap::new(),
            announced_at: HashMap::new(),
            files_max,
            is_full: false,
        }
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// Whether files are left out, because there are too many.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full
    }

    /// The kernel told of a path.
    pub(crate) fn touch(&mut self, now: u64, path: RelPath, touch: Touch) {
        let is_new = touch != Touch::Folder && self.index.find(&path).is_none();
        match touch {
            Touch::Created | Touch::Written if is_new => self.write_new(now, path),
            Touch::Closed | Touch::Placed if is_new => {
                self.note_writer(now, &path).closed = true;
                self.dirty.mark(now, path, Mark::default());
            }
            Touch::Written => self.write_known(now, path),
            Touch::Folder => self.dirty.mark(now, path, Mark { deep: true, written: false }),
            _ => self.dirty.mark(now, path, Mark::default()),
        }
    }

    /// Anything may have happened.
    pub(crate) fn touch_everything(&mut self, now: u64) {
        self.dirty.mark_everything(now);
    }

    fn write_new(&mut self, now: u64, path: RelPath) {
        let writer = self.note_writer(now, &path);
        (writer.closed, writer.last) = (false, now);
        self.dirty.mark_later(now, path, now + SETTLE_MS);
    }

    fn note_writer(&mut self, now: u64, path: &RelPath) -> &mut Writer {
        if self.writers.len() >= WRITERS_MAX && !self.writers.contains_key(path) {
            self.writers.clear();
        }
        self.writers.entry(path.clone()).or_insert(Writer {
            since: now,
            last: now,
            closed: false,
            seen: None,
        })
    }

    /// One that is written to all the time does not keep others from being quiet, and is told of now and then.
    fn write_known(&mut self, now: u64, path: RelPath) {
        match self.announced_at.get(&path) {
            Some(at) if now < at + self.timing.wait_ms_max => {
                let at = at + self.timing.wait_ms_max;
                self.dirty.mark_later(now, path, at);
            }
            _ => self.dirty.mark(now, path, Mark { deep: false, written: true }),
        }
    }

    /// When there is something to look at.
    pub(crate) fn next_due(&self) -> Option<u64> {
        self.dirty.next_due()
    }

    /// Takes what has to be looked at now.
    pub(crate) fn take_due(&mut self, now: u64) -> Option<Due> {
        let marks = self.dirty.take_due(now);
        if marks.is_empty() {
            return None;
        }
        let mut due = Due::default();
        for (path, mark) in marks {
            if mark.written {
                due.written.insert(path.clone());
            }
            // Sorted, what is in a folder follows right behind it.
            if due.folders.last().is_some_and(|folder| path.is_in(folder)) {
                continue;
            }
            if mark.deep { due.folders.push(path) } else { due.paths.push(path) }
        }
        let kept = self.timing.wait_ms_max;
        self.announced_at.retain(|_, at| now < *at + kept);
        Some(due)
    }

    /// Begins to compare.
    pub(crate) fn compare<'a>(&'a self, written: &'a HashSet<RelPath>) -> Difference<'a> {
        Difference::new(&self.index, written)
    }

    /// Takes what there is as announced, without a word: the first sight.
    pub(crate) fn take_as_baseline(&mut self, sight: Sight) -> Changes {
        let nothing = HashSet::new();
        let mut difference = Difference::new(&self.index, &nothing);
        difference.see(sight);
        let mut changes = difference.end();
        self.leave_out_what_is_too_much(&mut changes);
        self.put(&changes);
        changes
    }

    /// Takes out new files that have not settled, to be looked at again, and those that there is no room for.
    pub(crate) fn settle(&mut self, now: u64, wall_ns: i64, due: &Due, mut changes: Changes) -> Changes {
        let index = &self.index;
        self.writers.retain(|path, _| {
            let was_looked_at =
                due.paths.binary_search(path).is_ok() || due.folders.iter().any(|folder| path.is_in(folder));
            !was_looked_at || changes.contains_key(path) || index.find(path).is_some()
        });
        let renamed: HashSet<_> = renames(&changes).into_keys().collect();
        let arrivals = changes.iter().filter(|(_, change)| change.before.is_none());
        let unsettled: Vec<RelPath> = arrivals
            .filter_map(|(path, change)| Some((path, change.after?)))
            .filter(|(path, entry)| {
                !renamed.contains(*path) && !has_settled(&mut self.writers, path, entry, now, wall_ns)
            })
            .map(|(path, _)| path.clone())
            .collect();
        for path in unsettled {
            changes.remove(&path);
            self.note_unsettled(now, path);
        }
        self.leave_out_what_is_too_much(&mut changes);
        changes
    }

    fn note_unsettled(&mut self, now: u64, path: RelPath) {
        let at = self.note_writer(now, &path).last + SETTLE_MS;
        self.dirty.mark_later(now, path, at.max(now + 1));
    }

    fn leave_out_what_is_too_much(&mut self, changes: &mut Changes) {
        let mut room = self.files_max.saturating_sub(self.index.len());
        let before = changes.len();
        changes.retain(|_, change| {
            let is_new = change.before.is_none();
            let fits = !is_new || room > 0;
            room -= usize::from(is_new && fits);
            fits
        });
        self.is_full |= changes.len() < before;
    }

    /// The changes were announced.
    pub(crate) fn announced(&mut self, now: u64, changes: &Changes) {
        let was_full = self.is_full;
        self.put(changes);
        for (path, change) in changes {
            self.writers.remove(path);
            if change.after.is_some() && changes.len() <= BUSY_MAX {
                self.announced_at.insert(path.clone(), now);
            }
        }
        // A tenth, so that it does not begin anew with each file.
        if was_full && self.index.len() < self.files_max - self.files_max / 10 {
            self.is_full = false;
            self.touch_everything(now);
        }
    }

    /// The changes were not announced, and are looked at again.
    pub(crate) fn not_announced(&mut self, now: u64, changes: &Changes) {
        for path in changes.keys() {
            self.dirty.mark(now, path.clone(), Mark { deep: false, written: true });
        }
    }

    fn put(&mut self, changes: &Changes) {
        for (path, Change { after, .. }) in changes {
            match after {
                Some(entry) => self.index.put(path, *entry),
                None => self.index.remove(path),
            }
        }
    }
}

fn has_settled(
    writers: &mut HashMap<RelPath, Writer>,
    path: &RelPath,
    entry: &Entry,
    now: u64,
    wall_ns: i64,
) -> bool {
    let settle_ns = i64::try_from(SETTLE_MS).unwrap_or(i64::MAX).saturating_mul(NS_PER_MS);
    let Some(writer) = writers.get_mut(path) else {
        // Nobody told of its writing. Its times do, if the clocks agree; else another look does.
        let is_old = wall_ns.saturating_sub(entry.changed_ns) >= settle_ns;
        if !is_old {
            let seen = Some((entry.size, entry.modified_ns));
            writers.insert(path.clone(), Writer { since: now, last: now, closed: false, seen });
        }
        return is_old;
    };
    let seen = Some((entry.size, entry.modified_ns));
    if writer.closed || now >= writer.since + SETTLE_MS_MAX {
        return true;
    }
    if writer.seen != seen {
        if writer.seen.is_some() {
            writer.last = now;
        }
        writer.seen = seen;
        return false;
    }
    now >= writer.last + SETTLE_MS
}

#[cfg(test)]
mod tests;
