//! `GET /schema/NAME.json`: the generated JSON Schemas.

use std::sync::LazyLock;

use axum::{
    extract::Path,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use tidings_protocol::schema;

use super::problem::Problem;

/// Made once: they depend on nothing but this program.
static SCHEMAS: LazyLock<Vec<(String, String)>> = LazyLock::new(|| {
    schema::all().into_iter().map(|(name, schema)| (format!("{name}.json"), schema.to_string())).collect()
});

pub(super) async fn show(Path(file): Path<String>) -> Result<Response, Problem> {
    let Some((_, schema)) = SCHEMAS.iter().find(|(name, _)| *name == file) else {
        let names: Vec<_> = SCHEMAS.iter().map(|(name, _)| name.as_str()).collect();
        return Err(Problem::new(StatusCode::NOT_FOUND, format!("the schemas are {}", names.join(", "))));
    };
    Ok(([(header::CONTENT_TYPE, "application/schema+json")], schema.as_str()).into_response())
}
