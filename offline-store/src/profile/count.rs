//! Counting the rows of one dataset over the bins of another.

use std::sync::Arc;

use drift::counts::{Counter, Counts};
use futures::TryStreamExt;

use super::blocks::ROW;
use super::column::{RowsOf, add};
use super::{BLOCK, FLAGS, Profiles};
use crate::dataset::{DatasetError, Selection, StoredDataset};
use crate::point_in_time::EVENT_TIMESTAMP;
use arrow::array::AsArray;
use arrow::datatypes::{TimestampMicrosecondType, UInt8Type};

/// What counting gave.
#[derive(Debug, Clone)]
pub struct Counted {
    pub rows: u64,
    /// By feature of the profiles; None where the dataset has no such column, or one of another type.
    pub counts: Vec<Option<Counts>>,
}

/// Where a feature of the profiles is in the dataset.
struct Place {
    feature: usize,
    column: usize,
    block: usize,
    flags: Option<usize>,
    counter: Counter,
}

/// Counts the rows of a dataset over the bins of `profiles`, which may be another dataset's.
pub async fn count(dataset: &Arc<StoredDataset>, profiles: &Profiles) -> Result<Counted, DatasetError> {
    let whole = dataset.whole_schema().clone();
    let mut columns: Vec<usize> = Vec::new();
    let mut wanted = |name: &str| -> Option<usize> {
        let (index, _) = whole.column_with_name(name)?;
        Some(columns.iter().position(|known| *known == index).unwrap_or_else(|| {
            columns.push(index);
            columns.len() - 1
        }))
    };
    let at = wanted(EVENT_TIMESTAMP);
    let mut places: Vec<Place> = Vec::new();
    for (feature, profile) in profiles.features.iter().enumerate() {
        let known = whole.column_with_name(&profile.name);
        if known.is_none_or(|(_, field)| *field.data_type() != profile.value_type.arrow()) {
            continue;
        }
        let block = wanted(&format!("{BLOCK}{}", profile.blocks)).or_else(|| wanted(&format!("{BLOCK}{ROW}")));
        let (Some(column), Some(block)) = (wanted(&profile.name), block) else { continue };
        let flags = wanted(&format!("{FLAGS}{}", profile.name));
        let counter = Counter::new(profile.profile.layout().clone());
        places.push(Place { feature, column, block, flags, counter });
    }
    let Some(at) = at.filter(|_| !places.is_empty()) else {
        return Ok(Counted { rows: dataset.manifest.rows, counts: vec![None; profiles.features.len()] });
    };
    let types: Vec<_> = profiles.features.iter().map(|feature| feature.value_type.clone()).collect();
    let mut batches = dataset.read(&Selection::default(), &columns, 0)?;
    let mut rows = 0;
    while let Some(batch) = batches.try_next().await? {
        rows += batch.num_rows() as u64;
        let types = types.clone();
        let work = move || {
            let wrong = || DatasetError::Part("its hidden columns are not what they should be".into());
            let at = batch.column(at).as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(wrong)?.values();
            let bytes =
                |column: usize| batch.column(column).as_primitive_opt::<UInt8Type>().map(|bytes| bytes.values());
            for place in &mut places {
                let buckets: &[u8] = bytes(place.block).ok_or_else(wrong)?;
                let flags: Option<&[u8]> = match place.flags {
                    Some(flags) => Some(bytes(flags).ok_or_else(wrong)?),
                    None => None,
                };
                let of = RowsOf { buckets, flags, at };
                add(&mut place.counter, batch.column(place.column), &types[place.feature], &of)
                    .map_err(|error| DatasetError::Part(error.to_string()))?;
            }
            Ok(places)
        };
        let worked = tokio::task::spawn_blocking(work).await;
        places = worked.map_err(|error| DatasetError::Part(error.to_string()))??;
    }
    let mut counts = vec![None; profiles.features.len()];
    for mut place in places {
        counts[place.feature] = Some(place.counter.take());
    }
    Ok(Counted { rows, counts })
}
