//! Answers by asking the reference for every spine row: for readers whose rows each see another prefix of the log ("as
//! known"). Meant for audits, it shares nothing with the fast path but the definitions.

use feature_defs::as_of::{Row, as_of};
use feature_defs::catalog::Visibility;
use feature_defs::plan::{ViewAnswer, ViewPlan, ViewPlanKind, ViewRows};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{WindowEvent, window_value};

use super::index::{NO_GROUP, SpineIndex};
use super::reader;

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

    /// The answer for every spine row; `applied` is the position that each may see.
    pub fn finish(self, index: &SpineIndex, spine_rows: usize, applied: &[Position]) -> ViewAnswer {
        match &self.view.kind {
            ViewPlanKind::AsOf { max_age, .. } => {
                let mut statuses = vec![Status::NotFound; spine_rows];
                let mut event_times: Vec<Option<Micros>> = vec![None; spine_rows];
                let mut found: Vec<Vec<Value>> = vec![vec![Value::Null; spine_rows]; self.types.len()];
                for group in 0..index.groups() as u32 {
                    for slot in index.range(group) {
                        let row = index.row(slot);
                        let visibility = reader(self.rule, applied[row]);
                        let answer = as_of(&self.rows[group as usize], index.time(slot), *max_age, visibility);
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
            ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                let values = outputs.iter().map(|output| {
                    let aggregate = &aggregates[output.aggregate].aggregate;
                    // A row of no group still has an empty window.
                    let mut column = vec![aggregate.finish(&aggregate.zero()); spine_rows];
                    for group in 0..index.groups() as u32 {
                        let events = &self.events[group as usize];
                        for slot in index.range(group) {
                            let (row, t) = (index.row(slot), index.time(slot));
                            let visibility = reader(self.rule, applied[row]);
                            column[row] =
                                window_value(events, output.aggregate, aggregate, &output.window, t, visibility);
                        }
                    }
                    Value::to_array(&column, &output.feature_type)
                });
                ViewAnswer {
                    values: values.collect(),
                    statuses: vec![Status::Present; spine_rows],
                    event_times: vec![None; spine_rows],
                }
            }
        }
    }
}
