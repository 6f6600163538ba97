//! Generated tables that shrink: the engine against the reference, cell by cell, and against itself however the same rows
//! lie in files. Sizes that decide how the engine divides its work are small under test (see the constants of
//! `windows`, `latest`, `files` and `exec`), so that a few dozen rows make several parts, buckets, tasks and batches.

use std::io::Write;

use arrow::array::{BinaryArray, TimestampNanosecondArray, UInt64Array};
use arrow::datatypes::Int64Type;
use feature_defs::catalog;
use feature_defs::plan::ViewPlanKind;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::point_in_time::{Order, SourceReport, position_columns};

/// What an entity's key is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Keys {
    /// Far apart.
    Integers,
    /// Close together.
    SmallIntegers,
    Text,
    Flags,
    Bytes,
    Pair,
    /// The entity without keys.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Clock {
    Plain,
    Created,
    CreatedEvery,
    DelayEvery,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Parquet,
    Csv,
    JsonLines,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Unit {
    Micros,
    Nanos,
    /// Microseconds of another zone.
    Zoned,
}

/// Keys by number: both parts for a pair, the first alone for any other.
type Key = (Option<u8>, Option<u8>);

#[derive(Debug, Clone)]
struct Given {
    key: Key,
    happened: Option<Micros>,
    created: Option<Micros>,
    x: Option<f64>,
    n: Option<i64>,
    gone: Option<bool>,
}

#[derive(Debug, Clone)]
struct Asked {
    key: Key,
    t: Micros,
}

#[derive(Debug, Clone)]
struct Case {
    keys: Keys,
    clock: Clock,
    rule: catalog::Visibility,
    given: Vec<Given>,
    asked: Vec<Asked>,
}

/// How the rows of a case lie in files, and how its spine comes.
#[derive(Debug, Clone)]
struct Layout {
    format: Format,
    unit: Unit,
    spine_unit: Unit,
    file_rows: usize,
    group_rows: usize,
    spine_rows: usize,
    order: Order,
}

/// Around 1970, on a grid that makes ties and meets the bounds of windows, or just beside it.
fn time() -> impl Strategy<Value = Micros> {
    (-30..30i64, prop_oneof![4 => Just(0), 1 => -1..=1i64, 1 => -HOUR..HOUR])
        .prop_map(|(step, beside)| step * 30 * MINUTE + beside)
}

fn key(from: u8) -> impl Strategy<Value = Key> {
    (weighted(0.93, from..from + 4), weighted(0.93, 0..2u8))
}

fn given() -> impl Strategy<Value = Given> {
    let happened = weighted(0.96, time());
    let created = prop_oneof![
        1 => Just(None),
        2 => time().prop_map(Some),
    ];
    let special = vec![0.0, -0.0, f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300, 5e-324];
    let x = weighted(0.9, prop_oneof![2 => (-40..40i32).prop_map(|i| f64::from(i) / 7.0), 1 => select(special)]);
    let n = weighted(0.8, prop_oneof![8 => 0..5i64, 1 => Just(i64::MAX)]);
    let gone = prop_oneof![6 => Just(Some(false)), 1 => Just(Some(true)), 1 => Just(None)];
    (key(0), happened, created, x, n, gone).prop_map(|(key, happened, created, x, n, gone)| Given {
        key,
        happened,
        created,
        x,
        n,
        gone,
    })
}

fn case() -> impl Strategy<Value = Case> {
    use Keys::*;
    let keys = select(vec![Integers, SmallIntegers, Text, Flags, Bytes, Pair, None]);
    let clock = select(vec![Clock::Plain, Clock::Created, Clock::CreatedEvery, Clock::DelayEvery]);
    let rule = select(vec![catalog::Visibility::Known, catalog::Visibility::EventTime, catalog::Visibility::Ingested]);
    let asked = (key(1), time()).prop_map(|(key, t)| Asked { key, t });
    (keys, clock, rule, vec(given(), 0..70), vec(asked, 0..50)).prop_map(|(keys, clock, rule, given, asked)| Case {
        keys,
        clock,
        rule,
        given,
        asked,
    })
}

fn layout() -> impl Strategy<Value = Layout> {
    (
        prop_oneof![3 => Just(Format::Parquet), 1 => Just(Format::Csv), 1 => Just(Format::JsonLines)],
        select(vec![Unit::Micros, Unit::Nanos, Unit::Zoned]),
        select(vec![Unit::Micros, Unit::Nanos, Unit::Zoned]),
        select(vec![9, 40, 1_000]),
        select(vec![1, 7, 1_000]),
        select(vec![1, 16, 1_000]),
        select(vec![Order::Spine, Order::Any]),
    )
        .prop_map(|(format, unit, spine_unit, file_rows, group_rows, spine_rows, order)| Layout {
            format,
            unit,
            spine_unit,
            file_rows,
            group_rows,
            spine_rows,
            order,
        })
}

impl Layout {
    fn plain() -> Layout {
        Layout {
            format: Format::Parquet,
            unit: Unit::Micros,
            spine_unit: Unit::Micros,
            file_rows: 1_000,
            group_rows: 1_000,
            spine_rows: 1_000,
            order: Order::Spine,
        }
    }
}

impl Case {
    /// The case as this format can say it: text has no bytes, and JSON no number that is none.
    fn in_format(mut self, layout: &mut Layout) -> Case {
        if self.given.is_empty() {
            layout.format = Format::Parquet;
        }
        if layout.format != Format::Parquet {
            if self.keys == Keys::Bytes {
                self.keys = Keys::Text;
            }
            for given in &mut self.given {
                given.x = given.x.filter(|x| x.is_finite());
            }
        }
        self
    }

    fn source_clock(&self) -> SourceClock {
        let (has_created_time, delay, every) = match self.clock {
            Clock::Plain => (false, 0, 0),
            Clock::Created => (true, 0, 0),
            Clock::CreatedEvery => (true, 0, HOUR),
            Clock::DelayEvery => (false, 70 * MINUTE, HOUR),
        };
        SourceClock { has_created_time, delay, every }
    }

    fn times(&self, given: &Given) -> Option<Times> {
        let clock = self.source_clock();
        let event_time = given.happened?;
        let created_time = given.created.filter(|_| clock.has_created_time);
        let known_time = clock.known(event_time, created_time);
        let position = Position { time: known_time.max(event_time), sequence: 0 };
        Some(Times { event_time, created_time, known_time, position })
    }

    fn same(&self, given: Key, asked: Key) -> bool {
        match self.keys {
            Keys::None => true,
            Keys::Pair => given.0.is_some() && given.1.is_some() && given == asked,
            Keys::Flags => given.0.is_some() && given.0.map(|k| k % 2) == asked.0.map(|k| k % 2),
            _ => given.0.is_some() && given.0 == asked.0,
        }
    }

    /// Name, type and column of each key.
    fn key_columns(&self, keys: &[Key]) -> Vec<(&'static str, &'static str, ArrayRef)> {
        let first = || keys.iter().map(|key| key.0.map(usize::from));
        let text = || first().map(|k| k.map(|k| ["a", "ab", "b", "B", "\u{e9}t\u{e9}"][k])).collect::<StringArray>();
        let integers = |values: [i64; 5]| first().map(|k| k.map(|k| values[k])).collect::<Int64Array>();
        match self.keys {
            Keys::Integers => vec![("k", "int64", Arc::new(integers([i64::MIN, -1, 0, 7, i64::MAX])))],
            Keys::SmallIntegers => vec![("k", "int64", Arc::new(integers([-2, -1, 0, 1, 2])))],
            Keys::Text => vec![("k", "string", Arc::new(text()))],
            Keys::Flags => {
                vec![("k", "bool", Arc::new(first().map(|k| k.map(|k| k % 2 == 1)).collect::<BooleanArray>()))]
            }
            Keys::Bytes => {
                let bytes: [&[u8]; 5] = [b"", b"\0", b"\0\0", b"\xff", b"a"];
                vec![("k", "binary", Arc::new(first().map(|k| k.map(|k| bytes[k])).collect::<BinaryArray>()))]
            }
            Keys::Pair => {
                let second = keys.iter().map(|key| key.1.map(i64::from)).collect::<Int64Array>();
                vec![("k", "string", Arc::new(text())), ("l", "int64", Arc::new(second))]
            }
            Keys::None => Vec::new(),
        }
    }

    fn definitions(&self, format: Format) -> String {
        let keys = self.key_columns(&[]);
        let fields: Vec<String> = keys.iter().map(|(name, t, _)| format!("{{name: {name}, type: {t}}}")).collect();
        let extension = match format {
            Format::Parquet => "parquet",
            Format::Csv => "csv",
            Format::JsonLines => "jsonl",
        };
        let clock = match self.clock {
            Clock::Plain => "",
            Clock::Created => "    created_time: created\n",
            Clock::CreatedEvery => "    created_time: created\n    every: 1h\n",
            Clock::DelayEvery => "    delay: 70m\n    every: 1h\n",
        };
        let fields = fields.join(", ");
        let comma = if fields.is_empty() { "" } else { ", " };
        let aggregates = r#"
    aggregates:
      - {name: rows, function: count}
      - {name: some, function: count, where: "n > 1"}
      - {name: values, function: count, of: x}
      - {name: total, function: sum, of: x}
      - {name: amount, function: sum, of: n}
      - {name: middle, function: mean, of: x, where: "n > 1"}
      - {name: low, function: min, of: x}
      - {name: high, function: max, of: n}
      - {name: spread, function: variance, of: x}
      - {name: closing, function: last, of: x}
      - {name: opening, function: first, of: n}
      - {name: kinds, function: distinct_count, of: n}
"#;
        format!(
            r#"
entities:
  - {{name: e, keys: [{fields}]}}
sources:
  - name: events
    files: events/*.{extension}
    event_time: happened
    deleted: gone
    schema: [{fields}{comma}{{name: happened, type: timestamp}}, {{name: created, type: timestamp}}, {{name: x, type: float64}}, {{name: n, type: int64}}, {{name: gone, type: bool}}]
{clock}
feature_views:
  - name: latest
    entity: e
    source: events
    where: "n IS NULL OR n <> 3"
    ttl: 3h
    keep: 4h
    features:
      - {{name: x, type: float64}}
      - {{name: n, type: int64, default: -1}}
      - {{name: twice, expr: "x * 2 + 0.5"}}
  - name: grid
    entity: e
    source: events
    windows: [1h, 12h]{aggregates}
  - name: exact
    entity: e
    source: events
    hop: none
    head: inclusive
    windows: [1h, 12h]{aggregates}
feature_services:
  - {{name: all, features: [{{view: latest}}, {{view: grid}}, {{view: exact}}]}}
"#
        )
    }

    fn plan(&self, format: Format) -> Plan {
        let files = Files::new(vec![SourceFile { path: "all.yaml".into(), text: self.definitions(format) }]);
        let key_types = self
            .key_columns(&[])
            .into_iter()
            .map(|(name, _, array)| (name.to_owned(), Type::from_arrow(array.data_type()).unwrap()));
        let mut columns: Vec<(String, Type)> = key_types.collect();
        columns.extend(
            [
                ("happened", Type::Timestamp),
                ("created", Type::Timestamp),
                ("x", Type::Float64),
                ("n", Type::Int64),
                ("gone", Type::Bool),
            ]
            .map(|(name, t)| (name.to_owned(), t)),
        );
        compile_definitions("test", &files, &SourceSchemas::from([("events".into(), columns)]))
            .unwrap_or_else(|wrong| panic!("{}", feature_defs::diagnose::render(&wrong, &files, false)))
    }

    fn source_batch(&self, unit: Unit) -> RecordBatch {
        let keys: Vec<Key> = self.given.iter().map(|given| given.key).collect();
        let times = |get: fn(&Given) -> Option<Micros>| {
            let times: Vec<Option<Micros>> = self.given.iter().map(get).collect();
            // Rows of sources may have nanoseconds, which go towards the past.
            time_column(&times, unit, 999)
        };
        let columns = self.key_columns(&keys).into_iter().map(|(name, _, array)| (name, array)).chain([
            ("happened", times(|given| given.happened)),
            ("created", times(|given| given.created)),
            ("x", Arc::new(self.given.iter().map(|given| given.x).collect::<Float64Array>()) as ArrayRef),
            ("n", Arc::new(self.given.iter().map(|given| given.n).collect::<Int64Array>())),
            ("gone", Arc::new(self.given.iter().map(|given| given.gone).collect::<BooleanArray>())),
        ]);
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true))).unwrap()
    }

    fn write(&self, folder: &std::path::Path, layout: &Layout) {
        std::fs::create_dir_all(folder.join("events")).unwrap();
        let batch = self.source_batch(layout.unit);
        for (i, start) in (0..batch.num_rows().max(1)).step_by(layout.file_rows).enumerate() {
            let part = batch.slice(start, layout.file_rows.min(batch.num_rows() - start));
            let path = |extension: &str| folder.join(format!("events/part-{i}.{extension}"));
            match layout.format {
                Format::Parquet => {
                    // Several pages in a row group, too.
                    let properties = WriterProperties::builder()
                        .set_max_row_group_row_count(Some(layout.group_rows))
                        .set_data_page_row_count_limit(3)
                        .set_write_batch_size(3)
                        .build();
                    let file = std::fs::File::create(path("parquet")).unwrap();
                    let mut writer = ArrowWriter::try_new(file, part.schema(), Some(properties)).unwrap();
                    writer.write(&part).unwrap();
                    writer.close().unwrap();
                }
                Format::Csv => {
                    let file = std::fs::File::create(path("csv")).unwrap();
                    arrow::csv::WriterBuilder::new().with_header(true).build(file).write(&part).unwrap();
                }
                Format::JsonLines => {
                    let mut file = std::fs::File::create(path("jsonl")).unwrap();
                    let mut writer = arrow::json::LineDelimitedWriter::new(&mut file);
                    writer.write(&part).unwrap();
                    writer.finish().unwrap();
                    file.flush().unwrap();
                }
            }
        }
    }

    /// The spine, each row with its number.
    fn spine(&self, unit: Unit) -> RecordBatch {
        let keys: Vec<Key> = self.asked.iter().map(|asked| asked.key).collect();
        let times: Vec<Option<Micros>> = self.asked.iter().map(|asked| Some(asked.t)).collect();
        let numbers = Arc::new((0..self.asked.len() as i64).collect::<Int64Array>()) as ArrayRef;
        let keys = self.key_columns(&keys).into_iter().map(|(name, _, array)| (name, array));
        let columns =
            [("row", numbers)].into_iter().chain(keys).chain([("event_timestamp", time_column(&times, unit, 0))]);
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true))).unwrap()
    }

    fn visibility(&self) -> Visibility {
        match self.rule {
            catalog::Visibility::Known => Visibility::Known,
            catalog::Visibility::EventTime => Visibility::EventTime,
            catalog::Visibility::Ingested => Visibility::Ingested,
        }
    }

    /// What the reference says of one spine row: feature, value, status.
    fn expected(&self, plan: &Plan, asked: &Asked) -> Vec<(String, Value, Status)> {
        let mut expected = Vec::new();
        let mine: Vec<(&Given, Times)> = self
            .given
            .iter()
            .filter(|given| self.same(given.key, asked.key))
            .filter_map(|given| Some((given, self.times(given)?)))
            .collect();
        let n = |given: &Given| given.n.map_or(Value::Null, Value::Int64);
        let rows: Vec<Row> = mine
            .iter()
            .filter(|(given, _)| given.n != Some(3))
            .map(|(given, times)| {
                let deleted = given.gone == Some(true);
                let x = float(given.x);
                let twice = match x {
                    Value::Float64(x) => float(Some(x * 2.0 + 0.5)),
                    _ => Value::Null,
                };
                let values = if deleted { vec![Value::Null; 3] } else { vec![x, n(given), twice] };
                Row { times: *times, deleted, values }
            })
            .collect();
        let max_age = MaxAge { ttl: Some(3 * HOUR), keep: 4 * HOUR };
        let answer = as_of(&rows, asked.t, max_age, self.visibility());
        for (feature, name) in ["latest:x", "latest:n", "latest:twice"].into_iter().enumerate() {
            let default = (feature == 1).then_some(Value::Int64(-1));
            let (value, status) = feature_value(&answer, feature, default.as_ref());
            expected.push((name.to_owned(), value, status));
        }
        let events: Vec<WindowEvent> = mine
            .iter()
            .filter(|(given, _)| given.gone != Some(true))
            .map(|(given, times)| {
                let (x, many) = (float(given.x), given.n.is_some_and(|n| n > 1));
                let inputs = vec![
                    Value::Bool(true),
                    if many { Value::Bool(true) } else { Value::Null },
                    x.clone(),
                    x.clone(),
                    n(given),
                    if many { x.clone() } else { Value::Null },
                    x.clone(),
                    n(given),
                    x.clone(),
                    x,
                    n(given),
                    n(given),
                ];
                WindowEvent { times: *times, inputs }
            })
            .collect();
        for view in ["grid", "exact"] {
            let ViewPlanKind::Windowed { aggregates, outputs, .. } = &plan.view(view).unwrap().kind else {
                panic!("windows")
            };
            for output in outputs {
                let aggregate = &aggregates[output.aggregate].aggregate;
                let value =
                    window_value(&events, output.aggregate, aggregate, &output.window, asked.t, self.visibility());
                let status = if value.is_null() { Status::NullValue } else { Status::Present };
                expected.push((format!("{view}:{}", output.name), value, status));
            }
        }
        expected
    }

    /// What the known-at rule hid, row by row, for each of the three inputs.
    fn expected_report(&self) -> SourceReport {
        let enforced = self.rule != catalog::Visibility::EventTime;
        let mut report = SourceReport { source: "events".into(), enforced, ..SourceReport::default() };
        let clock = self.source_clock();
        for given in &self.given {
            let Some(times) = self.times(given) else { continue };
            for windowed in [false, true, true] {
                let counts = if windowed { given.gone != Some(true) } else { given.n != Some(3) };
                let waiting = self.asked.iter().filter(|asked| {
                    let happened = if windowed { asked.t > times.event_time } else { asked.t >= times.event_time };
                    self.same(given.key, asked.key) && happened && asked.t < times.known_time
                });
                let Some(last) = waiting.map(|asked| asked.t).max().filter(|_| counts) else { continue };
                report.hidden += 1;
                let without_grid = SourceClock { every: 0, ..clock };
                if clock.every > 0 && last >= without_grid.known(times.event_time, times.created_time) {
                    report.hidden_by_every += 1;
                } else if clock.has_created_time {
                    report.hidden_by_created_time += 1;
                } else {
                    report.hidden_by_delay += 1;
                }
            }
        }
        report
    }
}

fn time_column(times: &[Option<Micros>], unit: Unit, odd_nanos: i64) -> ArrayRef {
    let micros = times.iter().copied().collect::<TimestampMicrosecondArray>();
    match unit {
        Unit::Micros => Arc::new(micros.with_timezone("UTC")),
        Unit::Zoned => Arc::new(micros.with_timezone("+02:00")),
        Unit::Nanos => Arc::new(
            times
                .iter()
                .enumerate()
                .map(|(row, t)| t.map(|t| t * 1_000 + if row % 2 == 1 { odd_nanos } else { 0 }))
                .collect::<TimestampNanosecondArray>()
                .with_timezone("UTC"),
        ),
    }
}

struct Found {
    rows: RecordBatch,
    batches: usize,
    reports: Vec<SourceReport>,
}

async fn ask(
    engine: &Engine,
    plan: &Plan,
    spine: RecordBatch,
    (spine_rows, order, rule): (usize, Order, Option<catalog::Visibility>),
) -> Result<Found, EngineError> {
    let starts = (0..spine.num_rows()).step_by(spine_rows);
    let spine_batches =
        starts.map(|start| spine.slice(start, spine_rows.min(spine.num_rows() - start))).collect::<Vec<_>>();
    let set = engine
        .training_set(TrainingSetRequest {
            service: plan.service("all").unwrap().clone(),
            spine_schema: spine.schema(),
            spine: spine_batches,
            statuses: true,
            visibility: rule,
            order,
        })
        .await?;
    let (schema, report) = (set.schema.clone(), set.report.clone());
    let batches: Vec<RecordBatch> =
        set.stream.try_collect().await.map_err(|error| EngineError::Run(error.to_string()))?;
    let rows = arrow::compute::concat_batches(&schema, &batches).unwrap();
    Ok(Found { rows, batches: batches.len(), reports: report.get().cloned().unwrap_or_default() })
}

/// The rows by their numbers in the spine.
fn by_number(rows: &RecordBatch) -> RecordBatch {
    let order = arrow::compute::sort_to_indices(rows.column_by_name("row").unwrap(), None, None).unwrap();
    arrow::compute::take_record_batch(rows, &order).unwrap()
}

fn numbers(rows: &RecordBatch) -> Vec<i64> {
    rows.column_by_name("row").unwrap().as_primitive::<Int64Type>().values().to_vec()
}

async fn answer(case: &Case, layout: &Layout) -> (Plan, Found) {
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), layout);
    let engine = engine(folder.path(), 1 << 30);
    let plan = case.plan(layout.format);
    let how = (layout.spine_rows, layout.order, Some(case.rule));
    let mut found = ask(&engine, &plan, case.spine(layout.spine_unit), how).await.unwrap();
    let numbered = by_number(&found.rows);
    assert!(numbers(&numbered).into_iter().eq(0..case.asked.len() as i64), "nothing dropped, nothing doubled");
    if layout.order == Order::Spine {
        assert_eq!(numbers(&found.rows), numbers(&numbered), "in the spine's order");
    }
    found.rows = numbered;
    (plan, found)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2_000, ..ProptestConfig::default() }
}

#[test]
fn generated_tables_agree_with_the_reference() {
    let runtime = runtime();
    proptest!(config(160), |(case in case(), layout in layout())| {
        let mut layout = layout;
        let case = case.in_format(&mut layout);
        let (plan, found) = runtime.block_on(answer(&case, &layout));
        for (i, asked) in case.asked.iter().enumerate() {
            for (name, value, status) in case.expected(&plan, asked) {
                prop_assert_eq!(actual(&found.rows, &name, i), (value, status), "row {} {}", i, name);
            }
        }
        let mut expected = case.expected_report();
        // Row groups that cannot matter are not read.
        let read = found.reports[0].rows;
        prop_assert!(read <= case.given.len() as u64, "{} rows read", read);
        expected.rows = read;
        prop_assert_eq!(&found.reports, &vec![expected]);
    });
}

#[test]
fn neither_order_nor_layout_matters() {
    let runtime = runtime();
    let shuffled = (case(), layout()).prop_flat_map(|(case, layout)| {
        let given = Just(case.given.clone()).prop_shuffle();
        let asked = Just((0..case.asked.len()).collect::<Vec<usize>>()).prop_shuffle();
        (Just(case), Just(layout), given, asked)
    });
    proptest!(config(80), |((case, layout, given, order) in shuffled)| {
        let mut layout = layout;
        let case = case.in_format(&mut layout);
        let given = given.into_iter();
        let given: Vec<Given> = match layout.format {
            Format::Parquet => given.collect(),
            _ => given.map(|given| Given { x: given.x.filter(|x| x.is_finite()), ..given }).collect(),
        };
        let asked = order.iter().map(|i| case.asked[*i].clone()).collect();
        let other = Case { given, asked, ..case.clone() };
        let (_, one) = runtime.block_on(answer(&case, &Layout::plain()));
        let (_, two) = runtime.block_on(answer(&other, &layout));
        let places = UInt64Array::from(order.iter().map(|i| *i as u64).collect::<Vec<_>>());
        for field in one.rows.schema().fields().iter().filter(|field| field.name().contains(':')) {
            let one = one.rows.column_by_name(field.name()).unwrap();
            let one = arrow::compute::take(one, &places, None).unwrap();
            // Floats are canonical, so equal data are equal bits.
            prop_assert_eq!(one.to_data(), two.rows.column_by_name(field.name()).unwrap().to_data(), "{}", field.name());
        }
        let sum = |found: &Found| SourceReport { rows: 0, ..found.reports[0].clone() };
        prop_assert_eq!(sum(&one), sum(&two));
    });
}

/// A reader that has applied everything sees what everybody sees, found by other means.
#[test]
fn row_by_row_finds_the_same() {
    let runtime = runtime();
    proptest!(config(60), |(case in case())| {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout { file_rows: 20, group_rows: 7, ..Layout::plain() };
        case.write(folder.path(), &layout);
        let engine = engine(folder.path(), 1 << 30);
        let plan = case.plan(Format::Parquet);
        let spine = case.spine(Unit::Micros);
        let mut columns: Vec<(String, ArrayRef)> =
            spine.schema().fields().iter().zip(spine.columns()).map(|(f, c)| (f.name().clone(), c.clone())).collect();
        for view in ["latest", "grid", "exact"] {
            let (time, sequence) = position_columns(view);
            columns.push((time, Arc::new(Int64Array::from(vec![i64::MAX; case.asked.len()]))));
            columns.push((sequence, Arc::new(UInt64Array::from(vec![u64::MAX; case.asked.len()]))));
        }
        let known = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
        let how = (1_000, Order::Spine, Some(case.rule));
        let one = runtime.block_on(ask(&engine, &plan, spine, how)).unwrap();
        let two = runtime.block_on(ask(&engine, &plan, known, how)).unwrap();
        prop_assert_eq!(one.rows, two.rows);
    });
}

mod limits;
