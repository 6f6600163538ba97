//! Whether equal features became equal tensors.

use std::sync::Arc;

use arrow::array::{Array, AsArray};
use feature_defs::plan::{Assembled, EncodedModelInputs, ModelPlan};
use feature_defs::time::Status;

use super::AuditError;
use super::compare::Column;
use super::logged::Logged;
use super::report::TensorReport;
use crate::serving_log::{columns as names, tensor_digest};

/// Rows named where they differ.
const EXAMPLES: usize = 5;

/// Encodes the replay of rows as the model's inputs and compares with what the log names. Only rows whose features are
/// equal are told apart: where they differ, so do tensors.
pub fn compare(
    report: &mut TensorReport,
    model: &ModelPlan,
    logged: &Logged,
    as_known: &[Column],
    hidden: &[bool],
    clean: &[bool],
) -> Result<(), AuditError> {
    let damaged = || AuditError::Damaged { column: names::TENSORS.to_owned() };
    let digests = logged.batch.column_by_name(names::TENSORS).ok_or_else(damaged)?;
    let digests = digests.as_fixed_size_binary_opt().ok_or_else(damaged)?;
    // What was hashed was not replayed as it was.
    if model.inputs.iter().flat_map(|input| &input.features).any(|feature| hidden[*feature]) {
        report.passed_over += (0..logged.rows()).filter(|row| digests.is_valid(*row)).count() as u64;
        return Ok(());
    }
    let encoded = encode(model, as_known, logged.rows());
    for (row, is_clean) in clean.iter().enumerate() {
        if digests.is_null(row) {
            continue;
        }
        if !is_clean {
            report.passed_over += 1;
            continue;
        }
        report.compared += 1;
        if tensor_digest(&encoded.inputs, row)[..] == *digests.value(row) {
            report.equal += 1;
        } else {
            report.different += 1;
            if report.examples.len() < EXAMPLES {
                report.examples.push(logged.request(row));
            }
        }
    }
    Ok(())
}

/// The inputs of a model for replayed rows.
pub fn encode(model: &ModelPlan, features: &[Column], rows: usize) -> EncodedModelInputs {
    let status = |number: &u8| Status::from_number(*number).unwrap_or(Status::Unavailable);
    let assembled = Assembled {
        columns: features.iter().map(|column| column.values.clone()).collect(),
        statuses: features.iter().map(|column| column.statuses.iter().map(status).collect::<Arc<[Status]>>()).collect(),
        defaults: vec![0; features.len()],
    };
    model.encode(&assembled, rows)
}
