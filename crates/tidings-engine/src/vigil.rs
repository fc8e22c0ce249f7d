//! What events come through, and whether it can be heard at present: told to every client, to health and to readiness.
//!
//! A part that cannot be heard makes its source degraded; when all parts of the source are heard again, and stay so for a
//! moment, it has recovered, with the worst outcome of any of them. Parts that are lost together notice it one after the other,
//! and clients are not told of each.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tidings_protocol::{Degraded, Gap, Source};
use tokio::time::Instant;

use crate::engine::Deliver;

/// Something that every client is told.
#[derive(Clone, Copy, Debug)]
pub enum Notice {
    /// A source cannot be heard.
    Degraded(Degraded),
    /// It is heard again.
    Recovered(Degraded, Gap),
}

/// A source has recovered when it was heard for so long.
const SETTLE: Duration = Duration::from_millis(800);
/// How often it is looked for sources that have.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Watches the parts of every source.
pub struct Vigil {
    parts: Mutex<Vec<Part>>,
    /// The hub. Weak, because the hub's owner owns this, too.
    deliver: Weak<dyn Deliver>,
}

/// Something that events come through.
#[derive(Clone, Debug)]
pub struct PartState {
    /// Where they come from.
    pub source: Source,
    /// What it is called.
    pub name: Arc<str>,
    /// Whether it can be heard.
    pub is_heard: bool,
}

#[derive(Debug)]
struct Part {
    source: Source,
    name: Arc<str>,
    down: bool,
    /// Since when it is heard again.
    up_at: Option<Instant>,
    /// Since when any part of the source is down, if this one was while that was told.
    since: Option<Degraded>,
    /// What became of events while it was down.
    gap: Gap,
}

impl std::fmt::Debug for Vigil {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vigil").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Vigil {
    /// A vigil over nothing yet.
    pub fn new(deliver: Weak<dyn Deliver>) -> Self {
        Self { parts: Mutex::default(), deliver }
    }

    /// The part is about to be heard; nobody is told that it is not yet.
    pub fn expect(&self, source: Source, name: &str) {
        part_of(&mut self.parts.lock(), source, name).down = true;
    }

    /// The part cannot be heard.
    pub fn down(&self, source: Source, name: &str) {
        let mut parts = self.parts.lock();
        let degraded = parts.iter().filter(|part| part.source == source).find_map(|part| part.since);
        let since = degraded.unwrap_or_else(|| Degraded { source, since: jiff::Timestamp::now().into() });
        let part = part_of(&mut parts, source, name);
        if !std::mem::replace(&mut part.down, true) {
            tracing::warn!(part = name, "cannot be heard");
        }
        part.since.get_or_insert(since);
        if degraded.is_none() {
            self.tell(Notice::Degraded(since));
        }
    }

    /// The part is heard again; `gap`: what became of events meanwhile.
    pub fn up(&self, source: Source, name: &str, gap: Gap) {
        let mut parts = self.parts.lock();
        let part = part_of(&mut parts, source, name);
        if !std::mem::replace(&mut part.down, false) {
            return;
        }
        if part.since.is_some() {
            tracing::warn!(part = name, ?gap, "is heard again");
            part.gap = worse(part.gap, gap);
        }
        part.up_at = Some(Instant::now());
    }

    /// Tells of sources that have recovered; wants to be called every now and then.
    pub fn look(&self) {
        self.look_at(Instant::now());
    }

    fn look_at(&self, now: Instant) {
        let mut parts = self.parts.lock();
        for source in [Source::Redis, Source::Celery, Source::Watcher] {
            let of_source = || parts.iter().filter(|part| part.source == source);
            let is_settled =
                of_source().all(|part| !part.down && part.up_at.is_none_or(|up_at| now >= up_at + SETTLE));
            let since = of_source().filter_map(|part| part.since).min_by_key(|degraded| degraded.since);
            let Some(since) = since.filter(|_| is_settled) else { continue };
            let gap = of_source().fold(Gap::None, |gap, part| worse(gap, part.gap));
            for part in parts.iter_mut().filter(|part| part.source == source) {
                (part.since, part.gap) = (None, Gap::None);
            }
            self.tell(Notice::Recovered(since, gap));
        }
    }

    /// The part is not needed any more.
    pub fn forget(&self, source: Source, name: &str) {
        let mut parts = self.parts.lock();
        let Some(place) = parts.iter().position(|part| part.source == source && &*part.name == name) else {
            return;
        };
        let forgotten = parts.swap_remove(place);
        // That its source was degraded has to end, too, if others are left to end it.
        if let (Some(since), Some(other)) =
            (forgotten.since, parts.iter_mut().find(|part| part.source == source))
        {
            other.since.get_or_insert(since);
            other.gap = worse(other.gap, forgotten.gap);
        }
    }

    /// Names of the parts that cannot be heard.
    pub fn silent(&self) -> Vec<Arc<str>> {
        self.parts.lock().iter().filter(|part| part.down).map(|part| Arc::clone(&part.name)).collect()
    }

    /// Every part, and whether it is heard.
    pub fn parts(&self) -> Vec<PartState> {
        let state = |part: &Part| PartState {
            source: part.source,
            name: Arc::clone(&part.name),
            is_heard: !part.down,
        };
        self.parts.lock().iter().map(state).collect()
    }

    /// Whether this part is known and heard.
    pub fn hears(&self, source: Source, name: &str) -> bool {
        self.parts.lock().iter().any(|part| part.source == source && &*part.name == name && !part.down)
    }

    /// Told under the lock, so that clients are told in order. Telling only queues.
    fn tell(&self, notice: Notice) {
        if let Some(deliver) = self.deliver.upgrade() {
            deliver.tell(notice);
        }
    }
}

fn part_of<'a>(parts: &'a mut Vec<Part>, source: Source, name: &str) -> &'a mut Part {
    let place = parts.iter().position(|part| part.source == source && &*part.name == name);
    let place = place.unwrap_or_else(|| {
        parts.push(Part { source, name: name.into(), down: false, up_at: None, since: None, gap: Gap::None });
        parts.len() - 1
    });
    &mut parts[place]
}

fn worse(one: Gap, other: Gap) -> Gap {
    match (one, other) {
        (Gap::Lost, _) | (_, Gap::Lost) => Gap::Lost,
        (Gap::Recovered, _) | (_, Gap::Recovered) => Gap::Recovered,
        (Gap::None, Gap::None) => Gap::None,
    }
}

#[cfg(test)]
mod tests {
    use tidings_protocol::{Position, StreamId};

    use super::*;
    use crate::engine::Record;

    #[derive(Debug, Default)]
    struct Told(Mutex<Vec<String>>);

    impl Deliver for Told {
        fn deliver(&self, _: &StreamId, _: &Position, _: &[Arc<Record>]) {}

        fn tell(&self, notice: Notice) {
            self.0.lock().push(match notice {
                Notice::Degraded(degraded) => format!("degraded {:?}", degraded.source),
                Notice::Recovered(degraded, gap) => format!("recovered {:?} {gap:?}", degraded.source),
            });
        }
    }

    #[test]
    fn a_source_is_degraded_with_its_first_part_and_recovers_once_all_are_heard_for_a_moment() {
        let told = Arc::new(Told::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&told) as Arc<dyn Deliver>));
        let vigil = Vigil::new(deliver);
        let later = || vigil.look_at(Instant::now() + SETTLE);
        vigil.expect(Source::Redis, "a");
        assert_eq!(vigil.silent().len(), 1);
        // Nobody was there before.
        vigil.up(Source::Redis, "a", Gap::Lost);
        later();
        vigil.down(Source::Redis, "a");
        vigil.down(Source::Celery, "c");
        vigil.up(Source::Redis, "a", Gap::None);
        vigil.look();
        // It notices later what has happened to both.
        vigil.down(Source::Redis, "b");
        vigil.down(Source::Redis, "b");
        assert!(vigil.hears(Source::Redis, "a") && !vigil.hears(Source::Redis, "b"));
        later();
        vigil.up(Source::Redis, "b", Gap::Recovered);
        later();
        later();
        vigil.up(Source::Celery, "c", Gap::None);
        later();
        // What was told of the outage before is not told again.
        vigil.down(Source::Redis, "b");
        vigil.down(Source::Redis, "gone");
        vigil.up(Source::Redis, "b", Gap::None);
        vigil.forget(Source::Redis, "gone");
        later();
        assert_eq!(
            *told.0.lock(),
            [
                "degraded Redis",
                "degraded Celery",
                "recovered Redis Recovered",
                "recovered Celery None",
                "degraded Redis",
                "recovered Redis None",
            ]
        );
    }
}
