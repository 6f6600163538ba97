//! How events change the tiles of an entity, for its one writer.
//!
//! A writer that goes on where it stopped need not have all tiles at hand: an event changes one tile per level, nearly
//! always the newest, and of the others only the names are needed, to remove them when no window reaches them any more.
//! [`Tiles::stored`] holds those names, and [`Layout::absent`] tells which of them an event needs after all.

use std::collections::BTreeSet;

use bytes::Bytes;
use feature_defs::aggregate::State;
use feature_defs::as_of::Times;
use feature_defs::time::{Micros, Position, floor_to};
use feature_defs::value::{DecodeError, encode_i64};
use feature_defs::window::{TileId, WindowEvent};

use super::{
    BOUNDS, Change, Layout, RAW_EVENTS_MAX, Raw, RawEvent, RawEvents, Tile, Tiles, VERSION, VERSION_UNORDERED,
    decode_bounds, encode_bounds, encode_varint,
};

impl Layout {
    /// What a writer needs of everything that is stored of an entity, to add these events: the newest tiles, those the
    /// events go into, and the names of all others.
    pub fn decode_stored(
        &self,
        position: Option<Position>,
        answer: Vec<(TileId, Bytes)>,
        events: &[WindowEvent],
    ) -> Result<Tiles, DecodeError> {
        let mut tiles = Tiles { position, ..Tiles::default() };
        let finest = self.levels.finest();
        let newest = answer.iter().filter(|(id, _)| id.level == finest).map(|(id, _)| id.start).max();
        let wanted: BTreeSet<TileId> = events.iter().flat_map(|event| self.tiles_of(event.times.event_time)).collect();
        for (id, bytes) in answer {
            if id == BOUNDS {
                tiles.exact_from = decode_bounds(&bytes)?;
            } else if wanted.contains(&id) || newest.is_none_or(|newest| self.is_busy(&id, newest)) {
                tiles.tiles.insert(id, self.decode(&bytes)?);
            } else {
                tiles.stored.insert(id);
            }
        }
        Ok(tiles)
    }

    /// The tiles that events go into and that are only known by name.
    pub fn absent<'a>(&self, tiles: &Tiles, events: impl IntoIterator<Item = &'a WindowEvent>) -> Vec<TileId> {
        let mut absent: Vec<TileId> = events
            .into_iter()
            .flat_map(|event| self.tiles_of(event.times.event_time))
            .filter(|id| tiles.stored.contains(id))
            .collect();
        absent.sort_unstable();
        absent.dedup();
        absent
    }

    /// Gives a tile that was only known by name.
    pub fn supply(&self, tiles: &mut Tiles, id: TileId, bytes: &[u8]) -> Result<(), DecodeError> {
        tiles.tiles.insert(id, self.decode(bytes)?);
        tiles.stored.remove(&id);
        Ok(())
    }

    /// Keeps the tiles that the next events are likely to go into, and the names of the others, which are stored as they
    /// are.
    pub fn put_aside(&self, tiles: &mut Tiles) {
        let Some(newest) = self.newest(tiles) else { return };
        let idle: Vec<TileId> = tiles.tiles.keys().copied().filter(|id| !self.is_busy(id, newest)).collect();
        for id in idle {
            tiles.tiles.remove(&id);
            tiles.stored.insert(id);
        }
    }

    /// Whether events around now go into this tile: it is one of the two newest of the finest level, which keep their
    /// events, or the newest of its level.
    fn is_busy(&self, id: &TileId, newest: Micros) -> bool {
        let finest = self.levels.finest();
        if id.level == finest {
            id.start >= newest.saturating_sub(finest)
        } else {
            *id == TileId::containing(newest, id.level)
        }
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
        let is_ordered = self.is_ordered();
        for event in events {
            if event.times.position > before {
                self.add(tiles, event, is_ordered);
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

    /// Adds one event to the entity's tiles, one of every level.
    fn add(&self, tiles: &mut Tiles, event: &WindowEvent, is_ordered: bool) {
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
                    events: RawEvents::default(),
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
                    raw.events.push(&event.times, &event.inputs, is_ordered);
                    if raw.events.len() > RAW_EVENTS_MAX {
                        self.fold(raw, is_ordered);
                    }
                }
            }
        }
    }

    /// Start of the newest tile of the finest level.
    fn newest(&self, tiles: &Tiles) -> Option<Micros> {
        tiles.tiles.range(level(self.levels.finest())).next_back().map(|(id, _)| id.start)
    }

    /// Folds the older half of the raw events into states.
    fn fold(&self, raw: &mut Raw, is_ordered: bool) {
        let types = self.input_types();
        let mut events: Vec<RawEvent> = raw.events.iter(&types, is_ordered).flatten().collect();
        events.sort_by_key(|event| event.event_time);
        // Everything before `from` is folded and nothing at or after it, so equal times stay together. When one time
        // fills the whole tile it is folded whole: a reader at exactly that time is then told so.
        let middle = events[events.len() / 2].event_time;
        let from = if events[0].event_time < middle { middle } else { middle + 1 };
        let kept = events.partition_point(|event| event.event_time < from);
        for event in &events[..kept] {
            raw.folded_known_time_max = raw.folded_known_time_max.max(event.known_time);
            self.push(&mut raw.folded, &event.inputs, &event.times());
        }
        raw.events = RawEvents::default();
        for event in &events[kept..] {
            raw.events.push(&event.times(), &event.inputs, is_ordered);
        }
        raw.from = from;
    }

    /// Drops raw events that are no longer among the two newest tiles, and tiles that no window can reach any more.
    /// Returns which tiles changed and which are gone.
    fn tidy(&self, tiles: &mut Tiles) -> (Vec<TileId>, Vec<TileId>) {
        let Some(newest) = self.newest(tiles) else { return (Vec::new(), Vec::new()) };
        let finest = self.levels.finest();
        let mut changed = Vec::new();
        for (id, tile) in tiles.tiles.range_mut(level(finest)) {
            if id.start < newest - finest && tile.raw.is_some() {
                tile.raw = None;
                changed.push(*id);
            }
        }
        let mut gone: Vec<TileId> = Vec::new();
        for size in self.levels.all() {
            let reach = self.reach(*size, newest - finest);
            let at_hand = tiles.tiles.range(level(*size)).map(|(id, _)| *id);
            gone.extend(at_hand.take_while(|id| id.end() <= reach));
            gone.extend(tiles.stored.range(level(*size)).take_while(|id| id.end() <= reach));
        }
        for id in &gone {
            tiles.tiles.remove(id);
            tiles.stored.remove(id);
        }
        gone.sort_unstable();
        if !gone.is_empty() || !changed.is_empty() {
            tiles.exact_from = newest - finest;
        }
        changed.retain(|id| gone.binary_search(id).is_err());
        (changed, gone)
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
        let version = if self.is_ordered() { VERSION } else { VERSION_UNORDERED };
        let raw_bytes = tile.raw.as_ref().map_or(0, |raw| raw.events.bytes().len());
        let mut bytes = Vec::with_capacity(128 + raw_bytes);
        bytes.extend_from_slice(&[version, u8::from(tile.raw.is_some())]);
        bytes.extend_from_slice(&encode_i64(tile.event_time_max));
        bytes.extend_from_slice(&encode_i64(tile.known_time_max));
        self.encode_states(&tile.states, &mut bytes);
        if let Some(raw) = &tile.raw {
            bytes.extend_from_slice(&encode_i64(raw.from));
            bytes.extend_from_slice(&encode_i64(raw.folded_known_time_max));
            self.encode_states(&raw.folded, &mut bytes);
            encode_varint(raw.events.len() as u64, &mut bytes);
            bytes.extend_from_slice(raw.events.bytes());
        }
        bytes.into()
    }

    fn encode_states(&self, states: &[State], bytes: &mut Vec<u8>) {
        for (aggregate, state) in self.aggregates.iter().zip(states) {
            aggregate.encode(state, bytes);
        }
    }
}

/// All tiles of a level.
fn level(level: Micros) -> std::ops::RangeInclusive<TileId> {
    TileId { level, start: Micros::MIN }..=TileId { level, start: Micros::MAX }
}
