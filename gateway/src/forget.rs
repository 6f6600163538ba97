//! Forgetting entities: the one act that reaches everything the process keeps.
//!
//! First an entry of the control log, which holds a keyed hash and never the key: from then on every reader and writer
//! treats rows of the entity as absent, whatever is still stored. Then everything that is stored is gone through, and at
//! last a second entry says that it is done. Between the two entries any server of the project finds out by itself that
//! something is left to do, so neither a crash nor a caller that went away leaves it half done for long.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::Array;
use chrono::{DateTime, SecondsFormat};
use feature_defs::forgotten::{Forgotten, KeyHash, from_hex};
use feature_defs::plan::{Plan, ServicePlan, encode_entity_keys};
use object_store::path::Path;
use offline_store::dataset::{DatasetError, Manifest, redact};
use offline_store::{labels, serving_log};
use proto::v1;
use registry::dataset::DatasetRecord;
use registry::forgotten::{Forget, ForgetDone, KEYS_MAX};
use registry::id::{self, EntityName, EntryNumber, NameError, Salt};
use registry::state::{Change, Project, Refusal};
use registry::{Outcome, RegistryError};
use tokio::sync::mpsc;

use crate::answer::Gateway;
use crate::convert;
use crate::events::{Events, Forgetting, ForgottenPlace, Mode};
use crate::follow::{Retry, compile};
use crate::roles::Role;
use crate::status::{Failure, Kind, chain};

/// Between looks for something that was left to do.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// After it failed.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// Definitions of before that are looked at for what was served by them.
const PLANS_MAX: usize = 64;
/// Who the log names for work that a server finished by itself.
const FINISHED_BY: &str = "server";

/// The hashes of a project as readers compare them.
pub fn listed(project: &Project) -> Arc<Forgotten> {
    let salt = project.forgotten.salt.as_ref().and_then(|salt| from_hex(salt.as_str())).unwrap_or_default();
    let keys = project.forgotten.all().filter_map(|(entity, hash, _)| {
        // Checked when the entry was folded.
        Some((Arc::from(entity.as_str()), hash.as_str().parse::<KeyHash>().ok()?))
    });
    Arc::new(Forgotten::new(&salt, keys))
}

/// Entities as a caller names them.
struct Asked {
    entity: Arc<str>,
    keys: Vec<Box<[u8]>>,
}

fn asked(plan: &Plan, request: &v1::ForgetRequest) -> Result<Asked, Failure> {
    let known: BTreeSet<&str> = plan.views.iter().map(|view| &*view.entity).collect();
    let Some(view) = plan.views.iter().find(|view| *view.entity == *request.entity) else {
        return Err(Failure::unknown("entity", &request.entity, known));
    };
    let entity = &view.entity;
    if view.keys.is_empty() {
        return Err(Failure::invalid(format!(
            "entity `{entity}` has no keys: it is everybody, and cannot be forgotten"
        )));
    }
    let names = || view.keys.iter().map(|key| key.name.as_str());
    if let Some(extra) = request.keys.iter().find(|column| !names().any(|name| name == column.name)) {
        return Err(Failure::unknown(&format!("key of entity `{entity}` named"), &extra.name, names()));
    }
    let rows = request.keys.first().and_then(convert::rows_of).unwrap_or(0);
    if rows == 0 || rows > KEYS_MAX {
        return Err(Failure::invalid(format!("{rows} entities are named; name 1 to {KEYS_MAX} at once")));
    }
    let mut columns = Vec::with_capacity(view.keys.len());
    for key in &view.keys {
        let mut named = request.keys.iter().filter(|column| column.name == key.name);
        let (Some(column), None) = (named.next(), named.next()) else {
            let all = names().collect::<Vec<_>>().join(", ");
            let text = format!("key `{}` is missing, or there twice; entity `{entity}` is named by: {all}", key.name);
            return Err(Failure::invalid(text));
        };
        let array =
            convert::to_array(column, &key.key_type, rows).map_err(|error| Failure::invalid(error.to_string()))?;
        if array.null_count() > 0 {
            return Err(Failure::invalid(format!("key `{}` is null; a null names no entity", key.name)));
        }
        columns.push((array, &key.key_type));
    }
    let encoded = encode_entity_keys(&columns, rows);
    let keys: BTreeSet<Box<[u8]>> = (0..rows).filter_map(|row| encoded.get(row)).map(Into::into).collect();
    Ok(Asked { entity: entity.clone(), keys: keys.into_iter().collect() })
}

/// Forgets what a caller names.
pub async fn forget(
    gateway: &Arc<Gateway>,
    request: v1::ForgetRequest,
    progress: mpsc::Sender<String>,
) -> Result<v1::ForgetResult, Failure> {
    let started = tokio::time::Instant::now();
    let served = gateway.follower.follow(Retry::Later).await;
    let Asked { entity, keys } = asked(served.plan()?, &request)?;
    gateway.check_role(Role::Ingest, "entities are not forgotten here")?;
    let events = gateway.events.clone();
    let events = events.ok_or_else(|| Failure::new(Kind::Unsupported, "this server takes no events"))?;
    let name = EntityName::try_new(&*entity).map_err(invalid)?;
    let why = Some(request.why.as_str()).filter(|why| !why.is_empty());
    let _one = gateway.forgetting.lock().await;
    // Once more when somebody else chose the project's salt at the same moment.
    for _ in 0..2 {
        let state = gateway.registry.refresh().await?;
        let known = state.project(gateway.project.as_str());
        let salt = known.and_then(|project| project.forgotten.salt.clone()).unwrap_or_else(Salt::random);
        let bytes = from_hex(salt.as_str()).unwrap_or_default();
        let hashes: Vec<KeyHash> = keys.iter().map(|key| KeyHash::of(&bytes, &entity, key)).collect();
        let with_entity: Vec<(Arc<str>, KeyHash)> = hashes.iter().map(|hash| (entity.clone(), *hash)).collect();
        let all_keys: Vec<(Arc<str>, Box<[u8]>)> = keys.iter().map(|key| (entity.clone(), key.clone())).collect();
        let shown = hashes.iter().map(KeyHash::to_string).collect();
        if request.dry_run {
            let list = Arc::new(Forgotten::new(&bytes, with_entity.iter().cloned()));
            let what = Forgetting { list, hashes: with_entity, keys: all_keys };
            let places = everywhere(gateway, &*events, what, Mode::DryRun, progress).await?;
            return Ok(result(0, false, places, shown, started));
        }
        let recorded = hashes.iter().map(|hash| id::KeyHash::try_new(hash.to_string())).collect::<Result<Vec<_>, _>>();
        let recorded = recorded.map_err(invalid)?;
        let change = Change::Forget(Forget { salt, entity: name.clone(), keys: recorded.clone() });
        let receipt = match gateway.registry.submit(&gateway.project, &change, &request.who, why).await {
            Err(RegistryError::Refused(Refusal::OtherSalt)) => continue,
            receipt => receipt?,
        };
        tracing::info!(entity = &*entity, keys = keys.len(), who = request.who, "entities are forgotten");
        gateway.follower.follow(Retry::Now).await;
        let list = receipt.state.project(gateway.project.as_str()).map(listed).unwrap_or_default();
        let what = Forgetting { list, hashes: with_entity, keys: all_keys };
        let places = everywhere(gateway, &*events, what, Mode::Apply, progress).await?;
        done(gateway, name, recorded, &places, &request.who).await?;
        return Ok(result(receipt.entry.0, receipt.outcome == Outcome::AlreadySo, places, shown, started));
    }
    Err(RegistryError::from(Refusal::OtherSalt).into())
}

fn invalid(error: NameError) -> Failure {
    Failure::invalid(error.to_string())
}

fn result(
    control_entry: u64,
    existed: bool,
    places: Vec<ForgottenPlace>,
    hashes: Vec<String>,
    started: tokio::time::Instant,
) -> v1::ForgetResult {
    let place = |place: ForgottenPlace| v1::ForgottenPlace {
        kind: place.kind,
        name: place.name,
        rows_removed: place.rows_removed,
        rows_cleared: place.rows_cleared,
        files: place.files,
        note: place.note.unwrap_or_default(),
    };
    let places = places.into_iter().map(place).collect();
    v1::ForgetResult { control_entry, existed, places, hashes, seconds: started.elapsed().as_secs_f64() }
}

/// The entry that says that nothing is left.
async fn done(
    gateway: &Gateway,
    entity: EntityName,
    keys: Vec<id::KeyHash>,
    places: &[ForgottenPlace],
    who: &str,
) -> Result<(), Failure> {
    let mut removed: BTreeMap<String, u64> = BTreeMap::new();
    for place in places.iter().filter(|place| place.rows_removed + place.rows_cleared > 0) {
        *removed.entry(place.kind.clone()).or_default() += place.rows_removed + place.rows_cleared;
    }
    let change = Change::ForgetDone(ForgetDone { entity, keys, removed });
    gateway.registry.submit(&gateway.project, &change, who, None).await?;
    Ok(())
}

async fn everywhere(
    gateway: &Gateway,
    events: &dyn Events,
    what: Forgetting,
    mode: Mode,
    progress: mpsc::Sender<String>,
) -> Result<Vec<ForgottenPlace>, Failure> {
    let only = what.list.only(&what.hashes);
    let mut places = events.forget(what, mode, progress.clone()).await?;
    let state = gateway.registry.state();
    let datasets = state.project(gateway.project.as_str()).into_iter().flat_map(|project| project.datasets.values());
    let datasets: Vec<DatasetRecord> = datasets.cloned().collect();
    for record in datasets {
        let dataset = &record.dataset;
        let name = format!("{} {}", dataset.name, dataset.id);
        drop(progress.try_send(format!("looking into dataset `{name}`")));
        let mut place = ForgottenPlace { kind: "dataset".into(), name, ..ForgottenPlace::default() };
        let Some(service) = service_of(gateway, &record).await? else {
            place.note = Some(format!(
                "this build does not know service `{}` as it was when the dataset was made, so its rows were not looked \
                 into; run the build that made it, or remove {}",
                dataset.service, dataset.manifest
            ));
            places.push(place);
            continue;
        };
        let path = Path::parse(&dataset.manifest);
        let path = path.map_err(|error| Failure::internal("the place of a dataset cannot be read", &error))?;
        match in_dataset(gateway, &path, &service, &only, mode).await {
            Ok(rows) => place.rows_removed = rows,
            // Somebody removed it, and with it what it held.
            Err(DatasetError::Store { source: object_store::Error::NotFound { .. }, .. }) => continue,
            Err(error) => return Err(Failure::internal("a dataset could not be rewritten", &error)),
        }
        place.files = u64::from(place.rows_removed > 0);
        places.push(place);
    }
    drop(progress.try_send("looking into the serving log and labels".to_owned()));
    places.extend(in_what_was_served(gateway, &only, mode).await?);
    Ok(places)
}

/// The serving log, and the labels of its predictions. Rows that wait on the disk of some gateway are looked into when they
/// are uploaded.
async fn in_what_was_served(
    gateway: &Gateway,
    forgotten: &Forgotten,
    mode: Mode,
) -> Result<Vec<ForgottenPlace>, Failure> {
    let (store, root) = (gateway.registry.log().store(), gateway.registry.root());
    let (mut places, is_dry) = (Vec::new(), mode == Mode::DryRun);
    let plans = plans(gateway).await?;
    let service_of = |name: &str, digest: &str| {
        let mut services = plans.iter().filter_map(|plan| plan.service(name));
        services.find(|service| service.semantic_digest.as_str() == digest).cloned()
    };
    let redacted = serving_log::redact::redact(store, root, &service_of, forgotten, is_dry).await;
    let redacted = redacted.map_err(|error| Failure::internal("the serving log could not be rewritten", &error))?;
    let note = (redacted.unread > 0).then(|| {
        format!(
            "{} files were not looked into: they name entities by keyed hashes, or were written under definitions that are \
             not at hand; they go with `serving_log.retention`",
            redacted.unread
        )
    });
    let mut place =
        ForgottenPlace { kind: "serving log".into(), name: "serving-log".into(), ..ForgottenPlace::default() };
    (place.rows_removed, place.files, place.note) = (redacted.rows, redacted.files, note);
    places.push(place);
    for model in plans.first().iter().flat_map(|plan| &plan.models) {
        let (rows, files) = labels::forget(store, root, model, forgotten, is_dry)
            .await
            .map_err(|error| Failure::internal("labels could not be rewritten", &error))?;
        let mut place =
            ForgottenPlace { kind: "labels".into(), name: model.name.to_string(), ..ForgottenPlace::default() };
        (place.rows_removed, place.files) = (rows, files);
        places.push(place);
    }
    Ok(places)
}

/// The definitions in force first, then those before as far back as models and logs may refer to them.
async fn plans(gateway: &Gateway) -> Result<Vec<Arc<Plan>>, Failure> {
    let served = gateway.served();
    let mut plans: Vec<Arc<Plan>> = served.definitions.iter().map(|definitions| definitions.plan.clone()).collect();
    let state = gateway.registry.state();
    let mut entries: Vec<EntryNumber> = state
        .project(gateway.project.as_str())
        .into_iter()
        .flat_map(|project| project.services.values().flat_map(|digests| digests.values().copied()))
        .collect();
    entries.sort_unstable();
    entries.dedup();
    for entry in entries.into_iter().rev().take(PLANS_MAX) {
        let catalog = gateway.registry.catalog(entry).await?;
        if let Ok(plan) = compile(&gateway.project, &catalog).await {
            plans.push(plan);
        }
    }
    Ok(plans)
}

async fn in_dataset(
    gateway: &Gateway,
    path: &Path,
    service: &Arc<ServicePlan>,
    forgotten: &Forgotten,
    mode: Mode,
) -> Result<u64, DatasetError> {
    let store = gateway.registry.log().store();
    if mode == Mode::DryRun {
        return redact::look(store, path, service, forgotten).await;
    }
    let now = DateTime::from_timestamp_micros((gateway.clock)()).unwrap_or_default();
    let now = now.to_rfc3339_opts(SecondsFormat::Micros, true);
    redact::redact(store, path, service, forgotten, &now, None).await
}

/// The service that computed a dataset: it says which columns of the spine are keys of what.
async fn service_of(gateway: &Gateway, record: &DatasetRecord) -> Result<Option<Arc<ServicePlan>>, Failure> {
    let dataset = &record.dataset;
    let wanted = dataset.service_digest.as_str();
    let served = gateway.served();
    let plan = served.definitions.as_ref().map(|definitions| &definitions.plan);
    let current = plan.and_then(|plan| plan.service(dataset.service.as_str()));
    if let Some(service) = current.filter(|service| service.semantic_digest.as_str() == wanted) {
        return Ok(Some(service.clone()));
    }
    let state = gateway.registry.state();
    let digests = state.project(gateway.project.as_str()).and_then(|project| project.services.get(&dataset.service));
    let Some(entry) = digests.and_then(|digests| digests.get(&dataset.service_digest)) else { return Ok(None) };
    let catalog = gateway.registry.catalog(*entry).await?;
    // Its columns are what the definitions say, also where this build computes other values from them.
    let plan = compile(&gateway.project, &catalog).await.ok();
    Ok(plan.and_then(|plan| plan.service(dataset.service.as_str()).cloned()))
}

/// A dataset that was begun before an entity was forgotten, and recorded after, is looked into now.
pub async fn catch_up(gateway: &Gateway, manifest: &Manifest, path: &Path) -> Result<(), Failure> {
    let state = gateway.registry.refresh().await?;
    let Some(project) = state.project(gateway.project.as_str()).filter(|project| !project.forgotten.is_empty()) else {
        return Ok(());
    };
    let begun = DateTime::parse_from_rfc3339(&manifest.created_at).ok();
    let is_later = |at: DateTime<chrono::Utc>| begun.is_none_or(|begun| at >= begun);
    if !project.forgotten.all().any(|(_, _, key)| is_later(key.asked.at)) {
        return Ok(());
    }
    let Some(record) = project.dataset(&manifest.id).cloned() else { return Ok(()) };
    // Two that write one dataset anew would remove each other's parts.
    let _one = gateway.forgetting.lock().await;
    let Some(service) = service_of(gateway, &record).await? else { return Ok(()) };
    let done = in_dataset(gateway, path, &service, &listed(project), Mode::Apply).await;
    done.map_err(|error| Failure::internal("a dataset could not be rewritten", &error))?;
    Ok(())
}

/// Finishes what was asked for and is not done: by a server that ended, or by a command that found none. Never returns.
pub async fn finish(gateway: &Arc<Gateway>) {
    loop {
        let pause = match finish_pending(gateway).await {
            Ok(()) => LOOK_AGAIN,
            Err(failure) => {
                let error = chain(&failure);
                tracing::warn!(
                    error,
                    "entities that were asked to be forgotten could not be removed; they are hidden, and it is tried again"
                );
                TRY_AGAIN
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn finish_pending(gateway: &Arc<Gateway>) -> Result<(), Failure> {
    let is_pending = || {
        let state = gateway.registry.state();
        state.project(gateway.project.as_str()).is_some_and(|project| project.forgotten.pending().next().is_some())
    };
    let Some(events) = gateway.events.clone().filter(|_| is_pending()) else { return Ok(()) };
    // What is pending because it is being done is done when the lock is free.
    let _one = gateway.forgetting.lock().await;
    let state = gateway.registry.refresh().await?;
    let Some(project) = state.project(gateway.project.as_str()) else { return Ok(()) };
    let mut pending: BTreeMap<EntityName, Vec<id::KeyHash>> = BTreeMap::new();
    for (entity, hash) in project.forgotten.pending() {
        pending.entry(entity.clone()).or_default().push(hash.clone());
    }
    if pending.is_empty() {
        return Ok(());
    }
    gateway.follower.follow(Retry::Now).await;
    let list = listed(project);
    for (entity, keys) in pending {
        let parsed = keys.iter().filter_map(|hash| hash.as_str().parse::<KeyHash>().ok());
        let hashes = parsed.map(|hash| (Arc::from(entity.as_str()), hash)).collect();
        let what = Forgetting { list: list.clone(), hashes, keys: Vec::new() };
        let (progress, _unread) = mpsc::channel(1);
        let places = everywhere(gateway, &*events, what, Mode::Apply, progress).await?;
        for keys in keys.chunks(KEYS_MAX) {
            done(gateway, entity.clone(), keys.to_vec(), &places, FINISHED_BY).await?;
        }
        tracing::info!(entity = entity.as_str(), keys = keys.len(), "what was left to be forgotten is removed");
    }
    Ok(())
}
