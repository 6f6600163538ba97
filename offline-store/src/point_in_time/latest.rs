//! As-of views by spine scatter.
//!
//! A source row first counts at the first slot of its entity whose time is at or after both its event time and the time
//! it may be seen from. There it competes with the others that begin to count there; the greatest in the order of rows
//! stays. A pass over each entity's slots then carries the greatest so far forward: whoever was seen once stays seen.
//!
//! While the source is read, only keys and times are decoded, and a candidate is its times and its [`Place`]. What the
//! winners say is read afterwards, once. The one thing that content decides, rows alike in every time, is put off too:
//! such rows are remembered, and compared before answers are carried forward.
//!
//! Rows come in no order of entities, and to look for each in a spine of millions of slots would wait for memory every
//! time. So every worker deals its rows into buckets by entity, and takes a bucket when it is full: its slots then lie in
//! the core's cache. Buckets of candidates are shared by all workers, each under a lock that is held for thousands of rows.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use datafusion::common::internal_err;
use datafusion::error::Result;
use feature_defs::as_of::MaxAge;
use feature_defs::time::{Micros, SourceClock, Status};

use super::index::{SpineIndex, prefetch};
use super::places::{Marks, Place};
use super::scan::in_parallel;

/// What orders rows of one entity, apart from what they say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    pub event_time: Micros,
    /// Null is lowest.
    pub created_time: Micros,
    pub sequence: u64,
}

/// A created time as it is compared: below every other where it is null.
#[inline]
pub fn comparable(created_time: Option<Micros>) -> Micros {
    created_time.map_or(Micros::MIN, |created| created.max(Micros::MIN + 1))
}

/// Which parts of a rank rows of a source differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankParts {
    pub created_time: bool,
    pub sequence: bool,
}

/// The best row that begins to count at each slot of a bucket.
#[derive(Debug)]
struct Candidates {
    /// The first slot.
    base: usize,
    /// Event time and place, side by side: who looks at one looks at both.
    best: Vec<(Micros, Place)>,
    /// Empty where the source has no created times, or no sequences.
    created_times: Vec<Micros>,
    sequences: Vec<u64>,
    ties: Vec<Tie>,
}

/// A row that was alike in every time with the best of its slot.
#[derive(Debug, Clone, Copy)]
struct Tie {
    slot: u32,
    place: Place,
    rank: Rank,
}

impl Candidates {
    fn new(base: usize, slots: usize, parts: RankParts) -> Candidates {
        Candidates {
            base,
            best: vec![(0, Place::NONE); slots],
            created_times: if parts.created_time { vec![0; slots] } else { Vec::new() },
            sequences: if parts.sequence { vec![0; slots] } else { Vec::new() },
            ties: Vec::new(),
        }
    }

    #[inline]
    fn offer(&mut self, slot: usize, place: Place, rank: Rank) {
        let (event_time, best) = self.best[slot];
        if best == Place::NONE || rank.event_time > event_time {
            self.put(slot, place, rank);
        } else if rank.event_time == event_time {
            self.settle(slot, place, rank);
        }
    }

    #[inline]
    fn put(&mut self, slot: usize, place: Place, rank: Rank) {
        self.best[slot] = (rank.event_time, place);
        if !self.created_times.is_empty() {
            self.created_times[slot] = rank.created_time;
        }
        if !self.sequences.is_empty() {
            self.sequences[slot] = rank.sequence;
        }
    }

    /// Rows of one event time.
    #[cold]
    fn settle(&mut self, slot: usize, place: Place, rank: Rank) {
        match rank.cmp(&self.rank(slot)) {
            Ordering::Greater => self.put(slot, place, rank),
            Ordering::Equal => {
                if self.ties.len() == self.ties.capacity() && self.ties.len() > 1 << 16 {
                    self.forget_lost_ties();
                }
                self.ties.push(Tie { slot: slot as u32, place, rank });
            }
            Ordering::Less => {}
        }
    }

    fn rank(&self, slot: usize) -> Rank {
        Rank {
            event_time: self.best[slot].0,
            created_time: self.created_times.get(slot).copied().unwrap_or(Micros::MIN),
            sequence: self.sequences.get(slot).copied().unwrap_or(0),
        }
    }

    /// Ties with a row that has been beaten since mean nothing any more.
    fn forget_lost_ties(&mut self) {
        let mut ties = std::mem::take(&mut self.ties);
        ties.retain(|tie| tie.rank == self.rank(tie.slot as usize));
        self.ties = ties;
    }

    /// Slots whose best is not decided, with all their contenders.
    fn contests(&mut self) -> Vec<(usize, Vec<Place>)> {
        self.forget_lost_ties();
        let mut ties = std::mem::take(&mut self.ties);
        ties.sort_unstable_by_key(|tie| tie.slot);
        ties.chunk_by(|a, b| a.slot == b.slot)
            .map(|ties| {
                let slot = ties[0].slot as usize;
                let mut places: Vec<Place> = ties.iter().map(|tie| tie.place).collect();
                places.push(self.best[slot].1);
                (slot, places)
            })
            .collect()
    }

    /// The answer's row for every slot, from the best that begin to count at each. `groups` are those of the bucket.
    fn carry_forward(mut self, index: &SpineIndex, groups: Range<u32>, max_age: MaxAge) -> Answers {
        let mut statuses = vec![Status::NotFound; self.best.len()];
        for group in groups {
            let mut latest: Option<(Place, Rank)> = None;
            for slot in index.range(group) {
                let at = slot - self.base;
                if self.best[at].1 != Place::NONE {
                    let rank = self.rank(at);
                    // Rows alike in every time begin to count at the same slot, where the contest was decided.
                    if latest.is_none_or(|(_, before)| rank > before) {
                        latest = Some((self.best[at].1, rank));
                    }
                }
                self.best[at].1 = Place::NONE;
                let Some((place, rank)) = latest.filter(|(place, _)| !place.is_deleted()) else { continue };
                statuses[at] = max_age.judge(rank.event_time, index.time(slot));
                if statuses[at] != Status::NotFound {
                    self.best[at] = (rank.event_time, place);
                }
            }
        }
        Answers { base: self.base, statuses, best: self.best }
    }
}

/// What answers at each slot of a bucket.
#[derive(Debug)]
pub struct Answers {
    pub base: usize,
    pub statuses: Vec<Status>,
    /// The row that answers, where it is PRESENT or OUTSIDE_MAX_AGE, and its event time.
    pub best: Vec<(Micros, Place)>,
}

impl Answers {
    /// Marks the rows that somebody needs to be read.
    pub fn mark(&self, marks: &mut Marks) {
        for ((_, place), status) in self.best.iter().zip(&self.statuses) {
            if *status == Status::Present {
                marks.mark(*place);
            }
        }
    }
}

/// Bytes of candidates in a bucket: about half of a core's cache.
const BUCKET_BYTES: usize = if cfg!(test) { 128 } else { 256 << 10 };
/// Rows of a bucket that a worker collects before it takes them.
const BUCKET_ROWS: usize = if cfg!(test) { 8 } else { 4_096 };
/// More buckets would be too many places to write to.
const BUCKETS_MAX: usize = 512;

/// One as-of input, while its source is read by all workers.
#[derive(Debug)]
pub struct Latest {
    index: Arc<SpineIndex>,
    rules: Rules,
    /// A group's bucket is its number without so many low bits.
    shift: u32,
    buckets: Vec<Mutex<Candidates>>,
}

/// When rows of a source may be seen.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub parts: RankParts,
    /// Rows may be seen before they are known; it is only counted which would have been hidden.
    pub enforced: bool,
    /// The source's clock without its grid, to tell what the grid hid.
    pub exact: SourceClock,
    pub every: bool,
    /// Rows are seen from their arrival.
    pub arrival: bool,
}

/// A row on its way to its slot.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub group: u32,
    pub place: Place,
    pub rank: Rank,
    /// From when it may be seen.
    pub from: Micros,
    /// When it is known; before `from` where rows are seen from their arrival.
    pub known: Micros,
}

/// A row of a source whose rows are known at their event time, and differ in nothing else that orders them.
#[derive(Debug, Clone, Copy)]
pub struct PlainEntry {
    pub event_time: Micros,
    pub place: Place,
    pub group: u32,
}

impl From<PlainEntry> for Entry {
    #[inline]
    fn from(plain: PlainEntry) -> Entry {
        let PlainEntry { event_time, place, group } = plain;
        let rank = Rank { event_time, created_time: Micros::MIN, sequence: 0 };
        Entry { group, place, rank, from: event_time, known: event_time }
    }
}

/// What one worker has collected of one input. Entries are kept as small as they can be: they are written once and read
/// once, and there are as many as the source has rows.
#[derive(Debug)]
pub struct Buffers {
    plain: Vec<Vec<PlainEntry>>,
    whole: Vec<Vec<Entry>>,
    pub hidden: Hidden,
}

/// Rows hidden, by the last reason that hid each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hidden {
    pub created_time: u64,
    pub delay: u64,
    pub every: u64,
    pub arrival: u64,
}

impl Latest {
    pub fn new(index: Arc<SpineIndex>, rules: Rules) -> Latest {
        let bytes = Latest::bytes_of(index.slots(), rules.parts) + index.slots() * 8;
        let wanted = (bytes / BUCKET_BYTES).clamp(1, BUCKETS_MAX);
        let shift = (index.groups() / wanted).max(1).next_power_of_two().trailing_zeros();
        let bucket = |first: u32| {
            let groups = first..index.groups().min(first as usize + (1 << shift)) as u32;
            let slots = index.range(groups.start).start..index.range(groups.end - 1).end;
            Mutex::new(Candidates::new(slots.start, slots.len(), rules.parts))
        };
        let buckets = (0..index.groups() as u32).step_by(1 << shift).map(bucket).collect();
        Latest { index, rules, shift, buckets }
    }

    /// Bytes that candidates for so many slots take.
    pub fn bytes_of(slots: usize, parts: RankParts) -> usize {
        slots * (16 + if parts.created_time { 8 } else { 0 } + if parts.sequence { 8 } else { 0 })
    }

    /// Bytes that a worker's buffers take.
    pub fn buffer_bytes(&self) -> usize {
        self.buckets.len() * BUCKET_ROWS * size_of::<Entry>()
    }

    pub fn buffers(&self) -> Buffers {
        let none = || self.buckets.iter().map(|_| Vec::new()).collect();
        Buffers { plain: none(), whole: self.buckets.iter().map(|_| Vec::new()).collect(), hidden: Hidden::default() }
    }

    #[inline]
    pub fn add(&self, buffers: &mut Buffers, entry: Entry) {
        let bucket = (entry.group >> self.shift) as usize;
        let rows = &mut buffers.whole[bucket];
        rows.push(entry);
        if rows.len() == BUCKET_ROWS {
            self.take(bucket, rows, &mut buffers.hidden);
        }
    }

    /// [`Latest::add`] for sources that are plain throughout.
    #[inline]
    pub fn add_plain(&self, buffers: &mut Buffers, entry: PlainEntry) {
        let bucket = (entry.group >> self.shift) as usize;
        let rows = &mut buffers.plain[bucket];
        rows.push(entry);
        if rows.len() == BUCKET_ROWS {
            self.take(bucket, rows, &mut buffers.hidden);
        }
    }

    /// Takes what a worker still holds.
    pub fn flush(&self, buffers: &mut Buffers) {
        for bucket in 0..self.buckets.len() {
            self.take(bucket, &mut buffers.plain[bucket], &mut buffers.hidden);
            self.take(bucket, &mut buffers.whole[bucket], &mut buffers.hidden);
        }
    }

    fn take<E: Copy + Into<Entry>>(&self, bucket: usize, entries: &mut Vec<E>, hidden: &mut Hidden) {
        /// Rows whose slots are asked for before the first of them is looked at.
        const AHEAD: usize = 64;
        const NO_SLOT: usize = usize::MAX;
        if entries.is_empty() {
            return;
        }
        let mut candidates = self.buckets[bucket].lock().unwrap_or_else(PoisonError::into_inner);
        let mut slots = [NO_SLOT; AHEAD];
        for entries in entries.chunks(AHEAD) {
            entries.iter().for_each(|entry| self.index.prefetch((*entry).into().group));
            for (entry, at) in entries.iter().zip(&mut slots) {
                let entry: Entry = (*entry).into();
                let event_time = entry.rank.event_time;
                let (mut slot, end) = self.index.first_at_or_after(entry.group, event_time);
                if entry.from > event_time && slot < end && self.index.time(slot) < entry.from {
                    let (seen, _) = self.index.first_at_or_after(entry.group, entry.from);
                    self.count_hidden(&entry, self.index.time(seen - 1), hidden);
                    if self.rules.enforced {
                        slot = seen;
                    }
                }
                *at = if slot < end { slot - candidates.base } else { NO_SLOT };
                prefetch(&candidates.best, *at);
            }
            for (entry, at) in entries.iter().zip(&slots) {
                if *at != NO_SLOT {
                    let entry: Entry = (*entry).into();
                    candidates.offer(*at, entry.place, entry.rank);
                }
            }
        }
        entries.clear();
    }

    fn count_hidden(&self, entry: &Entry, last_hidden: Micros, hidden: &mut Hidden) {
        let created = Some(entry.rank.created_time).filter(|created| *created != Micros::MIN);
        if self.rules.arrival && last_hidden >= entry.known {
            hidden.arrival += 1;
        } else if self.rules.every && last_hidden >= self.rules.exact.known(entry.rank.event_time, created) {
            hidden.every += 1;
        } else if self.rules.exact.has_created_time {
            hidden.created_time += 1;
        } else {
            hidden.delay += 1;
        }
    }

    /// Bytes taken by rows that are alike in every time: the part that grows.
    pub fn tie_bytes(&self) -> usize {
        let bytes = |bucket: &Mutex<Candidates>| {
            bucket.lock().unwrap_or_else(PoisonError::into_inner).ties.capacity() * size_of::<Tie>()
        };
        self.buckets.iter().map(bytes).sum()
    }

    /// Slots whose best is not decided, with all their contenders.
    pub fn contests(&mut self) -> Vec<(usize, Vec<Place>)> {
        let mut contests = Vec::new();
        for bucket in &mut self.buckets {
            let bucket = bucket.get_mut().unwrap_or_else(PoisonError::into_inner);
            let base = bucket.base;
            contests.extend(bucket.contests().into_iter().map(|(slot, places)| (base + slot, places)));
        }
        contests
    }

    pub fn decide(&mut self, slot: usize, winner: Place) {
        let bucket =
            self.buckets.partition_point(|bucket| bucket.lock().unwrap_or_else(PoisonError::into_inner).base <= slot);
        if let Some(bucket) = self.buckets.get_mut(bucket.wrapping_sub(1)) {
            let bucket = bucket.get_mut().unwrap_or_else(PoisonError::into_inner);
            let at = slot - bucket.base;
            bucket.best[at].1 = winner;
        }
    }

    /// What answers at every slot, bucket by bucket.
    pub fn answers(self, max_age: MaxAge, threads: usize, stop: &AtomicBool) -> Result<Vec<Answers>> {
        let (index, shift) = (&self.index, self.shift);
        let buckets: Vec<Mutex<Option<Candidates>>> = self
            .buckets
            .into_iter()
            .map(|bucket| Mutex::new(Some(bucket.into_inner().unwrap_or_else(PoisonError::into_inner))))
            .collect();
        in_parallel(threads, stop, buckets.len(), |bucket| {
            let candidates = buckets[bucket].lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(candidates) = candidates else { return internal_err!("a bucket was taken twice") };
            let first = (bucket as u32) << shift;
            let end = index.groups().min(first as usize + (1 << shift)) as u32;
            Ok(candidates.carry_forward(index, first..end, max_age))
        })
    }
}
