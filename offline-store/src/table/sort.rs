//! Sorting more rows than fit into memory: DataFusion's sort, which spills, and its merge, over streams of ours.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::RecordBatch;
use arrow::compute::SortOptions;
use arrow::datatypes::SchemaRef;
use datafusion::error::DataFusionError;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::GreedyMemoryPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{LexOrdering, PhysicalSortExpr};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::sorts::sort_preserving_merge::SortPreservingMergeExec;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use datafusion::physical_plan::union::UnionExec;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::TableError;

/// What a piece of work on tables may use.
#[derive(Debug, Clone)]
pub struct Work {
    /// Rows that are being sorted; what does not fit goes to disk.
    pub memory_bytes: usize,
    /// Where it goes; None: where the system keeps temporary files.
    pub spill_folder: Option<PathBuf>,
    /// Rows that a bucket should have.
    pub bucket_rows: u64,
}

/// A few row groups, and few enough that a table of some size is read by all cores.
const BUCKET_ROWS: u64 = 1 << 20;

impl Default for Work {
    fn default() -> Work {
        Work { memory_bytes: 256 << 20, spill_folder: None, bucket_rows: BUCKET_ROWS }
    }
}

pub(crate) type Batches = BoxStream<'static, Result<RecordBatch, TableError>>;

/// Rows on their way into a sort.
pub(crate) enum Input {
    Unsorted(Batches),
    /// In the order asked for already: merged only.
    Sorted(Batches),
}

/// All rows, sorted by these columns, nulls first.
pub(crate) fn sorted(
    source_name: &str,
    schema: &SchemaRef,
    inputs: Vec<Input>,
    by: &[String],
    work: &Work,
) -> Result<Batches, TableError> {
    let name = source_name.to_owned();
    let failed = |error: DataFusionError| unwrap(error, source_name, work);
    let stream = plan(schema, inputs, by, work).map_err(failed)?;
    let work = work.clone();
    Ok(stream.map(move |batch| batch.map_err(|error| unwrap(error, &name, &work))).boxed())
}

fn plan(
    schema: &SchemaRef,
    inputs: Vec<Input>,
    by: &[String],
    work: &Work,
) -> Result<SendableRecordBatchStream, DataFusionError> {
    let mut columns = Vec::new();
    for name in by {
        let options = SortOptions { descending: false, nulls_first: true };
        columns.push(PhysicalSortExpr { expr: Arc::new(Column::new_with_schema(name, schema)?), options });
    }
    let Some(order) = LexOrdering::new(columns) else {
        return Err(DataFusionError::Internal("rows are sorted by some column".into()));
    };
    let leaf = |streams: Vec<Batches>| {
        let partitions: Vec<Arc<dyn PartitionStream>> = streams
            .into_iter()
            .map(|stream| {
                Arc::new(Once { schema: schema.clone(), stream: Mutex::new(Some(stream)) }) as Arc<dyn PartitionStream>
            })
            .collect();
        let leaf = StreamingTableExec::try_new(schema.clone(), partitions, None, [], false, None)?;
        Ok::<_, DataFusionError>(Arc::new(leaf) as Arc<dyn ExecutionPlan>)
    };
    let (mut loose, mut merged) = (Vec::new(), Vec::new());
    for input in inputs {
        match input {
            Input::Unsorted(stream) => loose.push(stream),
            Input::Sorted(stream) => merged.push(stream),
        }
    }
    let mut plans: Vec<Arc<dyn ExecutionPlan>> = Vec::new();
    if !loose.is_empty() {
        plans.push(Arc::new(SortExec::new(order.clone(), leaf(loose)?).with_preserve_partitioning(true)));
    }
    if !merged.is_empty() {
        plans.push(leaf(merged)?);
    }
    let whole = match plans.len() {
        0 => return Ok(Box::pin(RecordBatchStreamAdapter::new(schema.clone(), futures::stream::empty()))),
        1 => plans.remove(0),
        _ => UnionExec::try_new(plans)?,
    };
    let whole = SortPreservingMergeExec::new(order, whole);
    whole.execute(0, context(work)?)
}

fn context(work: &Work) -> Result<Arc<TaskContext>, DataFusionError> {
    let mode = match &work.spill_folder {
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            DiskManagerMode::Directories(vec![folder.clone()])
        }
        None => DiskManagerMode::OsTmpDirectory,
    };
    let runtime = RuntimeEnvBuilder::new()
        .with_memory_pool(Arc::new(GreedyMemoryPool::new(work.memory_bytes)))
        .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(mode))
        .build_arc()?;
    let mut config = SessionConfig::new().with_target_partitions(1);
    // Kept aside for the merge of what was spilled; the default is made for pools of gigabytes.
    config.options_mut().execution.sort_spill_reservation_bytes = (work.memory_bytes / 8).min(10 << 20);
    Ok(SessionContext::new_with_config_rt(config, runtime).task_ctx())
}

/// What went wrong below, or what the sort itself lacked.
fn unwrap(error: DataFusionError, source_name: &str, work: &Work) -> TableError {
    let what = match error.find_root() {
        DataFusionError::ResourcesExhausted(what) => {
            format!("{what}; {} MiB are allowed, which is too few for rows this wide", work.memory_bytes >> 20)
        }
        _ => error.strip_backtrace(),
    };
    match external(error) {
        Some(error) => error,
        None => TableError::Sort { source_name: source_name.to_owned(), what },
    }
}

fn external(error: DataFusionError) -> Option<TableError> {
    match error {
        DataFusionError::External(error) => error.downcast::<TableError>().ok().map(|error| *error),
        DataFusionError::Context(_, error) | DataFusionError::Diagnostic(_, error) => external(*error),
        DataFusionError::Shared(error) => external(Arc::into_inner(error)?),
        _ => None,
    }
}

/// A stream that is read once.
struct Once {
    schema: SchemaRef,
    stream: Mutex<Option<Batches>>,
}

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once").finish_non_exhaustive()
    }
}

impl PartitionStream for Once {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = stream.unwrap_or_else(|| futures::stream::empty().boxed());
        let stream = stream.map(|batch| batch.map_err(|error| DataFusionError::External(Box::new(error))));
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), stream))
    }
}
