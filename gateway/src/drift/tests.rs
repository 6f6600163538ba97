//! What several gateways count is what one would have counted, whatever the object store does meanwhile.

use std::sync::atomic::Ordering;

use arrow::array::{ArrayRef, Float64Array, RecordBatch, TimestampMicrosecondArray, UInt8Array};
use drift::counts::Outcome;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{ModelPlan, SourceSchemas, compile_definitions};
use feature_defs::value::Type;
use object_store::memory::InMemory;
use offline_store::profile::{Collector, ProfiledColumn, Profiles};

use super::profiles::VersionProfiles;
use super::snapshot::Window;
use super::*;
use crate::observe::tests::observed;
use crate::observe::{About, AboutModel, Observed, ObservedPrediction, Observer};
use crate::predict::{RowOutcome, RowStatus};
use crate::serving_log::tests::Away;

const NOON: Micros = 1_000 * DAY + DAY / 2;

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64}, {name: secret, type: float64}]
    event_time: sold_at
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    features: [{name: amount, type: float64, default: 7.0}, {name: secret, type: float64}]
requests:
  - {name: visit, fields: [{name: people, type: float64}]}
feature_services:
  - {name: selling, features: ["last_sale:*", "visit:people"]}
models:
  - name: sells
    features: selling
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["*"], missing: 0.0}]
    outputs: [{name: p, dtype: float32}, {name: embedding, dtype: float32}]
"#;

fn plan() -> Arc<ModelPlan> {
    let files = Files::new(vec![SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() }]);
    compile_definitions("shops", &files, &SourceSchemas::new()).unwrap().model("sells").unwrap().clone()
}

fn column(values: impl Iterator<Item = f64>) -> ArrayRef {
    Arc::new(Float64Array::from_iter_values(values))
}

/// A training set of 640 rows whose amounts are 0 to 9.
fn profiles(plan: &ModelPlan, largest: i32) -> VersionProfiles {
    let rows = || 0..640_i32;
    let buckets = || Arc::new(UInt8Array::from_iter_values(rows().map(|row| (row % 64) as u8))) as ArrayRef;
    let at = TimestampMicrosecondArray::from_iter_values(rows().map(i64::from)).with_timezone("UTC");
    let batch = RecordBatch::try_from_iter([
        ("event_timestamp", Arc::new(at) as ArrayRef),
        ("last_sale:amount", column(rows().map(|row| f64::from(row % largest)))),
        ("last_sale:secret", column(rows().map(|row| f64::from(row % largest)))),
        ("visit:people", column(rows().map(|row| f64::from(row % 3)))),
        ("__block:last_sale", buckets()),
        ("__block:(row)", buckets()),
        ("p", Arc::new(arrow::array::Float32Array::from_iter_values(rows().map(|row| row as f32))) as ArrayRef),
    ])
    .unwrap();
    let finish = |mut collector: Collector| {
        collector.add(&batch).unwrap();
        let mut recounts = collector.recounts(2).unwrap();
        recounts.iter_mut().for_each(|recount| recount.add(&batch).unwrap());
        collector.exact(recounts).unwrap()
    };
    let features: Profiles = finish(Collector::new(&batch.schema(), &plan.service).unwrap().unwrap());
    let outputs = ["p"].map(|name| ProfiledColumn {
        name: name.into(),
        value_type: Type::Float32,
        blocks: vec!["last_sale".into()],
    });
    let outputs = Collector::of_columns(&batch.schema(), &outputs, "selling".into(), "d".into()).unwrap().unwrap();
    VersionProfiles::new(format!("digest {largest}"), "spring".into(), features, Some(finish(outputs)), None)
}

/// An answer of version 3, whose first row got a fallback.
fn answer(plan: &Arc<ModelPlan>, shops: &[&str], time: Micros) -> Observed {
    let outcome = |row: usize| RowOutcome {
        status: if row == 0 { RowStatus::Fallback } else { RowStatus::Answered },
        reason: String::new(),
        cause: None,
        waited: None,
        cached: false,
    };
    let scores: ArrayRef =
        Arc::new((0..shops.len()).map(|row| Some(row as f32)).collect::<arrow::array::Float32Array>());
    let prediction = ObservedPrediction {
        plan: plan.clone(),
        version: 3,
        arm: "champion",
        outputs: vec![("p".into(), scores, Type::Float32)],
        rows: (0..shops.len()).map(outcome).collect(),
        encoded: Vec::new(),
        queue_time: Duration::ZERO,
        forward_time: Duration::ZERO,
        exposed: None,
    };
    Observed { prediction: Some(prediction), ..observed(&plan.service, shops, time) }
}

struct World {
    store: Arc<dyn ObjectStore>,
    plan: Arc<ModelPlan>,
    root: Path,
}

impl World {
    fn over(store: Arc<dyn ObjectStore>) -> World {
        World { store, plan: plan(), root: Path::from("root/shops") }
    }

    fn version(&self) -> Version {
        ("sells".into(), 3)
    }

    /// A gateway that knows the bins of version 3.
    fn gateway(&self, address: &str) -> (Arc<Drift>, Counting) {
        let parts = DriftParts { store: self.store.clone(), root: self.root.clone(), gateway: address.to_owned() };
        let drift = Drift::new(parts, DriftMetrics::default());
        self.know(&drift, 10);
        (drift.clone(), Counting::new(drift))
    }

    fn know(&self, drift: &Drift, largest: i32) {
        let known = Known::Ready(Arc::new(profiles(&self.plan, largest)));
        drift.lock().known.insert(self.version(), known);
    }

    async fn window(&self, from: Micros, to: Micros) -> Window {
        snapshot::read(&self.store, &self.root, &self.version(), from, to).await.unwrap()
    }
}

/// Answers of one to five rows at some minutes of two hours.
fn answers(plan: &Arc<ModelPlan>) -> Vec<Observed> {
    let shops = ["a", "n1", "b", "x1", "c"];
    let answers = (0..120_i64).map(|minute| {
        let shops = &shops[..1 + (minute * 7 % 5) as usize];
        answer(plan, shops, NOON + minute * 60_000_000)
    });
    answers.collect()
}

#[tokio::test]
async fn what_two_gateways_count_is_what_one_counts() {
    let together = World::over(Arc::new(InMemory::new()));
    let apart = World::over(Arc::new(InMemory::new()));
    let (one, mut counting) = together.gateway("127.0.0.1:1");
    let mut several = [apart.gateway("127.0.0.1:1"), apart.gateway("127.0.0.1:2"), apart.gateway("127.0.0.1:1")];
    for (number, answer) in answers(&together.plan).iter().enumerate() {
        counting.observe(answer);
        let (drift, counting) = &mut several[number % 3];
        counting.observe(answer);
        // Flushed at any time, again and again: nothing is counted twice.
        if number % 7 == 0 {
            drift.flush(answer.time).await.unwrap();
        }
    }
    one.flush(NOON).await.unwrap();
    for (drift, _) in &several {
        drift.flush(NOON).await.unwrap();
    }
    let (from, to) = (NOON, NOON + 2 * HOUR);
    let (together, apart) = (together.window(from, to).await, apart.window(from, to).await);
    assert_eq!((together.objects, apart.objects), (2, 6));
    assert_eq!(together.arms, apart.arms);
    let arm = &together.arms["champion"];
    let rows: u64 = (0..120).map(|minute| 1 + minute * 7 % 5).sum();
    assert_eq!((arm.rows, arm.uncounted.is_empty()), (rows, true));
    let amount = arm.features["last_sale:amount"].outcomes();
    assert_eq!(amount.rows(), rows);
    // Of five rows the second is not known and gets its default, and of the fourth the store said nothing.
    let with = |place: u64| (0..120).filter(|minute| minute * 7 % 5 >= place).count() as u64;
    assert_eq!((amount.total(Outcome::Defaulted), amount.total(Outcome::Fallback)), (with(1), with(3)));
    let secret = arm.features["last_sale:secret"].outcomes();
    assert_eq!((secret.total(Outcome::Null), secret.total(Outcome::Fallback)), (with(1), with(3)));
    let output = arm.outputs["p"].outcomes();
    assert_eq!((output.total(Outcome::Fallback), output.total(Outcome::Value)), (120, rows - 120));
}

#[tokio::test]
async fn windows_are_whole_hours() {
    let world = World::over(Arc::new(InMemory::new()));
    let (drift, mut counting) = world.gateway("gate:1");
    for hour in 0..30 {
        counting.observe(&answer(&world.plan, &["a", "b"], NOON + hour * HOUR + 5));
    }
    drift.flush(NOON).await.unwrap();
    for (from, to, hours) in [(0, 30, 30), (0, 1, 1), (11, 14, 3), (29, 40, 1), (30, 60, 0)] {
        let window = world.window(NOON + from * HOUR, NOON + to * HOUR).await;
        assert_eq!(window.arms.get("champion").map_or(0, |arm| arm.rows), 2 * hours, "{from} to {to}");
    }
    // Written and over, they are let go of; the next answer begins the hour's own counts.
    drift.flush(NOON + 40 * HOUR).await.unwrap();
    assert_eq!(drift.lock().hours.bytes(), 0);
}

#[tokio::test]
async fn an_object_store_that_is_away_costs_nothing_until_memory_ends() {
    let store = Arc::new(Away::default());
    let world = World::over(store.clone());
    let (drift, mut counting) = world.gateway("gate:1");
    store.is_away.store(true, Ordering::SeqCst);
    for hour in 0..3 {
        counting.observe(&answer(&world.plan, &["a", "b", "c"], NOON + hour * HOUR));
        assert!(drift.flush(NOON + hour * HOUR).await.unwrap_err().contains("away"));
    }
    let waits = |drift: &Drift| {
        let state = drift.lock();
        (state.hours.waiting(), state.hours.unwritten(), state.hours.lost, state.failing.is_some())
    };
    assert_eq!(waits(&drift), (3, 9, 0, true));
    store.is_away.store(false, Ordering::SeqCst);
    drift.flush(NOON + 9 * HOUR).await.unwrap();
    assert_eq!(waits(&drift), (0, 0, 0, false));
    assert_eq!(world.window(NOON, NOON + 3 * HOUR).await.arms["champion"].rows, 9);

    // With room for two hours, the oldest of four go, and are told.
    let (drift, mut counting) = world.gateway("gate:2");
    store.is_away.store(true, Ordering::SeqCst);
    counting.observe(&answer(&world.plan, &["a"], NOON + 100 * HOUR));
    let one = drift.lock().hours.bytes();
    drift.lock().hours.bytes_max = 2 * one;
    for hour in 101..104 {
        counting.observe(&answer(&world.plan, &["a"], NOON + hour * HOUR));
    }
    assert_eq!(waits(&drift), (2, 2, 2, false));
    store.is_away.store(false, Ordering::SeqCst);
    drift.flush(NOON + 104 * HOUR).await.unwrap();
    let left = world.window(NOON + 100 * HOUR, NOON + 104 * HOUR).await;
    assert_eq!((left.objects, left.arms["champion"].rows), (2, 2));
}

#[tokio::test]
async fn rows_that_are_not_counted_are_said_to_be() {
    let world = World::over(Arc::new(InMemory::new()));
    let (drift, mut counting) = world.gateway("gate:1");
    drift.lock().known.clear();
    counting.observe(&answer(&world.plan, &["a", "b"], NOON));
    assert!(matches!(drift.lock().known.get(&world.version()), Some(Known::Wanted)), "somebody looks for its profile");
    drift.lock().known.insert(world.version(), Known::Without { why: "it names no dataset".into() });
    counting.observe(&answer(&world.plan, &["a", "b", "c"], NOON));
    let model = AboutModel { name: "sells".into(), version: 3, arm: "champion", rollout: None };
    counting.dropped(&About { service: "selling".into(), model: Some(model) }, NOON, 50);
    // Features alone have no model that was trained on them.
    counting.observe(&observed(&world.plan.service, &["a"], NOON));
    drift.flush(NOON).await.unwrap();
    let arm = world.window(NOON, NOON + HOUR).await.arms["champion"].clone();
    let uncounted: Vec<(&str, u64)> = arm.uncounted.iter().map(|(cause, rows)| (cause.as_str(), *rows)).collect();
    assert_eq!((arm.rows, uncounted), (0, vec![("no_profile", 3), ("profile_loading", 2), ("queue_full", 50)]));
}

#[tokio::test]
async fn a_profile_that_changes_keeps_what_still_fits() {
    let world = World::over(Arc::new(InMemory::new()));
    let (drift, mut counting) = world.gateway("gate:1");
    counting.observe(&answer(&world.plan, &["a", "b"], NOON));
    // Another look that finds the same.
    world.know(&drift, 10);
    counting.observe(&answer(&world.plan, &["a", "b"], NOON));
    // The amounts have other bins now, the numbers of people the same.
    world.know(&drift, 12);
    counting.observe(&answer(&world.plan, &["a", "b"], NOON));
    drift.flush(NOON).await.unwrap();
    let arm = world.window(NOON, NOON + HOUR).await.arms["champion"].clone();
    let rows = |name: &str| arm.features[name].outcomes().rows();
    assert_eq!((rows("visit:people"), rows("last_sale:amount")), (6, 2));
    assert_eq!(arm.uncounted["profile_changed"], 4);
}

#[tokio::test]
async fn what_is_old_is_removed() {
    let world = World::over(Arc::new(InMemory::new()));
    let (drift, mut counting) = world.gateway("gate:1");
    for days in [0, 1, 89, 91] {
        counting.observe(&answer(&world.plan, &["a"], NOON + days * DAY));
    }
    drift.flush(NOON).await.unwrap();
    drift.sweep(NOON + 91 * DAY).await.unwrap();
    let left = world.window(NOON, NOON + 92 * DAY).await;
    assert_eq!(left.objects, 3, "what is younger than {KEPT_DAYS} days stays");
}

#[tokio::test]
async fn damaged_counts_are_left_out_and_told() {
    let world = World::over(Arc::new(InMemory::new()));
    let (drift, mut counting) = world.gateway("gate:1");
    counting.observe(&answer(&world.plan, &["a", "b"], NOON));
    drift.flush(NOON).await.unwrap();
    let written = snapshot::path(&world.root, &world.version(), NOON, &drift.gateway, &drift.incarnation);
    let bytes = world.store.get(&written).await.unwrap().bytes().await.unwrap();
    let whole = Snapshot::decode(&bytes).unwrap();
    assert_eq!(Snapshot::decode(&whole.encode().unwrap()).unwrap(), whole);
    for cut in [0, 5, 9, 20, bytes.len() - 1] {
        assert!(Snapshot::decode(&bytes[..cut]).is_err(), "{cut}");
    }
    let mut later = bytes.to_vec();
    later[8] = 2;
    assert!(Snapshot::decode(&later).unwrap_err().contains("format 2"));
    let other = snapshot::path(&world.root, &world.version(), NOON, "other", "life");
    world.store.put(&other, later.into()).await.unwrap();
    let window = world.window(NOON, NOON + HOUR).await;
    assert_eq!((window.arms["champion"].rows, window.damaged.len()), (2, 1));
    assert!(
        window.damaged[0].contains("other-life.bin") && window.damaged[0].contains("format 2"),
        "{:?}",
        window.damaged
    );
}
