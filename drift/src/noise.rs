//! How far apart two samples of one distribution come out by chance: the floor below which a distance says nothing.
//!
//! Rows of one block (a source row, a day) are not independent, so the floor is found by resampling whole blocks, as the
//! buckets that hold them. Two floors are computed and the higher one counts, because each is blind where the other sees:
//!
//! - *Buckets drawn with replacement* (the cluster bootstrap; Efron 1979, Field and Welsh 2007), of serving and of training,
//!   each difference to its own total laid upon training's shares. It knows any kind of dependence, but a bin that nobody
//!   fell into never varies, and few buckets vary too little: each draw is widened by √(G / (G − 1)) and by the
//!   uncertainty of a variance that G buckets tell, √(ν / χ²_ν), which makes a normal deviate Student's.
//! - *Rows drawn from training's shares at the effective sample size* (Rao and Scott 1981): n divided by the design effect,
//!   the variance between buckets over what independent rows would have. It knows what rare bins do, but takes dependence
//!   for the same in all bins.
//!
//! Buckets are unions of whole blocks, so they are independent where blocks are. With fewer than a dozen there is no floor
//! (Cameron, Gelbach and Miller 2008), and the verdict says so; buckets of unequal size count as fewer (Kish 1965, as in
//! Carter, Schnepel and Steigerwald 2017).

use crate::counts::BUCKETS;
use crate::distance::{Distances, Halves, METRICS, Metric, distances};
use crate::random::{Poisson, Random};

/// Counts by bin and bucket, as numbers to compute with.
#[derive(Debug, Clone)]
pub struct Clustered {
    /// Of buckets that are not empty.
    buckets: Vec<Vec<f64>>,
    pub totals: Vec<f64>,
    pub rows: f64,
    /// How many buckets of equal size would vary as these do.
    pub blocks: f64,
    /// How many times as much the shares vary as those of independent rows do. At least one.
    pub design_effect: f64,
}

impl Clustered {
    /// `bins` counts for each bucket.
    pub fn new(cells: &[u64], bins: usize) -> Clustered {
        let buckets: Vec<Vec<f64>> = cells
            .chunks(bins.max(1))
            .filter(|bucket| bucket.iter().any(|count| *count > 0))
            .map(|bucket| bucket.iter().map(|count| *count as f64).collect())
            .collect();
        let mut totals = vec![0.0; bins];
        buckets.iter().for_each(|bucket| totals.iter_mut().zip(bucket).for_each(|(total, count)| *total += count));
        let rows: f64 = totals.iter().sum();
        let sizes = || buckets.iter().map(|bucket| bucket.iter().sum::<f64>());
        let blocks = if rows > 0.0 { rows * rows / sizes().map(|size| size * size).sum::<f64>() } else { 0.0 };

        // Traces of both covariances of the shares; single bins of few rows would drown a mean of ratios.
        let independent: f64 = totals.iter().map(|total| total * (1.0 - total / rows)).sum();
        let between: f64 = buckets
            .iter()
            .zip(sizes())
            .flat_map(|(bucket, size)| {
                bucket.iter().zip(&totals).map(move |(count, total)| count - size * total / rows)
            })
            .map(|residual| residual * residual)
            .sum();
        let count = buckets.len() as f64;
        let design_effect = if rows <= 0.0 || count < 2.0 {
            1.0
        } else if independent > 0.5 {
            (between * count / (count - 1.0) / independent).max(1.0)
        } else {
            // All rows in one bin say nothing of their dependence: then only buckets count.
            (rows / blocks).max(1.0)
        };
        Clustered { buckets, totals, rows, blocks, design_effect }
    }

    pub fn rows_effective(&self) -> f64 {
        self.rows / self.design_effect
    }

    /// Half an effective row.
    pub fn half(&self) -> f64 {
        0.5 * self.design_effect
    }

    /// Shares of one resampling of the buckets, less the shares there are, times `width`.
    fn resampled(&self, random: &mut Random, shares: &mut [f64], width: f64) {
        let mut times = [0.0_f64; BUCKETS];
        let count = self.buckets.len();
        (0..count).for_each(|_| times[random.below(count as u64) as usize] += 1.0);
        shares.fill(0.0);
        for (bucket, times) in self.buckets.iter().zip(times).filter(|(_, times)| *times > 0.0) {
            shares.iter_mut().zip(bucket).for_each(|(share, count)| *share += times * count);
        }
        let rows: f64 = shares.iter().sum();
        shares
            .iter_mut()
            .zip(&self.totals)
            .for_each(|(share, total)| *share = (*share / rows.max(1.0) - total / self.rows) * width);
    }

    /// √(G / (G − 1)), and Student's width for a variance of that many degrees of freedom.
    fn width(&self, random: &mut Random) -> f64 {
        let count = self.buckets.len() as f64;
        let freedom = self.freedom();
        (count / (count - 1.0).max(1.0)).sqrt() * (freedom / random.chi_squared(freedom).max(1e-9)).sqrt()
    }

    fn freedom(&self) -> f64 {
        (self.blocks - 1.0).max(1.0)
    }
}

/// What distances between two samples of training's distribution come to, of the sizes and with the dependence there are.
pub struct Floor {
    /// By floor (blocks, effective rows), and by metric: ascending.
    replicates: [[Vec<f64>; METRICS.len()]; 2],
    /// The means of their [`POWERS`].
    means: [[[f64; POWERS.len()]; METRICS.len()]; 2],
    /// Above the highest power whose mean exists.
    powers_end: [f64; 2],
}

/// Powers of distances whose means bound tails, each the square of the one before; see [`Floor::p_value`].
const POWERS: [f64; 5] = [1.0, 2.0, 4.0, 8.0, 16.0];

impl Floor {
    /// The same seed and counts give the same floor.
    pub fn new(reference: &Clustered, serving: &Clustered, ordered: bool, replicates: usize, seed: u64) -> Floor {
        let bins = reference.totals.len();
        // Half an effective row in a bin, so that a value beyond all of training's is rare and not impossible.
        let halves = Halves { reference: reference.half(), serving: serving.half() };
        let half = halves.reference;
        let smooth = 1.0 / (reference.rows + half * bins as f64);
        let shares: Vec<f64> = reference.totals.iter().map(|count| (count + half) * smooth).collect();
        let (replicates_of, means, powers_end) = Default::default();
        let mut floor = Floor { replicates: replicates_of, means, powers_end };
        // A mean of the k-th power of a square of Student's exists while 2k is less than its degrees of freedom.
        floor.powers_end = [0.5 * reference.freedom().min(serving.freedom()), f64::INFINITY];

        let mut random = Random::of(seed, 2);
        let (mut shifted, mut other) = (vec![0.0; bins], vec![0.0; bins]);
        for _ in 0..replicates {
            let mut draw = |side: &Clustered, counts: &mut [f64]| {
                let width = side.width(&mut random);
                side.resampled(&mut random, counts, width);
                counts.iter_mut().zip(&shares).for_each(|(count, share)| *count = (*count + share).max(0.0));
                scale(counts, side.rows);
            };
            draw(reference, &mut shifted);
            draw(serving, &mut other);
            floor.push(0, distances(&shifted, &other, halves, ordered));
        }

        let mut random = Random::of(seed, 3);
        let of_side = |side: &Clustered| {
            shares.iter().map(|share| Poisson::new(side.rows_effective() * share)).collect::<Vec<_>>()
        };
        let (of_reference, of_serving) = (of_side(reference), of_side(serving));
        for _ in 0..replicates {
            let mut draw = |side: &Clustered, poissons: &[Poisson], counts: &mut [f64]| {
                counts.iter_mut().zip(poissons).for_each(|(count, poisson)| *count = poisson.draw(&mut random));
                scale(counts, side.rows);
            };
            draw(reference, &of_reference, &mut shifted);
            draw(serving, &of_serving, &mut other);
            floor.push(1, distances(&shifted, &other, halves, ordered));
        }
        for (replicates, means) in floor.replicates.iter_mut().flatten().zip(floor.means.iter_mut().flatten()) {
            replicates.sort_unstable_by(f64::total_cmp);
            *means = mean_powers(replicates);
        }
        floor
    }

    fn push(&mut self, which: usize, distances: Distances) {
        self.replicates[which].iter_mut().zip(distances).for_each(|(replicates, distance)| replicates.push(distance));
    }

    /// The chance of a distance of `value` or more between samples of one distribution.
    ///
    /// Where `x` of `R` replicates reach it, (1 + x) / (R + 1) (Davison and Hinkley 1997). Beyond the last replicate
    /// Markov's inequality on powers of the distance bounds the chance, P(D ≥ d) ≤ E[D^k] / d^k: corrected over a thousand
    /// tests, a level lies beyond any number of replicates that one would draw for each.
    pub fn p_value(&self, metric: Metric, value: f64) -> f64 {
        let tail = |which: usize| {
            let replicates = &self.replicates[which][metric as usize];
            let reached = replicates.len() - replicates.partition_point(|replicate| *replicate < value);
            let counted = (1 + reached) as f64 / (replicates.len() + 1) as f64;
            if reached > 0 || value <= 0.0 {
                return counted;
            }
            self.powers(which, metric).map(|(k, mean)| mean / libm::pow(value, k)).fold(counted, f64::min)
        };
        tail(0).max(tail(1))
    }

    /// The smallest distance with a [`Floor::p_value`] of at most `level`.
    pub fn quantile(&self, metric: Metric, level: f64) -> f64 {
        let quantile = |which: usize| {
            let replicates = &self.replicates[which][metric as usize];
            let allowed = (level * (replicates.len() + 1) as f64).floor();
            if allowed >= 1.0 {
                let place = replicates.len().saturating_sub(allowed as usize);
                return replicates.get(place).copied().unwrap_or(0.0);
            }
            let bounds = self.powers(which, metric).map(|(k, mean)| libm::pow(mean / level, 1.0 / k));
            let bound = bounds.fold(f64::INFINITY, f64::min);
            bound.max(replicates.last().copied().unwrap_or(0.0))
        };
        quantile(0).max(quantile(1))
    }

    /// The mean distance by chance, and the mean square.
    pub fn mean(&self, metric: Metric) -> (f64, f64) {
        let means = |power: usize| self.means[0][metric as usize][power].max(self.means[1][metric as usize][power]);
        (means(0), means(1))
    }

    /// The powers whose means exist, with their means.
    fn powers(&self, which: usize, metric: Metric) -> impl Iterator<Item = (f64, f64)> {
        let end = self.powers_end[which];
        POWERS.into_iter().zip(self.means[which][metric as usize]).filter(move |(power, _)| *power < end)
    }
}

fn mean_powers(replicates: &[f64]) -> [f64; POWERS.len()] {
    let mut sums = [0.0; POWERS.len()];
    for replicate in replicates {
        let mut power = *replicate;
        for sum in &mut sums {
            *sum += power;
            power *= power;
        }
    }
    sums.map(|sum| sum / replicates.len().max(1) as f64)
}

/// Makes `counts` sum to `rows`.
fn scale(counts: &mut [f64], rows: f64) {
    let sum: f64 = counts.iter().sum();
    let factor = if sum > 0.0 { rows / sum } else { 0.0 };
    counts.iter_mut().for_each(|count| *count *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `each` rows in one of `bins` bins, `blocks` times, over the buckets in turn.
    fn clustered(bins: usize, blocks: usize, each: u64, seed: u64) -> Clustered {
        let mut random = Random::new(seed);
        let mut cells = vec![0; bins * BUCKETS];
        for block in 0..blocks {
            cells[block % BUCKETS * bins + random.below(bins as u64) as usize] += each;
        }
        Clustered::new(&cells, bins)
    }

    #[test]
    fn the_design_effect_is_the_size_of_blocks_of_equal_rows() {
        for (each, expected) in [(1, 1.0), (30, 30.0)] {
            let clustered = clustered(20, 6_400, each, 5);
            assert!((clustered.design_effect / expected - 1.0).abs() < 0.2, "{}", clustered.design_effect);
            assert!((clustered.blocks - 64.0).abs() < 1e-9);
        }
    }

    #[test]
    fn psi_of_independent_rows_is_chi_squared() {
        // Yurdakul 2018: PSI ≈ (1/n + 1/m) χ²_{B−1} for two samples of one distribution.
        let (reference, serving) = (clustered(20, 20_000, 1, 1), clustered(20, 4_000, 1, 2));
        let floor = Floor::new(&reference, &serving, true, 2_000, 3);
        let scale = 1.0 / 20_000.0 + 1.0 / 4_000.0;
        let (mean, _) = floor.mean(Metric::Psi);
        assert!((0.95..1.2).contains(&(mean / (19.0 * scale))), "{mean}");
        // 99 % of χ²_19 lie below 36.19.
        let quantile = floor.quantile(Metric::Psi, 0.01);
        assert!((0.95..1.3).contains(&(quantile / (36.19 * scale))), "{}", quantile / scale);
        // Blocks of thirty equal rows have thirty times the noise.
        let floor = Floor::new(&clustered(20, 20_000, 30, 1), &clustered(20, 4_000, 30, 2), true, 2_000, 3);
        assert!((0.95..1.3).contains(&(floor.quantile(Metric::Psi, 0.01) / (36.19 * scale))));
    }

    #[test]
    fn floors_and_chances_are_inverse() {
        let floor = Floor::new(&clustered(12, 500, 2, 1), &clustered(12, 300, 2, 2), true, 999, 3);
        for metric in METRICS {
            for level in [0.2, 0.01, 1e-4, 1e-7] {
                let quantile = floor.quantile(metric, level);
                assert!(floor.p_value(metric, quantile * 1.001) <= level * 1.01, "{metric:?} {level}");
                assert!(floor.p_value(metric, quantile * 0.9) > level, "{metric:?} {level}");
            }
        }
    }

    #[test]
    fn nothing_is_far_from_nothing() {
        let nothing = Clustered::new(&[], 3);
        assert_eq!((nothing.rows, nothing.blocks, nothing.design_effect), (0.0, 0.0, 1.0));
        let one_bin = clustered(1, 640, 10, 4);
        assert_eq!(one_bin.design_effect, 100.0);
    }
}
