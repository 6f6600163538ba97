//! Managed tables: compactions that the server makes by itself, and those that somebody asks for; imports of files.
//!
//! One piece of such work runs at a time, on a thread of its own with a low priority, so that it never stands before a
//! request. It commits like any other writer of a table (`offline_store::table`), so the applier goes on beside it, and a
//! process that ends in the middle leaves the table as it was.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use feature_defs::plan::SourcePlan;
use offline_store::table::compact::{Compacted, Extent, compact_source, is_due, look};
use offline_store::table::import::{FilesImported, import_source};
use offline_store::table::{Clustering, Table, Work};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Sender;

use crate::apply::StreamState;
use crate::{IngestError, Inner, Mode, Stream};

/// Between two messages of progress.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// How far a piece of work on a table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableProgress {
    pub source: Arc<str>,
    pub rows_written: u64,
}

/// The thread that works on tables, while there is one.
#[derive(Default)]
pub(crate) struct Background {
    runtime: std::sync::Mutex<Option<Runtime>>,
}

impl Background {
    /// It stays until the process ends: connections of the object store may belong to it.
    fn handle(&self) -> std::io::Result<tokio::runtime::Handle> {
        let mut runtime = crate::lock(&self.runtime);
        if let Some(runtime) = &*runtime {
            return Ok(runtime.handle().clone());
        }
        let built = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("tables")
            .on_thread_start(lower_priority)
            .enable_all()
            .build()?;
        let handle = built.handle().clone();
        *runtime = Some(built);
        Ok(handle)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = crate::lock(&self.runtime).take() {
            // Dropped where nothing may block.
            runtime.shutdown_background();
        }
    }
}

/// The scheduler then prefers every other thread. Elsewhere than on Linux this would slow the whole process, and one
/// thread is bound enough.
fn lower_priority() {
    #[cfg(target_os = "linux")]
    // SAFETY: no memory is involved; on Linux, process 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) } != 0 {
        tracing::debug!("the thread that works on tables keeps its priority");
    }
}

/// What such work may use; what it sorts on disk is beside the log.
pub(crate) fn work(inner: &Inner) -> Work {
    Work { spill_folder: Some(spill_folder(inner)), ..Work::default() }
}

pub(crate) fn spill_folder(inner: &Inner) -> PathBuf {
    inner.options.folder.with_file_name("spill")
}

/// Begins a compaction of a stream's history when it has become too many small files. The caller holds the state.
pub(crate) fn start_if_due(inner: &Arc<Inner>, stream: &Arc<Stream>, state: &StreamState) {
    let Some(plan) = inner.plan() else { return };
    let manifest = state.history.manifest();
    // A build reads the files of the manifest that it began with, for longer perhaps than replaced ones stay.
    if state.builder_runs || !is_due(manifest, &Clustering::choose(&plan, &state.plan, manifest.clustering.as_ref())) {
        return;
    }
    if stream.compacting.swap(true, Ordering::AcqRel) {
        return;
    }
    let (task_inner, stream) = (inner.clone(), stream.clone());
    inner.spawn(async move {
        let name = stream.name.clone();
        match run_compaction(&task_inner, &state_plan(&stream).await, Extent::Due, None).await {
            Ok(Some(done)) if done.changed => {
                let Compacted { files_before, files_after, rows, seconds, .. } = done;
                tracing::info!(source = %name, files_before, files_after, rows, seconds, "history was compacted");
            }
            Ok(_) => {}
            Err(error) => {
                let error = crate::error_chain(&error);
                tracing::warn!(source = %name, error, "history could not be compacted; it is tried again after the next flush");
            }
        }
        stream.compacting.store(false, Ordering::Release);
    });
}

async fn state_plan(stream: &Stream) -> Arc<SourcePlan> {
    stream.state.lock().await.plan.clone()
}

/// One compaction, on the thread for such work.
async fn run_compaction(
    inner: &Arc<Inner>,
    source: &Arc<SourcePlan>,
    extent: Extent,
    progress: Option<Sender<TableProgress>>,
) -> Result<Option<Compacted>, IngestError> {
    let _one = inner.tables.lock().await;
    let (worker, source_task) = (inner.clone(), source.clone());
    let done = on_background(inner, source, progress, async move |told: Arc<AtomicU64>| {
        let plan = worker.plan().ok_or(IngestError::NoPlan)?;
        let (store, project) = (&worker.options.store, worker.project_path());
        let (work, now) = (work(&worker), (worker.options.clock)());
        let tell = move |rows: u64| {
            told.fetch_add(rows, Ordering::Relaxed);
        };
        Ok(compact_source(store, &project, &plan, &source_task, extent, &work, now, &tell).await?)
    });
    let done = done.await?;
    let stream = crate::lock(&inner.streams).get(&source.name).cloned();
    if let Some(stream) = stream.filter(|_| done.as_ref().is_some_and(|done| done.changed)) {
        // What it reads next is there; without this it would find out by itself.
        let _ = stream.state.lock().await.history.reload().await;
    }
    Ok(done)
}

/// Runs work on the thread for it and tells how far it is. Whoever asked may go away, the work then ends.
async fn on_background<T: Send + 'static, F: Future<Output = Result<T, IngestError>> + Send + 'static>(
    inner: &Inner,
    source: &SourcePlan,
    progress: Option<Sender<TableProgress>>,
    work: impl FnOnce(Arc<AtomicU64>) -> F,
) -> Result<T, IngestError> {
    struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);
    impl<T> Drop for AbortOnDrop<T> {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let rows = Arc::new(AtomicU64::new(0));
    let handle = inner.background.handle().map_err(IngestError::Background)?;
    let mut task = AbortOnDrop(handle.spawn(work(rows.clone())));
    loop {
        tokio::select! {
            done = &mut task.0 => return done.map_err(|error| IngestError::Arrow(error.to_string()))?,
            () = tokio::time::sleep(TELL_EVERY) => {
                if let Some(progress) = &progress {
                    let rows_written = rows.load(Ordering::Relaxed);
                    drop(progress.try_send(TableProgress { source: source.name.clone(), rows_written }));
                }
            }
        }
    }
}

/// See [`crate::Ingest::compact`].
pub(crate) async fn compact(
    inner: &Arc<Inner>,
    names: &[String],
    mode: Mode,
    progress: Sender<TableProgress>,
) -> Result<Vec<Compacted>, IngestError> {
    let plan = inner.plan().ok_or(IngestError::NoPlan)?;
    let mut sources = Vec::new();
    for name in names {
        sources.push(plan.source(name).cloned().ok_or_else(|| unknown(&plan, name))?);
    }
    if names.is_empty() {
        sources.extend(plan.sources.iter().cloned());
    }
    let mut all = Vec::new();
    for source in sources {
        let stream = crate::lock(&inner.streams).get(&source.name).cloned();
        if let Some(stream) = stream {
            let mut state = stream.state.lock().await;
            state.flush(inner).await?;
            if state.builder_runs && mode == Mode::Apply {
                return Err(IngestError::TableInUse { source_name: source.name.to_string() });
            }
        }
        let done = match mode {
            Mode::Apply => run_compaction(inner, &source, Extent::All, Some(progress.clone())).await?,
            Mode::DryRun => {
                let table = Table::open(inner.options.store.clone(), &inner.project_path(), &source).await?;
                table.map(|table| {
                    look(&table, &Clustering::choose(&plan, &source, table.clustering()), Extent::All, &work(inner))
                })
            }
        };
        all.extend(done);
    }
    Ok(all)
}

/// See [`crate::Ingest::import_files`].
pub(crate) async fn import_files(
    inner: &Arc<Inner>,
    name: &str,
    progress: Sender<TableProgress>,
) -> Result<FilesImported, IngestError> {
    let plan = inner.plan().ok_or(IngestError::NoPlan)?;
    let source = plan.source(name).cloned().ok_or_else(|| unknown(&plan, name))?;
    if source.is_stream() {
        return Err(IngestError::NoFilesToImport { source_name: name.to_owned() });
    }
    let _one = inner.tables.lock().await;
    let (worker, source_task) = (inner.clone(), source.clone());
    let done = on_background(inner, &source, Some(progress), async move |told: Arc<AtomicU64>| {
        let options = &worker.options;
        let tell = move |rows: u64| {
            told.fetch_add(rows, Ordering::Relaxed);
        };
        let (project, now) = (worker.project_path(), (options.clock)());
        let (store, sources) = (&options.store, &options.sources);
        Ok(import_source(store, &project, &plan, &source_task, sources, &work(&worker), now, &tell).await?)
    });
    done.await
}

fn unknown(plan: &feature_defs::plan::Plan, name: &str) -> IngestError {
    let known: Vec<&str> = plan.sources.iter().map(|source| &*source.name).collect();
    IngestError::UnknownTable { source_name: name.to_owned(), known: known.join(", ") }
}
