//! One connection, above its socket: the upgrade, the subscriptions, and what comes in on them. Does no input or output
//! itself.

use serde_json::{Value, json};

use super::{
    book::Class,
    clock::Nanos,
    event::project_id,
    frames::{CLOSE, Frame, PING, PONG, TEXT, put_masked},
    sequence::{Seen, Sequence, number, number_after},
    tally::Tally,
};

/// A whole text message that is not compressed.
const PLAIN_TEXT: u8 = 0x80 | TEXT;
/// Where a server's own fields are looked for.
const ADDED_BYTES: usize = 64;

/// How far a connection has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waits for the server's first message.
    Greeting,
    /// Waits for the answer to the subscription of this slot.
    Subscribing(usize),
    /// Has asked to be resumed; so many confirmations came.
    Resuming(usize),
    Ready,
    /// Closed, by one side or the other.
    Closed,
}

/// What a connection is told to do.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) sequence: Sequence,
    pub(super) book: usize,
    pub(super) class: Class,
    /// Whether latencies are taken from it.
    pub(super) sampled: bool,
    pub(super) deflate: bool,
    /// The beginning of its projects' names.
    pub(super) project: String,
    /// Whether it remembers what it needs to be resumed.
    pub(super) resumable: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) plan: Plan,
    pub(super) phase: Phase,
    /// Frames to be written.
    pub(super) out: Vec<u8>,
    /// Whether the connection offered compression and the server took it.
    pub(super) compressed: bool,
    /// Whether its book counts it among those that are waited for.
    pub(super) has_joined: bool,
    token: Option<String>,
    /// Where each subscription stands: epoch and offset.
    positions: Vec<Option<(String, u64)>>,
}

impl Session {
    pub(super) fn new(plan: Plan) -> Self {
        let positions = vec![None; if plan.resumable { plan.sequence.expected().len() } else { 0 }];
        Self {
            plan,
            phase: Phase::Greeting,
            out: Vec::new(),
            compressed: false,
            has_joined: false,
            token: None,
            positions,
        }
    }

    /// The socket is gone and a new one has been upgraded. Asks to be resumed.
    pub(super) fn resume(&mut self) {
        self.out.clear();
        let positions: serde_json::Map<String, Value> = self
            .plan
            .sequence
            .projects()
            .zip(&self.positions)
            .filter_map(|(project, position)| {
                let (epoch, offset) = position.as_ref()?;
                Some((project_id(&self.plan.project, project), json!({"epoch": epoch, "offset": offset})))
            })
            .collect();
        let resume = json!({"type": "resume", "token": self.token.take(), "positions": positions});
        put_masked(&mut self.out, TEXT, resume.to_string().as_bytes());
        self.phase = Phase::Resuming(0);
    }

    /// Takes a frame. `now` is given if latencies are taken from this connection.
    #[inline]
    pub(super) fn take(&mut self, frame: Frame<'_>, now: Option<Nanos>, tally: &mut Tally) {
        if frame.first == PLAIN_TEXT
            && let Some(n) = number(frame.payload)
        {
            self.event(n, frame.tail, now, tally);
        } else {
            self.other(frame, now, tally);
        }
    }

    #[inline]
    fn event(&mut self, n: u32, tail: &[u8], now: Option<Nanos>, tally: &mut Tally) {
        let seen = self.plan.sequence.take(n, tail);
        if seen != Seen::Next && !self.irregular(n, seen, tally) {
            return;
        }
        let book = &mut tally.books[self.plan.book];
        if self.plan.class == Class::Prompt {
            book.deliveries += 1;
            book.arrived(n);
        } else {
            book.slow_deliveries += 1;
        }
        if let Some(now) = now {
            book.took(n, self.plan.class, now);
        }
        if self.plan.resumable {
            self.remember(n, tail);
        }
    }

    /// Counts what is not the next event. Returns whether the event itself is a delivery all the same.
    #[cold]
    fn irregular(&mut self, n: u32, seen: Seen, tally: &mut Tally) -> bool {
        let book = &mut tally.books[self.plan.book];
        if n >= book.published() {
            tally.errors.add("unknown", 1, format!("event {n}, which this run has not published"));
            return false;
        }
        let filtered = self.plan.sequence.is_filtered();
        let mut skip = |range| match self.plan.class {
            Class::Prompt => book.release(range, filtered),
            Class::Slow | Class::Stuck => book.plan().seen(range, filtered).count() as u64,
        };
        match seen {
            Seen::Next => {}
            Seen::Folded(range) => {
                let folded = skip(range);
                book.folded += folded;
            }
            Seen::Gap { missing } => {
                let example = format!("event {n} came where {} was expected", missing.start);
                let count = skip(missing);
                tally.errors.add("missing", count, example);
            }
            Seen::Repeated => {
                tally.errors.add("repeated", 1, format!("event {n} came twice"));
                return false;
            }
            Seen::OutOfOrder => {
                tally.errors.add("out of order", 1, format!("event {n} came behind a later one"));
                return false;
            }
            Seen::NotSubscribed => {
                tally.errors.add("not subscribed", 1, format!("event {n} came without a subscription to it"));
                return false;
            }
        }
        true
    }

    /// Keeps where the subscription stands.
    fn remember(&mut self, n: u32, tail: &[u8]) {
        let slot = self.plan.sequence.slot(n);
        let added = &tail[tail.len().saturating_sub(ADDED_BYTES)..];
        if let Some(Some((_, offset))) = self.positions.get_mut(slot)
            && let Some(at) = number_after(added, "offset")
        {
            *offset = at;
        }
    }

    #[cold]
    fn other(&mut self, frame: Frame<'_>, now: Option<Nanos>, tally: &mut Tally) {
        match frame.opcode() {
            _ if !frame.is_final() || frame.opcode() == 0 => {
                tally.errors.add("fragmented", 1, "a message in several frames, which is not read here");
            }
            TEXT if frame.is_compressed() => self.compressed(frame.payload, now, tally),
            TEXT => self.message(frame.payload, tally),
            PING => put_masked(&mut self.out, PONG, frame.payload),
            PONG => {}
            CLOSE => self.closed(&close_reason(frame.payload), tally),
            opcode => tally.errors.add("protocol", 1, format!("a frame with opcode {opcode}")),
        }
    }

    fn compressed(&mut self, payload: &[u8], now: Option<Nanos>, tally: &mut Tally) {
        tally.compressed += 1;
        if !self.compressed {
            tally.errors.add("protocol", 1, "a compressed message without an agreement to it");
            return;
        }
        if let Some(n) = tally.inflater.recognise(payload, self.plan.sequence.expected()) {
            return self.event(n, b"", now, tally);
        }
        let Some(message) = tally.inflater.inflate(payload) else {
            tally.errors.add("protocol", 1, "a compressed message that cannot be inflated");
            return;
        };
        match number(&message) {
            Some(n) => self.event(n, &message, now, tally),
            None => self.message(&message, tally),
        }
    }

    /// A message of the server's own. An empty object stands for any that was waited for: the plainest server sends no
    /// other.
    fn message(&mut self, payload: &[u8], tally: &mut Tally) {
        let is = |name: &str| text_field(payload, "type").is_some_and(|text| text == name);
        let empty = payload == b"{}";
        if is("error") {
            self.error(payload, tally);
            return;
        }
        match self.phase {
            Phase::Greeting if empty || is("connection.established") => {
                self.greeted(payload);
                self.subscribe(0, None);
            }
            Phase::Subscribing(slot) if empty || is("subscription.confirmed") => {
                self.confirmed(payload, tally);
                self.subscribe(slot + 1, None);
            }
            Phase::Resuming(_) if is("connection.established") => self.greeted(payload),
            Phase::Resuming(_) if is("subscription.removed") => {
                tally.errors.add("not recovered", 1, String::from_utf8_lossy(payload).into_owned());
            }
            Phase::Resuming(count) if is("subscription.confirmed") => {
                self.confirmed(payload, tally);
                if count + 1 == self.plan.sequence.expected().len() {
                    self.phase = Phase::Ready;
                } else {
                    self.phase = Phase::Resuming(count + 1);
                }
            }
            _ => {}
        }
    }

    fn greeted(&mut self, payload: &[u8]) {
        if self.plan.resumable {
            self.token = text_field(payload, "resume_token").map(str::to_owned);
        }
    }

    fn error(&mut self, payload: &[u8], tally: &mut Tally) {
        let code = text_field(payload, "code").unwrap_or_default();
        if code == "resume_expired" && matches!(self.phase, Phase::Resuming(_)) {
            tally.resume_expired += 1;
            // Nothing is lost by it: the same positions go into `since`.
            for slot in 0..self.positions.len() {
                let since = self.positions[slot].clone();
                self.put_subscribe(slot, since.as_ref());
            }
            return;
        }
        tally.errors.add("refused", 1, String::from_utf8_lossy(payload).into_owned());
        self.end(tally);
    }

    fn confirmed(&mut self, payload: &[u8], tally: &mut Tally) {
        if !self.plan.resumable {
            return;
        }
        let again = matches!(self.phase, Phase::Resuming(_));
        let project = text_field(payload, "project_id").unwrap_or_default();
        let slot = self
            .plan
            .sequence
            .projects()
            .position(|number| project_id(&self.plan.project, number) == project);
        let (Some(slot), Some(epoch)) = (slot, text_field(payload, "epoch")) else {
            tally.errors.add("protocol", 1, String::from_utf8_lossy(payload).into_owned());
            return;
        };
        if again && !contains(payload, b"\"recovered\":true") {
            tally.errors.add("not recovered", 1, String::from_utf8_lossy(payload).into_owned());
        }
        // The first one: those in `state` come behind it.
        let name = b"\"offset\":";
        let at = payload.windows(name.len()).position(|window| window == name).unwrap_or_default();
        let digits = &payload[at..payload.len().min(at + ADDED_BYTES)];
        let end = digits.iter().position(|&byte| byte == b',' || byte == b'}').unwrap_or(digits.len());
        let offset = number_after(&digits[..end], "offset").unwrap_or_default();
        self.positions[slot] = Some((epoch.to_owned(), offset));
    }

    /// Asks for the subscription of a slot, or is ready if there is none.
    fn subscribe(&mut self, slot: usize, since: Option<&(String, u64)>) {
        if slot < self.plan.sequence.expected().len() {
            self.put_subscribe(slot, since);
            self.phase = Phase::Subscribing(slot);
        } else {
            self.phase = Phase::Ready;
        }
    }

    fn put_subscribe(&mut self, slot: usize, since: Option<&(String, u64)>) {
        let Some(number) = self.plan.sequence.projects().nth(slot) else { return };
        let mut subscribe =
            json!({"type": "subscribe", "project_id": project_id(&self.plan.project, number)});
        if self.plan.sequence.is_filtered() {
            subscribe["types"] = json!(["task.*"]);
        }
        if let Some((epoch, offset)) = since {
            subscribe["since"] = json!({"epoch": epoch, "offset": offset});
        }
        put_masked(&mut self.out, TEXT, subscribe.to_string().as_bytes());
    }

    /// The connection has ended, and not because we wanted it.
    #[cold]
    pub(super) fn closed(&mut self, reason: &str, tally: &mut Tally) {
        if self.phase == Phase::Closed {
            return;
        }
        if self.plan.class != Class::Prompt && self.phase == Phase::Ready {
            *tally.slow_closed.entry(reason.to_owned()).or_default() += 1;
        } else {
            tally.errors.add("closed", 1, reason.to_owned());
        }
        self.end(tally);
    }

    /// Nothing comes on this connection any more.
    fn end(&mut self, tally: &mut Tally) {
        self.phase = Phase::Closed;
        if std::mem::take(&mut self.has_joined) {
            let missed = tally.books[self.plan.book].leave(&self.plan.sequence);
            tally.errors.add("missing", missed, "events on the way to a connection that was closed");
        }
    }
}

fn close_reason(payload: &[u8]) -> String {
    match payload {
        &[a, b, ref reason @ ..] => {
            let reason = String::from_utf8_lossy(reason);
            format!("{} {reason}", u16::from_be_bytes([a, b])).trim_end().to_owned()
        }
        _ => "close without a code".to_owned(),
    }
}

/// The value of a text field of a server's message; the first of that name. Such values have no escapes.
fn text_field<'a>(payload: &'a [u8], name: &str) -> Option<&'a str> {
    let name = format!("\"{name}\":\"");
    let at = payload.windows(name.len()).position(|window| window == name.as_bytes())?;
    let rest = &payload[at + name.len()..];
    std::str::from_utf8(&rest[..rest.iter().position(|&byte| byte == b'"')?]).ok()
}

fn contains(payload: &[u8], words: &[u8]) -> bool {
    payload.windows(words.len()).any(|window| window == words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::{
        book::Book,
        clock::Clock,
        event::Events,
        frames::Scanner,
        sequence::{Mix, Plan as Numbers},
    };

    /// A session in front of a server that can be made to do anything.
    struct Served {
        session: Session,
        tally: Tally,
        scanner: Scanner,
    }

    impl Served {
        fn start(mix: Mix, class: Class) -> Self {
            let numbers = Numbers { projects: 1, mix };
            let clock = Clock::start();
            let events = Events::new(numbers, "bench", 250).unwrap();
            let book = Book::new(clock, numbers, events).unwrap();
            let session = Session::new(Plan {
                sequence: Sequence::new(numbers, 0, 1, false, 0),
                book: 0,
                class,
                sampled: true,
                deflate: false,
                project: "bench".to_owned(),
                resumable: true,
            });
            let mut served =
                Self { session, tally: Tally::new(clock, vec![book]), scanner: Scanner::default() };
            served.says(br#"{"type":"connection.established","resume_token":"token"}"#);
            assert_eq!(served.session.phase, Phase::Subscribing(0));
            served.says(
                br#"{"type":"subscription.confirmed","project_id":"bench-0","epoch":"e","offset":5,"state":{"tasks":[{"offset":3}]}}"#,
            );
            assert_eq!(served.session.phase, Phase::Ready);
            if class == Class::Prompt {
                served.tally.books[0].join(&served.session.plan.sequence);
                served.session.has_joined = true;
            }
            served
        }

        fn says(&mut self, payload: &[u8]) {
            let mut frame = vec![0x81, 126];
            frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
            frame.extend(payload);
            self.bytes(&frame);
        }

        fn bytes(&mut self, bytes: &[u8]) {
            let Self { session, tally, scanner } = self;
            scanner.scan(bytes, |frame| session.take(frame, Some(1), tally)).unwrap();
        }

        /// Publishes so many events and lets these arrive, with what the server adds.
        fn delivers(&mut self, published: u32, arriving: &[u32], added: &str) {
            let texts: Vec<String> = (0..published)
                .map(|_| String::from_utf8(self.tally.books[0].publish(0).unwrap().to_vec()).unwrap())
                .collect();
            for &n in arriving {
                let text = texts[n as usize].trim_end_matches('}');
                self.says(format!("{text},\"offset\":{}{added}}}", n + 6).as_bytes());
            }
        }

        fn errors(&self) -> Vec<(&'static str, u64)> {
            self.tally.errors.iter().map(|(kind, count, _)| (kind, count)).collect()
        }
    }

    #[test]
    fn a_server_that_loses_repeats_or_reorders_events_is_found_out() {
        for (arriving, errors, deliveries) in [
            (&[0, 1, 2, 3][..], &[][..], 4),
            (&[0, 3], &[("missing", 2)], 2),
            (&[0, 1, 1, 2, 3], &[("repeated", 1)], 4),
            (&[0, 2, 1, 3], &[("missing", 1), ("out of order", 1)], 3),
        ] {
            let mut served = Served::start(Mix::Latest, Class::Prompt);
            served.delivers(4, arriving, "");
            assert_eq!(served.errors(), errors, "{arriving:?}");
            let book = &served.tally.books[0];
            assert_eq!((book.deliveries, book.on_the_way()), (deliveries, 0), "{arriving:?}");
        }
    }

    #[test]
    fn folded_progress_is_no_loss_and_a_folded_durable_event_is_one() {
        let mut served = Served::start(Mix::Latest, Class::Slow);
        served.delivers(4, &[3], ",\"folded\":3");
        assert_eq!((served.errors(), served.tally.books[0].folded), (vec![], 3));
        let mut served = Served::start(Mix::Durable, Class::Slow);
        served.delivers(4, &[3], ",\"folded\":3");
        assert_eq!(served.errors(), [("missing", 3)]);
    }

    #[test]
    fn an_event_that_nobody_published_is_an_error() {
        let mut served = Served::start(Mix::Latest, Class::Prompt);
        served.says(b"{\"n\":\"00000007\",\"type\":\"a.b\"}");
        assert_eq!(served.errors(), [("unknown", 1)]);
    }

    #[test]
    fn pings_are_answered_and_a_close_is_counted_with_what_was_on_the_way() {
        let mut served = Served::start(Mix::Latest, Class::Prompt);
        served.session.out.clear();
        served.bytes(&[0x89, 2, b'h', b'i']);
        assert_eq!(served.session.out, [0x8A, 0x82, 0, 0, 0, 0, b'h', b'i']);
        served.delivers(3, &[0], "");
        served.bytes(&[0x88, 2, 0x11, 0x9C]);
        assert_eq!(served.errors(), [("closed", 1), ("missing", 2)]);
        assert_eq!(served.tally.books[0].on_the_way(), 0);
    }

    #[test]
    fn a_slow_connection_may_be_closed() {
        let mut served = Served::start(Mix::Latest, Class::Slow);
        served.bytes(&[0x88, 5, 0x11, 0x9C, b'b', b'y', b'e']);
        assert_eq!(served.errors(), []);
        assert_eq!(served.tally.slow_closed.get("4508 bye"), Some(&1));
    }

    #[test]
    fn a_cut_connection_resumes_where_it_was_or_subscribes_with_since() {
        let mut served = Served::start(Mix::Latest, Class::Prompt);
        served.delivers(2, &[0, 1], "");
        let sent = |served: &Served| String::from_utf8_lossy(&served.session.out).into_owned();
        served.session.resume();
        let resume = sent(&served);
        assert!(resume.contains(r#""token":"token""#), "{resume}");
        assert!(resume.contains(r#""positions":{"bench-0":{"epoch":"e","offset":7}}"#), "{resume}");
        served.session.out.clear();
        served.says(br#"{"type":"connection.established","resume_token":"next"}"#);
        served.says(br#"{"type":"error","code":"resume_expired"}"#);
        let subscribe = sent(&served);
        assert!(subscribe.contains(r#""since":{"epoch":"e","offset":7}"#), "{subscribe}");
        served.says(
            br#"{"type":"subscription.confirmed","project_id":"bench-0","epoch":"e","offset":7,"recovered":true}"#,
        );
        assert_eq!((&served.session.phase, served.errors()), (&Phase::Ready, vec![]));
        served.session.resume();
        assert!(sent(&served).contains(r#""token":"next""#));
        served.says(
            br#"{"type":"subscription.confirmed","project_id":"bench-0","epoch":"f","offset":0,"recovered":false}"#,
        );
        assert_eq!(served.errors(), [("not recovered", 1)]);
    }
}
