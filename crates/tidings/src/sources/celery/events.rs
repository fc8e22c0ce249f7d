//! Workers' events as a Redis broker carries them: an envelope with one event, or several at once. They know more tasks than the
//! result backend does, and less of each.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::value::RawValue;
use tidings_protocol::{RawObject, Timestamp};

use super::{
    json::text_of,
    reading::{Reading, about, moment, project_in_update},
    report::{About, End, Failure, Reason, Report, Route, Said, cut, task_id},
};

/// What an event says.
#[derive(Debug)]
pub(super) enum Event {
    Task(Box<Report>),
    Worker(WorkerEvent),
}

/// What became of a worker.
#[derive(Debug, PartialEq)]
pub(super) struct WorkerEvent {
    pub(super) worker: Box<str>,
    pub(super) change: WorkerChange,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum WorkerChange {
    /// It is there, and says so every so many seconds.
    Beats { every_s: f64 },
    /// It came.
    Online,
    /// It went.
    Offline,
}

/// Why a message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It is not as the transport writes it.
    Envelope,
    /// It is not JSON, and will not be unpickled.
    ContentType,
    /// It says that it is JSON.
    Body,
}

impl Unreadable {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Envelope => "envelope",
            Self::ContentType => "content_type",
            Self::Body => "body",
        }
    }
}

/// The body of an envelope, decoded.
pub(super) fn body_of(payload: &[u8]) -> Result<Vec<u8>, Unreadable> {
    let text = text_of(payload).ok_or(Unreadable::Envelope)?;
    let envelope = RawObject::parse(&text).map_err(|_| Unreadable::Envelope)?;
    if envelope.get_str("content-type").is_some_and(|kind| kind != "application/json") {
        return Err(Unreadable::ContentType);
    }
    let body = envelope.get_str("body").ok_or(Unreadable::Envelope)?;
    let properties = envelope.get("properties").and_then(|json| RawObject::parse(json).ok());
    let encoding = properties.as_ref().and_then(|properties| properties.get_str("body_encoding"));
    if encoding.is_some_and(|encoding| encoding == "base64") {
        return STANDARD.decode(&*body).map_err(|_| Unreadable::Body);
    }
    Ok(body.into_owned().into_bytes())
}

/// Reads a message: its events, and how many of them could not be read.
pub(super) fn read(payload: &[u8], reading: &Reading) -> Result<(Vec<Event>, usize), Unreadable> {
    let body = body_of(payload)?;
    let text = text_of(&body).ok_or(Unreadable::Body)?;
    let several: Vec<&RawValue> = if text.trim_start().starts_with('[') {
        serde_json::from_str(&text).map_err(|_| Unreadable::Body)?
    } else {
        vec![serde_json::from_str(&text).map_err(|_| Unreadable::Body)?]
    };
    let (mut events, mut unreadable) = (Vec::with_capacity(several.len()), 0);
    for json in several {
        match RawObject::parse(json.get()).ok().and_then(|object| event(&object, reading)) {
            Some(Known::Event(event)) => events.push(event),
            Some(Known::NotOurs) => {}
            None => unreadable += 1,
        }
    }
    Ok((events, unreadable))
}

enum Known {
    Event(Event),
    /// Somebody's own event.
    NotOurs,
}

fn event(object: &RawObject<'_>, reading: &Reading) -> Option<Known> {
    let kind = object.get_str("type")?;
    if let Some(kind) = kind.strip_prefix("worker-") {
        return worker_event(kind, object).map(|event| Known::Event(Event::Worker(event)));
    }
    let Some(kind) = kind.strip_prefix("task-") else { return Some(Known::NotOurs) };
    let Some(said) = said(kind, object, reading) else { return Some(Known::NotOurs) };
    let task_id = task_id(&object.get_str("uuid")?)?;
    let mut about = about_of(object, reading);
    if matches!(said, Said::Progress(_)) && about.project.is_none() {
        about.project = project_in_update(object);
    }
    // What says how a task ended comes from its worker, and says when.
    let at: Option<Timestamp> = moment(object);
    let route = Route::Events;
    Some(Known::Event(Event::Task(Box::new(Report { task_id, route, about, said, at }))))
}

fn worker_event(kind: &str, object: &RawObject<'_>) -> Option<WorkerEvent> {
    let worker = cut(&object.get_str("hostname")?);
    let change = match kind {
        "online" => WorkerChange::Online,
        "offline" => WorkerChange::Offline,
        _ => {
            let every_s = object.get("freq").and_then(|freq| freq.parse().ok()).unwrap_or(2.0);
            WorkerChange::Beats { every_s }
        }
    };
    Some(WorkerEvent { worker, change })
}

fn about_of(object: &RawObject<'_>, reading: &Reading) -> About {
    let mut about = about(object);
    let (args, kwargs) = (object.get_str("args"), object.get_str("kwargs"));
    about.project =
        reading.projects.in_representation(about.name.as_deref(), args.as_deref(), kwargs.as_deref());
    about.worker = object.get_str("hostname").map(|worker| cut(&worker));
    about
}

/// `None`: it is somebody's own event.
fn said(kind: &str, object: &RawObject<'_>, reading: &Reading) -> Option<Said> {
    let is = |field| object.get(field) == Some("true");
    let failed = |reason, error: &str, traceback| {
        let failure = Failure { reason, error: cut(error), traceback };
        Said::Ended(End::Failed(failure))
    };
    Some(match kind {
        "sent" | "received" => Said::Known,
        // The process that it names is the worker's, not the one that runs the task.
        "started" => Said::Started { pid: None },
        "progress" => Said::Progress(reading.update("PROGRESS", Some(&own_fields(object)))),
        "succeeded" => {
            let result = object.get_str("result").and_then(|text| reading.result_text(&text));
            Said::Ended(End::Completed { result, is_repr: true })
        }
        "failed" => {
            let error = exception(object);
            let name =
                error.split(['(', ':']).next().unwrap_or_default().rsplit('.').next().unwrap_or_default();
            failed(Reason::of_exception(name), &error, reading.traceback(object.get_str("traceback")))
        }
        "retried" | "cancelled" => Said::Retrying { error: cut(&exception(object)) },
        "revoked" if is("expired") => failed(Reason::Expired, "the task expired before it began", None),
        "revoked" if is("terminated") => failed(Reason::Revoked, "the task was terminated", None),
        "revoked" => failed(Reason::Revoked, "the task was revoked before it began", None),
        // Its message was put back, and it is received again.
        "rejected" if is("requeue") => Said::Known,
        "rejected" => failed(Reason::Rejected, "the task was rejected", None),
        _ => return None,
    })
}

/// The exception of an event, as Python's text for it. Where Celery could not write it, the traceback's last line says the same.
fn exception(object: &RawObject<'_>) -> String {
    let exception = object.get_str("exception").filter(|text| !text.starts_with("ExceptionWithTraceback("));
    let traceback = || {
        let traceback = object.get_str("traceback")?;
        traceback.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    };
    let unknown = || "no reason was given".to_owned();
    exception.map(std::borrow::Cow::into_owned).or_else(traceback).unwrap_or_else(unknown)
}

/// What a task's own code has put into an event of its own.
fn own_fields(object: &RawObject<'_>) -> String {
    const OF_CELERY: [&str; 7] = ["hostname", "utcoffset", "pid", "clock", "uuid", "timestamp", "type"];
    let own = object.members().iter().filter(|member| !OF_CELERY.contains(&&*member.key));
    let fields: Vec<_> =
        own.map(|member| format!("{}:{}", serde_json::Value::from(&*member.key), member.value)).collect();
    format!("{{{}}}", fields.join(","))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::reading::tests::reading, *};

    fn envelope(body: &Value) -> Vec<u8> {
        let body = STANDARD.encode(body.to_string());
        json!({"body": body, "content-encoding": "utf-8", "content-type": "application/json",
            "headers": {"hostname": "w1@lab"}, "properties": {"body_encoding": "base64"}})
        .to_string()
        .into_bytes()
    }

    fn task(event: &Value) -> Report {
        let (mut events, unreadable) = read(&envelope(event), &reading()).expect("it can be read");
        assert_eq!(unreadable, 0);
        match events.pop() {
            Some(Event::Task(report)) => *report,
            other => panic!("{event}: {other:?}"),
        }
    }

    #[test]
    fn several_events_come_in_one_message_and_one_that_cannot_be_read_takes_no_other_with_it() {
        let several = json!([
            {"type": "task-received", "uuid": "t1", "name": "app.progress", "kwargs": "{'n': 3, 'project_id': 'p-1'}", "retries": 1, "root_id": "r", "parent_id": null, "timestamp": 1_795_394_141.286},
            {"type": "task-started"},
            {"type": "worker-heartbeat", "hostname": "w1@lab", "freq": 2.0},
            {"type": "worker-offline", "hostname": "w1@lab"},
            {"type": "my-own", "uuid": "t1"},
            {"type": "task-thing", "uuid": "t1"},
            7,
        ]);
        let (events, unreadable) = read(&envelope(&several), &reading()).expect("it can be read");
        assert_eq!((events.len(), unreadable), (3, 2));
        let Event::Task(received) = &events[0] else { panic!("{:?}", events[0]) };
        assert_eq!((&received.said, received.about.retries), (&Said::Known, Some(1)));
        assert_eq!(received.about.root.as_deref(), Some("r"));
        assert_eq!(received.at.map(|at| at.to_string()).as_deref(), Some("2026-11-23T00:35:41.286000Z"));
        let beats = WorkerChange::Beats { every_s: 2.0 };
        assert!(matches!(&events[1], Event::Worker(event) if event.change == beats));
        assert!(matches!(&events[2], Event::Worker(event) if event.change == WorkerChange::Offline));
    }

    #[test]
    fn what_says_how_a_task_ended_has_its_reason() {
        let end = |event: Value| match task(&event).said {
            Said::Ended(End::Failed(failure)) => (failure.reason.as_str(), failure.error.into_string()),
            other => panic!("{event}: {other:?}"),
        };
        let failed = |exception: &str, traceback: &str| {
            end(json!({"type": "task-failed", "uuid": "t", "exception": exception, "traceback": traceback}))
        };
        assert_eq!(failed("ValueError('boom')", "T"), ("error", "ValueError('boom')".to_owned()));
        assert_eq!(
            failed(
                "ExceptionWithTraceback()",
                "Traceback\n  x\nbilliard.exceptions.TimeLimitExceeded: TimeLimitExceeded(2,)\n"
            ),
            ("time_limit", "billiard.exceptions.TimeLimitExceeded: TimeLimitExceeded(2,)".to_owned())
        );
        assert_eq!(failed("WorkerLostError('signal 9')", "T").0, "worker_lost");
        let revoked = |terminated, expired| {
            end(json!({"type": "task-revoked", "uuid": "t", "terminated": terminated, "expired": expired, "signum": 15})).0
        };
        assert_eq!((revoked(true, false), revoked(false, true)), ("revoked", "expired"));
        assert_eq!(end(json!({"type": "task-rejected", "uuid": "t", "requeue": false})).0, "rejected");
        assert_eq!(task(&json!({"type": "task-rejected", "uuid": "t", "requeue": true})).said, Said::Known);
    }

    #[test]
    fn an_event_of_a_tasks_own_is_an_update_with_its_fields() {
        let report = task(
            &json!({"hostname": "w1@lab", "utcoffset": 0.0, "pid": 1, "clock": 1, "uuid": "t", "current": 1,
            "total": 2, "message": "hé", "project_id": "p-1", "timestamp": 1.0, "type": "task-progress"}),
        );
        let Said::Progress(progress) = report.said else { panic!("{:?}", report.said) };
        assert_eq!(
            (
                progress.current.total_cmp(&1.0).is_eq(),
                progress.total.total_cmp(&2.0).is_eq(),
                progress.message.as_deref()
            ),
            (true, true, Some("hé"))
        );
        assert_eq!(progress.metadata, None);
        assert!(report.about.project.is_some());
    }

    #[test]
    fn what_is_not_json_is_not_read_and_never_unpickled() {
        let pickled = json!({"body": "gASVBQ==", "content-type": "application/x-python-serialize", "properties": {"body_encoding": "base64"}});
        for (payload, expected) in [
            (pickled.to_string(), Unreadable::ContentType),
            (json!({"body": "%%", "content-type": "application/json", "properties": {"body_encoding": "base64"}}).to_string(), Unreadable::Body),
            (json!({"body": "{x", "content-type": "application/json", "properties": {}}).to_string(), Unreadable::Body),
            ("7".to_owned(), Unreadable::Envelope),
            (String::new(), Unreadable::Envelope),
        ] {
            assert_eq!(read(payload.as_bytes(), &reading()).err(), Some(expected), "{payload}");
        }
    }
}
