//! `POST /api/revoke`: ends a session, or whatever a user was given, at once and on all nodes.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::Value;

use super::{Edge, body, peer_of, problem::Problem};
use crate::{auth, config::Scope};

/// One of the two.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Whom {
    user_id: Option<Value>,
    session: Option<String>,
}

pub(super) async fn revoke(State(edge): State<Arc<Edge>>, request: Request) -> Result<StatusCode, Problem> {
    edge.key(request.headers(), peer_of(request.extensions()), Scope::Revoke)?;
    if edge.auth.is_none() {
        let detail = "with TIDINGS_AUTH=none nobody has a session that could end";
        return Err(Problem::denied(StatusCode::CONFLICT, "no_auth", detail, edge.is_development()));
    }
    let whom = body::read_json::<Whom>(request.into_body(), r#"{"user_id"} or {"session"}"#).await?;
    let bad = |detail: String| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail);
    let revoked = match (whom.user_id, whom.session) {
        (Some(user), None) => {
            let user = auth::user(&user).map_err(|what| bad(format!("user_id: {what}")))?;
            edge.auth.revoke_user(user).await
        }
        (None, Some(session)) if !session.is_empty() => edge.auth.revoke_session(&session).await,
        _ => return Err(bad("expected one of `user_id` and `session`".to_owned())),
    };
    revoked.map_err(|error| {
        tracing::warn!(error, "nothing was revoked");
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "nothing was revoked, because it cannot be kept; try again",
        )
    })?;
    Ok(StatusCode::NO_CONTENT)
}
