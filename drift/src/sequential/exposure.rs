//! From rows to units: the window of a unit opens with its first row in an arm and closes a fixed time later; then the means of its
//! outcomes are counted, once. Later rows of the unit are not.
//!
//! That is what makes repeats harmless, so whoever counts must not count a unit at two places. A unit is counted by one
//! gateway, its *home* (the assignment says which), and `Seen` remembers units across restarts and homes. What is lost of it
//! is lost without regard to outcomes.

use std::collections::{HashMap, VecDeque};

use super::seen::Seen;
use super::tally::{Counts, METRICS_MAX};

/// Who is to answer a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    Champion,
    Challenger,
}

/// One row that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Exposure {
    /// The hash of the unit's key.
    pub unit: u64,
    /// Of the assignment.
    pub bucket: u16,
    /// That the unit was assigned to, also where another version had to answer: a version that cannot is not to be judged by
    /// the rows that it could.
    pub arm: Arm,
    /// The entry of the control log that began the step in force.
    pub step: u64,
    pub now_us: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How long a unit's window is open. Longer windows average more rows of a unit; evidence comes that much later.
    pub window_us: i64,
    /// Windows that may be open at a time: about 100 bytes each.
    pub open_max: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { window_us: 600_000_000, open_max: 200_000 }
    }
}

struct Open {
    arm: Arm,
    bucket: u16,
    step: u64,
    opened_us: i64,
    /// Had no arm before.
    fresh: bool,
    /// Metric, sum and rows; few, so a list.
    outcomes: Vec<(u8, f64, u32)>,
}

/// Open windows of one rollout on one gateway.
pub struct Exposures {
    options: Options,
    open: HashMap<u64, Open>,
    /// Units by when their windows opened, and that time; stale where a window was closed before its time.
    order: VecDeque<(i64, u64)>,
    /// Units with their arms. One filter for both: two would take unequally many new units for old ones, and so bend the
    /// split.
    seen: Seen,
    counts: Counts,
}

impl Exposures {
    pub fn new(options: Options) -> Exposures {
        Exposures {
            options,
            open: HashMap::new(),
            order: VecDeque::new(),
            seen: Seen::default(),
            counts: Counts::default(),
        }
    }

    /// Units that others, or earlier lives of this gateway, have counted.
    pub fn remember(&mut self, seen: &Seen) {
        self.seen.merge(seen);
    }

    /// Counts a row: by metric, an outcome in [0, 1].
    pub fn record(&mut self, exposure: Exposure, outcomes: &[(usize, f64)]) {
        let Exposure { unit, bucket, arm, step, now_us } = exposure;
        self.close(now_us);
        let elsewhere = self.open.get(&unit).is_some_and(|open| open.arm != arm);
        if elsewhere && let Some(open) = self.open.remove(&unit) {
            // A ramp moved the unit: what it saw of the other arm is counted now.
            self.count(open);
        }
        if !self.open.contains_key(&unit) {
            if self.seen.contains(key(unit, arm)) {
                self.counts.uncounted.repeated += 1;
                return;
            }
            let full = self.open.len() >= self.options.open_max
                || self.order.len() >= self.options.open_max.saturating_mul(2)
                || self.seen.is_full();
            let fresh = ![Arm::Champion, Arm::Challenger].iter().any(|arm| self.seen.contains(key(unit, *arm)));
            let cell = if full { None } else { self.counts.cell(step, bucket) };
            let Some(cell) = cell else {
                self.counts.uncounted.full += 1;
                return;
            };
            cell.opened += u64::from(fresh);
            self.seen.insert(key(unit, arm));
            self.order.push_back((now_us, unit));
            let open = Open { arm, bucket, step, opened_us: now_us, fresh, outcomes: Vec::new() };
            self.open.insert(unit, open);
        }
        if let Some(open) = self.open.get_mut(&unit) {
            add(&mut open.outcomes, outcomes);
        }
    }

    /// Adds what is known later, such as a loss once the label has come, while the unit's window is open.
    pub fn complete(&mut self, unit: u64, arm: Arm, outcomes: &[(usize, f64)]) {
        match self.open.get_mut(&unit) {
            Some(open) if open.arm == arm => add(&mut open.outcomes, outcomes),
            _ => self.counts.uncounted.repeated += 1,
        }
    }

    /// A row without the unit.
    pub fn without_unit(&mut self) {
        self.counts.uncounted.without_unit += 1;
    }

    /// A row of a unit that another gateway counts.
    pub fn elsewhere(&mut self) {
        self.counts.uncounted.elsewhere += 1;
    }

    /// Counts the units whose windows are over.
    pub fn close(&mut self, now_us: i64) {
        while let Some((opened_us, unit)) = self.order.front().copied() {
            if now_us.saturating_sub(opened_us) < self.options.window_us {
                break;
            }
            self.order.pop_front();
            if self.open.get(&unit).is_some_and(|open| open.opened_us == opened_us)
                && let Some(open) = self.open.remove(&unit)
            {
                self.count(open);
            }
        }
    }

    /// What was counted so far: cumulative, for this life of the gateway.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    pub fn open(&self) -> usize {
        self.open.len()
    }

    fn count(&mut self, open: Open) {
        // The cell was made when the window opened.
        let Some(cell) = self.counts.cell(open.step, open.bucket) else { return };
        for (metric, sum, rows) in open.outcomes {
            cell.tally(open.fresh, usize::from(metric)).add(sum / f64::from(rows.max(1)));
        }
    }
}

/// What the filter knows a unit in an arm by.
fn key(unit: u64, arm: Arm) -> u64 {
    match arm {
        Arm::Champion => unit,
        Arm::Challenger => crate::random::mix(unit.wrapping_add(0x9e37_79b9_7f4a_7c15)),
    }
}

fn add(sums: &mut Vec<(u8, f64, u32)>, outcomes: &[(usize, f64)]) {
    for (metric, outcome) in outcomes.iter().filter(|(metric, _)| *metric < METRICS_MAX) {
        let outcome = if outcome.is_nan() { 1.0 } else { outcome.clamp(0.0, 1.0) };
        match sums.iter_mut().find(|(of, _, _)| usize::from(*of) == *metric) {
            Some((_, sum, rows)) => {
                *sum += outcome;
                *rows = rows.saturating_add(1);
            }
            None => sums.push((*metric as u8, outcome, 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequential::tally::{Cell, Tally};

    const MINUTE: i64 = 60_000_000;

    fn exposures(open_max: usize) -> Exposures {
        Exposures::new(Options { window_us: 10 * MINUTE, open_max })
    }

    fn row(unit: u64, arm: Arm, step: u64, minute: i64) -> Exposure {
        Exposure { unit, bucket: unit as u16 % 10, arm, step, now_us: minute * MINUTE }
    }

    fn total(exposures: &Exposures, step: u64) -> Cell {
        exposures.counts().total(step, |_| true)
    }

    #[test]
    fn a_unit_counts_once_with_the_mean_of_its_rows() {
        let mut exposures = exposures(100);
        for (minute, outcome) in [(0, 1.0), (3, 0.0), (9, 0.0), (9, 0.0)] {
            exposures.record(row(7, Arm::Champion, 1, minute), &[(0, outcome), (1, f64::NAN)]);
        }
        assert_eq!(total(&exposures, 1).fresh, []);
        exposures.record(row(7, Arm::Champion, 1, 10), &[(0, 1.0)]);
        exposures.record(row(7, Arm::Champion, 2, 500), &[(0, 1.0)]);
        let cell = total(&exposures, 1);
        let expected = |outcome| {
            let mut tally = Tally::default();
            tally.add(outcome);
            tally
        };
        assert_eq!(cell, Cell { opened: 1, fresh: vec![expected(0.25), expected(1.0)], moved: vec![] });
        assert_eq!(exposures.counts().uncounted.repeated, 2);
        assert_eq!(exposures.open(), 0);
    }

    #[test]
    fn a_moved_unit_counts_in_both_arms_and_is_fresh_in_one() {
        let mut exposures = exposures(100);
        exposures.record(row(7, Arm::Champion, 1, 0), &[(0, 0.0)]);
        exposures.record(row(7, Arm::Challenger, 2, 5), &[(0, 1.0)]);
        exposures.close(100 * MINUTE);
        let (first, second) = (total(&exposures, 1), total(&exposures, 2));
        assert_eq!((first.opened, first.fresh, first.moved), (1, vec![Tally::of_events(0, 1)], vec![]));
        assert_eq!((second.opened, second.fresh, second.moved), (0, vec![], vec![Tally::of_events(1, 1)]));
    }

    #[test]
    fn a_restarted_gateway_does_not_count_again() {
        let mut before = exposures(100);
        before.record(row(7, Arm::Champion, 1, 0), &[(0, 1.0)]);
        let mut after = exposures(100);
        after.remember(before.seen());
        after.record(row(7, Arm::Champion, 1, 1), &[(0, 1.0)]);
        after.record(row(8, Arm::Champion, 1, 1), &[(0, 0.0)]);
        after.close(100 * MINUTE);
        assert_eq!(total(&after, 1).fresh, [Tally::of_events(0, 1)]);
    }

    #[test]
    fn windows_have_a_bound_and_late_outcomes_find_theirs() {
        let mut exposures = exposures(2);
        for unit in 0..5 {
            exposures.record(row(unit, Arm::Champion, 1, 0), &[]);
        }
        assert_eq!((exposures.open(), exposures.counts().uncounted.full), (2, 3));
        exposures.complete(0, Arm::Champion, &[(2, 0.5)]);
        exposures.complete(4, Arm::Champion, &[(2, 0.5)]);
        exposures.close(10 * MINUTE);
        let cell = total(&exposures, 1);
        assert_eq!((cell.opened, cell.fresh.len(), cell.fresh[2].units), (2, 3, 1));
        // There is room again.
        exposures.record(row(9, Arm::Champion, 1, 11), &[]);
        assert_eq!(exposures.open(), 1);
    }
}
