//! Whether units fall into the arms as they were meant to. If they do not, something loses or repeats units of one arm, and
//! nothing that compares arms can be believed, so a rollout holds.
//!
//! The evidence is a mixture of Dirichlet-multinomial likelihood ratios (Lindon and Malek 2022): of a split somewhere near the
//! declared one against the declared one, at four scales of nearness. It may be looked at after every unit.

use super::bets::ln_sum;

/// Concentrations of the priors around the declared split: a split that is off by a deviation of 1/(2√c). One scale alone
/// would find either large faults late or small ones hardly.
const CONCENTRATIONS: [f64; 4] = [1.0, 1e2, 1e4, 1e6];

/// One split and how many units fell where.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Of all units, by arm; they add up to 1.
    pub shares: Vec<f64>,
    pub units: Vec<u64>,
}

/// The logarithm of the evidence that the units were not split so. Splits are steps of one rollout: a fault is more likely to
/// begin with one of them than to be in all, so their evidence is averaged.
pub fn ln_evidence(splits: &[Split]) -> f64 {
    let each: Vec<f64> = splits.iter().map(of_one).collect();
    match each.len() {
        0 => 0.0,
        count => ln_sum(&each) - libm::log(count as f64),
    }
}

fn of_one(split: &Split) -> f64 {
    let arms = || split.shares.iter().copied().zip(split.units.iter().copied());
    // A unit where none can be is proof.
    if arms().any(|(share, units)| share <= 0.0 && units > 0) {
        return f64::INFINITY;
    }
    let arms = || arms().filter(|(share, _)| *share > 0.0).map(|(share, units)| (share, units as f64));
    let all: f64 = arms().map(|(_, units)| units).sum();
    if arms().count() < 2 || all <= 0.0 {
        return 0.0;
    }
    let declared: f64 = arms().map(|(share, units)| units * libm::log(share)).sum();
    let by_scale = CONCENTRATIONS.map(|concentration| {
        let each = arms()
            .map(|(share, units)| libm::lgamma(concentration * share + units) - libm::lgamma(concentration * share));
        libm::lgamma(concentration) - libm::lgamma(concentration + all) + each.sum::<f64>() - declared
    });
    ln_sum(&by_scale) - libm::log(CONCENTRATIONS.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(share: f64, units: [u64; 2]) -> Split {
        Split { shares: vec![share, 1.0 - share], units: units.to_vec() }
    }

    #[test]
    fn expected_evidence_of_a_true_split_is_one() {
        for share in [0.5, 0.1, 0.01] {
            let mut expected = 0.0;
            for challenger in 0..=12_u64 {
                let ways = (0..challenger).fold(1.0, |ways, i| ways * (12 - i) as f64 / (i + 1) as f64);
                let chance =
                    ways * f64::powf(share, challenger as f64) * f64::powf(1.0 - share, (12 - challenger) as f64);
                expected += chance * ln_evidence(&[split(share, [challenger, 12 - challenger])]).exp();
            }
            assert!((expected - 1.0).abs() < 1e-9, "{expected}");
        }
    }

    #[test]
    fn what_is_off_is_found() {
        let wanted = 1_000f64.ln();
        // A percent too many of half a million.
        assert!(ln_evidence(&[split(0.5, [252_500, 247_500])]) > wanted);
        assert!(ln_evidence(&[split(0.5, [250_200, 249_800])]) < 0.0);
        // A tenth of the challenger's units lost, at one percent.
        assert!(ln_evidence(&[split(0.01, [900, 99_100])]) < wanted);
        assert!(ln_evidence(&[split(0.01, [9_000, 991_000])]) > wanted);
        // The steps before it were right.
        let steps = [split(0.01, [100, 9_900]), split(0.05, [500, 9_500]), split(0.25, [2_500, 9_500])];
        assert!(ln_evidence(&steps) > wanted);
    }

    #[test]
    fn ends_are_answers() {
        assert_eq!(ln_evidence(&[]), 0.0);
        assert_eq!(ln_evidence(&[split(0.5, [0, 0])]), 0.0);
        assert_eq!(ln_evidence(&[split(1.0, [10, 0])]), 0.0);
        assert_eq!(ln_evidence(&[split(1.0, [10, 1])]), f64::INFINITY);
    }
}
