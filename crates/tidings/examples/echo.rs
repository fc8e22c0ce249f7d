//! An echo for conformance suites: the service's own handshake, frame reader and compression, with larger messages and with
//! binary ones. `cargo xtask conformance` runs it.

use std::io::{self, Write as _};

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use tidings::{
    accept::{self, Limits, Sharing},
    handshake::Handshake,
};
use tidings_engine::{
    driver::Transport,
    wire::{Binary, Deflater, Frame, Incoming, Inflater, Reader, Rules, close_frame, pong_frame},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What the suites' largest cases need.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

#[tokio::main]
async fn main() -> io::Result<()> {
    let (address, mut incomings) = accept::listen(([127, 0, 0, 1], 0).into(), 1, Sharing::best())?;
    let mut out = io::stdout();
    writeln!(out, "listening on {address}")?;
    out.flush()?;
    let connections = TaskTracker::new();
    let serving = connections.clone();
    let router = Router::new().fallback(move |request| std::future::ready(upgrade(request, &serving)));
    if let Some(incomings) = incomings.pop() {
        accept::serve(incomings, router, None, Limits::default(), connections, CancellationToken::new())
            .await;
    }
    Ok(())
}

fn upgrade(mut request: Request, connections: &TaskTracker) -> Response {
    let Some(handshake) = Handshake::of(&mut request, true) else {
        return StatusCode::UPGRADE_REQUIRED.into_response();
    };
    let deflate = handshake.deflate;
    let (response, upgrading) = handshake.split();
    connections.spawn(async move {
        if let Ok((Transport::Plain(socket), leftover)) = upgrading.transport().await
            && let Ok(socket) = TcpStream::from_std(socket)
        {
            // A peer that breaks off is part of the suites.
            let _ = echo(socket, leftover, deflate).await;
        }
    });
    response
}

async fn echo(mut socket: TcpStream, leftover: Bytes, deflate: bool) -> io::Result<()> {
    let rules = Rules { message_bytes_max: MESSAGE_BYTES_MAX, deflate, binary: Binary::Read };
    let (mut reader, mut inflater, mut deflater) =
        (Reader::default(), Inflater::default(), Deflater::default());
    let mut encode = |plain: Frame, compressed: Frame, payload: &[u8]| match deflater.compress(payload) {
        Some(smaller) if deflate => compressed.encode(&smaller),
        _ => plain.encode(payload),
    };
    let mut buffer = leftover.to_vec();
    loop {
        let mut input = &buffer[..];
        loop {
            let answer = match reader.read(&mut input, &rules, &mut inflater) {
                Ok(None) => break,
                Ok(Some(Incoming::Pong)) => continue,
                Ok(Some(Incoming::Text(text))) => encode(Frame::Text, Frame::CompressedText, text.as_bytes()),
                Ok(Some(Incoming::Binary(bytes))) => encode(Frame::Binary, Frame::CompressedBinary, &bytes),
                Ok(Some(Incoming::Ping(payload))) => pong_frame(&payload),
                Ok(Some(Incoming::Close(code))) => {
                    let code = code.map(u16::to_be_bytes);
                    let code = code.as_ref().map_or(&[][..], |code| code);
                    return end(socket, Frame::Close.encode(code)).await;
                }
                Err(violation) => return end(socket, close_frame(violation.close_code())).await,
            };
            socket.write_all(&answer).await?;
        }
        buffer.resize(64 * 1024, 0);
        let length = socket.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        buffer.truncate(length);
    }
}

/// Says goodbye, and reads on until the peer has heard it: a socket that is closed with unread bytes resets.
async fn end(mut socket: TcpStream, close: Bytes) -> io::Result<()> {
    socket.write_all(&close).await?;
    socket.shutdown().await?;
    tokio::io::copy(&mut socket, &mut tokio::io::sink()).await.map(|_| ())
}
