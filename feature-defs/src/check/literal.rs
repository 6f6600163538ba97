//! A constant written in YAML as a value of a declared type.

use chrono::{DateTime, NaiveDate};

use crate::catalog::Literal;
use crate::value::{Type, Value, canonical_f32, canonical_f64};

/// Why a constant is not a value of a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{literal} is not a `{wanted}`{hint}")]
pub struct LiteralError {
    pub literal: String,
    pub wanted: String,
    /// Empty, or how to write it.
    pub hint: &'static str,
}

impl Literal {
    /// The constant as a value of `wanted`. Nothing is rounded, except decimal text to the nearest float.
    pub fn to_value(&self, wanted: &Type) -> Result<Value, LiteralError> {
        let fail = |hint| Err(LiteralError { literal: self.describe(), wanted: wanted.to_string(), hint });
        Ok(match (self, wanted) {
            (Literal::Null, _) => Value::Null,
            (Literal::Bool(x), Type::Bool) => Value::Bool(*x),
            (Literal::Int(x), Type::Int32) => match i32::try_from(*x) {
                Ok(x) => Value::Int32(x),
                Err(_) => return fail(", it does not fit into 32 bits"),
            },
            (Literal::Int(x), Type::Int64) => Value::Int64(*x),
            // Beyond 2^53 a float would be another number than the one written.
            (Literal::Int(x), Type::Float64) if (*x as f64) as i128 == i128::from(*x) => Value::Float64(*x as f64),
            (Literal::Int(x), Type::Float32) if (*x as f32) as i128 == i128::from(*x) => Value::Float32(*x as f32),
            (Literal::Float(x), Type::Float64) => Value::Float64(canonical_f64(*x)),
            (Literal::Float(x), Type::Float32) => {
                let rounded = *x as f32;
                if rounded.is_infinite() && x.is_finite() {
                    return fail(", it is too large");
                }
                Value::Float32(canonical_f32(rounded))
            }
            (Literal::String(x), Type::String) => Value::String(x.as_str().into()),
            (Literal::String(x), Type::Binary) => Value::Binary(x.as_bytes().into()),
            (Literal::String(x), Type::Timestamp) => match DateTime::parse_from_rfc3339(x) {
                Ok(time) => Value::Timestamp(time.timestamp_micros()),
                Err(_) => return fail(", write it like \"2013-07-01T12:00:00Z\""),
            },
            (Literal::String(x), Type::Date) => match NaiveDate::parse_from_str(x, "%Y-%m-%d") {
                Ok(date) => {
                    let days = date.signed_duration_since(NaiveDate::default()).num_days();
                    Value::Date(i32::try_from(days).or_else(|_| fail("").map(|_: Value| 0))?)
                }
                Err(_) => return fail(", write it like \"2013-07-01\""),
            },
            (_, Type::Decimal { precision, scale }) => {
                let text = match self {
                    Literal::Int(x) => x.to_string(),
                    // The shortest text that reads back as the same float: what was written, in practice.
                    Literal::Float(x) if x.is_finite() => format!("{x}"),
                    Literal::String(x) => x.clone(),
                    _ => return fail(""),
                };
                match decimal(&text, *precision, *scale) {
                    Some(unscaled) => Value::Decimal(unscaled),
                    None => return fail(""),
                }
            }
            (Literal::List(items), Type::List(item)) => {
                Value::List(items.iter().map(|literal| literal.to_value(item)).collect::<Result<_, _>>()?)
            }
            (Literal::List(items), Type::Vector(n)) => {
                if items.len() != *n as usize {
                    return fail(", it has another length");
                }
                let mut elements = Vec::with_capacity(items.len());
                for item in items {
                    match item.to_value(&Type::Float32)? {
                        Value::Float32(x) => elements.push(x),
                        _ => return fail(", no element of a vector is null"),
                    }
                }
                Value::Vector(elements.into())
            }
            (Literal::Map(pairs), Type::Map(value)) => {
                let mut pairs: Vec<(Box<str>, Value)> = pairs
                    .iter()
                    .map(|(key, literal)| Ok((key.as_str().into(), literal.to_value(value)?)))
                    .collect::<Result<_, LiteralError>>()?;
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                Value::Map(pairs)
            }
            (Literal::Map(pairs), Type::Struct(fields)) => {
                if pairs.iter().any(|(key, _)| !fields.iter().any(|(name, _)| name == key)) {
                    return fail(", it has a field that the type does not have");
                }
                let field = |(name, field_type): &(String, Type)| match pairs.iter().find(|(key, _)| key == name) {
                    Some((_, literal)) => literal.to_value(field_type),
                    None => Ok(Value::Null),
                };
                Value::Struct(fields.iter().map(field).collect::<Result<_, _>>()?)
            }
            _ => return fail(""),
        })
    }

    fn describe(&self) -> String {
        match self {
            Literal::Null => "null".to_string(),
            Literal::Bool(x) => format!("the boolean {x}"),
            Literal::Int(x) => format!("the integer {x}"),
            Literal::Float(x) => format!("the number {x}"),
            Literal::String(x) => format!("the string `{}`", crate::diagnose::shown(x)),
            Literal::List(items) => format!("a list of {}", items.len()),
            Literal::Map(_) => "a mapping".to_string(),
        }
    }
}

/// `-12.50` as an unscaled integer. None when it has more digits than the type holds, before or after the point.
fn decimal(text: &str, precision: u8, scale: i8) -> Option<i128> {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let fraction = fraction.trim_end_matches('0');
    let scale = usize::try_from(scale).ok()?;
    if !digits(whole) || !digits(fraction) || (whole.is_empty() && fraction.is_empty()) || fraction.len() > scale {
        return None;
    }
    let all = format!("{whole}{fraction:0<scale$}");
    let significant = all.trim_start_matches('0');
    if significant.len() > usize::from(precision) {
        return None;
    }
    let unscaled: i128 = if significant.is_empty() { 0 } else { significant.parse().ok()? };
    Some(if negative { -unscaled } else { unscaled })
}
