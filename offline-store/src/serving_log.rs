//! The serving log: what was served, row by row, as Parquet on the object store.
//!
//! This is the format, its writer and its reader; what is logged, and when, is the gateway's business. A file holds rows of
//! one service by one plan and for one model, with the bits that were served, how they came about, and the positions that the
//! views were read at, so that an audit can ask the offline engine for the same rows ([`LogSchema`] names the columns).
//!
//! Objects lie below `<project>/serving-log/<service>/<day>/`: files whose names say which times they hold, and beside them,
//! from every gateway that served on that day, how many rows it was offered, took and lost in each minute ([`Losses`]). So a
//! reader knows what it does not see.

use std::fmt::{self, Display};
use std::io::Write;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use chrono::{DateTime, NaiveDate};
use feature_defs::time::Micros;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::{Deserialize, Serialize};

mod hash;
mod losses;
pub mod redact;
mod schema;

pub use hash::{Sampler, TENSOR_DIGEST_BYTES, hashed, tensor_digest};
pub use losses::{Losses, Minute};
pub use schema::{LogSchema, Origin, Outputs, columns};

/// Version of files and of losses.
pub const FORMAT: u32 = 1;
const FOLDER: &str = "serving-log";
const METADATA: &str = "coeval.serving_log";
const EXTENSION: &str = ".parquet";
/// A writer cuts its files long before; one that is larger is none of ours, and is not taken into memory.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Days whose files are listed at once.
const LISTS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum ServingLogError {
    #[error("{path} of the serving log could not be {verb}")]
    Store { path: String, verb: &'static str, source: object_store::Error },
    #[error("{path} is no file of a serving log ({what}); remove it if nothing else is meant to read it")]
    Damaged { path: String, what: String },
    #[error("{path} has format {found}, newer than this version knows ({FORMAT}); upgrade coeval")]
    Newer { path: String, found: u32 },
    #[error("rows of the serving log could not be encoded: {0}")]
    Encode(#[from] ParquetError),
    #[error("rows of the serving log do not fit together: {0}")]
    Rows(#[from] arrow::error::ArrowError),
}

/// What all rows of a file share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub project: String,
    /// Where the gateway listens: for people.
    pub gateway: String,
    /// One life of one gateway.
    pub incarnation: String,
    pub service: String,
    pub semantic_digest: String,
    /// None: features were asked for.
    pub model: Option<String>,
    /// Columns that hold a keyed hash as text in place of their values, because they are declared sensitive.
    pub hashed: Vec<String>,
    /// Smallest and largest `at`.
    pub first_at: Micros,
    pub last_at: Micros,
    /// Smallest and largest `time`.
    pub first_time: Micros,
    pub last_time: Micros,
    pub rows: u64,
}

/// The service and day that something is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub service: String,
    /// Of the server's clock, in UTC.
    pub day: NaiveDate,
}

impl Place {
    pub fn of(service: &str, time: Micros) -> Place {
        Place { service: service.to_owned(), day: day(time) }
    }

    pub fn folder(&self, project: &Path) -> Path {
        service_folder(project, &self.service).join(self.day.to_string())
    }
}

/// What a file's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName {
    pub first_at: Micros,
    pub last_at: Micros,
    pub incarnation: String,
    pub number: u64,
}

/// Times in names sort as they follow each other, from before 1970 on too.
fn sortable(time: Micros) -> u64 {
    time as u64 ^ (1 << 63)
}

impl Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FileName { first_at, last_at, incarnation, number } = self;
        let (first, last) = (sortable(*first_at), sortable(*last_at));
        write!(f, "{first:016x}-{last:016x}-{incarnation}-{number:06}{EXTENSION}")
    }
}

impl FileName {
    pub fn parse(name: &str) -> Option<FileName> {
        let mut parts = name.strip_suffix(EXTENSION)?.split('-');
        let mut time = || u64::from_str_radix(parts.next()?, 16).ok().map(|time| (time ^ (1 << 63)) as Micros);
        let (first_at, last_at) = (time()?, time()?);
        let (incarnation, number) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?);
        parts.next().is_none().then_some(FileName { first_at, last_at, incarnation, number })
    }
}

/// A file of the log, not read yet.
#[derive(Debug, Clone)]
pub struct LogFile {
    pub path: Path,
    pub name: FileName,
    pub bytes: u64,
}

/// A file's rows.
#[derive(Debug, Clone)]
pub struct LogRows {
    pub header: Header,
    pub batch: RecordBatch,
}

pub fn day(time: Micros) -> NaiveDate {
    DateTime::from_timestamp_micros(time).unwrap_or_default().date_naive()
}

pub fn folder(project: &Path) -> Path {
    project.clone().join(FOLDER)
}

pub fn service_folder(project: &Path, service: &str) -> Path {
    folder(project).join(service)
}

/// Encodes rows, one after the other, as one file. They must have the header's schema.
pub fn encode(
    header: &Header,
    schema: &SchemaRef,
    batches: &[RecordBatch],
    out: impl Write + Send,
) -> Result<(), ServingLogError> {
    let text = serde_json::to_string(header).map_err(|error| ParquetError::External(Box::new(error)))?;
    let properties = WriterProperties::builder()
        // Read seldom and kept for weeks: size counts.
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_key_value_metadata(Some(vec![KeyValue::new(METADATA.to_owned(), text)]))
        .build();
    // Requests are small; the writer would work through hundreds of columns for each.
    let rows = concat_batches(schema, batches)?;
    let mut writer = ArrowWriter::try_new(out, schema.clone(), Some(properties))?;
    writer.write(&rows)?;
    writer.close()?;
    Ok(())
}

/// Decodes a file; `path` is for messages.
pub fn decode(path: &str, bytes: Bytes) -> Result<LogRows, ServingLogError> {
    let damaged = |what: String| ServingLogError::Damaged { path: path.to_owned(), what };
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|error| damaged(error.to_string()))?;
    let metadata = builder.metadata().file_metadata().key_value_metadata();
    let text = metadata.into_iter().flatten().find(|entry| entry.key == METADATA).and_then(|entry| entry.value.clone());
    let text = text.ok_or_else(|| damaged("it does not say what it is".to_owned()))?;
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let unread = |error: serde_json::Error| damaged(error.to_string());
    let Versioned { format } = serde_json::from_str(&text).map_err(unread)?;
    if format > FORMAT {
        return Err(ServingLogError::Newer { path: path.to_owned(), found: format });
    }
    let header: Header = serde_json::from_str(&text).map_err(unread)?;
    let schema = builder.schema().clone();
    let reader = builder.build().map_err(|error| damaged(error.to_string()))?;
    let batches: Result<Vec<RecordBatch>, _> = reader.collect();
    let batch = concat_batches(&schema, &batches.map_err(|error| damaged(error.to_string()))?)?;
    Ok(LogRows { header, batch })
}

/// The services that something was logged of.
pub async fn services(store: &Arc<dyn ObjectStore>, project: &Path) -> Result<Vec<String>, ServingLogError> {
    Ok(folders(store, &folder(project)).await?.into_iter().map(|(name, _)| name).collect())
}

/// The folders right below one, by name.
async fn folders(store: &Arc<dyn ObjectStore>, below: &Path) -> Result<Vec<(String, Path)>, ServingLogError> {
    let listed = store.list_with_delimiter(Some(below)).await;
    let listed = listed.map_err(|source| failed(below, "listed", source))?;
    let mut named: Vec<(String, Path)> =
        listed.common_prefixes.into_iter().filter_map(|path| Some((path.filename()?.to_owned(), path))).collect();
    named.sort();
    Ok(named)
}

/// Days of a service that are kept, ascending.
pub async fn days(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service: &str,
) -> Result<Vec<NaiveDate>, ServingLogError> {
    let folders = folders(store, &service_folder(project, service)).await?;
    Ok(folders.iter().filter_map(|(name, _)| name.parse().ok()).collect())
}

/// The files of a service that have rows answered for times in `from..to`, in order of these.
///
/// Which days are looked at does not depend on them: replays log rows of long ago.
pub async fn files(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service: &str,
    from: Micros,
    to: Micros,
) -> Result<Vec<LogFile>, ServingLogError> {
    let days = days(store, project, service).await?;
    let list = |day: NaiveDate| {
        let folder = Place { service: service.to_owned(), day }.folder(project);
        let store = store.clone();
        async move {
            let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
            listed.map_err(|source| failed(&folder, "listed", source))
        }
    };
    let mut listed = futures::stream::iter(days.into_iter().map(list)).buffered(LISTS_MAX);
    let mut found = Vec::new();
    while let Some(objects) = listed.next().await {
        for object in objects? {
            let Some(name) = object.location.filename().and_then(FileName::parse) else { continue };
            if name.last_at >= from && name.first_at < to {
                found.push(LogFile { path: object.location, name, bytes: object.size });
            }
        }
    }
    found.sort_by(|a, b| (a.name.first_at, &a.path).cmp(&(b.name.first_at, &b.path)));
    Ok(found)
}

/// Reads a file; None where retention removed it since it was listed.
pub async fn read(store: &Arc<dyn ObjectStore>, file: &LogFile) -> Result<Option<LogRows>, ServingLogError> {
    let path = file.path.to_string();
    if file.bytes > FILE_BYTES_MAX {
        let what = format!("it has {} bytes, more than any file of a serving log", file.bytes);
        return Err(ServingLogError::Damaged { path, what });
    }
    let bytes = match store.get(&file.path).await {
        Ok(found) => found.bytes().await,
        Err(error) => Err(error),
    };
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(failed(&file.path, "read", source)),
    };
    let named = path.clone();
    let decoded = tokio::task::spawn_blocking(move || decode(&path, bytes)).await;
    let lost = |error: tokio::task::JoinError| ServingLogError::Damaged { path: named, what: error.to_string() };
    Ok(Some(decoded.map_err(lost)??))
}

/// What gateways said of a service on the days from `from` to `to`, both included.
pub async fn losses(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service: &str,
    from: NaiveDate,
    to: NaiveDate,
) -> Result<Vec<Losses>, ServingLogError> {
    let mut found = Vec::new();
    for day in days(store, project, service).await?.into_iter().filter(|day| (from..=to).contains(day)) {
        let folder = Place { service: service.to_owned(), day }.folder(project);
        let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
        for object in listed.map_err(|source| failed(&folder, "listed", source))? {
            if !object.location.filename().is_some_and(losses::is_name) {
                continue;
            }
            let read = async { store.get(&object.location).await?.bytes().await };
            match read.await {
                Ok(bytes) => found.push(losses::decode(object.location.as_ref(), &bytes)?),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(failed(&object.location, "read", source)),
            }
        }
    }
    Ok(found)
}

/// Removes what was logged on days before `first`; returns how many objects went.
pub async fn remove_before(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    first: NaiveDate,
) -> Result<u64, ServingLogError> {
    let mut removed = 0;
    for service in services(store, project).await? {
        for day in days(store, project, &service).await?.into_iter().filter(|day| *day < first) {
            let folder = Place { service: service.clone(), day }.folder(project);
            let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
            for object in listed.map_err(|source| failed(&folder, "listed", source))? {
                match store.delete(&object.location).await {
                    Ok(()) => removed += 1,
                    // Another gateway does the same.
                    Err(object_store::Error::NotFound { .. }) => {}
                    Err(source) => return Err(failed(&object.location, "removed", source)),
                }
            }
        }
    }
    Ok(removed)
}

fn failed(path: &Path, verb: &'static str, source: object_store::Error) -> ServingLogError {
    ServingLogError::Store { path: path.to_string(), verb, source }
}

#[cfg(test)]
mod tests;
