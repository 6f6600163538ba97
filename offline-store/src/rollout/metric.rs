//! What a row is worth: its loss once its label is known, or what became of it.

use drift::sequential::policy::{Guardrail, Measure, Success};

/// Log-loss of a certain prediction that was wrong is infinite; as usual, scores are kept so far from 0 and 1.
const PROBABILITY_MIN: f64 = 1e-15;

/// A metric of a row whose label is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Metric {
    LogLoss,
    Brier,
    AbsoluteError,
    SquaredError,
    /// 1 where the decision is not the label.
    Error,
    /// A value of the business that is added as labels under a name of its own.
    Added(String),
}

impl Metric {
    pub fn named(name: &str) -> Metric {
        match name {
            "log_loss" => Metric::LogLoss,
            "brier" => Metric::Brier,
            "absolute_error" => Metric::AbsoluteError,
            "squared_error" => Metric::SquaredError,
            "error" => Metric::Error,
            other => Metric::Added(other.to_owned()),
        }
    }

    /// Whether it can be computed of a version that answers nobody: from its score, and a label that does not depend on it.
    pub fn is_of_scores(&self) -> bool {
        !matches!(self, Metric::Added(_))
    }

    /// NaN where it cannot be computed, as of a row that got no score: that is to count as the worst.
    pub fn value(&self, score: Option<f64>, decided: Option<bool>, label: f64) -> f64 {
        let score = score.unwrap_or(f64::NAN);
        match self {
            Metric::Added(_) => label,
            Metric::AbsoluteError => (score - label).abs(),
            Metric::SquaredError => (score - label) * (score - label),
            Metric::Brier if is_share(score) => (score - label) * (score - label),
            Metric::LogLoss if is_share(score) && is_share(label) => {
                // The pinned logarithm: gateways on different machines must get the same sums.
                let of = |share: f64| -drift::special::ln(share.clamp(PROBABILITY_MIN, 1.0 - PROBABILITY_MIN));
                // Labels of 0 and 1 take one of the two.
                label * of(score) + (1.0 - label) * of(1.0 - score)
            }
            Metric::Error => {
                let decided = decided.or_else(|| is_share(score).then_some(score > 0.5));
                decided.map_or(f64::NAN, |decided| f64::from(u8::from(decided != (label > 0.5))))
            }
            Metric::Brier | Metric::LogLoss => f64::NAN,
        }
    }
}

fn is_share(x: f64) -> bool {
    (0.0..=1.0).contains(&x)
}

/// What became of a row, from the columns of the log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// The model did not answer, and not because of what the request or the store lacks.
    Errors,
    /// The model did not answer, for whatever reason.
    Fallbacks,
    /// A view was older than its `freshness`.
    Stale,
    /// The model answered with something that is no number.
    Nan,
    /// Of the whole request, in microseconds.
    SlowerThan(f64),
}

impl Rate {
    /// None where the log does not tell.
    pub fn of(measure: &Measure) -> Option<Rate> {
        match measure {
            Measure::Share(name) => match name.as_str() {
                "error_rate" => Some(Rate::Errors),
                "fallback_rate" => Some(Rate::Fallbacks),
                "stale_rate" => Some(Rate::Stale),
                "nan_rate" => Some(Rate::Nan),
                _ => None,
            },
            Measure::SlowerThan(seconds) => Some(Rate::SlowerThan(seconds * 1e6)),
            Measure::Metric(_) => None,
        }
    }
}

/// One number of each row, in [0, 1].
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Labelled {
        metric: Metric,
        /// None: it lies in [0, 1] as it is.
        scale: Option<Success>,
        /// What stands for what is no number.
        worst: f64,
    },
    Happened(Rate),
}

impl Outcome {
    pub fn of_success(success: &Success) -> Outcome {
        let worst = if success.lower_is_better { 1.0 } else { 0.0 };
        Outcome::Labelled { metric: Metric::named(&success.metric), scale: Some(success.clone()), worst }
    }

    /// None where the log does not tell.
    pub fn of_guardrail(guardrail: &Guardrail) -> Option<Outcome> {
        use drift::sequential::policy::Side;
        match &guardrail.measure {
            Measure::Metric(name) => {
                let worst = if guardrail.side == Side::Below { 1.0 } else { 0.0 };
                Some(Outcome::Labelled { metric: Metric::named(name), scale: None, worst })
            }
            measure => Rate::of(measure).map(Outcome::Happened),
        }
    }

    /// The name under which labels of it are added; None where none are needed, or the model's own are.
    pub fn metric(&self) -> Option<&Metric> {
        match self {
            Outcome::Labelled { metric, .. } => Some(metric),
            Outcome::Happened(_) => None,
        }
    }

    /// A value of the metric on the scale from 0 to 1 that is counted.
    pub fn scaled(&self, value: f64) -> f64 {
        match self {
            Outcome::Labelled { worst, .. } if value.is_nan() => *worst,
            Outcome::Labelled { scale: Some(success), .. } => success.scaled(value),
            _ => value.clamp(0.0, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_those_of_the_textbook() {
        let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
        close(Metric::LogLoss.value(Some(0.8), None, 1.0), 0.223_143_551_314_209_7);
        close(Metric::LogLoss.value(Some(0.8), None, 0.0), 1.609_437_912_434_100_3);
        assert!(Metric::LogLoss.value(Some(0.0), None, 1.0) > 34.0);
        close(Metric::Brier.value(Some(0.8), None, 1.0), 0.04);
        close(Metric::AbsoluteError.value(Some(12.0), None, 15.5), 3.5);
        close(Metric::SquaredError.value(Some(12.0), None, 15.5), 12.25);
        close(Metric::Added("paid".into()).value(None, None, 7.0), 7.0);
        // The decision, or half where none is declared.
        assert_eq!(Metric::Error.value(Some(0.4), Some(true), 1.0), 0.0);
        assert_eq!(Metric::Error.value(Some(0.4), None, 1.0), 1.0);
        // No score, or none that is a probability.
        for metric in [Metric::LogLoss, Metric::Brier, Metric::Error] {
            assert!(metric.value(None, None, 1.0).is_nan() && metric.value(Some(1.5), None, 1.0).is_nan());
        }
    }

    #[test]
    fn what_cannot_be_computed_is_the_worst() {
        let success = |lower_is_better| Success {
            metric: "log_loss".into(),
            lower_is_better,
            needs: Default::default(),
            range: (0.0, 4.0),
            centre: 1.0,
            shape: Default::default(),
        };
        let outcome = Outcome::of_success(&success(true));
        assert_eq!((outcome.scaled(1.0), outcome.scaled(9.0), outcome.scaled(f64::NAN)), (0.25, 1.0, 1.0));
        assert_eq!(Outcome::of_success(&success(false)).scaled(f64::NAN), 0.0);
    }
}
