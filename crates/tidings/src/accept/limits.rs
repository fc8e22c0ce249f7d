//! What is allowed to a connection before there is a request that a route could answer: a place, and some time. Knows no
//! route, no metric and no setting.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

/// The limits of one listener.
#[derive(Clone)]
pub struct Limits {
    /// For a request's head to arrive, from the beginning of the connection or the end of the request before.
    pub head: Duration,
    /// How many there may be.
    pub places: Arc<Places>,
    /// Is told who was refused.
    pub refused: Arc<dyn Fn(Refused) + Send + Sync>,
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limits")
            .field("head", &self.head)
            .field("places", &self.places)
            .finish_non_exhaustive()
    }
}

impl Default for Limits {
    /// Without a limit of places, and nobody is told.
    fn default() -> Self {
        let places = Places::new(usize::MAX, usize::MAX, || 0);
        Self { head: Duration::from_secs(10), places, refused: Arc::new(|_| ()) }
    }
}

/// Why a connection ended before it was somebody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// There is no place for it.
    NoPlace,
    /// No request came in time.
    Silent,
    /// The head of its request is too large.
    HeadTooLarge,
    /// What came is no HTTP.
    NoHttp,
    /// Whoever answers has panicked.
    Panicked,
}

/// Places for connections, each of which takes a descriptor and some memory.
pub struct Places {
    /// Connections that are neither WebSockets nor event streams.
    max: usize,
    taken: AtomicUsize,
    /// Those and all others together.
    sockets_max: usize,
    others: Box<dyn Fn() -> usize + Send + Sync>,
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("max", &self.max).field("taken", &self.taken).finish_non_exhaustive()
    }
}

impl Places {
    /// At most `max` places, and with the connections that `others` counts at most `sockets_max`.
    pub fn new(
        max: usize,
        sockets_max: usize,
        others: impl Fn() -> usize + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { max, taken: AtomicUsize::new(0), sockets_max, others: Box::new(others) })
    }

    /// A place for one more connection, if there is one.
    pub(super) fn take(self: &Arc<Self>) -> Option<Place> {
        let max = self.max.min(self.sockets_max.saturating_sub((self.others)()));
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| (taken < max).then_some(taken + 1));
        taken.ok().map(|_| Place(Arc::clone(self)))
    }
}

/// A connection's place, which is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a connection holds while it is HTTP; each of its requests has it among its extensions.
#[derive(Clone, Debug)]
pub(crate) struct Held(Arc<HeldPlace>);

#[derive(Debug)]
struct HeldPlace {
    place: Mutex<Option<Place>>,
    /// A whole head has come.
    asked: AtomicBool,
}

impl Held {
    pub(super) fn new(place: Place) -> Self {
        Self(Arc::new(HeldPlace { place: Mutex::new(Some(place)), asked: AtomicBool::new(false) }))
    }

    /// The connection is counted elsewhere from here on; its response has to be its last.
    pub(crate) fn give_back(&self) {
        self.0.place.lock().take();
    }

    pub(super) fn ask(&self) {
        self.0.asked.store(true, Ordering::Relaxed);
    }

    /// Why the connection is refused, if that is what its end was.
    pub(super) fn refused(&self, error: &hyper::Error) -> Option<Refused> {
        if error.is_parse_too_large() {
            Some(Refused::HeadTooLarge)
        } else if error.is_parse() {
            Some(Refused::NoHttp)
        } else {
            // A connection that had its answer and keeps still has only been kept long enough.
            (error.is_timeout() && !self.0.asked.load(Ordering::Relaxed)).then_some(Refused::Silent)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_places_and_fewer_when_others_have_the_room() {
        let others = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&others);
        let places = Places::new(2, 3, move || counted.load(Ordering::Relaxed));
        let (first, second) = (places.take().unwrap(), places.take().unwrap());
        assert!(places.take().is_none());
        drop(first);
        others.store(2, Ordering::Relaxed);
        assert!(places.take().is_none(), "two others and this one");
        others.store(1, Ordering::Relaxed);
        let held = Held::new(places.take().unwrap());
        assert!(places.take().is_none());
        held.give_back();
        held.give_back();
        assert!(places.take().is_some());
        drop((second, held));
        others.store(9, Ordering::Relaxed);
        assert!(places.take().is_none());
        assert_eq!(places.taken.load(Ordering::Relaxed), 0);
    }
}
