//! The point-in-time engine: for every spine row, what each view said at that row's time.
//!
//! A training set is one logical node ([`node::PitJoinNode`]) over the spine and the sources, planned to one execution plan
//! ([`exec::PitJoinExec`]). Nothing is pushed through it into a source that would change a match.
//!
//! The strategy is *spine scatter*: the spine is indexed by entity and sorted by time ([`index`]), and each source row is
//! put where it first counts. For as-of views that is one slot per row, the greatest wins, and answers are carried
//! forward ([`latest`]); for windows a row counts in a contiguous range of slots ([`windows`]). Sources are read in
//! whatever order they come, on all cores, and are never sorted as a whole; of Parquet files ([`files`]) only the columns
//! that decide are read first, and what the winners say afterwards ([`scan`]). A spine whose answers do not fit into
//! memory is worked on in slices, and events that do not fit are dealt into parts on disk ([`spill`]). Rows come back in
//! the spine's order because they are kept by ordinal, never by key text.

pub mod by_row;
pub mod exec;
pub mod files;
pub mod index;
pub mod latest;
pub mod node;
pub mod places;
pub mod scan;
pub mod spill;
pub mod windows;

use std::sync::{Arc, OnceLock};

use feature_defs::as_of::Visibility;
use feature_defs::catalog;
use feature_defs::plan::{ServicePlan, Slot, SourcePlan};
use feature_defs::time::Position;

/// What the engine is asked to find.
#[derive(Debug)]
pub struct PitJoin {
    pub service: Arc<ServicePlan>,
    /// The sources that the service's inputs read, each once.
    pub sources: Vec<Arc<SourcePlan>>,
    /// How each of them is read.
    pub reads: Vec<Read>,
    /// What of each input's answer the service reads.
    pub used: Vec<Used>,
    pub threads: usize,
    /// The bound of the pool that the engine's runs share.
    pub memory_bytes: usize,
    pub spill: spill::Spill,
    /// Filled when the last row has been answered.
    pub report: Arc<OnceLock<Vec<SourceReport>>>,
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
    /// Rows hidden from at least one spine row, under the last of the reasons that hid each. A row is counted for every
    /// input of the service that it was hidden from.
    pub hidden: u64,
    pub hidden_by_created_time: u64,
    pub hidden_by_delay: u64,
    pub hidden_by_every: u64,
    pub hidden_by_arrival: u64,
    /// False where `visibility: event_time` let them through: the numbers then say what would have been hidden.
    pub enforced: bool,
}

/// How the engine reads a source.
#[derive(Debug, Clone)]
pub enum Read {
    /// Parquet, row group by row group.
    Files(Arc<files::Files>),
    /// Any other format: the input of the node with this number. Its rows are written down as Parquet first.
    Plan(usize),
}

/// What a service reads of a view's answer, beside its status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Used {
    /// Features by number, ascending.
    pub features: Vec<usize>,
    pub event_time: bool,
}

impl Used {
    /// Of each input of a service.
    pub fn by(service: &ServicePlan) -> Vec<Used> {
        let mut used = vec![Used::default(); service.inputs.len()];
        let slots = service.outputs.iter().map(|output| output.slot);
        for slot in slots.chain(service.transforms.iter().flat_map(|transform| transform.reads.iter().copied())) {
            match slot {
                Slot::Feature { input, feature } => used[input].features.push(feature),
                Slot::EventTime { input } => used[input].event_time = true,
                Slot::At | Slot::Request(_) | Slot::Transform(_) => {}
            }
        }
        for used in &mut used {
            used.features.sort_unstable();
            used.features.dedup();
        }
        used
    }
}

/// Name of the spine's time column.
pub const EVENT_TIMESTAMP: &str = "event_timestamp";

/// Spine columns that carry the position applied for an input: time (int64 microseconds) and sequence (uint64).
pub fn position_columns(alias: &str) -> (String, String) {
    (format!("__position_time:{alias}"), format!("__position_sequence:{alias}"))
}

/// Beside [`position_columns`]: true where a reader had no answer for an input and said so. The row is UNAVAILABLE.
pub fn not_answered_column(alias: &str) -> String {
    format!("__not_answered:{alias}")
}

impl PitJoin {
    /// Inputs of the node beside the spine.
    pub(crate) fn plans(&self) -> usize {
        self.reads.iter().filter(|read| matches!(read, Read::Plan(_))).count()
    }

    /// Which rows of a source a spine row may see.
    pub(crate) fn rule(&self, source: &SourcePlan) -> catalog::Visibility {
        self.visibility.unwrap_or(source.visibility)
    }
}

/// What a reader that had applied so much may see.
fn reader(rule: catalog::Visibility, applied: Position) -> Visibility {
    Visibility::AsKnown(applied, rule)
}

#[cfg(test)]
mod tests;
