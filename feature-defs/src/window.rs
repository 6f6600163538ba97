//! Windows of events: bounds, tiles, and the reference that every engine is judged by.
//!
//! The window of length W at time t holds the events known at t with `floor(t - W, hop) <= event_time < t`. The head is
//! exclusive so that a row never sees itself; the tail is aligned to the hop so that online tiles can hold it.

use serde::{Deserialize, Serialize};

use crate::aggregate::Aggregate;
use crate::as_of::{Times, Visibility};
use crate::catalog::Head;
use crate::time::{Micros, floor_to};
use crate::value::Value;

pub const SECOND: Micros = 1_000_000;
pub const MINUTE: Micros = 60 * SECOND;
pub const HOUR: Micros = 60 * MINUTE;
pub const DAY: Micros = 24 * HOUR;

/// One window of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    pub length: Micros,
    /// None: exact tails, offline only.
    pub hop: Option<Micros>,
    pub head: Head,
}

/// The hop of a window for which none is declared.
pub fn default_hop(length: Micros) -> Micros {
    if length < 12 * HOUR {
        5 * MINUTE
    } else if length < 12 * DAY {
        HOUR
    } else {
        DAY
    }
}

impl Window {
    /// The first event time inside the window at t.
    pub fn start(&self, t: Micros) -> Micros {
        let tail = t.saturating_sub(self.length);
        self.hop.map_or(tail, |hop| floor_to(tail, hop))
    }

    pub fn contains(&self, event_time: Micros, t: Micros) -> bool {
        let before_head = match self.head {
            Head::Exclusive => event_time < t,
            Head::Inclusive => event_time <= t,
        };
        before_head && self.start(t) <= event_time
    }
}

/// An event as one view's windows see it: its times and one input per aggregate, null where the aggregate's `where`
/// excluded it.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowEvent {
    pub times: Times,
    pub inputs: Vec<Value>,
}

/// The value of one aggregate over one window at t: the reference. Tombstones are not events and are not in the slice.
pub fn window_value(
    events: &[WindowEvent],
    input: usize,
    aggregate: &Aggregate,
    window: &Window,
    t: Micros,
    visibility: Visibility,
) -> Value {
    let mut state = aggregate.zero();
    for event in events {
        if window.contains(event.times.event_time, t) && visibility.admits(&event.times, t) {
            aggregate.push(&mut state, &event.inputs[input], &event.times);
        }
    }
    aggregate.finish(&state)
}

/// A tile: all events of an entity with `start <= event_time < start + level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TileId {
    pub level: Micros,
    pub start: Micros,
}

impl TileId {
    pub fn containing(event_time: Micros, level: Micros) -> TileId {
        TileId { level, start: floor_to(event_time, level) }
    }

    pub fn end(&self) -> Micros {
        self.start.saturating_add(self.level)
    }
}

/// Tile lengths kept for a view, ascending; each divides the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Levels(Vec<Micros>);

/// Hops that do not divide each other cannot share tiles.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the hops {smaller}us and {larger}us do not divide each other")]
pub struct LevelsError {
    pub smaller: Micros,
    pub larger: Micros,
}

impl Levels {
    /// 5 min, 1 h and 1 d, and every hop in use. A standard level that does not fit between declared hops is left out.
    pub fn new(hops: impl IntoIterator<Item = Micros>) -> Result<Levels, LevelsError> {
        let mut levels: Vec<Micros> = hops.into_iter().collect();
        levels.sort_unstable();
        levels.dedup();
        for pair in levels.windows(2) {
            if pair[1] % pair[0] != 0 {
                return Err(LevelsError { smaller: pair[0], larger: pair[1] });
            }
        }
        for standard in [5 * MINUTE, HOUR, DAY] {
            let fits = |level: &Micros| standard % level == 0 || level % standard == 0;
            if levels.iter().all(fits) && !levels.contains(&standard) {
                levels.push(standard);
                levels.sort_unstable();
            }
        }
        Ok(Levels(levels))
    }

    pub fn all(&self) -> &[Micros] {
        &self.0
    }

    pub fn finest(&self) -> Micros {
        self.0[0]
    }

    /// The fewest tiles that hold exactly `start <= event_time < end`. `start` must lie on the finest level; `end` is
    /// rounded down to it.
    pub fn cover(&self, start: Micros, end: Micros) -> Vec<TileId> {
        let end = floor_to(end, self.finest());
        let mut tiles = Vec::new();
        let mut at = start;
        while at < end {
            let level = self
                .0
                .iter()
                .rev()
                .copied()
                .find(|level| at.rem_euclid(*level) == 0 && at.saturating_add(*level) <= end)
                .unwrap_or(self.finest());
            tiles.push(TileId { level, start: at });
            at = at.saturating_add(level);
        }
        tiles
    }
}

#[cfg(test)]
mod tests;
