//! `GET /schema/NAME.json`: the generated JSON Schemas.

use axum::{
    extract::Path,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use tidings_protocol::schema;

use super::problem::Problem;

pub(super) async fn show(Path(file): Path<String>) -> Result<Response, Problem> {
    let schemas = schema::all();
    let found = schemas.iter().find(|(name, _)| file.strip_suffix(".json") == Some(*name));
    let Some((_, schema)) = found else {
        let names: Vec<_> = schemas.iter().map(|(name, _)| format!("{name}.json")).collect();
        return Err(Problem::new(StatusCode::NOT_FOUND, format!("the schemas are {}", names.join(", "))));
    };
    Ok(([(header::CONTENT_TYPE, "application/schema+json")], schema.to_string()).into_response())
}
