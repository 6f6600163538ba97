//! Whether the mean of outcomes in [0, 1] lies above or below a bound, and between which bounds it lies.
//!
//! The claim that is bet against is that the expected outcome of each unit, given those before it, is at most (or at
//! least) the bound. It need not be the same for all units.

use super::bets::{Bet, Shape, Sums, ln_wealth};

/// The logarithm of the evidence that the mean is above `bound`: an e-value of the claim that it is not.
pub fn ln_above(sums: &Sums, bound: f64, shape: Shape) -> f64 {
    match bound {
        // Nothing lies above 1. That nothing lies above 0 is refuted by the first outcome that does.
        _ if bound >= 1.0 || bound.is_nan() => 0.0,
        _ if bound <= 0.0 => {
            if sums.sum > 0.0 {
                f64::INFINITY
            } else {
                0.0
            }
        }
        _ => ln_wealth(&[Bet { sums: *sums, at_zero: -bound, at_one: 1.0 - bound }], shape),
    }
}

/// The logarithm of the evidence that the mean is below `bound`.
pub fn ln_below(sums: &Sums, bound: f64, shape: Shape) -> f64 {
    ln_above(&sums.mirrored(), 1.0 - bound, shape)
}

/// The mean is at least this, with confidence 1 − alpha over all looks together.
pub fn lower(sums: &Sums, alpha: f64, shape: Shape) -> f64 {
    let Some(mean) = sums.mean() else { return 0.0 };
    let wanted = -libm::log(alpha);
    let refuted = |bound: f64| ln_above(sums, bound, shape) >= wanted;
    // Bounds are refuted from below; the first that is not is looked for, because evidence by squares need not fall
    // steadily with the bound.
    const POINTS: i32 = 24;
    let at = |point: i32| {
        let share = f64::from(point) / f64::from(POINTS);
        mean * share * share
    };
    let Some(first) = (1..=POINTS).find(|point| !refuted(at(*point))) else { return mean };
    let (mut low, mut high) = (at(first - 1), at(first));
    for _ in 0..32 {
        let middle = 0.5 * (low + high);
        if refuted(middle) { low = middle } else { high = middle }
    }
    low
}

/// The mean is at most this, with confidence 1 − alpha over all looks together.
pub fn upper(sums: &Sums, alpha: f64, shape: Shape) -> f64 {
    1.0 - lower(&sums.mirrored(), alpha, shape)
}

/// At most this share, with confidence 1 − alpha, where `events` of `rows` were found and rows are independent (Clopper and
/// Pearson). For one look, not for many; 3/n of 5 % where nothing was found.
pub fn upper_of_count(events: u64, rows: u64, alpha: f64) -> f64 {
    if events >= rows {
        return 1.0;
    }
    if events == 0 {
        return -libm::expm1(libm::log(alpha) / rows as f64);
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        // P(X ≤ events) = I_{1−p}(rows − events, events + 1)
        let chance = crate::special::incomplete_beta(1.0 - middle, (rows - events) as f64, (events + 1) as f64);
        if chance > alpha { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(events: f64, units: f64) -> Sums {
        Sums { units, sum: events, squares: events }
    }

    #[test]
    fn bounds_enclose_the_mean_and_close_in() {
        let mut width = 1.0;
        for units in [10.0, 100.0, 1_000.0, 10_000.0, 1e6] {
            let sums = rate(0.05 * units, units);
            let (low, high) = (lower(&sums, 0.05, Shape::Rate), upper(&sums, 0.05, Shape::Rate));
            assert!((0.0..=0.05).contains(&low) && (0.05..=1.0).contains(&high), "{low} {high}");
            assert!(high - low < width, "{units}: {low} {high}");
            width = high - low;
        }
        // Four deviations at a million units; one look alone would give two.
        assert!(width < 2.0 * 4.0 * (0.05 * 0.95 / 1e6_f64).sqrt(), "{width}");
    }

    #[test]
    fn bounds_and_evidence_agree() {
        for sums in [rate(3.0, 40.0), rate(50.0, 1_000.0), Sums { units: 200.0, sum: 80.0, squares: 33.0 }] {
            for shape in [Shape::Rate, Shape::Mean] {
                let wanted = -(0.01_f64).ln();
                let (low, high) = (lower(&sums, 0.01, shape), upper(&sums, 0.01, shape));
                assert!((ln_above(&sums, low, shape) - wanted).abs() < 1e-6, "{low}");
                assert!((ln_below(&sums, high, shape) - wanted).abs() < 1e-6, "{high}");
            }
        }
    }

    #[test]
    fn no_events_at_all_need_few_units() {
        // (1 − 0.005)^n ≤ 1/20 would need 598 units of one look.
        let units = (1..).step_by(10).find(|n| ln_below(&rate(0.0, f64::from(*n)), 0.005, Shape::Rate) >= 20f64.ln());
        assert!((598..1_200).contains(&units.unwrap()), "{units:?}");
    }

    #[test]
    fn the_ends_are_answers() {
        let nothing = Sums::default();
        assert_eq!((lower(&nothing, 0.05, Shape::Rate), upper(&nothing, 0.05, Shape::Rate)), (0.0, 1.0));
        assert_eq!(ln_above(&rate(1.0, 10.0), 0.0, Shape::Rate), f64::INFINITY);
        assert_eq!(ln_above(&rate(0.0, 10.0), 0.0, Shape::Rate), 0.0);
        assert_eq!(ln_above(&rate(10.0, 10.0), 1.0, Shape::Rate), 0.0);
        let all = rate(50.0, 50.0);
        assert!(upper(&all, 0.05, Shape::Rate) == 1.0 && lower(&all, 0.05, Shape::Rate) > 0.8);
    }

    #[test]
    fn nothing_of_n_is_three_of_n() {
        assert!((upper_of_count(0, 5_000, 0.05) - 3.0 / 5_000.0).abs() < 2e-6);
        assert!((upper_of_count(5, 100, 0.05) - 0.102_3).abs() < 1e-3);
        assert_eq!(upper_of_count(0, 0, 0.05), 1.0);
    }
}
