//! What a rollout is judged by, put together from what was counted and from what is found out beside requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drift::sequential::evidence::{CanaryEvidence, DriftEvidence, ShadowEvidence, StepEvidence};
use drift::sequential::tally::Counts;
use feature_defs::time::Micros;
use offline_store::rollout::units::Progress;
use registry::rollout::{Rollout, Stage};

use super::counts::Merged;
use super::skew;
use super::trial::Trial;

/// What is found out beside requests. It is looked for again only after a while, since it reads logs.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Rows that were replayed.
    pub skew: skew::Known,
    /// There is more to replay than one look takes.
    pub is_behind: bool,
    pub drift: DriftEvidence,
    /// Success metrics of units whose labels have come.
    pub losses: Arc<Counts>,
    pub progress: Vec<Progress>,
    /// What could not be found out, and why.
    pub problems: Vec<String>,
}

/// When to look again: not before a minute or twenty times what the last look took, whichever is longer; sooner where a stage
/// is short.
#[derive(Debug, Clone)]
pub struct Due {
    at: Instant,
}

const AGAIN_MIN: Duration = Duration::from_secs(2);
const AGAIN_TIMES: u32 = 20;
const AGAIN_MAX: Duration = Duration::from_secs(600);

impl Due {
    pub fn now() -> Due {
        Due { at: Instant::now() }
    }

    pub fn after(took: Duration) -> Due {
        Due { at: Instant::now() + (took * AGAIN_TIMES).clamp(AGAIN_MIN, AGAIN_MAX) }
    }

    pub fn is_due(&self) -> bool {
        Instant::now() >= self.at
    }
}

/// When stages began: by the times of the rows where requests bring their own, else by the clocks of whoever wrote the
/// entries.
pub struct Times<'a> {
    pub trial: &'a Trial,
    pub merged: &'a Merged,
    pub by_rows: bool,
    pub now: Micros,
}

impl Times<'_> {
    pub fn begun(&self, entry: u64) -> Micros {
        let by_clock = || {
            let found = self.trial.stages.iter().find(|(_, stage, _)| stage.0 == entry);
            found.map_or(self.now, |(.., at)| *at)
        };
        match (self.by_rows, self.merged.beside.times.get(&entry)) {
            (true, Some((first, _))) => *first,
            (true, None) => self.now,
            (false, _) => by_clock(),
        }
    }

    /// When the canary's first step began.
    fn canary_begun(&self) -> Micros {
        let first = self.trial.stages.iter().find(|(stage, ..)| matches!(stage, Stage::Canary { .. }));
        first.map_or(self.now, |(_, entry, _)| self.begun(entry.0))
    }
}

pub fn shadow(times: &Times<'_>, rollout: &Rollout, found: &Found) -> ShadowEvidence {
    let Times { trial, merged, .. } = times;
    let policy = &trial.pinned().policy;
    let mut counts = merged.snapshot.counts.clone();
    counts.merge(&found.losses);
    let acknowledged = rollout.acknowledged.keys().cloned().collect();
    let mut evidence = ShadowEvidence {
        begun_us: times.begun(trial.staged.0),
        rows: merged.beside.rows,
        shed: merged.beside.shed,
        audited_rows: found.skew.audited_rows,
        skew_rows: found.skew.skew_rows,
        first_bad: found.skew.first_bad.clone(),
        drift: DriftEvidence { acknowledged, ..found.drift.clone() },
        broken: merged.beside.broken.clone(),
        ..ShadowEvidence::default()
    };
    evidence.count(policy, &counts, trial.staged.0);
    evidence
}

pub fn canary(times: &Times<'_>, found: &Found) -> CanaryEvidence {
    let Times { trial, merged, .. } = times;
    let policy = &trial.pinned().policy;
    let mut counts = merged.snapshot.counts.clone();
    counts.merge(&found.losses);
    let canaries = || trial.stages.iter().filter(|(stage, ..)| matches!(stage, Stage::Canary { .. }));
    let step = |(stage, entry, _): &(Stage, registry::id::EntryNumber, Micros)| {
        StepEvidence::counted(&counts, entry.0, policy.metrics(), |bucket| trial.arm_of(bucket, *stage))
    };
    CanaryEvidence {
        begun_us: times.canary_begun(),
        step_begun_us: times.begun(trial.staged.0),
        step: match trial.stage {
            Stage::Canary { step, .. } => step as usize,
            Stage::Shadow => 0,
        },
        steps: canaries().map(step).collect(),
        without_unit: merged.snapshot.counts.uncounted.without_unit,
        broken: merged.beside.broken.clone(),
    }
}
