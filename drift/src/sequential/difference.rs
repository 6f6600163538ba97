//! Two arms: whether the challenger's mean outcome is above or below the champion's, by a margin.
//!
//! An arm is drawn for a unit with a share that is known, so a unit's outcome x gains (1 − share)·(x − centre) if the
//! challenger had it, and −share·(x − centre) if the champion did. The draw does not know the outcome, so the gain's
//! expectation is share·(1 − share) times the difference of the arms *at that moment*: rush hours and ramps change the
//! level of both arms, not what is compared. Steps of a ramp have shares of their own and add up.
//!
//! Only units that had no arm before may be counted: one that a ramp moved is in the challenger for certain.

use super::bets::{Bet, Shape, Sums, ln_wealth};

/// What came in under one share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stratum {
    /// Of units that the challenger gets, in (0, 1).
    pub share: f64,
    pub challenger: Sums,
    pub champion: Sums,
    /// About where outcomes are; the nearer, the less is lost to arms that are not exactly as large as their shares. It must
    /// be known before the stratum begins: from shadow, or from the steps before.
    pub centre: f64,
}

/// The logarithm of the evidence that the challenger's mean is above the champion's plus `margin`.
pub fn ln_above(strata: &[Stratum], margin: f64, shape: Shape) -> f64 {
    ln_wealth(&bets(strata, margin, 1.0), shape)
}

/// The logarithm of the evidence that the challenger's mean is below the champion's plus `margin`.
pub fn ln_below(strata: &[Stratum], margin: f64, shape: Shape) -> f64 {
    ln_wealth(&bets(strata, margin, -1.0), shape)
}

/// The difference is at least and at most this, each with confidence 1 − alpha over all looks.
pub fn bounds(strata: &[Stratum], alpha: f64, shape: Shape) -> (f64, f64) {
    let wanted = -libm::log(alpha);
    let Some(middle) = estimate(strata) else { return (-1.0, 1.0) };
    let search = |end: f64, refuted: &dyn Fn(f64) -> bool| {
        // From the end inwards to the first margin that is not refuted.
        const POINTS: i32 = 24;
        let at = |point: i32| {
            let share = f64::from(point) / f64::from(POINTS);
            middle + (end - middle) * share * share
        };
        let Some(first) = (0..=POINTS).rev().find(|point| !refuted(at(*point))) else { return middle };
        if first == POINTS {
            return end;
        }
        let (mut kept, mut out) = (at(first), at(first + 1));
        for _ in 0..32 {
            let between = 0.5 * (kept + out);
            if refuted(between) { out = between } else { kept = between }
        }
        out
    };
    let low = search(-1.0, &|margin| ln_above(strata, margin, shape) >= wanted);
    let high = search(1.0, &|margin| ln_below(strata, margin, shape) >= wanted);
    (low, high)
}

/// The difference of means, strata weighed as evidence weighs them. None while an arm is empty.
pub fn estimate(strata: &[Stratum]) -> Option<f64> {
    let (mut weighted, mut weights) = (0.0, 0.0);
    for stratum in strata {
        if let (Some(challenger), Some(champion)) = (stratum.challenger.mean(), stratum.champion.mean()) {
            let units = stratum.challenger.units + stratum.champion.units;
            let weight = units * stratum.share * (1.0 - stratum.share);
            weighted += weight * (challenger - champion);
            weights += weight;
        }
    }
    (weights > 0.0).then(|| (weighted / weights).clamp(-1.0, 1.0))
}

fn bets(strata: &[Stratum], margin: f64, sign: f64) -> Vec<Bet> {
    // A step that gives everybody the same arm compares nothing.
    let compared = strata.iter().filter(|stratum| stratum.share > 0.0 && stratum.share < 1.0);
    compared
        .flat_map(|Stratum { share, challenger, champion, centre }| {
            let margin = share * (1.0 - share) * margin;
            let gain = |weight: f64, x: f64| sign * (weight * (x - centre) - margin);
            let bet = |sums: &Sums, weight| Bet { sums: *sums, at_zero: gain(weight, 0.0), at_one: gain(weight, 1.0) };
            [bet(challenger, 1.0 - share), bet(champion, -share)]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn rate(events: f64, units: f64) -> Sums {
        Sums { units, sum: events, squares: events }
    }

    fn even(challenger: Sums, champion: Sums) -> Stratum {
        Stratum { share: 0.5, challenger, champion, centre: 0.0 }
    }

    #[test]
    fn expected_evidence_of_equal_arms_is_at_most_one() {
        // Every way in which six units can fall into arms and outcomes, weighed by its chance.
        for (share, level, centre) in [(0.5, 0.3, 0.0), (0.1, 0.5, 0.4), (0.25, 0.05, 0.05)] {
            for shape in [Shape::Rate, Shape::Mean] {
                for evidence in [ln_above, ln_below] {
                    let mut expected = 0.0;
                    for ways in 0..4_u32.pow(6) {
                        let (mut arms, mut chance) = ([Sums::default(); 2], 1.0);
                        for unit in 0..6 {
                            let (arm, outcome) = ((ways >> (2 * unit)) & 1, (ways >> (2 * unit + 1)) & 1);
                            chance *= if arm == 0 { share } else { 1.0 - share };
                            chance *= if outcome == 1 { level } else { 1.0 - level };
                            arms[arm as usize] = arms[arm as usize].plus(&rate(f64::from(outcome), 1.0));
                        }
                        let stratum = Stratum { share, challenger: arms[0], champion: arms[1], centre };
                        expected += chance * evidence(&[stratum], 0.0, shape).exp();
                    }
                    assert!(expected <= 1.0 + 1e-9 && expected > 0.3, "{share} {level}: {expected}");
                }
            }
        }
    }

    #[test]
    fn a_difference_is_found_and_its_bounds_enclose_it() {
        let strata = [even(rate(5_500.0, 100_000.0), rate(5_000.0, 100_000.0))];
        assert!(ln_above(&strata, 0.0, Shape::Rate) > 20f64.ln());
        assert!(ln_below(&strata, 0.0, Shape::Rate) < 0.0);
        let (low, high) = bounds(&strata, 0.05, Shape::Rate);
        assert!(low > 0.0 && low < 0.005 && high > 0.005 && high < 0.01, "{low} {high}");
        assert!((ln_above(&strata, low, Shape::Rate) - 20f64.ln()).abs() < 1e-6);
        assert_eq!(bounds(&[], 0.05, Shape::Rate), (-1.0, 1.0));
    }

    #[test]
    fn levels_that_change_with_the_share_are_no_difference() {
        // 1 % of units at night, where 2 % fail; half of them by day, where 10 % do: pooled, the challenger fails five times
        // as often as it should.
        let mut random = Random::new(1);
        let mut strata = Vec::new();
        for (share, level, units) in [(0.01, 0.02, 50_000), (0.5, 0.10, 5_000)] {
            let mut arms = [Sums::default(); 2];
            for _ in 0..units {
                let arm = usize::from(random.unit() >= share);
                arms[arm] = arms[arm].plus(&rate(f64::from(u8::from(random.unit() < level)), 1.0));
            }
            strata.push(Stratum { share, challenger: arms[0], champion: arms[1], centre: 0.0 });
        }
        let pooled = |arm: fn(&Stratum) -> Sums| {
            strata.iter().map(arm).fold(Sums::default(), |all, sums| all.plus(&sums)).mean().unwrap()
        };
        assert!(pooled(|stratum| stratum.challenger) > 2.0 * pooled(|stratum| stratum.champion));
        assert!(ln_above(&strata, 0.0, Shape::Rate) < 20f64.ln());
        assert!(estimate(&strata).unwrap().abs() < 0.01);
    }
}
