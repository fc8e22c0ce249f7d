//! Clients with real WebSockets that behave as the contract asks: they come back, resume, keep their positions, and write down
//! everything they are told. They repair nothing: what comes twice is written down twice.

mod client;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::client::Client;
pub(crate) use self::client::{OUR_PROTOCOL, connect};
use crate::{
    process::within,
    record::{Heard, Project, Record, Witness},
};

/// The time of a test, in milliseconds from its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn started() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now_ms(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).expect("a test is shorter")
    }
}

/// What a client is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Role {
    pub(crate) projects: Vec<Project>,
    /// Whose it is; `None`: it shows nothing.
    pub(crate) cookie: Option<String>,
    /// It stays where it is however long it hears nothing.
    pub(crate) is_patient: bool,
}

/// What one client writes down, shared with the test.
pub(crate) struct Notes {
    clock: Clock,
    pub(crate) projects: Vec<Project>,
    records: Mutex<Vec<Record>>,
    /// For each of its projects, when the newest event that it has was published, plus one; 0 before the first.
    newest: Vec<AtomicU64>,
    confirmed: Vec<AtomicU64>,
    heartbeats: AtomicU64,
}

impl Notes {
    fn new(clock: Clock, projects: Vec<Project>) -> Self {
        let zeroes = || projects.iter().map(|_| AtomicU64::new(0)).collect();
        let (newest, confirmed) = (zeroes(), zeroes());
        Self { clock, projects, records: Mutex::default(), newest, confirmed, heartbeats: AtomicU64::new(0) }
    }

    fn write(&self, heard: Heard) {
        match heard {
            Heard::Confirmed { project, .. } => {
                self.value(&self.confirmed, project).map(|count| count.fetch_add(1, Ordering::Relaxed));
            }
            // Nothing of it is waited for.
            Heard::Removed { project, .. } => self.saw(project, u64::MAX - 1),
            _ => {}
        }
        self.records.lock().push(Record { at_ms: self.clock.now_ms(), heard });
    }

    /// The value of one of its projects.
    fn value<'a>(&self, values: &'a [AtomicU64], project: Project) -> Option<&'a AtomicU64> {
        Some(&values[self.projects.iter().position(|&own| own == project)?])
    }

    fn saw(&self, project: Project, sent_ms: u64) {
        if let Some(newest) = self.value(&self.newest, project) {
            newest.fetch_max(sent_ms + 1, Ordering::Relaxed);
        }
    }

    fn is_confirmed(&self) -> bool {
        self.confirmed.iter().all(|count| count.load(Ordering::Relaxed) > 0)
    }

    /// Whether it has, of each of its projects, an event that was published at `since_ms` or later.
    fn has_since(&self, since_ms: u64) -> bool {
        self.newest.iter().all(|newest| newest.load(Ordering::Relaxed) > since_ms)
    }

    /// What was written down since `since_ms`.
    pub(crate) fn since(&self, since_ms: u64) -> Vec<Record> {
        self.records.lock().iter().filter(|record| record.at_ms >= since_ms).cloned().collect()
    }

    /// When it was closed, and with what code, if it has not come back.
    pub(crate) fn closed(&self) -> Option<(u64, u16)> {
        self.records.lock().iter().rev().find_map(|record| match record.heard {
            Heard::Closed { code, .. } => Some(Some((record.at_ms, code))),
            Heard::Connected { .. } => Some(None),
            _ => None,
        })?
    }

    /// When it was told that it has lost a project.
    pub(crate) fn lost(&self, of: Project) -> Option<u64> {
        let records = self.records.lock();
        let is_lost = |heard: &Heard| matches!(heard, Heard::Removed { project, .. } if *project == of);
        records.iter().find(|record| is_lost(&record.heard)).map(|record| record.at_ms)
    }

    /// The node that it is connected to, if it is.
    pub(crate) fn node(&self) -> Option<Arc<str>> {
        let records = self.records.lock();
        let ends = |heard: &Heard| matches!(heard, Heard::Closed { .. } | Heard::Left);
        let last = records
            .iter()
            .rfind(|record| matches!(record.heard, Heard::Connected { .. }) || ends(&record.heard));
        match &last?.heard {
            Heard::Connected { node } => Some(Arc::clone(node)),
            _ => None,
        }
    }
}

/// All clients.
pub(crate) struct Fleet {
    pub(crate) members: Vec<Arc<Notes>>,
    away: Vec<watch::Sender<bool>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Fleet {
    /// Starts a client for each role, at the nodes in turn, and waits until all are subscribed.
    pub(crate) async fn started(clock: Clock, nodes: &Arc<[SocketAddr]>, roles: Vec<Role>) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (mut members, mut away) = (Vec::new(), Vec::new());
        for (index, role) in roles.into_iter().enumerate() {
            let member = Arc::new(Notes::new(clock, role.projects.clone()));
            let is_away = watch::Sender::new(false);
            let client =
                Client::new(index, role, Arc::clone(nodes), Arc::clone(&member), is_away.subscribe());
            tasks.spawn(stop.clone().run_until_cancelled_owned(client.run()));
            members.push(member);
            away.push(is_away);
        }
        let fleet = Self { members, away, stop, tasks };
        let all = || std::future::ready(fleet.members.iter().all(|member| member.is_confirmed()));
        assert!(within(crate::process::DEADLINE, all).await, "not all clients could subscribe");
        fleet
    }

    /// Cuts these clients off, and keeps them away until they are called back.
    pub(crate) fn send_away(&self, clients: impl Iterator<Item = usize>) {
        for client in clients {
            self.away[client].send_replace(true);
        }
    }

    pub(crate) fn call_back(&self) {
        for away in &self.away {
            away.send_replace(false);
        }
    }

    /// Waits until every client that is not away has, of each of its projects, an event that was published at `since_ms` or
    /// later. Those that have not in time.
    pub(crate) async fn caught_up(&self, since_ms: u64, limit: Duration) -> Vec<usize> {
        let behind = || {
            let members = self.present().filter(|(_, member)| !member.has_since(since_ms));
            members.map(|(index, _)| index).collect::<Vec<_>>()
        };
        within(limit, || std::future::ready(behind().is_empty())).await;
        behind()
    }

    /// Those that are not kept away.
    fn present(&self) -> impl Iterator<Item = (usize, &Arc<Notes>)> {
        self.members.iter().enumerate().filter(|(index, _)| !*self.away[*index].borrow())
    }

    /// Waits until every client has had a heartbeat from now on: what should have come before has come, or never will.
    pub(crate) async fn heartbeat(&self, limit: Duration) -> bool {
        let counts = || self.present().map(|(_, member)| member.heartbeats.load(Ordering::Relaxed));
        let before: Vec<_> = counts().collect();
        within(limit, || std::future::ready(counts().zip(&before).all(|(now, &before)| now > before))).await
    }

    /// The clients that are connected to the node of this name.
    pub(crate) fn on_node(&self, name: &str) -> Vec<usize> {
        let members = self.members.iter().enumerate();
        members.filter(|(_, member)| member.node().as_deref() == Some(name)).map(|(index, _)| index).collect()
    }

    /// How many clients connected in the second in which most did, since `since_ms`.
    pub(crate) fn connects_per_second_max(&self, since_ms: u64) -> usize {
        let connects =
            |record: &Record| matches!(record.heard, Heard::Connected { .. }).then_some(record.at_ms);
        let mut times: Vec<_> = self
            .members
            .iter()
            .flat_map(|member| member.since(since_ms))
            .collect::<Vec<_>>()
            .iter()
            .filter_map(connects)
            .collect();
        times.sort_unstable();
        let within_a_second =
            |(index, start): (usize, &u64)| times.partition_point(|at| *at < start + 1000) - index;
        times.iter().enumerate().map(within_a_second).max().unwrap_or(0)
    }

    /// Ends all clients; what they wrote down.
    pub(crate) async fn ended(self) -> Vec<Witness> {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let witness = |notes: Arc<Notes>| Witness {
            projects: notes.projects.clone(),
            records: std::mem::take(&mut *notes.records.lock()),
        };
        self.members.into_iter().map(witness).collect()
    }
}
