//! What is tried: each hypothesis as the answers that it would have made of a row.

use std::sync::Arc;

use arrow::array::ArrayRef;
use feature_defs::plan::{Slot, ViewAnswer};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{HOUR, MINUTE};

use super::{EVENTS_MAX, Fault, OLDER_MAX, Trial, Variant, Wrong};
use crate::audit::AuditError;
use crate::audit::scale::{self, Scale};
use crate::audit::variant::{BOUNDS, Bound, Look, Part};
use crate::point_in_time::by_row::Applied;

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

impl Trial<'_> {
    /// Everything that is tried on one row, but for sources in other units.
    pub(super) fn variants(&mut self, number: usize, row: &Wrong) -> Result<Vec<Variant>, AuditError> {
        let base = self.base(number, row);
        let mut variants = Vec::new();
        let inputs = self.inputs_of(row);
        self.clocks(number, row, &inputs, &mut variants);
        self.bounds(number, row, &inputs, &mut variants);
        self.stale(number, row, &inputs, &mut variants);
        self.one_event(number, row, &inputs, &mut variants);
        self.defaults(number, row, &inputs, &base, &mut variants);
        self.units(row, &inputs, &base, &mut variants)?;
        Ok(variants)
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
