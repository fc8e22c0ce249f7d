//! Every setting with its default and its meaning: what `tidings config` prints and the reference is made of.

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable; its key in the file is the same in lower case without `TIDINGS_`.
    pub name: &'static str,
    /// The value when nothing is set; `None`: unset.
    pub default: Option<&'static str>,
    /// Whether its value is masked wherever it is shown.
    pub secret: bool,
    /// Whether it is a list of tables: `[[key]]` in the file, a JSON array of the same everywhere else.
    pub tables: bool,
    /// What it means.
    pub help: &'static str,
}

const fn plain(name: &'static str, default: Option<&'static str>, help: &'static str) -> Setting {
    Setting { name, default, secret: false, tables: false, help }
}

const fn secret(name: &'static str, help: &'static str) -> Setting {
    Setting { name, default: None, secret: true, tables: false, help }
}

const fn tables(name: &'static str, help: &'static str) -> Setting {
    Setting { name, default: None, secret: false, tables: true, help }
}

impl Setting {
    /// The key in `tidings.toml`.
    pub fn key(&self) -> String {
        self.name.strip_prefix("TIDINGS_").unwrap_or(self.name).to_ascii_lowercase()
    }
}

/// Every setting that has a meaning in this version.
pub static SETTINGS: &[Setting] = &[
    plain("ENVIRONMENT", Some("development"), "`development`, `docker` or `production`"),
    plain("BACKEND_HOST", Some("localhost"), "host that clients use inside the network"),
    plain("BACKEND_PORT", Some("8000"), "port to listen on, and that clients use inside the network"),
    plain("DOMAIN", Some("localhost"), "public name in production"),
    plain(
        "TIDINGS_LISTEN",
        None,
        "listen address; unset: 127.0.0.1:$BACKEND_PORT in development, else 0.0.0.0:$BACKEND_PORT; port 0 picks one",
    ),
    plain(
        "TIDINGS_INTERNAL_LISTEN",
        None,
        "second address for publishing, admin and metrics; then the first has none of them",
    ),
    plain(
        "TIDINGS_TLS_CERT",
        None,
        "PEM file with a certificate and its chain: the public listener speaks TLS, with TIDINGS_TLS_KEY; read anew when it changes; TIDINGS_INTERNAL_LISTEN stays plain",
    ),
    plain(
        "TIDINGS_TLS_KEY",
        None,
        "PEM file with the certificate's private key, not encrypted (PKCS#8, PKCS#1 or SEC1)",
    ),
    secret(
        "REDIS_URL",
        "`redis://user:password@host:port`; Sentinel: `redis+sentinel://host:port,host:port/master-name`; Cluster: `redis+cluster://host:port,host:port`; each with `rediss` in place of `redis` for TLS",
    ),
    plain(
        "TIDINGS_REDIS_CA",
        None,
        "PEM file with the authorities that are trusted for `rediss`; unset: the public ones",
    ),
    plain(
        "TIDINGS_REDIS_CERT",
        None,
        "PEM file with a client certificate and its chain, for a Redis that asks for one; with TIDINGS_REDIS_KEY",
    ),
    plain("TIDINGS_REDIS_KEY", None, "PEM file with the client certificate's private key"),
    plain(
        "TIDINGS_ENGINE",
        None,
        "where streams are kept: `redis` (all nodes with the same REDIS_URL share them) or `embedded` (in this process; Redis is only listened to); unset: `redis` if REDIS_URL is set, else `embedded`",
    ),
    plain("REDIS_CHANNEL", Some("websocket:broadcast"), "plain pub/sub channel that is listened to"),
    plain("WS_HEARTBEAT_INTERVAL", Some("30"), "seconds between `system.heartbeat` messages"),
    plain(
        "TIDINGS_PERSIST",
        Some("true"),
        "whether streams and saved connections outlive the process; `false`: nothing is written to disk",
    ),
    plain(
        "TIDINGS_DATA_DIR",
        Some(".tidings"),
        "the folder that they are kept in; each service needs its own",
    ),
    plain(
        "TIDINGS_FSYNC",
        Some("interval"),
        "when the disk is made to have what was written: `always` (before an event is acknowledged), `interval` (each second), `never`; it is about power cuts, a killed process loses nothing",
    ),
    plain(
        "TIDINGS_JOURNAL_BYTES",
        Some("67108864"),
        "the journal's logs may grow to this before a checkpoint replaces them",
    ),
    plain("WS_CONNECTION_TIMEOUT", Some("3600"), "seconds that a lost connection can be resumed"),
    plain("CONTAINER_ID", None, "this node's name; unset: the host name"),
    plain(
        "CONTAINER_RESTART",
        Some("false"),
        "`true`: this start follows a container restart; shown in health",
    ),
    plain("TIDINGS_HISTORY_EVENTS", Some("1000"), "durable events kept per stream for replay"),
    plain("TIDINGS_HISTORY_SECONDS", Some("3600"), "how long an event is kept for replay"),
    plain("TIDINGS_HISTORY_BYTES", Some("8388608"), "bytes of durable events kept per stream for replay"),
    plain("TIDINGS_EVENT_BYTES_MAX", Some("1048576"), "the largest event that is accepted, in bytes of JSON"),
    plain(
        "TIDINGS_AUTH",
        None,
        "who may connect, by one or more ways that are tried in order, comma separated: `redis-session`, `signed-cookie`, `jwt`, `ticket`, `callback`; or `none` alone: everybody may see everything; unset: `none` on loopback in development, else an error",
    ),
    plain(
        "TIDINGS_SESSION_COOKIE",
        Some("session"),
        "the cookie of `redis-session`, which holds the session's id, and of `signed-cookie`, which holds the session",
    ),
    plain("TIDINGS_SESSION_KEY", Some("session:{id}"), "where `redis-session` finds a session in Redis"),
    plain(
        "TIDINGS_SESSION_CODEC",
        Some("json"),
        "how a session is written there: `json`, `msgpack` (Flask-Session), or `string`: the value is the user's id (fastapi-users)",
    ),
    plain(
        "TIDINGS_SESSION_USER",
        Some("/user_id"),
        "where a session has its user, as a JSON Pointer; without one there nobody is logged in",
    ),
    plain(
        "TIDINGS_SESSION_PROJECTS",
        Some("/projects"),
        "where a session has the projects that it may see, as a JSON Pointer",
    ),
    plain(
        "TIDINGS_SESSION_PROJECTS_KEY",
        None,
        "where Redis has the projects of a user instead, as JSON: a key with `{user_id}` in it; a change there takes effect as one of the session does",
    ),
    secret(
        "TIDINGS_SESSION_REDIS_URL",
        "the Redis that has the sessions, if it is not the one of REDIS_URL; or another database of that",
    ),
    secret(
        "TIDINGS_SESSION_SECRET",
        "the secret that the application signs its session cookies with, and former ones that are still good, comma separated; at least 16 bytes each",
    ),
    plain(
        "TIDINGS_SESSION_MAX_AGE",
        Some("1209600"),
        "seconds that a signed cookie is good after it was signed, as the application has it",
    ),
    secret(
        "TIDINGS_JWT_SECRET",
        "tokens signed with HS256 are checked with this, at least 16 bytes; several, comma separated, while one replaces another",
    ),
    plain(
        "TIDINGS_JWT_PUBLIC_KEY",
        None,
        "tokens are checked with this public key as PEM (RSA, P-256, P-384 or Ed25519; its kind says which algorithms it is for); several, one after the other, while one replaces another",
    ),
    plain(
        "TIDINGS_JWKS_URL",
        None,
        "tokens are checked with the keys that the issuer publishes here (JSON Web Key Set); `https://`, or `http://` to this machine",
    ),
    plain("TIDINGS_JWT_ISSUER", None, "what `iss` of a token must be; unset: it is not looked at"),
    plain(
        "TIDINGS_JWT_AUDIENCE",
        None,
        "what `aud` of a token must have; unset: tokens with an `aud` are refused",
    ),
    plain("TIDINGS_JWT_COOKIE", Some("token"), "the cookie that may hold a token"),
    plain(
        "TIDINGS_AUTH_URL",
        None,
        "the application is asked here whose cookies they are: a GET with the request's `Cookie`, answered with 200 and `{\"user_id\", \"projects\", \"expires_at\"?}`, or with 401 where nobody is logged in; without `expires_at` it is asked again after 60 seconds",
    ),
    secret(
        "TIDINGS_PUBLISH_KEYS",
        "keys that may publish, comma separated; unset: keyless from loopback in development",
    ),
    secret("TIDINGS_ADMIN_KEY", "the key that may do everything"),
    Setting {
        secret: true,
        ..tables(
            "TIDINGS_KEYS",
            "keys with scopes, as a JSON array of the objects that `[[keys]]` in the file are; one of the two, see operations.md",
        )
    },
    plain(
        "TIDINGS_PUBLISH_RATE_MAX",
        None,
        "events per second that one key may publish, those of one second at once; a key's own `rate` stands over it; unset: no limit",
    ),
    plain(
        "TIDINGS_ALLOWED_ORIGINS",
        None,
        "origins whose pages may connect, exact or with `*`, comma separated; unset: same host and port, and any localhost in development",
    ),
    plain(
        "TIDINGS_TRUSTED_PROXIES",
        None,
        "addresses and networks of proxies whose forwarding headers count, comma separated; `none`: clients connect directly; unset: the headers are ignored and limits per address are off",
    ),
    tables(
        "TIDINGS_WATCH",
        "folders to watch, as a JSON array of the objects that `[[watch]]` in the file are; one of the two, see watching.md",
    ),
    plain(
        "TIDINGS_CONNECTIONS_MAX",
        None,
        "WebSockets and event streams of this node; unset: what the limit of file descriptors leaves beside a reserve",
    ),
    plain(
        "TIDINGS_CONNECTIONS_PER_ADDRESS_MAX",
        None,
        "the same from one address (of IPv6: from one /64); takes effect with TIDINGS_TRUSTED_PROXIES; unset: no limit",
    ),
    plain("TIDINGS_CONNECTIONS_PER_USER_MAX", None, "the same of one user; unset: no limit"),
    plain(
        "TIDINGS_ACCEPT_RATE_MAX",
        None,
        "new WebSockets and event streams per second, those of one second at once; unset: no limit",
    ),
    plain(
        "TIDINGS_HANDSHAKE_SECONDS",
        Some("10"),
        "for the head of a request to arrive, and between two requests of a connection, 1 to 120; who takes longer is cut off",
    ),
    plain("TIDINGS_SUBSCRIPTIONS_MAX", Some("500"), "subscriptions per connection"),
    plain(
        "TIDINGS_MESSAGE_RATE_MAX",
        Some("100"),
        "messages per second that one WebSocket may send, pings too, 1 to 100000; at once those of 10 seconds and its subscriptions; above: `rate_limited`, then a close with 4529",
    ),
    plain(
        "TIDINGS_BEHIND_AGE_MS",
        Some("500"),
        "a client whose socket takes no more is behind when something waits for it longer than this; then it gets `latest` events folded",
    ),
    plain("TIDINGS_BEHIND_BYTES", Some("1048576"), "the same, by the bytes that wait for it"),
    plain(
        "TIDINGS_SLOW_BYTES_MAX",
        Some("8388608"),
        "bytes of durable events that may wait for a client that is behind before it is closed as too slow (4508)",
    ),
    plain(
        "TIDINGS_RETAINED_BYTES_MAX",
        Some("67108864"),
        "bytes of events that each shard keeps for clients that are not behind yet; above, those that hold most count as behind",
    ),
    plain(
        "TIDINGS_DEFLATE",
        Some("false"),
        "`true`: offer permessage-deflate; an event is compressed once for all",
    ),
    plain(
        "TIDINGS_DRAIN_SECONDS",
        Some("8"),
        "over how long a stopping node sends its clients away, 0 to 3600; ends early when all have left; 0: all at once",
    ),
    plain(
        "TIDINGS_SHARDS",
        None,
        "threads that share the connections, 1 to 64; unset: one per processor that the service may use",
    ),
    secret(
        "TIDINGS_CELERY_BACKEND_URL",
        "the Redis that Celery keeps results in, as its `result_backend` has it: tasks are shown by what is written there",
    ),
    plain(
        "TIDINGS_CELERY_BACKEND_PREFIX",
        None,
        "`global_keyprefix` of `result_backend_transport_options`, if Celery has one",
    ),
    secret(
        "TIDINGS_CELERY_BROKER_URL",
        "the Redis that is Celery's broker, as its `broker_url` has it: events are listened to, and workers are asked what became of tasks",
    ),
    plain(
        "TIDINGS_CELERY_BROKER_PREFIX",
        None,
        "`global_keyprefix` of `broker_transport_options`, if Celery has one",
    ),
    plain(
        "TIDINGS_CELERY_FANOUT_PREFIX",
        Some("/{db}."),
        "`fanout_prefix` of `broker_transport_options`; `none` where that is `False`",
    ),
    plain("TIDINGS_CELERY_EVENT_EXCHANGE", Some("celeryev"), "Celery's `event_exchange`"),
    plain(
        "TIDINGS_CELERY_ASK_WORKERS",
        Some("true"),
        "ask workers by remote control which tasks they know, so that one that is lost is found; needs to write to the broker",
    ),
    plain(
        "TIDINGS_CELERY_ENABLE_EVENTS",
        Some("false"),
        "`true`: tell workers by remote control to send events, as their `-E` does",
    ),
    plain(
        "TIDINGS_CELERY_LOST_SECONDS",
        Some("30"),
        "a task that no worker has known for so long has failed (`lost`)",
    ),
    plain("TIDINGS_CELERY_RESULTS", Some("false"), "`true`: results of tasks go to browsers"),
    plain(
        "TIDINGS_CELERY_KWARGS",
        Some("false"),
        "`true`: keyword arguments of tasks go to browsers, as `metadata` of the start",
    ),
    plain("TIDINGS_CELERY_TRACEBACKS", Some("false"), "`true`: tracebacks go to browsers"),
    plain(
        "TIDINGS_CELERY_VALUE_BYTES_MAX",
        Some("4096"),
        "bytes of a result, of arguments, of an update's other fields: larger ones are left out; the end of a longer traceback is told",
    ),
    plain(
        "TIDINGS_CELERY_UPDATE_RATE_MAX",
        Some("10"),
        "updates of one task per second that are told; of more, the newest",
    ),
    plain(
        "TIDINGS_CELERY_PROJECT_ARGUMENT",
        Some("project_id"),
        "the keyword argument that names a task's project",
    ),
    tables(
        "TIDINGS_CELERY_RULES",
        "where the project of some tasks is, as a JSON array of the objects that `[[celery.rules]]` in the file are: `task` (a name or a pattern) and one of `project`, `project_argument`, `project_index`",
    ),
    plain(
        "TIDINGS_CELERY_REPR_HINTS",
        None,
        "`true`: a project may be found in the Python text of arguments that events carry, if nothing better says it; unset: with TIDINGS_AUTH=none, and never else, because a user's own text is in there",
    ),
    plain("TIDINGS_CELERY_PROCESSES", Some("true"), "show chains, chords and saved groups as processes, too"),
    plain("TIDINGS_LOG_FORMAT", None, "`text` or `json`; unset: text on a terminal, else JSON"),
    plain("RUST_LOG", Some("info"), "what is logged"),
];

/// Variables that the Python package reads: one environment is often shared by all processes of an installation.
pub(super) const OF_PUBLISHERS: [&str; 1] = ["TIDINGS_PUBLISH_TO"];
