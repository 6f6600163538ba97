//! The k largest values, with their repetitions.

use std::cmp::Ordering;

use crate::as_of::Times;
use crate::value::{self, DecodeError, Type, Value};

use super::{Aggregator, Laws, canonical, decode_canonical, varint};

/// The state is the values, largest first. NaN is the greatest float, as everywhere.
#[derive(Debug, Clone)]
pub struct TopK {
    pub k: usize,
    pub input: Type,
}

impl TopK {
    /// Where a value comes, if it is among the k largest.
    fn place(&self, state: &[Value], value: &Value) -> Option<usize> {
        let at = state.partition_point(|known| known.compare(value) != Ordering::Less);
        (at < self.k).then_some(at)
    }
}

impl Aggregator for TopK {
    type State = Vec<Value>;

    fn laws(&self) -> Laws {
        Laws { invertible: false, idempotent: self.k == 1 }
    }

    fn zero(&self) -> Vec<Value> {
        Vec::new()
    }

    fn push(&self, state: &mut Vec<Value>, value: &Value, _times: &Times) {
        if let Some(at) = self.place(state, value) {
            state.truncate(self.k - 1);
            state.insert(at, canonical(value));
        }
    }

    fn merge(&self, into: &mut Vec<Value>, other: &Vec<Value>) {
        for value in other {
            // The rest of the others are no larger.
            let Some(at) = self.place(into, value) else { break };
            into.truncate(self.k - 1);
            into.insert(at, value.clone());
        }
    }

    fn unmerge(&self, _from: &mut Vec<Value>, _other: &Vec<Value>) -> bool {
        false
    }

    fn finish(&self, state: &Vec<Value>) -> Value {
        if state.is_empty() { Value::Null } else { Value::List(state.clone()) }
    }

    fn encode(&self, state: &Vec<Value>, out: &mut Vec<u8>) {
        varint::encode_u64(state.len() as u64, out);
        state.iter().for_each(|value| value::encode(value, out));
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Vec<Value>, DecodeError> {
        let length = varint::decode_u64(bytes)?;
        if length > self.k as u64 {
            return Err(DecodeError::Invalid("a state keeps more values than its aggregate"));
        }
        let mut state: Vec<Value> = Vec::new();
        for _ in 0..length {
            let value = decode_canonical(bytes, &self.input)?;
            if state.last().is_some_and(|last| last.compare(&value) == Ordering::Less) {
                return Err(DecodeError::Invalid("the values of a state are out of order"));
            }
            state.push(value);
        }
        Ok(state)
    }
}
