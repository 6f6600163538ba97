//! What the gateway asks of the part that moves data: events in, file sources materialized, views backfilled.
//!
//! The gateway only translates; this is the seam at which it does so, and at which tests put a double.

use std::error::Error;
use std::sync::Arc;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use feature_defs::forgotten::{Forgotten, KeyHash};
use feature_defs::plan::{Plan, ViewPlan};
use feature_defs::time::Micros;
use tokio::sync::mpsc;

use crate::metrics::Freshness;

/// When a push is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The events are in the log.
    Durable,
    /// Those that are due answer online as well.
    Visible,
}

/// What became of the events of one push.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pushed {
    pub accepted: u32,
    pub duplicates: u32,
    pub early: u32,
    pub rejected: Vec<(u32, String)>,
    pub last_sequence: u64,
}

/// How far the materialization of one view has come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    pub source: String,
    pub view: String,
    pub rows_read: u64,
    pub rows_applied: u64,
    pub rows_stale: u64,
    pub rows_new: u64,
    pub rows_total: Option<u64>,
    pub entities: u64,
    pub seconds: f64,
    pub message: Option<String>,
}

/// What became of one managed table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TableDone {
    pub source: String,
    pub changed: bool,
    pub files_before: u64,
    pub files_after: u64,
    pub files_taken: u64,
    pub bytes_before: u64,
    pub bytes_after: u64,
    pub rows: u64,
    pub buckets: u32,
    pub seconds: f64,
}

/// Entities that are to be forgotten.
#[derive(Debug, Clone)]
pub struct Forgetting {
    /// Everything that was ever forgotten, these included.
    pub list: Arc<Forgotten>,
    pub hashes: Vec<(Arc<str>, KeyHash)>,
    /// The keys themselves, encoded, where they are known.
    pub keys: Vec<(Arc<str>, Box<[u8]>)>,
}

/// A place where something of them was, or would be, removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForgottenPlace {
    pub kind: String,
    pub name: String,
    pub rows_removed: u64,
    pub rows_cleared: u64,
    pub files: u64,
    pub note: Option<String>,
}

/// How far a piece of work on a managed table has come: its source, and rows written.
pub type TableProgress = (String, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    DryRun,
}

#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// What was sent cannot be taken, whenever it is sent.
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Unknown(String),
    /// The log or a buffer is full: later it may fit.
    #[error("{0}")]
    Full(String),
    #[error("events are no longer taken")]
    Stopping,
    #[error("a store could not be reached")]
    Unavailable(#[source] Box<dyn Error + Send + Sync>),
    #[error("events could not be handled")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
}

#[async_trait]
pub trait Events: Send + Sync + 'static {
    /// Returns once the streams of the plan can be pushed to; backfill goes on in the background. `pinned` are views of
    /// earlier definitions that go on being written, because a model that may still serve reads them.
    async fn adopt(&self, plan: Arc<Plan>, pinned: &[Arc<ViewPlan>]) -> Result<(), EventsError>;

    /// Views of the adopted plan that do not answer yet, with what is being done about it, for people.
    fn backfilling(&self) -> Vec<String>;

    /// How long events took to be visible, if that is measured.
    fn freshness(&self) -> Option<Freshness> {
        None
    }

    async fn push(&self, source: &str, batch: RecordBatch, wait: Wait) -> Result<Pushed, EventsError>;

    /// Reports through `progress` as it goes on. A receiver that is gone stops it.
    async fn materialize(
        &self,
        sources: &[String],
        through: Micros,
        mode: Mode,
        progress: mpsc::Sender<Progress>,
    ) -> Result<(), EventsError>;

    /// Compacts the tables of these sources, or of all.
    async fn compact(
        &self,
        sources: &[String],
        mode: Mode,
        progress: mpsc::Sender<TableProgress>,
    ) -> Result<Vec<TableDone>, EventsError>;

    /// Copies the files of a source into its table.
    async fn import_files(&self, source: &str, progress: mpsc::Sender<TableProgress>)
    -> Result<TableDone, EventsError>;

    /// What was forgotten, from now on: when this returns, nothing more is written of it.
    async fn follow_forgotten(&self, _list: &Arc<Forgotten>) {}

    /// Removes entities from the online store, histories, the log and the dead letters. `progress` hears what is being done.
    async fn forget(
        &self,
        _what: Forgetting,
        _mode: Mode,
        _progress: mpsc::Sender<String>,
    ) -> Result<Vec<ForgottenPlace>, EventsError> {
        Ok(Vec::new())
    }

    /// Returns the number of events written to history.
    async fn flush(&self) -> Result<u64, EventsError>;

    /// Finishes what was acknowledged and closes the log.
    async fn shutdown(&self) -> Result<(), EventsError>;
}
