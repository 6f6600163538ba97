//! What one request reads: every entity of every view once, and what the store answered.

use std::collections::BTreeSet;
use std::hash::BuildHasher;

use feature_defs::time::Micros;
use feature_defs::window::TileId;
use hashbrown::{DefaultHashBuilder, HashTable};
use online_store::key::Key;
use online_store::{Answer, OnlineStore, Read, StoreError, row};
use tokio::time::Instant;

use super::reader::{Kind, ServiceReader};
use super::{Reason, TILES_MAX};
use crate::request::Rows;
use crate::status::Failure;

/// What is read, each thing once.
pub(super) struct Asked<'a> {
    pub reader: &'a ServiceReader,
    pub slots: Vec<Slot>,
    /// For each input and row its slot; None where the key holds a null, or nothing is read.
    pub of_inputs: Vec<Vec<Option<u32>>>,
    pub rows: usize,
}

/// One entity of one view.
pub(super) struct Slot {
    pub generation: usize,
    pub key: Key,
    /// None for as-of views.
    pub tiles: Option<Vec<TileId>>,
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
        let mut asked = Asked { reader, slots: Vec::new(), of_inputs: Vec::new(), rows: rows.count };
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
            let slots = &mut asked.slots;
            let mut slot_of = |entity: &[u8]| {
                let same = |slot: &u32| {
                    let slot: &Slot = &slots[*slot as usize];
                    slot.generation == generation && *slot.key.entity == *entity
                };
                let hashed = hash(generation, entity);
                if let Some(slot) = known.find(hashed, same) {
                    return *slot;
                }
                // Requests have at most 10,000 rows, and services far fewer inputs than would overflow this.
                let slot = slots.len() as u32;
                let key = reader.generations[generation].key(entity);
                let tiles = matches!(input.kind, Kind::Windowed { .. }).then(Vec::new);
                slots.push(Slot { generation, key, tiles });
                known.insert_unique(hashed, slot, |slot| {
                    let slot: &Slot = &slots[*slot as usize];
                    hash(slot.generation, &slot.key.entity)
                });
                slot
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
        for input in &self.reader.inputs {
            if let Kind::Windowed { generation, layout, .. } = &input.kind {
                of_generations[*generation].get_or_insert_with(|| layout.tiles_at(t));
            }
        }
        let mut count = 0;
        let mut more = false;
        for slot in &mut self.slots {
            let (Some(named), Some(wanted)) = (&mut slot.tiles, &of_generations[slot.generation]) else { continue };
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
            let Some(named) = &mut slot.tiles else { continue };
            let wanted: Vec<TileId> = wanted.into_iter().collect();
            if *named != wanted {
                more = true;
                *named = wanted;
            }
        }
        Ok(more)
    }

    /// One call to the store for the markers of generations and everything else.
    pub async fn read(&self, store: &dyn OnlineStore, deadline: Instant) -> Result<Answers, Missing> {
        let facts = self.reader.ready_facts.iter().map(|fact| Read::Fact(fact.clone()));
        let reads: Vec<Read> = facts.chain(self.slots.iter().map(Slot::read)).collect();
        let mut answers = call(store, &reads, deadline).await?;
        let slots = answers.split_off(self.reader.ready_facts.len());
        let ready = answers.iter().map(|answer| matches!(answer, Answer::Fact(Some(_)))).collect();
        Ok(Answers { ready, slots })
    }

    /// Reads the windows again, after their tiles were named for another time.
    pub async fn reread(
        &self,
        store: &dyn OnlineStore,
        deadline: Instant,
        answers: &mut Answers,
    ) -> Result<(), Missing> {
        let windowed: Vec<usize> = (0..self.slots.len()).filter(|slot| self.slots[*slot].tiles.is_some()).collect();
        let reads: Vec<Read> = windowed.iter().map(|slot| self.slots[*slot].read()).collect();
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
