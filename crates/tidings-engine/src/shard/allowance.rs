//! How much one client may send: so many messages a second, more of them at once, and after that an answer and an end. Pure,
//! and two words for each connection.

/// A frame that carries no message, as a pong or a fragment, counts as this part of one: so few of them come from an honest
/// client that they make no difference, and a flood is none the less a flood.
const FRAMES_PER_MESSAGE: u64 = 16;
/// Refused messages after which a client that goes on in spite of it is closed, at least.
const REFUSED_MIN: u32 = 100;
/// Seconds whose messages may come at once, beside a subscription to everything that a client may have.
const BURST_S: u64 = 10;
const SECOND_MS: u32 = 1000;

/// What a connection may send, by its options.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For one message, if they came evenly.
    interval_us: u64,
    /// How much may come at once.
    burst_us: u64,
    refused_max: u32,
}

impl Limits {
    pub(super) fn new(per_second: u32, subscriptions_max: usize) -> Self {
        let interval_us = (1_000_000 / u64::from(per_second.max(1))).max(1);
        let burst = BURST_S * u64::from(per_second) + subscriptions_max as u64;
        let refused_max = per_second.max(REFUSED_MIN);
        Self { interval_us, burst_us: burst.saturating_mul(interval_us), refused_max }
    }
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// A message, or a ping, which is answered like one.
    Message,
    /// Frames that are none.
    Frames(u32),
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allowed,
    /// It is not looked at. `told`: the client has to be told so.
    Refused {
        told: bool,
    },
    /// It was told, and went on.
    Ended,
}

/// How much one client has sent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Allowance {
    /// When all that came would be over if it had come evenly.
    until_us: u64,
    /// Refused since a second passed in which nothing was.
    refused: u32,
    /// When something was last refused, in the shard's milliseconds as far as they go into it.
    refused_ms: u32,
}

impl Allowance {
    /// Takes what came `now_ms`, or refuses it, and then it counts for nothing.
    pub(super) fn take(&mut self, sent: Sent, now_ms: u64, limits: &Limits) -> Verdict {
        let from_us = now_ms.saturating_mul(1000);
        let cost_us = match sent {
            Sent::Message => limits.interval_us,
            Sent::Frames(frames) => (limits.interval_us * u64::from(frames)).div_ceil(FRAMES_PER_MESSAGE),
        };
        let after_us = self.until_us.max(from_us) + cost_us;
        if after_us - from_us <= limits.burst_us {
            self.until_us = after_us;
            return Verdict::Allowed;
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "only compared with others that are cut off alike"
        )]
        let now_ms = now_ms as u32;
        let since_ms = now_ms.wrapping_sub(self.refused_ms);
        if since_ms >= SECOND_MS {
            self.refused = 0;
        }
        let told = self.refused == 0 || now_ms / SECOND_MS != self.refused_ms / SECOND_MS;
        self.refused = self.refused.saturating_add(match sent {
            Sent::Message => 1,
            Sent::Frames(frames) => frames,
        });
        self.refused_ms = now_ms;
        if self.refused > limits.refused_max { Verdict::Ended } else { Verdict::Refused { told } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends so many at one moment; how many were allowed, refused and told, and whether it ended.
    fn send(allowance: &mut Allowance, sent: Sent, times: usize, now_ms: u64, limits: &Limits) -> [usize; 4] {
        let mut counts = [0; 4];
        for _ in 0..times {
            match allowance.take(sent, now_ms, limits) {
                Verdict::Allowed => counts[0] += 1,
                Verdict::Refused { told } => {
                    counts[1] += 1;
                    counts[2] += usize::from(told);
                }
                Verdict::Ended => {
                    counts[3] += 1;
                    break;
                }
            }
        }
        counts
    }

    #[test]
    fn a_burst_is_taken_then_refused_then_ended() {
        let limits = Limits::new(100, 500);
        let mut allowance = Allowance::default();
        assert_eq!(send(&mut allowance, Sent::Message, 1500, 7, &limits), [1500, 0, 0, 0]);
        assert_eq!(send(&mut allowance, Sent::Message, 1000, 7, &limits), [0, 100, 1, 1]);
    }

    #[test]
    fn what_comes_evenly_is_taken_for_ever() {
        let limits = Limits::new(100, 0);
        let mut allowance = Allowance::default();
        for second in 1..1000 {
            assert_eq!(send(&mut allowance, Sent::Message, 100, second * 1000, &limits)[0], 100);
        }
    }

    #[test]
    fn who_waits_when_told_is_forgiven_and_who_goes_on_slowly_is_not() {
        let limits = Limits::new(10, 0);
        let mut patient = Allowance::default();
        assert_eq!(send(&mut patient, Sent::Message, 190, 0, &limits), [100, 90, 1, 0]);
        assert_eq!(send(&mut patient, Sent::Message, 100, 2000, &limits), [20, 80, 1, 0]);
        assert_eq!(send(&mut patient, Sent::Message, 100, 3500, &limits), [15, 85, 1, 0]);
        let mut stubborn = Allowance::default();
        assert_eq!(send(&mut stubborn, Sent::Message, 160, 0, &limits), [100, 60, 1, 0]);
        assert_eq!(send(&mut stubborn, Sent::Message, 35, 900, &limits), [9, 26, 0, 0]);
        assert_eq!(send(&mut stubborn, Sent::Message, 35, 1800, &limits), [9, 14, 1, 1]);
    }

    #[test]
    fn frames_without_a_message_count_a_little() {
        let limits = Limits::new(100, 500);
        let mut allowance = Allowance::default();
        assert_eq!(send(&mut allowance, Sent::Frames(1), 20_000, 0, &limits), [20_000, 0, 0, 0]);
        assert_eq!(send(&mut allowance, Sent::Frames(1), 20_000, 0, &limits), [4_000, 100, 1, 1]);
        let mut pieces = Allowance::default();
        assert_eq!(send(&mut pieces, Sent::Frames(2731), 100, 0, &limits), [8, 0, 0, 1]);
    }

    #[test]
    fn the_end_of_the_clocks_half_changes_nothing() {
        let limits = Limits::new(1, 0);
        let mut allowance = Allowance::default();
        let end = u64::from(u32::MAX);
        assert_eq!(send(&mut allowance, Sent::Message, 50, end, &limits), [10, 40, 1, 0]);
        assert_eq!(send(&mut allowance, Sent::Message, 100, end + 500, &limits)[3], 1);
    }
}
