//! The server under test: its address, the upgrade request, and sockets to it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _},
};

use anyhow::{Context as _, bail, ensure};
use mio::net::TcpStream;
use socket2::{Domain, Protocol, Socket, Type};

/// Source addresses, 127.0.0.2 and on: one has 28,232 ports in the usual range, and the system takes ever longer to find a
/// free one the more are taken.
const ADDRESSES: usize = 100;
/// The receive buffer of connections that read slowly or never. Without it the kernel would take megabytes for them, and
/// the server would hardly notice.
const SLOW_RECEIVE_BYTES: usize = 16 * 1024;

/// A server under test.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    /// For the `Host` header.
    pub(super) host: String,
    path: String,
    /// With `{n}` where the connection's number belongs.
    headers: String,
}

impl Target {
    /// Reads `ws://host[:port][/path]`, and headers as `Name: value`.
    pub(super) fn parse(url: &str, headers: &[String]) -> anyhow::Result<Self> {
        let Some(rest) = url.strip_prefix("ws://") else {
            bail!(
                "--url {url}: expected ws://HOST:PORT/ws (TLS is not spoken here; measure behind the proxy)"
            );
        };
        let (host, path) = rest.find('/').map_or((rest, "/ws"), |slash| rest.split_at(slash));
        let with_port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            host.to_owned()
        } else {
            format!("{host}:80")
        };
        let mut addresses = with_port
            .to_socket_addrs()
            .with_context(|| format!("--url {url}: `{host}` has no address"))?
            .collect::<Vec<_>>();
        // Development servers listen on the first of these only; `localhost` may name both.
        addresses.sort_by_key(SocketAddr::is_ipv6);
        let address = *addresses.first().with_context(|| format!("--url {url}: `{host}` has no address"))?;
        let mut lines = String::new();
        for header in headers {
            ensure!(
                header.contains(':') && !header.contains(['\r', '\n']),
                "--header {header}: expected `Name: value`"
            );
            lines += header;
            lines += "\r\n";
        }
        Ok(Self { address, host: host.to_owned(), path: path.to_owned(), headers: lines })
    }

    /// The upgrade request of connection `number`. The key is always the one of RFC 6455, so that the plainest server can answer it.
    pub(super) fn upgrade(&self, number: usize, deflate: bool) -> String {
        let extensions = if deflate {
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
             client_no_context_takeover\r\n"
        } else {
            ""
        };
        let headers = self.headers.replace("{n}", &number.to_string());
        format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extensions}{headers}\r\n",
            self.path, self.host
        )
    }

    /// Starts to connect socket `number`. To a server on this machine each takes its source address in turn, because one
    /// address does not have ports enough.
    pub(super) fn connect(&self, number: usize, slow: bool) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(self.address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        if slow {
            socket.set_recv_buffer_size(SLOW_RECEIVE_BYTES)?;
        }
        if self.address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) && cfg!(target_os = "linux") {
            let last = u8::try_from(2 + number % ADDRESSES).unwrap_or(u8::MAX);
            socket.bind(&SocketAddr::from(([127, 0, 0, last], 0)).into())?;
        }
        match socket.connect(&self.address.into()) {
            Ok(()) => {}
            // On its way; that it arrived is told by the poll.
            Err(error) if is_in_progress(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(TcpStream::from_std(socket.into()))
    }
}

fn is_in_progress(error: &io::Error) -> bool {
    #[cfg(unix)]
    let number = libc::EINPROGRESS;
    // WSAEWOULDBLOCK.
    #[cfg(not(unix))]
    let number = 10035;
    error.raw_os_error() == Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_and_a_wrong_one_told() {
        let target = Target::parse("ws://127.0.0.1:9000", &["Cookie: session=s-{n}".to_owned()]).unwrap();
        assert_eq!(target.address.port(), 9000);
        let request = target.upgrade(17, true);
        assert!(request.starts_with("GET /ws HTTP/1.1\r\nHost: 127.0.0.1:9000\r\n"), "{request}");
        assert!(request.ends_with("takeover\r\nCookie: session=s-17\r\n\r\n"), "{request}");
        for (url, words) in [("http://x", "expected ws://"), ("ws://no such host/", "no address")] {
            assert!(Target::parse(url, &[]).unwrap_err().to_string().contains(words));
        }
        let header = Target::parse("ws://127.0.0.1", &["Cookie".to_owned()]);
        assert!(header.unwrap_err().to_string().contains("--header"));
    }
}
