//! Where a Redis is: one server, a primary that Sentinel names, or a Cluster.

use std::{fmt, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _,
    ProtocolVersion, RedisConnectionInfo, RedisResult, TlsCertificates, TlsMode,
    io::tcp::TcpSettings,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};

/// The port of a Redis, and of a Cluster's node, that names none.
const REDIS_PORT: u16 = 6379;
/// The port of a Sentinel that names none.
const SENTINEL_PORT: u16 = 26379;

/// A Redis as `REDIS_URL` names it: `redis://`, `rediss://`, `redis+sentinel://host:port,host:port/master-name`,
/// `redis+cluster://host:port,host:port`; the latter two with `rediss+` for TLS, which is spoken with Sentinels, too. A user and a
/// password stand before the hosts, as in any URL.
#[derive(Clone)]
pub struct RedisAddress {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Server(ConnectionInfo),
    Sentinel {
        sentinels: Vec<(String, u16)>,
        master: String,
        tls: bool,
        /// Beyond what everybody trusts.
        certificates: Option<TlsCertificates>,
        settings: RedisConnectionInfo,
    },
    Cluster {
        seeds: Vec<ConnectionInfo>,
    },
}

/// What connections over TLS trust and show, as PEM.
#[derive(Clone, Default)]
pub struct RedisTls {
    /// Authorities in place of the public ones.
    pub authorities: Option<Vec<u8>>,
    /// A client's certificate with its chain, and its private key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

impl fmt::Debug for RedisTls {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisTls")
            .field("authorities", &self.authorities.is_some())
            .field("client", &self.client.is_some())
            .finish()
    }
}

/// Why a URL names no Redis. Repeats nothing of it: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidAddress(&'static str);

const EXPECTED: InvalidAddress = InvalidAddress(
    "expected `redis://host:port`, `redis+sentinel://host:port,host:port/master-name` or \
     `redis+cluster://host:port,host:port`, each with `rediss` in place of `redis` for TLS",
);

impl fmt::Debug for RedisAddress {
    /// Without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Server(info) => write!(f, "{}", info.addr()),
            Kind::Sentinel { master, .. } => write!(f, "the primary {master:?} that Sentinel names"),
            Kind::Cluster { seeds } => write!(f, "the Cluster of {} named nodes", seeds.len()),
        }
    }
}

impl RedisAddress {
    /// Reads a URL.
    pub fn parse(url: &str) -> Result<Self, InvalidAddress> {
        let (scheme, rest) = url.split_once("://").ok_or(EXPECTED)?;
        let kind = match scheme {
            "redis" | "rediss" | "redis+unix" | "unix" => {
                Kind::Server(with_our_settings(url.into_connection_info().map_err(|_| EXPECTED)?))
            }
            "redis+sentinel" | "rediss+sentinel" => sentinel(rest, scheme.starts_with("rediss"))?,
            "redis+cluster" | "rediss+cluster" => cluster(rest, scheme.starts_with("rediss"))?,
            _ => return Err(EXPECTED),
        };
        Ok(Self { kind })
    }

    /// The same, with what its connections trust and show.
    pub fn over_tls(mut self, tls: RedisTls) -> Result<Self, String> {
        let client_tls =
            tls.client.map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key });
        let all = TlsCertificates { client_tls, root_cert: tls.authorities };
        let over_tls = |info: &ConnectionInfo| {
            let client = Client::build_with_tls(info.clone(), all.clone());
            client.map(|client| client.get_connection_info().clone()).map_err(|error| error.to_string())
        };
        match &mut self.kind {
            Kind::Server(info) => *info = over_tls(info)?,
            Kind::Sentinel { certificates, .. } => *certificates = Some(all),
            Kind::Cluster { seeds } => {
                *seeds = seeds.iter().map(over_tls).collect::<Result<_, _>>()?;
            }
        }
        Ok(self)
    }

    /// Whether its connections are protected.
    pub fn is_tls(&self) -> bool {
        let is_tls = |info: &ConnectionInfo| matches!(info.addr(), ConnectionAddr::TcpTls { .. });
        match &self.kind {
            Kind::Server(info) => is_tls(info),
            Kind::Sentinel { tls, .. } => *tls,
            Kind::Cluster { seeds } => seeds.iter().all(is_tls),
        }
    }

    /// The number of the database that it names.
    pub fn database(&self) -> u32 {
        let number = |settings: &RedisConnectionInfo| u32::try_from(settings.db()).unwrap_or(0);
        match &self.kind {
            Kind::Server(info) => number(info.redis_settings()),
            Kind::Sentinel { settings, .. } => number(settings),
            Kind::Cluster { .. } => 0,
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.kind, Kind::Cluster { .. })
    }

    pub(super) fn is_sentinel(&self) -> bool {
        matches!(self.kind, Kind::Sentinel { .. })
    }

    /// The nodes of the Cluster that are named; empty: it is none.
    pub(super) fn seeds(&self) -> &[ConnectionInfo] {
        match &self.kind {
            Kind::Cluster { seeds } => seeds,
            _ => &[],
        }
    }

    /// A node of the Cluster by its host and port, reached as the named ones are.
    pub(super) fn node(&self, host: &str, port: u16) -> Option<ConnectionInfo> {
        let seed = self.seeds().first()?;
        // A node that does not know its own address leaves it out: it is where it was asked.
        let host = if host.is_empty() { host_of(seed.addr())? } else { host.to_owned() };
        let addr = match seed.addr() {
            ConnectionAddr::TcpTls { tls_params, .. } => {
                ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: tls_params.clone() }
            }
            _ => ConnectionAddr::Tcp(host, port),
        };
        Some(seed.clone().set_addr(addr))
    }

    /// The primary now; of a Cluster, some node of it. With Sentinel, it is asked each time.
    pub async fn client(&self) -> RedisResult<Client> {
        match &self.kind {
            Kind::Server(info) => Client::open(info.clone()),
            Kind::Sentinel { sentinels, master, tls, certificates, settings } => {
                let certificates = certificates.as_ref().filter(|_| *tls);
                let mut client = sentinel_client(sentinels, master, *tls, certificates, settings)?;
                client.async_get_client().await
            }
            Kind::Cluster { seeds } => {
                Client::open(seeds.first().expect("a Cluster's URL names a node").clone())
            }
        }
    }
}

/// How connections of ours are configured: bounded in every wait.
pub(super) fn connection_config(answer_timeout: Duration) -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(Duration::from_secs(1)))
        .set_response_timeout(Some(answer_timeout))
        .set_pipeline_buffer_size(1024)
}

fn sentinel_client(
    sentinels: &[(String, u16)],
    master: &str,
    tls: bool,
    certificates: Option<&TlsCertificates>,
    settings: &RedisConnectionInfo,
) -> RedisResult<SentinelClient> {
    let addresses = sentinels.iter().cloned().map(|(host, port)| address_of(host, port, tls));
    let mut builder = SentinelClientBuilder::new(addresses, master, SentinelServerType::Master)?
        .set_client_to_redis_protocol(ProtocolVersion::RESP3)
        .set_client_to_redis_db(settings.db())
        .set_client_to_redis_tcp_settings(TcpSettings::default().set_nodelay(true));
    if tls {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some(certificates) = certificates {
        builder = builder
            .set_client_to_redis_certificates(certificates.clone())
            .set_client_to_sentinel_certificates(certificates.clone());
    }
    if let Some(username) = settings.username() {
        builder = builder.set_client_to_redis_username(username);
    }
    if let Some(password) = settings.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    builder.build()
}

fn sentinel(rest: &str, tls: bool) -> Result<Kind, InvalidAddress> {
    let missing = InvalidAddress(
        "expected the primary's name behind the hosts: `redis+sentinel://host:port/master-name`",
    );
    let (hosts, path) = rest.split_once('/').ok_or(missing.clone())?;
    let (master, database) = path.split_once('/').unwrap_or((path, ""));
    if master.is_empty() {
        return Err(missing);
    }
    let (settings, hosts) = user_and_hosts(hosts)?;
    let settings = match database {
        "" => settings,
        database => settings.set_db(database.parse().map_err(|_| EXPECTED)?),
    };
    let sentinels = hosts_and_ports(hosts, SENTINEL_PORT)?;
    Ok(Kind::Sentinel { sentinels, master: master.to_owned(), tls, certificates: None, settings })
}

fn cluster(rest: &str, tls: bool) -> Result<Kind, InvalidAddress> {
    let (settings, hosts) = user_and_hosts(rest.trim_end_matches('/'))?;
    let hosts = hosts_and_ports(hosts, REDIS_PORT)?;
    let seeds = hosts.into_iter().map(|(host, port)| {
        let info = address_of(host, port, tls).into_connection_info().map_err(|_| EXPECTED)?;
        Ok(with_our_settings(info.set_redis_settings(settings.clone())))
    });
    Ok(Kind::Cluster { seeds: seeds.collect::<Result<_, _>>()? })
}

fn address_of(host: String, port: u16, tls: bool) -> ConnectionAddr {
    if tls {
        ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, port)
    }
}

fn with_our_settings(info: ConnectionInfo) -> ConnectionInfo {
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    info.set_redis_settings(settings).set_tcp_settings(TcpSettings::default().set_nodelay(true))
}

fn user_and_hosts(text: &str) -> Result<(RedisConnectionInfo, &str), InvalidAddress> {
    let settings = RedisConnectionInfo::default();
    let Some((user, hosts)) = text.rsplit_once('@') else { return Ok((settings, text)) };
    let decode = |part: &str| {
        percent_encoding::percent_decode_str(part)
            .decode_utf8()
            .map(std::borrow::Cow::into_owned)
            .map_err(|_| EXPECTED)
    };
    let (username, password) = user.split_once(':').ok_or(EXPECTED)?;
    let settings = if username.is_empty() { settings } else { settings.set_username(decode(username)?) };
    Ok((settings.set_password(decode(password)?), hosts))
}

fn hosts_and_ports(hosts: &str, default_port: u16) -> Result<Vec<(String, u16)>, InvalidAddress> {
    let read = |host: &str| {
        let (host, port) = match host.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| EXPECTED)?),
            _ => (host, default_port),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() { Err(EXPECTED) } else { Ok((host.to_owned(), port)) }
    };
    hosts.split(',').map(|host| read(host.trim())).collect()
}

fn host_of(addr: &ConnectionAddr) -> Option<String> {
    match addr {
        ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => Some(host.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_every_kind_are_read_and_nothing_else_is() {
        for (url, shown) in [
            ("redis://h", "h:6379"),
            ("redis://user:secret@h:7/2", "h:7"),
            ("redis+sentinel://a:1,b/main", "the primary \"main\" that Sentinel names"),
            ("redis+sentinel://:secret@a:1/main/3", "the primary \"main\" that Sentinel names"),
            ("redis+cluster://a:1,[::1]:2,c", "the Cluster of 3 named nodes"),
            ("rediss://user:secret@h", "h:6379"),
            ("rediss+sentinel://a/main", "the primary \"main\" that Sentinel names"),
            ("rediss+cluster://a", "the Cluster of 1 named nodes"),
        ] {
            let address = RedisAddress::parse(url).unwrap();
            assert_eq!(
                (format!("{address:?}").as_str(), address.is_tls()),
                (shown, url.starts_with("rediss"))
            );
        }
        for url in [
            "",
            "h:1",
            "http://h",
            "redis+sentinel://a:1",
            "redis+sentinel://a:1/",
            "redis+cluster://",
            "redis+cluster://a:x",
        ] {
            assert!(RedisAddress::parse(url).is_err(), "{url}");
        }
    }
}
