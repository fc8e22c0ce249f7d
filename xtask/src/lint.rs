//! What a reviewer should not have to look for.

use std::{fs, process::Command};

use anyhow::{Context as _, bail};

use crate::{cargo, generate, root, run, setup};

/// The tool that reads `deny.toml`, at a version that this toolchain builds.
const CARGO_DENY: &str = "cargo-deny@0.20.2";

/// The longest that `ARCHITECTURE.md` may get: who needs more than ten minutes for it does not read it.
const ARCHITECTURE_LINES_MAX: usize = 170;

pub(crate) fn run_all() -> anyhow::Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
    run(cargo().args(["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "--deny warnings"))?;
    licences()?;
    generate::check()?;
    architecture()?;
    let programs = setup::python()?;
    run(Command::new(programs.join("ruff")).args(["check", "clients/python", "e2e"]))?;
    run(Command::new(programs.join("ruff")).args(["format", "--check", "clients/python", "e2e"]))?;
    run(Command::new(programs.join("mypy")).args([
        "--config-file",
        "clients/python/pyproject.toml",
        "clients/python/src",
    ]))?;
    println!("\nnothing to complain about");
    Ok(())
}

/// Licences, sources and bans by `deny.toml`. Advisories are not asked for: their database is fetched from elsewhere at
/// run time, and a check that depends on the day is none for a commit.
fn licences() -> anyhow::Result<()> {
    let tools = root().join("target/tools");
    let cargo_deny = tools.join("bin/cargo-deny");
    if !cargo_deny.exists() {
        run(cargo().args(["install", "--locked", "--quiet", CARGO_DENY, "--root"]).arg(&tools))?;
    }
    run(Command::new(cargo_deny).args(["--log-level", "error", "check", "bans", "licenses", "sources"]))
}

/// Every path that `ARCHITECTURE.md` names exists, and it stays readable.
fn architecture() -> anyhow::Result<()> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).context("ARCHITECTURE.md")?;
    let lines = text.lines().count();
    if lines > ARCHITECTURE_LINES_MAX {
        bail!("ARCHITECTURE.md has {lines} lines; at most {ARCHITECTURE_LINES_MAX} are read");
    }
    let named = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|code| code.contains('/') && !code.contains([' ', '{', '*', ':']));
    for path in named.filter(|path| !path.starts_with('/')) {
        if !root().join(path.trim_end_matches('/')).exists() {
            bail!("ARCHITECTURE.md names `{path}`, which does not exist");
        }
    }
    Ok(())
}
