//! `GET /console`: a page that shows what happens, made of public routes only.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Redirect},
    routing::get,
};

/// Nothing from elsewhere, nothing inline, nowhere to send anything; a socket to where `/api/config` says.
fn content_security_policy(websocket_url: &str) -> String {
    let socket = websocket_url.strip_suffix("/ws").unwrap_or(websocket_url);
    format!(
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' {socket}; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>(websocket_url: &str) -> Router<S> {
    let policy = content_security_policy(websocket_url);
    let file = |content_type: &'static str, text: &'static str| {
        let policy = policy.clone();
        get(move || async move {
            let headers = [
                (header::CONTENT_TYPE, content_type),
                (header::CONTENT_SECURITY_POLICY, &*policy),
                (header::REFERRER_POLICY, "no-referrer"),
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
