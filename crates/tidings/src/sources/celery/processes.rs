//! Groups and chains of tasks as one process each, where it is known what belongs to them: a group whose size somebody has said
//! (a chord, a saved group, a stamp), and a chain, whose steps name one another. Pure.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use tidings_protocol::ProjectId;

use super::{
    report::{About, TaskId},
    telling::{Event, Measure, Outgoing},
};

/// Processes that are remembered; of more, the oldest are forgotten.
const PROCESSES_MAX: usize = 10_000;
/// Steps of one process that are remembered.
const STEPS_MAX: usize = 10_000;
/// How often it is asked for the size of a group that has none: its members come one after the other.
const SIZE_QUESTIONS_MAX: u32 = 3;

/// All groups and chains.
#[derive(Debug)]
pub(super) struct Processes {
    update_ms: u64,
    by_id: HashMap<TaskId, Process>,
    /// In the order in which they came.
    order: VecDeque<TaskId>,
    /// The chain of each of its steps.
    chain_of: HashMap<TaskId, TaskId>,
    due: BTreeSet<(u64, TaskId)>,
    unsized_groups: HashSet<TaskId>,
}

#[derive(Debug)]
struct Process {
    kind: Kind,
    project: Option<ProjectId>,
    /// How many steps it has in all, where that is known.
    size: Option<u32>,
    /// Each with how it ended.
    steps: HashMap<TaskId, Option<bool>>,
    done: u32,
    failed: u32,
    size_questions: u32,
    stage: Stage,
    /// Its tasks belong to several projects: none of them is to be told of the others'.
    is_mixed: bool,
    /// When the next update is due; one is to be told.
    update_due_ms: u64,
    has_update: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Group,
    Chain,
}

/// How much of a process was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Untold,
    Started,
    Over,
}

impl Processes {
    pub(super) fn new(update_ms: u64) -> Self {
        Self {
            update_ms,
            by_id: HashMap::new(),
            order: VecDeque::new(),
            chain_of: HashMap::new(),
            due: BTreeSet::new(),
            unsized_groups: HashSet::new(),
        }
    }

    /// Takes how a task is now, which belongs to this group. Returns the next step of its chain, which may have been heard of before it
    /// was known to be one.
    pub(super) fn observe(
        &mut self,
        id: &TaskId,
        group: Option<&TaskId>,
        about: &About,
        outcome: Option<bool>,
        now_ms: u64,
        out: &mut Vec<Outgoing>,
    ) -> Option<TaskId> {
        let project = about.project.as_ref().map(|(_, project)| project);
        if let Some(group) = group {
            self.join(group, Kind::Group, id, project, now_ms);
            self.want_size(group, about.group_size);
            self.step(group, id, outcome);
            self.tell(group, now_ms, out);
        }
        let chain = self.chain_of(id, about, outcome)?;
        self.join(&chain, Kind::Chain, id, project, now_ms);
        let next = self.step_of_chain(&chain, id, about, outcome, now_ms);
        self.tell(&chain, now_ms, out);
        next
    }

    /// These are all members of a group.
    pub(super) fn group_saved(&mut self, group: &TaskId, members: &[TaskId]) {
        let process = self.process(group, Kind::Group, 0);
        process.size = u32::try_from(members.len()).ok();
        for member in members.iter().take(STEPS_MAX) {
            process.steps.entry(member.clone()).or_default();
        }
        self.unsized_groups.remove(group);
    }

    /// What the backend says about the size of a group; `None`: it knows none, or none any more. Returns its members.
    pub(super) fn group_sized(
        &mut self,
        group: &TaskId,
        size: Option<u32>,
        now_ms: u64,
        out: &mut Vec<Outgoing>,
    ) -> Vec<TaskId> {
        let Some(process) = self.by_id.get_mut(group) else { return Vec::new() };
        match size {
            Some(size) => process.size = Some(size),
            // It is over: the backend has forgotten it with its last member, of which nothing was heard.
            None if process.size.is_some()
                && process.stage == Stage::Started
                && process.steps.values().all(Option::is_some) =>
            {
                process.size = Some(process.done);
            }
            None => {}
        }
        let members = process.steps.keys().cloned().collect();
        self.tell(group, now_ms, out);
        members
    }

    /// Whether there are groups whose size is to be asked for: a chord's is known only until its last task has ended.
    pub(super) fn is_curious(&self) -> bool {
        !self.unsized_groups.is_empty()
    }

    /// Groups whose size is to be asked for.
    pub(super) fn take_unsized(&mut self) -> Vec<TaskId> {
        std::mem::take(&mut self.unsized_groups).into_iter().collect()
    }

    /// Groups that are told and not over.
    pub(super) fn open_groups(&self) -> Vec<TaskId> {
        let is_open = |process: &Process| process.kind == Kind::Group && process.stage != Stage::Over;
        self.by_id.iter().filter(|(_, process)| is_open(process)).map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn project_of_group(&self, group: &TaskId) -> Option<ProjectId> {
        self.by_id.get(group)?.project.clone()
    }

    /// Tells updates that are due.
    pub(super) fn wake(&mut self, now_ms: u64, out: &mut Vec<Outgoing>) {
        while let Some((due_ms, id)) = self.due.first().cloned()
            && due_ms <= now_ms
        {
            self.due.pop_first();
            self.tell(&id, now_ms, out);
        }
    }

    pub(super) fn due_ms(&self) -> Option<u64> {
        self.due.first().map(|(due_ms, _)| *due_ms)
    }

    fn process(&mut self, id: &TaskId, kind: Kind, now_ms: u64) -> &mut Process {
        if !self.by_id.contains_key(id) {
            if self.order.len() >= PROCESSES_MAX
                && let Some(oldest) = self.order.pop_front()
                && let Some(process) = self.by_id.remove(&oldest)
            {
                process.steps.keys().for_each(|step| drop(self.chain_of.remove(step)));
                self.due.remove(&(process.update_due_ms, oldest));
            }
            self.order.push_back(id.clone());
        }
        self.by_id.entry(id.clone()).or_insert_with(|| Process {
            kind,
            project: None,
            size: None,
            steps: HashMap::new(),
            done: 0,
            failed: 0,
            size_questions: 0,
            stage: Stage::Untold,
            is_mixed: false,
            // What is known already after a restart comes at once, and is told once.
            update_due_ms: now_ms + self.update_ms,
            has_update: false,
        })
    }

    fn join(&mut self, id: &TaskId, kind: Kind, step: &TaskId, project: Option<&ProjectId>, now_ms: u64) {
        let process = self.process(id, kind, now_ms);
        if process.project.is_none() {
            process.project = project.cloned();
        }
        process.is_mixed |= project.is_some_and(|project| process.project.as_ref() != Some(project));
        if process.stage != Stage::Over && process.steps.len() < STEPS_MAX {
            process.steps.entry(step.clone()).or_default();
        }
        if kind == Kind::Chain {
            self.chain_of.insert(step.clone(), id.clone());
        }
    }

    fn want_size(&mut self, group: &TaskId, stamped: Option<u32>) {
        let Some(process) = self.by_id.get_mut(group) else { return };
        process.size = process.size.or(stamped);
        if process.size.is_none() && process.size_questions < SIZE_QUESTIONS_MAX {
            process.size_questions += 1;
            self.unsized_groups.insert(group.clone());
        }
    }

    /// Takes how a step ended, the first time that it did.
    fn step(&mut self, id: &TaskId, step: &TaskId, outcome: Option<bool>) {
        let (Some(process), Some(well)) = (self.by_id.get_mut(id), outcome) else { return };
        if let Some(known @ None) = process.steps.get_mut(step) {
            *known = Some(well);
            process.done += 1;
            process.failed += u32::from(!well);
            process.has_update = true;
        }
    }

    /// The chain that a task is a step of: that of the task that sent it, or one that begins with it.
    fn chain_of(&self, id: &TaskId, about: &About, outcome: Option<bool>) -> Option<TaskId> {
        let known = self.chain_of.get(id).or_else(|| self.chain_of.get(about.parent.as_ref()?));
        if let Some(chain) = known {
            return Some(chain.clone());
        }
        let begins = about.chain_length.is_some_and(|length| length > 1)
            || (about.chain_length.is_none() && outcome == Some(true) && about.children.len() == 1);
        begins.then(|| id.clone())
    }

    /// Returns the next step, if it was not known to be one.
    fn step_of_chain(
        &mut self,
        chain: &TaskId,
        id: &TaskId,
        about: &About,
        outcome: Option<bool>,
        now_ms: u64,
    ) -> Option<TaskId> {
        self.step(chain, id, outcome);
        let next = about.children.first().filter(|_| about.children.len() == 1);
        let mut new = None;
        if let (Some(true), Some(next)) = (outcome, next) {
            new = (!self.chain_of.contains_key(next)).then(|| next.clone());
            self.join(chain, Kind::Chain, next, None, now_ms);
        }
        let process = self.by_id.get_mut(chain)?;
        let so_far = u32::try_from(process.steps.len()).unwrap_or(u32::MAX);
        let said = about
            .chain_length
            .map_or(0, |length| process.done + length - u32::from(outcome.is_some()).min(length));
        process.size = Some(process.size.unwrap_or(0).max(so_far).max(said));
        // The last step that is known has sent no other.
        if outcome == Some(true) && next.is_none() && process.steps.values().all(Option::is_some) {
            process.size = Some(process.done);
        }
        new
    }

    fn tell(&mut self, id: &TaskId, now_ms: u64, out: &mut Vec<Outgoing>) {
        let update_ms = self.update_ms;
        let Some(process) = self.by_id.get_mut(id) else { return };
        let (Some(project), Some(size)) = (process.project.clone(), process.size) else { return };
        match process.stage {
            Stage::Over => return,
            // Of one that is too large not every step is remembered, and it would never be over.
            Stage::Untold if process.is_mixed || size as usize > STEPS_MAX => {
                process.stage = Stage::Over;
                process.steps.clear();
                return;
            }
            Stage::Untold => {
                process.stage = Stage::Started;
                let message = process.message(size);
                let event = Event { message: Some(&message), ..Event::default() };
                out.push(outgoing(id, project.clone(), "process.started", event));
            }
            Stage::Started => {}
        }
        // A chain ends with the first step that fails, a group with its last.
        let is_broken = process.kind == Kind::Chain && process.failed > 0;
        let is_over = process.done >= size || is_broken || process.is_mixed;
        self.due.remove(&(process.update_due_ms, id.clone()));
        if is_over {
            process.stage = Stage::Over;
            process.steps.clear();
            let is_well = process.failed == 0 && !process.is_mixed;
            let outcome = Some(if is_well { "success" } else { "failed" });
            let error = process.error(size);
            let event = Event { outcome, error: error.as_deref(), ..Event::default() };
            out.push(outgoing(id, project, "process.completed", event));
        } else if process.has_update && now_ms >= process.update_due_ms {
            (process.has_update, process.update_due_ms) = (false, now_ms + update_ms);
            let (message, progress) = (process.message(size), Some(Measure::Percent(process.percent(size))));
            let event = Event { progress, message: Some(&message), ..Event::default() };
            out.push(outgoing(id, project, "process.progress", event));
        } else if process.has_update {
            self.due.insert((process.update_due_ms, id.clone()));
        }
    }
}

impl Process {
    fn message(&self, size: u32) -> String {
        match self.kind {
            Kind::Group => format!("{} of {size} tasks", self.done),
            Kind::Chain => format!("step {} of {size}", (self.done + 1).min(size)),
        }
    }

    fn error(&self, size: u32) -> Option<String> {
        if self.is_mixed {
            return Some("its tasks belong to several projects".to_owned());
        }
        match (self.kind, self.failed) {
            (_, 0) => None,
            (Kind::Group, failed) => Some(format!("{failed} of {size} tasks failed")),
            (Kind::Chain, _) => Some(format!("step {} of {size} failed", self.done)),
        }
    }

    fn percent(&self, size: u32) -> u32 {
        let percent = 100 * u64::from(self.done) / u64::from(size.max(1));
        u32::try_from(percent.min(100)).unwrap_or(100)
    }
}

fn outgoing(id: &TaskId, project: ProjectId, r#type: &str, event: Event<'_>) -> Outgoing {
    let is_update = r#type == "process.progress";
    let event = Event {
        r#type,
        id: (!is_update).then(|| format!("celery:{id}:{type}")),
        project_id: project.as_str(),
        process_id: Some(id),
        ..event
    };
    let json = event.into_json();
    Outgoing { subject: id.clone(), project, is_update, mark: None, json }
}
