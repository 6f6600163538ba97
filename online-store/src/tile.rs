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

mod read;

use std::collections::BTreeMap;

use bytes::Bytes;
use feature_defs::aggregate::{Aggregate, State};
use feature_defs::as_of::Times;
use feature_defs::time::{Micros, Position, floor_to};
use feature_defs::value::{DecodeError, Type, Value, decode_i64, decode_row, encode_i64, encode_row, take};
use feature_defs::window::{Levels, TileId, Window, WindowEvent};

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
    pub events: Vec<RawEvent>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct RawEvent {
    pub event_time: Micros,
    pub known_time: Micros,
    /// This and the sequence are kept only where an aggregate orders its values.
    pub created_time: Option<Micros>,
    pub sequence: u64,
    pub inputs: Vec<Value>,
}

impl RawEvent {
    fn times(&self) -> Times {
        // The position's time is not kept: it has decided when the event was applied, and decides no order of values.
        let position = Position { time: self.known_time, sequence: self.sequence };
        Times { event_time: self.event_time, created_time: self.created_time, known_time: self.known_time, position }
    }
}

/// The tiles of one entity, all of them for a writer, those of one read for a reader.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiles {
    pub position: Option<Position>,
    /// Reads at t before this are not exact: raw events or tiles they need may be gone.
    pub exact_from: Micros,
    pub tiles: BTreeMap<TileId, Tile>,
}

impl Default for Tiles {
    fn default() -> Tiles {
        Tiles { position: None, exact_from: Micros::MIN, tiles: BTreeMap::new() }
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

    fn raw_event(&self, event: &WindowEvent) -> RawEvent {
        let Times { event_time, known_time, created_time, position } = event.times;
        let is_ordered = self.is_ordered();
        RawEvent {
            event_time,
            known_time,
            created_time: created_time.filter(|_| is_ordered),
            sequence: if is_ordered { position.sequence } else { 0 },
            inputs: event.inputs.clone(),
        }
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

    /// Adds one event to the entity's tiles and returns nothing: the caller finds what changed by [`Layout::tiles_of`].
    pub fn add(&self, tiles: &mut Tiles, event: &WindowEvent) {
        let Times { event_time, known_time, .. } = event.times;
        let finest = self.levels.finest();
        for id in self.tiles_of(event_time) {
            // A tile of the finest level keeps its events while it is among the two newest. One that begins older has
            // lost nothing, but nobody will read its head again.
            let keeps_raw = id.level == finest && self.newest(tiles).is_none_or(|newest| id.start >= newest - finest);
            let tile = tiles.tiles.entry(id).or_insert_with(|| Tile {
                event_time_max: event_time,
                known_time_max: known_time,
                states: self.zero(),
                raw: keeps_raw.then(|| Raw {
                    from: id.start,
                    folded_known_time_max: Micros::MIN,
                    folded: self.zero(),
                    events: Vec::new(),
                }),
            });
            tile.event_time_max = tile.event_time_max.max(event_time);
            tile.known_time_max = tile.known_time_max.max(known_time);
            self.push(&mut tile.states, &event.inputs, &event.times);
            if let Some(raw) = &mut tile.raw {
                if event_time < raw.from {
                    raw.folded_known_time_max = raw.folded_known_time_max.max(known_time);
                    self.push(&mut raw.folded, &event.inputs, &event.times);
                } else {
                    raw.events.push(self.raw_event(event));
                    if raw.events.len() > RAW_EVENTS_MAX {
                        self.fold(raw);
                    }
                }
            }
        }
    }

    /// Start of the newest tile of the finest level.
    fn newest(&self, tiles: &Tiles) -> Option<Micros> {
        let finest = self.levels.finest();
        let range = TileId { level: finest, start: Micros::MIN }..=TileId { level: finest, start: Micros::MAX };
        tiles.tiles.range(range).next_back().map(|(id, _)| id.start)
    }

    /// Folds the older half of the raw events into states.
    fn fold(&self, raw: &mut Raw) {
        raw.events.sort_by_key(|event| event.event_time);
        // Everything before `from` is folded and nothing at or after it, so equal times stay together. When one time
        // fills the whole tile it is folded whole: a reader at exactly that time is then told so.
        let middle = raw.events[raw.events.len() / 2].event_time;
        let from = if raw.events[0].event_time < middle { middle } else { middle + 1 };
        let kept = raw.events.partition_point(|event| event.event_time < from);
        for event in raw.events.drain(..kept) {
            raw.folded_known_time_max = raw.folded_known_time_max.max(event.known_time);
            self.push(&mut raw.folded, &event.inputs, &event.times());
        }
        raw.from = from;
    }

    /// Drops raw events that are no longer among the two newest tiles, and tiles that no window can reach any more.
    /// Returns which tiles changed and which are gone.
    pub fn tidy(&self, tiles: &mut Tiles) -> (Vec<TileId>, Vec<TileId>) {
        let Some(newest) = self.newest(tiles) else { return (Vec::new(), Vec::new()) };
        let finest = self.levels.finest();
        let mut changed = Vec::new();
        for (id, tile) in &mut tiles.tiles {
            if id.level == finest && id.start < newest - finest && tile.raw.is_some() {
                tile.raw = None;
                changed.push(*id);
            }
        }
        let gone: Vec<TileId> =
            tiles.tiles.keys().copied().filter(|id| id.end() <= self.reach(id.level, newest - finest)).collect();
        for id in &gone {
            tiles.tiles.remove(id);
        }
        if !gone.is_empty() || !changed.is_empty() {
            tiles.exact_from = newest - finest;
        }
        changed.retain(|id| !gone.contains(id));
        (changed, gone)
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

    /// Applies events in order of position to an entity's tiles. Those at or before the applied position were counted
    /// before and are skipped. Returns what to write, or None when nothing is new.
    pub fn apply<'a>(
        &self,
        tiles: &mut Tiles,
        events: impl IntoIterator<Item = &'a WindowEvent>,
        position: Position,
    ) -> Option<Change> {
        let before = tiles.position.unwrap_or(Position::START);
        if position <= before {
            return None;
        }
        let mut touched: Vec<TileId> = Vec::new();
        for event in events {
            if event.times.position > before {
                self.add(tiles, event);
                touched.extend(self.tiles_of(event.times.event_time));
            }
        }
        tiles.position = Some(position);
        let (stripped, remove) = self.tidy(tiles);
        touched.extend(stripped);
        touched.sort_unstable();
        touched.dedup();
        let mut set: Vec<(TileId, Bytes)> = vec![(BOUNDS, encode_bounds(tiles.exact_from))];
        set.extend(touched.into_iter().filter_map(|id| Some((id, self.encode(tiles.tiles.get(&id)?)))));
        Some(Change { position, set, remove })
    }

    /// Tiles of this level that end at or before the result are in no cover of any t at or after `earliest_t`.
    pub fn reach(&self, level: Micros, earliest_t: Micros) -> Micros {
        let levels = self.levels.all();
        // As part of a head: back to the last boundary of the next coarser level. As part of a tail: back to the start
        // of any window whose hop is not coarser than this level.
        let next = levels.iter().copied().find(|other| *other > level);
        let head = next.map_or(earliest_t, |next| floor_to(earliest_t, next));
        self.windows
            .iter()
            .filter(|window| window.hop.is_some_and(|hop| hop <= level) || next.is_none())
            .map(|window| window.start(earliest_t))
            .fold(head, Micros::min)
    }

    pub fn encode(&self, tile: &Tile) -> Bytes {
        let is_ordered = self.is_ordered();
        let version = if is_ordered { VERSION } else { VERSION_UNORDERED };
        let mut bytes = vec![version, u8::from(tile.raw.is_some())];
        bytes.extend_from_slice(&encode_i64(tile.event_time_max));
        bytes.extend_from_slice(&encode_i64(tile.known_time_max));
        self.encode_states(&tile.states, &mut bytes);
        if let Some(raw) = &tile.raw {
            bytes.extend_from_slice(&encode_i64(raw.from));
            bytes.extend_from_slice(&encode_i64(raw.folded_known_time_max));
            self.encode_states(&raw.folded, &mut bytes);
            encode_varint(raw.events.len() as u64, &mut bytes);
            let mut row = Vec::new();
            for event in &raw.events {
                bytes.extend_from_slice(&encode_i64(event.event_time));
                bytes.extend_from_slice(&encode_i64(event.known_time));
                if is_ordered {
                    encode_varint(event.sequence, &mut bytes);
                    bytes.push(u8::from(event.created_time.is_some()));
                    bytes.extend(event.created_time.map(encode_i64).into_iter().flatten());
                }
                row.clear();
                encode_row(&event.inputs, &mut row);
                encode_varint(row.len() as u64, &mut bytes);
                bytes.extend_from_slice(&row);
            }
        }
        bytes.into()
    }

    fn encode_states(&self, states: &[State], bytes: &mut Vec<u8>) {
        for (aggregate, state) in self.aggregates.iter().zip(states) {
            aggregate.encode(state, bytes);
        }
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
        let types = self.input_types();
        let mut events = Vec::new();
        for _ in 0..count {
            let event_time = decode_i64(take(bytes)?);
            let known_time = decode_i64(take(bytes)?);
            let (sequence, created_time) = match version {
                VERSION_UNORDERED => (0, None),
                _ => (decode_varint(bytes)?, decode_created_time(bytes)?),
            };
            let length = decode_varint(bytes)? as usize;
            let (row, rest) = bytes.split_at_checked(length).ok_or(DecodeError::Truncated)?;
            *bytes = rest;
            let inputs = decode_row(row, &types)?;
            events.push(RawEvent { event_time, known_time, created_time, sequence, inputs });
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

fn decode_created_time(bytes: &mut &[u8]) -> Result<Option<Micros>, DecodeError> {
    match take(bytes)? {
        [0] => Ok(None),
        [1] => Ok(Some(decode_i64(take(bytes)?))),
        _ => Err(DecodeError::Invalid("a null mark is neither 0 nor 1")),
    }
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
