//! One request over HTTP, on a connection of its own, that can be given up at any moment.

use std::{io, net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// How long an answer may take; whoever asks gives up then, and asks elsewhere.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same for what is long.
const PATIENCE_MAX: Duration = Duration::from_secs(30);

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }
}

/// Asks for `path`.
pub(crate) async fn get(address: SocketAddr, path: &str) -> io::Result<Answer> {
    exchange(address, &format!("GET {path} HTTP/1.1\r\n"), "", PATIENCE).await
}

/// The same for an answer that is long, with more headers, each with its line's end.
pub(crate) async fn get_all(address: SocketAddr, path: &str, headers: &str) -> io::Result<Answer> {
    exchange(address, &format!("GET {path} HTTP/1.1\r\n{headers}"), "", PATIENCE_MAX).await
}

/// Sends `body` to `path`, with more headers, each with its line's end.
pub(crate) async fn post(address: SocketAddr, path: &str, headers: &str, body: &str) -> io::Result<Answer> {
    let head = format!("POST {path} HTTP/1.1\r\n{headers}Content-Length: {}\r\n", body.len());
    exchange(address, &head, body, PATIENCE).await
}

async fn exchange(address: SocketAddr, head: &str, body: &str, patience: Duration) -> io::Result<Answer> {
    let request = format!("{head}Host: localhost\r\nConnection: close\r\n\r\n{body}");
    let exchange = async {
        let mut socket = TcpStream::connect(address).await?;
        socket.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "cut off in an answer"))
    };
    timeout(patience, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    // Every answer of the service that may have a body has one; without it a cut could not be told from the end.
    let length = if status == 204 { 0 } else { length? };
    (length == body.len()).then(|| Answer { status, body: body.to_owned() })
}
