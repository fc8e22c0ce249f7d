//! What becomes of sessions for as long as somebody is connected: they are asked about, and what was revoked ends them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use tidings_protocol::{Gap, Source as EventSource};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{
    Auth, Digest, Refusal, now,
    redis_session::{KEYS_AT_ONCE, RedisSessions},
    revocations::{Revocation, Whom},
    sessions::{Entry, Source},
};

/// How often sessions that somebody else keeps are asked about: an answer is good for 5 s, which leaves a second for it.
const SWEEP_INTERVAL: Duration = Duration::from_secs(2);
/// The application is asked again so long before its answer is too old: two sweeps and an answer may pass until it is there.
const ASKED_BEFORE: Duration = Duration::from_secs(7);
/// The part that is not heard while sessions cannot be asked about.
const PART: &str = "the sessions";
/// The same for revocations.
const REVOCATIONS_PART: &str = "revocations";

/// What was found out about sessions that were asked about together.
#[derive(Default)]
struct Swept {
    /// Why some could not be found out, if that is so.
    unknown: Option<String>,
    /// How many could not be read.
    unreadable: usize,
}

impl Auth {
    /// Follows what becomes of sessions, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        if self.is_none() {
            return;
        }
        let source = EventSource::Redis;
        if self.redis_sessions.is_some() {
            self.vigil.expect(source, PART);
        }
        if self.revocations.are_shared() {
            // Until they are known nobody gets in, so that the node is not ready before.
            self.vigil.expect(source, REVOCATIONS_PART);
        }
        stop.run_until_cancelled(async {
            tokio::join!(self.follow_revocations(), self.act_on_revocations(), self.sweep_for_ever());
        })
        .await;
    }

    async fn follow_revocations(&self) {
        self.revocations.follow(|is_heard| self.tell_heard(REVOCATIONS_PART, is_heard)).await;
    }

    async fn act_on_revocations(&self) {
        loop {
            self.revocations.added().await;
            self.act_on_new();
            for revocation in self.revocations.take_unsaved() {
                if let Err(error) = self.revocations.add(revocation).await {
                    tracing::warn!(error, "a session of a revoked user cannot be revoked for good");
                }
            }
        }
    }

    /// Ends what new revocations cover. Comes before anybody says that a session holds for as long as revocations are known:
    /// those may be among them.
    pub(super) fn act_on_new(&self) {
        // Whoever finds nothing new must not go on while another is in the middle of it.
        let _one_after_the_other = self.acting.lock();
        for revocation in self.revocations.take_new() {
            self.act_on(&revocation);
        }
    }

    fn act_on(&self, revocation: &Revocation) {
        let is_covered = |entry: &Arc<Entry>| match &revocation.whom {
            Whom::User(user) => {
                // Of one that somebody else keeps nobody knows when it began; what is connected is from before.
                let issued_before = entry.issued_at().is_none_or(|at| at.seconds_since(revocation.at()) <= 0);
                entry.is_of(user) && issued_before
            }
            Whom::Session(digest) => Digest::parse(digest) == Some(entry.session()),
        };
        let covered: Vec<_> = self.sessions.all().into_iter().filter(is_covered).collect();
        if matches!(revocation.whom, Whom::User(_)) {
            // What somebody else keeps may be good there for longer; it must not come back, not even before that is saved.
            let kept_elsewhere = covered.iter().filter(|entry| !matches!(entry.source(), Source::Itself));
            let revoked = kept_elsewhere.map(|entry| Whom::Session(entry.session().to_string()));
            self.revocations.learn_unsaved(revoked.map(Revocation::now));
        }
        let mut verdicts = self.sessions.verdicts();
        for entry in &covered {
            entry.ends(&mut verdicts);
        }
    }

    async fn sweep_for_ever(&self) {
        let mut interval = interval(SWEEP_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.sweep().await;
        }
    }

    /// Asks about all sessions that somebody else keeps.
    async fn sweep(&self) {
        let entries = self.sessions.all();
        let (mut redis, mut itself, mut callback) = (Vec::new(), Vec::new(), Vec::new());
        for entry in entries {
            match entry.source() {
                Source::Redis(_) => redis.push(entry),
                Source::Itself => itself.push(entry),
                Source::Callback(_) => callback.push(entry),
            }
        }
        tokio::join!(self.sweep_redis(&redis), self.sweep_callback(&callback));
        if let Ok(Some(known_until)) = self.revocations.known_until() {
            self.act_on_new();
            let mut verdicts = self.sessions.verdicts();
            for entry in &itself {
                entry.holds_still(Some(known_until), &mut verdicts);
            }
        }
    }

    async fn sweep_redis(&self, entries: &[Arc<Entry>]) {
        let Some(sessions) = &self.redis_sessions else { return };
        // Each part is done with when its answer comes, so that not all answers are held at once.
        let parts = join_all(entries.chunks(KEYS_AT_ONCE).map(|part| self.sweep_part(sessions, part))).await;
        let unreadable = parts.iter().map(|part| part.unreadable).sum();
        if self.unreadable.swap(unreadable, Ordering::Relaxed) == 0 && unreadable > 0 {
            tracing::warn!(sessions = unreadable, "sessions in Redis cannot be read");
        }
        let unknown = parts.into_iter().find_map(|part| part.unknown);
        if let Some(why) = &unknown {
            tracing::debug!(why, "a session cannot be asked about");
        }
        // Also when nobody is there: the next one who comes will be asked about.
        let is_heard = unknown.is_none() && (!entries.is_empty() || sessions.is_reachable().await);
        self.tell_heard(PART, is_heard);
    }

    async fn sweep_part(&self, sessions: &RedisSessions, entries: &[Arc<Entry>]) -> Swept {
        let ids: Vec<_> = entries
            .iter()
            .map(|entry| match entry.source() {
                Source::Redis(id) => id.as_str(),
                Source::Itself | Source::Callback(_) => unreachable!("only Redis' own were picked"),
            })
            .collect();
        let found = sessions.check_all(&ids, now()).await;
        let revocations_known_until = self.revocations.known_until();
        self.act_on_new();
        let (mut verdicts, mut swept) = (self.sessions.verdicts(), Swept::default());
        for (entry, read) in entries.iter().zip(found) {
            match (read, revocations_known_until) {
                (Ok(checked), Ok(known_until)) => entry.holds(&checked, known_until, &mut verdicts),
                (Err(Refusal::Denied(_)), _) => entry.ends(&mut verdicts),
                (Err(Refusal::NoVerdict(why)), _) => swept.unknown = Some(why),
                (Err(Refusal::Unreadable(why)), _) => {
                    tracing::debug!(why, "a session cannot be read");
                    swept.unreadable += 1;
                }
                (Ok(_), Err(())) => {}
            }
        }
        swept
    }

    /// Asks the application about those whose last answer is about to be too old.
    async fn sweep_callback(&self, entries: &[Arc<Entry>]) {
        let Some(callback) = &self.callback else { return };
        let soon = Instant::now() + ASKED_BEFORE;
        let due = entries.iter().filter(|entry| entry.valid_until().is_some_and(|until| until <= soon));
        join_all(due.map(async |entry| {
            let Source::Callback(cookie) = entry.source() else { return };
            let answer = callback.check(cookie, true).await;
            self.note_callback(&answer);
            let revocations_known_until = self.revocations.known_until();
            self.act_on_new();
            let mut verdicts = self.sessions.verdicts();
            match (answer, revocations_known_until) {
                (Ok(checked), Ok(known_until)) => entry.holds(&checked, known_until, &mut verdicts),
                (Err(Refusal::Denied(_)), _) => entry.ends(&mut verdicts),
                (Err(Refusal::NoVerdict(_) | Refusal::Unreadable(_)), _) | (Ok(_), Err(())) => {}
            }
        }))
        .await;
    }

    pub(super) fn note_callback<T>(&self, answer: &Result<T, Refusal>) {
        let is_silent = matches!(answer, Err(Refusal::NoVerdict(_)));
        if self.callback_silent.swap(is_silent, Ordering::Relaxed) != is_silent {
            if let Err(Refusal::NoVerdict(why)) = answer {
                tracing::warn!(why, "the application cannot be asked");
            } else {
                tracing::info!("the application can be asked again");
            }
        }
    }

    fn tell_heard(&self, part: &str, is_heard: bool) {
        let source = EventSource::Redis;
        if is_heard {
            // What waited meanwhile is where it was.
            self.vigil.up(source, part, Gap::None);
        } else {
            self.vigil.down(source, part);
        }
    }
}
