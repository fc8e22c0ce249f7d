//! Looks at files: what they are now, without following a link. Knows nothing of what they were.

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, open, openat, statat},
    io::Errno,
};

use super::{
    difference::Sight,
    index::{Entry, Kind},
    path::{Name, RelPath},
    rules::Rules,
};

/// Within so long after a change, another one may get the same time: some clocks of file systems tick a hundred times a second.
const TICK_NS: i64 = 20_000_000;
/// A longer `.gitignore` is not read; nobody writes one.
const RULES_BYTES_MAX: u64 = 1 << 20;

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Folder,
    File(Entry),
}

/// The file system, as far as it is looked at.
pub(crate) trait Files {
    /// What is there.
    fn stat(&self, path: &RelPath) -> io::Result<Found>;
    /// What is in a folder; an error of its own where one of them could not be looked at.
    fn list(&self, folder: &RelPath) -> io::Result<Vec<(Name, io::Result<Found>)>>;
    /// A file with rules.
    fn read(&self, path: &RelPath) -> io::Result<Vec<u8>>;
}

/// A folder on a disk. Each way goes part by part and through no link, so that one that takes a folder's place leads nowhere.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) root: PathBuf,
}

impl Disk {
    fn open(&self, folder: &RelPath, last: OFlags) -> io::Result<OwnedFd> {
        let flags = OFlags::CLOEXEC | OFlags::DIRECTORY;
        let parts: Vec<&[u8]> = folder.parts().collect();
        let through = if cfg!(target_os = "linux") { OFlags::PATH } else { OFlags::RDONLY };
        let mut fd = open(&self.root, flags | if parts.is_empty() { last } else { through }, Mode::empty())?;
        for (number, part) in parts.iter().enumerate() {
            let flags = flags | OFlags::NOFOLLOW | if number + 1 == parts.len() { last } else { through };
            fd = openat(&fd, OsStr::from_bytes(part), flags, Mode::empty())?;
        }
        Ok(fd)
    }

    /// The device that the watched folder is on.
    pub(crate) fn device(&self) -> io::Result<u64> {
        // Opened, because one that may not be read is as good as missing.
        let stat = fstat(self.open(&RelPath::root(), OFlags::RDONLY)?)?;
        #[allow(
            clippy::unnecessary_cast,
            clippy::cast_sign_loss,
            reason = "its type differs between systems"
        )]
        Ok(stat.st_dev as u64)
    }
}

impl Files for Disk {
    fn stat(&self, path: &RelPath) -> io::Result<Found> {
        if path.is_root() {
            return self.device().map(|_| Found::Folder);
        }
        let through = if cfg!(target_os = "linux") { OFlags::PATH } else { OFlags::RDONLY };
        let parent = self.open(&path.parent(), through)?;
        Ok(found(&statat(&parent, OsStr::from_bytes(path.name()), AtFlags::SYMLINK_NOFOLLOW)?))
    }

    fn list(&self, folder: &RelPath) -> io::Result<Vec<(Name, io::Result<Found>)>> {
        let fd = self.open(folder, OFlags::RDONLY)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            match statat(fd.as_fd(), OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => names.push((name.into(), Ok(found(&stat)))),
                // It went meanwhile.
                Err(Errno::NOENT) => {}
                Err(error) => names.push((name.into(), Err(error.into()))),
            }
        }
        Ok(names)
    }

    fn read(&self, path: &RelPath) -> io::Result<Vec<u8>> {
        use std::io::Read as _;
        let through = if cfg!(target_os = "linux") { OFlags::PATH } else { OFlags::RDONLY };
        let parent = self.open(&path.parent(), through)?;
        // Not to wait for the writer of a pipe.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd = openat(&parent, OsStr::from_bytes(path.name()), flags, Mode::empty())?;
        let mut bytes = Vec::new();
        std::fs::File::from(fd).take(RULES_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[allow(
    clippy::unnecessary_cast,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "the fields' types differ between systems"
)]
fn found(stat: &Stat) -> Found {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => return Found::Folder,
        FileType::RegularFile => Kind::File,
        FileType::Symlink => Kind::Link,
        _ => Kind::Other,
    };
    let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
    let changed_ns = ns(stat.st_ctime as i64, stat.st_ctime_nsec as i64);
    Found::File(Entry {
        kind,
        size: stat.st_size as u64,
        modified_ns: ns(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        changed_ns,
        inode: stat.st_ino as u64,
        fresh: wall_ns().saturating_sub(changed_ns) < TICK_NS,
    })
}

/// The time that files are stamped with.
pub(crate) fn wall_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// What a look meets.
pub(crate) trait Witness {
    /// A folder is about to be listed: the time to begin to listen for what happens in it. `false`: stop looking.
    fn enter(&mut self, folder: &RelPath) -> bool;
    fn see(&mut self, sight: Sight);
    /// Something could not be looked at, and stays as it was known.
    fn cannot_see(&mut self, path: &RelPath, error: &io::Error);
}

/// Looks at one path, and into it if it is a folder.
pub(crate) fn look(files: &dyn Files, rules: &mut Rules, path: &RelPath, witness: &mut dyn Witness) {
    match files.stat(path) {
        Ok(found) if rules.ignores(path, found == Found::Folder) => witness.see(Sight::Ignored(path.clone())),
        Ok(Found::File(entry)) => witness.see(Sight::File(path.clone(), entry)),
        Ok(Found::Folder) => look_into(files, rules, path, witness),
        Err(error) if is_gone(&error) && !path.is_root() => witness.see(Sight::Gone(path.clone())),
        Err(error) => witness.cannot_see(path, &error),
    }
}

/// Looks at everything in a folder.
pub(crate) fn look_into(files: &dyn Files, rules: &mut Rules, folder: &RelPath, witness: &mut dyn Witness) {
    let mut waiting = vec![folder.clone()];
    while let Some(folder) = waiting.pop() {
        if !witness.enter(&folder) {
            return;
        }
        match files.list(&folder) {
            Ok(names) => look_at_names(files, rules, folder, names, &mut waiting, witness),
            // A folder that went was in one that tells so, or will.
            Err(error) if is_gone(&error) && !folder.is_root() => witness.see(Sight::Gone(folder)),
            Err(error) => witness.cannot_see(&folder, &error),
        }
    }
}

fn look_at_names(
    files: &dyn Files,
    rules: &mut Rules,
    folder: RelPath,
    names: Vec<(Name, io::Result<Found>)>,
    waiting: &mut Vec<RelPath>,
    witness: &mut dyn Witness,
) {
    let has_rules =
        names.iter().any(|(name, found)| &**name == b".gitignore" && matches!(found, Ok(Found::File(_))));
    rules.read(&folder, || if has_rules { files.read(&folder.join(b".gitignore")) } else { Ok(Vec::new()) });
    let (mut seen, mut others, mut ignored) = (Vec::new(), HashSet::new(), HashSet::new());
    for (name, found) in names {
        let path = folder.join(&name);
        match found {
            Ok(found) if rules.ignores_here(&path, found == Found::Folder) => {
                ignored.insert(name);
            }
            Ok(Found::File(entry)) => seen.push((name, entry)),
            Ok(Found::Folder) => {
                waiting.push(path);
                others.insert(name);
            }
            Err(error) => {
                witness.cannot_see(&path, &error);
                others.insert(name);
            }
        }
    }
    witness.see(Sight::Folder { path: folder, files: seen, others, ignored });
}

/// Nothing is there, as opposed to: it cannot be seen. A link or a file in a folder's place is such a nothing.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP];
    Errno::from_io_error(error).is_some_and(|errno| gone.contains(&errno))
        || matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests;
