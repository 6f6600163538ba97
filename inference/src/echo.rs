//! A deterministic model without a library behind it, so that queues, batches and everything above them can be
//! tested anywhere. Every output of a row is the sum of the row's inputs, whatever else is in the batch.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::model::{Artefact, LoadError, LoadOptions, Model, ModelError, ModelMemory, ModelSpec, Runtime};
use crate::tensor::{Dtype, Tensor, TensorData};

/// Called before every forward, warm-up included, with the padded inputs. It may block, fail or panic, like a model.
pub type Hook = Arc<dyn Fn(&[Tensor]) -> Result<(), ModelError> + Send + Sync>;

/// Loads echo models. The bytes of the artefact do not matter, unless they begin with "broken": then loading fails.
#[derive(Clone, Default)]
pub struct EchoRuntime {
    delay: Duration,
    hook: Option<Hook>,
    /// Of the weights, and of a row.
    memory: Option<(u64, u64)>,
    /// Bytes that every forward leaves behind.
    kept: u64,
}

impl EchoRuntime {
    pub fn new() -> EchoRuntime {
        EchoRuntime::default()
    }

    /// Every forward takes at least so long.
    pub fn with_delay(mut self, delay: Duration) -> EchoRuntime {
        self.delay = delay;
        self
    }

    pub fn with_hook(
        mut self,
        hook: impl Fn(&[Tensor]) -> Result<(), ModelError> + Send + Sync + 'static,
    ) -> EchoRuntime {
        self.hook = Some(Arc::new(hook));
        self
    }

    /// It says that it takes so much memory.
    pub fn with_memory(mut self, weight_bytes: u64, row_bytes: u64) -> EchoRuntime {
        self.memory = Some((weight_bytes, row_bytes));
        self
    }

    /// It says that every forward leaves so many bytes behind.
    pub fn with_leak(mut self, bytes: u64) -> EchoRuntime {
        self.kept = bytes;
        self
    }

    /// Every forward passes through the gate.
    pub fn with_gate(self, gate: Arc<Gate>) -> EchoRuntime {
        self.with_hook(move |_| {
            gate.pass();
            Ok(())
        })
    }
}

impl Runtime for EchoRuntime {
    fn load(&self, artefact: &Artefact, spec: &ModelSpec, _: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        if artefact.bytes.starts_with(b"broken") {
            return Err(LoadError::Invalid {
                origin: artefact.origin.clone(),
                reason: "it says it is broken".to_owned(),
            });
        }
        Ok(Box::new(Echo { runtime: self.clone(), spec: spec.clone(), last_rows: 0, forwards: 0 }))
    }
}

struct Echo {
    runtime: EchoRuntime,
    spec: ModelSpec,
    last_rows: usize,
    forwards: u64,
}

impl Model for Echo {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let rows = self.spec.check_inputs(inputs)?;
        self.last_rows = rows;
        self.forwards += 1;
        if let Some(hook) = &self.runtime.hook {
            hook(inputs)?;
        }
        if !self.runtime.delay.is_zero() {
            std::thread::sleep(self.runtime.delay);
        }
        let sums: Vec<f64> = (0..rows).map(|row| inputs.iter().map(|input| row_sum(input, row)).sum()).collect();
        let output = |dtype| match dtype {
            Dtype::Float32 => TensorData::Float32(sums.iter().map(|&sum| sum as f32).collect()),
            Dtype::Float64 => TensorData::Float64(sums.clone()),
            Dtype::Int64 => TensorData::Int64(sums.iter().map(|&sum| sum as i64).collect()),
            Dtype::Int32 => TensorData::Int32(sums.iter().map(|&sum| sum as i32).collect()),
            Dtype::Bool => TensorData::Bool(sums.iter().map(|&sum| sum != 0.0).collect()),
        };
        let outputs = self.spec.outputs.iter().map(|declared| Tensor::try_new(vec![rows], output(declared.dtype)));
        outputs.collect::<Result<_, _>>().map_err(|error| ModelError::Runtime(error.to_string()))
    }

    fn memory(&self) -> Option<ModelMemory> {
        let (weights, row) = self.runtime.memory?;
        Some(ModelMemory { weights, forward: row * self.last_rows as u64, held: self.runtime.kept * self.forwards })
    }
}

fn row_sum(tensor: &Tensor, row: usize) -> f64 {
    let width: usize = tensor.row_shape().iter().product();
    let range = row * width..(row + 1) * width;
    match tensor.data() {
        TensorData::Float32(values) => values[range].iter().map(|&value| f64::from(value)).sum(),
        TensorData::Float64(values) => values[range].iter().sum(),
        TensorData::Int64(values) => values[range].iter().map(|&value| value as f64).sum(),
        TensorData::Int32(values) => values[range].iter().map(|&value| f64::from(value)).sum(),
        TensorData::Bool(values) => values[range].iter().filter(|&&value| value).count() as f64,
    }
}

/// Holds forwards back until it is opened, so that tests can say "while the executor is busy" without sleeping. It
/// begins open, because warm-up passes through it too.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    held: usize,
}

impl Gate {
    pub fn new() -> Arc<Gate> {
        Arc::default()
    }

    pub fn close(&self) {
        self.lock().closed = true;
    }

    pub fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }

    /// How many forwards stand before the closed gate, or are on their way through.
    pub fn held(&self) -> usize {
        self.lock().held
    }

    /// For hooks that do more than wait.
    pub fn pass(&self) {
        let mut state = self.lock();
        state.held += 1;
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held -= 1;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
