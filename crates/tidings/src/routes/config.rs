//! `GET /api/config`: what a page needs to connect.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::Edge;

pub(super) async fn show(State(edge): State<Arc<Edge>>) -> Json<Value> {
    Json(json!({
        "websocket_url": edge.settings.websocket_url(Some(edge.port)),
        "protocol": tidings_protocol::PROTOCOL_VERSION,
        "heartbeat_interval": edge.settings.heartbeat_interval.as_secs(),
        "environment": edge.settings.environment.as_str(),
    }))
}
