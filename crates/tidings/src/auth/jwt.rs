//! JSON Web Tokens (RFC 7519), signed (RFC 7515): whom they name, and whether to believe them.

mod jwks;
mod key;
mod signer;
#[cfg(test)]
pub(crate) mod test_keys;
#[cfg(test)]
mod tests;

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};
use tidings_protocol::{Projects, Timestamp};

use self::jwks::Jwks;
use super::{
    Checked, Denied, Identity, Refusal,
    identity::{moment, user},
};
use crate::config::JwtSettings;

pub(crate) use self::{
    key::{Algorithm, Key},
    signer::Signer,
};

/// The longest token that is looked at. Browsers send no longer cookie, and servers take no longer header.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Checks tokens. What one is checked with follows from the settings: its header chooses among their keys, and never the
/// algorithm of one, nor a key of its own (`jwk`, `jku`, `x5c`, `x5u` are not read).
pub(crate) struct Jwt {
    keys: Vec<Key>,
    jwks: Option<Jwks>,
    issuer: Option<String>,
    audience: Option<String>,
}

impl fmt::Debug for Jwt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwt").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

/// A token taken apart; nothing in it is believed yet.
struct Parts<'a> {
    algorithm: Algorithm,
    kid: Option<String>,
    /// What is signed.
    message: &'a [u8],
    signature: Vec<u8>,
    claims: &'a str,
}

type Claims = Map<String, Value>;

impl Jwt {
    /// Asks nobody anything yet.
    pub(crate) fn new(settings: &JwtSettings) -> Self {
        let secrets = settings.secrets.iter().map(|secret| Key::secret(secret.reveal()));
        Self {
            keys: secrets.chain(settings.public_keys.iter().cloned()).collect(),
            jwks: settings.jwks_url.as_ref().map(Jwks::new),
            issuer: settings.issuer.clone(),
            audience: settings.audience.clone(),
        }
    }

    /// Who shows this token, at this moment.
    pub(crate) async fn check(&self, token: &str, now: Timestamp) -> Result<Checked, Refusal> {
        let parts = self.take_apart(token)?;
        self.check_signature(&parts).await?;
        let claims =
            decode_object(parts.claims).ok_or_else(|| malformed("its second part is no JSON object"))?;
        let identity = self.read(&claims, now)?;
        Ok(Checked { identity, valid_until: None })
    }

    fn take_apart<'a>(&self, token: &'a str) -> Result<Parts<'a>, Denied> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(malformed(&format!("it is longer than {TOKEN_BYTES_MAX} bytes: put less into it")));
        }
        let parts: Vec<_> = token.splitn(6, '.').collect();
        let (header, claims, signature) = match parts[..] {
            [header, claims, signature] => (header, claims, signature),
            [_, _, _, _, _] => return Err(malformed("it is encrypted; expected one that is only signed")),
            _ => return Err(malformed("expected three parts with dots between them")),
        };
        let message = &token.as_bytes()[..header.len() + 1 + claims.len()];
        let header = decode_object(header).ok_or_else(|| malformed("its first part is no JSON object"))?;
        if header.contains_key("crit") {
            return Err(malformed("its header demands extensions (`crit`), and there are none here"));
        }
        let kid = match header.get("kid") {
            None | Some(Value::Null) => None,
            Some(Value::String(kid)) => Some(kid.clone()),
            Some(_) => return Err(malformed("`kid` in its header: expected a string")),
        };
        let algorithm = match header.get("alg").and_then(Value::as_str) {
            Some(name) => Algorithm::named(name).ok_or_else(|| self.wrong_algorithm(None))?,
            None => return Err(malformed("`alg` in its header: expected a string")),
        };
        let signature =
            URL_SAFE_NO_PAD.decode(signature).map_err(|_| malformed("its third part is no base64url"))?;
        Ok(Parts { algorithm, kid, message, signature, claims })
    }

    async fn check_signature(&self, parts: &Parts<'_>) -> Result<(), Refusal> {
        let Parts { algorithm, kid, message, signature, .. } = parts;
        let candidates = || self.keys.iter().filter(|key| key.permits(*algorithm));
        if candidates().any(|key| key.verifies(*algorithm, message, signature)) {
            return Ok(());
        }
        // A secret is never among published keys, so nobody need be asked for one.
        let Some(jwks) = self.jwks.as_ref().filter(|_| !algorithm.is_symmetric()) else {
            let has_candidate = candidates().next().is_some();
            return Err(if has_candidate {
                wrong_signature()
            } else {
                self.wrong_algorithm(Some(*algorithm))
            }
            .into());
        };
        let keys = jwks.find(kid.as_deref()).await?;
        if !keys.iter().any(|key| key.permits(*algorithm)) {
            return Err(self.wrong_algorithm(Some(*algorithm)).into());
        }
        if keys.iter().any(|key| key.verifies(*algorithm, message, signature)) {
            return Ok(());
        }
        Err(wrong_signature().into())
    }

    fn read(&self, claims: &Claims, now: Timestamp) -> Result<Identity, Denied> {
        let expires_at = time(claims, "exp")?.ok_or_else(|| {
            mistyped("exp", "it is missing, and a token without an end is none: let the issuer write one")
        })?;
        if expires_at <= now {
            let detail = format!(
                "the token has ended (`exp`), because here it is {now}; get a new one from the issuer"
            );
            return Err(Denied::new("expired", detail));
        }
        if time(claims, "nbf")?.is_some_and(|begins_at| begins_at > now) {
            let detail = format!(
                "the token is not valid yet (`nbf`), because here it is {now}; are the clocks of both machines right?"
            );
            return Err(Denied::new("not_yet_valid", detail));
        }
        self.check_issuer(claims)?;
        self.check_audience(claims)?;
        let subject = present(claims, "sub").ok_or_else(|| {
            Denied::new(
                "no_user",
                "the token has no `sub`, which says whose it is; let the issuer write the user's id",
            )
        })?;
        let admin = match present(claims, "admin") {
            None => false,
            Some(Value::Bool(admin)) => *admin,
            Some(_) => return Err(mistyped("admin", "expected true or false")),
        };
        Ok(Identity {
            user: user(subject).map_err(|what| mistyped("sub", &what))?,
            projects: Projects::read(claims.get("projects")).map_err(|what| mistyped("projects", &what))?,
            admin,
            expires_at: Some(expires_at),
            issued_at: time(claims, "iat")?,
        })
    }

    fn check_issuer(&self, claims: &Claims) -> Result<(), Denied> {
        let Some(issuer) = &self.issuer else { return Ok(()) };
        if claims.get("iss").and_then(Value::as_str) == Some(issuer) {
            return Ok(());
        }
        let detail = "`iss` of the token is not TIDINGS_JWT_ISSUER; they must be equal, byte for byte";
        Err(Denied::new("issuer", detail))
    }

    fn check_audience(&self, claims: &Claims) -> Result<(), Denied> {
        let audiences: Vec<&str> = match present(claims, "aud") {
            None => Vec::new(),
            Some(Value::String(audience)) => vec![audience],
            Some(Value::Array(audiences)) => audiences
                .iter()
                .map(Value::as_str)
                .collect::<Option<_>>()
                .ok_or_else(|| mistyped("aud", "expected a string or a list of strings"))?,
            Some(_) => return Err(mistyped("aud", "expected a string or a list of strings")),
        };
        let detail = match &self.audience {
            Some(audience) if audiences.contains(&audience.as_str()) => return Ok(()),
            Some(_) => {
                "`aud` of the token does not have TIDINGS_JWT_AUDIENCE: the token was made for somebody else"
            }
            None if present(claims, "aud").is_none() => return Ok(()),
            // RFC 7519, 4.1.3.
            None => {
                "the token says for whom it is (`aud`), and TIDINGS_JWT_AUDIENCE is not set: set it to what `aud` says for \
                 this service"
            }
        };
        Err(Denied::new("audience", detail))
    }

    fn wrong_algorithm(&self, algorithm: Option<Algorithm>) -> Denied {
        let mut accepted: Vec<_> = self.keys.iter().flat_map(Key::algorithms).map(Algorithm::name).collect();
        accepted.dedup();
        if self.jwks.is_some() {
            accepted.push("what the keys at TIDINGS_JWKS_URL are for");
        }
        let (accepted, found) =
            (accepted.join(", "), algorithm.map_or("none that is known here", Algorithm::name));
        let mut detail =
            format!("the token is signed with {found}, and the keys of the settings are for {accepted}");
        if algorithm.is_some_and(Algorithm::is_symmetric) {
            detail.push_str("; is it signed with a secret that both sides have? Then set TIDINGS_JWT_SECRET");
        }
        Denied::new("algorithm", detail)
    }
}

fn malformed(what: &str) -> Denied {
    Denied::new("token_malformed", format!("the token cannot be read: {what}"))
}

fn wrong_signature() -> Denied {
    let detail = "the token is not signed with a key of the settings: the issuer's key and TIDINGS_JWT_SECRET, \
                  TIDINGS_JWT_PUBLIC_KEY or TIDINGS_JWKS_URL do not belong together, or somebody changed the token";
    Denied::new("signature", detail)
}

fn mistyped(claim: &str, what: &str) -> Denied {
    Denied::new("claims", format!("`{claim}` of the token: {what}"))
}

/// A claim; null counts as absent, as everywhere.
fn present<'a>(claims: &'a Claims, name: &str) -> Option<&'a Value> {
    claims.get(name).filter(|value| !value.is_null())
}

/// A claim that is a moment. A text is none here, even where it looks like one: what is compared with the clock must not be
/// open to interpretation.
fn time(claims: &Claims, name: &str) -> Result<Option<Timestamp>, Denied> {
    let expected = || mistyped(name, "expected a number of seconds since 1970-01-01T00:00:00Z");
    match present(claims, name) {
        None => Ok(None),
        Some(value @ Value::Number(_)) => moment(value).map(Some).map_err(|_| expected()),
        Some(_) => Err(expected()),
    }
}

fn decode_object(part: &str) -> Option<Claims> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}
