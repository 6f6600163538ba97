//! The serving log of a model with its labels: how good each version and arm was over time, and the rows themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, RecordBatch, StringArray, UInt32Array};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, TimestampMicrosecondType, UInt32Type};
use feature_defs::plan::ModelPlan;
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value, encode, hash};
use object_store::ObjectStore;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::join::Index;
use super::quality::{self, Quality, ShownCounter};
use super::{LabelError, is_class, read};
use crate::serving_log::{self, LogRows, columns};

/// Logged predictions that one report is made of.
pub const PREDICTIONS_MAX: usize = 8_000_000;

/// What is asked.
#[derive(Debug, Clone)]
pub struct Asked {
    pub from: Micros,
    pub to: Micros,
    /// Each stretch of time is judged by itself; longer than the whole: one stretch.
    pub every: Micros,
    /// Which output is the score; the first that is declared.
    pub output: Option<String>,
    /// For what is still open.
    pub now: Micros,
}

/// How good a model was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub model: String,
    pub label: Option<String>,
    pub output: String,
    /// Which rows it is of: those of sampled entity keys, or uniformly chosen ones where there is no such sample. Rows that
    /// were logged because of a fallback would make it look worse than it is.
    pub sampled: String,
    pub parts: Vec<Part>,
}

/// One version and arm in one stretch of time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub version: u32,
    pub arm: String,
    pub from: Micros,
    pub to: Micros,
    #[serde(flatten)]
    pub quality: Quality,
}

#[derive(Default)]
struct Collected {
    rows: u64,
    open: u64,
    pairs: Vec<(f64, f64)>,
    metrics: BTreeMap<String, Vec<f64>>,
    shown: BTreeMap<String, ShownCounter>,
}

/// A file's columns, typed.
struct Logged<'a> {
    batch: &'a RecordBatch,
    at: &'a [Micros],
    requests: (&'a StringArray, &'a UInt32Array),
    sampled: &'a StringArray,
    version: &'a UInt32Array,
    arm: &'a StringArray,
    status: &'a StringArray,
}

impl<'a> Logged<'a> {
    fn of(batch: &'a RecordBatch) -> Option<Logged<'a>> {
        let texts = |name: &str| batch.column_by_name(name)?.as_string_opt::<i32>();
        let numbers = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<UInt32Type>();
        let at = batch.column_by_name(columns::AT)?.as_primitive_opt::<TimestampMicrosecondType>()?;
        Some(Logged {
            batch,
            at: at.values(),
            requests: (texts(columns::REQUEST_ID)?, numbers(columns::ROW)?),
            sampled: texts(columns::SAMPLED)?,
            version: numbers(columns::VERSION)?,
            arm: texts(columns::ARM)?,
            status: texts(columns::STATUS)?,
        })
    }
}

/// Calls `each` with every file's rows of the model whose times are asked for.
async fn each_file(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
    (from, to): (Micros, Micros),
    mut each: impl FnMut(&RecordBatch) -> Result<(), LabelError>,
) -> Result<(), LabelError> {
    let mut rows = 0;
    for file in serving_log::files(store, project, &model.service.name, from, to).await? {
        let Some(LogRows { header, batch }) = serving_log::read(store, &file).await? else { continue };
        if header.model.as_deref() != Some(&*model.name) {
            continue;
        }
        let at = batch.column_by_name(columns::AT).and_then(|at| at.as_primitive_opt::<TimestampMicrosecondType>());
        let Some(at) = at else { continue };
        let inside: BooleanArray = at.values().iter().map(|at| Some((from..to).contains(at))).collect();
        let batch = filter_record_batch(&batch, &inside)?;
        rows += batch.num_rows();
        if rows > PREDICTIONS_MAX {
            return Err(LabelError::TooManyToJoin { model: model.name.to_string() });
        }
        each(&batch)?;
    }
    Ok(())
}

/// How good each version and arm of a model was.
pub async fn report(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
    asked: &Asked,
) -> Result<Report, LabelError> {
    let labels = read(store, project, model).await?;
    let label = model.label.as_ref();
    let of_label = label.map(|label| Index::new(model, &labels, &label.name)).transpose()?;
    let mut names = BTreeSet::new();
    for batch in &labels {
        let metrics = batch.column_by_name(super::METRIC).and_then(|column| column.as_string_opt::<i32>());
        names.extend(metrics.into_iter().flatten().flatten().map(str::to_owned));
    }
    names.retain(|name| label.is_none_or(|label| *name != label.name));
    let mut of_metrics = Vec::new();
    for name in names {
        let index = Index::new(model, &labels, &name)?;
        of_metrics.push((name, index));
    }
    drop(labels);
    let output = asked.output.clone().or_else(|| model.outputs.first().map(|output| output.name.clone()));
    let output = output.unwrap_or_default();
    let collect = async |sampled: &str| {
        let mut parts: BTreeMap<(u32, String, Micros), Collected> = BTreeMap::new();
        each_file(store, project, model, (asked.from, asked.to), |batch| {
            let with = With { model, asked, sampled, output: &output, label: of_label.as_ref(), metrics: &of_metrics };
            with.collect(batch, &mut parts)
        })
        .await?;
        Ok::<_, LabelError>(parts)
    };
    let mut sampled = "key";
    let mut parts = collect(sampled).await?;
    if parts.is_empty() {
        sampled = "uniform";
        parts = collect(sampled).await?;
    }
    let parts = parts.into_iter().map(|((version, arm, from), collected)| {
        let to = from.saturating_add(asked.every).min(asked.to);
        Part { version, arm, from: from.max(asked.from), to, quality: collected.finish(model) }
    });
    Ok(Report {
        model: model.name.to_string(),
        label: label.map(|label| label.name.clone()),
        parts: parts.collect(),
        sampled: sampled.to_owned(),
        output,
    })
}

/// What rows are collected with.
struct With<'a> {
    model: &'a ModelPlan,
    asked: &'a Asked,
    sampled: &'a str,
    output: &'a str,
    label: Option<&'a Index>,
    metrics: &'a [(String, Index)],
}

impl With<'_> {
    fn collect(
        &self,
        batch: &RecordBatch,
        parts: &mut BTreeMap<(u32, String, Micros), Collected>,
    ) -> Result<(), LabelError> {
        let With { model, asked, .. } = self;
        let Some(logged) = Logged::of(batch) else { return Ok(()) };
        let rows = batch.num_rows();
        let within = model.label.as_ref().and_then(|label| label.within);
        let labels = |index: &Index| index.labels_of(model, batch, logged.requests, logged.at, within);
        let outcomes = self.label.map_or_else(|| vec![None; rows], labels);
        let metrics: Vec<(&str, Vec<Option<f64>>)> =
            self.metrics.iter().map(|(name, index)| (name.as_str(), labels(index))).collect();
        let scores = batch.column_by_name(&columns::output(self.output)).and_then(scores);
        let decided = decisions(model, batch)?;
        let keys: Vec<(&str, &ArrayRef, Type)> = model
            .service
            .columns
            .iter()
            .filter(|column| column.is_key)
            .filter_map(|column| {
                let key_type = if column.sensitive { Type::String } else { column.column_type.clone() };
                Some((column.name.as_str(), batch.column_by_name(&columns::input(&column.name))?, key_type))
            })
            .collect();
        for row in 0..rows {
            // A fallback is no prediction of this version.
            if logged.sampled.value(row) != self.sampled || logged.status.value(row) != "ok" {
                continue;
            }
            let at = logged.at[row];
            let from = at.div_euclid(asked.every.max(1)).saturating_mul(asked.every.max(1));
            let part = parts.entry((logged.version.value(row), logged.arm.value(row).to_owned(), from)).or_default();
            part.rows += 1;
            match (outcomes[row], &scores) {
                (Some(outcome), Some(scores)) if scores.is_valid(row) => part.pairs.push((scores.value(row), outcome)),
                _ if self.label.is_some() && within.is_none_or(|within| at.saturating_add(within) >= asked.now) => {
                    part.open += 1;
                }
                _ => {}
            }
            for (name, values) in &metrics {
                if let Some(value) = values[row] {
                    part.metrics.entry((*name).to_owned()).or_default().push(value);
                }
            }
            let is_shown = decided.as_ref().is_none_or(|decided| decided.is_valid(row) && decided.value(row));
            // A null names nobody.
            for (name, array, key_type) in keys.iter().filter(|(_, array, _)| array.is_valid(row)) {
                let mut bytes = Vec::new();
                encode(&Value::from_array(array, row, key_type), &mut bytes);
                let counter = part.shown.entry((*name).to_owned()).or_default();
                counter.add(hash(&bytes), is_shown);
            }
        }
        Ok(())
    }
}

pub(crate) fn scores(column: &ArrayRef) -> Option<Float64Array> {
    let is_number = column.data_type().is_numeric() || *column.data_type() == DataType::Boolean;
    let numbers = is_number.then(|| cast(column, &DataType::Float64).ok()).flatten()?;
    Some(numbers.as_primitive::<Float64Type>().clone())
}

/// What the model's `decision` says of each logged row; None where it declares none.
pub(crate) fn decisions(model: &ModelPlan, batch: &RecordBatch) -> Result<Option<BooleanArray>, LabelError> {
    let Some(decision) = &model.decision else { return Ok(None) };
    let outputs = model.outputs.iter().map(|output| &output.name).chain(model.post.iter().map(|post| &post.name));
    let names: Vec<&String> = outputs.collect();
    let column = |read: &usize| batch.column_by_name(&columns::output(names.get(*read)?)).cloned();
    let Some(columns) = model.decision_reads.iter().map(column).collect::<Option<Vec<ArrayRef>>>() else {
        return Ok(None);
    };
    Ok(decision.evaluate(&columns, batch.num_rows())?.as_boolean_opt().cloned())
}

impl Collected {
    fn finish(self, model: &ModelPlan) -> Quality {
        let Collected { rows, open, pairs, metrics, shown } = self;
        let mut quality = Quality { rows, open, labelled: pairs.len() as u64, ..Quality::default() };
        match &model.label {
            Some(label) if is_class(label) && !pairs.is_empty() => {
                quality.classes =
                    Some(quality::classes(pairs.iter().map(|(score, label)| (*score, *label > 0.5)).collect()));
            }
            Some(_) => quality.errors = quality::errors(pairs),
            None => {}
        }
        quality.metrics = metrics.into_iter().map(|(name, values)| (name, quality::mean(values))).collect();
        quality.shown = shown.into_iter().map(|(name, counter)| (name, counter.finish())).collect();
        quality
    }
}

/// Logged rows with their labels, ready to be a spine: `event_timestamp`, what the request carried, the label, and which
/// version and arm answered what, so that a training set can leave arms out. Columns that hold hashes are left out.
pub async fn served(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
    (from, to): (Micros, Micros),
    mut each: impl FnMut(RecordBatch) -> Result<(), LabelError>,
) -> Result<u64, LabelError> {
    let labels = read(store, project, model).await?;
    let index = model.label.as_ref().map(|label| Index::new(model, &labels, &label.name)).transpose()?;
    drop(labels);
    let within = model.label.as_ref().and_then(|label| label.within);
    let mut rows = 0;
    each_file(store, project, model, (from, to), |batch| {
        let Some(logged) = Logged::of(batch) else { return Ok(()) };
        let mut fields = Vec::new();
        let mut out: Vec<ArrayRef> = Vec::new();
        let mut put = |name: &str, column: &ArrayRef| {
            fields.push(Field::new(name, column.data_type().clone(), true));
            out.push(column.clone());
        };
        let at = batch.column_by_name(columns::AT);
        at.into_iter().for_each(|at| put(crate::point_in_time::EVENT_TIMESTAMP, at));
        for column in model.service.columns.iter().filter(|column| !column.sensitive) {
            batch.column_by_name(&columns::input(&column.name)).into_iter().for_each(|array| put(&column.name, array));
        }
        if let (Some(index), Some(label)) = (&index, &model.label) {
            let values = index.labels_of(model, batch, logged.requests, logged.at, within);
            let column: ArrayRef = match is_class(label) {
                true => Arc::new(values.iter().map(|value| value.map(|value| value > 0.5)).collect::<BooleanArray>()),
                false => Arc::new(Float64Array::from(values)),
            };
            put(&label.name, &column);
        }
        let kept =
            [columns::REQUEST_ID, columns::ROW, columns::VERSION, columns::ARM, columns::STATUS, columns::SAMPLED];
        for name in kept {
            logged.batch.column_by_name(name).into_iter().for_each(|column| put(&format!("served_{name}"), column));
        }
        for output in &model.outputs {
            let column = batch.column_by_name(&columns::output(&output.name));
            column.into_iter().for_each(|column| put(&format!("served_{}", output.name), column));
        }
        rows += batch.num_rows() as u64;
        each(RecordBatch::try_new(Arc::new(Schema::new(fields)), out)?)
    })
    .await?;
    Ok(rows)
}
