//! One source, read once for all the inputs of a service that it answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, take};
use arrow::datatypes::{Int64Type, TimestampMicrosecondType, UInt64Type};
use arrow::error::ArrowError;
use datafusion::common::internal_err;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::MemoryReservation;
use feature_defs::as_of::MaxAge;
use feature_defs::catalog::Visibility;
use feature_defs::plan::{ServiceInput, SourcePlan, ViewAnswer, ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position, STATIC, Status};
use feature_defs::value::{Value, encode_row};

use super::SourceReport;
use super::files::Files;
use super::index::{NO_GROUP, SpineIndex};
use super::latest::{Candidates, Rank, RankParts, comparable};
use super::places::{Marks, Place};
use super::windows::{Windows, WindowsPlan};
use crate::history::{POSITION_TIME, SEQUENCE};

/// Everything that reading one source for one spine needs.
pub struct Scan<'a> {
    pub source: &'a Arc<SourcePlan>,
    pub files: &'a Files,
    pub rule: Visibility,
    /// The service's inputs that this source answers, each with the spine's index by its keys.
    pub inputs: Vec<(&'a ServiceInput, Arc<SpineIndex>)>,
    pub spine_rows: usize,
    pub threads: usize,
    pub runtime: &'a tokio::runtime::Handle,
    pub stop: &'a AtomicBool,
    pub memory: &'a MemoryReservation,
    /// Bytes that copies of candidates may take.
    pub copies_bytes: usize,
    pub spill: &'a super::spill::Spill,
}

/// The times of a batch's rows.
struct RowTimes {
    event_times: Vec<Micros>,
    /// Rows without an event time are none.
    valid: Option<BooleanArray>,
    created: Option<ArrayRef>,
    /// When each row may first be seen; None where that is its event time.
    from: Option<Vec<Micros>>,
    /// When each row is known, where that can be later than its event time, and when it would be without the grid.
    known: Option<(Vec<Micros>, Vec<Micros>)>,
    positions: Option<(ArrayRef, ArrayRef)>,
}

/// What one worker collects for one input.
enum Collector<'a> {
    Latest(Candidates),
    Windows(Windows<'a>),
}

#[derive(Debug, Default, Clone)]
struct Counts {
    rows: u64,
    hidden: u64,
    created_time: u64,
    delay: u64,
    every: u64,
    arrival: u64,
}

impl<'a> Scan<'a> {
    pub fn run(self) -> Result<(Vec<ViewAnswer>, SourceReport)> {
        let windowed: Vec<Option<WindowsPlan<'a>>> =
            self.inputs.iter().map(|(input, _)| WindowsPlan::of(&input.view)).collect();
        let (collectors, counts) = self.collect(&windowed)?;
        let report = SourceReport {
            source: self.source.name.to_string(),
            rows: counts.rows,
            hidden: counts.hidden,
            hidden_by_created_time: counts.created_time,
            hidden_by_delay: counts.delay,
            hidden_by_every: counts.every,
            hidden_by_arrival: counts.arrival,
            enforced: self.rule != Visibility::EventTime,
        };

        // As-of inputs first: they are read with one more pass over the columns that hold values.
        let mut answers: Vec<Option<ViewAnswer>> = Vec::with_capacity(self.inputs.len());
        let mut carried = Vec::new();
        let mut marks = Marks::new(self.files);
        for (at, (collector, (input, index))) in collectors.into_iter().zip(&self.inputs).enumerate() {
            answers.push(None);
            match collector {
                Collector::Latest(mut candidates) => {
                    self.decide(&input.view, &mut candidates)?;
                    let carried_forward = candidates.carry_forward(index, max_age(&input.view));
                    carried_forward.mark(&mut marks);
                    carried.push((at, carried_forward));
                }
                Collector::Windows(windows) => {
                    answers[at] = Some(windows.finish(index, self.spine_rows, self.threads, self.stop)?);
                }
            }
        }
        if !carried.is_empty() {
            marks.count();
            let columns = self.value_columns();
            let rows = self.fetch(&marks, &columns)?;
            for (at, carried) in carried {
                let (input, index) = &self.inputs[at];
                let values = input.view.values(&rows).map_err(external)?;
                let mut statuses = vec![Status::NotFound; self.spine_rows];
                let mut event_times: Vec<Option<Micros>> = vec![None; self.spine_rows];
                let mut places: Vec<Option<u32>> = vec![None; self.spine_rows];
                for slot in 0..index.slots() {
                    let row = index.row(slot);
                    statuses[row] = carried.statuses[slot];
                    if carried.places[slot] != Place::NONE {
                        event_times[row] = Some(carried.event_times[slot]);
                    }
                    if carried.statuses[slot] == Status::Present {
                        places[row] = Some(marks.rank(carried.places[slot]));
                    }
                }
                drop(carried);
                let places = UInt32Array::from(places);
                let taken = in_parallel(self.threads, self.stop, values.len(), |feature| {
                    Ok(take(&values[feature], &places, None)?)
                })?;
                answers[at] = Some(ViewAnswer { values: taken, statuses, event_times });
            }
        }
        let answers: Option<Vec<ViewAnswer>> = answers.into_iter().collect();
        match answers {
            Some(answers) => Ok((answers, report)),
            None => internal_err!("an input of `{}` was not answered", self.source.name),
        }
    }

    /// Reads the columns that decide, and for windows those that say, of every row group.
    fn collect(&self, windowed: &[Option<WindowsPlan<'a>>]) -> Result<(Vec<Collector<'a>>, Counts)> {
        let parts = self.rank_parts();
        let slots: usize = self
            .inputs
            .iter()
            .zip(windowed)
            .filter(|(_, windowed)| windowed.is_none())
            .map(|((_, index), _)| Candidates::bytes_of(index.slots(), parts))
            .sum();
        let workers = self.threads.min(self.files.units().len()).max(1);
        let copies = (self.copies_bytes / slots.max(1)).clamp(1, workers);
        self.memory.try_grow(slots * copies)?;
        let fresh = || -> Vec<Collector<'a>> {
            let make = |((_, index), windowed): (&(&'a ServiceInput, Arc<SpineIndex>), &Option<WindowsPlan<'a>>)| {
                match windowed {
                    Some(plan) => Collector::Windows(Windows::new(plan.clone(), index, self.files.rows(), self.rule)),
                    None => Collector::Latest(Candidates::new(index.slots(), parts)),
                }
            };
            self.inputs.iter().zip(windowed).map(make).collect()
        };
        let mut columns: Vec<String> = self.inputs.iter().flat_map(|(input, _)| input.view.deciding_columns()).collect();
        for (input, _) in self.inputs.iter().filter(|(input, _)| input.view.is_windowed()) {
            columns.extend(input.view.value_columns());
        }
        if self.source.is_stream() {
            columns.extend([POSITION_TIME.to_owned(), SEQUENCE.to_owned()]);
        }
        columns.sort_unstable();
        columns.dedup();
        let shared: Vec<Mutex<(Vec<Collector<'a>>, Counts)>> =
            (0..copies).map(|_| Mutex::new((fresh(), Counts::default()))).collect();
        let reading = self.files.unit_bytes(&columns) * workers;
        self.memory.try_grow(reading)?;
        let turn = AtomicUsize::new(0);
        in_parallel(workers, self.stop, self.files.units().len(), |unit| {
            let copy = &shared[turn.fetch_add(1, Ordering::Relaxed) % copies];
            let mut first = 0;
            for batch in self.files.read(unit, &columns, None, self.runtime)? {
                let batch = batch?;
                let rows = batch.num_rows();
                let prepared = self.prepare(&batch, &columns)?;
                let mut copy = copy.lock().unwrap_or_else(PoisonError::into_inner);
                let (collectors, counts) = &mut *copy;
                self.add(prepared, unit as u32, first, collectors, counts)?;
                first += rows as u32;
                if self.stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        })?;
        self.memory.shrink(reading);
        let mut all = shared.into_iter().map(|copy| copy.into_inner().unwrap_or_else(PoisonError::into_inner));
        let Some((mut collectors, mut counts)) = all.next() else { return internal_err!("no copy of the candidates") };
        for (others, more) in all {
            for (collector, other) in collectors.iter_mut().zip(others) {
                match (collector, other) {
                    (Collector::Latest(candidates), Collector::Latest(other)) => candidates.merge(other),
                    (Collector::Windows(windows), Collector::Windows(other)) => windows.merge(other),
                    _ => return internal_err!("collectors of two workers differ"),
                }
            }
            counts.add(&more);
        }
        Ok((collectors, counts))
    }

    fn rank_parts(&self) -> RankParts {
        RankParts { created_time: self.source.created_time.is_some(), sequence: self.source.is_stream() }
    }

    fn value_columns(&self) -> Vec<String> {
        let as_of = self.inputs.iter().filter(|(input, _)| !input.view.is_windowed());
        let mut columns: Vec<String> = as_of.flat_map(|(input, _)| input.view.value_columns()).collect();
        columns.sort_unstable();
        columns.dedup();
        columns
    }

    /// Everything of a batch that needs no lock.
    fn prepare(&self, batch: &RecordBatch, columns: &[String]) -> Result<Prepared> {
        let positions = if self.source.is_stream() { Some(position_columns(batch)?) } else { None };
        let aligned = self.source.align(batch, Some(columns)).map_err(external)?;
        let times = self.times(&aligned, positions)?;
        let deleted = self.source.tombstones(&aligned).map_err(external)?;
        let mut inputs: Vec<Arc<PreparedInput>> = Vec::with_capacity(self.inputs.len());
        let mut seen: HashMap<(*const ViewPlan, *const SpineIndex), usize> = HashMap::new();
        for (input, index) in &self.inputs {
            // A view read under two aliases by the same keys is evaluated once.
            if let Some(before) = seen.get(&(Arc::as_ptr(&input.view), Arc::as_ptr(index))) {
                inputs.push(inputs[*before].clone());
                continue;
            }
            seen.insert((Arc::as_ptr(&input.view), Arc::as_ptr(index)), inputs.len());
            let included = input.view.included(&aligned).map_err(external)?;
            let keys = input.view.key_columns(&aligned).map_err(external)?;
            let mut groups = Vec::new();
            index.groups_of(&keys, aligned.num_rows(), &mut groups);
            let drop = |groups: &mut Vec<u32>, kept: &BooleanArray, keep: bool| {
                for (row, group) in groups.iter_mut().enumerate() {
                    if (kept.is_valid(row) && kept.value(row)) != keep {
                        *group = NO_GROUP;
                    }
                }
            };
            if let Some(included) = &included {
                drop(&mut groups, included, true);
            }
            if let Some(valid) = &times.valid {
                drop(&mut groups, valid, true);
            }
            let mut values = Vec::new();
            if input.view.is_windowed() {
                // A tombstone is not an event: it is in no window, and it takes back no earlier event.
                if let Some(deleted) = &deleted {
                    drop(&mut groups, deleted, false);
                }
                values = input.view.values(&aligned).map_err(external)?;
            }
            inputs.push(Arc::new(PreparedInput { groups, values }));
        }
        Ok(Prepared { rows: aligned.num_rows(), times, deleted, inputs })
    }

    fn times(&self, batch: &RecordBatch, positions: Option<(ArrayRef, ArrayRef)>) -> Result<RowTimes> {
        let rows = batch.num_rows();
        let column = |name: &Option<String>| -> Result<Option<ArrayRef>> {
            let Some(name) = name else { return Ok(None) };
            match batch.column_by_name(name) {
                Some(column) => Ok(Some(column.clone())),
                None => internal_err!("a batch of `{}` has no `{name}`", self.source.name),
            }
        };
        let created = column(&self.source.created_time)?;
        let (event_times, valid) = match column(&self.source.event_time)? {
            Some(column) => {
                let valid = column.nulls().filter(|nulls| nulls.null_count() > 0);
                let valid = valid.map(|nulls| BooleanArray::new(nulls.inner().clone(), None));
                (column.as_primitive::<TimestampMicrosecondType>().values().to_vec(), valid)
            }
            None => (vec![STATIC; rows], None),
        };
        let clock = self.source.clock;
        let known = if clock.has_created_time || clock.delay != 0 || clock.every != 0 {
            let created = created.as_ref().map(|created| created.as_primitive::<TimestampMicrosecondType>());
            let created_at = |row: usize| created.filter(|c| c.is_valid(row)).map(|created| created.value(row));
            let exact = feature_defs::time::SourceClock { every: 0, ..clock };
            let known = |clock: &feature_defs::time::SourceClock| -> Vec<Micros> {
                event_times.iter().enumerate().map(|(row, time)| clock.known(*time, created_at(row))).collect()
            };
            let rounded = known(&clock);
            let before = if clock.every > 0 { known(&exact) } else { Vec::new() };
            Some((rounded, before))
        } else {
            None
        };
        let from = match self.rule {
            Visibility::EventTime => None,
            Visibility::Known => known.as_ref().map(|(known, _)| known.clone()),
            Visibility::Ingested => {
                let positions = positions.as_ref().map(|(times, _)| times.as_primitive::<Int64Type>());
                Some(match (positions, &known) {
                    (Some(positions), _) => positions.values().to_vec(),
                    (None, Some((known, _))) => known.iter().zip(&event_times).map(|(k, e)| *k.max(e)).collect(),
                    (None, None) => event_times.clone(),
                })
            }
        };
        Ok(RowTimes { event_times, valid, created, from, known, positions })
    }

    fn add(
        &self,
        batch: Prepared,
        unit: u32,
        first: u32,
        collectors: &mut [Collector<'a>],
        counts: &mut Counts,
    ) -> Result<()> {
        let times = &batch.times;
        let mut hidden = self.reports(times).then(|| vec![None; batch.rows]);
        for ((input, prepared), collector) in self.inputs.iter().zip(&batch.inputs).zip(&mut *collectors) {
            let index = &input.1;
            if let Some(hidden) = &mut hidden {
                self.find_hidden(times, &prepared.groups, index, input.0.view.is_windowed(), hidden);
            }
            match collector {
                Collector::Latest(candidates) => {
                    self.scatter(candidates, index, times, &prepared.groups, batch.deleted.as_ref(), unit, first);
                    let bytes = candidates.tie_bytes();
                    if bytes > self.copies_bytes.max(64 << 20) {
                        return Err(DataFusionError::ResourcesExhausted(format!(
                            "source `{}` has more than {} rows alike in entity and every time, and only what they say \
                             decides between them",
                            self.source.name,
                            bytes / 40
                        )));
                    }
                }
                Collector::Windows(windows) => {
                    let created = times.created.as_ref().map(|c| c.as_primitive::<TimestampMicrosecondType>());
                    let positions = times.positions.as_ref();
                    let row_times = |row: usize| {
                        let event_time = times.event_times[row];
                        let created_time = created.filter(|c| c.is_valid(row)).map(|created| created.value(row));
                        let known_time = times.known.as_ref().map_or(event_time, |(known, _)| known[row]);
                        let position = positions.map_or(
                            Position { time: known_time.max(event_time), sequence: 0 },
                            |(times, sequences)| Position {
                                time: times.as_primitive::<Int64Type>().value(row),
                                sequence: sequences.as_primitive::<UInt64Type>().value(row),
                            },
                        );
                        feature_defs::as_of::Times { event_time, created_time, known_time, position }
                    };
                    windows.add(
                        index,
                        &prepared.groups,
                        &times.event_times,
                        times.from.as_deref(),
                        &row_times,
                        &prepared.values,
                    );
                    windows.account(self.memory, self.spill)?;
                }
            }
        }
        counts.rows += batch.rows as u64;
        for reason in hidden.into_iter().flatten().flatten() {
            counts.hidden += 1;
            match reason {
                Reason::Created => counts.created_time += 1,
                Reason::Delay => counts.delay += 1,
                Reason::Every => counts.every += 1,
                Reason::Arrival => counts.arrival += 1,
            }
        }
        Ok(())
    }

    /// Whether rows of this source can be hidden at all.
    fn reports(&self, times: &RowTimes) -> bool {
        times.known.is_some() || times.from.is_some()
    }

    fn find_hidden(
        &self,
        times: &RowTimes,
        groups: &[u32],
        index: &SpineIndex,
        windowed: bool,
        hidden: &mut [Option<Reason>],
    ) {
        let seen_from = match (&times.from, &times.known) {
            (Some(from), _) => from,
            (None, Some((known, _))) => known,
            (None, None) => return,
        };
        for (row, group) in groups.iter().enumerate() {
            let (event_time, from) = (times.event_times[row], seen_from[row]);
            if *group == NO_GROUP || from <= event_time {
                continue;
            }
            // A window's head is exclusive where it is not declared otherwise: there the event's own time does not count.
            let (first, end) = index.first_at_or_after(*group, event_time.saturating_add(i64::from(windowed)));
            if first == end || index.time(first) >= from {
                continue;
            }
            let (seen, _) = index.first_at_or_after(*group, from);
            let last_hidden = index.time(seen - 1);
            let reason = match (&times.known, self.rule) {
                (Some((known, _)), Visibility::Ingested) if last_hidden >= known[row] => Reason::Arrival,
                (None, _) => Reason::Arrival,
                (Some((_, exact)), _) if exact.get(row).is_some_and(|exact| last_hidden >= *exact) => Reason::Every,
                _ if self.source.clock.has_created_time => Reason::Created,
                _ => Reason::Delay,
            };
            hidden[row] = hidden[row].max(Some(reason));
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of a batch")]
    fn scatter(
        &self,
        candidates: &mut Candidates,
        index: &SpineIndex,
        times: &RowTimes,
        groups: &[u32],
        deleted: Option<&BooleanArray>,
        unit: u32,
        first: u32,
    ) {
        const NO_SLOT: u32 = u32::MAX;
        // Two loops, so that the memory that one row waits for is asked for while others are worked on.
        let slots: Vec<u32> = groups
            .iter()
            .enumerate()
            .map(|(row, group)| {
                if *group == NO_GROUP {
                    return NO_SLOT;
                }
                let event_time = times.event_times[row];
                let from = times.from.as_ref().map_or(event_time, |from| from[row].max(event_time));
                let (slot, end) = index.first_at_or_after(*group, from);
                if slot == end { NO_SLOT } else { slot as u32 }
            })
            .collect();
        let created = times.created.as_ref().map(|created| created.as_primitive::<TimestampMicrosecondType>());
        let sequences = times.positions.as_ref().map(|(_, sequences)| sequences.as_primitive::<UInt64Type>());
        for (row, slot) in slots.iter().enumerate() {
            if *slot == NO_SLOT {
                continue;
            }
            let rank = Rank {
                event_time: times.event_times[row],
                created_time: created.map_or(Micros::MIN, |created| {
                    comparable(created.is_valid(row).then(|| created.value(row)))
                }),
                sequence: sequences.map_or(0, |sequences| sequences.value(row)),
            };
            let is_deleted = deleted.is_some_and(|deleted| deleted.is_valid(row) && deleted.value(row));
            candidates.offer(*slot as usize, Place::new(unit, first + row as u32, is_deleted), rank);
        }
    }

    /// Among rows alike in every time, the one that says more wins: the larger canonical encoding.
    fn decide(&self, view: &ViewPlan, candidates: &mut Candidates) -> Result<()> {
        let contests = candidates.contests();
        if contests.is_empty() {
            return Ok(());
        }
        let mut marks = Marks::new(self.files);
        contests.iter().flat_map(|(_, places)| places).for_each(|place| marks.mark(*place));
        marks.count();
        let rows = self.fetch(&marks, &view.value_columns())?;
        let values = view.values(&rows).map_err(external)?;
        let types = view.row_types();
        let content = |place: &Place| {
            let mut bytes = vec![u8::from(place.is_deleted())];
            let row = marks.rank(*place) as usize;
            let values: Vec<Value> = values
                .iter()
                .zip(&types)
                .map(|(column, value_type)| {
                    // A tombstone has no values, whatever the source row held.
                    if place.is_deleted() { Value::Null } else { Value::from_array(column, row, value_type) }
                })
                .collect();
            encode_row(&values, &mut bytes);
            bytes
        };
        for (slot, places) in contests {
            if let Some(winner) = places.into_iter().max_by_key(content) {
                candidates.decide(slot, winner);
            }
        }
        Ok(())
    }

    /// The named columns of the marked rows, in order of their places, aligned.
    fn fetch(&self, marks: &Marks, columns: &[String]) -> Result<RecordBatch> {
        let units: Vec<usize> = (0..self.files.units().len()).filter(|unit| marks.any_in_unit(*unit)).collect();
        let reading = self.files.unit_bytes(columns) * self.threads.min(units.len()).max(1);
        self.memory.try_grow(reading)?;
        let fetched = in_parallel(self.threads, self.stop, units.len(), |at| {
            let batches: Vec<RecordBatch> =
                self.files.read(units[at], columns, Some(marks), self.runtime)?.collect::<Result<_>>()?;
            let aligned: Vec<RecordBatch> = batches
                .iter()
                .map(|batch| self.source.align(batch, Some(columns)).map_err(external))
                .collect::<Result<_>>()?;
            match aligned.first() {
                Some(first) => Ok(concat_batches(&first.schema(), &aligned)?),
                None => internal_err!("a row group of `{}` with marked rows has none", self.source.name),
            }
        })?;
        self.memory.shrink(reading);
        let empty = || {
            let fields: Vec<arrow::datatypes::Field> = self
                .source
                .schema
                .iter()
                .filter(|(name, _)| columns.contains(name))
                .map(|(name, value_type)| arrow::datatypes::Field::new(name, value_type.arrow(), true))
                .collect();
            RecordBatch::new_empty(Arc::new(arrow::datatypes::Schema::new(fields)))
        };
        match fetched.first() {
            Some(first) => Ok(concat_batches(&first.schema(), &fetched)?),
            None => Ok(empty()),
        }
    }
}

/// Why a row was hidden; the later reason counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Created,
    Delay,
    Every,
    Arrival,
}

struct Prepared {
    rows: usize,
    times: RowTimes,
    deleted: Option<BooleanArray>,
    inputs: Vec<Arc<PreparedInput>>,
}

struct PreparedInput {
    groups: Vec<u32>,
    /// Inputs of aggregates; empty for as-of views.
    values: Vec<ArrayRef>,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.rows += other.rows;
        self.hidden += other.hidden;
        self.created_time += other.created_time;
        self.delay += other.delay;
        self.every += other.every;
        self.arrival += other.arrival;
    }
}

fn max_age(view: &ViewPlan) -> MaxAge {
    match &view.kind {
        ViewPlanKind::AsOf { max_age, .. } => *max_age,
        ViewPlanKind::Windowed { .. } => MaxAge::default(),
    }
}

pub fn external(error: impl std::error::Error + Send + Sync + 'static) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

/// Position time and sequence of a batch of a history.
pub fn position_columns(batch: &RecordBatch) -> Result<(ArrayRef, ArrayRef)> {
    let column = |name: &str| batch.column_by_name(name).filter(|column| column.null_count() == 0).cloned();
    match (column(POSITION_TIME), column(SEQUENCE)) {
        (Some(times), Some(sequences))
            if times.as_primitive_opt::<Int64Type>().is_some()
                && sequences.as_primitive_opt::<UInt64Type>().is_some() =>
        {
            Ok((times, sequences))
        }
        _ => Err(ArrowError::SchemaError("a history file has no position columns".into()).into()),
    }
}

/// Runs so many tasks on so many threads and gives their results in the order of the tasks. The first failure stops the
/// rest.
pub fn in_parallel<T: Send>(
    threads: usize,
    stop: &AtomicBool,
    tasks: usize,
    run: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || {
        let mut done: Vec<(usize, Result<T>)> = Vec::new();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks || failed.load(Ordering::Relaxed) || stop.load(Ordering::Relaxed) {
                return done;
            }
            let result = run(task);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            done.push((task, result));
        }
    };
    let mut done = if threads <= 1 || tasks <= 1 {
        work()
    } else {
        let results = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.min(tasks)).map(|_| scope.spawn(work)).collect();
            workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
        });
        let mut done = Vec::new();
        for result in results {
            match result {
                Ok(mut part) => done.append(&mut part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    };
    done.sort_by_key(|(task, _)| *task);
    let complete = done.len() == tasks;
    let results: Vec<T> = done.into_iter().map(|(_, result)| result).collect::<Result<_>>()?;
    if complete { Ok(results) } else { Err(DataFusionError::Execution("the reader has gone".into())) }
}
