//! A real TorchScript model in a real server: measured in a child process, kept on disk, promoted, and there after a kill.

use std::time::Duration;

use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::register_model_request::Part;
use tests::Project;
use tests::column::{doubles, int64s};
use tonic::transport::Channel;

use crate::process::Process;

pub const DEFINITIONS: &str = r#"
requests:
  - {name: trip, fields: [{name: a, type: float64}, {name: b, type: float64}, {name: c, type: float64}, {name: carrier, type: int64}]}
feature_services:
  - {name: trips, features: ["trip:a", "trip:b", "trip:c", "trip:carrier"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["trip:a", "trip:b", "trip:c"]}
      - {name: carrier, dtype: int64, features: ["trip:carrier"]}
    outputs: [{name: score, dtype: float32}]
    batching: {max_rows: 8}
"#;

const SETTINGS: &str = "project: life\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n";

pub async fn register(channel: &Channel, bytes: &[u8]) -> u32 {
    let header = v1::ModelHeader {
        project: "life".into(),
        model: "delay".into(),
        author: "ada".into(),
        commit: "4b825dc".into(),
        environment_digest: "sha256:env".into(),
        hardware: "2 cores".into(),
        ..v1::ModelHeader::default()
    };
    let parts = [Part::Header(header), Part::Chunk(bytes.to_vec())];
    let parts: Vec<_> = parts.into_iter().map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
    let mut control = ControlClient::new(channel.clone());
    control.register_model(futures::stream::iter(parts)).await.unwrap().into_inner().version
}

pub async fn deploy(channel: &Channel, version: u32) -> Result<v1::DeployModelResponse, tonic::Status> {
    let (project, model, who) = ("life".to_owned(), "delay".to_owned(), "ada".to_owned());
    let request = v1::DeployModelRequest { project, model, version, who, why: "a test".into() };
    Ok(ControlClient::new(channel.clone()).deploy_model(request).await?.into_inner())
}

/// The version that answers, and what it says.
async fn predict(channel: &Channel, version: u32) -> (u32, v1::Column) {
    let request = v1::PredictRequest {
        project: "life".into(),
        model: "delay".into(),
        rows: vec![
            doubles("a", &[Some(1.0)]),
            doubles("b", &[Some(-0.5)]),
            doubles("c", &[Some(0.25)]),
            int64s("carrier", &[Some(1)]),
        ],
        version,
        ..v1::PredictRequest::default()
    };
    let answer = GatewayClient::new(channel.clone()).predict(request).await.unwrap().into_inner();
    assert_eq!(answer.outcomes[0].status(), v1::RowStatus::Ok, "{}", answer.outcomes[0].reason);
    (answer.outcomes[0].version, answer.outputs[0].clone())
}

pub fn model_file() -> Vec<u8> {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../inference/tests/data/delay.pt");
    std::fs::read(file).unwrap()
}

/// The same model in another file: zip archives may have anything behind them, and the digest is another.
pub fn padded(bytes: &[u8], with: u8) -> Vec<u8> {
    // The comment at the end of a zip archive: its length, then as many bytes.
    let mut bytes = bytes.to_vec();
    let end = bytes.len();
    assert_eq!(bytes[end - 2..], [0, 0], "the file has no comment yet");
    bytes[end - 2..].copy_from_slice(&[1, 0]);
    bytes.push(with);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torchscript_model_is_certified_deployed_promoted_and_there_again_after_a_kill() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let process = Process::start_with(project.path(), &[]).await;
    let channel = process.channel();
    let file = model_file();
    assert_eq!(register(&channel, &file).await, 1);
    assert_eq!(register(&channel, &padded(&file, b'x')).await, 2);
    assert_eq!(register(&channel, b"not a model").await, 3);
    let deployed = deploy(&channel, 1).await.unwrap();
    assert_eq!((deployed.champion, deployed.notes.len()), (1, 0), "{deployed:?}");
    assert!(deployed.gateways[0].memory_bytes > 0 && deployed.gateways[0].max_rows == 8, "{deployed:?}");
    assert_eq!(deploy(&channel, 2).await.unwrap().champion, 1);
    let status = deploy(&channel, 3).await.unwrap_err();
    assert!(
        status.message().contains("it could not be certified: ") && status.message().contains("not a model"),
        "{status}"
    );

    // Kept by digest, with what was measured of those that could be.
    let kept = std::fs::read_dir(project.path().join(".coeval/local/life/models")).unwrap();
    let mut kept: Vec<String> =
        kept.map(|entry| entry.unwrap().path().extension().unwrap().to_string_lossy().into_owned()).collect();
    kept.sort();
    assert_eq!(kept, ["json", "json", "pt", "pt", "pt"]);

    let (version, said) = predict(&channel, 0).await;
    assert_eq!(version, 1);
    assert_eq!(predict(&channel, 2).await, (2, said.clone()));
    let (model, who) = ("delay".to_owned(), "ada".to_owned());
    let promote = v1::PromoteModelRequest { project: "life".into(), model, version: 2, who, why: "a test".into() };
    ControlClient::new(channel.clone()).promote_model(promote).await.unwrap();
    assert_eq!(predict(&channel, 0).await, (2, said.clone()));
    // Killed, with its report left behind.
    drop(process);
    let process = Process::start_with(project.path(), &[]).await;
    let channel = process.channel();
    assert_eq!(predict(&channel, 0).await, (2, said.clone()));
    assert_eq!(predict(&channel, 1).await, (1, said.clone()));
    let (model, who) = ("delay".to_owned(), "bob".to_owned());
    let rollback = v1::RollbackModelRequest { project: "life".into(), model, who, why: "a test".into() };
    let begun = std::time::Instant::now();
    ControlClient::new(channel.clone()).rollback_model(rollback).await.unwrap();
    assert_eq!(predict(&channel, 0).await, (1, said));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}
