//! Files that a user hands over: events to push, spines to make training sets of.
//!
//! Columns that somebody declared come out in their declared type, losslessly or not at all; others keep the type that
//! the file gives them. Files are read batch by batch, so their size does not matter.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::Format;
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use arrow::error::ArrowError;
use feature_defs::plan::{RowsError, align_batch};
use feature_defs::value::Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;
use thiserror::Error;

/// Rows of a CSV file that are looked at for the types of columns nobody declared.
const INFERRED_ROWS: usize = 1_000;

#[derive(Debug, Error)]
pub enum TableError {
    #[error("could not open {}", .path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} ends in neither .parquet nor .csv; only these are read", .path.display())]
    Format { path: PathBuf },
    #[error("{} is no Parquet file that can be read; write it again", .path.display())]
    Parquet {
        path: PathBuf,
        #[source]
        source: Box<ParquetError>,
    },
    #[error("{} could not be read to its end", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: Box<ArrowError>,
    },
    #[error("column `{column}` is a {column_type}, which CSV has no way to write; use a Parquet file instead of {}", .path.display())]
    NotInCsv { path: PathBuf, column: String, column_type: String },
    #[error("{} has no column `{column}`{hint}", .path.display())]
    Missing { path: PathBuf, column: String, hint: String },
    #[error("{} does not fit", .path.display())]
    Rows {
        path: PathBuf,
        #[source]
        source: Box<RowsError>,
    },
}

/// An open file.
pub struct Table {
    path: PathBuf,
    /// Rows in the file, where its footer says so.
    pub rows: Option<u64>,
    pub columns: Vec<String>,
    types: Arc<BTreeMap<String, Type>>,
    batches: Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>,
}

/// Opens a file. `types` are the declared columns.
pub fn open(path: &Path, types: &Arc<BTreeMap<String, Type>>, batch_rows: usize) -> Result<Table, TableError> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "parquet" => open_parquet(path, types.clone(), batch_rows),
        "csv" => open_csv(path, types.clone(), batch_rows),
        _ => Err(TableError::Format { path: path.to_owned() }),
    }
}

fn open_file(path: &Path) -> Result<File, TableError> {
    File::open(path).map_err(|source| TableError::Open { path: path.to_owned(), source })
}

fn open_parquet(path: &Path, types: Arc<BTreeMap<String, Type>>, batch_rows: usize) -> Result<Table, TableError> {
    let failed = |source| TableError::Parquet { path: path.to_owned(), source: Box::new(source) };
    let builder = ParquetRecordBatchReaderBuilder::try_new(open_file(path)?).map_err(failed)?;
    let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).ok();
    let columns = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
    let reader = builder.with_batch_size(batch_rows).build().map_err(failed)?;
    Ok(Table { path: path.to_owned(), rows, columns, types, batches: Box::new(reader) })
}

fn open_csv(path: &Path, types: Arc<BTreeMap<String, Type>>, batch_rows: usize) -> Result<Table, TableError> {
    let failed = |source| TableError::Read { path: path.to_owned(), source: Box::new(source) };
    let format = Format::default().with_header(true);
    let (inferred, _) = format.infer_schema(open_file(path)?, Some(INFERRED_ROWS)).map_err(failed)?;
    let mut fields = Vec::new();
    for field in inferred.fields() {
        let data_type = match types.get(field.name()) {
            // The reader knows no zone names; without a zone a time is UTC, and one with an offset is brought there.
            Some(Type::Timestamp) => DataType::Timestamp(TimeUnit::Microsecond, None),
            Some(
                declared @ (Type::Bool
                | Type::Int32
                | Type::Int64
                | Type::Float32
                | Type::Float64
                | Type::String
                | Type::Date
                | Type::Decimal { .. }),
            ) => declared.arrow(),
            Some(declared) => {
                let (column, column_type) = (field.name().clone(), declared.to_string());
                return Err(TableError::NotInCsv { path: path.to_owned(), column, column_type });
            }
            // A column without any value has no type; texts can hold what may follow.
            None if *field.data_type() == DataType::Null => DataType::Utf8,
            None => field.data_type().clone(),
        };
        fields.push(Field::new(field.name(), data_type, true));
    }
    let columns = fields.iter().map(|field| field.name().clone()).collect();
    let builder = ReaderBuilder::new(Arc::new(Schema::new(fields))).with_format(format).with_batch_size(batch_rows);
    let reader = builder.build(open_file(path)?).map_err(failed)?;
    Ok(Table { path: path.to_owned(), rows: None, columns, types, batches: Box::new(reader) })
}

impl Table {
    /// Complains unless the file has every one of these columns.
    pub fn require<'a>(&self, columns: impl IntoIterator<Item = &'a str>) -> Result<(), TableError> {
        for column in columns {
            if !self.columns.iter().any(|name| name == column) {
                let hint = match feature_defs::diagnose::nearest(column, self.columns.iter().map(String::as_str)) {
                    Some(near) => format!("; did you mean its `{near}` to be it?"),
                    None => format!("; it has: {}", self.columns.join(", ")),
                };
                return Err(TableError::Missing { path: self.path.clone(), column: column.to_owned(), hint });
            }
        }
        Ok(())
    }

    fn aligned(&self, batch: &RecordBatch) -> Result<RecordBatch, TableError> {
        let failed = |source| TableError::Rows { path: self.path.clone(), source: Box::new(source) };
        let mut columns: Vec<(String, ArrayRef)> = Vec::with_capacity(batch.num_columns());
        for (index, name) in self.columns.iter().enumerate() {
            let column = match self.types.get(name) {
                Some(declared) => {
                    let one = batch.project(&[index]).map_err(|source| self.unreadable(source))?;
                    let file = self.path.to_string_lossy();
                    align_batch(&file, std::iter::once((name.as_str(), declared)), &one, false)
                        .map_err(failed)?
                        .column(0)
                        .clone()
                }
                None => batch.column(index).clone(),
            };
            columns.push((name.clone(), column));
        }
        let nullable = columns.into_iter().map(|(name, column)| (name, column, true));
        RecordBatch::try_from_iter_with_nullable(nullable).map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: ArrowError) -> TableError {
        TableError::Read { path: self.path.clone(), source: Box::new(source) }
    }
}

impl Iterator for Table {
    type Item = Result<RecordBatch, TableError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.batches.next()? {
            Ok(batch) => Some(self.aligned(&batch)),
            Err(source) => Some(Err(self.unreadable(source))),
        }
    }
}

#[cfg(test)]
mod tests {
    use feature_defs::value::Value;

    use super::*;

    fn types() -> Arc<BTreeMap<String, Type>> {
        let named = [
            ("at", Type::Timestamp),
            ("key", Type::String),
            ("x", Type::Float64),
            ("items", Type::List(Box::new(Type::Int64))),
        ];
        Arc::new(named.into_iter().map(|(name, declared)| (name.to_owned(), declared)).collect())
    }

    fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn csv_columns_come_in_their_declared_types() {
        let folder = tempfile::tempdir().unwrap();
        let text = "key,at,x,more\n007,2024-03-10T12:00:00+02:00,1,5\n,2024-03-10 12:00:00,,6\n";
        let mut table = open(&write(&folder, "a.csv", text.as_bytes()), &types(), 10).unwrap();
        let batch = table.next().unwrap().unwrap();
        let value = |column: &str, row, declared: &Type| {
            Value::from_array(batch.column_by_name(column).unwrap(), row, declared)
        };
        assert_eq!(value("key", 0, &Type::String), Value::String("007".into()));
        assert_eq!(value("at", 0, &Type::Timestamp), Value::Timestamp(1_710_064_800_000_000));
        assert_eq!(value("at", 1, &Type::Timestamp), Value::Timestamp(1_710_072_000_000_000));
        assert_eq!(value("x", 1, &Type::Float64), Value::Null);
        assert_eq!(value("more", 1, &Type::Int64), Value::Int64(6));
        assert!(table.next().is_none());
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let check = |name: &str, bytes: &[u8], expected: &str| {
            let path = write(&folder, name, bytes);
            let error = match open(&path, &types(), 10) {
                Ok(mut table) => table.find_map(Result::err).map(|error| crate::error::chain(&error)),
                Err(error) => Some(crate::error::chain(&error)),
            };
            let error = error.unwrap_or_default();
            assert!(error.contains(expected) && error.contains(name), "{error}");
        };
        check("b.parquet", b"PAR1 not really PAR1", "is no Parquet file");
        check("c.txt", b"", "neither .parquet nor .csv");
        check("d.csv", b"items\n1\n", "CSV has no way");
        check("e.csv", b"x\nfar\n", "far");
    }
}
