//! Rollouts: a version on its way from being active to being champion, under criteria that were pinned when it began.
//!
//! The log holds what happened and with which numbers; criteria are opaque here, and counters never enter it. What this module
//! knows is what may follow what, and that nothing moves without evidence:
//!
//! ```text
//! active --begin--> shadow --step--> canary step 1 --step--> ... --promote--> champion
//!                      '------------- end (stopped, rolled back, expired) ------'--> active
//! ```
//!
//! Every change names the rollout it means (by the entry that began it), the stage it goes on from, and the head of the log that its
//! numbers were judged on. If the rollout has changed since, the numbers say nothing about what it is now, so the change is refused
//! and judged again: of two gateways that advance at once one succeeds, and a hold that somebody has put in between holds.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::assignment::{BUCKETS, Traffic, check_ranges};
use crate::deployment::{Deployment, DeploymentError, Move, Standing};
use crate::id::{EntryNumber, ModelName, ModelVersion, Sha256};
use crate::state::Fact;

/// A policy is a page of text.
pub const POLICY_BYTES_MAX: usize = 64 << 10;

/// The numbers of one transition: a line per criterion and step.
pub const NUMBERS_BYTES_MAX: usize = 512 << 10;

/// Reasons of one transition, and the length of each.
pub const REASONS_MAX: usize = 32;
pub const REASON_BYTES_MAX: usize = 4 << 10;

/// Steps of one rollout.
pub const STEPS_MAX: usize = 64;

/// Features that one entry acknowledges, or one rollout has acknowledged.
pub const ACKNOWLEDGED_MAX: usize = 1_000;

/// Rollouts that are remembered when they are over; the log has them all.
const ENDED_MAX: usize = 10;

/// How far a rollout has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// It scores what the champion scores, and answers nobody.
    Shadow,
    /// It answers a share of units, in buckets of 10,000.
    Canary { step: u32, share: u16 },
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stage::Shadow => formatter.write_str("shadow"),
            Stage::Canary { step, share } => {
                write!(formatter, "canary step {} ({} %)", step + 1, f64::from(*share) / 100.0)
            }
        }
    }
}

/// A rollout that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    pub version: ModelVersion,
    /// The champion that it is compared with.
    pub champion: ModelVersion,
    /// Names the rollout.
    pub begun: Fact,
    /// The criteria, as text: a later `apply` does not change them.
    pub policy: String,
    pub policy_sha256: Sha256,
    pub traffic: Traffic,
    pub stage: Stage,
    /// All stages so far with the entries that began them, the present one last: counts are kept by these.
    pub stages: Vec<(Stage, Fact)>,
    /// Set while somebody, or the judge, keeps it where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// Features whose drift somebody has seen and accepted.
    #[serde(default)]
    pub acknowledged: BTreeMap<String, Fact>,
    /// The last entry that changed it.
    pub changed: EntryNumber,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub fact: Fact,
    pub by: Holder,
    pub reasons: Vec<String>,
}

/// Whose hold it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// Tells why nothing happens; the next step ends it.
    Judge,
    /// Nothing goes on before somebody resumes it.
    Person,
}

/// A rollout that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub version: ModelVersion,
    pub champion: ModelVersion,
    pub begun: Fact,
    pub stage: Stage,
    pub ending: Ending,
    pub reasons: Vec<String>,
    /// The entry that ended it; its numbers are there.
    pub fact: Fact,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Promoted,
    /// A criterion was breached in shadow.
    Stopped,
    /// A criterion was breached, or a hard rule broken.
    RolledBack,
    /// Somebody has ended it.
    Abandoned,
    /// Its time was over.
    Expired,
    /// The champion that it was compared with is another one.
    Superseded,
    /// The model was turned off.
    TurnedOff,
}

/// Why and by which numbers something goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The head of the log that the numbers were judged on.
    pub judged_on: EntryNumber,
    pub reasons: Vec<String>,
    /// The judgement, whole. Opaque here.
    pub numbers: Value,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Begin {
    pub model: ModelName,
    pub version: ModelVersion,
    /// The champion that the plan was made for.
    pub champion: ModelVersion,
    pub policy: String,
    pub policy_sha256: Sha256,
    pub traffic: Traffic,
    pub stage: Stage,
    /// The plan, and the holdout evaluation.
    pub evidence: Evidence,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub model: ModelName,
    pub version: ModelVersion,
    /// The entry that began the rollout.
    pub rollout: EntryNumber,
    pub from: Stage,
    pub to: Stage,
    pub evidence: Evidence,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    pub model: ModelName,
    pub version: ModelVersion,
    pub rollout: EntryNumber,
    pub by: Holder,
    pub evidence: Evidence,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resume {
    pub model: ModelName,
    pub version: ModelVersion,
    pub rollout: EntryNumber,
}

/// Somebody has seen that these features have drifted, and takes it upon them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Acknowledge {
    pub model: ModelName,
    pub version: ModelVersion,
    pub rollout: EntryNumber,
    pub features: Vec<String>,
}

/// A promotion by criteria.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Promotion {
    pub model: ModelName,
    pub version: ModelVersion,
    pub rollout: EntryNumber,
    pub from: Stage,
    pub evidence: Evidence,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct End {
    pub model: ModelName,
    pub version: ModelVersion,
    pub rollout: EntryNumber,
    pub ending: Ending,
    pub evidence: Evidence,
}

/// The model answers with its declared fallback, or again with its champion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Switch {
    pub model: ModelName,
    /// The champion.
    pub version: ModelVersion,
}

#[derive(Debug, Clone, PartialEq)]
pub enum RolloutChange {
    Begin(Box<Begin>),
    Step(Step),
    Hold(Hold),
    Resume(Resume),
    Acknowledge(Acknowledge),
    Promote(Promotion),
    End(End),
    Off(Switch),
    On(Switch),
}

/// Why a rollout cannot go on so.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RolloutError {
    #[error(
        "version {version} of model `{model}` is {standing}; only an active version that is not the champion can be rolled out: deploy it with `coeval model deploy {model} {version}`"
    )]
    NotActive { model: ModelName, version: ModelVersion, standing: Standing },
    #[error(
        "the champion of model `{model}` is {found} and not {expected}, which the rollout was planned against; plan it again"
    )]
    OtherChampion { model: ModelName, expected: ModelVersion, found: String },
    #[error(
        "the rollout of model `{model}` that began with entry {rollout} of the control log does not run{how}; look at `coeval rollout show {model}`"
    )]
    NotRunning { model: ModelName, rollout: EntryNumber, how: String },
    #[error(
        "the rollout of model `{model}` is at {found} and not at {expected}: somebody else was faster; judge it again"
    )]
    OtherStage { model: ModelName, expected: Stage, found: Stage },
    #[error("after {from} of model `{model}` comes a larger share, one step at a time, not {to}")]
    WrongStep { model: ModelName, from: Stage, to: Stage },
    #[error(
        "the numbers for model `{model}` were judged on entry {judged_on} of the control log, and entry {changed} has changed the rollout since; judge it again"
    )]
    Stale { model: ModelName, judged_on: EntryNumber, changed: EntryNumber },
    #[error(
        "the rollout of model `{model}` is held by {who} since entry {since} of the control log ({reasons}); `coeval rollout resume {model}` lets it go on"
    )]
    Held { model: ModelName, who: String, since: EntryNumber, reasons: String },
    #[error(
        "a rollout of model `{model}` moves by evidence only, and none was given; hand over the judgement with its numbers"
    )]
    NoEvidence { model: ModelName },
    #[error("{what} of the rollout of model `{model}` cannot be recorded: {problem}")]
    Unfit { model: ModelName, what: &'static str, problem: String },
    #[error("layer `{layer}` has buckets that the rollout of model `{other}` owns; take others, or another layer")]
    BucketsTaken { layer: String, other: ModelName },
    #[error(
        "model `{model}` is off since entry {since} of the control log; turn it on first: `coeval rollout on {model}`"
    )]
    Off { model: ModelName, since: EntryNumber },
}

impl RolloutChange {
    pub fn model(&self) -> &ModelName {
        match self {
            Self::Begin(begin) => &begin.model,
            Self::Step(step) => &step.model,
            Self::Hold(hold) => &hold.model,
            Self::Resume(resume) => &resume.model,
            Self::Acknowledge(acknowledge) => &acknowledge.model,
            Self::Promote(promotion) => &promotion.model,
            Self::End(end) => &end.model,
            Self::Off(switch) | Self::On(switch) => &switch.model,
        }
    }

    pub fn version(&self) -> ModelVersion {
        match self {
            Self::Begin(begin) => begin.version,
            Self::Step(step) => step.version,
            Self::Hold(hold) => hold.version,
            Self::Resume(resume) => resume.version,
            Self::Acknowledge(acknowledge) => acknowledge.version,
            Self::Promote(promotion) => promotion.version,
            Self::End(end) => end.version,
            Self::Off(switch) | Self::On(switch) => switch.version,
        }
    }
}

impl Rollout {
    /// The entry that began the present stage: what is counted from then on is kept under its number.
    pub fn staged(&self) -> EntryNumber {
        self.stages.last().map_or(self.begun.entry, |(_, fact)| fact.entry)
    }

    /// The challenger's share of buckets at the moment, of 10,000.
    pub fn share(&self) -> u16 {
        match self.stage {
            Stage::Shadow => 0,
            Stage::Canary { share, .. } => share,
        }
    }
}

impl Deployment {
    /// The rollout that a change means, if it runs.
    fn tried(&self, model: &ModelName, version: ModelVersion, rollout: EntryNumber) -> Result<&Rollout, RolloutError> {
        let found = self.rollout.as_deref().filter(|found| found.begun.entry == rollout && found.version == version);
        found.ok_or_else(|| {
            let over = self.ended.iter().find(|ended| ended.begun.entry == rollout);
            let how = match (over, &self.rollout) {
                (Some(ended), _) => format!(" any more: {:?} with entry {}", ended.ending, ended.fact.entry),
                (None, Some(other)) => format!(": that of version {} does", other.version),
                (None, None) => String::new(),
            };
            RolloutError::NotRunning { model: model.clone(), rollout, how }
        })
    }

    /// Where somebody else has ended the rollout in the same way.
    fn ended_so(&self, rollout: EntryNumber, ending: Ending) -> Option<EntryNumber> {
        let ended = self.ended.iter().find(|ended| ended.begun.entry == rollout)?;
        (ended.ending == ending).then_some(ended.fact.entry)
    }

    pub(crate) fn end_rollout(&mut self, ending: Ending, reasons: Vec<String>, fact: &Fact) {
        let Some(rollout) = self.rollout.take() else { return };
        let Rollout { version, champion, begun, stage, .. } = *rollout;
        self.ended.push(Ended { version, champion, begun, stage, ending, reasons, fact: fact.clone() });
        if self.ended.len() > ENDED_MAX {
            self.ended.remove(0);
        }
    }
}

/// Whether a change may follow on this. Buckets of other models are looked at by whoever knows them: `buckets_taken`.
pub(crate) fn judge(deployment: &Deployment, change: &RolloutChange) -> Result<Move, DeploymentError> {
    let (model, version) = (change.model(), change.version());
    let running = |rollout: EntryNumber| deployment.tried(model, version, rollout);
    match change {
        RolloutChange::Begin(begin) => Ok(judge_begin(deployment, begin)?),
        RolloutChange::Step(Step { rollout, from, to, evidence, .. }) => {
            let found = running(*rollout)?;
            if found.stage == *to {
                return Ok(Move::AlreadySo(found.staged()));
            }
            goes_on(model, found, *from, evidence)?;
            if !follows(*from, *to) || found.stages.len() >= STEPS_MAX {
                return Err(RolloutError::WrongStep { model: model.clone(), from: *from, to: *to }.into());
            }
            Ok(Move::Append)
        }
        RolloutChange::Promote(Promotion { rollout, from, evidence, .. }) => {
            if let Some(entry) = deployment.ended_so(*rollout, Ending::Promoted) {
                return Ok(Move::AlreadySo(entry));
            }
            let found = running(*rollout)?;
            goes_on(model, found, *from, evidence)?;
            Ok(Move::Append)
        }
        RolloutChange::Hold(Hold { rollout, by, evidence, .. }) => {
            let found = running(*rollout)?;
            fits(model, evidence)?;
            match &found.held {
                Some(held) if held.by == *by && held.reasons == evidence.reasons => {
                    Ok(Move::AlreadySo(held.fact.entry))
                }
                // The judge's reasons must not take the place of a person's.
                Some(held) if held.by == Holder::Person && *by == Holder::Judge => Ok(Move::AlreadySo(held.fact.entry)),
                _ => Ok(Move::Append),
            }
        }
        RolloutChange::Resume(Resume { rollout, .. }) => {
            let found = running(*rollout)?;
            Ok(if found.held.is_some() { Move::Append } else { Move::AlreadySo(found.changed) })
        }
        RolloutChange::Acknowledge(Acknowledge { rollout, features, .. }) => {
            let found = running(*rollout)?;
            let unfit =
                |problem: String| RolloutError::Unfit { model: model.clone(), what: "an acknowledgement", problem };
            let too_long = features.iter().any(|feature| feature.is_empty() || feature.len() > REASON_BYTES_MAX);
            if features.is_empty() || found.acknowledged.len() + features.len() > ACKNOWLEDGED_MAX || too_long {
                return Err(unfit(format!("name 1 to {ACKNOWLEDGED_MAX} features")).into());
            }
            let known = features.iter().map(|feature| found.acknowledged.get(feature).map(|fact| fact.entry));
            Ok(match known.collect::<Option<Vec<_>>>().and_then(|entries| entries.into_iter().max()) {
                Some(entry) => Move::AlreadySo(entry),
                None => Move::Append,
            })
        }
        RolloutChange::End(End { rollout, ending, evidence, .. }) => {
            if let Some(entry) = deployment.ended_so(*rollout, *ending) {
                return Ok(Move::AlreadySo(entry));
            }
            // Going back needs no fresh numbers: it may only be said too often, never too late.
            running(*rollout)?;
            fits(model, evidence)?;
            if !matches!(ending, Ending::Stopped | Ending::RolledBack | Ending::Abandoned | Ending::Expired) {
                let problem = format!("{ending:?} is not how a rollout is ended by itself");
                return Err(RolloutError::Unfit { model: model.clone(), what: "the end", problem }.into());
            }
            Ok(Move::Append)
        }
        RolloutChange::Off(_) | RolloutChange::On(_) if deployment.champion_version() != Some(version) => {
            let (expected, found) = (Some(version), deployment.champion_version());
            Err(DeploymentError::Moved { model: model.clone(), expected, found })
        }
        RolloutChange::Off(_) => Ok(deployment.off.as_ref().map_or(Move::Append, |off| Move::AlreadySo(off.entry))),
        RolloutChange::On(_) => match (&deployment.off, &deployment.champion) {
            (None, Some(champion)) => Ok(Move::AlreadySo(champion.fact.entry)),
            _ => Ok(Move::Append),
        },
    }
}

fn judge_begin(deployment: &Deployment, begin: &Begin) -> Result<Move, RolloutError> {
    let (model, version) = (&begin.model, begin.version);
    let unfit = |what: &'static str, problem: String| RolloutError::Unfit { model: model.clone(), what, problem };
    if let Some(running) = &deployment.rollout {
        let same = running.version == version && running.policy_sha256 == begin.policy_sha256;
        if same && running.traffic == begin.traffic {
            return Ok(Move::AlreadySo(running.begun.entry));
        }
        let how = format!(" because that of version {} does since entry {}", running.version, running.begun.entry);
        return Err(RolloutError::NotRunning { model: model.clone(), rollout: EntryNumber::NONE, how });
    }
    if let Some(off) = &deployment.off {
        return Err(RolloutError::Off { model: model.clone(), since: off.entry });
    }
    let standing = deployment.standing(version);
    if !matches!(standing, Standing::Active | Standing::Previous) {
        return Err(RolloutError::NotActive { model: model.clone(), version, standing });
    }
    if deployment.champion_version() != Some(begin.champion) {
        let found = deployment.champion_version().map_or_else(|| "none".to_owned(), |found| format!("version {found}"));
        return Err(RolloutError::OtherChampion { model: model.clone(), expected: begin.champion, found });
    }
    if begin.policy.trim().is_empty() || begin.policy.len() > POLICY_BYTES_MAX {
        let problem = format!(
            "{} bytes; a rollout without criteria is refused, and one with more than {POLICY_BYTES_MAX}",
            begin.policy.len()
        );
        return Err(unfit("the policy", problem));
    }
    if Sha256::of(begin.policy.as_bytes()) != begin.policy_sha256 {
        return Err(unfit("the policy", "its digest is not that of its text".to_owned()));
    }
    let first = matches!(begin.stage, Stage::Shadow) || follows(Stage::Shadow, begin.stage);
    if !first {
        return Err(RolloutError::WrongStep { model: model.clone(), from: Stage::Shadow, to: begin.stage });
    }
    if begin.traffic.layer.trim().is_empty() || begin.traffic.layer.len() > 256 || begin.traffic.seed.len() > 256 {
        return Err(unfit("the traffic", "a layer and a seed have 1 to 256 bytes".to_owned()));
    }
    check_ranges(&begin.traffic.ranges).map_err(|problem| unfit("the traffic", problem.to_owned()))?;
    fits(model, &begin.evidence)?;
    Ok(Move::Append)
}

/// Another model's rollout in the same layer, with a bucket of the same.
pub(crate) fn buckets_taken(deployments: &BTreeMap<ModelName, Deployment>, begin: &Begin) -> Result<(), RolloutError> {
    for (other, deployment) in deployments.iter().filter(|(other, _)| **other != begin.model) {
        let Some(running) = &deployment.rollout else { continue };
        let ranges = || running.traffic.ranges.iter();
        let overlap = begin.traffic.ranges.iter().any(|mine| ranges().any(|theirs| theirs.overlaps(mine)));
        if running.traffic.layer == begin.traffic.layer && overlap {
            return Err(RolloutError::BucketsTaken { layer: begin.traffic.layer.clone(), other: other.clone() });
        }
    }
    Ok(())
}

/// Whether the rollout may be moved on from a stage by this evidence.
fn goes_on(model: &ModelName, found: &Rollout, from: Stage, evidence: &Evidence) -> Result<(), RolloutError> {
    if found.stage != from {
        return Err(RolloutError::OtherStage { model: model.clone(), expected: from, found: found.stage });
    }
    if let Some(Held { fact, by: Holder::Person, reasons }) = &found.held {
        let (who, reasons) = (fact.who.clone(), fact.why.clone().unwrap_or_else(|| reasons.join("; ")));
        return Err(RolloutError::Held { model: model.clone(), who, since: fact.entry, reasons });
    }
    if evidence.judged_on < found.changed {
        let (judged_on, changed) = (evidence.judged_on, found.changed);
        return Err(RolloutError::Stale { model: model.clone(), judged_on, changed });
    }
    let is_evidence = evidence.numbers.as_object().is_some_and(|numbers| !numbers.is_empty());
    if !is_evidence || evidence.reasons.is_empty() {
        return Err(RolloutError::NoEvidence { model: model.clone() });
    }
    fits(model, evidence)
}

fn follows(from: Stage, to: Stage) -> bool {
    match (from, to) {
        (_, Stage::Shadow) => false,
        (Stage::Shadow, Stage::Canary { step, share }) => step == 0 && (1..=BUCKETS).contains(&share),
        (Stage::Canary { step, share }, Stage::Canary { step: next, share: larger }) => {
            next == step.saturating_add(1) && larger > share && larger <= BUCKETS
        }
    }
}

/// Whether evidence is small enough for the log.
fn fits(model: &ModelName, evidence: &Evidence) -> Result<(), RolloutError> {
    let unfit = |problem: String| RolloutError::Unfit { model: model.clone(), what: "the evidence", problem };
    if evidence.reasons.len() > REASONS_MAX || evidence.reasons.iter().any(|reason| reason.len() > REASON_BYTES_MAX) {
        return Err(unfit(format!("at most {REASONS_MAX} reasons of {REASON_BYTES_MAX} bytes are kept")));
    }
    let bytes = evidence.numbers.to_string().len();
    if bytes > NUMBERS_BYTES_MAX {
        return Err(unfit(format!("its numbers have {bytes} bytes, more than {NUMBERS_BYTES_MAX}")));
    }
    Ok(())
}

/// Folds an entry of a running rollout, or of a switch; none where it has no effect.
pub(crate) fn fold_begin(deployment: &mut Deployment, begin: Begin, fact: Fact) -> Option<()> {
    let begins = deployment.rollout.is_none()
        && deployment.active.contains_key(&begin.version)
        && deployment.champion_version() == Some(begin.champion)
        && begin.champion != begin.version;
    begins.then_some(())?;
    let Begin { version, champion, policy, policy_sha256, traffic, stage, .. } = begin;
    deployment.rollout = Some(Box::new(Rollout {
        version,
        champion,
        changed: fact.entry,
        stages: vec![(stage, fact.clone())],
        begun: fact,
        policy,
        policy_sha256,
        traffic,
        stage,
        held: None,
        acknowledged: BTreeMap::new(),
    }));
    Some(())
}

fn folded(deployment: &mut Deployment, version: ModelVersion, rollout: EntryNumber) -> Option<&mut Rollout> {
    deployment.rollout.as_deref_mut().filter(|found| found.begun.entry == rollout && found.version == version)
}

pub(crate) fn fold_step(deployment: &mut Deployment, step: Step, fact: Fact) -> Option<()> {
    let found = folded(deployment, step.version, step.rollout)?;
    (found.stage == step.from && follows(step.from, step.to) && found.stages.len() < STEPS_MAX).then_some(())?;
    found.stage = step.to;
    found.held = None;
    found.changed = fact.entry;
    found.stages.push((step.to, fact));
    Some(())
}

pub(crate) fn fold_hold(deployment: &mut Deployment, hold: Hold, fact: Fact) -> Option<()> {
    let found = folded(deployment, hold.version, hold.rollout)?;
    found.changed = fact.entry;
    found.held = Some(Held { fact, by: hold.by, reasons: hold.evidence.reasons });
    Some(())
}

pub(crate) fn fold_resume(deployment: &mut Deployment, resume: Resume, fact: Fact) -> Option<()> {
    let found = folded(deployment, resume.version, resume.rollout)?;
    found.held.take()?;
    found.changed = fact.entry;
    Some(())
}

pub(crate) fn fold_acknowledge(deployment: &mut Deployment, acknowledge: Acknowledge, fact: Fact) -> Option<()> {
    let found = folded(deployment, acknowledge.version, acknowledge.rollout)?;
    found.changed = fact.entry;
    for feature in acknowledge.features.into_iter().take(ACKNOWLEDGED_MAX) {
        found.acknowledged.entry(feature).or_insert_with(|| fact.clone());
    }
    Some(())
}

pub(crate) fn fold_end(deployment: &mut Deployment, end: End, fact: Fact) -> Option<()> {
    folded(deployment, end.version, end.rollout)?;
    deployment.end_rollout(end.ending, end.evidence.reasons, &fact);
    Some(())
}

pub(crate) fn fold_off(deployment: &mut Deployment, version: ModelVersion, fact: Fact) -> Option<()> {
    (deployment.champion_version() == Some(version) && deployment.off.is_none()).then_some(())?;
    deployment.end_rollout(Ending::TurnedOff, Vec::new(), &fact);
    deployment.off = Some(fact);
    Some(())
}

pub(crate) fn fold_on(deployment: &mut Deployment, version: ModelVersion) -> Option<()> {
    (deployment.champion_version() == Some(version)).then_some(())?;
    deployment.off.take().map(|_| ())
}

#[cfg(test)]
mod tests;
