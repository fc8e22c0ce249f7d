//! Appending: one call at a time for each stream, so that its order is that in which it was asked for; what comes meanwhile goes
//! with the next call.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tidings_protocol::{Epoch, Position, StreamId};
use tokio::sync::oneshot;

use crate::{
    engine::{Appended, EngineError, NumberedEvent},
    random,
};

use super::{
    Shared, key_of,
    servers::{Call, Fault},
    stored::encode_event,
};

/// Events and bytes of one call, unless a single request has more: Redis does nothing else meanwhile.
const CALL_EVENTS_MAX: usize = 512;
const CALL_BYTES_MAX: usize = 1024 * 1024;
/// Bytes that may wait for Redis; beyond them nothing is accepted.
const WAITING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What waits to be appended. A stream is in it as long as a call for it is under way.
#[derive(Default)]
pub(super) struct Queues {
    waiting: Mutex<HashMap<StreamId, VecDeque<Request>>>,
    bytes: AtomicUsize,
}

/// Where each event of a request has its place, if it got one.
type Answer = Result<Vec<Option<Position>>, Fault>;

/// Events for one stream, to be appended together.
struct Request {
    source: &'static str,
    events: Vec<Encoded>,
    bytes: usize,
    reply: oneshot::Sender<Answer>,
}

struct Encoded {
    id: String,
    number: String,
    bytes: Vec<u8>,
}

impl Shared {
    /// Appends events; those whose number the stream has had of this source are left out, and have no place in the answer.
    pub(super) async fn append(
        self: &Arc<Self>,
        source: &'static str,
        events: Vec<NumberedEvent>,
    ) -> Result<Vec<Option<Appended>>, EngineError> {
        let now = self.now();
        let mut places = Vec::with_capacity(events.len());
        let mut requests: Vec<(StreamId, Vec<Encoded>)> = Vec::new();
        for NumberedEvent { number, event } in events {
            let stream = event.stream();
            let id = event.id().map(|id| id.as_str().to_owned()).unwrap_or_default();
            let encoded = Encoded { id, number, bytes: encode_event(&event, now) };
            let place = requests.iter().rposition(|(of, _)| *of == stream).unwrap_or_else(|| {
                requests.push((stream, Vec::new()));
                requests.len() - 1
            });
            places.push((place, requests[place].1.len()));
            requests[place].1.push(encoded);
        }
        let asked: Vec<_> =
            requests.into_iter().map(|(stream, events)| self.ask(source, stream, events)).collect();
        let mut answers = Vec::with_capacity(asked.len());
        for (stream, answer) in asked {
            let gone = || Fault::Unknown("the service stops".to_owned());
            answers.push((stream, answer.await.unwrap_or_else(|_| Err(gone()))?));
        }
        let appended = places.into_iter().map(|(request, event)| {
            let (stream, positions) = &answers[request];
            positions[event].clone().map(|position| Appended { stream: stream.clone(), position })
        });
        Ok(appended.collect())
    }

    fn ask(
        self: &Arc<Self>,
        source: &'static str,
        stream: StreamId,
        events: Vec<Encoded>,
    ) -> (StreamId, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        let bytes = events.iter().map(|event| event.bytes.len()).sum();
        if self.queues.bytes.fetch_add(bytes, Relaxed) + bytes > WAITING_BYTES_MAX {
            self.queues.bytes.fetch_sub(bytes, Relaxed);
            // Nobody can have stopped waiting yet.
            let _ = reply.send(Err(Fault::NoEffect("too much waits for Redis already".to_owned())));
            return (stream, answer);
        }
        let request = Request { source, events, bytes, reply };
        let mut waiting = self.queues.waiting.lock();
        if let Some(queue) = waiting.get_mut(&stream) {
            queue.push_back(request);
        } else {
            waiting.insert(stream.clone(), VecDeque::from([request]));
            drop(waiting);
            // Not ended by a stop: what was accepted is appended, in a bounded time.
            self.tasks.spawn(Arc::clone(self).append_waiting(stream.clone()));
        }
        (stream, answer)
    }

    async fn append_waiting(self: Arc<Self>, stream: StreamId) {
        let key = key_of(&stream);
        loop {
            let requests = {
                let mut waiting = self.queues.waiting.lock();
                let Some(queue) = waiting.get_mut(&stream) else { return };
                let requests = next_requests(queue);
                if requests.is_empty() {
                    waiting.remove(&stream);
                    return;
                }
                requests
            };
            let result = self.append_call(&stream, &key, &requests).await;
            self.queues.bytes.fetch_sub(requests.iter().map(|request| request.bytes).sum(), Relaxed);
            reply(requests, result);
        }
    }

    async fn append_call(
        self: &Arc<Self>,
        stream: &StreamId,
        key: &str,
        requests: &[Request],
    ) -> Result<(Epoch, Vec<u64>), Fault> {
        let source = requests[0].source;
        let mut arguments: Vec<&[u8]> = Vec::with_capacity(4 + 3 * requests.len());
        let (epoch, now) = (random::hex::<10>(), (self.now().as_millisecond() / 1000).to_string());
        arguments.extend([epoch.as_bytes(), now.as_bytes(), self.publish.as_bytes(), source.as_bytes()]);
        for event in requests.iter().flat_map(|request| &request.events) {
            arguments.extend([event.id.as_bytes(), event.number.as_bytes(), &event.bytes]);
        }
        // What has a number is not appended twice.
        let call = Call::script(key, &self.scripts.append, &arguments, !source.is_empty());
        let answer = self.servers.call(&call).await?;
        let mut parts: Vec<redis::Value> = redis::from_redis_value(answer)?;
        if parts.len() < 2 {
            return Err(Fault::Unknown("an append was answered with too little".to_owned()));
        }
        let offsets = parts.split_off(2).into_iter().map(redis::from_redis_value);
        let offsets = offsets.collect::<Result<Vec<u64>, _>>()?;
        let wants_snapshot: bool = redis::from_redis_value_ref(&parts[1])?;
        if wants_snapshot {
            self.spawn(Arc::clone(self).make_snapshot(stream.clone()));
        }
        let epoch = Epoch::new(redis::from_redis_value_ref::<String>(&parts[0])?);
        if let Some(mirror) = self.mirrors.lock().get_mut(stream)
            && let Some(&offset) = offsets.iter().max()
        {
            mirror.acknowledge(Position { epoch: epoch.clone(), offset });
        }
        Ok((epoch, offsets))
    }
}

/// What goes with the next call: of one source, as much as is good for Redis.
fn next_requests(queue: &mut VecDeque<Request>) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    let (mut events, mut bytes) = (0, 0);
    while let Some(next) = queue.front() {
        if let Some(first) = requests.first()
            && (next.source != first.source
                || events + next.events.len() > CALL_EVENTS_MAX
                || bytes + next.bytes > CALL_BYTES_MAX)
        {
            break;
        }
        (events, bytes) = (events + next.events.len(), bytes + next.bytes);
        requests.extend(queue.pop_front());
    }
    requests
}

/// Gives everybody his part of the answer.
fn reply(requests: Vec<Request>, result: Result<(Epoch, Vec<u64>), Fault>) {
    let mut offsets = Vec::new().into_iter();
    let result = result.map(|(epoch, appended)| {
        offsets = appended.into_iter();
        epoch
    });
    for request in requests {
        let positions = result.clone().map(|epoch| {
            let of_request = offsets.by_ref().take(request.events.len());
            // 0 is no offset of an event.
            of_request
                .map(|offset| (offset > 0).then(|| Position { epoch: epoch.clone(), offset }))
                .collect::<Vec<_>>()
        });
        // Who does not wait any more needs no answer.
        let _ = request.reply.send(positions);
    }
}
