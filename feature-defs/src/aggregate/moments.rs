//! Variance and standard deviation of a sample: exact sums of the values and of their squares, rounded once in `finish`.
//!
//! The variance is (n·Σx² − (Σx)²) / (n (n − 1)). With rounded sums that difference cancels to noise; with exact ones it
//! is exact, and only the quotient is rounded, or its root. The squares of floats need twice the exponents, those of
//! decimals twice the digits.

use crate::as_of::Times;
use crate::value::{DecodeError, Value, canonical_f64};

use super::exact_sum::{DecimalTotal, FloatTotal, IntegerTotal, Total};
use super::rounding::{self, LOWEST_EXPONENT};
use super::wide::{self, WideSum};
use super::{Aggregator, Laws};

/// What is asked of the moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    Variance,
    /// Its square root.
    Deviation,
}

/// A total whose values can be squared exactly.
pub trait Squared: Total {
    /// Totals count in units of 2^this.
    const EXPONENT: i32;

    /// Adds the square of a value, in units of 2^(2 · `EXPONENT`). Nothing for NaN and infinities.
    fn add_square(value: &Value, squares: &mut WideSum);

    /// The magnitude of the sum, lowest limb first, and the position of its lowest bit.
    fn magnitude(&self) -> (Vec<u64>, u32);

    /// Whether a value was NaN or infinite.
    fn has_apart(&self) -> bool {
        false
    }
}

impl Squared for IntegerTotal {
    const EXPONENT: i32 = 0;

    fn add_square(value: &Value, squares: &mut WideSum) {
        let magnitude = match value {
            Value::Int32(x) => u128::from(x.unsigned_abs()),
            Value::Int64(x) => u128::from(x.unsigned_abs()),
            other => unreachable!("a total of integers was given {other:?}"),
        };
        let square = magnitude * magnitude;
        squares.add(false, [square as u64, (square >> 64) as u64], 0);
    }

    fn magnitude(&self) -> (Vec<u64>, u32) {
        let sum = self.sum_i128().unsigned_abs();
        (vec![sum as u64, (sum >> 64) as u64], 0)
    }
}

impl Squared for DecimalTotal {
    const EXPONENT: i32 = 0;

    fn add_square(value: &Value, squares: &mut WideSum) {
        let Value::Decimal(x) = value else { unreachable!("a total of decimals was given {value:?}") };
        squares.add(false, wide::square(x.unsigned_abs()), 0);
    }

    fn magnitude(&self) -> (Vec<u64>, u32) {
        let (_, high, low) = DecimalTotal::magnitude(self);
        (vec![low as u64, (low >> 64) as u64, high], 0)
    }
}

impl Squared for FloatTotal {
    const EXPONENT: i32 = LOWEST_EXPONENT;

    fn add_square(value: &Value, squares: &mut WideSum) {
        let x = match value {
            Value::Float64(x) => *x,
            Value::Float32(x) => f64::from(*x),
            other => unreachable!("a total of floats was given {other:?}"),
        };
        if x.is_finite() {
            let bits = x.to_bits();
            let field = (bits >> 52) as u32 & 0x7ff;
            let significand = u128::from((bits & ((1 << 52) - 1)) | u64::from(field != 0) << 52);
            let square = significand * significand;
            squares.add(false, [square as u64, (square >> 64) as u64], 2 * (field.max(1) - 1));
        }
    }

    fn magnitude(&self) -> (Vec<u64>, u32) {
        self.finite().magnitude()
    }

    fn has_apart(&self) -> bool {
        FloatTotal::has_apart(self)
    }
}

/// The exact moments of some values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moments<T> {
    total: T,
    squares: WideSum,
}

/// Variance or standard deviation over one kind of total.
#[derive(Debug, Clone)]
pub struct SampleSpread<T> {
    spread: Spread,
    /// The scale of the values; zero except for decimals.
    scale: i8,
    total: std::marker::PhantomData<fn() -> T>,
}

impl<T> SampleSpread<T> {
    pub fn new(spread: Spread, scale: i8) -> SampleSpread<T> {
        SampleSpread { spread, scale, total: std::marker::PhantomData }
    }
}

impl<T: Squared> Aggregator for SampleSpread<T> {
    /// Boxed: a sum of squares is long, and states of all kinds lie side by side.
    type State = Box<Moments<T>>;

    fn laws(&self) -> Laws {
        Laws { invertible: true, idempotent: false }
    }

    fn zero(&self) -> Box<Moments<T>> {
        Box::default()
    }

    fn push(&self, state: &mut Box<Moments<T>>, value: &Value, _times: &Times) {
        state.total.push(value);
        T::add_square(value, &mut state.squares);
    }

    fn merge(&self, into: &mut Box<Moments<T>>, other: &Box<Moments<T>>) {
        into.total.merge(&other.total);
        into.squares.merge(&other.squares);
    }

    fn unmerge(&self, from: &mut Box<Moments<T>>, other: &Box<Moments<T>>) -> bool {
        from.total.unmerge(&other.total);
        from.squares.unmerge(&other.squares);
        true
    }

    fn finish(&self, state: &Box<Moments<T>>) -> Value {
        // One value has no spread, and a state that is not settled has no values.
        let Some(count) = u64::try_from(state.total.count()).ok().filter(|count| *count >= 2) else {
            return Value::Null;
        };
        if state.total.has_apart() {
            return Value::Float64(canonical_f64(f64::NAN));
        }
        let (negative, squares, squares_at) = state.squares.magnitude();
        let (sum, sum_at) = state.total.magnitude();
        let lowest = squares_at.min(2 * sum_at);
        let minuend = wide::shifted_left(&wide::multiply(&squares, &[count]), squares_at - lowest);
        let subtrahend = wide::shifted_left(&wide::multiply(&sum, &sum), 2 * sum_at - lowest);
        let Some(mut difference) = wide::difference(&minuend, &subtrahend).filter(|_| !negative) else {
            // No values have less than no spread: not settled either.
            return Value::Null;
        };
        let mut divisors = vec![count, count - 1];
        for power in rounding::powers_of_ten(2 * u32::from(self.scale.unsigned_abs())) {
            if self.scale > 0 {
                divisors.push(power);
            } else {
                difference = wide::multiply(&difference, &[power]);
            }
        }
        let exponent = lowest as i32 + 2 * T::EXPONENT;
        Value::Float64(match self.spread {
            Spread::Variance => rounding::nearest_of_any(&difference, exponent, &divisors),
            Spread::Deviation => rounding::nearest_root(&difference, exponent, &divisors),
        })
    }

    fn encode(&self, state: &Box<Moments<T>>, out: &mut Vec<u8>) {
        state.total.encode(out);
        state.squares.encode(out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<Box<Moments<T>>, DecodeError> {
        Ok(Box::new(Moments { total: T::decode(bytes)?, squares: WideSum::decode(bytes)? }))
    }
}

#[cfg(test)]
mod tests;
