//! Answers by asking the reference for every spine row: for readers whose rows each see another prefix of the log ("as
//! known"). Meant for audits, it shares nothing with the fast path but the definitions.
//!
//! The rows of an entity are sorted once, so that the reference is only given those that can matter: a lookup walks back
//! from its time to the first row that it may see, a window is a range.

use feature_defs::as_of::{Answer, MaxAge, Row, as_of};
use feature_defs::catalog::{Head, Visibility};
use feature_defs::plan::{ViewAnswer, ViewPlan, ViewPlanKind, ViewRows};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{Window, WindowEvent, window_value};

use super::index::{NO_GROUP, SpineIndex};
use super::reader;

/// What of a view's events a reader had when it answered a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// No event of this entity, not even a static row.
    Nothing,
    UpTo(Position),
    /// It did not answer, and said so: whatever it had, the row is UNAVAILABLE.
    NotAnswered,
}

/// Rows of one view by group of the spine.
pub struct ByRow<'p> {
    view: &'p ViewPlan,
    types: Vec<Type>,
    rule: Visibility,
    rows: Vec<Vec<Row>>,
    events: Vec<Vec<WindowEvent>>,
    count: usize,
}

impl<'p> ByRow<'p> {
    pub fn new(view: &'p ViewPlan, rule: Visibility, index: &SpineIndex) -> ByRow<'p> {
        let groups = index.groups();
        let (rows, events) = (vec![Vec::new(); groups], vec![Vec::new(); groups]);
        ByRow { view, types: view.row_types(), rule, rows, events, count: 0 }
    }

    pub fn bytes(&self) -> usize {
        self.count * (size_of::<Row>() + self.types.len() * size_of::<Value>())
    }

    /// `groups` are those of the rows of the source's batch.
    pub fn add(&mut self, rows: &ViewRows, groups: &[u32]) {
        for row in 0..rows.len() {
            let group = groups[rows.source_rows[row] as usize];
            if group == NO_GROUP {
                continue;
            }
            let (times, values) = (rows.times[row], rows.values(row, &self.types));
            if self.view.is_windowed() {
                self.events[group as usize].push(WindowEvent { times, inputs: values });
            } else {
                self.rows[group as usize].push(Row { times, deleted: rows.deleted[row], values });
            }
            self.count += 1;
        }
    }

    /// The answer for every spine row; `applied` is what each may see.
    pub fn finish(mut self, index: &SpineIndex, spine_rows: usize, applied: &[Applied]) -> ViewAnswer {
        self.rows.iter_mut().for_each(|rows| rows.sort_by(Row::order));
        // Aggregates take events in any order.
        self.events.iter_mut().for_each(|events| events.sort_by_key(|event| event.times.event_time));
        let mut answer = match &self.view.kind {
            ViewPlanKind::AsOf { max_age, .. } => self.lookups(*max_age, index, spine_rows, applied),
            ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                let values = outputs.iter().map(|output| {
                    let aggregate = &aggregates[output.aggregate].aggregate;
                    // A row of no group still has an empty window.
                    let mut column = vec![aggregate.finish(&aggregate.zero()); spine_rows];
                    for group in 0..index.groups() as u32 {
                        let events = &self.events[group as usize];
                        for slot in index.range(group) {
                            let (row, t) = (index.row(slot), index.time(slot));
                            if let Applied::UpTo(position) = applied[row] {
                                let (events, visibility) =
                                    (inside(events, &output.window, t), reader(self.rule, position));
                                column[row] =
                                    window_value(events, output.aggregate, aggregate, &output.window, t, visibility);
                            }
                        }
                    }
                    not_answered(applied).for_each(|row| column[row] = Value::Null);
                    Value::to_array(&column, &output.feature_type)
                });
                ViewAnswer {
                    values: values.collect(),
                    statuses: vec![Status::Present; spine_rows],
                    event_times: vec![None; spine_rows],
                }
            }
        };
        not_answered(applied).for_each(|row| answer.statuses[row] = Status::Unavailable);
        answer
    }

    fn lookups(&self, max_age: MaxAge, index: &SpineIndex, spine_rows: usize, applied: &[Applied]) -> ViewAnswer {
        let mut statuses = vec![Status::NotFound; spine_rows];
        let mut event_times: Vec<Option<Micros>> = vec![None; spine_rows];
        let mut found: Vec<Vec<Value>> = vec![vec![Value::Null; spine_rows]; self.types.len()];
        for group in 0..index.groups() as u32 {
            for slot in index.range(group) {
                let row = index.row(slot);
                let Applied::UpTo(position) = applied[row] else { continue };
                let rows = &self.rows[group as usize];
                let answer = latest(rows, index.time(slot), max_age, reader(self.rule, position));
                statuses[row] = answer.status;
                event_times[row] = answer.row.map(|row| row.times.event_time);
                if let (Some(winner), Status::Present) = (answer.row, answer.status) {
                    for (column, value) in found.iter_mut().zip(&winner.values) {
                        column[row] = value.clone();
                    }
                }
            }
        }
        let values = found.iter().zip(&self.types).map(|(column, t)| Value::to_array(column, t)).collect();
        ViewAnswer { values, statuses, event_times }
    }
}

fn not_answered(applied: &[Applied]) -> impl Iterator<Item = usize> + '_ {
    let rows = applied.iter().enumerate().filter(|(_, applied)| **applied == Applied::NotAnswered);
    rows.map(|(row, _)| row)
}

/// The reference lookup over rows in the order of lookups: the last that may be seen is the greatest.
pub fn latest(rows: &[Row], t: Micros, max_age: MaxAge, visibility: feature_defs::as_of::Visibility) -> Answer<'_> {
    let happened = rows.partition_point(|row| row.times.event_time <= t);
    let winner = rows[..happened].iter().rposition(|row| visibility.admits(&row.times, t));
    as_of(winner.map_or(&[], |winner| &rows[winner..=winner]), t, max_age, visibility)
}

/// The events of a window, of events in the order of their times.
pub fn inside<'e>(events: &'e [WindowEvent], window: &Window, t: Micros) -> &'e [WindowEvent] {
    let start = window.start(t);
    let first = events.partition_point(|event| event.times.event_time < start);
    let end = events.partition_point(|event| match window.head {
        Head::Exclusive => event.times.event_time < t,
        Head::Inclusive => event.times.event_time <= t,
    });
    &events[first..end.max(first)]
}
