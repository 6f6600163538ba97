//! Servers and Redis killed at random moments while events are pushed out of order and twice: afterwards the online state
//! is the reference's over all events, bit for bit, and history holds each of them once.
//!
//! Few rounds by default; `COEVAL_FAULT_ROUNDS=100` makes as many, with 200,000 events and more.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use feature_defs::as_of::{Row, Visibility, as_of, feature_value};
use feature_defs::plan::{Plan, ViewPlanKind};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Value;
use feature_defs::window::{WindowEvent, window_value};
use futures::StreamExt;
use offline_store::history::History;
use online_store::conformance::redis_server::RedisServer;
use proto::v1;
use proto::v1::column::Values;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tests::Project;
use tests::column::{doubles, strings, timestamps};
use tonic::transport::Channel;

use crate::process::Process;

const MINUTE: Micros = 60_000_000;
const HOUR: Micros = 60 * MINUTE;
const THINGS: usize = 40;
const BATCH: usize = 50;
const PUSHERS: usize = 4;

const DEFINITIONS: &str = r#"
entities:
  - {name: thing, keys: [{name: thing, type: string}]}
sources:
  - name: sightings
    stream: true
    schema: [{name: thing, type: string}, {name: amount, type: float64}, {name: id, type: string}]
    event_time: seen_at
    event_id: id
feature_views:
  - name: latest
    entity: thing
    source: sightings
    features: [{name: amount, type: float64}, {name: id, type: string}]
  - name: load
    entity: thing
    source: sightings
    windows: [1h, 24h]
    aggregates:
      - {name: n, function: count}
      - {name: total, function: sum, of: amount}
      - {name: deviation, function: stddev, of: amount}
      - {name: top, function: max, of: amount}
      - {name: newest, function: last, of: id}
      - {name: kinds, function: distinct_count, of: id}
feature_services:
  - {name: both, features: ["latest:*", "load:*"]}
"#;

fn settings(online: &str) -> String {
    format!("project: faults\nonline: {online}\nserve: {{grpc: 127.0.0.1:0, http: 127.0.0.1:0}}\n")
}

fn now() -> Micros {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as Micros
}

/// How many rounds, and how many events in all of them.
fn size(rounds_default: usize) -> (usize, usize) {
    let asked = std::env::var("COEVAL_FAULT_ROUNDS").ok().and_then(|text| text.parse().ok());
    let rounds: usize = asked.unwrap_or(rounds_default);
    (rounds, if asked.is_some() { (rounds * 2_000).max(200_000) } else { rounds * 1_500 })
}

#[derive(Debug, Clone)]
struct Sighting {
    thing: String,
    amount: f64,
    id: String,
    seen_at: Micros,
}

/// What is still to be pushed, and what was acknowledged.
struct Load {
    start: Micros,
    waiting: Mutex<VecDeque<Vec<Sighting>>>,
    /// Events made so far.
    made: AtomicU64,
    /// While faults go on there is always more to push.
    grows: AtomicBool,
    acknowledged: Mutex<Vec<Vec<Sighting>>>,
    again: AtomicU64,
    /// Pushes that ended without an answer; whether they happened is known when they are repeated.
    unknown: AtomicU64,
    found_there: AtomicU64,
}

impl Load {
    fn new(events: usize) -> Load {
        let load = Load {
            start: now() - HOUR / 2,
            waiting: Mutex::default(),
            made: AtomicU64::new(0),
            grows: AtomicBool::new(true),
            acknowledged: Mutex::default(),
            again: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            found_there: AtomicU64::new(0),
        };
        let mut random = SmallRng::seed_from_u64(events as u64);
        let mut all: Vec<Sighting> = (0..events).map(|_| load.make(&mut random)).collect();
        all.shuffle(&mut random);
        *load.waiting.lock().unwrap() = all.chunks(BATCH).map(<[Sighting]>::to_vec).collect();
        load
    }

    /// Times are of the last day and a bit, every one different, in no order.
    fn make(&self, random: &mut SmallRng) -> Sighting {
        let index = self.made.fetch_add(1, Ordering::Relaxed);
        let back = random.random_range(0..28 * HOUR / 1_000_000) * 1_000_000;
        Sighting {
            thing: format!("t{}", random.random_range(0..THINGS)),
            amount: f64::from(random.random_range(-1_000_000..1_000_000)) / 7.0,
            id: format!("e{index}"),
            // Unique below the second: no two events tie, whose order the log would decide.
            seen_at: (self.start - back) / 1_000_000 * 1_000_000 + index as Micros % 1_000_000,
        }
    }

    fn next(&self, random: &mut SmallRng) -> Option<Vec<Sighting>> {
        let waiting = self.waiting.lock().unwrap().pop_front();
        waiting.or_else(|| self.grows.load(Ordering::Relaxed).then(|| (0..BATCH).map(|_| self.make(random)).collect()))
    }

    fn is_done(&self) -> bool {
        self.waiting.lock().unwrap().is_empty()
    }

    /// Pushes until nothing is left, or nobody answers.
    async fn push(&self, channel: Channel, seed: u64) {
        let pushers = (0..PUSHERS).map(|pusher| {
            let mut client = IngestClient::new(channel.clone());
            async move {
                let mut random = SmallRng::seed_from_u64(seed * 31 + pusher as u64);
                loop {
                    let repeated = if random.random_bool(0.1) { self.any_acknowledged(&mut random) } else { None };
                    if let Some(batch) = repeated {
                        let Ok(answer) = push_one(&mut client, &batch, false).await else { return };
                        assert_eq!((answer.accepted, answer.duplicates as usize), (0, batch.len()), "{answer:?}");
                        self.again.fetch_add(batch.len() as u64, Ordering::Relaxed);
                    }
                    let Some(batch) = self.next(&mut random) else { return };
                    match push_one(&mut client, &batch, random.random_bool(0.3)).await {
                        Ok(answer) => {
                            assert_eq!(answer.rejected, [], "nothing is wrong with these events");
                            assert_eq!((answer.accepted + answer.duplicates) as usize, batch.len(), "{answer:?}");
                            self.found_there.fetch_add(u64::from(answer.duplicates), Ordering::Relaxed);
                            self.acknowledged.lock().unwrap().push(batch);
                        }
                        Err(_) => {
                            self.unknown.fetch_add(batch.len() as u64, Ordering::Relaxed);
                            self.waiting.lock().unwrap().push_back(batch);
                            return;
                        }
                    }
                }
            }
        });
        futures::future::join_all(pushers).await;
    }

    fn any_acknowledged(&self, random: &mut SmallRng) -> Option<Vec<Sighting>> {
        let acknowledged = self.acknowledged.lock().unwrap();
        (!acknowledged.is_empty()).then(|| acknowledged[random.random_range(0..acknowledged.len())].clone())
    }

    fn events(&self) -> Vec<Sighting> {
        self.acknowledged.lock().unwrap().iter().flatten().cloned().collect()
    }

    fn tell(&self, what: &str, rounds: usize, started: Instant) {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        eprintln!(
            "{what}: {rounds} rounds, {} events acknowledged, {} pushed again, {} without an answer, of which {} were there; {:.0} s",
            self.events().len(),
            count(&self.again),
            count(&self.unknown),
            count(&self.found_there),
            started.elapsed().as_secs_f64()
        );
    }
}

async fn push_one(
    client: &mut IngestClient<Channel>,
    batch: &[Sighting],
    wait_visible: bool,
) -> Result<v1::PushResponse, tonic::Status> {
    let things: Vec<Option<&str>> = batch.iter().map(|event| Some(event.thing.as_str())).collect();
    let ids: Vec<Option<&str>> = batch.iter().map(|event| Some(event.id.as_str())).collect();
    let amounts: Vec<Option<f64>> = batch.iter().map(|event| Some(event.amount)).collect();
    let times: Vec<Option<i64>> = batch.iter().map(|event| Some(event.seen_at)).collect();
    let request = v1::PushRequest {
        project: "faults".into(),
        source: "sightings".into(),
        rows: vec![
            strings("thing", &things),
            doubles("amount", &amounts),
            strings("id", &ids),
            timestamps("seen_at", &times),
        ],
        wait_visible,
    };
    let mut answers = client.push(futures::stream::iter([request])).await?.into_inner();
    answers.message().await?.ok_or_else(|| tonic::Status::unavailable("no answer"))
}

/// A random moment, within which a server of a debug build starts to work.
async fn some_time(random: &mut SmallRng) {
    tokio::time::sleep(Duration::from_micros(random.random_range(5_000..400_000))).await;
}

async fn kill_servers(online: &str, what: &str) {
    let started = Instant::now();
    let (rounds, events) = size(3);
    let project = Project::new(&settings(online), DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let load = Load::new(events);
    let mut random = SmallRng::seed_from_u64(99);
    for round in 0..rounds {
        let process = Process::start_with(project.path(), &[]).await;
        let pid = process.pid().to_string();
        let kill = async {
            some_time(&mut random).await;
            // SIGKILL from outside, whatever it is doing.
            let _ = std::process::Command::new("kill").args(["-9", &pid]).status();
        };
        tokio::join!(load.push(process.channel(), round as u64), kill);
    }
    load.grows.store(false, Ordering::Relaxed);
    let process = Process::start_with(project.path(), &[]).await;
    while !load.is_done() {
        load.push(process.channel(), 1_000).await;
    }
    load.tell(what, rounds, started);
    check(&project, &process, load.events()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_killed_over_the_embedded_store() {
    kill_servers("embedded", "servers killed, embedded store").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_killed_over_redis() {
    let folder = tempfile::tempdir().unwrap();
    // Says itself that it is skipped where there is no redis-server.
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    kill_servers(&redis.url(), "servers killed, Redis").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_killed_under_a_server() {
    let started = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let Some(mut redis) = RedisServer::start(folder.path()) else { return };
    let (rounds, events) = size(3);
    let project = Project::new(&settings(&redis.url()), DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let process = Process::start_with(project.path(), &[]).await;
    let load = Arc::new(Load::new(events));
    let pushing = {
        let (load, channel) = (load.clone(), process.channel());
        tokio::spawn(async move {
            for seed in 0.. {
                load.push(channel.clone(), seed).await;
                if !load.grows.load(Ordering::Relaxed) && load.is_done() {
                    return;
                }
            }
        })
    };
    let mut random = SmallRng::seed_from_u64(77);
    for _ in 0..rounds {
        some_time(&mut random).await;
        redis.kill();
        // Events are taken while it is away.
        some_time(&mut random).await;
        redis.restart().unwrap();
    }
    load.grows.store(false, Ordering::Relaxed);
    pushing.await.unwrap();
    load.tell("Redis killed under a server", rounds, started);
    check(&project, &process, load.events()).await;
}

/// Everything that can be read is what the reference says of these events, and history has each of them once.
async fn check(project: &Project, process: &Process, events: Vec<Sighting>) {
    let mut unique: HashMap<&str, &Sighting> = HashMap::new();
    for event in &events {
        assert!(unique.insert(&event.id, event).is_none(), "{} was acknowledged as new twice", event.id);
    }
    let (plan, _) = project.plan().await.unwrap();
    // What was acknowledged may still be on its way.
    let begun = Instant::now();
    let wrong = loop {
        let wrong = compare(&plan, process, &events).await;
        if wrong.is_empty() || begun.elapsed() > Duration::from_secs(60) {
            break wrong;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(wrong.is_empty(), "{} values differ from the reference: {:?}", wrong.len(), &wrong[..wrong.len().min(10)]);

    IngestClient::new(process.channel()).flush(v1::FlushRequest { project: "faults".into() }).await.unwrap();
    let store = project.path().join(".coeval");
    let (store, root) = registry::store::open_store(store.to_str().unwrap()).unwrap();
    let history = History::open(store, root.join("faults"), "sightings").await.unwrap();
    let mut found: BTreeMap<String, u32> = BTreeMap::new();
    let mut last = Position::START;
    let mut scan = history.scan(plan.source("sightings").unwrap(), None, Position::START);
    while let Some(part) = scan.next().await {
        let part = part.unwrap();
        for (row, position) in part.positions.iter().enumerate() {
            assert!(*position > last, "positions ascend and never repeat");
            last = *position;
            let id = part.batch.column_by_name("id").unwrap().as_string::<i32>().value(row).to_owned();
            *found.entry(id).or_default() += 1;
        }
    }
    let doubled: Vec<_> = found.iter().filter(|(_, count)| **count > 1).take(5).collect();
    assert!(doubled.is_empty(), "history holds events twice: {doubled:?}");
    let lost: Vec<_> = unique.keys().filter(|id| !found.contains_key(**id)).take(5).collect();
    assert!(lost.is_empty(), "history lacks events: {lost:?}");
    assert_eq!(found.len(), unique.len());
}

/// Asks for everything of every thing, and says what is not as it should be.
async fn compare(plan: &Plan, process: &Process, events: &[Sighting]) -> Vec<String> {
    let things: Vec<String> = (0..THINGS).map(|thing| format!("t{thing}")).chain(["nobody".to_owned()]).collect();
    let asked: Vec<Option<&str>> = things.iter().map(|thing| Some(thing.as_str())).collect();
    let request = v1::GetFeaturesRequest {
        project: "faults".into(),
        what: Some(v1::get_features_request::What::Service("both".into())),
        rows: vec![strings("thing", &asked)],
        deadline_ms: 20_000,
        ..v1::GetFeaturesRequest::default()
    };
    let answer = match GatewayClient::new(process.channel()).get_features(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return vec![format!("no answer: {status}")],
    };
    let mut by_thing: HashMap<&str, Vec<Sighting>> = HashMap::new();
    for event in events {
        by_thing.entry(event.thing.as_str()).or_default().push(event.clone());
    }
    let mut wrong = Vec::new();
    for (row, thing) in things.iter().enumerate() {
        let mine = by_thing.get(thing.as_str()).cloned().unwrap_or_default();
        for (name, expected) in expected(plan, &mine, answer.at[row]) {
            let column = answer.features.iter().find(|feature| feature.name == name);
            let found = column.map_or(Found::Absent, |column| found(column, row));
            if found != expected {
                wrong.push(format!("{name} of {thing}: {found:?} instead of {expected:?}"));
            }
        }
    }
    wrong
}

/// A value by its bits.
#[derive(Debug, PartialEq)]
enum Found {
    Absent,
    Null,
    Int(i64),
    Float(u64),
    Text(String),
    Other(String),
}

fn found(column: &v1::FeatureColumn, row: usize) -> Found {
    let status = column.statuses[row];
    if status != v1::FieldStatus::Present as i32 {
        let empty = [v1::FieldStatus::NullValue as i32, v1::FieldStatus::NotFound as i32];
        return if empty.contains(&status) { Found::Null } else { Found::Other(format!("status {status}")) };
    }
    match column.values.as_ref().and_then(|values| values.values.as_ref()) {
        Some(Values::Int64s(values)) => Found::Int(values.values[row]),
        Some(Values::Doubles(values)) => Found::Float(values.values[row].to_bits()),
        Some(Values::Strings(values)) => Found::Text(values.values[row].clone()),
        other => Found::Other(format!("{other:?}")),
    }
}

fn as_found(value: Value) -> Found {
    match value {
        Value::Null => Found::Null,
        Value::Int64(x) => Found::Int(x),
        Value::Float64(x) => Found::Float(x.to_bits()),
        Value::String(x) => Found::Text(x.to_string()),
        other => Found::Other(format!("{other:?}")),
    }
}

/// What the reference says of one thing's events at t.
fn expected(plan: &Plan, events: &[Sighting], t: Micros) -> Vec<(String, Found)> {
    let strings =
        |of: fn(&Sighting) -> &str| Arc::new(events.iter().map(|e| Some(of(e))).collect::<StringArray>()) as ArrayRef;
    let times = events.iter().map(|event| Some(event.seen_at)).collect::<TimestampMicrosecondArray>();
    let batch = RecordBatch::try_from_iter([
        ("thing", strings(|event| &event.thing)),
        ("amount", Arc::new(events.iter().map(|event| Some(event.amount)).collect::<Float64Array>()) as ArrayRef),
        ("id", strings(|event| &event.id)),
        ("seen_at", Arc::new(times.with_timezone("UTC")) as ArrayRef),
    ])
    .unwrap();
    let mut all = Vec::new();
    for view in &plan.views {
        let batch = view.source.align(&batch, None).unwrap();
        let times = view.source.times(&batch, None).unwrap();
        let rows = view.rows(&batch, &times).unwrap();
        let types = view.row_types();
        match &view.kind {
            ViewPlanKind::AsOf { max_age, features } => {
                let rows: Vec<Row> = (0..rows.len())
                    .map(|row| Row { times: rows.times[row], deleted: false, values: rows.values(row, &types) })
                    .collect();
                let answer = as_of(&rows, t, *max_age, Visibility::Known);
                for (index, feature) in features.iter().enumerate() {
                    let (value, _) = feature_value(&answer, index, None);
                    all.push((format!("{}:{}", view.name, feature.name), as_found(value)));
                }
            }
            ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                let events: Vec<WindowEvent> = (0..rows.len())
                    .map(|row| WindowEvent { times: rows.times[row], inputs: rows.values(row, &types) })
                    .collect();
                for output in outputs {
                    let aggregate = &aggregates[output.aggregate].aggregate;
                    let value =
                        window_value(&events, output.aggregate, aggregate, &output.window, t, Visibility::Known);
                    all.push((format!("{}:{}", view.name, output.name), as_found(value)));
                }
            }
        }
    }
    all
}
