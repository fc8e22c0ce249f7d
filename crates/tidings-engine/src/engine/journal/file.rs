//! One file of the journal.
//!
//! `TIDINGSJ`, the version and four bytes of zeros; then entries, each as its length, its CRC-32 (IEEE), and its bytes in
//! the format of `postcard`. Numbers are little-endian, 32 bits.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::{Entry, JournalError};

/// The version that is written, and the newest that is read.
pub(super) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"TIDINGSJ";
const HEADER_BYTES: usize = 16;
const PREFIX_BYTES: usize = 8;
/// No entry is longer: the largest event that settings allow, with room.
const ENTRY_BYTES_MAX: u32 = 64 << 20;

/// Appends an entry to a buffer that is then written as a whole.
pub(in crate::engine) fn encode(entry: &Entry<'_>, buffer: &mut Vec<u8>) {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; PREFIX_BYTES]);
    // Entries are made of strings and numbers, and a `Vec` takes everything.
    postcard::to_io(entry, &mut *buffer).expect("an entry can be written to memory");
    let payload = &buffer[start + PREFIX_BYTES..];
    let length = u32::try_from(payload.len()).expect("an entry is far below 4 GiB");
    let checksum = crc32fast::hash(payload);
    buffer[start..start + 4].copy_from_slice(&length.to_le_bytes());
    buffer[start + 4..start + PREFIX_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct JournalFile {
    pub(super) path: PathBuf,
    file: File,
    /// Everything before it is whole.
    length: u64,
}

impl JournalFile {
    pub(super) fn create(path: PathBuf) -> Result<Self, JournalError> {
        let open = || {
            let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
            let mut header = [0; HEADER_BYTES];
            header[..8].copy_from_slice(&MAGIC);
            header[8..12].copy_from_slice(&VERSION.to_le_bytes());
            file.write_all(&header)?;
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Self { path, file, length: HEADER_BYTES as u64 }),
            Err(source) => {
                // What was begun and could not be is no log; that it cannot be removed either says nothing new.
                let _ = fs::remove_file(&path);
                Err(JournalError::File { path, source })
            }
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Writes whole entries, and waits until the disk has them if `synced`. If that fails, what was written of them is taken
    /// back, so that nothing is there that was not acknowledged.
    pub(super) fn write(&mut self, entries: &[u8], synced: bool) -> io::Result<()> {
        // At a place, and not where the last write ended: that may have failed halfway.
        let mut written = self.file.write_all_at(entries, self.length);
        if synced {
            written = written.and_then(|()| self.file.sync_data());
        }
        if let Err(error) = written {
            // Where even this fails, the next write covers what is there, and what is left behind it has a wrong checksum.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += entries.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// A handle for somebody else to sync by.
    pub(super) fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

/// How a file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With its last entry.
    Whole,
    /// In the middle of an entry, as when a process is killed while it writes.
    Torn {
        /// Where the last whole entry ends.
        length: u64,
    },
    /// With something that no process of ours wrote.
    Damaged {
        /// Where the last whole entry ends.
        length: u64,
        what: &'static str,
    },
}

/// Reads a file's entries in order.
pub(super) fn read(path: &Path, mut each: impl FnMut(Entry<'_>)) -> Result<End, JournalError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(JournalError::file(path))?;
    if bytes.len() < HEADER_BYTES {
        // Killed before its header was written.
        return Ok(End::Torn { length: 0 });
    }
    if bytes[..8] != MAGIC {
        return Err(JournalError::Foreign { path: path.to_owned() });
    }
    let version = number(&bytes[8..]);
    if version > VERSION {
        return Err(JournalError::Newer { path: path.to_owned(), version });
    }
    let mut at = HEADER_BYTES;
    while at < bytes.len() {
        let length = at as u64;
        let rest = &bytes[at..];
        let damaged = |what| Ok(End::Damaged { length, what });
        if rest.len() < PREFIX_BYTES {
            return Ok(End::Torn { length });
        }
        let (entry_bytes, checksum) = (number(rest), number(&rest[4..]));
        if entry_bytes == 0 || entry_bytes > ENTRY_BYTES_MAX {
            return damaged("a length that no entry has");
        }
        let Some(payload) = rest.get(PREFIX_BYTES..PREFIX_BYTES + entry_bytes as usize) else {
            return Ok(End::Torn { length });
        };
        if crc32fast::hash(payload) != checksum {
            return damaged("a wrong checksum");
        }
        let Ok(entry) = postcard::from_bytes(payload) else {
            return damaged("an entry of no known kind");
        };
        each(entry);
        at += PREFIX_BYTES + payload.len();
    }
    Ok(End::Whole)
}

/// Cuts a file off behind its last whole entry.
pub(super) fn cut(path: &Path, length: u64) -> Result<(), JournalError> {
    let cut = || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(length)?;
        file.sync_all()
    };
    cut().map_err(JournalError::file(path))
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u32) -> Entry<'static> {
        Entry::Forgotten { stream: number }
    }

    #[test]
    fn what_is_written_is_read_and_a_torn_end_is_told_from_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut file = JournalFile::create(path.clone()).unwrap();
        for number in 0..3 {
            let mut buffer = Vec::new();
            encode(&entry(number), &mut buffer);
            file.write(&buffer, false).unwrap();
        }
        let read_all = || {
            let mut entries = Vec::new();
            let end = read(&path, |entry| entries.push(format!("{entry:?}"))).unwrap();
            (entries.len(), end)
        };
        assert_eq!(read_all(), (3, End::Whole));
        let whole = fs::read(&path).unwrap();
        let last = whole.len() as u64 - 10;
        for cut in 1..10 {
            fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(read_all(), (2, End::Torn { length: last }), "{cut} bytes short");
        }
        let mut flipped = whole.clone();
        flipped[whole.len() - 1] ^= 1;
        fs::write(&path, &flipped).unwrap();
        assert_eq!(read_all(), (2, End::Damaged { length: last, what: "a wrong checksum" }));
        fs::write(&path, [&whole[..], &[0; 4096]].concat()).unwrap();
        assert!(matches!(read_all(), (3, End::Damaged { .. })), "zeros, as a crashed machine leaves them");
    }
}
