//! Types, single values, and the one canonical encoding of a value.
//!
//! The canonical encoding is what keys, stored rows and file-row tie order are made of, so it never changes for a
//! released format. It is *memcomparable*: for two non-null values of one type, comparing the encoded bytes compares the
//! values (numbers by size, NaN greatest, strings by bytes). It is also self-delimiting, so `("1", "23")` and
//! `("12", "3")` differ.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType as ArrowType, Field, Fields, TimeUnit};
use serde::{Deserialize, Serialize};

mod cells;

pub use cells::{Cells, encode_cells};

/// The type of a key, a feature or a request field. Each maps to exactly one Arrow type.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Type {
    Bool,
    Int32,
    Int64,
    Float32,
    Float64,
    String,
    Binary,
    /// Microseconds since 1970-01-01T00:00:00Z.
    Timestamp,
    /// Days since 1970-01-01.
    Date,
    Decimal {
        precision: u8,
        scale: i8,
    },
    List(Box<Type>),
    /// Keys are strings; entries are kept sorted by key.
    Map(Box<Type>),
    Struct(Vec<(String, Type)>),
    /// A fixed number of float32 elements, none of them null.
    Vector(u32),
}

/// Why a text is not a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a type")]
pub struct TypeError {
    pub text: String,
    /// The nearest type name, when one is near.
    pub nearest: Option<&'static str>,
}

/// Names a user may write, for suggestions.
pub const TYPE_NAMES: [&str; 14] = [
    "bool",
    "int32",
    "int64",
    "float32",
    "float64",
    "string",
    "binary",
    "timestamp",
    "date",
    "decimal(18,2)",
    "list<float64>",
    "map<string,float64>",
    "struct<name:string>",
    "vector(16)",
];

impl Type {
    /// Parses `float64`, `decimal(18,2)`, `list<int64>`, `map<string,float64>`, `struct<a:int64,b:string>`, `vector(16)`.
    pub fn parse(text: &str) -> Result<Type, TypeError> {
        let mut parser = TypeParser { text, rest: text.trim() };
        let parsed = parser.parse().filter(|_| parser.rest.trim().is_empty());
        parsed.ok_or_else(|| TypeError { text: text.to_string(), nearest: nearest_type(text) })
    }

    pub fn arrow(&self) -> ArrowType {
        match self {
            Type::Bool => ArrowType::Boolean,
            Type::Int32 => ArrowType::Int32,
            Type::Int64 => ArrowType::Int64,
            Type::Float32 => ArrowType::Float32,
            Type::Float64 => ArrowType::Float64,
            Type::String => ArrowType::Utf8,
            Type::Binary => ArrowType::Binary,
            Type::Timestamp => ArrowType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Type::Date => ArrowType::Date32,
            Type::Decimal { precision, scale } => ArrowType::Decimal128(*precision, *scale),
            Type::List(item) => ArrowType::List(Arc::new(Field::new("item", item.arrow(), true))),
            Type::Map(value) => {
                let entries = Fields::from(vec![
                    Field::new("key", ArrowType::Utf8, false),
                    Field::new("value", value.arrow(), true),
                ]);
                ArrowType::Map(Arc::new(Field::new("entries", ArrowType::Struct(entries), false)), false)
            }
            Type::Struct(fields) => ArrowType::Struct(struct_fields(fields)),
            Type::Vector(n) => {
                ArrowType::FixedSizeList(Arc::new(Field::new("item", ArrowType::Float32, true)), *n as i32)
            }
        }
    }

    /// The type that holds every value of an Arrow type, for columns and expressions whose type nobody declared.
    pub fn from_arrow(arrow: &ArrowType) -> Option<Type> {
        Some(match arrow {
            ArrowType::Boolean => Type::Bool,
            ArrowType::Int8 | ArrowType::Int16 | ArrowType::Int32 | ArrowType::UInt8 | ArrowType::UInt16 => Type::Int32,
            ArrowType::Int64 | ArrowType::UInt32 | ArrowType::UInt64 => Type::Int64,
            ArrowType::Float16 | ArrowType::Float32 => Type::Float32,
            ArrowType::Float64 => Type::Float64,
            ArrowType::Utf8 | ArrowType::LargeUtf8 | ArrowType::Utf8View => Type::String,
            ArrowType::Dictionary(_, value) => Type::from_arrow(value)?,
            ArrowType::Binary | ArrowType::LargeBinary | ArrowType::BinaryView | ArrowType::FixedSizeBinary(_) => {
                Type::Binary
            }
            ArrowType::Timestamp(_, _) => Type::Timestamp,
            ArrowType::Date32 | ArrowType::Date64 => Type::Date,
            ArrowType::Decimal32(p, s) | ArrowType::Decimal64(p, s) | ArrowType::Decimal128(p, s) => {
                Type::Decimal { precision: *p, scale: *s }
            }
            ArrowType::List(item) | ArrowType::LargeList(item) => {
                Type::List(Box::new(Type::from_arrow(item.data_type())?))
            }
            ArrowType::FixedSizeList(item, n) if *item.data_type() == ArrowType::Float32 => Type::Vector(*n as u32),
            ArrowType::Struct(fields) => Type::Struct(
                fields
                    .iter()
                    .map(|field| Some((field.name().clone(), Type::from_arrow(field.data_type())?)))
                    .collect::<Option<_>>()?,
            ),
            ArrowType::Map(entries, _) => match entries.data_type() {
                ArrowType::Struct(fields) if fields.len() == 2 => {
                    Type::Map(Box::new(Type::from_arrow(fields[1].data_type())?))
                }
                _ => return None,
            },
            _ => return None,
        })
    }

    /// Whether an entity key may have this type. Floats are refused: equality of floats is not what people mean by a key.
    pub fn is_key(&self) -> bool {
        matches!(self, Type::Int64 | Type::String | Type::Bool | Type::Binary)
    }

    pub fn is_float(&self) -> bool {
        matches!(self, Type::Float32 | Type::Float64)
    }

    pub fn is_numeric(&self) -> bool {
        matches!(self, Type::Int32 | Type::Int64 | Type::Float32 | Type::Float64 | Type::Decimal { .. })
    }
}

fn struct_fields(fields: &[(String, Type)]) -> Fields {
    fields.iter().map(|(name, field_type)| Field::new(name, field_type.arrow(), true)).collect()
}

fn nearest_type(text: &str) -> Option<&'static str> {
    let stem = |name: &'static str| name.split(['(', '<']).next().unwrap_or(name);
    let wanted = text.split(['(', '<']).next().unwrap_or(text).to_ascii_lowercase();
    let synonym = match wanted.as_str() {
        "int" | "integer" | "bigint" | "long" => Some("int64"),
        "float" | "double" | "number" => Some("float64"),
        "str" | "text" | "varchar" => Some("string"),
        "boolean" => Some("bool"),
        "bytes" => Some("binary"),
        "datetime" => Some("timestamp"),
        _ => None,
    };
    synonym.or_else(|| {
        TYPE_NAMES
            .into_iter()
            .map(|name| (strsim::damerau_levenshtein(&wanted, stem(name)), name))
            .min()
            .filter(|(distance, _)| *distance <= 2)
            .map(|(_, name)| name)
    })
}

struct TypeParser<'a> {
    text: &'a str,
    rest: &'a str,
}

impl TypeParser<'_> {
    fn parse(&mut self) -> Option<Type> {
        let name = self.word();
        let simple = match name {
            "bool" => Some(Type::Bool),
            "int32" => Some(Type::Int32),
            "int64" => Some(Type::Int64),
            "float32" => Some(Type::Float32),
            "float64" => Some(Type::Float64),
            "string" => Some(Type::String),
            "binary" => Some(Type::Binary),
            "timestamp" => Some(Type::Timestamp),
            "date" => Some(Type::Date),
            _ => None,
        };
        if simple.is_some() {
            return simple;
        }
        match name {
            "decimal" => {
                self.eat('(')?;
                let precision: u8 = self.word().parse().ok().filter(|p| (1..=38).contains(p))?;
                let scale = if self.eat(',').is_some() { self.word().parse().ok()? } else { 0 };
                self.eat(')')?;
                (0..=precision as i8).contains(&scale).then_some(Type::Decimal { precision, scale })
            }
            "vector" => {
                self.eat('(')?;
                let n: u32 = self.word().parse().ok().filter(|n| (1..=65_536).contains(n))?;
                self.eat(')')?;
                Some(Type::Vector(n))
            }
            "list" => {
                self.eat('<')?;
                let item = self.parse()?;
                self.eat('>')?;
                Some(Type::List(Box::new(item)))
            }
            "map" => {
                self.eat('<')?;
                (self.parse()? == Type::String).then_some(())?;
                self.eat(',')?;
                let value = self.parse()?;
                self.eat('>')?;
                Some(Type::Map(Box::new(value)))
            }
            "struct" => {
                self.eat('<')?;
                let mut fields: Vec<(String, Type)> = Vec::new();
                loop {
                    let field = self.word().to_string();
                    if field.is_empty() || fields.iter().any(|(name, _)| *name == field) {
                        return None;
                    }
                    self.eat(':')?;
                    fields.push((field, self.parse()?));
                    if self.eat(',').is_none() {
                        break;
                    }
                }
                self.eat('>')?;
                Some(Type::Struct(fields))
            }
            _ => None,
        }
    }

    fn word(&mut self) -> &str {
        let rest = self.rest.trim_start();
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        self.rest = &rest[end..];
        debug_assert!(self.text.len() >= self.rest.len());
        &rest[..end]
    }

    fn eat(&mut self, wanted: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(wanted)?;
        Some(())
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Bool => f.write_str("bool"),
            Type::Int32 => f.write_str("int32"),
            Type::Int64 => f.write_str("int64"),
            Type::Float32 => f.write_str("float32"),
            Type::Float64 => f.write_str("float64"),
            Type::String => f.write_str("string"),
            Type::Binary => f.write_str("binary"),
            Type::Timestamp => f.write_str("timestamp"),
            Type::Date => f.write_str("date"),
            Type::Decimal { precision, scale } => write!(f, "decimal({precision},{scale})"),
            Type::List(item) => write!(f, "list<{item}>"),
            Type::Map(value) => write!(f, "map<string,{value}>"),
            Type::Struct(fields) => {
                f.write_str("struct<")?;
                for (i, (name, field_type)) in fields.iter().enumerate() {
                    write!(f, "{}{name}:{field_type}", if i == 0 { "" } else { "," })?;
                }
                f.write_str(">")
            }
            Type::Vector(n) => write!(f, "vector({n})"),
        }
    }
}

impl From<Type> for String {
    fn from(value: Type) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for Type {
    type Error = TypeError;
    fn try_from(text: String) -> Result<Type, TypeError> {
        Type::parse(&text)
    }
}

/// One value. Floats in a `Value` are canonical: one NaN, no -0.0 (see [`canonical_f64`]).
#[derive(Debug, Clone)]
pub enum Value {
    Null,
    Bool(bool),
    Int32(i32),
    Int64(i64),
    Float32(f32),
    Float64(f64),
    String(Box<str>),
    Binary(Box<[u8]>),
    Timestamp(i64),
    Date(i32),
    Decimal(i128),
    List(Vec<Value>),
    Map(Vec<(Box<str>, Value)>),
    Struct(Vec<Value>),
    Vector(Box<[f32]>),
}

/// Equality is equality of bits after canonicalisation, so NaN equals NaN: this is what "the same value" means here.
impl PartialEq for Value {
    fn eq(&self, other: &Value) -> bool {
        self.compare(other) == Ordering::Equal && std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}
impl Eq for Value {}

impl Value {
    pub fn is_null(&self) -> bool {
        matches!(self, Value::Null)
    }

    /// Total order among values of one type; null lowest, NaN greatest among floats.
    pub fn compare(&self, other: &Value) -> Ordering {
        use Value::*;
        match (self, other) {
            (Null, Null) => Ordering::Equal,
            (Null, _) => Ordering::Less,
            (_, Null) => Ordering::Greater,
            (Bool(a), Bool(b)) => a.cmp(b),
            (Int32(a), Int32(b)) | (Date(a), Date(b)) => a.cmp(b),
            (Int64(a), Int64(b)) | (Timestamp(a), Timestamp(b)) => a.cmp(b),
            (Float32(a), Float32(b)) => canonical_f32(*a).total_cmp(&canonical_f32(*b)),
            (Float64(a), Float64(b)) => canonical_f64(*a).total_cmp(&canonical_f64(*b)),
            (String(a), String(b)) => a.cmp(b),
            (Binary(a), Binary(b)) => a.cmp(b),
            (Decimal(a), Decimal(b)) => a.cmp(b),
            (List(a), List(b)) | (Struct(a), Struct(b)) => compare_all(a.iter(), b.iter(), Value::compare),
            (Map(a), Map(b)) => {
                compare_all(a.iter(), b.iter(), |(ka, va), (kb, vb)| ka.cmp(kb).then_with(|| va.compare(vb)))
            }
            (Vector(a), Vector(b)) => {
                compare_all(a.iter(), b.iter(), |x, y| canonical_f32(*x).total_cmp(&canonical_f32(*y)))
            }
            (a, b) => a.rank().cmp(&b.rank()),
        }
    }

    fn rank(&self) -> u8 {
        match self {
            Value::Null => 0,
            Value::Bool(_) => 1,
            Value::Int32(_) => 2,
            Value::Int64(_) => 3,
            Value::Float32(_) => 4,
            Value::Float64(_) => 5,
            Value::String(_) => 6,
            Value::Binary(_) => 7,
            Value::Timestamp(_) => 8,
            Value::Date(_) => 9,
            Value::Decimal(_) => 10,
            Value::List(_) => 11,
            Value::Map(_) => 12,
            Value::Struct(_) => 13,
            Value::Vector(_) => 14,
        }
    }

    /// The value at `row` of an array whose Arrow type is that of `value_type`.
    pub fn from_array(array: &dyn Array, row: usize, value_type: &Type) -> Value {
        if array.is_null(row) {
            return Value::Null;
        }
        match value_type {
            Type::Bool => Value::Bool(array.as_boolean().value(row)),
            Type::Int32 => Value::Int32(array.as_primitive::<arrow::datatypes::Int32Type>().value(row)),
            Type::Int64 => Value::Int64(array.as_primitive::<arrow::datatypes::Int64Type>().value(row)),
            Type::Float32 => {
                Value::Float32(canonical_f32(array.as_primitive::<arrow::datatypes::Float32Type>().value(row)))
            }
            Type::Float64 => {
                Value::Float64(canonical_f64(array.as_primitive::<arrow::datatypes::Float64Type>().value(row)))
            }
            Type::String => Value::String(array.as_string::<i32>().value(row).into()),
            Type::Binary => Value::Binary(array.as_binary::<i32>().value(row).into()),
            Type::Timestamp => {
                Value::Timestamp(array.as_primitive::<arrow::datatypes::TimestampMicrosecondType>().value(row))
            }
            Type::Date => Value::Date(array.as_primitive::<arrow::datatypes::Date32Type>().value(row)),
            Type::Decimal { .. } => Value::Decimal(array.as_primitive::<arrow::datatypes::Decimal128Type>().value(row)),
            Type::List(item) => {
                let items = array.as_list::<i32>().value(row);
                Value::List((0..items.len()).map(|i| Value::from_array(&items, i, item)).collect())
            }
            Type::Map(value) => {
                let entries = array.as_map().value(row);
                let keys = entries.column(0).as_string::<i32>();
                let mut pairs: Vec<(Box<str>, Value)> = (0..entries.len())
                    .map(|i| (keys.value(i).into(), Value::from_array(entries.column(1), i, value)))
                    .collect();
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                Value::Map(pairs)
            }
            Type::Struct(fields) => {
                let columns = array.as_struct();
                Value::Struct(
                    fields
                        .iter()
                        .enumerate()
                        .map(|(i, (_, field_type))| Value::from_array(columns.column(i), row, field_type))
                        .collect(),
                )
            }
            Type::Vector(_) => {
                let items = array.as_fixed_size_list().value(row);
                let items = items.as_primitive::<arrow::datatypes::Float32Type>();
                Value::Vector(items.values().iter().map(|x| canonical_f32(*x)).collect())
            }
        }
    }

    /// Builds one Arrow array of a column of values. Every value is null or of `value_type`.
    pub fn to_array<'a>(values: impl IntoIterator<Item = &'a Value>, value_type: &Type) -> ArrayRef {
        let values: Vec<&Value> = values.into_iter().collect();
        macro_rules! scalar {
            ($array:ty, $variant:ident) => {
                Arc::new(
                    values
                        .iter()
                        .map(|v| if let Value::$variant(x) = v { Some(x.clone()) } else { None })
                        .collect::<$array>(),
                )
            };
        }
        match value_type {
            Type::Bool => scalar!(BooleanArray, Bool),
            Type::Int32 => scalar!(Int32Array, Int32),
            Type::Int64 => scalar!(Int64Array, Int64),
            Type::Float32 => scalar!(Float32Array, Float32),
            Type::Float64 => scalar!(Float64Array, Float64),
            Type::Date => scalar!(Date32Array, Date),
            Type::String => Arc::new(
                values
                    .iter()
                    .map(|v| if let Value::String(x) = v { Some(&**x) } else { None })
                    .collect::<StringArray>(),
            ),
            Type::Binary => Arc::new(
                values
                    .iter()
                    .map(|v| if let Value::Binary(x) = v { Some(&**x) } else { None })
                    .collect::<BinaryArray>(),
            ),
            Type::Timestamp => Arc::new(
                values
                    .iter()
                    .map(|v| if let Value::Timestamp(x) = v { Some(*x) } else { None })
                    .collect::<TimestampMicrosecondArray>()
                    .with_timezone("UTC"),
            ),
            Type::Decimal { precision, scale } => Arc::new(
                values
                    .iter()
                    .map(|v| if let Value::Decimal(x) = v { Some(*x) } else { None })
                    .collect::<Decimal128Array>()
                    .with_precision_and_scale(*precision, *scale)
                    .expect("a parsed decimal type has a valid precision and scale"),
            ),
            Type::List(item) => {
                let lists = values.iter().map(|v| if let Value::List(x) = v { x.as_slice() } else { &[] });
                let offsets = OffsetBuffer::from_lengths(lists.clone().map(<[Value]>::len));
                let items = Value::to_array(lists.flatten().collect::<Vec<_>>(), item);
                let field = Arc::new(Field::new("item", item.arrow(), true));
                Arc::new(ListArray::new(field, offsets, items, nulls_of(&values)))
            }
            Type::Map(value) => {
                let maps = values.iter().map(|v| if let Value::Map(x) = v { x.as_slice() } else { &[] });
                let offsets = OffsetBuffer::from_lengths(maps.clone().map(<[(Box<str>, Value)]>::len));
                let keys: StringArray = maps.clone().flatten().map(|(key, _)| Some(&**key)).collect();
                let items = Value::to_array(maps.flatten().map(|(_, value)| value).collect::<Vec<_>>(), value);
                let ArrowType::Map(entries_field, _) = value_type.arrow() else {
                    unreachable!("a map's Arrow type is a map")
                };
                let ArrowType::Struct(fields) = entries_field.data_type().clone() else {
                    unreachable!("map entries are a struct")
                };
                let entries = StructArray::new(fields, vec![Arc::new(keys), items], None);
                Arc::new(MapArray::new(entries_field, offsets, entries, nulls_of(&values), false))
            }
            Type::Struct(fields) => {
                let columns: Vec<ArrayRef> = fields
                    .iter()
                    .enumerate()
                    .map(|(i, (_, field_type))| {
                        let column = values.iter().map(|v| if let Value::Struct(x) = v { &x[i] } else { &Value::Null });
                        Value::to_array(column.collect::<Vec<_>>(), field_type)
                    })
                    .collect();
                Arc::new(StructArray::new(struct_fields(fields), columns, nulls_of(&values)))
            }
            Type::Vector(n) => {
                let mut items: Vec<f32> = Vec::with_capacity(values.len() * *n as usize);
                for value in &values {
                    match value {
                        Value::Vector(x) => items.extend_from_slice(x),
                        _ => items.extend(std::iter::repeat_n(0.0, *n as usize)),
                    }
                }
                let field = Arc::new(Field::new("item", ArrowType::Float32, true));
                Arc::new(FixedSizeListArray::new(
                    field,
                    *n as i32,
                    Arc::new(Float32Array::from(items)),
                    nulls_of(&values),
                ))
            }
        }
    }
}

fn nulls_of(values: &[&Value]) -> Option<NullBuffer> {
    Some(NullBuffer::from_iter(values.iter().map(|v| !v.is_null())))
}

fn compare_all<T>(
    mut a: impl Iterator<Item = T>,
    mut b: impl Iterator<Item = T>,
    compare: impl Fn(T, T) -> Ordering,
) -> Ordering {
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (None, _) => return Ordering::Less,
            (_, None) => return Ordering::Greater,
            (Some(x), Some(y)) => match compare(x, y) {
                Ordering::Equal => {}
                unequal => return unequal,
            },
        }
    }
}

/// The one NaN (positive, quiet, no payload), and 0.0 for -0.0.
#[inline]
pub fn canonical_f64(x: f64) -> f64 {
    if x.is_nan() { f64::from_bits(0x7ff8_0000_0000_0000) } else { x + 0.0 }
}

/// See [`canonical_f64`].
#[inline]
pub fn canonical_f32(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x + 0.0 }
}

/// Why bytes are not a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the bytes end too early")]
    Truncated,
    #[error("{0} bytes are left over")]
    Trailing(usize),
    #[error("format version {found} is not known here (newest known: {newest})")]
    Version { found: u8, newest: u8 },
    #[error("{0}")]
    Invalid(&'static str),
}

/// Appends the canonical encoding of a non-null value. A null is the caller's to mark (a bitmap bit, or [`encode_nullable`]).
pub fn encode(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Null => unreachable!("nulls are marked by the caller, never encoded"),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::Int32(x) | Value::Date(x) => out.extend_from_slice(&((*x as u32) ^ (1 << 31)).to_be_bytes()),
        Value::Int64(x) | Value::Timestamp(x) => out.extend_from_slice(&encode_i64(*x)),
        Value::Float32(x) => {
            let bits = canonical_f32(*x).to_bits();
            let ordered = if bits >> 31 == 1 { !bits } else { bits | (1 << 31) };
            out.extend_from_slice(&ordered.to_be_bytes());
        }
        Value::Float64(x) => {
            let bits = canonical_f64(*x).to_bits();
            let ordered = if bits >> 63 == 1 { !bits } else { bits | (1 << 63) };
            out.extend_from_slice(&ordered.to_be_bytes());
        }
        Value::Decimal(x) => out.extend_from_slice(&((*x as u128) ^ (1 << 127)).to_be_bytes()),
        Value::String(x) => encode_bytes(x.as_bytes(), out),
        Value::Binary(x) => encode_bytes(x, out),
        Value::List(items) => {
            for item in items {
                out.push(1);
                encode_nullable(item, out);
            }
            out.push(0);
        }
        Value::Map(pairs) => {
            for (key, value) in pairs {
                out.push(1);
                encode_bytes(key.as_bytes(), out);
                encode_nullable(value, out);
            }
            out.push(0);
        }
        Value::Struct(fields) => fields.iter().for_each(|field| encode_nullable(field, out)),
        Value::Vector(items) => items.iter().for_each(|x| encode(&Value::Float32(*x), out)),
    }
}

/// 0 for null, else 1 and the value: null sorts lowest.
pub fn encode_nullable(value: &Value, out: &mut Vec<u8>) {
    out.push(u8::from(!value.is_null()));
    if !value.is_null() {
        encode(value, out);
    }
}

/// FNV-1a of 64 bits, finished by murmur3's 64-bit mixer: the one hash of canonical encodings. Fixed for ever, since
/// stored states and expressions depend on it.
pub fn hash(bytes: &[u8]) -> u64 {
    let mut h =
        bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// An i64 as eight bytes that sort like the number.
pub fn encode_i64(x: i64) -> [u8; 8] {
    ((x as u64) ^ (1 << 63)).to_be_bytes()
}

pub fn decode_i64(bytes: [u8; 8]) -> i64 {
    (u64::from_be_bytes(bytes) ^ (1 << 63)) as i64
}

/// 0x00 is escaped as 0x00 0xFF; 0x00 0x00 ends the value.
fn encode_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    for byte in bytes {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 0]);
}

/// Reads one value of `value_type` from the front of `bytes`.
pub fn decode(bytes: &mut &[u8], value_type: &Type) -> Result<Value, DecodeError> {
    Ok(match value_type {
        Type::Bool => match take::<1>(bytes)?[0] {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            _ => return Err(DecodeError::Invalid("a bool is neither 0 nor 1")),
        },
        Type::Int32 => Value::Int32((u32::from_be_bytes(take(bytes)?) ^ (1 << 31)) as i32),
        Type::Date => Value::Date((u32::from_be_bytes(take(bytes)?) ^ (1 << 31)) as i32),
        Type::Int64 => Value::Int64(decode_i64(take(bytes)?)),
        Type::Timestamp => Value::Timestamp(decode_i64(take(bytes)?)),
        Type::Float32 => {
            let ordered = u32::from_be_bytes(take(bytes)?);
            Value::Float32(f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered }))
        }
        Type::Float64 => {
            let ordered = u64::from_be_bytes(take(bytes)?);
            Value::Float64(f64::from_bits(if ordered >> 63 == 1 { ordered & !(1 << 63) } else { !ordered }))
        }
        Type::Decimal { .. } => Value::Decimal((u128::from_be_bytes(take(bytes)?) ^ (1 << 127)) as i128),
        Type::String => {
            let text =
                String::from_utf8(decode_bytes(bytes)?).map_err(|_| DecodeError::Invalid("a string is not UTF-8"))?;
            Value::String(text.into())
        }
        Type::Binary => Value::Binary(decode_bytes(bytes)?.into()),
        Type::List(item) => {
            let mut items = Vec::new();
            while take::<1>(bytes)?[0] == 1 {
                items.push(decode_nullable(bytes, item)?);
            }
            Value::List(items)
        }
        Type::Map(value) => {
            let mut pairs = Vec::new();
            while take::<1>(bytes)?[0] == 1 {
                let Value::String(key) = decode(bytes, &Type::String)? else {
                    unreachable!("a decoded string is a string")
                };
                pairs.push((key, decode_nullable(bytes, value)?));
            }
            Value::Map(pairs)
        }
        Type::Struct(fields) => Value::Struct(
            fields.iter().map(|(_, field_type)| decode_nullable(bytes, field_type)).collect::<Result<_, _>>()?,
        ),
        Type::Vector(n) => {
            let mut items = Vec::with_capacity(*n as usize);
            for _ in 0..*n {
                let Value::Float32(x) = decode(bytes, &Type::Float32)? else {
                    unreachable!("a decoded float is a float")
                };
                items.push(x);
            }
            Value::Vector(items.into())
        }
    })
}

pub fn decode_nullable(bytes: &mut &[u8], value_type: &Type) -> Result<Value, DecodeError> {
    if take::<1>(bytes)?[0] == 0 { Ok(Value::Null) } else { decode(bytes, value_type) }
}

fn decode_bytes(bytes: &mut &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut out = Vec::new();
    loop {
        match take::<1>(bytes)?[0] {
            0 => match take::<1>(bytes)?[0] {
                0 => return Ok(out),
                0xff => out.push(0),
                _ => return Err(DecodeError::Invalid("an escape in a string is unknown")),
            },
            byte => out.push(byte),
        }
    }
}

/// Takes `N` bytes from the front.
pub fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], DecodeError> {
    let (head, tail) = bytes.split_first_chunk::<N>().ok_or(DecodeError::Truncated)?;
    *bytes = tail;
    Ok(*head)
}

/// Appends the encoding of a row: one validity bit per value (lowest bit first), then the values that are not null.
pub fn encode_row(values: &[Value], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + values.len().div_ceil(8), 0);
    for (i, value) in values.iter().enumerate() {
        if !value.is_null() {
            out[start + i / 8] |= 1 << (i % 8);
            encode(value, out);
        }
    }
}

/// Reads a row written by [`encode_row`]; the bytes must end with it.
pub fn decode_row(mut bytes: &[u8], types: &[Type]) -> Result<Vec<Value>, DecodeError> {
    let bitmap_len = types.len().div_ceil(8);
    let (bitmap, rest) = bytes.split_at_checked(bitmap_len).ok_or(DecodeError::Truncated)?;
    bytes = rest;
    let mut values = Vec::with_capacity(types.len());
    for (i, value_type) in types.iter().enumerate() {
        let valid = bitmap[i / 8] >> (i % 8) & 1 == 1;
        values.push(if valid { decode(&mut bytes, value_type)? } else { Value::Null });
    }
    if bytes.is_empty() { Ok(values) } else { Err(DecodeError::Trailing(bytes.len())) }
}

#[cfg(test)]
mod tests;
