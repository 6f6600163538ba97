//! Compaction: files of level 0 and runs become one run.
//!
//! What is taken is always a last part of the table, in order of position, so what comes out takes its place. Files of
//! level 0 are sorted, on disk where they do not fit into memory; runs are sorted already and only merged. A compaction in
//! the background takes all files of level 0, and runs as long as the next one is at most twice what it has: sizes then
//! at least double from run to run, so there are few of them, and a row is rewritten a number of times that grows with
//! the logarithm of the table. One asked for by hand takes everything.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, UInt32Array};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, UInt64Type};
use feature_defs::plan::{Plan, SourcePlan, align_batch};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use futures::StreamExt;
use futures::stream;
use object_store::ObjectStore;
use object_store::path::Path;
use tokio::time::Instant;

use super::folder::ORPHAN_AFTER;
use super::read::{open, read};
use super::run::{BUCKET, RunWriter, buckets_of, sort_columns};
use super::sort::{Batches, Input, sorted};
use super::{Clustering, Committed, Manifest, POSITION_TIME, Retired, SEQUENCE, Table, TableError, TableFile, Work};

/// In the background, a table is compacted when it has this many files of level 0,
const SMALL_FILES: usize = 32;
/// or this many rows in them: readers sort those on the way.
const SMALL_ROWS: u64 = 2_000_000;
/// More buckets than this would be files too small to read well, or manifests too large.
const BUCKETS_MAX: u64 = 1_024;
/// A commit that lost is tried again while what was compacted is still there.
const COMMIT_TRIES: u32 = 16;
/// Compactions of one table by several processes meet once, seldom twice.
const SOURCE_TRIES: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Everything becomes one run.
    All,
    /// What pays, when there is enough of it.
    Due,
}

/// What a compaction did, or would do.
#[derive(Debug, Clone, PartialEq)]
pub struct Compacted {
    pub source: String,
    /// False: there was nothing to do.
    pub changed: bool,
    /// Of the whole table.
    pub files_before: usize,
    pub files_after: usize,
    /// Of those before, how many were rewritten.
    pub files_taken: usize,
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Rows that were written anew.
    pub rows: u64,
    pub buckets: u32,
    pub seconds: f64,
}

/// What is taken: the files from an index on, and how the run lies that they become.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Choice {
    from: usize,
    clustering: Clustering,
}

/// Whether a compaction in the background would do something.
pub fn is_due(manifest: &Manifest, wanted: &Clustering) -> bool {
    choose(manifest, wanted, Extent::Due, &Work::default()).is_some()
}

fn choose(manifest: &Manifest, wanted: &Clustering, extent: Extent, work: &Work) -> Option<Choice> {
    let files = &manifest.files;
    if files.is_empty() {
        return None;
    }
    let is_small = |file: &&TableFile| !file.is_sorted();
    let small_rows: u64 = files.iter().filter(is_small).map(|file| file.rows).sum();
    let small_files = files.iter().filter(is_small).count();
    if extent == Extent::Due && small_files < SMALL_FILES && small_rows < SMALL_ROWS {
        return None;
    }
    let total = manifest.rows();
    let buckets = bucket_count(total, work);
    let everything = || Some(Choice { from: 0, clustering: Clustering { buckets, ..wanted.clone() } });
    let lies = |present: &Clustering| Clustering { buckets: present.buckets, ..wanted.clone() } == *present;
    let Some(present) = manifest.clustering.as_ref().filter(|present| lies(present)) else { return everything() };
    match extent {
        Extent::All => {
            let first_run = files[0].run;
            let is_one_run = files.iter().all(|file| file.is_sorted() && file.run == first_run);
            // Within this the buckets are good enough.
            let fits = present.buckets * 4 > buckets && present.buckets < buckets * 4;
            if is_one_run && fits { None } else { everything() }
        }
        Extent::Due => {
            let mut from = files.iter().position(|file| !file.is_sorted())?;
            let mut taken: u64 = files[from..].iter().map(|file| file.rows).sum();
            while from > 0 {
                let run = files[from - 1].run;
                let begin = files.iter().position(|file| file.run == run && file.is_sorted())?;
                let rows: u64 = files[begin..from].iter().map(|file| file.rows).sum();
                if rows > 2 * taken {
                    break;
                }
                (from, taken) = (begin, taken + rows);
            }
            // Runs that stay keep the number of buckets.
            if from == 0 { everything() } else { Some(Choice { from, clustering: present.clone() }) }
        }
    }
}

pub(crate) fn bucket_count(rows: u64, work: &Work) -> u32 {
    (rows / work.bucket_rows.max(1)).next_power_of_two().clamp(1, BUCKETS_MAX) as u32
}

/// Compacts a table. `progress` hears of rows as they are written. When this fails, the table is what it was, or, where
/// the store failed in the last step, what it should become.
pub async fn compact(
    table: &mut Table,
    wanted: &Clustering,
    extent: Extent,
    work: &Work,
    now: Micros,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Compacted, TableError> {
    let started = Instant::now();
    let mut done = summary(table.manifest(), started);
    let Some(choice) = choose(table.manifest(), wanted, extent, work) else { return Ok(done) };
    let taken: Vec<TableFile> = table.manifest().files[choice.from..].to_vec();
    let source = table.manifest().source.clone();
    let files = write(table, &taken, &choice.clustering, work, progress).await?;
    let rows = |files: &[TableFile]| files.iter().map(|file| file.rows).sum::<u64>();
    if rows(&files) != rows(&taken) {
        // What is replaced is deleted in an hour, so whatever the sort did, this is looked at once more.
        table.discard(&files).await;
        let what = format!("{} rows went in and {} came out; the table stays as it is", rows(&taken), rows(&files));
        return Err(TableError::Sort { source_name: source, what });
    }
    let late = || TableError::Sort {
        source_name: source.clone(),
        what: "it took more than half a day, after which its files may be taken for leavings; run it more often".into(),
    };
    for _ in 0..COMMIT_TRIES {
        if started.elapsed().as_micros() as Micros >= ORPHAN_AFTER / 2 {
            table.discard(&files).await;
            return Err(late());
        }
        let base = table.manifest();
        let Some(mut next) = replace(base, &taken, &files, &choice.clustering, now) else {
            // Another compaction took the same files first.
            table.discard(&files).await;
            return Err(TableError::Contended { source_name: source, tries: 1 });
        };
        let expired = next.expire(now);
        match table.folder().commit(base, &mut next).await? {
            Committed::Done => {
                let folder = table.folder().clone();
                table.set_manifest(next);
                folder.delete_retired(expired).await;
                folder.tidy(table.manifest(), now).await;
                let after = summary(table.manifest(), started);
                (done.changed, done.files_taken) = (true, taken.len());
                (done.files_after, done.bytes_after) = (after.files_after, after.bytes_after);
                (done.buckets, done.seconds) = (after.buckets, after.seconds);
                done.rows = rows(&files);
                return Ok(done);
            }
            Committed::Lost => table.reload().await?,
        }
    }
    Err(TableError::Contended { source_name: source, tries: COMMIT_TRIES })
}

/// What [`compact`] would do; nothing is written.
pub fn look(table: &Table, wanted: &Clustering, extent: Extent, work: &Work) -> Compacted {
    let mut found = summary(table.manifest(), Instant::now());
    if let Some(choice) = choose(table.manifest(), wanted, extent, work) {
        let taken = &table.manifest().files[choice.from..];
        found.changed = true;
        found.files_taken = taken.len();
        found.rows = taken.iter().map(|file| file.rows).sum();
        found.buckets = choice.clustering.buckets;
    }
    found
}

/// Compacts the table of a source, whichever kind it is: sorted for the first view of the plan that reads it. A table
/// that another process compacts at the same time is looked at again.
#[expect(clippy::too_many_arguments, reason = "a place, a source, bounds and a listener")]
pub async fn compact_source(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    plan: &Plan,
    source: &SourcePlan,
    extent: Extent,
    work: &Work,
    now: Micros,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Option<Compacted>, TableError> {
    let mut tries = 0;
    loop {
        let Some(mut table) = Table::open(store.clone(), project, source).await? else { return Ok(None) };
        let wanted = Clustering::choose(plan, source, table.clustering());
        tries += 1;
        match compact(&mut table, &wanted, extent, work, now, progress).await {
            Err(TableError::Contended { .. }) if tries < SOURCE_TRIES => {}
            done => return done.map(Some),
        }
    }
}

fn summary(manifest: &Manifest, started: Instant) -> Compacted {
    let bytes = manifest.files.iter().map(|file| file.bytes).sum();
    Compacted {
        source: manifest.source.clone(),
        changed: false,
        files_before: manifest.files.len(),
        files_after: manifest.files.len(),
        files_taken: 0,
        bytes_before: bytes,
        bytes_after: bytes,
        rows: 0,
        buckets: manifest.clustering.as_ref().map_or(1, |clustering| clustering.buckets),
        seconds: started.elapsed().as_secs_f64(),
    }
}

/// The table with some files replaced; None when they are not all there any more.
fn replace(
    base: &Manifest,
    taken: &[TableFile],
    files: &[TableFile],
    clustering: &Clustering,
    now: Micros,
) -> Option<Manifest> {
    let mut next = base.clone();
    let begin = next.files.iter().position(|file| file.path == taken[0].path)?;
    let there = next.files.get(begin..begin + taken.len())?;
    if there.iter().zip(taken).any(|(there, taken)| there.path != taken.path) {
        return None;
    }
    next.last_run += 1;
    let run = next.last_run;
    let files = files.iter().map(|file| TableFile { run, ..file.clone() });
    let replaced: Vec<TableFile> = next.files.splice(begin..begin + taken.len(), files).collect();
    next.retired.extend(replaced.into_iter().map(|file| Retired { path: file.path, at: now }));
    next.clustering = Some(clustering.clone());
    Some(next)
}

/// Writes one run of these files' rows.
async fn write(
    table: &Table,
    taken: &[TableFile],
    clustering: &Clustering,
    work: &Work,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Vec<TableFile>, TableError> {
    let manifest = table.manifest();
    let columns = Arc::new(columns(table, taken, clustering).await?);
    let schema = run_schema(&columns, manifest.origin.is_none());
    // A run whose buckets are those of the new one needs no sort.
    let stays = manifest.clustering.as_ref() == Some(clustering);
    let batches = |files: Vec<TableFile>| {
        let (table, columns, clustering) = (table.clone(), columns.clone(), Arc::new(clustering.clone()));
        let schema = schema.clone();
        stream::iter(files)
            .then(move |file| {
                let (table, columns, clustering) = (table.clone(), columns.clone(), clustering.clone());
                let (schema, bucket) = (schema.clone(), file.bucket.filter(|_| stays));
                async move {
                    let batches = match read(&table, &file, None).await {
                        Ok((_, batches)) => batches,
                        Err(error) => return stream::iter([Err(error)]).boxed(),
                    };
                    let path = table.object_path(&file);
                    batches
                        .map(move |batch| prepare(&path, &table, &batch?, &columns, &clustering, bucket, &schema))
                        .boxed()
                }
            })
            .flatten()
            .boxed()
    };
    let mut inputs = Vec::new();
    let loose: Vec<TableFile> = taken.iter().filter(|file| !(stays && file.is_sorted())).cloned().collect();
    if !loose.is_empty() {
        inputs.push(Input::Unsorted(batches(loose)));
    }
    let runs: Vec<TableFile> = taken.iter().filter(|file| stays && file.is_sorted()).cloned().collect();
    for run in runs.chunk_by(|a, b| a.run == b.run) {
        inputs.push(Input::Sorted(batches(run.to_vec())));
    }
    write_run(table, &schema, inputs, clustering, work, progress).await
}

/// Sorts what comes in and writes it as the files of a run.
pub(crate) async fn write_run(
    table: &Table,
    schema: &SchemaRef,
    inputs: Vec<Input>,
    clustering: &Clustering,
    work: &Work,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Vec<TableFile>, TableError> {
    let source = &table.manifest().source;
    let mut by = vec![BUCKET.to_owned()];
    by.extend(sort_columns(clustering, schema));
    let mut batches = sorted(source, schema, inputs, &by, work)?;
    let mut writer = RunWriter::new(table.folder(), source, schema, clustering);
    loop {
        let written = match batches.next().await {
            Some(Ok(batch)) => writer.write(&batch).await.map(|()| progress(batch.num_rows() as u64)),
            Some(Err(error)) => Err(error),
            None => return writer.finish().await,
        };
        if let Err(error) = written {
            writer.discard().await;
            return Err(error);
        }
    }
}

/// The columns of a run: those of the table, those that older files have beside them (nothing is lost because a
/// definition forgot it), and those it is sorted by.
pub(super) async fn columns(
    table: &Table,
    taken: &[TableFile],
    clustering: &Clustering,
) -> Result<Vec<(String, Type)>, TableError> {
    let mut columns = table.manifest().schema.clone();
    let mut add = |name: &str, column_type: Type| {
        let is_ours = name == POSITION_TIME || name == SEQUENCE || name == BUCKET;
        if !is_ours && !columns.iter().any(|(known, _)| known == name) {
            columns.push((name.to_owned(), column_type));
        }
    };
    for file in taken {
        let builder = open(table, file).await?;
        for field in builder.schema().fields() {
            if let Some(column_type) = Type::from_arrow(field.data_type()) {
                add(field.name(), column_type);
            }
        }
    }
    clustering.keys.iter().for_each(|key| add(&key.column, key.key_type.clone()));
    clustering.event_time.iter().chain(&clustering.created_time).for_each(|name| add(name, Type::Timestamp));
    Ok(columns)
}

/// What is sorted: a table's columns, positions where it has them, and the bucket.
pub(crate) fn run_schema(columns: &[(String, Type)], positions: bool) -> SchemaRef {
    let mut fields: Vec<Field> =
        columns.iter().map(|(name, column_type)| Field::new(name, column_type.arrow(), true)).collect();
    if positions {
        fields.push(Field::new(POSITION_TIME, DataType::Int64, false));
        fields.push(Field::new(SEQUENCE, DataType::UInt64, false));
    }
    fields.push(Field::new(BUCKET, DataType::UInt32, false));
    Arc::new(Schema::new(fields))
}

/// A batch of a file in the columns of the run.
pub(super) fn prepare(
    path: &Path,
    table: &Table,
    batch: &RecordBatch,
    columns: &[(String, Type)],
    clustering: &Clustering,
    bucket: Option<u32>,
    schema: &SchemaRef,
) -> Result<RecordBatch, TableError> {
    let source_name = &table.manifest().source;
    let corrupt = |what: String| TableError::Corrupt { path: path.to_string(), what };
    let wanted = columns.iter().map(|(name, column_type)| (name.as_str(), column_type));
    let aligned = align_batch(source_name, wanted, batch, true).map_err(|source| TableError::Rows {
        path: path.to_string(),
        source_name: source_name.clone(),
        source,
    })?;
    let buckets: ArrayRef = match bucket {
        Some(bucket) => Arc::new(UInt32Array::from(vec![bucket; batch.num_rows()])),
        None => buckets_of(clustering, source_name, &aligned)?,
    };
    let mut all = aligned.columns().to_vec();
    for name in [POSITION_TIME, SEQUENCE] {
        if schema.column_with_name(name).is_none() {
            continue;
        }
        let column = batch.column_by_name(name).ok_or_else(|| corrupt(format!("it has no column `{name}`")))?;
        all.push(column.clone());
    }
    all.push(buckets);
    RecordBatch::try_new(schema.clone(), all).map_err(|error| corrupt(error.to_string()))
}

/// Rows of a run after a position, in order of position: sorted while they are read, on disk where they do not fit.
/// `columns` of the source and the positions; all without.
pub(crate) async fn run_in_order(
    table: &Table,
    files: &[TableFile],
    columns: Option<&[String]>,
    after: Position,
    work: &Work,
) -> Result<Batches, TableError> {
    let Some(first) = files.first() else { return Ok(stream::empty().boxed()) };
    let (schema, _) = read(table, first, columns).await?;
    let (reader, columns) = (table.clone(), columns.map(<[String]>::to_vec));
    let batches = stream::iter(files.to_vec())
        .then(move |file| {
            let (reader, columns) = (reader.clone(), columns.clone());
            async move {
                match read(&reader, &file, columns.as_deref()).await {
                    Ok((_, batches)) => batches.map(move |batch| later(&batch?, after)).boxed(),
                    Err(error) => stream::iter([Err(error)]).boxed(),
                }
            }
        })
        .flatten()
        .boxed();
    let by = [POSITION_TIME.to_owned(), SEQUENCE.to_owned()];
    sorted(&table.manifest().source, &schema, vec![Input::Unsorted(batches)], &by, work)
}

/// The rows of a batch after a position, in whatever order.
fn later(batch: &RecordBatch, after: Position) -> Result<RecordBatch, TableError> {
    let corrupt = |what: String| TableError::Corrupt { path: "a run".into(), what };
    let times = batch.column_by_name(POSITION_TIME).and_then(|column| column.as_primitive_opt::<Int64Type>());
    let sequences = batch.column_by_name(SEQUENCE).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let (Some(times), Some(sequences)) = (times, sequences) else {
        return Err(corrupt(format!("it has no columns `{POSITION_TIME}` and `{SEQUENCE}`")));
    };
    let positions = times.values().iter().zip(sequences.values());
    let wanted: BooleanArray =
        positions.map(|(time, sequence)| Some(Position { time: *time, sequence: *sequence } > after)).collect();
    if wanted.true_count() == batch.num_rows() {
        return Ok(batch.clone());
    }
    filter_record_batch(batch, &wanted).map_err(|error| corrupt(error.to_string()))
}

#[cfg(test)]
mod tests;
