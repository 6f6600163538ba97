//! What goes wrong with models and their callers, in a real server: a forward that never returns, callers who go away, and
//! a SIGTERM in the middle of it all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::register_model_request::Part;
use tests::Project;
use tests::column::doubles;
use tonic::Code;
use tonic::transport::Channel;

use crate::process::Process;

/// `endless.pt` returns the sum of its row, and never returns for sums above 1e9.
const DEFINITIONS: &str = r#"
requests:
  - {name: trip, fields: [{name: a, type: float64}]}
feature_services:
  - {name: trips, features: ["trip:a"]}
models:
  - name: endless
    features: trips
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["*"]}]
    outputs: [{name: score, dtype: float32}]
    slo: {deadline: 1s}
    batching: {max_rows: 4}
    fallback: {score: 0.5}
"#;

const SETTINGS: &str = "project: faults\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n";
const FOR_EVER: f64 = 2e9;

async fn start() -> (Project, Process) {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let process = Process::start_with(project.path(), &[]).await;
    let header = v1::ModelHeader {
        project: "faults".into(),
        model: "endless".into(),
        author: "ada".into(),
        commit: "4b825dc".into(),
        environment_digest: "sha256:env".into(),
        hardware: "2 cores".into(),
        ..v1::ModelHeader::default()
    };
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../inference/tests/data/endless.pt");
    let parts = [Part::Header(header), Part::Chunk(std::fs::read(file).unwrap())];
    let parts: Vec<_> = parts.into_iter().map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
    let mut control = ControlClient::new(process.channel());
    control.register_model(futures::stream::iter(parts)).await.unwrap();
    let request = v1::DeployModelRequest {
        project: "faults".into(),
        model: "endless".into(),
        version: 1,
        who: "ada".into(),
        why: "a test".into(),
    };
    control.deploy_model(request).await.unwrap();
    (project, process)
}

async fn predict(channel: &Channel, value: f64) -> Result<v1::RowOutcome, tonic::Status> {
    let request = v1::PredictRequest {
        project: "faults".into(),
        model: "endless".into(),
        rows: vec![doubles("a", &[Some(value)])],
        ..v1::PredictRequest::default()
    };
    let answer = GatewayClient::new(channel.clone()).predict(request).await?.into_inner();
    let outcome = answer.outcomes.into_iter().next().expect("an outcome for the row");
    if outcome.status() == v1::RowStatus::Ok {
        let scores = answer.outputs[0].values.clone();
        assert_eq!(scores, Some(v1::column::Values::Floats(v1::FloatValues { values: vec![value as f32] })));
    }
    Ok(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forward_that_never_returns_is_replaced_once_and_then_ends_the_process() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let (_project, mut process) = start().await;
    let channel = process.channel();
    assert_eq!(predict(&channel, 3.0).await.unwrap().status(), v1::RowStatus::Ok);
    let outcome = predict(&channel, FOR_EVER).await.unwrap();
    assert_eq!(outcome.status(), v1::RowStatus::Fallback, "{}", outcome.reason);
    assert!(outcome.reason.contains("deadline"), "{}", outcome.reason);
    // Given up after twenty deadlines, at most ten seconds; then another executor answers.
    let begun = Instant::now();
    while predict(&channel, 4.0).await.unwrap().status() != v1::RowStatus::Ok {
        assert!(begun.elapsed() < Duration::from_secs(60), "no executor took the place of the one that hangs");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    predict(&channel, FOR_EVER).await.unwrap();
    assert_eq!(process.exit_code(Duration::from_secs(90)).await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_vanish_leave_nothing_and_a_sigterm_under_load_answers_what_is_in_flight() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let (_project, mut process) = start().await;
    let channel = process.channel();
    let answered = Arc::new(AtomicUsize::new(0));
    let callers = (0..8).map(|index| {
        let (channel, answered) = (channel.clone(), answered.clone());
        tokio::spawn(async move {
            loop {
                match predict(&channel, f64::from(index)).await {
                    Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
                    Err(status) => return status,
                };
            }
        })
    });
    let callers: Vec<_> = callers.collect();
    // Others give up before they could be answered.
    let vanishing = (0..8_u64).map(|index| {
        let channel = channel.clone();
        tokio::spawn(async move {
            for turn in 0..200 {
                let patience = Duration::from_micros(100 * ((index + turn) % 12));
                let _ = tokio::time::timeout(patience, predict(&channel, 1.0)).await;
            }
        })
    });
    for gone in vanishing.collect::<Vec<_>>() {
        gone.await.unwrap();
    }
    let before = answered.load(Ordering::Relaxed);
    assert_eq!(predict(&channel, 5.0).await.unwrap().status(), v1::RowStatus::Ok);
    process.terminate();
    for caller in callers {
        let status = caller.await.unwrap();
        // Refused while it drains, or the connection has ended in good order just as the call was sent, which tonic has
        // another code for: both may be tried elsewhere.
        let ended = status.code() == Code::Internal && format!("{status:?}").contains("NO_ERROR");
        let refused = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
        assert!(refused || ended, "{status:?}");
    }
    assert!(before > 0 && answered.load(Ordering::Relaxed) >= before);
    assert_eq!(process.exit_code(Duration::from_secs(60)).await, Some(0));
}
