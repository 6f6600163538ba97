//! From the sorted events of some entities to the value of every window at every slot.
//!
//! A window's events are a contiguous range of the entity's events in order of time, and both ends of the range only move
//! forward from slot to slot. Where a state can be taken back, one state follows the range. Where it cannot, states of the
//! range's older part are prepared from its end, so that any beginning finds one to start from, and its younger part is
//! one state that grows (the two stacks of a queue). Events that became known after a slot at which they would have
//! counted leave that order; those few go into a segment tree over the slots, and meet the rest there.
//!
//! All of it is exact, because states never round, so none of these ways can be told from another by its result.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array};
use feature_defs::aggregate::{Aggregate, FloatTotal, Function, IntegerTotal, State, Total};
use feature_defs::catalog::Head;
use feature_defs::plan::{ViewAggregate, WindowOutput};
use feature_defs::time::Micros;
use feature_defs::value::{Type, Value, canonical_f64};
use feature_defs::window::Window;

use super::events::{Column, Data, SortedEvents, integer};
use super::{Kind, WindowsPlan};
use crate::point_in_time::index::{SpineIndex, first_at_or_after};

/// Events of a range that are looked at one by one rather than through states of blocks.
const BLOCK: usize = 32;

/// How an aggregate's input, of this type, is kept.
pub fn kind_of(aggregate: &ViewAggregate, input: &Type) -> Kind {
    if aggregate.aggregate.split().is_some() {
        return Kind::Values(input.clone());
    }
    match (aggregate.aggregate.function(), input) {
        (Function::Count, _) if aggregate.of.is_none() && aggregate.filter.is_none() => Kind::Rows,
        (Function::Count, _) => Kind::Flags,
        (_, Type::Float32 | Type::Float64) => Kind::Float(input.clone()),
        (_, Type::Int32 | Type::Int64 | Type::Date | Type::Timestamp) => Kind::Integer(input.clone()),
        _ => Kind::Values(input.clone()),
    }
}

/// One column per output, in the order of `slots`, which belong to `groups`.
pub fn run(
    plan: &WindowsPlan<'_>,
    index: &SpineIndex,
    events: &SortedEvents,
    groups: Range<u32>,
    slots: Range<usize>,
) -> Vec<ArrayRef> {
    plan.outputs
        .iter()
        .map(|output| {
            let column = &events.columns[plan.columns[output.aggregate]];
            let kind = &events.kinds[plan.columns[output.aggregate]];
            let aggregate = &plan.aggregates[output.aggregate].aggregate;
            let task = Task { index, events, groups: groups.clone(), slots: slots.clone(), window: output.window };
            let plain = Plain { aggregate, column, kind, events };
            if aggregate.split().is_some() {
                let values = task.any(&plain);
                return Value::to_array(&values, &output.feature_type);
            }
            match (aggregate.function(), &column.data) {
                (Function::Count, _) => task.count(column),
                (Function::Sum | Function::Mean, Data::Float(values)) => task.float_sum(aggregate, column, values),
                (Function::Sum | Function::Mean, Data::Integer(values)) => {
                    task.integer_sum(aggregate, output, column, values)
                }
                (Function::Min | Function::Max, Data::Float(values)) => {
                    let key = |event: usize| ordered(values[event]);
                    let greatest = *aggregate.function() == Function::Max;
                    let found = task.by_blocks(&Extreme { column, key, greatest });
                    match kind {
                        Kind::Float(Type::Float32) => {
                            let values: Vec<Value> = found
                                .into_iter()
                                .map(|key| key.map_or(Value::Null, |key| Value::Float32(unordered(key) as f32)))
                                .collect();
                            Value::to_array(&values, &output.feature_type)
                        }
                        _ => Arc::new(found.into_iter().map(|key| key.map(unordered)).collect::<Float64Array>()),
                    }
                }
                (Function::Min | Function::Max, Data::Integer(values)) => {
                    let key = |event: usize| values[event];
                    let greatest = *aggregate.function() == Function::Max;
                    let found = task.by_blocks(&Extreme { column, key, greatest });
                    match kind {
                        Kind::Integer(value_type) if *value_type != Type::Int64 => {
                            let values: Vec<Value> = found
                                .into_iter()
                                .map(|key| key.map_or(Value::Null, |key| integer(key, value_type)))
                                .collect();
                            Value::to_array(&values, &output.feature_type)
                        }
                        _ => Arc::new(found.into_iter().collect::<Int64Array>()),
                    }
                }
                _ => {
                    let values = task.any(&plain);
                    Value::to_array(&values, &output.feature_type)
                }
            }
        })
        .collect()
}

/// A float64 as an integer of the same order; canonical floats only. NaN is the greatest.
#[inline]
fn ordered(x: f64) -> i64 {
    let bits = canonical_f64(x).to_bits() as i64;
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

#[inline]
fn unordered(key: i64) -> f64 {
    f64::from_bits((key ^ (((key >> 63) as u64) >> 1) as i64) as u64)
}

/// An aggregate over the events of a part, by number.
trait Cell {
    type State: Clone;
    type Value;
    fn zero(&self) -> Self::State;
    fn push(&self, state: &mut Self::State, event: usize);
    /// Takes back what was pushed; only where the state can.
    fn pull(&self, state: &mut Self::State, event: usize);
    fn merge(&self, into: &mut Self::State, other: &Self::State);
    fn finish(&self, state: &Self::State) -> Self::Value;
}

/// One output over some slots.
struct Task<'a> {
    index: &'a SpineIndex,
    events: &'a SortedEvents,
    groups: Range<u32>,
    slots: Range<usize>,
    window: Window,
}

/// The slots of one entity that a task works on, and its events.
struct Stretch<'a> {
    times: &'a [Micros],
    events: Range<usize>,
}

impl Task<'_> {
    fn stretches(&self) -> impl Iterator<Item = Stretch<'_>> {
        self.groups.clone().filter_map(|group| {
            let slots = self.index.range(group);
            let (start, end) = (slots.start.max(self.slots.start), slots.end.min(self.slots.end));
            if start >= end {
                return None;
            }
            let times = &self.index.times(group)[start - slots.start..end - slots.start];
            Some(Stretch { times, events: self.events.range(group) })
        })
    }

    /// The first event time that the window at t does not hold any more.
    fn head(&self, t: Micros) -> Micros {
        match self.window.head {
            Head::Exclusive => t,
            Head::Inclusive => t.saturating_add(1),
        }
    }

    /// Events that become known only after slots at which they would have counted, each with the slots (by number within
    /// the stretch) at which it counts.
    fn late(&self, stretch: &Stretch<'_>) -> Vec<(usize, Range<usize>)> {
        if self.events.from.is_empty() {
            return Vec::new();
        }
        let mut late = Vec::new();
        for event in stretch.events.clone() {
            let (event_time, from) = (self.events.event_times[event], self.events.from[event]);
            if from <= event_time {
                continue;
            }
            let past_head = match self.window.head {
                Head::Exclusive => event_time.saturating_add(1),
                Head::Inclusive => event_time,
            };
            let in_order = first_at_or_after(stretch.times, past_head);
            let first = first_at_or_after(stretch.times, from.max(past_head));
            if in_order < first {
                let last = stretch.times.partition_point(|t| self.window.start(*t) <= event_time);
                late.push((event, first..last.max(first)));
            }
        }
        late
    }

    fn any(&self, cell: &Plain<'_>) -> Vec<Value> {
        if cell.aggregate.laws().invertible { self.by_difference(cell) } else { self.by_blocks(cell) }
    }

    fn count(&self, column: &Column) -> ArrayRef {
        let cell = Count { column };
        Arc::new(Int64Array::from(self.by_difference(&cell)))
    }

    fn float_sum(&self, aggregate: &Aggregate, column: &Column, values: &[f64]) -> ArrayRef {
        let cell = FloatSum { aggregate, column, values };
        Arc::new(self.by_difference(&cell).into_iter().collect::<Float64Array>())
    }

    fn integer_sum(&self, aggregate: &Aggregate, output: &WindowOutput, column: &Column, values: &[i64]) -> ArrayRef {
        let found = self.by_difference(&IntegerSum { aggregate, column, values });
        Value::to_array(&found, &output.feature_type)
    }

    /// One state that follows the window: what comes is pushed, what goes is taken back.
    fn by_difference<C: Cell>(&self, cell: &C) -> Vec<C::Value> {
        let mut values = Vec::with_capacity(self.slots.len());
        let event_times = &self.events.event_times;
        for stretch in self.stretches() {
            let late = self.late(&stretch);
            let is_late = flags(&stretch.events, &late);
            let in_order = |event: &usize| is_late.is_empty() || !is_late[*event - stretch.events.start];
            let tree = Tree::of(cell, &late, stretch.times.len());
            let (mut low, mut high) = (stretch.events.start, stretch.events.start);
            let mut state = cell.zero();
            let mut held = 0usize;
            for (slot, t) in stretch.times.iter().enumerate() {
                let (start, head) = (self.window.start(*t), self.head(*t));
                let before = high;
                while high < stretch.events.end && event_times[high] < head {
                    high += 1;
                }
                let gone = low;
                while low < high && event_times[low] < start {
                    low += 1;
                }
                if low >= before {
                    // Nothing of the last window is in this one.
                    if held > 0 {
                        state = cell.zero();
                    }
                    held = 0;
                } else {
                    for event in (gone..low).filter(in_order) {
                        cell.pull(&mut state, event);
                        held -= 1;
                    }
                }
                for event in (before.max(low)..high).filter(in_order) {
                    cell.push(&mut state, event);
                    held += 1;
                }
                values.push(match &tree {
                    None => cell.finish(&state),
                    Some(tree) => {
                        let mut whole = state.clone();
                        tree.merge_into(cell, slot, &mut whole);
                        cell.finish(&whole)
                    }
                });
            }
        }
        values
    }

    /// For states that cannot be taken back.
    fn by_blocks<C: Cell>(&self, cell: &C) -> Vec<C::Value> {
        let mut values = Vec::with_capacity(self.slots.len());
        let event_times = &self.events.event_times;
        for stretch in self.stretches() {
            let late = self.late(&stretch);
            let is_late = flags(&stretch.events, &late);
            let in_order = |event: &usize| is_late.is_empty() || !is_late[*event - stretch.events.start];
            let tree = Tree::of(cell, &late, stretch.times.len());
            let (mut low, mut high) = (stretch.events.start, stretch.events.start);
            // Of events low..middle: suffixes[i] holds middle - (i + 1) * BLOCK .. middle. Of middle..high: back.
            let mut middle = low;
            let mut suffixes: Vec<C::State> = Vec::new();
            let mut back = cell.zero();
            let mut prepared = false;
            for (slot, t) in stretch.times.iter().enumerate() {
                let (start, head) = (self.window.start(*t), self.head(*t));
                let before = high;
                while high < stretch.events.end && event_times[high] < head {
                    high += 1;
                }
                while low < high && event_times[low] < start {
                    low += 1;
                }
                let mut state = cell.zero();
                if high - low <= 2 * BLOCK {
                    for event in (low..high).filter(in_order) {
                        cell.push(&mut state, event);
                    }
                    prepared = false;
                } else {
                    if prepared && low <= middle {
                        for event in (before..high).filter(in_order) {
                            cell.push(&mut back, event);
                        }
                    } else {
                        // The older part is used up, or there was none: what is here becomes it.
                        prepared = true;
                        middle = high;
                        suffixes.clear();
                        let mut suffix = cell.zero();
                        let mut end = middle;
                        while end >= low + BLOCK {
                            for event in (end - BLOCK..end).filter(in_order) {
                                cell.push(&mut suffix, event);
                            }
                            suffixes.push(suffix.clone());
                            end -= BLOCK;
                        }
                        back = cell.zero();
                    }
                    let whole_blocks = (middle - low) / BLOCK;
                    for event in (low..middle - whole_blocks * BLOCK).filter(in_order) {
                        cell.push(&mut state, event);
                    }
                    if whole_blocks > 0 {
                        cell.merge(&mut state, &suffixes[whole_blocks - 1]);
                    }
                    cell.merge(&mut state, &back);
                }
                if let Some(tree) = &tree {
                    tree.merge_into(cell, slot, &mut state);
                }
                values.push(cell.finish(&state));
            }
        }
        values
    }
}

/// Which events of a stretch are late; empty where none is.
fn flags(events: &Range<usize>, late: &[(usize, Range<usize>)]) -> Vec<bool> {
    if late.is_empty() {
        return Vec::new();
    }
    let mut flags = vec![false; events.len()];
    late.iter().for_each(|(event, _)| flags[event - events.start] = true);
    flags
}

/// States over ranges of slots: an event is in the few nodes that cover its range, and a slot's state is that of the nodes
/// above it. Node i has children 2i and 2i + 1; leaves begin at `slots`.
struct Tree<S> {
    nodes: Vec<Option<S>>,
    slots: usize,
}

impl<S: Clone> Tree<S> {
    fn of<C: Cell<State = S>>(cell: &C, late: &[(usize, Range<usize>)], slots: usize) -> Option<Tree<S>> {
        if late.iter().all(|(_, range)| range.is_empty()) {
            return None;
        }
        let mut nodes: Vec<Option<S>> = vec![None; 2 * slots];
        let mut push = |node: usize, event: usize| {
            cell.push(nodes[node].get_or_insert_with(|| cell.zero()), event);
        };
        for (event, range) in late {
            let (mut low, mut high) = (range.start + slots, range.end + slots);
            while low < high {
                if low % 2 == 1 {
                    push(low, *event);
                    low += 1;
                }
                if high % 2 == 1 {
                    high -= 1;
                    push(high, *event);
                }
                low /= 2;
                high /= 2;
            }
        }
        Some(Tree { nodes, slots })
    }

    fn merge_into<C: Cell<State = S>>(&self, cell: &C, slot: usize, state: &mut S) {
        let mut node = slot + self.slots;
        while node > 0 {
            if let Some(part) = &self.nodes[node] {
                cell.merge(state, part);
            }
            node /= 2;
        }
    }
}

struct Count<'a> {
    column: &'a Column,
}

impl Cell for Count<'_> {
    type State = i64;
    type Value = i64;

    fn zero(&self) -> i64 {
        0
    }
    #[inline]
    fn push(&self, state: &mut i64, event: usize) {
        *state += i64::from(self.column.is_valid(event));
    }
    #[inline]
    fn pull(&self, state: &mut i64, event: usize) {
        *state -= i64::from(self.column.is_valid(event));
    }
    fn merge(&self, into: &mut i64, other: &i64) {
        *into += other;
    }
    fn finish(&self, state: &i64) -> i64 {
        *state
    }
}

struct FloatSum<'a> {
    aggregate: &'a Aggregate,
    column: &'a Column,
    values: &'a [f64],
}

impl Cell for FloatSum<'_> {
    type State = FloatTotal;
    type Value = Option<f64>;

    fn zero(&self) -> FloatTotal {
        FloatTotal::default()
    }
    #[inline]
    fn push(&self, state: &mut FloatTotal, event: usize) {
        if self.column.is_valid(event) {
            state.push_f64(self.values[event]);
        }
    }
    #[inline]
    fn pull(&self, state: &mut FloatTotal, event: usize) {
        if self.column.is_valid(event) {
            let mut gone = FloatTotal::default();
            gone.push_f64(self.values[event]);
            state.unmerge(&gone);
        }
    }
    fn merge(&self, into: &mut FloatTotal, other: &FloatTotal) {
        into.merge(other);
    }
    fn finish(&self, state: &FloatTotal) -> Option<f64> {
        match self.aggregate.finish(&State::Float(state.clone())) {
            Value::Float64(x) => Some(x),
            _ => None,
        }
    }
}

struct IntegerSum<'a> {
    aggregate: &'a Aggregate,
    column: &'a Column,
    values: &'a [i64],
}

impl Cell for IntegerSum<'_> {
    type State = IntegerTotal;
    type Value = Value;

    fn zero(&self) -> IntegerTotal {
        IntegerTotal::default()
    }
    #[inline]
    fn push(&self, state: &mut IntegerTotal, event: usize) {
        if self.column.is_valid(event) {
            state.push_i64(self.values[event]);
        }
    }
    #[inline]
    fn pull(&self, state: &mut IntegerTotal, event: usize) {
        if self.column.is_valid(event) {
            let mut gone = IntegerTotal::default();
            gone.push_i64(self.values[event]);
            state.unmerge(&gone);
        }
    }
    fn merge(&self, into: &mut IntegerTotal, other: &IntegerTotal) {
        into.merge(other);
    }
    fn finish(&self, state: &IntegerTotal) -> Value {
        self.aggregate.finish(&State::Integer(state.clone()))
    }
}

/// The least or the greatest of keys of one order.
struct Extreme<'a, K> {
    column: &'a Column,
    key: K,
    greatest: bool,
}

impl<K: Fn(usize) -> i64> Cell for Extreme<'_, K> {
    type State = Option<i64>;
    type Value = Option<i64>;

    fn zero(&self) -> Option<i64> {
        None
    }
    #[inline]
    fn push(&self, state: &mut Option<i64>, event: usize) {
        if self.column.is_valid(event) {
            self.merge(state, &Some((self.key)(event)));
        }
    }
    fn pull(&self, _: &mut Option<i64>, _: usize) {
        unreachable!("an extreme cannot be taken back, and nobody asks")
    }
    #[inline]
    fn merge(&self, into: &mut Option<i64>, other: &Option<i64>) {
        if let Some(other) = *other {
            *into = Some(match *into {
                Some(best) if self.greatest => best.max(other),
                Some(best) => best.min(other),
                None => other,
            });
        }
    }
    fn finish(&self, state: &Option<i64>) -> Option<i64> {
        *state
    }
}

/// Any aggregate, value by value.
struct Plain<'a> {
    aggregate: &'a Aggregate,
    column: &'a Column,
    kind: &'a Kind,
    events: &'a SortedEvents,
}

impl Cell for Plain<'_> {
    type State = State;
    type Value = Value;

    fn zero(&self) -> State {
        self.aggregate.zero()
    }
    fn push(&self, state: &mut State, event: usize) {
        let times = self.events.times_of(event);
        self.aggregate.push(state, &self.column.value(event, self.kind), &times);
    }
    fn pull(&self, state: &mut State, event: usize) {
        let mut gone = self.aggregate.zero();
        self.push(&mut gone, event);
        self.aggregate.unmerge(state, &gone);
    }
    fn merge(&self, into: &mut State, other: &State) {
        self.aggregate.merge(into, other);
    }
    fn finish(&self, state: &State) -> Value {
        self.aggregate.finish(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_floats_keep_their_order_and_come_back() {
        let floats = [f64::NEG_INFINITY, -1e300, -1.5, -f64::MIN_POSITIVE, 0.0, 5e-324, 1.0, f64::INFINITY, f64::NAN];
        for pair in floats.windows(2) {
            assert!(ordered(pair[0]) < ordered(pair[1]), "{pair:?}");
        }
        for x in floats {
            assert_eq!(unordered(ordered(x)).to_bits(), canonical_f64(x).to_bits());
        }
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
