//! Profiles of training sets: for every feature, frozen bins and what training looked like in them, by blocks of rows that
//! are not independent. `drift` says what they are made of; here they meet Arrow, services and stored datasets.
//!
//! A dataset is profiled while it is written, and its bins are counted over once more when all rows are there, so that what
//! drift is compared with is exact. Blocks and flags (what was filled in by a default, what was stale) cannot be told from
//! the features, so they lie beside them in columns that readers do not see; whoever counts the dataset again, for `forget`
//! or to compare it with another, needs them.

pub mod blocks;
pub mod column;
pub mod flags;

pub mod hidden;

mod build;
mod count;
mod judge;

use drift::counts::{Counts, Outcome};
use drift::profile::Profile;
use feature_defs::time::Micros;
use feature_defs::value::Type;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

pub use build::{Collector, ProfiledColumn, Recount};
pub use count::{Counted, count};
pub use judge::{Bin, Histogram, Pair, histograms, judged};

/// Version of stored profiles.
pub const FORMAT: u32 = 1;

/// The largest file of profiles that is read: ten thousand numbers take a third of it.
pub const BYTES_MAX: u64 = 256 << 20;

/// A hidden column of a dataset: the bucket of each row's block.
pub const BLOCK: &str = "__block:";
/// A hidden column of a dataset: the flags of a feature's values.
pub const FLAGS: &str = "__flags:";

/// The profiles of the features of one dataset, or of the outputs of a model on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profiles {
    pub format: u32,
    pub service: String,
    pub service_digest: String,
    pub rows: u64,
    /// Between which times the rows lie; none where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Micros>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Micros>,
    /// Whether all rows were counted, or a sample of them.
    pub exact: bool,
    pub features: Vec<FeatureProfile>,
}

/// The profile of a feature, or of an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureProfile {
    pub name: String,
    #[serde(rename = "type")]
    pub value_type: Type,
    /// The blocks that it was counted by, and is to be counted by; see [`blocks`].
    pub blocks: String,
    pub profile: Profile,
}

impl Profiles {
    pub fn feature(&self, name: &str) -> Option<&FeatureProfile> {
        self.features.iter().find(|feature| feature.name == name)
    }

    /// What they say, for people: bins with labels in place of edges.
    pub fn describe(&self) -> Json {
        let features = self.features.iter().map(|feature| (feature.name.clone(), feature.describe()));
        json!({
            "service": self.service,
            "rows": self.rows,
            "exact": self.exact,
            "features": features.collect::<serde_json::Map<_, _>>(),
        })
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        // Numbers, texts and lists: nothing that JSON could not say.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What is wrong with the bytes, if anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Profiles, String> {
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let Versioned { format } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if format != FORMAT {
            return Err(format!("it has format {format}, this version reads {FORMAT}"));
        }
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }
}

impl FeatureProfile {
    fn describe(&self) -> Json {
        let (layout, counts) = (self.profile.layout(), self.profile.reference());
        let outcomes = counts.outcomes();
        let parts = counts.parts().iter().enumerate().map(|(index, part)| {
            let bins = part.totals().into_iter().enumerate();
            let bins = bins.map(|(bin, rows)| json!({"bin": layout.label(index, bin), "rows": rows}));
            json!({
                "part": layout.part_name(index),
                "distinct": part.distinct.estimate(),
                "mean": part.moments.mean(),
                "deviation": part.moments.deviation(),
                "infinite": part.moments.infinite(),
                "bins": bins.collect::<Vec<_>>(),
            })
        });
        json!({
            "type": self.value_type.to_string(),
            "kind": layout.name(),
            "blocks": self.blocks,
            "rows": outcomes.rows(),
            "nulls": outcomes.total(Outcome::Null),
            "nans": outcomes.total(Outcome::NotANumber),
            "defaults": outcomes.total(Outcome::Defaulted),
            "stale": outcomes.total(Outcome::Stale),
            "fallbacks": outcomes.total(Outcome::Fallback),
            "parts": parts.collect::<Vec<_>>(),
        })
    }
}

/// Rows of counts that have a value, whatever it is.
pub fn values_of(counts: &Counts) -> u64 {
    counts.outcomes().total(Outcome::Value)
}

#[cfg(test)]
mod tests;
