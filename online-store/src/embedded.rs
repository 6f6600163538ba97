//! The store of one machine: a fjall database in a folder, used by one process at a time.
//!
//! Rows, headers, tiles and facts are four keyspaces of one database, with one journal: a batch over all of them is atomic
//! and survives a killed process as soon as it is committed, and a failed machine once [`OnlineStore::sync`] has returned.
//! Why fjall: `docs/design/2026-11-22-embedded-store.md`.
//!
//! Every change reads before it writes, so there is one writer at a time; readers never wait for it, they read a snapshot.

mod purge;
mod stored;
mod sweep;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{decode_i64, encode_i64};
use feature_defs::window::TileId;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable, Snapshot};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::spawn_blocking;

use crate::header::Header;
use crate::key::{FORMAT, Generation, Key};
use crate::memory::{KEY_BYTES_MAX, admit, key_bytes, next_epoch, row_expiry, tiles_expiry};
use crate::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

/// Blocks kept in memory, over all keyspaces. What does not fit is read through the page cache.
const CACHE_BYTES: u64 = 64 << 20;
/// A memtable of a keyspace is written out at this size; fjall makes writers wait when four of them are queued.
const MEMTABLE_BYTES: u64 = 32 << 20;
/// Journals kept before the oldest memtables are written out, which bounds the disk used and the time to open. A keyspace
/// that is seldom written, like the facts, would otherwise keep every journal alive.
const JOURNAL_BYTES: u64 = 256 << 20;
/// Writes are committed together up to this size, so that a call of any length is held in memory once, not twice.
const BATCH_BYTES: usize = 8 << 20;
/// How the names of marks and of epochs begin, beside the facts, which begin with the format.
const MARK: &str = "m1";
const EPOCH: &str = "e1";
/// A call of at most this many lookups is answered on the caller's thread: one takes 1 to 10 microseconds from the memtable
/// or a cached block and rarely more than 100 from the page cache, which is about what handing it to another thread and
/// back costs. Larger calls go to a thread that may block.
const INLINE_LOOKUPS_MAX: usize = 64;

/// An online store in a folder.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
    /// Held from the first read of a change to its commit. Waiting here is async: the blocking threads, which the whole
    /// process shares, only ever hold the one writer.
    writer: Arc<Mutex<()>>,
}

struct Inner {
    database: Database,
    rows: Keyspace,
    /// Positions and epochs of windowed entities.
    headers: Keyspace,
    /// Level and start behind the key of the entity. Apart from the headers, because keys of equal length are equal in
    /// one keyspace only if both the entities and the tiles are, whatever bytes the entities hold.
    tiles: Keyspace,
    facts: Keyspace,
    place: String,
}

impl EmbeddedStore {
    /// Opens the store in a folder, or makes it. Reads the journal of the last run, so it blocks.
    pub fn open(path: impl AsRef<Path>) -> Result<EmbeddedStore, StoreError> {
        let place = path.as_ref().display().to_string();
        let inner = Inner::open(path.as_ref(), &place).map_err(|error| disk(&place, error))?;
        Ok(EmbeddedStore { inner: Arc::new(inner), writer: Arc::default() })
    }

    /// Runs on a thread that may block. A caller that goes away does not stop it.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        let done = spawn_blocking(move || work(&inner)).await;
        done.unwrap_or_else(|error| Err(StoreError::Disk { place: self.place(), what: error.to_string() }))
    }

    async fn exclusive(&self) -> OwnedMutexGuard<()> {
        self.writer.clone().lock_owned().await
    }
}

#[async_trait]
impl OnlineStore for EmbeddedStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        let lookups: usize = reads.iter().map(lookups).sum();
        if lookups <= INLINE_LOOKUPS_MAX {
            return self.inner.read(reads);
        }
        let reads = reads.to_vec();
        self.blocking(move |inner| inner.read(&reads)).await
    }

    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        writes.iter().try_for_each(|write| admit(write, &self.inner.place))?;
        let guard = self.exclusive().await;
        self.blocking(move |inner| {
            let outcome = inner.write(writes);
            drop(guard);
            outcome
        })
        .await
    }

    async fn sync(&self) -> Result<(), StoreError> {
        self.blocking(|inner| inner.persist(PersistMode::SyncAll)).await
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        let prefix = generation.sorted_prefix();
        let mut removed = 0;
        for part in [Part::Headers, Part::Rows] {
            let mut after = None;
            loop {
                // Writers of other generations get their turn between the steps.
                let guard = self.exclusive().await;
                let prefix = prefix.clone();
                let step = self.blocking(move |inner| {
                    let step = inner.step_of_generation(part, &prefix, after)?;
                    let count = inner.remove(part, step.entities, None)?;
                    drop(guard);
                    Ok((count, step.last))
                });
                let (count, last) = step.await?;
                removed += count;
                if last.is_none() {
                    break;
                }
                after = last;
            }
        }
        Ok(removed)
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        admit(&Write::Mark(name.to_owned(), Position::START), &self.inner.place)?;
        let key = named(EPOCH, name);
        let guard = self.exclusive().await;
        self.blocking(move |inner| {
            let last = inner.get(&inner.database.snapshot(), Part::Facts, &key)?;
            let last = last.map(|bytes| decode_epoch(&key, &bytes)).transpose()?;
            let epoch = next_epoch(last, candidate, &inner.place)?;
            let mut pending = Pending::default();
            pending.put(Part::Facts, key, Some(Bytes::copy_from_slice(&epoch.to_be_bytes())));
            inner.commit(pending)?;
            inner.persist(PersistMode::SyncAll)?;
            drop(guard);
            Ok(epoch)
        })
        .await
    }

    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError> {
        let mut removed = 0;
        for part in [Part::Headers, Part::Rows] {
            let mut after = None;
            loop {
                let step = self.blocking(move |inner| inner.step_of_expired(part, now, after)).await?;
                after = step.last;
                if !step.entities.is_empty() {
                    let guard = self.exclusive().await;
                    let remove = self.blocking(move |inner| {
                        let count = inner.remove(part, step.entities, Some(now));
                        drop(guard);
                        count
                    });
                    removed += remove.await?;
                }
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(removed)
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        self.blocking(|inner| Ok(vec![inner.report()])).await
    }

    async fn purge(&self) -> Result<bool, StoreError> {
        let guard = self.exclusive().await;
        self.blocking(move |inner| {
            let purged = inner.purge();
            drop(guard);
            purged.map(|()| true)
        })
        .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        // After a failed write fjall refuses everything, and says so here.
        self.blocking(|inner| inner.persist(PersistMode::Buffer)).await
    }

    fn place(&self) -> String {
        self.inner.place.clone()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Rows,
    Headers,
    Tiles,
    Facts,
}

/// Changes decided but not committed; they hide what is in the database. None removes.
#[derive(Default)]
struct Pending {
    changes: BTreeMap<(Part, Vec<u8>), Option<Bytes>>,
    bytes: usize,
}

impl Pending {
    fn put(&mut self, part: Part, key: Vec<u8>, value: Option<Bytes>) {
        self.bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
        self.changes.insert((part, key), value);
    }
}

impl Inner {
    fn open(path: &Path, place: &str) -> fjall::Result<Inner> {
        let database = Database::builder(path).cache_size(CACHE_BYTES).max_journaling_size(JOURNAL_BYTES).open()?;
        let keyspace =
            |name| database.keyspace(name, || KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES));
        Ok(Inner {
            rows: keyspace("rows")?,
            headers: keyspace("headers")?,
            tiles: keyspace("tiles")?,
            facts: keyspace("facts")?,
            place: place.to_owned(),
            database,
        })
    }

    fn keyspace(&self, part: Part) -> &Keyspace {
        match part {
            Part::Rows => &self.rows,
            Part::Headers => &self.headers,
            Part::Tiles => &self.tiles,
            Part::Facts => &self.facts,
        }
    }

    fn persist(&self, mode: PersistMode) -> Result<(), StoreError> {
        self.database.persist(mode).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: fjall::Error) -> StoreError {
        disk(&self.place, error)
    }

    fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        let snapshot = self.database.snapshot();
        reads.iter().map(|read| self.read_one(&snapshot, read)).collect()
    }

    fn read_one(&self, snapshot: &Snapshot, read: &Read) -> Result<Answer, StoreError> {
        match read {
            Read::Row(key) if key_bytes(key) > KEY_BYTES_MAX => Ok(Answer::Row(None)),
            Read::Row(key) => {
                let stored = snapshot.get(&self.rows, key.sorted()).map_err(|error| self.failed(error))?;
                Ok(Answer::Row(stored.map(|stored| Bytes::copy_from_slice(stored::decode_row(&stored).0))))
            }
            Read::Tiles(key, ids) => {
                let Some((entity, position)) = self.header(snapshot, key)? else {
                    return Ok(Answer::Tiles { position: None, tiles: vec![None; ids.len()] });
                };
                let tiles = ids.iter().map(|id| self.get(snapshot, Part::Tiles, &tile_key(&entity, id)));
                Ok(Answer::Tiles { position: Some(position), tiles: tiles.collect::<Result<_, _>>()? })
            }
            Read::AllTiles(key) => {
                let Some((entity, position)) = self.header(snapshot, key)? else {
                    return Ok(Answer::AllTiles { position: None, tiles: Vec::new() });
                };
                let mut tiles = Vec::new();
                for entry in snapshot.prefix(&self.tiles, &entity) {
                    let (key, tile) = entry.into_inner().map_err(|error| self.failed(error))?;
                    if let Some(id) = tile_id(&entity, &key) {
                        tiles.push((id, Bytes::copy_from_slice(&tile)));
                    }
                }
                Ok(Answer::AllTiles { position: Some(position), tiles })
            }
            Read::Fact(name) if name.len() > KEY_BYTES_MAX => Ok(Answer::Fact(None)),
            Read::Fact(name) => Ok(Answer::Fact(self.get(snapshot, Part::Facts, &named(FORMAT, name))?)),
            Read::Mark(name) if name.len() > KEY_BYTES_MAX => Ok(Answer::Mark(None)),
            Read::Mark(name) => {
                let key = named(MARK, name);
                let mark = self.get(snapshot, Part::Facts, &key)?;
                Ok(Answer::Mark(mark.map(|mark| decode_mark(&key, &mark)).transpose()?))
            }
        }
    }

    fn get(&self, snapshot: &Snapshot, part: Part, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let value = snapshot.get(self.keyspace(part), key).map_err(|error| self.failed(error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// The sorted key of an entity that has tiles, and its position. None: nothing was ever applied, so it has none.
    fn header(&self, snapshot: &Snapshot, key: &Key) -> Result<Option<(Vec<u8>, Position)>, StoreError> {
        if key_bytes(key) > KEY_BYTES_MAX {
            return Ok(None);
        }
        let entity = key.sorted();
        match self.get(snapshot, Part::Headers, &entity)? {
            Some(header) => Ok(Some((entity, decode_header(key, &header)?.0.position))),
            None => Ok(None),
        }
    }

    /// Only called by the one who holds `writer`.
    fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        let mut snapshot = self.database.snapshot();
        let mut pending = Pending::default();
        let mut outcome = WriteOutcome::default();
        for write in writes {
            match self.decide(&snapshot, &mut pending, write)? {
                true => outcome.applied += 1,
                false => outcome.stale += 1,
            }
            // Between two writes, never within one.
            if pending.bytes >= BATCH_BYTES {
                self.commit(std::mem::take(&mut pending))?;
                snapshot = self.database.snapshot();
            }
        }
        self.commit(pending)?;
        Ok(outcome)
    }

    /// Whether the write is applied; else it is stale.
    fn decide(&self, snapshot: &Snapshot, pending: &mut Pending, write: Write) -> Result<bool, StoreError> {
        match write {
            Write::Row { key, blob: new, expires } => {
                let entity = key.sorted();
                let Some(stored) = self.current(snapshot, pending, Part::Rows, &entity)? else {
                    pending.put(Part::Rows, entity, Some(stored::encode_row(new, expires)));
                    return Ok(true);
                };
                let (old, old_expires) = stored::decode_row(&stored);
                if old.len() < row::ORDER_AT {
                    return Err(StoreError::Corrupt {
                        key: key.to_string(),
                        what: format!("a row of {} bytes, the shortest has {}", old.len(), row::ORDER_AT),
                    });
                }
                let expires = row_expiry((old, old_expires), (&new, expires));
                let (kept, replaced) = match row::merge(old, &new) {
                    Some(merged) => merged,
                    None if expires == old_expires => return Ok(false),
                    None => (Bytes::copy_from_slice(old), false),
                };
                pending.put(Part::Rows, entity, Some(stored::encode_row(kept, expires)));
                Ok(replaced)
            }
            Write::Tiles { key, position, epoch, set, remove, expires } => {
                let entity = key.sorted();
                let mut old_expires = None;
                if let Some(header) = self.current(snapshot, pending, Part::Headers, &entity)? {
                    let (old, old_expiry) = decode_header(&key, &header)?;
                    if epoch < old.epoch {
                        return Err(StoreError::Fenced { key: key.to_string(), epoch, newest: old.epoch });
                    }
                    if position <= old.position {
                        return Ok(false);
                    }
                    old_expires = old_expiry;
                }
                for (id, tile) in set {
                    pending.put(Part::Tiles, tile_key(&entity, &id), Some(tile));
                }
                for id in remove {
                    pending.put(Part::Tiles, tile_key(&entity, &id), None);
                }
                let header = stored::encode_header(Header { position, epoch }, tiles_expiry(old_expires, expires));
                pending.put(Part::Headers, entity, Some(header));
                Ok(true)
            }
            Write::Remove(key) => {
                let entity = key.sorted();
                let mut is_there = false;
                for part in [Part::Rows, Part::Headers] {
                    if self.current(snapshot, pending, part, &entity)?.is_some() {
                        is_there = true;
                        pending.put(part, entity.clone(), None);
                    }
                }
                self.remove_tiles(snapshot, pending, &entity)?;
                Ok(is_there)
            }
            Write::Fact(name, value) => {
                pending.put(Part::Facts, named(FORMAT, &name), value);
                Ok(true)
            }
            Write::Mark(name, position) => {
                let key = named(MARK, &name);
                if let Some(old) = self.current(snapshot, pending, Part::Facts, &key)?
                    && position <= decode_mark(&key, &old)?
                {
                    return Ok(false);
                }
                let mark = Bytes::copy_from_slice(&row::encode_position(position));
                pending.put(Part::Facts, key, Some(mark));
                Ok(true)
            }
        }
    }

    fn current(
        &self,
        snapshot: &Snapshot,
        pending: &Pending,
        part: Part,
        key: &[u8],
    ) -> Result<Option<Bytes>, StoreError> {
        match pending.changes.get(&(part, key.to_vec())) {
            Some(change) => Ok(change.clone()),
            None => self.get(snapshot, part, key),
        }
    }

    fn commit(&self, pending: Pending) -> Result<(), StoreError> {
        let mut batch = self.database.batch();
        for ((part, key), value) in pending.changes {
            match value {
                Some(value) => batch.insert(self.keyspace(part), key, &value[..]),
                None => batch.remove(self.keyspace(part), key),
            }
        }
        batch.commit().map_err(|error| self.failed(error))
    }

    fn report(&self) -> NodeReport {
        let mut problems = Vec::new();
        // After a failed write fjall refuses everything, and says so here.
        if let Err(error) = self.persist(PersistMode::Buffer) {
            problems.push(error.to_string());
        }
        NodeReport {
            place: self.place.clone(),
            role: "embedded".to_owned(),
            used_bytes: self.database.disk_space().ok(),
            max_bytes: None,
            keys: Some((self.rows.approximate_len() + self.headers.approximate_len()) as u64),
            durability: "synced disk".to_owned(),
            problems,
        }
    }
}

/// How many lookups a read is, for deciding where it runs. A scan counts as many.
fn lookups(read: &Read) -> usize {
    match read {
        Read::Row(_) | Read::Fact(_) | Read::Mark(_) => 1,
        Read::Tiles(_, ids) => 1 + ids.len(),
        Read::AllTiles(_) => INLINE_LOOKUPS_MAX + 1,
    }
}

/// The key of a fact, a mark or an epoch.
fn named(kind: &str, name: &str) -> Vec<u8> {
    format!("{kind}:{name}").into_bytes()
}

fn decode_mark(key: &[u8], mark: &[u8]) -> Result<Position, StoreError> {
    mark.try_into().map(row::decode_position).map_err(|_| corrupt(key, "a mark", mark.len(), 16))
}

fn decode_epoch(key: &[u8], epoch: &[u8]) -> Result<u64, StoreError> {
    epoch.try_into().map(u64::from_be_bytes).map_err(|_| corrupt(key, "an epoch", epoch.len(), 8))
}

fn corrupt(key: &[u8], what: &str, length: usize, expected: usize) -> StoreError {
    let what = format!("{what} of {length} bytes, it should have {expected}");
    StoreError::Corrupt { key: key.escape_ascii().to_string(), what }
}

/// Sixteen bytes behind the entity's that sort like tiles.
fn tile_key(entity: &[u8], id: &TileId) -> Vec<u8> {
    let mut key = Vec::with_capacity(entity.len() + 16);
    key.extend_from_slice(entity);
    key.extend_from_slice(&encode_i64(id.level));
    key.extend_from_slice(&encode_i64(id.start));
    key
}

/// The tile under a key that begins with `entity`; None if it is one of another entity with a longer key.
fn tile_id(entity: &[u8], key: &[u8]) -> Option<TileId> {
    let id: &[u8; 16] = key.strip_prefix(entity)?.try_into().ok()?;
    let [level, start] = [0, 8].map(|at| decode_i64(std::array::from_fn(|i| id[at + i])));
    Some(TileId { level, start })
}

fn decode_header(key: &Key, header: &[u8]) -> Result<(Header, Option<Micros>), StoreError> {
    stored::decode_header(header).ok_or_else(|| StoreError::Corrupt {
        key: key.to_string(),
        what: format!("a header of {} bytes, it should have 16, 24 or 32", header.len()),
    })
}

fn disk(place: &str, error: fjall::Error) -> StoreError {
    let what = match error {
        fjall::Error::Locked => {
            "another `coeval serve` uses this folder; stop it, or give this one another `store:` in coeval.yaml"
                .to_owned()
        }
        fjall::Error::Poisoned => {
            "an earlier write failed, so nothing more is written; free or repair the disk, then restart".to_owned()
        }
        fjall::Error::InvalidVersion(_) => {
            "the folder was written by another version; move it away, it is filled again from history and log"
                .to_owned()
        }
        fjall::Error::Io(error) => error.to_string(),
        error => error.to_string(),
    };
    StoreError::Disk { place: place.to_owned(), what }
}

#[cfg(test)]
mod tests;
