//! Parquet files: footers that may be damaged, and streams of row groups.

use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::Schema;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::{BATCH_ROWS, Damage, File, OwnedFile, SourceError, guarded};

/// Magic and length.
const FOOTER_BYTES: u64 = 8;
/// No table has so many columns and row groups; whoever states more is damaged.
const METADATA_BYTES_MAX: u64 = 1 << 30;
/// What is read at once from the end of a file, in the hope that the whole footer is in it.
const FOOTER_HINT_BYTES: usize = 64 << 10;

/// Reads the bytes of one Parquet file from its store.
#[derive(Debug, Clone)]
pub struct FileReader {
    file: OwnedFile,
    footer_hint_bytes: usize,
}

impl FileReader {
    pub(super) fn new(file: &File<'_>) -> FileReader {
        FileReader { file: file.owned(), footer_hint_bytes: FOOTER_HINT_BYTES }
    }
}

impl AsyncFileReader for FileReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        let read = async move {
            let bytes = self.file.place.store.get_range(&self.file.meta.location, range.clone()).await;
            whole(bytes.map_err(|error| ParquetError::External(Box::new(error)))?, &range)
        };
        read.boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        let read = async move {
            let read = self.file.place.store.get_ranges(&self.file.meta.location, &ranges).await;
            let read = read.map_err(|error| ParquetError::External(Box::new(error)))?;
            read.into_iter().zip(&ranges).map(|(bytes, range)| whole(bytes, range)).collect()
        };
        read.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        let (size, hint) = (self.file.meta.size, self.footer_hint_bytes);
        let read = async move {
            let mut reader = ParquetMetaDataReader::new().with_prefetch_hint(Some(hint));
            if let Some(options) = options {
                reader = reader
                    .with_metadata_options(Some(options.metadata_options().clone()))
                    .with_column_index_policy(options.column_index_policy())
                    .with_offset_index_policy(options.offset_index_policy());
            }
            Ok(Arc::new(reader.load_and_finish(self, size).await?))
        };
        read.boxed()
    }
}

/// A file that became shorter since it was listed gives less than was asked for.
fn whole(bytes: Bytes, range: &Range<u64>) -> Result<Bytes, ParquetError> {
    if bytes.len() as u64 == range.end - range.start {
        return Ok(bytes);
    }
    Err(ParquetError::EOF(format!("{} of the bytes {range:?} are there", bytes.len())))
}

/// Reads a footer. The reader of Parquet takes the length that a footer states and subtracts it from the file's,
/// unchecked: a damaged file would be a panic instead of an error. So both are looked at first.
pub async fn metadata(file: &File<'_>) -> Result<ArrowReaderMetadata, SourceError> {
    let size = file.meta.size;
    let damaged = |what: &str| file.damaged(Damage::Text(format!("{what}; it was cut off, or is no Parquet file")));
    let Some(before_footer) = size.checked_sub(FOOTER_BYTES) else { return Err(damaged("it has no footer")) };
    let footer = file.range(before_footer..size).await?;
    let (length, magic) = footer.split_at(4);
    if magic == b"PARE" {
        return Err(file.damaged(Damage::Text("it is encrypted".into())));
    }
    if magic != b"PAR1" {
        return Err(damaged("it does not end as a Parquet file does"));
    }
    let length = length.iter().rev().fold(0, |length, byte| length << 8 | u64::from(*byte));
    if length > before_footer.min(METADATA_BYTES_MAX) {
        return Err(damaged("its footer states more bytes than the file has"));
    }
    let mut reader = FileReader::new(file);
    reader.footer_hint_bytes = FOOTER_HINT_BYTES.max(length as usize + FOOTER_BYTES as usize);
    let loading = async move { ArrowReaderMetadata::load_async(&mut reader, ArrowReaderOptions::new()).await };
    guarded(file, loading).await
}

/// Batches of some row groups, with the named columns as the file has them.
pub async fn stream(
    file: &File<'_>,
    metadata: ArrowReaderMetadata,
    row_groups: Range<usize>,
    columns: &Schema,
) -> Result<BoxStream<'static, Result<arrow::array::RecordBatch, SourceError>>, SourceError> {
    let roots: Vec<usize> = metadata
        .schema()
        .fields()
        .iter()
        .enumerate()
        .filter(|(_, field)| columns.column_with_name(field.name()).is_some())
        .map(|(index, _)| index)
        .collect();
    let mask = ProjectionMask::roots(metadata.parquet_schema(), roots);
    let reader = FileReader::new(file);
    let built = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, metadata)
        .with_projection(mask)
        .with_row_groups(row_groups.collect())
        .with_batch_size(BATCH_ROWS)
        .build();
    let stream = built.map_err(|error| file.damaged(Damage::Error(Box::new(error))))?;
    let owned = file.owned();
    // A page that is damaged may trip the decoder where it trusts itself.
    let batches = std::panic::AssertUnwindSafe(stream).catch_unwind().map(move |batch| {
        let damage = match batch {
            Ok(Ok(batch)) => return Ok(batch),
            Ok(Err(error)) => Damage::Error(Box::new(error)),
            Err(_) => Damage::Text("a page of it is damaged".into()),
        };
        Err(owned.damaged(damage))
    });
    Ok(first_error_ends(batches.boxed()))
}

/// After an error nothing is asked for again.
pub fn first_error_ends<T: Send + 'static>(
    stream: BoxStream<'static, Result<T, SourceError>>,
) -> BoxStream<'static, Result<T, SourceError>> {
    futures::stream::try_unfold(
        stream,
        |mut stream| async move { Ok(stream.try_next().await?.map(|item| (item, stream))) },
    )
    .boxed()
}
