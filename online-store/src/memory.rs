//! The executable specification: what every store must do, in the simplest code that does it.
//!
//! It is the judge in [`crate::conformance`] and the double in tests of other crates. It keeps nothing across restarts.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::time::Position;
use feature_defs::window::TileId;

use crate::key::{FORMAT, Generation, Key};
use crate::{Answer, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

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
    rows: BTreeMap<Key, Bytes>,
    tiles: BTreeMap<Key, Tiles>,
    facts: BTreeMap<String, Bytes>,
}

#[derive(Debug)]
struct Tiles {
    position: Position,
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
            match state.write(write) {
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
            Read::Row(key) => Answer::Row(self.rows.get(key).cloned()),
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
        }
    }

    /// Whether the write was applied; else it was stale.
    fn write(&mut self, write: Write) -> bool {
        match write {
            Write::Row(key, new) => {
                let Some(old) = self.rows.get_mut(&key) else {
                    self.rows.insert(key, new);
                    return true;
                };
                let Some((kept, replaced)) = row::merge(old, &new) else { return false };
                *old = kept;
                replaced
            }
            Write::Tiles { key, position, set, remove } => {
                if self.tiles.get(&key).is_some_and(|entity| position <= entity.position) {
                    return false;
                }
                let entity = self.tiles.entry(key).or_insert_with(|| Tiles { position, tiles: BTreeMap::new() });
                entity.position = position;
                entity.tiles.extend(set);
                for id in &remove {
                    entity.tiles.remove(id);
                }
                true
            }
            Write::Fact(name, Some(value)) => {
                self.facts.insert(name, value);
                true
            }
            Write::Fact(name, None) => {
                self.facts.remove(&name);
                true
            }
        }
    }
}

/// Refuses what some store could not hold, so that all stores take the same writes. A call with one such write changes
/// nothing. Nothing can lie under a key that is refused, so reading it finds nothing.
pub(crate) fn admit(write: &Write, place: &str) -> Result<(), StoreError> {
    let (name_bytes, value_bytes, value_bytes_max) = match write {
        Write::Row(key, blob) => {
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
