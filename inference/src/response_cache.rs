//! Answers of a model that are given again for the same inputs. Time is an argument; nothing here knows features.
//!
//! The danger of such a cache is a wrong answer, and it comes from keys: servers that hash the bytes of inputs alone give the
//! answer of `[2, 3]` for `[3, 2]`. So a key is the SHA-256 of everything that an answer depends on, each part preceded by its
//! length: whose it is, the model's content, how its features are computed, what outputs are asked for, parameters, and of every
//! input its name, dtype, shape and bytes, as the model sees them. Bits count: 0.0 and -0.0 are two keys, and so are two NaNs of
//! different payload, since a model may tell them apart. A key that is told apart needlessly costs a forward, and nothing else.
//!
//! An entry is one row. A row of a model does not depend on those beside it; where it does, the model is served one row at a
//! time. So a request of which some rows are known runs the others only.
//!
//! An entry ends with its time to live, with the time its caller gave it, when there is no room (what was asked for lately and
//! often stays), and with the life of the cache: whoever ends a life makes sure that nothing of it is found again, and that what
//! is still under way leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};
use sha2::{Digest, Sha256};

use crate::tensor::{Tensor, TensorBatch};

/// Begins every key. Another way to make keys gets another one.
const VERSION: &[u8] = b"coeval response 1";

/// What an entry takes beside its outputs: key, links, times, counters.
const ENTRY_BYTES: usize = 176;
/// What a tensor takes beside its elements, with what its two allocations round up to.
const TENSOR_BYTES: usize = size_of::<Tensor>() + 48;
/// Few enough that a small cache holds more than one entry in each.
const SHARDS: usize = 4;

/// Everything that one row's answer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// What all keys of a model have in common.
#[derive(Debug, Clone, Copy)]
pub struct ScopeParts<'a> {
    /// Whose answers they are. One never gets another's.
    pub tenant: &'a str,
    /// The digest of the model's content.
    pub model: &'a str,
    /// The digest of how its features are computed.
    pub plan: &'a str,
    pub outputs: &'a [&'a str],
    /// By name, in order.
    pub parameters: &'a [(&'a str, &'a str)],
}

/// Makes the keys of a model.
#[derive(Clone)]
pub struct Scope(Sha256);

impl Scope {
    pub fn new(parts: ScopeParts<'_>) -> Scope {
        let ScopeParts { tenant, model, plan, outputs, parameters } = parts;
        let mut bytes = Vec::new();
        write_part(&mut bytes, VERSION);
        [tenant, model, plan].iter().for_each(|part| write_part(&mut bytes, part.as_bytes()));
        write_number(&mut bytes, outputs.len());
        outputs.iter().for_each(|output| write_part(&mut bytes, output.as_bytes()));
        write_number(&mut bytes, parameters.len());
        for (name, value) in parameters {
            write_part(&mut bytes, name.as_bytes());
            write_part(&mut bytes, value.as_bytes());
        }
        Scope(Sha256::new_with_prefix(&bytes))
    }

    /// The key of inputs as they are, in this order.
    pub fn key(&self, inputs: &TensorBatch) -> Key {
        self.key_of(inputs, None, &mut Vec::new())
    }

    /// The keys of every row by itself: those that [`Scope::key`] gives for inputs of one row.
    pub fn row_keys(&self, inputs: &TensorBatch) -> Vec<Key> {
        let rows = inputs.iter().map(|(_, tensor)| tensor.rows()).min().unwrap_or(0);
        let mut bytes = Vec::new();
        (0..rows).map(|row| self.key_of(inputs, Some(row), &mut bytes)).collect()
    }

    fn key_of(&self, inputs: &TensorBatch, row: Option<usize>, bytes: &mut Vec<u8>) -> Key {
        bytes.clear();
        write_number(bytes, inputs.len());
        for (name, tensor) in inputs {
            let rows = row.map_or(0..tensor.rows(), |row| row..row + 1);
            write_part(bytes, name.as_bytes());
            write_part(bytes, tensor.dtype().name().as_bytes());
            write_number(bytes, tensor.shape().len() * size_of::<u64>());
            write_number(bytes, rows.len());
            tensor.row_shape().iter().for_each(|size| write_number(bytes, *size));
            let start = bytes.len();
            write_number(bytes, 0);
            tensor.write_rows(rows, bytes);
            let length = (bytes.len() - start - size_of::<u64>()) as u64;
            bytes[start..start + size_of::<u64>()].copy_from_slice(&length.to_le_bytes());
        }
        let mut hasher = self.0.clone();
        hasher.update(&bytes);
        Key(hasher.finalize().into())
    }
}

fn write_number(bytes: &mut Vec<u8>, number: usize) {
    bytes.extend_from_slice(&(number as u64).to_le_bytes());
}

fn write_part(bytes: &mut Vec<u8>, part: &[u8]) {
    write_number(bytes, part.len());
    bytes.extend_from_slice(part);
}

/// The outputs of one row, in the declared order.
pub type Row = Arc<[Tensor]>;

/// Which life of the cache something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheMetrics {
    /// Rows.
    pub hits: u64,
    pub misses: u64,
    pub entries: u64,
    pub bytes: u64,
    /// Of entries that nobody had asked for lately, for the sake of others.
    pub evictions: u64,
    /// Entries that were found too old.
    pub expired: u64,
}

pub struct ResponseCache {
    known: Cache<Key, Entry, Bytes, DefaultHashBuilder, Evictions>,
    ttl: Duration,
    life: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    expired: AtomicU64,
    evictions: Evictions,
}

#[derive(Clone)]
struct Entry {
    row: Row,
    until: Instant,
    life: u64,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<Key, Entry> for Bytes {
    fn weight(&self, _: &Key, entry: &Entry) -> u64 {
        let outputs: usize = entry.row.iter().map(|tensor| TENSOR_BYTES + tensor.bytes()).sum();
        (ENTRY_BYTES + outputs) as u64
    }
}

#[derive(Clone, Default)]
struct Evictions(Arc<AtomicU64>);

impl Lifecycle<Key, Entry> for Evictions {
    type RequestState = <DefaultLifecycle<Key, Entry> as Lifecycle<Key, Entry>>::RequestState;

    fn begin_request(&self) -> Self::RequestState {
        DefaultLifecycle::<Key, Entry>::default().begin_request()
    }

    fn on_evict(&self, _: &mut Self::RequestState, _: Key, _: Entry) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl ResponseCache {
    /// A cache of so many bytes, in which nothing is found longer than `ttl` after it was put there.
    pub fn new(bytes_max: u64, ttl: Duration) -> ResponseCache {
        let evictions = Evictions::default();
        let entries = usize::try_from(bytes_max / 512).unwrap_or(usize::MAX).clamp(16, 1 << 20);
        let mut options = OptionsBuilder::new();
        options.estimated_items_capacity(entries).weight_capacity(bytes_max).shards(SHARDS);
        let known = match options.build() {
            Ok(options) => Cache::with_options(options, Bytes, DefaultHashBuilder::default(), evictions.clone()),
            // Both capacities are given, and nothing else is wanted of it.
            Err(_) => Cache::with(entries, bytes_max, Bytes, DefaultHashBuilder::default(), evictions.clone()),
        };
        let (life, hits, misses, expired) = Default::default();
        ResponseCache { known, ttl, life, hits, misses, expired, evictions }
    }

    /// The life that is: what is asked of the model from now on is put into it.
    pub fn life(&self) -> Life {
        Life(self.life.load(Ordering::Acquire))
    }

    /// Ends a life. Nothing of it is found from now on.
    pub fn end_life(&self) {
        self.life.fetch_add(1, Ordering::AcqRel);
        self.known.clear();
    }

    pub fn get(&self, key: &Key, now: Instant) -> Option<Row> {
        let found = self.known.get(key).filter(|entry| Life(entry.life) == self.life());
        let row = match found {
            Some(entry) if now < entry.until => Some(entry.row),
            Some(_) => {
                self.known.remove_if(key, |entry| now >= entry.until);
                self.expired.fetch_add(1, Ordering::Relaxed);
                None
            }
            None => None,
        };
        let counter = if row.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        row
    }

    /// Keeps the answer to a row that was asked for in a life, until a time if there is one. What is over, or too large for
    /// a quarter of the cache, is not kept.
    pub fn put(&self, life: Life, key: Key, row: Row, now: Instant, until: Option<Instant>) {
        // A time to live of centuries is no time at all to a clock.
        let end = now.checked_add(self.ttl).or(until).unwrap_or(now);
        let until = until.map_or(end, |until| until.min(end));
        if life == self.life() && now < until {
            self.known.insert(key, Entry { row, until, life: life.0 });
        }
    }

    pub fn metrics(&self) -> CacheMetrics {
        CacheMetrics {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            entries: self.known.len() as u64,
            bytes: self.known.weight(),
            evictions: self.evictions.0.load(Ordering::Relaxed),
            expired: self.expired.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests;
