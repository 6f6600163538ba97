//! `coeval model`: versions, from their file to the gateways. Traffic is `coeval rollout`.

use std::path::{Path, PathBuf};
use std::process::Command;

use inference::memory::shown;
use proto::v1::register_model_request::Part;
use proto::v1::{
    Approval, ApproveModelRequest, DeployModelRequest, GatewayVersion, ListModelsRequest, ModelHeader, ModelInfo,
    RegisterModelRequest, RetireModelRequest,
};
use serde_json::{Value as Json, json};

use crate::commands::certify;
use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, who};
use crate::server::{Server, ServerArguments, ServerError};

/// As much as one message may carry.
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Debug, clap::Subcommand)]
pub enum ModelCommand {
    /// Make a file the next version of a model; traffic does not move
    Register(Box<RegisterArguments>),
    /// Measure in a process of its own what a file takes in time and memory as a model of this project, and say whether it
    /// fits this machine
    Certify {
        /// A model of the project's definitions
        model: String,
        /// The model file: TorchScript
        file: PathBuf,
    },
    /// What `certify` runs in its own process: a job on standard input, steps on standard output
    #[command(hide = true)]
    CertifyHere,
    /// Have every gateway load a version, measure it and compare it with its golden rows. Traffic does not move, unless the model
    /// has none yet; `coeval rollout promote` moves it
    Deploy {
        model: String,
        version: u32,
        /// Why, for the audit trail
        #[arg(long, value_name = "TEXT")]
        why: String,
        /// Who, for the audit trail; without it, the account that runs this
        #[arg(long, value_name = "NAME")]
        who: Option<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Take a version off the gateways; not the one that has the traffic
    Retire {
        model: String,
        version: u32,
        /// Also the version that a rollback goes back to
        #[arg(long)]
        force: bool,
        /// Why, for the audit trail
        #[arg(long, value_name = "TEXT")]
        why: String,
        /// Who, for the audit trail; without it, the account that runs this
        #[arg(long, value_name = "NAME")]
        who: Option<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Record that a version may be served
    Approve {
        model: String,
        version: u32,
        /// Why, for the audit trail
        #[arg(long, value_name = "TEXT")]
        why: String,
        /// Who, for the audit trail; without it, the account that runs this
        #[arg(long, value_name = "NAME")]
        who: Option<String>,
        #[command(flatten)]
        server: ServerArguments,
    },
    /// Every version of every model
    List(ServerArguments),
    /// The whole record of a version
    Show {
        model: String,
        /// Without it, the champion, else the newest
        version: Option<u32>,
        #[command(flatten)]
        server: ServerArguments,
    },
}

#[derive(Debug, clap::Args)]
pub struct RegisterArguments {
    model: String,
    /// The model file: TorchScript
    file: PathBuf,
    /// Who trained it; without it, the account that runs this
    #[arg(long, value_name = "NAME")]
    author: Option<String>,
    /// The git commit of the training code; without it, that of the project folder
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,
    /// A digest of the training environment: of its lock file, or of its image
    #[arg(long, value_name = "DIGEST", default_value = "unrecorded")]
    environment_digest: String,
    /// The seed of the training
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What it was trained on
    #[arg(long, value_name = "TEXT", default_value = "unrecorded")]
    hardware: String,
    /// A library and its version; may be repeated
    #[arg(long = "library", value_name = "NAME=VERSION", value_parser = pair)]
    libraries: Vec<(String, String)>,
    /// The dataset it was trained on, by id or name
    #[arg(long, value_name = "DATASET")]
    dataset: Option<String>,
    /// Rows of inputs with the outputs that the training process got: Arrow IPC with `input:<name>` and `output:<name>` columns,
    /// as the Python client writes it (`coeval.Golden`)
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// A metric on held-out rows; may be repeated
    #[arg(long = "metric", value_name = "NAME=NUMBER", value_parser = metric)]
    pub metrics: Vec<(String, f64)>,
    /// How much the model leans on a feature, for summing up drift; may be repeated
    #[arg(long = "importance", value_name = "FEATURE=NUMBER", value_parser = metric)]
    pub importances: Vec<(String, f64)>,
    #[command(flatten)]
    server: ServerArguments,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

fn metric(text: &str) -> Result<(String, f64), String> {
    let (name, value) = pair(text)?;
    match value.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok((name, number)),
        _ => Err(format!("`{value}` is not a finite number")),
    }
}

pub async fn run(place: &Place, command: &ModelCommand, output: &Output) -> Result<(), CliError> {
    match command {
        ModelCommand::Register(arguments) => register(place, arguments, output).await,
        ModelCommand::Certify { model, file } => certify::run(place, model, file, output).await,
        ModelCommand::CertifyHere => certify::here(),
        ModelCommand::Deploy { model, version, why, who: given, server } => {
            let server = Server::of(place, server, output).await?;
            let request = DeployModelRequest {
                project: server.project.clone(),
                model: model.clone(),
                version: *version,
                who: who(given.as_deref()),
                why: why.clone(),
            };
            let waiting = output.waiting();
            waiting.set_message(format!("the gateways measure, load and check {model} version {version}"));
            let answer = server.control().deploy_model(request).await.map_err(|status| server.failed(status));
            waiting.finish_and_clear();
            let answer = answer?.into_inner();
            let version = answer.version;
            output.line(match (answer.existed, answer.champion) {
                (true, champion) if champion == version => format!("{model}: version {version} had the traffic already"),
                (true, _) => format!("{model}: version {version} was active already; requests that name it are answered"),
                (false, champion) if champion == version => format!("{model}: version {version} is the first, and has the traffic"),
                (false, champion) => format!(
                    "{model}: version {version} is active on every gateway, and answers requests that name it; the traffic goes to \
                     version {champion}"
                ),
            });
            answer.notes.iter().for_each(|note| output.note(format!("note: {note}")));
            if answer.champion != version {
                output.line(format!("`coeval rollout promote {model} {version} --why ...` moves the traffic to it"));
            }
            output.json(&json!({
                "model": model,
                "version": version,
                "champion": answer.champion,
                "existed": answer.existed,
                "notes": answer.notes,
                "gateways": answer.gateways.iter().map(gateway_json).collect::<Vec<_>>(),
            }));
            Ok(())
        }
        ModelCommand::Retire { model, version, force, why, who: given, server } => {
            let server = Server::of(place, server, output).await?;
            let request = RetireModelRequest {
                project: server.project.clone(),
                model: model.clone(),
                version: *version,
                force: *force,
                who: who(given.as_deref()),
                why: why.clone(),
            };
            let answer = server.control().retire_model(request).await.map_err(|status| server.failed(status))?;
            output.line(format!("{model}: version {version} is on no gateway any more"));
            let entry = answer.into_inner().control_entry;
            output.json(&json!({"model": model, "version": version, "control_entry": entry}));
            Ok(())
        }
        ModelCommand::Approve { model, version, why, who: given, server } => {
            let server = Server::of(place, server, output).await?;
            let who = who(given.as_deref());
            let request = ApproveModelRequest {
                project: server.project.clone(),
                model: model.clone(),
                version: *version,
                who: who.clone(),
                why: why.clone(),
            };
            let answer = server.control().approve_model(request).await.map_err(|status| server.failed(status))?;
            output.line(format!("{model}: version {version} is approved by {who}"));
            let entry = answer.into_inner().control_entry;
            output.json(&json!({"model": model, "version": version, "who": who, "control_entry": entry}));
            Ok(())
        }
        ModelCommand::List(arguments) => {
            let server = Server::of(place, arguments, output).await?;
            let models = list(&server).await?;
            let rows: Vec<Vec<String>> = models
                .iter()
                .map(|model| {
                    let metrics = named(&model.metrics);
                    vec![
                        model.name.clone(),
                        model.version.to_string(),
                        model.state.clone(),
                        model.service.clone(),
                        model.registered_at.clone(),
                        metrics,
                    ]
                })
                .collect();
            output.table(&["MODEL", "VERSION", "STATE", "SERVICE", "REGISTERED", "METRICS"], &rows);
            output.json(&models.iter().map(as_json).collect::<Vec<_>>());
            Ok(())
        }
        ModelCommand::Show { model, version, server } => {
            let server = Server::of(place, server, output).await?;
            let models = list(&server).await?;
            show(find(&models, model, *version)?, output);
            Ok(())
        }
    }
}

async fn list(server: &Server) -> Result<Vec<ModelInfo>, ServerError> {
    let request = ListModelsRequest { project: server.project.clone() };
    let answer = server.control().list_models(request).await.map_err(|status| server.failed(status))?;
    let mut models = answer.into_inner().models;
    models.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
    Ok(models)
}

fn find<'a>(models: &'a [ModelInfo], name: &str, version: Option<u32>) -> Result<&'a ModelInfo, CliError> {
    let versions: Vec<&ModelInfo> = models.iter().filter(|model| model.name == name).collect();
    if versions.is_empty() {
        let mut known: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        known.dedup();
        return Err(CliError::unknown("registered model", name, known));
    }
    let found = match version {
        Some(version) => versions.iter().find(|model| model.version == version),
        None => versions.iter().find(|model| model.state == "champion").or(versions.last()),
    };
    found.copied().ok_or_else(|| {
        let known: Vec<String> = versions.iter().map(|model| model.version.to_string()).collect();
        let version = version.map(|version| version.to_string()).unwrap_or_default();
        CliError::unknown("version", &format!("{name} {version}"), known.iter().map(String::as_str))
    })
}

fn show(model: &ModelInfo, output: &Output) {
    output.line(format!("{} version {}, {}", model.name, model.version, model.state));
    let libraries: Vec<String> = model.libraries.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let facts = [
        ("digest", model.digest.clone()),
        ("service", format!("{} {}", model.service, model.service_digest)),
        ("dataset", model.dataset.clone()),
        ("metrics", named(&model.metrics)),
        ("author", model.author.clone()),
        ("registered", model.registered_at.clone()),
        ("commit", model.commit.clone()),
        ("environment", model.environment_digest.clone()),
        ("hardware", model.hardware.clone()),
        ("libraries", libraries.join(", ")),
        ("seed", model.seed.map(|seed| seed.to_string()).unwrap_or_default()),
        ("golden rows", model.golden_digest.clone()),
        ("given up", model.given_up.clone()),
    ];
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        output.line(format!("  {name:<11}  {value}"));
    }
    for Approval { who, why, at } in &model.approvals {
        output.line(format!("  {:<11}  {who} at {at}: {why}", "approved"));
    }
    for gateway in &model.gateways {
        let name = if gateway.address.is_empty() { &gateway.gateway } else { &gateway.address };
        let mut line = format!("  {:<11}  {name}: {}", "gateway", gateway.state);
        if gateway.state == "ready" {
            line += &format!(", {}, batches of at most {}", shown(gateway.memory_bytes), gateway.max_rows);
        }
        if !gateway.reason.is_empty() {
            line += &format!(": {}", gateway.reason);
        }
        output.line(line);
        gateway.notes.iter().for_each(|note| output.line(format!("  {:<11}    {note}", "")));
    }
    output.json(&as_json(model));
}

fn gateway_json(gateway: &GatewayVersion) -> Json {
    json!({
        "gateway": gateway.gateway,
        "address": gateway.address,
        "state": gateway.state,
        "reason": gateway.reason,
        "notes": gateway.notes,
        "memory_bytes": gateway.memory_bytes,
        "max_rows": gateway.max_rows,
    })
}

fn named(metrics: &std::collections::HashMap<String, f64>) -> String {
    let mut parts: Vec<String> = metrics.iter().map(|(name, value)| format!("{name} {value}")).collect();
    parts.sort();
    parts.join(", ")
}

fn approval(approval: &Approval) -> Json {
    json!({"who": approval.who, "why": approval.why, "at": approval.at})
}

fn as_json(model: &ModelInfo) -> Json {
    json!({
        "name": model.name,
        "version": model.version,
        "state": model.state,
        "approvals": model.approvals.iter().map(approval).collect::<Vec<_>>(),
        "golden_digest": model.golden_digest,
        "given_up": model.given_up,
        "gateways": model.gateways.iter().map(gateway_json).collect::<Vec<_>>(),
        "digest": model.digest,
        "service": model.service,
        "service_digest": model.service_digest,
        "dataset": model.dataset,
        "metrics": model.metrics,
        "author": model.author,
        "registered_at": model.registered_at,
        "commit": model.commit,
        "environment_digest": model.environment_digest,
        "hardware": model.hardware,
        "libraries": model.libraries,
        "seed": model.seed,
    })
}

async fn register(place: &Place, arguments: &RegisterArguments, output: &Output) -> Result<(), CliError> {
    let path = &arguments.file;
    let bytes = std::fs::read(path)
        .map_err(|source| CliError::Io { what: format!("could not read {}", path.display()), source })?;
    let golden = match &arguments.golden {
        Some(path) => std::fs::read(path)
            .map_err(|source| CliError::Io { what: format!("could not read {}", path.display()), source })?,
        None => Vec::new(),
    };
    let server = Server::of(place, &arguments.server, output).await?;
    let header = ModelHeader {
        project: server.project.clone(),
        model: arguments.model.clone(),
        author: who(arguments.author.as_deref()),
        commit: arguments.commit.clone().or_else(|| commit(&place.folder)).unwrap_or_else(|| "unrecorded".to_owned()),
        environment_digest: arguments.environment_digest.clone(),
        seed: arguments.seed,
        hardware: arguments.hardware.clone(),
        libraries: arguments.libraries.iter().cloned().collect(),
        dataset: arguments.dataset.clone().unwrap_or_default(),
        metrics: arguments.metrics.iter().cloned().collect(),
        importances: arguments.importances.iter().cloned().collect(),
    };
    let bar = output.progress(Some(bytes.len() as u64), "bytes");
    bar.set_message(format!("{}", path.display()));
    let sent = bar.clone();
    let chunks = bytes.chunks(CHUNK_BYTES).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let golden = golden.chunks(CHUNK_BYTES).map(|chunk| Part::GoldenChunk(chunk.to_vec())).collect::<Vec<_>>();
    let parts = std::iter::once(Part::Header(header)).chain(chunks.into_iter().map(Part::Chunk)).chain(golden);
    let parts = parts.map(move |part| {
        if let Part::Chunk(bytes) = &part {
            sent.inc(bytes.len() as u64);
        }
        RegisterModelRequest { part: Some(part) }
    });
    let answer = server.control().register_model(tokio_stream::iter(parts)).await;
    bar.finish_and_clear();
    let answer = answer.map_err(|status| server.failed(status))?.into_inner();
    let (model, version) = (&arguments.model, answer.version);
    if answer.existed {
        output.line(format!("{model}: this file is version {version} already"));
    } else {
        output.line(format!("{model}: version {version}, digest {}", answer.digest));
    }
    output.line(format!("`coeval model deploy {model} {version} --why ...` brings it to the gateways"));
    output.json(&json!({"model": model, "version": version, "digest": answer.digest, "existed": answer.existed}));
    Ok(())
}

/// The commit that a folder is at; None without git.
fn commit(folder: &Path) -> Option<String> {
    let answer = Command::new("git").arg("-C").arg(folder).args(["rev-parse", "HEAD"]).output().ok()?;
    let text = String::from_utf8(answer.stdout).ok()?;
    answer.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
}
