//! Encoded rows into Arrow columns, without a [`Value`] per cell.
//!
//! The online path decodes a few rows of many features for every request; a boxed value per cell, and an array built from
//! them, costs more than the round trip to the store. Here the bytes of a row (see [`encode_row`](crate::value::encode_row))
//! go straight into the buffers that the arrays are made of. Nested types are seldom, and take the way over values.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int32Array,
    Int64Array, StringArray, TimestampMicrosecondArray,
};
use arrow::buffer::{BooleanBuffer, Buffer, MutableBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::ArrowNativeType;

use crate::value::{DecodeError, Type, Value, decode, decode_i64, take};

/// Columns that grow by rows, up to as many as were announced.
#[derive(Debug)]
pub struct Columns {
    columns: Vec<Column>,
    /// The values of all columns of fixed width, one column after the other, each with room for all rows: a request for
    /// hundreds of features would spend more on allocating a buffer for each than on filling it.
    fixed: MutableBuffer,
    rows: usize,
    rows_max: usize,
}

#[derive(Debug)]
struct Column {
    cells: Cells,
    /// One per row, false under a null; empty until there is one.
    valid: Vec<bool>,
}

/// A column of fixed width begins at a byte of the shared buffer.
#[derive(Debug)]
enum Cells {
    Bool(Vec<bool>),
    Int32(usize),
    Int64(usize),
    Float32(usize),
    Float64(usize),
    Date(usize),
    Timestamp(usize),
    Decimal { start: usize, precision: u8, scale: i8 },
    Bytes { bytes: Vec<u8>, ends: Vec<usize>, is_text: bool },
    Nested { values: Vec<Value>, value_type: Type },
}

/// Every column begins at a multiple of the widest value.
const ALIGNMENT: usize = 16;

impl Columns {
    /// No rows yet, with room for so many.
    pub fn new<'a>(types: impl IntoIterator<Item = &'a Type>, rows_max: usize) -> Columns {
        let mut end = 0;
        let columns = types.into_iter().map(|value_type| {
            let cells = Cells::new(value_type, rows_max, end);
            end += (cells.width() * rows_max).next_multiple_of(ALIGNMENT);
            Column { cells, valid: Vec::new() }
        });
        let columns = columns.collect();
        Columns { columns, fixed: MutableBuffer::from_len_zeroed(end), rows: 0, rows_max }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds a row as [`encode_row`](crate::value::encode_row) wrote it; the bytes must end with it. After an error the
    /// columns are as before.
    pub fn push(&mut self, row: &[u8]) -> Result<(), DecodeError> {
        if self.rows == self.rows_max {
            return Err(DecodeError::Invalid("there are more rows than were announced"));
        }
        let pushed = self.try_push(row);
        match pushed {
            Ok(()) => self.rows += 1,
            Err(_) => self.columns.iter_mut().for_each(|column| column.truncate(self.rows)),
        }
        pushed
    }

    fn try_push(&mut self, row: &[u8]) -> Result<(), DecodeError> {
        let (bitmap, mut bytes) = row.split_at_checked(self.columns.len().div_ceil(8)).ok_or(DecodeError::Truncated)?;
        let fixed = self.fixed.as_slice_mut();
        for (index, column) in self.columns.iter_mut().enumerate() {
            if bitmap[index / 8] >> (index % 8) & 1 == 1 {
                column.cells.push(&mut bytes, fixed, self.rows)?;
                if !column.valid.is_empty() {
                    column.valid.push(true);
                }
            } else {
                column.cells.push_zero(fixed, self.rows);
                if column.valid.is_empty() {
                    column.valid.reserve(self.rows_max);
                    column.valid.resize(self.rows, true);
                }
                column.valid.push(false);
            }
        }
        if bytes.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(bytes.len())) }
    }

    pub fn finish(self) -> Vec<ArrayRef> {
        let fixed = Buffer::from(self.fixed);
        self.columns.into_iter().map(|column| column.finish(&fixed, self.rows)).collect()
    }
}

impl Column {
    fn truncate(&mut self, rows: usize) {
        self.cells.truncate(rows);
        self.valid.truncate(rows);
        if self.valid.iter().all(|valid| *valid) {
            self.valid.clear();
        }
    }

    fn finish(self, fixed: &Buffer, rows: usize) -> ArrayRef {
        let nulls = (!self.valid.is_empty()).then(|| NullBuffer::from(self.valid));
        match self.cells {
            Cells::Bool(values) => Arc::new(BooleanArray::new(BooleanBuffer::from(values), nulls)),
            Cells::Int32(start) => Arc::new(Int32Array::new(part(fixed, start, rows), nulls)),
            Cells::Int64(start) => Arc::new(Int64Array::new(part(fixed, start, rows), nulls)),
            Cells::Float32(start) => Arc::new(Float32Array::new(part(fixed, start, rows), nulls)),
            Cells::Float64(start) => Arc::new(Float64Array::new(part(fixed, start, rows), nulls)),
            Cells::Date(start) => Arc::new(Date32Array::new(part(fixed, start, rows), nulls)),
            Cells::Timestamp(start) => {
                Arc::new(TimestampMicrosecondArray::new(part(fixed, start, rows), nulls).with_timezone("UTC"))
            }
            Cells::Decimal { start, precision, scale } => {
                let array = Decimal128Array::new(part(fixed, start, rows), nulls);
                let array = array.with_precision_and_scale(precision, scale);
                Arc::new(array.expect("a parsed decimal type has a valid precision and scale"))
            }
            Cells::Bytes { bytes, ends, is_text } => {
                // Checked as the bytes came: what 32-bit offsets reach.
                let offsets: Vec<i32> =
                    std::iter::once(0).chain(ends.iter().map(|end| i32::try_from(*end).unwrap_or(i32::MAX))).collect();
                let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
                let bytes = Buffer::from_vec(bytes);
                if is_text {
                    // Every value was checked as it came.
                    Arc::new(StringArray::new(offsets, bytes, nulls))
                } else {
                    Arc::new(BinaryArray::new(offsets, bytes, nulls))
                }
            }
            Cells::Nested { values, value_type } => Value::to_array(&values, &value_type),
        }
    }
}

fn part<T: ArrowNativeType>(fixed: &Buffer, start: usize, rows: usize) -> ScalarBuffer<T> {
    ScalarBuffer::new(fixed.clone(), start / size_of::<T>(), rows)
}

/// Bytes that the strings of one column may take: what 32-bit offsets reach.
const BYTES_MAX: usize = i32::MAX as usize;

impl Cells {
    fn new(value_type: &Type, rows: usize, start: usize) -> Cells {
        match value_type {
            Type::Bool => Cells::Bool(Vec::with_capacity(rows)),
            Type::Int32 => Cells::Int32(start),
            Type::Int64 => Cells::Int64(start),
            Type::Float32 => Cells::Float32(start),
            Type::Float64 => Cells::Float64(start),
            Type::Date => Cells::Date(start),
            Type::Timestamp => Cells::Timestamp(start),
            Type::Decimal { precision, scale } => Cells::Decimal { start, precision: *precision, scale: *scale },
            Type::String | Type::Binary => {
                let is_text = *value_type == Type::String;
                Cells::Bytes { bytes: Vec::new(), ends: Vec::with_capacity(rows), is_text }
            }
            Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => {
                Cells::Nested { values: Vec::with_capacity(rows), value_type: value_type.clone() }
            }
        }
    }

    /// Bytes of one value in the shared buffer.
    fn width(&self) -> usize {
        match self {
            Cells::Bool(_) | Cells::Bytes { .. } | Cells::Nested { .. } => 0,
            Cells::Int32(_) | Cells::Float32(_) | Cells::Date(_) => 4,
            Cells::Int64(_) | Cells::Float64(_) | Cells::Timestamp(_) => 8,
            Cells::Decimal { .. } => 16,
        }
    }

    /// Reads one value from the front.
    fn push(&mut self, from: &mut &[u8], fixed: &mut [u8], row: usize) -> Result<(), DecodeError> {
        match self {
            Cells::Bool(values) => match take::<1>(from)? {
                [0] => values.push(false),
                [1] => values.push(true),
                _ => return Err(DecodeError::Invalid("a bool is neither 0 nor 1")),
            },
            Cells::Int32(start) | Cells::Date(start) => {
                let value = (u32::from_be_bytes(take(from)?) ^ (1 << 31)) as i32;
                put(fixed, *start, row, value.to_ne_bytes());
            }
            Cells::Int64(start) | Cells::Timestamp(start) => {
                put(fixed, *start, row, decode_i64(take(from)?).to_ne_bytes());
            }
            Cells::Float32(start) => {
                let ordered = u32::from_be_bytes(take(from)?);
                let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
                put(fixed, *start, row, bits.to_ne_bytes());
            }
            Cells::Float64(start) => {
                let ordered = u64::from_be_bytes(take(from)?);
                let bits = if ordered >> 63 == 1 { ordered & !(1 << 63) } else { !ordered };
                put(fixed, *start, row, bits.to_ne_bytes());
            }
            Cells::Decimal { start, .. } => {
                let value = (u128::from_be_bytes(take(from)?) ^ (1 << 127)) as i128;
                put(fixed, *start, row, value.to_ne_bytes());
            }
            Cells::Bytes { bytes, ends, is_text } => {
                let start = bytes.len();
                unescape(from, bytes)?;
                if *is_text && std::str::from_utf8(&bytes[start..]).is_err() {
                    return Err(DecodeError::Invalid("a string is not UTF-8"));
                }
                if bytes.len() > BYTES_MAX {
                    return Err(DecodeError::Invalid("the strings of a column exceed 2 GiB"));
                }
                ends.push(bytes.len());
            }
            Cells::Nested { values, value_type } => values.push(decode(from, value_type)?),
        }
        Ok(())
    }

    fn push_zero(&mut self, fixed: &mut [u8], row: usize) {
        match self {
            Cells::Bool(values) => values.push(false),
            Cells::Int32(start) | Cells::Float32(start) | Cells::Date(start) => put(fixed, *start, row, [0; 4]),
            Cells::Int64(start) | Cells::Float64(start) | Cells::Timestamp(start) => put(fixed, *start, row, [0; 8]),
            Cells::Decimal { start, .. } => put(fixed, *start, row, [0; 16]),
            Cells::Bytes { bytes, ends, .. } => ends.push(bytes.len()),
            Cells::Nested { values, .. } => values.push(Value::Null),
        }
    }

    fn truncate(&mut self, rows: usize) {
        match self {
            Cells::Bool(values) => values.truncate(rows),
            Cells::Bytes { bytes, ends, .. } => {
                ends.truncate(rows);
                bytes.truncate(ends.last().copied().unwrap_or(0));
            }
            Cells::Nested { values, .. } => values.truncate(rows),
            // What lies beyond the rows is written again by the next.
            _ => {}
        }
    }
}

/// Writes the value of a row of the column that begins at `start`.
fn put<const N: usize>(fixed: &mut [u8], start: usize, row: usize, bytes: [u8; N]) {
    let at = start + row * N;
    fixed[at..at + N].copy_from_slice(&bytes);
}

/// Bytes up to 0x00 0x00, where 0x00 0xFF stands for 0x00.
fn unescape(from: &mut &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    loop {
        let zero = from.iter().position(|byte| *byte == 0).ok_or(DecodeError::Truncated)?;
        out.extend_from_slice(&from[..zero]);
        let mark = *from.get(zero + 1).ok_or(DecodeError::Truncated)?;
        *from = &from[zero + 2..];
        match mark {
            0 => return Ok(()),
            0xff => out.push(0),
            _ => return Err(DecodeError::Invalid("an escape in a string is unknown")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::value::{decode_row, encode_row};

    fn types() -> Vec<Type> {
        let list = Type::List(Box::new(Type::String));
        vec![
            Type::Bool,
            Type::Int32,
            Type::Int64,
            Type::Float32,
            Type::Float64,
            Type::String,
            Type::Binary,
            Type::Timestamp,
            Type::Date,
            Type::Decimal { precision: 20, scale: 3 },
            list,
            Type::Vector(2),
        ]
    }

    fn cell(value_type: &Type) -> BoxedStrategy<Value> {
        let value = match value_type {
            Type::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
            Type::Int32 => any::<i32>().prop_map(Value::Int32).boxed(),
            Type::Int64 => any::<i64>().prop_map(Value::Int64).boxed(),
            Type::Float32 => any::<f32>().prop_map(Value::Float32).boxed(),
            Type::Float64 => any::<f64>().prop_map(Value::Float64).boxed(),
            Type::String => "[a\0\u{e9}]{0,4}".prop_map(|text| Value::String(text.into())).boxed(),
            Type::Binary => prop::collection::vec(0u8..3, 0..5).prop_map(|bytes| Value::Binary(bytes.into())).boxed(),
            Type::Timestamp => any::<i64>().prop_map(Value::Timestamp).boxed(),
            Type::Date => any::<i32>().prop_map(Value::Date).boxed(),
            Type::Decimal { .. } => (-1_000_000i128..1_000_000).prop_map(Value::Decimal).boxed(),
            Type::List(item) => prop::collection::vec(cell(item), 0..3).prop_map(Value::List).boxed(),
            _ => any::<[f32; 2]>().prop_map(|items| Value::Vector(items.to_vec().into())).boxed(),
        };
        prop_oneof![1 => Just(Value::Null), 4 => value].boxed()
    }

    fn row() -> impl Strategy<Value = Vec<Value>> {
        types().iter().map(cell).collect::<Vec<_>>()
    }

    fn encoded(row: &[Value]) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_row(row, &mut bytes);
        bytes
    }

    proptest! {
        #[test]
        fn columns_are_what_values_would_be(rows in prop::collection::vec(row(), 0..6)) {
            let types = types();
            let mut columns = Columns::new(&types, rows.len());
            for row in &rows {
                columns.push(&encoded(row)).unwrap();
            }
            prop_assert_eq!(columns.rows(), rows.len());
            for (index, array) in columns.finish().iter().enumerate() {
                let value = |row: &Vec<Value>| decode_row(&encoded(row), &types).unwrap()[index].clone();
                let expected: Vec<Value> = rows.iter().map(value).collect();
                prop_assert_eq!(array, &Value::to_array(&expected, &types[index]));
            }
        }

        #[test]
        fn a_damaged_row_leaves_no_trace(first in row(), second in row(), cut in any::<prop::sample::Index>(), flip in any::<u8>()) {
            let types = types();
            let mut columns = Columns::new(&types, 2);
            columns.push(&encoded(&first)).unwrap();
            let mut damaged = encoded(&second);
            let at = cut.index(damaged.len());
            damaged[at] ^= flip;
            for bytes in [&encoded(&second)[..at], &damaged] {
                let expected = decode_row(bytes, &types);
                match columns.push(bytes) {
                    Ok(()) => {
                        prop_assert!(expected.is_ok());
                        columns.columns.iter_mut().for_each(|column| column.truncate(1));
                        columns.rows = 1;
                    }
                    Err(error) => prop_assert_eq!(Err(error), expected),
                }
            }
            for (array, (value, value_type)) in columns.finish().iter().zip(first.iter().zip(&types)) {
                // As it is stored: canonical.
                let stored = encoded(std::slice::from_ref(value));
                let value = decode_row(&stored, std::slice::from_ref(value_type)).unwrap();
                prop_assert_eq!(array, &Value::to_array(&value, value_type));
            }
        }
    }
}
