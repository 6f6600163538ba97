//! What people ask for: to begin, look at, hold, end; and to turn a model off.
//!
//! A command never changes a policy: it is what the definitions declared when the rollout began. And it never gives traffic
//! without the criteria: beginning pins them, and `advance` is judged like any look.

use std::collections::BTreeMap;
use std::sync::Arc;

use drift::sequential::judge::Decision;
use feature_defs::plan::ModelPlan;
use offline_store::rollout::rows::VersionOf;
use proto::v1;
use proto::v1::change_rollout_request::Change as Asked;
use registry::assignment::{BUCKETS, Range, Traffic};
use registry::deployment::{Deployment, DeploymentChange};
use registry::id::{EntryNumber, ModelName, ModelVersion, Sha256};
use registry::rollout::{
    Acknowledge, Begin, End, Ending, Evidence, Hold, Holder, Resume, Rollout, RolloutChange, Stage, Switch,
};
use registry::state::Change;
use registry::{Outcome, Receipt};
use serde_json::json;
use uuid::Uuid;

use super::holdout::{self, Evaluation, HoldoutAsked};
use super::policy::{self, Pinned};
use super::traffic::{self, TrafficAsked};
use super::{judging, report};
use crate::answer::Gateway;
use crate::deploy::{self, all_have, asked, named, version_named};
use crate::follow::Retry;
use crate::status::{Failure, Kind};
use crate::versions::ServedModel;

/// Features that one call acknowledges.
const FEATURES_MAX: usize = 1_000;

fn deployment(gateway: &Gateway, model: &ModelName) -> Result<Deployment, Failure> {
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let found = project.and_then(|project| project.deployments.get(model)).cloned();
    found.ok_or_else(|| {
        let known = project.into_iter().flat_map(|project| project.deployments.keys()).map(ModelName::as_str);
        Failure::unknown("deployed model", model.as_str(), known)
    })
}

fn running(gateway: &Gateway, model: &ModelName) -> Result<Rollout, Failure> {
    let found = deployment(gateway, model)?.rollout;
    found.map(|rollout| *rollout).ok_or_else(|| {
        let text = format!(
            "no rollout of model `{model}` runs; begin one with `coeval rollout shadow {model} VERSION`, or look at what was with `coeval rollout show {model}`"
        );
        Failure::new(Kind::Precondition, text)
    })
}

async fn submit(gateway: &Gateway, change: RolloutChange, who: &str, why: Option<&str>) -> Result<Receipt, Failure> {
    let change = Change::Deployment(DeploymentChange::Rollout(change));
    let receipt = gateway.registry.submit(&gateway.project, &change, who, why).await?;
    gateway.follower.follow(Retry::Later).await;
    Ok(receipt)
}

async fn told(gateway: &Gateway, model: &ModelName) -> Result<String, Failure> {
    Ok(report::report(gateway, model).await?.to_string())
}

/// The policy that a rollout of the model would be pinned to.
pub(super) fn pinned(
    gateway: &Gateway,
    plan: &ModelPlan,
    centres: &BTreeMap<String, f64>,
) -> Result<(Pinned, Vec<String>), Failure> {
    let mut notes = Vec::new();
    let state = gateway.registry.state();
    let settings = state.project(gateway.project.as_str()).map(|project| project.catalog().settings.clone());
    let inherited = match policy::inherited(settings.as_deref().unwrap_or_default()) {
        Ok(inherited) => inherited,
        Err(problem) => {
            notes.push(format!("guardrails of coeval.yaml are not inherited, since it cannot be read here: {problem}"));
            Vec::new()
        }
    };
    let pinned = policy::pinned(plan, &inherited, centres);
    let pinned = pinned.map_err(|error| Failure::new(Kind::Precondition, format!("model `{}`: {error}", plan.name)))?;
    Ok((pinned, notes))
}

/// A version with the champion that it would be compared with, both loaded here.
pub(super) struct Compared {
    pub challenger: Arc<ServedModel>,
    pub champion: Arc<ServedModel>,
    /// By the definitions in force, which declare the policy.
    pub plan: Arc<ModelPlan>,
}

pub(super) fn compared(gateway: &Gateway, model: &str, version: u32) -> Result<Compared, Failure> {
    let served = gateway.served();
    let champion = served.model(model, 0)?.clone();
    if champion.version == version {
        let text = format!("version {version} of model `{model}` is the champion already");
        return Err(Failure::new(Kind::Precondition, text));
    }
    let challenger = served.model(model, version)?.clone();
    let plan = served.plan()?;
    let known = || plan.models.iter().map(|model| &*model.name);
    let plan = plan.model(model).cloned().ok_or_else(|| Failure::unknown("model", model, known()))?;
    // What callers get must not change its form from row to row.
    let form = |plan: &ModelPlan| {
        let outputs = plan.outputs.iter().map(|output| (output.name.clone(), output.dtype.value_type()));
        outputs.chain(plan.post.iter().map(|post| (post.name.clone(), post.feature_type.clone()))).collect::<Vec<_>>()
    };
    let (ours, theirs) = (form(&challenger.plan), form(&champion.plan));
    if ours != theirs {
        let shown = |outputs: &[(String, feature_defs::value::Type)]| {
            outputs.iter().map(|(name, of)| format!("{name}: {of}")).collect::<Vec<_>>().join(", ")
        };
        let text = format!(
            "version {version} of model `{model}` answers with {{{}}} and the champion with {{{}}}; a rollout compares versions that answer alike",
            shown(&ours),
            shown(&theirs)
        );
        return Err(Failure::new(Kind::Precondition, text));
    }
    Ok(Compared { challenger, champion, plan })
}

pub async fn begin(
    gateway: &Arc<Gateway>,
    request: &v1::BeginRolloutRequest,
) -> Result<v1::BeginRolloutResponse, Failure> {
    let v1::BeginRolloutRequest { project, model, version, who, why, .. } = request;
    let asked = asked(gateway, project, who, why)?;
    let key = version_named(model, *version)?;
    let (name, number) = key.clone();
    gateway.follower.follow(Retry::Later).await;
    if let Some(rollout) = deployment(gateway, &name)?.rollout.filter(|rollout| rollout.version == number) {
        // Said twice.
        let (rollout, existed) = (rollout.begun.entry.0, true);
        return Ok(v1::BeginRolloutResponse { rollout, existed, report: told(gateway, &name).await? });
    }
    let compared = compared(gateway, model, *version)?;
    let (draft, _) = pinned(gateway, &compared.plan, &BTreeMap::new())?;
    let stage = stage(request, &draft)?;
    let evaluation = evaluated(gateway, request, &compared, &draft).await?;
    // What the champion's metrics are about is best known from rows that it has scored.
    let centres = evaluation.as_ref().and_then(|evaluation| evaluation.champion.as_ref());
    let centres = centres.map(|champion| champion.success.clone()).unwrap_or_default();
    let (pinned, notes) = pinned(gateway, &compared.plan, &centres)?;
    all_have(gateway, &key).await?;
    let state = gateway.registry.state();
    let policy = serde_json::to_string_pretty(&pinned)
        .map_err(|error| Failure::internal("the policy could not be written", &error))?;
    let traffic = buckets(request, model)?;
    let reasons = vec![format!("begun by hand{}", asked.why.map_or_else(String::new, |why| format!(": {why}")))];
    let begin = Begin {
        model: name.clone(),
        version: number,
        champion: ModelVersion(compared.champion.version),
        policy_sha256: Sha256::of(policy.as_bytes()),
        policy,
        traffic,
        stage,
        evidence: Evidence {
            judged_on: state.head,
            reasons,
            numbers: json!({ "notes": notes, "evaluation": evaluation }),
        },
    };
    let receipt = submit(gateway, RolloutChange::Begin(Box::new(begin)), asked.who, asked.why).await?;
    tracing::info!(%model, version, who, entry = %receipt.entry, "a rollout begins: {stage}");
    let existed = receipt.outcome == Outcome::AlreadySo;
    Ok(v1::BeginRolloutResponse { rollout: receipt.entry.0, existed, report: told(gateway, &name).await? })
}

/// Both versions on rows whose labels are known. A version that is shown to be worse there is not begun with.
async fn evaluated(
    gateway: &Gateway,
    request: &v1::BeginRolloutRequest,
    compared: &Compared,
    pinned: &Pinned,
) -> Result<Option<Evaluation>, Failure> {
    let model = &request.model;
    if request.dataset.is_empty() {
        if request.skip_evaluation || compared.plan.label.is_none() {
            return Ok(None);
        }
        let text = format!(
            "model `{model}` declares a label, so both versions can be held against a dataset first: name one with `--dataset`, or say `--without-evaluation`"
        );
        return Err(Failure::new(Kind::Precondition, text));
    }
    let asked = HoldoutAsked {
        model: model.clone(),
        champion: Some(compared.champion.version),
        challenger: compared.challenger.version,
        dataset: request.dataset.clone(),
        policy: pinned.policy.clone(),
        unit: pinned.unit.iter().map(|column| column.name.clone()).collect(),
    };
    let evaluation = holdout::evaluate(gateway, &asked).await;
    let evaluation = evaluation.map_err(|problem| Failure::new(Kind::Precondition, problem))?;
    if evaluation.worse {
        let text = format!(
            "version {} of model `{model}` is worse than the champion on dataset `{}`, so its rollout is not begun: {}",
            request.version,
            request.dataset,
            evaluation.text.join("; ")
        );
        return Err(Failure::new(Kind::Precondition, text));
    }
    Ok(Some(evaluation))
}

/// Where a rollout begins.
fn stage(request: &v1::BeginRolloutRequest, pinned: &Pinned) -> Result<Stage, Failure> {
    let policy = &pinned.policy;
    let canary = || -> Result<Stage, Failure> {
        let steps = policy.canary.as_ref().and_then(|canary| canary.steps.first());
        let share = *steps.ok_or_else(|| {
            let text = format!("model `{}` declares no `canary:`; declare it and run `coeval apply`", request.model);
            Failure::new(Kind::Precondition, text)
        })?;
        Ok(Stage::Canary { step: 0, share })
    };
    match (request.stage.as_str(), &policy.shadow) {
        ("" | "shadow", Some(_)) => Ok(Stage::Shadow),
        ("", None) => canary(),
        ("shadow", None) => {
            let text = format!("model `{}` declares no `shadow:`; declare it and run `coeval apply`", request.model);
            Err(Failure::new(Kind::Precondition, text))
        }
        ("canary", Some(_)) if !request.skip_shadow => {
            let text = format!(
                "model `{}` declares shadow criteria, which a canary would pass over; begin with `coeval rollout shadow`, or say `--skip-shadow`",
                request.model
            );
            Err(Failure::new(Kind::Precondition, text))
        }
        ("canary", _) => canary(),
        (other, _) => Err(Failure::invalid(format!("`{other}` is no stage to begin at; use `shadow` or `canary`"))),
    }
}

fn buckets(request: &v1::BeginRolloutRequest, model: &str) -> Result<Traffic, Failure> {
    let layer = if request.layer.is_empty() { model.to_owned() } else { request.layer.clone() };
    let range = match (request.from_bucket, request.to_bucket) {
        (0, 0) => Range::ALL,
        (from, to) => {
            let bucket = |bucket: u32| u16::try_from(bucket).ok().filter(|bucket| *bucket <= BUCKETS);
            let (Some(from), Some(to)) = (bucket(from), bucket(to)) else {
                return Err(Failure::invalid(format!("a layer has buckets 0 to {BUCKETS}, not {from} to {to}")));
            };
            Range { from, to }
        }
    };
    Ok(Traffic { layer, seed: Uuid::new_v4().simple().to_string(), ranges: vec![range] })
}

pub async fn get(gateway: &Gateway, request: &v1::GetRolloutRequest) -> Result<v1::GetRolloutResponse, Failure> {
    gateway.check_project(&request.project)?;
    let model = named(&request.model)?;
    Ok(v1::GetRolloutResponse { report: told(gateway, &model).await? })
}

pub async fn change(
    gateway: &Arc<Gateway>,
    request: &v1::ChangeRolloutRequest,
) -> Result<v1::ChangeRolloutResponse, Failure> {
    let v1::ChangeRolloutRequest { project, model, who, why, features, .. } = request;
    let asked = asked(gateway, project, who, why)?;
    let name = named(model)?;
    gateway.follower.follow(Retry::Later).await;
    let receipt = match request.change() {
        Asked::Unspecified => return Err(Failure::invalid("the request names no change")),
        Asked::Off | Asked::On => {
            let champion = deployment(gateway, &name)?.champion_version();
            let version = champion.ok_or_else(|| {
                Failure::new(Kind::Precondition, format!("model `{model}` has no champion; deploy a version first"))
            })?;
            let switch = Switch { model: name.clone(), version };
            let is_off = request.change() == Asked::Off;
            let change = if is_off { RolloutChange::Off(switch) } else { RolloutChange::On(switch) };
            submit(gateway, change, asked.who, asked.why).await?
        }
        Asked::Hold => {
            let found = running(gateway, &name)?;
            let evidence = by_hand(gateway, &asked);
            let (version, rollout, by) = (found.version, found.begun.entry, Holder::Person);
            let hold = Hold { model: name.clone(), version, rollout, by, evidence };
            submit(gateway, RolloutChange::Hold(hold), asked.who, asked.why).await?
        }
        Asked::Resume => {
            let found = running(gateway, &name)?;
            let resume = Resume { model: name.clone(), version: found.version, rollout: found.begun.entry };
            submit(gateway, RolloutChange::Resume(resume), asked.who, asked.why).await?
        }
        Asked::Acknowledge => {
            if features.is_empty() || features.len() > FEATURES_MAX {
                let text = format!("name 1 to {FEATURES_MAX} features whose drift is acknowledged, or `*` for all");
                return Err(Failure::invalid(text));
            }
            let found = running(gateway, &name)?;
            known_features(gateway, &found, model, features)?;
            let (version, rollout) = (found.version, found.begun.entry);
            let acknowledge = Acknowledge { model: name.clone(), version, rollout, features: features.clone() };
            submit(gateway, RolloutChange::Acknowledge(acknowledge), asked.who, asked.why).await?
        }
        Asked::End => end(gateway, &name, &running(gateway, &name)?, &asked).await?,
        Asked::Advance => return advance(gateway, &name).await,
    };
    let existed = receipt.outcome == Outcome::AlreadySo;
    Ok(v1::ChangeRolloutResponse { control_entry: receipt.entry.0, existed, report: told(gateway, &name).await? })
}

fn by_hand(gateway: &Gateway, asked: &deploy::Asked<'_>) -> Evidence {
    let reason = asked.why.map_or_else(|| format!("by {}", asked.who), str::to_owned);
    let mut end = registry::rollout::REASON_BYTES_MAX.min(reason.len());
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let judged_on = gateway.registry.state().head;
    Evidence { judged_on, reasons: vec![reason[..end].to_owned()], numbers: json!({}) }
}

/// Features that neither version reads are typing errors.
fn known_features(gateway: &Gateway, found: &Rollout, model: &str, features: &[String]) -> Result<(), Failure> {
    let served = gateway.served();
    let Ok(challenger) = served.model(model, found.version.0) else { return Ok(()) };
    let outputs = || challenger.plan.service.outputs.iter().map(|output| output.name.as_str());
    for feature in features.iter().filter(|feature| *feature != "*") {
        if !outputs().any(|known| known == feature) {
            return Err(Failure::unknown("feature of the version named", feature, outputs()));
        }
    }
    Ok(())
}

/// Ends a rollout by hand: the champion keeps the traffic.
pub async fn end(
    gateway: &Gateway,
    model: &ModelName,
    found: &Rollout,
    asked: &deploy::Asked<'_>,
) -> Result<Receipt, Failure> {
    let mut evidence = by_hand(gateway, asked);
    if let Some(judged) = gateway.rollouts.last(found.begun.entry) {
        evidence.numbers = json!({ "criteria": judged.judgement.criteria, "now_us": judged.now_us });
    }
    let (version, rollout, ending) = (found.version, found.begun.entry, Ending::Abandoned);
    let end = End { model: model.clone(), version, rollout, ending, evidence };
    submit(gateway, RolloutChange::End(end), asked.who, asked.why).await
}

/// Judges now; what the criteria allow happens, and what they do not allow is refused with what is missing.
async fn advance(gateway: &Arc<Gateway>, model: &ModelName) -> Result<v1::ChangeRolloutResponse, Failure> {
    let found = running(gateway, model)?;
    let served = gateway.served();
    let trial = served.trials.get(model.as_str()).filter(|trial| trial.rollout == found.begun.entry);
    let trial = trial.ok_or_else(|| {
        let text = format!("the rollout of model `{model}` is not served here yet; ask again in a moment");
        Failure::new(Kind::Unavailable, text)
    })?;
    let judged = judging::judge_now(gateway, trial).await;
    let judged = judged.map_err(|error| Failure::new(Kind::Unavailable, error))?;
    if judged.decision() == Decision::Hold {
        let text = format!(
            "the rollout of model `{model}` stays at {}: {}",
            judged.stage,
            judged.judgement.reasons.join("; ")
        );
        return Err(Failure::new(Kind::Precondition, text));
    }
    let entry = deployment(gateway, model).ok().map_or(EntryNumber::NONE, |deployment| {
        let ended = deployment.ended.iter().find(|ended| ended.begun.entry == found.begun.entry);
        let running = deployment.rollout.as_ref().map(|rollout| rollout.changed);
        ended.map(|ended| ended.fact.entry).or(running).unwrap_or(EntryNumber::NONE)
    });
    Ok(v1::ChangeRolloutResponse { control_entry: entry.0, existed: false, report: told(gateway, model).await? })
}

pub async fn plan(
    gateway: &Arc<Gateway>,
    request: &v1::PlanRolloutRequest,
) -> Result<v1::PlanRolloutResponse, Failure> {
    gateway.check_project(&request.project)?;
    let compared = compared(gateway, &request.model, request.version)?;
    let (pinned, mut notes) = pinned(gateway, &compared.plan, &BTreeMap::new())?;
    let asked = TrafficAsked {
        champion: VersionOf { number: compared.champion.version, plan: compared.champion.plan.clone() },
        policy: pinned.policy.clone(),
        unit: pinned.unit.iter().map(|column| column.name.clone()).collect(),
        window: pinned.window_us,
        evaluation: None,
    };
    let found = traffic::traffic(gateway, asked).await;
    let found = found.map_err(|problem| Failure::new(Kind::Unavailable, problem))?;
    notes.extend(found.notes);
    let plan = drift::sequential::plan::plan(&pinned.policy, &found.traffic);
    let report = json!({
        "model": request.model,
        "version": request.version,
        "champion": compared.champion.version,
        "plan": plan,
        "traffic": found.traffic,
        "policy": pinned,
        "notes": notes,
    });
    Ok(v1::PlanRolloutResponse { report: report.to_string() })
}
