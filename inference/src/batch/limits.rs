//! What bounds a queue, and which policy empties it.

use std::time::Duration;

/// What waits in a queue of so many bytes is memory that nothing else can use; beyond it, waiting requests are refused
/// whatever their number of rows.
const QUEUE_BYTES_MAX: usize = 256 << 20;

/// How long an idle executor waits for company for what is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Not at all, unless bursts were seen lately, and then at most 3 ms.
    #[default]
    Adaptive,
    /// Until the batch is full or its oldest member has waited so long: the fixed window of other servers. Of zero
    /// length, it never waits.
    Window(Duration),
}

/// The bounds of one model's queue, and its policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    rows_max: usize,
    queue_rows_max: usize,
    queue_bytes_max: usize,
    tiers: usize,
    policy: Policy,
    deadline: Option<Duration>,
}

impl BatchLimits {
    /// At most `rows_max` rows in a batch and `queue_rows_max` rows waiting. Both are at least 1; a queue shorter
    /// than one batch could never fill one, so it is made as long. One tier, the adaptive policy, no declared deadline.
    pub fn new(rows_max: usize, queue_rows_max: usize) -> BatchLimits {
        let rows_max = rows_max.max(1);
        BatchLimits {
            rows_max,
            queue_rows_max: queue_rows_max.max(rows_max),
            queue_bytes_max: QUEUE_BYTES_MAX,
            tiers: 1,
            policy: Policy::Adaptive,
            deadline: None,
        }
    }

    pub fn with_policy(self, policy: Policy) -> BatchLimits {
        BatchLimits { policy, ..self }
    }

    /// Smaller batches, and a queue as long as before.
    pub fn with_rows_max(self, rows_max: usize) -> BatchLimits {
        BatchLimits { rows_max: rows_max.clamp(1, self.queue_rows_max), ..self }
    }

    /// So many tiers, the most important first.
    pub fn with_tiers(self, tiers: usize) -> BatchLimits {
        BatchLimits { tiers: tiers.max(1), ..self }
    }

    /// The declared deadline of the model's requests: batches shrink when their forwards take too much of it.
    pub fn with_deadline(self, deadline: Option<Duration>) -> BatchLimits {
        BatchLimits { deadline, ..self }
    }

    pub fn with_queue_bytes_max(self, queue_bytes_max: usize) -> BatchLimits {
        BatchLimits { queue_bytes_max, ..self }
    }

    pub fn rows_max(self) -> usize {
        self.rows_max
    }

    pub fn queue_rows_max(self) -> usize {
        self.queue_rows_max
    }

    pub fn queue_bytes_max(self) -> usize {
        self.queue_bytes_max
    }

    pub fn tiers(self) -> usize {
        self.tiers
    }

    pub fn policy(self) -> Policy {
        self.policy
    }

    pub fn deadline(self) -> Option<Duration> {
        self.deadline
    }

    /// How many rows may wait, of all tiers together, for one more of this tier to be let in: the whole queue for the
    /// first tier, three quarters of the one above for every other. A flood of unimportant work leaves room.
    pub fn tier_rows_max(self, tier: usize) -> usize {
        (0..tier.min(self.tiers - 1)).fold(self.queue_rows_max, |rows, _| (rows - rows / 4).max(self.rows_max))
    }

    /// The sizes that batches are padded to: 1, 2, 4, 8, ... and the maximum itself. Runtimes specialise on shapes;
    /// a few sizes can all be warmed up, and bound what the runtime caches per shape.
    pub fn padded_sizes(self) -> Vec<usize> {
        let powers = std::iter::successors(Some(1_usize), |size| size.checked_mul(2));
        powers.take_while(|&size| size < self.rows_max).chain([self.rows_max]).collect()
    }

    /// The size that a batch of `rows` rows is padded to.
    pub fn padded_rows(self, rows: usize) -> usize {
        rows.checked_next_power_of_two().map_or(self.rows_max, |size| size.min(self.rows_max)).max(rows)
    }

    /// The largest padded size of at most `rows` rows, or 1.
    pub fn padded_rows_within(self, rows: usize) -> usize {
        let rows = rows.max(1);
        if rows >= self.rows_max { self.rows_max } else { 1 << rows.ilog2() }
    }

    /// The place of a padded size among [`BatchLimits::padded_sizes`].
    pub(super) fn place(self, padded_rows: usize) -> usize {
        let last = if self.rows_max == 1 { 0 } else { (self.rows_max - 1).ilog2() as usize + 1 };
        if padded_rows >= self.rows_max { last } else { padded_rows.max(1).ilog2() as usize }
    }
}
