//! `tidings bench storm`: all connections are cut at once and come back at once.

use std::time::Duration;

use anyhow::ensure;
use clap::Args;

use super::{
    Common, Publishing, Verdict,
    book::{Book, Class, Latency},
    clock::{Clock, nanos},
    drive::{Driver, Pace, drain, publish_due, run as drive},
    event::Events,
    fleet::Fleet,
    publisher::Publisher,
    report::Report,
    sequence::{Mix, Plan as Numbers, Sequence},
    session::{Phase, Plan},
    tally::Tally,
};

/// How long it may take until all are whole again.
const WHOLE_TIMEOUT: Duration = Duration::from_mins(1);
/// How often is looked who is whole; the resolution of what is reported.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
const LATENCY_US_MAX: u64 = 120_000_000;

/// Cut all connections at once; all come back at once, resume, and must miss nothing: how long it takes
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    publishing: Publishing,
    /// Connections
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Projects; the connections are spread over them
    #[arg(long, value_name = "P", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    projects: u32,
    /// Projects that each connection subscribes to
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    subscriptions: u32,
    /// Events per second over all projects, progress and custom events in turn
    #[arg(long, value_name = "PER_SECOND", default_value_t = 100.0, value_parser = super::rate)]
    rate: f64,
    /// Bytes of an event
    #[arg(long, value_name = "BYTES", default_value_t = 250)]
    event_bytes: usize,
    /// Seconds before the cut, and after all are whole
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = super::seconds)]
    duration: Duration,
}

pub(super) fn run(a: &Arguments) -> anyhow::Result<Verdict> {
    ensure!(a.subscriptions <= a.projects, "--subscriptions: there are only {} projects", a.projects);
    let (target, server) = (a.common.target()?, a.common.process()?);
    let clock = Clock::start();
    let numbers = Numbers { projects: a.projects, mix: Mix::DurableEvery(2) };
    let events = Events::new(numbers, &a.common.project, a.event_bytes)?;
    let mut tally = Tally::new(clock, vec![Book::new(clock, numbers, events)?]);
    let mut fleet = Fleet::new(target.clone(), 0)?;
    fleet.publish_with(Publisher::connect(&a.publishing.destination()?, &target)?)?;
    let plans = (0..a.connections)
        .map(|index| Plan {
            sequence: Sequence::new(numbers, index % a.projects, a.subscriptions, false, 0),
            book: 0,
            class: Class::Prompt,
            sampled: true,
            deflate: false,
            project: a.common.project.clone(),
            resumable: true,
        })
        .collect();
    fleet.open(plans, &mut tally)?;
    let mut drivers = [Driver { book: 0, pace: Pace::rate(a.rate, clock) }];
    drive(&mut fleet, &mut tally, &mut drivers, [Duration::ZERO, a.duration], server)?;

    let cpu_before = server.and_then(super::clock::Process::cpu);
    let back = come_back(&mut fleet, &mut tally, &mut drivers)?;
    let cpu_after = server.and_then(super::clock::Process::cpu);
    drive(&mut fleet, &mut tally, &mut drivers, [Duration::ZERO, a.duration], server)?;
    drain(&mut fleet, &mut tally)?;
    fleet.close(&mut tally)?;

    let mut report = Report::default();
    report.count("connections", "connections", a.connections.into());
    report.count("published", "events published", tally.books[0].published().into());
    report.latency("confirmed_us", "from the cut to all subscriptions confirmed", &back.confirmed);
    report.latency("whole_us", "from the cut to nothing missing", &back.whole);
    if let (Some(before), Some(after)) = (cpu_before, cpu_after) {
        report.number(
            "cpu_seconds",
            "server: CPU seconds for it",
            after.saturating_sub(before).as_secs_f64(),
            2,
        );
    }
    report.count("resume_expired", "connections that subscribed with `since`", tally.resume_expired);
    report.count("folded", "events that a newer one stood for", tally.books[0].folded);
    report.errors(&tally);
    report.print(a.common.json)?;
    Ok(Verdict::of(&tally))
}

/// How long each connection took.
struct Back {
    confirmed: Latency,
    whole: Latency,
}

/// Cuts everything, comes back, and publishes on meanwhile.
fn come_back(fleet: &mut Fleet, tally: &mut Tally, drivers: &mut [Driver]) -> anyhow::Result<Back> {
    let clock = tally.clock;
    let latency = Latency::new_with_bounds(1, LATENCY_US_MAX, 3)?;
    let mut back = Back { confirmed: latency.clone(), whole: latency };
    let cut_at = clock.now();
    fleet.cut();
    fleet.resume()?;
    // Per connection: up to which event it must come to be whole. Known once its subscriptions are confirmed.
    let mut goals = vec![None; fleet.sessions().count()];
    let (mut waiting, mut look_at) = (goals.len(), 0);
    while waiting > 0 {
        let now = clock.now();
        publish_due(fleet, tally, drivers, now)?;
        fleet.turn(Some(LOOK_INTERVAL), tally)?;
        if now < look_at {
            continue;
        }
        look_at = now + nanos(LOOK_INTERVAL);
        ensure!(
            now < cut_at + nanos(WHOLE_TIMEOUT),
            "{waiting} connections are not whole {WHOLE_TIMEOUT:?} after the cut"
        );
        let published = tally.books[0].published();
        let took_us = (clock.now() - cut_at) / 1000;
        waiting = 0;
        for (session, goal) in fleet.sessions().zip(&mut goals) {
            match (&session.phase, &goal) {
                (Phase::Closed, _) | (_, Some(0)) => continue,
                (Phase::Ready, None) => {
                    back.confirmed.saturating_record(took_us);
                    *goal = Some(published);
                }
                _ => {}
            }
            if goal.is_some_and(|goal| session.plan.sequence.expected().iter().all(|&next| next >= goal)) {
                back.whole.saturating_record(took_us);
                // Done; nothing is below the first event.
                *goal = Some(0);
            } else {
                waiting += 1;
            }
        }
    }
    Ok(back)
}
