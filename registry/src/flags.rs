//! Flags: values that are switched without a deploy, evaluated in microseconds, every change in the log.
//!
//! A flag has variants, each a value of its type, and rules that are tried in order: the first whose condition holds decides, by
//! naming a variant or by splitting units over several. Units are placed as in experiments (`assignment`), so a ramp only adds
//! units and two flags in one layer can be kept apart. Conditions are expressions of the caller's language: here they are text,
//! and whoever evaluates a flag hands over what evaluates them.
//!
//! Names of reasons and error codes are OpenFeature's (specification, 2.2.5 and `error_code`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::assignment::{BUCKETS, Holdout, KeyPart, Ramp, Range, Traffic, check_ranges};
use crate::id::{EntryNumber, FlagName};
use crate::state::Fact;

/// Of one project.
pub const FLAGS_MAX: usize = 1_000;
/// Variants, rules and slices of one flag.
pub const PARTS_MAX: usize = 64;
/// Rules of one project that split units: each takes 20 kB of every process that evaluates.
pub const SPLITS_MAX: usize = 2_000;
/// Of one flag, as JSON.
pub const FLAG_BYTES_MAX: usize = 64 << 10;

/// All flags of a project, and the units that are kept out of all experiments.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Flags {
    pub flags: BTreeMap<FlagName, FlagRecord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<(Holdout, Fact)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlagRecord {
    pub flag: Flag,
    /// What made it as it is.
    pub changed: Fact,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Boolean,
    String,
    Integer,
    Float,
    Object,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flag {
    pub name: FlagName,
    pub kind: Kind,
    pub variants: BTreeMap<String, Value>,
    /// What whoever no rule decides for gets, and everybody while the flag is disabled.
    pub default: String,
    pub enabled: bool,
    #[serde(default)]
    pub rules: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A condition; none holds always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    pub then: Then,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// Everybody gets the variant.
    Variant(String),
    /// Units get variants by where they fall.
    Split(Split),
}

/// Places in an order of a layer's buckets, and who gets them; whoever falls elsewhere is left to the rules that follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    pub layer: String,
    pub seed: String,
    pub slices: Vec<Slice>,
}

/// Places, not buckets: of the order that the seed gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    pub variant: String,
    pub from: u16,
    pub to: u16,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FlagChange {
    Set(SetFlag),
    Remove(RemoveFlag),
    Holdout(Holdout),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetFlag {
    pub flag: Flag,
    /// The entry that made the flag what it was when this change was thought of; none for a new flag.
    pub after: Option<EntryNumber>,
    /// Whether units may lose the variant that a split gave them.
    #[serde(default)]
    pub reshuffle: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveFlag {
    pub name: FlagName,
    pub after: EntryNumber,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FlagError {
    #[error("flag `{flag}` cannot be so: {problem}")]
    Unfit { flag: FlagName, problem: String },
    #[error(
        "flag `{flag}` was changed by {who} with entry {found} of the control log since it was looked at; look at it and decide again"
    )]
    Changed { flag: FlagName, who: String, found: EntryNumber },
    #[error("there is no flag `{flag}`; `coeval flag list` names those there are")]
    Unknown { flag: FlagName },
    #[error(
        "units that have `{variant}` of flag `{flag}` would lose it: a ramp only adds units; say `--reshuffle` if that is meant"
    )]
    LosesUnits { flag: FlagName, variant: String },
    #[error("the project has {FLAGS_MAX} flags, as many as it may; remove one that nobody asks for")]
    TooMany,
    #[error(
        "the flags of the project split units {SPLITS_MAX} times, as often as they may; remove a split that is over"
    )]
    TooManySplits,
    #[error("a holdout of {buckets} of {BUCKETS} buckets cannot be: {problem}")]
    Holdout { buckets: u16, problem: &'static str },
}

impl Flag {
    fn check(&self) -> Result<(), FlagError> {
        let unfit = |problem: String| Err(FlagError::Unfit { flag: self.name.clone(), problem });
        if self.variants.is_empty() || self.variants.len() > PARTS_MAX || self.rules.len() > PARTS_MAX {
            return unfit(format!("it has 1 to {PARTS_MAX} variants and at most {PARTS_MAX} rules"));
        }
        let bytes = serde_json::to_vec(self).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > FLAG_BYTES_MAX {
            return unfit(format!("it has {bytes} bytes, more than {FLAG_BYTES_MAX}"));
        }
        if let Some((variant, value)) = self.variants.iter().find(|(_, value)| !self.kind.holds(value)) {
            return unfit(format!("variant `{variant}` is {value}, which is no {}", self.kind.name()));
        }
        let known = |variant: &String| {
            if self.variants.contains_key(variant) {
                Ok(())
            } else {
                let known: Vec<&str> = self.variants.keys().map(String::as_str).collect();
                unfit(format!("it has no variant `{variant}` (there are: {})", known.join(", ")))
            }
        };
        known(&self.default)?;
        for rule in &self.rules {
            if rule.when.as_ref().is_some_and(|when| when.trim().is_empty()) {
                return unfit("a condition is empty; leave `when` away for a rule that always holds".to_owned());
            }
            match &rule.then {
                Then::Variant(variant) => known(variant)?,
                Then::Split(split) => {
                    split.slices.iter().try_for_each(|slice| known(&slice.variant))?;
                    if let Err(problem) = check_ranges(&split.ranges()) {
                        return unfit(problem.to_owned());
                    }
                }
            }
        }
        Ok(())
    }

    fn splits(&self) -> usize {
        self.rules.iter().filter(|rule| matches!(rule.then, Then::Split(_))).count()
    }

    /// The variant that would lose places if this flag became `next`.
    fn loses(&self, next: &Flag) -> Option<String> {
        let splits = |flag: &Flag| -> Vec<Split> {
            flag.rules
                .iter()
                .filter_map(|rule| if let Then::Split(split) = &rule.then { Some(split.clone()) } else { None })
                .collect()
        };
        let next = splits(next);
        for before in splits(self) {
            let Some(after) = next.iter().find(|next| next.layer == before.layer && next.seed == before.seed) else {
                // The split is gone, with its rule: that is another flag, not a ramp.
                continue;
            };
            for slice in &before.slices {
                let keeps = |place: u16| after.at(place) == Some(slice.variant.as_str());
                if !(slice.from..slice.to).all(keeps) {
                    return Some(slice.variant.clone());
                }
            }
        }
        None
    }
}

impl Kind {
    pub const ALL: [Kind; 5] = [Kind::Boolean, Kind::String, Kind::Integer, Kind::Float, Kind::Object];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Boolean => "boolean",
            Kind::String => "string",
            Kind::Integer => "integer",
            Kind::Float => "float",
            Kind::Object => "object",
        }
    }

    pub fn of_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether a value is of the kind.
    pub fn holds(self, value: &Value) -> bool {
        match self {
            Kind::Boolean => value.is_boolean(),
            Kind::String => value.is_string(),
            Kind::Integer => value.is_i64(),
            Kind::Float => value.is_number(),
            Kind::Object => value.is_object(),
        }
    }
}

impl Split {
    fn ranges(&self) -> Vec<Range> {
        self.slices.iter().map(|slice| Range { from: slice.from, to: slice.to }).collect()
    }

    fn at(&self, place: u16) -> Option<&str> {
        let slice = self.slices.iter().find(|slice| (slice.from..slice.to).contains(&place))?;
        Some(&slice.variant)
    }

    /// Gives a variant a share of 10,000 by adding places that nobody has; none where there are not so many, or where the
    /// variant has more already.
    pub fn ramp(&self, variant: &str, share: u16) -> Option<Split> {
        let mut split = self.clone();
        let has: u16 = self.slices.iter().filter(|slice| slice.variant == variant).map(|s| s.to - s.from).sum();
        let mut missing = share.checked_sub(has)?;
        for place in 0..BUCKETS {
            if missing == 0 {
                break;
            }
            if self.at(place).is_none() {
                missing -= 1;
                match split.slices.iter_mut().find(|slice| slice.variant == variant && slice.to == place) {
                    Some(slice) => slice.to += 1,
                    None => split.slices.push(Slice { variant: variant.to_owned(), from: place, to: place + 1 }),
                }
            }
        }
        (missing == 0).then_some(split)
    }
}

impl Flags {
    /// Whether a change is right; the entry that has made it so already, if one has.
    pub(crate) fn judge(&self, change: &FlagChange) -> Result<Option<EntryNumber>, FlagError> {
        match change {
            FlagChange::Set(SetFlag { flag, after, reshuffle }) => {
                flag.check()?;
                let found = self.flags.get(&flag.name);
                if let Some(record) = found.filter(|record| record.flag == *flag) {
                    return Ok(Some(record.changed.entry));
                }
                self.looked_at(&flag.name, *after)?;
                if found.is_none() && self.flags.len() >= FLAGS_MAX {
                    return Err(FlagError::TooMany);
                }
                let others = self.flags.values().filter(|record| record.flag.name != flag.name);
                let splits = others.map(|record| record.flag.splits()).sum::<usize>();
                if flag.splits() > 0 && splits + flag.splits() > SPLITS_MAX {
                    return Err(FlagError::TooManySplits);
                }
                if !reshuffle && let Some(variant) = found.and_then(|record| record.flag.loses(flag)) {
                    return Err(FlagError::LosesUnits { flag: flag.name.clone(), variant });
                }
                Ok(None)
            }
            FlagChange::Remove(RemoveFlag { name, after }) => {
                if !self.flags.contains_key(name) {
                    return Err(FlagError::Unknown { flag: name.clone() });
                }
                self.looked_at(name, Some(*after)).map(|()| None)
            }
            FlagChange::Holdout(holdout) => {
                let refused = |problem| FlagError::Holdout { buckets: holdout.buckets, problem };
                match &self.holdout {
                    Some((known, fact)) if known == holdout => Ok(Some(fact.entry)),
                    // Units would be taken out of experiments and others put in.
                    Some((known, _)) if known.salt != holdout.salt => {
                        Err(refused("the salt of a holdout never changes"))
                    }
                    _ if holdout.buckets > BUCKETS / 2 => Err(refused("it leaves less than half to experiment with")),
                    _ => Ok(None),
                }
            }
        }
    }

    fn looked_at(&self, name: &FlagName, after: Option<EntryNumber>) -> Result<(), FlagError> {
        match self.flags.get(name) {
            Some(record) if after != Some(record.changed.entry) => {
                let (who, found) = (record.changed.who.clone(), record.changed.entry);
                Err(FlagError::Changed { flag: name.clone(), who, found })
            }
            None if after.is_some() => Err(FlagError::Unknown { flag: name.clone() }),
            _ => Ok(()),
        }
    }

    pub(crate) fn fold_set(&mut self, set: SetFlag, fact: Fact) -> Option<()> {
        (self.flags.contains_key(&set.flag.name) || self.flags.len() < FLAGS_MAX).then_some(())?;
        self.flags.insert(set.flag.name.clone(), FlagRecord { flag: set.flag, changed: fact });
        Some(())
    }

    pub(crate) fn fold_remove(&mut self, remove: &RemoveFlag) -> Option<()> {
        self.flags.remove(&remove.name).map(|_| ())
    }

    pub(crate) fn fold_holdout(&mut self, holdout: Holdout, fact: Fact) -> Option<()> {
        self.holdout = Some((holdout, fact));
        Some(())
    }
}

impl Reason {
    pub const ALL: [Reason; 5] =
        [Reason::TargetingMatch, Reason::Split, Reason::Default, Reason::Disabled, Reason::Error];

    /// As OpenFeature writes it.
    pub fn name(self) -> &'static str {
        match self {
            Reason::TargetingMatch => "TARGETING_MATCH",
            Reason::Split => "SPLIT",
            Reason::Default => "DEFAULT",
            Reason::Disabled => "DISABLED",
            Reason::Error => "ERROR",
        }
    }
}

impl ErrorCode {
    /// As OpenFeature writes it.
    pub fn name(self) -> &'static str {
        match self {
            ErrorCode::FlagNotFound => "FLAG_NOT_FOUND",
            ErrorCode::ParseError => "PARSE_ERROR",
            ErrorCode::TypeMismatch => "TYPE_MISMATCH",
            ErrorCode::TargetingKeyMissing => "TARGETING_KEY_MISSING",
            ErrorCode::General => "GENERAL",
        }
    }
}

/// Why a value is what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Reason {
    /// A rule whose condition holds.
    TargetingMatch,
    /// By where the unit falls.
    Split,
    /// No rule decided.
    Default,
    Disabled,
    Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    FlagNotFound,
    /// The condition could not be evaluated.
    ParseError,
    /// The flag is of another type than was asked for.
    TypeMismatch,
    /// A split needs the unit, and none was given.
    TargetingKeyMissing,
    General,
}

/// The answer to one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation<'a> {
    /// None after an error: whoever asks has a default of its own.
    pub value: Option<&'a Value>,
    pub variant: Option<&'a str>,
    pub reason: Reason,
    pub error: Option<(ErrorCode, String)>,
    /// The entry of the control log that made the flag so.
    pub entry: Option<EntryNumber>,
}

/// A flag, ready to be asked.
#[derive(Debug, Clone)]
pub struct CompiledFlag {
    record: FlagRecord,
    /// By rule, for those that split.
    ramps: Vec<Option<Ramp>>,
}

impl CompiledFlag {
    pub fn new(record: &FlagRecord, holdout: Option<&Holdout>) -> CompiledFlag {
        let ramp = |rule: &Rule| match &rule.then {
            Then::Variant(_) => None,
            Then::Split(Split { layer, seed, .. }) => {
                let traffic = Traffic { layer: layer.clone(), seed: seed.clone(), ranges: vec![Range::ALL] };
                Some(Ramp::new(&traffic, holdout))
            }
        };
        CompiledFlag { record: record.clone(), ramps: record.flag.rules.iter().map(ramp).collect() }
    }

    pub fn record(&self) -> &FlagRecord {
        &self.record
    }

    /// What a unit gets. `holds` evaluates a condition; a condition that cannot be evaluated decides nothing and is told.
    pub fn evaluate(
        &self,
        kind: Kind,
        unit: Option<&[KeyPart<'_>]>,
        mut holds: impl FnMut(&str) -> Result<bool, String>,
    ) -> Evaluation<'_> {
        let flag = &self.record.flag;
        let entry = Some(self.record.changed.entry);
        let failed = |code: ErrorCode, text: String| Evaluation {
            value: None,
            variant: None,
            reason: Reason::Error,
            error: Some((code, text)),
            entry,
        };
        // An integer is a float too.
        if flag.kind != kind && !(flag.kind == Kind::Integer && kind == Kind::Float) {
            let text = format!("flag `{}` is of type {}, not {}", flag.name, flag.kind.name(), kind.name());
            return failed(ErrorCode::TypeMismatch, text);
        }
        let answer = |variant: &str, reason: Reason| match flag.variants.get_key_value(variant) {
            Some((variant, value)) => {
                Evaluation { value: Some(value), variant: Some(variant), reason, error: None, entry }
            }
            None => failed(ErrorCode::General, format!("flag `{}` has no variant `{variant}`", flag.name)),
        };
        if !flag.enabled {
            return answer(&flag.default, Reason::Disabled);
        }
        for (rule, ramp) in flag.rules.iter().zip(&self.ramps) {
            if let Some(when) = &rule.when {
                match holds(when) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(error) => return failed(ErrorCode::ParseError, format!("`{when}`: {error}")),
                }
            }
            match (&rule.then, ramp) {
                (Then::Variant(variant), _) if rule.when.is_some() => return answer(variant, Reason::TargetingMatch),
                (Then::Variant(variant), _) => return answer(variant, Reason::Default),
                (Then::Split(split), Some(ramp)) => {
                    let Some(unit) = unit else {
                        let text = format!("flag `{}` splits units, and the question names none", flag.name);
                        return failed(ErrorCode::TargetingKeyMissing, text);
                    };
                    if let Some(variant) = ramp.place_of(unit).and_then(|place| split.at(place)) {
                        return answer(variant, Reason::Split);
                    }
                }
                (Then::Split(_), None) => {}
            }
        }
        answer(&flag.default, Reason::Default)
    }
}

#[cfg(test)]
mod tests;
