//! Forgetting entities in a table: files that hold rows about them are written anew without what goes, and deleted.
//!
//! A file of level 0 is rewritten by itself; so is a file of a run, because rows that go, and values that nothing is sorted
//! by, leave the others in order. Where a column goes that a run is sorted by, its rows belong elsewhere, and the whole run
//! is sorted anew. Positions stay what they are.
//!
//! Replaced files are deleted at once, unlike those that a compaction replaces: that is what forgetting is for. A reader
//! that began before finds one missing and fails with an error that says to begin again; what it would have read next must
//! not be read by anybody any more. Files that no manifest names are looked into as well: one that holds a forgotten key
//! was left by a writer that died, or comes from a compaction under way, which took a file that is no longer there, and so
//! can never commit.

use std::collections::BTreeSet;
use std::sync::Arc;

use feature_defs::plan::{Judge, KeysOfViews, RowsError};
use feature_defs::time::Position;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ArrowWriter;

use super::compact::{columns, prepare, run_schema, write_run};
use super::read::read;
use super::run::{position_bounds, properties, sort_columns, time_bounds};
use super::sort::Input;
use super::{Committed, Manifest, Table, TableError, TableFile, Work, id};

/// A commit that lost is tried again on what is there now: there is one appender, and compactions are rare.
const COMMIT_TRIES: u32 = 16;

/// What a table holds of forgotten entities, or held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Rows that nobody else counts.
    pub rows_removed: u64,
    /// Rows that stay for others and lose something.
    pub rows_cleared: u64,
    pub files: u64,
    /// Their keys, by view of the judge.
    pub keys: KeysOfViews,
}

struct Looked {
    found: Found,
    /// By file of the manifest: whether it holds any such row.
    files: Vec<bool>,
    /// Runs of which a column goes that they are sorted by.
    unsorted: BTreeSet<u64>,
}

/// What is there to forget. Nothing is changed.
pub async fn look(table: &Table, judge: &Judge) -> Result<Found, TableError> {
    Ok(look_into(table, judge).await?.found)
}

async fn look_into(table: &Table, judge: &Judge) -> Result<Looked, TableError> {
    let mut names = judge.columns();
    // A run may still be sorted by columns that no view reads any more.
    let keys = table.clustering().into_iter().flat_map(|clustering| &clustering.keys);
    names.extend(keys.map(|key| key.column.clone()));
    let manifest = table.manifest();
    let mut looked = Looked { found: Found::default(), files: Vec::new(), unsorted: BTreeSet::new() };
    for file in &manifest.files {
        let mut is_affected = false;
        let (_, mut batches) = read(table, file, Some(&names)).await?;
        while let Some(batch) = batches.try_next().await? {
            let rows = |source| unfit(table, file, source);
            let Some(redaction) = judge.judge(&batch).map_err(rows)? else { continue };
            judge.keys(&batch, &mut looked.found.keys).map_err(rows)?;
            is_affected = true;
            looked.found.rows_removed += redaction.removed();
            looked.found.rows_cleared += redaction.cleared();
            if let Some(clustering) = table.clustering().filter(|_| file.is_sorted())
                && sort_columns(clustering, &batch.schema()).iter().any(|name| redaction.clears(&batch, name))
            {
                looked.unsorted.insert(file.run);
            }
        }
        looked.files.push(is_affected);
        looked.found.files += u64::from(is_affected);
    }
    Ok(looked)
}

fn unfit(table: &Table, file: &TableFile, source: RowsError) -> TableError {
    let path = table.object_path(file).to_string();
    TableError::Rows { path, source_name: table.manifest().source.clone(), source }
}

/// Forgets. Killed at any moment, the table is the old or the new one; the next run finishes it. `progress` hears of rows
/// as they are written.
pub async fn redact(
    table: &mut Table,
    judge: &Judge,
    work: &Work,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Found, TableError> {
    let source = table.manifest().source.clone();
    for _ in 0..COMMIT_TRIES {
        let looked = look_into(table, judge).await?;
        let mut found = looked.found.clone();
        let retired = retired_with(table, judge).await?;
        if found.files == 0 && retired.is_empty() {
            found.files += sweep(table, judge).await?;
            return Ok(found);
        }
        let (files, written) = rewrite(table, judge, &looked, work, progress).await?;
        let mut next = Manifest { files, redactions: table.manifest().redactions + 1, ..table.manifest().clone() };
        next.retired.retain(|file| !retired.contains(&file.path));
        next.last_run = next.last_run.max(next.files.iter().map(|file| file.run).max().unwrap_or_default());
        match table.folder().commit(table.manifest(), &mut next).await? {
            Committed::Done => {
                table.set_manifest(next);
                // What was replaced is named by no manifest now, and holds a key.
                sweep(table, judge).await?;
                found.files += retired.len() as u64;
                return Ok(found);
            }
            Committed::Lost => {
                table.discard(&written).await;
                table.reload().await?;
            }
        }
    }
    Err(TableError::Contended { source_name: source, tries: COMMIT_TRIES })
}

/// The files of the table as they are to be, and those of them that are new.
async fn rewrite(
    table: &Table,
    judge: &Judge,
    looked: &Looked,
    work: &Work,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(Vec<TableFile>, Vec<TableFile>), TableError> {
    let manifest = table.manifest();
    let (mut files, mut written): (Vec<TableFile>, Vec<TableFile>) = (Vec::new(), Vec::new());
    let mut last_run = manifest.last_run;
    let mut done = BTreeSet::new();
    for (file, is_affected) in manifest.files.iter().zip(&looked.files) {
        if file.is_sorted() && looked.unsorted.contains(&file.run) {
            if done.insert(file.run) {
                last_run += 1;
                match rewrite_run(table, judge, file.run, work, progress).await {
                    Ok(new) => {
                        let new = new.into_iter().map(|file| TableFile { run: last_run, ..file });
                        written.extend(new.clone());
                        files.extend(new);
                    }
                    Err(error) => {
                        table.discard(&written).await;
                        return Err(error);
                    }
                }
            }
        } else if *is_affected {
            match rewrite_file(table, judge, file).await {
                Ok(new) => {
                    progress(new.as_ref().map_or(0, |file| file.rows));
                    written.extend(new.clone());
                    files.extend(new);
                }
                Err(error) => {
                    table.discard(&written).await;
                    return Err(error);
                }
            }
        } else {
            files.push(file.clone());
        }
    }
    Ok((files, written))
}

/// One file without what goes; None when nothing is left.
async fn rewrite_file(table: &Table, judge: &Judge, file: &TableFile) -> Result<Option<TableFile>, TableError> {
    let source_name = table.manifest().source.clone();
    let failed = |what: String| TableError::Write { source_name: source_name.clone(), what };
    let clustering = table.clustering().filter(|_| file.is_sorted());
    let event_time = judge.source.event_time.as_deref();
    let (schema, mut batches) = read(table, file, None).await?;
    let writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties(&schema, clustering, event_time)));
    let mut writer = writer.map_err(|error| failed(error.to_string()))?;
    let (mut rows, mut positions, mut times) = (0, None::<(Position, Position)>, None);
    while let Some(batch) = batches.try_next().await? {
        let rows_of = |source| unfit(table, file, source);
        let kept = match judge.judge(&batch).map_err(rows_of)? {
            Some(redaction) => redaction.apply(&batch).map_err(rows_of)?,
            None => batch,
        };
        if kept.num_rows() == 0 {
            continue;
        }
        writer.write(&kept).map_err(|error| failed(error.to_string()))?;
        rows += kept.num_rows() as u64;
        if let Some((first, last)) = position_bounds(&kept) {
            let (least, greatest) = positions.unwrap_or((first, last));
            positions = Some((least.min(first), greatest.max(last)));
        }
        if let Some((first, last)) = time_bounds(&kept, event_time) {
            let (least, greatest) = times.unwrap_or((first, last));
            times = Some((least.min(first), greatest.max(last)));
        }
    }
    let bytes = writer.into_inner().map_err(|error| failed(error.to_string()))?;
    if rows == 0 {
        return Ok(None);
    }
    let (first, last) = positions.unwrap_or((file.first, file.last));
    let path = match file.bucket {
        Some(bucket) => format!("run-{}-{bucket:04}-0000.parquet", id()),
        None => format!("part-{:013}-{:013}-{}.parquet", first.sequence, last.sequence, id()),
    };
    let new = TableFile {
        path,
        rows,
        bytes: bytes.len() as u64,
        first,
        last,
        event_time_min: times.map(|(least, _)| least),
        event_time_max: times.map(|(_, greatest)| greatest),
        ..file.clone()
    };
    table.folder().put(&table.object_path(&new), bytes).await?;
    Ok(Some(new))
}

/// A whole run, sorted anew.
async fn rewrite_run(
    table: &Table,
    judge: &Judge,
    run: u64,
    work: &Work,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Vec<TableFile>, TableError> {
    let manifest = table.manifest();
    let Some(clustering) = manifest.clustering.clone() else { return Ok(Vec::new()) };
    let files: Vec<TableFile> =
        manifest.files.iter().filter(|file| file.is_sorted() && file.run == run).cloned().collect();
    let names = Arc::new(columns(table, &files, &clustering).await?);
    let schema = run_schema(&names, manifest.origin.is_none());
    let (reader, judge, run_of, wanted) = (table.clone(), judge.clone(), schema.clone(), clustering.clone());
    let batches = stream::iter(files).then(move |file| {
        let (reader, judge, names) = (reader.clone(), judge.clone(), names.clone());
        let (schema, clustering) = (run_of.clone(), wanted.clone());
        async move {
            let batches = match read(&reader, &file, None).await {
                Ok((_, batches)) => batches,
                Err(error) => return stream::iter([Err(error)]).boxed(),
            };
            let path = reader.object_path(&file);
            let redacted = batches.map(move |batch| {
                let batch = batch?;
                let kept = match judge.judge(&batch).map_err(|source| unfit(&reader, &file, source))? {
                    Some(redaction) => redaction.apply(&batch).map_err(|source| unfit(&reader, &file, source))?,
                    None => batch,
                };
                prepare(&path, &reader, &kept, &names, &clustering, None, &schema)
            });
            redacted.boxed()
        }
    });
    write_run(table, &schema, vec![Input::Unsorted(batches.flatten().boxed())], &clustering, work, progress).await
}

/// Replaced files, kept for readers, that hold rows about forgotten entities.
async fn retired_with(table: &Table, judge: &Judge) -> Result<BTreeSet<String>, TableError> {
    let mut found = BTreeSet::new();
    for retired in &table.manifest().retired {
        let path = table.folder().file(&retired.path);
        match table.folder().store.head(&path).await {
            Ok(object) => {
                if holds(table, judge, &retired.path, object.size).await {
                    found.insert(retired.path.clone());
                }
            }
            Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(TableError::Store { path: path.to_string(), source }),
        }
    }
    Ok(found)
}

/// Deletes files that no manifest names and that hold rows about forgotten entities. Returns how many.
async fn sweep(table: &Table, judge: &Judge) -> Result<u64, TableError> {
    let folder = table.folder();
    let failed = |source| TableError::Store { path: folder.path.to_string(), source };
    let objects: Vec<_> = folder.store.list(Some(&folder.path)).try_collect().await.map_err(failed)?;
    let manifest = table.manifest();
    let named = manifest.files.iter().map(|file| &file.path);
    let named: BTreeSet<&String> = named.chain(manifest.retired.iter().map(|retired| &retired.path)).collect();
    let mut deleted = 0;
    for object in objects {
        let Some(name) = object.location.filename().map(str::to_owned) else { continue };
        if object.location.extension() != Some("parquet")
            || named.contains(&name)
            || folder.file(&name) != object.location
        {
            continue;
        }
        if holds(table, judge, &name, object.size).await {
            match folder.store.delete(&object.location).await {
                Ok(()) => deleted += 1,
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(TableError::Store { path: object.location.to_string(), source }),
            }
        }
    }
    Ok(deleted)
}

/// Whether a file that no manifest describes holds such rows. One that cannot be read holds none that anybody could.
async fn holds(table: &Table, judge: &Judge, path: &str, bytes: u64) -> bool {
    let start = Position::START;
    let file = TableFile {
        path: path.to_owned(),
        level: 0,
        run: 0,
        bucket: None,
        rows: 0,
        bytes,
        first: start,
        last: start,
        event_time_min: None,
        event_time_max: None,
    };
    let looked = async {
        let (_, mut batches) = read(table, &file, Some(&judge.columns())).await?;
        while let Some(batch) = batches.try_next().await? {
            if judge.judge(&batch).map_err(|source| unfit(table, &file, source))?.is_some() {
                return Ok::<bool, TableError>(true);
            }
        }
        Ok(false)
    };
    match looked.await {
        Ok(holds) => holds,
        Err(error) => {
            tracing::warn!(path, %error, "a file that no table names could not be looked into");
            false
        }
    }
}
