//! Counting: each row of each prediction, by version and arm, over the bins of what the version was trained on.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float32Type};
use drift::counts::{Counter, Counts, Flag};
use feature_defs::plan::ServicePlan;
use feature_defs::time::{Micros, STATIC, Status, floor_to};
use feature_defs::value::Type;
use feature_defs::window::HOUR;
use offline_store::profile::FeatureProfile;
use offline_store::profile::blocks::{Answered, Blocks};
use offline_store::profile::column::{RowsOf, add};
use offline_store::profile::flags::flags;

use super::profiles::{Known, VersionProfiles};
use super::snapshot::Arm;
use super::{Drift, Version};
use crate::features::Features;
use crate::observe::{About, Observed, ObservedPrediction, Observer};
use crate::predict::RowStatus;

/// Hours that wait to be written hold at most so much; then the oldest is given up.
const HOURS_BYTES_MAX: usize = 256 << 20;
/// Of counts beside their cells: outcomes, distinct values, moments.
const COUNTS_BYTES: usize = 5_120;
/// Services whose blocks are kept ready.
const SERVICES_MAX: usize = 64;

/// Why a row was not counted.
pub(super) const DROPPED: &str = "queue_full";
const NO_PROFILE: &str = "no_profile";
const LOADING: &str = "profile_loading";
const CHANGED: &str = "profile_changed";
const BROKEN: &str = "not_countable";

pub(super) type HourKey = (Micros, Version);

/// What was counted and is not settled on the object store.
pub(super) struct Hours {
    by_key: BTreeMap<HourKey, Hour>,
    bytes: usize,
    pub bytes_max: usize,
    /// Rows of hours that were given up.
    pub lost: u64,
}

impl Default for Hours {
    fn default() -> Hours {
        Hours { by_key: BTreeMap::new(), bytes: 0, bytes_max: HOURS_BYTES_MAX, lost: 0 }
    }
}

#[derive(Default)]
struct Hour {
    arms: BTreeMap<String, Counted>,
    /// Of changes, and up to which one it was written.
    changes: u64,
    written: u64,
    bytes: usize,
}

#[derive(Default)]
struct Counted {
    rows: u64,
    uncounted: BTreeMap<&'static str, u64>,
    over: Option<Over>,
}

/// Counters over the bins of one set of profiles.
struct Over {
    profiles: Arc<VersionProfiles>,
    features: Vec<Counter>,
    outputs: Vec<Counter>,
}

impl Over {
    fn new(profiles: Arc<VersionProfiles>) -> Over {
        let counters = |features: &[FeatureProfile]| {
            features.iter().map(|feature| Counter::new(feature.profile.layout().clone())).collect()
        };
        let outputs = profiles.outputs.as_ref().map_or_else(Vec::new, |outputs| counters(&outputs.features));
        Over { features: counters(&profiles.features.features), outputs, profiles }
    }

    fn bytes(&self) -> usize {
        let counters = self.features.iter().chain(&self.outputs);
        counters.map(|counter| bytes_of(counter.counts())).sum()
    }

    /// The same counts for profiles that came in place of these; how many features had to begin anew.
    fn carried(mut self, profiles: Arc<VersionProfiles>) -> (Over, usize) {
        let mut next = Over::new(profiles);
        let mut anew = 0;
        let names = |profiles: &[FeatureProfile]| profiles.iter().map(|known| known.name.clone()).collect::<Vec<_>>();
        let before = [
            (names(&self.profiles.features.features), std::mem::take(&mut self.features)),
            (
                self.profiles.outputs.as_ref().map_or_else(Vec::new, |outputs| names(&outputs.features)),
                std::mem::take(&mut self.outputs),
            ),
        ];
        let after = [
            (names(&next.profiles.features.features), &mut next.features),
            (
                next.profiles.outputs.as_ref().map_or_else(Vec::new, |outputs| names(&outputs.features)),
                &mut next.outputs,
            ),
        ];
        for ((old_names, old), (new_names, new)) in before.into_iter().zip(after) {
            let mut old: HashMap<String, Counter> = old_names.into_iter().zip(old).collect();
            for (name, counter) in new_names.into_iter().zip(new.iter_mut()) {
                match old.remove(&name) {
                    Some(known) if known.counts().fits(counter.layout()) => *counter = known,
                    Some(_) => anew += 1,
                    None => {}
                }
            }
        }
        (next, anew)
    }
}

fn bytes_of(counts: &Counts) -> usize {
    COUNTS_BYTES + counts.parts().iter().map(|part| part.cells().len() * 8 + COUNTS_BYTES).sum::<usize>()
}

impl Hours {
    fn arm(&mut self, hour: Micros, version: &Version, arm: &str) -> &mut Counted {
        let hour = self.by_key.entry((hour, version.clone())).or_default();
        hour.changes += 1;
        hour.arms.entry(arm.to_owned()).or_default()
    }

    /// What has to be written, with what it has come to.
    pub fn changed(&self) -> Vec<(HourKey, u64)> {
        let changed = self.by_key.iter().filter(|(_, hour)| hour.changes > hour.written);
        changed.map(|(key, hour)| (key.clone(), hour.changes)).collect()
    }

    pub fn snapshot(&self, key: &HourKey) -> Option<BTreeMap<String, Arm>> {
        let arms = self.by_key.get(key)?.arms.iter().map(|(name, counted)| (name.clone(), counted.snapshot()));
        Some(arms.collect())
    }

    pub fn written(&mut self, key: &HourKey, changes: u64) {
        if let Some(hour) = self.by_key.get_mut(key) {
            hour.written = hour.written.max(changes);
        }
    }

    /// Lets go of hours that began before `before` and are written.
    pub fn settle(&mut self, before: Micros) {
        let bytes = &mut self.bytes;
        self.by_key.retain(|(began, _), hour| {
            let stays = *began > before || hour.changes > hour.written;
            if !stays {
                *bytes = bytes.saturating_sub(hour.bytes);
            }
            stays
        });
    }

    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn waiting(&self) -> usize {
        self.by_key.values().filter(|hour| hour.changes > hour.written).count()
    }

    /// Rows of hours that were not written since they changed.
    pub fn unwritten(&self) -> u64 {
        let waiting = self.by_key.values().filter(|hour| hour.changes > hour.written);
        waiting.flat_map(|hour| hour.arms.values()).map(|counted| counted.rows).sum()
    }

    /// Gives up the oldest hours where all together hold too much; how many rows they had.
    fn bounded(&mut self, newest: &HourKey) -> u64 {
        let mut lost = 0;
        while self.bytes > self.bytes_max {
            let Some(oldest) = self.by_key.keys().find(|key| *key != newest).cloned() else { break };
            if let Some(hour) = self.by_key.remove(&oldest) {
                self.bytes = self.bytes.saturating_sub(hour.bytes);
                lost += hour.arms.values().map(|counted| counted.rows).sum::<u64>();
            }
        }
        self.lost += lost;
        lost
    }
}

impl Counted {
    fn snapshot(&self) -> Arm {
        let mut arm = Arm { rows: self.rows, ..Arm::default() };
        arm.uncounted = self.uncounted.iter().map(|(cause, rows)| ((*cause).to_owned(), *rows)).collect();
        let Some(over) = &self.over else { return arm };
        let named = |profiles: &[FeatureProfile], counters: &[Counter]| {
            let named = profiles.iter().zip(counters);
            named.map(|(feature, counter)| (feature.name.clone(), counter.counts().clone())).collect()
        };
        arm.features = named(&over.profiles.features.features, &over.features);
        if let Some(outputs) = &over.profiles.outputs {
            arm.outputs = named(&outputs.features, &over.outputs);
        }
        arm
    }
}

/// The observer that counts.
pub struct Counting {
    drift: Arc<Drift>,
    /// By where a plan lies; the plan is held, so that no other can lie there.
    blocks: HashMap<usize, (Arc<ServicePlan>, Arc<Blocks>)>,
}

impl Counting {
    pub fn new(drift: Arc<Drift>) -> Counting {
        Counting { drift, blocks: HashMap::new() }
    }

    fn blocks(&mut self, service: &Arc<ServicePlan>) -> Arc<Blocks> {
        let place = Arc::as_ptr(service) as usize;
        if let Some((_, blocks)) = self.blocks.get(&place) {
            return blocks.clone();
        }
        if self.blocks.len() >= SERVICES_MAX {
            self.blocks.clear();
        }
        let blocks = Arc::new(Blocks::of(service));
        self.blocks.insert(place, (service.clone(), blocks.clone()));
        blocks
    }
}

impl Observer for Counting {
    fn observe(&mut self, observed: &Observed) {
        let Some(prediction) = &observed.prediction else { return };
        let blocks = self.blocks(&observed.service);
        let version: Version = (prediction.plan.name.clone(), prediction.version);
        let (model, arm, rows) = (&*version.0, prediction.arm, observed.rows.count as u64);
        let hour = floor_to(observed.time, HOUR);
        let drift = &self.drift;
        let mut state = drift.lock();
        let profiles = match state.known.get(&version) {
            Some(Known::Ready(profiles)) => Ok(profiles.clone()),
            Some(Known::Without { .. }) => Err(NO_PROFILE),
            Some(Known::Wanted | Known::Failed { .. }) => Err(LOADING),
            None => {
                // Somebody looks every few seconds at what is wanted.
                state.known.insert(version.clone(), Known::Wanted);
                Err(LOADING)
            }
        };
        let counted = state.hours.arm(hour, &version, arm);
        let profiles = match profiles {
            Ok(profiles) => profiles,
            Err(cause) => {
                *counted.uncounted.entry(cause).or_default() += rows;
                drift.metrics.uncounted(model, version.1, arm, cause, rows);
                return;
            }
        };
        let mut more = 0;
        let over = match counted.over.take() {
            Some(over) if Arc::ptr_eq(&over.profiles, &profiles) => over,
            Some(over) => {
                let before = over.bytes();
                let (over, anew) = over.carried(profiles);
                if anew > 0 {
                    // What was counted of them is over bins that nobody has any more.
                    *counted.uncounted.entry(CHANGED).or_default() += counted.rows;
                    drift.metrics.uncounted(model, version.1, arm, CHANGED, counted.rows);
                }
                more = over.bytes().saturating_sub(before);
                over
            }
            None => {
                let over = Over::new(profiles);
                more = over.bytes();
                over
            }
        };
        let over = counted.over.insert(over);
        counted.rows += rows;
        drift.metrics.counted(model, version.1, arm, rows);
        if !count(over, &blocks, observed, prediction) {
            *counted.uncounted.entry(BROKEN).or_default() += rows;
            drift.metrics.uncounted(model, version.1, arm, BROKEN, rows);
        }
        if more > 0 {
            let key = (hour, version);
            if let Some(hour) = state.hours.by_key.get_mut(&key) {
                hour.bytes += more;
            }
            state.hours.bytes += more;
            let lost = state.hours.bounded(&key);
            if lost > 0 {
                drift.metrics.lost(lost);
                tracing::warn!(rows = lost, "counts for drift are given up: the object store was away for too long");
            }
        }
    }

    fn dropped(&mut self, about: &About, time: Micros, rows: u64) {
        let Some(of) = &about.model else { return };
        let version: Version = (of.name.clone(), of.version);
        let mut state = self.drift.lock();
        let counted = state.hours.arm(floor_to(time, HOUR), &version, of.arm);
        *counted.uncounted.entry(DROPPED).or_default() += rows;
        self.drift.metrics.uncounted(&of.name, of.version, of.arm, DROPPED, rows);
    }

    fn tick(&mut self, _: Micros) {}

    /// Whoever shuts the server down flushes.
    fn end(&mut self, _: Micros) {}
}

/// Counts the rows of one answer; whether all features and outputs could be counted.
fn count(over: &mut Over, blocks: &Blocks, observed: &Observed, prediction: &ObservedPrediction) -> bool {
    let Observed { service, rows, features, .. } = observed;
    let Features { fetched, assembled, .. } = &**features;
    let profiles = over.profiles.clone();
    let event_times: Vec<&[Option<Micros>]> =
        fetched.inputs.iter().map(|input| input.answer.event_times.as_slice()).collect();
    let answered = Answered { columns: &rows.columns, at: &fetched.at, event_times: &event_times };
    let buckets = blocks.buckets(service, &answered, |block| {
        blocks.names().nth(block).is_some_and(|name| profiles.blocks.contains(name))
    });
    let buckets_of = |name: &str| blocks.position(name).and_then(|block| buckets.get(block)).map(Vec::as_slice);
    let flags = flags(service, assembled, &stale(service, features));
    let mut whole = true;
    for (feature, counter) in profiles.features.features.iter().zip(&mut over.features) {
        let Some(output) = service.output(&feature.name) else {
            whole = false;
            continue;
        };
        let Some(buckets) = buckets_of(&feature.blocks).filter(|buckets| buckets.len() == rows.count) else {
            whole = false;
            continue;
        };
        let of = RowsOf { buckets, flags: flags[output].as_deref(), at: &fetched.at };
        whole &= service.outputs[output].feature_type == feature.value_type
            && add(counter, &assembled.columns[output], &feature.value_type, &of).is_ok();
    }
    let Some(outputs) = &profiles.outputs else { return whole };
    let fallbacks: Vec<u8> =
        prediction.rows.iter().map(|row| if row.status == RowStatus::Fallback { Flag::FALLBACK } else { 0 }).collect();
    for (output, counter) in outputs.features.iter().zip(&mut over.outputs) {
        let column = prediction.outputs.iter().find(|(name, ..)| *name == output.name);
        let buckets = buckets_of(&output.blocks).filter(|buckets| buckets.len() == rows.count);
        let (Some((_, column, value_type)), Some(buckets)) = (column, buckets) else {
            whole = false;
            continue;
        };
        let of = RowsOf { buckets, flags: Some(&fallbacks), at: &fetched.at };
        let column = countable(column, value_type, &output.value_type);
        whole &= column.is_some_and(|column| add(counter, &column, &output.value_type, &of).is_ok());
    }
    whole
}

/// Which rows hold a value older than its view's freshness.
pub fn stale_rows(service: &ServicePlan, features: &Features, rows: usize) -> Vec<bool> {
    let mut all = vec![false; rows];
    for input in stale(service, features) {
        all.iter_mut().zip(input).for_each(|(all, stale)| *all |= stale);
    }
    all
}

/// Which rows are older than their view's freshness, by input; empty where none is.
fn stale(service: &ServicePlan, features: &Features) -> Vec<Vec<bool>> {
    if !features.fetched.stale {
        return Vec::new();
    }
    let inputs = service.inputs.iter().zip(&features.fetched.inputs).map(|(input, fetched)| {
        let Some(freshness) = input.view.freshness.filter(|_| fetched.stale_rows > 0) else { return Vec::new() };
        let time = |row: usize| match input.view.is_windowed() {
            true => fetched.positions[row].map(|position| position.time),
            false => fetched.answer.event_times[row],
        };
        let is_stale = |(row, at): (usize, &Micros)| {
            fetched.answer.statuses[row] == Status::Present
                && time(row).is_some_and(|time| time != STATIC && at.saturating_sub(time) > freshness)
        };
        features.fetched.at.iter().enumerate().map(is_stale).collect()
    });
    inputs.collect()
}

/// How an output is profiled: as it is, or as a vector where the model gives several numbers for a row.
pub(super) fn profiled_type(column: &ArrayRef, value_type: &Type) -> Type {
    let Type::List(_) = value_type else { return value_type.clone() };
    let Some(list) = column.as_list_opt::<i32>() else { return value_type.clone() };
    let width = (0..list.len()).find(|row| list.is_valid(*row)).map_or(0, |row| list.value_length(row));
    u32::try_from(width).ok().filter(|width| *width > 0).map_or_else(|| value_type.clone(), Type::Vector)
}

/// A column of a model as its profile has it. None where it is something else.
pub(super) fn countable(column: &ArrayRef, value_type: &Type, profiled: &Type) -> Option<ArrayRef> {
    if value_type == profiled {
        return Some(column.clone());
    }
    let (Type::List(_), Type::Vector(width)) = (value_type, profiled) else { return None };
    let width = *width as usize;
    let list = column.as_list_opt::<i32>()?;
    let values = cast(list.values(), &DataType::Float32).ok()?;
    let values = values.as_primitive_opt::<Float32Type>()?;
    let mut flat = Vec::with_capacity(list.len() * width);
    let mut valid = Vec::with_capacity(list.len());
    for row in 0..list.len() {
        let (from, length) = (list.value_offsets()[row] as usize, list.value_length(row) as usize);
        // A fallback without a width, or a model that changed its mind.
        let fits = list.is_valid(row) && length == width;
        valid.push(fits);
        match fits {
            true => flat.extend_from_slice(&values.values()[from..from + length]),
            false => flat.extend(std::iter::repeat_n(0.0, width)),
        }
    }
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    let values = Arc::new(Float32Array::from(flat)) as ArrayRef;
    let width = i32::try_from(width).ok()?;
    let list = FixedSizeListArray::try_new(item, width, values, Some(NullBuffer::from(valid))).ok()?;
    Some(Arc::new(list))
}
