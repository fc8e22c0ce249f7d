//! What a session, a token or an answer says about somebody.

use serde_json::Value;
use tidings_protocol::{Projects, Timestamp, UserId};

use super::Denied;

/// Who somebody is and what he may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) user: UserId,
    pub(crate) projects: Projects,
    /// The console and the operator's routes.
    pub(crate) admin: bool,
    /// When it ends for good; `None`: whoever gave it says so.
    pub(crate) expires_at: Option<Timestamp>,
    /// When it was given, where it says so.
    pub(crate) issued_at: Option<Timestamp>,
}

/// Where a document has what: JSON Pointers (RFC 6901).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) user: String,
    pub(crate) projects: String,
}

impl Default for Shape {
    /// `{"user_id", "projects", "expires_at"?, "admin"?}`.
    fn default() -> Self {
        Self { user: "/user_id".to_owned(), projects: "/projects".to_owned() }
    }
}

/// Why a document says nothing about anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// It is one of nobody: it has no user. A definite no.
    Nobody(Denied),
    /// It is not what was expected, so that it says neither yes nor no. What was expected where.
    Malformed(String),
}

impl Shape {
    /// Reads a document.
    pub(crate) fn read(&self, document: &Value) -> Result<Identity, Unreadable> {
        let malformed = |place: &str, what: String| Unreadable::Malformed(format!("{place}: {what}"));
        if !document.is_object() {
            return Err(Unreadable::Malformed("expected an object".to_owned()));
        }
        let user = match document.pointer(&self.user) {
            None | Some(Value::Null) => {
                let detail = format!("the session has no `{}`: nobody is logged in", self.user);
                return Err(Unreadable::Nobody(Denied::new("no_user", detail)));
            }
            Some(value) => user(value).map_err(|what| malformed(&self.user, what))?,
        };
        let projects = Projects::read(document.pointer(&self.projects));
        let projects = projects.map_err(|what| malformed(&self.projects, what))?;
        let expires_at = document.get("expires_at").filter(|value| !value.is_null()).map(moment).transpose();
        let expires_at = expires_at.map_err(|what| malformed("/expires_at", what))?;
        let admin = match document.get("admin") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(admin)) => *admin,
            Some(_) => return Err(malformed("/admin", "expected true or false".to_owned())),
        };
        Ok(Identity { user, projects, admin, expires_at, issued_at: None })
    }
}

/// A user's id: a string or an integer.
pub(crate) fn user(value: &Value) -> Result<UserId, String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_i64() || number.is_u64() => number.to_string(),
        _ => return Err("expected a string or an integer".to_owned()),
    };
    UserId::try_from(text.as_str()).map_err(|error| error.to_string())
}

/// A moment: seconds since 1970-01-01T00:00:00Z, with or without a fraction, or a timestamp (RFC 3339).
pub(crate) fn moment(value: &Value) -> Result<Timestamp, String> {
    const EXPECTED: &str = "expected seconds since 1970 or a timestamp as `2026-11-23T10:00:00Z`";
    let found = match value {
        Value::Number(number) => match number.as_i64() {
            Some(seconds) => seconds.checked_mul(1_000_000).and_then(Timestamp::from_microsecond),
            // Whoever writes fractions means them; to the microsecond they are exact for centuries.
            None => number
                .as_f64()
                .map(|seconds| seconds * 1e6)
                .and_then(whole)
                .and_then(Timestamp::from_microsecond),
        },
        Value::String(text) => Timestamp::parse(text),
        _ => None,
    };
    found.ok_or_else(|| EXPECTED.to_owned())
}

/// The whole part, where an `i64` has it.
fn whole(number: f64) -> Option<i64> {
    // Up to here every whole number has a double of its own.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    #[allow(clippy::cast_possible_truncation, reason = "within what both types have")]
    (number.abs() <= EXACT_MAX).then(|| number.trunc() as i64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(document: &Value) -> Result<Identity, Unreadable> {
        Shape::default().read(document)
    }

    #[test]
    fn a_document_is_read_as_the_contract_has_it() {
        let document = json!({"user_id": 7, "projects": ["p1", "team-a/*"], "expires_at": 1_800_000_000, "admin": true, "more": []});
        let identity = read(&document).unwrap();
        assert_eq!(identity.user.as_str(), "7");
        assert_eq!(identity.projects, Projects::listed(&["p1", "team-a/*"]));
        assert_eq!(identity.expires_at.unwrap().to_string(), "2027-01-15T08:00:00.000000Z");
        assert!(identity.admin);
        let bare = read(&json!({"user_id": "u-1", "expires_at": null})).unwrap();
        assert_eq!((bare.projects, bare.expires_at, bare.admin), (Projects::none(), None, false));
        let nested = Shape { user: "/auth/0/id".to_owned(), projects: "/auth/0/may".to_owned() };
        let identity = nested.read(&json!({"auth": [{"id": "u", "may": "*"}]})).unwrap();
        assert!(identity.projects.is_everything());
    }

    #[test]
    fn a_moment_is_a_number_of_seconds_or_a_timestamp() {
        for value in [
            json!(1_800_000_000),
            json!(1_800_000_000.0),
            json!("2027-01-15T08:00:00Z"),
            json!("2027-01-15T09:00:00+01:00"),
        ] {
            assert_eq!(moment(&value).unwrap().to_string(), "2027-01-15T08:00:00.000000Z", "{value}");
        }
        assert_eq!(moment(&json!(0.5)).unwrap().to_string(), "1970-01-01T00:00:00.500000Z");
        for value in
            [json!("soon"), json!(true), json!(i64::MAX), json!(1e300), json!("1800000000"), json!([])]
        {
            assert!(moment(&value).is_err(), "{value}");
        }
    }

    #[test]
    fn nobody_is_a_no_and_rubbish_is_no_verdict() {
        for document in [json!({}), json!({"user_id": null, "projects": "*"}), json!({"_permanent": true})] {
            assert!(matches!(read(&document), Err(Unreadable::Nobody(_))), "{document}");
        }
        for (document, words) in [
            (json!([]), "an object"),
            (json!({"user_id": {}}), "/user_id: expected a string or an integer"),
            (json!({"user_id": 1.5}), "/user_id: expected a string or an integer"),
            (json!({"user_id": ""}), "/user_id: expected 1 to 200 bytes"),
            (json!({"user_id": "a\u{202e}b"}), "/user_id: expected no control"),
            (json!({"user_id": "u", "projects": "p1"}), "/projects: expected a list"),
            (json!({"user_id": "u", "expires_at": "soon"}), "/expires_at: expected seconds"),
            (json!({"user_id": "u", "admin": "yes"}), "/admin: expected true or false"),
        ] {
            let Err(Unreadable::Malformed(what)) = read(&document) else { panic!("{document}") };
            assert!(what.contains(words), "{document}: {what}");
        }
    }
}
