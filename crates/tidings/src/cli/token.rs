//! `tidings token`: a token for development, as an issuer would make one.

use std::{
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use tidings_protocol::Projects;

use crate::{
    auth::jwt::Signer,
    config::{Layers, Settings},
};

/// tidings token --user u1 --projects 'p1,team-a/*'
#[derive(Args)]
pub(super) struct Arguments {
    /// Whose token it is: `sub`
    #[arg(long, value_name = "ID")]
    user: String,
    /// Ids and patterns, comma separated, or `*` for all; without it none
    #[arg(long, value_name = "PROJECTS", value_delimiter = ',')]
    projects: Vec<String>,
    /// With the console and the operator's routes
    #[arg(long)]
    admin: bool,
    /// Seconds until its end
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..))]
    expires: u32,
    /// For whom it is: `aud`; without it `TIDINGS_JWT_AUDIENCE`
    #[arg(long, value_name = "TEXT")]
    audience: Option<String>,
    /// Who made it: `iss`; without it `TIDINGS_JWT_ISSUER`
    #[arg(long, value_name = "TEXT")]
    issuer: Option<String>,
    /// Sign with this private key as PEM; without it with `TIDINGS_JWT_SECRET`
    #[arg(long, value_name = "FILE")]
    private_key: Option<PathBuf>,
}

pub(super) fn run(layers: &Layers, arguments: &Arguments) -> anyhow::Result<()> {
    let settings = Settings::read(layers)?;
    let signer = signer(&settings, arguments)?;
    let claims = claims(layers, arguments, jiff::Timestamp::now().as_second());
    let token = signer.token(&claims)?;
    writeln!(io::stdout(), "{token}")?;
    eprintln!(
        "use it as `Authorization: Bearer TOKEN`, in the cookie `{}`, or in a page: new WebSocket(\"{}\", [\"tidings.v1\", \"tidings.jwt.TOKEN\"])",
        effective(layers, "TIDINGS_JWT_COOKIE").unwrap_or_default(),
        settings.websocket_url(None),
    );
    Ok(())
}

fn signer(settings: &Settings, arguments: &Arguments) -> anyhow::Result<Signer> {
    if let Some(path) = &arguments.private_key {
        let file = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("`{file}` cannot be read"))?;
        return Signer::from_pem(&text).map_err(|expected| anyhow::anyhow!("`{file}`: {expected}"));
    }
    let secret = settings.auth.jwt.as_ref().and_then(|jwt| jwt.secrets.first());
    let secret = secret.context(
        "there is nothing to sign with: set TIDINGS_JWT_SECRET, here and where the service runs, to at least 16 bytes \
         (`openssl rand -hex 32` makes one), or name the issuer's key with --private-key",
    )?;
    Ok(Signer::secret(secret.reveal()))
}

/// What it says; absent is what it says nothing about.
fn claims(layers: &Layers, arguments: &Arguments, now: i64) -> Value {
    let projects = match &arguments.projects[..] {
        [all] if all == "*" => Projects::everything(),
        entries => Projects::listed(entries),
    };
    let mut claims = json!({
        "sub": arguments.user,
        "projects": projects.to_value(),
        "iat": now,
        "exp": now + i64::from(arguments.expires),
    });
    if arguments.admin {
        claims["admin"] = Value::from(true);
    }
    for (claim, named, setting) in [
        ("iss", &arguments.issuer, "TIDINGS_JWT_ISSUER"),
        ("aud", &arguments.audience, "TIDINGS_JWT_AUDIENCE"),
    ] {
        if let Some(value) = named.clone().or_else(|| effective(layers, setting)) {
            claims[claim] = Value::from(value);
        }
    }
    claims
}

/// A setting that counts although this machine has nothing to check tokens with.
fn effective(layers: &Layers, name: &str) -> Option<String> {
    layers.effective().find(|(setting, ..)| setting.name == name)?.1
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        auth::{
            Identity,
            jwt::{Jwt, test_keys},
        },
        config::Flags,
    };

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn layers(variables: &[(&str, &str)]) -> Layers {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Layers::load(&Flags::default(), &variables, None).unwrap()
    }

    /// Whom the service sees in a token of the command, both with these settings.
    async fn seen(variables: &[(&str, &str)], arguments: &[&str]) -> Identity {
        let arguments = Line::parse_from([&["token"], arguments].concat()).arguments;
        let (layers, now) = (layers(variables), jiff::Timestamp::now());
        let settings = Settings::read(&layers).unwrap();
        let token = signer(&settings, &arguments)
            .unwrap()
            .token(&claims(&layers, &arguments, now.as_second()))
            .unwrap();
        Jwt::new(&settings.auth.jwt.unwrap()).check(&token, now.into()).await.unwrap().identity
    }

    #[tokio::test]
    async fn the_service_accepts_what_the_command_makes() {
        let settings = [
            ("TIDINGS_JWT_SECRET", test_keys::SECRET),
            ("TIDINGS_JWT_ISSUER", "me"),
            ("TIDINGS_JWT_AUDIENCE", "tidings"),
        ];
        let who = seen(&settings, &["--user", "u1", "--projects", "p1,team-a/*", "--expires", "60"]).await;
        assert_eq!((who.user.as_str(), who.admin), ("u1", false));
        assert_eq!(who.projects, Projects::listed(&["p1", "team-a/*"]));
        assert_eq!(who.expires_at.unwrap().seconds_since(who.issued_at.unwrap()), 60);
        let who = seen(&settings, &["--user", "7", "--projects", "*", "--admin"]).await;
        assert!(who.admin && who.projects.is_everything());
        assert_eq!(seen(&settings, &["--user", "u1"]).await.projects, Projects::none());
    }

    #[tokio::test]
    async fn a_private_key_signs_for_whoever_has_its_public_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        for (private, public) in [
            (test_keys::RSA, test_keys::RSA_PUBLIC),
            (test_keys::P256, test_keys::P256_PUBLIC),
            (test_keys::ED25519, test_keys::ED25519_PUBLIC),
        ] {
            std::fs::write(&path, private).unwrap();
            let settings = [("TIDINGS_JWT_PUBLIC_KEY", public)];
            let who = seen(&settings, &["--user", "u1", "--private-key", path.to_str().unwrap()]).await;
            assert_eq!(who.user.as_str(), "u1");
        }
    }
}
