//! From rows of a source to writes of the online store, for whoever moves them: applier, backfill, materialization.
//!
//! Rows are grouped by entity first: an entity is read, changed and written once per call, whatever the number of its rows.
//! A store that is away fails the call, which is then repeated: every write is idempotent by position. A single entity that
//! the store refuses, while it takes other writes, is set aside with a reason, and does not stop the rest.
//!
//! A store may lose the newest of what it took (a crash of Redis that syncs once a second, a failover). Writers therefore
//! end each piece of work with a *mark*, and read it before the next: a mark that went back says that everything after it
//! has to be written again, before an entity gets a later position that would hide what it lacks.

mod kept;

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use bytes::Bytes;
use feature_defs::as_of::{Row, Times};
use feature_defs::plan::{ViewPlan, ViewPlanKind, ViewRows};
use feature_defs::time::{Micros, Position, STATIC};
use feature_defs::value::{DecodeError, Type, decode_i64, encode_cells};
use feature_defs::window::{DAY, TileId, WindowEvent};
use online_store::key::{Generation, Key};
use online_store::tile::{Layout, Tiles};
use online_store::{Answer, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

use kept::Entity;
pub use kept::Kept;

/// Entities read and written in one call of the store. An entity of windows up to 7 d has about 250 tiles of a few
/// hundred bytes, so a call moves some 30 MB at most.
const ENTITIES_PER_CALL: usize = 512;

/// Writes one generation of one view.
#[derive(Debug)]
pub struct ViewWriter {
    pub view: Arc<ViewPlan>,
    pub generation: Generation,
    layout: Option<Layout>,
    types: Vec<Type>,
    /// How long after its event time the store may forget what is stored of an entity; none: never.
    expires_after: Option<Micros>,
}

/// As whom something is written.
#[derive(Clone, Copy)]
pub struct Hand<'a> {
    pub store: &'a dyn OnlineStore,
    pub project: &'a str,
    /// Tiles of a writer with a larger one are not touched.
    pub epoch: u64,
    pub now: Micros,
    /// Another number than before says that entities were removed from the store behind the writers' backs.
    pub removals: u64,
}

/// Calls that follow each other, each behind the mark of the one before: what went through a lane is still there, or the
/// lane's mark is not. Nobody else writes tiles of the generations that a lane writes.
#[derive(Debug)]
pub struct Lane {
    mark: String,
    last: Position,
    /// What the store has of entities that went through it.
    pub kept: Kept,
}

impl Lane {
    /// Goes on where the marks are: they never go back, so those to come are after all that were.
    pub async fn open(store: &dyn OnlineStore, marks: Vec<String>) -> Result<Vec<Lane>, StoreError> {
        let answers = store.read(&marks.iter().cloned().map(Read::Mark).collect::<Vec<_>>()).await?;
        let lane = |(mark, answer)| match answer {
            Answer::Mark(Some(last)) => Lane { mark, last, kept: Kept::default() },
            _ => Lane { mark, last: Position::START, kept: Kept::default() },
        };
        Ok(marks.into_iter().zip(answers).map(lane).collect())
    }

    /// What a call has to read to know whether the one before is still there.
    pub fn read(&self) -> Read {
        Read::Mark(self.mark.clone())
    }

    /// Whether it is, by the answer.
    pub fn is_there(&self, answer: Option<&Answer>) -> bool {
        match answer {
            Some(Answer::Mark(mark)) => self.last == Position::START || mark.is_some_and(|mark| mark >= self.last),
            _ => false,
        }
    }

    pub async fn check(&self, store: &dyn OnlineStore) -> Result<(), WriteError> {
        let answers = store.read(&[self.read()]).await?;
        if self.is_there(answers.first()) { Ok(()) } else { Err(WriteError::Lost) }
    }

    fn next(&self) -> Position {
        let before = self.last.max(Position { time: 0, sequence: 0 });
        Position { sequence: before.sequence + 1, ..before }
    }

    /// Writes, with the lane's next mark behind.
    pub async fn write(&mut self, store: &dyn OnlineStore, mut writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        writes.push(Write::Mark(self.mark.clone(), self.next()));
        let mut outcome = store.write(writes).await?;
        // The mark is a write as well.
        outcome.applied = outcome.applied.saturating_sub(1);
        self.last = self.next();
        Ok(outcome)
    }
}

/// What became of rows.
#[derive(Debug, Default)]
pub struct Applied {
    /// Rows that the store took.
    pub applied: u64,
    /// Rows that were there already, or older than what was.
    pub stale: u64,
    pub aside: Vec<SetAside>,
}

/// Why something was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the online store lost what was written last; it is written again")]
    Lost,
}

impl EntityWork {
    fn is_row(&self) -> bool {
        matches!(self.change, EntityChange::Row(_))
    }
}

/// Everything new about one entity.
#[derive(Debug)]
pub struct EntityWork {
    pub writer: Arc<ViewWriter>,
    pub key: Key,
    pub change: EntityChange,
    /// Rows of the source batch it came from.
    pub rows: Vec<u32>,
}

#[derive(Debug)]
pub enum EntityChange {
    /// The latest of the new rows.
    Row(Bytes),
    /// In order of position, and the position to be applied with them.
    Events { events: Vec<WindowEvent>, position: Position },
}

/// Rows that could not be applied to one view.
#[derive(Debug)]
pub struct SetAside {
    pub generation: Generation,
    pub rows: Vec<u32>,
    pub reason: String,
}

impl ViewWriter {
    /// With `expires`, the store may forget what no request of now can see any more.
    pub fn new(project: &str, view: Arc<ViewPlan>, expires: bool) -> ViewWriter {
        let layout = match &view.kind {
            ViewPlanKind::Windowed { aggregates, windows, levels: Some(levels), .. } => Some(Layout {
                aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
                windows: windows.clone(),
                levels: levels.clone(),
            }),
            _ => None,
        };
        let generation = Generation::new(project, &view.name, view.storage_digest.as_str());
        let types = view.row_types();
        let expires_after = match &view.kind {
            ViewPlanKind::AsOf { max_age, .. } => max_age.ttl.map(|ttl| ttl.saturating_add(max_age.keep)),
            // A day more than any window reaches: the clocks of readers and of the store need not agree.
            ViewPlanKind::Windowed { windows, .. } => {
                let longest = windows.iter().map(|window| window.length).max().unwrap_or(0);
                let hop = windows.iter().filter_map(|window| window.hop).max().unwrap_or(0);
                Some(longest.saturating_add(hop).saturating_add(DAY))
            }
        };
        let expires_after = expires_after.filter(|_| expires);
        ViewWriter { view, generation, layout, types, expires_after }
    }

    /// When an entity whose newest event has this time may be forgotten.
    fn expires(&self, event_time: Micros) -> Option<Micros> {
        self.expires_after.filter(|_| event_time != STATIC).map(|after| event_time.saturating_add(after))
    }

    /// A write of a row made by [`ViewWriter::row`] or [`ViewWriter::blobs`].
    pub fn write_row(&self, key: Key, blob: Bytes) -> Write {
        let event_time = row::order(&blob).first_chunk().map_or(STATIC, |bytes| decode_i64(*bytes));
        Write::Row { key, expires: self.expires(event_time), blob }
    }

    /// Rows of the view in a batch; those that cannot be evaluated are set aside one by one.
    pub fn rows(&self, batch: &RecordBatch, times: &[Option<Times>], aside: &mut Vec<SetAside>) -> Vec<ViewRows> {
        let mut done = Vec::new();
        let mut parts = vec![(0, batch.num_rows())];
        while let Some((from, length)) = parts.pop() {
            match self.view.rows(&batch.slice(from, length), &times[from..from + length]) {
                Ok(mut rows) => {
                    rows.source_rows.iter_mut().for_each(|row| *row += from as u32);
                    done.push(rows);
                }
                Err(error) if length == 1 => aside.push(SetAside {
                    generation: self.generation.clone(),
                    rows: vec![from as u32],
                    reason: error.to_string(),
                }),
                Err(_) => {
                    let half = length / 2;
                    parts.push((from + half, length - half));
                    parts.push((from, half));
                }
            }
        }
        done
    }

    /// The blobs of all rows, at one position: slices of one buffer, without a value for each cell.
    pub fn blobs(&self, rows: &ViewRows, position: Position) -> Vec<Bytes> {
        let cells = rows.cells(&self.types);
        let mut buffer = Vec::with_capacity(rows.len() * (row::HEADER_BYTES + 1 + cells.len() * 9));
        let mut ends = Vec::with_capacity(rows.len());
        for (index, times) in rows.times.iter().enumerate() {
            row::encode_header(&Times { position, ..*times }, rows.deleted[index], &mut buffer);
            encode_cells(&cells, index, &mut buffer);
            ends.push(buffer.len());
        }
        let buffer = Bytes::from(buffer);
        let mut start = 0;
        let slice = |end| {
            let slice = buffer.slice(start..end);
            start = end;
            slice
        };
        ends.into_iter().map(slice).collect()
    }

    pub fn row(&self, rows: &ViewRows, index: usize, times: Times) -> Bytes {
        row::encode(&Row { times, deleted: rows.deleted[index], values: rows.values(index, &self.types) })
    }

    pub fn event(&self, rows: &ViewRows, index: usize, times: Times) -> WindowEvent {
        WindowEvent { times, inputs: rows.values(index, &self.types) }
    }

    /// What a batch in order of position changes, by entity.
    pub fn work(
        self: &Arc<Self>,
        batch: &RecordBatch,
        times: &[Option<Times>],
        aside: &mut Vec<SetAside>,
    ) -> Vec<EntityWork> {
        let mut work: Vec<EntityWork> = Vec::new();
        let mut known: HashMap<Box<[u8]>, usize> = HashMap::new();
        for rows in self.rows(batch, times, aside) {
            for index in 0..rows.len() {
                let Some(entity) = rows.keys.get(index) else { continue };
                let times = rows.times[index];
                let change = if self.layout.is_some() {
                    EntityChange::Events { events: vec![self.event(&rows, index, times)], position: times.position }
                } else {
                    EntityChange::Row(self.row(&rows, index, times))
                };
                let source_row = rows.source_rows[index];
                if let Some(at) = known.get(entity) {
                    work[*at].change.join(change);
                    work[*at].rows.push(source_row);
                } else {
                    known.insert(entity.into(), work.len());
                    let key = self.generation.key(entity);
                    work.push(EntityWork { writer: self.clone(), key, change, rows: vec![source_row] });
                }
            }
        }
        work
    }
}

impl EntityChange {
    /// Adds what came later for the same entity.
    pub fn join(&mut self, later: EntityChange) {
        match (self, later) {
            (EntityChange::Row(row), EntityChange::Row(later)) => {
                if let Some((merged, _)) = row::merge(row, &later) {
                    *row = merged;
                }
            }
            (EntityChange::Events { events, position }, EntityChange::Events { events: later, position: last }) => {
                events.extend(later);
                *position = last.max(*position);
            }
            _ => unreachable!("the changes of one view are of one kind"),
        }
    }
}

/// Applies the work of any views; each entity of a view occurs once. When it returns, all of it is there; when something
/// was lost meanwhile, nothing was put on top of the gap.
pub async fn apply(hand: Hand<'_>, lane: &mut Lane, work: &[EntityWork]) -> Result<Applied, WriteError> {
    let mut done = Applied::default();
    lane.kept.see(hand.removals);
    // Rows and tiles apart: the store counts what was stale, and for tiles it must be known that nothing was.
    for group in work.chunk_by(|a, b| a.is_row() == b.is_row()).flat_map(|kind| kind.chunks(ENTITIES_PER_CALL)) {
        let mut parts = vec![group];
        while let Some(part) = parts.pop() {
            let error = match apply_group(hand, lane, part, &mut done).await {
                Ok(()) => continue,
                Err(error) => error,
            };
            // A refusal may be about one entity (too large, damaged) or about the store as a whole (out of memory, read
            // only): the store is asked to take something harmless before an entity is blamed.
            match (&error, part) {
                (WriteError::Store(StoreError::Refused { .. } | StoreError::Corrupt { .. }), [one]) => {
                    let name = format!("probe/{}", hand.project);
                    hand.store.write(vec![Write::Fact(name, Some(Bytes::from_static(b"1")))]).await?;
                    done.aside.push(SetAside {
                        generation: one.writer.generation.clone(),
                        rows: one.rows.clone(),
                        reason: error.to_string(),
                    });
                }
                (WriteError::Store(StoreError::Refused { .. } | StoreError::Corrupt { .. }), part) => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.push(second);
                    parts.push(first);
                }
                _ => return Err(error),
            }
        }
    }
    lane.check(hand.store).await?;
    Ok(done)
}

async fn apply_group(
    hand: Hand<'_>,
    lane: &mut Lane,
    group: &[EntityWork],
    done: &mut Applied,
) -> Result<(), WriteError> {
    if group.iter().all(EntityWork::is_row) {
        return apply_rows(hand, lane, group, done).await;
    }
    // What was kept is used once: if the store has something else, the second time everything is read.
    if let Some(mut changed) = read_entities(hand, lane, group).await? {
        return apply_events(hand, lane, group, &mut changed, done).await;
    }
    match read_entities(hand, lane, group).await? {
        Some(mut changed) => apply_events(hand, lane, group, &mut changed, done).await,
        None => Err(WriteError::Lost),
    }
}

/// Rows hide nothing: whether the ones before are there is looked at in the end.
async fn apply_rows(
    hand: Hand<'_>,
    lane: &mut Lane,
    group: &[EntityWork],
    done: &mut Applied,
) -> Result<(), WriteError> {
    let row = |work: &EntityWork| match &work.change {
        EntityChange::Row(blob) => Some(work.writer.write_row(work.key.clone(), blob.clone())),
        EntityChange::Events { .. } => None,
    };
    let outcome = lane.write(hand.store, group.iter().filter_map(row).collect()).await?;
    (done.applied, done.stale) = (done.applied + outcome.applied, done.stale + outcome.stale);
    Ok(())
}

/// The tiles of the entities, as far as their events need them, from what was kept and from the store. None: what was kept
/// is not what the store has; it is forgotten now.
async fn read_entities(
    hand: Hand<'_>,
    lane: &mut Lane,
    group: &[EntityWork],
) -> Result<Option<Vec<Entity>>, WriteError> {
    let mut reads: Vec<Read> = Vec::new();
    let mut entities: Vec<Option<Entity>> = Vec::with_capacity(group.len());
    for work in group {
        let (EntityChange::Events { events, .. }, Some(layout)) = (&work.change, &work.writer.layout) else {
            unreachable!("only views with tiles have events");
        };
        let entity = lane.kept.take(&work.key, hand.now);
        match &entity {
            None => reads.push(Read::AllTiles(work.key.clone())),
            Some(entity) => {
                let absent = layout.absent(&entity.tiles, reachable(layout, &entity.tiles, events));
                if !absent.is_empty() {
                    reads.push(Read::Tiles(work.key.clone(), absent));
                }
            }
        }
        entities.push(entity);
    }
    reads.push(lane.read());
    let answers = hand.store.read(&reads).await?;
    if !lane.is_there(answers.last()) {
        return Err(WriteError::Lost);
    }
    let mut answered = reads.into_iter().zip(answers).peekable();
    let mut read = Vec::with_capacity(group.len());
    for (work, entity) in group.iter().zip(entities) {
        let (EntityChange::Events { events, .. }, Some(layout)) = (&work.change, &work.writer.layout) else { continue };
        let corrupt = |error: DecodeError| StoreError::Corrupt { key: work.key.to_string(), what: error.to_string() };
        let is_asked = |(read, _): &(Read, Answer)| match read {
            Read::AllTiles(key) | Read::Tiles(key, _) => *key == work.key,
            _ => false,
        };
        let entity = match (answered.next_if(is_asked), entity) {
            (None, Some(entity)) => entity,
            (Some((_, Answer::AllTiles { position, tiles })), _) => {
                let tiles = layout.decode_stored(position, tiles, events).map_err(corrupt)?;
                // What it takes is counted as soon as it is written; what is not written is small.
                Entity { tiles, bytes: 0, until: None }
            }
            (Some((Read::Tiles(_, ids), Answer::Tiles { position, tiles })), Some(mut entity)) => {
                if position != entity.tiles.position || tiles.iter().any(Option::is_none) {
                    return Ok(None);
                }
                for (id, bytes) in ids.into_iter().zip(tiles.into_iter().flatten()) {
                    layout.supply(&mut entity.tiles, id, &bytes).map_err(corrupt)?;
                }
                entity
            }
            _ => Entity { tiles: Tiles::default(), bytes: 0, until: None },
        };
        read.push(entity);
    }
    Ok(Some(read))
}

/// Applies the events of each entity to its tiles, and writes what that changes.
async fn apply_events(
    hand: Hand<'_>,
    lane: &mut Lane,
    group: &[EntityWork],
    entities: &mut Vec<Entity>,
    done: &mut Applied,
) -> Result<(), WriteError> {
    let mut writes = Vec::with_capacity(group.len() + 1);
    let (mut events_new, mut events_old) = (0, 0);
    for (work, entity) in group.iter().zip(entities.iter_mut()) {
        let (EntityChange::Events { events, position }, Some(layout)) = (&work.change, &work.writer.layout) else {
            continue;
        };
        let tiles = &mut entity.tiles;
        let before = tiles.position.unwrap_or(Position::START);
        let new = events.iter().filter(|event| event.times.position > before).count() as u64;
        (events_new, events_old) = (events_new + new, events_old + events.len() as u64 - new);
        let newest = events.iter().map(|event| event.times.event_time).max().unwrap_or(STATIC);
        let events: Vec<&WindowEvent> = reachable(layout, tiles, events).collect();
        if let Some(change) = layout.apply(tiles, events, *position) {
            let expires = work.writer.expires(newest);
            // The store keeps the latest of all expiries, so the earliest of those given is safe to go by.
            entity.until = expires.map(|expires| entity.until.map_or(expires, |until| until.max(expires)));
            entity.bytes = entity.bytes.max(change.set.iter().map(|(_, tile)| tile.len() as u64).sum());
            writes.push(Write::Tiles {
                key: work.key.clone(),
                position: change.position,
                epoch: hand.epoch,
                set: change.set,
                remove: change.remove,
                expires,
            });
        }
    }
    let count = writes.len() as u64;
    let is_taken = count == 0 || lane.write(hand.store, writes).await?.applied == count;
    // What somebody else was faster with is not what is at hand here.
    if is_taken {
        for (work, mut entity) in group.iter().zip(entities.drain(..)) {
            let Some(layout) = &work.writer.layout else { continue };
            layout.put_aside(&mut entity.tiles);
            lane.kept.put(work.key.clone(), entity);
        }
    }
    (done.applied, done.stale) = (done.applied + events_new, done.stale + events_old);
    Ok(())
}

/// The events that any window can still reach once all of them are applied, and the latest of the others: the layout
/// would drop their tiles again right away, and has to see one to know that something was dropped. A view built from
/// years of history keeps its last days, so this is most of the work of a backfill.
fn reachable<'a>(
    layout: &Layout,
    tiles: &Tiles,
    events: &'a [WindowEvent],
) -> impl Iterator<Item = &'a WindowEvent> + use<'a> {
    // Those applied before are skipped by the layout in any case.
    let applied = tiles.position.unwrap_or(Position::START);
    let new = || events.iter().enumerate().filter(move |(_, event)| event.times.position > applied);
    let finest = layout.levels.finest();
    let stored = TileId { level: finest, start: Micros::MIN }..=TileId { level: finest, start: Micros::MAX };
    let stored = tiles.tiles.range(stored).next_back().map(|(id, _)| id.start);
    let newest = new().map(|(_, event)| TileId::containing(event.times.event_time, finest).start).max().max(stored);
    let earliest_t = newest.unwrap_or(Micros::MIN).saturating_sub(finest);
    // The same for every event, so it is computed once per level.
    let reach: Vec<Micros> = layout.levels.all().iter().map(|level| layout.reach(*level, earliest_t)).collect();
    let mut is_kept = vec![false; events.len()];
    let mut dropped: Option<usize> = None;
    for (index, event) in new() {
        let event_time = event.times.event_time;
        is_kept[index] = layout.tiles_of(event_time).zip(&reach).any(|(tile, reach)| tile.end() > *reach);
        if !is_kept[index] && dropped.is_none_or(|dropped| events[dropped].times.event_time <= event_time) {
            dropped = Some(index);
        }
    }
    if let Some(dropped) = dropped {
        is_kept[dropped] = true;
    }
    events.iter().zip(is_kept).filter(|(_, is_kept)| *is_kept).map(|(event, _)| event)
}

#[cfg(test)]
mod tests;
