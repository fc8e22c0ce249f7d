//! What a look found, held against what was announced. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    index::{Entry, Index},
    path::{Name, RelPath},
};

/// Something that a look found. What it could not see is no sight, and stays as it was.
#[derive(Clone, Debug)]
pub(crate) enum Sight {
    /// Nothing is there.
    Gone(RelPath),
    /// It is there, and not to be watched.
    Ignored(RelPath),
    File(RelPath, Entry),
    /// A folder, with everything that is in it.
    Folder {
        path: RelPath,
        files: Vec<(Name, Entry)>,
        /// Folders, and what could not be looked at.
        others: HashSet<Name>,
        ignored: HashSet<Name>,
    },
}

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) before: Option<Entry>,
    pub(crate) after: Option<Entry>,
    /// It is still there, and nobody is told of it any more.
    pub(crate) forgotten: bool,
}

/// Changes by path.
pub(crate) type Changes = BTreeMap<RelPath, Change>;

/// A comparison that is under way.
#[derive(Debug)]
pub(crate) struct Difference<'a> {
    index: &'a Index,
    /// Paths that the kernel told of as written to.
    written: &'a HashSet<RelPath>,
    changes: Changes,
}

impl<'a> Difference<'a> {
    pub(crate) fn new(index: &'a Index, written: &'a HashSet<RelPath>) -> Self {
        Self { index, written, changes: Changes::new() }
    }

    pub(crate) fn see(&mut self, sight: Sight) {
        match sight {
            Sight::Gone(path) => self.lose(&path, false),
            Sight::Ignored(path) => self.lose(&path, true),
            Sight::File(path, entry) => {
                // What was a folder.
                self.lose_within(&path, false);
                self.find(path, entry);
            }
            Sight::Folder { path, files, others, ignored } => {
                // What was a file.
                if let Some(before) = self.index.find(&path).copied().filter(|_| !path.is_root()) {
                    self.changes
                        .insert(path.clone(), Change { before: Some(before), after: None, forgotten: false });
                }
                self.see_folder(&path, files, &others, &ignored);
            }
        }
    }

    pub(crate) fn end(self) -> Changes {
        self.changes
    }

    fn see_folder(
        &mut self,
        folder: &RelPath,
        files: Vec<(Name, Entry)>,
        others: &HashSet<Name>,
        ignored: &HashSet<Name>,
    ) {
        let names: HashSet<Name> = files.iter().map(|(name, _)| name.clone()).collect();
        let folders = self.index.folders_of(folder);
        let lost = self.index.files_of(folder).map(|(name, _)| name).chain(&folders).cloned();
        let lost: Vec<Name> = lost.filter(|name| !names.contains(name) && !others.contains(name)).collect();
        for name in lost {
            self.lose(&folder.join(&name), ignored.contains(&name));
        }
        for (name, entry) in files {
            let path = folder.join(&name);
            self.lose_within(&path, false);
            self.find(path, entry);
        }
    }

    fn find(&mut self, path: RelPath, after: Entry) {
        let before = self.index.find(&path).copied();
        if before.is_none_or(|before| before.differs(&after, self.written.contains(&path))) {
            self.changes.insert(path, Change { before, after: Some(after), forgotten: false });
        } else {
            // An earlier sight of the same look may have been another.
            self.changes.remove(&path);
        }
    }

    fn lose(&mut self, path: &RelPath, forgotten: bool) {
        if let Some(before) = self.index.find(path).copied() {
            self.changes.insert(path.clone(), Change { before: Some(before), after: None, forgotten });
        } else {
            self.changes.remove(path);
        }
        self.lose_within(path, forgotten);
    }

    fn lose_within(&mut self, path: &RelPath, forgotten: bool) {
        let lost = self.index.files_in(path);
        self.changes.extend(
            lost.map(|(path, before)| (path, Change { before: Some(before), after: None, forgotten })),
        );
    }
}

/// Files that have another name now: the former name of each new one.
pub(crate) fn renames(changes: &Changes) -> BTreeMap<RelPath, RelPath> {
    let gone = changes.iter().filter(|(_, change)| change.after.is_none() && !change.forgotten);
    let mut by_inode: HashMap<u64, (&RelPath, Entry)> = gone
        .filter_map(|(path, change)| change.before.map(|before| (before.inode, (path, before))))
        .collect();
    let mut renames = BTreeMap::new();
    for (path, change) in changes.iter().filter(|(_, change)| change.before.is_none()) {
        let Some(after) = change.after else { continue };
        if by_inode.get(&after.inode).is_some_and(|(_, before)| before.is_same_file(&after))
            && let Some((former, _)) = by_inode.remove(&after.inode)
        {
            renames.insert(path.clone(), former.clone());
        }
    }
    renames
}
