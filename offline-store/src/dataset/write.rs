//! Writing a dataset while its batches pass by on their way to somebody else.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::{DataType, SchemaRef};
use bytes::Bytes;
use drift::DriftError;
use feature_defs::digest::Digest;
use feature_defs::value::Type;
use futures::TryStreamExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::profile::Profiler;
use super::read::BLOCK_ROWS_MAX;
use super::{
    Column, DatasetError, DatasetFile, FORMAT, MANIFEST, Manifest, PROFILES, ProfilesFile, Recipe, Redacted, Selection,
    StoredDataset, damaged, dataset_folder, open, sweep,
};
use crate::point_in_time::SourceReport;
use crate::profile::{Collector, Profiles, Recount};

/// Row groups of one part: about a million rows, so that parallel readers of a large dataset have files of their own.
const PART_BLOCKS: usize = 8;
/// A row group of wide rows is cut before it takes more memory than this: readers hold a few of them decoded.
const BLOCK_BYTES_MAX: usize = 64 << 20;
const BLOCK_ROWS_MIN: usize = 1_024;
/// Datasets of more bytes are not read again to be counted: their profiles hold samples, and say so.
const RECOUNT_BYTES_MAX: u64 = 16 << 30;
/// Threads that count at once.
const RECOUNTS_MAX: usize = 4;
/// Uploads of one part that are under way; each holds up to 10 MiB.
const UPLOADS_MAX: usize = 2;

/// A dataset that has been asked for and is there.
#[derive(Debug, Clone)]
pub struct Created {
    pub manifest: Manifest,
    /// Of the manifest.
    pub path: Path,
    /// It was there before: nothing was written.
    pub existed: bool,
}

/// Writes one attempt at a dataset.
pub struct DatasetWriter {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    /// The store's root, where it is a folder.
    local: Option<PathBuf>,
    /// The attempt's folder below the dataset's.
    attempt: String,
    recipe: Recipe,
    schema: SchemaRef,
    /// Columns that readers see; the others are behind them.
    seen: usize,
    row_group_rows: usize,
    /// None only while a thread works with it.
    encoder: Option<Encoder>,
    /// The part being written, with the rows that it has.
    part: Option<(BufWriter, DatasetFile)>,
    files: Vec<DatasetFile>,
    rows: u64,
    memory_bytes: u64,
    redacted: Vec<Redacted>,
    /// A file of profiles may be there.
    profiled: bool,
}

/// What turns rows into Parquet; it leaves the async threads alone.
struct Encoder {
    profiler: Profiler,
    /// None where there is nothing to profile by, or where it went wrong.
    collector: Option<Collector>,
    writer: Option<ArrowWriter<Encoded>>,
    encoded: Encoded,
}

/// Bytes of a part that are encoded and not yet handed to the store.
#[derive(Clone, Default)]
struct Encoded(Arc<Mutex<Vec<u8>>>);

impl Write for Encoded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Encoded {
    fn take(&self) -> Bytes {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

impl Encoder {
    fn write(&mut self, batch: &RecordBatch, row_group_rows: usize) -> Result<(), ParquetError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let properties = properties(batch, row_group_rows);
                none.insert(ArrowWriter::try_new(self.encoded.clone(), batch.schema(), Some(properties))?)
            }
        };
        writer.write(batch)?;
        self.profiler.add(batch);
        if let Some(collector) = &mut self.collector
            && let Err(error) = collector.add(batch)
        {
            // A training set without profiles is worth more than none.
            tracing::error!(%error, "a dataset cannot be profiled: drift will not be judged by it; please report this");
            self.collector = None;
        }
        Ok(())
    }
}

/// Made for being read again and again by training: numbers lie as they are in memory, which a reader copies instead of
/// looking each up in a dictionary, under the compression that costs a reader least. Measured with Arrow's C++ reader on
/// 1,000,000 rows of 20 features of all kinds (155 MB in memory): LZ4 87 MB and 0.20 s, snappy 87 MB and 0.27 s, zstd at
/// level 1 74 MB and 0.26 s; with dictionaries 92 MB and 0.24 s, 92 MB and 0.21 s, 85 MB and 0.30 s.
fn properties(batch: &RecordBatch, row_group_rows: usize) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::LZ4_RAW)
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_max_row_group_row_count(Some(row_group_rows));
    for field in batch.schema().fields() {
        let path = match field.data_type() {
            DataType::Float32 | DataType::Float64 | DataType::Timestamp(..) => vec![field.name().clone()],
            DataType::FixedSizeList(item, _) => vec![field.name().clone(), "list".into(), item.name().clone()],
            _ => continue,
        };
        properties = properties.set_column_dictionary_enabled(ColumnPath::new(path), false);
    }
    properties.build()
}

impl DatasetWriter {
    /// `project` is the project's root on the store.
    pub fn create(store: Arc<dyn ObjectStore>, project: &Path, recipe: Recipe, schema: SchemaRef) -> DatasetWriter {
        let folder = dataset_folder(project, &recipe.name, &recipe.id());
        DatasetWriter::again(store, folder, recipe, schema)
    }

    /// Another attempt at a dataset that is there, in its folder.
    pub(super) fn again(store: Arc<dyn ObjectStore>, folder: Path, recipe: Recipe, schema: SchemaRef) -> DatasetWriter {
        let collector = Collector::new(&schema, &recipe.service).unwrap_or_else(|error| {
            tracing::error!(%error, "a dataset cannot be profiled: drift will not be judged by it; please report this");
            None
        });
        let profiler = Profiler::new(&schema, &recipe.service);
        let encoder = Encoder { profiler, collector, writer: None, encoded: Encoded::default() };
        DatasetWriter {
            store,
            folder,
            local: None,
            attempt: Uuid::new_v4().simple().to_string(),
            recipe,
            seen: schema.fields().len(),
            schema,
            row_group_rows: 0,
            encoder: Some(encoder),
            part: None,
            files: Vec::new(),
            rows: 0,
            memory_bytes: 0,
            redacted: Vec::new(),
            profiled: false,
        }
    }

    /// Rows of the spine that were left out from the beginning.
    pub fn with_redacted(mut self, redacted: Vec<Redacted>) -> DatasetWriter {
        self.redacted = redacted;
        self
    }

    /// Where the store's root is on this machine's disk; see [`sweep`].
    pub fn with_local(mut self, local: Option<PathBuf>) -> DatasetWriter {
        self.local = local;
        self
    }

    /// How many of the columns readers see, from the first.
    pub fn with_seen(mut self, seen: usize) -> DatasetWriter {
        self.seen = seen;
        self
    }

    /// Small row groups, so that tests have many without many rows.
    #[cfg(test)]
    pub fn with_row_group_rows(mut self, rows: usize) -> DatasetWriter {
        self.row_group_rows = rows;
        self
    }

    pub async fn write(&mut self, batch: &RecordBatch) -> Result<(), DatasetError> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let bytes = memory_bytes(batch);
        if self.row_group_rows == 0 {
            let row_bytes = (bytes / batch.num_rows()).max(1);
            self.row_group_rows = (BLOCK_BYTES_MAX / row_bytes).clamp(BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
        }
        self.memory_bytes += bytes as u64;
        let part_rows = (self.row_group_rows * PART_BLOCKS) as u64;
        let mut at = 0;
        while at < batch.num_rows() {
            let written = self.part.as_ref().map_or(0, |(_, file)| file.rows);
            let rows = ((part_rows - written) as usize).min(batch.num_rows() - at);
            self.write_rows(batch.slice(at, rows)).await?;
            at += rows;
            if written + rows as u64 == part_rows {
                self.finish_part().await?;
            }
        }
        Ok(())
    }

    async fn write_rows(&mut self, batch: RecordBatch) -> Result<(), DatasetError> {
        let rows = batch.num_rows() as u64;
        let row_group_rows = self.row_group_rows;
        let bytes = self.encode(move |encoder| encoder.write(&batch, row_group_rows)).await?;
        self.rows += rows;
        let (_, file) = self.part();
        file.rows += rows;
        self.upload(bytes).await
    }

    async fn finish_part(&mut self) -> Result<(), DatasetError> {
        let finish = |encoder: &mut Encoder| match encoder.writer.take() {
            Some(writer) => writer.close().map(|_| ()),
            None => Ok(()),
        };
        let bytes = self.encode(finish).await?;
        self.upload(bytes).await?;
        if let Some((mut upload, file)) = self.part.take() {
            let path = self.folder.clone().join(self.attempt.as_str()).join(file.path.as_str());
            let shut = tokio::io::AsyncWriteExt::shutdown(&mut upload).await;
            shut.map_err(|error| {
                stored(&path, object_store::Error::Generic { store: "dataset", source: error.into() })
            })?;
            let path = format!("{}/{}", self.attempt, file.path);
            self.files.push(DatasetFile { path, ..file });
        }
        Ok(())
    }

    fn part(&mut self) -> &mut (BufWriter, DatasetFile) {
        let name = format!("part-{:05}.parquet", self.files.len());
        self.part.get_or_insert_with(|| {
            let path = self.folder.clone().join(self.attempt.as_str()).join(name.as_str());
            let upload = BufWriter::new(self.store.clone(), path).with_max_concurrency(UPLOADS_MAX);
            (upload, DatasetFile { path: name, rows: 0, bytes: 0 })
        })
    }

    /// Runs on a thread that may be kept busy, and returns what there is to upload.
    async fn encode(
        &mut self,
        work: impl FnOnce(&mut Encoder) -> Result<(), ParquetError> + Send + 'static,
    ) -> Result<Bytes, DatasetError> {
        let encoder = self.encoder.take();
        let mut encoder = encoder.ok_or_else(|| DatasetError::Write("an earlier batch could not be written".into()))?;
        let worked = tokio::task::spawn_blocking(move || {
            let worked = work(&mut encoder);
            (encoder, worked)
        });
        let (encoder, worked) = worked.await.map_err(|error| DatasetError::Write(error.to_string()))?;
        worked.map_err(|error| DatasetError::Write(error.to_string()))?;
        let bytes = encoder.encoded.take();
        self.encoder = Some(encoder);
        Ok(bytes)
    }

    async fn upload(&mut self, bytes: Bytes) -> Result<(), DatasetError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (upload, file) = self.part();
        file.bytes += bytes.len() as u64;
        let put = upload.put(bytes).await;
        put.map_err(|source| stored(&self.folder, source))
    }

    /// Puts the manifest, with which the dataset begins to exist, unless somebody else was first: then it is theirs.
    pub async fn finish(mut self, known_at: Vec<SourceReport>) -> Result<Created, DatasetError> {
        match self.publish(known_at).await {
            Ok(created) => {
                // What could not be removed is never read, and the next run of the same recipe tries again.
                if let Err(error) = sweep(&self.store, &created.manifest, &created.path, self.local.as_deref()).await {
                    tracing::warn!(%error, dataset = %created.path, "leftovers of a dataset could not be removed");
                }
                Ok(created)
            }
            Err(error) => {
                self.discard().await;
                Err(error)
            }
        }
    }

    /// Finishes the parts, and says what they are. Nothing names them yet.
    pub(super) async fn manifest(&mut self, known_at: Vec<SourceReport>) -> Result<Manifest, DatasetError> {
        if self.files.is_empty() && self.part.is_none() {
            // A dataset of no rows has columns all the same.
            self.row_group_rows = BLOCK_ROWS_MAX;
            self.write_rows(RecordBatch::new_empty(self.schema.clone())).await?;
        }
        self.finish_part().await?;
        let columns = self.schema.fields().iter().take(self.seen).map(|field| Column {
            name: field.name().clone(),
            column_type: Type::from_arrow(field.data_type())
                .map_or_else(|| field.data_type().to_string(), |known| known.to_string()),
        });
        let (profile, collector) = match self.encoder.take() {
            Some(encoder) => (encoder.profiler.finish().collect(), encoder.collector),
            None => Default::default(),
        };
        let recipe = &self.recipe;
        let mut manifest = Manifest {
            format: FORMAT,
            id: recipe.id(),
            name: recipe.name.clone(),
            service: recipe.service.name.to_string(),
            service_digest: recipe.service.semantic_digest.to_string(),
            spine_digest: recipe.spine_digest.clone(),
            source_digests: recipe.sources.iter().cloned().collect(),
            visibility: recipe.visibility.clone(),
            seed: recipe.seed,
            statuses: recipe.statuses,
            rows: self.rows,
            files: self.files.clone(),
            row_group_rows: self.row_group_rows as u64,
            memory_bytes: self.memory_bytes,
            columns: columns.collect(),
            known_at,
            profile,
            profiles: None,
            created_at: recipe.created_at.clone(),
            redacted: self.redacted.clone(),
        };
        if let Some(collector) = collector {
            manifest.profiles = self.put_profiles(collector, &manifest).await?;
        }
        Ok(manifest)
    }

    /// Counts all rows over the bins that were found while they passed, and puts the profiles beside the parts.
    async fn put_profiles(
        &mut self,
        collector: Collector,
        manifest: &Manifest,
    ) -> Result<Option<ProfilesFile>, DatasetError> {
        let profiles = match self.profiles(collector, manifest).await? {
            Ok(profiles) => profiles,
            Err(error) => {
                tracing::error!(%error, "a dataset cannot be profiled: drift will not be judged by it; please report this");
                return Ok(None);
            }
        };
        let bytes = Bytes::from(profiles.to_bytes());
        let file = ProfilesFile {
            path: format!("{}/{PROFILES}", self.attempt),
            bytes: bytes.len() as u64,
            digest: Digest::of_bytes(&bytes),
        };
        let path = self.folder.clone().join(self.attempt.as_str()).join(PROFILES);
        self.profiled = true;
        self.store.put(&path, PutPayload::from(bytes)).await.map_err(|source| stored(&path, source))?;
        Ok(Some(file))
    }

    async fn profiles(
        &mut self,
        mut collector: Collector,
        manifest: &Manifest,
    ) -> Result<Result<Profiles, DriftError>, DatasetError> {
        let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        if bytes > RECOUNT_BYTES_MAX {
            return Ok(collector.sampled());
        }
        let path = self.folder.clone().join(MANIFEST);
        let dataset = Arc::new(StoredDataset::of(self.store.clone(), &path, manifest.clone()).await?);
        let shares = std::thread::available_parallelism().map_or(1, usize::from).min(RECOUNTS_MAX);
        let recounts = match collector.recounts(shares) {
            Ok(recounts) => recounts,
            Err(error) => return Ok(Err(error)),
        };
        let mut tasks: Vec<JoinHandle<_>> = Vec::new();
        for recount in recounts {
            tasks.push(tokio::spawn(recounted(dataset.clone(), recount)));
        }
        let mut counted = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task.await.map_err(|error| DatasetError::Write(error.to_string()))?? {
                Ok(recount) => counted.push(recount),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(collector.exact(counted))
    }

    async fn publish(&mut self, known_at: Vec<SourceReport>) -> Result<Created, DatasetError> {
        let manifest = self.manifest(known_at).await?;
        let path = self.folder.clone().join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| damaged(&path, &self.folder, error))?;
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&path, PutPayload::from(text), create).await {
            Ok(_) => Ok(Created { manifest, path, existed: false }),
            // Somebody was first, or the answer to a put that worked was lost: what is there says which.
            Err(source) => match open(&self.store, &path).await {
                Ok(there) => {
                    let existed = there.files != manifest.files;
                    Ok(Created { manifest: there, path, existed })
                }
                Err(_) => Err(stored(&path, source)),
            },
        }
    }

    /// Gives the attempt up and removes what it has written, as far as that is possible.
    pub async fn discard(mut self) {
        if let Some((mut upload, _)) = self.part.take() {
            let _ = upload.abort().await;
        }
        for file in &self.files {
            let path = file.path.split('/').fold(self.folder.clone(), |path, part| path.join(part));
            let _ = self.store.delete(&path).await;
        }
        if self.profiled {
            let path = self.folder.clone().join(self.attempt.as_str()).join(PROFILES);
            let _ = self.store.delete(&path).await;
        }
        if let Some(local) = &self.local {
            let attempt = local.join(self.folder.as_ref()).join(&self.attempt);
            let _ = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(attempt)).await;
        }
    }
}

/// Counts the rows of a dataset that was written just now.
async fn recounted(dataset: Arc<StoredDataset>, recount: Recount) -> Result<Result<Recount, DriftError>, DatasetError> {
    let columns = recount.columns();
    let mut recount = recount.projected(&columns);
    let mut batches = dataset.read(&Selection::default(), &columns, 0)?;
    while let Some(batch) = batches.try_next().await? {
        let worked = tokio::task::spawn_blocking(move || recount.add(&batch).map(|()| recount)).await;
        match worked.map_err(|error| DatasetError::Write(error.to_string()))? {
            Ok(counted) => recount = counted,
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(recount))
}

fn stored(path: &Path, source: object_store::Error) -> DatasetError {
    DatasetError::Store { path: path.to_string(), verb: "written", source }
}

/// What the rows of a batch take in memory, whatever they are a slice of.
fn memory_bytes(batch: &RecordBatch) -> usize {
    let of =
        |array: &dyn Array| array.to_data().get_slice_memory_size().unwrap_or_else(|_| array.get_array_memory_size());
    batch.columns().iter().map(|column| of(column.as_ref())).sum()
}
