//! As-of views by spine scatter.
//!
//! A source row first counts at the first slot of its entity whose time is at or after both its event time and the time
//! it may be seen from. There it competes with the others that begin to count there; the greatest in the order of rows
//! stays. A pass over each entity's slots then carries the greatest so far forward: whoever was seen once stays seen.
//!
//! While the source is read, only keys and times are decoded, and a candidate is its times and its [`Place`]. What the
//! winners say is read afterwards, once. The one thing that content decides, rows alike in every time, is put off too:
//! such rows are remembered, and compared before answers are carried forward.

use std::cmp::Ordering;

use feature_defs::as_of::MaxAge;
use feature_defs::time::{Micros, Status};

use super::index::SpineIndex;
use super::places::{Marks, Place};

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

/// The best row that begins to count at each slot, of the rows that one worker saw.
#[derive(Debug)]
pub struct Candidates {
    event_times: Vec<Micros>,
    places: Vec<Place>,
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
    pub fn new(slots: usize, parts: RankParts) -> Candidates {
        Candidates {
            event_times: vec![0; slots],
            places: vec![Place::NONE; slots],
            created_times: if parts.created_time { vec![0; slots] } else { Vec::new() },
            sequences: if parts.sequence { vec![0; slots] } else { Vec::new() },
            ties: Vec::new(),
        }
    }

    /// Bytes that candidates for so many slots take.
    pub fn bytes_of(slots: usize, parts: RankParts) -> usize {
        slots * (16 + if parts.created_time { 8 } else { 0 } + if parts.sequence { 8 } else { 0 })
    }

    /// Bytes taken by rows that are alike in every time: the part that grows.
    pub fn tie_bytes(&self) -> usize {
        self.ties.capacity() * size_of::<Tie>()
    }

    #[inline]
    pub fn offer(&mut self, slot: usize, place: Place, rank: Rank) {
        let best = self.places[slot];
        if best == Place::NONE || rank.event_time > self.event_times[slot] {
            self.put(slot, place, rank);
        } else if rank.event_time == self.event_times[slot] {
            self.settle(slot, place, rank);
        }
    }

    #[inline]
    fn put(&mut self, slot: usize, place: Place, rank: Rank) {
        self.event_times[slot] = rank.event_time;
        self.places[slot] = place;
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
            event_time: self.event_times[slot],
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

    /// Takes in what another worker saw.
    pub fn merge(&mut self, other: Candidates) {
        for slot in 0..self.places.len() {
            if other.places[slot] != Place::NONE {
                self.offer(slot, other.places[slot], other.rank(slot));
            }
        }
        other.ties.into_iter().for_each(|tie| self.offer(tie.slot as usize, tie.place, tie.rank));
        self.forget_lost_ties();
    }

    /// Slots whose best is not decided, with all their contenders.
    pub fn contests(&mut self) -> Vec<(usize, Vec<Place>)> {
        self.forget_lost_ties();
        let mut ties = std::mem::take(&mut self.ties);
        ties.sort_unstable_by_key(|tie| tie.slot);
        ties.chunk_by(|a, b| a.slot == b.slot)
            .map(|ties| {
                let slot = ties[0].slot as usize;
                let mut places: Vec<Place> = ties.iter().map(|tie| tie.place).collect();
                places.push(self.places[slot]);
                (slot, places)
            })
            .collect()
    }

    pub fn decide(&mut self, slot: usize, winner: Place) {
        self.places[slot] = winner;
    }

    /// The answer's row for every slot, from the best that begin to count at each.
    pub fn carry_forward(mut self, index: &SpineIndex, max_age: MaxAge) -> Answers {
        let mut statuses = vec![Status::NotFound; self.places.len()];
        for group in 0..index.groups() as u32 {
            let mut latest: Option<(Place, Rank)> = None;
            for slot in index.range(group) {
                if self.places[slot] != Place::NONE {
                    let rank = self.rank(slot);
                    // Rows alike in every time begin to count at the same slot, where the contest was decided.
                    if latest.is_none_or(|(_, before)| rank > before) {
                        latest = Some((self.places[slot], rank));
                    }
                }
                self.places[slot] = Place::NONE;
                let Some((place, rank)) = latest.filter(|(place, _)| !place.is_deleted()) else { continue };
                statuses[slot] = max_age.judge(rank.event_time, index.time(slot));
                if statuses[slot] != Status::NotFound {
                    self.places[slot] = place;
                    self.event_times[slot] = rank.event_time;
                }
            }
        }
        Answers { statuses, places: self.places, event_times: self.event_times }
    }
}

/// What answers at each slot.
#[derive(Debug)]
pub struct Answers {
    pub statuses: Vec<Status>,
    /// The row that answers, where it is PRESENT or OUTSIDE_MAX_AGE.
    pub places: Vec<Place>,
    /// Its event time.
    pub event_times: Vec<Micros>,
}

impl Answers {
    /// Marks the rows that somebody needs to be read.
    pub fn mark(&self, marks: &mut Marks) {
        for (place, status) in self.places.iter().zip(&self.statuses) {
            if *status == Status::Present {
                marks.mark(*place);
            }
        }
    }
}
