//! `tidings bench fanout`: events to many subscribers.

use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};

use super::{
    Common, Publishing, Verdict,
    book::{Book, Class},
    clock::{Clock, Process},
    drive::{Driver, Pace, drain, run as drive},
    event::Events,
    fleet::Fleet,
    publisher::Publisher,
    report::Report,
    sequence::{Mix, Plan as Numbers, Sequence},
    session::Plan,
    tally::Tally,
};

/// Up to this many deliveries per second latencies are taken from every connection.
const SAMPLED_ALL_PER_SECOND_MAX: f64 = 200_000.0;
/// Above it from every so manieth.
const SAMPLED_EVERY: usize = 100;
/// But not from fewer than this.
const SAMPLED_MIN: usize = 10;
/// For a server to give back what closed connections held.
const CLOSED_WAIT: Duration = Duration::from_secs(2);

/// Publish to many subscribers; with --outstanding as fast as they take it, with --rate at fixed times
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    publishing: Publishing,
    /// Connections
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Projects; the connections are spread over them
    #[arg(long, value_name = "P", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    projects: u32,
    /// Projects that each connection subscribes to
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    subscriptions: u32,
    /// Closed loop: publish as soon as fewer than this many events have not reached all their subscribers [default: 64]
    #[arg(long, value_name = "W", conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..))]
    outstanding: Option<u32>,
    /// Open loop: events per second, at times fixed in advance. Latencies count from the intended time, so that a late
    /// event is not flattered
    #[arg(long, value_name = "PER_SECOND", value_parser = super::rate)]
    rate: Option<f64>,
    /// Measured seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = super::seconds)]
    duration: Duration,
    /// Seconds of the same load before it is measured
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = super::seconds)]
    warmup: Duration,
    /// Bytes of an event in all
    #[arg(long, value_name = "BYTES", default_value_t = 250)]
    event_bytes: usize,
    /// What is published: progress, which is `latest`; custom events, which are durable; or both in turn
    #[arg(long = "type", value_name = "TYPE", default_value = "task.progress")]
    kind: Kind,
    /// This share of the connections subscribes to `task.*` only (0 to 1)
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = super::share)]
    filtered: f64,
    /// This share of the connections offers permessage-deflate (0 to 1)
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = super::share)]
    deflate: f64,
    /// So many of the connections never read
    #[arg(long, value_name = "K", default_value_t = 0)]
    stuck: u32,
    /// So many of the connections read slowly
    #[arg(long, value_name = "K", default_value_t = 0)]
    slow: u32,
    /// How fast those read
    #[arg(long, value_name = "BYTES", default_value_t = 10_000)]
    slow_bytes_per_second: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    #[value(name = "task.progress")]
    Progress,
    #[value(name = "custom.event")]
    Custom,
    Mixed,
}

impl Kind {
    fn mix(self) -> Mix {
        match self {
            Self::Progress => Mix::Latest,
            Self::Custom => Mix::Durable,
            Self::Mixed => Mix::DurableEvery(2),
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Verdict> {
    let a = arguments;
    ensure!(a.subscriptions <= a.projects, "--subscriptions: there are only {} projects", a.projects);
    ensure!(
        a.stuck.saturating_add(a.slow) < a.connections,
        "--stuck, --slow: at least one connection must read as it should"
    );
    let (target, server) = (a.common.target()?, a.common.process()?);
    let memory_before = server.and_then(Process::memory_bytes);

    let clock = Clock::start();
    let numbers = Numbers { projects: a.projects, mix: a.kind.mix() };
    let events = Events::new(numbers, &a.common.project, a.event_bytes)?;
    let mut tally = Tally::new(clock, vec![Book::new(clock, numbers, events)?]);
    let mut fleet = Fleet::new(target.clone(), a.slow_bytes_per_second)?;
    fleet.publish_with(Publisher::connect(&a.publishing.destination()?, &target)?)?;
    fleet.open(plans(a, numbers), &mut tally)?;
    let memory_open = server.and_then(Process::memory_bytes);

    let pace = match a.rate {
        Some(rate) => Pace::rate(rate, clock),
        None => Pace::Outstanding(a.outstanding.unwrap_or(64)),
    };
    let mut drivers = [Driver { book: 0, pace }];
    let measured = drive(&mut fleet, &mut tally, &mut drivers, [a.warmup, a.duration], server)?;
    drain(&mut fleet, &mut tally)?;
    fleet.close(&mut tally)?;

    let mut report = Report::default();
    report.count("connections", "connections", a.connections.into());
    measured.report(&mut report);
    let book = &tally.books[0];
    report.latency("latency_us", "latency", &book.latency);
    report.latency("complete_latency_us", "latency to the last subscriber", &book.complete_latency);
    if a.slow > 0 {
        report.latency("slow_latency_us", "latency, slow connections", &book.slow_latency);
        report.count("slow_deliveries", "frames that slow connections got", book.slow_deliveries);
    }
    report.count("folded", "events that a newer one stood for", book.folded);
    if a.deflate > 0.0 {
        report.count("compressed", "frames that came compressed", tally.compressed);
    }
    report.bytes("memory_before_bytes", "server: memory before", memory_before);
    report.bytes("memory_open_bytes", "server: memory, connections open", memory_open);
    report.bytes("memory_peak_bytes", "server: memory, peak", measured.memory_peak);
    if let Some(server) = server {
        std::thread::sleep(CLOSED_WAIT);
        report.bytes("memory_after_bytes", "server: memory, connections closed", server.memory_bytes());
    }
    report.errors(&tally);
    report.print(a.common.json)?;
    Ok(Verdict::of(&tally))
}

fn plans(a: &Arguments, numbers: Numbers) -> Vec<Plan> {
    let (count, sampled_every) = (a.connections as usize, sampled_every(a));
    (0..count)
        .map(|index| {
            // The last ones, so that what the others do is the same with and without them.
            let class = match count - index {
                from_end if from_end <= a.stuck as usize => Class::Stuck,
                from_end if from_end <= (a.stuck + a.slow) as usize => Class::Slow,
                _ => Class::Prompt,
            };
            let first = u32::try_from(index).unwrap_or(u32::MAX) % a.projects;
            Plan {
                sequence: Sequence::new(numbers, first, a.subscriptions, falls_in(index, a.filtered), 0),
                book: 0,
                class,
                sampled: class == Class::Slow || is_sampled(index, sampled_every),
                // Counted apart from the filter, so that both kinds are compressed.
                deflate: falls_in(index / 2, a.deflate),
                project: a.common.project.clone(),
                resumable: false,
            }
        })
        .collect()
}

fn sampled_every(a: &Arguments) -> usize {
    let subscribers = f64::from(a.connections) * f64::from(a.subscriptions) / f64::from(a.projects);
    if a.rate.is_some_and(|rate| rate * subscribers <= SAMPLED_ALL_PER_SECOND_MAX) {
        return 1;
    }
    SAMPLED_EVERY.min(a.connections as usize / SAMPLED_MIN).max(1)
}

/// Every so manieth, but with no pattern that could go together with how projects and filters are dealt out.
fn is_sampled(index: usize, every: usize) -> bool {
    let mixed = (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    mixed.is_multiple_of(every as u64)
}

/// Whether number `index` belongs to the share, which is spread evenly.
fn falls_in(index: usize, share: f64) -> bool {
    let index = index as f64;
    (index * share).floor() < ((index + 1.0) * share).floor()
}
