//! An entity is forgotten: nothing of it answers, nothing of it is stored, and nothing else changes by a bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{Int64Type, UInt8Type};
use feature_defs::forgotten::{KeyHash, from_hex};
use feature_defs::time::{Micros, Status};
use feature_defs::value::{Value, encode};
use feature_defs::window::{HOUR, MINUTE, SECOND};
use futures::StreamExt;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proto::v1;
use registry::Registry;
use registry::forgotten::Forget;
use registry::id::{EntityName, KeyHash as RecordedHash, ProjectName, Salt};
use registry::state::Change;
use tests::column::{doubles, int64s, strings, timestamps};
use tests::{ManualClock, Project, Server};

const T0: Micros = 1_700_000_000 * SECOND;
/// The key, and what only views of its entity read of rows that others count too.
const GONE: &str = "KEY-TO-BE-FORGOTTEN-7351";
const GATE: &str = "GATE-OF-THE-FORGOTTEN-7351";

const SETTINGS: &str = "project: forget\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n";

const DEFINITIONS: &str = r#"
entities:
  - {name: airport, keys: [{name: airport, type: string}]}
  - {name: aircraft, keys: [{name: tail, type: string}]}
  - {name: stand, keys: [{name: airport, type: string}, {name: gate, type: string}]}
sources:
  - name: departures
    stream: true
    schema: [{name: airport, type: string}, {name: tail, type: string}, {name: gate, type: string}, {name: delay, type: float64}, {name: id, type: string}]
    event_time: left_at
    event_id: id
  - name: weather
    files: weather.csv
    event_time: observed_at
feature_views:
  - {name: last_gate, entity: airport, source: departures, features: [{name: gate, type: string}]}
  - {name: load, entity: airport, source: departures, windows: [6h], aggregates: [{name: n, function: count}, {name: delay, function: sum, of: delay}]}
  - {name: stands, entity: stand, source: departures, windows: [6h], aggregates: [{name: n, function: count}]}
  - {name: flown, entity: aircraft, source: departures, windows: [6h], aggregates: [{name: n, function: count}, {name: delay, function: sum, of: delay}]}
  - {name: last_delay, entity: aircraft, source: departures, features: [{name: delay, type: float64}]}
  - {name: weather_now, entity: airport, source: weather, features: [{name: temp, type: float64}]}
feature_services:
  - {name: all, features: ["last_gate:*", "load:*", "stands:*", "flown:*", "last_delay:*", "weather_now:*"]}
"#;

/// Rows that are asked for: airport, tail, gate. The second is the forgotten airport's.
const ASKED: [[Option<&str>; 3]; 4] = [
    [Some("JFK"), Some("N1"), Some("B1")],
    [Some(GONE), Some("N1"), Some(GATE)],
    [Some("BOS"), Some("N2"), Some("C1")],
    [Some("JFK"), None, Some("B2")],
];

/// Airport, tail, gate, delay, minutes after `T0`, id.
type Event = (&'static str, Option<&'static str>, &'static str, f64, i64, &'static str);

const EARLIER: [Event; 6] = [
    ("JFK", Some("N1"), "B1", 1.5, -100, "e1"),
    (GONE, Some("N1"), GATE, 2.25, -90, "e2"),
    (GONE, None, GATE, 4.5, -80, "e3"),
    ("BOS", Some("N2"), "C1", 8.0, -70, "e4"),
    ("JFK", None, "B2", 16.0, -60, "e5"),
    (GONE, Some("N2"), GATE, 32.0, -50, "e6"),
];
const LATER: [Event; 4] = [
    ("JFK", Some("N1"), "B1", 64.0, -40, "l1"),
    (GONE, Some("N1"), GATE, 128.0, -30, "l2"),
    (GONE, None, GATE, 256.0, -20, "l3"),
    ("BOS", None, "C1", 512.0, -10, "l4"),
];
/// They wait for their time in the log.
const EARLY: [Event; 3] = [
    ("JFK", Some("N1"), "B1", 1024.0, 60, "w1"),
    (GONE, Some("N1"), GATE, 2048.0, 61, "w2"),
    (GONE, None, GATE, 4096.0, 62, "w3"),
];

fn events(events: &[Event]) -> Vec<v1::Column> {
    let text = |value: fn(&Event) -> Option<&'static str>| events.iter().map(value).collect::<Vec<_>>();
    vec![
        strings("airport", &text(|event| Some(event.0))),
        strings("tail", &text(|event| event.1)),
        strings("gate", &text(|event| Some(event.2))),
        doubles("delay", &events.iter().map(|event| Some(event.3)).collect::<Vec<_>>()),
        timestamps("left_at", &events.iter().map(|event| Some(T0 + event.4 * MINUTE)).collect::<Vec<_>>()),
        strings("id", &text(|event| Some(event.5))),
    ]
}

/// What one server answers about [`ASKED`], online and offline, by row and feature.
#[derive(Debug, PartialEq)]
struct Answers {
    online: Vec<BTreeMap<String, String>>,
    offline: Vec<RecordBatch>,
}

impl Answers {
    fn others(&self) -> Vec<(&BTreeMap<String, String>, &RecordBatch)> {
        [0, 2, 3].map(|row| (&self.online[row], &self.offline[row])).to_vec()
    }

    /// The forgotten airport is not there, and the aircraft of that row is as it was.
    fn check_gone(&self, before: &Answers) {
        for name in ["flown:n_6h", "flown:delay_6h", "last_delay:delay"] {
            assert_eq!(self.online[1][name], before.online[1][name], "{name}");
            let column = |answers: &Answers| answers.offline[1].column_by_name(name).unwrap().clone();
            assert_eq!(&column(self), &column(before), "{name}");
        }
        let status = |name: &str| {
            let column = self.offline[1].column_by_name(&format!("{name}__status")).unwrap();
            Status::from_number(column.as_primitive::<UInt8Type>().value(0)).unwrap()
        };
        for name in ["last_gate:gate", "weather_now:temp"] {
            assert_eq!(status(name), Status::NotFound, "{name}");
            assert!(self.online[1][name].starts_with(&format!("[{}]", Status::NotFound as u8)), "{:?}", self.online[1]);
        }
        for name in ["load:n_6h", "stands:n_6h"] {
            let count = self.offline[1].column_by_name(name).unwrap().as_primitive::<Int64Type>().value(0);
            assert_eq!((count, status(name)), (0, Status::Present), "{name}");
            // A count of 0 is a value, and what is empty otherwise is null.
            assert_eq!(self.online[1][name], empty_count(), "{name}");
        }
        assert!(self.offline[1].column_by_name("load:delay_6h").unwrap().is_null(0));
    }
}

fn empty_count() -> String {
    let values = int64s("", &[Some(0)]).values;
    format!("[{}] {values:?}", Status::Present as u8)
}

fn spine(at: Micros) -> RecordBatch {
    let column = |index: usize| Arc::new(ASKED.iter().map(|row| row[index]).collect::<StringArray>()) as ArrayRef;
    let times = TimestampMicrosecondArray::from(vec![at; ASKED.len()]).with_timezone("UTC");
    let columns =
        [("airport", column(0)), ("tail", column(1)), ("gate", column(2)), ("event_timestamp", Arc::new(times))];
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true))).unwrap()
}

async fn ask(server: &Server, at: Micros) -> Answers {
    let mut online = Vec::new();
    for row in ASKED {
        let request = v1::GetFeaturesRequest {
            project: server.project.clone(),
            what: Some(v1::get_features_request::What::Service("all".into())),
            rows: vec![strings("airport", &row[..1]), strings("tail", &row[1..2]), strings("gate", &row[2..])],
            deadline_ms: 10_000,
            ..v1::GetFeaturesRequest::default()
        };
        let answer = server.gateway.clone().get_features(request).await.unwrap().into_inner();
        let feature = |feature: v1::FeatureColumn| {
            let values = feature.values.and_then(|column| column.values);
            (feature.name, format!("{:?} {values:?}", feature.statuses))
        };
        online.push(answer.features.into_iter().map(feature).collect());
    }
    server.flush().await.unwrap();
    let set = server.training_set("all", spine(at)).await.unwrap();
    Answers { online, offline: (0..ASKED.len()).map(|row| set.slice(row, 1)).collect() }
}

/// Files below a folder that hold a text: as it is, or as a value of a Parquet file.
fn files_with(folder: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
            continue;
        }
        // A table of the embedded store may go while they are looked through.
        let bytes = std::fs::read(&path).unwrap_or_default();
        let mut holds = bytes.windows(text.len()).any(|window| window == text.as_bytes());
        if path.extension().is_some_and(|extension| extension == "parquet") && !bytes.is_empty() {
            let file = std::fs::File::open(&path).unwrap();
            let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
            for batch in reader {
                let shown = arrow::util::pretty::pretty_format_batches(&[batch.unwrap()]).unwrap().to_string();
                holds |= shown.contains(text);
            }
        }
        if holds {
            found.push(path);
        }
    }
    found
}

async fn forget(server: &Server, keys: &[&str], dry_run: bool) -> Result<v1::ForgetResult, tonic::Status> {
    let keys: Vec<Option<&str>> = keys.iter().copied().map(Some).collect();
    forget_as(server, "airport", vec![strings("airport", &keys)], dry_run).await
}

async fn forget_as(
    server: &Server,
    entity: &str,
    keys: Vec<v1::Column>,
    dry_run: bool,
) -> Result<v1::ForgetResult, tonic::Status> {
    let request = v1::ForgetRequest {
        project: server.project.clone(),
        entity: entity.into(),
        keys,
        dry_run,
        who: "test".into(),
        why: "asked to".into(),
    };
    let mut answers = server.control.clone().forget(request).await?.into_inner();
    let mut result = None;
    while let Some(progress) = answers.message().await? {
        result = progress.result;
    }
    result.ok_or_else(|| tonic::Status::internal("no result came"))
}

/// Rows removed and cleared, by place, where there were any.
fn counts(result: &v1::ForgetResult) -> BTreeMap<String, (u64, u64)> {
    let mut counts = BTreeMap::new();
    for place in result.places.iter().filter(|place| place.rows_removed + place.rows_cleared > 0) {
        let count: &mut (u64, u64) = counts.entry(place.kind.clone()).or_default();
        *count = (count.0 + place.rows_removed, count.1 + place.rows_cleared);
    }
    counts
}

/// A project in which the airport is everywhere: online, in history (sorted and not), in a copy of files, in the log, in a
/// dead letter and in a dataset.
async fn everywhere(clock: &ManualClock) -> (Project, Server) {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    let weather = format!(
        "airport,temp,observed_at\nJFK,1.5,2023-11-14T20:00:00Z\n{GONE},2.5,2023-11-14T20:00:00Z\nBOS,3.5,2023-11-14T21:00:00Z\n"
    );
    std::fs::write(project.path().join("weather.csv"), weather).unwrap();
    project.apply().await.unwrap();
    let server = Server::start(&project, clock, None).await.unwrap();
    assert_eq!(server.push("departures", events(&EARLIER)).await.unwrap().accepted, 6);
    let mut ingest = server.ingest.clone();
    let compact = v1::CompactRequest { project: server.project.clone(), ..v1::CompactRequest::default() };
    ended(ingest.compact(compact).await.unwrap().into_inner()).await;
    assert_eq!(server.push("departures", events(&LATER)).await.unwrap().accepted, 4);
    server.flush().await.unwrap();
    let pushed = server.push("departures", events(&EARLY)).await.unwrap();
    assert_eq!((pushed.accepted, pushed.early), (3, 3));
    let materialize = v1::MaterializeRequest {
        project: server.project.clone(),
        through: clock.now(),
        ..v1::MaterializeRequest::default()
    };
    ended(ingest.materialize(materialize).await.unwrap().into_inner()).await;
    let import = v1::ImportFilesRequest { project: server.project.clone(), source: "weather".into() };
    ended(ingest.import_files(import).await.unwrap().into_inner()).await;
    let letters = project.path().join(".coeval/forget/dead-letters/departures");
    std::fs::create_dir_all(&letters).unwrap();
    let letter = |airport: &str| {
        format!(
            "{{\"view\":\"load\",\"reason\":\"too large for `{airport}`\",\"row\":{{\"airport\":\"{airport}\",\"left_at\":\"2023-11-14T20:00:00Z\"}}}}\n"
        )
    };
    std::fs::write(letters.join("1-1-load.jsonl"), letter("JFK") + &letter(GONE)).unwrap();
    std::fs::write(letters.join("2-2-load.jsonl"), letter(GONE)).unwrap();
    server.dataset("all", "kept", spine(clock.now())).await.unwrap();
    (project, server)
}

async fn ended<T>(mut answers: tonic::Streaming<T>) {
    while let Some(answer) = answers.next().await {
        answer.unwrap();
    }
}

/// Nothing of it is in any file of the project's store, and nothing else was lost.
fn check_files(project: &Project) {
    let store = project.path().join(".coeval");
    // Threads of the embedded store may hold replaced tables for a moment.
    let begun = std::time::Instant::now();
    while !files_with(&store, GONE).is_empty() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(files_with(&store, GONE), Vec::<PathBuf>::new());
    assert_eq!(files_with(&store, GATE), Vec::<PathBuf>::new());
    let letters = store.join("forget/dead-letters/departures");
    assert!(std::fs::read_to_string(letters.join("1-1-load.jsonl")).unwrap().contains("JFK"));
    assert!(!letters.join("2-2-load.jsonl").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_entity_is_gone_and_nothing_else_is() {
    let clock = ManualClock::at(T0);
    let (project, server) = everywhere(&clock).await;
    let before = ask(&server, T0).await;
    assert!(before.online[1]["last_gate:gate"].contains(GATE), "{:?}", before.online[1]);
    let store = project.path().join(".coeval");
    let held = files_with(&store, GONE);
    for place in ["/history/", "/tables/", "/log/", "/online/", "/datasets/", "/dead-letters/"] {
        assert!(held.iter().any(|path| path.to_string_lossy().contains(place)), "{place} of {held:?}");
    }

    // What is wrong with a call is said, and nothing happens.
    let check = async |entity: &str, keys: Vec<v1::Column>, expected: &str| {
        let status = forget_as(&server, entity, keys, false).await.unwrap_err();
        assert!(status.message().contains(expected), "{status:?}");
    };
    check("airprot", vec![strings("airport", &[Some(GONE)])], "did you mean `airport`?").await;
    check("stand", vec![strings("airport", &[Some(GONE)])], "key `gate` is missing").await;
    check("airport", vec![strings("airprot", &[Some(GONE)])], "did you mean `airport`?").await;
    check("airport", vec![doubles("airport", &[Some(1.0)])], "airport").await;
    check("airport", vec![strings("airport", &[None])], "is null").await;
    check("airport", vec![], "name 1 to").await;
    let looked = forget(&server, &[GONE], true).await.unwrap();
    assert_eq!(files_with(&store, GONE), held, "a dry run changes nothing");
    assert_eq!(ask(&server, T0).await, before);

    let forgotten = forget(&server, &[GONE], false).await.unwrap();
    // Online: a row and tiles of `airport`, the tiles of its stand, and its weather. Of five rows in history two have no
    // aircraft that counts them. In the log the same lie in one segment with two that wait for their time.
    let expected = [
        ("dataset", (1, 0)),
        ("dead letters", (2, 0)),
        ("history", (2, 3)),
        ("log", (3, 4)),
        ("online", (4, 0)),
        ("table", (1, 0)),
    ];
    assert_eq!(counts(&forgotten), expected.map(|(place, count)| (place.to_string(), count)).into());
    assert_eq!(counts(&looked), counts(&forgotten), "a dry run says what will be");
    let files = forgotten.places.iter().find(|place| place.kind == "files").unwrap();
    assert!(files.note.contains("1 rows of weather.csv"), "{files:?}");
    let after = ask(&server, T0).await;
    assert_eq!(after.others(), before.others());
    after.check_gone(&before);
    check_files(&project);
    assert!(std::fs::read_to_string(project.path().join("weather.csv")).unwrap().contains(GONE), "not ours to change");

    let again = forget(&server, &[GONE], false).await.unwrap();
    assert!(again.existed && counts(&again).is_empty(), "{again:?}");
    let manifest = datasets(&project).remove(0);
    assert_eq!((manifest.rows, manifest.rows_made(), manifest.redacted.len()), (3, 4, 1));
    assert_eq!((&*manifest.redacted[0].entity, &manifest.redacted[0].key), ("airport", &forgotten.hashes[0]));
    let kept = server.read_dataset("kept", &manifest.id).await.unwrap();
    assert_eq!(kept.num_rows(), 3);
    for (row, of) in [0, 2, 3].into_iter().enumerate() {
        assert_eq!(kept.slice(row, 1).columns(), before.offline[of].columns(), "the other rows are what they were");
    }
    // Made once more it is another one, because the sources are, and it lacks the row from the beginning.
    server.dataset("all", "kept", spine(T0)).await.unwrap();
    let both = datasets(&project);
    assert_eq!(both.len(), 2);
    assert!(both.iter().all(|manifest| manifest.rows == 3 && manifest.redacted[0].rows == 1));
    check_files(&project);

    // It does not come back, whatever brings it.
    let pushed = server.push("departures", events(&[(GONE, Some("N1"), GATE, 1.0, -5, "x1")])).await.unwrap();
    assert_eq!((pushed.accepted, pushed.rejected.len()), (0, 1));
    assert!(pushed.rejected[0].reason.contains("`airport` was forgotten"), "{:?}", pushed.rejected);
    let materialize = v1::MaterializeRequest {
        project: server.project.clone(),
        through: clock.now(),
        ..v1::MaterializeRequest::default()
    };
    ended(server.ingest.clone().materialize(materialize).await.unwrap().into_inner()).await;
    ask(&server, T0).await.check_gone(&before);

    // What waited for its time counts for the aircraft when it comes, and for nobody else.
    clock.advance(2 * HOUR);
    let due = settled(&server, clock.now()).await;
    for (row, delay) in [(0, 1.5 + 2.25 + 64.0 + 128.0 + 1024.0 + 2048.0), (2, 8.0 + 32.0)] {
        let sum = due.offline[row].column_by_name("flown:delay_6h").unwrap();
        assert_eq!(sum.as_primitive::<arrow::datatypes::Float64Type>().value(0), delay);
        let online = doubles("", &[Some(delay)]).values;
        assert_eq!(due.online[row]["flown:delay_6h"], format!("[{}] {online:?}", Status::Present as u8));
    }
    let none = due.offline[1].column_by_name("load:n_6h").unwrap();
    assert_eq!(none.as_primitive::<Int64Type>().value(0), 0);
    check_files(&project);

    server.stop().await.unwrap();
    let server = Server::start(&project, &clock, None).await.unwrap();
    assert_eq!(ask(&server, clock.now()).await, due);
    server.stop().await.unwrap();
    check_files(&project);
}

/// The answers once early events have been applied.
async fn settled(server: &Server, at: Micros) -> Answers {
    for _ in 0..200 {
        let answers = ask(server, at).await;
        if answers.online[0]["flown:n_6h"].contains("values: [6]") {
            return answers;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("early events are not applied: {:?}", ask(server, at).await.online[0]);
}

fn datasets(project: &Project) -> Vec<offline_store::dataset::Manifest> {
    let folder = project.path().join(".coeval/forget/datasets/kept");
    let manifests = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join("manifest.json"));
    manifests.map(|path| serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_only_begun_is_finished_by_the_next_server() {
    let clock = ManualClock::at(T0);
    let (project, server) = everywhere(&clock).await;
    let before = ask(&server, T0).await;
    server.stop().await.unwrap();

    // All that a process leaves that was killed after its first step, or a command that found no server: the entry.
    let name = ProjectName::try_new("forget").unwrap();
    let (objects, root) = registry::store::open_store(&project.path().join(".coeval").to_string_lossy()).unwrap();
    let now: registry::Clock = Arc::new(chrono::Utc::now);
    let registry = Registry::open(objects, &root.join("forget"), now).await.unwrap();
    let salt = Salt::random();
    let mut key = Vec::new();
    encode(&Value::String(GONE.into()), &mut key);
    let hash = KeyHash::of(&from_hex(salt.as_str()).unwrap(), "airport", &key);
    let keys = vec![RecordedHash::try_new(hash.to_string()).unwrap()];
    let change = Change::Forget(Forget { salt, entity: EntityName::try_new("airport").unwrap(), keys });
    registry.submit(&name, &change, "test", None).await.unwrap();

    // It works on files at once, and a training set asked for meanwhile may have to be asked for again.
    let server = Server::start(&project, &clock, None).await.unwrap();
    let pending = async || {
        let state = registry.refresh().await.unwrap();
        state.project("forget").unwrap().forgotten.pending().count()
    };
    for _ in 0..600 {
        if pending().await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(pending().await, 0, "the server has found it and finished it");
    check_files(&project);
    let after = ask(&server, T0).await;
    assert_eq!(after.others(), before.others());
    after.check_gone(&before);
    let again = forget(&server, &[GONE], false).await.unwrap();
    assert!(again.existed && counts(&again).is_empty(), "{again:?}");
    server.stop().await.unwrap();
}

/// Runs the command; its exit code, and what it said.
async fn coeval(project: &Project, words: &[&str]) -> (i32, String) {
    let mut command = std::process::Command::new(crate::process::binary());
    command.arg("-C").arg(project.path()).arg("forget").args(words).stdin(std::process::Stdio::null());
    let ended = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (ended.status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_what_is_wrong_and_what_it_did() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    std::fs::write(project.path().join("weather.csv"), "airport,temp,observed_at\nJFK,1.5,2023-11-14T20:00:00Z\n")
        .unwrap();
    project.apply().await.unwrap();
    let check = async |words: &[&str], code: i32, expected: &str| {
        let (ended, text) = coeval(&project, words).await;
        assert!(ended == code && text.contains(expected), "{words:?} ended with {ended}: {text}");
    };
    let named = format!("airport={GONE}");
    check(&["airport", &named], 2, "say `--yes`").await;
    check(&["airprot", &named, "--yes"], 1, "did you mean `airport`?").await;
    check(&["airport", "airprot=x", "--yes"], 1, "did you mean `airport`?").await;
    check(&["airport", &named, &named, "--yes"], 2, "given twice").await;
    check(&["airport", GONE, "--yes"], 2, "is not `key=value`").await;
    check(&["stand", &named, "--yes"], 2, "key `gate` is missing").await;
    check(&["airport", "airport=null", "--yes"], 2, "null names no entity").await;
    check(&["airport", "--yes"], 2, "KEY=VALUE").await;
    check(&["airport", &named, "--dry-run"], 1, "--server").await;

    let json = async |words: &[&str]| {
        let (code, text) = coeval(&project, words).await;
        assert_eq!(code, 0, "{text}");
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    let report = json(&["airport", &named, "--yes", "--json", "--why", "asked to"]).await;
    assert_eq!((&report["by"], &report["existed"], &report["entities"]), (&"later".into(), &false.into(), &1.into()));
    assert_eq!(report["hashes"][0].as_str().map(str::len), Some(64));
    let again = json(&["airport", &named, "--yes", "--json"]).await;
    assert_eq!(
        (&again["existed"], &again["entry"], &again["hashes"]),
        (&true.into(), &report["entry"], &report["hashes"])
    );

    let clock = ManualClock::at(T0);
    let server = Server::start(&project, &clock, None).await.unwrap();
    server
        .push("departures", events(&[("BOS", Some("N1"), "C1", 1.0, -5, "a"), ("LAX", None, "D1", 1.0, -4, "b")]))
        .await
        .unwrap();
    std::fs::write(project.path().join("keys.csv"), "airport\nBOS\nLAX\n").unwrap();
    let file = project.path().join("keys.csv").to_string_lossy().into_owned();
    let address = server.running.grpc_addr.to_string();
    let report = json(&["airport", "--from", &file, "--yes", "--json", "--server", &address]).await;
    assert_eq!((&report["by"], &report["entities"]), (&"server".into(), &2.into()));
    let places = report["places"].as_array().unwrap();
    let history = places.iter().find(|place| place["place"] == "history").unwrap();
    assert_eq!((&history["rows_removed"], &history["rows_cleared"]), (&1.into(), &1.into()));
    let (_, text) = coeval(&project, &["airport", "airport=BOS", "--yes", "--server", &address]).await;
    assert!(text.contains("nothing of it is stored") && text.contains("was forgotten before"), "{text}");
    server.stop().await.unwrap();
}
