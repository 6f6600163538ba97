use std::collections::BTreeMap;

use arrow::array::{
    Array, ArrayRef, BooleanArray, Float32Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array,
    new_null_array,
};
use arrow::datatypes::DataType;
use drift::sequential::exposure::{Arm, Exposure, Exposures, Options};
use drift::sequential::policy::Policy;
use drift::sequential::tally::{Cell, Counts, Tally};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{ModelPlan, Plan, SourceSchemas, compile_definitions};
use feature_defs::value::Type;
use feature_defs::window::{HOUR, MINUTE};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use proptest::prelude::*;
use registry::assignment::{KeyPart, Ramp, Range, Standing, Traffic, place};

use super::metric::{Outcome, Rate};
use super::rows::{LABELS_LATE, Stage, StageKind, VersionOf};
use super::units::{AloneAsked, Asked, Day, Losses, Progress, Until, alone, losses};
use super::*;
use crate::labels::{Labels, add};
use crate::serving_log::{FORMAT, Header, LogSchema, encode};

const DEFINITIONS: &str = r#"
entities:
  - {name: plane, keys: [{name: plane, type: string}]}
sources:
  - {name: states, files: states.parquet, event_time: at}
feature_views:
  - {name: state, entity: plane, source: states, freshness: 1h, features: [{name: age, type: float64}]}
feature_services:
  - {name: inputs, features: ["state:age"]}
models:
  - name: delay
    features: inputs
    runtime: torchscript
    inputs: [{name: x, dtype: float32, features: ["state:age"], missing: 0.0}]
    outputs: [{name: p, dtype: float32}]
    decision: "p > 0.5"
    label: {name: late, type: bool, within: 4h}
"#;

const POLICY: &str = r#"{
  "shadow": {"min_rows": 1, "max_skew_rows": 0, "drift": "hold", "ends_after_us": 1000000},
  "canary": {"unit": "plane", "steps": [2500, 5000], "bake_us": 0, "min_units": 1, "ends_after_us": 1000000,
    "success": [{"metric": "brier"}, {"metric": "paid", "lower_is_better": false, "range": [0.0, 10.0]}]},
  "guardrails": [
    {"text": "error_rate < 1%", "measure": {"share": "error_rate"}, "side": "below", "bound": 0.01},
    {"text": "error < 0.4", "measure": {"metric": "error"}, "side": "below", "bound": 0.4}]
}"#;

/// Where counts of the policy are: `error`, `brier`, `paid`.
const CANARY: [usize; 3] = [1, 2, 3];
/// Flips, slower, scores, two guardrails of either arm, then differences.
const SHADOW_ERROR: [usize; 2] = [4, 6];
const SHADOW_BRIER: usize = 7;

/// The server's clock runs a day behind the times of rows: nothing may mix the two up.
const CLOCK: Micros = -24 * HOUR;

#[derive(Debug, Clone)]
struct Logged {
    id: String,
    plane: Option<String>,
    at: Micros,
    score: Option<f32>,
    version: u32,
    arm: &'static str,
    sampled: &'static str,
}

fn logged(id: &str, plane: &str, at: Micros, score: f32, arm: &'static str) -> Logged {
    let version = if arm == "champion" { 1 } else { 2 };
    let (id, plane) = (id.to_owned(), (!plane.is_empty()).then(|| plane.to_owned()));
    Logged { id, plane, at, score: Some(score), version, arm, sampled: "key" }
}

struct World {
    store: Arc<dyn ObjectStore>,
    project: Path,
    plan: Plan,
    policy: Policy,
    ramp: Ramp,
}

impl World {
    fn new() -> World {
        let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text: DEFINITIONS.into() }]);
        let columns = [("plane", Type::String), ("at", Type::Timestamp), ("age", Type::Float64)];
        let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
        let plan = compile_definitions("p", &files, &SourceSchemas::from([("states".to_string(), columns)])).unwrap();
        let traffic = Traffic { layer: "delay".into(), seed: "s".into(), ranges: vec![Range::ALL] };
        World {
            store: Arc::new(InMemory::new()),
            project: Path::from("root/p"),
            plan,
            policy: serde_json::from_str(POLICY).unwrap(),
            ramp: Ramp::new(&traffic, None),
        }
    }

    fn model(&self) -> &Arc<ModelPlan> {
        self.plan.model("delay").unwrap()
    }

    fn version(&self, number: u32) -> VersionOf {
        VersionOf { number, plan: self.model().clone() }
    }

    /// Planes whose arm at shares of a quarter and a half is so.
    fn planes(&self, at_quarter: Standing, at_half: Standing) -> Vec<String> {
        let stands = |name: &String| {
            let at = |share| self.ramp.assign(&[KeyPart::Text(name)], share).0;
            (at(2_500), at(5_000)) == (at_quarter, at_half)
        };
        (0..200).map(|number| format!("N{number}")).filter(stands).collect()
    }

    async fn log(&self, number: u64, rows: &[Logged]) {
        let schema = LogSchema::of(&self.model().service, &[("p".to_owned(), Type::Float32)]);
        let many = rows.len();
        let texts =
            |of: &dyn Fn(&Logged) -> Option<String>| Arc::new(rows.iter().map(of).collect::<StringArray>()) as ArrayRef;
        let times = |of: &dyn Fn(&Logged) -> Micros| {
            let times = rows.iter().map(|row| Some(of(row))).collect::<TimestampMicrosecondArray>();
            Arc::new(times.with_timezone("UTC")) as ArrayRef
        };
        let columns = schema.schema.fields().iter().map(|field| match field.name().as_str() {
            "request_id" => texts(&|row| Some(row.id.clone())),
            "in:plane" => texts(&|row| row.plane.clone()),
            "sampled" => texts(&|row| Some(row.sampled.to_owned())),
            "status" => texts(&|row| Some(if row.score.is_some() { "ok" } else { "failed" }.to_owned())),
            "arm" => texts(&|row| Some(row.arm.to_owned())),
            "at" => times(&|row| row.at),
            "time" => times(&|row| row.at + CLOCK),
            // Of a view that may be an hour old.
            "event_time:state" => times(&|row| row.at - if row.id.ends_with("old") { 2 * HOUR } else { HOUR }),
            "version" => Arc::new(rows.iter().map(|row| Some(row.version)).collect::<UInt32Array>()),
            "total_us" => Arc::new(UInt32Array::from(vec![5_000; many])),
            "output:p" => Arc::new(rows.iter().map(|row| row.score).collect::<Float32Array>()),
            _ if field.is_nullable() => new_null_array(field.data_type(), many),
            _ if *field.data_type() == DataType::Utf8 => texts(&|_| Some(String::new())),
            _ => {
                let nulls = new_null_array(field.data_type(), many).to_data().into_builder().nulls(None);
                arrow::array::make_array(nulls.build().unwrap())
            }
        });
        let batch = RecordBatch::try_new(schema.schema.clone(), columns.collect()).unwrap();
        let at = || rows.iter().map(|row| row.at);
        let (first_at, last_at) = (at().min().unwrap(), at().max().unwrap());
        let header = Header {
            format: FORMAT,
            project: "p".into(),
            gateway: String::new(),
            incarnation: "abc".into(),
            service: "inputs".into(),
            semantic_digest: self.model().service.semantic_digest.to_string(),
            model: Some("delay".into()),
            hashed: Vec::new(),
            first_at,
            last_at,
            first_time: first_at + CLOCK,
            last_time: last_at + CLOCK,
            rows: many as u64,
        };
        let mut bytes = Vec::new();
        encode(&header, &schema.schema, &[batch], &mut bytes).unwrap();
        let name = FileName { first_at, last_at, incarnation: "abc".into(), number };
        let path = Place::of("inputs", first_at + CLOCK).folder(&self.project).join(name.to_string());
        self.store.put(&path, bytes.into()).await.unwrap();
    }

    /// Labels of requests, added at a time of the server's clock.
    async fn label(&self, labels: &[(&str, bool)], added: Micros) {
        let (ids, values): (Vec<&str>, Vec<bool>) = labels.iter().copied().unzip();
        let ids: ArrayRef = Arc::new(StringArray::from(ids));
        let given = RecordBatch::try_from_iter([("request_id", ids), ("late", Arc::new(BooleanArray::from(values)))]);
        let labels = Labels::of(self.model(), None, &given.unwrap(), added, b"key").unwrap();
        add(&self.store, &self.project, self.model(), &labels, added).await.unwrap();
    }

    async fn pay(&self, id: &str, paid: f64, added: Micros) {
        let ids: ArrayRef = Arc::new(StringArray::from(vec![id]));
        let paid: ArrayRef = Arc::new(arrow::array::Float64Array::from(vec![paid]));
        let given = RecordBatch::try_from_iter([("request_id", ids), ("paid", paid)]).unwrap();
        let labels = Labels::of(self.model(), Some("paid"), &given, added, b"key").unwrap();
        add(&self.store, &self.project, self.model(), &labels, added).await.unwrap();
    }

    async fn losses(&self, stages: &[Stage], now: Micros) -> Losses {
        let asked = Asked {
            policy: &self.policy,
            champion: self.version(1),
            challenger: self.version(2),
            unit: &["plane".to_owned()],
            ramp: &self.ramp,
            stages,
            window: HOUR,
            logged_from: CLOCK,
            until: Until { now, late: Some(MINUTE) },
        };
        losses(&self.store, &self.project, &asked).await.unwrap()
    }

    fn bucket(&self, plane: &str) -> u16 {
        place("delay", &[KeyPart::Text(plane)]).bucket
    }
}

const STAGES: [Stage; 3] = [
    Stage { entry: 10, from: 0, kind: StageKind::Shadow },
    Stage { entry: 11, from: 10 * HOUR, kind: StageKind::Canary(2_500) },
    Stage { entry: 12, from: 20 * HOUR, kind: StageKind::Canary(5_000) },
];

fn tally(outcomes: &[f64]) -> Tally {
    let mut tally = Tally::default();
    outcomes.iter().for_each(|outcome| tally.add(*outcome));
    tally
}

/// The tally of one metric in one bucket, of units that were fresh and of those that were moved.
fn at(losses: &Losses, entry: u64, bucket: u16, metric: usize) -> (Tally, Tally) {
    let cell = losses.counts.total(entry, |of| of == bucket);
    let of = |tallies: &[Tally]| tallies.get(metric).copied().unwrap_or_default();
    (of(&cell.fresh), of(&cell.moved))
}

#[tokio::test]
async fn a_unit_is_counted_once_in_an_arm_with_the_mean_of_its_window() {
    let world = World::new();
    let stays = &world.planes(Standing::Champion, Standing::Champion)[0];
    let moves = &world.planes(Standing::Champion, Standing::Challenger)[0];
    let tried = &world.planes(Standing::Challenger, Standing::Challenger)[0];
    let rows = [
        logged("a", stays, 11 * HOUR, 0.75, "champion"),
        // Within its window, and beyond it.
        logged("b", stays, 12 * HOUR - 1, 0.5, "champion"),
        logged("c", stays, 12 * HOUR, 1.0, "champion"),
        logged("d", tried, 12 * HOUR, 0.25, "challenger"),
        // In both arms; the first ends where the second begins.
        logged("e", moves, 20 * HOUR - MINUTE, 0.5, "champion"),
        logged("f", moves, 20 * HOUR, 0.0, "challenger"),
        // A gateway that has not heard of the step yet: of the one before.
        logged("g", &world.planes(Standing::Champion, Standing::Challenger)[1], 20 * HOUR + 1, 0.5, "champion"),
        // Nobody's, and chosen by its outcome.
        logged("h", "", 12 * HOUR, 0.5, "champion"),
        Logged { sampled: "fallback", ..logged("i", stays, 11 * HOUR, 1.0, "champion") },
        // Of units that the champion has.
        logged("j", stays, 21 * HOUR, 1.0, "challenger"),
    ];
    world.log(1, &rows).await;
    let all = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"].map(|id| (id, true));
    world.label(&all, CLOCK).await;
    let found = world.losses(&STAGES, 100 * HOUR).await;

    let brier = |entry, plane: &str| at(&found, entry, world.bucket(plane), CANARY[1]);
    assert_eq!(brier(11, stays), (tally(&[(0.0625 + 0.25) / 2.0]), Tally::default()));
    assert_eq!(brier(11, tried), (tally(&[0.5625]), Tally::default()));
    assert_eq!(brier(11, moves), (tally(&[0.25]), Tally::default()));
    assert_eq!(brier(12, moves), (Tally::default(), tally(&[1.0])));
    assert_eq!(found.counts.total(11, |_| true).fresh[CANARY[1]].units, 4);
    // 0.5 is not more than a half: `error` of "b" is 1, and so is that of "d".
    assert_eq!(at(&found, 11, world.bucket(stays), CANARY[0]).0, tally(&[0.5]));
    // Rates are not known by labels, and nobody has said what was paid.
    assert_eq!(found.counts.total(11, |_| true).fresh[0], Tally::default());
    let brier = Progress { metric: "brier".into(), counted: 5, ..Progress::default() };
    let paid = Progress { metric: "paid".into(), unlabelled: 5, ..Progress::default() };
    assert_eq!(found.metrics[1..], [brier, paid]);
    assert_eq!((found.rows, found.without_unit, found.misplaced), (7, 1, 1));
}

#[tokio::test]
async fn what_was_counted_stays_whatever_is_corrected() {
    let world = World::new();
    let planes = world.planes(Standing::Challenger, Standing::Challenger);
    let [one, two, three] = [&planes[0], &planes[1], &planes[2]];
    let start = 11 * HOUR;
    let rows = [
        logged("a", one, start, 0.5, "challenger"),
        logged("b", two, start, 0.5, "challenger"),
        logged("c", two, start + 1, 1.0, "challenger"),
        logged("d", three, start, 0.0, "challenger"),
    ];
    world.log(1, &rows).await;
    let clock = start + CLOCK;
    world.label(&[("a", true), ("b", true)], clock + HOUR).await;
    // The window is open.
    let found = world.losses(&STAGES, start + HOUR).await;
    assert_eq!((found.metrics[1].open, found.metrics[1].counted), (3, 0));
    // Only one unit has all its labels.
    let first = world.losses(&STAGES, start + 2 * HOUR).await;
    assert_eq!((first.metrics[1].counted, first.metrics[1].waiting), (1, 2));
    world.label(&[("a", false), ("c", false)], clock + 2 * HOUR).await;
    world.pay("a", 4.0, clock + 2 * HOUR).await;
    // The labels' time is over: the second is counted with the labels it has, the third has none.
    let over = start + 1 + 4 * HOUR + LABELS_LATE;
    let last = world.losses(&STAGES, over).await;
    let expected = Progress { metric: "brier".into(), counted: 2, unlabelled: 1, ..Progress::default() };
    assert_eq!(last.metrics[1], expected);
    let of = |found: &Losses, plane: &str| at(found, 11, world.bucket(plane), CANARY[1]).0;
    assert_eq!(of(&last, one), of(&first, one));
    assert_eq!(of(&last, two), tally(&[(0.25 + 1.0) / 2.0]));
    // More is better, and 4 of 10 was paid.
    assert_eq!(at(&last, 11, world.bucket(one), CANARY[2]).0, tally(&[0.4]));
    // Too late for a unit that was given up.
    world.label(&[("d", true), ("a", false), ("b", false)], over + CLOCK + 1).await;
    assert_eq!(world.losses(&STAGES, over + 100 * HOUR).await.counts, last.counts);
}

#[tokio::test]
async fn shadow_compares_the_same_rows() {
    let world = World::new();
    let rows = [
        logged("a", "N1", HOUR, 0.5, "champion"),
        logged("b", "N1", HOUR + MINUTE, 0.75, "champion"),
        logged("c", "N1", 3 * HOUR, 1.0, "champion"),
        logged("shed", "N2", HOUR, 0.5, "champion"),
        logged("d", "N3", HOUR, 0.0, "champion"),
    ];
    let failed = Logged { score: None, ..logged("d", "N3", HOUR, 0.0, "shadow") };
    let shadows = [
        logged("a", "N1", HOUR, 1.0, "shadow"),
        logged("b", "N1", HOUR + MINUTE, 0.5, "shadow"),
        logged("c", "N1", 3 * HOUR, 0.0, "shadow"),
        failed,
    ];
    world.log(1, &shadows).await;
    world.log(2, &rows).await;
    world.label(&[("a", true), ("b", true), ("c", true), ("d", true), ("shed", true)], CLOCK).await;
    let found = world.losses(&STAGES, 100 * HOUR).await;
    let of = |plane: &str, metric| at(&found, 10, world.bucket(plane), metric);
    // (0 − 0.25 + 0.25 − 0.0625)/2 = −0.03125, counted as (d + 1)/2; one pair lies beyond the window.
    assert_eq!(of("N1", SHADOW_BRIER), (tally(&[0.484_375]), Tally::default()));
    // No score is the worst there is: as bad as a certain one that was wrong.
    assert_eq!(of("N3", SHADOW_BRIER).0, tally(&[0.5]));
    assert_eq!(of("N1", SHADOW_ERROR[0]).0, tally(&[0.5]));
    assert_eq!(of("N1", SHADOW_ERROR[1]).0, tally(&[0.5]));
    assert_eq!(of("N2", SHADOW_BRIER).0, Tally::default());
    // What would have been paid is not known of who answered nobody.
    assert_eq!(found.metrics[2], Progress { metric: "paid".into(), ..Progress::default() });
}

#[tokio::test]
async fn a_champion_alone_says_what_to_expect() {
    let world = World::new();
    let rows = [
        logged("a", "N1", 0, 0.5, "champion"),
        logged("b-old", "N1", MINUTE, 0.5, "champion"),
        Logged { score: None, ..logged("c", "N2", 25 * HOUR, 0.0, "champion") },
        logged("d", "N1", 26 * HOUR, 0.5, "champion"),
        logged("e", "N1", 27 * HOUR, 0.5, "shadow"),
        logged("f", "", 27 * HOUR, 0.5, "champion"),
    ];
    world.log(1, &rows).await;
    world.label(&[("a", true), ("b-old", false), ("c", true)], CLOCK).await;
    let success = &world.policy.canary.as_ref().unwrap().success[0];
    let outcomes = [
        Outcome::Happened(Rate::Errors),
        Outcome::Happened(Rate::Stale),
        Outcome::Happened(Rate::SlowerThan(4_999.0)),
        Outcome::of_success(success),
    ];
    let asked = AloneAsked {
        champion: world.version(1),
        unit: &["plane".to_owned()],
        outcomes: &outcomes,
        window: HOUR,
        from: 0,
        until: Until { now: 100 * HOUR, late: None },
        logged_from: CLOCK,
    };
    let found = alone(&world.store, &world.project, &asked).await.unwrap();
    assert_eq!(found.tallies, [tally(&[0.0, 1.0]), tally(&[0.5, 0.0]), tally(&[1.0, 1.0]), tally(&[0.25, 1.0])]);
    assert_eq!(found.units_by_day, [Day { units: 1, known: 0 }, Day { units: 2, known: 1 }]);
    assert_eq!((found.rows, found.without_unit, found.times), (4, 1, Some((0, 26 * HOUR))));
}

/// What a gateway would have counted that had known all labels when it answered.
fn counted_at_once(rows: &[Logged], labels: &BTreeMap<String, bool>) -> Counts {
    let mut exposures = Exposures::new(Options { window_us: HOUR, open_max: 1_000 });
    let mut rows: Vec<&Logged> = rows.iter().collect();
    rows.sort_by_key(|row| (row.at, row.arm, row.id.clone()));
    for row in rows {
        let plane = row.plane.as_deref().unwrap();
        let placed = place("delay", &[KeyPart::Text(plane)]);
        let arm = if row.arm == "champion" { Arm::Champion } else { Arm::Challenger };
        let step = if row.at < 20 * HOUR { 11 } else { 12 };
        let exposure = Exposure { unit: placed.unit, bucket: placed.bucket, arm, step, now_us: row.at };
        let score = f64::from(row.score.unwrap());
        let outcomes: Vec<(usize, f64)> = match labels.get(&row.id) {
            Some(late) => {
                let truth = f64::from(u8::from(*late));
                let error = f64::from(u8::from((score > 0.5) != *late));
                vec![(CANARY[0], error), (CANARY[1], (score - truth) * (score - truth))]
            }
            None => Vec::new(),
        };
        exposures.record(exposure, &outcomes);
    }
    exposures.close(Micros::MAX);
    exposures.counts().clone()
}

/// Without how many came, which only who answers counts, and what holds nothing then.
fn tallies(counts: &Counts) -> BTreeMap<(u64, u16), Cell> {
    let cells =
        counts.steps.iter().flat_map(|(step, cells)| cells.iter().map(|(bucket, cell)| ((*step, *bucket), cell)));
    let emptied = |tallies: &[Tally]| {
        let mut tallies = tallies.to_vec();
        tallies.resize(CANARY[2] + 1, Tally::default());
        tallies
    };
    let bare = |cell: &Cell| Cell { opened: 0, fresh: emptied(&cell.fresh), moved: emptied(&cell.moved) };
    let nothing = bare(&Cell::default());
    cells.map(|(place, cell)| (place, bare(cell))).filter(|(_, cell)| *cell != nothing).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// In whatever order and files rows come to the log, and whatever is corrected, units count as they would have when they
    /// were answered.
    #[test]
    fn units_of_the_log_are_those_that_were_answered(
        drawn in prop::collection::vec((0_usize..12, 0_i64..1_200, 0_u32..=16, 0_u8..4, 0_u64..5), 1..60),
        flips in prop::collection::vec(any::<bool>(), 60),
    ) {
        let world = World::new();
        let rows: Vec<Logged> = drawn.iter().enumerate().map(|(number, (plane, minute, score, _, _))| {
            let (plane, at) = (format!("N{plane}"), 10 * HOUR + minute * MINUTE);
            let share = if at < 20 * HOUR { 2_500 } else { 5_000 };
            let arm = match world.ramp.assign(&[KeyPart::Text(&plane)], share).0 {
                Standing::Challenger => "challenger",
                _ => "champion",
            };
            logged(&format!("r{number}"), &plane, at, *score as f32 / 16.0, arm)
        }).collect();
        // Three of four have a label, and some of them are corrected.
        let labels: BTreeMap<String, bool> = drawn.iter().zip(&rows).zip(&flips)
            .filter(|(((_, _, _, label, _), _), _)| *label > 0)
            .map(|(((_, _, _, label, _), row), flip)| (row.id.clone(), (*label > 1) != *flip))
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found: Vec<Losses> = [false, true].into_iter().map(|reversed| runtime.block_on(async {
            let world = World::new();
            let mut files: BTreeMap<u64, Vec<Logged>> = BTreeMap::new();
            for (row, (_, _, _, _, file)) in rows.iter().zip(&drawn) {
                files.entry(if reversed { 9 - *file / 2 } else { *file }).or_default().push(row.clone());
            }
            for (number, mut rows) in files {
                if reversed {
                    rows.reverse();
                }
                world.log(number, &rows).await;
            }
            let given: Vec<(&str, bool)> = labels.iter().map(|(id, late)| (id.as_str(), *late)).collect();
            let corrected: Vec<(&str, bool)> = given.iter().step_by(3).map(|(id, late)| (*id, !late)).collect();
            if !given.is_empty() {
                let (first, second) = if reversed { (&corrected, &given) } else { (&given, &corrected) };
                let added = |batch: &Vec<(&str, bool)>| if batch.len() == given.len() { CLOCK } else { CLOCK + 1 };
                // Files of labels may come in any order too: what was added first is what they say.
                if corrected.len() < given.len() {
                    world.label(first, added(first)).await;
                    world.label(second, added(second)).await;
                } else {
                    world.label(&given, CLOCK).await;
                }
            }
            world.losses(&STAGES[1..], 1_000 * HOUR).await
        })).collect();
        // The stages begin with the canary here.
        let expected = tallies(&counted_at_once(&rows, &labels));
        prop_assert_eq!(tallies(&found[0].counts), expected);
        prop_assert_eq!(&found[0].counts, &found[1].counts);
        prop_assert_eq!(found[0].misplaced, 0);
    }
}
