//! One thread that owns one copy of the model.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::ground::{Ground, Timer};
use super::metrics::{count, micros};
use super::shared::{Answer, Caller, Job, Purpose, Reply, Running, Shared, Stage, State, refuse};
use super::{InferError, StartError, WarmUp, chain};
use crate::batch::{Decision, Member, Permit};
use crate::memory::Footprint;
use crate::model::{LoadOptions, Model, ModelError, ModelSpec};
use crate::tensor::Tensor;

/// Every size is run at least so often before its time counts: runtimes profile on the first call, specialise on the
/// second, and only the third shows what to expect.
const WARM_UP_ROUNDS_MIN: usize = 3;
/// A model that is not steady by then is let in all the same: the noise is the machine's.
const WARM_UP_ROUNDS_MAX: usize = 10;
/// Two calls closer than this to each other are steady whatever their ratio: timers and schedulers are no finer.
const WARM_UP_NOISE: Duration = Duration::from_micros(200);
/// After a failed reload an executor waits, at first so long, and at most a hundred times as long.
const RELOAD_PAUSE: Duration = Duration::from_millis(300);

type Report = oneshot::Sender<Result<Vec<WarmUp>, StartError>>;

pub(super) struct Executor {
    /// Its number among the threads of the server. Once the server does not know it, it has been given up.
    thread: u64,
    index: usize,
    shared: Arc<Shared>,
    /// Of the batch under way.
    ground: Cell<Ground>,
}

/// What an executor does next.
enum Next {
    Run(Batch),
    /// The server closes and the queue is empty, or another one has its place.
    End,
    /// Its place is filled when it has given back what it holds.
    Vacate,
}

/// A batch as an executor takes it.
struct Batch {
    members: Vec<Member<Job>>,
    padded_rows: usize,
}

/// Whether a copy of the model can go on after a batch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    Sound,
    Broken,
}

impl Trust {
    fn after(error: &ModelError) -> Trust {
        if matches!(error, ModelError::Panicked(_)) { Trust::Broken } else { Trust::Sound }
    }
}

/// A forward that succeeded.
struct Ran {
    outputs: Arc<Vec<Tensor>>,
    forward: Duration,
    rows: usize,
    padded_rows: usize,
}

/// What came of a batch: those of its members who are still to be answered, and what there is to learn.
struct Done {
    trust: Trust,
    replies: Vec<(Arc<Caller>, Reply)>,
    learned: Learned,
}

enum Learned {
    Nothing,
    /// It failed, and no other input would have prevented that.
    Failed,
    /// Some of it worked.
    Worked,
    Took {
        padded_rows: usize,
        forward: Duration,
    },
    /// There was not enough memory for so many rows.
    TooLarge {
        padded_rows: usize,
    },
    /// No model of this process will run there again.
    DeviceLost(ModelError),
}

/// The server has given this thread up and put another in its place.
struct GivenUp;

impl Executor {
    /// Starts a thread. With somebody to report to, it tries to load the model once; else until it succeeds.
    pub fn spawn(
        shared: &Arc<Shared>,
        index: usize,
        alive: mpsc::Sender<()>,
        report: Option<Report>,
        replaces: Option<u64>,
    ) -> std::io::Result<()> {
        let thread = {
            let mut state = shared.lock();
            let thread = state.add_thread(alive);
            replaces.into_iter().for_each(|old| shared.succeeds(&mut state, thread, old));
            thread
        };
        let executor = Executor { thread, index, shared: shared.clone(), ground: Cell::new(Ground::Foreground) };
        let name = thread_name(&shared.name, index);
        // If there is no thread, what was to run on it is dropped, and the executor with it.
        std::thread::Builder::new().name(name).spawn(move || executor.run(report)).map(|_| ())
    }

    fn run(self, report: Option<Report>) {
        let model = match report {
            Some(report) => match self.prepare() {
                Ok((model, warm_up)) => {
                    self.shared.lock().batcher.executor_idle();
                    // A server that gave up starting is gone; closing ends the loop below.
                    let _ = report.send(Ok(warm_up));
                    Some(model)
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                    None
                }
            },
            None => self.reload(),
        };
        let Some(mut model) = model else { return };
        loop {
            let batch = match self.next_batch() {
                Next::Run(batch) => batch,
                Next::End => return,
                Next::Vacate => {
                    let _ = catch_unwind(AssertUnwindSafe(|| drop(model)));
                    self.vacate();
                    return;
                }
            };
            let Ok(done) = self.run_batch(model.as_mut(), batch) else { return };
            let held = model.memory().map(|memory| memory.held);
            let Ok(()) = self.settle(done.trust, done.learned, held) else { return };
            // First idle, then the answers: a caller who sends its next request at once must find us so.
            send(done.replies);
            if done.trust == Trust::Broken {
                // Its destructor is the model's code too.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(model)));
                if self.is_replaced() {
                    return;
                }
                let is_low = {
                    let mut state = self.shared.lock();
                    state.ready -= 1;
                    state.grounds.of(self.thread) == Ground::Background
                };
                // Loading takes locks that others wait for.
                if is_low && self.vacate() {
                    return;
                }
                model = match self.reload() {
                    Some(model) => model,
                    None => return,
                };
            }
        }
    }

    /// A thread that may not raise its priority has ended its model: somebody else is to take its place.
    fn vacate(&self) -> bool {
        let vacated = self.shared.lock().vacate(self.thread, self.index);
        if vacated {
            self.shared.look.notify_one();
        }
        vacated
    }

    /// Loads the model and runs every padded size until it is steady.
    fn prepare(&self) -> Result<(Box<dyn Model>, Vec<WarmUp>), StartError> {
        let shared = &*self.shared;
        let name = || shared.name.clone();
        let prepared = catch_unwind(AssertUnwindSafe(|| {
            let (spec, recipe) = (&shared.spec, &shared.recipe);
            let seat = shared.seat(self.index);
            // A file is little more than its weights.
            let file_bytes = recipe.artefact.bytes.len() as u64;
            let least = Footprint {
                name: name(),
                file_bytes,
                executors: recipe.executors,
                weight_bytes: file_bytes,
                sizes: Vec::new(),
            };
            if shared.certified.get().is_none() {
                // Later there is an entry of all that it takes.
                seat.reserve(shared.part_of(least, recipe.devices.of_executor(self.index)))?;
            }
            let load = LoadOptions { device: recipe.devices.of_executor(self.index), ..recipe.load };
            let loaded = recipe.runtime.load(&recipe.artefact, spec, &load);
            let mut model = loaded.map_err(|source| StartError::Load { model: name(), source })?;
            let mut warm_up = Vec::new();
            for rows in shared.limits.padded_sizes() {
                if let Some(known) = shared.footprint(&warm_up) {
                    let expected = shared.part_of(known.with_next(rows), recipe.devices.of_executor(self.index));
                    seat.may_try(&expected)?;
                }
                let (forward, rounds) = self.warm_up(model.as_mut(), rows).map_err(|cause| {
                    let explanation = spec.explain_failure(rows, &cause);
                    StartError::WarmUp { model: name(), explanation, cause }
                })?;
                let (executor, forward_micros, memory) = (self.index, micros(forward), model.memory());
                warm_up.push(WarmUp { executor, rows, forward_micros, rounds, memory });
            }
            shared.reserve(&warm_up)?;
            Ok((model, warm_up))
        }));
        prepared
            .unwrap_or_else(|panic| Err(StartError::Panicked { model: name(), message: panic_message(panic.as_ref()) }))
    }

    fn warm_up(&self, model: &mut dyn Model, rows: usize) -> Result<(Duration, usize), ModelError> {
        let inputs = self.shared.spec.zeros(rows);
        let mut last = Duration::MAX;
        for round in 1.. {
            let _turn = self.shared.seat(self.index).warm_up_turn();
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

    fn is_replaced(&self) -> bool {
        !self.shared.lock().threads.contains_key(&self.thread)
    }

    /// Sleeps until there is something to run.
    fn next_batch(&self) -> Next {
        let mut state = self.shared.lock();
        loop {
            if !state.threads.contains_key(&self.thread) {
                // Replaced. What it was woken for is for another one.
                self.shared.wake.notify_one();
                return Next::End;
            }
            if state.leave(self.thread) {
                self.shared.wake.notify_one();
                return Next::Vacate;
            }
            self.shared.step_aside(&mut state, self.thread, self.index);
            let now = self.shared.now();
            let waits = state.batcher.queue_rows() > 0;
            let ground = state.grounds.of(self.thread);
            let (turn, begins) = match ground {
                // What it held, it would hold while others keep it from running.
                Ground::Background => (None, waits && self.shared.may_begin(&state, self.index)),
                Ground::Foreground if waits => {
                    let turn = self.shared.seat(self.index).turn();
                    let begins = turn.is_some();
                    (turn, begins)
                }
                Ground::Foreground => {
                    self.shared.seat(self.index).forgo();
                    (None, false)
                }
            };
            let permit = match begins {
                false => Permit::NoTurn,
                true if state.stage == Stage::Closing => Permit::All,
                true => state.permit(),
            };
            let poll = state.batcher.poll(now, permit);
            let (expired, dropped): (Vec<_>, Vec<_>) =
                poll.dropped.into_iter().partition(|member| member.deadline <= now);
            count(&self.shared.metrics.expired, requests(&expired));
            count(&self.shared.metrics.dropped, requests(&dropped));
            send(refuse(expired, &InferError::Expired));
            send(refuse(dropped, &InferError::Dropped));
            match poll.decision {
                Decision::Run { members, padded_rows, .. } => {
                    let running = Running {
                        index: self.index,
                        since: now,
                        bound: self.shared.bound(&state, padded_rows, ground),
                        ground,
                        callers: members.iter().map(|member| member.payload.caller.clone()).collect(),
                        _turn: turn,
                    };
                    state.running.insert(self.thread, running);
                    if state.batcher.queue_rows() > 0 {
                        // Another one may be idle, and nobody else will tell it.
                        self.shared.wake.notify_one();
                    }
                    self.ground.set(ground);
                    return Next::Run(Batch { members, padded_rows });
                }
                Decision::Wait { until: None } if state.stage == Stage::Closing => return Next::End,
                Decision::Wait { until: None } => {
                    // What waited when it was taken came too late. Others may run meanwhile.
                    drop(turn);
                    state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Decision::Wait { until: Some(until) } => {
                    // Others may run meanwhile.
                    drop(turn);
                    let waited = self.shared.wake.wait_timeout(state, until.saturating_sub(self.shared.now()));
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The batch is over: this executor is idle, unless its model is broken.
    fn settle(&self, trust: Trust, learned: Learned, held: Option<u64>) -> Result<(), GivenUp> {
        let mut state = self.shared.lock();
        let Some(running) = state.running.remove(&self.thread) else { return Err(GivenUp) };
        if let Some(held) = held {
            state.held.insert(self.index, held);
        }
        let device = self.shared.seat(self.index).device();
        match learned {
            Learned::Nothing => {}
            // How long it took says nothing of the model, and what it came to concerns no other one.
            Learned::Worked | Learned::Took { .. } if running.ground == Ground::Background => state.breaker.succeeded(),
            Learned::TooLarge { .. } if running.ground == Ground::Background => state.breaker.failed(self.shared.now()),
            Learned::Failed => state.breaker.failed(self.shared.now()),
            Learned::Worked => {
                state.breaker.succeeded();
                device.succeeded();
            }
            Learned::Took { padded_rows, forward } => {
                state.batcher.ran(padded_rows, forward);
                state.breaker.succeeded();
                device.succeeded();
            }
            Learned::TooLarge { padded_rows } => {
                state.batcher.costs_mut().out_of_memory(padded_rows);
                state.breaker.failed(self.shared.now());
                device.failed();
            }
            Learned::DeviceLost(error) => {
                state.stuck = Some(format!("{error}; restart the process"));
                let members = state.batcher.drain(self.shared.now());
                if let Err(error) = state.accepting() {
                    send(refuse(members, &error));
                }
            }
        }
        // The place of one that was replaced is idle since then.
        if trust == Trust::Sound && state.threads.contains_key(&self.thread) {
            state.batcher.executor_idle();
        }
        Ok(())
    }

    /// Another forward of the same batch begins.
    fn go_on(&self) -> Result<(), GivenUp> {
        let mut state = self.shared.lock();
        let now = self.shared.now();
        state.running.get_mut(&self.thread).map(|running| running.since = now).ok_or(GivenUp)
    }

    fn run_batch(&self, model: &mut dyn Model, batch: Batch) -> Result<Done, GivenUp> {
        let metrics = &self.shared.metrics;
        // Callers who went away between the taking and now are not worth a row.
        let (members, gone): (Vec<_>, Vec<_>) =
            batch.members.into_iter().partition(|member| !member.payload.caller.gone());
        count(&metrics.cancelled, requests(&gone));
        if members.is_empty() {
            return Ok(Done { trust: Trust::Sound, replies: Vec::new(), learned: Learned::Nothing });
        }
        let asked = members.iter().filter(|member| member.payload.purpose == Purpose::Request);
        asked.for_each(|member| metrics.waited(&member.waited));
        // What only checks were part of says nothing of what requests take, or of how they fare.
        let is_check = requests(&members) == 0;
        match self.run_members(model, &members, batch.padded_rows) {
            Ok(ran) => {
                let took = Learned::Took { padded_rows: ran.padded_rows, forward: ran.forward };
                let learned = if is_check { Learned::Nothing } else { took };
                Ok(Done { trust: Trust::Sound, replies: answer(members, &ran), learned })
            }
            Err(ModelError::Runtime(_)) if members.len() > 1 => {
                let parts = members.into_iter().map(|member| vec![member]).collect();
                self.run_parts(model, parts, None)
            }
            Err(ModelError::OutOfMemory(_)) if members.len() > 1 => {
                count(&metrics.out_of_memory, 1);
                // Everything of the failed forward is freed by now. Half of it may pass, once.
                let mut first = members;
                let second = first.split_off(first.len() / 2);
                self.run_parts(model, vec![first, second], Some(batch.padded_rows))
            }
            Err(error) => {
                let learned = match error {
                    _ if is_check => Learned::Nothing,
                    ModelError::OutOfMemory(_) => {
                        count(&metrics.out_of_memory, 1);
                        Learned::TooLarge { padded_rows: batch.padded_rows }
                    }
                    ModelError::Panicked(_) => Learned::Failed,
                    ModelError::Device(_) => Learned::DeviceLost(error.clone()),
                    // It may well be the input.
                    _ => Learned::Nothing,
                };
                let trust = Trust::after(&error);
                Ok(Done { trust, replies: refuse(members, &InferError::Model(error)), learned })
            }
        }
    }

    /// Runs a failed batch in parts: member by member, so that an input the model cannot take, such as an index beyond
    /// its embedding, fails its own request and not its neighbours'; or in halves, where memory was short.
    fn run_parts(
        &self,
        model: &mut dyn Model,
        parts: Vec<Vec<Member<Job>>>,
        too_large: Option<usize>,
    ) -> Result<Done, GivenUp> {
        let mut parts = parts.into_iter();
        let mut replies = Vec::new();
        let (mut worked, mut failed) = (0, 0);
        while let Some(part) = parts.next() {
            // Nobody waits for those behind; only the last replies are left to the caller.
            send(std::mem::take(&mut replies));
            self.go_on()?;
            let now = self.shared.now();
            let (part, expired): (Vec<_>, Vec<_>) = part.into_iter().partition(|member| member.deadline > now);
            count(&self.shared.metrics.expired, requests(&expired));
            replies = refuse(expired, &InferError::Expired);
            if part.is_empty() {
                continue;
            }
            count(&self.shared.metrics.isolated, requests(&part));
            let rows = part.iter().map(|member| member.rows).sum();
            match self.run_members(model, &part, self.shared.limits.padded_rows(rows)) {
                Ok(ran) => {
                    worked += 1;
                    replies.extend(answer(part, &ran));
                }
                Err(error) => {
                    failed += 1;
                    let trust = Trust::after(&error);
                    let fatal = match &error {
                        ModelError::Device(_) => Some(Learned::DeviceLost(error.clone())),
                        _ => (trust == Trust::Broken).then_some(Learned::Failed),
                    };
                    let error = InferError::Model(error);
                    replies.extend(refuse(part, &error));
                    if let Some(learned) = fatal {
                        parts.for_each(|part| replies.extend(refuse(part, &error)));
                        return Ok(Done { trust, replies, learned });
                    }
                }
            }
        }
        let learned = match too_large {
            Some(padded_rows) => Learned::TooLarge { padded_rows },
            None if worked > 0 => Learned::Worked,
            // Not one of several inputs that have nothing to do with each other.
            None if failed > 1 => Learned::Failed,
            None => Learned::Nothing,
        };
        Ok(Done { trust: Trust::Sound, replies, learned })
    }

    fn run_members(
        &self,
        model: &mut dyn Model,
        members: &[Member<Job>],
        padded_rows: usize,
    ) -> Result<Ran, ModelError> {
        let metrics = &self.shared.metrics;
        let rows: usize = members.iter().map(|member| member.rows).sum();
        let padded_rows = padded_rows.min(self.shared.limits.padded_rows(rows)).max(rows);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let inputs = join(&self.shared.spec, members, padded_rows)?;
            let start = Timer::start(self.shared.timed_by(self.index, self.ground.get()));
            let outputs = model.forward(&inputs)?;
            let forward = start.elapsed();
            self.shared.spec.check_outputs(&outputs, padded_rows)?;
            let outputs = outputs.into_iter().map(Tensor::squeeze_single_column).collect();
            Ok(Ran { outputs: Arc::new(outputs), forward, rows, padded_rows })
        }));
        let ran = ran.unwrap_or_else(|panic| {
            count(&metrics.panics, 1);
            Err(ModelError::Panicked(panic_message(panic.as_ref())))
        });
        match &ran {
            Ok(_) if requests(members) == 0 => {}
            Ok(_) => {
                let asked = members.iter().filter(|member| member.payload.purpose == Purpose::Request);
                count(&metrics.batches, 1);
                count(&metrics.rows, asked.map(|member| member.rows).sum());
                count(&metrics.padding_rows, padded_rows - rows);
            }
            Err(error) => {
                count(&metrics.failures, usize::from(requests(members) > 0));
                tracing::warn!(model = self.shared.name, executor = self.index, rows, %error, "a forward failed");
            }
        }
        ran
    }

    /// Loads a new copy of the model, again and again with pauses, and reports idle. `None` when the server closes first.
    fn reload(&self) -> Option<Box<dyn Model>> {
        for attempt in 0_u32.. {
            let prepared = self.prepare();
            let mut state = self.shared.lock();
            let error = match prepared {
                Ok((model, _)) => {
                    if state.take_over(self.thread) {
                        // The old one sleeps, or has its last batch.
                        self.shared.wake.notify_all();
                    } else {
                        state.ready += 1;
                        state.batcher.executor_idle();
                    }
                    state.failure = None;
                    self.shared.look.notify_one();
                    tracing::warn!(model = self.shared.name, executor = self.index, "the model was loaded again");
                    return Some(model);
                }
                Err(error) => chain(&error),
            };
            let (model, executor) = (&self.shared.name, self.index);
            tracing::error!(model, executor, error, "the model could not be loaded again");
            state.failure = Some(error);
            if state.ready == 0 {
                // Nobody is left to run them.
                let members = state.batcher.drain(self.shared.now());
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

/// Names of threads have room for so many bytes.
const THREAD_NAME_BYTES: usize = 15;

/// No two threads have the same one, so that those which a library starts for an executor are known by it.
fn thread_name(model: &str, index: usize) -> String {
    static STARTED: AtomicU64 = AtomicU64::new(0);
    let suffix = format!("/{index}.{}", STARTED.fetch_add(1, Ordering::Relaxed));
    let mut end = THREAD_NAME_BYTES.saturating_sub(suffix.len()).min(model.len());
    while !model.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &model[..end])
}

impl Drop for Executor {
    /// However a thread ends, callers must not wait for it.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.grounds.ended(self.thread);
        if let Some(running) = state.running.remove(&self.thread) {
            let error = InferError::Unavailable("the executor ended without an answer".to_owned());
            running.callers.iter().for_each(|caller| caller.answer(Err(error.clone())));
        }
        if state.threads.remove(&self.thread).is_none() {
            // Given up or replaced: another has its place.
            return;
        }
        if state.threads.is_empty() && !state.grounds.has_vacant() {
            state.stage = Stage::Closing;
            let members = state.batcher.drain(self.shared.now());
            send(refuse(members, &InferError::ShuttingDown));
        }
    }
}

/// Gives every member its rows of what ran. Not yet sent.
fn answer(members: Vec<Member<Job>>, ran: &Ran) -> Vec<(Arc<Caller>, Reply)> {
    let mut start = 0;
    let answers = members.into_iter().map(|member| {
        let rows = start..start + member.rows;
        start = rows.end;
        let answer = Answer {
            outputs: ran.outputs.clone(),
            rows,
            waited: member.waited,
            forward: ran.forward,
            batch_rows: ran.rows,
        };
        (member.payload.caller, Ok(answer))
    });
    answers.collect()
}

/// How many of the members somebody asked for.
fn requests(members: &[Member<Job>]) -> usize {
    members.iter().filter(|member| member.payload.purpose == Purpose::Request).count()
}

fn send(replies: Vec<(Arc<Caller>, Reply)>) {
    replies.into_iter().for_each(|(caller, reply)| caller.answer(reply));
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
