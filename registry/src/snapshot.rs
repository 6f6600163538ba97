//! Snapshots: a process that starts must not read a year of entries. Every 256 entries the fold is written beside the log,
//! and a start reads the newest usable one and the entries after it.
//!
//! A snapshot is never the truth. It is used only when its digest holds, when it was made by the same fold, and when the
//! log beside it still has the very entry that it ends with; otherwise the one before is tried, and at last the log is
//! folded from its first entry. So any snapshot may be deleted at any time, and a damaged one is written anew by the next
//! process that folds past its number.

use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::id::{EntryNumber, Sha256};
use crate::log::{ControlLog, Fetched, LogError, get_bounded};
use crate::state::{FOLD, State};

/// Starting reads at most this many entries beside the snapshot: about a second on a distant object store.
pub const SNAPSHOT_EVERY: u64 = 256;

/// Far above any real state (each model version takes some kilobytes); a larger object is damage, not a snapshot.
const SNAPSHOT_BYTES_MAX: u64 = 256 << 20;

/// How many snapshots are tried before the log is folded from its beginning.
const TRIES_MAX: usize = 3;

const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Snapshot {
    format: u32,
    fold: u32,
    number: EntryNumber,
    /// Of the state's JSON as this build writes it. A state with anything in it that this build does not know has another.
    sha256: Sha256,
    state: State,
}

/// Whether the fold up to here is one to write.
pub(crate) fn is_due(state: &State) -> bool {
    state.head != EntryNumber::NONE && state.head.0.is_multiple_of(SNAPSHOT_EVERY) && state.changes_stopped.is_none()
}

/// The fold as bytes that say what they are: for a snapshot, and for a process that keeps its last fold on its disk.
pub(crate) fn encode(state: &State) -> Result<Vec<u8>, serde_json::Error> {
    let sha256 = Sha256::of(&serde_json::to_vec(state)?);
    serde_json::to_vec(&Snapshot { format: FORMAT, fold: FOLD, number: state.head, sha256, state: state.clone() })
}

/// The fold in such bytes, or why they hold none that this build could use.
pub(crate) fn decode(bytes: &[u8]) -> Result<State, String> {
    let snapshot: Snapshot = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let state = snapshot.state;
    if snapshot.format != FORMAT || snapshot.fold != FOLD || snapshot.number != state.head {
        return Err("it is not a snapshot of this number by this fold".to_owned());
    }
    match serde_json::to_vec(&state) {
        Ok(bytes) if Sha256::of(&bytes) == snapshot.sha256 => Ok(state),
        Ok(_) => Err("its digest does not hold".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the log has the very entry that the fold ends with.
pub(crate) async fn is_of(log: &ControlLog, state: &State) -> Result<bool, LogError> {
    if state.head == EntryNumber::NONE {
        return Ok(true);
    }
    let entry = log.read(state.head).await?;
    Ok(entry.is_some_and(|entry| Some(&entry.id) == state.head_id.as_ref()))
}

/// Writes the snapshot. Everybody who folds past its number writes the same bytes, so overwriting does no harm and mends a
/// damaged one.
pub(crate) async fn write(log: &ControlLog, state: &State) -> Result<(), LogError> {
    let path = path(log, state.head);
    let corrupt = |error: serde_json::Error| LogError::Corrupt { object: path.clone(), reason: error.to_string() };
    let bytes = encode(state).map_err(corrupt)?;
    if bytes.len() as u64 > SNAPSHOT_BYTES_MAX {
        let (kind, bytes) = ("snapshot".to_owned(), bytes.len() as u64);
        return Err(LogError::TooLarge { kind, bytes, limit: SNAPSHOT_BYTES_MAX });
    }
    match log.store().put(&path, bytes.into()).await {
        Ok(_) => Ok(()),
        Err(source) => Err(LogError::Store { operation: "write snapshot", object: path, source: Box::new(source) }),
    }
}

/// The newest usable snapshot's state; the empty state when there is none.
pub(crate) async fn load(log: &ControlLog) -> Result<State, LogError> {
    let folder = folder(log);
    let objects: Vec<Path> =
        log.store().list(Some(&folder)).map_ok(|object| object.location).try_collect().await.map_err(|source| {
            LogError::Store { operation: "list", object: folder.clone(), source: Box::new(source) }
        })?;
    let mut numbers: Vec<EntryNumber> = objects.iter().filter_map(number_of).collect();
    numbers.sort_unstable();
    for number in numbers.into_iter().rev().take(TRIES_MAX) {
        match load_one(log, number).await? {
            Ok(state) => return Ok(state),
            Err(reason) => tracing::warn!(object = %path(log, number), reason, "ignoring a control log snapshot"),
        }
    }
    Ok(State::default())
}

async fn load_one(log: &ControlLog, number: EntryNumber) -> Result<Result<State, String>, LogError> {
    let path = path(log, number);
    let bytes = match get_bounded(log.store().as_ref(), &path, SNAPSHOT_BYTES_MAX).await {
        Ok(Fetched::Bytes(bytes)) => bytes,
        Ok(Fetched::Absent) => return Ok(Err("it is gone".to_owned())),
        Ok(Fetched::TooLarge(bytes)) => return Ok(Err(format!("it has {bytes} bytes"))),
        Err(source) => {
            return Err(LogError::Store { operation: "read snapshot", object: path, source: Box::new(source) });
        }
    };
    let state = match decode(&bytes) {
        Ok(state) if state.head == number => state,
        Ok(_) => return Ok(Err("it is not a snapshot of this number by this fold".to_owned())),
        Err(reason) => return Ok(Err(reason)),
    };
    // A store restored from an older backup, or a folder copied into another, has snapshots of entries it does not have.
    if is_of(log, &state).await? { Ok(Ok(state)) } else { Ok(Err("the log beside it has no such entry".to_owned())) }
}

fn folder(log: &ControlLog) -> Path {
    log.folder().clone().join("snapshots")
}

/// The fold's version is part of the name: builds of two versions, side by side during an upgrade, keep their own.
fn path(log: &ControlLog, number: EntryNumber) -> Path {
    folder(log).join(format!("{:020}-f{FOLD}.json", number.0))
}

fn number_of(location: &Path) -> Option<EntryNumber> {
    let digits = location.filename()?.strip_suffix(".json")?.strip_suffix(&format!("-f{FOLD}"))?;
    if digits.len() != 20 { None } else { digits.parse().ok().map(EntryNumber) }
}

#[cfg(test)]
mod tests;
