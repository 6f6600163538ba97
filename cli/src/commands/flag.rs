//! `coeval flag`: values that are switched without a deploy. A running server is asked; without one the control log is read and
//! written here, by the same rules.

use feature_defs::time::Micros;
use feature_defs::window::DAY;
use gateway::flags::{self, Context, ServedFlags, attributes, control};
use gateway::status::Failure;
use proto::v1;
use registry::Registry;
use registry::flags::{Flag, Flags};
use registry::id::ProjectName;
use serde_json::{Map, Value as Json, json};

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, project_name, who};
use crate::server::{Server, ServerArguments};
use crate::times;

mod edit;

use edit::{Edit, described, percent, share};

#[derive(Debug, clap::Subcommand)]
pub enum FlagCommand {
    /// Every flag, and what made it so
    List(ServerArguments),
    /// A flag; with a unit or a context, what it is for them
    Get(GetArguments),
    /// Make a flag, or change what is named of it
    Set(Box<SetArguments>),
    /// Give a variant a larger share of the units; who has it keeps it
    Ramp {
        name: String,
        variant: String,
        /// Of all units, such as 25%
        #[arg(value_parser = share)]
        share: u16,
        /// The rule that splits, counted from 1, where more than one does
        #[arg(long, value_name = "N")]
        rule: Option<usize>,
        #[command(flatten)]
        said: Said,
    },
    /// Remove a flag; whoever asks for it then gets its own default
    Remove {
        name: String,
        #[command(flatten)]
        said: Said,
    },
    /// The share of units that no experiment touches; with a share, set it
    Holdout {
        /// Such as 5%
        #[arg(value_parser = share, requires = "why")]
        share: Option<u16>,
        /// Why, for the audit trail
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
        /// Who, for the audit trail; without it, the account that runs this
        #[arg(long, value_name = "NAME")]
        who: Option<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Who changed a flag, when and why
    History {
        name: String,
        /// At most so many changes, the newest
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// How many units each variant was given to by a split
    Exposures {
        name: String,
        /// From this time on; without it, the last week
        #[arg(long, value_name = "TIME")]
        from: Option<String>,
        /// Until this time; without it, now
        #[arg(long, value_name = "TIME")]
        to: Option<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
}

/// What the audit trail is told.
#[derive(Debug, clap::Args)]
pub struct Said {
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    why: String,
    /// Who, for the audit trail; without it, the account that runs this
    #[arg(long, value_name = "NAME")]
    who: Option<String>,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, clap::Args)]
pub struct GetArguments {
    name: String,
    /// The targeting key: what splits go by
    #[arg(long, value_name = "KEY")]
    unit: Option<String>,
    /// An attribute that conditions read: JSON, or text where it is none; may be repeated
    #[arg(long = "context", value_name = "NAME=VALUE", value_parser = pair)]
    context: Vec<(String, Json)>,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, clap::Args)]
pub struct SetArguments {
    name: String,
    #[command(flatten)]
    edit: Edit,
    /// Units may lose the variant that a split gave them
    #[arg(long)]
    reshuffle: bool,
    #[command(flatten)]
    said: Said,
}

/// `NAME=VALUE`; a value that is no JSON is a text.
fn pair(text: &str) -> Result<(String, Json), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => {
            let value = serde_json::from_str(value).unwrap_or_else(|_| Json::from(value));
            Ok((name.trim().to_owned(), value))
        }
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// Where flags are: behind a server, or in the control log itself.
enum Home {
    Server(Server),
    Log { registry: Box<Registry>, project: ProjectName, place: String },
}

fn failed(failure: Failure) -> CliError {
    CliError::Failed(failure.message)
}

impl Home {
    async fn of(place: &Place, arguments: &ServerArguments, output: &Output) -> Result<Home, CliError> {
        if let Some(server) = Server::if_running(place, arguments, output).await? {
            return Ok(Home::Server(server));
        }
        let settings = place.settings(output)?;
        // Looking does not create a store.
        if place.store_is_absent(&settings) {
            return Err(CliError::Failed("nothing is applied yet; run `coeval apply`".to_owned()));
        }
        let project = project_name(&settings)?;
        let registry = Box::new(place.registry(&settings).await?);
        Ok(Home::Log { registry, project, place: place.resolve(&settings.store) })
    }

    fn project(&self) -> String {
        match self {
            Home::Server(server) => server.project.clone(),
            Home::Log { project, .. } => project.to_string(),
        }
    }

    async fn list(&self, names: Vec<String>) -> Result<v1::ListFlagsResponse, CliError> {
        let request = v1::ListFlagsRequest { project: self.project(), names };
        match self {
            Home::Server(server) => {
                let answer = server.control().list_flags(request).await;
                Ok(answer.map_err(|status| server.failed(status))?.into_inner())
            }
            Home::Log { registry, project, .. } => {
                control::list(registry, project, &request, &ServedFlags::default()).map_err(failed)
            }
        }
    }

    async fn set(&self, request: v1::SetFlagRequest) -> Result<v1::SetFlagResponse, CliError> {
        match self {
            Home::Server(server) => {
                let answer = server.control().set_flag(request).await;
                Ok(answer.map_err(|status| server.failed(status))?.into_inner())
            }
            Home::Log { registry, project, .. } => control::set(registry, project, &request).await.map_err(failed),
        }
    }

    async fn remove(&self, request: v1::RemoveFlagRequest) -> Result<v1::RemoveFlagResponse, CliError> {
        match self {
            Home::Server(server) => {
                let answer = server.control().remove_flag(request).await;
                Ok(answer.map_err(|status| server.failed(status))?.into_inner())
            }
            Home::Log { registry, project, .. } => control::remove(registry, project, &request).await.map_err(failed),
        }
    }

    async fn set_holdout(&self, request: v1::SetHoldoutRequest) -> Result<v1::SetHoldoutResponse, CliError> {
        match self {
            Home::Server(server) => {
                let answer = server.control().set_holdout(request).await;
                Ok(answer.map_err(|status| server.failed(status))?.into_inner())
            }
            Home::Log { registry, project, .. } => {
                control::set_holdout(registry, project, &request).await.map_err(failed)
            }
        }
    }

    async fn history(&self, request: v1::GetFlagHistoryRequest) -> Result<v1::GetFlagHistoryResponse, CliError> {
        match self {
            Home::Server(server) => {
                let answer = server.control().get_flag_history(request).await;
                Ok(answer.map_err(|status| server.failed(status))?.into_inner())
            }
            Home::Log { registry, project, .. } => control::history(registry, project, &request).await.map_err(failed),
        }
    }

    /// As JSON.
    async fn exposures(&self, name: &str, from: Micros, to: Micros) -> Result<Json, CliError> {
        match self {
            Home::Server(server) => {
                let request = v1::GetFlagExposuresRequest { project: self.project(), name: name.to_owned(), from, to };
                let answer = server.control().get_flag_exposures(request).await;
                let report = answer.map_err(|status| server.failed(status))?.into_inner().report;
                serde_json::from_str(&report)
                    .map_err(|error| CliError::Failed(format!("the server's report cannot be read: {error}")))
            }
            Home::Log { project, place, .. } => {
                let (store, root) = registry::store::open_store(place)?;
                let read = flags::read_exposures(&store, &root.join(project.as_str()), name, from, to).await;
                let told = read.map_err(|error| CliError::Failed(crate::error::chain(&error)))?;
                Ok(json!(told))
            }
        }
    }

    /// What a flag is for somebody who only looks: nobody is exposed to anything.
    async fn evaluate(&self, name: &str, unit: Option<&str>, context: &str) -> Result<v1::FlagValue, CliError> {
        match self {
            Home::Server(server) => {
                let request = v1::EvaluateFlagsRequest {
                    project: self.project(),
                    flags: vec![v1::FlagQuestion { name: name.to_owned(), r#type: String::new() }],
                    targeting_key: unit.map(str::to_owned),
                    context: context.to_owned(),
                    exposures: v1::Exposures::None.into(),
                };
                let answer = server.gateway().evaluate_flags(request).await;
                let answer = answer.map_err(|status| server.failed(status))?.into_inner();
                answer.flags.into_iter().next().ok_or_else(|| CliError::Failed("the server did not answer".to_owned()))
            }
            Home::Log { registry, project, .. } => {
                let state = registry.state();
                let none = Flags::default();
                let known = state.project(project.as_str()).map_or(&none, |known| &known.flags);
                let served = ServedFlags::new(known, &ServedFlags::default());
                let attributes = attributes(context).map_err(failed)?;
                let context = Context::new(unit, &attributes).map_err(failed)?;
                Ok(served.evaluate(name, None, &mut served.ask(&context)).to_message())
            }
        }
    }

    /// A flag and the entry that made it so.
    async fn flag(&self, name: &str) -> Result<(Flag, v1::FlagInfo), CliError> {
        let info = self.list(vec![name.to_owned()]).await?.flags.into_iter().next();
        let info = info.ok_or_else(|| CliError::Failed(format!("there is no flag `{name}`")))?;
        Ok((control::read(&info.flag).map_err(failed)?, info))
    }

    /// None where there is no such flag.
    async fn known(&self, name: &str) -> Result<Option<(Flag, v1::FlagInfo)>, CliError> {
        let all = self.list(Vec::new()).await?.flags;
        for info in all {
            let flag = control::read(&info.flag).map_err(failed)?;
            if flag.name.as_str() == name {
                return Ok(Some((flag, info)));
            }
        }
        Ok(None)
    }
}

pub async fn run(place: &Place, command: &FlagCommand, output: &Output) -> Result<(), CliError> {
    let arguments = match command {
        FlagCommand::List(server) => server,
        FlagCommand::Get(get) => &get.server,
        FlagCommand::Set(set) => &set.said.server,
        FlagCommand::Ramp { said, .. } | FlagCommand::Remove { said, .. } => &said.server,
        FlagCommand::Holdout { server, .. }
        | FlagCommand::History { server, .. }
        | FlagCommand::Exposures { server, .. } => server,
    };
    let home = Home::of(place, arguments, output).await?;
    match command {
        FlagCommand::List(_) => list(&home, output).await,
        FlagCommand::Get(arguments) => get(&home, arguments, output).await,
        FlagCommand::Set(arguments) => set(&home, arguments, output).await,
        FlagCommand::Ramp { name, variant, share, rule, said } => {
            let (mut flag, info) = home.flag(name).await?;
            let before = edit::ramp(&mut flag, variant, *share, *rule)?;
            let changed = submit(&home, &flag, info.entry, false, said).await?;
            output.line(format!(
                "{name}: `{variant}` goes to {} of the units, before {}; entry {}",
                percent(*share),
                percent(before),
                changed.control_entry
            ));
            output.json(&json!({
                "name": name, "variant": variant, "share": share, "before": before, "entry": changed.control_entry,
                "changed": !changed.existed,
            }));
            Ok(())
        }
        FlagCommand::Remove { name, said } => {
            let (_, info) = home.flag(name).await?;
            let (who, why) = (who(said.who.as_deref()), said.why.clone());
            let request =
                v1::RemoveFlagRequest { project: home.project(), name: name.clone(), after: info.entry, who, why };
            let entry = home.remove(request).await?.control_entry;
            output.line(format!("{name}: removed with entry {entry}"));
            output.json(&json!({"name": name, "entry": entry}));
            Ok(())
        }
        FlagCommand::Holdout { share, why, who: said, .. } => {
            holdout(&home, *share, why.as_deref(), said.as_deref(), output).await
        }
        FlagCommand::History { name, limit, .. } => history(&home, name, *limit, output).await,
        FlagCommand::Exposures { name, from, to, .. } => {
            let now = times::now();
            let to = to.as_deref().map_or(Ok(now), |to| times::parse(to, now))?;
            let from = from.as_deref().map_or(Ok(to.saturating_sub(7 * DAY)), |from| times::parse(from, now))?;
            exposures(&home, name, from, to, output).await
        }
    }
}

async fn submit(
    home: &Home,
    flag: &Flag,
    after: u64,
    reshuffle: bool,
    said: &Said,
) -> Result<v1::SetFlagResponse, CliError> {
    let text = serde_json::to_string(flag).map_err(|error| CliError::Failed(error.to_string()))?;
    let (who, why) = (who(said.who.as_deref()), said.why.clone());
    home.set(v1::SetFlagRequest { project: home.project(), flag: text, after, reshuffle, who, why }).await
}

async fn list(home: &Home, output: &Output) -> Result<(), CliError> {
    let answer = home.list(Vec::new()).await?;
    let mut rows = Vec::new();
    let mut all = Vec::new();
    for info in &answer.flags {
        let flag = control::read(&info.flag).map_err(failed)?;
        rows.push(vec![
            flag.name.to_string(),
            flag.kind.name().to_owned(),
            described(&flag),
            info.entry.to_string(),
            info.at.clone(),
            info.who.clone(),
            info.why.clone(),
        ]);
        all.push(told(info)?);
    }
    if rows.is_empty() {
        output.line("there are no flags; `coeval flag set NAME --split on=10% --why TEXT` makes one");
    } else {
        output.table(&["FLAG", "TYPE", "IS", "ENTRY", "SINCE", "BY", "WHY"], &rows);
    }
    for info in answer.flags.iter().filter(|info| !info.problems.is_empty()) {
        output.note(format!("warning: {}", info.problems.join("; ")));
    }
    output.json(&json!({"flags": all, "holdout": answer.holdout.map(|holdout| holdout.buckets)}));
    Ok(())
}

/// A flag and its record, for programs.
fn told(info: &v1::FlagInfo) -> Result<Json, CliError> {
    let flag: Json = serde_json::from_str(&info.flag).map_err(|error| CliError::Failed(error.to_string()))?;
    let v1::FlagInfo { entry, who, why, at, attributes, problems, .. } = info;
    let attributes: Map<String, Json> =
        attributes.iter().map(|attribute| (attribute.name.clone(), json!(attribute.types))).collect();
    Ok(json!({
        "flag": flag, "entry": entry, "who": who, "why": why, "at": at, "attributes": attributes, "problems": problems,
    }))
}

fn reads(attributes: &[v1::FlagAttribute]) -> Option<String> {
    let shown = attributes.iter().map(|attribute| format!("{} ({})", attribute.name, attribute.types.join(" or ")));
    shown.reduce(|all, one| format!("{all}, {one}"))
}

async fn get(home: &Home, arguments: &GetArguments, output: &Output) -> Result<(), CliError> {
    let GetArguments { name, unit, context, .. } = arguments;
    if unit.is_none() && context.is_empty() {
        let (flag, info) = home.flag(name).await?;
        output.line(format!("{name}: {}, {}", flag.kind.name(), described(&flag)));
        output.line(format!("since entry {} by {} at {}: {}", info.entry, info.who, info.at, info.why));
        edit::lines(&flag).into_iter().for_each(|line| output.line(line));
        reads(&info.attributes).into_iter().for_each(|reads| output.line(format!("reads {reads}")));
        info.problems.iter().for_each(|problem| output.note(format!("warning: {problem}")));
        output.json(&told(&info)?);
        return Ok(());
    }
    let context: Map<String, Json> = context.iter().cloned().collect();
    let value = home.evaluate(name, unit.as_deref(), &Json::from(context).to_string()).await?;
    let is_error = !value.error_code.is_empty();
    let parsed: Json = serde_json::from_str(&value.value).unwrap_or_default();
    output.json(&json!({
        "name": value.name, "value": parsed, "variant": (!is_error).then_some(&value.variant), "reason": value.reason,
        "error_code": is_error.then_some(&value.error_code), "error_message": is_error.then_some(&value.error_message),
        "entry": value.entry, "type": value.r#type,
    }));
    if is_error {
        return Err(CliError::Failed(format!("{}: {}", value.error_code, value.error_message)));
    }
    let v1::FlagValue { value, variant, reason, entry, .. } = value;
    output.line(format!("{name} is {value} (variant `{variant}`, {reason}, entry {entry})"));
    Ok(())
}

async fn set(home: &Home, arguments: &SetArguments, output: &Output) -> Result<(), CliError> {
    let SetArguments { name, edit, reshuffle, said } = arguments;
    let known = home.known(name).await?;
    let flag = edit.of(name, known.as_ref().map(|(flag, _)| flag))?;
    let after = known.map_or(0, |(_, info)| info.entry);
    let answer = submit(home, &flag, after, *reshuffle, said).await?;
    let entry = answer.control_entry;
    output.line(match answer.existed {
        true => format!("nothing to do: entry {entry} made `{name}` just so"),
        false => format!("{name}: {}; entry {entry}", described(&flag)),
    });
    reads(&answer.attributes).into_iter().for_each(|reads| output.line(format!("reads {reads}")));
    for quoted in edit::quoted(&flag) {
        output.note(format!(
            "note: \"{quoted}\" in double quotes is the attribute of that name; a text is written '{quoted}'"
        ));
    }
    let attributes: Map<String, Json> =
        answer.attributes.iter().map(|attribute| (attribute.name.clone(), json!(attribute.types))).collect();
    output.json(&json!({"flag": flag, "entry": entry, "changed": !answer.existed, "attributes": attributes}));
    Ok(())
}

async fn holdout(
    home: &Home,
    share: Option<u16>,
    why: Option<&str>,
    said: Option<&str>,
    output: &Output,
) -> Result<(), CliError> {
    let (Some(buckets), Some(why)) = (share, why) else {
        let holdout = home.list(Vec::new()).await?.holdout;
        match &holdout {
            None => output.line("no unit is held out"),
            Some(holdout) => {
                let share = percent(u16::try_from(holdout.buckets).unwrap_or(u16::MAX));
                let v1::HoldoutInfo { entry, who, why, at, .. } = holdout;
                output.line(format!(
                    "{share} of the units are in no experiment, since entry {entry} by {who} at {at}: {why}"
                ));
            }
        }
        output.json(&json!({"buckets": holdout.as_ref().map_or(0, |holdout| holdout.buckets), "entry": holdout.map(|of| of.entry)}));
        return Ok(());
    };
    let request =
        v1::SetHoldoutRequest { project: home.project(), buckets: buckets.into(), who: who(said), why: why.to_owned() };
    let answer = home.set_holdout(request).await?;
    output.line(format!("{} of the units are in no experiment; entry {}", percent(buckets), answer.control_entry));
    output.json(&json!({"buckets": buckets, "entry": answer.control_entry, "changed": !answer.existed}));
    Ok(())
}

async fn history(home: &Home, name: &str, limit: u32, output: &Output) -> Result<(), CliError> {
    let request = v1::GetFlagHistoryRequest { project: home.project(), name: name.to_owned(), changes_max: limit };
    let answer = home.history(request).await?;
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    for change in &answer.changes {
        let v1::FlagChange { entry, at, who, why, flag } = change;
        let (shown, flag) = match flag.as_str() {
            "" => ("removed".to_owned(), Json::Null),
            text => {
                let flag = control::read(text).map_err(failed)?;
                (described(&flag), json!(flag))
            }
        };
        rows.push(vec![entry.to_string(), at.clone(), who.clone(), shown, why.clone()]);
        all.push(json!({"entry": entry, "at": at, "who": who, "why": why, "flag": flag}));
    }
    output.table(&["ENTRY", "AT", "BY", "IS", "WHY"], &rows);
    if answer.truncated {
        output.line("older changes are left out; `--limit` shows more");
    }
    output.json(&json!({"name": name, "changes": all, "truncated": answer.truncated}));
    Ok(())
}

async fn exposures(home: &Home, name: &str, from: Micros, to: Micros, output: &Output) -> Result<(), CliError> {
    let report = home.exposures(name, from, to).await?;
    let mut rows = Vec::new();
    for (entry, variants) in report["entries"].as_object().into_iter().flatten() {
        for (variant, of) in variants.as_object().into_iter().flatten() {
            rows.push(vec![entry.clone(), variant.clone(), of["units"].to_string(), of["evaluations"].to_string()]);
        }
    }
    if rows.is_empty() {
        output.line(format!("no unit was given a variant of `{name}` by a split in that time"));
    } else {
        output.table(&["ENTRY", "VARIANT", "UNITS", "EVALUATIONS"], &rows);
    }
    if report["torn_units"].as_u64().unwrap_or(0) > 0 {
        output.line(format!("{} units had more than one variant under one entry", report["torn_units"]));
    }
    for damaged in report["damaged"].as_array().into_iter().flatten() {
        output.note(format!("warning: {damaged}"));
    }
    output.json(&report);
    Ok(())
}

#[cfg(test)]
mod tests;
