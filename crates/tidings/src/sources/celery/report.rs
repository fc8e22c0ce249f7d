//! What Celery says about a task, whichever way it was heard.

use std::sync::Arc;

use tidings_protocol::{ProjectId, Timestamp};

use super::project::Rank;

/// The id of a task, as Celery has it: any text.
pub(crate) type TaskId = Arc<str>;

/// A longer one is nobody's: the events of ours that carry it could not be told apart by their ids, which have 200 bytes.
pub(super) const TASK_ID_BYTES_MAX: usize = 150;
/// The most of an error, a message or a name that is told.
const TEXT_BYTES_MAX: usize = 4096;

/// How something was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// The result backend published it.
    Backend,
    /// It was read in the result backend, because something may have been missed.
    Resync,
    /// A worker's event.
    Events,
    /// A worker's answer.
    Control,
}

/// One thing that was said about one task.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) task_id: TaskId,
    pub(super) route: Route,
    pub(super) about: About,
    pub(super) said: Said,
    /// When it happened, by the worker's clock.
    pub(super) at: Option<Timestamp>,
}

/// What is said beside it about the task itself.
#[derive(Clone, Debug, Default)]
pub(super) struct About {
    pub(super) name: Option<Box<str>>,
    /// How often it was tried before.
    pub(super) retries: Option<u32>,
    pub(super) worker: Option<Box<str>>,
    pub(super) parent: Option<TaskId>,
    pub(super) root: Option<TaskId>,
    pub(super) group: Option<TaskId>,
    /// The tasks that this one has sent.
    pub(super) children: Vec<TaskId>,
    pub(super) project: Option<(Rank, ProjectId)>,
    /// Its arguments were seen as they are: `project` would say what they name.
    pub(super) has_arguments: bool,
    /// Its keyword arguments as JSON, if they may be told.
    pub(super) arguments: Option<Box<str>>,
    /// How many steps of a chain are left, this one included, where somebody has said so.
    pub(super) chain_length: Option<u32>,
    /// How many tasks its group has, where the result backend has said so.
    pub(super) group_size: Option<u32>,
}

/// What is said.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// That it is there.
    Known,
    /// It began to run, in this process.
    Started { pid: Option<i64> },
    /// It goes on.
    Progress(Progress),
    /// It failed, and is tried again.
    Retrying { error: Box<str> },
    /// It is over.
    Ended(End),
    /// A worker has it.
    Alive,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Progress {
    pub(super) current: f64,
    pub(super) total: f64,
    pub(super) percentage: Option<f64>,
    pub(super) message: Option<Box<str>>,
    /// The task's own name for its state, unless that is Celery's customary one.
    pub(super) state: Option<Box<str>>,
    /// Whatever else was said, as JSON.
    pub(super) metadata: Option<Box<str>>,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    /// With a result, as JSON or as Python's text for it, if it may be told.
    Completed {
        result: Option<Box<str>>,
        is_repr: bool,
    },
    Failed(Failure),
}

/// Why it failed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    pub(super) reason: Reason,
    pub(super) error: Box<str>,
    pub(super) traceback: Option<Box<str>>,
}

/// Why, in a word of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Error,
    Revoked,
    Expired,
    TimeLimit,
    WorkerLost,
    Rejected,
    NotRun,
    Lost,
}

impl Reason {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::TimeLimit => "time_limit",
            Self::WorkerLost => "worker_lost",
            Self::Rejected => "rejected",
            Self::NotRun => "not_run",
            Self::Lost => "lost",
        }
    }

    /// By the name of the exception.
    pub(super) fn of_exception(name: &str) -> Self {
        match name {
            "SoftTimeLimitExceeded" | "TimeLimitExceeded" => Self::TimeLimit,
            "WorkerLostError" => Self::WorkerLost,
            "TaskRevokedError" | "Terminated" => Self::Revoked,
            "Reject" => Self::Rejected,
            // A chord's body never ran if its header has failed.
            "ChordError" => Self::NotRun,
            _ => Self::Error,
        }
    }
}

/// The id of a task, if it is one that can be told.
pub(crate) fn task_id(text: &str) -> Option<TaskId> {
    let is_good = (1..=TASK_ID_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    is_good.then(|| text.into())
}

/// The beginning of a text, as much of it as is told.
pub(super) fn cut(text: &str) -> Box<str> {
    head(text, TEXT_BYTES_MAX).into()
}

/// The first bytes of a text that make whole characters.
pub(super) fn head(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// The last bytes of a text that make whole characters.
pub(super) fn tail(text: &str, bytes_max: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(bytes_max))..]
}
