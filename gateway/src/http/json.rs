//! Columns as JSON lists. JSON has neither NaN nor 64-bit integers nor times, so these have one spelling each, and what is
//! written can be read back: `"NaN"`, `"Infinity"` and `"-Infinity"`; integers as numbers (clients that read them as floats
//! lose digits beyond 2^53, as everywhere); timestamps as RFC 3339 or microseconds, dates as `2013-07-01`, decimals as
//! texts, binaries as hexadecimal.

use chrono::{DateTime, NaiveDate, SecondsFormat};
use feature_defs::value::{Type, Value};
use proto::v1;
use proto::v1::column::Values;
use serde_json::{Map, Value as Json, json};

use crate::convert;
use crate::status::Failure;

/// A column of a type from a JSON list.
pub fn column(name: &str, values: &[Json], value_type: &Type) -> Result<v1::Column, Failure> {
    let read = |(row, value): (usize, &Json)| {
        value_of(value, value_type).ok_or_else(|| {
            let shown = feature_defs::diagnose::shown(&value.to_string());
            Failure::invalid(format!("column `{name}` must be {value_type}, but row {row} is {shown}"))
        })
    };
    let values: Vec<Value> = values.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    let array = Value::to_array(&values, value_type);
    Ok(convert::from_array(name, &array, value_type))
}

/// Times of `at`.
pub fn times(values: &[Json]) -> Result<Vec<i64>, Failure> {
    let read = |(row, value): (usize, &Json)| match value_of(value, &Type::Timestamp) {
        Some(Value::Timestamp(micros)) => Ok(micros),
        _ => {
            let shown = feature_defs::diagnose::shown(&value.to_string());
            Err(Failure::invalid(format!("`at` of row {row} is {shown}; write RFC 3339 or microseconds")))
        }
    };
    values.iter().enumerate().map(read).collect()
}

fn value_of(value: &Json, value_type: &Type) -> Option<Value> {
    if value.is_null() {
        return Some(Value::Null);
    }
    Some(match value_type {
        Type::Bool => Value::Bool(value.as_bool()?),
        Type::Int32 => Value::Int32(value.as_i64()?.try_into().ok()?),
        Type::Int64 => Value::Int64(value.as_i64()?),
        Type::Float32 => Value::Float32(float_of(value)? as f32),
        Type::Float64 => Value::Float64(float_of(value)?),
        Type::String => Value::String(value.as_str()?.into()),
        Type::Binary => Value::Binary(bytes_of(value.as_str()?)?.into()),
        Type::Timestamp => Value::Timestamp(match value {
            Json::String(text) => DateTime::parse_from_rfc3339(text).ok()?.timestamp_micros(),
            other => other.as_i64()?,
        }),
        Type::Date => {
            let date: NaiveDate = value.as_str()?.parse().ok()?;
            Value::Date((date - NaiveDate::default()).num_days().try_into().ok()?)
        }
        Type::Decimal { precision, scale } => Value::Decimal(decimal_of(value.as_str()?, *precision, *scale)?),
        Type::List(item) => {
            Value::List(value.as_array()?.iter().map(|value| value_of(value, item)).collect::<Option<_>>()?)
        }
        Type::Map(item) => {
            let pairs = value.as_object()?.iter();
            let mut pairs: Vec<(Box<str>, Value)> =
                pairs.map(|(key, value)| Some((key.as_str().into(), value_of(value, item)?))).collect::<Option<_>>()?;
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Map(pairs)
        }
        Type::Struct(fields) => {
            let object = value.as_object()?;
            if object.keys().any(|key| fields.iter().all(|(name, _)| name != key)) {
                return None;
            }
            let values = fields.iter().map(|(name, field)| value_of(object.get(name).unwrap_or(&Json::Null), field));
            Value::Struct(values.collect::<Option<_>>()?)
        }
        Type::Vector(n) => {
            let items = value.as_array().filter(|items| items.len() == *n as usize)?;
            let items: Vec<f32> = items.iter().map(|item| Some(float_of(item)? as f32)).collect::<Option<_>>()?;
            Value::Vector(items.into())
        }
    })
}

fn float_of(value: &Json) -> Option<f64> {
    match value.as_str() {
        None => value.as_f64(),
        Some("NaN") => Some(f64::NAN),
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some(_) => None,
    }
}

fn bytes_of(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16);
    digits.chunks(2).map(|pair| Some((digit(pair[0])? * 16 + digit(pair[1])?) as u8)).collect()
}

fn decimal_of(text: &str, precision: u8, scale: i8) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let scale = usize::try_from(scale).ok()?;
    if whole.is_empty()
        || fraction.len() > scale
        || !(whole.bytes().chain(fraction.bytes())).all(|b| b.is_ascii_digit())
    {
        return None;
    }
    let unscaled: i128 = format!("{whole}{fraction:0<scale$}").parse().ok()?;
    let fits = unscaled.unsigned_abs() < 10u128.checked_pow(precision.into())?;
    fits.then_some(if negative { -unscaled } else { unscaled })
}

pub fn features_response(response: &v1::GetFeaturesResponse) -> Json {
    json!({
        "features": response.features.iter().map(feature).collect::<Vec<_>>(),
        "at": response.at.iter().map(|at| time(*at)).collect::<Vec<_>>(),
        "views": response.views.iter().map(view).collect::<Vec<_>>(),
        "semantic_digest": response.semantic_digest,
        "stale": response.stale,
        "rows": response.rows,
    })
}

pub fn predict_response(response: &v1::PredictResponse) -> Json {
    let outcome = |outcome: &v1::RowOutcome| {
        let waits = outcome.waits.unwrap_or_default();
        json!({
            "version": outcome.version,
            "arm": outcome.arm,
            "status": outcome.status().as_str_name(),
            "reason": outcome.reason,
            "wait_reason": outcome.wait_reason().as_str_name(),
            "wait_us": outcome.wait_us,
            "cached": outcome.cached,
            "waits": {
                "executor_busy_us": waits.executor_busy_us,
                "linger_us": waits.linger_us,
                "memory_permit_us": waits.memory_permit_us,
                "tier_us": waits.tier_us,
            },
        })
    };
    let outputs: Map<String, Json> =
        response.outputs.iter().map(|output| (output.name.clone(), Json::Array(values(output)))).collect();
    let timings = response.timings.unwrap_or_default();
    json!({
        "outputs": outputs,
        "outcomes": response.outcomes.iter().map(outcome).collect::<Vec<_>>(),
        "at": response.at.iter().map(|at| time(*at)).collect::<Vec<_>>(),
        "features": response.features.iter().map(feature).collect::<Vec<_>>(),
        "views": response.views.iter().map(view).collect::<Vec<_>>(),
        "request_id": response.request_id,
        "semantic_digest": response.semantic_digest,
        "stale": response.stale,
        "timings": {
            "features_us": timings.features_us,
            "transforms_us": timings.transforms_us,
            "queue_us": timings.queue_us,
            "forward_us": timings.forward_us,
            "total_us": timings.total_us,
        },
    })
}

fn feature(feature: &v1::FeatureColumn) -> Json {
    let statuses: Vec<&str> = feature.statuses().map(|status| status.as_str_name()).collect();
    let reasons = feature.reasons().map(|reason| match reason {
        v1::UnavailableReason::Unspecified => Json::Null,
        reason => reason.as_str_name().into(),
    });
    json!({
        "name": feature.name,
        "values": feature.values.as_ref().map_or_else(Vec::new, values),
        "statuses": statuses,
        "reasons": reasons.collect::<Vec<_>>(),
    })
}

fn view(view: &v1::ViewProvenance) -> Json {
    let known = |micros: i64| if micros == i64::MIN { Json::Null } else { time(micros) };
    let position = |position: &v1::Position| match position.time {
        i64::MIN => Json::Null,
        micros => json!({"time": time(micros), "sequence": position.sequence}),
    };
    json!({
        "view": view.view,
        "alias": view.alias,
        "event_times": view.event_times.iter().map(|time| known(*time)).collect::<Vec<_>>(),
        "positions": view.positions.iter().map(position).collect::<Vec<_>>(),
        "storage_digest": view.storage_digest,
    })
}

/// A column of an answer, which this process made.
fn values(column: &v1::Column) -> Vec<Json> {
    let present = |row: usize| column.validity.is_empty() || column.validity[row / 8] >> (row % 8) & 1 == 1;
    let row = |(row, value): (usize, Json)| if present(row) { value } else { Json::Null };
    plain(column).into_iter().enumerate().map(row).collect()
}

fn plain(column: &v1::Column) -> Vec<Json> {
    let Some(values) = &column.values else { return Vec::new() };
    match values {
        Values::Bools(x) => x.values.iter().map(|x| (*x).into()).collect(),
        Values::Int32s(x) => x.values.iter().map(|x| (*x).into()).collect(),
        Values::Int64s(x) => x.values.iter().map(|x| (*x).into()).collect(),
        Values::Floats(x) => x.values.iter().map(|x| float(f64::from(*x))).collect(),
        Values::Doubles(x) => x.values.iter().map(|x| float(*x)).collect(),
        Values::Strings(x) => x.values.iter().map(|x| x.as_str().into()).collect(),
        Values::Binaries(x) => {
            x.values.iter().map(|x| x.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()).collect()
        }
        Values::Timestamps(x) => x.microseconds.iter().map(|x| time(*x)).collect(),
        Values::Dates(x) => x.days.iter().map(|x| date(*x)).collect(),
        Values::Decimals(x) => {
            let scale = usize::try_from(x.scale).unwrap_or(0);
            x.unscaled.as_chunks::<16>().0.iter().map(|x| decimal(i128::from_be_bytes(*x), scale)).collect()
        }
        Values::Lists(x) => {
            let items = x.items.as_deref().map(self::values).unwrap_or_default();
            grouped(&x.lengths, items).map(Json::Array).collect()
        }
        Values::Maps(x) => {
            let keys = x.keys.as_deref().map(self::values).unwrap_or_default();
            let items = x.values.as_deref().map(self::values).unwrap_or_default();
            let pairs: Vec<(Json, Json)> = keys.into_iter().zip(items).collect();
            let object = |pairs: Vec<(Json, Json)>| {
                let named = pairs.into_iter().map(|(key, item)| (key.as_str().unwrap_or_default().to_owned(), item));
                Json::Object(named.collect())
            };
            grouped(&x.lengths, pairs).map(object).collect()
        }
        Values::Structs(x) => {
            let fields: Vec<(String, Vec<Json>)> =
                x.fields.iter().map(|field| (field.name.clone(), self::values(field))).collect();
            let rows = fields.first().map_or(0, |(_, values)| values.len());
            let object = |row: usize| fields.iter().map(|(name, values)| (name.clone(), values[row].clone())).collect();
            (0..rows).map(|row| Json::Object(object(row))).collect()
        }
        Values::Vectors(x) => {
            let chunks = x.values.chunks((x.dimensions as usize).max(1));
            chunks.map(|items| Json::Array(items.iter().map(|x| float(f64::from(*x))).collect())).collect()
        }
    }
}

fn grouped<T>(lengths: &[u32], items: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter();
    lengths.iter().map(move |length| items.by_ref().take(*length as usize).collect())
}

fn float(x: f64) -> Json {
    match serde_json::Number::from_f64(x) {
        Some(number) => Json::Number(number),
        None if x.is_nan() => "NaN".into(),
        None if x > 0.0 => "Infinity".into(),
        None => "-Infinity".into(),
    }
}

fn time(micros: i64) -> Json {
    match DateTime::from_timestamp_micros(micros) {
        Some(time) => time.to_rfc3339_opts(SecondsFormat::Micros, true).into(),
        None => micros.into(),
    }
}

fn date(days: i32) -> Json {
    let date = NaiveDate::default().checked_add_signed(chrono::Duration::days(days.into()));
    date.map_or_else(|| days.into(), |date| date.to_string().into())
}

fn decimal(unscaled: i128, scale: usize) -> Json {
    let sign = if unscaled < 0 { "-" } else { "" };
    let digits = format!("{:0>width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    if fraction.is_empty() { format!("{sign}{whole}").into() } else { format!("{sign}{whole}.{fraction}").into() }
}

#[cfg(test)]
mod tests;
