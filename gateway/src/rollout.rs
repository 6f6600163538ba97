//! Rollouts: what is tried, counted, judged and written down.
//!
//! - [`policy`]: what definitions declare, as it is pinned when a rollout begins.
//! - [`trial`]: a rollout as this gateway serves it: which rows go to which version.
//! - [`shadow`]: rows that a version in shadow scores behind the champion, on what the champion leaves.
//! - [`counting`]: one outcome per unit and metric, counted off the threads that answer.
//! - [`counts`]: what one life of one gateway has counted, on the object store.
//! - [`judging`]: every few seconds each gateway puts all counts together and judges; the log lets one of them write it down.
//! - [`skew`], [`losses`], [`drifted`]: what logs and labels say, found out on quiet threads. [`holdout`], [`traffic`]: what is
//!   asked before anything starts.
//! - [`control`]: what people ask for. [`report`]: what they are told.
//!
//! Nothing moves without numbers, with one exception: a broken hard rule takes a version out of the traffic of the gateway
//! that has seen it, at once, and is written down after.

pub mod control;
pub mod counting;
pub mod counts;
pub mod drifted;
pub mod evidence;
pub mod holdout;
pub mod judging;
pub mod losses;
pub mod policy;
pub mod quiet;
pub mod report;
pub mod shadow;
pub mod skew;
pub mod traffic;
pub mod trial;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use feature_defs::time::Micros;
use object_store::ObjectStore;
use object_store::path::Path;
use proto::v1::Column;
use registry::id::{EntryNumber, Incarnation};
use tokio::sync::Notify;

use crate::observe::Observed;
use crate::predict::Sent;
use counting::Counted;
use counts::Others;
use judging::{Beside, Judged};
use shadow::{Queue, Work};
use trial::Trial;

/// What this gateway knows of rollouts beside what it serves.
pub struct Rollouts {
    store: Arc<dyn ObjectStore>,
    root: Path,
    me: Incarnation,
    /// By the entry that began them.
    counted: Mutex<BTreeMap<EntryNumber, Counted>>,
    judged: Mutex<BTreeMap<EntryNumber, Judged>>,
    others: tokio::sync::Mutex<BTreeMap<EntryNumber, Others>>,
    beside: tokio::sync::Mutex<Beside>,
    queue: Queue,
    /// Told when a hard rule is broken.
    urgent: Notify,
    pub metrics: counting::RolloutMetrics,
}

impl Rollouts {
    pub fn new(
        store: Arc<dyn ObjectStore>,
        root: Path,
        me: Incarnation,
        metrics: counting::RolloutMetrics,
    ) -> Arc<Rollouts> {
        Arc::new(Rollouts {
            store,
            root,
            me,
            counted: Mutex::default(),
            judged: Mutex::default(),
            others: tokio::sync::Mutex::default(),
            beside: tokio::sync::Mutex::default(),
            queue: Queue::default(),
            urgent: Notify::new(),
            metrics,
        })
    }

    fn counted(&self) -> MutexGuard<'_, BTreeMap<EntryNumber, Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judged(&self) -> MutexGuard<'_, BTreeMap<EntryNumber, Judged>> {
        self.judged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands rows that the champion has answered to the version in shadow; never waits. What there is no room for is shed, and
    /// counted.
    pub fn shadow(&self, trial: &Arc<Trial>, observed: Arc<Observed>, sent: &Sent, at: &[Micros]) {
        let Some(challenger) = &trial.challenger else {
            self.shed(trial, observed.rows.count as u64);
            return;
        };
        let same = challenger.plan.service.semantic_digest == observed.service.semantic_digest;
        // With the champion's features nothing of the request is needed.
        let columns: Vec<Column> = if same { Vec::new() } else { sent.columns.clone() };
        let work = Work { trial: trial.clone(), observed, columns, rows: sent.rows, at: at.to_vec() };
        if let Err(work) = self.queue.offer(work) {
            self.shed(trial, work.observed.rows.count as u64);
        }
    }

    fn shed(&self, trial: &Trial, rows: u64) {
        self.metrics.shed(&trial.model, trial.version, rows);
        if let Some(counted) = self.counted().get_mut(&trial.rollout) {
            counted.shed(rows);
        }
    }
}
