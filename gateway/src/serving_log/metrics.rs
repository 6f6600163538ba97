//! What is counted of the log.

use offline_store::serving_log::Minute;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rows {
    service: String,
    what: &'static str,
}

/// Cheap to clone; clones count together.
#[derive(Debug, Clone, Default)]
pub struct LogMetrics {
    rows: Family<Rows, Counter>,
    spool_bytes: Gauge,
    upload_failures: Counter,
}

impl LogMetrics {
    pub fn register(&self, registry: &mut Registry) {
        let help = "Answered rows, by what became of them for the serving log";
        registry.register("serving_log_rows", help, self.rows.clone());
        let help = "Of the serving log on this machine's disk, on the way to the object store";
        registry.register("serving_log_spool_bytes", help, self.spool_bytes.clone());
        let help = "Times that the object store did not take a file of the serving log";
        registry.register("serving_log_upload_failures", help, self.upload_failures.clone());
    }

    pub(super) fn count(&self, service: &str, counts: &Minute) {
        let all = [
            ("offered", counts.offered),
            ("chosen", counts.chosen),
            ("written", counts.written),
            ("fallbacks_over", counts.fallbacks_over),
            ("dropped_queue", counts.dropped_queue),
            ("dropped_buffer", counts.dropped_buffer),
            ("dropped_spool", counts.dropped_spool),
        ];
        for (what, count) in all.into_iter().filter(|(_, count)| *count > 0) {
            self.rows.get_or_create(&Rows { service: service.to_owned(), what }).inc_by(count);
        }
    }

    pub(super) fn spooled(&self, bytes: u64) {
        self.spool_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(super) fn upload_failed(&self) {
        self.upload_failures.inc();
    }
}
