//! Labels over the wire: what became of predictions, and how good they were.

use std::sync::Arc;

use arrow::array::RecordBatch;
use feature_defs::plan::ModelPlan;
use feature_defs::time::Micros;
use feature_defs::value::Type;
use offline_store::labels::report::{self, Asked};
use offline_store::labels::{self, LabelError, Labels};
use proto::v1;
use proto::v1::column::Values;

use crate::answer::Gateway;
use crate::convert;
use crate::serving_log::{Uploads, hash_key};
use crate::status::{Failure, Kind, chain};

const WINDOW: Micros = 30 * 86_400_000_000;
/// Of a model whose log is long, one report after the other.
const REPORTS_MAX: usize = 1;

/// Keeps reports from running beside each other: each reads the log.
pub struct Reports(tokio::sync::Semaphore);

impl Default for Reports {
    fn default() -> Reports {
        Reports(tokio::sync::Semaphore::new(REPORTS_MAX))
    }
}

fn model(gateway: &Gateway, name: &str) -> Result<Arc<ModelPlan>, Failure> {
    let served = gateway.served();
    let plan = served.plan()?;
    let known = || plan.models.iter().map(|model| &*model.name);
    plan.model(name).cloned().ok_or_else(|| Failure::unknown("model", name, known()))
}

pub async fn add(gateway: &Gateway, request: v1::AddLabelsRequest) -> Result<v1::AddLabelsResponse, Failure> {
    gateway.check_project(&request.project)?;
    let model = model(gateway, &request.model)?;
    let metric = Some(request.metric.as_str()).filter(|metric| !metric.is_empty());
    let value = labels::metric_of(&model, metric).map_err(failure)?;
    let Some(rows) = request.columns.iter().find_map(convert::rows_of) else {
        return Err(Failure::invalid("no column carries values, so the number of labels is not known"));
    };
    let mut columns = Vec::with_capacity(request.columns.len());
    for column in &request.columns {
        let declared = model.service.columns.iter().find(|known| known.name == column.name);
        let column_type = match (column.name.as_str(), declared) {
            (labels::REQUEST_ID, _) => Type::String,
            (labels::ROW, _) => Type::Int64,
            (labels::TIME, _) => Type::Timestamp,
            (name, _) if name == value => value_type(column),
            (_, Some(known)) => known.column_type.clone(),
            (name, None) => {
                let known = model.service.columns.iter().map(|known| known.name.as_str());
                let known = known.chain([labels::REQUEST_ID, labels::ROW, labels::TIME, value]);
                return Err(Failure::unknown("column of labels named", name, known));
            }
        };
        let array =
            convert::to_array(column, &column_type, rows).map_err(|error| Failure::invalid(error.to_string()))?;
        columns.push((column.name.clone(), array, true));
    }
    let given = RecordBatch::try_from_iter_with_nullable(columns)
        .map_err(|error| Failure::invalid(format!("the columns do not make a table: {error}")))?;
    let (store, root) = (gateway.registry.log().store(), gateway.registry.root());
    let key = match gateway.uploads.as_ref().map(Uploads::hash_key) {
        Some(key) => key.to_vec(),
        None => hash_key(None, store, root)
            .await
            .map_err(|error| Failure::unavailable("the key of sensitive columns cannot be read", &error))?,
    };
    // The wall clock: it only orders corrections, also where a replay brings its own times.
    let added = chrono::Utc::now().timestamp_micros();
    let read = Labels::of(&model, metric, &given, added, &key).map_err(failure)?;
    labels::add(store, root, &model, &read, added).await.map_err(failure)?;
    Ok(v1::AddLabelsResponse { rows: read.rows() as u64 })
}

/// The type that a column's values have; booleans where it carries none, which then are all null.
fn value_type(column: &v1::Column) -> Type {
    match &column.values {
        Some(Values::Int32s(_)) => Type::Int32,
        Some(Values::Int64s(_)) => Type::Int64,
        Some(Values::Floats(_)) => Type::Float32,
        Some(Values::Doubles(_)) => Type::Float64,
        _ => Type::Bool,
    }
}

pub async fn quality(gateway: &Gateway, request: v1::GetQualityRequest) -> Result<v1::GetQualityResponse, Failure> {
    gateway.check_project(&request.project)?;
    let model = model(gateway, &request.model)?;
    let output = Some(request.output).filter(|output| !output.is_empty());
    if let Some(name) = &output
        && !model.outputs.iter().any(|known| known.name == *name)
    {
        return Err(Failure::unknown("output", name, model.outputs.iter().map(|known| known.name.as_str())));
    }
    let now = (gateway.clock)();
    let (from, to) = match (request.from, request.to) {
        (0, 0) => (now.saturating_sub(WINDOW), now),
        window => window,
    };
    if from >= to {
        return Err(Failure::invalid(format!("nothing lies from {from} up to {to}")));
    }
    if request.every < 0 {
        return Err(Failure::invalid(format!("`every` is {} and no length", request.every)));
    }
    let every = if request.every == 0 { Micros::MAX } else { request.every };
    let Ok(_one) = gateway.reports.0.try_acquire() else {
        return Err(Failure::new(Kind::TooMuch, "another report is being made; ask again when it is done"));
    };
    let asked = Asked { from, to, every, output, now };
    let report = report::report(gateway.registry.log().store(), gateway.registry.root(), &model, &asked).await;
    let report = serde_json::to_string(&report.map_err(failure)?);
    Ok(v1::GetQualityResponse {
        report: report.map_err(|error| Failure::internal("the report could not be written", &error))?,
    })
}

fn failure(error: LabelError) -> Failure {
    match &error {
        LabelError::NoLabel { .. }
        | LabelError::Type { .. }
        | LabelError::Missing { .. }
        | LabelError::NoPredictions { .. }
        | LabelError::Column { .. }
        | LabelError::Row { .. }
        | LabelError::TooMany { .. }
        | LabelError::TooManyToJoin { .. } => Failure::invalid(chain(&error)),
        LabelError::Store { .. } | LabelError::Log(_) => Failure::unavailable("the object store failed", &error),
        LabelError::Damaged { .. } => Failure::new(Kind::Precondition, chain(&error)),
        LabelError::Arrow(_) | LabelError::Encode(_) | LabelError::Decision(_) => {
            Failure::internal("labels could not be worked with", &error)
        }
    }
}
