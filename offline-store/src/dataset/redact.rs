//! Forgetting entities in datasets: rows that were asked for a forgotten entity go, and the manifest says so.
//!
//! The parts are written anew as another attempt, the manifest that names it replaces the old one in one put, and then
//! the old attempt is removed like any other that does not count. A reader that began before finds its next part missing
//! and has to begin again. The dataset keeps its name, its id and what it says it was made from: the same recipe finds it.

use std::path::Path as FilePath;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::SchemaRef;
use feature_defs::forgotten::{Forgotten, KeyHash};
use feature_defs::plan::{ServicePlan, align_batch, encode_entity_keys};
use feature_defs::value::Type;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

use super::write::DatasetWriter;
use super::{DatasetError, Manifest, Recipe, Redacted, Selection, StoredDataset, damaged, folder_of, sweep};

/// Where a spine of a service names an entity.
struct Named {
    entity: Arc<str>,
    columns: Vec<(String, Type)>,
}

/// What the rows of a dataset, or of a spine, are asked for.
fn named(service: &ServicePlan) -> Vec<Named> {
    let mut all: Vec<Named> = Vec::new();
    for input in &service.inputs {
        for part in input.view.about.iter().filter(|part| !part.keys.is_empty()) {
            let column =
                |key: &usize| (service.columns[input.keys[*key]].name.clone(), input.view.keys[*key].key_type.clone());
            let columns: Vec<_> = part.keys.iter().map(column).collect();
            if !all.iter().any(|known| known.entity == part.entity && known.columns == columns) {
                all.push(Named { entity: part.entity.clone(), columns });
            }
        }
    }
    all
}

/// By row, the forgotten entity that it is asked for, if any.
type AskedFor = Vec<Option<(Arc<str>, KeyHash)>>;

/// By row, which forgotten entity it is asked for; None where no row is asked for any.
fn asked_for(named: &[Named], forgotten: &Forgotten, batch: &RecordBatch) -> Result<Option<AskedFor>, DatasetError> {
    let mut found: Option<AskedFor> = None;
    for named in named.iter().filter(|named| forgotten.mentions(&named.entity)) {
        let wanted = named.columns.iter().map(|(name, column_type)| (name.as_str(), column_type));
        let aligned = align_batch("a dataset", wanted, batch, false);
        let aligned = aligned.map_err(|error| DatasetError::Part(error.to_string()))?;
        let columns: Vec<(ArrayRef, &Type)> =
            aligned.columns().iter().cloned().zip(named.columns.iter().map(|(_, column_type)| column_type)).collect();
        let keys = encode_entity_keys(&columns, batch.num_rows());
        for row in 0..batch.num_rows() {
            let Some(key) = keys.get(row).filter(|key| forgotten.contains(&named.entity, key)) else { continue };
            let found = found.get_or_insert_with(|| vec![None; batch.num_rows()]);
            found[row].get_or_insert_with(|| (named.entity.clone(), forgotten.hash(&named.entity, key)));
        }
    }
    Ok(found)
}

/// Notes whose rows went.
fn note(redacted: &mut Vec<Redacted>, found: &[Option<(Arc<str>, KeyHash)>], at: &str) {
    for (entity, hash) in found.iter().flatten() {
        let key = hash.to_string();
        match redacted.iter_mut().find(|known| *known.entity == **entity && known.key == key) {
            Some(known) => known.rows += 1,
            None => redacted.push(Redacted { at: at.to_owned(), entity: entity.to_string(), key, rows: 1 }),
        }
    }
}

fn without(batch: &RecordBatch, found: &[Option<(Arc<str>, KeyHash)>]) -> Result<RecordBatch, DatasetError> {
    let kept = found.iter().map(|found| Some(found.is_none())).collect();
    filter_record_batch(batch, &kept).map_err(|error| DatasetError::Part(error.to_string()))
}

/// A spine without the rows that ask for forgotten entities: a dataset does not keep them again. Columns that are missing
/// or of another type are the engine's to complain about.
pub fn leave_out(
    service: &ServicePlan,
    batches: Vec<RecordBatch>,
    at: &str,
) -> Result<(Vec<RecordBatch>, Vec<Redacted>), DatasetError> {
    let mut redacted = Vec::new();
    let Some(forgotten) = service.inputs.first().and_then(|input| input.view.forgotten.get()) else {
        return Ok((batches, redacted));
    };
    let named = named(service);
    let mut left = Vec::with_capacity(batches.len());
    for batch in batches {
        match asked_for(&named, &forgotten, &batch) {
            Ok(Some(found)) => {
                note(&mut redacted, &found, at);
                left.push(without(&batch, &found)?);
            }
            Ok(None) | Err(_) => left.push(batch),
        }
    }
    Ok((left, redacted))
}

/// How many rows of a dataset are asked for forgotten entities. Nothing is changed.
pub async fn look(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    service: &ServicePlan,
    forgotten: &Forgotten,
) -> Result<u64, DatasetError> {
    let named = named(service);
    if !named.iter().any(|named| forgotten.mentions(&named.entity)) {
        return Ok(0);
    }
    let stored = Arc::new(StoredDataset::open(store.clone(), path).await?);
    let mut names: Vec<String> = named.iter().flat_map(|named| &named.columns).map(|(name, _)| name.clone()).collect();
    names.sort_unstable();
    names.dedup();
    let columns = stored.columns(&names)?;
    let mut batches = stored.read(&Selection::default(), &columns, 0)?;
    let mut rows = 0;
    while let Some(batch) = batches.try_next().await? {
        if let Some(found) = asked_for(&named, forgotten, &batch)? {
            rows += found.iter().flatten().count() as u64;
        }
    }
    Ok(rows)
}

/// Removes rows from a dataset. `service` is the one that computed it. Returns the number of rows that went. `local` is as
/// for [`sweep`].
pub async fn redact(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    service: &Arc<ServicePlan>,
    forgotten: &Forgotten,
    at: &str,
    local: Option<&FilePath>,
) -> Result<u64, DatasetError> {
    if look(store, path, service, forgotten).await? == 0 {
        // An earlier run may have been killed before it removed the old parts.
        let manifest = super::open(store, path).await?;
        if !manifest.redacted.is_empty() {
            sweep(store, &manifest, path, local).await?;
        }
        return Ok(0);
    }
    let named = named(service);
    let stored = Arc::new(StoredDataset::open(store.clone(), path).await?);
    let old = stored.manifest.clone();
    // What lies behind the columns goes with its rows, and the profiles are made again of what is left: their edges and
    // labels are values too.
    let schema: SchemaRef = stored.whole_schema().clone();
    let columns: Vec<usize> = (0..schema.fields().len()).collect();
    let seen = stored.schema.fields().len();
    let writer = DatasetWriter::again(store.clone(), folder_of(path), recipe(&old, service), schema);
    let mut writer = writer.with_seen(seen);
    let mut batches = stored.read(&Selection::default(), &columns, 0)?;
    let mut redacted = Vec::new();
    loop {
        let written = match batches.try_next().await {
            Ok(None) => break,
            Ok(Some(batch)) => match asked_for(&named, forgotten, &batch) {
                Ok(Some(found)) => {
                    note(&mut redacted, &found, at);
                    match without(&batch, &found) {
                        Ok(left) => writer.write(&left).await,
                        Err(error) => Err(error),
                    }
                }
                Ok(None) => writer.write(&batch).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            writer.discard().await;
            return Err(error);
        }
    }
    let rows = redacted.iter().map(|redacted| redacted.rows).sum();
    let mut all = old.redacted.clone();
    all.extend(redacted);
    let mut manifest = match writer.manifest(old.known_at.clone()).await {
        Ok(manifest) => manifest,
        Err(error) => {
            writer.discard().await;
            return Err(error);
        }
    };
    (manifest.id, manifest.columns, manifest.redacted) = (old.id, old.columns, all);
    let folder = folder_of(path);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|error| damaged(path, &folder, error))?;
    if let Err(source) = store.put(path, PutPayload::from(text)).await {
        // It may have happened: what is not named is removed by the next run.
        return Err(DatasetError::Store { path: path.to_string(), verb: "written", source });
    }
    sweep(store, &manifest, path, local).await?;
    Ok(rows)
}

/// What the manifest says that it was made from.
fn recipe(manifest: &Manifest, service: &Arc<ServicePlan>) -> Recipe {
    Recipe {
        name: manifest.name.clone(),
        service: service.clone(),
        spine_digest: manifest.spine_digest.clone(),
        sources: manifest.source_digests.iter().map(|(name, digest)| (name.clone(), digest.clone())).collect(),
        visibility: manifest.visibility.clone(),
        statuses: manifest.statuses,
        seed: manifest.seed,
        created_at: manifest.created_at.clone(),
    }
}
