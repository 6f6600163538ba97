//! Versions between registered and retired, and which of them answers.
//!
//! Being on the gateways and having the traffic are two things. A version is prepared, which every live gateway does for
//! itself, and then active or given up; active versions answer requests that name them. One of them is the champion, which
//! answers all others, and the one before it is kept for rollback. Who decides when is not this module's business: here
//! are the rules of what may follow what.

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{EntryNumber, Incarnation, ModelName, ModelVersion};
use crate::rollout::{Ended, Ending, Rollout, RolloutChange, RolloutError};
use crate::state::Fact;

/// What the log says of the versions of one model that are on gateways, or are to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// None until a version is active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub champion: Option<Champion>,
    /// Versions that answer requests which name them, with what made them active. The champion and the one before it are
    /// among them.
    #[serde(default)]
    pub active: BTreeMap<ModelVersion, Fact>,
    #[serde(default)]
    pub preparing: BTreeMap<ModelVersion, Preparing>,
    /// Why the last attempt at a version came to nothing, until the next one.
    #[serde(default)]
    pub given_up: BTreeMap<ModelVersion, GivenUp>,
    /// What is being tried out, at most one version at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Box<Rollout>>,
    /// What was tried before, the latest last; a few.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<Ended>,
    /// Set while no version answers but the declared fallback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub off: Option<Fact>,
}

/// The version that answers requests which name none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Champion {
    pub version: ModelVersion,
    /// The champion before, kept for rollback.
    pub previous: Option<ModelVersion>,
    /// What moved the traffic here.
    pub fact: Fact,
}

/// A version that gateways are loading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preparing {
    pub fact: Fact,
    /// The gateway that was asked, and will say how it ended.
    pub by: Incarnation,
}

/// A deploy that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    pub fact: Fact,
    /// By gateway.
    pub reasons: BTreeMap<Incarnation, String>,
}

/// How far a version has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Registered,
    Preparing,
    Active,
    Previous,
    Champion,
}

impl Standing {
    pub fn name(self) -> &'static str {
        match self {
            Standing::Registered => "registered",
            Standing::Preparing => "preparing",
            Standing::Active => "active",
            Standing::Previous => "previous",
            Standing::Champion => "champion",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Why a version cannot go where it was to go.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeploymentError {
    #[error(
        "version {version} of model `{model}` is being prepared since entry {since} of the control log, for gateway {by}; wait \
         for its end"
    )]
    BeingPrepared { model: ModelName, version: ModelVersion, since: EntryNumber, by: Incarnation },
    #[error("the deploy of version {version} of model `{model}` that began with entry {prepare} has ended: {how}")]
    Ended { model: ModelName, version: ModelVersion, prepare: EntryNumber, how: String },
    #[error(
        "version {version} of model `{model}` is {standing}, not active; deploy it first: `coeval model deploy {model} {version}`"
    )]
    NotActive { model: ModelName, version: ModelVersion, standing: Standing },
    #[error("the champion of model `{model}` is {found} and not {expected} any more: somebody else moved the traffic; look at `coeval model list` and decide again", found = shown(.found), expected = shown(.expected))]
    Moved { model: ModelName, expected: Option<ModelVersion>, found: Option<ModelVersion> },
    #[error(
        "model `{model}` has no previous champion to go back to; name a version: `coeval rollout promote {model} VERSION`"
    )]
    NoPrevious { model: ModelName },
    #[error(
        "version {version} of model `{model}` is the champion: all requests go to it; promote another version first"
    )]
    IsChampion { model: ModelName, version: ModelVersion },
    #[error("version {version} of model `{model}` is what a rollback goes back to; say `--force` to give that up")]
    IsPrevious { model: ModelName, version: ModelVersion },
    #[error(
        "version {tried} of model `{model}` is being rolled out since entry {since} of the control log, and goes on or ends by its criteria; end it first: `coeval rollout rollback {model}`"
    )]
    BeingRolledOut { model: ModelName, tried: ModelVersion, since: EntryNumber },
    #[error(transparent)]
    Rollout(#[from] RolloutError),
}

fn shown(version: &Option<ModelVersion>) -> String {
    version.map_or_else(|| "no version".to_owned(), |version| format!("version {version}"))
}

/// A change to what is on the gateways, or to who answers.
#[derive(Debug, Clone, PartialEq)]
pub enum DeploymentChange {
    Prepare(Prepare),
    Activate(Activate),
    GiveUp(GiveUp),
    /// `from` is the champion that the change was judged on.
    Promote {
        model: ModelName,
        version: ModelVersion,
        from: Option<ModelVersion>,
    },
    /// Back to the champion before; both are as the change was judged on.
    Rollback {
        model: ModelName,
        from: ModelVersion,
        to: ModelVersion,
    },
    Retire {
        model: ModelName,
        version: ModelVersion,
        previous_too: bool,
    },
    /// Somebody says that the version may be served.
    Approve {
        model: ModelName,
        version: ModelVersion,
    },
    /// By criteria, or by hand.
    Rollout(RolloutChange),
}

impl DeploymentChange {
    pub fn model(&self) -> &ModelName {
        match self {
            Self::Prepare(Prepare { model, .. })
            | Self::Activate(Activate { model, .. })
            | Self::GiveUp(GiveUp { model, .. })
            | Self::Promote { model, .. }
            | Self::Rollback { model, .. }
            | Self::Retire { model, .. }
            | Self::Approve { model, .. } => model,
            Self::Rollout(change) => change.model(),
        }
    }

    pub fn version(&self) -> ModelVersion {
        match self {
            Self::Prepare(Prepare { version, .. })
            | Self::Activate(Activate { version, .. })
            | Self::GiveUp(GiveUp { version, .. })
            | Self::Promote { version, .. }
            | Self::Rollback { to: version, .. }
            | Self::Retire { version, .. }
            | Self::Approve { version, .. } => *version,
            Self::Rollout(change) => change.version(),
        }
    }
}

/// Every live gateway is to load a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    pub model: ModelName,
    pub version: ModelVersion,
    pub by: Incarnation,
}

/// Every live gateway has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activate {
    pub model: ModelName,
    pub version: ModelVersion,
    /// The entry that began it: an end that comes late must not end a later attempt.
    pub prepare: EntryNumber,
}

/// Some gateway could not, or did not say so in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GiveUp {
    pub model: ModelName,
    pub version: ModelVersion,
    pub prepare: EntryNumber,
    pub reasons: BTreeMap<Incarnation, String>,
}

/// A model and a version of it: the whole of several kinds of entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    pub model: ModelName,
    pub version: ModelVersion,
}

/// What a change that is right comes to.
pub(crate) enum Move {
    AlreadySo(EntryNumber),
    Append,
}

impl Deployment {
    pub fn standing(&self, version: ModelVersion) -> Standing {
        match &self.champion {
            Some(champion) if champion.version == version => Standing::Champion,
            Some(champion) if champion.previous == Some(version) => Standing::Previous,
            _ if self.active.contains_key(&version) => Standing::Active,
            _ if self.preparing.contains_key(&version) => Standing::Preparing,
            _ => Standing::Registered,
        }
    }

    pub fn champion_version(&self) -> Option<ModelVersion> {
        self.champion.as_ref().map(|champion| champion.version)
    }

    pub fn previous_version(&self) -> Option<ModelVersion> {
        self.champion.as_ref()?.previous
    }

    /// The versions that gateways are to have, with the entry that says so.
    pub fn wanted(&self) -> impl Iterator<Item = (ModelVersion, EntryNumber)> {
        let active = self.active.iter().map(|(version, fact)| (*version, fact.entry));
        let preparing = self.preparing.iter().map(|(version, preparing)| (*version, preparing.fact.entry));
        active.chain(preparing)
    }

    /// Whether a change may follow on this.
    pub(crate) fn judge(&self, change: &DeploymentChange) -> Result<Move, DeploymentError> {
        let (model, version) = (change.model().clone(), change.version());
        let not_active = |standing| DeploymentError::NotActive { model: model.clone(), version, standing };
        match change {
            DeploymentChange::Prepare(_) => {
                if let Some(fact) = self.active.get(&version) {
                    return Ok(Move::AlreadySo(fact.entry));
                }
                match self.preparing.get(&version) {
                    Some(Preparing { fact, by }) => {
                        Err(DeploymentError::BeingPrepared { model, version, since: fact.entry, by: by.clone() })
                    }
                    None => Ok(Move::Append),
                }
            }
            DeploymentChange::Activate(Activate { prepare, .. }) => self.judge_end(&model, version, *prepare),
            DeploymentChange::GiveUp(GiveUp { prepare, .. }) => match self.given_up.get(&version) {
                Some(given_up) if !self.preparing.contains_key(&version) => Ok(Move::AlreadySo(given_up.fact.entry)),
                _ => self.judge_end(&model, version, *prepare),
            },
            DeploymentChange::Promote { from, .. } => match &self.champion {
                Some(champion) if champion.version == version && self.off.is_none() => {
                    Ok(Move::AlreadySo(champion.fact.entry))
                }
                _ if !self.active.contains_key(&version) => Err(not_active(self.standing(version))),
                _ if self.champion_version() != *from => {
                    Err(DeploymentError::Moved { model, expected: *from, found: self.champion_version() })
                }
                _ => self.unless_tried(model, None).map(|()| Move::Append),
            },
            DeploymentChange::Rollback { from, .. } => match &self.champion {
                // Somebody else went back at the same time.
                Some(champion) if champion.version == version => Ok(Move::AlreadySo(champion.fact.entry)),
                Some(champion) if champion.version == *from && champion.previous == Some(version) => Ok(Move::Append),
                _ => Err(DeploymentError::Moved { model, expected: Some(*from), found: self.champion_version() }),
            },
            DeploymentChange::Retire { previous_too, .. } => match self.standing(version) {
                Standing::Champion => Err(DeploymentError::IsChampion { model, version }),
                Standing::Previous if !previous_too => Err(DeploymentError::IsPrevious { model, version }),
                Standing::Previous | Standing::Active => self.unless_tried(model, Some(version)).map(|()| Move::Append),
                standing => Err(not_active(standing)),
            },
            DeploymentChange::Approve { .. } => Ok(Move::Append),
            DeploymentChange::Rollout(change) => crate::rollout::judge(self, change),
        }
    }

    /// Refuses while a rollout runs: of that version, or of any.
    fn unless_tried(&self, model: ModelName, version: Option<ModelVersion>) -> Result<(), DeploymentError> {
        match &self.rollout {
            Some(rollout) if version.is_none_or(|version| version == rollout.version) => {
                Err(DeploymentError::BeingRolledOut { model, tried: rollout.version, since: rollout.begun.entry })
            }
            _ => Ok(()),
        }
    }

    fn judge_end(
        &self,
        model: &ModelName,
        version: ModelVersion,
        prepare: EntryNumber,
    ) -> Result<Move, DeploymentError> {
        if self.preparing.get(&version).is_some_and(|preparing| preparing.fact.entry == prepare) {
            return Ok(Move::Append);
        }
        let how = match (self.active.get(&version), self.given_up.get(&version)) {
            (Some(fact), _) => format!("it is active since entry {}", fact.entry),
            (None, Some(given_up)) => {
                format!("it was given up with entry {}{}", given_up.fact.entry, given_up.listed())
            }
            (None, None) => "another one has begun".to_owned(),
        };
        Err(DeploymentError::Ended { model: model.clone(), version, prepare, how })
    }

    /// An entry of older logs: the version answers, and the one before it is kept. Others were on no gateway.
    pub(crate) fn fold_deploy(&mut self, version: ModelVersion, fact: Fact) {
        let previous = match &self.champion {
            Some(champion) if champion.version == version => champion.previous,
            Some(champion) => Some(champion.version),
            None => None,
        };
        self.active.entry(version).or_insert_with(|| fact.clone());
        self.active.retain(|other, _| *other == version || Some(*other) == previous);
        self.champion = Some(Champion { version, previous, fact });
    }

    pub(crate) fn fold_prepare(&mut self, Prepare { version, by, .. }: Prepare, fact: Fact) -> Option<()> {
        if self.active.contains_key(&version) || self.preparing.contains_key(&version) {
            return None;
        }
        self.given_up.remove(&version);
        self.preparing.insert(version, Preparing { fact, by });
        Some(())
    }

    fn end(&mut self, version: ModelVersion, prepare: EntryNumber) -> Option<()> {
        (self.preparing.get(&version)?.fact.entry == prepare).then_some(())?;
        self.preparing.remove(&version).map(|_| ())
    }

    pub(crate) fn fold_activate(&mut self, Activate { version, prepare, .. }: Activate, fact: Fact) -> Option<()> {
        self.end(version, prepare)?;
        // There is no traffic yet that could be moved.
        self.champion.get_or_insert_with(|| Champion { version, previous: None, fact: fact.clone() });
        self.active.insert(version, fact);
        Some(())
    }

    pub(crate) fn fold_give_up(&mut self, GiveUp { version, prepare, reasons, .. }: GiveUp, fact: Fact) -> Option<()> {
        self.end(version, prepare)?;
        self.given_up.insert(version, GivenUp { fact, reasons });
        Some(())
    }

    pub(crate) fn fold_promote(&mut self, version: ModelVersion, reasons: Vec<String>, fact: Fact) -> Option<()> {
        let before = self.champion_version();
        let is_so = before == Some(version) && self.off.is_none();
        (self.active.contains_key(&version) && !is_so).then_some(())?;
        if let Some(rollout) = &self.rollout {
            let ending = if rollout.version == version { Ending::Promoted } else { Ending::Superseded };
            self.end_rollout(ending, reasons, &fact);
        }
        self.off = None;
        // A champion that comes back from being off has the same version behind it.
        let previous = if before == Some(version) { self.previous_version() } else { before };
        self.champion = Some(Champion { version, previous, fact });
        Some(())
    }

    pub(crate) fn fold_rollback(&mut self, version: ModelVersion, fact: Fact) -> Option<()> {
        (self.previous_version() == Some(version)).then_some(())?;
        // It was compared with a champion that is none any more.
        self.end_rollout(Ending::Superseded, Vec::new(), &fact);
        self.off = None;
        // What was left is no place to go back to.
        self.champion = Some(Champion { version, previous: None, fact });
        Some(())
    }

    pub(crate) fn fold_retire(&mut self, version: ModelVersion) -> Option<()> {
        let is_tried = self.rollout.as_ref().is_some_and(|rollout| rollout.version == version);
        (self.champion_version() != Some(version) && !is_tried).then_some(())?;
        self.active.remove(&version)?;
        if let Some(champion) = &mut self.champion
            && champion.previous == Some(version)
        {
            champion.previous = None;
        }
        Some(())
    }
}

impl Champion {
    /// Until when the champion before is kept on the gateways for a rollback, unless somebody retires it.
    pub fn previous_kept_until(&self, keep: TimeDelta) -> Option<DateTime<Utc>> {
        self.previous.and_then(|_| self.fact.at.checked_add_signed(keep))
    }
}

impl GivenUp {
    /// ` (gateway: reason; ...)`, for messages.
    fn listed(&self) -> String {
        let reasons: Vec<String> =
            self.reasons.iter().map(|(gateway, reason)| format!("{gateway}: {reason}")).collect();
        if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) }
    }
}
