//! What all that Celery sends has in common: what may be told of it, and values that anybody may have put there.

use std::borrow::Cow;

use serde_json::Value;
use tidings_protocol::{RawObject, Timestamp};

use super::{
    json::{mended, value_of},
    project::{Finder, Rank, identifier},
    report::{About, Progress, TaskId, cut, head, tail, task_id},
};

/// Fields of an update that are looked at; of more, the rest goes unseen.
const UPDATE_FIELDS_MAX: usize = 100;

/// How messages are read.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) projects: Finder,
    pub(super) tells_results: bool,
    pub(super) tells_arguments: bool,
    pub(super) tells_tracebacks: bool,
    /// The largest value that is told.
    pub(super) value_bytes_max: usize,
}

impl Reading {
    /// A result, if it may be told.
    pub(super) fn result(&self, json: &str) -> Option<Box<str>> {
        (self.tells_results && json != "null").then(|| self.value(json)).flatten()
    }

    /// Python's text for a result, if it may be told.
    pub(super) fn result_text(&self, text: &str) -> Option<Box<str>> {
        (self.tells_results && text.len() <= self.value_bytes_max).then(|| text.into())
    }

    /// A traceback, if it may be told: its end, which says what went wrong.
    pub(super) fn traceback(&self, text: Option<Cow<'_, str>>) -> Option<Box<str>> {
        let text = text.filter(|_| self.tells_tracebacks)?;
        Some(tail(&text, self.value_bytes_max).into())
    }

    /// Keyword arguments, if they may be told.
    pub(super) fn arguments(&self, kwargs: Option<&str>) -> Option<Box<str>> {
        let kwargs = kwargs.filter(|kwargs| self.tells_arguments && *kwargs != "{}")?;
        self.value(kwargs)
    }

    fn value(&self, json: &str) -> Option<Box<str>> {
        (json.len() <= self.value_bytes_max).then(|| mended(json).into())
    }

    /// What an update says, in the shapes that are customary: `current`, `done` or `processed` of `total`, or a `percent`. A
    /// value that is no object is a message, or a count.
    pub(super) fn update(&self, state: &str, json: Option<&str>) -> Progress {
        let state = (state != "PROGRESS").then(|| cut(state));
        let value = json.filter(|json| json.len() <= 4 * self.value_bytes_max.max(4096)).and_then(value_of);
        let progress = match value {
            Some(Value::Object(fields)) => self.update_of(fields.into_iter().take(UPDATE_FIELDS_MAX)),
            Some(Value::String(text)) => Progress { message: Some(cut(&text)), ..Progress::default() },
            Some(Value::Number(count)) => {
                Progress { current: at_least_0(count.as_f64()), ..Progress::default() }
            }
            _ => Progress::default(),
        };
        Progress { state, ..progress }
    }

    fn update_of(&self, fields: impl Iterator<Item = (String, Value)>) -> Progress {
        let (mut current, mut total, mut percentage, mut message) = (None, None, None, None);
        let mut others = serde_json::Map::new();
        for (name, value) in fields {
            match name.as_str() {
                "current" | "done" | "processed" if current.is_none() => current = Some(number(&value)),
                "total" => total = Some(number(&value)),
                "percent" | "percentage" | "progress" if percentage.is_none() => {
                    percentage = Some(number(&value));
                }
                "message" | "description" | "status" | "desc" if message.is_none() => {
                    message = value.as_str().filter(|text| !text.is_empty()).map(cut);
                }
                "project_id" | "pending" => {}
                _ => drop(others.insert(name, value)),
            }
        }
        let percentage = percentage.flatten().map(|percentage| percentage.clamp(0.0, 100.0));
        let total = at_least_0(total.flatten());
        let (current, total) = match (current.flatten(), percentage) {
            (None, Some(percentage)) if total == 0.0 => (percentage, 100.0),
            (None, Some(percentage)) => (total * percentage / 100.0, total),
            (current, _) => (at_least_0(current), total),
        };
        let metadata = (!others.is_empty()).then(|| Value::Object(others).to_string());
        Progress {
            // More than all is all.
            current: if total > 0.0 { current.min(total) } else { current },
            total,
            percentage,
            message,
            state: None,
            metadata: metadata.filter(|json| json.len() <= self.value_bytes_max).map(Into::into),
        }
    }
}

fn at_least_0(number: Option<f64>) -> f64 {
    number.filter(|number| number.is_finite()).unwrap_or(0.0).max(0.0)
}

/// A number, also where it was written as text.
fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().trim_end_matches('%').parse().ok(),
        _ => None,
    };
    number.filter(|number: &f64| number.is_finite())
}

/// The project that an update names.
pub(super) fn project_in_update(object: &RawObject<'_>) -> Option<(Rank, tidings_protocol::ProjectId)> {
    let value = object.get("project_id").and_then(value_of)?;
    identifier(&value).map(|project| (Rank::Update, project))
}

/// What identifies a task, as far as an object has it.
pub(super) fn about(object: &RawObject<'_>) -> About {
    let text = |field| object.get_str(field).filter(|text| !text.is_empty());
    let id = |field| text(field).and_then(|text| task_id(&text));
    About {
        name: text("name").map(|name| head(&name, 255).into()),
        retries: object.get("retries").and_then(|retries| retries.parse().ok()),
        parent: id("parent_id"),
        root: id("root_id"),
        group: id("group_id"),
        ..About::default()
    }
}

/// The ids in a list of results as tuples: `[[[ID, PARENT], null], …]`, groups with their members behind them.
pub(super) fn ids_of_results(json: &str, max: usize) -> Vec<TaskId> {
    let mut ids = Vec::new();
    if let Some(Value::Array(results)) = value_of(json) {
        for result in &results {
            collect_ids(result, &mut ids, max, 0);
        }
    }
    ids
}

fn collect_ids(result: &Value, ids: &mut Vec<TaskId>, max: usize, depth: usize) {
    let Some([Value::Array(identity), members]) = result.as_array().map(Vec::as_slice) else { return };
    if ids.len() >= max || depth > 4 {
        return;
    }
    match members {
        // A group has no meta of its own.
        Value::Array(members) => members.iter().for_each(|member| collect_ids(member, ids, max, depth + 1)),
        _ => ids.extend(identity.first().and_then(Value::as_str).and_then(task_id)),
    }
}

/// A moment in seconds since 1970, as workers tell it. Their `utcoffset` says nothing: it is true UTC already.
pub(super) fn moment(object: &RawObject<'_>) -> Option<Timestamp> {
    let seconds: f64 = object.get("timestamp")?.parse().ok()?;
    let microseconds = (seconds * 1e6).round();
    if !(0.0..4e15).contains(&microseconds) {
        return None;
    }
    #[allow(clippy::cast_possible_truncation, reason = "it is within four thousand million million")]
    Timestamp::from_microsecond(microseconds as i64)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn reading() -> Reading {
        Reading {
            projects: Finder { argument: "project_id".to_owned(), rules: Vec::new(), takes_hints: true },
            tells_results: false,
            tells_arguments: false,
            tells_tracebacks: false,
            value_bytes_max: 4096,
        }
    }

    #[test]
    fn an_update_is_read_in_every_customary_shape() {
        let progress = |current, total| Progress { current, total, ..Progress::default() };
        for (json, expected) in [
            (r#"{"current": 1, "total": 3}"#, progress(1.0, 3.0)),
            (r#"{"done": "2", "total": 4}"#, progress(2.0, 4.0)),
            (r#"{"processed": 9, "total": 4}"#, progress(4.0, 4.0)),
            (r#"{"current": -1, "total": -3}"#, progress(0.0, 0.0)),
            (r#"{"current": NaN, "total": Infinity}"#, progress(0.0, 0.0)),
            (r#"{"current": 1180591620717411303424, "total": 2}"#, progress(2.0, 2.0)),
            (r#"{"percent": 250}"#, Progress { percentage: Some(100.0), ..progress(100.0, 100.0) }),
            (r#"{"progress": "30%"}"#, Progress { percentage: Some(30.0), ..progress(30.0, 100.0) }),
            (r#"{"percentage": 50, "total": 8}"#, Progress { percentage: Some(50.0), ..progress(4.0, 8.0) }),
            ("42", progress(42.0, 0.0)),
            ("null", progress(0.0, 0.0)),
            ("[1, 2]", progress(0.0, 0.0)),
            (r#""half way""#, Progress { message: Some("half way".into()), ..progress(0.0, 0.0) }),
            (
                r#"{"pending": false, "current": 5, "total": 10, "percent": 50.0, "description": "hé \ud800"}"#,
                Progress {
                    percentage: Some(50.0),
                    message: Some("hé \u{fffd}".into()),
                    ..progress(5.0, 10.0)
                },
            ),
            (
                r#"{"current": 1, "total": 2, "project_id": "p", "file": "a.mp4"}"#,
                Progress { metadata: Some(r#"{"file":"a.mp4"}"#.into()), ..progress(1.0, 2.0) },
            ),
        ] {
            assert_eq!(reading().update("PROGRESS", Some(json)), expected, "{json}");
        }
        assert_eq!(reading().update("DOWNLOADING", None).state.as_deref(), Some("DOWNLOADING"));
    }

    #[test]
    fn children_are_found_in_groups_too() {
        let ids = |json| ids_of_results(json, 3).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            ids(r#"[[["a", null], null], [["g", null], [[["b", "g"], null], [["c", "g"], null]]]]"#),
            ["a", "b", "c"]
        );
        assert_eq!(
            ids(r#"[[["a",null],null],[["b",null],null],[["c",null],null],[["d",null],null]]"#),
            ["a", "b", "c"]
        );
        assert!(ids("null").is_empty() && ids("[[]]").is_empty() && ids(r#"[["a", null]]"#).is_empty());
    }
}
