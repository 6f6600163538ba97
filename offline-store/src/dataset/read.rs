//! Reading stored datasets: which rows a reader gets, and the pipeline that gets them.
//!
//! The rows of a dataset, as stored or shuffled, are one *sequence*; everything a reader may ask for (a share of several
//! readers, the rest after an interruption, the range of an endpoint) is a range of it. So shares are disjoint and
//! complete, differ by at most one row, and need no agreement between readers.
//!
//! **Shuffled**, for seed `s` over the blocks (row groups) of the dataset, with SplitMix64 as the source of numbers and the
//! Fisher-Yates shuffle (from the last place down, each swapped with place `(next * places) >> 64`): the blocks are
//! shuffled by the generator that starts at `s`; they are taken in that order into pools of at most [`POOL_BYTES_MAX`] of
//! rows (at least one block each); the rows of pool `p`, block after block, are shuffled by the generator that starts at
//! the `p + 1`-th number of one that starts at `s ^ POOL_SALT`. A row can thus land anywhere, but rows of one pool stay
//! near each other: it is no uniform permutation of all rows, which would need them all in memory.
//!
//! **The pipeline** is bounded: one block (or pool) being decoded, one fetched and one being fetched ahead, and a few
//! batches. Decoding happens on threads that may be kept busy, one batch at a time, so that a slow reader holds none. When
//! the reader goes, so does all of it.

use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use arrow::array::RecordBatch;
use arrow::compute::interleave_record_batch;
use arrow::datatypes::{Schema, SchemaRef};
use bytes::Bytes;
use futures::Stream;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::DecodeResult;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader};
use parquet::arrow::push_decoder::ParquetPushDecoderBuilder;
use parquet::file::metadata::ParquetMetaDataReader;
use tokio::sync::{OnceCell, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::{DatasetError, JoinPath, Manifest, damaged, folder_of, open};

/// Rows of one row group at most.
pub const BLOCK_ROWS_MAX: usize = 131_072;
/// Rows that are shuffled together take at most this, unless a single block takes more.
pub const POOL_BYTES_MAX: u64 = 64 << 20;
const POOL_SALT: u64 = 0x5bd1_e995_9e37_79b9;
/// A batch takes about this: small enough for a core's cache while it is decoded and sent, large enough that what each
/// batch costs does not count.
const BATCH_BYTES: u64 = 2 << 20;
const BATCH_ROWS_MIN: usize = 1_024;
const BATCH_ROWS_MAX: usize = 65_536;
/// Rows whose width nobody has written down (format 1) are taken to be this wide.
const ROW_BYTES_UNKNOWN: u64 = 256;

/// Decoding by all readers together uses at most the machine's cores.
static DECODERS: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from))));

/// Which rows of a dataset, in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selection {
    pub rank: u32,
    /// 0 and 1: one reader.
    pub world_size: u32,
    pub shuffle_seed: Option<u64>,
    /// Rows of the share that are left out.
    pub offset: u64,
    pub limit: Option<u64>,
}

/// A part of a selection: what to add to its offset, and its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub offset: u64,
    pub limit: u64,
}

/// A dataset that can be read.
pub struct StoredDataset {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    pub manifest: Manifest,
    /// The columns that readers see.
    pub schema: SchemaRef,
    /// With those behind them that only profiles need.
    whole_schema: SchemaRef,
    blocks: Vec<Block>,
    /// Read when they are first needed, and kept: they never change.
    footers: Vec<OnceCell<ArrowReaderMetadata>>,
}

/// One row group.
#[derive(Debug, Clone, Copy)]
struct Block {
    file: usize,
    row_group: usize,
    rows: u64,
}

/// Blocks whose rows come together.
struct Pool {
    blocks: Vec<usize>,
    /// Where in the sequence.
    rows: Range<u64>,
    /// How they are shuffled.
    seed: Option<u64>,
}

/// Bytes of one row group.
struct Fetched {
    footer: ArrowReaderMetadata,
    row_group: usize,
    rows: u64,
    ranges: Vec<Range<u64>>,
    data: Vec<Bytes>,
}

/// Rows of one pool, on their way.
struct Piece {
    /// Within the pool.
    rows: Range<u64>,
    seed: Option<u64>,
    blocks: Vec<Fetched>,
}

impl std::fmt::Debug for StoredDataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredDataset").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl StoredDataset {
    pub async fn open(store: Arc<dyn ObjectStore>, manifest_path: &Path) -> Result<StoredDataset, DatasetError> {
        let manifest = open(&store, manifest_path).await?;
        StoredDataset::of(store, manifest_path, manifest).await
    }

    /// The dataset of a manifest, which need not be stored yet.
    pub(super) async fn of(
        store: Arc<dyn ObjectStore>,
        manifest_path: &Path,
        manifest: Manifest,
    ) -> Result<StoredDataset, DatasetError> {
        let folder = folder_of(manifest_path);
        let footers = manifest.files.iter().map(|_| OnceCell::new()).collect();
        let (schema, whole_schema) = (Arc::new(Schema::empty()), Arc::new(Schema::empty()));
        let mut dataset = StoredDataset { store, folder, manifest, schema, whole_schema, blocks: Vec::new(), footers };
        if dataset.manifest.files.is_empty() {
            return Err(damaged(manifest_path, &dataset.folder, "it names no file"));
        }
        dataset.whole_schema = dataset.footer(0).await?.schema().clone();
        dataset.schema = match dataset.manifest.columns.len() {
            seen if dataset.manifest.format >= super::FORMAT_HIDDEN && seen < dataset.whole_schema.fields().len() => {
                let seen: Vec<usize> = (0..seen).collect();
                let schema = dataset.whole_schema.project(&seen);
                Arc::new(schema.map_err(|error| damaged(manifest_path, &dataset.folder, error))?)
            }
            _ => dataset.whole_schema.clone(),
        };
        for file in 0..dataset.manifest.files.len() {
            let groups = match (dataset.manifest.row_group_rows, dataset.manifest.files[file].rows) {
                (0, _) => {
                    let footer = dataset.footer(file).await?;
                    footer.metadata().row_groups().iter().map(|group| group.num_rows() as u64).collect()
                }
                (rows, all) => (0..all.div_ceil(rows)).map(|group| rows.min(all - group * rows)).collect::<Vec<_>>(),
            };
            let blocks = groups.into_iter().enumerate().map(|(row_group, rows)| Block { file, row_group, rows });
            dataset.blocks.extend(blocks);
        }
        if dataset.blocks.iter().map(|block| block.rows).sum::<u64>() != dataset.manifest.rows {
            return Err(damaged(manifest_path, &dataset.folder, "its files have other rows than it says"));
        }
        Ok(dataset)
    }

    /// All columns of the files, those that readers do not see behind the others.
    pub fn whole_schema(&self) -> &SchemaRef {
        &self.whole_schema
    }

    /// The columns named, in that order, or all that readers see.
    pub fn columns(&self, names: &[String]) -> Result<Vec<usize>, DatasetError> {
        if names.is_empty() {
            return Ok((0..self.schema.fields().len()).collect());
        }
        let unknown = |name: &String| {
            let known: Vec<&str> = self.schema.fields().iter().map(|field| field.name().as_str()).collect();
            let dataset = self.manifest.name.clone();
            DatasetError::UnknownColumn { dataset, column: name.clone(), known: known.join(", ") }
        };
        names.iter().map(|name| self.schema.index_of(name).map_err(|_| unknown(name))).collect()
    }

    /// The range of the sequence that is selected.
    pub fn range(&self, selection: &Selection) -> Result<Range<u64>, DatasetError> {
        let (rank, world) = (u128::from(selection.rank), u128::from(selection.world_size.max(1)));
        if rank >= world {
            let text = format!("rank {rank} of a world of {world}: ranks are counted from 0");
            return Err(DatasetError::Selection(text));
        }
        let bound = |rank: u128| (rank * u128::from(self.manifest.rows) / world) as u64;
        let (start, end) = (bound(rank), bound(rank + 1));
        if selection.offset > end - start {
            let text = format!("offset {} is beyond the {} rows of this reader", selection.offset, end - start);
            return Err(DatasetError::Selection(text));
        }
        let start = start + selection.offset;
        Ok(start..selection.limit.map_or(end, |limit| end.min(start.saturating_add(limit))))
    }

    /// Parts that, one after the other, are the selection. `count` of them, cut where blocks begin so that none is
    /// decoded twice; fewer where there are not so many blocks. 0: one per file.
    pub fn parts(&self, selection: &Selection, count: u32) -> Result<Vec<Part>, DatasetError> {
        let range = self.range(selection)?;
        let rows = u128::from(range.end - range.start);
        let count = if count == 0 { self.manifest.files.len() } else { count as usize };
        let pools = self.pools(selection.shuffle_seed);
        let cuts: Vec<u64> = pools.iter().map(|pool| pool.rows.start).filter(|start| range.contains(start)).collect();
        let mut bounds = if count > cuts.len() {
            cuts
        } else {
            let near = |part: usize| {
                let ideal = range.start + (rows * part as u128 / count as u128) as u64;
                cuts.iter().copied().min_by_key(|cut| cut.abs_diff(ideal))
            };
            (1..count).filter_map(near).collect()
        };
        bounds.extend([range.start, range.end]);
        bounds.sort_unstable();
        bounds.dedup();
        if bounds.len() < 2 {
            return Ok(vec![Part { offset: 0, limit: 0 }]);
        }
        Ok(bounds.windows(2).map(|cut| Part { offset: cut[0] - range.start, limit: cut[1] - cut[0] }).collect())
    }

    /// Bytes of memory that one stream holds at most, roughly: what is decoded and what is fetched ahead.
    pub fn stream_bytes(&self, selection: &Selection) -> u64 {
        let rows = self.blocks.iter().map(|block| block.rows).max().unwrap_or(0);
        let block = rows * self.row_bytes();
        let all = self.manifest.rows * self.row_bytes();
        let pool = if selection.shuffle_seed.is_some() { block.max(POOL_BYTES_MAX) } else { 0 };
        // A dataset that is smaller than that is held once, and fetched once.
        (pool + 3 * block).min(2 * all) + 6 * BATCH_BYTES
    }

    fn row_bytes(&self) -> u64 {
        match (self.manifest.memory_bytes, self.manifest.rows) {
            (0, _) | (_, 0) => ROW_BYTES_UNKNOWN,
            (bytes, rows) => bytes.div_ceil(rows),
        }
    }

    /// Reads what is selected.
    pub fn read(
        self: &Arc<Self>,
        selection: &Selection,
        columns: &[usize],
        batch_rows: u32,
    ) -> Result<Batches, DatasetError> {
        let range = self.range(selection)?;
        let schema =
            Arc::new(self.whole_schema.project(columns).map_err(|error| DatasetError::Selection(error.to_string()))?);
        let batch_rows = match batch_rows {
            0 => ((BATCH_BYTES / self.row_bytes().max(1)) as usize).clamp(BATCH_ROWS_MIN, BATCH_ROWS_MAX),
            rows => (rows as usize).min(BATCH_ROWS_MAX),
        };
        let mut tasks = JoinSet::new();
        let (fetched_sender, fetched) = mpsc::channel(1);
        let (batch_sender, batches) = mpsc::channel(1);
        let pools: Vec<Pool> = self
            .pools(selection.shuffle_seed)
            .into_iter()
            .filter(|pool| pool.rows.start.max(range.start) < pool.rows.end.min(range.end))
            .collect();
        let decode = Decode { columns: columns.to_vec(), schema: schema.clone(), batch_rows };
        let dataset = self.clone();
        let wanted = columns.to_vec();
        tasks.spawn(async move {
            for pool in pools {
                let piece = dataset.fetch(&pool, &range, &wanted).await;
                let failed = piece.is_err();
                if fetched_sender.send(piece).await.is_err() || failed {
                    return;
                }
            }
        });
        tasks.spawn(decode.run(fetched, batch_sender));
        Ok(Batches { schema, batches, _tasks: tasks })
    }

    fn pools(&self, shuffle_seed: Option<u64>) -> Vec<Pool> {
        let mut start = 0;
        let mut pool = |blocks: Vec<usize>, seed: Option<u64>| {
            let rows: u64 = blocks.iter().map(|block| self.blocks[*block].rows).sum();
            start += rows;
            Pool { blocks, rows: start - rows..start, seed }
        };
        let Some(seed) = shuffle_seed else {
            return (0..self.blocks.len()).map(|block| pool(vec![block], None)).collect();
        };
        let mut order: Vec<usize> = (0..self.blocks.len()).collect();
        SplitMix(seed).shuffle(&mut order);
        let mut seeds = SplitMix(seed ^ POOL_SALT);
        let mut pools = Vec::new();
        let mut blocks = Vec::new();
        let mut bytes = 0;
        for block in order {
            let more = self.blocks[block].rows * self.row_bytes();
            if bytes + more > POOL_BYTES_MAX && !blocks.is_empty() {
                pools.push(pool(std::mem::take(&mut blocks), Some(seeds.next())));
                bytes = 0;
            }
            blocks.push(block);
            bytes += more;
        }
        if !blocks.is_empty() {
            pools.push(pool(blocks, Some(seeds.next())));
        }
        pools
    }

    async fn fetch(&self, pool: &Pool, range: &Range<u64>, columns: &[usize]) -> Result<Piece, DatasetError> {
        let start = range.start.max(pool.rows.start) - pool.rows.start;
        let end = range.end.min(pool.rows.end) - pool.rows.start;
        let mut blocks = Vec::with_capacity(pool.blocks.len());
        for block in &pool.blocks {
            let block = self.blocks[*block];
            let footer = self.footer(block.file).await?;
            let path = self.path(block.file);
            let groups = footer.metadata().row_groups();
            let group = groups.get(block.row_group).filter(|group| group.num_rows() as u64 == block.rows);
            let group = group.ok_or_else(|| damaged(&path, &self.folder, "its row groups are not the manifest's"))?;
            let mask = ProjectionMask::roots(footer.parquet_schema(), columns.iter().copied());
            let leaves = (0..group.num_columns()).filter(|leaf| mask.leaf_included(*leaf));
            let ranges: Vec<Range<u64>> = leaves
                .map(|leaf| {
                    let (start, length) = group.column(leaf).byte_range();
                    start..start + length
                })
                .collect();
            let data = self.store.get_ranges(&path, &ranges).await;
            let data = data.map_err(|source| DatasetError::Store { path: path.to_string(), verb: "read", source })?;
            blocks.push(Fetched { footer, row_group: block.row_group, rows: block.rows, ranges, data });
        }
        Ok(Piece { rows: start..end, seed: pool.seed, blocks })
    }

    fn path(&self, file: usize) -> Path {
        self.folder.clone().join_path(&self.manifest.files[file].path)
    }

    async fn footer(&self, file: usize) -> Result<ArrowReaderMetadata, DatasetError> {
        let load = async {
            let path = self.path(file);
            let bytes = self.manifest.files[file].bytes;
            let wrong = |what: String| damaged(&path, &self.folder, what);
            // The reader of footers trusts the length that a file states; a damaged one is looked at first.
            let failed = |source| DatasetError::Store { path: path.to_string(), verb: "read", source };
            let before = bytes.checked_sub(8).ok_or_else(|| wrong("it is too short".into()))?;
            let end = self.store.get_range(&path, before..bytes).await.map_err(failed)?;
            let length = end
                .get(..4)
                .map_or(u64::MAX, |length| length.iter().rev().fold(0, |length, byte| length << 8 | u64::from(*byte)));
            if end.get(4..) != Some(b"PAR1") || length > before {
                return Err(wrong("it does not end as a Parquet file does".into()));
            }
            let footer = self.store.get_range(&path, before - length..before).await.map_err(failed)?;
            let metadata = ParquetMetaDataReader::decode_metadata(&footer).map_err(|error| wrong(error.to_string()))?;
            let footer = ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new());
            footer.map_err(|error| wrong(error.to_string()))
        };
        self.footers[file].get_or_try_init(|| load).await.cloned()
    }
}

/// What turns fetched bytes into batches.
struct Decode {
    columns: Vec<usize>,
    schema: SchemaRef,
    batch_rows: usize,
}

type Answer = Result<RecordBatch, DatasetError>;

impl Decode {
    async fn run(self, mut pieces: mpsc::Receiver<Result<Piece, DatasetError>>, batches: mpsc::Sender<Answer>) {
        let decode = Arc::new(self);
        while let Some(piece) = pieces.recv().await {
            let mut rows = match piece {
                Ok(piece) => {
                    let decode = decode.clone();
                    work(move || decode.begin(piece)).await
                }
                Err(error) => Err(error),
            };
            loop {
                let answer = match rows {
                    Ok(mut more) => {
                        let decode = decode.clone();
                        let decoded = work(move || Ok((decode.next(&mut more)?, more))).await;
                        match decoded {
                            Ok((Some(batch), more)) => {
                                rows = Ok(more);
                                Ok(batch)
                            }
                            Ok((None, _)) => break,
                            Err(error) => {
                                let _ = batches.send(Err(error)).await;
                                return;
                            }
                        }
                    }
                    Err(error) => {
                        let _ = batches.send(Err(error)).await;
                        return;
                    }
                };
                // The reader may be gone; then nobody misses the rest.
                if batches.send(answer).await.is_err() {
                    return;
                }
            }
        }
    }

    fn begin(&self, piece: Piece) -> Result<Rows, DatasetError> {
        let Piece { rows, seed, mut blocks } = piece;
        let Some(seed) = seed else {
            let block = blocks.pop().ok_or_else(|| DatasetError::Part("it has no row groups".into()))?;
            return Ok(Rows::Stored(self.reader(block, rows, self.batch_rows)?));
        };
        let mut places: Vec<(usize, usize)> = Vec::new();
        let mut decoded = Vec::new();
        for block in blocks {
            let rows = block.rows;
            for batch in self.reader(block, 0..rows, BLOCK_ROWS_MAX)? {
                let batch = batch.map_err(|error| DatasetError::Part(error.to_string()))?;
                places.extend((0..batch.num_rows()).map(|row| (decoded.len(), row)));
                decoded.push(batch);
            }
        }
        SplitMix(seed).shuffle(&mut places);
        let mut places = places.into_iter();
        // Rows before the range are the last reader's.
        if rows.start > 0 {
            places.nth(rows.start as usize - 1);
        }
        let places = places.take((rows.end - rows.start) as usize).collect::<Vec<_>>();
        Ok(Rows::Shuffled { decoded, places, at: 0 })
    }

    fn reader(
        &self,
        block: Fetched,
        rows: Range<u64>,
        batch_rows: usize,
    ) -> Result<ParquetRecordBatchReader, DatasetError> {
        let failed = |error: parquet::errors::ParquetError| DatasetError::Part(error.to_string());
        let mask = ProjectionMask::roots(block.footer.parquet_schema(), self.columns.iter().copied());
        let mut decoder = ParquetPushDecoderBuilder::new_with_metadata(block.footer)
            .with_row_groups(vec![block.row_group])
            .with_projection(mask)
            .with_batch_size(batch_rows)
            .with_offset(rows.start as usize)
            .with_limit((rows.end - rows.start) as usize)
            .build()
            .map_err(failed)?;
        decoder.push_ranges(block.ranges, block.data).map_err(failed)?;
        match decoder.try_next_reader().map_err(failed)? {
            DecodeResult::Data(reader) => Ok(reader),
            DecodeResult::NeedsData(_) | DecodeResult::Finished => {
                Err(DatasetError::Part("a row group has no rows where some were stored".into()))
            }
        }
    }

    fn next(&self, rows: &mut Rows) -> Result<Option<RecordBatch>, DatasetError> {
        let failed = |error: arrow::error::ArrowError| DatasetError::Part(error.to_string());
        let batch = match rows {
            Rows::Stored(reader) => match reader.next() {
                Some(batch) => batch.map_err(failed)?,
                None => return Ok(None),
            },
            Rows::Shuffled { at, places, .. } if *at == places.len() => return Ok(None),
            Rows::Shuffled { decoded, places, at } => {
                let end = places.len().min(*at + self.batch_rows);
                let decoded: Vec<&RecordBatch> = decoded.iter().collect();
                let batch = interleave_record_batch(&decoded, &places[*at..end]).map_err(failed)?;
                *at = end;
                batch
            }
        };
        // Files give columns in the order in which they lie.
        let columns = self.schema.fields().iter().map(|field| {
            let (index, _) = batch.schema_ref().column_with_name(field.name())?;
            Some(batch.column(index).clone())
        });
        let columns = columns.collect::<Option<Vec<_>>>();
        let columns = columns.ok_or_else(|| DatasetError::Part("a column is missing".into()))?;
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options).map(Some).map_err(failed)
    }
}

enum Rows {
    Stored(ParquetRecordBatchReader),
    Shuffled { decoded: Vec<RecordBatch>, places: Vec<(usize, usize)>, at: usize },
}

/// Runs where a thread may be kept busy.
async fn work<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DatasetError> + Send + 'static,
) -> Result<T, DatasetError> {
    // The semaphore is never closed.
    let permit = DECODERS.clone().acquire_owned().await.ok();
    let worked = tokio::task::spawn_blocking(move || {
        let worked = work();
        drop(permit);
        worked
    });
    worked.await.map_err(|error| DatasetError::Part(error.to_string()))?
}

/// Batches of a dataset as they are decoded. Dropping it ends the work behind it.
pub struct Batches {
    pub schema: SchemaRef,
    batches: mpsc::Receiver<Answer>,
    _tasks: JoinSet<()>,
}

impl Stream for Batches {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.batches.poll_recv(context)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): orders must stay the same for as long as datasets do, so the generator is ours.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn shuffle<T>(&mut self, places: &mut [T]) {
        for last in (1..places.len()).rev() {
            let other = ((u128::from(self.next()) * (last as u128 + 1)) >> 64) as usize;
            places.swap(last, other);
        }
    }
}
