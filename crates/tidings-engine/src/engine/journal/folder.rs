//! The journal's folder: who has it, which files are in it, and reading them all.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

use super::{
    Entry, JournalError, boot_id,
    file::{self, End},
};

/// A folder that this process has for itself.
#[derive(Debug)]
pub(in crate::engine) struct Folder {
    path: PathBuf,
    /// Held as long as the folder is ours; the system lets go of it when the process ends, however that comes.
    _lock: File,
    /// The number of the next file.
    pub(super) next: u64,
}

/// What a folder said.
#[derive(Debug)]
pub(in crate::engine) struct Recovered {
    /// The machine has crashed since the last process wrote, and may have lost what that one had not forced to the disk.
    pub(in crate::engine) machine_crashed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Checkpoint,
    Log,
}

impl Folder {
    /// Takes the folder, which is made if it is not there.
    pub(in crate::engine) fn open(path: &Path) -> Result<Self, JournalError> {
        fs::create_dir_all(path).map_err(JournalError::file(path))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(JournalError::file(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => {
                return Err(JournalError::File { path: lock_path, source });
            }
        }
        Ok(Self { path: path.to_owned(), _lock: lock, next: 1 })
    }

    pub(super) fn log(&self, number: u64) -> PathBuf {
        log(&self.path, number)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything in order: the newest checkpoint, then the logs behind it. `each` also learns whether an entry is a
    /// checkpoint's. An end that was torn by a crash is cut off.
    pub(in crate::engine) fn recover(
        &mut self,
        mut each: impl FnMut(Entry<'_>, bool),
    ) -> Result<Recovered, JournalError> {
        let files = self.files()?;
        self.next = files.iter().map(|(number, ..)| number + 1).max().unwrap_or(1);
        let checkpoint = files.iter().filter(|(_, kind, _)| *kind == Kind::Checkpoint).max();
        if let Some((_, _, path)) = checkpoint {
            read_checkpoint(path, |entry| each(entry, true))?;
        }
        let from = checkpoint.map_or(0, |(number, ..)| *number);
        let mut logs: Vec<_> = files.iter().filter(|(n, kind, _)| *kind == Kind::Log && *n > from).collect();
        logs.sort();
        let mut last = Ended { boot: None, synced: false, in_good_order: true };
        for (place, (_, _, path)) in logs.iter().enumerate() {
            let is_last = place + 1 == logs.len();
            last = read_log(path, is_last, |entry| each(entry, false))?;
        }
        forget_before(&self.path, from)?;
        let same_run = last.boot.is_some() && last.boot == boot_id();
        Ok(Recovered { machine_crashed: !(last.in_good_order || last.synced || same_run) })
    }

    fn files(&self) -> Result<Vec<(u64, Kind, PathBuf)>, JournalError> {
        files(&self.path).map_err(JournalError::file(&self.path))
    }
}

/// How the process that wrote a log came to its end.
struct Ended {
    boot: Option<String>,
    synced: bool,
    in_good_order: bool,
}

fn read_checkpoint(path: &Path, mut each: impl FnMut(Entry<'_>)) -> Result<(), JournalError> {
    let mut whole = false;
    let end = file::read(path, |entry| {
        whole = entry == Entry::Whole;
        each(entry);
    })?;
    match end {
        End::Whole if whole => Ok(()),
        End::Whole => Err(damaged(path, 0, "its end is missing")),
        End::Torn { length } => Err(damaged(path, length, "its end is missing")),
        End::Damaged { length, what } => Err(damaged(path, length, what)),
    }
}

fn read_log(path: &Path, is_last: bool, mut each: impl FnMut(Entry<'_>)) -> Result<Ended, JournalError> {
    let mut ended = Ended { boot: None, synced: false, in_good_order: false };
    let end = file::read(path, |entry| {
        if let Entry::Began { boot, synced } = &entry {
            (ended.boot, ended.synced) = (boot.as_deref().map(str::to_owned), *synced);
        }
        ended.in_good_order = entry == Entry::Ended;
        each(entry);
    })?;
    let crashed_since = ended.boot.is_none() || ended.boot != boot_id();
    let length = match end {
        End::Whole => return Ok(ended),
        // A later process would have cut it off before it wrote a log of its own.
        End::Torn { length } if is_last => length,
        End::Damaged { length, .. } if is_last && crashed_since => length,
        End::Torn { length } => return Err(damaged(path, length, "it ends in the middle of an entry")),
        End::Damaged { length, what } => return Err(damaged(path, length, what)),
    };
    ended.in_good_order = false;
    if length == 0 {
        fs::remove_file(path).map_err(JournalError::file(path))?;
    } else {
        file::cut(path, length)?;
    }
    Ok(ended)
}

fn damaged(path: &Path, position: u64, what: &'static str) -> JournalError {
    JournalError::Damaged { path: path.to_owned(), position, what }
}

fn log(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("log-{number:010}"))
}

pub(super) fn checkpoint(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("checkpoint-{number:010}"))
}

/// Removes what the checkpoint `number` stands for, and what was left half-written.
pub(super) fn forget_before(folder: &Path, number: u64) -> Result<(), JournalError> {
    for (other, kind, path) in files(folder).map_err(JournalError::file(folder))? {
        let replaced = if kind == Kind::Checkpoint { other < number } else { other <= number };
        if replaced {
            fs::remove_file(&path).map_err(JournalError::file(&path))?;
        }
    }
    let unfinished = folder.join(UNFINISHED);
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(JournalError::File { path: unfinished, source: error })
        }
        _ => Ok(()),
    }
}

/// A checkpoint that is being written.
pub(super) const UNFINISHED: &str = "checkpoint.unfinished";

fn files(folder: &Path) -> io::Result<Vec<(u64, Kind, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some((kind, number)) = path.file_name().and_then(|name| name.to_str()?.split_once('-')) else {
            continue;
        };
        let kind = match kind {
            "checkpoint" => Kind::Checkpoint,
            "log" => Kind::Log,
            _ => continue,
        };
        if let Ok(number) = number.parse() {
            files.push((number, kind, path.clone()));
        }
    }
    Ok(files)
}
