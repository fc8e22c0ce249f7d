//! `GET /api/doctor`: what `tidings doctor` shows of a service that runs. For the operator.

use std::sync::Arc;

use axum::{Json, extract::State, http::HeaderMap};
use serde_json::{Value, json};

use super::{Edge, problem::Problem};

/// On the public listener: with the admin key, or open in development.
pub(super) async fn public(
    State(edge): State<Arc<Edge>>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    edge.access.may_read_metrics(&headers).map_err(|refusal| edge.denied(&refusal))?;
    Ok(report(&edge))
}

/// On the internal listener: open.
pub(super) async fn internal(State(edge): State<Arc<Edge>>) -> Json<Value> {
    report(&edge)
}

fn report(edge: &Edge) -> Json<Value> {
    let parts = edge.node.vigil().parts();
    let parts: Vec<_> =
        parts.into_iter().map(|part| json!({"part": &*part.name, "heard": part.is_heard})).collect();
    let celery = edge.celery.as_ref().map(|status| status.lock().clone());
    Json(json!({
        "node": edge.node.name(),
        "version": env!("CARGO_PKG_VERSION"),
        "appends": edge.node.engine().failing().is_none(),
        "troubles": edge.auth.troubles(),
        "parts": parts,
        "celery": celery,
    }))
}
