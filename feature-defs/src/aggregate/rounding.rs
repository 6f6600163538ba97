//! The one place where an exact number becomes a float64.
//!
//! An exact number is an unsigned integer in 64-bit limbs, lowest first, times a power of two, perhaps divided by a few
//! integers. It is rounded once, to the nearest float64, ties to even, subnormals and overflow to infinity included:
//! dividing first and rounding afterwards, or the other way round, would round twice and could miss the nearest.

use crate::value::canonical_f64;

use super::wide;

/// Bit 0 of a float64's significand, at the smallest exponent there is, weighs 2^-1074.
pub const LOWEST_EXPONENT: i32 = -1074;

/// The most limbs any caller has: a whole superaccumulator.
pub const LIMBS_MAX: usize = 35;

/// The most divisors any caller has: a count, and a power of ten in pieces that fit 64 bits.
pub const DIVISORS_MAX: usize = 8;

/// 10^`digits`, as factors of 64 bits.
pub fn powers_of_ten(digits: u32) -> impl Iterator<Item = u64> {
    // 10^19 is the largest power of ten in 64 bits.
    (0..digits.div_ceil(19)).map(move |i| 10_u64.pow((digits - 19 * i).min(19)))
}

/// The float64 nearest to ±`limbs` · 2^`exponent` / (the product of `divisors`), none of which is zero.
pub fn nearest(negative: bool, limbs: &[u64], exponent: i32, divisors: &[u64]) -> f64 {
    let significant = limbs.len() - limbs.iter().rev().take_while(|limb| **limb == 0).count();
    let limbs = &limbs[..significant];
    if limbs.is_empty() {
        return 0.0;
    }
    if divisors.is_empty() {
        return round(negative, limbs, exponent, false);
    }

    // Each divisor takes at most 64 bits away, so one limb of zeros below for each, and one more, leaves a quotient of at
    // least 65 bits: enough to see the 53 we keep, the half, and whether anything follows. Dividing by one divisor after
    // the other gives the same quotient as dividing by the product, and is exact when every step is.
    let zeros = divisors.len() + 1;
    let mut quotient = [0; LIMBS_MAX + DIVISORS_MAX + 1];
    let quotient = &mut quotient[..zeros + limbs.len()];
    quotient[zeros..].copy_from_slice(limbs);
    let mut inexact = false;
    for divisor in divisors {
        inexact |= divide(quotient, *divisor) != 0;
    }
    round(negative, quotient, exponent - 64 * zeros as i32, inexact)
}

/// The float64 nearest to `unscaled` · 10^-`scale`.
pub fn decimal(unscaled: i128, scale: i8) -> f64 {
    let magnitude = unscaled.unsigned_abs();
    let mut limbs = vec![magnitude as u64, (magnitude >> 64) as u64];
    let powers: Vec<u64> = powers_of_ten(u32::from(scale.unsigned_abs())).collect();
    if scale > 0 {
        return nearest(unscaled < 0, &limbs, 0, &powers);
    }
    powers.iter().for_each(|power| limbs = wide::multiply(&limbs, &[*power]));
    nearest(unscaled < 0, &limbs, 0, &[])
}

/// [`nearest`] of a number that is not negative, with any number of limbs and divisors.
pub fn nearest_of_any(limbs: &[u64], exponent: i32, divisors: &[u64]) -> f64 {
    let (quotient, exponent, inexact) = quotient(limbs, exponent, divisors);
    round(false, &quotient, exponent, inexact)
}

/// The float64 nearest to the square root of `limbs` · 2^`exponent` / (the product of `divisors`), rounded once.
pub fn nearest_root(limbs: &[u64], exponent: i32, divisors: &[u64]) -> f64 {
    let (quotient, exponent, inexact) = quotient(limbs, exponent, divisors);
    let Some(top_limb) = quotient.iter().rposition(|limb| *limb != 0) else { return 0.0 };
    let bits = 64 * top_limb as i32 + 64 - quotient[top_limb].leading_zeros() as i32;

    // The root of the 127 or 128 highest bits has 64; the exponent below them must be even to have a half. What follows
    // cannot carry into the root: ⌊√(x + a little)⌋ is ⌊√x⌋.
    let dropped = (bits - 128) + (bits - 128 + exponent).rem_euclid(2);
    let from = dropped as usize;
    let highest = u128::from(bits_from(&quotient, from)) | u128::from(bits_from(&quotient, from + 64)) << 64;
    let root = highest.isqrt();
    let inexact = inexact || root * root != highest || any_below(&quotient, from);
    round(false, &[root as u64], (exponent + dropped) / 2, inexact)
}

/// A quotient of at least 129 bits, its exponent, and whether it is less than it should be.
fn quotient(limbs: &[u64], exponent: i32, divisors: &[u64]) -> (Vec<u64>, i32, bool) {
    // See `nearest`; a root needs twice the bits of its result.
    let zeros = divisors.len() + 3;
    let mut quotient = vec![0; zeros];
    quotient.extend_from_slice(limbs);
    let mut inexact = false;
    for divisor in divisors {
        inexact |= divide(&mut quotient, *divisor) != 0;
    }
    (quotient, exponent - 64 * zeros as i32, inexact)
}

/// Divides in place and returns the remainder.
fn divide(limbs: &mut [u64], divisor: u64) -> u64 {
    let mut remainder = 0;
    for limb in limbs.iter_mut().rev() {
        let dividend = (u128::from(remainder) << 64) | u128::from(*limb);
        *limb = (dividend / u128::from(divisor)) as u64;
        remainder = (dividend % u128::from(divisor)) as u64;
    }
    remainder
}

/// Rounds ±(`limbs` + a little, when `inexact`) · 2^`exponent`. Inexact numbers have at least 55 bits.
fn round(negative: bool, limbs: &[u64], exponent: i32, inexact: bool) -> f64 {
    let Some(top_limb) = limbs.iter().rposition(|limb| *limb != 0) else { return 0.0 };
    let top = 64 * top_limb as i32 + 63 - limbs[top_limb].leading_zeros() as i32;

    // The bit that becomes the result's lowest: 53 bits down from the top, but never below what a subnormal can hold.
    let lowest = (top - 52).max(LOWEST_EXPONENT - exponent);
    let scale = lowest + exponent - LOWEST_EXPONENT;
    let magnitude = if scale > 2045 {
        f64::INFINITY
    } else {
        let significand = if lowest <= 0 {
            limbs[0] << -lowest
        } else {
            let lowest = lowest as usize;
            let kept = bits_from(limbs, lowest);
            let half = bits_from(limbs, lowest - 1) & 1 == 1;
            let rest = inexact || any_below(limbs, lowest - 1);
            kept + u64::from(half && (rest || kept & 1 == 1))
        };
        // The implicit bit of a normal significand adds one to the exponent field, a carry out of the rounding another;
        // the largest carry of all makes exactly the bits of infinity.
        f64::from_bits(((scale as u64) << 52) + significand)
    };
    canonical_f64(if negative { -magnitude } else { magnitude })
}

/// The 64 bits that start at bit `from`; bits beyond the end are zero.
fn bits_from(limbs: &[u64], from: usize) -> u64 {
    let limb = |i: usize| u128::from(limbs.get(i).copied().unwrap_or(0));
    ((limb(from / 64) | limb(from / 64 + 1) << 64) >> (from % 64)) as u64
}

fn any_below(limbs: &[u64], end: usize) -> bool {
    let whole = (end / 64).min(limbs.len());
    let partial = limbs.get(end / 64).copied().unwrap_or(0);
    limbs[..whole].iter().any(|limb| *limb != 0) || partial & ((1 << (end % 64)) - 1) != 0
}

#[cfg(test)]
mod tests;
