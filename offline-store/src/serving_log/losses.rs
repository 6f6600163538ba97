//! What became of all rows that a gateway was offered for its log, minute by minute.

use std::collections::BTreeMap;

use chrono::NaiveDate;
use feature_defs::time::Micros;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::{FORMAT, Place, ServingLogError};

const PREFIX: &str = "losses-";
const EXTENSION: &str = ".json";
const MINUTE: Micros = 60_000_000;

/// One gateway's account of one service and day. It is written anew with every flush, so that of a gateway that was killed,
/// what came after `flushed` is not in here: at most `flush_seconds` of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    pub format: u32,
    pub gateway: String,
    pub incarnation: String,
    pub service: String,
    pub day: NaiveDate,
    pub flush_seconds: f64,
    /// Up to when everything is in here; the server's clock.
    pub flushed: Micros,
    /// It was shut down in good order: nothing came after.
    pub ended: bool,
    /// By minutes since 1970.
    pub minutes: BTreeMap<i64, Minute>,
}

/// Counts of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Minute {
    /// Answered, and looked at.
    pub offered: u64,
    /// Chosen to be logged: the sum of what follows but for `fallbacks_over`.
    pub chosen: u64,
    /// Written to disk, for the object store.
    pub written: u64,
    /// Had a fallback and no other reason to be logged, and there were more of them than the declared rate.
    #[serde(default)]
    pub fallbacks_over: u64,
    /// Answered, but too many answers waited to be looked at: these are not part of `offered`.
    #[serde(default)]
    pub dropped_queue: u64,
    /// Chosen, but too much waited to be encoded.
    #[serde(default)]
    pub dropped_buffer: u64,
    /// Chosen, but this machine's disk held as much as it may, or failed.
    #[serde(default)]
    pub dropped_spool: u64,
}

impl Minute {
    pub fn of(time: Micros) -> i64 {
        time.div_euclid(MINUTE)
    }

    pub fn lost(&self) -> u64 {
        self.dropped_queue + self.dropped_buffer + self.dropped_spool
    }

    pub fn add(&mut self, other: &Minute) {
        self.offered += other.offered;
        self.chosen += other.chosen;
        self.written += other.written;
        self.fallbacks_over += other.fallbacks_over;
        self.dropped_queue += other.dropped_queue;
        self.dropped_buffer += other.dropped_buffer;
        self.dropped_spool += other.dropped_spool;
    }
}

impl Losses {
    pub fn path(&self, project: &Path) -> Path {
        Place { service: self.service.clone(), day: self.day }.folder(project).join(self.name())
    }

    pub fn name(&self) -> String {
        format!("{PREFIX}{}{EXTENSION}", self.incarnation)
    }

    pub fn total(&self) -> Minute {
        let mut total = Minute::default();
        self.minutes.values().for_each(|minute| total.add(minute));
        total
    }
}

pub(super) fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(EXTENSION)
}

pub(super) fn decode(path: &str, bytes: &[u8]) -> Result<Losses, ServingLogError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let damaged =
        |error: serde_json::Error| ServingLogError::Damaged { path: path.to_owned(), what: error.to_string() };
    let Versioned { format } = serde_json::from_slice(bytes).map_err(damaged)?;
    if format > FORMAT {
        return Err(ServingLogError::Newer { path: path.to_owned(), found: format });
    }
    serde_json::from_slice(bytes).map_err(damaged)
}
