//! The load generator, against the service and against what is none.

use serde_json::Value;

use crate::{
    commands::{run, text},
    fixture::Service,
};

/// Runs a mode against a service, which must deliver as it should; the figures.
fn figures(service: &Service, mode: &str, arguments: &[&str]) -> Value {
    let url = format!("ws://127.0.0.1:{}/ws", service.address.port());
    let mut all = vec!["bench", mode, "--url", &url, "--json"];
    all.extend(arguments);
    let output = run(&all, &[]);
    let (figures, error) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{mode}: {figures} {error}");
    let figures: Value = serde_json::from_str(&figures).unwrap();
    assert_eq!(figures["errors"], serde_json::json!({}), "{mode}");
    figures
}

#[test]
fn events_to_many_subscribers_arrive_at_each_once_and_in_order() {
    let service = Service::start();
    let pid = std::process::id().to_string();
    let arguments = ["-n", "20", "--duration", "0.5", "--warmup", "0.1", "--outstanding", "8", "--pid", &pid];
    let closed_loop = figures(&service, "fanout", &arguments);
    assert!(closed_loop["deliveries_per_second"].as_u64().unwrap() > 0);
    assert!(closed_loop["latency_us"]["count"].as_u64().unwrap() > 0);
    let open_loop = figures(
        &service,
        "fanout",
        &[
            "-n",
            "20",
            "--projects",
            "5",
            "--subscriptions",
            "2",
            "--type",
            "mixed",
            "--filtered",
            "0.5",
            "--slow",
            "2",
            "--stuck",
            "1",
            "--rate",
            "200",
            "--duration",
            "0.5",
            "--warmup",
            "0",
        ],
    );
    assert!(open_loop["slow_latency_us"]["count"].as_u64().unwrap() > 0);
}

#[test]
fn a_storm_of_connections_that_come_back_misses_nothing() {
    let service = Service::start();
    let storm = figures(&service, "storm", &["-n", "50", "--rate", "200", "--duration", "0.3"]);
    assert_eq!(storm["whole_us"]["count"], 50);
}

#[test]
fn large_events_and_idle_connections_are_measured() {
    let service = Service::start();
    let big = figures(&service, "big", &["-n", "3", "--big-rate", "5", "--duration", "0.5", "--warmup", "0"]);
    assert!(big["big_latency_us"]["count"].as_u64().unwrap() > 0);
    figures(&service, "idle", &["-n", "30", "--duration", "0.1"]);
}

#[test]
fn a_server_that_is_not_there_is_told() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("ws://127.0.0.1:{port}/ws");
    for (arguments, words) in [
        (&["bench", "idle", "-n", "3", "--url", &url][..], "refused"),
        (&["bench", "fanout", "--url", &url], "cannot be reached"),
        (&["bench", "fanout", "--url", "wss://example.com/ws"], "expected ws://"),
        (&["bench", "fanout", "--publish", "kafka"], "expected redis://"),
    ] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}
