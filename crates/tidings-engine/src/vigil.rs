//! What events come through, and whether it can be heard at present: told to every client, to health and to readiness.
//!
//! A part that cannot be heard makes its source degraded; when all parts of the source are heard again, it has recovered,
//! with the worst outcome of any of them.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tidings_protocol::{Degraded, Gap, Source};

use crate::engine::Deliver;

/// Something that every client is told.
#[derive(Clone, Copy, Debug)]
pub enum Notice {
    /// A source cannot be heard.
    Degraded(Degraded),
    /// It is heard again.
    Recovered(Degraded, Gap),
}

/// Watches the parts of every source.
pub struct Vigil {
    parts: Mutex<Vec<Part>>,
    /// The hub. Weak, because the hub's owner owns this, too.
    deliver: Weak<dyn Deliver>,
}

#[derive(Debug)]
struct Part {
    source: Source,
    name: Arc<str>,
    down: bool,
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
        part.down = true;
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
        part.gap = worse(part.gap, gap);
        if parts.iter().any(|part| part.source == source && part.down) {
            return;
        }
        let of_source = || parts.iter().filter(|part| part.source == source);
        let gap = of_source().fold(Gap::None, |gap, part| worse(gap, part.gap));
        let since = of_source().filter_map(|part| part.since).min_by_key(|degraded| degraded.since);
        for part in parts.iter_mut().filter(|part| part.source == source) {
            (part.since, part.gap) = (None, Gap::None);
        }
        if let Some(since) = since {
            self.tell(Notice::Recovered(since, gap));
        }
    }

    /// The part is not needed any more.
    pub fn forget(&self, source: Source, name: &str) {
        self.up(source, name, Gap::None);
        self.parts.lock().retain(|part| !(part.source == source && &*part.name == name));
    }

    /// Names of the parts that cannot be heard.
    pub fn silent(&self) -> Vec<Arc<str>> {
        self.parts.lock().iter().filter(|part| part.down).map(|part| Arc::clone(&part.name)).collect()
    }

    /// Every part, and whether it is heard.
    pub fn parts(&self) -> Vec<(Arc<str>, bool)> {
        self.parts.lock().iter().map(|part| (Arc::clone(&part.name), !part.down)).collect()
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
        parts.push(Part { source, name: name.into(), down: false, since: None, gap: Gap::None });
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
    fn a_source_is_degraded_with_its_first_part_and_recovers_with_its_last() {
        let told = Arc::new(Told::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&told) as Arc<dyn Deliver>));
        let vigil = Vigil::new(deliver);
        vigil.expect(Source::Redis, "a");
        assert_eq!(vigil.silent().len(), 1);
        vigil.up(Source::Redis, "a", Gap::None);
        vigil.down(Source::Redis, "a");
        vigil.down(Source::Redis, "b");
        vigil.down(Source::Redis, "a");
        vigil.down(Source::Celery, "c");
        assert_eq!(vigil.silent().len(), 3);
        vigil.up(Source::Redis, "a", Gap::Lost);
        assert!(vigil.hears(Source::Redis, "a") && !vigil.hears(Source::Redis, "b"));
        vigil.up(Source::Redis, "b", Gap::Recovered);
        vigil.forget(Source::Celery, "c");
        vigil.down(Source::Redis, "b");
        vigil.up(Source::Redis, "b", Gap::None);
        assert_eq!(
            *told.0.lock(),
            [
                "degraded Redis",
                "degraded Celery",
                "recovered Redis Lost",
                "recovered Celery None",
                "degraded Redis",
                "recovered Redis None",
            ]
        );
    }
}
