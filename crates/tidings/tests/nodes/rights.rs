//! Who may, on many nodes: sessions that end, rights that shrink and users that are revoked, while nodes and Redis are paused,
//! killed and restarted. Whoever loses something gets nothing of it that was published after the contract's time, and whatever
//! came before is whole; everybody else misses nothing.

mod cast;
mod ending;

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::{
    join,
    time::{sleep, timeout},
};

use self::{
    cast::{Cast, Group, Knock, Sessions, knock, signed},
    ending::{Expected, last_sent_ms, lost_at, stays},
};
use crate::{
    http,
    node::Node,
    process::{DEADLINE, until},
    proxy::{Network, Proxy},
    publish::HttpPublisher,
    record::{Heard, project_id},
    redis_server::{RedisServer, VOLATILE},
    sentinel_set::SentinelSet,
    stage::{Load, Stage, alone, report},
};

const SECOND: Duration = Duration::from_secs(1);
/// A session that ended, or rights that shrank, take effect within this (the contract, section 6).
const EFFECTIVE_MS: u64 = 5000;
/// What is revoked ends at once.
const AT_ONCE_MS: u64 = 2000;
/// A busy machine does everything later.
const MARGIN_MS: u64 = 3000;
/// Nobody may say what a session may when it was last asked about so long ago.
const KNOWN_MS: u64 = 5000;
/// The test's clock and a node's notice of a fault are not of one moment.
const KNOWN_MARGIN_MS: u64 = 1000;

/// How often sessions end and shrink, each time at another moment for the nodes.
const PHASES: usize = 4;

/// Small: several stages run side by side, and what is shown is who gets what and not how many.
fn load(projects: u16) -> Load {
    Load { clients: 0, projects, events_per_second: 60 }
}

/// Three nodes that know these ways, with the sessions in a Redis of their own.
async fn nodes(redis_url: &str, sessions_url: &str, ways: &str, more: &[(&str, &str)]) -> Vec<Node> {
    let settings = [
        ("TIDINGS_AUTH", ways),
        ("TIDINGS_SESSION_REDIS_URL", sessions_url),
        ("TIDINGS_SESSION_SECRET", cast::SECRET),
    ];
    Node::many(3, redis_url, &[&settings[..], more].concat()).await
}

async fn revoke(node: SocketAddr, whom: Value) {
    let answer =
        http::post(node, "/api/revoke", "Content-Type: application/json\r\n", &whom.to_string()).await;
    assert_eq!(answer.unwrap().status, 204, "{whom}");
}

/// Knocks until there is a verdict: a node that has just started does not know yet what is revoked.
async fn verdict(node: SocketAddr, cookie: &str) -> Knock {
    let knocking = async {
        loop {
            match knock(node, &[("cookie", cookie)]).await {
                Knock::Refused(1013) => sleep(SECOND / 20).await,
                knock => return knock,
            }
        }
    };
    timeout(DEADLINE, knocking).await.expect("a verdict")
}

/// The first answers of a node may be from before it has heard.
async fn refused_by_all(nodes: &[SocketAddr], cookie: &str) {
    for &node in nodes {
        until("a session that was revoked being refused", || async {
            matches!(knock(node, &[("cookie", cookie)]).await, Knock::Refused(4401))
        })
        .await;
    }
}

#[test]
fn sessions_that_end_and_rights_that_shrink_take_effect_on_all_nodes() {
    alone(async {
        join!(
            revocations_outlive_a_node_of_its_own(),
            whoever_is_closed_does_not_slip_in_again(),
            ended_shrunk_and_revoked()
        );
    });
}

/// Everybody whom the next scenario knows.
struct Company {
    undisturbed: Group,
    logged_out: [Group; PHASES],
    shrunk: [Group; PHASES],
    revoked_users: [Group; 2],
    revoked_session: Group,
    /// Those that are revoked while their node stands still.
    asleep: Group,
}

struct Cookies {
    carol: String,
    eve: String,
    frank: String,
}

impl Cookies {
    fn new() -> Self {
        let of = |user: &str| signed(&json!({"user_id": user, "projects": "*"}));
        Self { carol: of("carol"), eve: of("eve"), frank: of("frank") }
    }
}

async fn company(cast: &mut Cast, sessions: &Sessions, cookies: &Cookies) -> Company {
    let all = json!("*");
    for (id, user) in [
        ("u0", "uma"),
        ("u1", "ulf"),
        ("c0", "carol"),
        ("f0", "frank"),
        ("g0", "gus"),
        ("g1", "eve-of-the-other"),
    ] {
        sessions.put(id, user, &all).await;
    }
    for number in 0..PHASES {
        sessions.put(&format!("a{number}"), "ada", &all).await;
        sessions.put(&format!("b{number}"), "bob", &json!(["p0", "p1"])).await;
    }
    let signed_visitor = signed(&json!({"user_id": "vera", "projects": ["p*"]}));
    Company {
        undisturbed: cast.groups(&[
            ("session=u0", &[0, 1, 2]),
            ("session=u1", &[0, 3]),
            ("session=u1", &[1]),
            (&signed_visitor, &[2, 3]),
        ]),
        logged_out: [0, 1, 2, 3].map(|number| cast.groups(&[(&format!("session=a{number}"), &[0, 1])])),
        shrunk: [0, 1, 2, 3].map(|number| cast.groups(&[(&format!("session=b{number}"), &[1, 0])])),
        revoked_users: [cast.groups(&[("session=c0", &[0, 2])]), cast.groups(&[(&cookies.carol, &[1, 3])])],
        revoked_session: cast.groups(&[(&cookies.eve, &[0, 2])]),
        asleep: cast.patient_groups(&[("session=f0", &[0, 1]), (&cookies.frank, &[0, 2])]),
    }
}

async fn ended_shrunk_and_revoked() {
    let (redis, sessions) = join!(RedisServer::started(VOLATILE), Sessions::started());
    let (mut cast, cookies) = (Cast::default(), Cookies::new());
    let company = company(&mut cast, &sessions, &cookies).await;
    let (url, ways) = (redis.url(), "redis-session,signed-cookie,ticket");
    let nodes = nodes(&url, &sessions.url(), ways, &[]).await;
    let mut stage = Stage::playing(nodes, load(4), cast.roles).await;
    stage.publish();
    stays(&stage, &stage.fleet.caught_up(0, DEADLINE).await);
    let addresses = stage.addresses.to_vec();

    let started_ms = stage.clock.now_ms();
    join!(
        logout_and_shrink(&stage, &sessions, &company),
        revoke_on_one_node(&stage, &company, &cookies),
        a_ticket_lets_in_one_of_two(&addresses),
        only_the_owner_resumes(&addresses),
    );
    let nobody_else = &company.undisturbed;
    for client in nobody_else.iter() {
        let told = stage.fleet.members[client].since(started_ms);
        let ends =
            told.iter().find(|record| matches!(record.heard, Heard::Closed { .. } | Heard::Removed { .. }));
        assert!(ends.is_none(), "client {client} had nothing to do with it: {ends:?}");
    }
    refused_by_all(&addresses, "session=a0").await;

    revoked_while_a_node_sleeps(&stage, &company.asleep, &cookies).await;

    stage.nodes[2].kill();
    stage.nodes[2].start().await;
    let more = [
        ("TIDINGS_AUTH", ways),
        ("TIDINGS_SESSION_REDIS_URL", &sessions.url()),
        ("TIDINGS_SESSION_SECRET", cast::SECRET),
    ];
    let fourth =
        Node::started("node-3", &[&[("TIDINGS_ENGINE", "redis"), ("REDIS_URL", &url)], &more[..]].concat())
            .await;
    for node in [addresses[0], addresses[1], addresses[2], fourth.address] {
        for cookie in [&cookies.carol, &cookies.eve, &cookies.frank, "session=c0", "session=f0"] {
            assert_eq!(verdict(node, cookie).await, Knock::Refused(4401), "{cookie} at {node}");
        }
        assert!(matches!(verdict(node, "session=u0").await, Knock::In(..)), "undisturbed at {node}");
        // Who logs in again is somebody new.
        let again = signed(&json!({"user_id": "carol", "projects": "*", "again": true}));
        assert!(matches!(verdict(node, &again).await, Knock::In(..)), "logged in again at {node}");
    }
    let ended = company.logged_out.iter().chain(&company.revoked_users);
    let ended = ended.chain([&company.revoked_session, &company.asleep]).flat_map(Group::iter).collect();
    let shrunk = company.shrunk.iter().flat_map(Group::iter).collect();
    let expected = Expected { ended, shrunk, gaps: 0 };
    ending::conclude(stage, "sessions ended, shrunk and revoked on three nodes", &expected).await;
    drop(fourth);
}

/// One after the other, so that they meet the nodes between two looks at the store, and shortly before and behind one.
async fn logout_and_shrink(stage: &Stage, sessions: &Sessions, company: &Company) {
    let mut changed_ms = Vec::new();
    for number in 0..PHASES {
        changed_ms.push(stage.clock.now_ms());
        sessions.remove(&format!("a{number}")).await;
        sessions.put(&format!("b{number}"), "bob", &json!(["p1", "p2"])).await;
        sleep(SECOND * 3 / 5).await;
    }
    for (what, groups) in [("logout", &company.logged_out), ("rights shrink", &company.shrunk)] {
        let (mut newest, mut last) = (0, 0);
        for (group, changed_ms) in groups.iter().zip(&changed_ms) {
            group.lost(stage, 0, what).await;
            // What was on its way has come by then, if it comes.
            sleep(SECOND / 2).await;
            for client in group.iter() {
                let sent = last_sent_ms(stage, client, 0).unwrap_or_default();
                newest = sent.saturating_sub(*changed_ms).max(newest);
                let told_at = stage.fleet.members[client].lost(0).unwrap_or_default();
                last = told_at.saturating_sub(*changed_ms).max(last);
            }
        }
        report(format_args!(
            "{what}, {PHASES} times on three nodes: the newest event that still came was published {newest} ms after it \
             (at most {EFFECTIVE_MS}); the last was told after {last} ms",
        ));
        assert!(newest <= EFFECTIVE_MS + KNOWN_MARGIN_MS, "{what}: an event of {newest} ms later came");
        assert!(last <= EFFECTIVE_MS + MARGIN_MS, "{what}: told after {last} ms");
    }
    for group in &company.logged_out {
        group.closed_by(stage, "the end of a session").await;
    }
}

async fn revoke_on_one_node(stage: &Stage, company: &Company, cookies: &Cookies) {
    let revoked_ms = stage.clock.now_ms();
    revoke(stage.addresses[0], json!({"user_id": "carol"})).await;
    revoke(stage.addresses[2], json!({"session": cookies.eve.strip_prefix("session=")})).await;
    let groups = company.revoked_users.iter().chain([&company.revoked_session]);
    let mut last = 0;
    for group in groups {
        group.closed_by(stage, "a revocation").await;
        last = group
            .iter()
            .filter_map(|client| stage.fleet.members[client].closed())
            .map(|(at, _)| at)
            .fold(last, u64::max);
    }
    let last = last.saturating_sub(revoked_ms);
    report(format_args!(
        "revoked on one node: the last connection on all three was closed with 4401 after {last} ms"
    ));
    assert!(last <= AT_ONCE_MS + MARGIN_MS, "at once is not {last} ms");
    for &node in &*stage.addresses {
        for cookie in [&cookies.carol, &cookies.eve, "session=c0"] {
            assert_eq!(knock(node, &[("cookie", cookie)]).await, Knock::Refused(4401), "{cookie} at {node}");
        }
    }
}

/// Two nodes are asked at the same time with the same ticket, again and again.
async fn a_ticket_lets_in_one_of_two(nodes: &[SocketAddr]) {
    const TICKETS: usize = 200;
    let round = |index: usize| async move {
        let at = |shift: usize| nodes[(index + shift) % nodes.len()];
        let given = http::post(at(0), "/api/tickets", "Cookie: session=g0\r\n", "").await.unwrap();
        assert_eq!(given.status, 201, "{given:?}");
        let ticket = format!("tidings.v1, tidings.ticket.{}", given.json()["ticket"].as_str().unwrap());
        let headers = [("sec-websocket-protocol", ticket.as_str())];
        let knocks = join!(knock(at(1), &headers), knock(at(2), &headers));
        match knocks {
            (Knock::In(..), Knock::Refused(4401)) => 0,
            (Knock::Refused(4401), Knock::In(..)) => 1,
            both => panic!("ticket {index} came to {both:?}"),
        }
    };
    let winners: Vec<usize> = stream::iter(0..TICKETS).map(round).buffer_unordered(8).collect().await;
    let second = winners.iter().sum::<usize>();
    report(format_args!(
        "{TICKETS} tickets at two nodes at once: each let in one, {} times the first, {second} the second",
        TICKETS - second
    ));
}

async fn only_the_owner_resumes(nodes: &[SocketAddr]) {
    for round in 0..nodes.len() {
        let node = |shift: usize| nodes[(round + shift) % nodes.len()];
        let mut owner = knock(node(0), &[("cookie", "session=g0")]).await.into_visitor();
        let confirmed = owner.ask(&json!({"type": "subscribe", "project_id": "p3"})).await;
        assert_eq!(confirmed["type"], "subscription.confirmed", "{confirmed}");
        let token = owner.token.clone();
        drop(owner);
        let resume = json!({"type": "resume", "token": token});
        let mut thief = knock(node(1), &[("cookie", "session=g1")]).await.into_visitor();
        let refused = thief.ask(&resume).await;
        assert_eq!(
            (&refused["type"], &refused["code"]),
            (&json!("error"), &json!("resume_expired")),
            "{refused}"
        );
        assert!(!thief.gets_events_for(SECOND / 2).await, "what the other followed came");
        let mut owner = knock(node(2), &[("cookie", "session=g0")]).await.into_visitor();
        let resumed = owner.ask(&resume).await;
        assert_eq!(
            (&resumed["type"], &resumed["subscriptions"]),
            (&json!("connection.resumed"), &json!(["p3"])),
            "{resumed}"
        );
    }
}

/// A node stands still for longer than what it knows is good, and a user is revoked meanwhile. What was published then waits for
/// its clients when it wakes up, before it can have heard.
async fn revoked_while_a_node_sleeps(stage: &Stage, asleep: &Group, cookies: &Cookies) {
    let paused_ms = stage.clock.now_ms();
    stage.nodes[1].pause();
    let living = [stage.addresses[0], stage.addresses[2]];
    let mut publisher = HttpPublisher::new(50, living.into(), stage.clock, stage.book.clone());
    sleep(SECOND).await;
    let revoked_ms = stage.clock.now_ms();
    revoke(living[0], json!({"user_id": "frank"})).await;
    while stage.clock.now_ms() < paused_ms + 7000 {
        publisher.publish([0, 1].into_iter()).await;
        sleep(SECOND / 10).await;
    }
    let woken_ms = stage.clock.now_ms();
    stage.nodes[1].go_on();
    asleep.closed_by(stage, "a revocation that a node slept through").await;
    refused_by_all(&stage.addresses, &cookies.frank).await;
    let on_the_node: Vec<_> = asleep.iter().filter(|client| client % 3 == 1).collect();
    let newest =
        on_the_node.iter().flat_map(|&client| [0, 1, 2].map(|project| last_sent_ms(stage, client, project)));
    let newest = newest.flatten().max().unwrap_or_default();
    let ends =
        on_the_node.iter().filter_map(|&client| stage.fleet.members[client].closed()).map(|(at, _)| at);
    report(format_args!(
        "revoked while a node was paused for 7 s: closed with 4401 {} ms after it woke up; the newest event that came was \
         published {} ms before the revocation",
        ends.max().unwrap_or_default().saturating_sub(woken_ms),
        revoked_ms.saturating_sub(newest)
    ));
    assert!(newest <= revoked_ms, "an event of {} ms after the revocation came", newest - revoked_ms);
}

/// One node with streams and revocations in its data folder.
async fn revocations_outlive_a_node_of_its_own() {
    let settings = [
        ("TIDINGS_ENGINE", "embedded"),
        ("TIDINGS_AUTH", "signed-cookie"),
        ("TIDINGS_SESSION_SECRET", cast::SECRET),
    ];
    let mut node = Node::started("single", &settings).await;
    let of = |user: &str, number: u32| signed(&json!({"user_id": user, "projects": "*", "number": number}));
    let (by_session, by_user, other) = (of("ada", 1), of("bob", 1), of("ada", 2));
    revoke(node.address, json!({"session": by_session.strip_prefix("session=")})).await;
    revoke(node.address, json!({"user_id": "bob"})).await;
    for _ in 0..2 {
        for cookie in [&by_session, &by_user] {
            assert_eq!(knock(node.address, &[("cookie", cookie)]).await, Knock::Refused(4401));
        }
        assert!(matches!(knock(node.address, &[("cookie", &other)]).await, Knock::In(..)));
        node.kill();
        node.start().await;
    }
}

/// A stored session is still there when its user is revoked, and what ends it for good takes its time to be saved.
async fn whoever_is_closed_does_not_slip_in_again() {
    let (redis, sessions) = join!(RedisServer::started(VOLATILE), Sessions::started());
    let proxy = Proxy::before(redis.port()).await;
    sessions.put("s", "ada", &json!("*")).await;
    let settings = [
        ("TIDINGS_ENGINE", "redis"),
        ("REDIS_URL", &proxy.url()),
        ("TIDINGS_AUTH", "redis-session"),
        ("TIDINGS_SESSION_REDIS_URL", &sessions.url()),
    ];
    let node = Node::started("far", &settings).await;
    let cookie = [("cookie", "session=s")];
    let mut visitor = knock(node.address, &cookie).await.into_visitor();
    proxy.set(Network::Passes(SECOND / 5));
    revoke(node.address, json!({"user_id": "ada"})).await;
    assert_eq!(visitor.close_code().await, 4401);
    assert_eq!(knock(node.address, &cookie).await, Knock::Refused(4401));
}

#[test]
fn a_store_of_sessions_that_fails_is_no_verdict_and_one_that_is_empty_a_no() {
    alone(async {
        join!(stopped_and_restarted_empty(), slow_then_rubbish_then_streams_paused());
    });
}

/// Sessions `s0`, `s1` and `s2`, with two clients each on each node; the last project is only followed by the last of them.
async fn audience(sessions: &Sessions, cast: &mut Cast, projects: u16) -> (Group, Group) {
    for (id, user) in [("s0", "sue"), ("s1", "sam"), ("s2", "sid")] {
        sessions.put(id, user, &json!("*")).await;
    }
    let everybody = cast.groups(&[("session=s0", &[0, 1]), ("session=s1", &[1, 2]), ("session=s0", &[2, 0])]);
    (everybody, cast.groups(&[("session=s2", &[projects - 1])]))
}

/// Waits until `until_ms`, while nobody is let in and nobody is thrown out; holds when nothing came that was published too late
/// after what happened at `from_ms`.
async fn without_a_verdict(stage: &Stage, what: &str, from_ms: u64, until_ms: u64) {
    let node = stage.addresses[1];
    assert_eq!(knock(node, &[("cookie", "session=s0")]).await, Knock::Refused(1013), "{what}");
    let plain = http::get_all(node, "/api/projects/p0/events", "Cookie: session=s0\r\n").await.unwrap();
    assert_eq!(plain.status, 503, "{what}: {plain:?}");
    sleep(Duration::from_millis(until_ms.saturating_sub(stage.clock.now_ms()))).await;
    let mut newest = 0;
    for (client, member) in stage.fleet.members.iter().enumerate() {
        let records = member.since(from_ms);
        let ends = records
            .iter()
            .find(|record| matches!(record.heard, Heard::Closed { .. } | Heard::Removed { .. }));
        assert!(ends.is_none(), "{what}: client {client} was thrown out: {ends:?}");
        newest = member
            .projects
            .iter()
            .filter_map(|&project| last_sent_ms(stage, client, project))
            .fold(newest, u64::max);
    }
    let newest = newest.saturating_sub(from_ms);
    report(format_args!(
        "{what}: the newest event that came was published {newest} ms after it (at most {KNOWN_MS})"
    ));
    assert!(newest <= KNOWN_MS + KNOWN_MARGIN_MS, "{what}: an event of {newest} ms later came");
}

async fn everybody_goes_on(stage: &Stage, what: &str) {
    let recovery = stage.recovery().await;
    stays(stage, &recovery.stuck);
    report(format_args!(
        "{what}: over, and everybody received again after {} ms",
        recovery.took_ms.unwrap_or_default()
    ));
}

/// Nothing has happened to anybody's connection.
fn nobody_was_closed(stage: &Stage) {
    for (client, member) in stage.fleet.members.iter().enumerate() {
        assert_eq!(member.closed(), None, "client {client}");
    }
}

async fn stopped_and_restarted_empty() {
    const PROJECTS: u16 = 5;
    /// More than the others get in the whole time of the fault, and less than one gets of all.
    const HISTORY: usize = 200;
    let (redis, mut sessions) = join!(RedisServer::started(VOLATILE), Sessions::started());
    let mut cast = Cast::default();
    let (everybody, deep) = audience(&sessions, &mut cast, PROJECTS).await;
    // No heartbeat comes to the help of anybody who was forgotten.
    let settings = [("TIDINGS_HISTORY_EVENTS", "200"), ("WS_HEARTBEAT_INTERVAL", "30")];
    let nodes = nodes(&redis.url(), &sessions.url(), "redis-session", &settings).await;
    let mut stage = Stage::playing(nodes, load(PROJECTS), cast.roles).await;
    stage.publish();
    stays(&stage, &stage.fleet.caught_up(0, DEADLINE).await);
    sleep(SECOND).await;

    // Follows what nobody publishes in but once, while the store stands still: nothing later brings that along.
    let mut quiet = knock(stage.addresses[2], &[("cookie", "session=s1")]).await.into_visitor();
    let quiet_project = PROJECTS;
    quiet.ask(&json!({"type": "subscribe", "project_id": project_id(quiet_project)})).await;

    let stopped_ms = stage.clock.now_ms();
    sessions.redis.pause();
    let mut publisher = HttpPublisher::new(60, stage.addresses.clone(), stage.clock, stage.book.clone());
    let flood = async {
        sleep(6 * SECOND).await;
        for _ in 0..4 {
            publisher.publish(std::iter::repeat_n(PROJECTS - 1, HISTORY / 2)).await;
        }
        publisher.publish(std::iter::once(quiet_project)).await;
    };
    let (.., came) = join!(
        flood,
        without_a_verdict(&stage, "session store stopped", stopped_ms, stopped_ms + 9000),
        quiet.gets_events_for(9 * SECOND)
    );
    assert!(!came, "an event of 6 s later came");
    sessions.redis.go_on();
    assert!(quiet.gets_events_for(15 * SECOND).await, "what had waited did not come by itself");
    everybody_goes_on(&stage, "session store stopped").await;
    nobody_was_closed(&stage);

    let killed_ms = stage.clock.now_ms();
    sessions.redis.kill();
    without_a_verdict(&stage, "session store killed", killed_ms, killed_ms + 7000).await;
    let restarted_ms = stage.clock.now_ms();
    sessions.redis.start().await;
    let all: Vec<_> = everybody.iter().chain(deep.iter()).collect();
    everybody.closed_by(&stage, "an empty store").await;
    deep.closed_by(&stage, "an empty store").await;
    let last = all.iter().filter_map(|&client| stage.fleet.members[client].closed()).map(|(at, _)| at).max();
    let last = last.unwrap_or_default().saturating_sub(restarted_ms);
    report(format_args!(
        "session store restarted empty: all {} were closed with 4401 after {last} ms",
        all.len()
    ));
    assert!(last <= EFFECTIVE_MS + MARGIN_MS, "{last} ms");
    for client in deep.iter() {
        let records = stage.fleet.members[client].since(0);
        let told = records.iter().find_map(|record| match record.heard {
            Heard::Confirmed { recovered: Some(false), has_state, .. } => Some(has_state),
            _ => None,
        });
        assert_eq!(told, Some(true), "client {client} missed more than there is, and has a state for it");
    }
    let gaps = deep.iter().count();
    let expected = Expected { ended: all.into_iter().collect(), shrunk: [].into(), gaps };
    ending::conclude(stage, "session store stopped, killed, restarted empty", &expected).await;
}

async fn slow_then_rubbish_then_streams_paused() {
    const PROJECTS: u16 = 4;
    let (redis, sessions) = join!(RedisServer::started(VOLATILE), Sessions::started());
    let proxy = Proxy::before(sessions.redis.port()).await;
    let mut cast = Cast::default();
    audience(&sessions, &mut cast, PROJECTS).await;
    sessions.put("l0", "lou", &json!("*")).await;
    let logged_out = cast.groups(&[("session=l0", &[0, 3])]);
    let nodes = nodes(&redis.url(), &proxy.url(), "redis-session", &[]).await;
    let mut stage = Stage::playing(nodes, load(PROJECTS), cast.roles).await;
    stage.publish();
    stays(&stage, &stage.fleet.caught_up(0, DEADLINE).await);

    // Slow is not gone: everything goes on, also the next who comes.
    proxy.set(Network::Passes(Duration::from_millis(300)));
    sleep(4 * SECOND).await;
    assert!(
        matches!(knock(stage.addresses[0], &[("cookie", "session=s0")]).await, Knock::In(..)),
        "a slow store"
    );
    everybody_goes_on(&stage, "session store 600 ms away").await;
    proxy.set(Network::Passes(Duration::ZERO));
    sleep(2 * SECOND).await;

    let rubbish_ms = stage.clock.now_ms();
    sessions.put_raw("s0", b"{not json").await;
    sessions.put_raw("s1", b"\x80\x04\x95pickle").await;
    sessions.put_raw("s2", br#"{"user_id": {}, "projects": 7}"#).await;
    sessions.put_hash("l0").await;
    without_a_verdict(&stage, "sessions overwritten with rubbish", rubbish_ms, rubbish_ms + 8000).await;
    for (id, user) in [("s0", "sue"), ("s1", "sam"), ("s2", "sid"), ("l0", "lou")] {
        sessions.put(id, user, &json!("*")).await;
    }
    everybody_goes_on(&stage, "sessions overwritten with rubbish").await;
    nobody_was_closed(&stage);

    let paused_ms = stage.clock.now_ms();
    redis.pause();
    sessions.remove("l0").await;
    sleep(7 * SECOND).await;
    logged_out.closed_by(&stage, "a logout while the streams' Redis stood still").await;
    redis.go_on();
    let last =
        logged_out.iter().filter_map(|client| stage.fleet.members[client].closed()).map(|(at, _)| at).max();
    let last = last.unwrap_or_default().saturating_sub(paused_ms);
    report(format_args!("logout while the Redis of the streams is paused: told after {last} ms"));
    assert!(last <= EFFECTIVE_MS + MARGIN_MS, "{last} ms");
    stage.fleet.send_away(logged_out.iter());
    everybody_goes_on(&stage, "the Redis of the streams paused for 7 s").await;
    let expected = Expected { ended: logged_out.iter().collect(), shrunk: [].into(), gaps: 0 };
    ending::conclude(stage, "slow sessions, rubbish, streams paused", &expected).await;
}

#[test]
fn rights_are_followed_while_the_streams_move_to_another_redis() {
    alone(async {
        let (mut set, sessions) = join!(SentinelSet::started(), Sessions::started());
        let mut cast = Cast::default();
        audience(&sessions, &mut cast, 4).await;
        sessions.put("l0", "lou", &json!("*")).await;
        sessions.put("b0", "bob", &json!("*")).await;
        let logged_out = cast.groups(&[("session=l0", &[0, 3])]);
        let shrunk = cast.groups(&[("session=b0", &[0, 1])]);
        let nodes = nodes(&set.url(), &sessions.url(), "redis-session", &[]).await;
        let mut stage = Stage::playing(nodes, load(4), cast.roles).await;
        stage.publish();
        stays(&stage, &stage.fleet.caught_up(0, DEADLINE).await);
        sleep(SECOND).await;
        let changed_ms = stage.clock.now_ms();
        set.fail_primary();
        sessions.remove("l0").await;
        sessions.put("b0", "bob", &json!(["p1"])).await;
        set.failed_over().await;
        logged_out.closed_by(&stage, "a logout during a failover").await;
        shrunk.lost(&stage, 0, "rights shrinking during a failover").await;
        let both = logged_out.iter().chain(shrunk.iter());
        let last = both.filter_map(|client| lost_at(&stage, client, 0)).max();
        let last = last.unwrap_or_default().saturating_sub(changed_ms);
        report(format_args!("logout and rights shrink during a failover: told after {last} ms"));
        assert!(last <= EFFECTIVE_MS + MARGIN_MS, "{last} ms");
        stage.reader = "Cookie: session=s0\r\n".to_owned();
        let expected =
            Expected { ended: logged_out.iter().collect(), shrunk: shrunk.iter().collect(), gaps: 0 };
        ending::conclude_after_loss(stage, "rights during a Sentinel failover", &expected).await;
    });
}
