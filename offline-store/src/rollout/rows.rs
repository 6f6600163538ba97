//! Rows of the serving log as a rollout's units need them: whose they are, under which stage and in which arm they were answered,
//! and what they are worth. A few dozen bytes each, so that a rollout's rows fit in memory, within a bound.
//!
//! Rows that were logged only because of a fallback are left out: they were chosen by their outcome. Those of sampled keys and
//! those that were chosen uniformly were not, so either are a fair sample of a unit's rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray, UInt8Array, UInt32Array,
};
use arrow::datatypes::{Int64Type, TimestampMicrosecondType, UInt8Type, UInt32Type};
use drift::sequential::exposure::Arm;
use feature_defs::plan::{ModelPlan, ServicePlan};
use feature_defs::time::{Micros, STATIC};
use feature_defs::value::{Type, Value, hash};
use object_store::ObjectStore;
use object_store::path::Path;
use registry::assignment::{KeyPart, Ramp, Standing, place};

use super::metric::{Metric, Outcome, Rate};
use super::{RolloutError, files};
use crate::labels::join::Index;
use crate::labels::report::{decisions, scores};
use crate::labels::{self};
use crate::serving_log::{self, LogRows, columns};

/// Rows of one rollout that are held in memory: some 50 bytes each, and 8 for every outcome.
pub const ROWS_MAX: usize = 2_000_000;
/// A label that is added later than this after its time does not count any more: what counts it must come to an end.
pub const LABELS_LATE: Micros = 3_600_000_000;
/// Stands for an outcome that is not known.
const UNKNOWN: f64 = -1.0;
/// Layer of units that no rollout has placed.
const NO_LAYER: &str = "coeval-traffic";

/// What a version is asked and judged by.
#[derive(Debug, Clone)]
pub struct VersionOf {
    pub number: u32,
    pub plan: Arc<ModelPlan>,
}

/// A stretch of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The entry of the control log that began it: counts are kept by it.
    pub entry: u64,
    /// From which time that rows are answered for it applies.
    pub from: Micros,
    pub kind: StageKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageKind {
    Shadow,
    /// The challenger's share, of 10,000 buckets.
    Canary(u16),
}

/// Who answered a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    Champion,
    Challenger,
    /// The challenger, and nobody was told.
    Shadow,
}

impl Who {
    fn named(arm: &str) -> Option<Who> {
        match arm {
            "champion" => Some(Who::Champion),
            "challenger" => Some(Who::Challenger),
            "shadow" => Some(Who::Shadow),
            _ => None,
        }
    }
}

/// Which rows, and what is asked of each.
pub struct Wanted<'a> {
    /// The champion first. Their plans say how scores, decisions and labels are read.
    pub versions: &'a [VersionOf],
    /// Columns of the request that are the unit; without any, every row is one.
    pub unit: &'a [String],
    /// Who is in which arm; None where nothing is tried yet.
    pub ramp: Option<&'a Ramp>,
    /// In order of time; at least one.
    pub stages: &'a [Stage],
    pub outcomes: &'a [Outcome],
    /// By the server's clock: no row was logged before.
    pub logged_from: Micros,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub unit: u64,
    pub at: Micros,
    /// Of the request and its row: the same in both arms of a shadow.
    pub id: u64,
    pub bucket: u16,
    pub stage: u16,
    pub who: Who,
    /// Where its outcomes begin.
    values: u32,
}

/// The rows of a rollout.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    pub(super) rows: Vec<Row>,
    values: Vec<f64>,
    outcomes: usize,
    /// The last time that any row of these services was answered for: what the log has come to.
    pub last_at: Option<Micros>,
    pub without_unit: u64,
    /// Rows whose arm is not the one that their unit has by the assignment, at any stage near: nobody knows whose they are.
    pub misplaced: u64,
    /// Files that could not be read, and why.
    pub damaged: Vec<String>,
}

/// How many of them are named.
const DAMAGED_MAX: usize = 10;

impl Rows {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// None where it is not known.
    pub(super) fn value(&self, row: &Row, outcome: usize) -> Option<f64> {
        let value = self.values[row.values as usize + outcome];
        (value != UNKNOWN).then_some(value)
    }

    /// In an order that does not depend on which file was read first: sums of floats hang on it.
    pub(super) fn sort(&mut self) {
        self.rows.sort_unstable_by_key(|row| (row.unit, row.at, row.who, row.id, row.values));
        // Of rows that are equal in all of that the order hangs on the files; their values are what tells them apart.
        let (values, outcomes) = (&self.values, self.outcomes);
        let of = |row: &Row| &values[row.values as usize..row.values as usize + outcomes];
        let key = |row: &Row| (row.unit, row.at, row.who, row.id);
        self.rows.chunk_by_mut(|a, b| key(a) == key(b)).filter(|same| same.len() > 1).for_each(|same| {
            same.sort_by(|a, b| of(a).iter().map(|x| x.to_bits()).cmp(of(b).iter().map(|x| x.to_bits())));
        });
    }
}

/// The labels that outcomes need, by version and outcome.
struct Labels {
    of_versions: Vec<Vec<Option<Arc<Index>>>>,
}

impl Labels {
    async fn read(store: &Arc<dyn ObjectStore>, project: &Path, wanted: &Wanted<'_>) -> Result<Labels, RolloutError> {
        let needs = wanted.outcomes.iter().any(|outcome| outcome.metric().is_some());
        let batches = match wanted.versions.first() {
            Some(version) if needs => labels::read(store, project, &version.plan).await?,
            _ => Vec::new(),
        };
        let mut made: BTreeMap<(String, String), Arc<Index>> = BTreeMap::new();
        let mut of_versions = Vec::new();
        for version in wanted.versions {
            let mut of_outcomes = Vec::new();
            for outcome in wanted.outcomes {
                let name = outcome.metric().and_then(|metric| match metric {
                    Metric::Added(name) => Some(name.as_str()),
                    _ => version.plan.label.as_ref().map(|label| label.name.as_str()),
                });
                let Some(name) = name else {
                    of_outcomes.push(None);
                    continue;
                };
                // Columns name the entities of labels: other definitions may have others.
                let key = (version.plan.service.semantic_digest.to_string(), name.to_owned());
                let index = match made.get(&key) {
                    Some(index) => index.clone(),
                    None => Arc::new(Index::first(&version.plan, &batches, name)?),
                };
                made.insert(key, index.clone());
                of_outcomes.push(Some(index));
            }
            of_versions.push(of_outcomes);
        }
        Ok(Labels { of_versions })
    }
}

/// Reads the rows of a rollout.
pub async fn read(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    model: &str,
    wanted: &Wanted<'_>,
) -> Result<Rows, RolloutError> {
    let labels = Labels::read(store, project, wanted).await?;
    let mut rows = Rows { outcomes: wanted.outcomes.len(), ..Rows::default() };
    let mut services: Vec<&ServicePlan> = Vec::new();
    for version in wanted.versions {
        let service = &*version.plan.service;
        check_unit(service, wanted.unit)?;
        if !services.iter().any(|known| known.name == service.name) {
            services.push(service);
        }
    }
    let from = wanted.stages.first().map_or(Micros::MIN, |stage| stage.from);
    for service in services {
        for file in files(store, project, &service.name, wanted.logged_from).await? {
            if file.name.last_at < from {
                continue;
            }
            let LogRows { header, batch } = match serving_log::read(store, &file).await {
                Ok(Some(read)) => read,
                Ok(None) => continue,
                Err(error @ serving_log::ServingLogError::Store { .. }) => return Err(error.into()),
                Err(error) => {
                    damaged(&mut rows, error.to_string());
                    continue;
                }
            };
            if header.model.as_deref() != Some(model) {
                continue;
            }
            rows.last_at = rows.last_at.max(Some(header.last_at));
            match rows.add(wanted, &labels, &batch) {
                Ok(()) => {}
                Err(RolloutError::Damaged { column }) => {
                    damaged(&mut rows, format!("{}: column `{column}`", file.path))
                }
                Err(error) => return Err(error),
            }
        }
    }
    rows.sort();
    Ok(rows)
}

fn damaged(rows: &mut Rows, what: String) {
    if rows.damaged.len() < DAMAGED_MAX {
        rows.damaged.push(what);
    }
}

fn check_unit(service: &ServicePlan, unit: &[String]) -> Result<(), RolloutError> {
    for name in unit {
        match service.columns.iter().find(|column| column.name == *name) {
            Some(column) if column.sensitive => return Err(RolloutError::Hashed { column: name.clone() }),
            Some(_) => {}
            None => {
                let known = service.columns.iter().map(|column| format!("`{}`", column.name)).collect::<Vec<_>>();
                let (service, known) = (service.name.to_string(), known.join(", "));
                return Err(RolloutError::NoUnit { service, column: name.clone(), known });
            }
        }
    }
    Ok(())
}

/// A file's columns, typed.
struct Logged<'a> {
    batch: &'a RecordBatch,
    at: &'a [Micros],
    time: &'a [Micros],
    ids: &'a StringArray,
    numbers: &'a UInt32Array,
    sampled: &'a StringArray,
    version: &'a UInt32Array,
    arm: &'a StringArray,
    status: &'a StringArray,
    cause: &'a StringArray,
    total: &'a UInt32Array,
}

impl<'a> Logged<'a> {
    fn of(batch: &'a RecordBatch) -> Result<Logged<'a>, RolloutError> {
        let damaged = |name: &str| RolloutError::Damaged { column: name.to_owned() };
        let texts = |name: &str| {
            let column = batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
            column.ok_or_else(|| damaged(name))
        };
        let numbers = |name: &str| {
            let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt32Type>());
            column.ok_or_else(|| damaged(name))
        };
        let times = |name: &str| {
            let column = batch.column_by_name(name);
            let column = column.and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>());
            column.filter(|column| column.null_count() == 0).ok_or_else(|| damaged(name))
        };
        Ok(Logged {
            batch,
            at: times(columns::AT)?.values(),
            time: times(columns::TIME)?.values(),
            ids: texts(columns::REQUEST_ID)?,
            numbers: numbers(columns::ROW)?,
            sampled: texts(columns::SAMPLED)?,
            version: numbers(columns::VERSION)?,
            arm: texts(columns::ARM)?,
            status: texts(columns::STATUS)?,
            cause: texts(columns::CAUSE)?,
            total: numbers(columns::TOTAL_US)?,
        })
    }

    /// Empty where the model answered.
    fn cause(&self, row: usize) -> &str {
        if self.cause.is_valid(row) { self.cause.value(row) } else { "" }
    }

    fn id(&self, row: usize) -> u64 {
        let mut bytes = self.ids.value(row).as_bytes().to_vec();
        bytes.extend(self.numbers.value(row).to_le_bytes());
        hash(&bytes)
    }
}

impl Rows {
    /// Adds what is wanted of one file.
    fn add(&mut self, wanted: &Wanted<'_>, labels: &Labels, batch: &RecordBatch) -> Result<(), RolloutError> {
        let logged = Logged::of(batch)?;
        let chosen: Vec<(usize, Who)> = (0..batch.num_rows())
            .filter(|row| logged.sampled.value(*row) != "fallback" && logged.arm.is_valid(*row))
            // What the caller left out no version could have answered.
            .filter(|row| logged.cause(*row) != "incomplete")
            .filter_map(|row| Some((row, Who::named(logged.arm.value(row))?)))
            .collect();
        if chosen.is_empty() {
            return Ok(());
        }
        if self.rows.len() + chosen.len() > ROWS_MAX {
            return Err(RolloutError::TooMany { most: ROWS_MAX });
        }
        let units = Units::of(wanted, batch)?;
        // A file is of one version, but for rows that another had to answer.
        let of_version = |row: usize, who: Who| {
            let number = logged.version.is_valid(row).then(|| logged.version.value(row));
            let found = wanted.versions.iter().position(|version| Some(version.number) == number);
            found.unwrap_or(if who == Who::Champion { 0 } else { wanted.versions.len() - 1 })
        };
        let of_versions = wanted.versions.iter().map(|_| None).collect();
        let mut values = Values { wanted, labels, logged: &logged, of_versions };
        for (row, who) in chosen {
            let Some((unit, mut bucket, stand)) = units.place(wanted, row, logged.id(row)) else {
                self.without_unit += u64::from(who != Who::Shadow);
                continue;
            };
            let Some(now) = wanted.stages.iter().rposition(|stage| stage.from <= logged.at[row]) else { continue };
            let stage = match &stand {
                None => {
                    bucket = 0;
                    Some(now)
                }
                Some(stand) => stage_of(wanted.stages, now, who, stand),
            };
            let Some(stage) = stage else {
                // Of units that are in no arm there are many, and nothing is wrong with them.
                self.misplaced += u64::from(stand.is_some_and(|stand| stand(BUCKETS).is_some()));
                continue;
            };
            let of = values.of(of_version(row, who))?;
            let begin = u32::try_from(self.values.len()).map_err(|_| RolloutError::TooMany { most: ROWS_MAX })?;
            self.values.extend(of.iter().map(|outcome| outcome[row].unwrap_or(UNKNOWN)));
            let (at, id) = (logged.at[row], logged.id(row));
            self.rows.push(Row { unit, at, id, bucket, stage: stage as u16, who, values: begin });
        }
        Ok(())
    }
}

const BUCKETS: u16 = registry::assignment::BUCKETS;

/// The stage that a row was answered under. Gateways hear of a stage a moment after it began, and their clocks differ: a row whose
/// arm is not that of the stage in force belongs to the one before it or after it, where it is.
fn stage_of(stages: &[Stage], now: usize, who: Who, stand: &dyn Fn(u16) -> Option<Arm>) -> Option<usize> {
    let fits = |stage: usize| match (stages.get(stage)?.kind, who) {
        (StageKind::Shadow, Who::Champion | Who::Shadow) => Some(stage),
        (StageKind::Canary(share), Who::Champion) => (stand(share)? == Arm::Champion).then_some(stage),
        (StageKind::Canary(share), Who::Challenger) => (stand(share)? == Arm::Challenger).then_some(stage),
        _ => None,
    };
    fits(now).or_else(|| now.checked_sub(1).and_then(fits)).or_else(|| fits(now + 1))
}

/// What names the unit of each row of a file.
struct Units {
    keys: Vec<(ArrayRef, Type)>,
}

type Stand<'a> = Box<dyn Fn(u16) -> Option<Arm> + 'a>;

impl Units {
    fn of(wanted: &Wanted<'_>, batch: &RecordBatch) -> Result<Units, RolloutError> {
        let service = wanted.versions.first().map(|version| &version.plan.service);
        let key = |name: &String| {
            let damaged = || RolloutError::Damaged { column: columns::input(name) };
            let planned = service.and_then(|service| service.columns.iter().find(|column| column.name == *name));
            let planned = planned.ok_or_else(damaged)?;
            let array = batch.column_by_name(&columns::input(name)).ok_or_else(damaged)?;
            match *array.data_type() == planned.column_type.arrow() {
                true => Ok((array.clone(), planned.column_type.clone())),
                false => Err(damaged()),
            }
        };
        Ok(Units { keys: wanted.unit.iter().map(key).collect::<Result<_, _>>()? })
    }

    /// The unit of a row, its bucket, and its arm by the challenger's share, where anything is tried. None without a unit.
    fn place<'a>(&self, wanted: &'a Wanted<'_>, row: usize, id: u64) -> Option<(u64, u16, Option<Stand<'a>>)> {
        if self.keys.is_empty() {
            let bucket = (id % u64::from(BUCKETS)) as u16;
            return Some((id, bucket, None));
        }
        let values: Vec<Value> =
            self.keys.iter().map(|(array, key_type)| Value::from_array(array, row, key_type)).collect();
        let parts: Vec<KeyPart<'_>> = values.iter().map(part).collect::<Option<_>>()?;
        let Some(ramp) = wanted.ramp else {
            let placed = place(NO_LAYER, &parts);
            return Some((placed.unit, placed.bucket, None));
        };
        let (standing, placed) = ramp.assign(&parts, 0);
        let stand: Stand<'a> = match standing {
            Standing::HeldOut | Standing::Elsewhere => Box::new(|_| None),
            _ => Box::new(move |share| match ramp.standing_of_bucket(placed.bucket, share) {
                Standing::Challenger => Some(Arm::Challenger),
                Standing::Champion => Some(Arm::Champion),
                Standing::HeldOut | Standing::Elsewhere => None,
            }),
        };
        Some((placed.unit, placed.bucket, Some(stand)))
    }
}

/// A part of a unit's key as the assignment takes it; None for null, and for types that are no keys.
pub fn part(value: &Value) -> Option<KeyPart<'_>> {
    match value {
        Value::String(text) => Some(KeyPart::Text(text)),
        Value::Int32(number) => Some(KeyPart::Integer(i64::from(*number))),
        Value::Int64(number) => Some(KeyPart::Integer(*number)),
        Value::Bool(truth) => Some(KeyPart::Boolean(*truth)),
        Value::Binary(bytes) => Some(KeyPart::Binary(bytes)),
        _ => None,
    }
}

/// What the rows of a file are worth, by the version whose plan reads them; worked out when it is first asked.
struct Values<'a> {
    wanted: &'a Wanted<'a>,
    labels: &'a Labels,
    logged: &'a Logged<'a>,
    of_versions: Vec<Option<OfRows>>,
}

/// By outcome, of every row of the file.
type OfRows = Vec<Vec<Option<f64>>>;

impl Values<'_> {
    fn of(&mut self, version: usize) -> Result<&OfRows, RolloutError> {
        let values = match self.of_versions[version].take() {
            Some(values) => values,
            None => self.work_out(version)?,
        };
        Ok(self.of_versions[version].insert(values))
    }

    fn work_out(&self, version: usize) -> Result<OfRows, RolloutError> {
        let Values { wanted, labels, logged, .. } = self;
        let (plan, batch) = (&wanted.versions[version].plan, logged.batch);
        let rows = batch.num_rows();
        let within = plan.label.as_ref().and_then(|label| label.within);
        let until: Vec<Micros> = match within {
            Some(within) => {
                logged.time.iter().map(|time| time.saturating_add(within).saturating_add(LABELS_LATE)).collect()
            }
            None => vec![Micros::MAX; rows],
        };
        let output = plan.outputs.first().map(|output| columns::output(&output.name)).unwrap_or_default();
        let scored: Option<Float64Array> = batch.column_by_name(&output).and_then(scores);
        let decided = decisions(plan, batch)?;
        let score = |row: usize| scored.as_ref().filter(|scores| scores.is_valid(row)).map(|scores| scores.value(row));
        let decision =
            |row: usize| decided.as_ref().filter(|decided| decided.is_valid(row)).map(|decided| decided.value(row));
        let mut all = Vec::new();
        for (outcome, index) in wanted.outcomes.iter().zip(&labels.of_versions[version]) {
            all.push(match (outcome, index) {
                (Outcome::Labelled { metric, .. }, Some(index)) => {
                    let requests = (logged.ids, logged.numbers);
                    let labels = index.first_known(plan, batch, requests, logged.at, within, &until);
                    let value = |(row, label): (usize, Option<f64>)| {
                        label.map(|label| outcome.scaled(metric.value(score(row), decision(row), label)))
                    };
                    labels.into_iter().enumerate().map(value).collect()
                }
                (Outcome::Labelled { .. }, None) => vec![None; rows],
                (Outcome::Happened(rate), _) => happened(*rate, plan, logged)?,
            });
        }
        Ok(all)
    }
}

fn happened(rate: Rate, plan: &ModelPlan, logged: &Logged<'_>) -> Result<Vec<Option<f64>>, RolloutError> {
    let rows = logged.batch.num_rows();
    let cause = |row: usize| logged.cause(row);
    let all = |is: &dyn Fn(usize) -> bool| (0..rows).map(|row| Some(f64::from(u8::from(is(row))))).collect();
    Ok(match rate {
        // As they are counted when a request is answered.
        Rate::Errors => all(&|row| logged.status.value(row) != "ok" && !matches!(cause(row), "incomplete" | "missing")),
        Rate::Fallbacks => all(&|row| logged.status.value(row) != "ok"),
        Rate::Nan => all(&|row| cause(row) == "nan"),
        Rate::SlowerThan(micros) => all(&|row| f64::from(logged.total.value(row)) > micros),
        Rate::Stale => {
            let stale = stale(plan, logged)?;
            all(&|row| stale[row])
        }
    })
}

/// Whether any view that has a `freshness` was older than that when a row was answered.
fn stale(plan: &ModelPlan, logged: &Logged<'_>) -> Result<Vec<bool>, RolloutError> {
    let mut stale = vec![false; logged.batch.num_rows()];
    for input in &plan.service.inputs {
        let Some(freshness) = input.view.freshness else { continue };
        let name = match input.view.is_windowed() {
            true => columns::position_time(&input.alias),
            false => columns::event_time(&input.alias),
        };
        let damaged = || RolloutError::Damaged { column: name.clone() };
        let column = logged.batch.column_by_name(&name).ok_or_else(damaged)?;
        let times: Int64Array = match column.as_primitive_opt::<TimestampMicrosecondType>() {
            Some(times) => times.reinterpret_cast::<Int64Type>(),
            None => column.as_primitive_opt::<Int64Type>().ok_or_else(damaged)?.clone(),
        };
        let reasons: Option<&UInt8Array> = logged
            .batch
            .column_by_name(&columns::reason(&input.alias))
            .and_then(|reasons| reasons.as_primitive_opt::<UInt8Type>());
        for (row, stale) in stale.iter_mut().enumerate() {
            let answered = times.is_valid(row) && reasons.is_none_or(|reasons| reasons.is_null(row));
            let time = if answered { times.value(row) } else { STATIC };
            *stale |= time != STATIC && logged.at[row].saturating_sub(time) > freshness;
        }
    }
    Ok(stale)
}
