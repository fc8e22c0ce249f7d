//! Settings for tokens, and of URLs that are asked.

use std::net::IpAddr;

use axum::http::Uri;

use super::{
    Layers, SettingError,
    secret::{Secret, secrets},
};
use crate::auth::jwt::Key;

/// How tokens are checked: with at least one key, or a place to fetch them from.
#[derive(Clone, Debug)]
pub struct JwtSettings {
    pub(crate) secrets: Vec<Secret>,
    pub(crate) public_keys: Vec<Key>,
    pub(crate) jwks_url: Option<Uri>,
    /// What `iss` must be.
    pub(crate) issuer: Option<String>,
    /// What `aud` must have.
    pub(crate) audience: Option<String>,
    /// The cookie that may hold a token.
    pub(crate) cookie: String,
}

impl JwtSettings {
    /// `None`: there is nothing to check tokens with.
    pub(super) fn read(layers: &Layers) -> Result<Option<Self>, SettingError> {
        let settings = Self {
            secrets: secrets(layers, "TIDINGS_JWT_SECRET")?,
            public_keys: public_keys(layers)?,
            jwks_url: jwks_url(layers)?,
            issuer: layers.optional("TIDINGS_JWT_ISSUER").map(str::to_owned),
            audience: layers.optional("TIDINGS_JWT_AUDIENCE").map(str::to_owned),
            cookie: cookie(layers)?,
        };
        let has_source =
            !settings.secrets.is_empty() || !settings.public_keys.is_empty() || settings.jwks_url.is_some();
        Ok(has_source.then_some(settings))
    }
}

fn public_keys(layers: &Layers) -> Result<Vec<Key>, SettingError> {
    let name = "TIDINGS_JWT_PUBLIC_KEY";
    let Some(text) = layers.optional(name) else { return Ok(Vec::new()) };
    // The value is not told: whoever put a private key there would find it in the log.
    Key::from_pem(text).map_err(|message| layers.error(name, message))
}

fn jwks_url(layers: &Layers) -> Result<Option<Uri>, SettingError> {
    let name = "TIDINGS_JWKS_URL";
    let Some(url) = url(layers, name)? else { return Ok(None) };
    if url.scheme_str() == Some("https") || url.host().is_some_and(is_loopback) {
        return Ok(Some(url));
    }
    Err(layers.error(
        name,
        format!(
            "expected `https://`, because whoever changes keys on their way can make tokens{}",
            layers.found(name)
        ),
    ))
}

/// A URL that is asked over HTTP.
pub(super) fn url(layers: &Layers, name: &'static str) -> Result<Option<Uri>, SettingError> {
    let Some(text) = layers.optional(name) else { return Ok(None) };
    let url = text.parse::<Uri>().ok().filter(|url| {
        let is_http = matches!(url.scheme_str(), Some("http" | "https"));
        is_http && url.host().is_some_and(|host| !host.is_empty()) && !text.contains('#')
    });
    match url {
        // It would be told where the URL is, which is no secret.
        Some(url) if url.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
            Err(layers.error(name, "expected a URL without a user or a password in it"))
        }
        Some(url) => Ok(Some(url)),
        None => Err(layers
            .error(name, format!("expected a URL as `https://app.example.com/path`{}", layers.found(name)))),
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn cookie(layers: &Layers) -> Result<String, SettingError> {
    let name = "TIDINGS_JWT_COOKIE";
    let text = layers.text(name);
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_token) {
        return Err(
            layers.error(name, format!("expected the name of a cookie, as `token`{}", layers.found(name)))
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{auth::jwt::test_keys, config::Flags};

    fn layers(variables: &[(&str, &str)]) -> Layers {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Layers::load(&Flags::default(), &variables, None).unwrap()
    }

    fn read(variables: &[(&str, &str)]) -> Result<Option<JwtSettings>, String> {
        JwtSettings::read(&layers(variables)).map_err(|error| error.to_string())
    }

    #[test]
    fn tokens_can_be_checked_when_there_is_a_key_or_a_place_to_fetch_them_from() {
        assert!(read(&[("TIDINGS_JWT_ISSUER", "x"), ("TIDINGS_JWT_COOKIE", "jwt")]).unwrap().is_none());
        let both = "a-secret-of-sixteen, another-of-sixteen-bytes";
        let settings =
            read(&[("TIDINGS_JWT_SECRET", both), ("TIDINGS_JWT_AUDIENCE", "tidings")]).unwrap().unwrap();
        let revealed: Vec<_> = settings.secrets.iter().map(Secret::reveal).collect();
        assert_eq!(revealed, ["a-secret-of-sixteen", "another-of-sixteen-bytes"]);
        assert_eq!((settings.audience.as_deref(), settings.cookie.as_str()), (Some("tidings"), "token"));
        assert!(!format!("{settings:?}").contains("sixteen"), "{settings:?}");
        let pem = [test_keys::RSA_PUBLIC, test_keys::P256_PUBLIC].concat();
        assert_eq!(read(&[("TIDINGS_JWT_PUBLIC_KEY", &pem)]).unwrap().unwrap().public_keys.len(), 2);
        for url in [
            "https://id.example.com/jwks",
            "http://localhost:9000/jwks",
            "http://127.0.0.2/",
            "http://[::1]:1/",
        ] {
            let settings = read(&[("TIDINGS_JWKS_URL", url)]).unwrap().unwrap();
            assert_eq!(settings.jwks_url.unwrap(), url);
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_and_no_secret_is_shown() {
        for (name, value, words) in [
            ("TIDINGS_JWT_SECRET", "too-short", "at least 16 bytes"),
            ("TIDINGS_JWT_SECRET", "a-secret-of-sixteen,too-short", "at least 16 bytes"),
            ("TIDINGS_JWT_SECRET", ",", "at least 16 bytes"),
            ("TIDINGS_JWT_PUBLIC_KEY", "rubbish", "expected PEM"),
            ("TIDINGS_JWT_PUBLIC_KEY", test_keys::ED25519, "private key"),
            ("TIDINGS_JWKS_URL", "http://id.example.com/jwks", "expected `https://`"),
            ("TIDINGS_JWKS_URL", "http://localhost.example.com/", "expected `https://`"),
            ("TIDINGS_JWKS_URL", "/jwks", "expected a URL as"),
            ("TIDINGS_JWKS_URL", "file:///etc/passwd", "expected a URL as"),
            ("TIDINGS_JWT_COOKIE", "my token", "the name of a cookie"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(words), "{name}: {error}");
            let is_secret = name == "TIDINGS_JWT_SECRET" || name == "TIDINGS_JWT_PUBLIC_KEY";
            assert!(error.contains(value) != is_secret || value == ",", "{name}: {error}");
        }
        for (value, words) in [
            ("app.example.com/auth", "expected a URL as"),
            ("http://", "expected a URL as"),
            ("ftp://app.example.com/", "expected a URL as"),
            ("http://app.example.com/#me", "expected a URL as"),
            ("http://me:s3cret@app.example.com/", "without a user or a password"),
        ] {
            let error =
                url(&layers(&[("TIDINGS_AUTH_URL", value)]), "TIDINGS_AUTH_URL").unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("s3cret"), "{error}");
        }
    }
}
