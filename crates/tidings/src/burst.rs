//! One line in the log for a burst of the same trouble: the first at once, the rest as a number.

use std::{collections::HashMap, hash::Hash, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// Quiet time after which trouble counts as a new burst.
const QUIET: Duration = Duration::from_secs(10);

/// Decides whether one more occurrence is worth a line, for each of a few kinds of trouble on its own: a noisy one does
/// not hide what is wrong elsewhere.
#[derive(Debug)]
pub(crate) struct Bursts<K> {
    running: Mutex<HashMap<K, Running>>,
}

#[derive(Debug)]
struct Running {
    said_at: Instant,
    unsaid: u64,
}

impl<K> Default for Bursts<K> {
    fn default() -> Self {
        Self { running: Mutex::default() }
    }
}

impl<K: Eq + Hash> Bursts<K> {
    /// Counts an occurrence. `Some(n)`: say it now, and that `n` more of its kind came since the last line.
    pub(crate) fn occur(&self, kind: K) -> Option<u64> {
        let now = Instant::now();
        let mut kinds = self.running.lock();
        match kinds.get_mut(&kind) {
            Some(running) if now.duration_since(running.said_at) < QUIET => {
                running.unsaid += 1;
                None
            }
            _ => {
                let former = kinds.insert(kind, Running { said_at: now, unsaid: 0 });
                Some(former.map_or(0, |running| running.unsaid))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_said_once_and_counted() {
        let bursts = Bursts::default();
        assert_eq!(bursts.occur("a"), Some(0));
        assert_eq!(bursts.occur("a"), None);
        assert_eq!(bursts.occur("b"), Some(0));
        assert_eq!(bursts.occur("a"), None);
        tokio::time::advance(QUIET).await;
        assert_eq!(bursts.occur("a"), Some(2));
        assert_eq!(bursts.occur("a"), None);
    }
}
