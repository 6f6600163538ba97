//! The spine by entity and time.

use std::collections::HashMap;

use feature_defs::plan::EntityKeys;
use feature_defs::time::Micros;

/// Spine rows grouped by entity, each group sorted by time. A *slot* is a place in that order.
#[derive(Debug)]
pub struct SpineIndex {
    groups: HashMap<Box<[u8]>, u32>,
    /// First slot of each group, and the number of slots at the end.
    starts: Vec<u32>,
    /// Time of each slot.
    times: Vec<Micros>,
    /// Spine row of each slot.
    rows: Vec<u32>,
}

impl SpineIndex {
    /// Rows whose key has a null part are in no group: they match nothing.
    pub fn new(keys: &EntityKeys, times: &[Micros]) -> SpineIndex {
        let mut groups: HashMap<Box<[u8]>, u32> = HashMap::new();
        let mut members: Vec<(u32, Micros, u32)> = Vec::with_capacity(times.len());
        for (row, time) in times.iter().enumerate() {
            if let Some(key) = keys.get(row) {
                let next = groups.len() as u32;
                let group = match groups.get(key) {
                    Some(group) => *group,
                    None => {
                        groups.insert(key.into(), next);
                        next
                    }
                };
                members.push((group, *time, row as u32));
            }
        }
        members.sort_unstable();
        let mut starts = vec![0; groups.len() + 1];
        for (group, _, _) in &members {
            starts[*group as usize + 1] += 1;
        }
        for group in 1..starts.len() {
            starts[group] += starts[group - 1];
        }
        SpineIndex {
            groups,
            starts,
            times: members.iter().map(|(_, time, _)| *time).collect(),
            rows: members.iter().map(|(_, _, row)| *row).collect(),
        }
    }

    pub fn group(&self, key: &[u8]) -> Option<u32> {
        self.groups.get(key).copied()
    }

    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    pub fn slots(&self) -> usize {
        self.times.len()
    }

    /// The slots of a group.
    pub fn range(&self, group: u32) -> std::ops::Range<usize> {
        self.starts[group as usize] as usize..self.starts[group as usize + 1] as usize
    }

    pub fn times(&self, group: u32) -> &[Micros] {
        &self.times[self.range(group)]
    }

    pub fn time(&self, slot: usize) -> Micros {
        self.times[slot]
    }

    pub fn row(&self, slot: usize) -> usize {
        self.rows[slot] as usize
    }

    /// Bytes held, about.
    pub fn bytes(&self) -> usize {
        self.times.len() * 12 + self.groups.len() * 64
    }
}
