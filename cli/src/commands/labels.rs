//! `coeval labels`: what became of predictions, and how good they were.
//!
//! Labels and the serving log lie on the object store, so this works whether a server runs or not.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use clap::Args;
use feature_defs::catalog::Settings;
use feature_defs::plan::ModelPlan;
use feature_defs::time::Micros;
use feature_defs::value::Type;
use object_store::ObjectStore;
use object_store::path::Path;
use offline_store::labels::report::{self, Asked, Part, Report};
use offline_store::labels::{self, LabelError, Labels};
use parquet::arrow::ArrowWriter;
use registry::store::open_store;
use serde_json::json;

use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::{Checked, Place, Project};
use crate::{tables, times};

/// Rows that are read from a file and added at once.
const BATCH_ROWS: usize = 1 << 18;
const DAY: Micros = 86_400_000_000;

#[derive(Debug, clap::Subcommand)]
pub enum LabelsCommand {
    /// Add outcomes, or another metric, to logged predictions
    Add(AddArguments),
    /// How good each version and arm was over time
    Show(ShowArguments),
    /// Write logged predictions with their labels to a Parquet file: a spine to train on
    Export(ExportArguments),
}

#[derive(Debug, Args)]
pub struct AddArguments {
    /// The model whose predictions they are of
    #[arg(long, value_name = "NAME")]
    model: String,
    /// A Parquet or CSV file: `request_id` (and `row`), or columns of the request and `time`; and the value
    file: PathBuf,
    /// The column of the value, where it is not the model's label: a metric of the business
    #[arg(long, value_name = "NAME")]
    metric: Option<String>,
}

#[derive(Debug, Args)]
pub struct ShowArguments {
    #[arg(long, value_name = "NAME")]
    model: String,
    #[command(flatten)]
    window: Window,
    /// Judge each stretch of so many days by itself
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3_650))]
    every_days: Option<u32>,
    /// Which output is the score; the first that the model declares
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
}

#[derive(Debug, Args)]
pub struct ExportArguments {
    #[arg(long, value_name = "NAME")]
    model: String,
    #[command(flatten)]
    window: Window,
    /// The Parquet file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// The times that predictions were made for.
#[derive(Debug, Args)]
struct Window {
    /// From this time on; thirty days ago unless said
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Up to, and without, this time; now unless said
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
}

impl Window {
    fn read(&self) -> Result<(Micros, Micros), CliError> {
        let now = times::now();
        let time = |text: &Option<String>, otherwise: Micros| match text {
            Some(text) => times::parse(text, now),
            None => Ok(otherwise),
        };
        let (from, to) = (time(&self.from, now - 30 * DAY)?, time(&self.to, now)?);
        if from >= to {
            let (from, to) = (times::show(from), times::show(to));
            return Err(CliError::Usage(format!("nothing lies between --from {from} and --to {to}")));
        }
        Ok((from, to))
    }
}

/// What labels are about, opened.
struct Opened {
    settings: Settings,
    model: Arc<ModelPlan>,
    store: Arc<dyn ObjectStore>,
    root: Path,
}

impl Opened {
    async fn of(place: &Place, model: &str, output: &Output) -> Result<Opened, CliError> {
        let Checked { settings, plan, .. } = Project::read(place)?.checked(output).await?;
        let known = || plan.models.iter().map(|model| &*model.name);
        let model = plan.model(model).cloned().ok_or_else(|| CliError::unknown("model", model, known()))?;
        let (store, prefix) = open_store(&place.resolve(&settings.store))?;
        let root = prefix.join(settings.project.as_str());
        Ok(Opened { settings, model, store, root })
    }
}

fn failed(error: LabelError) -> CliError {
    CliError::Labels(Box::new(error))
}

pub async fn run(place: &Place, command: &LabelsCommand, output: &Output) -> Result<(), CliError> {
    match command {
        LabelsCommand::Add(arguments) => add(place, arguments, output).await,
        LabelsCommand::Show(arguments) => show(place, arguments, output).await,
        LabelsCommand::Export(arguments) => export(place, arguments, output).await,
    }
}

async fn add(place: &Place, arguments: &AddArguments, output: &Output) -> Result<(), CliError> {
    let Opened { settings, model, store, root } = Opened::of(place, &arguments.model, output).await?;
    let metric = arguments.metric.as_deref();
    let name = labels::metric_of(&model, metric).map_err(failed)?.to_owned();
    let mut types: BTreeMap<String, Type> =
        model.service.columns.iter().map(|column| (column.name.clone(), column.column_type.clone())).collect();
    types.insert(labels::TIME.to_owned(), Type::Timestamp);
    types.insert(labels::REQUEST_ID.to_owned(), Type::String);
    let key = gateway::serving_log::hash_key(settings.serving_log.as_ref(), &store, &root).await?;
    let mut rows = 0;
    for batch in tables::open(&arguments.file, &Arc::new(types), BATCH_ROWS)? {
        let added = times::now();
        let read = Labels::of(&model, metric, &batch?, added, &key).map_err(failed)?;
        labels::add(&store, &root, &model, &read, added).await.map_err(failed)?;
        rows += read.rows();
    }
    output.line(format!("{} of `{name}` added to model `{}`", counted(rows, "value"), model.name));
    output.json(&json!({"model": &*model.name, "metric": name, "rows": rows}));
    Ok(())
}

async fn show(place: &Place, arguments: &ShowArguments, output: &Output) -> Result<(), CliError> {
    let (from, to) = arguments.window.read()?;
    let Opened { model, store, root, .. } = Opened::of(place, &arguments.model, output).await?;
    if let Some(name) = &arguments.output
        && !model.outputs.iter().any(|known| known.name == *name)
    {
        return Err(CliError::unknown("output", name, model.outputs.iter().map(|known| known.name.as_str())));
    }
    let every = arguments.every_days.map_or(Micros::MAX, |days| Micros::from(days) * DAY);
    let asked = Asked { from, to, every, output: arguments.output.clone(), now: times::now() };
    let report = report::report(&store, &root, &model, &asked).await.map_err(failed)?;
    print(&report, from, output);
    output.json(&report);
    Ok(())
}

fn print(report: &Report, from: Micros, output: &Output) {
    if report.parts.is_empty() {
        output.line(format!("nothing was logged of model `{}` in this time", report.model));
        return;
    }
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let row = |part: &Part| {
        let quality = &part.quality;
        let classes = quality.classes.as_ref();
        let mut cells = vec![
            times::show(part.from.max(from)),
            part.version.to_string(),
            part.arm.clone(),
            quality.rows.to_string(),
            quality.labelled.to_string(),
            quality.open.to_string(),
        ];
        match &quality.errors {
            Some(errors) => cells.extend([
                format!("MAE {:.4}", errors.mean_absolute),
                format!("RMSE {:.4}", errors.root_mean_square),
                format!("bias {:.4}", errors.bias),
            ]),
            None => cells.extend([
                number(classes.and_then(|classes| classes.auc)),
                number(classes.and_then(|classes| classes.log_loss)),
                number(classes.and_then(|classes| classes.calibration_error)),
            ]),
        }
        cells
    };
    let headings = ["FROM", "VERSION", "ARM", "ROWS", "LABELLED", "OPEN", "AUC", "LOG-LOSS", "CALIBRATION"];
    output.table(&headings, &report.parts.iter().map(row).collect::<Vec<_>>());
    for part in &report.parts {
        for (name, mean) in &part.quality.metrics {
            let (version, arm) = (part.version, &part.arm);
            output.line(format!("{name}, version {version} ({arm}): mean {:.4} of {} rows", mean.mean, mean.rows));
        }
    }
    for part in &report.parts {
        for (key, shown) in &part.quality.shown {
            output.line(format!(
                "{key}, version {} ({}): {} of {} shown ({:.1} %), as diverse as {:.1}; the ten most shown have {:.1} %",
                part.version,
                part.arm,
                shown.shown,
                shown.asked,
                shown.coverage * 100.0,
                shown.effective,
                shown.top_share * 100.0
            ));
        }
    }
}

async fn export(place: &Place, arguments: &ExportArguments, output: &Output) -> Result<(), CliError> {
    let window = arguments.window.read()?;
    let Opened { model, store, root, .. } = Opened::of(place, &arguments.model, output).await?;
    let shown = arguments.out.display().to_string();
    let io = |source| CliError::Io { what: format!("could not write {shown}"), source };
    let mut writer: Option<(SchemaRef, ArrowWriter<File>)> = None;
    let mut other_columns = 0;
    let rows = report::served(&store, &root, &model, window, |batch| {
        let (schema, writer) = match &mut writer {
            Some(writer) => writer,
            none => {
                let file = File::create(&arguments.out).map_err(|error| LabelError::Encode(error.into()))?;
                none.insert((batch.schema(), ArrowWriter::try_new(file, batch.schema(), None)?))
            }
        };
        // Rows of definitions that took other columns cannot be part of the same spine.
        match *schema == batch.schema() {
            true => Ok(writer.write(&batch)?),
            false => {
                other_columns += batch.num_rows();
                Ok(())
            }
        }
    });
    let rows = rows.await.map_err(failed)?;
    match writer {
        Some((_, writer)) => {
            writer.close().map_err(|error| io(std::io::Error::other(error)))?;
        }
        None => {
            output.line(format!("nothing was logged of model `{}` in this time", model.name));
            output.json(&json!({"rows": 0}));
            return Ok(());
        }
    }
    let written = rows - other_columns as u64;
    output.line(format!("{written} rows written to {shown}"));
    if other_columns > 0 {
        output
            .note(format!("{other_columns} rows were left out: they were logged under definitions with other columns"));
    }
    output.json(&json!({"rows": written, "left_out": other_columns, "file": shown}));
    Ok(())
}
