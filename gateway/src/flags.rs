//! Feature flags as they are served.
//!
//! - [`condition`]: conditions of rules, compiled once by the definitions' own compiler, over attributes without a schema.
//! - This module: the flags of the control log, compiled, and what a unit gets. They are part of what is served (`follow`): a change
//!   compiles what it touches and leaves the rest.
//! - [`exposures`]: which unit was given which variant by a split, written down at use.
//! - [`control`]: changes, judged by the registry; [`http`]: OpenFeature's own protocol.
//!
//! Nothing that a caller sends makes a call fail for all of its flags but a context that is too large or no JSON: every
//! flag has its own answer, with OpenFeature's reason and error code.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proto::v1;
use registry::flags::{CompiledFlag, ErrorCode, Evaluation, FLAGS_MAX, FlagRecord, Flags, Kind, Reason, Rule};
use registry::id::{EntryNumber, FlagName};

use crate::answer::Gateway;
use crate::status::{Failure, Kind as FailureKind};

pub mod client;
pub mod condition;
mod context;
pub mod control;
mod exposures;
pub mod http;
mod metrics;

pub use context::{Context, attributes};
pub use exposures::{ExposureParts, Exposures, Line, prepare, read as read_exposures, run};
pub use metrics::FlagMetrics;

use condition::Condition;
use metrics::FlagCounts;

/// The flags of one state of the control log, ready to be asked.
#[derive(Default)]
pub struct ServedFlags {
    flags: BTreeMap<FlagName, Arc<ServedFlag>>,
    holdout: Option<EntryNumber>,
    /// By text: flags often share one.
    conditions: HashMap<Arc<str>, (usize, Compiled)>,
}

/// A condition, or why this build cannot evaluate it: the flag may have been set by another one.
type Compiled = Result<Arc<Condition>, Arc<str>>;

struct ServedFlag {
    compiled: CompiledFlag,
    counts: FlagCounts,
}

/// What one call asks with, and what it has found out.
pub struct Asking<'a> {
    context: &'a Context<'a>,
    /// By number of the condition.
    held: Vec<Option<bool>>,
}

/// The answer about one flag.
pub struct Answer<'a> {
    pub name: &'a str,
    /// None for a flag that does not exist.
    pub kind: Option<Kind>,
    pub evaluation: Evaluation<'a>,
}

impl ServedFlags {
    /// Compiles what has changed since `before`.
    pub fn new(flags: &Flags, before: &ServedFlags) -> ServedFlags {
        let mut conditions: HashMap<Arc<str>, (usize, Compiled)> = HashMap::new();
        let rules = flags.flags.values().flat_map(|record| &record.flag.rules);
        for text in rules.filter_map(|rule: &Rule| rule.when.as_deref()) {
            if !conditions.contains_key(text) {
                let compiled = match before.conditions.get(text) {
                    Some((_, known)) => known.clone(),
                    None => Condition::compile(text).map(Arc::new).map_err(|error| error.to_string().into()),
                };
                conditions.insert(text.into(), (conditions.len(), compiled));
            }
        }
        let holdout = flags.holdout.as_ref();
        let entry = holdout.map(|(_, fact)| fact.entry);
        let served = |(name, record): (&FlagName, &FlagRecord)| {
            let same = |known: &&Arc<ServedFlag>| {
                known.compiled.record().changed.entry == record.changed.entry && before.holdout == entry
            };
            let flag = before.flags.get(name).filter(same).cloned().unwrap_or_else(|| {
                let compiled = CompiledFlag::new(record, holdout.map(|(holdout, _)| holdout));
                Arc::new(ServedFlag { compiled, counts: FlagCounts::new(&record.flag) })
            });
            (name.clone(), flag)
        };
        ServedFlags { flags: flags.flags.iter().map(served).collect(), holdout: entry, conditions }
    }

    fn is_of(&self, flags: &Flags) -> bool {
        let same = |((name, flag), (known, record)): ((&FlagName, &Arc<ServedFlag>), (&FlagName, &FlagRecord))| {
            name == known && flag.compiled.record().changed.entry == record.changed.entry
        };
        self.holdout == flags.holdout.as_ref().map(|(_, fact)| fact.entry)
            && self.flags.len() == flags.flags.len()
            && self.flags.iter().zip(&flags.flags).all(same)
    }

    /// A condition that is compiled already, if it is one.
    fn condition(&self, text: &str) -> Option<Arc<Condition>> {
        self.conditions.get(text)?.1.as_ref().ok().cloned()
    }

    pub fn names(&self) -> impl Iterator<Item = &FlagName> {
        self.flags.keys()
    }

    pub fn ask<'a>(&self, context: &'a Context<'a>) -> Asking<'a> {
        Asking { context, held: vec![None; self.conditions.len()] }
    }

    /// What a flag is for whom `asking` is about. Without a kind, whatever the flag is.
    pub fn evaluate<'a>(&'a self, name: &'a str, kind: Option<Kind>, asking: &mut Asking<'_>) -> Answer<'a> {
        let Some(flag) = self.flags.get(name) else {
            let text = format!("there is no flag `{}`", feature_defs::diagnose::shown(name));
            let error = Some((ErrorCode::FlagNotFound, text));
            let evaluation = Evaluation { value: None, variant: None, reason: Reason::Error, error, entry: None };
            return Answer { name, kind: None, evaluation };
        };
        let of = flag.compiled.record().flag.kind;
        let unit = asking.context.unit();
        let unit = unit.as_ref().map(|unit| &unit[..]);
        let evaluation = flag.compiled.evaluate(kind.unwrap_or(of), unit, |text| self.holds(text, asking));
        Answer { name, kind: Some(of), evaluation }
    }

    fn holds(&self, text: &str, asking: &mut Asking<'_>) -> Result<bool, String> {
        let Some((number, compiled)) = self.conditions.get(text) else {
            return Err("the condition was not compiled".to_owned());
        };
        let condition = compiled.as_ref().map_err(|error| error.to_string())?;
        if let Some(held) = asking.held.get(*number).copied().flatten() {
            return Ok(held);
        }
        let holds = condition.holds(asking.context)?;
        if let Some(held) = asking.held.get_mut(*number) {
            *held = Some(holds);
        }
        Ok(holds)
    }
}

/// The flags to serve: those before where nothing has changed.
pub async fn follow(before: &Arc<ServedFlags>, flags: Option<&Flags>, metrics: &FlagMetrics) -> Arc<ServedFlags> {
    let none = Flags::default();
    let flags = flags.unwrap_or(&none);
    if before.is_of(flags) {
        return before.clone();
    }
    let (known, flags) = (before.clone(), flags.clone());
    // A condition takes tenths of a millisecond.
    match tokio::task::spawn_blocking(move || ServedFlags::new(&flags, &known)).await {
        Ok(served) => {
            let gone = before.flags.iter().filter(|(name, _)| !served.flags.contains_key(*name));
            gone.for_each(|(_, flag)| metrics.forget(&flag.compiled.record().flag));
            for (text, (_, compiled)) in &served.conditions {
                if let Err(error) = compiled
                    && !before.conditions.contains_key(text)
                {
                    tracing::error!(error = %error, "a flag's condition cannot be evaluated by this build");
                }
            }
            Arc::new(served)
        }
        Err(error) => {
            tracing::error!(%error, "the flags could not be compiled; those before are served");
            before.clone()
        }
    }
}

/// A question about flags, whichever way it came.
pub struct Question<'a> {
    /// Empty: all.
    pub flags: Vec<(&'a str, Option<Kind>)>,
    pub context: Context<'a>,
    pub exposures: v1::Exposures,
}

impl Gateway {
    /// Answers through `then`, flag by flag.
    pub fn ask_flags<T>(
        &self,
        served: &ServedFlags,
        question: &Question<'_>,
        mut then: impl FnMut(Answer<'_>) -> T,
    ) -> Result<Vec<T>, Failure> {
        if question.flags.len() > FLAGS_MAX {
            let text = format!("a question about {} flags; ask for at most {FLAGS_MAX} at once", question.flags.len());
            return Err(Failure::invalid(text));
        }
        let mut asking = served.ask(&question.context);
        let mut exposed = Vec::new();
        let mut one = |name: &str, kind: Option<Kind>| {
            let answer = served.evaluate(name, kind, &mut asking);
            let evaluation = &answer.evaluation;
            let counts = served.flags.get(name).map(|flag| &flag.counts);
            self.metrics.flags.evaluated(name, counts, evaluation);
            if let (Reason::Split, Some(variant), Some(entry)) =
                (evaluation.reason, evaluation.variant, evaluation.entry)
                && question.exposures != v1::Exposures::None
            {
                exposed.push((name.to_owned(), variant.to_owned(), entry));
            }
            then(answer)
        };
        let answers = match question.flags.is_empty() {
            true => served.names().map(|name| one(name.as_str(), None)).collect(),
            false => question.flags.iter().map(|(name, kind)| one(name, *kind)).collect(),
        };
        if let (false, Some(key), Some(log)) = (exposed.is_empty(), question.context.targeting_key, &self.exposures) {
            log.exposed(key, exposed, (self.clock)());
        }
        Ok(answers)
    }

    pub fn evaluate_flags(&self, request: &v1::EvaluateFlagsRequest) -> Result<v1::EvaluateFlagsResponse, Failure> {
        self.check_serving()?;
        self.check_project(&request.project)?;
        let served = self.served();
        let kind = |question: &v1::FlagQuestion| match question.r#type.as_str() {
            "" => Ok(None),
            name => Kind::of_name(name)
                .map(Some)
                .ok_or_else(|| Failure::unknown("type of flags named", name, Kind::ALL.into_iter().map(Kind::name))),
        };
        let flags = request.flags.iter().map(|flag| Ok((flag.name.as_str(), kind(flag)?)));
        let flags = flags
            .collect::<Result<_, Failure>>()
            .map_err(|failure| Failure { kind: FailureKind::Invalid, ..failure })?;
        let attributes = attributes(&request.context)?;
        let context = Context::new(request.targeting_key.as_deref(), &attributes)?;
        let question = Question { flags, context, exposures: request.exposures() };
        let flags = self.ask_flags(&served.flags, &question, |answer| answer.to_message())?;
        Ok(v1::EvaluateFlagsResponse { flags, control_head: served.head.0 })
    }
}

impl Answer<'_> {
    pub fn to_message(&self) -> v1::FlagValue {
        let Evaluation { value, variant, reason, error, entry } = &self.evaluation;
        let (error_code, error_message) = error.as_ref().map_or(("", ""), |(code, text)| (code.name(), text.as_str()));
        v1::FlagValue {
            name: self.name.to_owned(),
            value: value.map(ToString::to_string).unwrap_or_default(),
            variant: variant.unwrap_or_default().to_owned(),
            reason: reason.name().to_owned(),
            error_code: error_code.to_owned(),
            error_message: error_message.to_owned(),
            entry: entry.map_or(0, |entry| entry.0),
            r#type: self.kind.map(Kind::name).unwrap_or_default().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
