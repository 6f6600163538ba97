//! Logs of rows that were served right, but for what each test does to them.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray};
use arrow::array::{
    Float64Array, Int64Array, StringArray, TimestampMicrosecondArray, UInt8Array, UInt64Array, new_null_array,
};
use arrow::datatypes::{DataType, Float64Type};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::forgotten::{Forgotten, KeyHash};
use feature_defs::plan::{SourceSchemas, compile_definitions};
use feature_defs::time::Position;
use feature_defs::window::{HOUR, MINUTE};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tempfile::TempDir;

use super::*;
use crate::EngineOptions;
use crate::history::Positioned;
use crate::serving_log::{FORMAT, FileName, Header, LogSchema, Place, encode};

mod skew;

const DEFINITIONS: &str = r#"
entities:
  - {name: site, keys: [{name: site, type: string}]}
  - {name: everything, keys: []}
sources:
  - {name: names, files: names.csv, static: true}
  - name: clicks
    stream: true
    schema: [{name: site, type: string}, {name: n, type: float64}]
    event_time: clicked
feature_views:
  - {name: named, entity: site, source: names, features: [{name: rank, type: int64}]}
  - {name: last, entity: site, source: clicks, ttl: 1d, features: [{name: n, type: float64, default: -1.0}]}
  - name: load
    entity: site
    source: clicks
    windows: [1h, 6h]
    aggregates:
      - {name: clicks, function: count}
      - {name: total, function: sum, of: n, default: 0.0}
  - name: all_load
    entity: everything
    source: clicks
    windows: [6h]
    aggregates: [{name: clicks, function: count}]
requests:
  - {name: ask, fields: [{name: bonus, type: float64}]}
transforms:
  - name: made
    inputs: [last, load, ask]
    features:
      - {name: sum, expr: "last.n + load.total_1h + ask.bonus"}
      - {name: hour, expr: "date_part('hour', local(at(), 'America/New_York'))", type: int64}
feature_services:
  - name: all
    features: [named, last, load, all_load, {view: last, as: other, keys: {site: other}}, "made:*", "ask:*"]
models:
  - name: scorer
    features: all
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["last:n", "made:sum"], missing: 0.0}
      - {name: hour, dtype: int64, features: ["made:hour"]}
    outputs: [{name: p, dtype: float32}]
"#;

/// 2024-01-01T12:00:00Z
const NOON: Micros = 1_704_110_400_000_000;
const FEATURES: u64 = 11;

struct World {
    engine: Engine,
    plan: Arc<Plan>,
    store: Arc<dyn ObjectStore>,
    _folder: TempDir,
}

/// A row as it is asked for.
#[derive(Clone)]
struct Asked {
    site: Option<&'static str>,
    at: Micros,
    /// How many clicks had been applied; None: none of this entity.
    applied: Option<u64>,
}

fn asked(site: &'static str, minute: i64, applied: u64) -> Asked {
    Asked { site: Some(site), at: NOON + minute * MINUTE, applied: Some(applied) }
}

impl World {
    /// Clicks of two sites, one every seven minutes, each of which took a minute to arrive.
    async fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("names.csv"), "site,rank\na,1\nb,2\n").unwrap();
        let files = Files::new(vec![SourceFile { path: "all.yaml".into(), text: DEFINITIONS.into() }]);
        let columns = vec![
            ("site".to_owned(), feature_defs::value::Type::String),
            ("rank".to_owned(), feature_defs::value::Type::Int64),
        ];
        let plan = match compile_definitions("p", &files, &SourceSchemas::from([("names".to_owned(), columns)])) {
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
        let world = World { engine: engine.unwrap(), plan: Arc::new(plan), store, _folder: folder };
        let source = world.plan.source("clicks").unwrap();
        let mut history = History::open(world.store.clone(), world.engine.project_path(), "clicks").await.unwrap();
        let (sites, numbers): (Vec<&str>, Vec<f64>) =
            (0..100).map(|i| (if i % 3 == 0 { "b" } else { "a" }, f64::from(i) * 1.25)).unzip();
        let times: Vec<Micros> = (0..100).map(clicked).collect();
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("site", Arc::new(StringArray::from(sites)) as ArrayRef, true),
            ("n", Arc::new(Float64Array::from(numbers)), true),
            ("clicked", Arc::new(TimestampMicrosecondArray::from(times).with_timezone("UTC")), true),
        ]);
        let positions = (0..100).map(position).collect();
        let events = Positioned { batch: batch.unwrap(), positions };
        history.append(source, &[events], NOON).await.unwrap();
        world
    }

    fn service(&self) -> &Arc<ServicePlan> {
        self.plan.service("all").unwrap()
    }

    /// Rows of a log, with nothing served yet.
    fn blank(&self, rows: &[Asked]) -> Logged {
        let schema = LogSchema::of(self.service(), &[]);
        let count = rows.len();
        let columns = schema.schema.fields().iter().map(|field| -> ArrayRef {
            let name = field.name().as_str();
            let time = |time: &dyn Fn(&Asked) -> Micros| -> ArrayRef {
                Arc::new(
                    TimestampMicrosecondArray::from(rows.iter().map(time).collect::<Vec<_>>()).with_timezone("UTC"),
                )
            };
            match name {
                "request_id" => Arc::new((0..count).map(|row| Some(format!("r{row}"))).collect::<StringArray>()),
                "time" => time(&|row| row.at + 1_000),
                "at" => time(&|row| row.at),
                "in:site" => Arc::new(rows.iter().map(|row| row.site).collect::<StringArray>()),
                "in:other" => Arc::new(rows.iter().map(|_| Some("b")).collect::<StringArray>()),
                "in:bonus" => Arc::new((0..count).map(|row| Some(row as f64)).collect::<Float64Array>()),
                "position_time:named" => {
                    Arc::new(rows.iter().map(|row| row.site.map(|_| i64::MIN)).collect::<Int64Array>())
                }
                "position_sequence:named" => {
                    Arc::new(rows.iter().map(|row| row.site.map(|_| 0)).collect::<UInt64Array>())
                }
                _ if name.starts_with("position_time:") => {
                    let times = rows.iter().map(|row| row.applied.map(|applied| position(applied as i64 - 1).time));
                    Arc::new(times.collect::<Int64Array>())
                }
                _ if name.starts_with("position_sequence:") => {
                    let numbers =
                        rows.iter().map(|row| row.applied.map(|applied| position(applied as i64 - 1).sequence));
                    Arc::new(numbers.collect::<UInt64Array>())
                }
                _ => match field.data_type() {
                    DataType::UInt8 if !field.is_nullable() => Arc::new(UInt8Array::from(vec![1; count])),
                    DataType::UInt32 if !field.is_nullable() => {
                        Arc::new(arrow::array::UInt32Array::from(vec![0; count]))
                    }
                    DataType::Utf8 if !field.is_nullable() => Arc::new(StringArray::from(vec!["ok"; count])),
                    other => new_null_array(other, count),
                },
            }
        });
        let batch = RecordBatch::try_new(schema.schema.clone(), columns.collect()).unwrap();
        Logged { batch, hashed: schema.hashed.into() }
    }

    fn options(&self) -> AuditOptions {
        AuditOptions { chunk_rows: 7, ..AuditOptions::new(0, NOON * 2) }
    }

    async fn auditor(&self) -> Auditor<'_> {
        Auditor::new(&self.engine, &self.plan, self.service(), self.options()).await.unwrap()
    }

    /// Rows of a log that were served right: what the reference says of the events that had been applied, by plain slices.
    async fn served(&self, rows: &[Asked]) -> Logged {
        self.fill(self.blank(rows)).await
    }

    async fn fill(&self, blank: Logged) -> Logged {
        let service = self.service();
        let given = blank.given(service).unwrap();
        let at = blank.times(names::AT).unwrap();
        let events = Events::read(&self.engine, service, &given, &at).await.unwrap();
        let used = crate::point_in_time::Used::by(service);
        let mut answers = Vec::new();
        for (number, input) in service.inputs.iter().enumerate() {
            let applied = blank.applied(&input.alias).unwrap();
            let parts: Vec<variant::Part> = (0..at.len())
                .map(|row| {
                    let group = events.groups[number][row];
                    let is_known = group != crate::point_in_time::index::NO_GROUP;
                    let of = &events.inputs[number];
                    variant::Look {
                        view: &input.view,
                        rows: if is_known { &of.rows[group as usize] } else { &[] },
                        windows: if is_known { &of.windows[group as usize] } else { &[] },
                        needed: &used[number].features,
                        rule: input.view.source.visibility,
                        applied: applied[row],
                        at: at[row],
                        bound: None,
                        without: None,
                        twice: None,
                    }
                    .part()
                })
                .collect();
            let types = input.view.features();
            answers.push(feature_defs::plan::ViewAnswer {
                values: (0..types.len())
                    .map(|feature| Value::to_array(parts.iter().map(|part| &part.values[feature]), types[feature].1))
                    .collect(),
                statuses: parts.iter().map(|part| part.status).collect(),
                event_times: parts.iter().map(|part| part.event_time).collect(),
            });
        }
        let assembled = service.assemble(&answers, &given, &at).unwrap();
        let mut logged = blank;
        for (output, planned) in service.outputs.iter().enumerate() {
            let statuses: UInt8Array = assembled.statuses[output].iter().map(|status| Some(*status as u8)).collect();
            logged = with(&logged, &names::feature(&planned.name), assembled.columns[output].clone());
            logged = with(&logged, &names::status(&planned.name), Arc::new(statuses));
        }
        logged
    }

    async fn audit(&self, logged: &Logged) -> Report {
        let mut auditor = self.auditor().await;
        auditor.add(logged, None).await.unwrap();
        auditor.finish().await.unwrap()
    }
}

fn clicked(i: i64) -> Micros {
    NOON - 6 * HOUR + i * 7 * MINUTE
}

/// Of the i-th click; before the first, of nothing.
fn position(i: i64) -> Position {
    Position { time: clicked(i) + MINUTE, sequence: (i + 1) as u64 }
}

fn with(logged: &Logged, name: &str, column: ArrayRef) -> Logged {
    let schema = logged.batch.schema();
    let (index, _) = schema.column_with_name(name).unwrap_or_else(|| panic!("no column {name}"));
    let mut columns = logged.batch.columns().to_vec();
    columns[index] = column;
    Logged { batch: RecordBatch::try_new(schema, columns).unwrap(), hashed: logged.hashed.clone() }
}

fn float(logged: &Logged, name: &str, change: impl Fn(usize, f64) -> f64) -> Logged {
    let column = logged.batch.column_by_name(name).unwrap().as_primitive::<Float64Type>();
    let changed = (0..column.len()).map(|row| column.is_valid(row).then(|| change(row, column.value(row))));
    with(logged, name, Arc::new(changed.collect::<Float64Array>()))
}

fn of<'r>(report: &'r Report, feature: &str) -> &'r FeatureReport {
    report.features.iter().find(|found| found.feature == feature).unwrap()
}

/// Every click that had happened a minute before had been applied.
fn in_time() -> Vec<Asked> {
    let rows = (0..40).map(|i| {
        let minute = i * 5;
        let applied = (0..100).filter(|click| position(*click).time <= NOON + minute * MINUTE).count() as u64;
        // Clicks that happened within the last minute had not arrived; the minutes of rows avoid these.
        asked(if i % 2 == 0 { "a" } else { "b" }, minute, applied)
    });
    let arrived = |row: &Asked| (0..100).all(|click| clicked(click) > row.at || position(click).time <= row.at);
    rows.filter(arrived).collect()
}

#[tokio::test]
async fn what_was_served_right_is_equal_everywhere() {
    let world = World::new().await;
    let rows = in_time();
    let report = world.audit(&world.served(&rows).await).await;
    assert_eq!(
        report.values,
        Counts { equal: rows.len() as u64 * FEATURES, ..Counts::default() },
        "{:#?}",
        report.lateness
    );
    assert_eq!(report.outcome, Outcome::Passed);
    assert_eq!((report.rows.audited, report.rows.with_bugs), (rows.len() as u64, 0));
    assert!(report.bug_rate_upper < 3.1 / report.values.compared() as f64);
    assert!(report.verdict().starts_with("PASSED"), "{}", report.verdict());
    assert!(report.cause.is_none() && report.lateness.is_empty());
}

#[tokio::test]
async fn every_changed_bit_and_status_is_a_bug_and_nothing_else_is() {
    let world = World::new().await;
    let served = world.served(&in_time()).await;
    let name = names::feature("load:total_6h");
    let wrong = float(&served, &name, |row, x| if row == 3 { f64::from_bits(x.to_bits() ^ 1) } else { x });
    let status = names::status("last:n");
    let mut statuses =
        wrong.batch.column_by_name(&status).unwrap().as_primitive::<arrow::datatypes::UInt8Type>().values().to_vec();
    statuses[8] = Status::NullValue as u8;
    let wrong = with(&wrong, &status, Arc::new(UInt8Array::from(statuses)));
    let report = world.audit(&wrong).await;
    assert_eq!((report.values.bug, report.rows.with_bugs), (2, 2));
    assert_eq!(of(&report, "load:total_6h").counts.bug, 1);
    assert_eq!(of(&report, "last:n").counts.bug, 1);
    assert_eq!(report.outcome, Outcome::Failed);
    let example = &of(&report, "load:total_6h").examples[0];
    assert_eq!((example.kind, example.request_id.as_str()), ("bug", "r3"));
    let explained = example.explained.as_ref().unwrap_or_else(|| panic!("{:?}", example.unexplained));
    assert_eq!(explained.value, example.as_known);
    assert!(of(&report, "load:total_6h").first_bad_minute.is_some());
    let minutes: u64 = report.bugs.points.iter().map(|point| point.count).sum();
    assert_eq!(minutes, 2);
    let text = report.lines().join("\n");
    assert!(text.contains("FAILED: 2 of") && text.contains("load:total_6h"), "{text}");

    let mut auditor = world.auditor().await;
    auditor.options.max_bug_rate = 0.5;
    auditor.add(&wrong, None).await.unwrap();
    assert_eq!(auditor.finish().await.unwrap().outcome, Outcome::Passed, "half of the values may differ");
}

#[tokio::test]
async fn what_had_not_been_applied_is_late_and_says_why() {
    let world = World::new().await;
    let mut rows = in_time();
    // The online store is three clicks of all sites behind, from the tenth row on.
    rows.iter_mut().skip(10).for_each(|row| row.applied = row.applied.map(|applied| applied - 3));
    let report = world.audit(&world.served(&rows).await).await;
    assert_eq!(report.values.bug, 0);
    assert!(report.values.lateness > 0);
    assert_eq!(report.outcome, Outcome::Passed, "lateness is no bug");
    assert_eq!(of(&report, "ask:bonus").counts.lateness, 0);
    assert_eq!(report.lateness.len(), 1);
    let late = &report.lateness[0];
    assert_eq!((late.source.as_str(), late.arrived_after), ("clicks", 0));
    assert!(late.not_applied > 0 && late.not_applied_max.unwrap().0 > 0);

    // A click that happened before the request and arrived after it.
    let late_click = (0..100).find(|click| clicked(*click) > NOON).unwrap();
    let at = clicked(late_click) + MINUTE / 2;
    let row = Asked { site: Some(if late_click % 3 == 0 { "b" } else { "a" }), at, applied: Some(late_click as u64) };
    let report = world.audit(&world.served(&[row]).await).await;
    assert_eq!(report.values.bug, 0);
    assert!(report.lateness[0].arrived_after > 0 && report.lateness[0].not_applied == 0, "{:?}", report.lateness);
    assert_eq!(report.lateness[0].arrived_after_max.unwrap().0, MINUTE);
}

#[tokio::test]
async fn a_store_that_did_not_answer_is_a_fallback_and_checked_as_such() {
    let world = World::new().await;
    let blank = world.blank(&in_time());
    let rows = blank.rows();
    let reasons: UInt8Array = (0..rows).map(|row| (row % 4 == 0).then_some(1)).collect();
    let blank = with(&blank, &names::reason("last"), Arc::new(reasons));
    let served = world.fill(blank).await;
    let down = rows.div_ceil(4) as u64;
    let report = world.audit(&served).await;
    assert_eq!(report.values.bug, 0);
    assert_eq!(of(&report, "last:n").counts.fallback, down);
    assert_eq!(of(&report, "made:sum").counts.fallback, down, "what is made of it falls back, too");
    assert_eq!(of(&report, "other:n").counts.fallback, 0);
    // The default is declared; anything else in its place is wrong.
    let wrong = float(&served, &names::feature("last:n"), |row, x| if row == 4 { 0.0 } else { x });
    assert_eq!(of(&world.audit(&wrong).await, "last:n").counts.bug, 1);
}

#[tokio::test]
async fn an_entity_without_events_and_a_null_key_have_nothing() {
    let world = World::new().await;
    let rows = [
        Asked { site: None, at: NOON, applied: None },
        Asked { site: Some("a"), at: NOON, applied: None },
        Asked { site: Some("nobody"), at: NOON, applied: None },
    ];
    let report = world.audit(&world.served(&rows).await).await;
    assert_eq!(report.values.bug, 0, "{:#?}", report.features);
    assert_eq!(of(&report, "last:n").counts.lateness, 1, "of the site that has clicks by now");
    assert_eq!(of(&report, "named:rank").counts.equal, 3);
}

#[tokio::test]
async fn what_cannot_be_replayed_is_counted_by_reason() {
    let world = World::new().await;
    let mut rows = in_time();
    rows[0].applied = Some(101);
    let blank = world.blank(&rows);
    let bonus: Float64Array = (0..rows.len()).map(|row| (row != 1).then_some(row as f64)).collect();
    let blank = with(&blank, &names::input("bonus"), Arc::new(bonus));
    let served = world.fill(blank).await;
    let count = rows.len() as u64;
    let report = world.audit(&served).await;
    let expected = BTreeMap::from([(NotAudited::BeyondHistory, 1), (NotAudited::Incomplete, 1)]);
    assert_eq!((&report.rows.not_audited, report.rows.audited), (&expected, count - 2));
    assert_eq!(report.values.bug, 0);

    // A feature that is logged as a hash, and a field that others are made of.
    let text: ArrayRef = Arc::new(StringArray::from(vec!["abcd"; rows.len()]));
    let mut hashed = hash(&served, &names::feature("last:n"), text.clone());
    let report = world.audit(&hashed).await;
    assert_eq!(of(&report, "last:n").counts.left_out(), count);
    assert_eq!(of(&report, "made:sum").counts.left_out(), 2);
    hashed = hash(&served, &names::input("bonus"), text.clone());
    let report = world.audit(&hashed).await;
    assert_eq!(of(&report, "made:sum").counts.not_audited[&NotAudited::Hashed], count - 1);
    assert_eq!((of(&report, "last:n").counts.left_out(), report.values.bug), (1, 0));
    // Nothing can be asked again without the key.
    let report = world.audit(&hash(&served, &names::input("site"), text)).await;
    assert_eq!(report.rows.not_audited, BTreeMap::from([(NotAudited::Hashed, count)]));
    assert_eq!(report.outcome, Outcome::NothingCompared);

    // Someone who is forgotten is not replayed.
    let mut key = Vec::new();
    feature_defs::value::encode(&Value::String("a".into()), &mut key);
    let salt = [7; 32];
    world.plan.forget(&Arc::new(Forgotten::new(&salt, [(Arc::from("site"), KeyHash::of(&salt, "site", &key))])));
    let report = world.audit(&served).await;
    assert!(report.rows.not_audited[&NotAudited::Forgotten] > 0);
    assert_eq!((report.values.bug, report.values.lateness), (0, 0), "what is left is right");
    world.plan.forget(&Arc::new(Forgotten::new(&salt, [])));

    // Without its positions a log says too little.
    let schema = served.batch.schema();
    let kept: Vec<usize> =
        (0..schema.fields().len()).filter(|i| !schema.field(*i).name().starts_with("position_")).collect();
    let damaged = Logged { batch: served.batch.project(&kept).unwrap(), hashed: served.hashed.clone() };
    let report = world.audit(&damaged).await;
    assert_eq!(report.rows.not_audited, BTreeMap::from([(NotAudited::Damaged, count)]));
    assert!(report.notes[0].contains("position_"), "{:?}", report.notes);
}

fn hash(logged: &Logged, name: &str, text: ArrayRef) -> Logged {
    let schema = logged.batch.schema();
    let columns = schema.fields().iter().zip(logged.batch.columns());
    let columns = columns.map(|(field, column)| {
        let column = if field.name() == name { text.clone() } else { column.clone() };
        (field.name().clone(), column, field.is_nullable())
    });
    let batch = RecordBatch::try_from_iter_with_nullable(columns.collect::<Vec<_>>()).unwrap();
    Logged { batch, hashed: [name.to_owned()].into() }
}

#[tokio::test]
async fn files_of_the_log_are_audited_by_time_and_definitions_and_sample() {
    let world = World::new().await;
    let rows = in_time();
    let served = world.served(&rows).await;
    let put = async |number: u64, logged: &Logged, digest: String| {
        let at = logged.times(names::AT).unwrap();
        let header = Header {
            format: FORMAT,
            project: "p".into(),
            gateway: "127.0.0.1:1".into(),
            incarnation: "life".into(),
            service: "all".into(),
            semantic_digest: digest,
            model: None,
            hashed: Vec::new(),
            first_at: at[0],
            last_at: at[at.len() - 1],
            first_time: at[0],
            last_time: at[at.len() - 1],
            rows: at.len() as u64,
        };
        let name = FileName { first_at: header.first_at, last_at: header.last_at, incarnation: "life".into(), number };
        let mut bytes = Vec::new();
        encode(&header, &logged.batch.schema(), std::slice::from_ref(&logged.batch), &mut bytes).unwrap();
        let path = Place::of("all", at[0]).folder(&world.engine.project_path()).join(name.to_string());
        world.store.put(&path, bytes.into()).await.unwrap();
        path
    };
    let digest = world.service().semantic_digest.to_string();
    let half = rows.len() / 2;
    put(1, &served.slice(0, half), digest.clone()).await;
    put(2, &served.slice(half, rows.len() - half), digest.clone()).await;
    put(3, &served.slice(0, 3), "other".to_owned()).await;
    let broken = put(4, &served.slice(0, 1), digest).await;
    world.store.put(&broken, "no file".into()).await.unwrap();

    let audit = async |from: Micros, to: Micros, sample_rows: Option<u64>| {
        let options = AuditOptions { from, to, ..world.options() };
        let request = AuditRequest { service: world.service().clone(), options, sample_rows };
        audit(&world.engine, &world.plan, &request, None, &|_| {}).await.unwrap()
    };
    let report = audit(0, NOON * 2, None).await;
    assert_eq!((report.rows.logged, report.rows.audited), (rows.len() as u64 + 3, rows.len() as u64));
    assert_eq!(report.rows.not_audited, BTreeMap::from([(NotAudited::OtherDefinitions, 3)]));
    assert_eq!((report.values.equal, report.values.bug), (rows.len() as u64 * FEATURES, 0));
    assert_eq!(report.notes.len(), 1, "{:?}", report.notes);

    let until = rows[5].at;
    assert_eq!(audit(0, until, None).await.rows.audited, 5);
    let sampled = audit(0, NOON * 2, Some(10)).await;
    assert!((8..=14).contains(&sampled.rows.audited), "{:?}", sampled.rows);
    assert_eq!(
        sampled.rows.passed_over,
        sampled.rows.logged - sampled.rows.audited - sampled.rows.not_audited[&NotAudited::OtherDefinitions]
    );
    assert_eq!(audit(0, 1, None).await.outcome, Outcome::NothingCompared);
}

#[tokio::test]
async fn causes_are_named_by_what_reproduces_the_bits() {
    let world = World::new().await;
    let served = world.served(&in_time()).await;
    let all = async |wrong: Logged| world.audit(&wrong).await;
    let some = |row: usize| row % 5 == 1;
    // Another unit, in what is served of one feature.
    let wrong = float(&served, &names::feature("other:n"), |row, x| if some(row) { x * 1_000.0 } else { x });
    let report = all(wrong).await;
    let cause = of(&report, "other:n").cause.as_ref().unwrap();
    assert_eq!(cause.fault, Some(cause::Fault::Scale), "{cause:?}");
    assert!(cause.setting.contains("times 1000"), "{cause:?}");
    assert_eq!(cause.reproduced, cause.rows);
    // The default in place of what there is.
    let wrong = float(&served, &names::feature("other:n"), |row, x| if some(row) { -1.0 } else { x });
    let report = all(wrong).await;
    assert_eq!(report.cause.unwrap().fault, Some(cause::Fault::Default));
    // A clock.
    let hours = served.batch.column_by_name(&names::feature("made:hour")).unwrap();
    let hours = hours.as_primitive::<arrow::datatypes::Int64Type>();
    let moved: Int64Array =
        (0..hours.len()).map(|row| Some((hours.value(row) + if some(row) { 5 } else { 0 }) % 24)).collect();
    let report = all(with(&served, &names::feature("made:hour"), Arc::new(moved))).await;
    let cause = report.cause.unwrap();
    assert_eq!(cause.fault, Some(cause::Fault::Clock), "{cause:?}");
    assert!(cause.setting.contains("+5 h"), "{cause:?}");
    // What nothing explains has no cause.
    let wrong = float(&served, &names::feature("other:n"), |row, x| if some(row) { x * 1.000_123 } else { x });
    assert_eq!(all(wrong).await.cause.unwrap().fault, None);
}

/// Says of the second row that it differs, and of other versions than the first that they are gone.
struct Scores;

#[async_trait::async_trait]
impl Rescore for Scores {
    async fn rescore(
        &self,
        model: &ModelPlan,
        version: u32,
        inputs: &feature_defs::plan::EncodedModelInputs,
        logged: &RecordBatch,
    ) -> Result<Vec<Option<String>>, String> {
        assert_eq!((&*model.name, inputs.inputs.len()), ("scorer", 2));
        assert_eq!(inputs.inputs[0].values.len(), logged.num_rows() * 2);
        match version {
            1 => Ok((0..logged.num_rows()).map(|row| (row == 1).then(|| "0.5, not 0.4".to_owned())).collect()),
            _ => Err("it is gone".to_owned()),
        }
    }
}

#[tokio::test]
async fn tensors_are_compared_where_features_are_equal_and_rows_are_scored_again() {
    let world = World::new().await;
    let model = world.plan.model("scorer").unwrap();
    let rows = in_time();
    let served = world.served(&rows).await;
    let columns: Vec<Column> = (0..world.service().outputs.len())
        .map(|output| served.served(world.service(), output).unwrap().unwrap())
        .collect();
    let encoded = tensors::encode(model, &columns, rows.len());
    let mut digests: Vec<[u8; 16]> =
        (0..rows.len()).map(|row| crate::serving_log::tensor_digest(&encoded.inputs, row)).collect();
    let versions: arrow::array::UInt32Array = (0..rows.len()).map(|row| Some(if row < 5 { 2 } else { 1 })).collect();
    let served = with(&served, names::VERSION, Arc::new(versions));
    let audit = async |digests: &[[u8; 16]], served: &Logged| {
        let digests = arrow::array::FixedSizeBinaryArray::try_from_iter(digests.iter()).unwrap();
        let logged = with(served, names::TENSORS, Arc::new(digests));
        let mut auditor = world.auditor().await;
        auditor.add(&logged, Some("scorer")).await.unwrap();
        auditor.rescore(&Scores).await.unwrap();
        auditor.finish().await.unwrap()
    };
    let count = rows.len() as u64;
    let report = audit(&digests, &served).await;
    let found = report.tensors.unwrap();
    assert_eq!((found.compared, found.equal, found.different), (count, count, 0));
    let scores = report.rescored.unwrap();
    assert_eq!((scores.compared, scores.different), (count - 5, 1));
    assert!(scores.examples[0].contains("scorer v1") && scores.examples[0].contains("0.5, not 0.4"));
    assert_eq!(scores.not_compared, BTreeMap::from([("scorer v2: it is gone".to_owned(), 5)]));
    assert_eq!((report.outcome, report.values.bug), (Outcome::Failed, 0), "a score that differs is a bug of its own");

    // The model was given something that its features are not; where they are wrong themselves, that is said already.
    digests[3][0] ^= 1;
    let wrong = float(&served, &names::feature("last:n"), |row, x| if row == 6 { x + 1.0 } else { x });
    let report = audit(&digests, &wrong).await;
    let verdict = report.verdict();
    assert!(verdict.contains("1 rows with equal features had other tensors"), "{verdict}");
    let found = report.tensors.unwrap();
    assert_eq!((found.compared, found.different, found.passed_over), (count - 1, 1, 1));
    assert_eq!(found.examples, [("r3".to_owned(), 0)]);
    assert_eq!(report.outcome, Outcome::Failed);
}
