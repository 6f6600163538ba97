//! Tiles: the states of all aggregates of a view over one stretch of time, and how windows are put together from them.
//!
//! An event goes into one tile of every level. A window is read as the fewest tiles between its tail and the last
//! boundary of the finest level before t, and the rest, the *raw head*, event by event: the two newest tiles of the finest
//! level also keep their events, so that the head is exact to the last event, and at a past `at` within them.
//!
//! A tile of version 1:
//!
//! ```text
//! 1 byte    format version
//! 1 byte    1 if raw events follow
//! 8 bytes   latest event time in the tile      8 bytes   latest known time in the tile
//! states    one per aggregate of the view, self-delimiting, over all events of the tile
//! raw only: 8 bytes   raw from: events before this time were folded away to keep the tile bounded
//!           8 bytes   latest known time of the folded events
//!           states    over the folded events
//!           varint    number of raw events, then for each: event time, known time (8 bytes each), inputs (varint length + row)
//! ```

use std::collections::BTreeMap;

use bytes::Bytes;
use feature_defs::aggregate::{Aggregate, State};
use feature_defs::as_of::Times;
use feature_defs::catalog::Head;
use feature_defs::time::{Micros, Position, floor_to};
use feature_defs::value::{DecodeError, Type, Value, decode_i64, decode_row, encode_i64, encode_row, take};
use feature_defs::window::{Levels, TileId, Window, WindowEvent};

pub const VERSION: u8 = 1;

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
    pub inputs: Vec<Value>,
}

impl RawEvent {
    fn times(&self) -> Times {
        let position = Position { time: self.known_time, sequence: 0 };
        Times { event_time: self.event_time, created_time: None, known_time: self.known_time, position }
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

/// The store's answer does not reach back to the time asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtBeforeStore;

impl Layout {
    /// How raw inputs are typed: what each aggregate takes; `count(*)` counts a true marker.
    fn input_types(&self) -> Vec<Type> {
        self.aggregates.iter().map(|aggregate| aggregate.input().cloned().unwrap_or(Type::Bool)).collect()
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

    /// The value of every (aggregate, window) asked for, at t, from the tiles that [`Layout::tiles_at`] named.
    pub fn read(&self, tiles: &Tiles, outputs: &[(usize, Window)], t: Micros) -> Result<Vec<Value>, AtBeforeStore> {
        if t < tiles.exact_from {
            return Err(AtBeforeStore);
        }
        let tiles = &tiles.tiles;
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

    fn window_states(
        &self,
        tiles: &BTreeMap<TileId, Tile>,
        head: Option<&Tile>,
        window: &Window,
        t: Micros,
    ) -> Result<Vec<State>, AtBeforeStore> {
        let mut states = self.zero();
        for id in self.levels.cover(window.start(t), t) {
            let Some(tile) = tiles.get(&id) else { continue };
            if tile.known_time_max <= t {
                self.merge(&mut states, &tile.states);
            } else {
                // Some event of this tile was not yet known at t. Only its raw events can tell which.
                let raw = tile.raw.as_ref().ok_or(AtBeforeStore)?;
                self.merge_raw(&mut states, raw, t, |_| true)?;
            }
        }
        if let Some(tile) = head {
            let inside = |event_time: Micros| match window.head {
                Head::Exclusive => event_time < t,
                Head::Inclusive => event_time <= t,
            };
            if inside(tile.event_time_max) && tile.known_time_max <= t {
                self.merge(&mut states, &tile.states);
            } else {
                let raw = tile.raw.as_ref().ok_or(AtBeforeStore)?;
                self.merge_raw(&mut states, raw, t, inside)?;
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
        for event in &raw.events {
            if inside(event.event_time) && event.known_time <= t {
                self.push(states, &event.inputs, &event.times());
            }
        }
        Ok(())
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
                    raw.events.push(RawEvent { event_time, known_time, inputs: event.inputs.clone() });
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
        let mut bytes = vec![VERSION, u8::from(tile.raw.is_some())];
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
        let [version, has_raw] = take::<2>(bytes)?;
        if version != VERSION {
            return Err(DecodeError::Version { found: version, newest: VERSION });
        }
        let event_time_max = decode_i64(take(bytes)?);
        let known_time_max = decode_i64(take(bytes)?);
        let states = self.decode_states(bytes)?;
        let raw = if has_raw == 1 { Some(self.decode_raw(bytes)?) } else { None };
        if !bytes.is_empty() {
            return Err(DecodeError::Trailing(bytes.len()));
        }
        Ok(Tile { event_time_max, known_time_max, states, raw })
    }

    fn decode_raw(&self, bytes: &mut &[u8]) -> Result<Raw, DecodeError> {
        let from = decode_i64(take(bytes)?);
        let folded_known_time_max = decode_i64(take(bytes)?);
        let folded = self.decode_states(bytes)?;
        let count = decode_varint(bytes)?;
        let types = self.input_types();
        let mut events = Vec::new();
        for _ in 0..count {
            let event_time = decode_i64(take(bytes)?);
            let known_time = decode_i64(take(bytes)?);
            let length = decode_varint(bytes)? as usize;
            let (row, rest) = bytes.split_at_checked(length).ok_or(DecodeError::Truncated)?;
            *bytes = rest;
            events.push(RawEvent { event_time, known_time, inputs: decode_row(row, &types)? });
        }
        Ok(Raw { from, folded_known_time_max, folded, events })
    }

    fn decode_states(&self, bytes: &mut &[u8]) -> Result<Vec<State>, DecodeError> {
        self.aggregates.iter().map(|aggregate| aggregate.decode(bytes)).collect()
    }
}

fn encode_bounds(exact_from: Micros) -> Bytes {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&encode_i64(exact_from));
    bytes.into()
}

fn decode_bounds(mut bytes: &[u8]) -> Result<Micros, DecodeError> {
    let [version] = take::<1>(&mut bytes)?;
    if version != VERSION {
        return Err(DecodeError::Version { found: version, newest: VERSION });
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
