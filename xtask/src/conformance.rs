//! How our WebSocket echo fares with Autobahn|Testsuite, by which the libraries are measured.
//!
//! The echo server shares the codec with the service. It runs only as long as the cases do.

mod environment;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::{cargo, root, run, test::Counts};

/// The name of our server in the reports.
const AGENT: &str = "tidings";

/// Everything else, NON-STRICT above all, changes from run to run on one and the same server.
const FAILURES: [&str; 3] = ["FAILED", "WRONG CODE", "UNCLEAN"];

/// Cases that one process runs, beside the others.
struct Part {
    cases: &'static [&'static str],
    count: usize,
    /// Against a server that hangs, wstest would go on for hours.
    duration_max: Duration,
}

/// Framing, pings, fragments, UTF-8, closing.
const PROTOCOL: Part = Part {
    cases: &["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"],
    count: 247,
    duration_max: Duration::from_mins(2),
};

/// Large messages, and compression, which takes minutes where it is offered.
const LARGE: Part = Part { cases: &["9.*", "12.*"], count: 54 + 90, duration_max: Duration::from_mins(30) };
const COMPRESSED: Part = Part { cases: &["13.*"], count: 126, duration_max: Duration::from_mins(30) };

/// Runs the cases and fails if one of them does.
pub(crate) fn check(is_quick: bool) -> anyhow::Result<()> {
    let counts = if is_quick { quick()? } else { run_parts(&[PROTOCOL, LARGE, COMPRESSED])? };
    if counts.failed > 0 {
        bail!("the codec does not conform; see above");
    }
    Ok(())
}

/// The cases that are run for every commit.
pub(crate) fn quick() -> anyhow::Result<Counts> {
    run_parts(&[PROTOCOL])
}

fn run_parts(parts: &[Part]) -> anyhow::Result<Counts> {
    let environment = environment::set_up()?;
    let echo = Echo::start()?;
    let reports = root().join("target/autobahn/reports");
    let asked: usize = parts.iter().map(|part| part.count).sum();
    println!("running {asked} cases of Autobahn|Testsuite; reports go to {}", reports.display());
    // A report of an earlier run must not pass for one of this.
    if reports.exists() {
        fs::remove_dir_all(&reports)?;
    }
    let mut running = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let folder = reports.join(number.to_string());
        running.push((part, start(part, environment.wstest(), &echo.url, &folder)?, folder));
    }
    let mut outcome = Outcome::default();
    for (part, mut process, folder) in running {
        let Some(status) = process.ended_within(part.duration_max)? else {
            bail!("wstest did not end within {:?}; see {}", part.duration_max, log(&folder).display());
        };
        // The exit code tells nothing of the cases.
        let index = fs::read(folder.join("index.json")).with_context(|| {
            format!("wstest ended without a report ({status}); see {}", log(&folder).display())
        })?;
        outcome.add(&serde_json::from_slice(&index)?, &folder);
    }
    drop(echo);
    outcome.print(asked);
    Ok(outcome.counts(asked))
}

/// Starts the cases of one part.
fn start(part: &Part, mut wstest: Command, url: &str, folder: &Path) -> anyhow::Result<Running> {
    fs::create_dir_all(folder)?;
    let spec = json!({
        "outdir": folder,
        "options": { "failByDrop": false },
        "servers": [{ "agent": AGENT, "url": url }],
        "cases": part.cases,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    });
    let spec_path = folder.join("spec.json");
    fs::write(&spec_path, format!("{spec:#}\n"))?;
    let log = File::create(log(folder))?;
    wstest.args(["--mode", "fuzzingclient", "--spec"]).arg(spec_path);
    wstest.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Running(wstest.spawn().context("wstest cannot be started")?))
}

fn log(folder: &Path) -> PathBuf {
    folder.join("wstest.log")
}

/// The echo server, as long as it lives.
struct Echo {
    url: String,
    _process: Running,
    /// Held open: a server that prints into a closed pipe would fail.
    _output: BufReader<ChildStdout>,
}

impl Echo {
    fn start() -> anyhow::Result<Self> {
        run(cargo().args(["build", "--quiet", "--release", "--package", "tidings", "--example", "echo"]))?;
        // This program is `debug/xtask`, wherever cargo was told to build.
        let xtask = std::env::current_exe()?;
        let built = xtask.ancestors().nth(2).context("cargo builds in two folders")?;
        let mut command = Command::new(built.join("release/examples/echo"));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Running(command.spawn().context("the echo server cannot be started")?);
        let mut output = BufReader::new(process.0.stdout.take().context("the echo server has an output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let Some(address) = line.trim_end().strip_prefix("listening on ") else {
            bail!("the echo server does not say where it listens, but {line:?}");
        };
        Ok(Self { url: format!("ws://{address}"), _process: process, _output: output })
    }
}

/// A process that does not outlive its handle, whatever fails in between.
struct Running(Child);

impl Running {
    /// Waits for the end, but not for ever.
    fn ended_within(&mut self, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
        const POLL: Duration = Duration::from_millis(50);
        for _ in 0..limit.as_millis() / POLL.as_millis() {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            thread::sleep(POLL);
        }
        Ok(None)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has already ended is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the reports say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    verdicts: BTreeMap<String, usize>,
    /// Each with its verdict and its report.
    failed: Vec<String>,
}

impl Outcome {
    /// Adds the report of one process.
    fn add(&mut self, index: &Value, folder: &Path) {
        for (case, report) in index[AGENT].as_object().into_iter().flatten() {
            let verdict = verdict(report);
            *self.verdicts.entry(verdict.to_owned()).or_default() += 1;
            if FAILURES.contains(&verdict) {
                let file = Path::new(report["reportfile"].as_str().unwrap_or("index.json"));
                let file = folder.join(file.with_extension("html"));
                self.failed.push(format!("{case} {verdict}: {}", file.display()));
            }
        }
    }

    /// A case that was asked for and is in no report has failed.
    fn counts(&self, asked: usize) -> Counts {
        let reported: usize = self.verdicts.values().sum();
        let passed = reported - self.failed.len();
        Counts { passed: passed as u64, failed: asked.saturating_sub(passed) as u64 }
    }

    fn print(&self, asked: usize) {
        let reported: usize = self.verdicts.values().sum();
        for (verdict, count) in &self.verdicts {
            println!("{count:>5} {verdict}");
        }
        for failed in &self.failed {
            println!("failed: {failed}");
        }
        if reported < asked {
            println!("failed: {} cases are in no report", asked - reported);
        }
        let counts = self.counts(asked);
        println!("{} passed, {} failed", counts.passed, counts.failed);
    }
}

/// A case is judged twice, by what was sent and by how the connection was closed; a failure in either is one.
fn verdict(report: &Value) -> &str {
    let of = |key: &str| report[key].as_str().unwrap_or("FAILED");
    let (behavior, close) = (of("behavior"), of("behaviorClose"));
    if FAILURES.contains(&close) && !FAILURES.contains(&behavior) { close } else { behavior }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(cases: &Value) -> Outcome {
        let mut outcome = Outcome::default();
        outcome.add(&json!({ AGENT: cases }), Path::new("reports"));
        outcome
    }

    #[test]
    fn a_case_fails_by_what_was_sent_and_by_how_it_was_closed() {
        let check = |behavior: &str, close: &str, failed: u64| {
            let report =
                json!({ "behavior": behavior, "behaviorClose": close, "reportfile": "r_7_1_5.json" });
            let outcome = outcome(&json!({ "7.1.5": report }));
            assert_eq!(outcome.counts(1), Counts { passed: 1 - failed, failed }, "{behavior}, {close}");
            assert_eq!(outcome.failed.len() as u64, failed);
            assert!(outcome.failed.iter().all(|line| line.ends_with(": reports/r_7_1_5.html")));
        };
        check("OK", "OK", 0);
        check("NON-STRICT", "OK", 0);
        check("INFORMATIONAL", "INFORMATIONAL", 0);
        check("UNIMPLEMENTED", "OK", 0);
        check("FAILED", "OK", 1);
        check("FAILED", "UNCLEAN", 1);
        check("OK", "WRONG CODE", 1);
        check("OK", "UNCLEAN", 1);
    }

    #[test]
    fn a_case_that_was_not_reported_has_failed() {
        let one = outcome(&json!({ "1.1.1": { "behavior": "OK", "behaviorClose": "OK" } }));
        assert_eq!(one.counts(3), Counts { passed: 1, failed: 2 });
        assert_eq!(outcome(&json!({})).counts(3), Counts { passed: 0, failed: 3 });
        assert_eq!(outcome(&json!({ "1.1.1": {} })).counts(1), Counts { passed: 0, failed: 1 });
    }
}
