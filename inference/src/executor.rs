//! The shell around the batching policy: threads that own the model, and the way of a request through them.
//!
//! Every executor is one OS thread with its own copy of the model, because runtimes keep much state per thread and
//! some of it must be set on the very thread that runs the model. When an executor has nothing to do it polls the
//! [`Batcher`](crate::batch::Batcher) under a short lock and either gets a batch or sleeps until the next push; there is no dispatcher in
//! between, so the members of a batch are fixed exactly when an executor is free. Callers wait on a channel each;
//! they cut their rows out of the batch's outputs on their own task, off the executor's thread.
//!
//! A model that panics is not trusted again: its batch is answered with an error, the executor loads and warms up a
//! new copy and goes on. While no executor can load its model, requests are refused instead of queued.
//!
//! A forward that does not end cannot be stopped from outside. Its callers are answered, its thread is left to itself
//! and another one takes its place; when it happens again, the model says that only a new process will help.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::batch::{BatchLimits, Rejected, Waited};
use crate::breaker::Open;
use crate::device::{SharedDevice, SharedDevices};
use crate::memory::{Footprint, MemoryError};
use crate::model::{Artefact, Devices, LoadError, LoadOptions, ModelError, ModelMemory, ModelSpec, Runtime};
use crate::tensor::TensorBatch;

mod ground;
mod metrics;
mod shared;
mod thread;

pub use metrics::MetricsSnapshot;

use metrics::count;
use shared::{Purpose, Recipe, Shared};
use thread::Executor;

/// A forward that takes longer, and longer than twenty of its usual ones, is taken not to end at all.
pub const FORWARD_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerOptions {
    /// Threads with a copy of the model each.
    pub executors: usize,
    pub limits: BatchLimits,
    /// Where the executors run, in turn.
    pub devices: Devices,
    /// Its device is that of the executor.
    pub load: LoadOptions,
    /// A forward that takes longer, and longer than twenty of its usual ones, is given up.
    pub forward_max: Duration,
}

impl ServerOptions {
    /// One executor with one thread.
    pub fn new(limits: BatchLimits) -> ServerOptions {
        let (devices, load) = (Devices::CPU, LoadOptions::default());
        ServerOptions { executors: 1, limits, devices, load, forward_max: FORWARD_MAX }
    }
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// In the declared order, by name, with as many rows as the request.
    pub outputs: TensorBatch,
    /// From being queued until the batch was taken. Of a request that needed several batches, the longest.
    pub waited: Waited,
    /// Time in the model. Of several batches, the sum. In the background it is the time that the thread had a core, where one
    /// thread runs the model: what others took of it is not the model's.
    pub forward_micros: u64,
    /// Rows that ran together, without padding. Of several batches, the most.
    pub batch_rows: usize,
}

/// Why a request was not answered, by what the caller does next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InferError {
    /// Retry after a while, or elsewhere.
    #[error("the queue is full: {queue_rows} of at most {queue_rows_max} rows are waiting")]
    QueueFull { queue_rows: usize, queue_rows_max: usize },
    /// Retry after a while, or elsewhere.
    #[error("the queue is full: {queue_bytes} of at most {queue_bytes_max} bytes are waiting")]
    QueueBytesFull { queue_bytes: usize, queue_bytes_max: usize },
    /// Send fewer rows.
    #[error("{rows} rows in one request are more than the queue holds, which is {rows_max}")]
    TooLarge { rows: usize, rows_max: usize },
    /// Too late for the caller's own deadline.
    #[error("the deadline passed before the model answered")]
    Expired,
    /// Retry after a while, elsewhere, or with a later deadline.
    #[error("the deadline is in {left:.1?}, but what is queued takes about {wait:.1?}")]
    TooLate { wait: Duration, left: Duration },
    /// Retry after a while, elsewhere, or in the first tier.
    #[error("{percent} % of the memory is in use, and only requests of the first tier are taken")]
    MemoryShort { percent: u8 },
    /// Retry after that time, or elsewhere.
    #[error("the last {failures} forwards failed; the model is tried again in {left:.1?}")]
    BreakerOpen { left: Duration, failures: u32 },
    /// Retry after that time, or elsewhere.
    #[error(
        "the last {failures} forwards of the models on its device were short of memory or did not end; one is tried again in \
         {left:.1?}"
    )]
    DeviceBreakerOpen { left: Duration, failures: u32 },
    /// As above: it was queued, and those before it took longer than expected.
    #[error("it waited until the model could not answer by the deadline any more")]
    Dropped,
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Go elsewhere.
    #[error("the model is shutting down")]
    ShuttingDown,
    /// No executor has a working copy of the model.
    #[error("no executor can run the model: {0}")]
    Unavailable(String),
}

impl From<Rejected> for InferError {
    fn from(rejected: Rejected) -> InferError {
        match rejected {
            Rejected::QueueFull { queue_rows, queue_rows_max } => InferError::QueueFull { queue_rows, queue_rows_max },
            Rejected::QueueBytesFull { queue_bytes, queue_bytes_max } => {
                InferError::QueueBytesFull { queue_bytes, queue_bytes_max }
            }
            Rejected::TooLarge { rows, rows_max } => InferError::TooLarge { rows, rows_max },
            Rejected::TooLate { wait, left } => InferError::TooLate { wait, left },
            Rejected::Expired => InferError::Expired,
        }
    }
}

/// Why a server did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot load the model `{model}`")]
    Load { model: String, source: LoadError },
    /// The model loaded, but fails on inputs of its own declaration.
    #[error("the model `{model}` does not fit its declaration: {explanation}")]
    WarmUp { model: String, explanation: String, cause: ModelError },
    #[error("the code of the model `{model}` panicked while loading: {message}")]
    Panicked { model: String, message: String },
    /// Found while warming up, before the sizes that would not have fitted were run.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot start a thread for the model `{model}`")]
    Thread { model: String, source: std::io::Error },
}

/// How long a forward of a padded size took in the end, on one executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmUp {
    pub executor: usize,
    pub rows: usize,
    pub forward_micros: u64,
    pub rounds: usize,
    /// None where the runtime cannot tell.
    pub memory: Option<ModelMemory>,
}

/// Serves one version of one model. Dropping it lets the executors finish what is queued and end.
pub struct ModelServer {
    shared: Arc<Shared>,
    warm_up: Vec<WarmUp>,
    /// Closed when the last executor thread has ended. Nothing is ever sent.
    ended: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

impl ModelServer {
    /// Starts a model on a device of its own, with as much memory as it likes, see [`ModelServer::start_on`].
    pub async fn start(
        name: &str,
        runtime: Arc<dyn Runtime>,
        artefact: Artefact,
        spec: ModelSpec,
        options: ServerOptions,
    ) -> Result<ModelServer, StartError> {
        let slots = options.executors.max(1).saturating_mul(options.load.threads.max(1));
        let alone = SharedDevices::with_cpu(SharedDevice::new(slots, None));
        ModelServer::start_on(&alone, name, runtime, artefact, spec, options).await
    }

    /// Loads the model on every executor, runs every padded batch size there until it is steady, and only then
    /// returns. Nothing is left running if that fails.
    pub async fn start_on(
        on: &SharedDevices,
        name: &str,
        runtime: Arc<dyn Runtime>,
        artefact: Artefact,
        spec: ModelSpec,
        options: ServerOptions,
    ) -> Result<ModelServer, StartError> {
        let executors = options.executors.max(1);
        let (alive, ended) = mpsc::channel(1);
        let ServerOptions { limits, devices, load, forward_max, .. } = options;
        let recipe = Recipe { runtime, artefact, devices, load, forward_max, executors };
        let shared = Arc::new(Shared::new(name, spec, limits, recipe, on));
        // Whatever goes wrong below, dropping the server tells the threads that did start to end.
        let mut server = ModelServer { shared, warm_up: Vec::new(), ended: tokio::sync::Mutex::new(ended) };
        let mut reports = Vec::new();
        for index in 0..executors {
            let (report, reported) = oneshot::channel();
            Executor::spawn(&server.shared, index, alive.clone(), Some(report), None)
                .map_err(|source| StartError::Thread { model: name.to_owned(), source })?;
            reports.push(reported);
        }
        drop(alive);
        for reported in reports {
            let silent = || StartError::Panicked {
                model: name.to_owned(),
                message: "the executor ended without a report".to_owned(),
            };
            server.warm_up.extend(reported.await.map_err(|_| silent())??);
        }
        server.shared.reserve(&server.warm_up)?;
        if let Some(footprint) = server.footprint() {
            let _ = server.shared.certified.set(footprint);
        }
        server.shared.learn(&server.warm_up);
        server.shared.open();
        tokio::spawn(shared::watch(Arc::downgrade(&server.shared)));
        Ok(server)
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    pub fn limits(&self) -> BatchLimits {
        self.shared.limits
    }

    /// What warm-up measured, by executor and padded size.
    pub fn warm_up(&self) -> &[WarmUp] {
        &self.warm_up
    }

    /// Runs one request of the first tier, see [`ModelServer::submit_in_tier`].
    pub async fn submit(&self, inputs: TensorBatch, deadline: Instant) -> Result<Outcome, InferError> {
        self.submit_in_tier(inputs, deadline, 0).await
    }

    /// Runs one request, batched with others as they come. Dropping the future takes the request out of the queue.
    pub async fn submit_in_tier(
        &self,
        inputs: TensorBatch,
        deadline: Instant,
        tier: usize,
    ) -> Result<Outcome, InferError> {
        count(&self.shared.metrics.requests, 1);
        self.run(inputs, deadline, tier, Purpose::Request).await
    }

    /// Runs inputs that nobody asked about, in the last tier: they are not counted, and nothing is learned from them. What
    /// fits one batch is one batch, with the rows of others as they come.
    pub async fn check(&self, inputs: TensorBatch, deadline: Instant) -> Result<Outcome, InferError> {
        let last = self.shared.limits.tiers().saturating_sub(1);
        self.run(inputs, deadline, last, Purpose::Check).await
    }

    async fn run(
        &self,
        inputs: TensorBatch,
        deadline: Instant,
        tier: usize,
        purpose: Purpose,
    ) -> Result<Outcome, InferError> {
        let metrics = &self.shared.metrics;
        let (inputs, rows) = self.shared.spec.arrange(inputs)?;
        let pieces = self.shared.enqueue(inputs, rows, deadline, tier, purpose)?;
        let mut answers = Vec::with_capacity(pieces.len());
        for mut piece in pieces {
            let answer = tokio::time::timeout_at(deadline.into(), &mut piece.answer).await;
            let answer = match answer {
                Err(_) => {
                    // Told here rather than when an executor is next free, and room is made at once.
                    count(&metrics.expired, usize::from(purpose == Purpose::Request));
                    piece.withdraw();
                    Err(InferError::Expired)
                }
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => Err(InferError::Unavailable("the executor ended without an answer".to_owned())),
            };
            piece.settled = true;
            answers.push(answer?);
        }
        self.shared.outcome(answers)
    }

    /// Puts the server into the background, or back: work there does not delay forwards of other models.
    /// At any time, from any thread, as often as one likes. It returns at once; see
    /// [`ModelServer::is_background`] for when a server is back.
    pub fn set_background(&self, background: bool) {
        self.shared.set_background(background);
    }

    /// Whether it is in the background, or an executor of it still runs as there: one that may not raise its priority
    /// answers until a fresh one has loaded the model.
    pub fn is_background(&self) -> bool {
        self.shared.is_background()
    }

    /// Whether anything is queued or running. Whoever runs what nobody waits for asks this before each piece of it; it
    /// never waits for the server's lock.
    pub fn is_busy(&self) -> bool {
        self.shared.is_busy()
    }

    pub fn metrics(&self) -> MetricsSnapshot {
        let mut snapshot = self.shared.metrics.snapshot();
        self.shared.fill_in(&mut snapshot);
        snapshot
    }

    /// The time that one forward in twenty of so many rows exceeds.
    pub fn forward_time(&self, rows: usize) -> Duration {
        self.shared.lock().batcher.costs().high(rows)
    }

    /// The time that one of its largest batches takes.
    pub fn longest_forward(&self) -> Duration {
        let state = self.shared.lock();
        state.batcher.costs().typical(state.batcher.costs().rows_cap())
    }

    /// Tells how much of the device's memory is in use: above 80 % lower tiers wait, above 90 % they are refused.
    pub fn memory_used(&self, percent: u8) {
        self.shared.lock().memory_percent = percent;
    }

    /// Bytes that all executors together still hold between forwards, beside the weights: of a model that keeps nothing,
    /// nothing. None where the runtime cannot tell, or nothing ran yet.
    pub fn held(&self) -> Option<u64> {
        let state = self.shared.lock();
        (!state.held.is_empty()).then(|| state.held.values().sum())
    }

    /// What the model takes, as warm-up measured it; None where the runtime cannot tell.
    pub fn footprint(&self) -> Option<Footprint> {
        self.shared.footprint(&self.warm_up)
    }

    /// Why the model can only be helped by a new process: forwards that do not end, again after a replacement.
    pub fn stuck(&self) -> Option<String> {
        self.shared.lock().stuck.clone()
    }

    /// Whether at least one executor has a working model; otherwise why none has.
    pub fn ready(&self) -> Result<(), InferError> {
        let state = self.shared.lock();
        state.accepting()?;
        match state.breaker.open(self.shared.now()) {
            Some(Open { left, failures }) => Err(InferError::BreakerOpen { left, failures }),
            None => Ok(()),
        }
    }

    /// Refuses new requests, finishes those in the queue, and returns when every executor has ended.
    pub async fn shutdown(&self) {
        self.shared.close();
        self.ended.lock().await.recv().await;
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// The error with its sources, for a place that keeps only text.
fn chain(error: &StartError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
