//! The latest row as of t: the reference that every engine is judged by, on plain slices.
//!
//! Among rows with `event_time <= t` that are known at t the greatest by (event_time, created_time with null lowest, tie
//! order) wins. Tie order is the log sequence for streams; for files it is the row's canonical encoding, so that it never
//! depends on where a row lay in which file.

use std::cmp::Ordering;

use crate::catalog;
use crate::time::{Micros, Position, STATIC, Status};
use crate::value::{Value, encode_row};

/// When a row happened, was created, became known, and became visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    pub event_time: Micros,
    pub created_time: Option<Micros>,
    pub known_time: Micros,
    pub position: Position,
}

impl Times {
    /// Of values that were never rows of a source: a profile's, a literal's.
    pub const NONE: Times =
        Times { event_time: Micros::MIN, created_time: None, known_time: Micros::MIN, position: Position::START };
}

/// Which rows a reader at t may see, besides the bound on event time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Known at t.
    Known,
    /// No condition.
    EventTime,
    /// What had arrived by t.
    Ingested,
    /// Applied at this position, under the source's own rule: what a server that had applied exactly so much could have
    /// seen.
    AsKnown(Position, catalog::Visibility),
}

impl Visibility {
    pub fn admits(&self, times: &Times, t: Micros) -> bool {
        match self {
            Visibility::Known => times.known_time <= t,
            Visibility::EventTime => true,
            Visibility::Ingested => times.position.time <= t,
            Visibility::AsKnown(position, rule) => {
                let rule = match rule {
                    catalog::Visibility::Known => Visibility::Known,
                    catalog::Visibility::EventTime => Visibility::EventTime,
                    catalog::Visibility::Ingested => Visibility::Ingested,
                };
                times.position <= *position && rule.admits(times, t)
            }
        }
    }
}

/// One row of an as-of view.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub times: Times,
    /// A tombstone: the entity has no row from here on.
    pub deleted: bool,
    pub values: Vec<Value>,
}

impl Row {
    /// Which of two rows of one entity is the later one.
    pub fn order(&self, other: &Row) -> Ordering {
        let key = |row: &Row| (row.times.event_time, row.times.created_time, row.times.position.sequence);
        key(self).cmp(&key(other)).then_with(|| self.content().cmp(&other.content()))
    }

    /// The tombstone flag and the canonical encoding of the values.
    pub fn content(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.deleted)];
        encode_row(&self.values, &mut bytes);
        bytes
    }
}

/// How old a row may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaxAge {
    /// Both ends inclusive; none: unbounded.
    pub ttl: Option<Micros>,
    /// A row older than ttl + keep is NOT_FOUND, stored or not.
    pub keep: Micros,
}

impl MaxAge {
    /// What a row of this event time is at t: PRESENT, OUTSIDE_MAX_AGE or NOT_FOUND.
    pub fn judge(&self, event_time: Micros, t: Micros) -> Status {
        let Some(ttl) = self.ttl.filter(|_| event_time != STATIC) else { return Status::Present };
        if event_time >= t.saturating_sub(ttl) {
            Status::Present
        } else if event_time >= t.saturating_sub(ttl).saturating_sub(self.keep) {
            Status::OutsideMaxAge
        } else {
            Status::NotFound
        }
    }
}

/// The answer for one entity: the winning row unless there is none to show, and what is true of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer<'a> {
    pub row: Option<&'a Row>,
    /// Of the row as a whole; a null value in a PRESENT row is NULL_VALUE.
    pub status: Status,
}

/// The reference lookup over all rows of one entity, in any order.
pub fn as_of(rows: &[Row], t: Micros, max_age: MaxAge, visibility: Visibility) -> Answer<'_> {
    let winner = rows
        .iter()
        .filter(|row| row.times.event_time <= t && visibility.admits(&row.times, t))
        .max_by(|a, b| a.order(b));
    match winner {
        Some(row) if !row.deleted => match max_age.judge(row.times.event_time, t) {
            Status::NotFound => Answer { row: None, status: Status::NotFound },
            status => Answer { row: Some(row), status },
        },
        _ => Answer { row: None, status: Status::NotFound },
    }
}

/// The value and status of one feature of an answer, defaults filled in.
pub fn feature_value(answer: &Answer<'_>, feature: usize, default: Option<&Value>) -> (Value, Status) {
    let (value, status) = match (answer.row, answer.status) {
        (Some(row), Status::Present) if row.values[feature].is_null() => (Value::Null, Status::NullValue),
        (Some(row), Status::Present) => (row.values[feature].clone(), Status::Present),
        (_, status) => (Value::Null, status),
    };
    match default {
        Some(default) if value.is_null() => (default.clone(), status),
        _ => (value, status),
    }
}

#[cfg(test)]
mod tests;
