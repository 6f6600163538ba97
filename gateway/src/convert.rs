//! Columns as they travel, to and from Arrow, value for value and null for null.
//!
//! What comes in is checked against the type that the plan has for the column: nothing is cast and nothing guessed, so a
//! client learns of a wrong type where it made it. What goes out holds a zero, an empty string or an empty list where a
//! row is null, whatever lay under the null in the Arrow buffer, so that equal columns are equal bytes.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Decimal128Array, FixedSizeListArray, Float32Array, ListArray,
    MapArray, PrimitiveArray, StringArray, StructArray, TimestampMicrosecondArray, UInt64Array, new_null_array,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer};
use arrow::compute::take;
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, Decimal128Type, Field, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use feature_defs::value::{Type, Value};
use proto::v1::column::Values;
use proto::v1::{
    BinaryValues, BoolValues, Column, DateValues, DecimalValues, DoubleValues, FloatValues, Int32Values, Int64Values,
    ListValues, MapValues, StringValues, StructValues, TimestampValues, VectorValues,
};

/// Values that a column may stand for. A message is bounded in bytes, but a null vector takes no bytes on the wire and
/// all of them in memory.
const ELEMENTS_MAX: u64 = 1 << 26;

/// Why a column is not what it should be. `column` is its path: `tags.item` is the items of the list `tags`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    #[error("column `{column}` must be {expected}, but carries {found}")]
    Type { column: String, expected: String, found: String },
    #[error("column `{column}` ({expected}) has {found} values where {rows} are expected")]
    Length { column: String, expected: String, rows: usize, found: usize },
    #[error("column `{column}` ({expected}) has a validity of {found} bytes where {rows} rows take {bytes}")]
    Validity { column: String, expected: String, rows: usize, bytes: usize, found: usize },
    #[error("column `{column}` ({expected}) carries no values, and does not say that all of them are null")]
    NoValues { column: String, expected: String },
    #[error("column `{column}` ({expected}) stands for more than {ELEMENTS_MAX} values; send fewer rows")]
    TooLarge { column: String, expected: String },
    #[error("column `{column}` ({expected}): {problem}")]
    Content { column: String, expected: String, problem: String },
}

/// How many rows a column says it has; None where only its validity could tell.
pub fn rows_of(column: &Column) -> Option<usize> {
    Some(match column.values.as_ref()? {
        Values::Bools(x) => x.values.len(),
        Values::Int32s(x) => x.values.len(),
        Values::Int64s(x) => x.values.len(),
        Values::Floats(x) => x.values.len(),
        Values::Doubles(x) => x.values.len(),
        Values::Strings(x) => x.values.len(),
        Values::Binaries(x) => x.values.len(),
        Values::Timestamps(x) => x.microseconds.len(),
        Values::Dates(x) => x.days.len(),
        Values::Decimals(x) => x.unscaled.len() / 16,
        Values::Lists(x) => x.lengths.len(),
        Values::Maps(x) => x.lengths.len(),
        Values::Structs(x) => return x.fields.first().and_then(rows_of),
        Values::Vectors(x) => x.values.len() / (x.dimensions as usize).max(1),
    })
}

/// The array that a column carries, which must be of the expected type and have so many rows.
pub fn to_array(column: &Column, expected: &Type, rows: usize) -> Result<ArrayRef, ConvertError> {
    Reader { path: column.name.clone(), column, expected, rows }.read()
}

struct Reader<'a> {
    path: String,
    column: &'a Column,
    expected: &'a Type,
    rows: usize,
}

impl<'a> Reader<'a> {
    fn read(&self) -> Result<ArrayRef, ConvertError> {
        let (column, expected) = (self.path.clone(), self.expected.to_string());
        if (self.rows as u64).saturating_mul(width(self.expected)) > ELEMENTS_MAX {
            return Err(ConvertError::TooLarge { column, expected });
        }
        let nulls = self.validity()?;
        let Some(values) = &self.column.values else {
            let all_null = nulls.as_ref().is_some_and(|nulls| nulls.null_count() == self.rows);
            if all_null || self.rows == 0 {
                return Ok(new_null_array(&self.expected.arrow(), self.rows));
            }
            return Err(ConvertError::NoValues { column, expected });
        };
        match (self.expected, values) {
            (Type::Bool, Values::Bools(x)) => {
                self.length(x.values.len())?;
                Ok(Arc::new(BooleanArray::new(BooleanBuffer::from(x.values.as_slice()), nulls)))
            }
            (Type::Int32, Values::Int32s(x)) => self.primitive::<Int32Type>(&x.values, nulls),
            (Type::Int64, Values::Int64s(x)) => self.primitive::<Int64Type>(&x.values, nulls),
            (Type::Float32, Values::Floats(x)) => self.primitive::<Float32Type>(&x.values, nulls),
            (Type::Float64, Values::Doubles(x)) => self.primitive::<Float64Type>(&x.values, nulls),
            (Type::Date, Values::Dates(x)) => self.primitive::<Date32Type>(&x.days, nulls),
            (Type::Timestamp, Values::Timestamps(x)) => {
                self.length(x.microseconds.len())?;
                let times = TimestampMicrosecondArray::new(x.microseconds.clone().into(), nulls);
                Ok(Arc::new(times.with_timezone("UTC")))
            }
            (Type::String, Values::Strings(x)) => {
                self.length(x.values.len())?;
                Ok(Arc::new(present(&x.values, &nulls).map(|x| x.map(String::as_str)).collect::<StringArray>()))
            }
            (Type::Binary, Values::Binaries(x)) => {
                self.length(x.values.len())?;
                Ok(Arc::new(present(&x.values, &nulls).map(|x| x.map(Vec::as_slice)).collect::<BinaryArray>()))
            }
            (Type::Decimal { precision, scale }, Values::Decimals(x)) => self.decimals(x, *precision, *scale, nulls),
            (Type::List(item), Values::Lists(x)) => {
                let (offsets, items) = self.lengths(&x.lengths)?;
                let items = self.part("item", x.items.as_deref(), item, items)?;
                let field = Arc::new(Field::new("item", item.arrow(), true));
                Ok(Arc::new(ListArray::try_new(field, offsets, items, nulls).map_err(|error| self.arrow(error))?))
            }
            (Type::Map(value), Values::Maps(x)) => self.maps(x, value, nulls),
            (Type::Struct(fields), Values::Structs(x)) => {
                if x.fields.len() != fields.len() {
                    return Err(self.content(format!("{} fields instead of {}", x.fields.len(), fields.len())));
                }
                let mut columns = Vec::with_capacity(fields.len());
                for ((name, field_type), field) in fields.iter().zip(&x.fields) {
                    if field.name != *name {
                        return Err(self.content(format!("field `{name}` is expected where `{}` stands", field.name)));
                    }
                    columns.push(self.part(name, Some(field), field_type, self.rows)?);
                }
                let DataType::Struct(fields) = self.expected.arrow() else {
                    return Err(self.wrong_type(values));
                };
                Ok(Arc::new(StructArray::try_new(fields, columns, nulls).map_err(|error| self.arrow(error))?))
            }
            (Type::Vector(n), Values::Vectors(x)) => {
                if x.dimensions != *n {
                    return Err(self.wrong_type(values));
                }
                let found = x.values.len();
                if found != self.rows * *n as usize {
                    return Err(self.content(format!("{found} floats where {} rows take {n} each", self.rows)));
                }
                let field = Arc::new(Field::new("item", DataType::Float32, true));
                let items = Arc::new(Float32Array::from(x.values.clone()));
                let array = FixedSizeListArray::try_new(field, *n as i32, items, nulls);
                Ok(Arc::new(array.map_err(|error| self.arrow(error))?))
            }
            (_, values) => Err(self.wrong_type(values)),
        }
    }

    fn validity(&self) -> Result<Option<NullBuffer>, ConvertError> {
        let bits = &self.column.validity;
        if bits.is_empty() {
            return Ok(None);
        }
        let bytes = self.rows.div_ceil(8);
        if bits.len() != bytes {
            let (column, expected) = (self.path.clone(), self.expected.to_string());
            return Err(ConvertError::Validity { column, expected, rows: self.rows, bytes, found: bits.len() });
        }
        let bits = BooleanBuffer::new(Buffer::from(bits.as_slice()), 0, self.rows);
        Ok(Some(NullBuffer::new(bits)).filter(|nulls| nulls.null_count() > 0))
    }

    fn primitive<T: ArrowPrimitiveType>(
        &self,
        values: &[T::Native],
        nulls: Option<NullBuffer>,
    ) -> Result<ArrayRef, ConvertError> {
        self.length(values.len())?;
        Ok(Arc::new(PrimitiveArray::<T>::new(values.to_vec().into(), nulls)))
    }

    fn decimals(
        &self,
        decimals: &DecimalValues,
        precision: u8,
        scale: i8,
        nulls: Option<NullBuffer>,
    ) -> Result<ArrayRef, ConvertError> {
        if (decimals.precision, decimals.scale) != (u32::from(precision), i32::from(scale)) {
            return Err(self.wrong_type(&Values::Decimals(decimals.clone())));
        }
        let (unscaled, rest) = decimals.unscaled.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(self.content(format!("{} bytes are no whole number of 16", decimals.unscaled.len())));
        }
        self.length(unscaled.len())?;
        let unscaled: Vec<i128> = unscaled.iter().map(|bytes| i128::from_be_bytes(*bytes)).collect();
        // A parsed decimal type has at most 38 digits, and ten to the 38th fits.
        let bound = 10u128.pow(u32::from(precision));
        let valid = |row: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
        if let Some(row) = (0..unscaled.len()).find(|row| valid(*row) && unscaled[*row].unsigned_abs() >= bound) {
            return Err(self.content(format!("the value of row {row} has more than {precision} digits")));
        }
        let array = Decimal128Array::new(unscaled.into(), nulls);
        Ok(Arc::new(array.with_precision_and_scale(precision, scale).map_err(|error| self.arrow(error))?))
    }

    fn maps(&self, maps: &MapValues, value: &Type, nulls: Option<NullBuffer>) -> Result<ArrayRef, ConvertError> {
        let (offsets, entries) = self.lengths(&maps.lengths)?;
        let keys = self.part("key", maps.keys.as_deref(), &Type::String, entries)?;
        let values = self.part("value", maps.values.as_deref(), value, entries)?;
        if keys.null_count() > 0 {
            return Err(self.content("a key is null".to_owned()));
        }
        let DataType::Map(field, _) = self.expected.arrow() else {
            return Err(self.content("it is no map".to_owned()));
        };
        let DataType::Struct(fields) = field.data_type().clone() else {
            return Err(self.content("it is no map".to_owned()));
        };
        let entries = StructArray::try_new(fields, vec![keys, values], None).map_err(|error| self.arrow(error))?;
        let array = MapArray::try_new(field, offsets, entries, nulls, false).map_err(|error| self.arrow(error))?;
        // Entries are kept sorted by key, so that equal maps are equal bytes.
        let sorted: Vec<Value> = (0..self.rows).map(|row| Value::from_array(&array, row, self.expected)).collect();
        for (row, value) in sorted.iter().enumerate() {
            if let Value::Map(pairs) = value
                && let Some(pair) = pairs.windows(2).find(|pair| pair[0].0 == pair[1].0)
            {
                let key = feature_defs::diagnose::shown(&pair[0].0);
                return Err(self.content(format!("row {row} has the key `{key}` twice")));
            }
        }
        Ok(Value::to_array(&sorted, self.expected))
    }

    /// Offsets of lists of these lengths, and the number of their items.
    fn lengths(&self, lengths: &[u32]) -> Result<(OffsetBuffer<i32>, usize), ConvertError> {
        self.length(lengths.len())?;
        let items: u64 = lengths.iter().map(|length| u64::from(*length)).sum();
        if items > ELEMENTS_MAX {
            return Err(ConvertError::TooLarge { column: self.path.clone(), expected: self.expected.to_string() });
        }
        let offsets = OffsetBuffer::from_lengths(lengths.iter().map(|length| *length as usize));
        Ok((offsets, items as usize))
    }

    fn part(&self, name: &str, part: Option<&Column>, expected: &Type, rows: usize) -> Result<ArrayRef, ConvertError> {
        let absent = Column::default();
        let column = part.unwrap_or(&absent);
        Reader { path: format!("{}.{name}", self.path), column, expected, rows }.read()
    }

    fn length(&self, found: usize) -> Result<(), ConvertError> {
        if found == self.rows {
            return Ok(());
        }
        let (column, expected) = (self.path.clone(), self.expected.to_string());
        Err(ConvertError::Length { column, expected, rows: self.rows, found })
    }

    fn wrong_type(&self, found: &Values) -> ConvertError {
        ConvertError::Type { column: self.path.clone(), expected: self.expected.to_string(), found: kind_of(found) }
    }

    fn content(&self, problem: String) -> ConvertError {
        ConvertError::Content { column: self.path.clone(), expected: self.expected.to_string(), problem }
    }

    fn arrow(&self, error: arrow::error::ArrowError) -> ConvertError {
        self.content(error.to_string())
    }
}

/// Values that one row of a type takes at the least.
fn width(expected: &Type) -> u64 {
    match expected {
        Type::Vector(n) => u64::from(*n),
        Type::Struct(fields) => fields.iter().map(|(_, field)| width(field)).fold(0, u64::saturating_add),
        _ => 1,
    }
}

fn present<'a, T>(values: &'a [T], nulls: &'a Option<NullBuffer>) -> impl Iterator<Item = Option<&'a T>> {
    let valid = |row: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
    values.iter().enumerate().map(move |(row, value)| valid(row).then_some(value))
}

/// What a column carries, in the words of definitions.
fn kind_of(values: &Values) -> String {
    match values {
        Values::Bools(_) => "bool".into(),
        Values::Int32s(_) => "int32".into(),
        Values::Int64s(_) => "int64".into(),
        Values::Floats(_) => "float32".into(),
        Values::Doubles(_) => "float64".into(),
        Values::Strings(_) => "string".into(),
        Values::Binaries(_) => "binary".into(),
        Values::Timestamps(_) => "timestamp".into(),
        Values::Dates(_) => "date".into(),
        Values::Decimals(x) => format!("decimal({},{})", x.precision, x.scale),
        Values::Lists(_) => "a list".into(),
        Values::Maps(_) => "a map".into(),
        Values::Structs(_) => "a struct".into(),
        Values::Vectors(x) => format!("vector({})", x.dimensions),
    }
}

/// The column that carries an array, whose Arrow type is that of `value_type`.
pub fn from_array(name: &str, array: &dyn Array, value_type: &Type) -> Column {
    let values = match value_type {
        Type::Bool => {
            let array = array.as_boolean();
            let values = (0..array.len()).map(|row| array.is_valid(row) && array.value(row)).collect();
            Values::Bools(BoolValues { values })
        }
        Type::Int32 => Values::Int32s(Int32Values { values: zeroed::<Int32Type>(array) }),
        Type::Int64 => Values::Int64s(Int64Values { values: zeroed::<Int64Type>(array) }),
        Type::Float32 => Values::Floats(FloatValues { values: zeroed::<Float32Type>(array) }),
        Type::Float64 => Values::Doubles(DoubleValues { values: zeroed::<Float64Type>(array) }),
        Type::Date => Values::Dates(DateValues { days: zeroed::<Date32Type>(array) }),
        Type::Timestamp => {
            Values::Timestamps(TimestampValues { microseconds: zeroed::<TimestampMicrosecondType>(array) })
        }
        Type::String => {
            let values = array.as_string::<i32>().iter().map(|x| x.unwrap_or_default().to_owned()).collect();
            Values::Strings(StringValues { values })
        }
        Type::Binary => {
            let values = array.as_binary::<i32>().iter().map(|x| x.unwrap_or_default().to_vec()).collect();
            Values::Binaries(BinaryValues { values })
        }
        Type::Decimal { precision, scale } => {
            let unscaled = zeroed::<Decimal128Type>(array).into_iter().flat_map(i128::to_be_bytes).collect::<Vec<u8>>();
            Values::Decimals(DecimalValues { precision: u32::from(*precision), scale: i32::from(*scale), unscaled })
        }
        Type::List(item) => {
            let list = array.as_list::<i32>();
            let (lengths, rows) = ranges(list.offsets(), list.nulls());
            let items = from_array("item", &picked(list.values(), &rows), item);
            Values::Lists(Box::new(ListValues { lengths, items: Some(Box::new(items)) }))
        }
        Type::Map(value) => {
            let map = array.as_map();
            let (lengths, rows) = ranges(map.offsets(), map.nulls());
            let keys = from_array("key", &picked(map.keys(), &rows), &Type::String);
            let values = from_array("value", &picked(map.values(), &rows), value);
            Values::Maps(Box::new(MapValues { lengths, keys: Some(Box::new(keys)), values: Some(Box::new(values)) }))
        }
        Type::Struct(fields) => {
            let structs = array.as_struct();
            // The fields of a null row are null as well.
            let columns = fields.iter().enumerate().map(|(i, (name, field_type))| {
                let column = structs.column(i);
                let nulls = NullBuffer::union(structs.nulls(), column.nulls());
                let data = column.to_data().into_builder().nulls(nulls).build();
                match data {
                    Ok(data) => from_array(name, &arrow::array::make_array(data), field_type),
                    // Nulls of the same length always fit.
                    Err(_) => from_array(name, column, field_type),
                }
            });
            Values::Structs(StructValues { fields: columns.collect() })
        }
        Type::Vector(n) => {
            let vectors = array.as_fixed_size_list();
            let width = *n as usize;
            let mut values = Vec::with_capacity(vectors.len() * width);
            for row in 0..vectors.len() {
                if vectors.is_valid(row) {
                    values.extend_from_slice(vectors.value(row).as_primitive::<Float32Type>().values());
                } else {
                    values.extend(std::iter::repeat_n(0.0, width));
                }
            }
            Values::Vectors(VectorValues { dimensions: *n, values })
        }
    };
    Column { name: name.to_owned(), validity: validity_of(array), values: Some(values) }
}

/// The bits of the rows that are present, lowest first; none where no row is null.
pub fn validity_of(array: &dyn Array) -> Vec<u8> {
    let Some(nulls) = array.nulls().filter(|nulls| nulls.null_count() > 0) else { return Vec::new() };
    let mut bits = vec![0u8; array.len().div_ceil(8)];
    nulls.valid_indices().for_each(|row| bits[row / 8] |= 1 << (row % 8));
    bits
}

fn zeroed<T: ArrowPrimitiveType>(array: &dyn Array) -> Vec<T::Native> {
    let array = array.as_primitive::<T>();
    match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => array.values().to_vec(),
        Some(_) => array.iter().map(Option::unwrap_or_default).collect(),
    }
}

/// Lengths of lists and the places of their items, without whatever lies under a null.
fn ranges(offsets: &OffsetBuffer<i32>, nulls: Option<&NullBuffer>) -> (Vec<u32>, Vec<u64>) {
    let mut lengths = Vec::with_capacity(offsets.len().saturating_sub(1));
    let mut places = Vec::new();
    for (row, pair) in offsets.windows(2).enumerate() {
        let valid = nulls.is_none_or(|nulls| nulls.is_valid(row));
        let range = if valid { pair[0] as u64..pair[1] as u64 } else { 0..0 };
        lengths.push((range.end - range.start) as u32);
        places.extend(range);
    }
    (lengths, places)
}

fn picked(values: &ArrayRef, places: &[u64]) -> ArrayRef {
    let places = UInt64Array::from(places.to_vec());
    // The places come from the array's own offsets.
    take(values, &places, None).expect("the items of a list are inside its values")
}

#[cfg(test)]
mod tests;
