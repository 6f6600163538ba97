//! The background: executors whose work must not delay anybody.
//!
//! In the background an executor's thread runs at the lowest priority, so that it has a core when no other thread wants it.
//! The danger is what such a thread holds while it is kept from running. So it takes no turn at its device, takes none of the
//! locks that executors of other models take there (a number that they publish tells it whether there is room to begin), tells
//! the device's breaker nothing, and does not load models: that would hold libtorch's tables. On an accelerator it keeps its
//! priority, since a thread that is stopped inside the driver would stop others; there it begins when nobody else runs.
//!
//! Going up again may be forbidden. Then the thread goes on as it is until a fresh one has loaded the model and takes over
//! its place: somebody answers all the time. The copies that both hold meanwhile are in the ledger; where there is no room for
//! one more, the old one ends first, and requests wait in the queue for as long as loading takes. One is replaced at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::shared::{Shared, Stage, State};
use super::thread::Executor;
use crate::device::Held;
use crate::memory::{Footprint, MemoryError};
use crate::model::Device;
use crate::priority::{self, Lowered, Whose};

/// Where a forward runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    Foreground,
    Background,
}

/// Which executors are in the background, and who is on the way back.
#[derive(Default)]
pub(super) struct Grounds {
    /// Where they are to be.
    pub background: bool,
    /// Those that are in the background, or are too low for the foreground: by thread, until it ends.
    low: BTreeMap<u64, Low>,
    /// A fresh thread is being made ready for the place of this one.
    replacing: Option<Replacing>,
    /// Threads that are to end before their places are filled again.
    leaving: BTreeSet<u64>,
    /// Places without a thread, by the number of the executor.
    vacant: Vec<(usize, mpsc::Sender<()>)>,
    /// What a replaced thread keeps of the ledger until it has ended.
    retired: BTreeMap<u64, Option<Held>>,
}

struct Low {
    index: usize,
    /// None where nothing was lowered.
    lowered: Option<Lowered>,
}

struct Replacing {
    old: u64,
    new: Option<u64>,
    /// The copy that there is beside those of the server's own entry.
    held: Option<Held>,
}

impl Grounds {
    pub fn of(&self, thread: u64) -> Ground {
        if self.low.contains_key(&thread) { Ground::Background } else { Ground::Foreground }
    }

    /// Whether a fresh thread is being made ready in place of this one.
    pub fn successor_of(&self, thread: u64) -> bool {
        self.replacing.as_ref().is_some_and(|replacing| replacing.old == thread)
    }

    /// Nobody is to fill what is empty. Says whether anything was.
    pub fn give_up_vacant(&mut self) -> bool {
        !std::mem::take(&mut self.vacant).is_empty()
    }

    /// Whether the end of the last thread is not the end of the server.
    pub fn has_vacant(&self) -> bool {
        !self.vacant.is_empty()
    }

    /// A thread has ended.
    pub fn ended(&mut self, thread: u64) {
        self.low.remove(&thread);
        self.leaving.remove(&thread);
        self.retired.remove(&thread);
        self.replacing.take_if(|replacing| replacing.new == Some(thread));
    }
}

impl State {
    /// Whether an idle thread has been told to end, so that its place can be filled again. It vacates it next.
    pub fn leave(&mut self, thread: u64) -> bool {
        let leaves = self.grounds.leaving.remove(&thread);
        if leaves {
            self.ready -= 1;
            self.batcher.executor_gone();
        }
        leaves
    }

    /// A thread without a model ends, and its place is to be filled. False when it is to end like any other.
    pub fn vacate(&mut self, thread: u64, index: usize) -> bool {
        if self.stage == Stage::Closing {
            return false;
        }
        let alive = self.threads.remove(&thread);
        if !self.grounds.successor_of(thread) {
            self.grounds.vacant.extend(alive.map(|alive| (index, alive)));
        }
        true
    }

    /// A fresh thread has the model and takes the place of another one, if it is still there. Says whether it was: then the
    /// server has as many executors as before.
    pub fn take_over(&mut self, new: u64) -> bool {
        let Some(replacing) = self.grounds.replacing.take_if(|replacing| replacing.new == Some(new)) else {
            return false;
        };
        let Replacing { old, held, .. } = replacing;
        let was_there = self.threads.remove(&old).is_some();
        if was_there {
            // It gives its copy back when it has finished what it runs.
            self.grounds.retired.insert(old, held);
            if self.running.contains_key(&old) {
                self.batcher.executor_idle();
            }
        }
        was_there
    }
}

impl Shared {
    pub fn set_background(&self, background: bool) {
        let mut state = self.lock();
        if state.grounds.background == background {
            return;
        }
        state.grounds.background = background;
        self.seats().for_each(|seat| seat.set_background(background));
        // Those that sleep go down by themselves; others have to help them up.
        self.wake.notify_all();
        self.look.notify_one();
    }

    pub fn is_background(&self) -> bool {
        let state = self.lock();
        state.grounds.background || state.grounds.low.keys().any(|thread| state.threads.contains_key(thread))
    }

    pub fn is_busy(&self) -> bool {
        let busy = |state: MutexGuard<'_, State>| state.batcher.queue_rows() > 0 || !state.running.is_empty();
        match self.try_lock() {
            Ok(state) => busy(state),
            Err(TryLockError::Poisoned(poisoned)) => busy(poisoned.into_inner()),
            // Somebody is about to ask it something, or to answer.
            Err(TryLockError::WouldBlock) => true,
        }
    }

    /// The calling executor's thread goes down, if it is to and has not.
    pub fn step_aside(&self, state: &mut State, thread: u64, index: usize) {
        let goes = state.grounds.background && state.stage == Stage::Serving;
        if !goes || state.grounds.of(thread) == Ground::Background {
            return;
        }
        let on_cpu = self.recipe.devices.of_executor(index) == Device::Cpu;
        let whose = if self.recipe.load.threads > 1 { Whose::Team } else { Whose::Thread };
        let lowered = on_cpu.then(|| priority::lower(whose));
        state.grounds.low.insert(thread, Low { index, lowered });
    }

    /// Whether an executor in the background may begin a forward. One that is only too low for the foreground may always.
    pub fn may_begin(&self, state: &State, index: usize) -> bool {
        let seat = self.seat(index);
        let slots = match self.recipe.devices.of_executor(index) {
            Device::Cpu => self.recipe.load.threads.clamp(1, seat.device().slots()),
            Device::Cuda(_) => seat.device().slots(),
        };
        !state.grounds.background || state.stage == Stage::Closing || seat.is_spare(slots)
    }

    pub fn timed_by(&self, index: usize, ground: Ground) -> TimedBy {
        let on_cpu = self.recipe.devices.of_executor(index) == Device::Cpu;
        match ground {
            Ground::Background if on_cpu && self.recipe.load.threads <= 1 => TimedBy::Processor,
            _ => TimedBy::Clock,
        }
    }

    /// Raises the executors that are lower than they should be, or has them replaced, one at a time.
    pub fn come_forward(self: &Arc<Shared>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.grounds.background || state.stage == Stage::Closing || state.grounds.low.is_empty() {
            return;
        }
        let risen = |low: &Low| low.lowered.as_ref().is_none_or(|lowered| lowered.restore().is_ok());
        state.grounds.low.retain(|thread, low| !state.threads.contains_key(thread) || !risen(low));
        // They may ask for turns now.
        self.wake.notify_all();
        let waits = |thread: &u64| state.threads.contains_key(thread) && !state.grounds.leaving.contains(thread);
        let next = state.grounds.low.iter().find(|(thread, _)| waits(thread)).map(|(thread, low)| (*thread, low.index));
        let Some((old, index)) = next.filter(|_| state.grounds.replacing.is_none()) else { return };
        match self.room_for_another(index) {
            Ok(held) => {
                let Some(alive) = state.threads.get(&old).cloned() else { return };
                state.grounds.replacing = Some(Replacing { old, new: None, held });
                drop(guard);
                if let Err(error) = Executor::spawn(self, index, alive, None, Some(old)) {
                    // What is there goes on; the next look tries again.
                    tracing::error!(model = self.name, %error, "no thread for an executor in the foreground");
                    self.lock().grounds.replacing = None;
                }
            }
            Err(error) => {
                tracing::warn!(
                    model = self.name, executor = index, %error,
                    "an executor ends before another takes its place: there is no memory for both"
                );
                state.grounds.leaving.insert(old);
            }
        }
    }

    /// The thread that takes the place of another one has its number.
    pub fn succeeds(&self, state: &mut State, new: u64, old: u64) {
        if let Some(replacing) = state.grounds.replacing.as_mut().filter(|replacing| replacing.old == old) {
            replacing.new = Some(new);
        }
    }

    /// Starts threads for places that have none.
    pub fn fill_vacant(self: &Arc<Shared>) {
        let vacant = std::mem::take(&mut self.lock().grounds.vacant);
        for (index, alive) in vacant {
            self.replace(index, alive);
        }
    }

    /// Enters one more copy of the model into the ledger, if it fits.
    fn room_for_another(&self, index: usize) -> Result<Option<Held>, MemoryError> {
        let Some(footprint) = self.certified.get() else { return Ok(None) };
        let name = format!("{} (an executor on its way to the foreground)", self.name);
        let one = Footprint { name, file_bytes: 0, executors: 1, ..footprint.clone() };
        self.seat(index).hold(one).map(Some)
    }
}

/// What the time of a forward is measured by. The clock also counts what others took of the core.
pub(super) enum TimedBy {
    Clock,
    Processor,
}

pub(super) struct Timer {
    started: Instant,
    processor: Option<Duration>,
}

impl Timer {
    pub fn start(by: TimedBy) -> Timer {
        let processor = match by {
            TimedBy::Clock => None,
            TimedBy::Processor => priority::processor_time(),
        };
        Timer { started: Instant::now(), processor }
    }

    pub fn elapsed(&self) -> Duration {
        let on_processor = self.processor.and_then(|started| Some(priority::processor_time()?.saturating_sub(started)));
        on_processor.unwrap_or_else(|| self.started.elapsed())
    }
}
