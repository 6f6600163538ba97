//! What one request reads: every entity of every view once, and what the store answered.

use std::collections::BTreeSet;
use std::hash::BuildHasher;

use feature_defs::time::Micros;
use feature_defs::window::TileId;
use hashbrown::{DefaultHashBuilder, HashTable};
use online_store::tile::Layout;
use online_store::{Answer, OnlineStore, Read, StoreError, row};
use tokio::time::Instant;

use super::reader::{Kind, ServiceReader};
use super::{Reason, TILES_MAX};
use crate::request::Rows;
use crate::status::Failure;

/// So many slots are searched one by one, which is sooner done than hashing and finding room for a table.
const SEARCHED_MAX: usize = 8;

/// What is read, each thing once.
pub(super) struct Asked<'a> {
    pub reader: &'a ServiceReader,
    /// One entity of one view each.
    pub slots: Vec<Read>,
    /// For each slot, of the reader's generations the one that it is of.
    generations: Vec<usize>,
    /// For each input and row its slot; None where the key holds a null, or nothing is read.
    pub of_inputs: Vec<Vec<Option<u32>>>,
    pub rows: usize,
}

/// What the store answered.
pub(super) struct Answers {
    /// By generation.
    pub ready: Vec<bool>,
    /// By slot.
    pub slots: Vec<Answer>,
}

/// The store did not answer.
pub(super) struct Missing {
    pub reason: Reason,
    pub error: Option<StoreError>,
}

impl<'a> Asked<'a> {
    pub fn new(reader: &'a ServiceReader, rows: &Rows) -> Asked<'a> {
        let mut asked =
            Asked { reader, slots: Vec::new(), generations: Vec::new(), of_inputs: Vec::new(), rows: rows.count };
        let hasher = DefaultHashBuilder::default();
        let hash = |generation: usize, entity: &[u8]| hasher.hash_one((generation, entity));
        let mut known: HashTable<u32> = HashTable::new();
        for (input, service_input) in reader.inputs.iter().zip(&reader.service.inputs) {
            let Some(generation) = input.generation() else {
                asked.of_inputs.push(vec![None; rows.count]);
                continue;
            };
            let types = service_input.view.keys.iter().map(|key| &key.key_type);
            let columns: Vec<_> = service_input.keys.iter().map(|key| rows.columns[*key].clone()).zip(types).collect();
            let keys = service_input.view.entity_keys(&columns, rows.count);
            let (slots, generations) = (&mut asked.slots, &mut asked.generations);
            let mut slot_of = |entity: &[u8]| {
                let same = |slot: &u32| {
                    let slot = *slot as usize;
                    generations[slot] == generation && *entity_of(&slots[slot]) == *entity
                };
                // Requests have at most 10,000 rows, and services far fewer inputs than would overflow this.
                let count = slots.len() as u32;
                let found = if slots.len() <= SEARCHED_MAX {
                    (0..count).find(|slot| same(slot))
                } else {
                    known.find(hash(generation, entity), same).copied()
                };
                if let Some(slot) = found {
                    return slot;
                }
                let key = reader.generations[generation].key(entity);
                let is_windowed = matches!(input.kind, Kind::Windowed { .. });
                slots.push(if is_windowed { Read::Tiles(key, Vec::new()) } else { Read::Row(key) });
                generations.push(generation);
                if slots.len() > SEARCHED_MAX {
                    let hash_of = |slot: &u32| hash(generations[*slot as usize], entity_of(&slots[*slot as usize]));
                    // The table begins with the first slot that is one too many, and then knows all.
                    let first = if known.is_empty() { 0 } else { count };
                    (first..=count).for_each(|slot| {
                        known.insert_unique(hash_of(&slot), slot, hash_of);
                    });
                }
                count
            };
            let of_rows = (0..rows.count).map(|row| keys.get(row).map(&mut slot_of)).collect();
            asked.of_inputs.push(of_rows);
        }
        asked
    }

    /// Names the tiles that the windows need at these times. Returns whether they need any that were not named before.
    pub fn name_tiles(&mut self, at: &[Micros]) -> Result<bool, Failure> {
        let one_time = at.split_first().is_some_and(|(first, rest)| rest.iter().all(|t| t == first));
        if one_time { self.name_tiles_at(at[0]) } else { self.name_tiles_of_rows(at) }
    }

    /// All rows at one time, as requests are that name none: every entity of a view needs the same tiles.
    fn name_tiles_at(&mut self, t: Micros) -> Result<bool, Failure> {
        let mut of_generations: Vec<Option<Vec<TileId>>> = vec![None; self.reader.generations.len()];
        // Views of equal windows, as services have many, need the same tiles.
        let mut known: Vec<(&Layout, usize)> = Vec::new();
        for input in &self.reader.inputs {
            let Kind::Windowed { generation, layout, .. } = &input.kind else { continue };
            if of_generations[*generation].is_some() {
                continue;
            }
            let alike =
                known.iter().find(|(other, _)| other.windows == layout.windows && other.levels == layout.levels);
            let tiles = alike.and_then(|(_, other)| of_generations[*other].clone());
            of_generations[*generation] = Some(tiles.unwrap_or_else(|| layout.tiles_at(t)));
            known.push((layout, *generation));
        }
        let mut count = 0;
        let mut more = false;
        for (slot, generation) in self.slots.iter_mut().zip(&self.generations) {
            let (Read::Tiles(_, named), Some(wanted)) = (slot, &of_generations[*generation]) else { continue };
            count += wanted.len();
            if count > TILES_MAX {
                return Err(too_many_tiles());
            }
            if named != wanted {
                more = true;
                named.clone_from(wanted);
            }
        }
        Ok(more)
    }

    fn name_tiles_of_rows(&mut self, at: &[Micros]) -> Result<bool, Failure> {
        let mut wanted: Vec<BTreeSet<TileId>> = vec![BTreeSet::new(); self.slots.len()];
        let mut count = 0;
        for (input, slots) in self.reader.inputs.iter().zip(&self.of_inputs) {
            let Kind::Windowed { layout, .. } = &input.kind else { continue };
            let mut tiles: Option<(Micros, Vec<TileId>)> = None;
            let mut done: BTreeSet<(u32, Micros)> = BTreeSet::new();
            for (slot, t) in slots.iter().zip(at) {
                let Some(slot) = slot else { continue };
                if !done.insert((*slot, *t)) {
                    continue;
                }
                if tiles.as_ref().is_none_or(|(of, _)| of != t) {
                    tiles = Some((*t, layout.tiles_at(*t)));
                }
                let of_slot = &mut wanted[*slot as usize];
                let before = of_slot.len();
                of_slot.extend(tiles.iter().flat_map(|(_, tiles)| tiles).copied());
                count += of_slot.len() - before;
                if count > TILES_MAX {
                    return Err(too_many_tiles());
                }
            }
        }
        let mut more = false;
        for (slot, wanted) in self.slots.iter_mut().zip(wanted) {
            let Read::Tiles(_, named) = slot else { continue };
            let wanted: Vec<TileId> = wanted.into_iter().collect();
            if *named != wanted {
                more = true;
                *named = wanted;
            }
        }
        Ok(more)
    }

    /// One call to the store for everything and the markers of generations.
    pub async fn read(&mut self, store: &dyn OnlineStore, deadline: Instant) -> Result<Answers, Missing> {
        let count = self.slots.len();
        self.slots.extend(self.reader.ready_facts.iter().map(|fact| Read::Fact(fact.clone())));
        let answers = call(store, &self.slots, deadline).await;
        self.slots.truncate(count);
        let mut slots = answers?;
        let facts = slots.split_off(count);
        let ready = facts.iter().map(|answer| matches!(answer, Answer::Fact(Some(_)))).collect();
        Ok(Answers { ready, slots })
    }

    /// Reads the windows again, after their tiles were named for another time.
    pub async fn reread(
        &self,
        store: &dyn OnlineStore,
        deadline: Instant,
        answers: &mut Answers,
    ) -> Result<(), Missing> {
        let is_windowed = |slot: &usize| matches!(self.slots[*slot], Read::Tiles(..));
        let windowed: Vec<usize> = (0..self.slots.len()).filter(is_windowed).collect();
        let reads: Vec<Read> = windowed.iter().map(|slot| self.slots[*slot].clone()).collect();
        let again = call(store, &reads, deadline).await?;
        for (slot, answer) in windowed.into_iter().zip(again) {
            answers.slots[slot] = answer;
        }
        Ok(())
    }
}

fn too_many_tiles() -> Failure {
    Failure::invalid(format!("these rows need more than {TILES_MAX} window tiles; send fewer rows at once"))
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

/// The entity that a slot is about.
fn entity_of(slot: &Read) -> &[u8] {
    match slot {
        Read::Row(key) | Read::Tiles(key, _) | Read::AllTiles(key) => &key.entity,
        Read::Fact(_) | Read::Mark(_) => &[],
    }
}

impl Answers {
    /// The newest position of anything read.
    pub fn newest(&self) -> Micros {
        let position = |answer: &Answer| match answer {
            Answer::Row(blob) => blob.as_deref().and_then(row::position),
            Answer::Tiles { position, .. } | Answer::AllTiles { position, .. } => *position,
            _ => None,
        };
        self.slots.iter().filter_map(position).map(|position| position.time).max().unwrap_or(Micros::MIN)
    }

    /// What was said of a generation's entities, if it may be used.
    pub fn usable(answers: &Result<Answers, Reason>, generation: usize) -> Result<&[Answer], Reason> {
        let answers = answers.as_ref().map_err(|reason| *reason)?;
        if answers.ready[generation] { Ok(&answers.slots) } else { Err(Reason::Backfilling) }
    }
}
