//! What an audit found, for machines and for people.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value as Json};

pub use super::lateness::LateSource;
use super::rank::Cause;
use super::tally::{Counts, NotAudited, Series};
use crate::explain::{Explanation, Moment};

/// What came of an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// No more values differ than may.
    Passed,
    Failed,
    /// There was nothing to compare, which proves nothing.
    NothingCompared,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub service: String,
    pub semantic_digest: String,
    pub from: Moment,
    pub to: Moment,
    pub outcome: Outcome,
    pub max_bug_rate: f64,
    pub rows: Rows,
    /// Values of all features together.
    pub values: Counts,
    pub bug_rate: f64,
    /// With 95 % confidence the share of wrong values among those served is no larger.
    pub bug_rate_upper: f64,
    /// Of all rows with wrong values.
    pub cause: Option<Cause>,
    pub bugs: Series,
    /// Request and row of the first that have wrong values.
    pub wrong_rows: Vec<(String, u32)>,
    pub features: Vec<FeatureReport>,
    pub lateness: Vec<LateSource>,
    /// Late values that the reasons were looked for in.
    pub lateness_sampled: u64,
    pub tensors: Option<TensorReport>,
    pub rescored: Option<Rescored>,
    pub losses: Option<Losses>,
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Rows {
    /// In the log, in the time asked for.
    pub logged: u64,
    pub audited: u64,
    /// Not looked at, because only a sample was asked for.
    pub passed_over: u64,
    pub not_audited: BTreeMap<NotAudited, u64>,
    pub with_bugs: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct FeatureReport {
    pub feature: String,
    pub counts: Counts,
    pub bug_rate: f64,
    pub bug_rate_upper: f64,
    pub lateness_rate: f64,
    pub lateness_rate_upper: f64,
    pub first_bad_minute: Option<Moment>,
    pub cause: Option<Cause>,
    /// The worst first.
    pub examples: Vec<Example>,
}

/// A value that is not what it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Example {
    pub kind: &'static str,
    pub request_id: String,
    pub row: u32,
    pub time: Moment,
    pub at: Moment,
    pub given: Map<String, Json>,
    pub served: Json,
    pub served_status: String,
    pub as_known: Json,
    pub as_known_status: String,
    pub by_event_time: Json,
    pub by_event_time_status: String,
    /// Which rows of the sources make what should have been served.
    pub explained: Option<Box<Explanation>>,
    /// Why they could not be named.
    pub unexplained: Option<String>,
}

/// Whether features became the same tensors.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TensorReport {
    /// Rows whose digest was compared: all their features are equal.
    pub compared: u64,
    pub equal: u64,
    /// The features are the served ones, and the model was given something else: a bug in the encoding.
    pub different: u64,
    /// Rows whose features differ already.
    pub passed_over: u64,
    /// Request and row of the first that differ.
    pub examples: Vec<(String, u32)>,
}

/// Logged outputs against those of the same model version, asked again.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Rescored {
    pub compared: u64,
    pub equal: u64,
    pub different: u64,
    /// Rows that could not be asked again, by reason.
    pub not_compared: BTreeMap<String, u64>,
    pub examples: Vec<String>,
}

/// What became of the rows that were answered in the time that was audited, as the gateways counted them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Losses {
    /// Answered, and looked at.
    pub offered: u64,
    pub chosen: u64,
    pub written: u64,
    /// Fallbacks beyond the declared rate.
    pub fallbacks_over: u64,
    /// Would have been in the log, and are not.
    pub lost: u64,
}

impl Report {
    pub fn failed(&self) -> bool {
        self.outcome != Outcome::Passed
    }

    /// One line that says it all.
    pub fn verdict(&self) -> String {
        let Counts { bug, lateness, fallback, .. } = self.values;
        let compared = grouped(self.values.compared());
        match self.outcome {
            Outcome::NothingCompared => format!(
                "nothing was compared: the log of service `{}` has {} rows from {} to {}, and {} of them can be audited",
                self.service, self.rows.logged, self.from, self.to, self.rows.audited
            ),
            Outcome::Passed if bug == 0 => format!(
                "PASSED: {compared} values compared, none differs from what the same code says offline (at most {} with 95 % confidence); {} late, {} fallbacks",
                share(self.bug_rate_upper),
                grouped(lateness),
                grouped(fallback)
            ),
            outcome => format!(
                "{}: {} of {compared} values differ from what the same code says offline, in {} rows (at most {} with 95 % confidence){}{}; {} late, {} fallbacks",
                if outcome == Outcome::Passed { "PASSED" } else { "FAILED" },
                grouped(bug),
                grouped(self.rows.with_bugs),
                share(self.bug_rate_upper),
                self.cause.as_ref().map_or_else(String::new, |cause| format!("; {}", cause.words())),
                self.of_models(),
                grouped(lateness),
                grouped(fallback)
            ),
        }
    }

    /// What is wrong though features are right.
    fn of_models(&self) -> String {
        let mut text = String::new();
        if let Some(different) = self.tensors.as_ref().map(|tensors| tensors.different).filter(|rows| *rows > 0) {
            text.push_str(&format!("; {} rows with equal features had other tensors", grouped(different)));
        }
        if let Some(different) = self.rescored.as_ref().map(|scores| scores.different).filter(|rows| *rows > 0) {
            text.push_str(&format!("; {} rows are scored otherwise when asked again", grouped(different)));
        }
        text
    }

    /// For people, line by line.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("service   {} ({})", self.service, short(&self.semantic_digest)),
            format!("time      {} to {}", self.from, self.to),
        ];
        let Rows { logged, audited, passed_over, not_audited, .. } = &self.rows;
        let sampled =
            if *passed_over > 0 { format!(", {} not in the sample", grouped(*passed_over)) } else { String::new() };
        lines.push(format!("rows      {} logged, {} audited{sampled}", grouped(*logged), grouped(*audited)));
        for (why, rows) in not_audited {
            lines.push(format!("          {} {}", grouped(*rows), why.words()));
        }
        if let Some(losses) = &self.losses {
            lines.push(format!(
                "log       {} rows answered, {} chosen, {} written, {} lost",
                grouped(losses.offered),
                grouped(losses.chosen),
                grouped(losses.written),
                grouped(losses.lost)
            ));
        }
        if let Some(first) = self.bugs.first {
            lines.push(format!("first bug {first}"));
        }
        lines.push(String::new());
        lines.extend(self.table());
        for feature in &self.features {
            if let Some(cause) = &feature.cause {
                lines.push(String::new());
                lines.push(format!("{}: {}", feature.feature, cause.words()));
                lines.extend(
                    cause.ties.iter().map(|tie| {
                        format!("  as well: {}, {} ({} rows)", tie.fault.words(), tie.setting, tie.reproduced)
                    }),
                );
            }
            let bugs = feature.examples.iter().filter(|example| example.kind == "bug");
            for example in bugs {
                lines.push(format!(
                    "  {} row {} at {}: served {} {}, as known {} {}",
                    example.request_id,
                    example.row,
                    example.at,
                    example.served,
                    example.served_status,
                    example.as_known,
                    example.as_known_status
                ));
            }
        }
        if !self.lateness.is_empty() {
            lines.push(String::new());
            lines.push(format!(
                "late, by a sample of {} of {} values:",
                grouped(self.lateness_sampled),
                grouped(self.values.lateness)
            ));
        }
        for late in &self.lateness {
            let longest = |length: &Option<crate::explain::Length>| {
                length.map_or_else(String::new, |length| format!(", by up to {length}"))
            };
            if late.arrived_after > 0 {
                lines.push(format!(
                    "  source {}: events arrived after the answer ({} values{}), in {}",
                    late.source,
                    late.arrived_after,
                    longest(&late.arrived_after_max),
                    late.views.join(", ")
                ));
            }
            if late.not_applied > 0 {
                lines.push(format!(
                    "  source {}: events were known and not yet applied online ({} values{}), in {}",
                    late.source,
                    late.not_applied,
                    longest(&late.not_applied_max),
                    late.views.join(", ")
                ));
            }
        }
        if let Some(tensors) = &self.tensors {
            lines.push(String::new());
            lines.push(format!(
                "tensors   {} compared, {} equal, {} differ though their features are equal",
                grouped(tensors.compared),
                grouped(tensors.equal),
                grouped(tensors.different)
            ));
        }
        if let Some(rescored) = &self.rescored {
            lines.push(format!(
                "scores    {} asked again, {} equal within tolerance, {} differ",
                grouped(rescored.compared),
                grouped(rescored.equal),
                grouped(rescored.different)
            ));
        }
        lines.extend(self.notes.iter().map(|note| format!("note      {note}")));
        lines.push(String::new());
        lines.push(self.verdict());
        lines
    }

    fn table(&self) -> Vec<String> {
        let width = self.features.iter().map(|feature| feature.feature.chars().count()).max().unwrap_or(0).max(7);
        let head = ["EQUAL", "BUG", "AT MOST", "LATE", "FALLBACK", "NOT AUDITED"];
        let mut lines = vec![format!(
            "{:<width$}  {:>12}  {:>9}  {:>9}  {:>9}  {:>9}  {:>11}",
            "FEATURE", head[0], head[1], head[2], head[3], head[4], head[5]
        )];
        for feature in &self.features {
            let counts = &feature.counts;
            let line = format!(
                "{:<width$}  {:>12}  {:>9}  {:>9}  {:>9}  {:>9}  {:>11}",
                feature.feature,
                grouped(counts.equal),
                grouped(counts.bug),
                share(feature.bug_rate_upper),
                grouped(counts.lateness),
                grouped(counts.fallback),
                grouped(counts.left_out())
            );
            lines.push(line);
        }
        lines
    }
}

impl Cause {
    pub fn words(&self) -> String {
        match self.fault {
            Some(fault) => format!(
                "{} reproduces {} of {} wrong rows to the bit: {}",
                fault.words(),
                self.reproduced,
                self.rows,
                self.setting
            ),
            None => format!("no hypothesis reproduces any of {} wrong rows", self.rows),
        }
    }
}

/// Digits in threes.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn share(share: f64) -> String {
    if share >= 0.001 { format!("{:.2} %", share * 100.0) } else { format!("{share:.1e}") }
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_threes() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(grouped(number), text);
        }
    }
}
