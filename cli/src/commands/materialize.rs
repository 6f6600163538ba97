//! `coeval materialize`: rows of file sources that are known by a time become visible online.

use std::collections::BTreeMap;

use proto::v1::{MaterializeProgress, MaterializeRequest};
use serde::Serialize;

use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;
use crate::server::{Server, ServerArguments, ServerError};
use crate::times;

#[derive(Debug, clap::Args)]
pub struct MaterializeArguments {
    /// Rows known by this time become visible: `2024-03-10T12:00:00Z`, `2024-03-10` or `now`
    #[arg(long, value_name = "TIME")]
    through: String,
    /// Only this file source; may be repeated
    #[arg(long = "source", value_name = "NAME")]
    sources: Vec<String>,
    /// Read and count, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Clone, Serialize)]
struct Materialized {
    source: String,
    view: String,
    rows_read: u64,
    rows_applied: u64,
    /// Older than what the store held.
    rows_stale: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    through: String,
    dry_run: bool,
    views: Vec<Materialized>,
}

pub async fn run(place: &Place, arguments: &MaterializeArguments, output: &Output) -> Result<(), CliError> {
    let through = times::parse(&arguments.through, times::now())?;
    let server = Server::of(place, &arguments.server, output).await?;
    let request = MaterializeRequest {
        project: server.project.clone(),
        sources: arguments.sources.clone(),
        through,
        dry_run: arguments.dry_run,
    };
    let mut answers = server.ingest().materialize(request).await.map_err(|status| server.failed(status))?.into_inner();
    let bar = output.progress(None, "rows");
    // Each message is the sum so far of its source and view.
    let mut views: BTreeMap<(String, String), Materialized> = BTreeMap::new();
    let mut done = false;
    while let Some(progress) = answers.message().await.map_err(|status| server.failed(status))? {
        done |= progress.done;
        let MaterializeProgress { source, view, rows_read, rows_applied, rows_stale, .. } = progress;
        if source.is_empty() {
            continue;
        }
        bar.set_message(format!("{source} into {view}:"));
        let key = (source.clone(), view.clone());
        views.insert(key, Materialized { source, view, rows_read, rows_applied, rows_stale });
        bar.set_position(views.values().map(|view| view.rows_read).sum());
    }
    bar.finish_and_clear();
    if !done {
        return Err(ServerError::Cut { address: server.address }.into());
    }
    let views: Vec<Materialized> = views.into_values().collect();
    let rows: Vec<Vec<String>> = views
        .iter()
        .map(|view| {
            let counts = [view.rows_read, view.rows_applied, view.rows_stale].map(|count| count.to_string());
            [view.source.clone(), view.view.clone()].into_iter().chain(counts).collect()
        })
        .collect();
    if !rows.is_empty() {
        output.table(&["SOURCE", "VIEW", "READ", "APPLIED", "STALE"], &rows);
    }
    let verb = if arguments.dry_run { "would be visible" } else { "visible" };
    output.line(format!("{verb} through {}", times::show(through)));
    output.json(&Report { through: times::show(through), dry_run: arguments.dry_run, views });
    Ok(())
}
