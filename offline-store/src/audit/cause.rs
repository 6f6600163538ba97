//! Why wrong values are what they are: fixed hypotheses are replayed over the events of a sample of wrong rows, and those
//! that give the bits that were served are named.
//!
//! Each hypothesis changes one thing of how a row is answered, in the views that the wrong features are made of, and lets
//! the service's own plan compute everything that depends on it. So a fault in one place has to explain all that it did to
//! a row, and is worth more if it also leaves the rest of the row as it was served.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, UInt32Array};
use arrow::compute::take;
use feature_defs::plan::{ServicePlan, Slot, ViewAnswer};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{HOUR, MINUTE};
use serde::{Deserialize, Serialize};

use super::AuditError;
use super::compare::{Column, different};
use super::events::Events;
use super::rank::{Cause, Hypothesis, Match, rank};
use super::scale::{self, Scale};
use super::variant::{BOUNDS, Bound, Look, Part};
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

/// Whole hours that a clock may be off by, and what zones add to them.
fn shifts() -> impl Iterator<Item = Micros> {
    let hours = (-14..=14).filter(|hour| *hour != 0).map(|hour| hour * HOUR);
    let odd = [210, 270, 330, 345, 390, 525, 570, 630, 765];
    hours.chain(odd.into_iter().flat_map(|minutes| [minutes * MINUTE, -minutes * MINUTE]))
}

fn shift_words(shift: Micros) -> String {
    let minutes = shift / MINUTE;
    let sign = if minutes < 0 { '-' } else { '+' };
    match (minutes.abs() / 60, minutes.abs() % 60) {
        (hours, 0) => format!("{sign}{hours} h"),
        (hours, minutes) => format!("{sign}{hours} h {minutes} min"),
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
        found.push(trial.row(number, row)?);
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

    fn row(&mut self, number: usize, row: &Wrong) -> Result<Vec<Found>, AuditError> {
        let base = self.base(number, row);
        let mut variants = Vec::new();
        let inputs = self.inputs_of(row);
        self.clocks(number, row, &inputs, &mut variants);
        self.bounds(number, row, &inputs, &mut variants);
        self.stale(number, row, &inputs, &mut variants);
        self.one_event(number, row, &inputs, &mut variants);
        self.defaults(number, row, &inputs, &base, &mut variants);
        self.units(row, &inputs, &base, &mut variants)?;
        self.tried(number, row, variants)
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
    #[expect(clippy::type_complexity, reason = "it is taken apart where it is made")]
    fn differences(
        &self,
        row: &Wrong,
        base: &[Part],
        variants: &[Variant],
    ) -> Result<Vec<Option<(Vec<bool>, Vec<bool>)>>, AuditError> {
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

    fn clocks(&mut self, number: usize, row: &Wrong, inputs: &[usize], variants: &mut Vec<Variant>) {
        let stamps: Vec<(usize, String)> = self
            .service
            .columns
            .iter()
            .enumerate()
            .filter(|(_, column)| column.column_type == Type::Timestamp && !column.is_key)
            .map(|(i, column)| (i, column.name.clone()))
            .collect();
        let moved = |column: usize, shift: Micros| match Value::from_array(&row.given[column], 0, &Type::Timestamp) {
            Value::Timestamp(time) => {
                Some((column, Value::to_array([&Value::Timestamp(time.saturating_add(shift))], &Type::Timestamp)))
            }
            _ => None,
        };
        for shift in shifts() {
            let words = shift_words(shift);
            let shifted = |trial: &Self, input: usize| {
                let part = Look { at: row.at.saturating_add(shift), ..trial.look(number, row, input) }.part();
                (input, part)
            };
            let parts: Vec<(usize, Part)> = (0..self.service.inputs.len()).map(|input| shifted(self, input)).collect();
            let at = Some(row.at.saturating_add(shift));
            let given: Vec<(usize, ArrayRef)> = stamps.iter().filter_map(|(column, _)| moved(*column, shift)).collect();
            let hypothesis = self.hypothesis(Fault::Clock, format!("the time of the request {words}"));
            variants.push(Variant { hypothesis, weight: 1.0, parts: parts.clone(), at, ..Variant::default() });
            if !given.is_empty() {
                let hypothesis = self.hypothesis(Fault::Clock, format!("all times of the request {words}"));
                let given = given.clone();
                variants.push(Variant {
                    hypothesis,
                    weight: 1.0,
                    parts: parts.clone(),
                    at,
                    given,
                    ..Variant::default()
                });
            }
            let hypothesis = self.hypothesis(Fault::Clock, format!("the times that transforms read {words}"));
            variants.push(Variant { hypothesis, weight: 1.0, at, given, ..Variant::default() });
            for (column, name) in &stamps {
                let hypothesis = self.hypothesis(Fault::Clock, format!("request field `{name}` {words}"));
                let given: Vec<(usize, ArrayRef)> = moved(*column, shift).into_iter().collect();
                variants.push(Variant { hypothesis, weight: 1.0, given, ..Variant::default() });
            }
            for input in inputs {
                let alias = self.service.inputs[*input].alias.clone();
                let (_, part) = parts[*input].clone();
                let hypothesis = self.hypothesis(Fault::Clock, format!("view `{alias}` asked at {words}"));
                variants.push(Variant {
                    hypothesis,
                    weight: 1.0,
                    parts: vec![(*input, part.clone())],
                    ..Variant::default()
                });
                if self.used[*input].event_time {
                    let event_time = part.event_time.map(|time| time.saturating_sub(shift));
                    let part = Part { event_time, ..part };
                    let words = shift_words(-shift);
                    let hypothesis = self.hypothesis(Fault::Clock, format!("event times of view `{alias}` {words}"));
                    variants.push(Variant {
                        hypothesis,
                        weight: 1.0,
                        parts: vec![(*input, part)],
                        ..Variant::default()
                    });
                }
            }
        }
    }

    fn bounds(&mut self, number: usize, row: &Wrong, inputs: &[usize], variants: &mut Vec<Variant>) {
        let moved = |trial: &Self, input: usize, bound: Bound| {
            (input, Look { bound: Some(bound), ..trial.look(number, row, input) }.part())
        };
        for bound in BOUNDS {
            for input in inputs {
                let alias = &self.service.inputs[*input].alias;
                let setting = format!("{} in view `{alias}`", bound.words());
                let hypothesis = self.hypothesis(Fault::Bound, setting);
                let parts = vec![moved(self, *input, bound)];
                variants.push(Variant { hypothesis, weight: 1.0, parts, ..Variant::default() });
            }
            if self.service.inputs.len() > 1 {
                let hypothesis = self.hypothesis(Fault::Bound, format!("{} in all views", bound.words()));
                let parts = (0..self.service.inputs.len()).map(|input| moved(self, input, bound)).collect();
                variants.push(Variant { hypothesis, weight: 1.0, parts, ..Variant::default() });
            }
        }
    }

    /// Inputs over the same source that were asked about the same entity.
    fn siblings(&self, input: usize) -> Vec<usize> {
        let inputs = &self.service.inputs;
        let same = |other: &usize| {
            Arc::ptr_eq(&inputs[*other].view.source, &inputs[input].view.source)
                && inputs[*other].keys == inputs[input].keys
        };
        (0..inputs.len()).filter(same).collect()
    }

    fn stale(&mut self, number: usize, row: &Wrong, inputs: &[usize], variants: &mut Vec<Variant>) {
        for input in inputs {
            let alias = self.service.inputs[*input].alias.clone();
            let alone = self.hypothesis(Fault::Stale, format!("view `{alias}`"));
            let siblings = self.siblings(*input);
            let source = self.service.inputs[*input].view.source.name.clone();
            let together = self.hypothesis(Fault::Stale, format!("all views of source `{source}`"));
            let earlier = self.look(number, row, *input).earlier(OLDER_MAX);
            for (j, applied) in earlier.into_iter().enumerate() {
                // One event behind is likelier than two.
                let weight = 1.0 / ((j + 1) * (j + 2)) as f64;
                let part = |trial: &Self, of: usize| {
                    let look = trial.look(number, row, of);
                    let applied = earliest(look.applied, applied);
                    (of, Look { applied, ..look }.part())
                };
                let parts = vec![part(self, *input)];
                variants.push(Variant { hypothesis: alone, weight, parts, ..Variant::default() });
                if siblings.len() > 1 && siblings[0] == *input {
                    let parts = siblings.iter().map(|of| part(self, *of)).collect();
                    variants.push(Variant { hypothesis: together, weight, parts, ..Variant::default() });
                }
            }
        }
    }

    fn one_event(&mut self, number: usize, row: &Wrong, inputs: &[usize], variants: &mut Vec<Variant>) {
        for input in inputs {
            let alias = self.service.inputs[*input].alias.clone();
            let source = self.service.inputs[*input].view.source.name.clone();
            let siblings = self.siblings(*input);
            let places = self.look(number, row, *input).made_of(EVENTS_MAX);
            let weight = 1.0 / places.len().max(1) as f64;
            for fault in [Fault::Dropped, Fault::Twice] {
                let alone = self.hypothesis(fault, format!("in view `{alias}`"));
                let together = self.hypothesis(fault, format!("in all views of source `{source}`"));
                for place in &places {
                    let with = |trial: &Self, of: usize, place: usize| {
                        let look = trial.look(number, row, of);
                        let look = match fault {
                            Fault::Dropped => Look { without: Some(place), ..look },
                            _ => Look { twice: Some(place), ..look },
                        };
                        (of, look.part())
                    };
                    let parts = vec![with(self, *input, *place)];
                    variants.push(Variant { hypothesis: alone, weight, parts: parts.clone(), ..Variant::default() });
                    if siblings.len() < 2 {
                        continue;
                    }
                    let event = identity(&self.look(number, row, *input), *place);
                    let mut all = parts;
                    for of in siblings.iter().filter(|of| *of != input) {
                        if let Some(place) = find(&self.look(number, row, *of), event) {
                            all.push(with(self, *of, place));
                        }
                    }
                    variants.push(Variant { hypothesis: together, weight, parts: all, ..Variant::default() });
                }
            }
        }
    }

    fn defaults(&mut self, number: usize, row: &Wrong, inputs: &[usize], base: &[Part], variants: &mut Vec<Variant>) {
        for input in inputs {
            let alias = self.service.inputs[*input].alias.clone();
            let view = self.service.inputs[*input].view.clone();
            let hypothesis = self.hypothesis(Fault::Default, format!("view `{alias}` answered as if it had nothing"));
            let nothing = Look { applied: Applied::Nothing, ..self.look(number, row, *input) }.part();
            variants.push(Variant { hypothesis, weight: 1.0, parts: vec![(*input, nothing)], ..Variant::default() });
            let unavailable = Look { applied: Applied::NotAnswered, ..self.look(number, row, *input) }.part();
            variants.push(Variant {
                hypothesis,
                weight: 1.0,
                parts: vec![(*input, unavailable)],
                ..Variant::default()
            });
            for feature in self.used[*input].features.clone() {
                let (of, default) = view.feature(feature);
                let name = view.features()[feature].0.to_owned();
                let filled = [("its default", default.cloned()), ("null", Some(Value::Null)), ("zero", zero(of))];
                for (words, value) in filled {
                    let Some(value) = value else { continue };
                    let mut part = base[*input].clone();
                    if part.status == Status::Unavailable {
                        continue;
                    }
                    part.values[feature] = value;
                    let hypothesis = self.hypothesis(Fault::Default, format!("{words} for `{alias}:{name}`"));
                    variants.push(Variant {
                        hypothesis,
                        weight: 1.0,
                        parts: vec![(*input, part)],
                        ..Variant::default()
                    });
                }
            }
        }
        for output in &row.changed {
            let planned = &self.service.outputs[*output];
            let Slot::Transform(transform) = planned.slot else { continue };
            let default = self.service.transforms[transform].default.clone();
            let (of, name) = (planned.feature_type.clone(), planned.name.clone());
            let filled = [("its default", default), ("null", Some(Value::Null)), ("zero", zero(&of))];
            for (words, value) in filled {
                let Some(value) = value else { continue };
                let hypothesis = self.hypothesis(Fault::Default, format!("{words} for `{name}`"));
                let output = Some((*output, value));
                variants.push(Variant { hypothesis, weight: 1.0, output, ..Variant::default() });
            }
        }
    }

    fn units(
        &mut self,
        row: &Wrong,
        inputs: &[usize],
        base: &[Part],
        variants: &mut Vec<Variant>,
    ) -> Result<(), AuditError> {
        let service = self.service;
        let answers = self.plain(row, base)?;
        for scale in Scale::all() {
            for input in inputs {
                let (alias, view) = (&service.inputs[*input].alias, &service.inputs[*input].view);
                for feature in self.used[*input].features.clone() {
                    let Some(value) = scale.value(&base[*input].values[feature]) else { continue };
                    let mut part = base[*input].clone();
                    part.values[feature] = value;
                    let name = view.features()[feature].0;
                    let hypothesis = self.hypothesis(Fault::Scale, format!("`{alias}:{name}` {}", scale.words()));
                    let parts = vec![(*input, part)];
                    variants.push(Variant { hypothesis, weight: 1.0, parts, ..Variant::default() });
                }
            }
            for (column, planned) in service.columns.iter().enumerate().filter(|(_, column)| !column.is_key) {
                let Some(given) = scale::one(&row.given[column], &planned.column_type, scale) else { continue };
                let setting = format!("request field `{}` {}", planned.name, scale.words());
                let hypothesis = self.hypothesis(Fault::Scale, setting);
                variants.push(Variant { hypothesis, weight: 1.0, given: vec![(column, given)], ..Variant::default() });
            }
            for output in &row.changed {
                let planned = &service.outputs[*output];
                if !matches!(planned.slot, Slot::Transform(_)) {
                    continue;
                }
                let Some(value) = scale.value(&answers[*output]) else { continue };
                let hypothesis = self.hypothesis(Fault::Scale, format!("`{}` {}", planned.name, scale.words()));
                let output = Some((*output, value));
                variants.push(Variant { hypothesis, weight: 1.0, output, ..Variant::default() });
            }
        }
        Ok(())
    }

    /// The values of all features with nothing changed.
    fn plain(&self, row: &Wrong, base: &[Part]) -> Result<Vec<Value>, AuditError> {
        let answers: Vec<ViewAnswer> = base
            .iter()
            .zip(&self.service.inputs)
            .map(|(part, input)| {
                let types = input.view.features();
                let values = part.values.iter().zip(&types).map(|(value, (_, of, _))| Value::to_array([value], of));
                ViewAnswer { values: values.collect(), statuses: vec![part.status], event_times: vec![part.event_time] }
            })
            .collect();
        let assembled = self.service.assemble(&answers, &row.given, &[row.at])?;
        let outputs = assembled.columns.iter().zip(&self.service.outputs);
        Ok(outputs.map(|(column, output)| Value::from_array(column, 0, &output.feature_type)).collect())
    }
}

fn zero(of: &Type) -> Option<Value> {
    Some(match of {
        Type::Float64 => Value::Float64(0.0),
        Type::Float32 => Value::Float32(0.0),
        Type::Int64 => Value::Int64(0),
        Type::Int32 => Value::Int32(0),
        Type::Bool => Value::Bool(false),
        _ => return None,
    })
}

fn earliest(one: Applied, other: Applied) -> Applied {
    match (one, other) {
        (Applied::UpTo(one), Applied::UpTo(other)) => Applied::UpTo(one.min(other)),
        (Applied::NotAnswered, _) => Applied::NotAnswered,
        _ => Applied::Nothing,
    }
}

/// What tells an event of a source from the others, whatever view looks at it.
fn identity(look: &Look<'_>, place: usize) -> (Position, Micros) {
    let times = match look.rows.get(place) {
        Some(row) => row.times,
        None => look.windows[place].times,
    };
    (times.position, times.event_time)
}

fn find(look: &Look<'_>, event: (Position, Micros)) -> Option<usize> {
    let row = look.rows.iter().position(|row| (row.times.position, row.times.event_time) == event);
    row.or_else(|| look.windows.iter().position(|other| (other.times.position, other.times.event_time) == event))
}

fn in_unit(batch: &RecordBatch, column: &str, of: &Type, scale: Scale) -> Option<RecordBatch> {
    let (index, _) = batch.schema().column_with_name(column).map(|(index, field)| (index, field.clone()))?;
    let mut columns = batch.columns().to_vec();
    columns[index] = scale.column(&columns[index], of)?;
    RecordBatch::try_new(batch.schema(), columns).ok()
}
