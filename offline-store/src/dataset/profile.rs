//! Counts of what a feature's values are, taken while they pass.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{ArrowPrimitiveType, Float32Type, Float64Type, Int32Type, Int64Type, Schema};
use feature_defs::aggregate::{Aggregate, Function, State};
use feature_defs::as_of::Times;
use feature_defs::plan::ServicePlan;
use feature_defs::value::{Type, Value};

use super::Profile;

/// The profiles of all features of a service that are columns of a table.
pub(super) struct Profiler {
    features: Vec<Feature>,
}

struct Feature {
    name: String,
    column: usize,
    value_type: Type,
    profile: Profile,
    /// Exact, so that the mean does not depend on batches.
    mean: Option<(Aggregate, State)>,
}

impl Profiler {
    pub fn new(schema: &Schema, service: &ServicePlan) -> Profiler {
        let feature = |name: &str, value_type: &Type| {
            let (column, _) = schema.column_with_name(name)?;
            let mean = || {
                let aggregate = Aggregate::new(Function::Mean, Some(value_type.clone())).ok()?;
                let zero = aggregate.zero();
                Some((aggregate, zero))
            };
            let mean = if value_type.is_numeric() { mean() } else { None };
            Some(Feature {
                name: name.into(),
                column,
                value_type: value_type.clone(),
                profile: Profile::default(),
                mean,
            })
        };
        let outputs = service.outputs.iter();
        Profiler { features: outputs.filter_map(|output| feature(&output.name, &output.feature_type)).collect() }
    }

    pub fn add(&mut self, batch: &RecordBatch) {
        self.features.iter_mut().for_each(|feature| feature.add(batch.column(feature.column)));
    }

    pub fn finish(self) -> impl Iterator<Item = (String, Profile)> {
        self.features.into_iter().map(Feature::finish)
    }
}

impl Feature {
    fn add(&mut self, column: &ArrayRef) {
        self.profile.rows += column.len() as u64;
        self.profile.nulls += column.null_count() as u64;
        if self.mean.is_none() {
            return;
        }
        match self.value_type {
            Type::Float64 => self.add_numbers::<Float64Type>(column, |x| x, Value::Float64),
            Type::Float32 => self.add_numbers::<Float32Type>(column, f64::from, Value::Float32),
            Type::Int64 => self.add_numbers::<Int64Type>(column, |x| x as f64, Value::Int64),
            Type::Int32 => self.add_numbers::<Int32Type>(column, f64::from, Value::Int32),
            _ => {
                for row in 0..column.len() {
                    let value = Value::from_array(column, row, &self.value_type);
                    if let Some(number) = as_number(&value, &self.value_type) {
                        self.add_number(number, value);
                    }
                }
            }
        }
    }

    fn add_numbers<T: ArrowPrimitiveType>(
        &mut self,
        column: &ArrayRef,
        number: impl Fn(T::Native) -> f64,
        value: impl Fn(T::Native) -> Value,
    ) {
        let array = column.as_primitive::<T>();
        match array.nulls() {
            None => array.values().iter().for_each(|x| self.add_number(number(*x), value(*x))),
            Some(nulls) => {
                for (start, end) in nulls.valid_slices() {
                    array.values()[start..end].iter().for_each(|x| self.add_number(number(*x), value(*x)));
                }
            }
        }
    }

    fn add_number(&mut self, number: f64, value: Value) {
        let profile = &mut self.profile;
        if number.is_nan() {
            profile.nans += 1;
        } else if number.is_infinite() {
            profile.infinities += 1;
        } else {
            profile.min = Some(profile.min.map_or(number, |min| min.min(number)));
            profile.max = Some(profile.max.map_or(number, |max| max.max(number)));
            if let Some((aggregate, state)) = &mut self.mean {
                aggregate.push(state, &value, &Times::NONE);
            }
        }
    }

    fn finish(self) -> (String, Profile) {
        let mut profile = self.profile;
        if let Some((aggregate, state)) = &self.mean {
            profile.mean = as_number(&aggregate.finish(state), &self.value_type);
        }
        (self.name, profile)
    }
}

fn as_number(value: &Value, value_type: &Type) -> Option<f64> {
    Some(match (value, value_type) {
        (Value::Int32(x), _) => f64::from(*x),
        (Value::Int64(x), _) => *x as f64,
        (Value::Float32(x), _) => f64::from(*x),
        (Value::Float64(x), _) => *x,
        (Value::Decimal(x), Type::Decimal { scale, .. }) => *x as f64 / 10f64.powi(i32::from(*scale)),
        _ => return None,
    })
}
