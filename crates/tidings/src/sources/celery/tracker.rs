//! All tasks that anything was heard of: finds out which projects they belong to, wakes them when something is due, and knows
//! which of them to ask about. Pure: reports, answers and time in, events and questions out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use serde::Serialize;
use tidings_protocol::ProjectId;

use super::{
    events::{WorkerChange, WorkerEvent},
    kept::Kept,
    processes::Processes,
    project::Rank,
    report::{About, Report, Route, Said, TaskId},
    task::{Mark, Pace, Phase, Task},
    telling::Outgoing,
};

/// Tasks that are remembered: of more, those are forgotten that ended first, then those that were heard of first.
const TASKS_MAX: usize = 100_000;
/// For so long a task is remembered that has ended.
const ENDED_MS_MAX: u64 = 60 * 60 * 1000;
/// And one of which nothing is heard: a page shows it no longer, either.
const SILENT_MS_MAX: u64 = 25 * 60 * 60 * 1000;
/// A running task of which nothing was heard for so long is asked about.
pub(super) const ASK_AFTER_MS: u64 = 5_000;
/// Tasks that are asked about in one go.
pub(super) const ASK_MAX: usize = 500;
/// For so long a project may be found that is not known when its task begins. Then it is said that there is none.
const NO_PROJECT_AFTER_MS: u64 = 2_000;
/// Names of tasks without a project that are remembered for the operator.
const HOMELESS_MAX: usize = 200;
/// A worker that is silent for so many of its heartbeats is not relied upon.
const BEATS_MISSED_MAX: f64 = 2.5;
/// How often it is looked for those.
const WORKERS_INTERVAL_MS: u64 = 500;
/// Workers that are remembered.
const WORKERS_MAX: usize = 10_000;

/// What a tracker is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) pace: Pace,
    pub(super) lost_after_ms: u64,
    pub(super) shows_processes: bool,
}

/// All tasks.
#[derive(Debug)]
pub(super) struct Tracker {
    options: Options,
    tasks: HashMap<TaskId, Tracked>,
    /// Those that have ended, and the others, each in the order in which they were last heard of.
    ended: BTreeMap<u64, TaskId>,
    open: BTreeMap<u64, TaskId>,
    sequence: u64,
    due: BTreeSet<(u64, TaskId)>,
    processes: Processes,
    workers: HashMap<Box<str>, Worker>,
    workers_due_ms: u64,
    /// To be asked about next.
    ask_now: BTreeSet<TaskId>,
    /// Tasks of which something has changed that is kept.
    changed: HashSet<TaskId>,
    forgotten: Vec<TaskId>,
    homeless: VecDeque<Homeless>,
    homeless_count: u64,
    evicted_count: u64,
    pub(super) out: Vec<Outgoing>,
}

#[derive(Debug)]
struct Tracked {
    task: Task,
    /// Its place among those that have ended or not.
    place: u64,
    due_ms: Option<u64>,
    asked_ms: u64,
    /// It is said that it has no project when this has come.
    homeless_ms: Option<u64>,
}

#[derive(Debug)]
struct Worker {
    heard_ms: u64,
    silence_ms: u64,
}

/// Tasks of one name that belong to no project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Homeless {
    pub(super) task_name: String,
    /// Why none was found, and what helps.
    pub(super) reason: &'static str,
    pub(super) count: u64,
    /// The last of them.
    pub(super) task_id: String,
}

/// What a tracker counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) tasks: usize,
    pub(super) running: usize,
    pub(super) workers: usize,
    pub(super) without_project: u64,
    pub(super) forgotten_too_early: u64,
}

impl Tracker {
    pub(super) fn new(options: Options) -> Self {
        Self {
            options,
            tasks: HashMap::new(),
            ended: BTreeMap::new(),
            open: BTreeMap::new(),
            sequence: 0,
            due: BTreeSet::new(),
            processes: Processes::new(options.pace.update_ms),
            workers: HashMap::new(),
            workers_due_ms: 0,
            ask_now: BTreeSet::new(),
            changed: HashSet::new(),
            forgotten: Vec::new(),
            homeless: VecDeque::new(),
            homeless_count: 0,
            evicted_count: 0,
            out: Vec::new(),
        }
    }

    /// Takes what was said about a task.
    pub(super) fn take(&mut self, report: Report, now_ms: u64) {
        let id = report.task_id.clone();
        // A worker that has it says nothing new of a task that nobody has heard of, and has no place for it.
        if report.said == Said::Alive && !self.tasks.contains_key(&id) {
            return;
        }
        self.with(&id, now_ms, |task, pace, out| task.take(&id, report, pace, now_ms, out));
    }

    /// What was read of a task in the result backend, unless something was heard of it since that was asked for.
    pub(super) fn take_read(&mut self, report: Report, asked_ms: u64, now_ms: u64) {
        let is_newer = |tracked: &Tracked| tracked.task.heard_ms > asked_ms && tracked.task.heard_ms != 0;
        if !self.tasks.get(&report.task_id).is_some_and(is_newer) {
            self.take(report, now_ms);
        }
    }

    /// A worker runs a task. If more was read of it, only that it is there.
    pub(super) fn take_if_unread(&mut self, report: Report, now_ms: u64) {
        let has_begun =
            self.tasks.get(&report.task_id).is_some_and(|known| known.task.kept().1 != Phase::Waiting);
        let said = if has_begun { Said::Alive } else { report.said.clone() };
        self.take(Report { said, ..report }, now_ms);
    }

    /// Somebody says which project a task belongs to. Who may not publish everywhere does not take it from where it says itself that
    /// it belongs; `false`: he has tried.
    pub(super) fn register(
        &mut self,
        id: &TaskId,
        project: ProjectId,
        name: Option<Box<str>>,
        may_publish_everywhere: bool,
        now_ms: u64,
    ) -> bool {
        let known = self.tasks.get(id).and_then(|tracked| tracked.task.about.project.as_ref());
        if !may_publish_everywhere
            && known.is_some_and(|(rank, known)| *rank >= Rank::Arguments && *known != project)
        {
            return false;
        }
        self.with(id, now_ms, |task, pace, out| {
            task.about.name = task.about.name.take().or(name);
            task.belong(Rank::Registered, project);
            task.tell(id, pace, now_ms, out);
        });
        self.changed.insert(id.clone());
        true
    }

    /// A group was saved: these are its members.
    pub(super) fn group_saved(&mut self, group: &TaskId, members: &[TaskId], now_ms: u64) {
        self.processes.group_saved(group, members);
        for member in members {
            if self.tasks.contains_key(member) {
                self.with(member, now_ms, |task, _, _| task.about.group = Some(group.clone()));
            }
        }
    }

    /// The size of a group, as its backend says.
    pub(super) fn group_sized(&mut self, group: &TaskId, size: Option<u32>, now_ms: u64) {
        for member in self.processes.group_sized(group, size, now_ms, &mut self.out) {
            if let Some(tracked) = self.tasks.get_mut(&member) {
                // So that it is known after a restart, when the backend may not know it any more.
                tracked.task.about.group_size = size.or(tracked.task.about.group_size);
                self.changed.insert(member);
            }
        }
    }

    /// Groups whose size is not known, and may be.
    pub(super) fn take_unsized_groups(&mut self) -> Vec<TaskId> {
        self.processes.take_unsized()
    }

    /// Groups that have not ended.
    pub(super) fn open_groups(&self) -> Vec<TaskId> {
        self.processes.open_groups()
    }

    /// Takes what became of a worker.
    pub(super) fn take_worker(&mut self, event: &WorkerEvent, now_ms: u64) {
        match event.change {
            // It is found among the silent ones.
            WorkerChange::Offline => {
                if let Some(worker) = self.workers.get_mut(&event.worker) {
                    worker.silence_ms = 0;
                }
            }
            WorkerChange::Online | WorkerChange::Beats { .. } => {
                let every_s = match event.change {
                    WorkerChange::Beats { every_s } => every_s,
                    _ => 2.0,
                };
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "it is within a day"
                )]
                let silence_ms = (every_s.clamp(0.1, 10_000.0) * BEATS_MISSED_MAX * 1000.0) as u64;
                if self.workers.len() < WORKERS_MAX || self.workers.contains_key(&event.worker) {
                    self.workers.insert(event.worker.clone(), Worker { heard_ms: now_ms, silence_ms });
                }
            }
        }
    }

    /// Does what is due.
    pub(super) fn wake(&mut self, backend_is_heard: bool, now_ms: u64) {
        while let Some((due_ms, id)) = self.due.first().cloned()
            && due_ms <= now_ms
        {
            self.due.pop_first();
            let Some(tracked) = self.tasks.get_mut(&id) else { continue };
            tracked.due_ms = None;
            if tracked.homeless_ms.is_some_and(|homeless_ms| homeless_ms <= now_ms) {
                self.note_homeless(&id);
            }
            self.with(&id, now_ms, |task, pace, out| {
                task.wake(&id, pace, backend_is_heard, now_ms, out);
            });
        }
        self.processes.wake(now_ms, &mut self.out);
        self.forget(now_ms);
        if now_ms >= self.workers_due_ms {
            self.workers_due_ms = now_ms + WORKERS_INTERVAL_MS;
            self.look_for_silent_workers(now_ms);
        }
    }

    /// Asks about the tasks of workers that have left, or are silent.
    fn look_for_silent_workers(&mut self, now_ms: u64) {
        let is_silent = |worker: &Worker| now_ms > worker.heard_ms + worker.silence_ms;
        let silent: HashSet<_> =
            self.workers.extract_if(|_, worker| is_silent(worker)).map(|(name, _)| name).collect();
        if silent.is_empty() {
            return;
        }
        let runs_there = |id: &&TaskId| {
            let worker = self.tasks.get(*id).and_then(|tracked| tracked.task.about.worker.as_ref());
            worker.is_some_and(|worker| silent.contains(worker))
        };
        self.ask_now.extend(self.open.values().filter(runs_there).cloned());
    }

    /// When [`Tracker::wake`] has something to do.
    pub(super) fn due_ms(&self) -> Option<u64> {
        let task = self.due.first().map(|(due_ms, _)| *due_ms);
        task.into_iter().chain(self.processes.due_ms()).min()
    }

    /// Whether something is to be asked that is known for a moment only.
    pub(super) fn is_curious(&self) -> bool {
        self.processes.is_curious()
    }

    /// Tasks to be asked about now.
    pub(super) fn take_questions(&mut self, now_ms: u64) -> Vec<TaskId> {
        let since_ms = now_ms.saturating_sub(ASK_AFTER_MS);
        let mut questions: Vec<_> = std::mem::take(&mut self.ask_now).into_iter().collect();
        let is_silent = |tracked: &Tracked| tracked.task.is_silent(since_ms) && tracked.asked_ms <= since_ms;
        questions.extend(self.open.values().filter(|id| self.tasks.get(*id).is_some_and(is_silent)).cloned());
        questions.sort_unstable();
        questions.dedup();
        let later = questions.split_off(questions.len().min(ASK_MAX));
        self.ask_now.extend(later);
        for id in &questions {
            if let Some(tracked) = self.tasks.get_mut(id) {
                tracked.asked_ms = now_ms;
            }
        }
        questions
    }

    /// All that have begun and not ended.
    pub(super) fn open_tasks(&self) -> Vec<TaskId> {
        self.open.values().cloned().collect()
    }

    /// All workers have answered, and none knows these.
    pub(super) fn miss(&mut self, ids: &[TaskId], now_ms: u64) {
        let lost_after_ms = self.options.lost_after_ms;
        for id in ids.iter().filter(|id| self.tasks.contains_key(*id)).cloned().collect::<Vec<_>>() {
            self.with(&id, now_ms, |task, pace, out| task.miss(&id, lost_after_ms, pace, now_ms, out));
        }
    }

    /// The engine has these.
    pub(super) fn confirm(&mut self, told: &[(TaskId, Mark)]) {
        for (id, mark) in told {
            if let Some(tracked) = self.tasks.get_mut(id) {
                tracked.task.confirm(*mark);
                self.changed.insert(id.clone());
            }
        }
    }

    /// What is to be kept of the tasks that have changed, and the ids of those of which nothing is kept any more.
    pub(super) fn take_changes(&mut self) -> (Vec<Kept>, Vec<TaskId>) {
        let changed = std::mem::take(&mut self.changed);
        // One that was forgotten and is there again is kept.
        self.forgotten.retain(|id| !self.tasks.contains_key(id));
        let kept = |id: TaskId| Some(Kept::of(&id, &self.tasks.get(&id)?.task));
        (changed.into_iter().filter_map(kept).collect(), std::mem::take(&mut self.forgotten))
    }

    /// What was to be kept could not be.
    pub(super) fn keep_again(&mut self, kept: Vec<Kept>, gone: Vec<TaskId>) {
        self.changed.extend(kept.into_iter().map(|kept| TaskId::from(kept.id)));
        self.forgotten.extend(gone);
    }

    /// Takes what was kept, of those tasks that nothing is known of yet.
    pub(super) fn restore(&mut self, kept: Vec<Kept>, now_ms: u64) {
        let mut restored = Vec::with_capacity(kept.len());
        for (id, kept) in kept.into_iter().filter_map(|kept| kept.into_task(now_ms)) {
            match self.tasks.get_mut(&id) {
                Some(known) => known.task.remember(kept),
                None => self.put(id.clone(), kept),
            }
            restored.push(id);
        }
        // Once all are there: a chain is known by its first step.
        let has_parent =
            |id: &TaskId| self.tasks.get(id).is_some_and(|known| known.task.about.parent.is_some());
        let (later, first): (Vec<_>, Vec<_>) = restored.into_iter().partition(has_parent);
        for id in first.into_iter().chain(later) {
            self.with(&id, now_ms, |task, pace, out| task.tell(&id, pace, now_ms, out));
        }
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            tasks: self.tasks.len(),
            running: self.open.len(),
            workers: self.workers.len(),
            without_project: self.homeless_count,
            forgotten_too_early: self.evicted_count,
        }
    }

    pub(super) fn homeless(&self) -> Vec<Homeless> {
        self.homeless.iter().cloned().collect()
    }

    /// Does something with a task, and sees to what follows from that.
    fn with(&mut self, id: &TaskId, now_ms: u64, act: impl FnOnce(&mut Task, Pace, &mut Vec<Outgoing>)) {
        if !self.tasks.contains_key(id) {
            self.put(id.clone(), Task::new(now_ms));
        }
        let pace = self.options.pace;
        let told = self.out.len();
        let Some(tracked) = self.tasks.get_mut(id) else { return };
        let before = tracked.task.kept();
        act(&mut tracked.task, pace, &mut self.out);
        if tracked.task.about.project.is_none()
            && let Some(project) = self.inherited(id)
            && let Some(tracked) = self.tasks.get_mut(id)
        {
            tracked.task.belong(Rank::Inherited, project);
            tracked.task.tell(id, pace, now_ms, &mut self.out);
        }
        let Some(tracked) = self.tasks.get_mut(id) else { return };
        if tracked.task.kept() != before || self.out.len() > told {
            self.changed.insert(id.clone());
        }
        self.schedule(id, now_ms);
        self.move_to_its_place(id);
        let mut observed = self.options.shows_processes.then(|| id.clone());
        while let Some(id) = observed {
            observed = self.observe(&id, now_ms);
        }
    }

    /// Tells processes of a task. Returns the next step of its chain if that was heard of before it was known to be one.
    fn observe(&mut self, id: &TaskId, now_ms: u64) -> Option<TaskId> {
        let task = &self.tasks.get(id)?.task;
        // A chord's body has its header's group in Celery 5.7, and is none of its tasks.
        let group = task.about.group.as_ref().filter(|_| !task.is_body_of_failed_chord());
        self.processes.observe(id, group, &task.about, task.outcome(), now_ms, &mut self.out)
    }

    fn put(&mut self, id: TaskId, task: Task) {
        while self.tasks.len() >= TASKS_MAX {
            let oldest = self.ended.first_key_value().or_else(|| self.open.first_key_value());
            let Some((_, oldest)) = oldest else { break };
            let oldest = oldest.clone();
            self.evicted_count +=
                u64::from(self.tasks.get(&oldest).is_some_and(|task| !task.task.has_ended()));
            self.remove(&oldest);
        }
        self.sequence += 1;
        let (place, ended) = (self.sequence, task.has_ended());
        let order = if ended { &mut self.ended } else { &mut self.open };
        order.insert(place, id.clone());
        self.tasks.insert(id, Tracked { task, place, due_ms: None, asked_ms: 0, homeless_ms: None });
    }

    fn remove(&mut self, id: &TaskId) {
        if let Some(tracked) = self.tasks.remove(id) {
            self.ended.remove(&tracked.place);
            self.open.remove(&tracked.place);
            if let Some(due_ms) = tracked.due_ms {
                self.due.remove(&(due_ms, id.clone()));
            }
            self.ask_now.remove(id);
            self.changed.remove(id);
            self.forgotten.push(id.clone());
        }
    }

    /// Puts it where those are that were heard of last.
    fn move_to_its_place(&mut self, id: &TaskId) {
        let Some(tracked) = self.tasks.get_mut(id) else { return };
        self.ended.remove(&tracked.place);
        self.open.remove(&tracked.place);
        self.sequence += 1;
        tracked.place = self.sequence;
        let order = if tracked.task.has_ended() { &mut self.ended } else { &mut self.open };
        order.insert(tracked.place, id.clone());
    }

    fn schedule(&mut self, id: &TaskId, now_ms: u64) {
        let Some(tracked) = self.tasks.get_mut(id) else { return };
        if tracked.task.wants_project() {
            if tracked.homeless_ms.is_none() {
                tracked.homeless_ms = Some(now_ms + NO_PROJECT_AFTER_MS);
                // Workers know the arguments, whatever was set.
                self.ask_now.insert(id.clone());
            }
        } else {
            tracked.homeless_ms = None;
        }
        let due_ms =
            tracked.task.due_ms().into_iter().chain(tracked.homeless_ms.filter(|ms| *ms > now_ms)).min();
        if due_ms != tracked.due_ms {
            if let Some(former) = tracked.due_ms {
                self.due.remove(&(former, id.clone()));
            }
            if let Some(due_ms) = due_ms {
                self.due.insert((due_ms, id.clone()));
            }
            tracked.due_ms = due_ms;
        }
    }

    /// The project of a task that it came from, or of its group: only of one whose own arguments were seen and name none. What is
    /// heard first of a task may be less than it says itself, and by then its parent's pages would have been told.
    fn inherited(&self, id: &TaskId) -> Option<ProjectId> {
        let about = &self.tasks.get(id).filter(|tracked| tracked.task.about.has_arguments)?.task.about;
        let known = |id: &TaskId| {
            let (_, project) = self.tasks.get(id)?.task.about.project.as_ref()?;
            Some(project.clone())
        };
        let from = [&about.parent, &about.root];
        let group = || self.processes.project_of_group(about.group.as_ref()?);
        from.into_iter().flatten().find_map(known).or_else(group)
    }

    fn note_homeless(&mut self, id: &TaskId) {
        let Some(tracked) = self.tasks.get(id).filter(|tracked| tracked.task.wants_project()) else { return };
        let name = tracked.task.about.name.as_deref().unwrap_or("(unknown)").to_owned();
        let reason = reason_of(&tracked.task.about);
        self.homeless_count += 1;
        let known = self.homeless.iter_mut().find(|known| known.task_name == name && known.reason == reason);
        if let Some(known) = known {
            known.count += 1;
            known.task_id = id.to_string();
            return;
        }
        if self.homeless.len() >= HOMELESS_MAX {
            self.homeless.pop_front();
        }
        let task_id = id.to_string();
        self.homeless.push_back(Homeless { task_name: name, reason, count: 1, task_id });
    }

    fn forget(&mut self, now_ms: u64) {
        let is_old = |tasks: &HashMap<TaskId, Tracked>, id: &TaskId, kept_ms: u64| {
            tasks.get(id).is_none_or(|tracked| tracked.task.heard_ms + kept_ms < now_ms)
        };
        for (ended, kept_ms) in [(true, ENDED_MS_MAX), (false, SILENT_MS_MAX)] {
            loop {
                let order = if ended { &self.ended } else { &self.open };
                let Some((place, id)) = order.first_key_value().map(|(place, id)| (*place, id.clone()))
                else {
                    break;
                };
                if !is_old(&self.tasks, &id, kept_ms) {
                    break;
                }
                self.remove(&id);
                self.ended.remove(&place);
                self.open.remove(&place);
            }
        }
    }
}

/// Why no project is known.
fn reason_of(about: &About) -> &'static str {
    match &about.name {
        None => {
            "nothing says which task it is: set `result_extended=True` in Celery's settings, or register it with POST /api/tasks/{task_id}"
        }
        Some(_) => {
            "no argument `project_id`, no stamp, no rule, not registered, and no task that it came from has a project: see [[celery.rules]]"
        }
    }
}

/// A task that workers say to be running, of which the result backend knows nothing.
pub(super) fn report_of_active(task_id: TaskId, about: About, pid: Option<i64>) -> Report {
    Report { task_id, route: Route::Control, about, said: Said::Started { pid }, at: None }
}

/// That a worker has it, and what it says of it.
pub(super) fn report_of_known(task_id: TaskId, about: About) -> Report {
    Report { task_id, route: Route::Control, about, said: Said::Alive, at: None }
}

/// What the phase of a task is called where it is kept.
impl Phase {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Retrying => "retrying",
            Self::Ended { well: true, .. } => "completed",
            Self::Ended { well: false, .. } => "failed",
        }
    }

    pub(super) fn parse(text: &str, now_ms: u64) -> Option<Self> {
        Some(match text {
            "waiting" => Self::Waiting,
            "running" => Self::Running,
            "retrying" => Self::Retrying,
            "completed" => Self::Ended { well: true, is_lost: false, at_ms: now_ms },
            "failed" => Self::Ended { well: false, is_lost: false, at_ms: now_ms },
            _ => return None,
        })
    }
}
