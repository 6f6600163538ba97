//! Windowed views: events are dealt into parts by entity while their source is read, and each part is then sorted and
//! worked on by itself ([`kernel`]), small enough for a core's cache.
//!
//! An event is kept only where some window of its entity holds it. Parts are ranges of groups, so that what comes out of
//! them is in the order of slots; memory that does not suffice for all events is met by writing parts to disk.

pub mod events;
pub mod kernel;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{Array, ArrayRef, UInt32Array};
use arrow::compute::{concat, take};
use datafusion::error::Result;
use datafusion::execution::memory_pool::MemoryReservation;
use feature_defs::aggregate::Aggregate;
use feature_defs::as_of::Times;
use feature_defs::expression::Expression;
use feature_defs::plan::{ViewAggregate, ViewAnswer, ViewPlan, ViewPlanKind, WindowOutput};
use feature_defs::time::{Micros, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::Window;

use super::index::{NO_GROUP, SpineIndex};
use super::scan::in_parallel;
use super::spill::Spill;
use events::Events;

/// Events of one part, about: as many as fit a core's cache while they are sorted.
const PART_EVENTS: usize = if cfg!(test) { 16 } else { 16 << 10 };
const PARTS_MAX: usize = 2_048;
/// Slots of one entity that are worked on at a time, so that one hot entity is shared by all threads.
const TASK_SLOTS: usize = if cfg!(test) { 8 } else { 32 << 10 };

/// What is taken from the memory bound at a time.
const ACCOUNT_BYTES: usize = if cfg!(test) { 256 } else { 8 << 20 };

/// A windowed view, as the engine computes it.
#[derive(Debug, Clone, Default)]
pub struct WindowsPlan<'p> {
    aggregates: &'p [ViewAggregate],
    outputs: &'p [WindowOutput],
    windows: &'p [Window],
    /// For each aggregate the column of events that it reads: aggregates of the same expression share one.
    columns: Arc<[usize]>,
    kinds: Arc<[Kind]>,
    /// Whether some aggregate looks at more of an event's times than its event time.
    ordered: bool,
}

/// How a column of inputs is kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// Every event counts.
    Rows,
    /// Only whether there is a value.
    Flags,
    Float(Type),
    Integer(Type),
    Values(Type),
}

impl<'p> WindowsPlan<'p> {
    pub fn of(view: &'p ViewPlan) -> Option<WindowsPlan<'p>> {
        let ViewPlanKind::Windowed { aggregates, outputs, windows, .. } = &view.kind else { return None };
        let text = |aggregate: &ViewAggregate| {
            let text = |expression: &Option<Expression>| expression.as_ref().map(Expression::canonical_text);
            // With `by`, the input is dealt into the buckets of that very aggregate.
            let own = aggregate.by.is_some().then(|| aggregate.name.clone());
            (text(&aggregate.of), text(&aggregate.filter), own)
        };
        let mut texts = Vec::new();
        let mut kinds: Vec<Kind> = Vec::new();
        let mut columns = Vec::with_capacity(aggregates.len());
        for (aggregate, input) in aggregates.iter().zip(view.row_types()) {
            let kind = kernel::kind_of(aggregate, &input);
            let text = text(aggregate);
            match texts.iter().position(|other| *other == text) {
                Some(column) => {
                    // What says more serves who needs less.
                    if matches!(kinds[column], Kind::Flags) {
                        kinds[column] = kind;
                    }
                    columns.push(column);
                }
                None => {
                    columns.push(texts.len());
                    texts.push(text);
                    kinds.push(kind);
                }
            }
        }
        let ordered = aggregates.iter().any(|aggregate| aggregate.aggregate.is_ordered());
        Some(WindowsPlan { aggregates, outputs, windows, columns: columns.into(), kinds: kinds.into(), ordered })
    }

    fn aggregate(&self, output: &WindowOutput) -> &'p Aggregate {
        &self.aggregates[output.aggregate].aggregate
    }
}

/// Events of one windowed view, while its source is read by one worker.
pub struct Windows<'p> {
    plan: WindowsPlan<'p>,
    parts: Vec<Events>,
    /// Slots of the index, to find a group's part.
    slots: usize,
    accounted: usize,
    /// Of each group: the start of its first slot's longest window, and the time of its last slot.
    spans: Vec<(Micros, Micros)>,
}

impl<'p> Windows<'p> {
    pub fn new(plan: WindowsPlan<'p>, index: &SpineIndex, source_rows: usize) -> Windows<'p> {
        let parts = (source_rows / PART_EVENTS).clamp(1, PARTS_MAX).min(index.slots().max(1));
        let parts = (0..parts).map(|_| Events::new(&plan.kinds, plan.ordered)).collect();
        let span = |group: u32| {
            let times = index.times(group);
            let earliest = plan.windows.iter().map(|window| window.start(times[0])).min().unwrap_or(times[0]);
            (earliest, times[times.len() - 1])
        };
        let spans = (0..index.groups() as u32).map(span).collect();
        Windows { plan, parts, slots: index.slots(), accounted: 0, spans }
    }

    fn part_of(&self, first_slot: usize) -> usize {
        first_slot * self.parts.len() / self.slots.max(1)
    }

    pub fn add(
        &mut self,
        index: &SpineIndex,
        groups: &[u32],
        event_times: &[Micros],
        from: Option<&[Micros]>,
        times: &dyn Fn(usize) -> Times,
        values: &[ArrayRef],
    ) {
        let mut picked: Vec<u32> = Vec::with_capacity(groups.len());
        let mut parts: Vec<u32> = Vec::with_capacity(groups.len());
        for (row, group) in groups.iter().enumerate() {
            if *group == NO_GROUP {
                continue;
            }
            // Whether some window of the entity can hold the event; to look for the slot itself would wait for memory.
            let event_time = event_times[row];
            let (earliest, last) = self.spans[*group as usize];
            if event_time < earliest || event_time > last || from.is_some_and(|from| from[row] > last) {
                continue;
            }
            picked.push(row as u32);
            parts.push(self.part_of(index.range(*group).start) as u32);
        }
        let inputs: Vec<Option<&ArrayRef>> = (0..self.plan.kinds.len())
            .map(|column| self.plan.columns.iter().position(|c| *c == column).map(|aggregate| &values[aggregate]))
            .collect();
        for part in &parts {
            let part = &mut self.parts[*part as usize];
            part.batch_start = part.groups.len();
        }
        for (row, part) in picked.iter().zip(&parts) {
            let row = *row as usize;
            let part = &mut self.parts[*part as usize];
            part.groups.push(groups[row]);
            part.event_times.push(event_times[row]);
            if let Some(from) = from {
                part.from.push(from[row]);
            }
            if self.plan.ordered {
                part.times.push(times(row));
            }
        }
        for (column, input) in inputs.into_iter().enumerate() {
            if let Some(input) = input {
                events::push(&mut self.parts, column, input, &picked, &parts);
            }
        }
    }

    /// Tells the memory bound what has been collected since; what does not fit goes to disk.
    pub fn account(&mut self, memory: &MemoryReservation, spill: &Spill) -> Result<()> {
        // Looking at thousands of parts after every batch would cost more than it tells.
        let now: usize = self.parts.iter().map(Events::bytes).sum();
        if now > self.accounted {
            let more = (now - self.accounted).max(ACCOUNT_BYTES);
            if let Err(full) = memory.try_grow(more) {
                if self.parts.iter().all(|part| part.groups.is_empty()) {
                    return Err(full);
                }
                for part in &mut self.parts {
                    part.spill(spill)?;
                }
                memory.shrink(self.accounted);
                self.accounted = self.parts.iter().map(Events::bytes).sum();
                memory.try_grow(self.accounted)?;
                return Ok(());
            }
            self.accounted += more;
        }
        Ok(())
    }

    pub fn merge(&mut self, other: Windows<'p>) {
        for (part, other) in self.parts.iter_mut().zip(other.parts) {
            part.append(other);
        }
        self.accounted += other.accounted;
    }

    /// The answer for every spine row.
    pub fn finish(
        self,
        index: &SpineIndex,
        spine_rows: usize,
        threads: usize,
        stop: &AtomicBool,
    ) -> Result<ViewAnswer> {
        let plan = self.plan.clone();
        // The groups of each part, found as their events were.
        let count = self.parts.len();
        let mut bounds: Vec<u32> = vec![0; count + 1];
        for group in 0..index.groups() as u32 {
            bounds[self.part_of(index.range(group).start) + 1] = group + 1;
        }
        for part in 1..bounds.len() {
            bounds[part] = bounds[part].max(bounds[part - 1]);
        }
        // The largest parts first, so that no thread ends with one of them alone.
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_unstable_by_key(|part| std::cmp::Reverse(self.parts[*part].count()));
        let parts: Vec<std::sync::Mutex<Option<Events>>> =
            self.parts.into_iter().map(|part| std::sync::Mutex::new(Some(part))).collect();
        let sorted = in_parallel(threads, stop, count, |at| {
            let part = order[at];
            let taken = parts[part].lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            let events = taken.unwrap_or_else(|| Events::new(&plan.kinds, plan.ordered));
            let groups = bounds[part]..bounds[part + 1];
            let big = groups.clone().any(|group| index.range(group).len() > TASK_SLOTS);
            let sorted = events.sorted(groups.clone())?;
            if big {
                return Ok((part, Some(sorted), Vec::new()));
            }
            let slots = slots_of(index, &groups);
            let columns = kernel::run(&plan, index, &sorted, groups, slots);
            Ok((part, None, vec![columns]))
        })?;
        let mut results: Vec<Vec<Vec<ArrayRef>>> = (0..count).map(|_| Vec::new()).collect();
        for (part, whole, columns) in sorted {
            let Some(events) = whole else {
                results[part] = columns;
                continue;
            };
            // One entity alone has more slots than a task takes: all threads work on this part together.
            let groups = bounds[part]..bounds[part + 1];
            let slots = slots_of(index, &groups);
            let starts: Vec<usize> = slots.clone().step_by(TASK_SLOTS).collect();
            results[part] = in_parallel(threads, stop, starts.len(), |task| {
                let end = (starts[task] + TASK_SLOTS).min(slots.end);
                Ok(kernel::run(&plan, index, &events, groups.clone(), starts[task]..end))
            })?;
        }

        // Slot order back to the spine's; a row of no group still has an empty window.
        let slots = index.slots();
        let mut places: Vec<u32> = vec![slots as u32; spine_rows];
        for slot in 0..slots {
            places[index.row(slot)] = slot as u32;
        }
        let places = UInt32Array::from(places);
        let values = in_parallel(threads, stop, plan.outputs.len(), |output| {
            let aggregate = plan.aggregate(&plan.outputs[output]);
            let empty = Value::to_array([&aggregate.finish(&aggregate.zero())], &plan.outputs[output].feature_type);
            let mut arrays: Vec<&dyn Array> =
                results.iter().flatten().map(|columns| columns[output].as_ref()).collect();
            arrays.push(empty.as_ref());
            Ok(take(&concat(&arrays)?, &places, None)?)
        })?;
        Ok(ViewAnswer { values, statuses: vec![Status::Present; spine_rows], event_times: vec![None; spine_rows] })
    }
}

fn slots_of(index: &SpineIndex, groups: &std::ops::Range<u32>) -> std::ops::Range<usize> {
    if groups.is_empty() { 0..0 } else { index.range(groups.start).start..index.range(groups.end - 1).end }
}
