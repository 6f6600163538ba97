//! `coeval rollout`: which version has the traffic.

use proto::v1::{PromoteModelRequest, RollbackModelRequest, TrafficResponse};
use serde_json::json;

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, who};
use crate::server::{Server, ServerArguments};

#[derive(Debug, clap::Subcommand)]
pub enum RolloutCommand {
    /// Make an active version the champion: requests that name no version go to it
    Promote {
        model: String,
        version: u32,
        #[command(flatten)]
        said: Said,
    },
    /// Make the champion before the champion again, at once
    Rollback {
        model: String,
        #[command(flatten)]
        said: Said,
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

pub async fn run(place: &Place, command: &RolloutCommand, output: &Output) -> Result<(), CliError> {
    let (model, said) = match command {
        RolloutCommand::Promote { model, said, .. } | RolloutCommand::Rollback { model, said } => (model, said),
    };
    let server = Server::of(place, &said.server, output).await?;
    let (project, who, why) = (server.project.clone(), who(said.who.as_deref()), said.why.clone());
    let mut control = server.control();
    let answer = match command {
        RolloutCommand::Promote { version, .. } => {
            let request = PromoteModelRequest { project, model: model.clone(), version: *version, who, why };
            control.promote_model(request).await
        }
        RolloutCommand::Rollback { .. } => {
            control.rollback_model(RollbackModelRequest { project, model: model.clone(), who, why }).await
        }
    };
    let TrafficResponse { champion, before, previous } = answer.map_err(|status| server.failed(status))?.into_inner();
    output.line(match before {
        before if before == champion => format!("{model}: version {champion} had the traffic already"),
        0 => format!("{model}: the traffic goes to version {champion}"),
        before => format!("{model}: the traffic goes to version {champion}, before to {before}"),
    });
    output.json(&json!({"model": model, "champion": champion, "before": before, "previous": previous}));
    Ok(())
}
