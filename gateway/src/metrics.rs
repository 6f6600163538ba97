//! What the process counts, in the text format that Prometheus reads.
//!
//! Label values are names from definitions and from this crate, never from requests, so that no client can make the
//! number of series grow.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use feature_defs::plan::ServicePlan;
use feature_defs::time::Status;
use inference::batch::{WaitReason, Waited};
use online_store::StoreError;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::audit::AuditMetrics;
use crate::drift::DriftMetrics;
use crate::features::{Features, inputs_of};
use crate::flags::FlagMetrics;
use crate::follow::Served;
use crate::memory::MemoryWatch;
use crate::predict::Predicted;
use crate::rollout::counting::RolloutMetrics;
use crate::serving_log::LogMetrics;

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
struct UnansweredRows {
    model: String,
    version: u32,
    cause: &'static str,
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelCount {
    model: String,
    version: u32,
    what: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GoldenCheck {
    model: String,
    version: u32,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelVersion {
    model: String,
    version: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelWait {
    model: String,
    version: u32,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct What {
    what: String,
}

/// Both empty for the process as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Growth {
    model: String,
    version: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Port {
    port: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Feature {
    service: String,
    feature: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct View {
    service: String,
    view: String,
}

/// What counts the values of one service. Looking up a series by its labels for every feature of every request would cost
/// more than reading the features, so the series are found once; each comes to be with its first value.
pub struct ServiceCounters {
    service: String,
    /// Of [`Metrics`], where the series come from.
    values: Family<Value, Counter>,
    outputs: Vec<OutputCounters>,
    /// Rows of which every value was PRESENT, and which the series of the features do not count yet. Nearly all rows are
    /// such, and adding them to the series of hundreds of features is as much work as reading them: it is left to whoever
    /// reads the metrics.
    present_rows: AtomicU64,
    /// By input of the service.
    ages: Vec<Histogram>,
    /// Calls of GetFeatures that were answered, and how long they took.
    answered: OnceLock<(Counter, Histogram)>,
}

struct OutputCounters {
    feature: String,
    /// By status number.
    statuses: [OnceLock<Counter>; 6],
    stale: OnceLock<Counter>,
    defaults: OnceLock<Counter>,
    /// Inputs of the service that the feature is made of.
    inputs: Vec<usize>,
}

impl ServiceCounters {
    fn count(&self, output: &OutputCounters, status: Status, count: u64) {
        let counter = output.statuses[status as usize].get_or_init(|| {
            let (service, feature) = (self.service.clone(), output.feature.clone());
            self.values.get_or_create(&Value { service, feature, status: status.to_string() }).clone()
        });
        counter.inc_by(count);
    }

    /// Brings the series up to date.
    fn settle(&self) {
        let rows = self.present_rows.swap(0, Ordering::Relaxed);
        if rows > 0 {
            self.outputs.iter().for_each(|output| self.count(output, Status::Present, rows));
        }
    }
}

impl Drop for ServiceCounters {
    fn drop(&mut self) {
        self.settle();
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Source {
    source: String,
}

/// From a millisecond to half a day: events come late by what lies before the push, which nothing here bounds.
const FRESHNESS_BUCKETS: [f64; 14] =
    [0.001, 0.004, 0.016, 0.032, 0.064, 0.256, 1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 8_192.0, 65_536.0];

/// How long events took to be visible online, by source. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Freshness {
    /// Since their event time.
    event: Family<Source, Histogram, fn() -> Histogram>,
    /// Since they arrived, or were due if that was later.
    push: Family<Source, Histogram, fn() -> Histogram>,
}

impl Default for Freshness {
    fn default() -> Freshness {
        let event = || Histogram::new(FRESHNESS_BUCKETS);
        Freshness { event: Family::new_with_constructor(event), push: Family::new_with_constructor(seconds) }
    }
}

impl Freshness {
    /// Events of a source became visible, so many seconds after their event time and after they arrived.
    pub fn observe(&self, source: &str, events: impl Iterator<Item = (f64, f64)>) {
        let source = Source { source: source.to_owned() };
        let (event, push) = (self.event.get_or_create(&source), self.push.get_or_create(&source));
        for (since_event, since_arrival) in events {
            event.observe(since_event);
            push.observe(since_arrival);
        }
    }
}

/// Every metric of the process. Cheap to clone handles inside; one per process.
pub struct Metrics {
    registry: Registry,
    pub flags: FlagMetrics,
    /// What is settled before the metrics are read.
    services: Mutex<Vec<Weak<ServiceCounters>>>,
    calls: Family<Call, Counter>,
    seconds: Family<Method, Histogram, fn() -> Histogram>,
    values: Family<Value, Counter>,
    stale_values: Family<Feature, Counter>,
    default_values: Family<Feature, Counter>,
    view_age: Family<View, Histogram, fn() -> Histogram>,
    rows: Family<ModelRows, Counter>,
    unanswered_rows: Family<UnansweredRows, Counter>,
    golden_checks: Family<GoldenCheck, Counter>,
    forward_seconds: Family<What, Histogram, fn() -> Histogram>,
    models: Family<ModelCount, Gauge>,
    queue_rows: Family<ModelVersion, Gauge>,
    estimated_wait: Family<ModelVersion, Gauge<f64, AtomicU64>>,
    batch_wait: Family<ModelWait, Gauge<f64, AtomicU64>>,
    batch_wait_reason: Family<ModelWait, Gauge>,
    memory: Family<What, Gauge>,
    memory_growth: Family<Growth, Gauge>,
    connections_refused: Family<Port, Counter>,
    store_errors: Family<What, Counter>,
    cache_reads: Family<What, Counter>,
    events: Family<What, Counter>,
    control_log_age: Gauge<f64, AtomicU64>,
    control_log_head: Gauge,
    follow_failures: Counter,
    ready: Gauge,
}

/// From a second to nearly a year: how old features are when they are served.
const AGE_BUCKETS: [f64; 13] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
];

fn ages() -> Histogram {
    Histogram::new(AGE_BUCKETS)
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
            flags: FlagMetrics::default(),
            services: Mutex::default(),
            calls: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            values: Family::default(),
            stale_values: Family::default(),
            default_values: Family::default(),
            view_age: Family::new_with_constructor(ages),
            rows: Family::default(),
            unanswered_rows: Family::default(),
            golden_checks: Family::default(),
            forward_seconds: Family::new_with_constructor(seconds),
            models: Family::default(),
            queue_rows: Family::default(),
            estimated_wait: Family::default(),
            batch_wait: Family::default(),
            batch_wait_reason: Family::default(),
            memory: Family::default(),
            memory_growth: Family::default(),
            connections_refused: Family::default(),
            store_errors: Family::default(),
            cache_reads: Family::default(),
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
        registry.register(
            "feature_stale_values",
            "Feature values served from rows older than the freshness of their view",
            metrics.stale_values.clone(),
        );
        registry.register(
            "feature_default_values",
            "Feature values served that are the declared default",
            metrics.default_values.clone(),
        );
        registry.register(
            "view_age_seconds",
            "Age of the oldest row of a view in each request that was served from it",
            metrics.view_age.clone(),
        );
        registry.register("predicted_rows", "Rows predicted, by outcome", metrics.rows.clone());
        registry.register(
            "unanswered_rows",
            "Rows that the model itself did not answer, by cause and by what became of them",
            metrics.unanswered_rows.clone(),
        );
        registry.register(
            "golden_checks",
            "Rounds in which a served model was asked for rows whose outputs are known",
            metrics.golden_checks.clone(),
        );
        registry.register("forward_seconds", "Time in the model per request", metrics.forward_seconds.clone());
        registry.register("model", "State and counters of the models served", metrics.models.clone());
        registry.register("queue_rows", "Rows that wait for a model", metrics.queue_rows.clone());
        metrics.flags.register(registry);
        registry.register(
            "estimated_wait_seconds",
            "How long a request of the first tier would wait for its model now",
            metrics.estimated_wait.clone(),
        );
        registry.register(
            "batch_wait_seconds",
            "What requests waited for in the queue of their model, summed up since it was loaded",
            metrics.batch_wait.clone(),
        );
        registry.register(
            "batch_wait_reason",
            "Requests that ran, by what they waited for longest in the queue of their model, since it was loaded",
            metrics.batch_wait_reason.clone(),
        );
        registry.register(
            "memory_bytes",
            "Memory: what there is, what the ledger has entered for models, what of the process is resident, and by how much \
             that is more than the ledger's",
            metrics.memory.clone(),
        );
        registry.register(
            "memory_growth_bytes",
            "By how much memory that nobody accounts for grew within ten minutes, while it grows: a leak",
            metrics.memory_growth.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections closed at once because the port held as many as it may",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "online_store_errors",
            "Reads that the online store did not answer",
            metrics.store_errors.clone(),
        );
        registry.register(
            "feature_cache_reads",
            "Reads of the online store answered from the cache in memory, or not",
            metrics.cache_reads.clone(),
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

    pub fn add_freshness(&mut self, freshness: &Freshness) {
        let registry = &mut self.registry;
        let help = "From the time of an event to when it can be read online";
        registry.register("event_freshness_seconds", help, freshness.event.clone());
        let help = "From when an event arrived, or was due if later, to when it can be read online";
        registry.register("push_visible_seconds", help, freshness.push.clone());
    }

    pub fn add_serving_log(&mut self, log: &LogMetrics) {
        log.register(&mut self.registry);
    }

    pub fn add_audit(&mut self, audit: &AuditMetrics) {
        audit.register(&mut self.registry);
    }

    pub fn add_rollouts(&mut self, rollouts: &RolloutMetrics) {
        rollouts.register(&mut self.registry);
    }

    pub fn add_drift(&mut self, drift: &DriftMetrics) {
        drift.register(&mut self.registry);
    }

    pub fn call(&self, method: &str, of: &str, code: &str, took: Duration) {
        let call = Call { method: method.to_owned(), of: of.to_owned(), code: code.to_owned() };
        self.calls.get_or_create(&call).inc();
        let method = Method { method: method.to_owned(), of: of.to_owned() };
        self.seconds.get_or_create(&method).observe(took.as_secs_f64());
    }

    /// A call of GetFeatures was answered: what [`Metrics::call`] counts, without looking for its series.
    pub fn answered(&self, service: &ServicePlan, counters: &ServiceCounters, took: Duration) {
        let (calls, seconds) = counters.answered.get_or_init(|| {
            let (method, of) = ("GetFeatures".to_owned(), service.name.to_string());
            let call = Call { method: method.clone(), of: of.clone(), code: "Ok".to_owned() };
            let calls = self.calls.get_or_create(&call).clone();
            (calls, self.seconds.get_or_create(&Method { method, of }).clone())
        });
        calls.inc();
        seconds.observe(took.as_secs_f64());
    }

    /// Reads that the cache in memory answered, or did not.
    pub fn cache_reads(&self, what: &str) -> Counter {
        self.cache_reads.get_or_create(&What { what: what.to_owned() }).clone()
    }

    /// Connections that a port refused.
    pub fn connections_refused(&self, port: &'static str) -> Counter {
        self.connections_refused.get_or_create(&Port { port }).clone()
    }

    /// Brings what is known of the memory up to date.
    pub fn remembered(&self, memory: &MemoryWatch) {
        let state = memory.state();
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let bytes = [
            ("capacity", signed(state.capacity)),
            ("reserved", signed(state.reserved)),
            ("resident", signed(state.resident)),
            ("unaccounted", state.unaccounted()),
        ];
        for (what, bytes) in bytes {
            self.memory.get_or_create(&What { what: what.to_owned() }).set(bytes);
        }
        self.memory_growth.clear();
        for (of, growing) in memory.growing() {
            let (model, version) = of.unwrap_or_default();
            self.memory_growth.get_or_create(&Growth { model, version }).set(signed(growing.by));
        }
    }

    /// The series of one service.
    pub fn service(&self, service: &ServicePlan) -> Arc<ServiceCounters> {
        let outputs = service.outputs.iter().map(|output| {
            let mut inputs = Vec::new();
            inputs_of(service, output.slot, &mut inputs);
            let feature = output.name.clone();
            OutputCounters {
                feature,
                statuses: Default::default(),
                stale: OnceLock::new(),
                defaults: OnceLock::new(),
                inputs,
            }
        });
        let ages = service.inputs.iter().map(|input| {
            let labels = View { service: service.name.to_string(), view: input.alias.clone() };
            self.view_age.get_or_create(&labels).clone()
        });
        let counters = Arc::new(ServiceCounters {
            service: service.name.to_string(),
            values: self.values.clone(),
            outputs: outputs.collect(),
            present_rows: AtomicU64::new(0),
            ages: ages.collect(),
            answered: OnceLock::new(),
        });
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        // As many live as services are kept ready; those that were dropped have settled.
        services.retain(|other| other.strong_count() > 0);
        services.push(Arc::downgrade(&counters));
        counters
    }

    pub fn features(&self, service: &ServicePlan, counters: &ServiceCounters, features: &Features) {
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
        for (input, age) in features.fetched.inputs.iter().zip(&counters.ages) {
            if let Some(age_max) = input.age_max {
                age.observe(age_max as f64 / 1e6);
            }
        }
        let assembled = &features.assembled;
        if !features.fetched.stale && are_present(&assembled.statuses) {
            counters.present_rows.fetch_add(features.fetched.at.len() as u64, Ordering::Relaxed);
            return;
        }
        for (index, (output, of_output)) in service.outputs.iter().zip(&counters.outputs).enumerate() {
            let mut counts = [0u64; 6];
            assembled.statuses[index].iter().for_each(|status| counts[*status as usize] += 1);
            for (number, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
                if let Some(status) = Status::from_number(number as u8) {
                    counters.count(of_output, status, count);
                }
            }
            let feature = || Feature { service: service.name.to_string(), feature: output.name.clone() };
            let stale = of_output.inputs.iter().map(|input| features.fetched.inputs[*input].stale_rows).max();
            if let Some(stale) = stale.filter(|stale| *stale > 0) {
                let counter = of_output.stale.get_or_init(|| self.stale_values.get_or_create(&feature()).clone());
                counter.inc_by(u64::from(stale));
            }
            if assembled.defaults[index] > 0 {
                let counter = of_output.defaults.get_or_init(|| self.default_values.get_or_create(&feature()).clone());
                counter.inc_by(u64::from(assembled.defaults[index]));
            }
        }
    }

    pub fn predicted(&self, model: &str, version: u32, predicted: &Predicted) {
        for row in &predicted.rows {
            let labels = ModelRows { model: model.to_owned(), version, status: row.status.name().to_owned() };
            self.rows.get_or_create(&labels).inc();
            if let Some(cause) = row.cause {
                let (model, cause, status) = (model.to_owned(), cause.name(), row.status.name());
                self.unanswered_rows.get_or_create(&UnansweredRows { model, version, cause, status }).inc();
            }
        }
        let model = What { what: model.to_owned() };
        self.forward_seconds.get_or_create(&model).observe(predicted.forward_time.as_secs_f64());
    }

    /// A round of checks has ended.
    pub fn golden_checked(&self, model: &str, version: u32, outcome: &'static str) {
        self.golden_checks.get_or_create(&GoldenCheck { model: model.to_owned(), version, outcome }).inc();
    }

    pub fn events(&self, what: &str, count: u64) {
        self.events.get_or_create(&What { what: what.to_owned() }).inc_by(count);
    }

    pub fn follow_failed(&self) {
        self.follow_failures.inc();
    }

    /// Everything as text. What is a state rather than a count is read now.
    pub fn encode(&self, served: &Served, control_log_age: Duration, ready: bool) -> String {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner).clone();
        services.iter().filter_map(Weak::upgrade).for_each(|counters| counters.settle());
        self.control_log_age.set(control_log_age.as_secs_f64());
        self.control_log_head.set(i64::try_from(served.head.0).unwrap_or(i64::MAX));
        self.ready.set(i64::from(ready));
        self.models.clear();
        self.queue_rows.clear();
        self.estimated_wait.clear();
        self.batch_wait.clear();
        self.batch_wait_reason.clear();
        for model in served.loaded() {
            let snapshot = model.server.metrics();
            let labels = ModelVersion { model: model.name.to_string(), version: model.version };
            self.queue_rows.get_or_create(&labels).set(i64::try_from(snapshot.queue_rows).unwrap_or(i64::MAX));
            self.estimated_wait.get_or_create(&labels).set(snapshot.estimated_wait.as_secs_f64());
            let Waited { whole, executor_busy, linger, memory_permit, tier } = snapshot.waited;
            let woken = whole.saturating_sub(executor_busy + linger + memory_permit + tier);
            let waits = [
                (WaitReason::None, woken),
                (WaitReason::ExecutorBusy, executor_busy),
                (WaitReason::Linger, linger),
                (WaitReason::MemoryPermit, memory_permit),
                (WaitReason::Tier, tier),
            ];
            for (reason, waited) in waits {
                let labels = ModelWait { model: model.name.to_string(), version: model.version, reason: reason.name() };
                self.batch_wait.get_or_create(&labels).set(waited.as_secs_f64());
            }
            for (reason, requests) in snapshot.wait_reasons {
                let labels = ModelWait { model: model.name.to_string(), version: model.version, reason: reason.name() };
                self.batch_wait_reason.get_or_create(&labels).set(i64::try_from(requests).unwrap_or(i64::MAX));
            }
            let counts = [
                ("queue_bytes", snapshot.queue_bytes),
                ("batch_rows_max", snapshot.rows_cap),
                ("memory_bytes", model.server.footprint().map_or(0, |footprint| footprint.bytes())),
                ("unbatched", u64::from(model.server.limits().rows_max() == 1 && model.plan.max_rows > 1)),
                ("executors_ready", snapshot.executors_ready),
                ("requests", snapshot.requests),
                ("rows", snapshot.rows),
                ("padding_rows", snapshot.padding_rows),
                ("batches", snapshot.batches),
                ("rejected", snapshot.rejected),
                ("expired", snapshot.expired),
                ("dropped", snapshot.dropped),
                ("cancelled", snapshot.cancelled),
                ("failures", snapshot.failures),
                ("panics", snapshot.panics),
                ("hangs", snapshot.hangs),
                ("breaker_open", u64::from(snapshot.breaker_open)),
                ("breaker_openings", snapshot.breaker_openings),
                ("out_of_memory", snapshot.out_of_memory),
            ];
            let kept = model.responses.as_ref().map(|responses| responses.metrics());
            let of_cache = kept.iter().flat_map(|kept| {
                [
                    ("response_cache_hits", kept.hits),
                    ("response_cache_misses", kept.misses),
                    ("response_cache_bytes", kept.bytes),
                    ("response_cache_entries", kept.entries),
                    ("response_cache_evictions", kept.evictions),
                    ("response_cache_expired", kept.expired),
                ]
            });
            let counts = counts.into_iter().chain(of_cache);
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

/// Whether every value is PRESENT. Most columns share their statuses, which are then looked at once. What is PRESENT is no
/// default.
fn are_present(statuses: &[Arc<[Status]>]) -> bool {
    let mut last: Option<&Arc<[Status]>> = None;
    statuses.iter().all(|statuses| {
        let is_known = last.replace(statuses).is_some_and(|last| Arc::ptr_eq(last, statuses));
        is_known || statuses.iter().all(|status| *status == Status::Present)
    })
}

#[cfg(test)]
mod freshness_tests {
    use super::*;

    #[test]
    fn freshness_is_a_histogram_by_source() {
        let (mut metrics, freshness) = (Metrics::new(), Freshness::default());
        metrics.add_freshness(&freshness);
        freshness.observe("sales", [(2.5, 0.003), (90.0, 0.02)].into_iter());
        let mut text = String::new();
        text::encode(&mut text, &metrics.registry).unwrap();
        for line in [
            "coeval_event_freshness_seconds_bucket{le=\"4.0\",source=\"sales\"} 1",
            "coeval_event_freshness_seconds_count{source=\"sales\"} 2",
            "coeval_push_visible_seconds_bucket{le=\"0.0032\",source=\"sales\"} 1",
            "coeval_push_visible_seconds_sum{source=\"sales\"} 0.023",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
    }
}
