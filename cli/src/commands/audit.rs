//! `coeval audit consistency`: what was served, against the same rows replayed offline.
//!
//! The replay needs the object store alone. A server that runs is asked first to write down the events that only its log
//! has, so that nothing which was served is beyond what history holds.

use std::sync::Arc;

use feature_defs::window::DAY;
use offline_store::audit::{AuditError, AuditOptions, AuditRequest, audit};
use offline_store::{Engine, EngineOptions};
use proto::v1::FlushRequest;
use registry::store::open_store;

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Checked, Place, Project};
use crate::server::{Server, ServerArguments};
use crate::times;

#[derive(Debug, clap::Subcommand)]
pub enum AuditCommand {
    /// Replay what was served and compare every bit; fails where more values differ than may
    Consistency(ConsistencyArguments),
}

#[derive(Debug, clap::Args)]
pub struct ConsistencyArguments {
    /// The feature service
    #[arg(long, value_name = "NAME")]
    service: String,
    /// The first time that was asked about; a day before `--to` without it
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// The time before which to end
    #[arg(long, value_name = "TIME", default_value = "now")]
    to: String,
    /// Audit about so many rows, chosen evenly; all of them without it
    #[arg(long, value_name = "ROWS")]
    sample_rows: Option<u64>,
    /// The share of values that may differ before the audit fails
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    max_bug_rate: f64,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(place: &Place, command: &AuditCommand, output: &Output) -> Result<(), CliError> {
    match command {
        AuditCommand::Consistency(arguments) => consistency(place, arguments, output).await,
    }
}

async fn consistency(place: &Place, arguments: &ConsistencyArguments, output: &Output) -> Result<(), CliError> {
    let now = times::now();
    let to = times::parse(&arguments.to, now)?;
    let from = match &arguments.from {
        Some(from) => times::parse(from, now)?,
        None => to.saturating_sub(DAY),
    };
    if from >= to {
        let text = format!("`--from {}` is not before `--to {}`", times::show(from), times::show(to));
        return Err(CliError::Usage(text));
    }
    if !(0.0..=1.0).contains(&arguments.max_bug_rate) {
        let text = format!("`--max-bug-rate {}` is no share; write a number from 0 to 1", arguments.max_bug_rate);
        return Err(CliError::Usage(text));
    }
    let Checked { settings, plan, .. } = Project::read(place)?.checked(output).await?;
    place.forget_listed(&settings, &plan).await?;
    let plan = Arc::new(plan);
    let known = || plan.services.iter().map(|service| &*service.name);
    let service = plan
        .service(&arguments.service)
        .ok_or_else(|| CliError::unknown("feature service", &arguments.service, known()))?;
    if place.store_is_absent(&settings) {
        // Looking does not create it.
        return Err(CliError::Failed(format!(
            "there is no store at `{}`, so nothing was logged; run the server first",
            settings.store.value
        )));
    }
    if let Some(server) = Server::if_running(place, &arguments.server, output).await? {
        let request = FlushRequest { project: server.project.clone() };
        server.ingest().flush(request).await.map_err(|status| server.failed(status))?;
    }
    let (store, prefix) = open_store(&place.resolve(&settings.store))?;
    let engine = Engine::new(EngineOptions {
        project_folder: place.folder.clone(),
        project: settings.project.value.clone(),
        store,
        prefix,
        memory_bytes: settings.offline.memory_bytes,
        spill_folder: settings.offline.spill.as_ref().map(|folder| place.folder.join(folder)),
    });
    let engine = engine.map_err(|error| failed(error.into()))?;
    let request = AuditRequest {
        service: service.clone(),
        options: AuditOptions { max_bug_rate: arguments.max_bug_rate, ..AuditOptions::new(from, to) },
        sample_rows: arguments.sample_rows,
    };
    let bar = output.progress(None, "rows");
    let report = audit(&engine, &plan, &request, None, &|rows| bar.set_position(rows)).await.map_err(failed);
    bar.finish_and_clear();
    let report = report?;
    report.lines().iter().for_each(|line| output.line(line));
    output.json(&report);
    if report.failed() {
        // What is wrong has been said.
        return Err(CliError::Failed(format!("the audit of service `{}` did not pass", report.service)));
    }
    Ok(())
}

fn failed(error: AuditError) -> CliError {
    CliError::Audit(Box::new(error))
}
