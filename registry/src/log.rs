//! The control log: several processes on several machines change the same project, there is no server in between, and yet
//! nobody's change may be lost or judged on a state that was no longer true.
//!
//! An object store gives one thing to build on: a put that succeeds only when the object is absent. So the log is numbered
//! objects, `control/00000000000000000001.json` and on. To append is to put the number after the head that the change was
//! judged on; whoever comes second is told so, reads what the first one wrote and judges again. An entry is never
//! overwritten and never deleted: the log is the audit trail, and the state is its fold.
//!
//! How the format grows without being refitted:
//! - the envelope may gain fields, which older readers ignore;
//! - a body may gain fields that an older reader does no harm by ignoring; a change that must not be ignored takes a new
//!   kind;
//! - an entry says whether a reader that does not know its kind may skip it (`must_understand`);
//! - a new `format` number is for an envelope that older readers cannot read at all.

use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, SubsecRound, Utc};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{EntryId, EntryNumber, ProjectName};

/// The envelope that this build writes, and the greatest that it reads.
pub const FORMAT: u32 = 1;

/// A project's definition files are the largest thing an entry carries; a megabyte of YAML is already a lot. The bound
/// keeps one mistaken entry from weighing on every start of every process from then on.
pub const ENTRY_BYTES_MAX: u64 = 4 << 20;

/// How many entries are fetched at a time while catching up. A quiet follower asks for one; the window doubles as long as
/// entries keep coming.
const FETCH_WINDOW_MAX: u64 = 32;

/// One entry of the log, as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub format: u32,
    pub number: EntryNumber,
    /// Chosen by the writer: after an uncertain put it tells the writer whether the entry at a number is its own.
    pub id: EntryId,
    /// The writer's clock; information only, the order is the number.
    #[serde(with = "rfc3339")]
    pub at: DateTime<Utc>,
    pub project: ProjectName,
    pub who: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Whether a reader that does not know `kind` must stop making changes, rather than skip the entry.
    pub must_understand: bool,
    pub kind: String,
    pub body: serde_json::Value,
}

/// An entry before it has a number.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    pub id: EntryId,
    pub at: DateTime<Utc>,
    pub project: ProjectName,
    pub who: String,
    pub why: Option<String>,
    pub must_understand: bool,
    pub kind: String,
    pub body: serde_json::Value,
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Append {
    Appended(EntryNumber),
    /// Somebody else appended since the draft was judged: read up to `head`, judge again, append again.
    Conflict {
        head: EntryNumber,
    },
}

#[derive(Debug, Error)]
pub enum LogError {
    #[error("could not {operation} {object} in the control log; check that the store is there and try again")]
    Store {
        operation: &'static str,
        object: Path,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error(
        "control log entry {object} is corrupt: {reason}; restore the object from a backup or another copy of the store"
    )]
    Corrupt { object: Path, reason: String },
    #[error(
        "control log entry {missing} is missing although later entries exist; restore the object before anything is changed"
    )]
    Gap { missing: Path },
    #[error(
        "control log entry {object}, which was read before, is not in the store any more; check that the store is the right \
         one, and mounted"
    )]
    Gone { object: Path },
    #[error(
        "the `{kind}` entry has {bytes} bytes, more than the {limit} that a control log entry may have; split the change or shorten its texts"
    )]
    TooLarge { kind: String, bytes: u64, limit: u64 },
}

impl LogError {
    /// Whether the same call may succeed later without anybody mending anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Store { .. })
    }
}

/// The log itself. It keeps no state but where it lies; two of them over one store are two writers like any others.
#[derive(Debug, Clone)]
pub struct ControlLog {
    store: Arc<dyn ObjectStore>,
    folder: Path,
}

impl ControlLog {
    /// The log below `prefix`, in the folder `control`.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &Path) -> Self {
        Self { store, folder: prefix.clone().join("control") }
    }

    /// Puts the draft at the number after `judged_on`, which must be a head that was read from this log.
    ///
    /// Exactly one of any number of writers succeeds at a number. When the store fails in a way that leaves the outcome
    /// open, the log looks whether the entry is there before it answers.
    pub async fn append(&self, draft: &Draft, judged_on: EntryNumber) -> Result<Append, LogError> {
        let number = judged_on.next();
        let path = self.path(number);
        let entry = Entry {
            format: FORMAT,
            number,
            id: draft.id.clone(),
            at: draft.at.trunc_subsecs(6),
            project: draft.project.clone(),
            who: draft.who.clone(),
            why: draft.why.clone(),
            must_understand: draft.must_understand,
            kind: draft.kind.clone(),
            body: draft.body.clone(),
        };
        let bytes = serde_json::to_vec_pretty(&entry)
            .map_err(|error| LogError::Corrupt { object: path.clone(), reason: error.to_string() })?;
        if bytes.len() as u64 > ENTRY_BYTES_MAX {
            let kind = draft.kind.clone();
            return Err(LogError::TooLarge { kind, bytes: bytes.len() as u64, limit: ENTRY_BYTES_MAX });
        }
        // An append after a head that does not exist would leave a hole, which no reader could pass.
        if judged_on != EntryNumber::NONE && !self.exists(judged_on).await? {
            return Err(LogError::Gap { missing: self.path(judged_on) });
        }

        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let failure = match self.store.put_opts(&path, bytes.into(), options).await {
            Ok(_) => return Ok(Append::Appended(number)),
            Err(error) => error,
        };
        // A store's own retry may find the object that its first try has put, and an answer may be lost on the way.
        match self.read(number).await {
            Ok(Some(present)) if present.id == draft.id => {
                // It can be read, so others may already build on it: it counts, whatever the store has said.
                tracing::warn!(object = %path, error = %failure, "a control log entry is there although its put failed");
                Ok(Append::Appended(number))
            }
            Ok(Some(_)) => Ok(Append::Conflict { head: self.head_after(number).await? }),
            Err(corrupt @ LogError::Corrupt { .. }) => Err(corrupt),
            Ok(None) | Err(_) => Err(LogError::Store { operation: "append", object: path, source: Box::new(failure) }),
        }
    }

    /// The entry at a number, or `None` when the log has not come that far.
    pub async fn read(&self, number: EntryNumber) -> Result<Option<Entry>, LogError> {
        let path = self.path(number);
        match get_bounded(self.store.as_ref(), &path, ENTRY_BYTES_MAX).await {
            Ok(Fetched::Absent) => Ok(None),
            Ok(Fetched::TooLarge(bytes)) => {
                let reason = format!("it has {bytes} bytes, more than the {ENTRY_BYTES_MAX} that an entry may have");
                Err(LogError::Corrupt { object: path, reason })
            }
            Ok(Fetched::Bytes(bytes)) => {
                decode(&bytes, number).map(Some).map_err(|reason| LogError::Corrupt { object: path, reason })
            }
            Err(error) => Err(LogError::Store { operation: "read", object: path, source: Box::new(error) }),
        }
    }

    /// The entries from `first` on, in order, at most `entries_max` of them; fewer mean that the end was reached.
    pub async fn read_from(&self, first: EntryNumber, entries_max: usize) -> Result<Vec<Entry>, LogError> {
        let mut entries = Vec::new();
        let mut next = first.max(EntryNumber::FIRST);
        let mut window = 1;
        while entries.len() < entries_max {
            let width = window.min((entries_max - entries.len()) as u64);
            let fetched: Vec<Option<Entry>> =
                futures::stream::iter((next.0..next.0 + width).map(|number| self.read(EntryNumber(number))))
                    .buffered(FETCH_WINDOW_MAX as usize)
                    .try_collect()
                    .await?;
            let present = fetched.iter().take_while(|entry| entry.is_some()).count() as u64;
            let later = fetched.iter().skip(present as usize).any(Option::is_some);
            entries.extend(fetched.into_iter().map_while(|entry| entry));
            next = EntryNumber(next.0 + present);
            if later && !self.exists(next).await? {
                // An entry is put only after the one before it, so this is no race with a writer: the object is gone.
                return Err(LogError::Gap { missing: self.path(next) });
            }
            if present < width && !later {
                break;
            }
            window = (window * 2).min(FETCH_WINDOW_MAX);
        }
        Ok(entries)
    }

    /// The number of the last entry; `EntryNumber::NONE` for an empty log. Lists the whole log and checks for holes.
    pub async fn head(&self) -> Result<EntryNumber, LogError> {
        self.head_after(EntryNumber::NONE).await
    }

    /// The number of the last entry, given one that exists. Lists only what comes after it.
    pub async fn head_after(&self, known: EntryNumber) -> Result<EntryNumber, LogError> {
        let mut numbers: Vec<u64> = self
            .store
            .list_with_offset(Some(&self.folder), &self.path(known))
            .try_filter_map(|object| {
                let number = number_of(&object.location, &self.folder).filter(|number| *number > known);
                futures::future::ready(Ok(number.map(|number| number.0)))
            })
            .try_collect()
            .await
            .map_err(|source| LogError::Store {
                operation: "list",
                object: self.folder.clone(),
                source: Box::new(source),
            })?;
        numbers.sort_unstable();
        let mut head = known.0;
        for number in numbers {
            // A listing that races with writers may show a later entry and miss an earlier one, so the store is asked again.
            while head + 1 < number {
                head += 1;
                if !self.exists(EntryNumber(head)).await? {
                    return Err(LogError::Gap { missing: self.path(EntryNumber(head)) });
                }
            }
            head = number;
        }
        Ok(EntryNumber(head))
    }

    /// A reader that follows the log from the entry after `read`.
    pub fn tail(&self, read: EntryNumber) -> Tail {
        Tail { log: self.clone(), read }
    }

    /// Where the entry with this number lies.
    pub fn path(&self, number: EntryNumber) -> Path {
        self.folder.clone().join(format!("{number:020}.json", number = number.0))
    }

    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    async fn exists(&self, number: EntryNumber) -> Result<bool, LogError> {
        let path = self.path(number);
        match self.store.head(&path).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(LogError::Store { operation: "look for", object: path, source: Box::new(source) }),
        }
    }
}

/// Follows the log: the caller decides when to ask (gateways do so every 250 ms), so this holds no timer and no task.
#[derive(Debug, Clone)]
pub struct Tail {
    log: ControlLog,
    read: EntryNumber,
}

impl Tail {
    /// The entries that have come since the last call, at most `entries_max`. One request when there are none. After an
    /// error nothing is skipped: the next call begins where this one did.
    pub async fn poll(&mut self, entries_max: usize) -> Result<Vec<Entry>, LogError> {
        let entries = self.log.read_from(self.read.next(), entries_max).await?;
        if let Some(last) = entries.last() {
            self.read = last.number;
        }
        Ok(entries)
    }

    /// The last entry that was handed out.
    pub fn read(&self) -> EntryNumber {
        self.read
    }
}

pub(crate) enum Fetched {
    Absent,
    TooLarge(u64),
    Bytes(Bytes),
}

/// Reads an object whole, unless it is larger than it can rightly be: its size is looked at before its bytes are.
pub(crate) async fn get_bounded(
    store: &dyn ObjectStore,
    path: &Path,
    bytes_max: u64,
) -> Result<Fetched, object_store::Error> {
    match store.get(path).await {
        Ok(found) if found.meta.size > bytes_max => Ok(Fetched::TooLarge(found.meta.size)),
        Ok(found) => Ok(Fetched::Bytes(found.bytes().await?)),
        Err(object_store::Error::NotFound { .. }) => Ok(Fetched::Absent),
        Err(error) => Err(error),
    }
}

fn decode(bytes: &[u8], number: EntryNumber) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct Envelope {
        format: u32,
    }
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if envelope.format > FORMAT {
        return Ok(from_the_future(envelope.format, number));
    }
    let entry: Entry = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if entry.number != number {
        return Err(format!("it says that it is entry {}", entry.number));
    }
    Ok(entry)
}

/// Stands in for an entry whose envelope this build cannot read. Its kind is known to nobody and must be understood, so
/// the fold stops changes, as it would for any kind from the future.
fn from_the_future(format: u32, number: EntryNumber) -> Entry {
    Entry {
        format,
        number,
        id: EntryId::try_new("unknown").expect("the literal keeps the rules of names"),
        at: DateTime::UNIX_EPOCH,
        project: ProjectName::try_new("unknown").expect("the literal keeps the rules of names"),
        who: String::new(),
        why: None,
        must_understand: true,
        kind: format!("(envelope format {format})"),
        body: serde_json::Value::Null,
    }
}

/// The number of an entry's object; other objects below the folder (snapshots) have none.
fn number_of(location: &Path, folder: &Path) -> Option<EntryNumber> {
    let mut rest = location.prefix_match(folder)?;
    let name = rest.next()?;
    if rest.next().is_some() {
        return None;
    }
    let digits = name.as_ref().strip_suffix(".json")?;
    if digits.len() != 20 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().map(EntryNumber)
}

/// Times as people and other tools read them; chrono's own serde support writes a variable number of digits.
pub(crate) mod rfc3339 {
    use super::*;

    pub fn serialize<S: serde::Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Micros, true))
    }

    pub fn deserialize<'de, D>(deserializer: D) -> Result<DateTime<Utc>, D::Error>
    where
        D: serde::Deserializer<'de>,
    {
        use serde::de::Error as _;
        let text = String::deserialize(deserializer)?;
        match DateTime::parse_from_rfc3339(&text) {
            Ok(at) => Ok(at.with_timezone(&Utc)),
            Err(error) => Err(D::Error::custom(format!("`{text}` is not an RFC 3339 time: {error}"))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
