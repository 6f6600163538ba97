//! Tables under compaction: the same rows in the same order, the same training sets, whatever fails and whenever.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{TimestampMicrosecondType, UInt64Type};
use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Judge, SourceSchemas, compile_definitions, encode_entity_keys};
use feature_defs::window::HOUR;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::compact::{Extent, compact};
use super::import::import;
use super::*;
use crate::history::{History, Positioned};
use crate::point_in_time::Order;
use crate::source::Sources;
use crate::{Engine, EngineOptions, TrainingSetRequest};

const T0: Micros = 1_700_006_400_000_000;

const DEFINITIONS: &str = r#"
entities:
  - {name: pair, keys: [{name: shop, type: string}, {name: till, type: int64}]}
  - {name: region, keys: [{name: region, type: string}]}
sources:
  - name: sales
    stream: true
    schema:
      - {name: shop, type: string, nullable: true}
      - {name: till, type: int64, nullable: true}
      - {name: region, type: string, nullable: true}
      - {name: amount, type: float64, nullable: true}
      - {name: seen_at, type: timestamp, nullable: true}
    event_time: sold_at
    created_time: seen_at
  - name: prices
    files: data/*.parquet
    event_time: sold_at
feature_views:
  - {name: last, entity: pair, source: sales, features: [{name: amount, type: float64}]}
  - name: load
    entity: region
    source: sales
    windows: [1h, 24h]
    aggregates: [{name: n, function: count}, {name: total, function: sum, of: amount}]
  - {name: price, entity: pair, source: prices, features: [{name: amount, type: float64}]}
feature_services:
  - {name: all, features: [last, load]}
"#;

fn plan() -> Plan {
    let files = Files::new(vec![SourceFile { path: "defs.yaml".into(), text: DEFINITIONS.into() }]);
    let columns =
        [("shop", Type::String), ("till", Type::Int64), ("amount", Type::Float64), ("sold_at", Type::Timestamp)];
    let columns: Vec<(String, Type)> = columns.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
    compile_definitions("p", &files, &SourceSchemas::from([("prices".to_owned(), columns)])).unwrap()
}

fn times(values: Vec<Option<Micros>>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from(values).with_timezone("UTC"))
}

/// Events with these sequences, the same for the same sequences: few entities, ties, nulls, NaN, rows out of order.
fn events(source: &SourcePlan, sequences: Range<u64>) -> Positioned {
    type Columns = (Vec<Option<String>>, Vec<Option<i64>>, Vec<Option<String>>, Vec<Option<f64>>);
    let mut columns: Columns = Default::default();
    let (mut seen, mut sold, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for sequence in sequences {
        let mut rng = SmallRng::seed_from_u64(sequence);
        let time = T0 + sequence as i64 * 1_000_000;
        columns.0.push(rng.random_bool(0.95).then(|| format!("shop {}", rng.random_range(0..40))));
        columns.1.push(rng.random_bool(0.95).then(|| rng.random_range(-2..3)));
        columns.2.push(Some(["north", "south"][rng.random_range(0..2)].to_owned()));
        columns.3.push(match rng.random_range(0..10) {
            0 => None,
            1 => Some(f64::NAN),
            _ => Some(rng.random_range(-1e6..1e6)),
        });
        let event_time = time - rng.random_range(0..3) * HOUR / 4;
        seen.push(rng.random_bool(0.3).then(|| event_time + rng.random_range(0..1_000_000)));
        sold.push(Some(event_time));
        positions.push(Position { time, sequence });
    }
    let batch = RecordBatch::try_from_iter([
        ("shop", Arc::new(StringArray::from(columns.0)) as ArrayRef),
        ("till", Arc::new(Int64Array::from(columns.1))),
        ("region", Arc::new(StringArray::from(columns.2))),
        ("amount", Arc::new(Float64Array::from(columns.3))),
        ("seen_at", times(seen)),
        ("sold_at", times(sold)),
    ]);
    Positioned { batch: source.align(&batch.unwrap(), None).unwrap(), positions }
}

fn work(bucket_rows: u64) -> Work {
    Work { bucket_rows, ..Work::default() }
}

async fn open(store: &Arc<dyn ObjectStore>) -> History {
    History::open(store.clone(), Path::from("p"), "sales").await.unwrap()
}

async fn opened(store: &Arc<dyn ObjectStore>) -> Table {
    Table::of_stream(store.clone(), &Path::from("p"), "sales").await.unwrap()
}

async fn compacted(
    store: &Arc<dyn ObjectStore>,
    plan: &Plan,
    extent: Extent,
    work: &Work,
    now: Micros,
) -> Result<compact::Compacted, TableError> {
    let mut table = Table::of_stream(store.clone(), &Path::from("p"), "sales").await?;
    let wanted = Clustering::choose(plan, plan.source("sales").unwrap(), table.clustering());
    compact(&mut table, &wanted, extent, work, now, &|_| {}).await
}

/// Everything that is after a position is there once, in order, as it was appended.
async fn check_scan(history: &History, source: &Arc<SourcePlan>, until: u64) {
    for after in [0, until / 3, until] {
        let position = match after {
            0 => Position::START,
            after => events(source, after..after + 1).positions[0],
        };
        let parts: Vec<Positioned> = history.scan(source, None, position).try_collect().await.unwrap();
        let expected = events(source, after + 1..until + 1);
        let positions: Vec<Position> = parts.iter().flat_map(|part| part.positions.clone()).collect();
        assert_eq!(positions, expected.positions, "after {after}");
        let found = concat_batches(&expected.batch.schema(), parts.iter().map(|part| &part.batch)).unwrap();
        assert_eq!(found, expected.batch, "after {after}");
    }
    assert_eq!(history.manifest().applied, events(source, until..until + 1).positions[0]);
}

async fn training_set(store: &Arc<dyn ObjectStore>, plan: &Plan, folder: &std::path::Path) -> RecordBatch {
    let engine = Engine::new(EngineOptions {
        project_folder: folder.to_path_buf(),
        project: "p".into(),
        store: store.clone(),
        prefix: Path::default(),
        memory_bytes: 256 << 20,
        spill_folder: None,
    });
    let mut rng = SmallRng::seed_from_u64(7);
    let rows = 300;
    let spine = RecordBatch::try_from_iter([
        (
            "shop",
            Arc::new((0..rows).map(|row| Some(format!("shop {}", row % 41))).collect::<StringArray>()) as ArrayRef,
        ),
        ("till", Arc::new((0..rows).map(|row| Some(row % 6 - 2)).collect::<Int64Array>())),
        ("region", Arc::new((0..rows).map(|row| Some(["north", "east"][row as usize % 2])).collect::<StringArray>())),
        ("event_timestamp", times((0..rows).map(|_| Some(T0 + rng.random_range(-10..2_000) * 1_000_000)).collect())),
    ])
    .unwrap();
    let request = TrainingSetRequest {
        service: plan.service("all").unwrap().clone(),
        spine_schema: spine.schema(),
        spine: vec![spine],
        statuses: true,
        visibility: None,
        order: Order::Spine,
    };
    let set = engine.unwrap().training_set(request).await.unwrap();
    let batches: Vec<RecordBatch> = set.stream.try_collect().await.unwrap();
    concat_batches(&set.schema, &batches).unwrap()
}

/// Runs hold what the interface promises: rows of one bucket, in the order of the clustering.
async fn check_runs(table: &Table, source: &SourcePlan) -> u64 {
    let clustering = table.clustering().unwrap();
    let mut rows = 0;
    for bucket in 0..table.buckets() {
        for run in table.runs(bucket) {
            let mut last = None;
            for file in run {
                let bytes = table.folder().store.get(&table.object_path(file)).await.unwrap().bytes().await.unwrap();
                assert_eq!(bytes.len() as u64, file.bytes);
                let reader =
                    parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build();
                let batches: Vec<RecordBatch> = reader.unwrap().map(Result::unwrap).collect();
                let whole = concat_batches(&batches[0].schema(), &batches).unwrap();
                assert_eq!(whole.num_rows() as u64, file.rows);
                rows += file.rows;
                let sequences = whole.column_by_name(SEQUENCE).unwrap().as_primitive::<UInt64Type>().clone();
                let aligned = source.align(&whole, None).unwrap();
                let till = aligned.column_by_name("till").unwrap().clone();
                let shop = aligned.column_by_name("shop").unwrap().clone();
                let keys = encode_entity_keys(&[(shop, &Type::String), (till, &Type::Int64)], whole.num_rows());
                let time = |name: &str, row: usize| {
                    let column = aligned.column_by_name(name).unwrap().as_primitive::<TimestampMicrosecondType>();
                    column.is_valid(row).then(|| column.value(row))
                };
                for row in 0..whole.num_rows() {
                    let key = keys.get(row).map(<[u8]>::to_vec);
                    assert_eq!(key.as_ref().map_or(0, |key| table.bucket_of(key)), bucket);
                    let event_time = time("sold_at", row).unwrap();
                    assert!((file.event_time_min.unwrap()..=file.event_time_max.unwrap()).contains(&event_time));
                    let here = key.map(|key| (key, event_time, time("seen_at", row), sequences.value(row)));
                    // Rows without a whole key are somewhere; no reader of this entity looks at them.
                    if here.is_some() {
                        assert!(last < here, "{last:?} then {here:?}");
                        last = here;
                    }
                }
            }
        }
    }
    assert!(clustering.buckets.is_power_of_two());
    rows
}

#[tokio::test]
async fn a_compaction_changes_no_answer() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("sales").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut history = open(&store).await;
    for from in (1..1_601).step_by(40) {
        history.append(source, &[events(source, from..from + 40)], 0).await.unwrap();
    }
    let expected = training_set(&store, &plan, folder.path()).await;
    assert!(expected.column_by_name("last:amount").unwrap().null_count() < 250, "the training set is not empty");
    let fingerprint = history.manifest().fingerprint();
    check_scan(&history, source, 1_600).await;

    let done = compacted(&store, &plan, Extent::All, &work(200), 0).await.unwrap();
    assert_eq!((done.changed, done.files_before, done.rows, done.buckets), (true, 40, 1_600, 8));
    let table = opened(&store).await;
    assert_eq!(check_runs(&table, source).await, 1_600);
    assert_eq!(table.unsorted().count(), 0);
    assert!(table.clustering().unwrap().serves(source, &plan.view("last").unwrap().keys));
    assert!(!table.clustering().unwrap().serves(source, &plan.view("load").unwrap().keys));
    assert_eq!(training_set(&store, &plan, folder.path()).await, expected);
    check_scan(&open(&store).await, source, 1_600).await;
    assert_eq!(table.manifest().fingerprint(), fingerprint, "datasets do not change their identity");
    let again = compacted(&store, &plan, Extent::All, &work(200), 0).await.unwrap();
    assert!(!again.changed && again.rows == 0);

    // The appender that did not hear of it goes on.
    history.append(source, &[events(source, 1_601..1_700)], 0).await.unwrap();
    check_scan(&open(&store).await, source, 1_699).await;
    let expected = training_set(&store, &plan, folder.path()).await;
    for from in (1_700..2_340).step_by(20) {
        history.append(source, &[events(source, from..from + 20)], 0).await.unwrap();
    }
    let expected_later = training_set(&store, &plan, folder.path()).await;
    assert_eq!(expected_later.num_rows(), expected.num_rows());
    // In the background: the first run is large enough to stay.
    let done = compacted(&store, &plan, Extent::Due, &work(200), 0).await.unwrap();
    assert_eq!((done.changed, done.rows), (true, 739));
    let table = opened(&store).await;
    assert_eq!(check_runs(&table, source).await, 2_339);
    assert!((0..8).any(|bucket| table.runs(bucket).len() == 2));
    check_scan(&open(&store).await, source, 2_339).await;
    assert_eq!(training_set(&store, &plan, folder.path()).await, expected_later);
    // And by hand: one run again, merged without a sort.
    compacted(&store, &plan, Extent::All, &work(300), 0).await.unwrap();
    let table = opened(&store).await;
    assert!((0..8).all(|bucket| table.runs(bucket).len() <= 1));
    assert_eq!(check_runs(&table, source).await, 2_339);
    check_scan(&open(&store).await, source, 2_339).await;
    assert_eq!(training_set(&store, &plan, folder.path()).await, expected_later);
}

#[tokio::test]
async fn more_rows_than_memory_are_sorted_on_disk() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("sales").unwrap();
    let mut history = open(&store).await;
    for from in (1..60_001).step_by(20_000) {
        history.append(source, &[events(source, from..from + 20_000)], 0).await.unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let small = Work { memory_bytes: 3 << 20, spill_folder: Some(folder.path().join("spill")), bucket_rows: 10_000 };
    compacted(&store, &plan, Extent::All, &small, 0).await.unwrap();
    assert_eq!(check_runs(&opened(&store).await, source).await, 60_000);
    let history = open(&store).await.with_work(small);
    let parts: Vec<Positioned> = history.scan(source, None, Position::START).try_collect().await.unwrap();
    let sequences: Vec<u64> = parts.iter().flat_map(|part| &part.positions).map(|p| p.sequence).collect();
    assert!(sequences.iter().copied().eq(1..60_001));
}

#[tokio::test]
async fn readers_of_an_older_manifest_go_on_until_their_time_is_over() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("sales").unwrap();
    let mut history = open(&store).await;
    history.append(source, &[events(source, 1..50)], 0).await.unwrap();
    history.append(source, &[events(source, 50..100)], 0).await.unwrap();
    let old = open(&store).await;
    compacted(&store, &plan, Extent::All, &work(10), 1).await.unwrap();
    check_scan(&old, source, 99).await;
    history.append(source, &[events(source, 100..101)], HOUR).await.unwrap();
    check_scan(&old, source, 99).await;
    history.append(source, &[events(source, 101..102)], 1 + HOUR).await.unwrap();
    assert_eq!(history.manifest().retired, []);
    assert!(store.head(&old.object_path(&old.manifest().files[0])).await.is_err());
    check_scan(&open(&store).await, source, 101).await;
}

#[tokio::test]
async fn what_a_dead_writer_left_is_deleted_after_a_day() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("sales").unwrap();
    open(&store).await.append(source, &[events(source, 1..50)], 0).await.unwrap();
    let stray = Path::from("p/history/sales/run-stray-0000-0000.parquet");
    store.put(&stray, PutPayload::from_static(b"half")).await.unwrap();
    let written = store.head(&stray).await.unwrap().last_modified.timestamp_micros();
    compacted(&store, &plan, Extent::All, &work(10), written + HOUR).await.unwrap();
    assert!(store.head(&stray).await.is_ok(), "it may belong to a writer at work");
    open(&store).await.append(source, &[events(source, 50..60)], written + HOUR).await.unwrap();
    compacted(&store, &plan, Extent::All, &work(10), written + 25 * HOUR).await.unwrap();
    assert!(store.head(&stray).await.is_err());
    check_scan(&open(&store).await, source, 59).await;
}

#[tokio::test]
async fn a_manifest_of_version_1_is_read_and_becomes_version_2() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("sales").unwrap();
    open(&store).await.append(source, &[events(source, 1..50)], 0).await.unwrap();
    let file = open(&store).await.manifest().files[0].clone();
    // As the first version wrote it.
    let schema = serde_json::to_value(&source.schema).unwrap();
    let position = |position: Position| serde_json::json!({"time": position.time, "sequence": position.sequence});
    let text = serde_json::json!({
        "format": 1, "source": "sales", "schema": schema, "applied": position(file.last), "sequence_max": 49,
        "imported": null, "retired": [],
        "files": [{"path": file.path, "rows": 49, "bytes": file.bytes, "first": position(file.first),
                   "last": position(file.last), "event_time_min": null, "event_time_max": null}],
    });
    let marker = Path::from("p/history/sales/manifest.json");
    store.delete(&Path::from("p/history/sales/manifest/000000000001.json")).await.unwrap();
    store.put(&marker, PutPayload::from(text.to_string().into_bytes())).await.unwrap();
    let mut history = open(&store).await;
    check_scan(&history, source, 49).await;
    history.append(source, &[events(source, 50..60)], 0).await.unwrap();
    check_scan(&open(&store).await, source, 59).await;
    let marker = store.get(&marker).await.unwrap().bytes().await.unwrap();
    let marker: serde_json::Value = serde_json::from_slice(&marker).unwrap();
    assert_eq!(marker["format"], 2, "an earlier program says that it is too old, and writes nothing");
    compacted(&store, &plan, Extent::All, &work(10), 0).await.unwrap();
    check_scan(&open(&store).await, source, 59).await;
}

/// Fails when its count runs out: before doing what was asked, or after it.
#[derive(Debug)]
struct Faulty {
    inner: InMemory,
    left: AtomicI64,
    after: bool,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

impl Faulty {
    fn fails(&self) -> bool {
        self.left.fetch_sub(1, Ordering::SeqCst) == 0
    }

    fn error() -> object_store::Error {
        object_store::Error::Generic { store: "faulty", source: "the network is gone".into() }
    }

    async fn run<T>(&self, operation: impl Future<Output = object_store::Result<T>>) -> object_store::Result<T> {
        let fails = self.fails();
        if fails && !self.after {
            return Err(Faulty::error());
        }
        let done = operation.await;
        if fails { Err(Faulty::error()) } else { done }
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.run(self.inner.put_opts(path, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.run(self.inner.put_multipart_opts(path, options)).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.run(self.inner.get_opts(path, options)).await
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.run(self.inner.get_ranges(path, ranges)).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        if self.fails() {
            return Box::pin(futures::stream::iter([Err(Faulty::error())]));
        }
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if self.fails() {
            return Box::pin(futures::stream::iter([Err(Faulty::error())]));
        }
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.run(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.run(self.inner.copy_opts(from, to, options)).await
    }
}

#[tokio::test]
async fn a_store_that_fails_at_any_operation_loses_and_doubles_nothing() {
    let plan = plan();
    let source = plan.source("sales").unwrap();
    for after in [false, true] {
        let (mut compactions_failed, mut appends_failed) = (0, 0);
        for operation in 0.. {
            let faulty = Arc::new(Faulty { inner: InMemory::new(), left: AtomicI64::new(i64::MAX), after });
            let store: Arc<dyn ObjectStore> = faulty.clone();
            let mut history = open(&store).await;
            for from in [1, 20, 40] {
                history
                    .append(source, &[events(source, from..from + 20)].map(|e| cut(source, e, from)), 0)
                    .await
                    .unwrap();
            }
            let until = history.manifest().applied.sequence;
            let context = format!("operation {operation}, failing {}", if after { "after" } else { "before" });
            faulty.left.store(operation, Ordering::SeqCst);
            let done = compacted(&store, &plan, Extent::All, &work(20), 0).await;
            let was_reached = faulty.left.load(Ordering::SeqCst) < 0;
            faulty.left.store(i64::MAX, Ordering::SeqCst);
            if let Err(error) = &done {
                assert!(error.is_retryable(), "{context}: {error}");
                compactions_failed += 1;
            }
            check_scan(&open(&store).await, source, until).await;
            compacted(&store, &plan, Extent::All, &work(20), 0).await.unwrap();
            check_scan(&open(&store).await, source, until).await;

            // The appender knows nothing of the compaction, so it loses its first commit.
            faulty.left.store(operation, Ordering::SeqCst);
            let more = events(source, until + 1..until + 11);
            let appended = history.append(source, std::slice::from_ref(&more), 0).await;
            let was_reached = was_reached | (faulty.left.load(Ordering::SeqCst) < 0);
            faulty.left.store(i64::MAX, Ordering::SeqCst);
            let found = open(&store).await.manifest().applied.sequence;
            match appended {
                Ok(_) => assert_eq!(found, until + 10, "{context}"),
                Err(error) => {
                    assert!(error.is_retryable(), "{context}: {error}");
                    assert!(found == until || found == until + 10, "{context}: all of them or none");
                    appends_failed += 1;
                    if operation % 2 == 0 {
                        compacted(&store, &plan, Extent::All, &work(20), 0).await.unwrap();
                    }
                    // As the applier does: the same events, and what came since.
                    let later = events(source, until + 11..until + 13);
                    history.append(source, &[more, later], 0).await.unwrap();
                    assert_eq!(history.manifest().applied.sequence, until + 12, "{context}");
                }
            }
            check_scan(&open(&store).await, source, history.manifest().applied.sequence).await;
            if !was_reached {
                assert!(operation > 20, "{operation}");
                break;
            }
        }
        assert!(compactions_failed > 10 && appends_failed > 5, "{compactions_failed} and {appends_failed}");
    }
}

/// Sequences go on without a gap: the first append has 19 events, the others 20.
fn cut(source: &SourcePlan, all: Positioned, from: u64) -> Positioned {
    if from == 1 { events(source, 1..20) } else { all }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn appends_and_compactions_at_once_lose_nothing() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), Arc::new(plan()));
    let source = plan.source("sales").unwrap().clone();
    let appended = Arc::new(AtomicI64::new(0));
    let appends = {
        let (store, source, appended) = (store.clone(), source.clone(), appended.clone());
        tokio::spawn(async move {
            let mut history = open(&store).await;
            for from in (1..901).step_by(10) {
                history.append(&source, &[events(&source, from..from + 10)], 0).await.unwrap();
            }
            appended.store(1, Ordering::SeqCst);
        })
    };
    let compactions: Vec<_> = (0..2)
        .map(|_| {
            let (store, plan, appended) = (store.clone(), plan.clone(), appended.clone());
            tokio::spawn(async move {
                let mut changed = 0;
                while appended.load(Ordering::SeqCst) == 0 {
                    match compacted(&store, &plan, Extent::All, &work(100), 0).await {
                        Ok(done) => changed += usize::from(done.changed),
                        Err(TableError::Contended { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                changed
            })
        })
        .collect();
    appends.await.unwrap();
    let mut changed = 0;
    for compaction in compactions {
        changed += compaction.await.unwrap();
    }
    assert!(changed > 0);
    check_scan(&open(&store).await, &source, 900).await;
    let table = opened(&store).await;
    let named: BTreeSet<&String> = table.manifest().files.iter().map(|file| &file.path).collect();
    assert_eq!(named.len(), table.manifest().files.len());
}

const FOLDER: &str = "COEVAL_TEST_TABLE_FOLDER";

/// Not a test of its own: what the child of the next one does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder).unwrap());
    let plan = Arc::new(plan());
    let source = plan.source("sales").unwrap().clone();
    let compactions = {
        let (store, plan) = (store.clone(), plan.clone());
        tokio::spawn(async move {
            loop {
                let extent = if rand::random_bool(0.5) { Extent::All } else { Extent::Due };
                match compacted(&store, &plan, extent, &work(500), 0).await {
                    Ok(_) | Err(TableError::Contended { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
    };
    let mut history = open(&store).await;
    loop {
        let next = history.manifest().sequence_max + 1;
        history.append(&source, &[events(&source, next..next + 7)], 0).await.unwrap();
        std::io::stdout().write_all(format!("\nacked {}\n", next + 6).as_bytes()).unwrap();
        assert!(!compactions.is_finished());
    }
}

#[test]
fn sigkill_at_any_moment_leaves_the_old_or_the_new_table() {
    if std::env::var(FOLDER).is_ok() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let plan = plan();
    let source = plan.source("sales").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut acked = 0;
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "table::tests::child", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let numbers =
                lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("acked ")?.parse::<u64>().ok());
            numbers.max()
        });
        std::thread::sleep(std::time::Duration::from_millis(400 + 71 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let last = reader.join().unwrap().unwrap_or_default();
        assert!(last > acked, "round {round} appended something");
        acked = last;
        runtime.block_on(async {
            let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
            let history = open(&store).await;
            let until = history.manifest().applied.sequence;
            assert!(until >= acked && until < acked + 15, "{until} after {acked} were acknowledged");
            check_scan(&history, source, until).await;
        });
    }
}

fn write_prices(path: &std::path::Path, rows: Range<i64>) {
    let batch = RecordBatch::try_from_iter_with_nullable([
        (
            "shop",
            Arc::new(rows.clone().map(|row| Some(format!("s{}", row % 7))).collect::<StringArray>()) as ArrayRef,
            true,
        ),
        ("till", Arc::new(rows.clone().map(|row| Some(row % 3)).collect::<Int64Array>()), true),
        ("amount", Arc::new(rows.clone().map(|row| Some(row as f64)).collect::<Float64Array>()), true),
        ("sold_at", times(rows.map(|row| Some(T0 + (row * 7_919) % 1_000)).collect()), true),
    ])
    .unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[tokio::test]
async fn files_are_imported_once_and_again_when_they_change() {
    let (store, plan): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), plan());
    let source = plan.source("prices").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sources = Sources::new(folder.path()).unwrap();
    let project = Path::from("p");
    assert!(Table::open(store.clone(), &project, source).await.unwrap().is_none());
    let run = async || {
        let mut table = Table::of_files(store.clone(), &project, "prices").await.unwrap();
        let wanted = Clustering::choose(&plan, source, table.clustering());
        import(&mut table, source, &sources, &wanted, &work(100), 0, &|_| {}).await
    };
    let error = run().await.unwrap_err();
    assert!(matches!(error, TableError::Source(_)) && error.to_string().contains("data/*.parquet"), "{error}");
    write_prices(&folder.path().join("data/a.parquet"), 0..300);
    write_prices(&folder.path().join("data/b.parquet"), 300..500);
    let done = run().await.unwrap();
    assert_eq!((done.changed, done.rows, done.buckets), (true, 500, 8));
    let table = Table::open(store.clone(), &project, source).await.unwrap().unwrap();
    let fingerprint = sources.fingerprint("data/*.parquet").await.unwrap();
    assert!(table.is_copy_of(&fingerprint));
    assert!(table.clustering().unwrap().serves(source, &plan.view("price").unwrap().keys));
    let again = run().await.unwrap();
    assert!(!again.changed && again.rows == 500);

    write_prices(&folder.path().join("data/b.parquet"), 300..600);
    assert!(!table.is_copy_of(&sources.fingerprint("data/*.parquet").await.unwrap()));
    let done = run().await.unwrap();
    assert_eq!((done.changed, done.rows), (true, 600));
    let new = Table::open(store.clone(), &project, source).await.unwrap().unwrap();
    assert_ne!(new.manifest().fingerprint(), table.manifest().fingerprint());
    let mut seen: Vec<f64> = Vec::new();
    for file in table.manifest().files.iter() {
        assert!(store.head(&table.object_path(file)).await.is_ok(), "readers of the old table go on");
    }
    for bucket in 0..new.buckets() {
        for file in new.files(bucket) {
            let bytes = store.get(&new.object_path(file)).await.unwrap().bytes().await.unwrap();
            let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
            for batch in reader.build().unwrap() {
                let batch = batch.unwrap();
                assert!(batch.column_by_name(SEQUENCE).is_none(), "files have no positions");
                let amounts = batch.column_by_name("amount").unwrap();
                seen.extend(amounts.as_primitive::<arrow::datatypes::Float64Type>().values());
            }
        }
    }
    seen.sort_by(f64::total_cmp);
    assert!(seen.iter().copied().eq((0..600).map(|row| row as f64)));
}

#[test]
fn buckets_lie_where_they_always_lay() {
    let clustering = Clustering { keys: Vec::new(), event_time: None, created_time: None, buckets: 16 };
    let bucket = |key: &[u8]| clustering.bucket_of(key);
    assert_eq!([bucket(b""), bucket(b"a"), bucket(b"b"), bucket(b"shop 1")], BUCKETS);
    let counts = (0..16_000_u32).fold([0; 16], |mut counts, key| {
        counts[bucket(&key.to_be_bytes()) as usize] += 1;
        counts
    });
    assert!(counts.iter().all(|count| (900..1_100).contains(count)), "{counts:?}");
}

/// Of the released hash. Tables on disk depend on it.
const BUCKETS: [u32; 4] = [6, 11, 0, 11];

#[test]
fn a_table_is_sorted_for_the_first_view_and_stays_so() {
    let plan = plan();
    let source = plan.source("sales").unwrap();
    let columns = |clustering: &Clustering| clustering.keys.iter().map(|key| key.column.clone()).collect::<Vec<_>>();
    let first = Clustering::choose(&plan, source, None);
    assert_eq!(columns(&first), ["shop", "till"]);
    let region = vec![KeyColumn { column: "region".into(), key_type: Type::String }];
    let other = Clustering { keys: region, buckets: 8, ..first.clone() };
    assert_eq!(Clustering::choose(&plan, source, Some(&other)), other, "a view wants it");
    let gone = vec![KeyColumn { column: "amount".into(), key_type: Type::Int64 }];
    let gone = Clustering { keys: gone, ..other };
    assert_eq!(columns(&Clustering::choose(&plan, source, Some(&gone))), ["shop", "till"], "nobody wants it any more");
}

#[tokio::test]
async fn an_import_that_fails_anywhere_leaves_the_old_copy_or_the_new_one() {
    let plan = plan();
    let source = plan.source("prices").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sources = Sources::new(folder.path()).unwrap();
    let project = Path::from("p");
    let mut failed = 0;
    for operation in 0.. {
        let faulty =
            Arc::new(Faulty { inner: InMemory::new(), left: AtomicI64::new(i64::MAX), after: operation % 2 == 0 });
        let store: Arc<dyn ObjectStore> = faulty.clone();
        let run = async || {
            let mut table = Table::of_files(store.clone(), &project, "prices").await?;
            let wanted = Clustering::choose(&plan, source, table.clustering());
            import(&mut table, source, &sources, &wanted, &work(100), 0, &|_| {}).await
        };
        write_prices(&folder.path().join("data/a.parquet"), 0..300);
        run().await.unwrap();
        write_prices(&folder.path().join("data/a.parquet"), 0..400);
        faulty.left.store(operation / 2, Ordering::SeqCst);
        let done = run().await;
        let was_reached = faulty.left.load(Ordering::SeqCst) < 0;
        faulty.left.store(i64::MAX, Ordering::SeqCst);
        failed += usize::from(done.is_err());
        let table = Table::open(store.clone(), &project, source).await.unwrap().unwrap();
        let rows = table.manifest().rows();
        assert_eq!(rows, table.manifest().origin.as_ref().unwrap().rows);
        assert!(rows == 400 || (rows == 300 && done.is_err()), "operation {operation}: {rows} rows");
        for file in &table.manifest().files {
            assert_eq!(store.head(&table.object_path(file)).await.unwrap().size, file.bytes);
        }
        assert_eq!(run().await.unwrap().rows, 400);
        if !was_reached {
            break;
        }
    }
    assert!(failed > 10, "{failed}");
}

/// Rows of a table without those, or without what of them, a list takes away.
async fn check_redacted(store: &Arc<dyn ObjectStore>, judge: &Judge, all: &Positioned, context: &str) {
    let expected = judge.judge(&all.batch).unwrap();
    let (batch, positions) = match &expected {
        Some(redaction) => {
            let kept = (0..all.positions.len()).filter(|row| redaction.keeps(*row)).map(|row| all.positions[row]);
            (redaction.apply(&all.batch).unwrap(), kept.collect())
        }
        None => (all.batch.clone(), all.positions.clone()),
    };
    let parts: Vec<Positioned> =
        open(store).await.scan(&judge.source, None, Position::START).try_collect().await.unwrap();
    let found: Vec<Position> = parts.iter().flat_map(|part| &part.positions).copied().collect();
    assert_eq!(found, positions, "{context}: positions stay");
    let found = concat_batches(&batch.schema(), parts.iter().map(|part| &part.batch)).unwrap();
    for (index, field) in batch.schema().fields().iter().enumerate() {
        assert_eq!(found.column(index), batch.column(index), "{context}: {}", field.name());
    }
    // Whatever manifest somebody has, no file that it names says anything of what is gone.
    let objects: Vec<ObjectMeta> = store.list(None).try_collect().await.unwrap();
    for object in objects.iter().filter(|object| object.location.extension() == Some("parquet")) {
        let bytes = store.get(&object.location).await.unwrap().bytes().await.unwrap();
        let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
        for part in reader.build().unwrap() {
            assert!(judge.judge(&part.unwrap()).unwrap().is_none(), "{context}: {}", object.location);
        }
    }
}

#[tokio::test]
async fn a_table_forgets_whatever_fails_and_whenever() {
    let plan = plan();
    let source = plan.source("sales").unwrap();
    let salt = [9; feature_defs::forgotten::SALT_BYTES];
    let listed = |entity: &str, columns: &[(ArrayRef, &Type)]| {
        let key = encode_entity_keys(columns, 1);
        let hash = feature_defs::forgotten::KeyHash::of(&salt, entity, key.get(0).unwrap());
        (Arc::<str>::from(entity), hash)
    };
    let text = |text: &str| Arc::new(StringArray::from(vec![text])) as ArrayRef;
    let till = Arc::new(Int64Array::from(vec![1])) as ArrayRef;
    let pair = listed("pair", &[(text("shop 3"), &Type::String), (till, &Type::Int64)]);
    let region = listed("region", &[(text("north"), &Type::String)]);
    // Of pairs every row is counted by its region; of a region those are not that have no pair.
    for (lists, seen) in
        [(vec![pair.clone()], (false, true)), (vec![region.clone()], (true, true)), (vec![pair, region], (true, true))]
    {
        let list = Arc::new(feature_defs::forgotten::Forgotten::new(&salt, lists));
        let judge = Judge::new(source, plan.views.iter(), &list).unwrap();
        let all = events(source, 1..401);
        let expected = judge.judge(&all.batch).unwrap().unwrap();
        assert_eq!((expected.removed() > 0, expected.cleared() > 0), seen);
        let mut failed = 0;
        // Not every operation: each is a world of its own. The step is odd, so both kinds of failure come up.
        for operation in (0..).step_by(9) {
            let faulty =
                Arc::new(Faulty { inner: InMemory::new(), left: AtomicI64::new(i64::MAX), after: operation % 2 == 0 });
            let store: Arc<dyn ObjectStore> = faulty.clone();
            let mut history = open(&store).await;
            // Two runs, files that a compaction has replaced, and files of level 0.
            for (from, until) in [(1, 101), (101, 201), (201, 301), (301, 351), (351, 401)] {
                history.append(source, &[events(source, from..until)], 0).await.unwrap();
                if until <= 301 {
                    compacted(&store, &plan, Extent::All, &work(40), 0).await.unwrap();
                }
            }
            let run = async || redact::redact(&mut opened(&store).await, &judge, &work(40), &|_| {}).await;
            let looked = redact::look(&opened(&store).await, &judge).await.unwrap();
            let mut table = opened(&store).await;
            faulty.left.store(operation / 2, Ordering::SeqCst);
            let done = redact::redact(&mut table, &judge, &work(40), &|_| {}).await;
            let was_reached = faulty.left.load(Ordering::SeqCst) < 0;
            faulty.left.store(i64::MAX, Ordering::SeqCst);
            failed += usize::from(done.is_err());
            if let Ok(found) = &done {
                assert_eq!((found.rows_removed, found.rows_cleared), (expected.removed(), expected.cleared()));
                assert_eq!((looked.rows_removed, &looked.keys), (found.rows_removed, &found.keys));
            }
            // An appender and a compaction go on beside it, with rows that hold nothing of it.
            history.append(source, &[events(source, 401..402)], 0).await.unwrap();
            let found = run().await.unwrap();
            let context = format!("operation {operation}");
            assert!(
                done.is_err() || found.rows_removed + found.rows_cleared == 0 || judge_of(&judge, source),
                "{context}"
            );
            let whole = events(source, 1..402);
            check_redacted(&store, &judge, &whole, &context).await;
            compacted(&store, &plan, Extent::All, &work(40), 0).await.unwrap();
            check_redacted(&store, &judge, &whole, &context).await;
            if !was_reached {
                break;
            }
        }
        assert!(failed > 3, "{failed}");
    }
}

/// Whether the one event that is appended last is itself about what is forgotten.
fn judge_of(judge: &Judge, source: &SourcePlan) -> bool {
    judge.judge(&events(source, 401..402).batch).unwrap().is_some()
}
