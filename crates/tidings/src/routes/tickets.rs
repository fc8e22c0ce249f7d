//! `POST /api/tickets`: a ticket to connect with where nothing else can be shown, for whoever is logged in; or, for a key of scope
//! `tickets`, for whomever it names.

use std::sync::Arc;

use axum::{
    Json,
    body::HttpBody as _,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tidings_protocol::Projects;

use super::{Edge, body, peer_of, problem::Problem};
use crate::{
    auth::{self, Refusal, TICKET_GOOD_FOR},
    config::Scope,
};

/// Somebody whom an application names.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Somebody {
    user_id: Value,
    projects: Option<Value>,
    expires_at: Option<Value>,
    #[serde(default)]
    admin: bool,
}

/// On the public listener.
pub(super) async fn give(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, Problem> {
    check_way(&edge)?;
    if !request.body().is_end_stream() && edge.settings.internal_listen.is_none() {
        return give_to_named(&edge, request).await;
    }
    // Another site's page must not get one for its visitor.
    edge.check_origin(request.headers())?;
    let session = edge.authenticate(request.headers(), false).await;
    let session = session.map_err(|refusal| edge.problem_of(&refusal))?;
    answer(&edge, edge.auth.ticket_for(session.as_ref()).await)
}

fn check_way(edge: &Edge) -> Result<(), Problem> {
    if edge.auth.takes_tickets() {
        return Ok(());
    }
    let detail = "a ticket would let nobody in: TIDINGS_AUTH has no `ticket`";
    Err(Problem::denied(StatusCode::CONFLICT, "no_ticket_way", detail, edge.is_development()))
}

/// On the internal listener, where nobody has a session.
pub(super) async fn give_internal(
    State(edge): State<Arc<Edge>>,
    request: Request,
) -> Result<Response, Problem> {
    check_way(&edge)?;
    give_to_named(&edge, request).await
}

async fn give_to_named(edge: &Edge, request: Request) -> Result<Response, Problem> {
    let key = edge.key(request.headers(), peer_of(request.extensions()), Scope::Tickets)?;
    let expected = r#"{"user_id", "projects", "expires_at"?, "admin"?}"#;
    let somebody = body::read_json::<Somebody>(request.into_body(), expected).await?;
    let bad = |what: String| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, what);
    let user = auth::user(&somebody.user_id).map_err(|what| bad(format!("user_id: {what}")))?;
    let projects =
        Projects::read(somebody.projects.as_ref()).map_err(|what| bad(format!("projects: {what}")))?;
    let expires_at = somebody.expires_at.as_ref().map(auth::moment).transpose();
    let expires_at = expires_at.map_err(|what| bad(format!("expires_at: {what}")))?;
    // A key gives no more than it has.
    if !key.projects().include_all(&projects) || (somebody.admin && !key.is_admin()) {
        edge.request_refused("scope", Some(&key));
        let detail = "the key may not give rights to these projects; see its `projects`, and the admin key for `admin`";
        return Err(Problem::denied(StatusCode::FORBIDDEN, "scope", detail, edge.is_development()));
    }
    answer(edge, edge.auth.ticket_of(user, projects, somebody.admin, expires_at).await)
}

fn answer(edge: &Edge, ticket: Result<String, Refusal>) -> Result<Response, Problem> {
    let ticket = ticket.map_err(|refusal| edge.problem_of(&refusal))?;
    let answer = Json(json!({"ticket": ticket, "expires_in": TICKET_GOOD_FOR.as_secs()}));
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], answer).into_response())
}
