//! The first and the last values by the time they happened.
//!
//! Values are ordered as rows are: by event time, created time with null lowest, sequence, and, where all of these tie, as
//! rows of files may, by the values themselves. So a tie is decided by what is in the rows and never by who came first.

use std::cmp::Ordering;

use crate::as_of::Times;
use crate::time::Micros;
use crate::value::{self, DecodeError, Type, Value, take};

use super::{Aggregator, Laws, canonical, decode_canonical, varint};

/// A value and its place in the order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped {
    event_time: Micros,
    created_time: Option<Micros>,
    sequence: u64,
    value: Value,
}

impl Stamped {
    fn compare_to(&self, value: &Value, times: &Times) -> Ordering {
        let key = (self.event_time, self.created_time, self.sequence);
        key.cmp(&(times.event_time, times.created_time, times.position.sequence))
            .then_with(|| self.value.compare(value))
    }

    fn compare(&self, other: &Stamped) -> Ordering {
        let key = |stamped: &Stamped| (stamped.event_time, stamped.created_time, stamped.sequence);
        key(self).cmp(&key(other)).then_with(|| self.value.compare(&other.value))
    }
}

/// The few values nearest to one end of the order. The state holds them from that end on.
#[derive(Debug, Clone)]
pub struct Ordered {
    /// How a value compares with those it comes before in the state: greater for the last ones, less for the first.
    pub comes_first: Ordering,
    /// How many are kept.
    pub kept: usize,
    /// Whether the answer is a list of them, or the one.
    pub is_list: bool,
    pub input: Type,
}

impl Ordered {
    fn insert(&self, state: &mut Vec<Stamped>, at: usize, stamped: Stamped) {
        state.truncate(self.kept - 1);
        state.insert(at, stamped);
    }
}

impl Aggregator for Ordered {
    type State = Vec<Stamped>;

    fn laws(&self) -> Laws {
        // Rows of files may be wholly alike, and two of them are two values.
        Laws { invertible: false, idempotent: self.kept == 1 }
    }

    fn zero(&self) -> Vec<Stamped> {
        Vec::new()
    }

    fn push(&self, state: &mut Vec<Stamped>, value: &Value, times: &Times) {
        let at = state.partition_point(|stamped| stamped.compare_to(value, times) != self.comes_first.reverse());
        if at < self.kept {
            let Times { event_time, created_time, position, .. } = *times;
            let stamped = Stamped { event_time, created_time, sequence: position.sequence, value: canonical(value) };
            self.insert(state, at, stamped);
        }
    }

    fn merge(&self, into: &mut Vec<Stamped>, other: &Vec<Stamped>) {
        for stamped in other {
            let at = into.partition_point(|known| known.compare(stamped) != self.comes_first.reverse());
            // The rest of the others come after this one.
            if at >= self.kept {
                break;
            }
            self.insert(into, at, stamped.clone());
        }
    }

    fn unmerge(&self, _from: &mut Vec<Stamped>, _other: &Vec<Stamped>) -> bool {
        false
    }

    fn finish(&self, state: &Vec<Stamped>) -> Value {
        match (state.first(), self.is_list) {
            (None, _) => Value::Null,
            (Some(first), false) => first.value.clone(),
            (Some(_), true) => Value::List(state.iter().map(|stamped| stamped.value.clone()).collect()),
        }
    }

    fn encode(&self, state: &Vec<Stamped>, out: &mut Vec<u8>) {
        varint::encode_u64(state.len() as u64, out);
        for stamped in state {
            out.extend_from_slice(&value::encode_i64(stamped.event_time));
            out.push(u8::from(stamped.created_time.is_some()));
            out.extend(stamped.created_time.map(value::encode_i64).into_iter().flatten());
            varint::encode_u64(stamped.sequence, out);
            value::encode(&stamped.value, out);
        }
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Vec<Stamped>, DecodeError> {
        let length = varint::decode_u64(bytes)?;
        if length > self.kept as u64 {
            return Err(DecodeError::Invalid("a state keeps more values than its aggregate"));
        }
        let mut state: Vec<Stamped> = Vec::new();
        for _ in 0..length {
            let event_time = value::decode_i64(take(bytes)?);
            let created_time = match take(bytes)? {
                [0] => None,
                [1] => Some(value::decode_i64(take(bytes)?)),
                _ => return Err(DecodeError::Invalid("a null mark is neither 0 nor 1")),
            };
            let sequence = varint::decode_u64(bytes)?;
            let value = decode_canonical(bytes, &self.input)?;
            let stamped = Stamped { event_time, created_time, sequence, value };
            if state.last().is_some_and(|last| last.compare(&stamped) == self.comes_first.reverse()) {
                return Err(DecodeError::Invalid("the values of a state are out of order"));
            }
            state.push(stamped);
        }
        Ok(state)
    }
}
