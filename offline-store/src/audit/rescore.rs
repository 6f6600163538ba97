//! Asking model versions again: a sample of logged rows, whose inputs are encoded from the replay.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::UInt32Type;
use async_trait::async_trait;
use feature_defs::plan::{EncodedModelInputs, ModelPlan};

use super::logged::Logged;
use super::report::Rescored;
use super::{AuditError, Auditor};
use crate::serving_log::columns;

/// Rows of each version that are asked again, and versions.
const ROWS_MAX: usize = 64;
const VERSIONS_MAX: usize = 16;
const EXAMPLES: usize = 5;

/// Who can run model versions.
#[async_trait]
pub trait Rescore: Send + Sync {
    /// Runs rows through a version and compares with the outputs that were logged for them: for each row what differs, if
    /// anything does. An error says why the version cannot be asked.
    async fn rescore(
        &self,
        model: &ModelPlan,
        version: u32,
        inputs: &EncodedModelInputs,
        logged: &RecordBatch,
    ) -> Result<Vec<Option<String>>, String>;
}

/// Rows of one version that wait to be asked again.
pub(super) type Versions = BTreeMap<(String, u32), Vec<Logged>>;

/// Keeps rows that a version answered by itself, and whose features are those of the replay.
pub(super) fn keep(
    versions: &mut Versions,
    model: &ModelPlan,
    logged: &Logged,
    clean: &[bool],
) -> Result<(), AuditError> {
    let column = |name: &str| logged.batch.column_by_name(name);
    let damaged = |name: &str| AuditError::Damaged { column: name.to_owned() };
    let numbers = column(columns::VERSION).and_then(|column| column.as_primitive_opt::<UInt32Type>());
    let numbers = numbers.ok_or_else(|| damaged(columns::VERSION))?;
    let statuses = column(columns::STATUS).and_then(|column| column.as_string_opt::<i32>());
    let statuses = statuses.ok_or_else(|| damaged(columns::STATUS))?;
    for row in (0..logged.rows()).filter(|row| clean[*row] && numbers.is_valid(*row) && statuses.value(*row) == "ok") {
        let key = (model.name.to_string(), numbers.value(row));
        if versions.len() >= VERSIONS_MAX && !versions.contains_key(&key) {
            continue;
        }
        let rows = versions.entry(key).or_default();
        if rows.len() < ROWS_MAX {
            rows.push(logged.take(&[row as u32])?);
        }
    }
    Ok(())
}

impl Auditor<'_> {
    /// Asks the versions that answered a few rows for the same again.
    pub async fn rescore(&mut self, asked: &dyn Rescore) -> Result<(), AuditError> {
        let mut report = Rescored::default();
        for ((name, version), rows) in std::mem::take(&mut self.versions) {
            let Some(model) = self.plan.model(&name).cloned() else { continue };
            let batches: Vec<&RecordBatch> = rows.iter().map(|row| &row.batch).collect();
            let Some(first) = rows.first() else { continue };
            let batch = arrow::compute::concat_batches(&first.batch.schema(), batches)?;
            let logged = Logged { batch, hashed: first.hashed.clone() };
            let as_known = self.replay(&logged, true).await?;
            let encoded = super::tensors::encode(&model, &as_known, logged.rows());
            match asked.rescore(&model, version, &encoded, &logged.batch).await {
                Ok(differences) => {
                    for (row, difference) in differences.into_iter().enumerate() {
                        report.compared += 1;
                        let Some(difference) = difference else {
                            report.equal += 1;
                            continue;
                        };
                        report.different += 1;
                        if report.examples.len() < EXAMPLES {
                            let (request, number) = logged.request(row);
                            report.examples.push(format!("{name} v{version}, {request} row {number}: {difference}"));
                        }
                    }
                }
                Err(why) => {
                    *report.not_compared.entry(format!("{name} v{version}: {why}")).or_default() +=
                        logged.rows() as u64;
                }
            }
        }
        self.rescored = Some(report);
        Ok(())
    }
}
