//! `tidings watch`: a folder watched by a process of its own, which publishes to a service.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
};

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use tidings_protocol::{Gap, ProjectId};
use tokio::signal::unix::{SignalKind, signal};

use super::{http, logging, publish};
use crate::{
    config::{Settings, WatchSettings, environment_variables},
    sources::watcher::{Outcome, Sink, check_patterns, state_name, stop, watch_until},
};

/// tidings watch /data/in --project p1 --service <https://tidings.example.com> --key KEY
#[derive(Args)]
pub(super) struct Arguments {
    /// The folder; with `/*` at its end each folder in it is the project of its name
    path: String,
    /// The project that its files belong to
    #[arg(short, long, value_name = "ID")]
    project: Option<String>,
    /// The service's address; without it the one of the settings
    #[arg(long, value_name = "URL")]
    service: Option<String>,
    /// The key to publish with; without it the first of the settings that may publish
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// What changed is published when nothing has changed for so long
    #[arg(long, value_name = "MS", default_value = "300", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    quiet_ms: u64,
    /// Or when it has waited for so long
    #[arg(long, value_name = "MS", default_value = "2000", value_parser = clap::value_parser!(u64).range(10..=600_000))]
    wait_ms_max: u64,
    /// More changes at once are published as one
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u16).range(1..=1000))]
    paths_max: u16,
    /// Leave out what this matches, a pattern as `.gitignore` has them; may be given several times
    #[arg(long, value_name = "PATTERN")]
    ignore: Vec<String>,
    /// Leave out everything that none of these match
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Whatever `.gitignore` files say
    #[arg(long)]
    no_gitignore: bool,
    /// Also what editors and downloads leave for a moment
    #[arg(long)]
    with_temporary: bool,
    /// Look every few seconds, and do not rely on the kernel: for network file systems that are not known as such
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    poll: Option<u64>,
    /// Where it is kept what was published; without it `tidings/watch` in `$XDG_STATE_HOME` or `~/.local/state`
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
}

pub(super) fn run(settings: &Settings, arguments: Arguments) -> anyhow::Result<ExitCode> {
    logging::start(settings)?;
    let key = arguments.key.as_deref().or_else(|| publish::key_of(settings)).map(str::to_owned);
    let service = http::Service::of(settings, arguments.service.clone(), true)?;
    let table = table(&arguments)?;
    let folder = arguments.state.map_or_else(default_folder, Ok)?;
    let _alone = claim(&folder, &table)?;
    let (stopper, asked) = stop()?;
    let (end, ended) = mpsc::channel();
    let event_bytes_max = settings.event_bytes_max;
    let sink = IntoService { service, key, problem: None };
    let watching = std::thread::Builder::new().name("watcher".to_owned()).spawn(move || {
        watch_until(&table, Some(&folder), event_bytes_max, sink, &asked);
        drop(end);
    })?;
    wait_for_signal(ended)?;
    drop(stopper);
    anyhow::ensure!(watching.join().is_ok(), "the watcher has failed");
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

fn table(arguments: &Arguments) -> anyhow::Result<WatchSettings> {
    let project = arguments.project.as_deref().map(ProjectId::try_from).transpose();
    let project = project.map_err(|error| anyhow::anyhow!("--project: {error}"))?;
    // Another name for the folder is another state, and another working folder another name.
    let path = std::path::absolute(&arguments.path).context("PATH")?;
    let path = path.to_str().context("PATH: expected UTF-8")?;
    let mut table = WatchSettings::new(path, project).map_err(|error| anyhow::anyhow!("PATH: {error}"))?;
    for (flag, patterns) in [("--ignore", &arguments.ignore), ("--only", &arguments.only)] {
        check_patterns(patterns).map_err(|error| anyhow::anyhow!("{flag}: {error}"))?;
    }
    let only_if_longer = "--wait-ms-max: expected at least --quiet-ms";
    anyhow::ensure!(arguments.wait_ms_max >= arguments.quiet_ms, only_if_longer);
    (table.ignore, table.only) = (arguments.ignore.clone(), arguments.only.clone());
    (table.quiet_ms, table.wait_ms_max) = (arguments.quiet_ms, arguments.wait_ms_max);
    table.paths_max = arguments.paths_max.into();
    table.gitignore = !arguments.no_gitignore;
    table.ignore_temporary = !arguments.with_temporary;
    (table.poll, table.poll_seconds) = (arguments.poll.map(|_| true), arguments.poll);
    Ok(table)
}

fn default_folder() -> anyhow::Result<PathBuf> {
    let variables = environment_variables();
    let set = |name: &str| variables.get(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
    Ok(base
        .context("neither XDG_STATE_HOME nor HOME is set; name a folder with --state")?
        .join("tidings/watch"))
}

/// Two that keep one state would each publish, and neither would know.
fn claim(folder: &Path, table: &WatchSettings) -> anyhow::Result<File> {
    let path = folder.join(state_name(table)).with_extension("lock");
    let cannot =
        || format!("{}: the state cannot be kept there; name another folder with --state", folder.display());
    std::fs::create_dir_all(folder).with_context(cannot)?;
    let file = File::create(&path).with_context(cannot)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("{}: another `tidings watch` watches this", path.display()))?;
    Ok(file)
}

/// Waits for a signal, or for the watcher to end by itself.
fn wait_for_signal(ended: mpsc::Receiver<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let ended = tokio::task::spawn_blocking(move || ended.recv());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = ended => {}
        }
        anyhow::Ok(())
    })?;
    // The one that waits for the watcher's end ends with it.
    runtime.shutdown_background();
    Ok(())
}

/// Publishes over HTTP.
struct IntoService {
    service: http::Service,
    key: Option<String>,
    /// Why nothing is taken at present, as it was told.
    problem: Option<String>,
}

impl IntoService {
    fn post(&self, events: &[Value]) -> anyhow::Result<(u16, String)> {
        let body = Value::from(events.to_vec()).to_string();
        self.service.post(publish::PATH, self.key.as_deref(), "application/json", body.as_bytes())
    }

    /// Each by itself: one that is refused must not take the others with it.
    fn announce_singly(&mut self, events: &[Value], answer: &str) -> Outcome {
        if let [event] = events {
            tracing::error!(%event, answer, "the service refuses this event, and will; it is left out");
            return Outcome::Taken;
        }
        for event in events {
            match self.announce(std::slice::from_ref(event)) {
                Outcome::Taken => {}
                // Some have been taken.
                Outcome::NotTaken(reason) | Outcome::Unknown(reason) => return Outcome::Unknown(reason),
            }
        }
        Outcome::Taken
    }

    /// Once for as long as it lasts.
    fn tell(&mut self, problem: &str) {
        if self.problem.as_deref() != Some(problem) {
            tracing::error!("{problem}");
            self.problem = Some(problem.to_owned());
        }
    }
}

impl Sink for IntoService {
    fn announce(&mut self, events: &[Value]) -> Outcome {
        let url = self.service.url(publish::PATH);
        let (status, answer) = match self.post(events) {
            Ok(answer) => answer,
            Err(error) => {
                self.tell(&format!("{error:#}; what changes is published when it is there again"));
                let reason = format!("{error:#}");
                return if was_not_sent(&error) {
                    Outcome::NotTaken(reason)
                } else {
                    Outcome::Unknown(reason)
                };
            }
        };
        let why = match status {
            200..=299 => {
                if self.problem.take().is_some() {
                    tracing::info!(url, "the service takes events again");
                }
                return Outcome::Taken;
            }
            413 | 422 => return self.announce_singly(events, &answer),
            401 => "it does not know the key; give a right one with --key or TIDINGS_PUBLISH_KEYS",
            403 => "the key may not publish these events to this project",
            429 => "more events than the key may publish in a second",
            400..=499 => "this may not be the address of a service",
            _ => "what changes is published later",
        };
        self.tell(&format!("{url} answered {status}: {why}\n{answer}"));
        if status >= 500 { Outcome::Unknown(answer) } else { Outcome::NotTaken(answer) }
    }

    fn heard(&mut self, _: Option<Gap>) {}
}

/// Whether nothing of the request can have arrived.
fn was_not_sent(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ureq::Error>() {
        Some(
            ureq::Error::ConnectionFailed
            | ureq::Error::HostNotFound
            | ureq::Error::Timeout(ureq::Timeout::Connect),
        ) => true,
        Some(ureq::Error::Io(error)) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        _ => false,
    }
}
