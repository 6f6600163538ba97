//! Sum and mean: one exact total of the values and their number, rounded once in `finish`.
//!
//! There is a total for each kind of number. Each is a number in a group (addition loses nothing and can be undone), so
//! the order of values means nothing and a total that was added can be taken out again, even before it was added: then
//! counts are negative for a while.

use crate::as_of::Times;
use crate::value::{DecodeError, Value, take};

use super::exact_float::ExactFloat;
use super::{Aggregator, Laws, rounding, varint};

/// The exact total of some values: a group, so what was merged can be taken out again.
pub trait Total: Clone + Default + PartialEq + Send + Sync + std::fmt::Debug + 'static {
    fn push(&mut self, value: &Value);
    fn merge(&mut self, other: &Self);
    fn unmerge(&mut self, other: &Self);
    /// How many values; negative while more were taken out than merged.
    fn count(&self) -> i64;
    /// The sum of one value or more.
    fn sum(&self) -> Value;
    /// The sum divided by `count` (and by 10^`scale`, for decimals), rounded once.
    fn mean(&self, count: u64, scale: i8) -> f64;
    fn encode(&self, out: &mut Vec<u8>);
    fn decode(bytes: &mut &[u8]) -> Result<Self, DecodeError>;
}

/// What is asked of the total.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    Sum,
    /// With the scale of the values: the total counts in units of 10^-`scale`. Zero except for decimals.
    Mean {
        scale: i8,
    },
}

/// Sum or mean over one kind of total.
#[derive(Debug, Clone)]
pub struct ExactSum<T> {
    answer: Answer,
    total: std::marker::PhantomData<fn() -> T>,
}

impl<T> ExactSum<T> {
    pub fn new(answer: Answer) -> ExactSum<T> {
        ExactSum { answer, total: std::marker::PhantomData }
    }
}

impl<T: Total> Aggregator for ExactSum<T> {
    type State = T;
    const LAWS: Laws = Laws { invertible: true, idempotent: false };

    fn zero(&self) -> T {
        T::default()
    }

    #[inline]
    fn push(&self, state: &mut T, value: &Value, _times: &Times) {
        state.push(value);
    }

    fn merge(&self, into: &mut T, other: &T) {
        into.merge(other);
    }

    fn unmerge(&self, from: &mut T, other: &T) -> bool {
        from.unmerge(other);
        true
    }

    fn finish(&self, state: &T) -> Value {
        match (u64::try_from(state.count()), self.answer) {
            // Nothing, or a state that is not settled.
            (Ok(0) | Err(_), _) => Value::Null,
            (Ok(_), Answer::Sum) => state.sum(),
            (Ok(count), Answer::Mean { scale }) => Value::Float64(state.mean(count, scale)),
        }
    }

    fn encode(&self, state: &T, out: &mut Vec<u8>) {
        state.encode(out);
    }

    fn decode(&self, bytes: &mut &[u8]) -> Result<T, DecodeError> {
        T::decode(bytes)
    }
}

// Integers: 2^64 values of 64 bits fit 128.

/// The exact total of int32s or int64s.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IntegerTotal {
    count: i64,
    sum: i128,
}

impl IntegerTotal {
    /// Adds a value, for engines that have columns of them.
    #[inline]
    pub fn push_i64(&mut self, x: i64) {
        self.count = self.count.wrapping_add(1);
        self.sum = self.sum.wrapping_add(i128::from(x));
    }
}

impl Total for IntegerTotal {
    #[inline]
    fn push(&mut self, value: &Value) {
        match value {
            Value::Int32(x) => self.push_i64(i64::from(*x)),
            Value::Int64(x) => self.push_i64(*x),
            other => unreachable!("a total of integers was given {other:?}"),
        }
    }

    fn merge(&mut self, other: &IntegerTotal) {
        self.count = self.count.wrapping_add(other.count);
        self.sum = self.sum.wrapping_add(other.sum);
    }

    fn unmerge(&mut self, other: &IntegerTotal) {
        self.count = self.count.wrapping_sub(other.count);
        self.sum = self.sum.wrapping_sub(other.sum);
    }

    fn count(&self) -> i64 {
        self.count
    }

    fn sum(&self) -> Value {
        i64::try_from(self.sum).map_or(Value::Null, Value::Int64)
    }

    fn mean(&self, count: u64, _scale: i8) -> f64 {
        let magnitude = self.sum.unsigned_abs();
        rounding::nearest(self.sum < 0, &[magnitude as u64, (magnitude >> 64) as u64], 0, &[count])
    }

    fn encode(&self, out: &mut Vec<u8>) {
        varint::encode_i64(self.count, out);
        encode_integer(&self.sum.to_le_bytes(), out);
    }

    fn decode(bytes: &mut &[u8]) -> Result<IntegerTotal, DecodeError> {
        let count = varint::decode_i64(bytes)?;
        Ok(IntegerTotal { count, sum: i128::from_le_bytes(decode_integer(bytes)?) })
    }
}

// Decimals: two of 38 digits no longer fit 128 bits.

/// The exact total of decimals, in units of the last digit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DecimalTotal {
    count: i64,
    /// One integer of 192 bits: `high` · 2^128 + `low`.
    high: i64,
    low: u128,
}

/// A decimal of 38 digits is smaller than this.
const DECIMAL_END: u128 = 10_u128.pow(38);

impl DecimalTotal {
    /// Adds a value in units of the last digit, for engines that have columns of them.
    #[inline]
    pub fn push_i128(&mut self, x: i128) {
        self.merge(&DecimalTotal { count: 1, high: (x >> 127) as i64, low: x as u128 });
    }

    fn magnitude(&self) -> (bool, u64, u128) {
        let negative = self.high < 0;
        let (low, borrow) = if negative { 0_u128.overflowing_sub(self.low) } else { (self.low, false) };
        let high = if negative { self.high.wrapping_neg().wrapping_sub(i64::from(borrow)) } else { self.high };
        (negative, high as u64, low)
    }
}

impl Total for DecimalTotal {
    fn push(&mut self, value: &Value) {
        let Value::Decimal(x) = value else { unreachable!("a total of decimals was given {value:?}") };
        self.push_i128(*x);
    }

    fn merge(&mut self, other: &DecimalTotal) {
        let (low, carry) = self.low.overflowing_add(other.low);
        self.count = self.count.wrapping_add(other.count);
        self.high = self.high.wrapping_add(other.high).wrapping_add(i64::from(carry));
        self.low = low;
    }

    fn unmerge(&mut self, other: &DecimalTotal) {
        let (low, borrow) = self.low.overflowing_sub(other.low);
        self.count = self.count.wrapping_sub(other.count);
        self.high = self.high.wrapping_sub(other.high).wrapping_sub(i64::from(borrow));
        self.low = low;
    }

    fn count(&self) -> i64 {
        self.count
    }

    fn sum(&self) -> Value {
        match self.magnitude() {
            (_, 0, low) if low < DECIMAL_END => Value::Decimal(self.low as i128),
            _ => Value::Null,
        }
    }

    fn mean(&self, count: u64, scale: i8) -> f64 {
        // 10^19 is the largest power of ten in 64 bits; a scale is at most 127 either way.
        let powers = (0..7).map_while(|i| {
            let digits = u32::from(scale.unsigned_abs()).saturating_sub(19 * i).min(19);
            (digits > 0).then(|| 10_u64.pow(digits))
        });
        let (negative, high, low) = self.magnitude();
        let mut limbs = [0; 3 + 7];
        limbs[..3].copy_from_slice(&[low as u64, (low >> 64) as u64, high]);
        let mut divisors = [count; rounding::DIVISORS_MAX];
        let mut divisors_len = 1;
        for power in powers {
            if scale > 0 {
                divisors[divisors_len] = power;
                divisors_len += 1;
            } else {
                multiply(&mut limbs, power);
            }
        }
        rounding::nearest(negative, &limbs, 0, &divisors[..divisors_len])
    }

    fn encode(&self, out: &mut Vec<u8>) {
        varint::encode_i64(self.count, out);
        let mut bytes = [0; 24];
        bytes[..16].copy_from_slice(&self.low.to_le_bytes());
        bytes[16..].copy_from_slice(&self.high.to_le_bytes());
        encode_integer(&bytes, out);
    }

    fn decode(bytes: &mut &[u8]) -> Result<DecimalTotal, DecodeError> {
        let count = varint::decode_i64(bytes)?;
        let integer: [u8; 24] = decode_integer(bytes)?;
        let (mut low, mut high) = ([0; 16], [0; 8]);
        low.copy_from_slice(&integer[..16]);
        high.copy_from_slice(&integer[16..]);
        Ok(DecimalTotal { count, high: i64::from_le_bytes(high), low: u128::from_le_bytes(low) })
    }
}

fn multiply(limbs: &mut [u64], factor: u64) {
    let mut carry = 0;
    for limb in limbs {
        let product = u128::from(*limb) * u128::from(factor) + u128::from(carry);
        *limb = product as u64;
        carry = (product >> 64) as u64;
    }
}

/// Length, then two's complement, lowest byte first, without the bytes at the end that only repeat the sign.
fn encode_integer(bytes: &[u8], out: &mut Vec<u8>) {
    let mut length = bytes.len();
    while length > 0 && bytes[length - 1] == sign_extension(&bytes[..length - 1]) {
        length -= 1;
    }
    out.push(length as u8);
    out.extend_from_slice(&bytes[..length]);
}

fn decode_integer<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], DecodeError> {
    let [length] = take(bytes)?;
    let length = usize::from(length);
    if length > N {
        return Err(DecodeError::Invalid("an integer total is too long"));
    }
    let (digits, rest) = bytes.split_at_checked(length).ok_or(DecodeError::Truncated)?;
    if digits.last().is_some_and(|last| *last == sign_extension(&digits[..length - 1])) {
        return Err(DecodeError::Invalid("an integer total is spelled longer than needed"));
    }
    *bytes = rest;
    let mut integer = [sign_extension(digits); N];
    integer[..length].copy_from_slice(digits);
    Ok(integer)
}

/// The byte that may follow without changing the number.
fn sign_extension(bytes: &[u8]) -> u8 {
    if bytes.last().is_some_and(|last| last >> 7 == 1) { 0xff } else { 0 }
}

// Floats.

/// The exact total of float32s or float64s.
#[derive(Debug, Clone, Default)]
pub struct FloatTotal {
    /// All values, those apart included.
    count: i64,
    finite: ExactFloat,
    /// Made when the first of them comes: most data has none.
    apart: Option<Box<Apart>>,
}

/// The values that are no numbers, counted so that they can be taken out again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Apart {
    nan: i64,
    positive_infinity: i64,
    negative_infinity: i64,
}

impl FloatTotal {
    /// Adds a value, for engines that have columns of them.
    #[inline]
    pub fn push_f64(&mut self, x: f64) {
        self.count = self.count.wrapping_add(1);
        if x.is_finite() {
            self.finite.push(x);
        } else {
            self.push_apart(x);
        }
    }

    fn apart(&self) -> Apart {
        self.apart.as_deref().cloned().unwrap_or_default()
    }

    #[cold]
    fn push_apart(&mut self, x: f64) {
        let apart = self.apart.get_or_insert_default();
        let count = match x {
            f64::INFINITY => &mut apart.positive_infinity,
            f64::NEG_INFINITY => &mut apart.negative_infinity,
            _ => &mut apart.nan,
        };
        *count = count.wrapping_add(1);
    }

    fn combine_apart(&mut self, other: &FloatTotal, combine: impl Fn(i64, i64) -> i64) {
        if let Some(other) = &other.apart {
            let apart = self.apart.get_or_insert_default();
            apart.nan = combine(apart.nan, other.nan);
            apart.positive_infinity = combine(apart.positive_infinity, other.positive_infinity);
            apart.negative_infinity = combine(apart.negative_infinity, other.negative_infinity);
        }
    }

    fn nearest(&self, divisors: &[u64]) -> f64 {
        match self.apart() {
            Apart { nan: 0, positive_infinity: 0, negative_infinity: 0 } => self.finite.nearest(divisors),
            Apart { nan: 0, negative_infinity: 0, .. } => f64::INFINITY,
            Apart { nan: 0, positive_infinity: 0, .. } => f64::NEG_INFINITY,
            _ => crate::value::canonical_f64(f64::NAN),
        }
    }
}

impl PartialEq for FloatTotal {
    fn eq(&self, other: &FloatTotal) -> bool {
        self.count == other.count && self.apart() == other.apart() && self.finite == other.finite
    }
}
impl Eq for FloatTotal {}

impl Total for FloatTotal {
    #[inline]
    fn push(&mut self, value: &Value) {
        match value {
            Value::Float64(x) => self.push_f64(*x),
            Value::Float32(x) => self.push_f64(f64::from(*x)),
            other => unreachable!("a total of floats was given {other:?}"),
        }
    }

    fn merge(&mut self, other: &FloatTotal) {
        self.count = self.count.wrapping_add(other.count);
        self.finite.merge(&other.finite);
        self.combine_apart(other, i64::wrapping_add);
    }

    fn unmerge(&mut self, other: &FloatTotal) {
        self.count = self.count.wrapping_sub(other.count);
        self.finite.unmerge(&other.finite);
        self.combine_apart(other, i64::wrapping_sub);
    }

    fn count(&self) -> i64 {
        self.count
    }

    fn sum(&self) -> Value {
        Value::Float64(self.nearest(&[]))
    }

    fn mean(&self, count: u64, _scale: i8) -> f64 {
        self.nearest(&[count])
    }

    fn encode(&self, out: &mut Vec<u8>) {
        varint::encode_i64(self.count, out);
        let apart = self.apart();
        let any_apart = apart != Apart::default();
        self.finite.encode(any_apart, out);
        if any_apart {
            varint::encode_i64(apart.nan, out);
            varint::encode_i64(apart.positive_infinity, out);
            varint::encode_i64(apart.negative_infinity, out);
        }
    }

    fn decode(bytes: &mut &[u8]) -> Result<FloatTotal, DecodeError> {
        let count = varint::decode_i64(bytes)?;
        let (finite, any_apart) = ExactFloat::decode(bytes)?;
        let mut total = FloatTotal { count, finite, apart: None };
        if any_apart {
            let apart = Apart {
                nan: varint::decode_i64(bytes)?,
                positive_infinity: varint::decode_i64(bytes)?,
                negative_infinity: varint::decode_i64(bytes)?,
            };
            if apart == Apart::default() {
                return Err(DecodeError::Invalid("a total announces values apart and has none"));
            }
            total.apart = Some(Box::new(apart));
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests;
