//! The changes that put versions on gateways and move traffic: how they are judged on a project, and folded.

use serde::Deserialize;

use super::{FoldError, Judgement, Project, Refusal, State, append, body, declared, fact, kind};
use crate::deployment::{Activate, Deployment, DeploymentChange, DeploymentError, GiveUp, Move, Named, Prepare};
use crate::id::{EntryNumber, ProjectName};
use crate::log::Entry;
use crate::rollout::{self, Evidence, RolloutChange};

/// What a promotion by criteria says beside who was promoted.
#[derive(Deserialize)]
struct Promoted {
    #[serde(default)]
    rollout: Option<EntryNumber>,
    #[serde(default)]
    evidence: Option<Evidence>,
}

impl State {
    pub(super) fn fold_deployment(&mut self, entry: &Entry) -> Result<Option<()>, FoldError> {
        // Bodies differ; all of them name these two.
        let Named { model, version } = body(entry)?;
        let fact = fact(entry);
        let Some(project) = self.projects.get_mut(&entry.project) else { return Ok(None) };
        let Some(record) = project.models.get_mut(&model).and_then(|versions| versions.get_mut(&version)) else {
            return Ok(None);
        };
        let deployment = project.deployments.entry(model).or_default();
        Ok(match entry.kind.as_str() {
            kind::MODEL_DEPLOY => {
                deployment.fold_deploy(version, fact);
                Some(())
            }
            kind::MODEL_PREPARE => deployment.fold_prepare(body::<Prepare>(entry)?, fact),
            kind::MODEL_ACTIVATE => deployment.fold_activate(body::<Activate>(entry)?, fact),
            kind::MODEL_GIVE_UP => deployment.fold_give_up(body::<GiveUp>(entry)?, fact),
            kind::MODEL_PROMOTE => {
                let Promoted { rollout, evidence } = body(entry)?;
                let tried = deployment.rollout.as_ref().map(|tried| (tried.begun.entry, tried.version));
                if rollout.is_some_and(|rollout| tried != Some((rollout, version))) {
                    return Ok(None);
                }
                let reasons = evidence.map(|evidence| evidence.reasons).unwrap_or_default();
                deployment.fold_promote(version, reasons, fact)
            }
            kind::ROLLOUT_BEGIN => rollout::fold_begin(deployment, body(entry)?, fact),
            kind::ROLLOUT_STEP => rollout::fold_step(deployment, body(entry)?, fact),
            kind::ROLLOUT_HOLD => rollout::fold_hold(deployment, body(entry)?, fact),
            kind::ROLLOUT_RESUME => rollout::fold_resume(deployment, body(entry)?, fact),
            kind::ROLLOUT_ACKNOWLEDGE => rollout::fold_acknowledge(deployment, body(entry)?, fact),
            kind::ROLLOUT_END => rollout::fold_end(deployment, body(entry)?, fact),
            kind::MODEL_OFF => rollout::fold_off(deployment, version, fact),
            kind::MODEL_ON => rollout::fold_on(deployment, version),
            kind::MODEL_ROLLBACK => deployment.fold_rollback(version, fact),
            kind::MODEL_RETIRE => deployment.fold_retire(version),
            _ => {
                record.approvals.entry(fact.who.clone()).or_insert(fact);
                Some(())
            }
        })
    }
}

pub(super) fn judge_deployment(
    project: &ProjectName,
    known: &Project,
    change: &DeploymentChange,
) -> Result<Judgement, Refusal> {
    let (model, version) = (change.model(), change.version());
    let Some(record) = known.model(model.as_str(), version) else {
        declared(project, known, model)?;
        let existing = known.models.get(model).into_iter().flat_map(|versions| versions.keys().copied()).collect();
        return Err(Refusal::UnknownVersion { model: model.clone(), version, existing });
    };
    if let DeploymentChange::Prepare(_) = change {
        let expected = declared(project, known, model)?;
        if *expected != record.model.service {
            let (expected, found) = (expected.clone(), record.model.service.clone());
            return Err(Refusal::OtherService { model: model.clone(), expected, found });
        }
    }
    if let DeploymentChange::Rollout(RolloutChange::Begin(begin)) = change {
        rollout::buckets_taken(&known.deployments, begin).map_err(DeploymentError::from)?;
    }
    let nothing = Deployment::default();
    match known.deployments.get(model).unwrap_or(&nothing).judge(change)? {
        Move::AlreadySo(entry) => return Ok(Judgement::AlreadySo { entry, version: Some(version) }),
        Move::Append => {}
    }
    let named = || Named { model: model.clone(), version };
    Ok(match change {
        DeploymentChange::Prepare(body) => append(kind::MODEL_PREPARE, body, Some(version)),
        DeploymentChange::Activate(body) => append(kind::MODEL_ACTIVATE, body, Some(version)),
        DeploymentChange::GiveUp(body) => append(kind::MODEL_GIVE_UP, body, Some(version)),
        DeploymentChange::Promote { .. } => append(kind::MODEL_PROMOTE, &named(), Some(version)),
        DeploymentChange::Rollback { .. } => append(kind::MODEL_ROLLBACK, &named(), Some(version)),
        DeploymentChange::Retire { .. } => append(kind::MODEL_RETIRE, &named(), Some(version)),
        DeploymentChange::Approve { .. } => append(kind::MODEL_APPROVE, &named(), Some(version)),
        DeploymentChange::Rollout(change) => {
            let version = Some(version);
            match change {
                RolloutChange::Begin(body) => append(kind::ROLLOUT_BEGIN, body, version),
                RolloutChange::Step(body) => append(kind::ROLLOUT_STEP, body, version),
                RolloutChange::Hold(body) => append(kind::ROLLOUT_HOLD, body, version),
                RolloutChange::Resume(body) => append(kind::ROLLOUT_RESUME, body, version),
                RolloutChange::Acknowledge(body) => append(kind::ROLLOUT_ACKNOWLEDGE, body, version),
                RolloutChange::Promote(body) => append(kind::MODEL_PROMOTE, body, version),
                RolloutChange::End(body) => append(kind::ROLLOUT_END, body, version),
                RolloutChange::Off(body) => append(kind::MODEL_OFF, body, version),
                RolloutChange::On(body) => append(kind::MODEL_ON, body, version),
            }
        }
    })
}
