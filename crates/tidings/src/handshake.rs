//! The WebSocket handshake (RFC 6455, section 4.2), from the request to the bare socket. Knows no connection and no setting.

use std::{
    io::{self, Read as _},
    time::Duration,
};

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use rustls::ServerConnection;
use tidings_engine::{driver::Transport, wire};
use tidings_protocol::{CloseCode, SUBPROTOCOL};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// For the peer's half of a close that is all that it gets.
const TURN_AWAY_TIMEOUT: Duration = Duration::from_secs(2);

/// A handshake that both sides agree on.
#[derive(Debug)]
pub struct Handshake {
    /// The response that says so.
    response: Response,
    /// Whether permessage-deflate was agreed on.
    pub deflate: bool,
    /// Whether the client offered our subprotocol, and so knows what our close codes mean.
    pub speaks_tidings: bool,
    upgrade: OnUpgrade,
}

impl Handshake {
    /// Reads a request; `None`: it is no WebSocket's. `deflate`: whether compression may be agreed on.
    pub fn of(request: &mut Request, deflate: bool) -> Option<Self> {
        let upgrade = request.extensions_mut().remove::<OnUpgrade>();
        let headers = request.headers();
        let key = headers.get(header::SEC_WEBSOCKET_KEY)?.as_bytes();
        let is_websocket = has_word(headers, &header::CONNECTION, "upgrade")
            && has_word(headers, &header::UPGRADE, "websocket")
            && headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13")
            // 16 bytes in base64.
            && key.len() == 24;
        let upgrade = upgrade.filter(|_| is_websocket)?;
        let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
        let answer = response.headers_mut();
        answer.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        answer.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        answer.insert(header::SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(derive_accept_key(key)).ok()?);
        let speaks_tidings = has_word(headers, &header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL);
        if speaks_tidings {
            answer.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        }
        let extension = deflate.then(|| agreed_extension(headers)).flatten();
        let deflate = extension.is_some();
        if let Some(extension) = extension {
            answer.insert(header::SEC_WEBSOCKET_EXTENSIONS, extension);
        }
        Some(Self { response, deflate, speaks_tidings, upgrade })
    }

    /// Parts the response, which has to go out first, from the way to the socket.
    pub fn split(self) -> (Response, Upgrading) {
        (self.response, Upgrading(self.upgrade))
    }
}

/// The way to the socket, once the response has gone out.
#[derive(Debug)]
pub struct Upgrading(OnUpgrade);

impl Upgrading {
    /// The bare socket, and what had been read of it behind the request. The library's buffers end here.
    pub async fn transport(self) -> Result<(Transport, Bytes), String> {
        let upgraded = self.0.await.map_err(|error| error.to_string())?;
        let upgraded = match upgraded.downcast::<TokioIo<TcpStream>>() {
            Ok(parts) => {
                let socket = parts.io.into_inner().into_std().map_err(|error| error.to_string())?;
                return Ok((Transport::Plain(socket), parts.read_buf));
            }
            Err(upgraded) => upgraded,
        };
        let parts = upgraded.downcast::<TokioIo<TlsStream<TcpStream>>>().map_err(|_| "no TCP connection")?;
        let (socket, mut tls) = parts.io.into_inner().into_inner();
        let socket = socket.into_std().map_err(|error| error.to_string())?;
        let leftover = with_decrypted(parts.read_buf, &mut tls).map_err(|error| error.to_string())?;
        Ok((Transport::Tls(socket, Box::new(tls)), leftover))
    }

    /// Closes the socket with a code, and waits a moment for the peer to do so, too: a socket that is dropped while something is
    /// unread takes back what was written to it.
    pub(crate) async fn turn_away(self, code: CloseCode, reason: &str) {
        let Ok(upgraded) = self.0.await else { return };
        let mut socket = TokioIo::new(upgraded);
        let closing = async {
            socket.write_all(&wire::close_frame_saying(code, reason)).await?;
            socket.shutdown().await?;
            let mut unread = [0; 512];
            while socket.read(&mut unread).await? > 0 {}
            io::Result::Ok(())
        };
        // However it ends, it has ended.
        let _ = timeout(TURN_AWAY_TIMEOUT, closing).await;
    }
}

/// Adds what was decrypted already, of which the socket does not tell any more.
fn with_decrypted(leftover: Bytes, tls: &mut ServerConnection) -> io::Result<Bytes> {
    let mut decrypted = Vec::new();
    match tls.reader().read_to_end(&mut decrypted) {
        // The peer has ended already, which the shard finds out.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        read => {
            read?;
        }
    }
    if decrypted.is_empty() {
        return Ok(leftover);
    }
    let mut all = BytesMut::from(leftover);
    all.extend_from_slice(&decrypted);
    Ok(all.freeze())
}

/// Whether a header's comma-separated list holds the word, in any case.
fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
}

fn agreed_extension(headers: &HeaderMap) -> Option<HeaderValue> {
    let offers =
        headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter().filter_map(|value| value.to_str().ok());
    let agreed = wire::negotiate(&offers.collect::<Vec<_>>().join(","))?;
    HeaderValue::try_from(agreed).ok()
}
