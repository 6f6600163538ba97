//! Which events were seen before, by their event id.
//!
//! Ids are remembered as 128-bit hashes under a key of this process: two ids meet by accident about never, and nobody who
//! does not know the key can make them meet. What is remembered is bounded by count and, for pushed events, by age; ids of
//! an imported history do not age, because what they are compared with may be old events pushed late.
//!
//! With the id of a pushed event goes a hash of 64 bits of everything that it said, by which an id that is used again for
//! another event is told from a redelivery. Of an imported history only the ids are known; and when the columns of a source
//! change, what was said in the old ones is forgotten until the next start, which computes it from the log and the history.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::num::NonZeroU64;

use arrow::array::RecordBatch;
use feature_defs::plan::SourcePlan;
use feature_defs::time::Micros;
use feature_defs::value::Cells;

/// What an event said, as a hash under a key of this process.
pub type Payload = NonZeroU64;

/// What is known of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    New,
    /// The same event, as far as is known.
    Again,
    /// Another event had it.
    Other,
}

pub struct EventIds {
    keys: [RandomState; 2],
    /// None: what the event said is not known.
    seen: HashMap<u128, Option<Payload>>,
    imported: VecDeque<u128>,
    pushed: VecDeque<(Micros, u128)>,
    ids_max: usize,
    horizon: Micros,
}

impl EventIds {
    pub fn new(ids_max: usize, horizon: Micros) -> EventIds {
        EventIds {
            keys: [RandomState::new(), RandomState::new()],
            seen: HashMap::new(),
            imported: VecDeque::new(),
            pushed: VecDeque::new(),
            ids_max,
            horizon,
        }
    }

    /// The hashes of the ids in an aligned batch; None for null, which is equal to nothing.
    pub fn hashes(&self, plan: &SourcePlan, name: &str, batch: &RecordBatch) -> Vec<Option<u128>> {
        let (Some(column), Some(column_type)) = (batch.column_by_name(name), plan.column_type(name)) else {
            return vec![None; batch.num_rows()];
        };
        let cells = Cells::new(column, column_type);
        let mut bytes = Vec::new();
        let hash = |row| {
            if cells.is_null(row) {
                return None;
            }
            bytes.clear();
            cells.encode(row, &mut bytes);
            let [high, low] = self.keys.each_ref().map(|key| u128::from(key.hash_one(&bytes)));
            Some(high << 64 | low)
        };
        (0..batch.num_rows()).map(hash).collect()
    }

    /// What the rows of an aligned batch say, by row. A column that is null says nothing, so that one which is new does
    /// not change what was said before.
    pub fn payloads(&self, plan: &SourcePlan, batch: &RecordBatch) -> Vec<Payload> {
        let columns: Vec<(&str, Cells<'_>)> = plan
            .schema
            .iter()
            .filter_map(|(name, t)| Some((name.as_str(), Cells::new(batch.column_by_name(name)?, t))))
            .collect();
        let mut bytes = Vec::new();
        let payload = |row| {
            bytes.clear();
            for (name, cells) in columns.iter().filter(|(_, cells)| !cells.is_null(row)) {
                bytes.extend_from_slice(name.as_bytes());
                bytes.push(0);
                cells.encode(row, &mut bytes);
            }
            NonZeroU64::new(self.keys[0].hash_one(&bytes)).unwrap_or(NonZeroU64::MIN)
        };
        (0..batch.num_rows()).map(payload).collect()
    }

    /// What was said is in other columns than what will be.
    pub fn forget_payloads(&mut self) {
        self.seen.values_mut().for_each(|payload| *payload = None);
    }

    #[cfg(test)]
    fn contains(&self, id: u128) -> bool {
        self.seen.contains_key(&id)
    }

    /// Remembers the id of a pushed event, unless it is known.
    pub fn insert(&mut self, id: u128, payload: Option<Payload>, arrival: Micros) -> Seen {
        match self.seen.get(&id) {
            Some(Some(before)) if payload.is_some_and(|payload| payload != *before) => Seen::Other,
            Some(_) => Seen::Again,
            None => {
                self.seen.insert(id, payload);
                self.pushed.push_back((arrival, id));
                self.evict(arrival);
                Seen::New
            }
        }
    }

    /// Remembers the id of an event of the prior history.
    pub fn insert_imported(&mut self, id: u128) {
        if self.seen.insert(id, None).is_none() {
            self.imported.push_back(id);
            self.evict(Micros::MIN);
        }
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
        let payload = NonZeroU64::new(7);
        ids.insert_imported(1);
        assert_eq!(ids.insert(2, payload, 100), Seen::New);
        assert_eq!(ids.insert(1, payload, 100), Seen::Again, "what imported events said is not known");
        assert_eq!(ids.insert(2, payload, 105), Seen::Again);
        assert_eq!(ids.insert(2, NonZeroU64::new(8), 105), Seen::Other);
        assert_eq!(ids.insert(3, payload, 111), Seen::New, "2 is out of the horizon now");
        assert!(!ids.contains(2));
        assert!(ids.contains(1), "imported ids do not age");
        assert_eq!(ids.insert(4, payload, 111), Seen::New);
        assert_eq!(ids.insert(5, payload, 111), Seen::New, "the fourth id pushes out an imported one");
        assert!(!ids.contains(1));
        ids.take_back(&[5]);
        assert!(!ids.contains(5) && ids.contains(4));
        ids.forget_payloads();
        assert_eq!(ids.insert(4, NonZeroU64::new(9), 111), Seen::Again);
    }
}
