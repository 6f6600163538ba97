//! From what definitions declare to the policy that a rollout is pinned to.

use std::collections::BTreeMap;
use std::time::Duration;

use drift::sequential::bets::Shape;
use drift::sequential::hard::HardRules;
use drift::sequential::policy::{
    BUCKETS, CanaryPolicy, DriftRule, Guardrail, Needs, Policy, PolicyError, ShadowPolicy, Side, Success,
};
use feature_defs::catalog::{self, Comparison, Files, SourceFile};
use feature_defs::parse::{SETTINGS_FILE, parse_settings};
use feature_defs::plan::{ModelPlan, RolloutPlan};
use feature_defs::time::Micros;
use serde::{Deserialize, Serialize};

/// Where nothing is declared: long enough for a weekend in between.
const ENDS_AFTER: Duration = Duration::from_secs(14 * 86_400);
const BAKE: Duration = Duration::from_secs(3_600);
/// Rows of a unit within so long are averaged.
const WINDOW: Duration = Duration::from_secs(600);
const ALPHA: f64 = 0.05;
const SAMPLE_RATIO_ALPHA: f64 = 0.001;
pub const KEEP_PREVIOUS: Duration = Duration::from_secs(86_400);

/// Between what losses lie: nobody is surer than 99 %.
const LOG_LOSS_MAX: f64 = 4.6;

/// What is pinned when a rollout begins, as text in the control log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pinned {
    pub policy: Policy,
    /// How long the window of a unit is open.
    pub window_us: Micros,
    /// The columns of a request that name the unit; empty without a canary.
    pub unit: Vec<UnitColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitColumn {
    pub name: String,
    /// In the words of definitions.
    pub key_type: String,
}

/// The policy of a model, with the guardrails of the project. `centres`: what the champion's success metrics are about, where
/// that is known, by metric.
pub fn pinned(
    plan: &ModelPlan,
    inherited: &[catalog::Guardrail],
    centres: &BTreeMap<String, f64>,
) -> Result<Pinned, PolicyError> {
    let RolloutPlan { shadow, canary, unit, .. } = &plan.rollout;
    let own = canary.iter().flat_map(|canary| &canary.guardrails);
    let mut guardrails: Vec<Guardrail> = Vec::new();
    for declared in own.chain(inherited) {
        let guardrail = guardrail(declared);
        // A model's own bound stands in place of the project's for the same metric.
        if !guardrails.iter().any(|known| known.measure == guardrail.measure && known.side == guardrail.side) {
            guardrails.push(guardrail);
        }
    }
    let policy = Policy {
        alpha: canary.as_ref().and_then(|canary| canary.alpha).unwrap_or(ALPHA),
        sample_ratio_alpha: SAMPLE_RATIO_ALPHA,
        shadow: shadow.as_ref().map(shadow_policy),
        canary: canary.as_ref().map(|canary| canary_policy(canary, centres)),
        guardrails,
        hard: HardRules::default(),
    };
    policy.check()?;
    let window = canary.as_ref().and_then(|canary| canary.window).unwrap_or(WINDOW);
    let unit = unit.iter().map(|key| UnitColumn { name: key.name.clone(), key_type: key.key_type.to_string() });
    let unit = unit.collect();
    Ok(Pinned { policy, window_us: micros(window), unit })
}

/// The guardrails of the settings that were applied. Settings that cannot be read here, for a variable of another machine,
/// are as if they had none, and the reason is told.
pub fn inherited(settings: &str) -> Result<Vec<catalog::Guardrail>, String> {
    let files = Files::new(vec![SourceFile { path: SETTINGS_FILE.to_owned(), text: settings.to_owned() }]);
    match parse_settings(&files, None, &|name| std::env::var(name).ok()) {
        Ok(settings) => Ok(settings.guardrails),
        Err(diagnostics) => Err(diagnostics.first().map_or_else(String::new, |diagnostic| diagnostic.message.clone())),
    }
}

fn guardrail(declared: &catalog::Guardrail) -> Guardrail {
    let side = match declared.comparison {
        Comparison::Less | Comparison::LessOrEqual => Side::Below,
        Comparison::Greater | Comparison::GreaterOrEqual => Side::Above,
    };
    Guardrail::declared(&declared.text, &declared.metric, side, declared.bound)
}

fn shadow_policy(shadow: &catalog::Shadow) -> ShadowPolicy {
    ShadowPolicy {
        min_rows: shadow.min_rows,
        max_skew_rows: shadow.max_skew_rows,
        drift: if shadow.drift.value == "ignore" { DriftRule::Ignore } else { DriftRule::Hold },
        max_flip_rate: shadow.max_flip_rate,
        max_forward_ratio: shadow.max_forward_ratio,
        ends_after_us: micros(shadow.ends_after.unwrap_or(ENDS_AFTER)),
    }
}

fn canary_policy(canary: &catalog::Canary, centres: &BTreeMap<String, f64>) -> CanaryPolicy {
    let share = |share: &f64| (share * f64::from(BUCKETS)).round().clamp(1.0, f64::from(BUCKETS)) as u16;
    CanaryPolicy {
        unit: canary.unit.value.clone(),
        steps: canary.steps.iter().map(share).collect(),
        bake_us: micros(canary.bake.unwrap_or(BAKE)),
        min_units: canary.min_units,
        ends_after_us: micros(canary.ends_after.unwrap_or(ENDS_AFTER)),
        success: canary.success.iter().map(|success| self::success(success, centres)).collect(),
        whole_weeks: canary.whole_weeks,
        blackouts: canary.blackouts.clone(),
    }
}

fn success(declared: &catalog::Success, centres: &BTreeMap<String, f64>) -> Success {
    let metric = declared.metric.value.clone();
    let range = declared.range.unwrap_or(match metric.as_str() {
        "log_loss" => (0.0, LOG_LOSS_MAX),
        _ => (0.0, 1.0),
    });
    let is_loss = matches!(metric.as_str(), "log_loss" | "brier" | "error" | "absolute_error" | "squared_error");
    let usual = match metric.as_str() {
        "log_loss" => 0.5,
        "brier" => 0.15,
        "error" => 0.25,
        _ => (range.0 + range.1) / 2.0,
    };
    Success {
        lower_is_better: declared.lower_is_better.unwrap_or(is_loss),
        needs: declared.not_worse_by.map_or(Needs::Better, Needs::NotWorseBy),
        range,
        centre: declared.centre.or_else(|| centres.get(&metric).copied()).unwrap_or(usual).clamp(range.0, range.1),
        // Of yes and no, squares say nothing that sums do not.
        shape: if metric == "error" { Shape::Rate } else { Shape::Mean },
        metric,
    }
}

fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
