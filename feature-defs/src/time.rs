//! Times, positions and statuses: the words that offline and online share.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Microseconds since 1970-01-01T00:00:00Z.
pub type Micros = i64;

/// The event time of rows of static sources: before every other time, so that it is at or before every t.
pub const STATIC: Micros = i64::MIN;

/// A point in the order in which events are applied. An event's position is the time at which it becomes visible, the
/// latest of its arrival, its known time and its event time, and its sequence in the log. For rows of file sources the
/// time is the later of known time and event time, and the sequence is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    pub time: Micros,
    pub sequence: u64,
}

impl Position {
    /// Before every event.
    pub const START: Position = Position { time: i64::MIN, sequence: 0 };
    /// After every event.
    pub const END: Position = Position { time: i64::MAX, sequence: u64::MAX };
}

/// What is true of a value. Numbers follow Feast's `FieldStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Status {
    Present = 1,
    NullValue = 2,
    NotFound = 3,
    OutsideMaxAge = 4,
    Unavailable = 5,
}

impl Status {
    /// The worse of two: UNAVAILABLE, NOT_FOUND, OUTSIDE_MAX_AGE, NULL_VALUE, PRESENT.
    pub fn worst(self, other: Status) -> Status {
        if self.badness() >= other.badness() { self } else { other }
    }

    fn badness(self) -> u8 {
        match self {
            Status::Present => 0,
            Status::NullValue => 1,
            Status::OutsideMaxAge => 2,
            Status::NotFound => 3,
            Status::Unavailable => 4,
        }
    }

    pub fn from_number(number: u8) -> Option<Status> {
        Some(match number {
            1 => Status::Present,
            2 => Status::NullValue,
            3 => Status::NotFound,
            4 => Status::OutsideMaxAge,
            5 => Status::Unavailable,
            _ => return None,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Present => "PRESENT",
            Status::NullValue => "NULL_VALUE",
            Status::NotFound => "NOT_FOUND",
            Status::OutsideMaxAge => "OUTSIDE_MAX_AGE",
            Status::Unavailable => "UNAVAILABLE",
        })
    }
}

/// When a row of a source becomes known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SourceClock {
    /// The source names a created-time column; its value, or the event time where it is null, is the known time.
    pub has_created_time: bool,
    pub delay: Micros,
    /// Grid on which rows of file sources become visible; 0 for none.
    pub every: Micros,
}

impl SourceClock {
    pub fn known(&self, event_time: Micros, created_time: Option<Micros>) -> Micros {
        if event_time == STATIC {
            return STATIC;
        }
        let known = if self.has_created_time {
            created_time.unwrap_or(event_time)
        } else {
            event_time.saturating_add(self.delay)
        };
        if self.every > 0 { ceil_to(known, self.every) } else { known }
    }
}

/// The largest multiple of `step` that is at most `t`.
pub fn floor_to(t: Micros, step: Micros) -> Micros {
    t.saturating_sub(t.rem_euclid(step))
}

/// The smallest multiple of `step` that is at least `t`.
pub fn ceil_to(t: Micros, step: Micros) -> Micros {
    match t.rem_euclid(step) {
        0 => t,
        over => t.saturating_add(step - over),
    }
}
