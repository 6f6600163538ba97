//! The serving log's writing side: which answered rows are logged, and how they get to the object store without anybody
//! waiting for it.
//!
//! The observing thread chooses rows and keeps them in memory, within a bound. Every `flush` they go to a thread of the lowest
//! priority, which encodes them and puts them down as files on this machine's disk, within another bound; a task uploads these
//! and removes them. So an object store that is away costs disk, and a disk that is full costs log, and both are said; rows
//! that a kill finds in memory, at most one flush, are lost. Beside the files goes an account of what was offered, taken and
//! lost in each minute.

mod metrics;
mod rows;
mod spool;
mod upload;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use chrono::NaiveDate;
use feature_defs::catalog::ServingLogSettings;
use feature_defs::plan::{ServicePlan, encode_entity_keys};
use feature_defs::time::Micros;
use feature_defs::value::Type;
use object_store::ObjectStore;
use object_store::path::Path;
use offline_store::serving_log::{self, FORMAT, FileName, Header, LogSchema, Losses, Minute, Place, Sampler};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::observe::{About, Observed, Observer};
use crate::status::chain;
use rows::Why;
use spool::Spool;

pub use metrics::LogMetrics;
pub use upload::{Uploads, hash_key};

/// Rows of all services that wait in memory hold at most so much; what is chosen beyond is dropped.
const BUFFER_BYTES_MAX: usize = 64 << 20;
/// A file is cut before it has more.
const FILE_BYTES_MAX: usize = 8 << 20;
const FILE_ROWS_MAX: usize = 50_000;
/// Files that wait to be encoded.
const ENCODING_MAX: usize = 4;
/// Services and models whose rows are kept apart; more are dropped: no project has so many.
const GROUPS_MAX: usize = 4_096;
/// Accounts of days that are over are kept for so long after, for answers that come late.
const ACCOUNT_KEPT: Micros = 3_600_000_000;
/// Fallback rows may come in bursts of so many seconds' worth.
const BURST_SECONDS: f64 = 5.0;
/// How long the end waits for what is chosen to be encoded.
const END_WITHIN: Duration = Duration::from_secs(10);
const NICE: i32 = 19;

/// Why a server cannot log.
#[derive(Debug, thiserror::Error)]
pub enum LogSetupError {
    #[error("cannot make or lock the folder {folder} for the serving log; check that it may be written")]
    Folder { folder: PathBuf, source: std::io::Error },
    #[error("the key that sensitive columns of the serving log are hashed with cannot be read or made at {path}")]
    Key { path: String, source: object_store::Error },
    #[error("a thread for the serving log cannot be started")]
    Thread(#[source] std::io::Error),
}

/// What the log of a server is set up with.
pub struct LogParts {
    pub settings: ServingLogSettings,
    pub project: String,
    /// The project's root on the object store.
    pub root: Path,
    pub store: Arc<dyn ObjectStore>,
    /// On this machine's disk.
    pub folder: PathBuf,
}

/// A log, ready: the observer chooses rows, and whatever runs the server polls the uploads.
pub struct ServingLog {
    pub observer: Box<dyn Observer>,
    pub uploads: Uploads,
}

/// Counts of rows that the threads of the log share.
#[derive(Default)]
pub struct Accounts {
    minutes: Mutex<HashMap<Place, BTreeMap<i64, Minute>>>,
    /// Rows lost since the start, for whoever asks how it goes.
    lost: AtomicU64,
}

impl Accounts {
    fn lock(&self) -> MutexGuard<'_, HashMap<Place, BTreeMap<i64, Minute>>> {
        self.minutes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, service: &str, minute: i64, counts: &Minute) {
        self.lost.fetch_add(counts.lost(), Ordering::Relaxed);
        let place = Place::of(service, minute.saturating_mul(60_000_000));
        self.lock().entry(place).or_default().entry(minute).or_default().add(counts);
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Rows that share a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Group {
    /// Where its plan lies says which service it is, as long as the plan is held.
    plan: usize,
    model: Option<Arc<str>>,
    /// The types of outputs may change with the version.
    version: u32,
    day: NaiveDate,
}

struct Pending {
    /// Held for [`Group::plan`].
    service: Arc<ServicePlan>,
    schema: LogSchema,
    batches: Vec<RecordBatch>,
    /// Rows by minute.
    minutes: BTreeMap<i64, u64>,
    bytes: usize,
    at: (Micros, Micros),
    time: (Micros, Micros),
}

impl Pending {
    fn rows(&self) -> u64 {
        self.minutes.values().sum()
    }
}

/// What the encoding thread is given.
#[expect(clippy::large_enum_variant, reason = "a handful of them wait, and nearly all are files")]
enum Work {
    File {
        place: Place,
        name: FileName,
        header: Header,
        schema: SchemaRef,
        batches: Vec<RecordBatch>,
        minutes: BTreeMap<i64, u64>,
        bytes: usize,
    },
    /// The accounts, after all files before.
    Accounts { now: Micros, ended: bool },
}

/// Rows per second, with bursts.
struct Rate {
    per_second: f64,
    left: f64,
    since: Instant,
}

impl Rate {
    fn new(per_second: u32) -> Rate {
        let per_second = f64::from(per_second);
        Rate { per_second, left: per_second * BURST_SECONDS, since: Instant::now() }
    }

    fn takes(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since).as_secs_f64();
        self.since = now;
        self.left = (self.left + passed * self.per_second).min(self.per_second * BURST_SECONDS);
        let takes = self.left >= 1.0;
        if takes {
            self.left -= 1.0;
        }
        takes
    }
}

struct Log {
    settings: ServingLogSettings,
    project: String,
    gateway: String,
    incarnation: String,
    key: Vec<u8>,
    accounts: Arc<Accounts>,
    metrics: LogMetrics,
    sampler: Sampler,
    sampled_day: NaiveDate,
    random: u64,
    fallbacks: HashMap<Arc<str>, Rate>,
    pending: HashMap<Group, Pending>,
    /// Of all that is pending or waits to be encoded.
    bytes: Arc<AtomicU64>,
    flushed: Instant,
    files: u64,
    work: Option<SyncSender<Work>>,
    encoder: Option<JoinHandle<()>>,
}

impl ServingLog {
    /// `gateway` is where it listens: for people.
    pub async fn open(parts: LogParts, gateway: String, metrics: LogMetrics) -> Result<ServingLog, LogSetupError> {
        let LogParts { settings, project, root, store, folder } = parts;
        let incarnation = Uuid::new_v4().simple().to_string();
        let spool = Spool::open(&folder, &incarnation, settings.spool_bytes);
        let spool = Arc::new(spool.map_err(|source| LogSetupError::Folder { folder: folder.clone(), source })?);
        let key = upload::key_or_kept(&settings, &store, &root, &folder).await?;
        let accounts = Arc::new(Accounts::default());
        let changed = Arc::new(Notify::new());
        let bytes = Arc::new(AtomicU64::new(0));
        let (work, received) = sync_channel(ENCODING_MAX);
        let encoding = Encoding {
            spool: spool.clone(),
            accounts: accounts.clone(),
            metrics: metrics.clone(),
            gateway: gateway.clone(),
            incarnation: incarnation.clone(),
            flush: settings.flush,
            bytes: bytes.clone(),
            changed: changed.clone(),
        };
        let thread = std::thread::Builder::new().name("serving-log".into()).spawn(move || {
            crate::nice::lower(NICE);
            encoding.run(&received);
        });
        let retention = settings.retention;
        let observer = Log {
            sampler: Sampler::new(&project, NaiveDate::MIN, settings.sample),
            sampled_day: NaiveDate::MIN,
            random: Uuid::new_v4().as_u64_pair().0,
            fallbacks: HashMap::new(),
            pending: HashMap::new(),
            bytes,
            flushed: Instant::now(),
            files: 0,
            work: Some(work),
            encoder: Some(thread.map_err(LogSetupError::Thread)?),
            accounts: accounts.clone(),
            metrics: metrics.clone(),
            settings,
            project,
            gateway,
            incarnation,
            key: key.clone(),
        };
        let uploads = Uploads {
            store,
            root,
            folder,
            spool,
            changed,
            metrics,
            accounts,
            retention,
            failing: Mutex::default(),
            key,
        };
        Ok(ServingLog { observer: Box::new(observer), uploads })
    }
}

impl Log {
    /// Which rows are logged, in order, and what the account says of them.
    fn choose(&mut self, observed: &Observed) -> (Vec<(u32, Why)>, Minute) {
        let day = serving_log::day(observed.time);
        if day != self.sampled_day {
            self.sampled_day = day;
            self.sampler = Sampler::new(&self.project, day, self.settings.sample);
        }
        let count = observed.rows.count;
        let mut counts = Minute { offered: count as u64, ..Minute::default() };
        let keys: Vec<_> = observed
            .service
            .columns
            .iter()
            .zip(&observed.rows.columns)
            .filter(|(column, _)| column.is_key)
            .map(|(column, array)| (array.clone(), &column.column_type))
            .collect::<Vec<(_, &Type)>>();
        let encoded = encode_entity_keys(&keys, count);
        let now = Instant::now();
        let mut chosen = Vec::new();
        for row in 0..count {
            // A key with a null is a tuple like any other.
            let why = if self.sampler.takes(encoded.get(row).unwrap_or_default()) {
                Why::Key
            } else if self.settings.uniform > 0.0 && self.next_random() < self.settings.uniform {
                Why::Uniform
            } else if rows::has_fallback(observed, row) {
                let rate = self.fallbacks.entry(observed.service.name.clone());
                let per_second = self.settings.fallbacks_per_second;
                if !rate.or_insert_with(|| Rate::new(per_second)).takes(now) {
                    counts.fallbacks_over += 1;
                    continue;
                }
                Why::Fallback
            } else {
                continue;
            };
            chosen.push((row as u32, why));
        }
        counts.chosen = chosen.len() as u64;
        (chosen, counts)
    }

    /// SplitMix64, as a number from 0 to below 1.
    fn next_random(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Keeps rows until the next flush; false where there is no room for them.
    fn keep(&mut self, observed: &Observed, chosen: &[(u32, Why)]) -> bool {
        if self.bytes.load(Ordering::Relaxed) > BUFFER_BYTES_MAX as u64 {
            return false;
        }
        let of = observed.prediction.as_ref();
        let group = Group {
            plan: Arc::as_ptr(&observed.service) as usize,
            model: of.map(|of| of.plan.name.clone()),
            version: of.map_or(0, |of| of.version),
            day: serving_log::day(observed.time),
        };
        if self.pending.len() >= GROUPS_MAX && !self.pending.contains_key(&group) {
            return false;
        }
        let outputs: Vec<(String, Type)> = of
            .iter()
            .flat_map(|of| &of.outputs)
            .map(|(name, _, value_type)| (name.clone(), value_type.clone()))
            .collect();
        // A model may answer with one number or with several.
        let fits = |pending: &Pending| {
            let output = |(name, value_type): &(String, Type)| {
                let field = pending.schema.schema.field_with_name(&serving_log::columns::output(name));
                field.is_ok_and(|field| *field.data_type() == value_type.arrow())
            };
            outputs.iter().all(output)
        };
        if self.pending.get(&group).is_some_and(|pending| !fits(pending)) {
            self.hand_on(&group);
        }
        if self.pending.get(&group).is_some_and(|pending| !fits(pending)) {
            return false;
        }
        let pending = self.pending.entry(group.clone()).or_insert_with(|| Pending {
            service: observed.service.clone(),
            schema: LogSchema::of(&observed.service, &outputs),
            batches: Vec::new(),
            minutes: BTreeMap::new(),
            bytes: 0,
            at: (Micros::MAX, Micros::MIN),
            time: (Micros::MAX, Micros::MIN),
        });
        let batch = match rows::batch(observed, chosen, &pending.schema, &self.key) {
            Ok(batch) => batch,
            Err(error) => {
                tracing::error!(service = %observed.service.name, %error, "answered rows could not be made into rows of the log");
                return false;
            }
        };
        let bytes = batch.get_array_memory_size();
        pending.bytes += bytes;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        pending.batches.push(batch);
        *pending.minutes.entry(Minute::of(observed.time)).or_default() += chosen.len() as u64;
        for at in chosen.iter().map(|(row, _)| observed.features.fetched.at[*row as usize]) {
            pending.at = (pending.at.0.min(at), pending.at.1.max(at));
        }
        pending.time = (pending.time.0.min(observed.time), pending.time.1.max(observed.time));
        if pending.bytes >= FILE_BYTES_MAX || pending.rows() >= FILE_ROWS_MAX as u64 {
            self.hand_on(&group);
        }
        true
    }

    /// Gives a group's rows to the encoding thread, or keeps them where it has enough to do.
    fn hand_on(&mut self, group: &Group) {
        let Some(mut pending) = self.pending.remove(group) else { return };
        let Some(work) = &self.work else { return };
        let (first_at, last_at) = pending.at;
        let header = Header {
            format: FORMAT,
            project: self.project.clone(),
            gateway: self.gateway.clone(),
            incarnation: self.incarnation.clone(),
            service: pending.service.name.to_string(),
            semantic_digest: pending.service.semantic_digest.to_string(),
            model: group.model.as_ref().map(ToString::to_string),
            hashed: pending.schema.hashed.clone(),
            first_at,
            last_at,
            first_time: pending.time.0,
            last_time: pending.time.1,
            rows: pending.rows(),
        };
        let file = Work::File {
            place: Place { service: header.service.clone(), day: group.day },
            name: FileName { first_at, last_at, incarnation: self.incarnation.clone(), number: self.files },
            header,
            schema: pending.schema.schema.clone(),
            batches: std::mem::take(&mut pending.batches),
            minutes: std::mem::take(&mut pending.minutes),
            bytes: pending.bytes,
        };
        match work.try_send(file) {
            Ok(()) => self.files += 1,
            Err(TrySendError::Full(Work::File { batches, minutes, bytes, .. })) => {
                let Pending { service, schema, at, time, .. } = pending;
                self.pending.insert(group.clone(), Pending { service, schema, batches, minutes, bytes, at, time });
            }
            // The thread has panicked: nothing is logged any more, and that is counted.
            Err(TrySendError::Disconnected(Work::File { minutes, bytes, .. })) => {
                self.bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
                for (minute, rows) in minutes {
                    let lost = Minute { dropped_buffer: rows, ..Minute::default() };
                    self.accounts.add(&pending.service.name, minute, &lost);
                    self.metrics.count(&pending.service.name, &lost);
                }
            }
            Err(TrySendError::Full(Work::Accounts { .. }) | TrySendError::Disconnected(Work::Accounts { .. })) => {}
        }
    }

    fn flush(&mut self, now: Micros) {
        let groups: Vec<Group> = self.pending.keys().cloned().collect();
        groups.iter().for_each(|group| self.hand_on(group));
        if let Some(work) = &self.work {
            // Where it is busy the next flush brings them.
            let _ = work.try_send(Work::Accounts { now, ended: false });
        }
    }
}

impl Observer for Log {
    fn observe(&mut self, observed: &Observed) {
        let (chosen, mut counts) = self.choose(observed);
        if !chosen.is_empty() && !self.keep(observed, &chosen) {
            counts.dropped_buffer = counts.chosen;
        }
        self.accounts.add(&observed.service.name, Minute::of(observed.time), &counts);
        self.metrics.count(&observed.service.name, &counts);
    }

    fn dropped(&mut self, about: &About, time: Micros, rows: u64) {
        let counts = Minute { dropped_queue: rows, ..Minute::default() };
        self.accounts.add(&about.service, Minute::of(time), &counts);
        self.metrics.count(&about.service, &counts);
    }

    fn tick(&mut self, now: Micros) {
        if self.flushed.elapsed() >= self.settings.flush {
            self.flushed = Instant::now();
            self.flush(now);
        }
    }

    /// The server has stopped: now the threads may wait for each other.
    fn end(&mut self, now: Micros) {
        let deadline = Instant::now() + END_WITHIN;
        while !self.pending.is_empty() && Instant::now() < deadline {
            let groups: Vec<Group> = self.pending.keys().cloned().collect();
            groups.iter().for_each(|group| self.hand_on(group));
            if !self.pending.is_empty() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        if let Some(work) = self.work.take() {
            let _ = work.send(Work::Accounts { now, ended: self.pending.is_empty() });
        }
        if let Some(encoder) = self.encoder.take()
            && encoder.join().is_err()
        {
            tracing::error!("the thread that encodes the serving log has panicked");
        }
    }
}

/// What the encoding thread works with.
struct Encoding {
    spool: Arc<Spool>,
    accounts: Arc<Accounts>,
    metrics: LogMetrics,
    gateway: String,
    incarnation: String,
    flush: Duration,
    bytes: Arc<AtomicU64>,
    changed: Arc<Notify>,
}

impl Encoding {
    fn run(&self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            match work {
                Work::File { place, name, header, schema, batches, minutes, bytes } => {
                    let written = self.write(&place, &name, &header, &schema, &batches);
                    drop(batches);
                    self.bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
                    for (minute, rows) in minutes {
                        let counts = match written {
                            true => Minute { written: rows, ..Minute::default() },
                            false => Minute { dropped_spool: rows, ..Minute::default() },
                        };
                        self.accounts.add(&place.service, minute, &counts);
                        self.metrics.count(&place.service, &counts);
                    }
                }
                Work::Accounts { now, ended } => self.write_accounts(now, ended),
            }
            self.metrics.spooled(self.spool.bytes());
            self.changed.notify_one();
        }
    }

    fn write(
        &self,
        place: &Place,
        name: &FileName,
        header: &Header,
        schema: &SchemaRef,
        batches: &[RecordBatch],
    ) -> bool {
        let mut bytes = Vec::new();
        if let Err(error) = serving_log::encode(header, schema, batches, &mut bytes) {
            tracing::error!(service = %place.service, rows = header.rows, error = %chain(&error), "rows of the serving log are lost");
            return false;
        }
        if self.spool.is_full(bytes.len() as u64) {
            tracing::warn!(
                service = %place.service,
                rows = header.rows,
                "the disk holds as much of the serving log as `serving_log.spool` allows; rows are lost"
            );
            return false;
        }
        let put = self.spool.put(&[&place.service, &place.day.to_string(), &name.to_string()], &bytes);
        if let Err(error) = &put {
            tracing::error!(service = %place.service, rows = header.rows, %error, "the serving log could not be written to disk; rows are lost");
        }
        put.is_ok()
    }

    /// Accounts are small, and say what is missing: they are written however full the disk is.
    fn write_accounts(&self, now: Micros, ended: bool) {
        let accounts: Vec<Losses> = {
            let mut days = self.accounts.lock();
            let kept = serving_log::day(now.saturating_sub(ACCOUNT_KEPT));
            let today = serving_log::day(now);
            let all = days.iter().map(|(place, minutes)| Losses {
                format: FORMAT,
                gateway: self.gateway.clone(),
                incarnation: self.incarnation.clone(),
                service: place.service.clone(),
                day: place.day,
                flush_seconds: self.flush.as_secs_f64(),
                flushed: now,
                // A day that is over has ended too.
                ended: ended || place.day < kept,
                minutes: minutes.clone(),
            });
            let all = all.collect();
            days.retain(|place, _| place.day >= kept || place.day > today);
            all
        };
        for losses in accounts {
            let Ok(bytes) = serde_json::to_vec(&losses) else { continue };
            let place = [&losses.service, &losses.day.to_string(), &losses.name()];
            if let Err(error) = self.spool.put(&place.map(String::as_str), &bytes) {
                tracing::error!(service = %losses.service, %error, "the account of the serving log could not be written to disk");
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
