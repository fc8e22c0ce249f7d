//! `POST /api/tickets`: a ticket for whoever is logged in, to connect with where nothing else can be shown.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{Edge, problem::Problem};
use crate::auth::TICKET_GOOD_FOR;

pub(super) async fn give(State(edge): State<Arc<Edge>>, headers: HeaderMap) -> Result<Response, Problem> {
    // Another site's page must not get one for its visitor.
    edge.check_origin(&headers)?;
    let session = edge.authenticate(&headers, false).await.map_err(|refusal| edge.problem_of(&refusal))?;
    let Some(session) = session else {
        let detail = "with TIDINGS_AUTH=none there is nobody to give a ticket to; connect without";
        return Err(Problem::denied(StatusCode::CONFLICT, "no_auth", detail, true));
    };
    let ticket = edge.auth.ticket_for(&session).await.map_err(|refusal| edge.problem_of(&refusal))?;
    let answer = Json(json!({"ticket": ticket, "expires_in": TICKET_GOOD_FOR.as_secs()}));
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], answer).into_response())
}
