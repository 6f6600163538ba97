//! What models share: the cores of a device and its memory. The shell around [`Turns`] and [`Ledger`], one per device and
//! process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::batch::TURN_AGAIN;
use crate::breaker::{Breaker, Open};
use crate::ledger::{EntryId, Ledger};
use crate::memory::{Footprint, MemoryError};
use crate::model::{Device, Runtime};
use crate::turns::{SeatId, Turns};

/// A model that warms up gives way for so long to those that are served, and then waits for its turn like them: under a load
/// that never pauses it would never be ready.
const GIVE_WAY_MAX: Duration = Duration::from_millis(100);

/// Forwards of all models at once on an accelerator: one that computes, and one whose inputs or outputs are on their way.
const ACCELERATOR_SLOTS: usize = 2;

/// A device with its models.
#[derive(Debug)]
pub struct SharedDevice {
    slots: usize,
    turns: Mutex<Taking>,
    /// Slots that nobody has or waits for, as they were when `turns` was last unlocked: for whoever must not hold that up.
    spare: AtomicUsize,
    ledger: Mutex<Ledger>,
    /// Of what any model here failed with for want of memory, or never ended.
    breaker: Mutex<Breaker>,
    /// The zero of the breaker's time.
    epoch: Instant,
}

/// The devices of a process, each from when it is first asked for.
#[derive(Debug)]
pub struct SharedDevices(Mutex<BTreeMap<Device, Arc<SharedDevice>>>);

impl SharedDevices {
    /// This machine's.
    pub fn new() -> SharedDevices {
        SharedDevices::with_cpu(SharedDevice::cpu())
    }

    pub fn with_cpu(cpu: SharedDevice) -> SharedDevices {
        SharedDevices(Mutex::new(BTreeMap::from([(Device::Cpu, Arc::new(cpu))])))
    }

    /// A device; the runtime says how much memory an accelerator has, which may have to open its library.
    pub fn get(&self, device: Device, runtime: &dyn Runtime) -> Arc<SharedDevice> {
        if let Some(known) = self.devices().get(&device) {
            return known.clone();
        }
        let memory = runtime.device_memory(device).map(|memory| memory.total);
        let new = || Arc::new(SharedDevice::new(ACCELERATOR_SLOTS, memory));
        self.devices().entry(device).or_insert_with(new).clone()
    }

    /// The CPU.
    pub fn cpu(&self) -> Option<Arc<SharedDevice>> {
        self.devices().get(&Device::Cpu).cloned()
    }

    /// Those that were asked for, the CPU first.
    pub fn all(&self) -> Vec<(Device, Arc<SharedDevice>)> {
        self.devices().iter().map(|(device, shared)| (*device, shared.clone())).collect()
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<Device, Arc<SharedDevice>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for SharedDevices {
    fn default() -> SharedDevices {
        SharedDevices::new()
    }
}

#[derive(Debug)]
struct Taking {
    turns: Turns,
    /// What the executors of each model sleep on.
    wakes: BTreeMap<SeatId, Arc<Condvar>>,
}

impl SharedDevice {
    /// A device on which so many slots (cores, where it is the CPU) run forwards, with so many bytes of memory.
    pub fn new(slots: usize, memory: Option<u64>) -> SharedDevice {
        let turns = Taking { turns: Turns::new(slots), wakes: BTreeMap::new() };
        let slots = turns.turns.slots();
        SharedDevice {
            slots,
            turns: Mutex::new(turns),
            spare: AtomicUsize::new(slots),
            ledger: Mutex::new(Ledger::new(memory)),
            breaker: Mutex::default(),
            epoch: Instant::now(),
        }
    }

    /// This machine's cores and memory.
    pub fn cpu() -> SharedDevice {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        SharedDevice::new(cores, crate::memory::capacity())
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// What every model takes that is loaded or being loaded.
    pub fn footprints(&self) -> Vec<Footprint> {
        self.ledger().known().cloned().collect()
    }

    /// Enters something that is not a model yet, if it fits, until what is returned is dropped.
    pub fn hold(self: &Arc<SharedDevice>, footprint: Footprint) -> Result<Held, MemoryError> {
        let entry = self.ledger().enter();
        let held = Held { device: self.clone(), entry };
        self.ledger().reserve(entry, footprint)?;
        Ok(held)
    }

    /// Its memory; None where nobody says.
    pub fn capacity(&self) -> Option<u64> {
        self.ledger().capacity()
    }

    /// The sum of all footprints.
    pub fn reserved(&self) -> u64 {
        self.ledger().bytes()
    }

    /// Whether a request may go on, as far as the device is concerned.
    pub fn admit(&self) -> Result<(), Open> {
        self.breaker().admit(self.epoch.elapsed())
    }

    /// Until when and why requests of all its models are refused, if they are.
    pub fn open(&self) -> Option<Open> {
        self.breaker().open(self.epoch.elapsed())
    }

    /// A forward of any model was short of memory, or did not end.
    pub fn failed(&self) {
        self.breaker().failed(self.epoch.elapsed());
    }

    pub fn succeeded(&self) {
        self.breaker().succeeded();
    }

    // None is held while another is locked, and all are whole between any two calls: a panic leaves them in order.

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taking(&self) -> TakingGuard<'_> {
        TakingGuard { taking: self.turns.lock().unwrap_or_else(PoisonError::into_inner), spare: &self.spare }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Publishes what is spare when it is done.
struct TakingGuard<'a> {
    taking: MutexGuard<'a, Taking>,
    spare: &'a AtomicUsize,
}

impl std::ops::Deref for TakingGuard<'_> {
    type Target = Taking;

    fn deref(&self) -> &Taking {
        &self.taking
    }
}

impl std::ops::DerefMut for TakingGuard<'_> {
    fn deref_mut(&mut self) -> &mut Taking {
        &mut self.taking
    }
}

impl Drop for TakingGuard<'_> {
    fn drop(&mut self) {
        self.spare.store(self.taking.turns.spare(), Ordering::Relaxed);
    }
}

impl Taking {
    fn tell(&self, seats: Vec<SeatId>) {
        for seat in seats {
            if let Some(wake) = self.wakes.get(&seat) {
                wake.notify_one();
            }
        }
    }
}

/// An entry of the ledger. Dropping it removes it.
#[derive(Debug)]
pub struct Held {
    device: Arc<SharedDevice>,
    entry: EntryId,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.device.ledger().remove(self.entry);
    }
}

/// The place of a model at a device: its turns and its entry of the ledger. Dropping it gives both back.
#[derive(Debug)]
pub struct Seat {
    device: Arc<SharedDevice>,
    id: SeatId,
    entry: EntryId,
}

impl Seat {
    /// For a model whose forwards take `threads` slots each, and whose executors sleep on `wake`.
    pub fn new(device: Arc<SharedDevice>, threads: usize, wake: Arc<Condvar>) -> Arc<Seat> {
        // An accelerator has no threads to share out.
        let id = {
            let mut taking = device.taking();
            let id = taking.turns.join(threads);
            taking.wakes.insert(id, wake);
            id
        };
        let entry = device.ledger().enter();
        Arc::new(Seat { device, id, entry })
    }

    pub fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// The model is warm and served from now on.
    pub fn open(&self) {
        self.device.taking().turns.open(self.id);
    }

    /// The right to run one forward now, if there is room.
    pub fn turn(self: &Arc<Seat>) -> Option<Turn> {
        self.device.taking().turns.take(self.id).then(|| Turn(self.clone()))
    }

    /// Its forwards run in the background from now on, or do so no more.
    pub fn set_background(&self, background: bool) {
        let mut taking = self.device.taking();
        let told = taking.turns.set_background(self.id, background);
        taking.tell(told);
    }

    /// Whether so many of the device's slots are neither taken nor waited for. It takes no lock: whoever asks runs at the
    /// lowest priority, and might be kept from giving it back.
    pub fn is_spare(&self, slots: usize) -> bool {
        self.device.spare.load(Ordering::Relaxed) >= slots
    }

    /// There is nothing to run.
    pub fn forgo(&self) {
        let mut taking = self.device.taking();
        let told = taking.turns.forgo(self.id);
        taking.tell(told);
    }

    /// Waits for the right to run one forward of warm-up.
    pub fn warm_up_turn(self: &Arc<Seat>) -> Turn {
        let begun = Instant::now();
        loop {
            let granted = {
                let turns = &mut self.device.taking().turns;
                if begun.elapsed() < GIVE_WAY_MAX { turns.take_spare(self.id) } else { turns.take(self.id) }
            };
            if granted {
                return Turn(self.clone());
            }
            std::thread::sleep(TURN_AGAIN);
        }
    }

    /// Enters what is known of the model by now, if that fits.
    pub fn reserve(&self, footprint: Footprint) -> Result<(), MemoryError> {
        self.device.ledger().reserve(self.entry, footprint)
    }

    /// Enters something beside what the seat has, if it fits, until what is returned is dropped.
    pub fn hold(&self, footprint: Footprint) -> Result<Held, MemoryError> {
        self.device.hold(footprint)
    }

    pub fn may_try(&self, expected: &Footprint) -> Result<(), MemoryError> {
        self.device.ledger().may_try(self.entry, expected)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taking = self.device.taking();
        let told = taking.turns.leave(self.id);
        taking.wakes.remove(&self.id);
        taking.tell(told);
        drop(taking);
        self.device.ledger().remove(self.entry);
    }
}

/// The right to run one forward. Dropping it gives it back.
#[derive(Debug)]
pub struct Turn(Arc<Seat>);

impl Drop for Turn {
    fn drop(&mut self) {
        let Seat { device, id, .. } = &*self.0;
        let mut taking = device.taking();
        let told = taking.turns.give(*id);
        taking.tell(told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let device = Arc::new(SharedDevice::new(1, Some(1_000)));
        let seat = || Seat::new(device.clone(), 1, Arc::default());
        let footprint = |bytes| Footprint {
            name: "m".to_owned(),
            file_bytes: bytes,
            executors: 1,
            weight_bytes: 0,
            sizes: Vec::new(),
        };
        let (a, b) = (seat(), seat());
        let turn = a.turn().unwrap();
        assert!(b.turn().is_none());
        drop(turn);
        assert!(b.turn().is_some());
        a.reserve(footprint(800)).unwrap();
        assert!(b.reserve(footprint(1)).is_err());
        let turn = a.turn().unwrap();
        drop(a);
        assert_eq!(device.reserved(), 800, "a forward under way keeps the seat");
        drop(turn);
        assert_eq!(device.reserved(), 0);
        b.reserve(footprint(800)).unwrap();
    }

    #[test]
    fn warming_up_gives_way_but_not_for_ever() {
        let device = Arc::new(SharedDevice::new(1, None));
        let seat = || Seat::new(device.clone(), 1, Arc::default());
        let (served, new) = (seat(), seat());
        served.open();
        let turn = served.turn().unwrap();
        assert!(served.turn().is_none(), "so that it waits");
        std::thread::scope(|scope| {
            let warming = scope.spawn(|| drop(new.warm_up_turn()));
            // It is served without a pause.
            std::thread::sleep(GIVE_WAY_MAX / 4);
            drop(turn);
            let mut turns = 0;
            while !warming.is_finished() {
                if let Some(turn) = served.turn() {
                    turns += 1;
                    std::thread::sleep(TURN_AGAIN);
                    assert!(served.turn().is_none());
                    drop(turn);
                }
            }
            assert!(turns > 0);
        });
    }
}
