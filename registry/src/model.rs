//! Models: what a version was made of, and its bytes.
//!
//! A version that nobody can reproduce or trace is a liability, so registering takes the whole record: bytes, code, data,
//! environment and numbers. The bytes are stored under their own SHA-256, so that two people who register the same file
//! store it once, and a file that has changed under its name is noticed when it is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{DatasetId, Digest, EntryNumber, ModelName, ModelVersion, ServiceName, Sha256};
use crate::log::{Fetched, get_bounded};
use crate::state::Fact;

/// An object that is stored under the digest of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The path below the store's prefix.
    pub location: String,
    pub sha256: Sha256,
    pub bytes: u64,
}

/// One tensor that the model takes, and the features that fill its columns, in order, with every `*` expanded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputColumns {
    pub name: String,
    pub dtype: String,
    pub columns: Vec<String>,
}

/// What a caller says of a model that is to become a version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewModel {
    pub name: ModelName,
    pub artifact: Artifact,
    /// `torchscript` or `pt2`: a text, so that a log that names a later runtime can still be read.
    pub runtime: String,
    pub service: ServiceName,
    /// The semantic digest of the service that the model was trained on; the version is served by no other.
    pub service_digest: Digest,
    pub inputs: Vec<InputColumns>,
    pub author: String,
    /// The git commit of the training code.
    pub commit: String,
    pub environment_digest: String,
    pub seed: Option<u64>,
    pub hardware: String,
    /// Library -> version, as the training process saw them.
    pub libraries: BTreeMap<String, String>,
    pub dataset: Option<DatasetId>,
    /// Finite numbers; JSON has no others, so they are refused.
    pub metrics: BTreeMap<String, f64>,
    /// How much it leans on each feature of its service: finite, and none below 0.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub importances: BTreeMap<String, f64>,
    /// Rows with the outputs that the training process got for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub golden_rows: Option<Artifact>,
}

impl NewModel {
    /// Whether registering `self` beside `other` would make two versions that nobody could tell apart: they compute the same,
    /// and `self` brings no other golden rows to judge that by.
    pub fn computes_the_same_as(&self, other: &Self) -> bool {
        self.artifact.sha256 == other.artifact.sha256
            && self.service_digest == other.service_digest
            && self.service == other.service
            && self.runtime == other.runtime
            && self.inputs == other.inputs
            && (self.golden_rows.is_none() || self.golden_sha256() == other.golden_sha256())
    }

    fn golden_sha256(&self) -> Option<&Sha256> {
        self.golden_rows.as_ref().map(|golden| &golden.sha256)
    }
}

/// A version, as the state holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    pub version: ModelVersion,
    /// When and by whom it was registered.
    pub registered: Fact,
    /// The `apply` whose definitions it is served by: the latest one, when it was registered, that had its service digest.
    pub definitions: EntryNumber,
    pub model: NewModel,
    /// Who said that it may be served, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub approvals: BTreeMap<String, Fact>,
}

#[derive(Debug, Error)]
pub enum ArtifactError {
    #[error("could not {operation} {object}; check that the store is there and try again")]
    Store {
        operation: &'static str,
        object: Path,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error(
        "{object} is missing although the control log names it; restore it, or register the model again from its file"
    )]
    Missing { object: Path },
    #[error("{object} is corrupt: {reason}; register the model again from its file, which mends the object")]
    Corrupt { object: Path, reason: String },
}

/// The artifacts of all models below one prefix of a store.
#[derive(Debug, Clone)]
pub struct Artifacts {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
}

impl Artifacts {
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &Path) -> Self {
        Self { store, prefix: prefix.clone() }
    }

    /// Stores a model file as `models/<name>/<sha256>.pt`. Storing the same bytes again changes nothing, except that an
    /// object found damaged is written anew.
    pub async fn put_artifact(&self, model: &ModelName, bytes: Bytes) -> Result<Artifact, ArtifactError> {
        self.put(model, "pt", bytes).await
    }

    /// Stores golden rows as `models/<name>/<sha256>.golden`.
    pub async fn put_golden_rows(&self, model: &ModelName, bytes: Bytes) -> Result<Artifact, ArtifactError> {
        self.put(model, "golden", bytes).await
    }

    /// The bytes of an artifact: exactly those that were stored, or an error.
    pub async fn get(&self, artifact: &Artifact) -> Result<Bytes, ArtifactError> {
        let object = self.resolve(&artifact.location);
        let fetched = get_bounded(self.store.as_ref(), &object, artifact.bytes).await;
        let bytes = match fetched {
            Ok(Fetched::Bytes(bytes)) => bytes,
            Ok(Fetched::Absent) => return Err(ArtifactError::Missing { object }),
            Ok(Fetched::TooLarge(bytes)) => {
                let reason = format!("it has {bytes} bytes where {} were stored", artifact.bytes);
                return Err(ArtifactError::Corrupt { object, reason });
            }
            Err(source) => return Err(ArtifactError::Store { operation: "read", object, source: Box::new(source) }),
        };
        if bytes.len() as u64 != artifact.bytes {
            let reason = format!("it has {} bytes where {} were stored", bytes.len(), artifact.bytes);
            return Err(ArtifactError::Corrupt { object, reason });
        }
        let (bytes, sha256) = digest_off_thread(bytes).await;
        if sha256 != artifact.sha256 {
            let reason = format!("its bytes have the SHA-256 {sha256}");
            return Err(ArtifactError::Corrupt { object, reason });
        }
        Ok(bytes)
    }

    async fn put(&self, model: &ModelName, extension: &str, bytes: Bytes) -> Result<Artifact, ArtifactError> {
        let size = bytes.len() as u64;
        let (bytes, sha256) = digest_off_thread(bytes).await;
        let location = format!("models/{model}/{sha256}.{extension}");
        let object = self.resolve(&location);
        let artifact = Artifact { location, sha256, bytes: size };

        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let source = match self.store.put_opts(&object, bytes.clone().into(), create).await {
            Ok(_) => return Ok(artifact),
            Err(error) => error,
        };
        match self.get(&artifact).await {
            Ok(_) => Ok(artifact),
            // The name is the digest, so whatever else lies there is damage, and these bytes are the cure.
            Err(ArtifactError::Corrupt { .. }) => match self.store.put(&object, bytes.into()).await {
                Ok(_) => Ok(artifact),
                Err(source) => Err(ArtifactError::Store { operation: "mend", object, source: Box::new(source) }),
            },
            Err(ArtifactError::Missing { .. } | ArtifactError::Store { .. }) => {
                Err(ArtifactError::Store { operation: "store", object, source: Box::new(source) })
            }
        }
    }

    fn resolve(&self, location: &str) -> Path {
        location.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

/// Model files run to gigabytes, and hashing them must not hold up the requests on the same runtime thread.
async fn digest_off_thread(bytes: Bytes) -> (Bytes, Sha256) {
    /// Below this a thread switch costs more than the hash.
    const INLINE_BYTES_MAX: usize = 256 << 10;
    if bytes.len() <= INLINE_BYTES_MAX {
        let sha256 = Sha256::of(&bytes);
        return (bytes, sha256);
    }
    let shared = bytes.clone();
    match tokio::task::spawn_blocking(move || Sha256::of(&shared)).await {
        Ok(sha256) => (bytes, sha256),
        // The runtime is shutting down: the answer is still owed, so it is computed here.
        Err(_) => {
            let sha256 = Sha256::of(&bytes);
            (bytes, sha256)
        }
    }
}

#[cfg(test)]
mod tests;
