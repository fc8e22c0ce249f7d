//! `tidings doctor`: what is wrong, where, and what helps. Looks at the settings, at what they name, and at the service if it runs.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use serde_json::Value;
use tidings_engine::engine::redis::{RedisAddress, Servers};
use tokio::time::timeout;

use super::http;
use crate::{config::Settings, server};

/// For each Redis that is asked.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Say what is wrong and what helps: with the settings, with what they name, and with the running service
#[derive(Args)]
pub(super) struct Arguments {
    /// The service's address; without it the one of the settings
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The admin key, where the service asks for it; without it the one of the settings
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

/// What was found, as it is printed.
#[derive(Default)]
struct Findings {
    lines: Vec<String>,
    has_trouble: bool,
}

impl Findings {
    fn good(&mut self, text: impl std::fmt::Display) {
        self.lines.push(format!("[+] {text}"));
    }

    fn hint(&mut self, text: impl std::fmt::Display) {
        self.lines.push(format!("[!] {text}"));
    }

    fn trouble(&mut self, text: impl std::fmt::Display) {
        self.has_trouble = true;
        self.lines.push(format!("[-] {text}"));
    }
}

pub(super) fn run(settings: &Settings, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut findings = Findings::default();
    findings.good("the settings can be used");
    settings.cautions().iter().for_each(|caution| findings.hint(caution));
    settings.insecurities().iter().for_each(|open| findings.hint(open));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(look_at_redis(settings, &mut findings));
    look_at_service(settings, arguments, &mut findings);
    let mut out = io::stdout().lock();
    findings.lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
    Ok(if findings.has_trouble { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn look_at_redis(settings: &Settings, findings: &mut Findings) {
    let celery = &settings.celery;
    let results = format!("{}celery-task-meta-*", celery.backend_prefix);
    let events = format!("{}{}/*", celery.fanout_prefix, celery.event_exchange);
    for (name, address, pattern) in [
        ("REDIS_URL", &settings.redis, settings.redis_channel.clone()),
        ("TIDINGS_CELERY_BACKEND_URL", &celery.backend, results),
        ("TIDINGS_CELERY_BROKER_URL", &celery.broker, events),
    ] {
        let Some(address) = address else { continue };
        match timeout(ANSWER_WITHIN, listen(settings, address, &pattern)).await {
            Ok(Ok(())) => findings.good(format!("{name}: Redis answers, and `{pattern}` may be listened to")),
            Ok(Err(error)) => findings.trouble(format!("{name}: {error}")),
            Err(_) => findings.trouble(format!("{name}: Redis does not answer")),
        }
    }
    if celery.backend.is_some() && celery.broker.is_none() {
        findings.hint(
            "TIDINGS_CELERY_BROKER_URL is unset: tasks with `ignore_result` are not seen to end, and one whose worker has died is \
             not found to be lost",
        );
    }
}

async fn listen(settings: &Settings, address: &RedisAddress, pattern: &str) -> Result<(), String> {
    let address = server::over_tls(settings, Some(address.clone())).map_err(|error| error.to_string())?;
    let Some(address) = address else { return Ok(()) };
    let servers = Servers::find(address).await.map_err(|fault| fault.to_string())?;
    let mut listening = servers.anchor().subscribe().await.map_err(|error| error.to_string())?;
    let subscribed = if pattern.ends_with('*') {
        listening.psubscribe(pattern).await
    } else {
        listening.subscribe(pattern).await
    };
    subscribed.map_err(|error| error.to_string())
}

fn look_at_service(settings: &Settings, arguments: Arguments, findings: &mut Findings) {
    let key = arguments.key.as_deref().or(settings.admin_key.as_deref());
    let answer = http::Service::of(settings, arguments.url, true).and_then(|service| {
        let answer = service.get_with("/api/doctor", key)?;
        Ok((service.url(""), answer))
    });
    match answer {
        Err(error) => findings.hint(format!("the service cannot be asked: {error:#}")),
        Ok((url, (200, text))) => match serde_json::from_str(&text) {
            Ok(report) => read_report(&url, &report, findings),
            Err(error) => findings.trouble(format!("{url} answers what cannot be read: {error}")),
        },
        Ok((url, (status, text))) => findings.trouble(format!("{url} answers {status}: {}", text.trim())),
    }
}

fn read_report(url: &str, report: &Value, findings: &mut Findings) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    findings.good(format!(
        "{url} runs as node {} (version {})",
        text(&report["node"]),
        text(&report["version"])
    ));
    if report["appends"] == false {
        findings.trouble("events cannot be appended");
    }
    for part in list(&report["parts"]) {
        let name = text(&part["part"]);
        if part["heard"] == true {
            findings.good(format!("{name}: heard"));
        } else {
            findings.trouble(format!("{name}: cannot be heard"));
        }
    }
    for trouble in list(&report["troubles"]) {
        findings.trouble(text(&trouble));
    }
    let celery = &report["celery"];
    if celery.is_null() {
        return;
    }
    let counts = &celery["counts"];
    let (tasks, running, workers) = (&counts["tasks"], &counts["running"], &counts["workers"]);
    findings.good(format!(
        "Celery: {tasks} tasks remembered, {running} of them not ended, {workers} workers heard"
    ));
    if *workers == 0 && list(&celery["ways"]).iter().any(|way| way[0] == "events") {
        findings.hint(
            "no Celery worker is heard: none runs, its heartbeats are off, or TIDINGS_CELERY_BROKER_PREFIX, _FANOUT_PREFIX or \
             _EVENT_EXCHANGE differs from Celery's settings",
        );
    }
    if let Some(error) = celery["workers_silent"].as_str() {
        findings.trouble(format!("Celery's workers cannot be asked: {error}"));
    }
    for homeless in list(&celery["without_project"]) {
        let (count, name) = (&homeless["count"], text(&homeless["task_name"]));
        let (reason, newest) = (text(&homeless["reason"]), text(&homeless["task_id"]));
        findings
            .hint(format!("{count} tasks `{name}` belong to no project, the last one {newest}: {reason}"));
    }
}
