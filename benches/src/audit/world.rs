//! A project with a history, and rows that were served from it right: worked out from the generated events by the
//! reference functions alone, so that neither the engine nor the audit judges itself.

use std::sync::Arc;

use anyhow::Context as _;
use arrow::array::{
    Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt8Array,
    UInt32Array, UInt64Array, new_null_array,
};
use arrow::datatypes::DataType;
use feature_defs::as_of::{Row, Times, Visibility, as_of};
use feature_defs::catalog::{self, Files, SourceFile};
use feature_defs::plan::{Plan, ServicePlan, SourceSchemas, ViewAnswer, ViewPlanKind, compile_definitions};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::Value;
use feature_defs::window::{DAY, MINUTE, SECOND, WindowEvent, window_value};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use offline_store::history::{History, Positioned};
use offline_store::serving_log::{self, FileName, Header, LogSchema, Place};
use offline_store::{Engine, EngineOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub const PROJECT: &str = "audited";
pub const SERVICE: &str = "served";
/// 2024-03-04T00:00:00Z
pub const BEGIN: Micros = 1_709_510_400 * SECOND;
/// How long there are events before the first row that is served, and rows after that.
const BEFORE: Micros = 2 * DAY;
const SERVED: Micros = DAY;
/// Events take up to this long to arrive, and the applier is up to so far behind.
const ARRIVAL_MAX: Micros = 2 * MINUTE;
const BEHIND_MAX: Micros = 20 * SECOND;
/// Rows of one file of the log.
const FILE_ROWS: usize = 8_000;

const DEFINITIONS: &str = r#"
entities:
  - {name: user, keys: [{name: user, type: int64}]}
sources:
  - name: orders
    stream: true
    schema: [{name: user, type: int64}, {name: amount, type: float64}, {name: items, type: float64}]
    event_time: ordered_at
  - name: readings
    stream: true
    schema: [{name: user, type: int64}, {name: temp, type: float64}, {name: level, type: float64}]
    event_time: read_at
feature_views:
  - name: reading
    entity: user
    source: readings
    ttl: 2d
    features:
      - {name: temp, type: float64}
      - {name: level, type: float64, default: 0.5}
  - name: spend
    entity: user
    source: orders
    windows: [1h, 24h]
    aggregates:
      - {name: orders, function: count}
      - {name: amount, function: sum, of: amount, default: 0.0}
      - {name: items, function: mean, of: items, default: 1.0}
      - {name: largest, function: max, of: amount, default: 0.0}
requests:
  - {name: ask, fields: [{name: distance, type: float64}]}
transforms:
  - name: context
    inputs: [reading, spend, ask]
    features:
      - {name: hour, expr: "date_part('hour', local(at(), 'America/New_York'))"}
      - {name: share, expr: "spend.amount_1h / (1.0 + spend.amount_24h)"}
      - {name: felt, expr: "reading.temp * 1.5 + reading.level"}
      - {name: far, expr: "ask.distance / 2.0"}
feature_services:
  - {name: served, features: [reading, spend, "context:*"]}
"#;

/// One event of a stream: when, and its two numbers.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    pub user: i64,
    pub time: Micros,
    pub position: Position,
    pub numbers: [f64; 2],
}

impl Event {
    fn times(&self) -> Times {
        Times { event_time: self.time, created_time: None, known_time: self.time, position: self.position }
    }
}

/// A row as it was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    pub user: i64,
    pub at: Micros,
    pub distance: f64,
    /// Everything up to here had been applied, of whatever user.
    pub applied: Position,
}

/// The streams, by user: [orders, readings].
pub type Streams = [Vec<Vec<Event>>; 2];

pub struct World {
    pub plan: Arc<Plan>,
    pub engine: Engine,
    pub streams: Streams,
    pub asked: Vec<Asked>,
    pub store: Arc<dyn ObjectStore>,
    _folder: tempfile::TempDir,
}

/// How many of what.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub users: i64,
    /// Of each user and stream, over three days.
    pub events: usize,
    pub rows: usize,
}

impl World {
    pub async fn new(seed: u64, size: Size) -> anyhow::Result<World> {
        let mut random = SmallRng::seed_from_u64(seed);
        let folder = tempfile::tempdir()?;
        let files = Files::new(vec![SourceFile { path: "audited.yaml".into(), text: DEFINITIONS.into() }]);
        let plan = compile_definitions(PROJECT, &files, &SourceSchemas::new())
            .map_err(|found| anyhow::anyhow!("{}", feature_defs::diagnose::render(&found, &files, false)))?;
        let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
        let engine = Engine::new(EngineOptions {
            project_folder: folder.path().into(),
            project: PROJECT.into(),
            store: store.clone(),
            prefix: Path::default(),
            memory_bytes: 4 << 30,
            spill_folder: None,
        })?;
        let mut streams: Streams = [Vec::new(), Vec::new()];
        for (number, (source, columns)) in
            [("orders", ["amount", "items"]), ("readings", ["temp", "level"])].into_iter().enumerate()
        {
            let events = events(&mut random, size, number == 0);
            let plan = plan.source(source).with_context(|| format!("there is no source {source}"))?;
            write(&engine, plan, &events, columns).await?;
            let mut by_user = vec![Vec::new(); usize::try_from(size.users)?];
            for event in events {
                by_user[usize::try_from(event.user)?].push(event);
            }
            streams[number] = by_user;
        }
        let asked = (0..size.rows).map(|_| {
            let mut at = BEGIN + BEFORE + random.random_range(0..SERVED);
            let user = random.random_range(0..size.users);
            // Some ask at the very moment of an event.
            let own = &streams[0][user as usize];
            if random.random_bool(0.1)
                && let Some(event) = own.iter().find(|event| event.time >= at)
            {
                at = event.time;
            }
            let behind = random.random_range(0..BEHIND_MAX);
            let applied = Position { time: at - behind, sequence: u64::MAX };
            Asked { user, at, distance: f64::from(random.random_range(1..5_000)) / 8.0, applied }
        });
        let asked: Vec<Asked> = asked.collect();
        Ok(World { plan: Arc::new(plan), engine, streams, asked, store, _folder: folder })
    }

    pub fn service(&self) -> anyhow::Result<&Arc<ServicePlan>> {
        self.plan.service(SERVICE).context("the definitions declare no service")
    }

    /// What a server says of a row that it answers by these events, as of these times.
    pub fn served(&self, rows: &[Answered]) -> anyhow::Result<Features> {
        let service = self.service()?;
        let mut answers = Vec::new();
        for input in &service.inputs {
            let types = input.view.features();
            let mut values: Vec<Vec<Value>> = vec![Vec::with_capacity(rows.len()); types.len()];
            let (mut statuses, mut event_times) = (Vec::new(), Vec::new());
            for row in rows {
                match &input.view.kind {
                    ViewPlanKind::AsOf { max_age, .. } => {
                        let found = as_of(&row.readings, row.at_views, *max_age, row.visibility());
                        let present = found.row.filter(|_| found.status == Status::Present);
                        for (feature, column) in values.iter_mut().enumerate() {
                            column.push(present.map_or(Value::Null, |row| row.values[feature].clone()));
                        }
                        statuses.push(found.status);
                        event_times.push(found.row.map(|row| row.times.event_time));
                    }
                    ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                        for (output, column) in outputs.iter().zip(&mut values) {
                            let aggregate = &aggregates[output.aggregate].aggregate;
                            let mut window = output.window;
                            window.length += row.longer_by_hops * window.hop.unwrap_or(0);
                            column.push(window_value(
                                &row.orders,
                                output.aggregate,
                                aggregate,
                                &window,
                                row.at_views,
                                row.visibility(),
                            ));
                        }
                        statuses.push(Status::Present);
                        event_times.push(None);
                    }
                }
            }
            for row in 0..rows.len() {
                for (name, value) in &rows[row].put {
                    if let Some(feature) = types.iter().position(|(of, ..)| format!("{}:{of}", input.alias) == *name) {
                        values[feature][row] = value.clone();
                    }
                }
            }
            let values = values.iter().zip(&types).map(|(column, (_, of, _))| Value::to_array(column, of));
            answers.push(ViewAnswer { values: values.collect(), statuses, event_times });
        }
        let given: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.asked.user))),
            Arc::new(Float64Array::from_iter_values(rows.iter().map(|row| row.distance))),
        ];
        let names: Vec<&str> = service.columns.iter().map(|column| column.name.as_str()).collect();
        anyhow::ensure!(names == ["user", "distance"], "the service takes {names:?}");
        let at: Vec<Micros> = rows.iter().map(|row| row.at_transforms).collect();
        let assembled = service.assemble(&answers, &given, &at)?;
        let statuses = assembled.statuses.iter().map(|statuses| statuses.iter().map(|status| *status as u8).collect());
        Ok(Features { values: assembled.columns, statuses: statuses.collect() })
    }

    /// A row with nothing wrong.
    pub fn clean(&self, asked: Asked) -> Answered {
        let user = asked.user as usize;
        let orders = self.streams[0][user].iter();
        let readings = self.streams[1][user].iter();
        let number = |x: f64| Value::Float64(x);
        Answered {
            asked,
            at_views: asked.at,
            at_transforms: asked.at,
            applied: asked.applied,
            distance: asked.distance,
            longer_by_hops: 0,
            put: Vec::new(),
            orders: orders
                .map(|event| WindowEvent {
                    times: event.times(),
                    inputs: vec![
                        Value::Bool(true),
                        number(event.numbers[0]),
                        number(event.numbers[1]),
                        number(event.numbers[0]),
                    ],
                })
                .collect(),
            readings: readings
                .map(|event| Row {
                    times: event.times(),
                    deleted: false,
                    values: event.numbers.iter().map(|x| number(*x)).collect(),
                })
                .collect(),
        }
    }

    /// Writes the log as a gateway does, and takes away what was there.
    pub async fn log(&self, features: &Features) -> anyhow::Result<()> {
        let service = self.service()?;
        let project = self.engine.project_path();
        for file in serving_log::files(&self.store, &project, SERVICE, Micros::MIN, Micros::MAX).await? {
            self.store.delete(&file.path).await?;
        }
        let schema = LogSchema::of(service, &[]);
        let rows = self.asked.len();
        for (number, start) in (0..rows).step_by(FILE_ROWS).enumerate() {
            let asked = &self.asked[start..rows.min(start + FILE_ROWS)];
            let columns = schema.schema.fields().iter().map(|field| {
                self.column(service, features, field.name(), field.data_type(), field.is_nullable(), start, asked)
            });
            let batch = RecordBatch::try_new(schema.schema.clone(), columns.collect::<anyhow::Result<_>>()?)?;
            let (first, last) = (asked.iter().map(|row| row.at).min(), asked.iter().map(|row| row.at).max());
            let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
            let header = Header {
                format: serving_log::FORMAT,
                project: PROJECT.into(),
                gateway: "127.0.0.1:7400".into(),
                incarnation: "bench".into(),
                service: SERVICE.into(),
                semantic_digest: service.semantic_digest.to_string(),
                model: None,
                hashed: schema.hashed.clone(),
                first_at: first,
                last_at: last,
                first_time: first,
                last_time: last,
                rows: asked.len() as u64,
            };
            let name = FileName { first_at: first, last_at: last, incarnation: "bench".into(), number: number as u64 };
            let mut bytes = Vec::new();
            serving_log::encode(&header, &schema.schema, &[batch], &mut bytes)?;
            let path = Place::of(SERVICE, first).folder(&project).join(name.to_string());
            self.store.put(&path, bytes.into()).await?;
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "a column of a file")]
    fn column(
        &self,
        service: &ServicePlan,
        features: &Features,
        name: &str,
        of: &DataType,
        nullable: bool,
        start: usize,
        asked: &[Asked],
    ) -> anyhow::Result<ArrayRef> {
        let rows = asked.len();
        let time = |time: &dyn Fn(&Asked) -> Micros| -> ArrayRef {
            let times = asked.iter().map(time).collect::<Vec<_>>();
            Arc::new(TimestampMicrosecondArray::from(times).with_timezone("UTC"))
        };
        let position = |alias: &str| asked.iter().map(|row| self.position(row, alias)).collect::<Vec<_>>();
        let output = |name: &str| service.output(name).with_context(|| format!("the service has no feature {name}"));
        Ok(match name.split_once(':') {
            Some(("in", "user")) => Arc::new(Int64Array::from_iter_values(asked.iter().map(|row| row.user))),
            Some(("in", _)) => Arc::new(Float64Array::from_iter_values(asked.iter().map(|row| row.distance))),
            Some(("feature", feature)) => features.values[output(feature)?].slice(start, rows),
            Some(("status", feature)) => {
                Arc::new(UInt8Array::from(features.statuses[output(feature)?][start..start + rows].to_vec()))
            }
            Some(("position_time", alias)) => {
                Arc::new(position(alias).iter().map(|at| at.map(|at| at.time)).collect::<Int64Array>())
            }
            Some(("position_sequence", alias)) => {
                Arc::new(position(alias).iter().map(|at| at.map(|at| at.sequence)).collect::<UInt64Array>())
            }
            _ => match (name, of) {
                ("request_id", _) => {
                    Arc::new((start..start + rows).map(|row| Some(row.to_string())).collect::<StringArray>())
                }
                ("at" | "time", _) => time(&|row| row.at),
                (_, DataType::Utf8) if !nullable => Arc::new(StringArray::from(vec!["features"; rows])),
                (_, DataType::UInt32) if !nullable => Arc::new(UInt32Array::from(vec![0; rows])),
                (_, DataType::UInt8) if !nullable => Arc::new(UInt8Array::from(vec![1; rows])),
                _ => new_null_array(of, rows),
            },
        })
    }

    /// What an online store names as applied: the row that it holds, or the last event of its tiles.
    fn position(&self, row: &Asked, alias: &str) -> Option<Position> {
        let stream = usize::from(alias == "reading");
        let applied = self.streams[stream][row.user as usize].iter().filter(|event| event.position <= row.applied);
        match alias {
            "reading" => applied.max_by_key(|event| (event.time, event.position)).map(|event| event.position),
            _ => applied.map(|event| event.position).max(),
        }
    }
}

/// A row, and everything that a fault may do to how it is answered.
#[derive(Debug, Clone)]
pub struct Answered {
    pub asked: Asked,
    pub at_views: Micros,
    pub at_transforms: Micros,
    pub applied: Position,
    pub distance: f64,
    pub longer_by_hops: i64,
    /// Values in place of what views answer.
    pub put: Vec<(String, Value)>,
    pub orders: Vec<WindowEvent>,
    pub readings: Vec<Row>,
}

impl Answered {
    fn visibility(&self) -> Visibility {
        Visibility::AsKnown(self.applied, catalog::Visibility::Known)
    }
}

/// What was served of all rows, by feature.
#[derive(Debug, Clone)]
pub struct Features {
    pub values: Vec<ArrayRef>,
    pub statuses: Vec<Vec<u8>>,
}

impl Features {
    /// Whether a row of one differs from a row of another, feature by feature.
    pub fn differences(&self, row: usize, other: &Features, other_row: usize) -> usize {
        (0..self.values.len())
            .filter(|feature| {
                let (one, two) = (&self.values[*feature], &other.values[*feature]);
                // Equality of Arrow's data is equality of bits.
                one.slice(row, 1).to_data() != two.slice(other_row, 1).to_data()
                    || self.statuses[*feature][row] != other.statuses[*feature][other_row]
            })
            .count()
    }

    /// Puts rows of another in places of this one.
    pub fn put(&mut self, places: &[usize], rows: &Features) -> anyhow::Result<()> {
        for feature in 0..self.values.len() {
            let mut from: Vec<(usize, usize)> = (0..self.values[feature].len()).map(|row| (0, row)).collect();
            for (row, place) in places.iter().enumerate() {
                from[*place] = (1, row);
                self.statuses[feature][*place] = rows.statuses[feature][row];
            }
            let both: [&dyn Array; 2] = [&self.values[feature], &rows.values[feature]];
            self.values[feature] = arrow::compute::interleave(&both, &from)?;
        }
        Ok(())
    }
}

/// Events of all users in the order of their positions.
fn events(random: &mut SmallRng, size: Size, are_orders: bool) -> Vec<Event> {
    let mut events = Vec::with_capacity(size.events * size.users as usize);
    for user in 0..size.users {
        for _ in 0..size.events {
            let time = BEGIN + random.random_range(0..BEFORE + SERVED);
            let arrived = time + random.random_range(0..ARRIVAL_MAX);
            let numbers = if are_orders {
                [f64::from(random.random_range(100..20_000)) / 100.0, f64::from(random.random_range(1..9))]
            } else {
                [f64::from(random.random_range(-150..400)) / 10.0, random.random_range(0.0..1.0)]
            };
            events.push(Event { user, time, position: Position { time: arrived, sequence: 0 }, numbers });
        }
    }
    events.sort_by_key(|event| event.position.time);
    (1..).zip(&mut events).for_each(|(sequence, event)| event.position.sequence = sequence);
    events
}

async fn write(
    engine: &Engine,
    source: &Arc<feature_defs::plan::SourcePlan>,
    events: &[Event],
    [first, second]: [&str; 2],
) -> anyhow::Result<()> {
    const APPEND_ROWS: usize = 200_000;
    let mut history = History::open(engine.store().clone(), engine.project_path(), &source.name).await?;
    let time = source.event_time.as_deref().context("a stream has event times")?;
    for events in events.chunks(APPEND_ROWS) {
        let numbers = |i: usize| Arc::new(Float64Array::from_iter_values(events.iter().map(|event| event.numbers[i])));
        let times: Vec<Micros> = events.iter().map(|event| event.time).collect();
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("user", Arc::new(Int64Array::from_iter_values(events.iter().map(|event| event.user))) as ArrayRef, true),
            (first, numbers(0), true),
            (second, numbers(1), true),
            (time, Arc::new(TimestampMicrosecondArray::from(times).with_timezone("UTC")), true),
        ])?;
        let positions = events.iter().map(|event| event.position).collect();
        history.append(source, &[Positioned { batch, positions }], BEGIN).await?;
    }
    Ok(())
}
