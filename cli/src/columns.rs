//! Columns as they travel: from values to protobuf, and from protobuf to JSON for showing.

use arrow::array::Array;
use feature_defs::value::{Type, Value};
use proto::v1::column::Values;
use proto::v1::{
    BinaryValues, BoolValues, Column, DateValues, DecimalValues, DoubleValues, FloatValues, Int32Values, Int64Values,
    ListValues, MapValues, StringValues, StructValues, TimestampValues, VectorValues,
};
use serde_json::{Map, Value as Json};
use thiserror::Error;

use crate::times;

#[derive(Debug, Error)]
pub enum ColumnError {
    #[error(
        "the server answered {found} values of `{column}` where {rows} rows were asked; its build does not fit this one"
    )]
    Length { column: String, found: usize, rows: usize },
}

/// The column of an array whose Arrow type is that of `column_type`.
pub fn encode_array(name: &str, array: &dyn Array, column_type: &Type) -> Column {
    let values: Vec<Value> = (0..array.len()).map(|row| Value::from_array(array, row, column_type)).collect();
    encode(name, &values, column_type)
}

/// The column of values that are null or of `column_type`.
pub fn encode(name: &str, values: &[Value], column_type: &Type) -> Column {
    encode_all(name, &values.iter().collect::<Vec<_>>(), column_type)
}

fn encode_all(name: &str, values: &[&Value], column_type: &Type) -> Column {
    /// One value per row; rows that are null get the zero.
    macro_rules! each {
        ($variant:ident) => {
            values.iter().map(|value| if let Value::$variant(x) = value { *x } else { Default::default() }).collect()
        };
    }
    let encoded = match column_type {
        Type::Bool => Values::Bools(BoolValues { values: each!(Bool) }),
        Type::Int32 => Values::Int32s(Int32Values { values: each!(Int32) }),
        Type::Int64 => Values::Int64s(Int64Values { values: each!(Int64) }),
        Type::Float32 => Values::Floats(FloatValues { values: each!(Float32) }),
        Type::Float64 => Values::Doubles(DoubleValues { values: each!(Float64) }),
        Type::Timestamp => Values::Timestamps(TimestampValues { microseconds: each!(Timestamp) }),
        Type::Date => Values::Dates(DateValues { days: each!(Date) }),
        Type::String => {
            let text = |value: &&Value| if let Value::String(x) = value { x.to_string() } else { String::new() };
            Values::Strings(StringValues { values: values.iter().map(text).collect() })
        }
        Type::Binary => {
            let bytes = |value: &&Value| if let Value::Binary(x) = value { x.to_vec() } else { Vec::new() };
            Values::Binaries(BinaryValues { values: values.iter().map(bytes).collect() })
        }
        Type::Decimal { precision, scale } => {
            let number = |value: &&Value| if let Value::Decimal(x) = value { *x } else { 0 };
            let unscaled: Vec<u8> = values.iter().flat_map(|value| number(value).to_be_bytes()).collect();
            Values::Decimals(DecimalValues { precision: u32::from(*precision), scale: i32::from(*scale), unscaled })
        }
        Type::List(item) => {
            let items = |value: &&Value| if let Value::List(items) = value { items.len() } else { 0 };
            let lengths = values.iter().map(|value| items(value) as u32).collect();
            let all: Vec<&Value> = values
                .iter()
                .flat_map(|value| if let Value::List(items) = value { items.as_slice() } else { &[] })
                .collect();
            Values::Lists(Box::new(ListValues { lengths, items: Some(Box::new(encode_all("item", &all, item))) }))
        }
        Type::Map(value_type) => {
            let entries: Vec<&[(Box<str>, Value)]> = values
                .iter()
                .map(|value| if let Value::Map(entries) = value { entries.as_slice() } else { &[] })
                .collect();
            let keys: Vec<Value> =
                entries.iter().copied().flatten().map(|(key, _)| Value::String(key.clone())).collect();
            let items: Vec<&Value> = entries.iter().copied().flatten().map(|(_, value)| value).collect();
            Values::Maps(Box::new(MapValues {
                lengths: entries.iter().map(|entries| entries.len() as u32).collect(),
                keys: Some(Box::new(encode("key", &keys, &Type::String))),
                values: Some(Box::new(encode_all("value", &items, value_type))),
            }))
        }
        Type::Struct(fields) => {
            let field = |(index, (name, field_type)): (usize, &(String, Type))| {
                let null = &Value::Null;
                let of_field: Vec<&Value> = values
                    .iter()
                    .map(
                        |value| {
                            if let Value::Struct(values) = value { values.get(index).unwrap_or(null) } else { null }
                        },
                    )
                    .collect();
                encode_all(name, &of_field, field_type)
            };
            Values::Structs(StructValues { fields: fields.iter().enumerate().map(field).collect() })
        }
        Type::Vector(dimensions) => {
            let zeros = vec![0.0; *dimensions as usize];
            let floats = |value: &&Value| if let Value::Vector(x) = value { x.to_vec() } else { zeros.clone() };
            Values::Vectors(VectorValues { dimensions: *dimensions, values: values.iter().flat_map(floats).collect() })
        }
    };
    Column { name: name.to_owned(), validity: validity(values), values: Some(encoded) }
}

fn validity(values: &[&Value]) -> Vec<u8> {
    if values.iter().all(|value| !value.is_null()) {
        return Vec::new();
    }
    let mut bits = vec![0_u8; values.len().div_ceil(8)];
    for (row, value) in values.iter().enumerate() {
        bits[row / 8] |= u8::from(!value.is_null()) << (row % 8);
    }
    bits
}

/// One JSON value per row. NaN and the infinities, which JSON has not, are written as words.
pub fn decode(column: &Column, rows: usize) -> Result<Vec<Json>, ColumnError> {
    let mut values = match &column.values {
        None => vec![Json::Null; rows],
        Some(values) => decode_values(values)?,
    };
    if values.len() != rows {
        return Err(ColumnError::Length { column: column.name.clone(), found: values.len(), rows });
    }
    if !column.validity.is_empty() {
        for (row, value) in values.iter_mut().enumerate() {
            let byte = column.validity.get(row / 8).copied().unwrap_or(0);
            if byte >> (row % 8) & 1 == 0 {
                *value = Json::Null;
            }
        }
    }
    Ok(values)
}

fn decode_values(values: &Values) -> Result<Vec<Json>, ColumnError> {
    Ok(match values {
        Values::Bools(x) => x.values.iter().map(|x| Json::from(*x)).collect(),
        Values::Int32s(x) => x.values.iter().map(|x| Json::from(*x)).collect(),
        Values::Int64s(x) => x.values.iter().map(|x| Json::from(*x)).collect(),
        Values::Floats(x) => x.values.iter().map(|x| float32(*x)).collect(),
        Values::Doubles(x) => x.values.iter().map(|x| float(*x)).collect(),
        Values::Strings(x) => x.values.iter().map(|x| Json::from(x.as_str())).collect(),
        Values::Binaries(x) => x.values.iter().map(|x| Json::from(hexadecimal(x))).collect(),
        Values::Timestamps(x) => x.microseconds.iter().map(|x| Json::from(times::show(*x))).collect(),
        Values::Dates(x) => x.days.iter().map(|x| Json::from(date(*x))).collect(),
        Values::Decimals(x) => {
            let number = |bytes: &[u8; 16]| decimal(i128::from_be_bytes(*bytes), x.scale);
            x.unscaled.as_chunks::<16>().0.iter().map(|bytes| Json::from(number(bytes))).collect()
        }
        Values::Lists(x) => {
            let items = decode_items(x.items.as_deref(), &x.lengths)?;
            items.into_iter().map(Json::Array).collect()
        }
        Values::Maps(x) => {
            let keys = decode_items(x.keys.as_deref(), &x.lengths)?;
            let values = decode_items(x.values.as_deref(), &x.lengths)?;
            let object = |(keys, values): (Vec<Json>, Vec<Json>)| {
                let key = |key: Json| key.as_str().map(str::to_owned).unwrap_or_default();
                Json::Object(keys.into_iter().map(key).zip(values).collect::<Map<String, Json>>())
            };
            keys.into_iter().zip(values).map(object).collect()
        }
        Values::Structs(x) => {
            let rows = x.fields.first().map_or(0, rows_of);
            let fields: Vec<Vec<Json>> = x.fields.iter().map(|field| decode(field, rows)).collect::<Result<_, _>>()?;
            let object = |row: usize| {
                let named =
                    x.fields.iter().zip(&fields).map(|(field, values)| (field.name.clone(), values[row].clone()));
                Json::Object(named.collect())
            };
            (0..rows).map(object).collect()
        }
        Values::Vectors(x) => {
            let vector = |floats: &[f32]| Json::Array(floats.iter().map(|x| float32(*x)).collect());
            x.values.chunks(x.dimensions.max(1) as usize).map(vector).collect()
        }
    })
}

/// The items of each row.
fn decode_items(items: Option<&Column>, lengths: &[u32]) -> Result<Vec<Vec<Json>>, ColumnError> {
    let total = lengths.iter().map(|length| *length as usize).sum();
    let mut rest = match items {
        Some(items) => decode(items, total)?.into_iter(),
        None => vec![Json::Null; total].into_iter(),
    };
    Ok(lengths.iter().map(|length| rest.by_ref().take(*length as usize).collect()).collect())
}

/// How many rows a column says it has.
fn rows_of(column: &Column) -> usize {
    match &column.values {
        None => 0,
        Some(Values::Bools(x)) => x.values.len(),
        Some(Values::Int32s(x)) => x.values.len(),
        Some(Values::Int64s(x)) => x.values.len(),
        Some(Values::Floats(x)) => x.values.len(),
        Some(Values::Doubles(x)) => x.values.len(),
        Some(Values::Strings(x)) => x.values.len(),
        Some(Values::Binaries(x)) => x.values.len(),
        Some(Values::Timestamps(x)) => x.microseconds.len(),
        Some(Values::Dates(x)) => x.days.len(),
        Some(Values::Decimals(x)) => x.unscaled.len() / 16,
        Some(Values::Lists(x)) => x.lengths.len(),
        Some(Values::Maps(x)) => x.lengths.len(),
        Some(Values::Structs(x)) => x.fields.first().map_or(0, rows_of),
        Some(Values::Vectors(x)) => x.values.len() / x.dimensions.max(1) as usize,
    }
}

fn float(x: f64) -> Json {
    serde_json::Number::from_f64(x).map_or_else(|| Json::from(x.to_string()), Json::Number)
}

/// Through the shortest text, so that 0.1 stays 0.1.
fn float32(x: f32) -> Json {
    x.to_string().parse::<f64>().map_or_else(|_| Json::from(x.to_string()), float)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn date(days: i32) -> String {
    match chrono::NaiveDate::default().checked_add_signed(chrono::TimeDelta::days(i64::from(days))) {
        Some(date) => date.to_string(),
        None => format!("{days} days"),
    }
}

fn decimal(unscaled: i128, scale: i32) -> String {
    let Ok(scale @ 1..) = usize::try_from(scale) else { return unscaled.to_string() };
    let digits = format!("{:0>width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    format!("{}{whole}.{fraction}", if unscaled < 0 { "-" } else { "" })
}

/// A JSON value as a cell of a table: texts without quotes.
pub fn cell(value: &Json) -> String {
    match value {
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(value_type: &str, values: &[Value], expected: Json) {
        let column = encode("c", values, &Type::parse(value_type).unwrap());
        assert_eq!(rows_of(&column), values.len(), "{value_type}");
        assert_eq!(Json::Array(decode(&column, values.len()).unwrap()), expected, "{value_type}");
    }

    #[test]
    fn every_type_goes_there_and_back() {
        use Value::*;
        check("bool", &[Bool(true), Null], json!([true, null]));
        check("int32", &[Int32(-1)], json!([-1]));
        check("int64", &[Int64(i64::MAX), Null], json!([i64::MAX, null]));
        check("float32", &[Float32(0.1), Float32(f32::NAN)], json!([0.1, "NaN"]));
        check("float64", &[Float64(0.1), Float64(f64::INFINITY), Null], json!([0.1, "inf", null]));
        check("string", &[String("a".into()), Null], json!(["a", null]));
        check("binary", &[Binary([1, 255].into())], json!(["01ff"]));
        check("timestamp", &[Timestamp(1_500_000)], json!(["1970-01-01T00:00:01.500Z"]));
        check("date", &[Date(-1)], json!(["1969-12-31"]));
        check("decimal(5,2)", &[Decimal(-5), Decimal(1250)], json!(["-0.05", "12.50"]));
        check("list<int64>", &[List(vec![Int64(1), Null]), Null, List(vec![])], json!([[1, null], null, []]));
        check("map<string,int64>", &[Map(vec![("a".into(), Int64(1))]), Null], json!([{"a": 1}, null]));
        check("struct<a:int64,b:string>", &[Struct(vec![Int64(1), Null]), Null], json!([{"a": 1, "b": null}, null]));
        check("vector(2)", &[Vector([1.0, 2.5].into()), Null], json!([[1.0, 2.5], null]));
    }

    #[test]
    fn validity_is_lowest_bit_first() {
        let values: Vec<Value> = (0..9).map(|x| if x == 1 { Value::Null } else { Value::Int64(x) }).collect();
        assert_eq!(encode("c", &values, &Type::Int64).validity, vec![0b1111_1101, 1]);
        assert!(encode("c", &[Value::Int64(1)], &Type::Int64).validity.is_empty());
    }

    #[test]
    fn an_answer_of_another_length_is_noticed() {
        let column = encode("c", &[Value::Int64(1)], &Type::Int64);
        assert!(decode(&column, 2).is_err());
    }
}
