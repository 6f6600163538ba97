//! Files that somebody else owns: which there are, what columns they have, and how they are scanned.
//!
//! A pattern is a path relative to the project folder (or absolute): one file, a folder, or a glob. All files of a source
//! have one schema; a file that differs is an error that names it, not a column of nulls.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::dataframe::DataFrame;
use datafusion::datasource::file_format::FileFormat;
use datafusion::datasource::file_format::csv::CsvFormat;
use datafusion::datasource::file_format::json::JsonFormat;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::prelude::{SessionConfig, SessionContext, ident};
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::value::Type;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStoreExt};

use crate::point_in_time::files::Location;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(
        "no file matches `{pattern}` (looked below {folder}); check `files:` in the definitions, or put the data there"
    )]
    NoFiles { pattern: String, folder: String },
    #[error("`{pattern}` is not a pattern of files: {what}")]
    BadPattern { pattern: String, what: String },
    #[error("{path} is of no known format; files end in .parquet, .csv, .json, .jsonl or .ndjson")]
    UnknownFormat { path: String },
    #[error("{path} cannot be read as {format}; replace or remove the file, then try again")]
    Unreadable { path: String, format: &'static str, source: DataFusionError },
    #[error("{path} has no rows and no columns to take a schema from")]
    Empty { path: String },
    #[error("column `{column}` is {found} in {path}, but {expected} in {first}; files of one source have one schema")]
    Drift { column: String, path: String, found: String, first: String, expected: String },
    #[error("source `{name}` could not be scanned")]
    Scan { name: String, source: DataFusionError },
}

/// Reads files of sources.
#[derive(Clone)]
pub struct Sources {
    folder: PathBuf,
    context: SessionContext,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Parquet,
    Csv,
    Json,
}

/// The files of one source and their common schema.
#[derive(Debug, Clone)]
pub struct SourceFiles {
    pub files: Vec<ObjectMeta>,
    pub schema: SchemaRef,
    store: ObjectStoreUrl,
    format: Format,
}

impl SourceFiles {
    pub fn is_parquet(&self) -> bool {
        self.format == Format::Parquet
    }
}

impl Format {
    fn of(path: &str) -> Option<Format> {
        let extension = path.rsplit_once('.')?.1;
        Some(match extension.to_ascii_lowercase().as_str() {
            "parquet" => Format::Parquet,
            "csv" => Format::Csv,
            "json" | "jsonl" | "ndjson" => Format::Json,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Format::Parquet => "Parquet",
            Format::Csv => "CSV",
            Format::Json => "JSON lines",
        }
    }

    fn open(self) -> Arc<dyn FileFormat> {
        match self {
            Format::Parquet => Arc::new(plain_parquet()),
            Format::Csv => Arc::new(CsvFormat::default().with_has_header(true)),
            Format::Json => Arc::new(JsonFormat::default()),
        }
    }
}

impl Sources {
    /// For programs that only look: no memory bound, two partitions.
    pub fn new(project_folder: &Path) -> Result<Sources, SourceError> {
        let runtime = RuntimeEnvBuilder::new().with_object_list_cache_limit(0).build_arc();
        let runtime = runtime.map_err(|source| SourceError::Scan { name: "any".into(), source })?;
        Ok(Sources::with_runtime(project_folder, runtime))
    }

    /// With the engine's memory pool and stores.
    pub fn with_runtime(project_folder: &Path, runtime: Arc<RuntimeEnv>) -> Sources {
        let mut config = SessionConfig::new();
        // Keys and strings are looked at as plain strings everywhere; views would be converted back at once.
        config.options_mut().execution.parquet.schema_force_view_types = false;
        let folder = std::path::absolute(project_folder).unwrap_or_else(|_| project_folder.to_path_buf());
        Sources { folder, context: SessionContext::new_with_config_rt(config, runtime) }
    }

    /// The columns of a source's files, in our types; columns of types we do not have are left out.
    pub async fn schema(&self, pattern: &str) -> Result<Vec<(String, Type)>, SourceError> {
        let files = self.files(pattern).await?;
        let columns = files.schema.fields().iter();
        Ok(columns.filter_map(|field| Some((field.name().clone(), Type::from_arrow(field.data_type())?))).collect())
    }

    /// Lists the files a pattern names and reads the schema of each.
    pub async fn files(&self, pattern: &str) -> Result<SourceFiles, SourceError> {
        let url = self.url(pattern)?;
        let bad = |error: DataFusionError| SourceError::BadPattern { pattern: pattern.into(), what: error.to_string() };
        let state = self.context.state();
        let store = self.context.runtime_env().object_store(url.object_store()).map_err(bad)?;
        let none = || SourceError::NoFiles { pattern: pattern.into(), folder: self.folder.display().to_string() };
        let listed: Result<Vec<ObjectMeta>, DataFusionError> = if url.is_collection() || url.get_glob().is_some() {
            match url.list_all_files(&state, store.as_ref(), "").await {
                Ok(files) => files.try_collect().await,
                Err(error) => Err(error),
            }
        } else {
            store.head(url.prefix()).await.map(|file| vec![file]).map_err(DataFusionError::from)
        };
        let mut files = match listed {
            Ok(files) => files,
            Err(DataFusionError::ObjectStore(error)) if matches!(*error, object_store::Error::NotFound { .. }) => {
                return Err(none());
            }
            Err(error) => return Err(bad(error)),
        };
        files.retain(|file| file.size > 0 || Format::of(file.location.as_ref()).is_some());
        files.retain(|file| !file.location.filename().is_some_and(|name| name.starts_with(['.', '_'])));
        files.sort_by(|a, b| a.location.cmp(&b.location));
        let first = files.first().ok_or_else(none)?;
        let shown = |file: &ObjectMeta| self.shown(&file.location);
        let format =
            Format::of(first.location.as_ref()).ok_or_else(|| SourceError::UnknownFormat { path: shown(first) })?;
        let opened = format.open();
        let mut schema: Option<SchemaRef> = None;
        for file in &files {
            if Format::of(file.location.as_ref()) != Some(format) {
                return Err(SourceError::UnknownFormat { path: shown(file) });
            }
            let unreadable = |source| SourceError::Unreadable { path: shown(file), format: format.name(), source };
            if format == Format::Parquet {
                check_footer(store.as_ref(), file).await.map_err(unreadable)?;
            }
            let found = opened.infer_schema(&state, &store, std::slice::from_ref(file)).await.map_err(unreadable)?;
            match &schema {
                None => schema = Some(found),
                Some(expected) => check_drift(expected, &found, &shown(first), &shown(file), format)?,
            }
        }
        let schema = schema.ok_or_else(none)?;
        if schema.fields().is_empty() {
            return Err(SourceError::Empty { path: shown(first) });
        }
        Ok(SourceFiles { files, schema, store: url.object_store(), format })
    }

    /// Scans the named columns of a source's files as they are, in no particular order.
    pub async fn data_frame(&self, source: &SourcePlan, columns: &[String]) -> Result<DataFrame, SourceError> {
        let pattern = match &source.kind {
            SourceKind::Files { pattern } | SourceKind::Static { pattern } => pattern,
            SourceKind::Stream { history: Some(pattern), .. } => pattern,
            SourceKind::Stream { history: None, .. } => {
                return Err(SourceError::BadPattern {
                    pattern: source.name.to_string(),
                    what: "it is a stream".into(),
                });
            }
        };
        let files = self.files(pattern).await?;
        self.listing(source, &files, columns)
    }

    /// [`Sources::data_frame`] of files that are listed already.
    pub fn frame(
        &self,
        source: &SourcePlan,
        files: &SourceFiles,
        columns: &[String],
    ) -> Result<DataFrame, SourceError> {
        self.listing(source, files, columns)
    }

    /// Where the files of a source are, for whoever reads them row group by row group.
    pub fn locations(&self, files: &SourceFiles) -> Result<Vec<Location>, SourceError> {
        let store = self.context.runtime_env().object_store(&files.store);
        let store =
            store.map_err(|source| SourceError::Scan { name: files.store.as_str().to_owned(), source })?;
        let location = |file: &ObjectMeta| Location {
            store: store.clone(),
            path: file.location.clone(),
            size: file.size,
            shown: self.shown(&file.location),
        };
        Ok(files.files.iter().map(location).collect())
    }

    fn listing(&self, source: &SourcePlan, files: &SourceFiles, columns: &[String]) -> Result<DataFrame, SourceError> {
        let failed = |error: DataFusionError| SourceError::Scan { name: source.name.to_string(), source: error };
        // Text formats have no types of their own: where the definitions declare one, it is read as that.
        let fields: Vec<Field> = files
            .schema
            .fields()
            .iter()
            .map(|field| match source.column_type(field.name()) {
                Some(declared) if files.format != Format::Parquet => Field::new(field.name(), declared.arrow(), true),
                _ => field.as_ref().clone(),
            })
            .collect();
        let urls = files
            .files
            .iter()
            .map(|file| file_url(&files.store, &file.location))
            .collect::<Result<Vec<ListingTableUrl>, DataFusionError>>()
            .map_err(failed)?;
        let options = ListingOptions::new(files.format.open()).with_file_extension("");
        let config = ListingTableConfig::new_with_multi_paths(urls)
            .with_listing_options(options)
            .with_schema(Arc::new(Schema::new(fields)));
        let table = ListingTable::try_new(config).map_err(failed)?;
        let frame = self.context.read_table(Arc::new(table)).map_err(failed)?;
        let present: Vec<_> = columns
            .iter()
            .filter(|name| files.schema.column_with_name(name).is_some())
            .map(|name| ident(name.as_str()))
            .collect();
        frame.select(present).map_err(failed)
    }

    /// A stream of batches in the source's declared types, with at least the named columns.
    pub async fn scan(
        &self,
        source: &Arc<SourcePlan>,
        columns: &[String],
    ) -> Result<SendableRecordBatchStream, SourceError> {
        let frame = self.data_frame(source, columns).await?;
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
        Ok(self.fingerprint_of(&self.files(pattern).await?))
    }

    /// See [`Sources::fingerprint`].
    pub fn fingerprint_of(&self, files: &SourceFiles) -> String {
        let mut text = feature_defs::digest::Canonical::new("files");
        for file in &files.files {
            text.add("path", &file.location);
            text.add("size", file.size);
            text.add("modified", file.last_modified.timestamp_micros());
        }
        text.digest().to_string()
    }

    fn url(&self, pattern: &str) -> Result<ListingTableUrl, SourceError> {
        let bad = |error: DataFusionError| SourceError::BadPattern { pattern: pattern.into(), what: error.to_string() };
        if pattern.contains("://") {
            return ListingTableUrl::parse(pattern).map_err(bad);
        }
        let mut path = self.folder.join(pattern).to_string_lossy().into_owned();
        if Path::new(&path).is_dir() && !path.ends_with('/') {
            path.push('/');
        }
        ListingTableUrl::parse(path).map_err(bad)
    }

    /// A path as the user wrote it: relative to the project folder where it lies below it.
    fn shown(&self, path: &object_store::path::Path) -> String {
        let whole = Path::new("/").join(path.as_ref());
        whole.strip_prefix(&self.folder).unwrap_or(&whole).display().to_string()
    }
}

/// Parquet whose strings are read as plain strings, as they were written.
pub(crate) fn plain_parquet() -> ParquetFormat {
    ParquetFormat::default().with_force_view_types(false)
}

/// The URL of one object. Percent signs in object paths are doubled by URL encoding, as DataFusion expects.
pub(crate) fn file_url(
    store: &ObjectStoreUrl,
    path: &object_store::path::Path,
) -> Result<ListingTableUrl, DataFusionError> {
    let encoded: String = path
        .as_ref()
        .bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b'=' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    ListingTableUrl::parse(format!("{}{encoded}", store.as_str()))
}

/// The reader of Parquet's footer takes the length that the footer states and subtracts it from the file's, unchecked: a
/// damaged file would be a panic instead of an error.
async fn check_footer(store: &dyn object_store::ObjectStore, file: &ObjectMeta) -> Result<(), DataFusionError> {
    const FOOTER_BYTES: u64 = 8;
    let corrupt = |what: &str| DataFusionError::Execution(format!("{what}; it is cut off or no Parquet file at all"));
    let Some(before_footer) = file.size.checked_sub(FOOTER_BYTES) else { return Err(corrupt("it has no footer")) };
    let footer = store.get_range(&file.location, before_footer..file.size).await?;
    let (length, magic) = footer.split_at(4);
    if magic != b"PAR1" && magic != b"PARE" {
        return Err(corrupt("it does not end as a Parquet file does"));
    }
    let length = length.iter().rev().fold(0, |length, byte| length << 8 | u64::from(*byte));
    if length > before_footer { Err(corrupt("its footer states more bytes than the file has")) } else { Ok(()) }
}

fn check_drift(
    expected: &SchemaRef,
    found: &SchemaRef,
    first: &str,
    path: &str,
    format: Format,
) -> Result<(), SourceError> {
    let drift = |column: &str, found: String, expected: String| SourceError::Drift {
        column: column.into(),
        path: path.into(),
        found,
        first: first.into(),
        expected,
    };
    for field in expected.fields() {
        match found.column_with_name(field.name()) {
            None => return Err(drift(field.name(), "absent".into(), field.data_type().to_string())),
            // Types of text files are guesses from their first rows; the cast while reading is the judge.
            Some((_, other)) if format == Format::Parquet && other.data_type() != field.data_type() => {
                return Err(drift(field.name(), other.data_type().to_string(), field.data_type().to_string()));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
