//! Who runs next: the batching policy, pure. The problem: a forward over many rows costs little more than one over a
//! single row, so requests should share forwards; but waiting for company is what gives batching servers their bad
//! tail at low load (p50 15 ms, p95 200 ms with a fixed window).
//!
//! The policy is work-conserving. An idle executor takes what is there at once; requests wait only while every
//! executor is busy, and what gathered meanwhile is the next batch. The members of a batch are fixed at the moment
//! an executor takes it, never earlier. There is one exception: where requests were seen to come in bursts, and their
//! deadlines have the room, an idle executor waits for the rest of a burst, 3 ms at most.
//!
//! A batch is as large as the learned cost of forwards and its members' deadlines allow. What can no longer be answered
//! in time is not run; what would force a small batch while a full one waits behind it is not either, because then all
//! that wait would come late.
//!
//! Time is an argument, as the duration since an epoch of the caller's choice; nothing here waits, locks or calls
//! anything.

use std::time::Duration;

mod burst;
mod cost;
mod limits;
mod queue;
pub mod simulation;

pub use cost::Costs;
pub use limits::{BatchLimits, Policy};

use burst::{Bursts, Linger};
use queue::{Entry, Queue, Taken};

/// The wait is estimated from what is queued now. By this part of it, later arrivals of higher tiers and disturbed
/// forwards may make it longer, and what was let in is still answered in time.
const WAIT_MARGIN: u32 = 4;

/// Names a queued entry. Never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    number: u64,
    tier: usize,
    deadline: Duration,
}

/// What is known of an entry that is to be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub rows: usize,
    pub bytes: usize,
    pub deadline: Duration,
    /// 0 is the most important one; beyond the last, the last.
    pub tier: usize,
}

/// What the device lets run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    All,
    /// Memory is short: the first tier runs, the others wait.
    FirstTier,
    /// Forwards of other models take all of the device.
    NoTurn,
}

/// While memory is short for what waits, it is looked at again so soon.
const PERMIT_AGAIN: Duration = Duration::from_millis(50);
/// Who was refused a turn is told when that may have changed. It may just be about to sleep then and miss it, so it looks
/// again after so long at the latest.
pub const TURN_AGAIN: Duration = Duration::from_millis(1);

/// What became of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    pub ticket: Ticket,
    /// Whether an idle executor has to poll for it. One that lingers polls when its time is over.
    pub wake: bool,
}

/// Why an entry had to wait before its batch ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WaitReason {
    /// It did not: an executor was idle, and what passed is the time of waking it up.
    #[default]
    None,
    /// Every executor was busy, with others of this model or, where models share a device, of another.
    ExecutorBusy,
    /// An idle executor waited for company for it.
    Linger,
    /// An executor was idle, but there was no memory for a batch.
    MemoryPermit,
    /// Later entries of higher tiers ran first.
    Tier,
}

impl WaitReason {
    pub const ALL: [WaitReason; 5] =
        [WaitReason::None, WaitReason::ExecutorBusy, WaitReason::Linger, WaitReason::MemoryPermit, WaitReason::Tier];

    pub fn name(self) -> &'static str {
        match self {
            WaitReason::None => "none",
            WaitReason::ExecutorBusy => "executor_busy",
            WaitReason::Linger => "linger",
            WaitReason::MemoryPermit => "memory_permit",
            WaitReason::Tier => "tier",
        }
    }
}

/// How long an entry waited, and for what. The parts come to no more than the whole; the rest is the time of waking an
/// executor up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waited {
    pub whole: Duration,
    pub executor_busy: Duration,
    pub linger: Duration,
    pub memory_permit: Duration,
    pub tier: Duration,
}

impl Waited {
    /// What it waited for longest.
    pub fn reason(&self) -> WaitReason {
        let parts = [
            (WaitReason::ExecutorBusy, self.executor_busy),
            (WaitReason::Linger, self.linger),
            (WaitReason::MemoryPermit, self.memory_permit),
            (WaitReason::Tier, self.tier),
        ];
        let longest = parts.into_iter().filter(|(_, part)| !part.is_zero()).max_by_key(|(_, part)| *part);
        longest.map_or(WaitReason::None, |(reason, _)| reason)
    }
}

/// Why an entry was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Later it may fit.
    #[error("the queue is full: {queue_rows} of at most {queue_rows_max} rows are waiting")]
    QueueFull { queue_rows: usize, queue_rows_max: usize },
    /// Later it may fit.
    #[error("the queue is full: {queue_bytes} of at most {queue_bytes_max} bytes are waiting")]
    QueueBytesFull { queue_bytes: usize, queue_bytes_max: usize },
    /// It never will.
    #[error("{rows} rows at once are more than the {rows_max} that fit")]
    TooLarge { rows: usize, rows_max: usize },
    #[error("the deadline has passed already")]
    Expired,
    /// What waits already takes too long.
    #[error("the deadline is in {left:?}, but what is queued takes about {wait:?}")]
    TooLate { wait: Duration, left: Duration },
}

/// An entry that was taken from the queue.
#[derive(Debug, PartialEq, Eq)]
pub struct Member<T> {
    pub ticket: Ticket,
    pub rows: usize,
    pub tier: usize,
    pub deadline: Duration,
    pub waited: Waited,
    pub payload: T,
}

/// What an idle executor is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<T> {
    /// Run these now, in one batch, padded to `padded_rows`. The executor counts as busy until
    /// [`Batcher::executor_idle`].
    Run { members: Vec<Member<T>>, rows: usize, padded_rows: usize },
    /// Ask again at `until`, or after the next push that says so. Without a time, and only then, nothing is queued.
    Wait { until: Option<Duration> },
}

/// What one poll came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Poll<T> {
    pub decision: Decision<T>,
    /// Entries that could not be answered by their deadline any more; they left the queue and will not run.
    pub dropped: Vec<Member<T>>,
}

/// Why idle executors leave entries waiting, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Lingering(Duration),
    Blocked(Duration),
}

/// A linger under way.
#[derive(Debug, Clone, Copy)]
struct Lingering {
    gap_max: Duration,
    /// It ends when nothing came for a gap, and at the latest at `ends`.
    quiet: Duration,
    ends: Duration,
}

/// The queue of one model and the state of its executors. Invariants: what waits is within the limits; `busy <=
/// executors`, and `ends` has one time for each busy one; no entry has more than `rows_max` rows.
pub struct Batcher<T> {
    limits: BatchLimits,
    queue: Queue<T>,
    costs: Costs,
    bursts: Bursts,
    next_number: u64,
    executors: usize,
    busy: usize,
    /// When the batches under way are expected to end, the earliest first.
    ends: Vec<Duration>,
    /// Entries with smaller numbers were passed over by a batch that took the last idle executor.
    passed_over: u64,
    lingering: Option<Lingering>,
    held: Option<Held>,
    /// How long idle executors have left entries waiting in all, until `held` began.
    lingered: Duration,
    blocked: Duration,
    closing: bool,
}

impl<T> Batcher<T> {
    /// A batcher for so many executors, all of which count as busy until they report idle for the first time.
    pub fn new(limits: BatchLimits, executors: usize) -> Batcher<T> {
        Batcher {
            limits,
            queue: Queue::new(limits.tiers()),
            costs: Costs::new(limits),
            bursts: Bursts::default(),
            next_number: 0,
            executors,
            busy: executors,
            ends: vec![Duration::ZERO; executors],
            passed_over: 0,
            lingering: None,
            held: None,
            lingered: Duration::ZERO,
            blocked: Duration::ZERO,
            closing: false,
        }
    }

    pub fn limits(&self) -> BatchLimits {
        self.limits
    }

    pub fn queue_rows(&self) -> usize {
        self.queue.rows()
    }

    pub fn queue_bytes(&self) -> usize {
        self.queue.bytes()
    }

    pub fn costs(&self) -> &Costs {
        &self.costs
    }

    /// For what warm-up measured.
    pub fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }

    /// From now on nobody lingers: no more will come.
    pub fn close(&mut self) {
        self.closing = true;
        self.lingering = None;
    }

    /// How long one more request of a tier would wait, as far as costs and shares can tell.
    pub fn estimated_wait(&self, now: Duration, tier: usize) -> Duration {
        let tier = tier.min(self.limits.tiers() - 1);
        let cap = self.costs.rows_cap();
        let batches = self.queue.rows_ahead(tier) as f64 / cap as f64 / self.executors as f64;
        let next_idle = match self.ends.first() {
            Some(end) if self.busy == self.executors => end.saturating_sub(now),
            _ => Duration::ZERO,
        };
        next_idle + self.costs.typical(cap).mul_f64(batches)
    }

    /// Whether a request can be queued. One of more rows than a batch is pushed in pieces, and asking first keeps it
    /// all or nothing.
    pub fn admit(&self, now: Duration, request: Request) -> Result<(), Rejected> {
        let Request { rows, bytes, deadline, tier } = request;
        let queue_rows_max = self.limits.tier_rows_max(tier);
        let queue_bytes_max = self.limits.queue_bytes_max();
        if rows > queue_rows_max {
            return Err(Rejected::TooLarge { rows, rows_max: queue_rows_max });
        }
        if deadline <= now {
            return Err(Rejected::Expired);
        }
        let (queue_rows, queue_bytes) = (self.queue.rows(), self.queue.bytes());
        if rows > queue_rows_max.saturating_sub(queue_rows) {
            return Err(Rejected::QueueFull { queue_rows, queue_rows_max });
        }
        // An empty queue takes a request of any size: it has to be held somewhere, and is held once.
        if queue_bytes > 0 && bytes > queue_bytes_max.saturating_sub(queue_bytes) {
            return Err(Rejected::QueueBytesFull { queue_bytes, queue_bytes_max });
        }
        // Only behind a batch of others: while nobody waits, a wrong estimate must not refuse what would correct it.
        // Which batch that is, is a matter of the tier's share, and not only of how many wait.
        if self.queue.rows_ahead(tier.min(self.limits.tiers() - 1)) >= self.costs.rows_cap() {
            let (wait, left) = (self.estimated_wait(now, tier), deadline - now);
            if wait + wait / WAIT_MARGIN + self.costs.high(self.costs.rows_cap().max(rows)) > left {
                return Err(Rejected::TooLate { wait, left });
            }
        }
        Ok(())
    }

    /// Queues one entry of at most `rows_max` rows.
    pub fn push(&mut self, now: Duration, request: Request, payload: T) -> Result<Pushed, Rejected> {
        if request.rows > self.limits.rows_max() {
            return Err(Rejected::TooLarge { rows: request.rows, rows_max: self.limits.rows_max() });
        }
        self.admit(now, request)?;
        Ok(self.push_admitted(now, request, payload))
    }

    /// Queues a piece of a request that was admitted as a whole.
    pub fn push_admitted(&mut self, now: Duration, request: Request, payload: T) -> Pushed {
        let first = self.busy < self.executors && self.queue.is_empty();
        self.bursts.arrived(now, first, &self.costs);
        self.push_unseen(now, request, payload, first)
    }

    /// Queues what is nobody's request: nothing is learned from when it comes, and it lingers for nobody.
    pub fn push_check(&mut self, now: Duration, request: Request, payload: T) -> Pushed {
        self.push_unseen(now, request, payload, false)
    }

    fn push_unseen(&mut self, now: Duration, request: Request, payload: T, may_linger: bool) -> Pushed {
        let Request { rows, bytes, deadline, tier } = request;
        let number = self.next_number;
        self.next_number += 1;
        let idle = self.busy < self.executors;
        let mut wake = idle;
        if may_linger {
            self.lingering = self.start_linger(now);
        } else if let Some(lingering) = &mut self.lingering {
            lingering.quiet = now + lingering.gap_max;
            wake = false;
        }
        if let Some(lingering) = self.lingering {
            wake |= self.latest_start(deadline) < lingering.quiet.min(lingering.ends);
        }
        let entry = Entry {
            number,
            rows,
            bytes,
            arrived: now,
            deadline,
            found_all_busy: !idle,
            lingered_before: self.lingered(now),
            blocked_before: self.blocked(now),
            payload,
        };
        let ticket = self.queue.push(tier, entry);
        Pushed { ticket, wake: wake || (idle && self.queue.rows() >= self.costs.rows_cap()) }
    }

    /// Takes an entry out whose caller has gone away. `None` if it was taken or dropped before.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<T> {
        self.queue.remove(ticket).map(|taken| taken.entry.payload)
    }

    /// An executor has nothing to do any more. It must poll next.
    pub fn executor_idle(&mut self) {
        if self.busy > 0 {
            self.busy -= 1;
            self.ends.remove(0);
        }
    }

    /// An idle executor ends; another one takes its place some time later.
    pub fn executor_gone(&mut self) {
        if self.busy < self.executors {
            self.busy += 1;
            self.ends.insert(0, Duration::ZERO);
        }
    }

    /// A batch ran in so much time.
    pub fn ran(&mut self, padded_rows: usize, took: Duration) {
        self.costs.ran(padded_rows, took);
    }

    /// Asks on behalf of an idle executor what to run.
    pub fn poll(&mut self, now: Duration, permit: Permit) -> Poll<T> {
        let dropped = self.drop_late(now);
        if self.queue.is_empty() {
            self.hold(now, None);
            self.lingering = None;
            return Poll { decision: Decision::Wait { until: None }, dropped };
        }
        let cap = self.costs.rows_cap();
        let tiers = match permit {
            Permit::All => self.limits.tiers(),
            Permit::FirstTier => 1,
            Permit::NoTurn => {
                self.hold(now, None);
                self.passed_over = self.next_number;
                return Poll { decision: Decision::Wait { until: Some(now + TURN_AGAIN) }, dropped };
            }
        };
        if self.queue.first_of(tiers).is_none() {
            self.hold(now, Some(Held::Blocked(now)));
            let again = now + PERMIT_AGAIN;
            return Poll { decision: Decision::Wait { until: Some(again) }, dropped };
        }
        if let Some(until) = self.wait_for_company(cap).filter(|until| *until > now) {
            self.hold(now, Some(Held::Lingering(now)));
            return Poll { decision: Decision::Wait { until: Some(until) }, dropped };
        }
        self.hold(now, None);
        self.lingering = None;
        let taken = self.take_batch(now, cap, tiers);
        let rows: usize = taken.iter().map(|taken| taken.entry.rows).sum();
        let padded_rows = self.limits.padded_rows(rows);
        let members = taken.into_iter().map(|taken| self.member(taken, now)).collect();
        self.busy = (self.busy + 1).min(self.executors);
        let end = now + self.costs.typical(padded_rows);
        self.ends.insert(self.ends.partition_point(|other| *other <= end), end);
        self.ends.truncate(self.busy);
        if self.busy == self.executors {
            self.passed_over = self.next_number;
        }
        Poll { decision: Decision::Run { members, rows, padded_rows }, dropped }
    }

    /// Empties the queue, for the end: nobody is left to run it.
    pub fn drain(&mut self, now: Duration) -> Vec<Member<T>> {
        let tickets: Vec<Ticket> = self.queue.all().map(|(ticket, _)| ticket).collect();
        self.remove(tickets, now)
    }

    fn remove(&mut self, mut tickets: Vec<Ticket>, now: Duration) -> Vec<Member<T>> {
        tickets.sort_by_key(|ticket| ticket.number);
        let taken: Vec<Taken<T>> = tickets.into_iter().filter_map(|ticket| self.queue.remove(ticket)).collect();
        taken.into_iter().map(|taken| self.member(taken, now)).collect()
    }

    fn start_linger(&self, now: Duration) -> Option<Lingering> {
        if self.limits.policy() != Policy::Adaptive || self.closing {
            return None;
        }
        let Linger { gap_max, whole_max } = self.bursts.linger(&self.costs)?;
        Some(Lingering { gap_max, quiet: now + gap_max, ends: now + whole_max })
    }

    /// Until when an idle executor leaves what is queued to gather more.
    fn wait_for_company(&self, cap: usize) -> Option<Duration> {
        if self.closing || self.queue.rows() >= cap {
            return None;
        }
        match self.limits.policy() {
            Policy::Adaptive => {
                let latest = self.latest_start(self.queue.first_of(self.limits.tiers())?);
                self.lingering.map(|lingering| lingering.quiet.min(lingering.ends).min(latest))
            }
            Policy::Window(window) if window.is_zero() => None,
            Policy::Window(window) => {
                let oldest = self.queue.all().map(|(_, entry)| entry.arrived).min()?;
                oldest.checked_add(window)
            }
        }
    }

    /// When a batch must start at the latest, however large it gets, to meet a deadline.
    fn latest_start(&self, deadline: Duration) -> Duration {
        deadline.saturating_sub(self.costs.high(self.costs.rows_cap()))
    }

    /// Notes why entries wait beside an idle executor from now on.
    fn hold(&mut self, now: Duration, held: Option<Held>) {
        let same = matches!(
            (self.held, held),
            (Some(Held::Lingering(_)), Some(Held::Lingering(_))) | (Some(Held::Blocked(_)), Some(Held::Blocked(_)))
        );
        if !same {
            (self.lingered, self.blocked) = (self.lingered(now), self.blocked(now));
            self.held = held;
        }
    }

    fn lingered(&self, now: Duration) -> Duration {
        match self.held {
            Some(Held::Lingering(since)) => self.lingered + now.saturating_sub(since),
            _ => self.lingered,
        }
    }

    fn blocked(&self, now: Duration) -> Duration {
        match self.held {
            Some(Held::Blocked(since)) => self.blocked + now.saturating_sub(since),
            _ => self.blocked,
        }
    }

    /// Takes out what a forward begun now could not answer in time, and what load has made so late that it would force
    /// a small batch while a full one waits. If that would be everything and only by estimate, the last one is left:
    /// it is run, and shows whether the estimate still holds.
    fn drop_late(&mut self, now: Duration) -> Vec<Member<T>> {
        let mut dropped = self.drop_hopeless(now);
        let cap = self.costs.rows_cap();
        if self.queue.rows() > cap && self.busy + 1 >= self.executors {
            let full = self.costs.high(cap);
            // Who asked for so little time is not late by load, and gets its small batch.
            let late = |entry: &Entry<T>| entry.deadline.saturating_sub(entry.arrived) >= full * 2;
            let due = self.queue.due((now + full).saturating_sub(Duration::from_nanos(1)));
            let late: Vec<(Ticket, usize)> =
                due.filter(|(_, entry)| late(entry)).map(|(ticket, entry)| (ticket, entry.rows)).collect();
            let rows: usize = late.iter().map(|(_, rows)| rows).sum();
            if rows > 0 && self.queue.rows() - rows >= cap {
                dropped.extend(self.remove(late.into_iter().map(|(ticket, _)| ticket).collect(), now));
            }
        }
        dropped
    }

    fn drop_hopeless(&mut self, now: Duration) -> Vec<Member<T>> {
        let horizon = now.saturating_add(self.costs.high(self.limits.rows_max()));
        let late = |entry: &Entry<T>| entry.deadline < now.saturating_add(self.costs.high(entry.rows));
        let due = self.queue.due(horizon).filter(|(_, entry)| entry.deadline <= now || late(entry));
        let mut tickets: Vec<(Ticket, usize)> = due.map(|(ticket, entry)| (ticket, entry.rows)).collect();
        if tickets.is_empty() {
            return Vec::new();
        }
        let rows: usize = tickets.iter().map(|(_, rows)| rows).sum();
        if rows == self.queue.rows() {
            let last = tickets.iter().map(|(ticket, _)| *ticket).max_by_key(|ticket| (ticket.deadline, ticket.number));
            if let Some(last) = last.filter(|last| last.deadline > now) {
                tickets.retain(|(ticket, _)| *ticket != last);
            }
        }
        self.remove(tickets.into_iter().map(|(ticket, _)| ticket).collect(), now)
    }

    /// The members of the next batch: not empty, of at most `cap` rows unless a single entry has more.
    fn take_batch(&mut self, now: Duration, cap: usize, tiers: usize) -> Vec<Taken<T>> {
        let Batcher { queue, costs, .. } = self;
        // While more waits than one batch takes, small batches for the sake of disturbed forwards would make all of it late.
        let pressed = queue.rows() > cap;
        let (mut rows, mut tightest) = (0, Duration::MAX);
        queue.take(now, tiers, |entry| {
            let with = rows + entry.rows;
            let strictest = tightest.min(entry.deadline);
            let takes = if pressed { costs.typical(with) } else { costs.high(with) };
            let in_time = now.saturating_add(takes) <= strictest;
            let fits = rows == 0 || (with <= cap && in_time);
            if fits {
                (rows, tightest) = (with, strictest);
            }
            fits
        })
    }

    fn member(&self, taken: Taken<T>, now: Duration) -> Member<T> {
        let Taken { tier, entry, overtaken } = taken;
        let whole = now.saturating_sub(entry.arrived);
        let linger = (self.lingered(now) - entry.lingered_before).min(whole);
        let memory_permit = (self.blocked(now) - entry.blocked_before).min(whole - linger);
        let mut rest = whole - linger - memory_permit;
        let tier_wait = overtaken.map_or(Duration::ZERO, |since| now.saturating_sub(since).min(rest));
        rest -= tier_wait;
        let waited_for_others = entry.found_all_busy || entry.number < self.passed_over;
        Member {
            ticket: Ticket { number: entry.number, tier, deadline: entry.deadline },
            rows: entry.rows,
            tier,
            deadline: entry.deadline,
            waited: Waited {
                whole,
                executor_busy: if waited_for_others { rest } else { Duration::ZERO },
                linger,
                memory_permit,
                tier: tier_wait,
            },
            payload: entry.payload,
        }
    }
}

#[cfg(test)]
mod tests;
