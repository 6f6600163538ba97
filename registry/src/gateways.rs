//! Which gateways there are, and how far each has come.
//!
//! A deploy has to wait for every gateway that serves, and there is no server that knows them all. So each process has one
//! small object of its own on the store, which it overwrites again and again: with a counter, the head of the log that it
//! serves, and its versions. This is no part of the log: nobody needs to know of it tomorrow, and one that is lost is
//! written again.
//!
//! Whoever looks says by its own clock how long ago it last saw a counter move; times of two machines are never compared.
//! A counter that is seen for the first time may belong to a process that has just begun or to one that died long ago, so it
//! counts as alive until it has had its time to move.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};

use crate::id::{EntryNumber, Incarnation, ModelName, ModelVersion};
use crate::log::{Fetched, LogError, get_bounded};

/// How often a gateway overwrites its report.
pub const REPORT_EVERY: Duration = Duration::from_secs(1);
/// A gateway whose counter has not been seen to move for so long is taken for dead by whoever waits for it.
pub const ALIVE_FOR: Duration = Duration::from_secs(5);
/// A report whose counter has not been seen to move for so long is removed. A gateway that was away comes back with its next.
pub const KEPT_FOR: Duration = Duration::from_secs(60);

/// Reports that are read at all: far more gateways than share one control log.
const REPORTS_MAX: usize = 512;
const REPORT_BYTES_MAX: u64 = 1 << 20;
const FORMAT: u32 = 1;

/// What one gateway says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub format: u32,
    pub incarnation: Incarnation,
    /// Moves with every report.
    pub counter: u64,
    /// The entry of the control log that it serves.
    pub head: EntryNumber,
    /// Whether it has loaded what the log wanted when it started. Before that it takes no requests.
    pub started: bool,
    /// For people: where it runs.
    #[serde(default)]
    pub address: String,
    #[serde(default)]
    pub versions: Vec<VersionReport>,
}

/// One version on one gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionReport {
    pub model: ModelName,
    pub version: ModelVersion,
    /// The entry that it was loaded for.
    pub wanted_by: EntryNumber,
    pub state: ReportedState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What whoever deploys it should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What it was measured to take.
    #[serde(default)]
    pub memory_bytes: u64,
    #[serde(default)]
    pub max_rows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportedState {
    Loading,
    Ready,
    Failed,
    /// Written by a later build.
    #[serde(other)]
    Unknown,
}

impl Report {
    /// As a gateway writes it before it has read the log.
    pub fn first(incarnation: Incarnation, address: String) -> Report {
        let head = EntryNumber::NONE;
        Report { format: FORMAT, incarnation, counter: 0, head, started: false, address, versions: Vec::new() }
    }

    pub fn version(&self, model: &ModelName, version: ModelVersion) -> Option<&VersionReport> {
        self.versions.iter().find(|report| report.model == *model && report.version == version)
    }
}

/// The reports of all gateways below one prefix of a store.
#[derive(Debug, Clone)]
pub struct Gateways {
    store: Arc<dyn ObjectStore>,
    folder: Path,
}

impl Gateways {
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &Path) -> Gateways {
        Gateways { store, folder: prefix.clone().join("gateways") }
    }

    pub async fn put(&self, report: &Report) -> Result<(), LogError> {
        let object = self.path(&report.incarnation);
        let corrupt =
            |error: serde_json::Error| LogError::Corrupt { object: object.clone(), reason: error.to_string() };
        let bytes = serde_json::to_vec(report).map_err(corrupt)?;
        match self.store.put(&object, bytes.into()).await {
            Ok(_) => Ok(()),
            Err(source) => Err(LogError::Store { operation: "write", object, source: Box::new(source) }),
        }
    }

    /// Every report that can be read. Others belong to builds of another time, and are left to age.
    pub async fn read(&self) -> Result<Vec<Report>, LogError> {
        let failed = |operation, object: Path, source| LogError::Store { operation, object, source: Box::new(source) };
        let objects =
            self.store.list(Some(&self.folder)).map_ok(|object| object.location).try_collect::<Vec<_>>().await;
        let objects = objects.map_err(|source| failed("list", self.folder.clone(), source))?;
        if objects.len() > REPORTS_MAX {
            tracing::warn!(objects = objects.len(), folder = %self.folder, "more gateways than are looked at");
        }
        let mut reports = Vec::new();
        for object in objects.into_iter().take(REPORTS_MAX) {
            match get_bounded(self.store.as_ref(), &object, REPORT_BYTES_MAX).await {
                Ok(Fetched::Bytes(bytes)) => match serde_json::from_slice::<Report>(&bytes) {
                    Ok(report) => reports.push(report),
                    Err(error) => tracing::warn!(%object, %error, "ignoring the report of a gateway"),
                },
                Ok(Fetched::TooLarge(bytes)) => tracing::warn!(%object, bytes, "ignoring the report of a gateway"),
                // It ended while we were looking.
                Ok(Fetched::Absent) => {}
                Err(source) => return Err(failed("read", object, source)),
            }
        }
        Ok(reports)
    }

    pub async fn remove(&self, incarnation: &Incarnation) -> Result<(), LogError> {
        let object = self.path(incarnation);
        match self.store.delete(&object).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(LogError::Store { operation: "remove", object, source: Box::new(source) }),
        }
    }

    fn path(&self, incarnation: &Incarnation) -> Path {
        self.folder.clone().join(format!("{incarnation}.json"))
    }
}

/// Who is alive, as one observer sees it. Pure: `now` is the observer's clock, from any zero.
#[derive(Debug, Default)]
pub struct Watch {
    seen: BTreeMap<Incarnation, Seen>,
}

#[derive(Debug)]
struct Seen {
    report: Report,
    moved: Duration,
}

impl Watch {
    /// Takes over what was read just now. Who is not there any more has ended.
    pub fn observe(&mut self, now: Duration, reports: Vec<Report>) {
        let mut before = std::mem::take(&mut self.seen);
        for report in reports {
            let known = before.remove(&report.incarnation);
            let moved = known.filter(|known| known.report.counter == report.counter).map_or(now, |known| known.moved);
            self.seen.insert(report.incarnation.clone(), Seen { report, moved });
        }
    }

    /// The gateways whose counters moved lately, or may yet.
    pub fn alive(&self, now: Duration) -> impl Iterator<Item = &Report> {
        self.seen.values().filter(move |seen| now.saturating_sub(seen.moved) < ALIVE_FOR).map(|seen| &seen.report)
    }

    pub fn is_alive(&self, now: Duration, incarnation: &Incarnation) -> bool {
        self.alive(now).any(|report| report.incarnation == *incarnation)
    }

    /// Those whose reports are to be removed.
    pub fn gone(&self, now: Duration) -> Vec<Incarnation> {
        let gone = self.seen.values().filter(|seen| now.saturating_sub(seen.moved) >= KEPT_FOR);
        gone.map(|seen| seen.report.incarnation.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn named(name: &str, counter: u64) -> Report {
        Report { counter, ..Report::first(Incarnation::try_new(name).unwrap(), "here:1".into()) }
    }

    fn alive(watch: &Watch, seconds: u64) -> Vec<&str> {
        watch.alive(Duration::from_secs(seconds)).map(|report| report.incarnation.as_str()).collect()
    }

    #[test]
    fn a_gateway_is_alive_while_its_counter_is_seen_to_move() {
        let mut watch = Watch::default();
        watch.observe(Duration::from_secs(10), vec![named("a", 7), named("dead", 3)]);
        assert_eq!(alive(&watch, 10), ["a", "dead"], "nobody knows yet");
        watch.observe(Duration::from_secs(13), vec![named("a", 8), named("dead", 3)]);
        assert_eq!(alive(&watch, 14), ["a", "dead"]);
        assert_eq!(alive(&watch, 15), ["a"]);
        assert!(!watch.is_alive(Duration::from_secs(15), &Incarnation::try_new("dead").unwrap()));
        assert!(watch.gone(Duration::from_secs(69)).is_empty());
        assert_eq!(watch.gone(Duration::from_secs(70)), [Incarnation::try_new("dead").unwrap()]);
        // It was only away.
        watch.observe(Duration::from_secs(71), vec![named("a", 60), named("dead", 4)]);
        assert_eq!(alive(&watch, 71), ["a", "dead"]);
        // A drain removes the report, and nobody waits.
        watch.observe(Duration::from_secs(72), vec![named("a", 61)]);
        assert_eq!(alive(&watch, 72), ["a"]);
    }

    #[tokio::test]
    async fn reports_are_written_read_and_removed() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let gateways = Gateways::new(store.clone(), &Path::from("p"));
        assert!(gateways.read().await.unwrap().is_empty());
        let mut report = named("a", 1);
        report.versions.push(VersionReport {
            model: ModelName::try_new("delay").unwrap(),
            version: ModelVersion(2),
            wanted_by: EntryNumber(4),
            state: ReportedState::Failed,
            reason: "it is broken".into(),
            notes: Vec::new(),
            memory_bytes: 0,
            max_rows: 0,
        });
        gateways.put(&report).await.unwrap();
        // Of another build: passed over.
        store.put(&Path::from("p/gateways/later.json"), "{\"format\": 2}".into()).await.unwrap();
        assert_eq!(gateways.read().await.unwrap(), [report.clone()]);
        let unknown: ReportedState = serde_json::from_str("\"frozen\"").unwrap();
        assert_eq!(unknown, ReportedState::Unknown);
        gateways.remove(&report.incarnation).await.unwrap();
        gateways.remove(&report.incarnation).await.unwrap();
        assert!(gateways.read().await.unwrap().is_empty());
    }
}
