//! `tidings bench flood`: much progress of one task, and a reader that cannot keep up with it.

use std::time::Duration;

use clap::Args;

use super::{
    Common, Publishing, Verdict,
    book::{Book, Class},
    clock::{Clock, nanos},
    drive::{Driver, Pace, drain, run as drive},
    event::Events,
    fleet::Fleet,
    publisher::Publisher,
    report::Report,
    sequence::{Mix, Plan as Numbers, Sequence},
    session::{Phase, Plan},
    tally::Tally,
};

/// One event in so many is durable.
const DURABLE_EVERY: u32 = 1000;
const NUMBERS: Numbers = Numbers { projects: 1, mix: Mix::DurableEvery(DURABLE_EVERY) };
/// How long the slow reader may take to come to the end.
const SLOW_TIMEOUT: Duration = Duration::from_mins(3);

/// Much progress of one task to a slow reader and a fast one. The slow one must end at the last state and miss nothing
/// durable, the fast one must get everything
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    publishing: Publishing,
    /// Events per second; one in a thousand is durable
    #[arg(long, value_name = "PER_SECOND", default_value_t = 10_000.0, value_parser = super::rate)]
    rate: f64,
    /// How fast the slow reader reads
    #[arg(long, value_name = "BYTES", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    slow_bytes_per_second: u32,
    /// Bytes of an event
    #[arg(long, value_name = "BYTES", default_value_t = 250)]
    event_bytes: usize,
    /// Seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = super::seconds)]
    duration: Duration,
}

pub(super) fn run(a: &Arguments) -> anyhow::Result<Verdict> {
    let (target, server) = (a.common.target()?, a.common.process()?);
    let clock = Clock::start();
    let events = Events::new(NUMBERS, &a.common.project, a.event_bytes)?;
    let mut tally = Tally::new(clock, vec![Book::new(clock, NUMBERS, events)?]);
    let mut fleet = Fleet::new(target.clone(), a.slow_bytes_per_second)?;
    fleet.publish_with(Publisher::connect(&a.publishing.destination()?, &target)?)?;
    let plan = |class| Plan {
        sequence: Sequence::new(NUMBERS, 0, 1, false, 0),
        book: 0,
        class,
        sampled: true,
        deflate: false,
        project: a.common.project.clone(),
        resumable: false,
    };
    fleet.open(vec![plan(Class::Prompt), plan(Class::Slow)], &mut tally)?;
    let mut drivers = [Driver { book: 0, pace: Pace::rate(a.rate, clock) }];
    let measured = drive(&mut fleet, &mut tally, &mut drivers, [Duration::ZERO, a.duration], server)?;
    drain(&mut fleet, &mut tally)?;

    let ended_at = clock.now();
    let published = tally.books[0].published();
    let slow_next = |fleet: &Fleet| {
        let slow = fleet.sessions().find(|session| session.plan.class == Class::Slow);
        slow.filter(|slow| slow.phase != Phase::Closed).map(|slow| slow.plan.sequence.expected()[0])
    };
    while slow_next(&fleet).is_some_and(|next| next < published)
        && clock.now() < ended_at + nanos(SLOW_TIMEOUT)
    {
        fleet.turn(None, &mut tally)?;
    }
    let caught_up_after = Duration::from_nanos(clock.now() - ended_at);
    let at_the_end = slow_next(&fleet) == Some(published);
    if !at_the_end {
        let example = match slow_next(&fleet) {
            Some(next) => format!("the slow reader is at event {next} of {published}"),
            None => "the slow reader was closed".to_owned(),
        };
        tally.errors.add("not at the last state", 1, example);
    }
    fleet.close(&mut tally)?;

    let mut report = Report::default();
    let book = &tally.books[0];
    report.count("published", "events published", published.into());
    report.count("fast_deliveries", "frames that the fast reader got", book.deliveries);
    report.count("slow_deliveries", "frames that the slow reader got", book.slow_deliveries);
    report.count("folded", "events that a newer one stood for", book.folded);
    report.put(
        "slow_at_last_state",
        "slow reader ends at the last state",
        at_the_end,
        at_the_end.to_string(),
    );
    report.number(
        "caught_up_seconds",
        "seconds that it took after the end",
        caught_up_after.as_secs_f64(),
        1,
    );
    report.latency("latency_us", "latency, fast reader", &book.latency);
    report.latency("slow_latency_us", "latency, slow reader", &book.slow_latency);
    measured.report_shares(&mut report);
    report.bytes("memory_peak_bytes", "server: memory, peak", measured.memory_peak);
    report.errors(&tally);
    report.print(a.common.json)?;
    Ok(Verdict::of(&tally))
}
