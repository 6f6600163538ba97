//! The history of one stream source: every event ever applied, in order of position, as Parquet on the object store.
//!
//! A stream has no files of its own, so training sets and backfills read what the applier wrote here. A folder
//! `<project>/history/<source>/` holds part files and `manifest.json`; putting the manifest is the commit, and a part file
//! that no manifest names does not exist. Parts are in order of position, within and between them, so a backfill is one
//! pass from front to back. There is one writer per project (the ingest role); readers open the manifest and see one
//! moment of the history.
//!
//! Small flushes would leave thousands of small files: an append rewrites the last part together with the new rows until
//! that part is full. A part that was replaced stays for an hour for readers that hold an older manifest.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, UInt64Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimestampMicrosecondType, UInt64Type};
use bytes::Bytes;
use feature_defs::plan::{RowsError, SourcePlan};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use feature_defs::window::HOUR;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};

/// Version of the folder's layout.
pub const FORMAT: u32 = 1;
/// The column that holds the time of each event's position.
pub const POSITION_TIME: &str = "__position_time";
/// The column that holds the sequence of each event's position.
pub const SEQUENCE: &str = "__sequence";
/// The sequence of the first pushed event. What was imported before the stream began is numbered from 1.
pub const FIRST_PUSHED: u64 = 1 << 40;

/// A part with this many rows is full; the next append begins another. Parts are read whole, so this also bounds what a
/// reader holds: about 100 MB of rows of 200 bytes.
pub const PART_ROWS_MAX: usize = 500_000;
/// The last part is rewritten with new rows only while it is smaller than this, so that an append writes at most this
/// many old rows again.
const PART_ROWS_SMALL: u64 = 50_000;
/// How long a replaced part stays.
const RETIRED_FOR: Micros = HOUR;
/// Rows per batch of a scan.
const SCAN_ROWS: usize = 8_192;

#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
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
}

impl HistoryError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            HistoryError::Store { source, .. } => !matches!(
                source,
                object_store::Error::NotFound { .. }
                    | object_store::Error::PermissionDenied { .. }
                    | object_store::Error::Unauthenticated { .. }
                    | object_store::Error::InvalidPath { .. }
            ),
            _ => false,
        }
    }
}

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub source: String,
    /// The source's columns when the newest part was written; parts may lack later ones.
    pub schema: Vec<(String, Type)>,
    /// In order of position.
    pub files: Vec<HistoryFile>,
    /// Every event up to here is in `files`, and none after it.
    pub applied: Position,
    /// The largest sequence among them: positions are ordered by time first.
    #[serde(default)]
    pub sequence_max: u64,
    /// What was imported before the stream began, if that was done.
    pub imported: Option<Imported>,
    /// Parts that were replaced and are kept a while for readers.
    #[serde(default)]
    pub retired: Vec<Retired>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryFile {
    /// Relative to the history's folder.
    pub path: String,
    pub rows: u64,
    pub bytes: u64,
    pub first: Position,
    pub last: Position,
    pub event_time_min: Option<Micros>,
    pub event_time_max: Option<Micros>,
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    pub path: String,
    pub at: Micros,
}

/// Rows of a history with their positions.
#[derive(Debug, Clone)]
pub struct Positioned {
    pub batch: RecordBatch,
    pub positions: Vec<Position>,
}

/// The history of one stream source, at the moment of its manifest.
#[derive(Debug)]
pub struct History {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    source: Arc<str>,
    manifest: Manifest,
}

impl History {
    /// Opens the history of a source below the project's folder; one that was never written is empty.
    pub async fn open(store: Arc<dyn ObjectStore>, project: Path, source: &str) -> Result<History, HistoryError> {
        let folder = project.join("history").join(source);
        let mut history = History { store, folder, source: source.into(), manifest: Manifest::empty(source) };
        history.reload().await?;
        Ok(history)
    }

    /// Reads the manifest again.
    pub async fn reload(&mut self) -> Result<(), HistoryError> {
        let path = self.manifest_path();
        let failed = |source| HistoryError::Store { path: path.to_string(), source };
        self.manifest = match self.store.get(&path).await {
            Ok(found) => Manifest::parse(&path, &found.bytes().await.map_err(failed)?)?,
            Err(object_store::Error::NotFound { .. }) => Manifest::empty(&self.source),
            Err(source) => return Err(failed(source)),
        };
        Ok(())
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where a part lies in the object store.
    pub fn object_path(&self, file: &HistoryFile) -> Path {
        self.folder.clone().join(file.path.as_str())
    }

    fn manifest_path(&self) -> Path {
        self.folder.clone().join("manifest.json")
    }

    /// Appends events in order of position, all after what is applied, and moves `applied` to the last of them. Rows are
    /// those of `source`, aligned. When this fails nothing was appended, and the same call may be made again.
    pub async fn append(
        &mut self,
        source: &SourcePlan,
        events: &[Positioned],
        now: Micros,
    ) -> Result<u64, HistoryError> {
        self.extend(source, events, None, now).await
    }

    /// Writes the events before the stream began, in order of position; done once, before any append.
    pub async fn import(
        &mut self,
        source: &SourcePlan,
        events: &[Positioned],
        imported: Imported,
    ) -> Result<u64, HistoryError> {
        let now = imported.at;
        self.extend(source, events, Some(imported), now).await
    }

    async fn extend(
        &mut self,
        source: &SourcePlan,
        events: &[Positioned],
        imported: Option<Imported>,
        now: Micros,
    ) -> Result<u64, HistoryError> {
        let mut manifest = self.manifest.clone();
        manifest.schema = source.schema.clone();
        let mut parts: Vec<Positioned> = Vec::new();
        let mut appended = 0;
        for event in events {
            let mut before = manifest.applied;
            for position in &event.positions {
                if *position <= before {
                    let source_name = source.name.to_string();
                    return Err(HistoryError::Order { source_name, applied: before, given: *position });
                }
                before = *position;
                manifest.sequence_max = manifest.sequence_max.max(position.sequence);
            }
            manifest.applied = before;
            appended += event.positions.len() as u64;
            parts.push(event.clone());
        }
        if appended == 0 && imported.is_none() {
            return Ok(0);
        }
        if appended > 0
            && let Some(last) = manifest.files.last()
            && last.rows < PART_ROWS_SMALL
        {
            let last = last.clone();
            let mut old = self.read_part(source, &last, None, Position::START).await?;
            old.append(&mut parts);
            parts = old;
            manifest.files.pop();
            manifest.retired.push(Retired { path: last.path, at: now });
        }
        let whole = self.concat(source, &parts)?;
        let mut from = 0;
        while from < whole.positions.len() {
            let rows = (whole.positions.len() - from).min(PART_ROWS_MAX);
            let part = whole.batch.slice(from, rows);
            manifest.files.push(self.write_part(source, &part, &whole.positions[from..from + rows]).await?);
            from += rows;
        }
        if imported.is_some() {
            manifest.imported = imported;
        }
        let expired: Vec<Retired> =
            manifest.retired.extract_if(.., |retired| retired.at.saturating_add(RETIRED_FOR) <= now).collect();
        self.put(&self.manifest_path(), manifest.render()).await?;
        self.manifest = manifest;
        for retired in expired {
            // Nobody reads it any more; one that cannot be deleted now is a stray object, not an error.
            if let Err(error) = self.store.delete(&self.folder.clone().join(retired.path.as_str())).await {
                tracing::debug!(path = retired.path, %error, "a replaced part of a history could not be deleted");
            }
        }
        Ok(appended)
    }

    /// One batch of all of them, with the position columns.
    fn concat(&self, source: &SourcePlan, events: &[Positioned]) -> Result<Positioned, HistoryError> {
        let failed = |error: arrow::error::ArrowError| HistoryError::Write {
            source_name: source.name.to_string(),
            what: error.to_string(),
        };
        let mut fields: Vec<Field> =
            source.schema.iter().map(|(name, column_type)| Field::new(name, column_type.arrow(), true)).collect();
        let plain = Arc::new(Schema::new(fields.clone()));
        fields.push(Field::new(POSITION_TIME, DataType::Int64, false));
        fields.push(Field::new(SEQUENCE, DataType::UInt64, false));
        let batch = concat_batches(&plain, events.iter().map(|event| &event.batch)).map_err(failed)?;
        let positions: Vec<Position> = events.iter().flat_map(|event| &event.positions).copied().collect();
        let mut columns = batch.columns().to_vec();
        columns.push(Arc::new(positions.iter().map(|position| position.time).collect::<Int64Array>()) as ArrayRef);
        columns.push(Arc::new(positions.iter().map(|position| position.sequence).collect::<UInt64Array>()));
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(failed)?;
        Ok(Positioned { batch, positions })
    }

    async fn write_part(
        &self,
        source: &SourcePlan,
        batch: &RecordBatch,
        positions: &[Position],
    ) -> Result<HistoryFile, HistoryError> {
        let failed = |error: parquet::errors::ParquetError| HistoryError::Write {
            source_name: source.name.to_string(),
            what: error.to_string(),
        };
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).map_err(failed)?))
            .set_max_row_group_row_count(Some(128 << 10))
            .build();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).map_err(failed)?;
        writer.write(batch).map_err(failed)?;
        let bytes = writer.into_inner().map_err(failed)?;
        let event_times = source.event_time.as_ref().and_then(|name| batch.column_by_name(name)).cloned();
        let event_times = event_times.as_ref().and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>());
        let (first, last) = (positions[0], positions[positions.len() - 1]);
        let file = HistoryFile {
            // The name says what is inside, and how much: a longer part with the same first event is another file.
            path: format!("part-{:013}-{:013}-{}.parquet", first.sequence, last.sequence, positions.len()),
            rows: positions.len() as u64,
            bytes: bytes.len() as u64,
            first,
            last,
            event_time_min: event_times.and_then(arrow::compute::min),
            event_time_max: event_times.and_then(arrow::compute::max),
        };
        self.put(&self.object_path(&file), bytes).await?;
        Ok(file)
    }

    async fn put(&self, path: &Path, bytes: Vec<u8>) -> Result<(), HistoryError> {
        let put = self.store.put(path, PutPayload::from(bytes)).await;
        put.map(|_| ()).map_err(|source| HistoryError::Store { path: path.to_string(), source })
    }

    /// Events after a position, in order of position, aligned to the source's declared columns (or those named).
    pub fn scan(
        &self,
        source: &Arc<SourcePlan>,
        columns: Option<Vec<String>>,
        after: Position,
    ) -> BoxStream<'static, Result<Positioned, HistoryError>> {
        let files: Vec<HistoryFile> = self.manifest.files.iter().filter(|file| file.last > after).cloned().collect();
        let reader = History {
            store: self.store.clone(),
            folder: self.folder.clone(),
            source: self.source.clone(),
            manifest: Manifest::empty(&self.source),
        };
        let reader = Arc::new(reader);
        let source = source.clone();
        let columns = Arc::new(columns);
        stream::iter(files)
            .then(move |file| {
                let (reader, source, columns) = (reader.clone(), source.clone(), columns.clone());
                async move {
                    match reader.read_part(&source, &file, columns.as_deref(), after).await {
                        Ok(batches) => batches.into_iter().map(Ok).collect(),
                        Err(error) => vec![Err(error)],
                    }
                }
            })
            .flat_map(stream::iter)
            .boxed()
    }

    async fn read_part(
        &self,
        source: &SourcePlan,
        file: &HistoryFile,
        columns: Option<&[String]>,
        after: Position,
    ) -> Result<Vec<Positioned>, HistoryError> {
        let path = self.object_path(file);
        let failed = |source| HistoryError::Store { path: path.to_string(), source };
        let bytes = self.store.get(&path).await.map_err(failed)?.bytes().await.map_err(failed)?;
        decode_part(&path, bytes, source, columns, after)
    }
}

fn decode_part(
    path: &Path,
    bytes: Bytes,
    source: &SourcePlan,
    columns: Option<&[String]>,
    after: Position,
) -> Result<Vec<Positioned>, HistoryError> {
    let corrupt = |what: String| HistoryError::Corrupt { path: path.to_string(), what };
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|error| corrupt(error.to_string()))?;
    let wanted = builder.schema().fields().iter().enumerate().filter(|(_, field)| {
        let name = field.name();
        name == POSITION_TIME || name == SEQUENCE || columns.is_none_or(|columns| columns.contains(name))
    });
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.map(|(index, _)| index).collect::<Vec<_>>());
    let reader = builder.with_projection(mask).with_batch_size(SCAN_ROWS).build();
    let mut batches = Vec::new();
    for batch in reader.map_err(|error| corrupt(error.to_string()))? {
        let batch = batch.map_err(|error| corrupt(error.to_string()))?;
        let times = batch.column_by_name(POSITION_TIME).and_then(|column| column.as_primitive_opt::<Int64Type>());
        let sequences = batch.column_by_name(SEQUENCE).and_then(|column| column.as_primitive_opt::<UInt64Type>());
        let (Some(times), Some(sequences)) = (times, sequences) else {
            return Err(corrupt(format!("it has no columns `{POSITION_TIME}` and `{SEQUENCE}`")));
        };
        let positions: Vec<Position> = (0..batch.num_rows())
            .map(|row| Position { time: times.value(row), sequence: sequences.value(row) })
            .collect();
        // Rows are in order of position, so those wanted are the last ones.
        let skipped = positions.partition_point(|position| *position <= after);
        if skipped == positions.len() {
            continue;
        }
        let batch = batch.slice(skipped, batch.num_rows() - skipped);
        let batch = source.align(&batch, columns).map_err(|error| HistoryError::Rows {
            path: path.to_string(),
            source_name: source.name.to_string(),
            source: error,
        })?;
        batches.push(Positioned { batch, positions: positions[skipped..].to_vec() });
    }
    Ok(batches)
}

impl Manifest {
    fn empty(source: &str) -> Manifest {
        Manifest {
            format: FORMAT,
            source: source.to_owned(),
            schema: Vec::new(),
            files: Vec::new(),
            applied: Position::START,
            sequence_max: 0,
            imported: None,
            retired: Vec::new(),
        }
    }

    /// The format is looked at before anything else, so that a manifest of a later version is called that.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, HistoryError> {
        let corrupt = |what: String| HistoryError::Corrupt { path: path.to_string(), what };
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found > u64::from(FORMAT) => Err(HistoryError::Newer { path: path.to_string(), found }),
            Some(_) => serde_json::from_value(value).map_err(|error| corrupt(error.to_string())),
            None => Err(corrupt("it does not say its format".into())),
        }
    }

    fn render(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a manifest holds only text and numbers")
    }
}

#[cfg(test)]
mod tests;
