//! How many values there are.

use crate::as_of::Times;
use crate::value::{DecodeError, Value};

use super::{Aggregator, Laws, varint};

#[derive(Debug, Clone)]
pub struct Count;

impl Aggregator for Count {
    type State = i64;
    const LAWS: Laws = Laws { invertible: true, idempotent: false };

    fn zero(&self) -> i64 {
        0
    }

    fn push(&self, state: &mut i64, _value: &Value, _times: &Times) {
        *state = state.wrapping_add(1);
    }

    fn merge(&self, into: &mut i64, other: &i64) {
        *into = into.wrapping_add(*other);
    }

    fn unmerge(&self, from: &mut i64, other: &i64) -> bool {
        *from = from.wrapping_sub(*other);
        true
    }

    fn finish(&self, state: &i64) -> Value {
        Value::Int64(*state)
    }

    fn encode(&self, state: &i64, out: &mut Vec<u8>) {
        varint::encode_i64(*state, out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<i64, DecodeError> {
        varint::decode_i64(bytes)
    }
}
