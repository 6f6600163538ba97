//! Casts. A value that does not fit has no value: every cast is total.
//!
//! Timestamps are cast here rather than by Arrow, so that no cast depends on a time-zone parser and none can overflow.

use std::sync::Arc;

use arrow::array::*;
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType as ArrowType, Date32Type, TimeUnit, TimestampMicrosecondType};

use super::call::{Argument, Body, canonical};
use super::time::{MICROS_PER_DAY, civil};

/// Why there is no cast, in words for help; empty when there is nothing to advise.
pub(super) type Advice = &'static str;

/// How to turn one type into another.
pub(super) fn cast(from: &ArrowType, to: &ArrowType) -> Result<Arc<Body>, Advice> {
    use ArrowType::*;
    let scalar = |t: &ArrowType| matches!(t, Boolean | Int32 | Int64 | Float32 | Float64 | Utf8 | Decimal128(..));
    let target = to.clone();
    Ok(match (from, to) {
        (Timestamp(..), Timestamp(..)) => relabel(target),
        (Date32, Timestamp(..)) => Arc::new(move |a: &[Argument], n| {
            let micros = (0..n).map(|i| i64::from(a[0].get::<Date32Type>(i)?).checked_mul(MICROS_PER_DAY));
            Ok(timestamps(micros, &target))
        }),
        (Timestamp(..), Date32) => Arc::new(|a: &[Argument], n| {
            let days =
                (0..n).map(|i| i32::try_from(a[0].get::<TimestampMicrosecondType>(i)?.div_euclid(MICROS_PER_DAY)).ok());
            Ok(Arc::new(days.collect::<Date32Array>()) as ArrayRef)
        }),
        (Timestamp(_, zone), Utf8) => {
            let suffix = if zone.is_some() { "Z" } else { "" };
            Arc::new(move |a: &[Argument], n| {
                let texts = (0..n).map(|i| {
                    let time = civil(a[0].get::<TimestampMicrosecondType>(i)?)?;
                    Some(format!("{}{suffix}", time.format("%Y-%m-%dT%H:%M:%S%.f")))
                });
                Ok(Arc::new(texts.collect::<StringArray>()) as ArrayRef)
            })
        }
        (Date32, Utf8) => Arc::new(|a: &[Argument], n| {
            let texts = (0..n).map(|i| {
                let days = i64::from(a[0].get::<Date32Type>(i)?);
                Some(civil(days.checked_mul(MICROS_PER_DAY)?)?.format("%Y-%m-%d").to_string())
            });
            Ok(Arc::new(texts.collect::<StringArray>()) as ArrayRef)
        }),
        // Arrow reads a text without an offset as UTC, and converts one with an offset to UTC.
        (Utf8, Timestamp(..)) => arrow_cast(Timestamp(TimeUnit::Microsecond, None), Some(target)),
        (Utf8, Date32) | (Utf8, Binary) | (Binary, Utf8) => arrow_cast(target, None),
        (Timestamp(..), Int32 | Int64 | Float32 | Float64 | Decimal128(..)) => {
            return Err("date_part('epoch', ...) gives seconds since 1970");
        }
        (Int32 | Int64 | Float32 | Float64 | Decimal128(..), Timestamp(..)) => {
            return Err(
                "to_timestamp_seconds, to_timestamp_millis and to_timestamp_micros turn numbers into timestamps",
            );
        }
        (Boolean, Float32 | Float64 | Decimal128(..)) | (Float32 | Float64 | Decimal128(..), Boolean) => {
            return Err("CASE says what true and false stand for");
        }
        (from, to) if scalar(from) && scalar(to) => arrow_cast(target, None),
        _ => return Err(""),
    })
}

fn relabel(to: ArrowType) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| {
        let column = a[0].column(n)?;
        let array = column.as_primitive::<TimestampMicrosecondType>().clone();
        Ok(Arc::new(array.with_data_type(to.clone())) as ArrayRef)
    })
}

fn arrow_cast(to: ArrowType, relabelled: Option<ArrowType>) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| {
        let column = a[0].column(n)?;
        let options = CastOptions { safe: true, ..CastOptions::default() };
        let array = canonical(cast_with_options(&column, &to, &options)?);
        let array = match &to {
            ArrowType::Decimal128(precision, _) => {
                let decimals = array.as_primitive::<arrow::datatypes::Decimal128Type>();
                Arc::new(decimals.null_if_overflow_precision(*precision).with_data_type(to.clone())) as ArrayRef
            }
            _ => array,
        };
        Ok(match &relabelled {
            None => array,
            Some(to) => {
                let array = array.as_primitive::<TimestampMicrosecondType>().clone();
                Arc::new(array.with_data_type(to.clone()))
            }
        })
    })
}

/// A timestamp array of microseconds, with or without a zone as `to` says.
pub(super) fn timestamps(micros: impl Iterator<Item = Option<i64>>, to: &ArrowType) -> ArrayRef {
    Arc::new(micros.collect::<TimestampMicrosecondArray>().with_data_type(to.clone()))
}
