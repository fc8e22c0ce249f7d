//! `tidings serve` and `tidings dev`.

use std::io::{self, Write as _};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::logging;
use crate::{
    Server,
    config::{EngineKind, Environment, Layers, Settings},
};

pub(super) fn serve(layers: &Layers) -> anyhow::Result<()> {
    let settings = read(layers)?;
    if settings.environment != Environment::Development {
        for insecurity in settings.insecurities() {
            tracing::warn!("insecure: {insecurity}");
        }
    }
    runtime()?.block_on(async {
        let server = Server::bind(settings).await?;
        run(server).await
    })
}

pub(super) fn dev(layers: &Layers, demo: bool) -> anyhow::Result<()> {
    let settings = read(layers)?;
    if settings.environment != Environment::Development {
        let why = "`tidings dev` is for development; run `tidings serve`, or unset it";
        anyhow::bail!("ENVIRONMENT ({}): {why}", settings.environment.as_str());
    }
    runtime()?.block_on(async {
        let insecurities = settings.insecurities();
        let kept_in = match (settings.engine, &settings.redis, &settings.journal) {
            (EngineKind::Redis, Some(address), _) => Some(format!("Redis ({address:?})")),
            (_, _, Some(journal)) => Some(journal.folder.display().to_string()),
            _ => None,
        };
        let server = Server::bind(settings).await?;
        let address = server.address();
        banner(address.port(), server.speaks_tls(), &insecurities, kept_in.as_deref(), demo)?;
        run(if demo { server.with_demo() } else { server }).await
    })
}

fn read(layers: &Layers) -> anyhow::Result<Settings> {
    let settings = Settings::read(layers)?;
    logging::start(&settings)?;
    for warning in layers.warnings().iter().chain(&settings.cautions()) {
        tracing::warn!("{warning}");
    }
    Ok(settings)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Shards beyond the first bring their own threads.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")
}

async fn run(server: Server) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(
        address = %server.address(),
        tls = server.speaks_tls(),
        internal = server.internal_address().map(tracing::field::display),
        version = env!("CARGO_PKG_VERSION"),
        "listening"
    );
    let mut running = std::pin::pin!(server.run(stop.clone()));
    loop {
        tokio::select! {
            ended = &mut running => return Ok(ended.map(|_| ())?),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if stop.is_cancelled() {
            tracing::warn!("asked to stop a second time; stopping now");
            return Ok(());
        }
        tracing::info!("asked to stop; a second signal stops at once");
        stop.cancel();
    }
}

fn banner(port: u16, tls: bool, insecurities: &[&str], kept_in: Option<&str>, demo: bool) -> io::Result<()> {
    let secure = if tls { "s" } else { "" };
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "\n  tidings {}: development mode, INSECURE; never use it in production",
        env!("CARGO_PKG_VERSION")
    )?;
    for insecurity in insecurities {
        writeln!(out, "    - {insecurity}")?;
    }
    match kept_in {
        Some(place) => writeln!(out, "\n  Streams    kept in {place}")?,
        None => writeln!(out, "    - nothing is kept: a restart begins anew (TIDINGS_PERSIST=false)\n")?,
    }
    writeln!(out, "  Console    http{secure}://localhost:{port}/console")?;
    writeln!(out, "  WebSocket  ws{secure}://localhost:{port}/ws")?;
    writeln!(out, "  Events     http{secure}://localhost:{port}/api/projects/demo/events")?;
    // As it was called: after `cargo run` it is not on the path.
    let program = std::env::args().next().unwrap_or_else(|| "tidings".to_owned());
    // By the settings its certificate counts, whatever name that has; by a URL it would have to be one for `localhost`.
    let url = if tls { String::new() } else { format!(" --url ws://localhost:{port}/ws") };
    writeln!(out, "  Watch      {program} tail demo{url}")?;
    if demo {
        writeln!(out, "  Demo       events on project `demo`; stop them with --no-demo")?;
    }
    let insecure = if tls { " --insecure" } else { "" };
    let event = r#"{"type":"task.progress","project_id":"demo","task_id":"mine","progress":{"current":3,"total":10}}"#;
    writeln!(
        out,
        "\n  Publish one yourself:\n  curl{insecure} -d '{event}' http{secure}://localhost:{port}/api/events\n"
    )?;
    out.flush()
}
