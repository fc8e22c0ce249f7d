//! Asking the application: a request's cookies are forwarded to `TIDINGS_AUTH_URL`, which says whose they are.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};

use axum::http::{HeaderValue, StatusCode, Uri};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;
use tidings_protocol::Timestamp;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use super::{
    ANSWER_TIMEOUT, Checked, Denied, Digest, Identity, Refusal, Shape,
    http::{Answer, Http},
    identity::Unreadable,
};

const BYTES_MAX: usize = 64 << 10;
/// How long a yes is good that does not say until when.
const VALID: Duration = Duration::from_mins(1);
/// No yes is good for longer, whatever it says; it is only that no clock goes further.
const VALID_MAX: Duration = Duration::from_hours(30 * 24);
/// How long a no is: a page that tries again and again with a dead session costs one question in this time. Short, because who
/// logs in may go on with the same cookie.
const DENIED: Duration = Duration::from_secs(1);
const QUESTIONS_AT_ONCE_MAX: usize = 64;
const REMEMBERED_MAX: usize = 10_000;
/// The same in bytes of answers; an answer may have long lists of projects.
const REMEMBERED_BYTES_MAX: usize = 32 << 20;

/// Asks the application whose cookies they are, and remembers what it said.
pub(crate) struct Callback(Arc<Inner>);

struct Inner {
    http: Http,
    url: Uri,
    questions: Semaphore,
    memory: Mutex<Memory>,
}

type Verdict = Result<Checked, Refusal>;
type Asking = Shared<BoxFuture<'static, Verdict>>;

/// What was said, and what is being asked, by the digest of the cookies: who reads a dump of it finds no session to take over.
#[derive(Default)]
struct Memory {
    remembered: HashMap<Digest, Remembered>,
    /// The same from the oldest on.
    by_age: BTreeMap<u64, Digest>,
    bytes: usize,
    /// Held by those who wait for the answer: when all of them have gone, nobody asks any more.
    asking: HashMap<Digest, (u64, WeakShared<BoxFuture<'static, Verdict>>)>,
    number: u64,
}

/// A definite answer.
struct Remembered {
    number: u64,
    verdict: Result<Checked, Denied>,
    until: Instant,
    bytes: usize,
}

impl Callback {
    /// Asks nothing yet.
    pub(crate) fn new(url: &Uri) -> Self {
        Self(Arc::new(Inner {
            http: Http::new(url),
            url: url.clone(),
            questions: Semaphore::new(QUESTIONS_AT_ONCE_MAX),
            memory: Mutex::default(),
        }))
    }

    /// Whose cookies they are: the header `Cookie`, as the request has it. With `refresh` the application is asked even if it
    /// has said so already. Whoever asks for the same at the same time gets the same answer.
    pub(crate) async fn check(&self, cookie_header: &str, refresh: bool) -> Verdict {
        let asking = {
            let hash = Digest::of(cookie_header.as_bytes());
            let mut memory = self.0.memory.lock();
            if let Some(verdict) = memory.recall(hash).filter(|_| !refresh) {
                return verdict;
            }
            let under_way = memory.asking.get(&hash).and_then(|(_, asking)| asking.upgrade());
            match under_way {
                Some(asking) => asking,
                None => Inner::begin(&self.0, &mut memory, hash, cookie_header)?,
            }
        };
        asking.await
    }
}

impl Inner {
    fn begin(
        this: &Arc<Self>,
        memory: &mut Memory,
        hash: Digest,
        cookie_header: &str,
    ) -> Result<Asking, Denied> {
        let cookie = HeaderValue::from_bytes(cookie_header.as_bytes()).map_err(|_| {
            Denied::new("callback_denied", "the cookies have characters that no header can have")
        })?;
        let number = memory.next_number();
        let question = Question { inner: Arc::clone(this), hash, number };
        let asking = async move {
            let inner = &question.inner;
            let (verdict, bytes) = inner.ask(cookie).await;
            inner.memory.lock().remember(hash, &verdict, bytes);
            verdict
        };
        let asking = asking.boxed().shared();
        if let Some(weak) = asking.downgrade() {
            memory.asking.insert(hash, (number, weak));
        }
        Ok(asking)
    }

    /// What the application says, and how long its answer is.
    async fn ask(&self, cookie: HeaderValue) -> (Verdict, usize) {
        let no_verdict = |words: String| (Err(Refusal::NoVerdict(format!("TIDINGS_AUTH_URL {words}"))), 0);
        let answer = timeout(ANSWER_TIMEOUT, async {
            // Never closed; and if it were, asking would do no harm.
            let _turn = self.questions.acquire().await;
            self.http.get(&self.url, Some(cookie), BYTES_MAX).await
        });
        match answer.await {
            Err(_) => no_verdict(format!("does not answer within {} s", ANSWER_TIMEOUT.as_secs())),
            Ok(Err(error)) => no_verdict(error.to_string()),
            Ok(Ok(Answer { status: StatusCode::OK, body })) => match read(&body) {
                Ok(verdict) => (verdict.map_err(Refusal::Denied), body.len()),
                Err(words) => no_verdict(words),
            },
            Ok(Ok(Answer { status: StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, .. })) => {
                let detail = "the application says that these cookies are of no session; log in again";
                (Err(Denied::new("callback_denied", detail).into()), 0)
            }
            Ok(Ok(Answer { status, .. })) if status.is_redirection() => no_verdict(format!(
                "answers {}: redirects are not followed; it must answer 200, or 401 where nobody is logged in",
                status.as_u16()
            )),
            Ok(Ok(Answer { status, .. })) => no_verdict(format!("answers {}", status.as_u16())),
        }
    }
}

/// Reads an answer. What says neither yes nor no is an error.
fn read(body: &[u8]) -> Result<Result<Checked, Denied>, String> {
    let document = serde_json::from_slice(body).map_err(|_| {
        let page = if body.trim_ascii_start().starts_with(b"<") { " but with a page" } else { "" };
        format!(r#"answers 200, and not with JSON{page}: expected `{{"user_id": …, "projects": …}}`"#)
    })?;
    let identity = match Shape::default().read(&document) {
        Ok(identity) => identity,
        Err(Unreadable::Nobody(denied)) => return Ok(Err(denied)),
        Err(Unreadable::Malformed(what)) => return Err(format!("answers 200 with something else: {what}")),
    };
    let valid_for = match identity.expires_at {
        None => VALID,
        Some(end) => {
            let left = end.as_microsecond() - Timestamp::from(jiff::Timestamp::now()).as_microsecond();
            match u64::try_from(left) {
                Ok(left) if left > 0 => Duration::from_micros(left).min(VALID_MAX),
                _ => {
                    let detail =
                        "the application says that the session has ended (`expires_at`); log in again";
                    return Ok(Err(Denied::new("expired", detail)));
                }
            }
        }
    };
    // Whether it has really ended then, the application is asked: sessions are prolonged.
    let identity = Identity { expires_at: None, ..identity };
    Ok(Ok(Checked { identity, valid_until: Some(Instant::now() + valid_for) }))
}

impl Memory {
    fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn recall(&self, hash: Digest) -> Option<Verdict> {
        let remembered = self.remembered.get(&hash).filter(|remembered| Instant::now() < remembered.until)?;
        Some(remembered.verdict.clone().map_err(Refusal::Denied))
    }

    fn remember(&mut self, hash: Digest, verdict: &Verdict, bytes: usize) {
        let (verdict, until) = match verdict {
            Ok(checked) => (Ok(checked.clone()), checked.valid_until.unwrap_or_else(Instant::now)),
            Err(Refusal::Denied(denied)) => (Err(denied.clone()), Instant::now() + DENIED),
            // What was said before stays what was said last.
            Err(Refusal::NoVerdict(_) | Refusal::Unreadable(_)) => return,
        };
        self.forget(hash);
        let number = self.next_number();
        self.by_age.insert(number, hash);
        self.bytes += bytes;
        self.remembered.insert(hash, Remembered { number, verdict, until, bytes });
        while self.remembered.len() > REMEMBERED_MAX || self.bytes > REMEMBERED_BYTES_MAX {
            let Some((_, oldest)) = self.by_age.first_key_value() else { break };
            self.forget(*oldest);
        }
    }

    fn forget(&mut self, hash: Digest) {
        if let Some(remembered) = self.remembered.remove(&hash) {
            self.by_age.remove(&remembered.number);
            self.bytes -= remembered.bytes;
        }
    }
}

/// A question under way. However it ends, the next one is another.
struct Question {
    inner: Arc<Inner>,
    hash: Digest,
    number: u64,
}

impl Drop for Question {
    fn drop(&mut self) {
        let mut memory = self.inner.memory.lock();
        // Between the last one's leaving and this there may have come a new one.
        if memory.asking.get(&self.hash).is_some_and(|(number, _)| *number == self.number) {
            memory.asking.remove(&self.hash);
        }
    }
}

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callback").field("url", &self.0.url).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use serde_json::json;
    use tidings_protocol::Projects;

    use super::{
        super::outside::{Outside, Reply, later},
        *,
    };

    async fn answering(reply: Reply) -> (Outside, Callback) {
        let outside = Outside::start(reply).await;
        let callback = Callback::new(&outside.url().parse().unwrap());
        (outside, callback)
    }

    fn yes() -> Reply {
        Reply::json(&json!({"user_id": 7, "projects": ["p1"], "admin": true}))
    }

    async fn denied(callback: &Callback, cookie: &str) -> &'static str {
        match callback.check(cookie, false).await {
            Err(Refusal::Denied(denied)) => denied.code,
            other => panic!("{other:?}"),
        }
    }

    async fn no_verdict(callback: &Callback, cookie: &str) -> String {
        match callback.check(cookie, false).await {
            Err(Refusal::NoVerdict(words)) => words,
            other => panic!("{other:?}"),
        }
    }

    fn left(checked: &Checked) -> u64 {
        checked.valid_until.unwrap().duration_since(Instant::now()).as_secs()
    }

    #[tokio::test]
    async fn the_application_is_asked_with_the_cookies_alone_and_then_not_for_a_minute() {
        let (outside, callback) = answering(yes()).await;
        let checked = callback.check("session=s3cret; theme=dark", false).await.unwrap();
        let expected = Identity {
            user: super::super::identity::user(&json!(7)).unwrap(),
            projects: Projects::listed(&["p1"]),
            admin: true,
            expires_at: None,
            issued_at: None,
        };
        assert_eq!(checked.identity, expected);
        assert!((58..=60).contains(&left(&checked)), "{}", left(&checked));
        let request = outside.request().to_lowercase();
        assert!(request.starts_with("get /asked http/1.1\r\n"), "{request}");
        assert!(request.contains("\r\ncookie: session=s3cret; theme=dark\r\n"), "{request}");
        assert!(request.contains("\r\naccept: application/json\r\n"), "{request}");
        later(Duration::from_secs(30)).await;
        let again = callback.check("session=s3cret; theme=dark", false).await.unwrap();
        assert_eq!((again.valid_until, outside.asked()), (checked.valid_until, 1));
        callback.check("session=other", false).await.unwrap();
        assert_eq!(outside.asked(), 2);
        later(Duration::from_secs(31)).await;
        callback.check("session=s3cret; theme=dark", false).await.unwrap();
        assert_eq!(outside.asked(), 3);
        assert!(!format!("{callback:?}").contains("s3cret"));
    }

    #[tokio::test]
    async fn a_yes_is_good_until_its_end_and_then_asked_again() {
        let end = jiff::Timestamp::now().as_second() + 600;
        let (outside, callback) =
            answering(Reply::json(&json!({"user_id": "u", "projects": "*", "expires_at": end}))).await;
        let checked = callback.check("c", false).await.unwrap();
        assert!((597..=600).contains(&left(&checked)), "{}", left(&checked));
        assert_eq!(checked.identity.expires_at, None);
        later(Duration::from_secs(590)).await;
        callback.check("c", false).await.unwrap();
        assert_eq!(outside.asked(), 1);
        later(Duration::from_secs(11)).await;
        callback.check("c", false).await.unwrap();
        assert_eq!(outside.asked(), 2);
        outside.replies(Reply::json(&json!({"user_id": "u", "expires_at": "9999-01-01T00:00:00Z"})));
        assert_eq!(left(&callback.check("d", false).await.unwrap()) / 86_400, 29);
        outside.replies(Reply::json(&json!({"user_id": "u", "expires_at": 1})));
        assert_eq!(denied(&callback, "e").await, "expired");
    }

    #[tokio::test]
    async fn a_no_is_believed_and_asked_again_after_five_seconds() {
        for (reply, code) in [
            (Reply::status("401 Unauthorized"), "callback_denied"),
            (Reply::new("403 Forbidden", "", "<html>"), "callback_denied"),
            (Reply::json(&json!({"user_id": null, "projects": "*"})), "no_user"),
            (Reply::json(&json!({})), "no_user"),
        ] {
            let (outside, callback) = answering(reply).await;
            for _ in 0..20 {
                assert_eq!(denied(&callback, "c").await, code);
            }
            assert_eq!(outside.asked(), 1);
            later(Duration::from_secs(6)).await;
            outside.replies(yes());
            callback.check("c", false).await.unwrap();
        }
        let (outside, callback) = answering(yes()).await;
        assert_eq!(denied(&callback, "a\nb").await, "callback_denied");
        assert_eq!(outside.asked(), 0);
    }

    #[tokio::test]
    async fn everything_else_is_no_verdict_and_is_not_remembered() {
        let other = Outside::start(yes()).await;
        let location = format!("location: {}\r\n", other.url());
        let large = json!({"user_id": "u", "more": "x".repeat(64 << 10)});
        for (reply, words) in [
            (Reply::new("302 Found", &location, ""), "401 where nobody is logged in"),
            (Reply::new("307 Temporary Redirect", &location, ""), "redirects are not followed"),
            (Reply::status("204 No Content"), "answers 204"),
            (Reply::status("404 Not Found"), "answers 404"),
            (Reply::status("500 Internal Server Error"), "answers 500"),
            (Reply::json(&large), "more than 65536 bytes"),
            (Reply::new("200 OK", "content-encoding: gzip\r\n", "{}"), "compressed"),
            (Reply::new("200 OK", "", "\n<html>log in"), "with a page"),
            (Reply::new("200 OK", "", ""), "not with JSON"),
            (Reply::json(&json!([])), "an object"),
            (Reply::json(&json!({"user_id": "u", "projects": "p1"})), "/projects"),
            (Reply::hang_up(), "cannot be reached"),
        ] {
            let (outside, callback) = answering(reply).await;
            let told = no_verdict(&callback, "session=s3cret").await;
            assert!(told.contains(words) && told.starts_with("TIDINGS_AUTH_URL"), "{words}: {told}");
            assert!(!told.contains("s3cret"), "{told}");
            outside.replies(yes());
            callback.check("session=s3cret", false).await.unwrap();
        }
        assert_eq!(other.asked(), 0);
    }

    #[tokio::test]
    async fn a_slow_application_gives_no_verdict_after_two_seconds() {
        let (outside, callback) = answering(yes().after(Duration::from_secs(4))).await;
        let begun = Instant::now();
        // More than may ask at once, so that some wait all the time for their turn.
        let cookies: Vec<_> = (0..100).map(|number| number.to_string()).collect();
        let asking = join_all(cookies.iter().map(|cookie| callback.check(cookie, false)));
        let meanwhile = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            outside.asked()
        };
        let (answers, asked) = tokio::join!(asking, meanwhile);
        assert!(begun.elapsed() < Duration::from_millis(3500), "{:?}", begun.elapsed());
        let is_slow = |answer: &Verdict| matches!(answer, Err(Refusal::NoVerdict(words)) if words.contains("within 2 s"));
        assert!(answers.iter().all(is_slow));
        assert_eq!(asked, QUESTIONS_AT_ONCE_MAX);
    }

    #[tokio::test]
    async fn many_who_ask_for_the_same_share_one_question_and_it_ends_when_all_have_left() {
        let (outside, callback) = answering(yes().after(Duration::from_millis(500))).await;
        let ask = |refresh| callback.check("c", refresh);
        let impatient = tokio::time::timeout(Duration::from_millis(20), ask(false));
        let (left, all) = tokio::join!(impatient, join_all((0..200).map(|number| ask(number % 2 == 0))));
        assert!(left.is_err() && all.iter().all(Result::is_ok));
        assert_eq!(outside.asked(), 1);
        callback.check("c", true).await.unwrap();
        assert_eq!(outside.asked(), 2);
        assert!(tokio::time::timeout(Duration::from_millis(50), ask(true)).await.is_err());
        assert!(callback.0.memory.lock().asking.is_empty());
        ask(true).await.unwrap();
        assert_eq!(callback.0.questions.available_permits(), QUESTIONS_AT_ONCE_MAX);
    }

    #[tokio::test]
    async fn a_refresh_that_is_denied_replaces_what_was_said_and_one_without_a_verdict_does_not() {
        let (outside, callback) = answering(yes()).await;
        callback.check("c", false).await.unwrap();
        outside.replies(Reply::status("500 Internal Server Error"));
        assert!(matches!(callback.check("c", true).await, Err(Refusal::NoVerdict(_))));
        callback.check("c", false).await.unwrap();
        outside.replies(Reply::status("401 Unauthorized"));
        assert!(matches!(callback.check("c", true).await, Err(Refusal::Denied(_))));
        assert_eq!(denied(&callback, "c").await, "callback_denied");
    }

    #[tokio::test]
    async fn what_is_remembered_has_a_limit_in_number_and_in_bytes() {
        let verdict = Err(Denied::new("callback_denied", "").into());
        let mut memory = Memory::default();
        let hash = |number: usize| Digest::of(number.to_string().as_bytes());
        for number in 0..REMEMBERED_MAX + 5 {
            memory.remember(hash(number), &verdict, 10);
            // One that is asked for again and again takes one place.
            memory.remember(hash(number), &verdict, 10);
        }
        assert_eq!((memory.remembered.len(), memory.by_age.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
        assert_eq!(memory.bytes, REMEMBERED_MAX * 10);
        assert!(memory.recall(hash(4)).is_none() && memory.recall(hash(5)).is_some());
        for number in 0..1000 {
            memory.remember(hash(number), &verdict, BYTES_MAX);
        }
        assert_eq!(memory.remembered.len(), REMEMBERED_BYTES_MAX / BYTES_MAX);
    }

    #[tokio::test]
    async fn connections_are_used_again() {
        let (outside, callback) = answering(yes()).await;
        for cookie in ["a", "b", "c"] {
            callback.check(cookie, false).await.unwrap();
        }
        assert_eq!((outside.asked(), outside.connections()), (3, 1));
    }
}
