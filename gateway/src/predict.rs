//! From features to predictions, with an outcome for every row.
//!
//! One bad row does not fail the others: a row that a model cannot take, or that came too late, gets the declared fallback
//! or none, and says why. Only rows that can be answered go to the model; when the model fails on several rows at once, they
//! are halved until the rows it fails on are alone. A fallback that is a model is asked for the rows left, with what it needs
//! of the time kept back for it; what it cannot answer either gets its fallback in turn.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arrow::array::ArrayRef;
use feature_defs::plan::{EncodedInput, InputValues, ModelPlan, ServicePlan, TensorType};
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value};
use inference::batch::{WaitReason, Waited};
use inference::executor::{InferError, Outcome};
use inference::model::{InputSpec, ModelError, ModelSpec, OutputSpec};
use inference::tensor::{Dtype, Tensor, TensorData};
use proto::v1;

use crate::answer::Gateway;
use crate::convert;
use crate::features::Features;
use crate::follow::Served;
use crate::request::{self, Rows};
use crate::response_cache::Caching;
use crate::status::Failure;
use crate::versions::ServedModel;

/// The answers to the rows of a request.
#[derive(Debug)]
pub struct Predicted {
    /// Declared outputs, then `post` expressions.
    pub outputs: Vec<(String, ArrayRef, Type)>,
    pub rows: Vec<RowOutcome>,
    /// What the model was given, whoever answered in the end.
    pub encoded: Vec<EncodedInput>,
    pub queue_time: Duration,
    pub forward_time: Duration,
}

impl Predicted {
    /// The columns of the answer.
    pub fn columns(&self) -> Vec<v1::Column> {
        self.outputs.iter().map(|(name, array, value_type)| convert::from_array(name, array, value_type)).collect()
    }
}

/// What became of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowOutcome {
    pub status: RowStatus,
    /// Empty when the model answered.
    pub reason: String,
    /// Why the model did not answer, in one word for the metrics.
    pub cause: Option<Cause>,
    /// None where the row did not reach the model.
    pub waited: Option<Waited>,
    /// The model was not asked: it has answered the same inputs before.
    pub cached: bool,
}

/// Why a model did not answer a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The request lacks what the model's service needs.
    Incomplete,
    /// A feature is null, and the model refuses that.
    Missing,
    /// The queue was full, or the request larger than it.
    QueueFull,
    /// There was not enough time left.
    Deadline,
    /// The breaker is open.
    Breaker,
    /// Memory is short.
    Memory,
    /// The model failed on it.
    Model,
    /// There was no memory for it, also not for it alone.
    OutOfMemory,
    /// The model returned NaN for it.
    NotANumber,
    /// No executor has a working model.
    Unavailable,
    /// The model is turned off.
    Off,
    /// The version is taken out of the traffic.
    Stopped,
}

impl Cause {
    pub fn name(self) -> &'static str {
        match self {
            Cause::Incomplete => "incomplete",
            Cause::Missing => "missing",
            Cause::QueueFull => "queue_full",
            Cause::Deadline => "deadline",
            Cause::Breaker => "breaker",
            Cause::Memory => "memory",
            Cause::Model => "model",
            Cause::OutOfMemory => "out_of_memory",
            Cause::NotANumber => "nan",
            Cause::Unavailable => "unavailable",
            Cause::Off => "off",
            Cause::Stopped => "stopped",
        }
    }

    fn of(error: &InferError) -> Cause {
        match error {
            InferError::QueueFull { .. } | InferError::QueueBytesFull { .. } | InferError::TooLarge { .. } => {
                Cause::QueueFull
            }
            InferError::Expired | InferError::TooLate { .. } | InferError::Dropped => Cause::Deadline,
            InferError::BreakerOpen { .. } | InferError::DeviceBreakerOpen { .. } => Cause::Breaker,
            InferError::MemoryShort { .. } => Cause::Memory,
            InferError::Model(ModelError::OutOfMemory(_)) => Cause::OutOfMemory,
            InferError::Model(_) => Cause::Model,
            InferError::ShuttingDown | InferError::Unavailable(_) => Cause::Unavailable,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowStatus {
    Answered,
    Fallback,
    Failed,
}

impl RowStatus {
    pub fn name(self) -> &'static str {
        match self {
            RowStatus::Answered => "ok",
            RowStatus::Fallback => "fallback",
            RowStatus::Failed => "failed",
        }
    }
}

impl RowOutcome {
    /// `arm` is why that version was asked.
    pub fn to_proto(&self, version: u32, arm: &str) -> v1::RowOutcome {
        let waited = self.waited.unwrap_or_default();
        v1::RowOutcome {
            version,
            arm: arm.to_owned(),
            status: match self.status {
                RowStatus::Answered => v1::RowStatus::Ok,
                RowStatus::Fallback => v1::RowStatus::Fallback,
                RowStatus::Failed => v1::RowStatus::Failed,
            } as i32,
            reason: self.reason.clone(),
            wait_reason: match self.waited.map(|waited| waited.reason()) {
                None => v1::WaitReason::Unspecified,
                Some(WaitReason::None) => v1::WaitReason::None,
                Some(WaitReason::ExecutorBusy) => v1::WaitReason::ExecutorBusy,
                Some(WaitReason::Linger) => v1::WaitReason::Linger,
                Some(WaitReason::MemoryPermit) => v1::WaitReason::MemoryPermit,
                Some(WaitReason::Tier) => v1::WaitReason::Tier,
            } as i32,
            wait_us: micros(waited.whole),
            waits: Some(v1::WaitTimes {
                executor_busy_us: micros(waited.executor_busy),
                linger_us: micros(waited.linger),
                memory_permit_us: micros(waited.memory_permit),
                tier_us: micros(waited.tier),
            }),
            cached: self.cached,
        }
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// The signature that a plan declares.
pub fn spec_of(plan: &ModelPlan) -> ModelSpec {
    ModelSpec {
        inputs: plan
            .inputs
            .iter()
            .map(|input| InputSpec::features(&input.name, dtype(input.dtype), input.width))
            .collect(),
        outputs: plan
            .outputs
            .iter()
            .map(|output| OutputSpec { name: output.name.clone(), dtype: dtype(output.dtype) })
            .collect(),
    }
}

fn dtype(tensor_type: TensorType) -> Dtype {
    match tensor_type {
        TensorType::Float32 => Dtype::Float32,
        TensorType::Float64 => Dtype::Float64,
        TensorType::Int32 => Dtype::Int32,
        TensorType::Int64 => Dtype::Int64,
        TensorType::Bool => Dtype::Bool,
    }
}

/// The most of a request's time that is kept back for models that answer in place of others.
const RESERVE_SHARE: u32 = 2;
/// What a model that answers in place of another takes beside two of its forwards: its own features, and its queue.
const RESERVE_MIN: Duration = Duration::from_millis(2);

/// What rows of a request are answered with.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub gateway: &'a Gateway,
    pub served: &'a Served,
    pub model: &'a ServedModel,
    /// What the caller sent, of all rows of the request.
    pub sent: &'a Sent,
    /// Which of them `rows` and `at` are; none for all.
    pub of: Option<&'a [usize]>,
    pub rows: &'a Rows,
    /// As the caller said it.
    pub at: &'a [Micros],
    pub started: Instant,
    /// Of the whole answer.
    pub deadline: Instant,
    pub tier: usize,
    /// Answers what the model cannot, before its declared fallback does: of a version that is being tried, the champion.
    pub stand_in: Option<&'a ServedModel>,
    /// Why the model itself is not asked.
    pub instead: Option<(Cause, &'a str)>,
}

/// The columns of a request.
pub struct Sent {
    pub columns: Vec<v1::Column>,
    pub rows: usize,
}

/// A model of the chain of fallbacks, with the end of its time.
struct Step<'a> {
    model: &'a ServedModel,
    deadline: Instant,
}

impl Ask<'_> {
    /// The features of the model, and its answers with those of whoever answers in its place.
    pub async fn answer(&self) -> Result<(Features, Predicted), Failure> {
        let steps = self.steps();
        let Ask { model, rows, started, .. } = self;
        let own = steps.first().map_or(self.deadline, |step| step.deadline);
        // What the store has not said by then goes on as UNAVAILABLE: the model needs the rest, a quarter at least.
        let budget = own.saturating_duration_since(*started);
        let forward = model.server.forward_time(rows.count).clamp(budget / 4, budget / 4 * 3);
        let ready = self.gateway.prepared(&model.plan.service);
        let features = self.gateway.features(&ready, rows, self.at, own - forward).await?;
        let mut answers = match self.instead {
            None => ask(model, rows, &features, None, own, self.tier, Caching::Allowed).await?,
            Some((cause, reason)) => unasked(model, rows, &features, cause, reason),
        };
        for step in steps.get(1..).unwrap_or_default() {
            if answers.unanswered.is_empty() {
                break;
            }
            self.fall_back(step, &features, &mut answers).await;
        }
        if let Some(name) = steps.last().and_then(|step| step.model.plan.fallback_model.as_deref()) {
            let reason = format!("model `{name}`, which answers in its place, has no deployed version");
            answers.unanswered.values_mut().for_each(|unanswered| unanswered.add(&reason));
        }
        Ok((features, answers.finish()?))
    }

    /// The model, and those that answer in its place as far as they are deployed, each with the end of its time. The
    /// last one has until the deadline.
    fn steps(&self) -> Vec<Step<'_>> {
        let mut models: Vec<&ServedModel> = vec![self.model];
        models.extend(self.stand_in);
        // Circles are refused by the check; definitions of several ages could still make one.
        while let Some(name) = models.last().and_then(|last| last.plan.fallback_model.as_deref())
            && let Some(next) = self.served.models.get(name)
            && !models.iter().any(|model| model.name == next.name)
        {
            models.push(next);
        }
        let reserves = models.iter().skip(1).map(|model| model.server.forward_time(self.rows.count) * 2 + RESERVE_MIN);
        let reserves: Vec<Duration> = reserves.collect();
        let budget = self.deadline.saturating_duration_since(self.started);
        let whole: Duration = reserves.iter().sum();
        let shrink = if whole > budget / RESERVE_SHARE {
            (budget / RESERVE_SHARE).as_secs_f64() / whole.as_secs_f64()
        } else {
            1.0
        };
        let mut deadline = self.deadline;
        let mut steps = Vec::with_capacity(models.len());
        for (index, model) in models.into_iter().enumerate().rev() {
            steps.push(Step { model, deadline });
            if index > 0 {
                deadline -= reserves[index - 1].mul_f64(shrink);
            }
        }
        steps.reverse();
        steps
    }

    /// Lets another model answer the rows that have no answer. That it cannot is no reason to fail the request.
    async fn fall_back(&self, step: &Step<'_>, features: &Features, answers: &mut Answers<'_>) {
        let Step { model, deadline } = *step;
        let wanted: Vec<usize> = answers.unanswered.keys().copied().collect();
        let answered = match model.plan.service.semantic_digest == answers.plan.service.semantic_digest {
            true => {
                ask(model, self.rows, features, Some(&wanted), deadline, self.tier_of(model), Caching::Allowed).await
            }
            false => self.ask_with_its_own(model, &wanted, deadline).await,
        };
        match answered {
            Ok(others) => answers.adopt(model, others),
            Err(failure) => {
                let reason = format!("model `{}`: {}", model.name, failure.message);
                answers.unanswered.values_mut().for_each(|unanswered| unanswered.add(&reason));
            }
        }
    }

    async fn ask_with_its_own<'m>(
        &self,
        model: &'m ServedModel,
        wanted: &[usize],
        deadline: Instant,
    ) -> Result<Answers<'m>, Failure> {
        let service = &model.plan.service;
        let rows = self.rows_of(service)?;
        let forward = model.server.forward_time(wanted.len());
        let fetch_by = deadline.checked_sub(forward).unwrap_or(deadline);
        let ready = self.gateway.prepared(service);
        let features = self.gateway.features(&ready, &rows, self.at, fetch_by).await?;
        ask(model, &rows, &features, Some(wanted), deadline, self.tier_of(model), Caching::Allowed).await
    }

    /// The same rows as another service takes them.
    pub fn rows_of(&self, service: &ServicePlan) -> Result<Rows, Failure> {
        let takes = |column: &&v1::Column| service.columns.iter().any(|wanted| wanted.name == column.name);
        let sent: Vec<v1::Column> = self.sent.columns.iter().filter(takes).cloned().collect();
        let rows = request::read_rows(service, &sent, self.sent.rows)?;
        match self.of {
            Some(of) => rows.picked(of),
            None => Ok(rows),
        }
    }

    /// Another model may declare other tiers; what it does not know is the least important one.
    fn tier_of(&self, model: &ServedModel) -> usize {
        let name = self.model.plan.tiers.get(self.tier);
        let found = name.and_then(|name| model.plan.tiers.iter().position(|tier| tier == name));
        found.unwrap_or(model.plan.tiers.len().saturating_sub(1))
    }
}

/// Asks one model, by itself, for rows that nobody waits for: behind all that is asked by requests.
pub(crate) async fn behind_requests(
    model: &ServedModel,
    rows: &Rows,
    features: &Features,
    deadline: Instant,
) -> Result<Predicted, Failure> {
    let tier = model.plan.tiers.len().saturating_sub(1);
    ask(model, rows, features, None, deadline, tier, Caching::Never).await?.finish()
}

/// What a model that is not asked leaves to others.
fn unasked<'m>(model: &'m ServedModel, rows: &Rows, features: &Features, cause: Cause, reason: &str) -> Answers<'m> {
    let mut answers = Answers::new(&model.plan, rows.count);
    for (row, column) in &rows.incomplete {
        answers.fail(*row, incomplete(column));
    }
    for row in 0..rows.count {
        if answers.open(row) {
            answers.leave(row, cause, reason.to_owned());
        }
    }
    answers.encoded = model.plan.encode(&features.assembled, rows.count).inputs;
    answers
}

fn incomplete(column: &str) -> String {
    format!("request field `{column}` must not be null")
}

/// Asks one model for all rows, or for those wanted.
async fn ask<'m>(
    model: &'m ServedModel,
    rows: &Rows,
    features: &Features,
    wanted: Option<&[usize]>,
    deadline: Instant,
    tier: usize,
    caching: Caching,
) -> Result<Answers<'m>, Failure> {
    let plan = &*model.plan;
    let encoded = plan.encode(&features.assembled, rows.count);
    let mut answers = Answers::new(plan, rows.count);
    for (row, column) in &rows.incomplete {
        // The caller's mistake, and no reason to answer with anything.
        answers.fail(*row, incomplete(column));
    }
    for (row, reason) in encoded.refused {
        if answers.open(row) {
            answers.leave(row, Cause::Missing, reason);
        }
    }
    let all: Vec<usize> = match wanted {
        Some(wanted) => wanted.to_vec(),
        None => (0..rows.count).collect(),
    };
    let mut open: Vec<usize> = all.into_iter().filter(|row| answers.open(*row)).collect();
    let of_tensor = |error| Failure::internal("the features could not be made into tensors", &error);
    let mut looked_up = None;
    if let Some(responses) = model.responses.as_ref().filter(|_| caching == Caching::Allowed) {
        let (known, others) =
            responses.look_up(&encoded.inputs, &plan.service, &features.fetched, &open).map_err(of_tensor)?;
        known.iter().for_each(|(row, outputs)| answers.recall(*row, outputs));
        open.retain(|row| answers.open(*row));
        looked_up = Some(others);
    }
    let mut pending: Vec<Vec<usize>> = vec![open];
    while let Some(group) = pending.pop() {
        if group.is_empty() {
            continue;
        }
        let inputs = encoded.inputs.iter().map(|input| Ok((input.name.clone(), tensor(input, &group)?)));
        let inputs: Result<Vec<_>, inference::tensor::TensorError> = inputs.collect();
        let inputs = inputs.map_err(of_tensor)?;
        match model.server.submit_in_tier(inputs, deadline, tier).await {
            Ok(outcome) => {
                answers.take(&group, &outcome);
                if let Some(looked_up) = &looked_up {
                    let answered = group.iter().enumerate().filter(|(_, row)| answers.answered(**row));
                    answered.for_each(|(place, row)| looked_up.keep(*row, &outcome.outputs, place));
                }
            }
            Err(InferError::Model(ModelError::Runtime(_) | ModelError::OutOfMemory(_))) if group.len() > 1 => {
                let (first, second) = group.split_at(group.len() / 2);
                // The stack is taken from its end: rows are run in their order.
                pending.push(second.to_vec());
                pending.push(first.to_vec());
            }
            Err(error) => {
                let (cause, reason) = (Cause::of(&error), error.to_string());
                group.iter().for_each(|row| answers.leave(*row, cause, reason.clone()));
            }
        }
    }
    answers.encoded = encoded.inputs;
    Ok(answers)
}

pub(crate) fn tensor(input: &EncodedInput, rows: &[usize]) -> Result<Tensor, inference::tensor::TensorError> {
    let width = input.width;
    fn pick<T: Copy>(values: &[T], rows: &[usize], width: usize) -> Vec<T> {
        let mut picked = Vec::with_capacity(rows.len() * width);
        rows.iter().for_each(|row| picked.extend_from_slice(&values[row * width..(row + 1) * width]));
        picked
    }
    let data = match &input.values {
        InputValues::Float32(values) => TensorData::Float32(pick(values, rows, width)),
        InputValues::Float64(values) => TensorData::Float64(pick(values, rows, width)),
        InputValues::Int32(values) => TensorData::Int32(pick(values, rows, width)),
        InputValues::Int64(values) => TensorData::Int64(pick(values, rows, width)),
        InputValues::Bool(values) => TensorData::Bool(pick(values, rows, width)),
    };
    Tensor::try_new(vec![rows.len(), width], data)
}

/// Whether a row of an output has NaN.
fn has_nan(tensor: &Tensor, row: usize) -> bool {
    let width: usize = tensor.row_shape().iter().product();
    let range = row * width..(row + 1) * width;
    match tensor.data() {
        TensorData::Float32(values) => values[range].iter().any(|value| value.is_nan()),
        TensorData::Float64(values) => values[range].iter().any(|value| value.is_nan()),
        TensorData::Int32(_) | TensorData::Int64(_) | TensorData::Bool(_) => false,
    }
}

/// Why a row has no answer of the model.
struct Unanswered {
    cause: Cause,
    /// With what was tried since.
    reason: String,
}

impl Unanswered {
    fn add(&mut self, reason: &str) {
        self.reason = format!("{}; {reason}", self.reason);
    }
}

/// Answers under construction.
struct Answers<'a> {
    plan: &'a ModelPlan,
    /// By output and row; null until answered.
    values: Vec<Vec<Value>>,
    /// None until the row is settled.
    rows: Vec<Option<RowOutcome>>,
    /// Rows that a fallback is to answer, with the reason.
    unanswered: BTreeMap<usize, Unanswered>,
    /// How many values per row each output has: 1 unless the model gave more.
    widths: Vec<usize>,
    encoded: Vec<EncodedInput>,
    queue_time: Duration,
    forward_micros: u64,
}

impl<'a> Answers<'a> {
    fn new(plan: &'a ModelPlan, count: usize) -> Answers<'a> {
        Answers {
            plan,
            values: vec![vec![Value::Null; count]; plan.outputs.len()],
            rows: vec![None; count],
            unanswered: BTreeMap::new(),
            widths: vec![1; plan.outputs.len()],
            encoded: Vec::new(),
            queue_time: Duration::ZERO,
            forward_micros: 0,
        }
    }

    fn open(&self, row: usize) -> bool {
        self.rows[row].is_none() && !self.unanswered.contains_key(&row)
    }

    fn settle(&mut self, row: usize, status: RowStatus, cause: Cause, reason: String) {
        self.rows[row] = Some(RowOutcome { status, reason, cause: Some(cause), waited: None, cached: false });
    }

    fn fail(&mut self, row: usize, reason: String) {
        self.settle(row, RowStatus::Failed, Cause::Incomplete, reason);
    }

    /// Leaves a row to the fallbacks.
    fn leave(&mut self, row: usize, cause: Cause, reason: String) {
        self.unanswered.insert(row, Unanswered { cause, reason });
    }

    /// Takes over what another model answered in place of this one: by itself, or by its declared values.
    fn adopt(&mut self, model: &ServedModel, mut others: Answers<'_>) {
        others.declared_values();
        let place = |name: &str| others.plan.outputs.iter().position(|output| output.name == name);
        // The check refuses a fallback without one of the outputs.
        let places: Vec<Option<usize>> = self.plan.outputs.iter().map(|output| place(&output.name)).collect();
        let mut rest = BTreeMap::new();
        for (row, mut unanswered) in std::mem::take(&mut self.unanswered) {
            let Some(outcome) = others.rows[row].take().filter(|outcome| outcome.status != RowStatus::Failed) else {
                let theirs = others.unanswered.remove(&row).map(|theirs| theirs.reason);
                unanswered.add(&format!("model `{}`: {}", model.name, theirs.unwrap_or_default()));
                rest.insert(row, unanswered);
                continue;
            };
            for (index, place) in places.iter().enumerate() {
                if let Some(place) = place {
                    self.values[index][row] = std::mem::replace(&mut others.values[*place][row], Value::Null);
                    self.widths[index] = self.widths[index].max(others.widths[*place]);
                }
            }
            match outcome.status {
                RowStatus::Answered => {
                    unanswered.add(&format!("model `{}` version {} answered", model.name, model.version));
                }
                _ => unanswered.add(&format!("model `{}`: {}", model.name, outcome.reason)),
            }
            let Unanswered { cause, reason } = unanswered;
            let RowOutcome { waited, cached, .. } = outcome;
            self.rows[row] =
                Some(RowOutcome { status: RowStatus::Fallback, reason, cause: Some(cause), waited, cached });
        }
        self.unanswered = rest;
        self.queue_time += others.queue_time;
        self.forward_micros += others.forward_micros;
    }

    /// The declared values answer what has no answer, if there are any.
    fn declared_values(&mut self) {
        let Some(fallback) = &self.plan.fallback else { return };
        for (row, Unanswered { cause, reason }) in std::mem::take(&mut self.unanswered) {
            for ((output, value), values) in self.plan.outputs.iter().zip(fallback).zip(&mut self.values) {
                values[row] = number(output.dtype, *value);
            }
            self.settle(row, RowStatus::Fallback, cause, reason);
        }
    }

    fn answered(&self, row: usize) -> bool {
        self.rows[row].as_ref().is_some_and(|outcome| outcome.status == RowStatus::Answered)
    }

    /// What the model said to the same inputs before.
    fn recall(&mut self, row: usize, outputs: &[Tensor]) {
        for (index, tensor) in outputs.iter().enumerate() {
            self.set(index, row, tensor, 0);
        }
        self.rows[row] = Some(RowOutcome {
            status: RowStatus::Answered,
            reason: String::new(),
            cause: None,
            waited: None,
            cached: true,
        });
    }

    /// Takes one row of an output.
    fn set(&mut self, index: usize, row: usize, tensor: &Tensor, place: usize) {
        let width: usize = tensor.row_shape().iter().product();
        self.widths[index] = self.widths[index].max(width);
        self.values[index][row] = match tensor.row_shape() {
            [] => element(tensor.data(), place),
            _ => Value::List((place * width..(place + 1) * width).map(|i| element(tensor.data(), i)).collect()),
        };
    }

    fn take(&mut self, group: &[usize], outcome: &Outcome) {
        self.queue_time += outcome.waited.whole;
        self.forward_micros += outcome.forward_micros;
        for (index, (_, tensor)) in outcome.outputs.iter().enumerate() {
            for (place, row) in group.iter().enumerate() {
                self.set(index, *row, tensor, place);
            }
        }
        for (place, row) in group.iter().enumerate() {
            // No answer that anybody could decide by.
            if let Some((name, _)) = outcome.outputs.iter().find(|(_, tensor)| has_nan(tensor, place)) {
                self.values.iter_mut().for_each(|values| values[*row] = Value::Null);
                self.leave(*row, Cause::NotANumber, format!("the model returned NaN for `{name}`"));
                continue;
            }
            self.rows[*row] = Some(RowOutcome {
                status: RowStatus::Answered,
                reason: String::new(),
                cause: None,
                waited: Some(outcome.waited),
                cached: false,
            });
        }
    }

    fn finish(mut self) -> Result<Predicted, Failure> {
        self.declared_values();
        for (row, Unanswered { cause, reason }) in std::mem::take(&mut self.unanswered) {
            self.settle(row, RowStatus::Failed, cause, reason);
        }
        let count = self.rows.len();
        let mut arrays: Vec<(String, ArrayRef, Type)> = Vec::new();
        for (index, output) in self.plan.outputs.iter().enumerate() {
            let scalar = output.dtype.value_type();
            let (values, value_type) = match self.widths[index] {
                1 => (&self.values[index], scalar),
                width => {
                    // A fallback is one number; it stands for every element.
                    for value in &mut self.values[index] {
                        if !matches!(value, Value::List(_) | Value::Null) {
                            *value = Value::List(vec![value.clone(); width]);
                        }
                    }
                    (&self.values[index], Type::List(Box::new(scalar)))
                }
            };
            arrays.push((output.name.clone(), Value::to_array(values, &value_type), value_type));
        }
        for post in &self.plan.post {
            let columns: Vec<ArrayRef> = post.reads.iter().map(|read| arrays[*read].1.clone()).collect();
            let array = post.expression.evaluate(&columns, count).map_err(|error| {
                Failure::internal(&format!("the `post` expression `{}` could not be evaluated", post.name), &error)
            })?;
            arrays.push((post.name.clone(), array, post.feature_type.clone()));
        }
        let unsettled = || RowOutcome {
            status: RowStatus::Failed,
            reason: "the row was not answered".to_owned(),
            cause: None,
            waited: None,
            cached: false,
        };
        Ok(Predicted {
            outputs: arrays,
            encoded: self.encoded,
            rows: self.rows.into_iter().map(|row| row.unwrap_or_else(unsettled)).collect(),
            queue_time: self.queue_time,
            forward_time: Duration::from_micros(self.forward_micros),
        })
    }
}

fn number(dtype: TensorType, value: f64) -> Value {
    match dtype {
        TensorType::Float32 => Value::Float32(value as f32),
        TensorType::Float64 => Value::Float64(value),
        TensorType::Int32 => Value::Int32(value as i32),
        TensorType::Int64 => Value::Int64(value as i64),
        TensorType::Bool => Value::Bool(value != 0.0),
    }
}

fn element(data: &TensorData, index: usize) -> Value {
    match data {
        TensorData::Float32(values) => Value::Float32(values[index]),
        TensorData::Float64(values) => Value::Float64(values[index]),
        TensorData::Int64(values) => Value::Int64(values[index]),
        TensorData::Int32(values) => Value::Int32(values[index]),
        TensorData::Bool(values) => Value::Bool(values[index]),
    }
}
