//! Rows on the command line: `--row origin=JFK,distance=2475,carrier="B6"`.
//!
//! The types are those that the server names for the columns. An unquoted `null` is null; quotes keep commas and that
//! word; lists, maps, structs and vectors are written as JSON.

use feature_defs::time::Micros;
use feature_defs::value::{Type, Value};
use proto::v1::{Column, NamedType, ServiceInfo};
use thiserror::Error;

use crate::columns;
use crate::error::CliError;
use crate::server::Server;
use crate::times;

#[derive(Debug, PartialEq, Eq, Error)]
pub enum RowError {
    #[error("`{part}` in `--row {row}` is no `column=value`")]
    NoValue { row: String, part: String },
    #[error("the quotes in `--row {row}` are not closed")]
    Quotes { row: String },
    #[error("`--row {row}` says `{column}` twice")]
    Twice { row: String, column: String },
    #[error("`{text}` is not a {wanted}, which column `{column}` is{hint}")]
    Type { column: String, text: String, wanted: String, hint: &'static str },
    #[error("`{column}` is not a column that {of} takes; {known}")]
    Unknown { column: String, of: String, known: String },
    #[error("`--row {row}` lacks `{column}`, which {of} takes; write `{column}=...`")]
    Missing { row: String, column: String, of: String },
}

/// A value as written, and whether it was quoted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Written {
    text: String,
    quoted: bool,
}

impl Written {
    fn parse(text: &str) -> Written {
        match text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            Some(inside) => Written { text: inside.replace("\"\"", "\""), quoted: true },
            None => Written { text: text.to_owned(), quoted: false },
        }
    }
}

/// One value as it is written for a column.
pub fn value(column: &str, text: &str, wanted: &Type) -> Result<Value, RowError> {
    parse_value(column, &Written::parse(text.trim()), wanted)
}

/// The rows as the columns of a request to `service`.
pub fn to_columns(server: &Server, service: &ServiceInfo, rows: &[String]) -> Result<Vec<Column>, CliError> {
    let types = server.types(&service.inputs)?;
    let values = parse_rows(&format!("service `{}`", service.name), &service.inputs, &types, rows)?;
    let columns =
        types.iter().zip(values).map(|((name, column_type), values)| columns::encode(name, &values, column_type));
    Ok(columns.collect())
}

/// One list of values per column.
fn parse_rows(
    of: &str,
    inputs: &[NamedType],
    types: &[(String, Type)],
    rows: &[String],
) -> Result<Vec<Vec<Value>>, RowError> {
    let mut out: Vec<Vec<Value>> = types.iter().map(|_| Vec::with_capacity(rows.len())).collect();
    for row in rows {
        let pairs = split(row)?;
        if let Some((column, _)) = pairs.iter().find(|(column, _)| !types.iter().any(|(name, _)| name == column)) {
            let names = || types.iter().map(|(name, _)| name.as_str());
            let known = match feature_defs::diagnose::nearest(column, names()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("it takes: {}", names().collect::<Vec<_>>().join(", ")),
            };
            return Err(RowError::Unknown { column: column.clone(), of: of.to_owned(), known });
        }
        for (index, (name, column_type)) in types.iter().enumerate() {
            let value = match pairs.iter().find(|(column, _)| column == name) {
                Some((_, written)) => parse_value(name, written, column_type)?,
                None if inputs[index].nullable => Value::Null,
                None => {
                    return Err(RowError::Missing { row: row.clone(), column: name.clone(), of: of.to_owned() });
                }
            };
            out[index].push(value);
        }
    }
    Ok(out)
}

fn split(row: &str) -> Result<Vec<(String, Written)>, RowError> {
    let mut pairs: Vec<(String, Written)> = Vec::new();
    for part in parts(row)? {
        let Some((column, value)) = part.split_once('=') else {
            return Err(RowError::NoValue { row: row.to_owned(), part });
        };
        let (column, value) = (column.trim().to_owned(), value.trim());
        if column.is_empty() {
            return Err(RowError::NoValue { row: row.to_owned(), part });
        }
        if pairs.iter().any(|(name, _)| *name == column) {
            return Err(RowError::Twice { row: row.to_owned(), column });
        }
        pairs.push((column, Written::parse(value)));
    }
    Ok(pairs)
}

/// Cuts at the commas that are in no quotes and no brackets.
fn parts(row: &str) -> Result<Vec<String>, RowError> {
    let mut parts = vec![String::new()];
    let (mut quoted, mut depth) = (false, 0_usize);
    for c in row.chars() {
        match c {
            '"' => quoted = !quoted,
            '[' | '{' if !quoted => depth += 1,
            ']' | '}' if !quoted => depth = depth.saturating_sub(1),
            ',' if !quoted && depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().expect("there is always a part").push(c);
    }
    if quoted {
        return Err(RowError::Quotes { row: row.to_owned() });
    }
    // A service without inputs takes an empty row.
    if parts.len() == 1 && parts[0].trim().is_empty() {
        parts.clear();
    }
    Ok(parts)
}

fn parse_value(column: &str, written: &Written, wanted: &Type) -> Result<Value, RowError> {
    if !written.quoted && written.text == "null" {
        return Ok(Value::Null);
    }
    let text = written.text.as_str();
    scalar(text, wanted)
        .or_else(|| serde_json::from_str(text).ok().and_then(|json| from_json(&json, wanted)))
        .ok_or_else(|| RowError::Type {
            column: column.to_owned(),
            text: text.to_owned(),
            wanted: wanted.to_string(),
            hint: match wanted {
                Type::Timestamp => ": write `2024-03-10T12:30:00Z`",
                Type::Date => ": write `2024-03-10`",
                Type::Binary => ": write hexadecimal digits",
                Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => ": write JSON",
                _ => "",
            },
        })
}

fn scalar(text: &str, wanted: &Type) -> Option<Value> {
    Some(match wanted {
        Type::Bool => Value::Bool(text.parse().ok()?),
        Type::Int32 => Value::Int32(text.parse().ok()?),
        Type::Int64 => Value::Int64(text.parse().ok()?),
        Type::Float32 => Value::Float32(text.parse().ok()?),
        Type::Float64 => Value::Float64(text.parse().ok()?),
        Type::String => Value::String(text.into()),
        Type::Binary => Value::Binary(hexadecimal(text)?.into()),
        Type::Timestamp => Value::Timestamp(times::parse(text, times::now()).ok()?),
        Type::Date => Value::Date(date(text)?),
        Type::Decimal { precision, scale } => Value::Decimal(decimal(text, *precision, *scale)?),
        Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => return None,
    })
}

fn from_json(json: &serde_json::Value, wanted: &Type) -> Option<Value> {
    use serde_json::Value as Json;
    if json.is_null() {
        return Some(Value::Null);
    }
    Some(match wanted {
        Type::List(item) => Value::List(json.as_array()?.iter().map(|j| from_json(j, item)).collect::<Option<_>>()?),
        Type::Vector(dimensions) => {
            let items = json.as_array()?;
            if items.len() != *dimensions as usize {
                return None;
            }
            Value::Vector(items.iter().map(|j| j.as_f64().map(|x| x as f32)).collect::<Option<_>>()?)
        }
        Type::Map(value) => {
            let mut pairs: Vec<(Box<str>, Value)> = Vec::new();
            for (key, item) in json.as_object()? {
                pairs.push((key.as_str().into(), from_json(item, value)?));
            }
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Map(pairs)
        }
        Type::Struct(fields) => {
            let object = json.as_object()?;
            if object.keys().any(|key| !fields.iter().any(|(name, _)| name == key)) {
                return None;
            }
            let field = |(name, field_type): &(String, Type)| {
                object.get(name).map_or(Some(Value::Null), |j| from_json(j, field_type))
            };
            Value::Struct(fields.iter().map(field).collect::<Option<_>>()?)
        }
        scalar_type => match json {
            Json::String(text) => scalar(text, scalar_type)?,
            Json::Bool(_) | Json::Number(_) if *scalar_type != Type::String => scalar(&json.to_string(), scalar_type)?,
            _ => return None,
        },
    })
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok()).collect()
}

fn date(text: &str) -> Option<i32> {
    let date = chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
    i32::try_from(date.signed_duration_since(chrono::NaiveDate::default()).num_days()).ok()
}

/// The unscaled number of `12.5` at a scale; None when digits would be lost.
fn decimal(text: &str, precision: u8, scale: i8) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let scale = usize::try_from(scale).ok()?;
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !all_digits(whole) || !all_digits(fraction) || fraction.len() > scale
    {
        return None;
    }
    let unscaled = format!("{whole}{fraction:0<scale$}");
    let unscaled = unscaled.trim_start_matches('0');
    if unscaled.len() > usize::from(precision) {
        return None;
    }
    let number: i128 = if unscaled.is_empty() { 0 } else { unscaled.parse().ok()? };
    Some(if negative { -number } else { number })
}

/// The times of `--at`: one for every row.
pub fn times(at: Option<&str>, rows: usize) -> Result<Vec<Micros>, CliError> {
    match at {
        None => Ok(Vec::new()),
        Some(text) => Ok(vec![times::parse(text, times::now())?; rows]),
    }
}

#[cfg(test)]
mod tests;
