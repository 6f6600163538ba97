//! Numbers from a seed, the same on every machine: verdicts must be reproducible, so the generator and everything drawn
//! from it are ours, over a pinned libm.

use crate::special::{ln, ln_factorial};

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `x`. Fixed for ever, because buckets of
/// blocks and hashes of categories are stored.
#[inline]
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The hash of a text or a key. Fixed for ever, as [`mix`] is.
#[inline]
pub fn hash(bytes: &[u8]) -> u64 {
    // The last word may lap over the one before: the length tells them apart, and no byte is copied.
    let (mut state, last) = match bytes {
        [] => (0, 0),
        [first, .., last] if bytes.len() < 4 => {
            (0, u64::from(*first) | u64::from(bytes[bytes.len() / 2]) << 8 | u64::from(*last) << 16)
        }
        [only] => (0, u64::from(*only)),
        _ => match (bytes.first_chunk::<8>(), bytes.last_chunk::<8>()) {
            (Some(_), Some(last)) => {
                let words = bytes[..bytes.len() - 1].as_chunks::<8>().0;
                let state = words.iter().fold(GOLDEN, |state, word| fold(state ^ u64::from_le_bytes(*word)));
                (state, u64::from_le_bytes(*last))
            }
            _ => {
                let half = |half: Option<&[u8; 4]>| half.map_or(0, |half| u64::from(u32::from_le_bytes(*half)));
                (0, half(bytes.first_chunk()) | half(bytes.last_chunk()) << 32)
            }
        },
    };
    state = state.wrapping_add(bytes.len() as u64);
    mix(fold(fold(state) ^ last))
}

/// 2^64 / φ, odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Both halves of a product of 128 bits: no bit of a word is lost before the next word comes in.
#[inline]
fn fold(x: u64) -> u64 {
    let product = u128::from(x) * u128::from(0xd6e8_feb8_6659_fd93_u64);
    (product as u64 ^ (product >> 64) as u64).wrapping_add(GOLDEN)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// A generator of its own for one of several purposes under one seed.
    pub fn of(seed: u64, purpose: u64) -> Random {
        Random(mix(seed ^ mix(purpose.wrapping_add(GOLDEN))))
    }

    #[inline]
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Uniform in (0, 1), both ends excluded, so that its logarithm exists.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) * (1.0 / (1_u64 << 52) as f64)
    }

    /// Uniform in 0..`end`; 0 where there is nothing to choose from.
    #[inline]
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(end)) >> 64) as u64
    }

    /// Standard normal (Marsaglia and Bray's polar method, 1964).
    pub fn normal(&mut self) -> f64 {
        // Four tries in five succeed; the bound is for a generator that is stuck.
        for _ in 0..1_000 {
            let (u, v) = (2.0 * self.unit() - 1.0, 2.0 * self.unit() - 1.0);
            let square = u * u + v * v;
            if square < 1.0 && square > 1e-300 {
                return u * (-2.0 * ln(square) / square).sqrt();
            }
        }
        0.0
    }

    /// Chi-squared with `freedom` degrees, at least one: twice a gamma variate (Marsaglia and Tsang 2000).
    pub fn chi_squared(&mut self, freedom: f64) -> f64 {
        // The method wants a shape of at least one; a smaller one is the larger one's, shrunk.
        let shape = freedom.max(1.0) / 2.0;
        let (shape, shrink) =
            if shape < 1.0 { (shape + 1.0, libm::pow(self.unit(), 1.0 / shape)) } else { (shape, 1.0) };
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        for _ in 0..1_000 {
            let x = self.normal();
            let v = (1.0 + c * x) * (1.0 + c * x) * (1.0 + c * x);
            if v > 0.0 && ln(self.unit()) < 0.5 * x * x + d - d * v + d * ln(v) {
                return 2.0 * d * v * shrink;
            }
        }
        freedom
    }
}

/// Poisson with one mean: by counting where it is small, by Hörmann's transformed rejection (PTRS, 1993) for others.
#[derive(Debug, Clone)]
pub struct Poisson {
    mean: f64,
    /// e^−mean of a small mean, else its logarithm.
    exponential: f64,
    a: f64,
    b: f64,
    inverse_alpha: f64,
    v_r: f64,
}

const MEAN_SMALL: f64 = 10.0;

impl Poisson {
    /// Of a mean that is not positive, always zero.
    pub fn new(mean: f64) -> Poisson {
        let mean = mean.max(0.0);
        let b = 0.931 + 2.53 * mean.sqrt();
        let exponential = if mean < MEAN_SMALL { libm::exp(-mean) } else { ln(mean) };
        Poisson {
            mean,
            exponential,
            a: -0.059 + 0.02483 * b,
            b,
            inverse_alpha: 1.1239 + 1.1328 / (b - 3.4),
            v_r: 0.9277 - 3.6224 / (b - 2.0),
        }
    }

    pub fn draw(&self, random: &mut Random) -> f64 {
        if self.mean < MEAN_SMALL {
            let mut product = random.unit();
            let mut count = 0.0;
            while product > self.exponential {
                product *= random.unit();
                count += 1.0;
            }
            return count;
        }
        // Three tries in four succeed; the bound is for means that nobody has.
        for _ in 0..1_000 {
            let u = random.unit() - 0.5;
            let v = random.unit();
            let us = 0.5 - u.abs();
            let k = ((2.0 * self.a / us + self.b) * u + self.mean + 0.43).floor();
            if us >= 0.07 && v <= self.v_r {
                return k;
            }
            if k < 0.0 || (us < 0.013 && v > us) {
                continue;
            }
            let accept = ln(v * self.inverse_alpha / (self.a / (us * us) + self.b));
            if accept <= k * self.exponential - self.mean - ln_factorial(k) {
                return k;
            }
        }
        self.mean.round()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(draws: impl Iterator<Item = f64>) -> (f64, f64) {
        let draws: Vec<f64> = draws.collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        (mean, draws.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / draws.len() as f64)
    }

    fn check(name: &str, (mean, variance): (f64, f64), expected: (f64, f64)) {
        let close = |x: f64, y: f64| (x - y).abs() <= 0.05 * y.abs().max(0.5);
        assert!(close(mean, expected.0) && close(variance, expected.1), "{name}: {mean} {variance}");
    }

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let mut random = Random::new(7);
        let mut draw = |f: fn(&mut Random) -> f64| moments((0..40_000).map(|_| f(&mut random)));
        check("unit", draw(Random::unit), (0.5, 1.0 / 12.0));
        check("normal", draw(Random::normal), (0.0, 1.0));
        check("chi 1", draw(|random| random.chi_squared(1.0)), (1.0, 2.0));
        check("chi 63", draw(|random| random.chi_squared(63.0)), (63.0, 126.0));
        for mean in [0.3, 9.9, 10.0, 25.0, 5_000.0, 1e9] {
            let poisson = Poisson::new(mean);
            check("poisson", moments((0..40_000).map(|_| poisson.draw(&mut random))), (mean, mean));
        }
        assert_eq!(Poisson::new(0.0).draw(&mut random), 0.0);
        assert_eq!(Poisson::new(-1.0).draw(&mut random), 0.0);
    }

    #[test]
    fn texts_have_hashes_of_their_own() {
        let texts = (0..40_usize).flat_map(|length| {
            let plain = vec![b'a'; length];
            let changed = (0..length).map(move |place| {
                let mut text = vec![b'a'; length];
                text[place] = b'b';
                text
            });
            std::iter::once(plain).chain(changed)
        });
        let hashes: Vec<u64> = texts.map(|text| hash(&text)).collect();
        let different: std::collections::HashSet<&u64> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
    }

    #[test]
    fn numbers_that_are_stored_never_change() {
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
        assert_eq!([hash(b"JFK"), hash(b"La Guardia")], [4_245_183_041_408_929_710, 10_739_320_708_387_484_549]);
    }
}
