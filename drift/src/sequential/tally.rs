//! Counts of one rollout, as gateways keep and write them: by step, by assignment bucket, by metric. All are integers that only
//! grow, so what several gateways counted is their sum, in any order and to the last bit.
//!
//! A bucket's arm is not stored: which buckets the challenger has at a step is the assignment's to say, and whoever judges
//! asks it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bets::Sums;

/// An outcome of 1 is this many parts: differences below a ten-millionth decide nothing.
const PARTS: f64 = (1 << 24) as f64;

/// Steps that one rollout may have counts of. Each begins with an entry of the control log.
pub const STEPS_MAX: usize = 64;

/// Metrics of one rollout.
pub const METRICS_MAX: usize = 32;

/// Outcomes of units, each in [0, 1].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub units: u64,
    /// In parts.
    sum: u64,
    /// In parts, rounded up: evidence by squares then errs on the safe side.
    squares: u64,
}

impl Tally {
    /// Counts one unit's outcome. What is no number counts as the worst: a metric that cannot be computed must not look
    /// like a good one.
    pub fn add(&mut self, outcome: f64) {
        let outcome = if outcome.is_nan() { 1.0 } else { outcome.clamp(0.0, 1.0) };
        let parts = (outcome * PARTS).round();
        self.units += 1;
        self.sum += parts as u64;
        self.squares += (parts * parts / PARTS).ceil() as u64;
    }

    pub fn merge(&mut self, other: &Tally) {
        // What is read from a store may be anything; a count that cannot be is no reason to stop.
        self.units = self.units.saturating_add(other.units);
        self.sum = self.sum.saturating_add(other.sum);
        self.squares = self.squares.saturating_add(other.squares);
    }

    /// As many units with an outcome of 1 as that, and all others with 0.
    pub fn of_events(events: u64, units: u64) -> Tally {
        let parts = events.min(units).saturating_mul(PARTS as u64);
        Tally { units, sum: parts, squares: parts }
    }

    pub(super) fn parts(&self) -> [u64; 3] {
        [self.units, self.sum, self.squares]
    }

    /// None of what no outcomes in [0, 1] add up to.
    pub(super) fn of_parts([units, sum, squares]: [u64; 3]) -> Option<Tally> {
        // Squares are rounded up, unit by unit.
        let possible = sum <= units.saturating_mul(PARTS as u64) && squares <= sum.saturating_add(units);
        possible.then_some(Tally { units, sum, squares })
    }

    pub fn sums(&self) -> Sums {
        Sums { units: self.units as f64, sum: self.sum as f64 / PARTS, squares: self.squares as f64 / PARTS }
    }
}

/// What happened to the units of one bucket in one step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// Units that came for the first time, in any arm: what the split is judged by. Counted when a window opens, so that an arm
    /// that loses units later is noticed.
    pub opened: u64,
    /// By metric, units that had no arm before.
    pub fresh: Vec<Tally>,
    /// By metric, units that a ramp moved here from the other arm.
    pub moved: Vec<Tally>,
}

impl Cell {
    pub(super) fn tally(&mut self, fresh: bool, metric: usize) -> &mut Tally {
        let tallies = if fresh { &mut self.fresh } else { &mut self.moved };
        if tallies.len() <= metric {
            tallies.resize(metric + 1, Tally::default());
        }
        &mut tallies[metric]
    }

    fn merge(&mut self, other: &Cell) {
        self.opened = self.opened.saturating_add(other.opened);
        for (fresh, theirs) in [(true, &other.fresh), (false, &other.moved)] {
            for (metric, tally) in theirs.iter().enumerate().take(METRICS_MAX) {
                self.tally(fresh, metric).merge(tally);
            }
        }
    }
}

/// Why rows are not in any tally.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Uncounted {
    /// Rows that name no unit: the champion answers them.
    pub without_unit: u64,
    /// Rows of units whose window had closed, or that were counted before.
    pub repeated: u64,
    /// Rows of units that came while as many windows were open as there may be, or while the filter of those seen was full.
    pub full: u64,
    /// Rows of units that another gateway counts.
    pub elsewhere: u64,
}

impl Uncounted {
    pub fn merge(&mut self, other: &Uncounted) {
        self.without_unit = self.without_unit.saturating_add(other.without_unit);
        self.repeated = self.repeated.saturating_add(other.repeated);
        self.full = self.full.saturating_add(other.full);
        self.elsewhere = self.elsewhere.saturating_add(other.elsewhere);
    }
}

/// Everything counted of one rollout: what a gateway writes, whole, at every flush.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// By the number of the entry that began the step, then by bucket.
    pub steps: BTreeMap<u64, BTreeMap<u16, Cell>>,
    #[serde(default)]
    pub uncounted: Uncounted,
}

impl Counts {
    /// Adds what another gateway, or another life of this one, has counted.
    pub fn merge(&mut self, other: &Counts) {
        for (step, cells) in &other.steps {
            if !self.steps.contains_key(step) && self.steps.len() >= STEPS_MAX {
                continue;
            }
            let mine = self.steps.entry(*step).or_default();
            for (bucket, cell) in cells {
                mine.entry(*bucket).or_default().merge(cell);
            }
        }
        self.uncounted.merge(&other.uncounted);
    }

    /// The cell of a bucket in a step; none where there are as many steps as there may be.
    pub(super) fn cell(&mut self, step: u64, bucket: u16) -> Option<&mut Cell> {
        if !self.steps.contains_key(&step) && self.steps.len() >= STEPS_MAX {
            return None;
        }
        Some(self.steps.entry(step).or_default().entry(bucket).or_default())
    }

    /// Counts one unit's outcome, for whoever knows of units what no answer tells, such as their losses: `opened` is counted when
    /// they are answered, and stays as it is. False where there are as many steps or metrics as there may be.
    pub fn add(&mut self, (step, bucket): (u64, u16), fresh: bool, metric: usize, outcome: f64) -> bool {
        let cell = if metric < METRICS_MAX { self.cell(step, bucket) } else { None };
        let Some(cell) = cell else { return false };
        cell.tally(fresh, metric).add(outcome);
        true
    }

    /// All buckets of one step that `keep` names, together.
    pub fn total(&self, step: u64, keep: impl Fn(u16) -> bool) -> Cell {
        let mut total = Cell::default();
        for (_, cell) in self.steps.get(&step).into_iter().flatten().filter(|(bucket, _)| keep(**bucket)) {
            total.merge(cell);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_gateways_add_up_in_any_order() {
        let mut random = crate::random::Random::new(3);
        let mut gateways = vec![Counts::default(); 3];
        let mut one = Counts::default();
        for _ in 0..5_000 {
            let (gateway, step, bucket) = (random.below(3) as usize, random.below(2), random.below(50) as u16);
            let (fresh, metric, outcome) = (random.below(4) > 0, random.below(3) as usize, random.unit());
            for counts in [&mut gateways[gateway], &mut one] {
                let cell = counts.cell(step, bucket).unwrap();
                cell.opened += u64::from(fresh);
                cell.tally(fresh, metric).add(outcome);
            }
        }
        let mut merged = Counts::default();
        for gateway in gateways.iter().rev() {
            merged.merge(gateway);
        }
        assert_eq!(merged, one);
        let text = serde_json::to_string(&merged).unwrap();
        assert_eq!(serde_json::from_str::<Counts>(&text).unwrap(), merged);

        let (even, odd, all) =
            (one.total(1, |bucket| bucket % 2 == 0), one.total(1, |bucket| bucket % 2 == 1), one.total(1, |_| true));
        assert_eq!(even.opened + odd.opened, all.opened);
        assert_eq!(one.total(9, |_| true), Cell::default());
    }

    #[test]
    fn outcomes_are_kept_to_seven_digits_and_nonsense_is_the_worst() {
        let mut tally = Tally::default();
        for outcome in [0.1, 0.25, 1.0, 0.0, -3.0, 7.0, f64::NAN, f64::INFINITY] {
            tally.add(outcome);
        }
        let sums = tally.sums();
        assert_eq!(sums.units, 8.0);
        assert!((sums.sum - 5.35 + 1.0).abs() < 1e-6, "{}", sums.sum);
        assert!(sums.squares >= 4.0725 - 1e-7 && sums.squares < 4.0725 + 1e-6, "{}", sums.squares);
        assert_eq!(Tally::of_events(2, 5).sums(), Sums { units: 5.0, sum: 2.0, squares: 2.0 });
    }

    #[test]
    fn what_is_known_later_is_added_beside_what_was_counted() {
        let (mut live, mut later) = (Counts::default(), Counts::default());
        let cell = live.cell(7, 3).unwrap();
        cell.opened = 2;
        cell.tally(true, 0).add(1.0);
        assert!(later.add((7, 3), true, 1, 0.25) && later.add((7, 3), false, 1, 0.5));
        assert!(!later.add((7, 3), true, METRICS_MAX, 0.5));
        live.merge(&later);
        let tally = |outcome| {
            let mut tally = Tally::default();
            tally.add(outcome);
            tally
        };
        let moved = vec![Tally::default(), tally(0.5)];
        assert_eq!(live.total(7, |_| true), Cell { opened: 2, fresh: vec![tally(1.0), tally(0.25)], moved });
    }

    #[test]
    fn steps_have_a_bound() {
        let mut counts = Counts::default();
        let added = (0..2 * STEPS_MAX as u64).filter(|step| counts.cell(*step, 0).is_some()).count();
        assert_eq!((added, counts.steps.len()), (STEPS_MAX, STEPS_MAX));
    }
}
