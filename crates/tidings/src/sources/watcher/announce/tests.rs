use std::os::unix::ffi::OsStrExt as _;

use super::*;
use crate::sources::watcher::index::Kind;

const PROGRESS: Progress = Progress { term: 1, batches: 7, device: 0 };

fn path(text: &str) -> RelPath {
    text.split('/').fold(RelPath::root(), |path, part| path.join(part.as_bytes()))
}

fn entry(inode: u64) -> Entry {
    Entry { kind: Kind::File, size: 5, modified_ns: 1, changed_ns: 2, inode, fresh: false }
}

fn change(before: Option<u64>, after: Option<u64>) -> Change {
    Change { before: before.map(entry), after: after.map(entry), forgotten: false }
}

fn announcer() -> Announcer {
    Announcer { belonging: Belonging::Project("p1".try_into().unwrap()), paths_max: 3, bytes_max: 1 << 20 }
}

/// Without their ids.
fn events(announcer: &Announcer, changes: &[(RelPath, Change)]) -> Vec<Value> {
    let batches = announcer.batches(PROGRESS, changes.iter().cloned().collect());
    let mut events: Vec<_> = batches.into_iter().flat_map(|batch| batch.events).collect();
    for event in &mut events {
        assert!(event.as_object_mut().unwrap().remove("id").is_some());
        tidings_protocol::Event::parse(
            event.to_string().as_bytes(),
            1 << 20,
            jiff::Timestamp::UNIX_EPOCH.into(),
        )
        .unwrap();
    }
    events
}

#[test]
fn what_is_new_changed_and_gone_is_told_of_by_path() {
    let changes = [
        (path("d/new"), change(None, Some(1))),
        (path("changed"), change(Some(2), Some(3))),
        (path("gone"), change(Some(4), None)),
        (path("unwatched"), Change { forgotten: true, ..change(Some(5), None) }),
    ];
    assert_eq!(
        events(&announcer(), &changes),
        [
            json!({"type": "file.changed", "project_id": "p1", "file_path": "changed", "change_type": "modified", "size": 5}),
            json!({"type": "file.uploaded", "project_id": "p1", "file": {"name": "new", "path": "d/new", "size": 5}}),
            json!({"type": "file.deleted", "project_id": "p1", "file_path": "gone"}),
        ]
    );
}

#[test]
fn a_rename_is_a_pair_side_by_side() {
    let changes = [
        (path("z"), change(Some(1), None)),
        (path("a"), change(None, Some(1))),
        (path("m"), change(None, Some(2))),
    ];
    let events = events(&announcer(), &changes);
    let told: Vec<_> = events
        .iter()
        .map(|event| {
            (event["type"].as_str().unwrap(), event["renamed_to"].as_str(), event["renamed_from"].as_str())
        })
        .collect();
    assert_eq!(
        told,
        [
            ("file.uploaded", None, None),
            ("file.deleted", Some("a"), None),
            ("file.uploaded", None, Some("z")),
        ]
    );
}

#[test]
fn each_folder_is_its_own_project_and_paths_begin_below_it() {
    let announcer = Announcer { belonging: Belonging::Folder, ..announcer() };
    let changes = [(path("p1/d/a"), change(None, Some(1))), (path("p2/a"), change(Some(1), None))];
    let events = events(&announcer, &changes);
    assert_eq!(events[0]["project_id"], "p1");
    assert_eq!(events[0]["file"]["path"], "d/a");
    assert_eq!((&events[1]["project_id"], &events[1]["renamed_to"]), (&json!("p2"), &Value::Null));
}

#[test]
fn names_that_are_not_text_have_their_bytes_beside() {
    let name = std::ffi::OsStr::from_bytes(b"\xffa");
    let events = events(&announcer(), &[(RelPath::root().join(name.as_bytes()), change(None, Some(1)))]);
    assert_eq!(
        (&events[0]["file"]["path"], &events[0]["path_base64"]),
        (&json!("\u{fffd}a"), &json!("/2E="))
    );
}

#[test]
fn many_changes_are_one_event_which_counts_when_it_cannot_list() {
    let changes: Vec<_> =
        (0..10).map(|n| (path(&format!("d{}/f{n}", n % 2)), change(None, Some(n)))).collect();
    let listed = &events(&announcer(), &changes)[0];
    assert_eq!(
        (&listed["type"], &listed["workspace_id"], &listed["project_id"]),
        (&json!("workspace.changed"), &json!("p1"), &json!("p1"))
    );
    assert_eq!(listed["changes"]["added"].as_array().unwrap().len(), 10);
    assert!(listed["truncated"].is_null());
    let small = Announcer { bytes_max: 200, ..announcer() };
    let counted = &events(&small, &changes)[0];
    assert_eq!(counted["truncated"], true);
    assert!(counted["changes"]["added"].as_array().unwrap().len() < 10);
    assert_eq!(counted["counts"], json!({".": {"added": 10}}));
    let many: Vec<_> =
        (0..2000).map(|n| (path(&format!("top/d{}/f{n}", n % 300)), change(Some(n), None))).collect();
    let many = &events(&announcer(), &many)[0];
    assert_eq!((&many["truncated"], &many["counts"]), (&json!(true), &json!({"top": {"deleted": 2000}})));
}

#[test]
fn ids_are_those_of_the_batch_and_the_change_alone() {
    let changes: Changes = [(path("a"), change(None, Some(1)))].into();
    let id = |progress: Progress, changes: &Changes| {
        announcer().batches(progress, changes.clone())[0].events[0]["id"].as_str().unwrap().to_owned()
    };
    let first = id(PROGRESS, &changes);
    assert_eq!(first, id(PROGRESS, &changes));
    assert_ne!(first, id(Progress { batches: 8, ..PROGRESS }, &changes));
    assert_ne!(first, id(Progress { term: 2, ..PROGRESS }, &changes));
    assert_ne!(first, id(PROGRESS, &[(path("a"), change(None, Some(2)))].into()));
}
