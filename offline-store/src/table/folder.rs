//! The folder of a table: numbered manifests, and the one step in which a table changes.
//!
//! `manifest.json` says the format and what the table was before its first numbered manifest; every reader looks there
//! first, so a layout of a later version can announce itself. `manifest/<number>.json` are the states after that. A commit
//! puts the next number with put-if-absent, which every store offers (a put on condition of an etag, not: folders have no
//! such thing). Of two writers one is first; the other reads what is there now and tries again.
//!
//! Old manifests are deleted, oldest first. A writer that slept that long could put a number that was taken and is gone:
//! so after its put it looks whether the manifest it changed is still there, and if not, has lost.

use std::sync::Arc;

use bytes::Bytes;
use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::{FORMAT, Manifest, Retired, TableError};

/// How long a replaced file stays for readers of older manifests.
pub(crate) const RETIRED_FOR: Micros = HOUR;
/// A file that no manifest names was left by a writer that died, or belongs to one at work: writers give up within half
/// of this.
pub(crate) const ORPHAN_AFTER: Micros = DAY;
/// Manifests kept: readers hold only what they have read, so this is for the moment between listing and reading.
const MANIFESTS_KEPT: u64 = 64;
/// A manifest can vanish between listing and reading only when [`MANIFESTS_KEPT`] others came meanwhile.
const LOAD_TRIES: u32 = 4;

#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
}

/// How a commit ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Committed {
    Done,
    /// Another writer was first; nothing of this commit is visible.
    Lost,
}

impl Folder {
    pub fn file(&self, path: &str) -> Path {
        self.path.clone().join(path)
    }

    fn marker(&self) -> Path {
        self.file("manifest.json")
    }

    fn manifests(&self) -> Path {
        self.file("manifest")
    }

    fn manifest(&self, version: u64) -> Path {
        self.manifests().join(format!("{version:012}.json"))
    }

    /// The newest state; that of a table that was never written is empty.
    pub async fn load(&self, source: &str) -> Result<Manifest, TableError> {
        let marker = self.marker();
        let Some(first) = self.get(&marker).await? else { return Ok(Manifest::empty(source)) };
        let first = parse(&marker, &first)?;
        // Format 1 ends with the first numbered manifest.
        if first.format < FORMAT {
            return Ok(first);
        }
        for _ in 0..LOAD_TRIES {
            let Some(newest) = self.versions().await?.into_iter().max() else { return Ok(first) };
            let path = self.manifest(newest);
            if let Some(found) = self.get(&path).await? {
                return parse(&path, &found);
            }
        }
        Err(TableError::Contended { source_name: source.to_owned(), tries: LOAD_TRIES })
    }

    async fn get(&self, path: &Path) -> Result<Option<Bytes>, TableError> {
        let failed = |source| TableError::Store { path: path.to_string(), source };
        match self.store.get(path).await {
            Ok(found) => Ok(Some(found.bytes().await.map_err(failed)?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(failed(source)),
        }
    }

    async fn versions(&self) -> Result<Vec<u64>, TableError> {
        let folder = self.manifests();
        let listed: Vec<_> = self
            .store
            .list(Some(&folder))
            .try_collect()
            .await
            .map_err(|source| TableError::Store { path: folder.to_string(), source })?;
        let number = |name: &str| name.strip_suffix(".json")?.parse::<u64>().ok();
        Ok(listed.iter().filter_map(|object| number(object.location.filename()?)).collect())
    }

    /// Makes `next` the state that follows `base`, unless something else follows it already. When this fails, it may or
    /// may not have happened.
    pub async fn commit(&self, base: &Manifest, next: &mut Manifest) -> Result<Committed, TableError> {
        if base.version == 0 {
            let first = Manifest { format: FORMAT, ..base.clone() };
            self.put(&self.marker(), render(&first)).await?;
        }
        next.format = FORMAT;
        next.version = base.version + 1;
        next.commit = id();
        let path = self.manifest(next.version);
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&path, PutPayload::from(render(next)), options).await {
            Ok(_) => {}
            // A client that tries again by itself may meet its own first try.
            Err(object_store::Error::AlreadyExists { .. }) => match self.get(&path).await? {
                Some(found) if parse(&path, &found)?.commit == next.commit => {}
                _ => return Ok(Committed::Lost),
            },
            Err(source) => return Err(TableError::Store { path: path.to_string(), source }),
        }
        if base.version > 0 {
            let base = self.manifest(base.version);
            match self.store.head(&base).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => return Ok(Committed::Lost),
                Err(source) => return Err(TableError::Store { path: base.to_string(), source }),
            }
        }
        Ok(Committed::Done)
    }

    pub async fn put(&self, path: &Path, bytes: Vec<u8>) -> Result<(), TableError> {
        let put = self.store.put(path, PutPayload::from(bytes)).await;
        put.map(|_| ()).map_err(|source| TableError::Store { path: path.to_string(), source })
    }

    /// Deletes what nobody reads any more. What cannot be deleted now is a stray object, not an error.
    pub async fn delete(&self, paths: Vec<Path>) {
        for path in paths {
            if let Err(error) = self.store.delete(&path).await {
                tracing::debug!(%path, %error, "a file that no table names could not be deleted");
            }
        }
    }

    pub async fn delete_retired(&self, retired: Vec<Retired>) {
        self.delete(retired.iter().map(|retired| self.file(&retired.path)).collect()).await;
    }

    /// Deletes old manifests, and old files that no manifest names.
    pub async fn tidy(&self, manifest: &Manifest, now: Micros) {
        let mut old = match self.versions().await {
            Ok(versions) => versions,
            Err(error) => {
                tracing::debug!(folder = %self.path, %error, "old manifests could not be listed");
                return;
            }
        };
        old.retain(|version| version.saturating_add(MANIFESTS_KEPT) <= manifest.version);
        // In this order, one after the other: whoever finds a number finds every later one.
        old.sort_unstable();
        for version in old {
            if let Err(error) = self.store.delete(&self.manifest(version)).await
                && !matches!(error, object_store::Error::NotFound { .. })
            {
                tracing::debug!(folder = %self.path, version, %error, "an old manifest could not be deleted");
                return;
            }
        }
        let listed: Vec<_> = match self.store.list(Some(&self.path)).try_collect().await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::debug!(folder = %self.path, %error, "files could not be listed");
                return;
            }
        };
        let is_named = |path: &Path| {
            let named = manifest.files.iter().map(|file| &file.path);
            named.chain(manifest.retired.iter().map(|retired| &retired.path)).any(|name| self.file(name) == *path)
        };
        let orphans = listed.into_iter().filter(|object| {
            object.location.extension() == Some("parquet")
                && object.last_modified.timestamp_micros().saturating_add(ORPHAN_AFTER) <= now
                && !is_named(&object.location)
        });
        self.delete(orphans.map(|object| object.location).collect()).await;
    }
}

/// A name that nobody else chooses.
pub(crate) fn id() -> String {
    uuid::Uuid::now_v7().simple().to_string()
}

/// The format is looked at before anything else, so that a manifest of a later version is called that.
fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, TableError> {
    let corrupt = |what: String| TableError::Corrupt { path: path.to_string(), what };
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(found) if found > u64::from(FORMAT) => Err(TableError::Newer { path: path.to_string(), found }),
        Some(_) => serde_json::from_value(value).map_err(|error| corrupt(error.to_string())),
        None => Err(corrupt("it does not say its format".into())),
    }
}

fn render(manifest: &Manifest) -> Vec<u8> {
    serde_json::to_vec_pretty(manifest).expect("a manifest holds only text and numbers")
}
