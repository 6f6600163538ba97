//! From an answer to rows of the log.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, FixedSizeBinaryBuilder, Int64Array, RecordBatch, StringArray, StringBuilder,
    TimestampMicrosecondArray, UInt8Array, UInt32Array, UInt64Array,
};
use arrow::compute::take;
use arrow::error::ArrowError;
use feature_defs::plan::{ServicePlan, Slot};
use feature_defs::time::{Micros, STATIC, Status};
use feature_defs::value::{Type, Value, encode};
use offline_store::serving_log::{LogSchema, Origin, TENSOR_DIGEST_BYTES, columns, hashed, tensor_digest};

use crate::features::{Features, reason_number};
use crate::observe::Observed;
use crate::predict::RowStatus;

/// Why a row is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its entity keys are of the day's sample.
    Key,
    Uniform,
    /// Something stood in for an answer.
    Fallback,
}

impl Why {
    fn name(self) -> &'static str {
        match self {
            Why::Key => "key",
            Why::Uniform => "uniform",
            Why::Fallback => "fallback",
        }
    }
}

/// Whether something stood in for an answer of the store or the model.
pub fn has_fallback(observed: &Observed, row: usize) -> bool {
    let answered = observed.prediction.as_ref().is_none_or(|of| of.rows[row].status == RowStatus::Answered);
    !answered || observed.features.fetched.inputs.iter().any(|input| input.reasons[row].is_some())
}

/// The chosen rows of an answer, in the columns of `schema`. `key` is what sensitive values are hashed with.
pub fn batch(
    observed: &Observed,
    chosen: &[(u32, Why)],
    schema: &LogSchema,
    key: &[u8],
) -> Result<RecordBatch, ArrowError> {
    let Observed { service, rows, features, places, request_id, time, total, prediction } = observed;
    let count = chosen.len();
    let indices: UInt32Array = chosen.iter().map(|(row, _)| *row).collect();
    let all = count == rows.count;
    let picked = |array: &ArrayRef| -> Result<ArrayRef, ArrowError> {
        // Rows are chosen in order, so all of them are the array itself.
        if all { Ok(array.clone()) } else { take(array, &indices, None) }
    };
    let value = |name: &str, array: &ArrayRef, value_type: &Type, sensitive: bool| -> Result<ArrayRef, ArrowError> {
        if sensitive { Ok(hashes(array, value_type, chosen, key, name)) } else { picked(array) }
    };
    let text = |value: &str| Arc::new(StringArray::from(vec![value; count])) as ArrayRef;
    let micros = |duration: std::time::Duration| {
        Arc::new(UInt32Array::from(vec![u32::try_from(duration.as_micros()).unwrap_or(u32::MAX); count])) as ArrayRef
    };
    let fetched = &features.fetched;
    let mut out: Vec<ArrayRef> = Vec::with_capacity(schema.schema.fields().len());
    out.push(text(request_id));
    out.push(match places {
        None => Arc::new(indices.clone()),
        Some(places) => Arc::new(
            chosen.iter().map(|(row, _)| places.get(*row as usize).map(|place| *place as u32)).collect::<UInt32Array>(),
        ),
    });
    out.push(times(std::iter::repeat_n(Some(*time), count)));
    out.push(times(chosen.iter().map(|(row, _)| Some(fetched.at[*row as usize]))));
    out.push(Arc::new(StringArray::from_iter_values(chosen.iter().map(|(_, why)| why.name()))));
    match prediction {
        Some(of) => {
            let outcomes = || chosen.iter().map(|(row, _)| &of.rows[*row as usize]);
            out.push(text("predict"));
            out.push(Arc::new(UInt32Array::from(vec![of.version; count])));
            out.push(text(of.arm));
            out.push(Arc::new(StringArray::from_iter_values(outcomes().map(|outcome| outcome.status.name()))));
            out.push(Arc::new(
                outcomes().map(|outcome| outcome.cause.map(|cause| cause.name())).collect::<StringArray>(),
            ));
            let said = |reason: &'_ str| (!reason.is_empty()).then(|| reason.to_owned());
            out.push(Arc::new(outcomes().map(|outcome| said(&outcome.reason)).collect::<StringArray>()));
            let mut digests = FixedSizeBinaryBuilder::with_capacity(count, TENSOR_DIGEST_BYTES as i32);
            for (row, _) in chosen {
                digests.append_value(tensor_digest(&of.encoded, *row as usize))?;
            }
            out.push(Arc::new(digests.finish()));
        }
        None => {
            let failed = |row: usize| fetched.inputs.iter().any(|input| input.reasons[row].is_some());
            let status = |(row, _): &(u32, Why)| if failed(*row as usize) { "fallback" } else { "ok" };
            out.push(text("features"));
            out.push(Arc::new(UInt32Array::from(vec![None; count])));
            let nothing: ArrayRef = Arc::new(StringArray::new_null(count));
            out.push(nothing.clone());
            out.push(Arc::new(StringArray::from_iter_values(chosen.iter().map(status))));
            out.extend([nothing.clone(), nothing]);
            let mut digests = FixedSizeBinaryBuilder::with_capacity(count, TENSOR_DIGEST_BYTES as i32);
            chosen.iter().for_each(|_| digests.append_null());
            out.push(Arc::new(digests.finish()));
        }
    }
    let (queue, forward) = prediction.as_ref().map_or_else(Default::default, |of| (of.queue_time, of.forward_time));
    out.extend([features.fetch_time, features.transform_time, queue, forward, *total].map(micros));
    for (column, array) in service.columns.iter().zip(&rows.columns) {
        out.push(value(&columns::input(&column.name), array, &column.column_type, column.sensitive)?);
    }
    for (index, output) in service.outputs.iter().enumerate() {
        let (array, statuses) = (&features.assembled.columns[index], &features.assembled.statuses[index]);
        out.push(value(&columns::feature(&output.name), array, &output.feature_type, output.sensitive)?);
        out.push(Arc::new(UInt8Array::from_iter_values(chosen.iter().map(|(row, _)| statuses[*row as usize] as u8))));
        let origin = |(row, _): &(u32, Why)| origin(service, features, index, *row as usize) as u8;
        out.push(Arc::new(UInt8Array::from_iter_values(chosen.iter().map(origin))));
    }
    for input in &fetched.inputs {
        let positions = || chosen.iter().map(|(row, _)| input.positions[*row as usize]);
        out.push(Arc::new(positions().map(|position| position.map(|of| of.time)).collect::<Int64Array>()));
        out.push(Arc::new(positions().map(|position| position.map(|of| of.sequence)).collect::<UInt64Array>()));
        let moment = |row: usize| input.answer.event_times.get(row).copied().flatten().filter(|time| *time != STATIC);
        out.push(times(chosen.iter().map(|(row, _)| moment(*row as usize))));
        let reason = |(row, _): &(u32, Why)| input.reasons[*row as usize].map(|reason| reason_number(reason) as u8);
        out.push(Arc::new(chosen.iter().map(reason).collect::<UInt8Array>()));
    }
    for (_, array, _) in prediction.iter().flat_map(|of| &of.outputs) {
        out.push(picked(array)?);
    }
    RecordBatch::try_new(schema.schema.clone(), out)
}

fn times(times: impl Iterator<Item = Option<Micros>>) -> ArrayRef {
    Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
}

fn hashes(array: &ArrayRef, value_type: &Type, chosen: &[(u32, Why)], key: &[u8], column: &str) -> ArrayRef {
    let mut out = StringBuilder::new();
    let mut encoded = Vec::new();
    for (row, _) in chosen {
        let value = Value::from_array(array, *row as usize, value_type);
        if value.is_null() {
            out.append_null();
            continue;
        }
        encoded.clear();
        encode(&value, &mut encoded);
        out.append_value(hashed(key, column, &encoded));
    }
    Arc::new(out.finish())
}

/// Where one value of an answer came from.
fn origin(service: &ServicePlan, features: &Features, output: usize, row: usize) -> Origin {
    if features.assembled.statuses[output][row] == Status::Unavailable {
        return Origin::Unavailable;
    }
    match service.outputs[output].slot {
        Slot::Request(_) => Origin::Request,
        Slot::At | Slot::Transform(_) => Origin::Transform,
        Slot::EventTime { .. } => Origin::Stored,
        Slot::Feature { input, feature } => {
            let has_default = service.inputs[input].view.feature(feature).1.is_some();
            match features.fetched.inputs[input].answer.values[feature].is_null(row) && has_default {
                true => Origin::Default,
                false => Origin::Stored,
            }
        }
    }
}
