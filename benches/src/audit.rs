//! What the consistency audit sees: faults planted into a log of rows that were served right, each on one row in a thousand.
//!
//! One large log has all seven at once, on rows of their own: the rows whose served bits they change have to be the rows that
//! the audit flags. Then many small logs have one fault each, and the audit has to say which. It reads the log from files and
//! the events from a history, as it does for a user; what was served is worked out by the reference alone ([`world`]).

pub mod plant;
pub mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::Context as _;
use feature_defs::time::Micros;
use offline_store::audit::cause::Fault;
use offline_store::audit::report::Report;
use offline_store::audit::{AuditOptions, AuditRequest};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::index;
use serde::Serialize;

use plant::{FAULTS, Planted};
use world::{Answered, Features, Size, World};

/// One row in so many has a fault.
const ONE_IN: usize = 1_000;
/// Rows that are worked out at a time.
const BLOCK: usize = 500;
/// Below so many changed rows a cause need not be right.
const CHANGED_MIN: usize = 3;

#[derive(Debug, Clone, Copy)]
pub struct Power {
    pub rows: usize,
    pub seeds: u64,
    pub seed_rows: usize,
}

#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    pub seconds: f64,
    /// Of the large log.
    pub compared_values: u64,
    pub clean_values: u64,
    pub lateness: u64,
    pub planted_rows: usize,
    pub planted_rows_changed: usize,
    pub planted_rows_flagged: usize,
    pub false_flags: usize,
    pub changed_values: u64,
    pub flagged_values: u64,
    pub audit_seconds: f64,
    /// Of the small logs.
    pub seeds: u64,
    pub causes: BTreeMap<String, Named>,
    /// Of those with three changed rows and more.
    pub causes_named: usize,
    pub causes_right: usize,
    pub causes_named_share: f64,
    /// Seeds in which every fault with three changed rows and more was named right.
    pub seeds_all_right: u64,
    /// Wrong rows, and flags on right ones, in small logs.
    pub missed_in_seeds: usize,
    pub false_flags_in_seeds: usize,
}

/// How often a fault was named.
#[derive(Debug, Default, Serialize)]
pub struct Named {
    pub logs: usize,
    /// Logs with fewer than three changed rows.
    pub too_few: usize,
    pub right: usize,
    /// Named as one of several that reproduce as much.
    pub tied: usize,
    /// What was named in its place.
    pub wrong: BTreeMap<String, usize>,
}

pub async fn run(power: Power) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let mut outcome = Outcome { seeds: power.seeds, ..Outcome::default() };
    large(power.rows, &mut outcome).await?;
    for seed in 0..power.seeds {
        small(seed, power.seed_rows, &mut outcome).await?;
    }
    let logs = || outcome.causes.values();
    outcome.causes_named = logs().map(|named| named.logs - named.too_few).sum();
    outcome.causes_right = logs().map(|named| named.right).sum();
    outcome.causes_named_share = outcome.causes_right as f64 / outcome.causes_named.max(1) as f64;
    outcome.seconds = began.elapsed().as_secs_f64();
    Ok(outcome)
}

/// All seven faults at once.
async fn large(rows: usize, outcome: &mut Outcome) -> anyhow::Result<()> {
    let mut random = SmallRng::seed_from_u64(7);
    let users = i64::try_from((rows / 40).max(10))?;
    let world = World::new(7, Size { users, events: 120, rows }).await?;
    let clean = clean(&world)?;
    let of_each = (rows / ONE_IN).max(3);
    let places = index::sample(&mut random, rows, of_each * FAULTS.len()).into_vec();
    let mut served = clean.clone();
    let mut changed = BTreeSet::new();
    for (fault, places) in FAULTS.into_iter().zip(places.chunks(of_each)) {
        let planted = Planted::of(fault, &mut random);
        let (rows, values) = plant(&world, &clean, &mut served, planted, places, &mut random)?;
        changed.extend(rows);
        outcome.changed_values += values;
    }
    world.log(&served).await?;
    let began = Instant::now();
    let report = audited(&world).await?;
    outcome.audit_seconds = began.elapsed().as_secs_f64();
    let flagged = flagged(&report)?;
    outcome.compared_values = report.values.compared();
    outcome.clean_values = report.values.compared() - outcome.changed_values;
    outcome.lateness = report.values.lateness;
    outcome.planted_rows = places.len();
    outcome.planted_rows_changed = changed.len();
    outcome.planted_rows_flagged = changed.intersection(&flagged).count();
    outcome.false_flags = flagged.difference(&changed).count();
    outcome.flagged_values = report.values.bug;
    Ok(())
}

/// Each fault by itself, on a log of its own.
async fn small(seed: u64, rows: usize, outcome: &mut Outcome) -> anyhow::Result<()> {
    let world = World::new(1_000 + seed, Size { users: 50, events: 120, rows }).await?;
    let clean = clean(&world)?;
    let mut all_right = true;
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let mut random = SmallRng::seed_from_u64(seed * FAULTS.len() as u64 + number as u64);
        let mut served = clean.clone();
        let places = index::sample(&mut random, rows, (rows / ONE_IN).max(3)).into_vec();
        let planted = Planted::of(fault, &mut random);
        let (changed, _) = plant(&world, &clean, &mut served, planted, &places, &mut random)?;
        world.log(&served).await?;
        let report = audited(&world).await?;
        let flagged = flagged(&report)?;
        outcome.missed_in_seeds += changed.difference(&flagged).count();
        outcome.false_flags_in_seeds += flagged.difference(&changed).count();
        let named = outcome.causes.entry(name(fault)?).or_default();
        named.logs += 1;
        if changed.len() < CHANGED_MIN {
            named.too_few += 1;
            continue;
        }
        let cause = report.cause.as_ref().context("a log with wrong rows has a cause")?;
        if cause.fault == Some(fault) {
            named.right += 1;
        } else {
            all_right = false;
            named.tied += usize::from(cause.ties.iter().any(|tie| tie.fault == fault));
            let said = match cause.fault {
                Some(said) => name(said)?,
                None => "nothing".to_owned(),
            };
            *named.wrong.entry(format!("{said} for {planted:?}")).or_default() += 1;
        }
    }
    outcome.seeds_all_right += u64::from(all_right);
    Ok(())
}

fn name(fault: Fault) -> anyhow::Result<String> {
    Ok(serde_json::to_value(fault)?.as_str().context("a fault has a name")?.to_owned())
}

fn clean(world: &World) -> anyhow::Result<Features> {
    let mut features: Option<Features> = None;
    for block in world.asked.chunks(BLOCK) {
        let rows: Vec<Answered> = block.iter().map(|asked| world.clean(*asked)).collect();
        let served = world.served(&rows)?;
        features = Some(match features {
            None => served,
            Some(mut all) => {
                for (feature, values) in served.values.iter().enumerate() {
                    all.values[feature] = arrow::compute::concat(&[&all.values[feature], values])?;
                    all.statuses[feature].extend(&served.statuses[feature]);
                }
                all
            }
        });
    }
    features.context("a log has rows")
}

/// Serves rows with a fault; returns those whose bits it changes, and how many values.
fn plant(
    world: &World,
    clean: &Features,
    served: &mut Features,
    planted: Planted,
    places: &[usize],
    random: &mut SmallRng,
) -> anyhow::Result<(BTreeSet<usize>, u64)> {
    let rows = places.iter().map(|place| {
        let mut row = world.clean(world.asked[*place]);
        planted.plant(&mut row, random);
        row
    });
    let rows: Vec<Answered> = rows.collect();
    let faulty = world.served(&rows)?;
    let differences: Vec<usize> =
        places.iter().enumerate().map(|(row, place)| faulty.differences(row, clean, *place)).collect();
    let changed = places.iter().zip(&differences).filter(|(_, differences)| **differences > 0);
    let changed = changed.map(|(place, _)| *place).collect();
    served.put(places, &faulty)?;
    Ok((changed, differences.iter().sum::<usize>() as u64))
}

async fn audited(world: &World) -> anyhow::Result<Report> {
    let options =
        AuditOptions { explain: false, wrong_rows_max: usize::MAX, ..AuditOptions::new(Micros::MIN, Micros::MAX) };
    let request = AuditRequest { service: world.service()?.clone(), options, sample_rows: None };
    Ok(offline_store::audit::audit(&world.engine, &world.plan, &request, None, &|_| {}).await?)
}

fn flagged(report: &Report) -> anyhow::Result<BTreeSet<usize>> {
    report.wrong_rows.iter().map(|(request, _)| Ok(request.parse()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn at_size_1_every_planted_fault_is_flagged_and_nothing_else() {
        let found = run(Power { rows: 700, seeds: 2, seed_rows: 300 }).await.unwrap();
        assert!(found.planted_rows_changed >= 10, "{found:#?}");
        assert_eq!((found.planted_rows_flagged, found.false_flags), (found.planted_rows_changed, 0), "{found:#?}");
        assert_eq!(found.flagged_values, found.changed_values);
        assert_eq!((found.missed_in_seeds, found.false_flags_in_seeds), (0, 0));
        assert!(found.lateness > 0, "events that arrive late make values late, and no bug");
        assert!(found.causes_right * 10 >= found.causes_named * 7, "{found:#?}");
    }
}
