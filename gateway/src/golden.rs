//! Golden rows: inputs with the outputs that the training process got for them, and what is made of them.
//!
//! The file is Arrow IPC (the file format). Every declared input is a column `input:<name>` and every output a column
//! `output:<name>`, each a fixed-size list of the declared dtype without nulls, or the dtype itself where there is one number
//! per row. The schema's metadata may say `coeval.tolerance`: JSON, `{"float32": {"rtol": 1e-4, "atol": 1e-5}}`.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int32Type, Int64Type};
use arrow::ipc::reader::FileReader;
use bytes::Bytes;
use inference::check::{self, Integers, MADE_UP_ROWS, Tolerance, Tolerances};
use inference::executor::{InferError, ModelServer};
use inference::model::{ModelError, ModelSpec};
use inference::tensor::{Dtype, Tensor, TensorBatch, TensorData};
use serde::Deserialize;

use crate::status::{Failure, Kind};

/// The largest file of golden rows, and the most rows. Each is run by itself whenever the model is loaded.
pub const BYTES_MAX: usize = 16 << 20;
pub const ROWS_MAX: usize = 256;
/// The most rows that one round of the timer runs.
const ROUND_ROWS_MAX: usize = 8;
/// How long a check waits for its turn behind requests.
const CHECK_DEADLINE: Duration = Duration::from_secs(20);
/// Rows that are run twice, to learn whether the model answers the same twice.
const TWICE: usize = 4;

const TOLERANCE: &str = "coeval.tolerance";

/// Golden rows as they were read.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    rows: Vec<Row>,
    tolerances: Tolerances,
}

/// One row, and what it should come to.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    inputs: TensorBatch,
    outputs: Vec<Tensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SaidTolerance {
    rtol: f64,
    atol: f64,
}

/// Reads golden rows off the threads that answer requests: whatever the bytes are, the worst is an error.
pub async fn read(bytes: Bytes, spec: ModelSpec) -> Result<Golden, Failure> {
    let read = tokio::task::spawn_blocking(move || parse(&bytes, &spec)).await;
    let read = read.unwrap_or_else(|_| Err("it is not an Arrow IPC file that can be read".to_owned()));
    read.map_err(|reason| Failure::invalid(format!("the golden rows cannot be used: {reason}")))
}

fn parse(bytes: &[u8], spec: &ModelSpec) -> Result<Golden, String> {
    let reader = FileReader::try_new(Cursor::new(bytes), None);
    let reader = reader.map_err(|error| format!("the file is not in the Arrow IPC file format: {error}"))?;
    let schema = reader.schema();
    let batches = reader.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    let count: usize = batches.iter().map(|batch| batch.num_rows()).sum();
    if count == 0 || count > ROWS_MAX {
        return Err(format!("there are {count} rows; send 1 to {ROWS_MAX}"));
    }
    let batch = concat_batches(&schema, &batches).map_err(|error| error.to_string())?;
    let mut tolerances = Tolerances::default();
    if let Some(text) = schema.metadata().get(TOLERANCE) {
        let said: BTreeMap<String, SaidTolerance> =
            serde_json::from_str(text).map_err(|error| format!("its `{TOLERANCE}` cannot be read: {error}"))?;
        for (name, SaidTolerance { rtol, atol }) in said {
            let dtype = Dtype::from_name(&name).ok_or_else(|| format!("`{TOLERANCE}` names the dtype `{name}`"))?;
            if !(rtol >= 0.0 && atol >= 0.0 && rtol.is_finite() && atol.is_finite()) {
                return Err(format!("the tolerance of {name} must be finite and not negative"));
            }
            tolerances = tolerances.with(dtype, Tolerance { rtol, atol });
        }
    }
    let column = |name: String| {
        let names = || schema.fields().iter().map(|field| format!("`{}`", field.name())).collect::<Vec<_>>().join(", ");
        batch.column_by_name(&name).ok_or_else(|| format!("there is no column `{name}`; it has {}", names()))
    };
    let expected = spec.inputs.len() + spec.outputs.len();
    if schema.fields().len() != expected {
        return Err(format!(
            "it has {} columns where the model has {expected} inputs and outputs",
            schema.fields().len()
        ));
    }
    let mut inputs = Vec::with_capacity(spec.inputs.len());
    for input in &spec.inputs {
        let name = format!("input:{}", input.name);
        let tensor = tensor(&name, column(name.clone())?, input.dtype)?;
        let width: usize = input.row_shape.iter().product();
        if tensor.row_shape() != [width] {
            return Err(format!("`{name}` has {:?} numbers per row, but the model takes {width}", tensor.row_shape()));
        }
        inputs.push((input.name.clone(), tensor));
    }
    let mut outputs = Vec::with_capacity(spec.outputs.len());
    for output in &spec.outputs {
        let name = format!("output:{}", output.name);
        outputs.push(tensor(&name, column(name.clone())?, output.dtype)?.squeeze_single_column());
    }
    let row = |row: usize| Row {
        inputs: inputs.iter().map(|(name, tensor)| (name.clone(), tensor.slice_rows(row..row + 1))).collect(),
        outputs: outputs.iter().map(|tensor| tensor.slice_rows(row..row + 1)).collect(),
    };
    Ok(Golden { rows: (0..count).map(row).collect(), tolerances })
}

/// A column as `[rows, width]`.
fn tensor(name: &str, column: &ArrayRef, dtype: Dtype) -> Result<Tensor, String> {
    let rows = column.len();
    let (values, width) = match column.data_type() {
        DataType::FixedSizeList(_, width) => {
            let list = column.as_fixed_size_list();
            let width = usize::try_from(*width).unwrap_or(0);
            if list.null_count() > 0 {
                return Err(format!("`{name}` has nulls"));
            }
            (list.values().slice(list.value_offset(0) as usize, rows * width), width)
        }
        _ => (column.clone(), 1),
    };
    if values.null_count() > 0 {
        return Err(format!("`{name}` has nulls"));
    }
    let wrong = || format!("`{name}` is {}, but the model declares {dtype}", values.data_type());
    let data = match dtype {
        Dtype::Float32 => {
            TensorData::Float32(values.as_primitive_opt::<Float32Type>().ok_or_else(wrong)?.values().to_vec())
        }
        Dtype::Float64 => {
            TensorData::Float64(values.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.values().to_vec())
        }
        Dtype::Int64 => TensorData::Int64(values.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.values().to_vec()),
        Dtype::Int32 => TensorData::Int32(values.as_primitive_opt::<Int32Type>().ok_or_else(wrong)?.values().to_vec()),
        Dtype::Bool => TensorData::Bool(values.as_boolean_opt().ok_or_else(wrong)?.values().iter().collect()),
    };
    Tensor::try_new(vec![rows, width], data).map_err(|error| format!("`{name}`: {error}"))
}

/// What checking found.
#[derive(Debug)]
pub struct Checked {
    pub checks: Checks,
    /// How rows influence each other; the model must not be served in batches then.
    pub influence: Option<String>,
}

/// What is checked again and again of a model that is served.
#[derive(Debug, Default)]
pub struct Checks {
    rows: Vec<Row>,
    tolerances: Tolerances,
    /// Whether the training process sent them.
    pub golden: bool,
    /// Whether the model answered the same twice.
    pub is_steady: bool,
    /// What whoever deploys the version should know.
    pub notes: Vec<String>,
    next: AtomicUsize,
    /// Why the last round failed; None after one that did not.
    problem: Mutex<Option<String>>,
}

/// What came of a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Round {
    Passed,
    Failed(String),
    /// The model had no room for it.
    Skipped(String),
}

impl Round {
    pub fn name(&self) -> &'static str {
        match self {
            Round::Passed => "passed",
            Round::Failed(_) => "failed",
            Round::Skipped(_) => "skipped",
        }
    }
}

/// Compares golden rows with what a model that nobody uses yet gives for them, and every padded batch size with a batch of
/// one.
pub async fn check(server: &ModelServer, golden: Option<&Golden>) -> Result<Checked, Failure> {
    let spec = server.spec();
    let tolerances = golden.map(|golden| golden.tolerances.clone()).unwrap_or_default();
    let mut rows: Vec<Row> = Vec::new();
    for (number, row) in golden.iter().flat_map(|golden| &golden.rows).enumerate() {
        let found = run(server, row.inputs.clone()).await.map_err(|error| refused(format!("row {number}: {error}")))?;
        check::compare(&spec.outputs, &found, &row.outputs, &[number], &tolerances)
            .map_err(|difference| refused(difference.to_string()))?;
        // What it gives here, not what it should: a batch must not change a row, however close the row came.
        rows.push(Row { inputs: row.inputs.clone(), outputs: found });
    }
    for seed in 0..MADE_UP_ROWS as u64 {
        rows.extend(made_up(server, seed).await?);
    }
    let mut notes = Vec::new();
    let steady = answers_twice(server, &rows, &tolerances).await?;
    if let Some(difference) = &steady {
        notes.push(format!(
            "the same row does not come out the same twice ({difference}): if that is not meant, call `eval()` before the model \
             is exported; its rows are not checked"
        ));
    }
    let mut influence = None;
    if steady.is_none() {
        for size in server.limits().padded_sizes().into_iter().filter(|size| *size > 1) {
            influence = influenced(server, &rows, size, &tolerances).await?;
            if influence.is_some() {
                break;
            }
        }
    }
    let kept = match golden {
        Some(golden) => golden.rows.clone(),
        None if steady.is_some() => Vec::new(),
        None => rows,
    };
    let checks = Checks {
        rows: kept,
        tolerances,
        golden: golden.is_some(),
        is_steady: steady.is_none(),
        notes,
        ..Checks::default()
    };
    Ok(Checked { checks, influence })
}

fn refused(reason: String) -> Failure {
    Failure::new(Kind::Precondition, format!("the model does not give what it gave where it was trained: {reason}"))
}

async fn run(server: &ModelServer, inputs: TensorBatch) -> Result<Vec<Tensor>, InferError> {
    let outcome = server.check(inputs, Instant::now() + CHECK_DEADLINE).await?;
    Ok(outcome.outputs.into_iter().map(|(_, tensor)| tensor).collect())
}

/// A row that the model can take, with what it gives for it. None where it fails on every row that is made up: warm-up has
/// shown that it can take zeros, and more is not known of its inputs.
async fn made_up(server: &ModelServer, seed: u64) -> Result<Option<Row>, Failure> {
    for integers in [Integers::Small, Integers::Zero] {
        let inputs = check::make_up(server.spec(), seed, integers);
        match run(server, inputs.clone()).await {
            Ok(outputs) => return Ok(Some(Row { inputs, outputs })),
            Err(InferError::Model(ModelError::Runtime(_))) => {}
            Err(error) => return Err(Failure::new(Kind::Precondition, format!("it failed on made-up rows: {error}"))),
        }
    }
    Ok(None)
}

/// Where the first rows do not come out the same twice.
async fn answers_twice(server: &ModelServer, rows: &[Row], tolerances: &Tolerances) -> Result<Option<String>, Failure> {
    for (number, row) in rows.iter().enumerate().take(TWICE) {
        let again = run(server, row.inputs.clone()).await;
        let again = again.map_err(|error| Failure::new(Kind::Precondition, error.to_string()))?;
        let compared = check::compare(&server.spec().outputs, &again, &row.outputs, &[number], tolerances);
        if let Err(difference) = compared {
            return Ok(Some(difference.to_string()));
        }
    }
    Ok(None)
}

/// How the rows of a batch of one size influence each other, if they do. Each row has others as neighbours in each size.
async fn influenced(
    server: &ModelServer,
    rows: &[Row],
    size: usize,
    tolerances: &Tolerances,
) -> Result<Option<String>, Failure> {
    if rows.is_empty() {
        return Ok(None);
    }
    let chosen: Vec<usize> = (0..size).map(|place| (place + size) % rows.len()).collect();
    let inputs = check::join(&chosen.iter().map(|row| &rows[*row].inputs).collect::<Vec<_>>());
    let together = match run(server, inputs).await {
        Ok(outputs) => outputs,
        Err(InferError::Model(ModelError::Runtime(error))) => {
            return Ok(Some(format!("in a batch of {size}, rows fail that do not fail alone: {error}")));
        }
        Err(error) => return Err(Failure::new(Kind::Precondition, format!("a batch of {size} rows failed: {error}"))),
    };
    for (place, row) in chosen.iter().enumerate() {
        let found: Vec<Tensor> = together.iter().map(|tensor| tensor.slice_rows(place..place + 1)).collect();
        if let Err(difference) =
            check::compare(&server.spec().outputs, &found, &rows[*row].outputs, &[*row], tolerances)
        {
            return Ok(Some(format!("in a batch of {size}, {difference}")));
        }
    }
    Ok(None)
}

impl Checks {
    /// Why the last round failed, if it did.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says that the model is served without batches, and why.
    pub fn unbatched(&mut self, influence: &str) {
        self.notes.push(format!(
            "rows influence each other ({influence}), so it is served one row at a time; if that is not meant, call `eval()` \
             before the model is exported, and keep to operations on single rows"
        ));
    }

    /// How close outputs have to be to be the same.
    pub fn tolerances(&self) -> &Tolerances {
        &self.tolerances
    }

    /// Whether there is anything to check.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Runs some of the rows, the next ones each time, beside what is asked.
    pub async fn round(&self, server: &ModelServer) -> Round {
        let mut round = Round::Passed;
        for _ in 0..self.rows.len().min(ROUND_ROWS_MAX) {
            let number = self.next.fetch_add(1, Ordering::Relaxed) % self.rows.len();
            let row = &self.rows[number];
            let found = match run(server, row.inputs.clone()).await {
                Ok(found) => found,
                Err(error @ InferError::Model(_)) => {
                    round = Round::Failed(format!("row {number} failed: {error}"));
                    break;
                }
                Err(error) => return Round::Skipped(error.to_string()),
            };
            let compared = check::compare(&server.spec().outputs, &found, &row.outputs, &[number], &self.tolerances);
            if let Err(difference) = compared {
                round = Round::Failed(difference.to_string());
                break;
            }
        }
        let what = if self.golden { "golden" } else { "made-up" };
        let problem = match &round {
            Round::Failed(reason) => Some(format!("its check of {what} rows fails: {reason}")),
            _ => None,
        };
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
        round
    }
}

#[cfg(test)]
mod tests;
