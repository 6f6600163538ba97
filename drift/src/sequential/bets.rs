//! Betting against a hypothesis, with what is won computed from sums.
//!
//! Somebody who claims that a gain g is at most 0 on average, given all that came before, should not mind if we stake a
//! share κ of our wealth on it each time: wealth is multiplied by 1 + κg, and if the claim is true it is a nonnegative
//! supermartingale that begins at 1. By Ville's inequality it ever reaches 1/alpha with a chance of at most alpha: the number
//! of looks does not come into it. Wealth against a true claim is an *e-value*; a mixture over stakes is one too.
//!
//! The gains here are lines in an outcome, g = g(0) + (g(1) − g(0))·x with x in [0, 1]. Two lower bounds of the logarithm of
//! 1 + κg need nothing but sums, and a lower bound of an e-value is one:
//!
//! - *chord*: a logarithm is concave, so on [0, 1] it lies above the line between its ends. Nothing is lost where
//!   outcomes are 0 or 1.
//! - *squares* (Fan, Grama and Liu 2015): ln(1 + y) ≥ y − y²·(−ln(1 − r) − r)/r² for y ≥ −r, r < 1. It knows the variance,
//!   and loses a sixth of it at r = 0.2, half of it at r = ½, and nothing for small stakes.
//!
//! Both are mixed, with most of the weight on the one that suits the metric. The weights and stakes are fixed before the
//! first unit, which is what makes the mixture valid.

/// What is known of some observations in [0, 1].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    pub units: f64,
    pub sum: f64,
    pub squares: f64,
}

impl Sums {
    pub fn mean(&self) -> Option<f64> {
        (self.units > 0.0).then(|| self.sum / self.units)
    }

    /// The same observations counted from the other end: of 1 − x.
    pub fn mirrored(&self) -> Sums {
        let Sums { units, sum, squares } = *self;
        Sums { units, sum: units - sum, squares: units - 2.0 * sum + squares }
    }

    pub fn plus(&self, other: &Sums) -> Sums {
        Sums { units: self.units + other.units, sum: self.sum + other.sum, squares: self.squares + other.squares }
    }

    /// The variance of the observations, if there are two.
    pub fn variance(&self) -> Option<f64> {
        let mean = self.mean()?;
        (self.units >= 2.0).then(|| ((self.squares - self.sum * mean) / (self.units - 1.0)).max(0.0))
    }
}

/// What most outcomes of a metric look like; it decides which bound has most of the weight, never what is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Nearly all 0 or 1: errors, flips, slower than.
    #[default]
    Rate,
    /// Anything between: losses, scores.
    Mean,
}

/// Observations, and what one of them gains at its ends.
#[derive(Debug, Clone, Copy)]
pub struct Bet {
    pub sums: Sums,
    pub at_zero: f64,
    pub at_one: f64,
}

/// Powers of √2 from 2^-8 to 1, then of 2: about the relative effects (for rates), or the ratios of effect to variance, that
/// each stake finds fastest. Half way between two powers of √2 an e-value is within 4 % of its best exponent; what is ten
/// times its bound need not be found with the fewest units.
fn stakes() -> impl Iterator<Item = f64> {
    (-16..=0).map(|k| libm::exp2(f64::from(k) / 2.0)).chain((1..=10).map(|k| libm::exp2(f64::from(k))))
}

/// The weight of the bound that suits the metric.
const SUITED: f64 = 0.9;

/// The logarithm of the wealth that the observations have won; 0 before the first.
pub fn ln_wealth(bets: &[Bet], shape: Shape) -> f64 {
    // The most that one unit can lose decides which stakes can be paid.
    let loss = bets.iter().map(|bet| -bet.at_zero.min(bet.at_one)).fold(0.0_f64, f64::max);
    if bets.iter().all(|bet| bet.sums.units <= 0.0) || loss <= 0.0 || !loss.is_finite() {
        return 0.0;
    }
    let all_in = 1.0 / loss;
    let below: Vec<f64> = stakes().filter(|stake| *stake < all_in * 0.999).collect();
    let (chord, squares) = match shape {
        Shape::Rate => (SUITED, 1.0 - SUITED),
        Shape::Mean => (1.0 - SUITED, SUITED),
    };
    let chord_weight = libm::log(chord / (below.len() + 1) as f64);
    let mut exponents = Vec::with_capacity(2 * below.len() + 1);
    exponents.push(chord_weight + by_chord(bets, all_in));
    exponents.extend(below.iter().map(|stake| chord_weight + by_chord(bets, *stake)));
    if !below.is_empty() {
        let weight = libm::log(squares / below.len() as f64);
        exponents.extend(below.iter().map(|stake| weight + by_squares(bets, *stake)));
    }
    ln_sum(&exponents)
}

/// How many nats of evidence the mixture costs against the best single stake, roughly: what plans reckon with. About two
/// and a half of the stakes win alike.
pub(crate) const MIXTURE_NATS: f64 = 2.4;

fn by_chord(bets: &[Bet], stake: f64) -> f64 {
    let of = |share: f64, gain: f64| {
        // The stake is at most all; rounding must not make it more.
        if share > 0.0 { share * libm::log1p((stake * gain).max(-1.0)) } else { 0.0 }
    };
    bets.iter().map(|bet| of(bet.sums.sum, bet.at_one) + of(bet.sums.units - bet.sums.sum, bet.at_zero)).sum()
}

fn by_squares(bets: &[Bet], stake: f64) -> f64 {
    let one = |bet: &Bet| {
        let Sums { units, sum, squares } = bet.sums;
        let (base, slope) = (bet.at_zero, bet.at_one - bet.at_zero);
        let gains = units * base + slope * sum;
        let gains_squared = units * base * base + 2.0 * base * slope * sum + slope * slope * squares;
        let r = stake * (-bet.at_zero.min(bet.at_one)).max(0.0);
        // (−ln(1 − r) − r)/r² of a small r is ½ + r/3 + r²/4 + …, of which the next terms are below rounding.
        let per_square = if r < 1e-3 { 0.5 + r / 3.0 + r * r / 4.0 } else { (-libm::log1p(-r) - r) / (r * r) };
        // Squares are rounded up when they are counted, so this can only be too small.
        stake * gains - per_square * stake * stake * gains_squared.max(0.0)
    };
    bets.iter().map(one).sum()
}

/// ln Σ e^x.
pub(crate) fn ln_sum(exponents: &[f64]) -> f64 {
    let most = exponents.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !most.is_finite() {
        return most;
    }
    most + libm::log(exponents.iter().map(|x| libm::exp(x - most)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(outcomes: &[f64]) -> Sums {
        Sums { units: outcomes.len() as f64, sum: outcomes.iter().sum(), squares: outcomes.iter().map(|x| x * x).sum() }
    }

    /// The real wealth of one stake, unit by unit.
    fn played(outcomes: &[f64], at_zero: f64, at_one: f64, stake: f64) -> f64 {
        outcomes.iter().map(|x| (1.0 + stake * (at_zero + (at_one - at_zero) * x)).ln()).sum()
    }

    #[test]
    fn neither_bound_claims_more_than_was_won() {
        let mut random = crate::random::Random::new(7);
        for case in 0..2_000 {
            let n = 1 + random.below(40) as usize;
            let whole = case % 3 == 0;
            let outcomes: Vec<f64> =
                (0..n).map(|_| if whole { random.below(2) as f64 } else { random.unit() }).collect();
            let (at_zero, at_one) = (2.0 * random.unit() - 1.0, 2.0 * random.unit() - 1.0);
            let loss = -f64::min(at_zero, at_one);
            let stake = if loss > 0.0 { 0.98 * random.unit() / loss } else { 3.0 * random.unit() };
            let bets = [Bet { sums: sums(&outcomes), at_zero, at_one }];
            let won = played(&outcomes, at_zero, at_one, stake);
            let (chord, squares) = (by_chord(&bets, stake), by_squares(&bets, stake));
            assert!(chord <= won + 1e-9, "chord {chord} of {won}");
            assert!(squares <= won + 1e-9, "squares {squares} of {won}, stake {stake}, ends {at_zero} {at_one}");
            // Of outcomes that are 0 or 1 the chord is no bound, it is the wealth.
            assert!(!whole || (chord - won).abs() < 1e-9, "{chord} {won}");
        }
    }

    #[test]
    fn expected_wealth_under_a_true_claim_is_at_most_one() {
        // All outcomes of ten coins, weighed by their chance: no simulation.
        for (chance, bound) in [(0.3, 0.3), (0.05, 0.05), (0.2, 0.3)] {
            for shape in [Shape::Rate, Shape::Mean] {
                let mut expected = 0.0;
                for heads in 0..=10_u32 {
                    let heads_f = f64::from(heads);
                    let ways = (0..heads).fold(1.0, |ways, i| ways * f64::from(10 - i) / f64::from(i + 1));
                    let chance = ways * f64::powf(chance, heads_f) * f64::powf(1.0 - chance, 10.0 - heads_f);
                    let sums = Sums { units: 10.0, sum: heads_f, squares: heads_f };
                    let bets = [Bet { sums, at_zero: -bound, at_one: 1.0 - bound }];
                    expected += chance * ln_wealth(&bets, shape).exp();
                }
                assert!(expected <= 1.0 + 1e-12, "{chance} against {bound}: {expected}");
                assert!(chance < bound || expected > 0.5, "{expected}");
            }
        }
    }

    #[test]
    fn nothing_is_known_before_the_first_unit() {
        assert_eq!(ln_wealth(&[], Shape::Rate), 0.0);
        let bet = Bet { sums: Sums::default(), at_zero: -0.1, at_one: 0.9 };
        assert_eq!(ln_wealth(&[bet], Shape::Mean), 0.0);
    }

    #[test]
    fn variance_is_known_from_squares_only() {
        // A thousand outcomes of 0.51: as coins they say nothing against 0.5, as what they are very much.
        let steady = Sums { units: 1_000.0, sum: 510.0, squares: 1_000.0 * 0.51 * 0.51 };
        let bets = [Bet { sums: steady, at_zero: -0.5, at_one: 0.5 }];
        assert!(ln_wealth(&bets, Shape::Mean) > 20.0f64.ln());
        let coins = [Bet { sums: Sums { squares: 510.0, ..steady }, at_zero: -0.5, at_one: 0.5 }];
        assert!(ln_wealth(&coins, Shape::Mean) < 1.0);
    }
}
