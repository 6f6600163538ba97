//! What is done with answers after they were given: logging them, and counting them for drift.
//!
//! None of it may cost a caller anything. So an answer is handed over as it is, columns and all, to a bounded queue that one
//! thread of low priority empties; when the queue is full the answer is dropped from it, and that is counted. The thread
//! looks every few milliseconds by itself: waking it for every request would cost the request more than the rest.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arrow::array::ArrayRef;
use feature_defs::plan::{EncodedInput, ModelPlan, ServicePlan};
use feature_defs::time::Micros;
use feature_defs::value::Type;
use registry::id::EntryNumber;

use crate::answer::Clock;
use crate::features::Features;
use crate::predict::RowOutcome;
use crate::request::Rows;
use crate::rollout::trial::{Assigned, Trial};

/// Answers that wait, and what they hold, about. Beyond either they are dropped: whoever is behind by so much does not catch up.
const ANSWERS_MAX: usize = 8_192;
const BYTES_MAX: usize = 128 << 20;
/// How often the queue is looked at.
const LOOK: Duration = Duration::from_millis(10);
const TICK: Duration = Duration::from_secs(1);
/// Of an answer beside its values.
const ANSWER_BYTES: usize = 2_048;
/// Of one value, about.
const VALUE_BYTES: usize = 12;
/// Behind what answers, before idle work.
const NICE: i32 = 10;

/// One answered request, as it was answered.
#[derive(Debug)]
pub struct Observed {
    pub service: Arc<ServicePlan>,
    pub rows: Rows,
    pub features: Arc<Features>,
    /// Which rows of the request these are; none for all of it.
    pub places: Option<Vec<usize>>,
    /// Empty where the caller gave none and none was made.
    pub request_id: String,
    /// The server's clock when it was answered.
    pub time: Micros,
    pub total: Duration,
    /// None: features were asked for.
    pub prediction: Option<ObservedPrediction>,
}

#[derive(Debug)]
pub struct ObservedPrediction {
    pub plan: Arc<ModelPlan>,
    pub version: u32,
    /// Why that version was asked.
    pub arm: &'static str,
    /// Declared outputs, then `post` expressions.
    pub outputs: Vec<(String, ArrayRef, Type)>,
    pub rows: Vec<RowOutcome>,
    /// What the model was given; zeros where it was not asked.
    pub encoded: Vec<EncodedInput>,
    pub queue_time: Duration,
    pub forward_time: Duration,
    /// Where the rows stand in the rollout that ran.
    pub exposed: Option<Exposed>,
}

/// Where the rows of an answer stand in a rollout.
#[derive(Debug)]
pub struct Exposed {
    pub trial: Arc<Trial>,
    /// By row; none where it names no unit.
    pub assigned: Vec<Option<Assigned>>,
    /// What the champion answered to the same rows, where this is the answer of a version in shadow.
    pub beside: Option<Arc<Observed>>,
}

/// Whose rows something is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct About {
    pub service: Arc<str>,
    pub model: Option<AboutModel>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AboutModel {
    pub name: Arc<str>,
    pub version: u32,
    pub arm: &'static str,
    /// The entry that began the rollout that counts them.
    pub rollout: Option<EntryNumber>,
}

impl Observed {
    pub fn about(&self) -> About {
        let model = self.prediction.as_ref().map(|of| AboutModel {
            name: of.plan.name.clone(),
            version: of.version,
            arm: of.arm,
            rollout: of.exposed.as_ref().map(|exposed| exposed.trial.rollout),
        });
        About { service: self.service.name.clone(), model }
    }

    /// What it holds of memory, about: enough to bound a queue by.
    fn bytes(&self) -> usize {
        let columns = self.rows.columns.len() + 2 * self.features.assembled.columns.len();
        let inputs = self.features.fetched.inputs.len() * 6;
        let encoded: usize = self.prediction.iter().flat_map(|of| &of.encoded).map(|input| input.width).sum();
        let vectors: usize =
            self.features.assembled.columns.iter().map(|column| column.get_array_memory_size()).sum::<usize>();
        // What the champion answered beside it was weighed when it was handed over.
        ANSWER_BYTES + vectors + self.rows.count * (columns + inputs + encoded) * VALUE_BYTES
    }
}

/// Does something with answers. All of it runs on one thread, in the order in which they were given.
pub trait Observer: Send {
    fn observe(&mut self, observed: &Observed);
    /// So many rows were answered and will not be observed.
    fn dropped(&mut self, about: &About, time: Micros, rows: u64);
    /// About every second.
    fn tick(&mut self, now: Micros);
    /// Nothing comes any more: keep what must not be lost.
    fn end(&mut self, now: Micros);
}

/// Where answers are handed over.
pub struct Observing {
    queue: Arc<Queue>,
    clock: Clock,
    is_on: bool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// Notified when nothing comes any more.
    ended: Condvar,
}

#[derive(Default)]
struct Waiting {
    answers: VecDeque<(Arc<Observed>, usize)>,
    bytes: usize,
    dropped: HashMap<About, u64>,
    ended: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observing {
    /// Without observers nothing is ever queued.
    pub fn start(mut observers: Vec<Box<dyn Observer>>, clock: Clock) -> std::io::Result<Observing> {
        let queue = Arc::new(Queue::default());
        let thread = match observers.is_empty() {
            true => None,
            false => {
                let (queue, clock) = (queue.clone(), clock.clone());
                let run = move || {
                    crate::nice::lower(NICE);
                    run(&queue, &mut observers, &clock);
                };
                Some(std::thread::Builder::new().name("observing".into()).spawn(run)?)
            }
        };
        Ok(Observing { queue, clock, is_on: thread.is_some(), thread: Mutex::new(thread) })
    }

    /// Whether anybody observes.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Hands an answer over; never waits.
    pub fn hand_over(&self, observed: impl Into<Arc<Observed>>) {
        let observed = observed.into();
        let bytes = observed.bytes();
        let mut waiting = self.queue.lock();
        if waiting.ended {
            return;
        }
        if waiting.answers.len() >= ANSWERS_MAX || waiting.bytes + bytes > BYTES_MAX {
            *waiting.dropped.entry(observed.about()).or_default() += observed.rows.count as u64;
            return;
        }
        waiting.bytes += bytes;
        waiting.answers.push_back((observed, bytes));
    }

    /// Takes nothing more, and waits until everything that was handed over has been observed. Blocks.
    pub fn end(&self) {
        self.queue.lock().ended = true;
        self.queue.ended.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread that logs and counts answers has panicked");
        }
    }

    pub fn now(&self) -> Micros {
        (self.clock)()
    }
}

fn run(queue: &Queue, observers: &mut [Box<dyn Observer>], clock: &Clock) {
    let mut ticked = Instant::now();
    loop {
        let mut waiting = queue.lock();
        if waiting.answers.is_empty() && !waiting.ended {
            let waited = queue.ended.wait_timeout(waiting, LOOK);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let answers = std::mem::take(&mut waiting.answers);
        let dropped = std::mem::take(&mut waiting.dropped);
        let ended = waiting.ended;
        drop(waiting);
        for (about, rows) in dropped {
            let now = clock();
            observers.iter_mut().for_each(|observer| observer.dropped(&about, now, rows));
        }
        for (observed, bytes) in answers {
            observers.iter_mut().for_each(|observer| observer.observe(&observed));
            drop(observed);
            // Only now: what is being worked on still holds its memory.
            let mut waiting = queue.lock();
            waiting.bytes = waiting.bytes.saturating_sub(bytes);
        }
        if ended {
            let is_empty = queue.lock().answers.is_empty();
            if is_empty {
                break;
            }
        }
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            let now = clock();
            observers.iter_mut().for_each(|observer| observer.tick(now));
        }
    }
    let now = clock();
    observers.iter_mut().for_each(|observer| observer.end(now));
}

#[cfg(test)]
pub(crate) mod tests;
