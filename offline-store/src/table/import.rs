//! Files that somebody else owns, imported into a managed table: sorted once, read many times.
//!
//! The table remembers what the files were. It may stand in for them only while they are still the same; whoever reads a
//! source compares fingerprints first.

use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::error::DataFusionError;
use feature_defs::plan::{Judge, Plan, SourceKind, SourcePlan};
use feature_defs::time::Micros;
use futures::StreamExt;
use object_store::ObjectStore;
use object_store::path::Path;
use tokio::time::Instant;

use super::compact::{bucket_count, run_schema, write_run};
use super::run::buckets_of;
use super::sort::Input;
use super::{Clustering, Committed, Manifest, Origin, Retired, Table, TableError, TableFile, Work};
use crate::source::Sources;

/// A commit that lost is tried again: the other one was an import of the same source.
const COMMIT_TRIES: u32 = 16;

/// What an import did.
#[derive(Debug, Clone, PartialEq)]
pub struct FilesImported {
    pub source: String,
    /// False: the table was made from these very files before.
    pub changed: bool,
    pub rows: u64,
    /// Files of the table.
    pub files: usize,
    pub bytes: u64,
    pub buckets: u32,
    pub seconds: f64,
}

/// Imports the files of a source into its table (one that [`Table::of_files`] opened), sorted as `wanted` says; what was
/// there is replaced in one step. `progress` hears of rows as they are written.
pub async fn import(
    table: &mut Table,
    source: &Arc<SourcePlan>,
    sources: &Sources,
    wanted: &Clustering,
    work: &Work,
    now: Micros,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<FilesImported, TableError> {
    import_without(table, source, sources, wanted, None, work, now, progress).await
}

/// Like [`import`], and leaves out what was forgotten.
#[expect(clippy::too_many_arguments, reason = "a place, a source, bounds and a listener")]
async fn import_without(
    table: &mut Table,
    source: &Arc<SourcePlan>,
    sources: &Sources,
    wanted: &Clustering,
    judge: Option<Judge>,
    work: &Work,
    now: Micros,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<FilesImported, TableError> {
    let started = Instant::now();
    let source_name = || source.name.to_string();
    let (SourceKind::Files { pattern } | SourceKind::Static { pattern }) = &source.kind else {
        return Err(TableError::Files { source_name: source_name(), what: "it is a stream, which has none".into() });
    };
    let fingerprint = sources.fingerprint(pattern).await?;
    if is_current(table.manifest(), source, wanted, &fingerprint) {
        return Ok(report(table.manifest(), false, started));
    }
    let unreadable =
        |error: DataFusionError| TableError::Files { source_name: source_name(), what: error.strip_backtrace() };
    let names: Vec<String> = source.schema.iter().map(|(name, _)| name.clone()).collect();
    let frame = sources.data_frame(source, &names[..names.len().min(1)]).await?;
    let rows = frame.count().await.map_err(unreadable)? as u64;
    let clustering = Clustering { buckets: bucket_count(rows, work), ..wanted.clone() };
    let schema = run_schema(&source.schema, false);
    let scan = sources.scan(source, &names).await?;
    let batches = {
        let (schema, clustering, name) = (schema.clone(), clustering.clone(), source_name());
        scan.map(move |batch| {
            let failed = |what: String| TableError::Files { source_name: name.clone(), what };
            let mut batch = batch.map_err(|error| failed(error.strip_backtrace()))?;
            let unfit = |source| TableError::Rows { path: name.clone(), source_name: name.clone(), source };
            let redaction = judge.as_ref().map(|judge| judge.judge(&batch)).transpose().map_err(unfit)?.flatten();
            if let Some(redaction) = redaction {
                batch = redaction.apply(&batch).map_err(unfit)?;
            }
            let mut columns = batch.columns().to_vec();
            columns.push(buckets_of(&clustering, &name, &batch)?);
            RecordBatch::try_new(schema.clone(), columns).map_err(|error| failed(error.to_string()))
        })
    };
    let files = write_run(table, &schema, vec![Input::Unsorted(batches.boxed())], &clustering, work, progress).await?;
    if sources.fingerprint(pattern).await? != fingerprint {
        table.discard(&files).await;
        return Err(TableError::FilesChanged { source_name: source_name() });
    }
    let origin =
        Origin { pattern: pattern.clone(), fingerprint, rows: files.iter().map(|file| file.rows).sum(), at: now };
    for _ in 0..COMMIT_TRIES {
        let mut next = replace(table.manifest(), &files, &clustering, &origin);
        next.schema = source.schema.clone();
        let expired = next.expire(now);
        match table.folder().commit(table.manifest(), &mut next).await? {
            Committed::Done => {
                let folder = table.folder().clone();
                table.set_manifest(next);
                folder.delete_retired(expired).await;
                folder.tidy(table.manifest(), now).await;
                return Ok(report(table.manifest(), true, started));
            }
            Committed::Lost => table.reload().await?,
        }
    }
    Err(TableError::Contended { source_name: source_name(), tries: COMMIT_TRIES })
}

/// Imports the files of a source into the project's table of it: sorted for the first view of the plan that reads it.
#[expect(clippy::too_many_arguments, reason = "a place, a source, bounds and a listener")]
pub async fn import_source(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    plan: &Plan,
    source: &Arc<SourcePlan>,
    sources: &Sources,
    work: &Work,
    now: Micros,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<FilesImported, TableError> {
    let mut table = Table::of_files(store.clone(), project, &source.name).await?;
    let wanted = Clustering::choose(plan, source, table.clustering());
    let judge = plan.forgotten.get().and_then(|forgotten| Judge::new(source, plan.views.iter(), &forgotten));
    import_without(&mut table, source, sources, &wanted, judge, work, now, progress).await
}

/// Whether the table is what an import would make of it.
fn is_current(manifest: &Manifest, source: &SourcePlan, wanted: &Clustering, fingerprint: &str) -> bool {
    let lies = |present: &Clustering| Clustering { buckets: present.buckets, ..wanted.clone() } == *present;
    manifest.origin.as_ref().is_some_and(|origin| origin.fingerprint == fingerprint)
        && manifest.schema == source.schema
        && manifest.clustering.as_ref().is_some_and(lies)
}

fn replace(base: &Manifest, files: &[TableFile], clustering: &Clustering, origin: &Origin) -> Manifest {
    let mut next = base.clone();
    next.last_run += 1;
    let run = next.last_run;
    let replaced = std::mem::take(&mut next.files);
    next.retired.extend(replaced.into_iter().map(|file| Retired { path: file.path, at: origin.at }));
    next.files = files.iter().map(|file| TableFile { run, ..file.clone() }).collect();
    next.clustering = Some(clustering.clone());
    next.origin = Some(origin.clone());
    next
}

fn report(manifest: &Manifest, changed: bool, started: Instant) -> FilesImported {
    FilesImported {
        source: manifest.source.clone(),
        changed,
        rows: manifest.rows(),
        files: manifest.files.len(),
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        buckets: manifest.clustering.as_ref().map_or(1, |clustering| clustering.buckets),
        seconds: started.elapsed().as_secs_f64(),
    }
}
