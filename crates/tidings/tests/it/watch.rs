//! Folders that the service watches: what a subscriber is told always adds up to what lies there.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    client::Client,
    fixture::{Redis, Service, until},
};

/// Every file of a folder, with its size.
pub(crate) type Snapshot = BTreeMap<String, u64>;

/// What lies in a folder.
pub(crate) fn snapshot(root: &Path) -> Snapshot {
    let (mut files, mut waiting) = (Snapshot::new(), vec![root.to_owned()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                waiting.push(entry.path());
            } else {
                let path = entry.path().strip_prefix(root).unwrap().to_string_lossy().into_owned();
                files.insert(path, fs::symlink_metadata(entry.path()).unwrap().len());
            }
        }
    }
    files
}

/// A subscriber that adds up what it is told, and takes nothing that does not fit.
#[derive(Debug, Default)]
pub(crate) struct Fold {
    pub(crate) files: Snapshot,
    pub(crate) events: Vec<Value>,
}

impl Fold {
    pub(crate) fn of(root: &Path) -> Self {
        Self { files: snapshot(root), events: Vec::new() }
    }

    pub(crate) fn add(&mut self, event: Value, root: &Path) {
        let size_now = |path: &str| fs::symlink_metadata(root.join(path)).map_or(0, |found| found.len());
        match event["type"].as_str().unwrap() {
            "file.uploaded" => {
                let path = event["file"]["path"].as_str().unwrap().to_owned();
                let size = event["file"]["size"].as_u64().unwrap();
                assert_eq!(self.files.insert(path, size), None, "{event}");
            }
            "file.changed" => {
                let path = event["file_path"].as_str().unwrap().to_owned();
                let size = event["size"].as_u64().unwrap();
                assert!(self.files.insert(path, size).is_some(), "{event}");
            }
            "file.deleted" => {
                assert!(self.files.remove(event["file_path"].as_str().unwrap()).is_some(), "{event}");
            }
            "workspace.changed" => {
                assert!(event["truncated"].is_null(), "it cannot be added up: {event}");
                let list = |name: &str| event["changes"][name].as_array().unwrap().clone();
                for path in list("added").iter().chain(&list("modified")).map(|path| path.as_str().unwrap()) {
                    self.files.insert(path.to_owned(), size_now(path));
                }
                for path in list("deleted") {
                    assert!(self.files.remove(path.as_str().unwrap()).is_some(), "{path}");
                }
            }
            other => panic!("unexpected {other}"),
        }
        self.events.push(event);
    }

    /// Hears until this lies there, and no more comes.
    pub(crate) async fn hear_until(&mut self, client: &mut Client, root: &Path, expected: &Snapshot) {
        while self.files != *expected {
            let event = client.next_event().await;
            self.add(event, root);
        }
        client.nothing_waits().await;
    }

    pub(crate) fn types(&self) -> Vec<&str> {
        self.events.iter().map(|event| event["type"].as_str().unwrap()).collect()
    }
}

pub(crate) async fn until_watching(service: &Service) {
    until("watching", || async { service.health().await["status"] == "healthy" }).await;
}

fn table(path: &Path, more: &Value) -> String {
    let mut table = json!({"path": path, "project": "p"});
    table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!([table]).to_string()
}

/// A folder with some files, a service that watches it, and a subscriber.
struct Watched {
    folder: TempDir,
    root: PathBuf,
    service: Service,
    client: Client,
    fold: Fold,
}

impl Watched {
    async fn with(more: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("files");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("old"), "old").unwrap();
        fs::write(root.join("sub/old"), "old").unwrap();
        let service = Service::with(&[("TIDINGS_WATCH", &table(&root, more))]);
        until_watching(&service).await;
        let client = Client::subscribed(&service, "p").await;
        let fold = Fold::of(&root);
        Self { folder, root, service, client, fold }
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.root.join(path), text).unwrap();
    }

    async fn settle(&mut self) -> Vec<Value> {
        let expected = snapshot(&self.root);
        self.fold.hear_until(&mut self.client, &self.root, &expected).await;
        std::mem::take(&mut self.fold.events)
    }

    async fn end(self) {
        self.client.close().await;
        drop(self.service);
    }
}

#[tokio::test]
async fn the_first_sight_is_the_baseline_and_then_each_change_is_told_of_once() {
    let mut watched = Watched::with(&json!({})).await;
    watched.client.nothing_waits().await;
    watched.write("new", "12345");
    let events = watched.settle().await;
    assert_eq!(
        (&events[0]["type"], &events[0]["file"]),
        (&json!("file.uploaded"), &json!({"name": "new", "path": "new", "size": 5}))
    );
    assert_eq!(events[0]["project_id"], "p");
    watched.write("sub/old", "longer");
    let events = watched.settle().await;
    assert_eq!(
        (&events[0]["type"], &events[0]["change_type"], &events[0]["file_path"]),
        (&json!("file.changed"), &json!("modified"), &json!("sub/old"))
    );
    fs::remove_file(watched.root.join("old")).unwrap();
    let events = watched.settle().await;
    assert_eq!(
        (events.len(), &events[0]["type"], &events[0]["file_path"]),
        (1, &json!("file.deleted"), &json!("old"))
    );
    assert!(
        watched
            .service
            .metric("tidings_events_appended_total{source=\"watcher\",type=\"file.deleted\"}")
            .await
            > 0.0
    );
    watched.end().await;
}

/// As vim does it with `backupcopy=no`, and as VS Code and rsync do it.
#[tokio::test]
async fn an_editors_atomic_save_is_one_change() {
    let mut watched = Watched::with(&json!({"quiet_ms": 1500})).await;
    let root = watched.root.clone();
    watched.write("4913", "");
    fs::remove_file(root.join("4913")).unwrap();
    watched.write(".old.swp", "swap");
    fs::rename(root.join("old"), root.join("old~")).unwrap();
    watched.write("old", "by vim");
    fs::remove_file(root.join("old~")).unwrap();
    fs::remove_file(root.join(".old.swp")).unwrap();
    assert_eq!(watched.settle().await.len(), 1);
    watched.write("sub/.tmp.Xy12", "by rsync, as long");
    fs::rename(root.join("sub/.tmp.Xy12"), root.join("sub/old")).unwrap();
    let events = watched.settle().await;
    assert_eq!((events.len(), &events[0]["type"]), (1, &json!("file.changed")));
    watched.end().await;
}

#[tokio::test]
async fn renames_are_pairs_also_of_whole_folders() {
    let mut watched = Watched::with(&json!({})).await;
    let root = watched.root.clone();
    fs::rename(root.join("old"), root.join("renamed")).unwrap();
    let events = watched.settle().await;
    assert_eq!((&events[0]["file_path"], &events[0]["renamed_to"]), (&json!("old"), &json!("renamed")));
    assert_eq!((&events[1]["file"]["path"], &events[1]["renamed_from"]), (&json!("renamed"), &json!("old")));
    fs::rename(root.join("sub"), root.join("moved")).unwrap();
    let events = watched.settle().await;
    assert_eq!((events.len(), &events[1]["renamed_from"]), (2, &json!("sub/old")));
    // What happens under the new name is heard.
    watched.write("moved/more", "x");
    assert_eq!(watched.settle().await.len(), 1);
    watched.end().await;
}

#[tokio::test]
async fn a_folder_that_is_moved_in_or_out_brings_or_takes_its_files() {
    let mut watched = Watched::with(&json!({})).await;
    let outside = watched.folder.path().join("outside");
    fs::create_dir_all(outside.join("deep/er")).unwrap();
    for number in 0..20 {
        fs::write(outside.join(format!("deep/er/{number}")), "x").unwrap();
    }
    fs::rename(&outside, watched.root.join("in")).unwrap();
    assert_eq!(watched.settle().await.len(), 20);
    fs::rename(watched.root.join("in"), &outside).unwrap();
    assert_eq!(watched.settle().await.len(), 20);
    // The same files once more: they are news again.
    fs::rename(&outside, watched.root.join("in")).unwrap();
    assert_eq!(watched.settle().await.len(), 20);
    watched.end().await;
}

#[tokio::test]
async fn a_burst_is_a_few_messages_that_add_up() {
    let mut watched = Watched::with(&json!({"paths_max": 10})).await;
    for folder in 0..30 {
        let path = watched.root.join(format!("burst/{folder}"));
        fs::create_dir_all(&path).unwrap();
        for file in 0..30 {
            fs::write(path.join(file.to_string()), "x").unwrap();
        }
    }
    let events = watched.settle().await;
    assert_eq!(events[0]["type"], "workspace.changed");
    assert_eq!(events[0]["workspace_id"], "p");
    fs::remove_dir_all(watched.root.join("burst")).unwrap();
    let events = watched.settle().await;
    assert!(events.iter().all(|event| event["type"] == "workspace.changed"), "{events:?}");
    watched.end().await;
}

#[tokio::test]
async fn an_upload_is_told_of_when_its_writer_has_closed_it() {
    let mut watched = Watched::with(&json!({})).await;
    let mut upload = fs::File::create(watched.root.join("upload")).unwrap();
    upload.write_all(b"half").unwrap();
    watched.write("other", "x");
    let event = watched.client.next_event().await;
    assert_eq!(event["file"]["path"], "other");
    watched.fold.add(event, &watched.root);
    upload.write_all(b" and half").unwrap();
    drop(upload);
    let events = watched.settle().await;
    assert_eq!((events.len(), &events[1]["file"]["size"]), (2, &json!(13)));
    watched.end().await;
}

#[tokio::test]
async fn ignored_files_are_not_told_of_and_rules_that_change_hold_at_once() {
    let mut watched = Watched::with(&json!({"ignore": ["*.log"]})).await;
    let root = watched.root.clone();
    fs::create_dir_all(root.join("built/deep")).unwrap();
    watched.write(".gitignore", "/built/\n");
    watched.write("sub/.gitignore", "secret\n!kept.log\n");
    for hidden in ["built/deep/x", "sub/secret", "a.log", "x.part"] {
        watched.write(hidden, "hidden");
    }
    watched.write("secret", "of no rule");
    let mut expected = snapshot(&root);
    for hidden in ["built/deep/x", "sub/secret", "a.log", "x.part"] {
        expected.remove(hidden);
    }
    watched.fold.hear_until(&mut watched.client, &root, &expected).await;
    watched.write(".gitignore", "/built/deep/y\n");
    expected.insert("built/deep/x".to_owned(), 6);
    expected.insert(".gitignore".to_owned(), 14);
    watched.fold.hear_until(&mut watched.client, &root, &expected).await;
    watched.end().await;
}

#[tokio::test]
async fn links_are_themselves_and_lead_nowhere() {
    let mut watched = Watched::with(&json!({})).await;
    let (root, outside) = (watched.root.clone(), watched.folder.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("private"), "x").unwrap();
    symlink(&outside, root.join("link")).unwrap();
    assert_eq!(watched.settle().await[0]["file"]["path"], "link");
    // In place of a folder, too.
    fs::remove_dir_all(root.join("sub")).unwrap();
    symlink(&outside, root.join("sub")).unwrap();
    watched.settle().await;
    fs::write(outside.join("more"), "x").unwrap();
    watched.write("last", "x");
    assert_eq!(watched.settle().await.len(), 1);
    watched.end().await;
}

#[tokio::test]
async fn names_that_are_not_text_are_told_of_with_their_bytes() {
    use std::os::unix::ffi::OsStrExt as _;
    let mut watched = Watched::with(&json!({})).await;
    for name in [&b"\xff"[..], b"\xfe"] {
        fs::write(watched.root.join(std::ffi::OsStr::from_bytes(name)), "x").unwrap();
    }
    let mut told = Vec::new();
    while told.len() < 2 {
        let event = watched.client.next_event().await;
        assert_eq!(event["file"]["path"], "\u{fffd}");
        told.push(event["path_base64"].as_str().unwrap().to_owned());
    }
    told.sort();
    assert_eq!(told, ["/g==", "/w=="]);
    watched.end().await;
}

#[tokio::test]
async fn a_folder_that_is_missing_is_an_outage_and_no_deletion() {
    let mut watched = Watched::with(&json!({})).await;
    let away = watched.folder.path().join("away");
    fs::rename(&watched.root, &away).unwrap();
    until("degraded", || async { watched.service.health().await["status"] == "degraded" }).await;
    fs::write(away.join("meanwhile"), "x").unwrap();
    fs::remove_file(away.join("old")).unwrap();
    fs::rename(&away, &watched.root).unwrap();
    let events = watched.settle().await;
    assert_eq!(events.len(), 2, "{events:?}");
    until_watching(&watched.service).await;
    watched.write("after", "x");
    assert_eq!(watched.settle().await.len(), 1);
    watched.end().await;
}

#[tokio::test]
async fn where_the_kernel_tells_nothing_it_is_looked_every_now_and_then() {
    let mut watched = Watched::with(&json!({"poll": true, "poll_seconds": 1})).await;
    watched.write("new", "x");
    fs::remove_file(watched.root.join("old")).unwrap();
    let events = watched.settle().await;
    assert_eq!(events.len(), 2, "{events:?}");
    watched.end().await;
}

#[tokio::test]
async fn each_folder_is_a_project_and_nobody_is_told_of_anothers_files() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("p")).unwrap();
    fs::create_dir_all(root.join("q")).unwrap();
    let table = json!([{"path": root.join("*")}]).to_string();
    let service = Service::with(&[("TIDINGS_WATCH", &table)]);
    until_watching(&service).await;
    let mut p = Client::subscribed(&service, "p").await;
    let mut later = Client::subscribed(&service, "later").await;
    fs::write(root.join("q/a"), "x").unwrap();
    fs::write(root.join("of nobody"), "x").unwrap();
    fs::create_dir(root.join("later")).unwrap();
    fs::write(root.join("later/a"), "x").unwrap();
    let event = later.next_event().await;
    assert_eq!((&event["project_id"], &event["file"]["path"]), (&json!("later"), &json!("a")));
    fs::write(root.join("p/b"), "x").unwrap();
    assert_eq!(p.next_event().await["file"]["path"], "b");
    fs::remove_dir_all(root.join("later")).unwrap();
    assert_eq!(later.next_event().await["type"], "file.deleted");
    p.nothing_waits().await;
    p.close().await;
    later.close().await;
}

#[tokio::test]
async fn what_changes_while_the_service_is_down_is_told_of_at_its_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let (root, data) = (folder.path().join("files"), folder.path().join("data"));
    fs::create_dir(&root).unwrap();
    for name in ["kept", "changed", "gone"] {
        fs::write(root.join(name), name).unwrap();
    }
    let table = table(&root, &json!({}));
    let settings = [
        ("TIDINGS_WATCH", table.as_str()),
        ("TIDINGS_PERSIST", "true"),
        ("TIDINGS_DATA_DIR", data.to_str().unwrap()),
    ];
    let service = Service::with(&settings);
    until_watching(&service).await;
    let mut client = Client::subscribed(&service, "p").await;
    fs::write(root.join("live"), "x").unwrap();
    let position = client.next_event().await["offset"].as_u64().unwrap();
    client.close().await;
    drop(service);
    fs::write(root.join("changed"), "otherwise").unwrap();
    fs::remove_file(root.join("gone")).unwrap();
    fs::write(root.join("new"), "x").unwrap();
    for _ in 0..2 {
        let service = Service::with(&settings);
        until_watching(&service).await;
        let history = || async {
            let url = service.url("/api/projects/p/events");
            let page = crate::fixture::request("GET", &url, &[], b"").await.json();
            let behind = |event: &&Value| event["offset"].as_u64().unwrap() > position;
            let events = page["events"].as_array().unwrap().iter().filter(behind).cloned();
            events.collect::<Vec<_>>()
        };
        until("the difference", || async { history().await.len() >= 3 }).await;
        let mut types: Vec<_> =
            history().await.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect();
        types.sort();
        // The second start finds nothing that is not told.
        assert_eq!(types, ["file.changed", "file.deleted", "file.uploaded"]);
    }
}

#[tokio::test]
async fn of_several_nodes_one_watches_and_the_next_goes_on_where_it_was() {
    let redis = Redis::started().await;
    let url = redis.url();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    fs::write(root.join("old"), "x").unwrap();
    let table = table(&root, &json!({}));
    let node =
        |name: &str| Service::with(&[("TIDINGS_WATCH", &table), ("REDIS_URL", &url), ("CONTAINER_ID", name)]);
    let first = node("first");
    until_watching(&first).await;
    let second = node("second");
    until_watching(&second).await;
    let mut client = Client::subscribed(&second, "p").await;
    let mut fold = Fold::of(&root);
    fs::write(root.join("a"), "x").unwrap();
    fold.hear_until(&mut client, &root, &snapshot(&root)).await;
    drop(first);
    fs::write(root.join("b"), "x").unwrap();
    fs::remove_file(root.join("old")).unwrap();
    fold.hear_until(&mut client, &root, &snapshot(&root)).await;
    assert_eq!(fold.types().len(), 3, "{:?}", fold.events);
    client.close().await;
}

#[tokio::test]
async fn what_the_service_itself_writes_into_a_watched_folder_is_not_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let data = root.join("kept/data");
    let table = table(&root, &json!({}));
    let settings = [
        ("TIDINGS_WATCH", table.as_str()),
        ("TIDINGS_PERSIST", "true"),
        ("TIDINGS_DATA_DIR", data.to_str().unwrap()),
    ];
    let service = Service::with(&settings);
    until_watching(&service).await;
    let mut client = Client::subscribed(&service, "p").await;
    for name in ["a", "b", "c"] {
        fs::write(root.join(name), "x").unwrap();
        assert_eq!(client.next_event().await["file"]["path"], name);
    }
    client.nothing_waits().await;
    client.close().await;
}
