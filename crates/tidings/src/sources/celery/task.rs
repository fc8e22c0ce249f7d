//! One task: what is known of it, and what follows from what is said about it. Pure: reports and time in, events out.
//!
//! Reports come by two ways that know nothing of each other, may be lost and may come late. Whatever they do, each attempt that
//! anything was heard of starts once, and what comes after its end says nothing. Only what proves the end wrong opens it again: a
//! new run of the same attempt (its message was delivered again), a sign of life of a task that was given up, and a result
//! where a failure was told, because Celery never replaces a result by a failure.

use serde::{Deserialize, Serialize};
use tidings_protocol::{ProjectId, Timestamp};

use super::{
    project::Rank,
    report::{About, End, Failure, Progress, Reason, Report, Route, Said, TaskId},
    telling::{Event, LOST, Measure, Outgoing, event_id, raw},
};

/// For so long an end that a worker's event tells waits for the result backend, which says more.
const SOFT_END_MS: u64 = 250;
/// It waits no longer than this for a result backend that cannot be heard.
const SOFT_END_MS_MAX: u64 = 30_000;
/// An end that is older than this is not contradicted by a start that was long on its way.
const REOPEN_AFTER_MS: u64 = 60_000;
/// The name of a task that nobody has named.
const UNNAMED: &str = "unknown";
/// What an update says that tells of a retry.
const RETRYING: &str = "retrying";

/// What does not depend on the task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Between two updates of a task.
    pub(super) update_ms: u64,
    /// Whether there is a result backend that says how tasks end.
    pub(super) has_backend: bool,
}

/// A task.
#[derive(Debug, Default)]
pub(super) struct Task {
    pub(super) about: About,
    attempt: u32,
    phase: Phase,
    /// The process of the run.
    pid: Option<i64>,
    /// The attempt of the last message of it that a worker has received.
    received: Option<u32>,
    /// The result backend has said something about it.
    is_in_backend: bool,
    told: Told,
    untold: Untold,
    /// What of it the engine is known to have.
    confirmed: Mark,
    soft_end: Option<SoftEnd>,
    /// The next update may be told.
    update_due_ms: u64,
    last_update: Option<Progress>,
    /// It is the body of a chord whose header has failed.
    is_bodiless: bool,
    /// The last time that it was certainly there.
    pub(super) heard_ms: u64,
    /// Since when no worker knows it.
    missing_since_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its attempt has not begun, as far as is known.
    #[default]
    Waiting,
    Running,
    /// Its attempt has failed, and there will be another.
    Retrying,
    Ended {
        well: bool,
        is_lost: bool,
        at_ms: u64,
    },
}

/// What was told of the attempt, and where.
#[derive(Debug, Default)]
struct Told {
    project: Option<ProjectId>,
    mark: Mark,
}

/// How much was told of an attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) attempt: u32,
    pub(super) starts: u32,
    pub(super) completions: u32,
    pub(super) failures: u32,
}

/// What is to be told of the attempt, as soon as it is known where.
#[derive(Debug, Default)]
struct Untold {
    start: bool,
    update: Option<Progress>,
    end: Option<(End, Option<Timestamp>)>,
}

#[derive(Debug)]
struct SoftEnd {
    attempt: u32,
    end: End,
    at: Option<Timestamp>,
    heard_ms: u64,
    due_ms: u64,
}

impl Task {
    /// One of which nothing is known but that it is there.
    pub(super) fn new(now_ms: u64) -> Self {
        Self { heard_ms: now_ms, ..Self::default() }
    }

    /// Takes what was said. What is to be told is told with [`Task::tell`].
    pub(super) fn take(
        &mut self,
        id: &TaskId,
        report: Report,
        pace: Pace,
        now_ms: u64,
        out: &mut Vec<Outgoing>,
    ) {
        self.learn(&report.about);
        self.follow(id, report, pace, now_ms, out);
        // Also what was said before, if it is known only now where.
        self.tell(id, pace, now_ms, out);
    }

    fn follow(&mut self, id: &TaskId, report: Report, pace: Pace, now_ms: u64, out: &mut Vec<Outgoing>) {
        let Report { route, about: About { retries, .. }, said, at, .. } = report;
        // What is heard as it happens happens now: by another clock its end might come before its start.
        let at = at.filter(|_| route == Route::Resync);
        if said == Said::Known {
            // A worker has it, but it has not begun.
            self.received = retries.or(self.received);
            return;
        }
        // What is read says how it was once, not that it is there now.
        if route == Route::Resync {
            let corrects = matches!(said, Said::Ended(End::Completed { .. }));
            if self.has_ended() && !corrects && retries.is_none_or(|retries| retries <= self.attempt) {
                return;
            }
        } else {
            self.heard_ms = now_ms;
            self.missing_since_ms = None;
        }
        self.is_in_backend |= matches!(route, Route::Backend | Route::Resync);
        // Which attempt has failed is not said by events; the result backend says it.
        if route == Route::Events && self.is_in_backend && matches!(said, Said::Retrying { .. }) {
            return;
        }
        let attempt = retries.unwrap_or_else(|| self.implied_attempt(route, &said));
        if attempt < self.attempt {
            return;
        }
        if attempt > self.attempt {
            self.begin_attempt(id, attempt, pace, now_ms, out);
        }
        match said {
            Said::Known => {}
            Said::Alive => self.reopen_if(self.is_lost()),
            Said::Started { pid } => self.start(route, pid, now_ms),
            Said::Progress(progress) => self.update(progress),
            Said::Retrying { error } => self.retry(error),
            Said::Ended(end) if route == Route::Events && pace.has_backend => {
                self.end_softly(end, at, now_ms);
            }
            Said::Ended(end) => self.end(end, at, now_ms),
        }
    }

    /// Which attempt is meant where nobody says it.
    fn implied_attempt(&self, route: Route, said: &Said) -> u32 {
        let received = self.received.filter(|received| *received > self.attempt);
        match (said, received) {
            (Said::Started { .. } | Said::Ended(_), Some(received)) if route == Route::Events => received,
            // Events would have said that it was received again.
            (Said::Started { .. } | Said::Progress(_) | Said::Ended(_), _)
                if self.phase == Phase::Retrying && (route != Route::Events || self.received.is_none()) =>
            {
                self.attempt + 1
            }
            _ => self.attempt,
        }
    }

    fn begin_attempt(&mut self, id: &TaskId, attempt: u32, pace: Pace, now_ms: u64, out: &mut Vec<Outgoing>) {
        // That the last one is being retried has its place before the next one begins.
        self.update_due_ms = 0;
        self.tell(id, pace, now_ms, out);
        *self = Self {
            about: std::mem::take(&mut self.about),
            attempt,
            received: self.received,
            is_in_backend: self.is_in_backend,
            heard_ms: now_ms,
            soft_end: self.soft_end.take().filter(|soft| soft.attempt >= attempt),
            told: Told { project: self.told.project.take(), mark: Mark { attempt, ..Mark::default() } },
            confirmed: self.confirmed,
            ..Self::default()
        };
    }

    fn start(&mut self, route: Route, pid: Option<i64>, now_ms: u64) {
        match self.phase {
            Phase::Waiting => {
                self.phase = Phase::Running;
                self.untold.start = true;
            }
            Phase::Running => {}
            Phase::Retrying => {
                // It was told late that the attempt before had failed.
                if route == Route::Events {
                    self.phase = Phase::Running;
                }
                return;
            }
            Phase::Ended { at_ms, is_lost, .. } => {
                let is_other_run = self.pid.zip(pid).is_some_and(|(ended, new)| ended != new);
                let is_new = match route {
                    Route::Backend => is_other_run || now_ms >= at_ms + REOPEN_AFTER_MS,
                    Route::Events => now_ms >= at_ms + REOPEN_AFTER_MS,
                    Route::Resync | Route::Control => is_other_run,
                };
                if !is_new && !is_lost {
                    return;
                }
                self.reopen_if(true);
            }
        }
        self.pid = pid.or(self.pid);
    }

    fn reopen_if(&mut self, is_open: bool) {
        if is_open {
            self.phase = Phase::Running;
            self.untold.start = true;
            self.soft_end = None;
        }
    }

    fn update(&mut self, progress: Progress) {
        self.reopen_if(self.is_lost());
        match self.phase {
            Phase::Waiting => {
                self.phase = Phase::Running;
                self.untold.start = true;
            }
            Phase::Running => {}
            Phase::Retrying | Phase::Ended { .. } => return,
        }
        // What is read again and again is told once.
        if self.last_update.as_ref() != Some(&progress) {
            self.last_update = Some(progress.clone());
            self.untold.update = Some(progress);
        }
    }

    fn retry(&mut self, error: Box<str>) {
        match self.phase {
            Phase::Waiting => self.untold.start = true,
            Phase::Running => {}
            Phase::Retrying | Phase::Ended { .. } => return,
        }
        self.phase = Phase::Retrying;
        let (message, state) = (Some(error), Some(RETRYING.into()));
        self.untold.update = Some(Progress { message, state, ..Progress::default() });
        self.update_due_ms = 0;
    }

    fn end_softly(&mut self, end: End, at: Option<Timestamp>, now_ms: u64) {
        if !self.has_ended() {
            let (attempt, due_ms) = (self.attempt, now_ms + SOFT_END_MS);
            self.soft_end = Some(SoftEnd { attempt, end, at, heard_ms: now_ms, due_ms });
        }
    }

    fn end(&mut self, mut end: End, at: Option<Timestamp>, now_ms: u64) {
        let well = matches!(end, End::Completed { .. });
        match self.phase {
            Phase::Waiting => self.untold.start = true,
            Phase::Running | Phase::Retrying => {
                // Somebody else has written it, and it did run.
                if let End::Failed(failure) = &mut end
                    && failure.reason == Reason::NotRun
                {
                    failure.reason = Reason::Error;
                }
            }
            // The result backend never says that something went well that did not.
            Phase::Ended { well: false, .. } if well => {}
            Phase::Ended { .. } => return,
        }
        self.is_bodiless = matches!(&end, End::Failed(failure) if failure.error.starts_with("ChordError"));
        let is_lost = matches!(&end, End::Failed(Failure { reason: Reason::Lost, .. }));
        self.phase = Phase::Ended { well, is_lost, at_ms: now_ms };
        self.soft_end = None;
        self.untold.end = Some((end, at));
    }

    /// Takes what is said of the task itself. What is more reliable about its project replaces what is less so.
    fn learn(&mut self, about: &About) {
        fn take<T: Clone>(known: &mut Option<T>, new: Option<&T>) {
            if let Some(new) = new {
                *known = Some(new.clone());
            }
        }
        let known = &mut self.about;
        take(&mut known.name, about.name.as_ref());
        take(&mut known.worker, about.worker.as_ref());
        take(&mut known.parent, about.parent.as_ref());
        take(&mut known.root, about.root.as_ref());
        take(&mut known.group, about.group.as_ref());
        take(&mut known.arguments, about.arguments.as_ref());
        take(&mut known.chain_length, about.chain_length.as_ref());
        take(&mut known.group_size, about.group_size.as_ref());
        known.has_arguments |= about.has_arguments;
        if !about.children.is_empty() {
            known.children.clone_from(&about.children);
        }
        if let Some((rank, project)) = &about.project {
            self.belong(*rank, project.clone());
        }
    }

    /// Says to which project it belongs, unless something more reliable, or as reliable and earlier, has said that.
    pub(super) fn belong(&mut self, rank: Rank, project: ProjectId) {
        // What has ended may be another one's id by now.
        let is_more = |known: Rank| rank > known || (rank == known && self.has_ended());
        if self.about.project.as_ref().is_none_or(|(known, _)| is_more(*known)) {
            self.about.project = Some((rank, project));
        }
    }

    /// What is due now.
    pub(super) fn wake(
        &mut self,
        id: &TaskId,
        pace: Pace,
        backend_is_heard: bool,
        now_ms: u64,
        out: &mut Vec<Outgoing>,
    ) {
        if let Some(soft) = self.soft_end.take_if(|soft| soft.due_ms <= now_ms) {
            if !backend_is_heard && now_ms < soft.heard_ms + SOFT_END_MS_MAX {
                self.soft_end = Some(SoftEnd { due_ms: now_ms + SOFT_END_MS, ..soft });
            } else if soft.attempt == self.attempt {
                self.end(soft.end, soft.at, now_ms);
            }
        }
        self.tell(id, pace, now_ms, out);
    }

    /// When [`Task::wake`] has something to do.
    pub(super) fn due_ms(&self) -> Option<u64> {
        let update = self.untold.update.is_some() && self.about.project.is_some();
        let update = update.then_some(self.update_due_ms);
        self.soft_end.as_ref().map(|soft| soft.due_ms).into_iter().chain(update).min()
    }

    /// No worker knows it. It is given up when that was so for `lost_after_ms`.
    pub(super) fn miss(
        &mut self,
        id: &TaskId,
        lost_after_ms: u64,
        pace: Pace,
        now_ms: u64,
        out: &mut Vec<Outgoing>,
    ) {
        let since = *self.missing_since_ms.get_or_insert(now_ms);
        if self.phase == Phase::Running && self.soft_end.is_none() && now_ms >= since + lost_after_ms {
            let (reason, error) = LOST;
            self.end(End::Failed(Failure { reason, error: error.into(), traceback: None }), None, now_ms);
            self.tell(id, pace, now_ms, out);
        }
    }

    /// Whether it is to be asked what became of it: it runs, and nothing was heard of it for some time.
    pub(super) fn is_silent(&self, since_ms: u64) -> bool {
        self.phase == Phase::Running && self.heard_ms <= since_ms
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }

    /// Whether it ended, and well.
    pub(super) fn outcome(&self) -> Option<bool> {
        match self.phase {
            Phase::Ended { well, .. } => Some(well),
            _ => None,
        }
    }

    /// Whether it is the body of a chord whose header has failed: it never ran.
    pub(super) fn is_body_of_failed_chord(&self) -> bool {
        self.is_bodiless
    }

    /// Takes what another node has kept of the same task.
    pub(super) fn remember(&mut self, kept: Self) {
        if let Some((rank, project)) = kept.about.project {
            self.belong(rank, project);
        }
        let (known, kept) = (&mut self.told.mark, kept.told.mark);
        if kept.attempt < self.attempt {
            return;
        }
        if kept.attempt > self.attempt {
            // What was heard here did not say which attempt it meant.
            self.attempt = kept.attempt;
            *known = kept;
        } else {
            *known = Mark {
                attempt: kept.attempt,
                starts: known.starts.max(kept.starts),
                completions: known.completions.max(kept.completions),
                failures: known.failures.max(kept.failures),
            };
        }
        self.confirmed = kept;
    }

    fn is_lost(&self) -> bool {
        matches!(self.phase, Phase::Ended { is_lost: true, .. })
    }

    /// Whether there is something to tell, and nobody knows where.
    pub(super) fn wants_project(&self) -> bool {
        self.about.project.is_none() && (self.untold.start || self.untold.end.is_some())
    }

    /// The engine has what was told up to this.
    pub(super) fn confirm(&mut self, mark: Mark) {
        self.confirmed = mark;
    }

    /// What is to be kept of it: how much of the attempt the engine is known to have, and in which state it is as far as that.
    pub(super) fn kept(&self) -> (Mark, Phase) {
        let attempt = self.attempt;
        let of_attempt = self.confirmed.attempt == attempt;
        let mark = if of_attempt { self.confirmed } else { Mark { attempt, ..Mark::default() } };
        let is_whole = mark == self.told.mark && self.untold.end.is_none();
        let phase = if self.has_ended() && !is_whole { Phase::Running } else { self.phase };
        (mark, phase)
    }

    /// One of which this was kept.
    pub(super) fn restored(about: About, mark: Mark, phase: Phase, now_ms: u64) -> Self {
        let has_begun = phase != Phase::Waiting;
        let project = about.project.as_ref().map(|(_, project)| project.clone()).filter(|_| has_begun);
        Self {
            about,
            attempt: mark.attempt,
            phase,
            told: Told { project, mark },
            // It is kept before it is told: who has it already does not get it again.
            untold: Untold { start: has_begun && mark.starts == 0, ..Untold::default() },
            confirmed: mark,
            heard_ms: now_ms,
            ..Self::default()
        }
    }

    /// Tells what is to be told, if it is known where, and updates if it is time.
    pub(super) fn tell(&mut self, id: &TaskId, pace: Pace, now_ms: u64, out: &mut Vec<Outgoing>) {
        let Some((_, project)) = self.about.project.clone() else { return };
        if let Some(former) = self.told.project.take_if(|former| *former != project) {
            self.leave(id, &former, out);
        }
        if std::mem::take(&mut self.untold.start) {
            let started = self.started(id, &project);
            self.told.mark.starts += 1;
            out.push(Outgoing { mark: Some(self.told.mark), ..started });
        }
        let is_time = now_ms >= self.update_due_ms || self.untold.end.is_some();
        if let Some(progress) = self.untold.update.take_if(|_| is_time) {
            out.push(self.progressed(id, &project, &progress));
            self.update_due_ms = now_ms + pace.update_ms;
        }
        if let Some((end, at)) = self.untold.end.take() {
            let ended = self.ended(id, &project, &end, at);
            out.push(Outgoing { mark: Some(self.told.mark), ..ended });
        }
        self.told.project = Some(project);
    }

    /// It was told to belong to a project that it does not belong to: there it is over, and where it belongs it begins.
    fn leave(&mut self, id: &TaskId, former: &ProjectId, out: &mut Vec<Outgoing>) {
        if self.told.mark.starts == 0 || (self.has_ended() && self.untold.end.is_none()) {
            return;
        }
        let failure = Failure {
            reason: Reason::Lost,
            error: "the task belongs to another project".into(),
            traceback: None,
        };
        out.push(self.ended(id, former, &End::Failed(failure), None));
        self.told.mark = Mark { attempt: self.attempt, ..Mark::default() };
        self.untold.start = true;
    }

    fn started(&self, id: &TaskId, project: &ProjectId) -> Outgoing {
        const TYPE: &str = "task.started";
        let arguments = self.about.arguments.as_deref().map(|kwargs| format!("{{\"kwargs\":{kwargs}}}"));
        let event = Event {
            id: Some(event_id(id, self.attempt, self.told.mark.starts, TYPE)),
            task_name: Some(self.about.name.as_deref().unwrap_or(UNNAMED)),
            metadata: raw(arguments.as_deref()),
            ..self.event(TYPE, id, project)
        };
        outgoing(id, project, false, event)
    }

    fn progressed(&self, id: &TaskId, project: &ProjectId, progress: &Progress) -> Outgoing {
        let event = Event {
            progress: Some(Measure::of(progress)),
            message: progress.message.as_deref(),
            state: progress.state.as_deref(),
            metadata: raw(progress.metadata.as_deref()),
            ..self.event("task.progress", id, project)
        };
        outgoing(id, project, true, event)
    }

    fn ended(&mut self, id: &TaskId, project: &ProjectId, end: &End, at: Option<Timestamp>) -> Outgoing {
        let (r#type, repetition) = match end {
            End::Completed { .. } => ("task.completed", &mut self.told.mark.completions),
            End::Failed(_) => ("task.failed", &mut self.told.mark.failures),
        };
        let event_id = event_id(id, self.attempt, *repetition, r#type);
        *repetition += 1;
        let event = Event { id: Some(event_id), timestamp: at, ..self.event(r#type, id, project) };
        let event = match end {
            End::Completed { result, is_repr: true } => Event { result_repr: result.as_deref(), ..event },
            End::Completed { result, .. } => Event { result: raw(result.as_deref()), ..event },
            End::Failed(failure) => Event {
                error: Some(&failure.error),
                reason: Some(failure.reason.as_str()),
                traceback: failure.traceback.as_deref(),
                ..event
            },
        };
        outgoing(id, project, false, event)
    }

    fn event<'a>(&self, r#type: &'a str, id: &'a TaskId, project: &'a ProjectId) -> Event<'a> {
        Event {
            r#type,
            project_id: project.as_str(),
            task_id: Some(id),
            attempt: Some(self.attempt),
            ..Event::default()
        }
    }
}

fn outgoing(id: &TaskId, project: &ProjectId, is_update: bool, event: Event<'_>) -> Outgoing {
    Outgoing { subject: id.clone(), project: project.clone(), is_update, mark: None, json: event.into_json() }
}
