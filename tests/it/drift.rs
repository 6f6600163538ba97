//! What a model was trained on against what it is served, in a whole server: one feature moves, another does not.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR, SECOND};
use inference::echo::EchoRuntime;
use proto::v1;
use proto::v1::register_model_request::Part;
use tests::column::{doubles, strings};
use tests::{ManualClock, Project, Server};

const SETTINGS: &str = "project: drifts\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\nserving_log: off\n";

const DEFINITIONS: &str = r#"
requests:
  - {name: trip, fields: [{name: length, type: float64}, {name: weight, type: float64, nullable: true}, {name: kind, type: string}]}
feature_services:
  - {name: trips, features: ["trip:length", "trip:weight", "trip:kind"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["trip:length", "trip:weight"], missing: 0.0}]
    outputs: [{name: score, dtype: float32}]
    batching: {max_rows: 64, max_queue_rows: 4096}
"#;

/// Noon.
const T0: Micros = 1_700_000_000 * SECOND / DAY * DAY + 12 * HOUR;
const ROWS: u64 = 6_000;

/// Numbers that look independent, the same ones each time.
fn noise(seed: u64, row: u64) -> f64 {
    let mut x = (row << 20 | seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

fn length(seed: u64, row: u64) -> f64 {
    (0..4).map(|part| noise(seed + part, row)).sum::<f64>()
}

fn weight(seed: u64, row: u64) -> Option<f64> {
    (noise(seed + 10, row) > 0.005).then(|| 100.0 * noise(seed + 11, row))
}

fn kind(seed: u64, row: u64) -> &'static str {
    ["bus", "tram", "train", "boat"][(4.0 * noise(seed + 20, row)) as usize]
}

fn spine() -> RecordBatch {
    let times = (0..ROWS).map(|row| T0 - 30 * DAY + row as i64 * 600 * SECOND / 10);
    RecordBatch::try_from_iter([
        ("length", Arc::new(Float64Array::from_iter_values((0..ROWS).map(|row| length(1, row)))) as ArrayRef),
        ("weight", Arc::new((0..ROWS).map(|row| weight(1, row)).collect::<Float64Array>())),
        ("kind", Arc::new((0..ROWS).map(|row| Some(kind(1, row))).collect::<StringArray>())),
        ("event_timestamp", Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC"))),
    ])
    .unwrap()
}

async fn register(server: &Server, bytes: &[u8], dataset: &str) -> u32 {
    let header = v1::ModelHeader {
        project: "drifts".into(),
        model: "delay".into(),
        author: "ada".into(),
        commit: "4b825dc".into(),
        environment_digest: "sha256:env".into(),
        hardware: "2 cores".into(),
        dataset: dataset.into(),
        importances: [("trip:length".to_owned(), 3.0), ("trip:kind".to_owned(), 1.0)].into(),
        ..v1::ModelHeader::default()
    };
    let parts = [Part::Header(header), Part::Chunk(bytes.to_vec())];
    let parts: Vec<_> = parts.into_iter().map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
    let version = server.control.clone().register_model(futures::stream::iter(parts)).await.unwrap();
    let version = version.into_inner().version;
    let request = v1::DeployModelRequest {
        project: "drifts".into(),
        model: "delay".into(),
        version,
        who: "ada".into(),
        why: "a test".into(),
    };
    server.control.clone().deploy_model(request).await.unwrap();
    version
}

/// Asks about some rows, 50 at a time and each lot at its own time, with the lengths moved by `shift`.
async fn serve(server: &Server, clock: &ManualClock, version: u32, rows: std::ops::Range<u64>, shift: f64) {
    for from in rows.clone().step_by(50) {
        let lot = || from..rows.end.min(from + 50);
        let kinds: Vec<Option<&str>> = lot().map(|row| Some(kind(5, row))).collect();
        let request = v1::PredictRequest {
            project: "drifts".into(),
            model: "delay".into(),
            version,
            rows: vec![
                doubles("length", &lot().map(|row| Some(length(5, row) + shift)).collect::<Vec<_>>()),
                doubles("weight", &lot().map(|row| weight(5, row)).collect::<Vec<_>>()),
                strings("kind", &kinds),
            ],
            ..v1::PredictRequest::default()
        };
        let answer = server.gateway.clone().predict(request).await.unwrap().into_inner();
        assert!(answer.outcomes.iter().all(|outcome| outcome.status() == v1::RowStatus::Ok));
        clock.advance(7 * SECOND);
    }
}

fn asked(version: u32) -> v1::GetDriftRequest {
    v1::GetDriftRequest {
        project: "drifts".into(),
        model: "delay".into(),
        version,
        from: T0 - HOUR,
        to: T0 + 3 * HOUR,
        ..v1::GetDriftRequest::default()
    }
}

/// The verdict when so many rows are counted: that is done behind the answers.
async fn drift(server: &Server, request: v1::GetDriftRequest, rows: u64) -> v1::GetDriftResponse {
    for _ in 0..600 {
        let answer = server.control.clone().get_drift(request.clone()).await.unwrap().into_inner();
        if answer.rows >= rows {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{rows} rows are not counted after 30 s");
}

/// Waits until rows are counted, outputs too: until then nobody has looked for the profile.
async fn profiled(server: &Server, version: u32) {
    for _ in 0..600 {
        let answer = server.control.clone().get_drift(asked(version)).await;
        let is_there = |answer: &v1::GetDriftResponse| answer.features.iter().any(|feature| feature.name == "score");
        if answer.as_ref().is_ok_and(|answer| is_there(answer.get_ref())) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the outputs are not profiled after a minute");
}

fn verdicts(answer: &v1::GetDriftResponse) -> Vec<(&str, &str)> {
    answer.features.iter().map(|feature| (feature.name.as_str(), feature.verdict.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feature_that_moves_drifts_and_the_others_do_not() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let clock = ManualClock::at(T0);
    let runtime = Arc::new(EchoRuntime::new());
    let server = Server::start(&project, &clock, Some(runtime.clone())).await.unwrap();
    let made = server.dataset("trips", "spring", spine()).await.unwrap();
    assert_eq!(made.num_rows() as u64, ROWS);
    assert!(made.schema().fields().iter().all(|field| !field.name().starts_with("__")), "{:?}", made.schema());
    let version = register(&server, b"one", "spring").await;
    profiled(&server, version).await;

    // As in training; before a restart and after it, in the same hour.
    serve(&server, &clock, version, 0..1_000, 0.0).await;
    drift(&server, asked(version), 1_000).await;
    server.stop().await.unwrap();
    let server = Server::start(&project, &clock, Some(runtime.clone())).await.unwrap();
    profiled(&server, version).await;
    serve(&server, &clock, version, 1_000..3_000, 0.0).await;
    let same = drift(&server, asked(version), 3_000).await;
    assert_eq!((same.rows, same.uncounted_rows, same.arm.as_str()), (3_000, 0, "champion"), "{}", same.report);
    assert_eq!(
        verdicts(&same),
        [("trip:length", "STABLE"), ("trip:weight", "STABLE"), ("trip:kind", "STABLE"), ("score", "STABLE")],
        "{}",
        same.report
    );

    // The same version asked by its number is another arm; there the lengths are longer.
    let second = register(&server, b"two", "spring").await;
    profiled(&server, second).await;
    serve(&server, &clock, second, 0..3_000, 0.6).await;
    let named = v1::GetDriftRequest { arm: "named".into(), histograms: true, ..asked(second) };
    let moved = drift(&server, named.clone(), 3_000).await;
    let found = verdicts(&moved);
    assert_eq!(
        found[..3],
        [("trip:length", "DRIFT"), ("trip:weight", "STABLE"), ("trip:kind", "STABLE")],
        "{}",
        moved.report
    );
    assert_eq!(moved.verdict, "DRIFT");
    let report: serde_json::Value = serde_json::from_str(&moved.report).unwrap();
    // Three quarters of what the model leans on has moved.
    assert_eq!(report["report"]["weighted"]["drifted"].as_f64(), Some(0.75), "{}", moved.report);
    let drawn = report["histograms"].as_array().unwrap();
    assert_eq!(drawn.len(), 4);
    let shares =
        |side: &str| drawn[0]["bins"].as_array().unwrap().iter().map(|bin| bin[side].as_f64().unwrap()).sum::<f64>();
    assert!((shares("reference") - 1.0).abs() < 1e-9 && (shares("share") - 1.0).abs() < 1e-9);
    // One feature alone is judged as one.
    let alone = v1::GetDriftRequest { features: vec!["trip:kind".into()], ..named.clone() };
    assert_eq!(verdicts(&drift(&server, alone, 3_000).await), [("trip:kind", "STABLE")]);
    // The first version was not touched by it.
    assert_eq!(drift(&server, asked(version), 3_000).await.rows, 3_000);

    // Nothing was served in another window: that is not enough, and no mistake.
    let quiet = v1::GetDriftRequest { from: T0 + 20 * HOUR, to: T0 + 22 * HOUR, ..asked(version) };
    let quiet = server.control.clone().get_drift(quiet).await.unwrap().into_inner();
    assert_eq!((quiet.rows, quiet.verdict.as_str()), (0, "INSUFFICIENT_DATA"));

    // Who knows nothing says so.
    let without = register(&server, b"three", "").await;
    let status = server.control.clone().get_drift(asked(without)).await.unwrap_err();
    assert!(status.message().contains("without the dataset"), "{status}");
    for (request, text) in [
        (v1::GetDriftRequest { model: "dealy".into(), ..asked(1) }, "delay"),
        (v1::GetDriftRequest { version: 77, ..asked(1) }, "has no version 77"),
        (v1::GetDriftRequest { arm: "champoin".into(), ..asked(version) }, "champion"),
        (v1::GetDriftRequest { features: vec!["trip:lenght".into()], ..asked(version) }, "trip:length"),
        (v1::GetDriftRequest { to: T0 - 2 * HOUR, ..asked(version) }, "begin before it ends"),
        (v1::GetDriftRequest { to: T0 + 90 * DAY, ..asked(version) }, "at most 744 hours"),
    ] {
        let status = server.control.clone().get_drift(request).await.unwrap_err();
        assert!(status.message().contains(text), "{status}");
    }
    server.stop().await.unwrap();
}
