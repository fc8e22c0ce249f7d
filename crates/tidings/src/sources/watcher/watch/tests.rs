//! A folder that is watched on a real disk, with what takes its events and its state failing on demand.

use std::{
    fs, io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;

use super::*;
use crate::sources::watcher::{
    announce::Belonging,
    state::{FileStore, StateError},
    stop::{Stopper, stop},
};

/// Tells of what it is given, and answers as it is told to.
struct Scripted {
    announced: Sender<Vec<Value>>,
    heard: Sender<Option<Gap>>,
    answers: Arc<Mutex<Vec<Outcome>>>,
}

impl Sink for Scripted {
    fn announce(&mut self, events: &[Value]) -> Outcome {
        // Taken first: an answer for what comes next may be given as soon as this is told.
        let answer = self.answers.lock().pop().unwrap_or(Outcome::Taken);
        let _ = self.announced.send(events.to_vec());
        answer
    }

    fn heard(&mut self, gap: Option<Gap>) {
        let _ = self.heard.send(gap);
    }
}

/// A disk without room.
struct FullDisk;

impl Store for FullDisk {
    fn load(&mut self) -> Result<Option<(Index, Progress)>, StateError> {
        Ok(None)
    }

    fn replace(&mut self, _: &Index, _: Progress) -> Result<(), StateError> {
        Err(StateError::File { path: "state".into(), source: io::ErrorKind::StorageFull.into() })
    }

    fn add(&mut self, index: &Index, _: &Changes, progress: Progress) -> Result<(), StateError> {
        self.replace(index, progress)
    }
}

struct Running {
    announced: Receiver<Vec<Value>>,
    heard: Receiver<Option<Gap>>,
    answers: Arc<Mutex<Vec<Outcome>>>,
    stopper: Stopper,
    thread: JoinHandle<()>,
}

impl Running {
    /// Watches once the baseline is taken.
    fn start(root: &std::path::Path, store: Box<dyn Store>, files_max: usize) -> Self {
        let (announced, announcements) = channel();
        let (heard, hearings) = channel();
        let answers = Arc::new(Mutex::new(Vec::new()));
        let sink = Scripted { announced, heard, answers: Arc::clone(&answers) };
        let plan = Plan {
            root: root.to_owned(),
            announcer: Announcer {
                belonging: Belonging::Project("p".try_into().unwrap()),
                paths_max: 100,
                bytes_max: 1 << 20,
            },
            by_folder: false,
            timing: Timing { quiet_ms: 20, wait_ms_max: 200 },
            polling: Polling::default(),
            files_max,
        };
        let rules = Rules::new(false, true, true, &[], &[]).unwrap();
        let (stopper, asked) = stop().unwrap();
        let thread = std::thread::spawn(move || Watch::new(plan, rules, store, sink).run(&asked));
        let running = Self { announced: announcements, heard: hearings, answers, stopper, thread };
        assert_eq!(running.heard.recv().unwrap(), Some(Gap::None));
        running
    }

    fn next(&self) -> Vec<Value> {
        self.announced.recv().unwrap()
    }

    fn stop(self) {
        drop(self.stopper);
        self.thread.join().unwrap();
        assert!(self.announced.try_recv().is_err(), "something more was announced");
    }
}

#[test]
fn what_may_have_been_announced_is_repeated_as_it_was_and_what_was_not_is_looked_at_anew() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(folder.path(), Box::new(super::super::NoStore), 100);
    running.answers.lock().push(Outcome::Unknown("no answer".to_owned()));
    fs::write(folder.path().join("a"), "1").unwrap();
    let first = running.next();
    assert_eq!(first, running.next());
    running.answers.lock().extend((0..2).map(|_| Outcome::NotTaken("not there".to_owned())));
    fs::write(folder.path().join("b"), "1").unwrap();
    assert_eq!(running.next()[0]["file"]["path"], "b");
    fs::write(folder.path().join("c"), "1").unwrap();
    fs::remove_file(folder.path().join("b")).unwrap();
    loop {
        let events = running.next();
        let paths: Vec<_> = events.iter().map(|event| event["file"]["path"].as_str().unwrap()).collect();
        if paths == ["c"] && running.answers.lock().is_empty() {
            break;
        }
    }
    running.stop();
}

#[test]
fn without_room_for_the_state_it_goes_on_announcing() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(folder.path(), Box::new(FullDisk), 100);
    for name in ["a", "b"] {
        fs::write(folder.path().join(name), "1").unwrap();
        assert_eq!(running.next()[0]["file"]["path"], name);
    }
    running.stop();
}

#[test]
fn a_state_that_cannot_be_read_begins_anew_and_one_that_can_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (root, state) = (folder.path().join("files"), folder.path().join("state"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("old"), "1").unwrap();
    let store = || Box::new(FileStore::new(&state, "t"));
    Running::start(&root, store(), 100).stop();
    fs::write(root.join("new"), "1").unwrap();
    let running = Running::start(&root, store(), 100);
    assert_eq!(running.next()[0]["file"]["path"], "new");
    running.stop();
    let file = fs::read_dir(&state).unwrap().next().unwrap().unwrap().path();
    fs::write(file, "something else").unwrap();
    fs::remove_file(root.join("old")).unwrap();
    Running::start(&root, store(), 100).stop();
    fs::remove_file(root.join("new")).unwrap();
    let running = Running::start(&root, store(), 100);
    assert_eq!(running.next()[0]["file_path"], "new");
    running.stop();
}

#[test]
fn too_many_files_are_an_outage_until_there_is_room_again() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(folder.path(), Box::new(super::super::NoStore), 10);
    for number in 0..11 {
        fs::write(folder.path().join(format!("{number:02}")), "1").unwrap();
    }
    assert_eq!(running.heard.recv().unwrap(), None);
    for number in 0..5 {
        fs::remove_file(folder.path().join(format!("{number:02}"))).unwrap();
    }
    assert_eq!(running.heard.recv().unwrap(), Some(Gap::Recovered));
    let mut files = std::collections::BTreeSet::new();
    while files.len() != 6 {
        for event in running.next() {
            if event["type"] == "file.uploaded" {
                assert!(files.insert(event["file"]["path"].as_str().unwrap().to_owned()));
            } else {
                assert!(files.remove(event["file_path"].as_str().unwrap()));
            }
        }
    }
    drop(running.stopper);
    running.thread.join().unwrap();
}
