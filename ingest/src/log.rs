//! The durable event log: a push is acknowledged when its events are in it.
//!
//! One log per project, one writer, segments of bounded size, as files ([`disk`]) or as streams in a Redis ([`redis`]).
//! Pushers hand encoded records to one thread, which writes all that are waiting, syncs once, and acknowledges them
//! together. Arrival times never go back and sequences never repeat, over restarts too. A segment is deleted when all its
//! events are in the history.
//!
//! ```text
//! record    "rcrd", length of the payload (4 bytes), CRC-32 of the payload (4), payload
//! payload   synced (8): the segment was durable up to this offset when the record was written
//!           kind (1): 1 events, 2 a tick
//!           events: arrival (8), first sequence (8), rows (4), import id (2 + n), source (2 + n), Arrow IPC stream
//!           tick:   arrival (8)
//! ```
//!
//! Numbers are little-endian. The Arrow stream holds the events and, in the column `__due`, the later of each event's known
//! time and event time as they were when it was pushed, so that an event keeps its position whatever the definitions
//! become. After a crash the end of the newest file may be torn: what cannot be read there was never acknowledged,
//! unless a later record says that the damaged place had been durable. That is corruption and an error, as is any damage
//! in an older segment, and all damage in a Redis.
//!
//! A disk that fails stops the log. A Redis that is away does not: what was on its way is tried again until it is known to
//! be there, and pushes are refused until then.

mod disk;
mod record;
mod redis;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use arrow::array::RecordBatch;
use feature_defs::time::Micros;
use offline_store::history::FIRST_PUSHED;
use tokio::sync::watch;

use self::disk::{Disk, disk};
use self::record::{HEADER_BYTES, RECORD_HEADER_BYTES};
use self::redis::Redis;
use crate::{error_chain, lock};

/// The due time of a row that was taken out of a record: it has no value, and keeps the others' sequences what they are.
pub(crate) const BLANK: Micros = Micros::MIN;

/// Largest record: one push. Also what a length read from disk is checked against before it is believed.
pub const RECORD_BYTES_MAX: usize = 64 << 20;

#[derive(Debug, Clone)]
pub struct LogOptions {
    /// A new segment is begun when the current one is this large.
    pub segment_bytes: u64,
    /// Bytes of all segments, events waiting for their time included. Beyond it pushes are refused until events have
    /// reached the history.
    pub log_bytes_max: u64,
    /// Bytes handed to the writing thread and not yet durable; pushers wait for room.
    pub in_flight_bytes_max: usize,
    /// Bytes of durable batches kept in memory for the applier; beyond it, it reads them back.
    pub cached_bytes_max: u64,
    /// How long a pusher waits until a Redis confirms its events.
    pub confirm_wait: Duration,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            segment_bytes: 32 << 20,
            log_bytes_max: 2 << 30,
            in_flight_bytes_max: 128 << 20,
            cached_bytes_max: 128 << 20,
            confirm_wait: Duration::from_secs(5),
        }
    }
}

/// Where a log is kept.
#[derive(Clone)]
pub enum Place {
    /// In its folder.
    Disk,
    /// In a Redis, under the project's name; its folder holds a lock only.
    Redis { url: Arc<str>, project: Arc<str> },
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("the event log in {folder} is in use by another process; stop the other server of this project first")]
    Locked { folder: String },
    #[error("the event log failed on {path}; free or mend the disk, then restart")]
    Disk { path: String, source: io::Error },
    #[error(
        "segment {path} of the event log is damaged at byte {offset} ({what}); restore it from a backup, or move it away to give up its events"
    )]
    Corrupt { path: String, offset: u64, what: String },
    #[error(
        "segment {path} of the event log has format `{found}`, the newest known here is `coevlog1`; upgrade this program"
    )]
    Newer { path: String, found: String },
    #[error(
        "the event log holds {bytes} bytes that are not in the history yet, {bytes_max} are allowed; the push may be repeated later"
    )]
    Full { bytes: u64, bytes_max: u64 },
    #[error(
        "the disk of the event log did not take what came before within {millis} ms; the push may be repeated later"
    )]
    Slow { millis: u64 },
    #[error("a push of {bytes} bytes is larger than {RECORD_BYTES_MAX}; split it")]
    TooLarge { bytes: usize },
    #[error("the event log stopped after a failure ({what}); mend what failed, then restart")]
    Stopped { what: String },
    /// Nothing was taken.
    #[error(
        "the event log at {place} takes no events now ({what}); it is tried again by itself, push again a little later"
    )]
    Away { place: String, what: String },
    /// It may have been taken.
    #[error(
        "the event log at {place} did not confirm the events within {seconds} s ({what}); they are kept if it ever does; push \
         them again, events with an id count once"
    )]
    Unconfirmed { place: String, seconds: u64, what: String },
    #[error("the Redis at {place} cannot hold the event log: {what}")]
    Refused { place: String, what: String },
    #[error(
        "another process has taken over the event log of this project ({what}); stop one of the two: this one takes nothing \
         more until it is started again"
    )]
    Superseded { what: String },
    #[error(
        "the Redis at {place} has lost events of the log that it had acknowledged ({what}): it was emptied, restored, or \
         failed over to a replica that was behind; restart this server to go on with what is there"
    )]
    Gone { place: String, what: String },
    #[error("events could not be encoded: {0}")]
    Encode(String),
}

impl LogError {
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            LogError::Full { .. } | LogError::Slow { .. } | LogError::Away { .. } | LogError::Unconfirmed { .. }
        )
    }

    /// Whether the log may come back from this by itself once it runs.
    fn may_pass(&self) -> bool {
        matches!(self, LogError::Away { .. } | LogError::Refused { .. })
    }
}

/// Where a record lies, and what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordRef {
    pub source: Arc<str>,
    pub arrival: Micros,
    pub first_sequence: u64,
    pub rows: u32,
    /// Set for events of a prior history that were not yet visible when it was imported.
    pub import: Option<Arc<str>>,
    pub segment: u64,
    offset: u64,
    payload_bytes: u32,
}

impl RecordRef {
    /// As it is kept.
    pub fn bytes(&self) -> u64 {
        u64::from(self.payload_bytes)
    }

    /// Segment and offset.
    pub fn place(&self) -> (u64, u64) {
        (self.segment, self.offset)
    }

    /// The sequence after its last.
    fn next_sequence(&self) -> u64 {
        self.first_sequence + u64::from(self.rows)
    }
}

/// The events of one push.
#[derive(Debug, Clone)]
pub struct Events {
    /// In the source's columns as they were declared when it was pushed.
    pub batch: RecordBatch,
    /// The later of known time and event time, per row.
    pub due: Vec<Micros>,
}

/// A record that is durable. The events are absent when memory was short: [`Log::read`] brings them back.
#[derive(Debug, Clone)]
pub struct Durable {
    pub record: RecordRef,
    pub events: Option<Events>,
}

/// What [`Log::append`] assigned; the receiver says when it is durable.
#[derive(Debug)]
pub struct Appended {
    pub arrival: Micros,
    pub first_sequence: u64,
    pub durable: watch::Receiver<u64>,
    /// Durable when the watched number has reached this.
    pub ticket: u64,
}

/// Events ready to be appended: encoded before any lock is taken.
#[derive(Debug)]
pub struct Encoded {
    events: Events,
    stream: Vec<u8>,
}

pub struct Log {
    folder: PathBuf,
    options: LogOptions,
    clock: Arc<dyn Fn() -> Micros + Send + Sync>,
    state: Mutex<State>,
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    in_flight: Arc<tokio::sync::Semaphore>,
    reader: Reader,
    /// A log on disk from before, where this one is in a Redis.
    left: Option<Arc<Disk>>,
    /// Held as long as the log is open: the lock ends with the process, however it ends.
    _lock: File,
}

/// Where records are read back from.
enum Reader {
    Disk(Arc<Disk>),
    Redis(redis::Reader),
}

/// Where the thread writes.
enum Storage {
    Disk(Arc<Disk>),
    Redis(Redis),
}

/// What the writing thread and everybody else see.
struct Shared {
    segments: Mutex<BTreeMap<u64, Segment>>,
    durable: watch::Sender<u64>,
    failure: Mutex<Option<Failure>>,
    /// Why what is on its way does not arrive; it is tried again.
    trouble: Mutex<Option<String>>,
    is_closing: AtomicBool,
    bytes: AtomicU64,
    cached_bytes: AtomicU64,
}

#[derive(Clone)]
struct Failure {
    what: String,
    is_superseded: bool,
}

struct Segment {
    bytes: u64,
    /// Rows not yet in the history. When it is 0 and the segment is not the newest, it is deleted.
    pending_rows: u64,
    /// Where that is shown.
    cursor: Option<Cursor>,
}

/// Up to where a segment is done.
#[derive(Debug, Clone, Default)]
struct Cursor {
    /// Rows not yet in the history, by offset, of the records after it.
    open: BTreeMap<u64, u64>,
    /// The last record up to which all are done; 0 if there is none.
    at: u64,
    /// Records up to it.
    entries: u64,
    /// Where the storage was told to put it.
    told: u64,
}

impl Cursor {
    /// Goes over records that are done. True: it has to be told.
    fn advance(&mut self) -> bool {
        while let Some(first) = self.open.first_entry().filter(|first| *first.get() == 0) {
            self.at = first.remove_entry().0;
            self.entries += 1;
        }
        std::mem::replace(&mut self.told, self.at) != self.at
    }
}

/// A segment as it was found.
struct Found {
    id: u64,
    bytes: u64,
    records: Vec<Durable>,
    /// The latest.
    arrival: Micros,
    next_sequence: u64,
    cursor: Option<Cursor>,
}

impl Found {
    fn see(&mut self, record: &RecordRef) {
        self.arrival = self.arrival.max(record.arrival);
        self.next_sequence = self.next_sequence.max(record.next_sequence());
    }

    fn take(&mut self, durable: Durable) {
        self.see(&durable.record);
        self.records.push(durable);
    }
}

struct State {
    /// The arrival of the newest record, or the time up to which events were applied: no later one may be before it.
    arrival: Micros,
    next_sequence: u64,
    next_ticket: u64,
    /// The last sequence given to each source.
    assigned: HashMap<Arc<str>, u64>,
    to_writer: Option<mpsc::Sender<Command>>,
}

enum Command {
    Append {
        ticket: u64,
        payload: Vec<u8>,
        events: Option<(RecordRef, Events)>,
        permits: Option<tokio::sync::OwnedSemaphorePermit>,
    },
    Rotate {
        first_sequence: u64,
        arrival: Micros,
    },
    /// Chores of the storage.
    Done {
        segment: u64,
        offset: u64,
        entries: u64,
    },
    Remove {
        segment: u64,
    },
}

/// Says what is to be in the place of a record's events; None if they stay.
pub type Change<'a> = &'a mut dyn FnMut(&RecordRef, &Events) -> Result<Option<Events>, LogError>;

/// An opened log: the log, its records in order, and where durable records come out.
pub struct Opened {
    pub log: Log,
    /// What their events take in memory counts as cached.
    pub records: Vec<Durable>,
    /// Its length is bounded by the bytes of the log, and what it holds in memory by `cached_bytes_max`.
    pub durable: tokio::sync::mpsc::UnboundedReceiver<Durable>,
    /// Records on the disk, where the log is in a Redis now: they are no part of it.
    pub left: Vec<RecordRef>,
}

impl Log {
    /// Opens the log and takes it over. It blocks, for ten seconds and more where a Redis is away.
    pub fn open(
        folder: &Path,
        place: Place,
        options: LogOptions,
        clock: Arc<dyn Fn() -> Micros + Send + Sync>,
    ) -> Result<Opened, LogError> {
        fs::create_dir_all(folder).map_err(disk(folder))?;
        let lock_path = folder.join("lock");
        let lock_file =
            OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path).map_err(disk(&lock_path))?;
        match lock_file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LogError::Locked { folder: folder.display().to_string() }),
            Err(TryLockError::Error(source)) => return Err(disk(&lock_path)(source)),
        }
        let files = Arc::new(Disk::new(folder));
        let token = redis::token();
        let left = match &place {
            Place::Disk => None,
            Place::Redis { .. } => Some((files.clone(), files.scan()?)),
        };
        let reader = match &place {
            Place::Disk => Reader::Disk(files.clone()),
            Place::Redis { url, project } => Reader::Redis(redis::Reader::new(url, project, token.clone())?),
        };
        let (durable, _) = watch::channel(0);
        let shared = Arc::new(Shared {
            segments: Mutex::default(),
            durable,
            failure: Mutex::new(None),
            trouble: Mutex::new(None),
            is_closing: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            cached_bytes: AtomicU64::new(0),
        });
        let (to_writer, commands) = mpsc::channel();
        let (publish, received) = tokio::sync::mpsc::unbounded_channel();
        let (say, said) = mpsc::channel();
        let (sharing, sizes) = (shared.clone(), options.clone());
        // The thread opens what it writes to: a connection belongs to it.
        let work = move || {
            let opened = match place {
                Place::Disk => files.scan().map(|found| (Storage::Disk(files), found)),
                Place::Redis { url, project } => Redis::open(&url, &project, token, sizes.cached_bytes_max)
                    .map(|(storage, found)| (Storage::Redis(storage), found)),
            };
            let started = opened.and_then(|(storage, found)| Writer::start(storage, found, sharing, publish, &sizes));
            match started {
                Ok((writer, start)) => {
                    if say.send(Ok(start)).is_ok() {
                        writer.run(&commands);
                    }
                }
                Err(error) => drop(say.send(Err(error))),
            }
        };
        let writer = std::thread::Builder::new().name("event-log".into()).spawn(work).map_err(disk(folder))?;
        let Start { records, arrival, next_sequence } =
            said.recv().unwrap_or_else(|_| Err(LogError::Stopped { what: "its thread panicked".into() }))?;
        let mut assigned = HashMap::new();
        for Durable { record, .. } in &records {
            assigned.insert(record.source.clone(), record.next_sequence() - 1);
        }
        let in_flight =
            Arc::new(tokio::sync::Semaphore::new(options.in_flight_bytes_max.max(RECORD_BYTES_MAX) / 1024 + 2));
        let log = Log {
            folder: folder.to_path_buf(),
            options,
            clock,
            state: Mutex::new(State { arrival, next_sequence, next_ticket: 1, assigned, to_writer: Some(to_writer) }),
            shared,
            writer: Mutex::new(Some(writer)),
            in_flight,
            reader,
            left: left.as_ref().map(|(files, _)| files.clone()),
            _lock: lock_file,
        };
        log.delete_released();
        let left = left.into_iter().flat_map(|(_, found)| found).flat_map(|found| found.records);
        Ok(Opened { log, records, durable: received, left: left.map(|durable| durable.record).collect() })
    }

    /// Encodes events; `due` is the later of known time and event time of each.
    pub fn encode(batch: RecordBatch, due: Vec<Micros>) -> Result<Encoded, LogError> {
        let stream = record::stream(&batch, &due)?;
        Ok(Encoded { events: Events { batch, due }, stream })
    }

    /// Waits for room among the bytes that are on their way to the disk.
    pub async fn room(&self, bytes: usize) -> tokio::sync::OwnedSemaphorePermit {
        let permits = u32::try_from(bytes / 1024 + 1).unwrap_or(u32::MAX);
        let permit = self.in_flight.clone().acquire_many_owned(permits).await;
        permit.expect("the semaphore is never closed")
    }

    /// Gives the events their arrival and sequences and sends them to the disk. They are in the log, and seen by the
    /// applier, once the ticket is reached.
    pub fn append(
        &self,
        source: &Arc<str>,
        encoded: Encoded,
        import: Option<Arc<str>>,
        permit: tokio::sync::OwnedSemaphorePermit,
    ) -> Result<Appended, LogError> {
        let rows = encoded.events.batch.num_rows() as u32;
        let mut state = lock(&self.state);
        self.check_running()?;
        let bytes = self.shared.bytes.load(Ordering::Acquire);
        if import.is_none() && bytes + encoded.stream.len() as u64 > self.options.log_bytes_max {
            return Err(LogError::Full { bytes, bytes_max: self.options.log_bytes_max });
        }
        state.arrival = state.arrival.max((self.clock)());
        let (arrival, first_sequence, ticket) = (state.arrival, state.next_sequence, state.next_ticket);
        let payload = record::events_payload(source, arrival, first_sequence, rows, import.as_deref(), &encoded.stream);
        let payload_bytes = payload.len() as u32;
        let record = RecordRef {
            source: source.clone(),
            arrival,
            first_sequence,
            rows,
            import,
            segment: 0,
            offset: 0,
            payload_bytes,
        };
        let events = Some((record, encoded.events));
        self.send(&state, Command::Append { ticket, payload, events, permits: Some(permit) })?;
        state.next_sequence += u64::from(rows);
        state.next_ticket += 1;
        state.assigned.insert(source.clone(), first_sequence + u64::from(rows) - 1);
        self.shared.bytes.fetch_add(u64::from(payload_bytes) + RECORD_HEADER_BYTES as u64, Ordering::AcqRel);
        Ok(Appended { arrival, first_sequence, durable: self.shared.durable.subscribe(), ticket })
    }

    /// Waits until what was appended is durable: on disk, as long as it takes; in a Redis, which may be gone for hours, up to
    /// [`LogOptions::confirm_wait`].
    pub async fn wait_durable(&self, mut durable: watch::Receiver<u64>, ticket: u64) -> Result<(), LogError> {
        let reached = async { durable.wait_for(|reached| *reached >= ticket).await.map(|reached| *reached) };
        let wait = self.options.confirm_wait;
        let reached = match &self.reader {
            Reader::Disk(_) => reached.await,
            Reader::Redis(reader) => match tokio::time::timeout(wait, reached).await {
                Ok(reached) => reached,
                Err(_) => {
                    let place = reader.place().to_owned();
                    let what = lock(&self.shared.trouble).clone().unwrap_or_else(|| "no answer yet".into());
                    return Err(LogError::Unconfirmed { place, seconds: wait.as_secs(), what });
                }
            },
        };
        match reached {
            Ok(reached) if reached < u64::MAX => Ok(()),
            _ => Err(self.stopped()),
        }
    }

    /// A ticket that is reached when everything appended so far is durable.
    pub fn everything(&self) -> (watch::Receiver<u64>, u64) {
        let state = lock(&self.state);
        (self.shared.durable.subscribe(), state.next_ticket - 1)
    }

    /// Up to which time events of a source may be applied, when the applier has received it up to `received`: no event
    /// that is still to come has a position at or before it. None when events are on their way, and the last one received
    /// is all that is known. The time is then the log's: later arrivals are not before it.
    pub fn horizon(&self, source: &str, received: u64) -> Option<Micros> {
        let mut state = lock(&self.state);
        let assigned = state.assigned.get(source).copied().unwrap_or(0);
        if assigned > received {
            return None;
        }
        state.arrival = state.arrival.max((self.clock)());
        Some(state.arrival)
    }

    /// Writes down that events up to this time may have been applied, so that arrivals stay after it whatever the clock
    /// does over a restart. Needed only where the newest record does not say so itself.
    pub async fn tick(&self) -> Result<(), LogError> {
        let (durable, ticket) = {
            let mut state = lock(&self.state);
            self.check_running()?;
            let payload = record::tick_payload(state.arrival);
            let ticket = state.next_ticket;
            self.shared.bytes.fetch_add((payload.len() + RECORD_HEADER_BYTES) as u64, Ordering::AcqRel);
            self.send(&state, Command::Append { ticket, payload, events: None, permits: None })?;
            state.next_ticket += 1;
            (self.shared.durable.subscribe(), ticket)
        };
        self.wait_durable(durable, ticket).await
    }

    /// Makes arrivals and sequences of this log come after what a history says was applied: it may have been written
    /// through a log that is lost.
    pub fn raise(&self, arrival: Micros, sequence: u64) {
        let mut state = lock(&self.state);
        state.arrival = state.arrival.max(arrival);
        state.next_sequence = state.next_sequence.max(sequence + 1);
    }

    /// The sequence that the next event gets.
    pub fn next_sequence(&self) -> u64 {
        lock(&self.state).next_sequence
    }

    /// Reads a record back.
    pub async fn read(&self, record: &RecordRef) -> Result<Events, LogError> {
        match &self.reader {
            Reader::Disk(files) => files.read(record),
            Reader::Redis(_) => {
                let events = self.read_all(&[record]).await?.pop();
                events.ok_or_else(|| LogError::Stopped { what: "a record was not read".into() })
            }
        }
    }

    /// Reads records back, in their order.
    pub async fn read_all(&self, records: &[&RecordRef]) -> Result<Vec<Events>, LogError> {
        match &self.reader {
            Reader::Disk(files) => records.iter().map(|record| files.read(record)).collect(),
            Reader::Redis(reader) => reader.read(records).await,
        }
    }

    /// Reads one of [`Opened::left`].
    pub fn read_left(&self, record: &RecordRef) -> Result<Events, LogError> {
        match &self.left {
            Some(files) => files.read(record),
            None => Err(LogError::Stopped { what: "there is no log on disk beside it".into() }),
        }
    }

    /// Where the log on disk is, or was.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// An error if another process has taken this log over, which can happen only where it is not on this machine's disk.
    pub async fn check_writer(&self) -> Result<(), LogError> {
        match &self.reader {
            Reader::Disk(_) => Ok(()),
            Reader::Redis(reader) => reader.check_writer().await,
        }
    }

    /// These rows of a record, which lies there, are in the history now.
    pub fn release(&self, (segment, offset): (u64, u64), rows: u64) {
        let mut segments = lock(&self.shared.segments);
        if let Some(segment) = segments.get_mut(&segment) {
            segment.pending_rows = segment.pending_rows.saturating_sub(rows);
            if let Some(open) = segment.cursor.as_mut().and_then(|cursor| cursor.open.get_mut(&offset)) {
                *open = open.saturating_sub(rows);
            }
        }
    }

    /// Deletes segments whose events are all in the history. The newest is closed first if there is something to gain.
    pub fn delete_released(&self) {
        let rotate = {
            let segments = lock(&self.shared.segments);
            let newest = segments.last_key_value();
            newest.is_some_and(|(_, newest)| newest.pending_rows == 0 && newest.bytes > 1 << 20)
        };
        if rotate {
            let state = lock(&self.state);
            let command = Command::Rotate { first_sequence: state.next_sequence, arrival: state.arrival };
            self.send_chore(&state, command);
        }
        let mut chores = Vec::new();
        {
            let mut segments = lock(&self.shared.segments);
            let Some(newest) = segments.keys().next_back().copied() else { return };
            segments.retain(|id, segment| {
                if *id == newest || segment.pending_rows > 0 {
                    if let Some(cursor) = segment.cursor.as_mut().filter(|_| self.chores_are_few())
                        && cursor.advance()
                    {
                        chores.push(Command::Done { segment: *id, offset: cursor.at, entries: cursor.entries });
                    }
                    return true;
                }
                match &self.reader {
                    Reader::Disk(files) => {
                        if let Err(error) = files.remove(*id) {
                            let error = error_chain(&error);
                            tracing::warn!(error, "a finished segment of the event log could not be deleted");
                            return true;
                        }
                    }
                    Reader::Redis(_) => chores.push(Command::Remove { segment: *id }),
                }
                self.shared.bytes.fetch_sub(segment.bytes, Ordering::AcqRel);
                false
            });
        }
        let state = lock(&self.state);
        chores.into_iter().for_each(|chore| self.send_chore(&state, chore));
    }

    /// While the storage is away, what can be said later is not queued.
    fn chores_are_few(&self) -> bool {
        lock(&self.shared.trouble).is_none()
    }

    fn send_chore(&self, state: &State, chore: Command) {
        if let Err(error) = self.send(state, chore) {
            tracing::debug!(%error, "the event log is not running, its segments stay");
        }
    }

    /// Closes the newest segment: everything appended so far is in older ones when this returns.
    pub async fn seal(&self) -> Result<(), LogError> {
        {
            let state = lock(&self.state);
            let command = Command::Rotate { first_sequence: state.next_sequence, arrival: state.arrival };
            self.send(&state, command)?;
        }
        // The writing thread takes one command after the other.
        self.tick().await
    }

    /// Shows every record of every segment. Returns the number of segments with a record that the listener says `true` to
    /// by changing it, see [`Log::rewrite_sealed`]; nothing is changed. Blocks, and not where a runtime runs.
    pub fn look(&self, look: Change<'_>) -> Result<u64, LogError> {
        let segments: Vec<(u64, u64)> = {
            let segments = lock(&self.shared.segments);
            segments.iter().map(|(id, segment)| (*id, segment.bytes)).collect()
        };
        let mut count = 0;
        for (id, bytes) in segments {
            let is_meant = match &self.reader {
                Reader::Disk(files) => files.look(id, bytes, look)?,
                Reader::Redis(reader) => reader.look(id, bytes, look)?,
            };
            count += u64::from(is_meant);
        }
        Ok(count)
    }

    /// Puts other events in the place of a record's, as many and in the same order, in all segments but the newest. A
    /// segment is changed in one step, so a crash leaves the old or the new one. Returns the number of segments that
    /// changed. Blocks, and not where a runtime runs.
    pub fn rewrite_sealed(&self, change: Change<'_>) -> Result<u64, LogError> {
        let sealed: Vec<(u64, u64)> = {
            let segments = lock(&self.shared.segments);
            let newest = segments.keys().next_back().copied();
            let sealed = segments.iter().filter(|(id, _)| Some(**id) != newest);
            sealed.map(|(id, segment)| (*id, segment.bytes)).collect()
        };
        let mut count = 0;
        for (id, bytes) in sealed {
            count += u64::from(match &self.reader {
                Reader::Disk(files) => self.rewrite_file(files, id, bytes, change)?,
                Reader::Redis(reader) => {
                    let cursor = lock(&self.shared.segments).get(&id).and_then(|segment| segment.cursor.clone());
                    reader.rewrite(id, bytes, &cursor.unwrap_or_default(), change)?
                }
            });
        }
        Ok(count)
    }

    fn rewrite_file(&self, files: &Disk, id: u64, bytes: u64, change: Change<'_>) -> Result<bool, LogError> {
        let Some(rewritten) = files.rewritten(id, bytes, change)? else { return Ok(false) };
        let mut segments = lock(&self.shared.segments);
        // Its last rows may have become history meanwhile.
        let Some(segment) = segments.get_mut(&id) else {
            rewritten.discard();
            return Ok(true);
        };
        let bytes = files.replace(id, rewritten)?;
        self.shared.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.shared.bytes.fetch_sub(segment.bytes, Ordering::AcqRel);
        segment.bytes = bytes;
        Ok(true)
    }

    /// Memory of a batch that the applier no longer holds.
    pub fn forget_cached(&self, events: &Events) {
        let less = |bytes: u64| Some(bytes.saturating_sub(cached_bytes(events)));
        let _ = self.shared.cached_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Acquire)
    }

    /// Where it is, where that is another machine perhaps.
    pub fn remote(&self) -> Option<&str> {
        match &self.reader {
            Reader::Disk(_) => None,
            Reader::Redis(reader) => Some(reader.place()),
        }
    }

    /// Why the log takes nothing more, or nothing now.
    pub fn trouble(&self) -> Option<String> {
        self.check_running().err().map(|error| error.to_string())
    }

    /// Takes no more appends and waits for those on their way; not for a Redis that is away.
    pub fn close(&self) {
        lock(&self.state).to_writer = None;
        self.shared.is_closing.store(true, Ordering::Release);
        if let Some(writer) = lock(&self.writer).take()
            && writer.join().is_err()
        {
            tracing::error!(folder = %self.folder.display(), "the event log's thread panicked");
        }
    }

    fn send(&self, state: &State, command: Command) -> Result<(), LogError> {
        let sent = state.to_writer.as_ref().is_some_and(|to_writer| to_writer.send(command).is_ok());
        if sent { Ok(()) } else { Err(self.stopped()) }
    }

    fn check_running(&self) -> Result<(), LogError> {
        if lock(&self.shared.failure).is_some() {
            return Err(self.stopped());
        }
        match (&*lock(&self.shared.trouble), &self.reader) {
            (Some(what), Reader::Redis(reader)) => {
                Err(LogError::Away { place: reader.place().to_owned(), what: what.clone() })
            }
            _ => Ok(()),
        }
    }

    fn stopped(&self) -> LogError {
        match lock(&self.shared.failure).clone() {
            Some(Failure { what, is_superseded: true }) => LogError::Superseded { what },
            Some(Failure { what, .. }) => LogError::Stopped { what },
            None => LogError::Stopped { what: "it was closed".into() },
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

/// Says, for people, what a Redis holds of a project's log, or why it cannot hold one. Whoever writes it is not disturbed.
pub async fn look(url: &str, project: &str) -> Result<String, LogError> {
    redis::look(url, project).await
}

/// Batches are counted as they lie in memory.
fn cached_bytes(events: &Events) -> u64 {
    (events.batch.get_array_memory_size() + events.due.len() * 8) as u64
}

/// What a log goes on from.
struct Start {
    records: Vec<Durable>,
    arrival: Micros,
    next_sequence: u64,
}

/// The thread that owns the newest segment.
struct Writer {
    storage: Storage,
    shared: Arc<Shared>,
    publish: tokio::sync::mpsc::UnboundedSender<Durable>,
    segment: u64,
    segment_bytes: u64,
    cached_bytes_max: u64,
    /// Segments that could not be removed yet.
    left: Vec<u64>,
}

/// Bytes written before a sync, however many wait: bounds how long the first of a group waits.
const GROUP_BYTES: usize = 8 << 20;
/// Between tries of what a storage that is away did not take: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LAST: Duration = Duration::from_millis(500);

impl Writer {
    fn start(
        storage: Storage,
        found: Vec<Found>,
        shared: Arc<Shared>,
        publish: tokio::sync::mpsc::UnboundedSender<Durable>,
        options: &LogOptions,
    ) -> Result<(Writer, Start), LogError> {
        let mut start = Start { records: Vec::new(), arrival: Micros::MIN, next_sequence: FIRST_PUSHED };
        for Found { id, bytes, records, arrival, next_sequence, cursor } in found {
            start.arrival = start.arrival.max(arrival);
            start.next_sequence = start.next_sequence.max(next_sequence);
            let pending_rows = records.iter().map(|durable| u64::from(durable.record.rows)).sum();
            lock(&shared.segments).insert(id, Segment { bytes, pending_rows, cursor });
            shared.bytes.fetch_add(bytes, Ordering::AcqRel);
            start.records.extend(records);
        }
        let cached = start.records.iter().filter_map(|durable| durable.events.as_ref()).map(cached_bytes).sum();
        shared.cached_bytes.store(cached, Ordering::Release);
        let mut writer = Writer {
            storage,
            shared,
            publish,
            segment: 0,
            segment_bytes: options.segment_bytes,
            cached_bytes_max: options.cached_bytes_max,
            left: Vec::new(),
        };
        // Every opening begins a segment of its own: what an earlier process wrote is never appended to.
        let id = writer.next_id();
        writer.try_begin(id, start.next_sequence, start.arrival)?;
        writer.began(id);
        Ok((writer, start))
    }

    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        while let Ok(first) = commands.recv() {
            if let Err(error) = self.group(first, commands) {
                let (what, is_superseded) = match &error {
                    LogError::Superseded { what } => (what.clone(), true),
                    error => (error_chain(error), false),
                };
                tracing::error!(what, is_superseded, "the event log failed and takes no more events");
                *lock(&self.shared.failure) = Some(Failure { what, is_superseded });
                break;
            }
        }
        // Whoever still waits is told that it will not happen; nobody waits after an orderly close.
        if lock(&self.shared.failure).is_some() {
            self.shared.durable.send_replace(u64::MAX);
        }
    }

    fn group(&mut self, first: Command, commands: &mpsc::Receiver<Command>) -> Result<(), LogError> {
        let start = lock(&self.shared.segments).get(&self.segment).map_or(HEADER_BYTES, |segment| segment.bytes);
        let mut bytes: Vec<u8> = Vec::new();
        let mut ends: Vec<usize> = Vec::new();
        let mut entries: Vec<(u64, u64)> = Vec::new();
        let mut written: Vec<(RecordRef, Events)> = Vec::new();
        let mut ticket_max = None;
        let mut permits = Vec::new();
        let mut rotate = None;
        let mut chore = None;
        let mut next = Some(first);
        while let Some(command) = next.take() {
            match command {
                Command::Append { ticket, payload, events, permits: permit } => {
                    let offset = start + bytes.len() as u64;
                    entries.push((offset, events.as_ref().map_or(0, |(record, _)| u64::from(record.rows))));
                    if let Some((mut record, events)) = events {
                        record.segment = self.segment;
                        record.offset = offset;
                        written.push((record, events));
                    }
                    record::frame(&mut bytes, payload, start);
                    ends.push(bytes.len());
                    ticket_max = Some(ticket);
                    permits.extend(permit);
                }
                Command::Rotate { first_sequence, arrival } => {
                    rotate = Some((first_sequence, arrival));
                    break;
                }
                Command::Done { .. } | Command::Remove { .. } => {
                    chore = Some(command);
                    break;
                }
            }
            if bytes.len() < GROUP_BYTES {
                next = commands.try_recv().ok();
            }
        }
        if !bytes.is_empty() {
            self.insist(|writer| match &writer.storage {
                Storage::Disk(files) => files.append(writer.segment, start, &bytes),
                Storage::Redis(redis) => redis.append(writer.segment, start, &bytes, &ends),
            })?;
            let size = start + bytes.len() as u64;
            if let Some(segment) = lock(&self.shared.segments).get_mut(&self.segment) {
                segment.bytes = size;
                segment.pending_rows += entries.iter().map(|(_, rows)| rows).sum::<u64>();
                if let Some(cursor) = &mut segment.cursor {
                    cursor.open.extend(entries);
                }
            }
            // The applier hears of the events before their pusher does, so that a pusher that waits for it can.
            let last = written.last().map(|(record, _)| (record.next_sequence(), record.arrival));
            for (record, events) in written {
                let size = cached_bytes(&events);
                let fits = self.shared.cached_bytes.load(Ordering::Acquire) + size <= self.cached_bytes_max;
                if fits {
                    self.shared.cached_bytes.fetch_add(size, Ordering::AcqRel);
                }
                // Nobody listens while the process goes down: the events are kept, the next process reads them.
                let _ = self.publish.send(Durable { record, events: fits.then_some(events) });
            }
            if let Some(ticket) = ticket_max {
                self.shared.durable.send_replace(ticket);
            }
            if rotate.is_none() && size >= self.segment_bytes {
                rotate = last;
            }
        }
        drop(permits);
        if let Some((first_sequence, arrival)) = rotate {
            self.begin(first_sequence, arrival)?;
        }
        self.tidy(chore);
        Ok(())
    }

    /// Begins a segment, which is durable, with its name, before anything is written into it.
    fn begin(&mut self, first_sequence: u64, arrival: Micros) -> Result<(), LogError> {
        let id = self.next_id();
        self.insist(|writer| writer.try_begin(id, first_sequence, arrival))?;
        self.began(id);
        Ok(())
    }

    fn next_id(&self) -> u64 {
        let newest = lock(&self.shared.segments).keys().next_back().copied().unwrap_or(0);
        newest.max(self.segment) + 1
    }

    fn try_begin(&self, id: u64, first_sequence: u64, arrival: Micros) -> Result<(), LogError> {
        match &self.storage {
            Storage::Disk(files) => files.begin(id, first_sequence, arrival),
            Storage::Redis(redis) => redis.begin(id, first_sequence, arrival),
        }
    }

    fn began(&mut self, id: u64) {
        let cursor = matches!(self.storage, Storage::Redis(_)).then(Cursor::default);
        self.shared.bytes.fetch_add(HEADER_BYTES, Ordering::AcqRel);
        lock(&self.shared.segments).insert(id, Segment { bytes: HEADER_BYTES, pending_rows: 0, cursor });
        self.segment = id;
    }

    /// Tries until it is done, or until it is known that it will not be, or until the log is closed.
    fn insist(&self, attempt: impl Fn(&Writer) -> Result<(), LogError>) -> Result<(), LogError> {
        let mut pause = RETRY_FIRST;
        loop {
            match attempt(self) {
                Err(error) if error.may_pass() && !self.shared.is_closing.load(Ordering::Acquire) => {
                    let what = match &error {
                        LogError::Away { what, .. } | LogError::Refused { what, .. } => what.clone(),
                        error => error.to_string(),
                    };
                    if lock(&self.shared.trouble).replace(what.clone()).is_none() {
                        tracing::error!(what, "the event log takes no events; it is tried again");
                    }
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(RETRY_LAST);
                }
                result => {
                    if lock(&self.shared.trouble).take().is_some() && result.is_ok() {
                        tracing::info!("the event log takes events again");
                    }
                    return result;
                }
            }
        }
    }

    /// What is not urgent: when it fails, the next one does it too, or the next process.
    fn tidy(&mut self, chore: Option<Command>) {
        let Storage::Redis(redis) = &self.storage else { return };
        if let Some(Command::Remove { segment }) = chore {
            self.left.push(segment);
        }
        let done = match chore {
            Some(Command::Done { segment, offset, entries }) => redis.done(segment, offset, entries),
            Some(_) => Ok(()),
            None => return,
        };
        let removed = done.and_then(|()| {
            while let Some(segment) = self.left.last() {
                redis.remove(*segment)?;
                self.left.pop();
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::warn!(error = error_chain(&error), "the event log could not be tidied up; it is tried again");
        }
    }
}

#[cfg(test)]
mod tests;
