//! Integers without a bound, for the one step in which exact sums become float64s.
//!
//! Magnitudes, lowest limb first. Nothing here is on the path of a value: sums are kept in machine integers (`moments`).

use std::cmp::Ordering;

/// Adds `term` · 2^`position`.
pub fn add(sum: &mut Vec<u64>, term: &[u64], position: usize) {
    let (limb, shift) = (position / 64, position % 64);
    if sum.len() < limb + term.len() + 2 {
        sum.resize(limb + term.len() + 2, 0);
    }
    let mut carry = 0_u128;
    let mut below = 0;
    for (i, limb) in sum[limb..].iter_mut().enumerate() {
        let this = term.get(i).copied().unwrap_or(0);
        let part = if shift == 0 { this } else { this << shift | below >> (64 - shift) };
        below = this;
        carry += u128::from(*limb) + u128::from(part);
        *limb = carry as u64;
        carry >>= 64;
        if i > term.len() && carry == 0 {
            return;
        }
    }
    if carry != 0 {
        sum.push(carry as u64);
    }
}

pub fn multiply(a: &[u64], b: &[u64]) -> Vec<u64> {
    let mut product = vec![0; a.len() + b.len()];
    for (i, x) in a.iter().enumerate() {
        let mut carry = 0;
        for (j, y) in b.iter().enumerate() {
            let sum = u128::from(*x) * u128::from(*y) + u128::from(product[i + j]) + u128::from(carry);
            product[i + j] = sum as u64;
            carry = (sum >> 64) as u64;
        }
        product[i + b.len()] = carry;
    }
    product
}

/// |`a` - `b`|, and whether `b` was the larger.
pub fn difference(a: &[u64], b: &[u64]) -> (bool, Vec<u64>) {
    let limb = |limbs: &[u64], i: usize| limbs.get(i).copied().unwrap_or(0);
    let length = a.len().max(b.len());
    let order = (0..length).rev().map(|i| limb(a, i).cmp(&limb(b, i))).find(|order| order.is_ne());
    let negative = order == Some(Ordering::Less);
    let (a, b) = if negative { (b, a) } else { (a, b) };
    let mut borrow = false;
    let difference = (0..length)
        .map(|i| {
            let (part, first) = limb(a, i).overflowing_sub(limb(b, i));
            let (part, second) = part.overflowing_sub(u64::from(borrow));
            borrow = first || second;
            part
        })
        .collect();
    (negative, difference)
}

/// The float64 nearest to `limbs` · 2^`exponent` / (the product of `divisors`, none of which is zero), ties to even,
/// rounded once.
pub fn nearest(limbs: &[u64], exponent: i32, divisors: &[u64]) -> f64 {
    // A divisor takes at most 64 bits away, so one limb of zeros for each and one more leave at least 65 bits of quotient:
    // the 53 that are kept, the half, and whether anything follows.
    let zeros = divisors.len() + 1;
    let mut quotient = vec![0; zeros];
    quotient.extend_from_slice(limbs);
    let mut inexact = false;
    for divisor in divisors {
        let mut remainder = 0;
        for limb in quotient.iter_mut().rev() {
            let dividend = u128::from(remainder) << 64 | u128::from(*limb);
            *limb = (dividend / u128::from(*divisor)) as u64;
            remainder = (dividend % u128::from(*divisor)) as u64;
        }
        inexact |= remainder != 0;
    }
    let exponent = exponent - 64 * zeros as i32;
    let Some(top_limb) = quotient.iter().rposition(|limb| *limb != 0) else { return 0.0 };
    let top = 64 * top_limb as i32 + 63 - quotient[top_limb].leading_zeros() as i32;

    // The bit that becomes the result's lowest: 53 down from the top, but never below what a subnormal can hold.
    let lowest = (top - 52).max(LOWEST_EXPONENT - exponent);
    let scale = lowest + exponent - LOWEST_EXPONENT;
    if scale > 2045 {
        return f64::INFINITY;
    }
    // At least one limb of zeros was put below, so the lowest bit that is kept is above bit 0.
    let lowest = lowest.max(1) as usize;
    let kept = bits_from(&quotient, lowest);
    let half = bits_from(&quotient, lowest - 1) & 1 == 1;
    let rest = inexact || any_below(&quotient, lowest - 1);
    // A carry out of the rounding raises the exponent by itself, up to infinity.
    f64::from_bits(((scale as u64) << 52) + kept + u64::from(half && (rest || kept & 1 == 1)))
}

/// Bit 0 of a float64's significand, at the smallest exponent there is, weighs 2^-1074.
pub const LOWEST_EXPONENT: i32 = -1074;

fn bits_from(limbs: &[u64], from: usize) -> u64 {
    let limb = |i: usize| u128::from(limbs.get(i).copied().unwrap_or(0));
    ((limb(from / 64) | limb(from / 64 + 1) << 64) >> (from % 64)) as u64
}

fn any_below(limbs: &[u64], end: usize) -> bool {
    let whole = (end / 64).min(limbs.len());
    let partial = limbs.get(end / 64).copied().unwrap_or(0);
    limbs[..whole].iter().any(|limb| *limb != 0) || partial & ((1 << (end % 64)) - 1) != 0
}
