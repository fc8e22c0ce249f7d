//! Many messages in one write: each is answered, in the order in which they take effect.

use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::{
    client::{Raw, frame},
    fixture::Service,
};

fn frames(messages: &[Value]) -> Vec<u8> {
    messages.iter().flat_map(|message| frame(0x81, message.to_string().as_bytes())).collect()
}

async fn greeted(service: &Service) -> Raw {
    let mut client = Raw::over(TcpStream::connect(service.address).await.unwrap(), "", b"").await;
    assert_eq!(client.next().await["type"], "connection.established");
    client
}

#[tokio::test]
async fn a_subscription_that_is_replaced_at_once_is_confirmed_too() {
    let service = Service::start();
    let mut client = greeted(&service).await;
    let subscribe =
        |id: u64, types: &str| json!({"type": "subscribe", "id": id, "project_id": "p", "types": [types]});
    client.send(&frames(&[subscribe(1, "a.*"), subscribe(2, "b.*"), subscribe(3, "c.*")])).await;
    let mut confirmed = Vec::new();
    while confirmed.last() != Some(&json!(3)) {
        let answer = client.next().await;
        assert_eq!(answer["type"], "subscription.confirmed");
        confirmed.push(answer["id"].clone());
    }
    assert_eq!(confirmed, [1, 2, 3]);
    let events = ["a.a", "b.b", "c.c"].map(|name| json!({"type": name, "project_id": "p"}));
    service.publish(&json!(events)).await;
    assert_eq!(client.next().await["type"], "c.c");
}

#[tokio::test]
async fn a_subscription_that_is_replaced_at_once_counts_once() {
    let service = Service::with(&[("TIDINGS_SUBSCRIPTIONS_MAX", "2")]);
    let mut client = greeted(&service).await;
    let projects = ["p", "p", "p", "q", "q", "p", "r"];
    client.send(&frames(&projects.map(|project| json!({"type": "subscribe", "project_id": project})))).await;
    let (mut confirmed, mut refused) = (0, Vec::new());
    while confirmed + refused.len() < projects.len() {
        let answer = client.next().await;
        if answer["type"] == "subscription.confirmed" {
            confirmed += 1;
        } else {
            assert_eq!(answer["code"], "too_many_subscriptions");
            refused.push(answer["project_id"].clone());
        }
    }
    assert_eq!((confirmed, refused), (6, vec![json!("r")]));
}
