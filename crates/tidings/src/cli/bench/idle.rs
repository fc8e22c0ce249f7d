//! `tidings bench idle`: what connections cost on which nothing happens.

use std::time::Duration;

use clap::Args;

use super::{
    Common, Verdict,
    book::{Book, Class},
    clock::{Clock, Process, nanos},
    event::Events,
    fleet::Fleet,
    report::Report,
    sequence::{Mix, Plan as Numbers, Sequence},
    session::Plan,
    tally::Tally,
};

/// Memory is read after so many thirds of the connections.
const STEPS: u32 = 3;
/// For a server to settle after connections were opened.
const OPENED_WAIT: Duration = Duration::from_secs(2);
/// Connections that are opened and closed before memory is first read.
const WARMUP_CONNECTIONS: u32 = 500;
/// For a server to give back what closed connections held.
const CLOSED_WAIT: Duration = Duration::from_secs(5);
const TURN: Duration = Duration::from_millis(100);

/// Connections on which nothing happens: memory and CPU of each (needs --pid)
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Connections, each with one subscription; memory is read at one third, two thirds, and all of them
    #[arg(short = 'n', long, value_name = "N", default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(3..))]
    connections: u32,
    /// Projects; the connections are spread over them
    #[arg(long, value_name = "P", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    projects: u32,
    /// Seconds to wait
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = super::seconds)]
    duration: Duration,
}

pub(super) fn run(a: &Arguments) -> anyhow::Result<Verdict> {
    let (target, server) = (a.common.target()?, a.common.process()?);
    let memory = || server.and_then(Process::memory_bytes);
    let clock = Clock::start();
    let numbers = Numbers { projects: a.projects, mix: Mix::Latest };
    // Nothing is published, so nothing has a size.
    let events = Events::new(numbers, &a.common.project, 1000)?;
    let mut tally = Tally::new(clock, vec![Book::new(clock, numbers, events)?]);
    let plans = |from: u32, to: u32| -> Vec<Plan> {
        let plan = |index| Plan {
            sequence: Sequence::new(numbers, index % a.projects, 1, false, 0),
            book: 0,
            class: Class::Prompt,
            sampled: false,
            deflate: false,
            project: a.common.project.clone(),
            resumable: false,
        };
        (from..to).map(plan).collect()
    };
    let mut report = Report::default();
    // What a server needs for its first connections, its code above all, is not what connections cost.
    let mut first = Fleet::new(target.clone(), 0)?;
    first.open(plans(0, a.connections.min(WARMUP_CONNECTIONS)), &mut tally)?;
    first.close(&mut tally)?;
    if server.is_some() {
        std::thread::sleep(CLOSED_WAIT);
    }
    report.bytes("memory_before_bytes", "server: memory before", memory());

    let mut fleet = Fleet::new(target, 0)?;
    let mut at_step = Vec::new();
    let (mut opened, mut opening, mut opening_cpu) = (0, 0, Duration::ZERO);
    for step in 1..=STEPS {
        let count = u32::try_from(u64::from(a.connections) * u64::from(step) / u64::from(STEPS))?;
        let (started, cpu_before) = (clock.now(), server.and_then(Process::cpu));
        fleet.open(plans(opened, count), &mut tally)?;
        opening += clock.now() - started;
        if let (Some(before), Some(after)) = (cpu_before, server.and_then(Process::cpu)) {
            opening_cpu += after.saturating_sub(before);
        }
        opened = count;
        if server.is_some() {
            wait(&mut fleet, &mut tally, OPENED_WAIT)?;
        }
        let bytes = memory();
        report.bytes(&format!("memory_{step}_bytes"), &format!("server: memory at {count}"), bytes);
        at_step.push((count, bytes));
    }
    report.number("opening_ms", "opening all, with their subscriptions, ms", opening as f64 / 1e6, 1);
    if server.is_some() {
        let each = opening_cpu.as_secs_f64() * 1e6 / f64::from(a.connections);
        report.number("opening_cpu_us", "server: CPU µs to open a connection", each, 1);
    }
    if let [(few, Some(before)), .., (many, Some(after))] = at_step[..] {
        let each = (after as f64 - before as f64) / f64::from(many - few);
        report.number("bytes_per_connection", "server: bytes per connection between the two", each, 0);
    }

    let (cpu_before, own_before) = (server.and_then(Process::cpu), Process::own().cpu());
    wait(&mut fleet, &mut tally, a.duration)?;
    let seconds = a.duration.as_secs_f64();
    if let (Some(before), Some(after)) = (cpu_before, server.and_then(Process::cpu)) {
        let us = after.saturating_sub(before).as_secs_f64() * 1e6 / seconds / f64::from(a.connections);
        report.number("cpu_us_per_second_per_connection", "server: CPU µs per second per connection", us, 3);
    }
    if let (Some(before), Some(after)) = (own_before, Process::own().cpu()) {
        let share = after.saturating_sub(before).as_secs_f64() / seconds;
        report.number("own_cpu_share", "this program: share of a core", share, 3);
    }
    report.bytes("memory_idle_bytes", "server: memory after the wait", memory());
    fleet.close(&mut tally)?;
    if server.is_some() {
        std::thread::sleep(CLOSED_WAIT);
    }
    report.bytes("memory_after_bytes", "server: memory, connections closed", memory());
    report.errors(&tally);
    report.print(a.common.json)?;
    Ok(Verdict::of(&tally))
}

fn wait(fleet: &mut Fleet, tally: &mut Tally, duration: Duration) -> anyhow::Result<()> {
    let until = tally.clock.now() + nanos(duration);
    while tally.clock.now() < until {
        fleet.turn(Some(TURN), tally)?;
    }
    Ok(())
}
