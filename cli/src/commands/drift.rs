//! `coeval drift`: whether what is served looks like what was trained on.
//!
//! Of a model the server is asked, because what was counted is judged by the profile of each version. Two datasets are
//! compared here, from the store itself, whether a server runs or not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use drift::verdict::Policy;
use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR, MINUTE};
use object_store::path::Path;
use offline_store::dataset::{self, DatasetError, StoredDataset};
use offline_store::profile::{FeatureProfile, Histogram, Pair, Profiles, count, histograms, judged};
use proto::v1::GetDriftRequest;
use registry::store::open_store;
use serde_json::{Value as Json, json};

use crate::error::{CliError, counted};
use crate::histogram::{self, Legend};
use crate::output::Output;
use crate::project::Place;
use crate::server::{Server, ServerArguments, ServerError};
use crate::times;

#[derive(Debug, clap::Subcommand)]
pub enum DriftCommand {
    /// The verdict on every feature and output, with its reasons
    Show {
        #[command(flatten)]
        of: OfArguments,
        /// End with status 1 where anything drifted
        #[arg(long)]
        check: bool,
        /// Only these features; may be repeated
        #[arg(long = "feature", value_name = "NAME")]
        features: Vec<String>,
    },
    /// Both distributions of a feature, one laid over the other
    Plot {
        #[command(flatten)]
        of: OfArguments,
        /// The feature or output; may be repeated
        #[arg(long = "feature", value_name = "NAME", required = true)]
        features: Vec<String>,
        /// Draw it into this file
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
pub struct OfArguments {
    /// The model that was served
    #[arg(long, value_name = "NAME", required_unless_present = "dataset", conflicts_with = "dataset")]
    model: Option<String>,
    /// Its version; without it, the champion
    #[arg(long, value_name = "N", requires = "model")]
    version: Option<u32>,
    /// Why the version was asked, as in the outcomes of predictions; without it, `champion`
    #[arg(long, value_name = "ARM", requires = "model")]
    arm: Option<String>,
    /// The last so many hours, as `24h` or `7d`
    #[arg(long, value_name = "LENGTH", default_value = "24h", conflicts_with_all = ["from", "to"])]
    window: String,
    /// From when on; whole hours are judged
    #[arg(long, value_name = "TIME", requires = "model")]
    from: Option<String>,
    /// Until when; without it, now
    #[arg(long, value_name = "TIME", requires = "from")]
    to: Option<String>,
    /// A kept training set that is judged in place of what was served: its id, or its name: then the newest
    #[arg(long, value_name = "DATASET", requires = "against")]
    dataset: Option<String>,
    /// The training set that it is held against
    #[arg(long, value_name = "DATASET", requires = "dataset")]
    against: Option<String>,
    #[command(flatten)]
    server: ServerArguments,
}

/// What is shown, from wherever it came.
struct Found {
    json: Json,
    legend: Legend,
}

pub async fn run(place: &Place, command: &DriftCommand, output: &Output) -> Result<(), CliError> {
    match command {
        DriftCommand::Show { of, check, features } => {
            let found = find(place, of, features, Histograms::No, output).await?;
            show(&found.json, output);
            output.json(&found.json);
            let drifted = drifted(&found.json);
            if *check && !drifted.is_empty() {
                let names = drifted.join(", ");
                return Err(CliError::Failed(format!("{} drifted: {names}", counted(drifted.len(), "feature"))));
            }
            Ok(())
        }
        DriftCommand::Plot { of, features, svg } => {
            let found = find(place, of, features, Histograms::Yes, output).await?;
            let drawn: Vec<Histogram> = serde_json::from_value(found.json["histograms"].clone()).map_err(|error| {
                CliError::Failed(format!(
                    "the histograms cannot be read: {error}; use a `coeval` of the server's version"
                ))
            })?;
            if drawn.is_empty() {
                return Err(CliError::Failed(format!(
                    "there is nothing to draw of {}: only whether there is a value is counted of lists, maps and structs",
                    features.join(", ")
                )));
            }
            for histogram in &drawn {
                histogram::lines(histogram, &found.legend).iter().for_each(|line| output.line(line));
            }
            if let Some(path) = svg {
                std::fs::write(path, histogram::svg(&drawn, &found.legend))
                    .map_err(|source| CliError::Io { what: format!("could not write {}", path.display()), source })?;
                output.note(format!("drawn into {}", path.display()));
            }
            output.json(&found.json);
            Ok(())
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Histograms {
    Yes,
    No,
}

async fn find(
    place: &Place,
    of: &OfArguments,
    features: &[String],
    with: Histograms,
    output: &Output,
) -> Result<Found, CliError> {
    match (&of.dataset, &of.against) {
        (Some(dataset), Some(against)) => datasets(place, dataset, against, features, with, output).await,
        _ => served(place, of, features, with, output).await,
    }
}

/// Asks the server about a model.
async fn served(
    place: &Place,
    of: &OfArguments,
    features: &[String],
    with: Histograms,
    output: &Output,
) -> Result<Found, CliError> {
    let now = times::now();
    let (from, to) = match (&of.from, &of.to) {
        (Some(from), to) => (times::parse(from, now)?, to.as_ref().map_or(Ok(now), |to| times::parse(to, now))?),
        _ => (now.saturating_sub(length(&of.window)?), now),
    };
    if from >= to {
        return Err(CliError::Usage(format!(
            "the window ends at {} and begins at {}",
            times::show(to),
            times::show(from)
        )));
    }
    let server = Server::of(place, &of.server, output).await?;
    let request = GetDriftRequest {
        project: server.project.clone(),
        model: of.model.clone().unwrap_or_default(),
        version: of.version.unwrap_or(0),
        arm: of.arm.clone().unwrap_or_default(),
        from,
        to,
        features: features.to_vec(),
        histograms: with == Histograms::Yes,
    };
    let answer = server.control().get_drift(request).await.map_err(|status| server.failed(status))?.into_inner();
    let json: Json = serde_json::from_str(&answer.report).map_err(|error| {
        let message = format!("the report cannot be read: {error}");
        ServerError::Refused { address: server.address.clone(), code: "data loss", message }
    })?;
    Ok(Found { json, legend: Legend { reference: "training".to_owned(), share: "serving".to_owned() } })
}

/// Holds one dataset against another.
async fn datasets(
    place: &Place,
    name: &str,
    against: &str,
    features: &[String],
    with: Histograms,
    output: &Output,
) -> Result<Found, CliError> {
    let settings = place.settings(output)?;
    let boxed = |error: DatasetError| CliError::Dataset(Box::new(error));
    if place.store_is_absent(&settings) {
        return Err(CliError::unknown("dataset", name, []));
    }
    let (store, prefix) = open_store(&place.resolve(&settings.store))?;
    let project: Path = prefix.join(settings.project.as_str());
    let reference_path = super::explain::dataset_path(&store, &project, against).await?;
    let path = super::explain::dataset_path(&store, &project, name).await?;
    let manifest = dataset::open(&store, &reference_path).await.map_err(boxed)?;
    let profiles = dataset::profiles(&store, &reference_path, &manifest).await.map_err(boxed)?;
    let Some(profiles) = profiles else {
        return Err(CliError::Failed(format!(
            "dataset `{against}` has no profile: it was made by a version that made none; create it again under another name"
        )));
    };
    let profiles = only(profiles, features)?;
    let stored = Arc::new(StoredDataset::open(store.clone(), &path).await.map_err(boxed)?);
    let counted = count(&stored, &profiles).await.map_err(boxed)?;
    let pairs: Vec<Pair<'_>> = profiles.features.iter().zip(counted.counts.iter().map(Option::as_ref)).collect();
    let (report, left_out) = judged(&Policy::default(), &pairs, &BTreeMap::new())
        .map_err(|error| CliError::Failed(format!("the datasets cannot be compared: {error}")))?;
    let mut notes = Vec::new();
    if !left_out.is_empty() {
        notes.push(format!(
            "not compared, because `{name}` does not have them with their type and blocks: {}",
            left_out.join(", ")
        ));
    }
    let drawn: Vec<Histogram> = match with {
        Histograms::Yes => {
            let both = |(feature, counts): &(&FeatureProfile, Option<&drift::counts::Counts>)| {
                counts.map(|counts| histograms(feature, counts)).unwrap_or_default()
            };
            pairs.iter().flat_map(both).collect()
        }
        Histograms::No => Vec::new(),
    };
    let json = json!({
        "of": format!("dataset {name}"),
        "against": format!("dataset {against}"),
        "rows": counted.rows,
        "verdict": report.verdict,
        "notes": notes,
        "report": report,
        "histograms": drawn,
    });
    Ok(Found { json, legend: Legend { reference: against.to_owned(), share: name.to_owned() } })
}

fn only(mut profiles: Profiles, features: &[String]) -> Result<Profiles, CliError> {
    if let Some(unknown) = features.iter().find(|name| profiles.feature(name).is_none()) {
        let known = profiles.features.iter().map(|feature| feature.name.as_str());
        return Err(CliError::unknown("feature", unknown, known));
    }
    profiles.features.retain(|feature| features.is_empty() || features.contains(&feature.name));
    Ok(profiles)
}

/// A length of time on the command line.
fn length(text: &str) -> Result<Micros, CliError> {
    let units = [("d", DAY), ("h", HOUR), ("m", MINUTE)];
    let parsed = units.iter().find_map(|(unit, micros)| {
        let count: i64 = text.trim().strip_suffix(unit)?.trim().parse().ok()?;
        count.checked_mul(*micros).filter(|length| *length > 0)
    });
    parsed.ok_or_else(|| CliError::Usage(format!("`{text}` is no length of time; write `24h`, `7d` or `90m`")))
}

fn texts(value: &Json) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Json::as_str).collect()
}

fn features(json: &Json) -> impl Iterator<Item = &Json> {
    json["report"]["features"].as_array().into_iter().flatten()
}

fn drifted(json: &Json) -> Vec<&str> {
    features(json)
        .filter(|feature| feature["verdict"] == "DRIFT")
        .filter_map(|feature| feature["name"].as_str())
        .collect()
}

fn show(json: &Json, output: &Output) {
    let text = |name: &str| json[name].as_str().unwrap_or_default();
    output.line(format!("{} against {}: {}", text("of"), text("against"), text("verdict")));
    let report = &json["report"];
    let tests = report["tests"].as_u64().unwrap_or(0);
    let alpha = report["alpha"].as_f64().unwrap_or(0.0);
    let rows = json["rows"].as_u64().unwrap_or(0);
    output.line(format!("  {rows} rows, {tests} tests, a false alarm in at most {}", share(alpha)));
    if let (Some(from), Some(to)) = (json["from"].as_str(), json["to"].as_str()) {
        output.line(format!("  from {from} to {to}"));
    }
    texts(&json["notes"]).iter().for_each(|note| output.line(format!("  note: {note}")));
    let rate = |feature: &Json, name: &str| {
        let rates = feature["rates"].as_array().into_iter().flatten();
        let rate = rates.filter(|rate| rate["rate"] == name).find_map(|rate| rate["serving"].as_f64());
        rate.map_or_else(|| "-".to_owned(), share)
    };
    let rows: Vec<Vec<String>> = features(json)
        .map(|feature| {
            let worst = worst(feature);
            let metric = |name: &str| worst.and_then(|gate| gate[name].as_f64()).map_or_else(|| "-".into(), number);
            let distance = &feature["distances"][0];
            let mean = |name: &str| distance[name].as_f64().map_or_else(|| "-".into(), number);
            vec![
                feature["name"].as_str().unwrap_or_default().to_owned(),
                feature["verdict"].as_str().unwrap_or_default().to_owned(),
                feature["rows"].as_u64().unwrap_or(0).to_string(),
                rate(feature, "null"),
                rate(feature, "defaulted"),
                rate(feature, "unseen"),
                rate(feature, "stale"),
                rate(feature, "fallback"),
                metric("value"),
                metric("floor"),
                mean("reference_mean"),
                mean("mean"),
            ]
        })
        .collect();
    let headings = [
        "FEATURE",
        "VERDICT",
        "ROWS",
        "NULL",
        "DEFAULT",
        "UNSEEN",
        "STALE",
        "FALLBACK",
        "PSI",
        "FLOOR",
        "MEAN THEN",
        "MEAN NOW",
    ];
    output.table(&headings, &rows);
    for verdict in ["DRIFT", "INSUFFICIENT_DATA"] {
        for feature in features(json).filter(|feature| feature["verdict"] == verdict) {
            let name = feature["name"].as_str().unwrap_or_default();
            let accepted = ["*", name].iter().find_map(|of| json["acknowledged"][*of]["who"].as_str());
            let accepted = accepted.map_or_else(String::new, |who| format!(", acknowledged by {who}"));
            output.line(format!("{name}: {verdict}{accepted}"));
            texts(&feature["reasons"]).iter().for_each(|reason| output.line(format!("  {reason}")));
        }
    }
    let weighted = &report["weighted"];
    if let (Some(effect), Some(on)) = (weighted["effect"].as_f64(), weighted["drifted"].as_f64()) {
        output.line(format!("by importance: effect {}, {} of it on features that drifted", number(effect), share(on)));
    }
    if !drifted(json).is_empty() {
        output.line(
            "drift is a difference, not a fault: seasons, new customers and new products drift. Whether values are computed \
             as in training is what `coeval audit consistency` says",
        );
    }
}

/// The deciding distance; of a vector, the largest of its numbers'.
fn worst(feature: &Json) -> Option<&Json> {
    let distances = feature["distances"].as_array()?.iter();
    let gates = distances
        .filter_map(|distance| distance["metrics"].as_array()?.iter().find(|metric| metric["is_gate"] == true));
    gates.max_by(|a, b| {
        let effect = |gate: &Json| gate["effect"].as_f64().unwrap_or(0.0);
        effect(a).total_cmp(&effect(b))
    })
}

fn share(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

fn number(x: f64) -> String {
    let rounded: f64 = format!("{x:.3e}").parse().unwrap_or(x);
    if rounded == 0.0 || (1e-3..1e7).contains(&rounded.abs()) { rounded.to_string() } else { format!("{rounded:e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        for (text, expected) in [("24h", Some(24 * HOUR)), ("7d", Some(7 * DAY)), (" 90m", Some(90 * MINUTE))] {
            assert_eq!(length(text).ok(), expected, "{text}");
        }
        for text in ["", "h", "0h", "-1d", "24", "1w", "99999999999999d"] {
            assert!(length(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.123_456, 12_345_678.9, 1e-9, -3.5].map(number), ["0", "0.1235", "1.235e7", "1e-9", "-3.5"]);
    }
}
