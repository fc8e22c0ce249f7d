//! Requests that are none, or two in one, or that never end; and what they say about who is behind them.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{KEYS, SECRET};
use crate::{
    commands::tidings,
    fixture::{DEADLINE, Service, report, request, until},
    restart::Process,
};

/// All that comes for these bytes until the service closes.
pub(super) async fn answer(service: &Service, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(service.address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, socket.read_to_end(&mut answer)).await.expect("an end in time");
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_head_that_drips_without_end_is_cut_off_at_its_limit() {
    const PIECE: usize = 16;
    // Longer than this waits for anything: it is the size that ends it, and not the time.
    let mut command = tidings(&["serve", "--port", "0"], &[("TIDINGS_HANDSHAKE_SECONDS", "120")]);
    command.env("TIDINGS_DRAIN_SECONDS", "0");
    let process = Process::spawn(command);
    let before_ms = process.cpu_ms();
    let mut socket = TcpStream::connect(process.address()).await.unwrap();
    socket.set_nodelay(true).unwrap();
    socket.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ").await.unwrap();
    let (mut reading, mut writing) = socket.split();
    let mut written = 0;
    let dripping = async {
        while writing.write_all(&[b'x'; PIECE]).await.is_ok() {
            written += PIECE;
            tokio::task::yield_now().await;
        }
    };
    let mut answer = Vec::new();
    let ended = async { tokio::join!(dripping, reading.read_to_end(&mut answer)) };
    let _ = timeout(DEADLINE, ended).await.expect("an end in time");
    let answer = String::from_utf8(answer).unwrap();
    // What it was still sending may have reset the connection before the answer was read.
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    report(format_args!(
        "a head that drips in pieces of {PIECE} bytes: cut off before {written}, {} ms of CPU",
        process.cpu_ms() - before_ms
    ));
    let text = request("GET", &process.url("/metrics"), &[], b"").await.text;
    let counted = r#"tidings_requests_refused_total{reason="head_too_large",key=""} 1"#;
    assert!(text.contains(counted), "{text}");
    process.stop().await;
}

#[tokio::test]
async fn nothing_but_http_1_is_spoken() {
    let service = Service::start();
    let settings_frame = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let answered = answer(&service, settings_frame).await;
    assert!(answered.is_empty() || answered.starts_with("HTTP/1.1 400"), "{answered}");
    let refused = answer(&service, b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    until("both being counted", || async {
        service.metric(r#"tidings_requests_refused_total{reason="no_http",key=""}"#).await > 1.5
    })
    .await;
    let upgrade = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings, close\r\n\
        Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let stays = answer(&service, upgrade).await;
    assert!(stays.starts_with("HTTP/1.1 200") && stays.ends_with("ok\n"), "{stays}");
}

#[tokio::test]
async fn a_request_within_another_ones_body_is_never_answered() {
    let service = Service::start();
    let hidden = "GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let length = format!("Content-Length: {}\r\n", hidden.len());
    for (headers, body) in [
        ("Content-Length: 0\r\nContent-Length: 5\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length: 0, 5\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length: +0\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length: -1\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length: 0x0\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length : 0\r\n".to_owned(), hidden.to_owned()),
        ("Content-Length: 18446744073709551616\r\n".to_owned(), hidden.to_owned()),
        (format!("{length}Transfer-Encoding: xchunked\r\n"), hidden.to_owned()),
        (format!("{length}Transfer-Encoding: chunked, identity\r\n"), hidden.to_owned()),
        ("Transfer-Encoding: chunked\r\n".to_owned(), format!("fffffffffffffffff\r\n{hidden}")),
        ("Transfer-Encoding: chunked\r\n".to_owned(), format!("+5\r\n{hidden}")),
        ("Transfer-Encoding: chunked\r\n".to_owned(), format!("0\n\n{hidden}")),
        ("X: y\r\n Content-Length: 5\r\n".to_owned(), String::new()),
        ("\0Content-Length: 5\r\n".to_owned(), hidden.to_owned()),
    ] {
        let request = format!("POST /api/events HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{body}");
        let answered = answer(&service, request.as_bytes()).await;
        assert!(answered.starts_with("HTTP/1.1 4"), "{headers:?}: {answered}");
        assert_eq!(answered.matches("HTTP/1.1 ").count(), 1, "{headers:?}: {answered}");
    }
    // Of two that contradict each other the length of the chunks counts, and the connection ends there.
    let both = format!(
        "POST /api/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
    );
    let answered = answer(&service, both.as_bytes()).await;
    assert_eq!(answered.matches("HTTP/1.1 ").count(), 1, "{answered}");
}

#[tokio::test]
async fn what_a_proxy_would_say_of_somebody_makes_nobody_of_anybody() {
    let service = Service::with(&[
        ("ENVIRONMENT", "production"),
        ("TIDINGS_LISTEN", "127.0.0.1:0"),
        ("TIDINGS_AUTH", "signed-cookie"),
        ("TIDINGS_SESSION_SECRET", SECRET),
        ("TIDINGS_KEYS", KEYS),
        ("TIDINGS_TRUSTED_PROXIES", "127.0.0.0/8"),
    ]);
    for header in [
        "x-user",
        "x-user-id",
        "remote-user",
        "x-remote-user",
        "x-forwarded-user",
        "x-auth-request-user",
        "x-forwarded-access-token",
        "x-amzn-oidc-identity",
    ] {
        let answer = request("GET", &service.url("/api/projects/p/events"), &[(header, "admin")], b"").await;
        assert_eq!((answer.status, &answer.json()["code"]), (401, &"no_credentials".into()), "{header}");
    }
    // Nor does coming from this machine.
    for header in ["x-forwarded-for", "x-real-ip", "forwarded", "x-forwarded-host"] {
        let body = br#"{"type":"a.b","project_id":"a/1"}"#;
        let answer = request("POST", &service.url("/api/events"), &[(header, "127.0.0.1")], body).await;
        assert_eq!((answer.status, &answer.json()["code"]), (401, &"key_missing".into()), "{header}");
        let metrics = request("GET", &service.url("/metrics"), &[(header, "127.0.0.1")], b"").await;
        assert_eq!((metrics.status, &metrics.json()["code"]), (401, &"key_missing".into()), "{header}");
    }
}
