//! What a rollout will have to work with: how many rows and units come, and what the champion does with them. For the plan that is
//! made before anything starts; nothing here decides anything.
//!
//! Rows are counted exactly where drift is, hour by hour. Units, rates and losses are of the serving log, which holds a sample:
//! of units that a sample may have missed it is said how they are bounded.

use std::sync::Arc;

use drift::sequential::plan::Traffic;
use drift::sequential::policy::{Needs, Policy};
use drift::sequential::tally::Tally;
use feature_defs::catalog::RequestTime;
use feature_defs::time::{Micros, floor_to};
use feature_defs::window::{DAY, HOUR};
use offline_store::rollout::RolloutError;
use offline_store::rollout::metric::Outcome;
use offline_store::rollout::rows::VersionOf;
use offline_store::rollout::units::{self, Alone, AloneAsked, Day};
use offline_store::serving_log::{self, Minute};
use serde::{Deserialize, Serialize};

use super::holdout::Evaluation;
use super::losses::until;
use super::quiet::quietly;
use crate::answer::Gateway;
use crate::drift::snapshot;
use crate::status::chain;

/// How far back is looked, at first; where that is more than is held in memory, less.
const DAYS: [i64; 4] = [14, 7, 3, 1];
const DAYS_OF_HOURS: i64 = 7;
const DAY_SECONDS: f64 = 86_400.0;

/// What is asked.
#[derive(Debug, Clone)]
pub struct TrafficAsked {
    pub champion: VersionOf,
    pub policy: Policy,
    /// Columns of the request that are the canary's unit; none without a canary.
    pub unit: Vec<String>,
    /// How long a unit's window is open.
    pub window: Micros,
    /// How the version that is to be tried did on a dataset: what it may flip, and how much better it may be.
    pub evaluation: Option<Evaluation>,
}

/// The traffic with where each number comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrafficFound {
    pub traffic: Traffic,
    pub notes: Vec<String>,
}

pub async fn traffic(gateway: &Gateway, asked: TrafficAsked) -> Result<TrafficFound, String> {
    let now = (gateway.clock)();
    let mut found = TrafficFound::default();
    let (alone, share) = alone(gateway, &asked, now, &mut found.notes).await?;
    found.traffic.rows_per_day = rows_per_day(gateway, &asked, now, &alone, share, &mut found.notes).await?;
    let whole = asked.unit.len() == asked.champion.plan.service.columns.iter().filter(|column| column.is_key).count();
    let (units, note) = units_by_day(&alone.units_by_day, share, whole);
    found.traffic.units_by_day = units;
    found.notes.extend(note);
    if alone.without_unit > 0 {
        found.notes.push(format!(
            "{} of {} logged rows name no unit: the champion will answer them, and they are left out",
            alone.without_unit,
            alone.rows + alone.without_unit
        ));
    }
    tallies(&asked, &alone, &mut found);
    Ok(found)
}

/// What the serving log says of the champion, and which share of the rows is in it.
async fn alone(
    gateway: &Gateway,
    asked: &TrafficAsked,
    now: Micros,
    notes: &mut Vec<String>,
) -> Result<(Alone, Option<f64>), String> {
    let (store, root) = (gateway.registry.log().store().clone(), gateway.registry.root().clone());
    let wall = gateway.observing.now();
    for days in DAYS {
        let logged_from = wall.saturating_sub(days.saturating_mul(DAY));
        // Requests that bring their own times may bring any.
        let is_replayed = gateway.request_time == RequestTime::Allowed;
        let from = if is_replayed { Micros::MIN } else { now.saturating_sub(days.saturating_mul(DAY)) };
        let mut until = until(gateway, now);
        if is_replayed {
            // The log says how far its time has come; no label is waited for.
            until.now = Micros::MAX;
        }
        let (asked, store, root) = (asked.clone(), store.clone(), root.clone());
        let work = quietly("rollout-traffic", move || async move {
            let outcomes = outcomes(&asked.policy);
            let alone = AloneAsked {
                champion: asked.champion.clone(),
                unit: &asked.unit,
                outcomes: &outcomes,
                window: asked.window,
                from,
                until,
                logged_from,
            };
            let alone = match units::alone(&store, &root, &alone).await {
                Ok(alone) => alone,
                Err(RolloutError::TooMany { .. }) => return Ok(None),
                // Whose rows they are is not in the log; how many there are is known all the same.
                Err(error @ (RolloutError::Hashed { .. } | RolloutError::NoUnit { .. })) => Alone {
                    tallies: vec![Tally::default(); outcomes.len()],
                    notes: vec![chain(&error)],
                    ..Alone::default()
                },
                Err(error) => return Err(chain(&error)),
            };
            let (first, last) = (serving_log::day(logged_from), serving_log::day(wall));
            let service = &asked.champion.plan.service.name;
            let said = serving_log::losses(&store, &root, service, first, last).await.map_err(|error| chain(&error))?;
            let mut total = Minute::default();
            said.iter().for_each(|said| total.add(&said.total()));
            let share = (total.offered > 0).then(|| total.chosen as f64 / total.offered as f64);
            Ok(Some((alone, share)))
        });
        let Some((alone, share)) = work.await? else { continue };
        notes.extend(alone.notes.iter().cloned());
        match (alone.rows, share) {
            (0, _) if !alone.notes.is_empty() => {}
            (0, _) => notes.push(format!(
                "the serving log has no row that the champion answered within {days} days: units and what the champion does are not known"
            )),
            (rows, Some(share)) => notes.push(format!(
                "{rows} rows of the serving log within {days} days, {:.1} % of what was answered",
                100.0 * share
            )),
            (rows, None) => notes.push(format!("{rows} rows of the serving log within {days} days")),
        }
        return Ok((alone, share));
    }
    notes.push("the serving log of one day is more than can be looked at: lower `serving_log.sample`".to_owned());
    Ok((Alone { tallies: vec![Tally::default(); outcomes(&asked.policy).len()], ..Alone::default() }, None))
}

/// By guardrail that the log tells of, then by success metric.
fn outcomes(policy: &Policy) -> Vec<Outcome> {
    let rails = policy.guardrails.iter().filter_map(Outcome::of_guardrail);
    let success = policy.canary.iter().flat_map(|canary| &canary.success).map(Outcome::of_success);
    rails.chain(success).collect()
}

async fn rows_per_day(
    gateway: &Gateway,
    asked: &TrafficAsked,
    now: Micros,
    alone: &Alone,
    share: Option<f64>,
    notes: &mut Vec<String>,
) -> Result<f64, String> {
    let by_log = |notes: &mut Vec<String>, what: &str| {
        let Some((first, last)) = alone.times.filter(|(first, last)| last > first) else { return 0.0 };
        let share = share.filter(|share| *share > 0.0).unwrap_or(1.0);
        notes.push(format!("rows per day are those of the log over its share of what was answered, {what}"));
        (alone.rows + alone.without_unit) as f64 / share.min(1.0) / days(last - first)
    };
    if gateway.request_time == RequestTime::Allowed {
        return Ok(by_log(notes, "by the time that they were answered for: requests bring their own"));
    }
    // What this gateway has counted just now is counted; what cannot be written yet is missing, and drift says so.
    if let Some(drift) = &gateway.drift {
        let _ = drift.flush(now).await;
    }
    let version = (Arc::<str>::from(&*asked.champion.plan.name), asked.champion.number);
    let to = floor_to(now, HOUR);
    let (store, root) = (gateway.registry.log().store(), gateway.registry.root());
    let (mut rows, mut hours) = (0_u64, 0_i64);
    // Day by day, for when the champion began is not known.
    for day in (1..=DAYS_OF_HOURS).rev() {
        let from = to - day * DAY;
        let window = snapshot::read(store, root, &version, from, from + DAY).await;
        let window = window.map_err(|error| format!("what was counted for drift cannot be read: {}", chain(&error)))?;
        let counted: u64 = window.arms.get("champion").map_or(0, |arm| arm.rows + arm.uncounted.values().sum::<u64>());
        if counted > 0 || hours > 0 {
            (rows, hours) = (rows + counted, hours + 24);
        }
    }
    if rows == 0 {
        return Ok(by_log(notes, "because nothing was counted for drift yet"));
    }
    // Of a champion that is younger than a day a day has not passed.
    let span = match alone.times.filter(|_| hours == 24) {
        Some((first, _)) => days((to - first).clamp(HOUR, DAY)),
        None => hours as f64 / 24.0,
    };
    notes.push(format!(
        "{rows} rows of the champion in the last {span:.1} days, as counted for drift (whole hours, all gateways)"
    ));
    Ok(rows as f64 / span)
}

fn days(length: Micros) -> f64 {
    length as f64 / 1e6 / DAY_SECONDS
}

/// Different units after each day. `whole` says that the unit is all of the keys that rows are sampled by.
///
/// A sample of keys holds its share of a day's units, and of those that come again as many are found again: so a day brings as many
/// units as its sample over the share, of which at most (those found again over the share) are known. Others are chosen every day,
/// and a unit that has come on many days is found more often than on one, so this errs towards fewer units. Where the unit is a
/// part of the keys, what was seen is all that is sure.
fn units_by_day(days: &[Day], share: Option<f64>, whole: bool) -> (Vec<u64>, Option<String>) {
    let is_whole_log = share.is_none_or(|share| share >= 1.0);
    let share = if is_whole_log || !whole { 1.0 } else { share.unwrap_or(1.0).max(1e-9) };
    let mut all = 0.0;
    let add = |day: &Day| {
        let known = if day.units == 0 { 0.0 } else { (day.known as f64 / day.units as f64 / share).min(1.0) };
        all += day.units as f64 / share * (1.0 - known);
        all.round() as u64
    };
    let units: Vec<u64> = days.iter().map(add).collect();
    let note = match units.last() {
        None => None,
        Some(last) if is_whole_log => {
            Some(format!("{last} different units within {} days, all of them logged", units.len()))
        }
        Some(last) if whole => Some(format!(
            "about {last} different units within {} days, from a sample of them; rather too few than too many",
            units.len()
        )),
        Some(last) => Some(format!(
            "at least {last} different units within {} days: rows are sampled by more keys than the unit, and some units are missed",
            units.len()
        )),
    };
    (units, note)
}

/// The champion's tallies, at the places of guardrails and success metrics.
fn tallies(asked: &TrafficAsked, alone: &Alone, found: &mut TrafficFound) {
    let mut tallies = alone.tallies.iter().copied();
    for rail in &asked.policy.guardrails {
        match Outcome::of_guardrail(rail) {
            Some(_) => found.traffic.guardrails.push(tallies.next().unwrap_or_default()),
            None => {
                found
                    .notes
                    .push(format!("`{}` is not in the serving log: it is planned as if it never happened", rail.text));
                found.traffic.guardrails.push(Tally::default());
            }
        }
    }
    let hoped = asked.evaluation.as_ref().and_then(|evaluation| evaluation.difference.as_ref());
    let success = asked.policy.canary.iter().flat_map(|canary| &canary.success);
    for success in success {
        let tally = tallies.next().unwrap_or_default();
        if tally.units == 0 {
            found
                .notes
                .push(format!("no unit has a known `{}`: how much it varies is not known; add labels", success.metric));
        }
        let better = hoped.filter(|hoped| hoped.metric == success.metric).map_or(0.0, |hoped| {
            let better = if success.lower_is_better { -hoped.estimate } else { hoped.estimate };
            if matches!(success.needs, Needs::Better) { better.max(0.0) } else { better }
        });
        if better == 0.0 && matches!(success.needs, Needs::Better) {
            found.notes.push(format!(
                "how much better `{}` may become is not known: without an evaluation on a dataset that shows it, no number of units is enough",
                success.metric
            ));
        }
        found.traffic.success.push((tally, better));
    }
    if let Some(flips) = asked.evaluation.as_ref().and_then(|evaluation| evaluation.flips.as_ref()) {
        found.traffic.flip_rate = flips.rate;
        found.notes.push(format!("{:.2} % of decisions flip on the dataset of the evaluation", 100.0 * flips.rate));
    } else if asked.policy.shadow.as_ref().is_some_and(|shadow| shadow.max_flip_rate.is_some()) {
        found
            .notes
            .push("how many decisions flip is not known before an evaluation: it is planned as if none did".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_days_are_rather_too_few_than_too_many() {
        let days = [Day { units: 100, known: 0 }, Day { units: 100, known: 60 }, Day { units: 50, known: 50 }];
        // All are logged: exact.
        assert_eq!(units_by_day(&days, Some(1.0), true).0, [100, 140, 140]);
        // A tenth of 1,000 units a day; 6 % of them found again in a tenth that is chosen anew: 60 % come again.
        let days = [Day { units: 100, known: 0 }, Day { units: 100, known: 6 }];
        assert_eq!(units_by_day(&days, Some(0.1), true).0, [1_000, 1_400]);
        // The unit is a part of what is sampled by: only what was seen.
        let (units, note) = units_by_day(&days, Some(0.1), false);
        assert_eq!(units, [100, 194]);
        assert!(note.unwrap().starts_with("at least 194 different units within 2 days"));
        assert_eq!(units_by_day(&[], None, true), (Vec::new(), None));
    }
}
