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
