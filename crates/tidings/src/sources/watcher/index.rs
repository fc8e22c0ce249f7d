//! What was last announced of each file: the one side of every comparison. Pure.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Bound,
};

use super::path::{Name, RelPath};

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    /// The link itself; never what it leads to.
    Link,
    /// A pipe, a socket, a device.
    Other,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    pub(crate) modified_ns: i64,
    /// When its content or its attributes changed; nobody can set it.
    pub(crate) changed_ns: i64,
    pub(crate) inode: u64,
    /// It was looked at so soon after a change that another one could have the same times.
    pub(crate) fresh: bool,
}

impl Entry {
    /// The bytes of [`Entry::pack`].
    pub(crate) const PACKED: usize = 33;

    /// Whether a look that finds `after` shows another content. Attributes alone are none; only where the kernel told of
    /// writing, times that are not seen otherwise count.
    pub(crate) fn differs(&self, after: &Self, was_written: bool) -> bool {
        let of_content = |entry: &Self| (entry.kind, entry.size, entry.modified_ns, entry.inode);
        let in_secret = was_written && (self.changed_ns != after.changed_ns || self.fresh);
        of_content(self) != of_content(after) || in_secret
    }

    /// Whether it can be the same file under another name. An inode alone is given again at once.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        let identity = |entry: &Self| (entry.kind, entry.size, entry.modified_ns, entry.inode);
        identity(self) == identity(other)
    }

    pub(crate) fn pack(&self) -> [u8; Self::PACKED] {
        let mut packed = [0; Self::PACKED];
        packed[0] = match self.kind {
            Kind::File => 0,
            Kind::Link => 1,
            Kind::Other => 2,
        } | if self.fresh { 0x80 } else { 0 };
        packed[1..9].copy_from_slice(&self.size.to_le_bytes());
        packed[9..17].copy_from_slice(&self.modified_ns.to_le_bytes());
        packed[17..25].copy_from_slice(&self.changed_ns.to_le_bytes());
        packed[25..33].copy_from_slice(&self.inode.to_le_bytes());
        packed
    }

    pub(crate) fn unpack(packed: &[u8]) -> Option<Self> {
        let packed: &[u8; Self::PACKED] = packed.try_into().ok()?;
        let eight = |start: usize| packed[start..start + 8].try_into().map(u64::from_le_bytes).ok();
        let kind = match packed[0] & 0x7f {
            0 => Kind::File,
            1 => Kind::Link,
            2 => Kind::Other,
            _ => return None,
        };
        Some(Self {
            kind,
            fresh: packed[0] & 0x80 != 0,
            size: eight(1)?,
            modified_ns: eight(9)?.cast_signed(),
            changed_ns: eight(17)?.cast_signed(),
            inode: eight(25)?,
        })
    }
}

/// Every file, by its folder.
#[derive(Debug, Default)]
pub(crate) struct Index {
    folders: BTreeMap<RelPath, BTreeMap<Name, Entry>>,
    files: usize,
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.files
    }

    pub(crate) fn find(&self, path: &RelPath) -> Option<&Entry> {
        self.folders.get(&path.parent())?.get(path.name())
    }

    pub(crate) fn put(&mut self, path: &RelPath, entry: Entry) {
        let folder = self.folders.entry(path.parent()).or_default();
        if folder.insert(path.name().into(), entry).is_none() {
            self.files += 1;
        }
    }

    pub(crate) fn remove(&mut self, path: &RelPath) {
        let parent = path.parent();
        let Some(folder) = self.folders.get_mut(&parent) else { return };
        if folder.remove(path.name()).is_some() {
            self.files -= 1;
        }
        if folder.is_empty() {
            self.folders.remove(&parent);
        }
    }

    /// Everything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RelPath, Entry)> {
        let in_folder = |(folder, files): (&RelPath, &BTreeMap<Name, Entry>)| {
            files.iter().map(|(name, entry)| (folder.join(name), *entry)).collect::<Vec<_>>()
        };
        self.folders.iter().flat_map(in_folder)
    }

    /// The files that lie in the folder itself.
    pub(crate) fn files_of(&self, folder: &RelPath) -> impl Iterator<Item = (&Name, &Entry)> {
        self.folders.get(folder).into_iter().flatten()
    }

    /// The files in a folder, at any depth.
    pub(crate) fn files_in(&self, folder: &RelPath) -> impl Iterator<Item = (RelPath, Entry)> {
        let from = self.folders.range(folder.clone()..);
        let folder = folder.clone();
        let folders = from.take_while(move |(path, _)| path.is_in(&folder));
        folders.flat_map(|(path, files)| files.iter().map(|(name, entry)| (path.join(name), *entry)))
    }

    /// The names of the folders in this one that have files, at any depth.
    pub(crate) fn folders_of(&self, folder: &RelPath) -> HashSet<Name> {
        let mut names = HashSet::new();
        let mut from = Bound::Excluded(folder.clone());
        while let Some((path, _)) = self.folders.range((from, Bound::Unbounded)).next() {
            if !path.is_in(folder) {
                break;
            }
            let below = path.below(folder);
            let Some(name) = below.parts().next() else { break };
            names.insert(name.into());
            from = Bound::Included(folder.join(name).behind());
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_packed_and_unpacked() {
        let entry = Entry {
            kind: Kind::Link,
            size: u64::MAX,
            modified_ns: -1,
            changed_ns: i64::MIN,
            inode: 7,
            fresh: true,
        };
        assert_eq!(Entry::unpack(&entry.pack()), Some(entry));
        assert_eq!(Entry::unpack(&[3; Entry::PACKED]), None);
        assert_eq!(Entry::unpack(&[0; 5]), None);
    }
}
