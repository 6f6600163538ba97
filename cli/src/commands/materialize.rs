//! `coeval materialize`: rows of file sources that are known by a time become visible online.
//!
//! A server does it. What was done is on the object store and can be listed without one.

use std::collections::BTreeMap;

use ingest::runs::{By, Outcome, Run, RunLog};
use proto::v1::{MaterializeProgress, MaterializeRequest};
use registry::store::open_store;
use serde::Serialize;

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Checked, Place, Project};
use crate::server::{Server, ServerArguments, ServerError};
use crate::times;

/// Runs listed of each source.
const LISTED_MAX: usize = 20;

#[derive(Debug, clap::Args)]
pub struct MaterializeArguments {
    /// Rows known by this time become visible: `2024-03-10T12:00:00Z`, `2024-03-10` or `now`
    #[arg(long, value_name = "TIME", required_unless_present = "list")]
    through: Option<String>,
    /// Only this file source; may be repeated
    #[arg(long = "source", value_name = "NAME")]
    sources: Vec<String>,
    /// Read, compare with the online store and count, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Show the newest runs instead: when, through which time, and what came of them
    #[arg(long, conflicts_with_all = ["through", "dry_run"])]
    list: bool,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Clone, Serialize)]
struct Materialized {
    source: String,
    view: String,
    rows_read: u64,
    /// Became visible.
    rows_new: u64,
    /// Of those, taken by the store (or that would be).
    rows_applied: u64,
    /// Of those, that the store had already, or something later.
    rows_stale: u64,
    /// Written, or that would change.
    entities: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

#[derive(Debug, Serialize)]
struct Report {
    through: String,
    dry_run: bool,
    views: Vec<Materialized>,
}

pub async fn run(place: &Place, arguments: &MaterializeArguments, output: &Output) -> Result<(), CliError> {
    let Some(through) = &arguments.through else { return list(place, arguments, output).await };
    let through = times::parse(through, times::now())?;
    let server = Server::of(place, &arguments.server, output).await?;
    let request = MaterializeRequest {
        project: server.project.clone(),
        sources: arguments.sources.clone(),
        through,
        dry_run: arguments.dry_run,
    };
    let mut answers = server.ingest().materialize(request).await.map_err(|status| server.failed(status))?.into_inner();
    let mut bar = output.progress(None, "rows");
    let mut of_bar = String::new();
    // Each message is the sum so far of its source and view.
    let mut views: BTreeMap<(String, String), Materialized> = BTreeMap::new();
    let mut done = false;
    while let Some(progress) = answers.message().await.map_err(|status| server.failed(status))? {
        done |= progress.done;
        let MaterializeProgress { source, view, rows_read, rows_applied, rows_stale, rows_new, .. } = progress;
        let MaterializeProgress { rows_total, entities, seconds, message, .. } = progress;
        if source.is_empty() {
            continue;
        }
        if source != of_bar {
            bar.finish_and_clear();
            bar = output.progress(rows_total, "rows");
            bar.set_message(format!("{source}:"));
            of_bar.clone_from(&source);
        }
        // More passes than one read more rows than there are.
        bar.set_position(rows_total.map_or(rows_read, |total| rows_read.min(total)));
        let key = (source.clone(), view.clone());
        let of_view =
            Materialized { source, view, rows_read, rows_new, rows_applied, rows_stale, entities, seconds, message };
        views.insert(key, of_view);
    }
    bar.finish_and_clear();
    if !done {
        return Err(ServerError::Cut { address: server.address }.into());
    }
    let views: Vec<Materialized> = views.into_values().collect();
    let (filled, skipped): (Vec<&Materialized>, Vec<&Materialized>) =
        views.iter().partition(|view| !view.view.is_empty());
    let rows: Vec<Vec<String>> = filled
        .iter()
        .map(|view| {
            let counts = [view.rows_read, view.rows_new, view.rows_applied, view.rows_stale, view.entities];
            let rate = format!("{:.0}", view.rows_read as f64 / view.seconds.max(1e-6));
            let names = [view.source.clone(), view.view.clone()].into_iter();
            names.chain(counts.map(|count| count.to_string())).chain([rate]).collect()
        })
        .collect();
    if !rows.is_empty() {
        let (applied, stale, entities) =
            if arguments.dry_run { ("WOULD APPLY", "THERE", "WOULD CHANGE") } else { ("APPLIED", "STALE", "ENTITIES") };
        output.table(&["SOURCE", "VIEW", "READ", "NEW", applied, stale, entities, "ROWS/S"], &rows);
    }
    for Materialized { source, message, .. } in &skipped {
        output.line(format!("{source}: {message}"));
    }
    let mut noted: Vec<&str> =
        filled.iter().map(|view| view.message.as_str()).filter(|text| !text.is_empty()).collect();
    noted.dedup();
    noted.iter().for_each(|note| output.line(note));
    let verb = if arguments.dry_run { "would be visible" } else { "visible" };
    output.line(format!("{verb} through {}", times::show(through)));
    output.json(&Report { through: times::show(through), dry_run: arguments.dry_run, views });
    Ok(())
}

/// What was written down of earlier runs, newest first.
async fn list(place: &Place, arguments: &MaterializeArguments, output: &Output) -> Result<(), CliError> {
    let Checked { settings, plan, .. } = Project::read(place)?.checked(output).await?;
    let (store, root) = open_store(&place.resolve(&settings.store))?;
    let log = RunLog::new(store, root.join(settings.project.as_str()));
    let files = || plan.sources.iter().filter(|source| !source.is_stream()).map(|source| &*source.name);
    if let Some(name) = arguments.sources.iter().find(|name| !files().any(|source| source == name.as_str())) {
        return Err(CliError::unknown("source of files", name, files()));
    }
    let mut runs: Vec<Run> = Vec::new();
    for source in files().filter(|name| arguments.sources.is_empty() || arguments.sources.iter().any(|n| n == name)) {
        runs.extend(log.newest(source, LISTED_MAX).await.map_err(|error| CliError::Runs(Box::new(error)))?);
    }
    let rows: Vec<Vec<String>> = runs
        .iter()
        .map(|run| {
            let by = match run.by {
                By::Request => "request",
                By::Schedule => "schedule",
                By::Recovery => "recovery",
                By::Load => "load",
            };
            let notes: Vec<&str> = run.views.iter().filter_map(|view| view.note.as_deref()).collect();
            let outcome = match &run.outcome {
                Outcome::Done if notes.is_empty() => "done".to_owned(),
                Outcome::Done => format!("done; {}", notes.join("; ")),
                Outcome::Failed { reason } => format!("failed: {reason}"),
            };
            let seconds = format!("{:.1}", run.ended.saturating_sub(run.started) as f64 / 1e6);
            let counts = [run.rows_read, run.rows_new, run.rows_applied, run.rows_stale].map(|count| count.to_string());
            [run.source.clone(), run.number.to_string(), times::show(run.started), seconds, by.to_owned()]
                .into_iter()
                .chain([times::show(run.through)])
                .chain(counts)
                .chain([outcome])
                .collect()
        })
        .collect();
    if rows.is_empty() {
        output.line("nothing was materialized yet");
    } else {
        let head =
            ["SOURCE", "RUN", "STARTED", "SECONDS", "BY", "THROUGH", "READ", "NEW", "APPLIED", "STALE", "OUTCOME"];
        output.table(&head, &rows);
    }
    output.json(&runs);
    Ok(())
}
