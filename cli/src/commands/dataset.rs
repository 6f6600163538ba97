//! `coeval dataset`: training sets that the server keeps.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use arrow_flight::FlightDescriptor;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use clap::ValueEnum;
use feature_defs::catalog::Visibility;
use feature_defs::value::Type;
use futures::{StreamExt, TryStreamExt};
use offline_store::dataset::Manifest;
use offline_store::point_in_time::SourceReport;
use prost::Message;
use proto::v1::{DatasetInfo, DatasetTicket, ListDatasetsRequest, TrainingSetCommand};
use serde_json::{Value as Json, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::Place;
use crate::server::{Server, ServerArguments, ServerError};
use crate::tables;

const EVENT_TIMESTAMP: &str = "event_timestamp";
const BATCH_ROWS: usize = 8_192;
const BATCHES_AHEAD: usize = 4;
/// Batches of a training set are as large as the server makes them; this only bounds a mistake.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

#[derive(Debug, clap::Subcommand)]
pub enum DatasetCommand {
    /// Make a training set of a spine and keep it
    Create(CreateArguments),
    /// Every training set that is kept
    List(ServerArguments),
    /// One of them
    Show {
        /// Its id, or its name: then the newest
        dataset: String,
        #[command(flatten)]
        server: ServerArguments,
    },
}

#[derive(Debug, clap::Args)]
pub struct CreateArguments {
    /// The name to keep it under
    name: String,
    /// The feature service
    #[arg(long, value_name = "NAME")]
    service: String,
    /// A Parquet or CSV file with keys, request fields and `event_timestamp`
    #[arg(long, value_name = "FILE")]
    spine: PathBuf,
    /// Add a `<feature>__status` column for each feature
    #[arg(long)]
    statuses: bool,
    /// Which rows of sources a training row may see
    #[arg(long, value_enum, default_value = "known")]
    visibility: VisibilityChoice,
    /// Recorded with the dataset
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum VisibilityChoice {
    Known,
    EventTime,
    Ingested,
}

impl VisibilityChoice {
    pub fn rule(self) -> Visibility {
        match self {
            VisibilityChoice::Known => Visibility::Known,
            VisibilityChoice::EventTime => Visibility::EventTime,
            VisibilityChoice::Ingested => Visibility::Ingested,
        }
    }
}

/// What the server says of the training set that it has kept.
#[derive(Debug, serde::Deserialize)]
struct Stored {
    id: String,
    #[serde(default)]
    existed: bool,
}

/// How much a command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It was made just now.
    Created,
    /// It was asked for and found.
    Existed,
}

pub async fn run(place: &Place, command: &DatasetCommand, output: &Output) -> Result<(), CliError> {
    match command {
        DatasetCommand::Create(arguments) => create(place, arguments, output).await,
        DatasetCommand::List(arguments) => {
            let server = Server::of(place, arguments, output).await?;
            let datasets = list(&server).await?;
            let rows: Vec<Vec<String>> = datasets
                .iter()
                .map(|d| {
                    vec![d.name.clone(), d.id.clone(), d.service.clone(), d.rows.to_string(), d.created_at.clone()]
                })
                .collect();
            output.table(&["NAME", "ID", "SERVICE", "ROWS", "CREATED"], &rows);
            output.json(&datasets.iter().map(as_json).collect::<Vec<_>>());
            Ok(())
        }
        DatasetCommand::Show { dataset, server } => {
            let server = Server::of(place, server, output).await?;
            let datasets = list(&server).await?;
            let by_id = datasets.iter().find(|known| known.id == *dataset);
            match by_id.or_else(|| newest(&datasets, dataset)) {
                Some(found) => {
                    show(found, &manifest(&server, found).await?, None, output);
                    Ok(())
                }
                None => Err(CliError::unknown("dataset", dataset, datasets.iter().map(|d| d.name.as_str()))),
            }
        }
    }
}

async fn list(server: &Server) -> Result<Vec<DatasetInfo>, ServerError> {
    let request = ListDatasetsRequest { project: server.project.clone() };
    let answer = server.control().list_datasets(request).await.map_err(|status| server.failed(status))?;
    Ok(answer.into_inner().datasets)
}

/// Times are RFC 3339 in UTC, so their texts are in their order.
fn newest<'a>(datasets: &'a [DatasetInfo], name: &str) -> Option<&'a DatasetInfo> {
    datasets.iter().filter(|known| known.name == name).max_by(|a, b| a.created_at.cmp(&b.created_at))
}

/// What lies beside the dataset's rows.
async fn manifest(server: &Server, dataset: &DatasetInfo) -> Result<Manifest, ServerError> {
    let ticket = DatasetTicket {
        project: server.project.clone(),
        name: dataset.name.clone(),
        id: dataset.id.clone(),
        ..DatasetTicket::default()
    };
    let descriptor = FlightDescriptor::new_cmd(ticket.encode_to_vec());
    let mut client = FlightServiceClient::new(server.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let info = client.get_flight_info(descriptor).await.map_err(|status| server.failed(status))?.into_inner();
    serde_json::from_slice(&info.app_metadata).map_err(|error| {
        let message = format!("the manifest of dataset `{}` cannot be read: {error}", dataset.id);
        ServerError::Refused { address: server.address.clone(), code: "data loss", message }
    })
}

fn show(dataset: &DatasetInfo, manifest: &Manifest, origin: Option<Origin>, output: &Output) {
    output.line(format!("{} {}", dataset.name, dataset.id));
    if origin == Some(Origin::Existed) {
        output.line("  these inputs were asked for before: this is the dataset they gave, nothing was computed");
    }
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    output.line(format!("  rows      {}", manifest.rows));
    for redacted in &manifest.redacted {
        let (rows, entity, at) = (counted(redacted.rows as usize, "row"), &redacted.entity, &redacted.at);
        output.line(format!("  redacted  {rows} of a forgotten `{entity}` ({}), {at}", &redacted.key[..12]));
    }
    output.line(format!("  parts     {}, {:.1} MiB", manifest.files.len(), bytes as f64 / f64::from(1 << 20)));
    output.line(format!("  service   {} {}", dataset.service, dataset.service_digest));
    output.line(format!("  seed      {}", manifest.seed));
    output.line(format!("  location  {}", dataset.location));
    output.line(format!("  created   {}", dataset.created_at));
    output.line(format!("  visible   {}", manifest.visibility));
    for report in &manifest.known_at {
        output.line(format!("  source    {}", hidden(report)));
    }
    if origin.is_none() {
        let parts: Vec<Vec<String>> = manifest
            .files
            .iter()
            .map(|file| vec![file.path.clone(), file.rows.to_string(), file.bytes.to_string()])
            .collect();
        output.table(&["PART", "ROWS", "BYTES"], &parts);
    }
    output.json(&as_json_with(dataset, manifest, origin));
}

/// What a source's known-at rule did, in words.
fn hidden(report: &SourceReport) -> String {
    let reasons = [
        (report.hidden_by_created_time, "created later"),
        (report.hidden_by_delay, "by its delay"),
        (report.hidden_by_every, "by its grid"),
        (report.hidden_by_arrival, "arrived later"),
    ];
    let reasons: Vec<String> =
        reasons.iter().filter(|(rows, _)| *rows > 0).map(|(rows, why)| format!("{rows} {why}")).collect();
    let verb = if report.enforced { "hidden" } else { "would have been hidden" };
    let why = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    format!("{}: {} of {} rows {verb} from some training row{why}", report.source, report.hidden, report.rows)
}

fn as_json(dataset: &DatasetInfo) -> Json {
    json!({
        "name": dataset.name,
        "id": dataset.id,
        "service": dataset.service,
        "service_digest": dataset.service_digest,
        "rows": dataset.rows,
        "location": dataset.location,
        "created_at": dataset.created_at,
    })
}

fn as_json_with(dataset: &DatasetInfo, manifest: &Manifest, origin: Option<Origin>) -> Json {
    let mut json = as_json(dataset);
    json["visibility"] = manifest.visibility.clone().into();
    json["seed"] = manifest.seed.into();
    json["parts"] = json!(manifest.files);
    json["rows"] = manifest.rows.into();
    json["redacted"] = json!(manifest.redacted);
    json["known_at"] = json!(manifest.known_at);
    json["profile"] = json!(manifest.profile);
    if let Some(origin) = origin {
        json["existed"] = (origin == Origin::Existed).into();
    }
    json
}

async fn create(place: &Place, arguments: &CreateArguments, output: &Output) -> Result<(), CliError> {
    let server = Server::of(place, &arguments.server, output).await?;
    let service = server.service(&arguments.service).await?;
    let mut types: BTreeMap<String, Type> = server.types(&service.inputs)?.into_iter().collect();
    types.insert(EVENT_TIMESTAMP.to_owned(), Type::Timestamp);
    let spine = tables::open(&arguments.spine, &Arc::new(types), BATCH_ROWS)?;
    let needed = service.inputs.iter().filter(|input| !input.nullable).map(|input| input.name.as_str());
    spine.require(std::iter::once(EVENT_TIMESTAMP).chain(needed))?;

    let bar = output.progress(spine.rows, "rows");
    bar.set_message(arguments.name.clone());
    let (sender, receiver) = mpsc::channel(BATCHES_AHEAD);
    let reading = tokio::task::spawn_blocking(move || -> Result<(), CliError> {
        for batch in spine {
            if sender.blocking_send(Ok::<_, FlightError>(batch?)).is_err() {
                break;
            }
        }
        Ok(())
    });
    let command = TrainingSetCommand {
        project: server.project.clone(),
        service: service.name.clone(),
        dataset: arguments.name.clone(),
        statuses: arguments.statuses,
        visibility: match arguments.visibility {
            VisibilityChoice::Known => "known",
            VisibilityChoice::EventTime => "event_time",
            VisibilityChoice::Ingested => "ingested",
        }
        .to_owned(),
        seed: arguments.seed,
        ..TrainingSetCommand::default()
    };
    let exchanged = exchange(&server, &command, receiver, &bar).await;
    bar.finish_and_clear();
    // A spine that cannot be read ends the stream early; that is then the reason to tell.
    match reading.await {
        Ok(read) => read?,
        Err(_) => return Err(CliError::Failed("the reader of the spine broke; this is a bug".to_owned())),
    }
    let stored = exchanged?;
    let datasets = list(&server).await?;
    let by_id = datasets.iter().find(|known| stored.as_ref().is_some_and(|stored| stored.id == known.id));
    match by_id.or_else(|| newest(&datasets, &arguments.name)) {
        Some(dataset) => {
            let existed = stored.as_ref().is_some_and(|stored| stored.existed);
            let origin = if existed { Origin::Existed } else { Origin::Created };
            show(dataset, &manifest(&server, dataset).await?, Some(origin), output);
            Ok(())
        }
        None => Err(CliError::Failed(format!(
            "the server at {} made the training set `{}` and does not list it; see its log",
            server.address, arguments.name
        ))),
    }
}

/// Sends the spine and reads the training set to its end: the server keeps it only when it was read whole.
async fn exchange(
    server: &Server,
    command: &TrainingSetCommand,
    spine: mpsc::Receiver<Result<arrow::array::RecordBatch, FlightError>>,
    bar: &indicatif::ProgressBar,
) -> Result<Option<Stored>, ServerError> {
    let descriptor = FlightDescriptor::new_cmd(command.encode_to_vec());
    let encoder = FlightDataEncoderBuilder::new().with_flight_descriptor(Some(descriptor));
    // What comes from the channel is never an error, so nothing is left out here.
    let request = encoder.build(ReceiverStream::new(spine)).filter_map(async |data| data.ok());
    let mut client = FlightServiceClient::new(server.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let answer = client.do_exchange(request).await.map_err(|status| server.failed(status))?.into_inner();
    // The last message carries no batch but what was stored, and the decoder takes nothing else than batches.
    let last = Arc::new(Mutex::new(None));
    let seen = last.clone();
    let data = answer.try_filter_map(move |data| {
        let carries_data = !data.data_header.is_empty();
        if !carries_data && let Ok(mut last) = seen.lock() {
            *last = serde_json::from_slice::<Stored>(&data.app_metadata).ok();
        }
        std::future::ready(Ok(carries_data.then_some(data)))
    });
    let mut batches =
        FlightRecordBatchStream::new_from_flight_data(data.map_err(|status| FlightError::Tonic(Box::new(status))));
    while let Some(batch) = batches.next().await {
        match batch {
            Ok(batch) => bar.inc(batch.num_rows() as u64),
            Err(FlightError::Tonic(status)) => return Err(server.failed(*status)),
            Err(error) => {
                let address = server.address.clone();
                return Err(ServerError::Refused { address, code: "data loss", message: error.to_string() });
            }
        }
    }
    Ok(last.lock().ok().and_then(|mut last| last.take()))
}
