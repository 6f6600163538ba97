//! The durable event log on disk: a push is acknowledged when its events are in it.
//!
//! One folder per project, one writer, segments of bounded size. Pushers hand encoded records to one thread, which writes
//! all that are waiting, syncs once, and acknowledges them together. Arrival times never go back and sequences never
//! repeat, over restarts too. A segment is deleted when all its events are in the history.
//!
//! ```text
//! segment   "coevlog1", first sequence (8 bytes), arrival floor (8), CRC-32 of these 24 bytes (4); then records
//! record    "rcrd", length of the payload (4), CRC-32 of the payload (4), payload
//! payload   synced (8): the segment was durable up to this offset when the record was written
//!           kind (1): 1 events, 2 a tick
//!           events: arrival (8), first sequence (8), rows (4), import id (2 + n), source (2 + n), Arrow IPC stream
//!           tick:   arrival (8)
//! ```
//!
//! Numbers are little-endian. The Arrow stream holds the events and, in the column `__due`, the later of each event's known
//! time and event time as they were when it was pushed, so that an event keeps its position whatever the definitions
//! become. After a crash the end of the newest segment may be torn: what cannot be read there was never acknowledged,
//! unless a later record says that the damaged place had been durable. That is corruption and an error, as is any damage
//! in an older segment.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use feature_defs::time::Micros;
use offline_store::history::FIRST_PUSHED;
use tokio::sync::watch;

const SEGMENT_MAGIC: &[u8; 8] = b"coevlog1";
const RECORD_MAGIC: &[u8; 4] = b"rcrd";
const HEADER_BYTES: u64 = 28;
const RECORD_HEADER_BYTES: usize = 12;
const KIND_EVENTS: u8 = 1;
const KIND_TICK: u8 = 2;
/// The column of due times in a record.
const DUE: &str = "__due";

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
    /// Bytes of durable batches kept in memory for the applier; beyond it, it reads them back from disk.
    pub cached_bytes_max: u64,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            segment_bytes: 32 << 20,
            log_bytes_max: 2 << 30,
            in_flight_bytes_max: 128 << 20,
            cached_bytes_max: 128 << 20,
        }
    }
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
    #[error("the event log stopped after a failure ({what}); mend the disk, then restart")]
    Stopped { what: String },
    #[error("events could not be encoded: {0}")]
    Encode(String),
}

impl LogError {
    pub fn is_retryable(&self) -> bool {
        matches!(self, LogError::Full { .. } | LogError::Slow { .. })
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
    /// On disk.
    pub fn bytes(&self) -> u64 {
        u64::from(self.payload_bytes)
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
    /// Held as long as the log is open: the lock ends with the process, however it ends.
    _lock: File,
}

/// What the writing thread and everybody else see.
struct Shared {
    segments: Mutex<BTreeMap<u64, Segment>>,
    durable: watch::Sender<u64>,
    failure: Mutex<Option<String>>,
    bytes: AtomicU64,
    cached_bytes: AtomicU64,
}

struct Segment {
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    /// Rows not yet in the history. When it is 0 and the segment is not the newest, it is deleted.
    pending_rows: u64,
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
}

/// An opened log: the log, its records in order, and where durable records come out.
pub struct Opened {
    pub log: Log,
    pub records: Vec<RecordRef>,
    /// Its length is bounded by the bytes of the log, and what it holds in memory by `cached_bytes_max`.
    pub durable: tokio::sync::mpsc::UnboundedReceiver<Durable>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change below is made in one step, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn disk(path: &Path) -> impl FnOnce(io::Error) -> LogError + '_ {
    move |source| LogError::Disk { path: path.display().to_string(), source }
}

impl Log {
    pub fn open(
        folder: &Path,
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
        let mut paths: Vec<(u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(folder).map_err(disk(folder))? {
            let path = entry.map_err(disk(folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(id) = name.strip_suffix(".log").and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
                paths.push((id, path));
            }
        }
        paths.sort();
        let mut arrival = Micros::MIN;
        let mut next_sequence = FIRST_PUSHED;
        let mut records = Vec::new();
        let mut segments = BTreeMap::new();
        let newest = paths.last().map(|(id, _)| *id);
        for (id, path) in paths {
            let Some(scanned) = scan(id, &path, Some(id) == newest)? else { continue };
            arrival = arrival.max(scanned.arrival);
            next_sequence = next_sequence.max(scanned.next_sequence);
            let pending_rows = scanned.records.iter().map(|record| u64::from(record.rows)).sum();
            segments.insert(id, Segment { path, file: Arc::new(scanned.file), bytes: scanned.bytes, pending_rows });
            records.extend(scanned.records);
        }
        let mut assigned = HashMap::new();
        for record in &records {
            assigned.insert(record.source.clone(), record.first_sequence + u64::from(record.rows) - 1);
        }
        let bytes = segments.values().map(|segment| segment.bytes).sum();
        let (durable, _) = watch::channel(0);
        let shared = Arc::new(Shared {
            segments: Mutex::new(segments),
            durable,
            failure: Mutex::new(None),
            bytes: AtomicU64::new(bytes),
            cached_bytes: AtomicU64::new(0),
        });
        // Every opening begins a segment of its own: what an earlier process wrote is never appended to.
        let id = begin_segment(folder, &shared, next_sequence, arrival)?;
        let (to_writer, commands) = mpsc::channel();
        let (publish, received) = tokio::sync::mpsc::unbounded_channel();
        let writer = Writer {
            folder: folder.to_path_buf(),
            shared: shared.clone(),
            publish,
            segment: id,
            segment_bytes: options.segment_bytes,
            cached_bytes_max: options.cached_bytes_max,
        };
        let writer = std::thread::Builder::new()
            .name("event-log".into())
            .spawn(move || writer.run(&commands))
            .map_err(disk(folder))?;
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
            _lock: lock_file,
        };
        log.delete_released();
        Ok(Opened { log, records, durable: received })
    }

    /// Encodes events; `due` is the later of known time and event time of each.
    pub fn encode(batch: RecordBatch, due: Vec<Micros>) -> Result<Encoded, LogError> {
        let failed = |error: arrow::error::ArrowError| LogError::Encode(error.to_string());
        let mut fields: Vec<Field> = batch.schema().fields().iter().map(|field| field.as_ref().clone()).collect();
        fields.push(Field::new(DUE, DataType::Int64, false));
        let schema = Arc::new(Schema::new(fields));
        let mut columns: Vec<ArrayRef> = batch.columns().to_vec();
        columns.push(Arc::new(Int64Array::from(due.clone())));
        let with_due = RecordBatch::try_new(schema.clone(), columns).map_err(failed)?;
        let mut writer = StreamWriter::try_new(Vec::new(), &schema).map_err(failed)?;
        writer.write(&with_due).map_err(failed)?;
        let stream = writer.into_inner().map_err(failed)?;
        if stream.len() + 1024 > RECORD_BYTES_MAX {
            return Err(LogError::TooLarge { bytes: stream.len() });
        }
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
        let mut payload = Vec::with_capacity(encoded.stream.len() + 64 + source.len());
        payload.extend_from_slice(&[0; 8]); // `synced` is filled in by the writing thread.
        payload.push(KIND_EVENTS);
        payload.extend_from_slice(&arrival.to_le_bytes());
        payload.extend_from_slice(&first_sequence.to_le_bytes());
        payload.extend_from_slice(&rows.to_le_bytes());
        for text in [import.as_deref().unwrap_or_default(), source] {
            payload.extend_from_slice(&(text.len() as u16).to_le_bytes());
            payload.extend_from_slice(text.as_bytes());
        }
        payload.extend_from_slice(&encoded.stream);
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

    /// Waits until what was appended is durable.
    pub async fn wait_durable(&self, mut durable: watch::Receiver<u64>, ticket: u64) -> Result<(), LogError> {
        let reached = durable.wait_for(|reached| *reached >= ticket).await.map(|reached| *reached);
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
            let mut payload = vec![0; 8];
            payload.push(KIND_TICK);
            payload.extend_from_slice(&state.arrival.to_le_bytes());
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
    pub fn read(&self, record: &RecordRef) -> Result<Events, LogError> {
        let (file, path) = {
            let segments = lock(&self.shared.segments);
            match segments.get(&record.segment) {
                Some(segment) => (segment.file.clone(), segment.path.clone()),
                None => {
                    let path = segment_path(&self.folder, record.segment);
                    let source = io::Error::new(io::ErrorKind::NotFound, "the segment was deleted");
                    return Err(LogError::Disk { path: path.display().to_string(), source });
                }
            }
        };
        let mut bytes = vec![0; RECORD_HEADER_BYTES + record.payload_bytes as usize];
        file.read_exact_at(&mut bytes, record.offset).map_err(disk(&path))?;
        let corrupt =
            |what: String| LogError::Corrupt { path: path.display().to_string(), offset: record.offset, what };
        let payload = payload_at(&bytes).ok_or_else(|| corrupt("the checksum differs".into()))?;
        let (_, stream) = parse(payload, record.segment, record.offset).ok_or_else(|| corrupt("its header".into()))?;
        decode(stream).map_err(corrupt)
    }

    /// These rows are in the history now.
    pub fn release(&self, segment: u64, rows: u64) {
        let mut segments = lock(&self.shared.segments);
        if let Some(segment) = segments.get_mut(&segment) {
            segment.pending_rows = segment.pending_rows.saturating_sub(rows);
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
            if let Err(error) = self.send(&state, command) {
                tracing::debug!(%error, "the event log is not running, its newest segment stays");
            }
        }
        let mut segments = lock(&self.shared.segments);
        let Some(newest) = segments.keys().next_back().copied() else { return };
        let done: Vec<u64> = segments
            .iter()
            .filter(|(id, segment)| **id != newest && segment.pending_rows == 0)
            .map(|(id, _)| *id)
            .collect();
        for id in done {
            if let Some(segment) = segments.get(&id)
                && let Err(error) = fs::remove_file(&segment.path)
            {
                tracing::warn!(path = %segment.path.display(), %error, "a finished segment of the event log could not be deleted");
                continue;
            }
            if let Some(segment) = segments.remove(&id) {
                self.shared.bytes.fetch_sub(segment.bytes, Ordering::AcqRel);
            }
        }
    }

    /// Memory of a batch that the applier no longer holds.
    pub fn forget_cached(&self, events: &Events) {
        self.shared.cached_bytes.fetch_sub(cached_bytes(events), Ordering::AcqRel);
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Acquire)
    }

    /// Whether the log failed and takes nothing more.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.failure).clone()
    }

    /// Takes no more appends and waits for those on their way.
    pub fn close(&self) {
        lock(&self.state).to_writer = None;
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
        if lock(&self.shared.failure).is_some() { Err(self.stopped()) } else { Ok(()) }
    }

    fn stopped(&self) -> LogError {
        let what = self.failure().unwrap_or_else(|| "it was closed".into());
        LogError::Stopped { what }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

/// Batches are counted as they lie in memory.
fn cached_bytes(events: &Events) -> u64 {
    (events.batch.get_array_memory_size() + events.due.len() * 8) as u64
}

/// The thread that owns the newest segment.
struct Writer {
    folder: PathBuf,
    shared: Arc<Shared>,
    publish: tokio::sync::mpsc::UnboundedSender<Durable>,
    segment: u64,
    segment_bytes: u64,
    cached_bytes_max: u64,
}

/// Bytes written before a sync, however many wait: bounds how long the first of a group waits.
const GROUP_BYTES: usize = 8 << 20;

impl Writer {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        while let Ok(first) = commands.recv() {
            if let Err(error) = self.group(first, commands) {
                let what = error_chain(&error);
                tracing::error!(what, "the event log failed and takes no more events");
                *lock(&self.shared.failure) = Some(what);
                break;
            }
        }
        // Whoever still waits is told that it will not happen; nobody waits after an orderly close.
        if lock(&self.shared.failure).is_some() {
            self.shared.durable.send_replace(u64::MAX);
        }
    }

    fn group(&mut self, first: Command, commands: &mpsc::Receiver<Command>) -> Result<(), LogError> {
        let (file, path, start) = {
            let segments = lock(&self.shared.segments);
            let segment = &segments[&self.segment];
            (segment.file.clone(), segment.path.clone(), segment.bytes)
        };
        let mut bytes: Vec<u8> = Vec::new();
        let mut written: Vec<(RecordRef, Events)> = Vec::new();
        let mut ticket_max = None;
        let mut permits = Vec::new();
        let mut rotate = None;
        let mut rows = 0;
        let mut next = Some(first);
        while let Some(command) = next.take() {
            match command {
                Command::Append { ticket, mut payload, events, permits: permit } => {
                    payload[..8].copy_from_slice(&start.to_le_bytes());
                    if let Some((mut record, events)) = events {
                        record.segment = self.segment;
                        record.offset = start + bytes.len() as u64;
                        rows += u64::from(record.rows);
                        written.push((record, events));
                    }
                    bytes.extend_from_slice(RECORD_MAGIC);
                    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
                    bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
                    bytes.extend_from_slice(&payload);
                    ticket_max = Some(ticket);
                    permits.extend(permit);
                }
                Command::Rotate { first_sequence, arrival } => {
                    rotate = Some((first_sequence, arrival));
                    break;
                }
            }
            if bytes.len() < GROUP_BYTES {
                next = commands.try_recv().ok();
            }
        }
        if !bytes.is_empty() {
            file.write_all_at(&bytes, start).map_err(disk(&path))?;
            file.sync_data().map_err(disk(&path))?;
            let size = {
                let mut segments = lock(&self.shared.segments);
                let segment = segments.get_mut(&self.segment).expect("the newest segment is never deleted");
                segment.bytes = start + bytes.len() as u64;
                segment.pending_rows += rows;
                segment.bytes
            };
            // The applier hears of the events before their pusher does, so that a pusher that waits for it can.
            let last =
                written.last().map(|(record, _)| (record.first_sequence + u64::from(record.rows), record.arrival));
            for (record, events) in written {
                let size = cached_bytes(&events);
                let fits = self.shared.cached_bytes.load(Ordering::Acquire) + size <= self.cached_bytes_max;
                if fits {
                    self.shared.cached_bytes.fetch_add(size, Ordering::AcqRel);
                }
                // Nobody listens while the process goes down: the events are on disk, the next process reads them.
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
            self.segment = begin_segment(&self.folder, &self.shared, first_sequence, arrival)?;
        }
        Ok(())
    }
}

fn error_chain(error: &LogError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

fn segment_path(folder: &Path, id: u64) -> PathBuf {
    folder.join(format!("{id:016x}.log"))
}

/// Creates a segment and makes it durable, with its name, before anything is written into it.
fn begin_segment(folder: &Path, shared: &Shared, first_sequence: u64, arrival: Micros) -> Result<u64, LogError> {
    let mut segments = lock(&shared.segments);
    let id = segments.keys().next_back().map_or(1, |last| last + 1);
    let path = segment_path(folder, id);
    let mut header = Vec::from(SEGMENT_MAGIC);
    header.extend_from_slice(&first_sequence.to_le_bytes());
    header.extend_from_slice(&arrival.to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    let opened = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path);
    let mut file = opened.map_err(disk(&path))?;
    file.write_all(&header).and_then(|()| file.sync_all()).map_err(disk(&path))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(disk(folder))?;
    shared.bytes.fetch_add(HEADER_BYTES, Ordering::AcqRel);
    segments.insert(id, Segment { path, file: Arc::new(file), bytes: HEADER_BYTES, pending_rows: 0 });
    Ok(id)
}

struct Scanned {
    file: File,
    bytes: u64,
    records: Vec<RecordRef>,
    arrival: Micros,
    next_sequence: u64,
}

/// Reads a segment. None: it is the newest and not even its header was finished.
fn scan(id: u64, path: &Path, is_newest: bool) -> Result<Option<Scanned>, LogError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(disk(path))?;
    // A segment is little larger than `segment_bytes`, and is read once, at the start.
    let bytes = fs::read(path).map_err(disk(path))?;
    let corrupt = |offset: usize, what: &str| LogError::Corrupt {
        path: path.display().to_string(),
        offset: offset as u64,
        what: what.into(),
    };
    let header = bytes.get(..HEADER_BYTES as usize);
    if let Some(magic) = bytes.get(..8)
        && magic != SEGMENT_MAGIC
        && magic.starts_with(b"coevlog")
    {
        let found = String::from_utf8_lossy(magic).into_owned();
        return Err(LogError::Newer { path: path.display().to_string(), found });
    }
    let Some(header) = header.filter(|header| {
        header.starts_with(SEGMENT_MAGIC) && crc32fast::hash(&header[..24]).to_le_bytes() == header[24..]
    }) else {
        if is_newest && find_record(&bytes, 0).is_none() {
            tracing::warn!(path = %path.display(), "the newest segment of the event log was begun and never used");
            fs::remove_file(path).map_err(disk(path))?;
            return Ok(None);
        }
        return Err(corrupt(0, "its header"));
    };
    let number = |at: usize| header[at..at + 8].try_into().expect("eight bytes were asked for");
    let mut scanned = Scanned {
        bytes: bytes.len() as u64,
        records: Vec::new(),
        arrival: i64::from_le_bytes(number(16)),
        next_sequence: u64::from_le_bytes(number(8)),
        file,
    };
    let mut at = HEADER_BYTES as usize;
    while at < bytes.len() {
        let Some((payload, parsed)) = payload_at(&bytes[at..]).and_then(|payload| {
            let kind = *payload.get(8)?;
            match kind {
                KIND_EVENTS => Some((payload, Some(parse(payload, id, at as u64)?.0))),
                KIND_TICK if payload.len() == 17 => Some((payload, None)),
                _ => None,
            }
        }) else {
            if !is_newest {
                return Err(corrupt(at, "the checksum differs, and newer segments follow"));
            }
            if was_synced(&bytes, at) {
                return Err(corrupt(at, "the checksum differs, and newer records say it was durable"));
            }
            let lost = bytes.len() - at;
            tracing::warn!(path = %path.display(), offset = at, bytes = lost, "the end of the event log was torn by a crash and is cut off; nothing in it was acknowledged");
            scanned.file.set_len(at as u64).and_then(|()| scanned.file.sync_all()).map_err(disk(path))?;
            scanned.bytes = at as u64;
            break;
        };
        match parsed {
            Some(record) => {
                scanned.arrival = scanned.arrival.max(record.arrival);
                scanned.next_sequence = scanned.next_sequence.max(record.first_sequence + u64::from(record.rows));
                scanned.records.push(record);
            }
            None => {
                let arrival = payload[9..17].try_into().expect("eight bytes were asked for");
                scanned.arrival = scanned.arrival.max(i64::from_le_bytes(arrival));
            }
        }
        at += RECORD_HEADER_BYTES + payload.len();
    }
    Ok(Some(scanned))
}

/// Whether any readable record after a damaged place says that the place had been durable when it was written.
fn was_synced(bytes: &[u8], damaged: usize) -> bool {
    let mut from = damaged + 1;
    while let Some(at) = find_record(bytes, from) {
        let payload = payload_at(&bytes[at..]).unwrap_or_default();
        let synced = payload.get(..8).map_or(0, |synced| u64::from_le_bytes(synced.try_into().expect("eight bytes")));
        if synced > damaged as u64 {
            return true;
        }
        from = at + RECORD_HEADER_BYTES + payload.len();
    }
    false
}

fn find_record(bytes: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(RECORD_MAGIC.len())
        .enumerate()
        .filter(|(_, window)| window == RECORD_MAGIC)
        .map(|(at, _)| from + at)
        .find(|at| payload_at(&bytes[*at..]).is_some())
}

/// The payload of the record at the front of `bytes`, if it is whole.
fn payload_at(bytes: &[u8]) -> Option<&[u8]> {
    let header = bytes.get(..RECORD_HEADER_BYTES)?;
    let length = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
    if !header.starts_with(RECORD_MAGIC) || !(9..=RECORD_BYTES_MAX).contains(&length) {
        return None;
    }
    let payload = bytes.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + length)?;
    (crc32fast::hash(payload).to_le_bytes() == header[8..12]).then_some(payload)
}

/// The header of an events record, and its Arrow stream.
fn parse(payload: &[u8], segment: u64, offset: u64) -> Option<(RecordRef, &[u8])> {
    let mut rest = payload.get(9..)?;
    let mut take = |length: usize| {
        let (head, tail) = rest.split_at_checked(length)?;
        rest = tail;
        Some(head)
    };
    let arrival = i64::from_le_bytes(take(8)?.try_into().ok()?);
    let first_sequence = u64::from_le_bytes(take(8)?.try_into().ok()?);
    let rows = u32::from_le_bytes(take(4)?.try_into().ok()?);
    let mut text = || {
        let length = u16::from_le_bytes(take(2)?.try_into().ok()?);
        std::str::from_utf8(take(usize::from(length))?).ok()
    };
    let import = text()?;
    let source = text()?;
    let import = (!import.is_empty()).then(|| import.into());
    let payload_bytes = payload.len() as u32;
    let record =
        RecordRef { source: source.into(), arrival, first_sequence, rows, import, segment, offset, payload_bytes };
    Some((record, rest))
}

fn decode(stream: &[u8]) -> Result<Events, String> {
    let failed = |error: arrow::error::ArrowError| error.to_string();
    let mut reader = StreamReader::try_new(stream, None).map_err(failed)?;
    let batch = reader.next().ok_or("it holds no events")?.map_err(failed)?;
    let last = batch.num_columns().checked_sub(1).ok_or("it holds no columns")?;
    let due = batch.column(last).as_primitive_opt::<Int64Type>().ok_or("it holds no due times")?;
    let due = due.values().to_vec();
    let kept: Vec<usize> = (0..last).collect();
    Ok(Events { batch: batch.project(&kept).map_err(failed)?, due })
}

#[cfg(test)]
mod tests;
