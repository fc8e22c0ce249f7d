//! Connections that are cut and resumed, while events are published all the time: none may be missing, none may come twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::watch, task::JoinHandle, time::timeout};
use tokio_tungstenite::tungstenite::{Message, protocol::CloseFrame};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    client::{Client, Raw, frame},
    fixture::{DEADLINE, Service, until},
};

/// History that holds whatever a test publishes.
const ROOMY: (&str, &str) = ("TIDINGS_HISTORY_EVENTS", "1000000");

/// Publishes rounds of one event in `p`, two in `q`, and one announcement.
struct Publisher {
    rounds: watch::Receiver<u64>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Publisher {
    fn start(service: &Arc<Service>) -> Self {
        let (tell, rounds) = watch::channel(0);
        let stop = CancellationToken::new();
        let (service, stopped) = (Arc::clone(service), stop.clone());
        let running = TaskTracker::new().spawn(async move {
            while !stopped.is_cancelled() {
                let round = *tell.borrow() + 1;
                let events = json!([
                    {"type": "all.event", "project_id": "p", "number": round},
                    {"type": "kept.event", "project_id": "q", "number": round},
                    {"type": "dropped.event", "project_id": "q", "number": round},
                    {"type": "news.flash", "number": round},
                ]);
                service.publish(&events).await;
                tell.send_replace(round);
            }
        });
        Self { rounds, stop, running }
    }

    fn round(&self) -> u64 {
        *self.rounds.borrow()
    }

    /// Waits until so many more rounds are published; the number of the last one.
    async fn more(&mut self, rounds: u64) -> u64 {
        let target = self.round() + rounds;
        *self.rounds.wait_for(|round| *round >= target).await.unwrap()
    }

    /// The number of the last round.
    async fn stop(self) -> u64 {
        self.stop.cancel();
        self.running.await.unwrap();
        *self.rounds.borrow()
    }
}

/// What a client knows over all of its connections.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// Epoch and offset of each stream.
    positions: BTreeMap<String, (String, u64)>,
    /// The last number of each stream.
    numbers: BTreeMap<String, u64>,
}

/// A client that checks everything that it is sent.
struct Follower {
    client: Client,
    seen: Seen,
    /// Streams whose order holds on this connection: those that were confirmed.
    live: BTreeSet<String>,
}

impl Follower {
    /// A new client, which follows all of `p`, some of `q`, and the announcements.
    async fn start(service: &Service) -> Self {
        let mut follower = Self::again(service, &Seen::default()).await;
        follower.follow_announcements();
        follower.subscribe("p").await;
        follower.subscribe("q").await;
        follower
    }

    /// A new connection of a client that knows something already.
    async fn again(service: &Service, seen: &Seen) -> Self {
        Self { client: Client::connect(service).await, seen: seen.clone(), live: BTreeSet::new() }
    }

    /// Takes the announcements as they come from the beginning of this connection.
    fn follow_announcements(&mut self) {
        let announcements = &self.client.established["announcements"];
        let position =
            (announcements["epoch"].as_str().unwrap().to_owned(), announcements["offset"].as_u64().unwrap());
        self.seen.positions.insert("*".to_owned(), position);
        self.live.insert("*".to_owned());
    }

    fn token(&self) -> String {
        self.client.established["resume_token"].as_str().unwrap().to_owned()
    }

    fn id(&self) -> Value {
        self.client.established["client_id"].clone()
    }

    /// Drops the socket without a word; what is left of the client.
    fn cut(self) -> (Seen, String) {
        let token = self.token();
        (self.seen, token)
    }

    async fn subscribe(&mut self, project: &str) -> Value {
        let mut message = json!({"type": "subscribe", "project_id": project});
        if project == "q" {
            message["types"] = json!(["kept.*"]);
        }
        if let Some((epoch, offset)) = self.seen.positions.get(project) {
            message["since"] = json!({"epoch": epoch, "offset": offset});
        }
        self.client.send_text(&message.to_string()).await;
        self.until(|answer| answer["type"] == "subscription.confirmed" && answer["project_id"] == project)
            .await
    }

    /// Asks to resume, with the positions of these streams; the answer.
    async fn resume(&mut self, token: &str, streams: &[&str]) -> Value {
        let position = |stream: &&str| {
            let (epoch, offset) = &self.seen.positions[*stream];
            ((*stream).to_owned(), json!({"epoch": epoch, "offset": offset}))
        };
        let positions: serde_json::Map<_, _> = streams.iter().map(position).collect();
        let message = json!({"type": "resume", "id": "r", "token": token, "positions": positions});
        self.client.send_text(&message.to_string()).await;
        let answer = self.until(|answer| answer["id"] == "r").await;
        if answer["type"] == "error" {
            assert_eq!(answer["code"], "resume_expired", "{answer}");
        }
        answer
    }

    /// Resumes everything, and expects that it works: the former client, and each of its streams without a hole.
    async fn resume_all(&mut self, token: &str, client_id: &Value) {
        let resumed = self.resume(token, &["p", "q", "*"]).await;
        assert_eq!(resumed["type"], "connection.resumed", "{resumed}");
        assert_eq!(&resumed["client_id"], client_id);
        assert_eq!(resumed["restarted"], false);
        let mut subscriptions: Vec<_> = resumed["subscriptions"].as_array().unwrap().clone();
        subscriptions.sort_by_key(Value::to_string);
        assert_eq!(subscriptions, ["p", "q"]);
        for _ in 0..3 {
            let confirmed = self.until(|message| message["type"] == "subscription.confirmed").await;
            assert_eq!(confirmed["recovered"], true, "{confirmed}");
        }
        assert_eq!(self.live.len(), 3);
    }

    async fn until(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let read = async {
            loop {
                let message = self.next().await;
                if wanted(&message) {
                    return message;
                }
            }
        };
        timeout(DEADLINE, read).await.expect("the message in time")
    }

    /// Reads until everything of this round is there.
    async fn until_round(&mut self, round: u64) {
        let is_there =
            |seen: &Seen, stream: &String| seen.numbers.get(stream).is_some_and(|last| *last >= round);
        let read = async {
            while !self.live.iter().all(|stream| is_there(&self.seen, stream)) {
                self.next().await;
            }
        };
        timeout(DEADLINE, read).await.expect("the round in time");
    }

    /// The next message, checked.
    async fn next(&mut self) -> Value {
        let message = self.client.next().await;
        if message["type"] == "subscription.confirmed" {
            self.confirmed(&message);
        } else if message.get("number").is_some() {
            self.event(&message);
        }
        message
    }

    fn confirmed(&mut self, message: &Value) {
        let stream = message["project_id"].as_str().unwrap().to_owned();
        let position = (message["epoch"].as_str().unwrap().to_owned(), message["offset"].as_u64().unwrap());
        if message["recovered"] == true {
            assert_eq!(self.seen.positions[&stream], position, "{message}");
            assert_eq!(message.get("state"), None);
        } else {
            assert!(message["state"].is_object(), "{message}");
            self.seen.numbers.remove(&stream);
            self.seen.positions.insert(stream.clone(), position);
        }
        self.live.insert(stream);
    }

    fn event(&mut self, message: &Value) {
        let stream = if message["stream"] == "*" { "*" } else { message["project_id"].as_str().unwrap() };
        if !self.live.contains(stream) {
            assert_eq!(stream, "*", "a project's event before its confirmation: {message}");
            return;
        }
        let (number, offset) = (message["number"].as_u64().unwrap(), message["offset"].as_u64().unwrap());
        if let Some(last) = self.seen.numbers.insert(stream.to_owned(), number) {
            assert_eq!(number, last + 1, "{message}");
        }
        let (_, at) = self.seen.positions.get_mut(stream).unwrap();
        if stream == "q" {
            assert_eq!(message["type"], "kept.event");
            assert!(offset > *at, "{message}");
        } else {
            assert_eq!(offset, *at + 1, "{message}");
        }
        *at = offset;
    }
}

#[tokio::test]
async fn after_a_cut_what_was_missed_comes_once_and_then_what_is_new() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let mut follower = Follower::start(&service).await;
    let id = follower.id();
    for _ in 0..5 {
        follower.until_round(publisher.round() + 10).await;
        let (seen, token) = follower.cut();
        let round = publisher.more(20).await;
        follower = Follower::again(&service, &seen).await;
        follower.resume_all(&token, &id).await;
        follower.until_round(round + 10).await;
    }
    assert!((service.metric("tidings_connections_resumed_total").await - 5.0).abs() < 0.5);
    let last = publisher.stop().await;
    follower.until_round(last).await;
    follower.client.nothing_waits().await;
}

#[tokio::test]
async fn a_connection_that_still_looks_alive_is_taken_over_and_closed() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let mut former = Follower::start(&service).await;
    former.until_round(publisher.more(5).await).await;
    let (seen, token, id) = (former.seen.clone(), former.token(), former.id());
    let mut follower = Follower::again(&service, &seen).await;
    follower.resume_all(&token, &id).await;
    assert_eq!(former.client.close_code().await, 4510);
    follower.until_round(publisher.more(10).await).await;
    until("one connection being left", || async { service.health().await["active_connections"] == 1 }).await;
    // The end of the former one took nothing away: its client is resumed by the new token.
    let (seen, token) = follower.cut();
    let mut follower = Follower::again(&service, &seen).await;
    follower.resume_all(&token, &id).await;
    let last = publisher.stop().await;
    follower.until_round(last).await;
}

#[tokio::test]
async fn of_two_that_show_the_same_token_one_resumes_and_the_other_loses_nothing_either() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let mut former = Follower::start(&service).await;
    for _ in 0..10 {
        former.until_round(publisher.more(2).await).await;
        let (seen, token) = former.cut();
        let streams = &["p", "q", "*"];
        let mut one = Follower::again(&service, &seen).await;
        let mut two = Follower::again(&service, &seen).await;
        let (first, second) = tokio::join!(one.resume(&token, streams), two.resume(&token, streams));
        let types = [&first["type"], &second["type"]];
        assert!(
            types.contains(&&json!("connection.resumed")) && types.contains(&&json!("error")),
            "{types:?}"
        );
        let (mut winner, mut loser) = if first["type"] == "error" { (two, one) } else { (one, two) };
        for stream in ["p", "q", "*"] {
            assert_eq!(loser.subscribe(stream).await["recovered"], true);
        }
        let round = publisher.more(3).await;
        // In which order its streams are confirmed is not said.
        while winner.live.len() < 3 {
            winner.next().await;
        }
        winner.until_round(round).await;
        loser.until_round(round).await;
        // The loser's own token is as good as any.
        former = loser;
    }
    publisher.stop().await;
}

#[tokio::test]
async fn a_token_dies_with_a_clean_close() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let mut follower = Follower::start(&service).await;
    follower.until_round(publisher.more(2).await).await;
    let (seen, token) = (follower.seen.clone(), follower.token());
    let normal = Message::Close(Some(CloseFrame { code: 1000.into(), reason: "done".into() }));
    follower.client.send(normal).await;
    assert_eq!(follower.client.close_code().await, 1000);
    let mut follower = Follower::again(&service, &seen).await;
    assert_eq!(follower.resume(&token, &["p", "q", "*"]).await["code"], "resume_expired");
    assert_eq!(follower.subscribe("p").await["recovered"], true);
    follower.until_round(publisher.stop().await).await;
}

#[tokio::test]
async fn a_close_that_is_not_clean_leaves_the_token_good() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let publisher = Publisher::start(&service);
    for code in [1001_u16, 1002, 4000] {
        let mut follower = Follower::start(&service).await;
        let (seen, token, id) = (follower.seen.clone(), follower.token(), follower.id());
        let close = Message::Close(Some(CloseFrame { code: code.into(), reason: "".into() }));
        follower.client.send(close).await;
        assert_eq!(follower.client.close_code().await, code);
        Follower::again(&service, &seen).await.resume_all(&token, &id).await;
    }
    publisher.stop().await;
}

#[tokio::test]
async fn a_token_is_good_once_and_each_new_one_stands_for_the_same_client() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let mut follower = Follower::start(&service).await;
    let id = follower.id();
    let mut spent = Vec::new();
    for _ in 0..3 {
        follower.until_round(publisher.more(3).await).await;
        let (seen, token) = follower.cut();
        follower = Follower::again(&service, &seen).await;
        follower.resume_all(&token, &id).await;
        spent.push(token);
        for token in &spent {
            let mut late = Follower::again(&service, &seen).await;
            assert_eq!(late.resume(token, &[]).await["code"], "resume_expired");
        }
    }
    // None of those who came late disturbed it.
    follower.until_round(publisher.stop().await).await;
}

#[tokio::test]
async fn resume_is_refused_when_it_is_not_the_first_message() {
    let service = Arc::new(Service::start());
    let former = Follower::start(&service).await;
    let (seen, token, id) = (former.seen.clone(), former.token(), former.id());
    for first in [r#"{"type":"ping"}"#, "rubbish", r#"{"type":"resume","token":"x"}"#] {
        let mut late = Client::connect(&service).await;
        late.send_text(first).await;
        late.next().await;
        let refused = late.ask(&json!({"type": "resume", "id": 7, "token": token})).await;
        assert_eq!(
            (&refused["type"], &refused["code"], &refused["id"]),
            (&json!("error"), &json!("invalid_message"), &json!(7)),
            "{refused}"
        );
    }
    Follower::again(&service, &seen).await.resume_all(&token, &id).await;
}

#[tokio::test]
async fn rubbish_for_a_token_is_answered_and_the_connection_lives_on() {
    let service = Service::start();
    for (fields, code) in [
        (json!({"token": ""}), "resume_expired"),
        (json!({"token": "x"}), "resume_expired"),
        (json!({"token": "0".repeat(32)}), "resume_expired"),
        (json!({"token": "é".repeat(16)}), "resume_expired"),
        (json!({"token": "f".repeat(60_000)}), "resume_expired"),
        (json!({"token": "x", "positions": {"p": {"epoch": "e", "offset": 3}}}), "resume_expired"),
        (json!({}), "invalid_message"),
        (json!({"token": 7}), "invalid_message"),
        (json!({"token": null}), "invalid_message"),
        (json!({"token": "x", "positions": []}), "invalid_message"),
        (json!({"token": "x", "positions": {"p": 3}}), "invalid_message"),
        (json!({"token": "x", "positions": {"p": {"epoch": "e", "offset": -1}}}), "invalid_message"),
        (json!({"token": "x", "positions": {"../p": {"epoch": "e", "offset": 1}}}), "invalid_message"),
    ] {
        let mut client = Client::connect(&service).await;
        let mut message = fields.clone();
        message["type"] = json!("resume");
        let error = client.ask(&message).await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{error}");
        let confirmed = client.ask(&json!({"type": "subscribe", "project_id": "p"})).await;
        assert_eq!(confirmed["type"], "subscription.confirmed");
    }
    // A connection cannot resume itself.
    let mut client = Client::connect(&service).await;
    let token = client.established["resume_token"].clone();
    let error = client.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(error["code"], "resume_expired");
    service.publish(&json!({"type": "news.flash"})).await;
    assert_eq!(client.next().await["type"], "news.flash");
}

#[tokio::test]
async fn a_project_without_a_position_comes_back_with_its_state() {
    let service = Arc::new(Service::with(&[ROOMY]));
    let mut publisher = Publisher::start(&service);
    let started = json!({"type": "task.started", "project_id": "p", "task_id": "t", "task_name": "n"});
    let follower = Follower::start(&service).await;
    let id = follower.id();
    let (seen, token) = follower.cut();
    service.publish(&started).await;
    publisher.more(5).await;
    let mut follower = Follower::again(&service, &seen).await;
    let resumed = follower.resume(&token, &["q"]).await;
    assert_eq!((&resumed["type"], &resumed["client_id"]), (&json!("connection.resumed"), &id));
    let mut recovered = BTreeMap::new();
    while recovered.len() < 2 {
        let confirmed = follower.until(|message| message["type"] == "subscription.confirmed").await;
        let project = confirmed["project_id"].as_str().unwrap().to_owned();
        if project == "p" {
            assert_eq!(confirmed["state"]["tasks"][0]["task_id"], "t", "{confirmed}");
        }
        recovered.insert(project, confirmed["recovered"].clone());
    }
    assert_eq!((&recovered["p"], &recovered["q"]), (&json!(null), &json!(true)));
    follower.until_round(publisher.more(2).await).await;
    publisher.stop().await;
    assert!(!follower.live.contains("*"), "announcements are replayed to those who say where they stood");
}

#[tokio::test]
async fn a_position_that_never_was_comes_back_with_the_state() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    service.publish(&json!({"type": "a.b", "project_id": "p"})).await;
    client.next().await;
    let token = client.established["resume_token"].clone();
    let positions = json!({"p": {"epoch": "gone", "offset": 1}, "never": {"epoch": "e", "offset": 1}});
    let mut client = Client::connect(&service).await;
    let resumed = client.ask(&json!({"type": "resume", "token": token, "positions": positions})).await;
    assert_eq!((&resumed["type"], &resumed["subscriptions"]), (&json!("connection.resumed"), &json!(["p"])));
    let confirmed = client.next().await;
    assert_eq!((&confirmed["recovered"], &confirmed["offset"]), (&json!(false), &json!(1)));
    assert!(confirmed["state"].is_object());
    client.nothing_waits().await;
}

#[tokio::test]
async fn what_was_unsubscribed_does_not_come_back() {
    let service = Service::start();
    let mut client = Client::subscribed(&service, "p").await;
    client.ask(&json!({"type": "subscribe", "project_id": "q", "types": ["a.*"]})).await;
    // The second one to the same project is the one that counts.
    client.ask(&json!({"type": "subscribe", "project_id": "q", "types": ["b.*"]})).await;
    client.ask(&json!({"type": "unsubscribe", "project_id": "p"})).await;
    let token = client.established["resume_token"].clone();
    drop(client);
    let mut client = Client::connect(&service).await;
    let resumed = client.ask(&json!({"type": "resume", "token": token})).await;
    assert_eq!(resumed["subscriptions"], json!(["q"]));
    assert_eq!(client.next().await["project_id"], "q");
    service.publish(&json!([{"type": "a.b", "project_id": "q"}, {"type": "b.b", "project_id": "q"}])).await;
    assert_eq!(client.next().await["type"], "b.b");
}

#[tokio::test]
async fn many_subscriptions_come_back_each_with_what_it_missed() {
    const PROJECTS: usize = 300;
    let service = Service::start();
    let mut client = Client::connect(&service).await;
    let mut positions = serde_json::Map::new();
    for number in 0..PROJECTS {
        let project = format!("p{number}");
        let confirmed = client.ask(&json!({"type": "subscribe", "project_id": project})).await;
        positions.insert(project, json!({"epoch": confirmed["epoch"], "offset": confirmed["offset"]}));
    }
    let token = client.established["resume_token"].clone();
    drop(client);
    let missed: Vec<_> =
        (0..PROJECTS).map(|number| json!({"type": "a.b", "project_id": format!("p{number}")})).collect();
    service.publish(&json!(missed)).await;
    let mut client = Client::connect(&service).await;
    client.send_text(&json!({"type": "resume", "token": token, "positions": positions}).to_string()).await;
    client.send_text(r#"{"type":"ping","id":"behind"}"#).await;
    let (mut confirmed, mut events, mut ponged) = (BTreeSet::new(), BTreeSet::new(), false);
    assert_eq!(client.next().await["type"], "connection.resumed");
    while events.len() < PROJECTS || !ponged {
        let message = client.next_event().await;
        let project = message["project_id"].as_str().unwrap_or_default().to_owned();
        match message["type"].as_str().unwrap() {
            "subscription.confirmed" => {
                assert_eq!(message["recovered"], true);
                assert!(confirmed.insert(project));
            }
            "a.b" => {
                assert_eq!(message["offset"], 1);
                assert!(confirmed.contains(&project) && events.insert(project));
            }
            "pong" => ponged = true,
            other => panic!("{other}"),
        }
    }
    client.nothing_waits().await;
}

#[tokio::test]
async fn a_lost_connection_cannot_be_resumed_after_its_time_and_a_living_one_can() {
    let service =
        Arc::new(Service::with(&[ROOMY, ("WS_CONNECTION_TIMEOUT", "1"), ("WS_HEARTBEAT_INTERVAL", "1")]));
    let mut publisher = Publisher::start(&service);
    let living = Follower::start(&service).await;
    let follower = Follower::start(&service).await;
    let (seen, token) = follower.cut();
    until("the former one ending", || async { service.health().await["active_connections"] == 1 }).await;
    // Time passes in heartbeats of a second each.
    let mut clock = Client::connect(&service).await;
    let mut beats = 0;
    while beats < 5 {
        beats += usize::from(clock.next().await["type"] == "system.heartbeat");
    }
    let mut follower = Follower::again(&service, &seen).await;
    assert_eq!(follower.resume(&token, &["p", "q", "*"]).await["code"], "resume_expired");
    for stream in ["p", "q", "*"] {
        assert_eq!(follower.subscribe(stream).await["recovered"], true);
    }
    follower.until_round(publisher.more(3).await).await;
    // For one that is not lost no time runs.
    let (token, id, seen) = (living.token(), living.id(), living.seen.clone());
    let mut taker = Follower::again(&service, &seen).await;
    taker.resume_all(&token, &id).await;
    taker.until_round(publisher.stop().await).await;
}

#[tokio::test]
async fn what_the_former_socket_still_asks_for_does_not_take_the_connection_back() {
    for shards in ["1", "2"] {
        let service = Service::with(&[("TIDINGS_SHARDS", shards)]);
        for _ in 0..30 {
            let mut former = Raw::over(TcpStream::connect(service.address).await.unwrap(), "", b"").await;
            let established = former.next().await;
            let subscribe = |project: usize| {
                let message = json!({"type": "subscribe", "project_id": format!("p{project}")});
                frame(0x81, message.to_string().as_bytes())
            };
            let mut new = Raw::over(TcpStream::connect(service.address).await.unwrap(), "", b"").await;
            let own = new.next().await;
            let message = json!({"type": "resume", "token": established["resume_token"]});
            let resume = frame(0x81, message.to_string().as_bytes());
            let many: Vec<u8> = (0..40).flat_map(subscribe).collect();
            tokio::join!(former.send(&many), new.send(&resume));
            let resumed = new.next().await;
            assert_eq!(
                (&resumed["type"], &resumed["client_id"]),
                (&json!("connection.resumed"), &established["client_id"])
            );
            while former.next_or_end().await.is_ok() {}
            drop(new);
            let mut last = Client::connect(&service).await;
            let resumed = last.ask(&json!({"type": "resume", "token": own["resume_token"]})).await;
            assert_eq!(
                (&resumed["type"], &resumed["client_id"]),
                (&json!("connection.resumed"), &established["client_id"])
            );
        }
    }
}

#[tokio::test]
async fn what_follows_a_resume_that_comes_with_the_handshake_is_read_too() {
    let service = Service::with(&[("WS_HEARTBEAT_INTERVAL", "3600")]);
    let former = Client::subscribed(&service, "p").await;
    let messages = [
        json!({"type": "resume", "token": former.established["resume_token"]}),
        json!({"type": "subscribe", "project_id": "q"}),
        json!({"type": "ping"}),
    ];
    let behind: Vec<u8> =
        messages.iter().flat_map(|message| frame(0x81, message.to_string().as_bytes())).collect();
    let socket = TcpStream::connect(service.address).await.unwrap();
    let mut client = Raw::over(socket, "", &behind).await;
    let mut types = BTreeSet::new();
    // The greeting, the resume, two confirmations, and the pong. The protocol's pings are not answered: an answer would
    // make the service look again.
    while types.len() < 5 {
        if let (0x81, text) = client.frame().await.unwrap() {
            let message: Value = serde_json::from_slice(&text).unwrap();
            types.insert(format!("{} {}", message["type"], message["project_id"]));
        }
    }
    assert_eq!(former.close_code().await, 4510);
}
