//! What is told of flags. Names of flags and variants are the control log's, never a request's.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use registry::flags::{Evaluation, Flag, Reason};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Evaluated {
    /// Empty for a flag that does not exist.
    flag: String,
    /// Empty after an error.
    variant: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, Default)]
pub struct FlagMetrics {
    evaluations: Family<Evaluated, Counter>,
    exposures: Counter,
    lost: Family<Cause, Counter>,
    flushes: Family<Outcome, Counter>,
}

/// The counters of one flag, each found once: looking for a series costs more than an evaluation.
pub(super) struct FlagCounts {
    variants: BTreeMap<String, [OnceLock<Counter>; Reason::ALL.len()]>,
}

impl FlagCounts {
    pub(super) fn new(flag: &Flag) -> FlagCounts {
        let names = flag.variants.keys().map(String::as_str).chain([""]);
        FlagCounts { variants: names.map(|name| (name.to_owned(), Default::default())).collect() }
    }
}

impl FlagMetrics {
    pub fn register(&self, registry: &mut Registry) {
        let help = "Evaluations of feature flags, by variant and reason";
        registry.register("flag_evaluations", help, self.evaluations.clone());
        let help = "Evaluations by a split that were taken into the log of exposures";
        registry.register("flag_exposures", help, self.exposures.clone());
        let help = "Evaluations by a split that are missing from the log of exposures, by cause";
        registry.register("flag_exposures_lost", help, self.lost.clone());
        let help = "Writes of exposures to the object store, by outcome";
        registry.register("flag_exposure_flushes", help, self.flushes.clone());
    }

    pub(super) fn evaluated(&self, flag: &str, counts: Option<&FlagCounts>, evaluation: &Evaluation<'_>) {
        let variant = evaluation.variant.unwrap_or_default();
        let series = |flag: &str| {
            let labels =
                Evaluated { flag: flag.to_owned(), variant: variant.to_owned(), reason: evaluation.reason.name() };
            self.evaluations.get_or_create(&labels).clone()
        };
        let counter = counts.and_then(|counts| counts.variants.get(variant)?.get(evaluation.reason as usize));
        match counter {
            Some(counter) => counter.get_or_init(|| series(flag)).inc(),
            None => series("").inc(),
        };
    }

    /// Of a flag that was removed.
    pub(super) fn forget(&self, flag: &Flag) {
        for variant in flag.variants.keys().map(String::as_str).chain([""]) {
            for reason in Reason::ALL {
                let (flag, variant) = (flag.name.to_string(), variant.to_owned());
                self.evaluations.remove(&Evaluated { flag, variant, reason: reason.name() });
            }
        }
    }

    pub(super) fn exposed(&self, units: u64) {
        self.exposures.inc_by(units);
    }

    pub(super) fn lost(&self, cause: &'static str, units: u64) {
        self.lost.get_or_create(&Cause { cause }).inc_by(units);
    }

    pub(super) fn flushed(&self, outcome: &'static str) {
        self.flushes.get_or_create(&Outcome { outcome }).inc();
    }
}
