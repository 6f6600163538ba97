//! The profile of a dataset is what counting its rows gives, whoever counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{Float64Type, UInt8Type};
use drift::counts::Outcome;
use drift::verdict::{Feature, Policy, Verdict, judge};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::forgotten::{Forgotten, KeyHash, SALT_BYTES};
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions};
use feature_defs::value::Type;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use tempfile::TempDir;

use super::*;
use crate::dataset::redact::redact;
use crate::dataset::{self, Created, DatasetWriter, Recipe, Selection, StoredDataset};
use crate::point_in_time::Order;
use crate::{Engine, EngineOptions, ProfiledSet, TrainingSetRequest};

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - {name: sales, files: sales.parquet, event_time: sold_at}
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    ttl: 2d
    freshness: 6h
    features: [{name: amount, type: float64, default: 7.0}, {name: clerk, type: string}]
  - name: busy
    entity: shop
    source: sales
    windows: [1d]
    aggregates: [{name: sales, function: count}]
requests:
  - {name: visit, fields: [{name: basket, type: float64}]}
transforms:
  - name: both
    inputs: [last_sale, busy, visit]
    features:
      - {name: per_sale, expr: "last_sale.amount / (busy.sales_1d + 1)"}
      - {name: share, expr: "visit.basket / (last_sale.amount + 1.0)"}
      - {name: since, expr: "event_time(last_sale)"}
feature_services:
  - {name: selling, features: ["last_sale:*", "busy:*", "both:*", "visit:basket"]}
"#;

const HOUR: i64 = 3_600_000_000;
const SHOPS: i64 = 5;

fn plan() -> Plan {
    let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text: DEFINITIONS.into() }]);
    let columns =
        [("shop", Type::String), ("sold_at", Type::Timestamp), ("amount", Type::Float64), ("clerk", Type::String)];
    let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
    let schemas = SourceSchemas::from([("sales".to_string(), columns)]);
    compile_definitions("test", &files, &schemas).unwrap()
}

struct World {
    engine: Engine,
    plan: Plan,
    store: Arc<dyn ObjectStore>,
    _folder: TempDir,
}

/// Sales every three hours in each shop, none for a day and a half in between, amounts that repeat every 17.
fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let sales = || (0..800_i64).flat_map(|n| (0..SHOPS).map(move |shop| (n, shop))).filter(|(n, _)| n % 97 < 85);
    let batch = RecordBatch::try_from_iter([
        ("shop", Arc::new(sales().map(|(_, shop)| Some(format!("s{shop}"))).collect::<StringArray>()) as ArrayRef),
        (
            "sold_at",
            Arc::new(
                TimestampMicrosecondArray::from_iter_values(sales().map(|(n, _)| 3 * n * HOUR)).with_timezone("UTC"),
            ),
        ),
        (
            "amount",
            Arc::new(
                sales()
                    .map(|(n, shop)| (n % 13 != 0).then_some((n * 7 + shop) as f64 % 17.0))
                    .collect::<Float64Array>(),
            ),
        ),
        (
            "clerk",
            Arc::new(sales().map(|(n, shop)| Some(format!("clerk {}", (n + shop) % 4))).collect::<StringArray>()),
        ),
    ])
    .unwrap();
    let file = std::fs::File::create(folder.path().join("sales.parquet")).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let engine = Engine::new(EngineOptions {
        project_folder: folder.path().to_path_buf(),
        project: "test".into(),
        store: store.clone(),
        prefix: Path::default(),
        memory_bytes: 256 << 20,
        spill_folder: None,
    });
    World { engine: engine.unwrap(), plan: plan(), store, _folder: folder }
}

/// Four rows in each hour.
fn spine(hours: std::ops::Range<i64>, basket: f64) -> RecordBatch {
    let rows = || hours.clone().flat_map(|hour| (0..4).map(move |n| (hour, n)));
    RecordBatch::try_from_iter([
        (
            "shop",
            Arc::new(rows().map(|(hour, n)| Some(format!("s{}", (hour * 4 + n) % SHOPS))).collect::<StringArray>())
                as ArrayRef,
        ),
        (
            "event_timestamp",
            Arc::new(
                TimestampMicrosecondArray::from_iter_values(rows().map(|(hour, n)| hour * HOUR + n))
                    .with_timezone("UTC"),
            ),
        ),
        (
            "basket",
            Arc::new(Float64Array::from_iter_values(
                rows().map(|(hour, n)| basket + ((hour * 31 + n * 17) % 101) as f64),
            )),
        ),
    ])
    .unwrap()
}

impl World {
    async fn create(&self, name: &str, spine: RecordBatch) -> Created {
        let service = self.plan.service("selling").unwrap().clone();
        let request = TrainingSetRequest {
            service: service.clone(),
            spine_schema: spine.schema(),
            spine: vec![spine],
            statuses: true,
            visibility: None,
            order: Order::Spine,
        };
        let ProfiledSet { mut set, whole_schema } = self.engine.profiled_training_set(request).await.unwrap();
        let recipe = Recipe {
            name: name.into(),
            service,
            spine_digest: name.into(),
            sources: set.sources.clone(),
            visibility: "known".into(),
            statuses: true,
            seed: 0,
            created_at: "2013-01-01T00:00:00Z".into(),
        };
        let writer = DatasetWriter::create(self.store.clone(), &self.engine.project_path(), recipe, whole_schema);
        let mut writer = writer.with_seen(set.schema.fields().len());
        while let Some(batch) = set.stream.next().await {
            writer.write(&batch.unwrap()).await.unwrap();
        }
        writer.finish(Vec::new()).await.unwrap()
    }

    async fn open(&self, created: &Created) -> (Arc<StoredDataset>, Profiles) {
        let stored = StoredDataset::open(self.store.clone(), &created.path).await.unwrap();
        let profiles = dataset::profiles(&self.store, &created.path, &stored.manifest).await.unwrap().unwrap();
        (Arc::new(stored), profiles)
    }
}

async fn rows_of(stored: &Arc<StoredDataset>, columns: &[usize]) -> RecordBatch {
    let batches: Vec<RecordBatch> =
        stored.read(&Selection::default(), columns, 0).unwrap().try_collect().await.unwrap();
    concat_batches(&batches[0].schema(), &batches).unwrap()
}

#[tokio::test]
async fn the_profile_of_a_dataset_is_what_counting_it_gives() {
    let world = world();
    let created = world.create("spring", spine(10..1_500, 0.0)).await;
    let (stored, profiles) = world.open(&created).await;
    assert!(profiles.exact);
    assert_eq!((profiles.rows, profiles.from, profiles.to), (5_960, Some(10 * HOUR), Some(1_499 * HOUR + 3)));
    let names: Vec<&str> = profiles.features.iter().map(|feature| feature.name.as_str()).collect();
    let service = world.plan.service("selling").unwrap();
    assert_eq!(names, service.outputs.iter().map(|output| output.name.as_str()).collect::<Vec<_>>());
    // Readers see none of what lies behind, whoever asks how.
    let seen: Vec<&str> = stored.schema.fields().iter().map(|field| field.name().as_str()).collect();
    assert!(seen.iter().all(|name| !name.starts_with("__")), "{seen:?}");
    assert_eq!(stored.columns(&[]).unwrap().len(), seen.len());
    assert!(stored.whole_schema().column_with_name("__block:last_sale").is_some());

    let counted = count(&stored, &profiles).await.unwrap();
    for (feature, counts) in profiles.features.iter().zip(&counted.counts) {
        let (reference, counts) = (feature.profile.reference(), counts.as_ref().unwrap());
        assert_eq!(reference.outcomes(), counts.outcomes(), "{}", feature.name);
        // Of categories the reference knows which would not have been seen, by leaving rows out.
        if feature.name != "last_sale:clerk" {
            assert_eq!(reference, counts, "{}", feature.name);
        }
    }

    // And by hand, from what readers see.
    let all = rows_of(&stored, &stored.columns(&[]).unwrap()).await;
    let amount = all.column_by_name("last_sale:amount").unwrap().as_primitive::<Float64Type>().clone();
    let status = all.column_by_name("last_sale:amount__status").unwrap().as_primitive::<UInt8Type>().clone();
    let (mut defaults, mut bins) = (0, BTreeMap::<i64, u64>::new());
    for row in 0..all.num_rows() {
        match (status.value(row), amount.is_valid(row)) {
            (1, true) => *bins.entry(amount.value(row) as i64).or_default() += 1,
            (_, true) => defaults += 1,
            _ => panic!("the default fills every null"),
        }
    }
    let profile = profiles.feature("last_sale:amount").unwrap();
    let outcomes = profile.profile.reference().outcomes();
    assert!(defaults > 300, "{defaults}");
    assert_eq!(outcomes.total(Outcome::Defaulted), defaults);
    assert!(outcomes.total(Outcome::Stale) > 100, "{}", outcomes.total(Outcome::Stale));
    // 17 values make 17 atoms, with nothing under, between or over them.
    let part = &profile.profile.reference().parts()[0];
    let counted: BTreeMap<i64, u64> = part
        .totals()
        .into_iter()
        .enumerate()
        .filter(|(_, rows)| *rows > 0)
        .map(|(bin, rows)| (profile.profile.layout().label(0, bin).parse().unwrap(), rows))
        .collect();
    assert_eq!(counted, bins);
}

#[tokio::test]
async fn blocks_are_source_rows_windows_and_rows() {
    let world = world();
    let created = world.create("spring", spine(10..1_500, 0.0)).await;
    let (stored, profiles) = world.open(&created).await;
    let blocks = |name: &str| profiles.feature(name).unwrap().blocks.clone();
    assert_eq!(blocks("last_sale:amount"), "last_sale");
    assert_eq!(blocks("busy:sales_1d"), "busy[1d]");
    assert_eq!(blocks("visit:basket"), "(row)");
    assert!(["last_sale", "busy[1d]"].contains(&&*blocks("both:per_sale")));
    assert_eq!((blocks("both:share"), blocks("both:since")), ("last_sale".into(), "last_sale".into()));

    // Rows that one sale answered are in one bucket: by shop, between two sales.
    let whole = stored.whole_schema().clone();
    let names = ["shop", "event_timestamp", "__block:last_sale", "__block:busy[1d]"];
    let columns: Vec<usize> = names.iter().map(|name| whole.index_of(name).unwrap()).collect();
    let rows = rows_of(&stored, &columns).await;
    let shops = rows.column(0).as_string::<i32>();
    let at = rows.column(1).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
    let mut of_sales: BTreeMap<(String, i64), Vec<u8>> = BTreeMap::new();
    let mut of_days: BTreeMap<(String, i64), Vec<u8>> = BTreeMap::new();
    for row in 0..rows.num_rows() {
        let n = (0..=at.value(row) / (3 * HOUR)).rev().find(|n| n % 97 < 85).unwrap();
        if at.value(row) - 3 * n * HOUR <= 48 * HOUR {
            let sale = (shops.value(row).to_owned(), n);
            of_sales.entry(sale).or_default().push(rows.column(2).as_primitive::<UInt8Type>().value(row));
        }
        let day = (shops.value(row).to_owned(), at.value(row) / (24 * HOUR));
        of_days.entry(day).or_default().push(rows.column(3).as_primitive::<UInt8Type>().value(row));
    }
    for buckets in of_sales.values().chain(of_days.values()) {
        assert!(buckets.iter().all(|bucket| *bucket == buckets[0]), "{buckets:?}");
    }
    let used: std::collections::BTreeSet<u8> = of_sales.values().map(|buckets| buckets[0]).collect();
    assert_eq!(used.len(), 64);
}

#[tokio::test]
async fn a_dataset_is_judged_by_another() {
    let world = world();
    let training = world.create("spring", spine(10..1_500, 0.0)).await;
    let (_, profiles) = world.open(&training).await;
    for (name, basket, expected) in [("same", 0.0, Verdict::Stable), ("larger", 40.0, Verdict::Drift)] {
        let other = world.create(name, spine(1_500..2_390, basket)).await;
        let (stored, _) = world.open(&other).await;
        let counted = count(&stored, &profiles).await.unwrap();
        let features: Vec<Feature<'_>> = profiles
            .features
            .iter()
            .zip(&counted.counts)
            .map(|(feature, counts)| Feature {
                name: &feature.name,
                importance: None,
                profile: &feature.profile,
                serving: counts.as_ref().unwrap(),
            })
            .collect();
        let report = judge(&Policy::default(), &features).unwrap();
        let verdict = |name: &str| report.features.iter().find(|feature| feature.name == name).unwrap().verdict;
        assert_eq!(verdict("visit:basket"), expected, "{report}");
        assert_ne!(verdict("last_sale:clerk"), Verdict::Drift, "{report}");
    }
}

#[tokio::test]
async fn who_is_forgotten_is_in_no_profile() {
    let world = world();
    let created = world.create("spring", spine(10..1_500, 0.0)).await;
    let (_, before) = world.open(&created).await;
    let service = world.plan.service("selling").unwrap().clone();
    let salt = [7; SALT_BYTES];
    let key = feature_defs::plan::encode_entity_keys(
        &[(Arc::new(StringArray::from(vec!["s3"])) as ArrayRef, &Type::String)],
        1,
    );
    let hash = KeyHash::of(&salt, "shop", key.get(0).unwrap());
    let forgotten = Forgotten::new(&salt, [(Arc::from("shop"), hash)]);
    let gone = redact(&world.store, &created.path, &service, &forgotten, "2013-02-01T00:00:00Z", None).await.unwrap();
    assert_eq!(gone, 1_192);
    let (stored, after) = world.open(&created).await;
    assert_eq!((after.rows, before.rows), (5_960 - gone, 5_960));
    assert!(stored.schema.fields().iter().all(|field| !field.name().starts_with("__")));
    let counted = count(&stored, &after).await.unwrap();
    let basket = after.features.iter().position(|feature| feature.name == "visit:basket").unwrap();
    assert_eq!(counted.counts[basket].as_ref().unwrap(), after.features[basket].profile.reference());
    assert_eq!(after.features[basket].profile.reference().outcomes().rows(), after.rows);
    // The old file went with the old parts.
    let objects: Vec<_> = world.store.list(None).try_collect().await.unwrap();
    assert_eq!(objects.iter().filter(|object| object.location.as_ref().ends_with("profile.json")).count(), 1);
}

#[tokio::test]
async fn profiles_that_are_damaged_are_said_to_be() {
    let world = world();
    let created = world.create("spring", spine(10..200, 0.0)).await;
    let file = created.manifest.profiles.clone().unwrap();
    let path = Path::from(format!("{}/{}", dataset::folder_of(&created.path), file.path));
    let text = object_store::ObjectStoreExt::get(&*world.store, &path).await.unwrap().bytes().await.unwrap();
    let read = Profiles::from_bytes(&text).unwrap();
    assert_eq!(read.to_bytes(), text);
    let later = String::from_utf8(text.to_vec()).unwrap().replacen("\"format\":1", "\"format\":2", 1);
    assert!(Profiles::from_bytes(later.as_bytes()).unwrap_err().contains("format 2"));
    let changed = String::from_utf8(text.to_vec()).unwrap().replacen("selling", "selljng", 1);
    object_store::ObjectStoreExt::put(&*world.store, &path, changed.into_bytes().into()).await.unwrap();
    let error = dataset::profiles(&world.store, &created.path, &created.manifest).await.unwrap_err().to_string();
    assert!(error.contains("profile.json") && error.contains("damaged"), "{error}");
}
