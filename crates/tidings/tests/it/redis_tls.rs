//! Redis over TLS: what is trusted, what is shown, and what a service says when that does not fit.

use std::process::{Child, Command, Stdio};

use futures_util::future::join_all;
use redis::{ClientTlsConfig, FromRedisValue, TlsCertificates, aio::MultiplexedConnection};
use serde_json::json;
use tempfile::TempDir;
use tidings::Server;

use crate::{
    certificates::{Authority, text},
    client::Client,
    fixture::{self, Redis, Service, request, until},
};

/// The user that `docs/operations.md` shows, and nobody else.
const LEAST: &str = "user default off\n\
    user tidings on >password ~tidings:* ~ws:connection:* &* +@all -@admin -@dangerous +info +role +client\n";

/// A `redis-server` that speaks TLS only, or a Sentinel, with a certificate for its address.
struct TlsRedis {
    process: Child,
    port: u16,
    user: &'static str,
    authority: Authority,
    folder: TempDir,
}

impl TlsRedis {
    /// One with these lines in its settings.
    async fn started(user: &'static str, settings: &str) -> Self {
        Self::with(Authority::new("redis"), "127.0.0.1", user, settings, &[]).await
    }

    async fn with(
        authority: Authority,
        name: &str,
        user: &'static str,
        settings: &str,
        arguments: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = Redis::reserved().port();
        let (certificate, key) = authority.sign(&[name]).write(folder.path(), "redis");
        authority.sign(&["client"]).write(folder.path(), "client");
        let ca = folder.path().join("ca.pem");
        std::fs::write(&ca, authority.pem()).unwrap();
        let mut all = format!(
            "port 0\ntls-port {port}\nbind 127.0.0.1\ntls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {}\n",
            text(&certificate),
            text(&key),
            text(&ca)
        );
        all.push_str(settings);
        let file = folder.path().join("redis.conf");
        std::fs::write(&file, all).unwrap();
        let process = Command::new("redis-server")
            .arg(file)
            .args(arguments)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: `cargo xtask test` does it");
        let redis = Self { process, port, user, authority, folder };
        until("Redis starting", || async { std::net::TcpStream::connect(("127.0.0.1", redis.port)).is_ok() })
            .await;
        redis
    }

    fn path(&self, name: &str) -> String {
        text(&self.folder.path().join(name)).to_owned()
    }

    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}127.0.0.1:{}", self.user, self.port)
    }

    /// The settings of a service that reaches it, also if it asks for a certificate.
    fn settings(&self, url: String) -> Vec<(&'static str, String)> {
        vec![
            ("REDIS_URL", url),
            ("TIDINGS_REDIS_CA", self.path("ca.pem")),
            ("TIDINGS_REDIS_CERT", self.path("client.pem")),
            ("TIDINGS_REDIS_KEY", self.path("client.key")),
        ]
    }

    async fn connection(&self) -> MultiplexedConnection {
        let read = |name| std::fs::read(self.path(name)).unwrap();
        let client_tls =
            Some(ClientTlsConfig { client_cert: read("client.pem"), client_key: read("client.key") });
        let certificates = TlsCertificates { client_tls, root_cert: Some(read("ca.pem")) };
        let client = redis::Client::build_with_tls(self.url("rediss"), certificates).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    async fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        redis::cmd(words[0]).arg(&words[1..]).query_async(&mut self.connection().await).await.unwrap()
    }
}

impl Drop for TlsRedis {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn borrowed<'a>(settings: &'a [(&'static str, String)]) -> Vec<(&'static str, &'a str)> {
    settings.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

/// A service on it is ready, and delivers what is published over HTTP and on the plain channel.
async fn check_delivers(redis: &TlsRedis, settings: &[(&'static str, String)]) {
    let service = Service::with(&borrowed(settings));
    until("readiness", || async { request("GET", &service.url("/readyz"), &[], b"").await.status == 200 })
        .await;
    let mut client = Client::subscribed(&service, "p").await;
    service.publish(&json!({"type": "a.b", "project_id": "p", "n": 1})).await;
    assert_eq!(client.next_event().await["n"], 1);
    let event = r#"{"type":"a.b","project_id":"p","n":2}"#;
    let heard: u64 = redis.command(&["PUBLISH", "websocket:broadcast", event]).await;
    assert_eq!(heard, 1);
    assert_eq!(client.next_event().await["n"], 2);
    client.close().await;
}

#[tokio::test]
async fn a_user_who_may_no_more_than_it_needs_publishes_and_delivers_over_tls() {
    for asks in ["no", "yes"] {
        let redis =
            TlsRedis::started("tidings:password@", &format!("{LEAST}tls-auth-clients {asks}\n")).await;
        let mut settings = redis.settings(redis.url("rediss"));
        if asks == "no" {
            settings.truncate(2);
        }
        check_delivers(&redis, &settings).await;
    }
}

#[tokio::test]
async fn a_primary_is_found_by_a_sentinel_that_speaks_tls() {
    let redis = TlsRedis::started("", "tls-replication yes\n").await;
    let monitor = format!("tls-replication yes\nsentinel monitor main 127.0.0.1 {} 1\n", redis.port);
    // Both have the same authority.
    let TlsRedis { authority, .. } = &redis;
    let sentinel = TlsRedis::with(authority.clone(), "127.0.0.1", "", &monitor, &["--sentinel"]).await;
    let url = format!("{}/main", sentinel.url("rediss+sentinel"));
    check_delivers(&redis, &sentinel.settings(url)).await;
}

#[tokio::test]
async fn a_cluster_that_speaks_tls_is_one_like_any_other() {
    let redis = TlsRedis::started("", "cluster-enabled yes\ntls-cluster yes\n").await;
    redis.command::<()>(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    until("the Cluster being whole", || async {
        redis.command::<String>(&["CLUSTER", "INFO"]).await.contains("cluster_state:ok")
    })
    .await;
    check_delivers(&redis, &redis.settings(redis.url("rediss+cluster"))).await;
}

/// Why a service with these settings does not start.
async fn refusal(settings: &[(&'static str, String)]) -> String {
    let own = [("BACKEND_PORT", "0".to_owned()), ("TIDINGS_PERSIST", "false".to_owned())];
    let all = own.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    Server::bind(fixture::settings(&all)).await.unwrap_err().to_string()
}

#[tokio::test]
async fn what_does_not_fit_is_told_in_a_line_that_says_what_to_do() {
    let asking = TlsRedis::started("", "tls-auth-clients yes\n").await;
    let other_name =
        TlsRedis::with(Authority::new("redis"), "redis.example.com", "", "tls-auth-clients no\n", &[]).await;
    let plain = Redis::started().await;
    let with = |redis: &TlsRedis, url: String, count: usize| redis.settings(url)[..count].to_vec();
    let mut other_authority = asking.settings(asking.url("rediss"));
    other_authority[1].1 = other_name.path("ca.pem");
    let mut no_authority = asking.settings(asking.url("rediss"));
    no_authority[1].1 = asking.path("client.key");
    let mut other_key = asking.settings(asking.url("rediss"));
    other_key[3].1 = other_name.path("client.key");
    let mut unknown_client = asking.settings(asking.url("rediss"));
    (unknown_client[2].1, unknown_client[3].1) =
        (other_name.path("client.pem"), other_name.path("client.key"));
    let plain_url = |scheme: &str| format!("{scheme}://127.0.0.1:{}", plain.port());
    let cases = [
        (other_authority, ["REDIS_URL", "no authority that is trusted", "TIDINGS_REDIS_CA"]),
        (with(&asking, asking.url("rediss"), 1), ["REDIS_URL", "no authority", "TIDINGS_REDIS_CA"]),
        (with(&asking, asking.url("rediss+cluster"), 1), ["REDIS_URL", "no authority", "TIDINGS_REDIS_CA"]),
        (
            with(&asking, asking.url("rediss+sentinel") + "/main", 1),
            ["REDIS_URL", "no authority", "TIDINGS_REDIS_CA"],
        ),
        (
            with(&other_name, other_name.url("rediss"), 2),
            ["REDIS_URL", "for another host name", "as its certificate does"],
        ),
        (
            with(&asking, plain_url("rediss"), 2),
            ["REDIS_URL", "timed out", "the port on which it speaks TLS"],
        ),
        (with(&asking, asking.url("rediss"), 2), ["REDIS_URL", "client certificate", "TIDINGS_REDIS_CERT"]),
        (unknown_client, ["REDIS_URL", "client certificate", "TIDINGS_REDIS_CERT"]),
        (no_authority, ["TIDINGS_REDIS_CA", "has no certificate", "client.key"]),
        (other_key, ["TIDINGS_REDIS_KEY", "key of another certificate", "TIDINGS_REDIS_CERT"]),
        (with(&asking, asking.url("redis"), 1), ["REDIS_URL", "`rediss` if it speaks TLS", "Start it"]),
    ];
    join_all(cases.into_iter().map(|(settings, words)| async move {
        let error = refusal(&settings).await;
        assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
    }))
    .await;
}

#[tokio::test]
async fn a_password_that_is_wrong_or_missing_is_told_and_not_shown() {
    let redis = Redis::started().await;
    let mut connection = redis.connection().await.unwrap();
    let set = ["SET", "requirepass", "the-right-one"];
    redis::cmd("CONFIG").arg(&set).exec_async(&mut connection).await.unwrap();
    for password in ["", ":the-wrong-one@"] {
        let url = format!("redis://{password}127.0.0.1:{}", redis.port());
        let error = refusal(&[("REDIS_URL", url)]).await;
        let says_why = ["NOAUTH", "WRONGPASS", "password"].iter().any(|word| error.contains(word));
        assert!(error.starts_with("REDIS_URL") && says_why && !error.contains("the-wrong-one"), "{error}");
    }
}
