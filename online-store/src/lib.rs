//! The online store: the newest row of every entity and the tiles of its windows, by entity key.
//!
//! [`OnlineStore`] states what every store promises; [`memory`] is its executable specification, [`embedded`] and
//! [`redis`] are the stores in use, and [`conformance`] is the one suite that all of them pass. Bytes are made and read by
//! [`key`], [`row`], [`header`] and [`tile`]; the stores move them and never look inside, except to compare the order of rows.
//!
//! This crate never sees protobuf and has no clock.

pub mod header;
pub mod key;
pub mod row;
pub mod tile;

pub mod estimate;

pub mod conformance;
pub mod embedded;
pub mod memory;
pub mod redis;

#[cfg(test)]
mod formats;

use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::time::{Micros, Position};
use feature_defs::window::TileId;

use crate::key::Key;

/// One thing to read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Read {
    /// The row of an entity in an as-of view.
    Row(Key),
    /// The header of an entity in a windowed view, and these of its tiles.
    Tiles(Key, Vec<TileId>),
    /// The header and every tile, for maintenance.
    AllTiles(Key),
    /// A small named fact about the store itself, see [`Write::Fact`]. In a cluster it is answered by every node that the
    /// same call reads from, by all nodes if the call reads facts and marks only, and is None unless all of these agree: so
    /// a node that came back empty is noticed by the calls that touch it.
    Fact(String),
    /// The least of a mark over all nodes, None if any of them lacks it, see [`Write::Mark`].
    Mark(String),
}

/// The answer to one [`Read`], of the same kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// None: the entity has no row.
    Row(Option<Bytes>),
    /// `position` is None where nothing was ever applied; tiles are in the order asked, None where absent.
    Tiles {
        position: Option<Position>,
        tiles: Vec<Option<Bytes>>,
    },
    /// In order of (level, start).
    AllTiles {
        position: Option<Position>,
        tiles: Vec<(TileId, Bytes)>,
    },
    Fact(Option<Bytes>),
    Mark(Option<Position>),
}

/// One change. Each is atomic for itself; several in one call are not atomic together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Put a row blob made by [`row::encode`]: it replaces the stored row if it is later in the order of rows
    /// ([`row::order`]), else it is stale. Either way the stored position becomes the larger of the two.
    ///
    /// From `expires` on the store may forget the row; None means never. The expiry belongs to the row that stays: a stale
    /// write leaves it as it is, and of the same row written twice the later one counts.
    Row { key: Key, blob: Bytes, expires: Option<Micros> },
    /// Set and remove tiles of an entity and advance its position, if `position` is after the stored one; else nothing
    /// changes and the write is stale. So a repeated write changes nothing. A write whose `epoch` is less than the one
    /// stored with the entity changes nothing and fails the call with [`StoreError::Fenced`].
    ///
    /// `expires` is for the entity as a whole: the later of what is stored and what is given, None (never) if this is None.
    Tiles {
        key: Key,
        position: Position,
        /// Of the writer, see [`OnlineStore::claim`].
        epoch: u64,
        set: Vec<(TileId, Bytes)>,
        remove: Vec<TileId>,
        expires: Option<Micros>,
    },
    /// Forget one entity of a generation, rows and tiles, with its position and epoch. Stale if there was none.
    Remove(Key),
    /// Remember a small fact (at most 64 KiB): checkpoints, which generations are complete. None forgets it. In a cluster
    /// it is kept on every master.
    Fact(String, Option<Bytes>),
    /// Remember up to which position writes were sent. The larger position stays; another is stale. In a cluster it is kept
    /// on every master: a node that lost its newest writes lost its newest marks with them, so what has to be written again
    /// is what came after the mark that is read.
    Mark(String, Position),
}

/// What became of a batch of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteOutcome {
    pub applied: u64,
    /// Writes that came after a later one, or again.
    pub stale: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached; the same call may succeed later.
    #[error(
        "the online store at {place} cannot be reached ({what}); it is retried, start it or check `online:` in coeval.yaml"
    )]
    Unreachable { place: String, what: String },
    /// The store did not answer in time.
    #[error("the online store at {place} did not answer within {millis} ms")]
    Timeout { place: String, millis: u64 },
    /// The store answered, and refused.
    #[error("the online store at {place} refused: {what}")]
    Refused { place: String, what: String },
    /// Bytes in the store are not what this version writes.
    #[error("the online store holds bytes under {key} that cannot be read: {what}")]
    Corrupt { key: String, what: String },
    /// The writer was replaced: not an error of the store, and not to be retried.
    #[error(
        "{key} was written by a process that took over (epoch {newest}, this one has {epoch}); this process must stop writing"
    )]
    Fenced { key: String, epoch: u64, newest: u64 },
    /// The disk under the embedded store failed.
    #[error("the embedded online store at {place} failed: {what}")]
    Disk { place: String, what: String },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unreachable { .. } | StoreError::Timeout { .. })
    }
}

/// What an operator wants to know of one Redis, or of the disk of the embedded store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeReport {
    pub place: String,
    /// `master`, `replica`, or `embedded`.
    pub role: String,
    pub used_bytes: Option<u64>,
    /// None: no limit is set.
    pub max_bytes: Option<u64>,
    pub keys: Option<u64>,
    /// What a write that was answered survives: `appendfsync always`, `appendfsync everysec`, `no append-only file`,
    /// `synced disk`.
    pub durability: String,
    /// Each with its next step.
    pub problems: Vec<String>,
}

/// A store of rows, tiles and facts by key.
///
/// Promises, which [`conformance`] checks:
/// - `read` answers every read, in order, in one round trip (one per node of a cluster). Each `Tiles` answer is a
///   consistent picture of that entity: never half of a write.
/// - `write` applies each write atomically for its key, in the order given for equal keys. When it returns, later reads
///   by anyone see it. It is durable once [`OnlineStore::sync`] has returned. When it fails, any of its writes may have
///   happened, but no fact or mark that stands behind a write that did not.
/// - Repeating writes, or any prefix of a sequence of writes, any number of times ends in the same state.
/// - Keys that differ in any part never meet.
/// - No call waits longer than the store's timeout, whatever happens to the other side.
#[async_trait]
pub trait OnlineStore: Send + Sync + 'static {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError>;
    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError>;
    /// Everything written before is durable when this returns (as durable as the store can be).
    async fn sync(&self) -> Result<(), StoreError>;
    /// Removes all entities of one view generation. Reads of it are undefined meanwhile.
    async fn remove_generation(&self, generation: &key::Generation) -> Result<u64, StoreError>;
    /// Takes over as the writer called `name`: remembers `candidate` if it is larger than every epoch claimed before, else
    /// the next larger number, and returns what it remembers. Durable when it returns, and never given twice.
    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError>;
    /// Drops what expired at or before `now`, for stores that do not do so by themselves; writers wait for a step of it at
    /// most. Returns the number of entities.
    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError>;
    /// One report per node, for people. It does not fail because one of several nodes is away: that is a problem it reports.
    async fn report(&self) -> Result<Vec<NodeReport>, StoreError>;
    /// Makes the store's own files forget what was removed, as far as the store can be told to: an entity that was removed
    /// may otherwise stay in them, unread, until they are rewritten. False: it cannot be told; see the operations manual.
    async fn purge(&self) -> Result<bool, StoreError> {
        Ok(false)
    }
    /// Whether the store answers now; for health.
    async fn ping(&self) -> Result<(), StoreError>;
    /// Where it is, for people.
    fn place(&self) -> String;
}
