//! Publishers that number what they send, and know what was taken.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    fleet::Clock,
    http,
    process::DEADLINE,
    record::{Acknowledged, Epoch, Number, Numbered, Place, Project, Publisher},
};

/// Tasks that publish over HTTP.
const PUBLISHERS: u16 = 4;
/// How many events each request has, in turn; all of different projects.
const BATCHES: [u16; 4] = [1, 1, 1, 5];
/// The pause after a refusal.
const PAUSE: Duration = Duration::from_millis(100);
/// The publisher of the last event of each project.
const FENCE: Publisher = Publisher::MAX;

/// What was taken, and the next number of everybody.
#[derive(Debug, Default)]
pub(crate) struct Book {
    acknowledged: Mutex<Vec<Acknowledged>>,
    last: Mutex<HashMap<(Project, Publisher), u32>>,
    sent: Mutex<HashMap<(Project, Number), u64>>,
}

impl Book {
    /// The next event of a publisher in a project.
    pub(crate) fn next(&self, project: Project, publisher: Publisher, copies: u32) -> Numbered {
        let mut last = self.last.lock();
        let n = last.entry((project, publisher)).or_default();
        *n += 1;
        Numbered { project, number: Number { publisher, n: *n }, copies }
    }

    /// When an event was first sent; what follows from its publication came later.
    pub(crate) fn sent_ms(&self, event: Numbered) -> Option<u64> {
        self.sent.lock().get(&(event.project, event.number)).copied()
    }

    pub(crate) fn acknowledge(&self, event: Numbered, place: Option<Place>) {
        self.acknowledged.lock().push(Acknowledged { event, place });
    }

    pub(crate) fn acknowledged(&self) -> Vec<Acknowledged> {
        self.acknowledged.lock().clone()
    }
}

/// Publishes over HTTP at whatever node answers, each request with a key of its own until it is acknowledged.
pub(crate) struct HttpPublisher {
    publisher: Publisher,
    requests: usize,
    nodes: Arc<[SocketAddr]>,
    clock: Clock,
    book: Arc<Book>,
    padding: usize,
}

impl HttpPublisher {
    pub(crate) fn new(publisher: Publisher, nodes: Arc<[SocketAddr]>, clock: Clock, book: Arc<Book>) -> Self {
        Self { publisher, requests: 0, nodes, clock, book, padding: 0 }
    }

    /// Makes each event larger by so many bytes.
    pub(crate) fn padded(self, padding: usize) -> Self {
        Self { padding, ..self }
    }

    /// Publishes the next event of each of these projects in one request.
    pub(crate) async fn publish(&mut self, projects: impl Iterator<Item = Project>) {
        let events: Vec<_> = projects.map(|project| self.book.next(project, self.publisher, 1)).collect();
        let sent_ms = self.clock.now_ms();
        let sent = events.iter().map(|event| ((event.project, event.number), sent_ms));
        self.book.sent.lock().extend(sent);
        let body: Vec<_> = events.iter().map(|event| event.json(sent_ms, self.padding)).collect();
        self.requests += 1;
        let answer = self.until_acknowledged(&Value::Array(body).to_string()).await;
        let places = answer["events"].as_array().expect("a place for each event");
        assert_eq!(places.len(), events.len(), "{answer}");
        for (event, place) in events.into_iter().zip(places) {
            let epoch: Epoch = place["epoch"].as_str().expect("an epoch").into();
            let offset = place["offset"].as_u64().expect("an offset");
            self.book.acknowledge(event, Some(Place { epoch, offset }));
        }
    }

    async fn until_acknowledged(&self, body: &str) -> Value {
        let headers = format!("Idempotency-Key: {}-{}\r\n", self.publisher, self.requests);
        let started = Instant::now();
        let mut last = String::new();
        for attempt in self.requests.. {
            assert!(started.elapsed() < DEADLINE, "nobody took an event; the last answer: {last}");
            let node = self.nodes[attempt % self.nodes.len()];
            last = match http::post(node, "/api/events", &headers, body).await {
                Ok(answer) if answer.status == 202 => return answer.json(),
                // An overloaded or cut-off node says so with 503. Anything else is our mistake or the service's.
                Ok(answer) if answer.status != 503 => panic!("an event was refused: {answer:?}"),
                answer => format!("{answer:?}"),
            };
            sleep(PAUSE).await;
        }
        unreachable!("attempts do not end")
    }
}

/// The publishers that run for the whole of a test.
pub(crate) struct Publishers {
    stop: CancellationToken,
    running: Vec<JoinHandle<()>>,
}

impl Publishers {
    /// Starts them; together they publish about so many events per second, to all projects in turn.
    pub(crate) fn started(
        projects: u16,
        events_per_second: u64,
        nodes: &Arc<[SocketAddr]>,
        clock: Clock,
        book: &Arc<Book>,
    ) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let per_request = u64::from(BATCHES.iter().sum::<u16>()) * 1000 / BATCHES.len() as u64;
        let period = Duration::from_millis(per_request * u64::from(PUBLISHERS) / events_per_second.max(1));
        let running = (0..PUBLISHERS).map(|publisher| {
            let http = HttpPublisher::new(publisher, Arc::clone(nodes), clock, Arc::clone(book));
            tasks.spawn(publish_until(stop.clone(), http, period, projects))
        });
        Self { running: running.collect(), stop }
    }

    /// Stops them, when what they are at is acknowledged.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        for running in self.running {
            running.await.expect("a publisher that goes on until it is stopped");
        }
    }
}

async fn publish_until(stop: CancellationToken, mut http: HttpPublisher, period: Duration, projects: u16) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut project = http.publisher * projects / PUBLISHERS;
    for batch in BATCHES.into_iter().cycle() {
        ticks.tick().await;
        if stop.is_cancelled() {
            return;
        }
        let batch = batch.min(projects);
        http.publish((project..project + batch).map(|project| project % projects)).await;
        project = (project + batch) % projects;
    }
}

/// Publishes one last event in each project, when nobody else does any more: who has it has had all before it.
pub(crate) async fn fence(projects: u16, nodes: &Arc<[SocketAddr]>, clock: Clock, book: &Arc<Book>) {
    let mut http = HttpPublisher::new(FENCE, Arc::clone(nodes), clock, Arc::clone(book));
    http.publish(0..projects).await;
}
