//! `GET /api/projects/{project_id}/events`: the kept history.

use std::sync::Arc;

use axum::{
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tidings_engine::engine::{HistoryPage, PageLimit};
use tidings_protocol::{Audience, Epoch, Offset, Position, StreamId};

use super::{Edge, problem::Problem};

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;

#[derive(Deserialize)]
pub(super) struct Parameters {
    since_epoch: Option<String>,
    since_offset: Option<Offset>,
    limit: Option<usize>,
}

pub(super) async fn list(
    State(edge): State<Arc<Edge>>,
    headers: HeaderMap,
    project_id: Result<Path<String>, PathRejection>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Response, Problem> {
    edge.check_origin(&headers)?;
    let bad = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
    let Path(project_id) =
        project_id.map_err(|_| bad("project_id: expected UTF-8, percent-encoded".to_owned()))?;
    let Query(parameters) = parameters.map_err(|error| bad(error.body_text()))?;
    let stream =
        StreamId::try_from(project_id.as_str()).map_err(|error| bad(format!("project_id: {error}")))?;
    let limit = parameters.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(bad(format!("limit: expected 1 to {LIMIT_MAX}")));
    }
    let since = match (parameters.since_epoch, parameters.since_offset) {
        (Some(epoch), Some(offset)) => Some(Position { epoch: Epoch::new(epoch), offset }),
        (None, None) => None,
        _ => return Err(bad("expected both of since_epoch and since_offset, or none".to_owned())),
    };
    let session = edge.authenticate(&headers, false).await.map_err(|refusal| edge.problem_of(&refusal))?;
    if let Some(project) = stream.project_id() {
        edge.check_rights(session.as_ref(), project)?;
    }
    let limit = PageLimit { records: limit, bytes: usize::MAX, folded: false };
    let page = edge.node.engine().history(&stream, since.as_ref(), limit).await;
    let mut page = page.map_err(|error| edge.unavailable(&error))?;
    if let Some(session) = session {
        // The announcements speak of projects that are not everybody's.
        let projects = session.projects();
        let may_see = |audience: &Audience| projects.include_audience(audience);
        page.records.retain(|record| record.audience.as_deref().is_none_or(may_see));
    }
    Ok(([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], encode(&page))
        .into_response())
}

/// Joined as bytes: the events are JSON already.
fn encode(page: &HistoryPage) -> Vec<u8> {
    let HistoryPage { position, complete, records, more: _ } = page;
    let bytes: usize = records.iter().map(|record| record.json().len() + 1).sum();
    let mut json = Vec::with_capacity(bytes + 128);
    let epoch = serde_json::Value::from(position.epoch.as_str());
    json.extend(
        format!(r#"{{"epoch":{epoch},"offset":{},"complete":{complete},"events":["#, position.offset).bytes(),
    );
    for (index, record) in records.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        json.extend_from_slice(record.json());
    }
    json.extend_from_slice(b"]}");
    json
}
