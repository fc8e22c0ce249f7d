//! How it comes to notice that something happened in a folder: by the kernel, and by looking again where the kernel tells nothing.

use std::{
    collections::{BTreeSet, HashSet},
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use super::{
    ledger::{Ledger, Touch},
    path::{Name, RelPath},
};

#[cfg(target_os = "linux")]
use {
    super::kernel::{Heard, Kernel},
    rustix::io::Errno,
    std::io,
};

/// Between two looks where nobody chose.
const POLL_MS: u64 = 2000;
/// Looking takes at most one part in so many of the time, where nobody chose.
const POLL_SHARE: u64 = 10;
/// Folders without a watch that are looked at one by one; with more, everything is.
const UNWATCHED_MAX: usize = 1000;
/// File systems on which others change files without this kernel knowing: NFS, SMB (three kinds), FUSE, 9P, Ceph, AFS, Lustre,
/// GPFS, folders shared with a virtual machine.
#[cfg(target_os = "linux")]
const REMOTE: [u32; 11] = [
    0x6969,
    0x517b,
    0xff53_4d42,
    0xfe53_4d42,
    0x6573_5546,
    0x0102_1997,
    0x00c3_6400,
    0x5346_414f,
    0x0bd0_0bd0,
    0x4750_4653,
    0x786f_4256,
];

/// Whether and how often to poll.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Polling {
    /// `None`: where the file system is known to need it.
    pub(crate) wanted: Option<bool>,
    /// `None`: by how long a look takes.
    pub(crate) interval_ms: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Listening {
    root: PathBuf,
    polling: Polling,
    #[cfg(target_os = "linux")]
    kernel: Option<Kernel>,
    /// Folders that the kernel does not tell of. With the watched folder: it tells of none.
    unwatched: BTreeSet<RelPath>,
    interval_ms: u64,
    polled_at: u64,
    /// That there are too few watches was told.
    told: bool,
}

impl Listening {
    pub(crate) fn new(root: &Path, polling: Polling) -> Self {
        let interval_ms = polling.interval_ms.unwrap_or(POLL_MS);
        let mut listening = Self {
            root: root.to_owned(),
            polling,
            #[cfg(target_os = "linux")]
            kernel: None,
            unwatched: BTreeSet::new(),
            interval_ms,
            polled_at: 0,
            told: false,
        };
        listening.begin_anew();
        listening
    }

    /// The folder may be another than before.
    pub(crate) fn begin_anew(&mut self) {
        self.unwatched.clear();
        self.begin_kernel();
        if !self.has_kernel() {
            self.unwatched.insert(RelPath::root());
        }
    }

    #[cfg(target_os = "linux")]
    fn begin_kernel(&mut self) {
        self.kernel = None;
        if self.polling.wanted.unwrap_or_else(|| is_remote(&self.root)) {
            tracing::info!(path = ?self.root, "is polled: the kernel does not tell what others do there");
            return;
        }
        match Kernel::new() {
            Ok(kernel) => self.kernel = Some(kernel),
            Err(error) => {
                let hint = "is polled: the kernel gives no watcher; raise fs.inotify.max_user_instances";
                tracing::warn!(path = ?self.root, %error, "{hint}");
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn begin_kernel(&mut self) {
        tracing::info!(path = ?self.root, "is polled: only Linux tells what happens in folders");
    }

    fn has_kernel(&self) -> bool {
        #[cfg(target_os = "linux")]
        return self.kernel.is_some();
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// Readable when there is something to hear.
    pub(crate) fn queue(&self) -> Option<BorrowedFd<'_>> {
        #[cfg(target_os = "linux")]
        return self.kernel.as_ref().map(Kernel::queue);
        #[cfg(not(target_os = "linux"))]
        None
    }

    /// A folder is about to be listed.
    pub(crate) fn enter(&mut self, root: &Path, folder: &RelPath) {
        #[cfg(target_os = "linux")]
        if let Some(kernel) = &mut self.kernel {
            match kernel.watch(root, folder) {
                Ok(()) => {
                    self.unwatched.remove(folder);
                }
                Err(error) => self.cannot_watch(folder, &error),
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (root, folder);
    }

    /// Who cannot be watched is polled.
    #[cfg(target_os = "linux")]
    fn cannot_watch(&mut self, folder: &RelPath, error: &io::Error) {
        // What may not be read now tells of it when it may.
        let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::ACCESS];
        if Errno::from_io_error(error).is_some_and(|errno| gone.contains(&errno)) {
            return;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                path = ?self.root, ?folder, %error,
                "the kernel watches no more folders for this user, so the others are polled; raise fs.inotify.max_user_watches"
            );
        }
        if self.unwatched.len() < UNWATCHED_MAX {
            self.unwatched.insert(folder.clone());
        } else {
            self.unwatched.insert(RelPath::root());
        }
    }

    /// Nobody wants to know of it any more.
    pub(crate) fn leave(&mut self, path: &RelPath) {
        self.unwatched.retain(|folder| path.is_root() || !folder.is_in(path));
        #[cfg(target_os = "linux")]
        if let Some(kernel) = &mut self.kernel {
            kernel.forget(path);
        }
    }

    /// The folders in this one are these; those that were there are not there any more.
    pub(crate) fn keep_only(&mut self, folder: &RelPath, others: &HashSet<Name>) {
        #[cfg(target_os = "linux")]
        if let Some(kernel) = &self.kernel {
            let gone: Vec<_> =
                kernel.folders_of(folder).into_iter().filter(|name| !others.contains(name)).collect();
            for name in gone {
                self.leave(&folder.join(&name));
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (folder, others);
    }

    /// Takes in what happened; `true`: some of it was lost.
    pub(crate) fn hear(&mut self, now: u64, ledger: &mut Ledger) -> bool {
        let lost = self.hear_kernel(now, ledger);
        if self.next_poll().is_some_and(|at| at <= now) {
            self.polled_at = now;
            for folder in &self.unwatched {
                ledger.touch(now, folder.clone(), Touch::Folder);
            }
        }
        lost
    }

    #[cfg(target_os = "linux")]
    fn hear_kernel(&mut self, now: u64, ledger: &mut Ledger) -> bool {
        let mut lost = false;
        let mut new_folders = Vec::new();
        let Some(kernel) = &mut self.kernel else { return false };
        let heard = kernel.hear(|heard| match heard {
            Heard::Touch(path, touch) => {
                if touch == Touch::Folder {
                    new_folders.push(path.clone());
                }
                ledger.touch(now, path, touch);
            }
            Heard::Overflow => lost = true,
        });
        if let Err(error) = heard {
            tracing::warn!(path = ?self.root, %error, "the kernel's watcher cannot be read; beginning anew");
            self.begin_anew();
            return true;
        }
        // Not only when it is looked at: what is made in it meanwhile is heard.
        let root = self.root.clone();
        for folder in new_folders {
            self.enter(&root, &folder);
        }
        lost
    }

    #[cfg(not(target_os = "linux"))]
    fn hear_kernel(&mut self, _: u64, _: &mut Ledger) -> bool {
        false
    }

    /// When to look at what the kernel does not tell of.
    pub(crate) fn next_poll(&self) -> Option<u64> {
        (!self.unwatched.is_empty()).then_some(self.polled_at + self.interval_ms)
    }

    /// A look went on for this long.
    pub(crate) fn looked(&mut self, from: u64, to: u64) {
        if self.polling.interval_ms.is_none() && !self.unwatched.is_empty() {
            self.interval_ms = POLL_MS.max(to.saturating_sub(from) * POLL_SHARE);
            self.polled_at = self.polled_at.max(to);
        }
        if self.unwatched.is_empty() && std::mem::replace(&mut self.told, false) {
            tracing::info!(path = ?self.root, "the kernel watches every folder again");
        }
    }
}

#[cfg(target_os = "linux")]
fn is_remote(root: &Path) -> bool {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the kinds of file systems have 32 bits"
    )]
    rustix::fs::statfs(root).is_ok_and(|found| REMOTE.contains(&(found.f_type as u32)))
}
