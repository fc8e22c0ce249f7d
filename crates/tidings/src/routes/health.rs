//! Health: what a person asks, what Kubernetes asks.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    Json,
    extract::{RawQuery, State},
    http::StatusCode,
};
use serde_json::{Value, json};
use tidings_protocol::{Source, Timestamp};

use super::Edge;

/// `GET /health/websocket`: always 200 while it can answer.
pub(super) async fn websocket(State(edge): State<Arc<Edge>>) -> Json<Value> {
    let silent = edge.node.vigil().silent();
    let degraded =
        !silent.is_empty() || !edge.auth.troubles().is_empty() || edge.node.engine().failing().is_some();
    let status = match (edge.is_draining(), degraded) {
        (true, _) => "draining",
        (false, true) => "degraded",
        (false, false) => "healthy",
    };
    Json(json!({
        "status": status,
        "active_connections": edge.node.counts().connections,
        "redis_connected": edge.settings.redis.is_some() && silent.is_empty(),
        "timestamp": Timestamp::from(jiff::Timestamp::now()),
        "node": edge.node.name(),
        "restarted": edge.settings.restarted,
    }))
}

/// `GET /livez`: fails only when the process is stuck, and then by not answering.
pub(super) async fn live(RawQuery(query): RawQuery) -> (StatusCode, String) {
    report(query.as_deref(), &[("answers".to_owned(), true)])
}

/// `GET /readyz`: fails at once when the node drains or events cannot flow. To everybody without the addresses of what is
/// behind the service, but to its developer.
pub(super) async fn ready(State(edge): State<Arc<Edge>>, RawQuery(query): RawQuery) -> (StatusCode, String) {
    readiness(&edge, query.as_deref(), edge.is_development())
}

/// The same on the internal listener, with addresses.
pub(super) async fn ready_internal(
    State(edge): State<Arc<Edge>>,
    RawQuery(query): RawQuery,
) -> (StatusCode, String) {
    readiness(&edge, query.as_deref(), true)
}

fn readiness(edge: &Edge, query: Option<&str>, addresses: bool) -> (StatusCode, String) {
    let appends = edge.node.engine().failing().is_none();
    let mut checks = vec![
        ("not draining".to_owned(), !edge.is_draining()),
        ("events can be appended".to_owned(), appends),
    ];
    let parts = edge.node.vigil().parts();
    // Without Redis nothing comes through; without Celery or a folder the rest does, and no other node is better off.
    let (vital, others): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| part.source == Source::Redis);
    checks.extend(vital.into_iter().map(|part| {
        let plain = part.name.split(" at ").next().filter(|_| !addresses).unwrap_or(&part.name);
        (format!("{plain} is heard"), part.is_heard)
    }));
    let silent = others.iter().filter(|part| !part.is_heard);
    let silent = silent.map(|part| format!("[!] {} cannot be heard", part.name));
    // Whoever is connected is served meanwhile, and another node would ask the same.
    let (status, text) = report(query, &checks);
    let troubles = edge.auth.troubles().into_iter().map(|trouble| format!("[!] {trouble}"));
    (status, troubles.chain(silent).chain([text]).collect::<Vec<_>>().join("\n"))
}

fn report(query: Option<&str>, checks: &[(String, bool)]) -> (StatusCode, String) {
    let passed = checks.iter().all(|(_, passed)| *passed);
    let verbose =
        query.is_some_and(|query| query.split('&').any(|part| part.split('=').next() == Some("verbose")));
    let mut text = String::new();
    for (name, passed) in checks.iter().filter(|(_, passed)| verbose || !passed) {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "[{}] {name}", if *passed { '+' } else { '-' });
    }
    text.push_str(if passed { "ok\n" } else { "failed\n" });
    (if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}
