//! The numbers in the events, and what each subscription should see of them. Every published event carries its number
//! as the first member, `{"n":"00000001",`, so that it stands at the same place whatever a server adds at the end.

use std::ops::Range;

/// What an event of the benchmark starts with; anything else is a message of the server's own.
const START: &[u8] = b"{\"n\":\"";
/// Digits of an event's number.
pub(super) const DIGITS: usize = 8;
/// Where the digits stand.
pub(super) const DIGITS_AT: Range<usize> = START.len()..START.len() + DIGITS;
/// The largest number that has `DIGITS` digits.
pub(super) const NUMBER_MAX: u32 = 99_999_999;

/// The number of an event of the benchmark.
#[inline]
pub(super) fn number(payload: &[u8]) -> Option<u32> {
    let (start, rest) = payload.split_first_chunk::<{ START.len() }>()?;
    let digits = rest.first_chunk::<DIGITS>()?;
    // Eight digits at once: pairs, then fours, then all.
    let word = u64::from_le_bytes(*digits).wrapping_sub(0x3030_3030_3030_3030);
    if start.as_slice() != START
        || (word.wrapping_add(0x7676_7676_7676_7676) | word) & 0x8080_8080_8080_8080 != 0
    {
        return None;
    }
    let pairs = (word.wrapping_mul(10).wrapping_add(word >> 8)) & 0x00FF_00FF_00FF_00FF;
    let fours = (pairs.wrapping_mul(100).wrapping_add(pairs >> 16)) & 0x0000_FFFF_0000_FFFF;
    let all = (fours.wrapping_mul(10_000).wrapping_add(fours >> 32)) & 0xFFFF_FFFF;
    u32::try_from(all).ok()
}

/// The number behind the last `"name":` at the end of an event, where a server adds its fields.
pub(super) fn number_after(tail: &[u8], name: &str) -> Option<u64> {
    let name = format!("\"{name}\":");
    let at = tail.windows(name.len()).rposition(|window| window == name.as_bytes())?;
    let rest = &tail[at + name.len()..];
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// Which events are `latest` (may be folded when a client is behind) and which durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    /// `task.progress` only.
    Latest,
    /// `custom.event` only.
    Durable,
    /// Every n-th of a project is durable, the others `latest`.
    DurableEvery(u32),
}

/// How numbers are dealt out: event `n` belongs to project `n % projects`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) projects: u32,
    pub(super) mix: Mix,
}

impl Plan {
    #[inline]
    pub(super) fn project(self, n: u32) -> u32 {
        if self.projects == 1 { 0 } else { n % self.projects }
    }

    pub(super) fn is_durable(self, n: u32) -> bool {
        match self.mix {
            Mix::Latest => false,
            Mix::Durable => true,
            Mix::DurableEvery(every) => (n / self.projects) % every == every - 1,
        }
    }

    /// The numbers of one project in `range`, as a subscription sees them; a filtered one sees `task.*` only.
    pub(super) fn seen(self, range: Range<u32>, filtered: bool) -> impl Iterator<Item = u32> {
        let step = usize::try_from(self.projects).unwrap_or(usize::MAX);
        range.step_by(step).filter(move |&n| !(filtered && self.is_durable(n)))
    }

    /// The first number at or behind `n` of the same project that a subscription sees.
    #[inline]
    fn at_or_behind(self, n: u32, filtered: bool) -> u32 {
        if filtered { self.seen(n..NUMBER_MAX, true).next().unwrap_or(u32::MAX) } else { n }
    }
}

/// What a number that came in means for its subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The expected one.
    Next,
    /// Events before it were folded into newer ones, and the frame says so. The range starts with the first of them.
    Folded(Range<u32>),
    /// Events before it are missing.
    Gap { missing: Range<u32> },
    /// It came before.
    Repeated,
    /// Later ones came before it.
    OutOfOrder,
    /// Of a project that the connection has no subscription to, or of a type that its filter drops.
    NotSubscribed,
}

/// The numbers that the subscriptions of one connection expect.
#[derive(Debug)]
pub(super) struct Sequence {
    plan: Plan,
    filtered: bool,
    first_project: u32,
    next: Box<[u32]>,
}

impl Sequence {
    /// Subscriptions to `count` projects from `first_project` on (around the end), from event `from` on.
    pub(super) fn new(plan: Plan, first_project: u32, count: u32, filtered: bool, from: u32) -> Self {
        let next = (0..count).map(|slot| {
            let project = (first_project + slot) % plan.projects;
            let first = from + (project + plan.projects - from % plan.projects) % plan.projects;
            plan.at_or_behind(first, filtered)
        });
        Self { plan, filtered, first_project, next: next.collect() }
    }

    pub(super) fn is_filtered(&self) -> bool {
        self.filtered
    }

    /// The projects that are subscribed to.
    pub(super) fn projects(&self) -> impl Iterator<Item = u32> {
        let (first, projects) = (self.first_project, self.plan.projects);
        (0..self.next.len()).zip(first..).map(move |(_, project)| project % projects)
    }

    /// The next number that each subscription expects.
    pub(super) fn expected(&self) -> &[u32] {
        &self.next
    }

    /// Which subscription event `n` is for; beyond the last if for none.
    #[inline]
    pub(super) fn slot(&self, n: u32) -> usize {
        let projects = self.plan.projects;
        if projects == 1 {
            return 0;
        }
        ((self.plan.project(n) + projects - self.first_project) % projects) as usize
    }

    /// Takes a number that came in. After an error the sequence goes on behind it.
    #[inline]
    pub(super) fn take(&mut self, n: u32, tail: &[u8]) -> Seen {
        let projects = self.plan.projects;
        let slot = self.slot(n);
        let Some(next) = self.next.get_mut(slot) else { return Seen::NotSubscribed };
        let expected = *next;
        if n == expected {
            *next = self.plan.at_or_behind(n + projects, self.filtered);
            return Seen::Next;
        }
        if self.filtered && self.plan.is_durable(n) {
            return Seen::NotSubscribed;
        }
        if n > expected {
            *next = self.plan.at_or_behind(n + projects, self.filtered);
            return self.explained(expected..n, tail);
        }
        let is_last = self.plan.at_or_behind(n + projects, self.filtered) == expected;
        if is_last { Seen::Repeated } else { Seen::OutOfOrder }
    }

    /// Whether the frame behind the left-out events says how many it stands for, and all of them may be folded.
    fn explained(&self, missing: Range<u32>, tail: &[u8]) -> Seen {
        let count = self.plan.seen(missing.clone(), self.filtered).count() as u64;
        let any_durable = self.plan.seen(missing.clone(), self.filtered).any(|n| self.plan.is_durable(n));
        if number_after(tail, "folded") == Some(count) && !any_durable {
            Seen::Folded(missing)
        } else {
            Seen::Gap { missing }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Plan = Plan { projects: 1, mix: Mix::Latest };

    #[test]
    fn the_number_is_read_from_the_front_of_an_event() {
        for (payload, expected) in [
            (&b"{\"n\":\"00000001\",\"type\":\"a.b\"}"[..], Some(1)),
            (b"{\"n\":\"98765432\"}", Some(98_765_432)),
            (b"{\"n\":\"99999999\"", Some(NUMBER_MAX)),
            (b"{\"n\":\"0000000x\"}", None),
            (b"{\"n\":\"0000000/\"}", None),
            (b"{\"n\":\"0000000:\"}", None),
            (b"{\"n\":\"000\"}", None),
            (b"{\"type\":\"system.heartbeat\"}", None),
            (b"{}", None),
        ] {
            assert_eq!(number(payload), expected, "{}", String::from_utf8_lossy(payload));
        }
    }

    #[test]
    fn fields_at_the_end_are_read() {
        let tail = b"\"message\":\"folded\",\"offset\":119,\"folded\":16}";
        assert_eq!((number_after(tail, "offset"), number_after(tail, "folded")), (Some(119), Some(16)));
        assert_eq!(number_after(b"{}", "offset"), None);
    }

    fn check(plan: Plan, filtered: bool, taken: &[(u32, &str, Seen)]) {
        let mut sequence = Sequence::new(plan, 0, 1, filtered, 0);
        for (n, tail, expected) in taken {
            assert_eq!(sequence.take(*n, tail.as_bytes()), *expected, "event {n} of {plan:?}");
        }
    }

    #[test]
    fn what_is_lost_repeated_or_out_of_order_is_seen() {
        check(
            ONE,
            false,
            &[
                (0, "", Seen::Next),
                (1, "", Seen::Next),
                (1, "", Seen::Repeated),
                (4, "", Seen::Gap { missing: 2..4 }),
                (2, "", Seen::OutOfOrder),
                (5, "", Seen::Next),
            ],
        );
    }

    #[test]
    fn folded_events_are_explained_only_by_their_number_and_only_if_none_was_durable() {
        check(
            ONE,
            false,
            &[
                (3, "\"offset\":4,\"folded\":3}", Seen::Folded(0..3)),
                (6, "\"folded\":1}", Seen::Gap { missing: 4..6 }),
            ],
        );
        let mixed = Plan { projects: 1, mix: Mix::DurableEvery(2) };
        check(mixed, false, &[(2, "\"folded\":2}", Seen::Gap { missing: 0..2 })]);
        check(mixed, false, &[(1, "\"folded\":1}", Seen::Folded(0..1))]);
    }

    #[test]
    fn a_filtered_subscription_sees_only_tasks() {
        let mixed = Plan { projects: 1, mix: Mix::DurableEvery(2) };
        check(
            mixed,
            true,
            &[
                (0, "", Seen::Next),
                (2, "", Seen::Next),
                (3, "", Seen::NotSubscribed),
                (8, "", Seen::Gap { missing: 4..8 }),
                (12, "\"folded\":1}", Seen::Folded(10..12)),
            ],
        );
    }

    #[test]
    fn each_project_has_a_sequence_of_its_own() {
        let plan = Plan { projects: 5, mix: Mix::Latest };
        let mut sequence = Sequence::new(plan, 4, 2, false, 0);
        assert_eq!(sequence.projects().collect::<Vec<_>>(), [4, 0]);
        assert_eq!(sequence.expected(), [4, 0]);
        // Between projects there is no order.
        for n in [0, 5, 4, 10, 9] {
            assert_eq!(sequence.take(n, b""), Seen::Next, "{n}");
        }
        assert_eq!(sequence.take(6, b""), Seen::NotSubscribed);
        assert_eq!(sequence.take(19, b""), Seen::Gap { missing: 14..19 });
        assert_eq!(Sequence::new(plan, 4, 2, false, 6).expected(), [9, 10]);
    }
}
