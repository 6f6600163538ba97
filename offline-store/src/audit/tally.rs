//! What is counted of each feature: verdicts, what was not audited and why, when wrong values were served.

use std::collections::BTreeMap;

use drift::special::incomplete_beta;
use feature_defs::time::{Micros, floor_to};
use feature_defs::window::{DAY, HOUR, MINUTE};
use serde::{Deserialize, Serialize};

use super::compare::Verdict;
use crate::explain::Moment;

/// Of upper bounds.
pub const CONFIDENCE: f64 = 0.95;
/// Points of a series; beyond it, minutes become hours.
const POINTS_MAX: usize = 1_440;

/// Why a value could not be judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotAudited {
    /// Served by definitions that are not at hand.
    OtherDefinitions,
    /// The key, or what the feature is made of, is `sensitive` and was logged as a hash.
    Hashed,
    /// The server had applied more than history holds yet.
    BeyondHistory,
    /// The entity was forgotten since.
    Forgotten,
    /// The request left out a field that may not be null.
    Incomplete,
    /// The log does not say what replaying takes.
    Damaged,
}

impl NotAudited {
    pub fn words(self) -> &'static str {
        match self {
            NotAudited::OtherDefinitions => "served by other definitions than those at hand",
            NotAudited::Hashed => "logged as a hash, because they are sensitive",
            NotAudited::BeyondHistory => "served from events that history does not hold yet; audit again later",
            NotAudited::Forgotten => "of entities that were forgotten since",
            NotAudited::Incomplete => "of requests that left out a field",
            NotAudited::Damaged => "logged without what replaying takes",
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub equal: u64,
    pub bug: u64,
    pub lateness: u64,
    pub fallback: u64,
    pub not_audited: BTreeMap<NotAudited, u64>,
}

impl Counts {
    pub fn add(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Equal => self.equal += 1,
            Verdict::Bug => self.bug += 1,
            Verdict::Lateness => self.lateness += 1,
            Verdict::Fallback => self.fallback += 1,
        }
    }

    pub fn leave_out(&mut self, why: NotAudited, values: u64) {
        if values > 0 {
            *self.not_audited.entry(why).or_default() += values;
        }
    }

    pub fn merge(&mut self, other: &Counts) {
        self.equal += other.equal;
        self.bug += other.bug;
        self.lateness += other.lateness;
        self.fallback += other.fallback;
        other.not_audited.iter().for_each(|(why, values)| self.leave_out(*why, *values));
    }

    /// Values that both replays have, whatever came of it.
    pub fn compared(&self) -> u64 {
        self.equal + self.bug + self.lateness + self.fallback
    }

    pub fn left_out(&self) -> u64 {
        self.not_audited.values().sum()
    }
}

/// The share that is at least this rarely exceeded by the true one: the one-sided bound of Clopper and Pearson, which is
/// exact for any count. With none of n it is about 3 / n.
pub fn upper_bound(found: u64, of: u64) -> f64 {
    if found >= of {
        return 1.0;
    }
    let (found, of) = (found as f64, of as f64);
    if found == 0.0 {
        return -(((1.0 - CONFIDENCE).ln() / of).exp_m1());
    }
    // The chance of more than `found` grows with the share.
    let (mut low, mut high) = (found / of, 1.0);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if incomplete_beta(middle, found + 1.0, of - found) < CONFIDENCE {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// Counts over time, in steps that grow so that there are never many.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    pub step_seconds: u64,
    pub points: Vec<Point>,
    /// The first minute with any, exactly, whatever the step.
    pub first: Option<Moment>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub start: Moment,
    pub count: u64,
}

#[derive(Debug, Clone)]
pub struct Counting {
    step: Micros,
    counts: BTreeMap<Micros, u64>,
    first: Option<Micros>,
}

impl Default for Counting {
    fn default() -> Counting {
        Counting { step: MINUTE, counts: BTreeMap::new(), first: None }
    }
}

impl Counting {
    pub fn add(&mut self, time: Micros) {
        let minute = floor_to(time, MINUTE);
        self.first = Some(self.first.map_or(minute, |first| first.min(minute)));
        *self.counts.entry(floor_to(time, self.step)).or_default() += 1;
        while self.counts.len() > POINTS_MAX {
            self.step = match self.step {
                MINUTE => HOUR,
                HOUR => DAY,
                days => days.saturating_mul(8),
            };
            let finer = std::mem::take(&mut self.counts);
            for (time, count) in finer {
                *self.counts.entry(floor_to(time, self.step)).or_default() += count;
            }
        }
    }

    pub fn finish(self) -> Series {
        Series {
            step_seconds: (self.step / 1_000_000).unsigned_abs(),
            points: self.counts.into_iter().map(|(start, count)| Point { start: Moment(start), count }).collect(),
            first: self.first.map(Moment),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_bounds_are_those_of_the_tables() {
        // The share at which so few or fewer have a chance of 5 %, by bisecting the binomial distribution.
        for (found, of, expected) in [
            (0, 1, 0.95),
            (0, 30, 0.095_034_0),
            (0, 30_000, 9.985_25e-5),
            (1, 10, 0.394_163_0),
            (5, 100, 0.102_253_0),
            (7, 1_000_000, 1.314_79e-5),
            (10, 10, 1.0),
        ] {
            let bound = upper_bound(found, of);
            assert!((bound / expected - 1.0).abs() < 1e-4, "{found} of {of}: {bound}, expected {expected}");
        }
        assert_eq!(upper_bound(0, 0), 1.0);
        assert!(upper_bound(900_000, 1_000_000) > 0.9);
    }

    #[test]
    fn a_series_has_an_end_and_keeps_its_first_minute() {
        let mut counting = Counting::default();
        for i in 0..100_000 {
            counting.add(HOUR + i * MINUTE + 7);
        }
        let series = counting.finish();
        assert_eq!(series.step_seconds, 86_400);
        assert_eq!(series.points.iter().map(|point| point.count).sum::<u64>(), 100_000);
        assert!(series.points.len() <= POINTS_MAX);
        assert_eq!(series.first, Some(Moment(HOUR)));
    }
}
