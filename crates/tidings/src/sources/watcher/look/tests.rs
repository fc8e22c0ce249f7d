use std::{fs, os::unix::fs::symlink};

use super::*;

fn path(text: &str) -> RelPath {
    text.split('/').fold(RelPath::root(), |path, part| path.join(part.as_bytes()))
}

fn rules(ignore: &[&str], only: &[&str]) -> Rules {
    let owned = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    Rules::new(false, true, true, &owned(ignore), &owned(only)).unwrap()
}

/// A disk on which some folders may not be read.
struct Locked(Disk, Vec<RelPath>);

impl Files for Locked {
    fn stat(&self, path: &RelPath) -> io::Result<Found> {
        self.0.stat(path)
    }

    fn list(&self, folder: &RelPath) -> io::Result<Vec<(Name, io::Result<Found>)>> {
        if self.1.contains(folder) {
            return Err(Errno::ACCESS.into());
        }
        self.0.list(folder)
    }

    fn read(&self, path: &RelPath) -> io::Result<Vec<u8>> {
        self.0.read(path)
    }
}

#[derive(Default)]
struct Notes {
    files: Vec<String>,
    gone: Vec<RelPath>,
    ignored: Vec<RelPath>,
    unread: Vec<RelPath>,
}

impl Witness for Notes {
    fn enter(&mut self, _: &RelPath) -> bool {
        true
    }

    fn see(&mut self, sight: Sight) {
        match sight {
            Sight::File(path, _) => self.files.push(path.text()),
            Sight::Gone(path) => self.gone.push(path),
            Sight::Ignored(path) => self.ignored.push(path),
            Sight::Folder { path, files, .. } => {
                self.files.extend(files.iter().map(|(name, _)| path.join(name).text()));
                self.files.sort();
            }
        }
    }

    fn cannot_see(&mut self, path: &RelPath, _: &io::Error) {
        self.unread.push(path.clone());
    }
}

fn seen(files: &dyn Files, rules: &mut Rules, at: &RelPath) -> Notes {
    let mut notes = Notes::default();
    look(files, rules, at, &mut notes);
    notes
}

fn disk(files: &[(&str, &str)]) -> (tempfile::TempDir, Disk) {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let root = folder.path().to_owned();
    (folder, Disk { root })
}

#[test]
fn a_folder_that_may_not_be_read_is_told_of_and_nothing_in_it_is_gone() {
    let (_folder, disk) = disk(&[("locked/a", ""), ("open/b", "")]);
    let files = Locked(disk, vec![path("locked")]);
    let notes = seen(&files, &mut rules(&[], &[]), &RelPath::root());
    assert_eq!(
        (notes.files, notes.unread, notes.gone),
        (vec!["open/b".to_owned()], vec![path("locked")], Vec::new())
    );
}

#[test]
fn nothing_is_seen_through_a_link() {
    let (folder, disk) = disk(&[("real/a", "")]);
    symlink(folder.path().join("real"), folder.path().join("link")).unwrap();
    let mut rules = rules(&[], &[]);
    assert_eq!(seen(&disk, &mut rules, &RelPath::root()).files, ["link", "real/a"]);
    assert_eq!(seen(&disk, &mut rules, &path("link/a")).gone, [path("link/a")]);
    assert!(matches!(disk.stat(&path("link")).unwrap(), Found::File(Entry { kind: Kind::Link, .. })));
}

#[test]
fn rules_of_the_settings_stand_over_those_of_the_files_and_deeper_files_over_higher_ones() {
    let (_folder, disk) = disk(&[
        (".gitignore", "*.tmp\n/out/\n"),
        ("a.tmp", ""),
        ("out/x", ""),
        ("sub/out/x", ""),
        ("sub/.gitignore", "!kept.tmp\n"),
        ("sub/kept.tmp", ""),
        ("sub/not.tmp", ""),
        ("video.part", ""),
        (".git/config", ""),
    ]);
    let all = |rules: &mut Rules| seen(&disk, rules, &RelPath::root()).files;
    assert_eq!(all(&mut rules(&[], &[])), [".gitignore", "sub/.gitignore", "sub/kept.tmp", "sub/out/x"]);
    assert_eq!(all(&mut rules(&["sub/"], &[])), [".gitignore"]);
    assert_eq!(all(&mut rules(&["!a.tmp", "!*.part", "/sub"], &[])), [".gitignore", "a.tmp", "video.part"]);
    assert_eq!(all(&mut rules(&[], &["x"])), ["sub/out/x"]);
    // A path by itself is held against the same.
    let mut rules = rules(&[], &[]);
    all(&mut rules);
    assert_eq!(seen(&disk, &mut rules, &path("out/x")).ignored, [path("out/x")]);
    assert_eq!(seen(&disk, &mut rules, &path(".git/config")).ignored, [path(".git/config")]);
    assert_eq!(seen(&disk, &mut rules, &path("sub/kept.tmp")).files, ["sub/kept.tmp"]);
}

#[test]
fn each_folder_has_patterns_of_its_own_and_what_cannot_be_a_project_is_left_out() {
    let (_folder, disk) =
        disk(&[("p1/raw/a", ""), ("p1/b", ""), ("p2/raw/c", ""), (" p3/d", ""), ("loose", "")]);
    let mut rules = Rules::new(true, true, true, &["/raw/".to_owned()], &[]).unwrap();
    assert_eq!(seen(&disk, &mut rules, &RelPath::root()).files, ["p1/b"]);
}
