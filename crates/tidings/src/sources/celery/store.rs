//! Where what is kept of tasks is kept: in the data folder of a node of its own, or in the Redis of all nodes.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use redis::cmd;
use serde::{Deserialize, Serialize};
use tidings_engine::engine::redis::{Call, Servers};

use super::{kept::Kept, report::TaskId};

/// Where all nodes find it: a field for each task.
const KEY: &str = "tidings:celery:tasks";
/// Fields that are written at once.
const FIELDS_MAX: usize = 1000;
/// In the data folder.
const FILE: &str = "celery.jsonl";
/// The file is written anew when it has grown to this, and to several times what is in it.
const FILE_BYTES_MIN: u64 = 1024 * 1024;
const GROWTH_MAX: u64 = 4;

/// See the module.
#[derive(Debug)]
pub(super) enum Store {
    /// Nothing outlives the process.
    Nothing,
    File(Box<Log>),
    Redis(Arc<Servers>),
}

impl Store {
    /// Everything that is kept.
    pub(super) async fn load(&mut self) -> Result<Vec<Kept>, String> {
        match self {
            Self::Nothing => Ok(Vec::new()),
            Self::File(log) => Ok(log.tasks.values().cloned().collect()),
            Self::Redis(servers) => {
                let mut read = cmd("HVALS");
                read.arg(KEY);
                let values =
                    servers.call(&Call::repeatable(KEY, read)).await.map_err(|fault| fault.to_string())?;
                let values: Vec<Vec<u8>> =
                    redis::from_redis_value(values).map_err(|error| error.to_string())?;
                Ok(values.iter().filter_map(|json| serde_json::from_slice(json).ok()).collect())
            }
        }
    }

    /// Keeps these, and no longer those.
    pub(super) async fn write(&mut self, kept: &[Kept], gone: &[TaskId]) -> Result<(), String> {
        if kept.is_empty() && gone.is_empty() {
            return Ok(());
        }
        match self {
            Self::Nothing => Ok(()),
            Self::File(log) => log.write(kept, gone).map_err(|error| error.to_string()),
            Self::Redis(servers) => {
                for kept in kept.chunks(FIELDS_MAX) {
                    let mut set = cmd("HSET");
                    set.arg(KEY);
                    for kept in kept {
                        set.arg(&kept.id).arg(json_of(kept));
                    }
                    servers.call(&Call::repeatable(KEY, set)).await.map_err(|fault| fault.to_string())?;
                }
                for gone in gone.chunks(FIELDS_MAX) {
                    let mut delete = cmd("HDEL");
                    delete.arg(KEY).arg(gone.iter().map(|id| &**id).collect::<Vec<_>>());
                    servers.call(&Call::repeatable(KEY, delete)).await.map_err(|fault| fault.to_string())?;
                }
                Ok(())
            }
        }
    }
}

/// A file with a line for each change.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// What it comes to.
    tasks: HashMap<String, Kept>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Gone { gone: String },
    Kept(Box<Kept>),
}

impl Log {
    /// Reads the file of a data folder, which somebody else holds for this process.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            bytes => bytes?,
        };
        // A crash may have torn a character, too.
        let text = String::from_utf8_lossy(&bytes);
        let mut tasks = HashMap::new();
        // A line that a crash has torn is about something that was not told.
        for line in text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok()) {
            match line {
                Line::Gone { gone } => drop(tasks.remove(&gone)),
                Line::Kept(kept) => drop(tasks.insert(kept.id.clone(), *kept)),
            }
        }
        let file = rewritten(&path, &tasks)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, tasks })
    }

    fn write(&mut self, kept: &[Kept], gone: &[TaskId]) -> io::Result<()> {
        let mut lines = String::new();
        for kept in kept {
            lines += &json_of(kept);
            lines.push('\n');
            self.tasks.insert(kept.id.clone(), kept.clone());
        }
        for id in gone {
            lines += &serde_json::to_string(&Line::Gone { gone: id.to_string() })?;
            lines.push('\n');
            self.tasks.remove(&**id);
        }
        if let Err(error) = self.file.write_all(lines.as_bytes()) {
            // Half a line would spoil the next one.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += lines.len() as u64;
        // Of a task, a line has about this.
        let live = 300 * self.tasks.len() as u64;
        if self.bytes > FILE_BYTES_MIN.max(GROWTH_MAX * live) {
            self.file = rewritten(&self.path, &self.tasks)?;
            self.bytes = self.file.metadata()?.len();
        }
        Ok(())
    }
}

fn rewritten(path: &Path, tasks: &HashMap<String, Kept>) -> io::Result<File> {
    let mut text = String::new();
    for kept in tasks.values() {
        text += &json_of(kept);
        text.push('\n');
    }
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    std::fs::rename(&new, path)?;
    OpenOptions::new().append(true).open(path)
}

fn json_of(kept: &Kept) -> String {
    serde_json::to_string(kept).expect("it is made of text and numbers")
}
