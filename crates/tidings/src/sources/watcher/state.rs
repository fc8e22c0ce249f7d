//! What was announced, kept for the next start: a log of changes in a file, written anew when it has grown too long. Knows no
//! events.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{
    announce::{Progress, hex},
    difference::Changes,
    index::{Entry, Index},
    path::RelPath,
};

pub(crate) mod redis;

/// The first bytes of a file, with the version of what follows.
const MAGIC: &[u8] = b"tidings-watch 1\n";
/// Entries of one frame, when everything is written.
const FRAME_ENTRIES: usize = 10_000;
/// A longer frame was not written by us.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// The log may grow by so much before it is written anew, or to twice its size.
const GROWTH_BYTES_MIN: u64 = 4 << 20;
const CHECK_BYTES: usize = 8;

/// Why the state could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is no state of a watcher, or one of another version", .0.display())]
    Foreign(PathBuf),
    #[error("Redis: {0}")]
    Redis(String),
    #[error("{0} is damaged")]
    Damaged(String),
}

impl StateError {
    /// Whether the state may be there, and read later.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Self::Redis(_))
    }
}

/// What the state of a table is called.
pub(crate) fn name_of(table: &str) -> String {
    hex(&Sha256::digest(table.as_bytes())[..CHECK_BYTES])
}

/// Keeps what was announced.
pub(crate) trait Store: Send {
    /// What was kept; `None`: nothing was.
    fn load(&mut self) -> Result<Option<(Index, Progress)>, StateError>;
    /// Keeps all of this in place of what there is, or leaves it as it was.
    fn replace(&mut self, index: &Index, progress: Progress) -> Result<(), StateError>;
    /// Keeps what has changed. After an error, [`Store::replace`] has to be called.
    fn add(&mut self, index: &Index, changes: &Changes, progress: Progress) -> Result<(), StateError>;
}

/// Keeps nothing.
#[derive(Debug)]
pub(crate) struct NoStore;

impl Store for NoStore {
    fn load(&mut self) -> Result<Option<(Index, Progress)>, StateError> {
        Ok(None)
    }

    fn replace(&mut self, _: &Index, _: Progress) -> Result<(), StateError> {
        Ok(())
    }

    fn add(&mut self, _: &Index, _: &Changes, _: Progress) -> Result<(), StateError> {
        Ok(())
    }
}

/// Keeps it in a file.
#[derive(Debug)]
pub(crate) struct FileStore {
    path: PathBuf,
    log: Option<File>,
    bytes: u64,
    bytes_max: u64,
}

impl FileStore {
    /// The state of a table in this folder.
    pub(crate) fn new(folder: &Path, table: &str) -> Self {
        Self { path: folder.join(format!("{}.state", name_of(table))), log: None, bytes: 0, bytes_max: 0 }
    }

    fn wrong(&self) -> impl Fn(io::Error) -> StateError + use<> {
        let path = self.path.clone();
        move |source| StateError::File { path: path.clone(), source }
    }

    fn write_anew(&self, index: &Index, progress: Progress) -> io::Result<(File, u64)> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let draft = self.path.with_extension("draft");
        let mut file = BufWriter::new(File::create(&draft)?);
        file.write_all(MAGIC)?;
        let mut payload = begun(progress);
        for (number, (path, entry)) in (1..).zip(index.iter()) {
            put(&mut payload, &path, Some(&entry));
            if number % FRAME_ENTRIES == 0 {
                write_frame(&mut file, &payload)?;
                payload = begun(progress);
            }
        }
        write_frame(&mut file, &payload)?;
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&draft, &self.path)?;
        File::open(folder)?.sync_all()?;
        let bytes = file.stream_position()?;
        Ok((file, bytes))
    }
}

impl Store for FileStore {
    fn load(&mut self) -> Result<Option<(Index, Progress)>, StateError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.wrong()(error)),
        };
        let mut file = BufReader::new(file);
        let mut magic = [0; MAGIC.len()];
        if file.read_exact(&mut magic).is_err() || magic != MAGIC {
            return Err(StateError::Foreign(self.path.clone()));
        }
        let mut index = Index::default();
        let mut progress = None;
        // What a crash left unfinished at the end was announced with ids that are known.
        while let Some(payload) = read_frame(&mut file) {
            progress =
                Some(take_in(&mut index, &payload).ok_or_else(|| StateError::Foreign(self.path.clone()))?);
        }
        progress.map(|progress| Some((index, progress))).ok_or_else(|| StateError::Foreign(self.path.clone()))
    }

    fn replace(&mut self, index: &Index, progress: Progress) -> Result<(), StateError> {
        self.log = None;
        let (file, bytes) = self.write_anew(index, progress).map_err(self.wrong())?;
        (self.log, self.bytes) = (Some(file), bytes);
        self.bytes_max = (2 * bytes).max(bytes + GROWTH_BYTES_MIN);
        Ok(())
    }

    fn add(&mut self, index: &Index, changes: &Changes, progress: Progress) -> Result<(), StateError> {
        let mut payload = begun(progress);
        for (path, change) in changes {
            put(&mut payload, path, change.after.as_ref());
        }
        let room = self.bytes + payload.len() as u64 <= self.bytes_max && payload.len() <= FRAME_BYTES_MAX;
        let Some(log) = self.log.as_mut().filter(|_| room) else { return self.replace(index, progress) };
        let mut frame = Vec::with_capacity(payload.len() + 16);
        let written = write_frame(&mut frame, &payload).and_then(|()| log.write_all(&frame));
        if let Err(error) = written {
            // What is behind half a frame would not be read.
            self.log = None;
            return Err(self.wrong()(error));
        }
        self.bytes += frame.len() as u64;
        Ok(())
    }
}

/// A payload is how far announcing has come, and then entries: the path's length and bytes, whether there is a file, and which.
fn begun(progress: Progress) -> Vec<u8> {
    [progress.term, progress.batches, progress.device]
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

fn put(payload: &mut Vec<u8>, path: &RelPath, entry: Option<&Entry>) {
    let length = u32::try_from(path.as_bytes().len()).unwrap_or(u32::MAX);
    payload.extend(length.to_le_bytes());
    payload.extend(path.as_bytes());
    payload.push(u8::from(entry.is_some()));
    if let Some(entry) = entry {
        payload.extend(entry.pack());
    }
}

fn take_in(index: &mut Index, payload: &[u8]) -> Option<Progress> {
    let (progress, mut rest) = payload.split_at_checked(24)?;
    let mut numbers =
        progress.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
    let progress = Progress { term: numbers.next()?, batches: numbers.next()?, device: numbers.next()? };
    while !rest.is_empty() {
        let (length, behind) = rest.split_at_checked(4)?;
        let length = usize::try_from(u32::from_le_bytes(length.try_into().ok()?)).ok()?;
        let (path, behind) = behind.split_at_checked(length)?;
        let (is_there, behind) = behind.split_at_checked(1)?;
        let path = RelPath::stored(path);
        if is_there == [1] {
            let (entry, behind) = behind.split_at_checked(Entry::PACKED)?;
            index.put(&path, Entry::unpack(entry)?);
            rest = behind;
        } else {
            index.remove(&path);
            rest = behind;
        }
    }
    Some(progress)
}

/// A frame is a payload's length, the first bytes of its SHA-256, and the payload.
fn write_frame(out: &mut impl io::Write, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&Sha256::digest(payload)[..CHECK_BYTES])?;
    out.write_all(payload)
}

fn read_frame(file: &mut impl Read) -> Option<Vec<u8>> {
    let (mut length, mut check) = ([0; 4], [0; CHECK_BYTES]);
    file.read_exact(&mut length).ok()?;
    file.read_exact(&mut check).ok()?;
    let length =
        usize::try_from(u32::from_le_bytes(length)).ok().filter(|length| *length <= FRAME_BYTES_MAX)?;
    let mut payload = vec![0; length];
    file.read_exact(&mut payload).ok()?;
    (Sha256::digest(&payload)[..CHECK_BYTES] == check).then_some(payload)
}

#[cfg(test)]
mod tests;
