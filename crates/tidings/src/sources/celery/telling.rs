//! The events that are made of what was heard: their JSON, their ids, and to whom they go.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Number, value::RawValue};
use tidings_protocol::{ProjectId, Timestamp};

use super::{
    report::{Progress, Reason},
    task::Mark,
};

/// An event on its way.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    /// The task or process that it is about.
    pub(super) subject: Arc<str>,
    pub(super) project: ProjectId,
    /// A newer one of the same subject makes it superfluous.
    pub(super) is_update: bool,
    /// How much of its task was told with it.
    pub(super) mark: Option<Mark>,
    pub(super) json: String,
}

/// What an event has, in the order in which it is written.
#[derive(Debug, Default, Serialize)]
pub(super) struct Event<'a> {
    pub(super) r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timestamp: Option<Timestamp>,
    pub(super) project_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) task_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) process_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attempt: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) task_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) progress: Option<Measure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) state: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metadata: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<&'a RawValue>,
    /// Python's text for the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) result_repr: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) traceback: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outcome: Option<&'a str>,
}

/// How far a task is, or a process.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Measure {
    Steps {
        current: Number,
        total: Number,
        #[serde(skip_serializing_if = "Option::is_none")]
        percentage: Option<Number>,
    },
    Percent(u32),
}

impl Measure {
    pub(super) fn of(progress: &Progress) -> Self {
        Self::Steps {
            current: number(progress.current),
            total: number(progress.total),
            percentage: progress.percentage.map(number),
        }
    }
}

/// Whole numbers are written as such.
#[allow(clippy::cast_possible_truncation, reason = "it is less than 2^53")]
fn number(value: f64) -> Number {
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < WHOLE_MAX {
        return Number::from(value as i64);
    }
    Number::from_f64(value).unwrap_or_else(|| Number::from(0))
}

impl Event<'_> {
    pub(super) fn into_json(self) -> String {
        serde_json::to_string(&self).expect("it is made of text, numbers and JSON")
    }
}

/// JSON that is passed on as it is.
pub(super) fn raw(json: Option<&str>) -> Option<&RawValue> {
    json.and_then(|json| serde_json::from_str(json).ok())
}

/// The id of a task's event: the one that the Python package gives it, so that both together say it once. What is said again
/// about an attempt, because it ran again after it had ended, has another one.
pub(super) fn event_id(task_id: &str, attempt: u32, repetition: u32, r#type: &str) -> String {
    if repetition == 0 {
        format!("celery:{task_id}:{attempt}:{type}")
    } else {
        format!("celery:{task_id}:{attempt}+{repetition}:{type}")
    }
}

/// The error of a task that is lost.
pub(super) const LOST: (Reason, &str) =
    (Reason::Lost, "no worker knows the task any more, and it has left no result: its worker may have died");
