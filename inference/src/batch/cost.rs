//! What a forward costs, as learned from every one that ran, and how large batches may be for it.

use std::time::Duration;

use super::BatchLimits;

/// The share of a new observation in the mean, and in the deviation from it. As for round trips in TCP: few enough
/// observations to follow a change, enough that one hiccup is not taken for one.
const MEAN_SHARE: f64 = 1.0 / 8.0;
const DEVIATION_SHARE: f64 = 1.0 / 4.0;
/// The mean plus so many mean deviations is passed by about one forward in twenty.
const HIGH_DEVIATIONS: f64 = 2.0;
/// With every batch, what is known of the sizes that did not run goes so much of the way back to what warm-up measured.
/// A size that was slow once must be tried again some day, and it is not while it is thought too slow.
const FORGET_SHARE: f64 = 1.0 / 64.0;
/// The share of the declared deadline that one forward may take: a request that comes as a batch begins waits for it to
/// end, and then for its own.
const DEADLINE_SHARE: f64 = 0.5;
/// Multiplicative decrease, gentle because the best size hardly moves.
const CAP_DECREASE: f64 = 0.9;

#[derive(Debug, Clone, Copy, Default)]
struct Estimate {
    /// Seconds, as all of these.
    warm: f64,
    mean: f64,
    deviation: f64,
}

/// Time per padded batch size, and the cap that follows from it.
#[derive(Debug)]
pub struct Costs {
    limits: BatchLimits,
    /// By padded size. All zero until something ran: then nothing is dropped early and nobody lingers.
    sizes: Vec<Estimate>,
    /// Rows per batch, by additive increase and multiplicative decrease.
    cap: f64,
}

impl Costs {
    pub fn new(limits: BatchLimits) -> Costs {
        let sizes = vec![Estimate::default(); limits.padded_sizes().len()];
        Costs { limits, sizes, cap: limits.rows_max() as f64 }
    }

    /// What warm-up measured. Of several executors, the slowest counts.
    pub fn warmed_up(&mut self, padded_rows: usize, took: Duration) {
        let estimate = &mut self.sizes[self.limits.place(padded_rows)];
        let took = took.as_secs_f64().max(estimate.warm);
        *estimate = Estimate { warm: took, mean: took, deviation: 0.0 };
        while self.rows_cap() > 1 && self.too_slow(self.typical(self.rows_cap())) {
            self.cap = self.limits.padded_rows_within(self.rows_cap() - 1) as f64;
        }
    }

    /// A batch ran.
    pub fn ran(&mut self, padded_rows: usize, took: Duration) {
        let place = self.limits.place(padded_rows);
        for (index, estimate) in self.sizes.iter_mut().enumerate() {
            if index == place {
                let error = took.as_secs_f64() - estimate.mean;
                estimate.mean += MEAN_SHARE * error;
                estimate.deviation += DEVIATION_SHARE * (error.abs() - estimate.deviation);
            } else {
                estimate.mean += FORGET_SHARE * (estimate.warm - estimate.mean);
                estimate.deviation -= FORGET_SHARE * estimate.deviation;
            }
        }
        if self.too_slow(took) {
            self.cap = (self.cap * CAP_DECREASE).max(1.0);
        } else if padded_rows >= self.rows_cap() {
            self.cap = (self.cap + 1.0).min(self.limits.rows_max() as f64);
        }
    }

    /// The device had no memory for a batch of this size: half of it from now on, and more only step by step.
    pub fn out_of_memory(&mut self, padded_rows: usize) {
        self.cap = self.cap.min((padded_rows / 2).max(1) as f64);
    }

    /// The most rows that a batch may have now: a padded size, so that no batch is mostly padding.
    pub fn rows_cap(&self) -> usize {
        self.limits.padded_rows_within(self.cap as usize)
    }

    /// The mean time of a batch of so many rows.
    pub fn typical(&self, rows: usize) -> Duration {
        seconds(self.estimate(rows).mean)
    }

    /// A time that one batch in twenty of so many rows exceeds.
    pub fn high(&self, rows: usize) -> Duration {
        let estimate = self.estimate(rows);
        seconds(estimate.mean + HIGH_DEVIATIONS * estimate.deviation)
    }

    /// What a batch costs whatever its size: what a second batch costs that could have been spared.
    pub fn fixed(&self) -> Duration {
        let one = self.estimate(1).mean;
        let rows_max = self.limits.rows_max();
        let per_row = match rows_max {
            1 => 0.0,
            _ => ((self.estimate(rows_max).mean - one) / (rows_max - 1) as f64).max(0.0),
        };
        seconds(one - per_row)
    }

    fn estimate(&self, rows: usize) -> Estimate {
        self.sizes[self.limits.place(self.limits.padded_rows(rows))]
    }

    fn too_slow(&self, took: Duration) -> bool {
        self.limits.deadline().is_some_and(|deadline| took > deadline.mul_f64(DEADLINE_SHARE))
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
