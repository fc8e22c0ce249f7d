//! `GET /sse`: a project's messages as Server-Sent Events, for pages and programs that only read.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use axum::{
    Extension,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use tidings_engine::driver::ShardHandle;
use tidings_protocol::{Epoch, InvalidPattern, Position, ProjectId, StreamId, TypeFilter};

use super::{Edge, problem::Problem, retry_after_s};
use crate::{accept::Held, admission::Refused, auth::Refusal};

/// Begins a stream. A browser keeps the last reconnection time that it was told, and the last may have been the appointment of
/// a node that stopped.
const RECONNECTION_TIME: &[u8] = b"retry: 1000\n";

const HEADERS: [(HeaderName, &str); 3] = [
    (header::CONTENT_TYPE, "text/event-stream"),
    (header::CACHE_CONTROL, "no-store"),
    // Asks proxies that would collect a response before they pass it on not to.
    (HeaderName::from_static("x-accel-buffering"), "no"),
];

#[derive(Deserialize)]
pub(super) struct Parameters {
    project_id: String,
    /// Patterns, comma separated.
    types: Option<String>,
}

pub(super) async fn subscribe(
    State(edge): State<Arc<Edge>>,
    Extension(shard): Extension<ShardHandle>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    held: Option<Extension<Held>>,
    headers: HeaderMap,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Response, Problem> {
    edge.check_origin(&headers)?;
    let bad = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
    let Query(parameters) = parameters.map_err(|error| bad(error.body_text()))?;
    let project = ProjectId::try_from(parameters.project_id.as_str());
    let project = project.map_err(|error| bad(format!("project_id: {error}")))?;
    let types = parameters.types.as_deref().map_or(Ok(TypeFilter::everything()), |types| {
        TypeFilter::parse(&types.split(',').map(str::trim).collect::<Vec<_>>())
    });
    let types = types.map_err(|error| {
        // Without the pattern itself: what stands in an address does not come back in an answer.
        let expected = match error {
            InvalidPattern::Malformed(_) => {
                "expected event types, `word.*` or `*`, comma separated".to_owned()
            }
            error => error.to_string(),
        };
        bad(format!("types: {expected}"))
    })?;
    let since = last_event_id(&headers).map_err(|detail| bad(detail.to_owned()))?;
    let admitted = match edge.admit(&headers, peer.ip()) {
        Ok(admitted) => admitted,
        Err(refused) => return refuse(&headers, refused),
    };
    let session = match edge.authenticate(&headers, false).await {
        Ok(session) => session,
        Err(Refusal::NoVerdict(_) | Refusal::Unreadable(_)) if reads_event_streams(&headers) => {
            return Ok(come_back("no verdict"));
        }
        Err(refusal) => return Err(edge.problem_of(&refusal)),
    };
    edge.check_rights(session.as_ref(), &project)?;
    let stream = StreamId::Project(project);
    let events = match session {
        None => shard.open_event_stream(stream, types, since, admitted, None),
        Some(session) => {
            let user = match edge.admission.admit_user(session.user()) {
                Ok(user) => user,
                Err(refused) => {
                    edge.count_refused(refused);
                    return refuse(&headers, refused);
                }
            };
            let session = Arc::new(session);
            let guard = Box::new((admitted, user, Arc::clone(&session)));
            let open = |holder| shard.open_event_stream(stream, types, since, guard, Some(holder));
            session.connect(&shard, open)
        }
    };
    // It counts as a connection from here on. As its last response, because what came behind it would count as nothing.
    if let Some(Extension(held)) = held {
        held.give_back();
    }
    let beginning = stream::iter([Bytes::from_static(RECONNECTION_TIME)]);
    let body = Body::from_stream(beginning.chain(events).map(Ok::<_, Infallible>));
    Ok((HEADERS, [(header::CONNECTION, "close")], body).into_response())
}

/// Says that there is no room. On any status but 200 a browser's `EventSource` gives up for good; after a stream that ends it
/// comes back when it was told to.
fn refuse(headers: &HeaderMap, refused: Refused) -> Result<Response, Problem> {
    if reads_event_streams(headers) {
        return Ok(come_back(refused.detail()));
    }
    Err(Problem::refused(refused, retry_after_s()))
}

fn reads_event_streams(headers: &HeaderMap) -> bool {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accepts.is_some_and(|accepts| accepts.contains("text/event-stream"))
}

/// A stream that ends at once, and says when to come back.
fn come_back(why: &str) -> Response {
    (HEADERS, format!(": {why}\nretry: {}\n\n", retry_after_s() * 1000)).into_response()
}

/// `EPOCH:OFFSET`, as the last event's `id` said. An epoch may hold anything, so the last colon divides.
fn last_event_id(headers: &HeaderMap) -> Result<Option<Position>, &'static str> {
    let Some(value) = headers.get("last-event-id") else { return Ok(None) };
    let position = value.to_str().ok().and_then(|value| value.rsplit_once(':'));
    let position = position.and_then(|(epoch, offset)| Some((epoch, offset.parse().ok()?)));
    let (epoch, offset) =
        position.ok_or("Last-Event-ID: expected EPOCH:OFFSET, as an event's `id` has it")?;
    Ok(Some(Position { epoch: Epoch::new(epoch), offset }))
}
