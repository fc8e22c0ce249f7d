//! What outlives the process of a task: as much as is needed to go on with it, and to tell nothing of it twice.

use serde::{Deserialize, Serialize};
use tidings_protocol::ProjectId;

use super::{
    project::Rank,
    report::{About, TaskId, task_id},
    task::{Mark, Phase, Task},
};

/// One task, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    project: Option<(String, String)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<Box<str>>,
    #[serde(flatten)]
    mark: Mark,
    phase: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<Box<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chain_length: Option<u32>,
    /// The next step of a chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    child: Option<String>,
}

impl Kept {
    pub(super) fn of(id: &TaskId, task: &Task) -> Self {
        let (mark, phase) = task.kept();
        let About { name, worker, parent, group, children, project, chain_length, group_size, .. } =
            &task.about;
        let text = |id: &TaskId| id.to_string();
        Self {
            id: id.to_string(),
            project: project.as_ref().map(|(rank, project)| (rank.as_str().to_owned(), project.to_string())),
            name: name.clone(),
            mark,
            phase: phase.as_str().to_owned(),
            worker: worker.clone(),
            parent: parent.as_ref().map(text),
            group: group.as_ref().map(text),
            group_size: *group_size,
            chain_length: *chain_length,
            child: children.first().filter(|_| children.len() == 1).map(text),
        }
    }

    /// The task again; `None`: it is written in a way that nobody has written.
    pub(super) fn into_task(self, now_ms: u64) -> Option<(TaskId, Task)> {
        let id = |text: Option<String>| text.and_then(|text| task_id(&text));
        let project = match &self.project {
            Some((rank, project)) => Some((Rank::parse(rank)?, ProjectId::try_from(project.as_str()).ok()?)),
            None => None,
        };
        let about = About {
            name: self.name,
            worker: self.worker,
            parent: id(self.parent),
            group: id(self.group),
            children: id(self.child).into_iter().collect(),
            project,
            chain_length: self.chain_length,
            group_size: self.group_size,
            ..About::default()
        };
        let phase = Phase::parse(&self.phase, now_ms)?;
        Some((task_id(&self.id)?, Task::restored(about, self.mark, phase, now_ms)))
    }
}
