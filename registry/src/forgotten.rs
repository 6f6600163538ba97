//! Entities that were forgotten: who asked for it and when, and whether everything that was kept of them is gone.
//!
//! The log never holds a key. It holds a random salt of the project and keyed hashes, which whoever reads rows compares
//! with the hashes of what it reads; how they are made is not this crate's business. An entry that asks comes first and
//! hides the entity from every reader; an entry that says it is done comes when the last trace is removed. Between the
//! two, any server of the project may go on with the work.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{EntityName, KeyHash, Salt};
use crate::state::Fact;

/// Hashes of one change: an entry of the log is bounded.
pub const KEYS_MAX: usize = 10_000;

/// What one project has forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgottenEntities {
    /// Set by the first entry that asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt: Option<Salt>,
    #[serde(default)]
    pub entities: BTreeMap<EntityName, BTreeMap<KeyHash, ForgottenKey>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgottenKey {
    pub asked: Fact,
    /// None while something of it may still be stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<Fact>,
}

/// Keys of one entity that are to be forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    pub salt: Salt,
    pub entity: EntityName,
    pub keys: Vec<KeyHash>,
}

/// Keys of one entity of which nothing is stored any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetDone {
    pub entity: EntityName,
    pub keys: Vec<KeyHash>,
    /// What was removed, by place.
    #[serde(default)]
    pub removed: BTreeMap<String, u64>,
}

impl ForgottenEntities {
    pub fn is_empty(&self) -> bool {
        self.entities.is_empty()
    }

    pub fn key(&self, entity: &str, hash: &KeyHash) -> Option<&ForgottenKey> {
        self.entities.get(entity)?.get(hash)
    }

    pub fn all(&self) -> impl Iterator<Item = (&EntityName, &KeyHash, &ForgottenKey)> {
        self.entities.iter().flat_map(|(entity, keys)| keys.iter().map(move |(hash, key)| (entity, hash, key)))
    }

    /// What was asked for and is not known to be done.
    pub fn pending(&self) -> impl Iterator<Item = (&EntityName, &KeyHash)> {
        self.all().filter(|(_, _, key)| key.done.is_none()).map(|(entity, hash, _)| (entity, hash))
    }
}
