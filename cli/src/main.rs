//! The `coeval` command.
//!
//! A thin shell: definitions are judged by `feature-defs`, facts are written through `registry`, everything else is asked
//! of a running server, which `coeval serve` is. Data goes to standard output, and with `--json` nothing else does; notes,
//! progress and errors go to standard error. The exit status is 0 when it worked, 1 when something is wrong, 2 when the
//! command was not understood.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};

mod error;
mod output;

mod project;
mod server;

mod columns;
mod histogram;
mod rows;
mod tables;
mod times;

mod commands;

use commands::*;
use error::CliError;
use output::Output;

#[derive(Debug, Parser)]
#[command(name = "coeval", version)]
#[command(about = "Feature store and inference gateway in which training and serving see the same values")]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// The project's folder, where coeval.yaml is
    #[arg(short = 'C', long, global = true, value_name = "DIR", default_value = ".")]
    project_dir: PathBuf,
    /// The environment: coeval.NAME.yaml is laid over coeval.yaml
    #[arg(long, global = true, value_name = "NAME", env = "COEVAL_ENV")]
    env: Option<String>,
    /// Print JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    /// When to use colours
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value = "auto")]
    color: ColorWhen,
    /// Say more; twice for debugging
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ColorWhen {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a small project in the project folder
    Init(init::InitArguments),
    /// Check settings, definitions and the files of sources
    Validate,
    /// Show what `apply` would change
    Plan,
    /// Put the definitions in force
    Apply(apply::ApplyArguments),
    /// Run the server
    Serve(serve::ServeArguments),
    /// Push rows of Parquet or CSV files to a stream source, or import a source's own files into a managed table
    Ingest(ingest::IngestArguments),
    /// Make rows of file sources visible online
    Materialize(materialize::MaterializeArguments),
    /// Sort and merge the files of managed tables
    Compact(compact::CompactArguments),
    /// Remove an entity from everything that is kept, and hide it from then on
    Forget(forget::ForgetArguments),
    /// Features as they are served
    #[command(subcommand)]
    Features(features::FeaturesCommand),
    /// Ask a model
    Predict(predict::PredictArguments),
    /// Training sets that are kept
    #[command(subcommand)]
    Dataset(dataset::DatasetCommand),
    /// Why one value of a training set is what it is: which rows of the sources made it
    Explain(explain::ExplainArguments),
    /// Whether what was served is what the same code says offline
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Model versions
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Which version of a model has the traffic
    #[command(subcommand)]
    Rollout(rollout::RolloutCommand),
    /// Values that are switched without a deploy
    #[command(subcommand)]
    Flag(Box<flag::FlagCommand>),
    /// What became of predictions, and how good they were
    #[command(subcommand)]
    Labels(labels::LabelsCommand),
    /// Whether what is served looks like what was trained on
    #[command(subcommand)]
    Drift(drift::DriftCommand),
    /// Check that everything the project needs is there
    Doctor,
}

/// Decoding files allocates and frees buffers of megabytes. The system's allocator gives each of them back to the kernel,
/// and asking for fresh pages again took a quarter of a point-in-time join.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let Arguments { global, command } = Arguments::parse();
    let output = Output::new(global.json, global.color, global.verbose);
    let place = project::Place { folder: global.project_dir, environment: global.env };
    match run(command, &place, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            error.exit_code()
        }
    }
}

fn run(command: Command, place: &project::Place, output: &Output) -> Result<(), CliError> {
    if let Command::Serve(_) = command {
        serve::log_to_standard_error(output);
    } else if output.verbosity() > 0 {
        serve::log_with(output, if output.verbosity() > 1 { "debug" } else { "info" });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::Io { what: "could not start the runtime".to_owned(), source })?;
    runtime.block_on(async {
        match command {
            Command::Init(arguments) => init::run(place, &arguments, output),
            Command::Validate => validate::run(place, output).await,
            Command::Plan => plan::run(place, output).await,
            Command::Apply(arguments) => apply::run(place, &arguments, output).await,
            Command::Serve(arguments) => serve::run(place, &arguments, output).await,
            Command::Ingest(arguments) => ingest::run(place, &arguments, output).await,
            Command::Materialize(arguments) => materialize::run(place, &arguments, output).await,
            Command::Compact(arguments) => compact::run(place, &arguments, output).await,
            Command::Forget(arguments) => forget::run(place, &arguments, output).await,
            Command::Features(command) => features::run(place, &command, output).await,
            Command::Predict(arguments) => predict::run(place, &arguments, output).await,
            Command::Dataset(command) => dataset::run(place, &command, output).await,
            Command::Audit(command) => audit::run(place, &command, output).await,
            Command::Explain(arguments) => explain::run(place, &arguments, output).await,
            Command::Model(command) => model::run(place, &command, output).await,
            Command::Rollout(command) => rollout::run(place, &command, output).await,
            Command::Flag(command) => flag::run(place, &command, output).await,
            Command::Labels(command) => labels::run(place, &command, output).await,
            Command::Drift(command) => drift::run(place, &command, output).await,
            Command::Doctor => doctor::run(place, output).await,
        }
    })
}

#[cfg(test)]
mod tests;
