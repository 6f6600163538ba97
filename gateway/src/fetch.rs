//! From rows of entity keys to what the views of a service answer: one read of the online store for everything.
//!
//! The problem is to say only what is true. A row is answered at one time t; the store holds the present, which may be
//! ahead of a requested t, behind the clock, half backfilled, or away. Whatever cannot be said exactly at t is UNAVAILABLE
//! with its reason, and everything else is what the offline engine would have said for the same row at t.
//!
//! Time: without `at`, t is the later of the clock and the newest position read, so that nothing read lies in the future
//! of its answer. Which tiles a window needs depends on t, so in the rare case that a position is ahead of the clock the
//! windows are read once more for the later t.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use feature_defs::as_of::Row;
use feature_defs::catalog::Visibility;
use feature_defs::plan::{ServicePlan, ViewAnswer, ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position, STATIC, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{TileId, Window};
use online_store::key::{Generation, Key};
use online_store::tile::{AtBeforeStore, Layout, Tiles};
use online_store::{Answer, OnlineStore, Read, StoreError, row};
use tokio::time::Instant;

use crate::request::Rows;
use crate::status::Failure;

/// Tiles that one request may read. The largest requests people send, 10,000 rows over five windowed views, take about a
/// million; a request beyond this would hold gigabytes.
const TILES_MAX: usize = 2_000_000;
/// How often windows are read again because what was read is newer than the time they were read for. Each time means that
/// events were applied in between; after the last, windows that are not exact say so.
const REREADS_MAX: usize = 2;

/// Why a value is UNAVAILABLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    Timeout,
    Backfilling,
    AtBeforeStore,
    StoreError,
    OfflineOnly,
}

/// The time rows are answered at.
#[derive(Debug, Clone)]
pub enum When {
    /// At this clock reading, or later if the store is ahead of it.
    Now(Micros),
    /// One time per row.
    At(Vec<Micros>),
}

/// What the inputs of a service answered.
#[derive(Debug)]
pub struct Fetched {
    pub inputs: Vec<FetchedInput>,
    /// The time of each row.
    pub at: Vec<Micros>,
    /// Some value is older than its view's freshness.
    pub stale: bool,
    /// What went wrong with the store, for metrics.
    pub store_error: Option<StoreError>,
}

#[derive(Debug)]
pub struct FetchedInput {
    pub answer: ViewAnswer,
    /// Of rows that are UNAVAILABLE.
    pub reasons: Vec<Option<Reason>>,
    /// The position applied for each row's entity.
    pub positions: Vec<Option<Position>>,
}

impl Fetched {
    pub fn answers(&self) -> Vec<ViewAnswer> {
        self.inputs.iter().map(|input| input.answer.clone()).collect()
    }
}

/// Reads everything that `service` needs for these rows. What the store has not answered by the deadline is UNAVAILABLE.
pub async fn fetch(
    service: &ServicePlan,
    project: &str,
    rows: &Rows,
    when: When,
    deadline: Instant,
    store: &dyn OnlineStore,
) -> Result<Fetched, Failure> {
    let mut plan = ReadPlan::new(service, project, rows);
    let mut at = match when {
        When::Now(clock) => vec![clock; rows.count],
        When::At(ref at) => at.clone(),
    };
    plan.name_tiles(&at)?;
    let mut found = plan.read(store, deadline).await;
    if let (When::Now(clock), Ok(answers)) = (&when, &mut found) {
        let mut t = *clock;
        for _ in 0..=REREADS_MAX {
            let newest = answers.newest();
            if newest <= t {
                break;
            }
            t = newest;
            at = vec![t; rows.count];
            if plan.name_tiles(&at)? {
                match plan.reread(store, deadline, answers).await {
                    Ok(()) => {}
                    Err(missing) => {
                        found = Err(missing);
                        break;
                    }
                }
            }
        }
    }
    let (answers, store_error) = match found {
        Ok(answers) => (Ok(answers), None),
        Err(Missing { reason, error }) => (Err(reason), error),
    };
    let mut stale = false;
    let inputs = plan.inputs.iter().map(|input| input.judge(&plan, &answers, &at, &mut stale)).collect();
    Ok(Fetched { inputs, at, stale, store_error })
}

/// What is read, each thing once.
struct ReadPlan<'a> {
    inputs: Vec<Input<'a>>,
    generations: Vec<Generation>,
    slots: Vec<Slot>,
    rows: usize,
}

/// One entity of one view.
struct Slot {
    key: Key,
    /// None for as-of views.
    tiles: Option<Vec<TileId>>,
}

/// One input of the service.
struct Input<'a> {
    view: &'a ViewPlan,
    kind: Kind,
    /// For each row its slot; None where the key holds a null.
    slots: Vec<Option<usize>>,
}

enum Kind {
    OfflineOnly,
    AsOf { generation: usize },
    Windowed { generation: usize, layout: Layout, outputs: Vec<(usize, Window)> },
}

/// What the store answered.
struct Answers {
    /// By generation.
    ready: Vec<bool>,
    /// By slot.
    slots: Vec<Answer>,
}

/// The store did not answer.
struct Missing {
    reason: Reason,
    error: Option<StoreError>,
}

impl<'a> ReadPlan<'a> {
    fn new(service: &'a ServicePlan, project: &str, rows: &Rows) -> ReadPlan<'a> {
        let mut plan = ReadPlan { inputs: Vec::new(), generations: Vec::new(), slots: Vec::new(), rows: rows.count };
        let mut known: HashMap<(usize, Box<[u8]>), usize> = HashMap::new();
        for input in &service.inputs {
            let view: &ViewPlan = &input.view;
            if view.is_offline_only() {
                plan.inputs.push(Input { view, kind: Kind::OfflineOnly, slots: vec![None; rows.count] });
                continue;
            }
            let generation = plan.generation(Generation::new(project, &view.name, view.storage_digest.as_str()));
            let types = view.keys.iter().map(|key| &key.key_type);
            let columns: Vec<_> = input.keys.iter().map(|key| rows.columns[*key].clone()).zip(types).collect();
            let keys = view.entity_keys(&columns, rows.count);
            let mut slots = Vec::with_capacity(rows.count);
            for row in 0..rows.count {
                let slot = keys.get(row).map(|entity| {
                    let next = plan.slots.len();
                    let slot = *known.entry((generation, entity.into())).or_insert(next);
                    if slot == next {
                        let key = plan.generations[generation].key(entity);
                        let tiles = view.is_windowed().then(Vec::new);
                        plan.slots.push(Slot { key, tiles });
                    }
                    slot
                });
                slots.push(slot);
            }
            let kind = match &view.kind {
                ViewPlanKind::AsOf { .. } => Kind::AsOf { generation },
                ViewPlanKind::Windowed { aggregates, outputs, windows, levels } => match levels {
                    None => Kind::OfflineOnly,
                    Some(levels) => Kind::Windowed {
                        generation,
                        layout: Layout {
                            aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
                            windows: windows.clone(),
                            levels: levels.clone(),
                        },
                        outputs: outputs.iter().map(|output| (output.aggregate, output.window)).collect(),
                    },
                },
            };
            plan.inputs.push(Input { view, kind, slots });
        }
        plan
    }

    fn generation(&mut self, generation: Generation) -> usize {
        match self.generations.iter().position(|known| *known == generation) {
            Some(index) => index,
            None => {
                self.generations.push(generation);
                self.generations.len() - 1
            }
        }
    }

    /// Names the tiles that the windows need at these times. Returns whether they need any that were not named before.
    fn name_tiles(&mut self, at: &[Micros]) -> Result<bool, Failure> {
        let mut wanted: HashMap<usize, BTreeSet<TileId>> = HashMap::new();
        let mut count = 0;
        for input in &self.inputs {
            let Kind::Windowed { layout, .. } = &input.kind else { continue };
            let mut of_time: HashMap<Micros, Vec<TileId>> = HashMap::new();
            let mut done: BTreeSet<(usize, Micros)> = BTreeSet::new();
            for (slot, t) in input.slots.iter().zip(at) {
                let Some(slot) = slot else { continue };
                if !done.insert((*slot, *t)) {
                    continue;
                }
                let tiles = of_time.entry(*t).or_insert_with(|| layout.tiles_at(*t));
                let of_slot = wanted.entry(*slot).or_default();
                let before = of_slot.len();
                of_slot.extend(tiles.iter().copied());
                count += of_slot.len() - before;
                if count > TILES_MAX {
                    let text = format!("these rows need more than {TILES_MAX} window tiles; send fewer rows at once");
                    return Err(Failure::invalid(text));
                }
            }
        }
        let mut more = false;
        for (slot, tiles) in wanted {
            let tiles: Vec<TileId> = tiles.into_iter().collect();
            let named = &mut self.slots[slot].tiles;
            if named.as_ref() != Some(&tiles) {
                more = true;
                *named = Some(tiles);
            }
        }
        Ok(more)
    }

    /// One call to the store for the markers of generations and everything else.
    async fn read(&self, store: &dyn OnlineStore, deadline: Instant) -> Result<Answers, Missing> {
        let facts = self.generations.iter().map(|generation| Read::Fact(generation.ready_fact()));
        let reads: Vec<Read> = facts.chain(self.slots.iter().map(Slot::read)).collect();
        let mut answers = call(store, &reads, deadline).await?;
        let slots = answers.split_off(self.generations.len());
        let ready = answers.iter().map(|answer| matches!(answer, Answer::Fact(Some(_)))).collect();
        Ok(Answers { ready, slots })
    }

    /// Reads the windows again, after their tiles were named for another time.
    async fn reread(&self, store: &dyn OnlineStore, deadline: Instant, answers: &mut Answers) -> Result<(), Missing> {
        let windowed: Vec<usize> = (0..self.slots.len()).filter(|slot| self.slots[*slot].tiles.is_some()).collect();
        let reads: Vec<Read> = windowed.iter().map(|slot| self.slots[*slot].read()).collect();
        let again = call(store, &reads, deadline).await?;
        for (slot, answer) in windowed.into_iter().zip(again) {
            answers.slots[slot] = answer;
        }
        Ok(())
    }
}

async fn call(store: &dyn OnlineStore, reads: &[Read], deadline: Instant) -> Result<Vec<Answer>, Missing> {
    if reads.is_empty() {
        return Ok(Vec::new());
    }
    match tokio::time::timeout_at(deadline, store.read(reads)).await {
        Err(_) => Err(Missing { reason: Reason::Timeout, error: None }),
        Ok(Ok(answers)) if answers.len() == reads.len() => Ok(answers),
        Ok(Ok(answers)) => {
            let what = format!("{} answers to {} reads", answers.len(), reads.len());
            let error = StoreError::Corrupt { key: "a read".to_owned(), what };
            Err(Missing { reason: Reason::StoreError, error: Some(error) })
        }
        Ok(Err(error @ StoreError::Timeout { .. })) => Err(Missing { reason: Reason::Timeout, error: Some(error) }),
        Ok(Err(error)) => Err(Missing { reason: Reason::StoreError, error: Some(error) }),
    }
}

impl Slot {
    fn read(&self) -> Read {
        match &self.tiles {
            None => Read::Row(self.key.clone()),
            Some(tiles) => Read::Tiles(self.key.clone(), tiles.clone()),
        }
    }
}

impl Answers {
    /// The newest position of anything read.
    fn newest(&self) -> Micros {
        let position = |answer: &Answer| match answer {
            Answer::Row(blob) => blob.as_deref().and_then(row::position),
            Answer::Tiles { position, .. } | Answer::AllTiles { position, .. } => *position,
            Answer::Fact(_) | Answer::Mark(_) => None,
        };
        self.slots.iter().filter_map(position).map(|position| position.time).max().unwrap_or(Micros::MIN)
    }
}

/// The features of one entity, shared by all rows that ask for it.
type Values = Arc<[Value]>;

/// What one row of one view is.
struct Cell {
    status: Status,
    reason: Option<Reason>,
    values: Option<Values>,
    event_time: Option<Micros>,
    position: Option<Position>,
}

impl Cell {
    fn of(status: Status, position: Option<Position>) -> Cell {
        Cell { status, reason: None, values: None, event_time: None, position }
    }

    fn unavailable(reason: Reason, position: Option<Position>) -> Cell {
        Cell { reason: Some(reason), ..Cell::of(Status::Unavailable, position) }
    }
}

impl Input<'_> {
    fn judge(
        &self,
        plan: &ReadPlan<'_>,
        answers: &Result<Answers, Reason>,
        at: &[Micros],
        stale: &mut bool,
    ) -> FetchedInput {
        let types: Vec<Type> =
            self.view.features().iter().map(|(_, feature_type, _)| (*feature_type).clone()).collect();
        let cells: Vec<Cell> = match &self.kind {
            Kind::OfflineOnly => (0..plan.rows).map(|_| Cell::unavailable(Reason::OfflineOnly, None)).collect(),
            Kind::AsOf { generation } => self.judge_rows(plan, answers, *generation, at),
            Kind::Windowed { generation, layout, outputs } => {
                self.judge_windows(plan, answers, *generation, layout, outputs, at)
            }
        };
        if let Some(freshness) = self.view.freshness {
            *stale |= cells.iter().zip(at).any(|(cell, t)| {
                let measured =
                    if self.view.is_windowed() { cell.position.map(|position| position.time) } else { cell.event_time };
                cell.status == Status::Present
                    && measured.is_some_and(|time| time != STATIC && t.saturating_sub(time) > freshness)
            });
        }
        let null = Value::Null;
        let values = types.iter().enumerate().map(|(feature, feature_type)| {
            let column = cells.iter().map(|cell| cell.values.as_ref().map_or(&null, |values| &values[feature]));
            Value::to_array(column, feature_type)
        });
        FetchedInput {
            answer: ViewAnswer {
                values: values.collect(),
                statuses: cells.iter().map(|cell| cell.status).collect(),
                event_times: cells.iter().map(|cell| cell.event_time).collect(),
            },
            reasons: cells.iter().map(|cell| cell.reason).collect(),
            positions: cells.iter().map(|cell| cell.position).collect(),
        }
    }

    fn judge_rows(
        &self,
        plan: &ReadPlan<'_>,
        answers: &Result<Answers, Reason>,
        generation: usize,
        at: &[Micros],
    ) -> Vec<Cell> {
        let ViewPlanKind::AsOf { max_age, .. } = &self.view.kind else { return Vec::new() };
        let types = self.view.row_types();
        let mut decoded: HashMap<usize, Decoded<(Row, Values)>> = HashMap::new();
        let mut cells = Vec::with_capacity(at.len());
        for (slot, t) in self.slots.iter().zip(at) {
            // A null in a key matches nothing, whatever the store would say.
            let Some(slot) = slot else {
                cells.push(Cell::of(Status::NotFound, None));
                continue;
            };
            let answers = match usable(answers, generation) {
                Ok(answers) => answers,
                Err(reason) => {
                    cells.push(Cell::unavailable(reason, None));
                    continue;
                }
            };
            let decoded = decoded.entry(*slot).or_insert_with(|| {
                let Answer::Row(blob) = &answers.slots[*slot] else { return Decoded::Corrupt };
                let Some(blob) = blob else { return Decoded::Absent };
                match row::decode(blob, &types) {
                    Ok(row) => {
                        let values = Arc::from(row.values.as_slice());
                        Decoded::Found((row, values))
                    }
                    Err(error) => Decoded::corrupt(&plan.slots[*slot].key, &error),
                }
            });
            cells.push(match decoded {
                Decoded::Absent => Cell::of(Status::NotFound, None),
                Decoded::Corrupt => Cell::unavailable(Reason::StoreError, None),
                Decoded::Found((row, values)) => {
                    let times = &row.times;
                    let position = Some(times.position);
                    let seen = match self.view.source.visibility {
                        Visibility::Known => times.known_time <= *t,
                        Visibility::EventTime => true,
                        Visibility::Ingested => times.position.time <= *t,
                    };
                    if times.event_time > *t || !seen {
                        // A later row has replaced the one that was true then.
                        Cell::unavailable(Reason::AtBeforeStore, position)
                    } else if row.deleted {
                        Cell::of(Status::NotFound, position)
                    } else {
                        match max_age.judge(times.event_time, *t) {
                            Status::Present => Cell {
                                values: Some(values.clone()),
                                event_time: Some(times.event_time),
                                ..Cell::of(Status::Present, position)
                            },
                            Status::OutsideMaxAge => {
                                Cell { event_time: Some(times.event_time), ..Cell::of(Status::OutsideMaxAge, position) }
                            }
                            status => Cell::of(status, position),
                        }
                    }
                }
            });
        }
        cells
    }

    fn judge_windows(
        &self,
        plan: &ReadPlan<'_>,
        answers: &Result<Answers, Reason>,
        generation: usize,
        layout: &Layout,
        outputs: &[(usize, Window)],
        at: &[Micros],
    ) -> Vec<Cell> {
        let empty: Option<Values> = layout.read(&Tiles::default(), outputs, 0).ok().map(|values| values.into());
        let mut decoded: HashMap<usize, Decoded<Tiles>> = HashMap::new();
        let mut values: HashMap<(usize, Micros), Result<Values, AtBeforeStore>> = HashMap::new();
        let mut cells = Vec::with_capacity(at.len());
        for (slot, t) in self.slots.iter().zip(at) {
            let Some(slot) = slot else {
                cells.push(Cell { values: empty.clone(), ..Cell::of(Status::Present, None) });
                continue;
            };
            let answers = match usable(answers, generation) {
                Ok(answers) => answers,
                Err(reason) => {
                    cells.push(Cell::unavailable(reason, None));
                    continue;
                }
            };
            let tiles = decoded.entry(*slot).or_insert_with(|| {
                let ids = plan.slots[*slot].tiles.as_deref().unwrap_or_default();
                let Answer::Tiles { position, tiles } = &answers.slots[*slot] else { return Decoded::Corrupt };
                let present = ids.iter().zip(tiles).filter_map(|(id, tile)| Some((*id, Bytes::clone(tile.as_ref()?))));
                match layout.decode_answer(*position, present) {
                    Ok(tiles) => Decoded::Found(tiles),
                    Err(error) => Decoded::corrupt(&plan.slots[*slot].key, &error),
                }
            });
            let Decoded::Found(tiles) = tiles else {
                cells.push(Cell::unavailable(Reason::StoreError, None));
                continue;
            };
            let read = values.entry((*slot, *t)).or_insert_with(|| self.read_windows(layout, tiles, outputs, *t));
            cells.push(match read {
                Ok(values) => Cell { values: Some(values.clone()), ..Cell::of(Status::Present, tiles.position) },
                Err(AtBeforeStore) => Cell::unavailable(Reason::AtBeforeStore, tiles.position),
            });
        }
        cells
    }

    fn read_windows(
        &self,
        layout: &Layout,
        tiles: &Tiles,
        outputs: &[(usize, Window)],
        t: Micros,
    ) -> Result<Arc<[Value]>, AtBeforeStore> {
        // Tiles count what was known. Where a source asks for another condition, they agree with it only once
        // everything in them was known.
        let exact = match self.view.source.visibility {
            Visibility::Known => true,
            Visibility::EventTime => tiles.tiles.values().all(|tile| tile.known_time_max <= t),
            Visibility::Ingested => tiles.position.is_none_or(|position| position.time <= t),
        };
        if !exact {
            return Err(AtBeforeStore);
        }
        Ok(layout.read(tiles, outputs, t)?.into())
    }
}

enum Decoded<T> {
    Absent,
    Corrupt,
    Found(T),
}

impl<T> Decoded<T> {
    fn corrupt(key: &Key, error: &dyn std::error::Error) -> Decoded<T> {
        tracing::error!(%key, %error, "the online store holds bytes that cannot be read");
        Decoded::Corrupt
    }
}

fn usable(answers: &Result<Answers, Reason>, generation: usize) -> Result<&Answers, Reason> {
    let answers = answers.as_ref().map_err(|reason| *reason)?;
    if answers.ready[generation] { Ok(answers) } else { Err(Reason::Backfilling) }
}

#[cfg(test)]
mod tests;
