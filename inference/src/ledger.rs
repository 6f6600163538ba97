//! What the models of a device take of its memory, written down before it is taken. Pure.

use std::collections::BTreeMap;

use crate::memory::{self, Footprint, MemoryError};

/// Names an entry. Never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId(u64);

/// The sums are over everything that was entered and not removed, loading models included: two that load at once see each
/// other.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// Of the device; without it, nothing is refused.
    capacity: Option<u64>,
    entries: BTreeMap<EntryId, Option<Footprint>>,
    next_entry: u64,
}

impl Ledger {
    pub fn new(capacity: Option<u64>) -> Ledger {
        Ledger { capacity, ..Ledger::default() }
    }

    pub fn capacity(&self) -> Option<u64> {
        self.capacity
    }

    /// An entry for a model that nothing is known of yet.
    pub fn enter(&mut self) -> EntryId {
        let id = EntryId(self.next_entry);
        self.next_entry += 1;
        self.entries.insert(id, None);
        id
    }

    pub fn remove(&mut self, id: EntryId) {
        self.entries.remove(&id);
    }

    /// Enters what is known of a model by now, if that fits beside all others; what was entered before is kept if not.
    pub fn reserve(&mut self, id: EntryId, footprint: Footprint) -> Result<(), MemoryError> {
        if let Some(capacity) = self.capacity {
            memory::check(&footprint, self.others(id), capacity)?;
        }
        if let Some(entry) = self.entries.get_mut(&id) {
            *entry = Some(footprint);
        }
        Ok(())
    }

    /// Whether a size that was not run yet may be tried: only if it is expected to fit into all the memory there is. What
    /// it really takes is held against the models' part of it afterwards.
    pub fn may_try(&self, id: EntryId, expected: &Footprint) -> Result<(), MemoryError> {
        let Some(capacity) = self.capacity else { return Ok(()) };
        let others = self.others(id);
        if expected.bytes().saturating_add(others) <= capacity {
            return Ok(());
        }
        memory::check(expected, others, capacity)
    }

    /// What all models take together.
    pub fn bytes(&self) -> u64 {
        self.known().map(Footprint::bytes).fold(0, u64::saturating_add)
    }

    pub fn known(&self) -> impl Iterator<Item = &Footprint> {
        self.entries.values().flatten()
    }

    fn others(&self, id: EntryId) -> u64 {
        let others = self.entries.iter().filter(|(other, _)| **other != id);
        others.filter_map(|(_, footprint)| Some(footprint.as_ref()?.bytes())).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Size;

    fn footprint(name: &str, weight_bytes: u64, forward: u64) -> Footprint {
        let sizes = vec![Size { rows: 1, forward_micros: 1, bytes: forward }];
        Footprint { name: name.to_owned(), file_bytes: 0, executors: 1, weight_bytes, sizes }
    }

    #[test]
    fn models_that_load_at_once_see_each_other() {
        let mut ledger = Ledger::new(Some(1_000));
        let (a, b) = (ledger.enter(), ledger.enter());
        assert_eq!(ledger.reserve(a, footprint("a", 400, 0)), Ok(()));
        assert_eq!(ledger.reserve(b, footprint("b", 400, 0)), Ok(()));
        assert!(ledger.reserve(b, footprint("b", 400, 1)).is_err());
        assert_eq!(ledger.bytes(), 800, "what fitted is still entered");
        ledger.remove(a);
        assert_eq!(ledger.reserve(b, footprint("b", 700, 100)), Ok(()));
        assert_eq!((ledger.bytes(), ledger.known().count()), (800, 1));
    }

    #[test]
    fn a_size_may_be_tried_as_long_as_it_should_fit_into_everything() {
        let mut ledger = Ledger::new(Some(1_000));
        let (a, b) = (ledger.enter(), ledger.enter());
        ledger.reserve(a, footprint("a", 500, 0)).unwrap();
        assert_eq!(ledger.may_try(b, &footprint("b", 400, 100)), Ok(()));
        assert!(ledger.may_try(b, &footprint("b", 400, 101)).is_err());
        assert_eq!(Ledger::new(None).may_try(b, &footprint("b", u64::MAX, 1)), Ok(()));
    }
}
