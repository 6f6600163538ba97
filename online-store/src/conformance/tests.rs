//! The suite has to notice stores that break a promise, else passing it means nothing.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;

use super::*;

#[derive(Debug, Clone, Copy)]
enum Fault {
    AnswersInAnotherOrder,
    TilesInAnotherOrder,
    TornReads,
    IgnoresPositions,
    KeepsRemovedTiles,
    CutsEntitiesAtZero,
    ForgetsDigests,
    KeepsForgottenFacts,
    LosesTheLastWrite,
    RemovesTooMuch,
    RemovesTooLittle,
    AcceptsAnything,
    ForgetsEpochs,
    FencesEverything,
    ClaimsTwice,
    NeverExpires,
    ForgetsExpiriesOfStaleRows,
    MarksGoBack,
    MarksAreFacts,
    KeepsRemovedEntities,
    CountsEverythingAsApplied,
}

/// Memory with one fault.
struct Broken {
    memory: MemoryStore,
    fault: Fault,
    clock: AtomicU64,
    marks: Mutex<BTreeMap<String, Position>>,
}

impl Broken {
    fn key(&self, mut key: Key) -> Key {
        match self.fault {
            Fault::CutsEntitiesAtZero => key.entity = key.entity.split(|byte| *byte == 0).next().unwrap().into(),
            Fault::ForgetsDigests => key.generation.digest = "".into(),
            _ => {}
        }
        key
    }
}

#[async_trait]
impl OnlineStore for Broken {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        let reads: Vec<Read> = reads
            .iter()
            .cloned()
            .map(|read| match read {
                Read::Row(key) => Read::Row(self.key(key)),
                Read::Tiles(key, ids) => Read::Tiles(self.key(key), ids),
                Read::AllTiles(key) => Read::AllTiles(self.key(key)),
                Read::Mark(name) if matches!(self.fault, Fault::MarksAreFacts) => Read::Fact(name),
                Read::Fact(_) | Read::Mark(_) => read,
            })
            .collect();
        let mut answers = self.memory.read(&reads).await?;
        if let Fault::TornReads = self.fault {
            tokio::task::yield_now().await;
            for (answer, later) in answers.iter_mut().zip(self.memory.read(&reads).await?) {
                if let (Answer::Tiles { tiles, .. }, Answer::Tiles { tiles: later, .. }) = (answer, later) {
                    *tiles = later;
                }
            }
        } else if let Fault::MarksGoBack = self.fault {
            for (answer, read) in answers.iter_mut().zip(&reads) {
                if let Read::Mark(name) = read {
                    *answer = Answer::Mark(self.marks.lock().unwrap().get(name).copied());
                }
            }
        } else if let Fault::AnswersInAnotherOrder = self.fault {
            answers.reverse();
        } else if let Fault::TilesInAnotherOrder = self.fault {
            for answer in &mut answers {
                if let Answer::AllTiles { tiles, .. } = answer {
                    tiles.reverse();
                }
            }
        }
        Ok(answers)
    }

    async fn write(&self, mut writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        let count = writes.len() as u64;
        match self.fault {
            Fault::LosesTheLastWrite => drop(writes.pop()),
            Fault::AcceptsAnything => writes.retain(|write| crate::memory::admit(write, "broken").is_ok()),
            _ => {}
        }
        let missing = count - writes.len() as u64;
        let writes = writes.into_iter().filter_map(|write| match write {
            // Past every clock means at once here.
            Write::Row { key, expires: Some(..=1_000_000), .. }
                if matches!(self.fault, Fault::ForgetsExpiriesOfStaleRows) =>
            {
                Some(Write::Remove(self.key(key)))
            }
            Write::Row { key, blob, expires } => {
                let expires = expires.filter(|_| !matches!(self.fault, Fault::NeverExpires));
                Some(Write::Row { key: self.key(key), blob, expires })
            }
            Write::Tiles { key, mut position, mut epoch, set, mut remove, expires } => {
                match self.fault {
                    Fault::IgnoresPositions => {
                        let sequence = self.clock.fetch_add(1, Ordering::Relaxed);
                        position = Position { time: i64::MAX, sequence };
                    }
                    Fault::KeepsRemovedTiles => remove.clear(),
                    Fault::ForgetsEpochs => epoch = 0,
                    Fault::FencesEverything => epoch = u64::MAX - epoch,
                    _ => {}
                }
                Some(Write::Tiles { key: self.key(key), position, epoch, set, remove, expires })
            }
            Write::Remove(_) if matches!(self.fault, Fault::KeepsRemovedEntities) => None,
            Write::Mark(name, position) if matches!(self.fault, Fault::MarksGoBack) => {
                self.marks.lock().unwrap().insert(name.clone(), position);
                Some(Write::Mark(name, position))
            }
            Write::Mark(name, _) if matches!(self.fault, Fault::MarksAreFacts) => {
                Some(Write::Fact(name, Some(Bytes::from_static(b"a mark"))))
            }
            Write::Fact(_, None) if matches!(self.fault, Fault::KeepsForgottenFacts) => None,
            fact => Some(fact),
        });
        let mut outcome = self.memory.write(writes.collect()).await?;
        outcome.applied += missing;
        if let Fault::CountsEverythingAsApplied = self.fault {
            outcome = WriteOutcome { applied: count, stale: 0 };
        }
        Ok(outcome)
    }

    async fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        match self.fault {
            Fault::RemovesTooMuch => {
                let other = Generation { digest: "aaaaaaaaaaaaaaab".into(), ..generation.clone() };
                self.memory.remove_generation(&other).await?;
            }
            Fault::RemovesTooLittle => return Ok(6),
            _ => {}
        }
        self.memory.remove_generation(generation).await
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        match self.fault {
            Fault::ClaimsTwice => Ok(candidate),
            _ => self.memory.claim(name, candidate).await,
        }
    }

    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError> {
        self.memory.collect_expired(now).await
    }

    async fn report(&self) -> Result<Vec<crate::NodeReport>, StoreError> {
        self.memory.report().await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn place(&self) -> String {
        "a broken store".to_owned()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_stores_fail() {
    let faults = [
        Fault::AnswersInAnotherOrder,
        Fault::TilesInAnotherOrder,
        Fault::TornReads,
        Fault::IgnoresPositions,
        Fault::KeepsRemovedTiles,
        Fault::CutsEntitiesAtZero,
        Fault::ForgetsDigests,
        Fault::KeepsForgottenFacts,
        Fault::LosesTheLastWrite,
        Fault::RemovesTooMuch,
        Fault::RemovesTooLittle,
        Fault::AcceptsAnything,
        Fault::ForgetsEpochs,
        Fault::FencesEverything,
        Fault::ClaimsTwice,
        Fault::NeverExpires,
        Fault::ForgetsExpiriesOfStaleRows,
        Fault::MarksGoBack,
        Fault::MarksAreFacts,
        Fault::KeepsRemovedEntities,
        Fault::CountsEverythingAsApplied,
    ];
    for fault in faults {
        let store = Broken { memory: MemoryStore::new(), fault, clock: AtomicU64::new(0), marks: Mutex::default() };
        let run = tokio::spawn(run(Arc::new(store), "broken")).await;
        assert!(run.is_err_and(|error| error.is_panic()), "the suite passes a store that {fault:?}");
    }
}
