//! What a rollout is held to, as the definitions declared it when it began. It is pinned then: a later `apply` changes the next
//! rollout, not this one.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::bets::Shape;
use super::hard::HardRules;
use super::tally::METRICS_MAX;

/// Of assignment buckets: the challenger's share is a whole number of them.
pub const BUCKETS: u16 = 10_000;

const WEEK_US: i64 = 7 * 86_400 * 1_000_000;

/// How much later than a whole number of weeks a promotion may come and still count whole weeks.
const WEEK_SLACK_US: i64 = 86_400 * 1_000_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The chance that anything is stopped falsely, and that something is called met which is not, over the whole rollout.
    #[serde(default = "alpha_default")]
    pub alpha: f64,
    /// The chance of a false alarm about the split.
    #[serde(default = "sample_ratio_alpha_default")]
    pub sample_ratio_alpha: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<ShadowPolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryPolicy>,
    /// Of the model, and those that it inherits. Their order is that of metrics in counts.
    #[serde(default)]
    pub guardrails: Vec<Guardrail>,
    #[serde(default)]
    pub hard: HardRules,
}

fn alpha_default() -> f64 {
    0.05
}

fn sample_ratio_alpha_default() -> f64 {
    0.001
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShadowPolicy {
    /// Rows that both versions have scored.
    pub min_rows: u64,
    /// Of logged rows whose served values are not those that replay gives.
    pub max_skew_rows: u64,
    pub drift: DriftRule,
    /// Share of rows that the two versions decide differently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_flip_rate: Option<f64>,
    /// How many times as long as the champion's the challenger's forward pass may take, for half of the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_forward_ratio: Option<f64>,
    pub ends_after_us: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriftRule {
    /// Until somebody acknowledges it on record.
    Hold,
    Ignore,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanaryPolicy {
    /// The entity that is randomised.
    pub unit: String,
    /// The challenger's buckets, of 10,000, step by step.
    pub steps: Vec<u16>,
    /// How long each step lasts at least.
    pub bake_us: i64,
    /// Units that the challenger must have had, at every step.
    pub min_units: u64,
    pub ends_after_us: i64,
    /// The first is the primary metric, which decides; others are told, corrected for their number. Their order, after the
    /// guardrails', is that of metrics in counts.
    #[serde(default)]
    pub success: Vec<Success>,
    /// Whether the promotion waits for a whole number of weeks, so that every weekday weighs the same.
    #[serde(default)]
    pub whole_weeks: bool,
    /// Times in which nothing is advanced or promoted: from, until.
    #[serde(default)]
    pub blackouts: Vec<(i64, i64)>,
}

/// What is counted of a unit for a guardrail: always a share of its rows, so that all are judged alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Measure {
    /// The rows of which a named thing is true: `error_rate`, `fallback_rate`, `stale_rate`, `nan_rate`.
    Share(String),
    /// The rows that took longer than so many seconds.
    SlowerThan(f64),
    /// A metric of the caller's own, already in [0, 1].
    Metric(String),
}

/// A bound that must not be crossed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guardrail {
    /// As declared: `p99 < 60ms`.
    pub text: String,
    pub measure: Measure,
    pub side: Side,
    /// Of the mean over units.
    pub bound: f64,
    #[serde(default)]
    pub shape: Shape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Below,
    Above,
}

/// A metric that is compared between the arms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Success {
    pub metric: String,
    /// Whether less of it is better, as of a loss.
    #[serde(default = "yes")]
    pub lower_is_better: bool,
    #[serde(default)]
    pub needs: Needs,
    /// What 0 and 1 stand for: values are clamped to it. Of a log loss, say, 0 and 4.6: nobody is surer than 99 %.
    #[serde(default = "unit_range")]
    pub range: (f64, f64),
    /// About where values lie, in the metric's own unit: best what shadow has shown.
    #[serde(default)]
    pub centre: f64,
    #[serde(default = "mean_shape")]
    pub shape: Shape,
}

fn yes() -> bool {
    true
}

fn unit_range() -> (f64, f64) {
    (0.0, 1.0)
}

fn mean_shape() -> Shape {
    Shape::Mean
}

/// What the primary metric must have shown before a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Needs {
    /// That the challenger is better at all.
    #[default]
    Better,
    /// That it is not worse by so much, in the metric's own unit.
    NotWorseBy(f64),
}

/// Why no rollout can begin under a policy.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum PolicyError {
    #[error(
        "the model declares neither `shadow:` nor `canary:`; a rollout without criteria is refused: declare them and run `coeval apply`"
    )]
    NoCriteria,
    #[error(
        "`canary:` has neither `success` nor guardrails, so nothing could stop it or call it done; declare one of them"
    )]
    NothingToJudge,
    #[error("`{field}` of the rollout is {value}; {wanted}")]
    Value { field: String, value: String, wanted: &'static str },
}

impl Policy {
    /// Refuses what could not be judged.
    pub fn check(&self) -> Result<(), PolicyError> {
        let value = |field: &str, value: String, wanted| PolicyError::Value { field: field.to_owned(), value, wanted };
        let share = |field: &str, share: f64| {
            if share > 0.0 && share < 1.0 {
                Ok(())
            } else {
                Err(value(field, share.to_string(), "it must lie between 0 and 1"))
            }
        };
        let duration = |field: &str, us: i64| {
            if us > 0 { Ok(()) } else { Err(value(field, format!("{us} us"), "say how long, such as `14d`")) }
        };
        if self.shadow.is_none() && self.canary.is_none() {
            return Err(PolicyError::NoCriteria);
        }
        let metrics = self.metrics().max(self.shadow_metrics().len());
        if metrics > METRICS_MAX {
            return Err(value("metrics", metrics.to_string(), "at most 32 are counted: declare fewer guardrails"));
        }
        share("alpha", self.alpha)?;
        share("sample_ratio_alpha", self.sample_ratio_alpha)?;
        for guardrail in &self.guardrails {
            share(&guardrail.text, guardrail.bound)?;
        }
        if let Some(shadow) = &self.shadow {
            duration("shadow.ends_after", shadow.ends_after_us)?;
            if let Some(rate) = shadow.max_flip_rate {
                share("shadow.max_flip_rate", rate)?;
            }
            if shadow.max_forward_ratio.is_some_and(|ratio| !(ratio > 0.0 && ratio.is_finite())) {
                let given = format!("{:?}", shadow.max_forward_ratio);
                return Err(value("shadow.max_forward_ratio", given, "it must be greater than 0"));
            }
        }
        if let Some(canary) = &self.canary {
            duration("canary.ends_after", canary.ends_after_us)?;
            if canary.success.is_empty() && self.guardrails.is_empty() {
                return Err(PolicyError::NothingToJudge);
            }
            let ascending = canary.steps.windows(2).all(|pair| pair[0] < pair[1]);
            let within = canary.steps.iter().all(|step| (1..=BUCKETS).contains(step));
            if canary.steps.is_empty() || !ascending || !within {
                let given = format!("{:?}", canary.steps);
                return Err(value("canary.steps", given, "steps are ascending shares of 0.01 % to 100 %"));
            }
            for success in &canary.success {
                let (low, high) = success.range;
                if !(low < high && low.is_finite() && high.is_finite() && success.centre.is_finite()) {
                    return Err(value(
                        &success.metric,
                        format!("{:?}", success.range),
                        "its range must be two numbers",
                    ));
                }
                if let Needs::NotWorseBy(margin) = success.needs
                    && !(margin > 0.0 && margin < high - low)
                {
                    let wanted = "the margin must be greater than 0 and within the metric's range";
                    return Err(value(&success.metric, margin.to_string(), wanted));
                }
                // Only shares below all compare the arms.
                if canary.steps.iter().all(|step| *step >= BUCKETS) {
                    let given = format!("{:?}", canary.steps);
                    let wanted = "with success metrics one step must leave the champion some units";
                    return Err(value("canary.steps", given, wanted));
                }
            }
        }
        Ok(())
    }

    /// How many metrics counts of a canary have: guardrails, then success metrics.
    pub fn metrics(&self) -> usize {
        self.guardrails.len() + self.canary.as_ref().map_or(0, |canary| canary.success.len())
    }

    /// What is counted of each unit in shadow, in the order of counts.
    pub fn shadow_metrics(&self) -> Vec<ShadowMetric> {
        let rails = 0..self.guardrails.len();
        let success = 0..self.canary.as_ref().map_or(0, |canary| canary.success.len());
        [ShadowMetric::Flip, ShadowMetric::Slower, ShadowMetric::ScoreDifference]
            .into_iter()
            .chain(rails.clone().map(ShadowMetric::ChallengerGuardrail))
            .chain(rails.map(ShadowMetric::ChampionGuardrail))
            .chain(success.map(ShadowMetric::SuccessDifference))
            .collect()
    }
}

/// What both versions' answers to one row are counted as; all are in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShadowMetric {
    /// 1 where they decide differently.
    Flip,
    /// 1 where the challenger took longer than the policy's ratio allows.
    Slower,
    /// (d + 1)/2 of the difference of scores.
    ScoreDifference,
    /// By index.
    ChallengerGuardrail(usize),
    ChampionGuardrail(usize),
    /// (d + 1)/2 of the difference on the success metric's scale.
    SuccessDifference(usize),
}

/// A paired difference as it is counted: d in [−1, 1] as (d + 1)/2.
pub fn paired(challenger: f64, champion: f64) -> f64 {
    ((challenger - champion + 1.0) / 2.0).clamp(0.0, 1.0)
}

impl CanaryPolicy {
    /// The end of the blackout that `now` lies in.
    pub fn blackout_until(&self, now_us: i64) -> Option<i64> {
        self.blackouts.iter().filter(|(from, until)| (*from..*until).contains(&now_us)).map(|(_, until)| *until).max()
    }

    /// When a promotion is possible at the earliest, by `whole_weeks` alone.
    pub fn week_over(&self, begun_us: i64, now_us: i64) -> Option<i64> {
        let elapsed = now_us.saturating_sub(begun_us);
        let weeks = elapsed.div_euclid(WEEK_US);
        if !self.whole_weeks || (weeks >= 1 && elapsed.rem_euclid(WEEK_US) <= WEEK_SLACK_US) {
            return None;
        }
        Some(begun_us.saturating_add((weeks.max(0) + 1).saturating_mul(WEEK_US)))
    }
}

impl Guardrail {
    /// A guardrail as definitions declare it: a metric, a side and a bound in the metric's own unit (seconds for `p50`, `p95`
    /// and `p99`). A percentile below x is that fewer than the rest of the rows take longer than x.
    pub fn declared(text: &str, metric: &str, side: Side, bound: f64) -> Guardrail {
        let percentile = metric.strip_prefix('p').and_then(|digits| digits.parse::<u8>().ok());
        let (measure, bound) = match (metric, percentile) {
            (_, Some(percentile @ 1..=99)) => (Measure::SlowerThan(bound), f64::from(100 - percentile) / 100.0),
            ("error_rate" | "fallback_rate" | "stale_rate" | "nan_rate", _) => {
                (Measure::Share(metric.to_owned()), bound)
            }
            _ => (Measure::Metric(metric.to_owned()), bound),
        };
        let shape = if matches!(measure, Measure::Metric(_)) { Shape::Mean } else { Shape::Rate };
        Guardrail { text: text.to_owned(), measure, side, bound, shape }
    }
}

impl Success {
    /// A value of the metric on the scale from 0 to 1 that is counted.
    pub fn scaled(&self, value: f64) -> f64 {
        let (low, high) = self.range;
        if value.is_nan() {
            return if self.lower_is_better { 1.0 } else { 0.0 };
        }
        ((value - low) / (high - low)).clamp(0.0, 1.0)
    }
}
