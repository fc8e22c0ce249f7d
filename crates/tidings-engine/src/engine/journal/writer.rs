//! Writing the journal: the log that grows, and the checkpoint that replaces what has grown enough.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Entry, Folder, JournalError, JournalOptions, Sync, boot_id,
    file::{JournalFile, encode},
    folder::{UNFINISHED, checkpoint, forget_before},
};

/// Entries of a checkpoint that are written at once.
const CHECKPOINT_BUFFER_BYTES: usize = 1 << 20;

/// The log that is written now. Belongs to one thread.
#[derive(Debug)]
pub(in crate::engine) struct LogWriter {
    folder: Folder,
    options: JournalOptions,
    file: JournalFile,
    number: u64,
    /// Bytes in logs that no checkpoint stands for.
    log_bytes: u64,
    checkpoints: Arc<Checkpoints>,
    syncer: Option<Syncer>,
}

/// What the thread of a checkpoint tells.
#[derive(Debug, Default)]
struct Checkpoints {
    running: AtomicBool,
    /// Bytes of the newest one.
    bytes: AtomicU64,
}

impl LogWriter {
    /// Begins a log behind what the folder has.
    pub(in crate::engine) fn begin(
        mut folder: Folder,
        options: JournalOptions,
    ) -> Result<Self, JournalError> {
        let (number, file) = next_log(&mut folder, &options)?;
        let syncer = match options.sync {
            Sync::Interval(interval) => {
                Some(Syncer::start(interval).map_err(JournalError::file(&file.path))?)
            }
            Sync::Always | Sync::Never => None,
        };
        let writer =
            Self { folder, options, file, number, log_bytes: 0, checkpoints: Arc::default(), syncer };
        writer.tell_syncer().map_err(JournalError::file(&writer.file.path))?;
        Ok(writer)
    }

    /// Writes entries, made by [`encode`]. When this returns, a process that is killed does not lose them.
    pub(in crate::engine) fn write(&mut self, entries: &[u8]) -> io::Result<()> {
        self.file.write(entries, self.options.sync == Sync::Always)?;
        self.log_bytes += entries.len() as u64;
        if let Some(syncer) = &self.syncer {
            syncer.dirty.store(true, Relaxed);
        }
        Ok(())
    }

    /// Whether the logs have grown so much that a checkpoint should replace them.
    pub(in crate::engine) fn wants_checkpoint(&self) -> bool {
        let worthwhile = self.options.log_bytes_max.max(2 * self.checkpoints.bytes.load(Relaxed));
        self.log_bytes > worthwhile && !self.checkpoints.running.load(Relaxed)
    }

    /// Begins another log, and a checkpoint that is to stand for everything before it. Who calls this collects what is kept
    /// at this moment, and lets the checkpoint be written by another thread.
    pub(in crate::engine) fn begin_checkpoint(&mut self) -> Result<CheckpointWriter, JournalError> {
        self.file.sync().map_err(JournalError::file(&self.file.path))?;
        let replaced = self.number;
        (self.number, self.file) = next_log(&mut self.folder, &self.options)?;
        self.tell_syncer().map_err(JournalError::file(&self.file.path))?;
        self.log_bytes = 0;
        self.checkpoints.running.store(true, Relaxed);
        let folder = self.folder.path().to_owned();
        Ok(CheckpointWriter { folder, number: replaced, checkpoints: Arc::clone(&self.checkpoints) })
    }

    /// Says that the process ends in good order.
    pub(in crate::engine) fn end(mut self) -> io::Result<()> {
        let mut entry = Vec::new();
        encode(&Entry::Ended, &mut entry);
        self.file.write(&entry, true)
    }

    fn tell_syncer(&self) -> io::Result<()> {
        if let Some(syncer) = &self.syncer {
            *syncer.file.lock() = Some(self.file.handle()?);
        }
        Ok(())
    }
}

fn next_log(folder: &mut Folder, options: &JournalOptions) -> Result<(u64, JournalFile), JournalError> {
    let number = folder.next;
    folder.next += 1;
    let mut file = JournalFile::create(folder.log(number))?;
    let mut entry = Vec::new();
    let synced = options.sync == Sync::Always;
    encode(&Entry::Began { boot: boot_id().map(Into::into), synced }, &mut entry);
    let begun = file.write(&entry, false).and_then(|()| sync_folder(folder.path()));
    begun.map_err(JournalError::file(&file.path))?;
    Ok((number, file))
}

/// A file's name is not on the disk before its folder is.
fn sync_folder(path: &std::path::Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes a checkpoint beside the log that goes on.
#[derive(Debug)]
pub(in crate::engine) struct CheckpointWriter {
    folder: PathBuf,
    /// The last log that it stands for.
    number: u64,
    checkpoints: Arc<Checkpoints>,
}

impl CheckpointWriter {
    /// Writes what is kept, and removes the logs that it stands for. If it fails, they stay, and nothing is lost.
    pub(in crate::engine) fn write(
        self,
        entries: impl FnOnce(&mut dyn FnMut(&Entry<'_>) -> io::Result<()>) -> io::Result<()>,
    ) -> Result<(), JournalError> {
        let unfinished = self.folder.join(UNFINISHED);
        let written = self.write_to(&unfinished, entries).map_err(JournalError::file(&unfinished));
        self.checkpoints.running.store(false, Relaxed);
        self.checkpoints.bytes.store(written?, Relaxed);
        forget_before(&self.folder, self.number)
    }

    fn write_to(
        &self,
        unfinished: &std::path::Path,
        entries: impl FnOnce(&mut dyn FnMut(&Entry<'_>) -> io::Result<()>) -> io::Result<()>,
    ) -> io::Result<u64> {
        match fs::remove_file(unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = JournalFile::create(unfinished.to_owned()).map_err(io::Error::other)?;
        let mut out = BufWriter::with_capacity(CHECKPOINT_BUFFER_BYTES, file);
        let mut buffer = Vec::new();
        let mut put = |entry: &Entry<'_>| {
            buffer.clear();
            encode(entry, &mut buffer);
            out.write_all(&buffer)
        };
        entries(&mut put)?;
        put(&Entry::Whole)?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync()?;
        fs::rename(unfinished, checkpoint(&self.folder, self.number))?;
        sync_folder(&self.folder)?;
        Ok(file.length())
    }
}

impl io::Write for JournalFile {
    fn write(&mut self, entries: &[u8]) -> io::Result<usize> {
        Self::write(self, entries, false)?;
        Ok(entries.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Forces the log to the disk now and then, on a thread of its own, because that may take long.
#[derive(Debug)]
struct Syncer {
    dirty: Arc<AtomicBool>,
    file: Arc<Mutex<Option<File>>>,
    /// Dropped with the writer, which ends the thread.
    _end: mpsc::SyncSender<()>,
}

impl Syncer {
    fn start(interval: Duration) -> io::Result<Self> {
        let (dirty, file) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None::<File>)));
        let (end, ended) = mpsc::sync_channel::<()>(0);
        let (is_dirty, current) = (Arc::clone(&dirty), Arc::clone(&file));
        thread::Builder::new().name("journal-sync".into()).spawn(move || {
            while ended.recv_timeout(interval) == Err(mpsc::RecvTimeoutError::Timeout) {
                if is_dirty.swap(false, Relaxed)
                    && let Some(file) = current.lock().as_ref().and_then(|file| file.try_clone().ok())
                {
                    // A disk that fails here fails the next write, which says so.
                    let _ = file.sync_data();
                }
            }
        })?;
        Ok(Self { dirty, file, _end: end })
    }
}
