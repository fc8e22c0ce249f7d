//! What the tests need beside Rust: Redis from the system's packages, a Python environment of the repository's own.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{root, run};

/// Installs Redis, unless it is there.
pub(crate) fn redis() -> anyhow::Result<()> {
    if works(Command::new("redis-server").arg("--version")) {
        return Ok(());
    }
    package("redis-server", "redis")?;
    if !works(Command::new("redis-server").arg("--version")) {
        bail!("redis-server was installed and does not run; see `redis-server --version`");
    }
    Ok(())
}

/// Makes the Python environment, or brings it up to date. Returns its folder of programs.
pub(crate) fn python() -> anyhow::Result<PathBuf> {
    environment("target/python", &[])
}

/// The same with the oldest Celery that we work with. Its `kombu` has to be as old: a newer one wants another Redis client.
pub(crate) fn python_with_oldest_celery() -> anyhow::Result<PathBuf> {
    environment("target/python-celery-5.4", &["celery==5.4.*", "kombu==5.4.*"])
}

fn environment(folder: &str, pinned: &[&str]) -> anyhow::Result<PathBuf> {
    let programs = virtual_environment(&root().join(folder))?;
    run(Command::new(programs.join("python"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable"])
        .args(["clients/python[celery,test]", "--requirement", "e2e/requirements.txt"])
        .args(pinned))?;
    Ok(programs)
}

/// Makes an empty Python environment, unless it is there. Returns its folder of programs.
pub(crate) fn virtual_environment(environment: &Path) -> anyhow::Result<PathBuf> {
    let programs = environment.join("bin");
    if !works(Command::new(programs.join("python")).args(["-m", "pip", "--version"])) {
        if !works(Command::new("python3").args(["-c", "import ensurepip, venv"])) {
            package("python3-venv", "python")?;
        }
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(environment))
            .context("a Python 3.10 or later with `venv` is needed")?;
    }
    Ok(programs)
}

/// Whether the command runs and succeeds.
pub(crate) fn works(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Installs a package by the system's manager: apt or Homebrew.
fn package(apt: &str, brew: &str) -> anyhow::Result<()> {
    if works(Command::new("brew").arg("--version")) {
        return run(Command::new("brew").args(["install", brew]));
    }
    if !works(Command::new("apt-get").arg("--version")) {
        bail!("`{apt}` is needed, and there is neither apt-get nor brew to install it; install it by hand");
    }
    let user = Command::new("id").arg("-u").output().context("`id -u`")?.stdout;
    let administrator = user.trim_ascii() == b"0";
    let apt_get = |arguments: &[&str]| {
        let mut command = Command::new(if administrator { "apt-get" } else { "sudo" });
        if !administrator {
            command.arg("apt-get");
        }
        // A package's own service would take a port; the tests start their own.
        run(command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1"))
    };
    apt_get(&["update", "--quiet"])?;
    apt_get(&["install", "--quiet", "--yes", "--no-install-recommends", apt])
}
