//! The other crates of the process behind the gateway's own words: the event log with its appliers as [`Events`], and the
//! offline engine as a service on the gRPC port.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat};
use feature_defs::forgotten::Forgotten;
use feature_defs::plan::{ModelPlan, Plan, ServicePlan, ViewPlan};
use feature_defs::time::Micros;
use ingest::log::LogError;
use ingest::{Ingest, IngestError, IngestOptions, Phase};
use object_store::ObjectStore;
use object_store::path::Path;
use offline_store::dataset::Manifest;
use offline_store::flight::Surroundings;
use offline_store::table::TableError;
use offline_store::{Engine, EngineOptions};
use registry::dataset::NewDataset;
use registry::id::{DatasetId, DatasetName, Digest, NameError, ServiceName, SourceName};
use registry::state::Change;
use tokio::sync::mpsc;
use tonic::Status;

use crate::answer::Gateway;
use crate::config::{ServeError, ServeOptions, store_folder};
use crate::events::{
    Events, EventsError, Forgetting, ForgottenPlace, Mode, Progress, Pushed, TableDone, TableProgress, Wait,
};
use crate::grpc::NoFlight;
use crate::metrics::Freshness;
use crate::roles::Role;
use crate::run::Mount;
use crate::status::{Failure, Kind};

/// Messages of one materialization that wait for a slow reader; the runtime leaves some out when it is full.
const PROGRESS_MAX: usize = 16;
/// Who the control log names for datasets: Flight does not say who asked.
const DATASETS_BY: &str = "flight";

/// Opens the event log and starts its appliers.
pub(crate) async fn open_events(options: IngestOptions) -> Result<Arc<dyn Events>, ServeError> {
    let folder = options.folder.clone();
    std::fs::create_dir_all(&folder).map_err(|source| ServeError::Folder { folder, source })?;
    let freshness = Freshness::default();
    let options = IngestOptions { meter: Some(Arc::new(freshness.clone())), ..options };
    let ingest = Ingest::open(options).await.map_err(|error| ServeError::Events(Box::new(error)))?;
    Ok(Arc::new(Live { ingest, freshness, plan: Mutex::new(None) }))
}

/// The appliers of this process.
struct Live {
    ingest: Ingest,
    freshness: Freshness,
    /// The plan that they follow.
    plan: Mutex<Option<Arc<Plan>>>,
}

impl Live {
    fn is_static(&self, view: &str) -> bool {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        plan.as_ref().and_then(|plan| plan.view(view)).is_some_and(|view| view.source.is_static())
    }
}

#[async_trait]
impl Events for Live {
    async fn adopt(&self, plan: Arc<Plan>, pinned: &[Arc<ViewPlan>]) -> Result<(), EventsError> {
        self.ingest.adopt_with(plan.clone(), pinned).await?;
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        Ok(())
    }

    fn backfilling(&self) -> Vec<String> {
        let phases = self.ingest.backfilling().into_iter();
        let views = phases.filter_map(|(generation, phase)| match phase {
            Phase::Building { rows } => {
                Some(format!("view `{}` is being backfilled: {rows} rows so far", generation.view))
            }
            // A static source is loaded without being asked.
            Phase::Unmaterialized if self.is_static(&generation.view) => {
                Some(format!("view `{}` waits for its static source to be loaded", generation.view))
            }
            // Nothing is being done about it: it waits for somebody to materialize its source.
            Phase::Unmaterialized | Phase::Ready => None,
        });
        let streams = self.ingest.status().into_iter();
        let streams = streams.filter_map(|stream| match (stream.trouble, stream.importing) {
            (Some(trouble), _) => Some(format!("stream `{}`: {trouble}", stream.source)),
            (None, Some(rows)) => {
                Some(format!("the prior history of `{}` is being imported: {rows} rows so far", stream.source))
            }
            (None, None) => None,
        });
        views.chain(streams).chain(self.ingest.troubles()).collect()
    }

    fn freshness(&self) -> Option<Freshness> {
        Some(self.freshness.clone())
    }

    async fn push(&self, source: &str, batch: RecordBatch, wait: Wait) -> Result<Pushed, EventsError> {
        let wait = match wait {
            Wait::Durable => ingest::Wait::Durable,
            Wait::Visible => ingest::Wait::Visible,
        };
        let pushed = self.ingest.push(source, batch, wait).await?;
        let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(Pushed {
            accepted: count(pushed.accepted),
            duplicates: count(pushed.duplicates),
            early: count(pushed.early),
            rejected: pushed.rejected,
            last_sequence: pushed.last_sequence.unwrap_or(0),
        })
    }

    async fn materialize(
        &self,
        sources: &[String],
        through: Micros,
        mode: Mode,
        progress: mpsc::Sender<Progress>,
    ) -> Result<(), EventsError> {
        let mode = match mode {
            Mode::Apply => ingest::Mode::Apply,
            Mode::DryRun => ingest::Mode::DryRun,
        };
        let (sender, mut reports) = mpsc::channel::<ingest::Progress>(PROGRESS_MAX);
        let translate = async {
            while let Some(report) = reports.recv().await {
                for report in by_view(report) {
                    // Somebody who no longer listens does not stop what others will read.
                    let _ = progress.send(report).await;
                }
            }
        };
        let (done, ()) = tokio::join!(self.ingest.materialize(sources, through, mode, sender), translate);
        Ok(done?)
    }

    async fn compact(
        &self,
        sources: &[String],
        mode: Mode,
        progress: mpsc::Sender<TableProgress>,
    ) -> Result<Vec<TableDone>, EventsError> {
        let mode = match mode {
            Mode::Apply => ingest::Mode::Apply,
            Mode::DryRun => ingest::Mode::DryRun,
        };
        let (sender, reports) = mpsc::channel(PROGRESS_MAX);
        let (done, ()) = tokio::join!(self.ingest.compact(sources, mode, sender), tell(reports, progress));
        let tables = done?.into_iter().map(|done| TableDone {
            source: done.source,
            changed: done.changed,
            files_before: done.files_before as u64,
            files_after: done.files_after as u64,
            files_taken: done.files_taken as u64,
            bytes_before: done.bytes_before,
            bytes_after: done.bytes_after,
            rows: done.rows,
            buckets: done.buckets,
            seconds: done.seconds,
        });
        Ok(tables.collect())
    }

    async fn import_files(
        &self,
        source: &str,
        progress: mpsc::Sender<TableProgress>,
    ) -> Result<TableDone, EventsError> {
        let (sender, reports) = mpsc::channel(PROGRESS_MAX);
        let (done, ()) = tokio::join!(self.ingest.import_files(source, sender), tell(reports, progress));
        let done = done?;
        Ok(TableDone {
            source: done.source,
            changed: done.changed,
            files_after: done.files as u64,
            bytes_after: done.bytes,
            rows: done.rows,
            buckets: done.buckets,
            seconds: done.seconds,
            ..TableDone::default()
        })
    }

    async fn follow_forgotten(&self, list: &Arc<Forgotten>) {
        self.ingest.follow_forgotten(list).await;
    }

    async fn forget(
        &self,
        what: Forgetting,
        mode: Mode,
        progress: mpsc::Sender<String>,
    ) -> Result<Vec<ForgottenPlace>, EventsError> {
        let mode = match mode {
            Mode::Apply => ingest::Mode::Apply,
            Mode::DryRun => ingest::Mode::DryRun,
        };
        let Forgetting { list, hashes, keys } = what;
        let places = self.ingest.forget(&ingest::Forgetting { list, hashes, keys }, mode, progress).await?;
        let place = |place: ingest::Place| ForgottenPlace {
            kind: place.kind.to_owned(),
            name: place.name,
            rows_removed: place.rows_removed,
            rows_cleared: place.rows_cleared,
            files: place.files,
            note: place.note,
        };
        Ok(places.into_iter().map(place).collect())
    }

    async fn flush(&self) -> Result<u64, EventsError> {
        Ok(self.ingest.flush().await?)
    }

    async fn shutdown(&self) -> Result<(), EventsError> {
        Ok(self.ingest.shutdown().await?)
    }
}

/// One message for each view; one without a view where none has anything to do.
fn by_view(report: ingest::Progress) -> Vec<Progress> {
    let of_source = Progress {
        source: report.source.to_string(),
        rows_read: report.rows_read,
        rows_total: report.rows_total,
        seconds: report.seconds,
        message: report.message,
        ..Progress::default()
    };
    if report.views.is_empty() {
        return vec![of_source];
    }
    let of_view = |view: ingest::ViewProgress| Progress {
        view: view.view.to_string(),
        rows_new: view.rows_new,
        rows_applied: view.rows_applied,
        rows_stale: view.rows_stale,
        entities: view.entities,
        ..of_source.clone()
    };
    report.views.into_iter().map(of_view).collect()
}

impl ingest::Meter for Freshness {
    fn visible(&self, source: &str, events: &[ingest::Visible]) {
        let seconds = |micros: Micros| micros as f64 / 1e6;
        self.observe(source, events.iter().map(|event| (seconds(event.since_event), seconds(event.since_arrival))));
    }
}

/// Passes reports on; somebody who no longer listens does not stop what others will read.
async fn tell(mut reports: mpsc::Receiver<ingest::TableProgress>, progress: mpsc::Sender<TableProgress>) {
    while let Some(report) = reports.recv().await {
        let _ = progress.send((report.source.to_string(), report.rows_written)).await;
    }
}

impl From<IngestError> for EventsError {
    fn from(error: IngestError) -> EventsError {
        use IngestError as E;
        match &error {
            E::UnknownSource { .. } | E::UnknownFiles { .. } | E::UnknownTable { .. } => {
                EventsError::Unknown(error.to_string())
            }
            E::NotAStream { .. }
            | E::NotFiles { .. }
            | E::NoFilesToImport { .. }
            | E::UnknownColumn { .. }
            | E::NoEventTime { .. }
            | E::HistoryAfterLive { .. }
            | E::ImportTooLarge { .. }
            | E::NoPlan
            | E::ThroughInFuture { .. }
            | E::Rows(_)
            | E::Log(LogError::TooLarge { .. }) => EventsError::Invalid(error.to_string()),
            // What files hold is their owner's to mend, and the text says which.
            E::Source(_)
            | E::Scan { .. }
            | E::History(TableError::Source(_) | TableError::Files { .. } | TableError::FilesChanged { .. }) => {
                EventsError::Invalid(crate::status::chain(&error))
            }
            E::Importing { .. } | E::TooManyEarly { .. } | E::TableInUse { .. } | E::Log(LogError::Full { .. }) => {
                EventsError::Full(error.to_string())
            }
            E::Log(LogError::Slow { .. }) => EventsError::Full(error.to_string()),
            E::Stopping => EventsError::Stopping,
            // Another process takes them.
            E::Fenced { .. } | E::Log(LogError::Superseded { .. }) => EventsError::Unavailable(Box::new(error)),
            _ if error.is_retryable() => EventsError::Unavailable(Box::new(error)),
            _ => EventsError::Failed(Box::new(error)),
        }
    }
}

/// The engine that computes training sets, before there is a gateway for it to ask.
pub(crate) struct Offline {
    pub engine: Arc<Engine>,
    memory_bytes: u64,
    store_folder: Option<PathBuf>,
}

pub(crate) fn open_engine(
    options: &ServeOptions,
    project: &str,
    store: Arc<dyn ObjectStore>,
    prefix: Path,
) -> Result<Offline, ServeError> {
    let offline = &options.settings.offline;
    let memory_bytes = offline.memory_bytes;
    let engine = Engine::new(EngineOptions {
        project_folder: options.project_dir.clone(),
        project: project.to_owned(),
        store,
        prefix,
        memory_bytes,
        spill_folder: offline.spill.as_ref().map(|folder| options.project_dir.join(folder)),
    })?;
    let store_folder = store_folder(&options.project_dir, &options.settings.store);
    Ok(Offline { engine: Arc::new(engine), memory_bytes, store_folder })
}

impl Offline {
    /// Adds the Flight service to the gRPC port.
    pub fn mount(self) -> Mount {
        let Offline { engine, memory_bytes, store_folder } = self;
        Box::new(move |routes, gateway| {
            // Whoever judges a rollout replays what was served with the same engine, whatever its roles.
            let _ = gateway.engine.set(engine.clone());
            if !gateway.roles.has(Role::Offline) {
                return routes.add_service(NoFlight::new(gateway.roles));
            }
            let process = Arc::new(Process { gateway: gateway.clone(), store_folder });
            routes.add_service(offline_store::flight::service(engine, process, memory_bytes))
        })
    }
}

/// What the offline engine asks of the process: compiled services, flushed histories, and the control log to write
/// datasets into.
struct Process {
    gateway: Arc<Gateway>,
    store_folder: Option<PathBuf>,
}

impl Process {
    fn record(manifest: &Manifest, path: &Path) -> Result<NewDataset, NameError> {
        let mut source_digests = BTreeMap::new();
        for (source, digest) in &manifest.source_digests {
            source_digests.insert(SourceName::try_new(source.as_str())?, Digest::try_new(digest.as_str())?);
        }
        Ok(NewDataset {
            name: DatasetName::try_new(manifest.name.as_str())?,
            id: DatasetId::try_new(manifest.id.as_str())?,
            manifest: path.to_string(),
            service: ServiceName::try_new(manifest.service.as_str())?,
            service_digest: Digest::try_new(manifest.service_digest.as_str())?,
            spine_digest: Digest::try_new(manifest.spine_digest.as_str())?,
            source_digests,
            // The record was made before an entity of it was forgotten, and stays what it is.
            rows: manifest.rows_made(),
        })
    }
}

#[async_trait]
impl Surroundings for Process {
    fn service(&self, project: &str, service: &str) -> Result<Arc<ServicePlan>, Status> {
        self.gateway.check_serving()?;
        self.gateway.check_project(project)?;
        let served = self.gateway.served();
        let plan = served.plan()?;
        let known = || plan.services.iter().map(|service| &*service.name);
        Ok(plan.service(service).cloned().ok_or_else(|| Failure::unknown("feature service", service, known()))?)
    }

    fn model(&self, project: &str, model: &str) -> Result<Arc<ModelPlan>, Status> {
        self.gateway.check_serving()?;
        self.gateway.check_project(project)?;
        let served = self.gateway.served();
        let plan = served.plan()?;
        let known = || plan.models.iter().map(|model| &*model.name);
        let found = plan.models.iter().find(|known| &*known.name == model).cloned();
        Ok(found.ok_or_else(|| Failure::unknown("model", model, known()))?)
    }

    async fn before_read(&self) -> Result<(), Status> {
        if let Some(events) = &self.gateway.events {
            events.flush().await.map_err(Failure::from)?;
        }
        Ok(())
    }

    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status> {
        let record = Process::record(manifest, path);
        let record = record.map_err(|error| Failure::internal("the dataset could not be recorded", &error))?;
        let (registry, project) = (&self.gateway.registry, &self.gateway.project);
        let change = Change::CreateDataset(record);
        registry.submit(project, &change, DATASETS_BY, None).await.map_err(Failure::from)?;
        // Somebody may have been forgotten while it was made.
        crate::forget::catch_up(&self.gateway, manifest, path).await?;
        Ok(())
    }

    fn dataset(&self, project: &str, name: &str, id: &str) -> Result<Path, Status> {
        self.gateway.check_project(project)?;
        let state = self.gateway.registry.state();
        let project = state.project(self.gateway.project.as_str());
        let known = || project.into_iter().flat_map(|project| project.dataset_names.keys()).map(DatasetName::as_str);
        let wanted = if id.is_empty() { name } else { id };
        let record = project.and_then(|project| project.dataset(wanted));
        let record = record.ok_or_else(|| Failure::unknown("dataset", wanted, known()))?;
        if !name.is_empty() && record.dataset.name.as_str() != name {
            let text = format!("dataset `{id}` is one of `{}`, not of `{name}`", record.dataset.name);
            return Err(Failure::new(Kind::Invalid, text).into());
        }
        let path = Path::parse(&record.dataset.manifest);
        Ok(path.map_err(|error| Failure::internal("the place of the dataset cannot be read", &error))?)
    }

    fn store_folder(&self) -> Option<PathBuf> {
        self.store_folder.clone()
    }

    fn now(&self) -> String {
        let now = DateTime::from_timestamp_micros((self.gateway.clock)()).unwrap_or_default();
        now.to_rfc3339_opts(SecondsFormat::Micros, true)
    }
}
