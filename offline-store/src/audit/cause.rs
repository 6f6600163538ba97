//! Why wrong values are what they are: fixed hypotheses are replayed over the events of a sample of wrong rows, and those
//! that give the bits that were served are named.
//!
//! Each hypothesis changes one thing of how a row is answered, in the views that the wrong features are made of, and lets
//! the service's own plan compute everything that depends on it. So a fault in one place has to explain all that it did to
//! a row, and is worth more if it also leaves the rest of the row as it was served.

mod hypotheses;

use std::collections::HashMap;

use arrow::array::{ArrayRef, RecordBatch, UInt32Array};
use arrow::compute::take;
use feature_defs::plan::{ServicePlan, Slot, ViewAnswer};
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value};
use serde::{Deserialize, Serialize};

use super::AuditError;
use super::compare::{Column, different};
use super::events::Events;
use super::rank::{Cause, Hypothesis, Match, rank};
use super::scale::{self, Scale};
use super::variant::{Look, Part};
use crate::explain::Needed;
use crate::point_in_time::Used;
use crate::point_in_time::by_row::Applied;
use crate::point_in_time::index::NO_GROUP;

/// Events that are tried as the one that is missing, or counted twice.
const EVENTS_MAX: usize = 256;
/// Older states that are tried.
const OLDER_MAX: usize = 64;
/// Variants that are put together at a time.
const BLOCK: usize = 1_024;
/// Columns of a source that are tried in other units, and rows of the source that are changed for it.
const COLUMNS_MAX: usize = 8;
const SCALED_MAX: usize = 60_000;

/// The kinds of fault that are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    Clock,
    Bound,
    Stale,
    Dropped,
    Twice,
    Default,
    Scale,
}

impl Fault {
    pub fn words(self) -> &'static str {
        match self {
            Fault::Clock => "a shifted clock",
            Fault::Bound => "a moved bound",
            Fault::Stale => "an older state than the one named",
            Fault::Dropped => "one event less",
            Fault::Twice => "one event counted twice",
            Fault::Default => "a default filled in",
            Fault::Scale => "another unit",
        }
    }
}

/// A row with wrong values.
pub struct Wrong {
    /// The features that are wrong.
    pub changed: Vec<usize>,
    /// What was served of every feature; None where that cannot be compared.
    pub served: Vec<Option<Column>>,
    /// The columns of the service, of one row.
    pub given: Vec<ArrayRef>,
    pub at: Micros,
    pub applied: Vec<Applied>,
}

/// What was found for each feature that has wrong values, and for all wrong rows together.
pub struct Causes {
    pub features: Vec<(usize, Cause)>,
    pub all: Cause,
    /// Something could not be looked at whole.
    pub is_cut: bool,
}

/// A way in which a row could have been answered.
#[derive(Default)]
struct Variant {
    hypothesis: usize,
    weight: f64,
    /// In place of what these inputs answer.
    parts: Vec<(usize, Part)>,
    at: Option<Micros>,
    given: Vec<(usize, ArrayRef)>,
    /// In place of an output's value, after everything else.
    output: Option<(usize, Value)>,
}

/// Tries every hypothesis on every row. `rows` are in the order in which `events` were read.
pub fn causes(service: &ServicePlan, events: &Events, rows: &[Wrong]) -> Result<Causes, AuditError> {
    let mut trial = Trial { service, events, used: Used::by(service), hypotheses: Vec::new(), known: HashMap::new() };
    let mut found: Vec<Vec<Found>> = Vec::with_capacity(rows.len());
    for (number, row) in rows.iter().enumerate() {
        let variants = trial.variants(number, row)?;
        found.push(trial.tried(number, row, variants)?);
    }
    trial.sources_in_other_units(rows, &mut found)?;
    let hypotheses = trial.hypotheses;
    let mut features: Vec<usize> = rows.iter().flat_map(|row| row.changed.iter().copied()).collect();
    features.sort_unstable();
    features.dedup();
    let causes = features.into_iter().map(|feature| {
        let of_rows = rows.iter().zip(&found).filter(|(row, _)| row.changed.contains(&feature));
        let matches: Vec<Vec<&Match>> = of_rows
            .map(|(_, found)| {
                let fits = found.iter().filter(|found| found.features.contains(&feature));
                fits.map(|found| &found.matched).collect()
            })
            .collect();
        (feature, rank(&hypotheses, &matches))
    });
    let features = causes.collect();
    // Of a row as a whole, what explains all that is wrong with it.
    let whole: Vec<Vec<&Match>> = rows
        .iter()
        .zip(&found)
        .map(|(row, found)| {
            let fits = found.iter().filter(|found| found.features.len() == row.changed.len());
            fits.map(|found| &found.matched).collect()
        })
        .collect();
    let all = rank(&hypotheses, &whole);
    Ok(Causes { features, all, is_cut: events.inputs.iter().any(|input| input.is_cut) })
}

/// By feature, where it can be compared: of each variant whether its value and its status are others than were served.
type Differences = Vec<Option<(Vec<bool>, Vec<bool>)>>;

struct Found {
    matched: Match,
    /// The wrong features that it reproduces.
    features: Vec<usize>,
}

struct Trial<'a> {
    service: &'a ServicePlan,
    events: &'a Events,
    used: Vec<Used>,
    hypotheses: Vec<Hypothesis>,
    known: HashMap<Hypothesis, usize>,
}

impl Trial<'_> {
    fn hypothesis(&mut self, fault: Fault, setting: String) -> usize {
        let hypothesis = Hypothesis { fault, setting };
        if let Some(known) = self.known.get(&hypothesis) {
            return *known;
        }
        self.hypotheses.push(hypothesis.clone());
        self.known.insert(hypothesis, self.hypotheses.len() - 1);
        self.hypotheses.len() - 1
    }

    /// How an input answers a row, with nothing changed.
    fn look<'l>(&'l self, number: usize, row: &Wrong, input: usize) -> Look<'l> {
        let (plan, events) = (&self.service.inputs[input], &self.events.inputs[input]);
        let group = self.events.groups[input][number];
        let of_group = |len: usize| (group != NO_GROUP && (group as usize) < len).then_some(group as usize);
        Look {
            view: &plan.view,
            rows: of_group(events.rows.len()).map_or(&[][..], |group| &events.rows[group]),
            windows: of_group(events.windows.len()).map_or(&[][..], |group| &events.windows[group]),
            needed: &self.used[input].features,
            rule: plan.view.source.visibility,
            applied: row.applied[input],
            at: row.at,
            bound: None,
            without: None,
            twice: None,
        }
    }

    /// Inputs that wrong features of a row are made of.
    fn inputs_of(&self, row: &Wrong) -> Vec<usize> {
        let slots =
            row.changed.iter().flat_map(|output| Needed::of(self.service, self.service.outputs[*output].slot).slots);
        let mut inputs: Vec<usize> = slots
            .filter_map(|slot| match slot {
                Slot::Feature { input, .. } | Slot::EventTime { input } => Some(input),
                Slot::At | Slot::Request(_) | Slot::Transform(_) => None,
            })
            .collect();
        inputs.sort_unstable();
        inputs.dedup();
        inputs
    }

    /// Every input that some wrong feature is made of, with each column of its source in each unit.
    fn sources_in_other_units(&mut self, rows: &[Wrong], found: &mut [Vec<Found>]) -> Result<(), AuditError> {
        let mut inputs: Vec<usize> = rows.iter().flat_map(|row| self.inputs_of(row)).collect();
        inputs.sort_unstable();
        inputs.dedup();
        let (service, all) = (self.service, self.events);
        for input in inputs {
            let (view, alias, events) = (&service.inputs[input].view, &service.inputs[input].alias, &all.inputs[input]);
            if events.is_cut || events.held() > SCALED_MAX {
                continue;
            }
            let numbers = view.value_columns().into_iter().filter_map(|name| {
                let of = view.source.column_type(&name).filter(|of| scale::has_units(of))?.clone();
                Some((name, of))
            });
            for (column, of) in numbers.take(COLUMNS_MAX) {
                let mut variants: Vec<Vec<Variant>> = rows.iter().map(|_| Vec::new()).collect();
                for scale in Scale::all() {
                    let change = |batch: &RecordBatch| in_unit(batch, &column, &of, scale);
                    let (made_rows, made_windows) = events.made(view, events.groups(), Some(&change))?;
                    let setting = format!("column `{column}` of view `{alias}` {}", scale.words());
                    let hypothesis = self.hypothesis(Fault::Scale, setting);
                    for (number, row) in rows.iter().enumerate() {
                        let group = all.groups[input][number];
                        if group == NO_GROUP || !self.inputs_of(row).contains(&input) {
                            continue;
                        }
                        let (rows, windows) = (&made_rows[group as usize][..], &made_windows[group as usize][..]);
                        let part = Look { rows, windows, ..self.look(number, row, input) }.part();
                        variants[number].push(Variant {
                            hypothesis,
                            weight: 1.0,
                            parts: vec![(input, part)],
                            ..Variant::default()
                        });
                    }
                }
                for ((number, row), variants) in rows.iter().enumerate().zip(variants) {
                    found[number].extend(self.tried(number, row, variants)?);
                }
            }
        }
        Ok(())
    }

    fn base(&self, number: usize, row: &Wrong) -> Vec<Part> {
        (0..self.service.inputs.len()).map(|input| self.look(number, row, input).part()).collect()
    }

    /// Which of the variants of a row reproduce what was served.
    fn tried(&self, number: usize, row: &Wrong, mut variants: Vec<Variant>) -> Result<Vec<Found>, AuditError> {
        let base = self.base(number, row);
        // What changes nothing explains nothing.
        variants.retain(|variant| {
            variant.at.is_some()
                || !variant.given.is_empty()
                || variant.output.is_some()
                || variant.parts.iter().any(|(input, part)| *part != base[*input])
        });
        // Where only a status is wrong, it is the status that has to be explained.
        let unchanged = self.differences(row, &base, &[Variant::default()])?;
        let mut found = Vec::new();
        for block in variants.chunks(BLOCK) {
            let differences = self.differences(row, &base, block)?;
            for (i, variant) in block.iter().enumerate() {
                let explains = |output: &&usize| {
                    let Some((values, statuses)) = &differences[**output] else { return false };
                    let Some((value_was, _)) = &unchanged[**output] else { return false };
                    !values[i] && (value_was[0] || !statuses[i])
                };
                let features: Vec<usize> = row.changed.iter().filter(explains).copied().collect();
                if features.is_empty() {
                    continue;
                }
                let whole = differences.iter().flatten().all(|(values, statuses)| !values[i] && !statuses[i]);
                let matched = Match { hypothesis: variant.hypothesis, weight: variant.weight, whole };
                found.push(Found { matched, features });
            }
        }
        Ok(found)
    }

    /// For each feature that can be compared, whether each variant gives another value or another status than was served.
    fn differences(&self, row: &Wrong, base: &[Part], variants: &[Variant]) -> Result<Differences, AuditError> {
        let service = self.service;
        let mut answers = Vec::with_capacity(base.len());
        for (input, base) in base.iter().enumerate() {
            let parts: Vec<&Part> = variants
                .iter()
                .map(|variant| variant.parts.iter().find(|(of, _)| *of == input).map_or(base, |(_, part)| part))
                .collect();
            let types = service.inputs[input].view.features();
            let values = types
                .iter()
                .enumerate()
                .map(|(feature, (_, of, _))| Value::to_array(parts.iter().map(|part| &part.values[feature]), of));
            answers.push(ViewAnswer {
                values: values.collect(),
                statuses: parts.iter().map(|part| part.status).collect(),
                event_times: parts.iter().map(|part| part.event_time).collect(),
            });
        }
        let given = service.columns.iter().enumerate().map(|(column, planned)| {
            let of = &planned.column_type;
            let usual = Value::from_array(&row.given[column], 0, of);
            let values: Vec<Value> = variants
                .iter()
                .map(|variant| match variant.given.iter().find(|(changed, _)| *changed == column) {
                    Some((_, value)) => Value::from_array(value, 0, of),
                    None => usual.clone(),
                })
                .collect();
            Value::to_array(&values, of)
        });
        let given: Vec<ArrayRef> = given.collect();
        let at: Vec<Micros> = variants.iter().map(|variant| variant.at.unwrap_or(row.at)).collect();
        let assembled = service.assemble(&answers, &given, &at)?;
        let all_rows = UInt32Array::from(vec![0; variants.len()]);
        let mut differences = Vec::with_capacity(service.outputs.len());
        for (output, planned) in service.outputs.iter().enumerate() {
            let Some(served) = &row.served[output] else {
                differences.push(None);
                continue;
            };
            let mut values = assembled.columns[output].clone();
            if variants.iter().any(|variant| variant.output.as_ref().is_some_and(|(of, _)| *of == output)) {
                let changed = (0..variants.len()).map(|i| match &variants[i].output {
                    Some((of, value)) if *of == output => value.clone(),
                    _ => Value::from_array(&values, i, &planned.feature_type),
                });
                values = Value::to_array(&changed.collect::<Vec<Value>>(), &planned.feature_type);
            }
            let other_values = different(&values, &take(&served.values, &all_rows, None)?);
            let statuses = &assembled.statuses[output];
            let other_statuses = statuses.iter().map(|status| *status as u8 != served.statuses[0]).collect();
            differences.push(Some((other_values, other_statuses)));
        }
        Ok(differences)
    }
}

fn in_unit(batch: &RecordBatch, column: &str, of: &Type, scale: Scale) -> Option<RecordBatch> {
    let (index, _) = batch.schema().column_with_name(column).map(|(index, field)| (index, field.clone()))?;
    let mut columns = batch.columns().to_vec();
    columns[index] = scale.column(&columns[index], of)?;
    RecordBatch::try_new(batch.schema(), columns).ok()
}
