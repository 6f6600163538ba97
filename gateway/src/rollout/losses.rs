//! How good a rollout's versions turn out to be, unit by unit, as labels come.

use drift::sequential::policy::Policy;
use feature_defs::catalog::RequestTime;
use feature_defs::time::Micros;
use offline_store::rollout::rows::{Stage, VersionOf};
use offline_store::rollout::units::{self, Losses, Until};
use registry::assignment::Ramp;

use super::quiet::quietly;
use crate::answer::Gateway;
use crate::status::chain;

/// How long rows may be on their way to the log: a flush, an upload that is tried again, and clocks that differ. Rows that come
/// later, after an object store was away, change the means of their units.
pub const LOG_LATE: Micros = 300_000_000;

/// What is asked of a rollout.
#[derive(Debug, Clone)]
pub struct LossesAsked {
    pub policy: Policy,
    pub champion: VersionOf,
    pub challenger: VersionOf,
    /// Columns of the request that are the unit.
    pub unit: Vec<String>,
    pub ramp: Ramp,
    /// All so far, by the entries that began them and the times of rows from which they apply.
    pub stages: Vec<Stage>,
    /// How long a unit's window is open.
    pub window: Micros,
    /// When it began, by the server's clock.
    pub logged_from: Micros,
    /// By the clock of what rows are answered for.
    pub now: Micros,
}

/// Counts to be merged with those that gateways keep, in the metrics that need labels; the same at every look, and on every
/// gateway.
pub async fn losses(gateway: &Gateway, asked: LossesAsked) -> Result<Losses, String> {
    let (store, root) = (gateway.registry.log().store().clone(), gateway.registry.root().clone());
    let until = until(gateway, asked.now);
    quietly("rollout-losses", move || async move {
        let LossesAsked { policy, champion, challenger, unit, ramp, stages, window, logged_from, now: _ } = &asked;
        let asked = units::Asked {
            policy,
            champion: champion.clone(),
            challenger: challenger.clone(),
            unit,
            ramp,
            stages,
            window: *window,
            logged_from: *logged_from,
            until,
        };
        units::losses(&store, &root, &asked).await.map_err(|error| chain(&error))
    })
    .await
}

pub(super) fn until(gateway: &Gateway, now: Micros) -> Until {
    // Where requests bring their own times, minutes of theirs pass while a row is on its way.
    let late = (gateway.request_time == RequestTime::Refused).then_some(LOG_LATE);
    Until { now, late }
}
