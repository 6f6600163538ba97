//! A breaker before the online store: while it does not answer, requests are told so at once instead of each waiting for it in
//! turn. One call at a time tries whether it is back, and so does the server's own look, every two seconds.
//!
//! For a store of one node. Of a cluster some nodes may answer while others do not, and who asks only those must not be
//! refused; there, calls fail by their own timeout.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use feature_defs::time::Micros;
use inference::breaker::{Breaker, Open};
use online_store::key::Generation;
use online_store::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome};

pub struct GuardedStore {
    store: Arc<dyn OnlineStore>,
    epoch: Instant,
    breaker: Mutex<Breaker>,
    /// A call failed since the last that did not. While it is false the breaker is closed, and nobody needs to look.
    troubled: AtomicBool,
}

impl GuardedStore {
    pub fn new(store: Arc<dyn OnlineStore>) -> GuardedStore {
        GuardedStore {
            store,
            epoch: Instant::now(),
            breaker: Mutex::new(Breaker::default()),
            troubled: AtomicBool::new(false),
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self) -> Result<(), StoreError> {
        if !self.troubled.load(Ordering::Acquire) {
            return Ok(());
        }
        self.breaker().admit(self.epoch.elapsed()).map_err(|Open { left, failures }| StoreError::Unreachable {
            place: self.store.place(),
            what: format!("the last {failures} calls failed; one tries again in {left:.1?}"),
        })
    }

    fn settle<T>(&self, answered: &Result<T, StoreError>) {
        match answered {
            Err(error) if error.is_retryable() => {
                let mut breaker = self.breaker();
                breaker.failed(self.epoch.elapsed());
                self.troubled.store(true, Ordering::Release);
            }
            // An answer, if not one that was hoped for.
            _ if self.troubled.load(Ordering::Acquire) => {
                let mut breaker = self.breaker();
                breaker.succeeded();
                self.troubled.store(false, Ordering::Release);
            }
            _ => {}
        }
    }
}

#[async_trait]
impl OnlineStore for GuardedStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        self.admit()?;
        let answered = self.store.read(reads).await;
        self.settle(&answered);
        answered
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
        let answered = self.store.ping().await;
        self.settle(&answered);
        answered
    }

    fn place(&self) -> String {
        self.store.place()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use online_store::memory::MemoryStore;

    use super::*;

    /// A store that answers or does not.
    struct Flaky {
        store: MemoryStore,
        away: AtomicBool,
        asked: AtomicUsize,
    }

    impl Flaky {
        fn answer(&self) -> Result<(), StoreError> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            match self.away.load(Ordering::SeqCst) {
                true => Err(StoreError::Timeout { place: "here".to_owned(), millis: 5 }),
                false => Ok(()),
            }
        }
    }

    #[async_trait]
    impl OnlineStore for Flaky {
        async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
            self.answer()?;
            self.store.read(reads).await
        }
        async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
            self.store.write(writes).await
        }
        async fn sync(&self) -> Result<(), StoreError> {
            Ok(())
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
            Ok(Vec::new())
        }
        async fn ping(&self) -> Result<(), StoreError> {
            self.answer()
        }
        fn place(&self) -> String {
            "here".to_owned()
        }
    }

    #[tokio::test]
    async fn a_store_that_is_away_is_not_asked_by_everybody() {
        let flaky =
            Arc::new(Flaky { store: MemoryStore::default(), away: AtomicBool::new(true), asked: AtomicUsize::new(0) });
        let guarded = GuardedStore::new(flaky.clone());
        let reads = [Read::Fact("ready".into())];
        for _ in 0..100 {
            assert!(guarded.read(&reads).await.is_err());
        }
        assert_eq!(flaky.asked.load(Ordering::SeqCst), 3);
        let error = guarded.read(&reads).await.unwrap_err();
        assert!(error.is_retryable());
        assert!(error.to_string().contains("the last 3 calls failed; one tries again in"), "{error}");
        // As soon as the server's own look finds it, everybody may.
        flaky.away.store(false, Ordering::SeqCst);
        assert!(guarded.ping().await.is_ok());
        for _ in 0..10 {
            assert!(guarded.read(&reads).await.is_ok());
        }
        assert_eq!(flaky.asked.load(Ordering::SeqCst), 14);
    }
}
