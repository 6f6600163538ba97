//! From rows to units, as `drift::sequential::exposure` does it when requests are answered, for what is known later: the window of
//! a unit opens with its first row in an arm and closes a fixed time after; once its labels have had their time, the mean of its
//! rows' outcomes is counted, once.
//!
//! Everything is worked out anew from the log at each look, so gateways agree and restarts lose nothing. And what was counted at one
//! look is the same at the next: a row's label is the one that was known of it *first* ([`Index::first_known`]), so a correction
//! changes reports of quality and not a rollout that may have gone on by it; labels that come more than [`LABELS_LATE`] after their
//! time (by the server's clock) are not looked at; a window counts when the log has come past it. The one exception is
//! a gateway whose part of the log reaches the store later than that: its rows then change the means of their units.
//!
//! [`Index::first_known`]: crate::labels::join::Index::first_known

use std::collections::HashMap;
use std::sync::Arc;

use drift::sequential::exposure::Arm;
use drift::sequential::policy::{Policy, ShadowMetric, paired};
use drift::sequential::tally::{Counts, Tally};
use feature_defs::time::Micros;
use object_store::ObjectStore;
use object_store::path::Path;
use registry::assignment::Ramp;
use serde::{Deserialize, Serialize};

use super::RolloutError;
use super::metric::{Metric, Outcome};
use super::rows::{self, LABELS_LATE, Row, Rows, Stage, StageKind, VersionOf, Wanted, Who};

/// What is asked of a rollout.
#[derive(Debug, Clone)]
pub struct Asked<'a> {
    pub policy: &'a Policy,
    pub champion: VersionOf,
    pub challenger: VersionOf,
    /// Columns of the request that are the unit.
    pub unit: &'a [String],
    pub ramp: &'a Ramp,
    pub stages: &'a [Stage],
    /// How long a unit's window is open.
    pub window: Micros,
    /// By the server's clock: no row of it was logged before.
    pub logged_from: Micros,
    pub until: Until,
}

/// How far time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Until {
    /// By the clock of what rows are answered for.
    pub now: Micros,
    /// How long rows may be on their way to the log. None where requests bring their own times: then a window is over when
    /// the log has rows of after it.
    pub late: Option<Micros>,
}

impl Until {
    /// Before which time everything is in the log.
    fn logged(&self, rows: &Rows) -> Micros {
        match self.late {
            Some(late) => self.now.saturating_sub(late),
            None => rows.last_at.unwrap_or(Micros::MIN),
        }
    }
}

/// What labels say of a rollout's units.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// To be merged with what gateways count.
    pub counts: Counts,
    pub metrics: Vec<Progress>,
    /// Rows of it in the log.
    pub rows: u64,
    pub without_unit: u64,
    pub misplaced: u64,
    pub notes: Vec<String>,
}

/// How far a metric is, in units of both arms.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub metric: String,
    pub counted: u64,
    /// Their window is open, or the log has not come past it.
    pub open: u64,
    /// Labels may still come.
    pub waiting: u64,
    /// No label has come in time.
    pub unlabelled: u64,
}

/// A metric, and where it is counted.
struct Counted {
    name: String,
    outcome: Outcome,
    /// In a canary.
    canary: usize,
    shadow: InShadow,
}

#[derive(Clone, Copy)]
enum InShadow {
    Difference(usize),
    Both {
        challenger: usize,
        champion: usize,
    },
    /// Who answered nobody has no outcome of its own.
    Nowhere,
}

/// The metrics of a policy that need labels, in its order.
fn counted(policy: &Policy) -> Vec<Counted> {
    let shadow = policy.shadow_metrics();
    let place = |metric: ShadowMetric| shadow.iter().position(|known| *known == metric).unwrap_or(usize::MAX);
    let rails = policy.guardrails.iter().enumerate().filter_map(|(index, rail)| {
        let outcome = Outcome::of_guardrail(rail)?;
        let is_of_scores = outcome.metric()?.is_of_scores();
        let (challenger, champion) =
            (place(ShadowMetric::ChallengerGuardrail(index)), place(ShadowMetric::ChampionGuardrail(index)));
        let shadow = if is_of_scores { InShadow::Both { challenger, champion } } else { InShadow::Nowhere };
        Some(Counted { name: rail.text.clone(), outcome, canary: index, shadow })
    });
    let success = policy.canary.iter().flat_map(|canary| canary.success.iter().enumerate()).map(|(index, success)| {
        let outcome = Outcome::of_success(success);
        let shadow = match outcome.metric().is_some_and(Metric::is_of_scores) {
            true => InShadow::Difference(place(ShadowMetric::SuccessDifference(index))),
            false => InShadow::Nowhere,
        };
        Counted { name: success.metric.clone(), outcome, canary: policy.guardrails.len() + index, shadow }
    });
    rails.chain(success).collect()
}

/// Counts the units of a rollout in the metrics that need labels.
pub async fn losses(store: &Arc<dyn ObjectStore>, project: &Path, asked: &Asked<'_>) -> Result<Losses, RolloutError> {
    let counted = counted(asked.policy);
    let mut losses = Losses::default();
    if counted.is_empty() || asked.stages.is_empty() {
        return Ok(losses);
    }
    let label = asked.champion.plan.label.as_ref();
    let needs_label = counted.iter().find(|counted| counted.outcome.metric().is_some_and(Metric::is_of_scores));
    if let (Some(metric), None) = (needs_label, label) {
        losses.notes.push(format!(
            "`{}` is of scores and what came true, and model `{}` declares no `label`: it is never known",
            metric.name, asked.champion.plan.name
        ));
    }
    let outcomes: Vec<Outcome> = counted.iter().map(|counted| counted.outcome.clone()).collect();
    let versions = [asked.champion.clone(), asked.challenger.clone()];
    let wanted = Wanted {
        versions: &versions,
        unit: asked.unit,
        ramp: Some(asked.ramp),
        stages: asked.stages,
        outcomes: &outcomes,
        logged_from: asked.logged_from,
    };
    let rows = rows::read(store, project, &asked.champion.plan.name, &wanted).await?;
    let within = label.and_then(|label| label.within);
    let mut counting = Counting {
        asked,
        rows: &rows,
        counted: &counted,
        logged: asked.until.logged(&rows),
        within,
        progress: counted.iter().map(|of| Progress { metric: of.name.clone(), ..Progress::default() }).collect(),
        counts: Counts::default(),
        is_full: false,
    };
    rows.rows.chunk_by(|a, b| a.unit == b.unit).for_each(|unit| counting.unit(unit));
    let Counting { counts, progress, is_full, .. } = counting;
    if is_full {
        losses.notes.push("the rollout has more steps than are counted; units of later ones are left out".to_owned());
    }
    losses.notes.extend(rows.damaged.iter().map(|what| format!("left out: {what}")));
    (losses.counts, losses.metrics) = (counts, progress);
    (losses.rows, losses.without_unit, losses.misplaced) = (rows.len() as u64, rows.without_unit, rows.misplaced);
    Ok(losses)
}

struct Counting<'a> {
    asked: &'a Asked<'a>,
    rows: &'a Rows,
    counted: &'a [Counted],
    /// Before which time everything is in the log.
    logged: Micros,
    within: Option<Micros>,
    progress: Vec<Progress>,
    counts: Counts,
    is_full: bool,
}

/// What a unit's window says in one metric.
enum Mean {
    Known(f64),
    Waiting,
    Unlabelled,
}

impl Counting<'_> {
    fn unit(&mut self, rows: &[Row]) {
        let is_canary = |row: &&Row| matches!(self.asked.stages[usize::from(row.stage)].kind, StageKind::Canary(_));
        let (canary, shadow): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(is_canary);
        self.canary(&canary);
        self.shadow(&shadow);
    }

    fn canary(&mut self, rows: &[&Row]) {
        let first = |who: Who| rows.iter().position(|row| row.who == who);
        let arms = [(Arm::Champion, first(Who::Champion)), (Arm::Challenger, first(Who::Challenger))];
        for (arm, begin) in arms {
            let Some(begin) = begin else { continue };
            let (who, other) = match arm {
                Arm::Champion => (Who::Champion, arms[1].1),
                Arm::Challenger => (Who::Challenger, arms[0].1),
            };
            let (from, closes) = (rows[begin].at, rows[begin].at.saturating_add(self.asked.window));
            // Rows are in order: who came first was fresh, and its window ends where a ramp moved the unit.
            let fresh = other.is_none_or(|other| begin < other);
            let moved = other.filter(|_| fresh).map_or(Micros::MAX, |other| rows[other].at);
            let end = closes.min(moved.max(from.saturating_add(1)));
            let inside: Vec<&Row> =
                rows[begin..].iter().filter(|row| row.who == who && row.at < end).copied().collect();
            let place = (self.entry(rows[begin]), rows[begin].bucket);
            for number in 0..self.counted.len() {
                if closes > self.logged {
                    self.progress[number].open += 1;
                    continue;
                }
                let value = |row: &&Row| self.rows.value(row, number);
                let mean = self.mean(inside.iter().map(|row| (row.at, value(row))));
                if let Some(mean) = self.told(number, &mean) {
                    self.add(place, fresh, self.counted[number].canary, mean);
                }
            }
        }
    }

    /// Pairs of what both versions made of the same rows.
    fn shadow(&mut self, rows: &[&Row]) {
        let Some(first) = rows.first() else { return };
        let closes = first.at.saturating_add(self.asked.window);
        let mut champions: HashMap<u64, &Row> = HashMap::new();
        for row in rows.iter().filter(|row| row.who == Who::Champion && row.at < closes) {
            champions.entry(row.id).or_insert(row);
        }
        let pairs = rows.iter().filter(|row| row.who == Who::Shadow && row.at < closes);
        // Each row of the champion has one shadow; of a request that was sent twice, the first.
        let pairs: Vec<(&Row, &Row)> = pairs.filter_map(|row| Some((*row, champions.remove(&row.id)?))).collect();
        if pairs.is_empty() {
            return;
        }
        let place = (self.entry(first), first.bucket);
        for number in 0..self.counted.len() {
            let shadow = self.counted[number].shadow;
            if matches!(shadow, InShadow::Nowhere) {
                continue;
            }
            if closes > self.logged {
                self.progress[number].open += 1;
                continue;
            }
            let known = |(challenger, champion): &(&Row, &Row)| {
                self.rows.value(challenger, number).zip(self.rows.value(champion, number))
            };
            let of = |one: fn((f64, f64)) -> f64| self.mean(pairs.iter().map(|pair| (pair.1.at, known(pair).map(one))));
            match shadow {
                InShadow::Difference(metric) => {
                    let mean = of(|(challenger, champion)| paired(challenger, champion));
                    if let Some(mean) = self.told(number, &mean) {
                        self.add(place, true, metric, mean);
                    }
                }
                InShadow::Both { challenger, champion } => {
                    let (of_challenger, of_champion) = (of(|pair| pair.0), of(|pair| pair.1));
                    if let (Some(one), Mean::Known(other)) = (self.told(number, &of_challenger), of_champion) {
                        self.add(place, true, challenger, one);
                        self.add(place, true, champion, other);
                    }
                }
                InShadow::Nowhere => {}
            }
        }
    }

    fn entry(&self, row: &Row) -> u64 {
        self.asked.stages[usize::from(row.stage)].entry
    }

    fn mean(&self, rows: impl Iterator<Item = (Micros, Option<f64>)>) -> Mean {
        mean(rows, self.within, self.asked.until.now)
    }

    fn told(&mut self, number: usize, mean: &Mean) -> Option<f64> {
        let progress = &mut self.progress[number];
        match mean {
            Mean::Known(mean) => {
                progress.counted += 1;
                return Some(*mean);
            }
            Mean::Waiting => progress.waiting += 1,
            Mean::Unlabelled => progress.unlabelled += 1,
        }
        None
    }

    fn add(&mut self, place: (u64, u16), fresh: bool, metric: usize, mean: f64) {
        self.is_full |= !self.counts.add(place, fresh, metric, mean);
    }
}

/// The mean of what is known of some rows, once no more is waited for.
fn mean(rows: impl Iterator<Item = (Micros, Option<f64>)>, within: Option<Micros>, now: Micros) -> Mean {
    let (mut sum, mut known, mut all, mut last) = (0.0, 0_u64, 0_u64, Micros::MIN);
    for (at, value) in rows {
        all += 1;
        last = last.max(at);
        if let Some(value) = value {
            sum += value;
            known += 1;
        }
    }
    let over = within.is_some_and(|within| last.saturating_add(within).saturating_add(LABELS_LATE) <= now);
    if known < all && !over {
        Mean::Waiting
    } else if known == 0 {
        Mean::Unlabelled
    } else {
        Mean::Known(sum / known as f64)
    }
}

/// What a version does before anything is tried: the outcomes of its units, each over its window from its first row on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Alone {
    /// By outcome.
    pub tallies: Vec<Tally>,
    /// Different units within the first day, by the time that rows are answered for, the first two, and so on.
    pub units_by_day: Vec<Day>,
    pub rows: u64,
    pub without_unit: u64,
    /// First and last time that a row was answered for.
    pub times: Option<(Micros, Micros)>,
    pub notes: Vec<String>,
}

/// Units of one day.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Day {
    pub units: u64,
    /// Of these, ones that were logged on a day before.
    pub known: u64,
}

const DAY: Micros = feature_defs::window::DAY;
/// A plan looks no further.
const DAYS_MAX: usize = 92;

/// What is asked of a version before anything is tried.
#[derive(Debug, Clone)]
pub struct AloneAsked<'a> {
    pub champion: VersionOf,
    pub unit: &'a [String],
    pub outcomes: &'a [Outcome],
    pub window: Micros,
    /// By the time that rows are answered for.
    pub from: Micros,
    pub until: Until,
    pub logged_from: Micros,
}

/// Looks at what a version does now.
pub async fn alone(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    asked: &AloneAsked<'_>,
) -> Result<Alone, RolloutError> {
    let AloneAsked { champion, unit, outcomes, window, from, until, logged_from } = asked.clone();
    let stages = [Stage { entry: 0, from, kind: StageKind::Shadow }];
    let versions = [champion.clone()];
    let wanted = Wanted { versions: &versions, unit, ramp: None, stages: &stages, outcomes, logged_from };
    let mut rows = rows::read(store, project, &champion.plan.name, &wanted).await?;
    rows.rows.retain(|row| row.who == Who::Champion);
    let within = champion.plan.label.as_ref().and_then(|label| label.within);
    let logged = until.logged(&rows);
    let mut alone = Alone { tallies: vec![Tally::default(); outcomes.len()], ..Alone::default() };
    (alone.rows, alone.without_unit) = (rows.len() as u64, rows.without_unit);
    alone.notes.extend(rows.damaged.iter().map(|what| format!("left out: {what}")));
    let times = || rows.rows.iter().map(|row| row.at);
    alone.times = times().min().zip(times().max());
    let Some((first, _)) = alone.times else { return Ok(alone) };
    for unit in rows.rows.chunk_by(|a, b| a.unit == b.unit) {
        let closes = unit[0].at.saturating_add(window);
        let inside = unit.iter().take_while(|row| row.at < closes);
        for (number, outcome) in outcomes.iter().enumerate().filter(|_| closes <= logged) {
            let within = outcome.metric().and(within);
            let values = inside.clone().map(|row| (row.at, rows.value(row, number)));
            if let Mean::Known(mean) = mean(values, within, until.now) {
                alone.tallies[number].add(mean);
            }
        }
        let mut days: Vec<usize> =
            unit.iter().filter_map(|row| usize::try_from((row.at - first).div_euclid(DAY)).ok()).collect();
        days.dedup();
        for (number, day) in days.into_iter().filter(|day| *day < DAYS_MAX).enumerate() {
            if alone.units_by_day.len() <= day {
                alone.units_by_day.resize(day + 1, Day::default());
            }
            alone.units_by_day[day].units += 1;
            alone.units_by_day[day].known += u64::from(number > 0);
        }
    }
    Ok(alone)
}
