//! Cells of Arrow columns as canonical bytes, without a [`Value`] for each: what moves millions of rows encodes them here.
//!
//! The bytes are those of [`encode`] and [`encode_row`](super::encode_row), which stay the definition.

use arrow::array::*;

use super::{Type, Value, encode, encode_bytes, encode_i64};
use crate::value::{canonical_f32, canonical_f64};

/// One column, looked at once rather than for every row.
#[derive(Debug)]
pub enum Cells<'a> {
    Bool(&'a BooleanArray),
    Int32(&'a Int32Array),
    Date(&'a Date32Array),
    Int64(&'a Int64Array),
    Timestamp(&'a TimestampMicrosecondArray),
    Float32(&'a Float32Array),
    Float64(&'a Float64Array),
    Decimal(&'a Decimal128Array),
    String(&'a StringArray),
    Binary(&'a BinaryArray),
    /// Nested values go through [`Value`].
    Nested(&'a ArrayRef, &'a Type),
}

impl<'a> Cells<'a> {
    /// A column of the type's own Arrow type.
    pub fn new(column: &'a ArrayRef, value_type: &'a Type) -> Cells<'a> {
        let any = column.as_any();
        let known = match value_type {
            Type::Bool => any.downcast_ref().map(Cells::Bool),
            Type::Int32 => any.downcast_ref().map(Cells::Int32),
            Type::Date => any.downcast_ref().map(Cells::Date),
            Type::Int64 => any.downcast_ref().map(Cells::Int64),
            Type::Timestamp => any.downcast_ref().map(Cells::Timestamp),
            Type::Float32 => any.downcast_ref().map(Cells::Float32),
            Type::Float64 => any.downcast_ref().map(Cells::Float64),
            Type::Decimal { .. } => any.downcast_ref().map(Cells::Decimal),
            Type::String => any.downcast_ref().map(Cells::String),
            Type::Binary => any.downcast_ref().map(Cells::Binary),
            Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => None,
        };
        known.unwrap_or(Cells::Nested(column, value_type))
    }

    pub fn is_null(&self, row: usize) -> bool {
        match self {
            Cells::Bool(array) => array.is_null(row),
            Cells::Int32(array) => array.is_null(row),
            Cells::Date(array) => array.is_null(row),
            Cells::Int64(array) => array.is_null(row),
            Cells::Timestamp(array) => array.is_null(row),
            Cells::Float32(array) => array.is_null(row),
            Cells::Float64(array) => array.is_null(row),
            Cells::Decimal(array) => array.is_null(row),
            Cells::String(array) => array.is_null(row),
            Cells::Binary(array) => array.is_null(row),
            Cells::Nested(array, _) => array.is_null(row),
        }
    }

    /// Appends the encoding of a cell that is not null.
    pub fn encode(&self, row: usize, out: &mut Vec<u8>) {
        match self {
            Cells::Bool(array) => out.push(u8::from(array.value(row))),
            Cells::Int32(array) => out.extend_from_slice(&((array.value(row) as u32) ^ (1 << 31)).to_be_bytes()),
            Cells::Date(array) => out.extend_from_slice(&((array.value(row) as u32) ^ (1 << 31)).to_be_bytes()),
            Cells::Int64(array) => out.extend_from_slice(&encode_i64(array.value(row))),
            Cells::Timestamp(array) => out.extend_from_slice(&encode_i64(array.value(row))),
            Cells::Float32(array) => encode(&Value::Float32(canonical_f32(array.value(row))), out),
            Cells::Float64(array) => encode(&Value::Float64(canonical_f64(array.value(row))), out),
            Cells::Decimal(array) => encode(&Value::Decimal(array.value(row)), out),
            Cells::String(array) => encode_bytes(array.value(row).as_bytes(), out),
            Cells::Binary(array) => encode_bytes(array.value(row), out),
            Cells::Nested(array, value_type) => encode(&Value::from_array(array, row, value_type), out),
        }
    }
}

/// Appends one row of these columns as [`encode_row`](super::encode_row) does.
pub fn encode_cells(columns: &[Cells<'_>], row: usize, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + columns.len().div_ceil(8), 0);
    for (i, cells) in columns.iter().enumerate() {
        if !cells.is_null(row) {
            out[start + i / 8] |= 1 << (i % 8);
            cells.encode(row, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::encode_row;

    #[test]
    fn cells_are_encoded_as_values_are() {
        let columns: Vec<(Vec<Value>, Type)> = vec![
            (vec![Value::Bool(true), Value::Null, Value::Bool(false)], Type::Bool),
            (vec![Value::Int32(-7), Value::Int32(i32::MAX), Value::Null], Type::Int32),
            (vec![Value::Date(-1), Value::Null, Value::Date(20_000)], Type::Date),
            (vec![Value::Null, Value::Int64(i64::MIN), Value::Int64(5)], Type::Int64),
            (vec![Value::Timestamp(9), Value::Timestamp(-9), Value::Null], Type::Timestamp),
            (vec![Value::Float32(-0.0), Value::Float32(f32::NAN), Value::Null], Type::Float32),
            (vec![Value::Float64(-0.0), Value::Null, Value::Float64(-f64::NAN)], Type::Float64),
            (vec![Value::Decimal(-12), Value::Decimal(7), Value::Null], Type::Decimal { precision: 9, scale: 2 }),
            (vec![Value::String("a\0b".into()), Value::Null, Value::String("".into())], Type::String),
            (vec![Value::Binary([0, 0, 1].into()), Value::Null, Value::Binary([].into())], Type::Binary),
            (vec![Value::List(vec![Value::Null, Value::Int64(1)]), Value::Null, Value::List(vec![])], {
                Type::List(Box::new(Type::Int64))
            }),
            (
                vec![Value::Vector([1.0, -0.0].into()), Value::Vector([f32::NAN, 2.0].into()), Value::Null],
                Type::Vector(2),
            ),
        ];
        let arrays: Vec<ArrayRef> = columns.iter().map(|(values, t)| Value::to_array(values, t)).collect();
        let cells: Vec<Cells<'_>> = arrays.iter().zip(&columns).map(|(array, (_, t))| Cells::new(array, t)).collect();
        for row in 0..3 {
            let values: Vec<Value> = columns.iter().map(|(values, _)| values[row].clone()).collect();
            let (mut expected, mut found) = (Vec::new(), Vec::new());
            encode_row(&values, &mut expected);
            encode_cells(&cells, row, &mut found);
            assert_eq!(found, expected, "row {row}");
        }
    }
}
