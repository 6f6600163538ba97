//! Files that somebody else owns: which there are, what columns they have, and how they are read.
//!
//! A pattern is a path relative to the project folder (or absolute, or `s3://bucket/...`): one file, a folder, or a
//! glob. All files of a source have one format. Their schemas may differ where nothing is lost: columns in another
//! order, narrower numbers, other units of time. A column that is missing in one file, or that is something else there,
//! is an error that names both files as soon as somebody reads the column, not a column of nulls; columns that nobody
//! reads do not matter.
//!
//! Each format has a reader of its own here rather than a scan of DataFusion's, so that an error names the file (and
//! the line where there are lines), and so that what is cast is cast without loss.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ::parquet::arrow::arrow_reader::ArrowReaderMetadata;
use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::dataframe::DataFrame;
use datafusion::error::DataFusionError;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::{SessionConfig, SessionContext};
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::value::Type;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use registry::store::{StoreError, Variables};

use crate::point_in_time::files::Location;

use pattern::{Pattern, Place};
use schema::Width;

pub use parquet::FileReader;

mod pattern;
mod schema;

mod arrow_file;
mod parquet;
mod text;

/// Rows of a batch.
const BATCH_ROWS: usize = 8_192;
/// Files whose schema is read at a time: enough to hide a bucket's latency, few enough for any limit of open files.
const FILES_AT_ONCE: usize = 32;
/// Files of which the schema is remembered; beyond it all are forgotten. A schema is shared by all files that have it.
const REMEMBERED_MAX: usize = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(
        "no file matches `{pattern}` (looked below {folder}); check `files:` in the definitions, or put the data there"
    )]
    NoFiles { pattern: String, folder: String },
    #[error("`{pattern}` is not a pattern of files: {what}")]
    BadPattern { pattern: String, what: String },
    #[error(
        "{path} is of no known format; files end in .parquet, .csv, .json, .jsonl, .ndjson, .arrow, .feather or .ipc, text also in .gz or .zst"
    )]
    UnknownFormat { path: String },
    #[error("{path} is {format}, but {first} is {expected}; files of one source have one format")]
    MixedFormats { path: String, format: &'static str, first: String, expected: &'static str },
    #[error("{path} cannot be read as {format}: it has 0 bytes; was it not written to its end? replace or remove it")]
    ZeroBytes { path: String, format: &'static str },
    #[error("{path} cannot be read as {format}; replace or remove the file, then try again")]
    Unreadable { path: String, format: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "{path} line {line}: column `{column}` has `{value}`, which is no {wanted}; mend it, or declare the column's type under `schema:` of the source"
    )]
    Value { path: String, line: u64, column: String, value: String, wanted: DataType },
    #[error("{path} line {line} {what}; mend or remove the file, then try again")]
    Row { path: String, line: u64, what: String },
    #[error("{path} has no rows and no columns to take a schema from")]
    Empty { path: String },
    #[error("{path} has two columns `{column}`; rename one of them")]
    TwoColumns { path: String, column: String },
    #[error("column `{column}` is {found} in {path}, but {expected} in {first}; files of one source have one schema")]
    Drift { column: String, path: String, found: String, first: String, expected: String },
    #[error(
        "column `{column}` of {path} has a value that does not become {wanted}: {what}; mend the file, or declare another type"
    )]
    Cast { path: String, column: String, wanted: String, what: String },
    #[error("{path} is gone since the files were listed; run this again")]
    Gone { path: String },
    #[error("{path} cannot be read; check that it is there and may be read")]
    NotRead { path: String, source: Box<object_store::Error> },
    #[error(
        "{path} cannot be read; check that the bucket `{url}` is there, that AWS_ENDPOINT_URL and AWS_REGION lead to it and that the keys of AWS_ACCESS_KEY_ID may read it"
    )]
    Bucket { url: String, path: String, source: Box<object_store::Error> },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("source `{name}` could not be scanned")]
    Scan { name: String, source: DataFusionError },
}

/// Reads files of sources.
#[derive(Clone)]
pub struct Sources {
    folder: PathBuf,
    context: SessionContext,
    variables: Arc<Variables>,
    remembered: Arc<Mutex<Remembered>>,
}

/// What files of a source are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Parquet,
    Csv,
    Json,
    Arrow,
}

/// How a text file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// One file of a source.
#[derive(Debug, Clone)]
pub struct SourceFile {
    pub meta: ObjectMeta,
    /// The columns in the file itself. Of text files, with the types that they are read as.
    pub schema: SchemaRef,
    /// Columns that the folders above it give (`key=value`) and the file itself has not; None is null.
    pub partition_values: Vec<(String, Option<String>)>,
}

/// The files of one source and their common schema.
#[derive(Debug, Clone)]
pub struct SourceFiles {
    pub files: Vec<SourceFile>,
    /// Every column that can be read; after [`SourceFiles::select`], those that are.
    pub schema: SchemaRef,
    /// Columns that the files do not agree about, and how.
    drifts: Arc<HashMap<String, Drift>>,
    place: Place,
    format: Format,
}

#[derive(Debug, Clone)]
struct Drift {
    file: usize,
    found: String,
    first: usize,
    expected: String,
}

impl Format {
    /// By the ending of a name; `.gz` and `.zst` behind that of a text format say how it is packed.
    pub fn of(path: &str) -> Option<Format> {
        let (format, compression) = Self::and_compression(path)?;
        let is_text = matches!(format, Format::Csv | Format::Json);
        (is_text || compression == Compression::None).then_some(format)
    }

    fn and_compression(path: &str) -> Option<(Format, Compression)> {
        let name = path.rsplit_once('/').map_or(path, |(_, name)| name).to_ascii_lowercase();
        let (name, compression) = match name.rsplit_once('.')? {
            (name, "gz" | "gzip") => (name, Compression::Gzip),
            (name, "zst" | "zstd") => (name, Compression::Zstd),
            _ => (name.as_str(), Compression::None),
        };
        let format = match name.rsplit_once('.')?.1 {
            "parquet" => Format::Parquet,
            "csv" => Format::Csv,
            "json" | "jsonl" | "ndjson" => Format::Json,
            "arrow" | "feather" | "ipc" => Format::Arrow,
            _ => return None,
        };
        Some((format, compression))
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Parquet => "Parquet",
            Format::Csv => "CSV",
            Format::Json => "JSON lines",
            Format::Arrow => "Arrow IPC",
        }
    }

    fn is_text(self) -> bool {
        matches!(self, Format::Csv | Format::Json)
    }
}

impl Sources {
    /// For programs that only look: no memory bound.
    pub fn new(project_folder: &Path) -> Result<Sources, SourceError> {
        let runtime = RuntimeEnvBuilder::new().with_object_list_cache_limit(0).build_arc();
        let runtime = runtime.map_err(|source| SourceError::Scan { name: "any".into(), source })?;
        Ok(Sources::with_runtime(project_folder, runtime))
    }

    /// With the engine's memory pool and stores.
    pub fn with_runtime(project_folder: &Path, runtime: Arc<RuntimeEnv>) -> Sources {
        let folder = std::path::absolute(project_folder).unwrap_or_else(|_| project_folder.to_path_buf());
        Sources {
            folder,
            context: SessionContext::new_with_config_rt(SessionConfig::new(), runtime),
            variables: Arc::new(registry::store::variables()),
            remembered: Arc::default(),
        }
    }

    /// Buckets are opened as these variables say, not as those of the process do.
    pub fn with_variables(mut self, variables: Variables) -> Sources {
        self.variables = Arc::new(variables);
        self
    }

    /// The columns of a source's files, in our types; columns of types we do not have are left out.
    pub async fn schema(&self, pattern: &str) -> Result<Vec<(String, Type)>, SourceError> {
        self.schema_with(pattern, &[]).await
    }

    /// The same where some columns have been given a type by the definitions: columns of text files and of folders,
    /// whose types are guesses else, are of that type.
    pub async fn schema_with(
        &self,
        pattern: &str,
        declared: &[(String, Type)],
    ) -> Result<Vec<(String, Type)>, SourceError> {
        let files = self.open(pattern, declared).await?;
        let columns = files.schema.fields().iter();
        Ok(columns.filter_map(|field| Some((field.name().clone(), Type::from_arrow(field.data_type())?))).collect())
    }

    /// Lists the files a pattern names and reads the schema of each.
    pub async fn files(&self, pattern: &str) -> Result<SourceFiles, SourceError> {
        self.open(pattern, &[]).await
    }

    /// The files of a source, whose common schema is the named columns (as far as the files have them) in the order of
    /// the source's. An error if the files do not agree about one of them.
    pub async fn files_of(&self, source: &SourcePlan, columns: &[String]) -> Result<SourceFiles, SourceError> {
        let files = self.open(pattern_of(source)?, &source.schema).await?;
        let wanted = source.schema.iter().map(|(name, _)| name).filter(|name| columns.contains(name));
        files.select(wanted.map(String::as_str))
    }

    /// Scans the named columns of a source's files as they are, in no particular order.
    pub async fn data_frame(&self, source: &SourcePlan, columns: &[String]) -> Result<DataFrame, SourceError> {
        self.frame(source, &self.files_of(source, columns).await?).await
    }

    /// [`Sources::data_frame`] of files that are listed already.
    pub async fn frame(&self, source: &SourcePlan, files: &SourceFiles) -> Result<DataFrame, SourceError> {
        let failed = |error: DataFusionError| SourceError::Scan { name: source.name.to_string(), source: error };
        let files = Arc::new(files.clone());
        let partitions = files.partitions(self.context.state().config().target_partitions()).await?;
        let table = StreamingTable::try_new(files.schema.clone(), partitions).map_err(failed)?;
        self.context.read_table(Arc::new(table)).map_err(failed)
    }

    /// A stream of batches in the source's declared types, with at least the named columns.
    pub async fn scan(
        &self,
        source: &Arc<SourcePlan>,
        columns: &[String],
    ) -> Result<SendableRecordBatchStream, SourceError> {
        self.scan_files(source, columns, &self.files_of(source, columns).await?).await
    }

    /// [`Sources::scan`] of files that are listed already, with these columns.
    pub async fn scan_files(
        &self,
        source: &Arc<SourcePlan>,
        columns: &[String],
        files: &SourceFiles,
    ) -> Result<SendableRecordBatchStream, SourceError> {
        let frame = self.frame(source, files).await?;
        let failed = |error: DataFusionError| SourceError::Scan { name: source.name.to_string(), source: error };
        let stream = frame.execute_stream().await.map_err(failed)?;
        let wanted: Vec<Field> = source
            .schema
            .iter()
            .filter(|(name, _)| columns.contains(name))
            .map(|(name, column_type)| Field::new(name, column_type.arrow(), true))
            .collect();
        let (source, columns) = (source.clone(), columns.to_vec());
        let aligned = stream.map(move |batch| {
            source.align(&batch?, Some(&columns)).map_err(|error| DataFusionError::External(Box::new(error)))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::new(Schema::new(wanted)), aligned)))
    }

    /// What a pattern's files are right now: path, size and time of change of each. Changes when the data changes.
    pub async fn fingerprint(&self, pattern: &str) -> Result<String, SourceError> {
        Ok(fingerprint(self.pattern(pattern)?.list().await?.iter()))
    }

    /// See [`Sources::fingerprint`].
    pub fn fingerprint_of(&self, files: &SourceFiles) -> String {
        fingerprint(files.files.iter().map(|file| &file.meta))
    }

    fn pattern(&self, pattern: &str) -> Result<Pattern, SourceError> {
        Pattern::parse(pattern, &self.folder, &self.context.runtime_env(), &self.variables)
    }

    async fn open(&self, pattern: &str, declared: &[(String, Type)]) -> Result<SourceFiles, SourceError> {
        let pattern = self.pattern(pattern)?;
        let place = &pattern.place;
        let listed = pattern.list().await?;
        let first = listed.first().ok_or_else(|| pattern.nothing())?;
        let format = Format::of(first.location.as_ref())
            .ok_or_else(|| SourceError::UnknownFormat { path: place.show(&first.location) })?;
        for file in &listed {
            let path = || place.show(&file.location);
            match Format::of(file.location.as_ref()) {
                None => return Err(SourceError::UnknownFormat { path: path() }),
                Some(other) if other != format => {
                    let (first, format, expected) = (place.show(&first.location), other.name(), format.name());
                    return Err(SourceError::MixedFormats { path: path(), format, first, expected });
                }
                Some(_) if file.size == 0 => {
                    return Err(SourceError::ZeroBytes { path: path(), format: format.name() });
                }
                Some(_) => {}
            }
        }
        let reading = listed.into_iter().map(|meta| {
            let partition_values = pattern.partition_values(&meta.location);
            async move {
                let schema = self.file_schema(&File::new(place, &meta, format)).await?;
                let has = |name: &String| schema.column_with_name(name).is_some();
                let partition_values = partition_values.into_iter().filter(|(name, _)| !has(name)).collect();
                Ok::<_, SourceError>(SourceFile { meta, schema, partition_values })
            }
        });
        let files: Vec<SourceFile> = futures::stream::iter(reading).buffered(FILES_AT_ONCE).try_collect().await?;
        SourceFiles::new(files, place.clone(), format, declared)
    }

    /// The columns of one file, remembered as long as the file does not change.
    async fn file_schema(&self, file: &File<'_>) -> Result<SchemaRef, SourceError> {
        let key = Key::new(file);
        if let Some(schema) = self.remembered().schemas.get(&key).cloned() {
            return Ok(schema);
        }
        let schema = match file.format {
            Format::Parquet => parquet::metadata(file).await?.schema().clone(),
            Format::Arrow => arrow_file::footer(file).await?.schema,
            Format::Csv | Format::Json => text::infer(file).await?,
        };
        let mut names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(SourceError::TwoColumns { path: file.shown(), column: pair[0].to_owned() });
        }
        Ok(self.remembered().remember(key, schema))
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("folder", &self.folder).finish_non_exhaustive()
    }
}

fn fingerprint<'f>(files: impl Iterator<Item = &'f ObjectMeta>) -> String {
    let mut text = feature_defs::digest::Canonical::new("files");
    for file in files {
        text.add("path", &file.location);
        text.add("size", file.size);
        text.add("modified", file.last_modified.timestamp_micros());
        // A bucket's clock counts whole seconds; its tag is that of the content.
        text.maybe("tag", file.e_tag.as_ref());
    }
    text.digest().to_string()
}

/// The pattern of a source's files; for a stream, that of what happened before it began.
pub fn pattern_of(source: &SourcePlan) -> Result<&str, SourceError> {
    match &source.kind {
        SourceKind::Files { pattern } | SourceKind::Static { pattern } => Ok(pattern),
        SourceKind::Stream { history: Some(pattern), .. } => Ok(pattern),
        SourceKind::Stream { history: None, .. } => {
            Err(SourceError::BadPattern { pattern: source.name.to_string(), what: "it is a stream".into() })
        }
    }
}

impl SourceFiles {
    /// Finds the common schema. Partition columns come last.
    fn new(
        mut files: Vec<SourceFile>,
        place: Place,
        format: Format,
        declared: &[(String, Type)],
    ) -> Result<SourceFiles, SourceError> {
        let declared = |name: &str| declared.iter().find(|(column, _)| column == name).map(|(_, t)| t);
        let width = if format.is_text() { Width::Guessed } else { Width::Stated };
        let mut columns: Vec<Column> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut drifts: HashMap<String, Drift> = HashMap::new();
        // Most files have the very same schema: each is looked at once.
        let mut seen: HashMap<*const Schema, usize> = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            if seen.insert(Arc::as_ptr(&file.schema), index).is_some() {
                continue;
            }
            for field in file.schema.fields() {
                let wanted = declared(field.name());
                let found = match wanted {
                    Some(wanted) if format.is_text() => schema::read_as(field.data_type(), wanted, format),
                    _ => field.data_type().clone(),
                };
                let Some(&at) = places.get(field.name()) else {
                    places.insert(field.name().clone(), columns.len());
                    columns.push(Column { name: field.name().clone(), data_type: found, first: index });
                    continue;
                };
                let column = &mut columns[at];
                column.data_type = match (schema::common(&column.data_type, &found, width), wanted) {
                    (Some(common), _) => common,
                    (None, Some(wanted)) if [&column.data_type, &found].iter().all(|t| schema::fits(t, wanted)) => {
                        wanted.arrow()
                    }
                    (None, _) => {
                        let (found, expected) = (found.to_string(), column.data_type.to_string());
                        let drift = Drift { file: index, found, first: column.first, expected };
                        drifts.entry(field.name().clone()).or_insert(drift);
                        continue;
                    }
                };
            }
        }
        let in_files = columns.len();
        for (index, file) in files.iter().enumerate() {
            for (name, _) in &file.partition_values {
                if !places.contains_key(name) {
                    places.insert(name.clone(), columns.len());
                    columns.push(Column { name: name.clone(), data_type: DataType::Null, first: index });
                }
            }
        }
        for column in &mut columns[in_files..] {
            column.data_type = match declared(&column.name) {
                Some(wanted) => wanted.arrow(),
                None => schema::partition_type(files.iter().filter_map(|file| file.partition_value(&column.name))),
            };
        }
        for column in &columns {
            // A row of JSON that has not a key has null there, and so has a file of such rows.
            if drifts.contains_key(&column.name) || (format == Format::Json && places[&column.name] < in_files) {
                continue;
            }
            let missing = files.iter().position(|file| {
                file.schema.column_with_name(&column.name).is_none() && file.partition_value(&column.name).is_none()
            });
            if let Some(file) = missing {
                let (found, expected) = ("absent".to_owned(), column.data_type.to_string());
                drifts.insert(column.name.clone(), Drift { file, found, first: column.first, expected });
            }
        }
        if columns.is_empty() {
            let path = files.first().map_or_else(String::new, |file| place.show(&file.meta.location));
            return Err(SourceError::Empty { path });
        }
        let fields: Vec<Field> =
            columns.iter().map(|column| Field::new(&column.name, column.data_type.clone(), true)).collect();
        let schema = Arc::new(Schema::new(fields));
        if format.is_text() {
            let mut read: HashMap<*const Schema, SchemaRef> = HashMap::new();
            for file in &mut files {
                let own = file.schema.clone();
                let as_read = || {
                    let as_read = own.fields().iter().map(|field| match schema.field_with_name(field.name()) {
                        Ok(common) => common.clone(),
                        Err(_) => field.as_ref().clone(),
                    });
                    Arc::new(Schema::new(as_read.collect::<Vec<_>>()))
                };
                file.schema = read.entry(Arc::as_ptr(&own)).or_insert_with(as_read).clone();
            }
        }
        Ok(SourceFiles { files, schema, drifts: Arc::new(drifts), place, format })
    }

    /// Only the named columns, in this order; those that no file has are left out. An error if the files do not agree
    /// about one of them.
    pub fn select<'c>(&self, columns: impl IntoIterator<Item = &'c str>) -> Result<SourceFiles, SourceError> {
        let mut fields = Vec::new();
        for name in columns {
            if let Some(drift) = self.drifts.get(name) {
                return Err(SourceError::Drift {
                    column: name.into(),
                    path: self.path(drift.file),
                    found: drift.found.clone(),
                    first: self.path(drift.first),
                    expected: drift.expected.clone(),
                });
            }
            fields.extend(self.schema.field_with_name(name).cloned());
        }
        Ok(SourceFiles { schema: Arc::new(Schema::new(fields)), ..self.clone() })
    }

    /// Some of the files, in the schema that is common to all.
    pub fn part(&self, files: &[usize]) -> SourceFiles {
        let files = files.iter().filter_map(|file| self.files.get(*file).cloned()).collect();
        SourceFiles { files, ..self.clone() }
    }

    /// Where the files lie.
    pub fn object_store(&self) -> Arc<dyn ObjectStore> {
        self.place.store.clone()
    }

    /// The URL that [`SourceFiles::object_store`] is registered under.
    pub fn store_url(&self) -> &ObjectStoreUrl {
        &self.place.store_url
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether every column of the common schema is in the files themselves, so that whoever aligns batches one by one
    /// needs no [`SourceFiles::unify`].
    pub fn is_all_in_files(&self) -> bool {
        let of_folder = |name: &String| self.files.iter().any(|file| file.partition_value(name).is_some());
        !self.schema.fields().iter().any(|field| of_folder(field.name()))
    }

    /// Where the files are, for whoever reads them row group by row group.
    pub fn locations(&self) -> Vec<Location> {
        let location = |file: &SourceFile| Location {
            store: self.place.store.clone(),
            path: file.meta.location.clone(),
            size: file.meta.size,
            shown: self.place.show(&file.meta.location),
        };
        self.files.iter().map(location).collect()
    }

    /// The path of a file as the user wrote it.
    pub fn path(&self, file: usize) -> String {
        self.files.get(file).map_or_else(String::new, |file| self.place.show(&file.meta.location))
    }

    /// The footer of a Parquet file; damage is an error that names the file.
    pub async fn parquet_metadata(&self, file: usize) -> Result<ArrowReaderMetadata, SourceError> {
        parquet::metadata(&self.file(file)).await
    }

    /// For [`ArrowReaderMetadata`]'s readers: the bytes of a Parquet file.
    pub fn parquet_reader(&self, file: usize) -> FileReader {
        FileReader::new(&self.file(file))
    }

    /// An error of a reader of one of these files, with the file's name.
    pub fn unreadable(&self, file: usize, source: Box<dyn std::error::Error + Send + Sync>) -> SourceError {
        self.file(file).damaged(Damage::Error(source))
    }

    /// Brings a batch of one file (at least those of its columns that are in the common schema) to the common schema.
    pub fn unify(&self, file: usize, batch: RecordBatch) -> Result<RecordBatch, SourceError> {
        if batch.schema_ref().fields() == self.schema.fields() {
            return Ok(batch);
        }
        let rows = batch.num_rows();
        let of = &self.files[file];
        let cast_error = |field: &Field, what: String| SourceError::Cast {
            path: self.path(file),
            column: field.name().clone(),
            wanted: field.data_type().to_string(),
            what,
        };
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.schema.fields().len());
        for field in self.schema.fields() {
            let wanted = field.data_type();
            let column = match (batch.column_by_name(field.name()), of.partition_value(field.name())) {
                (Some(column), _) => schema::cast(column, wanted),
                (None, Some(value)) => schema::partition_column(value, wanted, rows),
                (None, None) if self.format == Format::Json => Ok(new_null_array(wanted, rows)),
                (None, None) => {
                    return Err(SourceError::Drift {
                        column: field.name().clone(),
                        path: self.path(file),
                        found: "absent".into(),
                        first: "others".into(),
                        expected: wanted.to_string(),
                    });
                }
            };
            columns.push(column.map_err(|error| cast_error(field, error.to_string()))?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)
            .map_err(|error| self.unreadable(file, Box::new(error)))
    }

    /// One file's batches in the common schema; of Parquet only some row groups if asked for.
    async fn read(
        self: &Arc<Self>,
        file: usize,
        row_groups: Option<Range<usize>>,
        parallel: usize,
    ) -> Result<BoxStream<'static, Result<RecordBatch, SourceError>>, SourceError> {
        let of = self.file(file);
        let batches = match self.format {
            Format::Parquet => {
                let metadata = parquet::metadata(&of).await?;
                let all = 0..metadata.metadata().num_row_groups();
                parquet::stream(&of, metadata, row_groups.unwrap_or(all), &self.schema).await?
            }
            Format::Arrow => arrow_file::stream(&of, &self.schema).await?,
            Format::Csv | Format::Json => text::stream(&of, &self.files[file].schema, &self.schema, parallel)?,
        };
        let files = self.clone();
        Ok(batches.map(move |batch| files.unify(file, batch?)).boxed())
    }

    /// Deals the files out; one large Parquet file is dealt out by its row groups, and text is decoded in parallel
    /// within.
    async fn partitions(self: &Arc<Self>, wanted: usize) -> Result<Vec<Arc<dyn PartitionStream>>, SourceError> {
        let wanted = wanted.max(1);
        let mut parts: Vec<Part> = Vec::new();
        for file in 0..self.files.len() {
            let groups = if self.format == Format::Parquet && self.files.len() < wanted {
                self.parquet_metadata(file).await?.metadata().num_row_groups()
            } else {
                1
            };
            let pieces = groups.min(wanted).max(1);
            if pieces == 1 {
                parts.push((file, None));
                continue;
            }
            parts.extend((0..pieces).map(|piece| (file, Some(piece * groups / pieces..(piece + 1) * groups / pieces))));
        }
        let count = wanted.min(parts.len()).max(1);
        let parallel = (wanted / count).max(1);
        Ok((0..count)
            .map(|first| {
                let parts = parts.iter().skip(first).step_by(count).cloned().collect();
                Arc::new(Partition { files: self.clone(), parts, parallel }) as Arc<dyn PartitionStream>
            })
            .collect())
    }

    fn file(&self, file: usize) -> File<'_> {
        File::new(&self.place, &self.files[file].meta, self.format)
    }
}

impl SourceFile {
    /// Of a partition column; the inner None is null.
    fn partition_value(&self, name: &str) -> Option<Option<&str>> {
        self.partition_values.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_deref())
    }
}

struct Column {
    name: String,
    data_type: DataType,
    /// The first file that has it.
    first: usize,
}

/// A file, and which of its row groups.
type Part = (usize, Option<Range<usize>>);

#[derive(Debug)]
struct Partition {
    files: Arc<SourceFiles>,
    parts: Vec<Part>,
    parallel: usize,
}

impl PartitionStream for Partition {
    fn schema(&self) -> &SchemaRef {
        &self.files.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (files, parallel) = (self.files.clone(), self.parallel);
        let batches = futures::stream::iter(self.parts.clone())
            .then(move |(file, row_groups)| {
                let files = files.clone();
                async move { files.read(file, row_groups, parallel).await }
            })
            .try_flatten()
            .map_err(|error| DataFusionError::External(Box::new(error)));
        Box::pin(RecordBatchStreamAdapter::new(self.files.schema.clone(), batches))
    }
}

/// One file while it is read.
struct File<'f> {
    place: &'f Place,
    meta: &'f ObjectMeta,
    format: Format,
}

/// The same for streams that outlive who began them.
#[derive(Debug, Clone)]
struct OwnedFile {
    place: Place,
    meta: ObjectMeta,
    format: Format,
    compression: Compression,
    shown: String,
}

/// What is wrong with a file's content.
enum Damage {
    Text(String),
    Error(Box<dyn std::error::Error + Send + Sync>),
}

impl<'f> File<'f> {
    fn new(place: &'f Place, meta: &'f ObjectMeta, format: Format) -> File<'f> {
        File { place, meta, format }
    }

    fn shown(&self) -> String {
        self.place.show(&self.meta.location)
    }

    fn owned(&self) -> OwnedFile {
        OwnedFile {
            place: self.place.clone(),
            meta: self.meta.clone(),
            format: self.format,
            compression: Format::and_compression(self.meta.location.as_ref()).map_or(Compression::None, |(_, c)| c),
            shown: self.shown(),
        }
    }

    async fn range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        read_range(self.place, self.meta, range).await
    }

    fn damaged(&self, damage: Damage) -> SourceError {
        self.owned().damaged(damage)
    }
}

impl OwnedFile {
    async fn range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        read_range(&self.place, &self.meta, range).await
    }

    /// An error of the store is told as such, even where a reader of the format passes it on.
    fn damaged(&self, damage: Damage) -> SourceError {
        let source = match damage {
            Damage::Text(what) => what.into(),
            Damage::Error(error) => {
                let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error.as_ref());
                while let Some(found) = cause {
                    if found.is::<object_store::Error>() {
                        let source = object_store::Error::Generic { store: "bucket", source: error };
                        return self.place.failed(&self.meta.location, source);
                    }
                    cause = found.source();
                }
                error
            }
        };
        SourceError::Unreadable { path: self.shown.clone(), format: self.format.name(), source }
    }

    fn compressed(&self, error: std::io::Error) -> SourceError {
        self.damaged(Damage::Text(format!("it cannot be unpacked, {error}; it was cut off or is damaged")))
    }
}

async fn read_range(place: &Place, meta: &ObjectMeta, range: Range<u64>) -> Result<Bytes, SourceError> {
    let length = range.end - range.start;
    let bytes = place.store.get_range(&meta.location, range).await;
    let bytes = bytes.map_err(|error| place.failed(&meta.location, error))?;
    // A file that became shorter since it was listed.
    if (bytes.len() as u64) < length { Err(SourceError::Gone { path: place.show(&meta.location) }) } else { Ok(bytes) }
}

/// Awaits a reader that may panic over damaged bytes.
async fn guarded<T, E: std::error::Error + Send + Sync + 'static>(
    file: &File<'_>,
    reading: impl Future<Output = Result<T, E>>,
) -> Result<T, SourceError> {
    let damage = match std::panic::AssertUnwindSafe(reading).catch_unwind().await {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(error)) => Damage::Error(Box::new(error)),
        Err(_) => Damage::Text("its footer is damaged".into()),
    };
    Err(file.damaged(damage))
}

/// Schemas of files that were looked at.
#[derive(Debug, Default)]
struct Remembered {
    schemas: HashMap<Key, SchemaRef>,
    /// The distinct ones, so that files share them.
    distinct: Vec<SchemaRef>,
}

/// A file as it was; another writing of it has another key.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    store: String,
    path: String,
    size: u64,
    modified: i64,
    tag: Option<String>,
}

impl Key {
    fn new(file: &File<'_>) -> Key {
        Key {
            store: file.place.store_url.as_str().to_owned(),
            path: file.meta.location.to_string(),
            size: file.meta.size,
            modified: file.meta.last_modified.timestamp_micros(),
            tag: file.meta.e_tag.clone(),
        }
    }
}

impl Remembered {
    fn remember(&mut self, key: Key, schema: SchemaRef) -> SchemaRef {
        /// Sources have few schemas; searching more would take longer than keeping another copy.
        const DISTINCT_MAX: usize = 256;
        if self.schemas.len() >= REMEMBERED_MAX {
            *self = Remembered::default();
        }
        let schema = match self.distinct.iter().find(|known| **known == schema) {
            Some(known) => known.clone(),
            None => {
                if self.distinct.len() >= DISTINCT_MAX {
                    self.distinct.clear();
                }
                self.distinct.push(schema.clone());
                schema
            }
        };
        self.schemas.insert(key, schema.clone());
        schema
    }
}

#[cfg(test)]
mod tests;
