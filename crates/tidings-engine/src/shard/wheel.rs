//! A timer wheel: when to look at a connection again. One entry each, no timer object, no sorting.

/// One slot of the wheel, in milliseconds: how late a look may come.
pub(super) const TICK_MS: u64 = 100;
/// Slots; what lies further away than a turn is looked at once a turn.
const SLOTS: usize = 512;

/// Names of things to look at, by when.
#[derive(Debug)]
pub(super) struct Wheel<T> {
    slots: Vec<Vec<T>>,
    /// The next tick to be run.
    next_tick: u64,
}

impl<T> Wheel<T> {
    pub(super) fn new(now_ms: u64) -> Self {
        Self { slots: std::iter::repeat_with(Vec::new).take(SLOTS).collect(), next_tick: now_ms / TICK_MS }
    }

    /// Notes to look at `item` when `at_ms` has come, or after one turn of the wheel, whichever is first.
    pub(super) fn schedule(&mut self, at_ms: u64, item: T) {
        let tick = at_ms.div_ceil(TICK_MS).clamp(self.next_tick, self.next_tick + SLOTS as u64 - 1);
        self.slots[slot(tick)].push(item);
    }

    /// When the next tick is due.
    pub(super) fn next_ms(&self) -> u64 {
        self.next_tick * TICK_MS
    }

    /// What is due by now.
    pub(super) fn due(&mut self, now_ms: u64) -> Vec<T> {
        let mut due = Vec::new();
        let last = (now_ms / TICK_MS).min(self.next_tick + SLOTS as u64);
        while self.next_tick <= last {
            due.append(&mut self.slots[slot(self.next_tick)]);
            self.next_tick += 1;
        }
        // A process that was stopped for long does not run through each tick that it missed.
        self.next_tick = self.next_tick.max(now_ms / TICK_MS + 1);
        due
    }
}

fn slot(tick: u64) -> usize {
    usize::try_from(tick % SLOTS as u64).expect("below the number of slots")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scheduled_comes_when_it_is_due_or_a_turn_later() {
        let mut wheel = Wheel::new(5000);
        wheel.schedule(5250, "a");
        wheel.schedule(4000, "past");
        wheel.schedule(10_000_000, "far");
        assert_eq!(wheel.due(5000), ["past"]);
        assert!(wheel.due(5299).is_empty());
        assert_eq!(wheel.due(5300), ["a"]);
        assert_eq!(wheel.due(200_000), ["far"], "after one turn, to be scheduled again");
        wheel.schedule(200_100, "b");
        assert_eq!(wheel.due(200_100), ["b"]);
    }
}
