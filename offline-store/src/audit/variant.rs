//! Answers of a view as they would have been, had something been otherwise: the reference over plain slices, with one
//! thing changed.

use feature_defs::as_of::{MaxAge, Row, Visibility, as_of};
use feature_defs::catalog::{self, Head};
use feature_defs::plan::{ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position, Status, floor_to};
use feature_defs::value::Value;
use feature_defs::window::WindowEvent;

use crate::point_in_time::by_row::Applied;

/// What one view answers one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Of all features of the view; null where nobody reads them.
    pub values: Vec<Value>,
    pub status: Status,
    pub event_time: Option<Micros>,
}

/// A bound that is not where the definitions put it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bound {
    TailHopEarlier,
    TailHopLater,
    /// Not rounded down to the hop.
    TailExact,
    /// An event at the time itself counts where it should not, or does not where it should.
    HeadOther,
    /// What happened since the last full hop is missing.
    HeadAtHop,
    /// A row too old counts as if it were not.
    NoMaxAge,
}

pub const BOUNDS: [Bound; 6] =
    [Bound::TailHopEarlier, Bound::TailHopLater, Bound::TailExact, Bound::HeadOther, Bound::HeadAtHop, Bound::NoMaxAge];

impl Bound {
    pub fn words(self) -> &'static str {
        match self {
            Bound::TailHopEarlier => "the far end of the window one hop earlier",
            Bound::TailHopLater => "the far end of the window one hop later",
            Bound::TailExact => "the far end of the window not rounded to its hop",
            Bound::HeadOther => "an event at the very time of the request counted the other way",
            Bound::HeadAtHop => "the near end of the window at the last full hop",
            Bound::NoMaxAge => "ttl not applied",
        }
    }
}

/// A look at the events of one entity by one view.
#[derive(Debug, Clone, Copy)]
pub struct Look<'a> {
    pub view: &'a ViewPlan,
    pub rows: &'a [Row],
    pub windows: &'a [WindowEvent],
    /// Features that are read.
    pub needed: &'a [usize],
    pub rule: catalog::Visibility,
    pub applied: Applied,
    pub at: Micros,
    pub bound: Option<Bound>,
    /// An event that is missing.
    pub without: Option<usize>,
    /// An event that counts twice.
    pub twice: Option<usize>,
}

impl Look<'_> {
    fn visibility(&self) -> Option<Visibility> {
        match self.applied {
            Applied::UpTo(position) => Some(Visibility::AsKnown(position, self.rule)),
            Applied::Nothing | Applied::NotAnswered => None,
        }
    }

    pub fn part(&self) -> Part {
        let mut part = match &self.view.kind {
            ViewPlanKind::AsOf { max_age, features } => self.latest(*max_age, features.len()),
            ViewPlanKind::Windowed { .. } => self.windows(),
        };
        if self.applied == Applied::NotAnswered {
            part.values.fill(Value::Null);
            (part.status, part.event_time) = (Status::Unavailable, None);
        }
        part
    }

    fn latest(&self, max_age: MaxAge, features: usize) -> Part {
        let max_age = if self.bound == Some(Bound::NoMaxAge) { MaxAge::default() } else { max_age };
        let is_before = |time: Micros| match self.bound {
            Some(Bound::HeadOther) => time < self.at,
            _ => time <= self.at,
        };
        let end = self.rows.partition_point(|row| is_before(row.times.event_time));
        let visibility = self.visibility();
        let may_see = |place: usize, row: &Row| {
            visibility.is_some_and(|visibility| visibility.admits(&row.times, self.at)) && self.without != Some(place)
        };
        let winner = (0..end).rev().find(|place| may_see(*place, &self.rows[*place]));
        let winner = winner.map_or(&[][..], |place| &self.rows[place..=place]);
        // What may be seen has been asked above, with the change in it.
        let answer = as_of(winner, self.at, max_age, Visibility::EventTime);
        Part {
            values: match (answer.row, answer.status) {
                (Some(row), Status::Present) => row.values.clone(),
                _ => vec![Value::Null; features],
            },
            status: answer.status,
            event_time: answer.row.map(|row| row.times.event_time),
        }
    }

    fn windows(&self) -> Part {
        let ViewPlanKind::Windowed { aggregates, outputs, windows, .. } = &self.view.kind else {
            return Part { values: Vec::new(), status: Status::Present, event_time: None };
        };
        let finest = windows.iter().filter_map(|window| window.hop).min();
        let visibility = self.visibility();
        let mut values = vec![Value::Null; outputs.len()];
        for feature in self.needed {
            let output = &outputs[*feature];
            let (aggregate, window) = (&aggregates[output.aggregate].aggregate, &output.window);
            let hop = window.hop.unwrap_or(1);
            let mut start = window.start(self.at);
            match self.bound {
                Some(Bound::TailHopEarlier) => start = start.saturating_sub(hop),
                Some(Bound::TailHopLater) => start = start.saturating_add(hop),
                Some(Bound::TailExact) => start = self.at.saturating_sub(window.length),
                _ => {}
            }
            let head = match (self.bound, window.head) {
                (Some(Bound::HeadOther), Head::Exclusive) => Head::Inclusive,
                (Some(Bound::HeadOther), Head::Inclusive) => Head::Exclusive,
                (_, head) => head,
            };
            let at = match (self.bound, finest) {
                (Some(Bound::HeadAtHop), Some(finest)) => floor_to(self.at, finest),
                _ => self.at,
            };
            let first = self.windows.partition_point(|event| event.times.event_time < start);
            let end = self.windows.partition_point(|event| match head {
                Head::Exclusive => event.times.event_time < at,
                Head::Inclusive => event.times.event_time <= at,
            });
            let mut state = aggregate.zero();
            for place in first..end.max(first) {
                let event = &self.windows[place];
                let is_seen = visibility.is_some_and(|visibility| visibility.admits(&event.times, self.at));
                if !is_seen || self.without == Some(place) {
                    continue;
                }
                aggregate.push(&mut state, &event.inputs[output.aggregate], &event.times);
                if self.twice == Some(place) {
                    aggregate.push(&mut state, &event.inputs[output.aggregate], &event.times);
                }
            }
            values[*feature] = aggregate.finish(&state);
        }
        Part { values, status: Status::Present, event_time: None }
    }

    /// Places of the events that the answer is made of, the newest first, and no more than `most`.
    pub fn made_of(&self, most: usize) -> Vec<usize> {
        let Some(visibility) = self.visibility() else { return Vec::new() };
        match &self.view.kind {
            ViewPlanKind::AsOf { .. } => {
                let end = self.rows.partition_point(|row| row.times.event_time <= self.at);
                let seen = |place: &usize| visibility.admits(&self.rows[*place].times, self.at);
                (0..end).rev().find(seen).into_iter().collect()
            }
            ViewPlanKind::Windowed { windows, .. } => {
                let start = windows.iter().map(|window| window.start(self.at)).min().unwrap_or(self.at);
                let first = self.windows.partition_point(|event| event.times.event_time < start);
                let inside = |place: &usize| {
                    let times = &self.windows[*place].times;
                    windows.iter().any(|window| window.contains(times.event_time, self.at))
                        && visibility.admits(times, self.at)
                };
                (first..self.windows.len()).filter(inside).rev().take(most).collect()
            }
        }
    }

    /// Positions that had been applied before, the newest first: of events that the answer could have in it.
    pub fn earlier(&self, most: usize) -> Vec<Applied> {
        let Applied::UpTo(applied) = self.applied else { return Vec::new() };
        let times = self.rows.iter().map(|row| row.times).chain(self.windows.iter().map(|event| event.times));
        let happened = times.filter(|times| times.event_time <= self.at && times.position <= applied);
        let mut positions: Vec<Position> = happened.map(|times| times.position).collect();
        positions.sort_unstable();
        positions.dedup();
        // Up to the last of them is what was seen.
        let mut earlier: Vec<Applied> =
            positions.iter().rev().skip(1).map(|position| Applied::UpTo(*position)).collect();
        earlier.push(Applied::Nothing);
        earlier.truncate(most);
        earlier
    }
}
