//! Exact moments: sums of values and of their squares that merge by addition, in any order, and are rounded once.
//!
//! A float64 is a significand of 53 bits times a power of two. Values whose exponents lie within eight of each other
//! share a *slot*, a fixed-point sum that no number of values can overflow, and data seldom touches more than a few of
//! the 257 slots. So a value costs one addition of 128 bits, one multiplication and one addition of 192. (The aggregators
//! of `feature-defs` are exact too, in forms that suit stored tiles; this crate does not depend on the expression engine,
//! and needs a form that a loop over a column can fill.)

use serde::{Deserialize, Serialize};

use crate::wide;

/// Values of one slot span this many exponents.
const EXPONENTS: u32 = 8;
/// So that integers have a slot of their own unit: 2^0 is where slot 135 begins.
const OFFSET: u32 = 5;
const SLOTS: usize = (2046 + OFFSET as usize) / EXPONENTS as usize + 1;
const INTEGERS: usize = 135;

/// The exponent of a slot's unit.
fn unit(slot: usize) -> i32 {
    (EXPONENTS as i32) * slot as i32 - 1075 - OFFSET as i32
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    /// Σ x, in units of the slot: 63 bits a value.
    sum: i128,
    /// Σ x², in units of the slot squared: 126 bits a value, in 192.
    squares_low: u128,
    squares_high: u64,
}

/// The moments of some values: their number, extremes, sum and sum of squares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Moments {
    /// Finite values.
    count: u64,
    infinite: u64,
    /// The slot of `slots[0]`. The first and the last slot are never empty, so equal values give equal moments.
    first: usize,
    slots: Vec<Slot>,
}

impl Default for Moments {
    fn default() -> Moments {
        Moments { count: 0, infinite: 0, first: INTEGERS, slots: Vec::new() }
    }
}

impl Moments {
    /// Adds values; NaNs are passed over.
    pub fn add_f64(&mut self, values: impl Iterator<Item = f64>) {
        for x in values {
            let bits = x.to_bits();
            let field = (bits >> 52) as u32 & 0x7ff;
            if field == 0x7ff {
                self.infinite += u64::from(x.is_infinite());
                continue;
            }
            // A subnormal has the exponent of the smallest normal, without the implicit bit.
            let exponent = field.max(1) + OFFSET;
            let significand = bits & ((1 << 52) - 1) | u64::from(field != 0) << 52;
            let magnitude = significand << (exponent % EXPONENTS);
            self.count += 1;
            self.add((exponent / EXPONENTS) as usize, x.is_sign_negative(), magnitude);
        }
    }

    pub fn add_i64(&mut self, values: impl Iterator<Item = i64>) {
        for x in values {
            self.count += 1;
            self.add(INTEGERS, x < 0, x.unsigned_abs());
        }
    }

    #[inline(always)]
    fn add(&mut self, slot: usize, negative: bool, magnitude: u64) {
        if let Some(slot) = self.slots.get_mut(slot.wrapping_sub(self.first)) {
            slot.add(negative, magnitude);
        } else if magnitude != 0 {
            self.reach(slot, slot);
            self.slots[slot - self.first].add(negative, magnitude);
        }
    }

    /// Makes the slots `from..=to` exist.
    #[cold]
    fn reach(&mut self, from: usize, to: usize) {
        if self.slots.is_empty() {
            self.first = from;
        }
        if from < self.first {
            self.slots.splice(0..0, std::iter::repeat_n(Slot::default(), self.first - from));
            self.first = from;
        }
        let length = (to + 1 - self.first).max(self.slots.len());
        self.slots.resize(length, Slot::default());
    }

    pub fn merge(&mut self, other: &Moments) {
        self.count = self.count.saturating_add(other.count);
        self.infinite = self.infinite.saturating_add(other.infinite);
        if other.slots.is_empty() {
            return;
        }
        self.reach(other.first, other.first + other.slots.len() - 1);
        for (slot, other) in self.slots[other.first - self.first..].iter_mut().zip(&other.slots) {
            slot.sum = slot.sum.wrapping_add(other.sum);
            let (low, carry) = slot.squares_low.overflowing_add(other.squares_low);
            slot.squares_low = low;
            slot.squares_high = slot.squares_high.wrapping_add(other.squares_high).wrapping_add(u64::from(carry));
        }
    }

    /// How many finite values there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn infinite(&self) -> u64 {
        self.infinite
    }

    /// The mean of the finite values, rounded once.
    pub fn mean(&self) -> Option<f64> {
        if self.count == 0 {
            return None;
        }
        let (negative, magnitude) = self.sum();
        let mean = wide::nearest(&magnitude, unit(self.first), &[self.count]);
        Some(if negative { -mean } else { mean })
    }

    /// The sample variance of the finite values: (n·Σx² − (Σx)²) / (n (n − 1)), formed exactly and divided once.
    pub fn variance(&self) -> Option<f64> {
        if self.count < 2 {
            return None;
        }
        let mut squares = Vec::new();
        for (i, slot) in self.slots.iter().enumerate() {
            let limbs = [slot.squares_low as u64, (slot.squares_low >> 64) as u64, slot.squares_high];
            wide::add(&mut squares, &limbs, 2 * EXPONENTS as usize * i);
        }
        let (_, sum) = self.sum();
        // Never negative: Cauchy and Schwarz.
        let (_, numerator) = wide::difference(&wide::multiply(&squares, &[self.count]), &wide::multiply(&sum, &sum));
        Some(wide::nearest(&numerator, 2 * unit(self.first), &[self.count, self.count - 1]))
    }

    pub fn deviation(&self) -> Option<f64> {
        self.variance().map(f64::sqrt)
    }

    /// Σ x, in units of the first slot.
    fn sum(&self) -> (bool, Vec<u64>) {
        let (mut above, mut below) = (Vec::new(), Vec::new());
        for (i, slot) in self.slots.iter().enumerate() {
            let magnitude = slot.sum.unsigned_abs();
            let sum = if slot.sum < 0 { &mut below } else { &mut above };
            wide::add(sum, &[magnitude as u64, (magnitude >> 64) as u64], EXPONENTS as usize * i);
        }
        wide::difference(&above, &below)
    }
}

impl Slot {
    #[inline(always)]
    fn add(&mut self, negative: bool, magnitude: u64) {
        // 2^64 values of 63 bits stay within 127, and their squares within 190: neither can overflow.
        let term = i128::from(magnitude);
        let sign = -i128::from(negative);
        self.sum = self.sum.wrapping_add((term ^ sign).wrapping_sub(sign));
        let (low, carry) = self.squares_low.overflowing_add(u128::from(magnitude) * u128::from(magnitude));
        self.squares_low = low;
        self.squares_high = self.squares_high.wrapping_add(u64::from(carry));
    }
}

/// Numbers of more than 64 bits as text: few formats and readers agree on longer ones.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    count: u64,
    infinite: u64,
    first_slot: usize,
    slots: Vec<(String, String)>,
}

impl From<Moments> for Stored {
    fn from(moments: Moments) -> Stored {
        let slots = moments.slots.iter().map(|slot| {
            let squares = match slot.squares_high {
                0 => format!("{:x}", slot.squares_low),
                high => format!("{high:x}{:032x}", slot.squares_low),
            };
            (slot.sum.to_string(), squares)
        });
        Stored { count: moments.count, infinite: moments.infinite, first_slot: moments.first, slots: slots.collect() }
    }
}

impl TryFrom<Stored> for Moments {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<Moments, &'static str> {
        const INVALID: &str = "the sums of some moments are not numbers of the stored form";
        if stored.slots.len() > SLOTS || stored.first_slot > SLOTS - stored.slots.len() {
            return Err("some moments have more slots than there are");
        }
        let slots = stored.slots.iter().map(|(sum, squares)| {
            if !squares.is_ascii() || squares.starts_with('+') {
                return Err(INVALID);
            }
            let (high, low) = squares.split_at(squares.len().saturating_sub(32));
            let high = if high.is_empty() { Ok(0) } else { u64::from_str_radix(high, 16) };
            Ok(Slot {
                sum: sum.parse().map_err(|_| INVALID)?,
                squares_low: u128::from_str_radix(low, 16).map_err(|_| INVALID)?,
                squares_high: high.map_err(|_| INVALID)?,
            })
        });
        let slots: Vec<Slot> = slots.collect::<Result<_, _>>()?;
        let empty = |slot: Option<&Slot>| slot.is_some_and(|slot| *slot == Slot::default());
        if empty(slots.first()) || empty(slots.last()) {
            return Err("some moments are spelled with slots they do not need");
        }
        Ok(Moments { count: stored.count, infinite: stored.infinite, first: stored.first_slot, slots })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[f64]) -> Moments {
        let mut moments = Moments::default();
        moments.add_f64(values.iter().copied());
        moments
    }

    #[test]
    fn sums_that_cancel_are_exact() {
        let moments = of(&[1e300, 1.0, -1e300, 1e-300, f64::NAN, f64::INFINITY]);
        assert_eq!((moments.count(), moments.infinite()), (4, 1));
        assert_eq!(moments.mean(), Some(0.25));
        // The deviations of 1e9 + {4, 7, 13, 16}: a textbook sum of rounded squares loses all of them.
        let variance = of(&[1e9 + 4.0, 1e9 + 7.0, 1e9 + 13.0, 1e9 + 16.0]).variance();
        assert_eq!(variance, Some(30.0));
    }

    #[test]
    fn ends_of_the_range_are_numbers_like_others() {
        assert_eq!(of(&[f64::from_bits(1); 3]).mean(), Some(f64::from_bits(1)));
        assert_eq!(of(&[f64::MAX; 5]).mean(), Some(f64::MAX));
        assert_eq!(of(&[f64::MAX, -f64::MAX]).variance(), Some(f64::INFINITY));
        assert_eq!(of(&[-0.0, 0.0]).mean(), Some(0.0));
        assert_eq!(of(&[]).mean(), None);
        assert_eq!(of(&[2.0]).variance(), None);
        let mut integers = Moments::default();
        integers.add_i64([i64::MIN, i64::MAX, i64::MIN, i64::MAX].into_iter());
        assert_eq!(integers.mean(), Some(-0.5));
    }

    proptest! {
        #[test]
        fn order_and_partition_mean_nothing(values in prop::collection::vec(any::<f64>(), 0..40), cut in 0_usize..40) {
            let cut = cut.min(values.len());
            let whole = of(&values);
            let mut merged = of(&values[cut..]);
            merged.merge(&of(&values[..cut]));
            prop_assert_eq!(&whole, &merged);
            prop_assert_eq!(whole.mean().map(f64::to_bits), merged.mean().map(f64::to_bits));
        }

        #[test]
        fn integers_agree_with_wide_arithmetic(values in prop::collection::vec(-1_000_000_i64..1_000_000, 2..40)) {
            let mut moments = Moments::default();
            moments.add_i64(values.iter().copied());
            let floats = of(&values.iter().map(|x| *x as f64).collect::<Vec<_>>());
            let n = values.len() as i128;
            let sum: i128 = values.iter().map(|x| i128::from(*x)).sum();
            let squares: i128 = values.iter().map(|x| i128::from(*x) * i128::from(*x)).sum();
            prop_assert_eq!(moments.mean(), Some(sum as f64 / n as f64));
            let variance = (n * squares - sum * sum) as f64 / (n * (n - 1)) as f64;
            prop_assert_eq!(moments.variance(), floats.variance());
            prop_assert!((moments.variance().unwrap() - variance).abs() <= 1e-15 * variance);
        }

        #[test]
        fn stored_moments_come_back(values in prop::collection::vec(any::<f64>(), 0..40)) {
            let moments = of(&values);
            let text = serde_json::to_string(&moments).unwrap();
            prop_assert_eq!(serde_json::from_str::<Moments>(&text).unwrap(), moments);
        }
    }

    #[test]
    fn damaged_moments_are_refused() {
        for text in [
            r#"{"count":1,"infinite":0,"first_slot":256,"slots":[["1","1"],["1","1"]]}"#,
            r#"{"count":1,"infinite":0,"first_slot":0,"slots":[["1","x"]]}"#,
            r#"{"count":1,"infinite":0,"first_slot":0,"slots":[["","1"]]}"#,
            r#"{"count":1,"infinite":0,"first_slot":0,"slots":[["0","0"]]}"#,
            r#"{"count":1,"infinite":0,"first_slot":0,"slots":[["1","é"]]}"#,
        ] {
            assert!(serde_json::from_str::<Moments>(text).is_err(), "{text}");
        }
    }
}
