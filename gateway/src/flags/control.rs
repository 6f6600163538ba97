//! Changes of flags, and what there is: the registry judges, this checks conditions and speaks the protocol. A command without
//! a server does the same over a registry of its own.

use std::sync::Arc;

use chrono::SecondsFormat;
use proto::v1;
use registry::assignment::{BUCKETS, Holdout};
use registry::flags::{Flag, FlagChange, FlagError, FlagRecord, Flags, RemoveFlag, SetFlag};
use registry::id::{EntryNumber, FlagName, NameError, ProjectName, Salt};
use registry::log::Entry;
use registry::state::{Change, Fact, Refusal, flag_change_of};
use registry::{Outcome, Receipt, Registry, RegistryError};

use super::condition::{Condition, ConditionError};
use super::{ServedFlags, exposures};
use crate::answer::Gateway;
use crate::follow::Retry;
use crate::status::{Failure, Kind};

const TEXT_BYTES_MAX: usize = 64 << 10;
/// Changes of one answer, and what is asked for without a number.
const CHANGES_MAX: usize = 1_000;
/// Entries that are looked through for a flag that is no more.
const ENTRIES_MAX: usize = 20_000;
const ENTRIES_AT_ONCE: usize = 256;

/// Makes a flag what the request says.
pub async fn set(
    registry: &Registry,
    project: &ProjectName,
    request: &v1::SetFlagRequest,
) -> Result<v1::SetFlagResponse, Failure> {
    let flag = read(&request.flag)?;
    let conditions = flag.clone();
    let attributes = tokio::task::spawn_blocking(move || attributes(&conditions, &ServedFlags::default())).await;
    let attributes = attributes.map_err(|error| Failure::internal("the conditions could not be compiled", &error))?;
    let attributes = attributes.map_err(|error| Failure::invalid(error.to_string()))?;
    let after = Some(EntryNumber(request.after)).filter(|after| *after != EntryNumber::NONE);
    let change = FlagChange::Set(SetFlag { flag, after, reshuffle: request.reshuffle });
    let receipt = submit(registry, project, change, &request.who, &request.why).await?;
    let existed = receipt.outcome == Outcome::AlreadySo;
    Ok(v1::SetFlagResponse { control_entry: receipt.entry.0, existed, attributes })
}

pub async fn remove(
    registry: &Registry,
    project: &ProjectName,
    request: &v1::RemoveFlagRequest,
) -> Result<v1::RemoveFlagResponse, Failure> {
    let change = RemoveFlag { name: named(&request.name)?, after: EntryNumber(request.after) };
    let receipt = submit(registry, project, FlagChange::Remove(change), &request.who, &request.why).await?;
    Ok(v1::RemoveFlagResponse { control_entry: receipt.entry.0 })
}

pub async fn set_holdout(
    registry: &Registry,
    project: &ProjectName,
    request: &v1::SetHoldoutRequest,
) -> Result<v1::SetHoldoutResponse, Failure> {
    let buckets = u16::try_from(request.buckets).ok().filter(|buckets| *buckets <= BUCKETS).ok_or_else(|| {
        Failure::invalid(format!("a holdout of {} of {BUCKETS} buckets; name at most all", request.buckets))
    })?;
    // Once more when somebody else chose the salt at the same moment.
    for _ in 0..2 {
        let state = registry.refresh().await?;
        let known = state.project(project.as_str()).and_then(|known| known.flags.holdout.as_ref());
        let salt = known.map_or_else(Salt::random, |(holdout, _)| holdout.salt.clone());
        let change = FlagChange::Holdout(Holdout { salt, buckets });
        match submit(registry, project, change, &request.who, &request.why).await {
            Ok(receipt) => {
                let existed = receipt.outcome == Outcome::AlreadySo;
                return Ok(v1::SetHoldoutResponse { control_entry: receipt.entry.0, existed });
            }
            Err(failure) if known.is_some() => return Err(failure),
            Err(failure) => {
                let state = registry.state();
                let now = state.project(project.as_str()).and_then(|known| known.flags.holdout.as_ref());
                if now.is_none() {
                    return Err(failure);
                }
            }
        }
    }
    Err(Failure::new(Kind::Precondition, "somebody else is changing the holdout; look at it and decide again"))
}

/// The flags as the fold has them. What `served` has compiled is not compiled again.
pub fn list(
    registry: &Registry,
    project: &ProjectName,
    request: &v1::ListFlagsRequest,
    served: &ServedFlags,
) -> Result<v1::ListFlagsResponse, Failure> {
    let state = registry.state();
    let none = Flags::default();
    let flags = state.project(project.as_str()).map_or(&none, |known| &known.flags);
    let known = || flags.flags.keys().map(FlagName::as_str);
    let mut found: Vec<&FlagRecord> = Vec::new();
    if request.names.is_empty() {
        found.extend(flags.flags.values());
    }
    for name in &request.names {
        let record = flags.flags.get(name.as_str());
        found.push(record.ok_or_else(|| Failure::unknown("flag", name, known()))?);
    }
    let holdout = flags.holdout.as_ref().map(|(holdout, fact)| v1::HoldoutInfo {
        buckets: holdout.buckets.into(),
        entry: fact.entry.0,
        who: fact.who.clone(),
        why: fact.why.clone().unwrap_or_default(),
        at: at(fact),
    });
    let flags = found.into_iter().map(|record| info(record, served)).collect::<Result<_, _>>()?;
    Ok(v1::ListFlagsResponse { flags, holdout, control_head: state.head.0 })
}

/// What became of a flag, the newest first. Each change names the one before it; for a flag that is no more the log is looked
/// through.
pub async fn history(
    registry: &Registry,
    project: &ProjectName,
    request: &v1::GetFlagHistoryRequest,
) -> Result<v1::GetFlagHistoryResponse, Failure> {
    let name = named(&request.name)?;
    let most = match usize::try_from(request.changes_max).unwrap_or(CHANGES_MAX) {
        0 => CHANGES_MAX,
        asked => asked.min(CHANGES_MAX),
    };
    let state = registry.refresh().await?;
    let record = state.project(project.as_str()).and_then(|known| known.flags.flags.get(&name));
    let Some(record) = record else { return removed(registry, project, &name, state.head, most).await };
    let mut next = Some(record.changed.entry);
    let mut changes = Vec::new();
    while let Some(number) = next
        && changes.len() < most
    {
        let entry = registry.log().read(number).await.map_err(RegistryError::from)?;
        let Some((change, after)) = entry.as_ref().and_then(|entry| change_of(entry, project, &name)) else { break };
        changes.push(change);
        next = after;
    }
    Ok(v1::GetFlagHistoryResponse { truncated: next.is_some(), changes })
}

async fn removed(
    registry: &Registry,
    project: &ProjectName,
    name: &FlagName,
    head: EntryNumber,
    most: usize,
) -> Result<v1::GetFlagHistoryResponse, Failure> {
    let first = EntryNumber(head.0.saturating_sub(ENTRIES_MAX as u64).max(EntryNumber::FIRST.0));
    let (mut changes, mut next) = (Vec::new(), first);
    loop {
        let entries = registry.history(next, ENTRIES_AT_ONCE).await?;
        let Some(last) = entries.last() else { break };
        next = last.number.next();
        changes.extend(entries.iter().filter_map(|entry| Some(change_of(entry, project, name)?.0)));
        if next > head {
            break;
        }
    }
    if changes.is_empty() {
        let refusal = Refusal::Flag(FlagError::Unknown { flag: name.clone() });
        return Err(RegistryError::Refused(refusal).into());
    }
    changes.reverse();
    let truncated = changes.len() > most || first > EntryNumber::FIRST;
    changes.truncate(most);
    Ok(v1::GetFlagHistoryResponse { changes, truncated })
}

/// What an entry did to a flag, and the entry that made it what it was before.
fn change_of(entry: &Entry, project: &ProjectName, name: &FlagName) -> Option<(v1::FlagChange, Option<EntryNumber>)> {
    let (flag, after) = match flag_change_of(entry).ok()?? {
        FlagChange::Set(set) if set.flag.name == *name => (serde_json::to_string(&set.flag).ok()?, set.after),
        FlagChange::Remove(remove) if remove.name == *name => (String::new(), Some(remove.after)),
        _ => return None,
    };
    (entry.project == *project).then(|| {
        let change = v1::FlagChange {
            entry: entry.number.0,
            at: entry.at.to_rfc3339_opts(SecondsFormat::Secs, true),
            who: entry.who.clone(),
            why: entry.why.clone().unwrap_or_default(),
            flag,
        };
        (change, after)
    })
}

fn at(fact: &Fact) -> String {
    fact.at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn info(record: &FlagRecord, served: &ServedFlags) -> Result<v1::FlagInfo, Failure> {
    let flag = serde_json::to_string(&record.flag)
        .map_err(|error| Failure::internal("a flag cannot be written as JSON", &error))?;
    let (attributes, problems) = match attributes(&record.flag, served) {
        Ok(attributes) => (attributes, Vec::new()),
        Err(problem) => (Vec::new(), vec![problem.to_string()]),
    };
    let Fact { entry, who, why, .. } = &record.changed;
    let (who, why) = (who.clone(), why.clone().unwrap_or_default());
    Ok(v1::FlagInfo { flag, entry: entry.0, who, why, at: at(&record.changed), attributes, problems })
}

/// A flag as it is sent.
pub fn read(text: &str) -> Result<Flag, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::invalid(format!("the flag cannot be read: {error}")))
}

/// What the conditions of a flag read, or the first one that is none.
pub fn attributes(flag: &Flag, served: &ServedFlags) -> Result<Vec<v1::FlagAttribute>, ConditionError> {
    let mut found: Vec<v1::FlagAttribute> = Vec::new();
    for text in flag.rules.iter().filter_map(|rule| rule.when.as_deref()) {
        let condition = match served.condition(text) {
            Some(condition) => condition,
            None => Arc::new(Condition::compile(text)?),
        };
        for (name, types) in condition.attributes() {
            let types = types.into_iter().map(str::to_owned);
            match found.iter_mut().find(|known| known.name == name) {
                // Two conditions of a flag may want different things of one attribute.
                Some(known) => types.for_each(|value_type| {
                    if !known.types.contains(&value_type) {
                        known.types.push(value_type);
                    }
                }),
                None => found.push(v1::FlagAttribute { name, types: types.collect() }),
            }
        }
    }
    Ok(found)
}

fn named(name: &str) -> Result<FlagName, Failure> {
    name.parse().map_err(|error: NameError| Failure::invalid(error.to_string()))
}

async fn submit(
    registry: &Registry,
    project: &ProjectName,
    change: FlagChange,
    who: &str,
    why: &str,
) -> Result<Receipt, Failure> {
    if who.trim().is_empty() || why.trim().is_empty() {
        return Err(Failure::invalid("a change of flags says who makes it and why: fill in `who` and `why`"));
    }
    if who.len() > TEXT_BYTES_MAX || why.len() > TEXT_BYTES_MAX {
        return Err(Failure::invalid(format!("`who` and `why` take at most {TEXT_BYTES_MAX} bytes")));
    }
    Ok(registry.submit(project, &Change::Flags(change), who, Some(why)).await?)
}

/// The calls of the Control service.
impl Gateway {
    /// What was changed through this gateway is served by it when the call returns.
    async fn changed<T>(self: &Arc<Self>, answer: Result<T, Failure>) -> Result<T, Failure> {
        if answer.is_ok() {
            self.follower.follow(Retry::Later).await;
        }
        answer
    }

    pub async fn set_flag(self: &Arc<Self>, request: &v1::SetFlagRequest) -> Result<v1::SetFlagResponse, Failure> {
        self.check_project(&request.project)?;
        self.changed(set(&self.registry, &self.project, request).await).await
    }

    pub async fn remove_flag(
        self: &Arc<Self>,
        request: &v1::RemoveFlagRequest,
    ) -> Result<v1::RemoveFlagResponse, Failure> {
        self.check_project(&request.project)?;
        self.changed(remove(&self.registry, &self.project, request).await).await
    }

    pub async fn set_holdout(
        self: &Arc<Self>,
        request: &v1::SetHoldoutRequest,
    ) -> Result<v1::SetHoldoutResponse, Failure> {
        self.check_project(&request.project)?;
        self.changed(set_holdout(&self.registry, &self.project, request).await).await
    }

    pub async fn list_flags(&self, request: v1::ListFlagsRequest) -> Result<v1::ListFlagsResponse, Failure> {
        self.check_project(&request.project)?;
        let (registry, project) = (self.registry.clone(), self.project.clone());
        let served = self.served().flags.clone();
        // Conditions that are not served yet are compiled, to say what they read.
        let listed = tokio::task::spawn_blocking(move || list(&registry, &project, &request, &served)).await;
        listed.unwrap_or_else(|error| Err(Failure::internal("the flags could not be listed", &error)))
    }

    pub async fn flag_history(
        &self,
        request: &v1::GetFlagHistoryRequest,
    ) -> Result<v1::GetFlagHistoryResponse, Failure> {
        self.check_project(&request.project)?;
        history(&self.registry, &self.project, request).await
    }

    pub async fn flag_exposures(
        &self,
        request: &v1::GetFlagExposuresRequest,
    ) -> Result<v1::GetFlagExposuresResponse, Failure> {
        self.check_project(&request.project)?;
        named(&request.name)?;
        let Some(exposures) = &self.exposures else {
            return Err(Failure::new(Kind::Unsupported, "this server keeps no exposures"));
        };
        // What was seen here until now is part of the answer.
        if let Err(why) = exposures.flush((self.clock)()).await {
            return Err(Failure::new(Kind::Unavailable, format!("exposures cannot be written: {why}")));
        }
        let v1::GetFlagExposuresRequest { name, from, to, .. } = request;
        let report = exposures.report(name, *from, *to).await.map_err(|error| match &error {
            exposures::ReadError::TooMuch { .. } | exposures::ReadError::Time => Failure::invalid(error.to_string()),
            exposures::ReadError::Store(_) => Failure::unavailable("the exposures cannot be read", &error),
        })?;
        let report = serde_json::to_string(&report)
            .map_err(|error| Failure::internal("the report cannot be written as JSON", &error))?;
        Ok(v1::GetFlagExposuresResponse { report })
    }
}
