//! The executable specification: what every store must do, in the simplest code that does it.
//!
//! It is the judge in [`crate::conformance`] and the double in tests of other crates. It keeps nothing across restarts.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::time::{Micros, Position};
use feature_defs::window::TileId;

use crate::key::{FORMAT, Generation, Key};
use crate::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

/// Longest key: the embedded store takes 65,535 bytes, and appends 16 for a tile.
pub const KEY_BYTES_MAX: usize = 65_000;
/// Largest row or tile. A blob this large is a mistake, and would block a Redis for everybody while it is moved.
pub const VALUE_BYTES_MAX: usize = 64 << 20;
/// Largest fact, see [`Write::Fact`].
pub const FACT_BYTES_MAX: usize = 64 << 10;

/// A store in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rows: BTreeMap<Key, Row>,
    tiles: BTreeMap<Key, Tiles>,
    facts: BTreeMap<String, Bytes>,
    marks: BTreeMap<String, Position>,
    epochs: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Row {
    blob: Bytes,
    expires: Option<Micros>,
}

#[derive(Debug)]
struct Tiles {
    position: Position,
    epoch: u64,
    expires: Option<Micros>,
    tiles: BTreeMap<TileId, Bytes>,
}

impl MemoryStore {
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    /// Each change below is made in one step, so a panic in between leaves nothing half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl OnlineStore for MemoryStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        let state = self.state();
        Ok(reads.iter().map(|read| state.read(read)).collect())
    }

    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        let place = self.place();
        writes.iter().try_for_each(|write| admit(write, &place))?;
        let mut state = self.state();
        let mut outcome = WriteOutcome::default();
        for write in writes {
            match state.write(write)? {
                true => outcome.applied += 1,
                false => outcome.stale += 1,
            }
        }
        Ok(outcome)
    }

    async fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        let mut state = self.state();
        let before = state.rows.len() + state.tiles.len();
        state.rows.retain(|key, _| key.generation != *generation);
        state.tiles.retain(|key, _| key.generation != *generation);
        Ok((before - state.rows.len() - state.tiles.len()) as u64)
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        let mut state = self.state();
        let epoch = next_epoch(state.epochs.get(name).copied(), candidate, &self.place())?;
        state.epochs.insert(name.to_owned(), epoch);
        Ok(epoch)
    }

    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError> {
        let mut state = self.state();
        let before = state.rows.len() + state.tiles.len();
        state.rows.retain(|_, row| row.expires.is_none_or(|expires| expires > now));
        state.tiles.retain(|_, entity| entity.expires.is_none_or(|expires| expires > now));
        Ok((before - state.rows.len() - state.tiles.len()) as u64)
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        let state = self.state();
        Ok(vec![NodeReport {
            place: self.place(),
            role: "memory".to_owned(),
            keys: Some((state.rows.len() + state.tiles.len()) as u64),
            durability: "none".to_owned(),
            ..NodeReport::default()
        }])
    }

    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

impl State {
    fn read(&self, read: &Read) -> Answer {
        match read {
            Read::Row(key) => Answer::Row(self.rows.get(key).map(|row| row.blob.clone())),
            Read::Tiles(key, ids) => {
                let entity = self.tiles.get(key);
                let tile = |id| entity.and_then(|entity| entity.tiles.get(id).cloned());
                Answer::Tiles { position: entity.map(|entity| entity.position), tiles: ids.iter().map(tile).collect() }
            }
            Read::AllTiles(key) => {
                let entity = self.tiles.get(key);
                let tiles = entity.into_iter().flat_map(|entity| &entity.tiles);
                Answer::AllTiles {
                    position: entity.map(|entity| entity.position),
                    tiles: tiles.map(|(id, tile)| (*id, tile.clone())).collect(),
                }
            }
            Read::Fact(name) => Answer::Fact(self.facts.get(name).cloned()),
            Read::Mark(name) => Answer::Mark(self.marks.get(name).copied()),
        }
    }

    /// Whether the write was applied; else it was stale.
    fn write(&mut self, write: Write) -> Result<bool, StoreError> {
        Ok(match write {
            Write::Row { key, blob: new, expires } => {
                let Some(old) = self.rows.get_mut(&key) else {
                    self.rows.insert(key, Row { blob: new, expires });
                    return Ok(true);
                };
                old.expires = row_expiry((&old.blob, old.expires), (&new, expires));
                let Some((kept, replaced)) = row::merge(&old.blob, &new) else { return Ok(false) };
                old.blob = kept;
                replaced
            }
            Write::Tiles { key, position, epoch, set, remove, expires } => {
                if let Some(entity) = self.tiles.get(&key) {
                    if epoch < entity.epoch {
                        return Err(StoreError::Fenced { key: key.to_string(), epoch, newest: entity.epoch });
                    }
                    if position <= entity.position {
                        return Ok(false);
                    }
                }
                let new = || Tiles { position, epoch, expires, tiles: BTreeMap::new() };
                let entity = self.tiles.entry(key).or_insert_with(new);
                entity.position = position;
                entity.epoch = epoch;
                entity.expires = tiles_expiry(entity.expires, expires);
                entity.tiles.extend(set);
                for id in &remove {
                    entity.tiles.remove(id);
                }
                true
            }
            // Both are removed, so neither may be skipped because of the other.
            Write::Remove(key) => self.rows.remove(&key).is_some() | self.tiles.remove(&key).is_some(),
            Write::Fact(name, Some(value)) => {
                self.facts.insert(name, value);
                true
            }
            Write::Fact(name, None) => {
                self.facts.remove(&name);
                true
            }
            Write::Mark(name, position) => match self.marks.get(&name) {
                Some(old) if position <= *old => false,
                _ => {
                    self.marks.insert(name, position);
                    true
                }
            },
        })
    }
}

/// The expiry of what stays of two rows: it belongs to the later one; of the same row twice, the later expiry.
pub(crate) fn row_expiry(old: (&[u8], Option<Micros>), new: (&[u8], Option<Micros>)) -> Option<Micros> {
    match row::order(new.0).cmp(row::order(old.0)) {
        Ordering::Greater => new.1,
        Ordering::Less => old.1,
        // None is later than every time.
        Ordering::Equal => old.1.zip(new.1).map(|(old, new)| old.max(new)),
    }
}

/// The expiry of an entity after a write that was applied.
pub(crate) fn tiles_expiry(old: Option<Micros>, new: Option<Micros>) -> Option<Micros> {
    new.map(|new| old.map_or(new, |old| old.max(new)))
}

pub(crate) fn next_epoch(last: Option<u64>, candidate: u64, place: &str) -> Result<u64, StoreError> {
    match last {
        Some(last) if last >= candidate => last.checked_add(1).ok_or_else(|| no_epoch_left(place)),
        _ => Ok(candidate),
    }
}

pub(crate) fn no_epoch_left(place: &str) -> StoreError {
    let what = "there is no epoch after the last one that was claimed".to_owned();
    StoreError::Refused { place: place.to_owned(), what }
}

/// Refuses what some store could not hold, so that all stores take the same writes. A call with one such write changes
/// nothing. Nothing can lie under a key that is refused, so reading it finds nothing.
pub(crate) fn admit(write: &Write, place: &str) -> Result<(), StoreError> {
    let (name_bytes, value_bytes, value_bytes_max) = match write {
        Write::Row { key, blob, .. } => {
            if blob.len() < row::ORDER_AT {
                let what = format!("a row of {} bytes for {key}, the shortest has {}", blob.len(), row::ORDER_AT);
                return Err(StoreError::Refused { place: place.to_owned(), what });
            }
            (key_bytes(key), blob.len(), VALUE_BYTES_MAX)
        }
        Write::Tiles { key, set, .. } => {
            let largest = set.iter().map(|(_, tile)| tile.len()).max();
            (key_bytes(key), largest.unwrap_or(0), VALUE_BYTES_MAX)
        }
        Write::Remove(key) => (key_bytes(key), 0, VALUE_BYTES_MAX),
        Write::Mark(name, _) => (name.len(), 0, VALUE_BYTES_MAX),
        Write::Fact(name, value) => (name.len(), value.as_ref().map_or(0, Bytes::len), FACT_BYTES_MAX),
    };
    let what = if name_bytes > KEY_BYTES_MAX {
        format!("a key of {name_bytes} bytes, the longest has {KEY_BYTES_MAX}: shorten the entity's key values")
    } else if value_bytes > value_bytes_max {
        format!("a value of {value_bytes} bytes, the largest has {value_bytes_max}")
    } else {
        return Ok(());
    };
    Err(StoreError::Refused { place: place.to_owned(), what })
}

/// The length of [`Key::sorted`], the longer of the two forms, without making it.
pub(crate) fn key_bytes(key: &Key) -> usize {
    let Generation { project, view, digest } = &key.generation;
    FORMAT.len() + project.len() + view.len() + digest.len() + 4 + key.entity.len() + 4
}

#[cfg(test)]
mod tests;
