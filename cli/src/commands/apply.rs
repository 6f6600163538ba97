//! `coeval apply`: puts the definitions in force. It never moves traffic, and it needs no server: servers follow the log.

use std::time::Duration;

use proto::v1::{RefreshRequest, RefreshResponse};
use registry::Outcome;
use registry::state::Change;
use serde::Serialize;

use crate::commands::plan::Difference;
use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, Project, project_name, registry_catalog, who};
use crate::server::{Server, ServerError, address};

/// Between two looks at a backfill.
const POLL: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Args)]
pub struct ApplyArguments {
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    why: Option<String>,
    /// Who, for the audit trail; without it, the account that runs this
    #[arg(long, value_name = "NAME")]
    who: Option<String>,
    /// Do not wait until a running server has backfilled what is new
    #[arg(long)]
    no_wait: bool,
    /// The server to tell, as HOST:PORT; without it, the `serve.grpc` of the settings
    #[arg(long, value_name = "URL", env = "COEVAL_SERVER")]
    server: Option<String>,
}

#[derive(Debug, Serialize)]
struct Applied<'a> {
    entry: u64,
    /// False when the definitions in force were these already.
    changed: bool,
    #[serde(flatten)]
    difference: &'a Difference,
    server: ServerAnswer,
}

#[derive(Debug, Serialize)]
struct ServerAnswer {
    /// None where none was told.
    address: Option<String>,
    ready: bool,
    reasons: Vec<String>,
}

pub async fn run(place: &Place, arguments: &ApplyArguments, output: &Output) -> Result<(), CliError> {
    let project = Project::read(place)?;
    let checked = project.checked(output).await?;
    let catalog = registry_catalog(&project, &checked)?;
    let name = project_name(&checked.settings)?;
    let registry = place.registry(&checked.settings).await?;
    let state = registry.state();
    let applied = state.project(name.as_str()).map(|known| (known.applied.fact.entry.0, &known.applied.catalog));
    let difference = Difference::new(&project, &checked, applied)?;
    let author = who(arguments.who.as_deref());
    let receipt = registry.submit(&name, &Change::Apply(catalog), &author, arguments.why.as_deref()).await?;

    difference.show(output);
    let changed = receipt.outcome == Outcome::Appended;
    if changed {
        output.line(format!("applied as entry {} by {author}", receipt.entry));
    } else {
        output.line(format!("nothing to do: entry {} put just this in force", receipt.entry));
    }
    let given = arguments.server.as_deref();
    let server = match address(given, &checked.settings.serve.grpc) {
        // A server that chooses its own port reads the log by itself.
        Err(ServerError::NoPort { .. }) if given.is_none() => None,
        Err(error) => return Err(error.into()),
        Ok(address) => match Server::connect(address, name.to_string()).await {
            Ok(server) => Some(server),
            Err(error) if given.is_some() => return Err(error.into()),
            Err(_) => None,
        },
    };
    let answer = match server {
        None => {
            output.line("no server was told; `coeval serve` starts with this, and a running one follows the log");
            ServerAnswer { address: None, ready: false, reasons: Vec::new() }
        }
        Some(server) => follow(&server, receipt.entry.0, arguments, output).await?,
    };
    output.json(&Applied { entry: receipt.entry.0, changed, difference: &difference, server: answer });
    Ok(())
}

/// Has the server read the log now, and waits for its backfills.
async fn follow(
    server: &Server,
    entry: u64,
    arguments: &ApplyArguments,
    output: &Output,
) -> Result<ServerAnswer, CliError> {
    let address = server.address.clone();
    let mut answer = match refresh(server, entry).await {
        Ok(answer) => answer,
        // Without being asked for, a server that serves something else is no failure of `apply`.
        Err(error) if arguments.server.is_none() => {
            output.note(format!("note: {error}"));
            return Ok(ServerAnswer { address: None, ready: false, reasons: Vec::new() });
        }
        Err(error) => return Err(error.into()),
    };
    let spinner = output.waiting();
    while !answer.ready && !arguments.no_wait {
        spinner.set_message(format!("{address}: {}", answer.reasons.join("; ")));
        tokio::time::sleep(POLL).await;
        answer = refresh(server, entry).await?;
    }
    spinner.finish_and_clear();
    if answer.ready {
        output.line(format!("the server at {address} serves it"));
    } else {
        output.line(format!("the server at {address} follows: {}", answer.reasons.join("; ")));
    }
    Ok(ServerAnswer { address: Some(address), ready: answer.ready, reasons: answer.reasons })
}

async fn refresh(server: &Server, at_least: u64) -> Result<RefreshResponse, ServerError> {
    let request = RefreshRequest { project: server.project.clone(), at_least };
    let answer = server.control().refresh(request).await.map_err(|status| server.failed(status))?;
    Ok(answer.into_inner())
}
