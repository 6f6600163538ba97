//! Managed tables: rows of one source as Parquet files that Coeval owns, and a manifest that says which files there are.
//!
//! A table is what a stream's history is kept in (`<project>/history/<source>/`), and what the files of a source can be
//! imported into (`<project>/tables/<source>/`). Its files have one of two levels. Files of level 0 are written by an
//! appender: rows of any entity, in order of position. Files of level 1 are *runs*, written by a compaction or an import:
//! rows are dealt to buckets by entity, and within a bucket sorted by entity key, event time, created time (null lowest)
//! and sequence, so that a point-in-time join only merges. One set of key columns can be sorted by; views of other
//! entities read the same files as rows in no useful order.
//!
//! Runs and files of level 0 follow each other in order of position in the manifest: a run holds all events between the
//! one before it and the one after it. So a backfill is one pass over runs and files, which sorts within each run.
//!
//! A table changes by one object: manifests are numbered, and the next number is put only if nobody put it before. Readers
//! open the greatest number and see one moment of the table; files that were replaced stay a while for those who opened
//! an earlier one. See `docs/design/2026-11-22-managed-tables.md`.

pub mod compact;
pub mod import;
pub mod redact;

pub(crate) mod run;

mod folder;
pub(crate) mod read;
mod sort;

use std::sync::Arc;

use feature_defs::digest::Canonical;
use feature_defs::plan::{Plan, RowsError, SourcePlan, ViewKey, ViewPlan};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use object_store::ObjectStore;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::source::SourceError;

pub use sort::Work;

pub(crate) use folder::{Committed, Folder, id};

/// Version of a table's layout. Version 1 had one manifest and files of level 0 only; it is read, and changed into this
/// one by the first write.
pub const FORMAT: u32 = 2;
/// The column that holds the time of each event's position.
pub const POSITION_TIME: &str = "__position_time";
/// The column that holds the sequence of each event's position.
pub const SEQUENCE: &str = "__sequence";

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("the object store failed on {path}; it is tried again")]
    Store { path: String, source: object_store::Error },
    #[error("{path} is damaged ({what}); restore it from a backup of the object store")]
    Corrupt { path: String, what: String },
    #[error("{path} has format {found}, the newest known here is {FORMAT}; upgrade this program")]
    Newer { path: String, found: u64 },
    #[error(
        "rows of {path} do not fit the definitions of source `{source_name}`; a column may not change its type, give it a new name"
    )]
    Rows { path: String, source_name: String, source: RowsError },
    #[error("events of source `{source_name}` could not be written as Parquet: {what}")]
    Write { source_name: String, what: String },
    #[error(
        "events up to {applied:?} are already in the history of source `{source_name}`, {given:?} is not after them"
    )]
    Order { source_name: String, applied: Position, given: Position },
    #[error("the table of source `{source_name}` was changed by others {tries} times in a row; try again")]
    Contended { source_name: String, tries: u32 },
    #[error("rows of source `{source_name}` could not be sorted: {what}")]
    Sort { source_name: String, what: String },
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the files of source `{source_name}` could not be read: {what}")]
    Files { source_name: String, what: String },
    #[error("the files of source `{source_name}` changed while they were imported; import them again")]
    FilesChanged { source_name: String },
}

impl TableError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            TableError::Store { source, .. } => !matches!(
                source,
                object_store::Error::NotFound { .. }
                    | object_store::Error::PermissionDenied { .. }
                    | object_store::Error::Unauthenticated { .. }
                    | object_store::Error::InvalidPath { .. }
            ),
            TableError::Contended { .. } | TableError::FilesChanged { .. } => true,
            _ => false,
        }
    }
}

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Its number: each change of the table is the next one. 0 before the first.
    #[serde(default)]
    pub version: u64,
    /// Names the write that made it, so that a writer recognises its own.
    #[serde(default)]
    pub commit: String,
    pub source: String,
    /// The source's columns when the newest file was written; files may lack later ones.
    pub schema: Vec<(String, Type)>,
    /// How files of level 1 lie; None while there are none.
    #[serde(default)]
    pub clustering: Option<Clustering>,
    /// In order of position: runs and files of level 0.
    pub files: Vec<TableFile>,
    /// Streams: every event up to here is in `files`, and none after it.
    pub applied: Position,
    /// The largest sequence among them: positions are ordered by time first.
    #[serde(default)]
    pub sequence_max: u64,
    /// The number of the last run that was written.
    #[serde(default)]
    pub last_run: u64,
    /// Streams: what was imported before the stream began, if that was done.
    pub imported: Option<Imported>,
    /// Tables of files: what they were imported from.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// Files that were replaced and are kept a while for readers.
    #[serde(default)]
    pub retired: Vec<Retired>,
    /// How often entities were forgotten in it.
    #[serde(default)]
    pub redactions: u64,
}

/// How rows of level 1 are dealt to buckets and sorted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clustering {
    /// The columns of the entity key, in the entity's order. None of them: everything is one bucket, in order of time.
    pub keys: Vec<KeyColumn>,
    pub event_time: Option<String>,
    pub created_time: Option<String>,
    /// A power of two.
    pub buckets: u32,
}

/// A column of the source, and the type of the key it is: the canonical encoding is that of the key's type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyColumn {
    pub column: String,
    #[serde(rename = "type")]
    pub key_type: Type,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableFile {
    /// Relative to the table's folder.
    pub path: String,
    /// 0: as an appender wrote it, in order of position. 1: a piece of a sorted run.
    #[serde(default)]
    pub level: u8,
    /// The run it is a piece of; 0 for files of level 0.
    #[serde(default)]
    pub run: u64,
    /// The bucket its rows are of; None for files of level 0, which have rows of all.
    #[serde(default)]
    pub bucket: Option<u32>,
    pub rows: u64,
    pub bytes: u64,
    /// The least and the greatest position; of no meaning in tables of files.
    pub first: Position,
    pub last: Position,
    pub event_time_min: Option<Micros>,
    pub event_time_max: Option<Micros>,
}

impl TableFile {
    /// Whether its rows are of one bucket, in the order of the table's clustering.
    pub fn is_sorted(&self) -> bool {
        self.level > 0
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Names this import, so that what else it wrote can be told from the leavings of one that did not finish.
    pub id: String,
    pub pattern: String,
    /// Rows taken in, those not yet visible included.
    pub rows: u64,
    /// Rows without an event time, and rows whose event id had been seen before.
    pub skipped: u64,
    pub at: Micros,
}

/// The files that a table is a copy of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub pattern: String,
    /// `Sources::fingerprint` of the files before they were read and after.
    pub fingerprint: String,
    pub rows: u64,
    pub at: Micros,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    pub path: String,
    pub at: Micros,
}

impl Manifest {
    pub(crate) fn empty(source: &str) -> Manifest {
        Manifest {
            format: FORMAT,
            version: 0,
            commit: String::new(),
            source: source.to_owned(),
            schema: Vec::new(),
            clustering: None,
            files: Vec::new(),
            applied: Position::START,
            sequence_max: 0,
            last_run: 0,
            imported: None,
            origin: None,
            retired: Vec::new(),
            redactions: 0,
        }
    }

    /// Takes out what was replaced long enough ago.
    pub(crate) fn expire(&mut self, now: Micros) -> Vec<Retired> {
        let is_old = |retired: &mut Retired| retired.at.saturating_add(folder::RETIRED_FOR) <= now;
        self.retired.extract_if(.., is_old).collect()
    }

    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// Of what is in the table, however its files lie: the same before and after a compaction.
    pub fn fingerprint(&self) -> String {
        let mut text = Canonical::new("table").with("source", &self.source);
        match &self.origin {
            Some(origin) => text.add("files", &origin.fingerprint),
            None => {
                text.add("applied_time", self.applied.time);
                text.add("applied_sequence", self.applied.sequence);
                text.add("rows", self.rows());
                text.add("imported", self.imported.as_ref().map_or("", |imported| &imported.id));
            }
        }
        if self.redactions > 0 {
            text.add("redactions", self.redactions);
        }
        text.digest().to_string()
    }
}

impl Clustering {
    /// The columns by which a table of this source is best sorted: those of the first view that reads it. What is there
    /// stays as long as any view wants it, for changing it means writing the table anew.
    pub fn choose(plan: &Plan, source: &SourcePlan, present: Option<&Clustering>) -> Clustering {
        let reads = |view: &&Arc<ViewPlan>| view.source.name == source.name;
        let keys = |view: &Arc<ViewPlan>| view.keys.iter().map(KeyColumn::of).collect::<Vec<_>>();
        let views = || plan.views.iter().filter(reads);
        let kept = present.map(|present| present.keys.clone()).filter(|kept| views().any(|view| keys(view) == *kept));
        Clustering {
            keys: kept.or_else(|| views().next().map(keys)).unwrap_or_default(),
            event_time: source.event_time.clone(),
            created_time: source.created_time.clone(),
            buckets: present.map_or(1, |present| present.buckets),
        }
    }

    /// The bucket that rows of an entity are in.
    pub fn bucket_of(&self, key: &[u8]) -> u32 {
        (hash(key) & u64::from(self.buckets.saturating_sub(1))) as u32
    }

    /// Whether rows sorted like this are sorted for a view with these keys.
    pub fn serves(&self, source: &SourcePlan, keys: &[ViewKey]) -> bool {
        self.keys.len() == keys.len()
            && self.keys.iter().zip(keys).all(|(known, key)| *known == KeyColumn::of(key))
            && self.event_time == source.event_time
            && self.created_time == source.created_time
    }
}

impl KeyColumn {
    fn of(key: &ViewKey) -> KeyColumn {
        KeyColumn { column: key.column.clone(), key_type: key.key_type.clone() }
    }
}

/// Decides where rows lie on disk, so it never changes: FNV-1a over the canonical key, finished as MurmurHash3 does.
fn hash(bytes: &[u8]) -> u64 {
    let mut hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// A managed table at the moment of its manifest.
#[derive(Debug, Clone)]
pub struct Table {
    folder: Folder,
    manifest: Manifest,
}

impl Table {
    /// The table that holds a source's rows, below the project's folder: a stream's history (empty before the first
    /// event), or what the files of the source were imported into, if they were.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        project: &Path,
        source: &SourcePlan,
    ) -> Result<Option<Table>, TableError> {
        let table = if source.is_stream() {
            Table::of_stream(store, project, &source.name).await?
        } else {
            Table::of_files(store, project, &source.name).await?
        };
        Ok((source.is_stream() || table.manifest.origin.is_some()).then_some(table))
    }

    /// The history of a stream; one that was never written is empty.
    pub async fn of_stream(store: Arc<dyn ObjectStore>, project: &Path, source: &str) -> Result<Table, TableError> {
        Table::at(store, project.clone().join("history").join(source), source).await
    }

    /// What the files of a source were imported into; empty, and without an origin, before they were.
    pub async fn of_files(store: Arc<dyn ObjectStore>, project: &Path, source: &str) -> Result<Table, TableError> {
        Table::at(store, project.clone().join("tables").join(source), source).await
    }

    async fn at(store: Arc<dyn ObjectStore>, path: Path, source: &str) -> Result<Table, TableError> {
        let folder = Folder { store, path };
        let manifest = folder.load(source).await?;
        Ok(Table { folder, manifest })
    }

    /// Reads the newest manifest.
    pub async fn reload(&mut self) -> Result<(), TableError> {
        self.manifest = self.folder.load(&self.manifest.source).await?;
        Ok(())
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Deletes files that were written and never committed.
    pub(crate) async fn discard(&self, files: &[TableFile]) {
        self.folder.delete(files.iter().map(|file| self.object_path(file)).collect()).await;
    }

    pub(crate) fn set_manifest(&mut self, manifest: Manifest) {
        self.manifest = manifest;
    }

    /// Where a file lies in the object store.
    pub fn object_path(&self, file: &TableFile) -> Path {
        self.folder.file(&file.path)
    }

    /// How sorted files lie; None while there are none.
    pub fn clustering(&self) -> Option<&Clustering> {
        self.manifest.clustering.as_ref()
    }

    /// Number of buckets; 1 while nothing is sorted.
    pub fn buckets(&self) -> u32 {
        self.clustering().map_or(1, |clustering| clustering.buckets)
    }

    /// The bucket that sorted rows of an entity are in, by its canonical key. (Rows of level 0 are in none.)
    pub fn bucket_of(&self, key: &[u8]) -> u32 {
        self.clustering().map_or(0, |clustering| clustering.bucket_of(key))
    }

    /// The sorted rows of a bucket: each element is one run, sorted from the first row of its first file to the last row
    /// of its last. Runs are in order of position: events of a later run were applied after those of an earlier one.
    pub fn runs(&self, bucket: u32) -> Vec<Vec<&TableFile>> {
        let mut runs: Vec<Vec<&TableFile>> = Vec::new();
        for file in self.manifest.files.iter().filter(|file| file.is_sorted() && file.bucket == Some(bucket)) {
            match runs.last_mut().filter(|run| run.last().is_some_and(|last| last.run == file.run)) {
                Some(run) => run.push(file),
                None => runs.push(vec![file]),
            }
        }
        runs
    }

    /// Every file with rows of a bucket: its sorted ones, and those of level 0.
    pub fn files(&self, bucket: u32) -> Vec<&TableFile> {
        let has = |file: &&TableFile| file.bucket.is_none_or(|other| other == bucket);
        self.manifest.files.iter().filter(has).collect()
    }

    /// Files of level 0, in order of position; a reader that wants only a bucket's rows has to look at each.
    pub fn unsorted(&self) -> impl Iterator<Item = &TableFile> {
        self.manifest.files.iter().filter(|file| !file.is_sorted())
    }

    /// Whether a table of files may be read in place of files with this fingerprint.
    pub fn is_copy_of(&self, fingerprint: &str) -> bool {
        self.manifest.origin.as_ref().is_some_and(|origin| origin.fingerprint == fingerprint)
    }
}

#[cfg(test)]
mod tests;
