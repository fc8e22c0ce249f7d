//! `GET /ws`: the handshake (RFC 6455, section 4.2). Behind it the socket belongs to a shard.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tidings_engine::{driver::ShardHandle, wire};
use tidings_protocol::SUBPROTOCOL;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{Edge, problem::Problem};

pub(super) async fn upgrade(
    State(edge): State<Arc<Edge>>,
    Extension(shard): Extension<ShardHandle>,
    mut request: Request,
) -> Result<Response, Problem> {
    edge.admit(request.headers())?;
    let Some((accept_key, upgrade)) = handshake(&mut request) else {
        edge.metrics.refused("not_a_websocket");
        return Ok(not_a_websocket());
    };
    let headers = request.headers();
    let extension = edge.settings.deflate.then(|| agreed_extension(headers)).flatten();
    let deflate = extension.is_some();
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let answer = response.headers_mut();
    answer.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(header::SEC_WEBSOCKET_ACCEPT, accept_key);
    if offers(headers, &header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL) {
        answer.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    }
    if let Some(extension) = extension {
        answer.insert(header::SEC_WEBSOCKET_EXTENSIONS, extension);
    }
    edge.tasks.spawn(async move {
        match upgrade.await.map_err(|error| error.to_string()).and_then(socket_of) {
            Ok((socket, leftover)) => shard.open_websocket(socket, leftover, deflate),
            // The peer has gone before it had the answer.
            Err(error) => tracing::debug!(error, "upgrade"),
        }
    });
    Ok(response)
}

/// The accept key and the way to the socket, if the request is a WebSocket's.
fn handshake(request: &mut Request) -> Option<(HeaderValue, OnUpgrade)> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.as_bytes();
    let is_websocket = offers(headers, &header::CONNECTION, "upgrade")
        && offers(headers, &header::UPGRADE, "websocket")
        && headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13")
        // 16 bytes in base64.
        && key.len() == 24;
    let accept_key = HeaderValue::try_from(derive_accept_key(key)).ok()?;
    upgrade.filter(|_| is_websocket).map(|upgrade| (accept_key, upgrade))
}

/// Whether a header's comma-separated list holds the word, in any case.
fn offers(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|offered| offered.trim().eq_ignore_ascii_case(word))
}

fn agreed_extension(headers: &HeaderMap) -> Option<HeaderValue> {
    let offers =
        headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter().filter_map(|value| value.to_str().ok());
    let agreed = wire::negotiate(&offers.collect::<Vec<_>>().join(","))?;
    HeaderValue::try_from(agreed).ok()
}

/// The bare socket of a connection, and what had been read of it behind the handshake. The library's buffers end here.
fn socket_of(upgraded: Upgraded) -> Result<(std::net::TcpStream, bytes::Bytes), String> {
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().map_err(|_| "no TCP connection".to_owned())?;
    let socket = parts.io.into_inner().into_std().map_err(|error| error.to_string())?;
    Ok((socket, parts.read_buf))
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
