//! Percentiles to within 1 % of the value.
//!
//! DDSketch (Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees",
//! VLDB 2019): a number is counted in the bucket of its logarithm to the base γ = (1 + α) / (1 − α), and a bucket answers
//! with the number that is within α of all it may hold. Buckets are never collapsed, since that would depend on the order
//! of values; instead the aggregate declares a range, values outside it count as its ends, and so there are at most 6,200
//! buckets. Logarithms come from the pinned `libm`, never from the platform.
//!
//! Numbers nearer to zero than 10^-9 count as zero. NaN is greatest, as everywhere: a rank that falls among NaNs is NaN.

use crate::as_of::Times;
use crate::value::{DecodeError, Value, canonical_f64};

use super::counts::Counts;
use super::{Aggregator, Laws, as_float};

/// ln γ for α = 1 %: ln(1.01 / 0.99).
const LN_GAMMA: f64 = 0.020_000_666_706_669_525;

/// Nearer to zero than this is zero.
const SMALLEST: f64 = 1e-9;

/// The ends of a range may not lie further out: buckets are bounded.
pub const CLAMP_MAX: f64 = 1e18;

/// The bucket of the smallest positive number is 1, and that of `CLAMP_MAX` this; negative numbers have the negative
/// numbers of buckets, and zero has 0. So buckets are ordered as what they hold.
const BUCKET_MAX: i32 = 3_110;
/// ⌈log_γ SMALLEST⌉ − 1.
const BELOW_SMALLEST: i32 = -1_037;
/// Above every bucket of numbers.
const NAN_BUCKET: i32 = 4_096;

/// A share in billionths, so that rank ⌈q·n⌉ means the q that was written: in binary, 0.55 · 100 is more than 55.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantile(u32);

const BILLION: u32 = 1_000_000_000;

impl Quantile {
    /// None unless `q` lies between 0 and 1 and has at most nine decimals.
    pub fn new(q: f64) -> Option<Quantile> {
        let billionths = (q * f64::from(BILLION)).round();
        // Decimals of up to nine places come back from billionths as the same float.
        let is_exact = billionths / f64::from(BILLION) == q;
        (q > 0.0 && q < 1.0 && is_exact).then_some(Quantile(billionths as u32))
    }

    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / f64::from(BILLION)
    }

    /// ⌈q · `count`⌉
    fn rank(self, count: u128) -> u128 {
        (u128::from(self.0) * count).div_ceil(u128::from(BILLION))
    }
}

/// The declared range of the values of a percentile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clamp {
    pub low: f64,
    pub high: f64,
}

impl Clamp {
    /// None unless `low` is below `high` and both are within ±[`CLAMP_MAX`].
    pub fn new(low: f64, high: f64) -> Option<Clamp> {
        let fits = low < high && low >= -CLAMP_MAX && high <= CLAMP_MAX;
        fits.then_some(Clamp { low: canonical_f64(low), high: canonical_f64(high) })
    }
}

#[derive(Debug, Clone)]
pub struct Percentile {
    pub q: Quantile,
    pub clamp: Clamp,
    /// The scale of the values; zero except for decimals.
    pub scale: i8,
}

impl Percentile {
    fn bucket(&self, x: f64) -> i32 {
        if x.is_nan() {
            return NAN_BUCKET;
        }
        let x = x.clamp(self.clamp.low, self.clamp.high);
        if x.abs() < SMALLEST {
            return 0;
        }
        let logarithm = (libm::log(x.abs()) / LN_GAMMA).ceil() as i32;
        let bucket = (logarithm - BELOW_SMALLEST).clamp(1, BUCKET_MAX);
        if x < 0.0 { -bucket } else { bucket }
    }

    /// The number within α of all that the bucket holds: 2 γ^i / (γ + 1).
    fn number(&self, bucket: i32) -> f64 {
        let x = match bucket {
            NAN_BUCKET => return canonical_f64(f64::NAN),
            0 => 0.0,
            bucket => {
                let magnitude = 0.99 * libm::exp(f64::from(bucket.abs() + BELOW_SMALLEST) * LN_GAMMA);
                if bucket < 0 { -magnitude } else { magnitude }
            }
        };
        canonical_f64(x.clamp(self.clamp.low, self.clamp.high))
    }
}

impl Aggregator for Percentile {
    type State = Counts;

    fn laws(&self) -> Laws {
        Laws { invertible: true, idempotent: false }
    }

    fn zero(&self) -> Counts {
        Counts::default()
    }

    fn push(&self, state: &mut Counts, value: &Value, _times: &Times) {
        state.push(self.bucket(as_float(value, self.scale)));
    }

    fn merge(&self, into: &mut Counts, other: &Counts) {
        into.merge(other);
    }

    fn unmerge(&self, from: &mut Counts, other: &Counts) -> bool {
        from.unmerge(other);
        true
    }

    fn finish(&self, state: &Counts) -> Value {
        let Some(buckets) = state.settled() else { return Value::Null };
        let count: u128 = buckets.iter().map(|(_, count)| u128::from(count.unsigned_abs())).sum();
        let rank = self.q.rank(count);
        let mut seen: u128 = 0;
        let holds_it = |(_, count): &&(i32, i64)| {
            seen += u128::from(count.unsigned_abs());
            seen >= rank
        };
        buckets.iter().find(holds_it).map_or(Value::Null, |(bucket, _)| Value::Float64(self.number(*bucket)))
    }

    fn encode(&self, state: &Counts, out: &mut Vec<u8>) {
        state.encode(out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Counts, DecodeError> {
        Counts::decode(bytes, |bucket| bucket == NAN_BUCKET || bucket.abs() <= BUCKET_MAX)
    }
}

#[cfg(test)]
mod tests;
