//! Entries that wait, by tier. Inside a tier the earliest deadline goes first, and of equal ones the earlier arrival.
//! Between tiers, shares are kept: while all have work, each tier gets four times the rows of the one below it. A tier
//! that was passed over by several batches in a row puts its first entry into the next, so that none starves.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Ticket;

/// A tier gets so many times the rows of the one below.
const SHARE_OVER_NEXT: u64 = 4;
/// A tier that waits is passed over by at most so many batches.
pub const PASSED_OVER_MAX: u32 = 8;

pub struct Entry<T> {
    pub number: u64,
    pub rows: usize,
    pub bytes: usize,
    pub arrived: Duration,
    pub deadline: Duration,
    /// No executor was idle when it arrived.
    pub found_all_busy: bool,
    /// What the clocks of lingering and of missing memory showed when it arrived.
    pub lingered_before: Duration,
    pub blocked_before: Duration,
    pub payload: T,
}

struct Tier<T> {
    /// By deadline and number of arrival.
    entries: BTreeMap<(Duration, u64), Entry<T>>,
    rows: usize,
    /// Rows taken, weighed by the tier's share: the tier with the least is next.
    taken: u64,
    passed_over: u32,
    /// Since when entries that came before the one of this number see later ones of higher tiers run.
    overtaken: Option<(u64, Duration)>,
}

/// Invariants: `rows` and `bytes` are the sums over all entries; no tier without entries has been passed over.
pub struct Queue<T> {
    tiers: Vec<Tier<T>>,
    rows: usize,
    bytes: usize,
}

/// An entry that was taken, with since when others of higher tiers overtook it.
pub struct Taken<T> {
    pub tier: usize,
    pub entry: Entry<T>,
    pub overtaken: Option<Duration>,
}

impl<T> Queue<T> {
    pub fn new(tiers: usize) -> Queue<T> {
        let tier = || Tier { entries: BTreeMap::new(), rows: 0, taken: 0, passed_over: 0, overtaken: None };
        Queue { tiers: (0..tiers.max(1)).map(|_| tier()).collect(), rows: 0, bytes: 0 }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.tiers.iter().all(|tier| tier.entries.is_empty())
    }

    /// Rows that run before one more of this tier, as far as shares can tell: those of its own, and of every other tier
    /// that has work what its share lets run meanwhile. Higher tiers may have more than that, and then all of it counts.
    pub fn rows_ahead(&self, tier: usize) -> usize {
        let own = self.tiers[tier].rows;
        let share = |distance: usize| SHARE_OVER_NEXT.saturating_pow(distance as u32) as usize;
        let others = self.tiers.iter().enumerate().map(|(index, other)| match other.rows {
            0 => 0,
            rows if index < tier => rows.max((own + 1).saturating_mul(share(tier - index))),
            rows if index > tier => rows.min(own / share(index - tier)),
            _ => own,
        });
        others.sum()
    }

    pub fn push(&mut self, tier: usize, entry: Entry<T>) -> Ticket {
        // A tier that was empty has saved nothing up.
        let least = self.tiers.iter().filter(|tier| !tier.entries.is_empty()).map(|tier| tier.taken).min();
        let tier_index = tier.min(self.tiers.len() - 1);
        let tier = &mut self.tiers[tier_index];
        if tier.entries.is_empty() {
            tier.taken = least.map_or(0, |least| tier.taken.max(least));
        }
        self.rows += entry.rows;
        self.bytes += entry.bytes;
        tier.rows += entry.rows;
        let ticket = Ticket { number: entry.number, tier: tier_index, deadline: entry.deadline };
        tier.entries.insert((entry.deadline, entry.number), entry);
        ticket
    }

    pub fn remove(&mut self, ticket: Ticket) -> Option<Taken<T>> {
        let Ticket { number, tier: index, deadline } = ticket;
        let tier = self.tiers.get_mut(index)?;
        let entry = tier.entries.remove(&(deadline, number))?;
        tier.rows -= entry.rows;
        self.rows -= entry.rows;
        self.bytes -= entry.bytes;
        let overtaken = tier.overtaken.filter(|(before, _)| entry.number < *before);
        let overtaken = overtaken.map(|(_, since)| since.max(entry.arrived));
        if tier.entries.is_empty() {
            (tier.passed_over, tier.overtaken) = (0, None);
        }
        Some(Taken { tier: index, entry, overtaken })
    }

    /// The earliest deadline in the first so many tiers.
    pub fn first_of(&self, tiers: usize) -> Option<Duration> {
        self.tiers
            .iter()
            .take(tiers)
            .filter_map(|tier| tier.entries.first_key_value())
            .map(|((deadline, _), _)| *deadline)
            .min()
    }

    /// Every entry whose deadline is at or before `by`, without order.
    pub fn due(&self, by: Duration) -> impl Iterator<Item = (Ticket, &Entry<T>)> {
        self.tiers.iter().enumerate().flat_map(move |(tier, of)| {
            let due = of.entries.range(..=(by, u64::MAX));
            due.map(move |((deadline, number), entry)| (Ticket { number: *number, tier, deadline: *deadline }, entry))
        })
    }

    pub fn all(&self) -> impl Iterator<Item = (Ticket, &Entry<T>)> {
        self.due(Duration::MAX)
    }

    /// Takes entries of the first so many tiers while `fits` lets their rows and deadlines in, each tier until one of its
    /// entries does not fit.
    pub fn take(&mut self, now: Duration, tiers: usize, mut fits: impl FnMut(&Entry<T>) -> bool) -> Vec<Taken<T>> {
        let mut taken = Vec::new();
        let mut open: Vec<bool> = self.tiers.iter().map(|tier| !tier.entries.is_empty()).collect();
        open[tiers.min(self.tiers.len())..].fill(false);
        let waiting = open.clone();
        for (index, open) in open.iter_mut().enumerate() {
            if *open && self.tiers[index].passed_over >= PASSED_OVER_MAX {
                *open = self.take_first(index, &mut fits, &mut taken);
            }
        }
        loop {
            let next = (0..self.tiers.len()).filter(|index| open[*index]).min_by_key(|index| self.tiers[*index].taken);
            let Some(index) = next else { break };
            open[index] = self.take_first(index, &mut fits, &mut taken);
        }
        // The latest arrival that ran, tier by tier downwards: whoever came before it below was overtaken.
        let mut latest = None;
        for (index, waited) in waiting.into_iter().enumerate() {
            let tier = &mut self.tiers[index];
            let ran = taken.iter().filter(|taken| taken.tier == index).map(|taken| taken.entry.number).max();
            if !tier.entries.is_empty() {
                tier.passed_over = if ran.is_none() && waited && !taken.is_empty() { tier.passed_over + 1 } else { 0 };
                if let Some(latest) = latest {
                    let since = tier.overtaken.map_or(now, |(_, since)| since);
                    let before = tier.overtaken.map_or(latest, |(before, _)| before.max(latest));
                    tier.overtaken = Some((before, since));
                }
            }
            latest = latest.max(ran);
        }
        if self.is_empty() {
            self.tiers.iter_mut().for_each(|tier| tier.taken = 0);
        }
        taken
    }

    /// Takes the first entry of a tier if it fits, and says whether another may follow.
    fn take_first(
        &mut self,
        index: usize,
        fits: &mut impl FnMut(&Entry<T>) -> bool,
        taken: &mut Vec<Taken<T>>,
    ) -> bool {
        let tier = &mut self.tiers[index];
        let Some((&(deadline, number), entry)) = tier.entries.first_key_value() else { return false };
        if !fits(entry) {
            return false;
        }
        tier.taken = tier.taken.saturating_add(entry.rows as u64 * SHARE_OVER_NEXT.saturating_pow(index as u32));
        let ticket = Ticket { number, tier: index, deadline };
        taken.extend(self.remove(ticket));
        !self.tiers[index].entries.is_empty()
    }
}
