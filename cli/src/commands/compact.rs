//! `coeval compact`: managed tables become one sorted run each.
//!
//! A running server owns writing, so it is asked when one answers where the settings say; without one the command does the
//! work itself. A server that starts meanwhile does no harm and takes none: tables are committed on condition.

use std::sync::Arc;

use feature_defs::plan::Plan;
use indicatif::ProgressBar;
use object_store::ObjectStore;
use object_store::path::Path;
use offline_store::table::compact::{Compacted, Extent, compact_source, look};
use offline_store::table::{Clustering, Table, TableError, Work};
use proto::v1::{CompactRequest, TableDone, TableProgress};
use registry::store::open_store;
use serde::Serialize;
use tonic::Streaming;

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Checked, Place, Project};
use crate::server::{Server, ServerArguments, ServerError};
use crate::times;

#[derive(Debug, clap::Args)]
pub struct CompactArguments {
    /// Only these sources; without them, every source that has a table
    #[arg(value_name = "SOURCE")]
    sources: Vec<String>,
    /// Say what would be rewritten, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    /// Where the work was done: `server` or `here`.
    by: &'static str,
    tables: Vec<TableReport>,
}

#[derive(Debug, Serialize)]
struct TableReport {
    source: String,
    changed: bool,
    files_before: u64,
    files_after: u64,
    /// Of those before, how many were (or would be) rewritten.
    files_taken: u64,
    bytes_before: u64,
    bytes_after: u64,
    rows: u64,
    buckets: u32,
    seconds: f64,
}

pub async fn run(place: &Place, arguments: &CompactArguments, output: &Output) -> Result<(), CliError> {
    let bar = output.progress(None, "rows");
    let done = match Server::if_running(place, &arguments.server, output).await? {
        Some(server) => {
            let request = CompactRequest {
                project: server.project.clone(),
                sources: arguments.sources.clone(),
                dry_run: arguments.dry_run,
            };
            let answers = server.ingest().compact(request).await.map_err(|status| server.failed(status))?.into_inner();
            ("server", follow(&server, answers, &bar).await?.into_iter().map(TableReport::from).collect())
        }
        None => ("here", compact_here(place, arguments, output, &bar).await?),
    };
    bar.finish_and_clear();
    let (by, tables): (_, Vec<TableReport>) = done;
    for table in &tables {
        let TableReport { source, rows, files_before, files_after, files_taken, buckets, seconds, .. } = table;
        output.line(match (table.changed, arguments.dry_run) {
            (false, _) => format!("{source}: nothing to do, {files_before} files"),
            (true, true) => format!("{source}: {rows} rows in {files_taken} of {files_before} files would be rewritten"),
            (true, false) => format!(
                "{source}: {rows} rows rewritten in {seconds:.1} s ({}/s), {files_before} files became {files_after} in {buckets} buckets",
                (*rows as f64 / seconds.max(1e-6)).round()
            ),
        });
    }
    if tables.is_empty() {
        output.line("no source has a table");
    }
    output.json(&Report { dry_run: arguments.dry_run, by, tables });
    Ok(())
}

/// Shows progress until the last message, which says what was done.
pub async fn follow(
    server: &Server,
    mut answers: Streaming<TableProgress>,
    bar: &ProgressBar,
) -> Result<Vec<TableDone>, CliError> {
    let mut source = String::new();
    let mut rows_before = 0;
    let mut rows = 0;
    while let Some(progress) = answers.message().await.map_err(|status| server.failed(status))? {
        if progress.done {
            return Ok(progress.tables);
        }
        if progress.source != source {
            (source, rows_before) = (progress.source, rows_before + rows);
            bar.set_message(format!("{source}:"));
        }
        rows = progress.rows_written;
        bar.set_position(rows_before + rows);
    }
    Err(ServerError::Cut { address: server.address.clone() }.into())
}

/// What work on tables needs where no server runs.
pub struct Here {
    pub plan: Arc<Plan>,
    pub store: Arc<dyn ObjectStore>,
    /// The project's folder on it.
    pub project: Path,
    pub work: Work,
}

impl Here {
    /// By the definitions in the project folder, which must be valid.
    pub async fn open(place: &Place, output: &Output) -> Result<Here, CliError> {
        let Checked { settings, plan, .. } = Project::read(place)?.checked(output).await?;
        place.forget_listed(&settings, &plan).await?;
        let (store, root) = open_store(&place.resolve(&settings.store))?;
        let spill_folder = settings.offline.spill.as_ref().map(|folder| place.folder.join(folder));
        let work = Work { spill_folder, ..Work::default() };
        Ok(Here { plan: Arc::new(plan), store, project: root.join(settings.project.as_str()), work })
    }
}

async fn compact_here(
    place: &Place,
    arguments: &CompactArguments,
    output: &Output,
    bar: &ProgressBar,
) -> Result<Vec<TableReport>, CliError> {
    let Here { plan, store, project, work } = Here::open(place, output).await?;
    let known = || plan.sources.iter().map(|source| &*source.name);
    if let Some(name) = arguments.sources.iter().find(|name| plan.source(name).is_none()) {
        return Err(CliError::unknown("source", name, known()));
    }
    let is_meant = |name: &str| arguments.sources.is_empty() || arguments.sources.iter().any(|source| source == name);
    let mut tables = Vec::new();
    for source in plan.sources.iter().filter(|source| is_meant(&source.name)) {
        bar.set_message(format!("{}:", source.name));
        let done = if arguments.dry_run {
            let table = Table::open(store.clone(), &project, source).await.map_err(boxed)?;
            table.map(|table| look(&table, &Clustering::choose(&plan, source, table.clustering()), Extent::All, &work))
        } else {
            let tell = |rows| bar.inc(rows);
            compact_source(&store, &project, &plan, source, Extent::All, &work, times::now(), &tell)
                .await
                .map_err(boxed)?
        };
        tables.extend(done.map(TableReport::from));
    }
    Ok(tables)
}

fn boxed(error: TableError) -> CliError {
    CliError::ManagedTable(Box::new(error))
}

impl From<Compacted> for TableReport {
    fn from(done: Compacted) -> TableReport {
        TableReport {
            source: done.source,
            changed: done.changed,
            files_before: done.files_before as u64,
            files_after: done.files_after as u64,
            files_taken: done.files_taken as u64,
            bytes_before: done.bytes_before,
            bytes_after: done.bytes_after,
            rows: done.rows,
            buckets: done.buckets,
            seconds: done.seconds,
        }
    }
}

impl From<TableDone> for TableReport {
    fn from(done: TableDone) -> TableReport {
        let TableDone { source, changed, files_before, files_after, files_taken, bytes_before, bytes_after, .. } = done;
        let TableDone { rows, buckets, seconds, .. } = done;
        TableReport {
            source,
            changed,
            files_before,
            files_after,
            files_taken,
            bytes_before,
            bytes_after,
            rows,
            buckets,
            seconds,
        }
    }
}
