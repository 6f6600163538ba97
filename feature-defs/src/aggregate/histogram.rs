//! How many values lie in each of the declared buckets.

use crate::as_of::Times;
use crate::value::{DecodeError, Value};

use super::buckets::Buckets;
use super::counts::Counts;
use super::{Aggregator, Laws};

#[derive(Debug, Clone)]
pub struct Histogram {
    pub buckets: Buckets,
}

impl Aggregator for Histogram {
    type State = Counts;

    fn laws(&self) -> Laws {
        Laws { invertible: true, idempotent: false }
    }

    fn zero(&self) -> Counts {
        Counts::default()
    }

    fn push(&self, state: &mut Counts, value: &Value, _times: &Times) {
        state.push(self.buckets.find(value) as i32);
    }

    fn merge(&self, into: &mut Counts, other: &Counts) {
        into.merge(other);
    }

    fn unmerge(&self, from: &mut Counts, other: &Counts) -> bool {
        from.unmerge(other);
        true
    }

    fn finish(&self, state: &Counts) -> Value {
        let Some(counted) = state.settled().filter(|counted| !counted.is_empty()) else { return Value::Null };
        let mut counts = vec![0; self.buckets.len()];
        counted.iter().for_each(|(bucket, count)| counts[*bucket as usize] = *count);
        Value::List(counts.into_iter().map(Value::Int64).collect())
    }

    fn encode(&self, state: &Counts, out: &mut Vec<u8>) {
        state.encode(out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Counts, DecodeError> {
        Counts::decode(bytes, |bucket| (0..self.buckets.len() as i32).contains(&bucket))
    }
}
