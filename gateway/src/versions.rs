//! The versions of models in this process: loaded beside what is served, kept while they are wanted.
//!
//! Each version has a slot. Following the control log says which are wanted; what is missing is loaded in a task of its own,
//! one at a time, so that each is held against what those before it took, and nobody waits for it but who asked. A slot that
//! is not wanted any more is let go at once, and its model ends with the last request that holds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::catalog::{BatchingPolicy, Runtime as RuntimeKind};
use feature_defs::plan::ModelPlan;
use inference::batch::{BatchLimits, Policy};
use inference::device::{SharedDevice, SharedDevices};
use inference::executor::{FORWARD_MAX, ModelServer, ServerOptions};
use inference::memory::{Footprint, MemoryError};
use inference::model::{Artefact, Device, Devices, LoadOptions, ModelSpec, Runtime};
use inference::placement::{self, Placed};
use registry::Registry;
use registry::id::{EntryNumber, ModelName, ModelVersion};
use registry::model::ModelRecord;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::certify::{Job, Step, child, footprint};
use crate::follow::Retry;
use crate::golden::{self, Checked, Checks};
use crate::model_files::ModelFiles;
use crate::predict::spec_of;
use crate::response_cache::Responses;
use crate::status::{Failure, Kind, chain};

/// How long a version that could not be loaded is left alone, at first and at most.
const RETRY_MIN: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// A forward that takes so many times the declared deadline is taken not to end at all, and this long at least: machines
/// stop for a second now and then.
const FORWARD_DEADLINES_MAX: u32 = 20;
const FORWARD_BOUND_MIN: Duration = Duration::from_secs(2);

/// A version of a model, ready to run.
pub struct ServedModel {
    pub name: Arc<str>,
    pub version: u32,
    /// How its features are computed, and the policy for it.
    pub plan: Arc<ModelPlan>,
    pub server: Arc<ModelServer>,
    pub checks: Arc<Checks>,
    /// What it answered before, where its definition asks for that.
    pub responses: Option<Arc<Responses>>,
}

pub type Key = (ModelName, ModelVersion);

/// A version that the log wants here.
pub struct Wanted<'a> {
    pub record: &'a ModelRecord,
    /// The entry that says so.
    pub wanted_by: EntryNumber,
    pub plan: Result<Arc<ModelPlan>, Failure>,
    /// Whether to try again after a failure; else whoever wanted it will say what comes next.
    pub insists: bool,
}

/// How far a version is here.
#[derive(Clone)]
pub struct VersionState {
    pub wanted_by: EntryNumber,
    pub ready: Option<Arc<ServedModel>>,
    pub loading: bool,
    /// Why the last attempt failed. There may be a version ready all the same, of before.
    pub failure: Option<Failure>,
}

pub struct Versions {
    registry: Arc<Registry>,
    runtime: Option<Arc<dyn Runtime>>,
    places: ModelPlaces,
    /// Whose answers those of its models are.
    pub tenant: String,
    /// What the models share.
    pub devices: SharedDevices,
    slots: Mutex<Slots>,
    /// Loads go one after the other.
    turn: Semaphore,
    /// In a process that answers no requests: nothing is loaded.
    pub is_idle: bool,
    /// Told whenever a load has ended.
    pub changed: Notify,
    stop: CancellationToken,
}

/// Where models are kept and measured on this machine. Without a cache they are fetched into memory, and without a binary
/// they are measured where they will run.
#[derive(Debug, Clone, Default)]
pub struct ModelPlaces {
    pub cache: Option<PathBuf>,
    /// A `coeval` that measures models in a process of its own.
    pub certifier: Option<PathBuf>,
}

#[derive(Default)]
struct Slots {
    by_key: BTreeMap<Key, Slot>,
    next_load: u64,
    /// Something has come to an end since it was last asked.
    news: bool,
}

#[derive(Default)]
struct Slot {
    wanted_by: EntryNumber,
    /// With what it was loaded for.
    ready: Option<(Arc<ServedModel>, Recipe)>,
    loading: Option<Loading>,
    failure: Option<Failed>,
}

struct Loading {
    number: u64,
    recipe: Recipe,
    /// Ends the load with the slot.
    _stop: DropGuard,
}

struct Failed {
    failure: Failure,
    recipe: Option<Recipe>,
    tries: u32,
    again: Instant,
}

/// What a model has to be loaded again for, when it changes.
#[derive(Clone, PartialEq)]
struct Recipe {
    options: ServerOptions,
    tiers: Vec<String>,
    spec: ModelSpec,
    devices: Vec<String>,
}

impl Recipe {
    fn of(plan: &ModelPlan) -> Recipe {
        Recipe { options: options(plan), tiers: plan.tiers.clone(), spec: spec_of(plan), devices: plan.devices.clone() }
    }
}

impl Slot {
    fn state(&self) -> VersionState {
        VersionState {
            wanted_by: self.wanted_by,
            ready: self.ready.as_ref().map(|(model, _)| model.clone()),
            loading: self.loading.is_some(),
            failure: self.failure.as_ref().map(|failed| failed.failure.clone()),
        }
    }
}

impl Versions {
    pub fn new(registry: Arc<Registry>, runtime: Option<Arc<dyn Runtime>>, places: ModelPlaces) -> Versions {
        Versions {
            registry,
            runtime,
            places,
            tenant: String::new(),
            devices: SharedDevices::new(),
            slots: Mutex::default(),
            turn: Semaphore::new(1),
            is_idle: false,
            changed: Notify::new(),
            stop: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a load has ended since the last call.
    pub fn take_news(&self) -> bool {
        std::mem::take(&mut self.lock().news)
    }

    pub fn state(&self, key: &Key) -> Option<VersionState> {
        self.lock().by_key.get(key).map(Slot::state)
    }

    /// Every version that is wanted.
    pub fn states(&self) -> Vec<(Key, VersionState)> {
        self.lock().by_key.iter().map(|(key, slot)| (key.clone(), slot.state())).collect()
    }

    /// Whether nothing is being loaded.
    pub fn is_settled(&self) -> bool {
        self.lock().by_key.values().all(|slot| slot.loading.is_none())
    }

    /// Ends what is being loaded.
    pub fn end_loads(&self) {
        self.stop.cancel();
        self.lock().by_key.values_mut().for_each(|slot| slot.loading = None);
    }

    /// Lets go what is not wanted, and begins to load what is wanted and missing.
    pub fn reconcile(self: &Arc<Self>, wanted: Vec<Wanted<'_>>, retry: Retry) {
        let wanted = if self.is_idle { Vec::new() } else { wanted };
        let mut slots = self.lock();
        let key = |wanted: &Wanted| (wanted.record.model.name.clone(), wanted.record.version);
        let keys: std::collections::BTreeSet<Key> = wanted.iter().map(key).collect();
        slots.by_key.retain(|key, slot| {
            let stays = keys.contains(key);
            if !stays && slot.ready.is_some() {
                tracing::info!(model = %key.0, version = %key.1, "a model is not wanted any more");
            }
            stays
        });
        for wanted in wanted {
            let Slots { by_key, next_load, .. } = &mut *slots;
            let slot = by_key.entry(key(&wanted)).or_default();
            if slot.wanted_by != wanted.wanted_by {
                // Another deploy: what was found out about the one before does not count.
                slot.failure = None;
                slot.wanted_by = wanted.wanted_by;
            }
            let plan = match wanted.plan {
                Ok(plan) => plan,
                Err(failure) => {
                    slot.failure = Some(Failed { failure, recipe: None, tries: 1, again: Instant::now() });
                    continue;
                }
            };
            let recipe = Recipe::of(&plan);
            if let Some((model, loaded_by)) = &mut slot.ready
                && *loaded_by == recipe
            {
                slot.failure = None;
                slot.loading = None;
                // Policy may have changed; the executors stay as long as they would be started the same.
                if !Arc::ptr_eq(&model.plan, &plan) {
                    let kept = model.responses.as_ref().filter(|responses| responses.suits(&plan)).cloned();
                    let responses = match kept {
                        Some(kept) => Some(kept),
                        None if model.checks.is_steady => {
                            self.responses(wanted.record, &plan).unwrap_or_else(|error| {
                                tracing::warn!(model = %model.name, %error, "answers of a model are not cached");
                                None
                            })
                        }
                        None => None,
                    };
                    *model = Arc::new(ServedModel {
                        plan,
                        responses,
                        name: model.name.clone(),
                        version: model.version,
                        server: model.server.clone(),
                        checks: model.checks.clone(),
                    });
                }
                continue;
            }
            if slot.loading.as_ref().is_some_and(|loading| loading.recipe == recipe) {
                continue;
            }
            if let Some(failed) = &slot.failure
                && failed.recipe.as_ref() == Some(&recipe)
                && !(wanted.insists && (retry == Retry::Now || Instant::now() >= failed.again))
            {
                continue;
            }
            *next_load += 1;
            let stop = self.stop.child_token();
            slot.loading =
                Some(Loading { number: *next_load, recipe: recipe.clone(), _stop: stop.clone().drop_guard() });
            tokio::spawn(self.clone().load_slot(wanted.record.clone(), plan, recipe, *next_load, stop));
        }
    }

    async fn load_slot(
        self: Arc<Self>,
        record: ModelRecord,
        plan: Arc<ModelPlan>,
        recipe: Recipe,
        number: u64,
        stop: CancellationToken,
    ) {
        let loaded = tokio::select! {
            () = stop.cancelled() => return,
            loaded = self.load(&record, plan, &stop) => loaded,
        };
        let (name, version) = (record.model.name.clone(), record.version);
        let mut slots = self.lock();
        let Slots { by_key, news, .. } = &mut *slots;
        // Whoever wanted it may have changed their mind; then the model goes with the end of this function.
        let Some(slot) = by_key.get_mut(&(name.clone(), version)) else { return };
        if slot.loading.as_ref().is_none_or(|loading| loading.number != number) {
            return;
        }
        slot.loading = None;
        match loaded {
            Ok(model) => {
                tracing::info!(model = %name, version = version.0, "a model is loaded and warm");
                slot.ready = Some((Arc::new(model), recipe));
                slot.failure = None;
            }
            Err(failure) => {
                let tries = slot.failure.as_ref().map_or(0, |failed| failed.tries) + 1;
                let pause = RETRY_MIN.saturating_mul(2_u32.saturating_pow(tries - 1)).min(RETRY_MAX);
                tracing::warn!(model = %name, version = version.0, error = failure.message, "a model could not be loaded");
                slot.failure = Some(Failed { failure, recipe: Some(recipe), tries, again: Instant::now() + pause });
            }
        }
        *news = true;
        drop(slots);
        self.changed.notify_waiters();
        // For whoever was not waiting just now.
        self.changed.notify_one();
    }

    /// What can be said against a model before anything of it is loaded.
    pub fn check(&self, plan: &ModelPlan) -> Result<Arc<dyn Runtime>, Failure> {
        let name = &plan.name;
        let Some(runtime) = self.runtime.clone() else {
            let text = "this build has no torch, so it cannot run models; use a `coeval` that was built with it";
            return Err(Failure::new(Kind::Unsupported, text));
        };
        if plan.runtime != RuntimeKind::TorchScript {
            let text = format!("model `{name}` has a runtime that this version cannot run; export it as torchscript");
            return Err(Failure::new(Kind::Unsupported, text));
        }
        // Those on an accelerator leave the cores to others.
        placement::check_threads(on_device(plan, Device::Cpu), plan.threads as usize, cores())?;
        Ok(runtime)
    }

    /// Fetches, measures, loads, warms up and checks a version, or says why it cannot be served here.
    async fn load(
        self: &Arc<Self>,
        record: &ModelRecord,
        plan: Arc<ModelPlan>,
        stop: &CancellationToken,
    ) -> Result<ServedModel, Failure> {
        let runtime = self.check(&plan)?;
        let Ok(_turn) = self.turn.acquire().await else {
            return Err(Failure::new(Kind::Unavailable, "the server is shutting down"));
        };
        let name = record.model.name.as_str();
        let artifacts = self.registry.artifacts();
        let files = self.places.cache.clone().map(ModelFiles::new);
        let golden = match (&record.model.golden_rows, &files) {
            (Some(artifact), Some(files)) => Some(files.get(artifacts, artifact).await?.0),
            (Some(artifact), None) => Some(artifacts.get(artifact).await?),
            (None, _) => None,
        };
        let golden = match golden {
            Some(bytes) => Some(golden::read(bytes, spec_of(&plan)).await?),
            None => None,
        };
        let (bytes, kept) = match files {
            Some(files) => {
                let (bytes, path) = files.get(artifacts, &record.model.artifact).await?;
                (bytes, Some((files, path)))
            }
            None => (artifacts.get(&record.model.artifact).await?, None),
        };
        // It may have to open libtorch, which takes a while.
        let (asked, first) = (runtime.clone(), placed_on(&plan).of_executor(0));
        let versions = self.clone();
        let device = tokio::task::spawn_blocking(move || versions.devices.get(first, &*asked)).await;
        let device = device.map_err(|error| Failure::internal("looking at a device ended early", &error))?;
        let cpu: Arc<SharedDevice> = self.devices.cpu().unwrap_or_else(|| device.clone());
        let too_large = |error: MemoryError| Failure::new(Kind::Precondition, error.to_string());
        if let (Some((files, path)), Some(binary)) = (kept, &self.places.certifier) {
            // The child takes memory of the same machine. What it will need is what is to be found out; a copy of the file is
            // the least of it.
            let file_bytes = bytes.len() as u64;
            let least = Footprint {
                name: format!("{name}/{}", record.version),
                file_bytes,
                executors: 1,
                weight_bytes: file_bytes,
                sizes: Vec::new(),
            };
            let held = cpu.hold(least).map_err(too_large)?;
            let certified = certify(&files, &path, binary, record, &plan, stop).await?;
            drop(held);
            // Found out here, nothing of it is loaded; the model's own entry follows with its server.
            let executors = on_device(&plan, first);
            let file_bytes = if first == Device::Cpu { certified.file_bytes } else { 0 };
            let part = Footprint { executors, file_bytes, ..certified };
            drop(device.hold(part).map_err(too_large)?);
        }
        let neighbours = self.neighbours(name, placed_on(&plan));
        let artefact = Artefact::new(record.model.artifact.location.clone(), bytes.as_ref());
        let start = async |plan: &ModelPlan, limits: Option<BatchLimits>| {
            let options = options(plan);
            let options = limits.map_or(options, |limits| ServerOptions { limits, ..options });
            let named = format!("{name}/{}", record.version);
            let (runtime, artefact) = (runtime.clone(), artefact.clone());
            ModelServer::start_on(&self.devices, &named, runtime, artefact, spec_of(plan), options).await
        };
        let server = start(&plan, None).await?;
        let placed = |server: &ModelServer| of_plan(name, &plan, server.longest_forward());
        placement::check(&placed(&server), &neighbours, cores())?;
        let (server, checks) = match golden::check(&server, golden.as_ref()).await? {
            Checked { checks, influence: None } => (server, checks),
            Checked { influence: Some(influence), .. } => {
                server.shutdown().await;
                let server = start(&plan, Some(options(&plan).limits.with_rows_max(1))).await?;
                let mut checks = golden::check(&server, golden.as_ref()).await?.checks;
                checks.unbatched(&influence);
                (server, checks)
            }
        };
        let mut checks = checks;
        let responses = match self.responses(record, &plan) {
            Ok(Some(_)) if !checks.is_steady => Err("the same row does not come out the same twice".to_owned()),
            made => made.map_err(|error| error.to_string()),
        };
        let responses = responses.unwrap_or_else(|reason| {
            checks.notes.push(format!("its answers are not cached: {reason}"));
            None
        });
        let (name, version) = (name.into(), record.version.0);
        Ok(ServedModel { name, version, plan, server: Arc::new(server), checks: Arc::new(checks), responses })
    }

    /// The cache that the plan of a version asks for. That there is no memory for it is no reason not to serve the model.
    fn responses(&self, record: &ModelRecord, plan: &ModelPlan) -> Result<Option<Arc<Responses>>, MemoryError> {
        let Some(cpu) = self.devices.cpu() else { return Ok(None) };
        let named = format!("{}/{}", record.model.name, record.version);
        let content = record.model.artifact.sha256.to_string();
        Responses::new(&self.tenant, &named, &content, plan, &cpu)
    }

    /// The models of other names on the same devices, with what they need of the cores.
    fn neighbours(&self, name: &str, devices: Devices) -> Vec<Placed> {
        let slots = self.lock();
        let ready = slots.by_key.values().filter_map(|slot| slot.ready.as_ref()).map(|(model, _)| model);
        let others = ready.filter(|model| *model.name != *name && placed_on(&model.plan).overlaps(devices));
        others.map(|model| of_plan(&model.name, &model.plan, model.server.longest_forward())).collect()
    }
}

/// What the model takes, measured in a process of its own, now or before in the same circumstances.
async fn certify(
    files: &ModelFiles,
    path: &Path,
    binary: &Path,
    record: &ModelRecord,
    plan: &ModelPlan,
    stop: &CancellationToken,
) -> Result<Footprint, Failure> {
    let job = Job::new(plan, path.to_owned());
    let (sha256, key) = (&record.model.artifact.sha256, job.key());
    if let Some(steps) = files.measured(sha256, &key).and_then(|text| serde_json::from_slice::<Vec<Step>>(&text).ok())
        && steps.last() == Some(&Step::Done)
    {
        return Ok(footprint(&job, &steps).0);
    }
    let wanted = Arc::new(AtomicBool::new(true));
    // Dropping this ends the child, also when the load itself is dropped.
    let _unwanted = Unwanted(wanted.clone());
    let measured = {
        let (job, binary, stop) = (job.clone(), binary.to_owned(), stop.clone());
        tokio::task::spawn_blocking(move || {
            child::measure(&binary, &job, || wanted.load(Ordering::Acquire) && !stop.is_cancelled(), |_| {})
        })
    };
    let measured = measured.await.map_err(|error| Failure::internal("measuring a model ended early", &error))?;
    let measured = measured.map_err(|error| Failure::new(Kind::Unavailable, chain(&error)))?;
    let footprint = child::verdict(&job, &measured)
        .map_err(|reason| Failure::new(Kind::Precondition, format!("it could not be certified: {reason}")))?;
    if let Ok(text) = serde_json::to_vec(&measured.steps) {
        files.keep_measured(sha256, &key, &text);
    }
    Ok(footprint)
}

struct Unwanted(Arc<AtomicBool>);

impl Drop for Unwanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
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

/// How many of its executors are there.
fn on_device(plan: &ModelPlan, device: Device) -> usize {
    let devices = placed_on(plan);
    (0..plan.executors as usize).filter(|index| devices.of_executor(*index) == device).count()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// When a forward is taken not to end: long after everybody who waited for it has gone.
fn forward_max(plan: &ModelPlan) -> Duration {
    let declared = declared_deadline(plan).map(|deadline| deadline.saturating_mul(FORWARD_DEADLINES_MAX));
    declared.map_or(FORWARD_MAX, |bound| bound.clamp(FORWARD_BOUND_MIN, FORWARD_MAX))
}

/// A model as its neighbours on the device feel it.
fn of_plan(name: &str, plan: &ModelPlan, batch: Duration) -> Placed {
    Placed {
        name: name.to_owned(),
        executors: on_device(plan, Device::Cpu),
        threads: plan.threads as usize,
        batch,
        deadline: declared_deadline(plan),
    }
}

/// The deadline that the definitions give the requests of a model.
pub(crate) fn declared_deadline(plan: &ModelPlan) -> Option<Duration> {
    plan.deadline.and_then(|micros| u64::try_from(micros).ok()).map(Duration::from_micros)
}
