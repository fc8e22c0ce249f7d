//! Which paths have to be looked at, and when. Pure: time is passed in, in milliseconds of any clock that only goes forward.

use std::collections::{BTreeMap, HashMap};

use super::path::RelPath;

/// Paths that are kept one by one. More than a burst touches within its longest wait on one machine; above, everything is
/// compared, which costs less than the memory.
const PATHS_MAX: usize = 200_000;

/// When what was touched is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Nothing was touched for so long.
    pub(crate) quiet_ms: u64,
    /// Or something waits for so long.
    pub(crate) wait_ms_max: u64,
}

/// How to look at a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    /// With everything in it.
    pub(crate) deep: bool,
    /// The kernel told of writing.
    pub(crate) written: bool,
}

/// What was touched in one project and waits together.
#[derive(Debug)]
struct Batch {
    first: u64,
    last: u64,
    paths: BTreeMap<RelPath, Mark>,
}

/// Everything that was touched.
#[derive(Debug)]
pub(crate) struct Dirty {
    timing: Timing,
    /// Whether each folder of the watched one is a project.
    by_folder: bool,
    batches: HashMap<RelPath, Batch>,
    /// Paths that are looked at at their own time: busy ones, and those that have not settled.
    later: HashMap<RelPath, u64>,
    paths: usize,
}

impl Dirty {
    pub(crate) fn new(timing: Timing, by_folder: bool) -> Self {
        Self { timing, by_folder, batches: HashMap::new(), later: HashMap::new(), paths: 0 }
    }

    /// The path has to be looked at soon.
    pub(crate) fn mark(&mut self, now: u64, path: RelPath, mark: Mark) {
        if self.paths + self.later.len() >= PATHS_MAX && !path.is_root() {
            self.mark_everything(now);
            return;
        }
        self.later.remove(&path);
        let project = if self.by_folder { path.parts().next().map(RelPath::stored) } else { None };
        let batch = self.batches.entry(project.unwrap_or_default());
        let batch = batch.or_insert_with(|| Batch { first: now, last: now, paths: BTreeMap::new() });
        batch.last = now;
        let before = batch.paths.len();
        let known = batch.paths.entry(path).or_default();
        known.deep |= mark.deep;
        known.written |= mark.written;
        self.paths += batch.paths.len() - before;
    }

    /// Everything has to be looked at.
    pub(crate) fn mark_everything(&mut self, now: u64) {
        self.batches.clear();
        self.later.clear();
        self.paths = 0;
        self.mark(now, RelPath::root(), Mark { deep: true, written: false });
    }

    /// The path is looked at then, unless it is marked before.
    pub(crate) fn mark_later(&mut self, now: u64, path: RelPath, at: u64) {
        if self.paths + self.later.len() >= PATHS_MAX {
            self.mark_everything(now);
        } else {
            self.later.insert(path, at);
        }
    }

    /// Takes what has to be looked at now.
    pub(crate) fn take_due(&mut self, now: u64) -> BTreeMap<RelPath, Mark> {
        let everything = self.batches.get(&RelPath::root()).is_some_and(|batch| {
            self.due_at(batch) <= now && batch.paths.get(&RelPath::root()).is_some_and(|mark| mark.deep)
        });
        let due = self.batches.iter().filter(|(_, batch)| everything || self.due_at(batch) <= now);
        let due: Vec<_> = due.map(|(project, _)| project.clone()).collect();
        let mut paths = BTreeMap::new();
        for project in due {
            let Some(batch) = self.batches.remove(&project) else { continue };
            self.paths -= batch.paths.len();
            paths.extend(batch.paths);
        }
        for (path, _) in self.later.extract_if(|_, at| *at <= now) {
            // Late, because it was written to all the time.
            paths.entry(path).or_insert(Mark { deep: false, written: true });
        }
        paths
    }

    /// When something is due next.
    pub(crate) fn next_due(&self) -> Option<u64> {
        let batches = self.batches.values().map(|batch| self.due_at(batch));
        batches.chain(self.later.values().copied()).min()
    }

    fn due_at(&self, batch: &Batch) -> u64 {
        (batch.last + self.timing.quiet_ms).min(batch.first + self.timing.wait_ms_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing { quiet_ms: 300, wait_ms_max: 2000 };

    fn path(text: &str) -> RelPath {
        text.split('/').fold(RelPath::root(), |path, part| path.join(part.as_bytes()))
    }

    #[test]
    fn a_project_is_looked_at_when_it_is_quiet_or_has_waited_long_and_no_project_waits_for_another() {
        let mut dirty = Dirty::new(TIMING, true);
        dirty.mark(0, path("calm/a"), Mark::default());
        for now in (0..1900).step_by(100) {
            dirty.mark(now, path("busy/b"), Mark::default());
        }
        assert_eq!(dirty.next_due(), Some(300));
        assert!(dirty.take_due(299).is_empty());
        assert!(dirty.take_due(300).into_keys().eq([path("calm/a")]));
        assert_eq!(dirty.next_due(), Some(2000));
        assert!(dirty.take_due(2000).into_keys().eq([path("busy/b")]));
        assert_eq!((dirty.next_due(), dirty.paths), (None, 0));
    }

    #[test]
    fn what_is_for_later_waits_for_its_time_unless_it_is_marked() {
        let mut dirty = Dirty::new(TIMING, false);
        dirty.mark_later(0, path("a"), 5000);
        dirty.mark_later(0, path("b"), 4000);
        dirty.mark(0, path("b"), Mark::default());
        assert!(dirty.take_due(300).into_keys().eq([path("b")]));
        assert!(dirty.take_due(4999).is_empty());
        assert!(dirty.take_due(5000).into_keys().eq([path("a")]));
    }

    #[test]
    fn too_many_paths_become_one_look_at_everything() {
        let mut dirty = Dirty::new(TIMING, false);
        for number in 0..=PATHS_MAX {
            dirty.mark(0, path(&number.to_string()), Mark::default());
        }
        let due = dirty.take_due(300);
        assert_eq!(due.get(&RelPath::root()), Some(&Mark { deep: true, written: false }));
        assert_eq!((due.len(), dirty.paths), (1, 0));
    }
}
