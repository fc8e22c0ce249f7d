//! The settings: where they come from, what they may be. The only place that knows the environment.

mod auth;
mod celery;
mod jwt;
mod keys;
mod layers;
mod secret;
mod table;
mod tables;
mod watch;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    num::NonZero,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use tidings_engine::{
    engine::{
        HistoryLimits,
        journal::{JournalOptions, Sync},
        redis::RedisAddress,
    },
    hub::SHARDS_MAX,
};
use tidings_protocol::ProjectId;

use crate::tls::CertificateFiles;

pub use auth::AuthSettings;
pub use celery::{CelerySettings, ProjectFrom, Rule};
pub use jwt::JwtSettings;
pub use keys::{ADMIN, KEYLESS, KeySettings, Scope};
pub use layers::{Flags, Layers, Origin, SettingError, Value};
pub(crate) use secret::Secret;
pub use table::{SETTINGS, Setting};
pub use watch::{WatchProject, WatchSettings};

/// The variables of this process's environment: the one place where it is read. What is not Unicode is no setting.
#[allow(clippy::disallowed_methods, reason = "this is the place")]
pub fn environment_variables() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// The keys with scopes that the layers have.
pub fn keys(layers: &Layers) -> Result<Vec<KeySettings>, SettingError> {
    keys::read(layers)
}

/// Every setting, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the service runs.
    pub environment: Environment,
    /// Host that clients use inside the network.
    pub backend_host: String,
    /// Port that clients use inside the network.
    pub backend_port: u16,
    /// Public name in production.
    pub domain: String,
    /// Listen address.
    pub listen: SocketAddr,
    /// Second address for publishing, admin and metrics.
    pub internal_listen: Option<SocketAddr>,
    /// The certificate of the public listener; `None`: it speaks plainly.
    pub tls: Option<CertificateFiles>,
    /// Redis that keeps the streams, or is only listened to.
    pub redis: Option<RedisAddress>,
    /// What connections to Redis trust and show.
    pub redis_tls: RedisTlsFiles,
    /// Where streams are kept.
    pub engine: EngineKind,
    /// The plain channel.
    pub redis_channel: String,
    /// Between two heartbeats.
    pub heartbeat_interval: Duration,
    /// This node's name.
    pub node: String,
    /// Whether this start follows a container restart.
    pub restarted: bool,
    /// How much history a stream keeps.
    pub history: HistoryLimits,
    /// The largest event accepted, in bytes of JSON.
    pub event_bytes_max: usize,
    /// Subscriptions per connection.
    pub subscriptions_max: usize,
    /// Proxies whose forwarding headers count; `None`: nothing is known of proxies, and an address says nothing.
    pub trusted_proxies: Option<Vec<IpNet>>,
    /// Connections of the node.
    pub connections_max: usize,
    /// Connections from one address.
    pub connections_per_address_max: Option<usize>,
    /// Connections of one user.
    pub connections_per_user_max: Option<usize>,
    /// New connections per second.
    pub accept_rate_max: Option<u32>,
    /// Sockets that may be open at the same time on the public address, whatever they are used for.
    pub sockets_max: usize,
    /// Those of them that may be neither WebSockets nor event streams.
    pub http_connections_max: usize,
    /// Connections on the internal address.
    pub internal_connections_max: usize,
    /// For a request's head to arrive.
    pub handshake: Duration,
    /// See [`ShardOptions::message_rate_max`](tidings_engine::shard::ShardOptions::message_rate_max).
    pub message_rate_max: u32,
    /// See [`ShardOptions::behind_age_ms`](tidings_engine::shard::ShardOptions::behind_age_ms).
    pub behind_age_ms: u64,
    /// See [`ShardOptions::behind_bytes`](tidings_engine::shard::ShardOptions::behind_bytes).
    pub behind_bytes: usize,
    /// See [`ShardOptions::slow_bytes_max`](tidings_engine::shard::ShardOptions::slow_bytes_max).
    pub slow_bytes_max: u64,
    /// See [`ShardOptions::retained_bytes_max`](tidings_engine::shard::ShardOptions::retained_bytes_max).
    pub retained_bytes_max: usize,
    /// Whether permessage-deflate is offered.
    pub deflate: bool,
    /// Over how long a stopping node sends its clients away.
    pub drain: Duration,
    /// Threads that share the connections.
    pub shards: usize,
    /// How long a lost connection can be resumed.
    pub connection_timeout: Duration,
    /// Where the journal is; `None`: nothing outlives the process.
    pub journal: Option<JournalOptions>,
    /// How it is found out who somebody is.
    pub auth: AuthSettings,
    /// Keys that may publish everything.
    pub publish_keys: Vec<String>,
    /// The key that may do everything.
    pub admin_key: Option<String>,
    /// Keys with scopes.
    pub keys: Vec<KeySettings>,
    /// Events per second of one key.
    pub publish_rate_max: Option<u32>,
    /// Origins whose pages may connect; empty: the default of the environment.
    pub allowed_origins: Vec<String>,
    /// The Celery bridge.
    pub celery: CelerySettings,
    /// How logs are written; `None`: by what the output is.
    pub log_format: Option<LogFormat>,
    /// What is logged, in the syntax of `RUST_LOG`.
    pub log_filter: String,
    /// Folders to watch.
    pub watch: Vec<WatchSettings>,
    /// The project of each workspace.
    pub workspaces: BTreeMap<String, ProjectId>,
}

/// What `rediss://` needs beyond what everybody has.
#[derive(Clone, Debug, Default)]
pub struct RedisTlsFiles {
    /// Authorities that are trusted in place of the public ones.
    pub authorities: Option<PathBuf>,
    /// What shows who this is.
    pub client: Option<CertificateFiles>,
}

/// More connections than any machine has.
const CONNECTIONS_MAX: u64 = 10_000_000;

/// Connections over HTTP that a shard may have at the same time, whatever descriptors there are: each costs some kilobytes,
/// also if nothing ever comes over it. As many as are accepted in one go.
const HTTP_CONNECTIONS_PER_SHARD_MAX: usize = 8192;

/// How a setting says yes or no.
const YES_OR_NO: [(&str, bool); 4] = [("false", false), ("true", true), ("0", false), ("1", true)];

/// Where the service runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// A developer's machine: permissive on loopback.
    Development,
    /// A container network.
    Docker,
    /// Open to the world.
    Production,
}

impl Environment {
    /// The environment as the settings have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Development => "development",
            Self::Docker => "docker",
            Self::Production => "production",
        }
    }
}

/// Where streams are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// In this process, for one node.
    Embedded,
    /// In Redis, for all nodes that have the same.
    Redis,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// JSON for machines.
    Json,
}

impl Settings {
    /// Checks the values of all layers.
    pub fn read(layers: &Layers) -> Result<Self, SettingError> {
        let environment = layers.choice(
            "ENVIRONMENT",
            &[
                ("development", Environment::Development),
                ("docker", Environment::Docker),
                ("production", Environment::Production),
            ],
        )?;
        let backend_port = layers.number("BACKEND_PORT", 0, u16::MAX.into())?;
        let listen = listen_address(layers, environment, backend_port)?;
        // Clients find the service where it listens, unless somebody says that they find it elsewhere.
        let backend_port = if layers.is_set("BACKEND_PORT") { backend_port } else { listen.port() };
        let shards = layers
            .optional_number("TIDINGS_SHARDS", 1, SHARDS_MAX as u64)?
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get).min(SHARDS_MAX));
        let internal_listen = layers.optional("TIDINGS_INTERNAL_LISTEN");
        let sockets = Sockets::by_descriptors(shards);
        keys::check_plain(layers, environment)?;
        let settings = Self {
            environment,
            backend_host: layers.text("BACKEND_HOST"),
            backend_port,
            domain: layers.text("DOMAIN"),
            listen,
            internal_listen: internal_listen
                .map(|value| address(layers, "TIDINGS_INTERNAL_LISTEN", value))
                .transpose()?,
            tls: certificate_files(layers, ["TIDINGS_TLS_CERT", "TIDINGS_TLS_KEY"])?,
            redis: redis_address(layers)?,
            redis_tls: redis_tls(layers)?,
            engine: engine(layers)?,
            redis_channel: layers.text("REDIS_CHANNEL"),
            heartbeat_interval: Duration::from_secs(layers.number("WS_HEARTBEAT_INTERVAL", 1, 3600)?),
            node: layers.optional("CONTAINER_ID").map_or_else(host_name, str::to_owned),
            restarted: layers.choice("CONTAINER_RESTART", &YES_OR_NO)?,
            history: HistoryLimits {
                events: layers.number("TIDINGS_HISTORY_EVENTS", 1, 1_000_000)?,
                age: Duration::from_secs(layers.number("TIDINGS_HISTORY_SECONDS", 1, 30 * 24 * 3600)?),
                bytes: layers.number("TIDINGS_HISTORY_BYTES", 1024, 1 << 32)?,
            },
            event_bytes_max: layers.number("TIDINGS_EVENT_BYTES_MAX", 1024, 16 << 20)?,
            subscriptions_max: layers.number("TIDINGS_SUBSCRIPTIONS_MAX", 1, 100_000)?,
            trusted_proxies: trusted_proxies(layers)?,
            connections_max: layers
                .optional_number("TIDINGS_CONNECTIONS_MAX", 1, CONNECTIONS_MAX)?
                .unwrap_or(sockets.connections),
            connections_per_address_max: layers.optional_number(
                "TIDINGS_CONNECTIONS_PER_ADDRESS_MAX",
                1,
                CONNECTIONS_MAX,
            )?,
            connections_per_user_max: layers.optional_number(
                "TIDINGS_CONNECTIONS_PER_USER_MAX",
                1,
                CONNECTIONS_MAX,
            )?,
            accept_rate_max: layers.optional_number("TIDINGS_ACCEPT_RATE_MAX", 1, 1_000_000)?,
            sockets_max: sockets.public,
            http_connections_max: HTTP_CONNECTIONS_PER_SHARD_MAX * shards,
            internal_connections_max: sockets.internal,
            handshake: Duration::from_secs(layers.number("TIDINGS_HANDSHAKE_SECONDS", 1, 120)?),
            message_rate_max: layers.number("TIDINGS_MESSAGE_RATE_MAX", 1, 100_000)?,
            behind_age_ms: layers.number("TIDINGS_BEHIND_AGE_MS", 10, 60_000)?,
            behind_bytes: layers.number("TIDINGS_BEHIND_BYTES", 16 << 10, 1 << 30)?,
            slow_bytes_max: layers.number("TIDINGS_SLOW_BYTES_MAX", 64 << 10, 1 << 32)?,
            retained_bytes_max: layers.number("TIDINGS_RETAINED_BYTES_MAX", 1 << 20, 1 << 36)?,
            deflate: layers.choice("TIDINGS_DEFLATE", &YES_OR_NO)?,
            drain: Duration::from_secs(layers.number("TIDINGS_DRAIN_SECONDS", 0, 3600)?),
            shards,
            journal: journal(layers)?,
            connection_timeout: Duration::from_secs(layers.number(
                "WS_CONNECTION_TIMEOUT",
                1,
                30 * 24 * 3600,
            )?),
            auth: AuthSettings::read(layers)?,
            publish_keys: layers.list("TIDINGS_PUBLISH_KEYS"),
            admin_key: layers.optional("TIDINGS_ADMIN_KEY").map(str::to_owned),
            keys: keys::read(layers)?,
            publish_rate_max: layers.optional_number("TIDINGS_PUBLISH_RATE_MAX", 1, 1_000_000)?,
            allowed_origins: allowed_origins(layers)?,
            celery: CelerySettings::read(layers)?,
            log_format: layers
                .optional("TIDINGS_LOG_FORMAT")
                .map(|_| {
                    layers
                        .choice("TIDINGS_LOG_FORMAT", &[("text", LogFormat::Text), ("json", LogFormat::Json)])
                })
                .transpose()?,
            log_filter: layers.text("RUST_LOG"),
            watch: watch::read(layers)?,
            workspaces: workspaces(layers)?,
        };
        settings.check_auth(layers)?;
        Ok(settings)
    }

    /// Nobody may find a service open that he believed closed: without a word about rights it only starts where nobody
    /// else can reach it.
    fn check_auth(&self, layers: &Layers) -> Result<(), SettingError> {
        let private = self.environment == Environment::Development && self.listen.ip().is_loopback();
        if layers.optional("TIDINGS_AUTH").is_none() && !private {
            return Err(layers.error(
                "TIDINGS_AUTH",
                "must be set, because the service is reachable from elsewhere; `none` lets everybody read everything",
            ));
        }
        self.auth.check(layers, self.redis.is_some())
    }

    /// The URL that a frontend connects its WebSocket to. A `port` of 0 in the settings stands for the one `listening`.
    pub fn websocket_url(&self, listening: Option<u16>) -> String {
        let port = if self.backend_port == 0 { listening.unwrap_or(0) } else { self.backend_port };
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        match self.environment {
            Environment::Production => format!("wss://{}/ws", self.domain),
            Environment::Docker => format!("{scheme}://{}:{port}/ws", self.backend_host),
            Environment::Development => format!("{scheme}://localhost:{port}/ws"),
        }
    }

    /// What does not do what was probably meant; for the log at the start.
    pub fn cautions(&self) -> Vec<String> {
        let mut cautions = Vec::new();
        if self.connections_per_address_max.is_some() && self.trusted_proxies.is_none() {
            cautions.push(
                "TIDINGS_CONNECTIONS_PER_ADDRESS_MAX has no effect without TIDINGS_TRUSTED_PROXIES, because behind a proxy \
                 everybody has the same address; set it to the proxies' networks, or to `none` if there are none"
                    .to_owned(),
            );
        }
        let allowed = Sockets::by_descriptors(self.shards).connections;
        if self.connections_max > allowed {
            cautions.push(format!(
                "TIDINGS_CONNECTIONS_MAX is {}, and the limit of file descriptors (`ulimit -n`) leaves about {allowed}",
                self.connections_max
            ));
        }
        cautions
    }

    /// What is open that should not be where others can reach it; for the log at the start.
    pub fn insecurities(&self) -> Vec<&'static str> {
        let mut open = Vec::new();
        if self.auth.ways.is_empty() {
            open.push("everybody who can connect may read every project (TIDINGS_AUTH=none)");
        } else if self.allowed_origins.iter().any(|origin| origin == "*") {
            open.push("any page may connect with its visitor's cookies (TIDINGS_ALLOWED_ORIGINS=*)");
        }
        if self.publish_keys.is_empty()
            && self.keys.is_empty()
            && self.environment == Environment::Development
        {
            open.push("programs on this machine may publish without a key (TIDINGS_PUBLISH_KEYS is unset)");
        }
        open
    }
}

/// Where the service listens, if nobody has said so: in development where nobody else can reach it.
fn listen_address(
    layers: &Layers,
    environment: Environment,
    backend_port: u16,
) -> Result<SocketAddr, SettingError> {
    match layers.optional("TIDINGS_LISTEN") {
        Some(value) => address(layers, "TIDINGS_LISTEN", value),
        None if environment == Environment::Development => {
            Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), backend_port))
        }
        None => Ok(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), backend_port)),
    }
}

fn address(layers: &Layers, name: &'static str, value: &str) -> Result<SocketAddr, SettingError> {
    // A bare `:8000` means every address.
    let text = if value.starts_with(':') { format!("0.0.0.0{value}") } else { value.to_owned() };
    let mut found = text.to_socket_addrs().ok().into_iter().flatten();
    found.next().ok_or_else(|| layers.error(name, "expected an address with a port, as `127.0.0.1:8000`"))
}

fn allowed_origins(layers: &Layers) -> Result<Vec<String>, SettingError> {
    let name = "TIDINGS_ALLOWED_ORIGINS";
    let check = |origin: &String| {
        let host = origin.split_once("://").map(|(_, host)| host);
        // An origin has no path, and one without a scheme would never match.
        if origin == "*" || host.is_some_and(|host| !host.is_empty() && !host.contains('/')) {
            return Ok(());
        }
        Err(layers.error(
            name,
            format!("`{origin}`: expected an origin as `https://app.example.com`, without a path"),
        ))
    };
    let origins = layers.list(name);
    origins.iter().try_for_each(check)?;
    Ok(origins)
}

fn trusted_proxies(layers: &Layers) -> Result<Option<Vec<IpNet>>, SettingError> {
    let name = "TIDINGS_TRUSTED_PROXIES";
    match layers.optional(name) {
        None => return Ok(None),
        Some("none") => return Ok(Some(Vec::new())),
        Some(_) => {}
    }
    let network = |text: &String| {
        let address = text.parse().map(|address: IpAddr| IpNet::from(address.to_canonical()));
        address.or_else(|_| text.parse()).map_err(|_| {
            layers.error(
                name,
                format!("`{text}`: expected an address or a network as `10.0.0.0/8`, or `none` alone"),
            )
        })
    };
    layers.list(name).iter().map(network).collect::<Result<_, _>>().map(Some)
}

/// What the process's limit of file descriptors leaves for sockets, each of which takes one.
struct Sockets {
    /// WebSockets and event streams.
    connections: usize,
    /// Everything on the public address: those, and HTTP in what is left. What comes in a rush is HTTP before it is a
    /// WebSocket, so that HTTP may have what they have not taken.
    public: usize,
    /// Everything on the internal address, whatever happens on the public one.
    internal: usize,
}

impl Sockets {
    fn by_descriptors(shards: usize) -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        // `None`: there is no limit.
        let limit = limit.unwrap_or(CONNECTIONS_MAX).min(CONNECTIONS_MAX);
        Self::of(usize::try_from(limit).unwrap_or(usize::MAX), shards)
    }

    fn of(limit: usize, shards: usize) -> Self {
        // For files, listeners and Redis; and as many, or more, for requests over HTTP, among them those that are refused.
        let files = 16 + 4 * shards;
        let least = 2 * files;
        let reserve = (limit / 8).clamp(least, least.max(2048));
        let internal = (reserve - files) / 4;
        let left = |taken: usize| limit.saturating_sub(taken).max(1);
        Self { connections: left(reserve), public: left(files + internal), internal }
    }
}

fn redis_address(layers: &Layers) -> Result<Option<RedisAddress>, SettingError> {
    let parse = |url| RedisAddress::parse(url).map_err(|error| layers.error("REDIS_URL", error.to_string()));
    layers.optional("REDIS_URL").map(parse).transpose()
}

fn certificate_files(
    layers: &Layers,
    settings: [&'static str; 2],
) -> Result<Option<CertificateFiles>, SettingError> {
    let needs = |set, missing| {
        Err(layers.error(set, format!("needs {missing}, too: a certificate and its private key, or neither")))
    };
    match settings.map(|name| layers.optional(name)) {
        [None, None] => Ok(None),
        [Some(_), None] => needs(settings[0], settings[1]),
        [None, Some(_)] => needs(settings[1], settings[0]),
        [Some(certificate), Some(key)] => {
            Ok(Some(CertificateFiles { certificate: certificate.into(), key: key.into(), settings }))
        }
    }
}

fn redis_tls(layers: &Layers) -> Result<RedisTlsFiles, SettingError> {
    let settings = ["TIDINGS_REDIS_CERT", "TIDINGS_REDIS_KEY"];
    let files = RedisTlsFiles {
        authorities: layers.optional("TIDINGS_REDIS_CA").map(PathBuf::from),
        client: certificate_files(layers, settings)?,
    };
    // Nobody may believe a connection protected that is not.
    let plain = redis_address(layers)?.is_some_and(|address| !address.is_tls());
    match ["TIDINGS_REDIS_CA", settings[0]].into_iter().find(|name| layers.optional(name).is_some()) {
        Some(name) if plain => {
            Err(layers.error(name, "needs TLS to Redis: write `rediss` in place of `redis` in REDIS_URL"))
        }
        _ => Ok(files),
    }
}

fn engine(layers: &Layers) -> Result<EngineKind, SettingError> {
    let has_redis = layers.optional("REDIS_URL").is_some();
    let name = "TIDINGS_ENGINE";
    if layers.optional(name).is_none() {
        return Ok(if has_redis { EngineKind::Redis } else { EngineKind::Embedded });
    }
    match layers.choice(name, &[("embedded", EngineKind::Embedded), ("redis", EngineKind::Redis)])? {
        EngineKind::Redis if !has_redis => Err(layers.error(name, "`redis` needs REDIS_URL")),
        engine => Ok(engine),
    }
}

fn journal(layers: &Layers) -> Result<Option<JournalOptions>, SettingError> {
    let sync = layers.choice(
        "TIDINGS_FSYNC",
        &[
            ("always", Sync::Always),
            ("interval", Sync::Interval(Duration::from_secs(1))),
            ("never", Sync::Never),
        ],
    )?;
    let options = JournalOptions {
        folder: layers.text("TIDINGS_DATA_DIR").into(),
        sync,
        log_bytes_max: layers.number("TIDINGS_JOURNAL_BYTES", 1 << 16, 1 << 40)?,
    };
    Ok(layers.choice("TIDINGS_PERSIST", &YES_OR_NO)?.then_some(options))
}

fn workspaces(layers: &Layers) -> Result<BTreeMap<String, ProjectId>, SettingError> {
    let invalid = |workspace: &str, message| layers.error("workspaces", format!("{workspace}: {message}"));
    let check = |(workspace, project): (&String, &String)| {
        let project = ProjectId::try_from(project.as_str()).map_err(|error| invalid(workspace, error))?;
        Ok((workspace.clone(), project))
    };
    layers.workspaces().iter().map(check).collect()
}

fn host_name() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, String> {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let layers = Layers::load(&Flags::default(), &variables, None).map_err(|error| error.to_string())?;
        Settings::read(&layers).map_err(|error| error.to_string())
    }

    #[test]
    fn the_websocket_url_follows_the_environment() {
        let url = |variables: &[(&str, &str)]| read(variables).unwrap().websocket_url(None);
        assert_eq!(url(&[]), "ws://localhost:8000/ws");
        let docker = [
            ("ENVIRONMENT", "docker"),
            ("TIDINGS_AUTH", "none"),
            ("BACKEND_HOST", "tidings"),
            ("BACKEND_PORT", "81"),
        ];
        assert_eq!(url(&docker), "ws://tidings:81/ws");
        let production =
            [("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none"), ("DOMAIN", "app.example.com")];
        assert_eq!(url(&production), "wss://app.example.com/ws");
        let tls = [("TIDINGS_TLS_CERT", "c.pem"), ("TIDINGS_TLS_KEY", "k.pem")];
        assert_eq!(url(&tls), "wss://localhost:8000/ws");
        assert_eq!(url(&[&docker[..], &tls].concat()), "wss://tidings:81/ws");
    }

    #[test]
    fn a_service_that_others_can_reach_does_not_start_without_a_word_about_rights() {
        for variables in [
            &[("ENVIRONMENT", "production")][..],
            &[("ENVIRONMENT", "docker")],
            &[("TIDINGS_LISTEN", "0.0.0.0:8000")],
        ] {
            let error = read(variables).unwrap_err();
            assert!(error.contains("TIDINGS_AUTH"), "{error}");
        }
    }

    #[test]
    fn a_secret_that_can_be_guessed_is_refused_outside_development() {
        let production = [("ENVIRONMENT", "production"), ("TIDINGS_AUTH", "none")];
        for (name, value, words) in [
            ("TIDINGS_PUBLISH_KEYS", "0123456789abcdef,short", "key 2 of 2: expected at least 16 bytes"),
            ("TIDINGS_ADMIN_KEY", "0123456789abcde", "expected at least 16 bytes"),
        ] {
            let error = read(&[&production[..], &[(name, value)]].concat()).unwrap_err();
            assert!(error.starts_with(name) && error.contains(words) && !error.contains(value), "{error}");
            assert!(read(&[(name, value)]).is_ok(), "{name} in development");
        }
        let keys = ("TIDINGS_KEYS", r#"[{"name":"web","key":"short"}]"#);
        assert!(
            read(&[keys]).unwrap_err().contains("keys[0].key (from environment): expected 16 to 1024 bytes")
        );
    }

    #[test]
    fn every_descriptor_is_meant_for_something() {
        for (limit, shards) in [(64, 1), (100, 1), (1024, 2), (20_000, 2), (1_048_576, 64)] {
            let Sockets { connections, public, internal } = Sockets::of(limit, shards);
            assert!(
                connections < public && public + internal < limit,
                "{limit}: {connections} {public} {internal}"
            );
            assert!(limit - public - internal >= 16 + 4 * shards, "{limit}");
        }
        assert_eq!(Sockets::of(100, 1).connections, 60);
    }

    #[test]
    fn what_is_for_tls_to_redis_does_not_go_with_a_plain_url() {
        let ca = ("TIDINGS_REDIS_CA", "ca.pem");
        let error = read(&[("REDIS_URL", "redis://h"), ca]).unwrap_err();
        assert!(error.contains("TIDINGS_REDIS_CA") && error.contains("`rediss`"), "{error}");
        for url in ["rediss://h", "rediss+sentinel://h/main", "rediss+cluster://h"] {
            assert!(read(&[("REDIS_URL", url), ca]).is_ok(), "{url}");
        }
    }

    #[test]
    fn proxies_are_networks_addresses_or_none_and_a_limit_without_them_is_told() {
        let limit = ("TIDINGS_CONNECTIONS_PER_ADDRESS_MAX", "5");
        let unset = read(&[limit]).unwrap();
        assert_eq!(unset.trusted_proxies, None);
        assert!(unset.cautions().concat().contains("no effect without TIDINGS_TRUSTED_PROXIES"));
        let none = read(&[limit, ("TIDINGS_TRUSTED_PROXIES", "none")]).unwrap();
        assert_eq!((none.trusted_proxies.as_deref(), none.cautions().len()), (Some(&[][..]), 0));
        let some = read(&[("TIDINGS_TRUSTED_PROXIES", "10.0.0.0/8, ::1,192.0.2.1")]).unwrap();
        let networks = ["10.0.0.0/8", "::1/128", "192.0.2.1/32"].map(|network| network.parse().unwrap());
        assert_eq!(some.trusted_proxies.as_deref(), Some(&networks[..]));
    }

    #[test]
    fn a_setting_that_cannot_be_read_is_named_with_its_origin_and_what_was_expected() {
        for (name, value, words) in [
            ("WS_HEARTBEAT_INTERVAL", "soon", "a whole number from 1 to 3600"),
            ("WS_HEARTBEAT_INTERVAL", "0", "a whole number from 1 to 3600"),
            ("BACKEND_PORT", "70000", "a whole number from 0 to 65535"),
            ("ENVIRONMENT", "prod", "`development`, `docker`, `production`"),
            ("TIDINGS_LISTEN", "nowhere", "an address with a port"),
            ("REDIS_URL", "http://x", "redis://host:port"),
            ("REDIS_URL", "redis+sentinel://a:1", "the primary's name"),
            ("TIDINGS_ALLOWED_ORIGINS", "https://a.example/", "without a path"),
            ("TIDINGS_ALLOWED_ORIGINS", "a.example", "expected an origin"),
            ("TIDINGS_ENGINE", "redis", "needs REDIS_URL"),
            ("TIDINGS_ENGINE", "disk", "`embedded`, `redis`"),
            ("TIDINGS_TRUSTED_PROXIES", "10.0.0.0/8,proxy", "`proxy`: expected an address or a network"),
            ("TIDINGS_TRUSTED_PROXIES", "10.0.0.0/33", "expected an address or a network"),
            ("TIDINGS_CONNECTIONS_MAX", "0", "a whole number from 1"),
            ("TIDINGS_ACCEPT_RATE_MAX", "fast", "a whole number from 1"),
            ("TIDINGS_PUBLISH_RATE_MAX", "0", "a whole number from 1"),
            ("TIDINGS_HANDSHAKE_SECONDS", "121", "a whole number from 1 to 120"),
            ("TIDINGS_MESSAGE_RATE_MAX", "0", "a whole number from 1 to 100000"),
            ("TIDINGS_KEYS", "x", "expected a JSON array"),
            ("TIDINGS_DRAIN_SECONDS", "3601", "a whole number from 0 to 3600"),
            ("TIDINGS_TLS_CERT", "c.pem", "needs TIDINGS_TLS_KEY"),
            ("TIDINGS_TLS_KEY", "k.pem", "needs TIDINGS_TLS_CERT"),
            ("TIDINGS_REDIS_CERT", "c.pem", "needs TIDINGS_REDIS_KEY"),
            ("TIDINGS_LOG_FORMAT", "xml", "`text`, `json`"),
            ("CONTAINER_RESTART", "maybe", "`false`, `true`"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(
                error.contains(name) && error.contains(words) && error.contains("environment"),
                "{name}: {error}"
            );
        }
    }
}
