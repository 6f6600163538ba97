//! Datasets are there whole or not at all, and every row is read once, by whoever reads.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, DictionaryArray, Float32Array, Float64Array, Int64Array, ListArray, RecordBatch,
    StringArray, StructArray, TimestampMicrosecondArray,
};
use arrow::buffer::{Buffer, NullBuffer, ScalarBuffer};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Int8Type, Int64Type};
use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions};
use feature_defs::value::Type;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart,
};
use parquet::arrow::ArrowWriter;

use super::*;

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - {name: sales, files: sales.parquet, event_time: sold_at}
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    features: [{name: amount, type: float64}, {name: pieces, type: int64}]
feature_services:
  - {name: selling, features: ["last_sale:*"]}
models:
  - name: sells
    features: selling
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["last_sale:amount"], missing: 0.5}
      - {name: count, dtype: int64, features: ["last_sale:pieces"]}
    outputs: [{name: p, dtype: float32}]
"#;

pub(crate) fn plan() -> Plan {
    let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text: DEFINITIONS.into() }]);
    let columns =
        [("shop", Type::String), ("sold_at", Type::Timestamp), ("amount", Type::Float64), ("pieces", Type::Int64)];
    let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
    let schemas = SourceSchemas::from([("sales".to_string(), columns)]);
    compile_definitions("test", &files, &schemas).unwrap()
}

fn recipe(spine: &str) -> Recipe {
    Recipe {
        name: "january".into(),
        service: plan().service("selling").unwrap().clone(),
        spine_digest: spine.into(),
        sources: vec![("sales".into(), "abc".into())],
        visibility: "known".into(),
        statuses: false,
        seed: 0,
        created_at: "2013-01-01T00:00:00Z".into(),
    }
}

/// Rows numbered from `rows.start`, with a null here and there.
pub(crate) fn rows(rows: Range<i64>) -> RecordBatch {
    let shop: ArrayRef =
        Arc::new(rows.clone().map(|row| (row % 7 != 0).then(|| format!("s{row}"))).collect::<StringArray>());
    let row: ArrayRef = Arc::new(Int64Array::from_iter_values(rows.clone()));
    let amount: ArrayRef =
        Arc::new(rows.clone().map(|row| (row % 5 != 0).then_some(row as f64 / 4.0)).collect::<Float64Array>());
    let pieces: ArrayRef = Arc::new(rows.map(|row| (row % 11 != 0).then_some(row % 3)).collect::<Int64Array>());
    let columns = [("shop", shop), ("row", row), ("last_sale:amount", amount), ("last_sale:pieces", pieces)];
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true))).unwrap()
}

fn writer(store: &Arc<dyn ObjectStore>, recipe: Recipe) -> DatasetWriter {
    DatasetWriter::create(store.clone(), &Path::from("test"), recipe, rows(0..1).schema()).with_row_group_rows(16)
}

async fn create(store: &Arc<dyn ObjectStore>, recipe: Recipe, count: i64) -> Result<Created, DatasetError> {
    let mut writer = writer(store, recipe);
    for start in (0..count).step_by(50) {
        writer.write(&rows(start..count.min(start + 50))).await?;
    }
    writer.finish(vec![SourceReport { source: "sales".into(), rows: 9, ..SourceReport::default() }]).await
}

async fn objects(store: &Arc<dyn ObjectStore>) -> BTreeSet<String> {
    store.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap()
}

async fn dataset(store: &Arc<dyn ObjectStore>, count: i64) -> Arc<StoredDataset> {
    let created = create(store, recipe("s"), count).await.unwrap();
    Arc::new(StoredDataset::open(store.clone(), &created.path).await.unwrap())
}

async fn read(dataset: &Arc<StoredDataset>, selection: Selection) -> Vec<i64> {
    let columns = dataset.columns(&["row".into()]).unwrap();
    let batches = dataset.read(&selection, &columns, 7).unwrap();
    let batches: Vec<RecordBatch> = batches.try_collect().await.unwrap();
    batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
}

#[tokio::test]
async fn what_was_written_is_read() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let created = create(&store, recipe("s"), 300).await.unwrap();
    assert!(!created.existed);
    let manifest = &created.manifest;
    assert_eq!((manifest.rows, manifest.row_group_rows, manifest.known_at[0].rows), (300, 16, 9));
    assert_eq!(manifest.files.iter().map(|file| file.rows).collect::<Vec<_>>(), [128, 128, 44]);
    let amount = &manifest.profile["last_sale:amount"];
    assert_eq!((amount.rows, amount.nulls, amount.min, amount.max), (300, 60, Some(0.25), Some(74.75)));
    assert_eq!(amount.mean, Some((0..300).filter(|row| row % 5 != 0).sum::<i64>() as f64 / 4.0 / 240.0));
    let dataset = Arc::new(StoredDataset::open(store.clone(), &created.path).await.unwrap());
    let columns = dataset.columns(&[]).unwrap();
    let batches: Vec<_> = dataset.read(&Selection::default(), &columns, 0).unwrap().try_collect().await.unwrap();
    assert_eq!(concat_batches(&dataset.schema, &batches).unwrap(), rows(0..300));
    // Columns come as they are asked for.
    let columns = dataset.columns(&["last_sale:pieces".into(), "shop".into()]).unwrap();
    let batches: Vec<_> = dataset.read(&Selection::default(), &columns, 0).unwrap().try_collect().await.unwrap();
    let found = concat_batches(&batches[0].schema(), &batches).unwrap();
    assert_eq!(found, rows(0..300).project(&[3, 0]).unwrap());
    let text = dataset.columns(&["shp".into()]).unwrap_err().to_string();
    assert!(text.contains("`shp`") && text.contains("last_sale:pieces"), "{text}");
}

#[tokio::test]
async fn a_dataset_of_no_rows_has_columns() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let dataset = dataset(&store, 0).await;
    assert_eq!(dataset.schema, rows(0..1).schema());
    assert_eq!(read(&dataset, Selection::default()).await, [] as [i64; 0]);
    assert_eq!(dataset.parts(&Selection::default(), 4).unwrap(), [Part { offset: 0, limit: 0 }]);
    assert_eq!(read(&dataset, Selection { shuffle_seed: Some(1), ..Selection::default() }).await, [] as [i64; 0]);
}

#[tokio::test]
async fn shares_are_disjoint_complete_and_equal() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let dataset = dataset(&store, 301).await;
    for shuffle_seed in [None, Some(0), Some(7)] {
        let whole = read(&dataset, Selection { shuffle_seed, ..Selection::default() }).await;
        assert_eq!(whole.iter().collect::<BTreeSet<_>>().len(), 301);
        assert_eq!(whole == (0..301).collect::<Vec<_>>(), shuffle_seed.is_none());
        for world_size in [1, 2, 3, 8] {
            let mut together = Vec::new();
            for rank in 0..world_size {
                let selection = Selection { rank, world_size, shuffle_seed, ..Selection::default() };
                let share = read(&dataset, selection).await;
                assert!(share.len().abs_diff(301 / world_size as usize) <= 1);
                // Endpoints, one after the other, and a stream that broke off and went on give the same rows.
                let mut ended = Vec::new();
                for part in dataset.parts(&selection, 3).unwrap() {
                    let selection = Selection { offset: part.offset, limit: Some(part.limit), ..selection };
                    ended.extend(read(&dataset, selection).await);
                }
                assert_eq!(ended, share);
                for offset in [1, 17, share.len() as u64] {
                    assert_eq!(read(&dataset, Selection { offset, ..selection }).await, share[offset as usize..]);
                }
                together.extend(share);
            }
            assert_eq!(together, whole);
        }
    }
    let wrong = Selection { rank: 2, world_size: 2, ..Selection::default() };
    assert!(dataset.range(&wrong).unwrap_err().to_string().contains("rank 2"));
    let wrong = Selection { offset: 302, ..Selection::default() };
    assert!(dataset.range(&wrong).unwrap_err().to_string().contains("offset 302"));
}

/// The order for a seed is part of what users rely on: it is written down here.
#[tokio::test]
async fn shuffled_orders_stay_the_same() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let dataset = dataset(&store, 40).await;
    let order = read(&dataset, Selection { shuffle_seed: Some(7), ..Selection::default() }).await;
    assert_eq!(order[..12], expected_start(&[16, 16, 8], 7)[..12]);
    assert_ne!(order, read(&dataset, Selection { shuffle_seed: Some(8), ..Selection::default() }).await);
}

/// The documented algorithm, from its words; all blocks are of one pool here.
fn expected_start(blocks: &[i64], seed: u64) -> Vec<i64> {
    struct Numbers(u64);
    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }
    fn shuffled<T>(mut places: Vec<T>, mut numbers: Numbers) -> Vec<T> {
        for last in (1..places.len()).rev() {
            let other = ((u128::from(numbers.next()) * (last as u128 + 1)) >> 64) as usize;
            places.swap(last, other);
        }
        places
    }
    let mut start = 0;
    let ranges: Vec<Range<i64>> = blocks
        .iter()
        .map(|rows| {
            start += rows;
            start - rows..start
        })
        .collect();
    let rows = shuffled(ranges, Numbers(seed)).into_iter().flatten().collect();
    let pool = Numbers(seed ^ 0x5bd1_e995_9e37_79b9).next();
    shuffled(rows, Numbers(pool))
}

#[tokio::test]
async fn the_same_recipe_is_the_same_dataset() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let project = Path::from("test");
    assert!(find(&store, &project, &recipe("s")).await.unwrap().is_none());
    let first = create(&store, recipe("s"), 200).await.unwrap();
    let (manifest, path) = find(&store, &project, &recipe("s")).await.unwrap().unwrap();
    assert_eq!((&manifest, &path), (&first.manifest, &first.path));
    // Whoever comes second gets what is there, and leaves nothing.
    let before = objects(&store).await;
    let second = create(&store, recipe("s"), 200).await.unwrap();
    assert!(second.existed);
    assert_eq!((second.manifest, objects(&store).await), (first.manifest.clone(), before));
    for other in [
        Recipe { spine_digest: "t".into(), ..recipe("s") },
        Recipe { seed: 1, ..recipe("s") },
        Recipe { statuses: true, ..recipe("s") },
        Recipe { visibility: "ingested".into(), ..recipe("s") },
        Recipe { name: "february".into(), ..recipe("s") },
        Recipe { sources: vec![("sales".into(), "abd".into())], ..recipe("s") },
    ] {
        assert_ne!(other.id(), recipe("s").id());
    }
    // A part that is gone or cut is said, not read.
    let part = folder_of(&path).join_path(&manifest.files[1].path);
    store.put(&part, PutPayload::from_static(b"PAR1")).await.unwrap();
    let text = find(&store, &project, &recipe("s")).await.unwrap_err().to_string();
    assert!(text.contains("part-00001.parquet") && text.contains("4 bytes"), "{text}");
    let stored = Arc::new(StoredDataset::open(store.clone(), &path).await.unwrap());
    let columns = stored.columns(&[]).unwrap();
    assert!(stored.read(&Selection::default(), &columns, 0).unwrap().try_collect::<Vec<_>>().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creators_at_once_agree() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let creators = (0..4).map(|_| {
        let store = store.clone();
        tokio::spawn(async move { create(&store, recipe("s"), 300).await })
    });
    let mut created = Vec::new();
    for creator in creators.collect::<Vec<_>>() {
        // One whose parts another has swept away already is told so; its next try finds the dataset.
        if let Ok(one) = creator.await.unwrap() {
            created.push(one);
        }
    }
    assert_eq!(created.iter().filter(|created| !created.existed).count(), 1);
    assert!(created.iter().all(|one| one.manifest == created[0].manifest));
    assert_eq!(objects(&store).await.len(), created[0].manifest.files.len() + 1);
}

/// A store that stops after some operations that change it, as if the process had been killed.
#[derive(Debug)]
struct Dying {
    store: Arc<dyn ObjectStore>,
    left: Arc<AtomicI64>,
}

impl Dying {
    fn step(left: &AtomicI64) -> object_store::Result<()> {
        if left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        Err(object_store::Error::Generic { store: "dying", source: "killed".into() })
    }
}

impl std::fmt::Display for Dying {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "dying {}", self.store)
    }
}

#[derive(Debug)]
struct DyingUpload(Box<dyn MultipartUpload>, Arc<AtomicI64>);

#[async_trait]
impl MultipartUpload for DyingUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match Dying::step(&self.1) {
            Ok(()) => self.0.put_part(data),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
    async fn complete(&mut self) -> object_store::Result<PutResult> {
        Dying::step(&self.1)?;
        self.0.complete().await
    }
    async fn abort(&mut self) -> object_store::Result<()> {
        Dying::step(&self.1)?;
        self.0.abort().await
    }
}

#[async_trait]
impl ObjectStore for Dying {
    async fn put_opts(&self, path: &Path, data: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        Dying::step(&self.left)?;
        self.store.put_opts(path, data, options).await
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Dying::step(&self.left)?;
        Ok(Box::new(DyingUpload(self.store.put_multipart_opts(path, options).await?, self.left.clone())))
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.store.get_opts(path, options).await
    }
    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.store.get_ranges(path, ranges).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        match Dying::step(&self.left) {
            Ok(()) => self.store.delete_stream(paths),
            Err(error) => Box::pin(futures::stream::once(std::future::ready(Err(error)))),
        }
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        Dying::step(&self.left)?;
        self.store.copy_opts(from, to, options).await
    }
}

/// What must be true whatever was cut off when: nothing, or all of it.
async fn nothing_or_all(store: &Arc<dyn ObjectStore>, count: i64) -> bool {
    let Some((_, path)) = find(store, &Path::from("test"), &recipe("s")).await.unwrap() else { return false };
    let dataset = Arc::new(StoredDataset::open(store.clone(), &path).await.unwrap());
    assert_eq!(read(&dataset, Selection::default()).await, (0..count).collect::<Vec<_>>());
    true
}

#[tokio::test]
async fn cut_off_at_any_write_there_is_nothing_or_all() {
    for steps in 0.. {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let left = Arc::new(AtomicI64::new(steps));
        let dying: Arc<dyn ObjectStore> = Arc::new(Dying { store: store.clone(), left: left.clone() });
        let ended = create(&dying, recipe("s"), 300).await;
        let there = nothing_or_all(&store, 300).await;
        assert!(there || ended.is_err());
        // The next run of the same recipe ends with the dataset and nothing else.
        let created = create(&store, recipe("s"), 300).await.unwrap();
        assert_eq!(created.existed, there);
        assert!(nothing_or_all(&store, 300).await);
        assert_eq!(objects(&store).await.len(), created.manifest.files.len() + 1);
        if left.load(Ordering::SeqCst) > 0 {
            assert!(steps > 4, "the store never failed where it mattered");
            break;
        }
    }
}

/// The process that is killed below: writes a dataset as slowly as it is told to.
#[tokio::test]
async fn kill_child() {
    let Some(folder) = std::env::var_os("COEVAL_TEST_KILLED_FOLDER") else { return };
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder).unwrap());
    let mut writer = writer(&store, recipe("s"));
    for start in (0..300).step_by(10) {
        writer.write(&rows(start..start + 10)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    writer.finish(Vec::new()).await.unwrap();
}

#[tokio::test]
async fn killed_at_any_time_there_is_nothing_or_all() {
    for after in [20, 60, 80, 100, 400] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dataset::tests::kill_child"])
            .env("COEVAL_TEST_KILLED_FOLDER", folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(after)).await;
        // SIGKILL; it may have ended before.
        let _ = child.kill();
        child.wait().unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
        nothing_or_all(&store, 300).await;
        // What the killed process left, seen or unseen by the store, goes with the next run.
        let project = folder.path().join("test/datasets/january").join(recipe("s").id());
        std::fs::create_dir_all(project.join("abandoned")).unwrap();
        std::fs::write(project.join("abandoned/part-00000.parquet#1"), b"half").unwrap();
        let mut writer = writer(&store, recipe("s")).with_local(Some(PathBuf::from(folder.path())));
        for start in (0..300).step_by(50) {
            writer.write(&rows(start..start + 50)).await.unwrap();
        }
        let created = writer.finish(Vec::new()).await.unwrap();
        assert!(nothing_or_all(&store, 300).await);
        let left: Vec<_> = std::fs::read_dir(&project).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(objects(&store).await.len(), created.manifest.files.len() + 1);
    }
}

#[tokio::test]
async fn an_attempt_that_is_given_up_leaves_nothing() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut writer = writer(&store, recipe("s"));
    writer.write(&rows(0..290)).await.unwrap();
    assert!(!objects(&store).await.is_empty());
    writer.discard().await;
    assert_eq!(objects(&store).await, BTreeSet::new());
}

/// As the first release wrote it: one file, and a manifest that says nothing of row groups, statuses and known-at rules.
#[tokio::test]
async fn datasets_of_format_1_are_read() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let folder = Path::from("test/datasets/old/0123456789abcdef");
    let mut part = Vec::new();
    let properties =
        parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(30)).build();
    let mut parquet = ArrowWriter::try_new(&mut part, rows(0..1).schema(), Some(properties)).unwrap();
    parquet.write(&rows(0..100)).unwrap();
    parquet.close().unwrap();
    let manifest = format!(
        r#"{{"format": 1, "name": "old", "id": "0123456789abcdef", "service": "selling", "service_digest": "d",
            "spine_digest": "s", "source_digests": {{"sales": "f"}}, "visibility": "known", "seed": 3, "rows": 100,
            "files": [{{"path": "part-0.parquet", "rows": 100, "bytes": {}}}],
            "columns": [{{"name": "shop", "type": "string"}}], "profile": {{}}, "created_at": "2013-01-01T00:00:00Z"}}"#,
        part.len()
    );
    store.put(&folder.clone().join("part-0.parquet"), PutPayload::from(part)).await.unwrap();
    let path = folder.join("manifest.json");
    store.put(&path, PutPayload::from(manifest.clone())).await.unwrap();
    let dataset = Arc::new(StoredDataset::open(store.clone(), &path).await.unwrap());
    assert_eq!(read(&dataset, Selection::default()).await, (0..100).collect::<Vec<_>>());
    let parts = dataset.parts(&Selection::default(), 9).unwrap();
    assert_eq!(parts.iter().map(|part| part.limit).collect::<Vec<_>>(), [30, 30, 30, 10]);
    let mut shuffled = read(&dataset, Selection { shuffle_seed: Some(1), ..Selection::default() }).await;
    shuffled.sort_unstable();
    assert_eq!(shuffled, (0..100).collect::<Vec<_>>());
    let newer = manifest.replace("\"format\": 1", "\"format\": 99");
    store.put(&path, PutPayload::from(newer)).await.unwrap();
    assert!(matches!(StoredDataset::open(store, &path).await, Err(DatasetError::Newer { found: 99, .. })));
}

/// Columns of all layouts, the same rows under different buffers.
fn columns(garbage: bool) -> RecordBatch {
    let hole = if garbage { 77 } else { 0 };
    let nulls = NullBuffer::from(vec![true, false, true, true, false, true]);
    let ints = Int64Array::new(ScalarBuffer::from(vec![1, hole, 3, 4, hole, 6]), Some(nulls.clone()));
    let floats =
        Float64Array::new(ScalarBuffer::from(vec![0.5, hole as f64, 2.0, -0.0, 1.0, 9.0]), Some(nulls.clone()));
    let text = if garbage { "aXXbcdYef" } else { "abcdef" };
    let offsets: Vec<i32> = if garbage { vec![0, 1, 3, 4, 6, 7, 9] } else { vec![0, 1, 1, 2, 4, 4, 6] };
    let strings = StringArray::new(
        arrow::buffer::OffsetBuffer::new(offsets.clone().into()),
        Buffer::from(text.as_bytes()),
        Some(nulls.clone()),
    );
    let inside = Float32Array::from(
        (0..*offsets.last().unwrap()).map(|i| text.as_bytes()[i as usize] as f32).collect::<Vec<_>>(),
    );
    let item = Arc::new(Field::new_list_field(DataType::Float32, true));
    let lists =
        ListArray::new(item, arrow::buffer::OffsetBuffer::new(offsets.into()), Arc::new(inside), Some(nulls.clone()));
    let bools = BooleanArray::from(vec![Some(true), None, Some(false), Some(true), None, Some(true)]);
    let names: DictionaryArray<Int8Type> = if garbage {
        let keys = arrow::array::Int8Array::from(vec![Some(2), None, Some(0), Some(2), None, Some(1)]);
        DictionaryArray::new(keys, Arc::new(StringArray::from(vec!["x", "y", "z", "unused"])))
    } else {
        vec![Some("z"), None, Some("x"), Some("z"), None, Some("y")].into_iter().collect()
    };
    let field: ArrayRef = Arc::new(ints.clone());
    let records = StructArray::new(vec![Field::new("a", DataType::Int64, true)].into(), vec![field], Some(nulls));
    let times = TimestampMicrosecondArray::from(vec![1, 2, 3, 4, 5, 6]).with_timezone("UTC");
    RecordBatch::try_from_iter_with_nullable([
        ("ints", Arc::new(ints) as ArrayRef, true),
        ("floats", Arc::new(floats), true),
        ("strings", Arc::new(strings), true),
        ("lists", Arc::new(lists), true),
        ("bools", Arc::new(bools), true),
        ("names", Arc::new(names), true),
        ("records", Arc::new(records), true),
        ("times", Arc::new(times), true),
    ])
    .unwrap()
}

#[test]
fn digests_are_of_rows_alone() {
    let table = columns(false);
    let schema = table.schema();
    let whole = table_digest(&schema, std::slice::from_ref(&table));
    assert_eq!(whole, table_digest(&schema, &[columns(true)]), "bytes under nulls, unused values");
    for cut in 0..=6 {
        let cut = [table.slice(0, cut), table.slice(cut, 6 - cut)];
        assert_eq!(whole, table_digest(&schema, &cut), "batches");
        let cut = [columns(true).slice(0, cut[0].num_rows()), cut[1].clone()];
        assert_eq!(whole, table_digest(&schema, &cut), "batches of different layout");
    }
    for column in 0..table.num_columns() {
        let mut changed: Vec<ArrayRef> = table.columns().to_vec();
        // The first and the third row change places.
        let order = Int64Array::from(vec![2, 1, 0, 3, 4, 5]);
        changed[column] = arrow::compute::take(&changed[column], &order, None).unwrap();
        let changed = RecordBatch::try_new(schema.clone(), changed).unwrap();
        assert_ne!(whole, table_digest(&schema, &[changed]), "{}", schema.field(column).name());
    }
    assert_ne!(whole, table_digest(&schema, &[table.slice(0, 5)]));
    assert_ne!(whole, table_digest(&schema, &[]));
    // Where one value ends and the next begins counts, and so does what a null is.
    let of = |values: Vec<Option<&str>>| {
        let batch = RecordBatch::try_from_iter([("s", Arc::new(StringArray::from(values)) as ArrayRef)]).unwrap();
        table_digest(&Arc::new(arrow::datatypes::Schema::new(vec![Field::new("s", DataType::Utf8, true)])), &[batch])
    };
    assert_ne!(of(vec![Some("ab"), Some("c")]), of(vec![Some("a"), Some("bc")]));
    assert_ne!(of(vec![Some(""), None]), of(vec![None, Some("")]));
}
