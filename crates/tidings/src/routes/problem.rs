//! Errors as `application/problem+json` (RFC 9457).

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::admission::Refused;

/// What went wrong, for whoever sent the request.
#[derive(Debug, Serialize)]
pub(super) struct Problem {
    r#type: &'static str,
    title: String,
    #[serde(serialize_with = "as_number")]
    status: StatusCode,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    /// Why somebody may not: stable, for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<ItemError>,
    /// When to come back, if that makes sense.
    #[serde(skip)]
    retry_after_s: u64,
}

/// What is wrong with one event of several.
#[derive(Debug, Serialize)]
pub(super) struct ItemError {
    /// Counted from 0.
    pub(super) index: usize,
    /// The path from the event's top; `null`: the event as a whole.
    pub(super) field: Option<String>,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("error").to_ascii_lowercase();
        Self {
            r#type: "about:blank",
            title,
            status,
            detail: detail.into(),
            code: None,
            errors: Vec::new(),
            retry_after_s: 1,
        }
    }

    /// Somebody may not. In development `told` what the rule is; in production the code has to do.
    pub(super) fn denied(status: StatusCode, code: &'static str, detail: &str, told: bool) -> Self {
        Self { code: Some(code), ..Self::new(status, if told { detail } else { "" }) }
    }

    /// There is no room for one more connection.
    pub(super) fn refused(refused: Refused, retry_after_s: u64) -> Self {
        let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, refused.detail()).retry_after(retry_after_s);
        Self { code: Some(refused.as_str()), ..problem }
    }

    /// When to come back.
    pub(super) fn retry_after(self, retry_after_s: u64) -> Self {
        Self { retry_after_s, ..self }
    }

    /// Some events of a request are beyond what its key may publish.
    pub(super) fn outside(detail: &str, told: bool, errors: Vec<ItemError>) -> Self {
        Self { errors, ..Self::denied(StatusCode::FORBIDDEN, "scope", detail, told) }
    }

    /// Too much in too short a time.
    pub(super) fn too_fast(wait: Duration) -> Self {
        let detail =
            "this key publishes too many events in too short a time; nothing of the request was published";
        let problem = Self::denied(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail, true);
        // Whole seconds, and not before so many fit.
        Self { retry_after_s: wait.as_secs() + u64::from(wait.subsec_nanos() > 0), ..problem }
    }

    /// The body of a request did not arrive in time.
    pub(super) fn too_slow(detail: &str) -> Self {
        Self::denied(StatusCode::REQUEST_TIMEOUT, "too_slow", detail, true)
    }

    /// Why somebody may not, if that is what it is about.
    pub(super) fn code(&self) -> Option<&'static str> {
        self.code
    }

    pub(super) fn invalid_events(errors: Vec<ItemError>) -> Self {
        let problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "");
        Self { title: "invalid events".to_owned(), errors, ..problem }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, retry_after_s) = (self.status, self.retry_after_s);
        let mut response = (status, axum::Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::REQUEST_TIMEOUT {
            // What is still to come of the body is no next request.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
        }
        response
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn as_number<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}
