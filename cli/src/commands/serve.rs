//! `coeval serve`: the server, from start to drained.
//!
//! The first SIGTERM or ctrl-C lets what is in flight finish and ends with status 0; the second ends at once with 1.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use gateway::config::ServeOptions;
use gateway::roles::Roles;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;
use crate::times;

/// The variable that says what is logged, as `info` or `gateway=debug,info`.
const LOG_VARIABLE: &str = "COEVAL_LOG";

#[derive(Debug, clap::Args)]
pub struct ServeArguments {
    /// Write the addresses here, as JSON, once the server listens
    #[arg(long, value_name = "PATH")]
    ready_file: Option<PathBuf>,
    /// What this process does: some of `gateway` (answers requests), `ingest` (takes events, writes the stores) and `offline`
    /// (training sets, audits), with commas between them. Several gateways share a project over Redis
    #[arg(long, value_name = "ROLES", default_value = "all")]
    roles: Roles,
}

/// What the ready file says.
#[derive(Debug, Serialize)]
struct Ready {
    grpc: String,
    http: String,
    pid: u32,
}

pub async fn run(place: &Place, arguments: &ServeArguments, output: &Output) -> Result<(), CliError> {
    // Before anything is opened, so that no signal finds the process half started and without a handler.
    let mut signals = Signals::new()?;
    let options = ServeOptions {
        settings: place.settings(output)?,
        roles: arguments.roles,
        project_dir: place.folder.clone(),
        clock: Arc::new(times::now),
        runtime: None,
        certifier: Some(certifier()?),
    };
    let running = tokio::select! {
        running = gateway::run::serve(options) => running?,
        name = signals.next() => {
            tracing::info!("{name} before the server was up: nothing to drain");
            return Ok(());
        }
    };
    let ready =
        Ready { grpc: running.grpc_addr.to_string(), http: running.http_addr.to_string(), pid: std::process::id() };
    let shutdown = running.shutdown_handle();
    let signalled = tokio::select! {
        () = running.started() => None,
        name = signals.next() => Some(name),
    };
    let mut ended = pin!(running.wait());
    let name = match signalled {
        Some(name) => name,
        None => {
            if let Some(path) = &arguments.ready_file {
                write_whole(path, &ready)?;
            }
            output.json(&ready);
            tokio::select! {
                // A part that fails takes the rest with it, in order.
                ended = &mut ended => return Ok(ended?),
                name = signals.next() => name,
            }
        }
    };
    tracing::info!("{name}: draining; once more ends at once");
    if let Some(path) = &arguments.ready_file {
        // Whoever waits for the file must not take a draining server for a ready one.
        let _ = std::fs::remove_file(path);
    }
    shutdown.shut_down();
    tokio::select! {
        ended = &mut ended => ended?,
        name = signals.next() => {
            tracing::warn!("{name} again: ending without draining");
            std::process::exit(1);
        }
    }
    Ok(())
}

/// This very binary, also when the file it was started from has been replaced since: what measures a model is to be what
/// serves it.
fn certifier() -> Result<PathBuf, CliError> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() {
        // Of this process, not of the child that reads it.
        return Ok(PathBuf::from(format!("/proc/{}/exe", std::process::id())));
    }
    std::env::current_exe()
        .map_err(|source| CliError::Io { what: "could not find the binary to measure models with".to_owned(), source })
}

/// Whole or not at all: a reader that polls never sees half of it.
fn write_whole(path: &Path, ready: &Ready) -> Result<(), CliError> {
    let failed = |source| CliError::Io { what: format!("could not write the ready file {}", path.display()), source };
    let text = serde_json::to_string(ready).expect("addresses are texts");
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", ready.pid));
    let beside = PathBuf::from(beside);
    std::fs::write(&beside, text).map_err(failed)?;
    std::fs::rename(&beside, path).map_err(failed)
}

/// SIGTERM and ctrl-C.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, CliError> {
        let failed = |source| CliError::Io { what: "could not listen for signals".to_owned(), source };
        Ok(Signals {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// What the server says of itself: in full to a person, compact to a file.
pub fn log_to_standard_error(output: &Output) {
    log_with(output, if output.verbosity() > 0 { "debug" } else { "info" });
}

pub fn log_with(output: &Output, default: &str) {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|error| {
        if std::env::var_os(LOG_VARIABLE).is_some_and(|value| !value.is_empty()) {
            output.note(format!("note: {LOG_VARIABLE} is not understood ({error}); logging at {default}"));
        }
        // The libraries' own chatter explains nothing below `info`.
        EnvFilter::new(format!("{default},h2=info,hyper=info,tower=info"))
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let initialised = if std::io::stderr().is_terminal() {
        builder.with_ansi(output.has_color()).with_target(false).try_init()
    } else {
        builder.with_ansi(false).compact().try_init()
    };
    // Only a second subscriber could fail here, and then the first one logs.
    debug_assert!(initialised.is_ok());
}
