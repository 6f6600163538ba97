//! Which unit was given which variant by a split: what an experiment with flags is analysed by.
//!
//! `<project>/exposures/<date>/<hour>/<gateway>-<life>-<number>.jsonl.zst`: JSON lines under zstd, one [`Line`] for each flag,
//! variant and unit that were seen since the object before, about every half minute, and no object where there was
//! nothing. Objects are never written again, so a window is whatever lies in its folders.
//!
//! No targeting key is ever written: a unit is `assignment::place` of its key with the project's key for sensitive data
//! (in hexadecimal) as salt, so that only who has that key can tell whose line it is.
//!
//! Evaluating never waits. What cannot be taken is dropped and counted: when too many units wait for the next flush, and
//! when objects wait for a store that has been away for so long that they fill their share of memory. A process that is killed loses
//! what it has not flushed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat};
use feature_defs::catalog::ServingLogSettings;
use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use registry::assignment::{KeyPart, place};
use registry::id::EntryNumber;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::metrics::FlagMetrics;
use crate::answer::{Clock, Gateway};
use crate::serving_log::hash_key;
use crate::status::chain;

const FOLDER: &str = "exposures";
const ENDING: &str = ".jsonl.zst";
/// Between flushes: what a kill can lose.
const FLUSH: Duration = Duration::from_secs(30);
/// How long a start waits for the key.
const KEY_WITHIN: Duration = Duration::from_secs(2);
const PUT_WITHIN: Duration = Duration::from_secs(20);
/// Flags, variants and units between two flushes: about 20 MB.
const WAITING_MAX: usize = 200_000;
/// Of objects that wait for the store, packed. A line takes about 20 bytes.
const UNSENT_BYTES_MAX: usize = 32 << 20;
/// Names and hashes repeat; more would take longer than it saves.
const LEVEL: i32 = 1;
const KEPT_DAYS: i64 = 90;
const SWEEP: Duration = Duration::from_secs(6 * 3_600);
/// Of one object, unpacked: far beyond what a flush can hold.
const OBJECT_BYTES_MAX: u64 = 256 << 20;
/// Of the objects that one question reads.
const READ_BYTES_MAX: u64 = 256 << 20;

/// Where exposures are kept.
pub struct ExposureParts {
    pub store: Arc<dyn ObjectStore>,
    /// The project's root on it.
    pub root: Path,
    /// The address of this gateway.
    pub gateway: String,
    /// Its key for sensitive data, where it names one.
    pub settings: Option<ServingLogSettings>,
    pub metrics: FlagMetrics,
}

/// What this gateway writes down.
pub struct Exposures {
    parts: ExposureParts,
    /// Of this life.
    life: String,
    /// What units are hashed with; there once the store has answered.
    salt: OnceLock<String>,
    state: Mutex<State>,
    flushing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<Key, Seen>,
    unsent: VecDeque<Object>,
    objects: u64,
    /// Since when the store does not take them, and why.
    failing: Option<(Instant, String)>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    flag: String,
    variant: String,
    entry: EntryNumber,
    unit: u64,
}

struct Seen {
    first: Micros,
    last: Micros,
    count: u64,
}

struct Object {
    path: Path,
    bytes: bytes::Bytes,
    evaluations: u64,
}

/// A unit that a split gave a variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub flag: String,
    pub variant: String,
    /// The entry of the control log that made the flag so.
    pub entry: u64,
    /// 16 hexadecimal digits.
    pub unit: String,
    /// RFC 3339: the first and the last time within the object.
    pub first: String,
    pub last: String,
    pub count: u64,
}

impl Exposures {
    pub fn new(parts: ExposureParts) -> Arc<Exposures> {
        let gateway = parts.gateway.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        Arc::new(Exposures {
            parts: ExposureParts { gateway, ..parts },
            life: Uuid::new_v4().simple().to_string()[..16].to_owned(),
            salt: OnceLock::new(),
            state: Mutex::default(),
            flushing: tokio::sync::Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what one unit was given: flags, variants, and what made the flags so.
    pub(super) fn exposed(&self, unit: &str, given: Vec<(String, String, EntryNumber)>, now: Micros) {
        let count = given.len() as u64;
        let Some(salt) = self.salt.get() else {
            return self.parts.metrics.lost("no_key", count);
        };
        let unit = place(salt, &[KeyPart::Text(unit)]).unit;
        let mut taken = 0;
        {
            let mut state = self.lock();
            for (flag, variant, entry) in given {
                let is_full = state.waiting.len() >= WAITING_MAX;
                let key = Key { flag, variant, entry, unit };
                match state.waiting.get_mut(&key) {
                    Some(seen) => {
                        seen.last = now;
                        seen.count += 1;
                    }
                    None if is_full => continue,
                    None => {
                        state.waiting.insert(key, Seen { first: now, last: now, count: 1 });
                    }
                }
                taken += 1;
            }
        }
        self.parts.metrics.exposed(taken);
        if taken < count {
            self.parts.metrics.lost("too_many_units", count - taken);
        }
    }

    /// What somebody should know.
    pub fn problem(&self) -> Option<String> {
        let state = self.lock();
        let (since, why) = state.failing.as_ref()?;
        let age = since.elapsed();
        let objects = state.unsent.len();
        (age > 2 * FLUSH).then(|| {
            format!(
                "exposures to flags were not written for {} s ({why}): {objects} objects wait in memory",
                age.as_secs()
            )
        })
    }

    /// Writes what has been seen since the last time, and what could not be written then.
    pub async fn flush(&self, now: Micros) -> Result<(), String> {
        let _flushing = self.flushing.lock().await;
        self.pack(now).await;
        loop {
            let next = self.lock().unsent.front().map(|object| (object.path.clone(), object.bytes.clone()));
            let Some((path, bytes)) = next else { break };
            // The same bytes at the same place, however often.
            let put = tokio::time::timeout(PUT_WITHIN, self.parts.store.put(&path, bytes.into())).await;
            let put = match put {
                Ok(put) => put.map(|_| ()).map_err(|error| chain(&error)),
                Err(_) => Err("the object store did not answer in time".to_owned()),
            };
            if let Err(why) = put {
                return Err(self.failed(why));
            }
            self.parts.metrics.flushed("written");
            self.lock().unsent.pop_front();
        }
        self.lock().failing = None;
        Ok(())
    }

    /// Makes an object of what waits.
    async fn pack(&self, now: Micros) {
        let (waiting, number) = {
            let mut state = self.lock();
            if state.waiting.is_empty() {
                return;
            }
            state.objects += 1;
            (std::mem::take(&mut state.waiting), state.objects)
        };
        let evaluations = waiting.values().map(|seen| seen.count).sum();
        let name = format!("{}-{}-{number}{ENDING}", self.parts.gateway, self.life);
        let path = hour(&self.parts.root, now).join(name);
        let packed = tokio::task::spawn_blocking(move || encode(waiting)).await;
        let bytes = match packed.map_err(|error| error.to_string()).and_then(|packed| packed) {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                tracing::error!(error, "exposures to flags could not be packed");
                return self.parts.metrics.lost("not_packed", evaluations);
            }
        };
        let mut state = self.lock();
        state.unsent.push_back(Object { path, bytes, evaluations });
        let mut held: usize = state.unsent.iter().map(|object| object.bytes.len()).sum();
        // The newest stays whatever its size: it may be the only one.
        while held > UNSENT_BYTES_MAX && state.unsent.len() > 1 {
            let Some(oldest) = state.unsent.pop_front() else { break };
            held -= oldest.bytes.len();
            self.parts.metrics.lost("store_away", oldest.evaluations);
        }
    }

    fn failed(&self, why: String) -> String {
        self.parts.metrics.flushed("failed");
        let mut state = self.lock();
        match &mut state.failing {
            Some((_, known)) => *known = why.clone(),
            none => {
                tracing::warn!(why, "exposures to flags cannot be written; they wait in memory");
                *none = Some((Instant::now(), why.clone()));
            }
        }
        why
    }

    /// What was written down of a flag, by all gateways.
    pub async fn report(&self, flag: &str, from: Micros, to: Micros) -> Result<Told, ReadError> {
        read(&self.parts.store, &self.parts.root, flag, from, to).await
    }

    /// The last flush of this life.
    pub async fn last(&self, within: Duration, now: Micros) {
        let why = match tokio::time::timeout(within, self.flush(now)).await {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => "the object store did not answer in time".to_owned(),
        };
        let state = self.lock();
        let units = state.waiting.values().map(|seen| seen.count).chain(state.unsent.iter().map(|of| of.evaluations));
        tracing::warn!(evaluations = units.sum::<u64>(), why, "the last exposures to flags are lost");
    }

    /// Learns the project's key; before that nothing can be written down.
    pub async fn learn_key(&self) -> Result<(), String> {
        if self.salt.get().is_none() {
            let ExposureParts { settings, store, root, .. } = &self.parts;
            let key = hash_key(settings.as_ref(), store, root).await.map_err(|error| chain(&error))?;
            let salt = key.iter().map(|byte| format!("{byte:02x}")).collect();
            // Somebody else may have been faster, with the same key.
            let _ = self.salt.set(salt);
        }
        Ok(())
    }

    async fn sweep(&self, now: Micros) -> object_store::Result<()> {
        let oldest = date(now.saturating_sub(KEPT_DAYS * DAY));
        let root = self.parts.root.clone().join(FOLDER);
        for day in self.parts.store.list_with_delimiter(Some(&root)).await?.common_prefixes {
            if !day.filename().is_some_and(|name| name.len() == oldest.len() && name < oldest.as_str()) {
                continue;
            }
            let objects: Vec<_> = self.parts.store.list(Some(&day)).try_collect().await?;
            for object in objects {
                match self.parts.store.delete(&object.location).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// Before anything is answered: what is asked first is written down too, unless the store takes its time.
pub async fn prepare(gateway: &Gateway) {
    if let Some(exposures) = &gateway.exposures
        && let Ok(Err(why)) = tokio::time::timeout(KEY_WITHIN, exposures.learn_key()).await
    {
        exposures.failed(why);
    }
}

/// Writes exposures down until it is dropped.
pub async fn run(gateway: &Gateway) {
    let Some(exposures) = &gateway.exposures else { return std::future::pending().await };
    tokio::join!(flush(exposures, &gateway.clock), sweep(exposures, &gateway.clock));
}

async fn flush(exposures: &Exposures, clock: &Clock) {
    loop {
        if let Err(why) = exposures.learn_key().await {
            exposures.failed(why);
        }
        tokio::time::sleep(FLUSH).await;
        // What went wrong is kept for `problem`, and tried again.
        let _ = exposures.flush(clock()).await;
    }
}

async fn sweep(exposures: &Exposures, clock: &Clock) {
    loop {
        if let Err(error) = exposures.sweep(clock()).await {
            tracing::warn!(%error, "old exposures to flags cannot be removed; tried again later");
        }
        tokio::time::sleep(SWEEP).await;
    }
}

fn date(time: Micros) -> String {
    DateTime::from_timestamp_micros(time).unwrap_or_default().format("%Y-%m-%d").to_string()
}

fn hour(root: &Path, time: Micros) -> Path {
    let number = time.rem_euclid(DAY) / HOUR;
    root.clone().join(FOLDER).join(date(time)).join(format!("{number:02}"))
}

fn encode(waiting: HashMap<Key, Seen>) -> Result<Vec<u8>, String> {
    let time = |time: Micros| {
        let time = DateTime::from_timestamp_micros(time).unwrap_or_default();
        time.to_rfc3339_opts(SecondsFormat::Millis, true)
    };
    let mut lines: Vec<Line> = waiting
        .into_iter()
        .map(|(Key { flag, variant, entry, unit }, Seen { first, last, count })| Line {
            flag,
            variant,
            entry: entry.0,
            unit: format!("{unit:016x}"),
            first: time(first),
            last: time(last),
            count,
        })
        .collect();
    // What is alike is packed together, and says nothing of the order in which units came.
    lines.sort_by(|a, b| (&a.flag, &a.variant, a.entry, &a.unit).cmp(&(&b.flag, &b.variant, b.entry, &b.unit)));
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, &line).map_err(|error| error.to_string())?;
        text.push(b'\n');
    }
    zstd::bulk::compress(&text, LEVEL).map_err(|error| error.to_string())
}

/// What was seen of one variant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Exposed {
    /// Different ones.
    pub units: u64,
    pub evaluations: u64,
}

/// What the log of exposures says of a flag.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Told {
    /// By the entry that made the flag so, then by variant.
    pub entries: BTreeMap<u64, BTreeMap<String, Exposed>>,
    /// Units that had more than one variant under one entry: the flag was asked with keys that are no units, or a build is
    /// wrong.
    pub torn_units: u64,
    pub objects: usize,
    /// Objects that could not be read, and why.
    pub damaged: Vec<String>,
}

/// Reads the exposures to a flag in the whole hours from `from` until `to`, over all gateways.
pub async fn read(
    store: &Arc<dyn ObjectStore>,
    root: &Path,
    flag: &str,
    from: Micros,
    to: Micros,
) -> Result<Told, ReadError> {
    if from >= to || to.saturating_sub(from) > KEPT_DAYS * DAY {
        return Err(ReadError::Time);
    }
    let mut objects = Vec::new();
    let mut at = from.div_euclid(HOUR) * HOUR;
    while at < to {
        // A day at once where it is asked for as a whole.
        let (folder, step) = match at.rem_euclid(DAY) == 0 && to.saturating_sub(at) >= DAY {
            true => (root.clone().join(FOLDER).join(date(at)), DAY),
            false => (hour(root, at), HOUR),
        };
        objects.extend(store.list(Some(&folder)).try_collect::<Vec<_>>().await?);
        at += step;
    }
    objects.retain(|object| object.location.as_ref().ends_with(ENDING));
    let bytes: u64 = objects.iter().map(|object| object.size).sum();
    if bytes > READ_BYTES_MAX {
        return Err(ReadError::TooMuch { bytes });
    }
    let mut told = Told { objects: objects.len(), ..Told::default() };
    // Hashes are spread evenly, so 16 bytes of them take a map far.
    let mut seen: HashMap<(u64, String), HashMap<u64, u64>> = HashMap::new();
    for object in objects {
        let bytes = match store.get(&object.location).await {
            Ok(found) => found.bytes().await?,
            Err(object_store::Error::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let flag = flag.to_owned();
        let lines = tokio::task::spawn_blocking(move || decode(&bytes, &flag)).await;
        match lines.map_err(|error| error.to_string()).and_then(|lines| lines) {
            Ok(lines) => {
                for (entry, variant, unit, count) in lines {
                    *seen.entry((entry, variant)).or_default().entry(unit).or_default() += count;
                }
            }
            Err(what) => told.damaged.push(format!("{}: {what}", object.location)),
        }
    }
    let mut of_entry: BTreeMap<u64, HashMap<u64, u32>> = BTreeMap::new();
    for ((entry, variant), units) in seen {
        let exposed = Exposed { units: units.len() as u64, evaluations: units.values().sum() };
        told.entries.entry(entry).or_default().insert(variant, exposed);
        let of_entry = of_entry.entry(entry).or_default();
        units.keys().for_each(|unit| *of_entry.entry(*unit).or_default() += 1);
    }
    told.torn_units = of_entry.values().flat_map(HashMap::values).filter(|variants| **variants > 1).count() as u64;
    Ok(told)
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the exposures of that time take {bytes} bytes; ask for a shorter time")]
    TooMuch { bytes: u64 },
    #[error("name a time that ends after it begins, and spans at most {KEPT_DAYS} days")]
    Time,
    #[error("the exposures cannot be read")]
    Store(#[from] object_store::Error),
}

/// The lines about a flag: entry, variant, unit and count.
fn decode(bytes: &[u8], flag: &str) -> Result<Vec<(u64, String, u64, u64)>, String> {
    use std::io::{BufRead, BufReader, Read};
    let decoder = zstd::stream::read::Decoder::new(bytes).map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for line in BufReader::new(decoder.take(OBJECT_BYTES_MAX)).lines() {
        let line = line.map_err(|error| error.to_string())?;
        let line: Line = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        if line.flag == flag {
            let unit = u64::from_str_radix(&line.unit, 16).map_err(|error| error.to_string())?;
            found.push((line.entry, line.variant, unit, line.count));
        }
    }
    Ok(found)
}
