//! What is served, and how it follows the control log.
//!
//! The log says what should be; the process serves the last state that it could make real. Every 250 ms the log is read.
//! A new entry is made real aside - definitions compiled, streams adopted, models loaded and warmed up - and then put in
//! place by swapping one pointer; requests take that pointer once, on arrival. What fails leaves the last good state in
//! place, is told by `/ready` and tried again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::catalog::{BatchingPolicy, Files, Runtime as RuntimeKind, SourceFile};
use feature_defs::forgotten::Forgotten;
use feature_defs::plan::{ModelPlan, Plan, SourceSchemas, ViewPlan, compile_definitions};
use feature_defs::value::Type;
use inference::batch::{BatchLimits, Policy};
use inference::executor::{FORWARD_MAX, MemoryLimits, ModelServer, ServerOptions};
use inference::model::{Artefact, Device, Devices, LoadOptions, Runtime};
use inference::placement::{self, Placed};
use registry::Registry;
use registry::id::{EntryNumber, ProjectName};
use registry::model::{InputColumns, ModelRecord};
use registry::state::{Catalog, Project};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio_util::sync::CancellationToken;

use crate::events::Events;
use crate::metrics::Metrics;
use crate::predict::spec_of;
use crate::status::{Failure, Kind, chain};

const POLL: Duration = Duration::from_millis(250);
/// How long something that failed is left alone: a model that does not load costs seconds each time.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// A forward that takes so many times the declared deadline is taken not to end at all, and this long at least: machines
/// stop for a second now and then.
const FORWARD_DEADLINES_MAX: u32 = 20;
const FORWARD_BOUND_MIN: Duration = Duration::from_secs(2);

/// What requests are answered by. Never changed, only replaced.
pub struct Served {
    /// The last entry of the control log that was looked at.
    pub head: EntryNumber,
    /// None before the first `apply`.
    pub definitions: Option<Definitions>,
    /// By name; one version each.
    pub models: BTreeMap<String, Arc<ServedModel>>,
    /// Models that the log deploys and that no version is served of.
    pub missing: Vec<String>,
    /// What the log says and is not so, with the reason.
    pub problems: Vec<String>,
}

#[derive(Clone)]
pub struct Definitions {
    pub entry: EntryNumber,
    pub catalog_digest: registry::id::Digest,
    pub plan: Arc<Plan>,
}

/// A version of a model, ready to run.
pub struct ServedModel {
    pub name: Arc<str>,
    pub version: u32,
    /// How its features are computed, and the policy for it.
    pub plan: Arc<ModelPlan>,
    pub server: Arc<ModelServer>,
}

/// How eager a look at the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// What failed is tried again now.
    Now,
    /// What failed is left alone for a while.
    Later,
}

pub struct Follower {
    registry: Arc<Registry>,
    project: ProjectName,
    events: Option<Arc<dyn Events>>,
    runtime: Option<Arc<dyn Runtime>>,
    metrics: Arc<Metrics>,
    served: watch::Sender<Arc<Served>>,
    /// One follows at a time.
    working: AsyncMutex<Working>,
    /// Versions that a deploy has warmed up and not yet written to the log. As many as deploys under way.
    prepared: Mutex<BTreeMap<(String, u32), Arc<ServedModel>>>,
    log: Mutex<LogHealth>,
}

#[derive(Default)]
struct Working {
    /// The plan that events were told of, and the storage digests of the views pinned beside it.
    adopted: Option<(Arc<Plan>, Vec<String>)>,
    /// Plans of earlier definitions that a served version needs.
    earlier: BTreeMap<EntryNumber, Arc<Plan>>,
    /// What all plans here were told of entities that were forgotten.
    forgotten: Arc<Forgotten>,
    tried: Option<Instant>,
}

struct LogHealth {
    read: Instant,
    error: Option<String>,
}

impl Served {
    fn empty() -> Served {
        Served {
            head: EntryNumber::NONE,
            definitions: None,
            models: BTreeMap::new(),
            missing: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// The plan in force, or why there is none.
    pub fn plan(&self) -> Result<&Arc<Plan>, Failure> {
        self.definitions.as_ref().map(|definitions| &definitions.plan).ok_or_else(|| match self.problems.first() {
            Some(problem) => Failure::new(Kind::Unavailable, format!("no definitions are served yet: {problem}")),
            None => Failure::new(Kind::Precondition, "no definitions are applied yet; run `coeval apply`"),
        })
    }

    /// The model that answers, or why none does.
    pub fn model(&self, name: &str, version: u32) -> Result<&Arc<ServedModel>, Failure> {
        if let Some(model) = self.models.get(name) {
            if version == 0 || version == model.version {
                return Ok(model);
            }
            let text = format!("version {version} of model `{name}` is not deployed; version {} is", model.version);
            return Err(Failure::new(Kind::Precondition, text));
        }
        if self.missing.iter().any(|missing| missing == name) {
            let why = self.problems.iter().find(|problem| problem.contains(&format!("`{name}`")));
            let why = why.map_or("it is being loaded", String::as_str);
            return Err(Failure::new(Kind::Unavailable, format!("model `{name}` is deployed, but not served: {why}")));
        }
        let plan = self.plan()?;
        if plan.model(name).is_some() {
            let text = format!("model `{name}` has no deployed version; run `coeval model deploy`");
            return Err(Failure::new(Kind::Precondition, text));
        }
        Err(Failure::unknown("model", name, plan.models.iter().map(|model| &*model.name)))
    }
}

impl Follower {
    pub fn new(
        registry: Arc<Registry>,
        project: ProjectName,
        events: Option<Arc<dyn Events>>,
        runtime: Option<Arc<dyn Runtime>>,
        metrics: Arc<Metrics>,
    ) -> Follower {
        Follower {
            registry,
            project,
            events,
            runtime,
            metrics,
            served: watch::Sender::new(Arc::new(Served::empty())),
            working: AsyncMutex::default(),
            prepared: Mutex::default(),
            log: Mutex::new(LogHealth { read: Instant::now(), error: None }),
        }
    }

    /// The state in force. Never waits.
    pub fn served(&self) -> Arc<Served> {
        self.served.borrow().clone()
    }

    /// How long ago the log was read, and why not later.
    pub fn log_health(&self) -> (Duration, Option<String>) {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        (log.read.elapsed(), log.error.clone())
    }

    /// Follows until the token is cancelled.
    pub async fn run(&self, stop: CancellationToken) {
        let mut interval = tokio::time::interval(POLL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = interval.tick() => {}
            }
            if let Some(percent) = inference::memory::used_percent() {
                self.served().models.values().for_each(|model| model.server.memory_used(percent));
            }
            // A load under way is given up on shutdown; its threads end by themselves.
            tokio::select! {
                () = stop.cancelled() => return,
                _ = self.follow(Retry::Later) => {}
            }
        }
    }

    /// Reads the log to its head and makes it real as far as that is possible.
    pub async fn follow(&self, retry: Retry) -> Arc<Served> {
        let mut working = self.working.lock().await;
        let refreshed = self.registry.refresh().await;
        {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            match &refreshed {
                Ok(_) => *log = LogHealth { read: Instant::now(), error: None },
                Err(error) => {
                    let text = chain(error);
                    if log.error.as_ref() != Some(&text) {
                        tracing::warn!(error = text, "the control log cannot be read; the last state is served");
                    }
                    log.error = Some(text);
                }
            }
        }
        let state = self.registry.state();
        let before = self.served();
        let tried_lately = working.tried.is_some_and(|tried| tried.elapsed() < RETRY_AFTER);
        if before.head == state.head && (before.problems.is_empty() || (retry == Retry::Later && tried_lately)) {
            return before;
        }
        working.tried = Some(Instant::now());
        let served = match state.project(self.project.as_str()) {
            Some(project) => self.realise(&mut working, project, state.head, &before).await,
            None => Served { head: state.head, ..Served::empty() },
        };
        for problem in served.problems.iter().filter(|problem| !before.problems.contains(problem)) {
            self.metrics.follow_failed();
            tracing::error!(head = %state.head, problem, "the control log could not be followed; the last good state is served");
        }
        let served = Arc::new(served);
        self.served.send_replace(served.clone());
        served
    }

    async fn realise(&self, working: &mut Working, project: &Project, head: EntryNumber, before: &Served) -> Served {
        let mut problems = Vec::new();
        let forgotten = crate::forget::listed(project);
        // The list only grows. Whoever writes follows it before anybody is told of the entry.
        if forgotten.len() != working.forgotten.len() {
            let known = before.definitions.iter().map(|definitions| &definitions.plan);
            known.chain(working.earlier.values()).for_each(|plan| plan.forget(&forgotten));
            if let Some(events) = &self.events {
                events.follow_forgotten(&forgotten).await;
            }
            working.forgotten = forgotten;
        }
        let mut definitions = match self.compile(project, before).await {
            Ok(definitions) => Some(definitions),
            Err(problem) => {
                problems.push(problem);
                before.definitions.clone()
            }
        };
        definitions.iter().for_each(|definitions| definitions.plan.forget(&working.forgotten));
        let mut planned = Vec::new();
        let mut used = Vec::new();
        let mut pinned: Vec<Arc<ViewPlan>> = Vec::new();
        for (name, deployment) in &project.deployments {
            let version = |version| project.model(name.as_str(), version);
            // The version before is kept for rollback: what it reads goes on being written.
            for record in [version(deployment.active), deployment.previous.and_then(version)].into_iter().flatten() {
                let plan = self.plan_of(working, definitions.as_ref(), record).await;
                if let Ok((plan, true)) = &plan {
                    used.push(record.definitions);
                    pinned.extend(plan.service.inputs.iter().map(|input| input.view.clone()));
                }
                if record.version == deployment.active {
                    planned.push((record, plan));
                }
            }
        }
        working.earlier.retain(|entry, _| used.contains(entry));
        if let Some(found) = &definitions
            && let Err(error) = self.adopt(working, &found.plan, pinned).await
        {
            problems.push(format!("the streams of entry {} could not be taken: {error}", found.entry));
            definitions = before.definitions.clone();
        }
        let mut models = BTreeMap::new();
        let mut missing = Vec::new();
        for (record, plan) in planned {
            let name = record.model.name.to_string();
            let served = before.models.get(&name);
            let realised = match plan {
                Ok((plan, _)) => self.realise_model(record, plan, served).await,
                Err(failure) => Err(failure),
            };
            match (realised, served) {
                (Ok(model), _) => {
                    models.insert(name, model);
                }
                (Err(failure), Some(served)) => {
                    let (version, still) = (record.version, served.version);
                    let text = format!(
                        "version {version} of model `{name}`: {}; version {still} is still served",
                        failure.message
                    );
                    problems.push(text);
                    models.insert(name, served.clone());
                }
                (Err(failure), None) => {
                    problems.push(format!("version {} of model `{name}`: {}", record.version, failure.message));
                    missing.push(name);
                }
            }
        }
        Served { head, definitions, models, missing, problems }
    }

    async fn compile(&self, project: &Project, before: &Served) -> Result<Definitions, String> {
        let catalog = project.catalog();
        let entry = project.applied.fact.entry;
        let plan = match &before.definitions {
            Some(definitions) if definitions.entry == entry => definitions.plan.clone(),
            _ => compile(&self.project, catalog).await?,
        };
        Ok(Definitions { entry, catalog_digest: catalog.digest.clone(), plan })
    }

    /// Tells events of the plan, and of the views beside it, when either changed.
    async fn adopt(
        &self,
        working: &mut Working,
        plan: &Arc<Plan>,
        mut pinned: Vec<Arc<ViewPlan>>,
    ) -> Result<(), String> {
        let Some(events) = &self.events else { return Ok(()) };
        let same = |a: &ViewPlan, b: &ViewPlan| a.name == b.name && a.storage_digest == b.storage_digest;
        pinned.retain(|view| !plan.views.iter().any(|other| same(view, other)));
        pinned.sort_by(|a, b| (&a.name, &a.storage_digest).cmp(&(&b.name, &b.storage_digest)));
        pinned.dedup_by(|a, b| same(a, b));
        let digests: Vec<String> = pinned.iter().map(|view| format!("{}@{}", view.name, view.storage_digest)).collect();
        if working.adopted.as_ref().is_some_and(|(known, others)| Arc::ptr_eq(known, plan) && *others == digests) {
            return Ok(());
        }
        events.adopt(plan.clone(), &pinned).await.map_err(|error| chain(&error))?;
        working.adopted = Some((plan.clone(), digests));
        Ok(())
    }

    /// The plan that a version is served by: that of the definitions in force, while they give the model what it was
    /// registered with, else that of its own definitions. The flag says which.
    async fn plan_of(
        &self,
        working: &mut Working,
        definitions: Option<&Definitions>,
        record: &ModelRecord,
    ) -> Result<(Arc<ModelPlan>, bool), Failure> {
        let name = record.model.name.as_str();
        if let Some(plan) = definitions.and_then(|definitions| definitions.plan.model(name))
            && fits(plan, record)
        {
            return Ok((plan.clone(), false));
        }
        let entry = record.definitions;
        let plan = match working.earlier.get(&entry) {
            Some(plan) => plan.clone(),
            None => {
                let catalog = self.registry.catalog(entry).await?;
                let problem = |text| Failure::new(Kind::Precondition, text);
                let plan = compile(&self.project, &catalog).await.map_err(problem)?;
                plan.forget(&working.forgotten);
                working.earlier.insert(entry, plan.clone());
                plan
            }
        };
        let plan = plan.model(name).filter(|plan| fits(plan, record)).cloned().ok_or_else(|| {
            let text = format!(
                "this build computes other features for it than entry {entry} says, by which it was trained; serve it \
                 with the build that registered it, or train it again"
            );
            Failure::new(Kind::Precondition, text)
        })?;
        Ok((plan, true))
    }

    async fn realise_model(
        &self,
        record: &ModelRecord,
        plan: Arc<ModelPlan>,
        served: Option<&Arc<ServedModel>>,
    ) -> Result<Arc<ServedModel>, Failure> {
        let key = (record.model.name.to_string(), record.version.0);
        let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let running = [served, prepared.as_ref()].into_iter().flatten();
        for running in running.filter(|running| running.version == record.version.0) {
            if Arc::ptr_eq(&running.plan, &plan) {
                return Ok(running.clone());
            }
            // Policy may have changed; the executors stay as long as they would be started the same.
            if options(&running.plan) == options(&plan)
                && running.plan.tiers == plan.tiers
                && spec_of(&running.plan) == spec_of(&plan)
            {
                let server = running.server.clone();
                return Ok(Arc::new(ServedModel {
                    plan,
                    server,
                    name: running.name.clone(),
                    version: running.version,
                }));
            }
        }
        self.start(record, plan).await
    }

    async fn start(&self, record: &ModelRecord, plan: Arc<ModelPlan>) -> Result<Arc<ServedModel>, Failure> {
        let name = record.model.name.as_str();
        let Some(runtime) = self.runtime.clone() else {
            let text = "this build has no torch, so it cannot run models; use a `coeval` that was built with it";
            return Err(Failure::new(Kind::Unsupported, text));
        };
        if plan.runtime != RuntimeKind::TorchScript {
            let text = format!("model `{name}` has a runtime that this version cannot run; export it as torchscript");
            return Err(Failure::new(Kind::Unsupported, text));
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        placement::check_threads(plan.executors as usize, plan.threads as usize, cores)?;
        let bytes = self.registry.artifacts().get(&record.model.artifact).await?;
        let artefact = Artefact::new(record.model.artifact.location.clone(), bytes.as_ref());
        let served = self.served();
        // The version that it replaces runs until it is there, so that both are in memory for a while.
        let devices = placed_on(&plan);
        let beside = served.models.values().filter(|other| placed_on(&other.plan).overlaps(devices));
        let taken = beside.filter_map(|other| Some(other.server.footprint()?.bytes())).sum();
        // It may have to open libtorch, which takes a while.
        let asked = runtime.clone();
        let capacity = tokio::task::spawn_blocking(move || capacity(&*asked, devices)).await.unwrap_or(None);
        let memory = MemoryLimits { capacity, others: taken };
        let options = ServerOptions { memory, ..options(&plan) };
        let version = record.version.0;
        let server =
            ModelServer::start(&format!("{name}/{version}"), runtime, artefact, spec_of(&plan), options).await?;
        let model = ServedModel { name: name.into(), version, plan, server: Arc::new(server) };
        let others = served.models.values().filter(|other| *other.name != *name);
        let others: Vec<Placed> = others.map(|other| placed(other)).collect();
        placement::check(&placed(&model), &others, cores)?;
        tracing::info!(model = name, version, "a model is loaded and warm");
        Ok(Arc::new(model))
    }

    /// Loads and warms up a version that is about to be deployed, so that nothing moves if it cannot run. It is kept
    /// until the guard is dropped.
    pub async fn prepare(&self, record: &ModelRecord) -> Result<Prepared<'_>, Failure> {
        let mut working = self.working.lock().await;
        let served = self.served();
        let (plan, _) = self.plan_of(&mut working, served.definitions.as_ref(), record).await?;
        drop(working);
        let running = served.models.get(record.model.name.as_str());
        let model = self.realise_model(record, plan, running).await?;
        let key = (record.model.name.to_string(), record.version.0);
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), model);
        Ok(Prepared { follower: self, key })
    }
}

/// A version that is warm and not yet deployed.
pub struct Prepared<'a> {
    follower: &'a Follower,
    key: (String, u32),
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        self.follower.prepared.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Everything about the executors that a definition can change.
fn options(plan: &ModelPlan) -> ServerOptions {
    let policy = match plan.batching {
        BatchingPolicy::Adaptive => Policy::Adaptive,
        BatchingPolicy::Window(window) => Policy::Window(window),
    };
    let limits = BatchLimits::new(plan.max_rows as usize, plan.max_queue_rows as usize)
        .with_policy(policy)
        .with_tiers(plan.tiers.len())
        .with_deadline(declared_deadline(plan));
    ServerOptions {
        executors: plan.executors as usize,
        devices: placed_on(plan),
        load: LoadOptions { threads: plan.threads as usize, ..LoadOptions::default() },
        forward_max: forward_max(plan),
        ..ServerOptions::new(limits)
    }
}

/// Where a model is placed. The check of the definitions has seen the names.
fn placed_on(plan: &ModelPlan) -> Devices {
    Devices::from_names(plan.devices.iter().map(String::as_str)).unwrap_or(Devices::CPU)
}

/// The memory of the smallest of the devices.
fn capacity(runtime: &dyn Runtime, devices: Devices) -> Option<u64> {
    let of = |device| match device {
        Device::Cpu => inference::memory::capacity(),
        Device::Cuda(_) => runtime.device_memory(device).map(|memory| memory.total),
    };
    devices.iter().filter_map(of).min()
}

/// When a forward is taken not to end: long after everybody who waited for it has gone.
fn forward_max(plan: &ModelPlan) -> Duration {
    let declared = declared_deadline(plan).map(|deadline| deadline.saturating_mul(FORWARD_DEADLINES_MAX));
    declared.map_or(FORWARD_MAX, |bound| bound.clamp(FORWARD_BOUND_MIN, FORWARD_MAX))
}

/// A model as its neighbours on the device feel it.
fn placed(model: &ServedModel) -> Placed {
    let plan = &model.plan;
    Placed {
        name: model.name.to_string(),
        executors: plan.executors as usize,
        threads: plan.threads as usize,
        batch: model.server.longest_forward(),
        deadline: declared_deadline(plan),
    }
}

/// The deadline that the definitions give the requests of a model.
pub(crate) fn declared_deadline(plan: &ModelPlan) -> Option<Duration> {
    plan.deadline.and_then(|micros| u64::try_from(micros).ok()).map(Duration::from_micros)
}

/// Whether a plan gives a version exactly what it was registered with.
fn fits(plan: &ModelPlan, record: &ModelRecord) -> bool {
    plan.service.semantic_digest.as_str() == record.model.service_digest.as_str()
        && input_columns(plan) == record.model.inputs
}

/// The tensors of a model and the features that fill them, as the control log remembers them.
pub fn input_columns(plan: &ModelPlan) -> Vec<InputColumns> {
    let columns = |features: &[usize]| features.iter().map(|index| plan.service.outputs[*index].name.clone()).collect();
    plan.inputs
        .iter()
        .map(|input| InputColumns {
            name: input.name.clone(),
            dtype: input.dtype.value_type().to_string(),
            columns: columns(&input.features),
        })
        .collect()
}

/// Compiles the definitions of a catalog, off the threads that answer requests.
pub(crate) async fn compile(project: &ProjectName, catalog: &Catalog) -> Result<Arc<Plan>, String> {
    let mut schemas = SourceSchemas::new();
    for (source, schema) in &catalog.source_schemas {
        let columns: Vec<(String, Type)> = serde_json::from_value(schema.clone())
            .map_err(|error| format!("the schema of source `{source}` in the control log cannot be read: {error}"))?;
        schemas.insert(source.to_string(), columns);
    }
    let files = catalog.files.iter();
    let files = files.map(|(path, text)| SourceFile { path: path.clone(), text: text.clone() }).collect();
    let files = Files::new(files);
    let project = project.to_string();
    let compiled = tokio::task::spawn_blocking(move || compile_definitions(&project, &files, &schemas)).await;
    match compiled {
        Ok(Ok(plan)) => Ok(Arc::new(plan)),
        Ok(Err(diagnostics)) => {
            let first = diagnostics.first().map_or_else(String::new, |diagnostic| diagnostic.message.clone());
            Err(format!(
                "the applied definitions do not compile here, with {} errors ({first}); apply them with this build",
                diagnostics.len()
            ))
        }
        Err(error) => Err(format!("the compiler ended early: {error}")),
    }
}
