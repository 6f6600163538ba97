//! How many different values: exact while they are few, HyperLogLog beyond.
//!
//! A value is hashed to 40 bits: 12 choose one of 4,096 registers, and the register keeps the longest run of zeros that
//! the other 28 began with. Up to 512 different hashes are kept as they are; more fill the registers. Which of the two
//! forms a state has depends on the values only, and merging takes the union or the maxima, so a state knows nothing of
//! order or repetition. The registers' error is 1.6 % (1.04 / √4096).
//!
//! The estimate is the *improved raw estimator* of Ertl, "New cardinality estimation algorithms for HyperLogLog sketches",
//! 2017, arXiv:1702.01284, algorithm 6: unbiased over the whole range without tables. It uses +, −, ·, / and √ only, which
//! IEEE 754 fixes to the last bit.

use crate::as_of::Times;
use crate::value::{self, DecodeError, Value, take};

use super::{Aggregator, Laws, varint};

const REGISTER_BITS: u32 = 12;
const REGISTERS: usize = 1 << REGISTER_BITS;
/// Bits of the hash behind the register's number.
const RUN_BITS: u32 = 28;
/// What a register holds after 28 zeros.
const RUN_MAX: u8 = RUN_BITS as u8 + 1;
const HASH_BYTES: usize = 5;
/// As many as take no more room than the registers: five bits for each of these, five bytes for each hash.
const SPARSE_MAX: usize = REGISTERS * 5 / 8 / HASH_BYTES;
/// In place of a number of hashes.
const DENSE_MARK: u64 = SPARSE_MAX as u64 + 1;
const DENSE_BYTES: usize = REGISTERS * 5 / 8;

#[derive(Debug, Clone)]
pub struct DistinctCount;

/// The hashes of some values, or what registers keep of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Distinct {
    /// Ascending; at most [`SPARSE_MAX`].
    Sparse(Vec<u64>),
    Dense(Box<[u8; REGISTERS]>),
}

/// The 40 bits of a value: FNV-1a of 64 bits over its canonical encoding, finished by murmur3's 64-bit mixer, without
/// the lowest 24. Integers hash as int64 and floats as float64, so that a column's width does not matter. Fixed for ever:
/// stored states depend on it.
fn hash(value: &Value) -> u64 {
    let mut bytes = Vec::with_capacity(16);
    match value {
        Value::Int32(x) => value::encode(&Value::Int64(i64::from(*x)), &mut bytes),
        Value::Float32(x) => value::encode(&Value::Float64(f64::from(*x)), &mut bytes),
        value => value::encode(value, &mut bytes),
    }
    value::hash(&bytes) >> 24
}

impl Distinct {
    fn insert(&mut self, hash: u64) {
        match self {
            Distinct::Sparse(hashes) => {
                if let Err(at) = hashes.binary_search(&hash) {
                    hashes.insert(at, hash);
                    if hashes.len() > SPARSE_MAX {
                        self.densify();
                    }
                }
            }
            Distinct::Dense(registers) => {
                let register = &mut registers[(hash >> RUN_BITS) as usize];
                let run = (hash << (64 - RUN_BITS)).leading_zeros().min(RUN_BITS) as u8 + 1;
                *register = run.max(*register);
            }
        }
    }

    fn densify(&mut self) {
        if let Distinct::Sparse(hashes) = self {
            let hashes = std::mem::take(hashes);
            *self = Distinct::Dense(Box::new([0; REGISTERS]));
            hashes.into_iter().for_each(|hash| self.insert(hash));
        }
    }
}

impl Aggregator for DistinctCount {
    type State = Distinct;

    fn laws(&self) -> Laws {
        Laws { invertible: false, idempotent: true }
    }

    fn zero(&self) -> Distinct {
        Distinct::Sparse(Vec::new())
    }

    fn push(&self, state: &mut Distinct, value: &Value, _times: &Times) {
        state.insert(hash(value));
    }

    fn merge(&self, into: &mut Distinct, other: &Distinct) {
        match other {
            Distinct::Sparse(hashes) => hashes.iter().for_each(|hash| into.insert(*hash)),
            Distinct::Dense(others) => {
                into.densify();
                if let Distinct::Dense(registers) = into {
                    registers
                        .iter_mut()
                        .zip(others.iter())
                        .for_each(|(register, other)| *register = (*register).max(*other));
                }
            }
        }
    }

    fn unmerge(&self, _from: &mut Distinct, _other: &Distinct) -> bool {
        false
    }

    fn finish(&self, state: &Distinct) -> Value {
        Value::Int64(match state {
            Distinct::Sparse(hashes) => hashes.len() as i64,
            Distinct::Dense(registers) => estimate(registers),
        })
    }

    fn encode(&self, state: &Distinct, out: &mut Vec<u8>) {
        match state {
            Distinct::Sparse(hashes) => {
                varint::encode_u64(hashes.len() as u64, out);
                hashes.iter().for_each(|hash| out.extend_from_slice(&hash.to_be_bytes()[8 - HASH_BYTES..]));
            }
            Distinct::Dense(registers) => {
                varint::encode_u64(DENSE_MARK, out);
                // Eight registers make five bytes, the first in the highest bits.
                for group in registers.chunks_exact(8) {
                    let bits = group.iter().fold(0, |bits, register| bits << 5 | u64::from(*register));
                    out.extend_from_slice(&bits.to_be_bytes()[8 - HASH_BYTES..]);
                }
            }
        }
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Distinct, DecodeError> {
        let five = |bytes: [u8; HASH_BYTES]| bytes.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
        let length = varint::decode_u64(bytes)?;
        if length > DENSE_MARK {
            return Err(DecodeError::Invalid("a set of hashes is larger than any"));
        }
        if length < DENSE_MARK {
            let mut hashes = Vec::new();
            for _ in 0..length {
                let hash = five(take(bytes)?);
                if hashes.last().is_some_and(|last| *last >= hash) {
                    return Err(DecodeError::Invalid("hashes are out of order"));
                }
                hashes.push(hash);
            }
            return Ok(Distinct::Sparse(hashes));
        }
        let packed: [u8; DENSE_BYTES] = take(bytes)?;
        let mut registers = Box::new([0; REGISTERS]);
        for (group, packed) in registers.chunks_exact_mut(8).zip(packed.as_chunks::<HASH_BYTES>().0) {
            let bits = five(*packed);
            for (i, register) in group.iter_mut().enumerate() {
                *register = (bits >> (35 - 5 * i)) as u8 & 31;
            }
        }
        if registers.iter().any(|register| *register > RUN_MAX) || registers.iter().all(|register| *register == 0) {
            return Err(DecodeError::Invalid("no values fill registers so"));
        }
        Ok(Distinct::Dense(registers))
    }
}

/// Ertl's algorithm 6.
fn estimate(registers: &[u8; REGISTERS]) -> i64 {
    /// 1 / (2 ln 2)
    const ALPHA: f64 = 0.721_347_520_444_481_7;
    let mut counts = [0_u32; RUN_MAX as usize + 1];
    registers.iter().for_each(|register| counts[usize::from(*register)] += 1);
    let share = |count: u32| f64::from(count) / REGISTERS as f64;
    let mut z = REGISTERS as f64 * tau(1.0 - share(counts[usize::from(RUN_MAX)]));
    for count in counts[1..usize::from(RUN_MAX)].iter().rev() {
        z = 0.5 * (z + f64::from(*count));
    }
    z += REGISTERS as f64 * sigma(share(counts[0]));
    (ALPHA * (REGISTERS * REGISTERS) as f64 / z).round() as i64
}

/// x + Σ x^(2^k) · 2^(k-1), the part of registers that are still empty.
fn sigma(x: f64) -> f64 {
    let (mut x, mut y, mut z) = (x, 1.0, x);
    // An x of 1 has no end; its registers are all empty, and decoding and densifying leave none so.
    while x < 1.0 {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before {
            break;
        }
    }
    z
}

/// A third of 1 − x − Σ (1 − x^(2^-k))² · 2^-k, the part of registers that are full.
fn tau(x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut x, mut y, mut z) = (x, 1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z == before {
            return z / 3.0;
        }
    }
}

#[cfg(test)]
mod tests;
