//! How good predictions were, from scores and what became of them. Pure, and independent of the order of rows.
//!
//! AUC is the share of (positive, negative) pairs in which the positive has the larger score, ties counting half (Mann and
//! Whitney 1947); it is counted, not interpolated from a curve. Log-loss and Brier score (Brier 1950) need scores that are
//! probabilities. Calibration is shown as a table over ten bins of equal width, and as the expected calibration error over
//! them (Naeini, Cooper and Hauskrecht 2015).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Log-loss of a certain prediction that was wrong is infinite; as usual, scores are kept so far from 0 and 1.
const PROBABILITY_MIN: f64 = 1e-15;
const CALIBRATION_BINS: usize = 10;
/// Different entities that are told apart in what was shown.
const SHOWN_MAX: usize = 1 << 20;
const TOP: usize = 10;

/// What is known of the predictions of one version and arm in one stretch of time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Logged predictions.
    pub rows: u64,
    /// Of these, rows whose outcome is known.
    pub labelled: u64,
    /// Without one, but it may still come: `label.within` is not over.
    pub open: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<Errors>,
    /// Means of what else was pushed, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, Mean>,
    /// By entity key column.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub shown: BTreeMap<String, Shown>,
}

/// Of a label that is true or false.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Classes {
    pub positives: u64,
    /// None without both a positive and a negative.
    pub auc: Option<f64>,
    /// None where scores are no probabilities.
    pub log_loss: Option<f64>,
    pub brier: Option<f64>,
    pub calibration_error: Option<f64>,
    pub calibration: Vec<CalibrationBin>,
}

/// Predictions from `low` to below `high` (1 belongs to the last), and what became of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationBin {
    pub low: f64,
    pub high: f64,
    pub rows: u64,
    pub mean_score: f64,
    pub mean_label: f64,
}

/// Of a label that is a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    pub mean_absolute: f64,
    pub root_mean_square: f64,
    /// Mean of score less label.
    pub bias: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    pub rows: u64,
    pub mean: f64,
    pub sum: f64,
}

/// How much of what could have been chosen was chosen. A model that learns from what it has shown sees less and less; then
/// these shrink.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// Rows that the model decided for; all where it declares no `decision`.
    pub rows: u64,
    /// Different entities asked about.
    pub asked: u64,
    /// Of these, ones that the model ever decided for.
    pub shown: u64,
    /// `shown` as a share of `asked`.
    pub coverage: f64,
    /// As many entities, shown equally often, would be as diverse: the exponential of the entropy (Hill 1973).
    pub effective: f64,
    /// Share of the rows that the ten most shown entities have.
    pub top_share: f64,
    /// There were more entities than are told apart; the numbers are of the first ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_cut: bool,
}

/// Of pairs of a score and whether it came true.
pub fn classes(mut pairs: Vec<(f64, bool)>) -> Classes {
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let positives = pairs.iter().filter(|(_, label)| *label).count() as u64;
    let negatives = pairs.len() as u64 - positives;
    let auc = (positives > 0 && negatives > 0).then(|| {
        // Twice the number of pairs in order, so that ties are whole.
        let (mut wins, mut below, mut at) = (0u128, 0u64, 0);
        while at < pairs.len() {
            let tied = pairs[at..].partition_point(|(score, _)| score.total_cmp(&pairs[at].0).is_eq());
            let won = pairs[at..at + tied].iter().filter(|(_, label)| *label).count() as u64;
            let lost = tied as u64 - won;
            wins += u128::from(won) * (2 * u128::from(below) + u128::from(lost));
            below += lost;
            at += tied;
        }
        wins as f64 / (2.0 * positives as f64 * negatives as f64)
    });
    let are_probabilities = !pairs.is_empty() && pairs.iter().all(|(score, _)| (0.0..=1.0).contains(score));
    if !are_probabilities {
        return Classes {
            positives,
            auc,
            log_loss: None,
            brier: None,
            calibration_error: None,
            calibration: Vec::new(),
        };
    }
    let count = pairs.len() as f64;
    let as_number = |label: bool| f64::from(u8::from(label));
    let loss = |(score, label): &(f64, bool)| {
        let right = if *label { *score } else { 1.0 - score };
        -right.clamp(PROBABILITY_MIN, 1.0 - PROBABILITY_MIN).ln()
    };
    let log_loss = pairs.iter().map(loss).sum::<f64>() / count;
    let brier = pairs.iter().map(|(score, label)| (score - as_number(*label)).powi(2)).sum::<f64>() / count;
    let mut calibration = Vec::new();
    let mut error = 0.0;
    for bin in 0..CALIBRATION_BINS {
        let edge = |bin: usize| bin as f64 / CALIBRATION_BINS as f64;
        let from = pairs.partition_point(|(score, _)| *score < edge(bin));
        let to = match bin + 1 == CALIBRATION_BINS {
            true => pairs.len(),
            false => pairs.partition_point(|(score, _)| *score < edge(bin + 1)),
        };
        let inside = &pairs[from..to];
        if inside.is_empty() {
            continue;
        }
        let rows = inside.len() as f64;
        let mean_score = inside.iter().map(|(score, _)| score).sum::<f64>() / rows;
        let mean_label = inside.iter().map(|(_, label)| as_number(*label)).sum::<f64>() / rows;
        error += (mean_score - mean_label).abs() * rows / count;
        let (low, high, rows) = (edge(bin), edge(bin + 1), inside.len() as u64);
        calibration.push(CalibrationBin { low, high, rows, mean_score, mean_label });
    }
    Classes {
        positives,
        auc,
        log_loss: Some(log_loss),
        brier: Some(brier),
        calibration_error: Some(error),
        calibration,
    }
}

/// Of pairs of a score and what became of it; None without any.
pub fn errors(mut pairs: Vec<(f64, f64)>) -> Option<Errors> {
    // Sums of floats hang on their order.
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let count = pairs.len() as f64;
    let mean = |of: fn(f64) -> f64| pairs.iter().map(|(score, label)| of(score - label)).sum::<f64>() / count;
    (!pairs.is_empty()).then(|| Errors {
        mean_absolute: mean(f64::abs),
        root_mean_square: mean(|error| error * error).sqrt(),
        bias: mean(|error| error),
    })
}

pub fn mean(mut values: Vec<f64>) -> Mean {
    values.sort_by(f64::total_cmp);
    let sum: f64 = values.iter().sum();
    let rows = values.len() as u64;
    Mean { rows, sum, mean: if rows == 0 { 0.0 } else { sum / rows as f64 } }
}

/// Counts entities that were asked about, and those decided for.
#[derive(Debug, Clone, Default)]
pub struct ShownCounter {
    /// How often each was shown, by the hash of its key.
    counts: BTreeMap<u64, u64>,
    rows: u64,
    is_cut: bool,
}

impl ShownCounter {
    pub fn add(&mut self, entity: u64, is_shown: bool) {
        if self.counts.len() >= SHOWN_MAX && !self.counts.contains_key(&entity) {
            self.is_cut = true;
            return;
        }
        *self.counts.entry(entity).or_default() += u64::from(is_shown);
        self.rows += u64::from(is_shown);
    }

    pub fn finish(&self) -> Shown {
        let mut counts: Vec<u64> = self.counts.values().copied().filter(|count| *count > 0).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let rows = self.rows as f64;
        let entropy: f64 = counts.iter().map(|count| *count as f64 / rows).map(|share| -share * share.ln()).sum();
        let (asked, shown) = (self.counts.len() as u64, counts.len() as u64);
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        Shown {
            rows: self.rows,
            asked,
            shown,
            coverage: share(shown, asked),
            effective: if shown == 0 { 0.0 } else { entropy.exp() },
            top_share: share(counts.iter().take(TOP).sum(), self.rows),
            is_cut: self.is_cut,
        }
    }
}

#[cfg(test)]
mod tests;
