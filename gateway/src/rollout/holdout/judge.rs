//! What scored rows say of two versions. Pure.

use std::collections::BTreeMap;

use drift::sequential::bets::Shape;
use drift::sequential::mean;
use drift::sequential::policy::{Needs, Success, paired};
use drift::sequential::tally::Tally;
use feature_defs::plan::ModelPlan;
use offline_store::labels::is_class;
use offline_store::labels::quality::{self, Classes, Errors};
use offline_store::rollout::metric::{Metric, Outcome};
use serde::{Deserialize, Serialize};

use super::{HoldoutAsked, Scored};

/// One row of the dataset.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub unit: u64,
    pub label: Option<f64>,
    pub challenger: Scored,
    pub champion: Option<Scored>,
}

/// How good a version is on a dataset, and whether it is shown to be worse than the champion.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub model: String,
    pub dataset: String,
    /// Scored, and of these those with a label.
    pub rows: u64,
    pub labelled: u64,
    pub challenger: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub champion: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flips: Option<Flips>,
    /// Of the primary success metric; None where nothing can be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
    /// The challenger is shown to be worse than the champion, by more than the margin where one is declared.
    pub worse: bool,
    pub notes: Vec<String>,
    /// For people.
    pub text: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    pub version: u32,
    /// Rows that it gave a score by itself.
    pub scored: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<Errors>,
    /// Means of the declared success metrics over units, in their own units.
    pub success: BTreeMap<String, f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Flips {
    /// Rows that both decided.
    pub rows: u64,
    pub flipped: u64,
    /// Of the rows.
    pub rate: f64,
}

/// Challenger less champion, in the metric's own unit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    pub metric: String,
    pub units: u64,
    pub estimate: f64,
    /// Each end with the policy's alpha.
    pub interval: (f64, f64),
    /// How sure it is that the challenger is worse: one e-value of at least 1/alpha shows it.
    pub ln_worse: f64,
    pub ln_better: f64,
}

/// A unit's sums: of the challenger, of the champion, and rows.
type Sums = BTreeMap<u64, (f64, f64, u64)>;

pub(super) fn evaluated(
    asked: &HoldoutAsked,
    dataset: &str,
    plan: &ModelPlan,
    champion: Option<u32>,
    rows: Vec<Row>,
    notes: Vec<String>,
) -> Evaluation {
    let labelled = rows.iter().filter(|row| row.label.is_some()).count() as u64;
    let mut evaluation = Evaluation {
        model: asked.model.clone(),
        dataset: dataset.to_owned(),
        rows: rows.len() as u64,
        labelled,
        challenger: scores(asked.challenger, plan, &rows, |row| Some(row.challenger)),
        champion: champion.map(|version| scores(version, plan, &rows, |row| row.champion)),
        notes,
        ..Evaluation::default()
    };
    let decided = rows.iter().filter_map(|row| row.challenger.1.zip(row.champion?.1));
    let (mut both, mut flipped) = (0_u64, 0_u64);
    for (challenger, champion) in decided {
        both += 1;
        flipped += u64::from(challenger != champion);
    }
    if both > 0 {
        evaluation.flips = Some(Flips { rows: both, flipped, rate: flipped as f64 / both as f64 });
    }
    let success = asked.policy.canary.iter().flat_map(|canary| &canary.success);
    for (number, success) in success.enumerate() {
        let Outcome::Labelled { metric, .. } = Outcome::of_success(success) else { continue };
        if !metric.is_of_scores() {
            evaluation.notes.push(format!("`{}` is a value of the business: no dataset tells it", success.metric));
            continue;
        }
        let sums = by_unit(&rows, &metric, success);
        let units = sums.len().max(1) as f64;
        let (low, high) = success.range;
        let own = |scaled: f64| low + scaled / units * (high - low);
        let total = |of: fn(&(f64, f64, u64)) -> f64| -> f64 { sums.values().map(|sum| of(sum) / sum.2 as f64).sum() };
        if !sums.is_empty() {
            let metric = success.metric.clone();
            evaluation.challenger.success.insert(metric.clone(), own(total(|sum| sum.0)));
            if let Some(champion) = &mut evaluation.champion {
                champion.success.insert(metric, own(total(|sum| sum.1)));
            }
        }
        if number == 0 && evaluation.champion.is_some() && !sums.is_empty() {
            let difference = compared(success, &sums);
            evaluation.worse = difference.ln_worse >= -drift::special::ln(asked.policy.alpha);
            evaluation.difference = Some(bounded(success, &sums, difference, asked.policy.alpha));
        }
    }
    if labelled == 0 {
        evaluation.notes.push("no row of the dataset has a label".to_owned());
    }
    evaluation.text = lines(&evaluation);
    evaluation
}

fn by_unit(rows: &[Row], metric: &Metric, success: &Success) -> Sums {
    let mut sums = Sums::new();
    let outcome = Outcome::of_success(success);
    let value = |(score, decided): Scored, label: f64| outcome.scaled(metric.value(score, decided, label));
    for row in rows {
        let Some(label) = row.label else { continue };
        let challenger = value(row.challenger, label);
        let champion = row.champion.map_or(0.0, |champion| value(champion, label));
        let sum = sums.entry(row.unit).or_default();
        (sum.0, sum.1, sum.2) = (sum.0 + challenger, sum.1 + champion, sum.2 + 1);
    }
    sums
}

fn tally(sums: &Sums) -> Tally {
    let mut tally = Tally::default();
    for (challenger, champion, rows) in sums.values() {
        tally.add(paired(challenger / *rows as f64, champion / *rows as f64));
    }
    tally
}

fn compared(success: &Success, sums: &Sums) -> Difference {
    let tally = tally(sums).sums();
    let margin = match success.needs {
        Needs::Better => 0.0,
        Needs::NotWorseBy(margin) => margin / (success.range.1 - success.range.0),
    };
    // A difference d is counted as (d + 1)/2.
    let (ln_worse, ln_better) = match success.lower_is_better {
        true => (mean::ln_above(&tally, 0.5 + margin / 2.0, Shape::Mean), mean::ln_below(&tally, 0.5, Shape::Mean)),
        false => (mean::ln_below(&tally, 0.5 - margin / 2.0, Shape::Mean), mean::ln_above(&tally, 0.5, Shape::Mean)),
    };
    Difference {
        metric: success.metric.clone(),
        units: sums.len() as u64,
        ln_worse,
        ln_better,
        ..Difference::default()
    }
}

fn bounded(success: &Success, sums: &Sums, difference: Difference, alpha: f64) -> Difference {
    let tally = tally(sums).sums();
    let back = |x: f64| (2.0 * x - 1.0) * (success.range.1 - success.range.0);
    Difference {
        estimate: back(tally.mean().unwrap_or(0.5)),
        interval: (back(mean::lower(&tally, alpha, Shape::Mean)), back(mean::upper(&tally, alpha, Shape::Mean))),
        ..difference
    }
}

fn scores(version: u32, plan: &ModelPlan, rows: &[Row], of: impl Fn(&Row) -> Option<Scored>) -> Scores {
    let scored = rows.iter().filter(|row| of(row).is_some_and(|(score, _)| score.is_some())).count() as u64;
    let pairs = rows.iter().filter_map(|row| Some((of(row)?.0?, row.label?)));
    let mut scores = Scores { version, scored, ..Scores::default() };
    if plan.label.as_ref().is_some_and(is_class) {
        let pairs: Vec<(f64, bool)> = pairs.map(|(score, label)| (score, label > 0.5)).collect();
        scores.classes = (!pairs.is_empty()).then(|| quality::classes(pairs));
    } else {
        scores.errors = quality::errors(pairs.collect());
    }
    scores
}

fn lines(evaluation: &Evaluation) -> Vec<String> {
    let Evaluation { dataset, rows, labelled, challenger, champion, flips, difference, worse, notes, .. } = evaluation;
    let mut lines = vec![format!("dataset {dataset}: {rows} rows scored, {labelled} with a label")];
    for scores in [Some(challenger), champion.as_ref()].into_iter().flatten() {
        let mut said = Vec::new();
        if let Some(classes) = &scores.classes {
            let number = |name: &str, number: Option<f64>| number.map(|number| format!("{name} {number:.4}"));
            let all = [("AUC", classes.auc), ("log-loss", classes.log_loss), ("Brier", classes.brier)];
            said.extend(all.into_iter().filter_map(|(name, found)| number(name, found)));
        }
        if let Some(errors) = &scores.errors {
            said.push(format!("mean absolute error {:.4}", errors.mean_absolute));
            said.push(format!("root mean square error {:.4}", errors.root_mean_square));
        }
        if said.is_empty() {
            said.push("nothing to judge".to_owned());
        }
        if scores.scored < *rows {
            said.push(format!("{} rows got no score", rows - scores.scored));
        }
        lines.push(format!("version {}: {}", scores.version, said.join(", ")));
    }
    if let Some(Flips { rows, flipped, rate }) = flips {
        lines.push(format!("{flipped} of {rows} decisions differ ({:.2} %)", 100.0 * rate));
    }
    if let Some(Difference { metric, units, estimate, interval: (low, high), ln_better, ln_worse, .. }) = difference {
        let verdict = match (worse, ln_better > ln_worse) {
            (true, _) => "it is worse",
            (false, true) => "it looks better",
            (false, false) => "that it is worse is not shown",
        };
        lines.push(format!(
            "{metric}, challenger less champion: {estimate:.4}, between {low:.4} and {high:.4}, {units} units: {verdict}"
        ));
    }
    lines.extend(notes.iter().cloned());
    lines
}

#[cfg(test)]
mod tests;
