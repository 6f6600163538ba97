//! Functions that verdicts are computed with: a logarithm, and tails of distributions.

/// ln x of a positive, finite, normal x, within a unit of the last place (Sun's fdlibm). Floors take hundreds of
/// logarithms for each replicate, so this one is inlined; and it is the same everywhere, as the platform's is not.
#[inline]
pub fn ln(x: f64) -> f64 {
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // x = 2^k · f with f between √½ and √2.
    let bits = x.to_bits();
    let above = (bits + (0x3ff0_0000_0000_0000 - 0x3fe6_a09e_0000_0000)) >> 52;
    let k = above as i64 - 0x3ff;
    let f = f64::from_bits(bits.wrapping_sub((k as u64) << 52)) - 1.0;
    // ln(1 + f) = f − f²/2 + s (f²/2 + R(s²)), s = f / (2 + f).
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let even = w * (0.399_999_999_994_094_2 + w * (0.222_221_984_321_497_84 + w * 0.153_138_376_992_093_73));
    let odd = z
        * (0.666_666_666_666_673_5
            + w * (0.285_714_287_436_623_9 + w * (0.181_835_721_616_180_5 + w * 0.147_981_986_051_165_86)));
    let half = 0.5 * f * f;
    let k = k as f64;
    s * (half + (even + odd)) + k * LN_2_LOW - half + f + k * LN_2_HIGH
}

/// ln k! of a whole number: Stirling's series, which is exact enough from ten on.
pub fn ln_factorial(k: f64) -> f64 {
    const SMALL: [f64; 10] = [1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0, 5_040.0, 40_320.0, 362_880.0];
    if let Some(factorial) = SMALL.get(k as usize) {
        return ln(*factorial);
    }
    const LN_ROOT_TAU: f64 = 0.918_938_533_204_672_7;
    let inverse = 1.0 / k;
    let square = inverse * inverse;
    (k + 0.5) * ln(k) - k
        + LN_ROOT_TAU
        + inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1_260.0 - square / 1_680.0)))
}

/// The regularised incomplete beta function I_x(a, b): the probability that a binomial with a real-valued number of
/// trials a + b - 1 and chance x reaches a. Lentz's continued fraction (Press et al., Numerical Recipes, 6.4).
pub fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x.is_nan() || x <= 0.0 || b <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 || a <= 0.0 {
        return 1.0;
    }
    let log_front = libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b) + a * libm::log(x) + b * libm::log1p(-x);
    let front = libm::exp(log_front);
    // The fraction converges fast on one side of the mean only.
    if x < (a + 1.0) / (a + b + 2.0) {
        front * fraction(x, a, b) / a
    } else {
        1.0 - front * fraction(1.0 - x, b, a) / b
    }
    .clamp(0.0, 1.0)
}

fn fraction(x: f64, a: f64, b: f64) -> f64 {
    const TINY: f64 = 1e-300;
    let away_from_zero = |x: f64| if x.abs() < TINY { TINY } else { x };
    let mut c = 1.0;
    let mut d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
    let mut result = d;
    // O(√max(a, b)) steps; the bound is for arguments beyond 10^9.
    for step in 1..100_000 {
        let m = f64::from(step);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut change = 1.0;
        for term in [even, odd] {
            d = 1.0 / away_from_zero(1.0 + term * d);
            c = away_from_zero(1.0 + term / c);
            change = c * d;
            result *= change;
        }
        if (change - 1.0).abs() < 1e-14 {
            break;
        }
    }
    result
}

/// P(T ≥ t) of Student's t.
pub fn student_upper(t: f64, freedom: f64) -> f64 {
    let beyond = 0.5 * incomplete_beta(freedom / (freedom + t * t), 0.5 * freedom, 0.5);
    if t >= 0.0 { beyond } else { 1.0 - beyond }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, computed: f64, expected: f64) {
        assert!((computed - expected).abs() <= 1e-9 * expected.abs(), "{name}: {computed:e}, not {expected:e}");
    }

    #[test]
    fn tails_agree_with_closed_forms() {
        // I_x(1, b) = 1 - (1 - x)^b, I_x(a, 1) = x^a, and a binomial counted by hand.
        check("first", incomplete_beta(0.3, 1.0, 2.5), 1.0 - 0.7_f64.powf(2.5));
        check("second", incomplete_beta(0.2, 7.0, 1.0), 0.2_f64.powi(7));
        check("binomial 10, 0.5, at least 8", incomplete_beta(0.5, 8.0, 3.0), 56.0 / 1024.0);
        // Cauchy: 1/2 - atan(t)/π.
        check("t 1", student_upper(3.0, 1.0), 0.5 - 3.0_f64.atan() / std::f64::consts::PI);
        // Two degrees: 1/2 - t / (2 √(2 + t²)).
        check("t 2", student_upper(-1.5, 2.0), 0.5 + 1.5 / (2.0 * 4.25_f64.sqrt()));
        assert_eq!(incomplete_beta(0.5, 0.0, 3.0), 1.0);
        assert_eq!(incomplete_beta(f64::NAN, 2.0, 3.0), 0.0);
    }

    #[test]
    fn logarithms_are_right_to_the_last_digits() {
        let mut x = 1e-300;
        while x < 1e300 {
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1e-300), "{x:e}");
            x *= 1.003_7;
        }
        for x in [1.0, 1.0 + f64::EPSILON, 1.0 - f64::EPSILON, 0.999_9, 1.000_1, 2.0, std::f64::consts::SQRT_2] {
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs(), "{x:e}");
        }
        for k in [0.0, 1.0, 7.0, 9.0, 10.0, 11.0, 100.0, 1e6] {
            assert!((ln_factorial(k) - libm::lgamma(k + 1.0)).abs() <= 1e-12 * libm::lgamma(k + 1.0).max(1.0), "{k}");
        }
    }

    #[test]
    fn large_arguments_converge() {
        let half = incomplete_beta(0.5, 1e7, 1e7);
        assert!((half - 0.5).abs() < 1e-6, "{half}");
    }
}
