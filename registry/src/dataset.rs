//! Datasets: the control log remembers which snapshot was made of which definitions, sources and spine, so that a model
//! can be traced to its rows. The rows and their manifest lie on the object store and are not read here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{DatasetId, DatasetName, Digest, ServiceName, SourceName};
use crate::state::Fact;

/// What a caller says of a snapshot that it has written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDataset {
    pub name: DatasetName,
    pub id: DatasetId,
    /// The path of the manifest below the store's prefix.
    pub manifest: String,
    pub service: ServiceName,
    /// The semantic digest of the service that the rows were computed by.
    pub service_digest: Digest,
    pub spine_digest: Digest,
    pub source_digests: BTreeMap<SourceName, Digest>,
    pub rows: u64,
}

/// A snapshot, as the state holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DatasetRecord {
    /// When and by whom it was recorded.
    pub created: Fact,
    pub dataset: NewDataset,
}
