//! The server audits what it served: each window of time once it is over, by replaying what the serving log has of it.
//!
//! Of several gateways one does a window: whoever puts the claim first. A claim that led to no report within a while was that
//! of a gateway that ended, and another may be put after it. Reports are JSON on the object store,
//! `<project>/audits/<service>/<start of the window>.json`.
//!
//! An audit must not be felt by requests: it runs on a thread of its own at the lowest priority, whose helpers inherit it,
//! and in chunks that keep little in memory at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat};
use feature_defs::catalog::AuditSettings;
use feature_defs::plan::Plan;
use feature_defs::time::{Micros, floor_to};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload};
use offline_store::Engine;
use offline_store::audit::report::{Outcome, Report};
use offline_store::audit::{AuditOptions, AuditRequest, Counts};
use offline_store::serving_log;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::answer::Gateway;
use crate::nice;
use crate::status::chain;

mod rescore;

const FOLDER: &str = "audits";
/// Between looks at which windows are over: a small part of one, within these.
const LOOKS: u32 = 60;
const LOOK_MIN: Duration = Duration::from_secs(1);
const LOOK_MAX: Duration = Duration::from_secs(60);
/// A window is left alone for so many times the time that rows of it may be on their way to the log, and this long at
/// least: uploads take a moment, and so do other gateways' clocks.
const FLUSHES: u32 = 2;
const GRACE_MIN: Duration = Duration::from_secs(2);
/// Windows that are caught up on after a server was away; older ones are for `coeval audit consistency`.
const WINDOWS_BACK: i64 = 3;
/// A claim that is older and led to nothing was that of a gateway that ended; a window is tried this often.
const CLAIM_LASTS: Duration = Duration::from_secs(1_800);
const CLAIMS_MAX: u32 = 3;
/// Reports that are kept of each service.
const REPORTS_MAX: usize = 1_000;
/// Rows replayed at a time: less than the command takes, for the memory is the server's.
const CHUNK_ROWS: usize = 5_000;
/// Rows audited of one window; of more, a sample.
const ROWS_MAX: u64 = 200_000;
const NICE: i32 = 19;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Values {
    service: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    service: String,
}

/// Cheap to clone; clones count together.
#[derive(Debug, Clone, Default)]
pub struct AuditMetrics {
    values: Family<Values, Counter>,
    last_window: Family<Of, Gauge>,
    failures: Counter,
}

impl AuditMetrics {
    pub fn register(&self, registry: &mut Registry) {
        let help = "Served values that were replayed offline, by what came of it";
        registry.register("audit_values", help, self.values.clone());
        let help = "End of the last window that was audited, in seconds since 1970";
        registry.register("audit_last_window_seconds", help, self.last_window.clone());
        registry.register("audit_failures", "Windows that could not be audited", self.failures.clone());
    }

    fn count(&self, service: &str, counts: &Counts, end: Micros) {
        let all = [
            ("equal", counts.equal),
            ("bug", counts.bug),
            ("lateness", counts.lateness),
            ("fallback", counts.fallback),
            ("not_audited", counts.left_out()),
        ];
        for (verdict, count) in all {
            self.values.get_or_create(&Values { service: service.to_owned(), verdict }).inc_by(count);
        }
        self.last_window.get_or_create(&Of { service: service.to_owned() }).set(end / 1_000_000);
    }
}

/// What auditing takes.
pub struct AuditParts {
    pub settings: AuditSettings,
    /// How long rows of the serving log may be on their way, and how long they are kept; reports are kept as long.
    pub flush: Duration,
    pub retention: Duration,
    pub engine: Arc<Engine>,
}

pub struct Audits {
    parts: AuditParts,
    /// Where this gateway listens: for people.
    gateway: String,
    metrics: AuditMetrics,
    /// The last verdict that was no good, by service.
    problems: Mutex<BTreeMap<String, String>>,
    /// Windows that need no more looking at, of the last few.
    settled: Mutex<BTreeSet<(String, Micros)>>,
}

/// Whose a window is.
enum Claimed {
    Here,
    Elsewhere,
    /// There is a report, or there will be none.
    Done,
}

/// Who audits a window.
#[derive(Serialize)]
struct Claim {
    gateway: String,
    at: String,
}

impl Audits {
    pub fn new(parts: AuditParts, gateway: String, metrics: AuditMetrics) -> Audits {
        Audits { parts, gateway, metrics, problems: Mutex::default(), settled: Mutex::default() }
    }

    /// What somebody should know.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn folder(&self, service: &str) -> Path {
        self.parts.engine.project_path().join(FOLDER).join(service)
    }

    /// Audits windows that are over, one after the other.
    async fn look(&self, gateway: &Gateway, now: Micros) -> Result<(), String> {
        let served = gateway.served();
        let Some(plan) = served.definitions.as_ref().map(|definitions| definitions.plan.clone()) else { return Ok(()) };
        let every = micros(self.parts.settings.every).max(1);
        let ready = now.saturating_sub(micros((self.parts.flush * FLUSHES).max(GRACE_MIN)));
        let last = floor_to(ready, every);
        let store = self.parts.engine.store();
        let logged = serving_log::services(store, &self.parts.engine.project_path()).await;
        for service in logged.map_err(|error| chain(&error))? {
            // What is not defined any more cannot be replayed.
            if plan.service(&service).is_none() {
                continue;
            }
            for back in (1..=WINDOWS_BACK).rev() {
                let start = last.saturating_sub(back.saturating_mul(every));
                let window = (service.clone(), start);
                if gateway.drain.is_cancelled() {
                    return Ok(());
                }
                if self.settled().contains(&window) {
                    continue;
                }
                let end = start.saturating_add(every);
                let files = serving_log::files(store, &self.parts.engine.project_path(), &service, start, end).await;
                if files.map_err(|error| chain(&error))?.is_empty() {
                    // Rows of a gateway that was cut off from the store may come late; nobody waits longer than this.
                    if back == WINDOWS_BACK {
                        self.settled().insert(window);
                    }
                    continue;
                }
                match self.claim(&service, start, now).await? {
                    Claimed::Here => self.window(gateway, &plan, &service, start, end).await?,
                    Claimed::Done => {}
                    Claimed::Elsewhere => continue,
                }
                self.settled().insert(window);
            }
        }
        let oldest = last.saturating_sub(WINDOWS_BACK.saturating_mul(every));
        self.settled().retain(|(_, start)| *start >= oldest);
        Ok(())
    }

    fn settled(&self) -> std::sync::MutexGuard<'_, BTreeSet<(String, Micros)>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a window is for this gateway to audit.
    async fn claim(&self, service: &str, start: Micros, now: Micros) -> Result<Claimed, String> {
        let store = self.parts.engine.store();
        let folder = self.folder(service);
        let is_there = async |path: &Path| match store.head(path).await {
            Ok(found) => Ok(Some(found.last_modified)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(chain(&error)),
        };
        if is_there(&folder.clone().join(report_name(start))).await?.is_some() {
            return Ok(Claimed::Done);
        }
        for attempt in 1..=CLAIMS_MAX {
            let path = folder.clone().join(format!("{}.claim-{attempt}", stamp(start)));
            if let Some(put) = is_there(&path).await? {
                // The store's clock and ours: a claim lasts long enough for either to be wrong a little.
                let age = chrono::Utc::now().signed_duration_since(put);
                if age.to_std().is_ok_and(|age| age > CLAIM_LASTS) {
                    continue;
                }
                return Ok(Claimed::Elsewhere);
            }
            let claim = Claim { gateway: self.gateway.clone(), at: stamp(now) };
            let claim = serde_json::to_vec(&claim).map_err(|error| error.to_string())?;
            let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            return match store.put_opts(&path, PutPayload::from(claim), create).await {
                Ok(_) => Ok(Claimed::Here),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                    Ok(Claimed::Elsewhere)
                }
                Err(error) => Err(chain(&error)),
            };
        }
        // It was tried often enough.
        Ok(Claimed::Done)
    }

    async fn window(
        &self,
        gateway: &Gateway,
        plan: &Arc<Plan>,
        service: &str,
        start: Micros,
        end: Micros,
    ) -> Result<(), String> {
        // What was served must be in history before it can be asked of it.
        if let Some(events) = &gateway.events {
            events.flush().await.map_err(|error| chain(&error))?;
        }
        let Some(planned) = plan.service(service) else { return Ok(()) };
        let request = AuditRequest {
            service: planned.clone(),
            options: AuditOptions {
                max_bug_rate: self.parts.settings.max_bug_rate,
                chunk_rows: CHUNK_ROWS,
                explain: false,
                ..AuditOptions::new(start, end)
            },
            sample_rows: Some(ROWS_MAX),
        };
        let again = rescore::Again::of(&gateway.served());
        let report = on_a_quiet_thread(self.parts.engine.clone(), plan.clone(), request, again).await;
        let report = match report {
            Ok(report) => without_entities(report),
            Err(error) => {
                self.metrics.failures.inc();
                return Err(error);
            }
        };
        self.metrics.count(service, &report.values, end);
        let bytes = serde_json::to_vec_pretty(&report).map_err(|error| error.to_string())?;
        let path = self.folder(service).join(report_name(start));
        let put = self.parts.engine.store().put(&path, PutPayload::from(bytes)).await;
        put.map_err(|error| chain(&error))?;
        {
            let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
            if report.outcome == Outcome::Failed {
                tracing::error!(service, window = stamp(start), "{}", report.verdict());
                problems.insert(
                    service.to_owned(),
                    format!("the audit of `{service}` from {}: {}", stamp(start), report.verdict()),
                );
            } else {
                tracing::info!(service, window = stamp(start), "{}", report.verdict());
                problems.remove(service);
            }
        }
        self.remove_old(service, end).await
    }

    /// Reports and claims beyond those that are kept.
    async fn remove_old(&self, service: &str, now: Micros) -> Result<(), String> {
        let store = self.parts.engine.store();
        let listed = store.list_with_delimiter(Some(&self.folder(service))).await.map_err(|error| chain(&error))?;
        let mut paths: Vec<Path> = listed.objects.into_iter().map(|object| object.location).collect();
        // Names begin with the time, so this is their order.
        paths.sort();
        let expired = stamp(now.saturating_sub(micros(self.parts.retention)));
        let name = |path: &Path| path.filename().unwrap_or_default().to_owned();
        let reports: Vec<String> = paths.iter().map(name).filter(|name| name.ends_with(".json")).collect();
        let first_kept =
            reports.get(reports.len().saturating_sub(REPORTS_MAX)).cloned().unwrap_or_default().max(expired);
        for path in paths.into_iter().filter(|path| name(path) < first_kept) {
            match store.delete(&path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(chain(&error)),
            }
        }
        Ok(())
    }
}

/// Audits windows as they end, for as long as the server runs.
pub async fn run(gateway: &Gateway) {
    let Some(audits) = &gateway.audits else { return std::future::pending().await };
    let every = (audits.parts.settings.every / LOOKS).clamp(LOOK_MIN, LOOK_MAX);
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let now = (gateway.clock)();
        if let Err(error) = audits.look(gateway, now).await {
            tracing::warn!(%error, "what was served could not be audited; the next look tries again");
        }
    }
}

/// Reports outlive the rows that they are of, and nobody looks through them for someone who is to be forgotten: whose rows
/// they were is in the log alone.
fn without_entities(mut report: Report) -> Report {
    for example in report.features.iter_mut().flat_map(|feature| &mut feature.examples) {
        example.given.clear();
    }
    report
}

/// Threads that the work begins inherit the priority of the one that it begins on.
async fn on_a_quiet_thread(
    engine: Arc<Engine>,
    plan: Arc<Plan>,
    request: AuditRequest,
    again: rescore::Again,
) -> Result<Report, String> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let work = move || {
        nice::lower(NICE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let report = match runtime {
            Ok(runtime) => runtime.block_on(async {
                let audited = offline_store::audit::audit(&engine, &plan, &request, Some(&again), &|_| {}).await;
                audited.map_err(|error| chain(&error))
            }),
            Err(error) => Err(error.to_string()),
        };
        // Nobody may be listening any more.
        let _ = sender.send(report);
    };
    let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(work);
    thread.map_err(|error| format!("no thread for the audit: {error}"))?;
    receiver.await.map_err(|_| "the audit ended without a report".to_owned())?
}

fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}

/// Sorts as times do, and has no sign that object stores dislike.
fn stamp(time: Micros) -> String {
    let time = DateTime::from_timestamp_micros(time).unwrap_or_default();
    time.to_rfc3339_opts(SecondsFormat::Secs, true).replace([':'], "-")
}

fn report_name(start: Micros) -> String {
    format!("{}.json", stamp(start))
}
