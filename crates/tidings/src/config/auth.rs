//! Settings of who may connect.

use std::time::Duration;

use axum::http::Uri;
use tidings_engine::engine::redis::RedisAddress;

use super::{
    JwtSettings, Layers, SettingError, jwt,
    secret::{Secret, secrets},
};
use crate::auth::{Codec, SessionFormat, Shape, Template, WayName};

/// How it is found out who somebody is.
#[derive(Clone, Debug)]
pub struct AuthSettings {
    /// In their order; empty: nobody is asked.
    pub(crate) ways: Vec<WayName>,
    pub(crate) session: SessionSettings,
    /// How tokens are checked; `None`: they cannot be.
    pub(crate) jwt: Option<JwtSettings>,
    /// Where the application is asked whose cookies they are.
    pub(crate) callback: Option<Uri>,
}

/// Where the application's sessions are, and how they are read.
#[derive(Clone, Debug)]
pub(crate) struct SessionSettings {
    /// The cookie's name.
    pub(crate) cookie: String,
    /// How a session in Redis is found and read.
    pub(crate) format: SessionFormat,
    /// The Redis that has them; `None`: the one of the streams.
    pub(crate) redis: Option<RedisAddress>,
    /// Secrets of signed cookies.
    pub(crate) secrets: Vec<Secret>,
    /// How long a signed cookie is good.
    pub(crate) max_age: Duration,
}

impl AuthSettings {
    pub(super) fn read(layers: &Layers) -> Result<Self, SettingError> {
        Ok(Self {
            ways: ways(layers)?,
            session: session(layers)?,
            jwt: JwtSettings::read(layers)?,
            callback: jwt::url(layers, "TIDINGS_AUTH_URL")?,
        })
    }

    /// Whether each way has what it needs.
    pub(super) fn check(&self, layers: &Layers, has_redis: bool) -> Result<(), SettingError> {
        let (session, keys) =
            (&self.session, "TIDINGS_JWT_SECRET, TIDINGS_JWT_PUBLIC_KEY or TIDINGS_JWKS_URL");
        for (way, has, needed) in [
            (
                WayName::RedisSession,
                has_redis || session.redis.is_some(),
                "REDIS_URL, or TIDINGS_SESSION_REDIS_URL",
            ),
            (
                WayName::SignedCookie,
                !session.secrets.is_empty(),
                "TIDINGS_SESSION_SECRET, the secret that the application signs with",
            ),
            (WayName::Jwt, self.jwt.is_some(), keys),
            (WayName::Callback, self.callback.is_some(), "TIDINGS_AUTH_URL"),
        ] {
            if self.ways.contains(&way) && !has {
                let way = WAYS.iter().find(|(_, known)| *known == way).map_or("", |(word, _)| word);
                return Err(layers.error("TIDINGS_AUTH", format!("`{way}` needs {needed}")));
            }
        }
        Ok(())
    }
}

const WAYS: [(&str, WayName); 5] = [
    ("redis-session", WayName::RedisSession),
    ("signed-cookie", WayName::SignedCookie),
    ("jwt", WayName::Jwt),
    ("ticket", WayName::Ticket),
    ("callback", WayName::Callback),
];

fn ways(layers: &Layers) -> Result<Vec<WayName>, SettingError> {
    let name = "TIDINGS_AUTH";
    let mut ways = Vec::new();
    for word in layers.list(name) {
        match WAYS.iter().find(|(known, _)| *known == word) {
            Some((_, way)) if ways.contains(way) => {
                return Err(layers.error(name, format!("`{word}` is there twice")));
            }
            Some((_, way)) => ways.push(*way),
            None if word == "none" => {}
            None => {
                let words: Vec<_> = WAYS.iter().map(|(word, _)| format!("`{word}`")).collect();
                let message =
                    format!("`{word}`: expected one or more of {}, or `none` alone", words.join(", "));
                return Err(layers.error(name, message));
            }
        }
    }
    if !ways.is_empty() && layers.list(name).iter().any(|word| word == "none") {
        return Err(layers.error(name, "`none` stands alone: with it, nobody would be asked"));
    }
    Ok(ways)
}

fn session(layers: &Layers) -> Result<SessionSettings, SettingError> {
    let template = |name: &'static str, place: &str| {
        let text = layers.optional(name);
        text.map(|text| Template::parse(text, place).map_err(|what| layers.error(name, what))).transpose()
    };
    let pointer = |name: &'static str| {
        let text = layers.text(name);
        if text.starts_with('/') {
            return Ok(text);
        }
        Err(layers.error(name, format!("expected a JSON Pointer as `/user_id`, found `{text}`")))
    };
    let cookie = layers.text("TIDINGS_SESSION_COOKIE");
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if cookie.is_empty() || !cookie.bytes().all(is_token) {
        return Err(layers.error("TIDINGS_SESSION_COOKIE", format!("`{cookie}` cannot be a cookie's name")));
    }
    let key = template("TIDINGS_SESSION_KEY", "id")?;
    let redis = layers.optional("TIDINGS_SESSION_REDIS_URL").map(|url| {
        RedisAddress::parse(url).map_err(|error| layers.error("TIDINGS_SESSION_REDIS_URL", error.to_string()))
    });
    Ok(SessionSettings {
        cookie,
        format: SessionFormat {
            key: key.ok_or_else(|| layers.error("TIDINGS_SESSION_KEY", "must be set"))?,
            codec: layers.choice(
                "TIDINGS_SESSION_CODEC",
                &[("json", Codec::Json), ("msgpack", Codec::MessagePack), ("string", Codec::Text)],
            )?,
            shape: Shape {
                user: pointer("TIDINGS_SESSION_USER")?,
                projects: pointer("TIDINGS_SESSION_PROJECTS")?,
            },
            projects_key: template("TIDINGS_SESSION_PROJECTS_KEY", "user_id")?,
        },
        redis: redis.transpose()?,
        secrets: secrets(layers, "TIDINGS_SESSION_SECRET")?,
        max_age: Duration::from_secs(layers.number("TIDINGS_SESSION_MAX_AGE", 1, 10 * 365 * 24 * 3600)?),
    })
}
