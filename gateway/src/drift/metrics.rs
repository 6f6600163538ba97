//! What is told of drift.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use std::sync::atomic::AtomicU64;

/// Features that metrics name, over all versions and arms: the worst ones. `coeval drift show` names all.
const FEATURES_MAX: usize = 1_000;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Arm {
    model: String,
    version: u32,
    arm: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Uncounted {
    model: String,
    version: u32,
    arm: String,
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Feature {
    model: String,
    version: u32,
    arm: String,
    feature: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Flush {
    outcome: &'static str,
}

type Level = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, Default)]
pub struct DriftMetrics {
    rows: Family<Arm, Counter>,
    uncounted: Family<Uncounted, Counter>,
    flushes: Family<Flush, Counter>,
    lost: Counter,
    verdict: Family<Feature, Gauge>,
    effect: Family<Feature, Level>,
}

/// The verdict over one feature, for metrics.
pub(super) struct Told {
    pub model: String,
    pub version: u32,
    pub arm: String,
    pub feature: String,
    /// 0 stable, 1 insufficient data, 2 drift.
    pub verdict: i64,
    pub effect: f64,
}

impl DriftMetrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register("drift_counted_rows", "Predicted rows that were counted for drift", self.rows.clone());
        let help = "Predicted rows that were not counted for drift, by cause";
        registry.register("drift_uncounted_rows", help, self.uncounted.clone());
        let help = "Writes of counts for drift to the object store, by outcome";
        registry.register("drift_flushes", help, self.flushes.clone());
        let help = "Rows counted for drift whose counts were given up because the object store was away for too long";
        registry.register("drift_lost_rows", help, self.lost.clone());
        let help = "Verdict over the last whole window: 0 stable, 1 insufficient data, 2 drift";
        registry.register("drift_verdict", help, self.verdict.clone());
        let help = "Population stability index over the last whole window, without noise; of features beyond their noise floor";
        registry.register("drift_effect", help, self.effect.clone());
    }

    pub(super) fn counted(&self, model: &str, version: u32, arm: &str, rows: u64) {
        let arm = Arm { model: model.to_owned(), version, arm: arm.to_owned() };
        self.rows.get_or_create(&arm).inc_by(rows);
    }

    pub(super) fn uncounted(&self, model: &str, version: u32, arm: &str, cause: &'static str, rows: u64) {
        let of = Uncounted { model: model.to_owned(), version, arm: arm.to_owned(), cause };
        self.uncounted.get_or_create(&of).inc_by(rows);
    }

    pub(super) fn flushed(&self, outcome: &'static str) {
        self.flushes.get_or_create(&Flush { outcome }).inc();
    }

    pub(super) fn lost(&self, rows: u64) {
        self.lost.inc_by(rows);
    }

    /// Replaces the verdicts of the window before.
    pub(super) fn judged(&self, mut told: Vec<Told>) {
        told.sort_by(|a, b| b.verdict.cmp(&a.verdict).then(b.effect.total_cmp(&a.effect)));
        self.verdict.clear();
        self.effect.clear();
        for told in told.into_iter().take(FEATURES_MAX) {
            let Told { model, version, arm, feature, verdict, effect } = told;
            let of = Feature { model, version, arm, feature };
            self.verdict.get_or_create(&of).set(verdict);
            if effect > 0.0 {
                self.effect.get_or_create(&of).set(effect);
            }
        }
    }
}
