//! The state is the fold of the control log: the same entries give the same state on every machine and in every build
//! with the same `FOLD`.
//!
//! Two questions are kept apart. `State::judge` asks whether a change is right on this state, before it is appended, and
//! refuses with a reason. `State::apply` folds an entry that is already a fact, and is total: an entry that names
//! something which does not exist changes nothing and is counted, because refusing it would stop every process that reads
//! the log.
//!
//! `apply` never moves traffic: definitions change what can be deployed, deployments change what is served.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use thiserror::Error;

mod traffic;

use crate::dataset::{DatasetRecord, NewDataset};
use crate::deployment::{Deployment, DeploymentChange, DeploymentError, Standing};
use crate::flags::{FlagChange, FlagError, Flags};
use crate::forgotten::{Forget, ForgetDone, ForgottenEntities, ForgottenKey, KEYS_MAX};
use crate::id::{
    DatasetId, DatasetName, Digest, EntityName, EntryId, EntryNumber, ModelName, ModelVersion, ProjectName,
    ServiceName, SourceName, ViewName,
};
use crate::log::{Entry, FORMAT};
use crate::model::{ModelRecord, NewModel};

/// The version of the fold. It changes whenever a kind is added or an entry comes to mean something else, so that a
/// snapshot made by a build that skipped an entry is never taken for the fold of a build that understands it.
///
/// 2: entities that were forgotten. 3: versions are prepared, and traffic moves by entries of its own. 4: rollouts and flags.
pub const FOLD: u32 = 4;

/// The kinds of entries that this build understands. All of them must be understood: a reader that skipped one would
/// judge later changes on a state that nobody else has.
mod kind {
    pub const APPLY: &str = "apply";
    pub const DATASET_CREATE: &str = "dataset_create";
    pub const MODEL_REGISTER: &str = "model_register";
    /// Of older logs: the version answers from then on. Nobody writes it any more.
    pub const MODEL_DEPLOY: &str = "model_deploy";
    pub const MODEL_PREPARE: &str = "model_prepare";
    pub const MODEL_ACTIVATE: &str = "model_activate";
    pub const MODEL_GIVE_UP: &str = "model_give_up";
    pub const MODEL_PROMOTE: &str = "model_promote";
    pub const MODEL_ROLLBACK: &str = "model_rollback";
    pub const MODEL_RETIRE: &str = "model_retire";
    pub const MODEL_APPROVE: &str = "model_approve";
    pub const ROLLOUT_BEGIN: &str = "rollout_begin";
    pub const ROLLOUT_STEP: &str = "rollout_step";
    pub const ROLLOUT_HOLD: &str = "rollout_hold";
    pub const ROLLOUT_RESUME: &str = "rollout_resume";
    pub const ROLLOUT_ACKNOWLEDGE: &str = "rollout_acknowledge";
    pub const ROLLOUT_END: &str = "rollout_end";
    pub const MODEL_OFF: &str = "model_off";
    pub const MODEL_ON: &str = "model_on";
    pub const FLAG_SET: &str = "flag_set";
    pub const FLAG_REMOVE: &str = "flag_remove";
    pub const HOLDOUT_SET: &str = "holdout_set";
    pub const FORGET: &str = "forget";
    pub const FORGET_DONE: &str = "forget_done";
}

/// Where a fact of the state comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    pub entry: EntryNumber,
    #[serde(with = "crate::log::rfc3339")]
    pub at: DateTime<Utc>,
    pub who: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A project's definitions as one `apply` found them, with everything that a server needs in order to compile and serve
/// them without the folder that they came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Catalog {
    pub digest: Digest,
    /// The definition files: path within the project -> text.
    pub files: BTreeMap<String, String>,
    /// The text of the settings file.
    pub settings: String,
    /// The schemas of the sources as `apply` resolved them. Opaque here.
    #[serde(default)]
    pub source_schemas: BTreeMap<SourceName, serde_json::Value>,
    #[serde(default)]
    pub views: BTreeMap<ViewName, ViewDigests>,
    /// Feature service -> semantic digest.
    pub services: BTreeMap<ServiceName, Digest>,
    /// Model -> the feature service that it takes.
    #[serde(default)]
    pub models: BTreeMap<ModelName, ServiceName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewDigests {
    /// Changes when stored bytes would.
    pub storage: Digest,
    /// Changes when a value would.
    pub semantic: Digest,
}

/// The definitions in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    pub fact: Fact,
    pub catalog: Catalog,
}

/// All that is known of one project; it begins with its first `apply`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Project {
    pub applied: Applied,
    /// Every semantic digest that a service has had, with the latest `apply` that had it. A model or dataset made under
    /// earlier definitions is still traced to them.
    pub services: BTreeMap<ServiceName, BTreeMap<Digest, EntryNumber>>,
    pub datasets: BTreeMap<DatasetId, DatasetRecord>,
    /// Dataset name -> the latest snapshot of that name.
    pub dataset_names: BTreeMap<DatasetName, DatasetId>,
    pub models: BTreeMap<ModelName, BTreeMap<ModelVersion, ModelRecord>>,
    pub deployments: BTreeMap<ModelName, Deployment>,
    #[serde(default)]
    pub forgotten: ForgottenEntities,
    #[serde(default)]
    pub flags: Flags,
}

impl Project {
    fn new(applied: Applied) -> Self {
        Self {
            applied,
            services: BTreeMap::new(),
            datasets: BTreeMap::new(),
            dataset_names: BTreeMap::new(),
            models: BTreeMap::new(),
            deployments: BTreeMap::new(),
            forgotten: ForgottenEntities::default(),
            flags: Flags::default(),
        }
    }

    pub fn catalog(&self) -> &Catalog {
        &self.applied.catalog
    }

    pub fn model(&self, name: &str, version: ModelVersion) -> Option<&ModelRecord> {
        self.models.get(name)?.get(&version)
    }

    /// The version that answers requests which name none.
    pub fn champion(&self, name: &str) -> Option<&ModelRecord> {
        self.model(name, self.deployments.get(name)?.champion_version()?)
    }

    /// How far a version has come.
    pub fn standing(&self, name: &str, version: ModelVersion) -> Standing {
        self.deployments.get(name).map_or(Standing::Registered, |deployment| deployment.standing(version))
    }

    /// A dataset by its id, or the latest snapshot of a name.
    pub fn dataset(&self, id_or_name: &str) -> Option<&DatasetRecord> {
        let id = self.dataset_names.get(id_or_name).map_or(id_or_name, DatasetId::as_str);
        self.datasets.get(id_or_name).or_else(|| self.datasets.get(id))
    }

    /// Whether the definitions in force compute the same features as those that the version was trained on. If not, the
    /// version is served by the definitions of its own `apply`, `record.definitions`.
    pub fn serves_as_applied(&self, record: &ModelRecord) -> bool {
        self.catalog().services.get(&record.model.service) == Some(&record.model.service_digest)
    }

    fn next_version(&self, model: &ModelName) -> ModelVersion {
        let last = self.models.get(model).and_then(|versions| versions.keys().next_back());
        last.map_or(ModelVersion::FIRST, |last| last.next())
    }

    fn definitions_of(&self, service: &ServiceName, digest: &Digest) -> Option<EntryNumber> {
        self.services.get(service)?.get(digest).copied()
    }
}

/// Why this build makes no more changes: it has met an entry that must be understood and is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangesStopped {
    pub entry: EntryNumber,
    pub kind: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The last entry that was folded, or passed after `changes_stopped`.
    pub head: EntryNumber,
    /// The id of that entry, by which a snapshot is known to belong to the log beside it.
    pub head_id: Option<EntryId>,
    pub projects: BTreeMap<ProjectName, Project>,
    /// Entries of a kind that is unknown here and may be skipped.
    pub skipped: u64,
    /// Entries that named something which did not exist, and so changed nothing.
    pub without_effect: u64,
    /// Set by the first entry that must be understood and is not. The state then stays as it was before that entry:
    /// serving goes on, changes are refused.
    pub changes_stopped: Option<ChangesStopped>,
}

/// An entry that cannot be folded. The log is damaged; no later entry can be right.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FoldError {
    #[error("entry {found} was to be folded where entry {expected} comes next")]
    OutOfOrder { expected: EntryNumber, found: EntryNumber },
    #[error("its `{kind}` body cannot be read: {reason}")]
    Body { kind: String, reason: String },
}

/// A change as the caller means it, before it is judged.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Apply(Catalog),
    CreateDataset(NewDataset),
    RegisterModel(Box<NewModel>),
    Deployment(DeploymentChange),
    Flags(FlagChange),
    Forget(Forget),
    ForgetDone(ForgetDone),
}

/// What to do about a change that is right.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgement {
    /// Append an entry of this kind and body.
    Append { kind: &'static str, must_understand: bool, body: serde_json::Value, version: Option<ModelVersion> },
    /// The state is already as the change would make it, by that entry.
    AlreadySo { entry: EntryNumber, version: Option<ModelVersion> },
}

/// Why a change is not right on this state.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Refusal {
    #[error(
        "entry {} of the control log is of the kind `{}`, which this build does not know; make changes with the newer build that wrote it",
        .0.entry, .0.kind
    )]
    ChangesStopped(ChangesStopped),
    #[error("project `{project}` is not in this store ({}); run `coeval apply` first", listed(.known))]
    UnknownProject { project: ProjectName, known: Vec<String> },
    #[error("model `{model}` is not in the applied definitions of `{project}` ({}); define it and run `coeval apply`", listed(.known))]
    UnknownModel { project: ProjectName, model: ModelName, known: Vec<String> },
    #[error("model `{model}` takes the feature service `{service}`, which the definitions do not have ({})", listed(.known))]
    UnknownService { model: ModelName, service: ServiceName, known: Vec<String> },
    #[error(
        "model `{model}` takes the feature service `{expected}`, but the version was trained on `{found}`; train on `{expected}`, or change `features:` of the model and run `coeval apply`"
    )]
    OtherService { model: ModelName, expected: ServiceName, found: ServiceName },
    #[error(
        "feature service `{service}` with digest {digest} was never applied to `{project}` (in force: {in_force}); run `coeval apply` with the definitions that the {what} was made with"
    )]
    UnknownDigest { project: ProjectName, what: &'static str, service: ServiceName, digest: Digest, in_force: String },
    #[error("model `{model}` has no version {version} ({}); register it with `coeval model register`", versions(.existing))]
    UnknownVersion { model: ModelName, version: ModelVersion, existing: Vec<ModelVersion> },
    #[error("dataset `{dataset}` is not in the control log of `{project}` ({}); create it with `coeval dataset create`", listed(.known))]
    UnknownDataset { project: ProjectName, dataset: DatasetId, known: Vec<String> },
    #[error(
        "dataset `{dataset}` was computed by digest {dataset_digest} of feature service `{service}`, but the model says that it was trained on {model_digest}; register the model with the digest of its dataset"
    )]
    OtherDigest { dataset: DatasetId, service: ServiceName, dataset_digest: Digest, model_digest: Digest },
    #[error(
        "dataset id `{dataset}` is taken by another snapshot, of entry {entry}; give the new snapshot an id of its own"
    )]
    DatasetTaken { dataset: DatasetId, entry: EntryNumber },
    #[error("metric `{metric}` of model `{model}` is {value}; register finite numbers only")]
    MetricNotFinite { model: ModelName, metric: String, value: f64 },
    #[error("{keys} keys of entity `{entity}` are too many, or too few, for one change; name 1 to {KEYS_MAX}")]
    KeyCount { entity: EntityName, keys: usize },
    #[error("somebody else forgot the project's first entity at the same time; try again")]
    OtherSalt,
    #[error("entity `{entity}` was not asked to be forgotten under all of these hashes; ask first")]
    NotForgotten { entity: EntityName },
    #[error(transparent)]
    Deployment(#[from] DeploymentError),
    #[error(transparent)]
    Flag(#[from] FlagError),
    #[error("the record of model `{model}` lacks its {field}; a version is registered with its whole record")]
    Incomplete { model: ModelName, field: &'static str },
}

#[derive(Serialize, Deserialize)]
struct RegisterBody {
    version: ModelVersion,
    model: NewModel,
}

impl State {
    pub fn project(&self, name: &str) -> Option<&Project> {
        self.projects.get(name)
    }

    /// Whether `change` is right on this state, and the entry that makes it so.
    pub fn judge(&self, project: &ProjectName, change: &Change) -> Result<Judgement, Refusal> {
        if let Some(stopped) = &self.changes_stopped {
            return Err(Refusal::ChangesStopped(stopped.clone()));
        }
        match change {
            Change::Apply(catalog) => self.judge_apply(project, catalog),
            Change::CreateDataset(dataset) => judge_dataset(project, self.known(project)?, dataset),
            Change::RegisterModel(model) => judge_register(project, self.known(project)?, model),
            Change::Deployment(change) => traffic::judge_deployment(project, self.known(project)?, change),
            Change::Flags(change) => judge_flags(&self.known(project)?.flags, change),
            Change::Forget(forget) => judge_forget(&self.known(project)?.forgotten, forget),
            Change::ForgetDone(done) => judge_forget_done(&self.known(project)?.forgotten, done),
        }
    }

    /// Folds the next entry.
    pub fn apply(&mut self, entry: &Entry) -> Result<(), FoldError> {
        if entry.number != self.head.next() {
            return Err(FoldError::OutOfOrder { expected: self.head.next(), found: entry.number });
        }
        if self.changes_stopped.is_none() {
            self.fold(entry)?;
        }
        self.head = entry.number;
        self.head_id = Some(entry.id.clone());
        Ok(())
    }

    fn fold(&mut self, entry: &Entry) -> Result<(), FoldError> {
        let effect = match entry.kind.as_str() {
            _ if entry.format > FORMAT => None,
            kind::APPLY => Some(self.fold_apply(entry, body(entry)?)),
            kind::DATASET_CREATE => Some(self.fold_dataset(entry, body(entry)?)),
            kind::MODEL_REGISTER => Some(self.fold_register(entry, body(entry)?)),
            kind::MODEL_DEPLOY
            | kind::MODEL_PREPARE
            | kind::MODEL_ACTIVATE
            | kind::MODEL_GIVE_UP
            | kind::MODEL_PROMOTE
            | kind::MODEL_ROLLBACK
            | kind::MODEL_RETIRE
            | kind::MODEL_APPROVE
            | kind::ROLLOUT_BEGIN
            | kind::ROLLOUT_STEP
            | kind::ROLLOUT_HOLD
            | kind::ROLLOUT_RESUME
            | kind::ROLLOUT_ACKNOWLEDGE
            | kind::ROLLOUT_END
            | kind::MODEL_OFF
            | kind::MODEL_ON => Some(self.fold_deployment(entry)?),
            kind::FLAG_SET | kind::FLAG_REMOVE | kind::HOLDOUT_SET => Some(self.fold_flags(entry)?),
            kind::FORGET => Some(self.fold_forget(entry, body(entry)?)),
            kind::FORGET_DONE => Some(self.fold_forget_done(entry, body(entry)?)),
            _ => None,
        };
        match effect {
            Some(Some(())) => {}
            Some(None) => self.without_effect += 1,
            None if entry.must_understand => {
                self.changes_stopped = Some(ChangesStopped { entry: entry.number, kind: entry.kind.clone() });
            }
            None => self.skipped += 1,
        }
        Ok(())
    }

    fn known(&self, project: &ProjectName) -> Result<&Project, Refusal> {
        self.projects
            .get(project)
            .ok_or_else(|| Refusal::UnknownProject { project: project.clone(), known: names(&self.projects) })
    }

    fn judge_apply(&self, project: &ProjectName, catalog: &Catalog) -> Result<Judgement, Refusal> {
        for (model, service) in &catalog.models {
            if !catalog.services.contains_key(service) {
                let known = names(&catalog.services);
                return Err(Refusal::UnknownService { model: model.clone(), service: service.clone(), known });
            }
        }
        match self.projects.get(project) {
            Some(present) if present.catalog() == catalog => {
                Ok(Judgement::AlreadySo { entry: present.applied.fact.entry, version: None })
            }
            _ => Ok(append(kind::APPLY, catalog, None)),
        }
    }

    fn fold_apply(&mut self, entry: &Entry, catalog: Catalog) -> Option<()> {
        let services = catalog.services.clone();
        let applied = Applied { fact: fact(entry), catalog };
        let project = match self.projects.get_mut(&entry.project) {
            Some(project) => {
                project.applied = applied;
                project
            }
            None => self.projects.entry(entry.project.clone()).or_insert_with(|| Project::new(applied)),
        };
        for (service, digest) in services {
            project.services.entry(service).or_default().insert(digest, entry.number);
        }
        Some(())
    }

    fn fold_dataset(&mut self, entry: &Entry, dataset: NewDataset) -> Option<()> {
        let project = self.projects.get_mut(&entry.project)?;
        if project.datasets.contains_key(&dataset.id) {
            return None;
        }
        project.dataset_names.insert(dataset.name.clone(), dataset.id.clone());
        project.datasets.insert(dataset.id.clone(), DatasetRecord { created: fact(entry), dataset });
        Some(())
    }

    fn fold_register(&mut self, entry: &Entry, RegisterBody { version, model }: RegisterBody) -> Option<()> {
        let project = self.projects.get_mut(&entry.project)?;
        let definitions = project.definitions_of(&model.service, &model.service_digest)?;
        if version != project.next_version(&model.name) {
            return None;
        }
        let versions = project.models.entry(model.name.clone()).or_default();
        let (registered, approvals) = (fact(entry), BTreeMap::new());
        versions.insert(version, ModelRecord { version, registered, definitions, model, approvals });
        Some(())
    }

    fn fold_flags(&mut self, entry: &Entry) -> Result<Option<()>, FoldError> {
        let Some(project) = self.projects.get_mut(&entry.project) else { return Ok(None) };
        Ok(match entry.kind.as_str() {
            kind::FLAG_SET => project.flags.fold_set(body(entry)?, fact(entry)),
            kind::FLAG_REMOVE => project.flags.fold_remove(&body(entry)?),
            _ => project.flags.fold_holdout(body(entry)?, fact(entry)),
        })
    }

    fn fold_forget(&mut self, entry: &Entry, forget: Forget) -> Option<()> {
        let forgotten = &mut self.projects.get_mut(&entry.project)?.forgotten;
        if forgotten.salt.get_or_insert_with(|| forget.salt.clone()) != &forget.salt {
            return None;
        }
        let keys = forgotten.entities.entry(forget.entity).or_default();
        for hash in forget.keys {
            keys.entry(hash).or_insert_with(|| ForgottenKey { asked: fact(entry), done: None });
        }
        Some(())
    }

    fn fold_forget_done(&mut self, entry: &Entry, done: ForgetDone) -> Option<()> {
        let keys = self.projects.get_mut(&entry.project)?.forgotten.entities.get_mut(&done.entity)?;
        for hash in &done.keys {
            keys.get_mut(hash)?.done.get_or_insert_with(|| fact(entry));
        }
        Some(())
    }
}

fn judge_forget(known: &ForgottenEntities, forget: &Forget) -> Result<Judgement, Refusal> {
    if forget.keys.is_empty() || forget.keys.len() > KEYS_MAX {
        return Err(Refusal::KeyCount { entity: forget.entity.clone(), keys: forget.keys.len() });
    }
    // Hashes under two salts could not be compared with the same rows.
    if known.salt.as_ref().is_some_and(|salt| *salt != forget.salt) {
        return Err(Refusal::OtherSalt);
    }
    let asked = |hash| known.key(forget.entity.as_str(), hash).map(|key| key.asked.entry);
    match forget.keys.iter().map(asked).collect::<Option<Vec<_>>>().and_then(|entries| entries.into_iter().max()) {
        Some(entry) => Ok(Judgement::AlreadySo { entry, version: None }),
        None => Ok(append(kind::FORGET, forget, None)),
    }
}

fn judge_forget_done(known: &ForgottenEntities, done: &ForgetDone) -> Result<Judgement, Refusal> {
    let keys = done.keys.iter().map(|hash| known.key(done.entity.as_str(), hash));
    let Some(keys) = keys.collect::<Option<Vec<_>>>() else {
        return Err(Refusal::NotForgotten { entity: done.entity.clone() });
    };
    let done_by = keys.iter().map(|key| key.done.as_ref().map(|fact| fact.entry));
    match done_by.collect::<Option<Vec<_>>>().and_then(|entries| entries.into_iter().max()) {
        Some(entry) => Ok(Judgement::AlreadySo { entry, version: None }),
        None => Ok(append(kind::FORGET_DONE, done, None)),
    }
}

fn judge_dataset(project: &ProjectName, known: &Project, new: &NewDataset) -> Result<Judgement, Refusal> {
    match known.datasets.get(&new.id) {
        Some(present) if present.dataset == *new => {
            return Ok(Judgement::AlreadySo { entry: present.created.entry, version: None });
        }
        Some(present) => {
            return Err(Refusal::DatasetTaken { dataset: new.id.clone(), entry: present.created.entry });
        }
        None => {}
    }
    applied_once(project, known, "dataset", &new.service, &new.service_digest)?;
    Ok(append(kind::DATASET_CREATE, new, None))
}

fn judge_register(project: &ProjectName, known: &Project, new: &NewModel) -> Result<Judgement, Refusal> {
    let model = &new.name;
    let expected = declared(project, known, model)?;
    if *expected != new.service {
        let (expected, found) = (expected.clone(), new.service.clone());
        return Err(Refusal::OtherService { model: model.clone(), expected, found });
    }
    let facts = [
        ("artifact location", &new.artifact.location),
        ("runtime", &new.runtime),
        ("author", &new.author),
        ("commit", &new.commit),
        ("environment digest", &new.environment_digest),
        ("hardware", &new.hardware),
    ];
    if let Some((field, _)) = facts.into_iter().find(|(_, value)| value.trim().is_empty()) {
        return Err(Refusal::Incomplete { model: model.clone(), field });
    }
    if let Some((metric, value)) = new.metrics.iter().find(|(_, value)| !value.is_finite()) {
        return Err(Refusal::MetricNotFinite { model: model.clone(), metric: metric.clone(), value: *value });
    }
    applied_once(project, known, "model", &new.service, &new.service_digest)?;
    if let Some(id) = &new.dataset {
        let Some(record) = known.datasets.get(id) else {
            let (project, dataset) = (project.clone(), id.clone());
            return Err(Refusal::UnknownDataset { project, dataset, known: names(&known.datasets) });
        };
        let trained_on = &record.dataset;
        if trained_on.service != new.service || trained_on.service_digest != new.service_digest {
            return Err(Refusal::OtherDigest {
                dataset: id.clone(),
                service: trained_on.service.clone(),
                dataset_digest: trained_on.service_digest.clone(),
                model_digest: new.service_digest.clone(),
            });
        }
    }

    let mut versions = known.models.get(model).into_iter().flat_map(BTreeMap::values);
    if let Some(same) = versions.find(|record| new.computes_the_same_as(&record.model)) {
        return Ok(Judgement::AlreadySo { entry: same.registered.entry, version: Some(same.version) });
    }
    let version = known.next_version(model);
    Ok(append(kind::MODEL_REGISTER, &RegisterBody { version, model: new.clone() }, Some(version)))
}

fn judge_flags(known: &Flags, change: &FlagChange) -> Result<Judgement, Refusal> {
    if let Some(entry) = known.judge(change)? {
        return Ok(Judgement::AlreadySo { entry, version: None });
    }
    Ok(match change {
        FlagChange::Set(body) => append(kind::FLAG_SET, body, None),
        FlagChange::Remove(body) => append(kind::FLAG_REMOVE, body, None),
        FlagChange::Holdout(body) => append(kind::HOLDOUT_SET, body, None),
    })
}

/// The service that the definitions in force give to a model.
fn declared<'a>(project: &ProjectName, known: &'a Project, model: &ModelName) -> Result<&'a ServiceName, Refusal> {
    known.catalog().models.get(model).ok_or_else(|| Refusal::UnknownModel {
        project: project.clone(),
        model: model.clone(),
        known: names(&known.catalog().models),
    })
}

fn applied_once(
    project: &ProjectName,
    known: &Project,
    what: &'static str,
    service: &ServiceName,
    digest: &Digest,
) -> Result<EntryNumber, Refusal> {
    known.definitions_of(service, digest).ok_or_else(|| Refusal::UnknownDigest {
        project: project.clone(),
        what,
        service: service.clone(),
        digest: digest.clone(),
        in_force: known.catalog().services.get(service).map_or_else(|| "none".to_owned(), Digest::to_string),
    })
}

fn append<T: Serialize>(kind: &'static str, body: &T, version: Option<ModelVersion>) -> Judgement {
    // Bodies are maps with text keys and finite numbers; there is nothing in them that JSON cannot say.
    let body = serde_json::to_value(body).expect("every body of a change is representable in JSON");
    Judgement::Append { kind, must_understand: true, body, version }
}

fn body<T: serde::de::DeserializeOwned>(entry: &Entry) -> Result<T, FoldError> {
    T::deserialize(&entry.body).map_err(|error| FoldError::Body { kind: entry.kind.clone(), reason: error.to_string() })
}

/// The catalog of an `apply` entry; `None` for an entry of another kind.
pub(crate) fn catalog_of(entry: &Entry) -> Result<Option<Catalog>, FoldError> {
    if entry.kind == kind::APPLY { body(entry).map(Some) } else { Ok(None) }
}

/// What an entry did to flags; None for entries about something else.
pub fn flag_change_of(entry: &Entry) -> Result<Option<FlagChange>, FoldError> {
    Ok(match entry.kind.as_str() {
        kind::FLAG_SET => Some(FlagChange::Set(body(entry)?)),
        kind::FLAG_REMOVE => Some(FlagChange::Remove(body(entry)?)),
        kind::HOLDOUT_SET => Some(FlagChange::Holdout(body(entry)?)),
        _ => None,
    })
}

fn fact(entry: &Entry) -> Fact {
    Fact { entry: entry.number, at: entry.at, who: entry.who.clone(), why: entry.why.clone() }
}

fn names<K: ToString, V>(map: &BTreeMap<K, V>) -> Vec<String> {
    map.keys().map(K::to_string).collect()
}

/// What there is, for an error text: a few names help, a thousand do not.
fn listed(known: &[String]) -> String {
    const NAMES_MAX: usize = 10;
    match known.len() {
        0 => "there are none".to_owned(),
        count if count <= NAMES_MAX => format!("there are: {}", known.join(", ")),
        count => format!("there are {count}, the first: {}", known[..NAMES_MAX].join(", ")),
    }
}

fn versions(existing: &[ModelVersion]) -> String {
    // Versions have no holes, so first and last say it all.
    match existing {
        [] => "it has none".to_owned(),
        [only] => format!("it has version {only}"),
        [first, .., last] => format!("it has versions {first} to {last}"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
