//! What the result backend publishes about a task: its state and, if Celery was told to say more, its name and its arguments.
//! Every message is one state, written by whoever runs the task or, where that is gone, by its worker's main process.

use std::borrow::Cow;

use serde_json::Value;
use tidings_protocol::{ProjectId, RawObject, Timestamp};

use super::{
    json::{status_in_head, text_of, value_of},
    project::{Rank, identifier},
    reading::{Reading, about, ids_of_results, project_in_update},
    report::{About, End, Failure, Reason, Report, Route, Said, TaskId, cut},
};

/// Of more children nobody is told a process.
const CHILDREN_MAX: usize = 1000;
/// A stamp of the Python package: how many steps of the chain are left.
const CHAIN_STAMP: &str = "tidings_chain";

/// What became of a message.
#[derive(Debug)]
pub(super) enum Heard {
    /// It was read.
    Report(Report),
    /// It could not be read but for what it says.
    InPart(Report),
    /// It could not be read.
    Unreadable,
}

/// Reads what was published, or is kept, for a task.
pub(super) fn read(task_id: TaskId, route: Route, payload: &[u8], reading: &Reading) -> Heard {
    let text = text_of(payload);
    if let Some(object) = text.as_deref().and_then(|text| RawObject::parse(text).ok()) {
        let Some(status) = object.get_str("status") else { return Heard::Unreadable };
        return Heard::Report(report(task_id, route, &status, &object, reading));
    }
    // What it says about the task is lost; that it is over is not.
    let Some(status) = status_in_head(payload) else { return Heard::Unreadable };
    let said = match status {
        "SUCCESS" => Said::Ended(End::Completed { result: None, is_repr: false }),
        "FAILURE" | "REVOKED" => {
            let reason = if status == "REVOKED" { Reason::Revoked } else { Reason::Error };
            failed(reason, "what went wrong is written in a way that cannot be read".into(), None)
        }
        "RETRY" => Said::Retrying { error: "what went wrong cannot be read".into() },
        "STARTED" => Said::Started { pid: None },
        "PENDING" | "RECEIVED" => Said::Known,
        state => Said::Progress(reading.update(state, None)),
    };
    Heard::InPart(Report { task_id, route, about: About::default(), said, at: None })
}

/// The ids of the tasks of a group that was saved, from what was published for it.
pub(super) fn read_group(payload: &[u8], members_max: usize) -> Option<Vec<TaskId>> {
    let text = text_of(payload)?;
    let object = RawObject::parse(&text).ok()?;
    // One result, as a tuple.
    let ids = ids_of_results(&format!("[{}]", object.get("result")?), members_max);
    (!ids.is_empty()).then_some(ids)
}

fn report(task_id: TaskId, route: Route, status: &str, object: &RawObject<'_>, reading: &Reading) -> Report {
    let mut about = about_of(&task_id, object, reading);
    let said = said(status, object, reading);
    if matches!(said, Said::Progress(_)) && about.project.is_none() {
        let update = object.get("result").and_then(|result| RawObject::parse(result).ok());
        about.project = update.as_ref().and_then(project_in_update);
    }
    let at = object.get_str("date_done").and_then(|text| Timestamp::parse(&text));
    Report { task_id, route, about, said, at }
}

fn about_of(task_id: &TaskId, object: &RawObject<'_>, reading: &Reading) -> About {
    let mut about = about(object);
    let (args, kwargs) = (object.get("args"), object.get("kwargs"));
    let stamped = stamp(object, "project_id").as_ref().and_then(identifier);
    let in_arguments = || reading.projects.in_arguments(about.name.as_deref(), args, kwargs);
    about.project = stamped
        .map(|project| (Rank::Stamp, project))
        .or_else(|| in_arguments().map(|project: ProjectId| (Rank::Arguments, project)));
    about.has_arguments = kwargs.is_some();
    about.arguments = reading.arguments(kwargs);
    about.worker = object.get_str("worker").map(|worker| cut(&worker));
    // A task that is tried again is its own parent and its own child.
    about.parent = about.parent.take().filter(|parent| parent != task_id);
    about.children = object.get("children").map_or_else(Vec::new, |json| ids_of_results(json, CHILDREN_MAX));
    about.children.retain(|child| child != task_id);
    let length = stamp(object, CHAIN_STAMP).and_then(|value| value.as_u64());
    about.chain_length = length.and_then(|length| u32::try_from(length).ok());
    about
}

/// What was stamped on the task under a name: it stands among the fields, and the list of stamps says that it is one.
fn stamp(object: &RawObject<'_>, name: &str) -> Option<Value> {
    let stamps = object.get("stamped_headers").and_then(value_of)?;
    let is_stamped = stamps.as_array()?.iter().any(|stamp| stamp == name);
    let value = is_stamped.then(|| object.get(name)).flatten().and_then(value_of)?;
    match value {
        // As Celery writes what was stamped several times.
        Value::Array(mut values) if values.len() == 1 => values.pop(),
        value => Some(value),
    }
}

fn said(status: &str, object: &RawObject<'_>, reading: &Reading) -> Said {
    let result = object.get("result");
    match status {
        "SUCCESS" => {
            let result = result.and_then(|json| reading.result(json));
            Said::Ended(End::Completed { result, is_repr: false })
        }
        "FAILURE" => failure(object, reading),
        "RETRY" => Said::Retrying { error: error(result).1 },
        "REVOKED" => {
            let (_, text) = error(result);
            let reason = if text.ends_with("expired") { Reason::Expired } else { Reason::Revoked };
            failed(reason, text, None)
        }
        "STARTED" if is_own(result) => Said::Progress(reading.update(status, result)),
        "STARTED" => Said::Started { pid: pid(result) },
        "PENDING" | "RECEIVED" => Said::Known,
        state => Said::Progress(reading.update(state, result)),
    }
}

/// The process that runs a task, as Celery tells it.
fn pid(result: Option<&str>) -> Option<i64> {
    let object = RawObject::parse(result?).ok()?;
    object.get("hostname").and(object.get("pid"))?.parse().ok()
}

/// Whether the task's own code has written that it is started, and not Celery.
fn is_own(result: Option<&str>) -> bool {
    result.is_some() && pid(result).is_none()
}

fn failure(object: &RawObject<'_>, reading: &Reading) -> Said {
    let (exception, error) = error(object.get("result"));
    let reason = match exception.as_deref() {
        // Nobody has run it: it stood behind another task that has failed.
        Some(name) if has_no_worker(object) && name != "NotRegistered" => Reason::NotRun,
        Some(name) => Reason::of_exception(name),
        None => Reason::Error,
    };
    let traceback = reading.traceback(object.get_str("traceback"));
    Said::Ended(End::Failed(Failure { reason, error, traceback }))
}

/// Whether it says that no worker had it, in place of not saying which.
fn has_no_worker(object: &RawObject<'_>) -> bool {
    object.members().iter().any(|member| member.key == "worker" && member.value == "null")
}

fn failed(reason: Reason, error: Box<str>, traceback: Option<Box<str>>) -> Said {
    Said::Ended(End::Failed(Failure { reason, error, traceback }))
}

/// The name of an exception, if it is one, and what is told of it.
fn error(result: Option<&str>) -> (Option<String>, Box<str>) {
    let Some(result) = result else { return (None, "no reason was given".into()) };
    let object = RawObject::parse(result).ok();
    let Some((object, name)) = object.and_then(|object| {
        let name = object.get_str("exc_type")?.into_owned();
        Some((object, name))
    }) else {
        return (None, cut(&plain(result)));
    };
    let message = match object.get("exc_message").and_then(value_of) {
        Some(Value::Array(parts)) => parts.iter().map(text).collect::<Vec<_>>().join(", "),
        Some(value) => text(&value).into_owned(),
        None => String::new(),
    };
    let error = if message.is_empty() { cut(&name) } else { cut(&format!("{name}: {message}")) };
    (Some(name), error)
}

fn plain(json: &str) -> String {
    match value_of(json) {
        Some(value) => text(&value).into_owned(),
        None => "no reason that can be read was given".to_owned(),
    }
}

fn text(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        value => Cow::Owned(value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::reading::tests::reading, *};

    fn read(payload: &str) -> Report {
        match super::read("t1".into(), Route::Backend, payload.as_bytes(), &reading()) {
            Heard::Report(report) => report,
            other => panic!("{payload}: {other:?}"),
        }
    }

    fn failure(payload: &str) -> (&'static str, String) {
        match read(payload).said {
            Said::Ended(End::Failed(failure)) => (failure.reason.as_str(), failure.error.into()),
            other => panic!("{payload}: {other:?}"),
        }
    }

    // The literal messages are from celery.md, section 2.

    #[test]
    fn each_state_is_read_as_what_it_says() {
        let extended = read(
            r#"{"status":"STARTED","result":{"pid":15092,"hostname":"w1@lab"},"traceback":null,"children":[],"date_done":null,"name":"app.progress","args":[],"kwargs":{"n":2,"project_id":"p-1"},"worker":"w1@lab","retries":0,"queue":"celery","task_id":"x1-progress"}"#,
        );
        assert_eq!(extended.said, Said::Started { pid: Some(15092) });
        let about = extended.about;
        assert_eq!(
            (about.name.as_deref(), about.retries, about.worker.as_deref()),
            (Some("app.progress"), Some(0), Some("w1@lab"))
        );
        assert_eq!(
            about.project.map(|(rank, id)| (rank, id.to_string())),
            Some((Rank::Arguments, "p-1".to_owned()))
        );
        let stamped = read(
            r#"{"status":"STARTED","result":{"pid":1,"hostname":"h"},"kwargs":{"project_id":"other"},"stamped_headers":["project_id"],"project_id":"stamp-1","task_id":"t3-stamp"}"#,
        );
        assert_eq!(
            stamped.about.project.map(|(rank, id)| (rank, id.to_string())),
            Some((Rank::Stamp, "stamp-1".to_owned()))
        );
        let progress = read(
            r#"{"status":"PROGRESS","result":{"current":1,"total":3,"message":"frame 1","project_id":"p-2"},"children":[],"date_done":null}"#,
        );
        assert!(
            matches!(&progress.said, Said::Progress(progress) if progress.total.total_cmp(&3.0).is_eq()),
            "{progress:?}"
        );
        assert_eq!(progress.about.project.map(|(rank, _)| rank), Some(Rank::Update));
        let success = read(
            r#"{"status":"SUCCESS","result":{"frames":NaN},"children":[[["c1",null],null],[["t1",null],null]],"date_done":"2026-11-23T00:35:41.359085+00:00"}"#,
        );
        assert_eq!(success.said, Said::Ended(End::Completed { result: None, is_repr: false }));
        assert_eq!(success.about.children, [TaskId::from("c1")]);
        assert_eq!(success.at.map(|at| at.to_string()).as_deref(), Some("2026-11-23T00:35:41.359085Z"));
        let retry = read(
            r#"{"status":"RETRY","result":{"exc_type":"OSError","exc_message":["try 0"],"exc_module":"builtins"}}"#,
        );
        assert_eq!(retry.said, Said::Retrying { error: "OSError: try 0".into() });
        assert!(matches!(read(r#"{"status":"STARTED","result":{"step":1}}"#).said, Said::Progress(_)));
    }

    #[test]
    fn a_failure_has_its_reason() {
        for (payload, reason, error) in [
            (
                r#"{"status":"FAILURE","result":{"exc_type":"ValueError","exc_message":["boom: p-1"],"exc_module":"builtins"},"traceback":"T"}"#,
                "error",
                "ValueError: boom: p-1",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"KeyError","exc_message":[1, {"a": 2}]},"traceback":"T"}"#,
                "error",
                "KeyError: 1, {\"a\":2}",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"E","exc_message":"plain"},"traceback":"T"}"#,
                "error",
                "E: plain",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"TimeLimitExceeded","exc_message":[2]},"traceback":"T"}"#,
                "time_limit",
                "TimeLimitExceeded: 2",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"WorkerLostError"},"traceback":"T"}"#,
                "worker_lost",
                "WorkerLostError",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"ValueError","exc_message":["x"]},"worker":null,"traceback":null}"#,
                "not_run",
                "ValueError: x",
            ),
            (
                r#"{"status":"FAILURE","result":{"exc_type":"NotRegistered","exc_message":["'gone'"]},"worker":null,"traceback":"T"}"#,
                "error",
                "NotRegistered: 'gone'",
            ),
            (r#"{"status":"FAILURE","result":{"why":"by hand"}}"#, "error", "{\"why\":\"by hand\"}"),
            (r#"{"status":"FAILURE","result":null}"#, "error", "no reason was given"),
            (
                r#"{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["terminated"]}}"#,
                "revoked",
                "TaskRevokedError: terminated",
            ),
            (
                r#"{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["expired"]}}"#,
                "expired",
                "TaskRevokedError: expired",
            ),
        ] {
            assert_eq!(failure(payload), (reason, error.to_owned()), "{payload}");
        }
    }

    #[test]
    fn what_cannot_be_read_still_says_that_the_task_is_over() {
        let read = |payload: &[u8]| super::read("t".into(), Route::Backend, payload, &reading());
        let pickle =
            b"\x80\x04\x95u\0\0\0\0\0\0\0}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result\x94";
        match read(pickle) {
            Heard::InPart(report) => {
                assert!(matches!(report.said, Said::Ended(End::Completed { result: None, .. })));
            }
            other => panic!("{other:?}"),
        }
        for payload in [&b""[..], b"[]", b"{}", b"{\"status\": 5}", b"\xff\xff"] {
            assert!(matches!(read(payload), Heard::Unreadable), "{payload:?}");
        }
    }

    #[test]
    fn a_saved_group_has_its_members() {
        let payload = br#"{"result": [["g1", null], [[["a", null], null], [["b", null], null]]]}"#;
        assert_eq!(read_group(payload, 10).expect("it is one").len(), 2);
        assert!(read_group(b"{\"result\": [[\"a\", null], null]}", 10).is_some_and(|ids| ids.len() == 1));
        assert!(read_group(b"x", 10).is_none());
    }
}
