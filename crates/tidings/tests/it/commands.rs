//! The command line, as its user runs it.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::fixture::{Service, request};

pub(crate) fn tidings(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let folder = std::env::temp_dir();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidings"));
    command
        .args(arguments)
        .env_clear()
        // The folder is everybody's.
        .env("TIDINGS_PERSIST", "false")
        .envs(variables.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

pub(crate) fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    tidings(arguments, variables).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_url_is_printed_for_each_environment() {
    for (variables, expected) in [
        (&[][..], "ws://localhost:8000/ws\n"),
        (
            &[("ENVIRONMENT", "docker"), ("BACKEND_HOST", "live"), ("TIDINGS_AUTH", "none")],
            "ws://live:8000/ws\n",
        ),
        (
            &[("ENVIRONMENT", "production"), ("DOMAIN", "example.com"), ("TIDINGS_AUTH", "none")],
            "wss://example.com/ws\n",
        ),
    ] {
        assert_eq!(text(&run(&["url"], variables).stdout), expected);
    }
}

#[test]
fn config_shows_each_value_and_where_it_came_from_with_secrets_masked() {
    let output =
        run(&["config", "--port", "9000"], &[("TIDINGS_ADMIN_KEY", "s3cret"), ("TIDINGS_LISTEM", "x")]);
    let (shown, warned) = (text(&output.stdout), text(&output.stderr));
    let line = |name: &str| {
        shown
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap()
            .split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(line("BACKEND_PORT"), "9000 command line");
    assert_eq!(line("TIDINGS_ADMIN_KEY"), "******** environment");
    assert_eq!(line("WS_HEARTBEAT_INTERVAL"), "30 default");
    assert!(warned.contains("did you mean `TIDINGS_LISTEN`?"), "{warned}");
    assert!(!shown.contains("s3cret"));
}

#[test]
fn a_setting_that_cannot_be_read_ends_with_2_and_says_which() {
    for (variables, words) in [
        (
            &[("WS_HEARTBEAT_INTERVAL", "soon")][..],
            "WS_HEARTBEAT_INTERVAL (from environment): expected a whole number",
        ),
        (&[("ENVIRONMENT", "production")], "TIDINGS_AUTH: must be set"),
        (&[("TIDINGS_ADMIN_KEY_FILE", "/nowhere/key")], "cannot read `/nowhere/key`"),
    ] {
        let output = run(&["serve"], variables);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
    let output = run(&["serve", "--config", "/nowhere/tidings.toml"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("/nowhere/tidings.toml"), "{}", text(&output.stderr));
}

#[test]
fn a_key_of_many_lines_is_shown_in_one() {
    let key = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA9E8HQNoQXEt1svPNSWM5+Hzzz1d1xmoE+0EZHTfKGh0=\n-----END PUBLIC KEY-----\n";
    let output = run(&["config"], &[("TIDINGS_JWT_PUBLIC_KEY", key)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let line = "TIDINGS_JWT_PUBLIC_KEY     -----BEGIN PUBLIC KEY----- … (3 lines) environment";
    assert!(text(&output.stdout).lines().any(|shown| shown == line), "{}", text(&output.stdout));
}

#[test]
fn a_token_is_alone_on_the_standard_output_and_how_to_use_it_beside() {
    let secret = ("TIDINGS_JWT_SECRET", "a-secret-of-the-tests");
    let output = run(&["token", "--user", "u1", "--projects", "p1,team-a/*"], &[secret]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (token, hint) = (text(&output.stdout), text(&output.stderr));
    assert!(token.trim_end().split('.').count() == 3 && token.lines().count() == 1, "{token}");
    assert!(hint.contains("Authorization: Bearer") && hint.contains("cookie `token`"), "{hint}");
    assert!(hint.lines().count() == 1 && !hint.contains(secret.1), "{hint}");
}

#[test]
fn a_token_that_cannot_be_made_is_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let rubbish = folder.path().join("key.pem");
    std::fs::write(&rubbish, "rubbish").unwrap();
    for (arguments, variables, code, words) in [
        (&[][..], &[][..], 1, "set TIDINGS_JWT_SECRET"),
        (
            &[],
            &[("TIDINGS_JWT_SECRET", "short")],
            2,
            "TIDINGS_JWT_SECRET (from environment): expected at least 16 bytes",
        ),
        (&["--private-key", "/nowhere/key"], &[], 1, "`/nowhere/key` cannot be read"),
        (&["--private-key", rubbish.to_str().unwrap()], &[], 1, "expected a private key as PEM"),
        (&["--expires", "0"], &[], 2, "--expires"),
    ] {
        let output = run(&[&["token", "--user", "u1"], arguments].concat(), variables);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(text(&output.stderr).contains(words), "{arguments:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
    assert_eq!(run(&["token"], &[]).status.code(), Some(2));
}

#[test]
fn a_port_in_use_is_told_with_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = run(&["serve", "--port", &port], &[]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains(&port) && error.contains("another process has this port"), "{error}");
}

#[tokio::test]
async fn an_event_published_on_the_command_line_is_tailed_there() {
    let service = Service::start();
    let websocket = format!("ws://localhost:{}/ws", service.address.port());
    let url = service.url("");
    let mut tail =
        tidings(&["tail", "p", "--types", "task.*", "--count", "2", "--json", "--url", &websocket], &[])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
    crate::fixture::until("the tail subscribing", || async {
        service.metric("tidings_subscriptions").await > 0.5
    })
    .await;
    let fields = [
        "publish",
        "task.progress",
        "-p",
        "p",
        "task_id=t",
        "progress.current=3",
        "progress.total=10",
        "message=so far",
        "--url",
        &url,
    ];
    let published = run(&fields, &[]);
    assert!(published.status.success(), "{}", text(&published.stderr));
    let mut piped = tidings(&["publish", "-", "--url", &url], &[])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let lines = "{\"type\":\"file.deleted\",\"project_id\":\"p\",\"file_path\":\"a\"}\n{\"type\":\"task.completed\",\"project_id\":\"p\",\"task_id\":\"t\"}\n";
    piped.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(piped.wait().unwrap().success());
    let read = BufReader::new(tail.stdout.take().unwrap()).lines();
    let events: Vec<Value> = read.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert!(tail.wait().unwrap().success());
    assert_eq!(events.len(), 2);
    assert_eq!(
        (&events[0]["progress"]["percentage"], &events[0]["message"]),
        (&Value::from(30), &Value::from("so far"))
    );
    assert_eq!(events[1]["type"], "task.completed");
}

#[tokio::test]
async fn a_mistake_in_an_event_is_told_before_it_is_sent() {
    let output = run(&["publish", "task.progress", "-p", "p", "task_id=t", "progress=5"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("task.progress: progress: expected an object with current and total")
    );
}

#[tokio::test]
async fn a_service_that_is_not_there_is_told() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (http, websocket) = (format!("http://localhost:{port}"), format!("ws://localhost:{port}/ws"));
    for arguments in [
        &["publish", "a.b", "--url", &http][..],
        &["tail", "p", "--url", &websocket],
        &["healthcheck", "--url", &http],
    ] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("is the service running"), "{}", text(&output.stderr));
    }
}

#[tokio::test]
async fn a_health_check_passes_while_the_service_lives() {
    // Nothing that could be away for a moment on a busy machine.
    let service = Service::with(&[("TIDINGS_ENGINE", "embedded")]);
    let output = run(&["healthcheck", "--ready", "--url", &service.url("")], &[]);
    assert!(output.status.success() && text(&output.stdout).ends_with("ok\n"), "{output:?}");
}

#[tokio::test]
async fn dev_needs_nothing_and_prints_a_curl_line_that_works_when_pasted() {
    let mut dev = tidings(&["dev", "--port", "0"], &[("PATH", "/usr/bin:/bin")])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(dev.stdout.take().unwrap()).lines();
    let mut banner = Vec::new();
    let curl = loop {
        let line = lines.next().expect("the banner has a curl line").unwrap();
        if let Some(curl) = line.trim().strip_prefix("curl ") {
            break format!("curl -sS -o /dev/null -w '%{{http_code}}' {curl}");
        }
        banner.push(line);
    };
    let banner = banner.join("\n");
    assert!(banner.contains("INSECURE") && banner.contains("/console"), "{banner}");
    let published = Command::new("sh").args(["-c", &curl]).output().unwrap();
    assert_eq!(text(&published.stdout), "202", "{}", text(&published.stderr));
    let events =
        banner.lines().find_map(|line| line.trim().strip_prefix("Events")).unwrap().trim().to_owned();
    crate::fixture::until("the demonstration", || async {
        request("GET", &events, &[], b"").await.json()["events"]
            .as_array()
            .is_some_and(|events| events.len() > 3)
    })
    .await;
    Command::new("kill").args(["-TERM", &dev.id().to_string()]).status().unwrap();
    assert!(dev.wait().unwrap().success(), "a stop that was asked for is a success");
}
