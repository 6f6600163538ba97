//! Reading files of tables as streams, a row group at a time.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryFutureExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::sort::Batches;
use super::{POSITION_TIME, SEQUENCE, Table, TableError, TableFile};

/// Rows per batch: those of a sort that spills are held several at a time.
const BATCH_ROWS: usize = 8_192;

/// An object as Parquet's reader wants it.
pub(crate) struct ObjectReader {
    store: Arc<dyn ObjectStore>,
    path: Path,
    bytes: u64,
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        self.store.get_range(&self.path, range).map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move { self.store.get_ranges(&self.path, &ranges).await.map_err(external) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let bytes = self.bytes;
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            Ok(Arc::new(reader.load_and_finish(self, bytes).await?))
        }
        .boxed()
    }
}

/// A file whose footer has been read.
pub(crate) async fn open(
    table: &Table,
    file: &TableFile,
) -> Result<ParquetRecordBatchStreamBuilder<ObjectReader>, TableError> {
    let path = table.object_path(file);
    let store = table.folder().store.clone();
    check_footer(&store, &path, file).await?;
    let reader = ObjectReader { store, path: path.clone(), bytes: file.bytes };
    ParquetRecordBatchStreamBuilder::new(reader).await.map_err(|error| unreadable(&path, error))
}

/// A file as a stream, and its columns: all, or those named and the positions.
pub(crate) async fn read(
    table: &Table,
    file: &TableFile,
    columns: Option<&[String]>,
) -> Result<(SchemaRef, Batches), TableError> {
    let path = table.object_path(file);
    let builder = open(table, file).await?;
    let wanted = builder.schema().fields().iter().enumerate().filter(|(_, field)| {
        let name = field.name();
        name == POSITION_TIME || name == SEQUENCE || columns.is_none_or(|columns| columns.contains(name))
    });
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.map(|(index, _)| index).collect::<Vec<_>>());
    let batches = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
    let batches = batches.map_err(|error| unreadable(&path, error))?;
    // Without the metadata of the file, which would make schemas of equal columns differ.
    let schema = Arc::new(Schema::new(batches.schema().fields().clone()));
    let plain = schema.clone();
    let batches = batches.map(move |batch| {
        let batch = batch.map_err(|error| unreadable(&path, error))?;
        RecordBatch::try_new(plain.clone(), batch.columns().to_vec())
            .map_err(|error| TableError::Corrupt { path: path.to_string(), what: error.to_string() })
    });
    Ok((schema, batches.boxed()))
}

/// The reader subtracts the length that a footer states from the file's, unchecked: a damaged file would be a panic
/// instead of an error.
async fn check_footer(store: &Arc<dyn ObjectStore>, path: &Path, file: &TableFile) -> Result<(), TableError> {
    const FOOTER_BYTES: u64 = 8;
    let corrupt = |what: &str| TableError::Corrupt { path: path.to_string(), what: what.into() };
    let failed = |source| TableError::Store { path: path.to_string(), source };
    let found = store.head(path).await.map_err(failed)?.size;
    let before = match found.checked_sub(FOOTER_BYTES) {
        Some(before) if found == file.bytes => before,
        _ => return Err(corrupt(&format!("it has {found} bytes, and {} were written", file.bytes))),
    };
    let footer = store.get_range(path, before..found).await.map_err(failed)?;
    let length = footer.iter().take(4).rev().fold(0, |length, byte| length << 8 | u64::from(*byte));
    if footer.len() as u64 != FOOTER_BYTES || &footer[4..] != b"PAR1" || length > before {
        return Err(corrupt("it does not end as a Parquet file does"));
    }
    Ok(())
}

fn unreadable(path: &Path, error: ParquetError) -> TableError {
    let path = path.to_string();
    match error {
        ParquetError::External(error) => match error.downcast::<object_store::Error>() {
            Ok(source) => TableError::Store { path, source: *source },
            Err(error) => TableError::Corrupt { path, what: error.to_string() },
        },
        error => TableError::Corrupt { path, what: error.to_string() },
    }
}
