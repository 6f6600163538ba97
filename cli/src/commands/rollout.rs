//! `coeval rollout`: who has the traffic, and how a version gets it.

mod story;

use proto::v1::change_rollout_request::Change;
use proto::v1::{
    BeginRolloutRequest, ChangeRolloutRequest, GetRolloutRequest, PlanRolloutRequest, PromoteModelRequest,
    RollbackModelRequest, TrafficResponse,
};
use serde_json::{Value as Json, json};

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, who};
use crate::server::{Server, ServerArguments};

#[derive(Debug, clap::Subcommand)]
pub enum RolloutCommand {
    /// Who has the traffic, what is being tried and how it stands by its criteria, and what happened before
    Show {
        model: String,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// How many rows, units and days the declared criteria need at the traffic there is, before anything starts
    Plan {
        model: String,
        version: u32,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Begin a rollout in shadow: the version scores what the champion scores, and answers nobody
    Shadow(Box<BeginArguments>),
    /// Begin a rollout with traffic, or let one in shadow go on if its criteria are met
    Canary {
        #[command(flatten)]
        begin: Box<BeginArguments>,
        /// Begin with traffic although the model declares shadow criteria
        #[arg(long)]
        skip_shadow: bool,
    },
    /// Judge a rollout now, and let it go on if its criteria are met
    Advance {
        model: String,
        #[command(flatten)]
        said: Said,
    },
    /// Make an active version the champion: requests that name no version go to it
    Promote {
        model: String,
        version: u32,
        #[command(flatten)]
        said: Said,
    },
    /// Take the traffic from a version that is being tried; else make the champion before the champion again. At once
    Rollback {
        model: String,
        #[command(flatten)]
        said: Said,
    },
    /// Let nothing go on until `resume`
    Hold {
        model: String,
        #[command(flatten)]
        said: Said,
    },
    /// Let a rollout that is held go on
    Resume {
        model: String,
        #[command(flatten)]
        said: Said,
    },
    /// Take it upon oneself that features have drifted, so that they hold the rollout no longer
    Acknowledge {
        model: String,
        /// Features as `view:feature`; `*` for all, also for those that cannot be judged
        #[arg(required = true)]
        features: Vec<String>,
        #[command(flatten)]
        said: Said,
    },
    /// Turn a model off: the declared fallback answers everybody
    Off {
        model: String,
        #[command(flatten)]
        said: Said,
    },
    /// Turn a model on again: its champion answers
    On {
        model: String,
        #[command(flatten)]
        said: Said,
    },
}

#[derive(Debug, clap::Args)]
pub struct BeginArguments {
    model: String,
    /// An active version that is not the champion
    version: u32,
    /// Both versions score this dataset first, by name or id
    #[arg(long, value_name = "NAME", conflicts_with = "without_evaluation")]
    dataset: Option<String>,
    /// Begin without a dataset that both versions have scored
    #[arg(long)]
    without_evaluation: bool,
    /// Rollouts of one layer share no unit; without it, a layer of the model's own
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// Of the layer's 10000 buckets, such as 0..5000; without it, all
    #[arg(long, value_name = "FROM..TO", value_parser = buckets)]
    buckets: Option<(u32, u32)>,
    #[command(flatten)]
    said: Said,
}

fn buckets(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once("..").and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    parts.filter(|(from, to)| from < to && *to <= 10_000).ok_or_else(|| "write FROM..TO, from 0 to 10000".to_owned())
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

pub async fn run(place: &Place, command: &RolloutCommand, output: &Output) -> Result<(), CliError> {
    match command {
        RolloutCommand::Show { model, server } => show(place, model, server, output).await,
        RolloutCommand::Plan { model, version, server } => plan(place, model, *version, server, output).await,
        RolloutCommand::Shadow(begin) => self::begin(place, begin, "shadow", false, output).await,
        RolloutCommand::Canary { begin, skip_shadow } => canary(place, begin, *skip_shadow, output).await,
        RolloutCommand::Promote { model, version, said } => promote(place, model, *version, said, output).await,
        RolloutCommand::Rollback { model, said } => rollback(place, model, said, output).await,
        RolloutCommand::Advance { model, said } => change(place, model, Change::Advance, &[], said, output).await,
        RolloutCommand::Hold { model, said } => change(place, model, Change::Hold, &[], said, output).await,
        RolloutCommand::Resume { model, said } => change(place, model, Change::Resume, &[], said, output).await,
        RolloutCommand::Acknowledge { model, features, said } => {
            change(place, model, Change::Acknowledge, features, said, output).await
        }
        RolloutCommand::Off { model, said } => change(place, model, Change::Off, &[], said, output).await,
        RolloutCommand::On { model, said } => change(place, model, Change::On, &[], said, output).await,
    }
}

fn read(report: &str) -> Json {
    serde_json::from_str(report).unwrap_or(Json::Null)
}

async fn show(place: &Place, model: &str, arguments: &ServerArguments, output: &Output) -> Result<(), CliError> {
    let server = Server::of(place, arguments, output).await?;
    let request = GetRolloutRequest { project: server.project.clone(), model: model.to_owned() };
    let answer = server.control().get_rollout(request).await.map_err(|status| server.failed(status))?;
    let report = read(&answer.into_inner().report);
    story::tell(&report, output);
    output.json(&report);
    Ok(())
}

async fn plan(
    place: &Place,
    model: &str,
    version: u32,
    arguments: &ServerArguments,
    output: &Output,
) -> Result<(), CliError> {
    let server = Server::of(place, arguments, output).await?;
    let request = PlanRolloutRequest { project: server.project.clone(), model: model.to_owned(), version };
    let answer = server.control().plan_rollout(request).await.map_err(|status| server.failed(status))?;
    let report = read(&answer.into_inner().report);
    story::tell_plan(&report, output);
    output.json(&report);
    Ok(())
}

async fn begin(
    place: &Place,
    arguments: &BeginArguments,
    stage: &str,
    skip_shadow: bool,
    output: &Output,
) -> Result<(), CliError> {
    let BeginArguments { model, version, said, .. } = arguments;
    let server = Server::of(place, &said.server, output).await?;
    let (from_bucket, to_bucket) = arguments.buckets.unwrap_or_default();
    let request = BeginRolloutRequest {
        project: server.project.clone(),
        model: model.clone(),
        version: *version,
        stage: stage.to_owned(),
        dataset: arguments.dataset.clone().unwrap_or_default(),
        skip_evaluation: arguments.without_evaluation,
        skip_shadow,
        layer: arguments.layer.clone().unwrap_or_default(),
        from_bucket,
        to_bucket,
        who: who(said.who.as_deref()),
        why: said.why.clone(),
    };
    let waiting = output.waiting();
    waiting.set_message(format!("{model} version {version} is evaluated, and its rollout begun"));
    let answer = server.control().begin_rollout(request).await.map_err(|status| server.failed(status));
    waiting.finish_and_clear();
    let answer = answer?.into_inner();
    let report = read(&answer.report);
    let stage = report["running"]["stage"].as_str().unwrap_or(stage).to_owned();
    output.line(match answer.existed {
        true => format!("{model}: version {version} is being rolled out already, at {stage}"),
        false => format!("{model}: the rollout of version {version} has begun at {stage}"),
    });
    output.line(format!("`coeval rollout show {model}` tells how it stands"));
    output.json(&json!({"model": model, "version": version, "rollout": answer.rollout, "existed": answer.existed, "report": report}));
    Ok(())
}

/// A rollout in shadow goes on, if it may; without one, a canary begins.
async fn canary(place: &Place, arguments: &BeginArguments, skip_shadow: bool, output: &Output) -> Result<(), CliError> {
    let BeginArguments { model, version, said, .. } = arguments;
    let server = Server::of(place, &said.server, output).await?;
    let request = GetRolloutRequest { project: server.project.clone(), model: model.clone() };
    let answer = server.control().get_rollout(request).await.map_err(|status| server.failed(status))?;
    let report = read(&answer.into_inner().report);
    let in_shadow = report["running"]["version"].as_u64() == Some(u64::from(*version))
        && report["running"]["stage"].as_str() == Some("shadow");
    match in_shadow {
        true => change(place, model, Change::Advance, &[], said, output).await,
        false => begin(place, arguments, "canary", skip_shadow, output).await,
    }
}

async fn promote(place: &Place, model: &str, version: u32, said: &Said, output: &Output) -> Result<(), CliError> {
    let server = Server::of(place, &said.server, output).await?;
    let (project, who, why) = (server.project.clone(), who(said.who.as_deref()), said.why.clone());
    let request = PromoteModelRequest { project, model: model.to_owned(), version, who, why };
    let answer = server.control().promote_model(request).await.map_err(|status| server.failed(status))?;
    moved(model, &answer.into_inner(), output);
    Ok(())
}

async fn rollback(place: &Place, model: &str, said: &Said, output: &Output) -> Result<(), CliError> {
    let server = Server::of(place, &said.server, output).await?;
    let (project, who, why) = (server.project.clone(), who(said.who.as_deref()), said.why.clone());
    let request = RollbackModelRequest { project, model: model.to_owned(), who, why };
    let answer = server.control().rollback_model(request).await.map_err(|status| server.failed(status))?;
    moved(model, &answer.into_inner(), output);
    Ok(())
}

fn moved(model: &str, answer: &TrafficResponse, output: &Output) {
    let TrafficResponse { champion, before, previous, ended } = *answer;
    output.line(match (before, ended) {
        (_, ended) if ended > 0 => format!(
            "{model}: the rollout of version {ended} has ended, and all traffic goes to version {champion}; once more goes \
             back to the champion before"
        ),
        (before, _) if before == champion => format!("{model}: version {champion} had the traffic already"),
        (0, _) => format!("{model}: the traffic goes to version {champion}"),
        (before, _) => format!("{model}: the traffic goes to version {champion}, before to {before}"),
    });
    output.json(&json!({"model": model, "champion": champion, "before": before, "previous": previous, "ended": ended}));
}

async fn change(
    place: &Place,
    model: &str,
    change: Change,
    features: &[String],
    said: &Said,
    output: &Output,
) -> Result<(), CliError> {
    let server = Server::of(place, &said.server, output).await?;
    let request = ChangeRolloutRequest {
        project: server.project.clone(),
        model: model.to_owned(),
        change: change as i32,
        features: features.to_vec(),
        who: who(said.who.as_deref()),
        why: said.why.clone(),
    };
    let answer = server.control().change_rollout(request).await.map_err(|status| server.failed(status))?.into_inner();
    let report = read(&answer.report);
    let champion = report["champion"]["version"].as_u64().unwrap_or(0);
    let already = if answer.existed { " already" } else { "" };
    output.line(match change {
        Change::Off => format!("{model}: off{already}; the declared fallback answers everybody"),
        Change::On => format!("{model}: on{already}; version {champion} answers"),
        Change::Hold => format!("{model}: held{already}; `coeval rollout resume {model}` lets it go on"),
        Change::Resume => format!("{model}: goes on{already}"),
        Change::Acknowledge => format!("{model}: acknowledged{already}: {}", features.join(", ")),
        Change::Advance => match report["running"]["stage"].as_str() {
            Some(stage) => format!("{model}: the rollout is at {stage}"),
            None => format!("{model}: the rollout is over; version {champion} has the traffic"),
        },
        Change::End | Change::Unspecified => format!("{model}: the rollout has ended{already}"),
    });
    output.json(
        &json!({"model": model, "control_entry": answer.control_entry, "existed": answer.existed, "report": report}),
    );
    Ok(())
}
