//! Events of one part, column by column.

use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{Date32Type, Float32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use datafusion::error::Result;
use feature_defs::as_of::Times;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value};

use super::Kind;
use crate::point_in_time::spill::{Spill, SpillFile};

/// Events of a range of groups, in the order in which they came.
#[derive(Debug)]
pub struct Events {
    pub groups: Vec<u32>,
    pub event_times: Vec<Micros>,
    /// When each may first be seen; empty where that is its event time for all of them.
    pub from: Vec<Micros>,
    /// All times, where some aggregate looks at them; else empty.
    pub times: Vec<Times>,
    pub columns: Vec<Column>,
    /// Events before the batch that is being added.
    pub batch_start: usize,
    kinds: Vec<Kind>,
    ordered: bool,
    spilled: Vec<SpillFile>,
    spilled_rows: usize,
}

/// One input of every event.
#[derive(Debug, Clone)]
pub struct Column {
    pub data: Data,
    /// Which are not null; empty where all are.
    pub valid: Vec<bool>,
}

#[derive(Debug, Clone)]
pub enum Data {
    None,
    Float(Vec<f64>),
    Integer(Vec<i64>),
    Values(Vec<Value>),
}

impl Column {
    fn new(kind: &Kind) -> Column {
        let data = match kind {
            Kind::Rows | Kind::Flags => Data::None,
            Kind::Float(_) => Data::Float(Vec::new()),
            Kind::Integer(_) => Data::Integer(Vec::new()),
            Kind::Values(_) => Data::Values(Vec::new()),
        };
        Column { data, valid: Vec::new() }
    }

    #[inline]
    pub fn is_valid(&self, event: usize) -> bool {
        self.valid.is_empty() || self.valid[event]
    }

    /// The value as the reference sees it.
    pub fn value(&self, event: usize, kind: &Kind) -> Value {
        if !self.is_valid(event) {
            return Value::Null;
        }
        match (&self.data, kind) {
            (Data::None, _) => Value::Bool(true),
            (Data::Float(values), Kind::Float(Type::Float32)) => Value::Float32(values[event] as f32),
            (Data::Float(values), _) => Value::Float64(values[event]),
            (Data::Integer(values), Kind::Integer(value_type)) => integer(values[event], value_type),
            (Data::Integer(values), _) => Value::Int64(values[event]),
            (Data::Values(values), _) => values[event].clone(),
        }
    }

    fn bytes(&self) -> usize {
        self.valid.capacity()
            + match &self.data {
                Data::None => 0,
                Data::Float(values) => values.capacity() * 8,
                Data::Integer(values) => values.capacity() * 8,
                // What strings hold beside is counted roughly: a short text each.
                Data::Values(values) => values.capacity() * (size_of::<Value>() + 24),
            }
    }

    fn append(&mut self, other: Column, before: usize, added: usize) {
        if !other.valid.is_empty() || !self.valid.is_empty() {
            if self.valid.is_empty() {
                self.valid = vec![true; before];
            }
            if other.valid.is_empty() {
                self.valid.resize(before + added, true);
            } else {
                self.valid.extend(other.valid);
            }
        }
        match (&mut self.data, other.data) {
            (Data::Float(values), Data::Float(more)) => values.extend(more),
            (Data::Integer(values), Data::Integer(more)) => values.extend(more),
            (Data::Values(values), Data::Values(more)) => values.extend(more),
            _ => {}
        }
    }

    fn gathered(&self, order: &[(Micros, u32)]) -> Column {
        let at = |event: &(Micros, u32)| event.1 as usize;
        let valid = if self.valid.is_empty() { Vec::new() } else { order.iter().map(|e| self.valid[at(e)]).collect() };
        let data = match &self.data {
            Data::None => Data::None,
            Data::Float(values) => Data::Float(order.iter().map(|event| values[at(event)]).collect()),
            Data::Integer(values) => Data::Integer(order.iter().map(|event| values[at(event)]).collect()),
            Data::Values(values) => Data::Values(order.iter().map(|event| values[at(event)].clone()).collect()),
        };
        Column { data, valid }
    }
}

/// An integer as the value of a type that is kept as one.
pub fn integer(x: i64, value_type: &Type) -> Value {
    match value_type {
        Type::Int32 => Value::Int32(x as i32),
        Type::Date => Value::Date(x as i32),
        Type::Timestamp => Value::Timestamp(x),
        _ => Value::Int64(x),
    }
}

/// Appends a column's picked rows to their parts.
pub fn push(parts: &mut [Events], column: usize, input: &ArrayRef, picked: &[u32], part_of: &[u32]) {
    let nulls = input.nulls().filter(|nulls| nulls.null_count() > 0);
    let kind = parts[0].kinds[column].clone();
    if kind == Kind::Rows {
        return;
    }
    if nulls.is_some() {
        for (row, part) in picked.iter().zip(part_of) {
            let part = &mut parts[*part as usize];
            let flags = &mut part.columns[column].valid;
            if flags.is_empty() {
                flags.resize(part.batch_start, true);
            }
            flags.push(nulls.is_none_or(|nulls| nulls.is_valid(*row as usize)));
        }
    } else {
        // Parts that know of nulls hear that these rows have none.
        for part in part_of {
            let flags = &mut parts[*part as usize].columns[column].valid;
            if !flags.is_empty() {
                flags.push(true);
            }
        }
    }
    macro_rules! data {
        ($variant:ident, $read:expr) => {{
            let read = $read;
            for (row, part) in picked.iter().zip(part_of) {
                if let Data::$variant(values) = &mut parts[*part as usize].columns[column].data {
                    values.push(read(*row as usize));
                }
            }
        }};
    }
    match (&kind, input.data_type()) {
        (Kind::Rows | Kind::Flags, _) => {}
        (Kind::Float(Type::Float32), _) => {
            let values = input.as_primitive::<Float32Type>().values();
            data!(Float, |row: usize| f64::from(values[row]));
        }
        (Kind::Float(_), _) => {
            let values = input.as_primitive::<Float64Type>().values();
            data!(Float, |row: usize| values[row]);
        }
        (Kind::Integer(Type::Int32), _) => {
            let values = input.as_primitive::<Int32Type>().values();
            data!(Integer, |row: usize| i64::from(values[row]));
        }
        (Kind::Integer(Type::Date), _) => {
            let values = input.as_primitive::<Date32Type>().values();
            data!(Integer, |row: usize| i64::from(values[row]));
        }
        (Kind::Integer(Type::Timestamp), _) => {
            let values = input.as_primitive::<TimestampMicrosecondType>().values();
            data!(Integer, |row: usize| values[row]);
        }
        (Kind::Integer(_), _) => {
            let values = input.as_primitive::<Int64Type>().values();
            data!(Integer, |row: usize| values[row]);
        }
        (Kind::Values(value_type), _) => {
            data!(Values, |row: usize| Value::from_array(input, row, value_type));
        }
    }
}

impl Events {
    pub fn new(kinds: &[Kind], ordered: bool) -> Events {
        Events {
            groups: Vec::new(),
            event_times: Vec::new(),
            from: Vec::new(),
            times: Vec::new(),
            columns: kinds.iter().map(Column::new).collect(),
            batch_start: 0,
            kinds: kinds.to_vec(),
            ordered,
            spilled: Vec::new(),
            spilled_rows: 0,
        }
    }

    /// Events here and on disk.
    pub fn count(&self) -> usize {
        self.groups.len() + self.spilled_rows
    }

    pub fn kind(&self, column: usize) -> &Kind {
        &self.kinds[column]
    }

    pub fn bytes(&self) -> usize {
        self.groups.capacity() * 4
            + self.event_times.capacity() * 8
            + self.from.capacity() * 8
            + self.times.capacity() * size_of::<Times>()
            + self.columns.iter().map(Column::bytes).sum::<usize>()
    }

    pub fn append(&mut self, other: Events) {
        let (before, added) = (self.groups.len(), other.groups.len());
        // One worker may have seen late rows, the other none. Who has no events has no opinion.
        if added > 0 && (!self.from.is_empty() || !other.from.is_empty()) {
            if self.from.is_empty() {
                self.from.clone_from(&self.event_times);
            }
            self.from.extend(if other.from.is_empty() { &other.event_times } else { &other.from });
        }
        self.groups.extend(other.groups);
        self.event_times.extend(other.event_times);
        self.times.extend(other.times);
        for (column, more) in self.columns.iter_mut().zip(other.columns) {
            column.append(more, before, added);
        }
        self.spilled.extend(other.spilled);
        self.spilled_rows += other.spilled_rows;
    }

    /// Writes the events to disk and forgets them.
    pub fn spill(&mut self, spill: &Spill) -> Result<()> {
        if self.groups.is_empty() {
            return Ok(());
        }
        let rows = self.groups.len();
        let fresh = Events::new(&self.kinds, self.ordered);
        let spilled = (std::mem::take(&mut self.spilled), self.spilled_rows);
        let events = std::mem::replace(self, fresh);
        (self.spilled, self.spilled_rows) = spilled;
        self.spilled.push(spill.write_events(&events)?);
        self.spilled_rows += rows;
        Ok(())
    }

    /// All events, by group and then by event time.
    pub fn sorted(mut self, groups: Range<u32>) -> Result<SortedEvents> {
        for file in std::mem::take(&mut self.spilled) {
            let back = file.read_events(&self.kinds, self.ordered)?;
            self.append(back);
        }
        let base = groups.start;
        let mut starts = vec![0u32; groups.len() + 1];
        for group in &self.groups {
            starts[(group - base) as usize + 1] += 1;
        }
        for group in 1..starts.len() {
            starts[group] += starts[group - 1];
        }
        let mut next: Vec<u32> = starts[..groups.len()].to_vec();
        let mut order: Vec<(Micros, u32)> = vec![(0, 0); self.groups.len()];
        for (event, group) in self.groups.iter().enumerate() {
            let place = &mut next[(group - base) as usize];
            order[*place as usize] = (self.event_times[event], event as u32);
            *place += 1;
        }
        for group in 0..groups.len() {
            // Files are mostly in order of time, and so are their rows here: runs are found and merged.
            order[starts[group] as usize..starts[group + 1] as usize].sort_by_key(|event| event.0);
        }
        Ok(SortedEvents {
            base,
            starts,
            event_times: order.iter().map(|event| event.0).collect(),
            from: if self.from.is_empty() {
                Vec::new()
            } else {
                order.iter().map(|event| self.from[event.1 as usize]).collect()
            },
            times: if self.times.is_empty() {
                Vec::new()
            } else {
                order.iter().map(|event| self.times[event.1 as usize]).collect()
            },
            columns: self.columns.iter().map(|column| column.gathered(&order)).collect(),
            kinds: self.kinds,
        })
    }
}

/// Events of a range of groups, by group and event time.
#[derive(Debug)]
pub struct SortedEvents {
    base: u32,
    starts: Vec<u32>,
    pub event_times: Vec<Micros>,
    pub from: Vec<Micros>,
    pub times: Vec<Times>,
    pub columns: Vec<Column>,
    pub kinds: Vec<Kind>,
}

impl SortedEvents {
    /// All times of an event; only its event time where no aggregate looks at more.
    pub fn times_of(&self, event: usize) -> Times {
        let event_time = self.event_times[event];
        let position = Position { time: event_time, sequence: 0 };
        let plain = Times { event_time, created_time: None, known_time: event_time, position };
        self.times.get(event).copied().unwrap_or(plain)
    }

    pub fn range(&self, group: u32) -> Range<usize> {
        let group = (group - self.base) as usize;
        self.starts[group] as usize..self.starts[group + 1] as usize
    }
}
