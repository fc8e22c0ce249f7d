//! What a reviewer should not have to look for.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{cargo, generate, root, run, setup};

/// The tool that reads `deny.toml`, at a version that this toolchain builds.
const CARGO_DENY: &str = "cargo-deny@0.20.2";

/// The longest that `ARCHITECTURE.md` may get: who needs more than ten minutes for it does not read it.
const ARCHITECTURE_LINES_MAX: usize = 170;

/// The first versions without what an advisory warns of, where the crate is in the tree at all. `None`: no version is good.
const FLOORS: [(&str, Option<[u64; 3]>); 15] = [
    ("aws-lc-sys", Some([0, 39, 0])),
    ("axum-core", Some([0, 2, 8])),
    ("bytes", Some([1, 11, 1])),
    ("crossbeam-channel", Some([0, 5, 15])),
    ("h2", Some([0, 4, 16])),
    ("jsonwebtoken", Some([10, 3, 0])),
    ("lru", Some([0, 18, 2])),
    ("ring", Some([0, 17, 12])),
    ("rsa", None),
    ("rustls", Some([0, 23, 18])),
    ("rustls-webpki", Some([0, 103, 13])),
    ("slab", Some([0, 4, 11])),
    ("time", Some([0, 3, 47])),
    ("tokio", Some([1, 44, 2])),
    ("tungstenite", Some([0, 20, 1])),
];

pub(crate) fn run_all() -> anyhow::Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
    run(cargo().args(["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "--deny warnings"))?;
    licences()?;
    generate::check()?;
    architecture()?;
    floors(&fs::read_to_string(root().join("Cargo.lock"))?)?;
    security()?;
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

/// Nothing in the lock file is what a known advisory warns of.
fn floors(lock: &str) -> anyhow::Result<()> {
    let value = |line: &str, key: &str| {
        line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"').map(str::to_owned)
    };
    for package in lock.split("[[package]]").skip(1) {
        let of = |key| package.lines().find_map(|line| value(line, key)).with_context(|| format!("no {key}"));
        let (name, version) = (of("name")?, of("version")?);
        let Some((_, floor)) = FLOORS.iter().find(|(floored, _)| *floored == name) else { continue };
        let parts = version.split(['-', '+']).next().unwrap_or_default().split('.').map(str::parse);
        let parts: Vec<u64> = parts.collect::<Result<_, _>>().with_context(|| format!("{name} {version}"))?;
        match floor {
            None => bail!("{name} {version}: no version of it is without what an advisory warns of"),
            Some(floor) if parts[..] < floor[..] => {
                bail!("{name} {version}: an advisory warns of what is before {floor:?}")
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Every test that `docs/security.md` names exists.
fn security() -> anyhow::Result<()> {
    let text = fs::read_to_string(root().join("docs/security.md")).context("docs/security.md")?;
    let mut files = Vec::new();
    for folder in ["crates", "xtask", "clients/python", "e2e"] {
        sources(&root().join(folder), &mut files)?;
    }
    let named = named_tests(&text);
    if named.is_empty() {
        bail!("docs/security.md names no test");
    }
    for (file, test) in named {
        let mut found = 0;
        for path in files.iter().filter(|path| path.ends_with(file)) {
            let code = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            found += usize::from(has_test(&code, test));
        }
        if found != 1 {
            bail!("docs/security.md names `{file}::{test}`, of which there are {found}");
        }
    }
    Ok(())
}

/// The files of a folder that may hold tests.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type()?.is_dir() {
            // What a tool keeps is not ours.
            if !name.starts_with('.') && !matches!(&*name, "target" | "node_modules") {
                sources(&path, files)?;
            }
        } else if may_hold_tests(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn may_hold_tests(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs" || extension == "py")
}

/// What stands as `file::test_name` in a document, as the end of a path and a name.
fn named_tests(text: &str) -> Vec<(&str, &str)> {
    let code = text.split('`').skip(1).step_by(2);
    let pairs = code.filter_map(|code| code.rsplit_once("::"));
    pairs.filter(|(file, _)| may_hold_tests(Path::new(file))).collect()
}

/// Whether a file has a function of this name that is run as a test.
fn has_test(code: &str, test: &str) -> bool {
    let is_named = |line: &str| {
        ["fn ", "async fn ", "def ", "async def "].iter().any(|keyword| {
            line.strip_prefix(keyword)
                .and_then(|rest| rest.strip_prefix(test))
                .is_some_and(|rest| rest.starts_with('('))
        })
    };
    let mut is_test = false;
    code.lines().map(str::trim).any(|line| {
        let found = is_named(line) && (is_test || line.contains("def test_"));
        // Attributes may stand in between.
        is_test = line.starts_with("#[test]")
            || line.starts_with("#[tokio::test")
            || (is_test && line.starts_with("#["));
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_locked_that_an_advisory_warns_of() {
        floors(&fs::read_to_string(root().join("Cargo.lock")).unwrap()).unwrap();
        let lock =
            |name: &str, version: &str| format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n");
        for (name, version, words) in [
            ("tungstenite", "0.20.0", "before [0, 20, 1]"),
            ("h2", "0.4.15", "before [0, 4, 16]"),
            ("rsa", "0.9.8", "no version"),
            ("jsonwebtoken", "9.3.1", "before [10, 3, 0]"),
        ] {
            let error = floors(&lock(name, version)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(words), "{error}");
        }
        for (name, version) in
            [("tungstenite", "0.20.1"), ("jsonwebtoken", "11.0.0"), ("tokio", "1.44.2+x"), ("else", "0.0.1")]
        {
            floors(&lock(name, version)).unwrap();
        }
    }

    #[test]
    fn the_tests_that_the_security_document_names_exist() {
        security().unwrap();
    }

    #[test]
    fn a_named_test_is_found_where_it_is_one() {
        let text = "| a `Cookie` | 401 | `it/a.rs::refused`, `e2e/test_b.py::test_told` | `x::y` |";
        assert_eq!(named_tests(text), [("it/a.rs", "refused"), ("e2e/test_b.py", "test_told")]);
        let code = "#[tokio::test(start_paused = true)]\n#[ignore]\nasync fn refused() {\n}\nfn helper() {}";
        assert!(has_test(code, "refused"));
        assert!(
            !has_test(code, "refuse") && !has_test(code, "helper") && !has_test("fn refused() {}", "refused")
        );
        assert!(has_test("async def test_told(page):", "test_told") && !has_test("def told():", "told"));
    }
}
