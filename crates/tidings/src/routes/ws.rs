//! `GET /ws`: who may connect. Behind the handshake the socket belongs to a shard.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use tidings_engine::driver::{Guard, ShardHandle};
use tidings_protocol::CloseCode;

use super::{Edge, peer_of, problem::Problem, retry_after_s};
use crate::{admission::Refused, auth::Refusal, handshake::Handshake};

/// What a close frame has room for (RFC 6455, section 5.5).
const CLOSE_REASON_BYTES_MAX: usize = 123;

pub(super) async fn upgrade(
    State(edge): State<Arc<Edge>>,
    Extension(shard): Extension<ShardHandle>,
    mut request: Request,
) -> Result<Response, Problem> {
    edge.check_origin(request.headers())?;
    let Some(handshake) = Handshake::of(&mut request, edge.settings.deflate) else {
        edge.metrics.refused("not_a_websocket");
        return Ok(not_a_websocket());
    };
    let admitted = match edge.admit(request.headers(), peer_of(request.extensions())) {
        Ok(admitted) => admitted,
        Err(refused) => return no_room(&edge, handshake, refused),
    };
    let session = match edge.authenticate(request.headers(), true).await {
        Ok(session) => session.map(Arc::new),
        Err(refusal) => return nobody(&edge, handshake, &refusal),
    };
    let guard: Guard = match &session {
        None => admitted,
        Some(session) => match edge.admission.admit_user(session.user()) {
            Ok(user) => Box::new((admitted, user, Arc::clone(session))),
            Err(refused) => {
                edge.count_refused(refused);
                return no_room(&edge, handshake, refused);
            }
        },
    };
    let deflate = handshake.deflate;
    let (response, upgrading) = handshake.split();
    edge.tasks.spawn(async move {
        match upgrading.transport().await {
            Ok((transport, leftover)) => match &session {
                None => shard.open_websocket(transport, leftover, deflate, guard, None),
                Some(session) => session.connect(&shard, |holder| {
                    shard.open_websocket(transport, leftover, deflate, guard, Some(holder));
                }),
            },
            // The peer has gone before it had the answer.
            Err(error) => tracing::debug!(error, "upgrade"),
        }
    });
    Ok(response)
}

fn no_room(edge: &Edge, handshake: Handshake, refused: Refused) -> Result<Response, Problem> {
    let (retry_after_s, code) = (retry_after_s(), refused.close_code());
    let reason = format!("{}; retry in {retry_after_s} s", code.reason());
    refuse(edge, handshake, code, reason, Problem::refused(refused, retry_after_s))
}

fn nobody(edge: &Edge, handshake: Handshake, refusal: &Refusal) -> Result<Response, Problem> {
    let problem = edge.problem_of(refusal);
    let (code, reason) = match refusal {
        Refusal::Denied(denied) if edge.is_development() => (CloseCode::NoSession, denied.detail.clone()),
        Refusal::Denied(denied) => (CloseCode::NoSession, denied.code.to_owned()),
        Refusal::NoVerdict(_) | Refusal::Unreadable(_) => {
            (CloseCode::TryAgainLater, super::NO_VERDICT.to_owned())
        }
    };
    refuse(edge, handshake, code, reason, problem)
}

/// Says no. Who speaks our protocol is let in to be told, because a browser shows a page no HTTP status; not many at once,
/// because each of them is a connection.
fn refuse(
    edge: &Edge,
    handshake: Handshake,
    code: CloseCode,
    reason: String,
    problem: Problem,
) -> Result<Response, Problem> {
    let place = Arc::clone(&edge.turning_away).try_acquire_owned();
    let Some(place) = place.ok().filter(|_| handshake.speaks_tidings) else {
        return Err(problem);
    };
    let (response, upgrading) = handshake.split();
    edge.tasks.spawn(async move {
        upgrading.turn_away(code, cut(&reason)).await;
        drop(place);
    });
    Ok(response)
}

/// As much of a reason as a close frame has room for.
fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(CLOSE_REASON_BYTES_MAX)]
}

fn not_a_websocket() -> Response {
    let detail = "this path is a WebSocket; connect with a WebSocket client (version 13)";
    let mut response = Problem::new(StatusCode::UPGRADE_REQUIRED, detail).into_response();
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    response
}
