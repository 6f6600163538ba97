//! Simulated rollouts with the truth known: arms that do not differ, arms that do, splits that are off. Shared by the test of
//! calibration and the example that measures it.

// Either user leaves something out.
#![allow(dead_code, reason = "shared by a test and an example")]

use drift::random::Random;
use drift::sequential::bets::Shape;
use drift::sequential::correction::holm;
use drift::sequential::difference::{self, Stratum};
use drift::sequential::evidence::{CanaryEvidence, StepEvidence};
use drift::sequential::exposure::{Arm, Exposure, Exposures, Options};
use drift::sequential::judge::{self, Decision, Judgement};
use drift::sequential::mean::{self, upper_of_count};
use drift::sequential::policy::{CanaryPolicy, Guardrail, Needs, Policy, Side, Success};
use drift::sequential::sample_ratio::{self, Split};
use drift::sequential::snapshot::Snapshot;
use drift::sequential::tally::Tally;

/// Of rows of one unit.
pub const CORRELATION: f64 = 0.3;

pub const ERROR_RATE: f64 = 0.05;

/// Events of runs, with the bounds of Clopper and Pearson.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found {
    pub events: u64,
    pub runs: u64,
}

impl Found {
    pub fn share(&self) -> f64 {
        self.events as f64 / self.runs.max(1) as f64
    }

    /// With 99 % confidence.
    pub fn at_least(&self) -> f64 {
        1.0 - upper_of_count(self.runs - self.events, self.runs, 0.01)
    }

    /// With 99 % confidence.
    pub fn at_most(&self) -> f64 {
        upper_of_count(self.events, self.runs, 0.01)
    }

    fn add(&mut self, event: bool) {
        self.events += u64::from(event);
        self.runs += 1;
    }
}

/// One size of rollouts in which both arms are the same model.
#[derive(Debug, Clone, Copy)]
pub struct Same {
    pub units: u64,
    pub rows_per_unit: u64,
    pub flushes: u64,
    pub runs: u64,
    pub alpha: f64,
}

/// What was called wrongly in them, at any of the looks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wrong {
    /// A rollout would have been stopped: by the guardrail, whose bound is exactly the true rate, or by the primary metric.
    pub stopped: Found,
    /// The guardrail would have been called met.
    pub met: Found,
    /// The challenger would have been called better.
    pub better: Found,
    /// The split would have been called wrong.
    pub split: Found,
    /// A test of two proportions of rows at 5 %, as if nobody had looked before and rows were independent.
    pub row_test: Found,
}

/// Rollouts of a model against itself: rows of random units, each flush counted and looked at. Every tenth unit fails, or
/// not, as a whole; rows of one unit have the correlation of 0.3.
pub fn same_model(case: Same, seed: u64) -> Wrong {
    let mut wrong = Wrong::default();
    for run in 0..case.runs {
        let mut random = Random::of(seed, run);
        let seen = one_run(case, &mut random);
        for (found, event) in
            [&mut wrong.stopped, &mut wrong.met, &mut wrong.better, &mut wrong.split, &mut wrong.row_test]
                .into_iter()
                .zip(seen)
        {
            found.add(event);
        }
    }
    wrong
}

fn one_run(case: Same, random: &mut Random) -> [bool; 5] {
    const FLUSH_US: i64 = 10_000_000;
    const WINDOW_FLUSHES: i64 = 6;
    let mut exposures =
        Exposures::new(Options { window_us: WINDOW_FLUSHES * FLUSH_US, open_max: case.units as usize + 1 });
    let mut units: Vec<Option<(Arm, bool)>> = vec![None; case.units as usize];
    let mut rows = [[0_u64; 2]; 2];
    let mut seen = [false; 5];
    let rows_per_flush = (case.units * case.rows_per_unit).div_ceil(case.flushes);
    let wanted = -case.alpha.ln();
    // The windows that are open at the end close too.
    for flush in 0..case.flushes as i64 + WINDOW_FLUSHES + 1 {
        let now_us = flush * FLUSH_US;
        for _ in 0..if flush < case.flushes as i64 { rows_per_flush } else { 0 } {
            let unit = random.below(case.units);
            let (arm, fails) = *units[unit as usize].get_or_insert_with(|| {
                let arm = if random.unit() < 0.5 { Arm::Challenger } else { Arm::Champion };
                (arm, random.unit() < ERROR_RATE)
            });
            let like_the_unit = random.unit() < CORRELATION.sqrt();
            let failed = if like_the_unit { fails } else { random.unit() < ERROR_RATE };
            let loss = 0.4 + 0.3 * f64::from(u8::from(fails)) + 0.2 * (random.unit() - 0.5);
            rows[arm as usize][0] += u64::from(failed);
            rows[arm as usize][1] += 1;
            // The bucket says the arm.
            let bucket = arm as u16;
            let exposure = Exposure { unit: drift::random::mix(unit + 1), bucket, arm, step: 1, now_us };
            exposures.record(exposure, &[(0, f64::from(u8::from(failed))), (1, loss)]);
        }
        exposures.close(now_us);
        let of = |arm: Arm| exposures.counts().total(1, |bucket| bucket == arm as u16);
        let (challenger, champion) = (of(Arm::Challenger), of(Arm::Champion));
        let at = |cell: &drift::sequential::tally::Cell, metric: usize| {
            cell.fresh.get(metric).map(Tally::sums).unwrap_or_default()
        };
        let errors = at(&challenger, 0);
        let strata = [Stratum { share: 0.5, challenger: at(&challenger, 1), champion: at(&champion, 1), centre: 0.4 }];
        let breached = mean::ln_above(&errors, ERROR_RATE, Shape::Rate);
        let worse = difference::ln_above(&strata, 0.0, Shape::Mean);
        seen[0] |= holm(&[breached, worse], case.alpha).contains(&true);
        seen[1] |= mean::ln_below(&errors, ERROR_RATE, Shape::Rate) >= wanted;
        seen[2] |= difference::ln_below(&strata, 0.0, Shape::Mean) >= wanted;
        let split = Split { shares: vec![0.5, 0.5], units: vec![challenger.opened, champion.opened] };
        seen[3] |= sample_ratio::ln_evidence(&[split]) >= wanted;
        seen[4] |= two_proportions(rows);
    }
    seen
}

/// |z| > 1.96 of a test of two proportions.
fn two_proportions(rows: [[u64; 2]; 2]) -> bool {
    let [[events, of], [other_events, other_of]] = rows.map(|[events, of]| [events as f64, of as f64]);
    let pooled = (events + other_events) / (of + other_of);
    let variance = pooled * (1.0 - pooled) * (1.0 / of + 1.0 / other_of);
    let z = (events / of - other_events / other_of) / variance.sqrt();
    z.abs() > 1.96
}

/// What is compared where the challenger fails more often.
#[derive(Debug, Clone, Copy)]
pub struct Worse {
    pub champion: f64,
    pub challenger: f64,
    pub rows_per_arm: u64,
    /// Rows of a unit, with the correlation of 0.3.
    pub rows_per_unit: u64,
    pub looks: u64,
    pub runs: u64,
    pub alpha: f64,
}

/// Where it was found, and after how many rows an arm in the median run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caught {
    /// Against the champion, outcomes centred where shadow found them.
    pub by_champion: Found,
    pub by_champion_rows: u64,
    /// Against a guardrail at the champion's true rate.
    pub by_bound: Found,
    pub by_bound_rows: u64,
}

pub fn worse_model(case: Worse, seed: u64) -> Caught {
    let mut caught = Caught::default();
    let (mut by_champion, mut by_bound) = (Vec::new(), Vec::new());
    for run in 0..case.runs {
        let mut random = Random::of(seed, run);
        let units = 2 * case.rows_per_arm / case.rows_per_unit;
        let mut arms = [Tally::default(); 2];
        let mut first = [None; 2];
        for unit in 1..=units {
            let arm = usize::from(random.unit() >= 0.5);
            let rate = if arm == 0 { case.challenger } else { case.champion };
            let fails = random.unit() < rate;
            let mut failed = 0;
            for _ in 0..case.rows_per_unit {
                let like_the_unit = case.rows_per_unit > 1 && random.unit() < CORRELATION.sqrt();
                failed += u64::from(if like_the_unit { fails } else { random.unit() < rate });
            }
            arms[arm].add(failed as f64 / case.rows_per_unit as f64);
            if unit % (units / case.looks).max(1) == 0 {
                let [challenger, champion] = arms.map(|tally| tally.sums());
                let stratum = Stratum { share: 0.5, challenger, champion, centre: case.champion };
                let found = [
                    difference::ln_above(&[stratum], 0.0, Shape::Rate) >= -case.alpha.ln(),
                    mean::ln_above(&challenger, case.champion, Shape::Rate) >= -case.alpha.ln(),
                ];
                for (first, found) in first.iter_mut().zip(found) {
                    if found {
                        first.get_or_insert(unit * case.rows_per_unit / 2);
                    }
                }
            }
        }
        caught.by_champion.add(first[0].is_some());
        caught.by_bound.add(first[1].is_some());
        by_champion.push(first[0].unwrap_or(u64::MAX));
        by_bound.push(first[1].unwrap_or(u64::MAX));
    }
    caught.by_champion_rows = median(by_champion);
    caught.by_bound_rows = median(by_bound);
    caught
}

fn median(mut of: Vec<u64>) -> u64 {
    of.sort_unstable();
    of.get(of.len() / 2).copied().unwrap_or(u64::MAX)
}

/// Units fall into the challenger with a chance of `share` where one half is declared; in how many runs that was found, and
/// after how many units in the median one.
pub fn bent_split(share: f64, units: u64, runs: u64, alpha: f64, seed: u64) -> (Found, u64) {
    let (mut found, mut when) = (Found::default(), Vec::new());
    for run in 0..runs {
        let mut random = Random::of(seed, run);
        let mut counts = [0, 0];
        let first = (1..=units).find(|unit| {
            counts[usize::from(random.unit() >= share)] += 1;
            let split = || Split { shares: vec![0.5, 0.5], units: counts.to_vec() };
            unit % 1_000 == 0 && sample_ratio::ln_evidence(&[split()]) >= -alpha.ln()
        });
        found.add(first.is_some());
        when.push(first.unwrap_or(u64::MAX));
    }
    (found, median(when))
}

/// What the flights example declares, with a step that compares the arms evenly.
pub fn flights(needs: Needs) -> Policy {
    let success = Success {
        metric: "log_loss".into(),
        lower_is_better: true,
        needs,
        range: (0.0, 4.0),
        centre: 0.5,
        shape: Shape::Mean,
    };
    Policy {
        alpha: 0.05,
        sample_ratio_alpha: 0.001,
        shadow: None,
        canary: Some(CanaryPolicy {
            unit: "aircraft".into(),
            steps: vec![2_500, 5_000, 10_000],
            bake_us: 1_800_000_000,
            min_units: 100,
            ends_after_us: 86_400_000_000,
            success: vec![success],
            whole_weeks: false,
            blackouts: vec![],
        }),
        guardrails: vec![
            Guardrail::declared("error_rate < 0.5%", "error_rate", Side::Below, 0.005),
            Guardrail::declared("p99 < 60ms", "p99", Side::Below, 0.06),
        ],
        hard: Default::default(),
    }
}

/// How a simulated rollout has ended.
#[derive(Debug, Clone)]
pub struct Course {
    /// The decision that ended it; `Hold` where none did.
    pub decision: Decision,
    /// The step that it came to, and the flushes it took.
    pub step: usize,
    pub flushes: u64,
    pub judgement: Judgement,
}

/// A canary from its first step to its end, judged at every flush by the whole of the machinery: 6,000 units that come back at
/// random, their windows, moves from arm to arm at each step, counts of two gateways that are written, read and merged.
pub fn canary(policy: &Policy, failing: [f64; 2], loss: [f64; 2], flushes_max: u64, seed: u64) -> Course {
    const UNITS: u64 = 6_000;
    const FLUSH_US: i64 = 60_000_000;
    const ROWS: u64 = 400;
    let steps = policy.canary.as_ref().map(|canary| canary.steps.clone()).unwrap_or_default();
    let mut random = Random::new(seed);
    let options = Options { window_us: 10 * FLUSH_US, open_max: 10_000 };
    let mut gateways = [Exposures::new(options), Exposures::new(options)];
    let arm_at = |share: u16| move |bucket: u16| if bucket < share { Arm::Challenger } else { Arm::Champion };
    let (mut step, mut step_begun_us) = (0, 0);
    for flush in 0..flushes_max {
        let now_us = flush as i64 * FLUSH_US;
        for _ in 0..ROWS {
            let number = random.below(UNITS);
            let unit = drift::random::mix(seed ^ (number << 20));
            let bucket = (unit % 10_000) as u16;
            let arm = arm_at(steps[step])(bucket);
            let failed = random.unit() < failing[arm as usize];
            // Slow rows are as frequent in both.
            let slow = random.unit() < 0.001;
            // Some units are harder than others, whoever answers them.
            let harder = 0.2 * (drift::random::mix(unit) % 100) as f64 / 100.0;
            let loss = loss[arm as usize] + harder + 0.3 * (random.unit() - 0.5);
            let exposure = Exposure { unit, bucket, arm, step: step as u64, now_us };
            let outcomes = [(0, f64::from(u8::from(failed))), (1, f64::from(u8::from(slow))), (2, loss / 4.0)];
            // Each unit has one home.
            gateways[usize::from(bucket % 2)].record(exposure, &outcomes);
        }
        let mut merged = Snapshot::default();
        for gateway in &mut gateways {
            gateway.close(now_us);
            let written = Snapshot::of(gateway).encode();
            merged.merge(&Snapshot::decode(&written).expect("what was written is read"));
        }
        let counted = |step: usize| {
            let arm = arm_at(steps[step]);
            StepEvidence::counted(&merged.counts, step as u64, policy.metrics(), |bucket| Some(arm(bucket)))
        };
        let evidence = CanaryEvidence {
            begun_us: 0,
            step_begun_us,
            step,
            steps: (0..=step).map(counted).collect(),
            ..CanaryEvidence::default()
        };
        let judgement = judge::canary(policy, &evidence, now_us);
        match judgement.decision {
            Decision::Hold if flush + 1 < flushes_max => {}
            Decision::Advance { to } => (step, step_begun_us) = (to, now_us),
            decision => return Course { decision, step, flushes: flush, judgement },
        }
    }
    unreachable!("the last flush ends it")
}

/// Seconds that one judgement takes, and seconds and bytes of one snapshot, written and read.
pub fn cost() -> (f64, f64, usize) {
    let mut exposures = Exposures::new(Options { window_us: 1, open_max: 10_000 });
    let mut random = Random::new(9);
    for unit in 0..6_000_u64 {
        let bucket = random.below(10_000) as u16;
        let (step, share) = [(0, 2_500), (1, 5_000), (2, 10_000)][(unit % 3) as usize];
        let arm = if bucket < share { Arm::Challenger } else { Arm::Champion };
        let exposure = Exposure { unit: random.bits(), bucket, arm, step, now_us: unit as i64 };
        exposures.record(exposure, &[(0, 0.0), (1, f64::from(u8::from(unit % 500 == 0))), (2, random.unit())]);
    }
    exposures.close(i64::MAX);
    let policy = flights(Needs::Better);
    let begun = std::time::Instant::now();
    let mut written = Snapshot::of(&exposures).encode();
    for _ in 0..20 {
        let read = Snapshot::decode(&written).expect("what was written is read");
        written = read.encode();
    }
    let snapshot = begun.elapsed().as_secs_f64() / 20.0;
    let begun = std::time::Instant::now();
    for _ in 0..20 {
        let counted = |(step, share): (u64, u16)| {
            let arm = |bucket| Some(if bucket < share { Arm::Challenger } else { Arm::Champion });
            StepEvidence::counted(exposures.counts(), step, policy.metrics(), arm)
        };
        let steps = [(0, 2_500), (1, 5_000), (2, 10_000)].map(counted).to_vec();
        let evidence = CanaryEvidence { step: 2, steps, ..CanaryEvidence::default() };
        std::hint::black_box(judge::canary(&policy, &evidence, 1));
    }
    (begun.elapsed().as_secs_f64() / 20.0, snapshot, written.len())
}
