//! Publishing at a pace, and measuring while it lasts.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use mio::Waker;

use super::{
    book::Class,
    clock::{Clock, Nanos, Process, nanos},
    fleet::Fleet,
    report::Report,
    session::Phase,
    tally::Tally,
};

/// Without a delivery for this long, while some are waited for, a run has come to a halt.
const STALLED_AFTER: Duration = Duration::from_secs(15);
/// How long the last events may take to arrive.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// A thread that wakes more often would take time from those who work.
const TICK_MIN: Duration = Duration::from_micros(500);
/// How often the server's memory is looked at.
const MEMORY_INTERVAL: Duration = Duration::from_millis(500);
/// The longest wait for sockets, so that the time is looked at.
const TURN_MAX: Duration = Duration::from_millis(20);

/// When the next event of a book is due.
#[derive(Debug)]
pub(super) enum Pace {
    /// As soon as fewer than this many events are on their way.
    Outstanding(u32),
    /// At times that are fixed in advance. An event that goes out late counts from when it was due.
    Rate { start: Nanos, interval: Nanos, sent: u64 },
}

impl Pace {
    pub(super) fn rate(per_second: f64, clock: Clock) -> Self {
        let interval = nanos(Duration::from_secs_f64(1.0 / per_second));
        Self::Rate { start: clock.now() + interval, interval, sent: 0 }
    }

    /// When the next event was to be published, if that is now.
    fn due(&mut self, on_the_way: u32, now: Nanos) -> Option<Nanos> {
        match self {
            Self::Outstanding(max) => (on_the_way < *max).then_some(now),
            Self::Rate { start, interval, sent } => {
                let due = *start + *interval * *sent;
                (due <= now).then(|| {
                    *sent += 1;
                    due
                })
            }
        }
    }

    fn interval(&self) -> Option<Duration> {
        match self {
            Self::Outstanding(_) => None,
            Self::Rate { interval, .. } => Some(Duration::from_nanos(*interval)),
        }
    }
}

/// Wakes the loop when events are due: the poll's own timeouts are whole milliseconds.
struct Ticker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(waker: Arc<Waker>, interval: Duration, clock: Clock) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let interval = nanos(interval.max(TICK_MIN));
        let thread = std::thread::spawn(move || {
            let mut next = clock.now() + interval;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_nanos(next.saturating_sub(clock.now())));
                // The loop is gone, or is about to look anyway.
                let _ = waker.wake();
                next = (next + interval).max(clock.now());
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What is published: a book, at a pace.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) book: usize,
    pub(super) pace: Pace,
}

/// How much had happened at a point in time.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    at: Nanos,
    deliveries: u64,
    published: u64,
    server_cpu: Option<Duration>,
    own_cpu: Option<Duration>,
}

impl Snapshot {
    fn take(tally: &Tally, server: Option<Process>) -> Self {
        Self {
            at: tally.clock.now(),
            deliveries: tally.deliveries(),
            published: tally.books.iter().map(|book| u64::from(book.published())).sum(),
            server_cpu: server.and_then(Process::cpu),
            own_cpu: Process::own().cpu(),
        }
    }
}

/// What happened in the measured window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) seconds: f64,
    pub(super) deliveries: u64,
    pub(super) published: u64,
    pub(super) server_cpu: Option<Duration>,
    pub(super) own_cpu_share: Option<f64>,
    pub(super) memory_peak: Option<u64>,
}

impl Measured {
    fn between(from: Snapshot, to: Snapshot, memory_peak: Option<u64>) -> Self {
        let seconds = Duration::from_nanos(to.at - from.at).as_secs_f64();
        let spent = |from: Option<Duration>, to: Option<Duration>| Some(to?.saturating_sub(from?));
        Self {
            seconds,
            deliveries: to.deliveries - from.deliveries,
            published: to.published - from.published,
            server_cpu: spent(from.server_cpu, to.server_cpu),
            own_cpu_share: spent(from.own_cpu, to.own_cpu).map(|own| own.as_secs_f64() / seconds),
            memory_peak,
        }
    }

    pub(super) fn report(&self, report: &mut Report) {
        report.number("seconds", "seconds measured", self.seconds, 2);
        report.rate("deliveries_per_second", "deliveries per second", self.deliveries as f64 / self.seconds);
        report.rate(
            "publishes_per_second",
            "events published per second",
            self.published as f64 / self.seconds,
        );
        if let Some(cpu) = self.server_cpu {
            let per_delivery = cpu.as_secs_f64() * 1e6 / (self.deliveries.max(1) as f64);
            report.number("cpu_us_per_delivery", "server: CPU µs per delivery", per_delivery, 3);
        }
        self.report_shares(report);
    }

    /// How busy the two sides were.
    pub(super) fn report_shares(&self, report: &mut Report) {
        if let Some(cpu) = self.server_cpu {
            report.number("server_cpu_share", "server: share of a core", cpu.as_secs_f64() / self.seconds, 3);
        }
        if let Some(share) = self.own_cpu_share {
            report.number("own_cpu_share", "this program: share of a core", share, 3);
        }
    }
}

/// Publishes for `warmup` and then for `duration`, which is measured.
pub(super) fn run(
    fleet: &mut Fleet,
    tally: &mut Tally,
    drivers: &mut [Driver],
    [warmup, duration]: [Duration; 2],
    server: Option<Process>,
) -> anyhow::Result<Measured> {
    let clock = tally.clock;
    let shortest = drivers.iter().filter_map(|driver| driver.pace.interval()).min();
    let _ticker = shortest.map(|interval| Ticker::start(fleet.waker(), interval, clock));
    let window_from = clock.now() + nanos(warmup);
    let window_to = window_from + nanos(duration);
    let mut first = None;
    let (mut memory_at, mut memory_peak) = (0, None);
    let mut moved = (clock.now(), 0);
    loop {
        let now = clock.now();
        if now >= window_from && first.is_none() {
            tally.books.iter_mut().for_each(super::book::Book::open_window);
            first = Some(Snapshot::take(tally, server));
        }
        if now >= window_to {
            break;
        }
        publish_due(fleet, tally, drivers, now)?;
        fleet.turn(Some(TURN_MAX), tally)?;
        if now >= memory_at {
            memory_at = now + nanos(MEMORY_INTERVAL);
            memory_peak = memory_peak.max(server.and_then(Process::memory_bytes));
            if tally.deliveries() != moved.1 || tally.books.iter().all(|book| book.on_the_way() == 0) {
                moved = (now, tally.deliveries());
            }
            ensure!(
                now < moved.0 + nanos(STALLED_AFTER),
                "nothing has been delivered for {STALLED_AFTER:?} although events were published; does the server \
                 get its events from where they are published?"
            );
            ensure!(
                fleet.sessions().any(|session| session.phase != Phase::Closed),
                "the server has closed all connections: {}",
                tally.errors.iter().next().map(|(_, _, example)| example.to_owned()).unwrap_or_default()
            );
        }
    }
    let last = Snapshot::take(tally, server);
    tally.books.iter_mut().for_each(super::book::Book::close_window);
    let first = first.context("the window was opened before it ended")?;
    Ok(Measured::between(first, last, memory_peak))
}

/// Publishes what is due.
pub(super) fn publish_due(
    fleet: &mut Fleet,
    tally: &mut Tally,
    drivers: &mut [Driver],
    now: Nanos,
) -> anyhow::Result<()> {
    let Some(publisher) = fleet.publisher() else { return Ok(()) };
    for driver in drivers {
        let book = &mut tally.books[driver.book];
        while let Some(intended) = driver.pace.due(book.on_the_way(), now) {
            publisher.publish(book.publish(intended)?);
        }
    }
    publisher.flush()
}

/// Waits until everything published has arrived at prompt connections. What has not after a while is counted as missing.
pub(super) fn drain(fleet: &mut Fleet, tally: &mut Tally) -> anyhow::Result<()> {
    let give_up_at = tally.clock.now() + nanos(DRAIN_TIMEOUT);
    let waits = |fleet: &mut Fleet, tally: &Tally| {
        tally.books.iter().any(|book| book.on_the_way() > 0)
            || fleet.publisher().is_some_and(|publisher| !publisher.is_idle())
    };
    while waits(fleet, tally) && tally.clock.now() < give_up_at {
        fleet.turn(Some(TURN_MAX), tally)?;
    }
    // What is sent twice comes behind everything else.
    let settle_until = tally.clock.now() + nanos(5 * TURN_MAX);
    while tally.clock.now() < settle_until {
        fleet.turn(Some(TURN_MAX), tally)?;
    }
    for session in fleet.sessions().filter(|session| session.phase != Phase::Closed) {
        if session.plan.class != Class::Prompt {
            continue;
        }
        let book = &tally.books[session.plan.book];
        let (sequence, published) = (&session.plan.sequence, book.published());
        let missing: usize = sequence
            .expected()
            .iter()
            .map(|&next| book.plan().seen(next..published, sequence.is_filtered()).count())
            .sum();
        tally.errors.add(
            "missing",
            missing as u64,
            "events that had not arrived long after they were published",
        );
    }
    Ok(())
}
