//! Arrow Flight: training sets computed for a spine that the client streams in, and stored datasets.
//!
//! - `DoExchange` with a `TrainingSetCommand`: the client sends the spine, the server answers with the training set, in the
//!   spine's order. With a dataset name it is stored on the way, and the last message carries what was stored.
//! - `DoGet` with a `DatasetTicket`: the batches of a stored dataset. `GetFlightInfo` with the same bytes describes it.

use std::pin::Pin;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest,
    HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use async_trait::async_trait;
use bytes::Bytes;
use datafusion::execution::SendableRecordBatchStream;
use feature_defs::catalog::Visibility;
use feature_defs::plan::ServicePlan;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use prost::Message as _;
use proto::v1::{DatasetTicket, TrainingSetCommand};
use tonic::{Request, Response, Status, Streaming};

use crate::dataset::{self, DatasetWriter, Manifest, Recipe};
use crate::engine::{Engine, EngineError, TrainingSetRequest};

/// What the service needs of the process around it.
#[async_trait]
pub trait Surroundings: Send + Sync + 'static {
    /// The compiled service of a project, or what to say when there is none.
    fn service(&self, project: &str, service: &str) -> Result<Arc<ServicePlan>, Status>;
    /// Makes sure that histories hold everything applied so far.
    async fn before_read(&self) -> Result<(), Status>;
    /// Records a dataset in the control log.
    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status>;
    /// The manifest's place of a dataset by name, and by id where one is given.
    fn dataset(&self, project: &str, name: &str, id: &str) -> Result<Path, Status>;
    /// Now, as RFC 3339: information for manifests.
    fn now(&self) -> String;
}

pub struct Flight {
    engine: Arc<Engine>,
    surroundings: Arc<dyn Surroundings>,
    /// Bytes a client may send as one spine.
    spine_bytes_max: usize,
}

/// Messages of the Flight service may be as large as one batch of wide rows.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The service, ready to be added to a server.
pub fn service(
    engine: Arc<Engine>,
    surroundings: Arc<dyn Surroundings>,
    memory_bytes: u64,
) -> FlightServiceServer<Flight> {
    // A spine larger than half the memory bound leaves no room for its answers.
    let spine_bytes_max = usize::try_from(memory_bytes / 2).unwrap_or(usize::MAX);
    FlightServiceServer::new(Flight { engine, surroundings, spine_bytes_max })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// What became of a stored training set; the `app_metadata` of the last message.
#[derive(serde::Serialize)]
struct Stored<'a> {
    dataset: &'a str,
    id: &'a str,
    location: String,
    rows: u64,
}

impl Flight {
    async fn exchange(
        &self,
        incoming: Streaming<FlightData>,
    ) -> Result<BoxStream<'static, Result<FlightData, Status>>, Status> {
        let mut incoming = incoming.peekable();
        let first = match Pin::new(&mut incoming).peek().await {
            Some(Ok(first)) => first,
            Some(Err(status)) => return Err(status.clone()),
            None => return Err(Status::invalid_argument("the exchange ended before it began")),
        };
        let descriptor = first.flight_descriptor.clone().ok_or_else(|| {
            Status::invalid_argument("the first message carries no descriptor; its `cmd` must be a TrainingSetCommand")
        })?;
        let command = TrainingSetCommand::decode(descriptor.cmd.clone()).map_err(|error| {
            Status::invalid_argument(format!("the descriptor's `cmd` is no TrainingSetCommand: {error}"))
        })?;
        let service = self.surroundings.service(&command.project, &command.service)?;
        let visibility = match command.visibility.as_str() {
            "" => None,
            "known" => Some(Visibility::Known),
            "event_time" => Some(Visibility::EventTime),
            "ingested" => Some(Visibility::Ingested),
            other => {
                let message = format!("visibility `{other}` is unknown; it is known, event_time or ingested");
                return Err(Status::invalid_argument(message));
            }
        };
        if !command.dataset.is_empty() && !is_name(&command.dataset) {
            let message =
                format!("`{}` is not a dataset name: letters, digits, `_` and `-`, at most 64", command.dataset);
            return Err(Status::invalid_argument(message));
        }

        // Clients of the C++ library send the descriptor in a message of its own, which holds nothing to decode.
        let data = incoming.try_filter(|message| std::future::ready(!message.data_header.is_empty()));
        let mut spine =
            FlightRecordBatchStream::new_from_flight_data(data.map_err(|status| FlightError::Tonic(Box::new(status))));
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut bytes = 0;
        while let Some(batch) = spine.next().await {
            let batch =
                batch.map_err(|error| Status::invalid_argument(format!("the spine could not be read: {error}")))?;
            bytes += batch.get_array_memory_size();
            if bytes > self.spine_bytes_max {
                let limit = self.spine_bytes_max >> 20;
                let message = format!("the spine is larger than {limit} MiB, half of offline.memory; send it in parts");
                return Err(Status::resource_exhausted(message));
            }
            batches.push(batch);
        }
        let spine_schema = spine.schema().cloned().ok_or_else(|| {
            Status::invalid_argument("the spine has no schema; send record batches after the descriptor")
        })?;
        self.surroundings.before_read().await?;
        let spine_digest = dataset::table_digest(&spine_schema, &batches);
        let request = TrainingSetRequest {
            service: service.clone(),
            spine_schema,
            spine: batches,
            statuses: command.statuses,
            visibility,
            order: crate::point_in_time::Order::Spine,
        };
        let set = self.engine.training_set(request).await.map_err(|error| engine_status(&error))?;
        let schema = set.schema.clone();
        let batches = if command.dataset.is_empty() {
            set.stream.map(|batch| batch.map(Part::Batch).map_err(stream_error)).boxed()
        } else {
            let recipe = Recipe {
                name: command.dataset.clone(),
                service,
                spine_digest,
                sources: set.sources,
                visibility: if command.visibility.is_empty() { "known".into() } else { command.visibility.clone() },
                seed: command.seed,
                created_at: self.surroundings.now(),
            };
            let store = self.engine.store().clone();
            let writer = DatasetWriter::create(store, &self.engine.project_path(), recipe, schema.clone())
                .map_err(|error| Status::internal(error.to_string()))?;
            keep(set.stream, writer, self.surroundings.clone())
        };
        // The encoder sends schema and batches; what was stored follows in a message of its own.
        let (metadata_sender, metadata_receiver) = tokio::sync::oneshot::channel::<Bytes>();
        let mut metadata_sender = Some(metadata_sender);
        let only_batches = batches.filter_map(move |part| {
            let kept = match part {
                Ok(Part::Batch(batch)) => Some(Ok(batch)),
                Ok(Part::Stored(metadata)) => {
                    if let Some(sender) = metadata_sender.take() {
                        // The receiver is gone only when the client is.
                        let _ = sender.send(metadata);
                    }
                    None
                }
                Err(error) => Some(Err(error)),
            };
            async move { kept }
        });
        let encoded = FlightDataEncoderBuilder::new().with_schema(schema).build(only_batches).map_err(Status::from);
        let last = stream::once(metadata_receiver).filter_map(|metadata| async move {
            let app_metadata = metadata.ok()?;
            Some(Ok(FlightData { app_metadata, ..FlightData::default() }))
        });
        Ok(encoded.chain(last).boxed())
    }

    async fn stored(&self, ticket: &DatasetTicket) -> Result<(Manifest, Path), Status> {
        let path = self.surroundings.dataset(&ticket.project, &ticket.name, &ticket.id)?;
        let manifest = dataset::open(self.engine.store(), &path).await.map_err(|e| Status::data_loss(e.to_string()))?;
        Ok((manifest, path))
    }
}

enum Part {
    Batch(RecordBatch),
    Stored(Bytes),
}

/// Passes batches on while they are written, and then says what was stored.
fn keep(
    batches: SendableRecordBatchStream,
    writer: DatasetWriter,
    surroundings: Arc<dyn Surroundings>,
) -> BoxStream<'static, Result<Part, FlightError>> {
    let state = Some((batches, writer, surroundings));
    stream::try_unfold(state, |state| async move {
        let Some((mut batches, mut writer, surroundings)) = state else { return Ok(None) };
        let failed = |error: dataset::DatasetError| FlightError::Tonic(Box::new(Status::internal(error.to_string())));
        match batches.next().await {
            Some(Ok(batch)) => {
                writer.write(&batch).await.map_err(failed)?;
                Ok(Some((Part::Batch(batch), Some((batches, writer, surroundings)))))
            }
            Some(Err(error)) => Err(stream_error(error)),
            None => {
                let (manifest, path) = writer.finish().await.map_err(failed)?;
                surroundings
                    .dataset_created(&manifest, &path)
                    .await
                    .map_err(|status| FlightError::Tonic(Box::new(status)))?;
                let stored = Stored {
                    dataset: &manifest.name,
                    id: &manifest.id,
                    location: path.to_string(),
                    rows: manifest.rows,
                };
                let metadata = serde_json::to_vec(&stored).unwrap_or_default();
                Ok(Some((Part::Stored(metadata.into()), None)))
            }
        }
    })
    .boxed()
}

fn is_name(name: &str) -> bool {
    name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

fn stream_error(error: datafusion::error::DataFusionError) -> FlightError {
    let status = match &error {
        datafusion::error::DataFusionError::External(source) => match source.downcast_ref::<EngineError>() {
            Some(engine) => engine_status(engine),
            None => Status::internal(error.strip_backtrace()),
        },
        _ => Status::internal(error.strip_backtrace()),
    };
    FlightError::Tonic(Box::new(status))
}

fn engine_status(error: &EngineError) -> Status {
    let text = chain(error);
    match error {
        EngineError::MissingColumn { .. }
        | EngineError::WrongType { .. }
        | EngineError::Null { .. }
        | EngineError::NameTaken { .. } => Status::invalid_argument(text),
        EngineError::Memory { .. } => Status::resource_exhausted(text),
        EngineError::Source(_) => Status::failed_precondition(text),
        EngineError::History { .. } => Status::data_loss(text),
        EngineError::Setup(_) | EngineError::Run(_) => Status::internal(text),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

fn ticket_of(bytes: &Bytes) -> Result<DatasetTicket, Status> {
    DatasetTicket::decode(bytes.clone())
        .map_err(|error| Status::invalid_argument(format!("these bytes are no DatasetTicket: {error}")))
}

#[async_trait]
impl FlightService for Flight {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoExchangeStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;

    async fn do_exchange(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        Ok(Response::new(self.exchange(request.into_inner()).await?))
    }

    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let (manifest, path) = self.stored(&ticket_of(&request.into_inner().ticket)?).await?;
        let batches = self.engine.stored(&path, &manifest).await.map_err(|error| engine_status(&error))?;
        let schema = batches.schema();
        let encoded = FlightDataEncoderBuilder::new().with_schema(schema).build(batches.map_err(stream_error));
        Ok(Response::new(encoded.map_err(Status::from).boxed()))
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let descriptor = request.into_inner();
        let (manifest, path) = self.stored(&ticket_of(&descriptor.cmd)?).await?;
        let batches = self.engine.stored(&path, &manifest).await.map_err(|error| engine_status(&error))?;
        let ticket = Ticket::new(descriptor.cmd.clone());
        let info = FlightInfo::new()
            .try_with_schema(&batches.schema())
            .map_err(|error| Status::internal(error.to_string()))?
            .with_endpoint(FlightEndpoint::new().with_ticket(ticket))
            .with_total_records(manifest.rows as i64)
            .with_total_bytes(manifest.files.iter().map(|file| file.bytes as i64).sum())
            .with_ordered(true)
            .with_descriptor(descriptor);
        Ok(Response::new(info))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let info = self.get_flight_info(request).await?.into_inner();
        Ok(Response::new(SchemaResult { schema: info.schema }))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(Status::unimplemented("no handshake is needed"))
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        Err(Status::unimplemented("datasets are listed by coeval.v1.Control/ListDatasets"))
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        Err(Status::unimplemented("training sets are computed by DoExchange"))
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        Err(Status::unimplemented("events are pushed by coeval.v1.Ingest/Push"))
    }

    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        Err(Status::unimplemented("there are no actions"))
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        Ok(Response::new(stream::empty().boxed()))
    }
}
