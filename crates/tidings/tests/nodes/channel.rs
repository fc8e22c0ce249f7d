//! The plain channel, heard by many nodes, written into streams by one at a time.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    fleet::Clock,
    node::Node,
    process::DEADLINE,
    publish::Book,
    record::Publisher,
    redis_server::{RedisServer, VOLATILE},
    stage::{Load, Stage, Store, alone, report},
};

const PUBLISHER: Publisher = 200;
/// Every so many messages one is published twice, byte for byte the same.
const TWICE_EVERY: usize = 5;
/// The longest that reading may stand still when the node that reads is gone.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// Publishes on the channel as existing code does: it looks at nothing but how many heard it.
struct ChannelPublisher {
    connection: redis::aio::MultiplexedConnection,
    clock: Clock,
    book: Arc<Book>,
    messages: usize,
}

impl ChannelPublisher {
    async fn publish(&mut self, project: u16) {
        self.messages += 1;
        let copies = if self.messages.is_multiple_of(TWICE_EVERY) { 2 } else { 1 };
        let event = self.book.next(project, PUBLISHER, copies);
        let message = event.json(self.clock.now_ms(), 0).to_string();
        let mut was_heard = true;
        for _ in 0..copies {
            let command = redis::cmd("PUBLISH").arg("websocket:broadcast").arg(&message).to_owned();
            was_heard &= command.query_async::<u64>(&mut self.connection).await.unwrap() > 0;
        }
        // What nobody hears is lost, and that is no fault.
        if was_heard {
            self.book.acknowledge(event, None);
        }
    }
}

/// Publishes until it is stopped; gives itself back, so that it can say a last word.
struct Publishing {
    stop: CancellationToken,
    running: JoinHandle<ChannelPublisher>,
}

impl Publishing {
    fn started(mut publisher: ChannelPublisher, projects: u16) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let running = TaskTracker::new().spawn(async move {
            let mut ticks = interval(Duration::from_millis(15));
            for project in (0..projects).cycle() {
                ticks.tick().await;
                if stopped.is_cancelled() {
                    break;
                }
                publisher.publish(project).await;
            }
            publisher
        });
        Self { stop, running }
    }

    async fn stop(self) -> ChannelPublisher {
        self.stop.cancel();
        self.running.await.unwrap()
    }
}

fn load() -> Load {
    let usual = Load::usual();
    Load { clients: usual.clients / 3, projects: usual.projects / 2, ..usual }
}

#[test]
fn a_message_on_the_channel_comes_once_whichever_node_is_killed() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let mut stage = Stage::quiet(Node::many(3, &redis.url(), &[]).await, load()).await;
        let connection = redis.connection().await.unwrap();
        let publisher =
            ChannelPublisher { connection, clock: stage.clock, book: stage.book.clone(), messages: 0 };
        let publishing = Publishing::started(publisher, stage.load.projects);
        let mut longest = 0;
        for index in 0..3 {
            sleep(Duration::from_secs(1)).await;
            stage.nodes[index].kill();
            let recovery = stage.recovery().await;
            assert_eq!(recovery.stuck, [0; 0], "after the kill of node {index}");
            longest = recovery.took_ms.unwrap_or_default().max(longest);
            stage.nodes[index].start().await;
        }
        let recovery = stage.recovery().await;
        let mut publisher = publishing.stop().await;
        let last_ms = stage.clock.now_ms();
        for project in 0..stage.load.projects {
            publisher.publish(project).await;
        }
        let behind = stage.fleet.caught_up(last_ms, DEADLINE).await;
        assert_eq!(behind, [0; 0], "the last message of each project");
        stage.conclude("plain channel, each of three nodes killed", Store::Keeps, recovery).await;
        let longest = Duration::from_millis(longest);
        report(format_args!("the channel was taken over within {longest:?}"));
        assert!(longest < TAKE_OVER + Duration::from_secs(5), "far too long: {longest:?}");
    });
}
