//! Requests to a running service.

use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;

use crate::config::Settings;

/// Long enough for a publishing request of the largest size over a slow line.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The service's address: the given one, or the one that it listens on by these settings. With `internal` the address
/// that takes publishing.
pub(super) fn base(settings: &Settings, url: Option<String>, internal: bool) -> String {
    if let Some(url) = url {
        return url.trim_end_matches('/').to_owned();
    }
    let address = settings.internal_listen.filter(|_| internal).unwrap_or(settings.listen);
    match address.ip() {
        // By its name, because keyless publishing asks for a local `Host` and gets one either way.
        ip if ip.is_unspecified() || ip.is_loopback() => format!("http://localhost:{}", address.port()),
        IpAddr::V4(ip) => format!("http://{ip}:{}", address.port()),
        IpAddr::V6(ip) => format!("http://[{ip}]:{}", address.port()),
    }
}

pub(super) fn get(url: &str) -> anyhow::Result<(u16, String)> {
    let mut response = agent().get(url).call().with_context(|| unreachable(url))?;
    Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
}

pub(super) fn post(
    url: &str,
    key: Option<&str>,
    content_type: &str,
    body: &[u8],
) -> anyhow::Result<(u16, String)> {
    let mut request = agent().post(url).header("content-type", content_type);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let mut response = request.send(body).with_context(|| unreachable(url))?;
    Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).build().into()
}

fn unreachable(url: &str) -> String {
    format!("{url} cannot be reached; is the service running (`tidings dev`), and is this its address?")
}
