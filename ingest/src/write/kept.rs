//! What a lane remembers of the entities it wrote, so that the next event of an entity needs no read of all its tiles.
//!
//! What is here is what the store has, as long as the lane's mark is there: whoever finds it gone drops the lane and this
//! with it. An entry is taken out before its entity is written and put back once the store took the write; a write whose
//! outcome is not known leaves nothing behind.

use feature_defs::time::Micros;
use feature_defs::window::DAY;
use online_store::key::Key;
use online_store::tile::Tiles;
use quick_cache::Weighter;
use quick_cache::unsync::Cache;

/// Of one lane, in memory.
const BYTES_MAX: u64 = 128 << 20;
/// An entity of a few windows takes some 10 KB: its newest tiles, and the names of about 200 others.
const ENTITY_BYTES: u64 = 10 << 10;
/// What decoded states take for each byte of their encoding, or less.
const DECODED: u64 = 4;
const TILE_BYTES: u64 = 512;
const NAME_BYTES: u64 = 32;

#[derive(Default)]
pub struct Kept {
    /// Of lanes to whose entities more events may come.
    is_on: bool,
    entities: Option<Cache<Key, Entity, Bytes>>,
    /// Of the hand that wrote last, see [`super::Hand::removals`].
    removals: u64,
}

pub(super) struct Entity {
    pub tiles: Tiles,
    /// The encoded tiles at hand.
    pub bytes: u64,
    /// From then on the store may have let go of it.
    pub until: Option<Micros>,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<Key, Entity> for Bytes {
    fn weight(&self, key: &Key, entity: &Entity) -> u64 {
        let tiles = entity.tiles.tiles.len() as u64 * TILE_BYTES + entity.tiles.stored.len() as u64 * NAME_BYTES;
        key.entity.len() as u64 + tiles + entity.bytes.saturating_mul(DECODED)
    }
}

impl Kept {
    pub fn turn_on(&mut self) {
        self.is_on = true;
    }

    pub(super) fn take(&mut self, key: &Key, now: Micros) -> Option<Entity> {
        let (_, entity) = self.entities.as_mut()?.remove(key)?;
        // A day is what expiries have to spare: the store's clock need not be this one.
        entity.until.is_none_or(|until| now < until.saturating_sub(DAY)).then_some(entity)
    }

    pub(super) fn put(&mut self, key: Key, entity: Entity) {
        if !self.is_on {
            return;
        }
        let entities = self
            .entities
            .get_or_insert_with(|| Cache::with_weighter((BYTES_MAX / ENTITY_BYTES) as usize, BYTES_MAX, Bytes));
        entities.insert(key, entity);
    }

    /// Entities were removed from the store meanwhile if this number is another one.
    pub(super) fn see(&mut self, removals: u64) {
        if std::mem::replace(&mut self.removals, removals) != removals {
            self.clear();
        }
    }

    pub fn clear(&mut self) {
        self.entities = None;
    }
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let entities = self.entities.as_ref().map_or(0, Cache::len);
        f.debug_struct("Kept").field("entities", &entities).finish()
    }
}
