//! Changes as events. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use tidings_protocol::ProjectId;

use super::{
    difference::{Change, Changes, renames},
    index::Entry,
    path::RelPath,
};

/// Paths that one `workspace.changed` lists; beyond, folders are counted.
const LISTED_MAX: usize = 1000;
/// The share of an event's bytes that paths may have, escaped: as much again for counts, and for what is around them.
const LISTED_SHARE: usize = 4;
/// Folders that are counted one by one; with more, those that lie in one are counted together.
const FOLDERS_MAX: usize = 200;

/// Which project a path belongs to.
#[derive(Clone, Debug)]
pub(crate) enum Belonging {
    /// All to this one.
    Project(ProjectId),
    /// To the one whose name the folder has.
    Folder,
}

/// How far announcing has come; kept with the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// A random number for as long as the state goes on.
    pub(crate) term: u64,
    /// Batches announced in it.
    pub(crate) batches: u64,
    /// The device that the watched folder is on.
    pub(crate) device: u64,
}

/// What is told of one project at once.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) changes: Changes,
    pub(crate) events: Vec<Value>,
}

/// Makes events of changes.
#[derive(Clone, Debug)]
pub(crate) struct Announcer {
    pub(crate) belonging: Belonging,
    /// Changes of one look that are told one by one.
    pub(crate) paths_max: usize,
    /// The largest event.
    pub(crate) bytes_max: usize,
}

impl Announcer {
    /// What has to be told, project by project. Each batch counts as one in `progress`: who repeats one after a crash repeats its
    /// ids, and no other batch ever has them.
    pub(crate) fn batches(&self, progress: Progress, changes: Changes) -> Vec<Batch> {
        let mut by_project: BTreeMap<RelPath, Changes> = BTreeMap::new();
        for (path, change) in changes {
            by_project.entry(self.folder_of(&path)).or_default().insert(path, change);
        }
        let numbered = (progress.batches..).zip(by_project);
        let batch = |(number, (folder, changes)): (u64, (RelPath, Changes))| {
            let events = match self.project_of(&folder) {
                Some(project) => {
                    let about = About { project, folder, stamp: format!("{}/{number}", progress.term) };
                    self.events(&about, &changes)
                }
                None => Vec::new(),
            };
            Batch { changes, events }
        };
        numbered.map(batch).collect()
    }

    fn folder_of(&self, path: &RelPath) -> RelPath {
        match self.belonging {
            Belonging::Project(_) => RelPath::root(),
            Belonging::Folder => path.parts().next().map(RelPath::stored).unwrap_or_default(),
        }
    }

    fn project_of(&self, folder: &RelPath) -> Option<ProjectId> {
        match &self.belonging {
            Belonging::Project(project) => Some(project.clone()),
            Belonging::Folder => ProjectId::try_from(std::str::from_utf8(folder.name()).ok()?).ok(),
        }
    }

    fn events(&self, about: &About, changes: &Changes) -> Vec<Value> {
        let told: Vec<_> = changes.iter().filter(|(_, change)| !change.forgotten).collect();
        if told.len() > self.paths_max {
            return vec![about.together(&told, self.bytes_max / LISTED_SHARE)];
        }
        let renamed_from = renames(changes);
        let renamed_to: BTreeMap<_, _> = renamed_from.iter().map(|(to, from)| (from, to)).collect();
        let mut events = Vec::new();
        for (path, change) in told {
            if let Some(to) = renamed_to.get(path) {
                events.push(about.renamed(path, change, "renamed_to", to));
                if let Some(arrival) = changes.get(*to) {
                    events.push(about.renamed(to, arrival, "renamed_from", path));
                }
            } else if !renamed_from.contains_key(path) {
                events.push(about.one(path, change));
            }
        }
        events
    }
}

/// Of what a batch tells.
struct About {
    project: ProjectId,
    folder: RelPath,
    /// What no other batch has.
    stamp: String,
}

impl About {
    fn renamed(&self, path: &RelPath, change: &Change, field: &str, other: &RelPath) -> Value {
        let mut event = self.one(path, change);
        event[field] = other.below(&self.folder).text().into();
        event
    }

    fn one(&self, path: &RelPath, change: &Change) -> Value {
        let within = path.below(&self.folder);
        let text = within.text();
        let mut event = match (change.before, change.after) {
            (None, Some(entry)) => {
                let name = String::from_utf8_lossy(path.name());
                json!({"type": "file.uploaded", "file": {"name": name, "path": text, "size": entry.size}})
            }
            (_, Some(entry)) => {
                json!({"type": "file.changed", "file_path": text, "change_type": "modified", "size": entry.size})
            }
            (_, None) => json!({"type": "file.deleted", "file_path": text}),
        };
        event["project_id"] = self.project.as_str().into();
        if std::str::from_utf8(&within.slashed()).is_err() {
            event["path_base64"] = BASE64_STANDARD.encode(within.slashed()).into();
        }
        event["id"] = self.id([(path, change)].into_iter()).into();
        event
    }

    fn together(&self, told: &[(&RelPath, &Change)], bytes_max: usize) -> Value {
        let mut lists = Map::new();
        for list in ["added", "modified", "deleted"] {
            lists.insert(list.to_owned(), Value::Array(Vec::new()));
        }
        let (mut listed, mut bytes) = (0, 0);
        for (path, change) in told {
            let text = Value::from(path.below(&self.folder).text());
            bytes += text.to_string().len() + 1;
            if listed == LISTED_MAX || bytes > bytes_max {
                break;
            }
            listed += 1;
            if let Some(list) = lists.get_mut(list_of(change)).and_then(Value::as_array_mut) {
                list.push(text);
            }
        }
        let project = self.project.as_str();
        let mut event = json!({"type": "workspace.changed", "workspace_id": project, "project_id": project,
            "changes": lists, "id": self.id(told.iter().copied())});
        if listed < told.len() {
            event["truncated"] = true.into();
            event["counts"] = counts(told, &self.folder, bytes_max);
        }
        event
    }

    /// Of this batch and these changes alone.
    fn id<'a>(&self, changes: impl Iterator<Item = (&'a RelPath, &'a Change)>) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.stamp);
        for (path, change) in changes {
            let packed = |entry: Option<Entry>| {
                entry.map_or([0xff; Entry::PACKED], |entry| Entry { fresh: false, ..entry }.pack())
            };
            hash.update((path.as_bytes().len() as u64).to_le_bytes());
            hash.update(path.as_bytes());
            hash.update(packed(change.before));
            hash.update(packed(change.after));
        }
        format!("watch:{}", hex(&hash.finalize()[..16]))
    }
}

/// Bytes as text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn list_of(change: &Change) -> &'static str {
    match (change.before, change.after) {
        (None, _) => "added",
        (_, Some(_)) => "modified",
        (_, None) => "deleted",
    }
}

/// Changes per folder, as deep as there is room for.
fn counts(told: &[(&RelPath, &Change)], project: &RelPath, bytes_max: usize) -> Value {
    let folder_at = |path: &RelPath, depth: usize| {
        let folder = path.below(project).parent();
        folder.parts().take(depth).fold(RelPath::root(), |folder, part| folder.join(part))
    };
    let depth_max = told.iter().map(|(path, _)| path.parts().count()).max().unwrap_or(0);
    let fits = |depth: &usize| {
        let folders: BTreeSet<_> = told.iter().map(|(path, _)| folder_at(path, *depth)).collect();
        let bytes: usize =
            folders.iter().map(|folder| Value::from(folder.text()).to_string().len() + 64).sum();
        folders.len() <= FOLDERS_MAX && bytes <= bytes_max
    };
    let depth = (0..=depth_max).rev().find(fits).unwrap_or(0);
    let mut counts: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
    for (path, change) in told {
        let folder = folder_at(path, depth);
        let folder = if folder.is_root() { ".".to_owned() } else { folder.text() };
        *counts.entry(folder).or_default().entry(list_of(change)).or_default() += 1;
    }
    json!(counts)
}

#[cfg(test)]
mod tests;
