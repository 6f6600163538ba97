//! Windows put together from tiles, decoded or as they are stored.
//!
//! A reader needs most tiles once, to add their states to those of a window. So the tiles of a store's answer stay bytes:
//! the states are merged as they are decoded, and only what is read again is kept decoded. Both ways are one algorithm.

use std::borrow::Cow;
use std::cell::{Cell, OnceCell};

use feature_defs::aggregate::State;
use feature_defs::catalog::Head;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{DecodeError, Value};
use feature_defs::window::{TileId, Window};

use super::{BOUNDS, Layout, Raw, Tile, TileHead, Tiles, decode_bounds, decode_head};

/// The store's answer does not reach back to the time asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtBeforeStore;

/// Why windows cannot be read from stored tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadError {
    AtBeforeStore,
    Corrupt(DecodeError),
}

impl From<AtBeforeStore> for ReadError {
    fn from(_: AtBeforeStore) -> ReadError {
        ReadError::AtBeforeStore
    }
}

impl From<DecodeError> for ReadError {
    fn from(error: DecodeError) -> ReadError {
        ReadError::Corrupt(error)
    }
}

/// The tiles of a store's answer, which lie where the store put them.
#[derive(Debug)]
pub struct StoredTiles<'a> {
    pub position: Option<Position>,
    exact_from: Micros,
    /// In order of id.
    tiles: Vec<StoredTile<'a>>,
}

#[derive(Debug)]
struct StoredTile<'a> {
    id: TileId,
    event_time_max: Micros,
    known_time_max: Micros,
    has_raw: bool,
    bytes: &'a [u8],
    /// The states, and what follows them.
    rest: &'a [u8],
    was_read: Cell<bool>,
    /// From the second read on.
    states: OnceCell<Vec<State>>,
}

impl<'a> StoredTiles<'a> {
    /// From a store's answer, by the ids that were asked for.
    pub fn new(
        position: Option<Position>,
        answer: impl IntoIterator<Item = (TileId, &'a [u8])>,
    ) -> Result<StoredTiles<'a>, DecodeError> {
        let mut exact_from = Micros::MIN;
        let mut tiles: Vec<StoredTile<'a>> = Vec::new();
        for (id, bytes) in answer {
            if id == BOUNDS {
                exact_from = decode_bounds(bytes)?;
                continue;
            }
            let mut rest = bytes;
            let TileHead { has_raw, event_time_max, known_time_max, .. } = decode_head(&mut rest)?;
            let (was_read, states) = (Cell::new(false), OnceCell::new());
            tiles.push(StoredTile { id, event_time_max, known_time_max, has_raw, bytes, rest, was_read, states });
        }
        if !tiles.is_sorted_by_key(|tile| tile.id) {
            tiles.sort_unstable_by_key(|tile| tile.id);
        }
        Ok(StoredTiles { position, exact_from, tiles })
    }

    /// The latest known time of any event in these tiles.
    pub fn known_time_max(&self) -> Option<Micros> {
        self.tiles.iter().map(|tile| tile.known_time_max).max()
    }
}

impl StoredTile<'_> {
    fn decode_states(&self, layout: &Layout) -> Result<Vec<State>, DecodeError> {
        let mut bytes = self.rest;
        let states = layout.decode_states(&mut bytes)?;
        self.check_end(bytes)?;
        Ok(states)
    }

    fn check_end(&self, bytes: &[u8]) -> Result<(), DecodeError> {
        if self.has_raw || bytes.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(bytes.len())) }
    }
}

/// Tiles by id.
trait TileSet {
    type Tile: ReadTile<Error = Self::Error>;
    type Error: From<AtBeforeStore>;

    fn exact_from(&self) -> Micros;
    fn get(&self, id: &TileId) -> Option<&Self::Tile>;
}

/// One of them.
trait ReadTile {
    type Error;

    fn event_time_max(&self) -> Micros;
    fn known_time_max(&self) -> Micros;
    fn merge_into(&self, layout: &Layout, states: &mut [State]) -> Result<(), Self::Error>;
    fn raw(&self, layout: &Layout) -> Result<Option<Cow<'_, Raw>>, Self::Error>;
}

impl TileSet for Tiles {
    type Tile = Tile;
    type Error = AtBeforeStore;

    fn exact_from(&self) -> Micros {
        self.exact_from
    }

    fn get(&self, id: &TileId) -> Option<&Tile> {
        self.tiles.get(id)
    }
}

impl ReadTile for Tile {
    type Error = AtBeforeStore;

    fn event_time_max(&self) -> Micros {
        self.event_time_max
    }

    fn known_time_max(&self) -> Micros {
        self.known_time_max
    }

    fn merge_into(&self, layout: &Layout, states: &mut [State]) -> Result<(), AtBeforeStore> {
        layout.merge(states, &self.states);
        Ok(())
    }

    fn raw(&self, _: &Layout) -> Result<Option<Cow<'_, Raw>>, AtBeforeStore> {
        Ok(self.raw.as_ref().map(Cow::Borrowed))
    }
}

impl<'b> TileSet for StoredTiles<'b> {
    type Tile = StoredTile<'b>;
    type Error = ReadError;

    fn exact_from(&self) -> Micros {
        self.exact_from
    }

    fn get(&self, id: &TileId) -> Option<&StoredTile<'b>> {
        self.tiles.binary_search_by_key(id, |tile| tile.id).ok().map(|index| &self.tiles[index])
    }
}

impl ReadTile for StoredTile<'_> {
    type Error = ReadError;

    fn event_time_max(&self) -> Micros {
        self.event_time_max
    }

    fn known_time_max(&self) -> Micros {
        self.known_time_max
    }

    fn merge_into(&self, layout: &Layout, states: &mut [State]) -> Result<(), ReadError> {
        if let Some(known) = self.states.get() {
            layout.merge(states, known);
        } else if self.was_read.replace(true) {
            let decoded = self.decode_states(layout)?;
            layout.merge(states, &decoded);
            // Nobody else has put one there since: this type is not shared between threads.
            let _ = self.states.set(decoded);
        } else {
            let mut bytes = self.rest;
            for (aggregate, into) in layout.aggregates.iter().zip(states) {
                aggregate.merge(into, &aggregate.decode(&mut bytes)?);
            }
            self.check_end(bytes)?;
        }
        Ok(())
    }

    fn raw(&self, layout: &Layout) -> Result<Option<Cow<'_, Raw>>, ReadError> {
        if !self.has_raw {
            return Ok(None);
        }
        Ok(layout.decode(self.bytes)?.raw.map(Cow::Owned))
    }
}

impl Layout {
    /// The value of every (aggregate, window) asked for, at t, from the tiles that [`Layout::tiles_at`] named.
    pub fn read(&self, tiles: &Tiles, outputs: &[(usize, Window)], t: Micros) -> Result<Vec<Value>, AtBeforeStore> {
        self.read_from(tiles, outputs, t)
    }

    /// The same from tiles as they are stored.
    pub fn read_stored(
        &self,
        tiles: &StoredTiles<'_>,
        outputs: &[(usize, Window)],
        t: Micros,
    ) -> Result<Vec<Value>, ReadError> {
        self.read_from(tiles, outputs, t)
    }

    fn read_from<T: TileSet>(&self, tiles: &T, outputs: &[(usize, Window)], t: Micros) -> Result<Vec<Value>, T::Error> {
        if t < tiles.exact_from() {
            return Err(AtBeforeStore.into());
        }
        let head = tiles.get(&TileId::containing(t, self.levels.finest()));
        let mut values = Vec::with_capacity(outputs.len());
        // Windows of one view share tails more often than not; states per window are merged once.
        let mut merged: Vec<(Window, Vec<State>)> = Vec::new();
        for (aggregate, window) in outputs {
            let found = merged.iter().position(|(known, _)| known == window);
            let index = match found {
                Some(index) => index,
                None => {
                    merged.push((*window, self.window_states(tiles, head, window, t)?));
                    merged.len() - 1
                }
            };
            values.push(self.aggregates[*aggregate].finish(&merged[index].1[*aggregate]));
        }
        Ok(values)
    }

    fn window_states<T: TileSet>(
        &self,
        tiles: &T,
        head: Option<&T::Tile>,
        window: &Window,
        t: Micros,
    ) -> Result<Vec<State>, T::Error> {
        let mut states = self.zero();
        for id in self.levels.cover(window.start(t), t) {
            let Some(tile) = tiles.get(&id) else { continue };
            if tile.known_time_max() <= t {
                tile.merge_into(self, &mut states)?;
            } else {
                // Some event of this tile was not yet known at t. Only its raw events can tell which.
                let raw = tile.raw(self)?.ok_or(AtBeforeStore)?;
                self.merge_raw(&mut states, &raw, t, |_| true)?;
            }
        }
        if let Some(tile) = head {
            let inside = |event_time: Micros| match window.head {
                Head::Exclusive => event_time < t,
                Head::Inclusive => event_time <= t,
            };
            if inside(tile.event_time_max()) && tile.known_time_max() <= t {
                tile.merge_into(self, &mut states)?;
            } else {
                let raw = tile.raw(self)?.ok_or(AtBeforeStore)?;
                self.merge_raw(&mut states, &raw, t, inside)?;
            }
        }
        Ok(states)
    }

    fn merge(&self, into: &mut [State], from: &[State]) {
        for ((aggregate, into), from) in self.aggregates.iter().zip(into).zip(from) {
            aggregate.merge(into, from);
        }
    }

    fn merge_raw(
        &self,
        states: &mut [State],
        raw: &Raw,
        t: Micros,
        inside: impl Fn(Micros) -> bool,
    ) -> Result<(), AtBeforeStore> {
        let folded_is_exact = raw.folded_known_time_max <= t && (raw.from == Micros::MIN || inside(raw.from - 1));
        let nothing_folded = raw.folded_known_time_max == Micros::MIN;
        if !nothing_folded {
            if !folded_is_exact {
                return Err(AtBeforeStore);
            }
            self.merge(states, &raw.folded);
        }
        let types = self.input_types();
        // They were looked at when the tile was decoded.
        for event in raw.events.iter(&types, self.is_ordered()).flatten() {
            if inside(event.event_time) && event.known_time <= t {
                self.push(states, &event.inputs, &event.times());
            }
        }
        Ok(())
    }
}
