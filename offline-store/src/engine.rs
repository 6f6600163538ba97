//! The engine: spine in, training set out.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt8Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimestampMicrosecondType, TimestampNanosecondType};
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{GreedyMemoryPool, MemoryPool};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::{SendableRecordBatchStream, SessionStateBuilder};
use datafusion::logical_expr::{Extension, LogicalPlan};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::prelude::{SessionConfig, SessionContext};
use feature_defs::catalog::Visibility;
use feature_defs::digest::Canonical;
use feature_defs::plan::{RequestColumn, ServicePlan, SourceKind, SourcePlan, align_batch};
use feature_defs::value::Type;
use futures::StreamExt;
use object_store::ObjectStore;
use object_store::path::Path;

use crate::history::History;
use crate::point_in_time::files::{Files, Location};
use crate::point_in_time::node::{PitJoinNode, PitQueryPlanner};
use crate::point_in_time::spill::Spill;
use crate::point_in_time::{EVENT_TIMESTAMP, Order, PitJoin, Read, SourceReport, Used, exec, position_columns};
use crate::profile::hidden::Hidden;
use crate::source::{Format, SourceError, Sources};
use crate::table::{Table, TableFile};

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the spine has no column `{column}` ({why}); it has: {known}")]
    MissingColumn { column: String, why: String, known: String },
    #[error("spine column `{column}` is {found}, but {wanted} was expected ({why})")]
    WrongType { column: String, found: String, wanted: String, why: String },
    #[error("spine column `{column}` is null in {count} rows (the first is row {first}), but {why}")]
    Null { column: String, count: usize, first: usize, why: String },
    #[error(
        "spine column `{column}` has nanoseconds beyond whole microseconds in {count} rows (the first is row {first}), \
         and would be cut; round it to microseconds"
    )]
    Nanoseconds { column: String, count: usize, first: usize },
    #[error("spine column `{column}` has the name of a feature; rename it")]
    NameTaken { column: String },
    #[error(
        "this training set does not fit into offline.memory ({limit_mib} MiB): {what}; raise it in coeval.yaml, or ask for fewer rows at a time"
    )]
    Memory { limit_mib: u64, what: String },
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the history of stream `{stream}` could not be read: {what}")]
    History { stream: String, what: String },
    #[error("the engine could not be set up: {0}")]
    Setup(String),
    #[error("the training set could not be computed: {0}")]
    Run(String),
}

pub struct EngineOptions {
    pub project_folder: PathBuf,
    pub project: String,
    /// Where histories are; `prefix` is the store's own root.
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    pub memory_bytes: u64,
    pub spill_folder: Option<PathBuf>,
}

/// Plans and runs point-in-time joins within a memory bound shared by all of them.
pub struct Engine {
    options: EngineOptions,
    runtime: Arc<RuntimeEnv>,
    sources: Sources,
}

pub struct TrainingSetRequest {
    pub service: Arc<ServicePlan>,
    pub spine_schema: SchemaRef,
    pub spine: Vec<RecordBatch>,
    /// Add `<feature>__status` columns.
    pub statuses: bool,
    pub visibility: Option<Visibility>,
    /// Rows are kept by ordinal either way, and come as the spine's; with [`Order::Any`] a reader must not rely on it.
    pub order: Order,
}

/// A training set on its way: the spine's columns, then the features.
pub struct TrainingSet {
    pub schema: SchemaRef,
    pub stream: SendableRecordBatchStream,
    /// What the sources were, by name: for datasets.
    pub sources: Vec<(String, String)>,
    pub explain: String,
    /// What known-at rules hid, by source; there when the stream has ended.
    pub report: Arc<OnceLock<Vec<SourceReport>>>,
}

/// A training set that is to be profiled: behind its own columns, its batches have those that profiles need.
pub struct ProfiledSet {
    pub set: TrainingSet,
    /// Of the batches; the set's own columns come first.
    pub whole_schema: SchemaRef,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("project", &self.options.project).finish_non_exhaustive()
    }
}

impl Engine {
    pub fn new(options: EngineOptions) -> Result<Engine, EngineError> {
        let setup = |error: DataFusionError| EngineError::Setup(error.to_string());
        let memory = usize::try_from(options.memory_bytes).unwrap_or(usize::MAX);
        let mut builder = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(GreedyMemoryPool::new(memory)))
            .with_object_list_cache_limit(0);
        if let Some(folder) = &options.spill_folder {
            std::fs::create_dir_all(folder)
                .map_err(|error| EngineError::Setup(format!("spill folder {}: {error}", folder.display())))?;
            let mode = DiskManagerMode::Directories(vec![folder.clone()]);
            builder = builder.with_disk_manager_builder(DiskManagerBuilder::default().with_mode(mode));
        }
        let runtime = builder.build_arc().map_err(setup)?;
        let store_url = ObjectStoreUrl::parse("coeval://store").map_err(setup)?;
        runtime.register_object_store(store_url.as_ref(), options.store.clone());
        let sources = Sources::with_runtime(&options.project_folder, runtime.clone());
        Ok(Engine { options, runtime, sources })
    }

    /// Reads files of sources, within the engine's memory bound.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Where this project keeps things on the object store.
    pub fn project_path(&self) -> Path {
        self.options.prefix.clone().join(self.options.project.as_str())
    }

    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.options.store
    }

    /// Begins a training set. Everything wrong with the spine is found before the first row is computed.
    pub async fn training_set(&self, request: TrainingSetRequest) -> Result<TrainingSet, EngineError> {
        self.begin(request, None).await.map(|profiled| profiled.set)
    }

    /// Begins a training set that is to be kept, with what its profiles are made of.
    pub async fn profiled_training_set(&self, request: TrainingSetRequest) -> Result<ProfiledSet, EngineError> {
        let hidden = Hidden::of(&request.service);
        self.begin(request, Some(hidden)).await
    }

    async fn begin(&self, request: TrainingSetRequest, hidden: Option<Hidden>) -> Result<ProfiledSet, EngineError> {
        let TrainingSetRequest { service, spine_schema, spine, statuses, visibility, order: _ } = request;
        let as_known = service
            .inputs
            .iter()
            .any(|input| spine_schema.column_with_name(&position_columns(&input.alias).0).is_some());
        let spine = self.check_spine(&service, &spine_schema, &spine)?;
        let mut sources: Vec<Arc<SourcePlan>> = Vec::new();
        for input in &service.inputs {
            if !sources.iter().any(|source| Arc::ptr_eq(source, &input.view.source)) {
                sources.push(input.view.source.clone());
            }
        }

        let mut config = SessionConfig::new();
        config.options_mut().execution.parquet.schema_force_view_types = false;
        let state = SessionStateBuilder::new()
            .with_config(config)
            .with_runtime_env(self.runtime.clone())
            .with_default_features()
            .with_query_planner(Arc::new(PitQueryPlanner))
            .build();
        let context = SessionContext::new_with_state(state);
        let run = |error: DataFusionError| self.explain_failure(error);

        let spine_schema = spine.schema();
        let table = MemTable::try_new(spine_schema.clone(), vec![vec![spine]]).map_err(run)?;
        let mut inputs: Vec<LogicalPlan> =
            vec![context.read_table(Arc::new(table)).map_err(run)?.into_unoptimized_plan()];
        let mut fingerprints = Vec::new();
        let mut reads = Vec::new();
        for source in &sources {
            let mut columns: Vec<String> = Vec::new();
            for input in service.inputs.iter().filter(|input| Arc::ptr_eq(&input.view.source, source)) {
                columns.extend(input.view.source_columns());
            }
            let (read, fingerprint) = self.source_read(source, &columns, &mut inputs).await?;
            reads.push(read);
            fingerprints.push((source.name.to_string(), without_forgotten(&service, source, fingerprint)));
        }
        let report = Arc::default();
        let mut used = Used::by(&service);
        if hidden.is_some() {
            for (used, input) in used.iter_mut().zip(&service.inputs) {
                used.event_time |= !input.view.is_windowed();
            }
        }
        let join = Arc::new(PitJoin {
            service: service.clone(),
            sources,
            reads,
            used,
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: usize::try_from(self.options.memory_bytes).unwrap_or(usize::MAX),
            spill: Spill { folder: self.options.spill_folder.clone().unwrap_or_else(std::env::temp_dir) },
            report: Arc::clone(&report),
            visibility,
            as_known,
        });
        let node = PitJoinNode::try_new(join.clone(), inputs).map_err(run)?;
        let plan = LogicalPlan::Extension(Extension { node: Arc::new(node) });
        let physical = context.state().create_physical_plan(&plan).await.map_err(run)?;
        let explain = datafusion::physical_plan::displayable(physical.as_ref()).indent(false).to_string();
        let found = datafusion::physical_plan::execute_stream(physical, context.task_ctx()).map_err(run)?;

        let mut output = output_fields(&join, &spine_schema, statuses)?;
        let schema = Arc::new(Schema::new(output.clone()));
        for field in hidden.iter().flat_map(|hidden| hidden.fields(&service)) {
            if output.iter().any(|other| other.name() == field.name()) {
                return Err(EngineError::NameTaken { column: field.name().clone() });
            }
            output.push(field);
        }
        let whole_schema = Arc::new(Schema::new(output));
        let limit_mib = self.options.memory_bytes >> 20;
        let stream_schema = whole_schema.clone();
        let stream = found.map(move |batch| {
            let batch = batch.map_err(|error| DataFusionError::External(Box::new(memory_or_run(error, limit_mib))))?;
            finish_batch(&join, &batch, &spine_schema, &stream_schema, statuses, hidden.as_ref())
        });
        let stream: SendableRecordBatchStream = Box::pin(RecordBatchStreamAdapter::new(whole_schema.clone(), stream));
        Ok(ProfiledSet { set: TrainingSet { schema, stream, sources: fingerprints, explain, report }, whole_schema })
    }

    /// What all that the engine does takes its memory from.
    pub(crate) fn memory_pool(&self) -> &Arc<dyn MemoryPool> {
        &self.runtime.memory_pool
    }

    fn explain_failure(&self, error: DataFusionError) -> EngineError {
        memory_or_run(error, self.options.memory_bytes >> 20)
    }

    /// How a source is read, and a fingerprint of what is there to read. Sources of other formats than Parquet add a
    /// plan to `inputs`.
    async fn source_read(
        &self,
        source: &SourcePlan,
        columns: &[String],
        inputs: &mut Vec<LogicalPlan>,
    ) -> Result<(Read, String), EngineError> {
        let run = |error: DataFusionError| self.explain_failure(error);
        match &source.kind {
            SourceKind::Files { .. } | SourceKind::Static { .. } => {}
            SourceKind::Stream { .. } => {
                let failed = |what: String| EngineError::History { stream: source.name.to_string(), what };
                let history = History::open(self.options.store.clone(), self.project_path(), &source.name)
                    .await
                    .map_err(|error| failed(error.to_string()))?;
                let files = self.open_table(history.table()).await.map_err(|error| failed(error.strip_backtrace()))?;
                return Ok((Read::Files(Arc::new(files)), history.manifest().fingerprint()));
            }
        }
        let files = self.sources.files_of(source, columns).await?;
        let fingerprint = self.sources.fingerprint_of(&files);
        // A copy of the files is read in their place only while they are the very same files.
        let table = Table::of_files(self.options.store.clone(), &self.project_path(), &source.name).await;
        match table {
            Ok(table) if table.is_copy_of(&fingerprint) => {
                let opened = self.open_table(&table).await.map_err(run)?;
                return Ok((Read::Files(Arc::new(opened)), fingerprint));
            }
            Ok(_) => {}
            // What the files say is still there to be read.
            Err(error) => tracing::warn!(source = %source.name, %error, "a managed table could not be opened"),
        }
        if files.format() == Format::Parquet && files.is_all_in_files() {
            let opened = Files::open(files.locations()).await.map_err(run)?;
            return Ok((Read::Files(Arc::new(opened)), fingerprint));
        }
        inputs.push(self.sources.frame(source, &files).await?.into_unoptimized_plan());
        Ok((Read::Plan(inputs.len() - 2), fingerprint))
    }

    async fn open_table(&self, table: &Table) -> Result<Files, DataFusionError> {
        let location = |file: &TableFile| {
            let path = table.object_path(file);
            let shown = path.to_string();
            Location { store: self.options.store.clone(), path, size: file.bytes, shown }
        };
        let files = &table.manifest().files;
        let locations = files.iter().map(location).collect();
        let mut opened = Files::open(locations).await?;
        opened.sorted = !files.is_empty() && files.iter().all(TableFile::is_sorted);
        Ok(opened)
    }

    /// One batch of the spine: all its columns, those that the service reads in their declared types.
    fn check_spine(
        &self,
        service: &ServicePlan,
        schema: &SchemaRef,
        batches: &[RecordBatch],
    ) -> Result<RecordBatch, EngineError> {
        let spine = concat_batches(schema, batches).map_err(|error| EngineError::Run(error.to_string()))?;
        let time_why = "the time each row is asked for".to_string();
        let time = self.spine_column(&spine, EVENT_TIMESTAMP, &Type::Timestamp, &time_why)?;
        refuse_nulls(&time, EVENT_TIMESTAMP, "every row needs a time")?;
        let mut fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone()).collect();
        let mut columns: Vec<ArrayRef> = spine.columns().to_vec();
        let mut put = |name: &str, column: ArrayRef, column_type: &Type| {
            if let Some((index, field)) = schema.column_with_name(name) {
                fields[index] = field.clone().with_data_type(column_type.arrow()).with_nullable(true);
                columns[index] = column;
            }
        };
        put(EVENT_TIMESTAMP, time, &Type::Timestamp);
        for column in &service.columns {
            let why = describe(service, column);
            let array = self.spine_column(&spine, &column.name, &column.column_type, &why)?;
            if !column.nullable && !column.is_key {
                refuse_nulls(&array, &column.name, &format!("{why} is not nullable"))?;
            }
            put(&column.name, array, &column.column_type);
        }
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(spine.num_rows()));
        RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
            .map_err(|error| EngineError::Run(error.to_string()))
    }

    fn spine_column(&self, spine: &RecordBatch, name: &str, wanted: &Type, why: &str) -> Result<ArrayRef, EngineError> {
        let Some(found) = spine.column_by_name(name) else {
            let schema = spine.schema();
            let known: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            return Err(EngineError::MissingColumn { column: name.into(), why: why.into(), known: known.join(", ") });
        };
        refuse_nanoseconds(found, name)?;
        let aligned = align_batch("spine", std::iter::once((name, wanted)), spine, false).map_err(|_| {
            EngineError::WrongType {
                column: name.into(),
                found: found.data_type().to_string(),
                wanted: wanted.to_string(),
                why: why.into(),
            }
        })?;
        Ok(aligned.column(0).clone())
    }
}

/// What was forgotten is not there to be read: a source without it is another one.
fn without_forgotten(service: &ServicePlan, source: &Arc<SourcePlan>, fingerprint: String) -> String {
    let views = || service.inputs.iter().map(|input| &input.view).filter(|view| Arc::ptr_eq(&view.source, source));
    let entities = views().flat_map(|view| view.about.iter().map(|part| &*part.entity));
    let list = views().next().and_then(|view| view.forgotten.get());
    match list.and_then(|list| list.digest_of(entities)) {
        Some(listed) => Canonical::new("source").with("rows", fingerprint).with("without", listed).digest().to_string(),
        None => fingerprint,
    }
}

fn describe(service: &ServicePlan, column: &RequestColumn) -> String {
    if let Some(address) = &column.address {
        return format!("request field `{address}`");
    }
    for (index, known) in service.columns.iter().enumerate() {
        if known.name == column.name
            && let Some(input) = service.inputs.iter().find(|input| input.keys.contains(&index))
        {
            return format!("a key of entity `{}`, which view `{}` is asked by", input.view.entity, input.alias);
        }
    }
    format!("which service `{}` reads", service.name)
}

fn refuse_nulls(column: &ArrayRef, name: &str, why: &str) -> Result<(), EngineError> {
    if column.null_count() == 0 {
        return Ok(());
    }
    let first = (0..column.len()).find(|row| column.is_null(*row)).unwrap_or(0);
    Err(EngineError::Null { column: name.into(), count: column.null_count(), first, why: why.into() })
}

/// A time that is cut would see rows, or miss them, that the time itself does not.
fn refuse_nanoseconds(column: &ArrayRef, name: &str) -> Result<(), EngineError> {
    let Some(times) = column.as_primitive_opt::<TimestampNanosecondType>() else { return Ok(()) };
    let cut = |row: &usize| times.is_valid(*row) && times.value(*row) % 1_000 != 0;
    let mut rows = (0..times.len()).filter(cut);
    match rows.next() {
        None => Ok(()),
        Some(first) => Err(EngineError::Nanoseconds { column: name.into(), count: 1 + rows.count(), first }),
    }
}

fn memory_or_run(error: DataFusionError, limit_mib: u64) -> EngineError {
    match error.find_root() {
        DataFusionError::ResourcesExhausted(what) => EngineError::Memory { limit_mib, what: what.clone() },
        DataFusionError::External(source) => {
            let mut text = source.to_string();
            let mut cause = source.source();
            while let Some(error) = cause {
                text.push_str(&format!(": {error}"));
                cause = error.source();
            }
            EngineError::Run(text)
        }
        _ => EngineError::Run(error.strip_backtrace()),
    }
}

/// The columns that a spine carries for the engine alone.
fn is_hidden(name: &str) -> bool {
    ["__position_time:", "__position_sequence:", "__not_answered:"].iter().any(|prefix| name.starts_with(prefix))
}

fn output_fields(join: &PitJoin, spine: &Schema, statuses: bool) -> Result<Vec<Field>, EngineError> {
    let mut fields: Vec<Field> =
        spine.fields().iter().filter(|field| !is_hidden(field.name())).map(|field| field.as_ref().clone()).collect();
    let mut add = |field: Field| {
        if fields.iter().any(|other| other.name() == field.name()) {
            return Err(EngineError::NameTaken { column: field.name().clone() });
        }
        fields.push(field);
        Ok(())
    };
    for output in &join.service.outputs {
        add(Field::new(&output.name, output.feature_type.arrow(), true))?;
    }
    if statuses {
        for output in &join.service.outputs {
            add(Field::new(format!("{}__status", output.name), DataType::UInt8, false))?;
        }
    }
    Ok(fields)
}

/// From what the views answered to the features, by the code that serving runs.
fn finish_batch(
    join: &PitJoin,
    batch: &RecordBatch,
    spine_schema: &Schema,
    schema: &SchemaRef,
    statuses: bool,
    hidden: Option<&Hidden>,
) -> Result<RecordBatch, DataFusionError> {
    let answers = exec::answers(join, batch)?;
    let column = |name: &str| {
        batch.column_by_name(name).cloned().ok_or_else(|| DataFusionError::Internal(format!("no column `{name}`")))
    };
    let requests: Vec<ArrayRef> =
        join.service.columns.iter().map(|request| column(&request.name)).collect::<Result<_, _>>()?;
    let at = column(EVENT_TIMESTAMP)?;
    let at = at.as_primitive::<TimestampMicrosecondType>().values();
    let assembled =
        join.service.assemble(&answers, &requests, at).map_err(|error| DataFusionError::External(Box::new(error)))?;
    let mut columns: Vec<ArrayRef> = spine_schema
        .fields()
        .iter()
        .enumerate()
        .filter(|(_, field)| !is_hidden(field.name()))
        .map(|(index, _)| batch.column(index).clone())
        .collect();
    let behind = hidden.map(|hidden| hidden.columns(&join.service, &answers, &assembled, &requests, at));
    columns.extend(assembled.columns);
    if statuses {
        columns.extend(assembled.statuses.iter().map(|statuses| {
            Arc::new(statuses.iter().map(|status| Some(*status as u8)).collect::<UInt8Array>()) as ArrayRef
        }));
    }
    columns.extend(behind.unwrap_or_default());
    let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}
