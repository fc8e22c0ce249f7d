//! Who is there: the application's sessions, cookies that it has signed, and those who come with them.

use std::{net::SocketAddr, ops::Range};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use futures_util::{SinkExt as _, StreamExt as _};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use tokio::{
    net::TcpStream,
    time::{Duration, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message},
};

use crate::{
    fleet::{OUR_PROTOCOL, Role, connect},
    process::{DEADLINE, until},
    record::Project,
    redis_server::{RedisServer, VOLATILE},
    stage::Stage,
};

pub(super) const SECRET: &str = "a secret of the application's";

/// A cookie as Starlette signs it, of this moment.
pub(super) fn signed(session: &Value) -> String {
    let time = jiff::Timestamp::now().as_second().to_be_bytes();
    let time = &time[time.iter().take_while(|byte| **byte == 0).count()..];
    let signed = format!("{}.{}", STANDARD.encode(session.to_string()), URL_SAFE_NO_PAD.encode(time));
    let key = Sha1::new().chain_update(b"itsdangerous.Signersigner").chain_update(SECRET).finalize();
    let mut mac = Hmac::<Sha1>::new_from_slice(&key).unwrap();
    mac.update(signed.as_bytes());
    format!("session={signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

/// The application's sessions, in a Redis of their own.
pub(super) struct Sessions {
    pub(super) redis: RedisServer,
}

impl Sessions {
    pub(super) async fn started() -> Self {
        Self { redis: RedisServer::started(VOLATILE).await }
    }

    pub(super) fn url(&self) -> String {
        self.redis.url()
    }

    pub(super) async fn put(&self, id: &str, user: &str, projects: &Value) {
        self.put_raw(id, json!({"user_id": user, "projects": projects}).to_string().as_bytes()).await;
    }

    pub(super) async fn put_raw(&self, id: &str, value: &[u8]) {
        let mut connection = self.redis.connection().await.unwrap();
        redis::cmd("SET").arg(key(id)).arg(value).exec_async(&mut connection).await.unwrap();
    }

    /// Something that is no string at all.
    pub(super) async fn put_hash(&self, id: &str) {
        self.remove(id).await;
        self.redis.command::<()>(&["HSET", &key(id), "user_id", "u"]).await.unwrap();
    }

    pub(super) async fn remove(&self, id: &str) {
        assert_eq!(self.redis.command::<u64>(&["DEL", &key(id)]).await.unwrap(), 1, "{id} was there");
    }
}

fn key(id: &str) -> String {
    format!("session:{id}")
}

/// Clients to be.
#[derive(Default)]
pub(super) struct Cast {
    pub(super) roles: Vec<Role>,
}

/// Clients, in threes: each three have one on each of three nodes.
#[derive(Clone, Debug)]
pub(super) struct Group(Range<usize>);

impl Cast {
    /// For each cookie and its projects one client on each node.
    pub(super) fn groups(&mut self, of: &[(&str, &[Project])]) -> Group {
        self.add(of, false)
    }

    /// The same with clients that wait for a node which says nothing.
    pub(super) fn patient_groups(&mut self, of: &[(&str, &[Project])]) -> Group {
        self.add(of, true)
    }

    fn add(&mut self, of: &[(&str, &[Project])], is_patient: bool) -> Group {
        let start = self.roles.len();
        for (cookie, projects) in of {
            let role = Role { projects: projects.to_vec(), cookie: Some((*cookie).to_owned()), is_patient };
            self.roles.extend(std::iter::repeat_n(role, 3));
        }
        Group(start..self.roles.len())
    }
}

impl Group {
    pub(super) fn iter(&self) -> Range<usize> {
        self.0.clone()
    }

    /// Waits until all of them are closed with 4401.
    pub(super) async fn closed_by(&self, stage: &Stage, what: &str) {
        let members = &stage.fleet.members[self.iter()];
        until(what, || async { members.iter().all(|member| member.closed().is_some()) }).await;
        for (member, client) in members.iter().zip(self.iter()) {
            assert_eq!(member.closed().map(|(_, code)| code), Some(4401), "client {client}, by {what}");
        }
    }

    /// Waits until all of them were told that they have lost a project.
    pub(super) async fn lost(&self, stage: &Stage, project: Project, what: &str) {
        let members = &stage.fleet.members[self.iter()];
        until(what, || async { members.iter().all(|member| member.lost(project).is_some()) }).await;
    }
}

/// What becomes of somebody who comes.
#[derive(Debug)]
pub(super) enum Knock {
    /// He is let in.
    In(Box<Visitor>),
    /// He is sent away with this close code, or what it would be if he had asked for one.
    Refused(u16),
}

impl PartialEq for Knock {
    fn eq(&self, other: &Self) -> bool {
        matches!((self, other), (Self::Refused(one), Self::Refused(other)) if one == other)
    }
}

impl Knock {
    pub(super) fn into_visitor(self) -> Visitor {
        match self {
            Self::In(visitor) => *visitor,
            Self::Refused(code) => panic!("sent away with {code}"),
        }
    }
}

/// Comes to a node with these headers.
pub(super) async fn knock(node: SocketAddr, headers: &[(&'static str, &str)]) -> Knock {
    let offers = headers.iter().any(|(name, _)| *name == OUR_PROTOCOL.0);
    let own = if offers { &[][..] } else { &[OUR_PROTOCOL] };
    let answer = timeout(DEADLINE, connect(node, &[headers, own].concat())).await.expect("an answer");
    let mut socket = match answer {
        Ok(socket) => socket,
        // Many are sent away at once.
        Err(Error::Http(answer)) if answer.status() == 401 => return Knock::Refused(4401),
        Err(Error::Http(answer)) if answer.status() == 503 => return Knock::Refused(1013),
        Err(error) => panic!("{node}: {error}"),
    };
    match timeout(DEADLINE, socket.next()).await.expect("a first message") {
        Some(Ok(Message::Text(text))) => {
            let established: Value = serde_json::from_str(&text).unwrap();
            let token = established["resume_token"].as_str().expect("a token").to_owned();
            Knock::In(Box::new(Visitor { socket, token }))
        }
        Some(Ok(Message::Close(Some(frame)))) => Knock::Refused(frame.code.into()),
        other => panic!("{node}: {other:?}"),
    }
}

/// Somebody who was let in, and does what the test says.
#[derive(Debug)]
pub(super) struct Visitor {
    socket: WebSocketStream<TcpStream>,
    pub(super) token: String,
}

impl Visitor {
    /// Sends a message, and waits for what answers it.
    pub(super) async fn ask(&mut self, message: &Value) -> Value {
        let mut message = message.clone();
        message["id"] = "asked".into();
        self.socket.send(Message::text(message.to_string())).await.unwrap();
        let answer = timeout(DEADLINE, async {
            loop {
                let Some(Ok(heard)) = self.socket.next().await else { panic!("closed, asked for {message}") };
                let Message::Text(text) = heard else { continue };
                let answer: Value = serde_json::from_str(&text).unwrap();
                if answer["id"] == "asked" {
                    return answer;
                }
            }
        });
        answer.await.expect("an answer")
    }

    /// Waits for the end; its close code.
    pub(super) async fn close_code(&mut self) -> u16 {
        let close = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(Some(frame)))) => return frame.code.into(),
                    Some(Ok(_)) => {}
                    end => panic!("ended without a code: {end:?}"),
                }
            }
        };
        timeout(DEADLINE, close).await.expect("a close")
    }

    /// Whether an event comes in this time.
    pub(super) async fn gets_events_for(&mut self, time: Duration) -> bool {
        let event = async {
            while let Some(Ok(heard)) = self.socket.next().await {
                if matches!(&heard, Message::Text(text) if text.contains("test.numbered")) {
                    return true;
                }
            }
            false
        };
        timeout(time, event).await.unwrap_or(false)
    }
}
