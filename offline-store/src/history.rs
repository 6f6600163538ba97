//! The history of one stream source: every event ever applied, in order of position, as a managed table.
//!
//! A stream has no files of its own, so training sets and backfills read what the applier wrote here. An append writes one
//! small file of level 0 and commits; a compaction makes sorted runs of them (`table::compact`). There is one appender per
//! project (the ingest role), beside which a compaction of any process may commit at any time: whoever loses reads the
//! manifest again and goes on.
//!
//! A scan is in order of position whatever was compacted: runs follow each other in that order, and each is sorted by it
//! while it is read, on disk where it does not fit.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, UInt64Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, UInt64Type};
use bytes::Bytes;
use feature_defs::plan::SourcePlan;
use feature_defs::time::{Micros, Position};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::table::{Committed, Table, Work, compact, id, run};

pub use crate::table::{
    FORMAT, Imported, Manifest, POSITION_TIME, Retired, SEQUENCE, TableError as HistoryError, TableFile as HistoryFile,
};

/// The sequence of the first pushed event. What was imported before the stream began is numbered from 1.
pub const FIRST_PUSHED: u64 = 1 << 40;

/// Rows of a file of level 0. They are read whole, so this also bounds what a reader holds: about 100 MB of rows of 200
/// bytes.
pub const PART_ROWS_MAX: usize = 500_000;
/// Rows per batch of a scan.
const SCAN_ROWS: usize = 8_192;
/// A commit that lost is tried again on what is there now. Compactions are rare, and there is one appender.
const COMMIT_TRIES: u32 = 16;

/// Rows of a history with their positions.
#[derive(Debug, Clone)]
pub struct Positioned {
    pub batch: RecordBatch,
    pub positions: Vec<Position>,
}

/// The history of one stream source, at the moment of its manifest.
#[derive(Debug)]
pub struct History {
    table: Table,
    work: Work,
    /// An attempt to append whose end is not known: the store failed while it was committed.
    unsure: Option<Unsure>,
}

#[derive(Debug)]
struct Unsure {
    paths: Vec<String>,
    last: Position,
    imported: Option<String>,
}

impl Unsure {
    fn happened(&self, manifest: &Manifest) -> bool {
        let mut names = manifest.files.iter().map(|file| &file.path);
        names.any(|name| self.paths.contains(name))
            || manifest.retired.iter().any(|retired| self.paths.contains(&retired.path))
            || (self.imported.is_some()
                && manifest.imported.as_ref().map(|imported| &imported.id) == self.imported.as_ref())
    }
}

impl History {
    /// Opens the history of a source below the project's folder; one that was never written is empty.
    pub async fn open(store: Arc<dyn ObjectStore>, project: Path, source: &str) -> Result<History, HistoryError> {
        let table = Table::of_stream(store, &project, source).await?;
        Ok(History { table, work: Work::default(), unsure: None })
    }

    /// With bounds for what scans sort; small ones in memory, temporary files in the system's folder are the default.
    pub fn with_work(mut self, work: Work) -> History {
        self.work = work;
        self
    }

    /// Reads the manifest again.
    pub async fn reload(&mut self) -> Result<(), HistoryError> {
        self.table.reload().await
    }

    pub fn table(&self) -> &Table {
        &self.table
    }

    pub fn manifest(&self) -> &Manifest {
        self.table.manifest()
    }

    /// Where a file lies in the object store.
    pub fn object_path(&self, file: &HistoryFile) -> Path {
        self.table.object_path(file)
    }

    /// Appends events in order of position, all after what is applied, and moves `applied` to the last of them. Rows are
    /// those of `source`, aligned. When this fails, the same call may be made again, with more events if there are more.
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
        let rows = events.iter().map(|event| event.positions.len() as u64).sum();
        let mut done = None;
        if let Some(unsure) = &self.unsure {
            self.table.reload().await?;
            if unsure.happened(self.table.manifest()) {
                if imported.is_some() {
                    self.unsure = None;
                    return Ok(rows);
                }
                done = Some(unsure.last);
            }
            self.unsure = None;
        }
        let events = events.iter().map(|event| event.after(done)).filter(|event| !event.positions.is_empty());
        let events: Vec<Positioned> = events.collect();
        if events.is_empty() && imported.is_none() {
            return Ok(rows);
        }
        self.check_order(&events)?;
        let files = write(&self.table, source, &events).await?;
        self.commit(source, &events, &files, imported, now).await?;
        Ok(rows)
    }

    /// For writing what will be appended, beside whatever else is done with this history.
    pub fn writer(&self) -> HistoryWriter {
        HistoryWriter { table: self.table.clone() }
    }

    /// The same as [`History::append`], of what its writer has written before.
    pub async fn append_written(
        &mut self,
        source: &SourcePlan,
        written: &Written,
        now: Micros,
    ) -> Result<u64, HistoryError> {
        if self.unsure.is_some() {
            // Some of it may be here already; those files stay without a name, and go in time.
            return self.extend(source, &written.events, None, now).await;
        }
        self.check_order(&written.events)?;
        self.commit(source, &written.events, &written.files, None, now).await?;
        Ok(written.events.iter().map(|event| event.positions.len() as u64).sum())
    }

    /// Names the files, which hold these events, in the manifest.
    async fn commit(
        &mut self,
        source: &SourcePlan,
        events: &[Positioned],
        files: &[HistoryFile],
        imported: Option<Imported>,
        now: Micros,
    ) -> Result<(), HistoryError> {
        for _ in 0..COMMIT_TRIES {
            let mut next = self.manifest().clone();
            next.schema = source.schema.clone();
            next.files.extend(files.iter().cloned());
            for position in events.iter().flat_map(|event| &event.positions) {
                next.applied = *position;
                next.sequence_max = next.sequence_max.max(position.sequence);
            }
            if imported.is_some() {
                next.imported = imported.clone();
            }
            let expired = next.expire(now);
            self.unsure = Some(Unsure {
                paths: files.iter().map(|file| file.path.clone()).collect(),
                last: next.applied,
                imported: imported.as_ref().map(|imported| imported.id.clone()),
            });
            match self.table.folder().commit(self.table.manifest(), &mut next).await? {
                Committed::Done => {
                    self.unsure = None;
                    let folder = self.table.folder().clone();
                    self.table.set_manifest(next);
                    folder.delete_retired(expired).await;
                    return Ok(());
                }
                Committed::Lost => {
                    self.unsure = None;
                    self.table.reload().await?;
                    self.check_order(events)?;
                }
            }
        }
        Err(HistoryError::Contended { source_name: source.name.to_string(), tries: COMMIT_TRIES })
    }

    /// Events have to be after everything that is in history: another appender may have been there.
    fn check_order(&self, events: &[Positioned]) -> Result<(), HistoryError> {
        let mut before = self.manifest().applied;
        for position in events.iter().flat_map(|event| &event.positions) {
            if *position <= before {
                let source_name = self.manifest().source.clone();
                return Err(HistoryError::Order { source_name, applied: before, given: *position });
            }
            before = *position;
        }
        Ok(())
    }

    /// Events after a position, in order of position, aligned to the source's declared columns (or those named).
    pub fn scan(
        &self,
        source: &Arc<SourcePlan>,
        columns: Option<Vec<String>>,
        after: Position,
    ) -> BoxStream<'static, Result<Positioned, HistoryError>> {
        // A run holds everything between its neighbours, so pieces follow each other in order.
        let mut pieces: Vec<Vec<HistoryFile>> = Vec::new();
        for file in &self.manifest().files {
            match pieces.last_mut().filter(|piece| file.is_sorted() && piece[0].run == file.run) {
                Some(piece) => piece.push(file.clone()),
                None => pieces.push(vec![file.clone()]),
            }
        }
        pieces.retain(|piece| piece.iter().any(|file| file.last > after));
        let reader = Arc::new(Reader {
            table: self.table.clone(),
            work: self.work.clone(),
            source: source.clone(),
            columns,
            after,
        });
        stream::iter(pieces)
            .then(move |piece| {
                let reader = reader.clone();
                async move {
                    match reader.read(piece).await {
                        Ok(batches) => batches,
                        Err(error) => stream::iter([Err(error)]).boxed(),
                    }
                }
            })
            .flatten()
            .boxed()
    }
}

/// Writes the files of an append before it is made.
#[derive(Debug, Clone)]
pub struct HistoryWriter {
    table: Table,
}

/// Events in files that no manifest names yet.
#[derive(Debug)]
pub struct Written {
    events: Vec<Positioned>,
    files: Vec<HistoryFile>,
}

impl HistoryWriter {
    /// In order of position.
    pub async fn write(&self, source: &SourcePlan, events: Vec<Positioned>) -> Result<Written, HistoryError> {
        let files = write(&self.table, source, &events).await?;
        Ok(Written { events, files })
    }
}

/// Writes files of level 0; they count once a manifest names them.
async fn write(table: &Table, source: &SourcePlan, events: &[Positioned]) -> Result<Vec<HistoryFile>, HistoryError> {
    let mut files = Vec::new();
    if events.is_empty() {
        return Ok(files);
    }
    let whole = concat(source, events)?;
    let mut from = 0;
    while from < whole.positions.len() {
        let rows = (whole.positions.len() - from).min(PART_ROWS_MAX);
        let (batch, positions) = (whole.batch.slice(from, rows), &whole.positions[from..from + rows]);
        let (first, last) = (positions[0], positions[rows - 1]);
        let times = run::time_bounds(&batch, source.event_time.as_deref());
        let properties = run::properties(&batch.schema(), None, source.event_time.as_deref());
        // Some 100 ms of computing for a full part, which is not for a thread that serves others.
        let encoded = tokio::task::spawn_blocking(move || run::encode(&batch, properties)).await;
        let bytes = encoded
            .map_err(|error| error.to_string())
            .and_then(|encoded| encoded.map_err(|error| error.to_string()))
            .map_err(|what| HistoryError::Write { source_name: source.name.to_string(), what })?;
        let file = HistoryFile {
            path: format!("part-{:013}-{:013}-{}.parquet", first.sequence, last.sequence, id()),
            level: 0,
            run: 0,
            bucket: None,
            rows: rows as u64,
            bytes: bytes.len() as u64,
            first,
            last,
            event_time_min: times.map(|(min, _)| min),
            event_time_max: times.map(|(_, max)| max),
        };
        table.folder().put(&table.object_path(&file), bytes).await?;
        files.push(file);
        from += rows;
    }
    Ok(files)
}

/// One batch of all of them, with the position columns.
fn concat(source: &SourcePlan, events: &[Positioned]) -> Result<Positioned, HistoryError> {
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

impl Positioned {
    /// Without the events up to a position.
    fn after(&self, done: Option<Position>) -> Positioned {
        let from = done.map_or(0, |done| self.positions.partition_point(|position| *position <= done));
        let batch = self.batch.slice(from, self.batch.num_rows() - from);
        Positioned { batch, positions: self.positions[from..].to_vec() }
    }
}

/// Reads pieces of a history for one scan.
struct Reader {
    table: Table,
    work: Work,
    source: Arc<SourcePlan>,
    columns: Option<Vec<String>>,
    after: Position,
}

impl Reader {
    /// One file of level 0, or one run.
    async fn read(
        &self,
        piece: Vec<HistoryFile>,
    ) -> Result<BoxStream<'static, Result<Positioned, HistoryError>>, HistoryError> {
        if piece[0].is_sorted() {
            let batches =
                compact::run_in_order(&self.table, &piece, self.columns.as_deref(), self.after, &self.work).await?;
            let (source, columns, after) = (self.source.clone(), self.columns.clone(), self.after);
            let path = self.table.object_path(&piece[0]);
            let batches = batches.map(move |batch| positioned(&path, &batch?, &source, columns.as_deref(), after));
            return Ok(batches.try_filter(|part| std::future::ready(!part.positions.is_empty())).boxed());
        }
        let mut parts = Vec::new();
        for file in piece {
            let path = self.table.object_path(&file);
            let failed = |source| HistoryError::Store { path: path.to_string(), source };
            let store = &self.table.folder().store;
            let bytes = store.get(&path).await.map_err(failed)?.bytes().await.map_err(failed)?;
            parts.extend(decode_part(&path, bytes, &self.source, self.columns.as_deref(), self.after)?);
        }
        Ok(stream::iter(parts.into_iter().map(Ok)).boxed())
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
        let part = positioned(path, &batch, source, columns, after)?;
        if !part.positions.is_empty() {
            batches.push(part);
        }
    }
    Ok(batches)
}

/// The rows of a batch that are after a position; the batch is in order of position, so they are the last ones.
fn positioned(
    path: &Path,
    batch: &RecordBatch,
    source: &SourcePlan,
    columns: Option<&[String]>,
    after: Position,
) -> Result<Positioned, HistoryError> {
    let times = batch.column_by_name(POSITION_TIME).and_then(|column| column.as_primitive_opt::<Int64Type>());
    let sequences = batch.column_by_name(SEQUENCE).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let (Some(times), Some(sequences)) = (times, sequences) else {
        let what = format!("it has no columns `{POSITION_TIME}` and `{SEQUENCE}`");
        return Err(HistoryError::Corrupt { path: path.to_string(), what });
    };
    let positions: Vec<Position> =
        (0..batch.num_rows()).map(|row| Position { time: times.value(row), sequence: sequences.value(row) }).collect();
    let skipped = positions.partition_point(|position| *position <= after);
    let batch = batch.slice(skipped, batch.num_rows() - skipped);
    let batch = source.align(&batch, columns).map_err(|error| HistoryError::Rows {
        path: path.to_string(),
        source_name: source.name.to_string(),
        source: error,
    })?;
    Ok(Positioned { batch, positions: positions[skipped..].to_vec() })
}

#[cfg(test)]
mod tests;
