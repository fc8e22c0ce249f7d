//! `POST /api/events`: publish.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{json, value::RawValue};
use tidings_protocol::{Event, EventId};

use super::{
    Edge, body, peer_of,
    problem::{ItemError, Problem},
};
use crate::{config::Scope, keys::Key, metrics::EventSource};

/// The largest body of a request.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Events in one request.
const EVENTS_MAX: usize = 1000;
/// Errors told of one request: who has more has made the same mistake more often.
const ERRORS_MAX: usize = 100;
/// An `Idempotency-Key` has to leave room for the prefix and the index in an event's id.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 150;

pub(super) async fn publish(
    State(edge): State<Arc<Edge>>,
    Publisher(key): Publisher,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = match body::read(body, BODY_BYTES_MAX).await {
        Ok(body) => body,
        Err(problem) => {
            edge.request_refused(problem.code().unwrap_or("body"), Some(&key));
            return Err(problem);
        }
    };
    let idempotency_key = idempotency_key(&headers)?;
    let mut events = read(&edge, &headers, &body)?;
    check_scope(&edge, &key, &events)?;
    key.take(events.len()).map_err(|wait| {
        edge.request_refused("rate_limited", Some(&key));
        Problem::too_fast(wait)
    })?;
    if let Some(key) = idempotency_key {
        for (index, event) in events.iter_mut().enumerate() {
            let id = format!("idempotency:{key}:{index}");
            event.assign_id(EventId::try_from(id.as_str()).expect("the key's length leaves room"));
        }
    }
    let appended = edge.ingest.append(EventSource::Http, events).await;
    let appended = appended.map_err(|error| edge.unavailable(&error))?;
    let places: Vec<_> = appended
        .iter()
        .map(|appended| {
            let project_id = appended.stream.project_id();
            json!({"project_id": project_id, "epoch": appended.position.epoch, "offset": appended.position.offset})
        })
        .collect();
    Ok((StatusCode::ACCEPTED, Json(json!({"accepted": places.len(), "events": places}))).into_response())
}

/// Whoever may publish. Stands before the body among the arguments: a stranger's 16 MiB are not read at all.
pub(super) struct Publisher(Arc<Key>);

impl FromRequestParts<Arc<Edge>> for Publisher {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, edge: &Arc<Edge>) -> Result<Self, Problem> {
        edge.key(&parts.headers, peer_of(&parts.extensions), Scope::Publish).map(Self)
    }
}

/// Whether all events are within what the key may publish; else what is wrong with each that is not.
fn check_scope(edge: &Edge, key: &Key, events: &[Event]) -> Result<(), Problem> {
    let outside = events.iter().enumerate().flat_map(|(index, event)| {
        key.outside(event).map(move |outside| ItemError {
            index,
            field: Some(outside.field().to_owned()),
            message: outside.message().to_owned(),
        })
    });
    let errors: Vec<_> = outside.take(ERRORS_MAX).collect();
    if errors.is_empty() {
        return Ok(());
    }
    edge.request_refused("scope", Some(key));
    let list = |entries: Vec<String>| if entries.is_empty() { "*".to_owned() } else { entries.join(", ") };
    let detail = format!(
        "the key `{}` may publish to projects {} and types {}; widen its `projects` or `types`, or use another key",
        key.name(),
        list(key.projects().entries().map(str::to_owned).collect()),
        list(key.types().patterns().collect()),
    );
    Err(Problem::outside(&detail, edge.is_development(), errors))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= IDEMPOTENCY_KEY_BYTES_MAX);
    key.map(Some).ok_or_else(|| {
        let detail =
            format!("Idempotency-Key: expected 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible ASCII characters");
        Problem::new(StatusCode::BAD_REQUEST, detail)
    })
}

/// Reads all events, or says what is wrong with each that is.
fn read(edge: &Edge, headers: &HeaderMap, body: &[u8]) -> Result<Vec<Event>, Problem> {
    let items = split(body, is_ndjson(headers))
        .map_err(|message| Problem::invalid_events(vec![ItemError { index: 0, field: None, message }]))?;
    if items.is_empty() || items.len() > EVENTS_MAX {
        let message = format!("expected 1 to {EVENTS_MAX} events in one request, found {}", items.len());
        return Err(Problem::invalid_events(vec![ItemError { index: 0, field: None, message }]));
    }
    let mut events = Vec::with_capacity(items.len());
    let mut errors = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        match edge.ingest.read(EventSource::Http, item) {
            Ok(event) => events.push(event),
            Err(invalid) if errors.len() < ERRORS_MAX => {
                errors.push(ItemError { index, field: invalid.field, message: invalid.message });
            }
            Err(_) => {}
        }
    }
    if errors.is_empty() { Ok(events) } else { Err(Problem::invalid_events(errors)) }
}

fn is_ndjson(headers: &HeaderMap) -> bool {
    let content_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    content_type.contains("ndjson") || content_type.contains("jsonl")
}

/// The events of a body: the items of an array, the lines of NDJSON, or the one object that it is.
fn split(body: &[u8], ndjson: bool) -> Result<Vec<&[u8]>, String> {
    let body = body.trim_ascii();
    match body.first() {
        _ if ndjson => Ok(lines(body)),
        Some(b'[') => {
            let items: Result<Vec<&RawValue>, _> = serde_json::from_slice(body);
            let items = items.map_err(|error| format!("not JSON: {error}"))?;
            Ok(items.into_iter().map(|item| item.get().as_bytes()).collect())
        }
        Some(b'{') if serde_json::from_slice::<&RawValue>(body).is_ok() => Ok(vec![body]),
        // Several lines that are no JSON together are NDJSON; a single one is a mistake that its own reader explains.
        Some(_) => Ok(lines(body)),
        None => Err("expected an event, an array of events or NDJSON, found an empty body".to_owned()),
    }
}

fn lines(body: &[u8]) -> Vec<&[u8]> {
    body.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()).collect()
}
