//! Tails of the distributions that rates are judged by.

/// The regularised incomplete beta function I_x(a, b): the probability that a binomial with a real-valued number of
/// trials a + b - 1 and chance x reaches a. Lentz's continued fraction (Press et al., Numerical Recipes, 6.4).
pub fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x.is_nan() || x <= 0.0 || b <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 || a <= 0.0 {
        return 1.0;
    }
    let log_front =
        libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b) + a * libm::log(x) + b * libm::log1p(-x);
    let front = libm::exp(log_front);
    // The fraction converges fast on one side of the mean only.
    if x < (a + 1.0) / (a + b + 2.0) { front * fraction(x, a, b) / a } else { 1.0 - front * fraction(1.0 - x, b, a) / b }
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
    fn large_arguments_converge() {
        let half = incomplete_beta(0.5, 1e7, 1e7);
        assert!((half - 0.5).abs() < 1e-6, "{half}");
    }
}
