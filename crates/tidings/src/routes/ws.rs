//! `GET /ws`: the socket of a connection. What is said on it is decided in `tidings-engine`; here it is read, written,
//! kept alive and closed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::{
        State,
        ws::{
            CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection,
        },
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tidings_engine::{
    connection::{Connection, Heartbeat},
    outbox::{Next, Outbox},
};
use tidings_protocol::{CLIENT_MESSAGE_BYTES_MAX, CloseCode, SUBPROTOCOL};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Error as WireError;

use super::{Edge, problem::Problem};

/// Above our own limit, so that a message a little too long can still be answered with a proper close.
const WIRE_MESSAGE_BYTES_MAX: usize = 4 * CLIENT_MESSAGE_BYTES_MAX;
/// Read at once from an idle client; the library's default of 128 KiB would be the largest part of a connection.
const READ_BUFFER_BYTES: usize = 4 * 1024;
/// A ping goes out at least this often.
const PING_INTERVAL_MAX: Duration = Duration::from_secs(30);
/// A peer that sends nothing for this long after a ping is gone.
const PONG_TIMEOUT: Duration = Duration::from_secs(10);
/// A socket that takes nothing for this long while something waits belongs to a client that is too slow.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// For the peer's half of a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) async fn upgrade(
    State(edge): State<Arc<Edge>>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    if edge.is_draining() {
        edge.metrics.refused("draining");
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "this node is stopping; connect again"));
    }
    if !edge.access.allows_origin_of(&headers) {
        edge.metrics.refused("origin");
        let detail = "pages of this `Origin` may not connect; add it to TIDINGS_ALLOWED_ORIGINS";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    }
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(rejection) => {
            edge.metrics.refused("not_a_websocket");
            return Ok(not_a_websocket(&rejection));
        }
    };
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(WIRE_MESSAGE_BYTES_MAX)
        .max_frame_size(WIRE_MESSAGE_BYTES_MAX)
        .read_buffer_size(READ_BUFFER_BYTES);
    Ok(upgrade.on_upgrade(move |socket| serve(edge, socket)))
}

fn not_a_websocket(rejection: &WebSocketUpgradeRejection) -> Response {
    let detail =
        format!("this path is a WebSocket: {}; connect with a WebSocket client", rejection.body_text());
    let mut response = Problem::new(StatusCode::UPGRADE_REQUIRED, detail).into_response();
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    response
}

/// How a connection came to its end.
#[derive(Debug)]
enum End {
    /// The peer closed, with this code.
    ByPeer(Option<u16>),
    /// We close.
    ByUs(CloseCode),
    /// The socket broke, or the peer fell silent.
    Lost,
}

async fn serve(edge: Arc<Edge>, mut socket: WebSocket) {
    let _running = edge.tasks.token();
    edge.metrics.opened();
    let code = match edge.node.connect().await {
        Ok(connection) => run(&edge, socket, connection).await,
        Err(error) => {
            tracing::warn!(%error, "connection refused");
            // The peer may be gone already; there is nothing to do about it.
            let _ = timeout(CLOSE_TIMEOUT, socket.send(close_message(CloseCode::TryAgainLater))).await;
            Some(CloseCode::TryAgainLater.number())
        }
    };
    edge.metrics.closed(code);
}

async fn run(edge: &Edge, socket: WebSocket, mut connection: Connection) -> Option<u16> {
    let (mut sink, mut stream) = socket.split();
    let heard = Heard::new();
    let writer = Writer {
        outbox: connection.outbox(),
        heartbeat: connection.heartbeat(),
        heartbeat_interval: edge.settings.heartbeat_interval,
        heard: &heard,
        edge,
    };
    let end = if edge.is_draining() {
        // It came in beside the stop, which did not see it yet.
        End::ByUs(CloseCode::ServiceRestart)
    } else {
        tokio::select! {
            end = read(&mut stream, &mut connection, &heard, edge) => end,
            end = writer.run(&mut sink) => end,
            () = edge.kill.cancelled() => End::Lost,
        }
    };
    // From here on nothing is delivered to it any more, however long the close takes.
    drop(connection);
    match end {
        // 1005 is the registry's number for a close without one.
        End::ByPeer(code) => {
            // The library has queued our half of the close; it goes out with the next flush.
            let _ = timeout(CLOSE_TIMEOUT, sink.flush()).await;
            code.or(Some(1005))
        }
        End::Lost => None,
        End::ByUs(code) => {
            let closing = timeout(CLOSE_TIMEOUT, close(&mut sink, &mut stream, code));
            // A peer that does not answer, or cannot be reached, is left alone.
            let _ = edge.kill.run_until_cancelled(closing).await;
            Some(code.number())
        }
    }
}

/// When something last came from the peer. Shared by the reading and the writing half of one task.
struct Heard {
    opened: Instant,
    after_ms: AtomicU64,
    /// Nothing is read for now, so that silence says nothing about the peer.
    paused: AtomicBool,
}

impl Heard {
    fn new() -> Self {
        Self { opened: Instant::now(), after_ms: AtomicU64::new(0), paused: AtomicBool::new(false) }
    }

    fn now(&self) {
        let ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.after_ms.store(ms, Ordering::Relaxed);
    }

    fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    fn since(&self, moment: Instant) -> bool {
        self.paused.load(Ordering::Relaxed)
            || self.opened
                + Duration::from_millis(self.after_ms.load(Ordering::Relaxed))
                + Duration::from_millis(1)
                >= moment
    }
}

async fn read(
    stream: &mut SplitStream<WebSocket>,
    connection: &mut Connection,
    heard: &Heard,
    edge: &Edge,
) -> End {
    let outbox = connection.outbox();
    while let Some(message) = stream.next().await {
        heard.now();
        match message {
            Ok(Message::Text(text)) if text.len() > CLIENT_MESSAGE_BYTES_MAX => {
                return End::ByUs(CloseCode::MessageTooBig);
            }
            Ok(Message::Text(text)) => {
                edge.metrics.client_message();
                // Who asks for more than it reads waits for itself. Its pongs wait, too, so they are not missed.
                heard.pause(true);
                outbox.replay_room().await;
                heard.pause(false);
                heard.now();
                connection.receive(&text).await;
            }
            Ok(Message::Binary(_)) => return End::ByUs(CloseCode::UnsupportedData),
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(Message::Close(frame)) => return End::ByPeer(frame.map(|frame| frame.code)),
            Err(error) => return end_of(error),
        }
    }
    End::Lost
}

fn end_of(error: axum::Error) -> End {
    match error.into_inner().downcast::<WireError>().map(|error| *error) {
        Ok(WireError::Capacity(_)) => End::ByUs(CloseCode::MessageTooBig),
        Ok(WireError::Utf8(_)) => End::ByUs(CloseCode::InvalidUtf8),
        Ok(WireError::Protocol(_)) => End::ByUs(CloseCode::ProtocolError),
        _ => End::Lost,
    }
}

struct Writer<'a> {
    outbox: Arc<Outbox>,
    heartbeat: Heartbeat,
    heartbeat_interval: Duration,
    heard: &'a Heard,
    edge: &'a Edge,
}

impl Writer<'_> {
    async fn run(&self, sink: &mut SplitSink<WebSocket, Message>) -> End {
        let mut heartbeats = ticks(self.heartbeat_interval);
        let mut pings = ticks(self.heartbeat_interval.min(PING_INTERVAL_MAX));
        let mut ping_due = false;
        // The oldest ping that may still be unanswered. A later one does not prolong the wait for it.
        let mut pinged: Option<Instant> = None;
        loop {
            let silent_at = pinged.map(|pinged| pinged + PONG_TIMEOUT);
            let messages = tokio::select! {
                // Heartbeats go first: what they put into the outbox is then written with the rest, and a ping beside it.
                biased;
                _ = heartbeats.tick() => {
                    self.heartbeat.send();
                    continue;
                }
                _ = pings.tick() => {
                    ping_due = true;
                    Vec::new()
                }
                () = sleep_until(silent_at.unwrap_or_else(far_away)), if silent_at.is_some() => {
                    if !pinged.take().is_some_and(|pinged| self.heard.since(pinged)) {
                        return End::Lost;
                    }
                    continue;
                }
                next = self.outbox.next() => match next {
                    Next::Write(messages) => messages,
                    Next::Close(code) => return End::ByUs(code),
                },
            };
            if std::mem::take(&mut ping_due) {
                pinged.get_or_insert_with(Instant::now);
                if sink.feed(Message::Ping(Bytes::new())).await.is_err() {
                    return End::Lost;
                }
            }
            if let Err(end) = self.write(sink, messages).await {
                return end;
            }
        }
    }

    async fn write(&self, sink: &mut SplitSink<WebSocket, Message>, messages: Vec<Bytes>) -> Result<(), End> {
        let (count, mut bytes) = (messages.len(), 0);
        let write = async {
            for json in messages {
                bytes += json.len();
                // Made by us or checked when it came in; the conversion only checks again.
                let Ok(text) = Utf8Bytes::try_from(json) else { continue };
                // Per message, so that a large backlog that moves slowly is not taken for one that does not move.
                timeout(WRITE_TIMEOUT, sink.feed(Message::Text(text)))
                    .await
                    .map_err(|_| End::ByUs(CloseCode::TooSlow))?
                    .map_err(|_| End::Lost)?;
            }
            timeout(WRITE_TIMEOUT, sink.flush())
                .await
                .map_err(|_| End::ByUs(CloseCode::TooSlow))?
                .map_err(|_| End::Lost)
        };
        tokio::select! {
            written = write => written?,
            () = self.outbox.too_slow() => return Err(End::ByUs(CloseCode::TooSlow)),
        }
        self.edge.metrics.sent(count, bytes);
        Ok(())
    }
}

fn ticks(interval: Duration) -> tokio::time::Interval {
    let mut ticks = interval_at(Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_hours(24)
}

fn close_message(code: CloseCode) -> Message {
    Message::Close(Some(CloseFrame { code: code.number(), reason: code.reason().into() }))
}

/// Sends our half of the close and waits for the peer's, so that it does not find a reset instead of a reason.
async fn close(
    sink: &mut SplitSink<WebSocket, Message>,
    stream: &mut SplitStream<WebSocket>,
    code: CloseCode,
) {
    if sink.send(close_message(code)).await.is_ok() {
        while let Some(Ok(_)) = stream.next().await {}
    }
}
