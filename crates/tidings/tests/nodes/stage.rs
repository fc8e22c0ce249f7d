//! What every scenario has: nodes under load, clients that watch, and the verdict at the end.

use std::{io::Write as _, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::{
    checker::{Kept, Verdict, check},
    fleet::{Clock, Fleet, Role},
    http,
    node::{HEARTBEAT_SECONDS, Node},
    process::{DEADLINE, until},
    publish::{Book, Publishers, fence},
    record::{Number, Project, Witness, project_id},
    scale,
};

/// Runs one test alone: each of them takes all that a small machine has.
pub(crate) fn alone(test: impl Future<Output = ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test);
}

/// Tells a measured figure, past the capture of what passing tests print: figures are for the reader, never for a verdict.
#[allow(clippy::explicit_write, reason = "`eprintln!` is captured")]
pub(crate) fn report(text: std::fmt::Arguments<'_>) {
    writeln!(std::io::stderr(), "report: {text}").unwrap();
}

/// Whether the store itself loses data in a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// It keeps everything: nobody may be told of a gap.
    Keeps,
    /// It loses the newest: whoever had it, or could have, is told.
    Forgets,
}

/// How much is going on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) clients: usize,
    pub(crate) projects: u16,
    pub(crate) events_per_second: u64,
}

impl Load {
    pub(crate) fn usual() -> Self {
        Self {
            clients: scale::clients(),
            projects: scale::projects(),
            events_per_second: scale::events_per_second(),
        }
    }

    /// What each client follows: one to three projects, so that all have about as many followers.
    pub(crate) fn follow(self) -> Vec<Vec<Project>> {
        let project =
            |index: usize| Project::try_from(index % usize::from(self.projects)).expect("a project");
        let distinct = |client: usize| (1 + client % 3).min(usize::from(self.projects));
        (0..self.clients).map(|client| (client..client + distinct(client)).map(project).collect()).collect()
    }
}

/// Nodes, clients and publishers.
pub(crate) struct Stage {
    pub(crate) clock: Clock,
    pub(crate) nodes: Vec<Node>,
    pub(crate) addresses: Arc<[SocketAddr]>,
    pub(crate) fleet: Fleet,
    pub(crate) book: Arc<Book>,
    pub(crate) load: Load,
    /// With what streams are read at the end: a header with its line's end, or nothing.
    pub(crate) reader: String,
    publishers: Option<Publishers>,
}

/// What a scenario came to.
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) witnesses: Vec<Witness>,
    /// Kept until the test has looked at the rest: if it fails, their logs tell why.
    pub(crate) _nodes: Vec<Node>,
}

impl Outcome {
    /// Holds when nobody's connection ended, and everybody was told of this many outages and of the end of each.
    pub(crate) fn assert_told(&self, outages: std::ops::RangeInclusive<usize>) {
        for (client, witness) in self.witnesses.iter().enumerate() {
            let told = witness.told_since(0);
            let in_pairs = told.chunks(2).all(|pair| {
                pair.len() == 2 && pair[0] == "degraded" && pair[1].starts_with("recovered, gap ")
            });
            assert!(in_pairs && outages.contains(&(told.len() / 2)), "client {client} was told {told:?}");
        }
    }
}

impl Stage {
    /// Sets clients before these nodes, and then has events published, until every client has some.
    pub(crate) async fn set(nodes: Vec<Node>, load: Load) -> Self {
        let mut stage = Self::quiet(nodes, load).await;
        stage.publish();
        let behind = stage.fleet.caught_up(0, DEADLINE).await;
        assert!(behind.is_empty(), "clients without an event before any fault: {behind:?}");
        stage
    }

    /// Sets clients before these nodes; what is published is the test's own affair.
    pub(crate) async fn quiet(nodes: Vec<Node>, load: Load) -> Self {
        Self::following(nodes, load, load.follow()).await
    }

    /// The same with clients that follow these projects.
    pub(crate) async fn following(nodes: Vec<Node>, load: Load, follow: Vec<Vec<Project>>) -> Self {
        let role = |projects| Role { projects, ..Role::default() };
        Self::playing(nodes, load, follow.into_iter().map(role).collect()).await
    }

    /// The same with clients that have these roles.
    pub(crate) async fn playing(nodes: Vec<Node>, load: Load, roles: Vec<Role>) -> Self {
        let clock = Clock::started();
        let addresses: Arc<[_]> = nodes.iter().map(|node| node.address).collect();
        let fleet = Fleet::started(clock, &addresses, roles).await;
        let (book, reader) = (Arc::default(), String::new());
        Self { clock, nodes, addresses, fleet, book, load, reader, publishers: None }
    }

    /// Has events published from now on.
    pub(crate) fn publish(&mut self) {
        let Load { projects, events_per_second, .. } = self.load;
        let publishers =
            Publishers::started(projects, events_per_second, &self.addresses, self.clock, &self.book);
        self.publishers = Some(publishers);
    }

    /// Waits until all clients receive again what is published from now on; how long that took.
    pub(crate) async fn recovery(&self) -> Recovery {
        let over_ms = self.clock.now_ms();
        let stuck = self.fleet.caught_up(over_ms, DEADLINE).await;
        Recovery { took_ms: Some(self.clock.now_ms() - over_ms), stuck }
    }

    /// Ends a scenario whose fault is over at this moment: waits for the recovery, for everything that is on its way, judges and
    /// reports.
    pub(crate) async fn finish(self, row: &str, store: Store) -> Outcome {
        let recovery = self.recovery().await;
        self.conclude(row, store, recovery).await
    }

    /// The same for a scenario that had its recovery, or has no fault.
    pub(crate) async fn conclude(mut self, row: &str, store: Store, mut recovery: Recovery) -> Outcome {
        let stuck = self.come_to_rest().await;
        if recovery.stuck.is_empty() {
            recovery.stuck = stuck;
        }
        let kept = self.kept().await;
        let witnesses = self.fleet.ended().await;
        let verdict = check(&witnesses, &self.book.acknowledged(), Some(&kept));
        tell(row, &witnesses, &verdict, &recovery);
        judge(&witnesses, &verdict, &recovery, store);
        Outcome { verdict, witnesses, _nodes: self.nodes }
    }

    /// Has nothing published any more, and waits until everything is where it belongs; clients to whom it did not come.
    pub(crate) async fn come_to_rest(&mut self) -> Vec<usize> {
        if let Some(publishers) = self.publishers.take() {
            publishers.stop().await;
        }
        let last_ms = self.clock.now_ms();
        fence(self.load.projects, &self.addresses, self.clock, &self.book).await;
        let stuck = self.fleet.caught_up(last_ms, DEADLINE).await;
        self.settled().await;
        // What comes behind the last event would be one too many.
        self.fleet.heartbeat(Duration::from_secs(2 * HEARTBEAT_SECONDS)).await;
        stuck
    }

    /// Waits until no node that lives has anything to complain of, and has said so: a source has recovered when it is heard for a
    /// moment.
    async fn settled(&self) {
        for &address in &*self.addresses {
            let settled = || async {
                // One that is dead has nothing to complain of.
                http::get(address, "/readyz").await.map_or(true, |answer| answer.status == 200)
            };
            until("a node being ready again", settled).await;
        }
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }

    /// What the streams have, read as anybody can.
    pub(crate) async fn kept(&self) -> Kept {
        let mut kept = Kept::new();
        for project in 0..self.load.projects {
            let (mut since, mut last_page) = (String::new(), false);
            while !last_page {
                let path = format!("/api/projects/{}/events?limit=1000{since}", project_id(project));
                let page = http::get_all(self.addresses[0], &path, &self.reader)
                    .await
                    .expect("the first node lives at the end")
                    .json();
                let events = page["events"].as_array().unwrap_or_else(|| panic!("no history: {page}"));
                let number = |event: &serde_json::Value| {
                    let publisher = event["publisher"].as_u64()?.try_into().ok()?;
                    Some(Number { publisher, n: event["n"].as_u64()?.try_into().ok()? })
                };
                kept.extend(events.iter().filter_map(number).map(|number| (project, number)));
                last_page = events.len() < 1000;
                let (epoch, offset) =
                    (page["epoch"].as_str().unwrap_or_default(), events.last().map(|e| &e["offset"]));
                since = format!("&since_epoch={epoch}&since_offset={}", offset.unwrap_or(&page["offset"]));
            }
        }
        kept
    }
}

/// How clients came back after a fault.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    /// Until all were receiving again; `None` where there was no fault.
    pub(crate) took_ms: Option<u64>,
    /// Those that did not.
    pub(crate) stuck: Vec<usize>,
}

fn tell(row: &str, witnesses: &[Witness], verdict: &Verdict, recovery: &Recovery) {
    let Verdict { acknowledged, deliveries, lost, duplicated, out_of_order, told_gaps, taken_back, .. } =
        verdict;
    let took = recovery.took_ms.map_or("-".to_owned(), |took| format!("{took} ms"));
    report(format_args!(
        "{row} | clients {} | acknowledged {acknowledged} | deliveries {deliveries} | lost {lost} | \
         duplicated {duplicated} | out of order {out_of_order} | told gaps {told_gaps} | taken back {taken_back} | \
         recovery {took}",
        witnesses.len()
    ));
}

fn judge(witnesses: &[Witness], verdict: &Verdict, recovery: &Recovery, store: Store) {
    assert!(verdict.is_clean(), "{verdict:#?}");
    if let Some(&first) = recovery.stuck.first() {
        let records = &witnesses[first].records;
        let last = &records[records.len().saturating_sub(25)..];
        let projects = &witnesses[first].projects;
        panic!("stuck: {:?}; client {first} follows {projects:?} and heard last {last:#?}", recovery.stuck);
    }
    if store == Store::Keeps {
        assert_eq!(
            (verdict.told_gaps, verdict.taken_back),
            (0, 0),
            "nothing was lost, so there is no gap to tell"
        );
    }
    assert!(verdict.deliveries > 0, "a scenario without deliveries shows nothing");
}
