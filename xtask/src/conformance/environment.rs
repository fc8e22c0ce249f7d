//! Autobahn|Testsuite and the Python 2.7 that it needs, under `target/autobahn`. Nothing of the system is changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{root, run, setup, setup::works};

const TESTSUITE: &str = "autobahntestsuite==25.10.1";

/// The last that makes environments for Python 2.7.
const VIRTUALENV: &str = "virtualenv<20.22";

/// The last Debian with a Python 2.7, and what of it is needed; the headers are for a package that is compiled.
const DEBIAN: &str = "bullseye";
const DEBIAN_PACKAGES: [&str; 9] = [
    "libffi7",
    "libpython2.7",
    "libpython2.7-dev",
    "libpython2.7-minimal",
    "libpython2.7-stdlib",
    "libssl1.1",
    "python2.7",
    "python2.7-dev",
    "python2.7-minimal",
];
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A Python 2.7 with the testsuite in it.
pub(super) struct Environment {
    programs: PathBuf,
}

/// Makes the environment, unless it is there.
pub(super) fn set_up() -> anyhow::Result<Environment> {
    let folder = root().join("target/autobahn");
    let environment = Environment { programs: folder.join("python/bin") };
    if environment.works() {
        return Ok(environment);
    }
    let python = python(&folder)?;
    let tools = setup::virtual_environment(&folder.join("tools"))?;
    run(Command::new(tools.join("python")).args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        VIRTUALENV,
    ]))?;
    run(with_libraries(&mut Command::new(tools.join("virtualenv")))
        .args(["--quiet", "--clear", "--python"])
        .arg(python)
        .arg(folder.join("python")))?;
    // Only the warning that Python 2.7 is old is silenced.
    run(environment
        .python()
        .args(["-W", "ignore", "-m", "pip", "--no-python-version-warning", "--disable-pip-version-check"])
        .args(["install", "--quiet", TESTSUITE]))
    .context("a C compiler and the headers of Python 2.7 are needed, too")?;
    if !environment.works() {
        bail!("{TESTSUITE} was installed and does not run; remove {} and try again", folder.display());
    }
    Ok(environment)
}

impl Environment {
    /// The testsuite's command, without arguments.
    pub(super) fn wstest(&self) -> Command {
        let mut command = self.python();
        command.arg(self.programs.join("wstest"));
        command
    }

    fn python(&self) -> Command {
        let mut command = Command::new(self.programs.join("python"));
        with_libraries(&mut command);
        command
    }

    /// Whether the testsuite is there in the right version, with everything that it needs.
    fn works(&self) -> bool {
        let check = format!("import pkg_resources; pkg_resources.require('{TESTSUITE}')");
        works(self.python().args(["-c", &check]))
    }
}

/// Finds a Python 2.7: the system's, pyenv's, or else Debian's, which is downloaded.
fn python(folder: &Path) -> anyhow::Result<PathBuf> {
    if let Some(python) = executable("python2.7").or_else(pyenv) {
        return Ok(python);
    }
    debian(folder).context(
        "Autobahn|Testsuite needs a CPython 2.7, and none was found or could be had; install one \
         (`pyenv install 2.7.18`, or the system's package with its headers) and run this again",
    )
}

/// Where the program really lies, if it runs: pyenv puts one in the path that may only complain.
fn executable(program: impl AsRef<Path>) -> Option<PathBuf> {
    let check = "import sys, ssl, zlib; assert sys.version_info[:2] == (2, 7); print(sys.executable)";
    printed(with_libraries(&mut Command::new(program.as_ref())).args(["-c", check])).map(PathBuf::from)
}

fn pyenv() -> Option<PathBuf> {
    let versions = Path::new(&printed(Command::new("pyenv").arg("root"))?).join("versions");
    let mut versions: Vec<_> = fs::read_dir(versions).ok()?.flatten().collect();
    versions.retain(|version| version.file_name().to_string_lossy().starts_with("2.7."));
    versions.iter().find_map(|version| executable(version.path().join("bin/python2.7")))
}

/// Downloads Debian's Python 2.7 and unpacks it beside the system's packages.
fn debian(folder: &Path) -> anyhow::Result<PathBuf> {
    let unpacked = unpacked();
    let python = unpacked.join("usr/bin/python2.7");
    if !unpacked.exists() {
        let packages = download(&folder.join("apt"))?;
        // Under its own name only when it is complete.
        let unpacking = unpacked.with_extension("unpacking");
        for package in fs::read_dir(packages)? {
            run(Command::new("dpkg").arg("-x").arg(package?.path()).arg(&unpacking))?;
        }
        fs::rename(unpacking, &unpacked)?;
    }
    executable(&python).with_context(|| format!("{} does not run", python.display()))
}

/// Downloads the packages with an apt folder of our own. Returns the folder that they are in.
fn download(apt: &Path) -> anyhow::Result<PathBuf> {
    let mirror = mirror()?;
    let packages = apt.join("packages");
    if apt.exists() {
        fs::remove_dir_all(apt)?;
    }
    for inner in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(apt.join(inner))?;
    }
    let sources = apt.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={DEBIAN_KEYS}] {mirror} {DEBIAN} main\n"))?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.current_dir(&packages).args(["--quiet", "--option", "Dir::Etc::SourceParts=-"]);
        for (option, path) in [
            ("Dir::Etc::SourceList", &sources),
            ("Dir::State::Lists", &apt.join("lists")),
            ("Dir::Cache", &apt.join("cache")),
        ] {
            command.arg("--option").arg(format!("{option}={}", path.display()));
        }
        // Where we run as root, apt's own user may not write into our folder.
        command.args(["--option", "APT::Sandbox::User=root"]);
        command
    };
    run(apt_get().arg("update"))?;
    run(apt_get().arg("download").args(DEBIAN_PACKAGES))?;
    Ok(packages)
}

/// Where this system gets its own packages from.
fn mirror() -> anyhow::Result<String> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("this is no Debian")?;
    let lists = printed(Command::new("apt-get").args(["update", "--print-uris"])).unwrap_or_default();
    let own = format!("/dists/{codename}/InRelease");
    // Each line starts with an address in quotes.
    let found = lists.split('\'').find_map(|address| address.strip_suffix(&own));
    found
        .map(str::to_owned)
        .with_context(|| format!("`apt-get update --print-uris` names no source of {codename}"))
}

fn unpacked() -> PathBuf {
    root().join("target/autobahn/debian")
}

/// Lets a program find the libraries and headers of Debian's Python, if that was unpacked.
fn with_libraries(command: &mut Command) -> &mut Command {
    let usr = unpacked().join("usr");
    let folders = fs::read_dir(usr.join("lib")).into_iter().flatten().flatten().map(|entry| entry.path());
    if let Some(libraries) = folders.into_iter().find(|folder| folder.join("libssl.so.1.1").exists()) {
        let (include, python) = (usr.join("include"), usr.join("include/python2.7"));
        command.env("LD_LIBRARY_PATH", libraries);
        command.env("C_INCLUDE_PATH", format!("{}:{}", python.display(), include.display()));
    }
    command
}

/// What a command prints, if it succeeds.
fn printed(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim_end().to_owned())
}
