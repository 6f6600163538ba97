//! Drift: what is served, counted beside what answers, and held against what was trained on.
//!
//! - [`counting`]: an observer counts every row of every prediction over the bins of its version's training set, exactly.
//! - [`snapshot`]: every half minute the counts of the hour go to the object store, an object for each hour of each life of
//!   a gateway. Counts merge by addition, so a window is whole hours of whatever gateways there were.
//! - [`profiles`]: which bins a version is counted over, and what its outputs were on its training set.
//! - [`report`]: the verdict over a window, and the metrics of the last whole one.
//!
//! Killed, a gateway loses what it counted since the last flush, half a minute. While the object store is away it goes on
//! counting: the hours that could not be written wait in memory, within a bound, and the oldest is given up first, which
//! metrics and the log tell.

mod counting;
mod metrics;
pub(crate) mod profiles;
mod report;
pub(crate) mod snapshot;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use uuid::Uuid;

use crate::answer::{Clock, Gateway};
use crate::status::chain;

pub use counting::{Counting, stale_rows};
pub use metrics::DriftMetrics;
pub use report::{Answer, Asked, get, judge};
pub use snapshot::HOURS_MAX;

use counting::Hours;
use profiles::Known;
use snapshot::Snapshot;

/// Between flushes: what a kill can lose.
const FLUSH: Duration = Duration::from_secs(30);
/// An object is written within this, or the flush counts as failed.
const PUT_WITHIN: Duration = Duration::from_secs(20);
/// An hour is written for the last time when it has been over for so long: clocks and queues are never further behind.
const SETTLED: Micros = 120_000_000;
/// How long counts are kept, and how often what is older is looked for.
const KEPT_DAYS: i64 = 90;
const SWEEP: Duration = Duration::from_secs(6 * 3_600);
/// Between looks at which versions there are.
const LOOK: Duration = Duration::from_secs(5);
/// Between judgements of the last whole window.
const JUDGE: Duration = Duration::from_secs(300);

/// A version of a model.
pub type Version = (Arc<str>, u32);

/// Where counts are kept.
pub struct DriftParts {
    pub store: Arc<dyn ObjectStore>,
    /// The project's root on it.
    pub root: Path,
    /// The address of this gateway.
    pub gateway: String,
}

/// What this gateway counts.
pub struct Drift {
    store: Arc<dyn ObjectStore>,
    root: Path,
    gateway: String,
    /// Of this life: the next one writes objects of its own.
    incarnation: String,
    state: Mutex<State>,
    /// One flush at a time: an older one must not replace what a newer one has written.
    flushing: tokio::sync::Mutex<()>,
    pub metrics: DriftMetrics,
}

#[derive(Default)]
struct State {
    known: BTreeMap<Version, Known>,
    hours: Hours,
    /// Since when flushes fail, and why.
    failing: Option<(Instant, String)>,
}

impl Drift {
    pub fn new(parts: DriftParts, metrics: DriftMetrics) -> Arc<Drift> {
        let DriftParts { store, root, gateway } = parts;
        let gateway = gateway.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let incarnation = Uuid::new_v4().simple().to_string()[..16].to_owned();
        Arc::new(Drift {
            store,
            root,
            gateway,
            incarnation,
            state: Mutex::default(),
            flushing: tokio::sync::Mutex::default(),
            metrics,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What somebody should know.
    pub fn problem(&self) -> Option<String> {
        let state = self.lock();
        let (since, why) = state.failing.as_ref()?;
        let age = since.elapsed();
        (age > 2 * FLUSH).then(|| {
            let (hours, lost) = (state.hours.waiting(), state.hours.lost);
            let age = age.as_secs();
            format!("counts for drift were not written for {age} s ({why}): {hours} hours wait in memory, {lost} rows are lost")
        })
    }

    /// Writes what has changed since it was written last.
    pub async fn flush(&self, now: Micros) -> Result<(), String> {
        let _flushing = self.flushing.lock().await;
        let changed = self.lock().hours.changed();
        for (key, count) in changed {
            let (hour, version) = key.clone();
            let snapshot = self.lock().hours.snapshot(&key);
            let Some(arms) = snapshot else { continue };
            let snapshot = Snapshot {
                format: snapshot::FORMAT,
                model: version.0.to_string(),
                version: version.1,
                hour,
                gateway: self.gateway.clone(),
                incarnation: self.incarnation.clone(),
                arms,
            };
            let path = snapshot::path(&self.root, &version, hour, &self.gateway, &self.incarnation);
            let put = async {
                let encoded = tokio::task::spawn_blocking(move || snapshot.encode()).await;
                let bytes = encoded.map_err(|error| error.to_string())??;
                let put = self.store.put(&path, bytes.into());
                match tokio::time::timeout(PUT_WITHIN, put).await {
                    Ok(put) => put.map(|_| ()).map_err(|error| chain(&error)),
                    Err(_) => Err("the object store did not answer in time".to_owned()),
                }
            };
            if let Err(why) = put.await {
                self.metrics.flushed("failed");
                let mut state = self.lock();
                match &mut state.failing {
                    Some((_, known)) => *known = why.clone(),
                    none => {
                        tracing::warn!(%path, why, "counts for drift cannot be written; they wait in memory");
                        *none = Some((Instant::now(), why.clone()));
                    }
                }
                return Err(why);
            }
            self.metrics.flushed("written");
            self.lock().hours.written(&key, count);
        }
        let mut state = self.lock();
        state.failing = None;
        state.hours.settle(now.saturating_sub(HOUR + SETTLED));
        Ok(())
    }

    /// The last flush of this life.
    pub async fn last(&self, within: Duration, now: Micros) {
        let why = match tokio::time::timeout(within, self.flush(now)).await {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => "the object store did not answer in time".to_owned(),
        };
        let rows = self.lock().hours.unwritten();
        tracing::warn!(rows, why, "the last counts for drift are lost");
    }

    /// Removes counts that are older than they are kept.
    async fn sweep(&self, now: Micros) -> object_store::Result<()> {
        let oldest = snapshot::date(now.saturating_sub(KEPT_DAYS * DAY));
        let root = self.root.clone().join(snapshot::FOLDER);
        for model in self.store.list_with_delimiter(Some(&root)).await?.common_prefixes {
            for version in self.store.list_with_delimiter(Some(&model)).await?.common_prefixes {
                for date in self.store.list_with_delimiter(Some(&version)).await?.common_prefixes {
                    let is_old = date.filename().is_some_and(|name| snapshot::is_date(name) && name < oldest.as_str());
                    if !is_old {
                        continue;
                    }
                    let objects: Vec<_> = self.store.list(Some(&date)).try_collect().await?;
                    for object in objects {
                        match self.store.delete(&object.location).await {
                            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Keeps counts, profiles and verdicts going until it is dropped.
pub async fn run(gateway: &Arc<Gateway>) {
    let Some(drift) = &gateway.drift else { return std::future::pending().await };
    tokio::join!(
        flush(drift, &gateway.clock),
        look(gateway, drift),
        judge_again(gateway, drift),
        sweep(drift, &gateway.clock)
    );
}

async fn flush(drift: &Drift, clock: &Clock) {
    loop {
        tokio::time::sleep(FLUSH).await;
        // What went wrong is kept for `problem`, and tried again.
        let _ = drift.flush(clock()).await;
    }
}

async fn look(gateway: &Arc<Gateway>, drift: &Arc<Drift>) {
    loop {
        profiles::look(gateway, drift).await;
        tokio::time::sleep(LOOK).await;
    }
}

async fn sweep(drift: &Drift, clock: &Clock) {
    loop {
        if let Err(error) = drift.sweep(clock()).await {
            tracing::warn!(%error, "old counts for drift cannot be removed; tried again later");
        }
        tokio::time::sleep(SWEEP).await;
    }
}

async fn judge_again(gateway: &Arc<Gateway>, drift: &Arc<Drift>) {
    let mut judged = report::Judged::default();
    loop {
        tokio::time::sleep(JUDGE).await;
        report::judge_window(gateway, drift, &mut judged).await;
    }
}

#[cfg(test)]
mod tests;
