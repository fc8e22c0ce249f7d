//! The HTTP edge: one file for each route, put together here.

mod body;
mod config;
mod console;
mod doctor;
mod events;
mod health;
mod history;
mod metrics;
mod problem;
mod revoke;
mod schema;
mod sse;
mod tasks;
mod tickets;
mod ws;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, Request, State},
    http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{Next, from_fn_with_state, map_response},
    response::Response,
    routing::{get, post},
};
use parking_lot::Mutex;
use tidings_engine::{Node, driver::Guard, engine::EngineError};
use tidings_protocol::ProjectId;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::{
    accept,
    access::{Access, Refusal as KeyRefusal},
    admission::{Admission, Refused},
    auth::{Auth, Denied, Refusal, Session},
    burst::Bursts,
    config::{Environment, Scope, Settings},
    ingest::Ingest,
    keys::Key,
    metrics::Metrics,
    sources::celery::{Registrar, Status},
};

use problem::Problem;

/// What the routes share.
#[derive(Debug)]
pub(crate) struct Edge {
    pub(crate) settings: Arc<Settings>,
    pub(crate) access: Access,
    pub(crate) auth: Arc<Auth>,
    pub(crate) admission: Admission,
    pub(crate) refusals: Bursts<&'static str>,
    /// Requests that were refused, by why and the name of their key.
    pub(crate) denials: Bursts<(&'static str, Arc<str>)>,
    /// Taken by each WebSocket that was let in to be told that there is no room.
    pub(crate) turning_away: Arc<Semaphore>,
    pub(crate) node: Arc<Node>,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    /// Takes registrations of Celery's tasks, and how the bridge is; `None`: there is none.
    pub(crate) registrar: Option<Registrar>,
    pub(crate) celery: Option<Arc<Mutex<Status>>>,
    /// The port that the public listener got.
    pub(crate) port: u16,
    /// Set as soon as the node is asked to stop.
    pub(crate) draining: AtomicBool,
    /// Connections run on it, so that a stop waits for them.
    pub(crate) tasks: TaskTracker,
}

impl Edge {
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether a page may connect from where it says that it is.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Problem> {
        if self.access.allows_origin_of(headers) {
            return Ok(());
        }
        self.metrics.refused("origin");
        let detail = "pages of this `Origin` may not connect; add it to TIDINGS_ALLOWED_ORIGINS";
        Err(Problem::denied(StatusCode::FORBIDDEN, "origin", detail, self.is_development()))
    }

    /// Whether whoever is refused is told the rule, and how to mend it.
    fn is_development(&self) -> bool {
        self.settings.environment == Environment::Development
    }

    /// The key that a request from `peer` shows, if it is for this. Every route that takes a key asks here.
    fn key(&self, headers: &HeaderMap, peer: IpAddr, scope: Scope) -> Result<Arc<Key>, Problem> {
        self.access.key(headers, peer, scope).map_err(|refusal| self.denied(&refusal))
    }

    /// Says that somebody may not.
    fn denied(&self, refusal: &KeyRefusal) -> Problem {
        let told = self.is_development();
        match refusal {
            KeyRefusal::KeyMissing(hint) => {
                self.request_refused("key_missing", None);
                Problem::denied(StatusCode::UNAUTHORIZED, "key_missing", hint, told)
            }
            KeyRefusal::KeyUnknown => {
                self.request_refused("key_unknown", None);
                let detail = "this key is not one of those that may; see TIDINGS_PUBLISH_KEYS, `[[keys]]` and TIDINGS_ADMIN_KEY";
                Problem::denied(StatusCode::UNAUTHORIZED, "key_unknown", detail, told)
            }
            KeyRefusal::Scope(key, scope) => {
                self.request_refused("scope", Some(key));
                let (name, scope) = (key.name(), scope.as_str());
                let detail = format!(
                    "the key `{name}` is not for this; add `{scope}` to its `scopes`, or use another key"
                );
                Problem::denied(StatusCode::FORBIDDEN, "scope", &detail, told)
            }
        }
    }

    /// Counts a request that is refused, and says it once per burst. `key`: what it showed, if that is one of ours.
    fn request_refused(&self, reason: &'static str, key: Option<&Key>) {
        let name = key.map_or_else(|| "".into(), |key| Arc::clone(key.name()));
        self.metrics.request_refused(reason, &name);
        if let Some(unsaid) = self.denials.occur((reason, Arc::clone(&name))) {
            tracing::warn!(reason, key = &*name, more_since_last = unsaid, "requests are refused");
        }
    }

    /// Counts a connection that was refused before it had a request, and says it once per burst.
    pub(crate) fn connection_refused(&self, refused: accept::Refused) {
        let reason = match refused {
            accept::Refused::NoPlace => return self.count_refused(Refused::Http),
            accept::Refused::Silent => "silent",
            accept::Refused::HeadTooLarge => "head_too_large",
            accept::Refused::NoHttp => "no_http",
            accept::Refused::Panicked => "panicked",
        };
        // Browsers open connections in advance, and that is no trouble.
        if refused == accept::Refused::Silent {
            return self.metrics.request_refused(reason, "");
        }
        self.request_refused(reason, None);
    }

    /// Says that the engine cannot do it now. What it is exactly may hold addresses, and is for the log.
    fn unavailable(&self, error: &EngineError) -> Problem {
        let (code, plain) = match error {
            EngineError::Unavailable(_) => {
                ("unavailable", "the service cannot reach its store; try again later")
            }
            EngineError::Journal(_) => ("journal", "the service cannot write its journal; try again later"),
        };
        if let Some(unsaid) = self.denials.occur((code, "".into())) {
            // Debug formatting escapes what might have come from elsewhere.
            let error = error.to_string();
            tracing::warn!(?error, more_since_last = unsaid, "requests cannot be answered");
        }
        let detail = if self.is_development() { error.to_string() } else { plain.to_owned() };
        Problem::denied(StatusCode::SERVICE_UNAVAILABLE, code, &detail, true)
    }

    /// Whether there is room for one more connection now. The guard lasts as long as the connection.
    fn admit(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Guard, Refused> {
        let admitted =
            if self.is_draining() { Err(Refused::Draining) } else { self.admission.admit(headers, peer) };
        Ok(Box::new(admitted.inspect_err(|&refused| self.count_refused(refused))?))
    }

    fn count_refused(&self, refused: Refused) {
        self.metrics.refused(refused.as_str());
        if refused != Refused::Draining
            && let Some(unsaid) = self.refusals.occur(refused.as_str())
        {
            tracing::warn!(reason = refused.as_str(), more_since_last = unsaid, "connections are refused");
        }
    }

    /// Whose request it is. `None`: nobody is asked.
    async fn authenticate(
        &self,
        headers: &HeaderMap,
        is_websocket: bool,
    ) -> Result<Option<Session>, Refusal> {
        let authenticated = self.auth.authenticate(headers, is_websocket).await;
        authenticated.inspect_err(|refusal| match refusal {
            Refusal::Denied(denied) => {
                self.metrics.refused(denied.code);
                tracing::debug!(code = denied.code, detail = denied.detail, "nobody is let in");
            }
            Refusal::NoVerdict(why) | Refusal::Unreadable(why) => {
                self.metrics.refused(NO_VERDICT);
                if let Some(unsaid) = self.refusals.occur(NO_VERDICT) {
                    tracing::warn!(why, more_since_last = unsaid, "nobody can be let in");
                }
            }
        })
    }

    /// What the same comes to for whoever can see a status.
    fn problem_of(&self, refusal: &Refusal) -> Problem {
        match refusal {
            Refusal::Denied(Denied { code, detail }) => {
                Problem::denied(StatusCode::UNAUTHORIZED, code, detail, self.is_development())
            }
            Refusal::NoVerdict(why) | Refusal::Unreadable(why) => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Problem::denied(status, NO_VERDICT, why, self.is_development()).retry_after(retry_after_s())
            }
        }
    }

    /// Whether a session may see a project.
    fn check_rights(&self, session: Option<&Session>, project: &ProjectId) -> Result<(), Problem> {
        let Some(session) = session else { return Ok(()) };
        let projects = session.projects();
        if projects.include(project) {
            return Ok(());
        }
        self.metrics.refused(NOT_AUTHORIZED);
        let entries: Vec<_> = projects.entries().collect();
        let detail =
            format!("no right to project {project}: the session's `projects` are [{}]", entries.join(", "));
        Err(Problem::denied(StatusCode::FORBIDDEN, NOT_AUTHORIZED, &detail, self.is_development()))
    }
}

/// It cannot be found out who somebody is.
const NO_VERDICT: &str = "no_verdict";
/// Somebody may not see a project.
const NOT_AUTHORIZED: &str = "not_authorized";

/// When to come back, in seconds: those who are refused in the same moment do not come back in the same moment.
fn retry_after_s() -> u64 {
    fastrand::u64(1..=5)
}

/// Where a request comes from. Whose peer is not known is somewhere else.
fn peer_of(extensions: &Extensions) -> IpAddr {
    let peer = extensions.get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.ip());
    peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// What a page may reach, on the public listener. Without an internal listener the operator's routes are there, too.
pub(crate) fn public(edge: &Arc<Edge>) -> Router {
    let router = Router::new()
        .route("/ws", get(ws::upgrade))
        .route("/sse", get(sse::subscribe))
        .route("/api/config", get(config::show))
        .route("/api/projects/{project_id}/events", get(history::list))
        .route("/api/tickets", post(tickets::give))
        .route("/schema/{name}", get(schema::show))
        .merge(health_routes())
        .route("/readyz", get(health::ready));
    let router = if edge.settings.internal_listen.is_none() {
        router
            .merge(operator_routes())
            .route("/metrics", get(metrics::public))
            .route("/api/doctor", get(doctor::public))
    } else {
        router
    };
    let console = console::routes(&edge.settings.websocket_url(Some(edge.port)));
    let router = if edge.is_development() {
        router.merge(console)
    } else if edge.auth.is_none() {
        // Nobody can be told from anybody else.
        router
    } else {
        router.merge(console.layer(from_fn_with_state(Arc::clone(edge), admin_only)))
    };
    // Around the fallbacks, too: they answer a preflight, which is an OPTIONS that no route takes.
    finish(router, edge).layer(cors(edge))
}

/// What belongs to the operator and to publishers, on the internal listener.
pub(crate) fn internal(edge: &Arc<Edge>) -> Router {
    let router = operator_routes()
        .route("/api/tickets", post(tickets::give_internal))
        .route("/metrics", get(metrics::internal))
        .route("/api/doctor", get(doctor::internal))
        .merge(health_routes())
        .route("/readyz", get(health::ready_internal));
    finish(router, edge)
}

fn operator_routes() -> Router<Arc<Edge>> {
    Router::new()
        .route("/api/events", post(events::publish))
        .route("/api/revoke", post(revoke::revoke))
        .route("/api/tasks/{task_id}", post(tasks::register))
}

fn health_routes() -> Router<Arc<Edge>> {
    Router::new().route("/health/websocket", get(health::websocket)).route("/livez", get(health::live))
}

fn finish(router: Router<Arc<Edge>>, edge: &Arc<Edge>) -> Router {
    router
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method; see `Allow`")
        })
        .layer(map_response(as_it_says))
        .with_state(Arc::clone(edge))
}

/// Lets those through whose session says that they are operators.
async fn admin_only(
    State(edge): State<Arc<Edge>>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let session = edge.authenticate(request.headers(), false).await;
    let session = session.map_err(|refusal| edge.problem_of(&refusal))?;
    if session.is_some_and(|session| session.identity().admin) {
        return Ok(next.run(request).await);
    }
    let detail = "this is for sessions with `\"admin\": true`";
    Err(Problem::denied(StatusCode::FORBIDDEN, "admin", detail, edge.is_development()))
}

/// A browser takes a response for what it says that it is: JSON with a publisher's text in it is no page.
async fn as_it_says(mut response: Response) -> Response {
    // An upgraded connection is no document, and there are very many of them.
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let nosniff = HeaderValue::from_static("nosniff");
        response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    }
    response
}

fn cors(edge: &Arc<Edge>) -> CorsLayer {
    let access = Arc::clone(edge);
    let allowed = AllowOrigin::predicate(move |origin, parts| {
        let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        origin.to_str().is_ok_and(|origin| access.access.allows_origin(origin, host))
    });
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_credentials(true)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("idempotency-key"),
            HeaderName::from_static("last-event-id"),
        ])
        .max_age(Duration::from_mins(10))
}
