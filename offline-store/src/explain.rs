//! One cell of a training set, explained: which rows of the sources made the value, which were passed over, and why.
//!
//! The value itself comes from the engine, from a training set of one row. Beside it the sources are read once more, for
//! the rows of this entity alone, and the reference functions of `feature_defs` are asked; where they do not agree with the
//! engine to the last bit, that is the answer. So an explanation is also a proof, or the report of a bug.
//!
//! A lookup is a maximum and a state takes one event at a time, so of the rows of an entity only those that are shown are
//! kept, however many there are.

use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, Scalar, new_null_array};
use arrow::compute::kernels::cmp::eq;
use arrow::compute::{and, filter, filter_record_batch};
use arrow::datatypes::{Field, Int64Type, Schema, TimestampMicrosecondType, UInt8Type, UInt64Type};
use chrono::{DateTime, NaiveDate, SecondsFormat, TimeDelta};
use feature_defs::aggregate::{Aggregate, State};
use feature_defs::as_of::{Row, Visibility, as_of, feature_value};
use feature_defs::catalog::{self, Head};
use feature_defs::diagnose::nearest;
use feature_defs::expression::Expression;
use feature_defs::plan::{
    AssembleError, RowsError, ServiceInput, ServiceOutput, ServicePlan, Slot, SourceKind, SourcePlan, TransformFeature,
    ViewAggregate, ViewAnswer, ViewPlan, ViewPlanKind,
};
use feature_defs::time::{Micros, Position, STATIC, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::Window;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value as Json, json};

use crate::engine::{Engine, EngineError, TrainingSetRequest};
use crate::history::{POSITION_TIME, SEQUENCE};
use crate::point_in_time::{EVENT_TIMESTAMP, Order, position_columns};
use crate::source::SourceError;
use crate::table::{Table, TableError, read};

#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("one spine row is explained at a time, and {rows} were given")]
    NotOneRow { rows: usize },
    #[error("service `{service}` has no feature `{feature}`; {known}")]
    UnknownFeature { service: String, feature: String, known: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("rows of source `{source_name}` could not be read: {what}")]
    Read { source_name: String, what: String },
    #[error(transparent)]
    Rows(#[from] RowsError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error("the sources changed while `{feature}` was explained; ask again")]
    SourcesChanged { feature: String },
    #[error(
        "the engine says {engine} of `{feature}`, and the reference says {reference}: this is a bug; please report it with the definitions and the rows of this entity"
    )]
    Disagree { feature: String, engine: String, reference: String },
}

/// Which cell.
pub struct ExplainRequest {
    pub service: Arc<ServicePlan>,
    /// One row with the columns that a spine has.
    pub spine: RecordBatch,
    /// An output of the service: `view:feature`, `transform:feature`, `request:field`.
    pub feature: String,
    /// In place of what the sources declare.
    pub visibility: Option<catalog::Visibility>,
    /// Rows shown of each kind.
    pub limit: usize,
}

/// A time as people read it; rows of static sources have none, and are always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Micros);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == STATIC {
            return f.write_str("always");
        }
        match DateTime::from_timestamp_micros(self.0) {
            Some(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            None => write!(f, "{} µs", self.0),
        }
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A length of time as definitions write it: `1d12h`, `90m`, `1.5s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length(pub Micros);

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 0 {
            f.write_str("-")?;
        }
        let mut rest = self.0.unsigned_abs();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, micros) in [("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000)] {
            if rest >= micros {
                write!(f, "{}{unit}", rest / micros)?;
                rest %= micros;
            }
        }
        if rest > 0 { write!(f, "{rest}us") } else { Ok(()) }
    }
}

impl Serialize for Length {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a cell of a training set is what it is. There is one only where the reference agrees with the engine.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    pub service: String,
    pub feature: String,
    #[serde(rename = "type")]
    pub feature_type: Type,
    pub event_timestamp: Moment,
    pub value: Json,
    pub status: String,
    /// How the engine joins the sources of this service.
    pub strategy: String,
    /// From what was read to the value, each after what it reads.
    pub steps: Vec<Step>,
    /// The views that were read.
    pub inputs: Vec<InputExplanation>,
}

/// One value on the way to the feature.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    pub name: String,
    pub value: Json,
    pub status: String,
    /// Of transforms.
    pub expression: Option<String>,
    pub default: Option<Json>,
}

/// What one view answered and from which rows.
#[derive(Debug, Clone, Serialize)]
pub struct InputExplanation {
    pub alias: String,
    pub view: String,
    pub source: String,
    pub entity: String,
    pub keys: Map<String, Json>,
    /// A null in a key matches nothing.
    pub key_is_null: bool,
    /// Which rows may be seen: `known`, `event_time` or `ingested`.
    pub rule: &'static str,
    /// When a row is known, in words.
    pub known: String,
    /// A reader of a log that was applied so far.
    pub applied: Option<Applied>,
    /// Rows of the source that were looked at.
    pub rows_read: u64,
    /// Those of them that are of this entity.
    pub rows_of_entity: u64,
    /// Those of the entity that the view takes: not excluded by its `where`, with an event time, and in windows no
    /// tombstones.
    pub rows_of_view: u64,
    pub status: String,
    pub lookup: Lookup,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Applied {
    pub time: Moment,
    pub sequence: u64,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lookup {
    AsOf(Box<AsOfExplanation>),
    Windows(Vec<WindowExplanation>),
}

#[derive(Debug, Clone, Serialize)]
pub struct AsOfExplanation {
    pub ttl: Option<Length>,
    /// How long beyond ttl a row is OUTSIDE_MAX_AGE before it is NOT_FOUND.
    pub keep: Length,
    /// Of the winner, at the spine row's time.
    pub age: Option<Length>,
    /// What is said of the winner: its age, or that it is a tombstone.
    pub judgement: String,
    pub winner: Option<SourceRow>,
    /// Rows that could be seen and were not the latest: the runner-up first.
    pub superseded: Vec<SourceRow>,
    pub superseded_count: u64,
    /// Rows that had happened, and could not be seen yet: the newest first.
    pub hidden: Vec<SourceRow>,
    pub hidden_count: u64,
    /// Rows that happened after the spine row's time.
    pub later_count: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct WindowExplanation {
    pub feature: String,
    pub function: String,
    pub of: Option<String>,
    #[serde(rename = "where")]
    pub filter: Option<String>,
    pub by: Option<String>,
    pub length: Length,
    /// None: exact tails.
    pub hop: Option<Length>,
    /// The first event time inside.
    pub start: Moment,
    pub end: Moment,
    /// Whether an event at `end` is inside.
    pub head: &'static str,
    /// Events inside that could be seen.
    pub events: u64,
    /// Those of them that gave the function a value: neither null nor excluded by its `where`.
    pub contributing: u64,
    /// The newest that gave it one.
    pub rows: Vec<SourceRow>,
    /// Events inside that could not be seen yet.
    pub hidden_count: u64,
    pub hidden: Vec<SourceRow>,
    /// What the function answers of them, before the default.
    pub aggregate: Json,
}

/// One row of a source, as a view takes it.
#[derive(Debug, Clone, Serialize)]
pub struct SourceRow {
    pub event_time: Moment,
    pub created_time: Option<Moment>,
    pub known_time: Moment,
    pub position: Moment,
    /// In the log; 0 for rows of files.
    pub sequence: u64,
    pub tombstone: bool,
    /// Features by name; in windows what the row gives to the function, as `input`.
    pub values: Map<String, Json>,
    /// The source's own columns, as far as the view reads them.
    pub columns: Map<String, Json>,
    /// Why it won, lost or was hidden.
    pub why: String,
}

impl Engine {
    /// How the engine would make training sets of a service: its plan, one node to a line.
    pub async fn explain_service(&self, service: &Arc<ServicePlan>) -> Result<String, EngineError> {
        let columns = service.columns.iter().map(|column| (column.name.as_str(), column.column_type.arrow()));
        let fields = columns.chain([(EVENT_TIMESTAMP, Type::Timestamp.arrow())]);
        let schema = Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, true)).collect::<Vec<Field>>()));
        let request = TrainingSetRequest {
            service: service.clone(),
            spine_schema: schema.clone(),
            spine: vec![RecordBatch::new_empty(schema)],
            statuses: false,
            visibility: None,
            order: Order::Spine,
        };
        Ok(self.training_set(request).await?.explain)
    }

    /// Explains one cell. An error if the engine and the reference do not agree about it.
    pub async fn explain(&self, request: &ExplainRequest) -> Result<Explanation, ExplainError> {
        let ExplainRequest { service, spine, feature, visibility, limit } = request;
        if spine.num_rows() != 1 {
            return Err(ExplainError::NotOneRow { rows: spine.num_rows() });
        }
        let output = service.output(feature).ok_or_else(|| unknown_feature(service, feature))?;
        let training_set = || TrainingSetRequest {
            service: service.clone(),
            spine_schema: spine.schema(),
            spine: vec![spine.clone()],
            statuses: true,
            visibility: *visibility,
            order: Order::Spine,
        };
        let set = self.training_set(training_set()).await?;
        let (strategy, sources) = (set.explain.lines().next().unwrap_or_default().trim().to_owned(), set.sources);
        let rows: Vec<RecordBatch> =
            set.stream.try_collect().await.map_err(|error| EngineError::Run(error.strip_backtrace()))?;
        let engine = EngineRow::new(service, &rows, output)?;

        let needed = Needed::of(service, service.outputs[output].slot);
        let mut inputs = Vec::new();
        let mut answers = Vec::with_capacity(service.inputs.len());
        for (number, input) in service.inputs.iter().enumerate() {
            let wanted = needed.features(number);
            if wanted.is_none() {
                answers.push(no_answer(&input.view));
                continue;
            }
            let keys: Vec<Value> = input.keys.iter().map(|key| engine.request(service, *key)).collect();
            let rule = visibility.unwrap_or(input.view.source.visibility);
            let question = Question {
                input,
                keys,
                at: engine.at,
                rule,
                applied: applied(spine, &input.alias),
                features: wanted.unwrap_or_default(),
                limit: *limit,
            };
            let (answer, explained) = self.explain_input(question).await?;
            answers.push(answer);
            inputs.push(explained);
        }

        let steps_plan = needed.plan(service);
        let assembled = steps_plan.assemble(&answers, &engine.requests, &[engine.at])?;
        let mut steps = Vec::new();
        let mut reference = (Value::Null, Status::NotFound);
        for (i, planned) in steps_plan.outputs.iter().enumerate() {
            let value = Value::from_array(&assembled.columns[i], 0, &planned.feature_type);
            let status = assembled.statuses[i][0];
            steps.push(step(service, planned, &value, status));
            // The feature itself comes last: everything else is read by it.
            reference = (value, status);
        }
        if reference != (engine.value.clone(), engine.status) {
            let again = self.training_set(training_set()).await?;
            if again.sources != sources {
                return Err(ExplainError::SourcesChanged { feature: feature.clone() });
            }
            let of = &service.outputs[output].feature_type;
            let said = |value: &Value, status: Status| format!("{} ({status})", to_json(value, of));
            return Err(ExplainError::Disagree {
                feature: feature.clone(),
                engine: said(&engine.value, engine.status),
                reference: said(&reference.0, reference.1),
            });
        }
        let feature_type = service.outputs[output].feature_type.clone();
        Ok(Explanation {
            service: service.name.to_string(),
            feature: feature.clone(),
            value: to_json(&engine.value, &feature_type),
            feature_type,
            event_timestamp: Moment(engine.at),
            status: engine.status.to_string(),
            strategy,
            steps,
            inputs,
        })
    }

    async fn explain_input(&self, question: Question<'_>) -> Result<(ViewAnswer, InputExplanation), ExplainError> {
        let view = &question.input.view;
        let source = &view.source;
        let key_is_null = question.keys.iter().any(Value::is_null);
        let mut found = Found::new(&question);
        let (mut rows_read, mut rows_of_entity, mut rows_of_view) = (0, 0, 0);
        if !key_is_null {
            let mut columns = view.source_columns();
            // Names the event that was pushed, where the source has such a name.
            if let SourceKind::Stream { event_id: Some(event_id), .. } = &source.kind
                && !columns.contains(event_id)
            {
                columns.push(event_id.clone());
            }
            let mut batches = self.entity_rows(view, &columns, Some(&question.keys)).await?;
            while let Some(batch) = batches.try_next().await? {
                rows_read += batch.num_rows() as u64;
                let (batch, positions) = of_entity(view, &columns, &batch, &question.keys)?;
                if batch.num_rows() == 0 {
                    continue;
                }
                rows_of_entity += batch.num_rows() as u64;
                let times = source.times(&batch, positions.as_deref())?;
                let rows = view.rows(&batch, &times)?;
                rows_of_view += rows.len() as u64;
                found.add(&rows, &batch);
            }
        }
        let (answer, status, lookup) = found.finish();
        let keys = view.keys.iter().zip(&question.keys);
        let explained = InputExplanation {
            alias: question.input.alias.clone(),
            view: view.name.to_string(),
            source: source.name.to_string(),
            entity: view.entity.to_string(),
            keys: keys.map(|(key, value)| (key.name.clone(), to_json(value, &key.key_type))).collect(),
            key_is_null,
            rule: match question.rule {
                catalog::Visibility::Known => "known",
                catalog::Visibility::EventTime => "event_time",
                catalog::Visibility::Ingested => "ingested",
            },
            known: known_rule(source),
            applied: question.applied.map(|applied| Applied { time: Moment(applied.time), sequence: applied.sequence }),
            rows_read,
            rows_of_entity,
            rows_of_view,
            status: status.to_string(),
            lookup,
        };
        Ok((answer, explained))
    }

    /// Batches that hold every row of an entity, with rows of others among them, or every row there is without `keys`.
    /// Where a managed table is sorted by the view's keys, only the entity's bucket is read.
    pub(crate) async fn entity_rows(
        &self,
        view: &ViewPlan,
        columns: &[String],
        keys: Option<&[Value]>,
    ) -> Result<BoxStream<'static, Result<RecordBatch, ExplainError>>, ExplainError> {
        let source = &view.source;
        let mut table = Table::open(self.store().clone(), &self.project_path(), source).await?;
        if let SourceKind::Files { pattern } | SourceKind::Static { pattern } = &source.kind {
            let copied = match &table {
                Some(table) => table.is_copy_of(&self.sources().fingerprint(pattern).await?),
                None => false,
            };
            // A column that was added to the definitions since is in the files only.
            table = table.filter(|table| {
                copied && columns.iter().all(|column| table.manifest().schema.iter().any(|(name, _)| name == column))
            });
        }
        let Some(table) = table else {
            let (scan, name) = (self.sources().scan(source, columns).await?, source.name.to_string());
            let failed = move |error: datafusion::error::DataFusionError| ExplainError::Read {
                source_name: name.clone(),
                what: error.strip_backtrace(),
            };
            return Ok(scan.map_err(failed).boxed());
        };
        let clustering = table.clustering().filter(|clustering| clustering.serves(source, &view.keys));
        let files = match clustering.zip(keys) {
            Some((clustering, keys)) => {
                let mut key = Vec::new();
                keys.iter().for_each(|value| feature_defs::value::encode(value, &mut key));
                table.files(clustering.bucket_of(&key)).into_iter().cloned().collect::<Vec<_>>()
            }
            None => table.manifest().files.clone(),
        };
        let columns = columns.to_vec();
        let batches = stream::iter(files).then(move |file| {
            let (table, columns) = (table.clone(), columns.clone());
            async move { Ok::<_, TableError>(read::read(&table, &file, Some(&columns)).await?.1) }
        });
        Ok(batches.try_flatten().map_err(ExplainError::from).boxed())
    }
}

fn unknown_feature(service: &ServicePlan, feature: &str) -> ExplainError {
    let names = || service.outputs.iter().map(|output| output.name.as_str());
    let known = match nearest(feature, names()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("it has: {}", names().collect::<Vec<_>>().join(", ")),
    };
    ExplainError::UnknownFeature { service: service.name.to_string(), feature: feature.into(), known }
}

/// The position that a spine says was applied for an input.
fn applied(spine: &RecordBatch, alias: &str) -> Option<Position> {
    let (time, sequence) = position_columns(alias);
    let time = spine.column_by_name(&time)?.as_primitive_opt::<Int64Type>()?.value(0);
    let sequence = spine.column_by_name(&sequence)?.as_primitive_opt::<UInt64Type>()?.value(0);
    Some(Position { time, sequence })
}

/// When rows of a source are known, in words.
fn known_rule(source: &SourcePlan) -> String {
    if source.is_static() {
        return "always".into();
    }
    let mut words = match &source.created_time {
        Some(column) => format!("at `{column}`"),
        None if source.clock.delay > 0 => format!("{} after the event time", Length(source.clock.delay)),
        None => "at the event time".into(),
    };
    if source.clock.every > 0 {
        words.push_str(&format!(", on a grid of {}", Length(source.clock.every)));
    }
    words
}

/// What the engine said of the one row.
struct EngineRow {
    at: Micros,
    value: Value,
    status: Status,
    /// The columns of the service, checked.
    requests: Vec<ArrayRef>,
}

impl EngineRow {
    fn new(service: &ServicePlan, batches: &[RecordBatch], output: usize) -> Result<EngineRow, EngineError> {
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        let Some(batch) = batches.iter().find(|batch| batch.num_rows() == 1 && rows == 1) else {
            return Err(EngineError::Run(format!("a spine of one row gave {rows}; this is a bug")));
        };
        let column = |name: &str| {
            let missing = || EngineError::Run(format!("the training set has no column `{name}`; this is a bug"));
            batch.column_by_name(name).cloned().ok_or_else(missing)
        };
        let output = &service.outputs[output];
        let status = column(&format!("{}__status", output.name))?;
        let status = status.as_primitive_opt::<UInt8Type>().and_then(|status| Status::from_number(status.value(0)));
        let at = column(EVENT_TIMESTAMP)?;
        let at = at.as_primitive_opt::<TimestampMicrosecondType>().map(|at| at.value(0));
        let (Some(status), Some(at)) = (status, at) else {
            return Err(EngineError::Run("a status or the time is none; this is a bug".into()));
        };
        Ok(EngineRow {
            at,
            value: Value::from_array(&column(&output.name)?, 0, &output.feature_type),
            status,
            requests: service.columns.iter().map(|request| column(&request.name)).collect::<Result<_, _>>()?,
        })
    }

    fn request(&self, service: &ServicePlan, column: usize) -> Value {
        Value::from_array(&self.requests[column], 0, &service.columns[column].column_type)
    }
}

/// What a feature is made of, in an order in which each reads only earlier ones.
pub(crate) struct Needed {
    pub(crate) slots: Vec<Slot>,
}

impl Needed {
    pub(crate) fn of(service: &ServicePlan, slot: Slot) -> Needed {
        let mut needed = Needed { slots: Vec::new() };
        needed.add(service, slot);
        needed
    }

    fn add(&mut self, service: &ServicePlan, slot: Slot) {
        if self.slots.contains(&slot) {
            return;
        }
        if let Slot::Transform(number) = slot {
            for read in &service.transforms[number].reads {
                self.add(service, *read);
            }
        }
        self.slots.push(slot);
    }

    /// The features of an input that are read; None where the input is not, and none of them where only its event time
    /// is.
    fn features(&self, input: usize) -> Option<Vec<usize>> {
        let mut features = None::<Vec<usize>>;
        for slot in &self.slots {
            match slot {
                Slot::Feature { input: of, feature } if *of == input => {
                    features.get_or_insert_default().push(*feature);
                }
                Slot::EventTime { input: of } if *of == input => {
                    features.get_or_insert_default();
                }
                _ => {}
            }
        }
        features
    }

    /// The service, with these for its outputs.
    fn plan(&self, service: &ServicePlan) -> ServicePlan {
        let input = |input: &ServiceInput| ServiceInput {
            alias: input.alias.clone(),
            view: input.view.clone(),
            keys: input.keys.clone(),
        };
        let transform = |transform: &TransformFeature| TransformFeature {
            address: transform.address.clone(),
            feature_type: transform.feature_type.clone(),
            expression: transform.expression.clone(),
            reads: transform.reads.clone(),
            default: transform.default.clone(),
        };
        let output = |slot: &Slot| {
            let (name, feature_type) = match *slot {
                Slot::Feature { input, feature } => {
                    let input = &service.inputs[input];
                    let (name, feature_type, _) = input.view.features()[feature];
                    (format!("{}:{name}", input.alias), feature_type.clone())
                }
                Slot::EventTime { input } => (format!("event_time({})", service.inputs[input].alias), Type::Timestamp),
                Slot::At => ("at()".to_owned(), Type::Timestamp),
                Slot::Request(column) => {
                    let column = &service.columns[column];
                    (column.address.clone().unwrap_or_else(|| column.name.clone()), column.column_type.clone())
                }
                Slot::Transform(number) => {
                    let transform = &service.transforms[number];
                    (transform.address.clone(), transform.feature_type.clone())
                }
            };
            ServiceOutput { name, feature_type, slot: *slot, sensitive: false }
        };
        ServicePlan {
            name: service.name.clone(),
            columns: service.columns.clone(),
            inputs: service.inputs.iter().map(input).collect(),
            transforms: service.transforms.iter().map(transform).collect(),
            outputs: self.slots.iter().map(output).collect(),
            semantic_digest: service.semantic_digest.clone(),
        }
    }
}

fn step(service: &ServicePlan, planned: &ServiceOutput, value: &Value, status: Status) -> Step {
    let (expression, default) = match planned.slot {
        Slot::Transform(number) => {
            let transform = &service.transforms[number];
            (Some(transform.expression.canonical_text()), transform.default.as_ref())
        }
        Slot::Feature { input, feature } => (None, service.inputs[input].view.features()[feature].2),
        Slot::EventTime { .. } | Slot::At | Slot::Request(_) => (None, None),
    };
    Step {
        name: planned.name.clone(),
        value: to_json(value, &planned.feature_type),
        status: status.to_string(),
        expression,
        default: default.map(|default| to_json(default, &planned.feature_type)),
    }
}

/// The answer of a view that is not asked.
fn no_answer(view: &ViewPlan) -> ViewAnswer {
    let values = view.features().iter().map(|(_, of, _)| new_null_array(&of.arrow(), 1)).collect();
    ViewAnswer { values, statuses: vec![Status::NotFound], event_times: vec![None] }
}

/// The rows of one entity in a batch of its view's source, aligned, and their positions.
fn of_entity(
    view: &ViewPlan,
    columns: &[String],
    batch: &RecordBatch,
    keys: &[Value],
) -> Result<(RecordBatch, Option<Vec<Position>>), ExplainError> {
    let source = &view.source;
    let aligned = source.align(batch, Some(columns))?;
    let mut mask: Option<BooleanArray> = None;
    for ((column, key_type), value) in view.key_columns(&aligned)?.into_iter().zip(keys) {
        let wanted = Scalar::new(Value::to_array([value], key_type));
        let same = eq(&column, &wanted).map_err(RowsError::Arrow)?;
        mask = Some(match mask {
            Some(mask) => and(&mask, &same).map_err(RowsError::Arrow)?,
            None => same,
        });
    }
    let positions = if source.is_stream() {
        let damaged = || ExplainError::Read {
            source_name: source.name.to_string(),
            what: format!("its history has no columns `{POSITION_TIME}` and `{SEQUENCE}`"),
        };
        let column = |name: &str| -> Result<ArrayRef, ExplainError> {
            let column = batch.column_by_name(name).ok_or_else(damaged)?;
            match &mask {
                Some(mask) => Ok(filter(column, mask).map_err(RowsError::Arrow)?),
                None => Ok(column.clone()),
            }
        };
        let (times, sequences) = (column(POSITION_TIME)?, column(SEQUENCE)?);
        let times = times.as_primitive_opt::<Int64Type>().ok_or_else(damaged)?;
        let sequences = sequences.as_primitive_opt::<UInt64Type>().ok_or_else(damaged)?;
        let both = times.values().iter().zip(sequences.values());
        Some(both.map(|(time, sequence)| Position { time: *time, sequence: *sequence }).collect())
    } else {
        None
    };
    let aligned = match &mask {
        Some(mask) if aligned.num_columns() > 0 => filter_record_batch(&aligned, mask).map_err(RowsError::Arrow)?,
        _ => aligned,
    };
    Ok((aligned, positions))
}

/// What is asked of one view.
struct Question<'q> {
    input: &'q ServiceInput,
    keys: Vec<Value>,
    at: Micros,
    rule: catalog::Visibility,
    applied: Option<Position>,
    features: Vec<usize>,
    limit: usize,
}

impl Question<'_> {
    fn visibility(&self) -> Visibility {
        match (self.applied, self.rule) {
            (Some(applied), rule) => Visibility::AsKnown(applied, rule),
            (None, catalog::Visibility::Known) => Visibility::Known,
            (None, catalog::Visibility::EventTime) => Visibility::EventTime,
            (None, catalog::Visibility::Ingested) => Visibility::Ingested,
        }
    }

    /// Why a row that had happened could not be seen.
    fn hidden(&self, row: &Row) -> String {
        let times = &row.times;
        match self.applied {
            Some(applied) if times.position > applied => "not applied yet at the position the row names".to_owned(),
            _ if self.rule == catalog::Visibility::Ingested => {
                format!("arrived {} after this time", Length(times.position.time.saturating_sub(self.at)))
            }
            _ => format!("known {} after this time", Length(times.known_time.saturating_sub(self.at))),
        }
    }
}

/// The greatest rows of many in the order of lookups, and how many there were.
struct Greatest {
    limit: usize,
    count: u64,
    rows: Vec<(Row, Map<String, Json>)>,
}

impl Greatest {
    fn new(limit: usize) -> Greatest {
        Greatest { limit, count: 0, rows: Vec::new() }
    }

    fn offer(&mut self, row: Row, columns: impl FnOnce() -> Map<String, Json>) {
        self.count += 1;
        let place = self.rows.partition_point(|(kept, _)| kept.order(&row).is_ge());
        if place < self.limit {
            self.rows.truncate(self.limit - 1);
            self.rows.insert(place, (row, columns()));
        }
    }
}

/// What was found so far of the rows of an entity.
enum Found<'q> {
    AsOf { question: &'q Question<'q>, types: Vec<Type>, visible: Greatest, hidden: Greatest, later: u64 },
    Windows { question: &'q Question<'q>, types: Vec<Type>, windows: Vec<FoundWindow<'q>> },
}

struct FoundWindow<'q> {
    feature: usize,
    /// Index of the aggregate in the view.
    number: usize,
    aggregate: &'q Aggregate,
    window: Window,
    /// As `window_value` makes it, an event at a time.
    state: State,
    inside: u64,
    contributing: Greatest,
    hidden: Greatest,
}

impl<'q> Found<'q> {
    fn new(question: &'q Question<'q>) -> Found<'q> {
        let view = &question.input.view;
        let types = view.row_types();
        match &view.kind {
            ViewPlanKind::AsOf { .. } => {
                // The winner is one of the visible.
                let visible = Greatest::new(question.limit.saturating_add(1));
                Found::AsOf { question, types, visible, hidden: Greatest::new(question.limit), later: 0 }
            }
            ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                let window = |feature: &usize| {
                    let output = &outputs[*feature];
                    let aggregate = &aggregates[output.aggregate].aggregate;
                    FoundWindow {
                        feature: *feature,
                        number: output.aggregate,
                        aggregate,
                        window: output.window,
                        state: aggregate.zero(),
                        inside: 0,
                        contributing: Greatest::new(question.limit),
                        hidden: Greatest::new(question.limit),
                    }
                };
                Found::Windows { question, types, windows: question.features.iter().map(window).collect() }
            }
        }
    }

    fn add(&mut self, rows: &feature_defs::plan::ViewRows, batch: &RecordBatch) {
        match self {
            Found::AsOf { question, types, visible, hidden, later } => {
                let visibility = question.visibility();
                for i in 0..rows.len() {
                    let times = rows.times[i];
                    if times.event_time > question.at {
                        *later += 1;
                        continue;
                    }
                    let row = Row { times, deleted: rows.deleted[i], values: rows.values(i, types) };
                    let columns = || columns(&question.input.view.source, batch, rows.source_rows[i] as usize);
                    if visibility.admits(&times, question.at) {
                        visible.offer(row, columns);
                    } else {
                        hidden.offer(row, columns);
                    }
                }
            }
            Found::Windows { question, types, windows } => {
                let visibility = question.visibility();
                for found in windows {
                    for i in 0..rows.len() {
                        let times = rows.times[i];
                        if !found.window.contains(times.event_time, question.at) {
                            continue;
                        }
                        let input = Value::from_array(&rows.columns[found.number], i, &types[found.number]);
                        let columns = || columns(&question.input.view.source, batch, rows.source_rows[i] as usize);
                        if !visibility.admits(&times, question.at) {
                            found.hidden.offer(Row { times, deleted: false, values: vec![input] }, columns);
                            continue;
                        }
                        found.inside += 1;
                        found.aggregate.push(&mut found.state, &input, &times);
                        if !input.is_null() {
                            found.contributing.offer(Row { times, deleted: false, values: vec![input] }, columns);
                        }
                    }
                }
            }
        }
    }

    /// The answer of the reference, and what led to it.
    fn finish(self) -> (ViewAnswer, Status, Lookup) {
        match self {
            Found::AsOf { question, types, visible, hidden, later } => {
                let (answer, status, explained) = finish_as_of(question, &types, visible, hidden, later);
                (answer, status, Lookup::AsOf(Box::new(explained)))
            }
            Found::Windows { question, types, windows } => {
                let view = &question.input.view;
                let mut answer = no_answer(view);
                answer.statuses = vec![Status::Present];
                let mut explained = Vec::with_capacity(windows.len());
                let ViewPlanKind::Windowed { aggregates, outputs, .. } = &view.kind else {
                    return (answer, Status::Present, Lookup::Windows(explained));
                };
                for found in windows {
                    let (output, aggregate) = (&outputs[found.feature], &aggregates[found.number]);
                    let value = found.aggregate.finish(&found.state);
                    answer.values[found.feature] = Value::to_array([&value], &output.feature_type);
                    let value = to_json(&value, &output.feature_type);
                    explained.push(found.explain(question, &types, aggregate, &output.name, value));
                }
                (answer, Status::Present, Lookup::Windows(explained))
            }
        }
    }
}

fn finish_as_of(
    question: &Question<'_>,
    types: &[Type],
    visible: Greatest,
    hidden: Greatest,
    later: u64,
) -> (ViewAnswer, Status, AsOfExplanation) {
    let view = &question.input.view;
    let max_age = match &view.kind {
        ViewPlanKind::AsOf { max_age, .. } => *max_age,
        ViewPlanKind::Windowed { .. } => Default::default(),
    };
    // A lookup is a maximum: what is not among the greatest that could be seen is not the answer.
    let rows: Vec<Row> = visible.rows.iter().chain(&hidden.rows).map(|(row, _)| row.clone()).collect();
    let answer = as_of(&rows, question.at, max_age, question.visibility());
    let values = types.iter().enumerate().map(|(feature, of)| {
        let (value, _) = feature_value(&answer, feature, None);
        Value::to_array([&value], of)
    });
    let found = ViewAnswer {
        values: values.collect(),
        statuses: vec![answer.status],
        event_times: vec![answer.row.map(|row| row.times.event_time)],
    };
    let status = answer.status;

    let names: Vec<String> = view.features().iter().map(|(name, _, _)| (*name).to_owned()).collect();
    let show = |(row, columns): (Row, Map<String, Json>), why: String| {
        let values = names.iter().zip(types).zip(&row.values);
        let values = values.map(|((name, of), value)| (name.clone(), to_json(value, of))).collect();
        source_row(&row, if row.deleted { Map::new() } else { values }, columns, why)
    };
    let mut visible_rows = visible.rows.into_iter();
    let winner = visible_rows.next();
    let best = winner.as_ref().map(|(row, _)| row.clone());
    let age = best.as_ref().filter(|row| row.times.event_time != STATIC);
    let age = age.map(|row| Length(question.at.saturating_sub(row.times.event_time)));
    let judgement = match (&best, age, max_age.ttl) {
        (None, _, _) if question.keys.iter().any(Value::is_null) => "a null in the key matches nothing".to_owned(),
        (None, _, _) => "no row of this entity could be seen".to_owned(),
        (Some(row), _, _) if row.deleted => "the latest row is a tombstone: the entity has no row".to_owned(),
        (Some(_), None, _) => "a static row is of any age".to_owned(),
        (Some(_), Some(_), None) => "no ttl is declared: a row may be of any age".to_owned(),
        (Some(_), Some(age), Some(ttl)) => match status {
            Status::Present => format!("{age} old, within the ttl of {}", Length(ttl)),
            Status::OutsideMaxAge => {
                format!("{age} old, older than the ttl of {} and within {} more", Length(ttl), Length(max_age.keep))
            }
            _ => format!("{age} old, older than the ttl of {} and {} more", Length(ttl), Length(max_age.keep)),
        },
    };
    let superseded: Vec<SourceRow> = visible_rows
        .map(|row| {
            let why = best.as_ref().map(|best| lost(best, &row.0)).unwrap_or_default();
            show(row, why)
        })
        .collect();
    let explained = AsOfExplanation {
        ttl: max_age.ttl.map(Length),
        keep: Length(max_age.keep),
        age,
        judgement,
        winner: winner.map(|row| show(row, "the latest that could be seen".to_owned())),
        superseded_count: visible.count.saturating_sub(1),
        superseded,
        hidden_count: hidden.count,
        hidden: hidden
            .rows
            .into_iter()
            .map(|row| {
                let why = question.hidden(&row.0);
                show(row, why)
            })
            .collect(),
        later_count: later,
    };
    (found, status, explained)
}

/// By what a row is before the winner.
fn lost(winner: &Row, row: &Row) -> String {
    let (best, times) = (&winner.times, &row.times);
    if times.event_time < best.event_time {
        return format!("happened {} earlier", Length(best.event_time.saturating_sub(times.event_time)));
    }
    if times.created_time < best.created_time {
        return match (best.created_time, times.created_time) {
            (Some(best), Some(time)) => {
                format!("same event time, created {} earlier", Length(best.saturating_sub(time)))
            }
            _ => "same event time, without a created time".to_owned(),
        };
    }
    if times.position.sequence < best.position.sequence {
        return "same times, earlier in the log".to_owned();
    }
    if winner.order(row).is_eq() {
        return "the same row once more".to_owned();
    }
    "same times: the larger encoding of the view's row wins".to_owned()
}

impl FoundWindow<'_> {
    fn explain(
        self,
        question: &Question<'_>,
        types: &[Type],
        aggregate: &ViewAggregate,
        name: &str,
        value: Json,
    ) -> WindowExplanation {
        let of = &types[self.number];
        // Rows are counted by a constant that says nothing.
        let says = aggregate.of.is_some();
        let show = |(row, columns): (Row, Map<String, Json>), why: String| {
            let values = match row.values.first() {
                Some(input) if says => Map::from_iter([("input".to_owned(), to_json(input, of))]),
                _ => Map::new(),
            };
            source_row(&row, values, columns, why)
        };
        let text = |expression: &Option<Expression>| expression.as_ref().map(Expression::canonical_text);
        let contributing = self.contributing.count;
        WindowExplanation {
            feature: name.to_owned(),
            function: aggregate.aggregate.function().name().to_owned(),
            of: text(&aggregate.of),
            filter: text(&aggregate.filter),
            by: text(&aggregate.by),
            length: Length(self.window.length),
            hop: self.window.hop.map(Length),
            start: Moment(self.window.start(question.at)),
            end: Moment(question.at),
            head: match self.window.head {
                Head::Exclusive => "exclusive",
                Head::Inclusive => "inclusive",
            },
            events: self.inside,
            contributing,
            rows: self.contributing.rows.into_iter().map(|row| show(row, "inside".to_owned())).collect(),
            hidden_count: self.hidden.count,
            hidden: self
                .hidden
                .rows
                .into_iter()
                .map(|row| {
                    let why = question.hidden(&row.0);
                    show(row, why)
                })
                .collect(),
            aggregate: value,
        }
    }
}

fn source_row(row: &Row, values: Map<String, Json>, columns: Map<String, Json>, why: String) -> SourceRow {
    SourceRow {
        event_time: Moment(row.times.event_time),
        created_time: row.times.created_time.map(Moment),
        known_time: Moment(row.times.known_time),
        position: Moment(row.times.position.time),
        sequence: row.times.position.sequence,
        tombstone: row.deleted,
        values,
        columns,
        why,
    }
}

/// A row of a source's batch as its own columns say it.
fn columns(source: &SourcePlan, batch: &RecordBatch, row: usize) -> Map<String, Json> {
    let schema = batch.schema();
    let fields = schema.fields().iter().zip(batch.columns());
    let named = fields.filter_map(|(field, column)| {
        let of = source.column_type(field.name())?;
        Some((field.name().clone(), to_json(&Value::from_array(column, row, of), of)))
    });
    named.collect()
}

/// A value as people write it: times in RFC 3339, decimals in digits, bytes in hexadecimal, NaN and infinities as text.
pub fn to_json(value: &Value, of: &Type) -> Json {
    let float = |x: f64| serde_json::Number::from_f64(x).map_or_else(|| Json::from(x.to_string()), Json::Number);
    // Through the shortest text, so that 0.1 stays 0.1.
    let float32 = |x: f32| x.to_string().parse().map_or(Json::Null, float);
    match (value, of) {
        (Value::Null, _) => Json::Null,
        (Value::Bool(x), _) => json!(x),
        (Value::Int32(x), _) => json!(x),
        (Value::Int64(x), _) => json!(x),
        (Value::Float32(x), _) => float32(*x),
        (Value::Float64(x), _) => float(*x),
        (Value::String(x), _) => json!(x),
        (Value::Binary(x), _) => Json::from(x.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        (Value::Timestamp(x), _) => json!(Moment(*x)),
        (Value::Date(x), _) => match NaiveDate::default().checked_add_signed(TimeDelta::days(i64::from(*x))) {
            Some(date) => Json::from(date.to_string()),
            None => Json::from(format!("{x} days")),
        },
        (Value::Decimal(x), of) => {
            let scale = if let Type::Decimal { scale, .. } = of { usize::try_from(*scale).unwrap_or(0) } else { 0 };
            let digits = format!("{:0>width$}", x.unsigned_abs(), width = scale + 1);
            let (whole, fraction) = digits.split_at(digits.len() - scale);
            let point = if scale > 0 { "." } else { "" };
            Json::from(format!("{}{whole}{point}{fraction}", if *x < 0 { "-" } else { "" }))
        }
        (Value::List(items), Type::List(of)) => items.iter().map(|item| to_json(item, of)).collect(),
        (Value::Map(entries), Type::Map(of)) => {
            let entries = entries.iter().map(|(key, value)| (key.to_string(), to_json(value, of)));
            Json::Object(entries.collect())
        }
        (Value::Struct(values), Type::Struct(fields)) => {
            let fields = fields.iter().zip(values).map(|((name, of), value)| (name.clone(), to_json(value, of)));
            Json::Object(fields.collect())
        }
        (Value::Vector(items), _) => items.iter().map(|x| float32(*x)).collect(),
        (Value::List(_) | Value::Map(_) | Value::Struct(_), _) => Json::Null,
    }
}

#[cfg(test)]
mod tests;
