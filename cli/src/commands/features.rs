//! `coeval features get`: features as the server answers them now.

use proto::v1::get_features_request::What;
use proto::v1::{FeatureColumn, FieldStatus, GetFeaturesRequest, UnavailableReason};
use serde_json::{Map, Value as Json, json};

use crate::columns::{ColumnError, cell, decode};
use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;
use crate::rows;
use crate::server::{Server, ServerArguments};
use crate::times;

#[derive(Debug, clap::Subcommand)]
pub enum FeaturesCommand {
    /// The features of a service for rows of keys and request fields
    Get(GetArguments),
}

#[derive(Debug, clap::Args)]
pub struct GetArguments {
    /// The feature service
    service: String,
    #[command(flatten)]
    pub ask: Ask,
    #[command(flatten)]
    server: ServerArguments,
}

/// What is asked for.
#[derive(Debug, clap::Args)]
pub struct Ask {
    /// One row, as `key=value,field=value`; may be repeated. `null` is null, quotes keep commas
    #[arg(long = "row", value_name = "K=V,...", required = true)]
    pub rows: Vec<String>,
    /// The time to answer at, where the server allows that; without it, now
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// Milliseconds after which what is missing is UNAVAILABLE; 0 is the server's default
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub deadline_ms: u32,
}

pub async fn run(place: &Place, command: &FeaturesCommand, output: &Output) -> Result<(), CliError> {
    let FeaturesCommand::Get(arguments) = command;
    let server = Server::of(place, &arguments.server, output).await?;
    let service = server.service(&arguments.service).await?;
    let ask = &arguments.ask;
    let request = GetFeaturesRequest {
        project: server.project.clone(),
        what: Some(What::Service(service.name.clone())),
        rows: rows::to_columns(&server, &service, &ask.rows)?,
        at: rows::times(ask.at.as_deref(), ask.rows.len())?,
        include_provenance: false,
        deadline_ms: ask.deadline_ms,
    };
    let answer = server.gateway().get_features(request).await.map_err(|status| server.failed(status))?.into_inner();
    let rows = answer.rows as usize;
    let values = decode_all(&answer.features, rows)?;
    let at = |row: usize| answer.at.get(row).map(|at| times::show(*at)).unwrap_or_default();
    for row in 0..rows {
        output.line(format!("row {}, at {}", row + 1, at(row)));
        show(&answer.features, &values, row, output);
    }
    if answer.stale {
        output.note("note: a value is older than its view's declared freshness");
    }
    if output.is_json() {
        let rows: Vec<Json> =
            (0..rows).map(|row| json!({"at": at(row), "features": object(&answer.features, &values, row)})).collect();
        output.json(&json!({
            "service": service.name,
            "semantic_digest": answer.semantic_digest,
            "stale": answer.stale,
            "rows": rows,
        }));
    }
    Ok(())
}

/// The values of each feature, row by row.
pub fn decode_all(features: &[FeatureColumn], rows: usize) -> Result<Vec<Vec<Json>>, ColumnError> {
    let none = || vec![Json::Null; rows];
    features
        .iter()
        .map(|feature| feature.values.as_ref().map_or_else(|| Ok(none()), |values| decode(values, rows)))
        .collect()
}

/// The features of one row, one to a line.
pub fn show(features: &[FeatureColumn], values: &[Vec<Json>], row: usize, output: &Output) {
    let width = features.iter().map(|feature| feature.name.chars().count()).max().unwrap_or(0);
    for (feature, values) in features.iter().zip(values) {
        let status = status(feature, row);
        let said = if status == "PRESENT" { String::new() } else { format!("  {status}") };
        output.line(format!("  {:<width$}  {}{said}", feature.name, cell(&values[row])));
    }
}

/// The features of one row: name -> value and status.
pub fn object(features: &[FeatureColumn], values: &[Vec<Json>], row: usize) -> Json {
    let named = features
        .iter()
        .zip(values)
        .map(|(feature, values)| (feature.name.clone(), json!({"value": values[row], "status": status(feature, row)})));
    Json::Object(named.collect::<Map<String, Json>>())
}

fn status(feature: &FeatureColumn, row: usize) -> String {
    let status = feature.statuses.get(row).and_then(|status| FieldStatus::try_from(*status).ok());
    let status = status.unwrap_or(FieldStatus::Unspecified);
    let reason = feature.reasons.get(row).and_then(|reason| UnavailableReason::try_from(*reason).ok());
    match reason {
        Some(reason) if status == FieldStatus::Unavailable => {
            format!("{} ({})", status.as_str_name(), reason.as_str_name().to_lowercase())
        }
        _ => status.as_str_name().to_owned(),
    }
}
