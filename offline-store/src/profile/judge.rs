//! Counts held against profiles: the verdict, and histograms of both for people.

use std::collections::BTreeMap;

use drift::DriftError;
use drift::counts::Counts;
use drift::verdict::{Feature, Policy, Report, judge};
use serde::{Deserialize, Serialize};

use super::FeatureProfile;

/// A feature, and what was counted of it; None where nothing could be.
pub type Pair<'a> = (&'a FeatureProfile, Option<&'a Counts>);

/// Judges what was counted. Features of which nothing could be counted are left out, by name.
pub fn judged(
    policy: &Policy,
    pairs: &[Pair<'_>],
    importances: &BTreeMap<String, f64>,
) -> Result<(Report, Vec<String>), DriftError> {
    let mut features = Vec::with_capacity(pairs.len());
    let mut left_out = Vec::new();
    for (feature, counts) in pairs {
        match counts.filter(|counts| counts.fits(feature.profile.layout())) {
            Some(serving) => features.push(Feature {
                name: &feature.name,
                importance: importances.get(&feature.name).copied(),
                profile: &feature.profile,
                serving,
            }),
            None => left_out.push(feature.name.clone()),
        }
    }
    Ok((judge(policy, &features)?, left_out))
}

/// Two distributions over the same bins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    pub feature: String,
    /// Of a vector: which of its numbers.
    pub part: Option<String>,
    pub reference_rows: u64,
    pub rows: u64,
    pub bins: Vec<Bin>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    pub label: String,
    /// Shares of the rows that have a value.
    pub reference: f64,
    pub share: f64,
}

/// What both sides look like; bins that neither has anything in are left out at the ends.
pub fn histograms(feature: &FeatureProfile, counts: &Counts) -> Vec<Histogram> {
    let layout = feature.profile.layout();
    if !counts.fits(layout) {
        return Vec::new();
    }
    let parts = feature.profile.reference().parts().iter().zip(counts.parts()).enumerate();
    let histogram = parts.map(|(index, (reference, serving))| {
        let (reference, serving) = (reference.totals(), serving.totals());
        let (reference_rows, rows) = (reference.iter().sum::<u64>(), serving.iter().sum::<u64>());
        let share = |count: u64, rows: u64| if rows == 0 { 0.0 } else { count as f64 / rows as f64 };
        let bins = reference.iter().zip(&serving).enumerate().map(|(bin, (reference, serving))| Bin {
            label: layout.label(index, bin),
            reference: share(*reference, reference_rows),
            share: share(*serving, rows),
        });
        let mut bins: Vec<Bin> = bins.collect();
        let is_empty = |bin: &Bin| bin.reference == 0.0 && bin.share == 0.0;
        while bins.last().is_some_and(is_empty) {
            bins.pop();
        }
        let empty = bins.iter().take_while(|bin| is_empty(bin)).count();
        bins.drain(..empty);
        Histogram { feature: feature.name.clone(), part: layout.part_name(index), reference_rows, rows, bins }
    });
    histogram.collect()
}
