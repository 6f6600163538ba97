//! The least or the greatest value.

use std::cmp::Ordering;

use crate::as_of::Times;
use crate::value::{self, DecodeError, Type, Value, canonical_f32, canonical_f64, take};

use super::{Aggregator, Laws};

/// The state is the value, null before the first.
#[derive(Debug, Clone)]
pub struct Extremum {
    /// How a value that replaces the state compares with it: less for the minimum, greater for the maximum.
    pub replaces: Ordering,
    /// The type of the values. NaN is the greatest float, as everywhere.
    pub input: Type,
}

impl Aggregator for Extremum {
    type State = Value;
    const LAWS: Laws = Laws { invertible: false, idempotent: true };

    fn zero(&self) -> Value {
        Value::Null
    }

    fn push(&self, state: &mut Value, value: &Value, _times: &Times) {
        if state.is_null() || value.compare(state) == self.replaces {
            *state = match value {
                Value::Float32(x) => Value::Float32(canonical_f32(*x)),
                Value::Float64(x) => Value::Float64(canonical_f64(*x)),
                value => value.clone(),
            };
        }
    }

    fn merge(&self, into: &mut Value, other: &Value) {
        if !other.is_null() {
            self.push(into, other, &Times::NONE);
        }
    }

    fn unmerge(&self, _from: &mut Value, _other: &Value) -> bool {
        false
    }

    fn finish(&self, state: &Value) -> Value {
        state.clone()
    }

    fn encode(&self, state: &Value, out: &mut Vec<u8>) {
        value::encode_nullable(state, out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Value, DecodeError> {
        let state = match take(bytes)? {
            [0] => return Ok(Value::Null),
            [1] => value::decode(bytes, &self.input)?,
            _ => return Err(DecodeError::Invalid("a null mark is neither 0 nor 1")),
        };
        let canonical = match state {
            Value::Float32(x) => x.to_bits() == canonical_f32(x).to_bits(),
            Value::Float64(x) => x.to_bits() == canonical_f64(x).to_bits(),
            _ => true,
        };
        if canonical { Ok(state) } else { Err(DecodeError::Invalid("a float is -0.0 or a NaN other than ours")) }
    }
}

#[cfg(test)]
mod tests;
