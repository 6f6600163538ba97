//! Datasets: training sets that stay. A dataset is a snapshot: Parquet on the object store and a manifest that says what
//! it was made from, so that the same inputs give the same identity and a model can say what it was trained on.
//!
//! Each attempt to write one has a folder of its own, and the manifest, put last and only where there is none, names the
//! attempt that counts. So a reader sees nothing or everything, whatever was killed when, and two that write the same
//! dataset at once agree on one of them. What other attempts left is removed once a manifest is there.

mod digest;
pub mod redact;

mod profile;
mod read;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path as FilePath;
use std::sync::Arc;

use feature_defs::digest::{Canonical, Digest};
use feature_defs::plan::ServicePlan;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};

use crate::point_in_time::SourceReport;
use crate::profile::{self as drift_profile, Profiles};

pub use digest::table_digest;
pub use read::{BLOCK_ROWS_MAX, Batches, Part, Selection, StoredDataset};
pub use write::{Created, DatasetWriter};

/// Version of manifests. 3: datasets that lost rows because an entity was forgotten. 4: datasets with profiles, whose files
/// have columns behind those that readers see.
pub const FORMAT: u32 = 4;
/// The first format whose files may have columns that the manifest does not name.
const FORMAT_HIDDEN: u32 = 4;
const MANIFEST: &str = "manifest.json";
const PROFILES: &str = "profile.json";

#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("dataset object {path} could not be {verb}")]
    Store { path: String, verb: &'static str, source: object_store::Error },
    #[error("dataset object {path} is damaged ({what}); remove the folder {folder} and create the dataset again")]
    Damaged { path: String, folder: String, what: String },
    #[error("dataset manifest {path} has format {found}, newer than this version knows ({FORMAT}); upgrade coeval")]
    Newer { path: String, found: u32 },
    #[error("the dataset could not be written: {0}")]
    Write(String),
    #[error("a part of the dataset could not be decoded ({0}); if it stays so, remove its folder and create it again")]
    Part(String),
    #[error("dataset `{dataset}` has no column `{column}`; it has: {known}")]
    UnknownColumn { dataset: String, column: String, known: String },
    #[error("{0}")]
    Selection(String),
    #[error(
        "reading dataset `{dataset}` needs {needed_mib} MiB for one stream and offline.memory has no more to give; read with fewer streams at a time, or raise it in coeval.yaml"
    )]
    Memory { dataset: String, needed_mib: u64 },
}

/// What a dataset is, beside its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    pub id: String,
    pub service: String,
    /// Semantic digest of the service that computed it.
    pub service_digest: String,
    pub spine_digest: String,
    /// What each source was, by name.
    pub source_digests: BTreeMap<String, String>,
    pub visibility: String,
    pub seed: u64,
    /// Whether each feature has a `<feature>__status` column. Manifests of format 1 do not say.
    #[serde(default)]
    pub statuses: bool,
    pub rows: u64,
    pub files: Vec<DatasetFile>,
    /// Rows of every row group of every file, but for the last of a file. 0 in manifests of format 1: the files say.
    #[serde(default)]
    pub row_group_rows: u64,
    /// Bytes that all rows take in memory. 0 in manifests of format 1.
    #[serde(default)]
    pub memory_bytes: u64,
    pub columns: Vec<Column>,
    /// What the sources' known-at rules hid.
    #[serde(default)]
    pub known_at: Vec<SourceReport>,
    /// Of every feature, over all rows.
    pub profile: BTreeMap<String, Profile>,
    /// What drift is judged by. None where the dataset was made by a version that knew nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profiles: Option<ProfilesFile>,
    /// RFC 3339; information only.
    pub created_at: String,
    /// Rows that went because their entity was forgotten. The spine and the sources named above are those that it was
    /// made from, with these rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redacted: Vec<Redacted>,
}

impl Manifest {
    /// The rows of the spine that it was made for.
    pub fn rows_made(&self) -> u64 {
        self.rows + self.redacted.iter().map(|redacted| redacted.rows).sum::<u64>()
    }
}

/// Rows of one forgotten entity that are no longer in a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redacted {
    /// RFC 3339.
    pub at: String,
    pub entity: String,
    /// The keyed hash of its key, as in the control log.
    pub key: String,
    pub rows: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetFile {
    /// Below the manifest's folder.
    pub path: String,
    pub rows: u64,
    pub bytes: u64,
}

/// The file of a dataset's [`Profiles`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfilesFile {
    /// Below the manifest's folder.
    pub path: String,
    pub bytes: u64,
    /// Of its bytes, so that what was counted over its bins can say so.
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    pub name: String,
    #[serde(rename = "type")]
    pub column_type: String,
}

/// Exact counts and moments of one feature.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub rows: u64,
    pub nulls: u64,
    pub nans: u64,
    pub infinities: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mean: Option<f64>,
}

/// What a dataset is made from: everything that decides its content.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub name: String,
    pub service: Arc<ServicePlan>,
    pub spine_digest: String,
    pub sources: Vec<(String, String)>,
    pub visibility: String,
    pub statuses: bool,
    pub seed: u64,
    pub created_at: String,
}

impl Recipe {
    /// The same inputs under the same name give the same id. Whether rows are streamed in order while it is made does not
    /// matter: they are kept in the spine's.
    pub fn id(&self) -> String {
        let mut text = Canonical::new("dataset 2").with("name", &self.name);
        text.add("service", &self.service.semantic_digest);
        text.add("spine", &self.spine_digest);
        let sources: BTreeMap<&str, &str> = self.sources.iter().map(|(name, digest)| (&**name, &**digest)).collect();
        sources.iter().for_each(|(name, digest)| text.add(name, digest));
        text.add("visibility", &self.visibility);
        text.add("statuses", self.statuses);
        text.add("seed", self.seed);
        text.digest().as_str()[..16].to_string()
    }
}

pub fn dataset_folder(project: &Path, name: &str, id: &str) -> Path {
    project.clone().join("datasets").join(name).join(id)
}

/// The folder that a manifest speaks of.
pub fn folder_of(manifest: &Path) -> Path {
    let mut parts: Vec<_> = manifest.parts().collect();
    parts.pop();
    parts.into_iter().collect()
}

/// Reads a manifest.
pub async fn open(store: &Arc<dyn ObjectStore>, manifest: &Path) -> Result<Manifest, DatasetError> {
    let failed = |source| DatasetError::Store { path: manifest.to_string(), verb: "read", source };
    let bytes = store.get(manifest).await.map_err(failed)?.bytes().await.map_err(failed)?;
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let damaged = |e: serde_json::Error| damaged(manifest, &folder_of(manifest), e);
    let Versioned { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format > FORMAT {
        return Err(DatasetError::Newer { path: manifest.to_string(), found: format });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

/// Reads what drift is judged by. None where the dataset has no such thing.
pub async fn profiles(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    manifest: &Manifest,
) -> Result<Option<Profiles>, DatasetError> {
    let Some(file) = &manifest.profiles else { return Ok(None) };
    let folder = folder_of(path);
    let path = folder.clone().join_path(&file.path);
    if file.bytes > drift_profile::BYTES_MAX {
        return Err(damaged(&path, &folder, format!("{} bytes are no profiles", file.bytes)));
    }
    let failed = |source| DatasetError::Store { path: path.to_string(), verb: "read", source };
    let bytes = store.get_range(&path, 0..file.bytes).await.map_err(failed)?;
    if Digest::of_bytes(&bytes) != file.digest {
        return Err(damaged(&path, &folder, "its bytes are not those that the manifest speaks of"));
    }
    Profiles::from_bytes(&bytes).map(Some).map_err(|what| damaged(&path, &folder, what))
}

/// The dataset of a recipe, where it is complete already.
pub async fn find(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    recipe: &Recipe,
) -> Result<Option<(Manifest, Path)>, DatasetError> {
    let folder = dataset_folder(project, &recipe.name, &recipe.id());
    let path = folder.clone().join(MANIFEST);
    let manifest = match open(store, &path).await {
        Ok(manifest) => manifest,
        Err(DatasetError::Store { source: object_store::Error::NotFound { .. }, .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    // A dataset that is returned instead of being made is looked at first: parts are not synced one by one, so a machine
    // that lost its power may have kept the manifest and lost a part.
    let parts = manifest.files.iter().map(|file| (&file.path, file.bytes));
    for (path, bytes) in parts.chain(manifest.profiles.iter().map(|file| (&file.path, file.bytes))) {
        let part = folder.clone().join_path(path);
        let found = match store.head(&part).await {
            Ok(found) => found.size,
            Err(object_store::Error::NotFound { .. }) => return Err(damaged(&part, &folder, "it is missing")),
            Err(source) => return Err(DatasetError::Store { path: part.to_string(), verb: "found", source }),
        };
        if found != bytes {
            let what = format!("it has {found} bytes, the manifest says {bytes}");
            return Err(damaged(&part, &folder, what));
        }
    }
    Ok(Some((manifest, path)))
}

/// Removes what attempts that came to nothing have left of a dataset that is complete. `local` is the store's root where
/// it is a folder: what a killed process leaves of a file that it was writing cannot be seen through the store.
///
/// Another process that writes the same dataset right now loses its parts with this; it would have thrown them away.
pub async fn sweep(
    store: &Arc<dyn ObjectStore>,
    manifest: &Manifest,
    path: &Path,
    local: Option<&FilePath>,
) -> Result<(), DatasetError> {
    let folder = folder_of(path);
    let files = manifest.files.iter().map(|file| &file.path).chain(manifest.profiles.iter().map(|file| &file.path));
    let kept: BTreeSet<Path> = files.map(|path| folder.clone().join_path(path)).chain([path.clone()]).collect();
    let failed = |path: &Path, verb| {
        let path = path.to_string();
        move |source| DatasetError::Store { path, verb, source }
    };
    let objects: Vec<_> = store.list(Some(&folder)).try_collect().await.map_err(failed(&folder, "listed"))?;
    for object in objects.iter().filter(|object| !kept.contains(&object.location)) {
        match store.delete(&object.location).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(failed(&object.location, "removed")(source)),
        }
    }
    let Some(local) = local else { return Ok(()) };
    let local = local.join(folder.as_ref());
    let attempts: BTreeSet<String> =
        manifest.files.iter().filter_map(|file| Some(file.path.split_once('/')?.0.to_string())).collect();
    let swept = tokio::task::spawn_blocking(move || {
        // Folders of other attempts; those that are gone meanwhile have been removed by somebody else.
        for entry in std::fs::read_dir(local).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !attempts.contains(&name) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    });
    swept.await.map_err(|error| DatasetError::Write(error.to_string()))
}

fn damaged(path: &Path, folder: &Path, what: impl ToString) -> DatasetError {
    DatasetError::Damaged { path: path.to_string(), folder: folder.to_string(), what: what.to_string() }
}

/// Paths in manifests have slashes of their own.
trait JoinPath {
    fn join_path(self, path: &str) -> Path;
}

impl JoinPath for Path {
    fn join_path(self, path: &str) -> Path {
        path.split('/').filter(|part| !part.is_empty()).fold(self, |whole, part| whole.join(part))
    }
}

/// Of a manifest's canonical content, for records that point at it.
pub fn manifest_digest(manifest: &Manifest) -> Digest {
    Digest::of_bytes(&serde_json::to_vec(manifest).unwrap_or_default())
}

#[cfg(test)]
pub(crate) mod tests;
