//! Which label belongs to which logged prediction.
//!
//! By request id and row there is one. By entity and time, a prediction made for time t gets the first outcome of its entity
//! from t to t + `within`: what happened next. Labels that name fewer columns than the request has belong to all predictions
//! that agree in these.

use std::collections::HashMap;

use arrow::array::{Array, ArrayRef, RecordBatch};
use feature_defs::plan::ModelPlan;
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value, encode_nullable};

use super::{LabelError, Read};
use crate::serving_log::columns;

/// A value and when it was added: of two of the same outcome the later counts.
#[derive(Debug, Clone, Copy)]
struct Added {
    at: Micros,
    /// None takes a label back.
    value: Option<f64>,
}

impl Added {
    fn or(&mut self, other: Added, which: Which) {
        let replaces = match which {
            Which::Latest => other.at >= self.at,
            Which::First => other.at < self.at,
        };
        if replaces {
            *self = other;
        }
    }
}

/// Of several labels of the same outcome, the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Corrections count.
    Latest,
    /// What was known first stays: for whoever may count an outcome once only. A label that was taken back was known.
    First,
}

/// Outcomes of one entity in order of time.
type Outcomes = Vec<(Micros, Added)>;
/// By the encoded columns that name the entity.
type Entities = HashMap<Vec<u8>, Outcomes>;

/// Labels of one metric, ready to be asked.
#[derive(Debug, Default)]
pub struct Index {
    by_request: HashMap<(String, u32), Added>,
    /// By the columns that name the entity, as places among those of the service.
    by_entity: Vec<(Vec<usize>, Entities)>,
}

/// The columns of the request as they are logged: sensitive ones are text.
struct Keys {
    columns: Vec<(ArrayRef, Type)>,
}

impl Keys {
    /// None where the batch lacks one.
    fn of(model: &ModelPlan, places: &[usize], batch: &RecordBatch) -> Option<Keys> {
        let column = |place: &usize| {
            let column = &model.service.columns[*place];
            let array = batch.column_by_name(&columns::input(&column.name))?.clone();
            let key_type = if column.sensitive { Type::String } else { column.column_type.clone() };
            (*array.data_type() == key_type.arrow()).then_some((array, key_type))
        };
        Some(Keys { columns: places.iter().map(column).collect::<Option<_>>()? })
    }

    /// Null where any of them is: a null names nobody.
    fn encode(&self, row: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for (array, key_type) in &self.columns {
            if array.is_null(row) {
                return None;
            }
            encode_nullable(&Value::from_array(array, row, key_type), &mut bytes);
        }
        Some(bytes)
    }
}

impl Index {
    /// Labels of one metric out of all of a model's.
    pub fn new(model: &ModelPlan, batches: &[RecordBatch], metric: &str) -> Result<Index, LabelError> {
        Index::built(model, batches, metric, Which::Latest)
    }

    /// The same without corrections, for [`Index::first_known`].
    pub fn first(model: &ModelPlan, batches: &[RecordBatch], metric: &str) -> Result<Index, LabelError> {
        Index::built(model, batches, metric, Which::First)
    }

    fn built(model: &ModelPlan, batches: &[RecordBatch], metric: &str, which: Which) -> Result<Index, LabelError> {
        let mut index = Index::default();
        for batch in batches {
            let Some(read) = Read::of(batch) else {
                let (path, what) = (format!("labels/{}", model.name), "a column is missing".to_owned());
                return Err(LabelError::Damaged { path, what });
            };
            let places: Vec<usize> = (0..model.service.columns.len())
                .filter(|place| batch.column_by_name(&columns::input(&model.service.columns[*place].name)).is_some())
                .collect();
            let keys = Keys::of(model, &places, batch).filter(|_| !places.is_empty());
            for row in (0..batch.num_rows()).filter(|row| read.metric.value(*row) == metric) {
                let value = read.value.is_valid(row).then(|| read.value.value(row));
                if value.is_none() && which == Which::First {
                    continue;
                }
                let added = Added { at: read.added.value(row), value };
                if let Some((ids, rows)) = read.request
                    && ids.is_valid(row)
                {
                    let of = (ids.value(row).to_owned(), if rows.is_valid(row) { rows.value(row) } else { 0 });
                    index.by_request.entry(of).and_modify(|known| known.or(added, which)).or_insert(added);
                    continue;
                }
                let time = read.time.filter(|times| times.is_valid(row)).map(|times| times.value(row));
                if let (Some(time), Some(key)) = (time, keys.as_ref().and_then(|keys| keys.encode(row))) {
                    index.entity(&places).entry(key).or_default().push((time, added));
                }
            }
        }
        for (_, entities) in &mut index.by_entity {
            for outcomes in entities.values_mut() {
                outcomes.sort_by_key(|(time, added)| (*time, added.at));
                match which {
                    Which::Latest => {
                        outcomes.reverse();
                        outcomes.dedup_by_key(|(time, _)| *time);
                        outcomes.reverse();
                    }
                    Which::First => outcomes.dedup_by_key(|(time, _)| *time),
                }
            }
        }
        Ok(index)
    }

    fn entity(&mut self, places: &[usize]) -> &mut Entities {
        let found = self.by_entity.iter().position(|(known, _)| known == places).unwrap_or_else(|| {
            self.by_entity.push((places.to_vec(), HashMap::new()));
            self.by_entity.len() - 1
        });
        &mut self.by_entity[found].1
    }

    pub fn is_empty(&self) -> bool {
        self.by_request.is_empty() && self.by_entity.is_empty()
    }

    /// The label of every row of a file of the log, whose columns these are.
    pub fn labels_of(
        &self,
        model: &ModelPlan,
        batch: &RecordBatch,
        requests: (&arrow::array::StringArray, &arrow::array::UInt32Array),
        at: &[Micros],
        within: Option<Micros>,
    ) -> Vec<Option<f64>> {
        let entities: Vec<(Keys, &Entities)> = self
            .by_entity
            .iter()
            .filter_map(|(places, entities)| Some((Keys::of(model, places, batch)?, entities)))
            .collect();
        let label = |row: usize| {
            let of = (requests.0.value(row).to_owned(), requests.1.value(row));
            if let Some(added) = self.by_request.get(&of) {
                return added.value;
            }
            let next = |(keys, entities): &(Keys, &Entities)| {
                let outcomes = entities.get(&keys.encode(row)?)?;
                let first = outcomes.partition_point(|(time, _)| *time < at[row]);
                // One that was taken back did not happen.
                let (time, added) = outcomes[first..].iter().find(|(_, added)| added.value.is_some())?;
                let is_within = within.is_none_or(|within| *time <= at[row].saturating_add(within));
                is_within.then_some((*time, added.value?))
            };
            entities.iter().filter_map(next).min_by_key(|(time, _)| *time).map(|(_, value)| value)
        };
        (0..batch.num_rows()).map(label).collect()
    }

    /// Of every row the label that was known of it first, if that was by its time in `until`: what has been counted of it then
    /// is never anything else, whatever is added later. Of an index made by [`Index::first`].
    pub fn first_known(
        &self,
        model: &ModelPlan,
        batch: &RecordBatch,
        requests: (&arrow::array::StringArray, &arrow::array::UInt32Array),
        at: &[Micros],
        within: Option<Micros>,
        until: &[Micros],
    ) -> Vec<Option<f64>> {
        let entities: Vec<(Keys, &Entities)> = self
            .by_entity
            .iter()
            .filter_map(|(places, entities)| Some((Keys::of(model, places, batch)?, entities)))
            .collect();
        let label = |row: usize| {
            let of = (requests.0.value(row).to_owned(), requests.1.value(row));
            let by_request = self.by_request.get(&of).map(|added| (added.at, at[row], added.value));
            let by_entity = entities.iter().filter_map(|(keys, entities)| {
                let outcomes = entities.get(&keys.encode(row)?)?;
                let first = outcomes.partition_point(|(time, _)| *time < at[row]);
                let last = within.map_or(Micros::MAX, |within| at[row].saturating_add(within));
                let inside = outcomes[first..].iter().take_while(|(time, _)| *time <= last);
                inside.map(|(time, added)| (added.at, *time, added.value)).min_by_key(|(at, time, _)| (*at, *time))
            });
            let known = by_request.into_iter().chain(by_entity);
            let found = known.min_by_key(|(added, time, _)| (*added, *time));
            found.filter(|(added, ..)| *added <= until[row]).and_then(|(_, _, value)| value)
        };
        (0..batch.num_rows()).map(label).collect()
    }
}
