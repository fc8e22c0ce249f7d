//! How a connection comes to follow a stream, falls behind it, and catches up.
//!
//! A subscription is linked to the stream's tail first, which holds from then on what comes; then the engine is asked up
//! to where the past reaches; then the past is written, and the tail goes on behind it. So there is no moment in which an
//! event is neither read nor held, and none in which it is both and not recognised. Who falls behind takes the same way.

use std::{collections::VecDeque, sync::Arc};

use tidings_protocol::{CloseCode, Offset, Position, RemovalReason, ServerMessage, StreamId, TypeFilter};

use crate::{
    engine::{CatchUp, EngineError, HistoryPage, Joined, PageLimit, Record},
    saved::SavedConnection,
    session,
};

use super::{
    Answer, Asker, ConnectionKey, Effect, Followed, Member, Question, Selection, Shard, Socket,
    client::{Behind, Client, Joining, Link, Phase, Subscribing},
    pass::VISIT_BYTES,
};

/// Questions that one connection may have open at the engine.
const JOINING_MAX: u16 = 16;
/// While more than this waits for a client, what it asks for waits as well: who asks for more than it reads fills its own
/// socket and not this memory.
pub(super) const ANSWER_ROOM_BYTES: usize = 256 * 1024;
/// What a client that is behind reads at once.
const PAGE: PageLimit = PageLimit { records: 64, bytes: 256 * 1024, folded: true };

impl<S: Socket> Shard<S> {
    /// Takes what the engine answered.
    pub fn answer(&mut self, answer: Answer) {
        match answer {
            Answer::Joined(asker, joined) => self.joined(&asker, joined),
            Answer::Read(asker, page) => self.page_read(&asker, page),
            Answer::TakenOver(key, former) => self.taken_over(key, former),
        }
    }

    /// The stream's place in the shard; it is followed from now on.
    pub(super) fn follow(&mut self, stream: &StreamId) -> usize {
        if let Some(&number) = self.by_stream.get(stream) {
            return number;
        }
        let number = self.followed.insert(Followed::new(stream.clone()));
        self.by_stream.insert(stream.clone(), number);
        self.effects.push(Effect::Follow(stream.clone()));
        number
    }

    /// Links a connection to a stream's tail: nothing of what comes from now on is missed.
    pub(super) fn link(&mut self, index: usize, stream: usize, selection: &Selection, told: Offset) -> usize {
        let client = &mut self.clients[index];
        let followed = &mut self.followed[stream];
        self.cohorts_made += 1;
        let cohort = followed.cohort(client.encoding, selection, self.cohorts_made);
        let members = &mut followed.cohorts[cohort].members;
        members.push(Member { client: index, link: client.links.len() });
        let member = members.len() - 1;
        let cursor = followed.cohorts[cohort].tail.end();
        client.links.push(Link { stream, cohort, member, cursor, told, phase: Phase::Live });
        if followed.id != StreamId::Announcements {
            self.stats.subscribed();
        }
        client.links.len() - 1
    }

    /// What the connection gets of a stream if it wants these types.
    pub(super) fn selection(&self, index: usize, stream: &StreamId, types: &Arc<TypeFilter>) -> Selection {
        // Whoever may follow a project may see all of it; only the announcements speak of several.
        let projects = match stream {
            StreamId::Announcements => self.sessions.of(self.clients[index].seat).announced.clone(),
            StreamId::Project(_) => None,
        };
        Selection { types: Arc::clone(types), projects }
    }

    pub(super) fn link_to(&self, index: usize, stream: &StreamId) -> Option<usize> {
        let number = *self.by_stream.get(stream)?;
        self.clients.get(index)?.links.iter().position(|link| link.stream == number)
    }

    /// Takes a link away, wherever it is.
    pub(super) fn unlink(&mut self, index: usize, number: usize) {
        let client = &mut self.clients[index];
        let link = client.links.swap_remove(number);
        match link.phase {
            Phase::Live => {}
            Phase::Joining(_) => client.joining -= 1,
            Phase::Behind(_) => client.behind -= 1,
        }
        // Two swaps, two places to correct.
        if let Some(moved) = client.links.get(number) {
            self.followed[moved.stream].cohorts[moved.cohort].members[moved.member].link = number;
        }
        let followed = &mut self.followed[link.stream];
        let cohort = &mut followed.cohorts[link.cohort];
        cohort.members.swap_remove(link.member);
        if let Some(moved) = cohort.members.get(link.member) {
            self.clients[moved.client].links[moved.link].member = link.member;
        }
        if cohort.members.is_empty() {
            cohort.members = Vec::new();
            self.tail_bytes -= cohort.tail.trim(u64::MAX);
            cohort.tail.shrink();
            followed.is_left(link.cohort);
        }
        if followed.id != StreamId::Announcements {
            self.stats.unsubscribed();
        }
        if !followed.is_followed() {
            let followed = self.followed.remove(link.stream);
            self.by_stream.remove(&followed.id);
            self.dirty.retain(|dirty| *dirty != link.stream);
            self.effects.push(Effect::Unfollow(followed.id));
        }
    }

    pub(super) fn unlink_all(&mut self, index: usize) {
        while !self.clients[index].links.is_empty() {
            self.unlink(index, self.clients[index].links.len() - 1);
        }
    }

    pub(super) fn unsubscribe(&mut self, index: usize, stream: &StreamId) {
        if let Some(&number) = self.by_stream.get(stream).filter(|_| self.clients[index].flags.withheld) {
            // What is frozen must not come behind the end of its subscription.
            self.clients[index].drop_unwritten(|of| of == number);
        }
        if let Some(reading) = &mut self.clients[index].reading {
            reading.waiting.retain(|waiting| waiting.stream != *stream);
        }
        if let Some(number) = self.link_to(index, stream) {
            self.unlink(index, number);
        }
        self.mark_unsaved(index);
    }

    /// Whether the connection follows the stream, or asked to.
    pub(super) fn follows(&self, index: usize, stream: &StreamId) -> bool {
        let waits = |waiting: &VecDeque<Subscribing>| waiting.iter().any(|waiting| waiting.stream == *stream);
        self.link_to(index, stream).is_some()
            || self.clients[index].reading.as_ref().is_some_and(|reading| waits(&reading.waiting))
    }

    /// Starts a subscription: links it, and asks the engine where it begins. A former one to the same stream ends here.
    pub(super) fn join(&mut self, index: usize, subscribing: Subscribing) {
        let Subscribing { stream, types, since, id } = subscribing;
        let number = self.follow(&stream);
        let selection = self.selection(index, &stream, &types);
        let former = self.link_to(index, &stream);
        // The new link comes first, so that the stream stays followed; then it takes the former one's place.
        let mut link = self.link(index, number, &selection, 0);
        if let Some(former) = former {
            self.unlink(index, former);
            link = former;
        }
        self.ask_join(index, link, since, id);
        self.mark_unsaved(index);
    }

    fn ask_join(
        &mut self,
        index: usize,
        number: usize,
        since: Option<Position>,
        id: Option<tidings_protocol::MessageId>,
    ) {
        self.tickets += 1;
        let client = &mut self.clients[index];
        client.joining += 1;
        let link = &mut client.links[number];
        let followed = &self.followed[link.stream];
        let cohort = &followed.cohorts[link.cohort];
        link.cursor = cohort.tail.end();
        link.phase = Phase::Joining(Box::new(Joining { ticket: self.tickets, since: since.clone(), id }));
        let asker = Asker { key: client.key, stream: followed.id.clone(), ticket: self.tickets };
        let types = Arc::clone(&cohort.selection.types);
        self.effects.push(Effect::Ask(Question::Join { asker, since, types }));
        self.hold(index);
    }

    /// Goes on with what the client asked for, as far as there is room for the answers; then it may ask for more.
    pub(super) fn pump(&mut self, index: usize) {
        self.start_waiting(index);
        if self.clients.contains(index) {
            self.read_again(index);
        }
    }

    pub(super) fn start_waiting(&mut self, index: usize) {
        let is_served = |client: &&Client<S>| client.closing.is_none() && !client.flags.withheld;
        while let Some(client) = self.clients.get(index).filter(is_served) {
            let room = client.outgoing_bytes() < ANSWER_ROOM_BYTES && client.joining < JOINING_MAX;
            let next = client.reading.as_ref().filter(|_| room).and_then(|reading| reading.waiting.front());
            // One that replaces another waits for the other's answer, so that each is confirmed.
            let Some(next) = next.filter(|next| !self.is_joining(index, &next.stream)) else { return };
            let next = next.clone();
            if let Some(reading) = &mut self.clients[index].reading {
                reading.waiting.pop_front();
            }
            if self.may_see(index, &next.stream) {
                self.join(index, next);
            } else {
                // The former connection, or this one when it asked, was allowed to.
                self.removed(index, &next.stream, RemovalReason::Rights, next.id);
                self.mark_unsaved(index);
                self.ready.push(index);
            }
        }
    }

    fn is_joining(&self, index: usize, stream: &StreamId) -> bool {
        let link = self.link_to(index, stream).and_then(|number| self.clients[index].links.get(number));
        link.is_some_and(|link| matches!(link.phase, Phase::Joining(_)))
    }

    fn link_of(&self, asker: &Asker, ticket_of: impl Fn(&Phase) -> Option<u64>) -> Option<(usize, usize)> {
        let index = self.index_of(asker.key)?;
        let number = self.link_to(index, &asker.stream)?;
        let open = ticket_of(&self.clients[index].links[number].phase);
        (open == Some(asker.ticket)).then_some((index, number))
    }

    fn joined(&mut self, asker: &Asker, joined: Result<Joined, EngineError>) {
        let ticket = |phase: &Phase| match phase {
            Phase::Joining(joining) => Some(joining.ticket),
            _ => None,
        };
        // An answer to somebody who has left, or has asked anew.
        let Some((index, number)) = self.link_of(asker, ticket) else { return };
        let Ok(Joined { position, catch_up }) = joined else {
            // Without the engine there is nothing to confirm, and a client that comes back finds it or another node.
            return self.close_when_written(index, CloseCode::TryAgainLater);
        };
        let stream = self.clients[index].links[number].stream;
        self.learn_position(stream, &position);
        let client = &mut self.clients[index];
        client.joining -= 1;
        client.behind += 1;
        let link = &mut client.links[number];
        let Phase::Joining(joining) = std::mem::replace(&mut link.phase, Phase::Live) else { return };
        let (offset, recovered, state, missed) = match (catch_up, joining.since) {
            (CatchUp::Recovered(records), Some(since)) => (since.offset, Some(true), None, records),
            (CatchUp::Recovered(_), None) => unreachable!("without `since` there is nothing to recover"),
            (CatchUp::State(state), since) => {
                (position.offset, since.map(|_| false), Some(state), Vec::new())
            }
        };
        let cohort = &self.followed[stream].cohorts[link.cohort];
        let start =
            cohort.tail.cursor_behind(position.offset).and_then(|cursor| cohort.tail.next_frame(cursor));
        link.told = offset;
        let durable_bytes = start.map_or(cohort.durable_bytes, |frame| frame.durable_before);
        link.phase = Phase::Behind(Box::new(Behind {
            page: missed.into(),
            page_to: position.offset,
            reaches_tail: !client.flags.withheld,
            counted_from: position.offset,
            excused: client.flags.withheld,
            ..Behind::at(offset, durable_bytes)
        }));
        let confirmed = ServerMessage::SubscriptionConfirmed {
            timestamp: self.now.wall,
            id: joining.id,
            project_id: asker.stream.to_string(),
            epoch: position.epoch.clone(),
            offset,
            recovered,
            state,
        };
        self.send_at(index, number, &confirmed, &Position { offset, ..position });
        self.ready.push(index);
        self.pump(index);
    }

    /// The engine said where a stream stands of which nothing has come yet.
    fn learn_position(&mut self, stream: usize, position: &Position) {
        let followed = &mut self.followed[stream];
        match &followed.epoch {
            None => followed.begin(position.epoch.clone(), position.offset),
            Some(epoch) if *epoch != position.epoch => self.rejoin_at(stream, position),
            Some(_) => {}
        }
    }

    /// The stream goes on behind `position`, in another life or behind a hole: everybody is confirmed again, from where they
    /// were.
    pub(super) fn rejoin_at(&mut self, stream: usize, position: &Position) {
        let followed = &mut self.followed[stream];
        let Some(former) = followed.epoch.clone() else { return };
        let (mut again, head) = (Vec::new(), followed.head);
        for cohort in &followed.cohorts {
            for member in &cohort.members {
                let link = &self.clients[member.client].links[member.link];
                let at = match &link.phase {
                    Phase::Live => cohort.offset_at(link.cursor, head),
                    Phase::Behind(behind) => behind.at,
                    // It is told about its new life by the answer that it waits for.
                    Phase::Joining(_) => continue,
                };
                again.push((member.client, member.link, Position { epoch: former.clone(), offset: at }));
            }
        }
        for cohort in &mut followed.cohorts {
            self.tail_bytes -= cohort.tail.trim(u64::MAX);
        }
        self.followed[stream].begin(position.epoch.clone(), position.offset);
        for (index, number, since) in again {
            let client = &mut self.clients[index];
            if let Phase::Behind(_) = client.links[number].phase {
                client.behind -= 1;
            }
            self.ask_join(index, number, Some(since), None);
        }
    }

    fn page_read(&mut self, asker: &Asker, page: Result<HistoryPage, EngineError>) {
        let ticket = |phase: &Phase| match phase {
            Phase::Behind(behind) => behind.ticket,
            _ => None,
        };
        let Some((index, number)) = self.link_of(asker, ticket) else { return };
        let client = &mut self.clients[index];
        let (withheld, link) = (client.flags.withheld, &mut client.links[number]);
        let Phase::Behind(behind) = &mut link.phase else { return };
        let page = match page {
            Ok(page) if page.complete => page,
            // Something durable left the history before this client took it.
            Ok(_) if behind.excused => {
                let epoch = self.followed[link.stream].epoch.clone();
                let since = epoch.map(|epoch| Position { epoch, offset: behind.at });
                client.behind -= 1;
                return self.ask_join(index, number, since, None);
            }
            Ok(_) => return self.say_close(index, CloseCode::TooSlow),
            Err(_) => return self.say_close(index, CloseCode::TryAgainLater),
        };
        behind.ticket = None;
        behind.page_to = match page.records.last() {
            Some(last) if page.more => last.offset,
            _ => page.position.offset,
        };
        behind.reaches_tail = !page.more && !withheld;
        behind.page = page.records.into();
        self.ready.push(index);
    }

    /// Moves what comes next for links that are behind to where it is written from, or asks for it.
    pub(super) fn refill(&mut self, index: usize) {
        for number in 0..self.clients[index].links.len() {
            self.refill_link(index, number);
        }
    }

    fn refill_link(&mut self, index: usize, number: usize) {
        let client = &mut self.clients[index];
        let link = &mut client.links[number];
        let Phase::Behind(behind) = &mut link.phase else { return };
        let followed = &self.followed[link.stream];
        let cohort = &followed.cohorts[link.cohort];
        let epoch = followed.epoch.as_ref().expect("a link that was confirmed knows its stream's life");
        let outgoing = client.outgoing.get_or_insert_default();
        while outgoing.bytes() < VISIT_BYTES {
            let Some(record) = behind.page.pop_front() else { break };
            if behind.pass_over(&record, &cohort.selection) {
                let folded = std::mem::take(&mut behind.folded);
                let pieces = client.encoding.folded(&record, epoch, folded, &mut self.deflater);
                outgoing.push(Some((link.stream, record.offset)), pieces);
            }
        }
        if outgoing.is_empty() {
            client.outgoing = None;
        }
        if !behind.page.is_empty() {
            return;
        }
        behind.at = behind.at.max(behind.page_to);
        if behind.ticket.is_some() {
            return;
        }
        if behind.reaches_tail {
            if followed.head < behind.page_to {
                // What lies up to there is on its way; it marks the stream, and this is tried again.
                return;
            }
            if let Some(cursor) = cohort.tail.cursor_behind(behind.page_to) {
                link.cursor = cursor;
                link.phase = Phase::Live;
                client.behind -= 1;
                return;
            }
        }
        self.tickets += 1;
        behind.ticket = Some(self.tickets);
        behind.reaches_tail = false;
        link.cursor = cohort.tail.end();
        let asker = Asker { key: client.key, stream: followed.id.clone(), ticket: self.tickets };
        let since = Position { epoch: epoch.clone(), offset: behind.at };
        self.effects.push(Effect::Ask(Question::Read { asker, since, limit: PAGE }));
        self.hold(index);
    }

    /// Looks at a client whose socket takes no more: what waits too long or is too much it gets folded, from the history,
    /// and the tail lets go of it. Too much of what cannot be folded ends the connection.
    pub(super) fn fall_behind(&mut self, index: usize) {
        let now_ms = self.now.ms;
        let too_old = move |at_ms: u64, age_ms: u64| now_ms.saturating_sub(at_ms) > age_ms;
        let (age_ms, bytes_max) = (self.options.behind_age_ms, self.options.behind_bytes as u64);
        self.let_go(index, |waiting_bytes, oldest_ms| {
            waiting_bytes > bytes_max || too_old(oldest_ms, age_ms)
        });
        let Some(client) = self.clients.get(index) else { return };
        let too_slow = !client.flags.withheld
            && client.links.iter().any(|link| match &link.phase {
                Phase::Behind(behind) => {
                    let cohort = &self.followed[link.stream].cohorts[link.cohort];
                    cohort.durable_bytes.saturating_sub(behind.durable_bytes) > self.options.slow_bytes_max
                }
                _ => false,
            });
        if too_slow {
            self.say_close(index, CloseCode::TooSlow);
        }
    }

    /// Turns links whose waiting bytes and oldest waiting frame are `too_much` from the tail to the history.
    pub(super) fn let_go(&mut self, index: usize, too_much: impl Fn(u64, u64) -> bool) {
        let Some(client) = self.clients.get_mut(index) else { return };
        for link in &mut client.links {
            let followed = &self.followed[link.stream];
            let cohort = &followed.cohorts[link.cohort];
            let Some(next) = cohort.tail.next_frame(link.cursor) else { continue };
            if !too_much(cohort.tail.end() - link.cursor, next.at_ms) {
                continue;
            }
            match &mut link.phase {
                Phase::Live => {
                    let at = next.offset - 1;
                    link.phase = Phase::Behind(Box::new(Behind::at(at, next.durable_before)));
                    client.behind += 1;
                    self.stats.fell_behind();
                }
                Phase::Behind(behind) if behind.ticket.is_none() => behind.reaches_tail = false,
                Phase::Behind(_) | Phase::Joining(_) => {}
            }
        }
    }

    /// Lets a link take what comes next from the history, whatever that holds of it by then; `back_to`: from there, if that is
    /// before where it is.
    pub(super) fn turn_to_history(&mut self, index: usize, number: usize, back_to: Option<Offset>) {
        let client = &mut self.clients[index];
        let link = &mut client.links[number];
        let followed = &self.followed[link.stream];
        let cohort = &followed.cohorts[link.cohort];
        match &mut link.phase {
            Phase::Live => {
                let at = cohort.offset_at(link.cursor, followed.head);
                let at = back_to.map_or(at, |back_to| at.min(back_to));
                let next = cohort.tail.next_frame(link.cursor);
                let durable_bytes = next.map_or(cohort.durable_bytes, |next| next.durable_before);
                let behind =
                    Behind { counted_from: followed.head, excused: true, ..Behind::at(at, durable_bytes) };
                link.phase = Phase::Behind(Box::new(behind));
                client.behind += 1;
            }
            Phase::Behind(behind) => {
                (behind.reaches_tail, behind.excused) = (false, true);
                if let Some(back_to) = back_to.filter(|back_to| *back_to < behind.at) {
                    // An answer to a question that is open begins too far ahead.
                    (behind.at, behind.page_to, behind.folded, behind.ticket) = (back_to, back_to, 0, None);
                    behind.page.clear();
                }
            }
            Phase::Joining(_) => {}
        }
    }

    pub(super) fn ask_take_over(&mut self, index: usize, token: crate::saved::ResumeToken) {
        let successor = self.saved(index);
        let client = &mut self.clients[index];
        client.flags.resuming = true;
        client.flags.unsaved = false;
        let question = Question::TakeOver { key: client.key, token, successor };
        self.effects.push(Effect::Ask(question));
    }

    fn taken_over(&mut self, key: ConnectionKey, former: Result<Option<SavedConnection>, EngineError>) {
        let Some(index) = self.index_of(key) else { return };
        let client = &mut self.clients[index];
        client.flags.resuming = false;
        if client.closing.is_some() {
            // It is on its way out, and what it took over goes with it: its own token stands for that.
            if let Ok(Some(former)) = former {
                client.id = former.client;
            }
            return;
        }
        let resume = client.reading.get_or_insert_default().resuming.take();
        let (id, positions) = resume.map_or((None, Vec::new()), |resume| (resume.id, resume.positions));
        match former {
            Ok(Some(former)) => {
                client.id = former.client;
                let resumed = ServerMessage::ConnectionResumed {
                    timestamp: self.now.wall,
                    id,
                    client_id: former.client.to_string(),
                    subscriptions: former
                        .subscriptions
                        .iter()
                        .map(|(stream, _)| stream.to_string())
                        .collect(),
                    restarted: self.options.restarted,
                };
                self.send(index, &resumed);
                let since = |stream: &StreamId| {
                    positions.iter().find(|(of, _)| of == stream).map(|(_, position)| position.clone())
                };
                let waiting = former.subscriptions.into_iter().map(|(stream, types)| {
                    let since = since(&stream);
                    Subscribing { stream, types, since, id: None }
                });
                let waiting: Vec<_> =
                    waiting.chain(announcements_since(&positions, &self.everything)).collect();
                self.clients[index].reading.get_or_insert_default().waiting.extend(waiting);
                self.stats.resumed();
            }
            Ok(None) => {
                let expired = session::resume_expired(id).into_message(self.now.wall);
                self.send(index, &expired);
                self.mark_unsaved(index);
            }
            Err(_) => return self.close_when_written(index, CloseCode::TryAgainLater),
        }
        self.ready.push(index);
        self.pump(index);
    }

    pub(super) fn removed(
        &mut self,
        index: usize,
        stream: &StreamId,
        reason: RemovalReason,
        id: Option<tidings_protocol::MessageId>,
    ) {
        let timestamp = self.now.wall;
        let project_id = stream.to_string();
        let removed = ServerMessage::SubscriptionRemoved { timestamp, id, project_id, reason };
        self.send(index, &removed);
    }
}

/// A client that says where it stood in the announcements wants what it missed of them, too.
fn announcements_since(
    positions: &[(StreamId, Position)],
    everything: &Arc<TypeFilter>,
) -> Option<Subscribing> {
    let (stream, since) = positions.iter().find(|(stream, _)| *stream == StreamId::Announcements)?;
    let types = Arc::clone(everything);
    Some(Subscribing { stream: stream.clone(), types, since: Some(since.clone()), id: None })
}

impl Behind {
    /// A link that has everything up to `at`, and takes what comes next from the history.
    fn at(at: Offset, durable_bytes: u64) -> Self {
        Self {
            at,
            folded: 0,
            page: VecDeque::new(),
            page_to: at,
            reaches_tail: false,
            ticket: None,
            counted_from: at,
            durable_bytes,
            excused: false,
        }
    }

    /// Goes past a record; whether it is for this client.
    fn pass_over(&mut self, record: &Record, selection: &Selection) -> bool {
        self.folded += record.offset - self.at - 1;
        self.at = record.offset;
        let is_for = selection.takes(record);
        if is_for && record.is_durable() && record.offset > self.counted_from {
            self.durable_bytes += record.json().len() as u64;
        }
        is_for
    }
}
