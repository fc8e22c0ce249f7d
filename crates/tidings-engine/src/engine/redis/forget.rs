//! Letting go of what is too old in streams that nobody appends to: whoever appends or reads looks after all others.

use std::{sync::Arc, time::Duration};

use redis::cmd;
use tokio::time::{interval, sleep};

use super::{
    Shared,
    lease::Lease,
    servers::{Call, Fault},
};

/// How often it is looked for such streams.
const FORGET_INTERVAL: Duration = Duration::from_hours(1);
/// Keys that are looked at in one step, and the pause before the next: Redis has other things to do.
const SCAN_COUNT: usize = 500;
const SCAN_PAUSE: Duration = Duration::from_millis(20);
/// What runs shows in a stream's state for a day without a sign of life.
const STATE_AGE: Duration = Duration::from_hours(24);

/// Looks for such streams for as long as the node lives, if no other node does.
pub(super) async fn forget_for_ever(shared: Arc<Shared>) {
    let mut interval = interval(FORGET_INTERVAL);
    let mut lease = Lease::new("forget", shared.options.incarnation.clone());
    // Not in the rush of a start.
    interval.tick().await;
    loop {
        interval.tick().await;
        // It ends by itself, and two that look at the same time do no harm.
        if lease.hold(&shared.servers).await.unwrap_or(false) {
            match shared.forget_old().await {
                Ok(streams) => tracing::debug!(streams, "old events were let go of"),
                Err(fault) => tracing::warn!(%fault, "old events in Redis could not be let go of"),
            }
        }
    }
}

impl Shared {
    pub(super) async fn forget_old(&self) -> Result<usize, Fault> {
        let age = self.options.history.age.max(STATE_AGE).as_secs().to_string();
        let now = (self.now().as_millisecond() / 1000).to_string();
        let mut forgotten = 0;
        for primary in self.servers.primaries() {
            let mut cursor = "0".to_owned();
            loop {
                let mut scan = cmd("SCAN");
                scan.arg(&cursor)
                    .arg("MATCH")
                    .arg("tidings:{*}")
                    .arg("COUNT")
                    .arg(SCAN_COUNT)
                    .arg("TYPE")
                    .arg("hash");
                let answer = primary.send(&scan).await?;
                let (next, keys): (String, Vec<String>) = redis::from_redis_value(answer)?;
                for key in keys {
                    let call = Call::script(&key, &self.scripts.forget, &[&now, &age], true);
                    let answer = self.servers.call(&call).await?;
                    forgotten += usize::from(matches!(answer, redis::Value::Int(1)));
                }
                if next == "0" {
                    break;
                }
                cursor = next;
                sleep(SCAN_PAUSE).await;
            }
        }
        Ok(forgotten)
    }
}
