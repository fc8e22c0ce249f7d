//! `GET /metrics`: Prometheus text.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};

use super::{Edge, problem::Problem};

/// On the public listener: with the admin key, or open in development.
pub(super) async fn public(State(edge): State<Arc<Edge>>, headers: HeaderMap) -> Result<Response, Problem> {
    edge.access.may_read_metrics(&headers).map_err(|refusal| edge.denied(&refusal))?;
    Ok(render(&edge))
}

/// On the internal listener: open.
pub(super) async fn internal(State(edge): State<Arc<Edge>>) -> Response {
    render(&edge)
}

fn render(edge: &Edge) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], edge.metrics.render()).into_response()
}
