//! All tests, one after the other, and how many there were.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{arguments, cargo, conformance, root, setup};

/// What depends on the version of Celery: of the package, and of the service with real workers. Each has a `conftest.py` of its own.
const PACKAGE_WITH_CELERY: [&str; 3] = [
    "clients/python/tests/test_celery.py",
    "clients/python/tests/test_install.py",
    "clients/python/tests/test_testing.py",
];
const SERVICE_WITH_CELERY: [&str; 6] = [
    "e2e/test_celery.py",
    "e2e/test_celery_ends.py",
    "e2e/test_celery_package.py",
    "e2e/test_celery_projects.py",
    "e2e/test_celery_rare.py",
    "e2e/test_celery_written.py",
];

/// What a run of tests came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

pub(crate) fn run() -> anyhow::Result<()> {
    setup::redis()?;
    let python = setup::python()?.join("python");
    let oldest = setup::python_with_oldest_celery()?.join("python");
    crate::run(cargo().args(["build", "--package", "tidings"]))?;
    let mut counts = Counts::default();
    let mut broken = Vec::new();
    // Beside this program, wherever cargo was told to build.
    let binary = std::env::current_exe()?.with_file_name("tidings");
    let pytest_with = |python: &Path, tests: &[&str]| {
        let mut command = Command::new(python);
        command.args(["-m", "pytest", "-q"]).args(tests).env("TIDINGS_BINARY", &binary);
        command
    };
    let pytest = |folder: &str| pytest_with(&python, &[folder]);
    let mut cargo_test = cargo();
    cargo_test.args(["test", "--workspace", "--no-fail-fast"]);
    // The service's own tests once more, with its streams in Redis.
    let mut on_redis = cargo();
    on_redis.args(["test", "--package", "tidings", "--test", "it"]).env("TIDINGS_TEST_ENGINE", "redis");
    let suites = [
        cargo_test,
        on_redis,
        pytest("clients/python"),
        pytest("e2e"),
        pytest_with(&oldest, &PACKAGE_WITH_CELERY),
        pytest_with(&oldest, &SERVICE_WITH_CELERY),
    ];
    for mut suite in suites {
        let of_suite = run_suite(&mut suite)?;
        if of_suite.passed == 0 {
            broken.push(format!("`{}` ran no test", arguments(&suite)));
        }
        counts.passed += of_suite.passed;
        counts.failed += of_suite.failed;
    }
    println!();
    match conformance::quick() {
        Ok(of_codec) => {
            counts.passed += of_codec.passed;
            counts.failed += of_codec.failed;
        }
        Err(error) => broken.push(format!("conformance: {error:#}")),
    }
    println!("\n{} passed, {} failed", counts.passed, counts.failed);
    if counts.failed > 0 || !broken.is_empty() {
        bail!("tests failed; see above {}", broken.join(", "));
    }
    Ok(())
}

/// Runs one suite, shows what it prints, and counts by its closing lines.
fn run_suite(command: &mut Command) -> anyhow::Result<Counts> {
    println!("\n$ {} {}", command.get_program().display(), arguments(command));
    let mut child =
        command.current_dir(root()).stdout(Stdio::piped()).spawn().context("the suite cannot be started")?;
    let output = BufReader::new(child.stdout.take().context("the suite has an output")?);
    let mut counts = Counts::default();
    for line in output.lines() {
        let line = line?;
        println!("{line}");
        if let Some(closing) = closing_line(&line) {
            counts.passed += closing.passed;
            counts.failed += closing.failed;
        }
    }
    let status = child.wait()?;
    // A suite that fails without a failed test did not even start.
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    Ok(counts)
}

/// What `test result: ok. 3 passed; 0 failed; …` and `3 passed, 1 failed in 2.5s` say.
fn closing_line(line: &str) -> Option<Counts> {
    let line = line.trim_matches(['=', ' ']);
    let is_pytest = line.contains(" in ") && line.starts_with(|c: char| c.is_ascii_digit());
    let text = line.strip_prefix("test result: ").or_else(|| is_pytest.then_some(line))?;
    let number_before = |word: &str| {
        let words: Vec<_> = text.split([' ', ',', ';', '.']).filter(|part| !part.is_empty()).collect();
        let found = words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok());
        found.unwrap_or(0)
    };
    Some(Counts {
        passed: number_before("passed"),
        failed: number_before("failed") + number_before("error") + number_before("errors"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_runners_are_read() {
        let counts = |passed, failed| Some(Counts { passed, failed });
        assert_eq!(
            closing_line("test result: ok. 23 passed; 0 failed; 0 ignored; finished in 0.03s"),
            counts(23, 0)
        );
        assert_eq!(closing_line("test result: FAILED. 22 passed; 1 failed; 0 ignored"), counts(22, 1));
        assert_eq!(closing_line("12 passed in 3.20s"), counts(12, 0));
        assert_eq!(closing_line("==== 1 failed, 12 passed, 1 warning in 3.20s ===="), counts(12, 1));
        assert_eq!(closing_line("2 passed, 1 error in 0.10s"), counts(2, 1));
        assert_eq!(closing_line("running 23 tests"), None);
    }
}
