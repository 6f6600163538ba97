//! What a rollout is judged by: what was counted, put together by whoever judges.

use serde::{Deserialize, Serialize};

use super::difference::Stratum;
use super::exposure::Arm;
use super::hard::Broken;
use super::policy::{BUCKETS, Policy, ShadowMetric};
use super::sample_ratio::Split;
use super::tally::{Counts, Tally};

/// What is known of a version in shadow. Pairs are counted per unit where the rollout has one, else per row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShadowEvidence {
    pub begun_us: i64,
    /// That both versions have scored.
    pub rows: u64,
    /// Shadow work that was offered and shed: it is not among the pairs, and may be of another kind than what is.
    pub shed: u64,
    /// Logged rows that were replayed, and those that differed.
    pub audited_rows: u64,
    pub skew_rows: u64,
    /// The feature and the first minute that were bad.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_bad: Option<FirstBad>,
    pub drift: DriftEvidence,
    /// Share of a unit's rows that the versions decide differently.
    pub flips: Tally,
    /// Share of a unit's rows for which the challenger took longer than the policy's ratio allows.
    pub slower: Tally,
    /// Challenger's score less champion's, as (d + 1)/2.
    pub score_difference: Tally,
    /// By guardrail, of each arm.
    pub guardrails: Vec<ByArm>,
    /// By success metric: challenger's less champion's on the metric's scale, as (d + 1)/2, where labels have come.
    pub paired: Vec<Tally>,
    /// What gateways did at once.
    pub broken: Vec<Broken>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstBad {
    pub feature: String,
    pub minute_us: i64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ByArm {
    pub challenger: Tally,
    pub champion: Tally,
}

/// What the drift report says of the inputs, which both versions were served alike.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DriftEvidence {
    pub verdict: DriftVerdict,
    pub features: Vec<String>,
    /// Features whose drift is acknowledged on record.
    pub acknowledged: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriftVerdict {
    /// Nobody has judged it yet.
    #[default]
    Unknown,
    InsufficientData,
    Stable,
    Drift,
}

/// What is known of a version that has traffic.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CanaryEvidence {
    pub begun_us: i64,
    pub step_begun_us: i64,
    /// Index into the policy's steps.
    pub step: usize,
    pub steps: Vec<StepEvidence>,
    /// Rows without a unit, which are answered by the champion and left out.
    pub without_unit: u64,
    pub broken: Vec<Broken>,
}

impl ShadowEvidence {
    /// Puts in what gateways have counted of units under the entry that began the shadow, in the order of
    /// [`Policy::shadow_metrics`].
    pub fn count(&mut self, policy: &Policy, counts: &Counts, step: u64) {
        // In shadow every unit has both versions, so there are no arms that it could be moved between.
        let total = counts.total(step, |_| true);
        self.guardrails = vec![ByArm::default(); policy.guardrails.len()];
        self.paired.clear();
        for (at, metric) in policy.shadow_metrics().into_iter().enumerate() {
            let tally = total.fresh.get(at).copied().unwrap_or_default();
            match metric {
                ShadowMetric::Flip => self.flips = tally,
                ShadowMetric::Slower => self.slower = tally,
                ShadowMetric::ScoreDifference => self.score_difference = tally,
                ShadowMetric::ChallengerGuardrail(index) => self.guardrails[index].challenger = tally,
                ShadowMetric::ChampionGuardrail(index) => self.guardrails[index].champion = tally,
                ShadowMetric::SuccessDifference(_) => self.paired.push(tally),
            }
        }
    }
}

/// What was counted between two steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepEvidence {
    /// The challenger's buckets.
    pub share: u16,
    /// All buckets of the rollout: those of both arms.
    pub of: u16,
    /// First exposures by arm.
    pub opened: Opened,
    /// By metric, units that had no arm before.
    pub fresh: Vec<ByArm>,
    /// By metric, all units.
    pub all: Vec<ByArm>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    pub challenger: u64,
    pub champion: u64,
}

impl StepEvidence {
    /// Merged counts of one step, with what the assignment says of its buckets. Buckets that are in no arm (of a holdout, or
    /// of another experiment) are left out.
    pub fn counted(counts: &Counts, step: u64, metrics: usize, arm: impl Fn(u16) -> Option<Arm>) -> StepEvidence {
        let cell = |of: Arm| counts.total(step, |bucket| arm(bucket) == Some(of));
        let buckets = |of: Arm| (0..BUCKETS).filter(|bucket| arm(*bucket) == Some(of)).count() as u16;
        let (challenger, champion) = (cell(Arm::Challenger), cell(Arm::Champion));
        let at = |tallies: &[Tally], metric: usize| tallies.get(metric).copied().unwrap_or_default();
        let fresh = (0..metrics)
            .map(|metric| ByArm { challenger: at(&challenger.fresh, metric), champion: at(&champion.fresh, metric) });
        let fresh: Vec<ByArm> = fresh.collect();
        let mut all = fresh.clone();
        for (metric, by_arm) in all.iter_mut().enumerate() {
            by_arm.challenger.merge(&at(&challenger.moved, metric));
            by_arm.champion.merge(&at(&champion.moved, metric));
        }
        let share = buckets(Arm::Challenger);
        let opened = Opened { challenger: challenger.opened, champion: champion.opened };
        StepEvidence { share, of: share + buckets(Arm::Champion), opened, fresh, all }
    }

    fn share(&self) -> f64 {
        f64::from(self.share.min(self.of)) / f64::from(self.of.max(1))
    }
}

impl CanaryEvidence {
    /// All units of one metric.
    pub(super) fn all(&self, metric: usize) -> ByArm {
        let mut all = ByArm::default();
        for by_arm in self.steps.iter().filter_map(|step| step.all.get(metric)) {
            all.challenger.merge(&by_arm.challenger);
            all.champion.merge(&by_arm.champion);
        }
        all
    }

    /// What compares the arms in one metric. The centre is the policy's, which was pinned before the first unit; one that
    /// followed the units would not be a fair bet.
    pub(super) fn strata(&self, metric: usize, centre: f64) -> Vec<Stratum> {
        let stratum = |step: &StepEvidence| {
            let by_arm = step.fresh.get(metric)?;
            let (challenger, champion) = (by_arm.challenger.sums(), by_arm.champion.sums());
            Some(Stratum { share: step.share(), challenger, champion, centre })
        };
        self.steps.iter().filter_map(stratum).collect()
    }

    pub(super) fn splits(&self) -> Vec<Split> {
        let step = |step: &StepEvidence| Split {
            shares: vec![step.share(), 1.0 - step.share()],
            units: vec![step.opened.challenger, step.opened.champion],
        };
        self.steps.iter().filter(|step| step.share < step.of).map(step).collect()
    }

    /// Units that the challenger has had, over all metrics the most complete.
    pub(super) fn challenger_units(&self, policy: &Policy) -> u64 {
        (0..policy.metrics()).map(|metric| self.all(metric).challenger.units).max().unwrap_or(0)
    }
}
