//! Integers without a bound, as long as what they hold: sums of squares, and the arithmetic of a variance.
//!
//! A square of a float64 has 106 bits and lies anywhere in 4,300; a square of a decimal has 254. Data seldom spreads over
//! much of that, so a sum keeps only the stretch of 64-bit limbs that it touches.

use crate::value::DecodeError;

use super::varint;

/// A signed sum. Positions are bits, counted from whatever unit the owner counts in.
#[derive(Debug, Clone, Default)]
pub struct WideSum {
    /// Two's complement, lowest limb first, without limbs at the top that only repeat the sign.
    limbs: Vec<u64>,
    /// Limbs below the first one, all zero.
    base: usize,
}

/// Bytes in the longest sum: 4,300 bits of squares of float64s, and 64 for their number.
const BYTES_MAX: u64 = 552;

impl WideSum {
    /// Adds ± `term` · 2^`position`; `term` is a magnitude, lowest limb first.
    pub fn add<const N: usize>(&mut self, negative: bool, term: [u64; N], position: u32) {
        let Some(top) = term.iter().rposition(|limb| *limb != 0) else { return };
        let (limb, shift) = ((position / 64) as usize, position % 64);
        self.reach(limb, limb + top + 2);
        let mut carry = false;
        let mut below = 0;
        for (i, sum) in self.limbs[limb - self.base..].iter_mut().enumerate() {
            let this = if i <= top { term[i] } else { 0 };
            let part = if shift == 0 { this } else { this << shift | below >> (64 - shift) };
            below = this;
            (*sum, carry) = if negative { borrowing_sub(*sum, part, carry) } else { carrying_add(*sum, part, carry) };
            if i > top && !carry {
                break;
            }
        }
        self.trim();
    }

    pub fn merge(&mut self, other: &WideSum) {
        self.combine(other, carrying_add);
    }

    pub fn unmerge(&mut self, other: &WideSum) {
        self.combine(other, borrowing_sub);
    }

    fn combine(&mut self, other: &WideSum, step: impl Fn(u64, u64, bool) -> (u64, bool)) {
        if other.limbs.is_empty() {
            return;
        }
        self.reach(other.base, other.base + other.limbs.len());
        let extension = other.extension();
        let mut carry = false;
        for (i, sum) in self.limbs[other.base - self.base..].iter_mut().enumerate() {
            (*sum, carry) = step(*sum, other.limbs.get(i).copied().unwrap_or(extension), carry);
        }
        self.trim();
    }

    /// Sign, magnitude (lowest limb first), and the position of its lowest bit.
    pub fn magnitude(&self) -> (bool, Vec<u64>, u32) {
        let negative = self.extension() != 0;
        let mut limbs = self.limbs.clone();
        if negative {
            let mut carry = true;
            for limb in &mut limbs {
                (*limb, carry) = carrying_add(!*limb, 0, carry);
            }
        }
        (negative, limbs, 64 * self.base as u32)
    }

    /// All zeros or all ones: the limbs that could follow without changing the number.
    fn extension(&self) -> u64 {
        if self.limbs.last().is_some_and(|top| top >> 63 == 1) { u64::MAX } else { 0 }
    }

    /// Makes the limbs `from..end` exist, and one above every limb there was, for a carry.
    fn reach(&mut self, from: usize, end: usize) {
        if self.limbs.is_empty() {
            self.base = from;
        }
        if from < self.base {
            self.limbs.splice(0..0, std::iter::repeat_n(0, self.base - from));
            self.base = from;
        }
        let extension = self.extension();
        let length = (end + 1 - self.base).max(self.limbs.len() + 1);
        self.limbs.resize(length, extension);
    }

    fn trim(&mut self) {
        while let [.., below, top] = self.limbs[..]
            && top == (if below >> 63 == 1 { u64::MAX } else { 0 })
        {
            self.limbs.pop();
        }
        if self.limbs == [0] {
            self.limbs.clear();
        }
    }

    // The encoding: varint(bytes of the magnitude << 1 | negative), then, unless it is zero: varint(zero bytes below),
    // and the bytes, lowest first, the first and the last of them not zero.

    pub fn encode(&self, out: &mut Vec<u8>) {
        let (negative, limbs, position) = self.magnitude();
        let bytes: Vec<u8> = limbs.iter().flat_map(|limb| limb.to_le_bytes()).collect();
        let Some(start) = bytes.iter().position(|byte| *byte != 0) else { return out.push(0) };
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(start, |last| last + 1);
        varint::encode_u64(((end - start) as u64) << 1 | u64::from(negative), out);
        varint::encode_u64(start as u64 + u64::from(position) / 8, out);
        out.extend_from_slice(&bytes[start..end]);
    }

    pub fn decode(bytes: &mut &[u8]) -> Result<WideSum, DecodeError> {
        let header = varint::decode_u64(bytes)?;
        let (length, negative) = (header >> 1, header & 1 == 1);
        if length == 0 {
            return match negative {
                true => Err(DecodeError::Invalid("a zero sum has a sign")),
                false => Ok(WideSum::default()),
            };
        }
        let below = varint::decode_u64(bytes)?;
        if below > BYTES_MAX || length > BYTES_MAX - below {
            return Err(DecodeError::Invalid("a sum of squares is longer than any"));
        }
        let (magnitude, rest) = bytes.split_at_checked(length as usize).ok_or(DecodeError::Truncated)?;
        if magnitude[0] == 0 || magnitude[magnitude.len() - 1] == 0 {
            return Err(DecodeError::Invalid("a sum is spelled with zeros it does not need"));
        }
        *bytes = rest;
        let mut sum = WideSum::default();
        for (i, byte) in magnitude.iter().enumerate() {
            sum.add(negative, [u64::from(*byte)], 8 * (below as u32 + i as u32));
        }
        Ok(sum)
    }
}

impl PartialEq for WideSum {
    fn eq(&self, other: &WideSum) -> bool {
        // The number, wherever its limbs begin.
        fn significant(sum: &WideSum) -> (usize, &[u64]) {
            let zeros = sum.limbs.iter().take_while(|limb| **limb == 0).count();
            (if sum.limbs.is_empty() { 0 } else { sum.base + zeros }, &sum.limbs[zeros..])
        }
        significant(self) == significant(other)
    }
}
impl Eq for WideSum {}

fn carrying_add(a: u64, b: u64, carry: bool) -> (u64, bool) {
    let (sum, first) = a.overflowing_add(b);
    let (sum, second) = sum.overflowing_add(u64::from(carry));
    (sum, first || second)
}

fn borrowing_sub(a: u64, b: u64, borrow: bool) -> (u64, bool) {
    let (difference, first) = a.overflowing_sub(b);
    let (difference, second) = difference.overflowing_sub(u64::from(borrow));
    (difference, first || second)
}

// Magnitudes, lowest limb first.

/// The square of a number of 127 bits.
pub fn square(x: u128) -> [u64; 4] {
    let limbs = [x as u64, (x >> 64) as u64];
    let product = multiply(&limbs, &limbs);
    [product[0], product[1], product[2], product[3]]
}

/// Has the limbs of both.
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

pub fn shifted_left(limbs: &[u64], bits: u32) -> Vec<u64> {
    let (zeros, shift) = ((bits / 64) as usize, bits % 64);
    let mut shifted = vec![0; zeros];
    let mut below = 0;
    for limb in limbs.iter().chain([&0]) {
        shifted.push(if shift == 0 { *limb } else { *limb << shift | below >> (64 - shift) });
        below = *limb;
    }
    shifted
}

/// `a` - `b`, or None where that is negative.
pub fn difference(a: &[u64], b: &[u64]) -> Option<Vec<u64>> {
    let mut borrow = false;
    let limb = |limbs: &[u64], i: usize| limbs.get(i).copied().unwrap_or(0);
    let difference = (0..a.len().max(b.len()))
        .map(|i| {
            let (difference, next) = borrowing_sub(limb(a, i), limb(b, i), borrow);
            borrow = next;
            difference
        })
        .collect();
    if borrow { None } else { Some(difference) }
}

#[cfg(test)]
mod tests;
