//! Whether a model computes what it should, and each row for itself. Pure: rows, tolerances and comparisons; whoever holds
//! the model runs them.
//!
//! Two things are found out before a version is let near requests. It must give for golden rows what the training process
//! got for them. And a row must come out the same whatever else is in its batch: batches are put together of rows that
//! have nothing to do with each other, and padded.

use std::collections::BTreeMap;

use crate::model::{ModelSpec, OutputSpec};
use crate::tensor::{Dtype, Tensor, TensorBatch, TensorData};

/// How far two outputs may be apart: `|a - b| <= atol + rtol * |b|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    pub rtol: f64,
    pub atol: f64,
}

/// By dtype. Integers and booleans are exact, unless it is said otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tolerances {
    said: BTreeMap<&'static str, Tolerance>,
}

/// Kernels add up in another order for another batch size, on another processor, and with other threads. Sums of some
/// thousand terms differ by this much, and a wrong model by far more.
const FLOAT32: Tolerance = Tolerance { rtol: 1e-4, atol: 1e-5 };
const FLOAT64: Tolerance = Tolerance { rtol: 1e-7, atol: 1e-7 };
const EXACT: Tolerance = Tolerance { rtol: 0.0, atol: 0.0 };

/// Rows made up for a model that brought none, or too few to fill a batch.
pub const MADE_UP_ROWS: usize = 16;

impl Tolerances {
    pub fn with(mut self, dtype: Dtype, tolerance: Tolerance) -> Tolerances {
        self.said.insert(dtype.name(), tolerance);
        self
    }

    pub fn of(&self, dtype: Dtype) -> Tolerance {
        let usual = match dtype {
            Dtype::Float32 => FLOAT32,
            Dtype::Float64 => FLOAT64,
            Dtype::Int32 | Dtype::Int64 | Dtype::Bool => EXACT,
        };
        self.said.get(dtype.name()).copied().unwrap_or(usual)
    }
}

/// The first number that is not what it should be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "output `{output}` of row {row} is {found}, expected {expected} (rtol {}, atol {} for {dtype})",
    tolerance.rtol, tolerance.atol
)]
pub struct Difference {
    pub output: String,
    pub row: usize,
    pub found: f64,
    pub expected: f64,
    pub dtype: Dtype,
    pub tolerance: Tolerance,
}

/// Compares the outputs of rows with what they should be. `rows` are their numbers, for the message.
pub fn compare(
    outputs: &[OutputSpec],
    found: &[Tensor],
    expected: &[Tensor],
    rows: &[usize],
    tolerances: &Tolerances,
) -> Result<(), Difference> {
    for ((spec, found), expected) in outputs.iter().zip(found).zip(expected) {
        let tolerance = tolerances.of(spec.dtype);
        let width: usize = expected.row_shape().iter().product();
        let differs = (0..expected.data().len()).find(|index| {
            // A shape that differs is a number that is not there.
            let of = |tensor: &Tensor| number(tensor.data(), *index).unwrap_or(f64::NAN);
            found.data().len() != expected.data().len() || !is_close(of(found), of(expected), tolerance)
        });
        if let Some(index) = differs {
            let place = index / width.max(1);
            return Err(Difference {
                output: spec.name.clone(),
                row: rows.get(place).copied().unwrap_or(place),
                found: number(found.data(), index).unwrap_or(f64::NAN),
                expected: number(expected.data(), index).unwrap_or(f64::NAN),
                dtype: spec.dtype,
                tolerance,
            });
        }
    }
    Ok(())
}

/// NaN is equal to NaN and to nothing else, as are the infinities.
fn is_close(found: f64, expected: f64, tolerance: Tolerance) -> bool {
    if found.is_nan() || expected.is_nan() || found.is_infinite() || expected.is_infinite() {
        return (found.is_nan() && expected.is_nan()) || found == expected;
    }
    (found - expected).abs() <= tolerance.atol + tolerance.rtol * expected.abs()
}

/// Large integers lose their last digits here; whoever compares those exactly has `Tensor`'s own equality.
fn number(data: &TensorData, index: usize) -> Option<f64> {
    match data {
        TensorData::Float32(values) => values.get(index).map(|value| f64::from(*value)),
        TensorData::Float64(values) => values.get(index).copied(),
        TensorData::Int64(values) => values.get(index).map(|value| *value as f64),
        TensorData::Int32(values) => values.get(index).map(|value| f64::from(*value)),
        TensorData::Bool(values) => values.get(index).map(|value| f64::from(u8::from(*value))),
    }
}

/// What integers of rows that are made up may be: an index into a table, most often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Integers {
    Small,
    /// For models that fail on an index beyond the first.
    Zero,
}

/// A row of inputs as the declaration would let it come, the same for the same seed.
pub fn make_up(spec: &ModelSpec, seed: u64, integers: Integers) -> TensorBatch {
    let mut state = seed;
    // splitmix64: a few lines, and the same on every machine.
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let mut unit = move || (next() >> 11) as f64 / (1_u64 << 53) as f64;
    let mut row = Vec::with_capacity(spec.inputs.len());
    for input in &spec.inputs {
        let zeros = Tensor::zeros(input.dtype, 1, &input.row_shape);
        let shape = zeros.shape().to_vec();
        let count = zeros.data().len();
        let mut index = || if integers == Integers::Zero { 0 } else { i32::from(unit() < 0.5) };
        let data = match input.dtype {
            Dtype::Int64 => TensorData::Int64((0..count).map(|_| i64::from(index())).collect()),
            Dtype::Int32 => TensorData::Int32((0..count).map(|_| index()).collect()),
            Dtype::Bool => TensorData::Bool((0..count).map(|_| unit() < 0.5).collect()),
            Dtype::Float32 => TensorData::Float32((0..count).map(|_| (unit() * 2.0 - 1.0) as f32).collect()),
            Dtype::Float64 => TensorData::Float64((0..count).map(|_| unit() * 2.0 - 1.0).collect()),
        };
        // As many elements as the zeros of the same shape.
        let tensor = Tensor::try_new(shape, data).unwrap_or(zeros);
        row.push((input.name.clone(), tensor));
    }
    row
}

/// Joins rows into one batch, in order. The rows have the same inputs.
pub fn join(rows: &[&TensorBatch]) -> TensorBatch {
    let Some(first) = rows.first() else { return Vec::new() };
    let joined = first.iter().enumerate().filter_map(|(place, (name, _))| {
        let parts: Vec<&Tensor> = rows.iter().filter_map(|row| row.get(place)).map(|(_, tensor)| tensor).collect();
        Some((name.clone(), Tensor::concat(&parts).ok()?))
    });
    joined.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::InputSpec;

    fn outputs() -> Vec<OutputSpec> {
        vec![OutputSpec { name: "p".into(), dtype: Dtype::Float32 }]
    }

    fn floats(values: &[f32]) -> Vec<Tensor> {
        vec![Tensor::try_new(vec![values.len()], TensorData::Float32(values.to_vec())).unwrap()]
    }

    #[test]
    fn outputs_are_compared_within_the_tolerance_of_their_dtype() {
        let check = |found: &[f32], expected: &[f32], tolerances: &Tolerances| {
            compare(&outputs(), &floats(found), &floats(expected), &[4, 7], tolerances)
        };
        let usual = Tolerances::default();
        assert_eq!(check(&[0.5, 1_000.0], &[0.500_01, 1_000.05], &usual), Ok(()));
        assert_eq!(check(&[f32::NAN, f32::INFINITY], &[f32::NAN, f32::INFINITY], &usual), Ok(()));
        assert!(check(&[f32::NAN], &[0.5], &usual).is_err());
        assert!(check(&[0.5], &[f32::INFINITY], &usual).is_err());
        assert!(check(&[0.5], &[0.5, 0.5], &usual).is_err(), "too few of them");
        let difference = check(&[0.5, 0.25], &[0.5, 0.5], &usual).unwrap_err();
        assert_eq!(
            difference.to_string(),
            "output `p` of row 7 is 0.25, expected 0.5 (rtol 0.0001, atol 0.00001 for float32)"
        );
        let loose = Tolerances::default().with(Dtype::Float32, Tolerance { rtol: 0.0, atol: 0.3 });
        assert_eq!(check(&[0.5, 0.25], &[0.5, 0.5], &loose), Ok(()));
        assert_eq!(usual.of(Dtype::Int64), EXACT);
    }

    #[test]
    fn made_up_rows_are_the_same_for_the_same_seed_and_join_to_a_batch() {
        let spec = ModelSpec {
            inputs: vec![
                InputSpec::features("dense", Dtype::Float32, 3),
                InputSpec::features("carrier", Dtype::Int64, 1),
            ],
            outputs: outputs(),
        };
        let rows: Vec<TensorBatch> = (0..4).map(|seed| make_up(&spec, seed, Integers::Small)).collect();
        assert_eq!(rows[1], make_up(&spec, 1, Integers::Small));
        assert_ne!(rows[0], rows[1]);
        let batch = join(&rows.iter().collect::<Vec<_>>());
        let (tensors, count) = spec.arrange(batch).unwrap();
        assert_eq!((count, tensors[0].slice_rows(1..2)), (4, rows[1][0].1.clone()));
        let TensorData::Float32(values) = tensors[0].data() else { panic!() };
        assert!(values.iter().all(|value| (-1.0..1.0).contains(value)));
        let zero = make_up(&spec, 1, Integers::Zero);
        assert_eq!(zero[1].1.data(), &TensorData::Int64(vec![0]));
    }
}
