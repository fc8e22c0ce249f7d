//! `tidings watch`, as its user runs it.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStderr, Command, Stdio},
};

use crate::{
    client::Client,
    commands::{run, text, tidings},
    fixture::Service,
    watch::{Fold, snapshot},
};

/// Ends with the test.
struct Process(Child);

impl Process {
    fn start(arguments: &[&str]) -> (Self, BufReader<ChildStderr>) {
        let mut command = tidings(arguments, &[("TIDINGS_LOG_FORMAT", "text")]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        (Self(child), log)
    }

    fn stop(mut self) -> bool {
        assert!(Command::new("kill").arg(self.0.id().to_string()).status().unwrap().success());
        self.0.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_until(log: &mut BufReader<ChildStderr>, words: &str) {
    let mut all = String::new();
    while !all.contains(words) {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended without `{words}`: {all}");
        all.push_str(&line);
    }
}

#[tokio::test]
async fn it_publishes_to_a_service_what_changes_also_while_the_service_or_it_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let (root, state) = (folder.path().join("files"), folder.path().join("state"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("old"), "x").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let address = format!("http://127.0.0.1:{port}");
    let arguments = [
        "watch",
        root.to_str().unwrap(),
        "--project",
        "p",
        "--service",
        &address,
        "--state",
        state.to_str().unwrap(),
    ];
    let (process, mut log) = Process::start(&arguments);
    read_until(&mut log, "baseline");
    fs::write(root.join("a"), "x").unwrap();
    read_until(&mut log, "cannot be reached");
    fs::write(root.join("b"), "x").unwrap();
    let mut fold = Fold { files: [("old".to_owned(), 1)].into(), events: Vec::new() };
    let service = Service::with(&[("BACKEND_PORT", &port)]);
    let mut client = Client::subscribed(&service, "p").await;
    // What came before the subscription is in the history.
    let url = service.url("/api/projects/p/events");
    crate::fixture::until("both", || async {
        let page = crate::fixture::request("GET", &url, &[], b"").await.json();
        page["events"].as_array().unwrap().len() == 2
    })
    .await;
    assert!(process.stop(), "it stops cleanly");
    let page = crate::fixture::request("GET", &url, &[], b"").await.json();
    for event in page["events"].as_array().unwrap() {
        fold.add(event.clone(), &root);
    }
    fs::remove_file(root.join("old")).unwrap();
    let (process, _log) = Process::start(&arguments);
    let event = loop {
        let event = client.next_event().await;
        if event["type"] == "file.deleted" {
            break event;
        }
    };
    fold.add(event, &root);
    assert_eq!(fold.files, snapshot(&root));
    let again = run(&arguments, &[]);
    assert!(text(&again.stderr).contains("another `tidings watch`"), "{}", text(&again.stderr));
    assert!(process.stop());
    client.close().await;
}

#[tokio::test]
async fn a_key_that_is_refused_is_told_and_nothing_is_lost_by_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("files");
    fs::create_dir(&root).unwrap();
    let state = folder.path().join("state");
    let key = "0123456789abcdef";
    let service = Service::with(&[("TIDINGS_PUBLISH_KEYS", key)]);
    let address = service.url("");
    let with = |key| {
        [
            "watch",
            root.to_str().unwrap(),
            "-p",
            "p",
            "--service",
            &address,
            "--state",
            state.to_str().unwrap(),
            "--key",
            key,
        ]
    };
    let mut client = Client::subscribed(&service, "p").await;
    let (process, mut log) = Process::start(&with("another-key-of-somebody"));
    read_until(&mut log, "baseline");
    fs::write(root.join("a"), "x").unwrap();
    read_until(&mut log, "it does not know the key");
    assert!(process.stop());
    let (process, mut log) = Process::start(&with(key));
    assert_eq!(client.next_event().await["file"]["path"], "a");
    assert!(process.stop());
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains(key), "{rest}");
    client.close().await;
}

#[test]
fn wrong_usage_is_told_with_what_was_expected() {
    for (arguments, words) in [
        (&["watch", "/srv"][..], "expected a `project` beside it"),
        (&["watch", "/srv/*", "-p", "p"], "one of the two"),
        (&["watch", "/srv", "-p", "../x"], "--project"),
        (&["watch", "/srv", "-p", "p", "--quiet-ms", "5000"], "--wait-ms-max"),
        (&["watch", "/srv", "-p", "p", "--ignore", "{a"], "--ignore"),
        (&["watch", "/srv", "-p", "p"], "--state"),
    ] {
        let output = run(arguments, &[]);
        assert!(
            !output.status.success() && text(&output.stderr).contains(words),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
}
