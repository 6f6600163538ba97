//! What a rollout is judged by beside what is counted at the request, found out by a whole server: an evaluation before it starts,
//! the traffic that there is, rows that are replayed, losses as labels come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use feature_defs::time::{Micros, floor_to};
use feature_defs::window::{DAY, HOUR, SECOND};
use gateway::answer::Gateway;
use gateway::rollout::drifted::drift_evidence;
use gateway::rollout::holdout::{self, HoldoutAsked};
use gateway::rollout::losses::{LossesAsked, losses};
use gateway::rollout::skew::{self, Known};
use gateway::rollout::traffic::{TrafficAsked, traffic};
use inference::echo::EchoRuntime;
use inference::model::{Artefact, LoadError, LoadOptions, Model, ModelError, ModelSpec, Runtime};
use inference::tensor::{Tensor, TensorData};
use offline_store::rollout::rows::{Stage, StageKind, VersionOf};
use offline_store::serving_log;
use proto::v1;
use proto::v1::register_model_request::Part;
use registry::assignment::{Ramp, Range, Traffic};
use tests::column::{bools, doubles, int64s, strings, timestamps};
use tests::{ManualClock, Project, Server};

const SETTINGS: &str =
    "project: judged\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\nserving_log: {sample: 100%, flush: 1s}\n";

const DEFINITIONS: &str = r#"
entities:
  - {name: plane, keys: [{name: plane, type: string}]}
sources:
  - name: hops
    stream: true
    schema: [{name: plane, type: string}, {name: miles, type: float64}]
    event_time: landed_at
feature_views:
  - {name: last, entity: plane, source: hops, features: [{name: miles, type: float64, default: 0.0}]}
requests:
  - {name: trip, fields: [{name: length, type: float64}]}
feature_services:
  - {name: trips, features: ["last:miles", "trip:length"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["trip:length"], missing: 0.0}]
    outputs: [{name: p, dtype: float32}]
    decision: "p > 0.5"
    label: {name: late, type: bool, within: 4h}
    batching: {max_rows: 64, max_queue_rows: 4096}
"#;

const POLICY: &str = r#"{
  "canary": {"unit": "plane", "steps": [5000, 10000], "bake_us": 1, "min_units": 1, "ends_after_us": 86400000000, "success": [{"metric": "brier"}]},
  "guardrails": [{"text": "error_rate < 1%", "measure": {"share": "error_rate"}, "side": "below", "bound": 0.01},
    {"text": "p99 < 10s", "measure": {"slower_than": 10.0}, "side": "below", "bound": 0.01}]
}"#;

const PLANES: usize = 12;
const ROUNDS: usize = 5;

/// A model whose score is the length of the trip, or half of it: its bytes say which.
struct Scaled(EchoRuntime);

struct ScaledModel {
    echo: Box<dyn Model>,
    factor: f32,
}

impl Runtime for Scaled {
    fn load(&self, artefact: &Artefact, spec: &ModelSpec, options: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        let factor = if artefact.bytes.starts_with(b"half") { 0.5 } else { 1.0 };
        Ok(Box::new(ScaledModel { echo: self.0.load(artefact, spec, options)?, factor }))
    }
}

impl Model for ScaledModel {
    fn spec(&self) -> &ModelSpec {
        self.echo.spec()
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let outputs = self.echo.forward(inputs)?.into_iter().map(|output| {
            let shape = output.shape().to_vec();
            match output.into_data() {
                TensorData::Float32(values) => {
                    let scaled = values.iter().map(|value| value * self.factor).collect();
                    Tensor::try_new(shape, TensorData::Float32(scaled)).unwrap()
                }
                other => Tensor::try_new(shape, other).unwrap(),
            }
        });
        Ok(outputs.collect())
    }
}

fn planes() -> Vec<String> {
    (0..PLANES).map(|plane| format!("N{plane}")).collect()
}

async fn register(server: &Server, bytes: &[u8]) -> u32 {
    let header = v1::ModelHeader {
        project: "judged".into(),
        model: "delay".into(),
        author: "ada".into(),
        commit: "4b825dc".into(),
        environment_digest: "sha256:env".into(),
        hardware: "2 cores".into(),
        dataset: "spring".into(),
        ..v1::ModelHeader::default()
    };
    let parts = [Part::Header(header), Part::Chunk(bytes.to_vec())];
    let parts: Vec<_> = parts.into_iter().map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
    let version = server.control.clone().register_model(futures::stream::iter(parts)).await.unwrap();
    let version = version.into_inner().version;
    let request = v1::DeployModelRequest {
        project: "judged".into(),
        model: "delay".into(),
        version,
        who: "ada".into(),
        why: "a test".into(),
    };
    server.control.clone().deploy_model(request).await.unwrap();
    server.wait_ready().await.unwrap();
    version
}

/// Trips of each plane: one that was late and as long as it can be, and one that was neither.
fn spine(t0: Micros, label: Option<&str>) -> RecordBatch {
    let rows = 2 * PLANES;
    let names: Vec<String> = (0..rows).map(|row| format!("N{}", row / 2)).collect();
    let lengths = (0..rows).map(|row| if row % 2 == 0 { 1.0 } else { 0.0 });
    let times = vec![t0 - DAY; rows];
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("plane", Arc::new(StringArray::from(names))),
        ("length", Arc::new(Float64Array::from_iter_values(lengths))),
        ("event_timestamp", Arc::new(TimestampMicrosecondArray::from(times).with_timezone("UTC"))),
    ];
    if let Some(label) = label {
        let late = (0..rows).map(|row| Some(row % 2 == 0)).collect::<BooleanArray>();
        columns.push((label, Arc::new(late)));
    }
    RecordBatch::try_from_iter(columns).unwrap()
}

/// All planes ask at once, round after round; in the second they are late.
async fn serve(server: &Server, clock: &ManualClock) {
    let (planes, mut gateway) = (planes(), server.gateway.clone());
    let names: Vec<Option<&str>> = planes.iter().map(|plane| Some(plane.as_str())).collect();
    for round in 0..ROUNDS {
        let request = v1::PredictRequest {
            project: "judged".into(),
            model: "delay".into(),
            request_id: format!("round {round}"),
            rows: vec![strings("plane", &names), doubles("length", &[Some(0.25 * round as f64); PLANES])],
            ..v1::PredictRequest::default()
        };
        let answer = gateway.predict(request).await.unwrap().into_inner();
        assert!(answer.outcomes.iter().all(|outcome| outcome.status() == v1::RowStatus::Ok && outcome.version == 1));
        clock.advance(30 * SECOND);
    }
}

async fn logged(gateway: &Gateway) -> usize {
    let (store, root) = (gateway.registry.log().store(), gateway.registry.root());
    let mut rows = 0;
    for file in serving_log::files(store, root, "trips", Micros::MIN, Micros::MAX).await.unwrap() {
        rows += serving_log::read(store, &file).await.unwrap().map_or(0, |rows| rows.batch.num_rows());
    }
    rows
}

async fn label(server: &Server) {
    for round in 0..ROUNDS {
        let id = format!("round {round}");
        let request = v1::AddLabelsRequest {
            project: "judged".into(),
            model: "delay".into(),
            columns: vec![
                strings("request_id", &[Some(id.as_str()); PLANES]),
                int64s("row", &(0..PLANES as i64).map(Some).collect::<Vec<_>>()),
                bools("late", &[Some(round == 1); PLANES]),
            ],
            ..v1::AddLabelsRequest::default()
        };
        server.control.clone().add_labels(request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rollout_is_judged_by_is_found_out_beside_requests() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    // Labels are added by the wall clock, so the server's must not be far from it.
    let t0 = floor_to(chrono::Utc::now().timestamp_micros(), HOUR);
    let clock = ManualClock::at(t0);
    let runtime = Arc::new(Scaled(EchoRuntime::new()));
    let server = Server::start(&project, &clock, Some(runtime)).await.unwrap();
    let (names, miles): (Vec<String>, Vec<Option<f64>>) =
        planes().into_iter().enumerate().map(|(plane, name)| (name, Some(plane as f64 * 1.5))).unzip();
    let names: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    let landed = timestamps("landed_at", &[Some(t0 - 2 * DAY); PLANES]);
    server.push("hops", vec![strings("plane", &names), doubles("miles", &miles), landed]).await.unwrap();
    server.flush().await.unwrap();
    server.dataset("trips", "spring", spine(t0, Some("late"))).await.unwrap();
    server.dataset("trips", "bare", spine(t0, None)).await.unwrap();
    assert_eq!((register(&server, b"whole").await, register(&server, b"half").await), (1, 2));
    let gateway = server.running.gateway().clone();
    let policy = serde_json::from_str(POLICY).unwrap();

    // Before anything starts.
    let asked = |dataset: &str| HoldoutAsked {
        model: "delay".into(),
        champion: Some(1),
        challenger: 2,
        dataset: dataset.into(),
        policy: serde_json::from_str(POLICY).unwrap(),
        unit: vec!["plane".into()],
    };
    let found = holdout::evaluate(&gateway, &asked("spring")).await.unwrap();
    assert_eq!((found.rows, found.labelled), (24, 24));
    let flips = found.flips.as_ref().unwrap();
    assert_eq!((flips.rows, flips.flipped), (24, 12), "half of a whole trip is not more than a half");
    let brier = |scores: &holdout::Scores| scores.success["brier"];
    assert_eq!((brier(&found.challenger), brier(found.champion.as_ref().unwrap())), (0.125, 0.0));
    let difference = found.difference.as_ref().unwrap();
    assert_eq!((difference.units, difference.metric.as_str()), (12, "brier"));
    assert!((difference.estimate - 0.125).abs() < 1e-6, "{difference:?}");
    assert!(found.notes.iter().any(|note| note.contains("trained on this dataset")), "{:?}", found.notes);
    for (dataset, text) in [("sprang", "spring"), ("bare", "has no column `late`")] {
        let error = holdout::evaluate(&gateway, &asked(dataset)).await.unwrap_err();
        assert!(error.contains(text), "{error}");
    }

    serve(&server, &clock).await;
    label(&server).await;
    let begun = Instant::now();
    while logged(&gateway).await < PLANES * ROUNDS {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} rows are logged", logged(&gateway).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    clock.advance(HOUR);

    let plan = gateway.served().model("delay", 1).unwrap().plan.clone();
    let version = |number| VersionOf { number, plan: plan.clone() };
    let asked = TrafficAsked {
        champion: version(1),
        policy,
        unit: vec!["plane".into()],
        window: 60 * SECOND,
        evaluation: Some(found),
    };
    let found = traffic(&gateway, asked).await.unwrap();
    // 60 rows in the one hour there has been, of twelve planes.
    assert_eq!(found.traffic.rows_per_day, 1_440.0, "{:?}", found.notes);
    assert_eq!(found.traffic.units_by_day, [12]);
    let means: Vec<(u64, Option<f64>)> =
        found.traffic.guardrails.iter().map(|tally| (tally.units, tally.sums().mean())).collect();
    assert_eq!(means, [(12, Some(0.0)), (12, Some(0.0))]);
    // Two rounds lie within a minute: one of 0 that was not late, one of a quarter that was.
    let (brier, hoped) = &found.traffic.success[0];
    assert_eq!((brier.units, *hoped), (12, 0.0), "what is worse is not hoped for");
    assert!((brier.sums().mean().unwrap() - 0.5625 / 2.0).abs() < 1e-6);
    assert_eq!(found.traffic.flip_rate, 0.5);

    // Everything that was served is what history says.
    let plan_of_all = gateway.served().plan().unwrap().clone();
    let asked = skew::Asked {
        service: plan.service.clone(),
        model: "delay".into(),
        versions: BTreeMap::from([(1, plan.clone())]),
        logged_from: t0 - HOUR,
    };
    let mut known = Known::default();
    let found = skew::skew(&gateway, &plan_of_all, &asked, &known).await.unwrap();
    known.add(found);
    assert_eq!((known.audited_rows, known.skew_rows), (60, 0), "{known:?}");

    // A canary of which the champion has half of the planes; nobody asked the challenger.
    let traffic = Traffic { layer: "delay".into(), seed: "s".into(), ranges: vec![Range::ALL] };
    let asked = LossesAsked {
        policy: serde_json::from_str(POLICY).unwrap(),
        champion: version(1),
        challenger: version(2),
        unit: vec!["plane".into()],
        ramp: Ramp::new(&traffic, None),
        stages: vec![Stage { entry: 7, from: t0, kind: StageKind::Canary(5_000) }],
        window: 60 * SECOND,
        logged_from: t0,
        now: t0 + HOUR,
    };
    let found = losses(&gateway, asked).await.unwrap();
    let counted = found.counts.total(7, |_| true);
    assert_eq!(counted.fresh[2].units, found.metrics[0].counted);
    assert!((1..12).contains(&counted.fresh[2].units), "{found:?}");
    assert!((counted.fresh[2].sums().mean().unwrap() - 0.5625 / 2.0).abs() < 1e-6);

    let drifted = drift_evidence(&gateway, ("delay", 1), "champion", (t0, t0 + HOUR), vec!["*".into()]).await;
    assert_eq!(drifted.evidence.acknowledged, ["*"]);
    // Rows that came before the version's profile was read are told, and not counted.
    let uncounted = drifted.notes.iter().any(|note| note.contains("60 rows were answered and not counted"));
    assert!(drifted.rows == 60 || uncounted, "{} {:?}", drifted.rows, drifted.notes);
    server.stop().await.unwrap();
}
