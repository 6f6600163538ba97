//! What of the served rows is logged, and what stands for values that must not be written down.

use chrono::NaiveDate;
use feature_defs::forgotten::KeyHash;
use feature_defs::plan::{EncodedInput, InputValues};
use sha2::{Digest, Sha256};

/// Of a row's encoded inputs: the first half of a SHA-256.
pub const TENSOR_DIGEST_BYTES: usize = 16;

/// Chooses entity-key tuples by their hash, others every day. Gateways of a project choose the same ones, so whatever is
/// served for a chosen tuple on that day is logged by whoever serves it.
#[derive(Debug, Clone)]
pub struct Sampler {
    seeded: Sha256,
    /// Chosen is what hashes below; none at 0, everything at 2^64.
    limit: u128,
}

impl Sampler {
    pub fn new(project: &str, day: NaiveDate, share: f64) -> Sampler {
        let mut seeded = Sha256::new();
        seeded.update(b"coeval serving log 1\0");
        seeded.update((project.len() as u64).to_le_bytes());
        seeded.update(project.as_bytes());
        seeded.update(day.to_string().as_bytes());
        // 2^64 is a power of two: the product is exact.
        Sampler { seeded, limit: (share.clamp(0.0, 1.0) * 18_446_744_073_709_551_616.0) as u128 }
    }

    /// `key` is the encoding of all entity keys of a row.
    pub fn takes(&self, key: &[u8]) -> bool {
        if self.limit == 0 {
            return false;
        }
        let mut hash = self.seeded.clone();
        hash.update(key);
        let digest = hash.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u128::from(u64::from_le_bytes(first)) < self.limit
    }
}

/// What stands for a value of a sensitive column: HMAC-SHA-256 under the project's key, apart for each column. `value` is its
/// canonical encoding.
pub fn hashed(key: &[u8], column: &str, value: &[u8]) -> String {
    KeyHash::of(key, column, value).to_string()
}

/// Names what a model was given for one row, to the bit.
pub fn tensor_digest(inputs: &[EncodedInput], row: usize) -> [u8; TENSOR_DIGEST_BYTES] {
    let mut hash = Sha256::new();
    for input in inputs {
        let range = row * input.width..(row + 1) * input.width;
        hash.update((input.width as u64).to_le_bytes());
        match &input.values {
            InputValues::Float32(values) => values[range].iter().for_each(|x| hash.update(x.to_le_bytes())),
            InputValues::Float64(values) => values[range].iter().for_each(|x| hash.update(x.to_le_bytes())),
            InputValues::Int32(values) => values[range].iter().for_each(|x| hash.update(x.to_le_bytes())),
            InputValues::Int64(values) => values[range].iter().for_each(|x| hash.update(x.to_le_bytes())),
            InputValues::Bool(values) => values[range].iter().for_each(|x| hash.update([u8::from(*x)])),
        }
    }
    let digest = hash.finalize();
    let mut short = [0; TENSOR_DIGEST_BYTES];
    short.copy_from_slice(&digest[..TENSOR_DIGEST_BYTES]);
    short
}
