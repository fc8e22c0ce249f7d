//! The command line.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is where the program speaks to its user")]

mod bench;
mod doctor;
mod http;
mod logging;
mod own_certificate;
mod publish;
mod serve;
mod tail;
mod token;
mod watch;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tidings_protocol::schema;

use crate::config::{Flags, Layers, SettingError, Settings, environment_variables, keys};

/// Wrong usage or a setting that cannot be used, as clap has it.
const EXIT_USAGE: u8 = 2;

/// A page that shows what happens in a project, without polling.
#[derive(Parser)]
#[command(name = "tidings", version, about, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    settings: SettingFlags,
    #[command(subcommand)]
    command: Command,
}

/// Flags that stand over the environment and the file.
#[derive(Args)]
struct SettingFlags {
    /// Settings file; without it `tidings.toml` in this folder is read if it is there
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// A setting, by its variable: `--set WS_HEARTBEAT_INTERVAL=10`; see `tidings config`
    #[arg(long, value_name = "NAME=VALUE", global = true, value_parser = name_and_value)]
    set: Vec<(String, String)>,
    /// Listen address; stands for TIDINGS_LISTEN
    #[arg(long, value_name = "ADDRESS", global = true)]
    listen: Option<String>,
    /// Port; stands for `BACKEND_PORT`
    #[arg(long, value_name = "PORT", global = true)]
    port: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service
    Serve,
    /// Run it on this machine with nothing installed: insecure, with a demonstration and a page to see it
    Dev {
        /// Without the demonstration on project `demo`
        #[arg(long)]
        no_demo: bool,
    },
    /// Publish an event, or NDJSON from the standard input
    Publish(publish::Arguments),
    /// Show a project's events as they happen
    Tail(tail::Arguments),
    /// Watch a folder and publish to a service what becomes of its files
    Watch(watch::Arguments),
    /// Make a token (JWT) for development
    Token(token::Arguments),
    Bench(bench::Arguments),
    /// Print every setting with its value and where it came from
    Config {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print the URL that a frontend connects to
    Url,
    Doctor(doctor::Arguments),
    /// Ask a running service whether it lives; for container health checks
    Healthcheck {
        /// Whether it is ready for clients, not only alive
        #[arg(long)]
        ready: bool,
        /// The service's address; without it the one of the settings, where it may show the certificate in `TIDINGS_TLS_CERT`
        /// whatever name that has
        #[arg(long, value_name = "URL")]
        url: Option<String>,
    },
    /// Print a JSON Schema of what goes over the wire
    Schema {
        /// Which
        #[arg(default_value = "events")]
        name: SchemaName,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum SchemaName {
    Events,
    Client,
    Server,
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        // A reader that has seen enough, as in `tidings tail | head`, is no error.
        Err(error)
            if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            let usage = error.is::<SettingError>();
            ExitCode::from(if usage { EXIT_USAGE } else { 1 })
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let layers = cli.settings.layers()?;
    match cli.command {
        Command::Serve => serve::serve(&layers)?,
        Command::Dev { no_demo } => serve::dev(&layers, !no_demo)?,
        Command::Publish(arguments) => publish::run(&Settings::read(&layers)?, arguments)?,
        Command::Tail(arguments) => tail::run(&Settings::read(&layers)?, arguments)?,
        Command::Watch(arguments) => return watch::run(&Settings::read(&layers)?, arguments),
        Command::Token(arguments) => token::run(&layers, &arguments)?,
        Command::Bench(arguments) => return bench::run(&arguments),
        Command::Config { json } => {
            config(&layers, json)?;
            // The table helps to find what is wrong; that something is must not get lost below it.
            Settings::read(&layers)?;
        }
        Command::Url => writeln!(io::stdout(), "{}", Settings::read(&layers)?.websocket_url(None))?,
        Command::Doctor(arguments) => return doctor::run(&Settings::read(&layers)?, arguments),
        Command::Healthcheck { ready, url } => return healthcheck(&Settings::read(&layers)?, url, ready),
        Command::Schema { name } => {
            let name = match name {
                SchemaName::Events => "events",
                SchemaName::Client => "client",
                SchemaName::Server => "server",
            };
            let all = schema::all();
            let (_, schema) = all.iter().find(|(known, _)| *known == name).context("no such schema")?;
            writeln!(io::stdout(), "{schema:#}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl SettingFlags {
    fn layers(self) -> Result<Layers, SettingError> {
        let mut values = self.set;
        values.extend(self.listen.map(|listen| ("TIDINGS_LISTEN".to_owned(), listen)));
        values.extend(self.port.map(|port| ("BACKEND_PORT".to_owned(), port)));
        let flags = Flags { file: self.config, values };
        Layers::load(&flags, &environment_variables(), Some(Path::new("")))
    }
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn config(layers: &Layers, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let values: serde_json::Map<_, _> = layers
            .effective()
            .map(|(setting, value, origin)| {
                (setting.name.to_owned(), serde_json::json!({"value": value, "origin": origin.to_string()}))
            })
            .collect();
        return writeln!(out, "{:#}", serde_json::Value::Object(values));
    }
    for warning in layers.warnings() {
        eprintln!("warning: {warning}");
    }
    for (setting, value, origin) in layers.effective() {
        let value = value.map_or_else(|| "(unset)".to_owned(), |value| in_one_line(&value));
        writeln!(out, "{:<26} {value:<26} {origin}", setting.name)?;
    }
    for (workspace, project) in layers.workspaces() {
        writeln!(out, "workspaces.{workspace:<15} {project}")?;
    }
    // What is wrong with them is told below the table.
    for key in keys(layers).unwrap_or_default() {
        let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.as_str()).collect();
        writeln!(out, "keys.{:<21} {}", key.name, scopes.join(", "))?;
    }
    Ok(())
}

/// A value of several lines, as a key, by its first one: it is for seeing which it is.
fn in_one_line(value: &str) -> String {
    match value.trim_end().split_once('\n') {
        None => value.trim_end().to_owned(),
        Some((first, rest)) => format!("{} … ({} lines)", first.trim_end(), rest.lines().count() + 1),
    }
}

fn healthcheck(settings: &Settings, url: Option<String>, ready: bool) -> anyhow::Result<ExitCode> {
    let path = if ready { "/readyz?verbose" } else { "/livez?verbose" };
    let (status, text) = http::Service::of(settings, url, false)?.get(path)?;
    write!(io::stdout(), "{text}")?;
    Ok(if status == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
