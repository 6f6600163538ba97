//! The counts of one hour of one version, as one life of a gateway saw them, on the object store.
//!
//! `<project>/drift/<model>/<version>/<date>/<hour>/<gateway>-<incarnation>.bin`: eight bytes that say what it is, four of
//! the format, then JSON under zstd. Each flush replaces the object by one that says more, so nothing is ever counted twice.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use chrono::DateTime;
use drift::counts::Counts;
use feature_defs::time::{Micros, floor_to};
use feature_defs::window::{DAY, HOUR};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};

use super::Version;

pub const FORMAT: u32 = 1;
pub const FOLDER: &str = "drift";
const MAGIC: &[u8; 8] = b"coevdrft";
const ENDING: &str = ".bin";
/// Little is gained by more: most cells are zeros.
const LEVEL: i32 = 1;
/// Of an object, and of what is in it: ten thousand features of eight arms.
const OBJECT_BYTES_MAX: u64 = 64 << 20;
const TEXT_BYTES_MAX: u64 = 1 << 30;
/// Objects read at once.
const READS: usize = 4;
/// Hours of one window.
pub const HOURS_MAX: i64 = 31 * 24;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    pub format: u32,
    pub model: String,
    pub version: u32,
    /// When it begins, in microseconds.
    pub hour: Micros,
    pub gateway: String,
    pub incarnation: String,
    pub arms: BTreeMap<String, Arm>,
}

/// What was counted of the rows that one arm was given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    pub rows: u64,
    /// Rows that were answered and not counted, by cause.
    pub uncounted: BTreeMap<String, u64>,
    /// By feature of the service.
    pub features: BTreeMap<String, Counts>,
    /// By output of the model.
    pub outputs: BTreeMap<String, Counts>,
}

impl Snapshot {
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let text = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        let packed = zstd::bulk::compress(&text, LEVEL).map_err(|error| error.to_string())?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(packed);
        Ok(bytes)
    }

    /// What is wrong with the bytes, if anything.
    pub fn decode(bytes: &[u8]) -> Result<Snapshot, String> {
        let rest = bytes.strip_prefix(MAGIC).ok_or("it does not begin as counts do")?;
        let (format, packed) = rest.split_first_chunk::<4>().ok_or("it ends early")?;
        let format = u32::from_le_bytes(*format);
        if format != FORMAT {
            return Err(format!("it has format {format}, this version reads {FORMAT}"));
        }
        let decoder = zstd::stream::read::Decoder::new(packed).map_err(|error| error.to_string())?;
        let mut text = Vec::new();
        decoder.take(TEXT_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
        if text.len() as u64 > TEXT_BYTES_MAX {
            return Err("it holds more than any counts".to_owned());
        }
        serde_json::from_slice(&text).map_err(|error| error.to_string())
    }
}

impl Arm {
    /// Adds what another gateway, or another hour, counted of the same arm. What was counted over other bins stays apart:
    /// the side with more rows is kept.
    fn merge(&mut self, other: Arm) {
        self.rows += other.rows;
        for (cause, rows) in other.uncounted {
            *self.uncounted.entry(cause).or_default() += rows;
        }
        for (mine, theirs) in [(&mut self.features, other.features), (&mut self.outputs, other.outputs)] {
            for (name, counts) in theirs {
                match mine.get_mut(&name) {
                    Some(known) => {
                        if known.merge(&counts).is_err() && counts.outcomes().rows() > known.outcomes().rows() {
                            *known = counts;
                        }
                    }
                    None => {
                        mine.insert(name, counts);
                    }
                }
            }
        }
    }
}

/// The date of a time, in UTC.
pub fn date(time: Micros) -> String {
    DateTime::from_timestamp_micros(time).unwrap_or_default().format("%Y-%m-%d").to_string()
}

pub fn is_date(text: &str) -> bool {
    text.len() == 10 && chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").is_ok()
}

fn folder(root: &Path, version: &Version) -> Path {
    root.clone().join(FOLDER).join(&*version.0).join(version.1.to_string())
}

pub fn path(root: &Path, version: &Version, hour: Micros, gateway: &str, incarnation: &str) -> Path {
    let number = hour.rem_euclid(DAY) / HOUR;
    let folder = folder(root, version).join(date(hour)).join(format!("{number:02}"));
    folder.join(format!("{gateway}-{incarnation}{ENDING}"))
}

/// What a window of a version holds, over all gateways.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Window {
    pub arms: BTreeMap<String, Arm>,
    pub objects: usize,
    /// Objects that could not be read, and why.
    pub damaged: Vec<String>,
}

/// Reads the whole hours from `from` until `to`.
pub async fn read(
    store: &Arc<dyn ObjectStore>,
    root: &Path,
    version: &Version,
    from: Micros,
    to: Micros,
) -> object_store::Result<Window> {
    let folder = folder(root, version);
    let mut paths = Vec::new();
    let mut day = floor_to(from, DAY);
    while day < to {
        let of_day = folder.clone().join(date(day));
        let objects: Vec<_> = store.list(Some(&of_day)).try_collect().await?;
        for object in objects {
            let hour = object.location.parts().rev().nth(1).and_then(|part| part.as_ref().parse::<i64>().ok());
            let begins = hour.map(|hour| day.saturating_add(hour.saturating_mul(HOUR)));
            if begins.is_some_and(|begins| (from..to).contains(&begins)) && object.location.as_ref().ends_with(ENDING) {
                paths.push((object.location, object.size));
            }
        }
        day = day.saturating_add(DAY);
    }
    // In one order whoever asks, though addition would not mind.
    paths.sort();
    let mut window = Window { objects: paths.len(), ..Window::default() };
    let reads = futures::stream::iter(paths.into_iter().map(|(path, size)| {
        let store = store.clone();
        async move {
            if size > OBJECT_BYTES_MAX {
                return Ok((path, Err(format!("{size} bytes are no counts"))));
            }
            let bytes = match store.get(&path).await {
                Ok(found) => found.bytes().await?,
                // Removed since, because it was old.
                Err(object_store::Error::NotFound { .. }) => return Ok((path, Err("it is gone".to_owned()))),
                Err(error) => return Err(error),
            };
            let decoded = tokio::task::spawn_blocking(move || Snapshot::decode(&bytes)).await;
            Ok((path, decoded.unwrap_or_else(|error| Err(error.to_string()))))
        }
    }));
    let mut reads = reads.buffered(READS);
    while let Some((path, snapshot)) = reads.try_next().await? {
        match snapshot {
            Ok(snapshot) => {
                for (arm, counts) in snapshot.arms {
                    window.arms.entry(arm).or_default().merge(counts);
                }
            }
            Err(what) => window.damaged.push(format!("{path}: {what}")),
        }
    }
    Ok(window)
}
