//! Served values against the offline engine, bit for bit, on a stream that holds every case: early, late, tied, duplicated,
//! null-key and future events, tombstones, and rows created after they happened.
//!
//! What was served at a position is compared with the offline replay *as known* at that position, over Flight, on the
//! history that the same server wrote. In-order replay alone would pass by luck; here nothing is in order.

use arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt64Array,
};
use arrow::datatypes::{Int64Type, UInt8Type};
use feature_defs::time::{Micros, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{DAY, HOUR, MINUTE, SECOND};
use gateway::convert;
use object_store::ObjectStoreExt;
use offline_store::audit::report::Report;
use offline_store::audit::{AuditOptions, AuditRequest};
use offline_store::serving_log;
use offline_store::{Engine, EngineOptions};
use online_store::conformance::redis_cluster::RedisCluster;
use online_store::conformance::redis_server::RedisServer;
use proto::v1;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use tests::column::{bools, doubles, int64s, strings, timestamps};
use tests::{ManualClock, Project, Server};
use tonic::transport::Channel;

use crate::models;
use crate::process::binary;

const T0: Micros = 1_700_000_000 * SECOND;

fn settings(request_time: &str, online: &str) -> String {
    format!(
        "project: audit\nonline: {online}\nserve: {{grpc: 127.0.0.1:0, http: 127.0.0.1:0, request_time: {request_time}}}\nserving_log: {{sample: 1, flush: 1s}}\n"
    )
}

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}, {name: till, type: int64}]}
  - {name: everything, keys: []}
sources:
  - name: sales
    stream: true
    schema:
      - {name: shop, type: string}
      - {name: till, type: int64}
      - {name: amount, type: float64}
      - {name: items, type: int64}
      - {name: withdrawn, type: bool}
      - {name: id, type: string}
    event_time: sold_at
    created_time: booked_at
    event_id: id
    deleted: withdrawn
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    ttl: 2h
    keep: 3h
    features:
      - {name: amount, type: float64}
      - {name: items, type: int64, default: -1}
      - {name: each, expr: "amount / items"}
  - name: turnover
    entity: shop
    source: sales
    windows: [1h, 6h]
    aggregates:
      - {name: sales, function: count}
      - {name: amount, function: sum, of: amount}
      - {name: mean, function: mean, of: amount, where: "items > 1", default: 0.0}
      - {name: least, function: min, of: amount}
      - {name: most, function: max, of: items}
  - name: all_sales
    entity: everything
    source: sales
    windows: [24h]
    aggregates: [{name: total, function: sum, of: amount}, {name: n, function: count}]
requests:
  - {name: ask, fields: [{name: price, type: float64, nullable: true}]}
transforms:
  - name: now
    inputs: [{view: last_sale}, {view: turnover}, ask]
    features:
      - {name: ratio, expr: "ask.price / turnover.mean_6h"}
      - {name: age, expr: "age(last_sale)"}
      - {name: hour, expr: "date_part('hour', local(at(), 'America/New_York'))"}
feature_services:
  - name: all
    features: [{view: last_sale}, {view: turnover}, {view: all_sales}, "now:*", "ask:price"]
"#;

const SHOPS: [&str; 4] = ["1", "12", "a\0b", ""];

struct Generator {
    random: SmallRng,
    next: u64,
    /// What was delivered, to be delivered again.
    sent: Vec<Sale>,
}

type Sale =
    (Option<&'static str>, Option<i64>, Option<f64>, Option<i64>, Option<bool>, String, Option<Micros>, Option<Micros>);

impl Generator {
    fn new(seed: u64) -> Generator {
        Generator { random: SmallRng::seed_from_u64(seed), next: 0, sent: Vec::new() }
    }

    /// Some events around `now`, in no order; some of them seen before, and some with the id of another.
    fn events(&mut self, now: Micros) -> Vec<v1::Column> {
        let n = self.random.random_range(1..12);
        let random = &mut self.random;
        let (mut shop, mut till, mut amount, mut items) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut withdrawn, mut id, mut sold, mut booked) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n {
            if !self.sent.is_empty() && random.random_bool(0.05) {
                let again = self.sent[random.random_range(0..self.sent.len())].clone();
                shop.push(again.0);
                till.push(again.1);
                amount.push(again.2);
                items.push(again.3);
                withdrawn.push(again.4);
                id.push(Some(again.5));
                sold.push(again.6);
                booked.push(again.7);
                continue;
            }
            shop.push((!random.random_bool(0.05)).then(|| SHOPS[random.random_range(0..SHOPS.len())]));
            till.push((!random.random_bool(0.05)).then(|| random.random_range(1..3)));
            amount.push(match random.random_range(0..12) {
                0 => None,
                1 => Some(f64::NAN),
                2 => Some(-0.0),
                3 => Some(1e300),
                4 => Some(-1e300),
                5 => Some(f64::INFINITY),
                _ => Some(f64::from(random.random_range(-500..500)) / 3.0),
            });
            items.push((!random.random_bool(0.1)).then(|| random.random_range(0..4)));
            withdrawn.push((!random.random_bool(0.3)).then(|| random.random_bool(0.08)));
            let event_time = match random.random_range(0..8) {
                0 => now + random.random_range(1..20 * MINUTE),
                1 => now - random.random_range(0..8 * HOUR),
                2 => now - now.rem_euclid(5 * MINUTE),
                3 => now,
                _ => now - random.random_range(0..10 * MINUTE),
            };
            sold.push(Some(event_time));
            booked.push(match random.random_range(0..4) {
                0 => Some(event_time + random.random_range(0..HOUR)),
                1 => Some(event_time - random.random_range(0..HOUR)),
                _ => None,
            });
            if self.next > 3 && random.random_bool(0.1) {
                id.push(Some(format!("sale-{}", random.random_range(0..self.next))));
            } else {
                let new = format!("sale-{}", self.next);
                let last = shop.len() - 1;
                let sale = (shop[last], till[last], amount[last], items[last], withdrawn[last]);
                self.sent.push((sale.0, sale.1, sale.2, sale.3, sale.4, new.clone(), sold[last], booked[last]));
                id.push(Some(new));
                self.next += 1;
            }
        }
        let id: Vec<Option<&str>> = id.iter().map(Option::as_deref).collect();
        vec![
            strings("shop", &shop),
            int64s("till", &till),
            doubles("amount", &amount),
            int64s("items", &items),
            bools("withdrawn", &withdrawn),
            strings("id", &id),
            timestamps("sold_at", &sold),
            timestamps("booked_at", &booked),
        ]
    }
}

/// What was served: the spine of the replay, and the values.
#[derive(Default)]
struct Served {
    shop: Vec<Option<String>>,
    till: Vec<Option<i64>>,
    price: Vec<Option<f64>>,
    at: Vec<Micros>,
    positions: BTreeMap<String, Vec<(Micros, u64)>>,
    features: BTreeMap<String, Vec<(Value, Status, bool)>>,
}

impl Served {
    async fn ask(&mut self, server: &Server, random: &mut SmallRng, at: Option<Vec<Micros>>) {
        let n = at.as_ref().map_or(6, Vec::len);
        let shop: Vec<Option<&str>> =
            (0..n).map(|_| (!random.random_bool(0.05)).then(|| SHOPS[random.random_range(0..SHOPS.len())])).collect();
        let till: Vec<Option<i64>> =
            (0..n).map(|_| (!random.random_bool(0.05)).then(|| random.random_range(1..4))).collect();
        let price: Vec<Option<f64>> = (0..n).map(|i| (i % 3 != 0).then_some(i as f64)).collect();
        let request = v1::GetFeaturesRequest {
            project: server.project.clone(),
            what: Some(v1::get_features_request::What::Service("all".into())),
            rows: vec![strings("shop", &shop), int64s("till", &till), doubles("price", &price)],
            at: at.unwrap_or_default(),
            include_provenance: true,
            deadline_ms: 10_000,
        };
        let answer = server.gateway.clone().get_features(request).await.unwrap().into_inner();
        assert_eq!(answer.rows as usize, n);
        self.shop.extend(shop.iter().map(|shop| shop.map(str::to_string)));
        self.till.extend(till);
        self.price.extend(price);
        self.at.extend(&answer.at);
        for view in &answer.views {
            let positions = view.positions.iter().map(|position| (position.time, position.sequence));
            self.positions.entry(view.alias.clone()).or_default().extend(positions);
        }
        for feature in answer.features {
            let column = feature.values.expect("a feature has values");
            let (array, value_type) = decode(&column, n);
            let values = self.features.entry(feature.name.clone()).or_default();
            for row in 0..n {
                let status = Status::from_number(feature.statuses[row] as u8).expect("a status");
                let before_store = feature.reasons.get(row) == Some(&(v1::UnavailableReason::AtBeforeStore as i32));
                values.push((Value::from_array(&array, row, &value_type), status, before_store));
            }
        }
    }

    fn spine(&self) -> RecordBatch {
        let mut columns: Vec<(String, ArrayRef, bool)> = vec![
            ("shop".into(), Arc::new(self.shop.iter().map(Option::as_deref).collect::<StringArray>()), true),
            ("till".into(), Arc::new(self.till.iter().copied().collect::<Int64Array>()), true),
            ("price".into(), Arc::new(self.price.iter().copied().collect::<arrow::array::Float64Array>()), true),
            (
                "event_timestamp".into(),
                Arc::new(TimestampMicrosecondArray::from(self.at.clone()).with_timezone("UTC")),
                false,
            ),
        ];
        for (alias, positions) in &self.positions {
            let (time, sequence) = offline_store::point_in_time::position_columns(alias);
            let times: Vec<i64> = positions.iter().map(|(time, _)| *time).collect();
            let sequences: Vec<u64> = positions.iter().map(|(_, sequence)| *sequence).collect();
            columns.push((time, Arc::new(Int64Array::from(times)), false));
            columns.push((sequence, Arc::new(UInt64Array::from(sequences)), false));
        }
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    /// Returns (values compared, values that the store said it could not answer exactly).
    async fn audit(&self, server: &Server) -> (usize, usize) {
        let replayed = server.training_set("all", self.spine()).await.unwrap();
        assert_eq!(replayed.num_rows(), self.at.len());
        let (mut compared, mut refused) = (0, 0);
        for (name, served) in &self.features {
            let column = replayed.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"));
            let value_type = Type::from_arrow(column.data_type()).unwrap();
            let statuses = replayed.column_by_name(&format!("{name}__status")).unwrap();
            let statuses = statuses.as_primitive::<UInt8Type>();
            for (row, (value, status, before_store)) in served.iter().enumerate() {
                if *before_store {
                    assert_eq!(*status, Status::Unavailable);
                    refused += 1;
                    continue;
                }
                let expected = Value::from_array(column, row, &value_type);
                let expected_status = Status::from_number(statuses.value(row)).unwrap();
                let place = || {
                    format!(
                        "{name}, row {row}, shop {:?} till {:?} at {}",
                        self.shop[row], self.till[row], self.at[row]
                    )
                };
                assert_eq!((value, *status), (&expected, expected_status), "{}", place());
                compared += 1;
            }
        }
        (compared, refused)
    }
}

fn decode(column: &v1::Column, rows: usize) -> (ArrayRef, Type) {
    use v1::column::Values;
    let value_type = match column.values.as_ref().expect("a column has values") {
        Values::Doubles(_) => Type::Float64,
        Values::Int64s(_) => Type::Int64,
        other => panic!("no feature of this service is {other:?}"),
    };
    (convert::to_array(column, &value_type, rows).expect("the server's columns are right"), value_type)
}

#[tokio::test(flavor = "multi_thread")]
async fn served_values_are_the_replayed_ones_under_the_servers_clock() {
    under_the_servers_clock("embedded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn served_values_are_the_replayed_ones_at_request_times() {
    at_request_times("embedded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_holds_on_redis() {
    let folder = tempfile::tempdir().unwrap();
    // Says itself that it is skipped where there is no redis-server.
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    under_the_servers_clock(&format!("{}/0", redis.url())).await;
    at_request_times(&format!("{}/1", redis.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_holds_on_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 3, false, &[]) else { return };
    under_the_servers_clock(&cluster.url()).await;
}

/// What the server's own log says of the same rows, by the audit that users run.
async fn audit_the_log(project: &Project) -> Report {
    let (plan, _) = project.plan().await.unwrap();
    let (store, prefix) = registry::store::open_store(&project.path().join(".coeval").to_string_lossy()).unwrap();
    let engine = Engine::new(EngineOptions {
        project_folder: project.path().into(),
        project: "audit".into(),
        store,
        prefix,
        memory_bytes: 1 << 30,
        spill_folder: None,
    });
    let request = AuditRequest {
        service: plan.service("all").unwrap().clone(),
        options: AuditOptions::new(T0 - DAY, T0 + 60 * DAY),
        sample_rows: None,
    };
    offline_store::audit::audit(&engine.unwrap(), &Arc::new(plan), &request, None, &|_| {}).await.unwrap()
}

async fn under_the_servers_clock(online: &str) {
    let project = Project::new(&settings("refused", online), DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0);
    let server = Server::start(&project, &clock, None).await.unwrap();
    let mut random = SmallRng::seed_from_u64(11);
    let mut generator = Generator::new(12);
    let mut served = Served::default();
    let (mut early, mut duplicates, mut reused) = (0, 0, 0);
    for _ in 0..120 {
        clock.advance(random.random_range(1..6 * MINUTE));
        let pushed = server.push("sales", generator.events(clock.now())).await.unwrap();
        let of_ids = |rejected: &&v1::Rejected| rejected.reason.contains("was used before for an event that said");
        assert_eq!(pushed.rejected.iter().filter(of_ids).count(), pushed.rejected.len(), "{:?}", pushed.rejected);
        reused += pushed.rejected.len();
        early += pushed.early;
        duplicates += pushed.duplicates;
        served.ask(&server, &mut random, None).await;
    }
    let cases = format!("{early} early, {duplicates} duplicates, {reused} reused ids");
    assert!(early > 20 && duplicates > 5 && reused > 5, "the stream holds every case: {cases}");
    for at in &served.at {
        assert!((T0..=clock.now()).contains(at), "a request is answered at the server's time");
    }
    server.flush().await.unwrap();
    let (compared, refused) = served.audit(&server).await;
    assert_eq!(refused, 0, "at its own time a server is always exact");
    assert!(compared > 10_000, "{compared}");
    // An `at` of the caller's own is refused here.
    let request = v1::GetFeaturesRequest {
        project: server.project.clone(),
        what: Some(v1::get_features_request::What::Service("all".into())),
        rows: vec![strings("shop", &[Some("1")]), int64s("till", &[Some(1)]), doubles("price", &[None])],
        at: vec![T0],
        ..v1::GetFeaturesRequest::default()
    };
    let status = server.gateway.clone().get_features(request).await.unwrap_err();
    assert!(status.message().contains("request_time"), "{status:?}");
    server.stop().await.unwrap();
    let report = audit_the_log(&project).await;
    let values = report.rows.audited * report.features.len() as u64;
    assert_eq!(report.rows.audited as usize, served.at.len(), "{:?} {:?}", report.rows, report.notes);
    assert_eq!((report.values.bug, report.values.compared()), (0, values), "{}", report.lines().join("\n"));
    assert_eq!(report.values.fallback, 0, "at its own time a server is always exact");
    let late: u64 = report.lateness.iter().map(|late| late.arrived_after).sum();
    assert!(report.values.lateness > 0 && late > 0, "events came late, and the report says so: {:?}", report.lateness);
    command_says_the_same(&project, &report);
}

/// `coeval audit consistency`, over the same log.
fn command_says_the_same(project: &Project, report: &Report) {
    let time = |time: Micros| chrono::DateTime::from_timestamp_micros(time).unwrap().to_rfc3339();
    let run = |more: &[&str]| {
        Command::new(binary())
            .arg("-C")
            .arg(project.path())
            .args(["audit", "consistency", "--service", "all"])
            .args(["--from", &time(T0 - DAY), "--to", &time(T0 + 60 * DAY)])
            .args(more)
            .output()
            .unwrap()
    };
    let json = run(&["--json"]);
    let said: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(json.status.success(), "{}", String::from_utf8_lossy(&json.stderr));
    assert_eq!(said["values"]["equal"], report.values.equal);
    assert_eq!((&said["values"]["bug"], &said["outcome"]), (&0.into(), &"passed".into()));
    let text = run(&["--sample-rows", "50"]);
    let said = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(said.contains("PASSED: ") && said.contains("last_sale:amount"), "{said}");
    // What was never served proves nothing.
    let nothing = Command::new(binary())
        .arg("-C")
        .arg(project.path())
        .args(["audit", "consistency", "--service", "all", "--from", "2001-01-01", "--to", "2001-01-02"])
        .output()
        .unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stdout).contains("nothing was compared"));
}

async fn at_request_times(online: &str) {
    let project = Project::new(&settings("allowed", online), DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    // The server's clock is days past the events, as in every replay.
    let clock = ManualClock::at(T0 + 30 * DAY);
    let server = Server::start(&project, &clock, None).await.unwrap();
    let mut random = SmallRng::seed_from_u64(21);
    let mut generator = Generator::new(22);
    let mut served = Served::default();
    let mut now = T0;
    for _ in 0..120 {
        now += random.random_range(1..6 * MINUTE);
        server.push("sales", generator.events(now)).await.unwrap();
        let at = (0..6)
            .map(|i| match i {
                0 | 1 => now,
                2 => now + 20 * MINUTE,
                3 => now - random.random_range(0..10 * MINUTE),
                4 => now - now.rem_euclid(5 * MINUTE),
                _ => now - random.random_range(0..8 * HOUR),
            })
            .collect();
        served.ask(&server, &mut random, Some(at)).await;
    }
    server.flush().await.unwrap();
    let (compared, refused) = served.audit(&server).await;
    assert!(compared > 4_000, "{compared} compared");
    assert!(refused > 500, "{refused} refused: a past time is exact or refused, and both happen");
    server.stop().await.unwrap();
    let report = audit_the_log(&project).await;
    assert_eq!(report.rows.audited as usize, served.at.len(), "{:?} {:?}", report.rows, report.notes);
    assert_eq!(report.values.bug, 0, "{}", report.lines().join("\n"));
    assert!(report.values.fallback as usize >= refused, "{:?}", report.values);
}

/// A server that audits itself, minute by minute of a clock that the test moves.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_audits_each_window_and_says_when_something_is_wrong() {
    let text = settings("refused", "embedded") + "audit: {every: 1m}\n";
    let project = Project::new(&text, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0);
    let server = Server::start(&project, &clock, None).await.unwrap();
    let mut random = SmallRng::seed_from_u64(31);
    let mut generator = Generator::new(32);
    let mut served = Served::default();
    server.push("sales", generator.events(clock.now())).await.unwrap();
    served.ask(&server, &mut random, None).await;
    let (store, root) = registry::store::open_store(&project.path().join(".coeval").to_string_lossy()).unwrap();
    let folder = root.join("audit");
    let logged = async |from: Micros| {
        for _ in 0..200 {
            let files = serving_log::files(&store, &folder, "all", from, Micros::MAX).await.unwrap();
            if let [file] = &files[..] {
                return file.clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        panic!("nothing was logged");
    };
    let reports = folder.clone().join("audits").join("all");
    let report = async |number: usize| {
        for _ in 0..300 {
            let listed = store.list_with_delimiter(Some(&reports)).await.unwrap();
            let mut named: Vec<_> = listed.objects.into_iter().map(|object| object.location).collect();
            named.retain(|path| path.as_ref().ends_with(".json"));
            named.sort();
            if let Some(path) = named.get(number) {
                let bytes = store.get(path).await.unwrap().bytes().await.unwrap();
                return serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        panic!("no window was audited");
    };
    logged(0).await;
    clock.advance(MINUTE + 30 * SECOND);
    let first = report(0).await;
    assert_eq!((&first["values"]["bug"], &first["outcome"]), (&0.into(), &"passed".into()), "{first}");
    assert!(first["rows"]["audited"].as_u64() > Some(0));
    assert!(!server.running.gateway().readiness().degraded);

    // A file of the next window says something else than was served.
    let next = clock.now();
    served.ask(&server, &mut random, None).await;
    let file = logged(next).await;
    let rows = serving_log::read(&store, &file).await.unwrap().unwrap();
    let schema = rows.batch.schema();
    let (index, _) = schema.column_with_name("feature:all_sales:n_24h").unwrap();
    let mut columns = rows.batch.columns().to_vec();
    columns[index] = Arc::new(columns[index].as_primitive::<Int64Type>().unary::<_, Int64Type>(|n| n + 7));
    let wrong = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let mut bytes = Vec::new();
    serving_log::encode(&rows.header, &schema, &[wrong], &mut bytes).unwrap();
    store.put(&file.path, bytes.into()).await.unwrap();
    clock.advance(MINUTE + 30 * SECOND);
    let second = report(1).await;
    assert_eq!(second["outcome"], "failed");
    assert_eq!(second["values"]["bug"], rows.header.rows);
    let given = &second["features"].as_array().unwrap().iter().find(|f| f["counts"]["bug"] != 0).unwrap()["examples"];
    assert_eq!(given[0]["given"], serde_json::json!({}), "a report names no entity");
    let gateway = server.running.gateway();
    for _ in 0..50 {
        if gateway.readiness().degraded {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let said = gateway.readiness();
    assert!(said.ready && said.reasons.iter().any(|reason| reason.contains("the audit of `all`")), "{said:?}");
    let metrics = gateway.metrics.encode(&gateway.served(), std::time::Duration::ZERO, true);
    let bugs = metrics.lines().find(|line| line.contains("audit_values_total") && line.contains("bug")).unwrap();
    assert!(bugs.ends_with(&format!(" {}", rows.header.rows)), "{bugs}");
    server.stop().await.unwrap();
}

/// What a model was given and what it said are replayed, too, and it is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn tensors_are_compared_and_the_model_is_asked_again() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let text = "project: life\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\nserving_log: {sample: 1, flush: 1s}\naudit: {every: 1m}\n";
    let project = Project::new(text, models::DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0);
    let server = Server::start(&project, &clock, None).await.unwrap();
    let address = format!("http://{}", server.running.grpc_addr);
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    assert_eq!(models::register(&channel, &models::model_file()).await, 1);
    assert_eq!(models::deploy(&channel, 1).await.unwrap().champion, 1);
    const ROWS: usize = 20;
    let numbers = |of: f64| (0..ROWS).map(|row| Some(row as f64 * of - 1.0)).collect::<Vec<_>>();
    let request = v1::PredictRequest {
        project: "life".into(),
        model: "delay".into(),
        rows: vec![
            doubles("a", &numbers(0.25)),
            doubles("b", &numbers(-0.5)),
            doubles("c", &numbers(1.0)),
            int64s("carrier", &[Some(1); ROWS]),
        ],
        ..v1::PredictRequest::default()
    };
    let answer = server.gateway.clone().predict(request).await.unwrap().into_inner();
    assert!(answer.outcomes.iter().all(|outcome| outcome.status() == v1::RowStatus::Ok), "{:?}", answer.outcomes);
    let (store, root) = registry::store::open_store(&project.path().join(".coeval").to_string_lossy()).unwrap();
    let folder = root.join("life");
    for _ in 0..200 {
        if !serving_log::files(&store, &folder, "trips", 0, Micros::MAX).await.unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    clock.advance(MINUTE + 30 * SECOND);
    let reports = folder.join("audits").join("trips");
    let mut found = None;
    for _ in 0..300 {
        let listed = store.list_with_delimiter(Some(&reports)).await.unwrap();
        let path =
            listed.objects.into_iter().map(|object| object.location).find(|path| path.as_ref().ends_with(".json"));
        if let Some(path) = path {
            found = Some(store.get(&path).await.unwrap().bytes().await.unwrap());
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let report: serde_json::Value = serde_json::from_slice(&found.expect("the window was audited")).unwrap();
    assert_eq!((&report["outcome"], &report["rows"]["audited"]), (&"passed".into(), &ROWS.into()), "{report}");
    let tensors = &report["tensors"];
    assert_eq!((&tensors["compared"], &tensors["equal"]), (&ROWS.into(), &ROWS.into()), "{tensors}");
    let scores = &report["rescored"];
    assert_eq!((&scores["compared"], &scores["equal"]), (&ROWS.into(), &ROWS.into()), "{scores}");
    server.stop().await.unwrap();
}
