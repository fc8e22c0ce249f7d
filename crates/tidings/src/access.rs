//! Who may: origins of pages, keys of publishers and operators. One gate for each question, used by every route.

use std::{net::IpAddr, sync::Arc};

use axum::http::{HeaderMap, HeaderName, header};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::{
    config::{Environment, Scope, Settings},
    keys::{Key, Keys},
};

/// What a proxy adds: with any of these a connection from loopback says nothing about who is behind it.
const FORWARDING_HEADERS: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// The rules of access, made from the settings.
#[derive(Debug)]
pub(crate) struct Access {
    environment: Environment,
    keys: Keys,
    /// `None`: the default of the environment.
    origins: Option<GlobSet>,
}

/// Why a request was refused.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    /// A key is needed and was not there. In words for whoever sent the request: how to mend that.
    KeyMissing(&'static str),
    /// There is no such key.
    KeyUnknown,
    /// The key is for something else.
    Scope(Arc<Key>, Scope),
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
            environment: settings.environment,
            keys: Keys::new(settings),
            origins: origins.transpose()?,
        })
    }

    /// Whether pages of this origin may connect and read. `host` is the request's `Host`.
    pub(crate) fn allows_origin(&self, origin: &str, host: Option<&str>) -> bool {
        let origin = origin.to_ascii_lowercase();
        // Of a sandboxed frame, a local file, a redirect: anybody can make a page of it, so that `*` does not mean it either.
        if origin == "null" {
            return false;
        }
        if let Some(origins) = &self.origins {
            return origins.is_match(&origin);
        }
        let Some(authority) = authority_of(&origin) else { return false };
        let same_host = host.is_some_and(|host| host.eq_ignore_ascii_case(authority));
        match self.environment {
            Environment::Development => same_host || is_local(authority),
            Environment::Docker => same_host,
            // There clients come by TLS; what came by plain HTTP has another port, and whoever is in between may have written it.
            Environment::Production => same_host && origin.starts_with("https://"),
        }
    }

    /// Whether a request may come from the page that it says it comes from; without `Origin` it is not from a page.
    pub(crate) fn allows_origin_of(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else { return true };
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        origin.to_str().is_ok_and(|origin| self.allows_origin(origin, host))
    }

    /// The key that a request shows, if it is for this; in development, without keys, what stands for this machine.
    pub(crate) fn key(&self, headers: &HeaderMap, peer: IpAddr, scope: Scope) -> Result<Arc<Key>, Refusal> {
        match bearer(headers) {
            Some(given) if !self.keys.is_empty() => match self.keys.find(given) {
                Some(key) if key.is_for(scope) => Ok(Arc::clone(key)),
                Some(key) => Err(Refusal::Scope(Arc::clone(key), scope)),
                None => Err(Refusal::KeyUnknown),
            },
            _ if self.keys.are_needed() => Err(Refusal::KeyMissing(
                "send `Authorization: Bearer KEY` with one of TIDINGS_PUBLISH_KEYS or `[[keys]]`",
            )),
            _ => {
                self.keyless(headers, peer).map_err(Refusal::KeyMissing)?;
                Ok(Arc::clone(self.keys.keyless()))
            }
        }
    }

    fn is_development(&self) -> bool {
        self.environment == Environment::Development
    }

    /// Whether a request may read metrics on the public listener.
    pub(crate) fn may_read_metrics(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let given = bearer(headers).filter(|_| !self.keys.is_empty());
        match given.map(|given| self.keys.find(given)) {
            Some(Some(key)) if key.is_admin() => Ok(()),
            _ if self.is_development() && !self.keys.has_admin() => Ok(()),
            Some(_) => Err(Refusal::KeyUnknown),
            None if self.is_development() => Ok(()),
            None => Err(Refusal::KeyMissing(
                "send `Authorization: Bearer KEY` with TIDINGS_ADMIN_KEY, or read them on TIDINGS_INTERNAL_LISTEN",
            )),
        }
    }

    /// A page of another site must not publish through its visitor's browser, nor a stranger through a proxy.
    fn keyless(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), &'static str> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if !self.is_development() {
            return Err("set TIDINGS_PUBLISH_KEYS or `[[keys]]` and send one as `Authorization: Bearer KEY`");
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

/// What a request shows in `Authorization: Bearer`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
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
        for origin in ["http://localhost:3000", "http://app.example.com", "https://app.example.com:444"] {
            assert!(!production.allows_origin(origin, Some("app.example.com")), "{origin}");
        }
        let docker = access(&[("ENVIRONMENT", "docker"), ("TIDINGS_AUTH", "none")]);
        assert!(docker.allows_origin("http://tidings:8000", Some("tidings:8000")));
        assert!(!docker.allows_origin("http://localhost:3000", Some("tidings:8000")));
        let listed = access(&[("TIDINGS_ALLOWED_ORIGINS", "https://*.example.com, https://other.org")]);
        assert!(listed.allows_origin("https://app.Example.com", None));
        assert!(listed.allows_origin("https://other.org", None));
        let odd = access(&[("TIDINGS_ALLOWED_ORIGINS", "http://[::1]:3000")]);
        assert!(odd.allows_origin("http://[::1]:3000", None) && !odd.allows_origin("http://:1:3000", None));
        let any = access(&[("TIDINGS_ALLOWED_ORIGINS", "*")]);
        assert!(any.allows_origin("https://any.example", None));
        assert!(!any.allows_origin("null", None) && !any.allows_origin("NULL", None));
        for origin in ["https://example.com.evil.org", "http://app.example.com", "https://evil/.example.com"]
        {
            assert!(!listed.allows_origin(origin, None), "{origin}");
        }
    }

    /// The key's name, or why there is none.
    fn publisher(
        access: &Access,
        pairs: &[(&'static str, &'static str)],
        peer: &str,
    ) -> Result<String, &'static str> {
        let key = access.key(&headers(pairs), peer.parse().unwrap(), Scope::Publish);
        key.map(|key| key.name().to_string()).map_err(|refusal| match refusal {
            Refusal::KeyMissing(_) => "missing",
            Refusal::KeyUnknown => "unknown",
            Refusal::Scope(..) => "scope",
        })
    }

    #[test]
    fn without_keys_only_this_machine_publishes_and_only_in_development() {
        let host = ("host", "localhost:8000");
        let development = access(&[]);
        for (pairs, peer) in [
            (&[host][..], "127.0.0.1"),
            (&[host, ("origin", "http://localhost:3000")], "127.0.0.1"),
            (&[host], "::ffff:127.0.0.1"),
        ] {
            assert_eq!(publisher(&development, pairs, peer).as_deref(), Ok("keyless"), "{pairs:?}");
        }
        for scope in [Scope::Tickets, Scope::Revoke] {
            assert!(development.key(&headers(&[host]), "127.0.0.1".parse().unwrap(), scope).is_ok());
        }
        for (pairs, peer) in [
            (vec![host], "10.0.0.7"),
            (vec![("host", "evil.com")], "127.0.0.1"),
            (vec![], "127.0.0.1"),
            (vec![host, ("origin", "http://evil.com")], "127.0.0.1"),
            (vec![host, ("origin", "null")], "127.0.0.1"),
            (vec![host, ("x-forwarded-for", "1.2.3.4")], "127.0.0.1"),
        ] {
            assert_eq!(publisher(&development, &pairs, peer), Err("missing"), "{pairs:?} {peer}");
        }
        let production = access(&[("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none")]);
        assert_eq!(publisher(&production, &[host], "127.0.0.1"), Err("missing"));
    }

    #[test]
    fn with_keys_one_of_them_is_needed_wherever_the_request_comes_from() {
        let scoped = r#"[{"name":"web","key":"0123456789abcdef"},{"name":"login","key":"fedcba9876543210","scopes":["tickets"]}]"#;
        let keyed = access(&[
            ("TIDINGS_PUBLISH_KEYS", "one,two"),
            ("TIDINGS_ADMIN_KEY", "admin-s"),
            ("TIDINGS_KEYS", scoped),
        ]);
        for (authorization, expected) in [
            ("Bearer one", Ok("publish[0]")),
            ("bearer two", Ok("publish[1]")),
            ("Bearer admin-s", Ok("admin")),
            ("Bearer 0123456789abcdef", Ok("web")),
            ("Bearer fedcba9876543210", Err("scope")),
            ("Bearer x", Err("unknown")),
            ("Basic b25l", Err("missing")),
        ] {
            let pairs = [("host", "localhost"), ("authorization", authorization)];
            let found = publisher(&keyed, &pairs, "127.0.0.1");
            assert_eq!(found.as_deref().map_err(|refused| *refused), expected, "{authorization}");
        }
        assert_eq!(publisher(&keyed, &[("host", "localhost")], "127.0.0.1"), Err("missing"));
        // A key for something else does not leave publishing to whoever comes.
        let tickets = r#"[{"name":"login","key":"fedcba9876543210","scopes":["tickets"]}]"#;
        let other = access(&[("TIDINGS_KEYS", tickets)]);
        assert_eq!(publisher(&other, &[("host", "localhost")], "127.0.0.1"), Err("missing"));
    }

    #[test]
    fn metrics_are_the_admins_and_open_in_development() {
        let may = |variables: &[(&str, &str)], pairs: &[(&'static str, &'static str)]| {
            access(variables).may_read_metrics(&headers(pairs)).is_ok()
        };
        let production = [
            ("ENVIRONMENT", "production"),
            ("TIDINGS_AUTH", "none"),
            ("TIDINGS_ADMIN_KEY", "0123456789abcdef"),
            ("TIDINGS_PUBLISH_KEYS", "fedcba9876543210"),
        ];
        let admin = ("authorization", "Bearer 0123456789abcdef");
        let publisher = ("authorization", "Bearer fedcba9876543210");
        assert!(may(&production, &[admin]) && may(&[], &[]) && may(&[], &[publisher]));
        assert!(!may(&production, &[publisher]) && !may(&production, &[]));
        assert!(may(&[("TIDINGS_PUBLISH_KEYS", "one")], &[("authorization", "Bearer one")]));
        assert!(!may(&[("TIDINGS_ADMIN_KEY", "adm")], &[("authorization", "Bearer one")]));
    }
}
