use arrow::array::{Array, Float64Array, StringArray, TimestampMicrosecondArray};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{SourceSchemas, compile_definitions};
use futures::TryStreamExt;
use object_store::PutPayload;
use object_store::memory::InMemory;

use super::*;

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64}]
    event_time: sold_at
feature_views:
  - {name: last, entity: shop, source: sales, features: [{name: amount, type: float64}]}
"#;

fn source(definitions: &str) -> Arc<SourcePlan> {
    let files = Files::new(vec![SourceFile { path: "defs.yaml".into(), text: definitions.into() }]);
    let plan = compile_definitions("p", &files, &SourceSchemas::new()).unwrap();
    plan.source("sales").unwrap().clone()
}

fn events(source: &SourcePlan, sequences: std::ops::Range<u64>) -> Positioned {
    let positions: Vec<Position> =
        sequences.map(|sequence| Position { time: 100 + sequence as i64, sequence }).collect();
    let times = positions.iter().map(|position| Some(position.time - 50)).collect::<TimestampMicrosecondArray>();
    let batch = RecordBatch::try_from_iter([
        ("shop", Arc::new(positions.iter().map(|_| Some("a")).collect::<StringArray>()) as ArrayRef),
        ("amount", Arc::new(positions.iter().map(|p| p.sequence as f64).collect::<Float64Array>())),
        ("sold_at", Arc::new(times.with_timezone("UTC"))),
    ]);
    Positioned { batch: source.align(&batch.unwrap(), None).unwrap(), positions }
}

async fn open(store: &Arc<dyn ObjectStore>) -> Result<History, HistoryError> {
    History::open(store.clone(), Path::from("p"), "sales").await
}

async fn sequences(history: &History, source: &Arc<SourcePlan>, after: Position) -> Vec<u64> {
    let parts: Vec<Positioned> = history.scan(source, None, after).try_collect().await.unwrap();
    for part in &parts {
        assert_eq!(part.batch.num_rows(), part.positions.len());
    }
    parts.iter().flat_map(|part| &part.positions).map(|position| position.sequence).collect()
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

#[tokio::test]
async fn what_was_appended_comes_back_in_order_and_from_any_position() {
    let (store, source) = (memory(), source(DEFINITIONS));
    let mut history = open(&store).await.unwrap();
    assert_eq!(history.manifest().applied, Position::START);
    assert_eq!(history.append(&source, &[events(&source, 1..4), events(&source, 4..6)], 0).await.unwrap(), 5);
    assert_eq!(history.append(&source, &[], 0).await.unwrap(), 0);
    history.append(&source, &[events(&source, 6..8)], 0).await.unwrap();
    let read = open(&store).await.unwrap();
    assert_eq!(read.manifest(), history.manifest());
    assert_eq!(sequences(&read, &source, Position::START).await, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(sequences(&read, &source, Position { time: 104, sequence: 4 }).await, [5, 6, 7]);
    let manifest = read.manifest();
    assert_eq!((manifest.applied, manifest.sequence_max), (Position { time: 107, sequence: 7 }, 7));
    let times: Vec<_> = manifest.files.iter().map(|file| (file.event_time_min, file.event_time_max)).collect();
    assert_eq!(times, [(Some(51), Some(55)), (Some(56), Some(57))], "one small file per append");
    let columns = Some(vec!["amount".to_owned()]);
    let parts: Vec<Positioned> = read.scan(&source, columns, Position::START).try_collect().await.unwrap();
    assert_eq!(parts[0].batch.num_columns(), 1);
}

#[tokio::test]
async fn events_at_or_before_what_is_applied_are_refused() {
    let (store, source) = (memory(), source(DEFINITIONS));
    let mut history = open(&store).await.unwrap();
    history.append(&source, &[events(&source, 1..3)], 0).await.unwrap();
    let error = history.append(&source, &[events(&source, 2..4)], 0).await.unwrap_err();
    assert!(matches!(error, HistoryError::Order { .. }), "{error}");
    assert_eq!(sequences(&history, &source, Position::START).await, [1, 2]);
}

#[tokio::test]
async fn parts_of_an_older_schema_are_read_with_nulls() {
    let (store, old) = (memory(), source(DEFINITIONS));
    let mut history = open(&store).await.unwrap();
    history.append(&old, &[events(&old, 1..3)], 0).await.unwrap();
    let new = source(
        &DEFINITIONS.replace("type: float64}]\n    event", "type: float64}, {name: more, type: int64}]\n    event"),
    );
    assert_eq!(new.schema.len(), 4);
    history.append(&new, &[events(&new, 3..4)], 0).await.unwrap();
    let parts: Vec<Positioned> = history.scan(&new, None, Position::START).try_collect().await.unwrap();
    let nulls: usize = parts.iter().map(|part| part.batch.column_by_name("more").unwrap().null_count()).sum();
    assert_eq!(nulls, 3);
}

#[tokio::test]
async fn damage_names_the_object_and_the_next_step() {
    let (store, source) = (memory(), source(DEFINITIONS));
    let mut history = open(&store).await.unwrap();
    history.append(&source, &[events(&source, 1..3)], 0).await.unwrap();
    let path = history.object_path(&history.manifest().files[0]);
    store.put(&path, PutPayload::from_static(b"PAR1 cut")).await.unwrap();
    let error = history.scan(&source, None, Position::START).try_collect::<Vec<_>>().await.unwrap_err();
    assert!(error.to_string().starts_with("p/history/sales/part-") && !error.is_retryable(), "{error}");
    assert!(error.to_string().ends_with("restore it from a backup of the object store"), "{error}");
    store.delete(&path).await.unwrap();
    let error = history.scan(&source, None, Position::START).try_collect::<Vec<_>>().await.unwrap_err();
    assert!(matches!(error, HistoryError::Store { .. }) && !error.is_retryable(), "{error}");
    for (text, expected) in [("{", "is damaged"), ("{}", "does not say its format"), ("{\"format\":3}", "has format 3")]
    {
        let manifest = Path::from("p/history/sales/manifest.json");
        store.put(&manifest, PutPayload::from_static(text.as_bytes())).await.unwrap();
        let error = open(&store).await.unwrap_err().to_string();
        assert!(error.starts_with("p/history/sales/manifest.json") && error.contains(expected), "{error}");
    }
}
