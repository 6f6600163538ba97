//! What is served, and how it follows the control log.
//!
//! The log says what should be; the process serves the last state that it could make real. Every 250 ms the log is read.
//! A new entry is made real aside - definitions compiled, streams adopted, versions of models loaded by `versions` - and then
//! put in place by swapping one pointer; requests take that pointer once, on arrival. Nothing here waits for a model: what is
//! being loaded is served when it is there, and until then the version before it. What fails leaves the last good state in
//! place, is told by `/ready` and tried again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::catalog::{Files, SourceFile};
use feature_defs::forgotten::Forgotten;
use feature_defs::plan::{ModelPlan, Plan, SourceSchemas, ViewPlan, compile_definitions};
use feature_defs::value::Type;
use registry::Registry;
use registry::deployment::Standing;
use registry::id::{EntryNumber, ProjectName};
use registry::model::{InputColumns, ModelRecord};
use registry::state::{Catalog, Project};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio_util::sync::CancellationToken;

use crate::events::Events;
use crate::flags::{self, ServedFlags};
use crate::kept::Kept;
use crate::metrics::Metrics;
use crate::response_cache;
use crate::rollout::trial::{Trial, Trials};
use crate::status::{Failure, Kind, chain};
use crate::versions::{ServedModel, VersionState, Versions, Wanted};

const POLL: Duration = Duration::from_millis(250);
/// Between looks whether the log is still there: following cannot tell one that was taken away from one that is quiet.
const LOOK_FOR_LOG: Duration = Duration::from_secs(2);
/// How long something that failed is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What requests are answered by. Never changed, only replaced.
pub struct Served {
    /// The last entry of the control log that was looked at.
    pub head: EntryNumber,
    /// None before the first `apply`.
    pub definitions: Option<Definitions>,
    /// By name: what answers requests that name no version.
    pub models: BTreeMap<String, Arc<ServedModel>>,
    /// By name and number: every version that the log wants here.
    pub versions: BTreeMap<String, BTreeMap<u32, Version>>,
    /// By name: rollouts that run, as far as they can be served here.
    pub trials: BTreeMap<String, Arc<Trial>>,
    /// By name: models that are turned off.
    pub off: BTreeMap<String, Off>,
    /// Models that the log has a champion of and that no version is served of.
    pub missing: Vec<String>,
    pub flags: Arc<ServedFlags>,
    /// What the log says and is not so, with the reason. Of models, only of those that answer and those kept for rollback.
    pub problems: Vec<String>,
}

/// A version that the log wants here, and how far it is.
#[derive(Clone)]
pub struct Version {
    pub standing: Standing,
    pub state: VersionState,
}

/// That a model is turned off.
#[derive(Debug, Clone)]
pub struct Off {
    /// What its rows are told.
    pub reason: String,
}

#[derive(Clone)]
pub struct Definitions {
    pub entry: EntryNumber,
    pub catalog_digest: registry::id::Digest,
    pub plan: Arc<Plan>,
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
    pub versions: Arc<Versions>,
    metrics: Arc<Metrics>,
    /// For definitions of earlier entries while the object store is away.
    pub kept: Option<Kept>,
    served: watch::Sender<Arc<Served>>,
    /// One follows at a time.
    working: AsyncMutex<Working>,
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
    trials: Trials,
    /// When the log was last seen to be there.
    looked: Option<Instant>,
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
            versions: BTreeMap::new(),
            trials: BTreeMap::new(),
            off: BTreeMap::new(),
            missing: Vec::new(),
            flags: Arc::default(),
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

    /// The model that answers, or why none does. Without a version, the champion.
    pub fn model(&self, name: &str, version: u32) -> Result<&Arc<ServedModel>, Failure> {
        match (version, self.models.get(name)) {
            (0, Some(model)) => return Ok(model),
            (0, None) if self.missing.iter().any(|missing| missing == name) => {
                let why = self.problems.iter().find(|problem| problem.contains(&format!("`{name}`")));
                let why = why.map_or("it is being loaded", String::as_str);
                let text = format!("model `{name}` is deployed, but not served: {why}");
                return Err(Failure::new(Kind::Unavailable, text));
            }
            // It may have the traffic here longer than the log says, because the next one is not there yet.
            (_, Some(model)) if model.version == version => return Ok(model),
            _ => {}
        }
        if let Some(found) = self.versions.get(name).and_then(|versions| versions.get(&version)) {
            let state = &found.state;
            return match &state.ready {
                _ if found.standing == Standing::Preparing => {
                    let text = format!("version {version} of model `{name}` is being prepared, and not active yet");
                    Err(Failure::new(Kind::Precondition, text))
                }
                Some(model) => Ok(model),
                None => {
                    let why = state.failure.as_ref().map_or("it is being loaded", |failure| &failure.message);
                    let text = format!("version {version} of model `{name}` is active, but not served here: {why}");
                    Err(Failure::new(Kind::Unavailable, text))
                }
            };
        }
        let plan = self.plan()?;
        if plan.model(name).is_none() && !self.versions.contains_key(name) {
            return Err(Failure::unknown("model", name, plan.models.iter().map(|model| &*model.name)));
        }
        let text = if version == 0 {
            format!("model `{name}` has no deployed version; run `coeval model deploy`")
        } else {
            let active = self.versions.get(name).into_iter().flatten();
            let active = active.filter(|(_, other)| other.standing > Standing::Preparing);
            let active: Vec<String> = active.map(|(number, _)| number.to_string()).collect();
            let active =
                if active.is_empty() { "none is".to_owned() } else { format!("active: {}", active.join(", ")) };
            format!("version {version} of model `{name}` is not active ({active}); run `coeval model deploy`")
        };
        Err(Failure::new(Kind::Precondition, text))
    }

    /// Versions that could not be loaded and are to be tried again.
    fn loads_failed(&self) -> usize {
        let versions = self.versions.values().flat_map(BTreeMap::values);
        versions.filter(|version| version.state.failure.is_some() && version.standing > Standing::Preparing).count()
    }

    /// Every version that is loaded and wanted, those that are being prepared included.
    pub fn loaded(&self) -> impl Iterator<Item = &Arc<ServedModel>> {
        self.versions.values().flat_map(BTreeMap::values).filter_map(|version| version.state.ready.as_ref())
    }
}

impl Follower {
    pub fn new(
        registry: Arc<Registry>,
        project: ProjectName,
        events: Option<Arc<dyn Events>>,
        versions: Versions,
        metrics: Arc<Metrics>,
    ) -> Follower {
        Follower {
            registry,
            project,
            events,
            versions: Arc::new(versions),
            metrics,
            kept: None,
            served: watch::Sender::new(Arc::new(Served::empty())),
            working: AsyncMutex::default(),
            log: Mutex::new(LogHealth { read: Instant::now(), error: None }),
        }
    }

    /// The state in force. Never waits.
    pub fn served(&self) -> Arc<Served> {
        self.served.borrow().clone()
    }

    /// Tells of every new state.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Served>> {
        self.served.subscribe()
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
                () = self.versions.changed.notified() => {}
            }
            if let Some(percent) = inference::memory::used_percent() {
                self.served().loaded().for_each(|model| model.server.memory_used(percent));
            }
            tokio::select! {
                () = stop.cancelled() => return,
                _ = self.follow(Retry::Later) => {}
            }
        }
    }

    /// Reads the log to its head and makes it real as far as that is possible.
    pub async fn follow(&self, retry: Retry) -> Arc<Served> {
        let mut working = self.working.lock().await;
        let mut refreshed = self.registry.refresh().await;
        let is_well = self.log_health().1.is_none();
        if refreshed.is_ok() && !(is_well && working.looked.is_some_and(|looked| looked.elapsed() < LOOK_FOR_LOG)) {
            let found = self.registry.look_for_head().await;
            working.looked = found.is_ok().then(Instant::now);
            refreshed = found.and(refreshed);
        }
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
        let is_well = before.problems.is_empty() && before.loads_failed() == 0;
        let nothing_to_try = is_well || (retry == Retry::Later && tried_lately);
        if before.head == state.head && !self.versions.take_news() && nothing_to_try {
            return before;
        }
        working.tried = Some(Instant::now());
        let project = state.project(self.project.as_str());
        let flags = flags::follow(&before.flags, project.map(|project| &project.flags), &self.metrics.flags).await;
        let served = match project {
            Some(project) => self.realise(&mut working, project, state.head, &before, retry).await,
            None => Served { head: state.head, ..Served::empty() },
        };
        let served = Served { flags, ..served };
        for problem in served.problems.iter().filter(|problem| !before.problems.contains(problem)) {
            self.metrics.follow_failed();
            tracing::error!(head = %state.head, problem, "the control log could not be followed; the last good state is served");
        }
        let served = Arc::new(served);
        self.served.send_replace(served.clone());
        served
    }

    async fn realise(
        &self,
        working: &mut Working,
        project: &Project,
        head: EntryNumber,
        before: &Served,
        retry: Retry,
    ) -> Served {
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
        let mut wanted = Vec::new();
        let mut used = Vec::new();
        let mut pinned: Vec<Arc<ViewPlan>> = Vec::new();
        for (name, deployment) in &project.deployments {
            for (version, wanted_by) in deployment.wanted() {
                let Some(record) = project.model(name.as_str(), version) else { continue };
                // What the version reads goes on being written, also while it is merely kept for rollback.
                let plan = match self.plan_of(working, definitions.as_ref(), record).await {
                    Ok((plan, true)) => {
                        used.push(record.definitions);
                        pinned.extend(plan.service.inputs.iter().map(|input| input.view.clone()));
                        Ok(plan)
                    }
                    plan => plan.map(|(plan, _)| plan),
                };
                let insists = deployment.standing(version) > Standing::Preparing;
                wanted.push(Wanted { record, wanted_by, plan, insists });
            }
        }
        working.earlier.retain(|entry, _| used.contains(entry));
        if let Some(found) = &definitions
            && let Err(error) = self.adopt(working, &found.plan, pinned).await
        {
            problems.push(format!("the streams of entry {} could not be taken: {error}", found.entry));
            definitions = before.definitions.clone();
        }
        self.versions.reconcile(wanted, retry);
        let mut served = Served { head, definitions, problems, ..Served::empty() };
        for ((name, version), state) in self.versions.states() {
            let standing = project.standing(name.as_str(), version);
            let versions = served.versions.entry(name.to_string()).or_default();
            versions.insert(version.0, Version { standing, state });
        }
        for (name, deployment) in &project.deployments {
            if self.versions.is_idle {
                break;
            }
            let Some(champion) = deployment.champion_version() else { continue };
            let name = name.to_string();
            let of = |version: u32| served.versions.get(&name).and_then(|versions| versions.get(&version));
            let state = of(champion.0).map(|version| &version.state);
            let model = state.and_then(|state| state.ready.clone());
            // What answered before goes on until the new one is there.
            let model = model.or_else(|| before.models.get(&name).cloned());
            let told = [Some(champion), deployment.previous_version()].into_iter().flatten();
            for version in told {
                let failure = of(version.0).and_then(|version| version.state.failure.as_ref());
                let Some(failure) = failure else { continue };
                let mut text = format!("version {version} of model `{name}`: {}", failure.message);
                if let Some(still) = model.as_ref().filter(|_| version == champion) {
                    text += &format!("; version {} is still served", still.version);
                }
                served.problems.push(text);
            }
            match model {
                Some(model) => {
                    served.models.insert(name, model);
                }
                None => served.missing.push(name),
            }
        }
        try_out(&mut working.trials, project, &mut served);
        response_cache::follow(&served);
        served
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
                let catalog = Kept::catalog(self.kept.as_ref(), &self.registry, entry).await?;
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

    /// The plan by which a version would be served.
    pub async fn plan_for(&self, record: &ModelRecord) -> Result<Arc<ModelPlan>, Failure> {
        let mut working = self.working.lock().await;
        let served = self.served();
        let (plan, _) = self.plan_of(&mut working, served.definitions.as_ref(), record).await?;
        Ok(plan)
    }
}

/// Puts the rollouts that run, and what is turned off, into what is served.
fn try_out(trials: &mut Trials, project: &Project, served: &mut Served) {
    let holdout = project.flags.holdout.as_ref().map(|(holdout, _)| holdout);
    let mut running = Vec::new();
    for (name, deployment) in &project.deployments {
        if let Some(off) = &deployment.off {
            let why = off.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            let reason = format!("the model is off since entry {} of the control log{why}", off.entry);
            served.off.insert(name.to_string(), Off { reason });
        }
        let Some(rollout) = deployment.rollout.as_deref() else { continue };
        running.push(rollout.begun.entry);
        let versions = served.versions.get(name.as_str());
        let challenger = versions.and_then(|versions| versions.get(&rollout.version.0)?.state.ready.clone());
        match trials.prepare(rollout, holdout) {
            Ok(prepared) => {
                let trial = Trial::of(name.as_str(), deployment, prepared, challenger);
                served.trials.extend(trial.map(|trial| (name.to_string(), Arc::new(trial))));
            }
            Err(problem) => {
                let text = format!(
                    "the rollout of version {} of model `{name}` is not served here: {problem}",
                    rollout.version
                );
                served.problems.push(text);
            }
        }
    }
    trials.retain(&running);
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
