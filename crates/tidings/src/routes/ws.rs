//! `GET /ws`: who may connect. Behind the handshake the socket belongs to a shard.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use tidings_engine::driver::ShardHandle;

use super::{Edge, problem::Problem};
use crate::handshake::Handshake;

pub(super) async fn upgrade(
    State(edge): State<Arc<Edge>>,
    Extension(shard): Extension<ShardHandle>,
    mut request: Request,
) -> Result<Response, Problem> {
    edge.admit(request.headers())?;
    let Some(handshake) = Handshake::of(&mut request, edge.settings.deflate) else {
        edge.metrics.refused("not_a_websocket");
        return Ok(not_a_websocket());
    };
    let deflate = handshake.deflate;
    let (response, socket) = handshake.split();
    edge.tasks.spawn(async move {
        match socket.await {
            Ok((socket, leftover)) => shard.open_websocket(socket, leftover, deflate),
            // The peer has gone before it had the answer.
            Err(error) => tracing::debug!(error, "upgrade"),
        }
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
