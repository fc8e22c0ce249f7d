//! What is not watched: patterns of the settings, `.gitignore` files, and what editors and downloads leave for a moment. Knows no
//! file system.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::Path,
};

use ignore::{
    Match,
    gitignore::{Gitignore, GitignoreBuilder},
};
use tidings_protocol::ProjectId;

use super::path::RelPath;

/// What lasts for a moment, or is somebody's own: of version control, editors, downloads and desktops.
pub(crate) const TEMPORARY: [&str; 21] = [
    ".git/",
    ".hg/",
    ".svn/",
    ".jj/",
    "*.swp",
    "*.swo",
    "*.swx",
    "4913",
    "*~",
    ".#*",
    "\\#*#",
    "*.part",
    "*.crdownload",
    "*.partial",
    "*.download",
    ".~lock.*#",
    "*.kate-swp",
    ".nfs*",
    ".goutputstream-*",
    ".DS_Store",
    "Thumbs.db",
];

/// Folders that are told of as no projects; what comes after them is no news.
const TOLD_MAX: usize = 1000;

/// Whose patterns cannot be read.
pub(crate) type PatternError = ignore::Error;

/// What is watched and what is not.
#[derive(Debug)]
pub(crate) struct Rules {
    by_folder: bool,
    git: bool,
    /// Of the settings, and then those for what is temporary.
    fixed: [Gitignore; 2],
    only: Option<Gitignore>,
    /// The `.gitignore` of each folder that has one.
    found: BTreeMap<RelPath, Gitignore>,
    /// Folders that were told of as no projects.
    told: HashSet<RelPath>,
    /// What is written with each announcement: told of, it would never end.
    own: Option<RelPath>,
}

impl Rules {
    /// `by_folder`: patterns are about what is in each folder of the watched one.
    pub(crate) fn new(
        by_folder: bool,
        git: bool,
        temporary: bool,
        ignore: &[String],
        only: &[String],
    ) -> Result<Self, PatternError> {
        let temporary = if temporary { &TEMPORARY[..] } else { &[] };
        Ok(Self {
            by_folder,
            git,
            fixed: [patterns(ignore)?, patterns(temporary)?],
            only: if only.is_empty() { None } else { Some(patterns(only)?) },
            found: BTreeMap::new(),
            told: HashSet::new(),
            own: None,
        })
    }

    /// Leaves out a folder that is written to whenever something is announced.
    pub(crate) fn leave_out(&mut self, own: Option<RelPath>) {
        self.own = own;
    }

    /// Takes the `.gitignore` of a folder; empty: it has none.
    pub(crate) fn read(&mut self, folder: &RelPath, text: impl FnOnce() -> io::Result<Vec<u8>>) {
        if !self.git {
            return;
        }
        let text = match text() {
            Ok(text) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => {
                tracing::warn!(?folder, %error, "its .gitignore cannot be read; what was known of it holds on");
                return;
            }
        };
        // A line that is no pattern is none, as git has it.
        let mut builder = GitignoreBuilder::new("");
        for line in text.lines() {
            let _ = builder.add_line(None, line);
        }
        match builder.build() {
            Ok(rules) if !rules.is_empty() => self.found.insert(folder.clone(), rules),
            _ => self.found.remove(folder),
        };
    }

    /// Whether it is left out, by itself or with a folder that it is in.
    pub(crate) fn ignores(&mut self, path: &RelPath, is_folder: bool) -> bool {
        let folders: Vec<_> = path.folders().collect();
        folders.iter().any(|folder| self.ignores_here(folder, true)) || self.ignores_here(path, is_folder)
    }

    /// Whether it is left out, where its folder is not.
    pub(crate) fn ignores_here(&mut self, path: &RelPath, is_folder: bool) -> bool {
        if path.is_root() {
            return false;
        }
        if self.own.as_ref() == Some(path) {
            return true;
        }
        let mut within = path.clone();
        if self.by_folder {
            let project = path.folders().nth(1);
            let Some(project) = project else { return !is_folder || !self.is_project(path) };
            within = path.below(&project);
        }
        let within = within.to_path();
        let left_out = self.by_patterns(path, &within, is_folder);
        let wanted =
            |only: &Gitignore| is_folder || only.matched_path_or_any_parents(&within, false).is_ignore();
        left_out || !self.only.as_ref().is_none_or(wanted)
    }

    fn by_patterns(&self, path: &RelPath, within: &Path, is_folder: bool) -> bool {
        let mut answers = self.fixed.iter().map(|rules| decided(rules, within, is_folder));
        if let Some(ignored) = answers.find_map(|answer| answer) {
            return ignored;
        }
        if self.found.is_empty() {
            return false;
        }
        let folders: Vec<_> = path.folders().collect();
        let by_found =
            |folder: &RelPath| decided(self.found.get(folder)?, &path.below(folder).to_path(), is_folder);
        folders.iter().rev().find_map(by_found).unwrap_or(false)
    }

    /// A folder whose name is no id cannot be a project.
    fn is_project(&mut self, folder: &RelPath) -> bool {
        let name = std::str::from_utf8(folder.name());
        let reason = match name.map(ProjectId::try_from) {
            Ok(Ok(_)) => return !decided(&self.fixed[1], &folder.to_path(), true).unwrap_or(false),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        if self.told.len() < TOLD_MAX && self.told.insert(folder.clone()) {
            tracing::warn!(
                ?folder,
                reason,
                "its name cannot be the id of a project, so it is left out; rename it"
            );
        }
        false
    }
}

/// Patterns as `.gitignore` has them.
pub(crate) fn patterns(lines: &[impl AsRef<str>]) -> Result<Gitignore, PatternError> {
    let mut builder = GitignoreBuilder::new("");
    for line in lines {
        builder.add_line(None, line.as_ref())?;
    }
    builder.build()
}

fn decided(rules: &Gitignore, path: &Path, is_folder: bool) -> Option<bool> {
    match rules.matched(path, is_folder) {
        Match::None => None,
        Match::Ignore(_) => Some(true),
        Match::Whitelist(_) => Some(false),
    }
}
