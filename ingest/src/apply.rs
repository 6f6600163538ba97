//! The applier: takes durable events in order of position into the online store and into history.
//!
//! One task per project. An event that is on time becomes due the moment it is durable; an early one waits in the log, and
//! memory holds only where it lies and when it is due. What is due is applied in chunks: to every live generation of every
//! view of the source, then kept for history. A flush makes the online store durable, appends to history, and lets go of
//! the log, in this order, so a crash anywhere repeats work and never loses or doubles any: the online store skips what it
//! has by position, and the history says up to which position it is complete.
//!
//! Behind each chunk goes the mark of the source, the position up to which all live generations have every event. A mark
//! that is found behind what was written says that the store lost its newest writes: everything after the mark is taken
//! again from history and memory before anything new.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::compute::interleave_record_batch;
use feature_defs::as_of::Times;
use feature_defs::plan::SourcePlan;
use feature_defs::time::{Micros, Position};
use futures::StreamExt;
use offline_store::history::{History, Positioned, Written};
use online_store::key::Generation;
use online_store::{Answer, Read, StoreError, Write};
use tokio::time::Instant;

use crate::log::{BLANK, Durable, Events, Log, LogError, RecordRef};
use crate::write::{Kept, Lane, SetAside, ViewWriter, apply};
use crate::{IngestError, Inner, Phase, Stream, Visible, dead_letter};

/// Rows applied at once: large enough to share the reads of busy entities, small enough to be visible soon.
const CHUNK_ROWS: usize = 8_192;
/// Records read back for one chunk, in bytes.
const CHUNK_BYTES: u64 = 64 << 20;
/// When applied events become history: at this many rows, or at this age.
const FLUSH_ROWS: usize = 50_000;
pub(crate) const FLUSH_AFTER: Duration = Duration::from_secs(30);
/// Applied rows kept in memory while history cannot be written; beyond it, the applier waits.
const UNFLUSHED_ROWS_MAX: usize = 4 * FLUSH_ROWS;
/// Between tries of something that failed: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(5);
/// How long the applier sleeps at most while early events wait: clocks may be set.
const NAP: Duration = Duration::from_millis(100);

/// A record whose on-time rows wait to be applied.
struct Held {
    record: Arc<RecordRef>,
    events: Option<Events>,
    /// On-time rows, ascending.
    rows: Vec<u32>,
    next: usize,
}

/// One row that waits for its time.
#[derive(PartialEq, Eq)]
struct Early {
    position: Position,
    row: u32,
    record: Arc<RecordRef>,
}

impl Ord for Early {
    fn cmp(&self, other: &Early) -> std::cmp::Ordering {
        self.position.cmp(&other.position)
    }
}

impl PartialOrd for Early {
    fn partial_cmp(&self, other: &Early) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A due row that was taken from the queues.
struct Pick {
    record: Arc<RecordRef>,
    row: u32,
    position: Position,
}

/// What the applier knows of one stream source. Locked by whoever applies, flushes or finishes a backfill.
pub(crate) struct StreamState {
    pub plan: Arc<SourcePlan>,
    pub history: History,
    /// Generations that get every event as it is applied.
    pub live: Vec<Arc<ViewWriter>>,
    /// Generations that are being built from history.
    pub building: Vec<Arc<ViewWriter>>,
    pub builder_runs: bool,
    /// The prior history is in, or there is none.
    pub imported: bool,
    /// Of the last event applied.
    pub applied: Position,
    /// Up to where the online store has said that it has every event.
    marked: Option<Position>,
    /// Through which the live generations are written; none: it is opened with the next chunk.
    lane: Option<Lane>,
    /// The online store lost events after this, which are written again before anything else is.
    lost_after: Option<Position>,
    /// Of those who found the log full, how many have been served.
    flushes_seen: u64,
    /// Of the last event received from the log.
    received: u64,
    received_arrival: Micros,
    /// Records that came while the prior history was being imported, or that could not be read back yet.
    waiting: VecDeque<Durable>,
    on_time: VecDeque<Held>,
    early: BinaryHeap<Reverse<Early>>,
    /// Taken from the queues and not yet applied: survives a failure in between.
    picked: Vec<Pick>,
    picked_events: HashMap<u64, Events>,
    ticked: bool,
    /// Applied and not in history: what is on its way there first.
    unflushed: Vec<Positioned>,
    unflushed_rows: usize,
    unflushed_since: Option<Instant>,
    flushing: Option<Flushing>,
    /// After a flush that failed: when to try again.
    flush_again_at: Option<Instant>,
    /// History has files that nobody has looked at: it may be time to compact them.
    pub grown: bool,
    /// Rows per record, by its place, that the log may let go of after the next flush.
    release: BTreeMap<(u64, u64), u64>,
    retry_at: Option<Instant>,
    retry_pause: Duration,
}

impl StreamState {
    pub fn new(plan: Arc<SourcePlan>, history: History) -> StreamState {
        let applied = history.manifest().applied;
        StreamState {
            plan,
            history,
            live: Vec::new(),
            building: Vec::new(),
            builder_runs: false,
            imported: false,
            applied,
            marked: None,
            lane: None,
            lost_after: None,
            flushes_seen: 0,
            received: 0,
            received_arrival: Micros::MIN,
            waiting: VecDeque::new(),
            on_time: VecDeque::new(),
            early: BinaryHeap::new(),
            picked: Vec::new(),
            picked_events: HashMap::new(),
            ticked: false,
            unflushed: Vec::new(),
            unflushed_rows: 0,
            unflushed_since: None,
            flushing: None,
            flush_again_at: None,
            grown: true,
            release: BTreeMap::new(),
            retry_at: None,
            retry_pause: RETRY_FIRST,
        }
    }

    /// Takes in a durable record.
    pub async fn receive(&mut self, log: &Log, durable: Durable) -> Result<(), LogError> {
        let record = &durable.record;
        self.received = self.received.max(record.first_sequence + u64::from(record.rows) - 1);
        self.received_arrival = self.received_arrival.max(record.arrival);
        self.waiting.push_back(durable);
        if self.imported { self.hold_waiting(log).await } else { Ok(()) }
    }

    /// The prior history is in: what waited for it can go on.
    pub async fn go_on(&mut self, log: &Log) -> Result<(), LogError> {
        self.imported = true;
        self.applied = self.history.manifest().applied;
        self.hold_waiting(log).await
    }

    /// Sorts waiting records into those on time and those early. One that cannot be read keeps its place, and nothing is
    /// applied before it.
    async fn hold_waiting(&mut self, log: &Log) -> Result<(), LogError> {
        while let Some(durable) = self.waiting.front() {
            let due = match &durable.events {
                Some(events) => events.due.clone(),
                None => log.read(&durable.record).await?.due,
            };
            if let Some(durable) = self.waiting.pop_front() {
                self.hold(log, durable, &due);
            }
        }
        Ok(())
    }

    fn hold(&mut self, log: &Log, durable: Durable, due: &[Micros]) {
        let Durable { record, events } = durable;
        let record = Arc::new(record);
        if record.import.is_some() && record.import.as_deref() != self.import_id() {
            // Left by an import that did not finish; the one that did wrote these events again.
            log.release(record.place(), u64::from(record.rows));
            events.iter().for_each(|events| log.forget_cached(events));
            return;
        }
        let done = self.history.manifest().applied;
        let mut on_time = Vec::new();
        let mut in_history = 0;
        for (row, due) in due.iter().enumerate() {
            let position = Position { time: record.arrival.max(*due), sequence: record.first_sequence + row as u64 };
            if position <= done || *due == BLANK {
                in_history += 1;
            } else if *due <= record.arrival {
                on_time.push(row as u32);
            } else {
                self.early.push(Reverse(Early { position, row: row as u32, record: record.clone() }));
            }
        }
        if in_history > 0 {
            log.release(record.place(), in_history);
        }
        if on_time.is_empty() {
            events.iter().for_each(|events| log.forget_cached(events));
        } else {
            self.on_time.push_back(Held { record, events, rows: on_time, next: 0 });
        }
    }

    /// Rows, by segment and sequence, that were taken out of the log: they wait for their time no longer.
    pub fn drop_early(&mut self, log: &Log, gone: &[(u64, u64)]) {
        let gone: HashSet<(u64, u64)> = gone.iter().copied().collect();
        self.early.retain(|Reverse(early)| {
            let is_gone = gone.contains(&(early.record.segment, early.position.sequence));
            if is_gone {
                log.release(early.record.place(), 1);
            }
            !is_gone
        });
    }

    /// The import that was completed, if any.
    pub fn import_id(&self) -> Option<&str> {
        self.history.manifest().imported.as_ref().map(|imported| imported.id.as_str())
    }

    /// When the next early event is due.
    pub fn next_due(&self) -> Option<Micros> {
        self.early.peek().map(|Reverse(early)| early.position.time)
    }

    /// Position of the last on-time event that waits to be applied.
    pub fn last_on_time(&self) -> Option<Position> {
        let held = self.on_time.back()?;
        let sequence = held.record.first_sequence + u64::from(*held.rows.last()?);
        Some(Position { time: held.record.arrival, sequence })
    }

    pub fn early_rows(&self) -> usize {
        self.early.len()
    }

    pub fn waiting_rows(&self) -> usize {
        let held: usize = self.on_time.iter().map(|held| held.rows.len() - held.next).sum();
        held + self.picked.len() + self.waiting.iter().map(|durable| durable.record.rows as usize).sum::<usize>()
    }

    #[cfg(test)]
    pub fn has_received_all(&self, log: &Log) -> bool {
        log.horizon(&self.plan.name, self.received).is_some()
    }

    pub fn unflushed_rows(&self) -> usize {
        self.unflushed_rows
    }

    /// Takes the next due rows, in order of position.
    fn pick(&mut self, log: &Log) {
        if !self.picked.is_empty() {
            return;
        }
        let frontier = match log.horizon(&self.plan.name, self.received) {
            Some(time) => Position { time, sequence: u64::MAX },
            None => Position { time: self.received_arrival, sequence: self.received },
        };
        let mut records: HashSet<u64> = HashSet::new();
        let mut bytes = 0;
        while self.picked.len() < CHUNK_ROWS && bytes < CHUNK_BYTES {
            let on_time = self.on_time.front().map(|held| {
                let sequence = held.record.first_sequence + u64::from(held.rows[held.next]);
                Position { time: held.record.arrival, sequence }
            });
            let early = self.early.peek().map(|Reverse(early)| early.position);
            let (position, takes_early) = match (on_time, early) {
                (Some(on_time), Some(early)) => (on_time.min(early), early < on_time),
                (Some(on_time), None) => (on_time, false),
                (None, Some(early)) => (early, true),
                (None, None) => break,
            };
            if position > frontier {
                break;
            }
            let pick = if takes_early {
                self.ticked = false;
                self.early.pop().map(|Reverse(Early { position, row, record })| Pick { record, row, position })
            } else {
                self.on_time.front_mut().map(|held| {
                    let row = held.rows[held.next];
                    held.next += 1;
                    if let Some(events) = &held.events {
                        self.picked_events.entry(held.record.first_sequence).or_insert_with(|| events.clone());
                    }
                    Pick { record: held.record.clone(), row, position }
                })
            };
            let Some(pick) = pick else { break };
            if records.insert(pick.record.first_sequence) {
                bytes += pick.record.bytes();
            }
            self.picked.push(pick);
            if self.on_time.front().is_some_and(|held| held.next == held.rows.len())
                && let Some(held) = self.on_time.pop_front()
            {
                held.events.iter().for_each(|events| log.forget_cached(events));
            }
        }
    }

    /// The generations that get every event, from now on: what was kept of them may be from another life of theirs.
    pub fn set_live(&mut self, live: Vec<Arc<ViewWriter>>) {
        self.live = live;
        self.lane.iter_mut().for_each(|lane| lane.kept.clear());
    }

    /// The picked rows as one aligned batch. Rows that no longer fit the definitions are set aside.
    async fn load(&mut self, log: &Log) -> Result<(Option<Positioned>, Vec<Unreadable>), IngestError> {
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut index: HashMap<u64, Option<usize>> = HashMap::new();
        let mut unreadable: Vec<Unreadable> = Vec::new();
        let mut indices = Vec::with_capacity(self.picked.len());
        let mut positions = Vec::with_capacity(self.picked.len());
        let mut absent: BTreeMap<u64, &RecordRef> = BTreeMap::new();
        for pick in &self.picked {
            if !self.picked_events.contains_key(&pick.record.first_sequence) {
                absent.insert(pick.record.first_sequence, &pick.record);
            }
        }
        let absent: Vec<&RecordRef> = absent.into_values().collect();
        let read = log.read_all(&absent).await?;
        let read: HashMap<u64, RecordBatch> =
            absent.iter().zip(read).map(|(record, events)| (record.first_sequence, events.batch)).collect();
        for pick in &self.picked {
            let first = pick.record.first_sequence;
            let at = match index.get(&first) {
                Some(at) => *at,
                None => {
                    let cached = self.picked_events.get(&first).map(|events| &events.batch);
                    let batch = cached.or_else(|| read.get(&first)).cloned();
                    let batch = batch.ok_or_else(|| LogError::Stopped { what: "a record was not read".into() })?;
                    let at = match self.plan.align(&batch, None) {
                        Ok(batch) => {
                            batches.push(batch);
                            Some(batches.len() - 1)
                        }
                        Err(error) => {
                            unreadable.push(Unreadable { first, batch, reason: error.to_string(), rows: Vec::new() });
                            None
                        }
                    };
                    index.insert(first, at);
                    at
                }
            };
            match at {
                Some(at) => {
                    indices.push((at, pick.row as usize));
                    positions.push(pick.position);
                }
                None => {
                    if let Some(found) = unreadable.iter_mut().find(|found| found.first == first) {
                        found.rows.push((pick.row, pick.position));
                    }
                }
            }
        }
        if indices.is_empty() {
            return Ok((None, unreadable));
        }
        let references: Vec<&RecordBatch> = batches.iter().collect();
        let batch = interleave_record_batch(&references, &indices)
            .map_err(|error| IngestError::Log(LogError::Encode(error.to_string())))?;
        Ok((Some(Positioned { batch, positions }), unreadable))
    }

    /// Applies one chunk of what is due. False: nothing was.
    async fn apply_chunk(&mut self, inner: &Inner, stream: &Stream) -> Result<bool, IngestError> {
        self.pick(&inner.log);
        if self.picked.is_empty() {
            return Ok(false);
        }
        if !self.ticked && self.picked.iter().any(|pick| pick.position.time > pick.record.arrival) {
            // An event that waited is applied at a time that no record tells of.
            inner.log.tick().await?;
        }
        self.ticked = true;
        let (chunk, unreadable) = self.load(&inner.log).await?;
        let project = inner.project_path();
        for found in unreadable {
            let positions = found.positions();
            let generation = Generation::new(&inner.options.project, "every view", "");
            let rows = found.rows.iter().map(|(row, _)| *row).collect();
            let aside = [SetAside { generation, rows, reason: found.reason }];
            dead_letter::write(&inner.options.store, &project, &stream.name, &found.batch, &positions, &aside)
                .await
                .map_err(IngestError::DeadLetter)?;
        }
        let last = self.picked.iter().map(|pick| pick.position).max().unwrap_or(self.applied);
        let chunk = chunk.map(|chunk| inner.redacted(&self.plan, chunk)).transpose()?;
        if let Some(chunk) = chunk.filter(|chunk| !chunk.positions.is_empty()) {
            let (aside, event_times) = self.write_live(inner, &chunk).await?;
            self.write_mark(inner, last).await?;
            dead_letter::write(&inner.options.store, &project, &stream.name, &chunk.batch, &chunk.positions, &aside)
                .await
                .map_err(IngestError::DeadLetter)?;
            measure(inner, stream, &chunk, &event_times);
            self.unflushed_rows += chunk.positions.len();
            self.unflushed.push(chunk);
        }
        self.unflushed_since.get_or_insert_with(Instant::now);
        for pick in self.picked.drain(..) {
            *self.release.entry(pick.record.place()).or_default() += 1;
        }
        self.applied = self.applied.max(last);
        self.picked_events.clear();
        stream.applied.send_replace(self.applied);
        Ok(true)
    }

    /// Applies rows to the live generations, after making sure that everything before is there.
    async fn write_live(
        &mut self,
        inner: &Inner,
        rows: &Positioned,
    ) -> Result<(Vec<SetAside>, Vec<Option<Times>>), IngestError> {
        let store = &*inner.options.online;
        let name = inner.mark_of(&self.plan.name);
        // What a call that failed has written is not known: the next one opens its lane anew.
        let mut lane = self.take_lane(inner).await?;
        if !self.live.is_empty() {
            let answers = store.read(&[Read::Mark(name), lane.read()]).await?;
            let is_there = match answers.first() {
                Some(Answer::Mark(Some(mark))) => self.marked.is_none_or(|marked| *mark >= marked),
                _ => false,
            };
            if !is_there {
                return Err(IngestError::Lost);
            }
            if !lane.is_there(answers.get(1)) {
                // The mark is there and what was before it is not: it was written over the gap.
                self.marked = None;
                return Err(IngestError::Lost);
            }
        }
        let done = apply_rows(inner, &mut lane, &self.plan, &self.live, rows).await;
        self.lane = done.is_ok().then_some(lane);
        done
    }

    async fn take_lane(&mut self, inner: &Inner) -> Result<Lane, IngestError> {
        if let Some(lane) = self.lane.take() {
            return Ok(lane);
        }
        let mark = format!("{}/live", inner.mark_of(&self.plan.name));
        let mut lane = Lane::open(&*inner.options.online, vec![mark]).await?.remove(0);
        lane.kept.turn_on();
        Ok(lane)
    }

    /// All live generations have every event up to this position.
    async fn write_mark(&mut self, inner: &Inner, position: Position) -> Result<(), IngestError> {
        if !self.live.is_empty() {
            let mark = Write::Mark(inner.mark_of(&self.plan.name), position);
            inner.options.online.write(vec![mark]).await?;
            self.marked = self.marked.max(Some(position));
        }
        Ok(())
    }

    /// What the mark says now. What is after it, and was written, has to be written again.
    pub fn look_at_mark(&mut self, inner: &Inner, mark: Position) {
        let written = self.marked.unwrap_or(self.history.manifest().applied);
        self.marked = Some(mark);
        if mark < written {
            tracing::warn!(source = %self.plan.name, "the online store lost its newest writes; they are written again");
            self.lost_after = Some(self.lost_after.map_or(mark, |lost| lost.min(mark)));
            for writer in &self.live {
                inner.set_phase(&writer.generation, Phase::Building { rows: 0 });
            }
        }
    }

    /// Writes everything that was applied after a position to the live generations, again: from history, and from memory
    /// what is not there yet.
    async fn write_again(&mut self, inner: &Inner, stream: &Stream) -> Result<(), IngestError> {
        let mut rows = 0;
        while let Some(after) = self.lost_after {
            let mut scan = self.history.scan(&self.plan, None, after);
            while let Some(part) = scan.next().await.transpose()? {
                rows += self.write_part_again(inner, &part).await?;
            }
            for index in 0..self.unflushed.len() {
                let part = self.unflushed[index].clone();
                rows += self.write_part_again(inner, &part).await?;
            }
            self.write_mark(inner, self.applied).await?;
            self.lost_after = None;
        }
        // What says which generations get events may have gone back as well.
        inner.remember_wanted(&stream.name, self).await?;
        for writer in &self.live {
            inner.set_phase(&writer.generation, Phase::Ready);
        }
        tracing::info!(source = %stream.name, rows, "what the online store lost is written again");
        Ok(())
    }

    async fn write_part_again(&mut self, inner: &Inner, part: &Positioned) -> Result<usize, IngestError> {
        let lost_after = self.lost_after.unwrap_or(Position::START);
        let from = part.positions.partition_point(|position| *position <= lost_after);
        let Some(last) = part.positions.last().copied().filter(|_| from < part.positions.len()) else { return Ok(0) };
        let batch = part.batch.slice(from, part.positions.len() - from);
        let part = Positioned { batch, positions: part.positions[from..].to_vec() };
        // What is set aside was set aside before, and is kept.
        self.write_live(inner, &part).await?;
        self.write_mark(inner, last).await?;
        self.lost_after = Some(last);
        Ok(part.positions.len())
    }

    /// Makes everything applied durable online and puts it into history. Returns the number of events.
    pub async fn flush(&mut self, inner: &Inner) -> Result<u64, IngestError> {
        inner.check_fence()?;
        let mut events = self.end_flush(inner).await?;
        if !self.release.is_empty() {
            self.begin_flush(inner);
            events += self.end_flush(inner).await?;
        }
        Ok(events)
    }

    /// Puts what was applied on its way into history; more can be applied meanwhile.
    fn begin_flush(&mut self, inner: &Inner) {
        let (online, wake) = (inner.options.online.clone(), inner.wake.clone());
        let (plan, writer, events) = (self.plan.clone(), self.history.writer(), self.unflushed.clone());
        let work = async move {
            online.sync().await?;
            Ok(if events.is_empty() { None } else { Some(writer.write(&plan, events).await?) })
        };
        let task = tokio::spawn(async move {
            let written = work.await;
            wake.notify_one();
            written
        });
        self.flushing = Some(Flushing {
            task,
            written: None,
            plan: self.plan.clone(),
            parts: self.unflushed.len(),
            rows: self.unflushed_rows,
            since: self.unflushed_since.take(),
            release: std::mem::take(&mut self.release),
        });
    }

    /// Waits for what is on its way into history, and lets the log go of it. May be given up and called again.
    async fn end_flush(&mut self, inner: &Inner) -> Result<u64, IngestError> {
        let Some(flushing) = &mut self.flushing else { return Ok(0) };
        if flushing.written.is_none() {
            let ended = (&mut flushing.task).await;
            let failed = |error: tokio::task::JoinError| Err(IngestError::Arrow(error.to_string()));
            flushing.written = Some(ended.unwrap_or_else(failed));
        }
        let done = match flushing.written.as_ref() {
            Some(Ok(written)) => commit(inner, &mut self.history, &flushing.plan, written.as_ref()).await,
            _ => Ok(0),
        };
        let Some(flushing) = self.flushing.take() else { return Ok(0) };
        let done = match flushing.written {
            Some(Err(error)) => Err(error),
            _ => done,
        };
        match done {
            Ok(events) => {
                self.grown |= events > 0;
                self.unflushed.drain(..flushing.parts);
                self.unflushed_rows -= flushing.rows;
                for (place, rows) in flushing.release {
                    inner.log.release(place, rows);
                }
                inner.log.delete_released();
            }
            Err(_) => {
                self.unflushed_since = flushing.since.or(self.unflushed_since);
                for (place, rows) in flushing.release {
                    *self.release.entry(place).or_default() += rows;
                }
            }
        }
        done
    }

    /// One round for this source: what is due is applied, what is old is flushed. True: there may be more to do at once.
    async fn step(&mut self, inner: &Arc<Inner>, stream: &Arc<Stream>) -> bool {
        if !self.imported || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        if let Err(error) = inner.check_fence() {
            stream.set_trouble(Some(error.to_string()));
            return false;
        }
        match self.try_step(inner, stream).await {
            Ok(more) => {
                if std::mem::take(&mut self.grown) {
                    crate::tables::start_if_due(inner, stream, self);
                }
                if self.retry_at.take().is_some() {
                    tracing::info!(source = %stream.name, "events are applied again");
                    stream.set_trouble(None);
                }
                self.retry_pause = RETRY_FIRST;
                more
            }
            Err(IngestError::Store(error @ StoreError::Fenced { .. })) => {
                inner.fence(&error);
                stream.set_trouble(inner.check_fence().err().map(|error| error.to_string()));
                false
            }
            Err(IngestError::Lost) => {
                if self.marked.is_none() {
                    let lost = std::mem::take(&mut self.live);
                    self.build_again(inner, stream, lost);
                }
                // Else the mark says from where on; if it says nothing, the chunk is applied again.
                self.lane = None;
                if let Err(error) = self.look(inner, stream).await {
                    tracing::debug!(source = %stream.name, %error, "the online store does not say what it has lost");
                    self.retry_at = Some(Instant::now() + self.retry_pause);
                }
                true
            }
            Err(error) => {
                let what = crate::error_chain(&error);
                if self.retry_at.is_none() {
                    tracing::error!(source = %stream.name, error = what, "events cannot be applied; they stay in the log, it is tried again");
                }
                stream.set_trouble(Some(what));
                self.retry_at = Some(Instant::now() + self.retry_pause);
                self.retry_pause = (self.retry_pause * 2).min(RETRY_LAST);
                false
            }
        }
    }

    async fn try_step(&mut self, inner: &Arc<Inner>, stream: &Arc<Stream>) -> Result<bool, IngestError> {
        if self.lost_after.is_some() {
            self.write_again(inner, stream).await?;
        }
        if self.flushing.as_ref().is_some_and(|flushing| flushing.task.is_finished()) {
            self.take_flushed(inner, stream).await;
        }
        if self.flushing.is_none() && self.flush_again_at.is_none_or(|at| Instant::now() >= at) {
            let asked = inner.flushes_asked.load(Ordering::Acquire);
            let is_asked = asked != std::mem::replace(&mut self.flushes_seen, asked);
            let is_old = |since: Instant| is_asked || since.elapsed() >= inner.options.flush_after;
            if self.unflushed_since.is_some_and(is_old) || self.unflushed_rows >= FLUSH_ROWS {
                self.look(inner, stream).await?;
                self.begin_flush(inner);
            }
        }
        if self.unflushed_rows >= UNFLUSHED_ROWS_MAX {
            return Ok(false);
        }
        self.hold_waiting(&inner.log).await?;
        self.apply_chunk(inner, stream).await
    }

    async fn take_flushed(&mut self, inner: &Inner, stream: &Stream) {
        match self.end_flush(inner).await {
            Ok(_) => {
                if self.flush_again_at.take().is_some() {
                    tracing::info!(source = %stream.name, "history is written again");
                    stream.set_trouble(None);
                }
            }
            // What answers online goes on: the events are in the log, and in memory up to a bound.
            Err(error) => {
                let what = crate::error_chain(&error);
                if self.flush_again_at.is_none() {
                    tracing::error!(source = %stream.name, error = what, "history cannot be written; events stay in the log, it is tried again");
                }
                stream.set_trouble(Some(what));
                self.flush_again_at = Some(Instant::now() + RETRY_LAST);
            }
        }
    }

    /// Until the next flush is due and may be tried.
    fn flush_in(&self, flush_after: Duration) -> Option<Duration> {
        if self.flushing.is_some() {
            // Its end is told.
            return None;
        }
        let due = flush_after.saturating_sub(self.unflushed_since?.elapsed());
        let allowed = self.flush_again_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        Some(due.max(allowed).max(Duration::from_millis(1)))
    }

    /// A store that lost its contents lost the facts too: such generations are built again from history. One that lost
    /// its newest writes lost its newest mark.
    pub async fn look(&mut self, inner: &Arc<Inner>, stream: &Arc<Stream>) -> Result<(), IngestError> {
        if self.live.is_empty() {
            return Ok(());
        }
        let mut reads: Vec<Read> = self.live.iter().map(|writer| Read::Fact(writer.generation.ready_fact())).collect();
        reads.push(Read::Mark(inner.mark_of(&stream.name)));
        let mut answers = inner.options.online.read(&reads).await?;
        let mark = match answers.pop() {
            Some(Answer::Mark(mark)) => mark,
            _ => None,
        };
        let mut answers = answers.iter();
        let is_there: Vec<bool> =
            self.live.iter().map(|_| matches!(answers.next(), Some(Answer::Fact(Some(_))))).collect();
        let mut is_there = is_there.into_iter();
        let (there, lost): (Vec<_>, Vec<_>) =
            self.live.drain(..).partition(|_| is_there.next().unwrap_or(false) && mark.is_some());
        if lost.is_empty() {
            self.live = there;
        } else {
            self.set_live(there);
        }
        self.build_again(inner, stream, lost);
        if let Some(mark) = mark.filter(|_| !self.live.is_empty()) {
            self.look_at_mark(inner, mark);
            if self.lost_after.is_some() {
                inner.wake.notify_one();
            }
        }
        Ok(())
    }

    fn build_again(&mut self, inner: &Arc<Inner>, stream: &Arc<Stream>, lost: Vec<Arc<ViewWriter>>) {
        if self.live.is_empty() {
            (self.marked, self.lost_after, self.lane) = (None, None, None);
        }
        if lost.is_empty() {
            return;
        }
        tracing::warn!(source = %stream.name, views = lost.len(), "the online store lost its contents; they are built again from history");
        for writer in &lost {
            inner.set_phase(&writer.generation, Phase::Building { rows: 0 });
        }
        self.building.extend(lost);
        crate::backfill::start(inner, stream, self);
    }

    /// Generations that were built join the live ones at what is applied. The caller has made sure that all of it is in
    /// them.
    ///
    /// What their builder has kept goes on being kept here: the facts that tell that they are complete are written after
    /// what it wrote, so that a store that loses the one loses the others, and is seen to have lost them.
    pub async fn join(&mut self, inner: &Inner, writers: &[Arc<ViewWriter>], kept: Kept) -> Result<(), IngestError> {
        let mut lane = self.take_lane(inner).await?;
        // While something is lost, the mark has to stay where it is.
        if self.lost_after.is_none() {
            let mark = inner.mark_of(&self.plan.name);
            let stored = match inner.options.online.read(&[Read::Mark(mark.clone())]).await?.pop() {
                Some(Answer::Mark(stored)) => stored,
                _ => None,
            };
            if !self.live.is_empty() && self.marked.is_some_and(|marked| stored.is_none_or(|stored| stored < marked)) {
                return Err(IngestError::Lost);
            }
            inner.options.online.write(vec![Write::Mark(mark, self.applied)]).await?;
            self.marked = self.marked.max(Some(self.applied));
        }
        self.building.retain(|writer| !writers.iter().any(|done| Arc::ptr_eq(done, writer)));
        let live = self.live.drain(..).chain(writers.iter().cloned()).collect();
        self.set_live(live);
        lane.kept = kept;
        self.lane = Some(lane);
        Ok(())
    }

    fn retry_in(&self) -> Option<Duration> {
        self.retry_at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

/// Events on their way into history.
struct Flushing {
    task: tokio::task::JoinHandle<Result<Option<Written>, IngestError>>,
    /// What the task has left behind, once it has ended.
    written: Option<Result<Option<Written>, IngestError>>,
    plan: Arc<SourcePlan>,
    /// So many of the first parts of what is not in history, with their rows.
    parts: usize,
    rows: usize,
    since: Option<Instant>,
    release: BTreeMap<(u64, u64), u64>,
}

async fn commit(
    inner: &Inner,
    history: &mut History,
    plan: &SourcePlan,
    written: Option<&Written>,
) -> Result<u64, IngestError> {
    // Whoever took over reads history first and the log then, and what gets there afterwards would be in its way.
    inner.log.check_writer().await?;
    match written {
        Some(written) => Ok(history.append_written(plan, written, (inner.options.clock)()).await?),
        None => Ok(0),
    }
}

/// Picked rows of one record that do not fit the source's columns any more.
struct Unreadable {
    first: u64,
    batch: RecordBatch,
    reason: String,
    rows: Vec<(u32, Position)>,
}

impl Unreadable {
    /// By row of the batch.
    fn positions(&self) -> Vec<Position> {
        let mut positions = vec![Position::START; self.batch.num_rows()];
        for (row, position) in &self.rows {
            positions[*row as usize] = *position;
        }
        positions
    }
}

/// Applies rows in order of position to these generations; returns what had to be set aside, and the times of the rows.
pub(crate) async fn apply_rows(
    inner: &Inner,
    lane: &mut Lane,
    plan: &SourcePlan,
    writers: &[Arc<ViewWriter>],
    rows: &Positioned,
) -> Result<(Vec<SetAside>, Vec<Option<Times>>), IngestError> {
    // Whoever forgets an entity waits for what was worked out without knowing.
    let _writing = inner.writing.read().await;
    let times = plan.times(&rows.batch, Some(&rows.positions))?;
    let mut aside = Vec::new();
    let mut work = Vec::new();
    for writer in writers {
        work.extend(writer.work(&rows.batch, &times, &mut aside));
    }
    aside.extend(apply(inner.hand(), lane, &work).await?.aside);
    Ok((aside, times))
}

/// Tells the meter how long the events of a chunk took.
fn measure(inner: &Inner, stream: &Stream, chunk: &Positioned, times: &[Option<Times>]) {
    let Some(meter) = &inner.options.meter else { return };
    let now = (inner.options.clock)();
    let since = |time: Micros| now.saturating_sub(time).max(0);
    let visible = |(position, times): (&Position, &Option<Times>)| Visible {
        since_event: since(times.map_or(position.time, |times| times.event_time)),
        since_arrival: since(position.time),
    };
    let events: Vec<Visible> = chunk.positions.iter().zip(times).map(visible).collect();
    meter.visible(&stream.name, &events);
}

/// The task: until the process ends, or everything is applied and flushed after [`Inner::stop`].
pub(crate) async fn run(inner: Arc<Inner>, mut durable: tokio::sync::mpsc::UnboundedReceiver<Durable>) {
    let mut stopping = inner.stopping.subscribe();
    loop {
        let mut streams = inner.streams();
        while let Ok(record) = durable.try_recv() {
            dispatch(&inner, &mut streams, record).await;
        }
        let mut more = false;
        let mut nap: Option<Duration> = None;
        for stream in streams.values() {
            let mut state = stream.state.lock().await;
            more |= state.step(&inner, stream).await;
            stream.early.store(state.early_rows() as u64, Ordering::Relaxed);
            stream.report(&state);
            let until_due = state.next_due().map(|due| {
                let micros = due.saturating_sub((inner.options.clock)()).max(0);
                Duration::from_micros(micros as u64).clamp(Duration::from_millis(1), NAP)
            });
            let until_flush = state.flush_in(inner.options.flush_after);
            nap = [nap, until_due, until_flush, state.retry_in()].into_iter().flatten().min();
        }
        if more {
            continue;
        }
        if *stopping.borrow() && durable.is_empty() {
            break;
        }
        let sleep = tokio::time::sleep(nap.unwrap_or(FLUSH_AFTER));
        tokio::select! {
            record = durable.recv() => match record {
                Some(record) => dispatch(&inner, &mut streams, record).await,
                // The log is gone after a failure; what is due may still be applied.
                None => tokio::time::sleep(NAP).await,
            },
            () = inner.wake.notified() => {}
            () = sleep => {}
            _ = stopping.changed() => {}
        }
    }
    for stream in inner.streams().values() {
        if let Err(error) = stream.state.lock().await.flush(&inner).await {
            let error = crate::error_chain(&error);
            tracing::warn!(source = %stream.name, error, "the last events could not be put into history; they stay in the log");
        }
    }
}

async fn dispatch(inner: &Inner, streams: &mut BTreeMap<Arc<str>, Arc<Stream>>, durable: Durable) {
    if !streams.contains_key(&durable.record.source) {
        *streams = inner.streams();
    }
    let Some(stream) = streams.get(&durable.record.source) else {
        // Only adopted sources can be pushed to, and they stay.
        tracing::error!(source = %durable.record.source, "an event of an unknown source stays in the log");
        return;
    };
    let mut state = stream.state.lock().await;
    if let Err(error) = state.receive(&inner.log, durable).await {
        // It keeps its place in the queue, and the next step of the applier tries it again.
        tracing::debug!(source = %stream.name, %error, "a record of the log could not be read back");
    }
}
