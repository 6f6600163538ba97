//! The bytes of a record, the same wherever the log lies.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use feature_defs::time::Micros;

use super::{Events, LogError, RECORD_BYTES_MAX, RecordRef};

pub(super) const RECORD_MAGIC: &[u8; 4] = b"rcrd";
pub(super) const RECORD_HEADER_BYTES: usize = 12;
/// Bytes before the first record of a segment.
pub(super) const HEADER_BYTES: u64 = 28;
const KIND_EVENTS: u8 = 1;
const KIND_TICK: u8 = 2;
/// The column of due times in a record.
const DUE: &str = "__due";

/// What a record says.
pub(super) enum Content<'a> {
    /// Events, as an Arrow stream.
    Events(RecordRef, &'a [u8]),
    Tick(Micros),
}

/// The Arrow stream of events and their due times.
pub(super) fn stream(batch: &RecordBatch, due: &[Micros]) -> Result<Vec<u8>, LogError> {
    let failed = |error: arrow::error::ArrowError| LogError::Encode(error.to_string());
    let mut fields: Vec<Field> = batch.schema().fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.push(Field::new(DUE, DataType::Int64, false));
    let schema = Arc::new(Schema::new(fields));
    let mut columns: Vec<ArrayRef> = batch.columns().to_vec();
    columns.push(Arc::new(Int64Array::from(due.to_vec())));
    let with_due = RecordBatch::try_new(schema.clone(), columns).map_err(failed)?;
    let mut writer = StreamWriter::try_new(Vec::new(), &schema).map_err(failed)?;
    writer.write(&with_due).map_err(failed)?;
    let stream = writer.into_inner().map_err(failed)?;
    if stream.len() + 1024 > RECORD_BYTES_MAX {
        return Err(LogError::TooLarge { bytes: stream.len() });
    }
    Ok(stream)
}

/// The payload of events. `synced` is filled in by whoever writes it.
pub(super) fn events_payload(
    source: &str,
    arrival: Micros,
    first_sequence: u64,
    rows: u32,
    import: Option<&str>,
    stream: &[u8],
) -> Vec<u8> {
    let mut payload = Vec::with_capacity(stream.len() + 64 + source.len());
    payload.extend_from_slice(&[0; 8]);
    payload.push(KIND_EVENTS);
    payload.extend_from_slice(&arrival.to_le_bytes());
    payload.extend_from_slice(&first_sequence.to_le_bytes());
    payload.extend_from_slice(&rows.to_le_bytes());
    for text in [import.unwrap_or_default(), source] {
        payload.extend_from_slice(&(text.len() as u16).to_le_bytes());
        payload.extend_from_slice(text.as_bytes());
    }
    payload.extend_from_slice(stream);
    payload
}

pub(super) fn tick_payload(arrival: Micros) -> Vec<u8> {
    let mut payload = vec![0; 8];
    payload.push(KIND_TICK);
    payload.extend_from_slice(&arrival.to_le_bytes());
    payload
}

/// Writes a record behind others; all of them are durable up to `synced`.
pub(super) fn frame(bytes: &mut Vec<u8>, mut payload: Vec<u8>, synced: u64) {
    payload[..8].copy_from_slice(&synced.to_le_bytes());
    bytes.extend_from_slice(RECORD_MAGIC);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
}

/// What a payload at some place says; None if it cannot be understood.
pub(super) fn content(payload: &[u8], segment: u64, offset: u64) -> Option<Content<'_>> {
    match *payload.get(8)? {
        KIND_EVENTS => parse(payload, segment, offset).map(|(record, stream)| Content::Events(record, stream)),
        KIND_TICK if payload.len() == 17 => {
            let arrival = payload[9..17].try_into().expect("eight bytes were asked for");
            Some(Content::Tick(i64::from_le_bytes(arrival)))
        }
        _ => None,
    }
}

/// The payload of the record at the front of `bytes`, if it is whole.
pub(super) fn payload_at(bytes: &[u8]) -> Option<&[u8]> {
    let header = bytes.get(..RECORD_HEADER_BYTES)?;
    let length = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
    if !header.starts_with(RECORD_MAGIC) || !(9..=RECORD_BYTES_MAX).contains(&length) {
        return None;
    }
    let payload = bytes.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + length)?;
    (crc32fast::hash(payload).to_le_bytes() == header[8..12]).then_some(payload)
}

/// The header of an events record, and its Arrow stream.
pub(super) fn parse(payload: &[u8], segment: u64, offset: u64) -> Option<(RecordRef, &[u8])> {
    let mut rest = payload.get(9..)?;
    let mut take = |length: usize| {
        let (head, tail) = rest.split_at_checked(length)?;
        rest = tail;
        Some(head)
    };
    let arrival = i64::from_le_bytes(take(8)?.try_into().ok()?);
    let first_sequence = u64::from_le_bytes(take(8)?.try_into().ok()?);
    let rows = u32::from_le_bytes(take(4)?.try_into().ok()?);
    let mut text = || {
        let length = u16::from_le_bytes(take(2)?.try_into().ok()?);
        std::str::from_utf8(take(usize::from(length))?).ok()
    };
    let import = text()?;
    let source = text()?;
    let import = (!import.is_empty()).then(|| import.into());
    let payload_bytes = payload.len() as u32;
    let record =
        RecordRef { source: source.into(), arrival, first_sequence, rows, import, segment, offset, payload_bytes };
    Some((record, rest))
}

pub(super) fn decode(stream: &[u8]) -> Result<Events, String> {
    let failed = |error: arrow::error::ArrowError| error.to_string();
    let mut reader = StreamReader::try_new(stream, None).map_err(failed)?;
    let batch = reader.next().ok_or("it holds no events")?.map_err(failed)?;
    let last = batch.num_columns().checked_sub(1).ok_or("it holds no columns")?;
    let due = batch.column(last).as_primitive_opt::<Int64Type>().ok_or("it holds no due times")?;
    let due = due.values().to_vec();
    let kept: Vec<usize> = (0..last).collect();
    Ok(Events { batch: batch.project(&kept).map_err(failed)?, due })
}

/// The events of a record that was read back.
pub(super) fn events(bytes: &[u8], record: &RecordRef) -> Result<Events, String> {
    let payload = payload_at(bytes).ok_or("the checksum differs")?;
    let (_, stream) = parse(payload, record.segment, record.offset).ok_or("its header")?;
    decode(stream)
}

/// The payload with other events in the place of its own, where a listener wants that.
pub(super) fn changed(
    payload: &[u8],
    segment: u64,
    offset: u64,
    change: super::Change<'_>,
) -> Result<Result<Option<Vec<u8>>, LogError>, String> {
    let content = content(payload, segment, offset).ok_or("its header")?;
    let Content::Events(record, own) = content else { return Ok(Ok(None)) };
    let events = decode(own)?;
    let changed = change(&record, &events).and_then(|events| {
        let Some(events) = events else { return Ok(None) };
        let mut payload = payload[..payload.len() - own.len()].to_vec();
        payload.extend_from_slice(&stream(&events.batch, &events.due)?);
        Ok(Some(payload))
    });
    Ok(changed)
}
