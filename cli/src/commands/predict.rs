//! `coeval predict`: what a model says about rows.

use proto::v1::{ListModelsRequest, NamedType, PredictRequest, RowStatus};
use serde_json::{Map, Value as Json, json};

use crate::columns::{cell, decode};
use crate::commands::features::{Ask, decode_all, object, show};
use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;
use crate::rows;
use crate::server::{Server, ServerArguments};
use crate::times;

#[derive(Debug, clap::Args)]
pub struct PredictArguments {
    /// The model
    model: String,
    #[command(flatten)]
    ask: Ask,
    /// An active version; without it, the champion, which the traffic goes to
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    version: u32,
    /// One of the tiers that the model declares; without it, the first
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    tier: String,
    /// Show the feature values that the model was given
    #[arg(long)]
    features: bool,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(place: &Place, arguments: &PredictArguments, output: &Output) -> Result<(), CliError> {
    let server = Server::of(place, &arguments.server, output).await?;
    let list = ListModelsRequest { project: server.project.clone() };
    let models = server.control().list_models(list).await.map_err(|status| server.failed(status))?.into_inner().models;
    let Some(newest) = models.iter().filter(|model| model.name == arguments.model).max_by_key(|model| model.version)
    else {
        let mut known: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        known.dedup();
        return Err(CliError::unknown("registered model", &arguments.model, known));
    };
    let mut service = server.service(&newest.service).await?;
    let ask = &arguments.ask;
    // The unit of a canary may be named beside what the service takes.
    let is_named = |column: &NamedType| ask.rows.iter().any(|row| row.contains(&format!("{}=", column.name)));
    service.inputs.extend(std::mem::take(&mut service.units).into_iter().filter(is_named));
    let request = PredictRequest {
        project: server.project.clone(),
        model: arguments.model.clone(),
        rows: rows::to_columns(&server, &service, &ask.rows)?,
        at: rows::times(ask.at.as_deref(), ask.rows.len())?,
        deadline_ms: ask.deadline_ms,
        include_features: arguments.features,
        version: arguments.version,
        tier: arguments.tier.clone(),
        ..PredictRequest::default()
    };
    let answer = server.gateway().predict(request).await.map_err(|status| server.failed(status))?.into_inner();
    let rows = answer.outcomes.len();
    let outputs: Vec<Vec<Json>> = answer.outputs.iter().map(|column| decode(column, rows)).collect::<Result<_, _>>()?;
    let features = decode_all(&answer.features, rows)?;
    let at = |row: usize| answer.at.get(row).map(|at| times::show(*at)).unwrap_or_default();
    let status = |row: usize| RowStatus::try_from(answer.outcomes[row].status).unwrap_or(RowStatus::Unspecified);
    let mut failed = 0;
    for (row, outcome) in answer.outcomes.iter().enumerate() {
        failed += usize::from(status(row) == RowStatus::Failed);
        let values: Vec<String> = answer
            .outputs
            .iter()
            .zip(&outputs)
            .map(|(column, values)| format!("{} {}", column.name, cell(&values[row])))
            .collect();
        let mut line = format!("row {}: {}", row + 1, values.join(", "));
        line.push_str(&format!("  ({}, version {}, at {})", status(row).as_str_name(), outcome.version, at(row)));
        if !outcome.reason.is_empty() {
            line.push_str(&format!(": {}", outcome.reason));
        }
        if outcome.cached {
            line.push_str("; it had answered these inputs before");
        }
        if output.verbosity() > 0
            && let Some(waits) = &outcome.waits
        {
            line.push_str(&format!(
                "; waited {} µs: executor busy {}, linger {}, memory permit {}, tier {}",
                outcome.wait_us, waits.executor_busy_us, waits.linger_us, waits.memory_permit_us, waits.tier_us
            ));
        }
        output.line(line);
        show(&answer.features, &features, row, output);
    }
    if output.verbosity() > 0
        && let Some(timings) = &answer.timings
    {
        output.note(format!(
            "features {} µs, transforms {} µs, queue {} µs, forward {} µs, total {} µs",
            timings.features_us, timings.transforms_us, timings.queue_us, timings.forward_us, timings.total_us
        ));
    }
    if output.is_json() {
        let row = |row: usize| {
            let outcome = &answer.outcomes[row];
            let named =
                answer.outputs.iter().zip(&outputs).map(|(column, values)| (column.name.clone(), values[row].clone()));
            json!({
                "at": at(row),
                "outputs": Json::Object(named.collect::<Map<String, Json>>()),
                "status": status(row).as_str_name(),
                "version": outcome.version,
                "arm": outcome.arm,
                "reason": outcome.reason,
                "wait_reason": outcome.wait_reason().as_str_name(),
                "wait_us": outcome.wait_us,
                "features": object(&answer.features, &features, row),
            })
        };
        let rows: Vec<Json> = (0..rows).map(row).collect();
        output.json(
            &json!({"model": arguments.model, "request_id": answer.request_id, "stale": answer.stale, "rows": rows}),
        );
    }
    if failed > 0 {
        return Err(CliError::Failed(format!("{failed} of {rows} rows have no prediction")));
    }
    Ok(())
}
