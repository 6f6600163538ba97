//! The execution plan: reads the spine, indexes it, reads every source once, and answers in the spine's order.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, UInt8Array, UInt64Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{Int64Type, SchemaRef, TimestampMicrosecondType, UInt64Type};
use arrow::error::ArrowError;
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
use feature_defs::plan::{ServiceInput, ViewAnswer, ViewPlanKind, ViewRows, encode_entity_keys};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::index::SpineIndex;
use super::latest::{Latest, LatestByRow};
use super::windows::Windows;
use super::{EVENT_TIMESTAMP, PitJoin, node, position_columns};
use crate::history::{POSITION_TIME, SEQUENCE};

/// Rows of one output batch.
const BATCH_ROWS: usize = 8_192;

#[derive(Debug)]
pub struct PitJoinExec {
    join: Arc<PitJoin>,
    children: Vec<Arc<dyn ExecutionPlan>>,
    properties: Arc<PlanProperties>,
}

impl PitJoinExec {
    pub fn try_new(join: Arc<PitJoin>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<PitJoinExec> {
        if children.len() != join.sources.len() + 1 {
            return internal_err!(
                "a point-in-time join of {} sources has {} inputs",
                join.sources.len(),
                children.len()
            );
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
        write!(f, "PitJoinExec: service={}, strategy={strategy}", self.join.service.name)
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
        let reservation = MemoryConsumer::new("PitJoinExec").register(context.memory_pool());
        let (join, sources, schema) = (self.join.clone(), self.children[1..].to_vec(), self.schema());
        let answered = async move {
            let batches: Vec<RecordBatch> = spine.execute(0, context.clone())?.try_collect().await?;
            let spine = concat_batches(&spine.schema(), &batches)?;
            drop(batches);
            run(join, spine, sources, context, reservation).await
        };
        let batches = stream::once(answered).map_ok(|batch| {
            let starts = (0..batch.num_rows().max(1)).step_by(BATCH_ROWS);
            let slices: Vec<Result<RecordBatch>> =
                starts.map(|start| Ok(batch.slice(start, BATCH_ROWS.min(batch.num_rows() - start)))).collect();
            stream::iter(slices)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, batches.try_flatten())))
    }
}

/// The state of one input of the service while sources are read.
enum Collector<'p> {
    Latest(Latest),
    LatestByRow(LatestByRow),
    Windows(Windows<'p>),
}

async fn run(
    join: Arc<PitJoin>,
    spine: RecordBatch,
    sources: Vec<Arc<dyn ExecutionPlan>>,
    context: Arc<TaskContext>,
    reservation: MemoryReservation,
) -> Result<RecordBatch> {
    let service = &join.service;
    reservation.try_grow(spine.get_array_memory_size())?;
    let times = spine_times(&spine)?;

    // Inputs with the same key columns share an index: an entity is looked up once for all its views.
    let mut indexes: HashMap<Vec<usize>, Arc<SpineIndex>> = HashMap::new();
    for input in &service.inputs {
        if !indexes.contains_key(&input.keys) {
            let index = SpineIndex::new(&spine_keys(&join, input, &spine)?, &times);
            reservation.try_grow(index.bytes())?;
            indexes.insert(input.keys.clone(), Arc::new(index));
        }
    }
    let index_of = |input: &ServiceInput| indexes[&input.keys].clone();

    let mut collectors: Vec<Collector<'_>> = service
        .inputs
        .iter()
        .map(|input| {
            let (view, index) = (&input.view, index_of(input));
            let rule = join.rule(&view.source);
            match &view.kind {
                ViewPlanKind::AsOf { max_age, .. } if join.as_known => {
                    Collector::LatestByRow(LatestByRow::new(view, *max_age, rule, &index))
                }
                ViewPlanKind::AsOf { max_age, .. } => Collector::Latest(Latest::new(view, *max_age, rule, &index)),
                ViewPlanKind::Windowed { aggregates, outputs, windows, .. } => {
                    Collector::Windows(Windows::new(aggregates, outputs, windows, view.row_types(), rule, &index))
                }
            }
        })
        .collect();
    let mut collected = 0;
    for (source, plan) in join.sources.iter().zip(&sources) {
        let partitions = plan.properties().partitioning.partition_count();
        let streams: Vec<SendableRecordBatchStream> =
            (0..partitions).map(|partition| plan.execute(partition, context.clone())).collect::<Result<_>>()?;
        let mut batches = stream::select_all(streams);
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            let positions = source.is_stream().then(|| positions(&batch)).transpose()?;
            let columns: Vec<String> = service
                .inputs
                .iter()
                .filter(|input| Arc::ptr_eq(&input.view.source, source))
                .flat_map(|input| input.view.source_columns())
                .collect();
            let aligned = source.align(&batch, Some(&columns)).map_err(external)?;
            let row_times = source.times(&aligned, positions.as_deref()).map_err(external)?;
            // A view read under two aliases is evaluated once.
            let mut evaluated: HashMap<*const feature_defs::plan::ViewPlan, ViewRows> = HashMap::new();
            for (input, collector) in service.inputs.iter().zip(&mut collectors) {
                if !Arc::ptr_eq(&input.view.source, source) {
                    continue;
                }
                let view = Arc::as_ptr(&input.view);
                if let std::collections::hash_map::Entry::Vacant(vacant) = evaluated.entry(view) {
                    vacant.insert(input.view.rows(&aligned, &row_times).map_err(external)?);
                }
                let (rows, index) = (&evaluated[&view], index_of(input));
                match collector {
                    Collector::Latest(latest) => latest.add(rows, &index)?,
                    Collector::LatestByRow(latest) => latest.add(rows, &index),
                    Collector::Windows(windows) => windows.add(rows, &index),
                }
            }
            let now: usize = collectors
                .iter()
                .map(|collector| match collector {
                    Collector::Latest(latest) => latest.bytes(),
                    Collector::LatestByRow(latest) => latest.bytes(),
                    Collector::Windows(windows) => windows.bytes(),
                })
                .sum();
            reservation.try_grow(now.saturating_sub(collected))?;
            collected = collected.max(now);
        }
    }

    let rows = spine.num_rows();
    let mut columns: Vec<ArrayRef> = spine.columns().to_vec();
    for (input, collector) in service.inputs.iter().zip(collectors) {
        let index = index_of(input);
        let applied = if join.as_known { Some(applied_positions(&spine, &input.alias)?) } else { None };
        let answer = match collector {
            Collector::Latest(latest) => latest.finish(&index, rows)?,
            Collector::LatestByRow(latest) => latest.finish(&index, rows, applied.as_deref()),
            Collector::Windows(windows) => windows.finish(&index, rows, applied.as_deref()),
        };
        reservation.try_grow(answer.values.iter().map(|column| column.get_array_memory_size()).sum())?;
        columns.extend(answer.values);
        columns.push(Arc::new(answer.statuses.iter().map(|status| Some(*status as u8)).collect::<UInt8Array>()));
        columns.push(Arc::new(Int64Array::from(answer.event_times)));
    }
    let schema: SchemaRef = Arc::new(node::output_schema(&join, &spine.schema()));
    Ok(RecordBatch::try_new(schema, columns)?)
}

fn external(error: impl std::error::Error + Send + Sync + 'static) -> DataFusionError {
    DataFusionError::External(Box::new(error))
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

fn spine_keys(join: &PitJoin, input: &ServiceInput, spine: &RecordBatch) -> Result<feature_defs::plan::EntityKeys> {
    let columns: Vec<(ArrayRef, &Type)> = input
        .keys
        .iter()
        .map(|key| {
            let column = &join.service.columns[*key];
            match spine.column_by_name(&column.name) {
                Some(array) => Ok((array.clone(), &column.column_type)),
                None => internal_err!("the spine has no `{}`", column.name),
            }
        })
        .collect::<Result<_>>()?;
    Ok(encode_entity_keys(&columns, spine.num_rows()))
}

fn positions(batch: &RecordBatch) -> Result<Vec<Position>> {
    let missing = || ArrowError::SchemaError("a history file has no position columns".into());
    let times =
        batch.column_by_name(POSITION_TIME).and_then(|c| c.as_primitive_opt::<Int64Type>()).ok_or_else(missing)?;
    let sequences =
        batch.column_by_name(SEQUENCE).and_then(|c| c.as_primitive_opt::<UInt64Type>()).ok_or_else(missing)?;
    Ok(times
        .values()
        .iter()
        .zip(sequences.values())
        .map(|(time, sequence)| Position { time: *time, sequence: *sequence })
        .collect())
}

fn applied_positions(spine: &RecordBatch, alias: &str) -> Result<Vec<Position>> {
    let (time, sequence) = position_columns(alias);
    let times = spine.column_by_name(&time).and_then(|column| column.as_primitive_opt::<Int64Type>());
    let sequences: Option<&UInt64Array> = spine.column_by_name(&sequence).and_then(|column| column.as_primitive_opt());
    let (Some(times), Some(sequences)) = (times, sequences) else {
        return internal_err!("the spine has no positions for `{alias}`");
    };
    Ok((0..spine.num_rows()).map(|row| Position { time: times.value(row), sequence: sequences.value(row) }).collect())
}

/// The answers in an output batch, by input of the service.
pub fn answers(join: &PitJoin, batch: &RecordBatch) -> Result<Vec<ViewAnswer>> {
    let mut at = batch.num_columns() - join.service.inputs.iter().map(|i| i.view.features().len() + 2).sum::<usize>();
    let mut answers = Vec::with_capacity(join.service.inputs.len());
    for input in &join.service.inputs {
        let features = input.view.features().len();
        let values = batch.columns()[at..at + features].to_vec();
        let statuses = batch.column(at + features).as_primitive::<arrow::datatypes::UInt8Type>();
        let event_times = batch.column(at + features + 1).as_primitive::<Int64Type>();
        let statuses: Option<Vec<_>> =
            statuses.values().iter().map(|number| feature_defs::time::Status::from_number(*number)).collect();
        let Some(statuses) = statuses else { return internal_err!("a status is no status") };
        answers.push(ViewAnswer { values, statuses, event_times: event_times.iter().collect() });
        at += features + 2;
    }
    Ok(answers)
}
