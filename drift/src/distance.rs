//! How far apart two histograms over the same bins are.
//!
//! With shares p of training and q of serving, and F the sums of shares up to an edge:
//!
//! - **PSI**, the population stability index: Σ (q − p) ln(q / p), the symmetric Kullback-Leibler divergence (Jeffreys 1946).
//!   Half an effective row is added to every bin, or one empty bin would make it infinite, and one that a source row missed
//!   would weigh as if thirty rows had.
//! - **Jensen-Shannon distance**: √JSD in bits, 0 to 1 (Lin 1991; Endres and Schindelin 2003).
//! - **KS**: max |G − F| over the edges, a lower bound of Kolmogorov and Smirnov's distance.
//! - **L∞**: max |q − p|.
//! - **Wasserstein in rank space**: ∫ |G(F⁻¹(u)) − u| du, the mean of how many ranks of training a value moved, 0 to 1/2
//!   or nearly; no outlier and no unit weighs in it.
//!
//! For small differences the first two are one number: JS ≈ 0.42 √PSI (both are Σ δ²/p but for a factor).

use serde::{Deserialize, Serialize};

use crate::special::ln;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Psi,
    JensenShannon,
    KolmogorovSmirnov,
    LInfinity,
    WassersteinRank,
}

pub const METRICS: [Metric; 5] =
    [Metric::Psi, Metric::JensenShannon, Metric::KolmogorovSmirnov, Metric::LInfinity, Metric::WassersteinRank];

/// One value for each of [`METRICS`].
pub type Distances = [f64; METRICS.len()];

impl Metric {
    pub fn name(self) -> &'static str {
        match self {
            Metric::Psi => "PSI",
            Metric::JensenShannon => "Jensen-Shannon",
            Metric::KolmogorovSmirnov => "KS",
            Metric::LInfinity => "L-infinity",
            Metric::WassersteinRank => "Wasserstein (ranks)",
        }
    }

    /// Whether it needs bins with an order.
    pub fn is_of_order(self) -> bool {
        matches!(self, Metric::KolmogorovSmirnov | Metric::WassersteinRank)
    }

    /// Its value without what noise added. PSI is a sum of squares, to which noise adds its own; the others are roots of
    /// such or behave so, and their squares are freed of the noise's.
    pub fn without_noise(self, value: f64, noise_mean: f64, noise_square: f64) -> f64 {
        match self {
            Metric::Psi => (value - noise_mean).max(0.0),
            _ => (value * value - noise_square).max(0.0).sqrt(),
        }
    }
}

/// Rows that are added to each bin of either side, for PSI: half an effective row, which is half the design effect.
#[derive(Debug, Clone, Copy)]
pub struct Halves {
    pub reference: f64,
    pub serving: f64,
}

/// All metrics; zero for those that need an order where bins have none. Counts need not be whole. Nothing is far from
/// nothing.
pub fn distances(reference: &[f64], serving: &[f64], halves: Halves, ordered: bool) -> Distances {
    let (m, n) = (reference.iter().sum::<f64>(), serving.iter().sum::<f64>());
    if m <= 0.0 || n <= 0.0 {
        return [0.0; METRICS.len()];
    }
    let bins = reference.len() as f64;
    let (m_smooth, n_smooth) = (1.0 / (m + halves.reference * bins), 1.0 / (n + halves.serving * bins));
    let (mut psi, mut divergence, mut ks, mut l_infinity, mut wasserstein) = (0.0, 0.0, 0.0_f64, 0.0_f64, 0.0);
    let mut shift = 0.0_f64;
    for (reference, serving) in reference.iter().zip(serving) {
        let (p, q) = ((reference + halves.reference) * m_smooth, (serving + halves.serving) * n_smooth);
        psi += (q - p) * ln(q / p);

        let (p, q) = (reference / m, serving / n);
        let middle = 0.5 * (p + q);
        divergence += 0.5 * (part(p, middle) + part(q, middle));
        l_infinity = l_infinity.max((q - p).abs());

        // Between two edges G(F⁻¹(u)) − u is linear.
        let next = shift + (q - p);
        wasserstein += p * mean_of_absolute(shift, next);
        shift = next;
        ks = ks.max(shift.abs());
    }
    let jensen_shannon = (divergence / std::f64::consts::LN_2).clamp(0.0, 1.0).sqrt();
    if ordered {
        [psi, jensen_shannon, ks, l_infinity, wasserstein]
    } else {
        [psi, jensen_shannon, 0.0, l_infinity, 0.0]
    }
}

/// x ln(x / y), zero at zero.
fn part(x: f64, y: f64) -> f64 {
    if x > 0.0 { x * ln(x / y) } else { 0.0 }
}

/// The mean of |x| while x runs from `from` to `to`.
fn mean_of_absolute(from: f64, to: f64) -> f64 {
    if from * to >= 0.0 {
        0.5 * (from.abs() + to.abs())
    } else {
        0.5 * (from * from + to * to) / (from.abs() + to.abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: Halves = Halves { reference: 0.5, serving: 0.5 };

    fn check(name: &str, computed: f64, expected: f64) {
        assert!((computed - expected).abs() < 1e-6 * expected.abs().max(1.0), "{name}: {computed}, not {expected}");
    }

    #[test]
    fn distances_of_known_histograms() {
        // Counts so large that half a row does not show.
        let p = [4e9, 3e9, 2e9, 1e9];
        let q = [1e9, 2e9, 3e9, 4e9];
        let [psi, js, ks, l_infinity, wasserstein] = distances(&p, &q, HALF, true);
        check("PSI", psi, 0.6 * 4.0_f64.ln() + 0.2 * 1.5_f64.ln());
        let jsd = 0.5 * (0.4 * 1.6_f64.ln() + 0.3 * 1.2_f64.ln() + 0.2 * 0.8_f64.ln() + 0.1 * 0.4_f64.ln()) * 2.0;
        check("JS", js, (jsd / std::f64::consts::LN_2).sqrt());
        check("KS", ks, 0.4);
        check("L∞", l_infinity, 0.3);
        // |G − F| is 0, 0.3, 0.4, 0.3, 0 at the edges.
        check("W1", wasserstein, 0.4 * 0.15 + 0.3 * 0.35 + 0.2 * 0.35 + 0.1 * 0.15);
        assert_eq!(distances(&p, &q, HALF, false)[2], 0.0);
    }

    #[test]
    fn extremes_are_bounded() {
        assert_eq!(distances(&[5.0, 5.0], &[0.0, 0.0], HALF, true), [0.0; 5]);
        let [psi, js, ks, l_infinity, wasserstein] = distances(&[1e6, 0.0], &[0.0, 1e6], HALF, true);
        assert!(psi.is_finite() && psi > 10.0);
        // Ranks within a bin are not known, so half of what moved beyond the last is counted.
        assert_eq!([js, ks, l_infinity, wasserstein], [1.0, 1.0, 1.0, 0.5]);
        check("crossing", mean_of_absolute(-1.0, 3.0), (0.5 + 4.5) / 4.0);
    }

    #[test]
    fn small_differences_agree() {
        let p = [1e9; 20];
        let q: Vec<f64> = (0..20).map(|i| if i % 2 == 0 { 1.02e9 } else { 0.98e9 }).collect();
        let [psi, js, ..] = distances(&p, &q, HALF, true);
        // (q − p) ln(q / p) is δ²/p (1 + δ²/(3p²) ...) over both signs.
        check("PSI", psi / 4e-4, 1.0 + 4e-4 / 3.0);
        assert!((js / psi.sqrt() - (1.0 / (8.0 * std::f64::consts::LN_2)).sqrt()).abs() < 1e-3);
    }
}
