//! The spine by entity and time.

use std::hash::BuildHasher;
use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::Int64Type;
use feature_defs::plan::encode_entity_keys;
use feature_defs::time::Micros;
use feature_defs::value::Type;
use hashbrown::{DefaultHashBuilder, HashTable};

/// The group of a row whose entity is not in the spine.
pub const NO_GROUP: u32 = u32::MAX;

/// Spine rows grouped by entity, each group sorted by time. A *slot* is a place in that order.
#[derive(Debug)]
pub struct SpineIndex {
    keys: Keys,
    /// First slot of each group, and the number of slots at the end.
    starts: Vec<u32>,
    /// Time of each slot.
    times: Vec<Micros>,
    /// Spine row of each slot.
    rows: Vec<u32>,
}

impl SpineIndex {
    /// Rows whose key has a null part are in no group: they match nothing.
    pub fn new(columns: &[(ArrayRef, &Type)], times: &[Micros]) -> SpineIndex {
        let (keys, group_of) = Keys::of(columns, times.len());
        let mut starts = vec![0u32; keys.groups + 1];
        for group in group_of.iter().filter(|group| **group != NO_GROUP) {
            starts[*group as usize + 1] += 1;
        }
        for group in 1..starts.len() {
            starts[group] += starts[group - 1];
        }
        let slots = starts[keys.groups] as usize;
        let mut next: Vec<u32> = starts[..keys.groups].to_vec();
        let mut members: Vec<(Micros, u32)> = vec![(0, 0); slots];
        for (row, group) in group_of.iter().enumerate().filter(|(_, group)| **group != NO_GROUP) {
            let slot = &mut next[*group as usize];
            members[*slot as usize] = (times[row], row as u32);
            *slot += 1;
        }
        for group in 0..keys.groups {
            members[starts[group] as usize..starts[group + 1] as usize].sort_unstable();
        }
        SpineIndex {
            keys,
            starts,
            times: members.iter().map(|(time, _)| *time).collect(),
            rows: members.iter().map(|(_, row)| *row).collect(),
        }
    }

    /// The group of each row's key; [`NO_GROUP`] where the spine does not have it, or a part of it is null.
    pub fn groups_of(&self, columns: &[(ArrayRef, &Type)], rows: usize, groups: &mut Vec<u32>) {
        self.keys.find(columns, rows, groups);
    }

    /// All keys in order, where they are single integers.
    pub fn integer_keys(&self) -> Option<Vec<i64>> {
        let Kind::Integers(integers) = &self.keys.kind else { return None };
        let dense = integers.dense.iter().enumerate().filter(|(_, group)| **group != NO_GROUP);
        let mut keys: Vec<i64> = dense.map(|(at, _)| integers.least + at as i64).collect();
        keys.extend(integers.table.iter().filter(|(_, group)| *group != NO_GROUP).map(|(key, _)| *key));
        keys.sort_unstable();
        Some(keys)
    }

    pub fn groups(&self) -> usize {
        self.keys.groups
    }

    pub fn slots(&self) -> usize {
        self.times.len()
    }

    /// The slots of a group.
    #[inline]
    pub fn range(&self, group: u32) -> Range<usize> {
        self.starts[group as usize] as usize..self.starts[group as usize + 1] as usize
    }

    #[inline]
    pub fn times(&self, group: u32) -> &[Micros] {
        &self.times[self.range(group)]
    }

    /// The first slot of a group at or after a time, or the end of the group.
    #[inline]
    pub fn first_at_or_after(&self, group: u32, time: Micros) -> (usize, usize) {
        let (start, end) = (self.starts[group as usize] as usize, self.starts[group as usize + 1] as usize);
        (start + first_at_or_after(&self.times[start..end], time), end)
    }

    /// Asks for the times of a group, which will be looked at soon.
    #[inline]
    pub fn prefetch(&self, group: u32) {
        let (start, end) = (self.starts[group as usize] as usize, self.starts[group as usize + 1] as usize);
        // Most entities have few slots: their times lie in one or two lines of the cache.
        prefetch(&self.times, start);
        prefetch(&self.times, end.saturating_sub(1));
    }

    pub fn time(&self, slot: usize) -> Micros {
        self.times[slot]
    }

    pub fn row(&self, slot: usize) -> usize {
        self.rows[slot] as usize
    }

    /// The earliest and the latest time of any slot.
    pub fn time_range(&self) -> Option<(Micros, Micros)> {
        Some((*self.times.iter().min()?, *self.times.iter().max()?))
    }

    /// Bytes held, about.
    pub fn bytes(&self) -> usize {
        self.times.len() * 12 + self.starts.len() * 4 + self.keys.bytes()
    }

    /// Bytes that an index of so many rows holds at most, while it is made.
    pub fn bytes_of(rows: usize, key_bytes: usize) -> usize {
        rows * (4 + 16 + 12 + 4 + 24) + key_bytes
    }
}

/// Asks for an element that will be looked at soon, if there is one. It changes nothing but how long that takes.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = slice.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is that of an element, and prefetching reads nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, at);
}

/// [`slice::partition_point`] for sorted times, without branches on what the times are: the next row of a source has
/// another entity, and a branch on its time would be guessed wrong every other time.
#[inline]
pub fn first_at_or_after(times: &[Micros], time: Micros) -> usize {
    let (mut base, mut size) = (0, times.len());
    while size > 1 {
        let half = size / 2;
        base = std::hint::select_unpredictable(times[base + half - 1] < time, base + half, base);
        size -= half;
    }
    base + usize::from(size == 1 && times[base] < time)
}

/// Entities by number.
#[derive(Debug)]
struct Keys {
    groups: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The entity without keys.
    Everything,
    Integers(Integers),
    /// One string or binary, as it is.
    Bytes(ByteKeys),
    /// Any other key, encoded.
    Encoded(ByteKeys),
}

impl Keys {
    fn of(columns: &[(ArrayRef, &Type)], rows: usize) -> (Keys, Vec<u32>) {
        let mut groups = Vec::with_capacity(rows);
        let keys = match columns {
            [] => {
                groups.resize(rows, 0);
                Keys { groups: usize::from(rows > 0), kind: Kind::Everything }
            }
            [(column, Type::Int64)] => {
                let column = column.as_primitive::<Int64Type>();
                let mut integers = Integers::new(column.iter().flatten());
                for row in 0..rows {
                    groups.push(if column.is_valid(row) { integers.insert(column.value(row)) } else { NO_GROUP });
                }
                Keys { groups: integers.len, kind: Kind::Integers(integers) }
            }
            [(column, Type::String | Type::Binary)] => {
                let mut bytes = ByteKeys::default();
                for row in 0..rows {
                    groups.push(if column.is_valid(row) { bytes.insert(raw(column, row)) } else { NO_GROUP });
                }
                Keys { groups: bytes.ends.len(), kind: Kind::Bytes(bytes) }
            }
            _ => {
                let keys = encode_entity_keys(columns, rows);
                let mut bytes = ByteKeys::default();
                groups.extend((0..rows).map(|row| keys.get(row).map_or(NO_GROUP, |key| bytes.insert(key))));
                Keys { groups: bytes.ends.len(), kind: Kind::Encoded(bytes) }
            }
        };
        (keys, groups)
    }

    fn find(&self, columns: &[(ArrayRef, &Type)], rows: usize, groups: &mut Vec<u32>) {
        groups.clear();
        match (&self.kind, columns) {
            (Kind::Everything, _) => groups.resize(rows, if self.groups > 0 { 0 } else { NO_GROUP }),
            (Kind::Integers(integers), [(column, _)]) => {
                let column = column.as_primitive::<Int64Type>();
                groups.extend(column.values().iter().map(|key| integers.get(*key)));
                if let Some(nulls) = column.nulls().filter(|nulls| nulls.null_count() > 0) {
                    (0..rows).filter(|row| nulls.is_null(*row)).for_each(|row| groups[row] = NO_GROUP);
                }
            }
            (Kind::Bytes(bytes), [(column, _)]) => groups
                .extend((0..rows).map(|row| if column.is_valid(row) { bytes.get(raw(column, row)) } else { NO_GROUP })),
            (Kind::Integers(_) | Kind::Bytes(_) | Kind::Encoded(_), _) => {
                let keys = encode_entity_keys(columns, rows);
                let Kind::Encoded(bytes) = &self.kind else { return groups.resize(rows, NO_GROUP) };
                groups.extend((0..rows).map(|row| keys.get(row).map_or(NO_GROUP, |key| bytes.get(key))));
            }
        }
    }

    fn bytes(&self) -> usize {
        match &self.kind {
            Kind::Everything => 0,
            Kind::Integers(integers) => integers.dense.len() * 4 + integers.table.len() * 16,
            Kind::Bytes(keys) | Kind::Encoded(keys) => keys.arena.len() + keys.ends.len() * 16,
        }
    }
}

fn raw(column: &ArrayRef, row: usize) -> &[u8] {
    match column.as_string_opt::<i32>() {
        Some(strings) => strings.value(row).as_bytes(),
        None => column.as_binary::<i32>().value(row),
    }
}

/// Integer keys: a table by value where they lie close together, else open addressing.
#[derive(Debug)]
struct Integers {
    len: usize,
    least: i64,
    /// Group by key - least; empty where keys are spread out.
    dense: Vec<u32>,
    /// A power of two of places, at most half of them taken.
    table: Vec<(i64, u32)>,
}

impl Integers {
    fn new(keys: impl Iterator<Item = i64>) -> Integers {
        let (mut least, mut greatest, mut count) = (i64::MAX, i64::MIN, 0usize);
        for key in keys {
            (least, greatest, count) = (least.min(key), greatest.max(key), count + 1);
        }
        let span = greatest.checked_sub(least).and_then(|span| usize::try_from(span).ok());
        let (dense, table) = match span {
            Some(span) if count > 0 && span / 8 <= count => (vec![NO_GROUP; span + 1], Vec::new()),
            _ => (Vec::new(), vec![(0, NO_GROUP); (count * 2).next_power_of_two().max(2)]),
        };
        Integers { len: 0, least, dense, table }
    }

    fn insert(&mut self, key: i64) -> u32 {
        let place = if self.table.is_empty() {
            &mut self.dense[(key - self.least) as usize]
        } else {
            let at = self.probe(key);
            self.table[at].0 = key;
            &mut self.table[at].1
        };
        if *place == NO_GROUP {
            *place = self.len as u32;
            self.len += 1;
        }
        *place
    }

    #[inline]
    fn get(&self, key: i64) -> u32 {
        if self.table.is_empty() {
            // Keys below the least wrap around to the end of the table, and beyond.
            let at = key.wrapping_sub(self.least) as u64;
            if at < self.dense.len() as u64 { self.dense[at as usize] } else { NO_GROUP }
        } else {
            self.table[self.probe(key)].1
        }
    }

    /// The place of a key, or the free place where it belongs.
    #[inline]
    fn probe(&self, key: i64) -> usize {
        let mask = self.table.len() - 1;
        let mixed = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut at = (mixed ^ (mixed >> 32)) as usize & mask;
        while self.table[at].1 != NO_GROUP && self.table[at].0 != key {
            at = (at + 1) & mask;
        }
        at
    }
}

#[derive(Debug, Default)]
struct ByteKeys {
    hasher: DefaultHashBuilder,
    table: HashTable<u32>,
    arena: Vec<u8>,
    ends: Vec<usize>,
}

impl ByteKeys {
    fn key(arena: &[u8], ends: &[usize], group: u32) -> Range<usize> {
        let group = group as usize;
        debug_assert!(ends[group] <= arena.len());
        (if group == 0 { 0 } else { ends[group - 1] })..ends[group]
    }

    fn insert(&mut self, key: &[u8]) -> u32 {
        let found = self.get(key);
        if found != NO_GROUP {
            return found;
        }
        let group = self.ends.len() as u32;
        self.arena.extend_from_slice(key);
        self.ends.push(self.arena.len());
        let (arena, ends, hasher) = (&self.arena, &self.ends, &self.hasher);
        let hash = hasher.hash_one(key);
        self.table.insert_unique(hash, group, |other| hasher.hash_one(&arena[ByteKeys::key(arena, ends, *other)]));
        group
    }

    #[inline]
    fn get(&self, key: &[u8]) -> u32 {
        let (arena, ends) = (&self.arena, &self.ends);
        let hash = self.hasher.hash_one(key);
        let same = |group: &u32| &arena[ByteKeys::key(arena, ends, *group)] == key;
        self.table.find(hash, same).copied().unwrap_or(NO_GROUP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_branchless_search_is_partition_point() {
        for length in 0..20 {
            let times: Vec<Micros> = (0..length).map(|i| i / 2 * 3).collect();
            for time in -2..35 {
                assert_eq!(first_at_or_after(&times, time), times.partition_point(|t| *t < time), "{times:?} {time}");
            }
        }
    }

    #[test]
    fn integer_keys_far_apart_and_close_together_are_found() {
        for keys in [vec![i64::MIN, i64::MAX, 0, -1, 0], vec![7, 5, 6, 5, 9]] {
            let mut integers = Integers::new(keys.iter().copied());
            let groups: Vec<u32> = keys.iter().map(|key| integers.insert(*key)).collect();
            for (key, group) in keys.iter().zip(groups) {
                assert_eq!(integers.get(*key), group);
            }
            for absent in [1, 4, 10, -2, i64::MIN + 1] {
                assert_eq!(integers.get(absent), NO_GROUP);
            }
        }
    }
}
