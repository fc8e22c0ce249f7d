//! Where events are published: a Redis channel or the service's own HTTP route, over one connection that is kept.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, ToSocketAddrs as _},
};

use anyhow::{Context as _, bail, ensure};
use mio::{Interest, Registry, Token, net::TcpStream};

use super::target::Target;

/// Read at once from the publisher's connection.
const READ_BYTES: usize = 64 * 1024;
/// Events in one request: the most that `POST /api/events` takes.
const REQUEST_EVENTS_MAX: usize = 1000;
/// Bytes in one request, well below what the route takes.
const REQUEST_BYTES_MAX: usize = 8 << 20;

/// Where to publish.
#[derive(Clone, Debug)]
pub(super) enum Destination {
    Redis { address: SocketAddr, credentials: Option<(Option<String>, String)>, channel: String },
    Http { key: Option<String> },
}

impl Destination {
    /// Reads `redis://[[user]:password@]host[:port][#channel]` or `http`.
    pub(super) fn parse(text: &str, key: Option<String>) -> anyhow::Result<Self> {
        if text == "http" {
            return Ok(Self::Http { key });
        }
        let rest = text
            .strip_prefix("redis://")
            .with_context(|| format!("--publish {text}: expected redis://HOST:PORT[#CHANNEL] or http"))?;
        let (rest, channel) = rest.split_once('#').unwrap_or((rest, "websocket:broadcast"));
        let (credentials, host) = rest.rsplit_once('@').map_or((None, rest), |(who, host)| (Some(who), host));
        let credentials = credentials.map(|who| {
            let (user, password) = who.split_once(':').unwrap_or(("", who));
            ((!user.is_empty()).then(|| user.to_owned()), password.to_owned())
        });
        let (host, _database) = host.split_once('/').unwrap_or((host, ""));
        let host = if host.contains(':') { host.to_owned() } else { format!("{host}:6379") };
        let address = host
            .to_socket_addrs()
            .with_context(|| format!("--publish {text}: `{host}` has no address"))?
            .next()
            .with_context(|| format!("--publish {text}: `{host}` has no address"))?;
        Ok(Self::Redis { address, credentials, channel: channel.to_owned() })
    }
}

/// A connection that events are published over.
#[derive(Debug)]
pub(super) struct Publisher {
    socket: TcpStream,
    out: Vec<u8>,
    written: usize,
    received: Vec<u8>,
    protocol: Protocol,
}

#[derive(Debug)]
enum Protocol {
    Redis {
        /// `PUBLISH` and the channel, as they go before every event.
        start: Vec<u8>,
        unanswered: u64,
    },
    Http {
        /// The request's header but for the length.
        start: String,
        waiting: VecDeque<Box<[u8]>>,
        unanswered: usize,
    },
}

impl Publisher {
    pub(super) fn connect(destination: &Destination, target: &Target) -> anyhow::Result<Self> {
        let address = match destination {
            Destination::Redis { address, .. } => *address,
            Destination::Http { .. } => target.address,
        };
        let socket = std::net::TcpStream::connect(address)
            .with_context(|| format!("publishing: {address} cannot be reached"))?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let mut out = Vec::new();
        let protocol = match destination {
            Destination::Redis { credentials, channel, .. } => {
                let mut unanswered = 0;
                if let Some((user, password)) = credentials {
                    let parts: Vec<&[u8]> = [Some("AUTH"), user.as_deref(), Some(password.as_str())]
                        .into_iter()
                        .flatten()
                        .map(str::as_bytes)
                        .collect();
                    out.extend(format!("*{}\r\n", parts.len()).bytes());
                    for part in parts {
                        bulk(&mut out, part);
                    }
                    unanswered = 1;
                }
                let mut start = b"*3\r\n".to_vec();
                bulk(&mut start, b"PUBLISH");
                bulk(&mut start, channel.as_bytes());
                Protocol::Redis { start, unanswered }
            }
            Destination::Http { key } => {
                let key = key.as_ref().map(|key| format!("Authorization: Bearer {key}\r\n"));
                let start = format!(
                    "POST /api/events HTTP/1.1\r\nHost: {}\r\nContent-Type: application/x-ndjson\r\n{}",
                    target.host,
                    key.unwrap_or_default()
                );
                Protocol::Http { start, waiting: VecDeque::new(), unanswered: 0 }
            }
        };
        let socket = TcpStream::from_std(socket);
        Ok(Self { socket, out, written: 0, received: Vec::new(), protocol })
    }

    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut self.socket, token, Interest::READABLE | Interest::WRITABLE)
    }

    /// Takes an event; it goes out with the next `flush`.
    pub(super) fn publish(&mut self, event: &[u8]) {
        match &mut self.protocol {
            Protocol::Redis { start, unanswered } => {
                self.out.extend_from_slice(start);
                bulk(&mut self.out, event);
                *unanswered += 1;
            }
            Protocol::Http { waiting, .. } => waiting.push_back(event.into()),
        }
    }

    /// Whether everything was taken and answered.
    pub(super) fn is_idle(&self) -> bool {
        match &self.protocol {
            Protocol::Redis { unanswered, .. } => *unanswered == 0,
            Protocol::Http { waiting, unanswered, .. } => waiting.is_empty() && *unanswered == 0,
        }
    }

    /// Writes what can be written now.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        self.next_request();
        while self.written < self.out.len() {
            match self.socket.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("publishing"),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads answers, and writes what waited for them.
    pub(super) fn ready(&mut self) -> anyhow::Result<()> {
        loop {
            let length = self.received.len();
            self.received.resize(length + READ_BYTES, 0);
            let read = self.socket.read(&mut self.received[length..]);
            self.received.truncate(length + read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) => bail!("publishing: the other side has closed the connection"),
                Ok(_) => self.answers()?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.flush(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("publishing"),
            }
        }
    }

    /// One request at a time; what comes in meanwhile goes with the next one.
    fn next_request(&mut self) {
        let Protocol::Http { start, waiting, unanswered } = &mut self.protocol else { return };
        if *unanswered > 0 || waiting.is_empty() {
            return;
        }
        let mut body = Vec::new();
        while let Some(event) = waiting.front()
            && *unanswered < REQUEST_EVENTS_MAX
            && (*unanswered == 0 || body.len() + event.len() < REQUEST_BYTES_MAX)
        {
            body.extend_from_slice(event);
            body.push(b'\n');
            *unanswered += 1;
            waiting.pop_front();
        }
        self.out.extend(format!("{start}Content-Length: {}\r\n\r\n", body.len()).bytes());
        self.out.extend_from_slice(&body);
    }

    fn answers(&mut self) -> anyhow::Result<()> {
        let used = match &mut self.protocol {
            Protocol::Redis { unanswered, .. } => redis_answers(&self.received, unanswered)?,
            Protocol::Http { unanswered, .. } => http_answer(&self.received, unanswered)?,
        };
        self.received.drain(..used);
        Ok(())
    }
}

/// A string as Redis reads it.
fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    // No `format!`: this is done for every event.
    out.push(b'$');
    let (mut digits, mut rest) = ([0; 20], bytes.len());
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b"0123456789"[rest % 10];
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[first..]);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// Answers of one line each: how many heard it, or `+OK`.
fn redis_answers(received: &[u8], unanswered: &mut u64) -> anyhow::Result<usize> {
    let mut used = 0;
    while let Some(length) = received[used..].iter().position(|&byte| byte == b'\n') {
        let line = String::from_utf8_lossy(&received[used..used + length]);
        ensure!(!line.starts_with('-'), "publishing: Redis answers: {}", line[1..].trim());
        ensure!(line.trim() != ":0", "publishing: nobody listens on this Redis channel");
        *unanswered = unanswered.saturating_sub(1);
        used += length + 1;
    }
    Ok(used)
}

fn http_answer(received: &[u8], unanswered: &mut usize) -> anyhow::Result<usize> {
    let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(0) };
    let head = String::from_utf8_lossy(&received[..end]);
    let status = head.split_ascii_whitespace().nth(1).unwrap_or_default();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let length = length.context("publishing: an answer without its length; is this the service?")?;
    let Some(body) = received.get(end + 4..end + 4 + length) else { return Ok(0) };
    ensure!(status == "202", "publishing: {status}: {}", String::from_utf8_lossy(body));
    *unanswered = 0;
    Ok(end + 4 + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_read_with_its_parts() {
        let parse = |text| Destination::parse(text, None);
        let Destination::Redis { address, credentials, channel } =
            parse("redis://me:pass@127.0.0.1/2#events").unwrap()
        else {
            panic!("not Redis")
        };
        assert_eq!((address.port(), channel.as_str()), (6379, "events"));
        assert_eq!(credentials, Some((Some("me".to_owned()), "pass".to_owned())));
        assert!(matches!(parse("http").unwrap(), Destination::Http { .. }));
        assert!(parse("kafka://x").unwrap_err().to_string().contains("expected redis://"));
    }

    #[test]
    fn answers_are_counted_and_refusals_told() {
        let mut unanswered = 3;
        assert_eq!(redis_answers(b"+OK\r\n:1\r\n:2", &mut unanswered).unwrap(), 9);
        assert_eq!(unanswered, 1);
        assert!(redis_answers(b"-NOAUTH log in\r\n", &mut 1).unwrap_err().to_string().contains("NOAUTH"));
        assert!(redis_answers(b":0\r\n", &mut 1).unwrap_err().to_string().contains("nobody listens"));
        let mut unanswered = 2;
        assert_eq!(http_answer(b"HTTP/1.1 202 Accepted\r\nContent-Length: 3\r\n\r\n{", &mut 1).unwrap(), 0);
        let answer = b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(http_answer(answer, &mut unanswered).unwrap(), answer.len());
        assert_eq!(unanswered, 0);
        let refused = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 6\r\n\r\nno key";
        assert_eq!(http_answer(refused, &mut 1).unwrap_err().to_string(), "publishing: 401: no key");
    }
}
