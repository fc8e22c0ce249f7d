//! What the kernel tells of folders. Each is watched by itself, so that ignored ones cost nothing; a full queue is told, and never
//! grows here.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    mem::MaybeUninit,
    ops::Bound,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use super::{
    ledger::Touch,
    path::{Name, RelPath},
};

/// Events read at once, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// Something that was heard.
#[derive(Debug)]
pub(crate) enum Heard {
    Touch(RelPath, Touch),
    /// Some of what happened was not kept for us.
    Overflow,
}

/// The folders that are watched.
#[derive(Debug)]
pub(crate) struct Kernel {
    queue: OwnedFd,
    folders: HashMap<i32, RelPath>,
    watches: BTreeMap<RelPath, i32>,
}

impl Kernel {
    pub(crate) fn new() -> io::Result<Self> {
        let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self { queue, folders: HashMap::new(), watches: BTreeMap::new() })
    }

    /// Readable when there is something to hear.
    pub(crate) fn queue(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Listens to a folder from now on. One that came from elsewhere brings its watch along, under its new name.
    pub(crate) fn watch(&mut self, root: &Path, folder: &RelPath) -> io::Result<()> {
        // Opening and reading are left out: they would fill the queue.
        let mut flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR
            | WatchFlags::EXCL_UNLINK;
        flags |= if folder.is_root() {
            WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF
        } else {
            WatchFlags::DONT_FOLLOW
        };
        let watch = inotify::add_watch(&self.queue, root.join(folder.to_path()), flags)?;
        if let Some(former) = self.folders.insert(watch, folder.clone())
            && former != *folder
            && self.watches.get(&former) == Some(&watch)
        {
            self.watches.remove(&former);
        }
        match self.watches.insert(folder.clone(), watch) {
            Some(other) if other != watch => self.end(other),
            _ => {}
        }
        Ok(())
    }

    /// Listens no more to a folder and all in it.
    pub(crate) fn forget(&mut self, folder: &RelPath) {
        let within = self.watches.range(folder.clone()..).take_while(|(path, _)| path.is_in(folder));
        let within: Vec<_> = within.map(|(path, watch)| (path.clone(), *watch)).collect();
        for (path, watch) in within {
            self.watches.remove(&path);
            if self.folders.get(&watch) == Some(&path) {
                self.end(watch);
            }
        }
    }

    /// The names of the watched folders in this one.
    pub(crate) fn folders_of(&self, folder: &RelPath) -> Vec<Name> {
        let mut names = Vec::new();
        let mut from = Bound::Excluded(folder.clone());
        while let Some((path, _)) =
            self.watches.range((from, Bound::Unbounded)).next().filter(|(path, _)| path.is_in(folder))
        {
            let below = path.below(folder);
            let Some(name) = below.parts().next() else { break };
            names.push(name.into());
            from = Bound::Included(folder.join(name).behind());
        }
        names
    }

    fn end(&mut self, watch: i32) {
        self.folders.remove(&watch);
        // It may have ended by itself.
        let _ = inotify::remove_watch(&self.queue, watch);
    }

    /// Hears everything that there is.
    pub(crate) fn hear(&mut self, mut tell: impl FnMut(Heard)) -> io::Result<()> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let mut reader = inotify::Reader::new(&self.queue, &mut buffer);
        let mut ended = Vec::new();
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let kinds = event.events();
            if kinds.contains(ReadFlags::QUEUE_OVERFLOW) {
                tell(Heard::Overflow);
                continue;
            }
            let Some(folder) = self.folders.get(&event.wd()) else { continue };
            if kinds.contains(ReadFlags::IGNORED) {
                ended.push(event.wd());
            }
            match event.file_name() {
                Some(name) => {
                    let path = folder.join(name.to_bytes());
                    if name.to_bytes() == b".gitignore" {
                        tell(Heard::Touch(folder.clone(), Touch::Folder));
                    }
                    tell(Heard::Touch(path, touch_of(kinds)));
                }
                // The watched folder itself, or a file system that was taken away.
                None if folder.is_root() || kinds.contains(ReadFlags::UNMOUNT) => {
                    tell(Heard::Touch(folder.clone(), Touch::Folder));
                }
                None => {}
            }
        }
        for watch in ended {
            if let Some(folder) = self.folders.remove(&watch)
                && self.watches.get(&folder) == Some(&watch)
            {
                self.watches.remove(&folder);
            }
        }
        Ok(())
    }
}

fn touch_of(kinds: ReadFlags) -> Touch {
    let any = |flags| kinds.intersects(flags);
    if any(ReadFlags::ISDIR) {
        Touch::Folder
    } else if any(ReadFlags::CREATE) {
        Touch::Created
    } else if any(ReadFlags::MODIFY) {
        Touch::Written
    } else if any(ReadFlags::CLOSE_WRITE) {
        Touch::Closed
    } else if any(ReadFlags::MOVED_TO) {
        Touch::Placed
    } else {
        Touch::Other
    }
}
