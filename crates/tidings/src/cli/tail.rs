//! `tidings tail`: a project's events as they happen.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
    tungstenite::{
        Message,
        client::IntoClientRequest,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use tidings_protocol::{EventType, TypeFilter};

use super::own_certificate;
use crate::config::Settings;

const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// tidings tail demo --types 'task.*'
#[derive(Args)]
pub(super) struct Arguments {
    /// The project; without it the announcements that every connection gets
    #[arg(value_name = "PROJECT")]
    project: Option<String>,
    /// Only these types: exact, `word.*` or `*`; comma separated
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',')]
    types: Vec<String>,
    /// First what was missed since this position
    #[arg(long, value_name = "EPOCH:OFFSET")]
    since: Option<String>,
    /// Events as they come, one JSON object per line
    #[arg(long)]
    json: bool,
    /// Stop after this many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// A token to show, as `tidings token` makes one; `Authorization: Bearer`
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// Cookies to show, as a browser would: `session=…`
    #[arg(long, value_name = "COOKIES")]
    cookie: Option<String>,
    /// The WebSocket's address; without it the one of the settings
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

type Socket = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

/// Where the tail stands, over all its connections.
struct Tail {
    arguments: Arguments,
    url: String,
    /// `None`: what everybody trusts.
    trusts: Option<Connector>,
    types: Option<TypeFilter>,
    since: Option<Value>,
    shown: u64,
    color: bool,
}

/// How a connection of the tail ended.
enum Ended {
    /// All that was asked for was shown.
    Done,
    /// The connection is gone; another one may go on where it ended.
    Lost(String),
}

pub(super) fn run(settings: &Settings, arguments: Arguments) -> anyhow::Result<()> {
    let url = arguments.url.clone().unwrap_or_else(|| settings.websocket_url(None));
    // A service that somebody names is trusted as everybody is.
    let own = settings.tls.as_ref().filter(|_| arguments.url.is_none());
    let trusts = own.map(own_certificate::trusting).transpose()?.map(Connector::Rustls);
    let since = arguments.since.as_deref().map(position).transpose()?;
    let types = (!arguments.types.is_empty())
        .then(|| TypeFilter::parse(&arguments.types))
        .transpose()
        .context("--types")?;
    let color = io::stdout().is_terminal() && !arguments.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(Tail { arguments, url, trusts, types, since, shown: 0, color }.run())
}

fn position(text: &str) -> anyhow::Result<Value> {
    let parts = text.rsplit_once(':').and_then(|(epoch, offset)| Some((epoch, offset.parse::<u64>().ok()?)));
    let (epoch, offset) = parts.with_context(|| format!("--since `{text}`: expected EPOCH:OFFSET"))?;
    Ok(json!({"epoch": epoch, "offset": offset}))
}

impl Tail {
    async fn run(mut self) -> anyhow::Result<()> {
        let mut socket = self.connect().await?;
        loop {
            let Ended::Lost(why) = self.show(&mut socket).await? else { return Ok(()) };
            eprintln!("connection lost ({why}); connecting again");
            socket = self.connect_again().await;
        }
    }

    async fn connect(&self) -> anyhow::Result<Socket> {
        let mut request =
            self.url.as_str().into_client_request().with_context(|| format!("`{}`", self.url))?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", tidings_protocol::SUBPROTOCOL.parse()?);
        if let Some(token) = &self.arguments.token {
            headers.insert("authorization", format!("Bearer {token}").parse().context("--token")?);
        }
        if let Some(cookie) = &self.arguments.cookie {
            headers.insert("cookie", cookie.parse().context("--cookie")?);
        }
        let connected = connect_async_tls_with_config(request, None, false, self.trusts.clone()).await;
        let (mut socket, _) = connected.with_context(|| {
            format!("{} cannot be reached; is the service running (`tidings dev`)?", self.url)
        })?;
        let mut subscribe = json!({"type": "subscribe", "project_id": self.arguments.project});
        if let Some(since) = &self.since {
            subscribe["since"] = since.clone();
        }
        if self.arguments.project.is_some() && !self.arguments.types.is_empty() {
            subscribe["types"] = self.arguments.types.clone().into();
        }
        if self.arguments.project.is_none() {
            // The announcements come by themselves; only what was missed of them has to be asked for.
            subscribe["project_id"] = "*".into();
        }
        if self.arguments.project.is_some() || self.since.is_some() {
            socket.send(Message::text(subscribe.to_string())).await?;
        }
        Ok(socket)
    }

    async fn connect_again(&self) -> Socket {
        let mut wait = RETRY_MIN;
        loop {
            tokio::time::sleep(wait).await;
            if let Ok(socket) = self.connect().await {
                return socket;
            }
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn show(&mut self, socket: &mut Socket) -> anyhow::Result<Ended> {
        while let Some(message) = socket.next().await {
            match message {
                Ok(Message::Text(text)) => {
                    if self.take(&text)? {
                        // The server learns that this was on purpose; whether it hears that does not matter any more.
                        let _ = socket
                            .close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
                            .await;
                        return Ok(Ended::Done);
                    }
                }
                Ok(Message::Close(frame)) => return closed(frame),
                Ok(_) => {}
                Err(error) => return Ok(Ended::Lost(error.to_string())),
            }
        }
        Ok(Ended::Lost("closed".to_owned()))
    }

    /// Shows a message; `true`: it was the last one asked for.
    fn take(&mut self, text: &str) -> anyhow::Result<bool> {
        let Ok(message) = serde_json::from_str::<Value>(text) else {
            // Numbers beyond a double and lone surrogates are JSON, and pass through; here they are only shown.
            writeln!(io::stdout(), "{text}")?;
            return Ok(false);
        };
        let announcements = self.arguments.project.is_none();
        match message["type"].as_str().unwrap_or_default() {
            "error" => anyhow::bail!(
                "{}: {}",
                message["code"].as_str().unwrap_or_default(),
                message["message"].as_str().unwrap_or_default()
            ),
            "connection.established" if announcements => self.since = Some(message["announcements"].clone()),
            "subscription.confirmed" => {
                self.since = Some(json!({"epoch": message["epoch"], "offset": message["offset"]}));
                if message["recovered"] == false {
                    eprintln!("what was missed is not kept any more; going on from here");
                }
            }
            "system.degraded" | "system.recovered" => {
                let source = message["source"].as_str().unwrap_or_default();
                match message["gap"].as_str() {
                    None => eprintln!("{source} cannot be heard at present"),
                    Some(gap) => eprintln!("{source} is heard again; what came meanwhile: {gap}"),
                }
            }
            // Announcements come unfiltered, because every connection follows them.
            name if message["offset"].is_u64()
                && (message["stream"] == "*") == announcements
                && self.wants(name) =>
            {
                if let Some(since) = &mut self.since {
                    since["offset"] = message["offset"].clone();
                }
                self.print(name, &message, text)?;
                self.shown += 1;
                return Ok(self.arguments.count == Some(self.shown));
            }
            _ => {}
        }
        Ok(false)
    }

    fn wants(&self, name: &str) -> bool {
        self.types
            .as_ref()
            .is_none_or(|types| EventType::try_from(name).is_ok_and(|name| types.matches(&name)))
    }

    fn print(&self, name: &str, event: &Value, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.arguments.json {
            return writeln!(out, "{text}");
        }
        let time = event["timestamp"].as_str().and_then(|t| t.get(11..23)).unwrap_or_default();
        let (color, plain) = if self.color { (color_of(name), "\x1b[0m") } else { ("", "") };
        writeln!(out, "{time}  {:>6}  {color}{name:<18}{plain}  {}", event["offset"], summary(event))
    }
}

fn closed(frame: Option<CloseFrame>) -> anyhow::Result<Ended> {
    let Some(frame) = frame else { return Ok(Ended::Lost("closed".to_owned())) };
    let code = u16::from(frame.code);
    let why = format!("{code} {}", frame.reason);
    if (4400..=4499).contains(&code) {
        anyhow::bail!("the server closed the connection for good: {why}");
    }
    Ok(Ended::Lost(why))
}

/// What the event is about, and then everything else, short.
fn summary(event: &Value) -> String {
    const SHOWN_ELSEWHERE: [&str; 5] = ["type", "timestamp", "offset", "project_id", "stream"];
    let (mut about, mut rest) = (Vec::new(), Vec::new());
    let members = event.as_object().into_iter().flatten();
    for (key, value) in members.filter(|(key, _)| !SHOWN_ELSEWHERE.contains(&key.as_str())) {
        let text = match (value, value["percentage"].as_f64()) {
            (Value::Null, _) => continue,
            (Value::String(text), _) => text.clone(),
            (_, Some(percentage)) => format!("{percentage}%"),
            (value, None) => value.to_string(),
        };
        let short: String = text.chars().take(60).map(|c| if c.is_control() { ' ' } else { c }).collect();
        if key.ends_with("_id") || key == "file_path" {
            about.push(short);
        } else {
            rest.push(format!("{key}={short}"));
        }
    }
    about.extend(rest);
    about.join("  ")
}

fn color_of(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("failed" | "deleted") => "\x1b[31m",
        Some("completed" | "created" | "uploaded") => "\x1b[32m",
        Some("progress") => "\x1b[36m",
        _ => "\x1b[33m",
    }
}
