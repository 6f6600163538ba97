//! What gateways have counted, on the object store: `<project>/rollouts/<model>/<entry that began it>/<life of a gateway>`.
//!
//! Each object is written whole over what its gateway wrote before, and only grows, so any set of them is what happened up to
//! some moment at each gateway. A line of JSON, then the counts as `drift` encodes them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use drift::sequential::snapshot::{BYTES_MAX, Snapshot};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use registry::id::{EntryNumber, Incarnation};
use serde::{Deserialize, Serialize};

use super::counting::Beside;
use crate::status::chain;

const FOLDER: &str = "rollouts";
const FORMAT: u32 = 1;
/// Lives of gateways in one rollout: restarts of a few weeks. What is beyond is left out, and said.
const LIVES_MAX: usize = 1_000;

#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
    gateway: String,
    beside: Beside,
}

/// What one life of a gateway has counted.
pub struct Life {
    pub snapshot: Snapshot,
    pub beside: Beside,
}

/// What was read, so that it is read again only when it has changed.
#[derive(Default)]
pub struct Others {
    known: BTreeMap<Path, (ObjectMeta, Arc<Life>)>,
}

/// Everything together.
#[derive(Default)]
pub struct Merged {
    pub snapshot: Snapshot,
    pub beside: Beside,
    /// Lives that were put together.
    pub lives: usize,
}

impl Merged {
    fn add(&mut self, life: &Life) {
        self.snapshot.merge(&life.snapshot);
        self.beside.merge(&life.beside);
        self.lives += 1;
    }
}

pub fn folder(root: &Path, model: &str, rollout: EntryNumber) -> Path {
    root.clone().join(FOLDER).join(model).join(format!("{:020}", rollout.0))
}

pub fn encode(gateway: &Incarnation, snapshot: &Snapshot, beside: &Beside) -> Result<Vec<u8>, String> {
    let head = Head { format: FORMAT, gateway: gateway.to_string(), beside: beside.clone() };
    let mut bytes = serde_json::to_vec(&head).map_err(|error| error.to_string())?;
    bytes.push(b'\n');
    bytes.extend(snapshot.encode());
    Ok(bytes)
}

pub fn decode(bytes: &[u8]) -> Result<Life, String> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Err("these bytes are no counts of a rollout".to_owned());
    };
    let head: Head = serde_json::from_slice(&bytes[..end]).map_err(|error| error.to_string())?;
    if head.format > FORMAT {
        return Err(format!("counts in format {} are from a newer build", head.format));
    }
    let snapshot = Snapshot::decode(&bytes[end + 1..]).map_err(|error| error.to_string())?;
    Ok(Life { snapshot, beside: head.beside })
}

pub async fn put(store: &dyn ObjectStore, folder: &Path, me: &Incarnation, bytes: Vec<u8>) -> Result<(), String> {
    let path = folder.clone().join(me.as_str());
    store.put(&path, Bytes::from(bytes).into()).await.map(|_| ()).map_err(|error| chain(&error))
}

impl Others {
    /// Reads what lives other than `me` have written. One that cannot be decoded is left out and told: its gateway writes it
    /// anew, or a newer build judges.
    pub async fn read(&mut self, store: &dyn ObjectStore, folder: &Path, me: &Incarnation) -> Result<Merged, String> {
        let objects: Vec<ObjectMeta> = store.list(Some(folder)).try_collect().await.map_err(|error| chain(&error))?;
        let own = folder.clone().join(me.as_str());
        let mut objects: Vec<ObjectMeta> = objects.into_iter().filter(|object| object.location != own).collect();
        if objects.len() > LIVES_MAX {
            // The newest: what is left out is the same for everybody who judges.
            objects.sort_by_key(|object| std::cmp::Reverse(object.last_modified));
            objects.truncate(LIVES_MAX);
            tracing::warn!(%folder, "more than {LIVES_MAX} lives of gateways have counted; the oldest are left out");
        }
        let mut known = BTreeMap::new();
        let mut merged = Merged::default();
        for object in objects {
            let same = |before: &ObjectMeta| {
                before.last_modified == object.last_modified
                    && before.size == object.size
                    && before.e_tag == object.e_tag
            };
            let life = match self.known.remove(&object.location) {
                Some((before, life)) if same(&before) => life,
                _ if object.size > BYTES_MAX as u64 => continue,
                _ => {
                    let read = async { store.get(&object.location).await?.bytes().await };
                    let bytes = match read.await {
                        Ok(bytes) => bytes,
                        Err(object_store::Error::NotFound { .. }) => continue,
                        Err(error) => return Err(chain(&error)),
                    };
                    match decode(&bytes) {
                        Ok(life) => Arc::new(life),
                        Err(reason) => {
                            tracing::warn!(object = %object.location, reason, "counts of a rollout are left out");
                            continue;
                        }
                    }
                }
            };
            merged.add(&life);
            known.insert(object.location.clone(), (object, life));
        }
        self.known = known;
        Ok(merged)
    }
}

impl Merged {
    /// With what this life has counted.
    pub fn with(mut self, snapshot: Snapshot, beside: Beside) -> Merged {
        self.add(&Life { snapshot, beside });
        self
    }
}
