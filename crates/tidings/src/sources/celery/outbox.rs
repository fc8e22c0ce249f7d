//! Events on their way to the engine: in order, each kept until the engine has it. What is waiting is folded where a newer update
//! of a task makes an older one superfluous.

use std::collections::{HashMap, VecDeque};

use super::telling::Outgoing;

/// Events that wait. More only come together when nothing can be appended for very long.
const WAITING_MAX: usize = 100_000;
/// For so long a node that does not append keeps events, in case the one that does has died: longer than a lease goes on without
/// its holder.
const SPARE_MS_MAX: u64 = 10_000;
/// Events and bytes that are appended at once.
const BATCH_MAX: usize = 500;
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<(u64, Outgoing)>,
    /// How many have left at the front: places are counted from the first ever.
    left: u64,
    /// Where the last event of each subject is.
    last: HashMap<std::sync::Arc<str>, u64>,
    /// Those at the front are being appended.
    in_flight: usize,
    /// Were let go of for want of room.
    pub(super) lost: u64,
}

impl Outbox {
    pub(super) fn push(&mut self, outgoing: Outgoing, now_ms: u64) {
        let place = self.last.get(&outgoing.subject).and_then(|place| place.checked_sub(self.left));
        let place =
            place.and_then(|place| usize::try_from(place).ok()).filter(|place| *place >= self.in_flight);
        let last = place.and_then(|place| self.waiting.get_mut(place));
        if let Some((_, last)) = last
            && outgoing.is_update
            && last.is_update
            && last.project == outgoing.project
        {
            *last = outgoing;
            return;
        }
        if self.waiting.len() - self.in_flight >= WAITING_MAX {
            self.lost += 1;
            return;
        }
        self.last.insert(outgoing.subject.clone(), self.left + self.waiting.len() as u64);
        self.waiting.push_back((now_ms, outgoing));
    }

    /// What is to be appended next. It stays until [`Outbox::appended`] or [`Outbox::failed`] says what became of it.
    pub(super) fn next_batch(&mut self) -> Vec<Outgoing> {
        let mut bytes = 0;
        let batch: Vec<_> = self
            .waiting
            .iter()
            .take(BATCH_MAX)
            .take_while(|(_, outgoing)| {
                let is_first = bytes == 0;
                bytes += outgoing.json.len();
                is_first || bytes <= BATCH_BYTES_MAX
            })
            .map(|(_, outgoing)| outgoing.clone())
            .collect();
        self.in_flight = batch.len();
        batch
    }

    /// The engine has the batch.
    pub(super) fn appended(&mut self) {
        for _ in 0..std::mem::take(&mut self.in_flight) {
            self.pop();
        }
    }

    /// It has not, or nobody knows. An update that was appended after all must not come again behind what followed it.
    pub(super) fn failed(&mut self) {
        self.in_flight = 0;
        self.take_over();
    }

    /// Another node appends. What is too old to be missing is let go of.
    pub(super) fn spare(&mut self, now_ms: u64) {
        self.in_flight = 0;
        while self.waiting.front().is_some_and(|(at_ms, _)| at_ms + SPARE_MS_MAX < now_ms) {
            self.pop();
        }
    }

    /// This node appends from now on. Of updates, only those are still worth telling that nothing came after.
    pub(super) fn take_over(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        let (left, last) = (std::mem::take(&mut self.left), std::mem::take(&mut self.last));
        for (place, (at_ms, outgoing)) in (left..).zip(waiting) {
            if !outgoing.is_update || last.get(&outgoing.subject) == Some(&place) {
                self.last.insert(outgoing.subject.clone(), self.waiting.len() as u64);
                self.waiting.push_back((at_ms, outgoing));
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn pop(&mut self) {
        if let Some((_, outgoing)) = self.waiting.pop_front() {
            if self.last.get(&outgoing.subject) == Some(&self.left) {
                self.last.remove(&outgoing.subject);
            }
            self.left += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use tidings_protocol::ProjectId;

    use super::*;

    fn outgoing(subject: &str, json: &str) -> Outgoing {
        let project = ProjectId::try_from("p").expect("an id");
        let is_update = json.starts_with("update");
        Outgoing { subject: subject.into(), project, is_update, mark: None, json: json.to_owned() }
    }

    fn texts(batch: &[Outgoing]) -> Vec<&str> {
        batch.iter().map(|outgoing| outgoing.json.as_str()).collect()
    }

    #[test]
    fn what_waits_is_folded_and_what_is_on_its_way_is_not() {
        let mut outbox = Outbox::default();
        for json in ["start", "update 1", "update 2"] {
            outbox.push(outgoing("t", json), 0);
        }
        assert_eq!(texts(&outbox.next_batch()), ["start", "update 2"]);
        outbox.push(outgoing("t", "update 3"), 0);
        outbox.push(outgoing("u", "update u"), 0);
        outbox.push(outgoing("t", "update 4"), 0);
        outbox.push(outgoing("t", "end"), 0);
        outbox.failed();
        assert_eq!(texts(&outbox.next_batch()), ["start", "update u", "end"]);
        outbox.appended();
        assert!(outbox.is_empty() && outbox.last.is_empty());
        outbox.push(outgoing("t", "update 5"), 0);
        outbox.push(outgoing("t", "update 6"), 0);
        assert_eq!(texts(&outbox.next_batch()), ["update 6"]);
    }

    #[test]
    fn who_takes_over_tells_the_last_update_of_what_goes_on_and_every_start_and_end() {
        let mut outbox = Outbox::default();
        for (subject, json, at_ms) in [
            ("old", "start", 0),
            ("a", "start", 5_000),
            ("a", "update 1", 5_000),
            ("b", "start", 5_000),
            ("b", "update 1", 5_000),
            ("b", "end", 9_000),
        ] {
            outbox.push(outgoing(subject, json), at_ms);
        }
        outbox.spare(10_001);
        outbox.take_over();
        assert_eq!(texts(&outbox.next_batch()), ["start", "update 1", "start", "end"]);
        outbox.push(outgoing("a", "update 2"), 10_000);
        outbox.failed();
        assert_eq!(texts(&outbox.next_batch()), ["start", "start", "end", "update 2"]);
    }
}
