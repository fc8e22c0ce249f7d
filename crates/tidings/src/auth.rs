//! Who somebody is, and what he may see: the ways of `TIDINGS_AUTH`, tried in their order, and what follows from them for as long as
//! somebody is connected. Knows no stream, and of a connection only that it has a session.

mod callback;
mod digest;
mod following;
mod http;
mod identity;
pub(crate) mod jwt;
#[cfg(test)]
mod outside;
mod presented;
mod redis_session;
mod revocations;
mod sessions;
mod signed_cookie;
mod tickets;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::http::HeaderMap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tidings_engine::{driver::ShardHandle, engine::redis::Servers, vigil::Vigil};
use tidings_protocol::{Projects, Timestamp, UserId};
use tokio::time::Instant;

use crate::config::{Secret, Settings};

use callback::Callback;
use digest::Digest;
use jwt::Jwt;
use redis_session::RedisSessions;
use revocations::{Revocation, Revocations, Whom};
use sessions::{Sessions, Source};
use signed_cookie::SignedCookies;
use tickets::{Admits, Somebody, Tickets};

pub(crate) use identity::{Identity, Shape, moment, user};
pub(crate) use presented::Presented;

pub(crate) use redis_session::{Codec, SessionFormat, Template};
pub(crate) use sessions::Session;
pub(crate) use tickets::GOOD_FOR as TICKET_GOOD_FOR;

/// What one of the ways found out.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    /// Who it is.
    pub(crate) identity: Identity,
    /// Up to when it can be relied on without asking again; `None`: to its end.
    pub(crate) valid_until: Option<Instant>,
}

/// Why somebody is not let in.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    /// A definite no.
    Denied(Denied),
    /// It cannot be found out at present: neither yes nor no. The words are for logs and developers, and hold no secret.
    NoVerdict(String),
    /// What was found cannot be read: neither yes nor no, and that of this one alone.
    Unreadable(String),
}

/// A definite no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    /// Stable, for programs, metrics and production.
    pub(crate) code: &'static str,
    /// For the developer: the rule, and how to mend it. Holds no secret.
    pub(crate) detail: String,
}

impl Denied {
    pub(crate) fn new(code: &'static str, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

/// For anybody outside to answer who is asked about a credential.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A way, by its name in `TIDINGS_AUTH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WayName {
    /// The application's sessions in Redis.
    RedisSession,
    /// Starlette's signed cookie.
    SignedCookie,
    /// JSON Web Tokens.
    Jwt,
    /// One-time tickets.
    Ticket,
    /// The application is asked.
    Callback,
}

/// Where nodes that share streams keep what they must agree on.
pub(crate) enum Shared<'a> {
    /// In the Redis that keeps the streams.
    Redis(Arc<Servers>),
    /// In the data folder of the only node.
    Folder(&'a Path),
    /// In its memory.
    Nothing,
}

/// Everything that decides about sessions.
#[derive(Debug)]
pub(crate) struct Auth {
    /// Empty: nobody is asked.
    order: Vec<WayName>,
    redis_sessions: Option<RedisSessions>,
    signed_cookies: Option<SignedCookies>,
    jwt: Option<Jwt>,
    callback: Option<Callback>,
    tickets: Tickets,
    names: presented::Names,
    sessions: Arc<Sessions>,
    revocations: Revocations,
    /// Held while new revocations are acted on.
    acting: Mutex<()>,
    vigil: Arc<Vigil>,
    /// The application could not be asked when it was last tried.
    callback_silent: AtomicBool,
    /// Sessions of connections that could not be read when they were last looked at.
    unreadable: AtomicUsize,
}

impl Auth {
    /// `sessions_at`: the Redis that has the application's sessions.
    pub(crate) fn new(
        settings: &Settings,
        sessions_at: Option<Arc<Servers>>,
        shared: Shared<'_>,
        shards: Vec<ShardHandle>,
        vigil: Arc<Vigil>,
    ) -> std::io::Result<Self> {
        let settings = &settings.auth;
        let session = &settings.session;
        let has = |way| settings.ways.contains(&way);
        let (tickets, revocations) = match shared {
            Shared::Redis(servers) => {
                (Tickets::in_redis(Arc::clone(&servers)), Revocations::in_redis(servers))
            }
            Shared::Folder(folder) => (Tickets::in_memory(), Revocations::in_folder(folder)?),
            Shared::Nothing => (Tickets::in_memory(), Revocations::in_memory()),
        };
        Ok(Self {
            redis_sessions: sessions_at
                .filter(|_| has(WayName::RedisSession))
                .map(|servers| RedisSessions::new(servers, session.format.clone())),
            signed_cookies: has(WayName::SignedCookie).then(|| {
                SignedCookies::new(
                    session.secrets.iter().map(Secret::reveal),
                    session.max_age,
                    session.format.shape.clone(),
                )
            }),
            jwt: settings.jwt.as_ref().filter(|_| has(WayName::Jwt)).map(Jwt::new),
            callback: settings.callback.as_ref().filter(|_| has(WayName::Callback)).map(Callback::new),
            tickets,
            names: presented::Names {
                session_cookie: session.cookie.clone(),
                token_cookie: settings.jwt.as_ref().map(|jwt| jwt.cookie.clone()).unwrap_or_default(),
            },
            sessions: Arc::new(Sessions::new(shards)),
            revocations,
            acting: Mutex::new(()),
            vigil,
            callback_silent: AtomicBool::new(false),
            unreadable: AtomicUsize::new(0),
            order: settings.ways.clone(),
        })
    }

    /// Whether nobody is asked.
    pub(crate) fn is_none(&self) -> bool {
        self.order.is_empty()
    }

    /// Whether a ticket would let anybody in.
    pub(crate) fn takes_tickets(&self) -> bool {
        self.order.contains(&WayName::Ticket)
    }

    /// What cannot be found out at present, beside what is watched as a part of a source.
    pub(crate) fn troubles(&self) -> Vec<String> {
        let silent = self.callback_silent.load(Ordering::Relaxed);
        let silent =
            silent.then(|| "the application (TIDINGS_AUTH_URL) cannot be asked who anybody is".to_owned());
        let unreadable = self.unreadable.load(Ordering::Relaxed);
        let unreadable = (unreadable > 0)
            .then(|| format!("{unreadable} sessions in Redis cannot be read; their connections get nothing"));
        silent.into_iter().chain(unreadable).collect()
    }

    /// Whose request it is; `None`: nobody is asked, and everybody may see everything.
    pub(crate) async fn authenticate(
        &self,
        headers: &HeaderMap,
        is_websocket: bool,
    ) -> Result<Option<Session>, Refusal> {
        if self.is_none() {
            return Ok(None);
        }
        let presented = Presented::read(headers, is_websocket, &self.names);
        let (mut denied, mut no_verdict) = (None, None);
        for &way in &self.order {
            for credential in presented.credentials(way) {
                match self.authenticate_by(way, credential).await {
                    Ok(session) => return Ok(Some(session)),
                    Err(Refusal::Denied(why)) => denied = denied.or(Some(why)),
                    Err(unknown) => no_verdict = no_verdict.or(Some(unknown)),
                }
            }
        }
        Err(match (no_verdict, denied) {
            // It might have been a yes.
            (Some(unknown), _) => unknown,
            (None, Some(denied)) => denied.into(),
            (None, None) => Denied::new("no_credentials", self.what_is_looked_for(is_websocket)).into(),
        })
    }

    async fn authenticate_by(&self, way: WayName, credential: &str) -> Result<Session, Refusal> {
        match way {
            WayName::Ticket => match self.tickets.spend(credential).await? {
                Admits::Credential { way, credential } => self.check_in(way, &credential).await,
                Admits::Somebody(somebody) => {
                    let (identity, session) = somebody.into_identity().ok_or_else(|| {
                        Denied::new(
                            "ticket_unknown",
                            "the ticket cannot be read; nodes of different versions?",
                        )
                    })?;
                    if identity.expires_at.is_some_and(|expires_at| expires_at <= now()) {
                        return Err(Denied::new(
                            "session_expired",
                            "what the ticket was given for has expired",
                        )
                        .into());
                    }
                    let id =
                        Digest::of(format!("ticket {session} {}", identity.projects.to_value()).as_bytes());
                    self.admit(id, session, Source::Itself, Checked { identity, valid_until: None })
                }
            },
            way => self.check_in(way, credential).await,
        }
    }

    /// Finds out about a credential, and lets its session in.
    async fn check_in(&self, way: WayName, credential: &str) -> Result<Session, Refusal> {
        let session = Digest::of(credential.as_bytes());
        let (source, checked) = match way {
            WayName::RedisSession => {
                let sessions = self.redis_sessions.as_ref().ok_or_else(not_configured)?;
                (Source::Redis(credential.to_owned()), sessions.check(credential, now()).await?)
            }
            WayName::SignedCookie => {
                let cookies = self.signed_cookies.as_ref().ok_or_else(not_configured)?;
                (Source::Itself, cookies.check(credential, now())?)
            }
            WayName::Jwt => {
                let jwt = self.jwt.as_ref().ok_or_else(not_configured)?;
                (Source::Itself, jwt.check(credential, now()).await?)
            }
            WayName::Callback => {
                let callback = self.callback.as_ref().ok_or_else(not_configured)?;
                let answer = callback.check(credential, false).await;
                self.note_callback(&answer);
                (Source::Callback(credential.to_owned()), answer?)
            }
            // A ticket is never given for a ticket.
            WayName::Ticket => return Err(not_configured()),
        };
        let id = Digest::of(format!("{way:?} {credential}").as_bytes());
        self.admit(id, session, source, checked)
    }

    fn admit(
        &self,
        id: Digest,
        session: Digest,
        source: Source,
        checked: Checked,
    ) -> Result<Session, Refusal> {
        let Ok(revocations_known_until) = self.revocations.known_until() else {
            return Err(Refusal::NoVerdict("Redis, which has the revocations, cannot be read".to_owned()));
        };
        self.act_on_new();
        let (user, issued_at) = (checked.identity.user.clone(), checked.identity.issued_at);
        let is_stored = !matches!(source, Source::Itself);
        let admitted = self.sessions.enter(id, session, source, checked, revocations_known_until);
        // Asked after it was let in: what is revoked from here on finds it.
        if self.revocations.cover_session(session) {
            return Err(Denied::new("revoked", "the session was revoked").into());
        }
        if !is_stored && self.revocations.cover_user(&user, issued_at) {
            let detail = "what this user was given up to a moment was revoked: log in again (a token needs `iat` to be told from those)";
            return Err(Denied::new("revoked", detail).into());
        }
        Ok(admitted)
    }

    /// Gives out a ticket for whoever has the session that a request came with.
    pub(crate) async fn ticket_for(&self, session: Option<&Session>) -> Result<String, Refusal> {
        let session = session.ok_or_else(|| Denied::new("no_credentials", "nobody is asked here"))?;
        let admits = match session.entry().source() {
            Source::Itself => Admits::Somebody(Somebody::new(&session.identity(), session.entry().session())),
            Source::Redis(id) => Admits::Credential { way: WayName::RedisSession, credential: id.clone() },
            Source::Callback(cookie) => {
                Admits::Credential { way: WayName::Callback, credential: cookie.clone() }
            }
        };
        self.tickets.give(admits).await
    }

    /// Gives out a ticket for somebody whom the application has named.
    pub(crate) async fn ticket_of(
        &self,
        user: UserId,
        projects: Projects,
        admin: bool,
        expires_at: Option<Timestamp>,
    ) -> Result<String, Refusal> {
        let identity = Identity { user, projects, admin, expires_at, issued_at: Some(now()) };
        // It has no other session than itself, which only its user's revocation ends.
        let session = Digest::of(format!("ticket of {} {:?}", identity.user, identity.issued_at).as_bytes());
        self.tickets.give(Admits::Somebody(Somebody::new(&identity, session))).await
    }

    /// Ends whatever the user was given until now.
    pub(crate) async fn revoke_user(&self, user: UserId) -> Result<(), String> {
        self.revocations.add(Revocation::now(Whom::User(user))).await
    }

    /// Ends a session, a token or a cookie.
    pub(crate) async fn revoke_session(&self, credential: &str) -> Result<(), String> {
        let digest = Digest::of(credential.as_bytes());
        self.revocations.add(Revocation::now(Whom::Session(digest.to_string()))).await
    }

    /// For a developer whose request came with nothing.
    fn what_is_looked_for(&self, is_websocket: bool) -> String {
        let mut looked_for: Vec<_> = self
            .order
            .iter()
            .filter(|way| is_websocket || **way != WayName::Ticket)
            .map(|way| match way {
                WayName::RedisSession | WayName::SignedCookie => {
                    format!("the cookie `{}`", self.names.session_cookie)
                }
                WayName::Jwt => {
                    "`Authorization: Bearer TOKEN`, a cookie, or the subprotocol `tidings.jwt.TOKEN`"
                        .to_owned()
                }
                WayName::Ticket => "the subprotocol `tidings.ticket.TICKET`".to_owned(),
                WayName::Callback => "a cookie of the application".to_owned(),
            })
            .collect();
        looked_for.dedup();
        format!("the request came with nothing that says whose it is; expected {}", looked_for.join(", or "))
    }
}

fn not_configured() -> Refusal {
    Refusal::NoVerdict(
        "this way is not configured on this node; its settings differ from another's".to_owned(),
    )
}

fn now() -> Timestamp {
    jiff::Timestamp::now().into()
}
