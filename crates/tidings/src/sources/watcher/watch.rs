//! Watches one table's folder on a thread of its own: hears, looks, compares, announces, keeps. Knows the kernel, the files and
//! the state only by what they answer; where events go, its [`Sink`] knows.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use serde_json::Value;
use tidings_protocol::Gap;
use tokio::time::Instant;

use super::{
    announce::{Announcer, Batch, Progress},
    difference::Changes,
    dirty::Timing,
    index::Index,
    ledger::{Due, Ledger},
    listening::{Listening, Polling},
    look::{Disk, look, look_into, wall_ns},
    looking::{Baseline, Comparison, Looking},
    path::RelPath,
    rules::Rules,
    state::Store,
    stop::Stop,
};

/// Before events that were not taken are announced again; twice as long each time, up to a limit.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(4);
/// How often it is looked whether a folder that is missing has come back.
const OUTAGE_PAUSE: Duration = Duration::from_secs(1);
/// How often a state that cannot be kept is tried again: all of it is written then.
const KEEP_PAUSE_MS: u64 = 10_000;
/// What the kernel tells is gathered for so long: whoever writes much would wake us for each piece.
const GATHER_PAUSE: Duration = Duration::from_millis(5);

/// What became of events.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// They are announced, or will never be: the reason was told.
    Taken,
    /// None was, and none will be by itself.
    NotTaken(String),
    /// Maybe they were: the same have to be sent again.
    Unknown(String),
}

/// Where events go, and who is told how it is.
pub(crate) trait Sink {
    /// Events of one project, in order.
    fn announce(&mut self, events: &[Value]) -> Outcome;
    /// What happens to files is heard again, after an outage with this outcome; or not any more.
    fn heard(&mut self, gap: Option<Gap>);
}

/// What is watched, and how.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) root: PathBuf,
    pub(crate) announcer: Announcer,
    pub(crate) by_folder: bool,
    pub(crate) timing: Timing,
    pub(crate) polling: Polling,
    pub(crate) files_max: usize,
}

/// It was asked to stop.
struct Stopped;

/// See the module.
pub(crate) struct Watch<S> {
    plan: Plan,
    disk: Disk,
    rules: Rules,
    listening: Listening,
    ledger: Ledger,
    progress: Progress,
    store: Box<dyn Store>,
    /// The state is older than what was announced.
    is_unkept: bool,
    keep_again_at: u64,
    told_unkept: bool,
    retry_pause: Duration,
    sink: S,
    clock: Instant,
    /// Folders that cannot be read.
    unread: BTreeSet<RelPath>,
    was_full: bool,
}

impl<S: Sink> Watch<S> {
    pub(crate) fn new(plan: Plan, rules: Rules, store: Box<dyn Store>, sink: S) -> Self {
        let ledger = Ledger::new(Index::default(), plan.timing, plan.by_folder, plan.files_max);
        let listening = Listening::new(&plan.root, plan.polling);
        let progress = Progress { term: fastrand::u64(..), batches: 0, device: 0 };
        let (disk, unread) = (Disk { root: plan.root.clone() }, BTreeSet::new());
        let clock = Instant::now();
        Self {
            plan,
            disk,
            rules,
            listening,
            ledger,
            progress,
            store,
            is_unkept: false,
            keep_again_at: 0,
            told_unkept: false,
            retry_pause: RETRY_PAUSE,
            sink,
            clock,
            unread,
            was_full: false,
        }
    }

    /// Watches until it is asked to stop. What was not announced by then is found at the next start.
    pub(crate) fn run(mut self, stop: &Stop) {
        if !self.await_folder(stop) || !self.begin(stop) {
            return;
        }
        self.heard_again(Gap::None);
        while !stop.is_asked() {
            self.hear();
            if self.is_absent() {
                self.sink.heard(None);
                if !self.await_folder(stop) {
                    return;
                }
                self.listening.begin_anew();
                self.ledger.touch_everything(self.now());
                self.look_at_due(stop, true);
                self.heard_again(Gap::Recovered);
            }
            self.look_at_due(stop, false);
            let now = self.now();
            let next = [
                self.ledger.next_due(),
                self.listening.next_poll(),
                self.is_unkept.then_some(self.keep_again_at),
            ];
            let wait =
                next.into_iter().flatten().min().map(|at| Duration::from_millis(at.saturating_sub(now)));
            stop.wait_for(self.listening.queue(), wait);
            stop.wait(GATHER_PAUSE);
        }
    }

    /// Unless something else is still not heard of.
    fn heard_again(&mut self, gap: Gap) {
        if !self.was_full {
            self.sink.heard(Some(gap));
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether the watched folder is missing, or lies empty where its file system was: taken away, not emptied.
    fn is_absent(&self) -> bool {
        match self.disk.device() {
            Err(_) => true,
            Ok(device) => {
                let moved = self.progress.device != 0 && device != self.progress.device;
                moved && self.ledger.index().len() > 0 && self.is_empty()
            }
        }
    }

    fn is_empty(&self) -> bool {
        use super::look::Files as _;
        self.disk.list(&RelPath::root()).is_ok_and(|names| names.is_empty())
    }

    /// Waits for the folder to be there; `false`: it was asked to stop.
    fn await_folder(&mut self, stop: &Stop) -> bool {
        if !self.is_absent() {
            return true;
        }
        let path = &self.plan.root;
        tracing::warn!(
            ?path,
            "the watched folder is missing or may not be read, or its file system is gone; nothing is taken as deleted until it is back"
        );
        while self.is_absent() {
            if stop.wait(OUTAGE_PAUSE) {
                return false;
            }
        }
        tracing::info!(path = ?self.plan.root, "the watched folder is there");
        true
    }

    /// Takes up what was kept, or takes what there is as announced; `false`: it was asked to stop.
    fn begin(&mut self, stop: &Stop) -> bool {
        let Ok(kept) = self.load(stop) else { return false };
        let path = self.plan.root.clone();
        let begun = if let Some((index, progress)) = kept {
            tracing::info!(
                ?path,
                files = index.len(),
                "watching; what changed since the last time is announced"
            );
            self.take_up(index, progress, stop)
        } else {
            let taken = self.take_baseline(stop);
            let files = self.ledger.index().len();
            tracing::info!(?path, files, "watching; what is there now is the baseline");
            taken
        };
        if begun {
            self.keep_all();
            self.tell_if_full();
        }
        begun
    }

    /// What was kept, if anything was.
    fn load(&mut self, stop: &Stop) -> Result<Option<(Index, Progress)>, Stopped> {
        let mut was_told = false;
        loop {
            let error = match self.store.load() {
                Ok(kept) => return Ok(kept),
                Err(error) => error,
            };
            let path = &self.plan.root;
            if !error.may_pass() {
                tracing::error!(?path, %error, "what was announced cannot be read; what is there now counts as announced");
                return Ok(None);
            }
            if !std::mem::replace(&mut was_told, true) {
                tracing::warn!(?path, %error, "what was announced cannot be read yet; trying again");
            }
            if stop.wait(OUTAGE_PAUSE) {
                return Err(Stopped);
            }
        }
    }

    fn take_up(&mut self, index: Index, progress: Progress, stop: &Stop) -> bool {
        self.ledger = Ledger::new(index, self.plan.timing, self.plan.by_folder, self.plan.files_max);
        self.progress = progress;
        if !self.await_folder(stop) {
            return false;
        }
        // Kept as a whole at the end of this.
        (self.is_unkept, self.keep_again_at) = (true, u64::MAX);
        self.ledger.touch_everything(self.now());
        self.look_at_due(stop, true);
        true
    }

    fn take_baseline(&mut self, stop: &Stop) -> bool {
        loop {
            self.progress.device = self.disk.device().unwrap_or_default();
            let mut looking = Looking::new(&mut self.listening, &mut self.unread, &self.plan.root, stop);
            let mut baseline = Baseline { looking: &mut looking, ledger: &mut self.ledger };
            look_into(&self.disk, &mut self.rules, &RelPath::root(), &mut baseline);
            let (is_stopped, is_cut) = (looking.is_stopped, looking.is_cut);
            if is_stopped || !is_cut {
                return !is_stopped;
            }
            if stop.wait(OUTAGE_PAUSE) || !self.await_folder(stop) {
                return false;
            }
        }
    }

    /// Takes in what the kernel tells, and when it is time to poll.
    fn hear(&mut self) {
        let now = self.now();
        if self.listening.hear(now, &mut self.ledger) {
            self.sink.heard(None);
            tracing::warn!(
                path = ?self.plan.root,
                "more happened at once than the kernel keeps for a watcher, so everything is compared; raise fs.inotify.max_queued_events"
            );
            self.ledger.touch_everything(now);
            self.heard_again(Gap::Recovered);
        }
    }

    /// Looks at what is due, announces what became of it, and keeps that. `at_once`: whether it is due or not.
    fn look_at_due(&mut self, stop: &Stop, at_once: bool) {
        let now = self.now();
        let Some(due) = self.ledger.take_due(if at_once { u64::MAX } else { now }) else {
            if self.is_unkept && now >= self.keep_again_at {
                self.keep_all();
            }
            return;
        };
        let found = self.compare(&due, stop);
        let Some(found) = found else {
            self.ledger.touch_everything(now);
            return;
        };
        let changes = self.ledger.settle(self.now(), wall_ns(), &due, found);
        let batches = self.plan.announcer.batches(self.progress, changes);
        for (number, batch) in batches.iter().enumerate() {
            if !self.announce(batch, stop) {
                for batch in &batches[number..] {
                    self.ledger.not_announced(self.now(), &batch.changes);
                }
                self.pause(stop);
                return;
            }
        }
        self.tell_if_full();
        self.listening.looked(now, self.now());
    }

    fn compare(&mut self, due: &Due, stop: &Stop) -> Option<Changes> {
        let difference = self.ledger.compare(&due.written);
        let looking = Looking::new(&mut self.listening, &mut self.unread, &self.plan.root, stop);
        let mut comparison = Comparison { looking, difference };
        for path in due.folders.iter().chain(&due.paths) {
            look(&self.disk, &mut self.rules, path, &mut comparison);
        }
        let Comparison { looking, difference } = comparison;
        let (is_cut, changes) = (looking.is_stopped || looking.is_cut, difference.end());
        // A folder that went while it was looked at is an outage, and no deletion.
        if is_cut || self.is_absent() {
            return None;
        }
        self.progress.device = self.disk.device().unwrap_or(self.progress.device);
        Some(changes)
    }

    /// Announces a batch and keeps that it is; `false`: it is not announced.
    fn announce(&mut self, batch: &Batch, stop: &Stop) -> bool {
        if stop.is_asked() {
            // Another node may watch already.
            return false;
        }
        let mut was_told = false;
        while !batch.events.is_empty() {
            match self.sink.announce(&batch.events) {
                Outcome::Taken => break,
                Outcome::NotTaken(reason) => {
                    tracing::debug!(path = ?self.plan.root, reason, "changes cannot be announced now");
                    return false;
                }
                Outcome::Unknown(reason) => {
                    if !std::mem::replace(&mut was_told, true) {
                        tracing::warn!(path = ?self.plan.root, reason, "changes may not have been announced; trying again");
                    }
                    if self.pause(stop) {
                        return false;
                    }
                }
            }
        }
        self.retry_pause = RETRY_PAUSE;
        let now = self.now();
        self.ledger.announced(now, &batch.changes);
        self.progress.batches += 1;
        self.keep(&batch.changes);
        true
    }

    fn pause(&mut self, stop: &Stop) -> bool {
        let pause = self.retry_pause;
        self.retry_pause = (pause * 2).min(RETRY_PAUSE_MAX);
        stop.wait(pause)
    }

    fn keep(&mut self, changes: &Changes) {
        if self.is_unkept {
            if self.now() >= self.keep_again_at {
                self.keep_all();
            }
        } else if let Err(error) = self.store.add(self.ledger.index(), changes, self.progress) {
            self.tell_unkept(&error);
        }
    }

    fn keep_all(&mut self) {
        match self.store.replace(self.ledger.index(), self.progress) {
            Ok(()) => {
                if std::mem::replace(&mut self.is_unkept, false)
                    && std::mem::replace(&mut self.told_unkept, false)
                {
                    tracing::info!(path = ?self.plan.root, "what was announced is kept again");
                }
            }
            Err(error) => self.tell_unkept(&error),
        }
    }

    fn tell_unkept(&mut self, error: &super::state::StateError) {
        (self.is_unkept, self.keep_again_at) = (true, self.now() + KEEP_PAUSE_MS);
        if std::mem::replace(&mut self.told_unkept, true) {
            return;
        }
        tracing::error!(
            path = ?self.plan.root, %error,
            "what was announced cannot be kept; it is announced all the same, and after a restart maybe again"
        );
    }

    fn tell_if_full(&mut self) {
        let is_full = self.ledger.is_full();
        if is_full == std::mem::replace(&mut self.was_full, is_full) {
            return;
        }
        if is_full {
            tracing::error!(
                path = ?self.plan.root, files_max = self.plan.files_max,
                "there are more files than are watched in one folder; the others are not announced: leave some out with `ignore`"
            );
            self.sink.heard(None);
        } else {
            self.heard_again(Gap::Recovered);
        }
    }
}

#[cfg(test)]
mod tests;
