//! Which rows of a request are answered with what the model said before; off unless a model's `cache` says otherwise.
//!
//! Every loaded version has a cache of its own ([`inference::response_cache`]). What is in it ends
//!
//! - with the version: whenever it is promoted, replaced, turned off or on, retired or loaded again, nothing of before is found;
//! - with the freshness of features: features are part of the key, so a row is only ever answered by one of equal inputs. But
//!   inputs may be equal because the store has heard nothing for long. So a row of which a feature is older than its view's
//!   `freshness` is neither looked up nor kept, and an answer is kept until the first of its features would be.
//!
//! Only what the model answered is kept, no fallback and no failure; a model that does not answer the same twice has no cache.
//! Rows that nobody waits for (a version in shadow, audits) are always run: they are there to measure the model.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::catalog::ResponseCacheSettings;
use feature_defs::digest::Digest;
use feature_defs::plan::{EncodedInput, ModelPlan, ServicePlan};
use feature_defs::time::{STATIC, Status};
use inference::device::{Held, SharedDevice};
use inference::memory::{Footprint, MemoryError};
use inference::response_cache::{CacheMetrics, Key, Life, ResponseCache, Row, Scope, ScopeParts};
use inference::tensor::{TensorBatch, TensorError};
use registry::deployment::Standing;
use registry::id::EntryNumber;

use crate::fetch::Fetched;
use crate::follow::Served;
use crate::predict::tensor;

/// The answers of one loaded version.
pub struct Responses {
    cache: ResponseCache,
    scope: Scope,
    settings: ResponseCacheSettings,
    /// Of the plan that its keys are made with.
    plan: Digest,
    /// How the version stands, as its present life began.
    stands: Mutex<Option<Stands>>,
    /// Its bytes, as what shares the machine's memory with models.
    _held: Held,
}

/// A version whose place among the others changes does not take its answers there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stands {
    standing: Standing,
    wanted_by: EntryNumber,
    off: bool,
}

impl Responses {
    /// The cache that a version's plan asks for; none where it asks for none.
    pub fn new(
        tenant: &str,
        model: &str,
        content: &str,
        plan: &ModelPlan,
        cpu: &Arc<SharedDevice>,
    ) -> Result<Option<Arc<Responses>>, MemoryError> {
        let Some(settings) = plan.cache else { return Ok(None) };
        let held = cpu.hold(Footprint {
            name: format!("the response cache of {model}"),
            file_bytes: settings.memory_bytes,
            executors: 0,
            weight_bytes: 0,
            sizes: Vec::new(),
        })?;
        let outputs: Vec<&str> = plan.outputs.iter().map(|output| output.name.as_str()).collect();
        let digest = plan.semantic_digest.clone();
        // A model takes no parameters beside its inputs.
        let parts = ScopeParts { tenant, model: content, plan: digest.as_str(), outputs: &outputs, parameters: &[] };
        Ok(Some(Arc::new(Responses {
            cache: ResponseCache::new(settings.memory_bytes, settings.ttl),
            scope: Scope::new(parts),
            settings,
            plan: digest,
            stands: Mutex::default(),
            _held: held,
        })))
    }

    /// Whether it is what a plan asks for, and its keys are those of the plan.
    pub fn suits(&self, plan: &ModelPlan) -> bool {
        plan.cache == Some(self.settings) && plan.semantic_digest == self.plan
    }

    fn stand(&self, stands: Stands) {
        let mut before = self.stands.lock().unwrap_or_else(PoisonError::into_inner);
        if before.replace(stands).is_some_and(|before| before != stands) {
            self.cache.end_life();
        }
    }

    pub fn metrics(&self) -> CacheMetrics {
        self.cache.metrics()
    }

    /// Looks rows up. Those that are known, with their outputs; the others may be kept when the model has answered them.
    pub fn look_up(
        &self,
        inputs: &[EncodedInput],
        service: &ServicePlan,
        fetched: &Fetched,
        rows: &[usize],
    ) -> Result<(Vec<(usize, Row)>, LookedUp<'_>), TensorError> {
        let (now, life) = (Instant::now(), self.cache.life());
        let fresh = |row: &usize| match freshness(service, fetched, *row) {
            Freshness::Stale => None,
            Freshness::Unbounded => Some((*row, None)),
            Freshness::Left(left) => Some((*row, now.checked_add(left))),
        };
        let fresh: Vec<(usize, Option<Instant>)> = rows.iter().filter_map(fresh).collect();
        let places: Vec<usize> = fresh.iter().map(|(row, _)| *row).collect();
        let inputs = inputs.iter().map(|input| Ok((input.name.clone(), tensor(input, &places)?)));
        let inputs: TensorBatch = inputs.collect::<Result<_, TensorError>>()?;
        let (mut known, mut missed) = (Vec::new(), Vec::new());
        for ((row, until), key) in fresh.into_iter().zip(self.scope.row_keys(&inputs)) {
            match self.cache.get(&key, now) {
                Some(outputs) => known.push((row, outputs)),
                None => missed.push(Missed { row, key, until }),
            }
        }
        Ok((known, LookedUp { responses: self, life, missed }))
    }
}

/// Rows that were looked for in vain.
pub struct LookedUp<'a> {
    responses: &'a Responses,
    life: Life,
    /// By row, in order.
    missed: Vec<Missed>,
}

struct Missed {
    row: usize,
    key: Key,
    until: Option<Instant>,
}

impl LookedUp<'_> {
    /// Keeps what the model has answered to a row, which is at that place of the outputs.
    pub fn keep(&self, row: usize, outputs: &TensorBatch, place: usize) {
        let Ok(found) = self.missed.binary_search_by_key(&row, |missed| missed.row) else { return };
        let Missed { key, until, .. } = self.missed[found];
        let outputs = outputs.iter().map(|(_, tensor)| tensor.slice_rows(place..place + 1)).collect();
        self.responses.cache.put(self.life, key, outputs, Instant::now(), until);
    }
}

/// For how long the features of a row are fresh.
#[derive(Debug, PartialEq, Eq)]
enum Freshness {
    Stale,
    Left(Duration),
    /// No view that has anything for it says.
    Unbounded,
}

fn freshness(service: &ServicePlan, fetched: &Fetched, row: usize) -> Freshness {
    let mut least = None;
    for (input, found) in service.inputs.iter().zip(&fetched.inputs) {
        let Some(bound) = input.view.freshness else { continue };
        if found.answer.statuses[row] != Status::Present {
            continue;
        }
        // As the answer says whether it is stale.
        let measured = match input.view.is_windowed() {
            true => found.positions[row].map(|position| position.time),
            false => found.answer.event_times[row],
        };
        let Some(time) = measured.filter(|time| *time != STATIC) else { continue };
        let left = bound.saturating_sub(fetched.at[row].saturating_sub(time));
        if left < 0 {
            return Freshness::Stale;
        }
        least = Some(least.map_or(left, |least: i64| least.min(left)));
    }
    match least {
        Some(micros) => Freshness::Left(Duration::from_micros(micros.unsigned_abs())),
        None => Freshness::Unbounded,
    }
}

/// Whose rows may be answered with what was said before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Those that somebody waits for.
    Allowed,
    Never,
}

/// Ends the lives of caches whose versions stand elsewhere now.
pub fn follow(served: &Served) {
    for (name, versions) in &served.versions {
        let off = served.off.contains_key(name);
        for version in versions.values() {
            let responses = version.state.ready.as_ref().and_then(|model| model.responses.as_ref());
            let stands = Stands { standing: version.standing, wanted_by: version.state.wanted_by, off };
            responses.into_iter().for_each(|responses| responses.stand(stands));
        }
    }
}
