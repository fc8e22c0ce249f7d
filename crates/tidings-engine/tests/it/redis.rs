//! The Redis engine: the contract, on a Redis of the test's own, and what becomes of it when Redis is not what it was.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{Arc, Weak},
    time::Duration,
};

use serde_json::json;
use tidings_engine::{
    engine::{
        CatchUp, Deliver, Engine, HistoryLimits,
        embedded::system_clock,
        redis::{Incarnation, NodeName, RedisAddress, RedisEngine, RedisOptions, Servers},
    },
    vigil::Vigil,
};
use tidings_protocol::TypeFilter;

use crate::{
    contract::{self, Deliveries, Fixture},
    event, stream,
};

/// A Redis on a free port, in memory only, ended by its own process id.
struct Redis {
    process: Option<Child>,
    port: u16,
}

impl Redis {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut redis = Self { process: None, port };
        redis.start_again();
        redis
    }

    fn start_again(&mut self) {
        let port = self.port.to_string();
        let process = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: `cargo xtask test` does it");
        self.process = Some(process);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    async fn engine(&self) -> (RedisEngine, Arc<Deliveries>) {
        let address = RedisAddress::parse(&format!("redis://127.0.0.1:{}", self.port)).unwrap();
        let servers = Arc::new(Servers::find(address).await.unwrap());
        let deliveries = Arc::new(Deliveries::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&deliveries) as Arc<dyn Deliver>));
        let incarnation = Incarnation::random();
        let options = RedisOptions {
            history: HistoryLimits { events: 10, age: Duration::from_hours(1), bytes: 1 << 20 },
            connection_timeout: Duration::from_hours(1),
            check_interval: Duration::from_secs(1),
            name: NodeName::take(&servers, "node", &incarnation).await.unwrap(),
            incarnation,
            adopts_orphans: false,
        };
        let vigil = Arc::new(Vigil::new(deliver.clone()));
        let engine = RedisEngine::start(servers, options, system_clock(), deliver, vigil).await.unwrap();
        (engine, deliveries)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn on_redis() -> Fixture {
    let redis = Redis::start();
    let (engine, deliveries) = redis.engine().await;
    for project in ["p", "q"] {
        engine.follow(&stream(project));
        // Once it is read, it is subscribed to.
        engine.position(&stream(project)).await.unwrap();
    }
    Fixture { engine: Box::new(engine), deliveries, keeps: Box::new(redis) }
}

contract::contract_tests!(on_redis);

mod when_nobody_follows {
    use super::{Fixture, Redis};

    /// Answers come from Redis itself then; only what is delivered is missing.
    async fn unfollowed() -> Fixture {
        let redis = Redis::start();
        let (engine, deliveries) = redis.engine().await;
        Fixture { engine: Box::new(engine), deliveries, keeps: Box::new(redis) }
    }

    crate::contract::contract_tests! { unfollowed:
        what_has_ended_does_not_push_what_runs_out_of_the_state,
        a_reader_gets_everything_since_its_position,
        a_position_that_this_stream_never_had_is_not_recovered,
        a_flood_of_progress_pushes_out_no_durable_event,
        what_is_not_kept_is_never_passed_off_as_all,
        the_state_is_the_fold_of_the_stream,
        a_large_state_is_cut_and_says_so,
    }
}
