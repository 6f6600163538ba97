use arrow::array::{BooleanArray, UInt32Array};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions};
use object_store::memory::InMemory;

use super::join::Index;
use super::report::{Asked, Report, report, served};
use super::*;
use crate::serving_log::{FileName, Header, LogSchema, Place};

const HOUR: Micros = 3_600_000_000;
const DAY: Micros = 24 * HOUR;

const DEFINITIONS: &str = r#"
entities:
  - {name: plane, keys: [{name: plane, type: string}]}
sources:
  - {name: states, files: states.parquet, event_time: at}
feature_views:
  - {name: state, entity: plane, source: states, features: [{name: age, type: float64}]}
requests:
  - {name: flight, fields: [{name: to, type: string}]}
feature_services:
  - {name: inputs, features: ["state:age", "flight:to"]}
models:
  - name: delay
    features: inputs
    runtime: torchscript
    inputs: [{name: x, dtype: float32, features: ["state:age"], missing: 0.0}]
    outputs: [{name: p, dtype: float32}]
    decision: "p > 0.5"
    label: {name: late, type: bool, within: 24h}
"#;

fn plan() -> Plan {
    let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text: DEFINITIONS.into() }]);
    let columns = [("plane", Type::String), ("at", Type::Timestamp), ("age", Type::Float64)];
    let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
    compile_definitions("p", &files, &SourceSchemas::from([("states".to_string(), columns)])).unwrap()
}

/// A prediction: request, plane, destination, time, score, version, why it was logged.
type Prediction<'a> = (&'a str, &'a str, &'a str, Micros, f32, u32, &'a str);

struct World {
    store: Arc<dyn ObjectStore>,
    project: Path,
    plan: Plan,
}

impl World {
    fn new() -> World {
        World { store: Arc::new(InMemory::new()), project: Path::from("root/p"), plan: plan() }
    }

    fn model(&self) -> &ModelPlan {
        self.plan.model("delay").unwrap()
    }

    async fn log(&self, predictions: &[Prediction<'_>]) {
        let outputs = [("p".to_owned(), Type::Float32)];
        let schema = LogSchema::of(&self.model().service, &outputs);
        let rows = predictions.len();
        let texts = |of: fn(&Prediction<'_>) -> String| {
            Arc::new(StringArray::from_iter_values(predictions.iter().map(of))) as ArrayRef
        };
        let times = || {
            let times = predictions.iter().map(|row| Some(row.3)).collect::<TimestampMicrosecondArray>();
            Arc::new(times.with_timezone("UTC")) as ArrayRef
        };
        let columns = schema.schema.fields().iter().map(|field| -> ArrayRef {
            match field.name().as_str() {
                "request_id" => texts(|row| row.0.into()),
                "in:plane" => {
                    let planes = predictions.iter().map(|row| (!row.1.is_empty()).then_some(row.1));
                    Arc::new(planes.collect::<StringArray>())
                }
                "in:to" => texts(|row| row.2.into()),
                "sampled" => texts(|row| row.6.into()),
                "status" => texts(|_| "ok".into()),
                "arm" => texts(|_| "champion".into()),
                "time" | "at" => times(),
                "version" => Arc::new(predictions.iter().map(|row| Some(row.5)).collect::<UInt32Array>()),
                "output:p" => {
                    Arc::new(predictions.iter().map(|row| Some(row.4)).collect::<arrow::array::Float32Array>())
                }
                _ if field.is_nullable() => arrow::array::new_null_array(field.data_type(), rows),
                _ => {
                    let nulls = arrow::array::new_null_array(field.data_type(), rows).to_data();
                    let mut data = nulls.into_builder().nulls(None);
                    if *field.data_type() == DataType::Utf8 {
                        data = StringArray::from(vec![""; rows]).to_data().into_builder();
                    }
                    arrow::array::make_array(data.build().unwrap())
                }
            }
        });
        let batch = RecordBatch::try_new(schema.schema.clone(), columns.collect()).unwrap();
        let (first_at, last_at) = (predictions[0].3, predictions[rows - 1].3);
        let header = Header {
            format: 1,
            project: "p".into(),
            gateway: String::new(),
            incarnation: "abc".into(),
            service: "inputs".into(),
            semantic_digest: self.model().service.semantic_digest.to_string(),
            model: Some("delay".into()),
            hashed: Vec::new(),
            first_at,
            last_at,
            first_time: first_at,
            last_time: last_at,
            rows: rows as u64,
        };
        let mut bytes = Vec::new();
        serving_log::encode(&header, &schema.schema, &[batch], &mut bytes).unwrap();
        let name = FileName { first_at, last_at, incarnation: "abc".into(), number: first_at as u64 };
        let path = Place::of("inputs", first_at).folder(&self.project).join(name.to_string());
        self.store.put(&path, bytes.into()).await.unwrap();
    }

    async fn label(&self, columns: Vec<(&str, ArrayRef)>, added: Micros) {
        let labels = self.labels(columns, added).unwrap();
        add(&self.store, &self.project, self.model(), &labels, added).await.unwrap();
    }

    fn labels(&self, columns: Vec<(&str, ArrayRef)>, added: Micros) -> Result<Labels, LabelError> {
        Labels::of(self.model(), None, &RecordBatch::try_from_iter(columns).unwrap(), added, b"key")
    }

    async fn report(&self, to: Micros, every: Micros) -> Report {
        let asked = Asked { from: 0, to, every, output: None, now: to };
        report(&self.store, &self.project, self.model(), &asked).await.unwrap()
    }
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn truths(values: &[Option<bool>]) -> ArrayRef {
    Arc::new(BooleanArray::from(values.to_vec()))
}

fn times(values: &[Micros]) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from(values.to_vec()).with_timezone("UTC"))
}

#[tokio::test]
async fn labels_by_request_are_joined_and_corrected() {
    let world = World::new();
    let log = [("a", "N1", "JFK", HOUR, 0.9, 1, "key"), ("b", "N2", "JFK", 2 * HOUR, 0.2, 1, "key")];
    world.log(&log).await;
    world.label(vec![("request_id", texts(&["a", "b"])), ("late", truths(&[Some(false), Some(false)]))], DAY).await;
    // Later: it was late after all. A label that was added before the correction and arrives after it does not undo it.
    world.label(vec![("request_id", texts(&["a"])), ("late", truths(&[Some(true)]))], DAY + 2).await;
    world.label(vec![("request_id", texts(&["a"])), ("late", truths(&[Some(false)]))], DAY + 1).await;
    let found = world.report(DAY, DAY).await;
    let quality = &found.parts[0].quality;
    assert_eq!((quality.rows, quality.labelled), (2, 2));
    let classes = quality.classes.as_ref().unwrap();
    assert_eq!((classes.positives, classes.auc), (1, Some(1.0)));
    // Taken back: not known any more.
    world.label(vec![("request_id", texts(&["a"])), ("late", truths(&[None]))], DAY + 3).await;
    assert_eq!(world.report(DAY, DAY).await.parts[0].quality.labelled, 1);
}

#[tokio::test]
async fn labels_by_entity_and_time_belong_to_what_was_predicted_within_the_time_before() {
    let world = World::new();
    let log = [
        ("a", "N1", "JFK", HOUR, 0.9, 1, "key"),
        ("b", "N1", "JFK", 3 * HOUR, 0.8, 1, "key"),
        ("c", "N1", "LGA", 4 * HOUR, 0.7, 1, "key"),
        ("d", "N1", "JFK", 40 * HOUR, 0.6, 1, "key"),
    ];
    world.log(&log).await;
    let label = vec![
        ("plane", texts(&["N1", "N1"])),
        ("to", texts(&["JFK", "JFK"])),
        ("time", times(&[2 * HOUR, 5 * HOUR])),
        ("late", truths(&[Some(true), Some(false)])),
    ];
    world.label(label, DAY).await;
    let labels = read(&world.store, &world.project, world.model()).await.unwrap();
    let index = Index::new(world.model(), &labels, "late").unwrap();
    let files = serving_log::files(&world.store, &world.project, "inputs", 0, 100 * HOUR).await.unwrap();
    let rows = serving_log::read(&world.store, &files[0]).await.unwrap().unwrap();
    let batch = &rows.batch;
    let ids = batch.column_by_name("request_id").unwrap().as_string::<i32>();
    let numbers = batch.column_by_name("row").unwrap().as_primitive::<UInt32Type>();
    let at: Vec<Micros> = log.iter().map(|row| row.3).collect();
    let found = index.labels_of(world.model(), batch, (ids, numbers), &at, Some(24 * HOUR));
    // What happened next: to the first at 2 h, to the second at 5 h; another destination has none, and the last is too late.
    assert_eq!(found, [Some(1.0), Some(0.0), None, None]);
    // The plane alone names all its predictions.
    let label = vec![("plane", texts(&["N1"])), ("time", times(&[41 * HOUR])), ("late", truths(&[Some(true)]))];
    world.label(label, DAY).await;
    let labels = read(&world.store, &world.project, world.model()).await.unwrap();
    let index = Index::new(world.model(), &labels, "late").unwrap();
    let found = index.labels_of(world.model(), batch, (ids, numbers), &at, Some(24 * HOUR));
    assert_eq!(found, [Some(1.0), Some(0.0), None, Some(1.0)]);
}

#[tokio::test]
async fn reports_are_by_version_and_stretch_of_time_over_the_sample() {
    let world = World::new();
    world
        .log(&[
            ("a", "N1", "JFK", HOUR, 0.9, 1, "key"),
            ("b", "N2", "JFK", HOUR, 0.1, 2, "key"),
            // Logged because something failed: would make everything look worse.
            ("c", "N3", "JFK", HOUR, 0.0, 1, "fallback"),
            ("d", "N1", "JFK", 30 * HOUR, 0.4, 1, "key"),
        ])
        .await;
    world.label(vec![("request_id", texts(&["a", "b"])), ("late", truths(&[Some(true), Some(false)]))], DAY).await;
    let revenue = RecordBatch::try_from_iter([
        ("request_id", texts(&["a", "d"])),
        ("revenue", Arc::new(Float64Array::from(vec![10.0, 30.0])) as ArrayRef),
    ]);
    let revenue = Labels::of(world.model(), Some("revenue"), &revenue.unwrap(), DAY, b"key").unwrap();
    add(&world.store, &world.project, world.model(), &revenue, DAY).await.unwrap();
    let found = world.report(2 * DAY, DAY).await;
    let parts: Vec<(u32, Micros, u64, u64, u64)> = found
        .parts
        .iter()
        .map(|part| (part.version, part.from, part.quality.rows, part.quality.labelled, part.quality.open))
        .collect();
    assert_eq!(parts, [(1, 0, 1, 1, 0), (1, DAY, 1, 0, 1), (2, 0, 1, 1, 0)]);
    assert_eq!(found.parts[0].quality.metrics["revenue"].mean, 10.0);
    assert_eq!(found.parts[1].quality.metrics["revenue"].sum, 30.0);
    let shown = &found.parts[0].quality.shown["plane"];
    assert_eq!((shown.asked, shown.shown), (1, 1));
    // Version 2 decided for nobody.
    assert_eq!(found.parts[2].quality.shown["plane"].coverage, 0.0);
}

#[tokio::test]
async fn a_row_without_a_key_counts_and_names_nobody() {
    let world = World::new();
    world.log(&[("a", "", "JFK", HOUR, 0.9, 1, "key"), ("b", "N1", "JFK", HOUR, 0.9, 1, "key")]).await;
    world.label(vec![("plane", texts(&["N1"])), ("time", times(&[HOUR])), ("late", truths(&[Some(true)]))], DAY).await;
    let found = world.report(DAY, DAY).await;
    let quality = &found.parts[0].quality;
    assert_eq!((quality.rows, quality.labelled, quality.shown["plane"].asked), (2, 1, 1));
}

#[tokio::test]
async fn served_rows_are_a_spine_with_labels() {
    let world = World::new();
    world.log(&[("a", "N1", "JFK", HOUR, 0.9, 1, "key"), ("b", "N2", "LGA", 2 * HOUR, 0.1, 2, "uniform")]).await;
    world.label(vec![("request_id", texts(&["a"])), ("late", truths(&[Some(true)]))], DAY).await;
    let mut found = Vec::new();
    let rows = served(&world.store, &world.project, world.model(), (0, DAY), |batch| {
        found.push(batch);
        Ok(())
    });
    assert_eq!(rows.await.unwrap(), 2);
    let schema = found[0].schema();
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    assert_eq!(names[..4], ["event_timestamp", "plane", "to", "late"]);
    let late = found[0].column_by_name("late").unwrap().as_boolean();
    assert_eq!((late.value(0), late.is_null(1)), (true, true));
}

#[test]
fn labels_that_cannot_be_joined_say_what_is_missing() {
    let world = World::new();
    let failed = |columns: Vec<(&str, ArrayRef)>| world.labels(columns, 0).unwrap_err().to_string();
    let text = failed(vec![("request_id", texts(&["a"]))]);
    assert!(text.contains("no column `late`; they have: `request_id`"), "{text}");
    let text = failed(vec![("late", truths(&[Some(true)])), ("plane", texts(&["N1"]))]);
    assert!(
        text.contains("give `request_id` (with `row`), or columns of the request (`plane`, `to`) and `time`"),
        "{text}"
    );
    let text = failed(vec![("late", texts(&["yes"])), ("request_id", texts(&["a"]))]);
    assert!(text.contains("numbers and booleans"), "{text}");
    let numbers: ArrayRef = Arc::new(Float64Array::from(vec![f64::NAN]));
    let text = failed(vec![("late", numbers), ("request_id", texts(&["a"]))]);
    assert!(text.contains("row 0 of the labels has no finite number as `late`"), "{text}");
}
