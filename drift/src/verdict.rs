//! The verdict over one window of one service: which features drifted, which did not, and which cannot be told.
//!
//! For each feature the rates come first, then one distance (the *gate*) decides; the other distances are told beside it.
//! An alarm needs all of:
//!
//! 1. a practical effect: what is left of the distance without the noise's share, or of the rate's change, is at least the
//!    policy's;
//! 2. a sample beyond the noise floor: its chance, corrected over all tests of the window, is at most `alpha`;
//! 3. enough independent blocks on both sides to know the floor.
//!
//! The correction is Holm's (1979), over all rates and gates of all features. It bounds the chance of *any* false alarm in
//! the window, whatever the tests have to do with each other, and that is what whoever is woken up cares about: `alpha`
//! is the rate of false alarms per window and service, for windows that do not overlap. Benjamini and Hochberg's would
//! bound the share of false alarms among alarms, and let their number grow with the number of features that did drift.
//!
//! What is no alarm is `Stable` only where an effect of the policy's size would have been found, at least every other time;
//! else it is `InsufficientData`, and the numbers say how much is missing.

use serde::{Deserialize, Serialize};

use crate::DriftError;
use crate::counts::{BUCKETS, Counts, OUTCOMES, Outcome, Outcomes};
use crate::distance::{Halves, METRICS, Metric, distances};
use crate::layout::Layout;
use crate::noise::{Clustered, Floor};
use crate::profile::Profile;
use crate::random::hash;
use crate::rates::{Comparison, Events};

/// What it takes to raise an alarm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The chance of any false alarm in one window of one service.
    pub alpha: f64,
    /// The distance that decides.
    pub gate: Metric,
    /// The smallest effect that matters, by metric in the order of [`METRICS`]. They are the same shift on five scales:
    /// a normal distribution moved by 0.32 of its deviation.
    pub effects: [f64; METRICS.len()],
    /// The smallest change of a rate that matters, as a share of rows.
    pub rate_effect: f64,
    /// Independent blocks that either side must have.
    pub blocks_min: f64,
    /// Resamplings of a distance that has the effect; others get a tenth, which is enough to show their floor.
    pub replicates: usize,
    pub seed: u64,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            alpha: 0.01,
            gate: Metric::Psi,
            effects: [0.1, 0.13, 0.12, 0.05, 0.09],
            rate_effect: 0.02,
            blocks_min: 12.0,
            replicates: 5_000,
            seed: 0,
        }
    }
}

/// More would take seconds for each feature.
const REPLICATES_MAX: usize = 1_000_000;
/// Below, a floor is not even a rough one.
const REPLICATES_MIN: usize = 100;

/// The bins that a verdict names.
const MOVED_BINS: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// An effect of the policy's size would have shown.
    Stable,
    /// Neither is known.
    InsufficientData,
    Drift,
}

/// A feature or model output, and what serving counted of it.
#[derive(Debug, Clone, Copy)]
pub struct Feature<'a> {
    pub name: &'a str,
    /// What the model makes of it, on any scale; not negative.
    pub importance: Option<f64>,
    pub profile: &'a Profile,
    pub serving: &'a Counts,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The worst of the features.
    pub verdict: Verdict,
    pub alpha: f64,
    /// Rates and gates together: what the correction is over.
    pub tests: usize,
    /// In the order they were given.
    pub features: Vec<FeatureReport>,
    /// Where importances are given.
    pub weighted: Option<Weighted>,
}

/// A summary in which a feature counts for what the model makes of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Weighted {
    /// Σ w · effect / Σ w over the features with an importance, the effect of a vector being the largest of its parts.
    pub effect: f64,
    /// The share of importance that lies on features that drifted.
    pub drifted: f64,
    /// And on features of which nothing is known.
    pub insufficient: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeatureReport {
    pub name: String,
    pub verdict: Verdict,
    pub importance: Option<f64>,
    pub rows: u64,
    pub reference_rows: u64,
    pub rates: Vec<RateReport>,
    /// One, or one for each number of a vector; none where values are not looked at.
    pub distances: Vec<DistanceReport>,
    /// Of categories: the share of new ones that pass for OTHER, so that the unseen rate misses them.
    pub unseen_missed: Option<f64>,
    /// In words, the worst first.
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RateReport {
    pub rate: Rate,
    pub verdict: Verdict,
    pub reference: f64,
    pub serving: f64,
    /// Rows of serving, divided by the design effect.
    pub rows_effective: f64,
    pub blocks: f64,
    /// The lowest rate that would be beyond the noise, at the strictest level of the correction.
    pub detectable: f64,
    pub p_value: f64,
    pub p_corrected: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    Null,
    NotANumber,
    Defaulted,
    Stale,
    Fallback,
    /// Categories that training never saw.
    Unseen,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DistanceReport {
    /// Of a vector: which of its numbers.
    pub part: Option<String>,
    pub verdict: Verdict,
    /// Rows with a value, on both sides, and their number divided by the design effect.
    pub rows: f64,
    pub rows_effective: f64,
    pub reference_rows: f64,
    pub reference_rows_effective: f64,
    /// Independent blocks, as buckets of equal size.
    pub blocks: f64,
    pub reference_blocks: f64,
    pub metrics: Vec<MetricReport>,
    /// Of the gate.
    pub p_corrected: f64,
    /// Those that moved most, largest first.
    pub moved: Vec<MovedBin>,
    pub mean: Option<f64>,
    pub reference_mean: Option<f64>,
    pub deviation: Option<f64>,
    pub reference_deviation: Option<f64>,
    pub distinct: u64,
    pub reference_distinct: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricReport {
    pub metric: Metric,
    pub is_gate: bool,
    pub value: f64,
    /// The value without what noise adds.
    pub effect: f64,
    /// The smallest effect that matters.
    pub practical: f64,
    /// What noise adds in the mean, and what it exceeds no more often than the strictest level of the correction.
    pub noise: f64,
    pub floor: f64,
    pub p_value: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MovedBin {
    pub bin: String,
    pub reference: f64,
    pub serving: f64,
}

/// A test of the family, and whether its effect matters.
struct Test {
    p_value: f64,
    practical: bool,
}

/// Judges one window. The same counts, policy and order give the same report on every machine.
pub fn judge(policy: &Policy, features: &[Feature<'_>]) -> Result<Report, DriftError> {
    policy.check()?;
    for feature in features {
        if !feature.serving.fits(feature.profile.layout()) {
            return Err(DriftError::OtherProfile { feature: feature.name.to_owned() });
        }
        if feature.importance.is_some_and(|importance| !(0.0..f64::INFINITY).contains(&importance)) {
            return Err(DriftError::Importance { feature: feature.name.to_owned() });
        }
    }
    let tests: usize = features.iter().map(|feature| tests_of(feature.profile.layout())).sum();
    let level = policy.alpha / tests.max(1) as f64;

    let mut family = Vec::with_capacity(tests);
    let mut reports: Vec<FeatureReport> =
        features.iter().map(|feature| measure(policy, level, feature, &mut family)).collect();
    let corrected = holm(&family);

    let mut results = family.iter().zip(corrected);
    for report in &mut reports {
        for rate in &mut report.rates {
            let Some((test, p_corrected)) = results.next() else { break };
            rate.p_corrected = p_corrected;
            if test.practical && p_corrected <= policy.alpha && rate.verdict != Verdict::InsufficientData {
                rate.verdict = Verdict::Drift;
            } else if rate.detectable - rate.reference > policy.rate_effect {
                rate.verdict = Verdict::InsufficientData;
            }
        }
        for distance in &mut report.distances {
            let Some((test, p_corrected)) = results.next() else { break };
            distance.p_corrected = p_corrected;
            let gate = distance.metrics.iter().find(|metric| metric.is_gate);
            // What a shift of just the practical effect would come to.
            let visible = gate.is_some_and(|gate| gate.metric.with_noise(gate.practical, gate.noise) >= gate.floor);
            if test.practical && p_corrected <= policy.alpha && distance.verdict != Verdict::InsufficientData {
                distance.verdict = Verdict::Drift;
            } else if !visible {
                distance.verdict = Verdict::InsufficientData;
            }
        }
        report.conclude(policy);
    }
    let verdict = reports.iter().map(|report| report.verdict).max().unwrap_or(Verdict::InsufficientData);
    let weighted = weighted(&reports);
    Ok(Report { verdict, alpha: policy.alpha, tests, features: reports, weighted })
}

impl Policy {
    fn check(&self) -> Result<(), DriftError> {
        let wrong = |what| Err(DriftError::Policy { what });
        if !(self.alpha > 0.0 && self.alpha < 1.0) {
            return wrong("alpha must lie between 0 and 1");
        }
        if self.effects.iter().chain([&self.rate_effect]).any(|effect| !(*effect > 0.0 && effect.is_finite())) {
            return wrong("effects must be positive");
        }
        if !(self.blocks_min >= 2.0 && self.blocks_min <= BUCKETS as f64) {
            return wrong("blocks_min must lie between 2 and 64");
        }
        if !(REPLICATES_MIN..=REPLICATES_MAX).contains(&self.replicates) {
            return wrong("replicates must lie between 100 and 1,000,000");
        }
        if self.gate.is_of_order() {
            return wrong("the gate must be a distance that categories have too: PSI, Jensen-Shannon or L-infinity");
        }
        Ok(())
    }
}

fn rates_of(layout: &Layout) -> &'static [Rate] {
    match layout {
        Layout::Presence => &[Rate::Null, Rate::Defaulted, Rate::Stale, Rate::Fallback],
        Layout::Categories(_) => &[Rate::Null, Rate::Defaulted, Rate::Unseen, Rate::Stale, Rate::Fallback],
        _ => &[Rate::Null, Rate::NotANumber, Rate::Defaulted, Rate::Stale, Rate::Fallback],
    }
}

/// Fixed by the kind of the feature: a family that depended on the data would not be corrected for.
fn tests_of(layout: &Layout) -> usize {
    rates_of(layout).len() + layout.parts()
}

/// Everything but the correction.
fn measure(policy: &Policy, level: f64, feature: &Feature<'_>, family: &mut Vec<Test>) -> FeatureReport {
    let (layout, reference) = (feature.profile.layout(), feature.profile.reference());
    let rates = rates_of(layout).iter().map(|rate| {
        let events = |counts: &Counts| match rate {
            Rate::Null => outcomes(&counts.outcomes, Outcome::Null),
            Rate::NotANumber => outcomes(&counts.outcomes, Outcome::NotANumber),
            Rate::Defaulted => outcomes(&counts.outcomes, Outcome::Defaulted),
            Rate::Stale => outcomes(&counts.outcomes, Outcome::Stale),
            Rate::Fallback => outcomes(&counts.outcomes, Outcome::Fallback),
            Rate::Unseen => unseen(layout, counts),
        };
        let (report, test) = measure_rate(policy, level, *rate, &events(reference), &events(feature.serving));
        family.push(test);
        report
    });
    let rates = rates.collect();
    let seed = policy.seed ^ hash(feature.name.as_bytes());
    let distances = (0..layout.parts()).map(|part| {
        let (report, test) = measure_part(policy, level, feature, part, seed.wrapping_add(part as u64));
        family.push(test);
        report
    });
    let distances = distances.collect();
    FeatureReport {
        name: feature.name.to_owned(),
        verdict: Verdict::Stable,
        importance: feature.importance,
        rows: feature.serving.outcomes.rows(),
        reference_rows: reference.outcomes.rows(),
        rates,
        distances,
        unseen_missed: match &**layout {
            Layout::Categories(categories) => Some(categories.unseen_missed()),
            _ => None,
        },
        reasons: Vec::new(),
    }
}

fn outcomes(outcomes: &Outcomes, outcome: Outcome) -> Events {
    let mut buckets = [(0, 0); BUCKETS];
    for (bucket, counts) in buckets.iter_mut().zip(outcomes.0.chunks(OUTCOMES)) {
        *bucket = (counts[outcome as usize], counts[..OUTCOMES - 1].iter().sum());
    }
    Events::new(&buckets)
}

/// Of rows with a category, how many have one that training never saw.
fn unseen(layout: &Layout, counts: &Counts) -> Events {
    let mut buckets = [(0, 0); BUCKETS];
    if let (Layout::Categories(categories), [part]) = (layout, &counts.parts[..]) {
        for (bucket, counts) in buckets.iter_mut().zip(part.cells.chunks(part.bins)) {
            *bucket = (counts[categories.unseen()], counts.iter().sum());
        }
    }
    Events::new(&buckets)
}

fn measure_rate(policy: &Policy, level: f64, rate: Rate, reference: &Events, serving: &Events) -> (RateReport, Test) {
    let comparison = Comparison::new(reference, serving);
    let change = serving.rate() - reference.rate();
    // Fewer defaults, stale values or fallbacks are no incident. Fewer nulls may be: something fills them in.
    let two_sided = matches!(rate, Rate::Null | Rate::NotANumber);
    let (p_value, level) = if two_sided {
        ((2.0 * comparison.p_value(serving.rate(), change < 0.0)).min(1.0), 0.5 * level)
    } else {
        (comparison.p_value(serving.rate(), false), level)
    };
    let practical = if two_sided { change.abs() } else { change } >= policy.rate_effect;
    let enough = serving.blocks >= policy.blocks_min && reference.blocks >= policy.blocks_min;
    let report = RateReport {
        rate,
        verdict: if enough { Verdict::Stable } else { Verdict::InsufficientData },
        reference: reference.rate(),
        serving: serving.rate(),
        rows_effective: comparison.serving_rows_effective(),
        blocks: serving.blocks,
        detectable: comparison.detectable(level),
        p_value,
        p_corrected: 1.0,
    };
    (report, Test { p_value, practical: practical && enough })
}

fn measure_part(policy: &Policy, level: f64, feature: &Feature<'_>, part: usize, seed: u64) -> (DistanceReport, Test) {
    let layout = feature.profile.layout();
    let (reference_part, serving_part) = (&feature.profile.reference().parts[part], &feature.serving.parts[part]);
    let reference = Clustered::new(&reference_part.cells, reference_part.bins);
    let serving = Clustered::new(&serving_part.cells, serving_part.bins);
    let ordered = layout.is_ordered();
    let halves = Halves { reference: reference.half(), serving: serving.half() };
    let values = distances(&reference.totals, &serving.totals, halves, ordered);

    let enough = reference.blocks >= policy.blocks_min && serving.blocks >= policy.blocks_min;
    let gate = policy.gate as usize;
    let mut floor = Floor::new(&reference, &serving, ordered, (policy.replicates / 10).max(REPLICATES_MIN), seed);
    let effect = |floor: &Floor, metric: Metric| {
        let (mean, square) = floor.mean(metric);
        metric.without_noise(values[metric as usize], mean, square)
    };
    if enough && effect(&floor, policy.gate) >= 0.9 * policy.effects[gate] {
        floor = Floor::new(&reference, &serving, ordered, policy.replicates, seed);
    }
    let metrics = METRICS.into_iter().filter(|metric| ordered || !metric.is_of_order()).map(|metric| {
        let value = values[metric as usize];
        let (mean, square) = floor.mean(metric);
        MetricReport {
            metric,
            is_gate: metric == policy.gate,
            value,
            effect: effect(&floor, metric),
            practical: policy.effects[metric as usize],
            noise: if metric == Metric::Psi { mean } else { square.sqrt() },
            floor: floor.quantile(metric, level),
            p_value: floor.p_value(metric, value),
        }
    });
    let test = Test {
        p_value: floor.p_value(policy.gate, values[gate]),
        practical: enough && effect(&floor, policy.gate) >= policy.effects[gate],
    };
    let report = DistanceReport {
        part: layout.part_name(part),
        verdict: if enough { Verdict::Stable } else { Verdict::InsufficientData },
        rows: serving.rows,
        rows_effective: serving.rows_effective(),
        reference_rows: reference.rows,
        reference_rows_effective: reference.rows_effective(),
        blocks: serving.blocks,
        reference_blocks: reference.blocks,
        metrics: metrics.collect(),
        p_corrected: 1.0,
        moved: moved(layout, part, &reference, &serving),
        mean: serving_part.moments.mean(),
        reference_mean: reference_part.moments.mean(),
        deviation: serving_part.moments.deviation(),
        reference_deviation: reference_part.moments.deviation(),
        distinct: serving_part.distinct.estimate(),
        reference_distinct: reference_part.distinct.estimate(),
    };
    (report, test)
}

fn moved(layout: &Layout, part: usize, reference: &Clustered, serving: &Clustered) -> Vec<MovedBin> {
    if reference.rows <= 0.0 || serving.rows <= 0.0 {
        return Vec::new();
    }
    let shares = |bin: usize| (reference.totals[bin] / reference.rows, serving.totals[bin] / serving.rows);
    let change = |bin: usize| (shares(bin).1 - shares(bin).0).abs();
    let mut bins: Vec<usize> = (0..reference.totals.len()).filter(|bin| change(*bin) > 0.0).collect();
    bins.sort_by(|a, b| change(*b).total_cmp(&change(*a)).then(a.cmp(b)));
    let moved = bins.into_iter().take(MOVED_BINS).map(|bin| {
        let (reference, serving) = shares(bin);
        MovedBin { bin: layout.label(part, bin), reference, serving }
    });
    moved.collect()
}

/// Corrected chances (Holm 1979). A test without a practical effect raises no alarm, so its chance counts as one, which
/// can only make the others' larger.
fn holm(family: &[Test]) -> Vec<f64> {
    let p_value = |test: &Test| if test.practical { test.p_value } else { 1.0 };
    let mut order: Vec<usize> = (0..family.len()).collect();
    order.sort_by(|a, b| p_value(&family[*a]).total_cmp(&p_value(&family[*b])).then(a.cmp(b)));
    let mut corrected = vec![1.0; family.len()];
    let mut highest = 0.0_f64;
    for (rank, place) in order.into_iter().enumerate() {
        highest = highest.max((family.len() - rank) as f64 * p_value(&family[place])).min(1.0);
        corrected[place] = highest;
    }
    corrected
}

fn weighted(reports: &[FeatureReport]) -> Option<Weighted> {
    let of = |report: &FeatureReport| report.importance.map(|importance| (importance, report.effect(), report.verdict));
    let sum = |weight: &dyn Fn((f64, f64, Verdict)) -> f64| reports.iter().filter_map(of).map(weight).sum::<f64>();
    let total = sum(&|(importance, ..)| importance);
    let share =
        |asked: Verdict| sum(&|(importance, _, verdict)| if verdict == asked { importance } else { 0.0 }) / total;
    (total > 0.0).then(|| Weighted {
        effect: sum(&|(importance, effect, _)| importance * effect) / total,
        drifted: share(Verdict::Drift),
        insufficient: share(Verdict::InsufficientData),
    })
}

#[cfg(test)]
mod tests;
