//! The Flight service alone, on a free port of loopback, over definitions that this package knows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use async_trait::async_trait;
use feature_defs::plan::ServicePlan;
use object_store::path::Path;
use offline_store::dataset::Manifest;
use offline_store::flight::{self, Surroundings};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;

use crate::definitions::{Known, PROJECT, SERVICE, Setup, Workload, open};

/// Datasets by name, kept in a file between runs: a measured run reads what an earlier one made.
#[derive(Debug)]
struct Datasets {
    path: PathBuf,
    manifests: Mutex<BTreeMap<String, String>>,
}

struct Process {
    service: Arc<ServicePlan>,
    datasets: Datasets,
}

impl Datasets {
    fn open(path: PathBuf) -> anyhow::Result<Datasets> {
        let manifests = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Datasets { path, manifests: Mutex::new(manifests) })
    }

    fn add(&self, name: &str, manifest: &Path) -> anyhow::Result<()> {
        let mut manifests = self.manifests.lock().map_err(|_| anyhow::anyhow!("the datasets' lock is poisoned"))?;
        manifests.insert(name.into(), manifest.to_string());
        Ok(std::fs::write(&self.path, serde_json::to_vec_pretty(&*manifests)?)?)
    }

    fn get(&self, name: &str) -> Option<Path> {
        let manifests = self.manifests.lock().ok()?;
        Path::parse(manifests.get(name)?).ok()
    }
}

#[async_trait]
impl Surroundings for Process {
    fn service(&self, project: &str, service: &str) -> Result<Arc<ServicePlan>, Status> {
        if (project, service) != (PROJECT, SERVICE) {
            return Err(Status::not_found(format!("there is only service `{SERVICE}` of project `{PROJECT}`")));
        }
        Ok(self.service.clone())
    }

    async fn before_read(&self) -> Result<(), Status> {
        Ok(())
    }

    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status> {
        self.datasets.add(&manifest.name, path).map_err(|error| Status::internal(error.to_string()))
    }

    fn dataset(&self, _: &str, name: &str, _: &str) -> Result<Path, Status> {
        self.datasets.get(name).ok_or_else(|| Status::not_found(format!("no dataset `{name}` was made here")))
    }

    fn now(&self) -> String {
        // Information for manifests, which nobody reads here.
        "1970-01-01T00:00:00Z".into()
    }
}

/// Serves until the process is ended; `ready` is told the address once connections are accepted.
pub async fn run(setup: &Setup, views: usize, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let (engine, service) = open(setup, Workload::AsOf { views }, Known::AtOnce).await?;
    let datasets = Datasets::open(setup.store.join("datasets.json"))?;
    let surroundings = Arc::new(Process { service, datasets });
    let flight = flight::service(Arc::new(engine), surroundings, setup.memory_bytes);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    ready(listener.local_addr()?);
    tonic::transport::Server::builder()
        .add_service(flight)
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await
        .context("the server ended")
}
