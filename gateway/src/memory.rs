//! Watches what the process holds against what the models' ledger says it should: bytes that nobody can account for, and that
//! grow, are a leak.
//!
//! Two things are watched, as growth because neither has a right value. Of each model, the tensors that its executors still
//! hold between two forwards; there a leak is the model's own, and is found early. And of the whole process, what is resident
//! beyond the ledger's sum; that finds everything else, but has to tell it from caches that fill.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use inference::device::SharedDevice;
use inference::growth::{Growing, Growth, GrowthLimits};
use inference::memory::shown;

use crate::follow::Served;

/// The least of every minute counts, and fifteen of them are looked at.
const WINDOW: Duration = Duration::from_secs(60);
/// A model that keeps less than this in ten minutes is not told of.
const MODEL_BYTES_MIN: u64 = 1 << 20;
/// Nor a process that grows by less than this part of the memory there is, and at least so much: caches and maps of the other
/// parts have bounds of some hundred MiB.
const PROCESS_SHARE: u64 = 20;
const PROCESS_BYTES_MIN: u64 = 256 << 20;

/// What was last seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryState {
    pub capacity: u64,
    /// What the ledger has entered for models.
    pub reserved: u64,
    /// Of the process, in RAM.
    pub resident: u64,
}

impl MemoryState {
    /// What is resident beyond the ledger. Below zero where the largest batches are not running.
    pub fn unaccounted(&self) -> i64 {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        signed(self.resident) - signed(self.reserved)
    }
}

pub struct MemoryWatch {
    began: Instant,
    window: Duration,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    state: MemoryState,
    process: Option<Growth>,
    models: BTreeMap<(String, u32), Growth>,
}

impl Default for MemoryWatch {
    fn default() -> MemoryWatch {
        MemoryWatch::with_window(WINDOW)
    }
}

impl MemoryWatch {
    /// The least of every `window` counts.
    pub fn with_window(window: Duration) -> MemoryWatch {
        MemoryWatch { began: Instant::now(), window, seen: Mutex::default() }
    }

    /// Looks once; to be called every second or so.
    pub fn look(&self, served: &Served, cpu: &SharedDevice) {
        let held = served.loaded().filter_map(|model| {
            let version = (model.name.to_string(), model.version);
            Some((version, model.server.held()?))
        });
        let state = MemoryState {
            capacity: cpu.capacity().unwrap_or(0),
            reserved: cpu.reserved(),
            resident: inference::memory::resident().unwrap_or(0),
        };
        self.see(self.began.elapsed(), state, held.collect());
    }

    fn see(&self, now: Duration, state: MemoryState, held: BTreeMap<(String, u32), u64>) {
        let limits = |bytes_min| GrowthLimits { window: self.window, bytes_min };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = (state.capacity / PROCESS_SHARE).max(PROCESS_BYTES_MIN);
        // A model that came or went changes what is beyond the sum, and that is no leak.
        let changed = seen.state.reserved != state.reserved;
        let process = seen.process.get_or_insert_with(|| Growth::new(limits(enough)));
        if changed {
            process.reset();
        }
        process.seen(now, state.unaccounted());
        seen.state = state;
        seen.models.retain(|version, _| held.contains_key(version));
        for (version, bytes) in held {
            let growth = seen.models.entry(version).or_insert_with(|| Growth::new(limits(MODEL_BYTES_MIN)));
            growth.seen(now, i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    pub fn state(&self) -> MemoryState {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).state
    }

    /// What grows: a model, or, without a name, the process.
    pub fn growing(&self) -> Vec<(Option<(String, u32)>, Growing)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let models =
            seen.models.iter().filter_map(|(version, growth)| Some((Some(version.clone()), growth.growing()?)));
        let process = seen.process.as_ref().and_then(Growth::growing).map(|growing| (None, growing));
        models.chain(process).collect()
    }

    /// The same in words.
    pub fn alarms(&self) -> Vec<String> {
        let minutes = |within: Duration| within.as_secs().div_ceil(60);
        let alarm = |(of, Growing { by, within }): (Option<(String, u32)>, Growing)| match of {
            Some((name, version)) => format!(
                "version {version} of model `{name}` keeps tensors after its forwards: {} more within {} min; it leaks, so look \
                 for state that its `forward` appends to, and load it again meanwhile",
                shown(by),
                minutes(within)
            ),
            None => format!(
                "memory that the models' ledger cannot account for grew by {} within {} min; if it goes on, restart the process \
                 before the machine does",
                shown(by),
                minutes(within)
            ),
        };
        self.growing().into_iter().map(alarm).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn watch(minutes: u64, look: impl Fn(u64) -> (MemoryState, u64)) -> Vec<String> {
        let watch = MemoryWatch::default();
        for second in 0..minutes * 60 {
            let (state, held) = look(second);
            watch.see(Duration::from_secs(second), state, BTreeMap::from([(("delay".to_owned(), 2), held)]));
        }
        watch.alarms()
    }

    fn state(resident: u64, reserved: u64) -> MemoryState {
        MemoryState { capacity: 8 * GIB, reserved, resident }
    }

    #[test]
    fn a_model_that_keeps_tensors_is_named() {
        let alarms = watch(17, |second| (state(GIB, GIB), second * 4096));
        assert_eq!(alarms.len(), 1, "{alarms:?}");
        let expected =
            "version 2 of model `delay` keeps tensors after its forwards: 2.3 MiB more within 10 min; it leaks";
        assert!(alarms[0].starts_with(expected), "{alarms:?}");
    }

    #[test]
    fn a_process_that_grows_beyond_the_ledger_is_told_of() {
        let alarms = watch(17, |second| (state(GIB + second * MIB, 2 * GIB), 7));
        assert_eq!(alarms.len(), 1, "{alarms:?}");
        assert!(alarms[0].starts_with("memory that the models' ledger cannot account for grew by 6"), "{alarms:?}");
        // By less than a twentieth of what there is.
        assert_eq!(watch(17, |second| (state(GIB + second * MIB / 3, 2 * GIB), 7)), [""; 0]);
    }

    #[test]
    fn models_that_come_and_go_are_no_leak() {
        // Every deploy of ten takes 200 MiB, and the ledger says so.
        let deployed = |second: u64| second / 120 * 200 * MIB;
        assert_eq!(watch(20, |second| (state(GIB + deployed(second), deployed(second)), 7)), [""; 0]);
    }
}
