//! The execution plan: takes the spine, in slices where it must, reads every source for it, and answers in the spine's
//! order.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs::File;
use std::io::BufWriter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, UInt8Array, new_empty_array};
use arrow::compute::{concat_batches, nullif};
use arrow::datatypes::{Int64Type, SchemaRef, TimestampMicrosecondType, UInt64Type};
use datafusion::common::internal_err;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PhysicalExpr, PlanProperties,
};
use feature_defs::plan::{KeyPart, ServiceInput, SourcePlan, ViewAnswer};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use futures::stream::{self, StreamExt, TryStreamExt};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding};
use parquet::file::properties::{EnabledStatistics, WriterProperties};

use super::by_row::{Applied, ByRow};
use super::files::{Files, Location};
use super::index::SpineIndex;
use super::scan::{Scan, external, position_columns as stream_positions};
use super::spill::SpillFile;
use super::{EVENT_TIMESTAMP, PitJoin, Read, SourceReport, node, not_answered_column, position_columns};

/// Rows of one output batch.
const BATCH_ROWS: usize = 32 << 10;

/// Batches that wait for a reader; more are not begun.
const BATCHES_AHEAD: usize = 2;

/// A slice of the spine smaller than this is not worth reading all sources for.
const SLICE_ROWS_MIN: usize = if cfg!(test) { 8 } else { 1_024 };

#[derive(Debug)]
pub struct PitJoinExec {
    join: Arc<PitJoin>,
    children: Vec<Arc<dyn ExecutionPlan>>,
    properties: Arc<PlanProperties>,
}

impl PitJoinExec {
    pub fn try_new(join: Arc<PitJoin>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<PitJoinExec> {
        if children.len() != join.plans() + 1 {
            return internal_err!("a point-in-time join of {} scans has {} inputs", join.plans(), children.len());
        }
        let schema = Arc::new(node::output_schema(&join, &children[0].schema()));
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Final,
            Boundedness::Bounded,
        ));
        Ok(PitJoinExec { join, children, properties })
    }
}

impl DisplayAs for PitJoinExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strategy = if self.join.as_known { "row by row" } else { "spine scatter" };
        write!(f, "PitJoinExec: service={}, strategy={strategy}", self.join.service.name)?;
        for (source, read) in self.join.sources.iter().zip(&self.join.reads) {
            match read {
                Read::Files(files) => {
                    let storage = if files.sorted { "sorted storage" } else { "files" };
                    let (rows, units) = (files.rows(), files.units().len());
                    write!(f, ", {}={storage} of {rows} rows in {units} row groups", source.name)?;
                }
                Read::Plan(_) => write!(f, ", {}=written down first", source.name)?,
            }
        }
        Ok(())
    }
}

impl ExecutionPlan for PitJoinExec {
    fn name(&self) -> &str {
        "PitJoinExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        self.children.iter().collect()
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    /// The spine's order is the answer's order, so nobody may deal its batches out.
    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false; self.children.len()]
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(PitJoinExec::try_new(self.join.clone(), children)?))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        if partition != 0 {
            return internal_err!("PitJoinExec has one partition, not {}", partition + 1);
        }
        let spine = self.children[0].clone();
        if spine.properties().partitioning.partition_count() != 1 {
            return internal_err!("the spine of a point-in-time join must come in one partition, in its own order");
        }
        let memory = MemoryConsumer::new("PitJoinExec").register(context.memory_pool());
        let (join, plans, schema) = (self.join.clone(), self.children[1..].to_vec(), self.schema());
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<RecordBatch>>(BATCHES_AHEAD);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = async move {
            let batches: Vec<RecordBatch> = spine.execute(0, context.clone())?.try_collect().await?;
            let spine = concat_batches(&spine.schema(), &batches)?;
            drop(batches);
            let mut files: Vec<Arc<Files>> = Vec::with_capacity(join.sources.len());
            let mut written: Vec<SpillFile> = Vec::new();
            for (source, read) in join.sources.iter().zip(&join.reads) {
                files.push(match read {
                    Read::Files(files) => files.clone(),
                    Read::Plan(plan) => {
                        let (opened, file) = write_down(&join, source, plans[*plan].clone(), &context).await?;
                        written.push(file);
                        Arc::new(opened)
                    }
                });
            }
            let runtime = tokio::runtime::Handle::current();
            let run = move || {
                let _written = written;
                Run { join: &join, spine: &spine, files: &files, memory, runtime, stop: &stopped }.all(&sender)
            };
            match tokio::task::spawn_blocking(run).await {
                Ok(done) => done,
                Err(error) => Err(DataFusionError::External(Box::new(error))),
            }
        };
        // The work begins when the first batch is asked for, runs beside whoever reads, and stops when nobody does.
        let guard = StopOnDrop(stop);
        let begun = stream::once(async move {
            let _guard = guard;
            let work = tokio::spawn(work);
            let batches = tokio_stream::wrappers::ReceiverStream::new(receiver);
            let end = stream::once(async move {
                match work.await {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(Err(error)),
                    Err(error) => Some(Err(DataFusionError::External(Box::new(error)))),
                }
            });
            let end = end.filter_map(std::future::ready);
            // The guard goes with the batches.
            batches.chain(end).map(move |batch| {
                let _ = &_guard;
                batch
            })
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, begun.flatten())))
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes the rows of a source that is no Parquet file as one, so that every source is read the same way.
async fn write_down(
    join: &PitJoin,
    source: &Arc<SourcePlan>,
    plan: Arc<dyn ExecutionPlan>,
    context: &Arc<TaskContext>,
) -> Result<(Files, SpillFile)> {
    const ROW_GROUP_ROWS: usize = 256 << 10;
    let what = format!("the rows of source `{}`", source.name);
    let file = join.spill.file(&what)?;
    let full = |error: &dyn fmt::Display| join.spill.full(&what, error);
    let out = BufWriter::new(File::create(file.path()).map_err(|error| full(&error))?);
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_dictionary_enabled(false)
        .set_encoding(Encoding::PLAIN)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .build();
    let mut writer = ArrowWriter::try_new(out, plan.schema(), Some(properties))?;
    for partition in 0..plan.properties().partitioning.partition_count() {
        let mut batches = plan.execute(partition, context.clone())?;
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            writer.write(&batch).map_err(|error| full(&error))?;
        }
    }
    let mut out = writer.into_inner().map_err(|error| full(&error))?;
    std::io::Write::flush(&mut out).map_err(|error| full(&error))?;
    let size = std::fs::metadata(file.path()).map_err(|error| full(&error))?.len();
    let path = object_store::path::Path::from_absolute_path(file.path()).map_err(external)?;
    let store = Arc::new(object_store::local::LocalFileSystem::new());
    let shown = format!("what was written down of source `{}`", source.name);
    Ok((Files::open(vec![Location { store, path, size, shown }]).await?, file))
}

/// What two inputs share an index by: their key columns, and what they are about where some of it was forgotten.
type IndexedBy<'a> = (&'a [usize], Option<&'a [KeyPart]>);

/// One run of a point-in-time join.
struct Run<'a> {
    join: &'a PitJoin,
    spine: &'a RecordBatch,
    files: &'a [Arc<Files>],
    memory: MemoryReservation,
    runtime: tokio::runtime::Handle,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    fn all(&self, sender: &tokio::sync::mpsc::Sender<Result<RecordBatch>>) -> Result<()> {
        let rows = self.spine.num_rows();
        self.memory.try_grow(self.spine.get_array_memory_size())?;
        let slice_rows = self.slice_rows(rows)?;
        let mut reports: Vec<SourceReport> = Vec::new();
        let mut start = 0;
        loop {
            let length = slice_rows.min(rows - start);
            let slice = self.spine.slice(start, length);
            let held = self.memory.size();
            let (batch, found) = self.slice(&slice)?;
            add_reports(&mut reports, found);
            let starts = (0..length.max(1)).step_by(BATCH_ROWS);
            for at in starts {
                if sender.blocking_send(Ok(batch.slice(at, BATCH_ROWS.min(length - at)))).is_err() {
                    return Ok(());
                }
            }
            drop(batch);
            self.memory.shrink(self.memory.size().saturating_sub(held));
            start += length;
            if start >= rows {
                break;
            }
        }
        // Whoever asks twice gets the first answer.
        let _ = self.join.report.set(reports);
        Ok(())
    }

    /// How many spine rows are worked on at a time: all of them where memory allows.
    fn slice_rows(&self, rows: usize) -> Result<usize> {
        let key_bytes = 16;
        let mut per_row = SpineIndex::bytes_of(1, key_bytes) * self.distinct_keys();
        let mut reading = 0;
        let mut largest = 0;
        for ((input, used), read) in self.join.service.inputs.iter().zip(&self.join.used).zip(self.reads_of_inputs()) {
            let features = input.view.features();
            let width: usize = used.features.iter().map(|feature| width(features[*feature].1)).sum();
            per_row += width + 2 + if used.event_time { 16 } else { 0 };
            // While one input is answered: candidates or windows, and the answers once more before they are in order.
            largest = largest.max(40 + 2 * width);
            reading = reading.max(read.unit_bytes(&input.view.source_columns()));
        }
        let budget = self.join.memory_bytes.saturating_sub(self.memory.size()).saturating_sub(reading * self.threads());
        let fit = budget / (per_row + largest).max(1);
        if fit >= rows {
            return Ok(rows.max(1));
        }
        if fit < SLICE_ROWS_MIN {
            return Err(DataFusionError::ResourcesExhausted(format!(
                "a slice of {SLICE_ROWS_MIN} spine rows takes about {} KiB, and reading takes {} KiB beside it; at least {} \
                 MiB are needed",
                ((per_row + largest) * SLICE_ROWS_MIN) >> 10,
                reading >> 10,
                (((per_row + largest) * SLICE_ROWS_MIN + reading + self.memory.size()) >> 20) + 1,
            )));
        }
        // Slices of one size: the last is not a leftover for which everything is read once more.
        Ok(rows.div_ceil(rows.div_ceil(fit)))
    }

    fn threads(&self) -> usize {
        self.join.threads.max(1)
    }

    fn distinct_keys(&self) -> usize {
        let mut keys: Vec<&[usize]> = self.join.service.inputs.iter().map(|input| input.keys.as_slice()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.len()
    }

    fn reads_of_inputs(&self) -> impl Iterator<Item = &Arc<Files>> {
        self.join.service.inputs.iter().filter_map(|input| {
            let source = self.join.sources.iter().position(|source| Arc::ptr_eq(source, &input.view.source))?;
            self.files.get(source)
        })
    }

    /// Answers a slice of the spine.
    fn slice(&self, spine: &RecordBatch) -> Result<(RecordBatch, Vec<SourceReport>)> {
        let service = &self.join.service;
        let times = spine_times(spine)?;
        // Inputs with the same key columns share an index: an entity is looked up once for all its views.
        let mut indexes: HashMap<IndexedBy<'_>, Arc<SpineIndex>> = HashMap::new();
        let mut indexed_by: Vec<IndexedBy<'_>> = Vec::with_capacity(service.inputs.len());
        for input in &service.inputs {
            let mut keys = self.spine_keys(input, spine)?;
            // A key that was forgotten matches nothing, as if it were null. What was forgotten depends on the entity, so
            // such an index is only shared by views that are about the same.
            let list = input.view.forgotten.get();
            let hidden = list.and_then(|list| input.view.hidden(&list, &keys, spine.num_rows()));
            let by = (input.keys.as_slice(), hidden.is_some().then_some(input.view.about.as_slice()));
            indexed_by.push(by);
            if let Entry::Vacant(vacant) = indexes.entry(by) {
                if let (Some(hidden), Some((first, _))) = (hidden, keys.first_mut()) {
                    *first = nullif(first, &BooleanArray::from(hidden))?;
                }
                let making = SpineIndex::bytes_of(spine.num_rows(), 0);
                self.memory.try_grow(making)?;
                let index = SpineIndex::new(&keys, &times);
                self.memory.shrink(making);
                self.memory.try_grow(index.bytes())?;
                vacant.insert(Arc::new(index));
            }
        }
        let mut answers: Vec<Option<ViewAnswer>> = vec![None; service.inputs.len()];
        let mut reports = Vec::with_capacity(self.join.sources.len());
        for (source, files) in self.join.sources.iter().zip(self.files) {
            let numbers: Vec<usize> =
                (0..service.inputs.len()).filter(|i| Arc::ptr_eq(&service.inputs[*i].view.source, source)).collect();
            let inputs: Vec<(&ServiceInput, Arc<SpineIndex>)> =
                numbers.iter().map(|i| (&service.inputs[*i], indexes[&indexed_by[*i]].clone())).collect();
            let held = self.memory.size();
            let (found, report) = if self.join.as_known {
                self.row_by_row(source, files, &inputs, spine)?
            } else {
                let free = self.join.memory_bytes.saturating_sub(self.memory.size());
                let scan = Scan {
                    source,
                    files,
                    rule: self.join.rule(source),
                    inputs,
                    spine_rows: spine.num_rows(),
                    threads: self.threads(),
                    runtime: &self.runtime,
                    stop: self.stop,
                    memory: &self.memory,
                    event_times: numbers.iter().map(|number| self.join.used[*number].event_time).collect(),
                    ties_bytes: free / 4,
                    spill: &self.join.spill,
                };
                scan.run()?
            };
            self.memory.shrink(self.memory.size().saturating_sub(held));
            for (number, mut answer) in numbers.into_iter().zip(found) {
                let used = &self.join.used[number];
                // What the service does not read is let go.
                for feature in (0..answer.values.len()).filter(|feature| !used.features.contains(feature)) {
                    answer.values[feature] = new_empty_array(answer.values[feature].data_type());
                }
                if !used.event_time {
                    answer.event_times = Vec::new();
                }
                let bytes: usize = answer.values.iter().map(|column| column.get_array_memory_size()).sum();
                self.memory.try_grow(bytes + answer.statuses.len() + answer.event_times.len() * 16)?;
                answers[number] = Some(answer);
            }
            reports.push(report);
        }
        let mut columns: Vec<ArrayRef> = spine.columns().to_vec();
        for (answer, used) in answers.into_iter().zip(&self.join.used) {
            let Some(answer) = answer else { return internal_err!("an input was not answered") };
            columns.extend(used.features.iter().map(|feature| answer.values[*feature].clone()));
            columns.push(Arc::new(answer.statuses.iter().map(|status| Some(*status as u8)).collect::<UInt8Array>()));
            if used.event_time {
                columns.push(Arc::new(Int64Array::from(answer.event_times)));
            }
        }
        let schema: SchemaRef = Arc::new(node::output_schema(self.join, &spine.schema()));
        Ok((RecordBatch::try_new(schema, columns)?, reports))
    }

    fn spine_keys<'k>(&'k self, input: &ServiceInput, spine: &RecordBatch) -> Result<Vec<(ArrayRef, &'k Type)>> {
        let keys = input.keys.iter().map(|key| {
            let column = &self.join.service.columns[*key];
            match spine.column_by_name(&column.name) {
                Some(array) => Ok((array.clone(), &column.column_type)),
                None => internal_err!("the spine has no `{}`", column.name),
            }
        });
        keys.collect()
    }

    /// Every spine row sees its own prefix of the log.
    fn row_by_row(
        &self,
        source: &Arc<SourcePlan>,
        files: &Files,
        inputs: &[(&ServiceInput, Arc<SpineIndex>)],
        spine: &RecordBatch,
    ) -> Result<(Vec<ViewAnswer>, SourceReport)> {
        let rule = self.join.rule(source);
        let mut collectors: Vec<ByRow<'_>> =
            inputs.iter().map(|(input, index)| ByRow::new(&input.view, rule, index)).collect();
        let mut columns: Vec<String> = inputs.iter().flat_map(|(input, _)| input.view.source_columns()).collect();
        if source.is_stream() {
            columns.extend([crate::history::POSITION_TIME.to_owned(), crate::history::SEQUENCE.to_owned()]);
        }
        let (mut read, mut accounted) = (0, 0);
        for unit in 0..files.units().len() {
            for batch in files.read(unit, &columns, None, &self.runtime)? {
                let batch = batch?;
                read += batch.num_rows() as u64;
                let positions: Option<Vec<Position>> = if source.is_stream() {
                    let (times, sequences) = stream_positions(&batch)?;
                    let (times, sequences) =
                        (times.as_primitive::<Int64Type>().clone(), sequences.as_primitive::<UInt64Type>().clone());
                    let both = times.values().iter().zip(sequences.values());
                    Some(both.map(|(time, sequence)| Position { time: *time, sequence: *sequence }).collect())
                } else {
                    None
                };
                let aligned = source.align(&batch, Some(&columns)).map_err(external)?;
                let row_times = source.times(&aligned, positions.as_deref()).map_err(external)?;
                let mut groups = Vec::new();
                for ((input, index), collector) in inputs.iter().zip(&mut collectors) {
                    let keys = input.view.key_columns(&aligned).map_err(external)?;
                    index.groups_of(&keys, aligned.num_rows(), &mut groups);
                    collector.add(&input.view.rows(&aligned, &row_times).map_err(external)?, &groups);
                }
                let now: usize = collectors.iter().map(ByRow::bytes).sum();
                self.memory.try_grow(now.saturating_sub(accounted))?;
                accounted = accounted.max(now);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(DataFusionError::Execution("the reader has gone".into()));
            }
        }
        let answers = inputs.iter().zip(collectors).map(|((input, index), collector)| {
            Ok(collector.finish(index, spine.num_rows(), &applied_positions(spine, &input.alias)?))
        });
        let answers: Result<Vec<ViewAnswer>> = answers.collect();
        Ok((
            answers?,
            SourceReport { source: source.name.to_string(), rows: read, enforced: true, ..Default::default() },
        ))
    }
}

fn add_reports(reports: &mut Vec<SourceReport>, more: Vec<SourceReport>) {
    if reports.is_empty() {
        *reports = more;
        return;
    }
    for (report, more) in reports.iter_mut().zip(more) {
        // Each slice read the whole source; a row may be hidden from several slices and is then counted in each.
        report.hidden += more.hidden;
        report.hidden_by_created_time += more.hidden_by_created_time;
        report.hidden_by_delay += more.hidden_by_delay;
        report.hidden_by_every += more.hidden_by_every;
        report.hidden_by_arrival += more.hidden_by_arrival;
    }
}

/// Bytes of one value, about.
fn width(value_type: &Type) -> usize {
    match value_type {
        Type::Bool => 1,
        Type::Int32 | Type::Float32 | Type::Date => 5,
        Type::Int64 | Type::Float64 | Type::Timestamp => 9,
        Type::Decimal { .. } => 17,
        Type::String | Type::Binary => 32,
        Type::Vector(n) => *n as usize * 4 + 1,
        Type::List(_) | Type::Map(_) | Type::Struct(_) => 128,
    }
}

fn spine_times(spine: &RecordBatch) -> Result<Vec<Micros>> {
    let Some(column) = spine.column_by_name(EVENT_TIMESTAMP) else {
        return internal_err!("the spine has no `{EVENT_TIMESTAMP}`");
    };
    let Some(times) = column.as_primitive_opt::<TimestampMicrosecondType>() else {
        return internal_err!("`{EVENT_TIMESTAMP}` is {}", column.data_type());
    };
    Ok(times.values().to_vec())
}

/// What of an input's events each spine row may see. A position that is null says that nothing had been applied.
fn applied_positions(spine: &RecordBatch, alias: &str) -> Result<Vec<Applied>> {
    let (time, sequence) = position_columns(alias);
    let times = spine.column_by_name(&time).and_then(|column| column.as_primitive_opt::<Int64Type>());
    let sequences = spine.column_by_name(&sequence).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let (Some(times), Some(sequences)) = (times, sequences) else {
        return internal_err!("the spine has no positions for `{alias}`");
    };
    let not_answered = spine.column_by_name(&not_answered_column(alias)).and_then(|column| column.as_boolean_opt());
    let applied = (0..spine.num_rows()).map(|row| {
        if not_answered.is_some_and(|rows| rows.is_valid(row) && rows.value(row)) {
            Applied::NotAnswered
        } else if times.is_null(row) || sequences.is_null(row) {
            Applied::Nothing
        } else {
            Applied::UpTo(Position { time: times.value(row), sequence: sequences.value(row) })
        }
    });
    Ok(applied.collect())
}

/// The answers in an output batch, by input of the service; features that the service does not read are empty columns.
pub fn answers(join: &PitJoin, batch: &RecordBatch) -> Result<Vec<ViewAnswer>> {
    let widths = join.used.iter().map(|used| used.features.len() + 1 + usize::from(used.event_time));
    let mut at = batch.num_columns() - widths.sum::<usize>();
    let mut answers = Vec::with_capacity(join.service.inputs.len());
    for (input, used) in join.service.inputs.iter().zip(&join.used) {
        let mut values: Vec<ArrayRef> =
            input.view.features().iter().map(|(_, feature_type, _)| new_empty_array(&feature_type.arrow())).collect();
        for feature in &used.features {
            values[*feature] = batch.column(at).clone();
            at += 1;
        }
        let statuses = batch.column(at).as_primitive::<arrow::datatypes::UInt8Type>();
        let statuses: Option<Vec<_>> =
            statuses.values().iter().map(|number| feature_defs::time::Status::from_number(*number)).collect();
        let Some(statuses) = statuses else { return internal_err!("a status is no status") };
        at += 1;
        let mut event_times = Vec::new();
        if used.event_time {
            event_times = batch.column(at).as_primitive::<Int64Type>().iter().collect();
            at += 1;
        }
        answers.push(ViewAnswer { values, statuses, event_times });
    }
    Ok(answers)
}
