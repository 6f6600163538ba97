//! From batches of a source to rows of a view: keys, times, tombstones, and evaluated columns.
//!
//! Ingestion, materialization and the offline engine all come through here, so a row means the same to each of them.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int32Array, RecordBatch, RecordBatchOptions, StructArray, UInt32Array,
    new_null_array,
};
use arrow::compute::{CastOptions, cast_with_options, take};
use arrow::datatypes::{DataType, Field, Fields, Int64Type, Schema, TimeUnit, TimestampMicrosecondType};

use super::{SourcePlan, ViewPlan, ViewPlanKind};
use crate::aggregate::Buckets;
use crate::as_of::Times;
use crate::expression::{EvaluateError, Expression};
use crate::time::{Position, STATIC};
use crate::value::{Cells, Type, Value, canonical_f32, canonical_f64};

#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    #[error("source `{source_name}` has no column `{column}`; it has: {known}")]
    MissingColumn { source_name: String, column: String, known: String },
    #[error("column `{column}` of source `{source_name}` is {found}, but {wanted} was expected")]
    WrongType { source_name: String, column: String, found: String, wanted: String },
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    #[error("rows of a source could not be picked")]
    Arrow(#[from] arrow::error::ArrowError),
}

/// The encoded entity keys of many rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EntityKeys {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    /// False where a key part is null: such a row matches nothing.
    valid: Vec<bool>,
}

impl EntityKeys {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// None where a key part is null.
    pub fn get(&self, row: usize) -> Option<&[u8]> {
        let start = if row == 0 { 0 } else { self.ends[row - 1] as usize };
        self.valid[row].then(|| &self.bytes[start..self.ends[row] as usize])
    }

    /// From now on these rows match nothing.
    pub(super) fn hide(&mut self, hidden: &[bool]) {
        for (valid, hidden) in self.valid.iter_mut().zip(hidden) {
            *valid &= !hidden;
        }
    }
}

/// Encodes entity keys from one column per key part. For the entity without keys every row is the empty key.
pub fn encode_entity_keys(columns: &[(ArrayRef, &Type)], rows: usize) -> EntityKeys {
    let mut keys = EntityKeys { bytes: Vec::new(), ends: Vec::with_capacity(rows), valid: Vec::with_capacity(rows) };
    let parts: Vec<Cells<'_>> = columns.iter().map(|(column, key_type)| Cells::new(column, key_type)).collect();
    for row in 0..rows {
        let valid = !parts.iter().any(|part| part.is_null(row));
        if valid {
            parts.iter().for_each(|part| part.encode(row, &mut keys.bytes));
        }
        keys.valid.push(valid);
        keys.ends.push(keys.bytes.len() as u32);
    }
    keys
}

/// Rows of one view, filtered and evaluated; rows that can match nothing are gone.
#[derive(Debug, Clone)]
pub struct ViewRows {
    pub times: Vec<Times>,
    pub keys: EntityKeys,
    pub deleted: Vec<bool>,
    /// For as-of views one column per feature, for windowed views one per aggregate: its input, null where its `where`
    /// excluded the row. Of one that is split: a struct of the bucket's number and the input.
    pub columns: Vec<ArrayRef>,
    /// Row of the source batch each row came from.
    pub source_rows: Vec<u32>,
}

impl ViewRows {
    pub fn len(&self) -> usize {
        self.times.len()
    }

    pub fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    /// The columns for [`encode_cells`](crate::value::encode_cells), which gives the bytes of [`ViewRows::values`].
    pub fn cells<'a>(&'a self, types: &'a [Type]) -> Vec<Cells<'a>> {
        self.columns.iter().zip(types).map(|(column, value_type)| Cells::new(column, value_type)).collect()
    }

    pub fn values(&self, row: usize, types: &[Type]) -> Vec<Value> {
        self.columns.iter().zip(types).map(|(column, value_type)| Value::from_array(column, row, value_type)).collect()
    }
}

impl SourcePlan {
    /// Brings a batch to the source's declared names and types: columns by name, lossless casts, canonical floats. With
    /// `only`, just those columns; absent nullable columns of streams become null.
    pub fn align(&self, batch: &RecordBatch, only: Option<&[String]>) -> Result<RecordBatch, RowsError> {
        let wanted = self.schema.iter().filter(|(name, _)| only.is_none_or(|only| only.contains(name)));
        align_batch(&self.name, wanted.map(|(name, t)| (name.as_str(), t)), batch, self.is_stream())
    }

    /// The times of each row; None where the event time is null. `positions` are those of the log, for streams.
    pub fn times(&self, batch: &RecordBatch, positions: Option<&[Position]>) -> Result<Vec<Option<Times>>, RowsError> {
        let event_times = self.time_column(batch, self.event_time.as_deref())?;
        let created_times = self.time_column(batch, self.created_time.as_deref())?;
        let at = |column: &Option<ArrayRef>, row: usize| {
            let column = column.as_ref()?.as_primitive::<TimestampMicrosecondType>();
            column.is_valid(row).then(|| column.value(row))
        };
        let times = (0..batch.num_rows()).map(|row| {
            let event_time = if event_times.is_some() { at(&event_times, row)? } else { STATIC };
            let created_time = at(&created_times, row);
            let known_time = self.clock.known(event_time, created_time);
            let position = positions
                .map_or(Position { time: known_time.max(event_time), sequence: 0 }, |positions| positions[row]);
            Some(Times { event_time, created_time, known_time, position })
        });
        Ok(times.collect())
    }

    /// Which rows of an aligned batch are tombstones; None where none can be.
    pub fn tombstones(&self, batch: &RecordBatch) -> Result<Option<BooleanArray>, RowsError> {
        let deleted = self.deleted.as_ref().map(|deleted| self.evaluate(deleted, batch)).transpose()?;
        Ok(deleted.map(|deleted| deleted.as_boolean().clone()))
    }

    fn evaluate(&self, expression: &Expression, batch: &RecordBatch) -> Result<ArrayRef, RowsError> {
        let columns: Vec<ArrayRef> =
            expression.columns().iter().map(|column| self.column(batch, &column.name)).collect::<Result<_, _>>()?;
        Ok(expression.evaluate(&columns, batch.num_rows())?)
    }

    fn time_column(&self, batch: &RecordBatch, name: Option<&str>) -> Result<Option<ArrayRef>, RowsError> {
        name.map(|name| self.column(batch, name)).transpose()
    }

    fn column(&self, batch: &RecordBatch, name: &str) -> Result<ArrayRef, RowsError> {
        batch.column_by_name(name).cloned().ok_or_else(|| missing_column(&self.name, name, batch))
    }
}

fn missing_column(source_name: &str, column: &str, batch: &RecordBatch) -> RowsError {
    let schema = batch.schema();
    let known: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    RowsError::MissingColumn { source_name: source_name.into(), column: column.into(), known: known.join(", ") }
}

/// See [`SourcePlan::align`].
pub fn align_batch<'a>(
    source_name: &str,
    wanted: impl Iterator<Item = (&'a str, &'a Type)>,
    batch: &RecordBatch,
    absent_is_null: bool,
) -> Result<RecordBatch, RowsError> {
    let rows = batch.num_rows();
    let mut fields = Vec::new();
    let mut columns = Vec::new();
    for (name, column_type) in wanted {
        let column = match batch.column_by_name(name) {
            Some(column) => column.clone(),
            None if absent_is_null => new_null_array(&column_type.arrow(), rows),
            None => return Err(missing_column(source_name, name, batch)),
        };
        let aligned = cast_lossless(&column, column_type).ok_or_else(|| RowsError::WrongType {
            source_name: source_name.into(),
            column: name.into(),
            found: column.data_type().to_string(),
            wanted: column_type.to_string(),
        })?;
        fields.push(Field::new(name, column_type.arrow(), true));
        columns.push(canonical(aligned));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options).map_err(|error| {
        RowsError::WrongType {
            source_name: source_name.into(),
            column: "a column".into(),
            found: error.to_string(),
            wanted: "a column of its declared type".into(),
        }
    })
}

/// Casts without losing anything: wider integers and floats, strings and binaries of any layout, timestamps of any unit
/// (those without a zone are UTC), dictionaries.
fn cast_lossless(column: &ArrayRef, wanted: &Type) -> Option<ArrayRef> {
    use DataType as D;
    let target = wanted.arrow();
    let found = column.data_type();
    if *found == target {
        return Some(column.clone());
    }
    let lossless = match (found, wanted) {
        (D::Null, _) => true,
        (D::Dictionary(_, value), _) => Type::from_arrow(value).is_some_and(|t| t == *wanted),
        (D::Int8 | D::Int16 | D::UInt8 | D::UInt16, Type::Int32 | Type::Int64 | Type::Float64 | Type::Float32) => true,
        (D::Int32, Type::Int64 | Type::Float64) | (D::UInt32, Type::Int64 | Type::Float64) => true,
        (D::Float16, Type::Float32 | Type::Float64) | (D::Float32, Type::Float64) => true,
        (D::UInt64, Type::Int64) => true, // Checked below: a value beyond i64 is an error, not a wrap.
        (D::LargeUtf8 | D::Utf8View, Type::String) => true,
        (D::LargeBinary | D::BinaryView | D::FixedSizeBinary(_), Type::Binary) => true,
        (D::Timestamp(_, _), Type::Timestamp) => true,
        (D::Date32 | D::Date64, Type::Date | Type::Timestamp) => true,
        (D::Decimal32(p, s) | D::Decimal64(p, s) | D::Decimal128(p, s), Type::Decimal { precision, scale }) => {
            s <= scale && i16::from(*p) - i16::from(*s) <= i16::from(*precision) - i16::from(*scale)
        }
        (D::List(_) | D::LargeList(_) | D::FixedSizeList(_, _), Type::List(_) | Type::Vector(_)) => true,
        (D::Map(_, _), Type::Map(_)) | (D::Struct(_), Type::Struct(_)) => true,
        _ => false,
    };
    if !lossless {
        return None;
    }
    let options = CastOptions { safe: false, ..CastOptions::default() };
    // Nanoseconds are truncated towards the past, so that a row never seems later than it was.
    if let (D::Timestamp(TimeUnit::Nanosecond, _), Type::Timestamp) = (found, wanted) {
        let nanos = cast_with_options(column, &D::Int64, &options).ok()?;
        let micros = nanos.as_primitive::<Int64Type>().unary::<_, TimestampMicrosecondType>(|n| n.div_euclid(1_000));
        return Some(Arc::new(micros.with_timezone("UTC")));
    }
    let cast = match (found, wanted) {
        (D::Timestamp(unit, None), Type::Timestamp) => {
            let utc = cast_with_options(column, &D::Timestamp(*unit, None), &options).ok()?;
            let micros = cast_with_options(&utc, &D::Timestamp(TimeUnit::Microsecond, None), &options).ok()?;
            Arc::new(micros.as_primitive::<TimestampMicrosecondType>().clone().with_timezone("UTC")) as ArrayRef
        }
        _ => cast_with_options(column, &target, &options).ok()?,
    };
    (*cast.data_type() == target).then_some(cast)
}

/// The input of a split aggregate: the bucket of each row beside its value, and null where that is.
fn split(buckets: &Buckets, by: &Expression, apart: &ArrayRef, input: ArrayRef) -> Result<ArrayRef, RowsError> {
    let bucket = |row: usize| buckets.find(&Value::from_array(apart, row, by.value_type())) as i32;
    let numbers: Int32Array = (0..apart.len()).map(|row| Some(bucket(row))).collect();
    let fields = Fields::from(vec![
        Field::new("bucket", DataType::Int32, true),
        Field::new("of", input.data_type().clone(), true),
    ]);
    let nulls = input.logical_nulls();
    Ok(Arc::new(StructArray::try_new(fields, vec![Arc::new(numbers), input], nulls)?))
}

/// One NaN, no -0.0: at sources as at expression outputs.
pub fn canonical(column: ArrayRef) -> ArrayRef {
    use arrow::datatypes::{Float32Type, Float64Type};
    match column.data_type() {
        DataType::Float64 => Arc::new(column.as_primitive::<Float64Type>().unary::<_, Float64Type>(canonical_f64)),
        DataType::Float32 => Arc::new(column.as_primitive::<Float32Type>().unary::<_, Float32Type>(canonical_f32)),
        DataType::FixedSizeList(_, _) | DataType::List(_) | DataType::Struct(_) | DataType::Map(_, _) => {
            match Type::from_arrow(column.data_type()) {
                Some(nested) => {
                    let values: Vec<Value> =
                        (0..column.len()).map(|row| Value::from_array(&column, row, &nested)).collect();
                    Value::to_array(&values, &nested)
                }
                None => column,
            }
        }
        _ => column,
    }
}

impl ViewPlan {
    /// The rows of this view in an aligned batch of its source (at least [`ViewPlan::source_columns`]).
    pub fn rows(&self, batch: &RecordBatch, times: &[Option<Times>]) -> Result<ViewRows, RowsError> {
        let rows = batch.num_rows();
        let filter = self.included(batch)?;
        let deleted = self.source.tombstones(batch)?;
        let is_true = |column: &Option<BooleanArray>, row: usize| {
            column.as_ref().map(|column| column.is_valid(row) && column.value(row))
        };
        let keys = self.entity_keys(&self.key_columns(batch)?, rows);

        // A tombstone is not an event: it is in no window, and it takes back no earlier event.
        let keep: Vec<u32> = (0..rows)
            .filter(|row| {
                is_true(&filter, *row) != Some(false)
                    && times[*row].is_some()
                    && keys.get(*row).is_some()
                    && !(self.is_windowed() && is_true(&deleted, *row) == Some(true))
            })
            .map(|row| row as u32)
            .collect();
        let kept = if keep.len() == rows { batch.clone() } else { take_rows(batch, &keep)? };

        let columns = self.values(&kept)?;
        let mut kept_keys = EntityKeys::default();
        let mut kept_times = Vec::with_capacity(keep.len());
        let mut kept_deleted = Vec::with_capacity(keep.len());
        for row in &keep {
            let row = *row as usize;
            if let (Some(key), Some(times)) = (keys.get(row), times[row]) {
                kept_keys.bytes.extend_from_slice(key);
                kept_keys.ends.push(kept_keys.bytes.len() as u32);
                kept_keys.valid.push(true);
                kept_times.push(times);
                kept_deleted.push(is_true(&deleted, row) == Some(true));
            }
        }
        let mut view_rows =
            ViewRows { times: kept_times, keys: kept_keys, deleted: kept_deleted, columns, source_rows: keep };
        view_rows.clear_tombstones()?;
        Ok(view_rows)
    }

    /// What `where` says of each row of an aligned batch; a null excludes. None where every row is included.
    pub fn included(&self, batch: &RecordBatch) -> Result<Option<BooleanArray>, RowsError> {
        let filter = self.filter.as_ref().map(|filter| self.source.evaluate(filter, batch)).transpose()?;
        Ok(filter.map(|filter| filter.as_boolean().clone()))
    }

    /// The columns of the entity's keys in an aligned batch, in the types of the keys.
    pub fn key_columns(&self, batch: &RecordBatch) -> Result<Vec<(ArrayRef, &Type)>, RowsError> {
        let aligned = self.keys.iter().map(|key| {
            let column = self.source.column(batch, &key.column)?;
            let aligned = cast_lossless(&column, &key.key_type).ok_or_else(|| RowsError::WrongType {
                source_name: self.source.name.to_string(),
                column: key.column.clone(),
                found: column.data_type().to_string(),
                wanted: key.key_type.to_string(),
            })?;
            Ok((aligned, &key.key_type))
        });
        aligned.collect()
    }

    /// What each row of an aligned batch says: the features of an as-of view, or the inputs of a windowed view's
    /// aggregates, null where an aggregate's `where` excluded the row. Rows are taken as they are: not filtered, and with
    /// what tombstones happen to hold.
    pub fn values(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>, RowsError> {
        match &self.kind {
            ViewPlanKind::AsOf { features, .. } => {
                features.iter().map(|feature| self.source.evaluate(&feature.expression, batch)).collect()
            }
            ViewPlanKind::Windowed { aggregates, .. } => aggregates
                .iter()
                .map(|aggregate| {
                    let input = match &aggregate.of {
                        Some(of) => self.source.evaluate(of, batch)?,
                        None => Arc::new(BooleanArray::from(vec![true; batch.num_rows()])),
                    };
                    let input = match &aggregate.filter {
                        None => input,
                        Some(filter) => {
                            let included = self.source.evaluate(filter, batch)?;
                            let included = included.as_boolean();
                            let excluded: BooleanArray = (0..included.len())
                                .map(|row| Some(!(included.is_valid(row) && included.value(row))))
                                .collect();
                            arrow::compute::nullif(&input, &excluded)?
                        }
                    };
                    match (&aggregate.by, aggregate.aggregate.split()) {
                        (Some(by), Some((buckets, _))) => split(buckets, by, &self.source.evaluate(by, batch)?, input),
                        _ => Ok(input),
                    }
                })
                .collect(),
        }
    }
}

impl ViewRows {
    /// A tombstone has no values, whatever the source row held, so that two tombstones are the same row.
    fn clear_tombstones(&mut self) -> Result<(), RowsError> {
        if self.deleted.contains(&true) {
            let deleted = BooleanArray::from(self.deleted.clone());
            for column in &mut self.columns {
                *column = arrow::compute::nullif(column, &deleted)?;
            }
        }
        Ok(())
    }
}

fn take_rows(batch: &RecordBatch, rows: &[u32]) -> Result<RecordBatch, RowsError> {
    let indices = UInt32Array::from(rows.to_vec());
    let columns: Result<Vec<ArrayRef>, _> = batch.columns().iter().map(|column| take(column, &indices, None)).collect();
    let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    let taken = columns.and_then(|columns| RecordBatch::try_new_with_options(batch.schema(), columns, &options));
    Ok(taken?)
}
