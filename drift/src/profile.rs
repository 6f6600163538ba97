//! The profile of a feature: frozen bins, and what training looked like in them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::counts::{Counts, FORMAT, check_format};
use crate::layout::Layout;

/// What every dataset carries for each feature and model output. Serving counts over the same layout.
///
/// As JSON, with counts below 10^8, numbers take at most 40 kB, a dictionary of 254 categories 400 kB, a vector 40 kB for each of its numbers and
/// 14 bytes for each component; a test measures usual ones (9 kB for a number).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Profile {
    layout: Arc<Layout>,
    reference: Counts,
}

impl Profile {
    /// None where the counts are over other bins.
    pub fn new(layout: Arc<Layout>, reference: Counts) -> Option<Profile> {
        reference.fits(&layout).then_some(Profile { layout, reference })
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What training looked like.
    pub fn reference(&self) -> &Counts {
        &self.reference
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    layout: Layout,
    reference: Counts,
}

impl From<Profile> for Stored {
    fn from(profile: Profile) -> Stored {
        Stored { format: FORMAT, layout: Arc::unwrap_or_clone(profile.layout), reference: profile.reference }
    }
}

impl TryFrom<Stored> for Profile {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Profile, String> {
        check_format(stored.format)?;
        Profile::new(Arc::new(stored.layout), stored.reference)
            .ok_or_else(|| "the counts of a profile are not over its bins".into())
    }
}
