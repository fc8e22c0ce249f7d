//! A WebSocket client that reads as fast as it can.

use std::{io, net::SocketAddr, time::Duration};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest},
};

use crate::fixture::{DEADLINE, Service};

/// What a client speaks over: a socket, or TLS on one.
pub(crate) trait Line: AsyncRead + AsyncWrite + Unpin {}

impl<L: AsyncRead + AsyncWrite + Unpin> Line for L {}

pub(crate) struct Client<L = TcpStream> {
    socket: WebSocketStream<L>,
    pub(crate) established: Value,
    /// What it was told of sources that could not be heard, and were again.
    pub(crate) notices: Vec<Value>,
}

impl Client {
    pub(crate) async fn connect(service: &Service) -> Self {
        Self::with_headers(service, &[]).await.unwrap()
    }

    pub(crate) async fn with_headers(
        service: &Service,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, tokio_tungstenite::tungstenite::Error> {
        let mut request =
            format!("ws://localhost:{}/ws", service.address.port()).into_client_request().unwrap();
        for &(name, value) in headers {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(service.address).await.unwrap();
        let (socket, response) = client_async(request, stream).await?;
        let mut client = Self::established(socket).await;
        client.established["subprotocol"] = json!(
            response.headers().get("sec-websocket-protocol").map(|protocol| protocol.to_str().unwrap())
        );
        Ok(client)
    }

    /// The code and reason with which a client with these headers is closed before it was served.
    pub(crate) async fn turned_away(service: &Service, headers: &[(&'static str, &str)]) -> (u16, String) {
        let mut request =
            format!("ws://localhost:{}/ws", service.address.port()).into_client_request().unwrap();
        for &(name, value) in headers {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(service.address).await.unwrap();
        let (mut socket, _) = client_async(request, stream).await.unwrap();
        match timeout(DEADLINE, socket.next()).await.expect("a close in time") {
            Some(Ok(Message::Close(Some(frame)))) => (frame.code.into(), frame.reason.to_string()),
            other => panic!("no close frame but {other:?}"),
        }
    }

    pub(crate) async fn subscribed(service: &Service, project: &str) -> Self {
        let mut client = Self::connect(service).await;
        client.subscribe(project).await;
        client
    }
}

impl<L: Line> Client<L> {
    /// Does the handshake of a WebSocket.
    pub(crate) async fn over(line: L) -> Self {
        let (socket, _) = client_async("ws://localhost/ws", line).await.unwrap();
        Self::established(socket).await
    }

    /// Takes a socket after its handshake.
    pub(crate) async fn established(socket: WebSocketStream<L>) -> Self {
        let mut client = Self { socket, established: Value::Null, notices: Vec::new() };
        client.established = client.next().await;
        assert_eq!(client.established["type"], "connection.established");
        client
    }

    pub(crate) async fn subscribe(&mut self, project: &str) {
        let confirmed = self.ask(&json!({"type": "subscribe", "project_id": project})).await;
        assert_eq!(confirmed["type"], "subscription.confirmed");
    }

    pub(crate) async fn send(&mut self, message: Message) {
        self.socket.send(message).await.unwrap();
    }

    pub(crate) async fn send_text(&mut self, text: &str) {
        self.send(Message::text(text)).await;
    }

    /// Sends a message and returns what comes next.
    pub(crate) async fn ask(&mut self, message: &Value) -> Value {
        self.send_text(&message.to_string()).await;
        self.next().await
    }

    /// The next message that is no notice.
    pub(crate) async fn next(&mut self) -> Value {
        loop {
            let message = timeout(DEADLINE, self.socket.next()).await.expect("a message in time");
            match message.expect("an open connection").unwrap() {
                Message::Text(text) => {
                    let message: Value = serde_json::from_str(&text).unwrap();
                    if !matches!(message["type"].as_str(), Some("system.degraded" | "system.recovered")) {
                        return message;
                    }
                    self.notices.push(message);
                }
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// The next message that is no heartbeat.
    pub(crate) async fn next_event(&mut self) -> Value {
        loop {
            let message = self.next().await;
            if message["type"] != "system.heartbeat" {
                return message;
            }
        }
    }

    /// Asserts that nothing waits: the answer to a ping is the next that comes.
    pub(crate) async fn nothing_waits(&mut self) {
        let answer = self.ask(&json!({"type": "ping", "id": "nothing"})).await;
        assert_eq!((&answer["type"], &answer["id"]), (&json!("pong"), &json!("nothing")), "{answer}");
    }

    /// Reads until it has been told so many notices; it asks now and then, and not faster than a client may.
    pub(crate) async fn until_notices(&mut self, count: usize) {
        let mut pause = tokio::time::interval(Duration::from_millis(20));
        while self.notices.len() < count {
            pause.tick().await;
            self.nothing_waits().await;
        }
    }

    /// What it speaks over, in the middle of everything.
    pub(crate) fn into_line(self) -> L {
        self.socket.into_inner()
    }

    /// Reads until the server closes; its close code.
    pub(crate) async fn close_code(mut self) -> u16 {
        loop {
            match timeout(DEADLINE, self.socket.next()).await.expect("a close in time") {
                Some(Ok(Message::Close(Some(frame)))) => return frame.code.into(),
                Some(Ok(_)) => {}
                other => panic!("no close frame but {other:?}"),
            }
        }
    }

    pub(crate) async fn close(mut self) {
        self.socket.close(None).await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

/// A client of bare frames, which reads when it is told to and not before.
pub(crate) struct Raw<L = TcpStream> {
    socket: BufReader<L>,
    /// The head of the answer to its handshake.
    pub(crate) head: String,
}

impl Raw {
    /// A client whose kernel takes next to nothing for it.
    pub(crate) async fn narrow(service: &Service) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Self::over(socket.connect(service.address).await.unwrap(), "", b"").await
    }
}

impl<L: Line> Raw<L> {
    /// Upgrades a socket; `headers` are lines with their ends, `behind` goes out with the handshake.
    pub(crate) async fn over(mut socket: L, headers: &str, behind: &[u8]) -> Self {
        let request = format!(
            "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        );
        socket.write_all(&[request.as_bytes(), behind].concat()).await.unwrap();
        let mut socket = BufReader::new(socket);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(DEADLINE, socket.read_u8()).await.expect("a head in time").unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        Self { socket, head }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
        self.socket.flush().await.unwrap();
    }

    pub(crate) async fn send_json(&mut self, message: &Value) {
        self.send(&frame(0x81, message.to_string().as_bytes())).await;
    }

    /// The next frame: its first byte, which holds FIN, RSV1 and the opcode, and its payload.
    pub(crate) async fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let socket = &mut self.socket;
        let read = async {
            let first = socket.read_u8().await?;
            let length = match socket.read_u8().await? {
                126 => u64::from(socket.read_u16().await?),
                127 => socket.read_u64().await?,
                short => u64::from(short),
            };
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            socket.read_exact(&mut payload).await?;
            Ok((first, payload))
        };
        timeout(DEADLINE, read).await.expect("a frame in time")
    }

    /// The next message, or how the connection ended: with a close code or without one.
    pub(crate) async fn next_or_end(&mut self) -> Result<Value, Option<u16>> {
        loop {
            match self.frame().await.map_err(|_| None)? {
                (0x81, text) => return Ok(serde_json::from_slice(&text).unwrap()),
                (0x89, payload) => self.send(&frame(0x8A, &payload)).await,
                (0x88, payload) => return Err(Some(u16::from_be_bytes([payload[0], payload[1]]))),
                (first, payload) => panic!("unexpected {first:#x} with {payload:?}"),
            }
        }
    }

    /// The next message that is no heartbeat.
    pub(crate) async fn next(&mut self) -> Value {
        let read = async {
            loop {
                let message = self.next_or_end().await.expect("an open connection");
                if message["type"] != "system.heartbeat" {
                    return message;
                }
            }
        };
        timeout(DEADLINE, read).await.expect("a message in time")
    }

    /// Subscribes, and reads up to the confirmation.
    pub(crate) async fn subscribe(&mut self, message: &Value) -> Value {
        self.send_json(message).await;
        loop {
            let answer = self.next().await;
            if answer["type"] == "subscription.confirmed" {
                return answer;
            }
            assert_eq!(answer["type"], "connection.established");
        }
    }
}

/// A socket after the upgrade, with bare bytes in both directions: for what a library does not let one send.
pub(crate) async fn raw(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(socket.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"));
    socket
}

/// A frame of a client's: masked, with a mask of zeros. `first` holds FIN and the opcode (RFC 6455, 5.2).
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=65535 => {
            frame.push(0xFE);
            frame.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            frame.push(0xFF);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// Reads frames until the server's close; its code.
pub(crate) async fn raw_close_code(mut socket: TcpStream) -> u16 {
    let read = async {
        loop {
            let first = socket.read_u8().await.unwrap();
            let length = match socket.read_u8().await.unwrap() {
                126 => u64::from(socket.read_u16().await.unwrap()),
                127 => socket.read_u64().await.unwrap(),
                short => u64::from(short),
            };
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            socket.read_exact(&mut payload).await.unwrap();
            if first & 0x0F == 8 {
                return u16::from_be_bytes([payload[0], payload[1]]);
            }
        }
    };
    timeout(DEADLINE, read).await.expect("a close in time")
}
