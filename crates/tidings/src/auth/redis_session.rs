//! The way `redis-session`: a session that the application keeps in Redis, under the id that its cookie holds.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use redis::{Value as RedisValue, cmd};
use serde_json::Value;
use tidings_engine::engine::redis::{Call, Fault, Servers};
use tidings_protocol::{Projects, Timestamp, UserId};
use tokio::time::Instant;

use super::{
    Checked, Denied, Refusal,
    identity::{Identity, Shape, Unreadable, user},
};

/// A session that was not asked about for longer than this may have ended.
const KNOWN_FOR: Duration = Duration::from_secs(5);
/// The longest id of a session.
const ID_BYTES_MAX: usize = 256;
/// A session larger than this is none of ours.
const SESSION_BYTES_MAX: usize = 1024 * 1024;
/// Keys in one command.
pub(super) const KEYS_AT_ONCE: usize = 512;
/// How deep what is packed may be nested.
const DEPTH_MAX: usize = 64;

/// How a session's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    /// JSON.
    Json,
    /// `MessagePack`, as Flask-Session writes it.
    MessagePack,
    /// The user's id alone, as fastapi-users writes it.
    Text,
}

/// Where sessions are and how they are read.
#[derive(Clone, Debug)]
pub(crate) struct SessionFormat {
    /// A key with `{id}` in it.
    pub(crate) key: Template,
    pub(crate) codec: Codec,
    pub(crate) shape: Shape,
    /// A key with `{user_id}` in it, whose value is a user's `projects`; `None`: the session has them.
    pub(crate) projects_key: Option<Template>,
}

/// A key with a place for a name in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    before: String,
    behind: String,
}

impl Template {
    /// Reads `before{name}behind`; else what was expected.
    pub(crate) fn parse(text: &str, name: &str) -> Result<Self, String> {
        let place = format!("{{{name}}}");
        match text.split_once(&place) {
            // Alone, it would let whoever sends a cookie name any key.
            Some((before, behind)) if !before.is_empty() && !behind.contains(&place) => {
                Ok(Self { before: before.to_owned(), behind: behind.to_owned() })
            }
            _ => Err(format!("expected a key with text before `{place}`, as `session:{place}`")),
        }
    }

    fn fill(&self, name: &str) -> String {
        format!("{}{name}{}", self.before, self.behind)
    }
}

/// Reads sessions.
#[derive(Debug)]
pub(crate) struct RedisSessions {
    servers: Arc<Servers>,
    format: SessionFormat,
}

/// A session, or why there is none.
type Read = Result<Checked, Refusal>;

impl RedisSessions {
    pub(crate) fn new(servers: Arc<Servers>, format: SessionFormat) -> Self {
        Self { servers, format }
    }

    /// Whose session has this id.
    pub(crate) async fn check(&self, id: &str, now: Timestamp) -> Read {
        self.check_all(&[id], now).await.pop().unwrap_or_else(|| Err(no_verdict("no answer")))
    }

    /// The same for many, in their order, in as few commands as it takes.
    pub(crate) async fn check_all(&self, ids: &[&str], now: Timestamp) -> Vec<Read> {
        let asked_at = Instant::now();
        let keys: Vec<_> = ids.iter().map(|id| is_id(id).then(|| self.format.key.fill(id))).collect();
        let known: Vec<_> = keys.iter().flatten().map(String::as_str).collect();
        let mut values = self.values(&known).await.into_iter();
        let documents: Vec<_> = keys
            .iter()
            .map(|key| match key {
                Some(_) => values.next().unwrap_or_else(|| Err(no_verdict("no answer"))),
                None => Err(Denied::new("session_malformed", "the cookie holds no id of a session").into()),
            })
            .map(|value| value.and_then(|value| self.identity(value.as_deref(), now)))
            .collect();
        let identities = self.with_projects(documents).await;
        let valid_until = Some(asked_at + KNOWN_FOR);
        identities.into_iter().map(|read| read.map(|identity| Checked { identity, valid_until })).collect()
    }

    /// Whether Redis can be asked.
    pub(crate) async fn is_reachable(&self) -> bool {
        let key = self.format.key.fill("tidings-probe");
        self.get(&key).await.is_ok()
    }

    /// What stands under each key; `None`: nothing.
    async fn values(&self, keys: &[&str]) -> Vec<Result<Option<Vec<u8>>, Refusal>> {
        if keys.len() < 2 || self.servers.is_cluster() {
            // In a Cluster they are in as many places. What is sent together goes out together.
            return join_all(keys.iter().map(|key| self.get(key))).await;
        }
        let chunks = keys.chunks(KEYS_AT_ONCE).map(|keys| self.get_many(keys));
        join_all(chunks).await.into_iter().flatten().collect()
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Refusal> {
        let mut get = cmd("GET");
        get.arg(key);
        let value = self.servers.call(&Call::repeatable(key, get)).await.map_err(|error| fault(&error))?;
        bytes(value)
    }

    async fn get_many(&self, keys: &[&str]) -> Vec<Result<Option<Vec<u8>>, Refusal>> {
        let mut get = cmd("MGET");
        get.arg(keys);
        let values = match self.servers.call(&Call::repeatable(keys[0], get)).await {
            Ok(RedisValue::Array(values)) if values.len() == keys.len() => values,
            Ok(_) => return vec![Err(no_verdict("Redis answered something else")); keys.len()],
            Err(error) => return vec![Err(fault(&error)); keys.len()],
        };
        // MGET says of a value of another type that there is none; whoever is to be sent away for that is asked about alone.
        join_all(keys.iter().zip(values).map(async |(key, value)| match bytes(value) {
            Ok(None) => self.get(key).await,
            found => found,
        }))
        .await
    }

    fn identity(&self, value: Option<&[u8]>, now: Timestamp) -> Result<Identity, Refusal> {
        let Some(value) = value else {
            let detail = format!(
                "Redis has no session under the key `{}`: it has ended, or TIDINGS_SESSION_KEY is not the application's",
                self.format.key.fill("…")
            );
            return Err(Denied::new("session_unknown", detail).into());
        };
        if value.len() > SESSION_BYTES_MAX {
            return Err(unreadable_session("a session is larger than 1 MiB"));
        }
        let identity = match self.format.codec {
            Codec::Json => {
                let document = serde_json::from_slice(value);
                self.format.shape.read(
                    &document
                        .map_err(|error| unreadable_session(format!("a session is not JSON: {error}")))?,
                )
            }
            Codec::MessagePack => self.format.shape.read(&unpacked(value)?),
            Codec::Text => whole_value(value),
        };
        let identity = identity.map_err(|unreadable| match unreadable {
            Unreadable::Nobody(denied) => Refusal::Denied(denied),
            Unreadable::Malformed(what) => unreadable_session(format!("a session cannot be read: {what}")),
        })?;
        if identity.expires_at.is_some_and(|expires_at| expires_at <= now) {
            return Err(Denied::new("session_expired", "the session's `expires_at` has passed").into());
        }
        Ok(identity)
    }

    /// Puts the projects of each user in, where they are kept apart from the sessions.
    async fn with_projects(
        &self,
        identities: Vec<Result<Identity, Refusal>>,
    ) -> Vec<Result<Identity, Refusal>> {
        let Some(template) = &self.format.projects_key else { return identities };
        let keys: Vec<_> =
            identities.iter().flatten().map(|identity| template.fill(identity.user.as_str())).collect();
        let keys: Vec<_> = keys.iter().map(String::as_str).collect();
        let mut values = self.values(&keys).await.into_iter();
        let with_projects = |identity: Identity| {
            let value = values.next().unwrap_or_else(|| Err(no_verdict("no answer")))?;
            let projects = match value {
                None => Projects::none(),
                Some(value) => {
                    let unreadable =
                        |what: String| no_verdict(format!("a user's projects cannot be read: {what}"));
                    let value: Value =
                        serde_json::from_slice(&value).map_err(|error| unreadable(error.to_string()))?;
                    Projects::read(Some(&value)).map_err(unreadable)?
                }
            };
            Ok(Identity { projects, ..identity })
        };
        let mut with_projects = with_projects;
        identities.into_iter().map(|identity| identity.and_then(&mut with_projects)).collect()
    }
}

/// Ids hold nothing that could reach beyond their place in a key.
fn is_id(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~+/=".contains(&byte);
    (1..=ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_allowed)
}

fn bytes(value: RedisValue) -> Result<Option<Vec<u8>>, Refusal> {
    match value {
        RedisValue::Nil => Ok(None),
        RedisValue::BulkString(bytes) => Ok(Some(bytes)),
        _ => Err(unreadable_session("Redis answered something else")),
    }
}

/// A value that is the user's id, and nothing else.
fn whole_value(value: &[u8]) -> Result<Identity, Unreadable> {
    let text = std::str::from_utf8(value).map_err(|_| Unreadable::Malformed("not UTF-8".to_owned()))?;
    let user: UserId = user(&Value::from(text)).map_err(Unreadable::Malformed)?;
    Ok(Identity { user, projects: Projects::none(), admin: false, expires_at: None, issued_at: None })
}

/// What is packed, as JSON has it. What JSON has no word for is null: nothing of that is asked for.
fn unpacked(mut value: &[u8]) -> Result<Value, Refusal> {
    let unreadable = |what: String| unreadable_session(format!("a session is not MessagePack: {what}"));
    let packed = rmpv::decode::read_value_with_max_depth(&mut value, DEPTH_MAX);
    let packed = packed.map_err(|error| unreadable(error.to_string()))?;
    if value.is_empty() {
        Ok(as_json(packed))
    } else {
        Err(unreadable("something stands behind it".to_owned()))
    }
}

fn as_json(packed: rmpv::Value) -> Value {
    match packed {
        rmpv::Value::Boolean(truth) => truth.into(),
        rmpv::Value::Integer(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => number.into(),
            (None, Some(number)) => number.into(),
            (None, None) => Value::Null,
        },
        rmpv::Value::F32(number) => f64::from(number).into(),
        rmpv::Value::F64(number) => number.into(),
        rmpv::Value::String(text) => text.into_str().map_or(Value::Null, Value::from),
        rmpv::Value::Array(items) => items.into_iter().map(as_json).collect(),
        rmpv::Value::Map(pairs) => pairs
            .into_iter()
            .filter_map(|(key, value)| match key {
                rmpv::Value::String(key) => Some((key.into_str()?, as_json(value))),
                _ => None,
            })
            .collect(),
        rmpv::Value::Nil | rmpv::Value::Binary(_) | rmpv::Value::Ext(..) => Value::Null,
    }
}

fn unreadable_session(what: impl Into<String>) -> Refusal {
    Refusal::Unreadable(what.into())
}

fn no_verdict(what: impl Into<String>) -> Refusal {
    Refusal::NoVerdict(what.into())
}

fn fault(fault: &Fault) -> Refusal {
    let is_of_key = fault.to_string().contains("WRONGTYPE");
    if is_of_key {
        return unreadable_session("what stands under the session's key is no string");
    }
    no_verdict(format!("Redis, which has the sessions, cannot be asked: {fault}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_something_before_its_one_place() {
        assert_eq!(Template::parse("session:{id}", "id").unwrap().fill("x"), "session:x");
        assert_eq!(Template::parse("s:{id}:v1", "id").unwrap().fill("x"), "s:x:v1");
        for text in ["", "{id}", "session:", "session:{user}", "s:{id}{id}", "session:{id"] {
            assert!(Template::parse(text, "id").is_err(), "{text}");
        }
    }

    #[test]
    fn an_id_cannot_reach_beyond_its_place() {
        for id in ["2f9c", "V1StGXR8_Z5jdHi6B-myT", "a.b", "eyJhIjoxfQ==.aSJOgA.IPe8-VX"] {
            assert!(is_id(id), "{id}");
        }
        for id in ["", "a:b", "a b", "a\r\nGET x", "{a}", "*", "a\0", "é", &"x".repeat(257)] {
            assert!(!is_id(id), "{id}");
        }
    }

    #[test]
    fn flasks_sessions_are_unpacked_and_rubbish_is_not() {
        let packed = b"\x83\xaa_permanent\xc3\xa7user_id\xa4u-42\xa8projects\x92\xa2p1\xa2p2";
        let identity = Shape::default().read(&unpacked(packed).unwrap()).unwrap();
        assert_eq!(identity.user.as_str(), "u-42");
        assert_eq!(identity.projects, Projects::listed(&["p1", "p2"]));
        // A date, bytes, and a key that is no text.
        let odd = b"\x84\xa7user_id\x07\xa1d\xd6\xff\x00\x00\x00\x00\xa1b\xc4\x01\xff\x01\x02";
        assert_eq!(Shape::default().read(&unpacked(odd).unwrap()).unwrap().user.as_str(), "7");
        for rubbish in [&b""[..], b"\x81", b"\x80\x00", &[0x91; 10_000]] {
            assert!(unpacked(rubbish).is_err());
        }
    }
}
