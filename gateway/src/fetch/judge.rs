//! What is true of each row of a view at its time, from what the store answered.

use std::sync::Arc;

use arrow::array::{ArrayRef, UInt32Array, new_null_array};
use arrow::compute::take;
use feature_defs::as_of::{MaxAge, Times};
use feature_defs::catalog::Visibility;
use feature_defs::columns::Columns;
use feature_defs::plan::{ViewAnswer, ViewPlan};
use feature_defs::time::{Micros, Position, STATIC, Status};
use feature_defs::value::Value;
use feature_defs::window::Window;
use hashbrown::HashMap;
use online_store::tile::{Layout, ReadError, StoredTiles};
use online_store::{Answer, Read, row};

use super::asked::{Answers, Asked};
use super::reader::{InputReader, Kind};
use super::{FetchedInput, Reason};
use crate::status::Failure;

/// The features of one entity, shared by all rows that ask for it.
type Values = Arc<[Value]>;

/// What one row of one view is, besides its values.
struct Cell {
    status: Status,
    reason: Option<Reason>,
    event_time: Option<Micros>,
    position: Option<Position>,
}

impl Cell {
    fn of(status: Status, position: Option<Position>) -> Cell {
        Cell { status, reason: None, event_time: None, position }
    }

    fn unavailable(reason: Reason, position: Option<Position>) -> Cell {
        Cell { reason: Some(reason), ..Cell::of(Status::Unavailable, position) }
    }
}

impl Asked<'_> {
    /// What an input of the service says of every row.
    pub fn judge(
        &self,
        index: usize,
        answers: &Result<Answers, Reason>,
        at: &[Micros],
    ) -> Result<FetchedInput, Failure> {
        let (input, view) = (&self.reader.inputs[index], &*self.reader.service.inputs[index].view);
        let slots = &self.of_inputs[index];
        let (values, cells) = match &input.kind {
            Kind::OfflineOnly => {
                let cells = (0..self.rows).map(|_| Cell::unavailable(Reason::OfflineOnly, None)).collect();
                (nulls(input, self.rows), cells)
            }
            Kind::AsOf { generation, max_age } => {
                let answers = Answers::usable(answers, *generation);
                self.judge_rows(input, view, slots, answers, *max_age, at)?
            }
            Kind::Windowed { generation, layout, outputs, empty } => {
                let answers = Answers::usable(answers, *generation);
                let windows = Windows { view, layout, outputs, empty };
                self.judge_windows(input, &windows, slots, answers, at)
            }
        };
        let mut age_max = None;
        let mut stale_rows = 0;
        for (cell, t) in cells.iter().zip(at).filter(|(cell, _)| cell.status == Status::Present) {
            let measured =
                if view.is_windowed() { cell.position.map(|position| position.time) } else { cell.event_time };
            let Some(age) = measured.filter(|time| *time != STATIC).map(|time| t.saturating_sub(time)) else {
                continue;
            };
            age_max = age_max.max(Some(age));
            stale_rows += u32::from(view.freshness.is_some_and(|freshness| age > freshness));
        }
        Ok(FetchedInput {
            answer: ViewAnswer {
                values,
                statuses: cells.iter().map(|cell| cell.status).collect(),
                event_times: cells.iter().map(|cell| cell.event_time).collect(),
            },
            reasons: cells.iter().map(|cell| cell.reason).collect(),
            positions: cells.iter().map(|cell| cell.position).collect(),
            age_max,
            stale_rows,
        })
    }

    fn judge_rows(
        &self,
        input: &InputReader,
        view: &ViewPlan,
        slots: &[Option<u32>],
        answers: Result<&[Answer], Reason>,
        max_age: MaxAge,
        at: &[Micros],
    ) -> Result<(Vec<ArrayRef>, Vec<Cell>), Failure> {
        let answers = match answers {
            Ok(answers) => answers,
            Err(reason) => return Ok((nulls(input, self.rows), unusable(slots, reason))),
        };
        let mut columns = Columns::new(&input.types, self.rows);
        let mut decoded: HashMap<u32, Stored<(Times, bool, u32)>> = HashMap::new();
        let mut cells = Vec::with_capacity(self.rows);
        // For each row that is PRESENT its place in the columns.
        let mut places: Vec<Option<u32>> = Vec::with_capacity(self.rows);
        for (slot, t) in slots.iter().zip(at) {
            // A null in a key matches nothing, whatever the store would say.
            let Some(slot) = slot else {
                cells.push(Cell::of(Status::NotFound, None));
                places.push(None);
                continue;
            };
            let stored = decoded.entry(*slot).or_insert_with(|| {
                let Answer::Row(blob) = &answers[*slot as usize] else { return Stored::Corrupt };
                let Some(blob) = blob else { return Stored::Absent };
                let place = columns.rows() as u32;
                let parts = row::parts(blob).and_then(|parts| {
                    columns.push(parts.values)?;
                    Ok((parts.times, parts.deleted, place))
                });
                parts.map_or_else(|error| Stored::corrupt(&self.slots[*slot as usize], &error), Stored::Found)
            });
            let mut place = None;
            cells.push(match stored {
                Stored::Absent => Cell::of(Status::NotFound, None),
                Stored::Corrupt => Cell::unavailable(Reason::StoreError, None),
                Stored::Found((times, deleted, of_slot)) => {
                    let position = Some(times.position);
                    let seen = match view.source.visibility {
                        Visibility::Known => times.known_time <= *t,
                        Visibility::EventTime => true,
                        Visibility::Ingested => times.position.time <= *t,
                    };
                    if times.event_time > *t || !seen {
                        // A later row has replaced the one that was true then.
                        Cell::unavailable(Reason::AtBeforeStore, position)
                    } else if *deleted {
                        Cell::of(Status::NotFound, position)
                    } else {
                        let status = max_age.judge(times.event_time, *t);
                        if status == Status::Present {
                            place = Some(*of_slot);
                        }
                        let event_time = (status != Status::NotFound).then_some(times.event_time);
                        Cell { event_time, ..Cell::of(status, position) }
                    }
                }
            });
            places.push(place);
        }
        let whole = columns.rows();
        let columns = columns.finish();
        let in_order =
            whole == places.len() && places.iter().enumerate().all(|(row, place)| *place == Some(row as u32));
        if in_order {
            return Ok((columns, cells));
        }
        let places = UInt32Array::from(places);
        let taken: Result<Vec<ArrayRef>, _> = columns.iter().map(|column| take(column, &places, None)).collect();
        Ok((taken.map_err(|error| Failure::internal("rows of a view could not be put in order", &error))?, cells))
    }

    fn judge_windows(
        &self,
        input: &InputReader,
        windows: &Windows<'_>,
        slots: &[Option<u32>],
        answers: Result<&[Answer], Reason>,
        at: &[Micros],
    ) -> (Vec<ArrayRef>, Vec<Cell>) {
        let mut opened: HashMap<u32, Stored<StoredTiles<'_>>> = HashMap::new();
        let mut known: HashMap<(u32, Micros), Result<Values, Reason>> = HashMap::new();
        let mut cells = Vec::with_capacity(self.rows);
        let mut values: Vec<Option<Values>> = Vec::with_capacity(self.rows);
        for (slot, t) in slots.iter().zip(at) {
            let Some(slot) = slot else {
                cells.push(Cell::of(Status::Present, None));
                values.push(windows.empty.clone());
                continue;
            };
            let answers = match answers {
                Ok(answers) => answers,
                Err(reason) => {
                    cells.push(Cell::unavailable(reason, None));
                    values.push(None);
                    continue;
                }
            };
            let asked = &self.slots[*slot as usize];
            let tiles = opened.entry(*slot).or_insert_with(|| {
                let (Read::Tiles(_, ids), Answer::Tiles { position, tiles }) = (asked, &answers[*slot as usize]) else {
                    return Stored::Corrupt;
                };
                let present = ids.iter().zip(tiles).filter_map(|(id, tile)| Some((*id, tile.as_deref()?)));
                let tiles = StoredTiles::new(*position, present);
                tiles.map_or_else(|error| Stored::corrupt(asked, &error), Stored::Found)
            });
            let Stored::Found(tiles) = tiles else {
                cells.push(Cell::unavailable(Reason::StoreError, None));
                values.push(None);
                continue;
            };
            match known.entry((*slot, *t)).or_insert_with(|| windows.read(asked, tiles, *t)) {
                Ok(found) => {
                    cells.push(Cell::of(Status::Present, tiles.position));
                    values.push(Some(found.clone()));
                }
                Err(Reason::StoreError) => {
                    cells.push(Cell::unavailable(Reason::StoreError, None));
                    values.push(None);
                }
                Err(reason) => {
                    cells.push(Cell::unavailable(*reason, tiles.position));
                    values.push(None);
                }
            }
        }
        let null = Value::Null;
        let columns = input.types.iter().enumerate().map(|(feature, feature_type)| {
            let column = values.iter().map(|values| values.as_ref().map_or(&null, |values| &values[feature]));
            Value::to_array(column, feature_type)
        });
        (columns.collect(), cells)
    }
}

/// The windows of one view.
struct Windows<'a> {
    view: &'a ViewPlan,
    layout: &'a Layout,
    outputs: &'a [(usize, Window)],
    empty: &'a Option<Values>,
}

impl Windows<'_> {
    fn read(&self, asked: &Read, tiles: &StoredTiles<'_>, t: Micros) -> Result<Values, Reason> {
        // Tiles count what was known. Where a source asks for another condition, they agree with it only once
        // everything in them was known.
        let exact = match self.view.source.visibility {
            Visibility::Known => true,
            Visibility::EventTime => tiles.known_time_max().is_none_or(|known_time| known_time <= t),
            Visibility::Ingested => tiles.position.is_none_or(|position| position.time <= t),
        };
        if !exact {
            return Err(Reason::AtBeforeStore);
        }
        match self.layout.read_stored(tiles, self.outputs, t) {
            Ok(values) => Ok(values.into()),
            Err(ReadError::AtBeforeStore) => Err(Reason::AtBeforeStore),
            Err(ReadError::Corrupt(error)) => {
                log_corrupt(asked, &error);
                Err(Reason::StoreError)
            }
        }
    }
}

enum Stored<T> {
    Absent,
    Corrupt,
    Found(T),
}

impl<T> Stored<T> {
    fn corrupt(asked: &Read, error: &dyn std::error::Error) -> Stored<T> {
        log_corrupt(asked, error);
        Stored::Corrupt
    }
}

fn log_corrupt(asked: &Read, error: &dyn std::error::Error) {
    let key = match asked {
        Read::Row(key) | Read::Tiles(key, _) | Read::AllTiles(key) => key.to_string(),
        Read::Fact(name) | Read::Mark(name) => name.clone(),
    };
    tracing::error!(%key, %error, "the online store holds bytes that cannot be read");
}

fn nulls(input: &InputReader, rows: usize) -> Vec<ArrayRef> {
    input.types.iter().map(|feature_type| new_null_array(&feature_type.arrow(), rows)).collect()
}

/// Rows of an as-of view when nothing can be said of it.
fn unusable(slots: &[Option<u32>], reason: Reason) -> Vec<Cell> {
    let cell = |slot: &Option<u32>| match slot {
        Some(_) => Cell::unavailable(reason, None),
        None => Cell::of(Status::NotFound, None),
    };
    slots.iter().map(cell).collect()
}
