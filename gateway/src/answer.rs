//! The calls themselves, without a protocol around them: `grpc` and `http` both come here.
//!
//! A request takes the served state once, on arrival, and keeps it to its end, so that a deploy in between changes nothing
//! about it. One deadline holds for the whole request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::catalog::RequestTime;
use feature_defs::plan::{ModelPlan, Plan, ServicePlan};
use feature_defs::time::Micros;
use inference::breaker::Open;
use offline_store::Engine;
use online_store::key::Generation;
use online_store::{Answer, OnlineStore, Read};
use proto::v1;
use registry::Registry;
use registry::deployment::Standing;
use registry::id::ProjectName;
use registry::state::Refusal;
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::arms::{self, Part, Whole};
use crate::audit::Audits;
use crate::drift::Drift;
use crate::events::Events;
use crate::features::{self, Features, FeaturesAnswer, Service, Services};
use crate::fetch::When;
use crate::flags::Exposures;
use crate::follow::{Follower, Served};
use crate::labels::Reports;
use crate::memory::MemoryWatch;
use crate::metrics::Metrics;
use crate::observe::{Exposed, Observed, ObservedPrediction, Observing};
use crate::predict::{Ask, Cause, Predicted, Sent};
use crate::presence::Presence;
use crate::request::{self, Rows};
use crate::roles::{Role, Roles};
use crate::rollout::Rollouts;
use crate::rollout::trial::{CHAMPION, NAMED, OFF, Trial};
use crate::serving_log::Uploads;
use crate::status::{Failure, Kind};
use crate::versions::declared_deadline;

/// Where the time comes from.
pub type Clock = Arc<dyn Fn() -> Micros + Send + Sync>;

/// Requests being answered at once. Each holds its rows in memory; beyond this, waiting would only make all of them late.
const REQUESTS_MAX: usize = 1_024;
/// The deadline of a request that names none, where its model names none either.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest deadline a request may ask for.
const DEADLINE_MAX: Duration = Duration::from_secs(120);
/// Ids that callers make up are echoed and logged, and should be no longer than that is good for.
const REQUEST_ID_BYTES_MAX: usize = 256;

/// Everything that answering takes.
pub struct Gateway {
    pub project: ProjectName,
    pub store: Arc<dyn OnlineStore>,
    pub registry: Arc<Registry>,
    pub follower: Arc<Follower>,
    /// This gateway among the others.
    pub presence: Presence,
    pub events: Option<Arc<dyn Events>>,
    pub clock: Clock,
    pub request_time: RequestTime,
    pub metrics: Arc<Metrics>,
    /// Cancelled when the process stops taking requests.
    pub drain: CancellationToken,
    /// What this process does of what the project needs.
    pub roles: Roles,
    /// The first look at the control log is over, with every model of it loaded or known to fail.
    pub started: AtomicBool,
    /// What the last look at the online store found wrong; written by the task that looks.
    pub store_problem: Mutex<Option<String>>,
    /// One act of forgetting at a time, from its entry in the log to its end.
    pub forgetting: tokio::sync::Mutex<()>,
    pub memory: MemoryWatch,
    /// Where answers go after they were given.
    pub observing: Observing,
    /// Of the serving log, where there is one.
    pub uploads: Option<Uploads>,
    pub reports: Reports,
    /// What counts for drift.
    pub drift: Option<Arc<Drift>>,
    /// What audits the serving log.
    pub audits: Option<Audits>,
    /// Who was given which variant of a flag.
    pub exposures: Option<Arc<Exposures>>,
    /// What is tried out.
    pub rollouts: Arc<Rollouts>,
    /// What replays rows; set where this process has the role.
    pub engine: OnceLock<Arc<Engine>>,
    /// Deploys of this gateway go one after the other.
    pub deploying: tokio::sync::Mutex<()>,
    services: Services,
    requests: Semaphore,
}

/// Whether the process wants traffic, and how well it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    pub ready: bool,
    /// It answers, though not everything as it should.
    pub degraded: bool,
    pub reasons: Vec<String>,
}

/// The parts that a gateway is made of.
pub struct Parts {
    pub project: ProjectName,
    pub store: Arc<dyn OnlineStore>,
    pub registry: Arc<Registry>,
    pub follower: Arc<Follower>,
    pub presence: Presence,
    pub events: Option<Arc<dyn Events>>,
    pub clock: Clock,
    pub request_time: RequestTime,
    pub metrics: Arc<Metrics>,
    pub observing: Observing,
    pub uploads: Option<Uploads>,
    pub drift: Option<Arc<Drift>>,
    pub audits: Option<Audits>,
    pub exposures: Option<Arc<Exposures>>,
    pub rollouts: Arc<Rollouts>,
    pub drain: CancellationToken,
    pub roles: Roles,
}

impl Gateway {
    pub fn new(parts: Parts) -> Gateway {
        let Parts { project, store, registry, follower, presence, events, clock, .. } = parts;
        let Parts { request_time, metrics, observing, uploads, drift, audits, exposures, rollouts, .. } = parts;
        let Parts { drain, roles, .. } = parts;
        Gateway {
            project,
            store,
            registry,
            follower,
            presence,
            events,
            clock,
            request_time,
            metrics,
            drain,
            roles,
            started: AtomicBool::new(false),
            store_problem: Mutex::new(None),
            forgetting: tokio::sync::Mutex::default(),
            memory: MemoryWatch::default(),
            observing,
            uploads,
            reports: Reports::default(),
            drift,
            audits,
            exposures,
            rollouts,
            engine: OnceLock::new(),
            deploying: tokio::sync::Mutex::default(),
            services: Services::default(),
            requests: Semaphore::new(REQUESTS_MAX),
        }
    }

    pub fn served(&self) -> Arc<Served> {
        self.follower.served()
    }

    /// Refuses requests about other projects.
    pub fn check_project(&self, project: &str) -> Result<(), Failure> {
        if project == self.project.as_str() {
            return Ok(());
        }
        if project.is_empty() {
            return Err(Failure::invalid(format!(
                "the request names no project; this server serves `{}`",
                self.project
            )));
        }
        Err(Failure::unknown("project here named", project, [self.project.as_str()]))
    }

    /// Refuses before everything is loaded, and after the end has begun.
    pub fn check_serving(&self) -> Result<(), Failure> {
        if self.drain.is_cancelled() {
            return Err(Failure::new(Kind::Unavailable, "the server is shutting down; ask another one"));
        }
        if !self.started.load(Ordering::Acquire) {
            return Err(Failure::new(Kind::Unavailable, "the server is starting; ask again when it is ready"));
        }
        Ok(())
    }

    /// Refuses what another process of the project does.
    pub fn check_role(&self, role: Role, what: &str) -> Result<(), Failure> {
        if self.roles.has(role) {
            Ok(())
        } else {
            Err(Failure::new(Kind::Unsupported, self.roles.elsewhere(role, what)))
        }
    }

    /// The service that a list of features is.
    pub fn listed(&self, plan: &Arc<Plan>, names: &[String]) -> Result<Arc<ServicePlan>, Failure> {
        self.services.listed(plan, names)
    }

    fn admit(&self) -> Result<SemaphorePermit<'_>, Failure> {
        self.check_serving()?;
        self.check_role(Role::Gateway, "requests are not answered here")?;
        self.requests.try_acquire().map_err(|_| {
            let text = format!("{REQUESTS_MAX} requests are being answered already; send it again later");
            Failure::new(Kind::TooMuch, text)
        })
    }

    pub async fn get_features(&self, request: v1::GetFeaturesRequest) -> Result<FeaturesAnswer, Failure> {
        let started = Instant::now();
        let mut of = None;
        let answer = self.get_features_of(request, started, &mut of).await;
        match (&answer, of) {
            (Ok(answer), Some(ready)) => self.metrics.answered(&answer.service, &ready.counters, started.elapsed()),
            (_, ready) => {
                let name = ready.as_ref().map_or("", |ready| &*ready.reader.service.name);
                self.count("GetFeatures", name, &answer, started);
            }
        }
        answer
    }

    async fn get_features_of(
        &self,
        request: v1::GetFeaturesRequest,
        started: Instant,
        of: &mut Option<Arc<Service>>,
    ) -> Result<FeaturesAnswer, Failure> {
        let _permit = self.admit()?;
        self.check_project(&request.project)?;
        let served = self.served();
        let plan = served.plan()?;
        use v1::get_features_request::What;
        let service: Arc<ServicePlan> = match &request.what {
            Some(What::Service(name)) => {
                let known = || plan.services.iter().map(|service| &*service.name);
                plan.service(name).cloned().ok_or_else(|| Failure::unknown("feature service", name, known()))?
            }
            Some(What::Features(list)) => self.listed(plan, &list.names)?,
            None => return Err(Failure::invalid("the request names neither a service nor features")),
        };
        let ready = &*of.insert(self.prepared(&service));
        let rows = request::read_rows(&service, &request.rows, request.at.len())?;
        request::refuse_incomplete(&rows)?;
        let deadline = deadline(started, request.deadline_ms, None);
        let features = Arc::new(self.features(ready, &rows, &request.at, deadline).await?);
        // A list that somebody made up is no service: nothing was trained on it.
        if let Some(What::Service(_)) = &request.what
            && self.observing.is_on()
        {
            let (service, features) = (service.clone(), features.clone());
            let (request_id, time, total) = (String::new(), self.observing.now(), started.elapsed());
            let prediction = None;
            let places = None;
            self.observing.hand_over(Observed { service, rows, features, places, request_id, time, total, prediction });
        }
        Ok(FeaturesAnswer { service, features, include_provenance: request.include_provenance })
    }

    pub async fn predict(&self, request: v1::PredictRequest) -> Result<v1::PredictResponse, Failure> {
        self.predict_on(self.served(), request).await
    }

    /// With the state that the request was read by.
    pub async fn predict_on(
        &self,
        served: Arc<Served>,
        request: v1::PredictRequest,
    ) -> Result<v1::PredictResponse, Failure> {
        let started = Instant::now();
        let mut of = String::new();
        let answer = self.predict_of(&served, request, started, &mut of).await;
        self.count("Predict", &of, &answer, started);
        answer
    }

    async fn predict_of(
        &self,
        served: &Served,
        mut request: v1::PredictRequest,
        started: Instant,
        of: &mut String,
    ) -> Result<v1::PredictResponse, Failure> {
        let _permit = self.admit()?;
        self.check_project(&request.project)?;
        if request.request_id.len() > REQUEST_ID_BYTES_MAX {
            let text =
                format!("a request id of {} bytes; use at most {REQUEST_ID_BYTES_MAX}", request.request_id.len());
            return Err(Failure::invalid(text));
        }
        let model = served.model(&request.model, request.version)?;
        *of = model.name.to_string();
        let plan = &model.plan;
        let service = &plan.service;
        let tier = tier(plan, &request.tier)?;
        // Whoever names a version gets it, whatever else is being tried.
        let unnamed = request.version == 0;
        let off = served.off.get(&*model.name).filter(|_| unnamed);
        let trial = served.trials.get(&*model.name).filter(|trial| unnamed && trial.champion == model.version);
        // Requests may name the unit of a canary also while none runs.
        let beside = |column: &str| {
            plan.rollout.unit.iter().any(|key| key.name == column) || trial.is_some_and(|trial| trial.takes(column))
        };
        let rows = request::read_rows_beside(service, &request.rows, request.at.len(), beside)?;
        let sent = Sent { columns: std::mem::take(&mut request.rows), rows: rows.count };
        let assigned = match trial {
            Some(trial) => trial.assign(service, &sent.columns, &rows)?,
            None => Vec::new(),
        };
        let deadline = deadline(started, request.deadline_ms, declared_deadline(plan));
        let is_champion = served.models.get(&*model.name).is_some_and(|champion| champion.version == model.version);
        let arm = match off {
            Some(_) => OFF,
            None if is_champion => CHAMPION,
            None => NAMED,
        };
        let ask = Ask {
            gateway: self,
            served,
            model,
            sent: &sent,
            of: None,
            rows: &rows,
            at: &request.at,
            started,
            deadline,
            tier,
            stand_in: None,
            instead: off.map(|off| (Cause::Off, off.reason.as_str())),
        };
        let canary = trial.filter(|trial| off.is_none() && !trial.is_shadow() && !trial.prepared.local.is_stopped());
        let (split, count) = (canary.map(|trial| arms::shares(trial, model, &assigned)), rows.count);
        let asked = arms::Asked { ask, champion: model, assigned: &assigned };
        let parts: Vec<Part> = match split {
            Some(mut shares) => match (shares.pop(), shares.pop()) {
                (Some(second), Some(first)) => {
                    let (first, second) = tokio::join!(asked.part(first), asked.part(second));
                    vec![first?, second?]
                }
                (Some(only), None) => vec![asked.part(only).await?],
                (None, _) => Vec::new(),
            },
            None => {
                let (features, predicted) = ask.answer().await?;
                let (model, of, total) = (model.clone(), None, started.elapsed());
                vec![Part { model, arm, of, rows, features, predicted, assigned, total }]
            }
        };
        parts.iter().for_each(|part| self.metrics.predicted(&model.name, part.model.version, &part.predicted));
        let request_id = if request.request_id.is_empty() { Uuid::now_v7().to_string() } else { request.request_id };
        let whole = Whole::of(&parts, count);
        let response = v1::PredictResponse {
            outputs: whole.outputs()?,
            outcomes: whole.outcomes(),
            features: if request.include_features { whole.features()? } else { Vec::new() },
            views: if request.include_provenance { whole.provenance() } else { Vec::new() },
            request_id: request_id.clone(),
            semantic_digest: service.semantic_digest.to_string(),
            stale: whole.is_stale(),
            timings: Some(whole.timings(started.elapsed())),
            at: whole.at(),
        };
        if self.observing.is_on() {
            let counted = trial.filter(|trial| off.is_none() && !trial.prepared.local.is_stopped());
            for part in parts {
                let observed = Arc::new(self.observed(part, request_id.clone(), counted));
                self.observing.hand_over(observed.clone());
                if let Some(trial) = counted.filter(|trial| trial.is_shadow()) {
                    self.rollouts.shadow(trial, observed, &sent, &request.at);
                }
            }
        }
        Ok(response)
    }

    fn observed(&self, part: Part, request_id: String, trial: Option<&Arc<Trial>>) -> Observed {
        let Part { model, arm, of: places, rows, features, predicted, assigned, total } = part;
        let Predicted { outputs, rows: outcomes, encoded, queue_time, forward_time } = predicted;
        let exposed = trial.map(|trial| Exposed { trial: trial.clone(), assigned, beside: None });
        let (plan, version) = (model.plan.clone(), model.version);
        let prediction = ObservedPrediction {
            plan,
            version,
            arm,
            outputs,
            rows: outcomes,
            encoded,
            queue_time,
            forward_time,
            exposed,
        };
        Observed {
            service: model.plan.service.clone(),
            rows,
            features: Arc::new(features),
            places,
            request_id,
            time: self.observing.now(),
            total,
            prediction: Some(prediction),
        }
    }

    /// What is worked out of a service once.
    pub(crate) fn prepared(&self, service: &Arc<ServicePlan>) -> Arc<Service> {
        self.services.of(service, self.project.as_str(), &self.metrics)
    }

    pub(crate) async fn features(
        &self,
        ready: &Service,
        rows: &Rows,
        at: &[Micros],
        deadline: Instant,
    ) -> Result<Features, Failure> {
        let when = match request::read_at(at, rows.count, self.request_time)? {
            Some(at) => When::At(at),
            None => When::Now((self.clock)()),
        };
        let features = features::compute(&ready.reader, rows, when, deadline.into(), &*self.store).await?;
        self.metrics.features(&ready.reader.service, &ready.counters, &features);
        Ok(features)
    }

    fn count<T>(&self, method: &str, of: &str, answer: &Result<T, Failure>, started: Instant) {
        let code = match answer {
            Ok(_) => "Ok".to_owned(),
            Err(failure) => format!("{:?}", failure.kind.code()),
        };
        self.metrics.call(method, of, &code, started.elapsed());
    }

    /// For load balancers: whether to send requests here.
    pub fn readiness(&self) -> Readiness {
        let served = self.served();
        let mut reasons = Vec::new();
        if self.drain.is_cancelled() {
            reasons.push("the server is shutting down".to_owned());
        } else if !self.started.load(Ordering::Acquire) {
            reasons.push("definitions and models are being loaded".to_owned());
        }
        reasons.extend(self.stuck());
        for name in &served.missing {
            reasons.push(format!("model `{name}` is deployed, but no version of it could be loaded"));
        }
        let ready = reasons.is_empty();
        reasons.extend(served.problems.iter().cloned());
        for model in served.models.values() {
            if let Err(error) = model.server.ready() {
                reasons.push(format!("model `{}`: {error}", model.name));
            }
            reasons.extend(model.checks.problem().map(|problem| format!("model `{}`: {problem}", model.name)));
        }
        for (device, shared) in self.follower.versions.devices.all() {
            let Some(Open { left, failures }) = shared.open() else { continue };
            reasons.push(format!(
                "{device}: the last {failures} forwards were short of memory or did not end; models answer again in {left:.1?}"
            ));
        }
        if let (age, Some(_)) = self.follower.log_health() {
            reasons
                .push(format!("the control log could not be read for {} s; the last state is served", age.as_secs()));
        }
        if let Some(stopped) = &self.registry.state().changes_stopped {
            reasons.push(Refusal::ChangesStopped(stopped.clone()).to_string());
        }
        reasons.extend(self.memory.alarms());
        reasons.extend(self.uploads.as_ref().and_then(Uploads::problem));
        reasons.extend(self.audits.iter().flat_map(Audits::problems));
        reasons.extend(self.drift.as_ref().and_then(|drift| drift.problem()));
        reasons.extend(self.exposures.as_ref().and_then(|exposures| exposures.problem()));
        reasons.extend(self.store_problem.lock().unwrap_or_else(PoisonError::into_inner).clone());
        if served.definitions.is_none() && served.problems.is_empty() {
            reasons.push("no definitions are applied yet; run `coeval apply`".to_owned());
        }
        let degraded = !reasons.is_empty();
        Readiness { ready, degraded, reasons }
    }

    /// Why only a new process can help, if that is so. What answers nobody by itself is no reason to end what does.
    pub fn stuck(&self) -> Option<String> {
        let served = self.served();
        let stuck = served.models.values().find_map(|model| Some((model.name.clone(), model.server.stuck()?)));
        stuck.map(|(name, reason)| format!("model `{name}`: {reason}"))
    }

    /// For whoever changed something: what of it is not served yet.
    pub fn pending(&self) -> Vec<String> {
        let served = self.served();
        let mut reasons = served.problems.clone();
        if served.definitions.is_none() && reasons.is_empty() {
            reasons.push("no definitions are applied yet; run `coeval apply`".to_owned());
        }
        reasons.extend(served.missing.iter().map(|name| format!("model `{name}` is not loaded")));
        // One that has failed is told by its own endpoint, and by `problems` where requests may need it.
        for (name, versions) in &served.versions {
            let active = versions.iter().filter(|(_, version)| version.standing > Standing::Preparing);
            let loading = active.filter(|(_, version)| version.state.loading);
            reasons.extend(loading.map(|(number, _)| format!("version {number} of model `{name}` is being loaded")));
        }
        if let Some(events) = &self.events {
            reasons.extend(events.backfilling());
        }
        reasons
    }

    /// Views that another process has yet to fill. Those of files that change wait for somebody to materialize them.
    pub async fn pending_elsewhere(&self, served: &Served) -> Vec<String> {
        let Some(definitions) = served.definitions.as_ref().filter(|_| !self.roles.has(Role::Ingest)) else {
            return Vec::new();
        };
        let is_ready = self.ready_views(served).await;
        let views = definitions.plan.views.iter().zip(is_ready).filter(|(_, is_ready)| !is_ready);
        let filled = views.filter(|(view, _)| view.source.is_static() || view.source.is_stream());
        let text =
            |name: &str| format!("view `{name}` does not answer yet: the process with the role `ingest` fills it");
        filled.map(|(view, _)| text(&view.name)).collect()
    }

    /// Which views of the plan answer online, in its order. None of them while the store is away.
    pub async fn ready_views(&self, served: &Served) -> Vec<bool> {
        let Some(definitions) = &served.definitions else { return Vec::new() };
        let views = &definitions.plan.views;
        let fact = |view: &Arc<feature_defs::plan::ViewPlan>| {
            Read::Fact(Generation::new(self.project.as_str(), &view.name, view.storage_digest.as_str()).ready_fact())
        };
        let reads: Vec<Read> = views.iter().map(fact).collect();
        match self.store.read(&reads).await {
            Ok(answers) => answers.iter().map(|answer| matches!(answer, Answer::Fact(Some(_)))).collect(),
            Err(error) => {
                tracing::warn!(%error, "the online store could not say which views are ready");
                vec![false; views.len()]
            }
        }
    }

    /// Asks the online store how it is, and remembers the answer for [`Gateway::readiness`].
    pub async fn look_at_store(&self) {
        let problem = match self.store.ping().await {
            Err(error) => Some(error.to_string()),
            // It answers; it may still be about to stop, or have lost what would take over.
            Ok(()) => self.store.report().await.ok().and_then(|nodes| {
                let problems = nodes.iter().flat_map(|node| {
                    node.problems.iter().map(|problem| format!("the online store at {}: {problem}", node.place))
                });
                problems.reduce(|all, problem| format!("{all}; {problem}"))
            }),
        };
        *self.store_problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

/// The place of a tier among those of the model.
fn tier(plan: &ModelPlan, name: &str) -> Result<usize, Failure> {
    if name.is_empty() {
        return Ok(0);
    }
    let found = plan.tiers.iter().position(|tier| tier == name);
    let what = || format!("tier of model `{}` named", plan.name);
    found.ok_or_else(|| {
        let message = crate::status::not_known(&what(), name, plan.tiers.iter().map(String::as_str));
        Failure::invalid(message)
    })
}

/// The sooner of what the caller asks for and what the model declares.
fn deadline(started: Instant, asked_ms: u32, declared: Option<Duration>) -> Instant {
    let asked = (asked_ms > 0).then(|| Duration::from_millis(u64::from(asked_ms)));
    let sooner = [asked, declared].into_iter().flatten().min();
    started + sooner.unwrap_or(DEADLINE).min(DEADLINE_MAX)
}

pub(crate) fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}
