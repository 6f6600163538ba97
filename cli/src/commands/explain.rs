//! `coeval explain`: why one value of a training set is what it is.
//!
//! It only reads, so it works on the project folder and the store itself, whether a server runs or not. What a server has
//! taken in and not yet written to history is not there for it, nor for training sets.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use clap::Args;
use feature_defs::catalog;
use feature_defs::plan::{Plan, ServicePlan};
use feature_defs::value::{Type, Value};
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use offline_store::dataset::{Selection, StoredDataset};
use offline_store::explain::{
    AsOfExplanation, ExplainError, ExplainRequest, Explanation, InputExplanation, Lookup, SourceRow, WindowExplanation,
};
use offline_store::{Engine, EngineOptions};
use registry::store::open_store;
use serde_json::{Map, Value as Json, json};

use super::dataset::VisibilityChoice;
use crate::columns::cell;
use crate::error::CliError;
use crate::output::Output;
use crate::project::{Checked, Place, Project};
use crate::{rows, times};

const EVENT_TIMESTAMP: &str = "event_timestamp";

#[derive(Debug, Args)]
pub struct ExplainArguments {
    /// The feature service
    service: String,
    /// One of its features, as `view:feature`; without it, how the engine joins the sources of the service
    #[arg(value_name = "FEATURE")]
    feature: Option<String>,
    /// The time of the row
    #[arg(long, value_name = "TIME", requires = "feature", conflicts_with = "dataset")]
    at: Option<String>,
    /// A key of the row, as `name=value`; may be repeated. `null` is null, quotes keep that word
    #[arg(long = "key", value_name = "K=V", requires = "feature", conflicts_with = "dataset")]
    keys: Vec<String>,
    /// A request field of the row, as `name=value`; may be repeated
    #[arg(long = "field", value_name = "K=V", requires = "feature", conflicts_with = "dataset")]
    fields: Vec<String>,
    /// Take the row from this dataset: its id, or its name: then the newest
    #[arg(long, value_name = "DATASET", requires = "row", requires = "feature")]
    dataset: Option<String>,
    /// The row of the dataset, counted from 0
    #[arg(long, value_name = "N", requires = "dataset")]
    row: Option<u64>,
    /// Which rows of sources may be seen, in place of what the sources (or the dataset) say
    #[arg(long, value_enum, requires = "feature")]
    visibility: Option<VisibilityChoice>,
    /// Rows of sources to show of each kind
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    limit: u32,
}

/// The row that is asked about.
struct Asked {
    spine: RecordBatch,
    visibility: Option<catalog::Visibility>,
    /// What a dataset has in the cell.
    stored: Option<Value>,
}

pub async fn run(place: &Place, arguments: &ExplainArguments, output: &Output) -> Result<(), CliError> {
    let Checked { settings, plan, .. } = Project::read(place)?.checked(output).await?;
    place.forget_listed(&settings, &plan).await?;
    let service = service(&plan, &arguments.service)?;
    let (store, prefix): (Arc<dyn ObjectStore>, Path) = if place.store_is_absent(&settings) {
        // Looking does not create it.
        (Arc::new(InMemory::new()), Path::default())
    } else {
        open_store(&place.resolve(&settings.store))?
    };
    let engine = Engine::new(EngineOptions {
        project_folder: place.folder.clone(),
        project: settings.project.value.clone(),
        store: store.clone(),
        prefix,
        memory_bytes: settings.offline.memory_bytes,
        spill_folder: settings.offline.spill.as_ref().map(|folder| place.folder.join(folder)),
    });
    let engine = engine.map_err(engine_failed)?;
    let Some(feature) = &arguments.feature else {
        let text = engine.explain_service(service).await.map_err(engine_failed)?;
        text.lines().for_each(|line| output.line(line));
        output.json(&json!({"service": &*service.name, "plan": text.lines().collect::<Vec<_>>()}));
        return Ok(());
    };
    if service.output(feature).is_none() {
        return Err(CliError::unknown("feature", feature, service.outputs.iter().map(|output| output.name.as_str())));
    }
    let asked = match (&arguments.dataset, arguments.row) {
        (Some(dataset), Some(row)) => {
            from_dataset(&store, &engine.project_path(), service, feature, dataset, row).await?
        }
        _ => from_words(service, arguments)?,
    };
    let request = ExplainRequest {
        service: service.clone(),
        spine: asked.spine,
        feature: feature.clone(),
        visibility: arguments.visibility.map(VisibilityChoice::rule).or(asked.visibility),
        limit: arguments.limit as usize,
    };
    let explained = engine.explain(&request).await.map_err(failed)?;
    show(&explained, output);
    let mut shown = json!(explained);
    if let Some(stored) = &asked.stored {
        let stored = offline_store::explain::to_json(stored, &explained.feature_type);
        let same = stored == explained.value;
        output.line(match same {
            true => "the dataset has the same value".to_owned(),
            false => format!(
                "the dataset has {}: sources, definitions or the visibility are not what they were",
                cell(&stored)
            ),
        });
        shown["stored"] = json!({"value": stored, "same": same});
    }
    output.json(&shown);
    Ok(())
}

fn failed(error: ExplainError) -> CliError {
    CliError::Explain(Box::new(error))
}

fn engine_failed(error: offline_store::EngineError) -> CliError {
    failed(error.into())
}

fn service<'p>(plan: &'p Plan, name: &str) -> Result<&'p Arc<ServicePlan>, CliError> {
    let known = || plan.services.iter().map(|service| &*service.name);
    plan.service(name).ok_or_else(|| CliError::unknown("feature service", name, known()))
}

/// The row that the command line spells out.
fn from_words(service: &ServicePlan, arguments: &ExplainArguments) -> Result<Asked, CliError> {
    let Some(at) = &arguments.at else {
        return Err(CliError::Usage("the row has no time; write `--at 2024-03-10T12:00:00Z`".to_owned()));
    };
    let at = times::parse(at, times::now())?;
    let keys = arguments.keys.iter().map(|text| ("--key", text));
    let fields = arguments.fields.iter().map(|text| ("--field", text));
    let mut given: Vec<(&str, &str)> = Vec::new();
    for (option, text) in keys.chain(fields) {
        let Some((name, value)) = text.split_once('=') else {
            return Err(CliError::Usage(format!("`{option} {text}` is not `name=value`")));
        };
        let name = name.trim();
        let of_option = service.columns.iter().filter(|column| column.is_key == (option == "--key"));
        if !of_option.clone().any(|column| column.name == name) {
            let what = if option == "--key" { "key" } else { "request field" };
            return Err(CliError::unknown(what, name, of_option.map(|column| column.name.as_str())));
        }
        if given.iter().any(|(known, _)| *known == name) {
            return Err(CliError::Usage(format!("`{name}` is given twice")));
        }
        given.push((name, value));
    }
    let mut fields = vec![Field::new(EVENT_TIMESTAMP, Type::Timestamp.arrow(), true)];
    let mut columns: Vec<ArrayRef> = vec![Value::to_array([&Value::Timestamp(at)], &Type::Timestamp)];
    for column in &service.columns {
        let value = match given.iter().find(|(name, _)| *name == column.name) {
            Some((_, text)) => rows::value(&column.name, text, &column.column_type)?,
            None if !column.is_key && column.nullable => Value::Null,
            None => {
                let option = if column.is_key { "--key" } else { "--field" };
                return Err(CliError::Usage(format!(
                    "service `{}` takes `{}`, a {}; write `{option} {}=...`",
                    service.name, column.name, column.column_type, column.name
                )));
            }
        };
        fields.push(Field::new(&column.name, column.column_type.arrow(), true));
        columns.push(Value::to_array([&value], &column.column_type));
    }
    let spine = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns);
    let spine = spine.map_err(|error| CliError::Failed(format!("the row is no spine: {error}; this is a bug")))?;
    Ok(Asked { spine, visibility: None, stored: None })
}

/// A row of a stored dataset, without its features.
async fn from_dataset(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service: &ServicePlan,
    feature: &str,
    name: &str,
    row: u64,
) -> Result<Asked, CliError> {
    let boxed = |error| CliError::Dataset(Box::new(error));
    let path = dataset_path(store, project, name).await?;
    let dataset = Arc::new(StoredDataset::open(store.clone(), &path).await.map_err(boxed)?);
    let manifest = &dataset.manifest;
    if manifest.service != *service.name {
        let text =
            format!("dataset `{}` is of service `{}`, not of `{}`", manifest.name, manifest.service, service.name);
        return Err(CliError::Usage(text));
    }
    if row >= manifest.rows {
        let text =
            format!("dataset `{}` has {} rows, counted from 0: there is no row {row}", manifest.name, manifest.rows);
        return Err(CliError::Usage(text));
    }
    let columns = dataset.columns(&[]).map_err(boxed)?;
    let selection = Selection { offset: row, limit: Some(1), ..Selection::default() };
    let batches: Vec<RecordBatch> =
        dataset.read(&selection, &columns, 1).map_err(boxed)?.try_collect().await.map_err(boxed)?;
    let Some(batch) = batches.into_iter().find(|batch| batch.num_rows() == 1) else {
        return Err(CliError::Failed(format!(
            "row {row} of dataset `{}` could not be read; this is a bug",
            manifest.name
        )));
    };
    let is_output = |name: &str| {
        let bare = name.strip_suffix("__status").filter(|_| manifest.statuses).unwrap_or(name);
        service.output(bare).is_some()
    };
    let schema = batch.schema();
    let of_spine: Vec<usize> =
        (0..schema.fields().len()).filter(|column| !is_output(schema.field(*column).name())).collect();
    let spine = batch.project(&of_spine);
    let spine = spine.map_err(|error| CliError::Failed(format!("the row is no spine: {error}; this is a bug")))?;
    let of = service.output(feature).map(|output| &service.outputs[output].feature_type);
    let stored = of.and_then(|of| {
        let column = batch.column_by_name(feature).filter(|column| *column.data_type() == of.arrow())?;
        Some(Value::from_array(column, 0, of))
    });
    let visibility = match manifest.visibility.as_str() {
        "event_time" => Some(catalog::Visibility::EventTime),
        "ingested" => Some(catalog::Visibility::Ingested),
        _ => None,
    };
    Ok(Asked { spine, visibility, stored })
}

/// The manifest of a dataset by its id, or of the newest of a name.
pub(super) async fn dataset_path(store: &Arc<dyn ObjectStore>, project: &Path, name: &str) -> Result<Path, CliError> {
    let folder = project.clone().join("datasets");
    let objects: Vec<_> = store.list(Some(&folder)).try_collect().await.map_err(|source| {
        let error = offline_store::dataset::DatasetError::Store { path: folder.to_string(), verb: "listed", source };
        CliError::Dataset(Box::new(error))
    })?;
    // <folder>/<name>/<id>/manifest.json
    let before = folder.parts().count();
    let mut known: Vec<(String, String, chrono::DateTime<chrono::Utc>, Path)> = Vec::new();
    for object in objects {
        let parts: Vec<String> = object.location.parts().skip(before).map(|part| part.as_ref().to_owned()).collect();
        if let [name, id, file] = parts.as_slice()
            && file == "manifest.json"
        {
            known.push((name.clone(), id.clone(), object.last_modified, object.location));
        }
    }
    let by_id = known.iter().find(|(_, id, ..)| id == name);
    let found = by_id.or_else(|| known.iter().filter(|(of, ..)| of == name).max_by_key(|(_, _, made, _)| *made));
    match found {
        Some((.., path)) => Ok(path.clone()),
        None => Err(CliError::unknown("dataset", name, known.iter().map(|(name, ..)| name.as_str()))),
    }
}

fn show(explained: &Explanation, output: &Output) {
    let Explanation { feature, value, status, event_timestamp, .. } = explained;
    output.line(format!("{feature} = {}  {status}", cell(value)));
    output.line(format!("  at        {event_timestamp}"));
    output.line(format!("  engine    {}", explained.strategy));
    output.line("  checked   the reference, asked with the rows below, gives the same to the last bit");
    if explained.steps.len() > 1 || explained.steps.iter().any(|step| step.expression.is_some()) {
        output.line("  made of");
        for step in &explained.steps {
            let made = step.expression.as_ref().map_or_else(String::new, |text| format!("  <- {text}"));
            let default =
                step.default.as_ref().map_or_else(String::new, |value| format!("  (default {})", cell(value)));
            output.line(format!("    {} = {}  {}{default}{made}", step.name, cell(&step.value), step.status));
        }
    }
    for input in &explained.inputs {
        show_input(input, output);
    }
}

fn show_input(input: &InputExplanation, output: &Output) {
    let alias = if input.alias == input.view { String::new() } else { format!(" as {}", input.alias) };
    let keys = if input.keys.is_empty() { String::new() } else { format!(", {}", pairs(&input.keys)) };
    output.line(format!("  view {}{alias} of source {}{keys}  {}", input.view, input.source, input.status));
    output.line(format!("    rows      {} of this entity among {} read", input.rows_of_entity, input.rows_read));
    if input.rows_of_view != input.rows_of_entity {
        output.line(format!("              {} of them are in the view", input.rows_of_view));
    }
    output.line(match input.rule {
        "known" => format!("    seen      from when they are known, {}", input.known),
        "event_time" => "    seen      from their event time, known or not".to_owned(),
        _ => "    seen      from when they arrived".to_owned(),
    });
    if input.key_is_null {
        output.line("    the key is null, which matches nothing");
    }
    match &input.lookup {
        Lookup::AsOf(found) => show_as_of(found, output),
        Lookup::Windows(found) => found.iter().for_each(|window| show_window(window, output)),
    }
}

fn show_as_of(found: &AsOfExplanation, output: &Output) {
    output.line(format!("    judged    {}", found.judgement));
    if let Some(winner) = &found.winner {
        show_rows("winner", std::slice::from_ref(winner), 1, output);
    }
    show_rows("passed over", &found.superseded, found.superseded_count, output);
    show_rows("hidden, not known yet", &found.hidden, found.hidden_count, output);
    if found.later_count > 0 {
        output.line(format!("    {} more happened later", found.later_count));
    }
}

fn show_window(found: &WindowExplanation, output: &Output) {
    let of = found.of.clone().unwrap_or_else(|| "rows".to_owned());
    let filter = found.filter.as_ref().map_or_else(String::new, |text| format!(" where {text}"));
    let by = found.by.as_ref().map_or_else(String::new, |text| format!(" by {text}"));
    output.line(format!(
        "    {}    {} of {of}{filter}{by} = {}",
        found.feature,
        found.function,
        cell(&found.aggregate)
    ));
    let hop = found.hop.map_or_else(|| "none: the tail is exact".to_owned(), |hop| hop.to_string());
    let closed = if found.head == "inclusive" { ']' } else { ')' };
    output.line(format!("    window    {}, [{}, {}{closed}, hop {hop}", found.length, found.start, found.end));
    let skipped = found.events - found.contributing;
    let skipped = if skipped > 0 { format!(", {skipped} of them null or excluded") } else { String::new() };
    output.line(format!("    events    {} inside{skipped}", found.events));
    show_rows("newest inside", &found.rows, found.contributing, output);
    show_rows("hidden, not known yet", &found.hidden, found.hidden_count, output);
}

fn show_rows(heading: &str, rows: &[SourceRow], count: u64, output: &Output) {
    if count == 0 {
        return;
    }
    let of = if count > rows.len() as u64 { format!(" ({} of {count})", rows.len()) } else { String::new() };
    output.line(format!("    {heading}{of}"));
    for row in rows {
        let created = row.created_time.map_or_else(String::new, |time| format!(", created {time}"));
        let log = if row.sequence > 0 { format!(", log {}", row.sequence) } else { String::new() };
        let gone = if row.tombstone { "  tombstone" } else { "" };
        let why = if row.why == "inside" { String::new() } else { format!("  ({})", row.why) };
        output.line(format!(
            "      event {}{created}, known {}, position {}{log}{gone}{why}",
            row.event_time, row.known_time, row.position
        ));
        if !row.values.is_empty() {
            output.line(format!("        {}", pairs(&row.values)));
        }
        if !row.columns.is_empty() {
            output.line(format!("        from {}", pairs(&row.columns)));
        }
    }
}

fn pairs(named: &Map<String, Json>) -> String {
    named.iter().map(|(name, value)| format!("{name}={}", cell(value))).collect::<Vec<_>>().join(" ")
}
