use super::*;
use crate::sources::watcher::{difference::Change, index::Kind};

fn entry(inode: u64) -> Entry {
    Entry { kind: Kind::File, size: 1, modified_ns: 2, changed_ns: 3, inode, fresh: false }
}

fn path(name: &[u8]) -> RelPath {
    RelPath::root().join(b"d").join(name)
}

fn progress(batches: u64) -> Progress {
    Progress { term: 9, batches, device: 4 }
}

fn kept(store: &mut FileStore) -> Option<(Vec<(RelPath, Entry)>, Progress)> {
    store.load().unwrap().map(|(index, progress)| (index.iter().collect(), progress))
}

fn changes(changes: &[(&[u8], Option<u64>)]) -> Changes {
    let change = |after: Option<u64>| Change { before: None, after: after.map(entry), forgotten: false };
    changes.iter().map(|(name, after)| (path(name), change(*after))).collect()
}

#[test]
fn what_was_kept_is_read_again_and_half_a_frame_at_the_end_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::new(&folder.path().join("watch"), "t");
    assert!(kept(&mut store).is_none());
    let mut index = Index::default();
    index.put(&path(b"a"), entry(1));
    index.put(&path(b"\xff"), entry(2));
    store.replace(&index, progress(1)).unwrap();
    store.add(&index, &changes(&[(b"a", None), (b"b", Some(3))]), progress(2)).unwrap();
    let expected = vec![(path(b"b"), entry(3)), (path(b"\xff"), entry(2))];
    assert_eq!(kept(&mut store), Some((expected.clone(), progress(2))));
    store.add(&index, &changes(&[(b"c", Some(4))]), progress(3)).unwrap();
    let file = File::options().write(true).open(&store.path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    assert_eq!(kept(&mut store), Some((expected, progress(2))));
}

#[test]
fn a_long_log_is_written_anew_and_stays_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::new(folder.path(), "t");
    let mut index = Index::default();
    store.replace(&index, progress(0)).unwrap();
    let bytes_max = store.bytes_max;
    for number in 0..100_000_u64 {
        index.put(&path(b"a"), entry(number));
        store.add(&index, &changes(&[(b"a", Some(number))]), progress(number)).unwrap();
    }
    assert!(fs::metadata(&store.path).unwrap().len() <= bytes_max);
    assert_eq!(kept(&mut store), Some((vec![(path(b"a"), entry(99_999))], progress(99_999))));
}

#[test]
fn what_is_no_state_is_said_and_never_taken_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::new(folder.path(), "t");
    for text in ["", "something else", "tidings-watch 2\nxxxxxxxxxxxxxxxxxxxxxx", "tidings-watch 1\n"] {
        fs::write(&store.path, text).unwrap();
        assert!(matches!(store.load(), Err(StateError::Foreign(_))), "{text}");
    }
    fs::remove_file(&store.path).unwrap();
    fs::create_dir(&store.path).unwrap();
    assert!(store.load().is_err());
}
