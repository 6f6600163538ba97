//! From what views answered to the features of a service: defaults, request-time transforms, statuses.
//!
//! The offline engine and the gateway call this with answers of different origin and get the same features.

use std::borrow::Borrow;
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
    /// How many values of each feature are its declared default.
    pub defaults: Vec<u32>,
}

/// A column and what is true of each of its values.
#[derive(Clone)]
struct Judged {
    values: ArrayRef,
    statuses: Arc<[Status]>,
    defaults: u32,
}

/// What was given, with the statuses that most columns share.
struct Given<'a> {
    views: Vec<&'a ViewAnswer>,
    /// Of each view's rows.
    statuses: Vec<Arc<[Status]>>,
    requests: &'a [ArrayRef],
    at: &'a [Micros],
    /// PRESENT for every row.
    present: Arc<[Status]>,
}

impl ServicePlan {
    /// Puts features together. `views` are the answers to [`ServicePlan::inputs`], `requests` the columns of
    /// [`ServicePlan::columns`], `at` the time of each row.
    pub fn assemble<A: Borrow<ViewAnswer>>(
        &self,
        views: &[A],
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
        let views: Vec<&ViewAnswer> = views.iter().map(Borrow::borrow).collect();
        let given = Given {
            statuses: views.iter().map(|view| view.statuses.as_slice().into()).collect(),
            views,
            requests,
            at,
            present: vec![Status::Present; rows].into(),
        };
        let mut transforms: Vec<Judged> = Vec::with_capacity(self.transforms.len());
        let mut inputs: Vec<ArrayRef> = Vec::new();
        for transform in &self.transforms {
            inputs.clear();
            let mut statuses = given.present.clone();
            for slot in &transform.reads {
                let input = self.slot(*slot, &given, &transforms)?;
                statuses = worst(statuses, &input.statuses, &given.present);
                inputs.push(input.values);
            }
            let values = transform
                .expression
                .evaluate_columns(inputs.drain(..), rows)
                .map_err(|source| AssembleError::Transform { address: transform.address.clone(), source })?;
            let statuses = judge(&values, &statuses);
            let (values, defaults) = fill_default(values, transform.default.as_ref(), &transform.feature_type)?;
            transforms.push(Judged { values, statuses, defaults });
        }
        let mut assembled = Assembled {
            columns: Vec::with_capacity(self.outputs.len()),
            statuses: Vec::with_capacity(self.outputs.len()),
            defaults: Vec::with_capacity(self.outputs.len()),
        };
        for output in &self.outputs {
            let Judged { values, statuses, defaults } = self.slot(output.slot, &given, &transforms)?;
            assembled.columns.push(values);
            assembled.statuses.push(statuses);
            assembled.defaults.push(defaults);
        }
        Ok(assembled)
    }

    fn slot(&self, slot: Slot, given: &Given<'_>, transforms: &[Judged]) -> Result<Judged, AssembleError> {
        Ok(match slot {
            Slot::Feature { input, feature } => {
                let (feature_type, default) = self.inputs[input].view.feature(feature);
                let values = given.views[input].values[feature].clone();
                let statuses = judge(&values, &given.statuses[input]);
                let (values, defaults) = fill_default(values, default, feature_type)?;
                Judged { values, statuses, defaults }
            }
            Slot::EventTime { input } => {
                let answer = given.views[input];
                let times: TimestampMicrosecondArray =
                    answer.event_times.iter().map(|time| time.filter(|time| *time != STATIC)).collect();
                // A static row is there, and has no event time; that is no worse than PRESENT.
                let statuses = given.statuses[input].clone();
                Judged { values: Arc::new(times.with_timezone("UTC")), statuses, defaults: 0 }
            }
            Slot::At => {
                let times = TimestampMicrosecondArray::from(given.at.to_vec()).with_timezone("UTC");
                Judged { values: Arc::new(times), statuses: given.present.clone(), defaults: 0 }
            }
            Slot::Request(column) => {
                let values = given.requests[column].clone();
                let statuses = judge(&values, &given.present);
                Judged { values, statuses, defaults: 0 }
            }
            Slot::Transform(index) => transforms[index].clone(),
        })
    }
}

/// The worse status, row by row; shared where the two are not of two opinions.
fn worst(known: Arc<[Status]>, other: &Arc<[Status]>, present: &Arc<[Status]>) -> Arc<[Status]> {
    if Arc::ptr_eq(&known, other) || Arc::ptr_eq(other, present) {
        known
    } else if Arc::ptr_eq(&known, present) {
        other.clone()
    } else {
        known.iter().zip(&**other).map(|(a, b)| Status::worst(*a, *b)).collect()
    }
}

/// NULL_VALUE for nulls in PRESENT rows.
fn judge(values: &ArrayRef, statuses: &Arc<[Status]>) -> Arc<[Status]> {
    if values.null_count() == 0 {
        return statuses.clone();
    }
    let judged = statuses.iter().enumerate().map(|(row, status)| match status {
        Status::Present if values.is_null(row) => Status::NullValue,
        status => *status,
    });
    judged.collect()
}

/// Fills nulls, and says how many there were.
fn fill_default(
    values: ArrayRef,
    default: Option<&Value>,
    value_type: &crate::value::Type,
) -> Result<(ArrayRef, u32), AssembleError> {
    let nulls = values.null_count();
    let Some(default) = default.filter(|default| !default.is_null() && nulls > 0) else { return Ok((values, 0)) };
    let default = Value::to_array([default], value_type);
    let present = is_not_null(&values).map_err(AssembleError::Default)?;
    let filled = zip(&present, &values, &arrow::array::Scalar::new(default)).map_err(AssembleError::Default)?;
    Ok((filled, u32::try_from(nulls).unwrap_or(u32::MAX)))
}
