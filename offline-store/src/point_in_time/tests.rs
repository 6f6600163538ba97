//! The engine against the reference, on generated data that holds every case at once.
//!
//! The reference is asked with rows made straight from the generated records, by code that shares nothing with the
//! engine but the reference functions themselves.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::UInt8Type;
use feature_defs::aggregate::{Aggregate, Function};
use feature_defs::as_of::{MaxAge, Row, Times, Visibility, as_of, feature_value};
use feature_defs::catalog::{Files, Head, SourceFile};
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions};
use feature_defs::time::{Micros, Position, SourceClock, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{DAY, HOUR, MINUTE, SECOND, Window, WindowEvent, default_hop, window_value};
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{Engine, EngineError, EngineOptions, TrainingSetRequest};

const T0: Micros = 1_372_636_800 * SECOND; // 2013-07-01T00:00:00Z

const DEFINITIONS: &str = r#"
entities:
  - {name: pair, keys: [{name: a, type: string}, {name: b, type: string}]}
  - {name: everything, keys: []}
sources:
  - name: events
    files: events/*.parquet
    event_time: happened
    created_time: created
    deleted: gone
  - name: delayed
    files: events/*.parquet
    event_time: happened
    delay: 10m
    every: 1h
feature_views:
  - name: latest
    entity: pair
    keys: {a: left}
    source: events
    where: "n IS NULL OR n <> 3"
    ttl: 6h
    keep: 12h
    features:
      - {name: x, type: float64}
      - {name: n, type: int64, default: -1}
      - {name: twice, expr: "x * 2 + 0.5"}
  - name: last_delayed
    entity: everything
    source: delayed
    features: [{name: x, type: float64}]
  - name: load
    entity: pair
    keys: {a: left}
    source: events
    windows: [1h, 24h]
    aggregates:
      - {name: rows, function: count}
      - {name: total, function: sum, of: x}
      - {name: mean, function: mean, of: x, where: "n > 2", default: 0.0}
      - {name: low, function: min, of: x}
      - {name: high, function: max, of: n, windows: [24h]}
feature_services:
  - name: all
    features:
      - {view: latest, keys: {a: p, b: q}}
      - {view: last_delayed}
      - {view: load, keys: {a: p, b: q}}
  - name: swapped
    features:
      - {view: latest, as: forward, keys: {a: p, b: q}}
      - {view: latest, as: backward, keys: {a: q, b: p}}
"#;

#[derive(Debug, Clone)]
struct Record {
    left: Option<&'static str>,
    b: Option<&'static str>,
    happened: Option<Micros>,
    created: Option<Micros>,
    x: Option<f64>,
    n: Option<i64>,
    gone: Option<bool>,
}

const KEYS: [&str; 5] = ["1", "12", "23", "3", ""];

fn records(random: &mut SmallRng, count: usize) -> Vec<Record> {
    let mut records: Vec<Record> = (0..count)
        .map(|_| {
            let mut happened = T0 + random.random_range(0..2 * DAY);
            if random.random_bool(0.5) {
                // On the grid, so that ties with each other, with the spine and with window bounds are common.
                happened -= happened.rem_euclid(5 * MINUTE);
            }
            let created = match random.random_range(0..4) {
                0 => None,
                1 => Some(happened + random.random_range(0..5 * HOUR)),
                2 => Some(happened),
                _ => Some(happened - random.random_range(0..HOUR)),
            };
            let x = match random.random_range(0..10) {
                0 => None,
                1 => Some(f64::NAN),
                2 => Some(-0.0),
                3 => Some(f64::INFINITY),
                4 => Some(f64::NEG_INFINITY),
                5 => Some(-f64::NAN),
                6 => Some(1e300),
                7 => Some(1e-300),
                _ => Some(f64::from(random.random_range(-1000..1000)) / 7.0),
            };
            let key =
                |random: &mut SmallRng| (!random.random_bool(0.05)).then(|| KEYS[random.random_range(0..KEYS.len())]);
            Record {
                left: key(random),
                b: key(random),
                happened: (!random.random_bool(0.02)).then_some(happened),
                created,
                x,
                n: (!random.random_bool(0.2)).then(|| random.random_range(0..6)),
                gone: match random.random_range(0..20) {
                    0 => Some(true),
                    1 => None,
                    _ => Some(false),
                },
            }
        })
        .collect();
    // Full duplicates, and ties in everything but the value.
    for i in 0..count / 10 {
        let mut copy = records[i].clone();
        if i % 2 == 0 {
            copy.x = Some(f64::from(i as u32));
        }
        records.push(copy);
    }
    records
}

fn batch(records: &[Record]) -> RecordBatch {
    let times = |get: fn(&Record) -> Option<Micros>| -> ArrayRef {
        Arc::new(records.iter().map(get).collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    RecordBatch::try_from_iter_with_nullable([
        ("left", Arc::new(records.iter().map(|r| r.left).collect::<StringArray>()) as ArrayRef, true),
        ("b", Arc::new(records.iter().map(|r| r.b).collect::<StringArray>()), true),
        ("happened", times(|r| r.happened), true),
        ("created", times(|r| r.created), true),
        ("x", Arc::new(records.iter().map(|r| r.x).collect::<Float64Array>()), true),
        ("n", Arc::new(records.iter().map(|r| r.n).collect::<Int64Array>()), true),
        ("gone", Arc::new(records.iter().map(|r| r.gone).collect::<BooleanArray>()), true),
    ])
    .unwrap()
}

fn write_files(folder: &std::path::Path, parts: &[&[Record]]) {
    std::fs::create_dir_all(folder.join("events")).unwrap();
    for (i, part) in parts.iter().enumerate() {
        let batch = batch(part);
        let file = std::fs::File::create(folder.join(format!("events/part-{i}.parquet"))).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

fn engine(folder: &std::path::Path, memory_bytes: u64) -> Engine {
    Engine::new(EngineOptions {
        project_folder: folder.into(),
        project: "test".into(),
        store: Arc::new(InMemory::new()),
        prefix: Path::default(),
        memory_bytes,
        spill_folder: None,
    })
    .unwrap()
}

async fn plan(engine: &Engine) -> Plan {
    let schema = engine.sources().schema("events/*.parquet").await.unwrap();
    let schemas = SourceSchemas::from([("events".into(), schema.clone()), ("delayed".into(), schema)]);
    let files = Files::new(vec![SourceFile { path: "all.yaml".into(), text: DEFINITIONS.into() }]);
    match compile_definitions("test", &files, &schemas) {
        Ok(plan) => plan,
        Err(diagnostics) => panic!("{}", feature_defs::diagnose::render(&diagnostics, &files, false)),
    }
}

struct SpineRow {
    p: Option<&'static str>,
    q: Option<&'static str>,
    t: Micros,
}

fn spine(random: &mut SmallRng, records: &[Record], count: usize) -> Vec<SpineRow> {
    let mut rows: Vec<SpineRow> = (0..count)
        .map(|_| {
            let key =
                |random: &mut SmallRng| (!random.random_bool(0.05)).then(|| KEYS[random.random_range(0..KEYS.len())]);
            // Often at exactly the time of an event, or when one became known.
            let record = &records[random.random_range(0..records.len())];
            let t = match random.random_range(0..4) {
                0 => record.happened.unwrap_or(T0),
                1 => record.created.unwrap_or(T0),
                2 => T0 + random.random_range(0..3 * DAY),
                _ => record.happened.unwrap_or(T0) + 6 * HOUR,
            };
            SpineRow { p: key(random), q: key(random), t }
        })
        .collect();
    // The same row twice stays twice.
    if let Some(first) = rows.first() {
        rows.push(SpineRow { p: first.p, q: first.q, t: first.t });
    }
    rows
}

fn spine_batch(rows: &[SpineRow]) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable([
        ("row", Arc::new((0..rows.len() as i64).collect::<Int64Array>()) as ArrayRef, false),
        ("p", Arc::new(rows.iter().map(|r| r.p).collect::<StringArray>()), true),
        ("q", Arc::new(rows.iter().map(|r| r.q).collect::<StringArray>()), true),
        (
            "event_timestamp",
            Arc::new(rows.iter().map(|r| Some(r.t)).collect::<TimestampMicrosecondArray>().with_timezone("UTC")),
            false,
        ),
    ])
    .unwrap()
}

async fn run(engine: &Engine, plan: &Plan, service: &str, spine: Vec<RecordBatch>) -> Result<RecordBatch, EngineError> {
    let set = engine
        .training_set(TrainingSetRequest {
            service: plan.service(service).unwrap().clone(),
            spine_schema: spine[0].schema(),
            spine,
            statuses: true,
            visibility: None,
            order: super::Order::Spine,
        })
        .await?;
    let schema = set.schema.clone();
    let batches: Vec<RecordBatch> =
        set.stream.try_collect().await.map_err(|error| EngineError::Run(error.to_string()))?;
    Ok(arrow::compute::concat_batches(&schema, &batches).unwrap())
}

fn float(x: Option<f64>) -> Value {
    x.map_or(Value::Null, |x| Value::Float64(feature_defs::value::canonical_f64(x)))
}

fn times(record: &Record, clock: SourceClock) -> Option<Times> {
    let event_time = record.happened?;
    let created_time = record.created.filter(|_| clock.has_created_time);
    let known_time = clock.known(event_time, created_time);
    Some(Times { event_time, created_time, known_time, position: Position { time: known_time, sequence: 0 } })
}

/// What the reference says of one spine row: feature name, value, status.
fn expected(records: &[Record], row: &SpineRow) -> Vec<(&'static str, Value, Status)> {
    let created = SourceClock { has_created_time: true, ..SourceClock::default() };
    let delayed = SourceClock { delay: 10 * MINUTE, every: HOUR, ..SourceClock::default() };
    let mine = |record: &&Record| row.p.is_some() && row.q.is_some() && record.left == row.p && record.b == row.q;

    let rows: Vec<Row> = records
        .iter()
        .filter(mine)
        .filter(|record| record.n != Some(3))
        .filter_map(|record| {
            let deleted = record.gone == Some(true);
            let x = float(record.x);
            let twice = match x {
                Value::Float64(x) => float(Some(x * 2.0 + 0.5)),
                _ => Value::Null,
            };
            let values = vec![x, record.n.map_or(Value::Null, Value::Int64), twice];
            let values = if deleted { vec![Value::Null; 3] } else { values };
            Some(Row { times: times(record, created)?, deleted, values })
        })
        .collect();
    let max_age = MaxAge { ttl: Some(6 * HOUR), keep: 12 * HOUR };
    let answer = as_of(&rows, row.t, max_age, Visibility::Known);
    let mut expected = Vec::new();
    for (feature, name) in ["latest:x", "latest:n", "latest:twice"].into_iter().enumerate() {
        let default = (feature == 1).then_some(Value::Int64(-1));
        let (value, status) = feature_value(&answer, feature, default.as_ref());
        expected.push((name, value, status));
    }
    let rows: Vec<Row> = records
        .iter()
        .filter_map(|record| {
            Some(Row { times: times(record, delayed)?, deleted: false, values: vec![float(record.x)] })
        })
        .collect();
    let answer = as_of(&rows, row.t, MaxAge { ttl: None, keep: DAY }, Visibility::Known);
    let (value, status) = feature_value(&answer, 0, None);
    expected.push(("last_delayed:x", value, status));

    let events: Vec<WindowEvent> = records
        .iter()
        .filter(mine)
        .filter(|record| record.gone != Some(true))
        .filter_map(|record| {
            let x = float(record.x);
            let included = if record.n.is_some_and(|n| n > 2) { x.clone() } else { Value::Null };
            let inputs = vec![Value::Bool(true), x.clone(), included, x, record.n.map_or(Value::Null, Value::Int64)];
            Some(WindowEvent { times: times(record, created)?, inputs })
        })
        .collect();
    let aggregates = [
        (Function::Count, None),
        (Function::Sum, Some(Type::Float64)),
        (Function::Mean, Some(Type::Float64)),
        (Function::Min, Some(Type::Float64)),
        (Function::Max, Some(Type::Int64)),
    ]
    .map(|(function, input)| Aggregate::new(function, input).unwrap());
    let names: [(&str, usize, Micros); 9] = [
        ("load:rows_1h", 0, HOUR),
        ("load:rows_24h", 0, 24 * HOUR),
        ("load:total_1h", 1, HOUR),
        ("load:total_24h", 1, 24 * HOUR),
        ("load:mean_1h", 2, HOUR),
        ("load:mean_24h", 2, 24 * HOUR),
        ("load:low_1h", 3, HOUR),
        ("load:low_24h", 3, 24 * HOUR),
        ("load:high_24h", 4, 24 * HOUR),
    ];
    for (name, aggregate, length) in names {
        let window = Window { length, hop: Some(default_hop(length)), head: Head::Exclusive };
        let value = window_value(&events, aggregate, &aggregates[aggregate], &window, row.t, Visibility::Known);
        let status = if value.is_null() { Status::NullValue } else { Status::Present };
        let value = if value.is_null() && aggregate == 2 { Value::Float64(0.0) } else { value };
        expected.push((name, value, status));
    }
    expected
}

fn actual(output: &RecordBatch, name: &str, row: usize) -> (Value, Status) {
    let column = output.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"));
    let value = Value::from_array(column, row, &Type::from_arrow(column.data_type()).unwrap());
    let statuses = output.column_by_name(&format!("{name}__status")).unwrap();
    (value, Status::from_number(statuses.as_primitive::<UInt8Type>().value(row)).unwrap())
}

#[tokio::test]
async fn the_engine_agrees_with_the_reference() {
    let mut seen = std::collections::BTreeMap::<String, usize>::new();
    for seed in 0..6 {
        let mut random = SmallRng::seed_from_u64(seed);
        let records = records(&mut random, 400);
        let folder = tempfile::tempdir().unwrap();
        let cut = random.random_range(1..records.len());
        write_files(folder.path(), &[&records[..cut], &records[cut..]]);
        let engine = engine(folder.path(), 1 << 30);
        let plan = plan(&engine).await;
        let rows = spine(&mut random, &records, 300);
        let whole = spine_batch(&rows);
        let output =
            run(&engine, &plan, "all", vec![whole.slice(0, 100), whole.slice(100, whole.num_rows() - 100)]).await;
        let output = output.unwrap();
        assert_eq!(output.num_rows(), rows.len(), "nothing dropped, nothing doubled");
        let ordinals = output.column(0).as_primitive::<arrow::datatypes::Int64Type>();
        assert!(ordinals.values().iter().copied().eq(0..rows.len() as i64), "in the spine's order");
        for (i, row) in rows.iter().enumerate() {
            for (name, value, status) in expected(&records, row) {
                assert_eq!(actual(&output, name, i), (value, status), "seed {seed}, row {i}, {name}");
                *seen.entry(format!("{} {status}", name.split(':').next().unwrap_or(name))).or_default() += 1;
            }
        }
    }
    // The data held every case; a test in which nothing is ever missing would pass by luck.
    for case in ["latest PRESENT", "latest NULL_VALUE", "latest NOT_FOUND", "latest OUTSIDE_MAX_AGE", "load NULL_VALUE"]
    {
        assert!(seen.get(case).is_some_and(|count| *count > 50), "{case}: {seen:?}");
    }
}

#[tokio::test]
async fn shuffled_and_repartitioned_files_give_the_same_bits() {
    let mut random = SmallRng::seed_from_u64(99);
    let mut records = records(&mut random, 500);
    let rows = spine(&mut random, &records, 200);
    let mut outputs = Vec::new();
    for parts in [1, 3, 7] {
        let folder = tempfile::tempdir().unwrap();
        let size = records.len().div_ceil(parts);
        write_files(folder.path(), &records.chunks(size).collect::<Vec<_>>());
        let engine = engine(folder.path(), 1 << 30);
        let plan = plan(&engine).await;
        outputs.push(run(&engine, &plan, "all", vec![spine_batch(&rows)]).await.unwrap());
        for i in (1..records.len()).rev() {
            records.swap(i, random.random_range(0..=i));
        }
    }
    for other in &outputs[1..] {
        // Equality of arrays compares float bits here: values are canonical, so NaN is one pattern.
        for (a, b) in outputs[0].columns().iter().zip(other.columns()) {
            assert_eq!(a.to_data(), b.to_data());
        }
    }
}

#[tokio::test]
async fn composite_keys_and_aliases_do_not_meet() {
    let folder = tempfile::tempdir().unwrap();
    let record = |left, b, x| Record {
        left: Some(left),
        b: Some(b),
        happened: Some(T0),
        created: None,
        x: Some(x),
        n: None,
        gone: None,
    };
    write_files(folder.path(), &[&[record("1", "23", 123.0), record("12", "3", 1203.0)]]);
    let engine = engine(folder.path(), 1 << 30);
    let plan = plan(&engine).await;
    let rows = [
        SpineRow { p: Some("1"), q: Some("23"), t: T0 },
        SpineRow { p: Some("12"), q: Some("3"), t: T0 },
        SpineRow { p: Some("23"), q: Some("1"), t: T0 },
        SpineRow { p: Some("123"), q: Some(""), t: T0 },
    ];
    let output = run(&engine, &plan, "swapped", vec![spine_batch(&rows)]).await.unwrap();
    let found = |name| (0..rows.len()).map(|row| actual(&output, name, row).0).collect::<Vec<Value>>();
    let (a, b, none) = (Value::Float64(123.0), Value::Float64(1203.0), Value::Null);
    assert_eq!(found("forward:x"), [a.clone(), b, none.clone(), none.clone()]);
    assert_eq!(found("backward:x"), [none.clone(), none.clone(), a, none]);
}

#[tokio::test]
async fn wrong_spines_are_answered_well() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    let records = records(&mut random, 50);
    write_files(folder.path(), &[&records]);
    let engine = engine(folder.path(), 1 << 30);
    let plan = plan(&engine).await;
    let good = spine_batch(&spine(&mut random, &records, 5));
    let message = |batch: RecordBatch| {
        let (engine, plan) = (&engine, &plan);
        async move { run(engine, plan, "all", vec![batch]).await.unwrap_err().to_string() }
    };
    let without_key = good.project(&[0, 2, 3]).unwrap();
    assert_eq!(
        message(without_key).await,
        "the spine has no column `p` (a key of entity `pair`, which view `latest` is asked by); it has: row, q, event_timestamp"
    );
    let mut columns = good.columns().to_vec();
    columns[1] = Arc::new(Int64Array::from(vec![1; good.num_rows()]));
    let fields: Vec<_> = columns.iter().zip(["row", "p", "q", "event_timestamp"]).collect();
    let wrong_type = RecordBatch::try_from_iter(fields.into_iter().map(|(c, n)| (n, c.clone()))).unwrap();
    assert_eq!(
        message(wrong_type).await,
        "spine column `p` is Int64, but string was expected (a key of entity `pair`, which view `latest` is asked by)"
    );
    let mut columns = good.columns().to_vec();
    columns[3] = arrow::array::new_null_array(columns[3].data_type(), good.num_rows());
    let fields: Vec<_> = columns.iter().zip(["row", "p", "q", "event_timestamp"]).collect();
    let no_time =
        RecordBatch::try_from_iter_with_nullable(fields.into_iter().map(|(c, n)| (n, c.clone(), true))).unwrap();
    assert!(
        message(no_time).await.starts_with("spine column `event_timestamp` is null in 6 rows (the first is row 0)")
    );
}

#[tokio::test]
async fn a_bound_that_cannot_work_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    let records = records(&mut random, 2_000);
    write_files(folder.path(), &[&records]);
    let engine = engine(folder.path(), 10_000);
    let plan = plan(&engine).await;
    let error = run(&engine, &plan, "all", vec![spine_batch(&spine(&mut random, &records, 1_000))]).await.unwrap_err();
    assert!(error.to_string().contains("raise it in coeval.yaml"), "{error}");
}

#[tokio::test]
async fn an_empty_spine_gives_an_empty_answer() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    write_files(folder.path(), &[&records(&mut random, 20)]);
    let engine = engine(folder.path(), 1 << 30);
    let plan = plan(&engine).await;
    let output = run(&engine, &plan, "all", vec![spine_batch(&[])]).await.unwrap();
    assert_eq!(output.num_rows(), 0);
    let names: Vec<String> = output.schema().fields().iter().take(5).map(|field| field.name().clone()).collect();
    assert_eq!(names, ["row", "p", "q", "event_timestamp", "latest:x"]);
}

mod functions;
mod properties;
