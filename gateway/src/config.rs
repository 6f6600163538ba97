//! From settings to addresses and places, and what can be wrong with them before anything runs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use feature_defs::catalog::Settings;
use inference::model::Runtime;
use registry::RegistryError;
use registry::id::{EntryNumber, NameError};
use tokio::net::{TcpListener, lookup_host};

use crate::answer::Clock;
use crate::roles::{Roles, RolesError};

/// The word that allows listening beyond loopback.
const BEYOND_LOOPBACK: &str = "listen_beyond_loopback_without_authentication: true";

/// What a server is started with.
pub struct ServeOptions {
    pub settings: Settings,
    /// What this process does of what the project needs.
    pub roles: Roles,
    /// The folder of `coeval.yaml`: relative places in the settings and in definitions are below it.
    pub project_dir: PathBuf,
    pub clock: Clock,
    /// What models run on. None: what this build has, see [`default_runtime`].
    pub runtime: Option<Arc<dyn Runtime>>,
    /// A `coeval` that measures models in a process of its own before they are loaded. None: they are measured only where they
    /// will run.
    pub certifier: Option<PathBuf>,
}

/// Why a server does not start, or did not end well. Each says what to change.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("`{setting}` is `{text}`, which is not an address: {reason}; write host:port")]
    Address { setting: &'static str, text: String, reason: String },
    #[error(
        "{address} is in use by another process; stop it, or change `{setting}` in coeval.yaml (port 0 takes any free one)"
    )]
    AddressInUse { setting: &'static str, address: SocketAddr },
    #[error("cannot listen on {address}, see `{setting}` in coeval.yaml")]
    Listen { setting: &'static str, address: SocketAddr, source: std::io::Error },
    #[error(
        "`{setting}` is {address}, which others can reach, and nothing here asks who they are; keep to 127.0.0.1, or write \
         `{BEYOND_LOOPBACK}` under `serve:` in coeval.yaml"
    )]
    BeyondLoopback { setting: &'static str, address: SocketAddr },
    #[error(transparent)]
    Roles(#[from] RolesError),
    #[error(
        "the object store of `store:` has no control log of this project, and this machine kept a fold of one up to entry {kept}: \
         check that the store is the right one, and mounted; if the log is gone on purpose, remove {path}"
    )]
    NoLog { kept: EntryNumber, path: PathBuf },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("the object store of `store:` cannot be opened")]
    Store(#[from] registry::store::StoreError),
    #[error("the control log cannot be read")]
    Registry(#[source] Box<RegistryError>),
    #[error("cannot make the folder {folder}; check that its parent may be written")]
    Folder { folder: PathBuf, source: std::io::Error },
    /// Its text says the place and the next step.
    #[error(transparent)]
    OnlineStore(#[from] online_store::StoreError),
    #[error("the event log cannot be opened")]
    Events(#[source] Box<ingest::IngestError>),
    #[error("the offline engine cannot be set up, see `offline:` in coeval.yaml")]
    Engine(#[from] offline_store::EngineError),
    /// Its text says the place and the next step.
    #[error(transparent)]
    ServingLog(#[from] crate::serving_log::LogSetupError),
    #[error("the {what} server failed")]
    Server { what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("only a new process can help: {why}")]
    Stuck { why: String },
    #[error("the server ended without closing everything: {what}")]
    Drain { what: String },
}

/// A socket that listens already, so that whoever comes next finds the port taken.
#[derive(Debug)]
pub struct Listener {
    pub listener: TcpListener,
    pub address: SocketAddr,
}

pub const GRPC: &str = "serve.grpc";
pub const HTTP: &str = "serve.http";

/// Listens on an address of the settings.
pub async fn listen(setting: &'static str, text: &str, beyond_loopback: bool) -> Result<Listener, ServeError> {
    let not_an_address = |reason: String| ServeError::Address { setting, text: text.to_owned(), reason };
    let mut addresses = lookup_host(text).await.map_err(|error| not_an_address(error.to_string()))?;
    let address = addresses.next().ok_or_else(|| not_an_address("its host has no address".to_owned()))?;
    if !address.ip().is_loopback() && !beyond_loopback {
        return Err(ServeError::BeyondLoopback { setting, address });
    }
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServeError::AddressInUse { setting, address },
        _ => ServeError::Listen { setting, address, source },
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Listener { listener, address })
}

/// A place of the settings as a URL or path that does not depend on the current folder.
pub fn place(project_dir: &Path, text: &str) -> String {
    if text.contains("://") { text.to_owned() } else { project_dir.join(text).display().to_string() }
}

/// The folder on this machine's disk for a project: beside what it keeps in the object store, or in the project's folder
/// where that is a bucket.
pub fn local_folder(project_dir: &Path, store: &str, project: &str) -> PathBuf {
    let folder = store_folder(project_dir, store).unwrap_or_else(|| project_dir.join(".coeval"));
    folder.join("local").join(project)
}

/// The object store's root, where it is a folder on this machine.
pub fn store_folder(project_dir: &Path, store: &str) -> Option<PathBuf> {
    match store.split_once("://") {
        None => Some(project_dir.join(store)),
        Some(("file", path)) => Some(PathBuf::from(path.strip_prefix("localhost").unwrap_or(path))),
        Some(_) => None,
    }
}

/// What models run on in this build.
pub fn default_runtime() -> Option<Arc<dyn Runtime>> {
    #[cfg(feature = "torch")]
    return Some(Arc::new(inference::torch::TorchRuntime));
    #[cfg(not(feature = "torch"))]
    None
}

#[cfg(test)]
mod tests;
