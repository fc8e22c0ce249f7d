//! `GET /ws`: who may connect. Behind the handshake the socket belongs to a shard.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use tidings_engine::driver::ShardHandle;

use super::{Edge, peer_of, problem::Problem, retry_after_s};
use crate::{
    admission::Refused,
    handshake::{Handshake, turn_away},
};

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
    let guard = match edge.admit(request.headers(), peer_of(request.extensions())) {
        Ok(guard) => guard,
        Err(refused) => return refuse(&edge, handshake, refused),
    };
    let deflate = handshake.deflate;
    let (response, socket) = handshake.split();
    edge.tasks.spawn(async move {
        match socket.await {
            Ok((socket, leftover)) => shard.open_websocket(socket, leftover, deflate, guard),
            // The peer has gone before it had the answer.
            Err(error) => tracing::debug!(error, "upgrade"),
        }
    });
    Ok(response)
}

/// Says that there is no room. Who speaks our protocol is let in to be told, because a browser shows a page no HTTP status; not
/// many at once, because each of them is a connection.
fn refuse(edge: &Edge, handshake: Handshake, refused: Refused) -> Result<Response, Problem> {
    let retry_after_s = retry_after_s();
    let place = Arc::clone(&edge.turning_away).try_acquire_owned();
    let Some(place) = place.ok().filter(|_| handshake.speaks_tidings) else {
        return Err(Problem::refused(refused, retry_after_s));
    };
    let (response, socket) = handshake.split();
    edge.tasks.spawn(async move {
        let code = refused.close_code();
        let reason = format!("{}; retry in {retry_after_s} s", code.reason());
        if let Ok((socket, _)) = socket.await {
            turn_away(socket, code, &reason).await;
        }
        drop(place);
    });
    Ok(response)
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
