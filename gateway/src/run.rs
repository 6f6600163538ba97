//! The process: listen, open what it works with, load what is served, answer until told to stop.
//!
//! It listens before it opens anything, so that a second server on the same port fails at once and touches nothing. The
//! ports answer from then on, `/ready` with no until the first look at the control log is over and its models are warm.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::DateTime;
use feature_defs::catalog::{LogKind, OnlineUrl, RequestTime, ServeSettings, Settings};
use inference::model::Runtime;
use ingest::IngestOptions;
use object_store::ObjectStore;
use object_store::path::Path;
use online_store::OnlineStore;
use online_store::embedded::EmbeddedStore;
use online_store::redis::RedisStore;
use registry::Registry;
use registry::id::{EntryNumber, Incarnation, ProjectName};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

use crate::answer::{Clock, Gateway, Parts};
use crate::audit::{AuditMetrics, AuditParts, Audits};
use crate::cache::CachedStore;
use crate::config::{GRPC, HTTP, Listener, ServeError, ServeOptions, default_runtime, listen, local_folder, place};
use crate::drift::{Counting, Drift, DriftMetrics, DriftParts};
use crate::edge::Limit;
use crate::events::Events;
use crate::flags::{ExposureParts, Exposures};
use crate::follow::{Follower, Retry};
use crate::guard::GuardedStore;
use crate::kept::{self, Kept};
use crate::metrics::Metrics;
use crate::observe::{Observer, Observing};
use crate::presence::Presence;
use crate::roles::{Role, Roles};
use crate::rollout::Rollouts;
use crate::rollout::counting::{RolloutMetrics, Units};
use crate::serving_log::{LogMetrics, LogParts, LogSetupError, ServingLog};
use crate::shutdown::{Draining, drain};
use crate::status::chain;
use crate::versions::{ModelPlaces, Versions};
use crate::{data, grpc, http, models, presence};

/// Longest wait for a round trip to Redis: far beyond a healthy one, and short enough to tell people that it is gone.
const REDIS_TIMEOUT: Duration = Duration::from_secs(2);
const STORE_LOOK: Duration = Duration::from_secs(2);
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// HTTP/2 streams of one connection.
const STREAMS_MAX: u32 = 1_024;
/// Calls of one connection that were cancelled before they were looked at; one more ends the connection, with all its calls.
/// Clients with short deadlines cancel much when we are busy, so it is as many as they may have under way, and not hyper's 20.
const RESETS_MAX: usize = STREAMS_MAX as usize;
const KEEPALIVE: Duration = Duration::from_secs(30);
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Adds further services to the gRPC port.
pub type Mount = Box<dyn FnOnce(Routes, &Arc<Gateway>) -> Routes + Send>;

/// What a server works with, opened.
pub struct Opened {
    pub project: ProjectName,
    pub registry: Arc<Registry>,
    pub store: Arc<dyn OnlineStore>,
    pub events: Option<Arc<dyn Events>>,
    pub runtime: Option<Arc<dyn Runtime>>,
    pub models: ModelPlaces,
    pub flight: Option<Mount>,
    /// None: nothing of what is served is written down.
    pub serving_log: Option<LogParts>,
    /// Where what is counted for drift is kept: an object store, and the project's root on it.
    pub counts: Option<(Arc<dyn ObjectStore>, Path)>,
    /// None: what is served is audited only when somebody asks.
    pub audit: Option<AuditParts>,
    pub roles: Roles,
    /// Where the last fold of the control log is kept, for a start without the object store.
    pub kept: Option<Kept>,
}

/// Sockets that listen already.
pub struct Listeners {
    pub grpc: Listener,
    pub http: Listener,
}

/// A server that runs.
pub struct Running {
    pub grpc_addr: SocketAddr,
    pub http_addr: SocketAddr,
    gateway: Arc<Gateway>,
    stop: CancellationToken,
    supervisor: JoinHandle<Result<(), ServeError>>,
}

/// Tells a server to drain and end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShutdownHandle {
    stop: CancellationToken,
}

impl ShutdownHandle {
    /// Begins the drain and returns; [`Running::wait`] returns when it is over.
    pub fn shut_down(&self) {
        self.stop.cancel();
    }
}

impl Running {
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle { stop: self.stop.clone() }
    }

    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// Returns once the first look at the control log is over.
    pub async fn started(&self) {
        while !self.gateway.started.load(Ordering::Acquire) && !self.supervisor.is_finished() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for the end: after a shutdown, or when a part of the server fails.
    pub async fn wait(self) -> Result<(), ServeError> {
        match self.supervisor.await {
            Ok(ended) => ended,
            Err(error) => Err(ServeError::Server { what: "supervising", source: Box::new(error) }),
        }
    }
}

/// Starts a server as its settings say.
pub async fn serve(options: ServeOptions) -> Result<Running, ServeError> {
    options.roles.check_online(&options.settings.online)?;
    let listeners = bind(&options.settings).await?;
    let opened = open(&options).await?;
    start(listeners, opened, &options.settings.serve, options.clock).await
}

/// Listens on both ports.
pub async fn bind(settings: &Settings) -> Result<Listeners, ServeError> {
    let serve = &settings.serve;
    let grpc = listen(GRPC, &serve.grpc, serve.beyond_loopback).await?;
    let http = listen(HTTP, &serve.http, serve.beyond_loopback).await?;
    Ok(Listeners { grpc, http })
}

/// Opens the stores, the control log, the event log and the services over them.
pub async fn open(options: &ServeOptions) -> Result<Opened, ServeError> {
    let settings = &options.settings;
    let roles = options.roles;
    let project = ProjectName::try_new(settings.project.as_str())?;
    let (objects, root) = registry::store::open_store(&place(&options.project_dir, &settings.store))?;
    let prefix = root.clone().join(project.as_str());
    let local = local_folder(&options.project_dir, &settings.store, project.as_str());
    let kept = Kept::new(local.join("control-log"), &settings.serve.grpc);
    let registry = open_log(objects.clone(), &prefix, &options.clock, &kept).await?;
    let store: Arc<dyn OnlineStore> = match &settings.online.value {
        OnlineUrl::Embedded => {
            let folder = local.join("online");
            let made = std::fs::create_dir_all(&folder);
            made.map_err(|source| ServeError::Folder { folder: folder.clone(), source })?;
            let opened = tokio::task::spawn_blocking(move || EmbeddedStore::open(folder)).await;
            let opened =
                opened.map_err(|error| ServeError::Server { what: "online store", source: Box::new(error) })?;
            Arc::new(opened?)
        }
        OnlineUrl::Redis(url) | OnlineUrl::RedisCluster(url) => {
            Arc::new(RedisStore::connect(url, REDIS_TIMEOUT).await?)
        }
    };
    let runtime = options.runtime.clone().or_else(default_runtime);
    let serving_log = settings.serving_log.clone().map(|settings| LogParts {
        settings,
        project: project.as_str().to_owned(),
        root: prefix.clone(),
        store: objects.clone(),
        folder: local.join("serving-log"),
    });
    let counts = Some((objects.clone(), prefix));
    let offline = data::open_engine(options, project.as_str(), objects.clone(), root.clone())?;
    let audit = match (settings.audit, &settings.serving_log) {
        (Some(audit), Some(log)) if roles.has(Role::Offline) => Some(AuditParts {
            settings: audit,
            flush: log.flush,
            retention: log.retention,
            engine: offline.engine.clone(),
        }),
        _ => None,
    };
    let sources = Arc::new(offline.engine.sources().clone());
    let log = local.join("log");
    let clock = options.clock.clone();
    let events = if roles.has(Role::Ingest) {
        let mut ingest = IngestOptions::new(project.as_str(), log, objects, root, store.clone(), sources, clock);
        // Where requests bring their own times, the server's clock says neither what is due nor what is garbage.
        ingest.schedule = settings.serve.request_time == RequestTime::Refused;
        // A Redis forgets by its own clock, which has to be this server's.
        ingest.expires = settings.serve.request_time == RequestTime::Refused && is_wall_clock(&options.clock);
        // Settings with `log: redis` and no Redis are refused where they are read.
        if let (LogKind::Redis, OnlineUrl::Redis(url) | OnlineUrl::RedisCluster(url)) =
            (settings.log, &settings.online.value)
        {
            ingest.log_redis = Some(url.as_str().into());
        }
        Some(data::open_events(ingest).await?)
    } else {
        None
    };
    // Writers have their own way of waiting for a store that is away.
    let store = match &settings.online.value {
        OnlineUrl::Redis(_) => Arc::new(GuardedStore::new(store)),
        OnlineUrl::Embedded | OnlineUrl::RedisCluster(_) => store,
    };
    let models = ModelPlaces { cache: Some(local.join("models")), certifier: options.certifier.clone() };
    let flight = Some(offline.mount());
    let kept = Some(kept);
    Ok(Opened { project, registry, store, events, runtime, models, flight, serving_log, counts, audit, roles, kept })
}

/// The control log, or the last fold of it where the store does not answer.
async fn open_log(
    objects: Arc<dyn ObjectStore>,
    prefix: &Path,
    clock: &Clock,
    kept: &Kept,
) -> Result<Arc<Registry>, ServeError> {
    let fold = kept.read();
    let opened = Registry::open_or_kept(objects, prefix, wall_clock(clock), fold.as_deref()).await;
    let (registry, away) = opened.map_err(|error| ServeError::Registry(Box::new(error)))?;
    let fold_head = fold.as_deref().map_or(EntryNumber::NONE, kept::head_of);
    match away {
        Some(error) => {
            let head = registry.state().head;
            tracing::warn!(%head, error = chain(&error), "the control log cannot be read; starting with the fold that was kept");
        }
        // A folder that is not mounted looks like a project that nobody has used yet.
        None if registry.state().head == EntryNumber::NONE && fold_head > EntryNumber::NONE => {
            return Err(ServeError::NoLog { kept: fold_head, path: kept.path().to_owned() });
        }
        None => {}
    }
    Ok(Arc::new(registry))
}

/// Whether a clock tells the time, give or take an hour: simulations bring their own.
fn is_wall_clock(clock: &Clock) -> bool {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    clock().abs_diff(i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)) < 3_600_000_000
}

/// The control log's entries carry a date; ours is in microseconds.
fn wall_clock(clock: &Clock) -> registry::Clock {
    let clock = clock.clone();
    Arc::new(move || DateTime::from_timestamp_micros(clock()).unwrap_or_default())
}

/// Starts a server over opened parts.
pub async fn start(
    listeners: Listeners,
    opened: Opened,
    serve: &ServeSettings,
    clock: Clock,
) -> Result<Running, ServeError> {
    let Opened { project, registry, store, events, runtime, models, flight, serving_log, counts, audit, .. } = opened;
    let Opened { roles, kept, .. } = opened;
    let mut metrics = Metrics::new();
    if let Some(freshness) = events.as_ref().and_then(|events| events.freshness()) {
        metrics.add_freshness(&freshness);
    }
    let log_metrics = LogMetrics::default();
    if serving_log.is_some() {
        metrics.add_serving_log(&log_metrics);
    }
    let drift_metrics = DriftMetrics::default();
    if counts.is_some() {
        metrics.add_drift(&drift_metrics);
    }
    let audit_metrics = AuditMetrics::default();
    if audit.is_some() {
        metrics.add_audit(&audit_metrics);
    }
    let rollout_metrics = RolloutMetrics::default();
    metrics.add_rollouts(&rollout_metrics);
    let audits = audit.map(|parts| Audits::new(parts, listeners.grpc.address.to_string(), audit_metrics));
    let metrics = Arc::new(metrics);
    let exposures = counts.clone().map(|(store, root)| {
        Exposures::new(ExposureParts {
            store,
            root,
            gateway: listeners.grpc.address.to_string(),
            settings: serving_log.as_ref().map(|parts| parts.settings.clone()),
            metrics: metrics.flags.clone(),
        })
    });
    let mut observers: Vec<Box<dyn Observer>> = Vec::new();
    let mut uploads = None;
    if let Some(parts) = serving_log {
        let log = ServingLog::open(parts, listeners.grpc.address.to_string(), log_metrics).await?;
        observers.push(log.observer);
        uploads = Some(log.uploads);
    }
    let drift = counts.map(|(store, root)| {
        Drift::new(DriftParts { store, root, gateway: listeners.grpc.address.to_string() }, drift_metrics)
    });
    if let Some(drift) = &drift {
        observers.push(Box::new(Counting::new(drift.clone())));
    }
    let incarnation = Incarnation::random();
    let (control_store, control_root) = (registry.log().store().clone(), registry.root().clone());
    let rollouts = Rollouts::new(control_store, control_root, incarnation.clone(), rollout_metrics);
    observers.push(Box::new(Units::new(rollouts.clone())));
    let observing = Observing::start(observers, clock.clone());
    let observing = observing.map_err(|source| ServeError::ServingLog(LogSetupError::Thread(source)))?;
    // Whoever writes goes past the cache.
    let store = match serve.cache {
        None => store,
        Some(cache) => Arc::new(CachedStore::new(store, cache, &metrics)),
    };
    let mut versions = Versions::new(registry.clone(), runtime, models);
    versions.tenant = project.to_string();
    versions.is_idle = !roles.has(Role::Gateway);
    let mut follower = Follower::new(registry.clone(), project.clone(), events.clone(), versions, metrics.clone());
    follower.kept = kept.clone();
    let follower = Arc::new(follower);
    let presence = Presence::new(registry.clone(), follower.clone(), listeners.grpc.address.to_string(), incarnation);
    let draining = CancellationToken::new();
    let gateway = Arc::new(Gateway::new(Parts {
        project,
        store,
        registry,
        follower,
        presence,
        events,
        clock,
        request_time: serve.request_time,
        metrics,
        observing,
        uploads,
        drift,
        audits,
        exposures,
        rollouts,
        drain: draining.clone(),
        roles,
    }));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    let routes = grpc::routes(gateway.clone()).add_service(health_service);
    let routes = match flight {
        Some(mount) => mount(routes, &gateway),
        None => routes,
    };
    let Listeners { grpc, http } = listeners;
    let (grpc_addr, http_addr) = (grpc.address, http.address);
    let stop = CancellationToken::new();
    let http_stop = CancellationToken::new();
    let limit = |port| Limit::new(gateway.metrics.connections_refused(port));
    let grpc_server = tokio::spawn(serve_grpc(grpc, limit("grpc"), routes, draining.clone()));
    let http_server = tokio::spawn(http::serve(http, limit("http"), gateway.clone(), http_stop.clone()));
    let background =
        tokio::spawn(keep_up(gateway.clone(), health.clone(), serve.golden_checks, kept, draining.clone()));
    tracing::info!(%grpc_addr, %http_addr, "listening");
    let parts = Draining { gateway: gateway.clone(), health, grpc_server, http_server, http_stop, background };
    let supervisor = tokio::spawn(drain(parts, stop.clone()));
    Ok(Running { grpc_addr, http_addr, gateway, stop, supervisor })
}

async fn serve_grpc(
    listener: Listener,
    limit: Limit,
    routes: Routes,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let incoming = TcpIncoming::from(listener.listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE));
    tonic::transport::Server::builder()
        .max_concurrent_streams(Some(STREAMS_MAX))
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .initial_stream_window_size(Some(STREAM_WINDOW_BYTES))
        .initial_connection_window_size(Some(CONNECTION_WINDOW_BYTES))
        .add_routes(routes)
        .serve_with_incoming_shutdown(limit.over(incoming), stop.cancelled_owned())
        .await
        .map_err(|error| ServeError::Server { what: "gRPC", source: Box::new(error) })
}

/// Loads what is to be served, says so, and then follows the control log and looks after the online store.
async fn keep_up(
    gateway: Arc<Gateway>,
    health: tonic_health::server::HealthReporter,
    checks_every: Duration,
    kept: Option<Kept>,
    stop: CancellationToken,
) {
    let is_gateway = gateway.roles.has(Role::Gateway);
    if is_gateway {
        // Before the log is read: see `presence`.
        gateway.presence.report().await;
    }
    let first = async {
        gateway.follower.follow(Retry::Now).await;
        // Every active version is loaded, or known to fail, before requests are taken.
        while !gateway.follower.versions.is_settled() {
            gateway.follower.versions.changed.notified().await;
        }
        gateway.follower.follow(Retry::Later).await;
    };
    tokio::select! {
        () = stop.cancelled() => return,
        () = first => {}
    }
    gateway.look_at_store().await;
    crate::flags::prepare(&gateway).await;
    gateway.started.store(true, Ordering::Release);
    if is_gateway {
        gateway.presence.has_started().await;
        health.set_service_status("coeval.v1.Gateway", tonic_health::ServingStatus::Serving).await;
    }
    if gateway.roles.has(Role::Ingest) {
        health.set_service_status("coeval.v1.Ingest", tonic_health::ServingStatus::Serving).await;
    }
    for service in ["", "coeval.v1.Control"] {
        health.set_service_status(service, tonic_health::ServingStatus::Serving).await;
    }
    tracing::info!("ready");
    let look = async {
        let mut interval = tokio::time::interval(STORE_LOOK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            gateway.look_at_store().await;
        }
    };
    let watch = async {
        let mut interval = tokio::time::interval(MEMORY_LOOK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            if let Some(cpu) = gateway.follower.versions.devices.cpu() {
                gateway.memory.look(&gateway.served(), &cpu);
            }
        }
    };
    tokio::select! {
        () = gateway.follower.run(stop.clone()) => {}
        () = look => {}
        () = watch => {}
        () = among_others(&gateway, &stop) => {}
        () = keep_fold(&gateway, kept.as_ref()) => {}
        () = models::check_again(&gateway, checks_every) => {}
        () = crate::forget::finish(&gateway) => {}
        () = upload(&gateway) => {}
        () = crate::drift::run(&gateway) => {}
        () = crate::flags::run(&gateway) => {}
        () = crate::audit::run(&gateway) => {}
        () = crate::rollout::judging::run(&gateway) => {}
    }
}

async fn among_others(gateway: &Gateway, stop: &CancellationToken) {
    if gateway.roles.has(Role::Gateway) {
        presence::run(gateway, stop).await;
    } else {
        stop.cancelled().await;
    }
}

async fn keep_fold(gateway: &Gateway, kept: Option<&Kept>) {
    match kept {
        Some(kept) => kept.run(&gateway.registry).await,
        None => std::future::pending().await,
    }
}

/// Brings the serving log to the object store.
async fn upload(gateway: &Gateway) {
    match &gateway.uploads {
        Some(uploads) => uploads.run(&gateway.clock, &|| gateway.served().plan().ok().cloned()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
