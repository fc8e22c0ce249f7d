//! `tidings bench big`: what large events do to those who do not get them.

use std::time::Duration;

use clap::Args;

use super::{
    Common, Publishing, Verdict,
    book::{Book, Class},
    clock::Clock,
    drive::{Driver, Pace, drain, run as drive},
    event::Events,
    fleet::Fleet,
    publisher::Publisher,
    report::Report,
    sequence::{Mix, Plan as Numbers, Sequence},
    session::Plan,
    tally::Tally,
};

/// Large events to one project, small ones to another: the latency of the small ones
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    publishing: Publishing,
    /// Connections that get the large events
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    connections: u32,
    /// Bytes of a large event
    #[arg(long, value_name = "BYTES", default_value_t = 1_000_000)]
    big_bytes: usize,
    /// Large events per second
    #[arg(long, value_name = "PER_SECOND", default_value_t = 1.0, value_parser = super::rate)]
    big_rate: f64,
    /// Connections that get the small events
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    small_connections: u32,
    /// Bytes of a small event
    #[arg(long, value_name = "BYTES", default_value_t = 300)]
    event_bytes: usize,
    /// Small events per second
    #[arg(long, value_name = "PER_SECOND", default_value_t = 100.0, value_parser = super::rate)]
    rate: f64,
    /// Measured seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = super::seconds)]
    duration: Duration,
    /// Seconds of the same load before it is measured
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = super::seconds)]
    warmup: Duration,
}

/// One project each, all durable: a large event that may be left out would measure nothing.
const NUMBERS: Numbers = Numbers { projects: 1, mix: Mix::Durable };

pub(super) fn run(a: &Arguments) -> anyhow::Result<Verdict> {
    let (target, server) = (a.common.target()?, a.common.process()?);
    let clock = Clock::start();
    let (big, small) = (format!("{}-big", a.common.project), format!("{}-small", a.common.project));
    let books = vec![
        Book::new(clock, NUMBERS, Events::new(NUMBERS, &small, a.event_bytes)?)?,
        Book::new(clock, NUMBERS, Events::new(NUMBERS, &big, a.big_bytes)?)?,
    ];
    let mut tally = Tally::new(clock, books);
    let mut fleet = Fleet::new(target.clone(), 0)?;
    fleet.publish_with(Publisher::connect(&a.publishing.destination()?, &target)?)?;
    let plan = |book: usize, project: &str| Plan {
        sequence: Sequence::new(NUMBERS, 0, 1, false, 0),
        book,
        class: Class::Prompt,
        sampled: true,
        deflate: false,
        project: project.to_owned(),
        resumable: false,
    };
    let plans = (0..a.small_connections)
        .map(|_| plan(0, &small))
        .chain((0..a.connections).map(|_| plan(1, &big)))
        .collect();
    fleet.open(plans, &mut tally)?;
    let mut drivers = [
        Driver { book: 0, pace: Pace::rate(a.rate, clock) },
        Driver { book: 1, pace: Pace::rate(a.big_rate, clock) },
    ];
    let measured = drive(&mut fleet, &mut tally, &mut drivers, [a.warmup, a.duration], server)?;
    drain(&mut fleet, &mut tally)?;
    fleet.close(&mut tally)?;

    let mut report = Report::default();
    report.count("connections", "connections, large events", a.connections.into());
    report.count("small_connections", "connections, small events", a.small_connections.into());
    measured.report_shares(&mut report);
    report.latency("latency_us", "latency, small events", &tally.books[0].latency);
    report.latency("big_latency_us", "latency, large events", &tally.books[1].latency);
    report.bytes("memory_peak_bytes", "server: memory, peak", measured.memory_peak);
    report.errors(&tally);
    report.print(a.common.json)?;
    Ok(Verdict::of(&tally))
}
