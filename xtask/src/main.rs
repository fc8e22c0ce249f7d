//! What is done to the repository: generate, lint, test, conformance. `cargo xtask --help`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to its user")]

mod conformance;
mod generate;
mod lint;
mod servers;
mod setup;
mod test;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use clap::Parser;

/// What is done to the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Install what the tests need and run them all
    Test,
    /// Run the WebSocket codec against Autobahn|Testsuite
    Conformance {
        /// Leave out large messages and compression
        #[arg(long)]
        quick: bool,
    },
    /// Check formatting, lints, types, licences, documents and generated files
    Lint,
    /// Write the generated files anew
    Generate,
    /// Install what the tests need, and nothing else
    Setup,
    /// Unpack Redis and Valkey servers of many versions into `target/redis`
    RedisVersions {
        /// Only these, such as `redis-6.2`
        names: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Test => test::run(),
        Task::Conformance { quick } => conformance::check(quick),
        Task::Lint => lint::run_all(),
        Task::Generate => generate::write(),
        Task::Setup => {
            setup::redis()?;
            setup::python().map(|_| ())
        }
        Task::RedisVersions { names } => servers::unpack(&names),
    }
}

/// The repository's top folder.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask lies in the repository").to_owned()
}

/// Runs a command in the repository, unless it has another folder, shows what it does, and fails if it fails.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = format!("{} {}", command.get_program().display(), arguments(command));
    println!("$ {shown}");
    if command.get_current_dir().is_none() {
        command.current_dir(root());
    }
    let status = command.status().with_context(|| format!("`{shown}` cannot be started"))?;
    if !status.success() {
        bail!("`{shown}` failed: {status}");
    }
    Ok(())
}

fn arguments(command: &Command) -> String {
    command.get_args().map(|argument| argument.display().to_string()).collect::<Vec<_>>().join(" ")
}

fn cargo() -> Command {
    Command::new(env!("CARGO"))
}
