//! What is said of cells whose rows are late, tied, deleted or too old.

use std::sync::Arc;

use arrow::array::{Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions};
use feature_defs::window::{HOUR, MINUTE};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use tempfile::TempDir;

use super::*;
use crate::EngineOptions;
use crate::history::{History, Positioned};
use crate::table::Work;
use crate::table::compact::{Extent, compact_source};

const DEFINITIONS: &str = r#"
entities:
  - {name: site, keys: [{name: site, type: string}]}
sources:
  - name: readings
    files: readings.csv
    event_time: happened
    created_time: created
    deleted: gone
  - name: clicks
    stream: true
    schema: [{name: site, type: string}, {name: n, type: int64}, {name: id, type: string}]
    event_time: clicked
    event_id: id
feature_views:
  - name: latest
    entity: site
    source: readings
    where: "temp IS NULL OR temp < 100"
    ttl: 3h
    features: [{name: temp, type: float64}, {name: low, expr: "temp < 3", default: false}]
  - name: load
    entity: site
    source: readings
    windows: [2h]
    aggregates:
      - {name: rows, function: count}
      - {name: total, function: sum, of: temp, where: "temp > 1"}
  - {name: last_click, entity: site, source: clicks, features: [{name: n, type: int64}]}
requests:
  - {name: ask, fields: [{name: bonus, type: float64}]}
transforms:
  - name: made
    inputs: [latest, load, ask]
    features:
      - {name: sum, expr: "latest.temp + load.total_2h + ask.bonus"}
  - {name: again, inputs: [made], features: [{name: more, expr: "made.sum * 2", default: -1.0}]}
feature_services:
  - {name: all, features: [latest, load, last_click, "made:*", "again:*", "ask:*"]}
"#;

const READINGS: &str = "site,temp,happened,created,gone
a,1,2024-01-01T09:00:00Z,,false
a,2,2024-01-01T10:00:00Z,2024-01-01T10:05:00Z,false
a,3,2024-01-01T10:00:00Z,2024-01-01T10:05:00Z,false
a,500,2024-01-01T10:30:00Z,,false
a,4,2024-01-01T11:00:00Z,2024-01-01T13:00:00Z,false
a,4,2024-01-01T14:00:00Z,,true
a,5,2024-01-01T15:00:00Z,,false
b,9,2024-01-01T10:00:00Z,,false
";

/// 2024-01-01T00:00:00Z
const DAY_0: Micros = 1_704_067_200_000_000;

struct World {
    engine: Engine,
    plan: Plan,
    store: Arc<dyn ObjectStore>,
    _folder: TempDir,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("readings.csv"), READINGS).unwrap();
        let columns = [
            ("site", Type::String),
            ("temp", Type::Float64),
            ("happened", Type::Timestamp),
            ("created", Type::Timestamp),
            ("gone", Type::Bool),
        ];
        let columns = columns.into_iter().map(|(name, of)| (name.to_owned(), of)).collect();
        let files = Files::new(vec![SourceFile { path: "all.yaml".into(), text: DEFINITIONS.into() }]);
        let plan = match compile_definitions("p", &files, &SourceSchemas::from([("readings".to_owned(), columns)])) {
            Ok(plan) => plan,
            Err(diagnostics) => panic!("{}", feature_defs::diagnose::render(&diagnostics, &files, false)),
        };
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let engine = Engine::new(EngineOptions {
            project_folder: folder.path().into(),
            project: "p".into(),
            store: store.clone(),
            prefix: Path::default(),
            memory_bytes: 256 << 20,
            spill_folder: None,
        });
        World { engine: engine.unwrap(), plan, store, _folder: folder }
    }

    /// `at` is the minutes since midnight.
    fn ask(&self, site: Option<&str>, at: i64, feature: &str) -> ExplainRequest {
        let at = TimestampMicrosecondArray::from(vec![DAY_0 + at * MINUTE]).with_timezone("UTC");
        let spine = RecordBatch::try_from_iter_with_nullable([
            ("site", Arc::new(StringArray::from(vec![site])) as ArrayRef, true),
            ("bonus", Arc::new(Float64Array::from(vec![0.5])), true),
            (EVENT_TIMESTAMP, Arc::new(at), true),
        ]);
        ExplainRequest {
            service: self.plan.service("all").unwrap().clone(),
            spine: spine.unwrap(),
            feature: feature.into(),
            visibility: None,
            limit: 10,
        }
    }

    async fn explain(&self, site: Option<&str>, at: i64, feature: &str) -> Explanation {
        self.engine.explain(&self.ask(site, at, feature)).await.unwrap()
    }
}

fn as_of_part(explained: &Explanation) -> &AsOfExplanation {
    match &explained.inputs[0].lookup {
        Lookup::AsOf(found) => found,
        Lookup::Windows(_) => panic!("a window"),
    }
}

fn window_part(explained: &Explanation) -> &WindowExplanation {
    match &explained.inputs[0].lookup {
        Lookup::Windows(found) => &found[0],
        Lookup::AsOf(_) => panic!("no window"),
    }
}

/// What a row says of `temp`, and why it is where it is.
fn told(rows: &[SourceRow]) -> Vec<(String, &str)> {
    rows.iter().map(|row| (row.columns["temp"].to_string(), row.why.as_str())).collect()
}

const TEN: i64 = 10 * 60;

#[tokio::test]
async fn of_rows_that_tie_the_larger_encoding_wins() {
    let world = World::new();
    let explained = world.explain(Some("a"), TEN + 30, "latest:temp").await;
    assert_eq!((explained.value.clone(), explained.status.as_str()), (json!(3.0), "PRESENT"));
    assert!(explained.strategy.contains("PitJoin"), "{}", explained.strategy);
    let input = &explained.inputs[0];
    // One row of the entity is excluded by the view's `where`.
    assert_eq!((input.rows_read, input.rows_of_entity, input.rows_of_view), (8, 7, 6));
    assert_eq!((&input.keys["site"], input.rule, input.known.as_str()), (&json!("a"), "known", "at `created`"));
    let found = as_of_part(&explained);
    assert_eq!(told(found.winner.as_slice()), [("3.0".to_owned(), "the latest that could be seen")]);
    let why = "same times: the larger encoding of the view's row wins";
    assert_eq!(told(&found.superseded), [("2.0".to_owned(), why), ("1.0".to_owned(), "happened 1h earlier")]);
    assert_eq!((found.hidden_count, found.later_count, found.superseded_count), (0, 3, 2));
    assert_eq!(found.judgement, "30m old, within the ttl of 3h");
    let shown = serde_json::to_value(&explained).unwrap();
    let winner = &shown["inputs"][0]["lookup"]["as_of"]["winner"];
    assert_eq!(winner["event_time"], "2024-01-01T10:00:00Z");
    assert_eq!((&winner["created_time"], &winner["known_time"]), (&json!("2024-01-01T10:05:00Z"), &winner["position"]));
    assert_eq!(winner["values"], json!({"temp": 3.0, "low": false}));
}

#[tokio::test]
async fn a_row_that_was_known_late_is_hidden_until_then() {
    let world = World::new();
    let explained = world.explain(Some("a"), 12 * 60, "latest:temp").await;
    assert_eq!(explained.value, json!(3.0));
    assert_eq!(told(&as_of_part(&explained).hidden), [("4.0".to_owned(), "known 1h after this time")]);
    assert_eq!(world.explain(Some("a"), 13 * 60, "latest:temp").await.value, json!(4.0));
    let mut ask = world.ask(Some("a"), 12 * 60, "latest:temp");
    ask.visibility = Some(catalog::Visibility::EventTime);
    let explained = world.engine.explain(&ask).await.unwrap();
    assert_eq!((explained.value, explained.inputs[0].rule), (json!(4.0), "event_time"));
}

#[tokio::test]
async fn tombstones_and_rows_that_are_too_old() {
    let world = World::new();
    let explained = world.explain(Some("a"), 14 * 60 + 30, "latest:low").await;
    // The default fills the value and leaves the status.
    assert_eq!((explained.value.clone(), explained.status.as_str()), (json!(false), "NOT_FOUND"));
    assert_eq!(as_of_part(&explained).judgement, "the latest row is a tombstone: the entity has no row");
    assert!(as_of_part(&explained).winner.as_ref().unwrap().tombstone);
    assert_eq!(explained.steps[0].default, Some(json!(false)));

    let explained = world.explain(Some("a"), 18 * 60, "latest:temp").await;
    assert_eq!(explained.value, json!(5.0), "both ends of the ttl are inclusive");
    let explained = world.explain(Some("a"), 20 * 60, "latest:temp").await;
    assert_eq!((explained.value.clone(), explained.status.as_str()), (Json::Null, "OUTSIDE_MAX_AGE"));
    assert_eq!(as_of_part(&explained).judgement, "5h old, older than the ttl of 3h and within 1d more");
    let explained = world.explain(Some("b"), 3 * 24 * 60, "latest:temp").await;
    assert_eq!(explained.status, "NOT_FOUND");
    assert_eq!(as_of_part(&explained).judgement, "2d14h old, older than the ttl of 3h and 1d more");
    let explained = world.explain(Some("c"), TEN, "latest:temp").await;
    assert_eq!(as_of_part(&explained).judgement, "no row of this entity could be seen");
    let explained = world.explain(None, TEN, "latest:temp").await;
    assert_eq!((explained.inputs[0].key_is_null, explained.inputs[0].rows_read), (true, 0));
}

#[tokio::test]
async fn windows_have_bounds_and_hide_what_is_late() {
    let world = World::new();
    let explained = world.explain(Some("a"), 12 * 60 + 3, "load:total_2h").await;
    assert_eq!(explained.value, json!(505.0));
    let found = window_part(&explained);
    assert_eq!(
        (found.start.to_string(), found.end.to_string()),
        ("2024-01-01T10:00:00Z".into(), "2024-01-01T12:03:00Z".into())
    );
    assert_eq!((found.hop.map(|hop| hop.to_string()), found.head), (Some("5m".to_owned()), "exclusive"));
    assert_eq!((found.events, found.contributing, found.hidden_count), (3, 3, 1));
    assert_eq!(told(&found.rows).iter().map(|(temp, _)| temp.as_str()).collect::<Vec<_>>(), ["500.0", "3.0", "2.0"]);
    assert_eq!(told(&found.hidden), [("4.0".to_owned(), "known 57m after this time")]);
    assert_eq!((found.function.as_str(), found.of.is_some(), found.filter.is_some()), ("sum", true, true));

    // What happens at the time itself is not inside; the row at 9:00 is excluded by the aggregate's `where`.
    let explained = world.explain(Some("a"), TEN, "load:total_2h").await;
    assert_eq!((explained.value.clone(), explained.status.as_str()), (Json::Null, "NULL_VALUE"));
    assert_eq!((window_part(&explained).events, window_part(&explained).contributing), (1, 0));
    // A tombstone is not an event, and 15:00 is not before itself: only what was known at 13:00 is left.
    let explained = world.explain(Some("a"), 15 * 60, "load:rows_2h").await;
    assert_eq!((explained.value.clone(), window_part(&explained).events), (json!(0), 0));
    assert_eq!(world.explain(None, TEN, "load:rows_2h").await.value, json!(0));
}

#[tokio::test]
async fn a_transform_shows_what_it_read() {
    let world = World::new();
    let explained = world.explain(Some("a"), TEN + 30, "again:more").await;
    assert_eq!(explained.value, json!(17.0));
    let steps: Vec<(&str, String)> =
        explained.steps.iter().map(|step| (step.name.as_str(), step.value.to_string())).collect();
    let last = [("made:sum", "8.5".to_owned()), ("again:more", "17.0".to_owned())];
    assert_eq!(steps[3..], last);
    let mut read: Vec<_> = steps[..3].to_vec();
    read.sort();
    let expected = [("ask:bonus", "0.5"), ("latest:temp", "3.0"), ("load:total_2h", "5.0")];
    assert_eq!(read, expected.map(|(name, value)| (name, value.to_owned())));
    assert_eq!(explained.inputs.iter().map(|input| input.alias.as_str()).collect::<Vec<_>>(), ["latest", "load"]);
    assert!(explained.steps[4].expression.as_ref().unwrap().contains("sum"));

    let explained = world.explain(Some("a"), TEN, "ask:bonus").await;
    assert_eq!((explained.value.clone(), explained.inputs.len()), (json!(0.5), 0));
}

#[tokio::test]
async fn every_cell_agrees_with_the_reference() {
    let world = World::new();
    let features: Vec<String> =
        world.plan.service("all").unwrap().outputs.iter().map(|output| output.name.clone()).collect();
    for feature in &features {
        for at in (8 * 60..19 * 60).step_by(60) {
            world.explain(Some("a"), at, feature).await;
        }
    }
}

#[tokio::test]
async fn histories_are_read_by_bucket_and_show_positions() {
    let world = World::new();
    let source = world.plan.source("clicks").unwrap();
    let mut history = History::open(world.store.clone(), Path::from("p"), "clicks").await.unwrap();
    let rows = 1..401_i64;
    let time = |row: i64| DAY_0 + row * MINUTE;
    let clicked = rows.clone().map(|row| Some(time(row - row % 4))).collect::<TimestampMicrosecondArray>();
    let batch = RecordBatch::try_from_iter_with_nullable([
        (
            "site",
            Arc::new(rows.clone().map(|row| Some(format!("s{}", row / 2 % 20))).collect::<StringArray>()) as ArrayRef,
            true,
        ),
        ("n", Arc::new(Int64Array::from_iter_values(rows.clone())), true),
        ("id", Arc::new(rows.clone().map(|row| Some(format!("e{row}"))).collect::<StringArray>()), true),
        ("clicked", Arc::new(clicked.with_timezone("UTC")), true),
    ]);
    let batch = source.align(&batch.unwrap(), None).unwrap();
    let positions = rows.map(|row| Position { time: time(row), sequence: row as u64 }).collect();
    history.append(source, &[Positioned { batch, positions }], 0).await.unwrap();

    let before = world.explain(Some("s1"), 24 * 60, "last_click:n").await;
    let input = &before.inputs[0];
    assert_eq!((before.value.clone(), input.rows_read, input.rows_of_entity), (json!(363), 400, 20));
    let found = as_of_part(&before);
    let winner = found.winner.as_ref().unwrap();
    assert_eq!((winner.sequence, winner.columns["id"].clone()), (363, json!("e363")));
    assert_eq!(winner.position.to_string(), "2024-01-01T06:03:00Z");
    // 362 and 363 are of one time.
    assert_eq!(found.superseded[0].why, "same times, earlier in the log");
    assert_eq!((found.superseded.len(), found.superseded_count), (10, 19));

    let work = Work { bucket_rows: 20, ..Work::default() };
    compact_source(&world.store, &Path::from("p"), &world.plan, source, Extent::All, &work, 0, &|_| {}).await.unwrap();
    let after = world.explain(Some("s1"), 24 * 60, "last_click:n").await;
    assert_eq!(after.value, before.value);
    assert!(after.inputs[0].rows_read < 400, "{}", after.inputs[0].rows_read);
    assert_eq!(after.inputs[0].rows_of_entity, 20);

    // Arrived, and not yet: the other rule hides it.
    let mut ask = world.ask(Some("s1"), 6 * 60 + 2, "last_click:n");
    assert_eq!(world.engine.explain(&ask).await.unwrap().value, json!(363));
    ask.visibility = Some(catalog::Visibility::Ingested);
    let explained = world.engine.explain(&ask).await.unwrap();
    assert_eq!(explained.value, json!(362));
    assert_eq!(as_of_part(&explained).hidden[0].why, "arrived 1m after this time");
}

#[tokio::test]
async fn what_cannot_be_explained_is_an_error() {
    let world = World::new();
    let error = world.engine.explain(&world.ask(Some("a"), TEN, "latest:tmp")).await.unwrap_err();
    assert_eq!(error.to_string(), "service `all` has no feature `latest:tmp`; did you mean `latest:temp`?");
    let mut ask = world.ask(Some("a"), TEN, "latest:temp");
    ask.spine = ask.spine.slice(0, 0);
    assert!(matches!(world.engine.explain(&ask).await, Err(ExplainError::NotOneRow { rows: 0 })));
    let mut ask = world.ask(Some("a"), TEN, "latest:temp");
    ask.spine = ask.spine.project(&[1, 2]).unwrap();
    let error = world.engine.explain(&ask).await.unwrap_err().to_string();
    assert!(error.contains("the spine has no column `site`"), "{error}");

    let text = world.engine.explain_service(world.plan.service("all").unwrap()).await.unwrap();
    assert!(text.contains("readings") && text.contains("clicks"), "{text}");
}

#[test]
fn lengths_are_said_as_definitions_say_them() {
    let said = [0, HOUR, 90 * MINUTE, 26 * HOUR, -1_500_000].map(|length| Length(length).to_string());
    assert_eq!(said, ["0s", "1h", "1h30m", "1d2h", "-1s500000us"]);
}
