//! The way `signed-cookie`: a session that its cookie carries whole, as Starlette's `SessionMiddleware` signs it.
//!
//! The format is that of itsdangerous' `TimestampSigner` with its defaults (seen in Starlette 0.36 to 1.x with itsdangerous 2.2):
//! `base64(JSON) "." base64url(seconds since 1970) "." base64url(HMAC-SHA1)`, the latter two without padding, signed with
//! `SHA1("itsdangerous.Signer" "signer" SECRET)`.

use std::time::Duration;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::Value;
use sha1::{Digest as _, Sha1};
use tidings_protocol::Timestamp;

use super::{
    Checked, Denied, Refusal,
    identity::{Shape, Unreadable},
};

/// How far ahead the clock of whoever signs may be.
const AHEAD_MAX_S: i64 = 5;
/// A browser sends no larger cookie.
const COOKIE_BYTES_MAX: usize = 8192;

/// Verifies cookies.
pub(crate) struct SignedCookies {
    /// Derived from each secret that is accepted.
    keys: Vec<[u8; 20]>,
    max_age: Duration,
    shape: Shape,
}

impl std::fmt::Debug for SignedCookies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SignedCookies").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl SignedCookies {
    /// `secrets`: the application's, and former ones that are still good.
    pub(crate) fn new<'a>(secrets: impl Iterator<Item = &'a str>, max_age: Duration, shape: Shape) -> Self {
        let derive = |secret: &str| {
            let key = Sha1::new().chain_update(b"itsdangerous.Signer").chain_update(b"signer");
            key.chain_update(secret.as_bytes()).finalize().into()
        };
        Self { keys: secrets.map(derive).collect(), max_age, shape }
    }

    /// Whose session a cookie's value is.
    pub(crate) fn check(&self, cookie: &str, now: Timestamp) -> Result<Checked, Refusal> {
        let (payload, signed_at) = self.verified(cookie)?;
        let age_s = now.seconds_since(signed_at);
        let max_age_s = i64::try_from(self.max_age.as_secs()).unwrap_or(i64::MAX);
        if age_s > max_age_s {
            let detail =
                format!("the cookie was signed {age_s} s ago, and TIDINGS_SESSION_MAX_AGE is {max_age_s}");
            return Err(Denied::new("session_expired", detail).into());
        }
        if age_s < -AHEAD_MAX_S {
            let detail = format!("the cookie was signed {} s ahead of this machine's clock", -age_s);
            return Err(Denied::new("session_not_yet_valid", detail).into());
        }
        let malformed =
            |what: String| Denied::new("session_malformed", format!("the cookie's content: {what}"));
        let document: Value =
            serde_json::from_slice(&payload).map_err(|error| malformed(error.to_string()))?;
        let mut identity = self.shape.read(&document).map_err(|unreadable| match unreadable {
            Unreadable::Nobody(denied) => denied,
            Unreadable::Malformed(what) => malformed(what),
        })?;
        let ends_at = signed_at
            .as_microsecond()
            .checked_add(max_age_s.saturating_mul(1_000_000))
            .and_then(Timestamp::from_microsecond);
        identity.expires_at = identity.expires_at.into_iter().chain(ends_at).min();
        identity.issued_at = Some(signed_at);
        if identity.expires_at.is_some_and(|expires_at| expires_at <= now) {
            return Err(Denied::new("session_expired", "the session's `expires_at` has passed").into());
        }
        Ok(Checked { identity, valid_until: None })
    }

    /// What a cookie's signature is for: its content, and when it was signed.
    fn verified(&self, cookie: &str) -> Result<(Vec<u8>, Timestamp), Denied> {
        let malformed = || {
            let detail = "expected a cookie of Starlette's SessionMiddleware: content, time and signature with dots between";
            Denied::new("session_malformed", detail)
        };
        if cookie.len() > COOKIE_BYTES_MAX {
            return Err(malformed());
        }
        let (signed, signature) = cookie.rsplit_once('.').ok_or_else(malformed)?;
        let (payload, time) = signed.rsplit_once('.').ok_or_else(malformed)?;
        // What is no signature at all is no better than a wrong one.
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap_or_default();
        let is_signed_by = |key: &[u8; 20]| {
            let mut mac = Hmac::<Sha1>::new_from_slice(key).expect("a key of any length is good");
            mac.update(signed.as_bytes());
            // In constant time.
            mac.verify_slice(&signature).is_ok()
        };
        // Each is tried, so that the time says nothing about which it was.
        if self.keys.iter().filter(|key| is_signed_by(key)).count() == 0 {
            let detail = "the cookie is not signed with any of TIDINGS_SESSION_SECRET: is it the application's `secret_key`?";
            return Err(Denied::new("session_signature", detail));
        }
        let payload = STANDARD.decode(payload).map_err(|_| malformed())?;
        let time = URL_SAFE_NO_PAD.decode(time).map_err(|_| malformed())?;
        let seconds = time.iter().try_fold(0_i64, |seconds, byte| {
            seconds.checked_mul(256).map(|seconds| seconds | i64::from(*byte))
        });
        let time =
            seconds.and_then(|seconds| seconds.checked_mul(1_000_000)).and_then(Timestamp::from_microsecond);
        Ok((payload, time.ok_or_else(malformed)?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tidings_protocol::Projects;

    use super::*;

    const FORTNIGHT: Duration = Duration::from_hours(14 * 24);
    /// Made by Starlette 1.10.0 and itsdangerous 2.2.0.
    const SECRET: &str = "s3cr3t-key";
    const COOKIE: &str =
        "eyJ1c2VyX2lkIjogInUtNDIiLCAicHJvamVjdHMiOiBbInAxIiwgInAyIl19.aSJOgA.IPe8-VX_c6cqXyAj7cJknZA3EIE";
    const SIGNED_AT: i64 = 1_763_856_000;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_microsecond(seconds * 1_000_000).unwrap()
    }

    fn cookies(secrets: &[&str]) -> SignedCookies {
        SignedCookies::new(secrets.iter().copied(), FORTNIGHT, Shape::default())
    }

    fn signed(document: &Value, seconds: i64) -> String {
        let bytes = seconds.to_be_bytes();
        let bytes = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
        let signed = format!("{}.{}", STANDARD.encode(document.to_string()), URL_SAFE_NO_PAD.encode(bytes));
        let mut mac = Hmac::<Sha1>::new_from_slice(&cookies(&[SECRET]).keys[0]).unwrap();
        mac.update(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
    }

    fn code(cookie: &str, seconds: i64) -> &'static str {
        match cookies(&[SECRET]).check(cookie, at(seconds)) {
            Ok(_) => "",
            Err(Refusal::Denied(denied)) => denied.code,
            Err(unknown) => panic!("{unknown:?}"),
        }
    }

    #[test]
    fn a_cookie_of_starlette_is_read_also_with_a_secret_that_was_replaced() {
        for secrets in [&[SECRET][..], &["a newer secret key", SECRET]] {
            let checked = cookies(secrets).check(COOKIE, at(SIGNED_AT + 60)).unwrap();
            assert_eq!(checked.identity.user.as_str(), "u-42");
            assert_eq!(checked.identity.projects, Projects::listed(&["p1", "p2"]));
            assert_eq!(checked.identity.issued_at, Some(at(SIGNED_AT)));
            assert_eq!(checked.identity.expires_at, Some(at(SIGNED_AT + 14 * 24 * 3600)));
            assert!(checked.valid_until.is_none());
        }
        assert_eq!(signed(&json!({"user_id": "u"}), SIGNED_AT).rsplit('.').nth(1), Some("aSJOgA"));
    }

    #[test]
    fn what_was_not_signed_with_the_secret_is_refused() {
        assert!(cookies(&["another secret"]).check(COOKIE, at(SIGNED_AT)).is_err());
        let now = SIGNED_AT + 60;
        let (signed, signature) = COOKIE.rsplit_once('.').unwrap();
        let (payload, time) = signed.rsplit_once('.').unwrap();
        let other = STANDARD.encode(r#"{"user_id": "u-42", "projects": "*"}"#);
        for forged in [
            format!("{other}.{time}.{signature}"),
            format!("{payload}.aSJOgB.{signature}"),
            format!("{payload}.{time}.{}", &signature[1..]),
            format!("{payload}.{time}.{}A", &signature[..26]),
            format!("{payload}.{time}."),
        ] {
            assert_eq!(code(&forged, now), "session_signature", "{forged}");
        }
        for rubbish in ["", ".", "a", &format!("{payload}.{signature}")[..20], &"x".repeat(10_000)] {
            assert_eq!(code(rubbish, now), "session_malformed", "{rubbish}");
        }
        for rubbish in ["..", "a.b.c", "\u{e9}.\u{e9}.\u{e9}"] {
            assert_eq!(code(rubbish, now), "session_signature", "{rubbish}");
        }
    }

    #[test]
    fn a_cookie_is_good_for_its_time() {
        let cookie = signed(&json!({"user_id": 7}), SIGNED_AT);
        for (seconds, expected) in [
            (SIGNED_AT, ""),
            (SIGNED_AT + 14 * 24 * 3600 - 1, ""),
            (SIGNED_AT + 14 * 24 * 3600 + 1, "session_expired"),
            (SIGNED_AT - AHEAD_MAX_S, ""),
            (SIGNED_AT - AHEAD_MAX_S - 1, "session_not_yet_valid"),
        ] {
            assert_eq!(code(&cookie, seconds), expected, "{}", seconds - SIGNED_AT);
        }
        let ends = signed(&json!({"user_id": 7, "expires_at": SIGNED_AT + 10}), SIGNED_AT);
        assert_eq!((code(&ends, SIGNED_AT + 9), code(&ends, SIGNED_AT + 10)), ("", "session_expired"));
        // Beyond any calendar.
        let mut mac = Hmac::<Sha1>::new_from_slice(&cookies(&[SECRET]).keys[0]).unwrap();
        mac.update(b"e30=._________w");
        let never = format!("e30=._________w.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
        assert_eq!(code(&never, SIGNED_AT), "session_malformed");
    }

    #[test]
    fn a_session_of_nobody_and_one_that_cannot_be_read_are_refused() {
        assert_eq!(code(&signed(&json!({}), SIGNED_AT), SIGNED_AT), "no_user");
        for document in [json!([]), json!({"user_id": []}), json!({"user_id": "u", "projects": 7})] {
            assert_eq!(code(&signed(&document, SIGNED_AT), SIGNED_AT), "session_malformed", "{document}");
        }
    }
}
