//! `GET /console`: a page that shows what happens, made of public routes only.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Redirect},
    routing::get,
};

/// Nothing from elsewhere, nothing inline; sockets to wherever `/api/config` says.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws: wss:; base-uri 'none'; frame-ancestors 'none'";

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let file = |content_type: &'static str, text: &'static str| {
        get(move || async move {
            let headers = [
                (header::CONTENT_TYPE, content_type),
                (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (header::CACHE_CONTROL, "no-cache"),
            ];
            (headers, text).into_response()
        })
    };
    Router::new()
        .route("/console", file("text/html; charset=utf-8", include_str!("../../../../console/index.html")))
        .route(
            "/console/console.js",
            file("text/javascript; charset=utf-8", include_str!("../../../../console/console.js")),
        )
        .route(
            "/console/console.css",
            file("text/css; charset=utf-8", include_str!("../../../../console/console.css")),
        )
        .route("/console/", get(|| async { Redirect::permanent("/console") }))
}
