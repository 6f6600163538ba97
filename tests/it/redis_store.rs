//! Whole servers over Redis: one that is away at the start, one that cannot be a store, and a cluster.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use feature_defs::time::Micros;
use feature_defs::window::SECOND;
use gateway::config::ServeOptions;
use gateway::roles::Roles;
use gateway::run::serve;
use online_store::conformance::redis_cluster::RedisCluster;
use online_store::conformance::redis_server::RedisServer;
use proto::v1;
use tests::column::{doubles, strings, timestamps};
use tests::{ManualClock, Project, Server};

const T0: Micros = 1_700_000_000 * SECOND;
const PATIENCE: Duration = Duration::from_secs(30);

const DEFINITIONS: &str = "
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64}]
    event_time: sold_at
feature_views:
  - {name: last_sale, entity: shop, source: sales, features: [{name: amount, type: float64}]}
  - {name: turnover, entity: shop, source: sales, windows: [1h], aggregates: [{name: n, function: count}]}
feature_services:
  - {name: both, features: [\"last_sale:*\", \"turnover:*\"]}
";

fn project(online: &str) -> Project {
    let serve = "serve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}";
    Project::new(&format!("project: shops\nonline: {online}\n{serve}\n"), DEFINITIONS).unwrap()
}

fn options(project: &Project, clock: &ManualClock) -> ServeOptions {
    let (settings, project_dir) = (project.settings().unwrap(), project.path().into());
    ServeOptions { settings, roles: Roles::ALL, project_dir, clock: clock.clock(), runtime: None, certifier: None }
}

/// Status line and body.
fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

async fn ready(address: SocketAddr) -> String {
    tokio::task::spawn_blocking(move || get(address, "/ready")).await.unwrap()
}

async fn push(server: &Server, shops: &[String], amount: f64) {
    let shop: Vec<Option<&str>> = shops.iter().map(|shop| Some(shop.as_str())).collect();
    let rows = vec![
        strings("shop", &shop),
        doubles("amount", &vec![Some(amount); shops.len()]),
        timestamps("sold_at", &vec![Some(T0); shops.len()]),
    ];
    let pushed = server.push("sales", rows).await.unwrap();
    assert!(pushed.rejected.is_empty(), "{:?}", pushed.rejected);
}

/// The amounts and counts of shops, with their statuses.
async fn features(server: &Server, shops: &[String]) -> v1::GetFeaturesResponse {
    let shop: Vec<Option<&str>> = shops.iter().map(|shop| Some(shop.as_str())).collect();
    let request = v1::GetFeaturesRequest {
        project: server.project.clone(),
        what: Some(v1::get_features_request::What::Service("both".into())),
        rows: vec![strings("shop", &shop)],
        ..v1::GetFeaturesRequest::default()
    };
    server.gateway.clone().get_features(request).await.unwrap().into_inner()
}

fn present(response: &v1::GetFeaturesResponse) -> bool {
    response.features.iter().all(|feature| feature.statuses.iter().all(|status| *status == 1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_without_its_redis_and_serves_when_it_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut redis) = RedisServer::start(folder.path()) else { return };
    redis.kill();
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0 + SECOND);
    let running = tokio::time::timeout(PATIENCE, serve(options(&project, &clock))).await.unwrap().unwrap();
    let address = running.http_addr;
    let start = Instant::now();
    let said = loop {
        let said = ready(address).await;
        if said.contains("cannot be reached") {
            break said;
        }
        assert!(start.elapsed() < PATIENCE, "{said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(said.contains("degraded") && said.contains(&redis.url()), "{said}");

    redis.restart().unwrap();
    let start = Instant::now();
    while !ready(address).await.starts_with("HTTP/1.1 200") || ready(address).await.contains("cannot be reached") {
        assert!(start.elapsed() < PATIENCE, "{}", ready(address).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    running.shutdown_handle().shut_down();
    running.wait().await.unwrap();
    // What it served is what one that starts now serves.
    let server = Server::start(&project, &clock, None).await.unwrap();
    let shops = ["a".to_owned()];
    push(&server, &shops, 3.5).await;
    assert!(present(&features(&server, &shops).await));
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_drops_features_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start_with(folder.path(), &["--maxmemory-policy", "allkeys-lru"]) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let error = serve(options(&project, &ManualClock::at(T0))).await.err().expect("it is refused");
    let text = error.to_string();
    assert!(text.contains("set it to noeviction") && text.contains(&redis.url()), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_serves_and_survives_the_loss_of_a_master() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut cluster) = RedisCluster::start(folder.path(), 3, true, &[]) else { return };
    let project = project(&cluster.url());
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0 + SECOND);
    let server = Server::start(&project, &clock, None).await.unwrap();
    let shops: Vec<String> = (0..60).map(|shop| format!("shop {shop}")).collect();
    push(&server, &shops, 1.5).await;
    let before = features(&server, &shops).await;
    assert!(present(&before), "{before:?}");

    cluster.wait_until_replicated(1);
    cluster.nodes[1].kill();
    let start = Instant::now();
    // Every request is answered, truthfully: what is not there now is UNAVAILABLE, never NOT_FOUND or a count of 0.
    let after = loop {
        let call = Instant::now();
        let answer = features(&server, &shops).await;
        assert!(call.elapsed() < Duration::from_secs(5), "{:?}", call.elapsed());
        let statuses = answer.features.iter().flat_map(|feature| &feature.statuses);
        assert!(statuses.into_iter().all(|status| [1, 5].contains(&u8::try_from(*status).unwrap())), "{answer:?}");
        if present(&answer) {
            break answer;
        }
        assert!(start.elapsed() < PATIENCE, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let values = |response: &v1::GetFeaturesResponse| {
        response.features.iter().map(|feature| feature.values.clone()).collect::<Vec<_>>()
    };
    assert_eq!(values(&after), values(&before));
    push(&server, &shops, 2.5).await;
    assert!(present(&features(&server, &shops).await));
    server.stop().await.unwrap();
}
