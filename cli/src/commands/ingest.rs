//! `coeval ingest`: rows of files, pushed as events to a stream source through the server; or, without files, a source's
//! own files copied into a managed table, by the server when one runs, else here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use feature_defs::value::Type;
use indicatif::ProgressBar;
use offline_store::source::Sources;
use offline_store::table::import::{FilesImported, import_source};
use proto::v1::{ImportFilesRequest, PushRequest, PushResponse, Rejected, TableDone};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::compact::{self, Here};
use crate::columns::encode_array;
use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::Place;
use crate::server::{Server, ServerArguments};
use crate::tables::{self, Table};
use crate::times;

/// One message: large enough that the round trip does not count, small enough that progress is seen.
const MESSAGE_ROWS: usize = 4_096;
/// Messages read ahead of the network.
const MESSAGES_AHEAD: usize = 4;
/// Rejected rows shown; all are counted.
const REJECTED_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub struct IngestArguments {
    /// The stream source, or a source with `files:` to import into a managed table
    source: String,
    /// Parquet or CSV files, pushed to the stream in this order
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Return only when what is due answers online
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Default, Serialize)]
struct Ingested {
    source: String,
    accepted: u64,
    duplicates: u64,
    early: u64,
    rejected: u64,
    last_sequence: u64,
    /// The first rejected rows, by their number among all rows pushed, from 0.
    reasons: Vec<Reason>,
}

#[derive(Debug, Serialize)]
struct Reason {
    row: u64,
    reason: String,
}

/// What an import of a source's own files did.
#[derive(Debug, Serialize)]
struct Imported {
    source: String,
    /// False: the table was a copy of these very files already.
    changed: bool,
    rows: u64,
    files: u64,
    bytes: u64,
    buckets: u32,
    seconds: f64,
}

pub async fn run(place: &Place, arguments: &IngestArguments, output: &Output) -> Result<(), CliError> {
    if arguments.files.is_empty() {
        return import(place, arguments, output).await;
    }
    let server = Server::of(place, &arguments.server, output).await?;
    let source = server.source(&arguments.source).await?;
    if source.kind != "stream" {
        return Err(CliError::Usage(format!(
            "`{0}` is not a stream: its rows are in files of its own; make them visible with `coeval materialize --through TIME --source {0}`, or copy them into a managed table with `coeval ingest {0}`",
            source.name
        )));
    }
    let mut types: BTreeMap<String, Type> = server.types(&source.schema)?.into_iter().collect();
    for time in [&source.event_time, &source.created_time].into_iter().filter(|time| !time.is_empty()) {
        types.insert(time.clone(), Type::Timestamp);
    }
    let types = Arc::new(types);
    let mut opened = Vec::new();
    for path in &arguments.files {
        let table = tables::open(path, &types, MESSAGE_ROWS)?;
        table.require([source.event_time.as_str()])?;
        let unknown: Vec<&str> =
            table.columns.iter().map(String::as_str).filter(|name| !types.contains_key(*name)).collect();
        if !unknown.is_empty() {
            output.note(format!(
                "note: {}: not pushed, for the source does not declare them: {}",
                path.display(),
                unknown.join(", ")
            ));
        }
        opened.push(table);
    }
    let total: Option<u64> = opened.iter().map(|table| table.rows).sum();
    let bar = output.progress(total, "rows");
    bar.set_message(source.name.clone());

    let (sender, receiver) = mpsc::channel(MESSAGES_AHEAD);
    let template = PushRequest {
        project: server.project.clone(),
        source: source.name.clone(),
        rows: Vec::new(),
        wait_visible: arguments.wait,
    };
    let (sizes_sender, sizes) = mpsc::unbounded_channel();
    let reading = tokio::task::spawn_blocking(move || read(opened, &types, &template, &sender, &sizes_sender));
    let pushed = push(&server, receiver, sizes, &bar).await;
    bar.finish_and_clear();
    // A file that cannot be read ends the stream early; that is then the reason to tell.
    match reading.await {
        Ok(read) => read?,
        Err(_) => return Err(CliError::Failed("the reader of the files broke; this is a bug".to_owned())),
    }
    let mut ingested = pushed?;
    ingested.source = source.name;

    output.json(&ingested);
    output.line(format!(
        "{}: {} accepted, {} known already, {} early, {} rejected",
        ingested.source, ingested.accepted, ingested.duplicates, ingested.early, ingested.rejected
    ));
    if ingested.rejected == 0 {
        return Ok(());
    }
    for Reason { row, reason } in &ingested.reasons {
        output.note(format!("  row {row}: {reason}"));
    }
    Err(CliError::Failed(format!(
        "{} refused, for the reasons above; nothing of them is kept, and all others were taken",
        counted(ingested.rejected as usize, "event")
    )))
}

async fn import(place: &Place, arguments: &IngestArguments, output: &Output) -> Result<(), CliError> {
    let name = &arguments.source;
    let stream = || CliError::Usage(format!("`{name}` is a stream: name the files whose rows are to be pushed to it"));
    let bar = output.progress(None, "rows");
    bar.set_message(format!("{name}:"));
    let imported = match Server::if_running(place, &arguments.server, output).await? {
        Some(server) => {
            if server.source(name).await?.kind == "stream" {
                return Err(stream());
            }
            let request = ImportFilesRequest { project: server.project.clone(), source: name.clone() };
            let answers = server.ingest().import_files(request).await.map_err(|status| server.failed(status))?;
            let done = compact::follow(&server, answers.into_inner(), &bar).await?.pop().unwrap_or_default();
            let TableDone { source, changed, files_after, bytes_after, rows, buckets, seconds, .. } = done;
            Imported { source, changed, rows, files: files_after, bytes: bytes_after, buckets, seconds }
        }
        None => {
            let Here { plan, store, project, work } = Here::open(place, output).await?;
            let source = plan.source(name);
            let known = || plan.sources.iter().map(|source| &*source.name);
            let source = source.ok_or_else(|| CliError::unknown("source", name, known()))?;
            if source.is_stream() {
                return Err(stream());
            }
            let failed = |error| CliError::ManagedTable(Box::new(error));
            let sources = Sources::new(&place.folder).map_err(|error| failed(error.into()))?;
            let tell = |rows| bar.inc(rows);
            let done = import_source(&store, &project, &plan, source, &sources, &work, times::now(), &tell).await;
            let FilesImported { source, changed, rows, files, bytes, buckets, seconds } = done.map_err(failed)?;
            Imported { source, changed, rows, files: files as u64, bytes, buckets, seconds }
        }
    };
    bar.finish_and_clear();
    let Imported { source, changed, rows, files, buckets, seconds, .. } = &imported;
    output.line(if *changed {
        let rate = (*rows as f64 / seconds.max(1e-6)).round();
        format!("{source}: {rows} rows imported in {seconds:.1} s ({rate}/s), {files} files in {buckets} buckets")
    } else {
        format!("{source}: its files have not changed since they were imported, {rows} rows")
    });
    output.json(&imported);
    Ok(())
}

/// Turns files into messages until they end or nobody wants more.
fn read(
    opened: Vec<Table>,
    types: &BTreeMap<String, Type>,
    template: &PushRequest,
    sender: &mpsc::Sender<PushRequest>,
    // As long as messages are under way, which flow control bounds.
    sizes: &mpsc::UnboundedSender<u64>,
) -> Result<(), CliError> {
    for table in opened {
        for batch in table {
            let batch = batch?;
            let schema = batch.schema();
            let declared = schema.fields().iter().zip(batch.columns()).filter_map(|(field, column)| {
                let column_type = types.get(field.name())?;
                Some(encode_array(field.name(), column.as_ref(), column_type))
            });
            let message = PushRequest { rows: declared.collect(), ..template.clone() };
            if sizes.send(batch.num_rows() as u64).is_err() || sender.blocking_send(message).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn push(
    server: &Server,
    messages: mpsc::Receiver<PushRequest>,
    mut sizes: mpsc::UnboundedReceiver<u64>,
    bar: &ProgressBar,
) -> Result<Ingested, CliError> {
    let answer = server.ingest().push(ReceiverStream::new(messages)).await.map_err(|status| server.failed(status))?;
    let mut answers = answer.into_inner();
    let mut sum = Ingested::default();
    let mut rows_before = 0;
    while let Some(answer) = answers.message().await.map_err(|status| server.failed(status))? {
        let PushResponse { accepted, duplicates, early, rejected, last_sequence } = answer;
        sum.accepted += u64::from(accepted);
        sum.duplicates += u64::from(duplicates);
        sum.early += u64::from(early);
        sum.rejected += rejected.len() as u64;
        sum.last_sequence = sum.last_sequence.max(last_sequence);
        let room = REJECTED_SHOWN.saturating_sub(sum.reasons.len());
        let reason = |Rejected { row, reason }| Reason { row: rows_before + u64::from(row), reason };
        sum.reasons.extend(rejected.into_iter().take(room).map(reason));
        // Answers come in the order of the messages.
        let rows = sizes.recv().await.unwrap_or(0);
        rows_before += rows;
        bar.inc(rows);
    }
    Ok(sum)
}
