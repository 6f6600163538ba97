//! Looks at rollouts: counts are written and put together, the criteria judged, and what follows is written down.
//!
//! Every gateway looks, so none has to be the one. What they would write is the same, by the same rules from the same counts;
//! the log takes it once, and whoever comes second learns that it is so already. When the object store is away nothing is judged
//! and nothing moves; hard rules go on acting here, and are written down when it is back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drift::sequential::judge::{self, Criterion, Decision, Judgement, Verdict};
use drift::sequential::policy::Measure;
use feature_defs::catalog::RequestTime;
use feature_defs::time::Micros;
use offline_store::rollout::rows::{self, StageKind, VersionOf};
use offline_store::rollout::units::Progress;
use registry::assignment::Homes;
use registry::deployment::DeploymentChange;
use registry::id::{EntryNumber, ModelName, ModelVersion};
use registry::rollout::{
    End, Ending, Evidence, Held, Hold, Holder, Promotion, REASON_BYTES_MAX, REASONS_MAX, Rollout, RolloutChange, Stage,
    Step,
};
use registry::state::Change;
use serde::Serialize;
use serde_json::{Value as Json, json};

use super::counting::Counted;
use super::counts::{self, Merged};
use super::drifted::drift_evidence;
use super::evidence::{self, Due, Found, Times};
use super::losses::{LossesAsked, losses};
use super::policy::KEEP_PREVIOUS;
use super::trial::{SHADOW, Trial};
use super::{Rollouts, skew};
use crate::answer::Gateway;
use crate::deploy;
use crate::status::chain;

/// Between looks.
const LOOK: Duration = Duration::from_secs(2);
/// Counts are written within this, or the look counts as failed.
const STORE_WITHIN: Duration = Duration::from_secs(20);
/// Clocks of gateways differ by less.
const CLOCKS_DIFFER: Micros = 10_000_000;
/// Between looks at champions of before that are kept long enough.
const RETIRE: Duration = Duration::from_secs(60);
/// Who the log names for what follows from the criteria.
pub const JUDGE: &str = "rollout judge";

/// How a rollout stood at the last look.
#[derive(Debug, Clone, Serialize)]
pub struct Judged {
    /// The entry that began it, and the stage.
    pub rollout: u64,
    pub stage: String,
    /// The entry of the log that it was judged on.
    pub judged_on: u64,
    /// The time that it was judged for.
    pub now_us: Micros,
    pub judgement: Judgement,
    pub evidence: Json,
    /// Gateways, and earlier lives of them, whose counts are in it.
    pub lives: usize,
    /// Units whose windows are open here.
    pub open_windows: usize,
    /// How far the metrics are that need labels.
    pub labels: Vec<Progress>,
    pub problems: Vec<String>,
    #[serde(skip)]
    decision: Decision,
}

/// What is found out beside requests, by rollout, with when to look again.
#[derive(Default)]
pub struct Beside {
    found: BTreeMap<EntryNumber, (EntryNumber, Found, Option<Due>)>,
}

/// Looks until it is dropped.
pub async fn run(gateway: &Arc<Gateway>) {
    tokio::join!(look_again(gateway), retire(gateway), super::shadow::run(gateway));
}

async fn look_again(gateway: &Arc<Gateway>) {
    let mut changes = gateway.follower.subscribe();
    let mut next = tokio::time::Instant::now() + LOOK;
    loop {
        let rollouts = &gateway.rollouts;
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = rollouts.urgent.notified() => {}
            changed = changes.changed() => {
                // A version that gets traffic must not go on at the priority of a shadow.
                put_in_background(gateway);
                match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                }
            }
        }
        next = tokio::time::Instant::now() + LOOK;
        let served = gateway.served();
        let running: Vec<EntryNumber> = served.trials.values().map(|trial| trial.rollout).collect();
        rollouts.counted().retain(|rollout, _| running.contains(rollout));
        rollouts.judged().retain(|rollout, _| running.contains(rollout));
        rollouts.others.lock().await.retain(|rollout, _| running.contains(rollout));
        rollouts.beside.lock().await.found.retain(|rollout, _| running.contains(rollout));
        put_in_background(gateway);
        for trial in served.trials.values() {
            if let Err(error) = look(gateway, trial).await {
                rollouts.metrics.failed();
                tracing::warn!(model = %trial.model, error, "a rollout could not be looked at; tried again");
            }
        }
    }
}

/// A version in shadow runs behind everybody else; all others do not.
fn put_in_background(gateway: &Gateway) {
    let served = gateway.served();
    for (name, versions) in &served.versions {
        let shadow = served.trials.get(name).filter(|trial| trial.is_shadow()).map(|trial| trial.version);
        for (number, version) in versions {
            if let Some(model) = &version.state.ready {
                model.server.set_background(shadow == Some(*number));
            }
        }
    }
}

fn ends_of<'a>(gateway: &Gateway, trial: &Trial, state: &'a registry::state::State) -> Option<&'a Rollout> {
    let project = state.project(gateway.project.as_str())?;
    let deployment = project.deployments.get(&*trial.model)?;
    deployment.rollout.as_deref().filter(|rollout| rollout.begun.entry == trial.rollout)
}

/// Counts of everybody, put together, after this gateway's have been written.
async fn gather(gateway: &Gateway, trial: &Trial) -> Result<Merged, String> {
    let rollouts = &gateway.rollouts;
    let folder = counts::folder(&rollouts.root, &trial.model, trial.rollout);
    let mut all = rollouts.others.lock().await;
    let others = all.entry(trial.rollout).or_default();
    let merged = others.read(&*rollouts.store, &folder, &rollouts.me).await?;
    let homes = homes(gateway);
    let counted = {
        let mut all = rollouts.counted();
        let counted = all.entry(trial.rollout).or_insert_with(|| Counted::new(trial, homes.clone()));
        // Units that another gateway has counted are not counted here, should their home change.
        counted.remember(&merged.snapshot.seen);
        counted.set_homes(homes);
        let now = now(gateway, counted.newest());
        let (snapshot, mut beside) = counted.snapshot(now);
        beside.broken.extend(trial.prepared.local.broken());
        let due = counted.is_changed().then(|| counted.counted());
        (!counted.is_empty()).then_some((snapshot, beside, due))
    };
    let Some((snapshot, beside, due)) = counted else { return Ok(merged) };
    if let Some(due) = due {
        let bytes = counts::encode(&rollouts.me, &snapshot, &beside)?;
        counts::put(&*rollouts.store, &folder, &rollouts.me, bytes).await?;
        if let Some(counted) = rollouts.counted().get_mut(&trial.rollout) {
            counted.set_written(due);
        }
    }
    Ok(merged.with(snapshot, beside))
}

fn homes(gateway: &Gateway) -> Homes {
    let me = &gateway.presence.incarnation;
    let others = gateway.presence.others().into_iter().map(|report| report.incarnation);
    Homes::new(me, &others.chain([me.clone()]).collect())
}

/// The time that things are judged for. Replays bring their own, and the newest that was answered is now.
fn now(gateway: &Gateway, newest: Option<Micros>) -> Micros {
    match (gateway.request_time, newest) {
        (RequestTime::Allowed, Some(newest)) => newest,
        _ => (gateway.clock)(),
    }
}

/// One look at one rollout.
async fn look(gateway: &Arc<Gateway>, trial: &Arc<Trial>) -> Result<(), String> {
    let gathered = tokio::time::timeout(STORE_WITHIN, gather(gateway, trial)).await;
    let merged = gathered.map_err(|_| "the object store did not answer in time".to_owned())??;
    let found = find_out(gateway, trial, &merged).await;
    let judged = judged(gateway, trial, &merged, &found);
    let Some(judged) = judged else { return Ok(()) };
    gateway.rollouts.judged().insert(trial.rollout, judged.clone());
    act(gateway, trial, &judged).await
}

/// Evidence that takes reading logs, when it is time for it.
async fn find_out(gateway: &Arc<Gateway>, trial: &Arc<Trial>, merged: &Merged) -> Found {
    // One at a time: it reads logs.
    let mut beside = gateway.rollouts.beside.lock().await;
    let known = beside.found.get(&trial.rollout).filter(|(stage, ..)| *stage == trial.staged);
    if let Some((_, found, Some(due))) = known
        && !due.is_due()
    {
        return found.clone();
    }
    let before = known.map(|(_, found, _)| found.clone()).unwrap_or_default();
    let started = Instant::now();
    let now = now(gateway, merged.beside.newest());
    let times = Times { trial, merged, by_rows: gateway.request_time == RequestTime::Allowed, now };
    let found = find(gateway, trial, &times, before).await;
    let due = Some(if found.is_behind { Due::now() } else { Due::after(started.elapsed()) });
    beside.found.insert(trial.rollout, (trial.staged, found.clone(), due));
    found
}

/// What the logs say of the rollout so far. What cannot be found out is told, and leaves what was known before.
async fn find(gateway: &Arc<Gateway>, trial: &Arc<Trial>, times: &Times<'_>, before: Found) -> Found {
    let mut found = Found { problems: Vec::new(), ..before };
    let served = gateway.served();
    let (Some(challenger), Ok(champion), Ok(plan)) =
        (&trial.challenger, served.model(&trial.model, trial.champion), served.plan())
    else {
        found.problems.push("both versions have to be loaded here to look into the log".to_owned());
        return found;
    };
    let clock = (gateway.clock)();
    let logged_from = trial.stages.first().map_or(clock, |(.., at)| *at).saturating_sub(CLOCKS_DIFFER);
    if trial.is_shadow() {
        let versions = [(trial.version, challenger.plan.clone()), (trial.champion, champion.plan.clone())];
        let asked = skew::Asked {
            service: challenger.plan.service.clone(),
            model: trial.model.to_string(),
            versions: versions.into(),
            logged_from,
        };
        match skew::skew(gateway, plan, &asked, &found.skew).await {
            Ok(more) => {
                found.is_behind = more.is_behind;
                found.skew.add(more);
            }
            Err(problem) => found.problems.push(format!("served rows could not be replayed: {problem}")),
        }
        let of = (&*trial.model, trial.version);
        let drifted = drift_evidence(gateway, of, SHADOW, (logged_from, clock), Vec::new()).await;
        found.drift = drifted.evidence;
        found.problems.extend(drifted.notes);
    }
    let policy = &trial.pinned().policy;
    let by_labels = policy.guardrails.iter().any(|rail| matches!(rail.measure, Measure::Metric(_)));
    if by_labels || policy.canary.as_ref().is_some_and(|canary| !canary.success.is_empty()) {
        let stage = |(stage, entry, _): &(Stage, EntryNumber, Micros)| rows::Stage {
            entry: entry.0,
            from: times.begun(entry.0),
            kind: match stage {
                Stage::Shadow => StageKind::Shadow,
                Stage::Canary { share, .. } => StageKind::Canary(*share),
            },
        };
        let asked = LossesAsked {
            policy: policy.clone(),
            champion: VersionOf { number: trial.champion, plan: champion.plan.clone() },
            challenger: VersionOf { number: trial.version, plan: challenger.plan.clone() },
            unit: trial.pinned().unit.iter().map(|column| column.name.clone()).collect(),
            ramp: (*trial.prepared.ramp).clone(),
            stages: trial.stages.iter().map(stage).collect(),
            window: trial.pinned().window_us,
            logged_from,
            now: times.now,
        };
        match losses(gateway, asked).await {
            Ok(losses) => {
                found.progress = losses.metrics;
                found.problems.extend(losses.notes);
                found.losses = Arc::new(losses.counts);
            }
            Err(problem) => found.problems.push(format!("labels could not be joined: {problem}")),
        }
    }
    found
}

fn judged(gateway: &Gateway, trial: &Trial, merged: &Merged, found: &Found) -> Option<Judged> {
    let state = gateway.registry.state();
    // It may have moved on since the look began; then the next one is for what it is now.
    let rollout = ends_of(gateway, trial, &state).filter(|rollout| rollout.staged() == trial.staged)?;
    let by_rows = gateway.request_time == RequestTime::Allowed;
    let now = now(gateway, merged.beside.newest());
    let times = Times { trial, merged, by_rows, now };
    let policy = &trial.pinned().policy;
    let (judgement, evidence) = match trial.stage {
        Stage::Shadow => {
            let evidence = evidence::shadow(&times, rollout, found);
            (judge::shadow(policy, &evidence, now), serde_json::to_value(&evidence))
        }
        Stage::Canary { .. } => {
            let evidence = evidence::canary(&times, found);
            (judge::canary(policy, &evidence, now), serde_json::to_value(&evidence))
        }
    };
    let open = gateway.rollouts.counted().get(&trial.rollout).map_or(0, Counted::open);
    Some(Judged {
        rollout: trial.rollout.0,
        stage: trial.stage.to_string(),
        judged_on: state.head.0,
        now_us: now,
        decision: judgement.decision,
        judgement,
        evidence: evidence.unwrap_or_default(),
        lives: merged.lives,
        open_windows: open,
        labels: found.progress.clone(),
        problems: found.problems.clone(),
    })
}

/// The judgement as the log keeps it.
fn written(judged: &Judged, reasons: Vec<String>) -> Evidence {
    let cut = |reason: String| {
        let mut end = REASON_BYTES_MAX.min(reason.len());
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason[..end].to_owned()
    };
    let numbers = json!({
        "stage": judged.stage,
        "now_us": judged.now_us,
        "criteria": judged.judgement.criteria,
        "evidence": judged.evidence,
        "gateways": judged.lives,
    });
    let reasons = reasons.into_iter().take(REASONS_MAX).map(cut).collect();
    Evidence { judged_on: EntryNumber(judged.judged_on), reasons, numbers }
}

/// Criteria that hold a rollout until somebody does something, in words that stay the same from look to look.
fn holding(criteria: &[Criterion]) -> Vec<String> {
    let reason = |criterion: &Criterion| match (criterion.name.as_str(), criterion.verdict) {
        ("drift", Verdict::Shared) => Some(criterion.text.clone()),
        ("sample_ratio", Verdict::Breached) => Some("units are not split as declared".to_owned()),
        (name, Verdict::Shared) => Some(format!("`{name}` is breached by the champion too")),
        _ => None,
    };
    criteria.iter().filter_map(reason).collect()
}

/// What reasons are about, without what they list: a feature more that has drifted is no other reason.
fn kinds(reasons: &[String]) -> impl Iterator<Item = &str> {
    reasons.iter().map(|reason| reason.split(" (").next().unwrap_or_default())
}

/// Writes down what follows from a judgement. Somebody else may have done so already.
async fn act(gateway: &Arc<Gateway>, trial: &Trial, judged: &Judged) -> Result<(), String> {
    let state = gateway.registry.state();
    let Some(rollout) = ends_of(gateway, trial, &state) else { return Ok(()) };
    let reasons = judged.judgement.reasons.clone();
    let (model, version) = named(trial)?;
    let ends = |ending| {
        let evidence = written(judged, reasons.clone());
        RolloutChange::End(End { model: model.clone(), version, rollout: trial.rollout, ending, evidence })
    };
    let change = match judged.decision {
        Decision::Hold => {
            let reasons = holding(&judged.judgement.criteria);
            let known = rollout.held.as_ref();
            let is_known = |held: &Held| held.by == Holder::Person || kinds(&held.reasons).eq(kinds(&reasons));
            if reasons.is_empty() || known.is_some_and(is_known) {
                return Ok(());
            }
            let evidence = written(judged, reasons);
            let by = Holder::Judge;
            RolloutChange::Hold(Hold { model: model.clone(), version, rollout: trial.rollout, by, evidence })
        }
        Decision::Stop => ends(Ending::Stopped),
        Decision::RollBack => ends(Ending::RolledBack),
        Decision::End => ends(Ending::Expired),
        Decision::Advance { .. } | Decision::Promote
            if rollout.held.as_ref().is_some_and(|held| held.by == Holder::Person) =>
        {
            return Ok(());
        }
        Decision::Advance { to } => {
            let policy = &trial.pinned().policy;
            let share = policy.canary.as_ref().and_then(|canary| canary.steps.get(to)).copied();
            let share = share.ok_or("the policy has no such step")?;
            ready_everywhere(gateway, trial).await?;
            let to = Stage::Canary { step: to as u32, share };
            let evidence = written(judged, reasons);
            RolloutChange::Step(Step {
                model: model.clone(),
                version,
                rollout: trial.rollout,
                from: trial.stage,
                to,
                evidence,
            })
        }
        Decision::Promote => {
            ready_everywhere(gateway, trial).await?;
            let (from, evidence) = (trial.stage, written(judged, reasons));
            RolloutChange::Promote(Promotion { model: model.clone(), version, rollout: trial.rollout, from, evidence })
        }
    };
    let what = format!("{:?}", judged.decision);
    let change = Change::Deployment(DeploymentChange::Rollout(change));
    match gateway.registry.submit(&gateway.project, &change, JUDGE, None).await {
        Ok(receipt) => {
            tracing::info!(
                model = %trial.model, version = trial.version, entry = %receipt.entry, what,
                "a rollout goes on: {}", judged.judgement.reasons.first().map_or("", String::as_str)
            );
            gateway.follower.follow(crate::follow::Retry::Later).await;
            Ok(())
        }
        Err(error) => Err(chain(&error)),
    }
}

pub fn named(trial: &Trial) -> Result<(ModelName, ModelVersion), String> {
    let model: ModelName = trial.model.parse().map_err(|error: registry::id::NameError| error.to_string())?;
    Ok((model, ModelVersion(trial.version)))
}

/// Traffic goes only where every live gateway can take it.
async fn ready_everywhere(gateway: &Gateway, trial: &Trial) -> Result<(), String> {
    deploy::all_have(gateway, &named(trial)?).await.map_err(|failure| failure.message)
}

/// What the criteria say now, for somebody who asks; the rollout goes on if they allow it.
pub async fn judge_now(gateway: &Arc<Gateway>, trial: &Arc<Trial>) -> Result<Judged, String> {
    // Somebody waits for it, so the logs are read now, not when it is cheap again.
    if let Some((.., due)) = gateway.rollouts.beside.lock().await.found.get_mut(&trial.rollout) {
        *due = None;
    }
    look(gateway, trial).await?;
    let judged = gateway.rollouts.judged().get(&trial.rollout).cloned();
    judged.ok_or_else(|| "the rollout has moved on; look at it".to_owned())
}

impl Judged {
    pub fn decision(&self) -> Decision {
        self.decision
    }
}

/// Lets champions of before go when they have been kept long enough.
async fn retire(gateway: &Arc<Gateway>) {
    loop {
        tokio::time::sleep(RETIRE).await;
        let state = gateway.registry.state();
        let Some(project) = state.project(gateway.project.as_str()) else { continue };
        let served = gateway.served();
        for (model, deployment) in &project.deployments {
            let declared = served.plan().ok().and_then(|plan| plan.model(model.as_str())?.rollout.keep_previous);
            let keep = declared.map_or(KEEP_PREVIOUS, |keep| Duration::from_micros(keep.max(0) as u64));
            let Ok(keep) = chrono::TimeDelta::from_std(keep) else { continue };
            let Some(champion) = &deployment.champion else { continue };
            let (Some(previous), Some(until)) = (champion.previous, champion.previous_kept_until(keep)) else {
                continue;
            };
            // Clocks differ by seconds, and this is about a day.
            if chrono::DateTime::from_timestamp_micros((gateway.clock)()).is_none_or(|now| now < until) {
                continue;
            }
            let change = DeploymentChange::Retire { model: model.clone(), version: previous, previous_too: true };
            let why = "the champion before is kept no longer";
            match gateway.registry.submit(&gateway.project, &Change::Deployment(change), JUDGE, Some(why)).await {
                Ok(_) => tracing::info!(%model, version = %previous, "{why}"),
                Err(error) => tracing::debug!(error = chain(&error), "the champion before stays"),
            }
        }
    }
}

impl Rollouts {
    /// How a rollout stood at the last look.
    pub fn last(&self, rollout: EntryNumber) -> Option<Judged> {
        self.judged().get(&rollout).cloned()
    }
}
