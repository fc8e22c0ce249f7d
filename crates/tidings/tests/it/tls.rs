//! The public listener over TLS: the way of bytes in both directions, the certificate, and what is no TLS at all.

use std::{io, path::PathBuf, process::Stdio, sync::Arc};

use proptest::{
    prelude::{any, prop},
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidings::{Server, StartError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    certificates::{Authority, Signed, text},
    client::{Client, Raw, frame},
    commands::{run, text as output, tidings},
    fixture::{self, DEADLINE, Service, until},
    sse::Stream,
};

/// A service with a certificate for `localhost`, and who has signed it.
struct Secure {
    service: Service,
    authority: Authority,
    folder: TempDir,
}

impl Secure {
    fn start() -> Self {
        Self::with(&[])
    }

    fn with(variables: &[(&str, &str)]) -> Self {
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new("tests"));
        let (certificate, key) = authority.sign(&["localhost"]).write(folder.path(), "service");
        let own = [
            ("TIDINGS_TLS_CERT", text(&certificate)),
            ("TIDINGS_TLS_KEY", text(&key)),
            ("TIDINGS_INTERNAL_LISTEN", "127.0.0.1:0"),
        ];
        let service = Service::with(&[&own[..], variables].concat());
        Self { service, authority, folder }
    }

    fn certificate(&self) -> PathBuf {
        self.folder.path().join("service.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("service.key")
    }

    async fn socket(&self) -> TcpStream {
        TcpStream::connect(self.service.address).await.unwrap()
    }

    async fn line(&self) -> TlsStream<TcpStream> {
        self.over(self.socket().await).await.unwrap()
    }

    async fn over(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.in_version(socket, &TLS13).await
    }

    async fn in_version(
        &self,
        socket: TcpStream,
        version: &'static SupportedProtocolVersion,
    ) -> io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem().as_bytes()).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, socket).await
    }

    /// A client that follows project `p`.
    async fn client(&self) -> Client<TlsStream<TcpStream>> {
        let mut client = Client::over(self.line().await).await;
        client.subscribe("p").await;
        client
    }

    async fn publish(&self, number: usize, bytes: usize) {
        self.service.publish(&event(number, bytes)).await;
    }

    /// The certificate that a new connection is shown.
    async fn shown(&self) -> CertificateDer<'static> {
        let line = self.line().await;
        line.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    }

    async fn answers(&self) {
        self.client().await.close().await;
    }

    async fn is_empty(&self) -> bool {
        self.service.metric("tidings_connections").await < 0.5
    }
}

fn event(number: usize, bytes: usize) -> Value {
    json!({"type": "a.b", "project_id": "p", "number": number, "data": "x".repeat(bytes)})
}

fn der(signed: &Signed) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(signed.certificate.as_bytes()).unwrap()
}

#[tokio::test]
async fn events_come_over_both_versions_and_either_side_closes() {
    let secure = Secure::start();
    for (number, version) in [&TLS12, &TLS13].into_iter().enumerate() {
        let line = secure.in_version(secure.socket().await, version).await.unwrap();
        assert_eq!(line.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let mut client = Client::over(line).await;
        client.subscribe("p").await;
        secure.publish(number, 10).await;
        assert_eq!(client.next_event().await["number"], number);
        client.send(Message::Ping("now".into())).await;
        client.nothing_waits().await;
        client.close().await;
    }
    let client = secure.client().await;
    client.close().await;
    let client = secure.client().await;
    secure.service.ask_to_stop();
    assert_eq!(client.close_code().await, 1012);
}

#[tokio::test]
async fn a_ping_is_answered_and_a_bad_frame_is_closed_with_its_code() {
    let secure = Secure::start();
    let mut raw = Raw::over(secure.line().await, "", b"").await;
    raw.send(&frame(0x89, b"here")).await;
    while raw.frame().await.unwrap() != (0x8A, b"here".to_vec()) {}
    // A text that is none.
    raw.send(&frame(0x81, b"\xff")).await;
    assert_eq!(raw.next_or_end().await, Err(Some(1007)));
}

#[tokio::test]
async fn a_burst_that_a_slow_reader_takes_late_arrives_whole_and_in_order() {
    const EVENTS: usize = 100;
    const BYTES: usize = 50_000;
    let secure = Secure::with(&[("TIDINGS_SLOW_BYTES_MAX", "100000000")]);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let line = secure.over(socket.connect(secure.service.address).await.unwrap()).await.unwrap();
    let mut slow = Raw::over(line, "", b"").await;
    slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    for number in 0..EVENTS {
        secure.publish(number, BYTES).await;
    }
    for number in 0..EVENTS {
        let event = slow.next().await;
        assert_eq!((&event["offset"], &event["number"]), (&json!(number + 1), &json!(number)));
        assert_eq!(event["data"].as_str().unwrap().len(), BYTES);
    }
    slow.send_json(&json!({"type": "ping", "id": "all"})).await;
    assert_eq!(slow.next().await["id"], "all");
}

#[tokio::test]
async fn what_a_slow_reader_was_sent_before_its_close_arrives_with_the_close() {
    let secure = Secure::start();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let line = secure.over(socket.connect(secure.service.address).await.unwrap()).await.unwrap();
    let mut slow = Raw::over(line, "", b"").await;
    slow.subscribe(&json!({"type": "subscribe", "project_id": "p"})).await;
    secure.publish(1, 400_000).await;
    let begun = slow.frame();
    let (first, payload) = begun.await.unwrap();
    assert_eq!(first, 0x81);
    assert!(payload.len() > 400_000);
    secure.publish(2, 400_000).await;
    slow.send(&frame(0x88, &1000_u16.to_be_bytes())).await;
    // A frame that had begun is finished, and then the close is answered.
    let code = loop {
        match slow.next_or_end().await {
            Ok(event) => assert_eq!(event["number"], 2),
            Err(end) => break end,
        }
    };
    assert_eq!(code, Some(1000));
}

#[tokio::test]
async fn messages_come_in_many_records_and_records_have_many_messages() {
    let secure = Secure::start();
    let ping = |id: usize| frame(0x81, json!({"type": "ping", "id": id.to_string()}).to_string().as_bytes());
    // One more right behind the handshake, in its record.
    let mut raw = Raw::over(secure.line().await, "", &ping(0)).await;
    assert_eq!(raw.next().await["type"], "connection.established");
    assert_eq!(raw.next().await["id"], "0");
    for byte in ping(1) {
        raw.send(&[byte]).await;
    }
    assert_eq!(raw.next().await["id"], "1");
    let many: Vec<u8> = (2..300).flat_map(ping).collect();
    raw.send(&many).await;
    for id in 2..300 {
        assert_eq!(raw.next().await["id"], id.to_string());
    }
    // One message, in fragments, each in records of its own.
    let text = json!({"type": "ping", "id": "f".repeat(100)}).to_string().into_bytes();
    let last = text.len() - 1;
    for (place, byte) in text.iter().enumerate() {
        let first = u8::from(place == 0) | if place == last { 0x80 } else { 0 };
        raw.send(&frame(first, &[*byte])).await;
    }
    assert_eq!(raw.next().await["id"], "f".repeat(100));
}

#[tokio::test]
async fn a_stream_of_events_comes_over_tls() {
    let secure = Secure::start();
    let mut stream = Stream::over(secure.line().await, "project_id=p", "").await;
    assert_eq!(stream.next().await.message["type"], "subscription.confirmed");
    secure.publish(1, 300_000).await;
    assert_eq!(stream.next().await.message["data"].as_str().unwrap().len(), 300_000);
}

#[tokio::test]
async fn a_connection_that_was_cut_is_resumed() {
    let secure = Secure::start();
    let client = secure.client().await;
    let (token, id) = (client.established["resume_token"].clone(), client.established["client_id"].clone());
    drop(client);
    secure.publish(1, 10).await;
    let mut client = Client::over(secure.line().await).await;
    let resumed = client.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!((&resumed["type"], &resumed["client_id"]), (&json!("connection.resumed"), &id), "{resumed}");
    assert_eq!(client.next().await["type"], "subscription.confirmed");
    secure.publish(2, 10).await;
    assert_eq!(client.next_event().await["number"], 2);
}

#[tokio::test]
async fn whoever_ends_without_a_word_or_right_behind_one_is_gone_at_once() {
    let secure = Secure::start();
    for says_goodbye in [false, true] {
        let mut line = secure.line().await;
        let upgrade = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        line.write_all(upgrade.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        line.read_exact(&mut head).await.unwrap();
        until("its connection", || async { !secure.is_empty().await }).await;
        line.write_all(&frame(0x81, br#"{"type": "ping"}"#)).await.unwrap();
        if says_goodbye {
            line.shutdown().await.unwrap();
        } else {
            line.get_mut().0.shutdown().await.unwrap();
        }
        // The socket stays, so that only what was said ends the connection.
        until("its end", || async { secure.is_empty().await }).await;
        drop(line);
    }
}

#[tokio::test]
async fn a_client_for_which_there_is_no_room_is_told_over_tls() {
    let secure = Secure::with(&[("TIDINGS_CONNECTIONS_MAX", "1")]);
    let _first = secure.client().await;
    let offer = "Sec-WebSocket-Protocol: tidings.v1\r\n";
    let mut second = Raw::over(secure.line().await, offer, b"").await;
    assert_eq!(second.next_or_end().await, Err(Some(1013)));
}

#[tokio::test]
async fn a_new_certificate_is_shown_and_a_broken_one_is_not() {
    let secure = Secure::start();
    let mut old = secure.client().await;
    let first = secure.shown().await;
    // As Kubernetes does it: the names are links, and what they lead to changes at once.
    let next = secure.authority.sign(&["localhost"]);
    let (certificate, key) = next.write(secure.folder.path(), "next");
    for (link, target) in [(secure.certificate(), certificate), (secure.key(), key)] {
        let made = link.with_extension("link");
        std::os::unix::fs::symlink(target, &made).unwrap();
        std::fs::rename(made, link).unwrap();
    }
    until("the new certificate", || async { secure.shown().await == der(&next) }).await;
    assert_ne!(first, der(&next));
    secure.publish(1, 10).await;
    assert_eq!(old.next_event().await["number"], 1, "the old connection lives on");
    // A certificate without its key, in place: nothing changes, also after it was looked at.
    std::fs::write(secure.certificate(), secure.authority.sign(&["localhost"]).certificate).unwrap();
    std::fs::remove_file(secure.key()).unwrap();
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert_eq!(secure.shown().await, der(&next));
    }
    let last = secure.authority.sign(&["localhost"]);
    last.write(secure.folder.path(), "service");
    until("a whole pair again", || async { secure.shown().await == der(&last) }).await;
}

#[tokio::test]
async fn a_pair_that_cannot_be_used_is_refused_at_the_start_with_its_setting() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new("tests"));
    let (certificate, key) = authority.sign(&["localhost"]).write(folder.path(), "one");
    let (_, other_key) = authority.sign(&["localhost"]).write(folder.path(), "other");
    let encrypted = folder.path().join("encrypted.key");
    let pem = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    std::fs::write(&encrypted, pem).unwrap();
    let rubbish = folder.path().join("rubbish.pem");
    std::fs::write(&rubbish, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let nowhere = folder.path().join("nowhere");
    for (certificate, key, words) in [
        (&certificate, &other_key, ["TIDINGS_TLS_KEY", "has the key of another certificate", "other.key"]),
        (&certificate, &nowhere, ["TIDINGS_TLS_KEY", "cannot read", "nowhere"]),
        (&certificate, &certificate, ["TIDINGS_TLS_KEY", "has no private key", "one.pem"]),
        (&certificate, &encrypted, ["TIDINGS_TLS_KEY", "has an encrypted private key", "encrypted.key"]),
        (&nowhere, &key, ["TIDINGS_TLS_CERT", "cannot read", "nowhere"]),
        (&key, &key, ["TIDINGS_TLS_CERT", "has no certificate in it", "one.key"]),
        (&rubbish, &key, ["TIDINGS_TLS_CERT", "cannot be read", "rubbish.pem"]),
    ] {
        let variables = [
            ("BACKEND_PORT", "0"),
            ("TIDINGS_PERSIST", "false"),
            ("TIDINGS_TLS_CERT", text(certificate)),
            ("TIDINGS_TLS_KEY", text(key)),
        ];
        let variables =
            variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect();
        let error = Server::bind(fixture::settings(&variables)).await.unwrap_err();
        assert!(matches!(error, StartError::Certificate(_)));
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains("expected"), "{error}");
    }
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_cut() {
    let secure = Secure::start();
    let (mut silent, mut half) = (secure.socket().await, secure.socket().await);
    // The beginning of a record with a handshake in it.
    half.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
    // One whose handshake is done, and that asks for nothing.
    let mut idle = secure.line().await;
    let mut buffer = [0; 64];
    for socket in [&mut silent, &mut half] {
        let read = timeout(DEADLINE, socket.read(&mut buffer)).await.expect("an end in time");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    let read = timeout(DEADLINE, idle.read_to_end(&mut Vec::new())).await.expect("an end in time");
    drop(read);
    secure.answers().await;
}

#[tokio::test]
async fn a_plain_request_is_told_that_the_port_speaks_tls() {
    let secure = Secure::start();
    let mut socket = secure.socket().await;
    socket.write_all(b"GET /ws HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(DEADLINE, socket.read_to_string(&mut answer)).await.expect("an answer in time").unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{answer}");
    assert!(body.contains("https://"), "{answer}");
}

#[tokio::test]
async fn rubbish_harms_nobody() {
    let secure = Secure::start();
    let mut watching = secure.client().await;
    let mut runner = TestRunner::deterministic();
    let rubbish = prop::collection::vec(any::<u8>(), 0..2000);
    for round in 0..60 {
        let mut bytes = rubbish.new_tree(&mut runner).unwrap().current();
        if round % 2 == 0 {
            // What looks like the beginning of a handshake gets further.
            bytes.splice(..0, [0x16, 0x03, 0x01, 0x01, 0x00, 0x01, 0x00, 0x00, 0xFC, 0x03, 0x03]);
        }
        let mut socket = secure.socket().await;
        let _ = socket.write_all(&bytes).await;
        let _ = socket.shutdown().await;
        // Whatever it says to that, it ends.
        let _ = timeout(DEADLINE, socket.read_to_end(&mut Vec::new())).await.expect("an end in time");
    }
    // Rubbish where records belong, behind the upgrade.
    for _ in 0..20 {
        let bytes = rubbish.new_tree(&mut runner).unwrap().current();
        let mut line = Client::over(secure.line().await).await.into_line();
        let _ = line.get_mut().0.write_all(&[0x17, 0x03, 0x03, 0x00, 0x40]).await;
        let _ = line.get_mut().0.write_all(&bytes).await;
        let _ = line.get_mut().0.shutdown().await;
        let _ = timeout(DEADLINE, line.get_mut().0.read_to_end(&mut Vec::new())).await.expect("an end");
    }
    secure.publish(1, 10).await;
    assert_eq!(watching.next_event().await["number"], 1);
    watching.close().await;
    until("all others gone", || async { secure.is_empty().await }).await;
    secure.answers().await;
}

#[tokio::test]
async fn the_command_line_trusts_the_certificate_of_its_settings_and_no_other() {
    // Without an internal listener, so that publishing goes over TLS, too; and with a name that is not where it listens.
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new("tests"));
    let (certificate, key) = authority.sign(&["app.example.com"]).write(folder.path(), "service");
    let (other, other_key) = authority.sign(&["localhost"]).write(folder.path(), "other");
    let settings = [("TIDINGS_TLS_CERT", text(&certificate)), ("TIDINGS_TLS_KEY", text(&key))];
    let service = Service::with(&settings);
    let port = service.address.port().to_string();
    let (trusting, port) = (settings.to_vec(), [("BACKEND_PORT", port.as_str())]);
    let trusting = [&trusting[..], &port].concat();
    let doubting =
        [&[("TIDINGS_TLS_CERT", text(&other)), ("TIDINGS_TLS_KEY", text(&other_key))], &port[..]].concat();

    let health = run(&["healthcheck", "--ready"], &trusting);
    assert!(health.status.success(), "{}", output(&health.stderr));
    let refused = run(&["healthcheck"], &doubting);
    assert!(!refused.status.success());
    let why = output(&refused.stderr);
    assert!(why.contains("another certificate than the one in TIDINGS_TLS_CERT"), "{why}");
    // A URL that somebody gives is trusted as everybody trusts it.
    let public = run(&["healthcheck", "--url", &format!("https://localhost:{}", port[0].1)], &trusting);
    assert!(!public.status.success());

    let published = run(&["publish", "a.b", "-p", "p", "number=1"], &trusting);
    assert!(published.status.success(), "{}", output(&published.stderr));
    let arguments = ["tail", "p", "--count", "1", "--json"];
    let position = serde_json::from_slice::<Value>(&published.stdout).unwrap()["events"][0].clone();
    let since = format!("{}:0", position["epoch"].as_str().unwrap());
    let tail = tidings(&[&arguments[..], &["--since", &since]].concat(), &trusting)
        .stdout(Stdio::piped())
        .output()
        .unwrap();
    assert!(output(&tail.stdout).contains(r#""number":1"#), "{}", output(&tail.stderr));
    let refused = run(&arguments, &doubting);
    assert!(!refused.status.success());
}
