//! Writing files of tables: how they are encoded, and how a sorted stream becomes the files of a run.
//!
//! Files are encoded for reading: whoever asks for a training set decodes every value of the columns it needs. So floats
//! and times are plain and not compressed (decoding is a copy; a dictionary of values that hardly repeat is a detour, and
//! LZ4 finds nothing in them), everything else has a dictionary and LZ4 (sorted keys become runs of one number). Only keys,
//! times and positions have statistics, by row group and by page. The numbers behind the choice are in the design note.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, UInt32Array};
use arrow::compute::{max, min, partition};
use arrow::datatypes::{DataType, Int64Type, Schema, SchemaRef, TimestampMicrosecondType, UInt32Type, UInt64Type};
use feature_defs::time::{Micros, Position};
use parquet::arrow::{ArrowSchemaConverter, ArrowWriter};
use parquet::basic::{Compression, Encoding};
use parquet::errors::ParquetError;
use parquet::file::metadata::SortingColumn;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::{Clustering, Folder, POSITION_TIME, SEQUENCE, TableError, TableFile, id};

/// The column that carries the bucket of each row from the sort to the files; it is in none of them.
pub(crate) const BUCKET: &str = "__bucket";

/// Rows of a row group: what a reader decodes at least, and what several readers of one file share. Decoding is as fast
/// from 128 thousand to a million rows; a writer holds one row group encoded.
const GROUP_ROWS: usize = 256 << 10;
/// A larger file is continued in another one, for a file is held whole until it is put: a single put is durable when it
/// returns, an upload in parts is not on every store.
const FILE_BYTES: usize = 64 << 20;
/// Rows of a page: what statistics let a reader skip.
const PAGE_ROWS: usize = 32 << 10;

/// How a file is encoded. `clustering` where its rows are sorted.
pub(crate) fn properties(
    schema: &Schema,
    clustering: Option<&Clustering>,
    event_time: Option<&str>,
) -> WriterProperties {
    let mut builder = WriterProperties::builder()
        .set_compression(Compression::LZ4_RAW)
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_data_page_size_limit(PAGE_ROWS * 16)
        .set_statistics_enabled(EnabledStatistics::None);
    for field in schema.fields() {
        let path = || ColumnPath::from(field.name().as_str());
        let is_position = field.name() == POSITION_TIME || field.name() == SEQUENCE;
        let is_event_time = event_time == Some(field.name().as_str());
        let is_key = clustering.is_some_and(|clustering| clustering.keys.iter().any(|key| key.column == *field.name()));
        let is_number = matches!(field.data_type(), DataType::Float32 | DataType::Float64 | DataType::Timestamp(_, _));
        if is_number || is_position {
            builder = builder
                .set_column_dictionary_enabled(path(), false)
                .set_column_encoding(path(), Encoding::PLAIN)
                .set_column_compression(path(), Compression::UNCOMPRESSED);
        }
        if is_position || is_event_time || is_key {
            builder = builder.set_column_statistics_enabled(path(), EnabledStatistics::Page);
        }
    }
    if let Some(clustering) = clustering {
        let leaves = ArrowSchemaConverter::new().convert(schema);
        let leaf = |name: &String| {
            let leaves = leaves.as_ref().ok()?.columns();
            leaves.iter().position(|leaf| leaf.path().parts().first() == Some(name))
        };
        let sorted = sort_columns(clustering, schema).into_iter().map_while(|name| leaf(&name));
        let sorted = sorted.map(|leaf| SortingColumn { column_idx: leaf as i32, descending: false, nulls_first: true });
        builder = builder.set_sorting_columns(Some(sorted.collect()));
    }
    builder.build()
}

/// The columns by which rows of a bucket are sorted: keys, event time, created time, sequence.
pub(crate) fn sort_columns(clustering: &Clustering, schema: &Schema) -> Vec<String> {
    let keys = clustering.keys.iter().map(|key| &key.column);
    let mut names: Vec<String> = Vec::new();
    let sequence = SEQUENCE.to_owned();
    for name in keys.chain(&clustering.event_time).chain(&clustering.created_time).chain([&sequence]) {
        if schema.column_with_name(name).is_some() && !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// One whole file.
pub(crate) fn encode(batch: &RecordBatch, properties: WriterProperties) -> Result<Vec<u8>, String> {
    let encoded = || {
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties))?;
        writer.write(batch)?;
        writer.into_inner()
    };
    encoded().map_err(|error: ParquetError| error.to_string())
}

/// The least and the greatest event time of a batch.
pub(crate) fn time_bounds(batch: &RecordBatch, event_time: Option<&str>) -> Option<(Micros, Micros)> {
    let times = batch.column_by_name(event_time?)?.as_primitive_opt::<TimestampMicrosecondType>()?;
    Some((min(times)?, max(times)?))
}

/// Deals a sorted stream to the files of a run.
pub(crate) struct RunWriter {
    folder: Folder,
    source_name: String,
    /// Of the files: what is written less the bucket.
    schema: SchemaRef,
    clustering: Clustering,
    properties: WriterProperties,
    /// Names the files of this run.
    id: String,
    open: Option<OpenFile>,
    files: Vec<TableFile>,
}

struct OpenFile {
    bucket: u32,
    writer: ArrowWriter<Vec<u8>>,
    rows: u64,
    positions: Option<(Position, Position)>,
    times: Option<(Micros, Micros)>,
}

impl RunWriter {
    /// `schema` is that of the batches, with the bucket as its last column.
    pub fn new(folder: &Folder, source_name: &str, schema: &Schema, clustering: &Clustering) -> RunWriter {
        let fields: Vec<_> = schema.fields().iter().filter(|field| field.name() != BUCKET).cloned().collect();
        let schema = Arc::new(Schema::new(fields));
        let properties = properties(&schema, Some(clustering), clustering.event_time.as_deref());
        RunWriter {
            folder: folder.clone(),
            source_name: source_name.to_owned(),
            schema,
            clustering: clustering.clone(),
            properties,
            id: id(),
            open: None,
            files: Vec::new(),
        }
    }

    fn failed(&self, error: impl ToString) -> TableError {
        TableError::Write { source_name: self.source_name.clone(), what: error.to_string() }
    }

    pub async fn write(&mut self, batch: &RecordBatch) -> Result<(), TableError> {
        let Some((index, _)) = batch.schema_ref().column_with_name(BUCKET) else {
            return Err(self.failed("rows without a bucket"));
        };
        let buckets: ArrayRef = batch.column(index).clone();
        let mut rows = batch.clone();
        rows.remove_column(index);
        let ranges = partition(std::slice::from_ref(&buckets)).map_err(|error| self.failed(error))?.ranges();
        for range in ranges {
            let bucket = buckets.as_primitive::<UInt32Type>().value(range.start);
            self.write_bucket(bucket, &rows.slice(range.start, range.len())).await?;
        }
        Ok(())
    }

    async fn write_bucket(&mut self, bucket: u32, rows: &RecordBatch) -> Result<(), TableError> {
        if self.open.as_ref().is_some_and(|open| open.bucket != bucket) {
            self.close().await?;
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                let writer = ArrowWriter::try_new(Vec::new(), self.schema.clone(), Some(self.properties.clone()));
                let writer = writer.map_err(|error| self.failed(error))?;
                OpenFile { bucket, writer, rows: 0, positions: None, times: None }
            }
        };
        open.writer.write(rows).map_err(|error| self.failed(error))?;
        open.rows += rows.num_rows() as u64;
        if let Some((first, last)) = position_bounds(rows) {
            let (least, greatest) = open.positions.unwrap_or((first, last));
            open.positions = Some((least.min(first), greatest.max(last)));
        }
        if let Some((first, last)) = time_bounds(rows, self.clustering.event_time.as_deref()) {
            let (least, greatest) = open.times.unwrap_or((first, last));
            open.times = Some((least.min(first), greatest.max(last)));
        }
        let is_full = open.writer.bytes_written() + open.writer.in_progress_size() >= FILE_BYTES;
        self.open = Some(open);
        if is_full { self.close().await } else { Ok(()) }
    }

    async fn close(&mut self) -> Result<(), TableError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let bytes = open.writer.into_inner().map_err(|error| self.failed(error))?;
        let (first, last) = open.positions.unwrap_or((Position::START, Position::START));
        let file = TableFile {
            path: format!("run-{}-{:04}-{:04}.parquet", self.id, open.bucket, self.files.len()),
            level: 1,
            run: 0,
            bucket: Some(open.bucket),
            rows: open.rows,
            bytes: bytes.len() as u64,
            first,
            last,
            event_time_min: open.times.map(|(least, _)| least),
            event_time_max: open.times.map(|(_, greatest)| greatest),
        };
        self.folder.put(&self.folder.file(&file.path), bytes).await?;
        self.files.push(file);
        Ok(())
    }

    /// The files, in order; the run's number is the manifest's to give.
    pub async fn finish(mut self) -> Result<Vec<TableFile>, TableError> {
        self.close().await?;
        Ok(self.files)
    }

    /// Deletes what was written so far.
    pub async fn discard(self) {
        self.folder.delete(self.files.iter().map(|file| self.folder.file(&file.path)).collect()).await;
    }
}

pub(crate) fn position_bounds(batch: &RecordBatch) -> Option<(Position, Position)> {
    let times = batch.column_by_name(POSITION_TIME)?.as_primitive_opt::<Int64Type>()?;
    let sequences = batch.column_by_name(SEQUENCE)?.as_primitive_opt::<UInt64Type>()?;
    let positions = || {
        times
            .values()
            .iter()
            .zip(sequences.values())
            .map(|(time, sequence)| Position { time: *time, sequence: *sequence })
    };
    Some((positions().min()?, positions().max()?))
}

/// The bucket column of rows with these keys.
pub(crate) fn buckets_of(
    clustering: &Clustering,
    source_name: &str,
    batch: &RecordBatch,
) -> Result<ArrayRef, TableError> {
    let rows = batch.num_rows();
    if clustering.buckets <= 1 {
        return Ok(Arc::new(UInt32Array::from(vec![0; rows])));
    }
    let wanted = || clustering.keys.iter().map(|key| (key.column.as_str(), &key.key_type));
    let aligned = feature_defs::plan::align_batch(source_name, wanted(), batch, true)
        .map_err(|source| TableError::Rows { path: "a file".into(), source_name: source_name.to_owned(), source })?;
    let columns: Vec<_> = aligned.columns().iter().cloned().zip(wanted().map(|(_, key_type)| key_type)).collect();
    let keys = feature_defs::plan::encode_entity_keys(&columns, rows);
    // Rows without a key are in no view of this entity; others may read them.
    let bucket = |row: usize| keys.get(row).map_or(0, |key| clustering.bucket_of(key));
    Ok(Arc::new((0..rows).map(bucket).collect::<UInt32Array>()))
}
