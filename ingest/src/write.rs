//! From rows of a source to writes of the online store, for whoever moves them: applier, backfill, materialization.
//!
//! Rows are grouped by entity first: an entity is read, changed and written once per call, whatever the number of its rows.
//! A store that is away fails the call, which is then repeated: every write is idempotent by position. A single entity that
//! the store refuses, while it takes other writes, is set aside with a reason, and does not stop the rest.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use bytes::Bytes;
use feature_defs::as_of::{Row, Times};
use feature_defs::plan::{ViewPlan, ViewPlanKind, ViewRows};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Type;
use feature_defs::window::{TileId, WindowEvent};
use online_store::key::{Generation, Key};
use online_store::tile::{Layout, Tiles};
use online_store::{Answer, OnlineStore, Read, StoreError, Write, row};

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
    pub fn new(project: &str, view: Arc<ViewPlan>) -> ViewWriter {
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
        ViewWriter { view, generation, layout, types }
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

/// Applies the work of any views; each entity of a view occurs once. Returns what the store refused.
pub async fn apply(store: &dyn OnlineStore, project: &str, work: &[EntityWork]) -> Result<Vec<SetAside>, StoreError> {
    let mut aside = Vec::new();
    for group in work.chunks(ENTITIES_PER_CALL) {
        let mut parts = vec![group];
        while let Some(part) = parts.pop() {
            let error = match apply_group(store, part).await {
                Ok(()) => continue,
                Err(error) => error,
            };
            // A refusal may be about one entity (too large, damaged) or about the store as a whole (out of memory, read
            // only): the store is asked to take something harmless before an entity is blamed.
            match (&error, part) {
                (StoreError::Refused { .. } | StoreError::Corrupt { .. }, [one]) => {
                    store.write(vec![Write::Fact(format!("probe/{project}"), Some(Bytes::from_static(b"1")))]).await?;
                    aside.push(SetAside {
                        generation: one.writer.generation.clone(),
                        rows: one.rows.clone(),
                        reason: error.to_string(),
                    });
                }
                (StoreError::Refused { .. } | StoreError::Corrupt { .. }, part) => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.push(second);
                    parts.push(first);
                }
                _ => return Err(error),
            }
        }
    }
    Ok(aside)
}

async fn apply_group(store: &dyn OnlineStore, group: &[EntityWork]) -> Result<(), StoreError> {
    let reads: Vec<Read> = group
        .iter()
        .filter(|work| matches!(work.change, EntityChange::Events { .. }))
        .map(|work| Read::AllTiles(work.key.clone()))
        .collect();
    let answers = if reads.is_empty() { Vec::new() } else { store.read(&reads).await? };
    let mut answers = answers.into_iter();
    let mut writes = Vec::with_capacity(group.len());
    for work in group {
        match (&work.change, &work.writer.layout) {
            (EntityChange::Row(row), _) => {
                writes.push(Write::Row { key: work.key.clone(), blob: row.clone(), expires: None })
            }
            (EntityChange::Events { events, position }, Some(layout)) => {
                let mut tiles: Tiles = match answers.next() {
                    Some(Answer::AllTiles { position, tiles }) => layout
                        .decode_answer(position, tiles)
                        .map_err(|error| StoreError::Corrupt { key: work.key.to_string(), what: error.to_string() })?,
                    _ => Tiles::default(),
                };
                let events = reachable(layout, &tiles, events);
                if let Some(change) = layout.apply(&mut tiles, events, *position) {
                    let (key, position) = (work.key.clone(), change.position);
                    writes.push(Write::Tiles {
                        key,
                        position,
                        set: change.set,
                        remove: change.remove,
                        epoch: 0,
                        expires: None,
                    });
                }
            }
            (EntityChange::Events { .. }, None) => unreachable!("only views with tiles have events"),
        }
    }
    if !writes.is_empty() {
        store.write(writes).await?;
    }
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
