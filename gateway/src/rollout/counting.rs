//! Counting: from answered rows to one outcome per unit and metric, on the thread that observes answers.
//!
//! A unit is counted at its home gateway only, in the arm that it was assigned to, whoever had to answer in the end. Times are
//! those that rows were answered for, so a replay counts as the days did that it replays.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use drift::sequential::exposure::{Arm, Exposure, Exposures, Options};
use drift::sequential::hard::{Answered, Broken, Watch};
use drift::sequential::policy::{Measure, Policy, ShadowMetric, paired};
use drift::sequential::snapshot::Snapshot;
use feature_defs::plan::ModelPlan;
use feature_defs::time::Micros;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use registry::assignment::{Homes, KeyPart, Placed, place};
use serde::{Deserialize, Serialize};

use super::Rollouts;
use super::trial::{CHALLENGER, SHADOW, Trial};
use crate::drift::stale_rows;
use crate::observe::{About, Exposed, Observed, ObservedPrediction, Observer};
use crate::predict::{Cause, RowStatus};

/// Stages and rules that are kept of one rollout.
const PARTS_MAX: usize = 128;

/// What is counted beside units.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Beside {
    /// Rows that both versions have scored, in shadow.
    pub rows: u64,
    /// Rows that were to be scored in shadow and were not.
    pub shed: u64,
    /// Rows that were answered and not counted: the queue of answers was full.
    pub dropped: u64,
    /// Rows of units that came before this gateway knew which were counted.
    pub unready: u64,
    /// By the entry that began a stage, the first and last time that a row was answered for.
    pub times: BTreeMap<u64, (Micros, Micros)>,
    pub broken: Vec<Broken>,
}

impl Beside {
    pub fn merge(&mut self, other: &Beside) {
        self.rows = self.rows.saturating_add(other.rows);
        self.shed = self.shed.saturating_add(other.shed);
        self.dropped = self.dropped.saturating_add(other.dropped);
        self.unready = self.unready.saturating_add(other.unready);
        for (stage, (first, last)) in other.times.iter().take(PARTS_MAX) {
            self.seen(*stage, *first);
            self.seen(*stage, *last);
        }
        for broken in &other.broken {
            if self.broken.len() < PARTS_MAX && !self.broken.contains(broken) {
                self.broken.push(broken.clone());
            }
        }
    }

    fn seen(&mut self, stage: u64, at: Micros) {
        if !self.times.contains_key(&stage) && self.times.len() >= PARTS_MAX {
            return;
        }
        let times = self.times.entry(stage).or_insert((at, at));
        *times = (times.0.min(at), times.1.max(at));
    }

    /// The latest time that a row was answered for.
    pub fn newest(&self) -> Option<Micros> {
        self.times.values().map(|(_, last)| *last).max()
    }
}

/// What this life of this gateway has counted of one rollout.
pub struct Counted {
    exposures: Exposures,
    homes: Homes,
    beside: Beside,
    watch: Watch,
    /// Grows with everything that is counted.
    changes: u64,
    /// What it was when it was written last, and the windows that were open then.
    written: (u64, usize),
}

impl Counted {
    pub fn new(trial: &Trial, homes: Homes) -> Counted {
        let options = Options { window_us: trial.pinned().window_us, ..Options::default() };
        Counted {
            exposures: Exposures::new(options),
            homes,
            beside: Beside::default(),
            watch: Watch::new(trial.pinned().policy.hard),
            changes: 0,
            written: (0, 0),
        }
    }

    pub fn shed(&mut self, rows: u64) {
        self.beside.shed += rows;
        self.changes += 1;
    }

    pub fn set_homes(&mut self, homes: Homes) {
        self.homes = homes;
    }

    /// Units that others, or an earlier life, have counted.
    pub fn remember(&mut self, seen: &drift::sequential::seen::Seen) {
        self.exposures.remember(seen);
    }

    /// Whether anything was counted since it was written last.
    pub fn is_changed(&self) -> bool {
        (self.changes, self.exposures.open()) != self.written
    }

    pub fn is_empty(&self) -> bool {
        self.changes == 0
    }

    /// What was counted up to then is on the object store.
    pub fn set_written(&mut self, (changes, open): (u64, usize)) {
        self.written = (changes, open);
    }

    /// How much was counted.
    pub fn counted(&self) -> (u64, usize) {
        (self.changes, self.exposures.open())
    }

    /// Counts units whose windows are over, and says what there is so far.
    pub fn snapshot(&mut self, now: Micros) -> (Snapshot, Beside) {
        self.exposures.close(now);
        (Snapshot::of(&self.exposures), self.beside.clone())
    }

    pub fn newest(&self) -> Option<Micros> {
        self.beside.newest()
    }

    pub fn open(&self) -> usize {
        self.exposures.open()
    }
}

/// The observer.
pub struct Units(Arc<Rollouts>);

impl Units {
    pub fn new(rollouts: Arc<Rollouts>) -> Units {
        Units(rollouts)
    }
}

impl Observer for Units {
    fn observe(&mut self, observed: &Observed) {
        let Some(of) = &observed.prediction else { return };
        let Some(exposed) = &of.exposed else { return };
        let trial = &exposed.trial;
        let rollouts = &self.0;
        let mut all = rollouts.counted();
        let Some(counted) = all.get_mut(&trial.rollout) else {
            // It is made ready at the next look, with what others have counted.
            drop(all);
            rollouts.unready(trial, observed.rows.count as u64);
            return;
        };
        counted.changes += 1;
        match (&exposed.beside, of.arm) {
            (Some(champion), SHADOW) => pairs(counted, trial, observed, of, exposed, champion, rollouts),
            // The champion's rows are counted with their pair.
            _ if trial.is_shadow() => {}
            _ => arms(counted, trial, observed, of, exposed),
        }
        if matches!(of.arm, SHADOW | CHALLENGER) {
            let broken = counted.watch.record(answered(observed, of, trial), observed.time);
            drop(all);
            if let Some(broken) = broken.filter(|_| !trial.prepared.local.is_stopped()) {
                tracing::error!(
                    model = %trial.model, version = trial.version, rule = broken.rule,
                    "a version is taken out of the traffic here: {}", broken.text
                );
                trial.prepared.local.stop(broken);
                rollouts.urgent.notify_one();
            }
        }
    }

    fn dropped(&mut self, about: &About, _: Micros, rows: u64) {
        let Some(of) = &about.model else { return };
        let Some(rollout) = of.rollout else { return };
        if let Some(counted) = self.0.counted().get_mut(&rollout) {
            counted.beside.dropped += rows;
            counted.changes += 1;
        }
    }

    fn tick(&mut self, _: Micros) {}

    fn end(&mut self, _: Micros) {}
}

impl Rollouts {
    fn unready(&self, trial: &Trial, rows: u64) {
        self.metrics.uncounted(&trial.model, trial.version, rows);
    }
}

/// Whether the model, and not the caller, is why a row has no answer of it.
fn is_error(status: RowStatus, cause: Option<Cause>) -> bool {
    status != RowStatus::Answered && !matches!(cause, Some(Cause::Incomplete | Cause::Missing))
}

fn answered(observed: &Observed, of: &ObservedPrediction, trial: &Trial) -> Answered {
    let count =
        |what: &dyn Fn(&crate::predict::RowOutcome) -> bool| of.rows.iter().filter(|row| what(row)).count() as u64;
    let missing = of.version != trial.version;
    let nans = count(&|row| row.cause == Some(Cause::NotANumber));
    Answered {
        rows: observed.rows.count as u64,
        errors: count(&|row| missing || is_error(row.status, row.cause)),
        nans,
        out_of_memory: of.rows.iter().any(|row| row.cause == Some(Cause::OutOfMemory)),
    }
}

/// The outcomes of each row that guardrails are about, by guardrail; none for what labels will tell.
fn guarded(policy: &Policy, observed: &Observed, of: &ObservedPrediction, wanted: u32) -> Vec<Vec<Option<f64>>> {
    let stale = policy
        .guardrails
        .iter()
        .any(|rail| rail.measure == Measure::Share("stale_rate".to_owned()))
        .then(|| stale_rows(&observed.service, &observed.features, observed.rows.count));
    let yes = |is: bool| Some(f64::from(u8::from(is)));
    let outcome = |measure: &Measure, row: usize| {
        let outcome = &of.rows[row];
        match measure {
            Measure::SlowerThan(seconds) => yes(observed.total.as_secs_f64() > *seconds),
            Measure::Share(share) => match share.as_str() {
                "error_rate" => yes(of.version != wanted || is_error(outcome.status, outcome.cause)),
                "fallback_rate" => yes(of.version != wanted || outcome.status != RowStatus::Answered),
                "nan_rate" => yes(outcome.cause == Some(Cause::NotANumber)),
                "stale_rate" => yes(stale.as_ref().is_some_and(|stale| stale[row])),
                _ => None,
            },
            Measure::Metric(_) => None,
        }
    };
    let rails = |row: usize| policy.guardrails.iter().map(|rail| outcome(&rail.measure, row)).collect();
    (0..observed.rows.count.min(of.rows.len())).map(rails).collect()
}

/// Rows of a canary.
fn arms(counted: &mut Counted, trial: &Trial, observed: &Observed, of: &ObservedPrediction, exposed: &Exposed) {
    let wanted = if of.arm == CHALLENGER { trial.version } else { trial.champion };
    let outcomes = guarded(&trial.pinned().policy, observed, of, wanted);
    for (row, rails) in outcomes.iter().enumerate() {
        let at = observed.features.fetched.at[row];
        let Some(assigned) = exposed.assigned.get(row).copied().flatten() else {
            counted.exposures.without_unit();
            continue;
        };
        let Some(arm) = assigned.arm() else { continue };
        counted.beside.seen(trial.staged.0, at);
        if of.rows[row].cause == Some(Cause::Incomplete) {
            continue;
        }
        if !counted.homes.is_mine(assigned.placed.bucket) {
            counted.exposures.elsewhere();
            continue;
        }
        let outcomes: Vec<(usize, f64)> =
            rails.iter().enumerate().filter_map(|(index, outcome)| Some((index, (*outcome)?))).collect();
        let Placed { unit, bucket } = assigned.placed;
        counted.exposures.record(Exposure { unit, bucket, arm, step: trial.staged.0, now_us: at }, &outcomes);
    }
}

/// Rows that both versions have seen.
fn pairs(
    counted: &mut Counted,
    trial: &Trial,
    observed: &Observed,
    of: &ObservedPrediction,
    exposed: &Exposed,
    champion: &Observed,
    rollouts: &Rollouts,
) {
    let Some(theirs) = &champion.prediction else { return };
    let policy = &trial.pinned().policy;
    let ours = guarded(policy, observed, of, trial.version);
    let before = guarded(policy, champion, theirs, trial.champion);
    let (scores, champion_scores) = (scores(of), scores(theirs));
    let (decisions, champion_decisions) = (decisions(&of.plan, of), decisions(&theirs.plan, theirs));
    let ratio = policy.shadow.as_ref().and_then(|shadow| shadow.max_forward_ratio);
    // Nobody knows what the model would have taken for what it had said before.
    let ratio = ratio.filter(|_| !theirs.rows.iter().any(|row| row.cached));
    let slower = ratio.map(|ratio| of.forward_time.as_secs_f64() > ratio * theirs.forward_time.as_secs_f64());
    let metrics = policy.shadow_metrics();
    let mut scored = 0;
    for row in 0..ours.len().min(before.len()) {
        let both = of.rows[row].status == RowStatus::Answered && theirs.rows[row].status == RowStatus::Answered;
        scored += u64::from(both);
        let at = observed.features.fetched.at[row];
        counted.beside.seen(trial.staged.0, at);
        let assigned = exposed.assigned.get(row).copied().flatten();
        if assigned.is_none() && !trial.prepared.unit.is_empty() {
            counted.exposures.without_unit();
            continue;
        }
        // Without a unit each row stands for itself, and is counted where it was answered.
        let placed = match assigned {
            Some(assigned) => assigned.placed,
            None => place("row", &[KeyPart::Text(&observed.request_id), KeyPart::Integer(row as i64)]),
        };
        if assigned.is_some() && !counted.homes.is_mine(placed.bucket) {
            counted.exposures.elsewhere();
            continue;
        }
        let yes = |is: bool| f64::from(u8::from(is));
        let outcome = |metric: &ShadowMetric| match metric {
            ShadowMetric::Flip if both => {
                Some(yes(decisions.as_ref()?.get(row)? != champion_decisions.as_ref()?.get(row)?))
            }
            ShadowMetric::Slower if both => slower.map(yes),
            ShadowMetric::ScoreDifference if both => {
                Some(paired((*scores.as_ref()?.get(row)?)?, (*champion_scores.as_ref()?.get(row)?)?))
            }
            ShadowMetric::ChallengerGuardrail(index) => ours[row][*index],
            ShadowMetric::ChampionGuardrail(index) => before[row][*index],
            // Labels tell.
            _ => None,
        };
        let outcomes: Vec<(usize, f64)> =
            metrics.iter().enumerate().filter_map(|(index, metric)| Some((index, outcome(metric)?))).collect();
        let Placed { unit, bucket } = placed;
        let exposure = Exposure { unit, bucket, arm: Arm::Champion, step: trial.staged.0, now_us: at };
        counted.exposures.record(exposure, &outcomes);
    }
    counted.beside.rows += scored;
    rollouts.metrics.scored(&trial.model, trial.version, scored);
}

/// The first output, where it is a number.
fn scores(of: &ObservedPrediction) -> Option<Vec<Option<f64>>> {
    let (_, array, _) = of.outputs.first()?;
    let array = cast(array, &DataType::Float64).ok()?;
    let array = array.as_primitive_opt::<Float64Type>()?;
    Some((0..array.len()).map(|row| array.is_valid(row).then(|| array.value(row))).collect())
}

/// What was decided by each row; null counts as its own decision.
fn decisions(plan: &ModelPlan, of: &ObservedPrediction) -> Option<Vec<Option<bool>>> {
    let decision = plan.decision.as_ref()?;
    let columns: Option<Vec<_>> =
        plan.decision_reads.iter().map(|read| of.outputs.get(*read).map(|(_, array, _)| array.clone())).collect();
    let decided = decision.evaluate(&columns?, of.rows.len()).ok()?;
    let decided = decided.as_boolean_opt()?;
    Some((0..decided.len()).map(|row| decided.is_valid(row).then(|| decided.value(row))).collect())
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    model: String,
    version: u32,
}

/// Cheap to clone; clones count together.
#[derive(Debug, Clone, Default)]
pub struct RolloutMetrics {
    scored: Family<Of, Counter>,
    shed: Family<Of, Counter>,
    uncounted: Family<Of, Counter>,
    failures: Counter,
}

impl RolloutMetrics {
    pub fn register(&self, registry: &mut Registry) {
        let help = "Rows that a version in shadow has scored beside the champion";
        registry.register("shadow_rows", help, self.scored.clone());
        let help =
            "Rows that a version in shadow was to score and did not: the champion left no time, or there were too many";
        registry.register("shadow_shed_rows", help, self.shed.clone());
        let help = "Rows of a rollout that came before this gateway knew which units were counted";
        registry.register("rollout_uncounted_rows", help, self.uncounted.clone());
        let help = "Looks at a rollout that came to nothing: the object store, or evidence, could not be had";
        registry.register("rollout_failures", help, self.failures.clone());
    }

    fn of(model: &str, version: u32) -> Of {
        Of { model: model.to_owned(), version }
    }

    fn scored(&self, model: &str, version: u32, rows: u64) {
        self.scored.get_or_create(&Self::of(model, version)).inc_by(rows);
    }

    pub fn shed(&self, model: &str, version: u32, rows: u64) {
        self.shed.get_or_create(&Self::of(model, version)).inc_by(rows);
    }

    fn uncounted(&self, model: &str, version: u32, rows: u64) {
        self.uncounted.get_or_create(&Self::of(model, version)).inc_by(rows);
    }

    pub fn failed(&self) {
        self.failures.inc();
    }
}
