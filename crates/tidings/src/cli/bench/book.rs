//! What was published, who should get it, and how long it took. One book for each group of projects that is published to
//! at a pace of its own.

use std::ops::Range;

use anyhow::ensure;
use hdrhistogram::Histogram;

use super::{
    clock::{Clock, Nanos},
    event::Events,
    sequence::{NUMBER_MAX, Plan, Sequence},
};

/// Events that may be on their way at once; a power of two. More than that is a server that does not keep up at all.
const ON_THE_WAY_MAX: u32 = 1 << 20;
/// The longest latency that is told apart, in µs.
const LATENCY_US_MAX: u64 = 600_000_000;

/// Latencies in microseconds.
pub(super) type Latency = Histogram<u64>;

/// How a connection reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// As fast as it can. Only these are waited for.
    Prompt,
    /// A fixed number of bytes per second.
    Slow,
    /// Never.
    Stuck,
}

/// The book of a group of projects.
#[derive(Debug)]
pub(super) struct Book {
    clock: Clock,
    plan: Plan,
    events: Events,
    /// For each event on its way, by its number modulo `ON_THE_WAY_MAX`: when it was to be published …
    intended: Vec<Nanos>,
    /// … and how many prompt connections still wait for it.
    missing: Vec<u32>,
    published: u32,
    complete: u32,
    /// Prompt subscriptions of each project: those without a filter, those that see tasks only.
    audience: Vec<[u32; 2]>,
    /// Events whose latency counts.
    window: Range<u32>,
    pub(super) deliveries: u64,
    pub(super) slow_deliveries: u64,
    /// Events that a newer one of their key stood for, on all connections.
    pub(super) folded: u64,
    pub(super) latency: Latency,
    /// Of slow connections, apart from the others.
    pub(super) slow_latency: Latency,
    /// Until the last subscriber of an event had it.
    pub(super) complete_latency: Latency,
}

impl Book {
    pub(super) fn new(clock: Clock, plan: Plan, events: Events) -> anyhow::Result<Self> {
        let latency = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3)?;
        Ok(Self {
            clock,
            plan,
            events,
            intended: vec![0; ON_THE_WAY_MAX as usize],
            missing: vec![0; ON_THE_WAY_MAX as usize],
            published: 0,
            complete: 0,
            audience: vec![[0; 2]; plan.projects as usize],
            window: 0..0,
            deliveries: 0,
            slow_deliveries: 0,
            folded: 0,
            slow_latency: latency.clone(),
            complete_latency: latency.clone(),
            latency,
        })
    }

    pub(super) fn plan(&self) -> Plan {
        self.plan
    }

    /// The number of the next event to be published.
    pub(super) fn published(&self) -> u32 {
        self.published
    }

    /// Events that not every prompt subscriber has yet.
    pub(super) fn on_the_way(&self) -> u32 {
        self.published - self.complete
    }

    /// From the next event on latencies count.
    pub(super) fn open_window(&mut self) {
        self.window = self.published..u32::MAX;
    }

    pub(super) fn close_window(&mut self) {
        self.window.end = self.published;
    }

    /// A prompt connection waits for events from now on.
    pub(super) fn join(&mut self, sequence: &Sequence) {
        for project in sequence.projects() {
            self.audience[project as usize][usize::from(sequence.is_filtered())] += 1;
        }
    }

    /// A prompt connection is gone: nobody waits for it any more. Returns how many events it did not get.
    pub(super) fn leave(&mut self, sequence: &Sequence) -> u64 {
        for project in sequence.projects() {
            self.audience[project as usize][usize::from(sequence.is_filtered())] -= 1;
        }
        let expected = sequence.expected().iter();
        expected.map(|&next| self.release(next..self.published, sequence.is_filtered())).sum()
    }

    /// Nobody waits for these on one subscription any more. Returns how many those were.
    pub(super) fn release(&mut self, range: Range<u32>, filtered: bool) -> u64 {
        let oldest = self.published.saturating_sub(ON_THE_WAY_MAX);
        let mut count = 0;
        for n in self.plan.seen(range, filtered) {
            count += 1;
            if n >= oldest {
                self.arrived(n);
            }
        }
        count
    }

    /// The next event, to be published now; `intended` is when it was to be.
    pub(super) fn publish(&mut self, intended: Nanos) -> anyhow::Result<&[u8]> {
        let n = self.published;
        let at = (n % ON_THE_WAY_MAX) as usize;
        ensure!(n < NUMBER_MAX, "{NUMBER_MAX} events are the most that a run can number");
        ensure!(
            self.missing[at] == 0,
            "the server is more than {ON_THE_WAY_MAX} events behind; use a lower --rate, or --outstanding"
        );
        let [all, tasks_only] = self.audience[self.plan.project(n) as usize];
        self.missing[at] = if self.plan.is_durable(n) { all } else { all + tasks_only };
        self.complete += u32::from(self.missing[at] == 0);
        self.intended[at] = intended;
        self.published += 1;
        Ok(self.events.text(n))
    }

    /// One prompt subscriber has it.
    #[inline]
    pub(super) fn arrived(&mut self, n: u32) {
        let at = (n % ON_THE_WAY_MAX) as usize;
        let Some(missing) = self.missing[at].checked_sub(1) else { return };
        self.missing[at] = missing;
        if missing == 0 {
            self.complete += 1;
            if self.window.contains(&n) {
                record(&mut self.complete_latency, self.intended[at], self.clock.now());
            }
        }
    }

    /// Records how long it took to a connection whose latency is taken.
    #[inline]
    pub(super) fn took(&mut self, n: u32, class: Class, now: Nanos) {
        if self.window.contains(&n) {
            let latency = if class == Class::Prompt { &mut self.latency } else { &mut self.slow_latency };
            record(latency, self.intended[(n % ON_THE_WAY_MAX) as usize], now);
        }
    }
}

fn record(latency: &mut Latency, intended: Nanos, now: Nanos) {
    latency.saturating_record((now.saturating_sub(intended) / 1000).max(1));
}
