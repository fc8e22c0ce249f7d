//! The sessions of this node's connections: each is known once, however many connections it has, and what is found out about it
//! goes to every shard that has one of them.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};
use tidings_engine::{
    driver::ShardHandle,
    rights::{Holder, Rights, SessionKey, Standing, Verdict},
};
use tidings_protocol::{Projects, Timestamp, UserId};
use tokio::time::Instant;

use super::{Checked, Digest, Identity};

/// Everybody who is connected, or connecting.
#[derive(Debug)]
pub(crate) struct Sessions {
    entries: Mutex<HashMap<Digest, Arc<Entry>>>,
    next: AtomicU64,
    shards: Vec<ShardHandle>,
}

/// How a session is asked about anew.
#[derive(Clone)]
pub(crate) enum Source {
    /// It says everything itself, up to its end.
    Itself,
    /// The application's sessions in Redis have it under this id.
    Redis(String),
    /// The application answers for this cookie.
    Callback(String),
}

impl fmt::Debug for Source {
    /// Without the credential.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Itself => "Itself",
            Self::Redis(_) => "Redis",
            Self::Callback(_) => "Callback",
        })
    }
}

/// One session.
#[derive(Debug)]
pub(crate) struct Entry {
    key: SessionKey,
    /// Of the way and the credential.
    id: Digest,
    /// By which it is revoked.
    session: Digest,
    source: Source,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    identity: Identity,
    rights: Arc<Rights>,
    valid_until: Option<Instant>,
    /// It is over, whatever anybody finds out later.
    is_over: bool,
    /// Handles to it.
    live: usize,
    /// A bit for each shard that has a connection of it, or had one.
    shards: u64,
}

/// A handle to a session: it is kept and asked about as long as there is one.
#[derive(Debug)]
pub(crate) struct Session {
    entry: Arc<Entry>,
    sessions: Arc<Sessions>,
}

/// Verdicts on their way to the shards, each of which gets its own at once.
pub(crate) struct Verdicts<'a> {
    sessions: &'a Sessions,
    by_shard: Vec<Vec<(SessionKey, Verdict)>>,
}

impl Sessions {
    pub(crate) fn new(shards: Vec<ShardHandle>) -> Self {
        Self { entries: Mutex::default(), next: AtomicU64::new(1), shards }
    }

    /// A handle to the session that was just found out about.
    pub(crate) fn enter(
        self: &Arc<Self>,
        id: Digest,
        session: Digest,
        source: Source,
        checked: Checked,
        revocations_known_until: Option<Instant>,
    ) -> Session {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(&id) {
            let mut verdicts = self.verdicts();
            let mut state = entry.state.lock();
            if entry.renew(&mut state, &checked, revocations_known_until, &mut verdicts) {
                state.live += 1;
                drop(state);
                return Session { entry: Arc::clone(entry), sessions: Arc::clone(self) };
            }
        }
        let key = SessionKey(self.next.fetch_add(1, Ordering::Relaxed));
        let state = State {
            rights: rights_of(&checked.identity),
            identity: checked.identity,
            valid_until: earlier(checked.valid_until, revocations_known_until),
            is_over: false,
            live: 1,
            shards: 0,
        };
        let entry = Arc::new(Entry { key, id, session, source, state: Mutex::new(state) });
        entries.insert(id, Arc::clone(&entry));
        Session { entry, sessions: Arc::clone(self) }
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries.lock().values().cloned().collect()
    }

    /// Gathers verdicts, and tells them when it is dropped.
    pub(crate) fn verdicts(&self) -> Verdicts<'_> {
        Verdicts { sessions: self, by_shard: Vec::new() }
    }
}

impl Entry {
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// The digest by which it is revoked.
    pub(crate) fn session(&self) -> Digest {
        self.session
    }

    pub(crate) fn is_of(&self, user: &UserId) -> bool {
        self.state.lock().identity.user == *user
    }

    /// When it was given, where it says so.
    pub(crate) fn issued_at(&self) -> Option<Timestamp> {
        self.state.lock().identity.issued_at
    }

    /// Up to when it is known; `None`: to its end.
    pub(crate) fn valid_until(&self) -> Option<Instant> {
        self.state.lock().valid_until
    }

    /// It holds, as was found out; tells its shards.
    pub(crate) fn holds(
        &self,
        checked: &Checked,
        revocations_known_until: Option<Instant>,
        verdicts: &mut Verdicts<'_>,
    ) {
        self.renew(&mut self.state.lock(), checked, revocations_known_until, verdicts);
    }

    /// It holds if all that is revoked is known up to then; tells its shards.
    pub(crate) fn holds_still(&self, revocations_known_until: Option<Instant>, verdicts: &mut Verdicts<'_>) {
        let mut state = self.state.lock();
        if !state.is_over {
            state.valid_until = revocations_known_until;
            verdicts.tell(self, &state);
        }
    }

    /// It is over; tells its shards.
    pub(crate) fn ends(&self, verdicts: &mut Verdicts<'_>) {
        self.end(&mut self.state.lock(), verdicts);
    }

    fn end(&self, state: &mut MutexGuard<'_, State>, verdicts: &mut Verdicts<'_>) {
        if !std::mem::replace(&mut state.is_over, true) {
            verdicts.tell(self, state);
        }
    }

    /// Takes what was found out; `false`: the session is over.
    fn renew(
        &self,
        state: &mut MutexGuard<'_, State>,
        checked: &Checked,
        revocations_known_until: Option<Instant>,
        verdicts: &mut Verdicts<'_>,
    ) -> bool {
        if state.is_over {
            return false;
        }
        if state.identity.user != checked.identity.user {
            // Somebody else has logged in: what is connected belongs to who was there before.
            self.end(state, verdicts);
            return false;
        }
        if state.identity.projects != checked.identity.projects {
            state.rights = rights_of(&checked.identity);
        }
        // The same list as before stays the one that all share.
        let projects = state.rights.projects.clone();
        state.identity = Identity { projects, ..checked.identity.clone() };
        state.valid_until = earlier(checked.valid_until, revocations_known_until);
        verdicts.tell(self, state);
        true
    }
}

impl State {
    fn standing(&self) -> Standing {
        Standing {
            rights: Arc::clone(&self.rights),
            known_until: self.valid_until,
            ends_at: self.identity.expires_at,
        }
    }
}

impl Verdicts<'_> {
    fn tell(&mut self, entry: &Entry, state: &State) {
        let verdict = if state.is_over { Verdict::Over } else { Verdict::Holds(state.standing()) };
        let mut shards = state.shards;
        while shards != 0 {
            let shard = shards.trailing_zeros() as usize;
            shards &= shards - 1;
            if self.by_shard.len() <= shard {
                self.by_shard.resize_with(shard + 1, Vec::new);
            }
            self.by_shard[shard].push((entry.key, verdict.clone()));
        }
    }
}

impl Drop for Verdicts<'_> {
    fn drop(&mut self) {
        for (shard, verdicts) in self.by_shard.drain(..).enumerate() {
            if let (false, Some(shard)) = (verdicts.is_empty(), self.sessions.shards.get(shard)) {
                shard.judge(verdicts);
            }
        }
    }
}

impl Session {
    /// Gives a connection of this session to a shard, so that nothing that is found out about it meanwhile passes it by.
    pub(crate) fn connect<T>(&self, shard: &ShardHandle, open: impl FnOnce(Holder) -> T) -> T {
        let mut state = self.entry.state.lock();
        state.shards |= 1 << shard.number();
        let holder = Holder { session: self.entry.key, standing: state.standing() };
        // Under the lock: whoever finds out something later tells it behind this.
        let opened = open(holder);
        if state.is_over {
            // It has ended while the connection was on its way; the shard tells it.
            shard.judge(vec![(self.entry.key, Verdict::Over)]);
        }
        opened
    }

    pub(crate) fn identity(&self) -> Identity {
        self.entry.state.lock().identity.clone()
    }

    pub(crate) fn user(&self) -> UserId {
        self.entry.state.lock().identity.user.clone()
    }

    pub(crate) fn projects(&self) -> Projects {
        self.entry.state.lock().identity.projects.clone()
    }

    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut entries = self.sessions.entries.lock();
        let mut state = self.entry.state.lock();
        state.live -= 1;
        if state.live == 0 && entries.get(&self.entry.id).is_some_and(|known| Arc::ptr_eq(known, &self.entry))
        {
            entries.remove(&self.entry.id);
            if entries.is_empty() {
                // What a rush needed is given back when it has left.
                *entries = HashMap::new();
            }
        }
    }
}

fn rights_of(identity: &Identity) -> Arc<Rights> {
    Arc::new(Rights { user: Some(identity.user.clone()), projects: identity.projects.clone() })
}

/// The earlier of two ends, either of which may never come.
fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
