//! From features to predictions, with an outcome for every row.
//!
//! One bad row does not fail the others: a row that a model cannot take, or that came too late, gets the declared fallback
//! or none, and says why. Only rows that can be answered go to the model; when the model fails on several rows at once, they
//! are halved until the rows it fails on are alone.

use std::time::{Duration, Instant};

use arrow::array::ArrayRef;
use feature_defs::plan::{EncodedInput, InputValues, ModelPlan, TensorType};
use feature_defs::value::{Type, Value};
use inference::batch::WaitReason;
use inference::executor::{InferError, ModelServer, Outcome};
use inference::model::{InputSpec, ModelError, ModelSpec, OutputSpec};
use inference::tensor::{Dtype, Tensor, TensorData};
use proto::v1;

use crate::convert;
use crate::features::Features;
use crate::request::Rows;
use crate::status::Failure;

/// The answers to the rows of a request.
#[derive(Debug)]
pub struct Predicted {
    /// Declared outputs, then `post` expressions.
    pub outputs: Vec<v1::Column>,
    pub rows: Vec<RowOutcome>,
    pub queue_time: Duration,
    pub forward_time: Duration,
}

/// What became of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowOutcome {
    pub status: RowStatus,
    /// Empty when the model answered.
    pub reason: String,
    pub wait_reason: Option<WaitReason>,
    pub wait_micros: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowStatus {
    Answered,
    Fallback,
    Failed,
}

impl RowStatus {
    pub fn name(self) -> &'static str {
        match self {
            RowStatus::Answered => "ok",
            RowStatus::Fallback => "fallback",
            RowStatus::Failed => "failed",
        }
    }
}

impl RowOutcome {
    pub fn to_proto(&self, version: u32) -> v1::RowOutcome {
        v1::RowOutcome {
            version,
            arm: "champion".to_owned(),
            status: match self.status {
                RowStatus::Answered => v1::RowStatus::Ok,
                RowStatus::Fallback => v1::RowStatus::Fallback,
                RowStatus::Failed => v1::RowStatus::Failed,
            } as i32,
            reason: self.reason.clone(),
            wait_reason: match self.wait_reason {
                None => v1::WaitReason::Unspecified,
                Some(WaitReason::None) => v1::WaitReason::None,
                Some(WaitReason::ExecutorBusy) => v1::WaitReason::ExecutorBusy,
            } as i32,
            wait_us: u32::try_from(self.wait_micros).unwrap_or(u32::MAX),
        }
    }
}

/// The signature that a plan declares.
pub fn spec_of(plan: &ModelPlan) -> ModelSpec {
    ModelSpec {
        inputs: plan
            .inputs
            .iter()
            .map(|input| InputSpec::features(&input.name, dtype(input.dtype), input.width))
            .collect(),
        outputs: plan
            .outputs
            .iter()
            .map(|output| OutputSpec { name: output.name.clone(), dtype: dtype(output.dtype) })
            .collect(),
    }
}

fn dtype(tensor_type: TensorType) -> Dtype {
    match tensor_type {
        TensorType::Float32 => Dtype::Float32,
        TensorType::Float64 => Dtype::Float64,
        TensorType::Int32 => Dtype::Int32,
        TensorType::Int64 => Dtype::Int64,
        TensorType::Bool => Dtype::Bool,
    }
}

pub async fn predict(
    plan: &ModelPlan,
    server: &ModelServer,
    rows: &Rows,
    features: &Features,
    deadline: Instant,
) -> Result<Predicted, Failure> {
    let encoded = plan.encode(&features.assembled, rows.count);
    let mut answers = Answers::new(plan, rows.count);
    for (row, column) in &rows.incomplete {
        // The caller's mistake, and no reason to answer with anything.
        answers.fail(*row, format!("request field `{column}` must not be null"));
    }
    for (row, reason) in encoded.refused {
        if answers.open(row) {
            answers.fall_back(row, reason);
        }
    }
    let mut pending: Vec<Vec<usize>> = vec![(0..rows.count).filter(|row| answers.open(*row)).collect()];
    while let Some(group) = pending.pop() {
        if group.is_empty() {
            continue;
        }
        let inputs = encoded.inputs.iter().map(|input| Ok((input.name.clone(), tensor(input, &group)?)));
        let inputs: Result<Vec<_>, inference::tensor::TensorError> = inputs.collect();
        let inputs =
            inputs.map_err(|error| Failure::internal("the features could not be made into tensors", &error))?;
        match server.submit(inputs, deadline).await {
            Ok(outcome) => answers.take(&group, outcome),
            Err(InferError::Model(ModelError::Runtime(_) | ModelError::OutOfMemory(_))) if group.len() > 1 => {
                let (first, second) = group.split_at(group.len() / 2);
                // The stack is taken from its end: rows are run in their order.
                pending.push(second.to_vec());
                pending.push(first.to_vec());
            }
            Err(error) => {
                let reason = error.to_string();
                group.iter().for_each(|row| answers.fall_back(*row, reason.clone()));
            }
        }
    }
    answers.finish()
}

fn tensor(input: &EncodedInput, rows: &[usize]) -> Result<Tensor, inference::tensor::TensorError> {
    let width = input.width;
    fn pick<T: Copy>(values: &[T], rows: &[usize], width: usize) -> Vec<T> {
        let mut picked = Vec::with_capacity(rows.len() * width);
        rows.iter().for_each(|row| picked.extend_from_slice(&values[row * width..(row + 1) * width]));
        picked
    }
    let data = match &input.values {
        InputValues::Float32(values) => TensorData::Float32(pick(values, rows, width)),
        InputValues::Float64(values) => TensorData::Float64(pick(values, rows, width)),
        InputValues::Int32(values) => TensorData::Int32(pick(values, rows, width)),
        InputValues::Int64(values) => TensorData::Int64(pick(values, rows, width)),
        InputValues::Bool(values) => TensorData::Bool(pick(values, rows, width)),
    };
    Tensor::try_new(vec![rows.len(), width], data)
}

/// Answers under construction.
struct Answers<'a> {
    plan: &'a ModelPlan,
    /// By output and row; null until answered.
    values: Vec<Vec<Value>>,
    /// None until the row is settled.
    rows: Vec<Option<RowOutcome>>,
    /// How many values per row each output has: 1 unless the model gave more.
    widths: Vec<usize>,
    queue_micros: u64,
    forward_micros: u64,
}

impl<'a> Answers<'a> {
    fn new(plan: &'a ModelPlan, count: usize) -> Answers<'a> {
        Answers {
            plan,
            values: vec![vec![Value::Null; count]; plan.outputs.len()],
            rows: vec![None; count],
            widths: vec![1; plan.outputs.len()],
            queue_micros: 0,
            forward_micros: 0,
        }
    }

    fn open(&self, row: usize) -> bool {
        self.rows[row].is_none()
    }

    fn settle(&mut self, row: usize, status: RowStatus, reason: String) {
        self.rows[row] = Some(RowOutcome { status, reason, wait_reason: None, wait_micros: 0 });
    }

    fn fail(&mut self, row: usize, reason: String) {
        self.settle(row, RowStatus::Failed, reason);
    }

    /// The declared fallback answers, if there is one.
    fn fall_back(&mut self, row: usize, reason: String) {
        let Some(fallback) = &self.plan.fallback else {
            let reason = match &self.plan.fallback_model {
                Some(model) => format!("{reason}; falling back to model `{model}` is not available in this version"),
                None => reason,
            };
            return self.fail(row, reason);
        };
        for ((output, value), values) in self.plan.outputs.iter().zip(fallback).zip(&mut self.values) {
            values[row] = number(output.dtype, *value);
        }
        self.settle(row, RowStatus::Fallback, reason);
    }

    fn take(&mut self, group: &[usize], outcome: Outcome) {
        self.queue_micros += outcome.wait_micros;
        self.forward_micros += outcome.forward_micros;
        for (index, (_, tensor)) in outcome.outputs.iter().enumerate() {
            let width: usize = tensor.row_shape().iter().product();
            self.widths[index] = self.widths[index].max(width);
            for (place, row) in group.iter().enumerate() {
                self.values[index][*row] = match tensor.row_shape() {
                    [] => element(tensor.data(), place),
                    _ => Value::List((place * width..(place + 1) * width).map(|i| element(tensor.data(), i)).collect()),
                };
            }
        }
        for row in group {
            self.rows[*row] = Some(RowOutcome {
                status: RowStatus::Answered,
                reason: String::new(),
                wait_reason: Some(outcome.wait_reason),
                wait_micros: outcome.wait_micros,
            });
        }
    }

    fn finish(mut self) -> Result<Predicted, Failure> {
        let count = self.rows.len();
        let mut arrays: Vec<(String, ArrayRef, Type)> = Vec::new();
        for (index, output) in self.plan.outputs.iter().enumerate() {
            let scalar = output.dtype.value_type();
            let (values, value_type) = match self.widths[index] {
                1 => (&self.values[index], scalar),
                width => {
                    // A fallback is one number; it stands for every element.
                    for value in &mut self.values[index] {
                        if !matches!(value, Value::List(_) | Value::Null) {
                            *value = Value::List(vec![value.clone(); width]);
                        }
                    }
                    (&self.values[index], Type::List(Box::new(scalar)))
                }
            };
            arrays.push((output.name.clone(), Value::to_array(values, &value_type), value_type));
        }
        for post in &self.plan.post {
            let columns: Vec<ArrayRef> = post.reads.iter().map(|read| arrays[*read].1.clone()).collect();
            let array = post.expression.evaluate(&columns, count).map_err(|error| {
                Failure::internal(&format!("the `post` expression `{}` could not be evaluated", post.name), &error)
            })?;
            arrays.push((post.name.clone(), array, post.feature_type.clone()));
        }
        let unsettled = || RowOutcome {
            status: RowStatus::Failed,
            reason: "the row was not answered".to_owned(),
            wait_reason: None,
            wait_micros: 0,
        };
        Ok(Predicted {
            outputs: arrays
                .iter()
                .map(|(name, array, value_type)| convert::from_array(name, array, value_type))
                .collect(),
            rows: self.rows.into_iter().map(|row| row.unwrap_or_else(unsettled)).collect(),
            queue_time: Duration::from_micros(self.queue_micros),
            forward_time: Duration::from_micros(self.forward_micros),
        })
    }
}

fn number(dtype: TensorType, value: f64) -> Value {
    match dtype {
        TensorType::Float32 => Value::Float32(value as f32),
        TensorType::Float64 => Value::Float64(value),
        TensorType::Int32 => Value::Int32(value as i32),
        TensorType::Int64 => Value::Int64(value as i64),
        TensorType::Bool => Value::Bool(value != 0.0),
    }
}

fn element(data: &TensorData, index: usize) -> Value {
    match data {
        TensorData::Float32(values) => Value::Float32(values[index]),
        TensorData::Float64(values) => Value::Float64(values[index]),
        TensorData::Int64(values) => Value::Int64(values[index]),
        TensorData::Int32(values) => Value::Int32(values[index]),
        TensorData::Bool(values) => Value::Bool(values[index]),
    }
}
