//! One line in the log for a burst of the same trouble: the first at once, the rest as a number.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Quiet time after which trouble counts as a new burst.
const QUIET: Duration = Duration::from_secs(10);

/// Decides whether one more occurrence is worth a line.
#[derive(Debug, Default)]
pub(crate) struct Burst {
    state: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    said_at: Instant,
    unsaid: u64,
}

impl Burst {
    /// Counts an occurrence. `Some(n)`: say it now, and that `n` more came since the last line.
    pub(crate) fn occur(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.state.lock();
        match &mut *state {
            Some(running) if now.duration_since(running.said_at) < QUIET => {
                running.unsaid += 1;
                None
            }
            state => {
                let unsaid = state.as_ref().map_or(0, |running| running.unsaid);
                *state = Some(Running { said_at: now, unsaid: 0 });
                Some(unsaid)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_said_once_and_counted() {
        let burst = Burst::default();
        assert_eq!(burst.occur(), Some(0));
        assert_eq!(burst.occur(), None);
        assert_eq!(burst.occur(), None);
        tokio::time::advance(QUIET).await;
        assert_eq!(burst.occur(), Some(2));
        assert_eq!(burst.occur(), None);
    }
}
