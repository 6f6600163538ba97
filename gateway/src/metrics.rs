//! What the process counts, in the text format that Prometheus reads.
//!
//! Label values are names from definitions and from this crate, never from requests, so that no client can make the
//! number of series grow.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use feature_defs::plan::ServicePlan;
use feature_defs::time::Status;
use online_store::StoreError;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::features::Features;
use crate::follow::Served;
use crate::predict::Predicted;

/// From 100 microseconds, a store in the process, to 13 seconds, beyond every deadline; each bucket twice the last.
const SECONDS_BUCKETS: [f64; 18] = [
    0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032, 0.0064, 0.0128, 0.0256, 0.0512, 0.1024, 0.2048, 0.4096, 0.8192,
    1.6384, 3.2768, 6.5536, 13.1072,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    /// Of a model or service; empty for other calls.
    of: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: String,
    of: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Value {
    service: String,
    feature: String,
    status: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelRows {
    model: String,
    version: u32,
    status: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelCount {
    model: String,
    version: u32,
    what: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct What {
    what: String,
}

/// Every metric of the process. Cheap to clone handles inside; one per process.
pub struct Metrics {
    registry: Registry,
    calls: Family<Call, Counter>,
    seconds: Family<Method, Histogram, fn() -> Histogram>,
    values: Family<Value, Counter>,
    rows: Family<ModelRows, Counter>,
    forward_seconds: Family<What, Histogram, fn() -> Histogram>,
    models: Family<ModelCount, Gauge>,
    store_errors: Family<What, Counter>,
    events: Family<What, Counter>,
    control_log_age: Gauge<f64, AtomicU64>,
    control_log_head: Gauge,
    follow_failures: Counter,
    ready: Gauge,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS_BUCKETS)
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    pub fn new() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("coeval"),
            calls: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            values: Family::default(),
            rows: Family::default(),
            forward_seconds: Family::new_with_constructor(seconds),
            models: Family::default(),
            store_errors: Family::default(),
            events: Family::default(),
            control_log_age: Gauge::default(),
            control_log_head: Gauge::default(),
            follow_failures: Counter::default(),
            ready: Gauge::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("calls", "Calls answered, by method and code", metrics.calls.clone());
        registry.register("call_seconds", "How long calls took", metrics.seconds.clone());
        registry.register("feature_values", "Feature values served, by status", metrics.values.clone());
        registry.register("predicted_rows", "Rows predicted, by outcome", metrics.rows.clone());
        registry.register("forward_seconds", "Time in the model per request", metrics.forward_seconds.clone());
        registry.register("model", "State and counters of the models served", metrics.models.clone());
        registry.register(
            "online_store_errors",
            "Reads that the online store did not answer",
            metrics.store_errors.clone(),
        );
        registry.register("events", "Events pushed, by what became of them", metrics.events.clone());
        registry.register(
            "control_log_age_seconds",
            "Since the control log was last read",
            metrics.control_log_age.clone(),
        );
        registry.register("control_log_head", "The entry that is served", metrics.control_log_head.clone());
        registry.register(
            "follow_failures",
            "Entries that could not be served as they say",
            metrics.follow_failures.clone(),
        );
        registry.register("ready", "1 when the process wants traffic", metrics.ready.clone());
        metrics
    }

    pub fn call(&self, method: &str, of: &str, code: &str, took: Duration) {
        let call = Call { method: method.to_owned(), of: of.to_owned(), code: code.to_owned() };
        self.calls.get_or_create(&call).inc();
        let method = Method { method: method.to_owned(), of: of.to_owned() };
        self.seconds.get_or_create(&method).observe(took.as_secs_f64());
    }

    pub fn features(&self, service: &ServicePlan, features: &Features) {
        if let Some(error) = &features.fetched.store_error {
            let what = match error {
                StoreError::Unreachable { .. } => "unreachable",
                StoreError::Timeout { .. } => "timeout",
                StoreError::Refused { .. } => "refused",
                StoreError::Corrupt { .. } => "corrupt",
                StoreError::Fenced { .. } => "fenced",
                StoreError::Disk { .. } => "disk",
            };
            self.store_errors.get_or_create(&What { what: what.to_owned() }).inc();
        }
        for (output, statuses) in service.outputs.iter().zip(&features.assembled.statuses) {
            let mut counts = [0u64; 6];
            statuses.iter().for_each(|status| counts[*status as usize] += 1);
            for (number, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
                let status = Status::from_number(number as u8).map_or_else(String::new, |status| status.to_string());
                let value = Value { service: service.name.to_string(), feature: output.name.clone(), status };
                self.values.get_or_create(&value).inc_by(count);
            }
        }
    }

    pub fn predicted(&self, model: &str, version: u32, predicted: &Predicted) {
        for row in &predicted.rows {
            let labels = ModelRows { model: model.to_owned(), version, status: row.status.name().to_owned() };
            self.rows.get_or_create(&labels).inc();
        }
        let model = What { what: model.to_owned() };
        self.forward_seconds.get_or_create(&model).observe(predicted.forward_time.as_secs_f64());
    }

    pub fn events(&self, what: &str, count: u64) {
        self.events.get_or_create(&What { what: what.to_owned() }).inc_by(count);
    }

    pub fn follow_failed(&self) {
        self.follow_failures.inc();
    }

    /// Everything as text. What is a state rather than a count is read now.
    pub fn encode(&self, served: &Served, control_log_age: Duration, ready: bool) -> String {
        self.control_log_age.set(control_log_age.as_secs_f64());
        self.control_log_head.set(i64::try_from(served.head.0).unwrap_or(i64::MAX));
        self.ready.set(i64::from(ready));
        self.models.clear();
        for model in served.models.values() {
            let snapshot = model.server.metrics();
            let counts = [
                ("queue_rows", snapshot.queue_rows),
                ("executors_ready", snapshot.executors_ready),
                ("requests", snapshot.requests),
                ("rows", snapshot.rows),
                ("padding_rows", snapshot.padding_rows),
                ("batches", snapshot.batches),
                ("rejected", snapshot.rejected),
                ("expired", snapshot.expired),
                ("cancelled", snapshot.cancelled),
                ("failures", snapshot.failures),
                ("panics", snapshot.panics),
            ];
            for (what, count) in counts {
                let labels =
                    ModelCount { model: model.name.to_string(), version: model.version, what: what.to_owned() };
                self.models.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        let mut text = String::new();
        // Writing to a string cannot fail, and the encoder has no other way to.
        if let Err(error) = text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "the metrics could not be written");
        }
        text
    }
}
