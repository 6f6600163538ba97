//! From rows of entity keys to what the views of a service answer: one read of the online store for everything.
//!
//! The problem is to say only what is true. A row is answered at one time t; the store holds the present, which may be
//! ahead of a requested t, behind the clock, half backfilled, or away. Whatever cannot be said exactly at t is UNAVAILABLE
//! with its reason, and everything else is what the offline engine would have said for the same row at t.
//!
//! Time: without `at`, t is the later of the clock and the newest position read, so that nothing read lies in the future
//! of its answer. Which tiles a window needs depends on t, so in the rare case that a position is ahead of the clock the
//! windows are read once more for the later t.

mod asked;
mod judge;
mod reader;

use feature_defs::plan::ViewAnswer;
use feature_defs::time::{Micros, Position};
use online_store::{OnlineStore, StoreError};
use tokio::time::Instant;

use crate::request::Rows;
use crate::status::Failure;
use asked::{Asked, Missing};

pub use reader::ServiceReader;

/// Tiles that one request may read. The largest requests people send, 10,000 rows over five windowed views, take about a
/// million; a request beyond this would hold gigabytes.
const TILES_MAX: usize = 2_000_000;
/// How often windows are read again because what was read is newer than the time they were read for. Each time means that
/// events were applied in between; after the last, windows that are not exact say so.
const REREADS_MAX: usize = 2;

/// Why a value is UNAVAILABLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    Timeout,
    Backfilling,
    AtBeforeStore,
    StoreError,
    OfflineOnly,
}

/// The time rows are answered at.
#[derive(Debug, Clone)]
pub enum When {
    /// At this clock reading, or later if the store is ahead of it.
    Now(Micros),
    /// One time per row.
    At(Vec<Micros>),
}

/// What the inputs of a service answered.
#[derive(Debug)]
pub struct Fetched {
    pub inputs: Vec<FetchedInput>,
    /// The time of each row.
    pub at: Vec<Micros>,
    /// Some value is older than its view's freshness.
    pub stale: bool,
    /// What went wrong with the store, for metrics.
    pub store_error: Option<StoreError>,
}

#[derive(Debug)]
pub struct FetchedInput {
    pub answer: ViewAnswer,
    /// Of rows that are UNAVAILABLE.
    pub reasons: Vec<Option<Reason>>,
    /// The position applied for each row's entity.
    pub positions: Vec<Option<Position>>,
    /// The oldest of what is PRESENT: since its event, or since the applied position where the view is windowed.
    pub age_max: Option<Micros>,
    /// Rows older than the view's freshness.
    pub stale_rows: u32,
}

impl Fetched {
    pub fn answers(&self) -> impl Iterator<Item = &ViewAnswer> {
        self.inputs.iter().map(|input| &input.answer)
    }
}

/// Reads everything that a service needs for these rows. What the store has not answered by the deadline is UNAVAILABLE.
pub async fn fetch(
    reader: &ServiceReader,
    rows: &Rows,
    when: When,
    deadline: Instant,
    store: &dyn OnlineStore,
) -> Result<Fetched, Failure> {
    let mut asked = Asked::new(reader, rows);
    let mut at = match when {
        When::Now(clock) => vec![clock; rows.count],
        When::At(ref at) => at.clone(),
    };
    asked.name_tiles(&at)?;
    let mut found = asked.read(store, deadline).await;
    if let (When::Now(clock), Ok(answers)) = (&when, &mut found) {
        let mut t = *clock;
        for _ in 0..=REREADS_MAX {
            let newest = answers.newest();
            if newest <= t {
                break;
            }
            t = newest;
            at = vec![t; rows.count];
            if asked.name_tiles(&at)?
                && let Err(missing) = asked.reread(store, deadline, answers).await
            {
                found = Err(missing);
                break;
            }
        }
    }
    let (answers, store_error) = match found {
        Ok(answers) => (Ok(answers), None),
        Err(Missing { reason, error }) => (Err(reason), error),
    };
    let mut inputs = Vec::with_capacity(reader.service.inputs.len());
    for index in 0..reader.service.inputs.len() {
        inputs.push(asked.judge(index, &answers, &at)?);
    }
    let stale = inputs.iter().any(|input| input.stale_rows > 0);
    Ok(Fetched { inputs, at, stale, store_error })
}

#[cfg(test)]
mod tests;
