//! The blob of one row of an as-of view.
//!
//! ```text
//! offset  bytes  what
//!      0      1  format version, 1
//!      1      8  position: time, big-endian with the sign bit flipped
//!      9      8  position: sequence, big-endian
//!     17      8  known time                                              (all times are microseconds, encoded alike)
//!     25      8  event time                    \
//!     33      1  1 if there is a created time   |
//!     34      8  created time, or zeros         | the order of rows: these bytes to the end compare like the rows
//!     42      8  tie: log sequence, 0 for files |
//!     50      1  1 for a tombstone              |
//!     51      .  validity bits and values      /
//! ```
//!
//! Everything from the event time on is memcomparable, so a store can decide which of two rows is later by comparing
//! bytes, without knowing types. For streams the sequence settles every tie; for files it is 0 and the content does.

use bytes::Bytes;
use feature_defs::as_of::{Row, Times};
use feature_defs::time::Position;
use feature_defs::value::{DecodeError, Type, decode_i64, decode_row, encode_i64, encode_row, take};

pub const VERSION: u8 = 1;
/// Where the position begins.
pub const POSITION_AT: usize = 1;
/// Where the bytes that order rows begin.
pub const ORDER_AT: usize = 25;
const CONTENT_AT: usize = 50;
/// Bytes before the validity bits.
pub const HEADER_BYTES: usize = CONTENT_AT + 1;

/// The blob of a row. Streams break ties by log sequence, which is the position's.
pub fn encode(row: &Row) -> Bytes {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + row.values.len() * 9);
    encode_header(&row.times, row.deleted, &mut bytes);
    encode_row(&row.values, &mut bytes);
    bytes.into()
}

/// What comes before the validity bits and values, for whoever encodes those from columns.
pub fn encode_header(times: &Times, deleted: bool, bytes: &mut Vec<u8>) {
    let Times { event_time, created_time, known_time, position } = *times;
    bytes.push(VERSION);
    bytes.extend_from_slice(&encode_position(position));
    bytes.extend_from_slice(&encode_i64(known_time));
    bytes.extend_from_slice(&encode_i64(event_time));
    bytes.push(u8::from(created_time.is_some()));
    bytes.extend_from_slice(&created_time.map_or([0; 8], encode_i64));
    bytes.extend_from_slice(&position.sequence.to_be_bytes());
    bytes.push(u8::from(deleted));
}

/// A blob taken apart, its values still encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'a> {
    pub times: Times,
    pub deleted: bool,
    /// As [`encode_row`] wrote them.
    pub values: &'a [u8],
}

pub fn parts(blob: &[u8]) -> Result<Parts<'_>, DecodeError> {
    let mut bytes = blob;
    let [version] = take::<1>(&mut bytes)?;
    if version != VERSION {
        return Err(DecodeError::Version { found: version, newest: VERSION });
    }
    let applied = decode_position(take(&mut bytes)?);
    let known_time = decode_i64(take(&mut bytes)?);
    let event_time = decode_i64(take(&mut bytes)?);
    let [has_created] = take::<1>(&mut bytes)?;
    let created = decode_i64(take(&mut bytes)?);
    take::<8>(&mut bytes)?; // The tie: the applied position may have moved past the row's own.
    let [deleted] = take::<1>(&mut bytes)?;
    let created_time = (has_created == 1).then_some(created);
    let times = Times { event_time, created_time, known_time, position: applied };
    Ok(Parts { times, deleted: deleted == 1, values: bytes })
}

pub fn decode(blob: &[u8], types: &[Type]) -> Result<Row, DecodeError> {
    let Parts { times, deleted, values } = parts(blob)?;
    Ok(Row { times, deleted, values: decode_row(values, types)? })
}

/// The bytes by which two blobs of one entity are ordered.
pub fn order(blob: &[u8]) -> &[u8] {
    blob.get(ORDER_AT..).unwrap_or(&[])
}

/// The position applied for the entity.
pub fn position(blob: &[u8]) -> Option<Position> {
    let bytes = blob.get(POSITION_AT..POSITION_AT + 16)?;
    Some(decode_position(bytes.try_into().ok()?))
}

/// What a store keeps after `new` arrives over `old`: the later row, with the larger position; None when nothing changes.
/// The flag says whether the new row replaced the old one.
pub fn merge(old: &[u8], new: &[u8]) -> Option<(Bytes, bool)> {
    let newer = order(new) > order(old);
    let advance = new.get(POSITION_AT..POSITION_AT + 16) > old.get(POSITION_AT..POSITION_AT + 16);
    if !newer && !advance {
        return None;
    }
    let mut kept = if newer { new.to_vec() } else { old.to_vec() };
    let position = if advance { new } else { old };
    kept[POSITION_AT..POSITION_AT + 16].copy_from_slice(&position[POSITION_AT..POSITION_AT + 16]);
    Some((kept.into(), newer))
}

/// Sixteen bytes that sort like positions.
pub fn encode_position(position: Position) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&encode_i64(position.time));
    bytes[8..].copy_from_slice(&position.sequence.to_be_bytes());
    bytes
}

pub fn decode_position(bytes: [u8; 16]) -> Position {
    let [time, sequence] = [0, 8].map(|at| std::array::from_fn(|i| bytes[at + i]));
    Position { time: decode_i64(time), sequence: u64::from_be_bytes(sequence) }
}

#[cfg(test)]
mod tests {
    use feature_defs::value::Value;

    use super::*;

    fn row(event_time: i64, created_time: Option<i64>, sequence: u64, value: f64) -> Row {
        let position = Position { time: 1_000 + event_time, sequence };
        let times = Times { event_time, created_time, known_time: event_time + 5, position };
        Row { times, deleted: false, values: vec![Value::Float64(value), Value::Null] }
    }

    const TYPES: [Type; 2] = [Type::Float64, Type::String];

    #[test]
    fn the_bytes_of_version_1() {
        let expected = "01 8000000000000416 0000000000000007 8000000000000033 800000000000002e 01 8000000000000030 \
                        0000000000000007 00 01 bff8000000000000";
        let expected: Vec<u8> = expected.split_whitespace().flat_map(unhex).collect();
        let row = row(46, Some(48), 7, 1.5);
        assert_eq!(encode(&row), expected);
        assert_eq!(decode(&expected, &TYPES).unwrap(), row);
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn bytes_order_like_rows() {
        let mut tombstone = row(3, None, 0, 0.0);
        tombstone.deleted = true;
        tombstone.values = vec![Value::Null, Value::Null];
        let rows = [
            row(-1, None, 9, 0.0),
            row(2, None, 9, 0.0),
            row(2, Some(-5), 1, 0.0),
            row(2, Some(7), 1, 0.0),
            row(2, Some(7), 2, -1.0),
            row(3, None, 0, -1.0),
            row(3, None, 0, 1.0),
            tombstone,
        ];
        for (i, a) in rows.iter().enumerate() {
            for (j, b) in rows.iter().enumerate() {
                assert_eq!(order(&encode(a)).cmp(order(&encode(b))), i.cmp(&j));
                assert_eq!(a.order(b), i.cmp(&j));
            }
        }
    }

    #[test]
    fn a_merge_keeps_the_later_row_and_the_larger_position() {
        let (old, new) = (encode(&row(5, None, 1, 1.0)), encode(&row(4, None, 2, 2.0)));
        // The older row arrives last: the value stays, the position does not move back.
        assert_eq!(merge(&old, &new), None);
        let mut late = row(4, None, 2, 2.0);
        late.times.position.time = 9_999;
        let (kept, replaced) = merge(&old, &encode(&late)).unwrap();
        assert!(!replaced);
        let kept = decode(&kept, &TYPES).unwrap();
        assert_eq!(kept.values[0], Value::Float64(1.0));
        assert_eq!(kept.times.position, Position { time: 9_999, sequence: 2 });
        assert_eq!(merge(&old, &old), None, "the same row again changes nothing");
        assert!(merge(&new, &old).unwrap().1);
    }

    #[test]
    fn damage_is_an_error() {
        let blob = encode(&row(1, None, 1, 1.0));
        for length in 0..blob.len() {
            assert!(decode(&blob[..length], &TYPES).is_err());
        }
        let mut future = blob.to_vec();
        future[0] = 9;
        assert_eq!(decode(&future, &TYPES), Err(DecodeError::Version { found: 9, newest: 1 }));
    }

    #[test]
    fn kept_rows_are_read() {
        use feature_defs::value::Value::{Binary, Bool, Float32, Float64, Int32, Int64, Null, String, Timestamp};

        let types = [
            Type::Bool,
            Type::Int32,
            Type::Int64,
            Type::Float32,
            Type::Float64,
            Type::String,
            Type::Binary,
            Type::Timestamp,
            Type::Int64,
        ];
        let mut row = row(46, Some(-48), 7, 0.0);
        row.values = vec![
            Bool(true),
            Int32(-5),
            Int64(1 << 40),
            Float32(1.5),
            Float64(f64::NAN),
            String("caf\u{e9}".into()),
            Binary(Box::new(*b"\0\xff")),
            Timestamp(1_700_000_000_000_000),
            Null,
        ];
        assert_eq!(decode(&crate::formats::current("row_v1", &encode(&row)), &types).unwrap(), row);
        let tombstone = Row { deleted: true, values: vec![Null; types.len()], ..row };
        let kept = crate::formats::current("row_v1_tombstone", &encode(&tombstone));
        assert_eq!(decode(&kept, &types).unwrap(), tombstone);
    }
}
