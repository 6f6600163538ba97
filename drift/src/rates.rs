//! Rates of what should be rare: null, not a number, defaulted, stale, fallback, unseen. They come before any distance,
//! because they are what incidents look like, and a distance over the values that are left can miss them altogether.
//!
//! A rate of serving is compared with training's by two tests, and the larger chance counts: the exact one of two Poisson
//! rates (Przyborowski and Wilenski 1940) on rows divided by their design effects, which is right for a handful of events,
//! and Welch's t over buckets, which knows how uncertain the variance between few buckets is.

use crate::counts::BUCKETS;
use crate::special::{incomplete_beta, student_upper};

/// How often something happened, by bucket.
#[derive(Debug, Clone)]
pub struct Events {
    pub events: f64,
    pub rows: f64,
    /// See [`crate::noise::Clustered::blocks`].
    pub blocks: f64,
    /// None where all rows are alike: then nothing tells how events cluster.
    design_effect: Option<f64>,
}

impl Events {
    /// Events and rows of each bucket.
    pub fn new(buckets: &[(u64, u64); BUCKETS]) -> Events {
        let buckets =
            || buckets.iter().filter(|(_, rows)| *rows > 0).map(|(events, rows)| (*events as f64, *rows as f64));
        let (mut events, mut rows, mut squares, mut count) = (0.0, 0.0, 0.0, 0.0);
        for (bucket_events, bucket_rows) in buckets() {
            events += bucket_events;
            rows += bucket_rows;
            squares += bucket_rows * bucket_rows;
            count += 1.0;
        }
        let blocks = if squares > 0.0 { rows * rows / squares } else { 0.0 };
        let rate = if rows > 0.0 { events / rows } else { 0.0 };
        let between: f64 =
            buckets().map(|(events, rows)| events - rows * rate).map(|residual| residual * residual).sum();
        let independent = rows * rate * (1.0 - rate);
        let design_effect =
            (count >= 2.0 && independent > 0.0).then(|| (between * count / (count - 1.0) / independent).max(1.0));
        Events { events, rows, blocks, design_effect }
    }

    pub fn rate(&self) -> f64 {
        if self.rows > 0.0 { self.events / self.rows } else { 0.0 }
    }
}

/// Two sides with their design effects, ready to be compared at any rate of serving.
pub struct Comparison {
    reference_events: f64,
    reference_rows: f64,
    serving_rows: f64,
    reference_freedom: f64,
    serving_freedom: f64,
}

impl Comparison {
    pub fn new(reference: &Events, serving: &Events) -> Comparison {
        // Where one side has no events, nothing but the other tells how they would cluster.
        let borrowed = |own: &Events, other: &Events| own.design_effect.or(other.design_effect).unwrap_or(1.0);
        let (reference_effect, serving_effect) = (borrowed(reference, serving), borrowed(serving, reference));
        Comparison {
            reference_events: reference.events / reference_effect,
            reference_rows: reference.rows / reference_effect,
            serving_rows: serving.rows / serving_effect,
            reference_freedom: (reference.blocks - 1.0).max(1.0),
            serving_freedom: (serving.blocks - 1.0).max(1.0),
        }
    }

    pub fn serving_rows_effective(&self) -> f64 {
        self.serving_rows
    }

    /// The chance of a rate as high as `rate` in serving, or as low where `lower`, if nothing changed.
    pub fn p_value(&self, rate: f64, lower: bool) -> f64 {
        let (x, n) = (rate * self.serving_rows, self.serving_rows);
        let (y, m) = (self.reference_events, self.reference_rows);
        if n <= 0.0 || m <= 0.0 {
            return 1.0;
        }
        // Given x + y events, those of serving are binomial with this chance.
        let share = n / (n + m);
        let exact = if lower { 1.0 - incomplete_beta(share, x + 1.0, y) } else { incomplete_beta(share, x, y + 1.0) };

        let pooled = (x + y) / (n + m);
        let (a, b) = (pooled * (1.0 - pooled) / n, pooled * (1.0 - pooled) / m);
        if a + b <= 0.0 {
            return 1.0;
        }
        let freedom = (a + b) * (a + b) / (a * a / self.serving_freedom + b * b / self.reference_freedom);
        let t = (rate - y / m) / (a + b).sqrt();
        exact.max(student_upper(if lower { -t } else { t }, freedom))
    }

    /// The lowest rate of serving that has a chance of at most `level`.
    pub fn detectable(&self, level: f64) -> f64 {
        let (mut low, mut high) =
            (if self.reference_rows > 0.0 { self.reference_events / self.reference_rows } else { 0.0 }, 1.0);
        if self.p_value(1.0, false) > level {
            return 1.0;
        }
        for _ in 0..40 {
            let middle = 0.5 * (low + high);
            if self.p_value(middle, false) > level { low = middle } else { high = middle }
        }
        high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(each: &[(u64, u64)]) -> Events {
        let mut buckets = [(0, 0); BUCKETS];
        buckets.iter_mut().zip(each.iter().cycle()).for_each(|(bucket, each)| *bucket = *each);
        Events::new(&buckets)
    }

    #[test]
    fn few_events_are_judged_exactly() {
        // None of 64,000 before, three of 6,400 now: (1/11)³.
        let comparison = Comparison::new(&events(&[(0, 1_000)]), &events(&[(0, 100)]));
        let p = comparison.p_value(3.0 / 6_400.0, false);
        assert!((p - (1.0 / 11.0_f64).powi(3)).abs() < 1e-9 || p > (1.0 / 11.0_f64).powi(3), "{p}");
        assert!(p < 2e-3, "{p}");
        assert_eq!(comparison.p_value(0.0, false), 1.0);
    }

    #[test]
    fn events_that_come_together_count_as_one() {
        // 64 events in one row each, or in one bucket of 64.
        let spread = events(&[(1, 100)]);
        let mut together = [(0, 100); BUCKETS];
        together[7] = (64, 100);
        let together = Events::new(&together);
        assert_eq!(spread.rate(), together.rate());
        let reference = events(&[(1, 1_000), (0, 1_000)]);
        let p = |serving: &Events| Comparison::new(&reference, serving).p_value(serving.rate(), false);
        assert!(p(&spread) < 1e-12, "{}", p(&spread));
        assert!(p(&together) > 0.05, "{}", p(&together));
    }

    #[test]
    fn both_directions_are_found() {
        let reference = events(&[(20, 100)]);
        let lower = events(&[(10, 100)]);
        assert!(Comparison::new(&reference, &lower).p_value(lower.rate(), true) < 1e-9);
        assert!(Comparison::new(&reference, &lower).p_value(lower.rate(), false) > 0.99);
        let nothing = Events::new(&[(0, 0); BUCKETS]);
        assert_eq!(Comparison::new(&reference, &nothing).p_value(0.5, false), 1.0);
    }

    #[test]
    fn what_can_be_detected_has_the_chance_asked_for() {
        let comparison = Comparison::new(&events(&[(5, 1_000)]), &events(&[(1, 100), (0, 100)]));
        for level in [0.01, 1e-5] {
            let rate = comparison.detectable(level);
            assert!(comparison.p_value(rate, false) <= level && comparison.p_value(rate * 0.99, false) > level * 0.8);
        }
    }
}
