//! Whole servers in this process, on free ports, with stores in memory and a model that echoes.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicI64;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::as_of::{Row, Times};
use feature_defs::catalog::{Files, RequestTime, SourceFile};
use feature_defs::diagnose::{Span, Spanned};
use feature_defs::plan::{Plan, SourceSchemas, ViewPlan, compile_definitions};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value, encode};
use feature_defs::window::{DAY, HOUR};
use inference::echo::{EchoRuntime, Gate};
use inference::model::ModelError;
use inference::tensor::TensorData;
use object_store::memory::InMemory;
use object_store::path::Path;
use online_store::key::Generation;
use online_store::memory::MemoryStore;
use online_store::{Write, row};
use proto::v1;
use proto::v1::column::Values;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use registry::id::{Digest, ModelName, ServiceName};
use registry::state::{Catalog, Change};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Channel;

use super::*;
use crate::events::{EventsError, Mode, Progress, Pushed, TableDone, TableProgress, Wait};

mod cached;
mod life;
mod rollouts;

const DEFINITIONS: &str = "
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64, nullable: true}]
    event_time: sold_at
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    ttl: 3h
    freshness: 2h
    features: [{name: amount, type: float64}]
requests:
  - {name: basket, fields: [{name: total, type: float64}, {name: coupon, type: string, nullable: true}]}
  - {name: numbers, fields: [{name: a, type: float64}, {name: b, type: float64}, {name: c, type: float64}]}
transforms:
  - name: context
    inputs: [last_sale, basket]
    features: [{name: both, expr: \"last_sale.amount + basket.total\"}]
feature_services:
  - {name: buying, features: [last_sale, \"context:*\", \"basket:total\", \"basket:coupon\"]}
  - {name: totals, features: [\"basket:total\"]}
  - {name: twos, features: [\"numbers:a\", \"numbers:b\"]}
  - {name: threes, features: [\"numbers:a\", \"numbers:b\", \"numbers:c\"]}
  - {name: lately, features: [last_sale, \"basket:total\"]}
models:
  - name: buys
    features: buying
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"*\", \"!basket:coupon\"], missing: 0.0}]
    outputs: [{name: score, dtype: float32}]
    post: [{name: doubled, expr: \"score * 2.0\"}]
    batching: {max_rows: 4, max_queue_rows: 8}
    fallback: {score: 0.5}
  - name: strict
    features: buying
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"last_sale:amount\"]}]
    outputs: [{name: score, dtype: float32}]
  - name: careful
    features: buying
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"last_sale:amount\", \"basket:total\"], missing: 0.0}]
    outputs: [{name: score, dtype: float32}]
    slo: {deadline: 100ms, tiers: [shop, office]}
    batching: {max_rows: 4, max_queue_rows: 8}
    fallback: {model: small}
  - name: wide
    features: totals
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"basket:total\"]}]
    outputs: [{name: score, dtype: float32}]
    placement: {executors: 250, threads: 250}
  - name: tried
    features: totals
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"basket:total\"]}]
    outputs: [{name: score, dtype: float32}]
    decision: \"score > 5\"
    fallback: {score: 0.25}
    shadow: {min_rows: 5, drift: ignore, max_flip_rate: 10%}
    canary: {unit: shop, steps: [50%, 100%], bake: 1s, min_units: 5, window: 1s, guardrails: [error_rate < 50%]}
  - name: small
    features: totals
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"basket:total\"]}]
    outputs: [{name: score, dtype: float32}]
    fallback: {score: 0.25}
  - name: pairs
    features: twos
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"*\"]}]
    outputs: [{name: score, dtype: float32}]
    post: [{name: doubled, expr: \"score * 2.0\"}]
    fallback: {score: 0.5}
    cache: {max_bytes: 1MiB, ttl: 5m}
  - name: triples
    features: threes
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"*\"]}]
    outputs: [{name: score, dtype: float32}]
    cache: {}
  - name: fresh
    features: lately
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: [\"*\"], missing: 0.0}]
    outputs: [{name: score, dtype: float32}]
    cache: {ttl: 1h}
";

const NOW: Micros = 20_000 * DAY;

fn project() -> ProjectName {
    ProjectName::try_new("shops").unwrap()
}

fn plan() -> Plan {
    let file = SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() };
    compile_definitions("shops", &Files::new(vec![file]), &SourceSchemas::new()).unwrap()
}

fn catalog() -> Catalog {
    let plan = plan();
    let digest = |digest: &feature_defs::digest::Digest| Digest::try_new(digest.as_str()).unwrap();
    let services = plan.services.iter();
    let models = plan.models.iter();
    Catalog {
        digest: digest(&plan.digest),
        files: BTreeMap::from([("shop.yaml".to_owned(), DEFINITIONS.to_owned())]),
        settings: String::new(),
        source_schemas: BTreeMap::new(),
        views: BTreeMap::new(),
        services: services
            .map(|service| (ServiceName::try_new(&*service.name).unwrap(), digest(&service.semantic_digest)))
            .collect(),
        models: models
            .map(|model| {
                (ModelName::try_new(&*model.name).unwrap(), ServiceName::try_new(&*model.service.name).unwrap())
            })
            .collect(),
    }
}

/// Remembers what it was told.
#[derive(Default)]
struct Double {
    adopted: Mutex<usize>,
    pushed: Mutex<Vec<RecordBatch>>,
    shut_down: Mutex<bool>,
}

#[async_trait]
impl Events for Double {
    async fn adopt(&self, _: Arc<Plan>, _: &[Arc<ViewPlan>]) -> Result<(), EventsError> {
        *self.adopted.lock().unwrap() += 1;
        Ok(())
    }
    fn backfilling(&self) -> Vec<String> {
        Vec::new()
    }
    async fn push(&self, source: &str, batch: RecordBatch, wait: Wait) -> Result<Pushed, EventsError> {
        assert_eq!((source, wait), ("sales", Wait::Visible));
        let accepted = batch.num_rows() as u32;
        let mut pushed = self.pushed.lock().unwrap();
        pushed.push(batch);
        Ok(Pushed { accepted, last_sequence: pushed.len() as u64, ..Pushed::default() })
    }
    async fn materialize(
        &self,
        sources: &[String],
        _: Micros,
        _: Mode,
        progress: mpsc::Sender<Progress>,
    ) -> Result<(), EventsError> {
        assert!(sources.is_empty(), "a stream is no file source");
        let report = Progress { source: "x".into(), rows_read: 2, rows_applied: 1, ..Progress::default() };
        progress.send(report).await.unwrap();
        Ok(())
    }
    async fn compact(
        &self,
        sources: &[String],
        mode: Mode,
        progress: mpsc::Sender<TableProgress>,
    ) -> Result<Vec<TableDone>, EventsError> {
        assert_eq!(mode, Mode::DryRun);
        if let Some(name) = sources.first() {
            return Err(EventsError::Unknown(format!("there is no source `{name}`")));
        }
        progress.send(("sales".into(), 5)).await.unwrap();
        Ok(vec![TableDone { source: "sales".into(), changed: true, rows: 9, ..TableDone::default() }])
    }
    async fn import_files(&self, source: &str, _: mpsc::Sender<TableProgress>) -> Result<TableDone, EventsError> {
        Err(EventsError::Invalid(format!("`{source}` is a stream")))
    }
    async fn flush(&self) -> Result<u64, EventsError> {
        Ok(7)
    }
    async fn shutdown(&self) -> Result<(), EventsError> {
        *self.shut_down.lock().unwrap() = true;
        Ok(())
    }
}

struct Server {
    /// Stands still unless a test moves it.
    clock_time: Arc<AtomicI64>,
    running: Running,
    events: Arc<Double>,
    registry: Arc<Registry>,
    gateway: GatewayClient<Channel>,
    ingest: IngestClient<Channel>,
    control: ControlClient<Channel>,
}

async fn start_with(request_time: RequestTime, runtime: Option<Arc<dyn Runtime>>) -> Server {
    start_over(Arc::new(InMemory::new()), request_time, runtime).await
}

/// One of several gateways, where others are over the same objects.
async fn start_over(
    objects: Arc<dyn ObjectStore>,
    request_time: RequestTime,
    runtime: Option<Arc<dyn Runtime>>,
) -> Server {
    start_with_models(objects, request_time, runtime, ModelPlaces::default()).await
}

async fn start_with_models(
    objects: Arc<dyn ObjectStore>,
    request_time: RequestTime,
    runtime: Option<Arc<dyn Runtime>>,
    models: ModelPlaces,
) -> Server {
    let clock_time = Arc::new(AtomicI64::new(NOW));
    let time = clock_time.clone();
    let clock: Clock = Arc::new(move || time.load(Ordering::SeqCst));
    let registry = Registry::open(objects, &Path::from("shops"), wall_clock(&clock)).await.unwrap();
    let registry = Arc::new(registry);
    registry.submit(&project(), &Change::Apply(catalog()), "test", None).await.unwrap();

    let store = MemoryStore::new();
    let generation = Generation::new("shops", "last_sale", plan().view("last_sale").unwrap().storage_digest.as_str());
    let mut entity = Vec::new();
    encode(&Value::String("a".into()), &mut entity);
    let time = NOW - HOUR;
    let position = Position { time, sequence: 3 };
    let times = Times { event_time: time, created_time: None, known_time: time, position };
    let sale = Row { times, deleted: false, values: vec![Value::Float64(2.0)] };
    let ready = Write::Fact(generation.ready_fact(), Some(Bytes::from_static(b"1")));
    store
        .write(vec![ready, Write::Row { key: generation.key(entity), blob: row::encode(&sale), expires: None }])
        .await
        .unwrap();

    let events = Arc::new(Double::default());
    let opened = Opened {
        project: project(),
        registry: registry.clone(),
        store: Arc::new(store),
        events: Some(events.clone()),
        runtime,
        models,
        flight: None,
        serving_log: None,
        counts: None,
        audit: None,
        roles: Roles::ALL,
        kept: None,
    };
    let listeners = Listeners {
        grpc: listen(GRPC, "127.0.0.1:0", false).await.unwrap(),
        http: listen(HTTP, "127.0.0.1:0", false).await.unwrap(),
    };
    let here = Spanned::new("127.0.0.1:0".to_owned(), Span::NOWHERE);
    let serve = ServeSettings {
        grpc: here.clone(),
        http: here,
        request_time,
        beyond_loopback: false,
        cache: None,
        golden_checks: Duration::from_secs(3_600),
    };
    let running = start(listeners, opened, &serve, clock).await.unwrap();
    running.started().await;
    let channel = Channel::from_shared(format!("http://{}", running.grpc_addr)).unwrap().connect().await.unwrap();
    Server {
        clock_time,
        running,
        events,
        registry,
        gateway: GatewayClient::new(channel.clone()),
        ingest: IngestClient::new(channel.clone()),
        control: ControlClient::new(channel),
    }
}

async fn server() -> Server {
    start_with(RequestTime::Refused, Some(Arc::new(EchoRuntime::new()))).await
}

impl Server {
    async fn features(&mut self, request: v1::GetFeaturesRequest) -> Result<v1::GetFeaturesResponse, tonic::Status> {
        Ok(self.gateway.get_features(request).await?.into_inner())
    }

    async fn predict(&mut self, request: v1::PredictRequest) -> Result<v1::PredictResponse, tonic::Status> {
        Ok(self.gateway.predict(request).await?.into_inner())
    }

    async fn register(&mut self, model: &str, bytes: &[u8]) -> Result<v1::RegisterModelResponse, tonic::Status> {
        let header = v1::ModelHeader {
            project: "shops".into(),
            model: model.into(),
            author: "ada".into(),
            commit: "4b825dc".into(),
            environment_digest: "sha256:env".into(),
            hardware: "2 cores".into(),
            ..v1::ModelHeader::default()
        };
        use v1::register_model_request::Part;
        let parts =
            std::iter::once(Part::Header(header)).chain(bytes.chunks(3).map(|chunk| Part::Chunk(chunk.to_vec())));
        let parts: Vec<_> = parts.map(|part| v1::RegisterModelRequest { part: Some(part) }).collect();
        Ok(self.control.register_model(tokio_stream::iter(parts)).await?.into_inner())
    }

    async fn deploy(&mut self, model: &str, version: u32) -> Result<v1::DeployModelResponse, tonic::Status> {
        let (project, model) = ("shops".to_owned(), model.to_owned());
        let request = v1::DeployModelRequest { project, model, version, who: "ada".into(), why: String::new() };
        Ok(self.control.deploy_model(request).await?.into_inner())
    }

    async fn models(&mut self, name: &str) -> Vec<v1::ModelInfo> {
        let models = self.control.list_models(v1::ListModelsRequest { project: "shops".into() }).await.unwrap();
        models.into_inner().models.into_iter().filter(|model| model.name == name).collect()
    }

    /// Of every version, in order.
    async fn states(&mut self, name: &str) -> Vec<String> {
        self.models(name).await.into_iter().map(|model| model.state).collect()
    }

    /// The kinds of all entries.
    async fn history(&self) -> Vec<String> {
        let entries = self.registry.history(EntryNumber::FIRST, 1_000).await.unwrap();
        entries.into_iter().map(|entry| entry.kind).collect()
    }

    async fn http(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(self.running.http_addr).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn stop(self) {
        let handle = self.running.shutdown_handle();
        drop((self.gateway, self.ingest, self.control));
        handle.shut_down();
        self.running.wait().await.unwrap();
        assert!(*self.events.shut_down.lock().unwrap());
    }
}

fn column(name: &str, value_type: Type, values: &[Value]) -> v1::Column {
    crate::convert::from_array(name, &Value::to_array(values, &value_type), &value_type)
}

fn texts(name: &str, values: &[Option<&str>]) -> v1::Column {
    let value = |text: &Option<&str>| text.map_or(Value::Null, |text| Value::String(text.into()));
    column(name, Type::String, &values.iter().map(value).collect::<Vec<_>>())
}

fn numbers(name: &str, values: &[Option<f64>]) -> v1::Column {
    let value = |number: &Option<f64>| number.map_or(Value::Null, Value::Float64);
    column(name, Type::Float64, &values.iter().map(value).collect::<Vec<_>>())
}

fn asked(rows: Vec<v1::Column>) -> v1::GetFeaturesRequest {
    use v1::get_features_request::What;
    let what = Some(What::Service("buying".into()));
    v1::GetFeaturesRequest { project: "shops".into(), what, rows, ..v1::GetFeaturesRequest::default() }
}

fn asked_to_predict(model: &str, rows: Vec<v1::Column>) -> v1::PredictRequest {
    v1::PredictRequest { project: "shops".into(), model: model.into(), rows, ..v1::PredictRequest::default() }
}

fn doubles(column: &v1::FeatureColumn) -> Vec<f64> {
    match &column.values.as_ref().unwrap().values {
        Some(Values::Doubles(values)) => values.values.clone(),
        other => panic!("{other:?}"),
    }
}

fn floats(column: &v1::Column) -> Vec<f32> {
    match &column.values {
        Some(Values::Floats(values)) => values.values.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn features_come_with_statuses_and_provenance() {
    let mut server = server().await;
    let rows = vec![texts("shop", &[Some("a"), Some("b"), None]), numbers("total", &[Some(1.0); 3])];
    let request = v1::GetFeaturesRequest { include_provenance: true, ..asked(rows) };
    let answer = server.features(request).await.unwrap();
    assert_eq!((answer.rows, answer.at.as_slice(), answer.stale), (3, [NOW; 3].as_slice(), false));
    let names: Vec<&str> = answer.features.iter().map(|feature| feature.name.as_str()).collect();
    assert_eq!(names, ["last_sale:amount", "context:both", "basket:total", "basket:coupon"]);
    assert_eq!(doubles(&answer.features[0]), [2.0, 0.0, 0.0]);
    assert_eq!(doubles(&answer.features[1]), [3.0, 0.0, 0.0]);
    assert_eq!(answer.features[0].values.as_ref().unwrap().validity, [0b001]);
    assert_eq!(answer.features[0].statuses, [1, 3, 3]);
    assert_eq!(answer.features[1].statuses, [1, 3, 3]);
    assert_eq!(answer.features[3].statuses, [2, 2, 2], "an absent nullable field is null");
    assert!(answer.features.iter().all(|feature| feature.reasons.is_empty()));
    let view = &answer.views[0];
    assert_eq!(view.event_times, [NOW - HOUR, i64::MIN, i64::MIN]);
    assert_eq!(view.positions[0], v1::Position { time: NOW - HOUR, sequence: 3 });
    assert_eq!(view.positions[1].time, i64::MIN);

    let what = Some(v1::get_features_request::What::Features(v1::FeatureList { names: vec!["last_sale:*".into()] }));
    let listed = v1::GetFeaturesRequest { what, ..asked(vec![texts("shop", &[Some("a")])]) };
    let answer = server.features(listed).await.unwrap();
    assert_eq!(doubles(&answer.features[0]), [2.0]);
    server.stop().await;
}

#[tokio::test]
async fn wrong_requests_are_answered_well() {
    let mut server = server().await;
    let good = || vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])];
    let mut check = async |request: v1::GetFeaturesRequest, code: Code, text: &str| {
        let status = server.features(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    };
    use v1::get_features_request::What;
    let service = |name: &str| v1::GetFeaturesRequest { what: Some(What::Service(name.into())), ..asked(good()) };
    let list = |name: &str| {
        let what = Some(What::Features(v1::FeatureList { names: vec![name.into()] }));
        v1::GetFeaturesRequest { what, ..asked(vec![texts("shop", &[Some("a")])]) }
    };
    check(service("buyin"), Code::NotFound, "there is no feature service `buyin`; did you mean `buying`?").await;
    check(
        v1::GetFeaturesRequest { project: "shop".into(), ..asked(good()) },
        Code::NotFound,
        "there is no project here named `shop`; did you mean `shops`?",
    )
    .await;
    check(list("last_sal:*"), Code::NotFound, "there is no feature view `last_sal`; did you mean `last_sale`?").await;
    check(
        list("last_sale:amuont"),
        Code::NotFound,
        "there is no feature in view `last_sale` named `amuont`; did you mean `amount`?",
    )
    .await;
    check(
        list("last_sale"),
        Code::InvalidArgument,
        "`last_sale` does not name a feature; write `view:feature` or `view:*`",
    )
    .await;
    check(
        asked(vec![column("shop", Type::Int64, &[Value::Int64(1)]), numbers("total", &[Some(1.0)])]),
        Code::InvalidArgument,
        "column `shop` must be string, but carries int64",
    )
    .await;
    check(
        asked(vec![texts("shop", &[Some("a")])]),
        Code::InvalidArgument,
        "service `buying` needs the request field `total` (float64), which the rows do not have",
    )
    .await;
    check(
        asked(vec![numbers("total", &[Some(1.0)])]),
        Code::InvalidArgument,
        "service `buying` needs the entity key `shop` (string), which the rows do not have",
    )
    .await;
    check(
        asked(vec![texts("shop", &[Some("a")]), numbers("totl", &[Some(1.0)])]),
        Code::InvalidArgument,
        "there is no column in what service `buying` takes: `totl`; did you mean `total`?",
    )
    .await;
    check(
        asked(vec![texts("shop", &[Some("a"), Some("b")]), numbers("total", &[Some(1.0)])]),
        Code::InvalidArgument,
        "column `total` (float64) has 1 values where 2 are expected",
    )
    .await;
    check(
        asked(vec![texts("shop", &[Some("a"); 3]), numbers("total", &[None, Some(1.0), None])]),
        Code::InvalidArgument,
        "request field `total` must not be null, but is in rows 0, 2",
    )
    .await;
    let many = vec![texts("shop", &[Some("a"); 10_001]), numbers("total", &[Some(1.0); 10_001])];
    check(
        asked(many),
        Code::InvalidArgument,
        "10001 rows in one request, at most 10000 are answered; send several requests",
    )
    .await;
    check(
        v1::GetFeaturesRequest { at: vec![NOW], ..asked(good()) },
        Code::FailedPrecondition,
        "this server answers for now only: `at` is refused; start it with `serve.request_time: allowed` to replay the \
         past",
    )
    .await;
    let status = server.predict(asked_to_predict("buy", good())).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "there is no model `buy`; did you mean `buys`?"));
    let status = server.predict(asked_to_predict("buys", good())).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::FailedPrecondition, "model `buys` has no deployed version; run `coeval model deploy`")
    );
    server.stop().await;
}

#[tokio::test]
async fn request_time_is_taken_where_it_is_allowed() {
    let mut server = start_with(RequestTime::Allowed, None).await;
    let rows = || vec![texts("shop", &[Some("a"); 3]), numbers("total", &[Some(1.0); 3])];
    let at = vec![NOW - 2 * HOUR, NOW, NOW + 3 * HOUR];
    let answer = server.features(v1::GetFeaturesRequest { at: at.clone(), ..asked(rows()) }).await.unwrap();
    assert_eq!(answer.at, at);
    assert_eq!(answer.features[0].statuses, [5, 1, 4]);
    assert_eq!(answer.features[0].reasons, [v1::UnavailableReason::AtBeforeStore as i32, 0, 0]);
    assert_eq!(answer.features[1].reasons, [v1::UnavailableReason::AtBeforeStore as i32, 0, 0], "a transform's too");
    let status = server.features(v1::GetFeaturesRequest { at: vec![NOW], ..asked(rows()) }).await.unwrap_err();
    assert_eq!(status.message(), "`at` has 1 times for 3 rows; send one per row");
    let status = server.features(v1::GetFeaturesRequest { at: vec![i64::MAX; 3], ..asked(rows()) }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    server.stop().await;
}

#[tokio::test]
async fn a_model_goes_from_file_to_prediction() {
    let mut server = server().await;
    let registered = server.register("buys", b"a model").await.unwrap();
    assert_eq!((registered.version, registered.existed), (1, false));
    let again = server.register("buys", b"a model").await.unwrap();
    assert_eq!((again.version, again.existed, &again.digest), (1, true, &registered.digest));
    let status = server.register("byus", b"a model").await.unwrap_err();
    assert_eq!(status.message(), "there is no model `byus`; did you mean `buys`?");
    let deployed = server.deploy("buys", 1).await.unwrap();
    assert_eq!((deployed.version, deployed.champion, deployed.existed), (1, 1, false));
    assert_eq!(server.register("buys", b"another model").await.unwrap().version, 2);

    let rows = vec![
        texts("shop", &[Some("a"), Some("b"), Some("a"), None, Some("a")]),
        numbers("total", &[Some(1.0), Some(1.0), None, Some(4.0), Some(7.0)]),
    ];
    let request = v1::PredictRequest { include_features: true, ..asked_to_predict("buys", rows.clone()) };
    let answer = server.predict(request).await.unwrap();
    // The echo adds up: amount, both and total, with 0 for what is missing. A fifth row needs a second batch.
    assert_eq!(floats(&answer.outputs[0]), [6.0, 1.0, 0.0, 4.0, 18.0]);
    assert_eq!(answer.outputs[0].validity, [0b11011]);
    assert_eq!(answer.outputs[1].name, "doubled");
    let statuses: Vec<v1::RowStatus> = answer.outcomes.iter().map(|outcome| outcome.status()).collect();
    use v1::RowStatus::{Failed, Fallback, Ok};
    assert_eq!(statuses, [Ok, Ok, Failed, Ok, Ok]);
    assert_eq!(answer.outcomes[2].reason, "request field `total` must not be null");
    assert!(answer.outcomes.iter().all(|outcome| outcome.version == 1 && outcome.arm == "champion"));
    assert!(!answer.request_id.is_empty());
    assert_eq!(answer.features.len(), 4);

    // A version that is named must be active.
    let request = v1::PredictRequest { version: 2, ..asked_to_predict("buys", rows.clone()) };
    let status = server.predict(request).await.unwrap_err();
    assert_eq!(status.message(), "version 2 of model `buys` is not active (active: 1); run `coeval model deploy`");

    // `missing: refuse` and no fallback: the row fails and the others do not.
    server.register("strict", b"strict").await.unwrap();
    server.deploy("strict", 1).await.unwrap();
    let answer = server.predict(asked_to_predict("strict", rows)).await.unwrap();
    assert_eq!(floats(&answer.outputs[0]), [2.0, 0.0, 0.0, 0.0, 2.0]);
    let statuses: Vec<v1::RowStatus> = answer.outcomes.iter().map(|outcome| outcome.status()).collect();
    assert_eq!(statuses, [Ok, Failed, Failed, Failed, Ok]);
    assert_eq!(answer.outcomes[1].reason, "feature `last_sale:amount` is null and `missing` is `refuse`");

    // More rows than the queue holds: the declared fallback.
    let many = vec![texts("shop", &[Some("a"); 9]), numbers("total", &[Some(1.0); 9])];
    let answer = server.predict(asked_to_predict("buys", many)).await.unwrap();
    assert_eq!(floats(&answer.outputs[0]), [0.5; 9]);
    assert!(answer.outcomes.iter().all(|outcome| outcome.status() == Fallback));
    assert!(answer.outcomes[0].reason.contains("9 rows in one request"), "{}", answer.outcomes[0].reason);

    let models = server.control.list_models(v1::ListModelsRequest { project: "shops".into() }).await.unwrap();
    let models = models.into_inner().models;
    let shown: Vec<(&str, u32, &str)> =
        models.iter().map(|model| (model.name.as_str(), model.version, model.state.as_str())).collect();
    assert_eq!(shown, [("buys", 1, "champion"), ("buys", 2, "registered"), ("strict", 1, "champion")]);
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    let counted = "coeval_predicted_rows_total{model=\"buys\",version=\"1\",status=\"fallback\"} 9";
    assert!(metrics.contains(counted), "{metrics}");

    // NaN is no answer.
    let rows = vec![texts("shop", &[Some("a"); 2]), numbers("total", &[Some(f64::NAN), Some(1.0)])];
    let answer = server.predict(asked_to_predict("buys", rows)).await.unwrap();
    assert_eq!(floats(&answer.outputs[0]), [0.5, 6.0]);
    assert_eq!(answer.outcomes[0].status(), Fallback);
    assert_eq!(answer.outcomes[0].reason, "the model returned NaN for `score`");
    assert_eq!(answer.outcomes[1].status(), Ok);
    server.stop().await;
}

#[tokio::test]
async fn a_row_that_the_model_fails_on_fails_alone() {
    let picky = EchoRuntime::new().with_hook(|inputs| match inputs[0].data() {
        TensorData::Float32(values) if values.contains(&13.0) => Err(ModelError::Runtime("13 is not allowed".into())),
        _ => Ok(()),
    });
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(picky))).await;
    server.register("buys", b"a model").await.unwrap();
    server.deploy("buys", 1).await.unwrap();
    let rows = vec![texts("shop", &[Some("b"); 4]), numbers("total", &[Some(1.0), Some(13.0), Some(2.0), Some(3.0)])];
    let answer = server.predict(asked_to_predict("buys", rows)).await.unwrap();
    assert_eq!(floats(&answer.outputs[0]), [1.0, 0.5, 2.0, 3.0]);
    assert_eq!(answer.outcomes[1].reason, "13 is not allowed");
    server.stop().await;
}

#[tokio::test]
async fn a_version_that_cannot_run_is_not_deployed() {
    let mut server = server().await;
    server.register("buys", b"a model").await.unwrap();
    server.register("buys", b"broken").await.unwrap();
    server.deploy("buys", 1).await.unwrap();
    let status = server.deploy("buys", 2).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let text = "version 2 of model `buys` is not deployed, and nothing that answers requests has changed: cannot load the model \
                `buys/2`: ";
    assert!(status.message().starts_with(text), "{}", status.message());
    let kinds: Vec<String> = server.history().await;
    assert_eq!(kinds[kinds.len() - 2..], ["model_prepare", "model_give_up"]);
    assert_eq!(server.states("buys").await, ["champion", "registered"]);
    let given_up = server.models("buys").await.remove(1).given_up;
    assert!(given_up.contains("it says it is broken"), "{given_up}");
    let status = server.deploy("buys", 3).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let rows = vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])];
    assert_eq!(server.predict(asked_to_predict("buys", rows)).await.unwrap().outcomes[0].version, 1);
    server.stop().await;

    let mut without = start_with(RequestTime::Refused, None).await;
    without.register("buys", b"a model").await.unwrap();
    let status = without.deploy("buys", 1).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (
            Code::Unimplemented,
            "this build has no torch, so it cannot run models; use a `coeval` that was built with it"
        )
    );
    without.stop().await;
}

#[tokio::test]
async fn events_are_pushed_in_order_and_acknowledged_each() {
    let mut server = server().await;
    let push = |amount: f64| v1::PushRequest {
        project: "shops".into(),
        source: "sales".into(),
        rows: vec![
            texts("shop", &[Some("a")]),
            numbers("amount", &[Some(amount)]),
            column("sold_at", Type::Timestamp, &[Value::Timestamp(NOW)]),
        ],
        wait_visible: true,
    };
    let pushes: Vec<v1::PushRequest> = (0..40).map(|i| push(f64::from(i))).collect();
    let mut answers = server.ingest.push(tokio_stream::iter(pushes)).await.unwrap().into_inner();
    let mut sequences = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        sequences.push(answer.last_sequence);
    }
    assert_eq!(sequences, (1..=40).collect::<Vec<u64>>());
    assert_eq!(server.events.pushed.lock().unwrap().len(), 40);
    let mut refused = async |push: v1::PushRequest, code: Code, text: &str| {
        let answers = server.ingest.push(tokio_stream::iter([push])).await.unwrap();
        let status = answers.into_inner().message().await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    };
    let source = v1::PushRequest { source: "sale".into(), ..push(1.0) };
    refused(source, Code::NotFound, "there is no source `sale`; did you mean `sales`?").await;
    let mut timeless = push(1.0);
    timeless.rows.pop();
    refused(timeless, Code::InvalidArgument, "events of source `sales` need their time in column `sold_at`").await;
    let mut wrong = push(1.0);
    wrong.rows[0] = numbers("shop", &[Some(1.0)]);
    refused(wrong, Code::InvalidArgument, "column `shop` must be string, but carries float64").await;

    let request = v1::MaterializeRequest { project: "shops".into(), through: NOW, ..Default::default() };
    let mut progress = server.ingest.materialize(request).await.unwrap().into_inner();
    let first = progress.message().await.unwrap().unwrap();
    assert_eq!((first.rows_applied, first.done), (1, false));
    let last = progress.message().await.unwrap().unwrap();
    assert!(last.done && last.through == NOW);
    assert!(progress.message().await.unwrap().is_none());

    let request = v1::CompactRequest { project: "shops".into(), sources: Vec::new(), dry_run: true };
    let mut progress = server.ingest.compact(request.clone()).await.unwrap().into_inner();
    let first = progress.message().await.unwrap().unwrap();
    assert_eq!((first.source.as_str(), first.rows_written, first.done), ("sales", 5, false));
    let last = progress.message().await.unwrap().unwrap();
    assert!(last.done && last.tables[0].changed && last.tables[0].rows == 9);
    assert!(progress.message().await.unwrap().is_none());
    let wrong = v1::CompactRequest { sources: vec!["sails".into()], ..request };
    let mut progress = server.ingest.compact(wrong).await.unwrap().into_inner();
    let status = progress.message().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "there is no source `sails`"));
    let request = v1::ImportFilesRequest { project: "shops".into(), source: "sales".into() };
    let mut progress = server.ingest.import_files(request).await.unwrap().into_inner();
    assert_eq!(progress.message().await.unwrap_err().code(), Code::InvalidArgument);

    let flushed = server.ingest.flush(v1::FlushRequest { project: "shops".into() }).await.unwrap();
    assert_eq!(flushed.into_inner().events, 7);
    server.stop().await;
}

#[tokio::test]
async fn the_control_log_is_followed() {
    let mut server = server().await;
    let request = v1::RefreshRequest { project: "shops".into(), at_least: 1 };
    let answer = server.control.refresh(request).await.unwrap().into_inner();
    assert_eq!((answer.control_head, answer.ready, answer.reasons.len()), (1, true, 0));
    let shown = server.control.get_catalog(v1::GetCatalogRequest::default()).await.unwrap().into_inner();
    assert_eq!((shown.project.as_str(), shown.control_head), ("shops", 1));
    assert!(shown.views[0].ready);
    let inputs: Vec<(&str, &str, bool)> = shown.services[0]
        .inputs
        .iter()
        .map(|input| (input.name.as_str(), input.r#type.as_str(), input.nullable))
        .collect();
    assert_eq!(inputs, [("shop", "string", true), ("total", "float64", false), ("coupon", "string", true)]);

    // Definitions that do not compile leave the last good ones in place.
    let mut broken = catalog();
    broken.files.insert("shop.yaml".into(), "nonsense: [".into());
    server.registry.submit(&project(), &Change::Apply(broken), "test", None).await.unwrap();
    let request = v1::RefreshRequest { project: "shops".into(), at_least: 2 };
    let answer = server.control.refresh(request).await.unwrap().into_inner();
    assert_eq!((answer.control_head, answer.ready, answer.reasons.len()), (2, false, 1));
    assert!(answer.reasons[0].starts_with("the applied definitions do not compile here"), "{}", answer.reasons[0]);
    let rows = vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])];
    assert_eq!(doubles(&server.features(asked(rows)).await.unwrap().features[0]), [2.0]);
    let (status, ready) = server.http("GET", "/ready", "").await;
    assert_eq!(status, 200);
    assert!(ready.contains("\"degraded\":true"), "{ready}");
    assert_eq!(*server.events.adopted.lock().unwrap(), 1);
    server.stop().await;
}

#[tokio::test]
async fn http_answers_probes_and_twins() {
    let mut server = server().await;
    assert_eq!(server.http("GET", "/live", "").await, (200, "live\n".to_owned()));
    let (status, ready) = server.http("GET", "/ready", "").await;
    assert_eq!((status, ready.as_str()), (200, "{\"ready\":true,\"degraded\":false,\"reasons\":[]}"));
    let body =
        "{\"service\": \"buying\", \"rows\": {\"shop\": [\"a\", null], \"total\": [1, 2.5]}, \"provenance\": true}";
    let (status, answer) = server.http("POST", "/v1/features", body).await;
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["features"][0]["values"], serde_json::json!([2.0, null]));
    assert_eq!(answer["features"][0]["statuses"], serde_json::json!(["PRESENT", "NOT_FOUND"]));
    let (status, answer) = server.http("POST", "/v1/features", "{\"service\": \"buyin\"}").await;
    assert_eq!(status, 404);
    assert!(answer.contains("did you mean `buying`?"), "{answer}");
    assert_eq!(server.http("POST", "/v1/features", "{\"serv\": 1}").await.0, 400);

    server.register("buys", b"a model").await.unwrap();
    server.deploy("buys", 1).await.unwrap();
    let body = "{\"rows\": {\"shop\": [\"a\"], \"total\": [1]}, \"request_id\": \"r1\"}";
    let (status, answer) = server.http("POST", "/v1/models/buys/predict", body).await;
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["outputs"]["score"], serde_json::json!([6.0]));
    assert_eq!((&answer["outcomes"][0]["status"], &answer["request_id"]), (&"OK".into(), &"r1".into()));
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    for line in [
        "coeval_calls_total{method=\"Predict\",of=\"buys\",code=\"Ok\"} 1",
        "coeval_feature_values_total{service=\"buying\",feature=\"last_sale:amount\",status=\"NOT_FOUND\"} 1",
        "coeval_ready 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    server.stop().await;
}

#[tokio::test]
async fn values_are_counted_once_however_often_metrics_are_read() {
    let server = server().await;
    let whole = "{\"service\": \"buying\", \"rows\": {\"shop\": [\"a\", \"a\"], \"total\": [1, 2], \"coupon\": [\"x\", \"y\"]}}";
    let partly = "{\"service\": \"buying\", \"rows\": {\"shop\": [\"a\", null], \"total\": [1, 2]}}";
    let line = |feature: &str, status: &str, count: u32| {
        format!("coeval_feature_values_total{{service=\"buying\",feature=\"{feature}\",status=\"{status}\"}} {count}\n")
    };
    for turn in 1..=2 {
        for body in [whole, partly, whole] {
            assert_eq!(server.http("POST", "/v1/features", body).await.0, 200);
        }
        for _ in 0..2 {
            let (_, metrics) = server.http("GET", "/metrics", "").await;
            for line in [
                line("last_sale:amount", "PRESENT", 5 * turn),
                line("last_sale:amount", "NOT_FOUND", turn),
                line("basket:total", "PRESENT", 6 * turn),
                line("basket:coupon", "PRESENT", 4 * turn),
                line("basket:coupon", "NULL_VALUE", 2 * turn),
                format!("coeval_calls_total{{method=\"GetFeatures\",of=\"buying\",code=\"Ok\"}} {}\n", 3 * turn),
            ] {
                assert!(metrics.contains(&line), "{line} is not in {metrics}");
            }
        }
    }
    server.stop().await;
}

/// Writes a project with the definitions of these tests and puts them in force.
async fn applied_project(settings: &str) -> (tempfile::TempDir, Settings) {
    let folder = tempfile::tempdir().unwrap();
    let file = SourceFile { path: "coeval.yaml".into(), text: settings.into() };
    let settings = feature_defs::parse::parse_settings(&Files::new(vec![file]), None, &|_| None);
    let settings = settings.unwrap_or_else(|wrong| panic!("{wrong:?}"));
    let (store, root) = registry::store::open_store(&place(folder.path(), &settings.store)).unwrap();
    let clock: Clock = Arc::new(|| NOW);
    let registry = Registry::open(store, &root.join("shops"), wall_clock(&clock)).await.unwrap();
    registry.submit(&project(), &Change::Apply(catalog()), "test", None).await.unwrap();
    (folder, settings)
}

const SETTINGS: &str =
    "project: shops\nstore: ./.coeval\nonline: embedded\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n";

#[tokio::test]
async fn what_was_pushed_is_served_also_after_a_restart() {
    let (folder, settings) = applied_project(SETTINGS).await;
    let options = || ServeOptions {
        settings: settings.clone(),
        roles: Roles::ALL,
        project_dir: folder.path().to_owned(),
        clock: Arc::new(|| NOW),
        runtime: Some(Arc::new(EchoRuntime::new())),
        certifier: None,
    };
    for start in 0..2 {
        let running = serve(options()).await.unwrap();
        running.started().await;
        let channel = Channel::from_shared(format!("http://{}", running.grpc_addr)).unwrap().connect().await.unwrap();
        let mut control = ControlClient::new(channel.clone());
        let request = v1::RefreshRequest { project: "shops".into(), at_least: 1 };
        for _ in 0..200 {
            if control.refresh(request.clone()).await.unwrap().into_inner().ready {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if start == 0 {
            let push = v1::PushRequest {
                project: "shops".into(),
                source: "sales".into(),
                rows: vec![
                    texts("shop", &[Some("a"), Some("b")]),
                    numbers("amount", &[Some(2.5), None]),
                    column("sold_at", Type::Timestamp, &[Value::Timestamp(NOW - HOUR), Value::Timestamp(NOW)]),
                ],
                wait_visible: true,
            };
            let answers = IngestClient::new(channel.clone()).push(tokio_stream::iter([push])).await.unwrap();
            let answer = answers.into_inner().message().await.unwrap().unwrap();
            assert_eq!((answer.accepted, answer.rejected.len()), (2, 0));
        }
        let mut client = GatewayClient::new(channel);
        let rows = vec![texts("shop", &[Some("a"), Some("b"), Some("c")]), numbers("total", &[Some(1.0); 3])];
        let answer = client.get_features(asked(rows)).await.unwrap().into_inner();
        assert_eq!(doubles(&answer.features[1]), [3.5, 0.0, 0.0]);
        assert_eq!(answer.features[0].statuses, [1, 2, 3], "start {start}");
        drop((client, control));
        running.shutdown_handle().shut_down();
        running.wait().await.unwrap();
    }
}

#[tokio::test]
async fn a_redis_that_is_not_there_is_named() {
    let settings = SETTINGS.replace("embedded", "redis://127.0.0.1:1");
    let (folder, settings) = applied_project(&settings).await;
    let options = ServeOptions {
        settings,
        roles: Roles::ALL,
        project_dir: folder.path().to_owned(),
        clock: Arc::new(|| NOW),
        runtime: None,
        certifier: None,
    };
    let running = serve(options).await.unwrap();
    running.started().await;
    let readiness = running.gateway.readiness();
    let text = readiness.reasons.join("; ");
    assert!(readiness.ready && readiness.degraded, "{text}");
    assert!(text.contains("redis://127.0.0.1:1 cannot be reached"), "{text}");
    assert!(text.contains("check `online:` in coeval.yaml"), "{text}");
    running.shutdown_handle().shut_down();
    // Its end says what could not be closed; events are safe in the log.
    let ended = running.wait().await.unwrap_err().to_string();
    assert!(ended.contains("redis://127.0.0.1:1 cannot be reached"), "{ended}");
}

#[test]
fn errors_stay_small() {
    assert!(size_of::<ServeError>() <= 128, "{}", size_of::<ServeError>());
}

#[tokio::test]
async fn a_drain_finishes_what_is_in_flight() {
    let gate = Gate::new();
    let runtime = EchoRuntime::new().with_gate(gate.clone());
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(runtime))).await;
    server.register("buys", b"a model").await.unwrap();
    server.deploy("buys", 1).await.unwrap();
    gate.close();
    let mut client = server.gateway.clone();
    let rows = vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])];
    let in_flight = tokio::spawn(async move { client.predict(asked_to_predict("buys", rows)).await });
    while gate.held() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.running.shutdown_handle().shut_down();
    while !server.running.gateway().drain.is_cancelled() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (status, ready) = server.http("GET", "/ready", "").await;
    assert_eq!(status, 503);
    assert!(ready.contains("the server is shutting down"), "{ready}");
    gate.open();
    let answer = in_flight.await.unwrap().unwrap().into_inner();
    assert_eq!(floats(&answer.outputs[0]), [6.0]);
    assert_eq!(answer.outcomes[0].status(), v1::RowStatus::Ok);
    server.stop().await;
}

/// Fails `careful` on 13, and `small` on 14.
fn picky() -> EchoRuntime {
    EchoRuntime::new().with_hook(|inputs| {
        let TensorData::Float32(values) = inputs[0].data() else { return Ok(()) };
        let refused = if inputs[0].row_shape() == [2] {
            values.contains(&13.0) || values.contains(&14.0)
        } else {
            values.contains(&14.0)
        };
        if refused { Err(ModelError::Runtime("it is unlucky".into())) } else { Ok(()) }
    })
}

#[tokio::test]
async fn a_smaller_model_answers_what_the_model_cannot() {
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(picky()))).await;
    server.register("careful", b"a model").await.unwrap();
    server.deploy("careful", 1).await.unwrap();
    let rows = || vec![texts("shop", &[Some("a"); 4]), numbers("total", &[Some(1.0), Some(13.0), None, Some(14.0)])];
    let reasons = |answer: &v1::PredictResponse| -> Vec<String> {
        answer.outcomes.iter().map(|outcome| outcome.reason.clone()).collect()
    };
    let statuses =
        |answer: &v1::PredictResponse| -> Vec<v1::RowStatus> { answer.outcomes.iter().map(|o| o.status()).collect() };
    use v1::RowStatus::{Failed, Fallback, Ok};

    let answer = server.predict(asked_to_predict("careful", rows())).await.unwrap();
    assert_eq!(statuses(&answer), [Ok, Failed, Failed, Failed]);
    assert_eq!(
        reasons(&answer)[1],
        "it is unlucky; model `small`, which answers in its place, has no deployed version"
    );

    server.register("small", b"a model").await.unwrap();
    server.deploy("small", 1).await.unwrap();
    let answer = server.predict(asked_to_predict("careful", rows())).await.unwrap();
    // The echo adds up: amount and total, and for the smaller one total alone, or its declared value.
    assert_eq!(floats(&answer.outputs[0]), [3.0, 13.0, 0.0, 0.25]);
    assert_eq!(statuses(&answer), [Ok, Fallback, Failed, Fallback]);
    assert_eq!(
        reasons(&answer),
        [
            "",
            "it is unlucky; model `small` version 1 answered",
            "request field `total` must not be null",
            "it is unlucky; model `small`: it is unlucky",
        ]
    );
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    for line in [
        "coeval_unanswered_rows_total{model=\"careful\",version=\"1\",cause=\"model\",status=\"fallback\"} 2",
        "coeval_unanswered_rows_total{model=\"careful\",version=\"1\",cause=\"model\",status=\"failed\"} 2",
        "coeval_queue_rows{model=\"careful\",version=\"1\"} 0",
        "coeval_batch_wait_seconds{model=\"careful\",version=\"1\",reason=\"linger\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is missing in:\n{metrics}");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_sooner_deadline_counts_and_whoever_leaves_frees_the_queue() {
    let gate = Gate::new();
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(EchoRuntime::new().with_gate(gate.clone())))).await;
    for model in ["careful", "buys"] {
        server.register(model, b"a model").await.unwrap();
        server.deploy(model, 1).await.unwrap();
    }
    let rows = |total: f64| vec![texts("shop", &[Some("a")]), numbers("total", &[Some(total)])];
    let wrong = v1::PredictRequest { tier: "shp".into(), ..asked_to_predict("careful", rows(1.0)) };
    let status = server.predict(wrong).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "there is no tier of model `careful` named `shp`; did you mean `shop`?")
    );
    let named = v1::PredictRequest { tier: "shop".into(), ..asked_to_predict("careful", rows(1.0)) };
    let answer = server.predict(named).await.unwrap();
    let (outcome, waits) = (&answer.outcomes[0], answer.outcomes[0].waits.unwrap());
    assert_eq!((waits.executor_busy_us, waits.linger_us, waits.memory_permit_us, waits.tier_us), (0, 0, 0, 0));
    assert_eq!(outcome.wait_reason(), v1::WaitReason::None);

    gate.close();
    let started = std::time::Instant::now();
    let patient = v1::PredictRequest { deadline_ms: 60_000, ..asked_to_predict("careful", rows(1.0)) };
    let answer = server.predict(patient).await.unwrap();
    assert!(answer.outcomes[0].reason.starts_with("the deadline passed before the model answered"));
    assert!(started.elapsed() < Duration::from_secs(30), "the deadline of the definitions did not count");

    // One runs, one waits; the caller of the one that waits goes away.
    let running = tokio::spawn({
        let mut gateway = server.gateway.clone();
        async move { gateway.predict(asked_to_predict("buys", rows(2.0))).await }
    });
    let held = async |rows: u64| {
        let served = server.running.gateway().served();
        let model = served.models["buys"].server.clone();
        while model.metrics().queue_rows != rows {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    while gate.held() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let waiting = tokio::spawn({
        let mut gateway = server.gateway.clone();
        async move { gateway.predict(asked_to_predict("buys", rows(3.0))).await }
    });
    held(1).await;
    waiting.abort();
    held(0).await;
    gate.open();
    assert_eq!(floats(&running.await.unwrap().unwrap().into_inner().outputs[0]), [8.0]);
    server.stop().await;
}

#[tokio::test]
async fn forwards_that_never_end_make_the_process_unready_and_end_it() {
    let gate = Gate::new();
    let held = gate.clone();
    let hanging = EchoRuntime::new().with_hook(move |inputs| {
        if matches!(inputs[0].data(), TensorData::Float32(values) if values.contains(&666.0)) {
            held.pass();
        }
        Ok(())
    });
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(hanging))).await;
    server.register("careful", b"a model").await.unwrap();
    server.deploy("careful", 1).await.unwrap();
    gate.close();
    let rows = || vec![texts("shop", &[Some("a")]), numbers("total", &[Some(666.0)])];
    let good = vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])];
    let model = server.running.gateway().served().models["careful"].server.clone();
    let hung = async |times: u64| {
        while model.metrics().hangs < times {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // The caller has its answer by its own deadline, and the executor is given up a little later.
    assert_ne!(
        server.predict(asked_to_predict("careful", rows())).await.unwrap().outcomes[0].status(),
        v1::RowStatus::Ok
    );
    hung(1).await;
    while model.metrics().executors_ready < 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answer = server.predict(asked_to_predict("careful", good)).await.unwrap();
    assert_eq!(answer.outcomes[0].status(), v1::RowStatus::Ok, "{}", answer.outcomes[0].reason);
    assert_eq!(server.http("GET", "/ready", "").await.0, 200);

    assert_ne!(
        server.predict(asked_to_predict("careful", rows())).await.unwrap().outcomes[0].status(),
        v1::RowStatus::Ok
    );
    hung(2).await;
    assert!(!server.running.gateway().readiness().ready);
    let ended = server.running.wait().await.unwrap_err().to_string();
    assert!(ended.starts_with("only a new process can help: model `careful`: "), "{ended}");
    gate.open();
}

#[tokio::test]
async fn what_does_not_fit_the_machine_is_not_deployed() {
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(EchoRuntime::new().with_memory(1 << 50, 8)))).await;
    server.register("wide", b"a model").await.unwrap();
    let status = server.deploy("wide", 1).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let text = "250 executors of 250 threads each need 62500 cores, but there are ";
    assert!(status.message().starts_with(text), "{}", status.message());

    server.register("buys", b"a model").await.unwrap();
    let status = server.deploy("buys", 1).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let text =
        "model `buys/1` needs 1048576.0 GiB of memory (the file of 7 bytes + 1 executor x (1048576.0 GiB of weights";
    assert!(status.message().contains(text), "{}", status.message());
    assert!(server.running.gateway().served().models.is_empty());
    server.stop().await;
}
