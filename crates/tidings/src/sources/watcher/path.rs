//! Names of what lies under a watched folder, as the bytes that the file system has. Knows no file system.

use std::{ffi::OsStr, fmt, os::unix::ffi::OsStrExt as _, path::PathBuf};

/// A path below the watched folder; empty: the folder itself. Parts are kept apart by a byte that no name has and that sorts
/// before all others, so that what is in a folder follows right behind it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct RelPath(Box<[u8]>);

/// One part of a path.
pub(crate) type Name = Box<[u8]>;

const BETWEEN: u8 = 0;
/// The least byte that can follow a folder's name where what is in it has ended.
const BEHIND: u8 = 1;

impl RelPath {
    /// The watched folder itself.
    pub(crate) fn root() -> Self {
        Self::default()
    }

    /// A path as it was [stored](Self::as_bytes).
    pub(crate) fn stored(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// For storing.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn join(&self, name: &[u8]) -> Self {
        if self.is_root() {
            return Self(name.into());
        }
        Self([&self.0, &[BETWEEN][..], name].concat().into())
    }

    /// The folder that it is in; of the watched folder: itself.
    pub(crate) fn parent(&self) -> Self {
        let end = self.0.iter().rposition(|byte| *byte == BETWEEN).unwrap_or(0);
        Self(self.0[..end].into())
    }

    pub(crate) fn name(&self) -> &[u8] {
        self.0.rsplit(|byte| *byte == BETWEEN).next().unwrap_or_default()
    }

    /// Its parts from the top.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == BETWEEN).filter(|part| !part.is_empty())
    }

    /// The folders that it is in, from the watched folder down, without itself.
    pub(crate) fn folders(&self) -> impl Iterator<Item = Self> + '_ {
        let ends = self.0.iter().enumerate().filter(|(_, byte)| **byte == BETWEEN).map(|(end, _)| end);
        std::iter::once(0).chain(ends).filter(|_| !self.is_root()).map(|end| Self(self.0[..end].into()))
    }

    /// Whether it is in the folder, at any depth, or is it.
    pub(crate) fn is_in(&self, folder: &Self) -> bool {
        let rest = self.0.strip_prefix(&*folder.0);
        folder.is_root() || rest.is_some_and(|rest| rest.is_empty() || rest[0] == BETWEEN)
    }

    /// What remains below a folder that it is in.
    pub(crate) fn below(&self, folder: &Self) -> Self {
        let start = if folder.is_root() { 0 } else { (folder.0.len() + 1).min(self.0.len()) };
        Self(self.0[start..].into())
    }

    /// The first of what can follow behind everything that is in this folder.
    pub(crate) fn behind(&self) -> Self {
        Self([&self.0, &[BEHIND][..]].concat().into())
    }

    /// Relative to the watched folder, as the file system has it.
    pub(crate) fn to_path(&self) -> PathBuf {
        self.parts().map(OsStr::from_bytes).collect()
    }

    /// With slashes.
    pub(crate) fn slashed(&self) -> Vec<u8> {
        self.0.iter().map(|byte| if *byte == BETWEEN { b'/' } else { *byte }).collect()
    }

    /// With slashes, as text; what is not UTF-8 is replaced.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.slashed()).into_owned()
    }
}

impl fmt::Debug for RelPath {
    /// Escaped: names may forge lines of the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.slashed().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_folder_follows_right_behind_it() {
        let path =
            |text: &str| text.split('/').fold(RelPath::root(), |path, part| path.join(part.as_bytes()));
        let mut paths: Vec<_> = ["a", "a/b", "a/b/c", "a/\u{1}", "a!", "a!/x", "a0", "ab"].map(path).into();
        paths.sort();
        let within: Vec<_> = paths.iter().map(|other| other.is_in(&path("a"))).collect();
        assert_eq!(within, [true, true, true, true, false, false, false, false]);
        for other in &paths {
            let before = *other < path("a").behind();
            assert_eq!(before, other.is_in(&path("a")), "{other:?}");
        }
        assert_eq!(path("a/b/c").parent(), path("a/b"));
        assert_eq!((path("a").parent(), RelPath::root().parent()), (RelPath::root(), RelPath::root()));
        assert_eq!(path("a/b/c").below(&path("a")), path("b/c"));
        assert_eq!(path("a/b/c").folders().collect::<Vec<_>>(), [RelPath::root(), path("a"), path("a/b")]);
        assert_eq!((path("a/b/c").name(), path("a/b/c").text()), (&b"c"[..], "a/b/c".to_owned()));
    }

    #[test]
    fn names_that_are_not_text_stay_apart() {
        let (one, other) = (RelPath::root().join(b"\xff"), RelPath::root().join(b"\xfe"));
        assert_eq!(one.text(), other.text());
        assert_ne!(one, other);
        assert_eq!(format!("{one:?}"), r#""\xff""#);
    }
}
