//! Questions over HTTP to those outside who know about somebody: the one place that asks, and only what settings name.

use std::{error::Error, sync::Arc, time::Duration};

use axum::http::{HeaderValue, Request, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::rt::Executor;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioTimer,
};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio_util::task::TaskTracker;

/// Less than after what servers hang up on who says nothing: gunicorn after two seconds, uvicorn after five.
const IDLE: Duration = Duration::from_millis(1500);
const IDLE_CONNECTIONS_MAX: usize = 16;
/// For the head of an answer.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Asks by GET. Follows no redirect, because where a question goes is for the operator to say and for no answer; reads no
/// proxy from the environment; takes nothing compressed, so that a limit in bytes is one.
pub(super) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

/// What was answered.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// Empty unless the status is 200.
    pub(super) body: Bytes,
}

/// Why there is no answer. None of it is a secret: neither what was asked nor what was answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("cannot be reached ({0})")]
    Unreachable(String),
    #[error("answers with more than {0} bytes")]
    TooLarge(usize),
    #[error("answers compressed, although nobody asked for that")]
    Compressed,
    #[error("breaks off its answer")]
    Broken,
}

impl Http {
    /// For questions to this host.
    pub(super) fn new(url: &Uri) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // The connector around it speaks TLS.
        connector.enforce_http(false);
        let is_secure = url.scheme_str() == Some("https");
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls(is_secure))
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(Tracked(TaskTracker::new()))
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .http1_max_buf_size(HEAD_BYTES_MAX)
            .build(connector);
        Self { client }
    }

    /// Asks once. How long it may take is the caller's to say.
    pub(super) async fn get(
        &self,
        url: &Uri,
        cookie: Option<HeaderValue>,
        bytes_max: usize,
    ) -> Result<Answer, HttpError> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = url.clone();
        let headers = request.headers_mut();
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(
            header::USER_AGENT,
            HeaderValue::from_static(concat!("tidings/", env!("CARGO_PKG_VERSION"))),
        );
        if let Some(mut cookie) = cookie {
            cookie.set_sensitive(true);
            headers.insert(header::COOKIE, cookie);
        }
        let response = self.client.request(request).await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Ok(Answer { status, body: Bytes::new() });
        }
        let encoding = response.headers().get(header::CONTENT_ENCODING);
        if encoding.is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
            return Err(HttpError::Compressed);
        }
        let body = Limited::new(response.into_body(), bytes_max).collect().await.map_err(|error| {
            if error.is::<http_body_util::LengthLimitError>() {
                HttpError::TooLarge(bytes_max)
            } else {
                HttpError::Broken
            }
        })?;
        Ok(Answer { status, body: body.to_bytes() })
    }
}

/// With the innermost reason, which is the one that helps; what is around it says that a client could not connect.
fn unreachable(error: &hyper_util::client::legacy::Error) -> HttpError {
    let mut reason: &dyn Error = error;
    while let Some(inner) = reason.source() {
        reason = inner;
    }
    HttpError::Unreachable(reason.to_string())
}

/// Trusts Mozilla's authorities, which are there in the emptiest of containers, and the machine's own, because inside of a
/// company certificates are often the company's.
fn tls(is_needed: bool) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    if is_needed {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has what the versions of TLS need")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// Where connections run. No stop waits for them: they end with the client, which is all that they are for.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> Executor<F> for Tracked
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, connection: F) {
        self.0.spawn(connection);
    }
}
