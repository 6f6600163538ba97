//! As-of views by spine scatter.
//!
//! A source row first counts at the first slot of its entity whose time is at or after both its event time and the time
//! it may be seen from. There it competes with the others that begin to count there; the greatest in the order of rows
//! stays. A pass over each entity's slots then carries the greatest so far forward: whoever was seen once stays seen.

use std::cmp::Ordering;

use arrow::array::{Array, ArrayRef, UInt32Array, new_null_array};
use arrow::compute::{interleave, take};
use arrow::error::ArrowError;
use feature_defs::as_of::{MaxAge, Row, Times, as_of};
use feature_defs::catalog::Visibility;
use feature_defs::plan::{ViewAnswer, ViewPlan, ViewRows};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value, encode_row};

use super::index::SpineIndex;
use super::{reader, visible_from};

/// Answers of one as-of view, while its source is read.
pub struct Latest {
    types: Vec<Type>,
    max_age: MaxAge,
    rule: Visibility,
    /// The best row that begins to count at each slot.
    best: Vec<Option<Candidate>>,
    /// Values of the candidates, batch by batch, only rows that were best when their batch ended.
    kept: Vec<Vec<ArrayRef>>,
    kept_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    times: Times,
    deleted: bool,
    /// Place of the values: which kept batch, and which row of it.
    batch: u32,
    row: u32,
}

impl Latest {
    pub fn new(view: &ViewPlan, max_age: MaxAge, rule: Visibility, index: &SpineIndex) -> Latest {
        let (best, kept) = (vec![None; index.slots()], Vec::new());
        Latest { types: view.row_types(), max_age, rule, best, kept, kept_bytes: 0 }
    }

    pub fn bytes(&self) -> usize {
        self.best.len() * size_of::<Option<Candidate>>() + self.kept_bytes
    }

    pub fn add(&mut self, rows: &ViewRows, index: &SpineIndex) -> Result<(), ArrowError> {
        let batch = self.kept.len() as u32;
        let mut touched: Vec<usize> = Vec::new();
        for row in 0..rows.len() {
            let Some(group) = rows.keys.get(row).and_then(|key| index.group(key)) else { continue };
            let times = rows.times[row];
            let from = times.event_time.max(visible_from(self.rule, &times));
            let slots = index.times(group);
            let first = slots.partition_point(|t| *t < from);
            if first == slots.len() {
                continue;
            }
            let slot = index.range(group).start + first;
            let candidate = Candidate { times, deleted: rows.deleted[row], batch, row: row as u32 };
            let wins = match &self.best[slot] {
                None => true,
                Some(best) => self.order(&candidate, best, Some(rows)) == Ordering::Greater,
            };
            if wins {
                self.best[slot] = Some(candidate);
                touched.push(slot);
            }
        }
        self.keep(rows, batch, touched)
    }

    /// Keeps the values of the rows of this batch that are still best somewhere.
    fn keep(&mut self, rows: &ViewRows, batch: u32, mut touched: Vec<usize>) -> Result<(), ArrowError> {
        touched.sort_unstable();
        touched.dedup();
        let mut picked: Vec<u32> = Vec::with_capacity(touched.len());
        for slot in touched {
            if let Some(candidate) = self.best[slot].as_mut().filter(|candidate| candidate.batch == batch) {
                picked.push(candidate.row);
                candidate.row = picked.len() as u32 - 1;
            }
        }
        let indices = UInt32Array::from(picked);
        let columns: Vec<ArrayRef> =
            rows.columns.iter().map(|column| take(column, &indices, None)).collect::<Result<_, _>>()?;
        self.kept_bytes += columns.iter().map(|column| column.get_array_memory_size()).sum::<usize>();
        self.kept.push(columns);
        Ok(())
    }

    /// Which row is later. Content decides only among rows alike in every time, so it is encoded only then.
    fn order(&self, a: &Candidate, b: &Candidate, current: Option<&ViewRows>) -> Ordering {
        let key = |c: &Candidate| (c.times.event_time, c.times.created_time, c.times.position.sequence);
        key(a).cmp(&key(b)).then_with(|| self.content(a, current).cmp(&self.content(b, current)))
    }

    fn content(&self, candidate: &Candidate, current: Option<&ViewRows>) -> Vec<u8> {
        let columns = match self.kept.get(candidate.batch as usize) {
            Some(columns) => columns.as_slice(),
            None => current.map_or(&[][..], |rows| &rows.columns),
        };
        let mut bytes = vec![u8::from(candidate.deleted)];
        let values: Vec<Value> = columns
            .iter()
            .zip(&self.types)
            .map(|(column, value_type)| Value::from_array(column, candidate.row as usize, value_type))
            .collect();
        encode_row(&values, &mut bytes);
        bytes
    }

    /// The answer for every spine row.
    pub fn finish(self, index: &SpineIndex, spine_rows: usize) -> Result<ViewAnswer, ArrowError> {
        let mut statuses = vec![Status::NotFound; spine_rows];
        let mut event_times: Vec<Option<Micros>> = vec![None; spine_rows];
        // (0, 0) is a null; kept batch b is b + 1.
        let mut places: Vec<(usize, usize)> = vec![(0, 0); spine_rows];
        for group in 0..index.groups() as u32 {
            let mut latest: Option<Candidate> = None;
            for slot in index.range(group) {
                if let Some(candidate) = self.best[slot]
                    && latest.is_none_or(|latest| self.order(&candidate, &latest, None) == Ordering::Greater)
                {
                    latest = Some(candidate);
                }
                let Some(candidate) = latest.filter(|candidate| !candidate.deleted) else { continue };
                let row = index.row(slot);
                let status = self.max_age.judge(candidate.times.event_time, index.time(slot));
                statuses[row] = status;
                if status != Status::NotFound {
                    event_times[row] = Some(candidate.times.event_time);
                }
                if status == Status::Present {
                    places[row] = (candidate.batch as usize + 1, candidate.row as usize);
                }
            }
        }
        let mut values = Vec::with_capacity(self.types.len());
        for (feature, value_type) in self.types.iter().enumerate() {
            let null = new_null_array(&value_type.arrow(), 1);
            let mut arrays: Vec<&dyn Array> = vec![null.as_ref()];
            arrays.extend(self.kept.iter().map(|columns| columns[feature].as_ref()));
            values.push(interleave(&arrays, &places)?);
        }
        Ok(ViewAnswer { values, statuses, event_times })
    }
}

/// As-of answers by asking the reference for every spine row: for readers whose rows each see another prefix of the log.
pub struct LatestByRow {
    types: Vec<Type>,
    max_age: MaxAge,
    rule: Visibility,
    rows: Vec<Vec<Row>>,
    count: usize,
}

impl LatestByRow {
    pub fn new(view: &ViewPlan, max_age: MaxAge, rule: Visibility, index: &SpineIndex) -> LatestByRow {
        LatestByRow { types: view.row_types(), max_age, rule, rows: vec![Vec::new(); index.groups()], count: 0 }
    }

    pub fn bytes(&self) -> usize {
        self.count * (size_of::<Row>() + self.types.len() * size_of::<Value>())
    }

    pub fn add(&mut self, rows: &ViewRows, index: &SpineIndex) {
        for row in 0..rows.len() {
            if let Some(group) = rows.keys.get(row).and_then(|key| index.group(key)) {
                let values = rows.values(row, &self.types);
                self.rows[group as usize].push(Row { times: rows.times[row], deleted: rows.deleted[row], values });
                self.count += 1;
            }
        }
    }

    pub fn finish(self, index: &SpineIndex, spine_rows: usize, applied: Option<&[Position]>) -> ViewAnswer {
        let mut statuses = vec![Status::NotFound; spine_rows];
        let mut event_times: Vec<Option<Micros>> = vec![None; spine_rows];
        let mut found: Vec<Vec<Value>> = vec![vec![Value::Null; spine_rows]; self.types.len()];
        for group in 0..index.groups() as u32 {
            for slot in index.range(group) {
                let row = index.row(slot);
                let visibility = reader(self.rule, applied.map(|applied| applied[row]));
                let answer = as_of(&self.rows[group as usize], index.time(slot), self.max_age, visibility);
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
