//! Which bins a version is counted over: the profiles of the dataset that it was trained on, and of what it makes of it.
//!
//! The outputs of a version on its training set are not in the dataset, so whichever gateway comes first runs the version
//! over a seeded sample of it, in small pieces behind whatever is asked, and keeps what came out beside the model.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::datatypes::{DataType, Field, Schema};
use drift::random::{hash, mix};
use feature_defs::plan::{Assembled, ServicePlan};
use feature_defs::time::Status;
use feature_defs::value::Type;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use offline_store::dataset::{self, Manifest, Selection, StoredDataset};
use offline_store::point_in_time::EVENT_TIMESTAMP;
use offline_store::profile::blocks::Blocks;
use offline_store::profile::{BLOCK, BYTES_MAX, Collector, ProfiledColumn, Profiles};
use registry::id::ModelVersion;
use registry::model::ModelRecord;

use super::counting::{countable, profiled_type};
use super::{Drift, Version};
use crate::answer::Gateway;
use crate::features::Features;
use crate::fetch::Fetched;
use crate::predict::{self, RowStatus};
use crate::request::Rows;
use crate::status::{Failure, chain};
use crate::versions::ServedModel;

/// What could not be had is asked for again after this.
const AGAIN: Duration = Duration::from_secs(30);
/// A dataset may lose rows of somebody who is forgotten; then it is counted over other bins.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
/// Files of profiles of outputs begin so; the digest of the dataset's profile follows.
const OUTPUTS: &str = "output-profile-";
/// Gateways wait for so many turns of so long before they run what another may have run.
const TURNS: u64 = 8;
const TURN: Duration = Duration::from_secs(3);
/// Rows of the training set that a version is run on.
const OUTPUT_ROWS: u64 = 10_000;
/// Rows of one piece of it, what it may take, and the pause behind it: never more than a small share of an executor.
const PIECE_ROWS: usize = 32;
const PIECE_WITHIN: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(20);
/// Versions that were asked for and are gone are forgotten beyond so many.
const KNOWN_MAX: usize = 4_096;

/// What is known of the bins of a version.
pub(super) enum Known {
    /// Somebody asked.
    Wanted,
    Ready(Arc<VersionProfiles>),
    /// It has none, and never will.
    Without {
        why: String,
    },
    Failed {
        why: String,
        at: Instant,
    },
}

/// The bins of one version.
pub(super) struct VersionProfiles {
    /// Of the dataset's file of profiles.
    pub digest: String,
    pub dataset: String,
    pub features: Profiles,
    /// None until some gateway has run the version on its training set.
    pub outputs: Option<Profiles>,
    /// Why there are none yet.
    pub outputs_why: Option<String>,
    /// Names of all blocks that are counted by.
    pub blocks: BTreeSet<String>,
    looked: Instant,
    /// When its outputs were last asked for with a model at hand; None before the first time.
    tried: Option<Instant>,
}

impl VersionProfiles {
    pub(super) fn new(
        digest: String,
        dataset: String,
        features: Profiles,
        outputs: Option<Profiles>,
        outputs_why: Option<String>,
    ) -> VersionProfiles {
        let all = features.features.iter().chain(outputs.iter().flat_map(|outputs| &outputs.features));
        let blocks = all.map(|feature| feature.blocks.clone()).collect();
        let looked = Instant::now();
        VersionProfiles { digest, dataset, features, outputs, outputs_why, blocks, looked, tried: None }
    }
}

/// Why a version has no bins.
enum Missing {
    Never(String),
    Now(String),
}

impl From<dataset::DatasetError> for Missing {
    fn from(error: dataset::DatasetError) -> Missing {
        match error {
            // Another file, or another build, could mend it; this dataset stays what it is.
            dataset::DatasetError::Newer { .. } => Missing::Never(chain(&error)),
            _ => Missing::Now(chain(&error)),
        }
    }
}

/// Finds what active versions, and those that were asked, are counted over.
pub(super) async fn look(gateway: &Arc<Gateway>, drift: &Arc<Drift>) {
    let served = gateway.served();
    let active = served.versions.iter().flat_map(|(name, versions)| {
        let ready = versions.iter().filter_map(|(number, version)| Some((*number, version.state.ready.clone()?)));
        ready.map(move |(number, model)| ((Arc::<str>::from(name.as_str()), number), model))
    });
    let active: Vec<(Version, Arc<ServedModel>)> = active.collect();
    {
        let mut state = drift.lock();
        if state.known.len() > KNOWN_MAX {
            state.known.retain(|version, _| active.iter().any(|(known, _)| known == version));
        }
        for (version, _) in &active {
            state.known.entry(version.clone()).or_insert(Known::Wanted);
        }
    }
    let due: Vec<Version> = {
        let state = drift.lock();
        let is_due = |known: &Known| match known {
            Known::Wanted => true,
            Known::Without { .. } => false,
            Known::Failed { at, .. } => at.elapsed() >= AGAIN,
            Known::Ready(profiles) => profiles.looked.elapsed() >= LOOK_AGAIN,
        };
        state.known.iter().filter(|(_, known)| is_due(known)).map(|(version, _)| version.clone()).collect()
    };
    for version in due {
        // The features of all versions before the outputs of any: those take a while.
        again(gateway, drift, &version, None).await;
    }
    for (version, model) in active {
        let lacks_outputs = match drift.lock().known.get(&version) {
            Some(Known::Ready(profiles)) => {
                profiles.outputs.is_none() && profiles.tried.is_none_or(|tried| tried.elapsed() >= AGAIN)
            }
            _ => false,
        };
        if lacks_outputs {
            again(gateway, drift, &version, Some(&model)).await;
        }
    }
}

/// Looks for the bins of one version, and remembers what came of it.
async fn again(gateway: &Arc<Gateway>, drift: &Arc<Drift>, version: &Version, model: Option<&Arc<ServedModel>>) {
    let before = match drift.lock().known.get(version) {
        Some(Known::Ready(profiles)) => Some(profiles.clone()),
        _ => None,
    };
    let found = find(gateway, drift, version, model, before.as_ref()).await;
    let known = match (found, before) {
        (Ok(profiles), _) => Known::Ready(profiles),
        (Err(Missing::Never(why)), _) => {
            tracing::info!(model = &*version.0, version = version.1, why, "drift of a version cannot be judged");
            Known::Without { why }
        }
        // What was found before stays true until the store says otherwise.
        (Err(Missing::Now(_)), Some(before)) => Known::Ready(before),
        (Err(Missing::Now(why)), None) => Known::Failed { why, at: Instant::now() },
    };
    drift.lock().known.insert(version.clone(), known);
}

/// Why there are no bins for a version, in words.
pub(super) fn why(known: Option<&Known>) -> String {
    match known {
        Some(Known::Without { why }) => why.clone(),
        Some(Known::Failed { why, .. }) => format!("its profile could not be read: {why}"),
        Some(Known::Ready(_)) => String::new(),
        Some(Known::Wanted) | None => "its profile is being read; ask again in some seconds".to_owned(),
    }
}

/// The profiles of a version, from the object store.
pub(super) async fn of_version(
    gateway: &Arc<Gateway>,
    drift: &Drift,
    version: &Version,
) -> Option<Arc<VersionProfiles>> {
    if let Some(Known::Ready(profiles)) = drift.lock().known.get(version) {
        return Some(profiles.clone());
    }
    let found = find(gateway, drift, version, None, None).await;
    let (known, found) = match found {
        Ok(profiles) => (Known::Ready(profiles.clone()), Some(profiles)),
        Err(Missing::Never(why)) => (Known::Without { why }, None),
        Err(Missing::Now(why)) => (Known::Failed { why, at: Instant::now() }, None),
    };
    drift.lock().known.insert(version.clone(), known);
    found
}

async fn find(
    gateway: &Arc<Gateway>,
    drift: &Drift,
    version: &Version,
    model: Option<&Arc<ServedModel>>,
    before: Option<&Arc<VersionProfiles>>,
) -> Result<Arc<VersionProfiles>, Missing> {
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let record: ModelRecord = project
        .and_then(|project| project.model(&version.0, ModelVersion(version.1)))
        .cloned()
        .ok_or_else(|| Missing::Now("the version is not registered".to_owned()))?;
    let Some(id) = &record.model.dataset else {
        return Err(Missing::Never(
            "it was registered without the dataset that it was trained on; name it with `register_model(dataset=...)` or \
             `coeval model register --dataset`"
                .to_owned(),
        ));
    };
    let known = project.and_then(|project| project.dataset(id.as_str()));
    let known = known.ok_or_else(|| Missing::Now(format!("dataset `{id}` is not known here")))?;
    let name = format!("{} {id}", known.dataset.name);
    let path = Path::parse(&known.dataset.manifest).map_err(|error| Missing::Never(error.to_string()))?;
    let manifest = dataset::open(&drift.store, &path).await?;
    let Some(file) = &manifest.profiles else {
        return Err(Missing::Never(format!(
            "dataset {name} has no profile: it was made by a version that made none; create it again under another name"
        )));
    };
    let digest = file.digest.to_string();
    let features = match before.filter(|before| before.digest == digest) {
        Some(before) => before.features.clone(),
        None => {
            let features = dataset::profiles(&drift.store, &path, &manifest).await?;
            features.ok_or_else(|| Missing::Now("the profile is gone".to_owned()))?
        }
    };
    let outputs = match before.filter(|before| before.digest == digest).and_then(|before| before.outputs.clone()) {
        Some(outputs) => Ok(outputs),
        None => outputs(gateway, drift, version, model, &path, &manifest, &digest).await,
    };
    let (outputs, outputs_why) = match outputs {
        Ok(outputs) => (Some(outputs), None),
        Err(why) => (None, Some(why)),
    };
    let mut profiles = VersionProfiles::new(digest, name, features, outputs, outputs_why);
    profiles.tried = model.map(|_| Instant::now());
    Ok(Arc::new(profiles))
}

fn outputs_path(root: &Path, version: &Version, digest: &str) -> Path {
    let folder = root.clone().join("models").join(&*version.0).join(version.1.to_string());
    folder.join(format!("{OUTPUTS}{}.json", &digest[..digest.len().min(16)]))
}

/// The profile of the outputs: what is there, or what running the version gives.
async fn outputs(
    gateway: &Gateway,
    drift: &Drift,
    version: &Version,
    model: Option<&Arc<ServedModel>>,
    dataset_path: &Path,
    manifest: &Manifest,
    digest: &str,
) -> Result<Profiles, String> {
    let path = outputs_path(&drift.root, version, digest);
    if let Some(found) = stored_outputs(drift, &path).await? {
        return Ok(found);
    }
    let model = model.ok_or("no gateway has run the version on its training set yet")?;
    if !gateway.presence.others().is_empty() {
        // All gateways get here at once; one of them is enough.
        let turn = hash(drift.incarnation.as_bytes()) % TURNS;
        tokio::time::sleep(TURN * u32::try_from(turn).unwrap_or(0)).await;
        if let Some(found) = stored_outputs(drift, &path).await? {
            return Ok(found);
        }
    }
    let stored = StoredDataset::open(drift.store.clone(), dataset_path).await.map_err(|error| chain(&error))?;
    let profiles = run(&Arc::new(stored), manifest, model).await?;
    let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match drift.store.put_opts(&path, profiles.to_bytes().into(), create).await {
        Ok(_) => {
            remove_earlier(drift, &path).await;
            tracing::info!(
                model = &*version.0,
                version = version.1,
                rows = profiles.rows,
                "outputs on the training set are profiled"
            );
            Ok(profiles)
        }
        // Another gateway was first: all count over the same bins.
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
            stored_outputs(drift, &path).await?.ok_or_else(|| "the profile of the outputs is gone again".to_owned())
        }
        Err(error) => Err(chain(&error)),
    }
}

/// What was made of the training set as it was before somebody in it was forgotten.
async fn remove_earlier(drift: &Drift, path: &Path) {
    let folder: Path = path.parts().take(path.parts().count().saturating_sub(1)).collect();
    let is_earlier = |other: &Path| other != path && other.filename().is_some_and(|name| name.starts_with(OUTPUTS));
    let listed: Result<Vec<_>, _> = drift.store.list(Some(&folder)).try_collect().await;
    for object in listed.unwrap_or_default().into_iter().filter(|object| is_earlier(&object.location)) {
        if let Err(error) = drift.store.delete(&object.location).await {
            tracing::warn!(%error, path = %object.location, "an earlier profile of outputs could not be removed");
        }
    }
}

async fn stored_outputs(drift: &Drift, path: &Path) -> Result<Option<Profiles>, String> {
    let bytes = match drift.store.get(path).await {
        Ok(found) if found.meta.size > BYTES_MAX => return Err(format!("{path} is too large for profiles")),
        Ok(found) => found.bytes().await.map_err(|error| chain(&error))?,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(chain(&error)),
    };
    Profiles::from_bytes(&bytes).map(Some).map_err(|what| format!("{path} cannot be read: {what}"))
}

/// Runs a version over a sample of its training set.
async fn run(stored: &Arc<StoredDataset>, manifest: &Manifest, model: &ServedModel) -> Result<Profiles, String> {
    let service = &model.plan.service;
    if manifest.service_digest != service.semantic_digest.as_str() {
        return Err("the dataset was made by other definitions of its service".to_owned());
    }
    let sample = sample(stored, service).await?;
    let blocks: Vec<String> = Blocks::of(service).names().map(str::to_owned).collect();
    let mut pieces: Vec<RecordBatch> = Vec::new();
    let mut columns: Option<Vec<ProfiledColumn>> = None;
    for from in (0..sample.num_rows()).step_by(PIECE_ROWS) {
        let piece = sample.slice(from, PIECE_ROWS.min(sample.num_rows() - from));
        let outputs = answer(model, service, &piece).await.map_err(|failure| failure.message)?;
        let Some(piece) = answered(&piece, &outputs, &blocks, &mut columns)? else { continue };
        pieces.push(piece);
        tokio::time::sleep(PAUSE).await;
    }
    let (Some(columns), Some(first)) = (columns, pieces.first()) else {
        return Err("the version answered no row of its training set".to_owned());
    };
    let schema = first.schema();
    let whole = concat_batches(&schema, &pieces).map_err(|error| error.to_string())?;
    let (name, digest) = (service.name.to_string(), service.semantic_digest.to_string());
    let counted = tokio::task::spawn_blocking(move || {
        let collector = Collector::of_columns(&schema, &columns, name, digest)?;
        let Some(mut collector) = collector else { return Ok(None) };
        collector.add(&whole)?;
        let mut recounts = collector.recounts(1)?;
        recounts.iter_mut().try_for_each(|recount| recount.add(&whole))?;
        collector.exact(recounts).map(Some)
    });
    let profiles: Result<Option<Profiles>, drift::DriftError> = counted.await.map_err(|error| error.to_string())?;
    let profiles = profiles.map_err(|error| error.to_string())?.ok_or("the outputs have no blocks")?;
    // Of the rows that were run, all were counted; of the training set they are a sample.
    Ok(Profiles { exact: manifest.rows <= OUTPUT_ROWS, ..profiles })
}

/// A seeded sample of a training set, with what blocks need.
async fn sample(stored: &Arc<StoredDataset>, service: &ServicePlan) -> Result<RecordBatch, String> {
    let schema = stored.whole_schema().clone();
    let names = service.outputs.iter().map(|output| output.name.clone()).chain([EVENT_TIMESTAMP.to_owned()]);
    let blocks = Blocks::of(service);
    let names = names.chain(blocks.names().map(|name| format!("{BLOCK}{name}")));
    let columns = names.map(|name| schema.index_of(&name).map_err(|_| format!("the dataset has no column `{name}`")));
    let columns: Vec<usize> = columns.collect::<Result<_, _>>()?;
    let mut batches = stored.read(&Selection::default(), &columns, 0).map_err(|error| chain(&error))?;
    // By row number, so that whoever runs it runs the same rows.
    let share = OUTPUT_ROWS as f64 / stored.manifest.rows.max(1) as f64;
    let limit = if share >= 1.0 { u64::MAX } else { (share * u64::MAX as f64) as u64 };
    let (mut row, mut picked) = (0_u64, Vec::new());
    while let Some(batch) = batches.try_next().await.map_err(|error| chain(&error))? {
        let rows = batch.num_rows() as u64;
        let wanted: BooleanArray = (row..row + rows).map(|row| Some(mix(row ^ 0x6f75_7470_7574) <= limit)).collect();
        row += rows;
        picked.push(filter_record_batch(&batch, &wanted).map_err(|error| error.to_string())?);
    }
    let schema = batches.schema.clone();
    concat_batches(&schema, &picked).map_err(|error| error.to_string())
}

pub(crate) type Outputs = (Vec<(String, ArrayRef, Type)>, Vec<RowStatus>);

/// What the version makes of some rows of features.
pub(crate) async fn answer(
    model: &ServedModel,
    service: &ServicePlan,
    piece: &RecordBatch,
) -> Result<Outputs, Failure> {
    let rows = piece.num_rows();
    let present: Arc<[Status]> = vec![Status::Present; rows].into();
    let columns = service.outputs.iter().filter_map(|output| piece.column_by_name(&output.name).cloned()).collect();
    let outputs = service.outputs.len();
    let assembled = Assembled { columns, statuses: vec![present; outputs], defaults: vec![0; outputs] };
    let fetched = Fetched { inputs: Vec::new(), at: vec![0; rows], stale: false, store_error: None };
    let features = Features { fetched, assembled, fetch_time: Duration::ZERO, transform_time: Duration::ZERO };
    let rows = Rows { count: rows, columns: Vec::new(), incomplete: Vec::new() };
    let predicted = predict::behind_requests(model, &rows, &features, Instant::now() + PIECE_WITHIN).await?;
    Ok((predicted.outputs, predicted.rows.iter().map(|row| row.status).collect()))
}

/// The rows that the version answered, with what profiles need; None where it answered none.
fn answered(
    piece: &RecordBatch,
    (outputs, statuses): &Outputs,
    blocks: &[String],
    columns: &mut Option<Vec<ProfiledColumn>>,
) -> Result<Option<RecordBatch>, String> {
    let is_answered: BooleanArray = statuses.iter().map(|status| Some(*status == RowStatus::Answered)).collect();
    if is_answered.true_count() == 0 {
        return Ok(None);
    }
    let columns = columns.get_or_insert_with(|| {
        let profiled = outputs.iter().map(|(name, column, value_type)| ProfiledColumn {
            name: name.clone(),
            value_type: profiled_type(column, value_type),
            blocks: blocks.to_vec(),
        });
        profiled.collect()
    });
    let mut fields = Vec::new();
    let mut arrays: Vec<ArrayRef> = Vec::new();
    for ((_, array, value_type), column) in outputs.iter().zip(&*columns) {
        let array = countable(array, value_type, &column.value_type)
            .ok_or_else(|| format!("output `{}` is not of one shape", column.name))?;
        fields.push(Field::new(&column.name, column.value_type.arrow(), true));
        arrays.push(array);
    }
    let beside = std::iter::once(EVENT_TIMESTAMP.to_owned()).chain(blocks.iter().map(|name| format!("{BLOCK}{name}")));
    for name in beside {
        let array = piece.column_by_name(&name).cloned().ok_or_else(|| format!("there is no column `{name}`"))?;
        let data_type: DataType = array.data_type().clone();
        fields.push(Field::new(name, data_type, true));
        arrays.push(array);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(piece.num_rows()));
    let batch = RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &options);
    let batch = batch.and_then(|batch| filter_record_batch(&batch, &is_answered)).map_err(|error| error.to_string())?;
    Ok(Some(batch))
}
