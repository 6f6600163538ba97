//! Tiles: the states of all aggregates of a view over one stretch of time, and how windows are put together from them.
//!
//! An event goes into one tile of every level. A window is read as the fewest tiles between its tail and the last
//! boundary of the finest level before t, and the rest, the *raw head*, event by event: the two newest tiles of the finest
//! level also keep their events, so that the head is exact to the last event, and at a past `at` within them.
//!
//! A tile:
//!
//! ```text
//! 1 byte    format version, 1 or 2
//! 1 byte    1 if raw events follow
//! 8 bytes   latest event time in the tile      8 bytes   latest known time in the tile
//! states    one per aggregate of the view, self-delimiting, over all events of the tile
//! raw only: 8 bytes   raw from: events before this time were folded away to keep the tile bounded
//!           8 bytes   latest known time of the folded events
//!           states    over the folded events
//!           varint    number of raw events, then for each: event time, known time (8 bytes each), inputs (varint length + row)
//! ```
//!
//! Version 2 is written where an aggregate of the view orders its values: in front of a raw event's inputs it has what
//! decides ties, the sequence (varint) and the created time (1 byte, 0 for none, else 1 and 8 bytes).

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use feature_defs::aggregate::{Aggregate, State};
use feature_defs::as_of::Times;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{DecodeError, Type, Value, decode_i64, encode_i64, take};
use feature_defs::window::{Levels, TileId, Window};

mod raw;
mod read;
mod write;

pub use raw::{RawEvent, RawEvents};
pub use read::{AtBeforeStore, ReadError, StoredTiles};

/// The newest version.
pub const VERSION: u8 = 2;

/// Of tiles whose raw events have only the times that windows ask for.
const VERSION_UNORDERED: u8 = 1;

/// Of the field beside the tiles.
const BOUNDS_VERSION: u8 = 1;

/// Raw events kept in one tile before the older half is folded into states: about 100 KB for a view of a few inputs.
pub const RAW_EVENTS_MAX: usize = 1_024;

/// What the tiles of a view hold, from the compiled plan.
#[derive(Debug, Clone)]
pub struct Layout {
    pub aggregates: Vec<Aggregate>,
    pub windows: Vec<Window>,
    pub levels: Levels,
}

/// A decoded tile.
#[derive(Debug, Clone, PartialEq)]
pub struct Tile {
    /// Latest event time of any event in the tile.
    pub event_time_max: Micros,
    /// Latest known time of any event in the tile: before it, the states are not what was known.
    pub known_time_max: Micros,
    pub states: Vec<State>,
    pub raw: Option<Raw>,
}

/// The events of one of the newest tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Raw {
    /// Events before this were folded into `folded`.
    pub from: Micros,
    pub folded_known_time_max: Micros,
    pub folded: Vec<State>,
    pub events: RawEvents,
}

/// The tiles of one entity: for a writer those it may change, for a reader those of one read.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiles {
    pub position: Option<Position>,
    /// Reads at t before this are not exact: raw events or tiles they need may be gone.
    pub exact_from: Micros,
    pub tiles: BTreeMap<TileId, Tile>,
    /// Tiles that a writer knows to be in the store, without having them here.
    pub stored: BTreeSet<TileId>,
}

impl Default for Tiles {
    fn default() -> Tiles {
        Tiles { position: None, exact_from: Micros::MIN, tiles: BTreeMap::new(), stored: BTreeSet::new() }
    }
}

/// Where `exact_from` is kept: a field beside the tiles, set by every write.
pub const BOUNDS: TileId = TileId { level: 0, start: 0 };

/// What one application of events changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub position: Position,
    pub set: Vec<(TileId, Bytes)>,
    pub remove: Vec<TileId>,
}

impl Layout {
    /// How raw inputs are typed: what each aggregate takes; `count(*)` counts a true marker.
    fn input_types(&self) -> Vec<Type> {
        self.aggregates.iter().map(|aggregate| aggregate.input().cloned().unwrap_or(Type::Bool)).collect()
    }

    /// Whether raw events must keep what decides ties.
    fn is_ordered(&self) -> bool {
        self.aggregates.iter().any(Aggregate::is_ordered)
    }

    fn zero(&self) -> Vec<State> {
        self.aggregates.iter().map(Aggregate::zero).collect()
    }

    fn push(&self, states: &mut [State], inputs: &[Value], times: &Times) {
        for ((aggregate, state), input) in self.aggregates.iter().zip(states).zip(inputs) {
            aggregate.push(state, input, times);
        }
    }

    /// The tiles a reader at t needs for all windows of the view, each once.
    pub fn tiles_at(&self, t: Micros) -> Vec<TileId> {
        let mut tiles: Vec<TileId> = vec![BOUNDS];
        for window in &self.windows {
            tiles.extend(self.levels.cover(window.start(t), t));
        }
        tiles.push(TileId::containing(t, self.levels.finest()));
        tiles.sort_unstable();
        tiles.dedup();
        tiles
    }

    /// The tiles an event at `event_time` goes into.
    pub fn tiles_of(&self, event_time: Micros) -> impl Iterator<Item = TileId> + '_ {
        self.levels.all().iter().map(move |level| TileId::containing(event_time, *level))
    }

    /// The tiles of a store's answer, by the ids that were asked for.
    pub fn decode_answer(
        &self,
        position: Option<Position>,
        answer: impl IntoIterator<Item = (TileId, Bytes)>,
    ) -> Result<Tiles, DecodeError> {
        let mut tiles = Tiles { position, ..Tiles::default() };
        for (id, bytes) in answer {
            if id == BOUNDS {
                tiles.exact_from = decode_bounds(&bytes)?;
            } else {
                tiles.tiles.insert(id, self.decode(&bytes)?);
            }
        }
        Ok(tiles)
    }

    pub fn decode(&self, bytes: &[u8]) -> Result<Tile, DecodeError> {
        let bytes = &mut &*bytes;
        let TileHead { version, has_raw, event_time_max, known_time_max } = decode_head(bytes)?;
        let states = self.decode_states(bytes)?;
        let raw = if has_raw { Some(self.decode_raw(bytes, version)?) } else { None };
        if !bytes.is_empty() {
            return Err(DecodeError::Trailing(bytes.len()));
        }
        Ok(Tile { event_time_max, known_time_max, states, raw })
    }

    fn decode_raw(&self, bytes: &mut &[u8], version: u8) -> Result<Raw, DecodeError> {
        let from = decode_i64(take(bytes)?);
        let folded_known_time_max = decode_i64(take(bytes)?);
        let folded = self.decode_states(bytes)?;
        let count = decode_varint(bytes)?;
        let is_ordered = version != VERSION_UNORDERED;
        let mut events = RawEvents::take(bytes, count, &self.input_types(), is_ordered)?;
        if is_ordered != self.is_ordered() {
            // Of another version than this view's tiles: kept from now on as they would be written.
            let mut again = RawEvents::default();
            for event in events.iter(&self.input_types(), is_ordered) {
                let event = event?;
                again.push(&event.times(), &event.inputs, self.is_ordered());
            }
            events = again;
        }
        Ok(Raw { from, folded_known_time_max, folded, events })
    }

    fn decode_states(&self, bytes: &mut &[u8]) -> Result<Vec<State>, DecodeError> {
        self.aggregates.iter().map(|aggregate| aggregate.decode(bytes)).collect()
    }
}

/// What a tile begins with.
struct TileHead {
    version: u8,
    has_raw: bool,
    event_time_max: Micros,
    known_time_max: Micros,
}

fn decode_head(bytes: &mut &[u8]) -> Result<TileHead, DecodeError> {
    let [version, has_raw] = take::<2>(bytes)?;
    if ![VERSION_UNORDERED, VERSION].contains(&version) {
        return Err(DecodeError::Version { found: version, newest: VERSION });
    }
    let event_time_max = decode_i64(take(bytes)?);
    let known_time_max = decode_i64(take(bytes)?);
    Ok(TileHead { version, has_raw: has_raw == 1, event_time_max, known_time_max })
}

fn encode_bounds(exact_from: Micros) -> Bytes {
    let mut bytes = vec![BOUNDS_VERSION];
    bytes.extend_from_slice(&encode_i64(exact_from));
    bytes.into()
}

fn decode_bounds(mut bytes: &[u8]) -> Result<Micros, DecodeError> {
    let [version] = take::<1>(&mut bytes)?;
    if version != BOUNDS_VERSION {
        return Err(DecodeError::Version { found: version, newest: BOUNDS_VERSION });
    }
    Ok(decode_i64(take(&mut bytes)?))
}

fn encode_varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn decode_varint(bytes: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let [byte] = take::<1>(bytes)?;
        n |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(n);
        }
    }
    Err(DecodeError::Invalid("a varint is longer than 64 bits"))
}

#[cfg(test)]
mod tests;
