//! Windowed views by spine scatter.
//!
//! An event is inside the window at a contiguous range of its entity's slots: from the first slot that is past it (and at
//! which it may be seen) to the first whose tail has passed it. So no event is looked at twice per window, whatever the
//! number of spine rows. Where the state can be taken back, an event is added at the first slot and taken back at the
//! last, and a running state passes over the slots; where adding twice changes nothing, a segment tree over the slots
//! takes the range in logarithmically many nodes. Both are exact, because states never round.

use std::ops::Range;

use feature_defs::aggregate::{Aggregate, State};
use feature_defs::as_of::Times;
use feature_defs::catalog::{Head, Visibility};
use feature_defs::plan::{ViewAggregate, ViewAnswer, ViewRows, WindowOutput};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{Window, WindowEvent, window_value};

use super::index::SpineIndex;
use super::{reader, visible_from};

/// Events of one windowed view, while its source is read.
pub struct Windows<'p> {
    aggregates: &'p [ViewAggregate],
    outputs: &'p [WindowOutput],
    windows: &'p [Window],
    input_types: Vec<Type>,
    rule: Visibility,
    /// Events by group of the index; only those that some slot's window holds.
    events: Vec<Vec<WindowEvent>>,
    count: usize,
}

impl<'p> Windows<'p> {
    pub fn new(
        aggregates: &'p [ViewAggregate],
        outputs: &'p [WindowOutput],
        windows: &'p [Window],
        input_types: Vec<Type>,
        rule: Visibility,
        index: &SpineIndex,
    ) -> Windows<'p> {
        let events = vec![Vec::new(); index.groups()];
        Windows { aggregates, outputs, windows, input_types, rule, events, count: 0 }
    }

    pub fn bytes(&self) -> usize {
        self.count * (size_of::<WindowEvent>() + self.input_types.len() * size_of::<Value>())
    }

    pub fn add(&mut self, rows: &ViewRows, index: &SpineIndex) {
        for row in 0..rows.len() {
            let Some(group) = rows.keys.get(row).and_then(|key| index.group(key)) else { continue };
            let times = rows.times[row];
            let slots = index.times(group);
            // Nothing is seen before its event time under any rule, so later rules only narrow this range.
            let held = self.windows.iter().any(|window| !range_of(slots, window, &times, Micros::MIN).is_empty());
            if held {
                let inputs = rows.values(row, &self.input_types);
                self.events[group as usize].push(WindowEvent { times, inputs });
                self.count += 1;
            }
        }
    }

    /// The answer for every spine row. `applied` bounds each row to the positions a server had applied for it.
    pub fn finish(self, index: &SpineIndex, spine_rows: usize, applied: Option<&[Position]>) -> ViewAnswer {
        // A row of no group still has an empty window.
        let empty: Vec<Value> = self
            .outputs
            .iter()
            .map(|output| {
                let aggregate = &self.aggregates[output.aggregate].aggregate;
                aggregate.finish(&aggregate.zero())
            })
            .collect();
        let mut columns: Vec<Vec<Value>> = empty.iter().map(|value| vec![value.clone(); spine_rows]).collect();
        for group in 0..index.groups() as u32 {
            let events = &self.events[group as usize];
            if events.is_empty() {
                continue;
            }
            let slots = index.range(group);
            for (output, column) in self.outputs.iter().zip(&mut columns) {
                let aggregate = &self.aggregates[output.aggregate].aggregate;
                let values = match applied {
                    Some(applied) => slots
                        .clone()
                        .map(|slot| {
                            let visibility = reader(self.rule, Some(applied[index.row(slot)]));
                            let t = index.time(slot);
                            window_value(events, output.aggregate, aggregate, &output.window, t, visibility)
                        })
                        .collect(),
                    None => {
                        let ranges: Vec<Range<usize>> = events
                            .iter()
                            .map(|event| {
                                let from = visible_from(self.rule, &event.times);
                                range_of(index.times(group), &output.window, &event.times, from)
                            })
                            .collect();
                        window_values(aggregate, events, output.aggregate, &ranges, slots.len())
                    }
                };
                for (slot, value) in slots.clone().zip(values) {
                    column[index.row(slot)] = value;
                }
            }
        }
        let values =
            columns.iter().zip(self.outputs).map(|(c, output)| Value::to_array(c, &output.feature_type)).collect();
        ViewAnswer { values, statuses: vec![Status::Present; spine_rows], event_times: vec![None; spine_rows] }
    }
}

/// The slots (by place in the group) at which the window holds an event.
fn range_of(slots: &[Micros], window: &Window, times: &Times, visible_from: Micros) -> Range<usize> {
    let event_time = times.event_time;
    let first = slots.partition_point(|t| {
        let past_head = match window.head {
            Head::Exclusive => *t > event_time,
            Head::Inclusive => *t >= event_time,
        };
        !past_head || *t < visible_from
    });
    let last = slots.partition_point(|t| window.start(*t) <= event_time);
    first..last.max(first)
}

/// The value at each slot, from the range of slots at which each event counts.
fn window_values(
    aggregate: &Aggregate,
    events: &[WindowEvent],
    input: usize,
    ranges: &[Range<usize>],
    slots: usize,
) -> Vec<Value> {
    let laws = aggregate.laws();
    if laws.invertible {
        by_difference(aggregate, events, input, ranges, slots)
    } else if laws.idempotent {
        by_ranges(aggregate, events, input, ranges, slots)
    } else {
        let states = (0..slots).map(|slot| {
            let mut state = aggregate.zero();
            for (event, range) in events.iter().zip(ranges) {
                if range.contains(&slot) {
                    aggregate.push(&mut state, &event.inputs[input], &event.times);
                }
            }
            aggregate.finish(&state)
        });
        states.collect()
    }
}

fn by_difference(
    aggregate: &Aggregate,
    events: &[WindowEvent],
    input: usize,
    ranges: &[Range<usize>],
    slots: usize,
) -> Vec<Value> {
    // (slot, event): who comes and who goes, in the order of slots.
    let mut come: Vec<(u32, u32)> = Vec::with_capacity(events.len());
    let mut go: Vec<(u32, u32)> = Vec::with_capacity(events.len());
    for (event, range) in ranges.iter().enumerate() {
        if !range.is_empty() {
            come.push((range.start as u32, event as u32));
            go.push((range.end as u32, event as u32));
        }
    }
    come.sort_unstable();
    go.sort_unstable();
    let (mut coming, mut going) = (come.into_iter().peekable(), go.into_iter().peekable());
    let mut state = aggregate.zero();
    let mut last: Option<Value> = None;
    let mut values = Vec::with_capacity(slots);
    for slot in 0..slots as u32 {
        while let Some((_, event)) = coming.next_if(|(at, _)| *at <= slot) {
            aggregate.push(&mut state, &events[event as usize].inputs[input], &events[event as usize].times);
            last = None;
        }
        while let Some((_, event)) = going.next_if(|(at, _)| *at <= slot) {
            let mut gone = aggregate.zero();
            aggregate.push(&mut gone, &events[event as usize].inputs[input], &events[event as usize].times);
            aggregate.unmerge(&mut state, &gone);
            last = None;
        }
        values.push(last.get_or_insert_with(|| aggregate.finish(&state)).clone());
    }
    values
}

fn by_ranges(
    aggregate: &Aggregate,
    events: &[WindowEvent],
    input: usize,
    ranges: &[Range<usize>],
    slots: usize,
) -> Vec<Value> {
    // A segment tree without its lower levels copied: node i has children 2i and 2i + 1, leaves begin at `slots`.
    let mut nodes: Vec<State> = vec![aggregate.zero(); 2 * slots];
    for (event, range) in events.iter().zip(ranges) {
        let (mut low, mut high) = (range.start + slots, range.end + slots);
        while low < high {
            if low % 2 == 1 {
                aggregate.push(&mut nodes[low], &event.inputs[input], &event.times);
                low += 1;
            }
            if high % 2 == 1 {
                high -= 1;
                aggregate.push(&mut nodes[high], &event.inputs[input], &event.times);
            }
            low /= 2;
            high /= 2;
        }
    }
    for node in 2..2 * slots {
        let (parents, children) = nodes.split_at_mut(node);
        aggregate.merge(&mut children[0], &parents[node / 2]);
    }
    nodes[slots..].iter().map(|state| aggregate.finish(state)).collect()
}
