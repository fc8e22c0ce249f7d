//! How several nodes that hear the same channel come to count its messages alike: pure, messages and marks in.
//!
//! Redis hands every subscriber the same messages in the same order, but not a number. So one node, the holder of the lease,
//! numbers them, and publishes *marks* on a second channel that everybody hears on the same connection. A mark says how many
//! messages the holder had heard when the mark before it came by; whoever has heard both knows by how much its own count
//! differs, for as long as its connection is not broken. A mark also says up to which number everything is appended. What is
//! beyond that, everybody keeps: whoever holds the lease next says it again, under the same numbers, and a stream leaves out
//! what it has had.

use std::{collections::VecDeque, fmt};

/// Bytes that are kept of what the holder has not yet said to be appended.
const KEPT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// For how long: much longer than a lease goes on without its holder.
const KEPT_MS_MAX: u64 = 30_000;

/// The number of a message on the channel. Whoever begins to count anew begins a generation, above all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number {
    generation: u64,
    count: u64,
}

impl fmt::Display for Number {
    /// Of one width, so that numbers compare as strings.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012}-{:016}", self.generation, self.count)
    }
}

/// What the holder tells the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    generation: u64,
    /// The holder's turn; a mark is the `sequence`th of it.
    term: u64,
    sequence: u64,
    /// How many messages the holder had counted when its mark before this one came by.
    previous: Option<u64>,
    /// Everything up to this is appended.
    appended: u64,
}

impl Mark {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_prefix("mark ")?.split(' ');
        let mut next = || words.next();
        Some(Self {
            generation: next()?.parse().ok()?,
            term: next()?.parse().ok()?,
            sequence: next()?.parse().ok()?,
            previous: match next()? {
                "-" => None,
                count => Some(count.parse().ok()?),
            },
            appended: next()?.parse().ok()?,
        })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let previous = self.previous.map_or_else(|| "-".to_owned(), |count| count.to_string());
        write!(f, "mark {} {} {} {previous} {}", self.generation, self.term, self.sequence, self.appended)
    }
}

/// One node's count.
#[derive(Debug, Default)]
pub(super) struct Numbering {
    /// Messages heard on this connection.
    heard: u64,
    /// The numbering that the holder uses, if it is known by how much it differs.
    aligned: Option<Aligned>,
    /// Everything up to this is appended, as far as the holder has said.
    appended: u64,
    /// The last mark that came by, and how many messages had been heard then.
    last_mark: Option<(u64, u64, u64)>,
    /// What is not known to be appended, each with its place among the messages of this connection.
    kept: VecDeque<Kept>,
    /// The same of a connection that was lost, with their numbers.
    left_over: VecDeque<(Number, Kept)>,
    bytes: usize,
    /// As holder: our turn, the marks that we have made in it, and the count when the last one came by.
    holding: Option<Holding>,
}

#[derive(Clone, Copy, Debug)]
struct Aligned {
    generation: u64,
    /// What the holder has counted more than was heard here; less than nothing, if it came later.
    ahead: i64,
}

impl Aligned {
    /// `None`: the holder did not hear it.
    fn number(self, place: u64) -> Option<Number> {
        let count = place.checked_add_signed(self.ahead).filter(|count| *count > 0)?;
        Some(Number { generation: self.generation, count })
    }
}

#[derive(Clone, Copy, Debug)]
struct Holding {
    term: u64,
    marks: u64,
    previous: Option<u64>,
}

#[derive(Debug)]
struct Kept {
    place: u64,
    at_ms: u64,
    message: Vec<u8>,
}

impl Numbering {
    /// Whether this node counts as the holder does, and has everything that the holder may not have appended.
    pub(super) fn could_go_on(&self) -> bool {
        self.aligned.is_some_and(|aligned| aligned.ahead <= self.appended.cast_signed())
    }

    /// A message came. Returns how many had to be let go of to keep it that nobody is known to have appended.
    pub(super) fn hear(&mut self, message: Vec<u8>, now_ms: u64) -> usize {
        self.heard += 1;
        self.bytes += message.len();
        self.kept.push_back(Kept { place: self.heard, at_ms: now_ms, message });
        let mut dropped = 0;
        let too_much = |numbering: &Self| {
            numbering.bytes > KEPT_BYTES_MAX
                || numbering.kept.front().is_some_and(|oldest| oldest.at_ms + KEPT_MS_MAX < now_ms)
        };
        while too_much(self) && self.kept.len() > 1 {
            self.drop_first();
            dropped += 1;
        }
        dropped
    }

    fn drop_first(&mut self) {
        if let Some(kept) = self.kept.pop_front() {
            self.bytes -= kept.message.len();
        }
    }

    /// A mark came by.
    pub(super) fn hear_mark(&mut self, mark: &Mark) {
        if let Some(holding) = &mut self.holding {
            if holding.term == mark.term {
                let count = self.aligned.map(|aligned| self.heard.saturating_add_signed(aligned.ahead));
                holding.previous = count.filter(|_| holding.marks == mark.sequence);
            }
            return;
        }
        let before = self.last_mark.replace((mark.term, mark.sequence, self.heard));
        if let (Some((term, sequence, heard)), Some(count)) = (before, mark.previous)
            && (term, sequence + 1) == (mark.term, mark.sequence)
        {
            let ahead = count.cast_signed() - heard.cast_signed();
            self.aligned = Some(Aligned { generation: mark.generation, ahead });
        }
        let Some(aligned) = self.aligned else { return };
        if aligned.generation == mark.generation {
            self.appended = mark.appended;
            self.forget_up_to(Number { generation: mark.generation, count: mark.appended });
        } else {
            // The holder counts anew. What was kept is numbered as it does, once that is known.
            self.aligned = None;
            self.appended = 0;
        }
    }

    /// This node holds the lease, for the `term`th turn. Without a common count a new one begins. Returns whether it does.
    pub(super) fn begin(&mut self, term: u64) -> bool {
        self.holding = Some(Holding { term, marks: 0, previous: None });
        let anew = self.aligned.is_none();
        if anew {
            self.aligned = Some(Aligned { generation: term, ahead: 0 });
            // What came before the last mark of another holder was his.
            if let Some((_, _, heard)) = self.last_mark {
                while self.kept.front().is_some_and(|first| first.place <= heard) {
                    self.drop_first();
                }
            }
        }
        anew
    }

    /// It holds it no more.
    pub(super) fn end(&mut self) {
        self.holding = None;
    }

    /// Whether it holds it.
    pub(super) fn is_holding(&self) -> bool {
        self.holding.is_some()
    }

    /// What is to be appended next.
    pub(super) fn next(&self, count_max: usize, bytes_max: usize) -> Vec<(Number, &[u8])> {
        let mut bytes = 0;
        let kept = self.kept.iter().filter_map(|kept| Some((self.aligned?.number(kept.place)?, kept)));
        let all = self.left_over.iter().map(|(number, kept)| (*number, kept)).chain(kept);
        all.map(|(number, kept)| (number, &kept.message[..]))
            .take(count_max)
            .take_while(|(_, message)| {
                let first = bytes == 0;
                bytes += message.len().max(1);
                first || bytes <= bytes_max
            })
            .collect()
    }

    /// Everything up to this number is appended.
    pub(super) fn forget_up_to(&mut self, number: Number) {
        while let Some((first, _)) = self.left_over.front()
            && *first <= number
        {
            if let Some((_, kept)) = self.left_over.pop_front() {
                self.bytes -= kept.message.len();
            }
        }
        let Some(aligned) = self.aligned else { return };
        // What the holder has never heard has no number, and is not appended by anybody.
        while self
            .kept
            .front()
            .is_some_and(|first| aligned.number(first.place).is_none_or(|first| first <= number))
        {
            self.drop_first();
        }
    }

    /// Makes the next mark.
    pub(super) fn mark(&mut self) -> Option<Mark> {
        let (aligned, holding) = (self.aligned?, self.holding.as_mut()?);
        holding.marks += 1;
        let appended = match self.kept.front() {
            Some(first) => aligned.number(first.place).map_or(0, |first| first.count - 1),
            None => self.heard.saturating_add_signed(aligned.ahead),
        };
        Some(Mark {
            generation: aligned.generation,
            term: holding.term,
            sequence: holding.marks,
            previous: holding.previous.take(),
            appended: if self.left_over.is_empty() { appended } else { 0 },
        })
    }

    /// The connection is lost, and with it the count. What has a number keeps it.
    pub(super) fn disconnect(&mut self) {
        let aligned = self.aligned.take();
        for kept in std::mem::take(&mut self.kept) {
            match aligned.and_then(|aligned| aligned.number(kept.place)) {
                Some(number) => self.left_over.push_back((number, kept)),
                None => self.bytes -= kept.message.len(),
            }
        }
        (self.heard, self.appended, self.last_mark, self.holding) = (0, 0, None, None);
    }

    /// Lets go of what a lost connection left, once others must have appended it.
    pub(super) fn expire(&mut self, now_ms: u64) {
        while self.left_over.front().is_some_and(|(_, kept)| kept.at_ms + KEPT_MS_MAX < now_ms) {
            if let Some((_, kept)) = self.left_over.pop_front() {
                self.bytes -= kept.message.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// What may happen, to one of three nodes.
    #[derive(Clone, Debug)]
    enum Step {
        /// Somebody publishes.
        Publish,
        /// The node takes what has come on its connection, up to so many.
        Take(usize, usize),
        /// The holder, if the node is it, appends so many, and dies in the middle if told so.
        Append(usize, usize),
        /// The holder makes a mark.
        Mark(usize),
        /// The node asks for the lease.
        Lease(usize),
        /// The node dies, with what it has not appended; its lease is free.
        Die(usize),
        /// A node that died comes back, with a new connection.
        Return(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let node = 0..3usize;
        let step = prop_oneof![
            6 => Just(Step::Publish),
            6 => (node.clone(), 1..6usize).prop_map(|(node, count)| Step::Take(node, count)),
            4 => (node.clone(), 1..4usize).prop_map(|(node, count)| Step::Append(node, count)),
            4 => node.clone().prop_map(Step::Mark),
            3 => node.clone().prop_map(Step::Lease),
            1 => node.clone().prop_map(Step::Die),
            2 => node.prop_map(Step::Return),
        ];
        proptest::collection::vec(step, 1..300)
    }

    enum Frame {
        Message(u32),
        Mark(Mark),
    }

    #[derive(Default)]
    struct Node {
        alive: bool,
        numbering: Numbering,
        /// Where on the wire it came, and where it reads next.
        from: usize,
        at: usize,
    }

    /// Messages with their stream (two of them), nodes, and streams that leave out what they have had.
    #[derive(Default)]
    struct World {
        wire: Vec<Frame>,
        nodes: [Node; 3],
        holder: Option<usize>,
        term: u64,
        published: u32,
        last: HashMap<u32, String>,
        appended: HashMap<u32, Vec<u32>>,
    }

    impl World {
        fn step(&mut self, step: &Step) {
            match *step {
                Step::Publish => {
                    self.published += 1;
                    self.wire.push(Frame::Message(self.published));
                }
                Step::Take(node, count) => self.take(node, count),
                Step::Append(node, count) if self.holder == Some(node) => self.append(node, count),
                Step::Mark(node) if self.holder == Some(node) => {
                    let mark = self.nodes[node].numbering.mark().expect("a holder has a count");
                    // What goes over the wire is text.
                    self.wire.push(Frame::Mark(Mark::parse(&mark.to_string()).expect("our own")));
                }
                Step::Lease(node) => self.lease(node),
                Step::Die(node) => {
                    self.nodes[node] = Node::default();
                    self.holder = self.holder.filter(|holder| *holder != node);
                }
                Step::Return(node) if !self.nodes[node].alive => {
                    let now = self.wire.len();
                    self.nodes[node] = Node { alive: true, from: now, at: now, ..Node::default() };
                }
                _ => {}
            }
        }

        fn take(&mut self, node: usize, count: usize) {
            let Node { alive, numbering, at, .. } = &mut self.nodes[node];
            for frame in self.wire.iter().skip(*at).take(if *alive { count } else { 0 }) {
                *at += 1;
                match frame {
                    Frame::Message(message) => {
                        numbering.hear(message.to_be_bytes().to_vec(), 0);
                    }
                    Frame::Mark(mark) => numbering.hear_mark(mark),
                }
            }
        }

        fn append(&mut self, node: usize, count: usize) {
            let batch: Vec<_> = self.nodes[node]
                .numbering
                .next(count, usize::MAX)
                .into_iter()
                .map(|(number, message)| (number, u32::from_be_bytes(message.try_into().unwrap())))
                .collect();
            for (number, message) in &batch {
                let stream = message % 2;
                let last = self.last.entry(stream).or_default();
                if number.to_string() > *last {
                    *last = number.to_string();
                    self.appended.entry(stream).or_default().push(*message);
                }
            }
            if let Some((number, _)) = batch.last() {
                self.nodes[node].numbering.forget_up_to(*number);
            }
        }

        /// Whether a node has heard, or will hear, everything that is not appended.
        fn has_all(&self, node: usize) -> bool {
            let is_appended =
                |message: &u32| self.appended.values().any(|appended| appended.contains(message));
            let before = &self.wire[..self.nodes[node].from];
            before.iter().all(|frame| !matches!(frame, Frame::Message(message) if !is_appended(message)))
        }

        fn could_go_on(&self, node: usize) -> bool {
            self.nodes[node].alive && self.nodes[node].numbering.could_go_on()
        }

        /// One that could go on where the holder was goes before one that could not.
        fn lease(&mut self, node: usize) {
            let others = (0..self.nodes.len()).any(|other| self.could_go_on(other));
            let Node { alive, numbering, .. } = &mut self.nodes[node];
            if self.holder.is_none() && *alive && (numbering.could_go_on() || !others) {
                self.term += 1;
                self.holder = Some(node);
                numbering.begin(self.term);
            }
        }
    }

    proptest! {
        /// As long as somebody lives who could go on, nothing is lost; and never is anything there twice or out of order.
        #[test]
        fn every_message_is_appended_once_and_in_order_whoever_dies(steps in steps()) {
            let mut world = World::default();
            // It counts from the first message, and others join.
            world.step(&Step::Return(0));
            world.step(&Step::Lease(0));
            for step in &steps {
                if let Step::Die(node) = step {
                    let others = (0..3).filter(|other| other != node);
                    let go_on: Vec<_> = others.filter(|other| world.could_go_on(*other)).collect();
                    // It says that it could only if it has everything.
                    prop_assert!(go_on.iter().all(|other| world.has_all(*other)));
                    if go_on.is_empty() {
                        continue;
                    }
                }
                world.step(step);
            }
            let end = world.holder.or_else(|| (0..3).find(|node| world.could_go_on(*node))).expect("somebody lives");
            world.step(&Step::Lease(end));
            world.step(&Step::Take(end, usize::MAX));
            world.step(&Step::Append(end, usize::MAX));
            for stream in 0..2 {
                let expected: Vec<_> = (1..=world.published).filter(|message| message % 2 == stream).collect();
                prop_assert_eq!(world.appended.get(&stream).cloned().unwrap_or_default(), expected);
            }
        }
    }
}
