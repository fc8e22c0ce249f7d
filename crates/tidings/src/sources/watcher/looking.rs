//! What a look does beside looking: it begins to listen in what it enters, tells what cannot be read, and passes on what it sees.

use std::{collections::BTreeSet, io, path::Path};

use super::{
    difference::{Difference, Sight},
    ledger::Ledger,
    listening::Listening,
    look::Witness,
    path::RelPath,
    stop::Stop,
};

/// Folders that cannot be read and were told of; then they are told of again.
const TOLD_MAX: usize = 10_000;

/// What every look does beside looking.
pub(super) struct Looking<'a> {
    listening: &'a mut Listening,
    unread: &'a mut BTreeSet<RelPath>,
    root: &'a Path,
    stop: &'a Stop,
    pub(super) is_stopped: bool,
    /// The watched folder itself could not be seen.
    pub(super) is_cut: bool,
}

impl<'a> Looking<'a> {
    pub(super) fn new(
        listening: &'a mut Listening,
        unread: &'a mut BTreeSet<RelPath>,
        root: &'a Path,
        stop: &'a Stop,
    ) -> Self {
        Self { listening, unread, root, stop, is_stopped: false, is_cut: false }
    }

    fn enter(&mut self, folder: &RelPath) -> bool {
        self.is_stopped |= self.stop.is_asked();
        if !self.is_stopped {
            self.listening.enter(self.root, folder);
        }
        !self.is_stopped
    }

    fn saw(&mut self, sight: &Sight) {
        match sight {
            Sight::Gone(path) | Sight::Ignored(path) => self.listening.leave(path),
            Sight::File(path, _) => {
                self.unread.remove(path);
            }
            Sight::Folder { path, others, ignored, .. } => {
                if self.unread.remove(path) {
                    tracing::info!(root = ?self.root, ?path, "can be read again");
                }
                self.listening.keep_only(path, others);
                for name in ignored {
                    self.listening.leave(&path.join(name));
                }
            }
        }
    }

    fn cannot_see(&mut self, path: &RelPath, error: &io::Error) {
        self.is_cut |= path.is_root();
        if self.unread.len() >= TOLD_MAX {
            self.unread.clear();
        }
        if self.unread.insert(path.clone()) {
            tracing::warn!(root = ?self.root, ?path, %error, "cannot be read; what was known of it is kept");
        }
    }
}

/// Takes what it sees as announced.
pub(super) struct Baseline<'a, 'b> {
    pub(super) looking: &'a mut Looking<'b>,
    pub(super) ledger: &'a mut Ledger,
}

impl Witness for Baseline<'_, '_> {
    fn enter(&mut self, folder: &RelPath) -> bool {
        self.looking.enter(folder)
    }

    fn see(&mut self, sight: Sight) {
        self.looking.saw(&sight);
        self.ledger.take_as_baseline(sight);
    }

    fn cannot_see(&mut self, path: &RelPath, error: &io::Error) {
        self.looking.cannot_see(path, error);
    }
}

/// Holds what it sees against what was announced.
pub(super) struct Comparison<'a> {
    pub(super) looking: Looking<'a>,
    pub(super) difference: Difference<'a>,
}

impl Witness for Comparison<'_> {
    fn enter(&mut self, folder: &RelPath) -> bool {
        self.looking.enter(folder)
    }

    fn see(&mut self, sight: Sight) {
        self.looking.saw(&sight);
        self.difference.see(sight);
    }

    fn cannot_see(&mut self, path: &RelPath, error: &io::Error) {
        self.looking.cannot_see(path, error);
    }
}
