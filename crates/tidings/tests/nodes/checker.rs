//! The oracle: holds what clients recorded against what publishers got acknowledged. It knows nothing of how the service works,
//! only what the service promises.
//!
//! Every client follows its projects before the first event is published, so that it must get every acknowledged event of
//! them, each once, in the order in which its publisher numbered it; or be told that it cannot.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::record::{Acknowledged, Epoch, Heard, Number, Numbered, Place, Project, Publisher, Witness};

/// Findings that are told in words; the rest is only counted.
const FINDINGS_MAX: usize = 20;

/// The events that the streams still have at the end.
pub(crate) type Kept = HashSet<(Project, Number)>;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) acknowledged: usize,
    pub(crate) deliveries: usize,
    /// Acknowledged, kept, and not received by somebody who was never told of a gap there.
    pub(crate) lost: usize,
    /// Received more often than published, between two tellings of a gap.
    pub(crate) duplicated: usize,
    /// Received behind a later one of the same publisher.
    pub(crate) out_of_order: usize,
    /// One place that names two events.
    pub(crate) conflicting: usize,
    /// Of a project that the client did not follow, or before it was confirmed.
    pub(crate) foreign: usize,
    /// Offsets, confirmations and heartbeats that contradict each other.
    pub(crate) contradictory: usize,
    /// Received, then taken back by the store, and the client was never told.
    pub(crate) untold: usize,
    /// Confirmations with `recovered: false`.
    pub(crate) told_gaps: usize,
    /// Acknowledged events that the store does not have any more.
    pub(crate) taken_back: usize,
    pub(crate) findings: Vec<String>,
}

impl Verdict {
    /// Whether every promise was kept.
    pub(crate) fn is_clean(&self) -> bool {
        let faults = [self.lost, self.duplicated, self.out_of_order, self.conflicting, self.foreign];
        faults.iter().sum::<usize>() + self.contradictory + self.untold == 0
    }

    fn find(&mut self, kind: fn(&mut Self) -> &mut usize, text: impl FnOnce() -> String) {
        *kind(self) += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(text());
        }
    }
}

/// Judges. `kept`: what the streams have at the end, where that is known; what they lost by themselves is then not held against
/// those who carried it, as long as everybody who had it was told.
pub(crate) fn check(witnesses: &[Witness], acknowledged: &[Acknowledged], kept: Option<&Kept>) -> Verdict {
    let mut verdict = Verdict { acknowledged: acknowledged.len(), ..Verdict::default() };
    let mut names = Names::default();
    let mut published: BTreeMap<Project, Vec<&Acknowledged>> = BTreeMap::new();
    for one in acknowledged {
        published.entry(one.event.project).or_default().push(one);
        verdict.taken_back += usize::from(!is_kept(kept, one.event));
        if let Some(place) = &one.place {
            names.learn(one.event, place, &mut verdict);
        }
    }
    for (client, witness) in witnesses.iter().enumerate() {
        let mut followed: BTreeMap<_, _> =
            witness.projects.iter().map(|&project| (project, Followed::new(client, project))).collect();
        let mut is_degraded = false;
        for record in &witness.records {
            match record.heard {
                Heard::Degraded => is_degraded = true,
                Heard::Connected { .. } | Heard::Recovered { .. } => is_degraded = false,
                _ => {}
            }
            take(&mut followed, client, &record.heard, &mut names, &mut verdict);
        }
        if is_degraded {
            let text = || format!("client {client}: was told of degradation, and never that it is over");
            verdict.find(|v| &mut v.contradictory, text);
        }
        for (project, followed) in followed {
            let published = published.get(&project).map(Vec::as_slice).unwrap_or_default();
            followed.miss(published, kept, &mut verdict);
        }
    }
    verdict
}

fn is_kept(kept: Option<&Kept>, event: Numbered) -> bool {
    kept.is_none_or(|kept| kept.contains(&(event.project, event.number)))
}

fn take(
    followed: &mut BTreeMap<Project, Followed>,
    client: usize,
    heard: &Heard,
    names: &mut Names,
    verdict: &mut Verdict,
) {
    match heard {
        Heard::Connected { .. } => followed.values_mut().for_each(|followed| followed.confirmed = false),
        Heard::Confirmed { project, place, recovered, has_state, rewinds } => {
            let Some(followed) = followed.get_mut(project) else {
                let text = || format!("client {client}: p{project} was confirmed");
                return verdict.find(|v| &mut v.foreign, text);
            };
            if *has_state == (*recovered == Some(true)) {
                let text =
                    || format!("client {client}: p{project} recovered {recovered:?}, state {has_state}");
                verdict.find(|v| &mut v.contradictory, text);
            }
            followed.confirm(place, *recovered, *rewinds, verdict);
        }
        Heard::Event { event, offset, folded } => match followed.get_mut(&event.project) {
            Some(followed) if followed.confirmed => {
                followed.receive(*event, *offset, *folded, names, verdict);
            }
            _ => verdict.find(
                |v| &mut v.foreign,
                || format!("client {client}: got {event:?} without a subscription"),
            ),
        },
        Heard::Position { project, offset } => {
            let at = followed.get(project).and_then(|followed| followed.at.as_ref());
            if at.is_none_or(|at| *offset > at.offset) {
                let text =
                    || format!("client {client}: a heartbeat says p{project} {offset}, but it has {at:?}");
                verdict.find(|v| &mut v.contradictory, text);
            }
        }
        Heard::Strange(message) => {
            verdict.find(|v| &mut v.foreign, || format!("client {client}: {message}"));
        }
        Heard::Removed { project, .. } => {
            verdict.find(|v| &mut v.contradictory, || format!("client {client}: p{project} was removed"));
        }
        // Whatever happened to connections: what counts is what the next one says.
        _ => {}
    }
}

/// Which event each place names, for everybody.
#[derive(Default)]
struct Names(HashMap<(Project, Epoch, u64), Number>);

impl Names {
    fn learn(&mut self, event: Numbered, place: &Place, verdict: &mut Verdict) {
        let key = (event.project, place.epoch.clone(), place.offset);
        let known = *self.0.entry(key).or_insert(event.number);
        if known != event.number {
            let text = || format!("p{} {place:?} names {known:?} and {:?}", event.project, event.number);
            verdict.find(|v| &mut v.conflicting, text);
        }
    }
}

/// One client's way through one project.
struct Followed {
    client: usize,
    project: Project,
    confirmed: bool,
    at: Option<Place>,
    received: Received,
    /// Where a gap was told: how many events had been received, and from where it goes on.
    gaps: Vec<(usize, Place)>,
}

/// What came, in order, and the same by its number.
#[derive(Default)]
struct Received {
    all: Vec<(Number, Place)>,
    by_number: HashMap<Number, Vec<usize>>,
    newest: HashMap<Publisher, u32>,
}

impl Received {
    fn push(&mut self, number: Number, place: Place) {
        self.by_number.entry(number).or_default().push(self.all.len());
        let newest = self.newest.entry(number.publisher).or_default();
        *newest = number.n.max(*newest);
        self.all.push((number, place));
    }

    fn count(&self, number: Number) -> usize {
        self.by_number.get(&number).map_or(0, Vec::len)
    }

    /// How often this event came already, so that it may not come again at `place`. What the store took back is published again
    /// by whoever had no acknowledgement for it: a told gap and another epoch explain that, nothing else does.
    fn times(&self, number: Number, place: &Place, told_until: usize) -> usize {
        let indices = self.by_number.get(&number).map(Vec::as_slice).unwrap_or_default();
        let counts = |&&index: &&usize| index >= told_until || self.all[index].1.epoch == place.epoch;
        indices.iter().filter(counts).count()
    }

    /// Forgets what came behind `place` since the last told gap: it comes again, because the client asked for it again.
    fn rewind(&mut self, place: &Place, told_until: usize) {
        let mut tail = self.all.split_off(told_until);
        tail.retain(|(_, received)| received.offset <= place.offset);
        for (number, place) in std::mem::take(self).all.into_iter().chain(tail) {
            self.push(number, place);
        }
    }
}

impl Followed {
    fn new(client: usize, project: Project) -> Self {
        Self { client, project, confirmed: false, at: None, received: Received::default(), gaps: Vec::new() }
    }

    fn told_until(&self) -> usize {
        self.gaps.last().map_or(0, |(received, _)| *received)
    }

    fn confirm(&mut self, place: &Place, recovered: Option<bool>, rewinds: bool, verdict: &mut Verdict) {
        self.confirmed = true;
        match (recovered, &self.at) {
            (None, None) => {}
            (Some(false), Some(_)) => {
                verdict.told_gaps += 1;
                self.gaps.push((self.received.all.len(), place.clone()));
            }
            (Some(true), Some(at)) if rewinds && place.offset <= at.offset => {
                let told_until = self.told_until();
                self.received.rewind(place, told_until);
            }
            (Some(true), Some(at)) if place.offset == at.offset => {}
            (_, at) => {
                let Self { client, project, .. } = self;
                let told = format!("confirmed {recovered:?} at {place:?}");
                let text = || format!("client {client}: p{project} was {told}, but it has {at:?}");
                verdict.find(|v| &mut v.contradictory, text);
            }
        }
        self.at = Some(place.clone());
    }

    fn receive(
        &mut self,
        event: Numbered,
        offset: u64,
        folded: u64,
        names: &mut Names,
        verdict: &mut Verdict,
    ) {
        verdict.deliveries += 1;
        let (client, number, told_until) = (self.client, event.number, self.told_until());
        let at = self.at.as_mut().expect("a confirmation came first");
        let expected = at.offset + 1 + folded;
        at.offset = offset;
        let place = at.clone();
        names.learn(event, &place, verdict);
        if offset != expected {
            let text = || format!("client {client}: {event:?} has offset {offset}, expected {expected}");
            verdict.find(|v| &mut v.contradictory, text);
        }
        if self.received.times(number, &place, told_until) >= event.copies as usize {
            verdict.find(|v| &mut v.duplicated, || format!("client {client}: {event:?} again at {place:?}"));
        } else if self.received.newest.get(&number.publisher).is_some_and(|&newest| number.n < newest) {
            verdict
                .find(|v| &mut v.out_of_order, || format!("client {client}: {event:?} late, at {place:?}"));
        }
        self.received.push(number, place);
    }

    /// What should have come and did not, and what should not have been kept silent about.
    fn miss(&self, published: &[&Acknowledged], kept: Option<&Kept>, verdict: &mut Verdict) {
        let (client, project) = (self.client, self.project);
        for one in published {
            let enough = self.received.count(one.event.number) >= one.event.copies as usize;
            if !enough && is_kept(kept, one.event) && !self.was_told(one) {
                verdict.find(|v| &mut v.lost, || format!("client {client}: never got {one:?}"));
            }
        }
        let Some(kept) = kept else { return };
        for (number, place) in &self.received.all[self.told_until()..] {
            if !kept.contains(&(project, *number)) {
                let text = || {
                    format!("client {client}: p{project} {number:?} at {place:?} was taken back in silence")
                };
                verdict.find(|v| &mut v.untold, text);
            }
        }
    }

    /// Whether a told gap covers an event: it lies between those of its publisher that came before and after, and not behind the
    /// place from which everything was promised again.
    fn was_told(&self, missing: &Acknowledged) -> bool {
        let Number { publisher, n } = missing.event.number;
        let of_publisher = |(number, _): &&(Number, Place)| number.publisher == publisher;
        self.gaps.iter().any(|(received, place)| {
            let (before, after) = self.received.all.split_at(*received);
            let promised = missing.place.as_ref();
            let promised = promised.is_some_and(|at| at.epoch == place.epoch && at.offset > place.offset);
            before.iter().filter(of_publisher).all(|(number, _)| number.n <= n)
                && after.iter().filter(of_publisher).all(|(number, _)| number.n >= n)
                && !promised
        })
    }
}
