//! Which events were seen before, by their event id.
//!
//! Ids are remembered as 128-bit hashes under a key of this process: two ids meet by accident about never, and nobody who
//! does not know the key can make them meet. What is remembered is bounded by count and, for pushed events, by age; ids of
//! an imported history do not age, because what they are compared with may be old events pushed late.

use std::collections::hash_map::RandomState;
use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasher;

use arrow::array::ArrayRef;
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value, encode};

pub struct EventIds {
    keys: [RandomState; 2],
    seen: HashSet<u128>,
    imported: VecDeque<u128>,
    pushed: VecDeque<(Micros, u128)>,
    ids_max: usize,
    horizon: Micros,
}

impl EventIds {
    pub fn new(ids_max: usize, horizon: Micros) -> EventIds {
        EventIds {
            keys: [RandomState::new(), RandomState::new()],
            seen: HashSet::new(),
            imported: VecDeque::new(),
            pushed: VecDeque::new(),
            ids_max,
            horizon,
        }
    }

    /// The hash of an id; None for null, which is equal to nothing.
    pub fn hash(&self, column: &ArrayRef, row: usize, column_type: &Type) -> Option<u128> {
        let value = Value::from_array(column, row, column_type);
        if value.is_null() {
            return None;
        }
        let mut bytes = Vec::new();
        encode(&value, &mut bytes);
        let [high, low] = self.keys.each_ref().map(|key| u128::from(key.hash_one(&bytes)));
        Some(high << 64 | low)
    }

    #[cfg(test)]
    fn contains(&self, id: u128) -> bool {
        self.seen.contains(&id)
    }

    /// Remembers the id of a pushed event; false if it was known.
    pub fn insert(&mut self, id: u128, arrival: Micros) -> bool {
        let new = self.seen.insert(id);
        if new {
            self.pushed.push_back((arrival, id));
            self.evict(arrival);
        }
        new
    }

    /// Remembers the id of an event of the prior history; false if it was known.
    pub fn insert_imported(&mut self, id: u128) -> bool {
        let new = self.seen.insert(id);
        if new {
            self.imported.push_back(id);
            self.evict(Micros::MIN);
        }
        new
    }

    /// Takes back ids whose push came to nothing: those inserted last.
    pub fn take_back(&mut self, ids: &[u128]) {
        for id in ids.iter().rev() {
            if self.pushed.back().is_some_and(|(_, last)| last == id) {
                self.pushed.pop_back();
                self.seen.remove(id);
            }
        }
    }

    fn evict(&mut self, now: Micros) {
        while let Some((arrival, id)) = self.pushed.front().copied() {
            if arrival >= now.saturating_sub(self.horizon) {
                break;
            }
            self.pushed.pop_front();
            self.seen.remove(&id);
        }
        while self.seen.len() > self.ids_max {
            let oldest = self.imported.pop_front().or_else(|| self.pushed.pop_front().map(|(_, id)| id));
            let Some(oldest) = oldest else { break };
            self.seen.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_bounded_by_age_and_count() {
        let mut ids = EventIds::new(3, 10);
        assert!(ids.insert_imported(1));
        assert!(ids.insert(2, 100));
        assert!(!ids.insert(1, 100));
        assert!(!ids.insert(2, 105));
        assert!(ids.insert(3, 111), "2 is out of the horizon now");
        assert!(!ids.contains(2));
        assert!(ids.contains(1), "imported ids do not age");
        assert!(ids.insert(4, 111));
        assert!(ids.insert(5, 111), "the fourth id pushes out an imported one");
        assert!(!ids.contains(1));
        ids.take_back(&[5]);
        assert!(!ids.contains(5) && ids.contains(4));
    }
}
