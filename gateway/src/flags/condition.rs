//! Conditions of flags: expressions of the definitions' own language, over attributes that nobody has declared.
//!
//! Whoever asks about a flag sends JSON, and JSON has no schema. So a condition's attributes get their types from the
//! condition: it is compiled with each attribute as each type that a value may have, and what fits stays. `country = 'DE'` makes
//! `country` a string, `age >= 18` makes `age` a number. Where more than one type fits, as in `plan IS NOT NULL`, there
//! are several *readings*, and the values decide between them. All of it is settled when the flag is set; evaluating compiles
//! nothing.
//!
//! A value that is not of the attribute's type is null, as is one that is missing; a condition that is null does not hold.
//! So nothing that a caller sends makes an evaluation fail.

use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use chrono::DateTime;
use feature_defs::expression::{ColumnRef, Environment, Expression, ExpressionError};
use feature_defs::value::Type;
use serde_json::Value as Json;

use super::context::Context;

/// Of one condition: what a person can read.
pub const ATTRIBUTES_MAX: usize = 32;
/// Of types of the attributes of one condition. Each is compiled when the flag is set.
const CHOICES_MAX: usize = 16;

/// From here on a float64 does not tell neighbouring integers apart.
const EXACT_END: u64 = 1 << 53;

/// What the values of an attribute may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    String,
    /// JSON's: a float64, or an int64 where only that fits.
    Number,
    Bool,
    /// RFC 3339, as a string.
    Timestamp,
}

/// Strings first: what may be a string or a time is compared as it was written.
const CLASSES: [Class; 4] = [Class::String, Class::Number, Class::Bool, Class::Timestamp];

/// An attribute that a condition reads.
#[derive(Debug, Clone)]
struct Attribute {
    column: ColumnRef,
    classes: Vec<Class>,
    /// Of numbers.
    as_float: bool,
    as_integer: bool,
}

/// A condition, ready to be asked.
#[derive(Debug)]
pub struct Condition {
    attributes: Vec<Attribute>,
    /// The first one is right where no value says otherwise.
    readings: Vec<Reading>,
}

#[derive(Debug)]
struct Reading {
    expression: Expression,
    /// By column of the expression: which attribute it is, and of which type.
    columns: Vec<(usize, Type)>,
}

/// Why a text is no condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConditionError {
    pub text: String,
    pub message: String,
    /// The bytes of the text that it is about.
    pub offset: Option<(usize, usize)>,
    pub help: Option<String>,
}

impl fmt::Display for ConditionError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "condition `{}`: {}", feature_defs::diagnose::shown(&self.text), self.message)?;
        if let Some((from, to)) = self.offset
            && let Some(place) = self.text.get(from..to).filter(|place| !place.is_empty() && *place != self.text)
        {
            write!(formatter, ", at `{}`", feature_defs::diagnose::shown(place))?;
        }
        self.help.iter().try_for_each(|help| write!(formatter, "; {help}"))
    }
}

impl Class {
    fn name(self, attribute: &Attribute) -> &'static str {
        match self {
            Class::String => "string",
            Class::Number if attribute.as_float => "number",
            Class::Number => "integer",
            Class::Bool => "bool",
            Class::Timestamp => "timestamp",
        }
    }
}

impl Condition {
    pub fn compile(text: &str) -> Result<Condition, ConditionError> {
        let failed = |error: ExpressionError| ConditionError {
            text: text.to_owned(),
            message: error.message,
            offset: error.offset,
            // Advice for definitions: here nothing is declared.
            help: error.help.filter(|help| !help.contains("declare")),
        };
        let mut open = Environment::new();
        open.undeclared_is_null();
        // What is wrong whatever the attributes are.
        let names = Expression::compile(text, &open, Some(&Type::Bool)).map_err(failed)?.undeclared().to_vec();
        if names.len() > ATTRIBUTES_MAX {
            let message = format!("it reads {} attributes, more than {ATTRIBUTES_MAX}", names.len());
            return Err(ConditionError { text: text.to_owned(), message, offset: None, help: None });
        }
        // Each attribute alone, with the others null, which fit everywhere.
        let mut attributes = Vec::with_capacity(names.len());
        for column in names {
            let compiled = |value_type: Type| {
                let mut environment = open.clone();
                environment.column(column.relation.as_deref(), &column.name, value_type);
                Expression::compile(text, &environment, Some(&Type::Bool))
            };
            let as_string = compiled(Type::String);
            let (as_float, as_integer) = (compiled(Type::Float64).is_ok(), compiled(Type::Int64).is_ok());
            let fits = |class: &Class| match class {
                Class::String => as_string.is_ok(),
                Class::Number => as_float || as_integer,
                Class::Bool => compiled(Type::Bool).is_ok(),
                Class::Timestamp => compiled(Type::Timestamp).is_ok(),
            };
            let classes: Vec<Class> = CLASSES.into_iter().filter(fits).collect();
            match as_string {
                Err(error) if classes.is_empty() => return Err(failed(error)),
                _ => attributes.push(Attribute { column, classes, as_float, as_integer }),
            }
        }
        let (readings, first_error) = readings(text, &attributes);
        match first_error {
            Some(error) if readings.is_empty() => Err(failed(error)),
            _ => Ok(Condition { attributes, readings }),
        }
    }

    /// What it reads, and which types of values it can do something with.
    pub fn attributes(&self) -> impl Iterator<Item = (String, Vec<&'static str>)> {
        self.attributes.iter().map(|attribute| {
            let types = attribute.classes.iter().map(|class| class.name(attribute));
            (attribute.column.to_string(), types.collect())
        })
    }

    /// Whether it holds.
    pub fn holds(&self, context: &Context<'_>) -> Result<bool, String> {
        let values: Vec<Option<&Json>> =
            self.attributes.iter().map(|attribute| context.attribute(&attribute.column)).collect();
        let fits = |reading: &&Reading| {
            reading.columns.iter().all(|(attribute, value_type)| match values[*attribute] {
                None => true,
                Some(value) => fits(value, value_type),
            })
        };
        let Some(reading) = self.readings.iter().find(fits).or(self.readings.first()) else { return Ok(false) };
        let columns = reading.columns.iter().map(|(attribute, value_type)| array(values[*attribute], value_type));
        let columns: Vec<ArrayRef> = columns.collect();
        let answer = reading.expression.evaluate_columns(columns.into_iter(), 1).map_err(|error| error.to_string())?;
        let answer = answer.as_any().downcast_ref::<BooleanArray>().ok_or("it is no condition")?;
        Ok(!answer.is_null(0) && answer.value(0))
    }
}

/// The ways of reading a text that compile: types of attributes that go together. Then what was wrong with the first that
/// does not.
fn readings(text: &str, attributes: &[Attribute]) -> (Vec<Reading>, Option<ExpressionError>) {
    let (mut readings, mut first_error) = (Vec::new(), None);
    for classes in choices(attributes) {
        let has_choice = |(attribute, class): (&Attribute, &Class)| {
            *class == Class::Number && attribute.as_float && attribute.as_integer
        };
        // Integers beyond 2^53 are told apart by a reading of their own.
        let both = attributes.iter().zip(&classes).any(has_choice);
        for prefers_float in [true, false].into_iter().take(if both { 2 } else { 1 }) {
            let types = attributes.iter().zip(&classes).map(|(attribute, class)| match class {
                Class::String => Type::String,
                Class::Bool => Type::Bool,
                Class::Timestamp => Type::Timestamp,
                Class::Number if attribute.as_float && (prefers_float || !attribute.as_integer) => Type::Float64,
                Class::Number => Type::Int64,
            });
            match reading(text, attributes, types.collect()) {
                Ok(reading) => readings.push(reading),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
    }
    (readings, first_error)
}

/// What attributes may be together, at most [`CHOICES_MAX`]: first all alike as far as they can be, then each for itself with
/// the last one changing first.
fn choices(attributes: &[Attribute]) -> Vec<Vec<Class>> {
    let alike = |class: Class| {
        let choose = |attribute: &Attribute| match attribute.classes.contains(&class) {
            true => class,
            false => attribute.classes[0],
        };
        attributes.iter().map(choose).collect::<Vec<Class>>()
    };
    let mut found: Vec<Vec<Class>> = Vec::new();
    for classes in CLASSES.map(alike) {
        if !found.contains(&classes) {
            found.push(classes);
        }
    }
    let mut chosen = vec![0; attributes.len()];
    while found.len() < CHOICES_MAX {
        let classes: Vec<Class> =
            attributes.iter().zip(&chosen).map(|(attribute, class)| attribute.classes[*class]).collect();
        if !found.contains(&classes) {
            found.push(classes);
        }
        let next = (0..attributes.len()).rev().find(|at| chosen[*at] + 1 < attributes[*at].classes.len());
        let Some(at) = next else { break };
        chosen[at] += 1;
        chosen[at + 1..].fill(0);
    }
    found
}

fn reading(text: &str, attributes: &[Attribute], types: Vec<Type>) -> Result<Reading, ExpressionError> {
    let mut environment = Environment::new();
    for (attribute, value_type) in attributes.iter().zip(&types) {
        environment.column(attribute.column.relation.as_deref(), &attribute.column.name, value_type.clone());
    }
    let expression = Expression::compile(text, &environment, Some(&Type::Bool))?;
    let place = |column: &ColumnRef| attributes.iter().position(|attribute| attribute.column == *column);
    let columns =
        expression.columns().iter().filter_map(|column| Some((place(column)?, types[place(column)?].clone())));
    Ok(Reading { columns: columns.collect(), expression })
}

fn fits(value: &Json, value_type: &Type) -> bool {
    match value_type {
        Type::String => value.is_string(),
        Type::Bool => value.is_boolean(),
        Type::Float64 => float(value).is_some(),
        Type::Int64 => integer(value).is_some(),
        _ => timestamp(value).is_some(),
    }
}

/// A column of one row.
fn array(value: Option<&Json>, value_type: &Type) -> ArrayRef {
    match value_type {
        Type::String => Arc::new(StringArray::from_iter([value.and_then(Json::as_str)])),
        Type::Bool => Arc::new(BooleanArray::from_iter([value.and_then(Json::as_bool)])),
        Type::Float64 => Arc::new(Float64Array::from_iter([value.and_then(float)])),
        Type::Int64 => Arc::new(Int64Array::from_iter([value.and_then(integer)])),
        _ => Arc::new(TimestampMicrosecondArray::from_iter([value.and_then(timestamp)]).with_timezone("UTC")),
    }
}

/// A number that a float64 holds exactly, as far as JSON's text does.
fn float(value: &Json) -> Option<f64> {
    match (value.as_i64(), value.as_u64()) {
        (Some(x), _) if x.unsigned_abs() >= EXACT_END => None,
        (None, Some(_)) => None,
        _ => value.as_f64(),
    }
}

fn integer(value: &Json) -> Option<i64> {
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() < EXACT_END as f64).then_some(x as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole))
}

fn timestamp(value: &Json) -> Option<i64> {
    DateTime::parse_from_rfc3339(value.as_str()?).ok().map(|time| time.timestamp_micros())
}
