//! What was missed is asked for: in the result backend, which keeps the last state of each task for a day, and of workers, who know
//! what they are doing.

use std::{collections::HashSet, sync::Arc, time::Duration};

use redis::cmd;
use tidings_engine::engine::redis::{Call, Servers};
use tokio::time::Instant;

use crate::config::CelerySettings;

use super::{
    GROUP_KEY, TASK_KEY,
    backend::{self, Heard},
    control::{Control, Found},
    listening::Way,
    reading::Reading,
    report::{End, Report, Route, Said, TaskId},
    tracker::{report_of_active, report_of_known},
};

/// Results that are read at once: each may be large.
const READ_MAX: usize = 100;
/// Tasks that workers are asked about at once.
const QUERY_MAX: usize = 500;
/// How often workers are told to send events: those that have just started do not know it.
const ENABLE_INTERVAL: Duration = Duration::from_secs(5);
/// One that says that it has come listens a moment later: for so long it is told that often.
const COMING_TIME: Duration = Duration::from_secs(5);
const COMING_INTERVAL: Duration = Duration::from_millis(400);

/// What is asked.
#[derive(Debug, Default)]
pub(super) struct Questions {
    pub(super) ids: Vec<TaskId>,
    pub(super) groups: Vec<TaskId>,
    /// All that is followed is asked about, because something may have been missed.
    pub(super) is_whole: bool,
    /// On these ways.
    pub(super) resynced: Vec<Way>,
    /// One node asks for all.
    pub(super) asks_workers: bool,
    /// Some send heartbeats: then nobody who listens to remote control means that it is off.
    pub(super) workers_are_heard: bool,
    pub(super) asked_ms: u64,
}

/// What was found out.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) questions: Questions,
    /// States that were read.
    pub(super) read: Vec<Report>,
    /// Tasks that run, whether they are followed or not.
    pub(super) active: Vec<Report>,
    /// Tasks that a worker has.
    pub(super) known: Vec<Report>,
    /// Tasks that have not ended, and that no worker has. Empty where a worker did not answer: it may have them.
    pub(super) missing: Vec<TaskId>,
    pub(super) group_sizes: Vec<(TaskId, Option<u32>)>,
    pub(super) backend_error: Option<String>,
    pub(super) workers_error: Option<String>,
}

/// Asks.
pub(super) struct Asker {
    backend: Option<Arc<Servers>>,
    backend_prefix: String,
    control: Option<Control>,
    asks_workers: bool,
    enables_events: bool,
    enable_due: Instant,
    worker_came_at: Option<Instant>,
    reading: Arc<Reading>,
}

impl Questions {
    pub(super) fn has_any(&self) -> bool {
        !self.ids.is_empty() || !self.groups.is_empty()
    }
}

impl Asker {
    pub(super) fn new(
        settings: &CelerySettings,
        backend: Option<Arc<Servers>>,
        control: Option<Control>,
        reading: Arc<Reading>,
    ) -> Self {
        Self {
            backend,
            backend_prefix: settings.backend_prefix.clone(),
            control,
            asks_workers: settings.asks_workers,
            enables_events: settings.enables_events,
            enable_due: Instant::now(),
            worker_came_at: None,
            reading,
        }
    }

    /// Whether workers are to be told something.
    pub(super) fn is_due(&self) -> bool {
        self.enables_events && Instant::now() >= self.enable_due
    }

    /// One has started: it does not know yet that it is to send events.
    pub(super) fn worker_came(&mut self) {
        self.enable_due = Instant::now();
        self.worker_came_at = Some(self.enable_due);
    }

    pub(super) async fn ask(mut self: Box<Self>, questions: Questions) -> (Box<Self>, Findings) {
        let mut findings = Findings { questions, ..Findings::default() };
        if let Err(error) = self.read_backend(&mut findings).await {
            findings.backend_error = Some(error);
        }
        if findings.questions.asks_workers
            && let Err(error) = self.ask_workers(&mut findings).await
        {
            tracing::debug!(error, "workers cannot be asked");
            findings.workers_error = Some(error);
        }
        if findings.backend_error.is_some() {
            // Nobody knows which of them have ended.
            findings.missing.clear();
        }
        (self, findings)
    }

    async fn read_backend(&self, findings: &mut Findings) -> Result<(), String> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let (ids, groups) = (&findings.questions.ids, &findings.questions.groups);
        findings.read = self.states(backend, ids).await?;
        let suffix = |group: &TaskId| format!("{}{GROUP_KEY}{group}.s", self.backend_prefix);
        for groups in groups.chunks(READ_MAX) {
            let sizes = values(backend, groups.iter().map(suffix).collect()).await?;
            let sizes = sizes.iter().map(|size| {
                let text = std::str::from_utf8(size.as_deref()?).ok()?;
                text.parse().ok()
            });
            findings.group_sizes.extend(groups.iter().cloned().zip(sizes));
        }
        Ok(())
    }

    async fn states(&self, backend: &Arc<Servers>, ids: &[TaskId]) -> Result<Vec<Report>, String> {
        let mut reports = Vec::new();
        for ids in ids.chunks(READ_MAX) {
            let keys = ids.iter().map(|id| format!("{}{TASK_KEY}{id}", self.backend_prefix)).collect();
            let states = values(backend, keys).await?;
            for (id, state) in ids.iter().zip(states) {
                let Some(state) = state else { continue };
                match backend::read(id.clone(), Route::Resync, &state, &self.reading) {
                    Heard::Report(report) | Heard::InPart(report) => reports.push(report),
                    Heard::Unreadable => {}
                }
            }
        }
        Ok(reports)
    }

    async fn ask_workers(&mut self, findings: &mut Findings) -> Result<(), String> {
        if self.is_due()
            && let Some(control) = &mut self.control
        {
            control.enable_events().await?;
            let is_coming = self.worker_came_at.is_some_and(|came_at| came_at.elapsed() < COMING_TIME);
            self.enable_due = Instant::now() + if is_coming { COMING_INTERVAL } else { ENABLE_INTERVAL };
        }
        let Some(control) = self.control.as_mut().filter(|_| self.asks_workers) else { return Ok(()) };
        let mut missing: HashSet<_> = findings.questions.ids.iter().cloned().collect();
        for report in findings.read.iter().filter(|report| matches!(report.said, Said::Ended(_))) {
            missing.remove(&report.task_id);
        }
        let mut all_answered = true;
        for ids in missing.iter().cloned().collect::<Vec<_>>().chunks(QUERY_MAX) {
            let answers = control.query_tasks(ids).await?;
            let is_off = answers.listening == 0 && findings.questions.workers_are_heard;
            all_answered &= answers.answered >= answers.listening && !is_off;
            for Found { id, about, .. } in answers.found {
                missing.remove(&id);
                findings.known.push(report_of_known(id, about));
            }
        }
        if all_answered {
            findings.missing = missing.into_iter().collect();
        }
        if findings.questions.is_whole {
            let answers = control.active().await?;
            let followed: HashSet<_> = findings.questions.ids.iter().collect();
            let unknown: Vec<_> =
                answers.found.into_iter().filter(|found| !followed.contains(&found.id)).collect();
            let ids: Vec<_> = unknown.iter().map(|found| found.id.clone()).collect();
            // The result backend says which attempt it is, and how far.
            if let Some(backend) = &self.backend {
                let reports = self.states(backend, &ids).await?;
                findings.read.extend(reports.into_iter().filter(|report| !is_waiting(&report.said)));
            }
            findings
                .active
                .extend(unknown.into_iter().map(|found| report_of_active(found.id, found.about, found.pid)));
        }
        Ok(())
    }
}

/// Whether a state says less than that a worker runs the task.
fn is_waiting(said: &Said) -> bool {
    matches!(said, Said::Known | Said::Retrying { .. } | Said::Ended(End::Failed(_)))
}

async fn values(servers: &Arc<Servers>, keys: Vec<String>) -> Result<Vec<Option<Vec<u8>>>, String> {
    let Some(first) = keys.first().cloned() else { return Ok(Vec::new()) };
    let mut read = cmd("MGET");
    read.arg(keys);
    let answer = servers.call(&Call::repeatable(&first, read)).await.map_err(|fault| fault.to_string())?;
    redis::from_redis_value(answer).map_err(|error| error.to_string())
}
