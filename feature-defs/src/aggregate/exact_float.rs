//! A sum of float64s that never rounds, so that order, batches, tiles and sides cannot change it.
//!
//! Every finite float64 is an integer multiple of 2^-1074 and below 2^1024. A sum of them is therefore one long integer
//! of at most 2098 bits and some room for carries. Data seldom uses all of that: most sums fit an i128 whose lowest bit
//! lies somewhere near the data's, which is small, copied at once, and merged by one addition. A sum that does not fit
//! moves to the long form and stays there: 32 bits in each of 68 signed 64-bit chunks, so that an addition touches two
//! of them and carries travel only once in a thousand additions (Neal, "Fast exact summation using small and large
//! superaccumulators", 2015, arXiv:1505.05571).
//!
//! Which form a sum has depends on its history and means nothing: equality, encoding and rounding see the number only.

use crate::value::DecodeError;

use super::rounding::{self, LIMBS_MAX, LOWEST_EXPONENT};
use super::varint;

/// An exact sum of finite float64s. *Positions* are bits counted from the one that weighs 2^-1074.
#[derive(Debug, Clone)]
pub enum ExactFloat {
    /// `sum` · 2^`base`, counted in 2^-1074; `base` is at most [`BASE_MAX`].
    Short {
        sum: i128,
        base: u16,
    },
    Long(Box<Chunks>),
}

/// The highest base of a short sum: beyond the position of every float64, and low enough that each of the 127 bits
/// above it exists in the long form.
const BASE_MAX: u32 = 2070;

/// How far below the lowest bit of a new significand a short sum starts, so that values up to 65,536 times smaller
/// still find their place at once.
const SLACK_BELOW: u32 = 16;

/// How much room a short sum keeps above its number where it can, for the sum to grow.
const ROOM_ABOVE: u32 = 24;

impl Default for ExactFloat {
    fn default() -> ExactFloat {
        ExactFloat::Short { sum: 0, base: 0 }
    }
}

impl ExactFloat {
    /// Adds a finite number.
    #[inline]
    pub fn push(&mut self, x: f64) {
        let bits = x.to_bits();
        let negative = bits >> 63 == 1;
        let field = (bits >> 52) as u32 & 0x7ff;
        debug_assert!(field != 0x7ff, "NaN and infinities are counted apart");
        let significand = (bits & ((1 << 52) - 1)) | u64::from(field != 0) << 52;
        let position = field.max(1) - 1;
        match self {
            ExactFloat::Short { sum, base } => {
                // 53 bits shifted by 73 fill 126: one is left for the sign, one for the addition to notice the end.
                let shift = position.wrapping_sub(u32::from(*base));
                if shift <= 73 {
                    let term = i128::from(significand) << shift;
                    if let Some(fits) = sum.checked_add(if negative { -term } else { term }) {
                        *sum = fits;
                        return;
                    }
                }
                if significand != 0 {
                    let term = i128::from(significand);
                    self.realign(if negative { -term } else { term }, position, SLACK_BELOW);
                }
            }
            ExactFloat::Long(chunks) => chunks.push(negative, significand, position),
        }
    }

    pub fn merge(&mut self, other: &ExactFloat) {
        match (&mut *self, other) {
            (ExactFloat::Short { .. }, ExactFloat::Short { sum, base }) => self.add_term(*sum, u32::from(*base)),
            (ExactFloat::Long(chunks), ExactFloat::Short { sum, base }) => {
                chunks.add_wide(*sum < 0, sum.unsigned_abs(), u32::from(*base));
            }
            (_, ExactFloat::Long(other)) => self.lengthen().add_all(other, i64::wrapping_add),
        }
    }

    pub fn unmerge(&mut self, other: &ExactFloat) {
        match (&mut *self, other) {
            (ExactFloat::Short { .. }, ExactFloat::Short { sum, base }) if *sum != i128::MIN => {
                self.add_term(-*sum, u32::from(*base));
            }
            (_, ExactFloat::Short { sum, base }) => {
                self.lengthen().add_wide(*sum >= 0, sum.unsigned_abs(), u32::from(*base));
            }
            (_, ExactFloat::Long(other)) => self.lengthen().add_all(other, i64::wrapping_sub),
        }
    }

    /// The float64 nearest to the sum divided by `divisors`, rounded once.
    pub fn nearest(&self, divisors: &[u64]) -> f64 {
        match self {
            ExactFloat::Short { sum, base } => {
                let magnitude = sum.unsigned_abs();
                let limbs = [magnitude as u64, (magnitude >> 64) as u64];
                rounding::nearest(*sum < 0, &limbs, i32::from(*base) + LOWEST_EXPONENT, divisors)
            }
            ExactFloat::Long(chunks) => {
                let (negative, limbs) = chunks.magnitude();
                rounding::nearest(negative, &limbs, LOWEST_EXPONENT, divisors)
            }
        }
    }

    /// The magnitude, lowest limb first, and the position of its lowest bit.
    pub fn magnitude(&self) -> (Vec<u64>, u32) {
        match self {
            ExactFloat::Short { sum, base } => {
                let magnitude = sum.unsigned_abs();
                (vec![magnitude as u64, (magnitude >> 64) as u64], u32::from(*base))
            }
            ExactFloat::Long(chunks) => (chunks.magnitude().1.to_vec(), 0),
        }
    }

    /// Adds to a short sum.
    #[inline]
    fn add_term(&mut self, term: i128, position: u32) {
        if let ExactFloat::Short { sum, base } = self {
            let shift = position.wrapping_sub(u32::from(*base));
            let aligned = term << (shift & 127);
            if shift < 127
                && aligned >> shift == term
                && let Some(fits) = sum.checked_add(aligned)
            {
                *sum = fits;
                return;
            }
        }
        if term != 0 {
            self.realign(term, position, 0);
        }
    }

    /// Adds to a short sum where base or room do not suit: finds a better base, else moves to the long form.
    #[cold]
    fn realign(&mut self, term: i128, position: u32, slack: u32) {
        let ExactFloat::Short { sum, base } = self else { unreachable!("only short sums have a base to move") };
        let (term_odd, term_low) = without_trailing_zeros(term, position);
        let (sum_odd, sum_low) = if *sum == 0 { (0, term_low) } else { without_trailing_zeros(*sum, u32::from(*base)) };

        // Every base up to the lowest bit that is set is exact; one more bit above the highest takes the carry.
        let bits = |x: i128| 128 - x.unsigned_abs().leading_zeros();
        let end = (term_low + bits(term_odd)).max(sum_low + bits(sum_odd)) + 1;
        let highest_base = term_low.min(sum_low).min(BASE_MAX);
        if end - highest_base > 126 {
            return self.lengthen().add_wide(term < 0, term.unsigned_abs(), position);
        }
        let lowest_base = end.saturating_sub(126 - ROOM_ABOVE).min(highest_base);
        let wished = if *sum == 0 { position } else { position.min(u32::from(*base)) };
        let new_base = wished.saturating_sub(slack).clamp(lowest_base, highest_base);
        *sum = (sum_odd << (sum_low - new_base)) + (term_odd << (term_low - new_base));
        *base = new_base as u16;
    }

    fn lengthen(&mut self) -> &mut Chunks {
        if let ExactFloat::Short { .. } = self {
            *self = ExactFloat::Long(Box::new(self.chunks()));
        }
        match self {
            ExactFloat::Long(chunks) => chunks,
            ExactFloat::Short { .. } => unreachable!("a short sum was just made long"),
        }
    }

    /// The long form, settled: the same number gives the same chunks.
    fn chunks(&self) -> Chunks {
        match self {
            ExactFloat::Short { sum, base } => {
                let mut chunks = Chunks::ZERO;
                chunks.add_wide(*sum < 0, sum.unsigned_abs(), u32::from(*base));
                chunks.settle();
                chunks
            }
            ExactFloat::Long(chunks) => chunks.settled(),
        }
    }
}

fn without_trailing_zeros(x: i128, position: u32) -> (i128, u32) {
    (x >> x.trailing_zeros(), position + x.trailing_zeros())
}

impl PartialEq for ExactFloat {
    fn eq(&self, other: &ExactFloat) -> bool {
        match (self, other) {
            (ExactFloat::Short { sum: 0, .. }, ExactFloat::Short { sum, .. })
            | (ExactFloat::Short { sum, .. }, ExactFloat::Short { sum: 0, .. }) => *sum == 0,
            (ExactFloat::Short { sum: a, base: a_base }, ExactFloat::Short { sum: b, base: b_base }) => {
                without_trailing_zeros(*a, u32::from(*a_base)) == without_trailing_zeros(*b, u32::from(*b_base))
            }
            _ => self.chunks().chunks == other.chunks().chunks,
        }
    }
}
impl Eq for ExactFloat {}

// The long form.

const CHUNKS: usize = 68;
const TOP: usize = CHUNKS - 1;

/// Additions between two settlings. A push adds less than 2^52 to a chunk; two sums that both waited this long can still
/// be merged without leaving an i64.
const PENDING_MAX: u32 = 1000;

/// Σ `chunks[i]` · 2^(32 i), modulo 2^2208, which no sum of fewer than 2^100 float64s reaches.
#[derive(Debug, Clone)]
pub struct Chunks {
    /// Settled: all but the top one in 0..2^32, the top one carries the sign. Otherwise below (`pending` + 1) · 2^52.
    chunks: [i64; CHUNKS],
    pending: u32,
}

impl Chunks {
    const ZERO: Chunks = Chunks { chunks: [0; CHUNKS], pending: 0 };

    #[inline]
    fn push(&mut self, negative: bool, significand: u64, position: u32) {
        let (chunk, shift) = ((position / 32) as usize, position % 32);
        let low = ((significand << shift) & 0xffff_ffff) as i64;
        let high = (significand >> (32 - shift)) as i64;
        if negative {
            self.chunks[chunk] -= low;
            self.chunks[chunk + 1] -= high;
        } else {
            self.chunks[chunk] += low;
            self.chunks[chunk + 1] += high;
        }
        self.count_pending(1);
    }

    fn add_wide(&mut self, negative: bool, magnitude: u128, position: u32) {
        let (chunk, shift) = ((position / 32) as usize, position % 32);
        let low = magnitude << shift;
        let high = if shift == 0 { 0 } else { magnitude >> (128 - shift) };
        for i in 0..5 {
            let part = if i < 4 { (low >> (32 * i)) as u32 } else { high as u32 };
            // What lies beyond the top chunk is its upper half.
            let (chunk, part) = match chunk + i {
                beyond if beyond > TOP => (TOP, i64::from(part) << 32),
                within => (within, i64::from(part)),
            };
            self.chunks[chunk] = self.chunks[chunk].wrapping_add(if negative { part.wrapping_neg() } else { part });
        }
        self.count_pending(1);
    }

    fn add_all(&mut self, other: &Chunks, add: impl Fn(i64, i64) -> i64) {
        for (chunk, other) in self.chunks.iter_mut().zip(&other.chunks) {
            *chunk = add(*chunk, *other);
        }
        self.count_pending(other.pending + 1);
    }

    #[inline]
    fn count_pending(&mut self, additions: u32) {
        self.pending += additions;
        if self.pending >= PENDING_MAX {
            self.settle();
        }
    }

    /// Sends the carries up.
    #[cold]
    fn settle(&mut self) {
        let mut carry = 0;
        for chunk in &mut self.chunks[..TOP] {
            let sum = chunk.wrapping_add(carry);
            carry = sum >> 32;
            *chunk = sum & 0xffff_ffff;
        }
        self.chunks[TOP] = self.chunks[TOP].wrapping_add(carry);
        self.pending = 0;
    }

    fn settled(&self) -> Chunks {
        let mut settled = self.clone();
        settled.settle();
        settled
    }

    fn magnitude(&self) -> (bool, [u64; LIMBS_MAX]) {
        let mut settled = self.settled();
        let negative = settled.chunks[TOP] < 0;
        if negative {
            settled.chunks.iter_mut().for_each(|chunk| *chunk = chunk.wrapping_neg());
            settled.settle();
        }
        let mut limbs = [0; LIMBS_MAX];
        for (limb, pair) in limbs.iter_mut().zip(settled.chunks[..TOP].chunks(2)) {
            *limb = pair.iter().rev().fold(0, |limb, chunk| limb << 32 | *chunk as u64);
        }
        let top = settled.chunks[TOP] as u64;
        limbs[TOP / 2] |= top << 32;
        limbs[TOP / 2 + 1] = top >> 32;
        (negative, limbs)
    }
}

// The encoding: sign and magnitude, and of the magnitude only the stretches of bytes that are not zero.
//
//   varint(stretches << 2 | mark << 1 | negative), then for each stretch from the lowest byte up:
//   varint(zero bytes since the last stretch, less 3 after the first), varint(length - 1), bytes
//
// A stretch begins and ends with a byte that is not zero and holds at most two zeros in a row. So a number has one
// encoding, and the decoder refuses all others.

/// Bytes in the magnitude of the longest sum.
const BYTES_MAX: usize = CHUNKS * 4 + 4;

/// This many zeros in a row are cheaper to skip than to write.
const ZEROS_MIN: usize = 3;

impl ExactFloat {
    /// Appends the number, and a bit that belongs to the caller.
    pub fn encode(&self, mark: bool, out: &mut Vec<u8>) {
        match self {
            ExactFloat::Short { sum: 0, .. } => encode_magnitude(false, mark, &[], 0, out),
            ExactFloat::Short { sum, base } => {
                let position = u32::from(*base) + sum.trailing_zeros();
                let odd = sum.unsigned_abs() >> sum.trailing_zeros();
                let shift = position % 8;
                let mut bytes = [0; 17];
                bytes[..16].copy_from_slice(&(odd << shift).to_le_bytes());
                bytes[16] = if shift == 0 { 0 } else { (odd >> (128 - shift)) as u8 };
                encode_magnitude(*sum < 0, mark, &bytes, (position / 8) as usize, out);
            }
            ExactFloat::Long(chunks) => {
                let (negative, limbs) = chunks.magnitude();
                let mut bytes = [0; LIMBS_MAX * 8];
                for (bytes, limb) in bytes.chunks_exact_mut(8).zip(limbs) {
                    bytes.copy_from_slice(&limb.to_le_bytes());
                }
                encode_magnitude(negative, mark, &bytes, 0, out);
            }
        }
    }

    pub fn decode(bytes: &mut &[u8]) -> Result<(ExactFloat, bool), DecodeError> {
        let header = varint::decode_u64(bytes)?;
        let (negative, mark, stretches) = (header & 1 == 1, header >> 1 & 1 == 1, header >> 2);
        if stretches == 0 {
            if negative {
                return Err(DecodeError::Invalid("a zero sum has a sign"));
            }
            return Ok((ExactFloat::default(), mark));
        }

        // Sixteen bytes more than a magnitude has, so that a u128 can be read anywhere in it.
        let mut magnitude = [0; BYTES_MAX + 16];
        let (mut start, mut end) = (0, 0);
        for i in 0..stretches {
            let zeros = varint::decode_u64(bytes)?.saturating_add(if i == 0 { 0 } else { ZEROS_MIN as u64 });
            let length = varint::decode_u64(bytes)?.saturating_add(1);
            let from = (end as u64).saturating_add(zeros);
            if from.saturating_add(length) > BYTES_MAX as u64 {
                return Err(DecodeError::Invalid("a sum is longer than any sum of floats"));
            }
            let (stretch, rest) = bytes.split_at_checked(length as usize).ok_or(DecodeError::Truncated)?;
            if next_stretch(stretch, 0) != Some((0, stretch.len())) {
                return Err(DecodeError::Invalid("a sum is spelled with zeros it does not need"));
            }
            *bytes = rest;
            end = (from + length) as usize;
            magnitude[from as usize..end].copy_from_slice(stretch);
            if i == 0 {
                start = from as usize;
            }
        }

        let sum = if end - start <= 15 && start * 8 <= BASE_MAX as usize {
            let mut window = [0; 16];
            window.copy_from_slice(&magnitude[start..start + 16]);
            let sum = i128::from_le_bytes(window);
            ExactFloat::Short { sum: if negative { -sum } else { sum }, base: (start * 8) as u16 }
        } else {
            let mut chunks = Chunks::ZERO;
            for (chunk, bytes) in chunks.chunks.iter_mut().zip(magnitude.chunks_exact(4)) {
                *chunk = bytes.iter().rev().fold(0, |chunk, byte| chunk << 8 | i64::from(*byte));
            }
            let top = magnitude[TOP * 4..BYTES_MAX].iter().rev().fold(0, |top: u64, byte| top << 8 | u64::from(*byte));
            chunks.chunks[TOP] =
                i64::try_from(top).map_err(|_| DecodeError::Invalid("a sum is longer than any sum of floats"))?;
            if negative {
                chunks.chunks.iter_mut().for_each(|chunk| *chunk = -*chunk);
            }
            ExactFloat::Long(Box::new(chunks))
        };
        Ok((sum, mark))
    }
}

/// `bytes`, lowest first, start at byte `offset` of the magnitude.
fn encode_magnitude(negative: bool, mark: bool, bytes: &[u8], offset: usize, out: &mut Vec<u8>) {
    let stretches = || {
        let mut from = 0;
        std::iter::from_fn(move || {
            let stretch = next_stretch(bytes, from)?;
            from = stretch.1;
            Some(stretch)
        })
    };
    let count = stretches().count() as u64;
    varint::encode_u64(count << 2 | u64::from(mark) << 1 | u64::from(negative), out);
    let mut previous_end = None;
    for (start, end) in stretches() {
        let zeros = match previous_end {
            None => start + offset,
            Some(previous_end) => start - previous_end - ZEROS_MIN,
        };
        varint::encode_u64(zeros as u64, out);
        varint::encode_u64((end - start - 1) as u64, out);
        out.extend_from_slice(&bytes[start..end]);
        previous_end = Some(end);
    }
}

/// Start and end of the first stretch at or after `from`.
fn next_stretch(bytes: &[u8], from: usize) -> Option<(usize, usize)> {
    let start = from + bytes[from..].iter().position(|byte| *byte != 0)?;
    let mut end = start + 1;
    let mut next = end;
    while next < bytes.len() && next - end < ZEROS_MIN {
        if bytes[next] != 0 {
            end = next + 1;
        }
        next += 1;
    }
    Some((start, end))
}

#[cfg(test)]
mod tests;
