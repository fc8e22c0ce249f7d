//! Folders to watch: `[[watch]]` in the file, or the same as JSON in `TIDINGS_WATCH`. What is wrong is named by its place.

use std::{ops::RangeInclusive, path::PathBuf};

use serde_json::{Map, Value};
use tidings_protocol::ProjectId;

use super::{
    Layers, SettingError,
    tables::{self, Wrong, strings},
};
use crate::sources::watcher::check_patterns;

/// The setting that has them.
const NAME: &str = "TIDINGS_WATCH";

/// Each has a thread.
const TABLES_MAX: usize = 100;
const PATTERNS_MAX: usize = 1000;
/// Below, an editor's two steps come apart; above, nobody calls it live.
const QUIET_MS: RangeInclusive<u64> = 10..=60_000;
const WAIT_MS: RangeInclusive<u64> = 10..=600_000;
/// A request has room for 1000 events.
const PATHS: RangeInclusive<u64> = 1..=1000;
const POLL_SECONDS: RangeInclusive<u64> = 1..=3600;
const FIELDS: [&str; 12] = [
    "path",
    "project",
    "ignore",
    "ignore_temporary",
    "only",
    "gitignore",
    "quiet_ms",
    "wait_ms_max",
    "paths_max",
    "poll",
    "poll_seconds",
    "local",
];

/// Whose files they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchProject {
    /// This project's.
    Id(ProjectId),
    /// Those in a folder are the project's that has the folder's name.
    Folder,
}

/// A folder to watch.
#[derive(Clone, Debug)]
pub struct WatchSettings {
    /// The folder; with [`WatchProject::Folder`] the one that has the projects' folders.
    pub path: PathBuf,
    /// Whose files they are.
    pub project: WatchProject,
    /// Patterns of what is left out, as `.gitignore` has them.
    pub ignore: Vec<String>,
    /// Whether what editors and downloads leave for a moment is left out.
    pub ignore_temporary: bool,
    /// Patterns of what is not left out; none: everything.
    pub only: Vec<String>,
    /// Whether `.gitignore` files count.
    pub gitignore: bool,
    /// What changed is told when nothing has changed for so long.
    pub quiet_ms: u64,
    /// Or when it has waited for so long.
    pub wait_ms_max: u64,
    /// More changes at once are told as one.
    pub paths_max: usize,
    /// Whether to look now and then, and not to listen; `None`: where listening is known not to work.
    pub poll: Option<bool>,
    /// How often; `None`: by how long it takes.
    pub poll_seconds: Option<u64>,
    /// Whether it is a folder of this node alone.
    pub local: bool,
}

impl WatchSettings {
    /// A folder with everything else as it is where nothing is said. A `path` that ends in `/*` is of projects' folders.
    pub fn new(path: &str, project: Option<ProjectId>) -> Result<Self, &'static str> {
        let (path, project) = match (path.strip_suffix("/*"), project) {
            (Some(_), Some(_)) => {
                return Err(
                    "ends in `/*`, so that each folder is a project, and `project` names one; expected one of the two",
                );
            }
            (Some(folder), None) => (if folder.is_empty() { "/" } else { folder }, WatchProject::Folder),
            (None, Some(project)) => (path, WatchProject::Id(project)),
            (None, None) => {
                return Err(
                    "expected a `project` beside it, or `/*` at its end: each folder is then the project of its name",
                );
            }
        };
        let path = if path == "/" { path } else { path.trim_end_matches('/') };
        if path.is_empty() || path.contains('*') {
            return Err("expected a folder, with `*` only as its last part");
        }
        Ok(Self {
            path: path.into(),
            project,
            ignore: Vec::new(),
            ignore_temporary: true,
            only: Vec::new(),
            gitignore: true,
            quiet_ms: 300,
            wait_ms_max: 2000,
            paths_max: 100,
            poll: None,
            poll_seconds: None,
            local: false,
        })
    }

    /// Whether some file would be told of by both to the same project.
    fn shares_files_with(&self, other: &Self) -> bool {
        let (outer, inner) = if self.path.components().count() <= other.path.components().count() {
            (self, other)
        } else {
            (other, self)
        };
        let Ok(below) = inner.path.strip_prefix(&outer.path) else { return false };
        match (&outer.project, &inner.project) {
            (WatchProject::Id(outer), WatchProject::Id(inner)) => outer == inner,
            (WatchProject::Folder, WatchProject::Id(inner)) => {
                let folder =
                    below.components().next().map_or(inner.as_str().as_ref(), |folder| folder.as_os_str());
                folder == inner.as_str()
            }
            (_, WatchProject::Folder) => below.as_os_str().is_empty(),
        }
    }

    /// What its state is kept under: another folder or project is another state.
    pub fn identity(&self) -> String {
        match &self.project {
            WatchProject::Id(project) => format!("{} as {}", self.path.display(), project.as_str()),
            WatchProject::Folder => format!("{}/*", self.path.display()),
        }
    }
}

/// Reads the tables of the file, or those of the variable.
pub(super) fn read(layers: &Layers) -> Result<Vec<WatchSettings>, SettingError> {
    let Some(text) = layers.optional(NAME) else { return Ok(Vec::new()) };
    read_list(text).map_err(|wrong| wrong.in_setting(layers, NAME))
}

fn read_list(text: &str) -> Result<Vec<WatchSettings>, Wrong> {
    let entries = tables::entries(text, TABLES_MAX, "folders")?;
    let mut folders: Vec<WatchSettings> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let place = format!("watch[{index}]");
        let folder = read_folder(&place, entry)?;
        if let Some(same) = folders.iter().position(|other| other.shares_files_with(&folder)) {
            return Err(Wrong::at(
                format!("{place}.path"),
                format!(
                    "watch[{same}] has files of this folder for the same project, so that each would be told of twice"
                ),
            ));
        }
        folders.push(folder);
    }
    Ok(folders)
}

fn read_folder(place: &str, entry: &Value) -> Result<WatchSettings, Wrong> {
    let entry = tables::fields(place, entry, &FIELDS)?;
    let at = |field: &str| format!("{place}.{field}");
    let path = entry.get("path").ok_or_else(|| Wrong::at(at("path"), "is required: the folder to watch"))?;
    let path = path.as_str().ok_or_else(|| Wrong::at(at("path"), "expected a string"))?;
    let project = entry.get("project").map(|value| project(&at("project"), value)).transpose()?;
    let mut folder = WatchSettings::new(path, project).map_err(|message| Wrong::at(at("path"), message))?;
    folder.ignore = patterns(&at("ignore"), entry.get("ignore"))?;
    folder.only = patterns(&at("only"), entry.get("only"))?;
    folder.ignore_temporary = flag(place, entry, "ignore_temporary")?.unwrap_or(folder.ignore_temporary);
    folder.gitignore = flag(place, entry, "gitignore")?.unwrap_or(folder.gitignore);
    folder.poll = flag(place, entry, "poll")?;
    folder.local = flag(place, entry, "local")?.unwrap_or(false);
    folder.quiet_ms = number(place, entry, "quiet_ms", &QUIET_MS)?.unwrap_or(folder.quiet_ms);
    let wait_ms_max = number(place, entry, "wait_ms_max", &WAIT_MS)?;
    folder.wait_ms_max = wait_ms_max.unwrap_or(folder.wait_ms_max.max(folder.quiet_ms));
    if folder.wait_ms_max < folder.quiet_ms {
        return Err(Wrong::at(at("wait_ms_max"), "expected at least `quiet_ms`"));
    }
    if let Some(paths_max) = number(place, entry, "paths_max", &PATHS)? {
        folder.paths_max = usize::try_from(paths_max).unwrap_or(usize::MAX);
    }
    folder.poll_seconds = number(place, entry, "poll_seconds", &POLL_SECONDS)?;
    Ok(folder)
}

fn project(place: &str, value: &Value) -> Result<ProjectId, Wrong> {
    let text = value.as_str().ok_or_else(|| Wrong::at(place, "expected the id of a project, as a string"))?;
    ProjectId::try_from(text).map_err(|error| Wrong::at(place, error.to_string()))
}

fn patterns(place: &str, value: Option<&Value>) -> Result<Vec<String>, Wrong> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let patterns = strings(place, value)?;
    if patterns.len() > PATTERNS_MAX {
        return Err(Wrong::at(place, format!("expected at most {PATTERNS_MAX} patterns")));
    }
    let pattern = |(place, text): (String, &str)| {
        let pattern = text.to_owned();
        match check_patterns(std::slice::from_ref(&pattern)) {
            Ok(()) => Ok(pattern),
            Err(error) => {
                Err(Wrong::at(place, format!("expected a pattern as `.gitignore` has them: {error}")))
            }
        }
    };
    patterns.into_iter().map(pattern).collect()
}

fn flag(place: &str, entry: &Map<String, Value>, field: &str) -> Result<Option<bool>, Wrong> {
    let Some(value) = entry.get(field) else { return Ok(None) };
    let flag = value.as_bool().map(Some);
    flag.ok_or_else(|| Wrong::at(format!("{place}.{field}"), "expected `true` or `false`"))
}

fn number(
    place: &str,
    entry: &Map<String, Value>,
    field: &str,
    range: &RangeInclusive<u64>,
) -> Result<Option<u64>, Wrong> {
    let Some(value) = entry.get(field) else { return Ok(None) };
    let number = value.as_u64().filter(|number| range.contains(number)).map(Some);
    let expected = || format!("expected a whole number from {} to {}", range.start(), range.end());
    number.ok_or_else(|| Wrong::at(format!("{place}.{field}"), expected()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_folder_is_of_a_project_or_has_the_folders_of_projects() {
        let list = json!([
            {"path": "/data/projects/*"},
            {"path": "/srv/in", "project": "p1", "only": ["*.mp4"], "quiet_ms": 5000, "poll": true, "local": true},
        ]);
        let folders = read_list(&list.to_string()).unwrap_or_else(|wrong| panic!("{}", wrong.message));
        assert_eq!(
            (folders[0].path.to_str(), &folders[0].project),
            (Some("/data/projects"), &WatchProject::Folder)
        );
        assert_eq!((folders[0].quiet_ms, folders[0].wait_ms_max, folders[0].paths_max), (300, 2000, 100));
        assert!(folders[0].gitignore && folders[0].ignore_temporary && !folders[0].local);
        assert_eq!((folders[1].quiet_ms, folders[1].wait_ms_max, folders[1].poll), (5000, 5000, Some(true)));
        assert!(matches!(&folders[1].project, WatchProject::Id(project) if project.as_str() == "p1"));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        let with = |field: &str, value: Value| {
            let mut folder = json!({"path": "/srv/b", "project": "p1"});
            folder[field] = value;
            json!([{"path": "/srv/a", "project": "p1"}, folder])
        };
        for (field, value, place, words) in [
            ("path", json!("/srv/b/*"), "watch[1].path", "one of the two"),
            ("path", json!("/srv/*/b"), "watch[1].path", "only as its last part"),
            ("path", json!(""), "watch[1].path", "expected a folder"),
            ("path", json!(7), "watch[1].path", "a string"),
            ("path", json!("/srv/a/"), "watch[1].path", "watch[0] has files of this folder"),
            ("path", json!("/srv/a/deep"), "watch[1].path", "told of twice"),
            ("path", json!("/srv"), "watch[1].path", "told of twice"),
            ("project", json!(" p"), "watch[1].project", "white space"),
            ("project", json!(7), "watch[1].project", "a string"),
            ("ignore", json!("*.log"), "watch[1].ignore", "a list"),
            ("ignore", json!(["a", "{b"]), "watch[1].ignore[1]", "as `.gitignore` has them"),
            ("only", json!([]), "watch[1].only", "at least one"),
            ("gitignore", json!("no"), "watch[1].gitignore", "`true` or `false`"),
            ("quiet_ms", json!(0), "watch[1].quiet_ms", "from 10 to 60000"),
            ("quiet_ms", json!("300"), "watch[1].quiet_ms", "from 10 to 60000"),
            ("wait_ms_max", json!(200), "watch[1].wait_ms_max", "at least `quiet_ms`"),
            ("paths_max", json!(1001), "watch[1].paths_max", "from 1 to 1000"),
            ("poll_seconds", json!(0), "watch[1].poll_seconds", "from 1 to 3600"),
            ("quiet", json!(300), "watch[1].quiet", "did you mean `quiet_ms`?"),
        ] {
            let list = with(field, value);
            let Err(wrong) = read_list(&list.to_string()) else { panic!("{list} was taken") };
            assert_eq!(wrong.place, place, "{list}: {}", wrong.message);
            assert!(wrong.message.contains(words), "{list}: {}", wrong.message);
        }
        let nested = |project: &str| {
            json!([{"path": "/srv/*"}, {"path": "/srv/p1/in", "project": project}]).to_string()
        };
        assert!(read_list(&nested("p1")).is_err() && read_list(&nested("p2")).is_ok());
        let Err(wrong) = read_list(&json!([{"path": "/srv/a"}]).to_string()) else {
            panic!("it has no project")
        };
        assert!(wrong.message.contains("`/*` at its end"), "{}", wrong.message);
    }
}
