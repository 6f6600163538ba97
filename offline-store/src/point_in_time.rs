//! The point-in-time engine: for every spine row, what each view said at that row's time.
//!
//! A training set is one logical node ([`node::PitJoinNode`]) over the spine and the sources, planned to one execution plan
//! ([`exec::PitJoinExec`]). Nothing is pushed through it into a source that would change a match.
//!
//! The strategy is *spine scatter*: the spine is indexed by entity and sorted by time ([`index`]), and each source row is
//! put where it first counts. For as-of views that is one slot per row, the greatest wins, and answers are carried
//! forward ([`latest`]); for windows a row counts in a contiguous range of slots ([`windows`]). Sources are read once,
//! in whatever order they come, and are never sorted. Rows come back in the spine's order because they are kept by
//! ordinal, never by key text.

pub mod exec;
pub mod index;
pub mod latest;
pub mod node;
pub mod windows;

use std::sync::Arc;

use feature_defs::as_of::{Times, Visibility};
use feature_defs::catalog;
use feature_defs::plan::{ServicePlan, SourcePlan};
use feature_defs::time::{Micros, Position};

/// What the engine is asked to find.
#[derive(Debug)]
pub struct PitJoin {
    pub service: Arc<ServicePlan>,
    /// Sources in the order of the node's inputs after the spine; each once.
    pub sources: Vec<Arc<SourcePlan>>,
    /// Overrides what the sources declare.
    pub visibility: Option<catalog::Visibility>,
    /// The spine says per row and input which position was applied (see [`position_columns`]): only events up to it
    /// count.
    pub as_known: bool,
}

/// The order in which rows of a training set come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// As the spine's.
    #[default]
    Spine,
    /// As they are ready, each with its place in the spine in the column [`ORDINAL`].
    Any,
}

/// The column that says which spine row an answer belongs to, from 0, where rows come in any order.
pub const ORDINAL: &str = "__ordinal";

/// What a source's known-at rule did to one training set. A row is *hidden* when some spine row of its entity was late
/// enough for the row's event time, but not for the time from which the row may be seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceReport {
    pub source: String,
    /// Rows that were read.
    pub rows: u64,
    /// Rows hidden from at least one spine row; each is counted once, under the last of the reasons that hid it.
    pub hidden: u64,
    pub hidden_by_created_time: u64,
    pub hidden_by_delay: u64,
    pub hidden_by_every: u64,
    pub hidden_by_arrival: u64,
    /// False where `visibility: event_time` let them through: the numbers then say what would have been hidden.
    pub enforced: bool,
}

/// Name of the spine's time column.
pub const EVENT_TIMESTAMP: &str = "event_timestamp";

/// Spine columns that carry the position applied for an input: time (int64 microseconds) and sequence (uint64).
pub fn position_columns(alias: &str) -> (String, String) {
    (format!("__position_time:{alias}"), format!("__position_sequence:{alias}"))
}

impl PitJoin {
    /// Which rows of a source a spine row may see.
    pub(crate) fn rule(&self, source: &SourcePlan) -> catalog::Visibility {
        self.visibility.unwrap_or(source.visibility)
    }
}

/// The first time at which a row may be seen, whatever its event time.
fn visible_from(rule: catalog::Visibility, times: &Times) -> Micros {
    match rule {
        catalog::Visibility::Known => times.known_time,
        catalog::Visibility::EventTime => Micros::MIN,
        catalog::Visibility::Ingested => times.position.time,
    }
}

/// What a reader of one spine row may see, for the paths that ask row by row.
fn reader(rule: catalog::Visibility, applied: Option<Position>) -> Visibility {
    match (applied, rule) {
        (Some(position), rule) => Visibility::AsKnown(position, rule),
        (None, catalog::Visibility::Known) => Visibility::Known,
        (None, catalog::Visibility::EventTime) => Visibility::EventTime,
        (None, catalog::Visibility::Ingested) => Visibility::Ingested,
    }
}

#[cfg(test)]
mod tests;
