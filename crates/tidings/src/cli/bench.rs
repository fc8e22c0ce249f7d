//! `tidings bench`: a load generator. Opens connections to a running server, publishes, and checks every frame that comes:
//! nothing may be missing, come twice, or out of order. It speaks to anything that speaks the protocol's few messages, so
//! that other servers can be measured beside this one.
//!
//! One thread reads all sockets into one buffer and never parses JSON on the way: a generator that is slower than the
//! server measures itself.

#![allow(clippy::cast_precision_loss, reason = "figures are for reading")]

mod big;
mod book;
mod clock;
mod drive;
mod event;
mod fanout;
mod fleet;
mod flood;
mod frames;
mod idle;
mod inflate;
mod publisher;
mod report;
mod sequence;
mod session;
mod storm;
mod tally;
mod target;

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};

use self::{clock::Process, publisher::Destination, tally::Tally, target::Target};

/// Load on a server of your own, and what it makes of it.
///
/// Every frame is checked: an event that is missing, repeated or out of order is an error, and the exit code is then 1.
/// The server and this program should not share a core. `bench/README.md` tells how to measure well.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, Subcommand)]
enum Mode {
    Fanout(fanout::Arguments),
    Big(big::Arguments),
    Flood(flood::Arguments),
    Idle(idle::Arguments),
    Storm(storm::Arguments),
}

/// What every mode takes.
#[derive(Args, Debug)]
struct Common {
    /// The server's WebSocket
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:8000/ws")]
    url: String,
    /// A header for the upgrade, such as `Cookie: session=bench-{n}`, where `{n}` is the connection's number, from 0; may be
    /// given several times
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// The beginning of the projects' names: `NAME-0`, `NAME-1` …
    #[arg(long, value_name = "NAME", default_value = "bench")]
    project: String,
    /// The server's process, to read its CPU time and memory from (Linux)
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Common {
    fn target(&self) -> anyhow::Result<Target> {
        Target::parse(&self.url, &self.header)
    }

    fn process(&self) -> anyhow::Result<Option<Process>> {
        self.pid.map(Process::new).transpose()
    }
}

/// Where modes publish.
#[derive(Args, Debug)]
struct Publishing {
    /// `redis://[[USER]:PASSWORD@]HOST:PORT[#CHANNEL]`, the channel that the server listens to; or `http`: the server's own
    /// `POST /api/events`
    #[arg(long, value_name = "WHERE", default_value = "http")]
    publish: String,
    /// A key for publishing over HTTP
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

impl Publishing {
    fn destination(&self) -> anyhow::Result<Destination> {
        Destination::parse(&self.publish, self.key.clone())
    }
}

/// How a run went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// At least one event was not delivered as it should be.
    Errors,
}

impl Verdict {
    fn of(tally: &Tally) -> Self {
        if tally.errors.is_empty() { Self::Good } else { Self::Errors }
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let verdict = match &arguments.mode {
        Mode::Fanout(arguments) => fanout::run(arguments)?,
        Mode::Big(arguments) => big::run(arguments)?,
        Mode::Flood(arguments) => flood::run(arguments)?,
        Mode::Idle(arguments) => idle::run(arguments)?,
        Mode::Storm(arguments) => storm::run(arguments)?,
    };
    Ok(match verdict {
        Verdict::Good => ExitCode::SUCCESS,
        Verdict::Errors => ExitCode::FAILURE,
    })
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|_| "expected a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "expected a number of seconds".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().ok().filter(|rate| (0.001..=1e6).contains(rate));
    rate.ok_or_else(|| "expected a number of events per second, up to 1000000".to_owned())
}
