//! Segments as streams in a Redis, for a server that may die with its machine.
//!
//! ```text
//! c1:{<project>}log            the index, a hash: `format`, `writer`, and for each segment `s<id>`: first sequence and
//!                              arrival floor, `e<id>`: where its last record ends
//! c1:{<project>}log:<id>       a segment, a stream: the entry `<offset>-0` holds in `r` the record that a file would hold at
//!                              this offset; where it was changed, `n` is how long it was
//! ```
//!
//! Ids are 16 hexadecimal digits. All keys of a log share a hash tag, so that a cluster keeps them on one node. They are
//! changed by the functions of `log.lua` only, each in one step, and only for the process that claimed the log last: one
//! that was replaced while it was away changes nothing any more.
//!
//! An append that was not answered may be there or not. It is repeated until there is an answer: offsets make that harmless,
//! and the index says whether the segment ends where the records begin (they are not there), where they end (they are) or
//! anywhere else (the Redis forgot what it had acknowledged, which is an error and the end of this log). The consumer group
//! `appliers` of each segment stands behind the last record up to which all are in the history: operators see it, and
//! the next process begins to read there.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redis::{Cmd, Value, from_redis_value};
use feature_defs::time::Micros;
use online_store::StoreError;
use online_store::redis::Direct;
use tokio::runtime::Runtime;

use super::record::{self, Content, HEADER_BYTES, payload_at};
use super::{Change, Cursor, Durable, Events, Found, LogError, RecordRef, cached_bytes};

/// Longest wait for an answer: a group of records is up to 72 MiB.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a start waits for a Redis that is away or loads its data.
const START_PATIENCE: Duration = Duration::from_secs(10);
const START_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of records read back at once, give or take one record.
const READ_BYTES: u64 = 8 << 20;
const READ_RECORDS: usize = 256;

/// What both sides of a log know.
struct Link {
    direct: Direct,
    index: String,
    /// Of this process.
    token: Arc<str>,
}

/// A name that no other process has.
pub(super) fn token() -> Arc<str> {
    let number = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", number(), number()).into()
}

impl Link {
    fn new(url: &str, project: &str, token: Arc<str>) -> Result<Link, LogError> {
        let index = format!("c1:{{{project}}}log");
        let direct = Direct::new(url, &index, TIMEOUT).map_err(meaning)?;
        Ok(Link { direct, index, token })
    }

    fn segment(&self, id: u64) -> String {
        format!("{}:{id:016x}", self.index)
    }

    async fn call(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, LogError> {
        let count = commands.len();
        let answers = self.direct.call(commands).await.map_err(meaning)?;
        if answers.len() == count {
            return Ok(answers);
        }
        Err(LogError::Away { place: self.place(), what: format!("{} answers to {count} commands", answers.len()) })
    }

    /// An answer that is no error.
    async fn good(&self, answer: Value) -> Result<Value, LogError> {
        let Value::ServerError(error) = answer else { return Ok(answer) };
        let details = error.details().unwrap_or_default().to_owned();
        Err(match error.code() {
            "COEVALLOGTAKEN" => LogError::Superseded { what: details },
            "COEVALLOGGONE" | "COEVALLOGLOST" => LogError::Gone { place: self.place(), what: details },
            "COEVALLOGFORMAT" => LogError::Newer { path: self.index.clone(), found: details },
            _ => meaning(self.direct.refusal(&error).await),
        })
    }

    fn place(&self) -> String {
        self.direct.place().to_owned()
    }

    fn corrupt(&self, segment: u64, offset: u64, what: String) -> LogError {
        LogError::Corrupt { path: format!("{} in {}", self.segment(segment), self.place()), offset, what }
    }

    fn function(&self, name: &str, segment: Option<u64>) -> Cmd {
        let mut call = ::redis::cmd("FCALL");
        call.arg(format!("coevallog1_{name}")).arg(if segment.is_some() { 2 } else { 1 }).arg(&self.index);
        if let Some(segment) = segment {
            call.arg(self.segment(segment));
        }
        call.arg(&*self.token);
        call
    }

    /// What says whether a write that is answered stays.
    fn durability() -> Cmd {
        let mut config = ::redis::cmd("CONFIG");
        config.arg("GET").arg("appendonly").arg("appendfsync").arg("no-appendfsync-on-rewrite");
        config
    }

    async fn check_durable(&self, answer: Value) -> Result<(), LogError> {
        let refused = |what: String| LogError::Refused { place: self.place(), what };
        let settings = match self.good(answer).await {
            Ok(answer) => from_redis_value::<HashMap<String, String>>(answer).unwrap_or_default(),
            Err(LogError::Refused { what, .. }) => {
                return Err(refused(format!(
                    "it does not answer CONFIG GET ({what}), so whether it keeps what it acknowledges is not known; allow \
                     its user `+config|get`, or write `log: disk`"
                )));
            }
            Err(error) => return Err(error),
        };
        for (name, needed) in [("appendonly", "yes"), ("appendfsync", "always"), ("no-appendfsync-on-rewrite", "no")] {
            let found = settings.get(name).map_or("unknown", String::as_str);
            if found != needed {
                return Err(refused(format!(
                    "its `{name}` is `{found}`, so it may forget what it acknowledged; set `{name} {needed}`, or write \
                     `log: disk`"
                )));
            }
        }
        Ok(())
    }
}

fn meaning(error: StoreError) -> LogError {
    match error {
        StoreError::Unreachable { place, what } => LogError::Away { place, what },
        StoreError::Timeout { place, millis } => {
            LogError::Away { place, what: format!("no answer within {millis} ms") }
        }
        StoreError::Refused { place, what } => LogError::Refused { place, what },
        error => LogError::Refused { place: "`online:`".to_owned(), what: error.to_string() },
    }
}

/// The side that writes. Its connections live on a runtime of their own, because the thread that writes waits for answers
/// wherever everybody else is.
pub(super) struct Redis {
    runtime: Runtime,
    link: Link,
}

impl Redis {
    /// Takes the log over and reads what is there; events are kept in memory up to `cached_bytes_max`.
    pub fn open(
        url: &str,
        project: &str,
        token: Arc<str>,
        cached_bytes_max: u64,
    ) -> Result<(Redis, Vec<Found>), LogError> {
        let link = Link::new(url, project, token)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| LogError::Disk { path: link.place(), source })?;
        let start = Instant::now();
        loop {
            match runtime.block_on(take_over(&link, cached_bytes_max)) {
                Ok(found) => return Ok((Redis { runtime, link }, found)),
                Err(LogError::Away { .. }) if start.elapsed() < START_PATIENCE => std::thread::sleep(START_PAUSE),
                Err(LogError::Away { place, what }) => {
                    let what = format!("it cannot be reached ({what}); start it, or check `online:` in coeval.yaml");
                    return Err(LogError::Refused { place, what });
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub fn begin(&self, id: u64, first_sequence: u64, arrival: Micros) -> Result<(), LogError> {
        let mut begin = self.link.function("begin", Some(id));
        begin.arg(format!("{id:016x}")).arg(format!("{first_sequence} {arrival}")).arg(HEADER_BYTES);
        self.change(begin)
    }

    /// Makes records durable that begin at `start`; `ends` says where each of them ends in `bytes`.
    pub fn append(&self, segment: u64, start: u64, bytes: &[u8], ends: &[usize]) -> Result<(), LogError> {
        let mut append = self.link.function("append", Some(segment));
        append.arg(format!("{segment:016x}")).arg(start).arg(start + bytes.len() as u64);
        let mut from = 0;
        for end in ends {
            append.arg(start + from as u64).arg(&bytes[from..*end]);
            from = *end;
        }
        self.runtime.block_on(async {
            let answers = self.link.call(vec![Link::durability(), append]).await?;
            let [settings, appended] = answers.try_into().unwrap_or_default();
            // Whose log it is matters more than how it is kept.
            self.link.good(appended).await?;
            self.link.check_durable(settings).await
        })
    }

    /// Everything up to the record at an offset, so many entries, is in the history.
    pub fn done(&self, segment: u64, offset: u64, entries: u64) -> Result<(), LogError> {
        let mut done = self.link.function("done", Some(segment));
        done.arg(offset).arg(entries);
        self.change(done)
    }

    pub fn remove(&self, segment: u64) -> Result<(), LogError> {
        let mut drop = self.link.function("drop", Some(segment));
        drop.arg(format!("{segment:016x}"));
        self.change(drop)
    }

    fn change(&self, command: Cmd) -> Result<(), LogError> {
        self.runtime.block_on(async {
            let answer = self.link.call(vec![command]).await?.pop().unwrap_or_default();
            self.link.good(answer).await.map(|_| ())
        })
    }
}

async fn take_over(link: &Link, cached_bytes_max: u64) -> Result<Vec<Found>, LogError> {
    let one = async |command: Cmd| {
        let answer = link.call(vec![command]).await?.pop().unwrap_or_default();
        link.good(answer).await
    };
    link.check_durable(link.call(vec![Link::durability()]).await?.pop().unwrap_or_default()).await?;
    one(link.function("claim", None)).await?;
    let mut index = ::redis::cmd("HGETALL");
    index.arg(&link.index);
    let index: HashMap<String, String> = from_redis_value(one(index).await?)
        .map_err(|error| LogError::Refused { place: link.place(), what: format!("{}: {error}", link.index) })?;
    let mut segments: Vec<u64> =
        index.keys().filter_map(|field| u64::from_str_radix(field.strip_prefix('s')?, 16).ok()).collect();
    segments.sort_unstable();
    let mut room = cached_bytes_max;
    let mut found = Vec::with_capacity(segments.len());
    for id in segments {
        let said = |letter: char| index.get(&format!("{letter}{id:016x}"));
        let header = said('s').and_then(|header| header.split_once(' '));
        let header = header.and_then(|(sequence, arrival)| Some((sequence.parse().ok()?, arrival.parse().ok()?)));
        let (Some((next_sequence, arrival)), Some(end)) = (header, said('e').and_then(|end| end.parse().ok())) else {
            return Err(link.corrupt(id, 0, "the index does not say where it begins and ends".to_owned()));
        };
        let mut segment = Found { id, bytes: end, records: Vec::new(), arrival, next_sequence, cursor: None };
        scan(link, &mut segment, &mut room).await?;
        found.push(segment);
    }
    Ok(found)
}

/// Reads a segment from where its consumer group stands.
async fn scan(link: &Link, segment: &mut Found, room: &mut u64) -> Result<(), LogError> {
    let (id, end) = (segment.id, segment.bytes);
    let key = link.segment(id);
    let mut groups = ::redis::cmd("XINFO");
    groups.arg("GROUPS").arg(&key);
    let groups = link.call(vec![groups]).await?.pop().unwrap_or_default();
    let groups: Vec<HashMap<String, Value>> = match groups {
        Value::ServerError(error) if error.details().is_some_and(|text| text.contains("no such key")) => {
            return Err(link.corrupt(id, 0, format!("the stream is gone, and {} names it", link.index)));
        }
        groups => from_redis_value(link.good(groups).await?).unwrap_or_default(),
    };
    let text = |value: &Value| String::from_utf8_lossy(as_bytes(value).unwrap_or_default()).into_owned();
    let group = groups.iter().find(|group| group.get("name").is_some_and(|name| text(name) == "appliers"));
    let last = group.and_then(|group| offset_of(as_bytes(group.get("last-delivered-id")?)?)).unwrap_or(0);
    let entries = match group.and_then(|group| group.get("entries-read")) {
        Some(Value::Int(entries)) => u64::try_from(*entries).unwrap_or(0),
        _ => 0,
    };
    let mut cursor = Cursor { open: Default::default(), at: last, entries, told: last };
    let mut expected = last.max(HEADER_BYTES);
    while expected < end {
        let mut range = ::redis::cmd("XRANGE");
        range.arg(&key).arg(format!("{expected}-0")).arg(format!("{}-0", expected + READ_BYTES));
        let answer = link.call(vec![range]).await?.pop().unwrap_or_default();
        let Some(entries) = entries_of(link.good(answer).await?).filter(|entries| !entries.is_empty()) else {
            return Err(link.corrupt(id, expected, "an entry is missing".to_owned()));
        };
        for Entry { offset, bytes, length } in entries {
            let corrupt = |what: &str| link.corrupt(id, offset, what.to_owned());
            if offset != expected {
                return Err(corrupt("another entry was expected before it"));
            }
            let payload = payload_at(&bytes).ok_or_else(|| corrupt("the checksum differs"))?;
            let content = record::content(payload, id, offset).ok_or_else(|| corrupt("its header"))?;
            let is_done = offset <= last;
            let rows = match content {
                Content::Events(record, _) if is_done => {
                    segment.see(&record);
                    0
                }
                Content::Events(record, stream) => {
                    let rows = u64::from(record.rows);
                    let events = match *room >= bytes.len() as u64 {
                        true => Some(record::decode(stream).map_err(|what| corrupt(&what))?),
                        false => None,
                    };
                    let events = events.filter(|events| cached_bytes(events) <= *room);
                    *room -= events.as_ref().map_or(0, cached_bytes);
                    segment.take(Durable { record, events });
                    rows
                }
                Content::Tick(arrival) => {
                    segment.arrival = segment.arrival.max(arrival);
                    0
                }
            };
            if !is_done {
                cursor.open.insert(offset, rows);
            }
            expected += length;
        }
    }
    segment.cursor = Some(cursor);
    Ok(())
}

/// Whether a Redis can hold a log, and what it holds of it; nothing is taken over.
pub(super) async fn look(url: &str, project: &str) -> Result<String, LogError> {
    let link = Link::new(url, project, token())?;
    let mut index = ::redis::cmd("HGETALL");
    index.arg(&link.index);
    let answers = link.call(vec![Link::durability(), index]).await?;
    let [settings, index] = answers.try_into().unwrap_or_default();
    link.check_durable(settings).await?;
    let index: HashMap<String, String> = from_redis_value(link.good(index).await?).unwrap_or_default();
    let ends = index.iter().filter(|(field, _)| field.starts_with('e')).filter_map(|(_, end)| end.parse::<u64>().ok());
    let (segments, bytes) = ends.fold((0, 0), |(segments, bytes), end| (segments + 1, bytes + end));
    let mib = bytes as f64 / f64::from(1 << 20);
    Ok(format!("{}, {}: {mib:.1} MiB in {segments} segments, appendfsync always", link.place(), link.index))
}

/// The side that reads, on the runtime of whoever does.
pub(super) struct Reader {
    link: Link,
}

impl Reader {
    pub fn new(url: &str, project: &str, token: Arc<str>) -> Result<Reader, LogError> {
        Ok(Reader { link: Link::new(url, project, token)? })
    }

    pub fn place(&self) -> &str {
        self.link.direct.place()
    }

    /// Brings records back, in their order.
    pub async fn read(&self, records: &[&RecordRef]) -> Result<Vec<Events>, LogError> {
        let mut events = Vec::with_capacity(records.len());
        while events.len() < records.len() {
            let mut bytes = 0;
            let chunk = records[events.len()..].iter().take(READ_RECORDS).take_while(|record| {
                let is_room = bytes < READ_BYTES;
                bytes += record.bytes();
                is_room
            });
            let chunk: Vec<&RecordRef> = chunk.copied().collect();
            let range = |record: &&RecordRef| {
                let mut range = ::redis::cmd("XRANGE");
                let id = format!("{}-0", record.offset);
                range.arg(self.link.segment(record.segment)).arg(&id).arg(&id);
                range
            };
            let answers = self.link.call(chunk.iter().map(range).collect()).await?;
            for (record, answer) in chunk.into_iter().zip(answers) {
                let corrupt = |what: String| self.link.corrupt(record.segment, record.offset, what);
                let entry = entries_of(self.link.good(answer).await?).and_then(|mut entries| entries.pop());
                let Entry { bytes, .. } = entry.ok_or_else(|| corrupt("the entry is gone".to_owned()))?;
                events.push(record::events(&bytes, record).map_err(corrupt)?);
            }
        }
        Ok(events)
    }

    /// Whether a listener would change a record of a segment.
    pub fn look(&self, id: u64, end: u64, look: Change<'_>) -> Result<bool, LogError> {
        Ok(self.changed(id, end, look)?.is_some())
    }

    /// Puts other records under the ids of those that a listener changes, in one step.
    pub fn rewrite(&self, id: u64, end: u64, cursor: &Cursor, change: Change<'_>) -> Result<bool, LogError> {
        let Some(entries) = self.changed(id, end, change)? else { return Ok(false) };
        let mut rewrite = self.link.function("rewrite", Some(id));
        rewrite.arg(format!("{id:016x}")).arg(cursor.told).arg(cursor.entries);
        for Entry { offset, bytes, length } in entries {
            rewrite.arg(offset).arg(bytes).arg(length);
        }
        let link = &self.link;
        tokio::runtime::Handle::current().block_on(async {
            let answer = link.call(vec![rewrite]).await?.pop().unwrap_or_default();
            link.good(answer).await
        })?;
        Ok(true)
    }

    /// All entries of a segment, if a listener changes any of them.
    fn changed(&self, id: u64, end: u64, change: Change<'_>) -> Result<Option<Vec<Entry>>, LogError> {
        let mut all = Vec::new();
        let mut is_changed = false;
        let mut from = HEADER_BYTES;
        while from < end {
            let mut range = ::redis::cmd("XRANGE");
            range.arg(self.link.segment(id)).arg(format!("{from}-0")).arg(format!("{}-0", from + READ_BYTES));
            let link = &self.link;
            let answer = tokio::runtime::Handle::current().block_on(async {
                let answer = link.call(vec![range]).await?.pop().unwrap_or_default();
                link.good(answer).await
            })?;
            let entries = entries_of(answer).unwrap_or_default();
            // Its last rows may have become history meanwhile.
            if entries.is_empty() {
                return Ok(None);
            }
            for mut entry in entries {
                let offset = entry.offset;
                let corrupt = |what: String| link.corrupt(id, offset, what);
                let payload = payload_at(&entry.bytes).ok_or_else(|| corrupt("the checksum differs".to_owned()))?;
                if let Some(payload) = record::changed(payload, id, offset, change).map_err(corrupt)?? {
                    is_changed = true;
                    let mut bytes = Vec::new();
                    record::frame(&mut bytes, payload, offset);
                    entry.bytes = bytes;
                }
                from = offset + entry.length;
                all.push(entry);
            }
        }
        Ok(is_changed.then_some(all))
    }

    /// An error if another process has taken the log over.
    pub async fn check_writer(&self) -> Result<(), LogError> {
        let mut writer = ::redis::cmd("HGET");
        writer.arg(&self.link.index).arg("writer");
        let answer = self.link.call(vec![writer]).await?.pop().unwrap_or_default();
        let answer = self.link.good(answer).await?;
        match as_bytes(&answer) {
            Some(token) if token == self.link.token.as_bytes() => Ok(()),
            Some(_) => Err(LogError::Superseded { what: "another process writes it".to_owned() }),
            // Nobody has taken over what is gone, and the history gets what this process still knows.
            None => Ok(()),
        }
    }
}

fn as_bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// Of the id of an entry.
fn offset_of(id: &[u8]) -> Option<u64> {
    std::str::from_utf8(id).ok()?.strip_suffix("-0")?.parse().ok()
}

struct Entry {
    offset: u64,
    bytes: Vec<u8>,
    /// To the next one: of the record that was written first, as the one in its place may be longer or shorter.
    length: u64,
}

/// The entries of an answer to XRANGE; None if it is of another kind.
fn entries_of(answer: Value) -> Option<Vec<Entry>> {
    let Value::Array(entries) = answer else { return None };
    let entry = |entry: Value| {
        let Value::Array(entry) = entry else { return None };
        let [id, fields]: [Value; 2] = entry.try_into().ok()?;
        let Value::Array(fields) = fields else { return None };
        let mut fields = fields.into_iter();
        let (Some(_), Some(Value::BulkString(bytes))) = (fields.next(), fields.next()) else { return None };
        let length = match (fields.next(), fields.next()) {
            (Some(_), Some(length)) => std::str::from_utf8(as_bytes(&length)?).ok()?.parse().ok()?,
            _ => bytes.len() as u64,
        };
        Some(Entry { offset: offset_of(as_bytes(&id)?)?, bytes, length })
    };
    entries.into_iter().map(entry).collect()
}
