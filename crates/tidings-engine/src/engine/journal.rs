//! The embedded engine's journal: what was appended and saved, in files of a folder, so that a restart goes on from there.
//!
//! A folder holds logs, which only grow, and at most one checkpoint, which stands for everything before it. Every file is a
//! header and then entries, each with its length and its checksum. An entry is written before what it says shows anywhere.
//! When the logs have grown, a checkpoint is written beside them from what is kept by then, and they are deleted.
//!
//! Knows files and entries; knows nothing of who follows what.

mod entry;
mod file;
mod folder;
mod writer;

use std::{fmt, io, path::PathBuf, time::Duration};

pub(super) use entry::{Entry, StateEntry, StreamEntry};
pub(super) use file::encode;
pub(super) use folder::Folder;
pub(super) use writer::{CheckpointWriter, LogWriter};

/// Where and how the journal is written.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// The folder; made if it is not there.
    pub folder: PathBuf,
    /// When the disk is made to have it.
    pub sync: Sync,
    /// Logs may grow to this before a checkpoint replaces them, or to twice what a checkpoint takes if that is more.
    pub log_bytes_max: u64,
}

/// When what is written is forced to the disk. A process that is killed loses nothing in any case: that is the system's
/// to keep. It is the machine's own crash, or a power cut, that this is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Before an append is acknowledged.
    Always,
    /// This often: a crash of the machine may lose as much. Streams then begin a new epoch where they branch, so that
    /// nobody takes what is new for what was lost.
    Interval(Duration),
    /// When the system likes.
    Never,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The folder or a file in it cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{}: in use by another process; every service needs a folder of its own", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// It was written by a version that this one cannot read.
    #[error(
        "{}: written by a newer version of the service (journal version {version}; this one reads version {})",
        path.display(),
        file::VERSION
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It is no journal.
    #[error("{}: not a journal of this service", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It is damaged where a crash cannot have damaged it.
    #[error(
        "{}: damaged at byte {position}: {what}. Restore the folder from a copy, or move it away and begin anew",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// From where it cannot be read.
        position: u64,
        /// What is wrong there.
        what: &'static str,
    },
}

impl JournalError {
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::File { path, source }
    }
}

/// The running system's name for its present run; `None`: it has none, and every unclean end counts as a crash of the
/// machine.
fn boot_id() -> Option<String> {
    let read = if cfg!(target_os = "linux") {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
    } else {
        let asked = std::process::Command::new("sysctl").args(["-n", "kern.bootsessionuuid"]).output().ok();
        asked.and_then(|output| String::from_utf8(output.stdout).ok())
    };
    read.map(|id| id.trim().to_owned()).filter(|id| !id.is_empty())
}

impl fmt::Display for Sync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("always"),
            Self::Interval(interval) => write!(f, "every {} ms", interval.as_millis()),
            Self::Never => f.write_str("never"),
        }
    }
}
