//! Parquet files: footers that may be damaged, and streams of row groups.

use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::Schema;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::{ParquetObjectReader, ParquetRecordBatchStreamBuilder};

use super::{BATCH_ROWS, Damage, File, SourceError, guarded};

/// Magic and length.
const FOOTER_BYTES: u64 = 8;
/// What is read at once from the end of a file, in the hope that the whole footer is in it.
const FOOTER_HINT_BYTES: usize = 64 << 10;

/// Reads a footer. The reader of Parquet takes the length that a footer states and subtracts it from the file's, unchecked:
/// a damaged file would be a panic instead of an error. So both are looked at first.
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
    if length > before_footer {
        return Err(damaged("its footer states more bytes than the file has"));
    }
    let mut reader = ParquetObjectReader::new(file.place.store.clone(), file.meta.location.clone())
        .with_file_size(size)
        .with_footer_size_hint(FOOTER_HINT_BYTES.max(length as usize + FOOTER_BYTES as usize));
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
    let reader =
        ParquetObjectReader::new(file.place.store.clone(), file.meta.location.clone()).with_file_size(file.meta.size);
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
