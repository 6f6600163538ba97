//! From features to input tensors: the one encoder of training and serving.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type};

use super::{Assembled, ModelPlan, ServicePlan, TensorPlan, TensorType};
use crate::catalog::Missing;
use crate::value::Type;

/// The input tensors of a model for some rows, in the order declared.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedModelInputs {
    pub inputs: Vec<EncodedInput>,
    /// Rows that have no tensor, because a feature is null and `missing` is `refuse`, with the reason. Their place in the
    /// tensors holds zeros.
    pub refused: Vec<(usize, String)>,
}

/// One tensor of shape [rows, width], row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedInput {
    pub name: String,
    pub width: usize,
    pub values: InputValues,
}

#[derive(Debug, Clone, PartialEq)]
pub enum InputValues {
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Bool(Vec<bool>),
}

/// One number on its way into a tensor. Integers stay integers, so that no digit is lost on the way to int64.
#[derive(Clone, Copy)]
enum Number {
    Int(i64),
    Float(f64),
}

impl ModelPlan {
    pub fn encode(&self, features: &Assembled, rows: usize) -> EncodedModelInputs {
        let mut refused: Vec<(usize, String)> = Vec::new();
        let inputs =
            self.inputs.iter().map(|input| input.encode(&self.service, features, rows, &mut refused)).collect();
        refused.sort_by_key(|(row, _)| *row);
        refused.dedup_by_key(|(row, _)| *row);
        EncodedModelInputs { inputs, refused }
    }
}

impl TensorPlan {
    fn encode(
        &self,
        service: &ServicePlan,
        features: &Assembled,
        rows: usize,
        refused: &mut Vec<(usize, String)>,
    ) -> EncodedInput {
        let mut values = match self.dtype {
            TensorType::Float32 => InputValues::Float32(vec![0.0; rows * self.width]),
            TensorType::Float64 => InputValues::Float64(vec![0.0; rows * self.width]),
            TensorType::Int32 => InputValues::Int32(vec![0; rows * self.width]),
            TensorType::Int64 => InputValues::Int64(vec![0; rows * self.width]),
            TensorType::Bool => InputValues::Bool(vec![false; rows * self.width]),
        };
        let mut at = 0;
        for feature in &self.features {
            let output = &service.outputs[*feature];
            let column = &features.columns[*feature];
            let width = if let Type::Vector(n) = output.feature_type { n as usize } else { 1 };
            for row in 0..rows {
                if column.is_null(row) {
                    let filler = match self.missing {
                        Missing::Refuse => {
                            refused.push((row, format!("feature `{}` is null and `missing` is `refuse`", output.name)));
                            continue;
                        }
                        Missing::Nan => f64::NAN,
                        Missing::Value(value) => value,
                    };
                    (0..width).for_each(|i| values.set(row * self.width + at + i, Number::Float(filler)));
                } else if width == 1 && !matches!(output.feature_type, Type::Vector(_)) {
                    values.set(row * self.width + at, number(column, row, &output.feature_type));
                } else {
                    let items = column.as_fixed_size_list().value(row);
                    let items = items.as_primitive::<Float32Type>();
                    for (i, item) in items.values().iter().enumerate() {
                        values.set(row * self.width + at + i, Number::Float(f64::from(*item)));
                    }
                }
            }
            at += width;
        }
        EncodedInput { name: self.name.clone(), width: self.width, values }
    }
}

fn number(column: &ArrayRef, row: usize, feature_type: &Type) -> Number {
    match feature_type {
        Type::Bool => Number::Int(column.as_boolean().value(row).into()),
        Type::Int32 => Number::Int(column.as_primitive::<Int32Type>().value(row).into()),
        Type::Int64 => Number::Int(column.as_primitive::<Int64Type>().value(row)),
        Type::Float32 => Number::Float(column.as_primitive::<Float32Type>().value(row).into()),
        Type::Float64 => Number::Float(column.as_primitive::<Float64Type>().value(row)),
        Type::Decimal { scale, .. } => {
            let unscaled = column.as_primitive::<Decimal128Type>().value(row);
            Number::Float(unscaled as f64 / 10f64.powi(i32::from(*scale)))
        }
        // The compiler refuses every other type in a tensor.
        _ => Number::Float(f64::NAN),
    }
}

impl InputValues {
    fn set(&mut self, index: usize, number: Number) {
        match (self, number) {
            (InputValues::Float32(values), Number::Int(x)) => values[index] = x as f32,
            (InputValues::Float32(values), Number::Float(x)) => values[index] = x as f32,
            (InputValues::Float64(values), Number::Int(x)) => values[index] = x as f64,
            (InputValues::Float64(values), Number::Float(x)) => values[index] = x,
            (InputValues::Int32(values), Number::Int(x)) => values[index] = x as i32,
            (InputValues::Int32(values), Number::Float(x)) => values[index] = x as i32,
            (InputValues::Int64(values), Number::Int(x)) => values[index] = x,
            (InputValues::Int64(values), Number::Float(x)) => values[index] = x as i64,
            (InputValues::Bool(values), Number::Int(x)) => values[index] = x != 0,
            (InputValues::Bool(values), Number::Float(x)) => values[index] = x != 0.0,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            InputValues::Float32(values) => values.len(),
            InputValues::Float64(values) => values.len(),
            InputValues::Int32(values) => values.len(),
            InputValues::Int64(values) => values.len(),
            InputValues::Bool(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
