//! Removals that go through many entities, in steps between which writers get their turn.

use std::ops::Bound;

use feature_defs::time::Micros;
use fjall::Readable;

use super::{Inner, Part, Pending, stored, tile_id};
use crate::StoreError;

/// Entities removed while writers wait.
const STEP_ENTITIES: usize = 256;
/// Entities looked at in one step: they are looked at while others write, but on a thread that others want too.
const STEP_LOOKED_AT: usize = 16_384;

/// One step of a removal.
pub(super) struct Step {
    pub entities: Vec<Vec<u8>>,
    /// Where the next step goes on, behind this; None at the end.
    pub last: Option<Vec<u8>>,
}

impl Inner {
    /// Some entities of a generation behind `after`.
    pub(super) fn step_of_generation(
        &self,
        part: Part,
        prefix: &[u8],
        after: Option<Vec<u8>>,
    ) -> Result<Step, StoreError> {
        let after = after.map_or(Bound::Included(prefix.to_vec()), Bound::Excluded);
        let snapshot = self.database.snapshot();
        let mut step = Step { entities: Vec::new(), last: None };
        for entity in snapshot.range::<Vec<u8>, _>(self.keyspace(part), (after, Bound::Unbounded)) {
            let entity = entity.key().map_err(|error| self.failed(error))?;
            if !entity.starts_with(prefix) {
                break;
            }
            step.entities.push(entity.to_vec());
            if step.entities.len() == STEP_ENTITIES {
                step.last = step.entities.last().cloned();
                break;
            }
        }
        Ok(step)
    }

    /// Some entities behind `after` that have expired. It needs no lock: whoever removes them looks again.
    pub(super) fn step_of_expired(&self, part: Part, now: Micros, after: Option<Vec<u8>>) -> Result<Step, StoreError> {
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        let snapshot = self.database.snapshot();
        let mut step = Step { entities: Vec::new(), last: None };
        let entities = snapshot.range::<Vec<u8>, _>(self.keyspace(part), (after, Bound::Unbounded));
        for (number, entry) in entities.enumerate() {
            let (entity, value) = entry.into_inner().map_err(|error| self.failed(error))?;
            if is_expired(part, &value, now) {
                step.entities.push(entity.to_vec());
            }
            if step.entities.len() == STEP_ENTITIES || number + 1 == STEP_LOOKED_AT {
                step.last = Some(entity.to_vec());
                break;
            }
        }
        Ok(step)
    }

    /// Removes entities, with `expired_at` only those that are still expired. A header goes together with its tiles, so no
    /// tile is ever left behind for a later write of the same entity to find. Only called by the one who holds `writer`.
    pub(super) fn remove(
        &self,
        part: Part,
        entities: Vec<Vec<u8>>,
        expired_at: Option<Micros>,
    ) -> Result<u64, StoreError> {
        let snapshot = self.database.snapshot();
        let mut pending = Pending::default();
        let mut count = 0;
        for entity in entities {
            if let Some(now) = expired_at {
                let value = snapshot.get(self.keyspace(part), &entity).map_err(|error| self.failed(error))?;
                if !value.is_some_and(|value| is_expired(part, &value, now)) {
                    continue;
                }
            }
            if part == Part::Headers {
                self.remove_tiles(&snapshot, &mut pending, &entity)?;
            }
            pending.put(part, entity, None);
            count += 1;
        }
        self.commit(pending)?;
        Ok(count)
    }

    /// Every tile of an entity, stored or only decided.
    pub(super) fn remove_tiles(
        &self,
        snapshot: &fjall::Snapshot,
        pending: &mut Pending,
        entity: &[u8],
    ) -> Result<(), StoreError> {
        let from = (Part::Tiles, entity.to_vec());
        for ((part, key), change) in pending.changes.range_mut(from..) {
            if *part != Part::Tiles || !key.starts_with(entity) {
                break;
            }
            if tile_id(entity, key).is_some() {
                *change = None;
            }
        }
        for entry in snapshot.prefix(&self.tiles, entity) {
            let key = entry.key().map_err(|error| self.failed(error))?;
            if tile_id(entity, &key).is_some() {
                pending.put(Part::Tiles, key.to_vec(), None);
            }
        }
        Ok(())
    }
}

fn is_expired(part: Part, value: &[u8], now: Micros) -> bool {
    stored::expiry(part == Part::Headers, value).is_some_and(|expires| expires <= now)
}
