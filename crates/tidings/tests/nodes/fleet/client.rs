//! One client of the contract.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest, http::HeaderValue},
};

use super::{Notes, Role};
use crate::{
    chance::Chance,
    record::{Epoch, Heard, Number, Numbered, Place, Project, project_id, project_of},
};

/// How long connecting may take, with the first message.
const CONNECT: Duration = Duration::from_secs(3);
/// How long the answer to `resume` may take before the client subscribes instead.
const RESUME: Duration = Duration::from_secs(5);
/// Waiting before the next attempt is chosen between nothing and this, doubled with each attempt.
const BACKOFF: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Longer than any test.
const FOR_EVER: Duration = Duration::from_hours(1);
/// The close code of what ended without one.
const CUT: u16 = 1006;

/// A message of the service, as far as clients look into it.
#[derive(Deserialize)]
struct Incoming<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    project_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    epoch: Option<Cow<'a, str>>,
    offset: Option<u64>,
    folded: Option<u64>,
    recovered: Option<bool>,
    state: Option<IgnoredAny>,
    #[serde(borrow)]
    node: Option<Cow<'a, str>>,
    #[serde(borrow)]
    resume_token: Option<Cow<'a, str>>,
    heartbeat_interval: Option<u64>,
    subscriptions: Option<Vec<String>>,
    positions: Option<HashMap<String, u64>>,
    #[serde(borrow)]
    code: Option<Cow<'a, str>>,
    retry_after_ms: Option<u64>,
    #[serde(borrow)]
    gap: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reason: Option<Cow<'a, str>>,
    publisher: Option<u16>,
    n: Option<u32>,
    copies: Option<u32>,
    sent_ms: Option<u64>,
}

impl Incoming<'_> {
    fn project(&self) -> Option<Project> {
        project_of(self.project_id.as_deref()?)
    }

    fn event(&self) -> Option<Numbered> {
        let number = Number { publisher: self.publisher?, n: self.n? };
        Some(Numbered { project: self.project()?, number, copies: self.copies? })
    }
}

/// When to come back after a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    AtOnce,
    Later,
    Never,
}

/// How far a connection is with what the former one followed.
enum Stage {
    /// `resume` was sent; it is answered until then, or not at all.
    Resuming(Instant),
    /// It was not answered, and the client has subscribed instead: what it gets may come twice, by its own doing.
    GaveUp,
    Following,
}

pub(super) struct Client {
    role: Role,
    addresses: Arc<[SocketAddr]>,
    next_node: usize,
    notes: Arc<Notes>,
    away: watch::Receiver<bool>,
    chance: Chance,
    attempts: u32,
    token: Option<String>,
    positions: BTreeMap<Project, Place>,
    silence: Duration,
}

impl Client {
    pub(super) fn new(
        index: usize,
        role: Role,
        addresses: Arc<[SocketAddr]>,
        notes: Arc<Notes>,
        away: watch::Receiver<bool>,
    ) -> Self {
        Self {
            role,
            addresses,
            next_node: index,
            notes,
            away,
            chance: Chance::new(index as u64),
            attempts: 0,
            token: None,
            positions: BTreeMap::new(),
            silence: CONNECT,
        }
    }

    /// Connects for as long as it is let.
    pub(super) async fn run(mut self) {
        loop {
            let mut away = self.away.clone();
            let _ = away.wait_for(|away| !away).await;
            let next = tokio::select! {
                next = self.connection() => next,
                _ = away.wait_for(|away| *away) => {
                    self.notes.write(Heard::Left);
                    Next::AtOnce
                }
            };
            match next {
                Next::AtOnce => {}
                Next::Later => self.back_off().await,
                Next::Never => return,
            }
        }
    }

    async fn back_off(&mut self) {
        let limit = BACKOFF_MAX.min(BACKOFF * 2_u32.pow(self.attempts.min(8)));
        self.attempts += 1;
        sleep(limit.mul_f64(self.chance.share())).await;
    }

    /// One connection, to another node than the last.
    async fn connection(&mut self) -> Next {
        let node = self.addresses[self.next_node % self.addresses.len()];
        self.next_node += 1;
        let headers = self.role.cookie.as_deref().map(|cookie| [("cookie", cookie), OUR_PROTOCOL]);
        let connected = timeout(CONNECT, connect(node, headers.as_ref().map_or(&[], |all| &all[..]))).await;
        let Ok(Ok(socket)) = connected else { return Next::Later };
        let mut connection =
            Connection { client: self, socket, own_token: None, stage: Stage::Following, appointment: false };
        let (code, why) = connection.run().await;
        let kept_appointment = connection.appointment;
        self.notes.write(Heard::Closed { code, why });
        if code == 4510 {
            self.token = None;
        }
        match code {
            4400..=4499 => Next::Never,
            1012 if kept_appointment => Next::AtOnce,
            _ => Next::Later,
        }
    }
}

/// What a browser offers that wants to be told by a close code why it is sent away.
pub(crate) const OUR_PROTOCOL: (&str, &str) = ("sec-websocket-protocol", "tidings.v1");

/// A WebSocket at this node, asked for with more headers.
pub(crate) async fn connect(
    node: SocketAddr,
    headers: &[(&'static str, &str)],
) -> Result<WebSocketStream<TcpStream>, tungstenite::Error> {
    let mut request = format!("ws://localhost:{}/ws", node.port()).into_client_request()?;
    for &(name, value) in headers {
        request.headers_mut().insert(name, HeaderValue::from_str(value)?);
    }
    let stream = TcpStream::connect(node).await?;
    Ok(client_async(request, stream).await?.0)
}

struct Connection<'a> {
    client: &'a mut Client,
    socket: WebSocketStream<TcpStream>,
    own_token: Option<String>,
    stage: Stage,
    /// Whether the node has said when it will close.
    appointment: bool,
}

impl Connection<'_> {
    /// Follows it to its end; its close code, and why it ended.
    async fn run(&mut self) -> (u16, String) {
        let mut silence = CONNECT;
        loop {
            let unanswered = match self.stage {
                Stage::Resuming(until) => until,
                _ => Instant::now() + silence,
            };
            let heard = tokio::select! {
                message = timeout(silence, self.socket.next()) => match message {
                    Ok(Some(Ok(Message::Text(text)))) => self.hear(&text).await.ok_or("an answer could not be sent"),
                    Ok(Some(Ok(Message::Close(Some(frame))))) => {
                        return (frame.code.into(), frame.reason.as_str().to_owned());
                    }
                    Ok(Some(Ok(_))) => Ok(()),
                    Ok(Some(Err(error))) => return (CUT, error.to_string()),
                    Ok(None) => Err("it ended"),
                    Err(_) => Err("nothing came, not even a heartbeat"),
                },
                () = sleep_until(unanswered), if matches!(self.stage, Stage::Resuming(_)) => {
                    self.give_up().await.ok_or("an answer could not be sent")
                }
            };
            if let Err(why) = heard {
                return (CUT, why.to_owned());
            }
            silence = self.client.silence;
        }
    }

    async fn hear(&mut self, text: &str) -> Option<()> {
        let strange = || Heard::Strange(text.chars().take(300).collect());
        let Ok(message) = serde_json::from_str::<Incoming<'_>>(text) else {
            self.client.notes.write(strange());
            return Some(());
        };
        match &*message.kind {
            "connection.established" => self.established(&message).await?,
            "connection.resumed" => self.resumed(&message).await?,
            "error" if message.code.as_deref() == Some("resume_expired") => self.expired().await?,
            // Announcements are followed by everybody, and confirmed again when their stream begins anew.
            "subscription.confirmed" if message.project_id.as_deref() == Some("*") => {}
            "subscription.confirmed" => self.confirmed(&message)?,
            "subscription.removed" => {
                let (project, reason) = (message.project()?, message.reason.as_deref()?.into());
                self.client.role.projects.retain(|own| *own != project);
                self.client.notes.write(Heard::Removed { project, reason });
            }
            "system.heartbeat" => self.heartbeat(&message),
            "system.degraded" => self.client.notes.write(Heard::Degraded),
            "system.recovered" => {
                self.client.notes.write(Heard::Recovered { gap: message.gap.as_deref()?.into() });
            }
            "container.reconnect" => self.appointment(&message),
            _ => match (message.event(), message.offset) {
                (Some(event), Some(offset)) => self.event(event, offset, &message),
                _ => self.client.notes.write(strange()),
            },
        }
        Some(())
    }

    async fn established(&mut self, message: &Incoming<'_>) -> Option<()> {
        self.client.notes.write(Heard::Connected { node: message.node.as_deref()?.into() });
        // As a page does: two heartbeats may be missing, not three.
        let silence = Duration::from_secs(message.heartbeat_interval? * 3);
        self.client.silence = if self.client.role.is_patient { FOR_EVER } else { silence };
        self.own_token = Some(message.resume_token.as_deref()?.to_owned());
        let Some(token) = self.client.token.clone() else {
            return self.subscribe(&self.all(), "first").await;
        };
        let position = |(project, place): (&Project, &Place)| (project_id(*project), position(place));
        let positions: serde_json::Map<_, _> = self.client.positions.iter().map(position).collect();
        self.stage = Stage::Resuming(Instant::now() + RESUME);
        self.send(&json!({"type": "resume", "token": token, "positions": positions})).await
    }

    fn all(&self) -> Vec<Project> {
        self.client.role.projects.clone()
    }

    async fn resumed(&mut self, message: &Incoming<'_>) -> Option<()> {
        self.client.notes.write(Heard::Resumed(true));
        if matches!(self.stage, Stage::GaveUp) {
            return Some(());
        }
        let resumed = message.subscriptions.as_deref()?;
        let missing: Vec<_> =
            self.all().into_iter().filter(|project| !resumed.contains(&project_id(*project))).collect();
        self.subscribe(&missing, "missing").await
    }

    async fn expired(&mut self) -> Option<()> {
        self.client.notes.write(Heard::Resumed(false));
        if matches!(self.stage, Stage::GaveUp) {
            return Some(());
        }
        self.subscribe(&self.all(), "expired").await
    }

    async fn give_up(&mut self) -> Option<()> {
        self.subscribe(&self.all(), "twice").await?;
        self.stage = Stage::GaveUp;
        Some(())
    }

    /// Subscribes to what this connection has not taken over; its own token stands for it from now on.
    async fn subscribe(&mut self, projects: &[Project], id: &str) -> Option<()> {
        self.stage = Stage::Following;
        self.client.token.clone_from(&self.own_token);
        self.client.attempts = 0;
        for &project in projects {
            let mut message = json!({"type": "subscribe", "project_id": project_id(project), "id": id});
            if let Some(place) = self.client.positions.get(&project) {
                message["since"] = position(place);
            }
            self.send(&message).await?;
        }
        Some(())
    }

    fn confirmed(&mut self, message: &Incoming<'_>) -> Option<()> {
        let project = message.project()?;
        let place = Place { epoch: Epoch::from(message.epoch.as_deref()?), offset: message.offset? };
        self.client.positions.insert(project, place.clone());
        let (recovered, has_state) = (message.recovered, message.state.is_some());
        let rewinds = message.id.as_deref() == Some("twice");
        self.client.notes.write(Heard::Confirmed { project, place, recovered, has_state, rewinds });
        Some(())
    }

    fn event(&mut self, event: Numbered, offset: u64, message: &Incoming<'_>) {
        if let Some(position) = self.client.positions.get_mut(&event.project) {
            position.offset = offset;
        }
        self.client.notes.write(Heard::Event { event, offset, folded: message.folded.unwrap_or(0) });
        self.client.notes.saw(event.project, message.sent_ms.unwrap_or(0));
    }

    fn heartbeat(&mut self, message: &Incoming<'_>) {
        for (id, &offset) in message.positions.iter().flatten() {
            // Of the stream of announcements there is nothing to check: nobody publishes there.
            let Some(project) = project_of(id) else { continue };
            if let Some(position) = self.client.positions.get_mut(&project) {
                position.offset = position.offset.max(offset);
            }
            self.client.notes.write(Heard::Position { project, offset });
        }
        self.client.notes.heartbeats.fetch_add(1, Ordering::Relaxed);
    }

    fn appointment(&mut self, message: &Incoming<'_>) {
        self.appointment = true;
        self.client.notes.write(Heard::Appointment { in_ms: message.retry_after_ms.unwrap_or(0) });
    }

    async fn send(&mut self, message: &Value) -> Option<()> {
        timeout(CONNECT, self.socket.send(Message::text(message.to_string()))).await.ok()?.ok()
    }
}

fn position(place: &Place) -> Value {
    json!({"epoch": &*place.epoch, "offset": place.offset})
}
