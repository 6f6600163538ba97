//! From what views answered to the features of a service: defaults, request-time transforms, statuses.
//!
//! The offline engine and the gateway call this with answers of different origin and get the same features.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, TimestampMicrosecondArray};
use arrow::compute::is_not_null;
use arrow::compute::kernels::zip::zip;
use arrow::error::ArrowError;

use super::{ServicePlan, Slot};
use crate::expression::EvaluateError;
use crate::time::{Micros, STATIC, Status};
use crate::value::Value;

#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error("transform `{address}` could not be evaluated")]
    Transform { address: String, source: EvaluateError },
    #[error("a default could not be filled in")]
    Default(#[source] ArrowError),
    #[error("an answer does not fit the plan: {0}")]
    Shape(String),
}

/// What one input view answered, row by row.
#[derive(Debug, Clone)]
pub struct ViewAnswer {
    /// One column per feature of the view, before defaults; null where the row's status is not PRESENT.
    pub values: Vec<ArrayRef>,
    /// Of the row as a whole. Windowed views are PRESENT, or UNAVAILABLE online.
    pub statuses: Vec<Status>,
    /// Event time of the row that answered; None where there is none, STATIC for static rows.
    pub event_times: Vec<Option<Micros>>,
}

/// The features of a service, in the order asked.
#[derive(Debug, Clone)]
pub struct Assembled {
    pub columns: Vec<ArrayRef>,
    pub statuses: Vec<Arc<[Status]>>,
}

/// A column and what is true of each of its values.
#[derive(Clone)]
struct Judged {
    values: ArrayRef,
    statuses: Arc<[Status]>,
}

impl ServicePlan {
    /// Puts features together. `views` are the answers to [`ServicePlan::inputs`], `requests` the columns of
    /// [`ServicePlan::columns`], `at` the time of each row.
    pub fn assemble(
        &self,
        views: &[ViewAnswer],
        requests: &[ArrayRef],
        at: &[Micros],
    ) -> Result<Assembled, AssembleError> {
        let rows = at.len();
        if views.len() != self.inputs.len() || requests.len() != self.columns.len() {
            return Err(AssembleError::Shape(format!(
                "{} views and {} columns for a plan of {} and {}",
                views.len(),
                requests.len(),
                self.inputs.len(),
                self.columns.len()
            )));
        }
        let mut transforms: Vec<Judged> = Vec::with_capacity(self.transforms.len());
        for transform in &self.transforms {
            let inputs: Vec<Judged> = transform
                .reads
                .iter()
                .map(|slot| self.slot(*slot, views, requests, at, &transforms))
                .collect::<Result<_, _>>()?;
            let columns: Vec<ArrayRef> = inputs.iter().map(|input| input.values.clone()).collect();
            let values = transform
                .expression
                .evaluate(&columns, rows)
                .map_err(|source| AssembleError::Transform { address: transform.address.clone(), source })?;
            let statuses = (0..rows)
                .map(|row| {
                    let worst = inputs.iter().map(|input| input.statuses[row]).fold(Status::Present, Status::worst);
                    if worst == Status::Present && values.is_null(row) { Status::NullValue } else { worst }
                })
                .collect();
            let values = fill_default(values, transform.default.as_ref(), &transform.feature_type)?;
            transforms.push(Judged { values, statuses });
        }
        let mut columns = Vec::with_capacity(self.outputs.len());
        let mut statuses = Vec::with_capacity(self.outputs.len());
        for output in &self.outputs {
            let judged = self.slot(output.slot, views, requests, at, &transforms)?;
            columns.push(judged.values);
            statuses.push(judged.statuses);
        }
        Ok(Assembled { columns, statuses })
    }

    fn slot(
        &self,
        slot: Slot,
        views: &[ViewAnswer],
        requests: &[ArrayRef],
        at: &[Micros],
        transforms: &[Judged],
    ) -> Result<Judged, AssembleError> {
        Ok(match slot {
            Slot::Feature { input, feature } => {
                let answer = &views[input];
                let features = self.inputs[input].view.features();
                let (_, feature_type, default) = features[feature];
                let values = answer.values[feature].clone();
                let statuses = judge(&values, |row| answer.statuses[row]);
                Judged { values: fill_default(values, default, feature_type)?, statuses }
            }
            Slot::EventTime { input } => {
                let answer = &views[input];
                let times: TimestampMicrosecondArray =
                    answer.event_times.iter().map(|time| time.filter(|time| *time != STATIC)).collect();
                // A static row is there, and has no event time; that is no worse than PRESENT.
                let statuses = answer.statuses.as_slice().into();
                Judged { values: Arc::new(times.with_timezone("UTC")), statuses }
            }
            Slot::At => {
                let times = TimestampMicrosecondArray::from(at.to_vec()).with_timezone("UTC");
                Judged { values: Arc::new(times), statuses: vec![Status::Present; at.len()].into() }
            }
            Slot::Request(column) => {
                let values = requests[column].clone();
                let statuses = judge(&values, |_| Status::Present);
                Judged { values, statuses }
            }
            Slot::Transform(index) => transforms[index].clone(),
        })
    }
}

/// NULL_VALUE for nulls in PRESENT rows.
fn judge(values: &ArrayRef, row_status: impl Fn(usize) -> Status) -> Arc<[Status]> {
    (0..values.len())
        .map(|row| match row_status(row) {
            Status::Present if values.is_null(row) => Status::NullValue,
            status => status,
        })
        .collect()
}

fn fill_default(
    values: ArrayRef,
    default: Option<&Value>,
    value_type: &crate::value::Type,
) -> Result<ArrayRef, AssembleError> {
    let Some(default) = default.filter(|default| !default.is_null()) else { return Ok(values) };
    if values.null_count() == 0 {
        return Ok(values);
    }
    let default = Value::to_array([default], value_type);
    let present = is_not_null(&values).map_err(AssembleError::Default)?;
    zip(&present, &values, &arrow::array::Scalar::new(default)).map_err(AssembleError::Default)
}
