//! The whole story of a model's traffic, for people and for tools: JSON, from the control log and the last look.

use std::collections::BTreeMap;

use chrono::SecondsFormat;
use registry::deployment::Deployment;
use registry::id::{EntryNumber, ModelName};
use registry::log::Entry;
use registry::rollout::{Ended, Rollout};
use registry::state::Fact;
use serde_json::{Value as Json, json};

use super::policy::KEEP_PREVIOUS;
use crate::answer::Gateway;
use crate::status::Failure;

/// Entries of the log that are read for one story, and those that are told.
const ENTRIES_READ_MAX: usize = 5_000;
const ENTRIES_TOLD_MAX: usize = 200;

/// The kinds of entries that move traffic, or say why it does not move.
const TOLD: [&str; 12] = [
    "model_activate",
    "model_promote",
    "model_rollback",
    "model_retire",
    "model_off",
    "model_on",
    "rollout_begin",
    "rollout_step",
    "rollout_hold",
    "rollout_resume",
    "rollout_acknowledge",
    "rollout_end",
];

pub async fn report(gateway: &Gateway, model: &ModelName) -> Result<Json, Failure> {
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let deployment = project.and_then(|project| project.deployments.get(model));
    let Some(deployment) = deployment else {
        let known = project.into_iter().flat_map(|project| project.deployments.keys()).map(ModelName::as_str);
        return Err(Failure::unknown("deployed model", model.as_str(), known));
    };
    let history = match history(gateway, model, deployment).await {
        Ok(history) => history,
        // The story without its past is better than none while the store is away.
        Err(error) => json!({ "problem": error }),
    };
    let (age, problem) = gateway.follower.log_health();
    let champion = deployment.champion.as_ref();
    let keep = gateway.served().plan().ok().and_then(|plan| plan.model(model.as_str())?.rollout.keep_previous);
    let keep = keep.map_or(KEEP_PREVIOUS.as_micros() as i64, |keep| keep);
    let previous = champion.and_then(|champion| {
        let until = champion.previous_kept_until(chrono::TimeDelta::microseconds(keep))?;
        let until = until.to_rfc3339_opts(SecondsFormat::Secs, true);
        Some(json!({ "version": champion.previous.map(|version| version.0), "kept_until": until }))
    });
    Ok(json!({
        "model": model.as_str(),
        "champion": champion.map(|champion| json!({ "version": champion.version.0, "since": fact(&champion.fact) })),
        "previous": previous,
        "off": deployment.off.as_ref().map(fact),
        "running": deployment.rollout.as_deref().map(|rollout| running(gateway, rollout)),
        "ended": deployment.ended.iter().map(ended).collect::<Vec<_>>(),
        "history": history,
        "control_log": { "head": state.head.0, "age_s": age.as_secs_f64(), "problem": problem },
    }))
}

fn fact(fact: &Fact) -> Json {
    let at = fact.at.to_rfc3339_opts(SecondsFormat::Millis, true);
    json!({ "entry": fact.entry.0, "at": at, "who": fact.who, "why": fact.why })
}

fn running(gateway: &Gateway, rollout: &Rollout) -> Json {
    let stages =
        rollout.stages.iter().map(|(stage, since)| json!({ "stage": stage.to_string(), "since": fact(since) }));
    let held = rollout.held.as_ref().map(|held| {
        json!({ "by": format!("{:?}", held.by).to_lowercase(), "reasons": held.reasons, "since": fact(&held.fact) })
    });
    let acknowledged: BTreeMap<&str, Json> =
        rollout.acknowledged.iter().map(|(feature, by)| (feature.as_str(), fact(by))).collect();
    let judged = gateway.rollouts.last(rollout.begun.entry);
    json!({
        "rollout": rollout.begun.entry.0,
        "version": rollout.version.0,
        "champion": rollout.champion.0,
        "stage": rollout.stage.to_string(),
        "share": f64::from(rollout.share()) / 10_000.0,
        "begun": fact(&rollout.begun),
        "stages": stages.collect::<Vec<_>>(),
        "held": held,
        "acknowledged": acknowledged,
        "traffic": rollout.traffic,
        "policy": serde_json::from_str::<Json>(&rollout.policy).unwrap_or(Json::Null),
        "policy_sha256": rollout.policy_sha256.as_str(),
        "judged": judged,
    })
}

fn ended(ended: &Ended) -> Json {
    json!({
        "rollout": ended.begun.entry.0,
        "version": ended.version.0,
        "champion": ended.champion.0,
        "begun": fact(&ended.begun),
        "stage": ended.stage.to_string(),
        "ending": ended.ending,
        "reasons": ended.reasons,
        "ended": fact(&ended.fact),
    })
}

/// Entries about the model since the first rollout that is remembered, the oldest first.
async fn history(gateway: &Gateway, model: &ModelName, deployment: &Deployment) -> Result<Json, String> {
    let ended = deployment.ended.iter().map(|ended| ended.begun.entry);
    let running = deployment.rollout.iter().map(|rollout| rollout.begun.entry);
    let champion = deployment.champion.iter().map(|champion| champion.fact.entry);
    let first = ended.chain(running).chain(champion).min().unwrap_or(EntryNumber::FIRST);
    let entries = gateway.registry.history(first, ENTRIES_READ_MAX).await;
    let entries = entries.map_err(|error| crate::status::chain(&error))?;
    let told = entries.iter().filter(|entry| is_told(entry, gateway.project.as_str(), model.as_str()));
    let told: Vec<Json> = told.map(line).collect();
    Ok(Json::Array(told[told.len().saturating_sub(ENTRIES_TOLD_MAX)..].to_vec()))
}

fn is_told(entry: &Entry, project: &str, model: &str) -> bool {
    entry.project.as_str() == project
        && TOLD.contains(&entry.kind.as_str())
        && entry.body.get("model").and_then(Json::as_str) == Some(model)
}

fn line(entry: &Entry) -> Json {
    let evidence = entry.body.get("evidence");
    let of = |key: &str| evidence.and_then(|evidence| evidence.get(key)).cloned();
    json!({
        "entry": entry.number.0,
        "at": entry.at.to_rfc3339_opts(SecondsFormat::Millis, true),
        "kind": entry.kind,
        "version": entry.body.get("version"),
        "to": entry.body.get("to").or_else(|| entry.body.get("stage")),
        "ending": entry.body.get("ending"),
        "who": entry.who,
        "why": entry.why,
        "reasons": of("reasons").or_else(|| entry.body.get("reasons").cloned()),
        "judged_on": of("judged_on"),
        "numbers": of("numbers").or_else(|| entry.body.get("numbers").cloned()),
        "features": entry.body.get("features"),
    })
}
