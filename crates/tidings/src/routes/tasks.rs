//! `POST /api/tasks/{task_id}`: whoever sends a Celery task says to which project it belongs, before or as he sends it. What is
//! said here stands over everything that is found out otherwise.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State},
    http::StatusCode,
};
use serde::Deserialize;
use tidings_protocol::ProjectId;

use super::{Edge, body, peer_of, problem::Problem};
use crate::{
    config::Scope,
    sources::celery::{Registration, task_id},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Belonging {
    project_id: ProjectId,
    /// For a task that ends before anything was heard of it but its id.
    task_name: Option<Box<str>>,
}

pub(super) async fn register(
    State(edge): State<Arc<Edge>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let key = edge.key(request.headers(), peer_of(request.extensions()), Scope::Publish)?;
    let Some(registrar) = &edge.registrar else {
        let detail = "no Celery is listened to: set TIDINGS_CELERY_BACKEND_URL or TIDINGS_CELERY_BROKER_URL";
        return Err(Problem::denied(StatusCode::CONFLICT, "no_celery", detail, true));
    };
    let expected = r#"{"project_id", "task_name"?}"#;
    let Belonging { project_id, task_name } = body::read_json(request.into_body(), expected).await?;
    if !key.projects().include(&project_id) {
        edge.request_refused("project", Some(&key));
        let detail = format!("the key may not publish to project {project_id}; see its `projects`");
        return Err(Problem::denied(StatusCode::FORBIDDEN, "project", &detail, edge.is_development()));
    }
    let task_id = task_id(&id).ok_or_else(|| {
        let detail = "task_id: expected 1 to 150 bytes without control characters";
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    })?;
    if task_name.as_deref().is_some_and(|name| name.is_empty() || name.len() > 255) {
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "task_name: expected 1 to 255 bytes"));
    }
    let everywhere = key.projects().is_everything();
    registrar.register(Registration { task_id, project_id, task_name, everywhere }).await.map_err(
        |error| {
            tracing::warn!(error, "a task was not registered");
            let detail = "the task was not registered, because that cannot be kept; try again";
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
        },
    )?;
    Ok(StatusCode::ACCEPTED)
}
