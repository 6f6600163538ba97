//! What serving adds to a model: waiting, batching, refusing, and the way through the gateway.
//!
//! The in-process parts drive [`inference::executor::ModelServer`] with an [open loop](open): when requests come is fixed
//! beforehand, and a latency counts from when its request was due, so that a slow answer delays no other question. Policies
//! take turns on the same arrivals, and the floor of every number, a forward that nobody stands before, is run in between.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use inference::batch::BatchLimits;
use inference::echo::EchoRuntime;
use inference::executor::{ModelServer, ServerOptions};
use inference::model::{Artefact, InputSpec, LoadOptions, Model, ModelSpec, OutputSpec, Runtime};
use inference::tensor::{Dtype, Tensor, TensorBatch, TensorData};
use serde::Serialize;

use crate::online::load::quantile;

pub mod capacity;
pub mod command;
pub mod open;
pub mod overload;
pub mod paired;
pub mod policies;
pub mod policy_cost;
pub mod soak;

/// As wide as the features of `peers/models.py`.
const WIDTH: usize = 50;

/// Rows of a batch at most, everywhere: as the research that the targets come from.
pub const ROWS_MAX: usize = 32;

/// Runtimes profile and specialise on the first calls of a thread.
const RAW_WARM_UP: usize = 10;

/// Long enough that nothing is dropped in workloads that are not about deadlines.
const PATIENCE: Duration = Duration::from_secs(10);

/// A model that can be served.
#[derive(Clone)]
pub struct Subject {
    runtime: Arc<dyn Runtime>,
    artefact: Artefact,
    spec: ModelSpec,
}

#[cfg(feature = "torch")]
fn torch() -> Option<Arc<dyn Runtime>> {
    Some(Arc::new(inference::torch::TorchRuntime))
}

#[cfg(not(feature = "torch"))]
fn torch() -> Option<Arc<dyn Runtime>> {
    None
}

impl Subject {
    /// The TorchScript module of a file, with one input of 50 features and one output.
    pub fn file(path: &Path) -> anyhow::Result<Subject> {
        let artefact = Artefact::read(path)?;
        let Some(runtime) = torch() else { anyhow::bail!("{} needs the `torch` feature", artefact.origin) };
        Ok(Subject { runtime, artefact, spec: spec() })
    }

    /// A stand-in whose every forward sleeps for so long, whatever its rows.
    pub fn sleeping(forward: Duration) -> Subject {
        let runtime = Arc::new(EchoRuntime::new().with_delay(forward));
        Subject { runtime, artefact: Artefact::new("a stand-in", *b"echo"), spec: spec() }
    }

    pub async fn serve(&self, limits: BatchLimits) -> anyhow::Result<Arc<ModelServer>> {
        let options = ServerOptions::new(limits);
        let start =
            ModelServer::start("subject", self.runtime.clone(), self.artefact.clone(), self.spec.clone(), options);
        Ok(Arc::new(start.await.context("the model could not be started")?))
    }

    /// A copy of the model for the calling thread alone: what forwards cost before anything stands before them.
    pub fn load(&self) -> anyhow::Result<Box<dyn Model>> {
        Ok(self.runtime.load(&self.artefact, &self.spec, &LoadOptions::default())?)
    }

    /// The inputs of a request. Their values do not matter to how long it takes.
    pub fn request(&self, rows: usize) -> TensorBatch {
        vec![("x".to_owned(), tensor(rows))]
    }

    /// How long a forward of so many rows takes on a thread of its own, in the median.
    pub fn raw_forward(&self, rows: usize, times: usize) -> anyhow::Result<Duration> {
        let millis = Spread::of(self.raw_forwards(rows, times)?).p50;
        Ok(Duration::from_secs_f64(millis / 1e3))
    }

    /// Milliseconds of so many forwards, one after the other, on a thread of their own.
    pub fn raw_forwards(&self, rows: usize, times: usize) -> anyhow::Result<Vec<f64>> {
        let subject = self.clone();
        let thread = std::thread::spawn(move || -> anyhow::Result<Vec<f64>> {
            let mut model = subject.load()?;
            let inputs = [tensor(rows)];
            for _ in 0..RAW_WARM_UP {
                model.forward(&inputs)?;
            }
            let forward = |_| {
                let start = Instant::now();
                model.forward(&inputs)?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            };
            (0..times.max(1)).map(forward).collect()
        });
        thread.join().map_err(|_| anyhow::anyhow!("the thread of the raw forward panicked"))?
    }
}

fn spec() -> ModelSpec {
    ModelSpec {
        inputs: vec![InputSpec::features("x", Dtype::Float32, WIDTH)],
        outputs: vec![OutputSpec { name: "y".to_owned(), dtype: Dtype::Float32 }],
    }
}

fn tensor(rows: usize) -> Tensor {
    let values = (0..rows * WIDTH).map(|index| (index % 17) as f32 / 17.0).collect();
    Tensor::try_new(vec![rows, WIDTH], TensorData::Float32(values))
        .unwrap_or_else(|_| Tensor::zeros(Dtype::Float32, rows, &[WIDTH]))
}

/// Latencies in milliseconds. NaN where there are none.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    fn of(mut millis: Vec<f64>) -> Spread {
        millis.sort_unstable_by(f64::total_cmp);
        Spread {
            p50: quantile(&millis, 0.5),
            p95: quantile(&millis, 0.95),
            p99: quantile(&millis, 0.99),
            max: millis.last().copied().unwrap_or(f64::NAN),
        }
    }
}

#[cfg(test)]
mod tests;
