//! What a server and its executors share: the queue, who is running what, and the callers' ends of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockResult, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};

use super::ground::{Ground, Grounds};
use super::metrics::{Metrics, MetricsSnapshot, count, micros};
use super::thread::Executor;
use super::{InferError, Outcome, WarmUp};
use crate::batch::{BatchLimits, Batcher, Member, Permit, Rejected, Request, Ticket, Waited};
use crate::breaker::{Breaker, Open};
use crate::device::{Seat, SharedDevices, Turn};
use crate::memory::{self, Footprint, MemoryError, Size};
use crate::model::{Artefact, Device, Devices, LoadOptions, ModelError, ModelSpec, Runtime};
use crate::tensor::{Tensor, TensorBatch};

/// A forward is not given up before so many times what it usually takes.
const USUAL_FORWARDS_MAX: u32 = 20;
/// Beside one busy thread, one at the lowest priority still has its twentieth part of a core in the end, as long as it does not
/// begin while all cores are taken.
const BACKGROUND_BOUNDS: u32 = 20;
/// Forwards that do not end are looked for so often per bound.
const LOOKS_PER_BOUND: u32 = 4;

/// How an executor comes by its model, the first time and again.
pub(super) struct Recipe {
    pub runtime: Arc<dyn Runtime>,
    pub artefact: Artefact,
    pub devices: Devices,
    pub load: LoadOptions,
    pub forward_max: Duration,
    pub executors: usize,
}

pub(super) struct Shared {
    pub name: String,
    pub spec: ModelSpec,
    pub recipe: Recipe,
    pub limits: BatchLimits,
    /// The zero of the batcher's time.
    epoch: Instant,
    state: Mutex<State>,
    /// Notified when an entry is queued, when the stage changes, and when there is room on the device.
    pub wake: Arc<Condvar>,
    /// One per device, in the order of the recipe's.
    seats: Vec<(Device, Arc<Seat>)>,
    pub metrics: Metrics,
    /// What the model takes, as warm-up measured it; empty where nobody can tell.
    pub certified: OnceLock<Footprint>,
    /// Told when there is something to do for [`watch`] before it looks by itself.
    pub look: Arc<Notify>,
}

pub(super) struct State {
    pub batcher: Batcher<Job>,
    pub stage: Stage,
    /// Executor threads that have neither ended nor been given up, by their number. What they hold is dropped with
    /// them; the server sees the last one go.
    pub threads: BTreeMap<u64, mpsc::Sender<()>>,
    next_thread: u64,
    /// What runs, by thread.
    pub running: BTreeMap<u64, Running>,
    /// Executors with a working model.
    pub ready: usize,
    /// Why the last reload failed, until one succeeds.
    pub failure: Option<String>,
    pub breaker: Breaker,
    /// How much of the device's memory is in use, as the server was last told.
    pub memory_percent: u8,
    /// What each executor's model still held after its last forward, by the executor's place.
    pub held: BTreeMap<usize, u64>,
    /// Set when a forward did not end for the second time; never cleared.
    pub stuck: Option<String>,
    pub grounds: Grounds,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Serving,
    /// The queue is finished, and then the threads end.
    Closing,
}

/// A batch that an executor has taken.
pub(super) struct Running {
    /// The place of the executor among its like.
    pub index: usize,
    pub since: Duration,
    pub bound: Duration,
    pub callers: Vec<Arc<Caller>>,
    pub ground: Ground,
    /// Given back when it is over or given up.
    pub _turn: Option<Turn>,
}

/// One entry of the queue: at most a batch full of rows, and whom to tell. The bytes are its own.
pub(super) struct Job {
    pub inputs: Vec<Tensor>,
    pub caller: Arc<Caller>,
    pub purpose: Purpose,
}

/// Whether an entry is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Request,
    /// Nobody asked: it is not counted, and nothing is learned from it.
    Check,
}

/// Whom to tell, once: the executor, or whoever gives the executor up.
pub(super) struct Caller(Mutex<Option<oneshot::Sender<Reply>>>);

pub(super) type Reply = Result<Answer, InferError>;

/// The whole batch's outputs and which rows of them are meant.
pub(super) struct Answer {
    pub outputs: Arc<Vec<Tensor>>,
    pub rows: Range<usize>,
    pub waited: Waited,
    pub forward: Duration,
    pub batch_rows: usize,
}

/// The caller's end of an entry.
pub(super) struct Piece {
    shared: Arc<Shared>,
    ticket: Ticket,
    pub answer: oneshot::Receiver<Reply>,
    /// An executor has answered, so that there is nothing left to cancel.
    pub settled: bool,
    purpose: Purpose,
}

impl Caller {
    pub fn answer(&self, reply: Reply) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A caller who has gone by now is no news.
        let _ = sender.map(|sender| sender.send(reply));
    }

    /// Nobody waits any more.
    pub fn gone(&self) -> bool {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sender.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

impl Piece {
    /// Takes the entry out of the queue and says whether it was there. It may be running by now; then its answer
    /// finds nobody, which is fine.
    pub fn withdraw(&self) -> bool {
        self.shared.lock().batcher.cancel(self.ticket).is_some()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !self.settled && self.withdraw() && self.purpose == Purpose::Request {
            count(&self.shared.metrics.cancelled, 1);
        }
    }
}

impl State {
    pub fn accepting(&self) -> Result<(), InferError> {
        match (self.stage, &self.stuck, &self.failure) {
            (Stage::Closing, ..) => Err(InferError::ShuttingDown),
            (_, Some(stuck), _) => Err(InferError::Unavailable(stuck.clone())),
            (_, _, Some(failure)) if self.ready == 0 => Err(InferError::Unavailable(failure.clone())),
            _ => Ok(()),
        }
    }

    /// What memory lets run now.
    pub fn permit(&self) -> Permit {
        if self.memory_percent >= memory::WAIT_PERCENT { Permit::FirstTier } else { Permit::All }
    }

    /// A number for a thread that is about to start.
    pub fn add_thread(&mut self, alive: mpsc::Sender<()>) -> u64 {
        let thread = self.next_thread;
        self.next_thread += 1;
        self.threads.insert(thread, alive);
        thread
    }
}

impl Shared {
    pub fn new(name: &str, spec: ModelSpec, limits: BatchLimits, recipe: Recipe, on: &SharedDevices) -> Shared {
        let executors = recipe.executors;
        let wake = Arc::new(Condvar::new());
        let seats = recipe.devices.iter().map(|device| {
            let threads = recipe.load.threads;
            (device, Seat::new(on.get(device, &*recipe.runtime), threads, wake.clone()))
        });
        let seats = seats.collect();
        Shared {
            name: name.to_owned(),
            spec,
            recipe,
            limits,
            epoch: Instant::now(),
            state: Mutex::new(State {
                batcher: Batcher::new(limits, executors),
                stage: Stage::Serving,
                threads: BTreeMap::new(),
                next_thread: 0,
                running: BTreeMap::new(),
                ready: executors,
                failure: None,
                breaker: Breaker::default(),
                memory_percent: 0,
                held: BTreeMap::new(),
                stuck: None,
                grounds: Grounds::default(),
            }),
            wake,
            seats,
            metrics: Metrics::default(),
            certified: OnceLock::new(),
            look: Arc::default(),
        }
    }

    /// A thread that panics under this lock has a bug, but it leaves the queue in order: entries are moved whole.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub fn close(&self) {
        let mut state = self.lock();
        state.stage = Stage::Closing;
        state.batcher.close();
        if state.grounds.give_up_vacant() && state.threads.is_empty() {
            let members = state.batcher.drain(self.now());
            refuse(members, &InferError::ShuttingDown).into_iter().for_each(|(caller, reply)| caller.answer(reply));
        }
        self.wake.notify_all();
    }

    pub fn learn(&self, warm_up: &[WarmUp]) {
        let mut state = self.lock();
        for WarmUp { rows, forward_micros, .. } in warm_up {
            state.batcher.costs_mut().warmed_up(*rows, Duration::from_micros(*forward_micros));
        }
    }

    /// The place of an executor's device.
    pub fn seat(&self, executor: usize) -> &Arc<Seat> {
        // There is at least one device.
        &self.seats[executor % self.seats.len()].1
    }

    pub fn seats(&self) -> impl Iterator<Item = &Arc<Seat>> {
        self.seats.iter().map(|(_, seat)| seat)
    }

    /// The model is warm and served from now on.
    pub fn open(&self) {
        self.seats.iter().for_each(|(_, seat)| seat.open());
    }

    /// What of a whole model's footprint one of its devices holds: its executors, and the file where that lies.
    pub fn part_of(&self, whole: Footprint, device: Device) -> Footprint {
        let devices = self.recipe.devices;
        let executors = (0..self.recipe.executors).filter(|index| devices.of_executor(*index) == device).count();
        let file_bytes = if device == Device::Cpu { whole.file_bytes } else { 0 };
        Footprint { executors, file_bytes, ..whole }
    }

    /// Enters what was measured into the ledgers, if it fits.
    pub fn reserve(&self, warm_up: &[WarmUp]) -> Result<(), MemoryError> {
        let Some(footprint) = self.footprint(warm_up) else { return Ok(()) };
        self.seats.iter().try_for_each(|(device, seat)| seat.reserve(self.part_of(footprint.clone(), *device)))
    }

    /// What the model takes, by what was measured. Of several executors, the most counts.
    pub fn footprint(&self, warm_up: &[WarmUp]) -> Option<Footprint> {
        let mut sizes: BTreeMap<usize, Size> = BTreeMap::new();
        let mut weight_bytes = 0;
        for WarmUp { rows, forward_micros, memory, .. } in warm_up {
            let memory = (*memory)?;
            weight_bytes = memory.weights.max(weight_bytes);
            let size = sizes.entry(*rows).or_insert(Size { rows: *rows, forward_micros: 0, bytes: 0 });
            size.bytes = size.bytes.max(memory.forward);
            size.forward_micros = size.forward_micros.max(*forward_micros);
        }
        Some(Footprint {
            name: self.name.clone(),
            file_bytes: self.recipe.artefact.bytes.len() as u64,
            executors: self.recipe.executors,
            weight_bytes,
            sizes: sizes.into_values().collect(),
        })
    }

    pub fn fill_in(&self, snapshot: &mut MetricsSnapshot) {
        let state = self.lock();
        snapshot.queue_rows = state.batcher.queue_rows() as u64;
        snapshot.queue_bytes = state.batcher.queue_bytes() as u64;
        snapshot.estimated_wait = state.batcher.estimated_wait(self.now(), 0);
        snapshot.rows_cap = state.batcher.costs().rows_cap() as u64;
        snapshot.executors_ready = state.ready as u64;
        snapshot.breaker_open = state.breaker.open(self.now()).is_some();
        snapshot.breaker_openings = state.breaker.opened();
    }

    /// Queues a request, in pieces of at most a batch each, all or nothing.
    pub fn enqueue(
        self: &Arc<Shared>,
        inputs: Vec<Tensor>,
        rows: usize,
        deadline: Instant,
        tier: usize,
        purpose: Purpose,
    ) -> Result<Vec<Piece>, InferError> {
        let deadline = deadline.saturating_duration_since(self.epoch);
        let bytes = |inputs: &[Tensor]| inputs.iter().map(Tensor::bytes).sum::<usize>();
        let request = Request { rows, bytes: bytes(&inputs), deadline, tier };
        let mut state = self.lock();
        state.accepting()?;
        let now = self.now();
        let requests = usize::from(purpose == Purpose::Request);
        if let Err(rejected) = state.batcher.admit(now, request) {
            let counter = match rejected {
                Rejected::Expired => &self.metrics.expired,
                _ => &self.metrics.rejected,
            };
            count(counter, requests);
            return Err(rejected.into());
        }
        if tier > 0 && state.memory_percent >= memory::REFUSE_PERCENT {
            count(&self.metrics.rejected, requests);
            return Err(InferError::MemoryShort { percent: state.memory_percent });
        }
        // As long as one of its devices is well, somebody can run it. Who tells the device nothing is no trial of it.
        let tells_device = purpose == Purpose::Request && !state.grounds.background;
        let well = self.seats.iter().map(|(_, seat)| match tells_device {
            true => seat.device().admit(),
            false => seat.device().open().map_or(Ok(()), Err),
        });
        let of_device = well.reduce(Result::or).unwrap_or(Ok(()));
        if let Err(Open { left, failures }) = of_device {
            count(&self.metrics.rejected, requests);
            return Err(InferError::DeviceBreakerOpen { left, failures });
        }
        // Last, so that whoever is let through to try does run. A check is no trial: its end tells the breaker nothing.
        let admitted = match purpose {
            Purpose::Request => state.breaker.admit(now),
            Purpose::Check => state.breaker.open(now).map_or(Ok(()), Err),
        };
        if let Err(Open { left, failures }) = admitted {
            count(&self.metrics.rejected, requests);
            return Err(InferError::BreakerOpen { left, failures });
        }
        let rows_max = self.limits.rows_max();
        let jobs = if rows <= rows_max { vec![inputs] } else { split(&inputs, rows_max) };
        let mut pieces = Vec::with_capacity(jobs.len());
        for inputs in jobs {
            let (sender, answer) = oneshot::channel();
            let rows = inputs.first().map_or(0, Tensor::rows);
            let request = Request { rows, bytes: bytes(&inputs), ..request };
            let job = Job { inputs, caller: Arc::new(Caller(Mutex::new(Some(sender)))), purpose };
            // In the background nothing is waited for, and the bursts of others' requests are not this model's.
            let pushed = match tells_device {
                true => state.batcher.push_admitted(now, request, job),
                false => state.batcher.push_check(now, request, job),
            };
            pieces.push(Piece { shared: self.clone(), ticket: pushed.ticket, answer, settled: false, purpose });
            if pushed.wake {
                self.wake.notify_one();
            }
        }
        Ok(pieces)
    }

    /// Cuts the request's rows out of its batches' outputs and names them.
    pub fn outcome(&self, answers: Vec<Answer>) -> Result<Outcome, InferError> {
        let mut outputs: TensorBatch = Vec::with_capacity(self.spec.outputs.len());
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
        Ok(Outcome {
            outputs,
            waited: answers.iter().map(|answer| answer.waited).max_by_key(|waited| waited.whole).unwrap_or_default(),
            forward_micros: micros(answers.iter().map(|answer| answer.forward).sum()),
            batch_rows: answers.iter().map(|answer| answer.batch_rows).max().unwrap_or_default(),
        })
    }

    /// How long a forward of so many rows may take before it is given up.
    pub fn bound(&self, state: &State, padded_rows: usize, ground: Ground) -> Duration {
        let bound = self.recipe.forward_max.max(state.batcher.costs().typical(padded_rows) * USUAL_FORWARDS_MAX);
        match ground {
            Ground::Foreground => bound,
            Ground::Background => bound.saturating_mul(BACKGROUND_BOUNDS),
        }
    }

    /// A new executor for a place that has none.
    pub fn replace(self: &Arc<Shared>, index: usize, alive: mpsc::Sender<()>) {
        if let Err(error) = Executor::spawn(self, index, alive, None, None) {
            tracing::error!(model = self.name, %error, "an executor could not be replaced");
            self.lock().stuck = Some(format!("no thread for a new executor: {error}"));
        }
    }

    /// Gives up executors whose forward does not end. Their threads cannot be ended from outside: they are left to
    /// themselves, and if the forward does end some day, the thread finds itself replaced and ends too. The first one is
    /// replaced; after the second, nothing but a new process will help.
    fn give_up_overdue(self: &Arc<Shared>) {
        let mut state = self.lock();
        let now = self.now();
        let overdue = |running: &Running| now.saturating_sub(running.since) > running.bound;
        let threads: Vec<u64> =
            state.running.iter().filter(|(_, running)| overdue(running)).map(|(thread, _)| *thread).collect();
        for thread in threads {
            let Some(running) = state.running.remove(&thread) else { continue };
            let Some(alive) = state.threads.remove(&thread) else {
                // Replaced while it ran; only its callers are left.
                let error = ModelError::Hung(running.bound);
                running.callers.iter().for_each(|caller| caller.answer(Err(error.clone().into())));
                continue;
            };
            state.ready -= 1;
            state.breaker.failed(now);
            if running.ground == Ground::Foreground {
                self.seat(running.index).device().failed();
            }
            count(&self.metrics.hangs, 1);
            count(&self.metrics.failures, 1);
            let error = ModelError::Hung(running.bound);
            tracing::error!(model = self.name, executor = running.index, %error, "an executor is given up");
            running.callers.iter().for_each(|caller| caller.answer(Err(error.clone().into())));
            if state.grounds.successor_of(thread) {
                // Another one is being started in its place already.
                continue;
            }
            if self.metrics.snapshot().hangs > 1 {
                state.stuck = Some(format!("{error}, again after its executor was replaced; restart the process"));
            } else {
                drop(state);
                self.replace(running.index, alive);
                state = self.lock();
            }
            if state.stuck.is_some() {
                let members = state.batcher.drain(now);
                if let Err(error) = state.accepting() {
                    refuse(members, &error).into_iter().for_each(|(caller, reply)| caller.answer(reply));
                }
            }
        }
    }
}

/// Looks after forwards that do not end, and after executors that are to be replaced, as long as there is a server. Threads
/// begin with the priority of who starts them, so this must run at the process's own.
pub(super) async fn watch(shared: Weak<Shared>) {
    loop {
        let (pause, look) = match shared.upgrade() {
            Some(shared) => (shared.recipe.forward_max / LOOKS_PER_BOUND, shared.look.clone()),
            None => return,
        };
        // Whether there is something to do or not, looking costs next to nothing.
        let _ = tokio::time::timeout(pause, look.notified()).await;
        match shared.upgrade() {
            Some(shared) => {
                shared.give_up_overdue();
                shared.come_forward();
                shared.fill_vacant();
            }
            None => return,
        }
    }
}

/// Gives every member the same error. Not yet sent.
pub(super) fn refuse(members: Vec<Member<Job>>, error: &InferError) -> Vec<(Arc<Caller>, Reply)> {
    members.into_iter().map(|member| (member.payload.caller, Err(error.clone()))).collect()
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
