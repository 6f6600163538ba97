//! Ingestion: the event log and its applier, the import of prior histories, backfills, and materialization.
//!
//! This crate moves data between the world and the two stores. [`Ingest::push`] puts events of streams into a durable log
//! ([`log`]); the applier ([`apply`](mod@apply)) takes them, in order of position, into the online store and into history.
//! Views that are new are built from history while live events go on ([`backfill`]). Files that somebody else owns are
//! materialized up to a time ([`materialize`]), when somebody asks, on their grid ([`keep`]), and when the online store has
//! lost them; every run is written down ([`runs`]). What a row means is decided by `feature-defs`; how it is stored, by the
//! stores.
//!
//! There is one `Ingest` per project, and it is the only writer of the project's log, history and online rows.

pub mod log;
pub mod runs;

mod apply;
mod backfill;
mod dead_letter;
mod event_ids;
mod forget;
mod keep;
mod materialize;
mod push;
mod tables;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::{Field, Schema};
use bytes::Bytes;
use feature_defs::forgotten::ForgottenList;
use feature_defs::plan::{Plan, RowsError, SourceKind, ViewPlan};
use feature_defs::time::{Micros, Position};
use feature_defs::window::DAY;
use object_store::ObjectStore;
use object_store::path::Path;
use offline_store::history::{History, HistoryError};
use offline_store::source::{SourceError, Sources};
use offline_store::table::compact::Compacted;
use offline_store::table::import::FilesImported;
use online_store::key::Generation;
use online_store::{Answer, OnlineStore, Read, StoreError, Write};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::apply::StreamState;
use crate::event_ids::EventIds;
use crate::log::{Durable, Log, LogError, LogOptions, Opened, RecordRef};
use crate::push::Intake;
use crate::runs::{Run, RunLog, RunsError};
use crate::write::{Hand, ViewWriter, WriteError};

pub use crate::forget::{Forgetting, Place};
pub use crate::materialize::{Mode, Progress, Stage, ViewProgress};
pub use crate::tables::TableProgress;

/// Where times come from: the process's clock, or a test's.
pub type Clock = Arc<dyn Fn() -> Micros + Send + Sync>;

#[derive(Clone)]
pub struct IngestOptions {
    pub project: Arc<str>,
    /// The folder of the event log: its segments, or only its lock where a Redis keeps it.
    pub folder: PathBuf,
    pub store: Arc<dyn ObjectStore>,
    /// The root of the store; the project's own folder lies below it.
    pub prefix: Path,
    pub online: Arc<dyn OnlineStore>,
    pub sources: Arc<Sources>,
    pub clock: Clock,
    pub log: LogOptions,
    /// The address of a Redis that keeps the event log, instead of the folder.
    pub log_redis: Option<Arc<str>>,
    pub limits: Limits,
    /// Applied events become history after this time at the latest.
    pub flush_after: Duration,
    /// Sources of files are materialized by themselves at every instant of their `every`. Not where requests bring their
    /// own times (`serve.request_time: allowed`): a replay says itself how far it is.
    pub schedule: bool,
    /// The online store may forget what no request of now can see. Not where requests bring their own times.
    pub expires: bool,
    /// Told how long events took to be visible.
    pub meter: Option<Arc<dyn Meter>>,
}

/// Measures freshness.
pub trait Meter: Send + Sync + 'static {
    /// Events of a source can be seen online now.
    fn visible(&self, source: &str, events: &[Visible]);
}

/// How long one event took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// Since its event time.
    pub since_event: Micros,
    /// Since it arrived, or since it was due if that was later.
    pub since_arrival: Micros,
}

/// What is kept in memory at most.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Event ids per stream by which redelivery is recognised; about 60 bytes each.
    pub event_ids_max: usize,
    /// For how long after its arrival a pushed event's id is remembered.
    pub event_ids_horizon: Micros,
    /// Events per stream that wait for their time; about 40 bytes each. The events themselves wait on disk.
    pub early_rows_max: u64,
    /// Rows of file sources held at once while materializing; with more, files are read several times.
    pub materialize_rows_max: usize,
    /// How long a push waits for the import of a prior history.
    pub import_wait: Duration,
    /// How long a push waits for room in a full log, before it is refused.
    pub room_wait: Duration,
    /// How long a push that asked for it waits until its events are visible.
    pub visible_wait: Duration,
    /// How far ahead of the clock event times may be; beyond it they are mistakes.
    pub ahead_max: Micros,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            event_ids_max: 10_000_000,
            event_ids_horizon: 7 * DAY,
            early_rows_max: 4_000_000,
            materialize_rows_max: 2_000_000,
            import_wait: Duration::from_secs(10),
            room_wait: Duration::from_secs(5),
            visible_wait: Duration::from_secs(30),
            ahead_max: 7 * DAY,
        }
    }
}

impl IngestOptions {
    /// With the usual limits.
    pub fn new(
        project: &str,
        folder: PathBuf,
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        online: Arc<dyn OnlineStore>,
        sources: Arc<Sources>,
        clock: Clock,
    ) -> IngestOptions {
        IngestOptions {
            project: project.into(),
            folder,
            store,
            prefix,
            online,
            sources,
            clock,
            log: LogOptions::default(),
            log_redis: None,
            limits: Limits::default(),
            flush_after: apply::FLUSH_AFTER,
            schedule: true,
            expires: true,
            meter: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    #[error("there is no source `{source_name}` to push to; the streams are: {known}")]
    UnknownSource { source_name: String, known: String },
    #[error("`{source_name}` is a source of files; change its files and materialize it, only streams can be pushed to")]
    NotAStream { source_name: String },
    #[error("there is no source `{source_name}` to materialize; the sources of files are: {known}")]
    UnknownFiles { source_name: String, known: String },
    #[error("`{source_name}` is a stream, which is applied as it is pushed; only sources of files are materialized")]
    NotFiles { source_name: String },
    #[error("source `{source_name}` has no column `{column}`; it has: {known}")]
    UnknownColumn { source_name: String, column: String, known: String },
    #[error("the push to `{source_name}` lacks the column `{column}`, which holds its event times")]
    NoEventTime { source_name: String, column: String },
    #[error("the prior history of `{source_name}` is being imported ({what}); push again a little later")]
    Importing { source_name: String, what: String },
    #[error("{rows} events of `{source_name}` wait for their time to come, which is as many as may; push again later")]
    TooManyEarly { source_name: String, rows: u64 },
    #[error(
        "source `{source_name}` names a prior history, `{pattern}`, but events were already applied without it; remove `history:`, or push its rows as events"
    )]
    HistoryAfterLive { source_name: String, pattern: String },
    #[error(
        "the prior history `{pattern}` of `{source_name}` is larger than {bytes_max} bytes in memory, in which it is sorted; import the newest part of it"
    )]
    ImportTooLarge { source_name: String, pattern: String, bytes_max: usize },
    #[error("there is no source `{source_name}`; there are: {known}")]
    UnknownTable { source_name: String, known: String },
    #[error("`{source_name}` is a stream: push the rows of its files with `coeval ingest {source_name} FILE`")]
    NoFilesToImport { source_name: String },
    #[error("views are being built from the history of `{source_name}`; compact it when they are ready")]
    TableInUse { source_name: String },
    #[error("the thread that works on tables could not be started")]
    Background(#[source] std::io::Error),
    #[error("ingestion is shutting down; push again when the server is back")]
    Stopping,
    #[error(
        "another process has taken over writing the online store of this project ({what}); stop one of the two: this one takes nothing more until it is started again, and keeps what is in its log"
    )]
    Fenced { what: String },
    #[error(
        "the events are in the log and are not visible within {seconds} s ({what}); they will be, and need not be pushed again"
    )]
    NotVisible { seconds: u64, what: String },
    #[error("the online store lost what was written last; it is written again")]
    Lost,
    #[error(
        "the event log on disk, {folder}, holds events of `{source_name}` that are not in the history; write `log: disk`, \
         start the server until they are, stop it, and change to `log: redis` then"
    )]
    LeftOnDisk { folder: String, source_name: String },
    #[error("no definitions were applied yet; run `coeval apply` first")]
    NoPlan,
    #[error(transparent)]
    Rows(#[from] RowsError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Runs(#[from] RunsError),
    #[error(
        "rows cannot be made visible through {through}, which is after the server's clock, {now}: rows that arrive until then would be left out for good; say `--through now`"
    )]
    ThroughInFuture { through: String, now: String },
    #[error("the files of `{source_name}` could not be read: {what}")]
    Scan { source_name: String, what: String },
    #[error("dead letters could not be written to the object store; it is tried again")]
    DeadLetter(#[source] object_store::Error),
    #[error("rows could not be handled: {0}")]
    Arrow(String),
}

impl IngestError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            IngestError::Importing { .. }
            | IngestError::TooManyEarly { .. }
            | IngestError::TableInUse { .. }
            | IngestError::Background(_)
            | IngestError::Stopping
            | IngestError::NotVisible { .. }
            | IngestError::Lost
            | IngestError::DeadLetter(_) => true,
            IngestError::Log(error) => error.is_retryable(),
            IngestError::Store(error) => error.is_retryable(),
            IngestError::History(error) => error.is_retryable(),
            IngestError::Runs(error) => error.is_retryable(),
            _ => false,
        }
    }
}

impl From<WriteError> for IngestError {
    fn from(error: WriteError) -> IngestError {
        match error {
            WriteError::Store(error) => IngestError::Store(error),
            WriteError::Lost => IngestError::Lost,
        }
    }
}

/// What a push waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wait {
    /// The events are on disk.
    #[default]
    Durable,
    /// Those that are due are in the online store.
    Visible,
}

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    pub accepted: u64,
    /// Events whose id was seen before; they are acknowledged and not taken again. Those that said something else than the
    /// event before are among the rejected as well.
    pub duplicates: u64,
    /// Of the accepted ones, those that wait for their time.
    pub early: u64,
    /// Rows that were not taken, and why.
    pub rejected: Vec<(u32, String)>,
    pub last_sequence: Option<u64>,
}

/// How far a generation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Every event goes to it as it is applied.
    Ready,
    /// It is filled from history or from files; `rows` so far.
    Building { rows: u64 },
    /// It waits for the first materialization of its source.
    Unmaterialized,
}

/// How a stream is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStatus {
    pub source: Arc<str>,
    /// Of the last event applied.
    pub applied: Position,
    /// Events in the log that are due and not applied yet.
    pub waiting_rows: u64,
    /// Events that wait for their time.
    pub early_rows: u64,
    /// Applied events that are not in history yet.
    pub unflushed_rows: u64,
    /// Rows of the prior history read so far, while it is being imported.
    pub importing: Option<u64>,
    /// Why nothing goes on, while it does not.
    pub trouble: Option<String>,
}

/// One stream source: shared by pushers, the applier and the builder.
pub(crate) struct Stream {
    pub name: Arc<str>,
    pub intake: Mutex<Intake>,
    /// Of the last event applied; pushes that wait to be visible watch it.
    pub applied: watch::Sender<Position>,
    /// Whether the prior history is in.
    pub imported: watch::Sender<bool>,
    pub early: AtomicU64,
    pub state: tokio::sync::Mutex<StreamState>,
    /// False when the definitions in force no longer name it.
    adopted: AtomicBool,
    /// A compaction of the history runs or waits for its turn.
    pub compacting: AtomicBool,
    report: Mutex<Report>,
}

#[derive(Debug, Default)]
struct Report {
    waiting_rows: u64,
    unflushed_rows: u64,
    importing: Option<u64>,
    trouble: Option<String>,
    build_trouble: Option<String>,
}

impl Stream {
    fn report(&self, state: &StreamState) {
        let mut report = lock(&self.report);
        report.waiting_rows = state.waiting_rows() as u64;
        report.unflushed_rows = state.unflushed_rows() as u64;
        if state.imported {
            report.importing = None;
        }
    }

    fn set_trouble(&self, trouble: Option<String>) {
        lock(&self.report).trouble = trouble;
    }

    fn set_build_trouble(&self, trouble: Option<String>) {
        lock(&self.report).build_trouble = trouble;
    }

    fn set_importing(&self, rows: u64) {
        lock(&self.report).importing = Some(rows);
    }

    fn status(&self) -> StreamStatus {
        let report = lock(&self.report);
        StreamStatus {
            source: self.name.clone(),
            applied: *self.applied.borrow(),
            waiting_rows: report.waiting_rows,
            early_rows: self.early.load(Ordering::Relaxed),
            unflushed_rows: report.unflushed_rows,
            importing: report.importing,
            trouble: report.trouble.clone().or_else(|| report.build_trouble.clone()),
        }
    }
}

/// What the handle and the tasks share.
pub(crate) struct Inner {
    pub options: IngestOptions,
    pub log: Log,
    /// Rings when the applier should look again: the clock was set, something was adopted.
    pub wake: Arc<Notify>,
    /// The same for whoever looks after the online store.
    pub look: Notify,
    /// What this process writes as, once it has taken over; 0 before.
    epoch: AtomicU64,
    /// Why this process may not write any more.
    fenced: watch::Sender<Option<String>>,
    /// Counts pushes that found the log full: the applier then flushes at once.
    pub flushes_asked: AtomicU64,
    /// Runs that go on by themselves, and why those do not that should.
    pub kept: Mutex<keep::Kept>,
    pub stopping: watch::Sender<bool>,
    streams: Mutex<BTreeMap<Arc<str>, Arc<Stream>>>,
    /// Records found when the log was opened, until their source is adopted.
    found: Mutex<BTreeMap<Arc<str>, Vec<Durable>>>,
    /// Records on disk from before the log was in a Redis.
    left: Vec<RecordRef>,
    plan: Mutex<Option<Arc<Plan>>>,
    /// Views of earlier definitions that go on being written.
    pinned: Mutex<Vec<Arc<ViewPlan>>>,
    phases: Mutex<BTreeMap<Generation, Phase>>,
    /// One adoption at a time.
    adopting: tokio::sync::Mutex<()>,
    /// One materialization at a time: two would write the same entities at different positions.
    materializing: tokio::sync::Mutex<()>,
    /// One compaction or import of files at a time: each is bounded, several are not.
    pub tables: tokio::sync::Mutex<()>,
    pub background: tables::Background,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Consulted by everybody who takes rows in; the views of plans have lists of their own.
    pub forgotten: ForgottenList,
    /// Held by whoever turns rows into writes, until they are written.
    pub writing: tokio::sync::RwLock<()>,
    /// Counts removals of entities from the online store.
    pub removals: AtomicU64,
    /// One act of forgetting at a time.
    pub forgetting: tokio::sync::Mutex<()>,
}

/// The ingestion of one project.
pub struct Ingest {
    inner: Arc<Inner>,
    applier: Mutex<Option<JoinHandle<()>>>,
}

/// Changes of what is locked are made in one step each, so a panic elsewhere leaves nothing half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error and its causes on one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        // Transparent errors repeat their source.
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

impl Ingest {
    /// Opens the log. Nothing is applied, and nothing can be pushed, before [`Ingest::adopt`].
    pub async fn open(options: IngestOptions) -> Result<Ingest, IngestError> {
        let (folder, log_options, clock) = (options.folder.clone(), options.log.clone(), options.clock.clone());
        let place = match &options.log_redis {
            None => log::Place::Disk,
            Some(url) => log::Place::Redis { url: url.clone(), project: options.project.clone() },
        };
        let opened = tokio::task::spawn_blocking(move || Log::open(&folder, place, log_options, clock)).await;
        let Opened { log, records, durable, left } =
            opened.map_err(|error| IngestError::Arrow(error.to_string()))??;
        let mut found: BTreeMap<Arc<str>, Vec<Durable>> = BTreeMap::new();
        for durable in records {
            found.entry(durable.record.source.clone()).or_default().push(durable);
        }
        let inner = Arc::new(Inner {
            options,
            log,
            wake: Arc::default(),
            look: Notify::new(),
            epoch: AtomicU64::new(0),
            fenced: watch::channel(None).0,
            flushes_asked: AtomicU64::new(0),
            kept: Mutex::default(),
            stopping: watch::channel(false).0,
            streams: Mutex::default(),
            found: Mutex::new(found),
            left,
            plan: Mutex::default(),
            pinned: Mutex::default(),
            phases: Mutex::default(),
            adopting: tokio::sync::Mutex::default(),
            materializing: tokio::sync::Mutex::default(),
            tables: tokio::sync::Mutex::default(),
            background: tables::Background::default(),
            tasks: Mutex::default(),
            forgotten: ForgottenList::default(),
            writing: tokio::sync::RwLock::default(),
            removals: AtomicU64::new(0),
            forgetting: tokio::sync::Mutex::default(),
        });
        // What a killed process was sorting. There is one process per folder, which the log has made sure of.
        let spill = tables::spill_folder(&inner);
        if let Err(error) = std::fs::remove_dir_all(&spill)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %spill.display(), %error, "temporary files of an earlier process could not be deleted");
        }
        let applier = tokio::spawn(apply::run(inner.clone(), durable));
        inner.spawn(keep::run(inner.clone()));
        Ok(Ingest { inner, applier: Mutex::new(Some(applier)) })
    }

    /// Takes over the definitions in force. When it returns, the plan's streams can be pushed to; imports of prior
    /// histories and builds of new views go on in the background.
    pub async fn adopt(&self, plan: Arc<Plan>) -> Result<(), IngestError> {
        self.adopt_with(plan, &[]).await
    }

    /// Like [`Ingest::adopt`], and goes on writing these views of earlier definitions too, because a model that may still
    /// serve pins them.
    pub async fn adopt_with(&self, plan: Arc<Plan>, pinned: &[Arc<ViewPlan>]) -> Result<(), IngestError> {
        let _one = self.inner.adopting.lock().await;
        self.inner.check_running()?;
        self.inner.take_over().await?;
        for source in plan.sources.iter().filter(|source| source.is_stream()) {
            self.inner.adopt_stream(source).await?;
        }
        let all: Vec<Arc<ViewPlan>> = plan.views.iter().chain(pinned).cloned().collect();
        let mut wanted_generations = BTreeSet::new();
        for source in &plan.sources {
            let views = all.iter().filter(|view| view.source.name == source.name && !view.is_offline_only());
            let mut writers: Vec<Arc<ViewWriter>> = views.map(|view| self.inner.writer(view)).collect();
            writers.sort_by(|a, b| a.generation.cmp(&b.generation));
            writers.dedup_by(|a, b| a.generation == b.generation);
            wanted_generations.extend(writers.iter().map(|writer| writer.generation.clone()));
            if source.is_stream() {
                self.inner.adopt_views(&source.name, writers).await?;
            } else {
                self.inner.adopt_file_views(&source.name, &writers).await?;
            }
        }
        lock(&self.inner.phases).retain(|generation, _| wanted_generations.contains(generation));
        for (name, stream) in self.inner.streams() {
            let is_there = plan.sources.iter().any(|source| source.is_stream() && source.name == name);
            if !is_there && stream.adopted.swap(false, Ordering::AcqRel) {
                self.inner.adopt_views(&name, Vec::new()).await?;
            }
        }
        *lock(&self.inner.plan) = Some(plan);
        *lock(&self.inner.pinned) = pinned.to_vec();
        self.inner.wake.notify_one();
        self.inner.look.notify_one();
        Ok(())
    }

    /// Appends events to the log; when this returns they survive whatever happens to the process. A cancelled call may or
    /// may not have appended.
    pub async fn push(&self, source: &str, batch: RecordBatch, wait: Wait) -> Result<Pushed, IngestError> {
        self.inner.check_running()?;
        let stream = self.inner.stream(source)?;
        let mut imported = stream.imported.subscribe();
        if !*imported.borrow_and_update() {
            let waited =
                tokio::time::timeout(self.inner.options.limits.import_wait, imported.wait_for(|imported| *imported));
            if !matches!(waited.await, Ok(Ok(_))) {
                let status = stream.status();
                let what = status.trouble.unwrap_or_else(|| format!("{} rows read", status.importing.unwrap_or(0)));
                return Err(IngestError::Importing { source_name: source.to_owned(), what });
            }
        }
        push::push(&self.inner, &stream, batch, wait).await
    }

    /// Brings what became known of file sources up to a time into the online store; all of them when none is named.
    pub async fn materialize(
        &self,
        sources: &[String],
        through: Micros,
        mode: Mode,
        progress: tokio::sync::mpsc::Sender<Progress>,
    ) -> Result<(), IngestError> {
        self.inner.check_running()?;
        materialize::materialize(&self.inner, sources, through, mode, progress).await
    }

    /// Makes one sorted run of the table of each of these sources; of all that have one when none is named. What was
    /// applied becomes history first.
    pub async fn compact(
        &self,
        sources: &[String],
        mode: Mode,
        progress: tokio::sync::mpsc::Sender<TableProgress>,
    ) -> Result<Vec<Compacted>, IngestError> {
        self.inner.check_running()?;
        tables::compact(&self.inner, sources, mode, progress).await
    }

    /// Imports the files of a source into its table, unless they are there already.
    pub async fn import_files(
        &self,
        source: &str,
        progress: tokio::sync::mpsc::Sender<TableProgress>,
    ) -> Result<FilesImported, IngestError> {
        self.inner.check_running()?;
        tables::import_files(&self.inner, source, progress).await
    }

    /// Puts everything applied into history. Returns the number of events written.
    pub async fn flush(&self) -> Result<u64, IngestError> {
        let mut events = 0;
        for stream in self.inner.streams().values() {
            events += stream.state.lock().await.flush(&self.inner).await?;
        }
        Ok(events)
    }

    /// Whether readers may use a generation.
    pub fn ready(&self, generation: &Generation) -> bool {
        lock(&self.inner.phases).get(generation) == Some(&Phase::Ready)
    }

    /// Generations that are not ready, and how far they are.
    pub fn backfilling(&self) -> Vec<(Generation, Phase)> {
        let phases = lock(&self.inner.phases);
        phases.iter().filter(|(_, phase)| **phase != Phase::Ready).map(|(g, phase)| (g.clone(), *phase)).collect()
    }

    /// What goes wrong with what is done without being asked, for people.
    pub fn troubles(&self) -> Vec<String> {
        let mut troubles = lock(&self.inner.kept).troubles();
        troubles.extend(self.inner.log.trouble());
        troubles
    }

    /// Where the event log is, if it is not on this machine's disk.
    pub fn log_place(&self) -> Option<String> {
        self.inner.log.remote().map(str::to_owned)
    }

    /// The newest runs of a source of files, newest first.
    pub async fn runs(&self, source: &str, runs_max: usize) -> Result<Vec<Run>, IngestError> {
        Ok(self.inner.runs().newest(source, runs_max).await?)
    }

    pub fn status(&self) -> Vec<StreamStatus> {
        self.inner.streams().values().map(|stream| stream.status()).collect()
    }

    /// Bytes of the event log.
    pub fn log_bytes(&self) -> u64 {
        self.inner.log.bytes()
    }

    /// Makes appliers and schedules look again at once, for tests and simulations that set the clock.
    pub fn wake(&self) {
        self.inner.wake.notify_one();
        self.inner.look.notify_one();
    }

    /// Takes no more pushes, applies what is due, puts it into history and closes the log.
    pub async fn shutdown(&self) -> Result<(), IngestError> {
        self.inner.stopping.send_replace(true);
        let (durable, ticket) = self.inner.log.everything();
        let durable = self.inner.log.wait_durable(durable, ticket).await;
        self.inner.end_tasks().await;
        let applier = lock(&self.applier).take();
        if let Some(applier) = applier {
            applier.await.map_err(|error| IngestError::Arrow(error.to_string()))?;
        }
        let inner = self.inner.clone();
        let closed = tokio::task::spawn_blocking(move || inner.log.close()).await;
        closed.map_err(|error| IngestError::Arrow(error.to_string()))?;
        Ok(durable?)
    }

    /// Ends like a killed process: nothing is flushed, nothing is finished.
    #[cfg(test)]
    pub(crate) async fn abandon(self) {
        let applier = lock(&self.applier).take();
        if let Some(task) = applier {
            task.abort();
            let _ = task.await;
        }
        self.inner.end_tasks().await;
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        for task in lock(&self.applier).iter().chain(lock(&self.inner.tasks).iter()) {
            task.abort();
        }
    }
}

impl Inner {
    pub fn project_path(&self) -> Path {
        self.options.prefix.clone().join(&*self.options.project)
    }

    pub fn streams(&self) -> BTreeMap<Arc<str>, Arc<Stream>> {
        lock(&self.streams).clone()
    }

    pub fn plan(&self) -> Option<Arc<Plan>> {
        lock(&self.plan).clone()
    }

    pub fn pinned(&self) -> Vec<Arc<ViewPlan>> {
        lock(&self.pinned).clone()
    }

    pub fn set_phase(&self, generation: &Generation, phase: Phase) {
        lock(&self.phases).insert(generation.clone(), phase);
    }

    pub fn phase(&self, generation: &Generation) -> Option<Phase> {
        lock(&self.phases).get(generation).copied()
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|task| !task.is_finished());
        tasks.push(tokio::spawn(task));
    }

    pub fn runs(&self) -> RunLog {
        RunLog::new(self.options.store.clone(), self.project_path())
    }

    pub fn writer(&self, view: &Arc<ViewPlan>) -> Arc<ViewWriter> {
        Arc::new(ViewWriter::new(&self.options.project, view.clone(), self.options.expires))
    }

    /// Who writes.
    pub fn hand(&self) -> Hand<'_> {
        Hand {
            store: &*self.options.online,
            project: &self.options.project,
            epoch: self.epoch(),
            now: (self.options.clock)(),
            removals: self.removals.load(Ordering::Acquire),
        }
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Claims the online store for this process: writes of those before it are refused from now on.
    async fn take_over(&self) -> Result<(), IngestError> {
        if self.epoch() == 0 {
            let candidate = u64::try_from((self.options.clock)()).unwrap_or(1).max(1);
            let name = format!("applier/{}", self.options.project);
            let epoch = self.options.online.claim(&name, candidate).await?;
            self.epoch.store(epoch, Ordering::Release);
        }
        Ok(())
    }

    /// This process was replaced: it writes nothing more.
    pub fn fence(&self, error: &StoreError) {
        let what = error.to_string();
        let is_news = self.fenced.send_if_modified(|fenced| {
            let is_news = fenced.is_none();
            fenced.get_or_insert(what.clone());
            is_news
        });
        if is_news {
            tracing::error!(what, "another process has taken over the online store; this one stops writing");
        }
    }

    pub fn check_fence(&self) -> Result<(), IngestError> {
        match &*self.fenced.borrow() {
            Some(what) => Err(IngestError::Fenced { what: what.clone() }),
            None => Ok(()),
        }
    }

    /// Waits until this process is fenced.
    pub async fn until_fenced(&self) {
        let mut fenced = self.fenced.subscribe();
        // The sender lives as long as this.
        let _ = fenced.wait_for(Option::is_some).await;
    }

    /// Ends what goes on in the background, and what that began meanwhile. What was not finished is done again by the next
    /// process.
    async fn end_tasks(&self) {
        loop {
            let tasks = std::mem::take(&mut *lock(&self.tasks));
            if tasks.is_empty() {
                return;
            }
            tasks.iter().for_each(JoinHandle::abort);
            for task in tasks {
                let _ = task.await;
            }
        }
    }

    pub fn check_running(&self) -> Result<(), IngestError> {
        if *self.stopping.borrow() { Err(IngestError::Stopping) } else { self.check_fence() }
    }

    fn stream(&self, source: &str) -> Result<Arc<Stream>, IngestError> {
        let streams = lock(&self.streams);
        if let Some(stream) = streams.get(source).filter(|stream| stream.adopted.load(Ordering::Acquire)) {
            return Ok(stream.clone());
        }
        let plan = self.plan().ok_or(IngestError::NoPlan)?;
        if plan.source(source).is_some() {
            return Err(IngestError::NotAStream { source_name: source.to_owned() });
        }
        let known: Vec<&str> = plan.sources.iter().filter(|s| s.is_stream()).map(|s| &*s.name).collect();
        Err(IngestError::UnknownSource { source_name: source.to_owned(), known: known.join(", ") })
    }

    async fn adopt_stream(&self, source: &Arc<feature_defs::plan::SourcePlan>) -> Result<(), IngestError> {
        let SourceKind::Stream { history: pattern, .. } = &source.kind else { return Ok(()) };
        let late = |history: &History| match (&history.manifest().imported, pattern) {
            (None, Some(pattern)) if history.manifest().applied > Position::START => {
                let source_name = source.name.to_string();
                Err(IngestError::HistoryAfterLive { source_name, pattern: pattern.clone() })
            }
            _ => Ok(()),
        };
        // A column that changed its type in a way that loses something is found out now, not when history is read.
        let fits = |history: &History| {
            let fields = history.manifest().schema.iter();
            let fields: Vec<Field> = fields.map(|(name, t)| Field::new(name, t.arrow(), true)).collect();
            source.align(&RecordBatch::new_empty(Arc::new(Schema::new(fields))), None)
        };
        let known = lock(&self.streams).get(&source.name).cloned();
        if let Some(stream) = known {
            let mut state = stream.state.lock().await;
            // What was applied under the old columns goes into history under them.
            state.flush(self).await?;
            late(&state.history)?;
            fits(&state.history)?;
            state.plan = source.clone();
            if pattern.is_some() && state.history.manifest().imported.is_none() && state.imported {
                state.imported = false;
                stream.imported.send_replace(false);
            }
            lock(&stream.intake).adopt(source.clone());
            stream.adopted.store(true, Ordering::Release);
            return Ok(());
        }
        let history = History::open(self.options.store.clone(), self.project_path(), &source.name).await?;
        let history = history.with_work(tables::work(self));
        late(&history)?;
        fits(&history)?;
        self.check_left(&history)?;
        self.log.raise(history.manifest().applied.time, history.manifest().sequence_max);
        let limits = &self.options.limits;
        let ids = EventIds::new(limits.event_ids_max, limits.event_ids_horizon);
        let imported = pattern.is_none() || history.manifest().imported.is_some();
        let applied = history.manifest().applied;
        let stream = Arc::new(Stream {
            name: source.name.clone(),
            intake: Mutex::new(Intake::new(source.clone(), ids, applied)),
            applied: watch::channel(applied).0,
            imported: watch::channel(imported).0,
            early: AtomicU64::new(0),
            state: tokio::sync::Mutex::new(StreamState::new(source.clone(), history)),
            adopted: AtomicBool::new(true),
            compacting: AtomicBool::new(false),
            report: Mutex::default(),
        });
        let mut state = stream.state.lock().await;
        let oldest = (self.options.clock)().saturating_sub(limits.event_ids_horizon);
        backfill::recall_ids(&stream, source, &state.history, oldest).await?;
        let found = lock(&self.found).get(&source.name).cloned().unwrap_or_default();
        for durable in found {
            let record = &durable.record;
            if record.import.is_none() || record.import.as_deref() == state.import_id() {
                self.recall_logged_ids(&stream, source, &durable).await?;
            }
            state.receive(&self.log, durable).await?;
        }
        if imported {
            state.go_on(&self.log).await?;
        }
        if let Some(position) = state.last_on_time() {
            lock(&stream.intake).last_on_time = position;
        }
        drop(state);
        self.log.delete_released();
        lock(&self.found).remove(&source.name);
        lock(&self.streams).insert(source.name.clone(), stream);
        Ok(())
    }

    /// What was acknowledged while the log was on disk has to be in the history before another log is used.
    fn check_left(&self, history: &History) -> Result<(), IngestError> {
        let manifest = history.manifest();
        let import = manifest.imported.as_ref().map(|imported| imported.id.as_str());
        for record in self.left.iter().filter(|record| *record.source == *manifest.source) {
            if record.import.is_some() && record.import.as_deref() != import {
                continue;
            }
            let due = self.log.read_left(record)?.due;
            let position = |(row, due): (usize, &Micros)| Position {
                time: record.arrival.max(*due),
                sequence: record.first_sequence + row as u64,
            };
            if due.iter().enumerate().map(position).any(|position| position > manifest.applied) {
                let (folder, source_name) = (self.log.folder().display().to_string(), record.source.to_string());
                return Err(IngestError::LeftOnDisk { folder, source_name });
            }
        }
        Ok(())
    }

    async fn recall_logged_ids(
        &self,
        stream: &Stream,
        source: &feature_defs::plan::SourcePlan,
        Durable { record, events }: &Durable,
    ) -> Result<(), IngestError> {
        let SourceKind::Stream { event_id: Some(name), .. } = &source.kind else { return Ok(()) };
        let events = match events {
            Some(events) => events.clone(),
            None => self.log.read(record).await?,
        };
        // A record whose columns no longer fit is a matter for the applier; its ids are remembered if they can be read.
        let (batch, is_whole) = match source.align(&events.batch, None) {
            Ok(batch) => (batch, true),
            Err(_) => match source.align(&events.batch, Some(std::slice::from_ref(name))) {
                Ok(batch) => (batch, false),
                Err(_) => return Ok(()),
            },
        };
        let mut intake = lock(&stream.intake);
        let payloads = is_whole.then(|| intake.ids.payloads(source, &batch));
        for (row, id) in intake.ids.hashes(source, name, &batch).into_iter().enumerate() {
            if let Some(id) = id {
                let payload = payloads.as_ref().map(|payloads| payloads[row]);
                intake.ids.insert(id, payload, record.arrival);
            }
        }
        Ok(())
    }

    /// The name of the mark up to which a stream's events are in all of its live generations.
    pub fn mark_of(&self, source: &str) -> String {
        format!("mark/{}/{source}", self.options.project)
    }

    fn wanted_fact(&self, source: &str) -> String {
        format!("wanted/{}/{source}", self.options.project)
    }

    /// Writes down which generations of a source receive its events. A ready generation that is not named there missed
    /// some, whatever its ready fact says.
    pub async fn remember_wanted(&self, source: &str, state: &StreamState) -> Result<(), IngestError> {
        let names: Vec<String> =
            state.live.iter().chain(&state.building).map(|writer| writer.generation.ready_fact()).collect();
        let names = Bytes::from(names.join("\n"));
        self.options.online.write(vec![Write::Fact(self.wanted_fact(source), Some(names))]).await?;
        Ok(())
    }

    async fn adopt_views(
        self: &Arc<Self>,
        source: &Arc<str>,
        writers: Vec<Arc<ViewWriter>>,
    ) -> Result<(), IngestError> {
        let Some(stream) = lock(&self.streams).get(source).cloned() else { return Ok(()) };
        let mut state = stream.state.lock().await;
        let online = &self.options.online;
        let mut reads = vec![Read::Fact(self.wanted_fact(source)), Read::Mark(self.mark_of(source))];
        reads.extend(writers.iter().map(|writer| Read::Fact(writer.generation.ready_fact())));
        let answers = online.read(&reads).await?;
        let before: BTreeSet<String> = match answers.first() {
            Some(Answer::Fact(Some(names))) => String::from_utf8_lossy(names).lines().map(str::to_owned).collect(),
            _ => BTreeSet::new(),
        };
        // A generation is ready only behind a mark.
        let mark = match answers.get(1) {
            Some(Answer::Mark(mark)) => *mark,
            _ => None,
        };
        let (mut live, mut building, mut forget) = (Vec::new(), Vec::new(), Vec::new());
        for (writer, answer) in writers.into_iter().zip(&answers[2..]) {
            let fact = writer.generation.ready_fact();
            let is_ready = matches!(answer, Answer::Fact(Some(_)));
            if is_ready && mark.is_some() && before.contains(&fact) && state.imported {
                self.set_phase(&writer.generation, Phase::Ready);
                live.push(writer);
            } else {
                if is_ready {
                    forget.push(Write::Fact(fact, None));
                }
                if !matches!(self.phase(&writer.generation), Some(Phase::Building { .. })) {
                    self.set_phase(&writer.generation, Phase::Building { rows: 0 });
                }
                // A build under way goes on only for the very same writer: one that was dropped meanwhile starts anew.
                let same = state.building.iter().find(|known| known.generation == writer.generation).cloned();
                building.push(same.unwrap_or(writer));
            }
        }
        let is_wanted = |generation: &Generation| live.iter().chain(&building).any(|w| w.generation == *generation);
        let left: Vec<Generation> = state
            .live
            .iter()
            .chain(&state.building)
            .map(|writer| writer.generation.clone())
            .filter(|generation| !is_wanted(generation))
            .collect();
        forget.extend(left.iter().map(|generation| Write::Fact(generation.ready_fact(), None)));
        if !forget.is_empty() {
            online.write(forget).await?;
        }
        state.set_live(live);
        state.building = building;
        if let Some(mark) = mark.filter(|_| !state.live.is_empty()) {
            state.look_at_mark(self, mark);
        }
        self.remember_wanted(source, &state).await?;
        backfill::start(self, &stream, &mut state);
        drop(state);
        // Done before the next adoption, which may want the same generation again.
        for generation in left {
            if let Err(error) = online.remove_generation(&generation).await {
                let view = &*generation.view;
                tracing::warn!(view, %error, "an old generation of a view could not be removed from the online store");
            }
        }
        Ok(())
    }

    /// Views over files are filled by materialization; generations that nobody wants any more go.
    async fn adopt_file_views(&self, source: &str, writers: &[Arc<ViewWriter>]) -> Result<(), IngestError> {
        // A run under way would go on writing what is removed here, and call it complete in the end.
        let _none_runs = self.materializing.lock().await;
        let online = &self.options.online;
        let mut reads = vec![Read::Fact(self.wanted_fact(source))];
        reads.extend(writers.iter().map(|writer| Read::Fact(writer.generation.ready_fact())));
        let answers = online.read(&reads).await?;
        let mut names: Vec<String> = Vec::new();
        for (writer, answer) in writers.iter().zip(&answers[1..]) {
            let is_ready = matches!(answer, Answer::Fact(Some(_)));
            self.set_phase(&writer.generation, if is_ready { Phase::Ready } else { Phase::Unmaterialized });
            names.push(format!("{}@{}", writer.generation.view, writer.generation.digest));
        }
        if let Answer::Fact(Some(before)) = &answers[0] {
            let before = String::from_utf8_lossy(before).into_owned();
            let gone = before.lines().filter(|line| !names.iter().any(|name| name == line));
            for (view, digest) in gone.filter_map(|line| line.split_once('@')) {
                let generation = Generation::new(&self.options.project, view, digest);
                online.write(materialize::forget(&generation)).await?;
                online.remove_generation(&generation).await?;
            }
        }
        online.write(vec![Write::Fact(self.wanted_fact(source), Some(Bytes::from(names.join("\n"))))]).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
