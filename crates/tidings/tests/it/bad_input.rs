//! Rubbish on the socket: an answer that says what is wrong, and nobody else disturbed.

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Client, frame, raw, raw_close_code},
    fixture::{Service, request},
};

/// Sends each text on one connection, expects its error code, and that the connection lives on.
async fn check(cases: &[(&str, &str)]) {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    for (text, code) in cases {
        client.send_text(text).await;
        let error = client.next().await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{text}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert!(error["timestamp"].is_string());
    }
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    assert_eq!(client.next().await["type"], "a.b");
}

#[tokio::test]
async fn what_is_not_json_is_answered() {
    check(&[
        ("hello", "invalid_json"),
        ("{\"type\":", "invalid_json"),
        ("", "invalid_json"),
        ("{}{}", "invalid_json"),
    ])
    .await;
}

#[tokio::test]
async fn a_wrong_shape_is_answered() {
    check(&[
        ("[]", "invalid_message"),
        ("7", "invalid_message"),
        ("{}", "invalid_message"),
        (r#"{"type":null}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":["p"]}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p","types":"task.*"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p","since":{"epoch":"x","offset":-1}}"#, "invalid_message"),
    ])
    .await;
}

#[tokio::test]
async fn an_unknown_or_forged_type_is_answered() {
    check(&[
        (r#"{"type":"publish"}"#, "unknown_type"),
        (r#"{"type":"system.heartbeat"}"#, "unknown_type"),
        (r#"{"type":"subscription.confirmed","project_id":"p"}"#, "unknown_type"),
        (r#"{"type":"container.reconnect"}"#, "unknown_type"),
    ])
    .await;
}

#[tokio::test]
async fn duplicate_keys_are_answered() {
    check(&[
        (r#"{"type":"subscribe","project_id":"p","project_id":"q"}"#, "invalid_message"),
        (r#"{"type":"ping","\u0074ype":"ping"}"#, "invalid_message"),
    ])
    .await;
}

#[tokio::test]
async fn what_parsers_stumble_over_is_answered() {
    let (open, close) = ("[".repeat(10_000), "]".repeat(10_000));
    check(&[
        (&open, "invalid_message"),
        (&format!("{open}{close}"), "invalid_message"),
        (&r#"{"a":"#.repeat(10_000), "invalid_json"),
        (&format!("{}1{}", r#"{"a":"#.repeat(10_000), "}".repeat(10_000)), "invalid_message"),
        (&format!(r#"{{"type":"ping","id":{open}{close}}}"#), "invalid_message"),
        (r#"{"type":1e400}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p","since":{"epoch":"e","offset":1e400}}"#, "invalid_message"),
        (
            r#"{"type":"subscribe","project_id":"p","since":{"epoch":"e","offset":99999999999999999999}}"#,
            "invalid_message",
        ),
        (r#"{"type":"ping","id":NaN}"#, "invalid_json"),
        (r#"{"type":"\ud800"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"\udc00p"}"#, "invalid_message"),
        (r#"{"\ud800":1,"type":"ping"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p\u0000"}"#, "invalid_message"),
        ("{\"type\":\"ping\0\"}", "invalid_json"),
        ("\0", "invalid_json"),
        ("\u{FEFF}{\"type\":\"ping\"}", "invalid_json"),
        (r#"{"type":"ping"} /* more */"#, "invalid_json"),
    ])
    .await;
}

#[tokio::test]
async fn what_stands_in_fields_that_are_not_ours_is_not_looked_at() {
    let service = Service::start();
    let mut client = Client::connect(&service).await;
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    for value in [&deep, "1e400", r#""\ud800""#, r#""\u0000""#] {
        client.send_text(&format!(r#"{{"type":"ping","x":{value}}}"#)).await;
        assert_eq!(client.next().await["type"], "pong");
    }
}

#[tokio::test]
async fn a_subscribe_without_a_project_or_with_an_odd_one_is_answered() {
    check(&[
        (r#"{"type":"subscribe"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":""}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"../secret"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p\u0000"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"p\u200b"}"#, "invalid_message"),
        (r#"{"type":"subscribe","project_id":"*"}"#, "invalid_message"),
        (r#"{"type":"unsubscribe","project_id":"never"}"#, "not_subscribed"),
    ])
    .await;
}

#[tokio::test]
async fn odd_project_ids_that_are_allowed_work_everywhere() {
    let service = Service::start();
    for (project, in_path) in [
        ("team/a b", "team%2Fa%20b"),
        ("Проект", "%D0%9F%D1%80%D0%BE%D0%B5%D0%BA%D1%82"),
        ("a%2Fb", "a%252Fb"),
        ("a..b?#\"\\", "a..b%3F%23%22%5C"),
    ] {
        let mut client = Client::subscribed(&service, project).await;
        service.publish(&json!({"type": "a.b", "project_id": project})).await;
        assert_eq!(client.next().await["project_id"], project);
        let page =
            request("GET", &service.url(&format!("/api/projects/{in_path}/events")), &[], b"").await.json();
        assert_eq!(page["events"][0]["project_id"], project, "{page}");
    }
}

#[tokio::test]
async fn messages_up_to_64_kib_are_read_and_larger_ones_close_with_1009() {
    let service = Service::start();
    let padded = |bytes: usize| {
        let text = json!({"type": "ping", "padding": ""}).to_string();
        text.replace("\"\"", &format!("\"{}\"", "x".repeat(bytes - text.len())))
    };
    let mut client = Client::connect(&service).await;
    client.send_text(&padded(64 * 1024)).await;
    assert_eq!(client.next().await["type"], "pong");
    client.send_text(&padded(64 * 1024 + 1)).await;
    assert_eq!(client.close_code().await, 1009);
    let mut far = Client::connect(&service).await;
    far.send_text(&padded(65 * 1024)).await;
    assert_eq!(far.close_code().await, 1009);
    let mut socket = raw(service.address).await;
    // Beyond what the library reads at all: refused by its length alone.
    socket.write_all(&frame(0x81, &vec![b'x'; 300 * 1024])[..64 * 1024]).await.unwrap();
    assert_eq!(raw_close_code(socket).await, 1009);
}

#[tokio::test]
async fn a_binary_frame_closes_with_1003() {
    let service = Service::start();
    let mut client = Client::connect(&service).await;
    client.send(Message::binary(vec![1, 2, 3])).await;
    assert_eq!(client.close_code().await, 1003);
}

#[tokio::test]
async fn invalid_utf8_closes_with_1007_and_broken_frames_with_1002() {
    let service = Service::start();
    for (bytes, code) in [
        (frame(0x81, b"{\"type\":\"\xff\xfe\"}"), 1007),
        (frame(0xC1, b"{}"), 1002),
        (frame(0x83, b"{}"), 1002),
        (frame(0x80, b"{}"), 1002),
        (frame(0x09, b"fragmented ping"), 1002),
        (vec![0x81, 2, b'{', b'}'], 1002),
    ] {
        let mut socket = raw(service.address).await;
        socket.write_all(&bytes).await.unwrap();
        assert_eq!(raw_close_code(socket).await, code, "{bytes:?}");
    }
}

#[tokio::test]
async fn an_upgrade_without_its_headers_is_told_what_this_is() {
    let service = Service::start();
    let answer = request("GET", &service.url("/ws"), &[], b"").await;
    assert_eq!((answer.status, answer.headers["upgrade"].as_str()), (426, "websocket"));
    assert!(answer.json()["detail"].as_str().unwrap().contains("WebSocket"));
    assert_eq!(request("POST", &service.url("/ws"), &[], b"").await.status, 405);
}
