//! Who may: origins of pages, keys of publishers and operators. One gate for each question, used by every route.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, header};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use subtle::ConstantTimeEq;

use crate::config::{Environment, Settings};

/// What a proxy adds: with any of these a connection from loopback says nothing about who is behind it.
const FORWARDING_HEADERS: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// The rules of access, made from the settings.
#[derive(Debug)]
pub(crate) struct Access {
    development: bool,
    publish_keys: Vec<String>,
    admin_key: Option<String>,
    /// `None`: the default of the environment.
    origins: Option<GlobSet>,
}

/// Why a request was refused, in words for whoever sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A key is needed and was not there.
    KeyMissing(&'static str),
    /// The key is not one of those that may.
    KeyUnknown,
}

impl Access {
    pub(crate) fn new(settings: &Settings) -> Result<Self, globset::Error> {
        let origins = (!settings.allowed_origins.is_empty()).then(|| {
            let mut set = GlobSetBuilder::new();
            for origin in &settings.allowed_origins {
                // `*` stays within one part between slashes, so that it cannot reach over the host; alone it is all.
                let glob = if origin == "*" { "**" } else { origin };
                // The brackets of an IPv6 address are no class of characters.
                let glob = glob.to_ascii_lowercase().replace('[', "[[]");
                set.add(GlobBuilder::new(&glob).literal_separator(true).build()?);
            }
            set.build()
        });
        Ok(Self {
            development: settings.environment == Environment::Development,
            publish_keys: settings.publish_keys.clone(),
            admin_key: settings.admin_key.clone(),
            origins: origins.transpose()?,
        })
    }

    /// Whether pages of this origin may connect and read. `host` is the request's `Host`.
    pub(crate) fn allows_origin(&self, origin: &str, host: Option<&str>) -> bool {
        let origin = origin.to_ascii_lowercase();
        if let Some(origins) = &self.origins {
            return origins.is_match(&origin);
        }
        let Some(authority) = authority_of(&origin) else { return false };
        let same_host = host.is_some_and(|host| host.eq_ignore_ascii_case(authority));
        same_host || (self.development && is_local(authority))
    }

    /// Whether a request may come from the page that it says it comes from; without `Origin` it is not from a page.
    pub(crate) fn allows_origin_of(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else { return true };
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        origin.to_str().is_ok_and(|origin| self.allows_origin(origin, host))
    }

    /// Whether a request may publish: with a key, or from this machine in development without one.
    pub(crate) fn may_publish(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), Refusal> {
        match bearer(headers) {
            Some(key) if self.publish_keys.iter().chain(&self.admin_key).any(|known| same(key, known)) => {
                Ok(())
            }
            Some(_) if !self.publish_keys.is_empty() || self.admin_key.is_some() => Err(Refusal::KeyUnknown),
            _ if !self.publish_keys.is_empty() => {
                Err(Refusal::KeyMissing("send `Authorization: Bearer KEY` with one of TIDINGS_PUBLISH_KEYS"))
            }
            _ => self.keyless(headers, peer).map_err(Refusal::KeyMissing),
        }
    }

    /// Whether a request may read metrics on the public listener.
    pub(crate) fn may_read_metrics(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        match (bearer(headers), &self.admin_key) {
            (Some(key), Some(admin)) if same(key, admin) => Ok(()),
            (Some(_), Some(_)) => Err(Refusal::KeyUnknown),
            _ if self.development => Ok(()),
            _ => Err(Refusal::KeyMissing(
                "send `Authorization: Bearer KEY` with TIDINGS_ADMIN_KEY, or read them on TIDINGS_INTERNAL_LISTEN",
            )),
        }
    }

    /// A page of another site must not publish through its visitor's browser, nor a stranger through a proxy.
    fn keyless(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), &'static str> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if !self.development {
            return Err("set TIDINGS_PUBLISH_KEYS and send one as `Authorization: Bearer KEY`");
        }
        if !peer.to_canonical().is_loopback() {
            return Err("without TIDINGS_PUBLISH_KEYS only programs on this machine may publish");
        }
        if FORWARDING_HEADERS.iter().any(|name| headers.contains_key(*name)) {
            return Err("without TIDINGS_PUBLISH_KEYS a request that came through a proxy may not publish");
        }
        if !text(header::HOST).is_some_and(is_local) {
            return Err("without TIDINGS_PUBLISH_KEYS the request's `Host` must be localhost");
        }
        if headers.contains_key(header::ORIGIN)
            && !text(header::ORIGIN).and_then(|origin| authority_of(origin)).is_some_and(is_local)
        {
            return Err("without TIDINGS_PUBLISH_KEYS a page of another site may not publish");
        }
        Ok(())
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn same(given: &str, known: &str) -> bool {
    given.as_bytes().ct_eq(known.as_bytes()).into()
}

/// `host:port` of an origin.
fn authority_of(origin: &str) -> Option<&str> {
    origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"))
}

/// Whether `host` or `host:port` is this machine.
fn is_local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let host = host.to_ascii_lowercase();
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use axum::http::HeaderValue;

    use super::*;
    use crate::config::{Flags, Layers};

    fn access(variables: &[(&str, &str)]) -> Access {
        let variables: BTreeMap<_, _> =
            variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let layers = Layers::load(&Flags::default(), &variables, None).unwrap();
        Access::new(&Settings::read(&layers).unwrap()).unwrap()
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn origins_are_this_host_any_localhost_in_development_or_those_that_are_listed() {
        let development = access(&[]);
        for origin in
            ["http://localhost:3000", "http://127.0.0.1:5173", "https://[::1]:1", "http://app.test:8000"]
        {
            assert!(development.allows_origin(origin, Some("app.test:8000")), "{origin}");
        }
        for origin in
            ["http://localhost.evil.com", "http://evil.com", "null", "file://", "http://app.test:8001"]
        {
            assert!(!development.allows_origin(origin, Some("app.test:8000")), "{origin}");
        }
        let production = access(&[("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none")]);
        assert!(production.allows_origin("https://app.example.com", Some("app.example.com")));
        assert!(!production.allows_origin("http://localhost:3000", Some("app.example.com")));
        let listed = access(&[("TIDINGS_ALLOWED_ORIGINS", "https://*.example.com, https://other.org")]);
        assert!(listed.allows_origin("https://app.Example.com", None));
        assert!(listed.allows_origin("https://other.org", None));
        let odd = access(&[("TIDINGS_ALLOWED_ORIGINS", "http://[::1]:3000")]);
        assert!(odd.allows_origin("http://[::1]:3000", None) && !odd.allows_origin("http://:1:3000", None));
        assert!(access(&[("TIDINGS_ALLOWED_ORIGINS", "*")]).allows_origin("https://any.example", None));
        for origin in ["https://example.com.evil.org", "http://app.example.com", "https://evil/.example.com"]
        {
            assert!(!listed.allows_origin(origin, None), "{origin}");
        }
    }

    #[test]
    fn without_keys_only_this_machine_publishes_and_only_in_development() {
        let local = "127.0.0.1".parse().unwrap();
        let host = ("host", "localhost:8000");
        let development = access(&[]);
        assert_eq!(development.may_publish(&headers(&[host]), local), Ok(()));
        assert_eq!(
            development.may_publish(&headers(&[host, ("origin", "http://localhost:3000")]), local),
            Ok(())
        );
        assert_eq!(development.may_publish(&headers(&[host]), "::ffff:127.0.0.1".parse().unwrap()), Ok(()));
        for (pairs, peer) in [
            (vec![host], "10.0.0.7"),
            (vec![("host", "evil.com")], "127.0.0.1"),
            (vec![], "127.0.0.1"),
            (vec![host, ("origin", "http://evil.com")], "127.0.0.1"),
            (vec![host, ("origin", "null")], "127.0.0.1"),
            (vec![host, ("x-forwarded-for", "1.2.3.4")], "127.0.0.1"),
        ] {
            let refused = development.may_publish(&headers(&pairs), peer.parse().unwrap());
            assert!(matches!(refused, Err(Refusal::KeyMissing(_))), "{pairs:?} {peer}");
        }
        let production = access(&[("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none")]);
        assert!(production.may_publish(&headers(&[host]), local).is_err());
    }

    #[test]
    fn with_keys_one_of_them_is_needed_wherever_the_request_comes_from() {
        let keyed = access(&[("TIDINGS_PUBLISH_KEYS", "one,two"), ("TIDINGS_ADMIN_KEY", "admin")]);
        let local = "127.0.0.1".parse().unwrap();
        let host = ("host", "localhost");
        for key in ["Bearer one", "bearer two", "Bearer admin"] {
            assert_eq!(keyed.may_publish(&headers(&[host, ("authorization", key)]), local), Ok(()), "{key}");
        }
        assert_eq!(
            keyed.may_publish(&headers(&[host, ("authorization", "Bearer x")]), local),
            Err(Refusal::KeyUnknown)
        );
        assert!(matches!(keyed.may_publish(&headers(&[host]), local), Err(Refusal::KeyMissing(_))));
    }
}
