//! The keys of an issuer that publishes them: a JSON Web Key Set (RFC 7517), fetched when a token needs it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::http::{StatusCode, Uri};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use super::Key;
use crate::auth::{ANSWER_TIMEOUT, Denied, Refusal, http::Http};

const BYTES_MAX: usize = 256 << 10;
/// Keys that are older are fetched anew while they go on being used.
const FRESH: Duration = Duration::from_mins(10);
/// For so long they are used when no fetch succeeds. What an issuer withdrew meanwhile is believed for as long.
const USABLE: Duration = Duration::from_hours(24);
/// Between two fetches, whatever key a token names: whoever makes tokens up shall not make the issuer work.
const PAUSE: Duration = Duration::from_secs(30);
/// The same while there are no keys at all, so that nobody waits long for an issuer that is back.
const PAUSE_WITHOUT_KEYS: Duration = Duration::from_secs(5);

/// The keys of one issuer. They are found by it and by `kid`: there is one of these for each issuer, and what another one
/// publishes under the same `kid` is in another.
pub(super) struct Jwks(Arc<Inner>);

struct Inner {
    http: Http,
    /// As the settings have it; nothing that a token says goes into it.
    url: Uri,
    /// Fetches go on when those that wait for them have gone, because others will ask for the same.
    tasks: TaskTracker,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What was fetched, and when.
    fetched: Option<(Arc<KeySet>, Instant)>,
    /// When the last fetch began.
    begun: Option<Instant>,
    /// What the last fetch failed with.
    failure: Option<String>,
    /// The one that is under way.
    fetching: Option<Fetching>,
}

type Fetching = Shared<BoxFuture<'static, ()>>;

#[derive(Default)]
struct KeySet {
    by_kid: HashMap<String, Vec<Key>>,
    /// The key, where it is the only one: then a token need not name it.
    only: Option<Key>,
}

impl Jwks {
    /// Fetches nothing yet.
    pub(super) fn new(url: &Uri) -> Self {
        Self(Arc::new(Inner {
            http: Http::new(url),
            url: url.clone(),
            tasks: TaskTracker::new(),
            state: Mutex::default(),
        }))
    }

    /// The keys of this name; without one, the only key of the set. Not empty.
    pub(super) async fn find(&self, kid: Option<&str>) -> Result<Vec<Key>, Refusal> {
        let fetching = {
            let mut state = self.0.state.lock();
            let found = state.find(kid);
            let is_needed = found.is_none() || state.age().is_none_or(|age| age > FRESH);
            if is_needed && state.fetching.is_none() && state.may_fetch() {
                Inner::fetch(&self.0, &mut state);
            }
            if let Some(keys) = found {
                return Ok(keys);
            }
            state.fetching.clone()
        };
        if let Some(fetching) = fetching {
            fetching.await;
        }
        let state = self.0.state.lock();
        state.find(kid).ok_or_else(|| state.refusal(kid))
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.0.state.lock().fetching.is_none()
    }
}

impl State {
    fn age(&self) -> Option<Duration> {
        self.fetched.as_ref().map(|(_, at)| at.elapsed())
    }

    fn usable(&self) -> Option<&KeySet> {
        self.fetched.as_ref().filter(|(_, at)| at.elapsed() <= USABLE).map(|(keys, _)| &**keys)
    }

    fn find(&self, kid: Option<&str>) -> Option<Vec<Key>> {
        self.usable()?.find(kid)
    }

    fn may_fetch(&self) -> bool {
        let pause = if self.usable().is_some() { PAUSE } else { PAUSE_WITHOUT_KEYS };
        self.begun.is_none_or(|at| at.elapsed() >= pause)
    }

    fn refusal(&self, kid: Option<&str>) -> Refusal {
        if let Some(failure) = &self.failure {
            return Refusal::NoVerdict(failure.clone());
        }
        let detail = match kid {
            None => "the token names no key (`kid` in its header), and TIDINGS_JWKS_URL has not exactly one that can be \
                     meant: let the issuer write `kid`"
                .to_owned(),
            Some(kid) => format!(
                "there is no key `{}` for signatures at TIDINGS_JWKS_URL: the token is of another issuer, its key was \
                 withdrawn, or it is newer than {} s",
                shown(kid),
                PAUSE.as_secs()
            ),
        };
        Denied::new("unknown_key", detail).into()
    }
}

impl Inner {
    /// Begins a fetch. There is none under way.
    fn fetch(this: &Arc<Self>, state: &mut State) {
        state.begun = Some(Instant::now());
        let inner = Arc::clone(this);
        let fetching = async move {
            let outcome = inner.ask().await;
            let mut state = inner.state.lock();
            state.fetching = None;
            match outcome {
                Ok(keys) => {
                    tracing::debug!(keys = keys.by_kid.len(), "the keys at TIDINGS_JWKS_URL were fetched");
                    state.fetched = Some((Arc::new(keys), Instant::now()));
                    state.failure = None;
                }
                Err(failure) => {
                    tracing::warn!(failure, "no keys were fetched");
                    state.failure = Some(failure);
                }
            }
        };
        let fetching = fetching.boxed().shared();
        this.tasks.spawn(fetching.clone());
        state.fetching = Some(fetching);
    }

    async fn ask(&self) -> Result<KeySet, String> {
        let seconds = ANSWER_TIMEOUT.as_secs();
        let answer = timeout(ANSWER_TIMEOUT, self.http.get(&self.url, None, BYTES_MAX))
            .await
            .map_err(|_| format!("TIDINGS_JWKS_URL does not answer within {seconds} s"))?
            .map_err(|error| format!("TIDINGS_JWKS_URL {error}"))?;
        match answer.status {
            StatusCode::OK => {}
            status if status.is_redirection() => {
                return Err(format!(
                    "TIDINGS_JWKS_URL answers {}: redirects are not followed, so it must be where the keys are",
                    status.as_u16()
                ));
            }
            status => return Err(format!("TIDINGS_JWKS_URL answers {}", status.as_u16())),
        }
        KeySet::read(&answer.body)
            .ok_or_else(|| "TIDINGS_JWKS_URL answers with no key set: expected `{\"keys\": […]}`".to_owned())
    }
}

impl KeySet {
    /// What is no key for signatures is passed over (RFC 7517, 5).
    fn read(body: &[u8]) -> Option<Self> {
        let document: Value = serde_json::from_slice(body).ok()?;
        let keys: Vec<_> = document.get("keys")?.as_array()?.iter().filter_map(Key::from_jwk).collect();
        let mut set = Self::default();
        if let [(_, only)] = &keys[..] {
            set.only = Some(only.clone());
        }
        for (kid, key) in keys {
            if let Some(kid) = kid {
                set.by_kid.entry(kid).or_default().push(key);
            }
        }
        Some(set)
    }

    fn find(&self, kid: Option<&str>) -> Option<Vec<Key>> {
        match kid {
            Some(kid) => self.by_kid.get(kid).cloned(),
            None => self.only.clone().map(|key| vec![key]),
        }
    }
}

/// What a stranger wrote, so that a log and a terminal bear it.
fn shown(kid: &str) -> String {
    const CHARACTERS_MAX: usize = 40;
    kid.escape_default().take(CHARACTERS_MAX).collect()
}
