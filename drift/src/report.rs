//! A verdict in words: which numbers, against which thresholds, over how much data.

use std::fmt;

use crate::distance::Metric;
use crate::verdict::{DistanceReport, FeatureReport, Policy, Rate, RateReport, Report, Verdict};

impl FeatureReport {
    /// The effect of the gate; of a vector, the largest of its numbers'.
    pub fn effect(&self) -> f64 {
        self.distances.iter().filter_map(DistanceReport::gate).map(|gate| gate.effect).fold(0.0, f64::max)
    }

    /// The verdict of a feature from those of its tests, with the reasons of the worst.
    pub(crate) fn conclude(&mut self, policy: &Policy) {
        let rates = self.rates.iter().map(|rate| (rate.verdict, rate.reason(policy)));
        let distances = self.distances.iter().map(|distance| (distance.verdict, distance.reason(policy)));
        let all: Vec<(Verdict, String)> = rates.chain(distances).collect();
        self.verdict = all.iter().map(|(verdict, _)| *verdict).max().unwrap_or(Verdict::Stable);
        self.reasons =
            all.into_iter().filter(|(verdict, _)| *verdict == self.verdict).map(|(_, reason)| reason).collect();
    }
}

impl RateReport {
    fn reason(&self, policy: &Policy) -> String {
        let change = format!("{} rate {} (training {})", self.rate, percent(self.serving), percent(self.reference));
        match self.verdict {
            Verdict::Drift => format!(
                "{change}: beyond {} of change, p {} after correction over {:.0} effective rows",
                percent(policy.rate_effect),
                small(self.p_corrected),
                self.rows_effective,
            ),
            Verdict::Stable => change,
            Verdict::InsufficientData if self.blocks < policy.blocks_min => {
                format!("{change}: {:.1} independent blocks of {:.0} needed", self.blocks, policy.blocks_min)
            }
            Verdict::InsufficientData => format!(
                "{change}: with {:.0} effective rows, nothing below {} is beyond noise",
                self.rows_effective,
                percent(self.detectable),
            ),
        }
    }
}

impl DistanceReport {
    pub fn gate(&self) -> Option<&crate::verdict::MetricReport> {
        self.metrics.iter().find(|metric| metric.is_gate)
    }

    fn reason(&self, policy: &Policy) -> String {
        let Some(gate) = self.gate() else { return String::new() };
        let part = self.part.as_ref().map_or_else(String::new, |part| format!("{part}: "));
        let numbers = format!(
            "{part}{} {:.4}, {:.4} without noise (matters from {}), noise floor {:.4}, {:.0} rows worth {:.0}",
            gate.metric.name(),
            gate.value,
            gate.effect,
            gate.practical,
            gate.floor,
            self.rows,
            self.rows_effective,
        );
        match self.verdict {
            Verdict::Drift => {
                let bins = self
                    .moved
                    .iter()
                    .map(|bin| format!("{} {} -> {}", bin.bin, percent(bin.reference), percent(bin.serving)));
                let bins: Vec<String> = bins.collect();
                format!("{numbers}, p {} after correction; {}", small(self.p_corrected), bins.join(", "))
            }
            Verdict::Stable => numbers,
            Verdict::InsufficientData if self.rows == 0.0 => format!("{part}no values"),
            Verdict::InsufficientData if self.blocks.min(self.reference_blocks) < policy.blocks_min => format!(
                "{numbers}: {:.1} independent blocks, {:.1} of training, of {:.0} needed",
                self.blocks, self.reference_blocks, policy.blocks_min,
            ),
            Verdict::InsufficientData => format!("{numbers}: an effect that matters could pass for noise"),
        }
    }
}

impl Metric {
    /// What an effect comes to with noise: the inverse of [`Metric::without_noise`].
    pub(crate) fn with_noise(self, effect: f64, noise: f64) -> f64 {
        match self {
            Metric::Psi => effect + noise,
            _ => (effect * effect + noise * noise).sqrt(),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Stable => "STABLE",
            Verdict::InsufficientData => "INSUFFICIENT_DATA",
            Verdict::Drift => "DRIFT",
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rate::Null => "null",
            Rate::NotANumber => "NaN",
            Rate::Defaulted => "default",
            Rate::Stale => "stale",
            Rate::Fallback => "fallback",
            Rate::Unseen => "unseen",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} at {} false alarms per window, {} tests", self.verdict, percent(self.alpha), self.tests)?;
        for feature in &self.features {
            writeln!(f, "{}: {} over {} rows", feature.name, feature.verdict, feature.rows)?;
            feature.reasons.iter().try_for_each(|reason| writeln!(f, "  {reason}"))?;
        }
        if let Some(weighted) = &self.weighted {
            writeln!(
                f,
                "by importance: effect {:.4}, {} drifted, {} unknown",
                weighted.effect,
                percent(weighted.drifted),
                percent(weighted.insufficient)
            )?;
        }
        Ok(())
    }
}

fn percent(share: f64) -> String {
    let hundredths = (share * 1e4).round() / 100.0;
    format!("{hundredths} %")
}

fn small(p: f64) -> String {
    if p < 1e-3 { format!("{p:.0e}") } else { format!("{p:.3}") }
}
