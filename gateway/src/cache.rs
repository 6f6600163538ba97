//! An optional cache of what the online store answered, for hot entities; off unless `serve.cache` says otherwise.
//!
//! What is answered from here was true at most `staleness` ago, which is what the setting promises; positions and event
//! times in the answer tell how old it is. Two rules keep the promise exact:
//!
//! - The markers of generations never outlive what they speak for: as soon as one thing of a call has to be read from the
//!   store, its markers are read with it. Otherwise a row that an emptied store no longer has would be NOT_FOUND under a
//!   marker from before.
//! - Nothing is cached longer than `staleness` after the moment its read *began*.
//!
//! Writes go past the cache: whoever writes is another task or another process, and the bound holds without telling it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use feature_defs::catalog::CacheSettings;
use feature_defs::time::Micros;
use online_store::key::Generation;
use online_store::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome};
use prometheus_client::metrics::counter::Counter;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::metrics::Metrics;

/// What an entry takes besides its bytes: keys, links, counters.
const ENTRY_BYTES: u64 = 160;

pub struct CachedStore {
    store: Arc<dyn OnlineStore>,
    staleness: Duration,
    known: Cache<Read, Known, Bytes>,
    hits: Counter,
    misses: Counter,
}

#[derive(Clone)]
struct Known {
    answer: Answer,
    until: Instant,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<Read, Known> for Bytes {
    fn weight(&self, read: &Read, known: &Known) -> u64 {
        let asked = match read {
            Read::Row(key) | Read::AllTiles(key) => key.entity.len(),
            // The list of tiles is kept, too.
            Read::Tiles(key, ids) => key.entity.len() + ids.len() * 40,
            Read::Fact(name) | Read::Mark(name) => name.len(),
        };
        let answered = match &known.answer {
            Answer::Row(bytes) | Answer::Fact(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len()),
            Answer::Tiles { tiles, .. } => tiles.iter().flatten().map(|tile| tile.len()).sum(),
            Answer::AllTiles { tiles, .. } => tiles.iter().map(|(_, tile)| tile.len() + 16).sum(),
            Answer::Mark(_) => 16,
        };
        ENTRY_BYTES + (asked + answered) as u64
    }
}

impl CachedStore {
    pub fn new(store: Arc<dyn OnlineStore>, settings: CacheSettings, metrics: &Metrics) -> CachedStore {
        let entries = usize::try_from(settings.memory_bytes / 512).unwrap_or(usize::MAX).clamp(16, 1 << 20);
        CachedStore {
            store,
            staleness: settings.staleness,
            known: Cache::with_weighter(entries, settings.memory_bytes, Bytes),
            hits: metrics.cache_reads("hit"),
            misses: metrics.cache_reads("miss"),
        }
    }

    async fn read_at(&self, reads: &[Read], now: Instant) -> Result<Vec<Answer>, StoreError> {
        let mut answers: Vec<Option<Answer>> = reads
            .iter()
            .map(|read| self.known.get(read).filter(|known| now < known.until).map(|known| known.answer))
            .collect();
        let missing = |answer: &Option<Answer>| answer.is_none();
        let misses = answers.iter().filter(|answer| missing(answer)).count() as u64;
        self.hits.inc_by(reads.len() as u64 - misses);
        self.misses.inc_by(misses);
        if misses > 0 {
            for (read, answer) in reads.iter().zip(&mut answers) {
                if is_marker(read) {
                    *answer = None;
                }
            }
            let asked: Vec<Read> = reads
                .iter()
                .zip(&answers)
                .filter(|(_, answer)| missing(answer))
                .map(|(read, _)| read.clone())
                .collect();
            let mut found = self.store.read(&asked).await?.into_iter();
            for (read, answer) in reads.iter().zip(&mut answers).filter(|(_, answer)| missing(answer)) {
                // A store that answers fewer than it was asked is found out by whoever counts the answers.
                let Some(fresh) = found.next() else { break };
                let known = Known { answer: fresh.clone(), until: now + self.staleness };
                self.known.insert(read.clone(), known);
                *answer = Some(fresh);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

fn is_marker(read: &Read) -> bool {
    matches!(read, Read::Fact(_) | Read::Mark(_))
}

#[async_trait]
impl OnlineStore for CachedStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        self.read_at(reads, Instant::now()).await
    }

    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        self.store.write(writes).await
    }

    async fn sync(&self) -> Result<(), StoreError> {
        self.store.sync().await
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        self.store.remove_generation(generation).await
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        self.store.claim(name, candidate).await
    }

    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError> {
        self.store.collect_expired(now).await
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        self.store.report().await
    }

    async fn purge(&self) -> Result<bool, StoreError> {
        self.store.purge().await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.store.ping().await
    }

    fn place(&self) -> String {
        self.store.place()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use online_store::memory::MemoryStore;

    use super::*;

    const STALENESS: Duration = Duration::from_millis(500);

    fn row(value: u8) -> Bytes {
        use feature_defs::as_of::{Row, Times};
        use feature_defs::time::Position;
        use feature_defs::value::Value;
        let position = Position { time: i64::from(value), sequence: 0 };
        let times = Times { event_time: i64::from(value), created_time: None, known_time: 0, position };
        online_store::row::encode(&Row { times, deleted: false, values: vec![Value::Int64(i64::from(value))] })
    }

    async fn put(store: &dyn OnlineStore, entity: &[u8], value: u8) {
        let key = generation().key(entity);
        store.write(vec![Write::Row { key, blob: row(value), expires: None }]).await.unwrap();
    }

    fn generation() -> Generation {
        Generation::new("p", "v", "0123456789abcdef")
    }

    fn ask(entities: &[&[u8]]) -> Vec<Read> {
        let rows = entities.iter().map(|entity| Read::Row(generation().key(*entity)));
        std::iter::once(Read::Fact(generation().ready_fact())).chain(rows).collect()
    }

    #[tokio::test]
    async fn answers_are_old_by_the_bound_at_most() {
        let below = Arc::new(MemoryStore::new());
        let settings = CacheSettings { staleness: STALENESS, memory_bytes: 1 << 20 };
        let store = CachedStore::new(below.clone(), settings, &Metrics::new());
        put(&*below, b"a", 1).await;
        let now = Instant::now();
        assert_eq!(store.read_at(&ask(&[b"a"]), now).await.unwrap()[1], Answer::Row(Some(row(1))));
        put(&*below, b"a", 2).await;
        let almost = now + STALENESS - Duration::from_nanos(1);
        assert_eq!(store.read_at(&ask(&[b"a"]), almost).await.unwrap()[1], Answer::Row(Some(row(1))));
        assert_eq!(store.hits.get(), 2);
        assert_eq!(store.read_at(&ask(&[b"a"]), now + STALENESS).await.unwrap()[1], Answer::Row(Some(row(2))));
    }

    #[tokio::test]
    async fn a_marker_does_not_speak_for_what_was_read_after_it() {
        let below = Arc::new(MemoryStore::new());
        let settings = CacheSettings { staleness: STALENESS, memory_bytes: 1 << 20 };
        let store = CachedStore::new(below.clone(), settings, &Metrics::new());
        let fact = generation().ready_fact();
        below.write(vec![Write::Fact(fact.clone(), Some(Bytes::from_static(b"1")))]).await.unwrap();
        put(&*below, b"a", 1).await;
        put(&*below, b"b", 1).await;
        let now = Instant::now();
        let ready = Answer::Fact(Some(Bytes::from_static(b"1")));
        assert_eq!(store.read_at(&ask(&[b"a"]), now).await.unwrap()[0], ready);
        // The store loses everything. What is cached is still answered whole; with anything new, the marker is gone.
        below.write(vec![Write::Fact(fact, None)]).await.unwrap();
        below.remove_generation(&generation()).await.unwrap();
        assert_eq!(store.read_at(&ask(&[b"a"]), now).await.unwrap(), [ready, Answer::Row(Some(row(1)))]);
        let answers = store.read_at(&ask(&[b"a", b"b"]), now).await.unwrap();
        assert_eq!(answers, [Answer::Fact(None), Answer::Row(Some(row(1))), Answer::Row(None)]);
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let below = Arc::new(MemoryStore::new());
        let settings = CacheSettings { staleness: Duration::from_secs(60), memory_bytes: 64 << 10 };
        let store = CachedStore::new(below, settings, &Metrics::new());
        for n in 0..10_000u32 {
            store.read(&[Read::Row(generation().key(n.to_be_bytes()))]).await.unwrap();
        }
        assert!(store.known.weight() <= 64 << 10);
        assert!(store.known.len() > 100);
    }
}
