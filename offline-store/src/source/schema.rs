//! Files of one source have one schema: what is common to the schemas of many files, and how a batch of one file is
//! brought to it. Nothing is lost on the way, and nothing is made up: a column that cannot be common is an error for
//! whoever reads it.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{
    DataType, Field, Fields, Int64Type, Schema, TimeUnit, TimestampMicrosecondType, TimestampNanosecondType,
};
use arrow::error::ArrowError;
use feature_defs::plan::align_batch;
use feature_defs::value::Type;

use super::Format;

/// How far types of two files may lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Files that state their types: only what loses nothing.
    Stated,
    /// Files whose types are guesses from their first rows: the wider guess is right for both, as the text is read
    /// anew.
    Guessed,
}

/// The type that holds every value of both.
pub fn common(a: &DataType, b: &DataType, width: Width) -> Option<DataType> {
    use DataType as D;
    if a == b {
        return Some(a.clone());
    }
    let rank = |t: &DataType| -> Option<(u8, bool)> {
        Some(match t {
            D::Int8 => (8, true),
            D::Int16 => (16, true),
            D::Int32 => (32, true),
            D::Int64 => (64, true),
            D::UInt8 => (8, false),
            D::UInt16 => (16, false),
            D::UInt32 => (32, false),
            D::UInt64 => (64, false),
            _ => return None,
        })
    };
    // The bits of an integer that a float holds exactly.
    let float = |t: &DataType| match t {
        D::Float16 => Some(11),
        D::Float32 => Some(24),
        D::Float64 => Some(53),
        _ => None,
    };
    let is_string = |t: &DataType| matches!(t, D::Utf8 | D::LargeUtf8 | D::Utf8View);
    let is_binary = |t: &DataType| matches!(t, D::Binary | D::LargeBinary | D::BinaryView | D::FixedSizeBinary(_));
    match (a, b) {
        (D::Null, other) | (other, D::Null) => Some(other.clone()),
        (D::Dictionary(_, value), other) | (other, D::Dictionary(_, value)) => {
            let other = if let D::Dictionary(_, value) = other { value } else { other };
            common(value, other, width)
        }
        _ if is_string(a) && is_string(b) => Some(D::Utf8),
        _ if is_binary(a) && is_binary(b) => Some(D::Binary),
        (D::Timestamp(first, zone), D::Timestamp(second, other_zone)) => {
            // Times without a zone are UTC, and an instant is the same in any zone. Ours are microseconds.
            let zone = if zone == other_zone { zone.clone() } else { Some("UTC".into()) };
            Some(D::Timestamp(if first == second { *first } else { TimeUnit::Microsecond }, zone))
        }
        (D::Date32, D::Date64) | (D::Date64, D::Date32) => Some(D::Date32),
        (D::Date32, stamp @ D::Timestamp(_, _)) | (stamp @ D::Timestamp(_, _), D::Date32)
            if width == Width::Guessed =>
        {
            Some(stamp.clone())
        }
        (D::Decimal128(p, s), D::Decimal128(q, t)) => {
            let scale = *s.max(t);
            let whole = (i16::from(*p) - i16::from(*s)).max(i16::from(*q) - i16::from(*t));
            let precision = u8::try_from(whole + i16::from(scale)).ok()?;
            (precision <= 38).then_some(D::Decimal128(precision, scale))
        }
        (D::List(first) | D::LargeList(first), D::List(second) | D::LargeList(second)) => {
            let item = common(first.data_type(), second.data_type(), width)?;
            Some(D::List(Arc::new(first.as_ref().clone().with_data_type(item).with_nullable(true))))
        }
        (D::Struct(first), D::Struct(second)) => common_fields(first, second, width).map(D::Struct),
        _ => match (rank(a), rank(b), float(a), float(b)) {
            (Some((bits, true)), Some((other, true)), _, _) => Some(signed(bits.max(other))),
            (Some((bits, false)), Some((other, false)), _, _) => Some(if bits > other { a.clone() } else { b.clone() }),
            // An unsigned integer needs a signed one of twice its bits.
            (Some((unsigned, false)), Some((bits, true)), _, _)
            | (Some((bits, true)), Some((unsigned, false)), _, _) => {
                (unsigned < 64).then(|| signed(bits.max(unsigned * 2)))
            }
            (None, None, Some(first), Some(second)) => Some(if first > second { a.clone() } else { b.clone() }),
            (Some((bits, _)), None, None, Some(_)) | (None, Some((bits, _)), Some(_), None) => {
                (bits <= 32 || width == Width::Guessed).then_some(D::Float64)
            }
            _ => None,
        },
    }
}

fn signed(bits: u8) -> DataType {
    match bits {
        8 => DataType::Int8,
        16 => DataType::Int16,
        32 => DataType::Int32,
        _ => DataType::Int64,
    }
}

fn common_fields(first: &Fields, second: &Fields, width: Width) -> Option<Fields> {
    let stated = width == Width::Stated;
    if stated && (first.len() != second.len() || first.iter().zip(second).any(|(a, b)| a.name() != b.name())) {
        return None;
    }
    let mut fields: Vec<Field> = Vec::new();
    for field in first {
        let data_type = match second.iter().find(|other| other.name() == field.name()) {
            Some(other) => common(field.data_type(), other.data_type(), width)?,
            None => field.data_type().clone(),
        };
        fields.push(Field::new(field.name(), data_type, true));
    }
    for field in second.iter().filter(|field| !first.iter().any(|other| other.name() == field.name())) {
        fields.push(field.as_ref().clone());
    }
    Some(fields.into())
}

/// Whether values of a file's type become the declared one without loss, by the rule of [`align_batch`].
pub fn fits(found: &DataType, declared: &Type) -> bool {
    let schema = Arc::new(Schema::new(vec![Field::new("column", found.clone(), true)]));
    let empty = RecordBatch::new_empty(schema);
    align_batch("", std::iter::once(("column", declared)), &empty, false).is_ok()
}

/// What a column of text is read as that looked like one type and was declared another. Where the text cannot become
/// what was declared, it is left as it looks, so that the difference is told before anything is read.
pub fn read_as(looks: &DataType, declared: &Type, format: Format) -> DataType {
    use DataType as D;
    let is_readable = match (looks, declared) {
        (D::Null | D::Utf8, _) => true,
        (_, Type::String) => format == Format::Csv,
        (D::Int64, Type::Int32 | Type::Int64 | Type::Float32 | Type::Float64 | Type::Decimal { .. }) => true,
        (D::Float64, Type::Float32 | Type::Float64 | Type::Decimal { .. }) => true,
        (D::Boolean, Type::Bool) | (D::Date32, Type::Date | Type::Timestamp) => true,
        (D::Timestamp(_, _), Type::Timestamp) => true,
        (looks, declared) => looks.is_nested() && declared.arrow().is_nested(),
    };
    if is_readable { declared.arrow() } else { looks.clone() }
}

/// Casts, and fails rather than changing a value.
pub fn cast(column: &ArrayRef, wanted: &DataType) -> Result<ArrayRef, ArrowError> {
    use DataType as D;
    let options = CastOptions { safe: false, ..CastOptions::default() };
    match (column.data_type(), wanted) {
        (found, wanted) if found == wanted => Ok(column.clone()),
        // Towards the past, so that a row never seems later than it was: Arrow's own cast goes towards 1970.
        (D::Timestamp(TimeUnit::Nanosecond, _), D::Timestamp(TimeUnit::Microsecond, zone)) => {
            let nanos = column.as_primitive::<TimestampNanosecondType>();
            let micros = nanos.unary::<_, TimestampMicrosecondType>(|nanos| nanos.div_euclid(1_000));
            Ok(Arc::new(micros.with_timezone_opt(zone.clone())))
        }
        // An instant keeps its number whatever the zone; only Arrow's cast of zoneless times would take them as local.
        (D::Timestamp(_, _), D::Timestamp(unit, zone)) => {
            let number = column.data_type().clone();
            let plain = if let D::Timestamp(found, _) = number { D::Timestamp(found, None) } else { number };
            let instants = cast_with_options(column, &D::Int64, &options)?;
            let instants = cast_with_options(&instants, &plain, &options)?;
            let instants = cast_with_options(&instants, &D::Timestamp(*unit, None), &options)?;
            let data = instants.to_data().into_builder().data_type(D::Timestamp(*unit, zone.clone())).build()?;
            Ok(arrow::array::make_array(data))
        }
        (D::UInt64, D::Int64) => {
            let wide = cast_with_options(column, &D::Int64, &options)?;
            Ok(Arc::new(wide.as_primitive::<Int64Type>().clone()))
        }
        _ => cast_with_options(column, wanted, &options),
    }
}

/// The type of a partition column of which these are all values.
pub fn partition_type<'v>(mut values: impl Iterator<Item = Option<&'v str>>) -> DataType {
    let is_integer = |text: &str| text.parse::<i64>().is_ok();
    if values.all(|value| value.is_none_or(is_integer)) { DataType::Int64 } else { DataType::Utf8 }
}

/// A partition column: one value, `rows` times.
pub fn partition_column(value: Option<&str>, wanted: &DataType, rows: usize) -> Result<ArrayRef, ArrowError> {
    match value {
        None => Ok(new_null_array(wanted, rows)),
        Some(text) => {
            let one: ArrayRef = Arc::new(StringArray::from(vec![text]));
            let one = cast(&one, wanted)?;
            let zeros = arrow::array::UInt32Array::from(vec![0; rows]);
            arrow::compute::take(one.as_ref(), &zeros, None)
        }
    }
}
