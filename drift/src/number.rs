//! Numbers as integers of the same order: one search, one sample and one set of edges serve all types.

use serde::{Deserialize, Serialize};

use crate::moments::Moments;

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    Float64,
    /// Integers, decimals without their point, spans of time.
    Int64,
    Bool,
}

/// The integer of the same order. Zero has one sign; NaN has no place in the order and must be asked for before.
#[inline(always)]
pub fn key(x: f64) -> i64 {
    let bits = (x + 0.0).to_bits() as i64;
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

/// The float64 of a key.
pub fn value(key: i64) -> f64 {
    f64::from_bits((key ^ (((key >> 63) as u64) >> 1) as i64) as u64)
}

/// A type of numbers that are counted.
pub trait Number: Copy + Default {
    const SCALE: Scale;

    fn key(self) -> i64;

    fn is_nan(self) -> bool {
        false
    }

    fn add(moments: &mut Moments, values: impl Iterator<Item = Self>);
}

impl Number for f64 {
    const SCALE: Scale = Scale::Float64;

    #[inline(always)]
    fn key(self) -> i64 {
        key(self)
    }

    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }

    #[inline(always)]
    fn add(moments: &mut Moments, values: impl Iterator<Item = f64>) {
        moments.add_f64(values);
    }
}

impl Number for f32 {
    const SCALE: Scale = Scale::Float64;

    #[inline(always)]
    fn key(self) -> i64 {
        key(f64::from(self))
    }

    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }

    #[inline(always)]
    fn add(moments: &mut Moments, values: impl Iterator<Item = f32>) {
        moments.add_f64(values.map(f64::from));
    }
}

impl Number for i64 {
    const SCALE: Scale = Scale::Int64;

    #[inline(always)]
    fn key(self) -> i64 {
        self
    }

    #[inline(always)]
    fn add(moments: &mut Moments, values: impl Iterator<Item = i64>) {
        moments.add_i64(values);
    }
}

impl Number for bool {
    const SCALE: Scale = Scale::Bool;

    #[inline(always)]
    fn key(self) -> i64 {
        i64::from(self)
    }

    #[inline(always)]
    fn add(moments: &mut Moments, values: impl Iterator<Item = bool>) {
        moments.add_i64(values.map(i64::from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_the_order_of_numbers() {
        let ascending =
            [f64::NEG_INFINITY, -2.5, -f64::MIN_POSITIVE, 0.0, 5e-324, 1.0, 1.0 + f64::EPSILON, f64::INFINITY];
        assert!(ascending.map(key).windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(ascending.map(|x| value(key(x))), ascending);
        assert_eq!(key(-0.0), key(0.0));
    }
}
