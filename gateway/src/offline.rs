//! The offline engine behind Flight, and what it needs of the process: compiled services, flushed histories, and the
//! control log to write datasets into.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat};
use feature_defs::plan::ServicePlan;
use object_store::path::Path;
use offline_store::Engine;
use offline_store::dataset::Manifest;
use offline_store::flight::{self, Surroundings};
use registry::dataset::NewDataset;
use registry::id::{DatasetId, DatasetName, Digest, NameError, ServiceName, SourceName};
use registry::state::Change;
use tonic::Status;
use tonic::service::Routes;

use crate::answer::Gateway;
use crate::follow::Retry;
use crate::status::{Failure, Kind};

/// Adds the Flight service of an engine to the gRPC port.
pub fn mount(routes: Routes, engine: Arc<Engine>, gateway: Arc<Gateway>, memory_bytes: u64) -> Routes {
    let surroundings = Arc::new(Offline { engine: engine.clone(), gateway });
    routes.add_service(flight::service(engine, surroundings, memory_bytes))
}

struct Offline {
    engine: Arc<Engine>,
    gateway: Arc<Gateway>,
}

impl Offline {
    fn record(&self, manifest: &Manifest, path: &Path) -> Result<NewDataset, NameError> {
        let sources = manifest.source_digests.iter();
        let source_digests: Result<BTreeMap<SourceName, Digest>, NameError> = sources
            .map(|(name, digest)| Ok((SourceName::try_new(name.as_str())?, Digest::try_new(digest.as_str())?)))
            .collect();
        Ok(NewDataset {
            name: DatasetName::try_new(manifest.name.as_str())?,
            id: DatasetId::try_new(manifest.id.as_str())?,
            manifest: path.to_string(),
            service: ServiceName::try_new(manifest.service.as_str())?,
            service_digest: Digest::try_new(manifest.service_digest.as_str())?,
            spine_digest: Digest::try_new(manifest.spine_digest.as_str())?,
            source_digests: source_digests?,
            rows: manifest.rows,
        })
    }
}

#[async_trait]
impl Surroundings for Offline {
    fn service(&self, project: &str, service: &str) -> Result<Arc<ServicePlan>, Status> {
        self.gateway.check_project(project)?;
        self.gateway.check_serving()?;
        let served = self.gateway.served();
        let plan = served.plan()?;
        let known = || plan.services.iter().map(|service| &*service.name);
        Ok(plan.service(service).cloned().ok_or_else(|| Failure::unknown("feature service", service, known()))?)
    }

    async fn before_read(&self) -> Result<(), Status> {
        if let Some(events) = &self.gateway.events {
            events.flush().await.map_err(Failure::from)?;
        }
        Ok(())
    }

    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status> {
        let record = self.record(manifest, path);
        let record = record.map_err(|error| Failure::internal("a dataset's record", &error))?;
        let change = Change::CreateDataset(record);
        let (registry, project) = (&self.gateway.registry, &self.gateway.project);
        registry.submit(project, &change, "flight", None).await.map_err(Failure::from)?;
        self.gateway.follower.follow(Retry::Later).await;
        Ok(())
    }

    fn dataset(&self, project: &str, name: &str, id: &str) -> Result<Path, Status> {
        self.gateway.check_project(project)?;
        let state = self.gateway.registry.state();
        let project = state.project(self.gateway.project.as_str());
        let known = || project.iter().flat_map(|project| project.dataset_names.keys().map(DatasetName::as_str));
        let wanted = if id.is_empty() { name } else { id };
        let record = project.and_then(|project| project.dataset(wanted));
        let record = record.ok_or_else(|| Failure::unknown("dataset", wanted, known()))?;
        if !name.is_empty() && record.dataset.name.as_str() != name {
            let text = format!("dataset {wanted} is of name `{}`, not `{name}`", record.dataset.name.as_str());
            return Err(Failure::new(Kind::Invalid, text).into());
        }
        Path::parse(&record.dataset.manifest)
            .map_err(|error| Failure::internal("the place of a dataset", &error).into())
    }

    fn now(&self) -> String {
        let now = DateTime::from_timestamp_micros((self.gateway.clock)()).unwrap_or_default();
        now.to_rfc3339_opts(SecondsFormat::Micros, true)
    }
}

impl std::fmt::Debug for Offline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offline").field("engine", &self.engine).finish_non_exhaustive()
    }
}
