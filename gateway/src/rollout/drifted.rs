//! What the drift report says of a rollout's inputs.

use std::collections::BTreeSet;
use std::sync::Arc;

use drift::sequential::evidence::{DriftEvidence, DriftVerdict};
use drift::verdict::{FeatureReport, Verdict};
use feature_defs::time::{Micros, floor_to};
use feature_defs::window::HOUR;

use crate::answer::Gateway;
use crate::drift::{Asked, HOURS_MAX, judge};

/// Drift of the inputs, with what it rests on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drifted {
    pub evidence: DriftEvidence,
    pub rows: u64,
    /// Why nothing is known, and what the report says of itself.
    pub notes: Vec<String>,
}

/// Judges the inputs of an arm of a version over the whole hours that hold `from` to `to`, by the server's clock; of a longer time,
/// the last month. Outputs are left out: those of the challenger are meant to differ.
pub async fn drift_evidence(
    gateway: &Arc<Gateway>,
    (model, version): (&str, u32),
    arm: &str,
    (from, to): (Micros, Micros),
    acknowledged: Vec<String>,
) -> Drifted {
    let longest = (HOURS_MAX - 1).saturating_mul(HOUR);
    let from = from.max(floor_to(to, HOUR).saturating_sub(longest));
    let asked = Asked {
        version: (model.into(), version),
        arm: arm.to_owned(),
        from,
        to: to.max(from.saturating_add(1)),
        features: Vec::new(),
        histograms: false,
    };
    let evidence = DriftEvidence { acknowledged, ..DriftEvidence::default() };
    let answer = match judge(gateway, asked).await {
        Ok(answer) => answer,
        Err(failure) => return Drifted { evidence, rows: 0, notes: vec![failure.message] },
    };
    let served = gateway.served();
    let found = served.versions.get(model).and_then(|versions| versions.get(&version));
    let outputs: BTreeSet<&str> = found
        .and_then(|found| found.state.ready.as_ref())
        .into_iter()
        .flat_map(|model| {
            let outputs = model.plan.outputs.iter().map(|output| output.name.as_str());
            outputs.chain(model.plan.post.iter().map(|post| post.name.as_str()))
        })
        .collect();
    let inputs = answer.report.features.iter().filter(|feature| !outputs.contains(feature.name.as_str()));
    let (verdict, features) = of_inputs(inputs);
    Drifted { evidence: DriftEvidence { verdict, features, ..evidence }, rows: answer.rows, notes: answer.notes }
}

/// Drift of any is drift; too little of any is too little.
fn of_inputs<'r>(reports: impl Iterator<Item = &'r FeatureReport>) -> (DriftVerdict, Vec<String>) {
    let (mut verdict, mut drifted) = (None, Vec::new());
    for report in reports {
        verdict = verdict.max(Some(report.verdict));
        if report.verdict == Verdict::Drift {
            drifted.push(report.name.clone());
        }
    }
    let verdict = match verdict {
        Some(Verdict::Drift) => DriftVerdict::Drift,
        Some(Verdict::Stable) => DriftVerdict::Stable,
        Some(Verdict::InsufficientData) | None => DriftVerdict::InsufficientData,
    };
    (verdict, drifted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_feature_that_drifts_is_enough_and_so_is_one_of_which_too_little_is_known() {
        let report = |(name, verdict): (&str, Verdict)| FeatureReport {
            name: name.to_owned(),
            verdict,
            importance: None,
            rows: 0,
            reference_rows: 0,
            rates: Vec::new(),
            distances: Vec::new(),
            unseen_missed: None,
            reasons: Vec::new(),
        };
        let check = |given: &[(&str, Verdict)], expected, drifted: &[&str]| {
            let reports: Vec<FeatureReport> = given.iter().copied().map(report).collect();
            let (verdict, features) = of_inputs(reports.iter());
            assert_eq!(
                (verdict, features.iter().map(String::as_str).collect::<Vec<_>>().as_slice()),
                (expected, drifted)
            );
        };
        use Verdict::{Drift, InsufficientData, Stable};
        check(&[("a", Stable), ("b", Stable)], DriftVerdict::Stable, &[]);
        check(&[("a", Stable), ("b", InsufficientData)], DriftVerdict::InsufficientData, &[]);
        check(&[("a", Drift), ("b", InsufficientData), ("c", Drift)], DriftVerdict::Drift, &["a", "c"]);
        check(&[], DriftVerdict::InsufficientData, &[]);
    }
}
