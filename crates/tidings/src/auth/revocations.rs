//! What was revoked: sessions, and everything that a user was given up to a moment. Kept for 30 days, by all nodes that share a
//! Redis, or by this one in its data folder.
//!
//! A node that cannot read what others have revoked does not know what holds: it says so by [`Revocations::known_until`].

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use redis::{Value, cmd};
use serde::{Deserialize, Serialize};
use tidings_engine::engine::redis::{Call, Servers};
use tidings_protocol::{Timestamp, UserId};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep},
};

use super::Digest;
use crate::redis_stream::{START, StreamReader};

/// Where all nodes find them.
const STREAM: &str = "tidings:revocations";
/// How long one is remembered. What it is about should not live longer.
const KEPT_FOR: Duration = Duration::from_hours(30 * 24);
/// What others have revoked is known for so long after it was read.
const KNOWN_FOR: Duration = Duration::from_secs(5);
/// Waiting for the next one at Redis.
const BLOCK: Duration = Duration::from_secs(1);
/// Before another attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Read at once.
const READ_MAX: usize = 10_000;
/// In the data folder.
const FILE: &str = "revocations.jsonl";

/// One revocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revocation {
    pub(crate) whom: Whom,
    /// Microseconds since 1970.
    at: i64,
}

/// What is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Whom {
    /// Whatever the user was given until then.
    User(UserId),
    /// A session or a token, by its digest.
    Session(String),
}

impl Revocation {
    pub(crate) fn now(whom: Whom) -> Self {
        Self { whom, at: Timestamp::from(jiff::Timestamp::now()).as_microsecond() }
    }

    pub(crate) fn at(&self) -> Timestamp {
        Timestamp::from_microsecond(self.at).unwrap_or_else(|| jiff::Timestamp::MAX.into())
    }

    fn is_remembered(&self, now: Timestamp) -> bool {
        now.seconds_since(self.at()) < i64::try_from(KEPT_FOR.as_secs()).unwrap_or(i64::MAX)
    }
}

/// Everything that is revoked.
#[derive(Debug)]
pub(crate) struct Revocations {
    list: Mutex<List>,
    store: Store,
    /// Others' revocations up to here, less a moment, are in the list. `None`: there are no others.
    known_until: Option<watch::Sender<Option<Instant>>>,
    /// Something was added that nobody has acted on yet.
    added: Notify,
}

#[derive(Debug, Default)]
struct List {
    users: HashMap<UserId, Timestamp>,
    sessions: HashMap<Digest, Timestamp>,
    /// What nobody has acted on yet.
    new: Vec<Revocation>,
    /// What this node has found to be revoked, and the store does not have yet.
    unsaved: Vec<Revocation>,
}

#[derive(Debug)]
enum Store {
    /// Nothing outlives the process.
    Memory,
    File(Mutex<File>),
    Redis(Arc<Servers>),
}

impl Revocations {
    pub(crate) fn in_memory() -> Self {
        Self::new(Store::Memory)
    }

    /// Those of a data folder, which somebody else holds for this process.
    pub(crate) fn in_folder(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        let now = jiff::Timestamp::now().into();
        let mut list = List::default();
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        // A last line that a crash has torn was never acknowledged.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        for revocation in lines.filter_map(|line| serde_json::from_str::<Revocation>(line).ok()) {
            if revocation.is_remembered(now) {
                list.remember(&revocation);
            }
        }
        let file = list.rewrite(&path)?;
        Ok(Self { list: Mutex::new(list), ..Self::new(Store::File(Mutex::new(file))) })
    }

    /// Those of all nodes that share the Redis. [`Revocations::follow`] reads them.
    pub(crate) fn in_redis(servers: Arc<Servers>) -> Self {
        Self { known_until: Some(watch::Sender::new(None)), ..Self::new(Store::Redis(servers)) }
    }

    fn new(store: Store) -> Self {
        Self { list: Mutex::default(), store, known_until: None, added: Notify::new() }
    }

    /// Revokes. When this returns, every node will act on it, or there is an error and it has to be said again.
    pub(crate) async fn add(&self, revocation: Revocation) -> Result<(), String> {
        match &self.store {
            Store::Memory => {}
            Store::File(file) => {
                let line =
                    format!("{}\n", serde_json::to_string(&revocation).map_err(|error| error.to_string())?);
                let mut file = file.lock();
                file.write_all(line.as_bytes())
                    .and_then(|()| file.sync_data())
                    .map_err(|error| error.to_string())?;
            }
            Store::Redis(servers) => {
                let oldest = jiff::Timestamp::now().as_millisecond()
                    - i64::try_from(KEPT_FOR.as_millis()).unwrap_or(0);
                let mut add = cmd("XADD");
                add.arg(STREAM).arg("MINID").arg("~").arg(oldest.max(0)).arg("*").arg("revocation");
                add.arg(serde_json::to_string(&revocation).map_err(|error| error.to_string())?);
                servers.call(&Call::repeatable(STREAM, add)).await.map_err(|fault| fault.to_string())?;
            }
        }
        self.learn([revocation]);
        Ok(())
    }

    /// Whether what was given to the user at `issued_at` is revoked. `None`: nobody knows when that was.
    pub(crate) fn cover_user(&self, user: &UserId, issued_at: Option<Timestamp>) -> bool {
        let revoked_at = self.list.lock().users.get(user).copied();
        // Tokens tell their time in whole seconds; one of the same second may be from before.
        revoked_at.is_some_and(|at| issued_at.is_none_or(|issued_at| issued_at.seconds_since(at) <= 0))
    }

    /// Whether the session is revoked.
    pub(crate) fn cover_session(&self, session: Digest) -> bool {
        self.list.lock().sessions.contains_key(&session)
    }

    /// Whether other nodes revoke, too.
    pub(crate) fn are_shared(&self) -> bool {
        self.known_until.is_some()
    }

    /// Up to when all revocations are known; `Err`: they are not.
    pub(crate) fn known_until(&self) -> Result<Option<Instant>, ()> {
        match &self.known_until {
            None => Ok(None),
            Some(known) => known.borrow().filter(|until| *until > Instant::now()).map(Some).ok_or(()),
        }
    }

    /// Waits until something is revoked, or was since this last returned.
    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }

    /// What nobody has acted on yet.
    pub(crate) fn take_new(&self) -> Vec<Revocation> {
        std::mem::take(&mut self.list.lock().new)
    }

    /// Takes revocations to be true here from now on. They are still to be added.
    pub(crate) fn learn_unsaved(&self, revocations: impl Iterator<Item = Revocation>) {
        let mut list = self.list.lock();
        for revocation in revocations {
            if list.remember(&revocation) {
                list.unsaved.push(revocation);
            }
        }
        drop(list);
        self.added.notify_one();
    }

    /// What is still to be added.
    pub(crate) fn take_unsaved(&self) -> Vec<Revocation> {
        std::mem::take(&mut self.list.lock().unsaved)
    }

    /// Reads what other nodes revoke, for ever, if there are others. Tells `heard` whether it can, each time that changes.
    pub(crate) async fn follow(&self, heard: impl Fn(bool)) {
        let (Store::Redis(servers), Some(known_until)) = (&self.store, &self.known_until) else {
            return std::future::pending().await;
        };
        let stream = StreamReader::new(Arc::clone(servers), STREAM);
        let mut reader = Reader { stream, has_caught_up: false };
        let mut was_heard = false;
        loop {
            let asked_at = Instant::now();
            match reader.read().await {
                Ok((revocations, is_all)) => {
                    self.learn(revocations);
                    if is_all {
                        known_until.send_replace(Some(asked_at + KNOWN_FOR));
                        if !std::mem::replace(&mut was_heard, true) {
                            heard(true);
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(error, "revocations cannot be read");
                    reader.stream.disconnect();
                    if self.known_until().is_err() && std::mem::replace(&mut was_heard, false) {
                        heard(false);
                    }
                    sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    fn learn(&self, revocations: impl IntoIterator<Item = Revocation>) {
        let mut list = self.list.lock();
        for revocation in revocations {
            if list.remember(&revocation) {
                list.new.push(revocation);
            }
        }
        drop(list);
        self.added.notify_one();
    }
}

impl List {
    /// Whether that was not known.
    fn remember(&mut self, revocation: &Revocation) -> bool {
        let at = revocation.at();
        let newest = |known: &mut Timestamp| {
            let is_newer = *known < at;
            *known = at.max(*known);
            is_newer
        };
        match &revocation.whom {
            Whom::User(user) => match self.users.get_mut(user) {
                Some(known) => newest(known),
                None => self.users.insert(user.clone(), at).is_none(),
            },
            Whom::Session(digest) => match Digest::parse(digest) {
                Some(digest) => match self.sessions.get_mut(&digest) {
                    Some(known) => newest(known),
                    None => self.sessions.insert(digest, at).is_none(),
                },
                None => false,
            },
        }
    }

    /// Writes what is still remembered in place of what was there.
    fn rewrite(&self, path: &Path) -> io::Result<File> {
        let users = self.users.iter().map(|(user, at)| (Whom::User(user.clone()), at));
        let sessions = self.sessions.iter().map(|(digest, at)| (Whom::Session(digest.to_string()), at));
        let mut text = String::new();
        for (whom, at) in users.chain(sessions) {
            text += &serde_json::to_string(&Revocation { whom, at: at.as_microsecond() })?;
            text.push('\n');
        }
        let new: PathBuf = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        std::fs::rename(&new, path)?;
        OpenOptions::new().append(true).open(path)
    }
}

/// Reads the stream of revocations.
struct Reader {
    stream: StreamReader,
    /// All was read that this connection's server had: from here on it is waited for more.
    has_caught_up: bool,
}

impl Reader {
    /// What comes behind the cursor, waiting a moment for it once all is known; and whether that is all there is.
    async fn read(&mut self) -> Result<(Vec<Revocation>, bool), String> {
        if self.stream.connect().await? {
            // Another server may know less, and number what it is told anew.
            START.clone_into(&mut self.stream.cursor);
            self.has_caught_up = false;
        }
        // Nobody gets in until all is known; where nothing was ever revoked, that would be at the end of the wait.
        let entries = self.stream.read(READ_MAX, self.has_caught_up.then_some(BLOCK)).await?;
        if let Some(last) = entries.last() {
            self.stream.cursor.clone_from(&last.id);
        }
        let is_all = entries.len() < READ_MAX;
        self.has_caught_up |= is_all;
        let revocations = entries.iter().filter_map(|entry| match entry.map.get("revocation") {
            Some(Value::BulkString(bytes)) => serde_json::from_slice(bytes).ok(),
            _ => None,
        });
        Ok((revocations.collect(), is_all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_microsecond(seconds * 1_000_000).unwrap()
    }

    fn user(name: &str) -> UserId {
        UserId::try_from(name).unwrap()
    }

    #[tokio::test]
    async fn what_was_revoked_stays_so_over_restarts_and_what_comes_later_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let revocations = Revocations::in_folder(folder.path()).unwrap();
        let session = Digest::of(b"s");
        let now = jiff::Timestamp::now().as_second();
        revocations.add(Revocation::now(Whom::User(user("u")))).await.unwrap();
        revocations.add(Revocation::now(Whom::Session(session.to_string()))).await.unwrap();
        assert_eq!(revocations.take_new().len(), 2);
        drop(revocations);
        // A crash has torn the last line.
        let path = folder.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(
            &path,
            format!("{text}rubbish\n{}", text.lines().next().unwrap().replace("\"u\"", "\"v\"")),
        )
        .unwrap();
        let again = Revocations::in_folder(folder.path()).unwrap();
        assert!(again.cover_session(session) && !again.cover_session(Digest::of(b"t")));
        assert!(again.cover_user(&user("u"), Some(at(now - 1))));
        assert!(again.cover_user(&user("u"), None), "nobody knows that it is from later");
        assert!(!again.cover_user(&user("u"), Some(at(now + 2))));
        assert!(!again.cover_user(&user("v"), Some(at(now - 1))));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2, "rubbish is not kept");
        assert_eq!(again.known_until(), Ok(None));
    }

    #[test]
    fn what_is_too_old_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let now = jiff::Timestamp::now().as_microsecond();
        let days = |days: i64| {
            let whom = Whom::User(user(&format!("{days}")));
            serde_json::to_string(&Revocation { whom, at: now - days * 24 * 3600 * 1_000_000 }).unwrap()
                + "\n"
        };
        std::fs::write(folder.path().join(FILE), days(29) + &days(31)).unwrap();
        let revocations = Revocations::in_folder(folder.path()).unwrap();
        assert!(revocations.cover_user(&user("29"), None) && !revocations.cover_user(&user("31"), None));
    }
}
