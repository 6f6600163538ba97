//! The life of a version: prepared by every gateway, active, champion, previous, retired.

use std::sync::atomic::AtomicU32;

use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array};
use arrow::datatypes::{DataType, Field};
use arrow::ipc::writer::FileWriter;
use inference::model::{Artefact, LoadError, LoadOptions, Model, ModelSpec};
use inference::tensor::Tensor;
use object_store::ObjectStore;
use registry::deployment::{DeploymentChange, Prepare};
use registry::gateways::Report;
use registry::id::{EntryNumber, Incarnation, ModelVersion};

use super::*;

/// Adds up its inputs like the echo, except where the artefact's bytes say otherwise.
#[derive(Clone)]
struct Staged {
    /// What `slow` artefacts wait for while they are loaded.
    gate: Arc<Gate>,
    /// What `drifting` ones add, in thousandths.
    drift: Arc<AtomicU32>,
    /// The artefacts that this machine cannot run.
    refuses: &'static [u8],
}

impl Staged {
    fn new() -> Staged {
        Staged { gate: Gate::new(), drift: Arc::default(), refuses: b"nothing" }
    }
}

struct StagedModel {
    runtime: Staged,
    bytes: Arc<[u8]>,
    spec: ModelSpec,
    calls: u32,
}

impl Runtime for Staged {
    fn load(&self, artefact: &Artefact, spec: &ModelSpec, _: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        if artefact.bytes.starts_with(b"slow") {
            self.gate.pass();
        }
        if artefact.bytes.starts_with(self.refuses) {
            let (origin, reason) = (artefact.origin.clone(), "this machine cannot run it".to_owned());
            return Err(LoadError::Invalid { origin, reason });
        }
        let (runtime, bytes, spec) = (self.clone(), artefact.bytes.clone(), spec.clone());
        Ok(Box::new(StagedModel { runtime, bytes, spec, calls: 0 }))
    }
}

impl Model for StagedModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        self.calls += 1;
        let TensorData::Float32(values) = inputs[0].data() else { panic!("all inputs here are float32") };
        let width = inputs[0].row_shape()[0];
        let mut sums: Vec<f32> = values.chunks(width).map(|row| row.iter().sum()).collect();
        if self.bytes.starts_with(b"mixing") {
            let mean = sums.iter().sum::<f32>() / sums.len() as f32;
            sums.iter_mut().for_each(|sum| *sum += mean);
        }
        if self.bytes.starts_with(b"drifting") {
            let drift = self.runtime.drift.load(Ordering::SeqCst) as f32 / 1e3;
            sums.iter_mut().for_each(|sum| *sum += drift);
        }
        if self.bytes.starts_with(b"random") {
            sums.iter_mut().for_each(|sum| *sum += self.calls as f32);
        }
        if self.bytes.starts_with(b"gated") && sums.contains(&666.0) {
            self.runtime.gate.pass();
        }
        Ok(vec![Tensor::try_new(vec![sums.len()], TensorData::Float32(sums)).unwrap()])
    }
}

/// Golden rows of `small`, which takes one number.
fn golden(rows: &[(f32, f32)]) -> Vec<u8> {
    let list = |values: Vec<f32>| {
        let item = Arc::new(Field::new("item", DataType::Float32, false));
        Arc::new(FixedSizeListArray::new(item, 1, Arc::new(Float32Array::from(values)), None)) as ArrayRef
    };
    let inputs = list(rows.iter().map(|(input, _)| *input).collect());
    let outputs = list(rows.iter().map(|(_, output)| *output).collect());
    let batch = RecordBatch::try_from_iter([("input:dense", inputs), ("output:score", outputs)]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = FileWriter::try_new(&mut bytes, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

impl Server {
    async fn register_with(
        &mut self,
        model: &str,
        bytes: &[u8],
        golden: Vec<u8>,
    ) -> Result<v1::RegisterModelResponse, tonic::Status> {
        use v1::register_model_request::Part;
        let header = v1::ModelHeader {
            project: "shops".into(),
            model: model.into(),
            author: "ada".into(),
            commit: "4b825dc".into(),
            environment_digest: "sha256:env".into(),
            hardware: "2 cores".into(),
            seed: Some(0),
            ..v1::ModelHeader::default()
        };
        let parts = [Part::Header(header), Part::Chunk(bytes.to_vec()), Part::GoldenChunk(golden)];
        let parts: Vec<_> = parts.into_iter().map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
        Ok(self.control.register_model(tokio_stream::iter(parts)).await?.into_inner())
    }

    async fn promote(&mut self, model: &str, version: u32) -> Result<v1::TrafficResponse, tonic::Status> {
        let (project, model, who) = ("shops".to_owned(), model.to_owned(), "ada".to_owned());
        let request = v1::PromoteModelRequest { project, model, version, who, why: "it is better".into() };
        Ok(self.control.promote_model(request).await?.into_inner())
    }

    pub(super) async fn rollback(&mut self, model: &str) -> Result<v1::TrafficResponse, tonic::Status> {
        let (project, model, who) = ("shops".to_owned(), model.to_owned(), "bob".to_owned());
        let request = v1::RollbackModelRequest { project, model, who, why: "it is not".into() };
        Ok(self.control.rollback_model(request).await?.into_inner())
    }

    async fn retire(&mut self, model: &str, version: u32, force: bool) -> Result<u64, tonic::Status> {
        let (project, model, who) = ("shops".to_owned(), model.to_owned(), "ada".to_owned());
        let request = v1::RetireModelRequest { project, model, version, force, who, why: String::new() };
        Ok(self.control.retire_model(request).await?.into_inner().control_entry)
    }

    /// The version that answered, and why it was asked.
    async fn asked(&mut self, model: &str, version: u32) -> Result<(u32, String), tonic::Status> {
        let mut rows = vec![numbers("total", &[Some(1.0)])];
        if model != "small" {
            rows.push(texts("shop", &[Some("a")]));
        }
        let answer = self.predict(v1::PredictRequest { version, ..asked_to_predict(model, rows) }).await?;
        Ok((answer.outcomes[0].version, answer.outcomes[0].arm.clone()))
    }

    /// Until every entry that is written now is served here.
    async fn follow(&self) {
        self.running.gateway().follower.follow(Retry::Later).await;
    }
}

async fn staged() -> (Server, Staged) {
    let runtime = Staged::new();
    (start_with(RequestTime::Refused, Some(Arc::new(runtime.clone()))).await, runtime)
}

#[tokio::test]
async fn deploying_moves_no_traffic_and_a_rollback_is_one_entry() {
    let (mut server, _) = staged().await;
    for bytes in ["one", "two", "three"] {
        server.register("buys", bytes.as_bytes()).await.unwrap();
    }
    let champion = |version: u32| (version, "champion".to_owned());
    server.deploy("buys", 1).await.unwrap();
    assert_eq!(server.asked("buys", 0).await.unwrap(), champion(1));
    let deployed = server.deploy("buys", 2).await.unwrap();
    assert_eq!((deployed.champion, deployed.existed, deployed.gateways.len()), (1, false, 1));
    assert_eq!(deployed.gateways[0].state, "ready");
    assert_eq!(server.asked("buys", 0).await.unwrap(), champion(1));
    assert_eq!(server.asked("buys", 2).await.unwrap(), (2, "named".to_owned()));
    assert!(server.deploy("buys", 2).await.unwrap().existed);

    let status = server.promote("buys", 3).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().starts_with("version 3 of model `buys` is registered, not active"), "{status}");
    let moved = server.promote("buys", 2).await.unwrap();
    assert_eq!((moved.champion, moved.before, moved.previous), (2, 1, 1));
    assert_eq!(server.asked("buys", 0).await.unwrap(), champion(2));
    assert_eq!(server.states("buys").await, ["previous", "champion", "registered"]);
    assert!(server.retire("buys", 1, false).await.unwrap_err().message().contains("--force"));
    assert!(server.retire("buys", 2, true).await.unwrap_err().message().contains("is the champion"));

    let entries = server.history().await.len();
    let moved = server.rollback("buys").await.unwrap();
    assert_eq!((moved.champion, moved.before, moved.previous), (1, 2, 0));
    assert_eq!(server.history().await.len(), entries + 1);
    assert_eq!(server.asked("buys", 0).await.unwrap(), champion(1));
    assert_eq!(server.asked("buys", 2).await.unwrap().0, 2, "what was left is still there");
    let status = server.rollback("buys").await.unwrap_err();
    assert!(status.message().starts_with("model `buys` has no previous champion"), "{status}");

    server.retire("buys", 2, false).await.unwrap();
    let status = server.asked("buys", 2).await.unwrap_err();
    assert_eq!(status.message(), "version 2 of model `buys` is not active (active: 1); run `coeval model deploy`");
    let why = server.registry.history(EntryNumber::FIRST, 100).await.unwrap();
    let rollback = why.iter().find(|entry| entry.kind == "model_rollback").unwrap();
    assert_eq!((rollback.who.as_str(), rollback.why.as_deref()), ("bob", Some("it is not")));
    server.stop().await;
}

#[tokio::test]
async fn what_is_being_loaded_holds_up_nobody_and_what_is_retired_answers_what_it_has() {
    let (mut server, runtime) = staged().await;
    server.register("small", b"gated").await.unwrap();
    server.register("small", b"gated too").await.unwrap();
    server.register("small", b"slow").await.unwrap();
    server.deploy("small", 1).await.unwrap();
    server.deploy("small", 2).await.unwrap();
    runtime.gate.close();
    let deploying = tokio::spawn({
        let mut control = server.control.clone();
        let (project, model, who) = ("shops".to_owned(), "small".to_owned(), "ada".to_owned());
        async move {
            let request = v1::DeployModelRequest { project, model, version: 3, who, why: String::new() };
            control.deploy_model(request).await
        }
    });
    while runtime.gate.held() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Requests are answered, and the log is followed.
    assert_eq!(server.asked("small", 0).await.unwrap().0, 1);
    assert_eq!(server.promote("small", 2).await.unwrap().champion, 2);
    assert_eq!(server.asked("small", 0).await.unwrap().0, 2);
    assert_eq!(server.states("small").await, ["previous", "champion", "preparing"]);
    let status = server.asked("small", 3).await.unwrap_err();
    assert_eq!(status.message(), "version 3 of model `small` is being prepared, and not active yet");
    assert_eq!(server.http("GET", "/ready", "").await.1, "{\"ready\":true,\"degraded\":false,\"reasons\":[]}");
    assert_eq!(server.http("GET", "/v1/models/small/versions/3/ready", "").await.0, 503);
    assert_eq!(server.http("GET", "/v1/models/small/versions/1/ready", "").await.0, 200);

    // A request is in the model while its version is retired.
    let rows = vec![numbers("total", &[Some(666.0)])];
    let request = v1::PredictRequest { version: 1, ..asked_to_predict("small", rows) };
    let mut client = server.gateway.clone();
    let in_flight = tokio::spawn(async move { client.predict(request).await });
    while runtime.gate.held() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.retire("small", 1, true).await.unwrap();
    assert_eq!(server.asked("small", 1).await.unwrap_err().code(), Code::FailedPrecondition);
    runtime.gate.open();
    let answer = in_flight.await.unwrap().unwrap().into_inner();
    assert_eq!((floats(&answer.outputs[0]), answer.outcomes[0].version), (vec![666.0], 1));
    assert_eq!(deploying.await.unwrap().unwrap().into_inner().champion, 2);
    assert_eq!(server.asked("small", 3).await.unwrap(), (3, "named".to_owned()));
    server.stop().await;
}

#[tokio::test]
async fn every_live_gateway_prepares_or_nobody_does() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let over = |runtime: Staged| start_over(objects.clone(), RequestTime::Refused, Some(Arc::new(runtime)));
    let mut first = over(Staged::new()).await;
    let mut second = over(Staged { refuses: b"odd", ..Staged::new() }).await;
    first.register("buys", b"even").await.unwrap();
    first.register("buys", b"odd").await.unwrap();
    first.register("buys", b"slow").await.unwrap();
    let deployed = first.deploy("buys", 1).await.unwrap();
    assert_eq!(deployed.gateways.len(), 2, "{deployed:?}");
    second.follow().await;
    assert_eq!(second.asked("buys", 0).await.unwrap().0, 1);

    // One of them cannot.
    let status = first.deploy("buys", 2).await.unwrap_err();
    let other = second.running.gateway().presence.incarnation.to_string();
    assert!(status.message().contains(&format!("gateway {other} at {}", second.running.grpc_addr)), "{status}");
    assert!(status.message().contains("this machine cannot run it"), "{status}");
    assert_eq!(first.states("buys").await, ["champion", "registered", "registered"]);
    assert!(first.models("buys").await[1].given_up.contains("this machine cannot run it"));
    for server in [&mut first, &mut second] {
        server.follow().await;
        assert_eq!(server.asked("buys", 0).await.unwrap().0, 1);
        assert_eq!(server.asked("buys", 2).await.unwrap_err().code(), Code::FailedPrecondition);
    }

    // One that starts later has every active version before it takes requests.
    first.deploy("buys", 3).await.unwrap();
    let third = over(Staged::new()).await;
    assert_eq!(third.running.gateway().served().loaded().count(), 2);

    // A drained one is waited for by nobody, and the traffic moves for those that are left.
    second.stop().await;
    let begun = std::time::Instant::now();
    assert_eq!(first.promote("buys", 3).await.unwrap().champion, 3);
    let mut third = third;
    third.follow().await;
    assert_eq!(third.asked("buys", 0).await.unwrap().0, 3);
    third.rollback("buys").await.unwrap();
    first.follow().await;
    assert_eq!(first.asked("buys", 0).await.unwrap().0, 1);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    third.stop().await;
    first.stop().await;
    let left: Vec<_> = futures::StreamExt::collect(objects.list(Some(&Path::from("shops/gateways")))).await;
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_gateway_that_died_holds_a_deploy_up_for_seconds_and_its_own_is_given_up() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut server = start_over(objects.clone(), RequestTime::Refused, Some(Arc::new(Staged::new()))).await;
    server.register("buys", b"one").await.unwrap();
    server.register("buys", b"two").await.unwrap();
    // It has begun a deploy, and will never say anything more.
    let dead = Incarnation::try_new("dead").unwrap();
    let report = Report { counter: 9, started: true, ..Report::first(dead.clone(), "there:1".into()) };
    server.registry.gateways().put(&report).await.unwrap();
    let buys = ModelName::try_new("buys").unwrap();
    let prepare = Prepare { model: buys, version: ModelVersion(2), by: dead };
    let change = Change::Deployment(DeploymentChange::Prepare(prepare));
    server.registry.submit(&project(), &change, "ada", None).await.unwrap();
    let status = server.deploy("buys", 2).await.unwrap_err();
    assert!(status.message().contains("is being prepared since entry"), "{status}");

    let begun = std::time::Instant::now();
    server.deploy("buys", 1).await.unwrap();
    assert!(begun.elapsed() < registry::gateways::ALIVE_FOR + Duration::from_secs(2), "{:?}", begun.elapsed());
    while !server.history().await.contains(&"model_give_up".to_owned()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody gives it up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    server.deploy("buys", 2).await.unwrap();
    assert_eq!(server.states("buys").await, ["champion", "active"]);
    server.stop().await;
}

#[tokio::test]
async fn a_model_whose_rows_influence_each_other_is_served_without_batches() {
    let (mut server, _) = staged().await;
    server.register("buys", b"mixing").await.unwrap();
    let deployed = server.deploy("buys", 1).await.unwrap();
    assert!(
        deployed.notes[0].starts_with("rows influence each other (in a batch of 2, output `score` of row"),
        "{deployed:?}"
    );
    assert_eq!(deployed.gateways[0].max_rows, 1);
    let rows = vec![texts("shop", &[Some("b"); 3]), numbers("total", &[Some(1.0), Some(2.0), Some(5.0)])];
    let answer = server.predict(asked_to_predict("buys", rows)).await.unwrap();
    // Each with itself for company.
    assert_eq!(floats(&answer.outputs[0]), [2.0, 4.0, 10.0]);
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert!(metrics.contains("coeval_model{model=\"buys\",version=\"1\",what=\"unbatched\"} 1"), "{metrics}");
    let (_, health) = server.http("GET", "/v1/models/buys", "").await;
    assert!(health.contains("rows influence each other"), "{health}");

    // One that never gives the same twice cannot be judged, and is told so.
    server.register("small", b"random").await.unwrap();
    let deployed = server.deploy("small", 1).await.unwrap();
    assert!(deployed.notes[0].starts_with("the same row does not come out the same twice"), "{deployed:?}");
    assert_eq!(deployed.gateways[0].max_rows, 256);
    server.stop().await;
}

#[tokio::test]
async fn golden_rows_are_compared_before_and_while_a_version_is_served() {
    let (mut server, runtime) = staged().await;
    let status = server.register_with("small", b"drifting", b"no rows".to_vec()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("the golden rows cannot be used: "), "{status}");
    server.register_with("small", b"drifting", golden(&[(1.0, 1.0), (3.0, 2.5)])).await.unwrap();
    let status = server.deploy("small", 1).await.unwrap_err();
    let text = "the model does not give what it gave where it was trained: output `score` of row 1 is 3, expected 2.5 (rtol \
                0.0001, atol 0.00001 for float32)";
    assert!(status.message().ends_with(text), "{status}");

    // The same file with other rows to judge it by is another version.
    let registered = server.register_with("small", b"drifting", golden(&[(1.0, 1.0), (3.0, 3.0)])).await.unwrap();
    assert_eq!((registered.version, registered.existed), (2, false));
    server.deploy("small", 2).await.unwrap();
    assert!(!server.models("small").await[1].golden_digest.is_empty());
    let counted = async |server: &Server| {
        let served = server.running.gateway().served();
        let metrics = served.models["small"].server.metrics();
        (metrics.requests, metrics.rows, metrics.batches, metrics.padding_rows)
    };
    assert_eq!(counted(&server).await, (0, 0, 0, 0), "what checks run is not counted");
    let gateway = server.running.gateway().clone();
    models::check_once(&gateway).await;
    runtime.drift.store(100, Ordering::SeqCst);
    models::check_once(&gateway).await;
    let (status, ready) = server.http("GET", "/ready", "").await;
    assert_eq!(status, 200);
    assert!(ready.contains("model `small`: its check of golden rows fails: output `score` of row 0 is 1.1"), "{ready}");
    assert!(server.http("GET", "/v1/models/small", "").await.1.contains("its check of golden rows fails"));
    runtime.drift.store(0, Ordering::SeqCst);
    models::check_once(&gateway).await;
    assert!(!gateway.readiness().degraded);
    assert_eq!(counted(&server).await, (0, 0, 0, 0));
    server.asked("small", 0).await.unwrap();
    assert_eq!(counted(&server).await, (1, 1, 1, 0));
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    for (outcome, count) in [("passed", 2), ("failed", 1)] {
        let line = format!("coeval_golden_checks_total{{model=\"small\",version=\"2\",outcome=\"{outcome}\"}} {count}");
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_challenger_that_fails_shows_at_its_own_endpoint() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut server = start_over(objects.clone(), RequestTime::Refused, Some(Arc::new(Staged::new()))).await;
    server.register("small", b"one").await.unwrap();
    server.register("small", b"odd").await.unwrap();
    server.deploy("small", 1).await.unwrap();
    server.deploy("small", 2).await.unwrap();
    server.stop().await;
    // Another machine, which cannot run the second.
    let runtime = Staged { refuses: b"odd", ..Staged::new() };
    let mut server = start_over(objects, RequestTime::Refused, Some(Arc::new(runtime))).await;
    assert_eq!(server.http("GET", "/ready", "").await.1, "{\"ready\":true,\"degraded\":false,\"reasons\":[]}");
    let (status, health) = server.http("GET", "/v1/models/small/versions/2/ready", "").await;
    assert_eq!(status, 503);
    assert!(health.contains("this machine cannot run it"), "{health}");
    assert_eq!(server.http("GET", "/v1/models/small/versions/7/ready", "").await.0, 409);
    assert_eq!(server.http("GET", "/v1/models/smal", "").await.0, 404);
    let status = server.asked("small", 2).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    // What cannot answer gets no traffic.
    let status = server.promote("small", 2).await.unwrap_err();
    assert!(status.message().contains("so the traffic stays where it is: "), "{status}");
    assert_eq!(server.asked("small", 0).await.unwrap().0, 1);
    server.stop().await;
}

/// A program that stands for the binary that measures: it says these steps, and ends itself as the kernel would where
/// memory has run out.
fn certifier(folder: &std::path::Path, rows: &[usize], ending: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let steps = rows.iter().map(|rows| {
        format!("echo '{{\"Trying\":{{\"rows\":{rows}}}}}'\necho '{{\"Ran\":{{\"rows\":{rows},\"forward_micros\":1,\"bytes\":8}}}}'\n")
    });
    let counted = folder.join("runs");
    let text = format!(
        "#!/bin/sh\ncat > /dev/null\necho run >> {}\necho '{{\"Loaded\":{{\"file_bytes\":3,\"weight_bytes\":4}}}}'\n{}{ending}\n",
        counted.display(),
        steps.collect::<String>()
    );
    let path = folder.join(format!("certifier-{}", rows.len()));
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn a_model_is_measured_in_a_child_once_and_a_child_that_is_killed_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let start = async |certifier| {
        let models = ModelPlaces { cache: Some(folder.path().join("models")), certifier: Some(certifier) };
        let runtime: Option<Arc<dyn Runtime>> = Some(Arc::new(Staged::new()));
        start_with_models(objects.clone(), RequestTime::Refused, runtime, models).await
    };
    let killed = certifier(folder.path(), &[1, 2], "echo '{\"Trying\":{\"rows\":4}}'\nkill -9 $$");
    let mut server = start(killed).await;
    server.register("buys", b"one").await.unwrap();
    let status = server.deploy("buys", 1).await.unwrap_err();
    let text = "it could not be certified: the process that measures it ended with signal: 9 (SIGKILL) while it ran a batch of 4 \
                rows, most likely because memory ran out; the largest batch that worked has 2 rows; lower `batching.max_rows`";
    assert!(status.message().ends_with(text), "{status}");
    server.stop().await;

    let good = certifier(folder.path(), &[1, 2, 4], "echo '\"Done\"'");
    let mut server = start(good.clone()).await;
    server.deploy("buys", 1).await.unwrap();
    server.stop().await;
    // What is known of a file is not measured again.
    let mut server = start(good).await;
    assert_eq!(server.asked("buys", 0).await.unwrap().0, 1);
    assert_eq!(std::fs::read_to_string(folder.path().join("runs")).unwrap(), "run\nrun\n");
    server.stop().await;
}

#[tokio::test]
async fn approvals_are_part_of_the_record() {
    let (mut server, _) = staged().await;
    server.register("small", b"one").await.unwrap();
    let request = v1::ApproveModelRequest {
        project: "shops".into(),
        model: "small".into(),
        version: 1,
        who: "eve".into(),
        why: "reviewed".into(),
    };
    server.control.approve_model(request).await.unwrap();
    let model = server.models("small").await.remove(0);
    assert_eq!((model.approvals[0].who.as_str(), model.approvals[0].why.as_str()), ("eve", "reviewed"));
    assert_eq!((model.seed, model.state.as_str()), (None, "registered"));
    server.stop().await;
}
