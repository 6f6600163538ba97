//! What became of predictions: outcomes that are known later, joined to the serving log.
//!
//! A label names a prediction by its request id and row, or says what happened to an entity at a time; then it belongs to
//! every logged prediction of that entity whose time lies at most `label.within` before ([`join`]). Metrics of the business
//! come the same way, under names of their own. What is added stays: a label that is added again is a correction, and the
//! latest counts. Files lie in `<project>/labels/<model>/<day>/`, by the day on which they were added.

pub mod join;
pub mod quality;
pub mod report;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::compute::{CastOptions, cast, cast_with_options, concat_batches};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, TimeUnit, TimestampMicrosecondType, UInt32Type};
use bytes::Bytes;
use feature_defs::forgotten::Forgotten;
use feature_defs::plan::{LabelPlan, ModelPlan, align_batch};
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value, encode};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use uuid::Uuid;

use crate::serving_log::{self, columns, hashed};

const FOLDER: &str = "labels";
/// Rows of one file.
pub const ROWS_MAX: usize = 1 << 20;
/// Labels of a model that are held in memory to be joined.
pub const LABELS_MAX: usize = 8_000_000;
const FILES_AHEAD: usize = 4;

pub const REQUEST_ID: &str = "request_id";
pub const ROW: &str = "row";
/// When an outcome happened, or became known.
pub const TIME: &str = "time";
const ADDED: &str = "added";
const VALUE: &str = "value";
const METRIC: &str = "metric";

#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    #[error("{path} of the labels could not be {verb}")]
    Store { path: String, verb: &'static str, source: object_store::Error },
    #[error("{path} is no file of labels ({what}); remove it, and add its labels again")]
    Damaged { path: String, what: String },
    #[error(
        "model `{model}` declares no label; add `label: {{name: ..., type: bool, within: 24h}}` to it, or give the values a name with `--metric`"
    )]
    NoLabel { model: String },
    #[error("labels are {found}; numbers and booleans can be joined and judged")]
    Type { found: String },
    #[error("the labels have no column `{column}`; they have: {known}")]
    Missing { column: String, known: String },
    #[error(
        "the labels do not say which predictions they are of: give `{REQUEST_ID}` (with `{ROW}`), or columns of the request ({known}) and `{TIME}`"
    )]
    NoPredictions { known: String },
    #[error("column `{column}` of the labels is {found}, but {wanted} was expected")]
    Column { column: String, found: String, wanted: String },
    #[error("row {row} of the labels has {what}")]
    Row { row: usize, what: String },
    #[error("{rows} labels at once, at most {ROWS_MAX} are taken; add them in several pieces")]
    TooMany { rows: usize },
    #[error("there are more than {LABELS_MAX} labels for model `{model}` in this time; ask for a shorter time")]
    TooManyToJoin { model: String },
    #[error(transparent)]
    Log(#[from] serving_log::ServingLogError),
    #[error("the labels cannot be worked with: {0}")]
    Arrow(#[from] arrow::error::ArrowError),
    #[error("the labels could not be encoded: {0}")]
    Encode(#[from] parquet::errors::ParquetError),
    #[error("a decision could not be evaluated: {0}")]
    Decision(#[from] feature_defs::expression::EvaluateError),
}

/// Labels as somebody gives them, checked: of one metric, with what names their predictions.
#[derive(Debug, Clone)]
pub struct Labels {
    batch: RecordBatch,
}

/// What the value is called: the model's label unless said otherwise.
pub fn metric_of<'a>(model: &'a ModelPlan, metric: Option<&'a str>) -> Result<&'a str, LabelError> {
    match (metric, &model.label) {
        (Some(metric), _) => Ok(metric),
        (None, Some(label)) => Ok(&label.name),
        (None, None) => Err(LabelError::NoLabel { model: model.name.to_string() }),
    }
}

/// The columns of a request that labels can name predictions by, with their types.
fn keys(model: &ModelPlan) -> impl Iterator<Item = (&str, &Type, bool)> {
    model.service.columns.iter().map(|column| (column.name.as_str(), &column.column_type, column.sensitive))
}

impl Labels {
    /// Reads rows of a user's table. The value is in the column named like the metric. `hash_key` hashes sensitive columns, as
    /// the serving log does.
    pub fn of(
        model: &ModelPlan,
        metric: Option<&str>,
        given: &RecordBatch,
        added: Micros,
        hash_key: &[u8],
    ) -> Result<Labels, LabelError> {
        let metric = metric_of(model, metric)?;
        let rows = given.num_rows();
        if rows > ROWS_MAX {
            return Err(LabelError::TooMany { rows });
        }
        let known = || {
            let schema = given.schema();
            schema.fields().iter().map(|field| format!("`{}`", field.name())).collect::<Vec<_>>().join(", ")
        };
        let value = given.column_by_name(metric);
        let value = value.ok_or_else(|| LabelError::Missing { column: metric.to_owned(), known: known() })?;
        let value = as_numbers(value)?;
        if let Some(row) = (0..rows).find(|row| value.is_valid(*row) && !value.value(*row).is_finite()) {
            return Err(LabelError::Row { row, what: format!("no finite number as `{metric}`") });
        }
        let metrics: ArrayRef = Arc::new(StringArray::from(vec![metric; rows]));
        let time = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let stamps = TimestampMicrosecondArray::from(vec![added; rows]).with_timezone("UTC");
        let mut fields = vec![
            Field::new(METRIC, DataType::Utf8, false),
            Field::new(VALUE, DataType::Float64, true),
            Field::new(ADDED, time.clone(), false),
        ];
        let mut out: Vec<ArrayRef> = vec![metrics, Arc::new(value), Arc::new(stamps)];
        let column = |name: &str, wanted: &DataType| -> Result<Option<ArrayRef>, LabelError> {
            let Some(found) = given.column_by_name(name) else { return Ok(None) };
            let wrong = |found: &DataType| LabelError::Column {
                column: name.to_owned(),
                found: found.to_string(),
                wanted: wanted.to_string(),
            };
            let options = CastOptions { safe: false, ..CastOptions::default() };
            let cast = cast_with_options(found, wanted, &options);
            Ok(Some(cast.map_err(|_| wrong(found.data_type()))?))
        };
        let ids = column(REQUEST_ID, &DataType::Utf8)?;
        if let Some(ids) = ids {
            let numbers = column(ROW, &DataType::UInt32)?;
            let numbers = numbers.unwrap_or_else(|| Arc::new(arrow::array::UInt32Array::from(vec![0; rows])));
            fields.extend([Field::new(REQUEST_ID, DataType::Utf8, true), Field::new(ROW, DataType::UInt32, true)]);
            out.extend([ids, numbers]);
        }
        let times = column(TIME, &time)?;
        let has_time = times.is_some();
        if let Some(times) = times {
            fields.push(Field::new(TIME, time, true));
            out.push(times);
        }
        let mut has_keys = false;
        for (name, key_type, sensitive) in keys(model) {
            if given.column_by_name(name).is_none() {
                continue;
            }
            let aligned = align_batch("labels", [(name, key_type)].into_iter(), given, false).map_err(|_| {
                LabelError::Column {
                    column: name.to_owned(),
                    found: given.column_by_name(name).map_or_else(String::new, |found| found.data_type().to_string()),
                    wanted: key_type.to_string(),
                }
            })?;
            let array = aligned.column(0);
            let stored = if sensitive { hashes(array, key_type, hash_key, name) } else { array.clone() };
            fields.push(Field::new(columns::input(name), stored.data_type().clone(), true));
            out.push(stored);
            has_keys = true;
        }
        let by_request = given.column_by_name(REQUEST_ID).is_some();
        if !(by_request || has_keys && has_time) {
            let known = keys(model).map(|(name, ..)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(LabelError::NoPredictions { known });
        }
        Ok(Labels { batch: RecordBatch::try_new(Arc::new(Schema::new(fields)), out)? })
    }

    pub fn rows(&self) -> usize {
        self.batch.num_rows()
    }
}

fn as_numbers(array: &ArrayRef) -> Result<Float64Array, LabelError> {
    match array.data_type() {
        data_type if data_type.is_numeric() || *data_type == DataType::Boolean => {
            Ok(cast(array, &DataType::Float64)?.as_primitive::<Float64Type>().clone())
        }
        other => Err(LabelError::Type { found: other.to_string() }),
    }
}

fn hashes(array: &ArrayRef, key_type: &Type, hash_key: &[u8], column: &str) -> ArrayRef {
    let hash = |row: usize| {
        let value = Value::from_array(array, row, key_type);
        if value.is_null() {
            return None;
        }
        let mut bytes = Vec::new();
        encode(&value, &mut bytes);
        Some(hashed(hash_key, &columns::input(column), &bytes))
    };
    Arc::new((0..array.len()).map(hash).collect::<StringArray>())
}

fn folder(project: &Path, model: &str) -> Path {
    project.clone().join(FOLDER).join(model)
}

/// Keeps labels. When this returns they are on the object store.
pub async fn add(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
    labels: &Labels,
    added: Micros,
) -> Result<(), LabelError> {
    if labels.rows() == 0 {
        return Ok(());
    }
    let bytes = encoded(&labels.batch)?;
    let name = format!("{:016x}-{}.parquet", added as u64 ^ (1 << 63), Uuid::new_v4().simple());
    let path = folder(project, &model.name).join(serving_log::day(added).to_string()).join(name);
    let put = store.put(&path, bytes.into()).await;
    put.map_err(|source| LabelError::Store { path: path.to_string(), verb: "written", source })?;
    Ok(())
}

/// All labels of a model, for [`join::Index`].
pub async fn read(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
) -> Result<Vec<RecordBatch>, LabelError> {
    let folder = folder(project, &model.name);
    let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
    let mut listed = listed.map_err(|source| LabelError::Store { path: folder.to_string(), verb: "listed", source })?;
    // Names sort by when they were added.
    listed.sort_by(|a, b| a.location.cmp(&b.location));
    let read = |path: Path| {
        let store = store.clone();
        async move {
            let bytes = async { store.get(&path).await?.bytes().await };
            match bytes.await {
                Ok(bytes) => decode(&path, bytes),
                Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
                Err(source) => Err(LabelError::Store { path: path.to_string(), verb: "read", source }),
            }
        }
    };
    let mut files = futures::stream::iter(listed.into_iter().map(|object| read(object.location))).buffered(FILES_AHEAD);
    let (mut found, mut rows) = (Vec::new(), 0);
    while let Some(batches) = files.next().await {
        for batch in batches? {
            rows += batch.num_rows();
            if rows > LABELS_MAX {
                return Err(LabelError::TooManyToJoin { model: model.name.to_string() });
            }
            found.push(batch);
        }
    }
    Ok(found)
}

/// Removes labels that name forgotten entities; `is_dry` only counts them. Returns rows and files.
pub async fn forget(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &ModelPlan,
    forgotten: &Forgotten,
    is_dry: bool,
) -> Result<(u64, u64), LabelError> {
    let folder = folder(project, &model.name);
    let failed = |path: &Path, verb, source| LabelError::Store { path: path.to_string(), verb, source };
    let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
    let (mut rows, mut files) = (0, 0);
    for object in listed.map_err(|source| failed(&folder, "listed", source))? {
        let path = &object.location;
        let read = async { store.get(path).await?.bytes().await };
        let batches = decode(path, read.await.map_err(|source| failed(path, "read", source))?)?;
        let Some(first) = batches.first() else { continue };
        let whole = concat_batches(&first.schema(), &batches)?;
        let Some((left, gone)) = serving_log::redact::without(&model.service, &whole, forgotten)? else { continue };
        rows += gone;
        files += 1;
        if is_dry {
            continue;
        }
        let done = match left.num_rows() {
            0 => store.delete(path).await,
            _ => store.put(path, encoded(&left)?.into()).await.map(drop),
        };
        done.map_err(|source| failed(path, "rewritten", source))?;
    }
    Ok((rows, files))
}

fn encoded(batch: &RecordBatch) -> Result<Vec<u8>, LabelError> {
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?)).build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties))?;
    writer.write(batch)?;
    writer.close()?;
    Ok(bytes)
}

fn decode(path: &Path, bytes: Bytes) -> Result<Vec<RecordBatch>, LabelError> {
    let damaged = |what: String| LabelError::Damaged { path: path.to_string(), what };
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).and_then(|builder| builder.build());
    let reader = reader.map_err(|error| damaged(error.to_string()))?;
    reader.map(|batch| batch.map_err(|error| damaged(error.to_string()))).collect()
}

/// The columns that every file has, typed.
struct Read<'a> {
    metric: &'a StringArray,
    value: &'a Float64Array,
    added: &'a TimestampMicrosecondArray,
    time: Option<&'a TimestampMicrosecondArray>,
    request: Option<(&'a StringArray, &'a arrow::array::UInt32Array)>,
}

impl<'a> Read<'a> {
    fn of(batch: &'a RecordBatch) -> Option<Read<'a>> {
        let stamps = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<TimestampMicrosecondType>();
        let texts = |name: &str| batch.column_by_name(name)?.as_string_opt::<i32>();
        let rows = || batch.column_by_name(ROW)?.as_primitive_opt::<UInt32Type>();
        Some(Read {
            metric: texts(METRIC)?,
            value: batch.column_by_name(VALUE)?.as_primitive_opt::<Float64Type>()?,
            added: stamps(ADDED)?,
            time: stamps(TIME),
            request: texts(REQUEST_ID).zip(rows()),
        })
    }
}

/// Whether a label type is judged by classes or by errors.
pub fn is_class(label: &LabelPlan) -> bool {
    label.label_type == Type::Bool
}

#[cfg(test)]
mod tests;
