//! So many in a second. Knows neither what is counted nor who is refused.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What comes in a second may come at once.
const SPAN: Duration = Duration::from_secs(1);

/// So many in a second, and those of one second at once: the generic cell rate algorithm, which is a bucket of tokens that
/// remembers one moment.
#[derive(Debug)]
pub(crate) struct Rate {
    interval: Duration,
    /// When the next one would come if all came evenly.
    next: Mutex<Instant>,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        Self { interval: SPAN / per_second.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Takes `n` at once, or none; then says after how long so many would fit.
    ///
    /// More than a second brings never fit. They are taken when nothing was for a while, so that they pass at all, and those
    /// behind them wait for as long as they would have taken one by one: over time it is the same rate.
    pub(crate) fn take(&self, n: u32) -> Result<(), Duration> {
        let now = Instant::now();
        let taken = self.interval.saturating_mul(n);
        let room = SPAN.max(taken);
        let mut next = self.next.lock();
        let after = (*next).max(now) + taken;
        let wait = after.saturating_duration_since(now + room);
        if !wait.is_zero() {
            return Err(wait);
        }
        *next = after;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_second_brings_so_many_and_no_more() {
        let rate = Rate::new(4);
        for _ in 0..3 {
            assert_eq!((0..10).filter(|_| rate.take(1).is_ok()).count(), 4);
            advance(Duration::from_millis(250)).await;
            assert_eq!((0..10).filter(|_| rate.take(1).is_ok()).count(), 1);
            advance(Duration::from_secs(100)).await;
        }
        let slow = Rate::new(1);
        assert!(slow.take(1).is_ok() && slow.take(1).is_err());
        advance(Duration::from_millis(999)).await;
        assert!(slow.take(1).is_err());
        advance(Duration::from_millis(1)).await;
        assert!(slow.take(1).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn several_come_whole_or_not_at_all_and_are_told_when() {
        let rate = Rate::new(10);
        assert_eq!(rate.take(8), Ok(()));
        assert_eq!(rate.take(4), Err(Duration::from_millis(200)));
        assert_eq!(rate.take(2), Ok(()), "what was refused took nothing");
        advance(Duration::from_millis(400)).await;
        assert_eq!(rate.take(4), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_a_second_brings_pass_alone_and_are_waited_for_by_the_next() {
        let rate = Rate::new(10);
        assert_eq!(rate.take(1), Ok(()));
        assert_eq!(rate.take(30), Err(Duration::from_millis(100)));
        advance(Duration::from_millis(100)).await;
        assert_eq!(rate.take(30), Ok(()));
        assert_eq!(rate.take(1), Err(Duration::from_millis(2100)));
        advance(Duration::from_millis(2100)).await;
        assert_eq!(rate.take(1), Ok(()));
    }
}
