//! Forgetting entities in what was logged, and in labels, whose columns have the same names.
//!
//! Rows go whole: a served row is about the entities that it was asked for, and nothing else counts it.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use feature_defs::forgotten::Forgotten;
use feature_defs::plan::ServicePlan;
use feature_defs::value::Type;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::{LogRows, ServingLogError, columns, decode, encode, failed, folder};

/// What forgetting did to a service's log, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redacted {
    pub rows: u64,
    pub files: u64,
    /// Files whose rows name entities by hashes only, or whose definitions are not at hand: they were not looked into.
    pub unread: u64,
}

/// Which rows are about a forgotten entity; None where none is. Columns that a batch lacks, or holds as hashes, say nothing.
pub fn hidden(service: &ServicePlan, batch: &RecordBatch, forgotten: &Forgotten) -> Option<Vec<bool>> {
    let mut all: Option<Vec<bool>> = None;
    for input in &service.inputs {
        let key = |place: &usize| -> Option<(ArrayRef, &Type)> {
            let column = &service.columns[*place];
            let array = batch.column_by_name(&columns::input(&column.name))?;
            (!column.sensitive && *array.data_type() == column.column_type.arrow())
                .then(|| (array.clone(), &column.column_type))
        };
        let Some(keys) = input.keys.iter().map(key).collect::<Option<Vec<_>>>() else { continue };
        let Some(found) = input.view.hidden(forgotten, &keys, batch.num_rows()) else { continue };
        match &mut all {
            Some(all) => all.iter_mut().zip(found).for_each(|(all, found)| *all |= found),
            none => *none = Some(found),
        }
    }
    all.filter(|all| all.contains(&true))
}

/// Without the rows that are about forgotten entities, and how many these were.
pub fn without(
    service: &ServicePlan,
    batch: &RecordBatch,
    forgotten: &Forgotten,
) -> Result<Option<(RecordBatch, u64)>, ServingLogError> {
    let Some(hidden) = hidden(service, batch, forgotten) else { return Ok(None) };
    let kept: BooleanArray = hidden.iter().map(|hidden| Some(!hidden)).collect();
    let left = filter_record_batch(batch, &kept)?;
    let gone = (batch.num_rows() - left.num_rows()) as u64;
    Ok(Some((left, gone)))
}

/// A file without rows about forgotten entities: None where it has none of them, empty where nothing is left.
pub fn file_without(
    service: &ServicePlan,
    rows: &LogRows,
    forgotten: &Forgotten,
) -> Result<Option<(Vec<u8>, u64)>, ServingLogError> {
    let Some((left, gone)) = without(service, &rows.batch, forgotten)? else { return Ok(None) };
    let mut bytes = Vec::new();
    if left.num_rows() > 0 {
        let mut header = rows.header.clone();
        header.rows = left.num_rows() as u64;
        encode(&header, &left.schema(), &[left], &mut bytes)?;
    }
    Ok(Some((bytes, gone)))
}

/// Removes rows about forgotten entities from a project's whole log, service by service; `is_dry` only counts them.
/// `service_of` finds the definitions that rows were served by, by name and semantic digest.
pub async fn redact(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service_of: &(dyn Fn(&str, &str) -> Option<Arc<ServicePlan>> + Send + Sync),
    forgotten: &Forgotten,
    is_dry: bool,
) -> Result<Redacted, ServingLogError> {
    let mut redacted = Redacted::default();
    let below = folder(project);
    let listed: Result<Vec<_>, _> = store.list(Some(&below)).try_collect().await;
    for object in listed.map_err(|source| failed(&below, "listed", source))? {
        if object.location.filename().and_then(super::FileName::parse).is_none() {
            continue;
        }
        let read = async { store.get(&object.location).await?.bytes().await };
        let bytes = match read.await {
            Ok(bytes) => bytes,
            // Retention came first.
            Err(object_store::Error::NotFound { .. }) => continue,
            Err(source) => return Err(failed(&object.location, "read", source)),
        };
        let rows = decode(object.location.as_ref(), bytes)?;
        let service = service_of(&rows.header.service, &rows.header.semantic_digest);
        let Some(service) =
            service.filter(|service| !service.columns.iter().any(|column| column.is_key && column.sensitive))
        else {
            redacted.unread += 1;
            continue;
        };
        let Some((bytes, gone)) = file_without(&service, &rows, forgotten)? else { continue };
        redacted.rows += gone;
        redacted.files += 1;
        if is_dry {
            continue;
        }
        let done = match bytes.is_empty() {
            true => store.delete(&object.location).await,
            false => store.put(&object.location, bytes.into()).await.map(drop),
        };
        match done {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(failed(&object.location, "rewritten", source)),
        }
    }
    Ok(redacted)
}
