//! The tools themselves: what is said to break does break, and heals. A fault that does not happen proves nothing.

use std::time::Duration;

use redis::RedisResult;

use crate::{
    cluster_set::ClusterSet,
    process::{until, within},
    proxy::{Network, Proxy},
    redis_server::{DURABLE, RedisServer, VOLATILE},
    sentinel_set::SentinelSet,
    stage::alone,
};

const MOMENT: Duration = Duration::from_millis(300);

async fn read(redis: &RedisServer) -> RedisResult<Option<String>> {
    redis.command(&["GET", "key"]).await
}

async fn write(redis: &RedisServer, value: &str) {
    redis.command::<()>(&["SET", "key", value]).await.unwrap();
}

#[test]
fn a_redis_goes_back_in_time_or_keeps_everything_as_it_is_told() {
    alone(async {
        let mut redis = RedisServer::started(VOLATILE).await;
        write(&redis, "older").await;
        let copy = redis.copy_data().await;
        write(&redis, "newer").await;
        redis.kill();
        redis.set_back_to(&copy);
        redis.start().await;
        assert_eq!(read(&redis).await.unwrap().as_deref(), Some("older"));
        let mut redis = RedisServer::started(DURABLE).await;
        write(&redis, "kept").await;
        redis.kill();
        redis.start().await;
        assert_eq!(read(&redis).await.unwrap().as_deref(), Some("kept"));
        redis.pause();
        assert!(tokio::time::timeout(MOMENT, read(&redis)).await.is_err() || read(&redis).await.is_err());
        redis.go_on();
        until("Redis answering again", || async { read(&redis).await.is_ok() }).await;
    });
}

#[test]
fn sentinels_promote_the_replica_and_it_has_what_had_reached_it() {
    alone(async {
        let mut set = SentinelSet::started().await;
        write(set.primary(), "replicated").await;
        until("the replica having it", || async {
            read(set.replica()).await.is_ok_and(|value| value.as_deref() == Some("replicated"))
        })
        .await;
        set.cut_replication().await;
        write(set.primary(), "never replicated").await;
        set.fail_primary();
        set.failed_over().await;
        assert_eq!(read(set.replica()).await.unwrap().as_deref(), Some("replicated"));
    });
}

#[test]
fn a_slot_moves_with_its_keys() {
    alone(async {
        let cluster = ClusterSet::started().await;
        let slot: u16 = cluster.servers()[0].command(&["CLUSTER", "KEYSLOT", "{tag}"]).await.unwrap();
        let owner = usize::from(slot / (16_384 / 3)).min(2);
        for key in ["{tag}1", "{tag}2", "{tag}3"] {
            cluster.servers()[owner].command::<()>(&["SET", key, key]).await.unwrap();
        }
        assert_eq!(cluster.slots_with_keys(owner, "tag").await, [slot]);
        let to = (owner + 1) % 3;
        cluster.move_slot(slot, owner, to).await;
        assert_eq!(cluster.slots_with_keys(owner, "tag").await, [0; 0]);
        assert_eq!(cluster.slots_with_keys(to, "tag").await, [slot]);
        let value: String = cluster.servers()[to].command(&["GET", "{tag}3"]).await.unwrap();
        assert_eq!(value, "{tag}3");
    });
}

#[test]
fn a_network_cuts_and_swallows_and_passes_again() {
    alone(async {
        let redis = RedisServer::started(VOLATILE).await;
        let proxy = Proxy::before(redis.port()).await;
        let connect = || async {
            let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
            let client = redis::Client::open(proxy.url()).unwrap();
            client.get_multiplexed_async_connection_with_config(&config).await
        };
        let mut older = connect().await.unwrap();
        let ping = || redis::cmd("PING");
        ping().query_async::<()>(&mut older).await.unwrap();
        proxy.set(Network::Swallows);
        let mut late = tokio::time::timeout(2 * MOMENT, ping().query_async::<()>(&mut older)).await;
        assert!(late.is_err(), "an answer through a black hole");
        assert!(tokio::time::timeout(MOMENT, connect()).await.is_err());
        proxy.set(Network::Passes(MOMENT));
        // What stood still arrives; later answers are as late as they are told to be.
        late = tokio::time::timeout(20 * MOMENT, ping().query_async::<()>(&mut older)).await;
        assert!(late.is_ok_and(|answer| answer.is_ok()));
        assert!(!within(MOMENT, || async { connect().await.is_ok() }).await);
        proxy.set(Network::Cut);
        assert!(ping().query_async::<()>(&mut older).await.is_err());
        assert!(connect().await.is_err());
        proxy.set(Network::Passes(Duration::ZERO));
        assert!(connect().await.is_ok());
    });
}
