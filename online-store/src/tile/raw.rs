//! The raw events of a tile, as they are stored: a writer adds to their end, and a reader takes them one by one.

use feature_defs::as_of::Times;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{DecodeError, Type, Value, decode_i64, decode_row, encode_i64, encode_row, take};

use super::{decode_varint, encode_varint};

#[derive(Debug, Clone, PartialEq)]
pub struct RawEvent {
    pub event_time: Micros,
    pub known_time: Micros,
    /// This and the sequence are kept only where an aggregate orders its values.
    pub created_time: Option<Micros>,
    pub sequence: u64,
    pub inputs: Vec<Value>,
}

impl RawEvent {
    pub(super) fn times(&self) -> Times {
        // The position's time is not kept: it has decided when the event was applied, and decides no order of values.
        let position = Position { time: self.known_time, sequence: self.sequence };
        Times { event_time: self.event_time, created_time: self.created_time, known_time: self.known_time, position }
    }
}

/// Raw events one after another, in the bytes of the format.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawEvents {
    count: usize,
    bytes: Vec<u8>,
}

impl RawEvents {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Of events that are kept in order, `is_ordered`, also what decides ties is kept.
    pub(super) fn push(&mut self, times: &Times, inputs: &[Value], is_ordered: bool) {
        let bytes = &mut self.bytes;
        bytes.extend_from_slice(&encode_i64(times.event_time));
        bytes.extend_from_slice(&encode_i64(times.known_time));
        if is_ordered {
            encode_varint(times.position.sequence, bytes);
            bytes.push(u8::from(times.created_time.is_some()));
            bytes.extend(times.created_time.map(encode_i64).into_iter().flatten());
        }
        // The length goes before the row and is known after it: rows are short, so that it nearly always takes one byte.
        let at = bytes.len();
        bytes.push(0);
        encode_row(inputs, bytes);
        let length = bytes.len() - at - 1;
        if length < 0x80 {
            bytes[at] = length as u8;
        } else {
            let row = bytes.split_off(at + 1);
            bytes.truncate(at);
            encode_varint(length as u64, bytes);
            bytes.extend_from_slice(&row);
        }
        self.count += 1;
    }

    /// Takes events off the front of `bytes`, and looks at each of them, so that nothing can go wrong with them later.
    pub(super) fn take(
        bytes: &mut &[u8],
        count: u64,
        types: &[Type],
        is_ordered: bool,
    ) -> Result<RawEvents, DecodeError> {
        let all = *bytes;
        for _ in 0..count {
            take_event(bytes, types, is_ordered)?;
        }
        let bytes = all[..all.len() - bytes.len()].to_vec();
        let count = usize::try_from(count).map_err(|_| DecodeError::Truncated)?;
        Ok(RawEvents { count, bytes })
    }

    pub(super) fn iter<'a>(
        &'a self,
        types: &'a [Type],
        is_ordered: bool,
    ) -> impl Iterator<Item = Result<RawEvent, DecodeError>> + use<'a> {
        let mut rest = &self.bytes[..];
        (0..self.count).map(move |_| take_event(&mut rest, types, is_ordered))
    }
}

fn take_event(bytes: &mut &[u8], types: &[Type], is_ordered: bool) -> Result<RawEvent, DecodeError> {
    let event_time = decode_i64(take(bytes)?);
    let known_time = decode_i64(take(bytes)?);
    let (sequence, created_time) =
        if is_ordered { (decode_varint(bytes)?, decode_created_time(bytes)?) } else { (0, None) };
    let length = decode_varint(bytes)? as usize;
    let (row, rest) = bytes.split_at_checked(length).ok_or(DecodeError::Truncated)?;
    *bytes = rest;
    let inputs = decode_row(row, types)?;
    Ok(RawEvent { event_time, known_time, created_time, sequence, inputs })
}

fn decode_created_time(bytes: &mut &[u8]) -> Result<Option<Micros>, DecodeError> {
    match take(bytes)? {
        [0] => Ok(None),
        [1] => Ok(Some(decode_i64(take(bytes)?))),
        _ => Err(DecodeError::Invalid("a null mark is neither 0 nor 1")),
    }
}
