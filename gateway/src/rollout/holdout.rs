//! Before anything is served: both versions score the rows of a dataset whose labels are known.
//!
//! The rows are scored as a prediction would be, behind all that requests ask, a few at a time. Both get the features that the dataset
//! holds, so what is compared is the models and not how they are fed. The primary success metric decides, unit by unit where the
//! dataset has the columns of the unit, by the same bets that a rollout is judged by.

mod judge;

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, RecordBatch};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Float64Type};
use drift::random::mix;
use drift::sequential::policy::Policy;
use feature_defs::plan::{ModelPlan, ServicePlan};
use feature_defs::value::{Type, Value, encode_nullable, hash};
use futures::TryStreamExt;
use object_store::path::Path;
use offline_store::dataset::{Selection, StoredDataset};
use registry::dataset::DatasetRecord;
use registry::id::ModelVersion;

use crate::answer::Gateway;
use crate::drift::profiles;
use crate::predict::RowStatus;
use crate::status::chain;
use crate::versions::ServedModel;

pub use judge::{Difference, Evaluation, Flips, Scores};
use judge::{Row, evaluated};

/// Rows that are scored; of more, a sample by seed.
pub const ROWS_MAX: u64 = 200_000;
/// Rows that are scored at a time, and the pause behind them: never more than a part of an executor.
const PIECE_ROWS: usize = 256;
const PAUSE: Duration = Duration::from_millis(5);
/// Which rows are of the sample.
const SEED: u64 = 0x686f_6c64_6f75_7431;

/// What is asked.
#[derive(Debug, Clone)]
pub struct HoldoutAsked {
    pub model: String,
    pub champion: Option<u32>,
    pub challenger: u32,
    /// By name or id.
    pub dataset: String,
    pub policy: Policy,
    /// Columns that are the unit; where the dataset lacks one, every row is a unit.
    pub unit: Vec<String>,
}

/// Evaluates a version on a dataset, against the champion where it can be asked. An error says what stands against it.
pub async fn evaluate(gateway: &Gateway, asked: &HoldoutAsked) -> Result<Evaluation, String> {
    let served = gateway.served();
    let loaded = |version: u32| served.model(&asked.model, version).cloned().map_err(|failure| failure.message);
    let challenger = loaded(asked.challenger)?;
    let record = record(gateway, &asked.dataset)?;
    let path = Path::parse(&record.dataset.manifest).map_err(|error| error.to_string())?;
    let stored = StoredDataset::open(gateway.registry.log().store().clone(), &path).await;
    let stored = Arc::new(stored.map_err(|error| chain(&error))?);
    let name = format!("{} {}", stored.manifest.name, stored.manifest.id);
    let service = &challenger.plan.service;
    if stored.manifest.service_digest != service.semantic_digest.as_str() {
        return Err(format!(
            "dataset {name} was computed by feature service `{}` with digest {}, and version {} of model `{}` takes `{}` with digest {}; name a dataset of the version's own service",
            stored.manifest.service,
            short(&stored.manifest.service_digest),
            asked.challenger,
            asked.model,
            service.name,
            short(service.semantic_digest.as_str()),
        ));
    }
    let label = challenger.plan.label.as_ref().ok_or_else(|| {
        format!("model `{}` declares no label, so nothing says which scores came true; add `label: {{name: ..., type: bool}}`", asked.model)
    })?;
    if stored.schema.index_of(&label.name).is_err() {
        let known: Vec<&str> = stored.schema.fields().iter().map(|field| field.name().as_str()).collect();
        return Err(format!(
            "dataset {name} has no column `{}`, which is the label of model `{}`; create it from a spine that has it. Its columns are: {}",
            label.name,
            asked.model,
            known.join(", ")
        ));
    }
    let mut notes = Vec::new();
    let mut champion = None;
    match asked.champion.map(loaded) {
        None => notes.push("the model has no champion: the version is evaluated alone".to_owned()),
        Some(Err(why)) => notes.push(format!("the champion is not scored: {why}")),
        Some(Ok(found)) => match lacks(&found.plan.service, service) {
            None => champion = Some(found),
            Some(what) => notes.push(format!(
                "the champion, version {}, is not scored: {what}, so these rows are not what it would be served. Compare both on labels of served rows",
                found.version
            )),
        },
    }
    for (version, who) in
        asked.champion.map(|version| (version, "champion")).into_iter().chain([(asked.challenger, "version")])
    {
        if trained_on(gateway, &asked.model, version).as_deref() == Some(stored.manifest.id.as_str()) {
            notes.push(format!(
                "the {who} {version} was trained on this dataset: what it scores here says little of new rows"
            ));
        }
    }
    let is_of_units = !asked.unit.is_empty() && asked.unit.iter().all(|name| stored.schema.index_of(name).is_ok());
    if !is_of_units && !asked.unit.is_empty() {
        notes.push(format!(
            "the dataset lacks a column of the unit ({}): rows are compared as if they did not depend on each other",
            asked.unit.join(", ")
        ));
    }
    let unit: &[String] = if is_of_units { &asked.unit } else { &[] };
    let reading =
        Reading { stored: &stored, label: &label.name, unit, challenger: &challenger, champion: champion.as_ref() };
    let (rows, sampled) = reading.rows().await?;
    if sampled < stored.manifest.rows {
        notes.push(format!(
            "{sampled} of {} rows are scored, chosen by a seed that is the same for all",
            stored.manifest.rows
        ));
    }
    Ok(evaluated(asked, &name, &challenger.plan, champion.map(|champion| champion.version), rows, notes))
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

fn record(gateway: &Gateway, named: &str) -> Result<DatasetRecord, String> {
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let found = project.and_then(|project| project.dataset(named)).cloned();
    found.ok_or_else(|| {
        let known = project.into_iter().flat_map(|project| project.dataset_names.keys()).map(|name| name.as_str());
        crate::status::not_known("dataset", named, known)
    })
}

fn trained_on(gateway: &Gateway, model: &str, version: u32) -> Option<String> {
    let state = gateway.registry.state();
    let record = state.project(gateway.project.as_str())?.model(model, ModelVersion(version))?;
    record.model.dataset.as_ref().map(ToString::to_string)
}

/// What a service takes that rows of another do not have, in words; None where they have all of it, computed alike. Names alone do
/// not say that: definitions change under a name.
fn lacks(service: &ServicePlan, rows_of: &ServicePlan) -> Option<String> {
    if service.semantic_digest == rows_of.semantic_digest {
        return None;
    }
    for input in &service.inputs {
        let keys = |of: &ServicePlan, keys: &[usize]| -> Vec<String> {
            keys.iter().filter_map(|key| of.columns.get(*key)).map(|column| column.name.clone()).collect()
        };
        let same = rows_of.inputs.iter().find(|other| other.alias == input.alias).is_some_and(|other| {
            other.view.semantic_digest == input.view.semantic_digest
                && keys(rows_of, &other.keys) == keys(service, &input.keys)
        });
        if !same {
            return Some(format!("its view `{}` is another one, or is not in the dataset's service", input.alias));
        }
    }
    for transform in &service.transforms {
        let same = rows_of.transforms.iter().find(|other| other.address == transform.address).is_some_and(|other| {
            other.feature_type == transform.feature_type
                && other.expression.canonical_text() == transform.expression.canonical_text()
        });
        if !same {
            return Some(format!("its `{}` is another one, or is not in the dataset's service", transform.address));
        }
    }
    let missing = service.outputs.iter().find(|output| {
        !rows_of.outputs.iter().any(|other| other.name == output.name && other.feature_type == output.feature_type)
    });
    missing.map(|output| format!("its feature `{}` is not in the dataset", output.name))
}

struct Reading<'a> {
    stored: &'a Arc<StoredDataset>,
    label: &'a str,
    unit: &'a [String],
    challenger: &'a Arc<ServedModel>,
    champion: Option<&'a Arc<ServedModel>>,
}

impl Reading<'_> {
    /// The rows of the sample with what the versions make of them, and how many there are.
    async fn rows(&self) -> Result<(Vec<Row>, u64), String> {
        let Reading { stored, label, unit, challenger, champion } = self;
        let service = &challenger.plan.service;
        let mut names: Vec<String> = service.outputs.iter().map(|output| output.name.clone()).collect();
        for name in unit.iter().chain([&(*label).to_owned()]) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let columns = stored.columns(&names).map_err(|error| chain(&error))?;
        let mut batches = stored.read(&Selection::default(), &columns, 0).map_err(|error| chain(&error))?;
        // By row number, so that whoever scores it scores the same rows.
        let share = ROWS_MAX as f64 / stored.manifest.rows.max(1) as f64;
        let limit = if share >= 1.0 { u64::MAX } else { (share * u64::MAX as f64) as u64 };
        let (mut number, mut rows, mut sampled) = (0_u64, Vec::new(), 0);
        while let Some(batch) = batches.try_next().await.map_err(|error| chain(&error))? {
            let many = batch.num_rows() as u64;
            let wanted: BooleanArray =
                (number..number + many).map(|number| Some(mix(number ^ SEED) <= limit)).collect();
            let picked = filter_record_batch(&batch, &wanted).map_err(|error| error.to_string())?;
            sampled += picked.num_rows() as u64;
            let labels = numbers(&picked, label)?;
            let units = units(&picked, unit, number)?;
            number += many;
            for from in (0..picked.num_rows()).step_by(PIECE_ROWS) {
                let piece = picked.slice(from, PIECE_ROWS.min(picked.num_rows() - from));
                let of_challenger = score(challenger, &piece).await?;
                let of_champion = match champion {
                    Some(champion) => Some(score(champion, &piece).await?),
                    None => None,
                };
                for (row, challenger) in of_challenger.into_iter().enumerate() {
                    let label = labels.is_valid(from + row).then(|| labels.value(from + row));
                    let champion = of_champion.as_ref().map(|scored| scored[row]);
                    rows.push(Row { unit: units[from + row], label, challenger, champion });
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok((rows, sampled))
    }
}

/// A column as numbers.
fn numbers(batch: &RecordBatch, name: &str) -> Result<Float64Array, String> {
    let column = batch.column_by_name(name).ok_or_else(|| format!("the dataset has no column `{name}`"))?;
    let is_number = column.data_type().is_numeric() || *column.data_type() == DataType::Boolean;
    let cast = is_number.then(|| cast(column, &DataType::Float64).ok()).flatten();
    let cast = cast.ok_or_else(|| {
        format!("column `{name}` of the dataset is {}; numbers and booleans can be labels", column.data_type())
    })?;
    Ok(cast.as_primitive::<Float64Type>().clone())
}

/// The hash of each row's unit; of a row that names none, or where there is none, of the row.
fn units(batch: &RecordBatch, unit: &[String], first: u64) -> Result<Vec<u64>, String> {
    let columns: Option<Vec<(&ArrayRef, Type)>> = unit
        .iter()
        .map(|name| {
            let column = batch.column_by_name(name)?;
            let of = Type::from_arrow(column.data_type()).filter(|of| of.arrow() == *column.data_type())?;
            Some((column, of))
        })
        .collect();
    let columns =
        columns.ok_or_else(|| format!("a column of the unit ({}) is of no type that keys have", unit.join(", ")))?;
    let of_row = |row: usize| {
        let alone = mix((first + row as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ SEED);
        if columns.is_empty() || columns.iter().any(|(column, _)| column.is_null(row)) {
            return alone;
        }
        let mut bytes = Vec::new();
        columns.iter().for_each(|(column, of)| encode_nullable(&Value::from_array(column, row, of), &mut bytes));
        hash(&bytes)
    };
    Ok((0..batch.num_rows()).map(of_row).collect())
}

/// What a version makes of one row: its score, and what it decides.
pub(super) type Scored = (Option<f64>, Option<bool>);

async fn score(model: &Arc<ServedModel>, piece: &RecordBatch) -> Result<Vec<Scored>, String> {
    let rows = piece.num_rows();
    let most = (model.plan.max_rows as usize).clamp(1, PIECE_ROWS);
    let mut all = Vec::with_capacity(rows);
    for from in (0..rows).step_by(most) {
        let part = piece.slice(from, most.min(rows - from));
        let answered = profiles::answer(model, &model.plan.service, &part).await;
        let (outputs, statuses) = answered.map_err(|failure| failure.message)?;
        let columns: Vec<ArrayRef> = outputs.iter().map(|(_, column, _)| column.clone()).collect();
        let decided = decided(&model.plan, &columns, part.num_rows())?;
        let scores = match columns.first() {
            Some(column) if column.data_type().is_numeric() => {
                cast(column, &DataType::Float64).ok().map(|cast| cast.as_primitive::<Float64Type>().clone())
            }
            _ => None,
        };
        for (row, status) in statuses.iter().enumerate() {
            // A fallback is no score of this version.
            let is_own = *status == RowStatus::Answered;
            let score = scores.as_ref().filter(|scores| is_own && scores.is_valid(row)).map(|scores| scores.value(row));
            let decided = decided.as_ref().filter(|decided| is_own && decided.is_valid(row));
            all.push((score, decided.map(|decided| decided.value(row))));
        }
    }
    Ok(all)
}

/// What the model's `decision` says of outputs, with those of `post` behind them; None where it declares none.
fn decided(plan: &ModelPlan, outputs: &[ArrayRef], rows: usize) -> Result<Option<BooleanArray>, String> {
    let Some(decision) = &plan.decision else { return Ok(None) };
    let columns: Option<Vec<ArrayRef>> = plan.decision_reads.iter().map(|read| outputs.get(*read).cloned()).collect();
    let Some(columns) = columns else { return Ok(None) };
    let decided = decision.evaluate(&columns, rows).map_err(|error| error.to_string())?;
    Ok(decided.as_boolean_opt().cloned())
}

#[cfg(test)]
mod tests {
    use feature_defs::catalog::{Files, SourceFile};
    use feature_defs::plan::{SourceSchemas, compile_definitions};

    use super::*;

    fn service(ttl: &str, expression: &str, features: &str) -> Arc<ServicePlan> {
        let text = format!(
            r#"
entities:
  - {{name: shop, keys: [{{name: shop, type: string}}]}}
sources:
  - name: sales
    stream: true
    schema: [{{name: shop, type: string}}, {{name: amount, type: float64}}]
    event_time: sold_at
feature_views:
  - {{name: last_sale, entity: shop, source: sales, ttl: {ttl}, features: [{{name: amount, type: float64}}]}}
requests:
  - {{name: visit, fields: [{{name: people, type: float64}}]}}
transforms:
  - name: made
    inputs: [last_sale, visit]
    features: [{{name: each, expr: "{expression}"}}]
feature_services:
  - {{name: selling, features: [{features}]}}
"#
        );
        let files = Files::new(vec![SourceFile { path: "shop.yaml".into(), text }]);
        compile_definitions("shops", &files, &SourceSchemas::new()).unwrap().service("selling").unwrap().clone()
    }

    #[test]
    fn rows_are_what_a_version_takes_where_all_of_it_is_in_them_and_made_alike() {
        const ALL: &str = r#"last_sale, "made:*", "visit:people""#;
        let rows_of = service("3h", "last_sale.amount / visit.people", ALL);
        let check = |ttl: &str, expression: &str, features: &str, lacking: Option<&str>| {
            let found = lacks(&service(ttl, expression, features), &rows_of);
            match lacking {
                None => assert_eq!(found, None),
                Some(text) => assert!(found.as_ref().is_some_and(|found| found.contains(text)), "{found:?}"),
            }
        };
        check("3h", "last_sale.amount / visit.people", ALL, None);
        check("3h", "last_sale.amount / visit.people", r#""made:*", last_sale"#, None);
        // The same name, and something else.
        check("4h", "last_sale.amount / visit.people", ALL, Some("view `last_sale`"));
        check("3h", "last_sale.amount * visit.people", ALL, Some("`made:each`"));
        // What nobody asked for is not in the dataset.
        let fewer = service("3h", "last_sale.amount / visit.people", r#""made:*", last_sale"#);
        let lacking = lacks(&service("3h", "last_sale.amount / visit.people", ALL), &fewer);
        assert!(lacking.is_some_and(|found| found.contains("`visit:people`")));
    }
}
