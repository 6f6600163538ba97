//! The answer of GetFeatures as a message, and as the bytes of that message.
//!
//! A message of structures takes some ten allocations for each feature, and is measured once per level before it is
//! written: for 50 features of one row, about a third of the instructions of the whole call. So gRPC writes the columns
//! of common types one after the other. The bytes are those that `prost` writes of [`FeaturesAnswer::to_message`];
//! nested types, which are seldom, take the way over `prost` itself.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, ArrowPrimitiveType, AsArray, PrimitiveArray};
use arrow::datatypes::{Date32Type, Float32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use feature_defs::plan::{ServiceOutput, ServicePlan};
use feature_defs::time::Status;
use feature_defs::value::Type;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use proto::v1;

use super::{Features, status_number};
use crate::convert;

/// What GetFeatures answers.
#[derive(Debug)]
pub struct FeaturesAnswer {
    pub service: Arc<ServicePlan>,
    /// Shared with what logs and counts answers.
    pub features: Arc<Features>,
    pub include_provenance: bool,
}

impl FeaturesAnswer {
    pub fn to_message(&self) -> v1::GetFeaturesResponse {
        let fetched = &self.features.fetched;
        v1::GetFeaturesResponse {
            features: self.features.columns(&self.service),
            views: self.provenance(),
            semantic_digest: self.service.semantic_digest.to_string(),
            stale: fetched.stale,
            rows: fetched.at.len() as u32,
            at: fetched.at.clone(),
        }
    }

    fn provenance(&self) -> Vec<v1::ViewProvenance> {
        if self.include_provenance { self.features.provenance(&self.service) } else { Vec::new() }
    }

    /// The bytes of [`FeaturesAnswer::to_message`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let Features { fetched, assembled, .. } = &*self.features;
        let names: usize = self.service.outputs.iter().map(|output| output.name.len()).sum();
        let cells = self.service.outputs.len() * fetched.at.len();
        let out = &mut Vec::with_capacity(2 * names + 32 * self.service.outputs.len() + 9 * cells + 256);
        for (index, output) in self.service.outputs.iter().enumerate() {
            let statuses = &assembled.statuses[index];
            FeatureBytes {
                output,
                column: ColumnBytes::new(&output.name, &assembled.columns[index], &output.feature_type),
                statuses,
                reasons: self.features.reasons(&self.service, output.slot, statuses),
            }
            .put(out);
        }
        let at = fetched.at.iter().map(|time| zigzag(*time));
        put_varints(2, at, out);
        for view in self.provenance() {
            prost::encoding::message::encode(3, &view, out);
        }
        put_bytes(4, self.service.semantic_digest.as_str().as_bytes(), out);
        if fetched.stale {
            encode_key(5, WireType::Varint, out);
            encode_varint(1, out);
        }
        if !fetched.at.is_empty() {
            encode_key(6, WireType::Varint, out);
            encode_varint(fetched.at.len() as u64, out);
        }
        std::mem::take(out)
    }
}

/// A `FeatureColumn`.
struct FeatureBytes<'a> {
    output: &'a ServiceOutput,
    column: ColumnBytes<'a>,
    statuses: &'a [Status],
    reasons: Vec<i32>,
}

impl FeatureBytes<'_> {
    fn put(&self, out: &mut Vec<u8>) {
        let column = self.column.length();
        // Numbers of statuses and reasons are single bytes.
        let length = field_length(self.output.name.len())
            + message_length(column)
            + field_length(self.statuses.len())
            + field_length(self.reasons.len());
        put_length(1, length, out);
        put_bytes(1, self.output.name.as_bytes(), out);
        self.column.put(2, column, out);
        if !self.statuses.is_empty() {
            put_length(3, self.statuses.len(), out);
            self.statuses.iter().for_each(|status| out.push(status_number(*status) as u8));
        }
        if !self.reasons.is_empty() {
            put_length(4, self.reasons.len(), out);
            self.reasons.iter().for_each(|reason| out.push(*reason as u8));
        }
    }
}

/// A `Column`: one that is written from its array, or one that `prost` writes.
enum ColumnBytes<'a> {
    Flat { name: &'a str, array: &'a dyn Array, kind: Kind, validity: Vec<u8>, values: usize },
    Nested(v1::Column),
}

/// The types that are written from arrays.
#[derive(Clone, Copy)]
enum Kind {
    Bool,
    Int32,
    Int64,
    Float32,
    Float64,
    Date,
    Timestamp,
    String,
    Binary,
}

impl<'a> ColumnBytes<'a> {
    fn new(name: &'a str, array: &'a ArrayRef, value_type: &Type) -> ColumnBytes<'a> {
        let kind = match value_type {
            Type::Bool => Kind::Bool,
            Type::Int32 => Kind::Int32,
            Type::Int64 => Kind::Int64,
            Type::Float32 => Kind::Float32,
            Type::Float64 => Kind::Float64,
            Type::Date => Kind::Date,
            Type::Timestamp => Kind::Timestamp,
            Type::String => Kind::String,
            Type::Binary => Kind::Binary,
            Type::Decimal { .. } | Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => {
                return ColumnBytes::Nested(convert::from_array(name, array, value_type));
            }
        };
        let validity = convert::validity_of(array);
        ColumnBytes::Flat { name, array, kind, validity, values: kind.length(array) }
    }

    fn length(&self) -> usize {
        match self {
            ColumnBytes::Flat { name, validity, values, .. } => {
                field_length(name.len()) + field_length(validity.len()) + message_length(*values)
            }
            ColumnBytes::Nested(column) => column.encoded_len(),
        }
    }

    /// As a field of so many bytes.
    fn put(&self, tag: u32, length: usize, out: &mut Vec<u8>) {
        match self {
            ColumnBytes::Flat { name, array, kind, validity, values } => {
                put_length(tag, length, out);
                put_bytes(1, name.as_bytes(), out);
                put_bytes(2, validity, out);
                put_length(kind.tag(), *values, out);
                kind.put(*array, out);
            }
            ColumnBytes::Nested(column) => prost::encoding::message::encode(tag, column, out),
        }
    }
}

impl Kind {
    /// Of the values in a `Column`.
    fn tag(self) -> u32 {
        match self {
            Kind::Bool => 3,
            Kind::Int32 => 4,
            Kind::Int64 => 5,
            Kind::Float32 => 6,
            Kind::Float64 => 7,
            Kind::String => 8,
            Kind::Binary => 9,
            Kind::Timestamp => 10,
            Kind::Date => 11,
        }
    }

    /// Bytes of the message of values.
    fn length(self, array: &dyn Array) -> usize {
        match self {
            Kind::Bool => field_length(array.len()),
            Kind::Float32 => field_length(array.len() * 4),
            Kind::Float64 => field_length(array.len() * 8),
            Kind::Int32 => varints_length(int32s::<Int32Type>(array)),
            Kind::Date => varints_length(int32s::<Date32Type>(array)),
            Kind::Int64 => varints_length(int64s::<Int64Type>(array)),
            Kind::Timestamp => varints_length(int64s::<TimestampMicrosecondType>(array)),
            Kind::String => array.as_string::<i32>().iter().map(|text| item_length(text.map_or(0, str::len))).sum(),
            Kind::Binary => {
                array.as_binary::<i32>().iter().map(|bytes| item_length(bytes.map_or(0, <[u8]>::len))).sum()
            }
        }
    }

    fn put(self, array: &dyn Array, out: &mut Vec<u8>) {
        match self {
            Kind::Bool => {
                let array = array.as_boolean();
                if !array.is_empty() {
                    put_length(1, array.len(), out);
                    (0..array.len()).for_each(|row| out.push(u8::from(array.is_valid(row) && array.value(row))));
                }
            }
            Kind::Float32 => put_floats::<Float32Type, 4>(array, f32::to_le_bytes, out),
            Kind::Float64 => put_floats::<Float64Type, 8>(array, f64::to_le_bytes, out),
            Kind::Int32 => put_varints(1, int32s::<Int32Type>(array), out),
            Kind::Date => put_varints(1, int32s::<Date32Type>(array), out),
            Kind::Int64 => put_varints(1, int64s::<Int64Type>(array), out),
            Kind::Timestamp => put_varints(1, int64s::<TimestampMicrosecondType>(array), out),
            Kind::String => {
                array.as_string::<i32>().iter().for_each(|text| put_item(text.unwrap_or_default().as_bytes(), out));
            }
            Kind::Binary => {
                array.as_binary::<i32>().iter().for_each(|bytes| put_item(bytes.unwrap_or_default(), out));
            }
        }
    }
}

/// The values of an array, a zero for each null.
fn zeroed<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>) -> impl Iterator<Item = T::Native> + Clone {
    let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
    let valid = move |row: usize| nulls.is_none_or(|nulls| nulls.is_valid(row));
    let values = array.values().iter().enumerate();
    values.map(move |(row, value)| if valid(row) { *value } else { T::Native::default() })
}

/// As `sint32` is written.
fn int32s<T: ArrowPrimitiveType<Native = i32>>(array: &dyn Array) -> impl Iterator<Item = u64> + Clone {
    zeroed(array.as_primitive::<T>()).map(|value| u64::from(((value << 1) ^ (value >> 31)) as u32))
}

/// As `sint64` is written.
fn int64s<T: ArrowPrimitiveType<Native = i64>>(array: &dyn Array) -> impl Iterator<Item = u64> + Clone {
    zeroed(array.as_primitive::<T>()).map(zigzag)
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn put_floats<T: ArrowPrimitiveType, const N: usize>(
    array: &dyn Array,
    bytes: impl Fn(T::Native) -> [u8; N],
    out: &mut Vec<u8>,
) {
    let array = array.as_primitive::<T>();
    if array.is_empty() {
        return;
    }
    put_length(1, array.len() * N, out);
    if cfg!(target_endian = "little") && array.null_count() == 0 {
        // Floats lie in memory as they are sent.
        out.extend_from_slice(array.values().inner().as_slice());
    } else {
        zeroed(array).for_each(|value| out.extend_from_slice(&bytes(value)));
    }
}

/// Bytes of a field that holds so many, which is left out where it is empty.
fn field_length(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { message_length(bytes) }
}

/// Bytes of a field that is there even when it is empty: a message, or an item of a list.
fn message_length(bytes: usize) -> usize {
    // Every tag here is less than 16, so the key is one byte.
    1 + encoded_len_varint(bytes as u64) + bytes
}

fn item_length(bytes: usize) -> usize {
    message_length(bytes)
}

fn varints_length(values: impl Iterator<Item = u64>) -> usize {
    field_length(values.map(encoded_len_varint).sum())
}

fn put_length(tag: u32, length: usize, out: &mut Vec<u8>) {
    let key = (tag << 3 | WireType::LengthDelimited as u32) as u8;
    if length < 0x80 {
        out.extend_from_slice(&[key, length as u8]);
    } else {
        out.push(key);
        encode_varint(length as u64, out);
    }
}

fn put_item(bytes: &[u8], out: &mut Vec<u8>) {
    put_length(1, bytes.len(), out);
    out.extend_from_slice(bytes);
}

fn put_bytes(tag: u32, bytes: &[u8], out: &mut Vec<u8>) {
    if !bytes.is_empty() {
        put_length(tag, bytes.len(), out);
        out.extend_from_slice(bytes);
    }
}

fn put_varints(tag: u32, values: impl Iterator<Item = u64> + Clone, out: &mut Vec<u8>) {
    let length: usize = values.clone().map(encoded_len_varint).sum();
    if length > 0 {
        put_length(tag, length, out);
        values.for_each(|value| encode_varint(value, out));
    }
}

#[cfg(test)]
mod tests;
