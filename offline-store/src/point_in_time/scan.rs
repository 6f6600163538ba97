//! One source, read once for all the inputs of a service that it answers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, BooleanBufferBuilder, RecordBatch, UInt32Array};
use arrow::buffer::NullBuffer;
use arrow::compute::{concat_batches, take};
use arrow::datatypes::{Int64Type, TimestampMicrosecondType, UInt64Type};
use arrow::error::ArrowError;
use datafusion::common::internal_err;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::MemoryReservation;
use feature_defs::as_of::MaxAge;
use feature_defs::catalog::Visibility;
use feature_defs::plan::{ServiceInput, SourcePlan, ViewAnswer, ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position, STATIC, SourceClock, Status};
use feature_defs::value::{Value, encode_row};

use super::SourceReport;
use super::files::Files;
use super::index::{NO_GROUP, SpineIndex};
use super::latest::{Answers, Buffers, Entry, Hidden, Latest, PlainEntry, Rank, RankParts, Rules, comparable};
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
    /// Which inputs' event times are read by somebody, in their order.
    pub event_times: Vec<bool>,
    /// Bytes that rows alike in every time may take.
    pub ties_bytes: usize,
    pub spill: &'a super::spill::Spill,
}

/// The times of a batch's rows.
struct RowTimes {
    event_times: Vec<Micros>,
    /// Rows without an event time are none.
    valid: Option<BooleanArray>,
    created: Option<ArrayRef>,
    /// When each row may first be seen, whether that is enforced or not; None where that is its event time.
    from: Option<Vec<Micros>>,
    /// When each row is known; None where that is its event time.
    known: Option<Vec<Micros>>,
    positions: Option<(ArrayRef, ArrayRef)>,
}

/// What all workers collect for one input, or one worker.
enum Collector<L, W> {
    Latest(L),
    Windows(W),
}

/// One worker's.
struct Worker<'a> {
    collectors: Vec<Collector<Buffers, Windows<'a>>>,
    hidden: Hidden,
    rows: u64,
}

impl<'a> Scan<'a> {
    pub fn run(self) -> Result<(Vec<ViewAnswer>, SourceReport)> {
        let mut held: Vec<Collector<Latest, Option<Windows<'a>>>> = self
            .inputs
            .iter()
            .map(|(input, index)| match input.view.is_windowed() {
                true => Collector::Windows(None),
                false => Collector::Latest(Latest::new(index.clone(), self.rules())),
            })
            .collect();
        let report = self.collect(&mut held)?;

        // As-of inputs are read with one more pass, over the columns that hold values.
        let mut answers: Vec<Option<ViewAnswer>> = Vec::with_capacity(self.inputs.len());
        let mut carried = Vec::new();
        let mut marks = Marks::new(self.files);
        for (at, (collector, (input, index))) in held.into_iter().zip(&self.inputs).enumerate() {
            answers.push(None);
            match collector {
                Collector::Latest(mut latest) => {
                    self.decide(&input.view, &mut latest)?;
                    let found = latest.answers(max_age(&input.view), self.threads, self.stop)?;
                    found.iter().for_each(|bucket| bucket.mark(&mut marks));
                    carried.push((at, found));
                }
                Collector::Windows(windows) => {
                    let Some(windows) = windows else { return internal_err!("no worker collected windows") };
                    answers[at] = Some(windows.finish(index, self.spine_rows, self.threads, self.stop)?);
                }
            }
        }
        if !carried.is_empty() {
            marks.count();
            let rows = self.fetch(&marks, &self.value_columns())?;
            for (at, found) in carried {
                answers[at] = Some(self.answer(at, found, &rows, &marks)?);
            }
        }
        let answers: Option<Vec<ViewAnswer>> = answers.into_iter().collect();
        match answers {
            Some(answers) => Ok((answers, report)),
            None => internal_err!("an input of `{}` was not answered", self.source.name),
        }
    }

    /// The answer of an as-of input, from what answers at its slots and the rows that were read.
    fn answer(&self, at: usize, found: Vec<Answers>, rows: &RecordBatch, marks: &Marks) -> Result<ViewAnswer> {
        let (input, index) = &self.inputs[at];
        let values = input.view.values(rows).map_err(external)?;
        let mut statuses = vec![Status::NotFound; self.spine_rows];
        let mut event_times: Vec<Option<Micros>> =
            if self.event_times[at] { vec![None; self.spine_rows] } else { Vec::new() };
        let mut places = vec![0u32; self.spine_rows];
        let mut present = BooleanBufferBuilder::new(self.spine_rows);
        present.append_n(self.spine_rows, false);
        for bucket in &found {
            for (slot, (status, (event_time, place))) in bucket.statuses.iter().zip(&bucket.best).enumerate() {
                let row = index.row(bucket.base + slot);
                statuses[row] = *status;
                if *status == Status::Present {
                    places[row] = marks.rank(*place);
                    present.set_bit(row, true);
                }
                if self.event_times[at] && *place != Place::NONE {
                    event_times[row] = Some(*event_time);
                }
            }
        }
        drop(found);
        let places = UInt32Array::new(places.into(), Some(NullBuffer::new(present.finish())));
        let taken =
            in_parallel(self.threads, self.stop, values.len(), |feature| Ok(take(&values[feature], &places, None)?))?;
        Ok(ViewAnswer { values: taken, statuses, event_times })
    }

    /// Reads the columns that decide, and for windows those that say, of every row group.
    fn collect(&self, held: &mut [Collector<Latest, Option<Windows<'a>>>]) -> Result<SourceReport> {
        let workers = self.threads.min(self.files.units().len()).max(1);
        for ((_, index), collector) in self.inputs.iter().zip(held.iter()) {
            if let Collector::Latest(latest) = collector {
                let parts = self.rules().parts;
                self.memory.try_grow(Latest::bytes_of(index.slots(), parts) + latest.buffer_bytes() * workers)?;
            }
        }
        let mut columns: Vec<String> =
            self.inputs.iter().flat_map(|(input, _)| input.view.deciding_columns()).collect();
        for (input, _) in self.inputs.iter().filter(|(input, _)| input.view.is_windowed()) {
            columns.extend(input.view.value_columns());
        }
        if self.source.is_stream() {
            columns.extend([POSITION_TIME.to_owned(), SEQUENCE.to_owned()]);
        }
        columns.sort_unstable();
        columns.dedup();
        let reading = self.files.unit_bytes(&columns) * workers;
        self.memory.try_grow(reading)?;
        let fresh = || Worker {
            collectors: held
                .iter()
                .zip(&self.inputs)
                .map(|(collector, (input, index))| match (collector, WindowsPlan::of(&input.view)) {
                    (Collector::Latest(latest), _) => Collector::Latest(latest.buffers()),
                    (Collector::Windows(_), plan) => {
                        Collector::Windows(Windows::new(plan.unwrap_or_default(), index, self.files.rows()))
                    }
                })
                .collect(),
            hidden: Hidden::default(),
            rows: 0,
        };
        let units = self.units_that_matter();
        let workers = with_workers(workers, self.stop, units.len(), fresh, |worker: &mut Worker<'a>, task| {
            let unit = units[task];
            let mut first = 0;
            for batch in self.files.read(unit, &columns, None, self.runtime)? {
                let batch = batch?;
                let rows = batch.num_rows();
                let prepared = self.prepare(&batch, &columns)?;
                self.add(prepared, unit as u32, first, held, worker)?;
                first += rows as u32;
                if self.stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        })?;
        self.memory.shrink(reading);
        let mut report = SourceReport {
            source: self.source.name.to_string(),
            enforced: self.rule != Visibility::EventTime,
            ..SourceReport::default()
        };
        for worker in workers {
            report.rows += worker.rows;
            add_hidden(&mut report, &worker.hidden);
            for (collector, held) in worker.collectors.into_iter().zip(&mut *held) {
                match (held, collector) {
                    (Collector::Latest(latest), Collector::Latest(mut buffers)) => {
                        latest.flush(&mut buffers);
                        add_hidden(&mut report, &buffers.hidden);
                    }
                    (Collector::Windows(Some(windows)), Collector::Windows(other)) => windows.merge(other),
                    (Collector::Windows(none), Collector::Windows(other)) => *none = Some(other),
                    _ => return internal_err!("collectors of two workers differ"),
                }
            }
        }
        Ok(report)
    }

    /// The row groups of which some row can matter to some row of the spine, by what the files say of their columns: a small
    /// spine, or a table sorted by entity, leaves most of them unread.
    fn units_that_matter(&self) -> Vec<usize> {
        let keys: Vec<Option<(&str, Vec<i64>)>> = self
            .inputs
            .iter()
            .map(|(input, index)| match input.view.keys.as_slice() {
                [key] => Some((key.column.as_str(), index.integer_keys()?)),
                _ => None,
            })
            .collect();
        let clock = self.source.clock;
        let hides = clock.has_created_time || clock.delay != 0 || clock.every != 0 || self.rule == Visibility::Ingested;
        let spans: Vec<Option<(Micros, Micros)>> = self
            .inputs
            .iter()
            .map(|(input, index)| {
                let (first, last) = index.time_range()?;
                let earliest = match &input.view.kind {
                    // Events before every window still count among those that a rule hides.
                    ViewPlanKind::Windowed { windows, .. } if !hides => {
                        windows.iter().map(|window| window.start(first)).min().unwrap_or(first)
                    }
                    _ => Micros::MIN,
                };
                Some((earliest, last))
            })
            .collect();
        let matters = |unit: &usize| {
            let times = self.source.event_time.as_deref().and_then(|column| self.files.range(*unit, column));
            keys.iter().zip(&spans).any(|(keys, span)| {
                // An input without slots asks for nothing.
                let Some((earliest, last)) = span else { return false };
                if times.is_some_and(|(least, greatest)| least > *last || greatest < *earliest) {
                    return false;
                }
                let Some((column, keys)) = keys else { return true };
                let Some((least, greatest)) = self.files.range(*unit, column) else { return true };
                let first = keys.partition_point(|key| *key < least);
                keys.get(first).is_some_and(|key| *key <= greatest)
            })
        };
        (0..self.files.units().len()).filter(matters).collect()
    }

    fn rules(&self) -> Rules {
        let clock = self.source.clock;
        Rules {
            parts: self.rank_parts(),
            enforced: self.rule != Visibility::EventTime,
            exact: SourceClock { every: 0, ..clock },
            every: clock.every > 0,
            arrival: self.rule == Visibility::Ingested,
        }
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
        let known = (clock.has_created_time || clock.delay != 0 || clock.every != 0).then(|| -> Vec<Micros> {
            let created = created.as_ref().map(|created| created.as_primitive::<TimestampMicrosecondType>());
            let created_at = |row: usize| created.filter(|c| c.is_valid(row)).map(|created| created.value(row));
            event_times.iter().enumerate().map(|(row, time)| clock.known(*time, created_at(row))).collect()
        });
        let from = match self.rule {
            Visibility::EventTime | Visibility::Known => known.clone(),
            Visibility::Ingested => {
                let positions = positions.as_ref().map(|(times, _)| times.as_primitive::<Int64Type>());
                match (positions, &known) {
                    (Some(positions), _) => Some(positions.values().to_vec()),
                    (None, Some(known)) => Some(known.iter().zip(&event_times).map(|(k, e)| *k.max(e)).collect()),
                    (None, None) => None,
                }
            }
        };
        Ok(RowTimes { event_times, valid, created, from, known, positions })
    }

    fn add(
        &self,
        batch: Prepared,
        unit: u32,
        first: u32,
        held: &[Collector<Latest, Option<Windows<'a>>>],
        worker: &mut Worker<'a>,
    ) -> Result<()> {
        let times = &batch.times;
        worker.rows += batch.rows as u64;
        let inputs = self.inputs.iter().zip(&batch.inputs).zip(held).zip(&mut worker.collectors);
        for ((((_, index), prepared), held), collector) in inputs {
            match (held, collector) {
                (Collector::Latest(latest), Collector::Latest(buffers)) => {
                    scatter(latest, buffers, times, &prepared.groups, batch.deleted.as_ref(), unit, first);
                    if first == 0 && latest.tie_bytes() > self.ties_bytes {
                        return Err(DataFusionError::ResourcesExhausted(format!(
                            "source `{}` has more than {} rows alike in entity and every time, and only what they say \
                             decides between them",
                            self.source.name,
                            self.ties_bytes / 40
                        )));
                    }
                }
                (_, Collector::Windows(windows)) => {
                    self.find_hidden(times, &prepared.groups, index, &mut worker.hidden);
                    let created = times.created.as_ref().map(|c| c.as_primitive::<TimestampMicrosecondType>());
                    let positions = times.positions.as_ref();
                    let row_times = |row: usize| {
                        let event_time = times.event_times[row];
                        let created_time = created.filter(|c| c.is_valid(row)).map(|created| created.value(row));
                        let known_time = times.known.as_ref().map_or(event_time, |known| known[row]);
                        let position = positions.map_or(
                            Position { time: known_time.max(event_time), sequence: 0 },
                            |(times, sequences)| Position {
                                time: times.as_primitive::<Int64Type>().value(row),
                                sequence: sequences.as_primitive::<UInt64Type>().value(row),
                            },
                        );
                        feature_defs::as_of::Times { event_time, created_time, known_time, position }
                    };
                    let from = if self.rule == Visibility::EventTime { None } else { times.from.as_deref() };
                    windows.add(index, &prepared.groups, &times.event_times, from, &row_times, &prepared.values);
                    windows.account(self.memory, self.spill)?;
                }
                _ => return internal_err!("a worker's collectors are not those of its source"),
            }
        }
        Ok(())
    }

    /// Counts the rows that a windowed input's slots would hold by their event time, and do not hold because they may
    /// not be seen yet.
    fn find_hidden(&self, times: &RowTimes, groups: &[u32], index: &SpineIndex, hidden: &mut Hidden) {
        let Some(seen_from) = &times.from else { return };
        let rules = self.rules();
        for (row, group) in groups.iter().enumerate() {
            let (event_time, from) = (times.event_times[row], seen_from[row]);
            if *group == NO_GROUP || from <= event_time {
                continue;
            }
            // A window's head is exclusive where it is not declared otherwise: the event's own time does not count.
            let (first, end) = index.first_at_or_after(*group, event_time.saturating_add(1));
            if first == end || index.time(first) >= from {
                continue;
            }
            let last_hidden = index.time(index.first_at_or_after(*group, from).0 - 1);
            let created = times.created.as_ref().map(|created| created.as_primitive::<TimestampMicrosecondType>());
            let created = created.filter(|created| created.is_valid(row)).map(|created| created.value(row));
            let known = times.known.as_ref().map_or(event_time, |known| known[row]);
            if rules.arrival && last_hidden >= known {
                hidden.arrival += 1;
            } else if rules.every && last_hidden >= rules.exact.known(event_time, created) {
                hidden.every += 1;
            } else if rules.exact.has_created_time {
                hidden.created_time += 1;
            } else {
                hidden.delay += 1;
            }
        }
    }

    /// Among rows alike in every time, the one that says more wins: the larger canonical encoding.
    fn decide(&self, view: &ViewPlan, candidates: &mut Latest) -> Result<()> {
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

fn add_hidden(report: &mut SourceReport, hidden: &Hidden) {
    report.hidden += hidden.created_time + hidden.delay + hidden.every + hidden.arrival;
    report.hidden_by_created_time += hidden.created_time;
    report.hidden_by_delay += hidden.delay;
    report.hidden_by_every += hidden.every;
    report.hidden_by_arrival += hidden.arrival;
}

/// Sends the rows of a batch on their way to their slots.
fn scatter(
    latest: &Latest,
    buffers: &mut Buffers,
    times: &RowTimes,
    groups: &[u32],
    deleted: Option<&BooleanArray>,
    unit: u32,
    first: u32,
) {
    let created = times.created.as_ref().map(|created| created.as_primitive::<TimestampMicrosecondType>());
    let sequences = times.positions.as_ref().map(|(_, sequences)| sequences.as_primitive::<UInt64Type>());
    if created.is_none() && sequences.is_none() && times.from.is_none() && deleted.is_none() {
        for (row, (group, event_time)) in groups.iter().zip(&times.event_times).enumerate() {
            if *group != NO_GROUP {
                let place = Place::new(unit, first + row as u32, false);
                latest.add_plain(buffers, PlainEntry { event_time: *event_time, place, group: *group });
            }
        }
        return;
    }
    for (row, group) in groups.iter().enumerate() {
        if *group == NO_GROUP {
            continue;
        }
        let event_time = times.event_times[row];
        let created_time =
            created.map_or(Micros::MIN, |created| comparable(created.is_valid(row).then(|| created.value(row))));
        let rank = Rank { event_time, created_time, sequence: sequences.map_or(0, |sequences| sequences.value(row)) };
        let is_deleted = deleted.is_some_and(|deleted| deleted.is_valid(row) && deleted.value(row));
        let place = Place::new(unit, first + row as u32, is_deleted);
        let from = times.from.as_ref().map_or(event_time, |from| from[row]);
        let known = times.known.as_ref().map_or(event_time, |known| known[row]);
        latest.add(buffers, Entry { group: *group, place, rank, from, known });
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
    let done = with_workers(threads.min(tasks), stop, tasks, Vec::new, |done: &mut Vec<(usize, T)>, task| {
        done.push((task, run(task)?));
        Ok(())
    })?;
    let mut done: Vec<(usize, T)> = done.into_iter().flatten().collect();
    done.sort_by_key(|(task, _)| *task);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Runs so many tasks on so many threads, each with a state of its own, and gives the states. The first failure stops the
/// rest.
pub fn with_workers<W: Send>(
    threads: usize,
    stop: &AtomicBool,
    tasks: usize,
    fresh: impl Fn() -> W + Sync,
    run: impl Fn(&mut W, usize) -> Result<()> + Sync,
) -> Result<Vec<W>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let gone = || DataFusionError::Execution("the reader has gone".into());
    let work = || -> Result<W> {
        let mut worker = fresh();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks || failed.load(Ordering::Relaxed) {
                return Ok(worker);
            }
            if stop.load(Ordering::Relaxed) {
                return Err(gone());
            }
            if let Err(error) = run(&mut worker, task) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    if threads <= 1 {
        return Ok(vec![work()?]);
    }
    let joined: Vec<std::thread::Result<Result<W>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join()).collect()
    });
    let mut states = Vec::with_capacity(joined.len());
    for result in joined {
        match result {
            Ok(state) => states.push(state?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(states)
}
