//! The floor: nothing that reads these files can be faster than decoding the columns it needs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::Context as _;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use serde::Serialize;

use crate::definitions::{FEATURES, Known, Workload};

/// Rows in one decoded batch. Larger ones leave the processor's caches and are slower.
const BATCH_ROWS: usize = 8192;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Floor {
    /// Of all files together.
    pub rows: u64,
    pub seconds: f64,
}

/// Decodes the columns that the workload needs, row groups dealt to so many threads.
pub fn run(folder: &Path, workload: Workload, known: Known, threads: usize) -> anyhow::Result<Floor> {
    let started = Instant::now();
    let mut files = vec![(folder.join("spine.parquet"), spine_columns(workload))];
    for view in 0..workload.views() {
        files.push((folder.join(format!("view{view}.parquet")), view_columns(workload, known, view)));
    }
    let mut row_groups = Vec::new();
    for (path, columns) in &files {
        let file = open(path)?;
        let metadata = ArrowReaderMetadata::load(&file, ArrowReaderOptions::new())
            .with_context(|| format!("{} cannot be read", path.display()))?;
        let schema = metadata.parquet_schema();
        let mask = ProjectionMask::columns(schema, columns.iter().map(String::as_str));
        let found = (0..schema.num_columns()).filter(|column| mask.leaf_included(*column)).count();
        anyhow::ensure!(found == columns.len(), "{} lacks one of the columns {columns:?}", path.display());
        for row_group in 0..metadata.metadata().num_row_groups() {
            row_groups.push((path, metadata.clone(), mask.clone(), row_group));
        }
    }
    // The spine is one large row group: taken from the end, the others fill the time beside it.
    row_groups.reverse();
    let queue = Mutex::new(row_groups);
    let work = || -> anyhow::Result<u64> {
        let mut rows = 0;
        loop {
            let next = queue.lock().map_err(|_| anyhow::anyhow!("another thread failed"))?.pop();
            let Some((path, metadata, mask, row_group)) = next else { return Ok(rows) };
            let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(open(path)?, metadata)
                .with_row_groups(vec![row_group])
                .with_projection(mask)
                .with_batch_size(BATCH_ROWS)
                .build()?;
            for batch in reader {
                rows += std::hint::black_box(batch?).num_rows() as u64;
            }
        }
    };
    let rows: anyhow::Result<Vec<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined =
            threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?);
        joined.collect()
    });
    Ok(Floor { rows: rows?.iter().sum(), seconds: started.elapsed().as_secs_f64() })
}

fn open(path: &PathBuf) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// A training set carries all columns of its spine.
fn spine_columns(_: Workload) -> Vec<String> {
    ["user_id", "event_timestamp", "label"].map(String::from).to_vec()
}

fn view_columns(workload: Workload, known: Known, view: usize) -> Vec<String> {
    let mut columns: Vec<String> = ["user_id", "event_timestamp"].map(String::from).to_vec();
    if known == Known::Created {
        columns.push("created".into());
    }
    let features = match workload {
        Workload::AsOf { .. } => FEATURES,
        Workload::Windows(_) => 1,
    };
    columns.extend((0..features).map(|feature| format!("v{view}_f{feature}")));
    columns
}
