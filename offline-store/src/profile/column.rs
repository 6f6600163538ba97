//! Arrow columns as what profiles count.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType,
};
use drift::DriftError;
use drift::builder::{Builder, Kind};
use drift::counts::{Counter, Rows, Validity};
use drift::directions::DIMENSION_MAX;
use drift::number::{Number, Scale};
use feature_defs::time::Micros;
use feature_defs::value::Type;
use feature_defs::window::DAY;

/// Unscaled decimals of so many digits are int64s.
const DECIMAL_DIGITS_MAX: u8 = 18;

/// How values of a type are profiled.
pub fn kind_of(value_type: &Type) -> Kind {
    match value_type {
        Type::Bool => Kind::Numbers(Scale::Bool),
        Type::Int32 | Type::Int64 | Type::Timestamp | Type::Date => Kind::Numbers(Scale::Int64),
        Type::Float32 | Type::Float64 => Kind::Numbers(Scale::Float64),
        Type::Decimal { precision, .. } if *precision <= DECIMAL_DIGITS_MAX => Kind::Numbers(Scale::Int64),
        Type::Decimal { .. } => Kind::Numbers(Scale::Float64),
        Type::String | Type::Binary => Kind::Categories,
        Type::Vector(dimension) if (1..=DIMENSION_MAX).contains(&(*dimension as usize)) => {
            Kind::Vectors { dimension: *dimension as usize }
        }
        Type::Vector(_) | Type::List(_) | Type::Map(_) | Type::Struct(_) => Kind::Presence,
    }
}

/// What takes values: a profile that is made, or counts over one that is there.
pub trait Sink {
    fn numbers<T: Number>(&mut self, values: &[T], rows: &Rows<'_>) -> Result<(), DriftError>;
    fn texts<'a>(&mut self, values: impl ExactSizeIterator<Item = &'a [u8]>, rows: &Rows<'_>)
    -> Result<(), DriftError>;
    fn vectors(&mut self, values: &[f32], rows: &Rows<'_>) -> Result<(), DriftError>;
    fn presence(&mut self, rows: &Rows<'_>) -> Result<(), DriftError>;
}

impl Sink for Builder {
    fn numbers<T: Number>(&mut self, values: &[T], rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_numbers(values, rows)
    }
    fn texts<'a>(
        &mut self,
        values: impl ExactSizeIterator<Item = &'a [u8]>,
        rows: &Rows<'_>,
    ) -> Result<(), DriftError> {
        self.add_texts(values, rows)
    }
    fn vectors(&mut self, values: &[f32], rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_vectors(values, rows)
    }
    fn presence(&mut self, rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_presence(rows)
    }
}

impl Sink for Counter {
    fn numbers<T: Number>(&mut self, values: &[T], rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_numbers(values, rows)
    }
    fn texts<'a>(
        &mut self,
        values: impl ExactSizeIterator<Item = &'a [u8]>,
        rows: &Rows<'_>,
    ) -> Result<(), DriftError> {
        self.add_texts(values, rows)
    }
    fn vectors(&mut self, values: &[f32], rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_vectors(values, rows)
    }
    fn presence(&mut self, rows: &Rows<'_>) -> Result<(), DriftError> {
        self.add_presence(rows)
    }
}

/// The rows of a column, beside its values.
#[derive(Debug, Clone, Copy)]
pub struct RowsOf<'a> {
    /// The bucket of each row's block.
    pub buckets: &'a [u8],
    /// Bits of [`drift::counts::Flag`]; none where all values are plain.
    pub flags: Option<&'a [u8]>,
    /// The time of each row: a moment is counted as its age.
    pub at: &'a [Micros],
}

/// Adds a column of values of `value_type`, which is also its Arrow type.
pub fn add(sink: &mut impl Sink, column: &ArrayRef, value_type: &Type, of: &RowsOf<'_>) -> Result<(), DriftError> {
    let nulls = column.nulls();
    let rows = Rows { buckets: of.buckets, validity: validity(nulls), flags: of.flags };
    let other = || DriftError::WrongKind { profiled: "a declared type", given: "values of another type" };
    match value_type {
        Type::Bool => {
            let values = column.as_boolean_opt().ok_or_else(other)?.values();
            sink.numbers(&values.iter().collect::<Vec<bool>>(), &rows)
        }
        Type::Int32 => {
            let values = column.as_primitive_opt::<Int32Type>().ok_or_else(other)?.values();
            sink.numbers(&values.iter().map(|x| i64::from(*x)).collect::<Vec<i64>>(), &rows)
        }
        Type::Int64 => sink.numbers(column.as_primitive_opt::<Int64Type>().ok_or_else(other)?.values(), &rows),
        Type::Float32 => sink.numbers(column.as_primitive_opt::<Float32Type>().ok_or_else(other)?.values(), &rows),
        Type::Float64 => sink.numbers(column.as_primitive_opt::<Float64Type>().ok_or_else(other)?.values(), &rows),
        Type::Timestamp => {
            let values = column.as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(other)?.values();
            sink.numbers(&ages(values.iter().copied(), of.at), &rows)
        }
        Type::Date => {
            let values = column.as_primitive_opt::<Date32Type>().ok_or_else(other)?.values();
            sink.numbers(&ages(values.iter().map(|day| i64::from(*day).saturating_mul(DAY)), of.at), &rows)
        }
        Type::Decimal { precision, scale } => {
            let values = column.as_primitive_opt::<Decimal128Type>().ok_or_else(other)?.values();
            if *precision <= DECIMAL_DIGITS_MAX {
                // What stands under a null may be anything; it is not looked at.
                sink.numbers(&values.iter().map(|x| *x as i64).collect::<Vec<i64>>(), &rows)
            } else {
                let unit = 10f64.powi(i32::from(*scale));
                sink.numbers(&values.iter().map(|x| *x as f64 / unit).collect::<Vec<f64>>(), &rows)
            }
        }
        Type::String => {
            let values = column.as_string_opt::<i32>().ok_or_else(other)?;
            sink.texts((0..values.len()).map(|row| values.value(row).as_bytes()), &rows)
        }
        Type::Binary => {
            let values = column.as_binary_opt::<i32>().ok_or_else(other)?;
            sink.texts((0..values.len()).map(|row| values.value(row)), &rows)
        }
        Type::Vector(dimension) if matches!(kind_of(value_type), Kind::Vectors { .. }) => {
            let list = column.as_fixed_size_list_opt().ok_or_else(other)?;
            let values = list.values().as_primitive_opt::<Float32Type>().ok_or_else(other)?.values();
            let from = list.value_offset(0) as usize;
            let end = from + list.len() * *dimension as usize;
            sink.vectors(values.get(from..end).ok_or_else(other)?, &rows)
        }
        Type::Vector(_) | Type::List(_) | Type::Map(_) | Type::Struct(_) => sink.presence(&rows),
    }
}

/// The bits of rows that have a value.
pub fn validity(nulls: Option<&NullBuffer>) -> Validity<'_> {
    match nulls {
        None => Validity::All,
        Some(nulls) => Validity::Bitmap { bytes: nulls.validity(), offset: nulls.offset() },
    }
}

fn ages(values: impl Iterator<Item = Micros>, at: &[Micros]) -> Vec<i64> {
    values.zip(at).map(|(value, at)| at.saturating_sub(value)).collect()
}
