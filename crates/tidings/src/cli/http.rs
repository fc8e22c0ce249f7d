//! Requests to a running service.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{
    body::{Body, Bytes},
    http::{Request, header},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::own_certificate;
use crate::config::Settings;

/// Long enough for a publishing request of the largest size over a slow line.
const TIMEOUT: Duration = Duration::from_secs(30);
/// As much as the library for plain requests reads.
const ANSWER_BYTES_MAX: usize = 10 << 20;

/// A service as the command line finds it.
pub(super) struct Service {
    /// Without a path.
    base: String,
    /// Where its own certificate counts, because the settings say which it is.
    own: Option<Own>,
}

struct Own {
    authority: String,
    tls: Arc<ClientConfig>,
}

impl Service {
    /// The service at the given address, or where it listens by these settings. With `internal` at the address that takes
    /// publishing.
    pub(super) fn of(settings: &Settings, url: Option<String>, internal: bool) -> anyhow::Result<Self> {
        if let Some(url) = url {
            return Ok(Self { base: url.trim_end_matches('/').to_owned(), own: None });
        }
        let internal = settings.internal_listen.filter(|_| internal);
        let address = internal.unwrap_or(settings.listen);
        let authority = match address.ip() {
            // By its name, because keyless publishing asks for a local `Host` and gets one either way.
            ip if ip.is_unspecified() || ip.is_loopback() => format!("localhost:{}", address.port()),
            IpAddr::V4(ip) => format!("{ip}:{}", address.port()),
            IpAddr::V6(ip) => format!("[{ip}]:{}", address.port()),
        };
        match settings.tls.as_ref().filter(|_| internal.is_none()) {
            None => Ok(Self { base: format!("http://{authority}"), own: None }),
            Some(files) => {
                let tls = own_certificate::trusting(files)?;
                Ok(Self { base: format!("https://{authority}"), own: Some(Own { authority, tls }) })
            }
        }
    }

    /// The URL of a path.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub(super) fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.get_with(path, None)
    }

    /// The same with a key.
    pub(super) fn get_with(&self, path: &str, key: Option<&str>) -> anyhow::Result<(u16, String)> {
        let url = self.url(path);
        let authorization = key.map(|key| format!("Bearer {key}"));
        if let Some(own) = &self.own {
            let mut request = Request::get(path);
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            return own.send(request, &[]).with_context(|| unreachable(&url));
        }
        let mut request = agent().get(&url);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let mut response = request.call().with_context(|| unreachable(&url))?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    pub(super) fn post(
        &self,
        path: &str,
        key: Option<&str>,
        content_type: &str,
        body: &[u8],
    ) -> anyhow::Result<(u16, String)> {
        let url = self.url(path);
        let authorization = key.map(|key| format!("Bearer {key}"));
        if let Some(own) = &self.own {
            let mut request = Request::post(path).header(header::CONTENT_TYPE, content_type);
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            return own.send(request, body).with_context(|| unreachable(&url));
        }
        let mut request = agent().post(&url).header("content-type", content_type);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let mut response = request.send(body).with_context(|| unreachable(&url))?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }
}

impl Own {
    fn send(&self, request: axum::http::request::Builder, body: &[u8]) -> anyhow::Result<(u16, String)> {
        let request = request
            .header(header::HOST, &self.authority)
            .header(header::CONNECTION, "close")
            .body(Body::from(Bytes::copy_from_slice(body)))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { timeout(TIMEOUT, self.answer(request)).await.context("no answer in time")? })
    }

    async fn answer(&self, request: Request<Body>) -> anyhow::Result<(u16, String)> {
        let (host, _) = self.authority.rsplit_once(':').unwrap_or((&self.authority, ""));
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        let socket = TcpStream::connect(&self.authority).await?;
        let socket = TlsConnector::from(Arc::clone(&self.tls)).connect(name, socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        let answering = async {
            let response = sender.send_request(request).await?;
            let status = response.status().as_u16();
            let body = axum::body::to_bytes(Body::new(response.into_body()), ANSWER_BYTES_MAX).await?;
            Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        let mut answering = std::pin::pin!(answering);
        tokio::select! {
            answer = &mut answering => answer,
            // It ends when it has been read to its end, or by an error that the answer tells, too.
            _ = connection => answering.await,
        }
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).build().into()
}

fn unreachable(url: &str) -> String {
    format!("{url} cannot be reached; is the service running (`tidings dev`), and is this its address?")
}
