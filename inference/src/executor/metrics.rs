//! What a server counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::batch::{WaitReason, Waited};

/// Counters since the start, and the state of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetricsSnapshot {
    pub queue_rows: u64,
    pub queue_bytes: u64,
    /// How long a request of the first tier would wait now.
    pub estimated_wait: Duration,
    /// The most rows that a batch may have now.
    pub rows_cap: u64,
    /// Executors that have a working model.
    pub executors_ready: u64,
    pub requests: u64,
    /// Rows that ran, without padding.
    pub rows: u64,
    pub padding_rows: u64,
    pub batches: u64,
    /// Refused because the queue was full or too long for the deadline, the request too large, or the breaker open.
    pub rejected: u64,
    pub expired: u64,
    /// Left the queue because the model could not have answered in time.
    pub dropped: u64,
    /// Left the queue because the caller went away.
    pub cancelled: u64,
    /// Forwards that failed, panics included.
    pub failures: u64,
    pub panics: u64,
    /// Forwards that did not end.
    pub hangs: u64,
    /// Batches that the device had no memory for.
    pub out_of_memory: u64,
    pub breaker_open: bool,
    pub breaker_openings: u64,
    /// Members of a failed batch that were run once more on their own.
    pub isolated: u64,
    /// What the members of batches waited for, summed up.
    pub waited: Waited,
    /// How many of them waited longest for what.
    pub wait_reasons: [(WaitReason, u64); 5],
}

/// Declares the counters once, as atomics and as their part of a snapshot.
macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        #[derive(Default)]
        pub(super) struct Metrics {
            $(pub $name: AtomicU64,)*
            waited: WaitedMicros,
        }

        impl Metrics {
            pub fn snapshot(&self) -> MetricsSnapshot {
                MetricsSnapshot {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    waited: self.waited.load(),
                    wait_reasons: std::array::from_fn(|index| {
                        (WaitReason::ALL[index], self.waited.reasons[index].load(Ordering::Relaxed))
                    }),
                    ..MetricsSnapshot::default()
                }
            }
        }
    };
}

counters!(
    requests,
    rows,
    padding_rows,
    batches,
    rejected,
    expired,
    dropped,
    cancelled,
    failures,
    panics,
    hangs,
    out_of_memory,
    isolated,
);

#[derive(Default)]
struct WaitedMicros {
    whole: AtomicU64,
    executor_busy: AtomicU64,
    linger: AtomicU64,
    memory_permit: AtomicU64,
    tier: AtomicU64,
    /// In the order of [`WaitReason::ALL`].
    reasons: [AtomicU64; 5],
}

impl WaitedMicros {
    fn load(&self) -> Waited {
        let micros = |counter: &AtomicU64| Duration::from_micros(counter.load(Ordering::Relaxed));
        Waited {
            whole: micros(&self.whole),
            executor_busy: micros(&self.executor_busy),
            linger: micros(&self.linger),
            memory_permit: micros(&self.memory_permit),
            tier: micros(&self.tier),
        }
    }
}

impl Metrics {
    pub fn waited(&self, waited: &Waited) {
        let add = |counter: &AtomicU64, part: Duration| {
            if !part.is_zero() {
                counter.fetch_add(micros(part), Ordering::Relaxed);
            }
        };
        add(&self.waited.whole, waited.whole);
        add(&self.waited.executor_busy, waited.executor_busy);
        add(&self.waited.linger, waited.linger);
        add(&self.waited.memory_permit, waited.memory_permit);
        add(&self.waited.tier, waited.tier);
        self.waited.reasons[waited.reason() as usize].fetch_add(1, Ordering::Relaxed);
    }
}

pub(super) fn count(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
