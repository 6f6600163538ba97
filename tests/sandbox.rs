//! Whole servers in this process, on free ports, over a project folder of their own and a clock that tests move.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use arrow::array::RecordBatch;
use arrow_flight::FlightDescriptor;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use feature_defs::catalog::{Files, Settings, SourceFile};
use feature_defs::parse::parse_settings;
use feature_defs::plan::{Plan, SourceSchemas, compile_definitions, read_definitions};
use feature_defs::time::Micros;
use futures::{StreamExt, TryStreamExt};
use gateway::config::ServeOptions;
use gateway::roles::Roles;
use gateway::run::{Running, serve};
use inference::model::Runtime;
use offline_store::source::Sources;
use prost::Message as _;
use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use registry::Registry;
use registry::id::{Digest, ModelName, ProjectName, ServiceName, SourceName, ViewName};
use registry::state::{Catalog, Change, ViewDigests};
use tonic::transport::Channel;

pub mod s3;

/// A clock that stands still until a test moves it.
#[derive(Clone)]
pub struct ManualClock(Arc<AtomicI64>);

impl ManualClock {
    pub fn at(now: Micros) -> ManualClock {
        ManualClock(Arc::new(AtomicI64::new(now)))
    }
    pub fn now(&self) -> Micros {
        self.0.load(Ordering::SeqCst)
    }
    pub fn advance(&self, by: Micros) {
        self.0.fetch_add(by, Ordering::SeqCst);
    }
    pub fn clock(&self) -> Arc<dyn Fn() -> Micros + Send + Sync> {
        let time = self.0.clone();
        Arc::new(move || time.load(Ordering::SeqCst))
    }
}

/// A project folder that goes when the value does.
pub struct Project {
    pub folder: tempfile::TempDir,
    files: Vec<(String, String)>,
}

impl Project {
    /// Writes `coeval.yaml` and one definition file.
    pub fn new(settings: &str, definitions: &str) -> Result<Project> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("coeval.yaml"), settings)?;
        std::fs::write(folder.path().join("definitions.yaml"), definitions)?;
        let files =
            vec![("coeval.yaml".into(), settings.to_string()), ("definitions.yaml".into(), definitions.to_string())];
        Ok(Project { folder, files })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn files(&self) -> Files {
        Files::new(
            self.files.iter().map(|(path, text)| SourceFile { path: path.clone(), text: text.clone() }).collect(),
        )
    }

    pub fn settings(&self) -> Result<Settings> {
        let files = self.files();
        parse_settings(&files, None, &|_| None)
            .map_err(|wrong| anyhow::anyhow!(feature_defs::diagnose::render(&wrong, &files, false)))
    }

    /// Compiles the definitions as they are now.
    pub async fn plan(&self) -> Result<(Plan, SourceSchemas)> {
        let settings = self.settings()?;
        let files = self.files();
        let shown = |wrong: Vec<_>| anyhow::anyhow!(feature_defs::diagnose::render(&wrong, &files, false));
        let (catalog, _) = read_definitions(&settings.project, &files).map_err(shown)?;
        let sources = Sources::new(self.path())?;
        let mut schemas = SourceSchemas::new();
        for source in &catalog.sources {
            if let feature_defs::catalog::SourceKind::Files { pattern, .. } = &source.kind {
                schemas.insert(source.name.value.clone(), sources.schema(pattern).await?);
            }
        }
        let plan = compile_definitions(&settings.project, &files, &schemas).map_err(shown)?;
        Ok((plan, schemas))
    }

    fn store(&self) -> PathBuf {
        self.path().join(".coeval")
    }

    /// Puts the definitions in force, as `coeval apply` does.
    pub async fn apply(&self) -> Result<()> {
        let settings = self.settings()?;
        let (plan, schemas) = self.plan().await?;
        let digest = |digest: &feature_defs::digest::Digest| Digest::try_new(digest.as_str());
        let mut catalog = Catalog {
            digest: digest(&plan.digest)?,
            files: self.files[1..].iter().cloned().collect(),
            settings: self.files[0].1.clone(),
            source_schemas: Default::default(),
            views: Default::default(),
            services: Default::default(),
            models: Default::default(),
        };
        for (source, columns) in &schemas {
            catalog.source_schemas.insert(SourceName::try_new(source.as_str())?, serde_json::to_value(columns)?);
        }
        for view in &plan.views {
            let digests =
                ViewDigests { storage: digest(&view.storage_digest)?, semantic: digest(&view.semantic_digest)? };
            catalog.views.insert(ViewName::try_new(&*view.name)?, digests);
        }
        for service in &plan.services {
            catalog.services.insert(ServiceName::try_new(&*service.name)?, digest(&service.semantic_digest)?);
        }
        for model in &plan.models {
            catalog.models.insert(ModelName::try_new(&*model.name)?, ServiceName::try_new(&*model.service.name)?);
        }
        let project = ProjectName::try_new(settings.project.as_str())?;
        let (store, root) = registry::store::open_store(&self.store().to_string_lossy())?;
        let clock: registry::Clock = Arc::new(chrono_now);
        let registry = Registry::open(store, &root.join(project.as_str()), clock).await?;
        registry.submit(&project, &Change::Apply(catalog), "test", None).await?;
        Ok(())
    }
}

fn chrono_now() -> chrono::DateTime<chrono::Utc> {
    chrono::DateTime::UNIX_EPOCH
}

/// A server in this process and clients to it.
pub struct Server {
    pub project: String,
    pub running: Running,
    pub gateway: GatewayClient<Channel>,
    pub ingest: IngestClient<Channel>,
    pub control: ControlClient<Channel>,
    channel: Channel,
}

impl Server {
    pub async fn start(project: &Project, clock: &ManualClock, runtime: Option<Arc<dyn Runtime>>) -> Result<Server> {
        let settings = project.settings()?;
        let name = settings.project.value.clone();
        let project_dir = project.path().into();
        let options =
            ServeOptions { settings, roles: Roles::ALL, project_dir, clock: clock.clock(), runtime, certifier: None };
        let running = serve(options).await?;
        running.started().await;
        let channel = Channel::from_shared(format!("http://{}", running.grpc_addr))?.connect().await?;
        let server = Server {
            project: name,
            running,
            gateway: GatewayClient::new(channel.clone()),
            ingest: IngestClient::new(channel.clone()),
            control: ControlClient::new(channel.clone()),
            channel,
        };
        server.wait_ready().await?;
        Ok(server)
    }

    /// Waits until backfills are over.
    pub async fn wait_ready(&self) -> Result<()> {
        let mut control = self.control.clone();
        for _ in 0..600 {
            let request = v1::RefreshRequest { project: self.project.clone(), at_least: 0 };
            let answer = control.refresh(request).await?.into_inner();
            if answer.ready {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("the server is not ready after 12 s")
    }

    pub async fn stop(self) -> Result<()> {
        drop((self.gateway, self.ingest, self.control, self.channel));
        self.running.shutdown_handle().shut_down();
        Ok(self.running.wait().await?)
    }

    /// One push, acknowledged when what is due is visible.
    pub async fn push(&self, source: &str, rows: Vec<v1::Column>) -> Result<v1::PushResponse> {
        let request =
            v1::PushRequest { project: self.project.clone(), source: source.into(), rows, wait_visible: true };
        let mut ingest = self.ingest.clone();
        let mut answers = ingest.push(futures::stream::iter([request])).await?.into_inner();
        answers.message().await?.context("the push was not answered")
    }

    pub async fn flush(&self) -> Result<()> {
        self.ingest.clone().flush(v1::FlushRequest { project: self.project.clone() }).await?;
        Ok(())
    }

    /// A training set over Flight, with statuses.
    pub async fn training_set(&self, service: &str, spine: RecordBatch) -> Result<RecordBatch, tonic::Status> {
        self.dataset(service, "", spine).await
    }

    /// A training set that is kept under a name; an empty one keeps nothing.
    pub async fn dataset(&self, service: &str, name: &str, spine: RecordBatch) -> Result<RecordBatch, tonic::Status> {
        let command = v1::TrainingSetCommand {
            project: self.project.clone(),
            service: service.into(),
            dataset: name.into(),
            statuses: true,
            ..v1::TrainingSetCommand::default()
        };
        let descriptor = FlightDescriptor::new_cmd(command.encode_to_vec());
        let encoded = FlightDataEncoderBuilder::new()
            .with_flight_descriptor(Some(descriptor))
            .with_schema(spine.schema())
            .build(futures::stream::iter([Ok(spine)]))
            .filter_map(|data| async move { data.ok() });
        let mut client = FlightServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20);
        let answer = client.do_exchange(encoded).await?.into_inner();
        collect(answer).await
    }

    /// The rows of a dataset that is kept.
    pub async fn read_dataset(&self, name: &str, id: &str) -> Result<RecordBatch, tonic::Status> {
        let ticket = v1::DatasetTicket {
            project: self.project.clone(),
            name: name.into(),
            id: id.into(),
            ..v1::DatasetTicket::default()
        };
        let mut client = FlightServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20);
        let ticket = arrow_flight::Ticket { ticket: ticket.encode_to_vec().into() };
        collect(client.do_get(ticket).await?.into_inner()).await
    }
}

/// All batches of an answer as one.
async fn collect(answer: tonic::Streaming<arrow_flight::FlightData>) -> Result<RecordBatch, tonic::Status> {
    // The last message says how it ended and holds no batch.
    let answer = answer.try_filter(|message| std::future::ready(!message.data_header.is_empty()));
    let answer = answer.map_err(|status| FlightError::Tonic(Box::new(status)));
    let mut batches = FlightRecordBatchStream::new_from_flight_data(answer);
    let mut collected = Vec::new();
    while let Some(batch) = batches.try_next().await.map_err(tonic::Status::from)? {
        collected.push(batch);
    }
    let schema = batches.schema().cloned().ok_or_else(|| tonic::Status::internal("no schema came"))?;
    arrow::compute::concat_batches(&schema, &collected).map_err(|error| tonic::Status::internal(error.to_string()))
}

/// Columns of requests.
pub mod column {
    use proto::v1::column::Values;
    use proto::v1::{BoolValues, Column, DoubleValues, Int64Values, StringValues, TimestampValues};

    fn column<T: Clone + Default>(name: &str, values: &[Option<T>], make: impl Fn(Vec<T>) -> Values) -> Column {
        let mut validity = Vec::new();
        if values.iter().any(Option::is_none) {
            validity = vec![0u8; values.len().div_ceil(8)];
            for (row, _) in values.iter().enumerate().filter(|(_, value)| value.is_some()) {
                validity[row / 8] |= 1 << (row % 8);
            }
        }
        let filled = values.iter().map(|value| value.clone().unwrap_or_default()).collect();
        Column { name: name.into(), validity, values: Some(make(filled)) }
    }

    pub fn strings(name: &str, values: &[Option<&str>]) -> Column {
        let owned: Vec<Option<String>> = values.iter().map(|value| value.map(str::to_string)).collect();
        column(name, &owned, |values| Values::Strings(StringValues { values }))
    }
    pub fn doubles(name: &str, values: &[Option<f64>]) -> Column {
        column(name, values, |values| Values::Doubles(DoubleValues { values }))
    }
    pub fn int64s(name: &str, values: &[Option<i64>]) -> Column {
        column(name, values, |values| Values::Int64s(Int64Values { values }))
    }
    pub fn bools(name: &str, values: &[Option<bool>]) -> Column {
        column(name, values, |values| Values::Bools(BoolValues { values }))
    }
    pub fn timestamps(name: &str, values: &[Option<i64>]) -> Column {
        column(name, values, |microseconds| Values::Timestamps(TimestampValues { microseconds }))
    }
}
