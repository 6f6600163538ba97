//! Parquet files, row group by row group: the engine decodes only the columns it needs, when it needs them, and knows each
//! row by its place, so that what a row says can be read after it is known that somebody wants it.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::{DataType, TimeUnit};
use bytes::{Buf, Bytes};
use datafusion::error::{DataFusionError, Result};
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::arrow::async_reader::MetadataFetch;
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::statistics::Statistics;

use super::places::Marks;

/// Rows decoded at a time.
const DECODE_ROWS: usize = if cfg!(test) { 32 } else { 16 << 10 };

/// A row group in which fewer than one in this many rows are wanted is read by skipping, else whole.
const SPARSE: usize = 64;

/// Read at once from the end of a file, in the hope that its footer is no longer.
const FOOTER_BYTES: usize = 64 << 10;

/// The files of one source, opened, in the order of their paths.
#[derive(Debug)]
pub struct Files {
    files: Vec<File>,
    /// Row groups of all files.
    units: Vec<Unit>,
    /// Every file is sorted by entity and time: a compacted table.
    pub sorted: bool,
}

#[derive(Debug)]
struct File {
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// As errors name it.
    shown: String,
    metadata: ArrowReaderMetadata,
}

/// One row group.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    file: usize,
    row_group: usize,
    pub rows: usize,
}

/// A file to open.
#[derive(Debug, Clone)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    pub size: u64,
    pub shown: String,
}

impl Files {
    /// Reads the footers.
    pub async fn open(locations: Vec<Location>) -> Result<Files> {
        use futures::{StreamExt, TryStreamExt};
        const AT_ONCE: usize = 16;
        let opened = locations.into_iter().map(|location| async move {
            let Location { store, path, size, shown } = location;
            let options = ArrowReaderOptions::new();
            let fetch = Ranges { store: &store, path: &path };
            let metadata = ParquetMetaDataReader::new()
                .with_page_index_policy(PageIndexPolicy::Optional)
                .with_prefetch_hint(Some(FOOTER_BYTES))
                .load_and_finish(fetch, size)
                .await
                .and_then(|metadata| ArrowReaderMetadata::try_new(Arc::new(metadata), options));
            let metadata = metadata.map_err(|error| unreadable(&shown, &error))?;
            Ok::<File, DataFusionError>(File { store, path, shown, metadata })
        });
        let files: Vec<File> = futures::stream::iter(opened).buffered(AT_ONCE).try_collect().await?;
        let mut units = Vec::new();
        for (file, opened) in files.iter().enumerate() {
            for (row_group, metadata) in opened.metadata.metadata().row_groups().iter().enumerate() {
                let rows = usize::try_from(metadata.num_rows()).unwrap_or(0);
                if rows > 0 {
                    units.push(Unit { file, row_group, rows });
                }
            }
        }
        Ok(Files { files, units, sorted: false })
    }

    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    pub fn rows(&self) -> usize {
        self.units.iter().map(|unit| unit.rows).sum()
    }

    /// Bytes that reading the named columns of the largest row group holds, as they lie in the file and decoded.
    pub fn unit_bytes(&self, columns: &[String]) -> usize {
        let bytes = self.units.iter().map(|unit| {
            let file = &self.files[unit.file];
            let metadata = file.metadata.metadata().row_group(unit.row_group);
            let leaves = metadata
                .columns()
                .iter()
                .filter(|column| column.column_path().parts().first().is_some_and(|root| columns.contains(root)));
            leaves.map(|column| column.compressed_size().max(0) as usize).sum::<usize>()
        });
        bytes.max().unwrap_or(0) + columns.len() * DECODE_ROWS * 16
    }

    /// The least and the greatest value of an integer or timestamp column in a row group, where its file says so.
    pub fn range(&self, unit: usize, column: &str) -> Option<(i64, i64)> {
        let unit = self.units[unit];
        let file = &self.files[unit.file];
        let field = file.metadata.schema().field_with_name(column).ok()?;
        if !matches!(field.data_type(), DataType::Int64 | DataType::Timestamp(TimeUnit::Microsecond, _)) {
            return None;
        }
        let row_group = file.metadata.metadata().row_group(unit.row_group);
        let leaf = row_group.columns().iter().find(|leaf| leaf.column_path().parts() == [column])?;
        match leaf.statistics()? {
            Statistics::Int64(values) => Some((*values.min_opt()?, *values.max_opt()?)),
            _ => None,
        }
    }

    /// Decodes the named columns of one row group, those that the file has; with `wanted`, only the rows marked.
    pub fn read(
        &self,
        index: usize,
        columns: &[String],
        wanted: Option<&Marks>,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Batches<'_>> {
        let unit = self.units[index];
        let file = &self.files[unit.file];
        let metadata = file.metadata.metadata();
        let row_group = metadata.row_group(unit.row_group);
        let roots = file.metadata.schema().fields().iter().enumerate();
        let roots = roots.filter(|(_, field)| columns.contains(field.name())).map(|(root, _)| root);
        let mask = ProjectionMask::roots(file.metadata.parquet_schema(), roots.collect::<Vec<_>>());
        let kept = wanted.map(|marks| marks.of_unit(index));
        let sparse = kept.as_ref().is_some_and(|kept| kept.count_set_bits() * SPARSE < unit.rows);
        let selection = match &kept {
            Some(kept) if sparse => Some(RowSelection::from_filters(&[BooleanArray::new(kept.clone(), None)])),
            _ => None,
        };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let pages = metadata.offset_index().and_then(|index| index.get(unit.row_group));
        for (leaf, column) in row_group.columns().iter().enumerate().filter(|(leaf, _)| mask.leaf_included(*leaf)) {
            let (start, length) = column.byte_range();
            match (&selection, pages.and_then(|pages| pages.get(leaf))) {
                (Some(selection), Some(pages)) if !pages.page_locations().is_empty() => {
                    // The dictionary page lies before the first data page, and no index names it.
                    let first = pages.page_locations()[0].offset as u64;
                    if start < first {
                        ranges.push(start..first);
                    }
                    ranges.extend(selection.scan_ranges(pages.page_locations()));
                }
                _ => ranges.push(start..start + length),
            }
        }
        let broken = |error: &dyn std::fmt::Display| unreadable(&file.shown, error);
        let ranges = merged(ranges);
        let parts = runtime.block_on(file.store.get_ranges(&file.path, &ranges)).map_err(|error| broken(&error))?;
        let parts = ranges.iter().map(|range| range.start).zip(parts).collect();
        let chunk = Chunk { parts: Arc::new(parts), length: u64::MAX };
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(chunk, file.metadata.clone())
            .with_row_groups(vec![unit.row_group])
            .with_projection(mask)
            .with_batch_size(DECODE_ROWS);
        if let Some(selection) = selection {
            builder = builder.with_row_selection(selection);
        }
        let reader = builder.build().map_err(|error| broken(&error))?;
        Ok(Batches { reader, shown: &file.shown, kept: kept.filter(|_| !sparse), at: 0 })
    }
}

/// Parts of a file, for whoever reads its footer.
struct Ranges<'a> {
    store: &'a Arc<dyn ObjectStore>,
    path: &'a Path,
}

impl MetadataFetch for Ranges<'_> {
    fn fetch(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        use object_store::ObjectStoreExt;
        let read = self.store.get_range(self.path, range);
        read.map_err(|error| ParquetError::External(Box::new(error))).boxed()
    }
}

fn unreadable(file: &str, error: &dyn std::fmt::Display) -> DataFusionError {
    DataFusionError::Execution(format!("{file} cannot be read: {error}; replace or remove the file, then try again"))
}

/// Neighbouring ranges as one.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// The batches of one row group, in order.
pub struct Batches<'f> {
    reader: ParquetRecordBatchReader,
    shown: &'f str,
    /// Rows to keep, where all are decoded.
    kept: Option<BooleanBuffer>,
    at: usize,
}

impl Iterator for Batches<'_> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Result<RecordBatch>> {
        let batch = match self.reader.next()? {
            Ok(batch) => batch,
            Err(error) => return Some(Err(unreadable(self.shown, &error))),
        };
        let Some(kept) = &self.kept else { return Some(Ok(batch)) };
        let kept = kept.slice(self.at, batch.num_rows());
        self.at += batch.num_rows();
        let filter = BooleanArray::new(kept, None);
        Some(arrow::compute::filter_record_batch(&batch, &filter).map_err(DataFusionError::from))
    }
}

/// The parts of a file that were fetched.
#[derive(Clone)]
struct Chunk {
    parts: Arc<Vec<(u64, Bytes)>>,
    length: u64,
}

impl Chunk {
    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let after = self.parts.partition_point(|(at, _)| *at <= start);
        let missing = || ParquetError::EOF(format!("byte {start} is not in the row group's columns"));
        let (at, bytes) = self.parts.get(after.wrapping_sub(1)).ok_or_else(missing)?;
        let skipped = usize::try_from(start - at).map_err(|_| missing())?;
        if skipped <= bytes.len() { Ok(bytes.slice(skipped..)) } else { Err(missing()) }
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Chunk {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(Box::new(self.from(start)?.reader()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.from(start)?;
        if length <= bytes.len() {
            Ok(bytes.slice(..length))
        } else {
            Err(ParquetError::EOF(format!("the file ends within the {length} bytes from {start}")))
        }
    }
}
