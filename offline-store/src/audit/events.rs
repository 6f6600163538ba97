//! The events behind a sample of rows: what each of their entities had, read once from the sources.
//!
//! Reasons and causes ask the reference over plain slices. Kept is only what a question about these rows can need: what lies
//! in their windows, and the rows before their times, each moved by as much as a wrong clock may be wrong.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Int64Type, UInt64Type};
use feature_defs::as_of::{Row, Times};
use feature_defs::plan::{RowsError, ServicePlan, ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value};
use feature_defs::window::{DAY, HOUR, WindowEvent};
use futures::StreamExt;

use super::AuditError;
use crate::engine::Engine;
use crate::history::{POSITION_TIME, SEQUENCE};
use crate::point_in_time::index::{NO_GROUP, SpineIndex};

/// How far a clock that is thought to be wrong may be: the zones of the earth go from -12 to +14 hours.
pub const CLOCK_MAX: Micros = 14 * HOUR;
/// Rows kept of an as-of view before the time of each row that is asked about.
const BEFORE_MAX: usize = 64;
/// Rows of the sources of one input that are held; beyond it the newest are not looked at.
const HELD_MAX: usize = 400_000;

/// The events of one input, by entity.
#[derive(Debug, Default)]
pub struct InputEvents {
    /// Of as-of views, in the order of lookups.
    pub rows: Vec<Vec<Row>>,
    /// Of windowed views, by event time.
    pub windows: Vec<Vec<WindowEvent>>,
    /// The source's rows that they are made of.
    batches: Vec<Batch>,
    /// More than could be held.
    pub is_cut: bool,
}

#[derive(Debug)]
struct Batch {
    rows: RecordBatch,
    times: Vec<Option<Times>>,
    groups: Vec<u32>,
}

/// The rows of a view by entity: those of an as-of view, or the events of a windowed one.
pub type Made = (Vec<Vec<Row>>, Vec<Vec<WindowEvent>>);

/// Makes other rows of a source's; None leaves them as they are.
pub type Change<'c> = &'c dyn Fn(&RecordBatch) -> Option<RecordBatch>;

/// The events of all inputs of a service for some rows.
#[derive(Debug)]
pub struct Events {
    pub inputs: Vec<InputEvents>,
    /// For each input and row its entity; [`NO_GROUP`] where a key is null.
    pub groups: Vec<Vec<u32>>,
}

impl Events {
    /// Reads every source once. `given` are the columns of the service, `at` the time of each row.
    pub async fn read(
        engine: &Engine,
        service: &ServicePlan,
        given: &[ArrayRef],
        at: &[Micros],
    ) -> Result<Events, AuditError> {
        let mut indexes = Vec::with_capacity(service.inputs.len());
        let mut groups = Vec::with_capacity(service.inputs.len());
        for input in &service.inputs {
            let keys: Vec<(ArrayRef, &Type)> =
                input.keys.iter().map(|key| (given[*key].clone(), &service.columns[*key].column_type)).collect();
            let index = SpineIndex::new(&keys, at);
            let mut of_rows = Vec::new();
            index.groups_of(&keys, at.len(), &mut of_rows);
            groups.push(of_rows);
            indexes.push(index);
        }
        let mut inputs: Vec<InputEvents> = service.inputs.iter().map(|_| InputEvents::default()).collect();
        for (first, input) in service.inputs.iter().enumerate() {
            let source = &input.view.source;
            let of_source: Vec<usize> =
                (0..inputs.len()).filter(|i| Arc::ptr_eq(&service.inputs[*i].view.source, source)).collect();
            if of_source[0] != first {
                continue;
            }
            let mut columns: Vec<String> = Vec::new();
            for other in &of_source {
                for column in service.inputs[*other].view.source_columns() {
                    if !columns.contains(&column) {
                        columns.push(column);
                    }
                }
            }
            let mut batches = engine.entity_rows(&input.view, &columns, None).await?;
            while let Some(batch) = batches.next().await {
                let batch = batch?;
                let positions = positions(source.is_stream(), &batch, &source.name)?;
                let aligned = source.align(&batch, Some(&columns))?;
                let times = source.times(&aligned, positions.as_deref())?;
                for other in &of_source {
                    inputs[*other].hold(&service.inputs[*other].view, &indexes[*other], &aligned, &times)?;
                }
            }
        }
        for (input, (events, index)) in service.inputs.iter().zip(inputs.iter_mut().zip(&indexes)) {
            let (rows, windows) = events.made(&input.view, index.groups(), None)?;
            (events.rows, events.windows) = (rows, windows);
            events.prune(index);
        }
        Ok(Events { inputs, groups })
    }
}

fn positions(is_stream: bool, batch: &RecordBatch, source: &str) -> Result<Option<Vec<Position>>, AuditError> {
    if !is_stream {
        return Ok(None);
    }
    let damaged = || AuditError::History {
        source_name: source.to_owned(),
        what: format!("it has no columns `{POSITION_TIME}` and `{SEQUENCE}`"),
    };
    let times = batch.column_by_name(POSITION_TIME).and_then(|c| c.as_primitive_opt::<Int64Type>());
    let sequences = batch.column_by_name(SEQUENCE).and_then(|c| c.as_primitive_opt::<UInt64Type>());
    let (times, sequences) = (times.ok_or_else(damaged)?, sequences.ok_or_else(damaged)?);
    let both = times.values().iter().zip(sequences.values());
    Ok(Some(both.map(|(time, sequence)| Position { time: *time, sequence: *sequence }).collect()))
}

impl InputEvents {
    pub fn groups(&self) -> usize {
        self.rows.len()
    }

    /// Rows of the source that are held.
    pub fn held(&self) -> usize {
        self.batches.iter().map(|batch| batch.groups.len()).sum()
    }

    /// Keeps the rows of a batch that belong to an entity that is asked about, and could matter to it.
    fn hold(
        &mut self,
        view: &ViewPlan,
        index: &SpineIndex,
        aligned: &RecordBatch,
        times: &[Option<Times>],
    ) -> Result<(), AuditError> {
        let mut groups = Vec::new();
        index.groups_of(&view.key_columns(aligned)?, aligned.num_rows(), &mut groups);
        let reach = match &view.kind {
            // Rows of static sources happened before all others.
            ViewPlanKind::AsOf { .. } => None,
            ViewPlanKind::Windowed { windows, .. } => windows
                .iter()
                .map(|window| window.length.saturating_add(window.hop.unwrap_or(0).saturating_mul(2)))
                .max()
                .map(|longest| longest.saturating_add(CLOCK_MAX + DAY)),
        };
        let wanted = |row: usize| {
            let (group, Some(times)) = (groups[row], times[row]) else { return false };
            if group == NO_GROUP {
                return false;
            }
            let asked = index.times(group);
            let (first, last) = (asked.first().copied().unwrap_or(0), asked.last().copied().unwrap_or(0));
            let is_late_enough = reach.is_none_or(|reach| times.event_time >= first.saturating_sub(reach));
            is_late_enough && times.event_time <= last.saturating_add(CLOCK_MAX)
        };
        let mask: BooleanArray = (0..aligned.num_rows()).map(|row| Some(wanted(row))).collect();
        if mask.true_count() == 0 {
            return Ok(());
        }
        if self.held() + mask.true_count() > HELD_MAX {
            self.is_cut = true;
            return Ok(());
        }
        let kept = |row: &usize| mask.value(*row);
        let rows = if aligned.num_columns() == 0 {
            let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(mask.true_count()));
            RecordBatch::try_new_with_options(aligned.schema(), Vec::new(), &options)?
        } else {
            filter_record_batch(aligned, &mask)?
        };
        let places: Vec<usize> = (0..aligned.num_rows()).filter(kept).collect();
        self.batches.push(Batch {
            rows,
            times: places.iter().map(|row| times[*row]).collect(),
            groups: places.iter().map(|row| groups[*row]).collect(),
        });
        Ok(())
    }

    /// The view's rows by entity; `changed` makes other rows of the source's first.
    pub fn made(&self, view: &ViewPlan, groups: usize, changed: Option<Change<'_>>) -> Result<Made, RowsError> {
        let mut rows: Vec<Vec<Row>> = vec![Vec::new(); groups];
        let mut windows: Vec<Vec<WindowEvent>> = vec![Vec::new(); groups];
        let types = view.row_types();
        for batch in &self.batches {
            let changed = changed.and_then(|change| change(&batch.rows));
            let made = view.rows(changed.as_ref().unwrap_or(&batch.rows), &batch.times)?;
            for i in 0..made.len() {
                let group = batch.groups[made.source_rows[i] as usize] as usize;
                let (times, values): (Times, Vec<Value>) = (made.times[i], made.values(i, &types));
                if view.is_windowed() {
                    windows[group].push(WindowEvent { times, inputs: values });
                } else {
                    rows[group].push(Row { times, deleted: made.deleted[i], values });
                }
            }
        }
        rows.iter_mut().for_each(|rows| rows.sort_by(Row::order));
        windows.iter_mut().for_each(|events| events.sort_by_key(|event| event.times.event_time));
        Ok((rows, windows))
    }

    /// Lets go of rows too old to be the answer to anything that will be asked.
    fn prune(&mut self, index: &SpineIndex) {
        for (group, rows) in self.rows.iter_mut().enumerate() {
            let mut wanted = vec![false; rows.len()];
            for t in index.times(group as u32) {
                let first = rows.partition_point(|row| row.times.event_time <= t.saturating_sub(CLOCK_MAX));
                let end = rows.partition_point(|row| row.times.event_time <= t.saturating_add(CLOCK_MAX));
                wanted[first.saturating_sub(BEFORE_MAX)..end].fill(true);
            }
            let mut wanted = wanted.into_iter();
            rows.retain(|_| wanted.next().unwrap_or(false));
        }
    }
}
