//! Row by row whether what was served is what had been applied, and no more: for whoever stops a rollout by it and needs no
//! reasons.

use arrow::array::AsArray;
use feature_defs::plan::ModelPlan;

use super::compare::{Column, different};
use super::logged::Logged;
use super::report::TensorReport;
use super::tally::NotAudited;
use super::{AuditError, Auditor, tensors};
use crate::serving_log::columns as names;

/// What of one row was not served right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowSkew {
    /// The values are those of the replay.
    None,
    /// The first feature that differs, by its place in the service.
    Feature(usize),
    /// All features are right, and the model was given something else.
    Tensors,
    /// It cannot be replayed, or nothing of it.
    NotAudited(NotAudited),
}

impl Auditor<'_> {
    /// Why rows cannot be replayed, row by row; costs no replay.
    pub fn left_out(&self, logged: &Logged) -> Result<Vec<Option<NotAudited>>, AuditError> {
        logged.left_out(&self.service, &self.held)
    }

    /// Replays rows as known. `model` is the version's own that answered them.
    pub async fn skew(&self, logged: &Logged, model: Option<&ModelPlan>) -> Result<Vec<RowSkew>, AuditError> {
        let service = self.service.clone();
        let why = self.left_out(logged)?;
        let kept: Vec<u32> = (0..logged.rows() as u32).filter(|row| why[*row as usize].is_none()).collect();
        let mut found: Vec<RowSkew> =
            why.into_iter().map(|why| why.map_or(RowSkew::None, RowSkew::NotAudited)).collect();
        if kept.is_empty() {
            return Ok(found);
        }
        let audited = if kept.len() == logged.rows() { logged.clone() } else { logged.take(&kept)? };
        let hidden = audited.features_left_out(&service);
        if hidden.iter().all(|hidden| *hidden) && !hidden.is_empty() {
            kept.iter().for_each(|row| found[*row as usize] = RowSkew::NotAudited(NotAudited::Hashed));
            return Ok(found);
        }
        let as_known = self.replay(&audited, true).await?;
        let mut wrong: Vec<Option<usize>> = vec![None; kept.len()];
        for (output, known) in as_known.iter().enumerate().filter(|(output, _)| !hidden[*output]) {
            let Some(served) = audited.served(&service, output)? else { continue };
            for (row, differs) in differing(&served, known).into_iter().enumerate() {
                if differs {
                    wrong[row].get_or_insert(output);
                }
            }
        }
        // What another model, or nobody, answered was perhaps never encoded for this one.
        let statuses = audited.batch.column_by_name(names::STATUS).and_then(|column| column.as_string_opt::<i32>());
        let answered = |row: usize| statuses.is_some_and(|statuses| statuses.value(row) == "ok");
        let clean: Vec<bool> = wrong.iter().enumerate().map(|(row, wrong)| wrong.is_none() && answered(row)).collect();
        let other_tensors = match model.filter(|model| model.service.semantic_digest == service.semantic_digest) {
            Some(model) => other_tensors(model, &audited, &as_known, &hidden, &clean)?,
            None => vec![false; kept.len()],
        };
        for (place, row) in kept.into_iter().enumerate() {
            found[row as usize] = match wrong[place] {
                Some(feature) => RowSkew::Feature(feature),
                None if other_tensors[place] => RowSkew::Tensors,
                None => RowSkew::None,
            };
        }
        Ok(found)
    }
}

fn differing(served: &Column, known: &Column) -> Vec<bool> {
    let values = different(&served.values, &known.values);
    let statuses = served.statuses.iter().zip(&known.statuses).map(|(served, known)| served != known);
    values.into_iter().zip(statuses).map(|(value, status)| value || status).collect()
}

fn other_tensors(
    model: &ModelPlan,
    logged: &Logged,
    as_known: &[Column],
    hidden: &[bool],
    clean: &[bool],
) -> Result<Vec<bool>, AuditError> {
    let mut all = TensorReport::default();
    tensors::compare(&mut all, model, logged, as_known, hidden, clean)?;
    if all.different == 0 {
        return Ok(vec![false; clean.len()]);
    }
    // There are hardly ever any: then each row by itself.
    let mut other = Vec::with_capacity(clean.len());
    for row in 0..clean.len() {
        let mut one = TensorReport::default();
        let known = as_known.iter().map(|column| Column {
            values: column.values.slice(row, 1),
            statuses: column.statuses[row..=row].to_vec(),
        });
        let known: Vec<Column> = known.collect();
        tensors::compare(&mut one, model, &logged.slice(row, 1), &known, hidden, &clean[row..=row])?;
        other.push(one.different > 0);
    }
    Ok(other)
}
