//! Frames that claim, nest or repeat too much, on a service in a process of its own, whose memory can be read.

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::{
    client::{Client, Raw, frame, raw, raw_close_code},
    commands::tidings,
    fixture::{DEADLINE, Service, report},
    restart::Process,
};

/// Far more than any of it needs, and far less than what is claimed.
const BOUND_KB: u64 = 64 * 1024;

fn process(variables: &[(&str, &str)]) -> Process {
    let mut command = tidings(&["serve", "--port", "0"], variables);
    command.env("TIDINGS_DRAIN_SECONDS", "0");
    Process::spawn(command)
}

/// The header of a frame that says that so much comes.
fn claim(first: u8, length: u64) -> Vec<u8> {
    [&[first, 0xFF][..], &length.to_be_bytes(), &[0; 4]].concat()
}

#[tokio::test]
async fn a_length_that_is_only_claimed_is_refused_and_takes_no_memory() {
    let process = process(&[("TIDINGS_DEFLATE", "true")]);
    let before_kb = process.resident_kb();
    let offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n";
    let mut refused = Vec::new();
    for length in [64 * 1024 + 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, u64::MAX] {
        for (first, code) in [(0x81, 1009), (0x01, 1009), (0xC1, 1009), (0x89, 1002), (0x88, 1002)] {
            let socket = TcpStream::connect(process.address()).await.unwrap();
            let mut client = Raw::over(socket, offer, &claim(first, length)).await;
            // Whoever says it with the handshake is not even greeted.
            let end = match client.next_or_end().await {
                Ok(_) => client.next_or_end().await.map(|_| ()),
                Err(end) => Err(end),
            };
            assert_eq!(end, Err(Some(code)), "{first:#x} {length}");
            refused.push(client);
        }
    }
    let after_kb = process.resident_kb();
    report(format_args!("{} claimed lengths: {before_kb} kB before, {after_kb} kB after", refused.len()));
    assert!(after_kb < before_kb + BOUND_KB, "{before_kb} kB, then {after_kb} kB");
    process.connect().await.close().await;
    process.stop().await;
}

#[tokio::test]
async fn fragments_are_limited_by_what_they_come_to_together() {
    let service = Service::start();
    let ping = |bytes: usize| {
        let text = json!({"type": "ping", "id": "whole", "x": ""}).to_string();
        text.replace("\"\"", &format!("\"{}\"", "x".repeat(bytes - text.len()))).into_bytes()
    };
    let fragments = |bytes: usize, of: usize| {
        let message = ping(bytes);
        let count = message.chunks(of).count();
        let frames = message.chunks(of).enumerate().flat_map(move |(number, piece)| {
            let opcode = u8::from(number == 0);
            frame(opcode | if number + 1 == count { 0x80 } else { 0 }, piece)
        });
        frames.collect::<Vec<_>>()
    };
    for of in [1024, 32 * 1024, 65_535] {
        let mut client = Raw::over(TcpStream::connect(service.address).await.unwrap(), "", b"").await;
        assert_eq!(client.next().await["type"], "connection.established");
        client.send(&fragments(64 * 1024, of)).await;
        assert_eq!(client.next().await["id"], "whole");
        client.send(&fragments(64 * 1024 + 1, of)).await;
        assert_eq!(client.next_or_end().await, Err(Some(1009)), "fragments of {of}");
    }
}

#[tokio::test]
async fn a_frame_without_a_mask_is_closed_with_1002_whatever_it_is() {
    let service = Service::start();
    for bytes in [&[0x81, 2, b'{', b'}'][..], &[0x89, 0], &[0x8A, 0], &[0x88, 2, 0x03, 0xE8], &[0x01, 0]] {
        let mut socket = raw(service.address).await;
        socket.write_all(bytes).await.unwrap();
        assert_eq!(raw_close_code(socket).await, 1002, "{bytes:?}");
    }
}

#[tokio::test]
async fn what_comes_behind_a_bomb_harms_nobody() {
    let service = Service::with(&[("TIDINGS_DEFLATE", "true"), ("TIDINGS_SHARDS", "1")]);
    let mut other = Client::subscribed(&service, "p").await;
    let offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n";
    let bomb = crate::deflate::deflated(&vec![b' '; 30 << 20]);
    let broken = frame(0xC1, &[0xFF; 40]);
    for (bytes, code) in [
        ([frame(0xC1, &bomb), broken.clone(), frame(0x80, &bomb)].concat(), 1009),
        ([broken.clone(), frame(0xC1, &bomb), broken.clone()].concat(), 1002),
        // In fragments, of which the second is none, or is rubbish.
        ([frame(0x41, &bomb[..bomb.len() / 2]), broken.clone()].concat(), 1002),
        ([frame(0x41, &bomb[..bomb.len() / 2]), frame(0x80, &[0xFF; 40]), broken.clone()].concat(), 1009),
    ] {
        let mut client = Raw::over(TcpStream::connect(service.address).await.unwrap(), offer, b"").await;
        client.frame().await.unwrap();
        client.send(&bytes).await;
        let end = client.next_or_end().await;
        assert_eq!(end, Err(Some(code)));
        service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
        assert_eq!(other.next_event().await["type"], "a.b");
    }
}

#[tokio::test]
async fn a_hundred_thousand_subscriptions_stop_at_the_limit_and_take_no_memory() {
    const WANTED: usize = 100_000;
    const MAX: usize = 500;
    // At once those of ten seconds: more than all of them.
    let process = process(&[("TIDINGS_MESSAGE_RATE_MAX", "100000")]);
    let mut client = process.connect().await;
    client.subscribe("p0").await;
    let before_kb = process.resident_kb();
    let (read, mut write) = client.into_line().into_split();
    let writing = async {
        for number in 1..WANTED {
            let text = json!({"type": "subscribe", "project_id": format!("p{number}")}).to_string();
            write.write_all(&frame(0x81, text.as_bytes())).await.unwrap();
        }
    };
    let reading = async {
        let (mut read, mut confirmed) = (BufReader::new(read), 1);
        for _ in 1..WANTED {
            let answer = text(&mut read).await;
            match answer["type"].as_str().unwrap() {
                "subscription.confirmed" => confirmed += 1,
                _ => assert_eq!(answer["code"], "too_many_subscriptions", "{answer}"),
            }
        }
        (read, confirmed)
    };
    let ((), (mut read, confirmed)) =
        timeout(DEADLINE * 4, async { tokio::join!(writing, reading) }).await.expect("all answers in time");
    let after_kb = process.resident_kb();
    report(format_args!("{WANTED} subscriptions: {before_kb} kB before, {after_kb} kB after"));
    assert_eq!(confirmed, MAX);
    assert!(after_kb < before_kb + BOUND_KB, "{before_kb} kB, then {after_kb} kB");
    let event = |project: &str| json!({"type": "a.b", "project_id": project});
    for project in ["p500", "p499"] {
        assert_eq!(process.publish(&event(project)).await.status, 202);
    }
    assert_eq!(text(&mut read).await["project_id"], "p499", "the last that was let in, and not the next");
    drop((read, write));
    process.stop().await;
}

/// The next text that is no heartbeat.
async fn text(read: &mut (impl tokio::io::AsyncRead + Unpin)) -> Value {
    loop {
        let first = read.read_u8().await.unwrap();
        let length = match read.read_u8().await.unwrap() {
            126 => usize::from(read.read_u16().await.unwrap()),
            127 => usize::try_from(read.read_u64().await.unwrap()).unwrap(),
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        read.read_exact(&mut payload).await.unwrap();
        if first == 0x81 {
            let message: Value = serde_json::from_slice(&payload).unwrap();
            if message["type"] != "system.heartbeat" {
                return message;
            }
        } else {
            assert_eq!(first, 0x89, "a ping");
        }
    }
}
