//! The shell around the batching policy: threads that own the model, and the way of a request through them.
//!
//! Every executor is one OS thread with its own copy of the model, because runtimes keep much state per thread and
//! some of it must be set on the very thread that runs the model. When an executor has nothing to do it polls the
//! [`Batcher`] under a short lock and either gets a batch or sleeps until the next push; there is no dispatcher in
//! between, so the members of a batch are fixed exactly when an executor is free. Callers wait on a channel each;
//! they cut their rows out of the batch's outputs on their own task, off the executor's thread.
//!
//! A model that panics is not trusted again: its batch is answered with an error, the executor loads and warms up a
//! new copy and goes on. While no executor can load its model, requests are refused instead of queued.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::batch::{BatchLimits, Batcher, Decision, Member, Rejected, Ticket, WaitReason};
use crate::model::{Artefact, LoadError, LoadOptions, Model, ModelError, ModelSpec, Runtime};
use crate::tensor::{Tensor, TensorBatch};

/// Every size is run at least so often before its time counts: runtimes profile on the first call, specialise on the
/// second, and only the third shows what to expect.
const WARM_UP_ROUNDS_MIN: usize = 3;
/// A model that is not steady by then is let in all the same: the noise is the machine's.
const WARM_UP_ROUNDS_MAX: usize = 10;
/// Two calls closer than this to each other are steady whatever their ratio: timers and schedulers are no finer.
const WARM_UP_NOISE: Duration = Duration::from_micros(200);
/// After a failed reload an executor waits, at first so long, and at most a hundred times as long.
const RELOAD_PAUSE: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// Threads with a copy of the model each.
    pub executors: usize,
    pub limits: BatchLimits,
    pub load: LoadOptions,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// In the declared order, by name, with as many rows as the request.
    pub outputs: TensorBatch,
    /// From being queued until the batch was taken. Of a request that needed several batches, the longest.
    pub wait_micros: u64,
    pub wait_reason: WaitReason,
    /// Time in the model. Of several batches, the sum.
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
    /// Send fewer rows.
    #[error("{rows} rows in one request are more than the queue holds, which is {rows_max}")]
    TooLarge { rows: usize, rows_max: usize },
    /// Too late for the caller's own deadline.
    #[error("the deadline passed before the model answered")]
    Expired,
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
            Rejected::TooLarge { rows, rows_max } => InferError::TooLarge { rows, rows_max },
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
}

/// Counters since the start, and the state of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetricsSnapshot {
    pub queue_rows: u64,
    /// Executors that have a working model.
    pub executors_ready: u64,
    pub requests: u64,
    /// Rows that ran, without padding.
    pub rows: u64,
    pub padding_rows: u64,
    pub batches: u64,
    /// Refused because the queue was full or the request too large.
    pub rejected: u64,
    pub expired: u64,
    /// Left the queue because the caller went away.
    pub cancelled: u64,
    /// Forwards that failed, panics included.
    pub failures: u64,
    pub panics: u64,
    /// Members of a failed batch that were run once more on their own.
    pub isolated: u64,
}

#[derive(Default)]
struct Metrics {
    requests: AtomicU64,
    rows: AtomicU64,
    padding_rows: AtomicU64,
    batches: AtomicU64,
    rejected: AtomicU64,
    expired: AtomicU64,
    cancelled: AtomicU64,
    failures: AtomicU64,
    panics: AtomicU64,
    isolated: AtomicU64,
}

fn count(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

/// Serves one version of one model. Dropping it lets the executors finish what is queued and end.
pub struct ModelServer {
    shared: Arc<Shared>,
    warm_up: Vec<WarmUp>,
    /// Closed when the last executor thread has ended. Nothing is ever sent.
    ended: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

impl ModelServer {
    /// Loads the model on every executor, runs every padded batch size there until it is steady, and only then
    /// returns. Nothing is left running if that fails.
    pub async fn start(
        name: &str,
        runtime: Arc<dyn Runtime>,
        artefact: Artefact,
        spec: ModelSpec,
        options: ServerOptions,
    ) -> Result<ModelServer, StartError> {
        let executors = options.executors.max(1);
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            spec,
            epoch: Instant::now(),
            state: Mutex::new(State {
                batcher: Batcher::new(options.limits, executors),
                stage: Stage::Serving,
                threads: executors,
                ready: executors,
                failure: None,
            }),
            wake: Condvar::new(),
            metrics: Metrics::default(),
        });
        let (alive, ended) = mpsc::channel(1);
        // Whatever goes wrong below, dropping the server tells the threads that did start to end.
        let mut server = ModelServer { shared, warm_up: Vec::new(), ended: tokio::sync::Mutex::new(ended) };
        let mut reports = Vec::new();
        for index in 0..executors {
            let executor = Executor {
                index,
                shared: server.shared.clone(),
                runtime: runtime.clone(),
                artefact: artefact.clone(),
                load: options.load,
                limits: options.limits,
                _alive: alive.clone(),
            };
            let (report, reported) = oneshot::channel();
            std::thread::Builder::new()
                .name(format!("{name}/{index}"))
                .spawn(move || executor.run(report))
                .map_err(|source| StartError::Thread { model: name.to_owned(), source })?;
            reports.push(reported);
        }
        for reported in reports {
            let silent = || StartError::Panicked {
                model: name.to_owned(),
                message: "the executor ended without a report".to_owned(),
            };
            server.warm_up.extend(reported.await.map_err(|_| silent())??);
        }
        Ok(server)
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    /// What warm-up measured, by executor and padded size.
    pub fn warm_up(&self) -> &[WarmUp] {
        &self.warm_up
    }

    /// Runs one request, batched with others as they come. Dropping the future takes the request out of the queue.
    pub async fn submit(&self, inputs: TensorBatch, deadline: Instant) -> Result<Outcome, InferError> {
        let metrics = &self.shared.metrics;
        count(&metrics.requests, 1);
        let (inputs, rows) = self.shared.spec.arrange(inputs)?;
        let pieces = self.shared.enqueue(inputs, rows, deadline)?;
        let mut answers = Vec::with_capacity(pieces.len());
        for mut piece in pieces {
            let answer = tokio::time::timeout_at(deadline.into(), &mut piece.answer).await;
            let answer = match answer {
                Err(_) => {
                    // Told here rather than when an executor is next free, and room is made at once.
                    count(&metrics.expired, 1);
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

    pub fn metrics(&self) -> MetricsSnapshot {
        let (queue_rows, executors_ready) = {
            let state = self.shared.lock();
            (state.batcher.queue_rows() as u64, state.ready as u64)
        };
        let Metrics { requests, rows, padding_rows, batches, rejected, expired, cancelled, failures, panics, isolated } =
            &self.shared.metrics;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MetricsSnapshot {
            queue_rows,
            executors_ready,
            requests: get(requests),
            rows: get(rows),
            padding_rows: get(padding_rows),
            batches: get(batches),
            rejected: get(rejected),
            expired: get(expired),
            cancelled: get(cancelled),
            failures: get(failures),
            panics: get(panics),
            isolated: get(isolated),
        }
    }

    /// Whether at least one executor has a working model; otherwise why none has.
    pub fn ready(&self) -> Result<(), InferError> {
        self.shared.lock().accepting()
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

/// What the server and its executors share.
struct Shared {
    name: String,
    spec: ModelSpec,
    /// The zero of the batcher's time.
    epoch: Instant,
    state: Mutex<State>,
    /// Notified when an entry is queued, and when the stage changes.
    wake: Condvar,
    metrics: Metrics,
}

struct State {
    batcher: Batcher<Job>,
    stage: Stage,
    /// Executor threads that have not ended.
    threads: usize,
    /// Executors with a working model.
    ready: usize,
    /// Why the last reload failed, until one succeeds.
    failure: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Serving,
    /// The queue is finished, and then the threads end.
    Closing,
}

impl State {
    fn accepting(&self) -> Result<(), InferError> {
        match (&self.failure, self.stage) {
            (_, Stage::Closing) => Err(InferError::ShuttingDown),
            (Some(failure), _) if self.ready == 0 => Err(InferError::Unavailable(failure.clone())),
            _ => Ok(()),
        }
    }
}

/// One entry of the queue: at most a batch full of rows, and whom to tell.
struct Job {
    inputs: Vec<Tensor>,
    answer: oneshot::Sender<Result<Answer, InferError>>,
}

/// The whole batch's outputs and which rows of them are meant.
struct Answer {
    outputs: Arc<Vec<Tensor>>,
    rows: Range<usize>,
    waited: Duration,
    wait_reason: WaitReason,
    forward: Duration,
    batch_rows: usize,
}

/// The caller's end of an entry.
struct Piece {
    shared: Arc<Shared>,
    ticket: Ticket,
    answer: oneshot::Receiver<Result<Answer, InferError>>,
    /// An executor has answered, so that there is nothing left to cancel.
    settled: bool,
}

impl Piece {
    /// Takes the entry out of the queue and says whether it was there. It may be running by now; then its answer
    /// finds nobody, which is fine.
    fn withdraw(&self) -> bool {
        self.shared.lock().batcher.cancel(self.ticket).is_some()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !self.settled && self.withdraw() {
            count(&self.shared.metrics.cancelled, 1);
        }
    }
}

impl Shared {
    /// A thread that panics under this lock has a bug, but it leaves the queue in order: entries are moved whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn close(&self) {
        self.lock().stage = Stage::Closing;
        self.wake.notify_all();
    }

    /// Queues a request, in pieces of at most a batch each, all or nothing.
    fn enqueue(
        self: &Arc<Shared>,
        inputs: Vec<Tensor>,
        rows: usize,
        deadline: Instant,
    ) -> Result<Vec<Piece>, InferError> {
        let deadline = deadline.saturating_duration_since(self.epoch);
        let mut state = self.lock();
        state.accepting()?;
        let now = self.now();
        let admitted = state.batcher.admit(now, rows, deadline);
        if let Err(rejected) = admitted {
            let counter = match rejected {
                Rejected::Expired => &self.metrics.expired,
                Rejected::QueueFull { .. } | Rejected::TooLarge { .. } => &self.metrics.rejected,
            };
            count(counter, 1);
            return Err(rejected.into());
        }
        let rows_max = state.batcher.limits().rows_max();
        let jobs = if rows <= rows_max { vec![inputs] } else { split(&inputs, rows_max) };
        let mut pieces = Vec::with_capacity(jobs.len());
        for inputs in jobs {
            let (sender, answer) = oneshot::channel();
            let rows = inputs.first().map_or(0, Tensor::rows);
            let pushed = state.batcher.push(now, rows, deadline, Job { inputs, answer: sender });
            let ticket = pushed.expect("a piece is no larger than a batch, and all of them were admitted at this time");
            pieces.push(Piece { shared: self.clone(), ticket, answer, settled: false });
            self.wake.notify_one();
        }
        Ok(pieces)
    }

    /// Cuts the request's rows out of its batches' outputs and names them.
    fn outcome(&self, answers: Vec<Answer>) -> Result<Outcome, InferError> {
        let mut outputs = Vec::with_capacity(self.spec.outputs.len());
        for (position, declared) in self.spec.outputs.iter().enumerate() {
            let parts: Vec<Tensor> =
                answers.iter().map(|answer| answer.outputs[position].slice_rows(answer.rows.clone())).collect();
            let output = match <[Tensor; 1]>::try_from(parts) {
                Ok([only]) => only,
                Err(parts) => Tensor::concat(&parts.iter().collect::<Vec<_>>()).map_err(|error| {
                    ModelError::Runtime(format!("the output `{}` changes shape: {error}", declared.name))
                })?,
            };
            outputs.push((declared.name.clone(), output));
        }
        let busy = answers.iter().any(|answer| answer.wait_reason == WaitReason::ExecutorBusy);
        Ok(Outcome {
            outputs,
            wait_micros: micros(answers.iter().map(|answer| answer.waited).max().unwrap_or_default()),
            wait_reason: if busy { WaitReason::ExecutorBusy } else { WaitReason::None },
            forward_micros: micros(answers.iter().map(|answer| answer.forward).sum()),
            batch_rows: answers.iter().map(|answer| answer.batch_rows).max().unwrap_or_default(),
        })
    }
}

fn split(inputs: &[Tensor], rows_max: usize) -> Vec<Vec<Tensor>> {
    let mut jobs: Vec<Vec<Tensor>> = Vec::new();
    for input in inputs {
        for (index, part) in input.split_rows(rows_max).into_iter().enumerate() {
            match jobs.get_mut(index) {
                Some(job) => job.push(part),
                None => jobs.push(vec![part]),
            }
        }
    }
    jobs
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One thread that owns one copy of the model.
struct Executor {
    index: usize,
    shared: Arc<Shared>,
    runtime: Arc<dyn Runtime>,
    artefact: Artefact,
    load: LoadOptions,
    limits: BatchLimits,
    /// Dropped with the executor; the server sees the last one go.
    _alive: mpsc::Sender<()>,
}

/// A batch as an executor takes it.
struct Batch {
    members: Vec<Member<Job>>,
    padded_rows: usize,
}

/// Whether a copy of the model can go on after a batch.
enum Trust {
    Sound,
    Broken,
}

impl Trust {
    fn after(error: &ModelError) -> Trust {
        if matches!(error, ModelError::Panicked(_)) { Trust::Broken } else { Trust::Sound }
    }
}

impl Executor {
    fn run(self, report: oneshot::Sender<Result<Vec<WarmUp>, StartError>>) {
        let mut model = match self.prepare() {
            Ok((model, warm_up)) => {
                self.idle();
                // A server that gave up starting is gone; closing ends the loop below.
                let _ = report.send(Ok(warm_up));
                model
            }
            Err(error) => {
                let _ = report.send(Err(error));
                return;
            }
        };
        while let Some(batch) = self.next_batch() {
            let (trust, replies) = self.run_batch(model.as_mut(), batch);
            match trust {
                Trust::Sound => {
                    // First idle, then the answers: a caller who sends its next request at once must find us so.
                    self.idle();
                    send(replies);
                }
                Trust::Broken => {
                    send(replies);
                    // Its destructor is the model's code too.
                    let _ = catch_unwind(AssertUnwindSafe(|| drop(model)));
                    model = match self.replace() {
                        Some(model) => model,
                        None => return,
                    };
                    self.idle();
                }
            }
        }
    }

    fn idle(&self) {
        self.shared.lock().batcher.executor_idle();
    }

    /// Loads the model and runs every padded size until it is steady.
    fn prepare(&self) -> Result<(Box<dyn Model>, Vec<WarmUp>), StartError> {
        let prepared = catch_unwind(AssertUnwindSafe(|| {
            let spec = &self.shared.spec;
            let mut model = self
                .runtime
                .load(&self.artefact, spec, &self.load)
                .map_err(|source| StartError::Load { model: self.shared.name.clone(), source })?;
            let mut warm_up = Vec::new();
            for rows in self.limits.padded_sizes() {
                let (forward, rounds) = self.warm_up(model.as_mut(), rows).map_err(|cause| {
                    let explanation = spec.explain_failure(rows, &cause);
                    StartError::WarmUp { model: self.shared.name.clone(), explanation, cause }
                })?;
                warm_up.push(WarmUp { executor: self.index, rows, forward_micros: micros(forward), rounds });
            }
            Ok((model, warm_up))
        }));
        prepared.unwrap_or_else(|panic| {
            Err(StartError::Panicked { model: self.shared.name.clone(), message: panic_message(panic.as_ref()) })
        })
    }

    fn warm_up(&self, model: &mut dyn Model, rows: usize) -> Result<(Duration, usize), ModelError> {
        let inputs = self.shared.spec.zeros(rows);
        let mut last = Duration::MAX;
        for round in 1.. {
            let start = Instant::now();
            let outputs = model.forward(&inputs)?;
            let forward = start.elapsed();
            self.shared.spec.check_outputs(&outputs, rows)?;
            let difference = last.abs_diff(forward);
            let steady = difference < WARM_UP_NOISE || difference < forward / 5;
            last = forward;
            if round >= WARM_UP_ROUNDS_MAX || (round >= WARM_UP_ROUNDS_MIN && steady) {
                return Ok((last, round));
            }
        }
        unreachable!("the rounds are bounded")
    }

    /// Sleeps until there is something to run. `None` when the server closes and the queue is empty.
    fn next_batch(&self) -> Option<Batch> {
        let mut state = self.shared.lock();
        loop {
            let poll = state.batcher.poll(self.shared.now());
            count(&self.shared.metrics.expired, poll.expired.len());
            send(refuse(poll.expired, &InferError::Expired));
            match poll.decision {
                Decision::Run { members, padded_rows, .. } => return Some(Batch { members, padded_rows }),
                Decision::Wait if state.stage == Stage::Closing => return None,
                Decision::Wait => state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Runs a batch. Of its members, those in the replies are still to be answered.
    fn run_batch(&self, model: &mut dyn Model, batch: Batch) -> (Trust, Vec<Reply>) {
        // Callers who went away between the taking and now are not worth a row.
        let (members, gone): (Vec<_>, Vec<_>) =
            batch.members.into_iter().partition(|member| !member.payload.answer.is_closed());
        count(&self.shared.metrics.cancelled, gone.len());
        if members.is_empty() {
            return (Trust::Sound, Vec::new());
        }
        match self.run_members(model, &members, batch.padded_rows) {
            Ok(ran) => (Trust::Sound, answer(members, &ran)),
            Err(ModelError::Runtime(_)) if members.len() > 1 => self.run_isolated(model, members),
            Err(error) => (Trust::after(&error), refuse(members, &InferError::Model(error))),
        }
    }

    /// Runs the members of a failed batch one by one, so that an input the model cannot take, such as an index
    /// beyond its embedding, fails its own request and not its neighbours'.
    fn run_isolated(&self, model: &mut dyn Model, members: Vec<Member<Job>>) -> (Trust, Vec<Reply>) {
        let mut members = members.into_iter();
        let mut replies = Vec::new();
        while let Some(member) = members.next() {
            // Nobody waits for those behind; only the last replies are left to the caller.
            send(std::mem::take(&mut replies));
            if member.deadline <= self.shared.now() {
                count(&self.shared.metrics.expired, 1);
                replies = refuse(vec![member], &InferError::Expired);
                continue;
            }
            count(&self.shared.metrics.isolated, 1);
            let padded_rows = self.limits.padded_rows(member.rows);
            let alone = vec![member];
            replies = match self.run_members(model, &alone, padded_rows) {
                Ok(ran) => answer(alone, &ran),
                Err(error) => {
                    let trust = Trust::after(&error);
                    let error = InferError::Model(error);
                    let refused = refuse(alone, &error);
                    if let Trust::Broken = trust {
                        send(refused);
                        return (Trust::Broken, refuse(members.collect(), &error));
                    }
                    refused
                }
            };
        }
        (Trust::Sound, replies)
    }

    fn run_members(
        &self,
        model: &mut dyn Model,
        members: &[Member<Job>],
        padded_rows: usize,
    ) -> Result<Ran, ModelError> {
        let metrics = &self.shared.metrics;
        let rows: usize = members.iter().map(|member| member.rows).sum();
        let padded_rows = padded_rows.min(self.limits.padded_rows(rows)).max(rows);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let inputs = join(&self.shared.spec, members, padded_rows)?;
            let start = Instant::now();
            let outputs = model.forward(&inputs)?;
            let forward = start.elapsed();
            self.shared.spec.check_outputs(&outputs, padded_rows)?;
            let outputs = outputs.into_iter().map(Tensor::squeeze_single_column).collect();
            Ok(Ran { outputs: Arc::new(outputs), forward, rows })
        }));
        let ran = ran.unwrap_or_else(|panic| {
            count(&metrics.panics, 1);
            Err(ModelError::Panicked(panic_message(panic.as_ref())))
        });
        match &ran {
            Ok(_) => {
                count(&metrics.batches, 1);
                count(&metrics.rows, rows);
                count(&metrics.padding_rows, padded_rows - rows);
            }
            Err(error) => {
                count(&metrics.failures, 1);
                tracing::warn!(model = self.shared.name, executor = self.index, rows, %error, "a forward failed");
            }
        }
        ran
    }

    /// Loads a new copy after the old one panicked, again and again with pauses. `None` when the server closes first.
    fn replace(&self) -> Option<Box<dyn Model>> {
        self.shared.lock().ready -= 1;
        for attempt in 0_u32.. {
            let prepared = self.prepare();
            let mut state = self.shared.lock();
            let error = match prepared {
                Ok((model, _)) => {
                    state.ready += 1;
                    state.failure = None;
                    tracing::warn!(model = self.shared.name, executor = self.index, "replaced a model that panicked");
                    return Some(model);
                }
                Err(error) => error,
            };
            let error = chain(&error);
            tracing::error!(
                model = self.shared.name,
                executor = self.index,
                error,
                "cannot replace a model that panicked"
            );
            state.failure = Some(error);
            if state.ready == 0 {
                // Nobody is left to run them.
                let now = self.shared.now();
                let members = state.batcher.drain(now);
                if let Err(error) = state.accepting() {
                    send(refuse(members, &error));
                }
            }
            let pause = RELOAD_PAUSE * 2_u32.saturating_pow(attempt).min(100);
            let serving = |state: &mut State| state.stage == Stage::Serving;
            let waited = self.shared.wake.wait_timeout_while(state, pause, serving);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.stage == Stage::Closing {
                return None;
            }
        }
        None
    }
}

impl Drop for Executor {
    /// However a thread ends, callers must not wait for it.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.threads -= 1;
        if state.threads == 0 {
            state.stage = Stage::Closing;
            let members = state.batcher.drain(self.shared.now());
            send(refuse(members, &InferError::ShuttingDown));
        }
    }
}

/// A forward that succeeded.
struct Ran {
    outputs: Arc<Vec<Tensor>>,
    forward: Duration,
    rows: usize,
}

/// A member's answer, not yet sent.
type Reply = (oneshot::Sender<Result<Answer, InferError>>, Result<Answer, InferError>);

/// Gives every member its rows of what ran.
fn answer(members: Vec<Member<Job>>, ran: &Ran) -> Vec<Reply> {
    let mut start = 0;
    let answers = members.into_iter().map(|member| {
        let rows = start..start + member.rows;
        start = rows.end;
        let answer = Answer {
            outputs: ran.outputs.clone(),
            rows,
            waited: member.waited,
            wait_reason: member.reason,
            forward: ran.forward,
            batch_rows: ran.rows,
        };
        (member.payload.answer, Ok(answer))
    });
    answers.collect()
}

/// Gives every member the same error.
fn refuse(members: Vec<Member<Job>>, error: &InferError) -> Vec<Reply> {
    members.into_iter().map(|member| (member.payload.answer, Err(error.clone()))).collect()
}

fn send(replies: Vec<Reply>) {
    for (sender, reply) in replies {
        // A caller who has gone by now is no news.
        let _ = sender.send(reply);
    }
}

/// The inputs of all members, joined and padded.
fn join(spec: &ModelSpec, members: &[Member<Job>], padded_rows: usize) -> Result<Vec<Tensor>, ModelError> {
    let join = |position: usize| {
        let parts: Vec<&Tensor> = members.iter().map(|member| &member.payload.inputs[position]).collect();
        Tensor::concat(&parts).map(|joined| joined.pad_rows(padded_rows))
    };
    let joined: Result<Vec<Tensor>, _> = (0..spec.inputs.len()).map(join).collect();
    joined.map_err(|error| ModelError::Runtime(error.to_string()))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
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
