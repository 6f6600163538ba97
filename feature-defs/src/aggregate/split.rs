//! `by`: an aggregate of each part of the values, apart by what an expression says of their rows.

use crate::as_of::Times;
use crate::value::{DecodeError, Type, Value};

use super::buckets::Buckets;
use super::{Aggregate, Aggregator, Laws, State, varint};

/// An aggregate for each bucket. Its input is a struct of the bucket's number, which is found once for each row, and the
/// value; its answer is a map from what the buckets are called.
#[derive(Debug, Clone)]
pub struct Split {
    pub part: Aggregate,
    pub buckets: Buckets,
}

impl Split {
    /// The fields of the input.
    pub fn input(&self) -> Type {
        let value = self.part.input().cloned().unwrap_or(Type::Bool);
        Type::Struct(vec![("bucket".to_string(), Type::Int32), ("of".to_string(), value)])
    }

    /// The state of a bucket, made when it is not there.
    fn part_of<'s>(&self, state: &'s mut Vec<(u32, State)>, bucket: u32) -> &'s mut State {
        let at = match state.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
            Ok(at) => at,
            Err(at) => {
                state.insert(at, (bucket, self.part.zero()));
                at
            }
        };
        &mut state[at].1
    }
}

impl Aggregator for Split {
    /// The states that are not empty, ascending by bucket.
    type State = Vec<(u32, State)>;

    fn laws(&self) -> Laws {
        self.part.laws()
    }

    fn zero(&self) -> Vec<(u32, State)> {
        Vec::new()
    }

    fn push(&self, state: &mut Vec<(u32, State)>, value: &Value, times: &Times) {
        let Value::Struct(fields) = value else { unreachable!("an aggregate that is split was given {value:?}") };
        let [bucket, value] = &fields[..] else { unreachable!("a bucket and a value, not {fields:?}") };
        if value.is_null() {
            return;
        }
        // Raw events are read back from a store: a bucket that there is not, or none, is no reason to fail.
        let bucket = match bucket {
            Value::Int32(bucket) => u32::try_from(*bucket).unwrap_or(u32::MAX).min(self.buckets.other()),
            _ => self.buckets.other(),
        };
        let part = self.part_of(state, bucket);
        self.part.push(part, value, times);
        // What was owed may be paid now.
        if self.part.laws().invertible && self.part.is_empty(part) {
            state.retain(|(known, _)| *known != bucket);
        }
    }

    fn merge(&self, into: &mut Vec<(u32, State)>, other: &Vec<(u32, State)>) {
        for (bucket, other) in other {
            self.part.merge(self.part_of(into, *bucket), other);
        }
        into.retain(|(_, state)| !self.part.is_empty(state));
    }

    fn unmerge(&self, from: &mut Vec<(u32, State)>, other: &Vec<(u32, State)>) -> bool {
        if !self.part.laws().invertible {
            return false;
        }
        for (bucket, other) in other {
            self.part.unmerge(self.part_of(from, *bucket), other);
        }
        from.retain(|(_, state)| !self.part.is_empty(state));
        true
    }

    fn finish(&self, state: &Vec<(u32, State)>) -> Value {
        let nothing = self.part.finish(&self.part.zero());
        // Of no values at all there is nothing to say, unless it is that there are 0.
        if state.is_empty() && nothing.is_null() {
            return Value::Null;
        }
        let mut parts: Vec<(Box<str>, Value)> =
            self.buckets.labels().into_iter().map(|label| (label.into(), nothing.clone())).collect();
        for (bucket, state) in state {
            parts[*bucket as usize].1 = self.part.finish(state);
        }
        parts.sort_by(|(a, _), (b, _)| a.cmp(b));
        Value::Map(parts)
    }

    fn encode(&self, state: &Vec<(u32, State)>, out: &mut Vec<u8>) {
        varint::encode_u64(state.len() as u64, out);
        for (bucket, state) in state {
            varint::encode_u64(u64::from(*bucket), out);
            self.part.encode(state, out);
        }
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Vec<(u32, State)>, DecodeError> {
        let length = varint::decode_u64(bytes)?;
        let mut states: Vec<(u32, State)> = Vec::new();
        for _ in 0..length {
            let bucket = varint::decode_u64(bytes)?;
            if bucket > u64::from(self.buckets.other()) {
                return Err(DecodeError::Invalid("a state is of no bucket of its aggregate"));
            }
            let bucket = bucket as u32;
            if states.last().is_some_and(|(last, _)| *last >= bucket) {
                return Err(DecodeError::Invalid("the buckets of a state are out of order"));
            }
            let state = self.part.decode(bytes)?;
            if self.part.is_empty(&state) {
                return Err(DecodeError::Invalid("an empty bucket is kept"));
            }
            states.push((bucket, state));
        }
        Ok(states)
    }
}
